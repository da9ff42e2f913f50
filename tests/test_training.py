"""A training run: its options, its optimisers, what it leaves behind, and that nothing of it is
lost.

Most runs are made in this process. Those that are killed, or that are one of several processes, are
children of a server that has imported torch already, which makes their start cheap."""

import contextlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY_RUN,
    error_of,
    flags,
    in_step,
    pictures,
    pixels,
    run,
    same,
    spy,
    state,
    stopped_in_step,
    tiles,
    to_bytes,
)
from pretend_device import pretend_device, what_is_missing

import diffusion_model as dm

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload("torch._dynamo torchvision.utils matplotlib.figure tqdm".split())

pytestmark = pytest.mark.usefixtures("here")
SCRIPT = ROOT / "diffusion_model.py"


class Killed(BaseException):
    """Nobody catches it, and so it ends a run as abruptly as SIGKILL."""


def kill():
    raise Killed


@pytest.fixture(autouse=True, scope="module")
def as_in_a_terminal():
    """One thread, as the children have it, because sums that are done in another order are other
    bits. No signal is ignored, as nohup and background jobs have it, or ends the tests."""
    threads, numbers = torch.get_num_threads(), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, as_in_a_terminal):
    """The folder of a run of TINY_RUN that nothing stopped."""
    train(out=(out := tmp_path_factory.mktemp("whole")))
    return out


def train(data=None, **options):
    return dm.train(dm.TrainConfig(**{**TINY_RUN, **options}), data)


def main(**options):
    """TINY_RUN with these options from the command line: -> the exit code."""
    try:
        dm.main(flags(**{**TINY_RUN, **options}))
    except SystemExit as stopped:
        return stopped.code
    return 0


def error(capsys, **options):
    return error_of(dm.main, capsys, *flags(**{**TINY_RUN, **options}))


def sgd(network, lr):
    """An optimiser of one's own, whose two groups have two rates."""
    slow = dict(params=network.up.parameters(), lr=lr / 2)
    groups = [dict(params=network.down.parameters()), slow]
    return [torch.optim.SGD(groups, lr, momentum=0.9)]


# ---- The options


def test_the_help_of_a_flag_is_its_comment(capsys, monkeypatch):
    """--help shows every field of TrainConfig, with the comment that stands beside it."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stopped:
        dm.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    source = inspect.getsource(dm.TrainConfig)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)", source, re.MULTILINE))
    assert stopped.value.code == 0 and comments.keys() == asdict(dm.TrainConfig()).keys()
    for name, comment in comments.items():
        flag = "--" + name.replace("_", "-")
        assert re.search(f"{flag} [^a-z]*{re.escape(comment)}", text), flag


BAD = """--epochs 0|--epochs 1.5|--epochs many|--epochs|--batch-size -1|--lr nan|--lr 0|--limit 0
--images 0|--dropout 1.5|--schedule foo|--prediction foo|--t-distribution foo|--channel-mults 0
--channel-mults|--channel-mults 1 x|--n-steps 0|--seed 1e3|--seed 99999999999999999999999
--device foo|--hidden-channels 0|--num-res-blocks 0|--num-res-blocks 1 1 1|--num-res-blocks
--num-heads 3|--num-heads -1|--attention-levels -1|--sample-every 0|--data nowhere
--init nowhere.pth|--image-size 0|--image-size 7|--out taken/out|--epoch 1|--restart=1|stray"""


@pytest.mark.parametrize("words", BAD.replace("\n", "|").split("|"))
def test_a_bad_option_ends_in_one_line(here, capsys, words):
    """The exit code is 2, and no run begins."""
    Path("taken").touch()
    assert error_of(dm.main, capsys, *flags(**TINY_RUN), *words.split()), "it was accepted"
    assert not list(here.rglob("training_state.pth"))


def test_values_become_plain_ones():
    """From Python a Path, a device, numpy's numbers and a list will do, but no half of an epoch."""
    odd = dict(epochs=np.int64(3), lr=np.float32(0.5), channel_mults=[np.int64(1), 2])
    plain = dm.TrainConfig(data=Path("folder"), device=torch.device("cpu"), **odd)
    wanted = dict(data="folder", device="cpu", epochs=3, lr=0.5, channel_mults=(1, 2))
    assert {name: getattr(plain, name) for name in wanted} == wanted
    assert json.loads(json.dumps(asdict(plain)))["epochs"] == 3
    for wrong in (dict(epochs=1.5), dict(channel_mults=(1, 1.5)), dict(lr=-1)):
        with pytest.raises((ValueError, TypeError)):
            dm.TrainConfig(**wrong)


def test_every_choice_is_in_the_checkpoint():
    """Each option that makes the model another one is found in the file, which draws."""
    choices = dict(hidden_channels=7, channel_mults=[1, 4], num_res_blocks=[2, 1], num_heads=7)
    choices.update(attention_levels=[0, 1], dropout=0.3, n_steps=50, schedule="cosine")
    choices.update(prediction="noise", t_distribution="uniform", image_size=6)
    assert main(**choices, unconditional=True) == 0
    saved = torch.load("diffusion_model.pth", weights_only=True)
    found = {**saved, **saved["model_config"], **saved["diffusion_config"]}
    assert {name: found[name] for name in choices} == choices
    assert found["num_classes"] is None and found["class_names"] is None
    drawn = dm.SimpleDiffusion.load(device="cpu").sample(2, steps=2)
    assert drawn.isfinite().all() and drawn.shape == (2, 3, 6, 6)


@pytest.mark.parametrize(
    "data, out", [(".", "run"), ("in", "in"), ("in", "in/run"), ("~/in", "in")]
)
def test_what_a_run_writes_is_not_its_data(here, monkeypatch, capsys, data, out):
    """With --out in the folder of the pictures the samples would be pictures at the next start."""
    monkeypatch.setenv("HOME", str(here))
    pictures("in", ["cat", "dog"])
    assert "--out" in error(capsys, data=data, out=out)
    assert not list(here.rglob("*.pth"))


# ---- The optimisers and the pieces of a step


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_is_that_of_torch():
    """Kernels and matrices move as torch.optim.Muon moves matrices of one row an output channel.

    This also holds after the network has moved to another memory format. Both compute in bfloat16,
    so they may differ by a few per cent of the largest update that an orthogonal matrix allows.
    """
    torch.manual_seed(0)
    conv, linear = torch.nn.Conv2d, torch.nn.Linear
    network = torch.nn.Sequential(conv(4, 6, 3), conv(6, 6, 3), conv(6, 6, 3), conv(9, 2, 1))
    network.extend([linear(5, 7), linear(7, 5)])
    ours = [layer.weight for layer in network]
    theirs = [torch.nn.Parameter(p.detach().flatten(1).clone()) for p in ours]
    options = dict(lr=0.1, momentum=0.95, weight_decay=0.1)
    muon = dm.Muon(ours, **options)
    oracle = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for i in range(4):
        if i == 2:
            network.to(memory_format=torch.channels_last)
        for p, q in zip(ours, theirs):
            q.grad = torch.randn(q.shape)
            p.grad = q.grad.view(p.shape).clone()
        before = [q.detach().clone() for q in theirs]
        muon.step()
        oracle.step()
        with torch.no_grad():
            for p, q, old in zip(ours, theirs, before):
                assert (p.flatten(1) - q).abs().max() < 0.03 * (q - old).abs().max()
                p.copy_(q.view(p.shape))  # so that differences do not add up
    muon.zero_grad()
    assert all(p.grad is None for p in ours)


def test_muon_survives_a_gradient_of_zeros():
    """Nothing is left but the weight decay, and a weight without a gradient is left alone."""
    torch.manual_seed(0)
    still, alone = (torch.nn.Parameter(torch.randn(4, 3, 3, 3)) for _ in range(2))
    before, untouched = still.detach().clone(), alone.detach().clone()
    still.grad = torch.zeros_like(still)
    dm.Muon([still, alone], lr=0.1, weight_decay=0.1).step()
    torch.testing.assert_close(still.detach(), before * 0.99)
    assert torch.equal(alone, untouched)


def test_who_trains_what_and_every_parameter_moves(tiny_model):
    """Muon has the kernels and matrices inside of the network, AdamW the rest, which touches pixels
    and labels or is no matrix. One step moves all of them, after a change of memory format too."""
    network = tiny_model.network
    muon, adamw = optimizers = dm.make_optimizers(network, 3e-3)
    assert isinstance(muon, dm.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(p): name for name, p in network.named_parameters()}
    of_muon, of_adamw = (
        [names[id(p)] for group in each.param_groups for p in group["params"]]
        for each in optimizers
    )
    assert sorted(of_muon + of_adamw) == sorted(names.values())
    edge = {"down.0.entry.weight", "up.1.exit.2.weight", "class_embedding.weight"}
    matrices = {name for name, p in network.named_parameters() if p.ndim > 1}
    assert edge < matrices and {*of_muon} == matrices - edge
    tiny_model.to(memory_format=torch.channels_last).train()
    before = [p.detach().clone() for p in network.parameters()]
    tiny_model(torch.rand(4, 3, 8, 8) * 2 - 1, torch.tensor([0, 1, 2, 3])).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    for old, (name, p) in zip(before, network.named_parameters()):
        assert not torch.equal(old, p) and p.grad is None, name


@pytest.mark.parametrize("total, warmup", [(1, 1), (100, 5), (20_000, 500)])
def test_learning_rate(total, warmup):
    """The warm-up is a line over 5 % of the steps or 500, times half a cosine down to zero."""
    for step in {0, warmup - 1, warmup, total // 2, total}:
        wanted = 2e-3 * min(1, (step + 1) / warmup) * math.cos(math.pi * step / total / 2) ** 2
        assert dm.learning_rate(step, total, 2e-3) == pytest.approx(wanted, abs=1e-15)


def test_update_ema():
    """Towards a weight that stays 1, 3 % of n steps bring an average of 0 half of the way at step
    n.

    The first step of all is followed at once. Buffers are copied, of whatever type they are."""
    model, ema = torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2)
    torch.nn.init.ones_(model.weight)
    model(torch.randn(4, 2, 3, 3) + 5)
    torch.nn.init.zeros_(ema.weight)
    for step in range(10_000, 10_300):
        dm.update_ema(ema, model, step)
    assert ema.weight.tolist() == pytest.approx([0.5, 0.5], abs=0.01)
    assert same(list(ema.buffers()), list(model.buffers())) and ema.num_batches_tracked == 1
    dm.update_ema(ema, model, 1)
    assert ema.weight.tolist() == pytest.approx([1, 1], abs=1e-6)


def test_an_epoch_is_one_shuffled_pass(monkeypatch):
    """Its batches are disjoint, what is left over is dropped, and the next epoch has another
    order."""
    seen = []
    spy(monkeypatch.setattr, dm, "training_batch", lambda *args: seen.append(args[2].tolist()))
    train(limit=28)
    first, second = sum(seen[-6:-3], []), sum(seen[-3:], [])
    assert len({*first}) == len(first) == len({*second}) == len(second) == 24
    assert max(first + second) <= 27 and first != second and first != sorted(first)


def test_a_gradient_is_clipped(monkeypatch):
    """The first step of plain SGD is as long as the learning rate, however large the gradient is.
    The average, which is updated after it, is until then a copy of the first weights."""
    sgd_alone = lambda network, lr: [torch.optim.SGD(network.parameters(), lr)]
    forward, moves = dm.SimpleDiffusion.forward, []
    monkeypatch.setattr(dm, "make_optimizers", sgd_alone)
    monkeypatch.setattr(dm.SimpleDiffusion, "forward", lambda *args: 1e4 * forward(*args))
    vector = lambda model: torch.cat([p.detach().flatten() for p in model.parameters()])
    note = lambda ema, model, step: moves.append((vector(model) - vector(ema)).norm().item())
    spy(monkeypatch.setattr, dm, "update_ema", note)
    train(limit=8, epochs=1, lr=0.01)
    assert moves == [pytest.approx(0.01, rel=0.01)]


def test_an_optimiser_of_ones_own(monkeypatch):
    """Whoever replaces make_optimizers has a run that keeps the ratio of its groups' rates and that
    resumes to the bit."""
    monkeypatch.setattr(dm, "make_optimizers", sgd)
    rates = []
    rate_of = lambda optimizer, *_: rates.append([g["lr"] for g in optimizer.param_groups])
    spy(monkeypatch.setattr, torch.optim.SGD, "step", rate_of)
    train(out="whole", lr=0.05)
    with stopped_in_step(4, monkeypatch), pytest.raises(KeyboardInterrupt):
        train(lr=0.05)
    train(lr=0.05)
    assert same(state(), state("whole")) and state()["step"] == 6 and len(rates) == 12
    assert all(second == pytest.approx(first / 2) for first, second in rates) and rates[0][0] > 0


# ---- Seeds


def seeds_of(steps, **options):
    """What torch.manual_seed was given by a run that ends after so many steps, as 32 bits."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        spy(patch.setattr, torch, "manual_seed", lambda seed: seen.append(seed % 2**32))
        in_step(patch, steps, kill)
        with pytest.raises(Killed):
            train(**options)
    return seen[0], seen[-steps:]


def test_two_runs_share_no_random_numbers():
    """The seeds of a run's steps count up, and so those of 190,000 steps fill an arc of the circle
    of 2**32 seeds, which is all that torch's generators tell apart. The arcs of two runs do not
    meet. The seed of the first weights is that of no step, of this run or another."""
    runs = [seeds_of(3, seed=seed, out=f"{seed}") for seed in (*range(5), 42, 1234, 4295, 9999)]
    weights, steps = zip(*runs)
    for first, *rest in steps:
        assert [(step - first) % 2**32 for step in rest] == [1, 2]
    for (a, *_), (b, *_) in itertools.combinations(steps, 2):
        assert min((a - b) % 2**32, (b - a) % 2**32) > 190_000, (a, b)
    assert not {*weights} & {*sum(steps, [])}


# ---- A whole run


def test_what_a_run_leaves(here, capfd):
    """The files, the lines and the facts of a run, and the model that train returns."""
    before, handler = torch.get_rng_state(), signal.getsignal(signal.SIGINT)
    model = train(sample_every=1, lr=1e-4)
    assert torch.equal(torch.get_rng_state(), before)
    assert signal.getsignal(signal.SIGINT) is handler
    out, err = capfd.readouterr()
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert err == "" and "\r" not in out and out.count("\nepoch ") == 2
    words = dict(device="cpu", network="M parameters", data="24 images of shapes", epoch="2/2")
    words.update(training="2 epochs of 3 steps", files=f"{here}")
    words.update(wrote=f"inference_example.py --checkpoint {here}/diffusion_model.pth")
    assert all(word in lines[start] for start, word in words.items()), out

    written = {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()}
    grids = {f"samples/{name}.png" for name in ("data", "epoch_0001", "epoch_0002", "loss")}
    assert written == grids | {"diffusion_model.pth", "model_info.json", "training_state.pth"}
    saved = torch.load("diffusion_model.pth", weights_only=True)
    weights = model.network.state_dict()
    assert same(saved["model_state_dict"], {name: w.half() for name, w in weights.items()})
    assert same(state()["ema"], weights) and len(state()["losses"]) == 6
    assert all(p.requires_grad for p in model.parameters())
    assert not any(part.training for part in model.modules())

    info = json.loads(Path("model_info.json").read_text())
    assert info == saved["info"]
    keys = """architecture parameters dataset images_seen epochs batch_size optimizer learning_rate
        prediction schedule n_steps final_loss training_minutes device torch date license"""
    assert {*keys.split()} <= info.keys()
    assert (info["images_seen"], info["epochs"], info["learning_rate"]) == (48, 2, 1e-4)
    assert info["parameters"] == sum(w.numel() for w in weights.values())
    assert info["license"] == "MIT"
    assert info["final_loss"] == pytest.approx(sum(state()["losses"][3:]) / 3, rel=1e-3)

    data = dm.load_images("shapes", 8, 24)[0] / 255
    drawn = model.sample(4, y=[0, 1, 2, 3], seed=0)  # as anyone draws it from this seed
    for name, images, columns in (("data", data, 8), ("epoch_0002", drawn, 2)):
        shown = torch.tensor(tiles(pixels(f"samples/{name}.png"), columns)).permute(0, 3, 1, 2)
        assert shown.shape == images.shape and (shown / 255 - images).abs().max() < 0.01


def test_a_run_on_data_of_ones_own(whole):
    """data=(images, labels, class names) trains as the same data under a name does, also in a
    thread."""
    data = dm.load_images("shapes", 8, 24)
    thread = threading.Thread(target=lambda: train(data))  # where no signal handler can be set
    thread.start()
    thread.join()
    ours, theirs = state(), state(whole)
    del ours["run"]["data"], theirs["run"]["data"]
    assert same(ours, theirs)


IMAGES = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    "data",
    [
        (IMAGES / 255, None, None),
        (IMAGES[0], None, None),
        (IMAGES[:, :, :4], None, None),
        (IMAGES, torch.full((8,), 2), ["a", "b"]),
        (IMAGES, torch.full((8,), -1), ["a", "b"]),
        (IMAGES, torch.full((8,), 0.5), ["a", "b"]),
        (IMAGES, torch.zeros(7).long(), ["a", "b"]),
        (IMAGES, torch.zeros(8).long(), None),
    ],
    ids="floats one_image not_square label_2_of_2 negative half too_few no_names".split(),
)
def test_wrong_data_is_refused(data):
    """It is a ValueError that says what was expected."""
    with pytest.raises(ValueError, match="images|labels|class"):
        train(data)


@pytest.mark.parametrize("images, epochs, grids", [(1, 1, 1), (100, 4, 4), (504, 21, 11)])
def test_images_instead_of_epochs(capsys, images, epochs, grids):
    """--images is rounded to epochs of 24, and at most twenty of them leave a grid and a line:
    every second one of 21, and the last."""
    train(images=images)
    assert state()["step"] == 3 * epochs
    assert len(list(Path("samples").glob("epoch_*.png"))) == grids
    assert capsys.readouterr().out.count("\nepoch ") == grids


@pytest.mark.parametrize(
    "options, hint",
    [(dict(epochs=333), True), (dict(epochs=334), False), (dict(images=2400), False)],
)
def test_few_steps_are_said(monkeypatch, capsys, options, hint):
    """Seven pictures make 100 tiny epochs. So a run of less than 1,000 steps names --images, but
    not to whoever has chosen it: more repeats would only be memorised."""
    in_step(monkeypatch, 1, kill)
    with pytest.raises(Killed):
        train(**options)
    assert ("--images" in capsys.readouterr().out) == hint


def test_a_picture_alone_is_learned_by_heart():
    """Whatever is drawn after 150 steps is that picture of noise, and with --no-flip not its
    mirror."""
    image = torch.randint(256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    data = image.repeat(400, 1, 1, 1), None, None
    model = train(data, hidden_channels=16, epochs=3, lr=0.01, no_flip=True)
    drawn = model.sample(4, seed=0)
    assert (drawn - image / 255).abs().mean() < 0.1
    assert (drawn - image.flip(3) / 255).abs().mean() > 0.2


def test_it_learns_shapes():
    """The loss of a run on different images falls as well."""
    train(limit=256, batch_size=32, epochs=6, sample_every=6, lr=0.01)
    losses = state()["losses"]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


def test_the_bar_of_a_terminal(monkeypatch, capsys):
    """It shows the loss and comes to its end, and the lines of the epochs stand above it, whole."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main() == 0
    out, err = capsys.readouterr()
    assert "loss=" in err and "6/6" in err.split("\r")[-1] and out.count("\nepoch ") == 2


def test_tensorboard():
    """--tensorboard writes the loss of every epoch."""
    module = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(module).EventAccumulator("tensorboard")
    train(tensorboard=True)
    losses = [event.value for event in accumulator.Reload().Scalars("loss")]
    assert losses[-1] == pytest.approx(sum(state()["losses"][3:]) / 3, rel=1e-4)


def test_what_tensorboard_is_given(here, monkeypatch):
    """A value of the loss for each epoch, also of a longer run that goes on where one ended."""
    folders, written = [], []
    writer = SimpleNamespace(add_scalar=lambda *event: written.append(event), flush=lambda: None)
    module = SimpleNamespace(SummaryWriter=lambda folder, **_: folders.append(folder) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    for epochs in (1, 2):
        train(epochs=epochs, tensorboard=True)
    losses = state()["losses"]
    wanted = [("loss", pytest.approx(sum(losses[i : i + 3]) / 3), i + 3) for i in (0, 3)]
    assert written == wanted and folders == [here / "tensorboard"] * 2


def test_without_tensorboard(monkeypatch, capsys):
    """One line says what is missing."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "tensorboard" in error(capsys, tensorboard=True)


# ---- --compile


def test_compile(whole, monkeypatch):
    """What is compiled trains the same weights under the same names. Only tracing is tested
    here."""
    compiled, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f: compiled(f, backend=backend))
    train(compile=True)
    assert graphs
    for part in ("model", "ema"):
        torch.testing.assert_close(state()[part], state(whole)[part], rtol=1e-4, atol=1e-5)


def test_compile_without_a_compiler(here):
    """One line says so, where torch alone prints thousands."""
    words = flags(**{**TINY_RUN, "compile": True, "channel_mults": (1,), "attention_levels": ()})
    none = dict(TORCHINDUCTOR_CACHE_DIR=f"{here}/cache", CXX="no-such-compiler", PATH=f"{here}")
    done = run(sys.executable, SCRIPT, *words, **none)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) <= 3, done.stderr  # torch 2.8 logs two lines itself
    assert lines[-1].startswith("error: ") and "compile" in lines[-1], done.stderr
    assert not Path("training_state.pth").exists()


@pytest.mark.skipif(what_is_missing() is not None, reason="this torch cannot pretend a device")
def test_compile_is_refused_on_mps():
    """Several versions of torch compute wrong results there without an error."""
    with pretend_device("mps"), pytest.raises(ValueError, match="MPS"):
        train(compile=True, device="mps")


# ---- Stopping and resuming


def test_stopped_after_every_step(monkeypatch, capsys):
    """Signals in turn, in mid-epoch too: the exit code is 128 + the signal's number, a line says
    how to go on, and the end is to the bit that of a run that nothing stopped. The last step stops
    nothing. Torch's random state is left alone."""
    before = torch.get_rng_state()
    assert main(out="whole", dropout=0.3) == 0
    signals = itertools.cycle([(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
    for step, (number, code) in zip(range(1, 7), signals):
        capsys.readouterr()
        with stopped_in_step(1, monkeypatch, number):
            assert main(dropout=0.3) == (code if step < 6 else 0)
        lines = capsys.readouterr().out.splitlines()
        assert step == 1 or f"going on after step {step - 1} (" in lines[0]
        assert step == 6 or f"stopped after step {step}" in lines[-1]
    assert same(state(), state("whole")) and torch.equal(torch.get_rng_state(), before)


def test_stopped_from_python(monkeypatch):
    """train raises KeyboardInterrupt once the state is saved."""
    with stopped_in_step(2, monkeypatch, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        train()
    assert state()["step"] == 2


def test_a_state_of_another_device(monkeypatch, whole):
    """Its numbers may lie in another order in memory, as those of MPS do. That changes nothing."""
    with stopped_in_step(3, monkeypatch):
        assert main() == 143
    saved, moved = torch.load("training_state.pth", weights_only=True), 0
    for optimizer in saved["optimizers"]:
        for moments in optimizer["state"].values():
            for name, moment in moments.items():
                moments[name] = moment.contiguous()
                moved += moment.stride() != moments[name].stride()
    torch.save(saved, "training_state.pth")
    assert moved > 4 and main() == 0
    torch.testing.assert_close(state()["model"], state(whole)["model"], rtol=0, atol=1e-6)


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    """Nothing is saved then, and the exit code is that of the first."""
    twice = lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
    spy(monkeypatch.setattr, dm, "learning_rate", twice)
    assert main() == 130 and not Path("training_state.pth").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_an_ignored_signal_stays_ignored(monkeypatch, number):
    """As SIGHUP is under nohup, and SIGINT in the background jobs of a script."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stopped_in_step(2, monkeypatch, number):
            assert main() == 0 and signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_killed_while_it_saves(monkeypatch, whole):
    """The state is then still the one before, and the same command ends as if nothing had been."""

    def note(source, path):
        if Path(path).name == "training_state.pth" and Path(path).exists():
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        spy(patch.setattr, os, "replace", note)
        train()
    assert state()["step"] == 3
    train()
    assert same(state(), state(whole))


def test_killed_between_two_saves(whole):
    """kill -9 in step 5 costs no more than what came after the state of step 3."""
    for stop, code, step in ((5, -signal.SIGKILL, 3), (None, 0, 6)):
        process = start(stop_in=stop, number=signal.SIGKILL)
        process.join(120)
        assert process.exitcode == code and state()["step"] == step
    assert same(state(), state(whole))


@pytest.mark.parametrize(
    "seconds, options, steps",
    [
        (100, dict(limit=80), [4, 8, 10, 14, 18, 20]),
        (1, dict(epochs=12), [*range(3, 30, 3), 33, 36]),
    ],
)
def test_when_the_state_is_saved(monkeypatch, seconds, options, steps):
    """If a step takes so long: once five minutes are over, within an epoch too, and after an epoch
    if more than 20 seconds or a tenth of the run would be lost."""
    clock, saved = [0], []
    tick = lambda step, *_: clock.append(seconds * (step + 1))
    spy(monkeypatch.setattr, dm, "learning_rate", tick)
    note = lambda contents, path: path.name[:5] == "train" and saved.append(contents["step"])
    spy(monkeypatch.setattr, dm, "write", note)
    monkeypatch.setattr(time, "monotonic", lambda: clock[-1])
    train(sample_every=99, **options)
    assert saved == steps


def test_a_finished_run_does_nothing_and_more_epochs_go_on(here, capsys):
    """It says so and touches no file. With --epochs 3 the third follows, and --restart begins
    again."""

    def files():
        return {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()}

    assert main() == 0
    first, before, _ = state(), files(), capsys.readouterr()
    assert main() == 0 and files() == before and "\nfinished" in capsys.readouterr().out
    assert main(epochs=3) == 0
    out = capsys.readouterr().out
    assert out.startswith("going on after step 6 (") and out.count("\nepoch ") == 1
    assert state()["losses"][:6] == first["losses"] and len(state()["losses"]) == 9
    assert json.loads(Path("model_info.json").read_text())["epochs"] == 3
    assert main(restart=True) == 0 and "going on" not in capsys.readouterr().out
    assert all(same(state()[name], first[name]) for name in ("model", "ema", "losses"))


@pytest.mark.parametrize(
    "words",
    """--batch-size 4|--seed 1|--hidden-channels 16|--limit 16|--unconditional|--no-flip
--schedule cosine|--dropout 0.1""".replace("\n", "|").split("|"),
)
def test_another_option_is_named(whole, capsys, words):
    """Another value would be another run, whose state is left as it is. Only what does not matter
    may change, which is tried at the end."""
    before = (whole / "training_state.pth").read_bytes()
    flag, *values = words.split()
    line = error_of(dm.main, capsys, *flags(**TINY_RUN, out=whole), flag, *values)
    for word in [flag[2:].replace("-", "_"), *values, "--restart"]:
        assert word in line
    assert "damaged" not in line
    assert error(capsys, out=whole, lr=1e-3, sample_every=1, device="cpu") is None
    assert (whole / "training_state.pth").read_bytes() == before


@pytest.mark.parametrize(
    "moves, word",
    [
        (["dog ant"], "ant"),
        (["cat/0.png 0", "dog/0.png cat/0.png", "0 dog/0.png"], "checksum"),
        (["dog/0.png cat/8.png"], "checksum"),
        (["dog/7.png ../7.png"], "15"),
        (["dog ../dog"], "classes"),
    ],
    ids="renamed swapped another_class one_less a_class_less".split(),
)
def test_other_data_is_another_run(here, capsys, monkeypatch, moves, word):
    """The error says what changed and what to do, does not call the state damaged, and leaves it.
    The same pictures in another folder are the same data."""
    options = dict(data=pictures("pictures", ["cat", "dog"]), limit=100)
    with stopped_in_step(2, monkeypatch):
        assert main(**options) == 143
    before = Path("training_state.pth").read_bytes()
    for old, new in map(str.split, moves):
        Path("pictures", old).rename(Path("pictures", new))
    line = error(capsys, **options)
    assert word in line and "--restart" in line and "damaged" not in line
    assert Path("training_state.pth").read_bytes() == before
    again = here / pictures("again", ["cat", "dog"])
    assert main(**{**options, "data": f"{again}/"}) == 0
    assert state()["step"] == 4
    assert json.loads(Path("model_info.json").read_text())["license"] == "not stated"


def test_one_more_option_in_the_state(whole, capsys):
    """A state of another version is not damaged, and the error names the option in which it
    differs."""
    saved = torch.load(whole / "training_state.pth", weights_only=True)
    saved["run"]["colour"] = "red"
    torch.save(saved, "training_state.pth")
    line = error(capsys)
    assert "colour" in line and "red" in line and "damaged" not in line


@pytest.mark.parametrize("kind", ["cut", "flipped", "of another make"])
def test_a_state_that_cannot_be_read_is_one_line(whole, capsys, kind):
    """It names the file, which is left as it is, and --restart begins again."""
    path, good = Path("training_state.pth"), (whole / "training_state.pth").read_bytes()
    half = len(good) // 2
    bad = dict(cut=good[:half], flipped=good[:half] + bytes([good[half] ^ 1]) + good[half + 1 :])
    before = bad.get(kind) or to_bytes(dict(epoch=3, weights={}))
    path.write_bytes(before)
    assert "training_state.pth" in error(capsys) and path.read_bytes() == before
    assert main(restart=True) == 0 and state()["step"] == 6


def test_what_is_not_finite_ends_a_run_and_harms_nothing(monkeypatch, capsys):
    """Even if only a gradient is not: the error names the step, the last good state stays, and with
    a lower --lr the run goes on."""
    steps = itertools.count(1)

    def poison(parameters, *args, real=torch.nn.utils.clip_grad_norm_):
        parameters = list(parameters)
        if next(steps) == 5:
            parameters[3].grad.view(-1)[0] = math.inf
        return real(parameters, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", poison)
        line = error(capsys)
    assert "step 5" in line and "--lr" in line and state()["step"] == 3
    assert all(weight.isfinite().all() for weight in state()["model"].values())
    assert main(lr=1e-3) == 0 and state()["step"] == 6


def test_old_weights_are_kept():
    """Each run that begins keeps what it finds as .bak, .bak2 and so on, and overwrites none of
    them."""
    Path("diffusion_model.pth").write_bytes(b"years of work")
    first = Path("diffusion_model.pth.bak")
    for seed in range(2):
        newest = Path("diffusion_model.pth").read_bytes()
        assert main(epochs=1, restart=True, seed=seed) == 0
        assert first.read_bytes() == b"years of work"
    assert Path("diffusion_model.pth.bak2").read_bytes() == newest != b"years of work"
    assert main(epochs=2, seed=1) == 0 and not Path("diffusion_model.pth.bak3").exists()


# ---- Outputs that close


@pytest.mark.parametrize("ending", ["| head -1", ">&- 2>&-"])
def test_an_output_that_closes_ends_no_run(ending):
    """Nobody reads on after the first line, or nobody ever did, and the run is finished all the
    same."""
    command = f'"$@" {ending}; echo ${{PIPESTATUS[0]}} > code'
    done = run("bash", "-c", command, "bash", sys.executable, SCRIPT, *flags(**TINY_RUN))
    assert Path("code").read_text() == "0\n" and done.stderr == ""
    assert state()["step"] == 6 and Path("samples/epoch_0002.png").exists()


def test_ctrl_c_after_the_output_closed(monkeypatch):
    """As with `| tee log`, which Ctrl-C ends as well: the state is saved, and the exit code is
    130."""

    class Closed:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    with stopped_in_step(5, monkeypatch, signal.SIGINT):
        monkeypatch.setattr(sys, "stdout", Closed())
        assert main() == 130
    assert state()["step"] == 5


# ---- Processes


def child(folder, words, environment, stop_in, number, plain):
    os.chdir(folder)
    os.environ.update(environment)
    name = environment.get("RANK", "0")
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(kind + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    torch.set_num_threads(1)
    seeds = []
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        spy(patch.setattr, torch, "manual_seed", seeds.append)
        if plain:
            without_chance(patch)
        if stop_in:
            stack.enter_context(stopped_in_step(stop_in, patch, number))
        stack.callback(lambda: Path(f"seeds{name}").write_text(json.dumps(seeds)))
        dm.main(words)


def start(environment=None, stop_in=None, number=signal.SIGTERM, plain=False, **options):
    """A run of TINY_RUN in a process of its own, in this folder."""
    words = flags(**{**TINY_RUN, **options})
    arguments = (os.getcwd(), words, environment or {}, stop_in, number, plain)
    process = SERVER.Process(target=child, args=arguments)
    process.start()
    return process


def without_chance(patch):
    """Have a run's gradient depend on its batch alone, whoever computes which part of it."""
    patch.setattr(dm.DiffusionModel, "draw_timesteps", lambda self, count: torch.full((count,), 7))
    patch.setattr(torch, "randn_like", lambda x, **_: x.flip(2))
    patch.setattr(dm, "has_bfloat16", lambda device: False)
    patch.setattr(dm, "make_optimizers", sgd)


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return str(place.getsockname()[1])


def two_processes(stop_in=None, **options):
    """Run as torchrun runs two processes, the second of which may get a SIGTERM: -> exit codes."""
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    both = []
    for rank in (0, 1):
        environment = dict(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        both.append(start(environment, stop_in if rank else None, **options))
    try:
        for process in both:
            process.join(120)
        return [process.exitcode for process in both]
    finally:
        for process in both:
            process.kill()


def test_two_processes_are_one(monkeypatch):
    """They share each batch and average their gradients. So without noise of their own and with
    plain SGD their run is up to rounding that of one process, also where one of them was
    stopped."""
    options = dict(unconditional=True, no_flip=True, lr=0.5)
    assert two_processes(stop_in=4, plain=True, **options) == [143, 143]
    stopped = state()
    assert stopped["step"] == 4
    assert two_processes(plain=True, **options) == [0, 0], Path("err0").read_text()
    assert "going on after step 4" in Path("out0").read_text()
    said = Path("out1").read_text().splitlines()
    assert all(line.startswith("[Gloo]") for line in said)  # only the first says anything
    without_chance(monkeypatch)
    train(out="alone", **options)
    ours, alone = state(), state("alone")
    torch.testing.assert_close(ours["model"], alone["model"], rtol=0, atol=2e-5)
    name = "down.0.entry.weight"  # which moved all the time
    assert (ours["model"][name] - stopped["model"][name]).abs().max() > 2e-3


def test_torchrun():
    """The command of the README goes on to the bit with a run of two processes that was stopped,
    and the random numbers of two processes differ."""
    assert two_processes(out="whole") == [0, 0]
    first, second = (json.loads(Path(f"seeds{rank}").read_text()) for rank in (0, 1))
    assert len({*first[-6:], *second[-6:]}) == 12
    assert two_processes(stop_in=4) == [143, 143]
    launcher = ["torch.distributed.run", "--nproc_per_node=2", "--master-port", free_port()]
    done = run(sys.executable, "-m", *launcher, SCRIPT, *flags(**TINY_RUN))
    assert done.returncode == 0 and done.stdout.count("epoch   2/2") == 1, done.stderr
    assert same(state(), state("whole"))
