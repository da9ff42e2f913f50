"""How fast is this project beside the plain way of doing the same? One run, one table of ratios.

    python tests/benchmark.py [--peers] [--compile] [--hidden-channels 64] [--batch-size 64] [--seconds 20]

Each side runs in a process of its own, the sides by turns, twice, and the medians are compared. On a machine that does
other things too the ratios mean something, the absolute numbers little. Two cores take some five minutes, more with
--peers and --compile.

- plain loop: the same network in contiguous memory, a DataLoader that normalises image by image, Adam, loss.item() in
  every step, no moving average, glibc's memory as it is.
- diffusers: its UNet2DModel in the loop of its own example (DataLoader, AdamW, EMA), with three quarters of our
  channels, so that it multiplies as often: its blocks on the way up are more and wider.
- Each in float32 and, where the device has it, in bfloat16 by torch.autocast.
- plain sampling: 1000 ancestral steps in float32, of which a few dozen are timed.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion_model as dm  # noqa: E402
import support  # noqa: E402

IMAGE_SIZE, CLASSES, ROUNDS = 32, 10, 2


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def timed(step, seconds):
    """-> calls of step() a second, and how many were timed: for about `seconds`, three at least."""
    for _ in range(2):  # warm-up
        step()
    synchronize()
    started = time.perf_counter()
    step()
    synchronize()
    count = max(3, round(seconds / (time.perf_counter() - started)))
    started = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    return count / (time.perf_counter() - started), count


def random_data(options):
    """Noise as images, for a step takes as long with any: uint8 (N, 3, S, S), labels (N,)."""
    count = 8 * options.batch_size
    pixels = torch.randint(256, (count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    return pixels, torch.randint(CLASSES, (count,))


# -- Training: each of these sets up one way of it and returns a function that does a step ----------------------------


def train_ours(options):
    """As train() does it: its settings, its TrainingRun."""
    images, labels = random_data(options)
    support.tune_torch()
    config = dm.TrainConfig(
        data="shapes",
        out=options.folder,
        image_size=IMAGE_SIZE,
        hidden_channels=options.hidden_channels,
        batch_size=options.batch_size,
        epochs=100_000,
        compile=options.worker.startswith("compiled"),
    )
    names = [str(i) for i in range(CLASSES)]
    return dm.TrainingRun(
        config, images, labels, names, support.Processes(dm.pick_device())
    ).train_step


class Normalised(torch.utils.data.TensorDataset):
    def __getitem__(self, i):
        pixels, label = super().__getitem__(i)
        return (pixels / 255 - 0.5) / 0.5, label


def batches(options):
    """Batches without end, from a DataLoader as it comes."""
    loader = torch.utils.data.DataLoader(
        Normalised(*random_data(options)), options.batch_size, shuffle=True
    )
    while True:
        yield from loader


def train_plain(options):
    device, data = dm.pick_device(), batches(options)
    network = dm.SimpleUNet(hidden_channels=options.hidden_channels, num_classes=CLASSES)
    diffusion = dm.DiffusionModel(network).to(device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=2e-4)

    def step():
        x, y = next(data)
        with dm.autocast(device):
            loss = diffusion(x.to(device), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def train_diffusers(options):
    """After examples/unconditional_image_generation of diffusers, without the accelerator's wrapping."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    device, data, width = dm.pick_device(), batches(options), options.hidden_channels * 3 // 4
    model = UNet2DModel(
        IMAGE_SIZE,
        layers_per_block=2,
        block_out_channels=(width, 2 * width, 2 * width),
        norm_num_groups=math.gcd(32, width),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).to(device)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True)
    ema.to(device)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, 500, 100_000)

    def step():
        x = next(data)[0].to(device)
        noise = torch.randn_like(x)
        t = torch.randint(0, 1000, x.shape[:1], device=device)
        with dm.autocast(device):
            prediction = model(scheduler.add_noise(x, noise, t), t).sample
        loss = F.mse_loss(prediction.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        return loss.item()

    return step


# -- Sampling sixteen images ------------------------------------------------------------------------------------------


def sample_ours(options):
    model = dm.SimpleDiffusion.load(Path(options.folder) / "untrained.pth")
    return lambda: model.sample(16, progress=False)


def sample_plain(options):
    """One of a thousand ancestral steps."""
    device = dm.pick_device()
    diffusion = (
        dm.DiffusionModel(dm.SimpleUNet(hidden_channels=options.hidden_channels)).to(device).eval()
    )
    x_t = torch.randn(16, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    return lambda: diffusion.p_sample(x_t, torch.full((16,), 500, device=device))


# -- The processes, and the table -------------------------------------------------------------------------------------

TRAINING = dict(
    plain=("plain loop", train_plain),
    diffusers=("diffusers, its example's loop", train_diffusers),
    ours=("this project", train_ours),
    compiled=("this project, --compile", train_ours),
)
PRECISIONS = ("float32", "bfloat16")
WORKERS = {
    f"{name}_{precision}": side for precision in PRECISIONS for name, (_, side) in TRAINING.items()
}
WORKERS |= dict(sample_plain=sample_plain, sample_ours=sample_ours)


def work(options):
    """One side, in a process of its own: prints what it measured as one line of JSON."""
    if options.worker.endswith("_float32"):
        dm.has_bfloat16 = lambda device: False
    with contextlib.redirect_stdout(io.StringIO()):
        rate, count = timed(WORKERS[options.worker](options), options.seconds)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    print(
        json.dumps(
            dict(
                rate=rate,
                count=count,
                threads=torch.get_num_threads(),
                memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
                gpu_memory=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            )
        )
    )


def measure(workers, folder):
    """Run each worker in turn, ROUNDS times over: -> for each, the median of what it measured."""
    results = {name: [] for name in workers}
    for name in list(workers) * ROUNDS:
        print(f"  {name} ...", end="\r", file=sys.stderr, flush=True)
        process = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--folder", folder],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        results[name].append(json.loads(process.stdout.splitlines()[-1]))
    return {
        name: {key: statistics.median(result[key] for result in found) for key in found[0]}
        for name, found in results.items()
    }


def cpu_name():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def report(found, options, parameters):
    theirs, sampling = found["sample_plain"], found["sample_ours"]
    print(
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()}, {os.cpu_count()} cores, "
        f"{sampling['threads']:.0f} threads, torch {torch.__version__}"
    )
    print(
        f"{parameters / 1e6:.1f} M parameters, {IMAGE_SIZE}x{IMAGE_SIZE} images, batch {options.batch_size}, "
        f"median of {ROUNDS} rounds\n"
    )
    line = "{:40} {:>10.4g} {:>9} {:>6.0f}   {}".format
    print(
        f"{'training':40} {'images/s':>10} {'steps/s':>9} {'timed':>6}   in this precision, this project is"
    )
    for precision in PRECISIONS:
        for name, (label, _) in TRAINING.items():
            if result := found.get(f"{name}_{precision}"):
                ratio = found[f"ours_{precision}"]["rate"] / result["rate"]
                print(
                    line(
                        f"{label}, {precision}",
                        result["rate"] * options.batch_size,
                        f"{result['rate']:.3f}",
                        result["count"],
                        f"{ratio:.2f} times as fast" if name != "ours" else "",
                    )
                )
    plain, fast = theirs["rate"] / 1000 * 16, sampling["rate"] * 16
    print("\nsampling 16 images")
    print(
        line(
            "1000 ancestral steps, float32",
            plain,
            "",
            theirs["count"],
            f"{fast / plain:.0f} times as fast (the steps timed, scaled to 1000)",
        )
    )
    steps = dm.SAMPLERS["dpm++"].steps
    print(line(f"this project, {steps} steps of dpm++", fast, "", sampling["count"], ""))
    gpu = (
        f", and {sampling['gpu_memory'] / 1e6:.0f} MB of the GPU's"
        if sampling["gpu_memory"]
        else ""
    )
    print(
        f"\npeak memory of a process that loads the model and samples: {sampling['memory'] / 1e6:.0f} MB{gpu}"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", action="store_true", help="diffusers too, where it is installed")
    parser.add_argument("--compile", action="store_true", help="a row for --compile too")
    parser.add_argument("--hidden-channels", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--seconds", type=float, default=20, help="to time each side, in each of the rounds"
    )
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options)
    if options.peers and importlib.util.find_spec("diffusers") is None:
        print("diffusers is not installed: going on without", file=sys.stderr)
        options.peers = False

    sides = ["plain"] + ["diffusers"] * options.peers + ["ours"] + ["compiled"] * options.compile
    precisions = PRECISIONS[: 2 if dm.has_bfloat16(dm.pick_device()) else 1]
    workers = [f"{side}_{precision}" for precision in precisions for side in sides] + [
        "sample_plain",
        "sample_ours",
    ]
    with tempfile.TemporaryDirectory() as folder:
        model = dm.SimpleDiffusion(IMAGE_SIZE, hidden_channels=options.hidden_channels)
        model.save(Path(folder) / "untrained.pth")
        found = measure(workers, folder)

    report(found, options, support.count_parameters(model))


if __name__ == "__main__":
    main()
