"""tests/benchmark.py works: each of its sides does a few steps, with tiny numbers."""

import sys
from types import SimpleNamespace

import benchmark
import pytest

import diffusion_model as dm

OPTIONS = dict(hidden_channels=16, image_size=8, batch_size=4, seconds=0)


@pytest.mark.parametrize("side", benchmark.SIDES)
@pytest.mark.filterwarnings("ignore")  # those of diffusers are its own
def test_each_side_is_measured(side, monkeypatch):
    """In the precision asked for, and train() is left as it was."""
    if side == "diffusers":
        pytest.importorskip("diffusers")
    before = dm.update_ema
    monkeypatch.setattr(dm, "has_bfloat16", dm.has_bfloat16)  # which `measure` replaces
    for precision in ("bfloat16", "float32"):
        assert benchmark.measure(side, precision, SimpleNamespace(**OPTIONS)) > 0
        assert dm.has_bfloat16(dm.pick_device()) == (precision == "bfloat16")
    assert dm.update_ema is before


def test_the_clock_counts_the_images_after_its_warm_up(monkeypatch):
    """A step of 8 images takes a second, so the three after the third last three seconds."""
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: float(clock.steps))
    clock = benchmark.Clock(8, 3)
    with pytest.raises(benchmark.Enough):
        for _ in range(10):
            clock()
    assert clock.steps == 6 and clock.rate == 8


def test_the_table_has_the_ratio_of_the_best_of_two_rates(monkeypatch, capsys):
    """Each side is measured twice. Here ours makes 20 and then 5 images a second, the others 10."""
    rates = dict(ours=iter([20, 5] * 2))

    def measured(command, **_):
        return SimpleNamespace(stdout=f"{next(rates.get(command[-2], iter([10])))}\n")

    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--peers"])
    monkeypatch.setattr(benchmark.subprocess, "run", measured)
    benchmark.main()
    assert "ours 2.00 times" in capsys.readouterr().out
