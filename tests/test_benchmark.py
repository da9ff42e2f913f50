"""tests/benchmark.py can run: each of its sides does a few steps, with tiny numbers."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch

import benchmark
import diffusion_model


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(
        diffusion_model, "has_bfloat16", diffusion_model.has_bfloat16
    )  # work() may change it
    monkeypatch.setattr(benchmark, "IMAGE_SIZE", 8)
    diffusion_model.SimpleDiffusion(8, hidden_channels=8).save(tmp_path / "untrained.pth")
    return SimpleNamespace(folder=tmp_path, hidden_channels=8, batch_size=4, seconds=0)


@pytest.mark.parametrize("side", benchmark.WORKERS)
def test_each_side_does_steps(options, side, monkeypatch, capsys):
    if side.startswith("diffusers") and importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    options.worker = side
    monkeypatch.setattr(
        torch, "compile", lambda module: module
    )  # it takes a minute, and a compiler
    benchmark.work(options)
    assert json.loads(capsys.readouterr().out)["rate"] > 0
    if side.endswith("_float32"):
        assert not diffusion_model.has_bfloat16(torch.device("cpu"))


def test_the_table(options, capsys):
    found = dict(rate=10.0, count=3, threads=2, memory=1e9, gpu_memory=0)
    plain = found | dict(rate=4.0)
    sides = dict(
        plain_float32=plain,
        ours_float32=found,
        ours_bfloat16=found | dict(rate=20.0),
        sample_plain=plain,
    )
    benchmark.report(dict(**sides, sample_ours=found), options, 1e6)
    out = capsys.readouterr().out
    assert "2.50 times as fast" in out and "2500 times as fast" in out and "1000 MB" in out
