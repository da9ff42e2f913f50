"""What five earlier projects could do works here, in small: tests a to e, a letter for each.

They build its configuration by the names of this project, train a few steps and draw. All of b (its
size, its checkpoint), the order of the devices, the memory, TensorBoard and the pictures of noising
are held by other test files.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import ROOT, TINY, attention_sizes, error_of, flags
from networks import ResNetUNet
from torch.optim.lr_scheduler import CosineAnnealingLR

import diffusion_model as dm


def shapes(size, count):
    """Pictures as a network is fed them: (count, 3, size, size) in [-1, 1]."""
    return dm.draw_shapes(size, count)[0] / 127.5 - 1


def learns(model, batch, steps, lr):
    """A loop of one's own, with cosine annealing and clipping: -> the last loss / the first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
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


def test_a_one_command_downloads_trains_and_shows_grids(here, monkeypatch):
    """By default CIFAR-10 for 100 epochs and a grid every 5, here for 4 and one every 2."""
    config = dm.TrainConfig()
    assert (config.data, config.epochs, config.sample_every, config.out) == ("cifar10", 100, 5, ".")
    asked = []
    load = lambda data, *_: asked.append(data) or dm.draw_shapes(32, 16)
    monkeypatch.setattr(dm, "load_images", load)
    small = dict(batch_size=8, hidden_channels=8, num_res_blocks=1, channel_mults=[1, 1])
    dm.main(flags(epochs=4, sample_every=2, device="cpu", **small))
    assert asked == ["cifar10"] and Path("diffusion_model.pth").exists()
    names = sorted(path.name for path in Path("samples").iterdir())
    assert names == ["data.png", "epoch_0002.png", "epoch_0004.png", "loss.png"]


@pytest.mark.parametrize(
    "error, words",
    [
        (RuntimeError("CUDA out of memory. Tried to allocate"), ["out of memory"]),
        (
            ImportError("No module named 'tqdm'"),
            ["tqdm", "pip install -r requirements.txt"],
        ),
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
    "num_heads, levels, n_steps, betas, time_dim, prediction",
    [
        (1, (), 100, (1e-4, 0.02), 32, "v"),
        (4, (3,), 300, (1e-4, 0.01), 128, "v"),
        (8, (1, 2, 3), 1000, (5e-4, 0.03), 256, "v"),
        (4, (1, 2), 1000, (1e-4, 0.02), 128, "noise"),
    ],
)
def test_c_d_what_can_be_chosen(num_heads, levels, n_steps, betas, time_dim, prediction):
    """Channels, heads, the levels with attention, steps, betas, the width of the embedding, and
    what is predicted. It learns with each, and draws."""
    torch.manual_seed(0)
    options = dict(num_heads=num_heads, attention_levels=levels, time_dim=time_dim)
    options.update(channel_mults=(1, 2, 4, 8), beta_start=betas[0], beta_end=betas[1])
    model = dm.SimpleDiffusion(8, n_steps, hidden_channels=8, prediction=prediction, **options)
    attentions = [part for part in model.modules() if isinstance(part, dm.Attention)]
    # Two blocks on the way down, two on the way up, and the middle belongs to the last level.
    assert len(attentions) == 4 * len(levels) + (3 in levels)
    assert {part.num_heads for part in attentions} <= {num_heads}
    assert attention_sizes(model.network, 8) == {8 >> level for level in levels}
    scaled = model.diffusion.betas * n_steps / 1000  # so that fewer steps still end in noise
    assert scaled[[0, -1]].tolist() == pytest.approx(betas)
    assert learns(model, (shapes(8, 16),), 15, 2e-3) < 1
    assert_images(model.sample(2, steps=3), 2, 3, 8, 8)


def test_e_a_resnet_trains_and_every_sampler_draws_from_it():
    """T = 500, cosine, AdamW with cosine annealing, five pictures of 64x64 kept in memory."""
    torch.manual_seed(0)
    diffusion = dm.DiffusionModel(ResNetUNet(), n_steps=500, schedule="cosine")
    assert learns(diffusion, (shapes(64, 5),), 15, 1e-3) < 0.8
    for sampler in dm.DEFAULT_STEPS:
        options = dict(sampler=sampler, steps=3, seed=0)
        drawn = diffusion.sample((2, 3, 64, 64), **options)
        assert_images((drawn + 1) / 2, 2, 3, 64, 64)
        # In eval mode, as sampling is, BatchNorm too leaves each image to itself.
        alone = diffusion.sample((1, 3, 64, 64), **options)
        assert (drawn[:1] - alone).abs().mean() < 0.02
    assert diffusion.model.training


def test_four_pictures_are_learned_by_heart():
    """Each of them is a class of its own. Asked for the class, the model draws the picture."""
    torch.manual_seed(0)
    x, options = shapes(8, 4), {**TINY, "hidden_channels": 16, "time_dim": 64}
    model = dm.SimpleDiffusion(8, class_names=["a", "b", "c", "d"], **options)
    y = torch.arange(4).repeat(4)
    learns(model, (x[y], y), 300, 5e-3)
    drawn = model.sample(4, y=["a", "b", "c", "d"], seed=0) * 2 - 1
    distance = (drawn[:, None] - x).square().mean(dim=(2, 3, 4)).sqrt()  # drawn by existing
    assert distance.diagonal().max() < 0.25 and distance.argmin(dim=1).tolist() == [0, 1, 2, 3]
