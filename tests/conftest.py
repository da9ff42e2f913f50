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
TINY = dict(
    hidden_channels=8,
    channel_mults=(1, 2),
    num_res_blocks=1,
    attention_levels=(1,),
    num_heads=2,
    time_dim=16,
)
INFO = {
    "architecture",
    "parameters",
    "dataset",
    "images_seen",
    "epochs",
    "batch_size",
    "optimizer",
    "learning_rate",
    "prediction",
    "schedule",
    "n_steps",
    "final_loss",
    "training_minutes",
    "device",
    "torch",
    "date",
    "license",
}


def pytest_configure(config):
    """What a package calls deprecated today will be gone in its next version."""
    for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"error::{kind}")


def perturb(module, seed=0):
    """Add 0.02 * randn to every parameter: layers that start at zero would hide what lies before them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return module


def new_run(**options):
    """The TrainingRun that train(TrainConfig(**options)) makes, at its very beginning."""
    import diffusion_model as dm
    import support

    config = dm.TrainConfig(**options)
    data = dm.load_images(config.data, config.image_size, config.limit)
    return dm.TrainingRun(config, *data, support.Processes(dm.pick_device(config.device)))


def run(script, *args, cwd, timeout=240, **env):
    """Run `python SCRIPT ARGS` of this repository in the folder `cwd`: -> CompletedProcess with text output."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, args)],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=timeout,
        env={**os.environ, **env},
    )


def assert_error(process, *words):
    """The run ended as a user's mistake must: exit code 2, one line that begins with error: and holds all `words`."""
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
        assert stopped.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (
            stopped.code,
            lines,
        )
        assert len(lines[0]) < 2000
        return lines[0]


def peak_memory():
    """The most memory that this process has held, in bytes."""
    import resource  # Windows has none; test_device.py, which is for it too, needs none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def state(folder="."):
    """All of a training_state.pth that must not depend on how often the run was stopped."""
    saved = torch.load(Path(folder) / "training_state.pth", weights_only=True)
    del saved["seconds"], saved["config"]["out"]
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
    set_attribute(
        owner, name, lambda *args, **options: (note(*args), function(*args, **options))[1]
    )


@contextlib.contextmanager
def stopped_in_step(number, monkeypatch):
    """In this block a run gets SIGTERM in the step of this number, from 1, after its start."""
    import diffusion_model

    steps = itertools.count(1)
    with monkeypatch.context() as patch:
        spy(
            patch.setattr,
            diffusion_model.TrainingRun,
            "train_step",
            lambda run: next(steps) == number and os.kill(os.getpid(), signal.SIGTERM),
        )
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder. The two plots take longer than a run, so they are left out."""
    import support

    monkeypatch.chdir(tmp_path)
    for plot in ("plot_noising", "plot_losses"):
        monkeypatch.setattr(support, plot, lambda *_: None)
    return tmp_path


@pytest.fixture
def tiny_model():
    """A conditional SimpleDiffusion for 8x8 images in three classes, its weights perturbed."""
    import diffusion_model

    torch.manual_seed(0)
    return perturb(diffusion_model.SimpleDiffusion(8, class_names=["a", "b", "c"], **TINY)).eval()
