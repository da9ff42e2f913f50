"""SimpleDiffusion and its file: what it draws, writes and refuses to read, and where it runs."""

import builtins
import contextlib
import dis
import errno
import json
import os
import pickle
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, perturb, same, spy, to_bytes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffusion_model as dm
from diffusion_model import DiffusionModel, SimpleDiffusion, SimpleUNet

pytestmark = pytest.mark.usefixtures("here")
OPTIONS = dict(seed=0, steps=3, progress=False)


def draw(model, count=2, **options):
    return model.sample(count, **{**OPTIONS, **options})


def rounded(model):
    """Its weights as a file holds them."""
    return {name: tensor.half().float() for name, tensor in model.state_dict().items()}


@pytest.fixture
def good(tiny_model):
    """What a sound file holds, as a dict. The file itself is good.pth."""
    tiny_model.save("good.pth")
    return torch.load("good.pth", weights_only=True)


# ---- What it draws


@pytest.mark.parametrize("sampler", dm.DEFAULT_STEPS)
def test_images_are_in_0_to_1(tiny_model, sampler):
    """A network with huge weights asks for pixels far outside. They become exactly 0 and 1."""
    torch.nn.init.normal_(tiny_model.network.up[-1]["exit"][-1].weight, std=100)
    images = draw(tiny_model, 3, sampler=sampler)
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.float32
    assert images.min() == 0 and images.max() == 1


def test_names_of_classes(tiny_model):
    """Names in any case stand for labels, also mixed with them. Unknown ones are refused."""
    wanted = draw(tiny_model, 3, y=[2, 0, 1])
    assert torch.equal(draw(tiny_model, 3, y=["C", "a", 1]), wanted)
    assert torch.equal(draw(tiny_model, 3, y=("c", "A", "B")), wanted)
    assert not torch.equal(draw(tiny_model, 3), wanted)
    with pytest.raises(ValueError, match="'dog'.* a, b, c"):
        draw(tiny_model, 1, y=["dog"])
    with pytest.raises(ValueError, match="'a'.*none"):
        draw(SimpleDiffusion(8, **TINY), 1, y=["a"])


# ---- The file


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(class_names=["a", "b"], t_distribution="uniform"),
        dict(num_classes=4, schedule="cosine", prediction="noise"),
        dict(n_steps=50, beta_start=0.001, beta_end=0.01, dropout=0.5, in_channels=1),
    ],
)
def test_round_trip(options):
    """A loaded model is the saved one with its weights rounded to float16, in eval mode. Saved once
    more it does not change any further."""
    model = perturb(SimpleDiffusion(8, **TINY, **options))
    model.save("a.pth")
    loaded = SimpleDiffusion.load("a.pth", "cpu")
    assert same(dict(loaded.state_dict()), rounded(model))
    assert loaded.network.config == model.network.config
    assert loaded.diffusion.config == model.diffusion.config
    assert (loaded.class_names, loaded.image_size) == (model.class_names, 8)
    assert model.training and not any(part.training for part in loaded.modules())
    assert all(p.requires_grad for p in loaded.parameters())
    loaded.save("b.pth")
    assert same(*(torch.load(name, weights_only=True) for name in ("a.pth", "b.pth")))


def test_layout_of_the_file(tiny_model):
    """A plain dict of six entries, from which two constructors rebuild the model without ours."""
    tiny_model.save("a.pth", note="for humans", final_loss=0.5)
    saved = torch.load("a.pth", weights_only=True)
    weights = saved["model_state_dict"]
    network = SimpleUNet(**saved["model_config"])
    assert weights.keys() == network.state_dict().keys()
    assert all(tensor.dtype == torch.float16 for tensor in weights.values())
    network.load_state_dict(weights)
    process = DiffusionModel(network.eval(), **saved["diffusion_config"])
    images = process.sample((2, 3, 8, 8), **OPTIONS)
    assert torch.equal((images + 1) / 2, draw(SimpleDiffusion.load("a.pth", "cpu")))
    for part in ("model_config", "diffusion_config"):
        assert json.loads(json.dumps(saved.pop(part)))  # nothing but numbers, strings and lists
    del saved["model_state_dict"]
    info = dict(note="for humans", final_loss=0.5)
    assert saved == dict(image_size=8, class_names=["a", "b", "c"], info=info)


def test_a_compiled_network_is_saved_under_the_same_names(tiny_model, good):
    """No key carries the prefix that torch.compile adds."""
    tiny_model.diffusion.model = torch.compile(tiny_model.network)
    tiny_model.save("compiled.pth")
    assert same(torch.load("compiled.pth", weights_only=True), good)


@pytest.mark.parametrize("value", [np.float64(0.1), np.int64(3), Path("a")])
def test_what_is_written_can_be_read(tiny_model, good, value):
    """Where info holds what weights_only=True would refuse, save makes it plain or refuses it."""
    with contextlib.suppress(ValueError, TypeError):
        tiny_model.save("good.pth", note=value)
    loaded = SimpleDiffusion.load("good.pth", "cpu")
    assert same(dict(loaded.state_dict()), rounded(tiny_model))


def test_where_the_file_is(tiny_model, monkeypatch):
    """By default diffusion_model.pth, which is also found in a folder. ~ is the user's own folder,
    and folders that are missing are made. What is not there is an OSError."""
    monkeypatch.setenv("HOME", str(Path("home").resolve()))
    for written, *read in (
        ("deep/er/diffusion_model.pth", "deep/er", Path("deep/er")),
        ("home/b.pth", "~/b.pth"),
        ("~/c.pth", "home/c.pth"),
    ):
        tiny_model.save(written)
        for path in read:
            assert SimpleDiffusion.load(path, "cpu").class_names == ["a", "b", "c"]
    for path in (None, "nowhere.pth", "home"):
        with pytest.raises(OSError):
            SimpleDiffusion.load(**(dict(path=path) if path else {}), device="cpu")
    tiny_model.save()
    assert SimpleDiffusion.load(device="cpu").image_size == 8


# ---- Damaged and hostile files


def outcome(data, tiny_model):
    """Load these bytes: -> "refused", "loaded", or what is wrong with how that went."""
    Path("damaged.pth").write_bytes(data)
    try:
        model = SimpleDiffusion.load("damaged.pth", "cpu")
    except ValueError as error:
        return "refused" if "damaged.pth" in str(error) and "\n" not in str(error) else str(error)
    except Exception as error:
        return f"{type(error).__name__} {error}"
    alike = same(dict(model.state_dict()), rounded(tiny_model))
    return "loaded" if alike else "loaded, but other weights"


def test_a_file_that_is_cut_off(tiny_model, good):
    """Wherever it ends too early, it is refused by a ValueError that names it."""
    data = Path("good.pth").read_bytes()
    sizes = {*range(0, 64, 7), *range(64, len(data), len(data) // 50), *range(-200, 0, 3)}
    outcomes = {size: outcome(data[:size], tiny_model) for size in sizes}
    assert set(outcomes.values()) == {"refused"}, outcomes


@pytest.mark.filterwarnings("ignore::UserWarning")  # zipfile and torch comment on some
def test_a_file_with_a_flipped_bit(tiny_model, good):
    """It is refused, or the bit belongs to what nobody reads (such as the date of an entry) and the
    weights are the same. Each byte is tried of what zip says of its first entry and of the whole,
    and of the rest one in each of 150 pieces."""
    data = Path("good.pth").read_bytes()
    directory = data.index(b"PK\1\2")
    places = [*range(40), *range(directory, directory + 70), *range(len(data) - 98, len(data))]
    places += range(40, len(data), len(data) // 150)
    outcomes = {}
    for number, place in enumerate(places):
        damaged = bytearray(data)
        damaged[place] ^= 1 << number % 8
        outcomes[place] = outcome(bytes(damaged), tiny_model)
    wrong = {key: value for key, value in outcomes.items() if value not in ("refused", "loaded")}
    assert not wrong
    assert list(outcomes.values()).count("refused") > 200


class Code:
    """What a pickle may do: call anything."""

    def __reduce__(self):
        return Path.touch, (Path("code_was_run"),)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_of_another_make(tiny_model, good):
    """Whatever a file holds in place of a model, it is refused, and no code in it is run."""
    weights = good["model_state_dict"]
    name, tensor = next(iter(weights.items()))
    others = [{**weights, name: value} for value in ("x", tensor[:1], tensor[None], tensor.long())]
    others += [{**weights, "more": tensor}, dict(list(weights.items())[1:])]
    changes = [("class_names", 3), ("class_names", ["a"])]
    changes += [("model_state_dict", other) for other in others]
    for part in ("model_config", "diffusion_config"):
        config = good[part]
        changes += [(part, value) for value in (None, 3, [], {**config, "more": 1})]
        for key in config.keys() - {"num_classes"}:  # which follows from the names of the classes
            changes += [(part, {**config, key: value}) for value in ("x", -3)]
    contents = [None, torch.ones(2), weights, *({**good, key: value} for key, value in changes)]
    for key in good.keys() - {"info"}:
        contents.append({other: good[other] for other in good if other != key})
    files = [b"", b"\x89PNG\r\n\x1a\n" + bytes(500), pickle.dumps(Code())]
    files.append(to_bytes(Code(), _use_new_zipfile_serialization=False))
    files.append(to_bytes({**good, "info": Code()}))
    for data in files:
        assert outcome(data, tiny_model) == "refused", data[:200]
    for content in contents:
        assert outcome(to_bytes(content), tiny_model) == "refused", content
    assert not Path("code_was_run").exists()


class LargestTensor(TorchDispatchMode):
    """Notes the size in bytes of the largest tensor that is computed and takes memory."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.device.type != "meta":
                self.size = max(self.size, each.nbytes)
        return result


@pytest.mark.parametrize(
    "name, value",
    [
        ("hidden_channels", 640),
        ("hidden_channels", 10**7),
        ("channel_mults", [100, 100]),
        ("time_dim", 10**5),
        ("num_classes", 10**12),
        ("n_steps", 10**6),
    ],
)
def test_a_file_that_claims_a_huge_size(good, name, value):
    """It is refused before anything of that size is allocated. The file's own largest tensor has
    some kilobytes, and the smallest of these claims is one of 8 MB."""
    part = "diffusion_config" if name == "n_steps" else "model_config"
    good["class_names"] = None if name == "num_classes" else good["class_names"]
    torch.save({**good, part: {**good[part], name: value}}, "huge.pth")
    with LargestTensor() as largest, pytest.raises(ValueError, match="huge.pth"):
        SimpleDiffusion.load("huge.pth", "cpu")
    assert largest.size < 2e6


# ---- How files are written


@pytest.mark.parametrize("contents", [b"old", {"old": torch.ones(3)}])
def test_two_writers_on_one_path(monkeypatch, contents):
    """Both have written all when either comes to replace the file. Both succeed, and the file is
    that of one of them, whole."""
    barrier = threading.Barrier(2, timeout=20)
    spy(monkeypatch.setattr, os, "replace", lambda *_: barrier.wait())
    both = [contents, b"new" * 10_000]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(dm.write, both, ["a", "a"]))  # which raises what either of them raises
    whole = [each if isinstance(each, bytes) else to_bytes(each) for each in both]
    assert Path("a").read_bytes() in whole and os.listdir() == ["a"]


@pytest.mark.parametrize("failures", [3, 1000])
def test_a_file_that_is_held_open_for_a_moment(monkeypatch, failures):
    """As by a virus scanner on Windows. Some attempts later the new file is there. Where none
    succeeds, that is an error, and the old file stays."""
    Path("a").write_text("old")
    attempts = []

    def held(*_):
        attempts.append(None)
        if len(attempts) <= failures:
            raise PermissionError(errno.EACCES, "it is used by another process")

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    spy(monkeypatch.setattr, os, "replace", held)
    if failures == 3:
        dm.write(b"new", "a")
    else:
        with pytest.raises(PermissionError):
            dm.write(b"new", "a")
        assert len(attempts) < 100
    assert Path("a").read_text() == ("new" if failures == 3 else "old") and os.listdir() == ["a"]


def test_a_disk_that_is_full(tiny_model, good):
    """The system lets no file grow beyond 5 kB. The old file stays, and nothing lies beside it."""
    resource = pytest.importorskip("resource")
    before, limits = Path("good.pth").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert len(before) > 5_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises(OSError):
            perturb(tiny_model).save("good.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path("good.pth").read_bytes() == before and os.listdir() == ["good.pth"]


def test_a_written_file_is_an_ordinary_one(monkeypatch):
    """Its permissions are those that the umask leaves of 666, not a temporary file's 600. All of it
    is on the disk when it gets its name."""
    on_disk, named = [], []
    spy(monkeypatch.setattr, os, "fsync", lambda file: on_disk.append(os.fstat(file).st_size))
    spy(monkeypatch.setattr, os, "replace", lambda old, new: named.append(list(on_disk)))
    before = os.umask(0o027)
    try:
        dm.write(b"text", "a")
    finally:
        os.umask(before)
    assert os.stat("a").st_mode & 0o777 == 0o640
    assert named == [[len("text")]]


# ---- Where it runs


@pytest.fixture
def only_torch(monkeypatch):
    """From now on nothing of these can be imported."""
    for name in ("torchvision", "matplotlib", "PIL", "tqdm", "numpy"):
        for module in [name, *(each for each in sys.modules if each.startswith(name + "."))]:
            monkeypatch.setitem(sys.modules, module, None)


def executed(source):
    module = types.ModuleType("alone")
    sys.modules["alone"] = module
    try:
        exec(compile(source, "alone.py", "exec"), module.__dict__)
    finally:
        del sys.modules["alone"]
    return module


def test_import_needs_torch_alone(only_torch, capfd):
    """It imports nothing else but what comes with Python, writes no file and prints nothing."""
    source = (ROOT / "diffusion_model.py").read_text()
    executed(source)
    assert capfd.readouterr() == ("", "") and not os.listdir()
    outermost = dis.get_instructions(compile(source, "", "exec"))  # not what functions import
    names = {each.argval.partition(".")[0] for each in outermost if each.opname == "IMPORT_NAME"}
    assert "torch" in names and names <= {"torch", *sys.stdlib_module_names}


def test_sections_1_to_3_lift_out(only_torch, good):
    """All that stands above section 4 needs torch alone, to train, to draw, to save and to load.
    No function in it asks for a name that stands further below."""
    source = (ROOT / "diffusion_model.py").read_text().partition("# 4. The data")[0]
    alone = executed(source)
    model = alone.SimpleDiffusion.load("good.pth", "cpu")
    assert torch.equal(draw(model), draw(SimpleDiffusion.load("good.pth", "cpu")))
    model(torch.zeros(2, 3, 8, 8), torch.tensor([0, 3])).backward()
    assert draw(model, y=["A", "b"], guidance=2.0, progress=True).isfinite().all()
    model.save("again.pth", **good["info"])
    assert same(torch.load("again.pth", weights_only=True), good)
    waiting = [compile(source, "alone.py", "exec")]
    while waiting:
        code = waiting.pop()
        waiting += [each for each in code.co_consts if isinstance(each, types.CodeType)]
        asked = [each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"]
        missing = [name for name in asked if not hasattr(alone, name) and name not in dir(builtins)]
        assert not missing, (code.co_name, missing)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there(name):
    """It is a ValueError that names the device, also when a model is loaded to it."""
    SimpleDiffusion(8, **TINY).save("a.pth")
    for function in (dm.pick_device, lambda name: SimpleDiffusion.load("a.pth", name)):
        with pytest.raises(ValueError, match=f"device {name}"):
            function(name)


def test_bfloat16_on_a_gpu(monkeypatch):
    """It is used from capability 8.0 on, and of several GPUs each has its own capability."""
    capabilities = {"cuda": (7, 5), "cuda:0": (7, 5), "cuda:1": (8, 0), "cuda:2": (9, 0)}
    answer = lambda device="cuda": capabilities[str(device)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", answer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    for name in (*capabilities, "mps"):
        fast = isinstance(dm.autocast(torch.device(name)), torch.autocast)
        assert fast == (name in ("cuda:1", "cuda:2")), name


@pytest.mark.parametrize("found", ["amx_bf16", "avx512_bf16", "avx512_f"])
def test_bfloat16_on_a_cpu(monkeypatch, found):
    """It is used where the CPU multiplies it natively, by AMX or AVX512-BF16, and nowhere else."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {found: True}, raising=False)
    with dm.autocast(torch.device("cpu")):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if found.endswith("bf16") else torch.float32)
