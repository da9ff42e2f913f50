"""Draw pictures from diffusion_model.pth, which `python diffusion_model.py` writes. All flags: --help. In Python:

from diffusion_model import SimpleDiffusion
from support import save_grid
model = SimpleDiffusion.load("diffusion_model.pth")
images = model.sample(10, y=range(10), guidance=2, seed=0)     # one of each class: (10, 3, 32, 32) in [0, 1]
save_grid(images, "ten.png", columns=5)

python inference_example.py                                    eight of each class, a row a class
python inference_example.py -n 40                              forty, the classes in turn: a column of each
python inference_example.py --class cat ship -n 10 --guidance 3      ten cats above ten ships, typical ones
python inference_example.py -n 50000 --save-each FOLDER        single files, to measure; goes on where it stopped
python inference_example.py --class dog --init-image FILE --strength 0.6     redraw a picture; 0 leaves it alone
python inference_example.py --class dog --init-image FILE --mask FILE        repaint it where the mask is white
python inference_example.py --class horse --interpolate 3 8    from the picture of seed 3 to that of 8 (not ddpm)
python inference_example.py --denoising                        from noise to picture, strip and GIF: x_t above x_0
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch

from diffusion_model import SAMPLERS, SimpleDiffusion, noise_of_seeds, progress_bar
from support import (
    Parser,
    SingleFiles,
    ends_in_one_line,
    from_uint8,
    picture_path,
    read_picture,
    save_denoising,
    save_grid,
    to_uint8,
    tune_torch,
)

GUIDANCE = 2.5  # above 1: easier to recognise, less varied; 1.75 comes nearest to the data (tests/MEASURED.md)
INTERVAL = (
    0.3,
    3.0,
)  # guide where sigma / alpha is between these: as good as everywhere, at fewer network calls
BATCH = (
    16  # pictures at a time, so that any number of them fits in memory; more are no faster on a CPU
)
GRID = 400  # more pictures than this are not put into a grid; --save-each then goes on where it stopped


def batches(model, labels, first=0, seed=None, **options):
    """Draw a picture for each of labels[first:] (None: no class), BATCH at a time: yields (B, C, S, S) in [0, 1].

    Picture i is drawn with seed + i. options: those of SimpleDiffusion.sample; a tensor among them that has an entry
    for each picture is split as the pictures are.
    """
    for begin in progress_bar(
        range(first, len(labels), BATCH), options.get("progress", True) and len(labels) > BATCH
    ):
        part = slice(begin, begin + BATCH)
        y = None if None in labels[part] else labels[part]
        here = {
            name: value[part]
            if getattr(value, "ndim", 0) == 4 and len(value) == len(labels)
            else value
            for name, value in options.items()
        }
        yield model.sample(
            len(labels[part]), y=y, seed=None if seed is None else seed + begin, **here
        ).cpu()


def generate_images(model, num_images=8, labels=None, **options):
    """Draw pictures: -> (num_images, C, S, S) in [0, 1]. labels: a class number for each; None: without a class."""
    labels = [None] * num_images if labels is None else list(labels)
    if num_images < 1 or len(labels) != num_images:
        raise ValueError(f"cannot draw {num_images} images with {len(labels)} labels")
    return torch.cat(list(batches(model, labels, **options)))


def interpolated_noise(model, first_seed, last_seed, count=8):
    """Starting noises on the way from that of one seed to that of another, both included: -> (count, C, S, S)."""
    shape = (1, model.network.config["in_channels"], model.image_size, model.image_size)
    a, b = (noise_of_seeds(shape, seed, "cpu")() for seed in (first_seed, last_seed))
    # Along the arc (Shoemake 1985): half-way on the straight line, noise has 0.7 of the strength the network knows.
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(max=0.9999))  # two equal seeds are 0 apart
    share = torch.linspace(0, 1, count)[:, None, None, None]
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def parse(argv):
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "-n",
        type=int,
        help="how many (default: 8 of each class); with --class of each, with --interpolate in a row",
    )
    add(
        "--class",
        dest="classes",
        nargs="*",
        metavar="NAME",
        default=(),
        help="a row each, or all; alone: lists them",
    )
    add(
        "--guidance",
        type=float,
        default=GUIDANCE,
        help="weight of the class (default %(default)s; 1: as trained)",
    )
    add(
        "--sampler",
        choices=SAMPLERS,
        default="dpm++",
        help="(default dpm++); ddpm is the slow original",
    )
    add("--steps", type=int, help="steps a picture (by default what is usual for the sampler)")
    add(
        "--seed",
        type=int,
        default=0,
        help="of the first picture (default 0); picture i is drawn from seed + i",
    )
    add(
        "--checkpoint",
        type=Path,
        default=Path("diffusion_model.pth"),
        metavar="FILE",
        help="(default %(default)s)",
    )
    add(
        "--out",
        type=picture_path,
        default="samples/generated.png",
        metavar="FILE",
        help="(default %(default)s)",
    )
    add("--device", help="such as cpu or cuda:1 (default: the best there is)")
    add(
        "--save-each", type=Path, metavar="FOLDER", help="each picture in a file of its own as well"
    )
    add("--init-image", type=Path, metavar="FILE", help="start from this picture instead of noise")
    add(
        "--strength",
        type=float,
        help="0..1: how much of it is redrawn (default 0.6; with --mask 1)",
    )
    add(
        "--mask",
        type=Path,
        metavar="FILE",
        help="repaint it where this is white, keep it where this is black",
    )
    add(
        "--interpolate",
        type=int,
        nargs=2,
        metavar="SEED",
        help="from the picture of one seed to that of the other",
    )
    add("--denoising", action="store_true", help="the way from noise to picture, a strip and a GIF")
    args = parser.parse_args(argv)
    seeds = [
        ("--seed and --interpolate", seed, 0, 2**62)
        for seed in [args.seed, *(args.interpolate or [])]
    ]
    for flag, value, least, most in [
        ("-n", args.n, 1, 10**6),
        ("--guidance", args.guidance, 0, 1000),
        ("--strength", args.strength, 0, 1),
        *seeds,
    ]:
        if value is not None and not least <= value <= most:
            raise ValueError(f"{flag} must be in {least}..{most}, got {value}")
    return args


def layout(args, names):
    """Which pictures to draw: -> the label of each (None where there are no classes), how many stand in a row."""
    rows = names if "all" in args.classes else args.classes
    unknown = [name for name in args.classes if name not in [*names, "all"]]
    if unknown or args.classes == []:
        raise ValueError(
            f"{' '.join(['--class', *unknown])}: the classes are {', '.join(names) or 'none'}, or all"
        )
    if not rows and (
        args.interpolate or not (args.n or args.denoising)
    ):  # neither --class nor a number: a row each
        rows = names
    if rows:
        n = args.n or (
            1 if args.denoising and not args.interpolate else max(1, min(8, GRID // len(rows)))
        )
        return [names.index(name) for name in rows for _ in range(n)], n
    n = args.n or (4 if args.denoising else 8 if args.interpolate else 16)
    columns = (
        len(names) if 5 <= len(names) <= 16 and n % len(names) == 0 else math.ceil(math.sqrt(n))
    )
    return [i % len(names) if names else None for i in range(n)], n if args.interpolate else columns


def draw(args):
    tune_torch()
    if not args.checkpoint.is_file():
        raise ValueError(
            f"{args.checkpoint}: no such file; give --checkpoint, or train: python diffusion_model.py"
        )
    model = SimpleDiffusion.load(args.checkpoint, args.device)
    names = [str(name) for name in model.class_names or range(model.network.num_classes or 0)]
    labels, columns = layout(args, names)
    count, size = len(labels), model.image_size
    images, moments = [], []
    options = dict(
        sampler=args.sampler,
        steps=args.steps,
        progress=sys.stderr.isatty(),
        guidance=args.guidance if names else 1.0,
        guidance_interval=INTERVAL,
    )
    if args.init_image:
        picture = read_picture(args.init_image, size, model.network.config["in_channels"])
        options["init_image"] = from_uint8(picture).expand(count, -1, -1, -1)
        options["strength"] = (
            args.strength if args.strength is not None else 1.0 if args.mask else 0.6
        )
    if args.mask:
        options["mask"] = (
            read_picture(args.mask, size).float().mean(dim=0) > 127.5
        ).float()  # 1: nearer to white
    if args.interpolate:
        options["x_T"] = interpolated_noise(model, *args.interpolate, columns).repeat(
            count // columns, 1, 1, 1
        )
    if args.denoising:
        options["callback"] = lambda i, t, *pair: moments.append(
            to_uint8((torch.stack(pair) + 1) / 2).cpu()
        )
        if count > BATCH or args.out.suffix.lower() == ".gif":
            raise ValueError(
                f"--denoising: at most {BATCH} pictures (-n, --class), here {count}; --out is the strip, "
                f"here {args.out}, and the GIF goes beside it"
            )
    single = SingleFiles(
        args.save_each, [names[label] if names else None for label in labels], keep=count > GRID
    )
    started = time.monotonic()
    for batch in batches(model, labels, single.first, args.seed, **options):
        single.save(batch)
        if count <= GRID:
            images.extend(batch)
    if args.denoising:
        save_denoising(moments + [to_uint8(torch.stack([batch, batch]))], args.out)
    elif images:  # enlarged: a picture to at most 128 pixels, a row to about 800
        save_grid(
            torch.stack(images), args.out, columns, scale=max(1, min(128, 800 // columns) // size)
        )
    print(f"{args.checkpoint}: {size}x{size} pixels, {', '.join(names) or 'no classes'}")
    steps = len(model.diffusion.timesteps(args.sampler, args.steps))
    print(
        f"{count - single.first} pictures in {time.monotonic() - started:.1f} s on {model.diffusion.betas.device}: "
        f"{args.sampler}, {'up to ' if args.init_image else ''}{steps} steps, guidance {options['guidance']:g}"
    )
    gif = args.out.with_suffix(".gif") if args.denoising else None
    print(
        "wrote",
        *(path.resolve() for path in (args.out if images else None, gif, args.save_each) if path),
    )


def main(argv=None):
    with ends_in_one_line():
        draw(parse(argv))


if __name__ == "__main__":
    main()
