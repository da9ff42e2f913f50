"""No file can hurt: damaged checkpoints and states, full disks, pictures of every kind, data that is not there."""

import copy
import errno
import io
import itertools
import os
import pickle
import random
import resource
import signal
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from conftest import ROOT, TINY, assert_error, error_of, peak_memory, perturb, run, stopped_in_step

import diffusion_model
import support
import inference_example
from diffusion_model import DiffusionModel, SimpleDiffusion, SimpleUNet, load_images

# torch has much to say about odd tensors.
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("here")]
RUN = (
    "--data shapes --image-size 4 --hidden-channels 2 --channel-mults 1 --num-res-blocks 1 --attention-levels "
    "--limit 8 --batch-size 4 --epochs 2 --sample-every 1 --device cpu"
).split()  # two epochs of two steps


@pytest.fixture
def checkpoint(tiny_model):
    """The bytes of a small checkpoint: 8x8 pixels, the classes a, b and c."""
    tiny_model.save("good.pth")
    return Path("good.pth").read_bytes()


@pytest.fixture
def state(monkeypatch):
    """The bytes of the state of a run that was stopped within its second epoch."""
    with stopped_in_step(3, monkeypatch), pytest.raises(SystemExit):
        diffusion_model.main(RUN)
    return Path("training_state.pth").read_bytes()


def to_bytes(saved, **options):
    file = io.BytesIO()
    torch.save(saved, file, **options)
    return file.getvalue()


def from_bytes(data):
    return torch.load(io.BytesIO(data), weights_only=True)


def rewritten(data, pickled=None, extra=None):
    """The same archive with another data.pkl, and with one more compressed entry of zeros."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            replace = pickled is not None and entry.filename.endswith("/data.pkl")
            new.writestr(entry.filename, pickled if replace else old.read(entry))
        if extra is not None:
            new.writestr("archive/data/extra", bytes(extra), zipfile.ZIP_DEFLATED)
    return file.getvalue()


def broken(data, flips, seed=0):
    """The file cut off at every kind of place, and with single bytes changed: yields name, bytes."""
    chance, length, directory, end = (
        random.Random(seed),
        len(data),
        data.index(b"PK\1\2"),
        data.index(b"PK\5\6"),
    )
    cuts = {
        0,
        1,
        2,
        4,
        29,
        30,
        31,
        64,
        100,
        length // 4,
        length // 2,
        directory,
        directory + 20,
        end,
        end + 9,
    }
    cuts |= {length - 100, length - 23, length - 22, length - 2, length - 1}
    for size in sorted(cuts | {chance.randrange(length) for _ in range(20)}):
        yield f"cut to {size} bytes", data[:size]
    for place in [chance.randrange(length) for _ in range(flips)] + [
        length - 1 - i for i in range(0, 200, 3)
    ]:
        changed = bytearray(data)
        changed[place] ^= chance.randrange(1, 256)
        yield f"byte {place} changed", bytes(changed)
    yield "bytes added in front", b"hello" + data
    yield "no file of ours", b"\x89PNG\r\n\x1a\n" + bytes(500)


class Code:
    """What a pickle may do: call anything."""

    def __reduce__(self):
        return Path.touch, (Path("code_was_run"),)


def laughs(depth=40):
    """A list of two equal lists of two ..: a few bytes that fill the memory where they are printed."""
    value = ["ha"]
    for _ in range(depth):
        value = [value, value]
    return value


ODD = dict(
    none=None,
    text="x",
    empty_text="",
    a_list=[1, "x", None],
    nested=[[[[]]]],
    a_dict={"a": {1: 2}},
    minus=-1,
    zero=0,
    huge=10**30,
    fraction=2.5,
    nan=float("nan"),
    infinite=float("inf"),
    true=True,
    tensor=torch.zeros(1).expand(10**12),
    laughs=laughs(),
    unprintable=10**5000,
)


def hostile(data):
    """Whole files that hold something else, or what runs code: yields name, bytes."""
    good = from_bytes(data)
    yield "legacy format", to_bytes(good, _use_new_zipfile_serialization=False)
    yield "code", to_bytes({**good, "info": Code(), "config": Code()})
    yield "legacy code", to_bytes(Code(), _use_new_zipfile_serialization=False)
    yield "bare pickle", pickle.dumps(Code())
    yield "code in the pickle", rewritten(data, pickle.dumps(Code(), protocol=2))
    yield "nested lists", rewritten(data, b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    yield "zip bomb", rewritten(data, extra=100_000_000)
    yield from (
        (f"all is {name}", to_bytes(value)) for name, value in ODD.items() if name != "tensor"
    )
    yield from (
        (f"without {name}", to_bytes({key: good[key] for key in good if key != name}))
        for name in good
    )


def wrong_weights(good, field):
    """What a dict of weights must not hold: yields name, the whole dict."""
    weights, (name, tensor) = good[field], next(iter(good[field].items()))
    zero = torch.zeros(1, dtype=tensor.dtype)
    for what, value in dict(
        missing=None,
        nan=tensor * float("nan"),
        infinite=tensor / 0,
        reshaped=tensor[None],
        smaller=tensor[:1],
        whole_numbers=tensor.long(),
        complex=tensor.to(torch.complex64),
        meta=tensor.to("meta"),
        no_tensor=1.0,
        text="x",
        nested={"a": tensor},
        sparse=tensor.to_sparse(),
        claimed=zero.expand(10**12),
        repeated=zero.expand(tensor.shape),
    ).items():
        yield f"{field} {what}", {**good, field: {**weights, name: value}}
    yield (
        f"{field} without one",
        {**good, field: {key: weights[key] for key in weights if key != name}},
    )
    yield f"{field} with one more", {**good, field: {**weights, "more": tensor}}
    yield f"{field} with a number for a name", {**good, field: {**weights, 3: tensor}}


def check_all(cases, check, at_least):
    """Run check(name, bytes) on every case: tell all that go wrong or take long, and how many there are."""
    problems, count = [], 0
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it takes too long"))
    for count, (name, data) in enumerate(cases, start=1):
        signal.alarm(60)
        try:
            check(name, data)
        except (Exception, pytest.fail.Exception) as error:  # of any kind: each is a finding
            problems.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
        finally:
            signal.alarm(0)
        if Path("code_was_run").exists():
            problems.append(f"{name}: code was run")
    signal.signal(signal.SIGALRM, before)
    print(count, "damaged files")
    assert not problems, f"{len(problems)} of {count}\n" + "\n".join(problems)
    assert count >= at_least


def damaged_checkpoints(data):
    good = from_bytes(data)
    yield from broken(data, flips=150)
    yield from hostile(data)
    yield from ((name, to_bytes(saved)) for name, saved in wrong_weights(good, "model_state_dict"))
    for field in good:
        yield from (
            (f"{field} is {name}", to_bytes({**good, field: value})) for name, value in ODD.items()
        )
    for part in ("model_config", "diffusion_config"):
        for field in good[part]:
            for name, value in ODD.items():
                yield f"{field} is {name}", to_bytes({**good, part: {**good[part], field: value}})
        yield f"{part} with one more", to_bytes({**good, part: {**good[part], "more": 1}})
    yield (
        "a size of 0 and laughs",
        to_bytes(
            {
                **good,
                "model_config": {
                    **good["model_config"],
                    "hidden_channels": 0,
                    "attention_levels": laughs(),
                },
            }
        ),
    )


# What may load, since it does no harm: these fields, and these values of others.
HARMLESS = {
    "info",
    "class_names",
    "num_heads",
    "dropout",
    "beta_end",
    "n_steps",
    "without info",
    "num_classes is none",
    "num_heads is none",
    "attention_levels is none",
    "t_distribution",
}


def test_damaged_checkpoints(checkpoint, tiny_model, capsys):
    """Hundreds of them: a ValueError that names the file, one error line, nothing run; or else a model that draws."""
    path, refused = Path("damaged.pth"), itertools.count()
    want = tiny_model.half().float().state_dict()

    def check(name, data):
        path.write_bytes(data)
        try:
            model = SimpleDiffusion.load(path, "cpu")
        except ValueError as error:
            assert "damaged.pth" in str(error) and "\n" not in str(error)
            if next(refused) % 10 == 0:  # the line of the command is made of the same error
                line = error_of(
                    inference_example.main, capsys, "--checkpoint", path, "--device", "cpu"
                )
                assert "damaged.pth" in line
        else:
            assert name.startswith("byte") or name in HARMLESS or name.split()[0] in HARMLESS, (
                "it loads"
            )
            assert all(torch.equal(tensor, want[key]) for key, tensor in model.state_dict().items())
            assert model.sample(1, steps=1, seed=0, progress=False).isfinite().all()
            inference_example.main(
                ["--checkpoint", "damaged.pth", "-n", "1", "--steps", "1", "--device", "cpu"]
            )
        assert path.read_bytes() == data

    check_all(damaged_checkpoints(checkpoint), check, at_least=500)


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_channels", 10**9),
        ("num_res_blocks", 10**9),
        ("n_steps", 10**12),
        ("channel_mults", [1] * 10**6),
        ("channel_mults", [10**9] * 2),
        ("image_size", 10**9),
        ("time_dim", 10**9),
        ("num_classes", 10**12),
    ],
)
def test_a_file_that_claims_an_absurd_size(checkpoint, field, value):
    """It is refused, at once and before anything of that size is allocated."""
    saved = from_bytes(checkpoint)
    next(
        part for part in (saved, saved["model_config"], saved["diffusion_config"]) if field in part
    )[field] = value
    Path("absurd.pth").write_bytes(to_bytes(saved))
    memory, seconds = peak_memory(), time.process_time()
    with pytest.raises(ValueError, match="absurd.pth"):
        SimpleDiffusion.load("absurd.pth", "cpu")
    assert peak_memory() - memory < 3e8 and time.process_time() - seconds < 5


def test_a_zip_bomb_is_not_unpacked(checkpoint, monkeypatch):
    """Its directory tells what it is: no entry of it is read."""
    Path("bomb.pth").write_bytes(rewritten(checkpoint, extra=10_000_000))
    opened, real = [], zipfile.ZipFile.open
    monkeypatch.setattr(
        zipfile.ZipFile, "open", lambda *args: (opened.append(args), real(*args))[1]
    )
    with pytest.raises(ValueError, match="bomb.pth"):
        SimpleDiffusion.load("bomb.pth", "cpu")
    assert not opened


def test_damage_on_the_command_line(checkpoint):
    """Both commands, as processes of their own: one line, exit code 2, no traceback, the file as it was."""
    half = checkpoint[: len(checkpoint) // 2]
    for script, name, flags in (
        ("inference_example.py", "diffusion_model.pth", []),
        ("diffusion_model.py", "training_state.pth", RUN),
    ):
        Path(name).write_bytes(half)
        assert_error(run(script, *flags, cwd="."), name, "damaged")
        assert Path(name).read_bytes() == half and not Path("samples").exists()
    with pytest.raises(FileNotFoundError, match="samples"):
        SimpleDiffusion.load("samples")


def damaged_states(data):
    good = from_bytes(data)
    yield from itertools.islice(
        broken(data, flips=40, seed=1), 0, None, 8
    )  # read as checkpoints are
    yield from hostile(data)
    for field in ("model", "ema"):
        yield from ((name, to_bytes(saved)) for name, saved in wrong_weights(good, field))
    for field in good:
        yield from (
            (f"{field} is {name}", to_bytes({**good, field: value})) for name, value in ODD.items()
        )
    for field in ("epochs", "channel_mults", "more"):
        for name, value in ODD.items():
            yield (
                f"config {field} is {name}",
                to_bytes({**good, "config": {**good["config"], field: value}}),
            )
    for step in (-3, 1, 2, 4, 5, 10**9):
        yield f"step is {step}", to_bytes({**good, "step": step})
    for field in ("losses", "epoch_losses"):
        hold = dict(
            empty=[], nan=[float("nan")], text=["x"], tensor=[torch.zeros(2)], many=[0.5] * 9
        )
        for name, value in hold.items():
            yield f"{field} hold {name}", to_bytes({**good, field: value})
    for which, name in ((0, "momentum_buffer"), (1, "exp_avg")):
        for what, value in dict(
            nan=float("nan"), small=torch.zeros(7), text="x", a_list=[1.0]
        ).items():
            changed = copy.deepcopy(good)
            changed["optimizers"][which]["state"][0][name] = value
            yield f"optimizers hold {what} as {name}", to_bytes(changed)
    for name, value in dict(
        none=[], one=good["optimizers"][:1], three=good["optimizers"] * 2
    ).items():
        yield f"optimizers are {name}", to_bytes({**good, "optimizers": value})


def test_damaged_states(state, capsys):
    """Hundreds of them: one error line that names file or flag, the state as it was; or else the run ends well."""
    path = Path("training_state.pth")

    def check(name, data):
        path.write_bytes(data)
        line = error_of(diffusion_model.main, capsys, *RUN)
        if line is not None:
            assert "training_state.pth" in line or "begun with" in line, line
            assert path.read_bytes() == data
        else:
            assert all(
                tensor.isfinite().all() for tensor in from_bytes(path.read_bytes())["ema"].values()
            )
            refused = ("step is", "losses hold", "epoch_losses hold", "optim", "model ", "ema ")
            assert not name.startswith(refused) or name.endswith("whole_numbers"), "it goes on"

    check_all(damaged_states(state), check, at_least=300)


def half_a_save(error):
    """A torch.save that writes the half, and then fails as torch does where the disk is full."""
    real = torch.save

    def save(saved, path):
        real(saved, path)
        os.truncate(path, 1000)
        raise error

    return save


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
    ],
)
def test_a_save_that_fails_leaves_the_old_file(
    checkpoint, state, tiny_model, monkeypatch, capsys, error
):
    """Checkpoint and state: byte for byte what they were, no temporary file left, an error that names the file."""
    monkeypatch.setattr(torch, "save", half_a_save(error))
    with pytest.raises(OSError, match="good.pth"):
        perturb(tiny_model).save("good.pth")
    assert "diffusion_model.pth could not be written" in error_of(
        diffusion_model.main, capsys, *RUN
    )
    monkeypatch.setattr(support.Report, "export", lambda report: None)  # then it comes to the state
    assert "training_state.pth could not be written" in error_of(diffusion_model.main, capsys, *RUN)
    assert (
        Path("good.pth").read_bytes() == checkpoint
        and Path("training_state.pth").read_bytes() == state
    )
    assert not list(Path().rglob("*.tmp"))


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError(), "--batch-size"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "--batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "--restart"),
        (RuntimeError("CUDA error: out of memory"), "--batch-size"),
        (
            RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
            "--batch-size",
        ),
        (ModuleNotFoundError("No module named 'torchvision'"), "pip install -r requirements.txt"),
    ],
)
def test_what_the_machine_lacks(monkeypatch, capsys, error, words):
    """Too little memory and a missing package end in one line that says what to do."""

    def fail(run):
        raise error

    monkeypatch.setattr(diffusion_model.TrainingRun, "train_step", fail)
    assert words in error_of(diffusion_model.main, capsys, *RUN)


def test_a_bug_shows_where_it_is(monkeypatch):
    """An error that no user can cause is no line but a traceback."""
    monkeypatch.setattr(
        diffusion_model.TrainingRun, "train_step", lambda run: torch.ones(2) @ torch.ones(3)
    )
    with pytest.raises(RuntimeError, match="size"):
        diffusion_model.main(RUN)


def test_a_disk_that_is_full(checkpoint, tiny_model, capsys):
    """Really: the system refuses to let any file grow further."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="good.pth"):
            perturb(tiny_model).save("good.pth")
        line = error_of(diffusion_model.main, capsys, *RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line is not None and "training_state.pth" in line and "written" in line
    assert Path("good.pth").read_bytes() == checkpoint and not list(Path().rglob("*.tmp"))


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_weights_that_half_precision_cannot_hold(tiny_model, checkpoint, value):
    """Are not written: the file could not be loaded again."""
    torch.nn.init.constant_(tiny_model.model.down[0]["entry"].bias, value)
    with pytest.raises(OSError, match="good.pth.*finite"):
        tiny_model.save("good.pth")
    assert Path("good.pth").read_bytes() == checkpoint and not list(Path().glob("*.tmp"))


@pytest.mark.parametrize("value", [np.float64(0.1), np.int64(3), Path("a"), float("inf")])
def test_what_loading_refuses_is_not_written(tiny_model, checkpoint, capsys, value):
    """In `info`, and in the state of an optimiser: not hours later, but at once."""
    with pytest.raises(OSError, match=f"good.pth.*{type(value).__name__}"):
        tiny_model.save("good.pth", loss=value)
    assert Path("good.pth").read_bytes() == checkpoint

    def optimizers(network, lr):
        made = torch.optim.SGD(network.parameters(), lr)
        made.param_groups[0]["note"] = value
        return [made]

    with pytest.raises(OSError, match=f"training_state.pth.*{type(value).__name__}"):
        config = diffusion_model.TrainConfig(
            data="shapes", image_size=4, hidden_channels=2, limit=8
        )
        diffusion_model.train(config, optimizers)
    assert not Path("training_state.pth").exists()


def test_files_are_read_onto_the_cpu_and_without_code(checkpoint, monkeypatch):
    """Whatever device they were written on, and whatever a pickle may ask for."""
    given = []
    real = torch.load
    monkeypatch.setattr(
        torch, "load", lambda path, **options: given.append(options) or real(path, **options)
    )
    SimpleDiffusion.load("good.pth", "cpu")
    diffusion_model.main(RUN)
    diffusion_model.main([*RUN, "--epochs", "2"])  # reads the state
    assert len(given) > 2 and all(
        options == dict(map_location="cpu", weights_only=True) for options in given
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(class_names=["a", "b"]),
        dict(schedule="cosine", prediction="noise"),
        dict(n_steps=50, beta_end=0.01, dropout=0.5, in_channels=1),
    ],
)
def test_round_trip(options):
    """Weights within the rounding of float16, configuration, class names, eval mode; the same pictures afterwards."""
    model = perturb(SimpleDiffusion(8, **TINY, **options))
    model.save("a.pth", note="for humans", number=3)
    loaded = SimpleDiffusion.load("a.pth", "cpu")
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(
            tensor, model.state_dict()[name].half().float()
        )
    assert (
        loaded.model.config == model.model.config
        and loaded.diffusion.config == model.diffusion.config
    )
    assert (loaded.class_names, loaded.image_size) == (model.class_names, 8)
    assert not any(part.training for part in loaded.modules()) and model.training
    loaded.save("b.pth", note="for humans", number=3)
    again = SimpleDiffusion.load("b.pth", "cpu")
    a, b = (each.sample(2, steps=3, seed=1, progress=False) for each in (loaded, again))
    assert torch.equal(a, b)
    assert (a - model.eval().sample(2, steps=3, seed=1, progress=False)).abs().max() < 0.1
    assert from_bytes(Path("a.pth").read_bytes())["info"] == dict(note="for humans", number=3)


def test_readable_without_our_loading(checkpoint, tiny_model):
    """torch.load(weights_only=True) and two constructors, as promised; prefixes of DDP and torch.compile load too."""
    c = torch.load("good.pth", weights_only=True)
    network = SimpleUNet(**c["model_config"])
    network.load_state_dict(c["model_state_dict"])
    x = DiffusionModel(network.eval(), **c["diffusion_config"]).sample(
        (1, 3, 8, 8), steps=2, seed=0, progress=False
    )
    want = SimpleDiffusion.load("good.pth", "cpu").sample(1, steps=2, seed=0, progress=False)
    assert torch.equal((x + 1) / 2, want)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        prefixed = {prefix + name: tensor for name, tensor in c["model_state_dict"].items()}
        torch.save({**c, "model_state_dict": prefixed}, "prefixed.pth")
        drawn = SimpleDiffusion.load("prefixed.pth", "cpu").sample(
            1, steps=2, seed=0, progress=False
        )
        assert torch.equal(drawn, want)
    model = SimpleDiffusion.load("good.pth", "cpu")
    model.diffusion.model = torch.compile(model.network)
    model.save("compiled.pth")
    assert torch.load("compiled.pth")["model_state_dict"].keys() == c["model_state_dict"].keys()


RED, BLUE, WHITE, GREY = (255, 0, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)


def save_pictures(folder):
    """Pictures of every kind: -> {file: the colours of its left and of its right half}."""

    def new(mode, colour, size=(20, 20)):
        return Image.new(mode, size, colour)

    def deep(value):
        return Image.fromarray(np.full((20, 20), value, np.uint16))

    palette, turned, wide = new("P", 1), new("RGB", RED, (40, 20)), new("RGB", WHITE, (2000, 30))
    palette.putpalette([0, 255, 0, *RED])
    turned.paste(
        BLUE, (0, 10, 40, 20)
    )  # red above blue; a quarter to the right it is blue left of red
    wide.paste(RED, (985, 0, 1015, 30))
    orientation = Image.Exif()
    orientation[0x0112] = 6
    half = new("RGBA", (*RED, 255))
    half.paste((*BLUE, 0), (0, 0, 10, 20))
    files = {
        "grey.png": (new("L", 128), GREY),
        "palette.png": (palette, RED),
        "rgba.png": (half, WHITE, RED),
        "transparent palette.png": (palette, WHITE, WHITE, dict(transparency=1)),
        "la.png": (new("LA", (0, 0)), WHITE),
        "cmyk.jpg": (new("CMYK", (0, 255, 255, 0)), RED),
        "white 16 bit.png": (deep(65535), WHITE),
        "grey 16 bit.png": (deep(32896), GREY),
        "nearly black 16 bit.png": (deep(200), (1, 1, 1)),
        "one bit.png": (new("1", 1), WHITE),
        "one pixel.bmp": (new("RGB", BLUE, (1, 1)), BLUE),
        "wide.webp": (wide, RED, RED, dict(lossless=True)),
        "TURNED.JPEG": (turned, BLUE, RED, dict(exif=orientation)),
        "moving.GIF": (
            new("RGB", RED),
            RED,
            RED,
            dict(save_all=True, append_images=[new("RGB", BLUE)]),
        ),
        "a name, with spaces (1).PNG": (new("RGB", BLUE), BLUE),
        "deep/er/blue.tiff": (new("RGB", BLUE), BLUE),
    }
    expected = {}
    for name, (picture, left, *more) in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        options = more[1] if len(more) > 1 else {}
        picture.save(
            path,
            **(
                dict(quality=95, subsampling=0) | options
                if "jp" in path.suffix.lower()
                else options
            ),
        )
        expected[path] = left, more[0] if more else left
    return expected


def test_pictures_of_every_kind():
    """Upright, RGB, white where transparent, resized, cropped to the centre; pictures beside folders: no classes."""
    expected = save_pictures("pictures")
    Path("pictures/notes.txt").write_text("no picture")
    Path("pictures/.hidden.png").write_text("no picture")
    Path("pictures/.checkpoints").mkdir()
    Path("pictures/.checkpoints/old.png").write_text("no picture")
    images, labels, class_names = load_images("pictures", 16)
    assert images.shape == (len(expected), 3, 16, 16) and images.dtype == torch.uint8
    assert labels is None and class_names is None
    for path, image in zip(sorted(expected), images):
        for half, colour in zip((image[:, 4:12, 2:5], image[:, 4:12, 11:14]), expected[path]):
            difference = (half.float() - torch.tensor(colour)[:, None, None]).abs().max()
            assert difference <= (40 if "TURNED" in path.name else 3), (
                f"{path}: {half.float().mean(dim=(1, 2))}"
            )


def test_folders_are_classes():
    """The immediate subfolders, sorted; limit takes the first pictures; such a folder trains."""
    for name, colour in (("cat/a/1.png", RED), ("cat/2.png", RED), ("bird/1.png", BLUE)):
        Path("data", name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), colour).save(Path("data", name))
    images, labels, class_names = load_images("data", 8)
    assert (
        class_names == ["bird", "cat"]
        and labels.tolist() == [0, 1, 1]
        and labels.dtype == torch.int64
    )
    assert images[:, :, 4, 4].tolist() == [[0, 0, 255], [255, 0, 0], [255, 0, 0]]
    assert len(load_images("data", 8, limit=2)[0]) == 2
    diffusion_model.main([*RUN, "--data", "data"])
    assert SimpleDiffusion.load(device="cpu").class_names == ["bird", "cat"]


def test_photographs():
    """A JPEG of many pixels is decoded in part only, to nearly the same picture; and a folder of one trains."""
    Path("photos").mkdir()
    x, y = np.meshgrid(np.arange(3000), np.arange(2000))
    photo = Image.fromarray(
        np.stack([x / 12, y / 8, 127 + 100 * np.sin(x / 200)], axis=2).astype(np.uint8)
    )
    photo.save("photos/1.jpg", quality=95)
    image = load_images("photos", 16)[0][0]
    wanted = np.asarray(ImageOps.fit(photo, (16, 16))).transpose(2, 0, 1)
    assert np.abs(image.numpy().astype(int) - wanted).max() <= 3
    assert support.open_picture("photos/1.jpg", 16).size == (375, 250)
    diffusion_model.main([*RUN, "--data", "photos"])
    assert SimpleDiffusion.load(device="cpu").class_names is None


@pytest.mark.parametrize("content", [b"", b"no picture", "half"])
def test_corrupt_pictures(content, capsys):
    """Also one that is cut off: it is named and skipped, for one of thousands must not end a run. Where most are so,
    something is wrong with all of them: an error."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("a/fine.jpg", "b/broken one.jpg", "c/broken two.jpg"):
        Path("data", name).parent.mkdir(parents=True)
        Image.fromarray(noise).save(Path("data", name))
    whole = Path("data/b/broken one.jpg").read_bytes()
    Path("data/b/broken one.jpg").write_bytes(
        whole[: len(whole) // 2] if content == "half" else content
    )
    images, labels, class_names = load_images("data", 8)
    (line,) = capsys.readouterr().err.splitlines()
    assert "broken one.jpg" in line and "skipped" in line
    assert len(images) == 2 and labels.tolist() == [0, 1] and class_names == ["a", "c"]
    Path("data/c/broken two.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="2 of 3 pictures.*broken one.jpg"):
        load_images("data", 8)


def test_many_corrupt_pictures(capsys, monkeypatch):
    """Nine are named, the others counted; of several processes the first says so."""
    Path("data").mkdir()
    for i in range(26):
        if i % 2:
            Image.new("RGB", (8, 8)).save(f"data/{i:02d}.png")
        else:
            Path(f"data/{i:02d}.png").write_bytes(b"")
    assert len(load_images("data", 8)[0]) == 13
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and "16.png" in lines[8] and lines[9] == "skipped: 4 more"
    monkeypatch.setenv("RANK", "1")
    load_images("data", 8)
    assert capsys.readouterr().err == ""


def test_a_download_that_broke_off(monkeypatch):
    """What is there of the archive stays, for curl to go on with: torchvision would begin again."""
    monkeypatch.setattr(
        urllib.request, "urlopen", lambda *args, **options: pytest.fail("it downloads")
    )
    Path("data").mkdir()
    Path("data/cifar-10-python.tar.gz").write_bytes(b"half")
    with pytest.raises(ValueError, match="incomplete.*curl -C - "):
        load_images("cifar10")
    assert Path("data/cifar-10-python.tar.gz").read_bytes() == b"half"


def test_data_that_is_not_there(capsys, monkeypatch):
    """An empty or missing folder, a file, half of CIFAR-10, no network: each says what to do."""

    def offline(*args, **options):
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    Path("empty").mkdir()
    Path("file").write_text("")
    Path("half/cifar-10-batches-py").mkdir(parents=True)
    Path("half/cifar-10-batches-py/data_batch_1").write_bytes(bytes(1000))
    for folder in ("data", "fetched"):  # an archive that was fetched by hand, but not to its end
        Path(folder).mkdir()
        Path(folder, "cifar-10-python.tar.gz").write_bytes(bytes(1000))
    for data, *words in (
        ("empty", "empty", ".png"),
        ("nowhere", "nowhere", "shapes"),
        ("file", "file", "folder"),
        ("half", "cifar-10-python.tar.gz", str(Path("half").resolve())),
        ("fetched", "cifar-10-python.tar.gz", "curl -C -"),
        ("cifar10", "--data shapes", "cifar-10-python.tar.gz", str(Path("data").resolve())),
    ):
        line = error_of(diffusion_model.main, capsys, *RUN, "--data", data)
        assert line is not None and all(word in line for word in words), line
    assert not Path("training_state.pth").exists()


def test_cifar10(monkeypatch, capsys):
    """Pixels (N, 32, 32, 3) become (N, 3, 32, 32); limit takes the first; other sizes are resized.

    What a slow download can be replaced by is said before it begins, and only then.
    """

    class Fake:
        classes, url = ["airplane", "automobile"], "https://example.org"

        def __init__(self, root, train, download):
            assert Path(root).name == "data" and train and download
            self.data = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
            self.targets = [1, 0, 1, 0, 1]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    images, labels, class_names = load_images("cifar10", limit=3)
    assert (
        images.dtype == torch.uint8 and labels.tolist() == [1, 0, 1] and class_names == Fake.classes
    )
    assert np.array_equal(images.permute(0, 2, 3, 1), Fake("data", True, True).data[:3])
    assert "curl -C -" in capsys.readouterr().out
    Path("data/cifar-10-batches-py").mkdir(parents=True)
    small = load_images("cifar10", 16, limit=3)[0]
    assert (
        small.shape == (3, 3, 16, 16) and (small.float().mean() - images.float().mean()).abs() < 1
    )
    assert capsys.readouterr().out == ""


def test_the_real_cifar10():
    """Where it is there: the first picture is a frog."""
    folder = next(
        (
            folder
            for folder in (ROOT / "data", ROOT.parent / "shared" / "data")
            if (folder / "cifar-10-batches-py").is_dir()
        ),
        None,
    )
    if folder is None:
        pytest.skip("there is no CIFAR-10 here")
    images, labels, class_names = load_images(folder, limit=100)
    assert (
        images.shape == (100, 3, 32, 32) and images.dtype == torch.uint8 and labels.shape == (100,)
    )
    assert class_names[labels[0]] == "frog" and images[0, :, 0, 0].tolist() == [59, 62, 63]


def test_shapes():
    """The same for a seed, ten classes, any size; what is drawn differs from class to class."""
    images, labels, class_names = load_images("shapes", 12, 500)
    assert (
        images.shape == (500, 3, 12, 12)
        and images.dtype == torch.uint8
        and labels.dtype == torch.int64
    )
    assert len(class_names) == 10 and sorted(set(labels.tolist())) == list(range(10))
    again = load_images("shapes", 12, 500)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(images, support.draw_shapes(12, 500, seed=1)[0])
    assert len(images.flatten(1).unique(dim=0)) == 500
    assert (
        images.flatten(1).max(dim=1).values.int() - images.flatten(1).min(dim=1).values > 50
    ).all()
