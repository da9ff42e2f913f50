"""Draw pictures from diffusion_model.pth, which `python diffusion_model.py` writes.

    python inference_example.py                                    eight of each class, a row a class
    python inference_example.py -n 16 --seed 7                     sixteen, the classes in turn
    python inference_example.py --class cat ship -n 10             a row of ten cats above a row of ten ships
    python inference_example.py --guidance 3 --sampler ddpm        more typical of the class; slower, finer steps
    python inference_example.py -n 100 --save-each FOLDER          single files as well: 00000_airplane.png ..
    python inference_example.py --class dog --init-image FILE --strength 0.6     redraw a picture; 0 leaves it alone
    python inference_example.py --class dog --init-image FILE --mask FILE        repaint it where the mask is white
    python inference_example.py --class horse --interpolate 3 8    from the picture of seed 3 to that of seed 8
    python inference_example.py --denoising                        from noise to picture, a strip and a GIF: x_t above,
                                                                   below x_0, what the network takes it for
The noise of picture i comes from seed + i, however many are drawn. All flags: --help. From Python:

    images = generate_images(SimpleDiffusion.load(), 8, labels=[3] * 8, guidance=2)        # (8, 3, 32, 32) in [0, 1]
"""
import argparse
import math
import re
import sys
import time
from pathlib import Path

import torch

from diffusion_model import (Parser, SimpleDiffusion, count_parameters, ends_in_one_line, from_uint8,
                             keep_freed_memory, read_picture, replacing, save_grid, to_uint8)

GUIDANCE = 2.0   # above 1: more typical of the class; of 1, 1.5 and 2 the best (README, Quality)
BATCH = 16       # pictures at a time, so that any number of them fits in memory; more are no faster on a CPU


def generate_images(model, num_images=8, labels=None, **options):
    """Draw pictures, BATCH at a time: -> (num_images, 3, S, S) in [0, 1]. Picture i is drawn with seed + i.

    labels: a class number for each; None: without a class. options: those of SimpleDiffusion.sample; of a tensor among
    them that has an entry for each picture, a batch gets its own.
    """
    if num_images < 1 or (labels is not None and len(labels) != num_images):
        raise ValueError(f"cannot draw {num_images} images with {'no' if labels is None else len(labels)} labels")
    seed, images = options.pop("seed", None), []
    for first in range(0, num_images, BATCH):
        part = slice(first, min(first + BATCH, num_images))
        here = {name: value[part] if isinstance(value, torch.Tensor) and value.ndim == 4 and len(value) == num_images
                else value for name, value in options.items()}
        images.append(model.sample(part.stop - first, y=None if labels is None else labels[part],
                                   seed=None if seed is None else seed + first, **here).cpu())
    return torch.cat(images)


def class_names(model):
    """What --class takes: numbers where the classes have no names, [] where there are no classes."""
    return [str(name) for name in model.class_names or range(model.model.num_classes or 0)]


def interpolated_noise(model, first_seed, last_seed, count=8):
    """Starting noises on the way from that of one seed to that of another, both included: -> (count, C, S, S)."""
    shape = (model.model.config["in_channels"], model.image_size, model.image_size)
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (first_seed, last_seed))
    # Along the arc (Shoemake 1985): half-way on the straight line, noise has 0.7 of the strength the network knows.
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    share = torch.linspace(0, 1, count)[:, None, None, None]
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def read_mask(path, image_size):
    """A picture file -> (S, S): 1 where it is nearer to white (repaint), 0 where nearer to black (keep)."""
    return (read_picture(path, image_size).float().mean(dim=0) > 127.5).float()


def save_denoising(moments, path):
    """Write ten of the `moments`, uint8 (2, N, C, S, S) each (x_t, x_0), as a strip, and fifty as a GIF beside it."""
    from PIL import Image

    def pick(count):
        index = torch.linspace(0, len(moments) - 1, min(count, len(moments)))
        return torch.stack([moments[i] for i in index.round().int()])

    strip = pick(10).permute(2, 1, 0, 3, 4, 5)                               # (N, 2, moments, C, S, S)
    save_grid(strip.flatten(0, 2) / 255, path, columns=strip.shape[2], scale=max(1, 64 // strip.shape[-1]))
    frames = pick(50).permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)  # (moments, 2 S, N S, C): x_t above x_0
    scale = max(1, 96 // strip.shape[-1])
    size = frames.shape[2] * scale, frames.shape[1] * scale
    frames = [Image.fromarray(frame.expand(-1, -1, 3).numpy()).resize(size, Image.NEAREST) for frame in frames]
    durations = [100] * (len(frames) - 1) + [2000]                           # milliseconds: the last one stays a while
    with replacing(path.with_suffix(".gif")) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("-n", type=int, help="how many pictures (default: 8 of each class); with --class of each, "
                                             "with --interpolate in a row")
    parser.add_argument("--class", dest="classes", nargs="+", metavar="NAME", help="classes, a row each, or all")
    parser.add_argument("--guidance", type=float, help=f"weight of the class (default {GUIDANCE}; 1: as trained)")
    parser.add_argument("--sampler", choices=("ddpm", "ddim", "dpm++"), default="dpm++", help="(default dpm++)")
    parser.add_argument("--steps", type=int, help="network calls a picture (default: dpm++ 20, ddim 50, ddpm all)")
    parser.add_argument("--seed", type=int, help="of the first picture (default 0)")
    parser.add_argument("--checkpoint", type=Path, default=Path("diffusion_model.pth"), metavar="FILE",
                        help="the weights to draw from (default diffusion_model.pth)")
    parser.add_argument("--out", type=Path, default=Path("samples/generated.png"), metavar="FILE",
                        help="the PNG to write (default samples/generated.png)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the best there is)")
    parser.add_argument("--save-each", type=Path, metavar="FOLDER", help="each picture in a file of its own as well")
    parser.add_argument("--init-image", type=Path, metavar="FILE", help="start from this picture instead of noise")
    parser.add_argument("--strength", type=float, help="0..1: how much of it is redrawn (default 0.6; with --mask 1)")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="repaint where it is white, keep where it is black")
    parser.add_argument("--interpolate", type=int, nargs=2, metavar="SEED",
                        help="the way from the picture of one seed to that of the other")
    parser.add_argument("--denoising", action="store_true", help="the way from noise to picture, a strip and a GIF")
    return parser.parse_args(argv)


def load(path, device):
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Train first: python diffusion_model.py (without a download: python "
                         f"diffusion_model.py --data shapes); or name another file with --checkpoint")
    return SimpleDiffusion.load(path, device)


def check(args, model, names):
    """Raise a ValueError for what cannot be done as asked, before anything is drawn: no flag is ignored."""
    seeds, no_classes = args.interpolate or [args.seed or 0], "this checkpoint was trained without classes"
    for flag, value, low, high in (
        ("-n", args.n, 1, 10**6), ("--guidance", args.guidance, 0, 1000), ("--strength", args.strength, 0, 1),
        ("--steps", args.steps, 1, model.diffusion.n_steps),
        *(("--interpolate" if args.interpolate else "--seed", seed, 0, 2**62) for seed in seeds),
    ):
        if value is not None and not low <= value <= high:
            raise ValueError(f"{flag} must be in {low}..{high}, got {value}")
    unknown = " ".join(name for name in args.classes or [] if name not in names and name != "all")
    for wrong, message in (
        (args.classes and not names, f"--class: {no_classes}"),
        (args.guidance is not None and not names, f"--guidance: {no_classes}"),
        (unknown, f"--class {unknown}: no such class; there are {', '.join(names)}, or all"),
        (args.strength is not None and not args.init_image, "--strength needs the --init-image to start from"),
        (args.mask and not args.init_image, "--mask needs the --init-image to keep"),
        (args.interpolate and args.init_image, "--interpolate starts from noise: leave out --init-image"),
        (args.interpolate and args.seed is not None, "--interpolate names the seeds: leave out --seed"),
        (args.interpolate and args.sampler == "ddpm", "--interpolate needs --sampler ddim or dpm++: ddpm adds noise"),
        (args.interpolate and args.denoising, "--interpolate and --denoising make different pictures: choose one"),
        (args.interpolate and args.n == 1, "--interpolate needs -n 2 or more: the two ends"),
        (args.interpolate and seeds[0] == seeds[-1], "--interpolate needs two different seeds"),
        (args.out.suffix.lower() != ".png", f"--out must end in .png, which is what is written: {args.out}"),
    ):
        if wrong:
            raise ValueError(message)


def layout(args, names):
    """Which pictures to draw: -> the label of each (None where there are no classes), how many stand in a row."""
    rows = args.classes
    if names and not rows and (args.interpolate or not (args.n or args.denoising)):
        rows = ["all"]
    if rows:
        n = args.n or (1 if args.denoising else 8)
        return [names.index(name) for row in rows for name in (names if row == "all" else [row]) for _ in range(n)], n
    n = args.n or (4 if args.denoising else 8 if args.interpolate else 16)
    return [i % len(names) if names else None for i in range(n)], n if args.interpolate else math.ceil(math.sqrt(n))


@ends_in_one_line()
def main(argv=None):
    keep_freed_memory()
    args = parse(argv)
    model = load(args.checkpoint, args.device)
    names, size, moments = class_names(model), model.image_size, []
    check(args, model, names)
    labels, columns = layout(args, names)
    count = len(labels)
    endings = ["_" + re.sub(r"[^\w-]+", "-", name) for name in names]  # a name from a file may hold / and ..
    files = [f"{i:05d}{endings[label] if names else ''}.png" for i, label in enumerate(labels)]
    if args.save_each and (others := {path.name for path in args.save_each.glob("*.png")} - set(files)):
        raise ValueError(f"--save-each {args.save_each}: name another folder, for other pictures are in it, such as "
                         f"{min(others)}")
    if args.denoising and count > 16:
        raise ValueError(f"--denoising shows at most 16 pictures, not {count}: choose a smaller -n")

    options = dict(sampler=args.sampler, steps=args.steps, seed=args.seed or 0, progress=sys.stderr.isatty(),
                   guidance=1.0 if not names else GUIDANCE if args.guidance is None else args.guidance)
    if args.init_image:
        options["init_image"] = from_uint8(read_picture(args.init_image, size)).expand(count, -1, -1, -1)
        options["strength"] = args.strength if args.strength is not None else 1.0 if args.mask else 0.6
    if args.mask:
        options["mask"] = read_mask(args.mask, size)
    if args.interpolate:
        options["x_T"] = interpolated_noise(model, *args.interpolate, columns).repeat(count // columns, 1, 1, 1)
    if args.denoising:
        options["callback"] = lambda i, t, *pair: moments.append(to_uint8((torch.stack(pair) + 1) / 2).cpu())
    started = time.monotonic()
    images = generate_images(model, count, labels if names else None, **options)
    seconds = time.monotonic() - started

    if args.denoising:
        save_denoising(moments + [to_uint8(torch.stack([images, images]))], args.out)
    else:
        save_grid(images, args.out, columns, scale=max(1, min(128, 800 // columns) // size))
    for image, file in zip(images, files if args.save_each else []):
        save_grid(image[None], args.save_each / file, columns=1, scale=1)  # a single picture gets no border

    print(f"{args.checkpoint}: {count_parameters(model) / 1e6:.1f} M parameters, "
          f"{size}x{size} pixels, {', '.join(names) or 'no classes'}")
    print(f"{count} pictures in {seconds:.1f} s on {next(model.parameters()).device}: {args.sampler}, "
          f"{len(model.diffusion.timesteps(args.sampler, args.steps))} steps, guidance {options['guidance']:g}, "
          f"seed {' to '.join(map(str, args.interpolate or [options['seed']]))}")
    print("wrote", args.out.resolve(), *([args.out.with_suffix(".gif").resolve()] if args.denoising else []),
          *([args.save_each.resolve()] if args.save_each else []))


if __name__ == "__main__":
    main()
