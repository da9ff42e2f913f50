"""Draw pictures with diffusion_model.pth, which `python diffusion_model.py` writes. In Python:

    from diffusion_model import SimpleDiffusion, save_grid

    model = SimpleDiffusion.load("diffusion_model.pth")
    images = model.sample(10, y=range(10), guidance=2.5, seed=0)  # (10, 3, 32, 32) in [0, 1]
    save_grid(images, "ten.png", columns=5)

From the command line, into samples/generated.png:

    python inference_example.py                           a row of eight pictures for each class
    python inference_example.py --class cat ship -n 10    ten cats above ten ships
    python inference_example.py --class ship --init-image FILE           redraws a picture
    python inference_example.py --class ship --init-image FILE --mask FILE    repaints a part of it
    python inference_example.py --class horse --interpolate 3 8     from seed 3 to seed 8
    python inference_example.py --class horse --denoising           from noise to a picture
    python inference_example.py -n 500 --save-each FOLDER           single files instead, to measure
"""

import argparse
import io
import math
import re
import sys
import time
from pathlib import Path

import torch

import diffusion_model as dm

BATCH = 16  # pictures at a time, so that any number of them fits in memory


def generate_images(model, num_images=8, y=None, seed=None, x_T=None, paths=None, **options):
    """Draw pictures in batches: -> (num_images, C, S, S) in [0, 1], on the CPU.

    y, seed, x_T and options are those of SimpleDiffusion.sample. paths: a file for each picture, to
    which it is written instead of being returned. Files that are there are left as they are.
    """
    from torchvision.utils import save_image

    if num_images < 1:
        raise ValueError(f"at least one picture must be asked for, not {num_images}")
    batches = []
    for first in range(0, num_images, BATCH):
        part = slice(first, min(first + BATCH, num_images))
        if paths and all(path.exists() for path in paths[part]):
            continue
        own = {name: value[part] for name, value in dict(y=y, x_T=x_T).items() if value is not None}
        seed_here = None if seed is None else seed + first
        images = model.sample(part.stop - first, seed=seed_here, **own, **options).cpu()
        if not paths:
            batches.append(images)
        for image, path in zip(images, paths[part] if paths else []):
            if not path.exists():
                file = io.BytesIO()
                save_image(image, file, format="png")
                dm.write(file.getvalue(), path)
    return torch.cat(batches) if batches else None


def interpolated_noise(model, first_seed, last_seed, count):
    """Starting noises on the way from that of one seed to that of another: -> (count, C, S, S)."""
    shape = (1, model.network.config["in_channels"], model.image_size, model.image_size)
    a, b = (dm.noise_of_seeds(shape, seed, "cpu")() for seed in (first_seed, last_seed))
    # Half-way on the straight line between them, noise has 0.7 of the strength that the network
    # knows. So we go along the arc, a quarter of a circle, as two noises are nearly orthogonal.
    angle = torch.linspace(0, math.pi / 2, count)[:, None, None, None]
    return angle.cos() * a + angle.sin() * b


def draw(args):
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    if Image.registered_extensions().get(args.out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {args.out} needs the ending of a kind of picture, such as .png")
    model = dm.SimpleDiffusion.load(args.checkpoint, args.device)
    size, names = model.image_size, model.class_names or []
    rows = [model.label(name) for name in args.classes or names] or [None]
    n = (1 if args.denoising and not args.interpolate else 8) if args.n is None else args.n
    if n < 1:
        raise ValueError(f"-n {n} must be at least 1")
    count = n * len(rows)
    y = [label for label in rows for _ in range(n)] if names else None
    options = dict(sampler=args.sampler, steps=args.steps, guidance=args.guidance if names else 1.0)
    options.update(progress=sys.stderr is not None and sys.stderr.isatty())
    if args.init_image:
        grey = model.network.config["in_channels"] == 1
        picture = dm.open_picture(args.init_image, size).convert("L" if grey else "RGB")
        options.update(init_image=pil_to_tensor(picture) / 127.5 - 1)
        options.update(strength=1.0 if args.mask else 0.6)
    if args.strength is not None:
        options.update(strength=args.strength)
    if args.mask:
        mask = dm.open_picture(args.mask, size).convert("L")
        options.update(mask=pil_to_tensor(mask) / 255)  # white is 1 and will be repainted
    if args.interpolate:
        noise = interpolated_noise(model, *args.interpolate, n)
        options.update(x_T=noise.repeat(len(rows), 1, 1, 1))
    moments = []
    if args.denoising:
        if count > BATCH or args.save_each or args.strength == 0:
            raise ValueError(
                f"--denoising needs at most {BATCH} pictures (here {count}), in one grid, "
                "and a --strength above 0"
            )
        options.update(
            callback=lambda i, t, x_t, x_0: moments.append(torch.stack([x_t, x_0]).cpu())
        )
    paths = None
    if args.save_each:
        args.save_each.mkdir(parents=True, exist_ok=True)
        classes = ["_" + re.sub(r"\W+", "-", names[label]) for label in y] if names else [""] * n
        paths = [
            args.save_each / f"{args.seed + i:05d}{name}.png" for i, name in enumerate(classes)
        ]
        there = sum(path.exists() for path in paths)
        if there:
            dm.say(f"{there} of {count} pictures are there already and will be left as they are")

    began = time.monotonic()
    images = generate_images(model, count, y, args.seed, paths=paths, **options)
    if args.denoising:  # ten moments of each picture, with x_t above x_0
        moments = [moments[round(i)] for i in torch.linspace(0, len(moments) - 1, 10).tolist()]
        images = torch.stack(moments).permute(2, 1, 0, 3, 4, 5).flatten(0, 2) / 2 + 0.5
        n = 10
    elif len(rows) == 1 and not args.interpolate:
        n = min(n, 16)  # many pictures of one class, or without classes, fill several rows
    if not args.save_each:
        dm.save_grid(images, args.out, columns=n)
    seconds, where = time.monotonic() - began, model.diffusion.betas.device
    dm.say(f"{count} pictures in {seconds:.1f} s on {where}, see {args.save_each or args.out}")


def main(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=layout, allow_abbrev=False
    )
    parser.error = dm.refuse_options
    weights = Path("diffusion_model.pth")
    weights = weights if weights.exists() else Path(__file__).with_name(weights.name)
    path = lambda name: Path(name).expanduser()
    add = parser.add_argument
    add("-n", type=int, help="pictures of each class, a row (default 8, with --denoising 1)")
    add("--class", dest="classes", nargs="+", metavar="NAME", help="classes to draw (default all)")
    add(
        "--guidance",
        type=float,
        default=2.5,
        help="how typical of its class a picture is (default 2.5, and 1 turns it off)",
    )
    add("--sampler", choices=dm.DEFAULT_STEPS, default="dpm++", help="(default dpm++)")
    add("--steps", type=int, help="steps for a picture (default 13, for ddim 50, for ddpm 1000)")
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of the first picture, and each further one adds 1 (default 0)",
    )
    add("--checkpoint", default=weights, metavar="FILE", help="weights, or a folder that has them")
    add("--out", type=path, default=Path("samples/generated.png"), help="picture to write")
    add("--device", help="such as cpu or cuda (default the best there is)")
    add(
        "--save-each", type=path, metavar="FOLDER", help="write single files there, not one picture"
    )
    add("--init-image", type=path, metavar="FILE", help="begin with this picture instead of noise")
    add(
        "--strength",
        type=float,
        help="how much of it to redraw, 0 to 1 (default 0.6, with --mask 1)",
    )
    add(
        "--mask",
        type=path,
        metavar="FILE",
        help="repaint it where this is white, keep it where it is black",
    )
    add("--interpolate", type=int, nargs=2, metavar="SEED", help="a row from one seed to another")
    add("--denoising", action="store_true", help="ten moments on the way from noise to a picture")
    with dm.errors_in_one_line():
        draw(parser.parse_args(argv))


if __name__ == "__main__":
    main()
