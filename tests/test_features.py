"""What five earlier projects could do works here, in small: tests a to e, a letter for each.

They build its configuration by the names of this project, train a few steps and draw. The order of
the devices, the memory, and the pictures of noising are held by other test files.
"""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torchvision
from conftest import ROOT, TINY, TINY_RUN, error_of, flags
from networks import ResNetUNet
from PIL import Image
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchvision.transforms.functional import pil_to_tensor

import diffusion_model as dm
from inference_example import generate_images

INFO = """architecture parameters dataset images_seen epochs batch_size optimizer learning_rate
prediction schedule n_steps final_loss training_minutes device torch date license""".split()


def shapes(size, count):
    """Pictures as a network is fed them: (count, 3, size, size) in [-1, 1]."""
    return dm.draw_shapes(size, count)[0] / 127.5 - 1


def learns(model, batch, steps, lr, optimizer=torch.optim.AdamW):
    """A loop of one's own, with cosine annealing and clipping: -> the last loss / the first."""
    optimizer = optimizer(model.parameters(), lr=lr)
    schedule, losses = CosineAnnealingLR(optimizer, steps), []
    for _ in range(steps):
        loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-5:]) / sum(losses[:5])


def assert_images(images, *shape):
    assert images.shape == shape
    assert images.isfinite().all() and 0 <= images.min() < images.max() <= 1


def of_flags(monkeypatch, line):
    """The model that a command line would train on CIFAR-10, of full size but without memory."""
    with monkeypatch.context() as patch, torch.device("meta"):
        patch.setattr(dm, "train", lambda config: configs.append(config))
        configs = []
        dm.main(line.split())
        images = torch.zeros(1, 3, configs[0].image_size, configs[0].image_size)
        return dm.new_model(configs[0], images, None)


def attention_sizes(model, size):
    """The sizes at which a network has attention, largest first."""
    sizes = set()
    for part in model.modules():
        if isinstance(part, dm.Attention):
            part.register_forward_hook(lambda part, inputs, output: sizes.add(output.shape[-1]))
    model.network(torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.int64))
    return sorted(sizes, reverse=True)


def test_a_one_command_downloads_trains_shows_grids_and_writes_the_weights(
    here, monkeypatch, capsys
):
    """By default CIFAR-10 for 100 epochs and a grid every 5, here for 4 and one every 2."""
    config = dm.TrainConfig()
    assert (config.data, config.epochs, config.sample_every, config.out) == ("cifar10", 100, 5, ".")
    asked, pictures = [], dm.draw_shapes(32, 16)[0].permute(0, 2, 3, 1).numpy()

    def cifar10(folder, train, download):
        asked.append((str(folder), train, download))
        return SimpleNamespace(data=pictures, targets=[0, 1] * 8, classes=["cat", "ship"])

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", cifar10)
    small = dict(batch_size=8, hidden_channels=8, num_res_blocks=1, channel_mults=[1, 1])
    dm.main(flags(epochs=4, sample_every=2, n_steps=500, device="cpu", **small))
    assert asked == [("data", True, True)]
    names = sorted(path.name for path in (here / "samples").iterdir())
    assert names == ["data.png", "epoch_0002.png", "epoch_0004.png", "loss.png"]
    with Image.open("samples/epoch_0004.png") as grid:  # two by two, each about 128 pixels wide
        assert grid.width == grid.height and 256 <= grid.width < 300
    model = dm.SimpleDiffusion.load("diffusion_model.pth", "cpu")
    assert model.diffusion.n_steps == 500 and model.class_names == ["cat", "ship"]
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    printed = capsys.readouterr().out
    assert "cpu" in printed and f"{parameters:.1f} M parameters" in printed


def test_a_the_classes_train_in_a_loop_of_ones_own():
    """A made an embedding of the time and never used it, and its previews left training mode."""
    torch.manual_seed(0)
    diffusion = dm.DiffusionModel(dm.SimpleUNet(hidden_channels=8), n_steps=500)
    assert learns(diffusion, (shapes(8, 8),), 20, 2e-3) < 1
    early, late = (diffusion.model(torch.zeros(1, 3, 8, 8), torch.tensor([t])) for t in (0, 499))
    assert (early - late).abs().mean() > 1e-3
    diffusion.sample((2, 3, 8, 8), steps=2, progress=False)
    assert all(part.training for part in diffusion.modules())


def test_b_the_size_of_that_project_is_a_matter_of_flags(monkeypatch):
    """Its 16.8 M parameters, with attention at two resolutions, within a tenth."""
    line = "--channel-mults 1 2 4 --num-res-blocks 3 --attention-levels 1 2"
    model = of_flags(monkeypatch, f"{line} --prediction noise --t-distribution uniform")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(16.8e6, rel=0.1)


def test_b_a_checkpoint_says_what_it_is(here):
    """Its configuration builds network and process again, and model_info.json has the details."""
    run = {**TINY_RUN, "lr": 1e-4, "attention_levels": (0, 1)}
    dm.train(dm.TrainConfig(**run, unconditional=True, device="cpu"))
    saved = torch.load("diffusion_model.pth", weights_only=True)
    network = dm.SimpleUNet(**saved["model_config"]).eval()
    network.load_state_dict(saved["model_state_dict"])
    model = dm.SimpleDiffusion.load("diffusion_model.pth", "cpu")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 19])
    torch.testing.assert_close(network(x, t), model.model(x, t))
    drawn = dm.DiffusionModel(network, **saved["diffusion_config"]).sample((2, 3, 8, 8), seed=0)
    torch.testing.assert_close((drawn + 1) / 2, model.sample(2, seed=0))
    assert_images(generate_images(model, num_images=8), 8, 3, 8, 8)
    assert attention_sizes(model, 8) == [8, 4]
    info = json.loads((here / "model_info.json").read_text())
    assert set(INFO) <= set(info) and saved["info"] == info
    assert (info["images_seen"], info["epochs"], info["learning_rate"]) == (2 * 24, 2, 1e-4)
    assert info["parameters"] == sum(p.numel() for p in network.parameters())


def test_c_the_ddpm_configuration_learns_and_draws_sixteen_images(monkeypatch):
    """64-128-256, two blocks a level, 1000 linear steps of 1e-4 to 0.02, Adam at 2e-4."""
    line = "--channel-mults 1 2 4 --attention-levels 1 2 --prediction noise --batch-size 128"
    model = of_flags(monkeypatch, line)
    assert {part.out_channels for part in model.modules() if isinstance(part, nn.Conv2d)} == {
        *(64, 128, 256, 3)
    }
    options = {**model.network.config, "hidden_channels": 16, "time_dim": 128}
    torch.manual_seed(0)
    model = dm.SimpleDiffusion(8, schedule="linear", prediction="noise", **options)
    betas = model.diffusion.betas
    assert len(betas) == 1000 and betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    assert learns(model, (shapes(8, 16),), 40, 2e-4, torch.optim.Adam) < 0.98
    assert_images(model.to("cpu").sample(16, steps=3, progress=False), 16, 3, 8, 8)


def test_c_trains_from_python_with_checkpoints_and_tensorboard(here, monkeypatch):
    """A checkpoint and a value of the loss for each epoch. A longer run goes on where one ended."""
    written = []

    class SummaryWriter:
        def __init__(self, folder, **_):
            self.folder = str(folder)

        def add_scalar(self, tag, value, step):
            written.append((self.folder, tag, step, 0 < value < 10))

        flush = close = lambda self: None

    module = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    for epochs in (1, 2):
        run = {**TINY_RUN, "epochs": epochs, "lr": 2e-4, "sample_every": 1}
        model = dm.train(dm.TrainConfig(**run, device="cpu", tensorboard=True))
        assert json.loads((here / "model_info.json").read_text())["epochs"] == epochs
    assert written == [(str(here / "tensorboard"), "loss", step, True) for step in (3, 6)]
    assert_images(model.to("cpu").sample(16, steps=2, progress=False), 16, 3, 8, 8)


@pytest.mark.parametrize(
    "error, words",
    [
        (RuntimeError("CUDA out of memory. Tried to allocate"), ["out of memory"]),
        (ImportError("No module named 'tqdm'"), ["tqdm", "pip install -r requirements.txt"]),
    ],
)
def test_c_advice(monkeypatch, capsys, error, words):
    """Both end in one line, and the README says what to do when memory or a package is missing."""

    def fails(config):
        raise error

    monkeypatch.setattr(dm, "train", fails)
    line, readme = error_of(dm.main, capsys), (ROOT / "README.md").read_text()
    assert all(word in line for word in words)
    assert re.search("(?i)out of memory.*--batch-size", readme) and "No module named" in readme


@pytest.mark.parametrize(
    "num_heads, levels, n_steps, betas, time_dim",
    [
        (1, (), 100, (1e-4, 0.02), 32),
        (4, (3,), 300, (1e-4, 0.01), 128),
        (8, (1, 2, 3), 1000, (5e-4, 0.03), 256),
    ],
)
def test_d_what_can_be_chosen(num_heads, levels, n_steps, betas, time_dim):
    """Channels, heads, the levels with attention, steps, betas and the width of the embedding."""
    torch.manual_seed(0)
    options = dict(num_heads=num_heads, attention_levels=levels, time_dim=time_dim)
    options.update(channel_mults=(1, 2, 4, 8), beta_start=betas[0], beta_end=betas[1])
    model = dm.SimpleDiffusion(8, n_steps, hidden_channels=8, **options)
    attentions = [part for part in model.modules() if isinstance(part, dm.Attention)]
    # Two blocks on the way down, two on the way up, and the middle belongs to the last level.
    assert len(attentions) == 4 * len(levels) + (3 in levels)
    assert {part.num_heads for part in attentions} <= {num_heads}
    assert attention_sizes(model, 8) == [8 >> level for level in levels]
    scaled = model.diffusion.betas * n_steps / 1000  # so that fewer steps still end in noise
    assert scaled[[0, -1]].tolist() == pytest.approx(betas)
    assert learns(model, (shapes(8, 16),), 15, 2e-3) < 1
    assert_images(model.sample(2, steps=3, progress=False), 2, 3, 8, 8)


@pytest.fixture
def pictures(tmp_path):
    """A folder with five pictures of several sizes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(dm.draw_shapes(80, 5)[0].permute(0, 2, 3, 1).numpy()):
        Image.fromarray(picture[: 80 - 8 * i]).save(folder / f"{i}.png")
    return folder


def test_e_a_resnet_trains_and_every_sampler_draws_from_it(pictures):
    """T = 500, cosine, AdamW with cosine annealing, pictures made 64x64 and kept in memory."""
    images, labels, class_names = dm.load_images(str(pictures), 64)
    assert images.shape == (5, 3, 64, 64) and images.dtype == torch.uint8
    assert labels is class_names is None
    torch.manual_seed(0)
    diffusion = dm.DiffusionModel(ResNetUNet(), n_steps=500, schedule="cosine")
    assert learns(diffusion, (images / 127.5 - 1,), 15, 1e-3) < 0.8
    for sampler in ("ddpm", "ddim", "dpm++"):
        options = dict(sampler=sampler, steps=3, seed=0, progress=False)
        drawn = diffusion.sample((2, 3, 64, 64), **options)
        assert_images((drawn + 1) / 2, 2, 3, 64, 64)
        # In eval mode, as sampling is, BatchNorm too leaves each image to itself.
        alone = diffusion.sample((1, 3, 64, 64), **options)
        assert (drawn[:1] - alone).abs().mean() < 0.02
    assert diffusion.model.training


def test_e_weights_can_be_loaded_into_the_encoder(tmp_path):
    pretrained = torchvision.models.resnet18()
    torch.save(pretrained.state_dict(), tmp_path / "resnet18.pth")
    network = ResNetUNet(weights=tmp_path / "resnet18.pth")
    assert torch.equal(network.encoder[4][1].conv2.weight, pretrained.layer4[1].conv2.weight)


def test_e_a_run_shows_its_data_and_samples(pictures, here):
    """The grid of data holds the pictures as they are fed to the network, if none is mirrored."""
    small = dict(hidden_channels=4, channel_mults=(1, 2), num_res_blocks=(1,), attention_levels=())
    run = dict(image_size=64, n_steps=500, schedule="cosine", epochs=1, batch_size=5, **small)
    dm.train(dm.TrainConfig(str(pictures), no_flip=True, device="cpu", out="run", **run))
    grid = pil_to_tensor(Image.open("run/samples/data.png"))
    for i, image in enumerate(dm.load_images(str(pictures), 64)[0]):  # side by side, 2 pixels apart
        left = 2 + 130 * i
        shown = grid[:, 2:130:2, left : left + 128 : 2].int()
        assert (shown - image.int()).abs().max() <= 1
    assert (here / "run/samples/epoch_0001.png").exists()
    assert json.loads((here / "run/model_info.json").read_text())["license"] == "not stated"


def test_four_pictures_are_learned_by_heart():
    """Each of them is a class of its own. Asked for the class, the model draws the picture."""
    torch.manual_seed(0)
    x, options = shapes(8, 4), {**TINY, "hidden_channels": 16, "time_dim": 64}
    model = dm.SimpleDiffusion(8, class_names=["a", "b", "c", "d"], **options)
    y = torch.arange(4).repeat(4)
    learns(model, (x[y], y), 300, 5e-3)
    drawn = model.sample(4, y=["a", "b", "c", "d"], seed=0, progress=False) * 2 - 1
    distance = (drawn[:, None] - x).square().mean(dim=(2, 3, 4)).sqrt()  # drawn by existing
    assert distance.diagonal().max() < 0.25 and distance.argmin(dim=1).tolist() == [0, 1, 2, 3]
