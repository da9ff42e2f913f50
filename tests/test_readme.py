"""The commands and snippets of the README and the docstrings, with numbers for a test."""

import inspect
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, TINY, perturb, pictures
from PIL import Image

import diffusion_model as dm
import inference_example

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
# In the docstrings a command is followed by two spaces or more and what it does.
DOCUMENTED = [
    re.split(" {2,}", line.strip())[0]
    for script in (dm, inference_example)
    for line in script.__doc__.splitlines()
    if line.startswith("    python ")
]
SNIPPETS = [block for kind, block in BLOCKS if kind == "python"]
# Added to each command. Of a flag that is given twice, the last one counts.
SMALL_RUN = "--image-size 16 --limit 24 --epochs 1 --images 24 --batch-size 8"
SMALL_NETWORK = "--hidden-channels 4 --num-res-blocks 1"


@pytest.fixture
def workplace(here):
    """A folder with a tiny checkpoint of CIFAR-10's classes, and the files of the commands."""
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    perturb(dm.SimpleDiffusion(16, class_names=names, **TINY)).save()
    perturb(dm.SimpleDiffusion(16, class_names=dm.SHAPES, **TINY)).save(
        "my_shapes/diffusion_model.pth"
    )
    pictures("FOLDER", ["a", "b"])
    Image.new("RGB", (16, 16), "white").save("FILE.png")
    Path("FILE").write_bytes(Path("FILE.png").read_bytes())
    Path("samples").mkdir()
    for name in ("drawing", "car", "mask"):
        shutil.copy(ROOT / "samples" / f"{name}.png", "samples")
    return here


@pytest.mark.parametrize("lines", [COMMANDS, DOCUMENTED], ids=["README", "docstrings"])
def test_commands(workplace, lines):
    """Each `python SCRIPT FLAGS` runs as it stands, but for smaller numbers."""
    assert len(lines) > 8
    for line in lines:
        words = shlex.split(line)
        if words[:2] == ["python", "diffusion_model.py"]:
            small = SMALL_RUN.split() + ([] if "--data" in words else ["--data", "shapes"])
            small += [] if "--init" in words else SMALL_NETWORK.split()
            small += [] if "--out" in words else ["--out", f"run{len(line)}"]
            dm.main(words[2:] + small)
        elif words[:2] == ["python", "inference_example.py"]:
            out = dict(zip(words, words[1:])).get("--out", "samples/generated.png")
            Path(out).unlink(missing_ok=True)
            inference_example.main(words[2:] + ["-n", "2", "--steps", "2"])
            assert Path(out).is_file() or "--save-each" in words


def test_other_commands_are_known():
    """What is no command of ours is one of these. .ci/run calls all but uv."""
    ours = ("python diffusion_model.py", "python inference_example.py")
    others = [line for line in COMMANDS if not line.startswith(ours)]
    known = ("pip install", "python -m pytest", "uv run")
    assert all(any(each in line for each in known) for line in others), others
    assert "python -m pytest" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets(workplace, monkeypatch, number):
    """Each Python snippet runs by itself, with small networks and short runs."""
    config = dm.TrainConfig
    small = dict(epochs=1, limit=24, hidden_channels=4, batch_size=8)
    monkeypatch.setattr(dm, "TrainConfig", lambda **options: config(**{**options, **small}))
    monkeypatch.setattr(dm, "make_optimizers", dm.make_optimizers)  # put back what a snippet sets
    exec(SNIPPETS[number], {})


def test_algorithm_2_is_quoted_as_it_stands():
    """The README shows the code of the file, but for the docstring and the indentation."""
    quoted = next(block for block in SNIPPETS if "def algorithm_2" in block)
    source = inspect.getsource(dm.DiffusionModel.algorithm_2)
    source = re.sub(r'""".*?"""', "", source, flags=re.DOTALL).replace("@torch.no_grad()", "")
    assert quoted.split() == source.split()


def test_every_picture_is_there_and_shown():
    """The README and the script name all pictures of samples/, and none that is missing."""
    shown = set(re.findall(r"samples/(\w+\.\w+)", README + inference_example.__doc__))
    kept = {path.name for path in (ROOT / "samples").iterdir()}
    written = {"generated.png", "data.png", "loss.png"}  # what the commands make
    assert kept - written <= shown, kept - written - shown
    assert shown - written <= kept, shown - written - kept
