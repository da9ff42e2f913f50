"""What five earlier projects of this kind could do works here, in small: tests a to e, a letter for each project.

They build its configuration by the names of this project, train a few steps and sample. Two more tie it all together:
a network learns four pictures by heart, and the schedulers of diffusers draw the same as ours.
"""

import contextlib
import json

import pytest
import torch
import torch.nn as nn
from conftest import INFO, TINY
from networks import ResNetUNet
from PIL import Image

import diffusion_model as dm
import support
from diffusion_model import (
    DiffusionModel,
    SimpleDiffusion,
    SimpleUNet,
    TrainConfig,
    load_images,
    main,
    train,
)

# The flags that make diffusion_model.py each of these projects, all of them with COMMON:
COMMON = "--prediction noise --t-distribution uniform --unconditional"
SETTINGS = {
    "a. Simple Diffusion Model": "--n-steps 500",
    "b. CIFAR-10 Diffusion Model": "--channel-mults 1 2 4 --num-res-blocks 3 --attention-levels 1 2",
    "c. DDPM Diffusion Model for CIFAR-10": "--channel-mults 1 2 4 --attention-levels 1 2 --batch-size 128",
    "d. Diffusion Model with CIFAR10": "--channel-mults 1 2 4 8 --num-heads 4 --attention-levels 1 2 3",
    "e. Diffusion Models": "--image-size 64 --n-steps 500 --schedule cosine",  # its ResNet-18: networks.py
}
SMALL_RUN = dict(
    data="shapes", image_size=8, limit=32, batch_size=8, hidden_channels=8, device="cpu"
)


def shapes(size, count):
    """The first pictures of `data="shapes"` as a network is fed them: (count, 3, size, size) in [-1, 1]."""
    return support.from_uint8(load_images("shapes", size, count)[0])


def fit(model, batch, steps, optimizer):
    """A user's training loop, with cosine annealing: -> loss over the first and the last five steps."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[:5]) / 5, sum(losses[-5:]) / 5


def assert_images(images, shape):
    assert tuple(images.shape) == shape
    assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1


def full_size(**options):
    """A SimpleUNet of the true size, without memory or work: for its structure and its number of parameters."""
    with torch.device("meta"):
        return SimpleUNet(**options)


@pytest.mark.parametrize("flags", SETTINGS.values(), ids=SETTINGS)
def test_the_settings_of_each_are_flags(monkeypatch, flags):
    given = []
    monkeypatch.setattr(dm, "train", given.append)
    main([*COMMON.split(), *flags.split()])
    assert given[0].unconditional and (given[0].prediction, given[0].t_distribution) == (
        "noise",
        "uniform",
    )


def test_a_one_command_trains_shows_grids_and_writes_a_checkpoint(tmp_path, capsys):
    """500 steps, a 2x2 grid after every sample_every epochs, the checkpoint at the end; device and size printed."""
    config = TrainConfig()
    assert (config.data, config.image_size, config.epochs, config.sample_every) == (
        "cifar10",
        32,
        100,
        5,
    )
    main(
        [
            "--data",
            "shapes",
            "--image-size",
            "8",
            "--limit",
            "16",
            "--batch-size",
            "8",
            "--hidden-channels",
            "8",
            "--n-steps",
            "500",
            "--epochs",
            "4",
            "--sample-every",
            "2",
            "--device",
            "cpu",
            "--out",
            str(tmp_path),
        ]
    )
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert names == {
        "data.png",
        "noising.png",
        "loss.png",
        "nearest.png",
        "epoch_0002.png",
        "epoch_0004.png",
    }
    with Image.open(tmp_path / "samples" / "epoch_0004.png") as grid:
        assert grid.width == grid.height >= 2 * 8
    model = SimpleDiffusion.load(tmp_path / "diffusion_model.pth", device="cpu")
    assert model.diffusion.n_steps == 500
    assert_images(model.sample(2, steps=2, progress=False), (2, 3, 8, 8))
    printed = capsys.readouterr().out
    assert "cpu" in printed and "parameters" in printed and str(tmp_path.resolve()) in printed


@pytest.mark.parametrize(
    "mps, cuda, expected", [(True, True, "mps"), (False, True, "cuda"), (False, False, "cpu")]
)
def test_a_mps_then_cuda_then_cpu(monkeypatch, mps, cuda, expected):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert dm.pick_device().type == expected


def test_a_what_each_device_gets(monkeypatch):
    """channels_last but on MPS; bfloat16 on a CPU only where it multiplies that in hardware."""
    formats = [dm.memory_format(torch.device(kind)) for kind in ("cpu", "cuda", "mps")]
    assert formats == [torch.channels_last, torch.channels_last, torch.contiguous_format]
    for found, wanted in (
        (dict(amx_bf16=True), True),
        (dict(avx512_bf16=True), True),
        (dict(avx512_f=True), False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
        assert dm.has_bfloat16(torch.device("cpu")) is wanted
    assert not dm.has_bfloat16(torch.device("mps"))


def test_a_the_classes_train_in_a_loop_of_ones_own_and_stay_in_train_mode_after_a_preview():
    torch.manual_seed(0)
    diffusion = DiffusionModel(SimpleUNet(hidden_channels=8), n_steps=500)
    first, last = fit(
        diffusion, (shapes(8, 8),), 20, torch.optim.Adam(diffusion.parameters(), lr=2e-3)
    )
    assert last < first
    early, late = (diffusion.model(torch.zeros(1, 3, 8, 8), torch.tensor([t])) for t in (0, 499))
    assert (
        early - late
    ).abs().mean() > 1e-3  # project A computed its time embedding and never used it
    diffusion.sample((2, 3, 8, 8), steps=2, progress=False)
    assert all(part.training for part in diffusion.modules())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run with B's options: AdamW with a cosine, 1e-4, attention at several resolutions."""
    out = tmp_path_factory.mktemp("trained")
    train(TrainConfig(**SMALL_RUN, out=str(out), epochs=2, lr=1e-4, attention_levels=(0, 1, 2)))
    return out


def test_b_checkpoint_carries_its_configuration_and_needs_none_of_our_loading(trained):
    saved = torch.load(trained / "diffusion_model.pth", weights_only=True)
    assert {"model_config", "diffusion_config", "model_state_dict"} <= set(saved)
    network = SimpleUNet(**saved["model_config"])
    network.load_state_dict(saved["model_state_dict"])
    ours = SimpleDiffusion.load(trained / "diffusion_model.pth", device="cpu").model
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 900])
    torch.testing.assert_close(network.eval()(x, t), ours(x, t), atol=1e-4, rtol=0)
    images = DiffusionModel(network, **saved["diffusion_config"]).sample(
        (2, 3, 8, 8), steps=3, progress=False
    )
    assert_images((images + 1) / 2, (2, 3, 8, 8))


def test_b_model_info_says_how_it_was_trained(trained):
    info = json.loads((trained / "model_info.json").read_text())
    assert set(info) >= INFO
    assert (
        info["images_seen"] == 2 * 32
        and info["learning_rate"] == 1e-4
        and "AdamW" in info["optimizer"]
    )
    model = SimpleDiffusion.load(trained / "diffusion_model.pth", device="cpu")
    assert info["parameters"] == support.count_parameters(model)


def test_b_attention_works_at_several_resolutions(trained):
    network, sizes = (
        SimpleDiffusion.load(trained / "diffusion_model.pth", device="cpu").model,
        set(),
    )
    for part in network.modules():
        if isinstance(part, dm.Attention):
            part.register_forward_hook(lambda part, inputs, output: sizes.add(output.shape[-1]))
    network(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64))
    assert sizes == {8, 4, 2}


def test_b_generate_images(trained):
    from inference_example import generate_images

    model = SimpleDiffusion.load(trained / "diffusion_model.pth", device="cpu")
    assert_images(generate_images(model, num_images=8), (8, 3, 8, 8))


def test_c_the_ddpm_configuration_learns_and_draws_sixteen_images():
    """Channels in the ratio of 64-128-256, 2 blocks a level, time embedding 128, 1000 linear steps; Adam at 2e-4."""
    options = dict(channel_mults=(1, 2, 4), num_res_blocks=2, attention_levels=(1, 2), time_dim=128)
    assert support.count_parameters(full_size(hidden_channels=64, **options)) > 11e6
    torch.manual_seed(0)
    model = SimpleDiffusion(
        8,
        n_steps=1000,
        hidden_channels=16,
        schedule="linear",
        prediction="noise",
        beta_start=1e-4,
        beta_end=0.02,
        **options,
    )
    assert model.diffusion.betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    first, last = fit(model, (shapes(8, 16),), 50, torch.optim.Adam(model.parameters(), lr=2e-4))
    assert last < 0.98 * first
    assert_images(model.to("cpu").sample(16, steps=3, progress=False), (16, 3, 8, 8))


def test_c_trains_from_python_and_can_go_on(tmp_path):
    """train(num_epochs, batch_size, lr, device) of that project is train(TrainConfig(...)) here."""
    options = dict(SMALL_RUN, batch_size=16, lr=2e-4, sample_every=1, out=str(tmp_path))
    model = train(TrainConfig(epochs=1, **options))
    assert (tmp_path / "diffusion_model.pth").exists() and (
        tmp_path / "training_state.pth"
    ).exists()
    assert_images(model.to("cpu").sample(16, steps=2, progress=False), (16, 3, 8, 8))
    train(TrainConfig(epochs=2, **options))
    assert json.loads((tmp_path / "model_info.json").read_text())["epochs"] == 2


@pytest.mark.parametrize(
    "num_heads, attention_levels, n_steps, beta_start, beta_end, time_dim",
    [
        (1, (), 100, 1e-4, 0.02, 32),
        (4, (3,), 300, 1e-4, 0.01, 128),
        (8, (1, 2, 3), 1000, 5e-4, 0.03, 256),
    ],
)
def test_d_what_can_be_chosen(num_heads, attention_levels, n_steps, beta_start, beta_end, time_dim):
    """Channels 64-128-256-512 where it costs nothing, an eighth of that where it learns."""
    options = dict(
        num_heads=num_heads,
        attention_levels=attention_levels,
        time_dim=time_dim,
        channel_mults=(1, 2, 4, 8),
    )
    network = full_size(hidden_channels=64, **options)
    attentions = [part for part in network.modules() if isinstance(part, dm.Attention)]
    assert len(attentions) == 4 * len(attention_levels) + (
        3 in attention_levels
    )  # 2 down, 2 up, 1 in the middle
    assert {part.num_heads for part in attentions} <= {num_heads}
    assert {part.out_channels for part in network.modules() if isinstance(part, nn.Conv2d)} == {
        64,
        128,
        256,
        512,
        3,
    }
    torch.manual_seed(0)
    model = SimpleDiffusion(
        8, n_steps, hidden_channels=8, beta_start=beta_start, beta_end=beta_end, **options
    )
    first, last = fit(model, (shapes(8, 16),), 15, torch.optim.AdamW(model.parameters(), lr=2e-3))
    assert last < first
    betas = (
        model.diffusion.betas * n_steps / 1000
    )  # they are scaled, so that fewer steps still end in noise
    assert betas[[0, -1]].tolist() == pytest.approx([beta_start, beta_end])
    assert_images(model.sample(2, steps=3, progress=False), (2, 3, 8, 8))


@pytest.fixture
def pictures(tmp_path):
    """A folder with five pictures of several sizes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(load_images("shapes", 80, 5)[0].permute(0, 2, 3, 1).numpy()):
        Image.fromarray(picture[: 80 - 8 * i]).save(folder / f"{i}.png")
    return folder


def test_e_a_resnet_as_network_trains_in_five_lines_and_every_sampler_draws_from_it(pictures):
    """T = 500, cosine, AdamW with cosine annealing, pictures of a folder resized to 64x64 and kept in memory."""
    images, labels, class_names = load_images(str(pictures), 64)
    assert (
        images.shape == (5, 3, 64, 64)
        and images.dtype == torch.uint8
        and labels is class_names is None
    )
    x = support.from_uint8(images)
    torch.manual_seed(0)
    diffusion = DiffusionModel(ResNetUNet(), n_steps=500, schedule="cosine")
    first, last = fit(diffusion, (x,), 15, torch.optim.AdamW(diffusion.parameters(), lr=1e-3))
    assert last < 0.8 * first
    for sampler in ("ddpm", "ddim", "dpm++"):
        images = diffusion.sample((2, 3, 64, 64), sampler, steps=3, seed=0, progress=False)
        assert_images((images + 1) / 2, (2, 3, 64, 64))
        # In eval mode, as sampling is, BatchNorm too leaves each image to itself.
        alone = diffusion.sample((1, 3, 64, 64), sampler, steps=3, seed=0, progress=False)
        assert (images[:1] - alone).abs().mean() < 0.02
    assert diffusion.model.training


def test_e_weights_can_be_loaded_into_the_encoder(tmp_path):
    from torchvision.models import resnet18

    pretrained = resnet18()
    torch.save(pretrained.state_dict(), tmp_path / "resnet18.pth")
    network = ResNetUNet(weights=tmp_path / "resnet18.pth")
    assert torch.equal(network.encoder[0][0].weight, pretrained.conv1.weight)
    assert torch.equal(network.encoder[4][1].conv2.weight, pretrained.layer4[1].conv2.weight)


def test_e_a_run_shows_the_data_and_the_two_schedules(pictures, tmp_path):
    train(
        TrainConfig(
            data=str(pictures),
            image_size=64,
            out=str(tmp_path),
            epochs=1,
            batch_size=5,
            hidden_channels=4,
            channel_mults=(1, 2),
            attention_levels=(),
            n_steps=500,
            schedule="cosine",
            device="cpu",
        )
    )
    colours = {}
    for name in ("data", "noising", "epoch_0001"):
        with Image.open(tmp_path / "samples" / f"{name}.png") as picture:
            assert min(picture.size) >= 64
            colours[name] = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
            assert len(colours[name]) > 10
    assert {(31, 119, 180), (255, 127, 14)} <= colours[
        "noising"
    ]  # matplotlib's first two colours: two curves
    info = json.loads((tmp_path / "model_info.json").read_text())
    assert info["license"] == "not stated"  # the pictures are not ours


def test_e_the_strip_of_noising(tmp_path, monkeypatch):
    seen, q_sample = [], DiffusionModel.q_sample
    monkeypatch.setattr(
        DiffusionModel,
        "q_sample",
        lambda self, x, t: seen.extend(t.tolist()) or q_sample(self, x, t),
    )
    processes = {name: DiffusionModel(None, schedule=name) for name in ("linear", "cosine")}
    support.plot_noising(torch.zeros(3, 8, 8), processes, "cosine", tmp_path / "noising.png")
    assert seen == [0, 100, 300, 500, 999]


def test_four_pictures_are_learned_by_heart():
    """Each of four pictures is a class of its own: asked for the class, the model draws the picture."""
    torch.manual_seed(0)
    x = shapes(8, 4)
    model = SimpleDiffusion(
        8,
        hidden_channels=16,
        channel_mults=(1, 2),
        num_res_blocks=1,
        attention_levels=(1,),
        time_dim=64,
        class_names=["a", "b", "c", "d"],
    )
    y = torch.arange(4).repeat(4)
    fit(model, (x[y], y), 300, torch.optim.AdamW(model.parameters(), lr=5e-3))
    drawn = model.sample(4, y=[0, 1, 2, 3], seed=0, progress=False) * 2 - 1
    rms = (
        (drawn[:, None] - x[None]).square().mean(dim=(2, 3, 4)).sqrt()
    )  # row: what was drawn, column: what exists
    assert rms.diagonal().max() < 0.25, rms
    assert rms.argmin(dim=1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["noise", "v"])
@pytest.mark.parametrize(
    "sampler, steps", [("ddpm", 50), ("ddim", 28), ("dpm++", 10), ("dpm++", 20)]
)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # those of diffusers are its own
def test_diffusers_draws_the_same(monkeypatch, sampler, steps, prediction, schedule):
    """The schedulers of diffusers, an independent implementation, draw our pictures with our network.

    Where its conventions differ from ours, and what makes them agree:
    - Clipping of x_0: DDPM has clip_sample; DDIM re-derives the noise from the clipped x_0 with
      use_clipped_model_output only; DPM-Solver++ clips in no mode but thresholding, whose percentile
      sample_max_value=1 turns into plain clipping to [-1, 1].
    - Timesteps: DDPM and DPM-Solver++ take a list. DDIM takes none, but each step goes down by
      n_steps // num_inference_steps: 1000 // 27 = 37 = 999 / 27, the spacing of our 28 timesteps from 999 to 0.
    - The end: clean (set_alpha_to_one, final_sigmas_type "zero"), with a last step of first order, as ours.
    - Noise of DDPM: the posterior variance ("fixed_small"), drawn by one generator an image: seed + i, as ours.
    """
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(
        dm, "autocast", lambda device: contextlib.nullcontext()
    )  # bfloat16 would blur both
    torch.manual_seed(0)
    network = SimpleUNet(**TINY).eval()
    nn.init.normal_(
        network.up[-1]["exit"][-1].weight, std=0.1
    )  # predictions of about the size of true ones
    if (
        prediction == "noise"
    ):  # x_t is mostly that; without it x_0 is beyond -1 or 1 nearly everywhere
        network.register_forward_hook(lambda module, inputs, output: 0.5 * output + inputs[0])
    ours = DiffusionModel(network, schedule=schedule, prediction=prediction)
    options = dict(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
        prediction_type={"noise": "epsilon", "v": "v_prediction"}[prediction],
    )
    timesteps = ours.timesteps(sampler, steps)
    generators = [torch.Generator().manual_seed(3 + i) for i in range(2)]
    if sampler == "ddpm":
        scheduler = diffusers.DDPMScheduler(
            **options, variance_type="fixed_small", clip_sample=True
        )
        scheduler.set_timesteps(timesteps=timesteps)
        extra = dict(generator=generators)
    elif sampler == "ddim":
        scheduler = diffusers.DDIMScheduler(**options, clip_sample=True, set_alpha_to_one=True)
        scheduler.set_timesteps(27)
        extra = dict(eta=0.0, use_clipped_model_output=True)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **options,
            algorithm_type="dpmsolver++",
            solver_order=2,
            solver_type="midpoint",
            final_sigmas_type="zero",
            thresholding=True,
            sample_max_value=1.0,
        )
        scheduler.set_timesteps(timesteps=timesteps)
        extra = {}
    x_t = torch.stack([torch.randn(3, 16, 16, generator=generator) for generator in generators])
    with torch.inference_mode():
        for t in timesteps:
            x_t = scheduler.step(network(x_t, torch.full((2,), t)), t, x_t, **extra).prev_sample
    drawn = ours.sample((2, 3, 16, 16), sampler, steps, seed=3, progress=False)
    torch.testing.assert_close(drawn, x_t, rtol=0, atol=2e-4)
