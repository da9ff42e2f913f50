"""The released weights are what model_info.json says, and draw what the README shows."""

import hashlib
import json
import sys

import pytest
import torch
from conftest import ROOT, pixels, run, tiles

import diffusion_model as dm

WEIGHTS = ROOT / "diffusion_model.pth"
INFO = json.loads((ROOT / "model_info.json").read_text())
pytestmark = pytest.mark.skipif(
    "evaluation" not in INFO, reason="these weights are those of a run of your own"
)


def test_model_info_is_about_these_weights():
    """The checksum is theirs, as are the parameters and all else that the file says of itself."""
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == INFO["sha256"]
    saved = torch.load(WEIGHTS, weights_only=True)
    tensors = saved["model_state_dict"].values()
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    assert sum(tensor.numel() for tensor in tensors) == INFO["parameters"]
    assert saved["info"].items() <= INFO.items()
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
    assert saved["class_names"] == classes and saved["image_size"] == 32


def test_they_draw_the_picture_of_the_readme():
    """A column for each class, from seed 0. Only rounding may differ, by less than 1 of 255."""
    model = dm.SimpleDiffusion.load(WEIGHTS, "cpu")
    images = model.sample(40, y=[i % 10 for i in range(40)], guidance=2.5, seed=0)
    # In the picture each image is twice as large.
    released = torch.from_numpy(tiles(pixels(ROOT / "samples/released.png"), 10, 64, 2))
    assert (images.permute(0, 2, 3, 1) * 255 - released).abs().mean() < 1


PEAK = """
import re, inference_example
inference_example.main("-n 8 --steps 2 --device cpu".split())
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_drawing_takes_less_than_a_gigabyte(here):
    """The whole process, torch included, that draws 80 pictures never has more memory."""
    drawn = run(sys.executable, "-c", PEAK, PYTHONPATH=str(ROOT))
    assert int(drawn.stdout.splitlines()[-1]) * 1024 < 1e9
