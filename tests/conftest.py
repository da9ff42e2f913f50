"""What the tests share. They need no network, no GPU and no data set."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def flags(**options):
    """The options of a run as the words of a command line."""
    words = []
    for name, value in options.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value if isinstance(value, (list, tuple)) else [value])
    return words


def run(script, *args, cwd, timeout=240, **env):
    """Run `python SCRIPT ARGS` of this repository in the folder `cwd`: -> CompletedProcess."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    env = {**os.environ, **env}
    options = dict(cwd=cwd, text=True, capture_output=True, timeout=timeout, env=env)
    return subprocess.run(command, **options)


def assert_error(process, *words):
    """The run ended as a user's mistake must: exit code 2, and one line that holds all `words`."""
    assert process.returncode == 2, process.stdout + process.stderr
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    for word in words:
        assert word in lines[0], lines[0]


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


def state(folder="."):
    """All of a training_state.pth that must not depend on how often the run was stopped."""
    saved = torch.load(Path(folder) / "training_state.pth", weights_only=True)
    del saved["seconds"], saved["run"]["out"]
    saved["losses"] = saved["losses"].tolist()
    return saved


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


@contextlib.contextmanager
def stopped_in_step(number, monkeypatch, signal_number=signal.SIGTERM):
    """In this block a run gets a signal in the step of this number, counted from 1 at its start."""
    steps = itertools.count(1)
    with monkeypatch.context() as patch:
        spy(
            patch.setattr,
            dm,
            "learning_rate",  # is asked for once a step and group
            lambda *_: next(steps) == 2 * number and os.kill(os.getpid(), signal_number),
        )
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
