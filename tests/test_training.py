"""A training run is never lost, and every flag does what it says.

Most runs are made in this process. Those that are killed are children of a server that has imported torch before
(multiprocessing's forkserver), which makes a start cheap.
"""

import contextlib
import copy
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import INFO, ROOT, new_run, peak_memory, same, spy, state, stopped_in_step

import diffusion_model
import support
from diffusion_model import (
    DiffusionModel,
    TrainConfig,
    TrainingRun,
    learning_rate,
    training_batch,
    update_ema,
)

ROUNDS, KILLS = (
    3,
    6,
)  # rounds of killing a run at random moments, and how often in each. For dozens: raise ROUNDS
CONFIG = dict(
    data="shapes",
    image_size=8,
    hidden_channels=8,
    channel_mults=(1, 2),
    num_res_blocks=1,
    device="cpu",
    attention_levels=(1,),
    limit=256,
    batch_size=32,
    epochs=2,
    sample_every=1,
)  # two epochs of eight steps
RUN = [
    str(word)
    for name, value in CONFIG.items()
    for word in (support.flag_of(name), *(value if isinstance(value, tuple) else [value]))
]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    "torch._dynamo torchvision.utils matplotlib.backends.backend_agg tqdm pytest".split()
)


def train(*flags):
    """The command line with RUN and `flags`, in this process: -> its exit code."""
    try:
        diffusion_model.main([*RUN, *map(str, flags)])
    except SystemExit as stopped:
        return stopped.code
    return 0


def child(folder, flags, environment):
    os.chdir(folder)
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    torch.set_num_threads(1)
    if "STOP_IN_STEP" in environment:
        with (
            pytest.MonkeyPatch.context() as patch,
            stopped_in_step(int(environment["STOP_IN_STEP"]), patch),
        ):
            sys.exit(train(*flags))
    sys.exit(train(*flags))


def start(folder, *flags, **environment):
    """The same in a process of its own, which writes what it prints to folder/out and folder/err."""
    folder.mkdir(exist_ok=True)
    for name in ("out", "err"):
        (folder / name).write_text("")
    process = SERVER.Process(target=child, args=(folder, flags, environment))
    process.start()
    return process


def finish(folder, *flags):
    """The same, waited for: it has to succeed."""
    process = start(folder, *flags)
    process.join(120)
    assert process.exitcode == 0, (folder / "err").read_text()
    return folder


def error_line(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def steps_take(seconds, monkeypatch):
    """Have the clock say that each step takes so long."""
    clock = [0]
    spy(
        monkeypatch.setattr,
        TrainingRun,
        "train_step",
        lambda run: clock.append(clock[-1] + seconds),
    )
    monkeypatch.setattr(time, "monotonic", lambda: clock[-1])


@pytest.fixture(autouse=True)
def one_thread():
    """As the children have it: sums done in another order are other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a run that nothing stopped."""
    return finish(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="session")
def longer(
    tmp_path_factory, whole
):  # after `whole`: the start of the server is no part of the seconds
    """The flags of a run of five epochs with dropout, its state where nothing stopped it, and the seconds it took."""
    flags, started = (
        ("--epochs", 5, "--limit", 128, "--dropout", 0.2, "--sample-every", 2),
        time.monotonic(),
    )
    return (
        flags,
        state(finish(tmp_path_factory.mktemp("longer"), *flags)),
        time.monotonic() - started,
    )


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_killed_at_random_moments(tmp_path, longer, seed):
    """SIGKILL, SIGINT and SIGTERM again and again: the same command ends with the very bits of the whole run."""
    (flags, expected, seconds), chance, hits = longer, random.Random(seed), 0
    for kill in range(KILLS):
        process = start(tmp_path, *flags)
        while kill == 0 and process.is_alive() and "training" not in (tmp_path / "out").read_text():
            time.sleep(0.01)  # at least this one hits, however fast or slow the machine is today
        process.join(chance.uniform(0, 0.8 * seconds) if kill else 0)
        number = chance.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
        if process.is_alive():
            os.kill(process.pid, number)
        process.join(60)
        err = (tmp_path / "err").read_text()
        before_training = process.exitcode == 1 and "KeyboardInterrupt" in err
        assert process.exitcode in (0, -number, 128 + number) or before_training, (
            f"{process.exitcode}: {err}"
        )
        hits += process.exitcode != 0
    assert hits > 0
    assert same(state(finish(tmp_path, *flags)), expected)
    assert sorted(path.name[6:10] for path in (tmp_path / "samples").glob("epoch*")) == [
        "0002",
        "0004",
        "0005",
    ]


@pytest.mark.parametrize("dropout", [0, 0.3])
def test_stopped_after_every_single_step(here, monkeypatch, capsys, dropout):
    """Ctrl-C and SIGTERM in turn, within an epoch too: 130 and 143, a word how to go on, the bits of a whole run.

    In the last step there is nothing left to stop.
    """
    flags, handler = (
        ("--limit", 100, "--dropout", dropout),
        signal.getsignal(signal.SIGINT),
    )  # three steps an epoch
    assert train(*flags, "--out", "whole") == 0
    for step, number in enumerate([signal.SIGINT, signal.SIGTERM] * 3, start=1):
        capsys.readouterr()
        with monkeypatch.context() as patch:
            spy(patch.setattr, TrainingRun, "train_step", lambda run: os.kill(os.getpid(), number))
            assert train(*flags) == (0 if step == 6 else 130 if number == signal.SIGINT else 143)
        lines = capsys.readouterr().out.splitlines()
        assert (f"step {step} of 6" in lines[-1] and "same command" in lines[-1]) != (step == 6)
        assert step == 1 or (lines[0].startswith("going on") and f"step {step - 1} " in lines[0])
    assert same(state(), state("whole"))
    assert signal.getsignal(signal.SIGINT) is handler  # as it was before


@pytest.mark.parametrize("number, code, step", [(signal.SIGINT, 130, 0), (signal.SIGTERM, 143, 4)])
def test_a_second_signal(here, monkeypatch, number, code, step):
    """Ctrl-C: it ends in the middle of a step, without saving. SIGTERM: torchrun repeats that of a scheduler."""

    def twice():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    spy(monkeypatch.setattr, TrainingRun, "train_step", lambda run: run.step == 3 and twice())
    assert train() == code and state()["step"] == step


def test_an_ignored_signal_stays_ignored(here, monkeypatch):
    """A shell has the background jobs of a script ignore the Ctrl-C that is meant for the foreground."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        spy(
            monkeypatch.setattr,
            TrainingRun,
            "train_step",
            lambda run: os.kill(os.getpid(), signal.SIGINT),
        )
        assert train() == 0 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_finished_run_does_nothing_and_more_epochs_go_on(here, capsys):
    """It says so, and no file is touched; --epochs 3 then does the third; --restart begins again."""

    def files():
        return {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()}

    train()
    first, before, _ = state(), files(), capsys.readouterr()
    assert train() == 0 and files() == before
    out = capsys.readouterr().out
    assert "finished" in out and "--epochs" in out and "--restart" in out
    assert train("--epochs", 3) == 0
    out = capsys.readouterr().out.splitlines()
    assert (
        out[0].startswith("going on after step 16")
        and sum(line.startswith("epoch") for line in out) == 1
    )
    assert (
        state()["epoch_losses"][:2] == first["epoch_losses"] and len(state()["epoch_losses"]) == 3
    )
    assert json.loads(Path("model_info.json").read_text())["epochs"] == 3
    assert train("--restart") == 0 and "going on" not in capsys.readouterr().out
    assert all(same(state()[name], first[name]) for name in ("model", "ema", "epoch_losses"))


@pytest.mark.parametrize(
    "flags",
    [
        "--batch-size 16",
        "--seed 1",
        "--hidden-channels 16",
        "--limit 128",
        "--unconditional",
        "--channel-mults 2 2",
        "--schedule cosine",
        "--dropout 0.1",
    ],
)
def test_another_setting_is_an_error_that_names_it(whole, here, capsys, flags):
    """Nothing but the number of epochs and what is shown may change; the state stays as it is."""
    before = (whole / "training_state.pth").read_bytes()
    assert train("--out", whole, *flags.split()) == 2
    line = error_line(capsys)
    assert (
        flags.split()[0] in line
        and "--restart" in line
        and before == (whole / "training_state.pth").read_bytes()
    )


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone")
def test_a_clone_stays_clean(here):
    """Git ignores whatever a run without --out writes there, but the released weights that it replaces."""
    for _ in range(3):
        assert train("--epochs", 1, "--restart") == 0
    written = {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()}
    assert "samples/nearest.png" in written and "diffusion_model.pth.bak2" in written
    written |= {"samples/loss.png", "samples/noising.png"}
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", "--", *written],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert written - set(ignored) == {"diffusion_model.pth", "model_info.json"}


def test_an_older_checkpoint_is_kept(here, monkeypatch):
    """As diffusion_model.pth.bak, also where the run is killed between its first export and its first state; and so is
    the model_info.json that describes it."""
    Path("diffusion_model.pth").write_bytes(b"years of work")
    Path("model_info.json").write_bytes(b"how it was made")
    save = TrainingRun.save
    with monkeypatch.context() as patch:
        patch.setattr(
            TrainingRun, "save", lambda run: save(run) if run.step == 0 else sys.exit("killed")
        )
        assert train() == "killed" and Path("diffusion_model.pth").read_bytes() != b"years of work"
    assert train() == 0 and Path("diffusion_model.pth.bak").read_bytes() == b"years of work"
    assert Path("model_info.json.bak").read_bytes() == b"how it was made"
    before = Path("diffusion_model.pth").read_bytes()
    assert (
        train("--restart", "--seed", 1) == 0
        and Path("diffusion_model.pth.bak").read_bytes() == b"years of work"
    )
    assert Path("diffusion_model.pth.bak2").read_bytes() == before != b""
    Path("diffusion_model.pth.bak").unlink()
    assert train("--restart") == 0 and Path("diffusion_model.pth.bak2").read_bytes() == before


def test_weights_that_are_not_finite_do_not_replace_a_state(here):
    """The loss of a step can be finite and what it makes of the weights not: resuming would refuse that state."""
    assert train("--epochs", 1) == 0
    run, before = new_run(**CONFIG), state()
    assert run.resume()
    with torch.no_grad():
        next(run.model.parameters()).mul_(math.inf)
    with pytest.raises(OSError, match="training_state.pth.*finite"):
        run.save()
    assert same(state(), before)


def test_pictures_on_the_way_change_nothing(here, whole):
    """Grids and exports leave the training alone."""
    assert train("--sample-every", 2) == 0
    ours, theirs = state(), state(whole)
    del ours["config"], theirs["config"]
    assert same(ours, theirs)


def test_what_a_run_leaves(whole):
    """Pictures, the export in float16 with clean keys, model_info.json with its checksum; all that was said."""
    from PIL import Image

    for name in ("data", "noising", "loss", "nearest", "epoch_0001", "epoch_0002"):
        with Image.open(whole / "samples" / f"{name}.png") as picture:
            assert min(picture.size) > 60 and len(set(picture.convert("L").tobytes())) > 10, name
    with Image.open(whole / "samples" / "nearest.png") as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    size = pixels.shape[2] // 4 - 2  # of one of four, beside lines of 2
    data = diffusion_model.load_images("shapes", 8, 256)[0]
    for column in range(4):
        lower = pixels[:, size + 4 : 2 * size + 4, column * (size + 2) + 2 :][
            :, :: size // 8, : size : size // 8
        ]
        assert any((data == way).flatten(1).all(dim=1).any() for way in (lower, lower.flip(2)))
    saved, averaged = (
        torch.load(whole / "diffusion_model.pth", weights_only=True),
        state(whole)["ema"],
    )
    assert saved["model_state_dict"].keys() == averaged.keys() and not list(whole.rglob("*.tmp"))
    assert all(
        same(tensor, averaged[name].half()) for name, tensor in saved["model_state_dict"].items()
    )
    assert not any(key.startswith(("_orig_mod.", "module.")) for key in averaged)
    info = json.loads((whole / "model_info.json").read_text())
    assert (
        info.pop("sha256")
        == hashlib.sha256((whole / "diffusion_model.pth").read_bytes()).hexdigest()
    )
    assert (
        INFO <= info.keys()
        and info == saved["info"]
        and info["images_seen"] == 512
        and info["epochs"] == 2
    )
    out = (whole / "out").read_text()
    draw = f"python inference_example.py --checkpoint {whole / 'diffusion_model.pth'}"
    for word in ("cpu", "parameters", "256 images", str(whole), "epoch   2/2", draw):
        assert word in out
    assert (whole / "err").read_text() == "" and "\r" not in out


def test_a_log_file_hears_within_an_epoch(here, monkeypatch, capsys):
    """Without a terminal: a line every five minutes."""
    with monkeypatch.context() as patch:
        steps_take(100, patch)
        assert train("--epochs", 1) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["4/8", "8/8"] and "loss 0." in lines[0]


def test_the_bar_of_a_terminal(here, monkeypatch, capsys):
    """It shows the loss, images a second and the time left; the lines of the epochs stand above it, whole."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ticks = iter(range(10**6))
    monkeypatch.setattr(
        diffusion_model.time, "monotonic", lambda: 2 * next(ticks)
    )  # as if a step took two seconds
    assert train() == 0
    out, err = capsys.readouterr()
    bar = err.split("\r")[-1]
    assert "loss=" in bar and "images/s" in bar and "100%" in bar and "<" in bar
    assert [line.split()[1] for line in out.splitlines() if line.startswith("epoch")] == [
        "1/2",
        "2/2",
    ]


@pytest.mark.parametrize(
    "seconds, epochs, steps",
    [
        (120, 3, [0, 3, 6, 8, 11, 14, 16, 19, 22, 24]),
        (1, 30, [*range(0, 80, 8), 88, 104, 120, 136, 152, 176, 200, 224, 240]),
    ],
)
def test_when_the_state_is_saved(here, monkeypatch, seconds, epochs, steps):
    """Every five minutes, within an epoch too; after an epoch (of 8 steps) only if more than 20 seconds or a tenth of
    the run would be lost without."""
    saved = []
    spy(monkeypatch.setattr, TrainingRun, "save", lambda run: saved.append(run.step))
    steps_take(seconds, monkeypatch)
    assert train("--epochs", epochs) == 0 and saved == steps


def test_a_step(here, monkeypatch):
    """The optimisers get the gradient of the loss, clipped to a norm of 1; the average is taken after their step."""
    run = new_run(**CONFIG)
    with torch.no_grad():
        run.model.model.up[-1]["exit"][-1].weight.normal_(std=30)  # a loss with a large gradient
    seen, order = {}, []
    network, loss = copy.deepcopy(run.model), run.loss_function

    def one_loss(x, y):
        seen["random"] = torch.get_rng_state()
        seen["batch"] = x, y
        return loss(x, y)

    def note_gradients():
        seen["gradients"] = [parameter.grad.clone() for parameter in run.model.parameters()]
        order.append("step")

    run.loss_function = one_loss
    for optimizer in run.optimizers:
        spy(setattr, optimizer, "step", note_gradients)
    spy(monkeypatch.setattr, diffusion_model, "update_ema", lambda *_: order.append("average"))
    run.train_step()
    torch.set_rng_state(seen["random"])
    with diffusion_model.autocast(run.images.device):
        expected = torch.autograd.grad(network(*seen["batch"]), list(network.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in expected]).norm()
    assert norm > 2 and order == ["step", "step", "average"]
    for gradient, before in zip(seen["gradients"], expected):
        torch.testing.assert_close(gradient, before / norm, rtol=1e-3, atol=1e-6)


def test_who_trains_what(here):
    """Muon has the kernels and matrices inside of the network, AdamW the rest, and each parameter one of the two."""
    run = new_run(**CONFIG)
    muon, adamw = run.optimizers
    assert isinstance(muon, torch.optim.Muon) and type(adamw) is torch.optim.AdamW
    theirs = muon.kernels + adamw.param_groups[0]["params"]
    assert {id(parameter) for parameter in theirs} == {
        id(parameter) for parameter in run.model.parameters()
    }
    assert len(theirs) == len(list(run.model.parameters()))
    network = run.model.model
    touching_pixels = [
        network.down[0]["entry"].weight,
        network.up[-1]["exit"][-1].weight,
        network.class_embedding.weight,
    ]
    kernels = {id(kernel) for kernel in muon.kernels}
    assert not any(id(weight) in kernels for weight in touching_pixels)
    assert all(
        (id(parameter) in kernels) == (parameter.ndim > 1)
        for parameter in network.parameters()
        if all(parameter is not weight for weight in touching_pixels)
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_of_kernels(memory_format):
    """It does to a kernel what torch.optim.Muon does to a matrix of one row an output channel, in any layout: the
    order of columns makes no difference to an orthogonal matrix."""
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=memory_format))
    matrix = torch.nn.Parameter(kernel.detach().flatten(1).clone())
    options = dict(lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours, theirs = support.Muon([kernel], **options), torch.optim.Muon([matrix], **options)
    for _ in range(3):
        gradient = torch.randn(6, 4, 3, 3)
        kernel.grad, matrix.grad = gradient.to(memory_format=memory_format), gradient.flatten(1)
        ours.step()
        theirs.step()
        torch.testing.assert_close(
            kernel.flatten(1), matrix, rtol=0, atol=0.02
        )  # Newton-Schulz is in bfloat16
    assert kernel.is_contiguous(memory_format=memory_format)
    assert ours.param_groups[0]["params"][0].grad is None  # which would keep the gradient's memory


def test_options_of_any_make(here, whole):
    """From Python a Path, a device, lists and numbers of numpy will do: the run exports and can be resumed."""
    odd = dict(
        CONFIG,
        out=Path("run"),
        device=torch.device("cpu"),
        channel_mults=[np.int64(1), 2],
        epochs=np.int64(1),
        lr=np.float64(4e-4),
    )
    diffusion_model.train(TrainConfig(**odd))
    diffusion_model.train(TrainConfig(**{**odd, "epochs": 2}))
    assert (
        same(state("run")["model"].keys(), state(whole)["model"].keys())
        and state("run")["step"] == 16
    )
    for wrong in (
        dict(epochs="many"),
        dict(epochs=1.5),
        dict(channel_mults=(1, 1.5)),
        dict(unconditional="no"),
    ):
        with pytest.raises(ValueError, match=f"--{list(wrong)[0].replace('_', '-')}"):
            TrainConfig(**wrong)


def test_a_seed_is_a_run(whole, here):
    """train(TrainConfig(...)) is the command line to the bit, and returns the averaged weights; other seeds differ."""
    model = diffusion_model.train(TrainConfig(**CONFIG))
    assert same(state(), state(whole)) and same(model.model.state_dict(), state()["ema"])
    assert not any(part.training for part in model.modules())
    train("--out", "other", "--seed", 1)
    assert not torch.equal(
        state("other")["model"]["down.0.entry.weight"], state()["model"]["down.0.entry.weight"]
    )


def test_a_loss_that_is_not_finite_ends_the_run_and_harms_nothing(here, monkeypatch, capsys):
    """Exit code 2, an error that names the step; the state is the last good one, from which the run can go on."""
    calls = []

    def poisoned(images, labels, index, num_classes, flip):
        x, y = training_batch(images, labels, index, num_classes, flip)
        calls.append(len(index))
        return (x * float("nan") if calls.count(32) == 11 else x), y

    with monkeypatch.context() as patch:
        patch.setattr(diffusion_model, "training_batch", poisoned)
        steps_take(30, patch)  # so that the state is saved after the first epoch
        assert train() == 2
    line = error_line(capsys)
    assert "not finite at step 11" in line and "--lr" in line
    assert state()["step"] == 8
    assert train("--lr", 1e-3) == 0 and state()["step"] == 16  # what the error line says
    assert state()["config"]["lr"] == 1e-3
    said = capsys.readouterr().out
    assert (
        said.startswith("going on after step 8 ") and "learning rate 0.001" in said.splitlines()[0]
    )
    assert train("--restart", "--lr", 1e30) == 2
    line = error_line(capsys)
    assert (
        "step" in line
        and "--lr" in line
        and all(tensor.isfinite().all() for tensor in state()["model"].values())
    )


def test_a_gradient_that_is_not_finite_is_noticed_too(here, monkeypatch, capsys):
    """Where the loss of that step is as always."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, *args):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 11:
            parameters[3].grad.view(-1)[0] = math.inf
        return clip(parameters, *args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    assert train() == 2 and "not finite at step 11" in error_line(capsys)


def test_a_step_waits_for_no_number(here, monkeypatch):
    """Nothing in a step asks a GPU for a value, which would make the two take turns."""
    run = new_run(**CONFIG)
    run.train_step()

    def wait(tensor, *_):
        raise AssertionError("a step waits for the device")

    for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    run.train_step()
    monkeypatch.undo()
    assert len(run.fetch_losses()) == 2


@pytest.mark.parametrize("total", [1, 2, 19, 100, 20_000])
def test_learning_rate(total):
    """Above zero in the first step, at its peak after the warm-up, near zero at the end, never above the peak."""
    rates = [learning_rate(step, total, 1e-3) for step in range(total)]
    assert (
        0 < min(rates)
        and 0.98e-3 < max(rates) <= 1e-3
        and rates.index(max(rates)) <= max(1, total // 20)
    )
    assert total < 100 or rates[-1] < 2e-6 and rates[total // 2] == pytest.approx(0.5e-3, rel=0.02)


def test_update_ema_against_a_plain_loop():
    """One decay for all weights; the first steps are followed at once, later ones within a few per cent of the run."""
    model, ema = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).requires_grad_(False)
    for step in (1, 10, 1000, 100_000):
        before, decay = (
            [parameter.clone() for parameter in ema.parameters()],
            0.5 ** (1 / (0.03 * step)),
        )
        update_ema(ema, model, step)
        for old, new, live in zip(before, ema.parameters(), model.parameters()):
            assert torch.allclose(new, decay * old + (1 - decay) * live, atol=1e-6)
    torch.nn.init.zeros_(ema.weight), torch.nn.init.ones_(model.weight)
    for step in range(1, 6):
        update_ema(ema, model, step)
    assert ema.weight.min() > 0.95
    torch.nn.init.zeros_(model.weight)
    half_life = next(
        i for i in range(1000) if (update_ema(ema, model, 1000 + i), ema.weight.max() < 0.5)[1]
    )
    assert 10 < half_life < 100


def test_update_ema_copies_buffers():
    """The running statistics of a network of one's own, an integer among them."""
    model, ema = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    model(torch.randn(4, 3, 8, 8) + 5)
    update_ema(ema, model, 1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(ema.buffers(), model.buffers()))
    assert ema.running_mean.min() > 0.4 and ema.num_batches_tracked == 1


def test_the_average_is_a_network_of_its_own(here):
    """It shares no memory with the live one, is float32, in eval mode and without gradients; it follows closely."""
    run = new_run(**CONFIG)
    for _ in range(3):
        run.train_step()
    live, average = dict(run.model.named_parameters()), dict(run.ema.named_parameters())
    assert live.keys() == average.keys() and not run.ema.training and run.model.training
    for name, weight in average.items():
        assert weight.data_ptr() != live[name].data_ptr() and not weight.requires_grad
        assert weight.dtype == live[name].dtype == torch.float32
        assert (weight - live[name]).abs().max() < 1e-3
    assert not torch.equal(
        live["diffusion.model.down.0.entry.weight"], average["diffusion.model.down.0.entry.weight"]
    )


def test_training_batch():
    """Range, flips and dropped labels, image by image; each keeps its own label; all 256 grey levels survive."""
    count = 4000
    images = torch.arange(count)[:, None, None, None] % 200 + torch.zeros(
        count, 3, 2, 2, dtype=torch.int64
    )
    images[:, :, :, 1] += 55  # the right column is brighter, until it is flipped
    index = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    x, y = training_batch(images.to(torch.uint8), torch.arange(count) % 200 % 10, index, 10)
    left, right, kept = x[:, 0, 0, 0], x[:, 0, 0, 1], y != 10
    grey = ((torch.minimum(left, right) + 1) * 127.5).round().long()
    assert (
        x.shape == (count, 3, 2, 2)
        and torch.equal(grey, index % 200)
        and torch.equal(y[kept], (grey % 10)[kept])
    )
    assert 0.47 < (left > right).float().mean() < 0.53 and 0.08 < (y == 10).float().mean() < 0.12
    x, y = training_batch(
        torch.arange(256, dtype=torch.uint8)[:, None, None, None], None, torch.arange(256), None
    )
    assert x.min() == -1 and x.max() == 1 and y is None
    assert torch.equal(
        support.to_uint8((x + 1) / 2).flatten(), torch.arange(256, dtype=torch.uint8)
    )
    assert support.to_uint8(torch.tensor([-0.5, 0.5 / 255 + 1e-4, 1.5])).tolist() == [0, 1, 255]


def test_an_epoch_is_one_shuffled_pass(here, monkeypatch, capsys):
    """Its batches are disjoint, the partial one is dropped, the next has another order; few images are one batch."""
    seen = []
    spy(
        monkeypatch.setattr,
        diffusion_model,
        "training_batch",
        lambda *args: seen.append(args[2].tolist()),
    )
    train("--limit", 100)
    first, second = sum(seen[1:4], []), sum(seen[4:], [])  # before them one for data.png
    assert (
        len(set(first)) == len(first) == len(set(second)) == len(second) == 96 and max(first) <= 99
    )
    assert first != second and first != sorted(first)
    capsys.readouterr()
    assert train("--limit", 5, "--out", "few") == 0 and state("few")["step"] == 2
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "batch 5 " in lines["training"] and "--batch-size 32" in lines["training"]
    assert "memorised" in lines["data"] and "nearest.png" in lines["data"]


WRONG = """--epochs 0|--epochs 1.5|--epochs many|--epochs|--batch-size -1|--lr nan|--lr 0|--lr -1|--lr inf
--dropout 1.0|--dropout -0.1|--dropout nan|--schedule foo|--prediction foo|--channel-mults 0|--channel-mults
--channel-mults 1 x|--image-size 30 --channel-mults 1 2 2 2
--image-size 0|--n-steps 0|--n-steps 1000000000000|--seed -1|--seed 1e3
--seed 99999999999999999999999|--device foo|--device cuda:99|--limit 0|--hidden-channels 0|--num-res-blocks 0
--num-heads 0|--attention-levels -1|--sample-every 0|--data nowhere|--out taken/out|--colour red|--epoch 1|--restart=1
stray|--hidden-channels 1000000|--num-res-blocks 1000000|--image-size 1000000"""


@pytest.mark.parametrize("flags", WRONG.replace("\n", "|").split("|"))
def test_a_wrong_value_is_refused_by_name(here, capsys, flags):
    """Exit code 2 and one line that names the flag, before anything large is allocated and anything is written."""
    Path("taken").write_text("")
    before = peak_memory()
    assert train(*flags.split()) == 2
    assert flags.split()[0].strip("-").split("=")[0] in error_line(capsys).replace("_", "-")
    assert peak_memory() - before < 5e8
    assert [path.name for path in here.iterdir()] == ["taken"]


def test_what_a_run_writes_is_not_its_data(here, monkeypatch, capsys):
    """--out in the folder of the pictures: at the next start the samples would be pictures, and "samples" a class."""
    from PIL import Image

    Path("pictures").mkdir()
    Image.new("RGB", (8, 8), "red").save("pictures/red.png")
    for flags in (
        "--data . --out run",
        "--data pictures --out pictures",
        "--data ../pictures --out ../pictures/run",
        "--data run/samples --out run",
    ):
        Path("run", "samples").mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(here / "pictures" if ".." in flags else here)
        assert (
            train(*flags.split()) == 2
            and "--data" in error_line(capsys)
            and not list(here.rglob("*.pth"))
        )
    monkeypatch.setenv("HOME", str(here))
    assert TrainConfig(out="~/run").out == str(here / "run")  # a shell leaves --out=~/run as it is


def test_wrong_options_are_noticed_before_the_data_is_read(here, capsys, monkeypatch):
    """Reading 20,000 photographs takes minutes, a download may take an hour."""
    monkeypatch.setattr(diffusion_model, "load_images", None)
    for flags in ("--schedule foo", "--init nowhere.pth", "--image-size 7", "--channel-mults 0"):
        assert train(*flags.split()) == 2 and flags.split()[1] in error_line(capsys)


@pytest.mark.parametrize(
    "flags",
    [
        "--unconditional",
        "--attention-levels",
        "--attention-levels 0 1",
        "--channel-mults 1 3",
        "--num-heads 2",
        "--hidden-channels 7",
        "--num-res-blocks 2 1",
        "--dropout 0.9",
        "--n-steps 50",
        "--image-size 6",
        "--schedule cosine",
        "--prediction noise",
        "--t-distribution uniform",
    ],
)
def test_every_choice_is_in_the_checkpoint_which_draws(here, flags):
    flag, *values = flags.split()
    assert train("--limit", 64, "--epochs", 1, flag, *values) == 0
    saved = torch.load("diffusion_model.pth", weights_only=True)
    found = {
        **saved["model_config"],
        **saved["diffusion_config"],
        "image_size": saved["image_size"],
        "unconditional": saved["model_config"]["num_classes"] is None,
    }[flag[2:].replace("-", "_")]
    assert str(found) == str(
        values if isinstance(found, list) else values[0] if values else True
    ).replace("'", "")
    drawn = diffusion_model.SimpleDiffusion.load(device="cpu").sample(2, steps=2, progress=False)
    assert drawn.isfinite().all() and drawn.shape[2] == saved["image_size"]


def test_the_flags_are_the_fields(capsys):
    """--help shows every one of them."""
    assert train("--help") == 0
    text = capsys.readouterr().out
    assert all(f"--{entry.name.replace('_', '-')}" in text for entry in fields(TrainConfig))


@pytest.mark.parametrize("works", [True, False])
def test_compile(here, whole, monkeypatch, works):
    """The checkpoint has the same keys; where compiling fails, the run is as without it."""
    compiled, graphs = torch.compile, []

    def compiler(graph, inputs):
        graphs.append(graph)
        if not works:
            raise RuntimeError("no compiler here")
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda module: compiled(module, backend=compiler))
    with torch._dynamo.config.patch(suppress_errors=False):  # a run sets it: undone afterwards
        assert train("--compile") == 0 and graphs
    assert state()["model"].keys() == state()["ema"].keys() == state(whole)["model"].keys()
    assert works or same(state()["model"], state(whole)["model"])


def adafactor(network, lr):
    """Its state has other shapes than the parameters, here with whole numbers among them."""

    class Counting(torch.optim.Adafactor):
        def step(self):
            super().step()
            for state in self.state.values():
                state["calls"] = (
                    state.get("calls", torch.tensor(0)).long() + 1
                )  # load_state_dict makes it a float
            self.param_groups[0]["calls"] = self.param_groups[0].get("calls", 0) + 1

    return [Counting(network.parameters(), lr)]


def sgd(network, lr):
    """An optimiser of one's own: any function from the network and a learning rate to a list of optimisers."""
    return [
        torch.optim.SGD(
            [
                {"params": network.down.parameters()},
                {"params": network.up.parameters(), "lr": lr / 2},
            ],
            lr,
            momentum=0.9,
        )
    ]


@pytest.mark.parametrize("optimizers", [sgd, adafactor])
def test_an_optimiser_of_ones_own_resumes_to_the_bit(here, monkeypatch, optimizers):
    """train() knows none by name; each group's rate keeps its ratio to the others."""
    config = dict(CONFIG, lr=0.05)
    diffusion_model.train(TrainConfig(**config, out="whole"), optimizers)
    rates = []
    spy(
        monkeypatch.setattr,
        torch.optim.SGD,
        "step",
        lambda self, *_: rates.append([group["lr"] for group in self.param_groups]),
    )
    for _ in range(4):  # stopped after every fifth step
        with stopped_in_step(5, monkeypatch), contextlib.suppress(SystemExit):
            diffusion_model.train(TrainConfig(**config), optimizers)
    assert same(state(), state("whole")) and state()["step"] == 16
    assert optimizers is sgd or state()["optimizers"][0]["param_groups"][0]["calls"] == 16
    assert all(second == pytest.approx(first / 2) for first, second in rates)
    assert len(rates) == (16 if optimizers is sgd else 0)


def test_no_flip(here):
    """Letters stay letters: with the flag each picture comes as it is, without it half of them mirrored."""
    for flags, share in ((dict(no_flip=True), 0), ({}, 0.5)):
        run = new_run(**CONFIG, **flags)
        x, _ = run.batch(torch.arange(256))
        straight = support.from_uint8(run.images)
        mirrored = (x != straight).flatten(1).any(dim=1)
        assert torch.equal(x[mirrored], straight[mirrored].flip(3))
        assert abs(mirrored.float().mean().item() - share) < (0.15 if share else 1e-9)


def test_grey_pictures_are_one_channel(here):
    """By itself, where all are grey: it trains, exports and draws in one channel."""
    from PIL import Image

    Path("grey").mkdir()
    for i in range(8):
        Image.new("L", (9, 9), 20 * i).save(f"grey/{i}.png")
    assert train("--data", "grey", "--limit", 8, "--epochs", 1) == 0
    model = diffusion_model.SimpleDiffusion.load(device="cpu")
    assert model.model.config["in_channels"] == 1 and model.sample(
        2, steps=2, progress=False
    ).shape == (2, 1, 8, 8)
    Image.new("RGB", (9, 9), "red").save("grey/red.png")
    assert diffusion_model.load_images("grey", 8)[0].shape == (9, 3, 8, 8)


def test_without_tensorboard(here, monkeypatch, capsys):
    """An error says how to get it."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train("--tensorboard") == 2 and "pip install tensorboard" in error_line(capsys)


def test_tensorboard(here):
    """--tensorboard writes the loss of every step."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train("--tensorboard") == 0
    losses = [
        event.value
        for event in accumulator.EventAccumulator("tensorboard").Reload().Scalars("loss")
    ]
    assert len(losses) == 16 and statistics.fmean(losses[8:]) == pytest.approx(
        state()["epoch_losses"][-1], rel=1e-4
    )


def test_most_alike():
    """Of pictures that are noise the one that was changed a little, and a mirrored one, which is mirrored back."""
    data = torch.randint(256, (16_000, 3, 8, 8), dtype=torch.uint8)  # two parts
    images = torch.stack([data[15_900], data[7].flip(2)]) / 255 + 0.05 * torch.randn(2, 3, 8, 8)
    assert torch.equal(
        support.most_alike(images, data), torch.stack([data[15_900], data[7].flip(2)]) / 255
    )
    alike = support.most_alike(images, data, mirrored=False)  # of letters a mirrored one is another
    assert torch.equal(alike[0], data[15_900] / 255) and not torch.equal(
        alike[1].flip(2), data[7] / 255
    )

    close = torch.full(
        (60, 3, 32, 32), 200, dtype=torch.uint8
    )  # which a matrix product would confuse
    close[:, 0, 0, 0] = torch.arange(140, 200)
    assert torch.equal(support.most_alike(close / 255, close), close / 255)


def test_processes_wait_as_long_as_a_download_takes(monkeypatch):
    """The others wait for the first at the barrier of first_goes_ahead; torch's own limit is half an hour."""
    given = {}
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *_, **options: given.update(options)
    )
    monkeypatch.setattr(support.atexit, "register", lambda *_: None)
    for name, value in dict(RANK="1", WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    processes, order = support.Processes(torch.device("cpu")), []
    monkeypatch.setattr(processes, "largest", lambda number: order.append("waits"))
    with processes.first_goes_ahead():
        order.append("reads")
    processes.rank = 0
    with processes.first_goes_ahead():
        order.append("reads")
    assert given["timeout"].total_seconds() >= 86_400 and order == [
        "waits",
        "reads",
        "reads",
        "waits",
    ]


def recorded_run(flags):
    """One of several processes: train, and write down what this one was fed, drew, wrote and ended with."""
    seen = dict(index=[], noise=[], written=[])
    spy(
        setattr,
        diffusion_model,
        "training_batch",
        lambda *args: seen["index"].append(args[2].tolist()),
    )
    spy(
        setattr,
        DiffusionModel,
        "q_sample",
        lambda model, x, t, noise=None: seen["noise"].append(noise),
    )
    spy(setattr, diffusion_model, "write", lambda contents, path: seen["written"].append(str(path)))
    spy(setattr, support, "save_grid", lambda images, path, **_: seen["written"].append(str(path)))
    spy(
        setattr,
        diffusion_model,
        "update_ema",
        lambda ema, model, step: seen.update(ema=ema, model=model),
    )
    train(*flags)
    seen.update(ema=seen["ema"].state_dict(), model=seen["model"].state_dict())
    torch.save(seen, f"seen_{os.environ['RANK']}.pth")


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return str(place.getsockname()[1])


def test_torchrun(tmp_path):
    """Two processes share each batch, draw noise of their own, end with the same weights, and only one writes."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys\nsys.path[:0] = {[str(ROOT / 'tests'), str(ROOT)]}\n"
        f"import test_training\ntest_training.recorded_run(['--limit', '100'])\n"
    )
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master-port",
        free_port(),
    ]
    done = subprocess.run(
        [*torchrun, driver],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0 and done.stdout.count("epoch   2/2") == 1, done.stderr
    first, second = (
        torch.load(tmp_path / f"seen_{rank}.pth", weights_only=True) for rank in (0, 1)
    )
    indices = [index for index in first["index"] if len(index) == 16]  # without that for data.png
    noises = [noise for noise in first["noise"] + second["noise"] if noise is not None]
    for parts in (slice(0, 3), slice(3, 6)):
        epoch = sum(indices[parts] + second["index"][parts], [])
        assert len(set(epoch)) == len(epoch) == 96
    assert len(noises) == 12 and len(torch.cat(noises).flatten(1).unique(dim=0)) == 12 * 16
    assert same(first["model"], second["model"]) and same(first["ema"], second["ema"])
    assert first["written"] and not second["written"]


def two_processes(tmp_path, *flags, **of_the_second):
    """Start a run of two processes, as torchrun does; the environment of the second has more."""
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    own = ({}, of_the_second)
    return [
        start(
            tmp_path / str(rank),
            *flags,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **shared,
            **own[rank],
        )
        for rank in (0, 1)
    ]


def test_two_processes_resume_to_the_bit(tmp_path):
    """Stopped by a signal that one of them got: the same command then ends as if there had been none."""
    for out, stops in (("whole", [{}]), ("stopped", [dict(STOP_IN_STEP="11"), {}])):
        for stop in stops:
            both = two_processes(tmp_path, "--out", tmp_path / out, **stop)
            for process in both:
                process.join(120)
                assert process.exitcode == (143 if stop else 0), (
                    tmp_path / "0" / "err"
                ).read_text()
    assert "going on after step 11 " in (tmp_path / "0" / "out").read_text()
    assert same(state(tmp_path / "stopped"), state(tmp_path / "whole"))


@pytest.mark.parametrize(
    "victim, number", [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGTERM)]
)
def test_one_of_two_processes_is_stopped(tmp_path, victim, number):
    """Killed: the other ends with an error instead of waiting for ever. SIGTERM: both stop, with the state saved."""
    both = two_processes(
        tmp_path, "--epochs", 100_000, "--sample-every", 100_000, "--out", tmp_path
    )
    try:
        deadline = time.monotonic() + 60
        while "epoch " not in (tmp_path / "0" / "out").read_text():
            assert time.monotonic() < deadline and both[0].is_alive(), (
                tmp_path / "0" / "err"
            ).read_text()
            time.sleep(0.1)
        os.kill(both[victim].pid, number)
        for process in both:
            process.join(60)
        if number == signal.SIGTERM:
            assert [process.exitcode for process in both] == [143, 143] and state(tmp_path)[
                "step"
            ] > 0
        else:
            assert (
                both[1 - victim].exitcode not in (None, 0)
                and (tmp_path / str(1 - victim) / "err").read_text()
            )
    finally:
        for process in both:
            process.kill()


def test_more_processes_than_gpus(monkeypatch):
    """An error that says what to do, and no process group."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--nproc_per_node"):
        support.Processes(torch.device("cuda"))


def test_machines_that_do_not_share_a_folder(tmp_path):
    """One process finds the state of a stopped run, the other, in a folder of its own, does not: both refuse."""
    finish(tmp_path / "0", "--epochs", 1)
    both = two_processes(tmp_path)
    try:
        for rank, process in enumerate(both):
            process.join(60)
            assert (
                process.exitcode == 2
                and "machines share" in (tmp_path / str(rank) / "err").read_text()
            )
    finally:
        for process in both:
            process.kill()


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="the peak of a process is read from Linux's /proc",
)
def test_memory_of_the_default_network_at_64x64(tmp_path):
    """At most 2 GB (in float32 2.5) at batch 16: all of the process, from training to the grid of samples."""
    # VmHWM is the peak since the program started. getrusage's would not do: it inherits the peak of pytest itself.
    code = (
        "import sys, diffusion_model\ndiffusion_model.main(sys.argv[1:])\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    flags = "--data shapes --image-size 64 --limit 32 --batch-size 16 --epochs 1 --device cpu --out run".split()
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.splitlines()[-1]) * 1024
    assert 4e8 < peak < (2e9 if diffusion_model.has_bfloat16(torch.device("cpu")) else 2.5e9)


def test_bfloat16_learns_as_float32_does(tmp_path, monkeypatch):
    """A short run ends within 2 % of the loss of the same run in float32."""
    losses = []
    for bfloat16 in (True, False):  # a CPU that does not have it computes it all the same
        monkeypatch.setattr(diffusion_model, "has_bfloat16", lambda device: bfloat16)
        run = new_run(**{**CONFIG, "epochs": 12, "lr": 2e-3, "out": tmp_path})
        seen = []
        while run.step < run.total_steps:
            run.train_step()
            seen.append(run.losses[-1].item())
        losses.append(statistics.fmean(seen[-16:]))
    assert losses[0] < 0.8 * statistics.fmean(seen[:8])  # it has learned something
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
