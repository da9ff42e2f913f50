"""How fast does train() train beside a plain PyTorch loop? Images a second, and their ratio.

    python tests/benchmark.py [--peers] [--hidden-channels 64] [--batch-size 64] [--seconds 20]

The sides run by turns, twice, each in a process of its own, and the better time counts. On a
machine that does other things too, the ratios mean something and the numbers themselves little.

- ours: train() as it is, with flips, dropped labels, Muon and AdamW, clipping and the average.
- plain: the same network and loss, a DataLoader of ready tensors, and AdamW alone.
- diffusers (with --peers, if it is installed): its UNet2DModel in the loop of its own example, with
  three quarters of our channels, so that it multiplies as often, as its way up is wider.
- drawing: sixteen images with the 13 steps of dpm++.

Each is done in float32 and, where the device is fast at it, in bfloat16 by torch.autocast.
"""

import argparse
import contextlib
import importlib.util
import io
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion_model as dm  # noqa: E402


class Enough(Exception):
    """The clock has seen enough."""


class Clock:
    """Called after each step, it takes the time from the third on, until `seconds` are over."""

    def __init__(self, images, seconds):
        self.images, self.seconds, self.steps = images, seconds, 0

    def __call__(self, *_):
        self.steps += 1
        if self.steps == 3:
            self.began = self.now()
        elif self.steps > 3 and time.perf_counter() - self.began >= self.seconds:
            self.rate = self.images * (self.steps - 3) / (self.now() - self.began)
            raise Enough

    def now(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        elif torch.backends.mps.is_available():
            torch.mps.synchronize()
        return time.perf_counter()


def ours(options, images, labels, clock):
    real = dm.update_ema  # which ends a step
    dm.update_ema = lambda *args: (real(*args), clock())
    names = [str(i) for i in range(10)]
    try:
        with tempfile.TemporaryDirectory() as out:
            config = dm.TrainConfig(
                out=out,
                epochs=10**6,
                batch_size=options.batch_size,
                hidden_channels=options.hidden_channels,
            )
            dm.train(config, (images, labels, names))
    finally:
        dm.update_ema = real


def loop(options, images, labels, clock, loss_of, optimizer, after=lambda: None):
    """The plain way to train: loss_of(x, y), with x in [-1, 1], is made smaller."""
    device, data = dm.pick_device(), TensorDataset(images / 127.5 - 1, labels)
    while True:
        for x, y in DataLoader(data, options.batch_size, shuffle=True):
            with dm.autocast(device):
                loss = loss_of(x.to(device), y.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            after()
            clock()


def plain(options, *rest):
    model = dm.SimpleDiffusion(
        options.image_size, hidden_channels=options.hidden_channels, num_classes=10
    ).to(dm.pick_device())
    loop(options, *rest, model, torch.optim.AdamW(model.parameters(), lr=1e-4))


def diffusers(options, *rest):
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    width = options.hidden_channels * 3 // 4
    model = UNet2DModel(
        options.image_size,
        layers_per_block=2,
        block_out_channels=(width, 2 * width, 2 * width),
        norm_num_groups=math.gcd(32, width),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).to(dm.pick_device())
    ema, scheduler = EMAModel(model.parameters(), use_ema_warmup=True), DDPMScheduler()
    ema.to(dm.pick_device())

    def loss_of(x, y):
        noise, t = torch.randn_like(x), torch.randint(1000, (len(x),), device=x.device)
        return F.mse_loss(model(scheduler.add_noise(x, noise, t), t).sample.float(), noise)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loop(options, *rest, loss_of, optimizer, lambda: ema.step(model.parameters()))


def drawing(options, images, labels, clock):
    clock.images = 16
    model = dm.SimpleDiffusion(options.image_size, hidden_channels=options.hidden_channels)
    while True:
        model.to(dm.pick_device()).sample(16, progress=False)
        clock()


SIDES = dict(plain=plain, diffusers=diffusers, ours=ours, drawing=drawing)


def measure(side, precision, options):
    """-> images a second, on random images, as a step takes as long with any."""
    dm.has_bfloat16 = lambda device: precision == "bfloat16"
    # So many that no epoch ends, with its saving and drawing, while the clock runs.
    size = (500 * options.batch_size, 3, options.image_size, options.image_size)
    images = torch.randint(256, size, dtype=torch.uint8)
    clock = Clock(options.batch_size, options.seconds)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Enough):
        SIDES[side](options, images, torch.randint(10, size[:1]), clock)
    return clock.rate


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--peers", action="store_true", help="diffusers too, if it is installed")
    parser.add_argument("--hidden-channels", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20, help="to time each side each time")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return print(measure(*options.measure, options))
    skipped = set() if options.peers and importlib.util.find_spec("diffusers") else {"diffusers"}
    device = dm.pick_device()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, images/s:")
    for precision in ["float32", "bfloat16"][: 2 if dm.has_bfloat16(device) else 1]:
        rates = dict.fromkeys([side for side in SIDES if side not in skipped], 0.0)
        for side in [*rates, *rates]:
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", side, precision]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rates[side] = max(rates[side], float(done.stdout.split()[-1]))
        for side, rate in rates.items():
            ratio = "" if side in ("ours", "drawing") else f"ours {rates['ours'] / rate:.2f} times"
            print(f"{precision:9} {side:10} {rate:8.1f}   {ratio}", flush=True)


if __name__ == "__main__":
    main()
