"""The released weights are what model_info.json and the README say, and draw without a flag."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
import inference_example
from diffusion_model import SimpleDiffusion

WEIGHTS = ROOT / "diffusion_model.pth"
INFO = json.loads((ROOT / "model_info.json").read_text())
pytestmark = pytest.mark.skipif(
    "evaluation" not in INFO, reason="these weights are those of a run of your own"
)
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()


def test_model_info_is_about_these_weights():
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == INFO["sha256"]
    assert WEIGHTS.stat().st_size < 40e6
    saved = torch.load(WEIGHTS, weights_only=True)
    assert {tensor.dtype for tensor in saved["model_state_dict"].values()} == {torch.float16}
    assert (
        sum(tensor.numel() for tensor in saved["model_state_dict"].values()) == INFO["parameters"]
    )
    assert saved["class_names"] == CIFAR10 and saved["image_size"] == 32
    for name, value in saved["info"].items():
        assert INFO[name] == value, name


def test_the_readme_quotes_model_info():
    readme, measured = (
        (ROOT / "README.md").read_text(),
        (ROOT / "tests" / "MEASURED.md").read_text(),
    )
    quality = INFO["evaluation"]
    assert f"{INFO['epochs']} epochs" in readme and f"{INFO['final_loss']:.3f}" in readme
    assert f"{INFO['parameters'] / 1e6:.1f} M" in readme and quality["N"] == 5000
    for guidance, ending in (
        ("1", ""),
        (f"{quality['default_guidance']:g}", "_at_default_guidance"),
    ):
        row = " | ".join(
            [
                guidance,
                *(
                    f"{quality[name + ending]:{form}}"
                    for name, form in (("fd", ""), ("coverage", ".2f"), ("accuracy", ".2f"))
                ),
            ]
        )
        assert f"| {row} |" in readme
    assert quality["default_guidance"] == inference_example.GUIDANCE
    anchor = INFO["anchor"]  # a plain recipe, on the same machine
    assert all(anchor[name] == quality[name] for name in ("N", "seed", "sampler", "steps"))
    assert (
        f"| {anchor['fd']} | {anchor['coverage']} |" in measured
        and f"{anchor['images_seen']:,} images" in measured
    )


PEAK = """
import re, sys
import inference_example

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

before = peak()
inference_example.main("-n 80 --steps 2 --device cpu --out drawn.png".split() + ["--checkpoint", sys.argv[1]])
print(peak() - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs /proc: getrusage would count pytest's own memory"
)
def test_drawing_fits_in_little_memory(tmp_path):
    """Under 500 MB on top of what PyTorch takes by itself, however many pictures are drawn."""
    drawn = subprocess.run(
        [sys.executable, "-c", PEAK, WEIGHTS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert drawn.returncode == 0 and int(drawn.stdout.splitlines()[-1]) < 500e6, (
        drawn.stdout + drawn.stderr
    )


def test_a_picture_of_each_class():
    """They differ between classes and fill the range: what a network without training draws is grey."""
    model = SimpleDiffusion.load(WEIGHTS, "cpu")
    images = inference_example.generate_images(
        model, 10, list(range(10)), steps=8, seed=0, progress=False
    )
    contrast = images.flatten(1).std(dim=1)
    assert images.shape == (10, 3, 32, 32) and contrast.min() > 0.05
    assert torch.pdist(images.flatten(1)).min() > 1
