"""Does this device compute what the CPU does? For a Mac or a GPU: python -m pytest tests/test_device.py

On some versions of PyTorch some devices gave wrong results without an error. These tests skip where there is no device
but the CPU.
"""

import copy

import pytest
import torch

from conftest import new_run, perturb

import diffusion_model as dm
import support

DEVICE = dm.pick_device()
pytestmark = pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no device but the CPU")


@pytest.fixture
def pair(monkeypatch):
    """The default model, untrained, in float32 on the CPU and on the device."""
    monkeypatch.setattr(dm, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = perturb(dm.SimpleDiffusion(class_names="abc"))
    return model, copy.deepcopy(model).to(DEVICE, memory_format=dm.memory_format(DEVICE))


def test_a_drawing(pair):
    """The same pictures from the same seed, but for rounding."""
    options = dict(y=[0, 1, 2, 3], guidance=2.0, seed=0, progress=False)
    ours, theirs = (support.to_uint8(model.sample(4, **options)).cpu() for model in pair)
    assert (ours.float() - theirs.float()).abs().mean() < 1, (
        f"{DEVICE} draws other pictures than the CPU"
    )


def test_attention_without_gradients():
    """What drawing uses, a kernel of its own on some devices. Here its weights are so large that an error shows."""
    torch.manual_seed(0)
    attention = dm.Attention(128, num_heads=4)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 128, 8, 16)
    with torch.no_grad():
        ours, theirs = attention(x) - x, copy.deepcopy(attention).to(DEVICE)(x.to(DEVICE)).cpu() - x
    assert (ours - theirs).norm() < 0.003 * ours.norm(), (
        f"{DEVICE} has another attention than the CPU"
    )


def test_a_training_step(pair):
    """The same loss and gradients from the same images, timesteps and noise: names each parameter that differs."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(8, 3, 32, 32, generator=generator) for _ in range(2))
    y, t = torch.arange(8) % 4, torch.arange(8) * 120
    losses = []
    for model in pair:
        device = next(model.parameters()).device
        with dm.autocast(device):
            loss = model(*(tensor.to(device) for tensor in (x, y, t, noise)))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3), (
        f"{DEVICE} has another loss than the CPU"
    )
    differing = [
        name
        for (name, ours), theirs in zip(pair[0].named_parameters(), pair[1].parameters())
        if (ours.grad - theirs.grad.cpu()).norm() > 0.01 * ours.grad.norm() + 1e-6
    ]
    assert not differing, f"{DEVICE} has other gradients than the CPU: {differing}"


def test_optimisers(pair):
    """One step of Muon and AdamW changes the weights as on the CPU. (Muon's own steps are in bfloat16.)"""
    before = copy.deepcopy(pair[0])
    for model in pair:
        for parameter in model.parameters():
            parameter.grad = torch.sin(1000 * parameter.detach())
        for optimizer in dm.make_optimizers(model.model, 1e-3):
            optimizer.step()
    parameters = zip(before.named_parameters(), *(model.parameters() for model in pair))
    differing = [
        name
        for (name, old), ours, theirs in parameters
        if (ours - theirs.cpu()).norm() > 0.1 * (ours - old).norm()
    ]
    assert not differing, f"{DEVICE} takes other steps than the CPU: {differing}"


def test_a_run():
    """The rest of a step: drawn timesteps, flips, bfloat16 where there is any, clipping, the average."""
    run = new_run(data="shapes", limit=64, batch_size=32, epochs=2, hidden_channels=32)
    average = copy.deepcopy(run.ema)
    for _ in range(4):
        run.train_step()
    assert run.images.device.type == DEVICE.type and all(0.1 < loss < 1.5 for loss in run.losses)
    assert all(
        new.isfinite().all() and not new.equal(old)
        for new, old in zip(run.ema.network.parameters(), average.network.parameters())
    )
