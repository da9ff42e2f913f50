"""What the tests share. They need no network, no GPU and no data set."""

import contextlib
import io
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import diffusion_model as dm  # noqa: E402

TINY = dict(
    hidden_channels=8,
    channel_mults=(1, 2),
    num_res_blocks=1,
    attention_levels=(1,),
    num_heads=2,
    time_dim=16,
)
TINY_RUN = dict(  # a run of a second: 24 shapes of 8x8 pixels, three steps an epoch
    data="shapes",
    image_size=8,
    limit=24,
    batch_size=8,
    epochs=2,
    hidden_channels=8,
    channel_mults=(1, 2),
    num_res_blocks=(1,),
    n_steps=20,
)


def pytest_configure(config):
    """What a package calls deprecated today will be gone in its next version."""
    for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"error::{kind}")


def perturb(module, seed=0):
    """Add 0.02 * randn to every parameter. Layers that start at zero would hide those before them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return module


def attention_sizes(network, size):
    """The widths of what a network has attention at, if it is given images of this size."""
    sizes = set()
    for part in network.modules():
        if isinstance(part, dm.Attention):
            part.register_forward_hook(lambda part, inputs, output: sizes.add(output.shape[-1]))
    network(torch.zeros(1, 3, size, size), torch.zeros(1).long())
    return sizes


def flags(**options):
    """The options of a run as the words of a command line."""
    words = []
    for name, value in options.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value if isinstance(value, (list, tuple)) else [value])
    return words


def run(*command, **environment):
    """Run a command in a process of its own, with one thread: -> CompletedProcess."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=env, text=True, capture_output=True, timeout=240)


def pictures(folder, names):
    """Make a folder of eight pictures of each of two classes, which all differ: -> the folder."""
    for c, name in enumerate(names):
        Path(folder, name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (8, 8), (100 * c, 20 * i, 50)).save(Path(folder, name, f"{i}.png"))
    return folder


@contextlib.contextmanager
def other_defaults():
    """Here torch's defaults are float64 and the meta device, whose tensors meet none of the CPU."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def error_of(main, capsys, *args):
    """The one error line with which main(args) ended, as it must; None where it worked."""
    capsys.readouterr()
    try:
        main(list(map(str, args)))
    except SystemExit as stopped:
        lines = capsys.readouterr().err.strip().splitlines()
        assert stopped.code == 2 and len(lines) == 1, (stopped.code, lines)
        assert lines[0].startswith("error: ") and len(lines[0]) < 2000, lines
        return lines[0]


def pixels(path):
    """A picture as integers (H, W, 3)."""
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def tiles(grid, columns, width=128, scale=16):
    """The pictures of a grid, row by row, in their own size: there each is enlarged, 2 apart."""
    grid = np.pad(grid, ((2, 2), (2, 2), (0, 0))) if len(grid) == width else grid  # a single one
    step = width + 2
    assert grid.shape[1] == 2 + step * columns and (grid.shape[0] - 2) % step == 0
    corners = itertools.product(range(2, len(grid), step), range(2, 2 + step * columns, step))
    return np.stack([grid[y : y + width : scale, x : x + width : scale] for y, x in corners])


def state(folder="."):
    """All of a training_state.pth that must not depend on how often the run was stopped."""
    saved = torch.load(Path(folder) / "training_state.pth", weights_only=True)
    del saved["seconds"], saved["run"]["out"]
    saved["losses"] = saved["losses"].tolist()
    return saved


def to_bytes(contents, **options):
    """The file that torch.save writes."""
    file = io.BytesIO()
    torch.save(contents, file, **options)
    return file.getvalue()


def same(a, b):
    """Equal to the bit, in all that the two hold."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def spy(set_attribute, owner, name, note):
    """Have note(*arguments) called before each call of owner.name."""
    function = getattr(owner, name)

    def noted(*args, **options):
        note(*args)
        return function(*args, **options)

    set_attribute(owner, name, noted)


def in_step(patch, number, act):
    """Have act() called in the step of a run with this number, counted from 1 at its start."""
    calls = itertools.count(1)  # learning_rate is asked for once a step and group
    spy(patch.setattr, dm, "learning_rate", lambda *_: next(calls) == 2 * number and act())


@contextlib.contextmanager
def stopped_in_step(number, monkeypatch, signal_number=signal.SIGTERM):
    """In this block a run gets a signal in the step of this number."""
    with monkeypatch.context() as patch:
        in_step(patch, number, lambda: os.kill(os.getpid(), signal_number))
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny_model():
    """A conditional SimpleDiffusion for 8x8 images in three classes, its weights perturbed."""
    torch.manual_seed(0)
    return perturb(dm.SimpleDiffusion(8, class_names=["a", "b", "c"], **TINY)).eval()
