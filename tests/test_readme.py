"""The commands and snippets of the README and of the docstrings themselves, with numbers small enough for a test."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import ROOT, TINY, perturb
import diffusion_model
import inference_example

BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
# In the docstrings a command is followed by three spaces or more and what it does.
DOCUMENTED = [
    line.strip().split("   ")[0]
    for script in (diffusion_model, inference_example)
    for line in script.__doc__.splitlines()
    if line.startswith("    python ")
]
SNIPPETS = [block for kind, block in BLOCKS if kind == "python"]
# Added to each command: of a flag given twice, the last counts.
SMALL_RUN = "--image-size 16 --limit 24 --epochs 1 --images 24 --batch-size 8"
SMALL_NETWORK = "--hidden-channels 4 --num-res-blocks 1"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a tiny checkpoint of CIFAR-10's classes, the pictures that commands start from, and a FOLDER."""
    monkeypatch.chdir(tmp_path)
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    perturb(diffusion_model.SimpleDiffusion(16, class_names=names, **TINY)).save()
    for name in ("a", "b"):
        (tmp_path / "FOLDER" / name).mkdir(parents=True)
        Image.new("RGB", (20, 30), "red").save(tmp_path / "FOLDER" / name / "1.png")
    (tmp_path / "samples").mkdir()
    for name in ("drawing", "car", "mask"):
        shutil.copy(ROOT / "samples" / f"{name}.png", tmp_path / "samples")
    return tmp_path


def test_the_readme_has_commands():
    assert len(COMMANDS) > 10 and len(SNIPPETS) >= 2


def test_it_counts_its_lines():
    lines = (ROOT / "diffusion_model.py").read_text().count("\n")
    readme = (ROOT / "README.md").read_text()
    assert f"`diffusion_model.py` has {lines:,} lines" in readme and lines <= 950
    code = (ROOT / "diffusion_model.py").read_text().splitlines()
    for part in range(1, 5):  # the map of the code
        (line,) = (i for i, text in enumerate(code, start=1) if text.startswith(f"# {part}. "))
        assert re.search(rf"^\| part.*\b{line}\b", readme, re.MULTILINE), (part, line)


def test_what_to_do_when_the_loss_is_not_finite():
    (line,) = (
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if "loss is not finite" in line
    )
    assert "the same command with a lower `--lr`" in line


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 110


def test_the_file_stays_readable():
    """The bounds of the design: lines of up to 119 columns, functions of up to 50 lines."""
    for script in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")):
        source = script.read_text()
        assert max(map(len, source.splitlines())) <= 119
        for part in ast.walk(ast.parse(source)):
            assert not isinstance(part, ast.FunctionDef) or part.end_lineno - part.lineno < 50, (
                part.name
            )


@pytest.mark.parametrize("lines", [COMMANDS, DOCUMENTED], ids=["README", "docstrings"])
def test_commands(workplace, lines):
    """Each `python SCRIPT FLAGS` runs as it stands, but for smaller numbers."""
    assert len(lines) > 8
    Image.new("RGB", (16, 16), "white").save("FILE.png")
    for line in lines:
        line = line.replace("FILE ", "FILE.png ") + (".png" if line.endswith("FILE") else "")
        words = shlex.split(line)
        if words[:2] == ["python", "diffusion_model.py"]:
            small = SMALL_RUN.split() + ([] if "--data" in words else ["--data", "shapes"])
            small += [] if "--init" in words else SMALL_NETWORK.split()
            small += [] if "--out" in words else ["--out", f"run{len(line)}"]
            diffusion_model.main(words[2:] + small)
        elif words[:2] == ["python", "inference_example.py"]:
            out = Path(
                words[words.index("--out") + 1] if "--out" in words else "samples/generated.png"
            )
            out.unlink(missing_ok=True)
            inference_example.main(words[2:] + ["-n", "2", "--steps", "2"])
            assert out.is_file()


def test_other_commands_are_known():
    """Whatever is no command of ours is one of these, which other tests and .ci/run run."""
    ours = ("python diffusion_model.py", "python inference_example.py")
    others = [line for line in COMMANDS if not line.startswith(ours)]
    assert all(
        "pip install" in line or "torchrun" in line or "python -m pytest" in line for line in others
    ), others
    assert "python -m pytest" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets(workplace, monkeypatch, number):
    """Each Python snippet runs; networks and runs are made small."""
    real = diffusion_model.TrainConfig
    monkeypatch.setattr(
        diffusion_model,
        "TrainConfig",
        lambda **options: real(
            **{**options, "epochs": 1, "limit": 24, "hidden_channels": 4, "batch_size": 8}
        ),
    )
    monkeypatch.setattr(diffusion_model, "SAMPLERS", dict(diffusion_model.SAMPLERS))
    exec(SNIPPETS[number], {})


OF_ONES_OWN = """
import sys
for name in ("torchvision", "numpy", "matplotlib", "tqdm", "PIL"):
    sys.modules[name] = None                                 # as if it were not installed
import torch
from mine import DiffusionModel, SimpleDiffusion, SimpleUNet

process = DiffusionModel(SimpleUNet(hidden_channels=8, num_classes=2), n_steps=50)
process(torch.zeros(2, 3, 8, 8), y=torch.tensor([0, 1])).backward()
model = SimpleDiffusion(8, hidden_channels=8, class_names=["cat", "ship"])
model.save("mine.pth")
images = SimpleDiffusion.load("mine.pth").sample(2, y=[0, 1], guidance=2.0, steps=3, seed=0)
assert images.shape == (2, 3, 8, 8) and 0 <= images.min() <= images.max() <= 1
print("drawn")
"""


def test_import_needs_torch_alone_and_does_nothing(tmp_path):
    """The whole file: no other package, nothing printed, no file, no random number drawn."""
    blocked = OF_ONES_OWN.split("import torch\n")[0]
    code = (
        f"{blocked}import torch\nstate = torch.get_rng_state()\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"import diffusion_model\nassert torch.equal(state, torch.get_rng_state())"
    )
    used = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert used.returncode == 0 and used.stdout == "" and not list(tmp_path.iterdir()), used.stderr
    code = (
        code.replace("import diff", "del torch.optim.Muon\nimport diff")
        + "\ndiffusion_model.main()"
    )
    used = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert used.returncode == 2 and "torch 2.9" in used.stderr and "Traceback" not in used.stderr


def test_parts_0_to_3_in_a_project_of_ones_own(tmp_path):
    """Copied out of the file into an empty folder, they train, save, load and draw with torch alone."""
    parts = (ROOT / "diffusion_model.py").read_text().split("\n# 4. ")[0]
    before, rest = parts.split("\n# The imports that follow are for part 4 only.\n")
    (tmp_path / "mine.py").write_text(before + rest[rest.index("# ---") :])
    shutil.copy(
        ROOT / "diffusion_model.py", tmp_path / "whole.py"
    )  # so does the whole file without support.py
    for module, then, code in (("mine", "", 0), ("whole", "import whole\nwhole.main([])", 2)):
        (tmp_path / "use.py").write_text(OF_ONES_OWN.replace("from mine", f"from {module}") + then)
        used = subprocess.run(
            [sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True
        )
        assert used.stdout == "drawn\n" and used.returncode == code, used.stderr
    assert "support.py beside" in used.stderr and "Traceback" not in used.stderr
