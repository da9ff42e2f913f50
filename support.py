"""What surrounds the training of diffusion_model.py: data sets, pictures, options, several processes, signals, errors.

None of it is needed to understand diffusion. It needs torch alone; torchvision, PIL, numpy, matplotlib and tqdm are
imported in the functions that use them. It never imports diffusion_model, which is __main__ in a run.
"""

import argparse
import atexit
import contextlib
import datetime
import hashlib
import json
import math
import operator
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

if not hasattr(torch.optim, "Muon"):
    raise ImportError(
        f"torch {torch.__version__} is too old, 2.9 is needed: pip install --upgrade torch torchvision"
    )

# ---------------------------------------------------------------------------------------------------------------------
# Data sets


SHAPES = {  # which points belong to a shape; a and b are |x| and |y|, from 0 in the centre to 1 at the edge
    "circle": lambda x, y, a, b: a**2 + b**2 < 0.8,
    "ring": lambda x, y, a, b: (a**2 + b**2 - 0.6).abs() < 0.3,
    "square": lambda x, y, a, b: torch.maximum(a, b) < 0.75,
    "frame": lambda x, y, a, b: (torch.maximum(a, b) - 0.7).abs() < 0.2,
    "diamond": lambda x, y, a, b: a + b < 1,
    "triangle": lambda x, y, a, b: (y < 0.8) & (a < (y + 1) / 2),
    "plus": lambda x, y, a, b: (torch.minimum(a, b) < 0.28) & (torch.maximum(a, b) < 0.95),
    "cross": lambda x, y, a, b: ((a - b).abs() < 0.35) & (torch.maximum(a, b) < 0.85),
    "bar": lambda x, y, a, b: (a < 0.95) & (b < 0.3),
    "stripes": lambda x, y, a, b: (torch.maximum(a, b) < 0.95) & (torch.cos(9.9 * x) > 0),
}


def draw_shapes(image_size, count, seed=0):
    """Coloured shapes, the same ones for a seed: -> uint8 (count, 3, S, S), labels (count,), the ten class names."""
    numbers = torch.rand(count, 11, generator=torch.Generator().manual_seed(seed), device="cpu")
    labels = (numbers[:, 0] * len(SHAPES)).long()
    places, colours = (
        numbers[:, 1:4],
        numbers[:, 4:10].view(count, 2, 3) * 90,
    )  # centre, size; shape, background
    colours[torch.arange(count), (2 * numbers[:, 10]).long()] += 150  # one of the two is bright
    axis = (torch.arange(4 * image_size) + 0.5) / (
        2 * image_size
    ) - 1  # four by four points in each pixel
    images = torch.empty(count, 3, image_size, image_size, dtype=torch.uint8)
    for i, (centre_x, centre_y, size) in enumerate(places.tolist()):
        size = 0.55 + 0.3 * size
        x, y = ((axis - (centre - 0.5) / 4) / size for centre in (centre_x, centre_y))
        x, y = torch.meshgrid(x, y, indexing="xy")  # (4 S, 4 S) each
        inside = list(SHAPES.values())[labels[i]](x, y, x.abs(), y.abs())
        cover = F.avg_pool2d(inside[None].float(), 4)  # (1, S, S): how much of each pixel
        shape, background = colours[i, :, :, None, None]
        images[i] = (cover * shape + (1 - cover) * background).round()
    return images, labels, list(SHAPES)


def open_picture(path, size):
    """Any picture file -> a PIL image: upright, RGB, white where transparent; of a large JPEG what `size` needs."""
    import numpy
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            file.draft(
                "RGB", (2 * size, 2 * size)
            )  # of a photograph only what is needed: several times as fast
            picture = ImageOps.exif_transpose(file)
        if picture.mode.startswith(
            ("I", "F")
        ):  # 16 bits and more: PIL would make all above 255 white
            values = numpy.asarray(picture, dtype=float)
            if picture.mode.startswith("I;16") or values.max() > 255:
                values = values / 257  # 65535 -> 255
            elif picture.mode == "F" and values.max() <= 1:
                values = values * 255
            picture = Image.fromarray(values.clip(0, 255).round().astype("uint8"))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except Exception as error:  # PIL raises many kinds of them
        raise ValueError(f"{path}: not a readable picture: {error}") from None


def to_square(picture, image_size):
    """A PIL image, resized and cropped to its centre -> uint8 (3, S, S)."""
    from PIL import ImageOps
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(ImageOps.fit(picture, [image_size] * 2))


def read_picture(path, image_size, channels=3):
    """Any picture file -> uint8 (channels, S, S), resized and cropped to its centre; grey where channels is 1."""
    picture = open_picture(path, image_size)
    return to_square(picture if channels == 3 else picture.convert("L").convert("RGB"), image_size)[
        :channels
    ]


def note(line):
    """Print a line about the data; of several processes only the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def load_folder(folder, image_size, limit):
    """All pictures below `folder`. Its immediate subfolders are the classes, unless pictures lie beside them."""
    from tqdm import tqdm

    suffixes = {
        ".png",
        ".jpg",
        ".jpeg",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".avif",
        ".heic",
    }
    paths = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    images, kept, unreadable, cut = [], [], [], []
    for path in tqdm(
        sorted(paths)[:limit], desc="reading", leave=False, disable=not sys.stderr.isatty()
    ):
        try:
            picture = open_picture(path, image_size)
        except ValueError as error:
            unreadable.append(error)
            continue
        images.append(to_square(picture, image_size))
        kept.append(path.relative_to(folder))
        cut.append(1 - min(picture.size) / max(picture.size))  # the share that is lost
    if len(unreadable) > len(kept):
        raise ValueError(
            f"{len(unreadable)} of {len(kept) + len(unreadable)} pictures cannot be read: convert them "
            f"to JPEG or PNG. The first: {unreadable[0]}"
        )
    for error in unreadable[:9]:
        note(f"skipped: {error}")
    if len(unreadable) > 9:
        note(f"skipped: {len(unreadable) - 9} more")
    if not kept:
        raise ValueError(f"{folder}: no pictures found ({' '.join(sorted(suffixes))})")
    if max(cut) > 0.1:
        note(
            f"cropped: {sum(share > 0.1 for share in cut)} of {len(cut)} pictures are far from square; of the worst, "
            f"{kept[cut.index(max(cut))]}, {max(cut):.0%} are cut off"
        )
    if all(
        torch.equal(image, image[:1].expand_as(image)) for image in images
    ):  # grey: one channel says it all
        images = [image[:1] for image in images]
    images = torch.stack(images)
    if min(len(path.parts) for path in kept) == 1:  # some pictures lie in `folder` itself
        return images, None, None
    class_names = sorted({path.parts[0] for path in kept})
    return images, torch.tensor([class_names.index(path.parts[0]) for path in kept]), class_names


CIFAR10_ARCHIVE = "cifar-10-python.tar.gz"


def is_cifar10(data):
    return data == "cifar10" or any(
        (Path(data) / name).exists() for name in ("cifar-10-batches-py", CIFAR10_ARCHIVE)
    )


def load_images(data, image_size=32, limit=None, out=None):
    """Read a data set: -> images uint8 (N, 3, S, S), labels int64 (N,) or None, class_names or None.

    Where all pictures of a folder are grey, images are (N, 1, S, S).

    data: "cifar10" (in ./data, downloaded where missing), a folder that holds cifar-10-batches-py, any other folder of
    images, or "shapes". limit: the first images only. out: where a run writes, which must not be in that folder.
    Raises a ValueError that says what is wrong and what to do.
    """
    if data == "shapes":
        return draw_shapes(image_size, limit or 5_000)
    if not is_cifar10(data):
        if not Path(data).is_dir():
            raise ValueError(
                f"--data {data}: no such folder; give a folder of images, cifar10 or shapes"
            )
        pictures = (Path(out or "") / "samples").resolve()
        if out is not None and Path(data).resolve() in (pictures, *pictures.parents):
            raise ValueError(
                f"--out {out} writes pictures into --data {data}: they would become training pictures"
            )
        return load_folder(Path(data), image_size, limit)
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    root = Path("data" if data == "cifar10" else data).resolve()
    archive, unpacked = root / CIFAR10_ARCHIVE, root / "cifar-10-batches-py"
    by_hand = (
        f"fetch it with curl, which goes on where it broke off: curl -C - --create-dirs -o {quoted(archive)} "
        f"{CIFAR10.url} (a mirror will do, for its checksum is verified)"
    )
    if not archive.exists() and not unpacked.exists():
        print(
            f"downloading CIFAR-10 (170 MB) into {root}; if that is slow, Ctrl-C and {by_hand}",
            flush=True,
        )
    try:
        # torchvision would begin an incomplete download again from nothing.
        if (
            archive.exists()
            and not unpacked.exists()
            and not check_integrity(archive, CIFAR10.tgz_md5)
        ):
            raise ValueError(f"{archive} is incomplete, or damaged: then delete it")
        # With download=True it also unpacks an archive that was fetched by hand. Either way it checks the checksums.
        cifar = CIFAR10(root, train=True, download=data == "cifar10" or archive.exists())
    except Exception as error:  # no network, a full disk, a file cut off
        raise ValueError(
            f"CIFAR-10 could not be loaded ({error}): {by_hand}; or train without it: --data shapes, or "
            f"--data FOLDER of your images"
        ) from None
    images, labels = (
        torch.from_numpy(cifar.data[:limit]).permute(0, 3, 1, 2),
        torch.tensor(cifar.targets[:limit]),
    )
    if image_size != 32:
        images = F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
    return images, labels, cifar.classes


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def from_uint8(pixels):
    """Pixels 0..255 -> images in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(images):
    """Images in [0, 1], as SimpleDiffusion.sample gives them -> pixels 0..255, rounded."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def save_grid(images, path, columns, scale=None):
    """Write images (N, C, S, S) in [0, 1] as one picture, a pixel `scale` wide (None: images of about 128 pixels)."""
    from PIL import Image
    from torchvision.utils import make_grid

    scale = scale or max(1, 128 // images.shape[-1])
    pixels = to_uint8(images.cpu()).repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(make_grid(pixels, nrow=columns).permute(1, 2, 0).numpy()).save(path)


def most_alike(images, data, mirrored=True):
    """Of `data`, uint8 (M, C, S, S), the one nearest to each of `images` (N, C, S, S) in [0, 1]: -> like `images`.

    mirrored: mirror images count as well, as training shows them; where one is nearest, that is returned.
    """
    ways = [images, images.flip(3)] if mirrored else [images]
    flat = torch.cat(ways).flatten(1)  # (ways * N, C * S * S)
    parts = data.split(1 + 3_000_000 // data[0].numel())  # of 12 MB each, as float32
    exact = "donot_use_mm_for_euclid_dist"  # for the sake of near-copies
    distances = torch.cat(
        [torch.cdist(part.flatten(1) / 255, flat, compute_mode=exact) for part in parts]
    )
    nearest, index = (found.view(len(ways), -1) for found in distances.min(dim=0))  # (ways, N)
    way = nearest.argmin(dim=0)
    alike = data[index.gather(0, way[None])[0]] / 255
    return torch.where((way == 1)[:, None, None, None], alike.flip(3), alike)


class SingleFiles:
    """Pictures in files of their own in `folder` (None: nowhere), named by number and class: 00012_cat.png.

    classes: the name of the class of each, or None. keep: go on after those that are there already.
    Raises ValueError if pictures of other names are there; with keep, also if the last one was drawn in another way.
    """

    def __init__(self, folder, classes, keep):
        # A name comes from a file, which may be from anywhere: it could hold / and ..
        endings = ["" if name is None else "_" + re.sub(r"[^\w-]+", "-", name) for name in classes]
        names = [f"{i:05d}{ending}.png" for i, ending in enumerate(endings)]
        if keep and folder is None:
            raise ValueError(
                f"{len(names)} pictures are too many for one grid: add --save-each FOLDER, or draw fewer "
                f"(-n, --class)"
            )
        self.folder, self.names = folder, names
        there = {path.name for path in folder.glob("*.png")} if folder else set()
        if there - set(names):
            raise ValueError(
                f"--save-each {folder}: name another folder, other pictures are in it, such as "
                f"{min(there - set(names))}"
            )
        done = (
            next((i for i, name in enumerate(names) if name not in there), len(names))
            if keep
            else 0
        )
        self.first = self.next = max(0, done - 1)  # the last one again, to compare it
        self.compare = done > 0

    @staticmethod
    def differs(path, image):
        """Whether `path` holds another picture than (C, S, S) in [0, 1]; one that was cut off is none."""
        with contextlib.suppress(ValueError):
            return (read_picture(path, image.shape[-1]) - 255.0 * image).abs().mean() > 4
        return False

    def save(self, images):
        for image in images if self.folder else []:
            path = self.folder / self.names[self.next]
            if self.compare and self.differs(path, image):
                raise ValueError(
                    f"--save-each {self.folder}: name another folder, {path.name} is another picture"
                )
            self.compare = False
            save_grid(image[None], path, columns=1, scale=1)  # a single picture gets no border
            self.next += 1


def save_denoising(moments, path):
    """Write ten of the `moments`, uint8 (2, N, C, S, S) each (x_t, x_0), as a strip, and fifty as a GIF beside it."""
    from PIL import Image

    def pick(count):
        index = torch.linspace(0, len(moments) - 1, min(count, len(moments)))
        return torch.stack([moments[i] for i in index.round().int()])

    strip = pick(10).permute(2, 1, 0, 3, 4, 5)  # (N, 2, moments, C, S, S)
    save_grid(
        strip.flatten(0, 2) / 255, path, columns=strip.shape[2], scale=max(1, 64 // strip.shape[-1])
    )
    frames = (
        pick(50).permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)
    )  # (moments, 2 S, N S, C): x_t above x_0
    scale = max(1, 96 // strip.shape[-1])
    size = frames.shape[2] * scale, frames.shape[1] * scale
    frames = [
        Image.fromarray(frame.expand(-1, -1, 3).numpy()).resize(size, Image.NEAREST)
        for frame in frames
    ]
    durations = [100] * (len(frames) - 1) + [2000]  # milliseconds: the last one stays a while
    frames[0].save(
        path.with_suffix(".gif"),
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
    )


def plot_losses(losses, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    figure.add_subplot(xlabel="epoch", ylabel="training loss").plot(
        range(1, len(losses) + 1), losses, marker="."
    )
    figure.savefig(path, format="png")


def plot_noising(image, processes, schedule, path):
    """Above, one image (C, S, S) in [-1, 1] at five timesteps; below, alphas_cumprod of all schedules.

    processes: a DiffusionModel for the name of each schedule; that of `schedule` adds the noise.
    """
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    figure = Figure(figsize=(10, 5), layout="constrained")
    last = processes[schedule].n_steps - 1
    t = torch.tensor([min(round(share * (last + 1)), last) for share in (0, 0.1, 0.3, 0.5, 1)])
    noised = processes[schedule].q_sample(image.expand(5, -1, -1, -1), t)
    axes = figure.add_subplot(2, 1, 1, title="t = " + ", ".join(map(str, t.tolist())))
    axes.imshow(make_grid(to_uint8((noised + 1) / 2), nrow=5).permute(1, 2, 0).numpy())
    axes.axis("off")
    axes = figure.add_subplot(2, 1, 2, xlabel="t", ylabel="alphas_cumprod")
    for name, process in processes.items():
        axes.plot(process.alphas_cumprod.numpy(), label=name)
    axes.legend()
    figure.savefig(path, format="png")


# ---------------------------------------------------------------------------------------------------------------------
# Options and errors on the command line


def quoted(path):
    """`path` as one word of a command: Windows' cmd.exe takes single quotes for part of a name."""
    return f'"{path}"' if os.name == "nt" else shlex.quote(str(path))


def flag_of(name):
    return "--" + name.replace("_", "-")


def check_config(config):
    """Check the numbers of a TrainConfig and turn its values into plain ones, which is all that a file can hold.

    From Python a Path, a list or a number of numpy's will do as well. Raises a ValueError that names the flag.
    """
    for entry in fields(config):
        value, least, below = (
            getattr(config, entry.name),
            entry.metadata["least"],
            entry.metadata["below"],
        )
        if value is None:
            continue
        try:
            if entry.type in (str, float):
                value = (
                    os.path.expanduser(str(value)) if entry.type is str else float(value)
                )  # --out=~/run
            elif entry.type is tuple:
                value = tuple(
                    map(operator.index, [value] if hasattr(value, "__index__") else value)
                )
            else:
                value = entry.type(operator.index(value))
        except (TypeError, ValueError):
            raise ValueError(f"{flag_of(entry.name)} cannot be {value!r}") from None
        setattr(config, entry.name, value)
        numbers = value if entry.type is tuple else [value] if entry.type is not str else []
        for number in numbers:
            if not least <= number < below:
                bounds = [f"at least {least}"] * (least > -math.inf) + [f"below {below}"] * (
                    number >= below
                )
                raise ValueError(
                    f"{flag_of(entry.name)} must be {' and '.join(bounds) or 'a number'}, got {number}"
                )


def picture_path(name):
    """The path of a picture to write, as the type of a flag: a wrong ending is refused before anything is drawn."""
    from PIL import Image

    if Image.registered_extensions().get(Path(name).suffix.lower()) not in Image.SAVE:
        raise argparse.ArgumentTypeError(f"{name}: unknown file extension, give one such as .png")
    return Path(name)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # where argparse would print all flags and exit
        raise ValueError(f"{message} (all flags: --help)")


def parse_options(kind, argv, description):
    """Read the command line: a flag for each field of the dataclass `kind` -> an instance of it."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for entry in fields(kind):
        default, meaning = entry.default, entry.metadata["meaning"]
        if entry.type is bool:
            options = dict(action="store_true")
        elif entry.type is tuple:
            options = dict(type=int, nargs="*", metavar="")
            meaning += f" ({' '.join(map(str, default))})" if default else ""
        else:
            options = dict(type=entry.type, metavar="")
            meaning += "" if default is None else f" ({default})"
        parser.add_argument(flag_of(entry.name), help=meaning, default=argparse.SUPPRESS, **options)
    given = vars(parser.parse_args(argv))
    config = kind(**given)
    config.given = set(given)  # for --init, which a flag can contradict at its default, too
    return config


@contextlib.contextmanager
def ends_in_one_line():
    """Let what a user can cause end in exit code 2 and one line that begins with "error:"."""
    with contextlib.suppress(
        AttributeError
    ):  # a redirected output may not know all letters of a class name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        return
    except KeyboardInterrupt:  # before or after the training loop, which handles it by itself
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        message = error
    except ImportError as error:
        message = f"{error}: pip install -r requirements.txt"
    except (MemoryError, RuntimeError) as error:
        words = (
            "allocate",
            "out of memory",
            "alloc_failed",
        )  # of CPU and MPS; of CUDA; of its libraries
        if isinstance(error, RuntimeError) and not any(
            word in str(error).lower() for word in words
        ):
            raise  # no lack of memory but a bug: show where
        message = (
            f"out of memory ({error}): end other programs and give the same command; or lower --batch-size, "
            f"--hidden-channels or --image-size, with --restart; to draw, -n below 16 or --device cpu"
        )
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# The process: memory, signals, torchrun


def tune_torch():
    """Settings of torch and of the C library that make a step faster."""
    torch.set_flush_denormal(
        True
    )  # numbers below 1e-38 become 0: a CPU is many times slower with them
    torch.backends.cudnn.benchmark = (
        True  # all batches have one shape: worth trying which convolution is fastest
    )
    with contextlib.suppress(OSError, AttributeError):  # only Linux has glibc
        import ctypes

        libc = ctypes.CDLL("libc.so.6")
        # Keep freed memory for the next tensor: new memory costs a fifth of a step on the CPU.
        libc.mallopt(
            -4, 0
        )  # M_MMAP_MAX = 0: no large tensor is returned to the system as soon as it is freed
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD = -1 (none): nor is the end of the heap


def compiled(function, wanted):
    """`function`, compiled if `wanted`. What torch.compile cannot compile runs as it is, with a warning."""
    if wanted:
        torch._dynamo.config.suppress_errors = True
        function = torch.compile(function)
    return function


@contextlib.contextmanager
def stop_signals():
    """Collect Ctrl-C and SIGTERM in a list, so that the step in hand can be finished; a second Ctrl-C ends at once."""
    received, handlers = [], {}
    if (
        threading.current_thread() is threading.main_thread()
    ):  # Python lets no other thread set handlers
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # Ctrl-C is ignored in the background of a script; None was set by another language and cannot be put back.
        handlers = {
            number: handler
            for number, handler in handlers.items()
            if handler not in (None, signal.SIG_IGN)
        }

    def receive(number, frame):
        received.append(number)
        if number == signal.SIGINT:  # not of SIGTERM, which a scheduler and torchrun may each send
            signal.signal(number, handlers[number])
        if sys.stderr.isatty():  # no print(): this may have interrupted the bar in the midst of one
            os.write(2, b"\nstopping after this step; Ctrl-C again ends at once, without saving\n")

    try:
        for number in handlers:
            signal.signal(number, receive)
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Processes:
    """This process among those of torchrun, each on a GPU of its own, or all on the CPU. Without torchrun: alone."""

    def __init__(self, device):
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0)) if self.count > 1 else 0
        self.device = device
        if self.count == 1:
            return
        on_gpu = device.type == "cuda"
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        if on_gpu and local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"{torch.cuda.device_count()} GPUs here: lower --nproc_per_node of torchrun"
            )
        if on_gpu:
            torch.cuda.set_device(self.device)
        if (
            not torch.distributed.is_initialized()
        ):  # it can be, where a program calls train() more than once
            nccl = on_gpu and torch.distributed.is_nccl_available()  # Windows has none
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=datetime.timedelta(days=1)
            )  # as long as a download may take
            atexit.register(torch.distributed.destroy_process_group)

    def check_equal(self, number, what):
        """ValueError if not all processes have the same number."""
        if self.largest(number) != -self.largest(-number):
            raise ValueError(f"the processes do not find the same {what}")

    def say(self, line):
        if self.rank == 0:
            print(line, flush=True)

    def largest(self, number):
        """The largest of the numbers (int) of all processes, once all have come here."""
        if self.count == 1:
            return number
        number = torch.tensor(number, device="cpu")
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return number.item()

    @contextlib.contextmanager
    def first_goes_ahead(self):
        """The first process runs the block before the others do."""
        if self.rank > 0:
            self.largest(0)
        yield
        if self.rank == 0:
            self.largest(0)

    def wrap(self, model):
        """`model`, whose gradients backward() averages over the processes."""
        return (
            model
            if self.count == 1
            else nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        )

    def shared(self, batch_size, images):
        """The images a step: batch_size, or of a smaller data set what all processes can share evenly."""
        shared = min(batch_size, images) // self.count * self.count
        if shared == 0 or batch_size % self.count:
            raise ValueError(
                f"--batch-size {batch_size}, {images} images: {self.count} processes cannot share them "
                f"evenly"
            )
        return shared


# ---------------------------------------------------------------------------------------------------------------------
# How a run begins and goes on: optimisers, --init, resuming


class Muon(torch.optim.Muon):
    """torch.optim.Muon, which takes matrices alone, for kernels too: each as a matrix that shares its memory."""

    def __init__(self, kernels, lr, **options):
        self.kernels = list(kernels)
        super().__init__(
            [self.matrix(kernel, kernel.detach()) for kernel in self.kernels], lr, **options
        )

    @staticmethod
    def matrix(kernel, values):
        """`values`, like `kernel` (out, in, k, k), as a matrix (out, in * k * k): a view, in both memory formats."""
        return (
            values.flatten(1) if kernel.is_contiguous() else values.permute(0, 2, 3, 1).flatten(1)
        )

    def step(self):
        for kernel, matrix in zip(self.kernels, self.param_groups[0]["params"]):
            matrix.grad = self.matrix(kernel, kernel.grad)
        super().step()
        for matrix in self.param_groups[0]["params"]:
            matrix.grad = (
                None  # it would keep the memory of this gradient while the next one is computed
            )


def restore_optimizer(optimizer, saved):
    """Load a saved state_dict() into an optimiser; ValueError if it does not fit the parameters."""
    if type(optimizer) not in (
        Muon,
        torch.optim.AdamW,
    ):  # one of your own: what it keeps is its own affair
        optimizer.load_state_dict(saved)
        return
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})
    for parameter, values in optimizer.state.items():
        for value in values.values():
            if not isinstance(value, (int, type(None))) and getattr(value, "shape", None) not in (
                parameter.shape,
                (),
            ):
                raise ValueError("the state of its optimisers does not fit the network")


# The fields of TrainConfig that a SimpleDiffusion takes; a test compares them with its signature.
MODEL_OPTIONS = (
    "image_size",
    "hidden_channels",
    "channel_mults",
    "num_res_blocks",
    "attention_levels",
    "num_heads",
    "dropout",
    "n_steps",
    "schedule",
    "prediction",
    "t_distribution",
)


def begin_model(kind, config, in_channels, class_names):
    """The SimpleDiffusion (`kind`) that a run begins with: as its options say, or with --init what that file holds.

    An option that contradicts the file is a ValueError, unless no weight depends on it.
    """
    class_names = None if config.unconditional else class_names
    options = {
        name: getattr(config, name) for name in MODEL_OPTIONS if getattr(config, name) is not None
    }
    if config.init is None:
        return kind(class_names=class_names, in_channels=in_channels, **options)
    source = kind.load(config.init, "cpu")
    # The command line knows which flags were given; from Python it is the size, and what differs from its default.
    given = getattr(config, "given", {"image_size"})
    theirs = {**source.network.config, **source.diffusion.config, "class_names": class_names}
    theirs["num_classes"] = None if class_names is None else len(class_names)
    for name, ours in options.items():
        if name in ("image_size", "dropout", "t_distribution"):
            theirs[name] = ours
        elif (name in given or ours != getattr(type(config), name)) and not agree(
            name, ours, theirs[name]
        ):
            raise ValueError(
                f"{flag_of(name)} {ours} contradicts --init {config.init}, which has {theirs[name]}"
            )
    size = source.image_size
    if size != config.image_size and "image_size" not in given:
        raise ValueError(
            f"--init {config.init} draws {size}x{size} pixels: give --image-size {size}, or another"
        )
    return with_weights_of(source, kind(**theirs))


def agree(name, option, value):
    """Whether an option is what a checkpoint has; one number of residual blocks stands for all levels."""
    if name == "num_res_blocks" and len(option) == 1:
        option = option * len(value)
    return list(option) == value if isinstance(option, tuple) else option == value


def origin_of(path):
    """What model_info.json says of the checkpoint of --init, if there is one."""
    return (
        {}
        if path is None
        else dict(init=path, init_sha256=hashlib.sha256(Path(path).read_bytes()).hexdigest())
    )


@torch.no_grad()
def with_weights_of(source, model):
    """`model`, a SimpleDiffusion of the same sizes, with the weights of `source`. Its classes may be others.

    They go by their names. A class that `source` does not know begins as its null class, which is also what a network
    without classes draws.
    """
    weights = source.network.state_dict()
    classes = weights.pop(
        "class_embedding.weight", torch.zeros(1, source.network.config["time_dim"])
    )
    model.network.load_state_dict(weights, strict=False)  # all but those of the classes
    known, names = source.class_names or [], model.class_names
    if names is None:
        model.network.time_mlp[-1].bias += classes[-1]
    else:
        rows = [known.index(name) if name in known else -1 for name in names]
        model.network.class_embedding.weight.copy_(classes[[*rows, -1]])
    return model


def with_channels(images, channels):
    """Images (N, C, S, S) with as many channels as the network has: grey ones are repeated for one in colour."""
    if images.shape[1] > channels:
        raise ValueError("--init: its network draws in grey, and these images are in colour")
    return images.expand(-1, channels, -1, -1)


# A run's other options must be as they were, or it would be another run. A new lr can rescue one whose loss blew up.
MAY_CHANGE_ON_RESUME = (
    "out",
    "epochs",
    "images",
    "lr",
    "sample_every",
    "device",
    "compile",
    "tensorboard",
    "restart",
)


def changed_options(before, now):
    """What differs between the TrainConfigs of two starts of a run and must not, in words."""
    return [
        f"{flag_of(entry.name)} {getattr(before, entry.name)}, not {getattr(now, entry.name)}"
        for entry in fields(now)
        if entry.name not in MAY_CHANGE_ON_RESUME
        and getattr(before, entry.name) != getattr(now, entry.name)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What a run says and shows


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def describe(run):
    """What the checkpoint of a run is: a dict of numbers and strings."""
    config = run.config
    name = "CIFAR-10" if is_cifar10(config.data) else Path(config.data).resolve().name
    ours = is_cifar10(config.data) or config.data == "shapes"  # not a picture folder of this name
    return dict(
        architecture=f"SimpleUNet {run.model.network.config}",
        parameters=count_parameters(run.model),
        dataset=name,
        images_seen=run.step * run.batch_size,
        epochs=len(run.epoch_losses),
        batch_size=run.batch_size,
        learning_rate=config.lr,
        optimizer=" and ".join(type(optimizer).__name__ for optimizer in run.optimizers)
        + ", cosine decay",
        **run.model.diffusion.config,
        **run.origin,
        final_loss=round(run.epoch_losses[-1], 5),
        training_minutes=round(run.seconds / 60, 1),
        device=str(run.images.device),
        torch=str(torch.__version__),
        date=time.strftime("%Y-%m-%d"),
        license="MIT" if ours else "not stated",
    )


class Report:
    """The lines, the progress bar and the pictures of a run, and its exports."""

    def __init__(self, run, resumed, precision):
        from tqdm import tqdm

        self.run = run
        self.first = run.processes.rank == 0
        self.shown = time.monotonic()
        self.began = run.step, run.seconds  # an earlier start may have been elsewhere
        self.announce(resumed, precision)
        self.writer = self.tensorboard_writer() if run.config.tensorboard and self.first else None
        if self.first and not resumed:
            self.first_files()
        self.bar = tqdm(
            total=run.total_steps * run.batch_size,
            initial=run.step * run.batch_size,
            unit=" images",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not self.first or not sys.stderr.isatty(),
        )

    def announce(self, resumed, precision):
        run, config, network = self.run, self.run.config, self.run.model.network
        hint = (
            "; few steps: --images 200000 trains longer"
            if run.total_steps < 1000 and not config.init
            else ""
        )
        copies = (
            "; so few may be memorised: see samples/nearest.png" if len(run.images) < 1000 else ""
        )
        few = (
            f" (--batch-size {config.batch_size}: there are fewer)"
            if run.batch_size < config.batch_size
            else ""
        )
        names = run.model.class_names or []
        more = ", ..." if len(names) > 10 else ""
        classes = f"{len(names)} classes: {', '.join(names[:10])}{more}" if names else "no classes"
        again = (
            f"going on after step {run.step} from {run.out / 'training_state.pth'} with learning rate "
            f"{config.lr:g} (--restart begins again)\n"
        )
        run.processes.say(
            f"{again if resumed else ''}device    {run.images.device}, {precision}\n"
            f"network   {count_parameters(network) / 1e6:.1f} M parameters, {classes}\n"
            f"data      {len(run.images):,} images of {config.data}, {config.image_size} pixels wide{copies}\n"
            f"training  {run.epochs} epochs of {run.steps_per_epoch} steps, batch {run.batch_size}{few}, "
            f"learning rate {config.lr:g}{hint}\n"
            f"files     {run.out}"
        )

    def tensorboard_writer(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "--tensorboard needs one more package: pip install tensorboard"
            ) from None
        # purge_step: a run that was killed may have written a later epoch, which now comes again.
        run = self.run
        return SummaryWriter(
            run.out / "tensorboard", purge_step=run.step - run.step % run.steps_per_epoch + 1
        )

    def first_files(self):
        """Before the first step: keep an older checkpoint, show what the network is fed, save the state."""
        run, samples = self.run, self.run.out / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        names = ("diffusion_model.pth", "model_info.json")
        endings = (
            f".bak{n if n > 1 else ''}" for n in range(1, 10**6)
        )  # .bak, .bak2, ...: none is overwritten
        ending = next(
            end for end in endings if not any((run.out / (name + end)).exists() for name in names)
        )
        for name in names:
            if (run.out / name).exists():
                shutil.copyfile(run.out / name, run.out / (name + ending))
        x, _ = run.batch(torch.arange(min(64, len(run.images))))
        save_grid((x + 1) / 2, samples / "data.png", columns=8)
        process, config = type(run.model.diffusion), run.model.diffusion.config
        processes = {
            schedule: process(None, **{**config, "schedule": schedule})
            for schedule in ("linear", "cosine")
        }
        plot_noising(x[0].cpu(), processes, config["schedule"], samples / "noising.png")
        run.save()  # now, so that a full disk is noticed at once

    def step(self):
        """Move the bar, which shows the loss once a second; without a terminal, a line every five minutes.

        Not in each step: reading a loss waits for the GPU.
        """
        run, terminal = self.run, sys.stderr.isatty()
        self.bar.update(run.batch_size)
        if time.monotonic() - self.shown > (1 if terminal else 300):
            self.shown = time.monotonic()
            recent = run.fetch_losses()[-100:]
            loss = f"{sum(recent) / len(recent):.4f}"
            if terminal:
                self.bar.set_postfix(loss=loss)
            else:
                run.processes.say(f"step {run.step}/{run.total_steps}  loss {loss}")

    def epoch(self, losses):
        """A line for the epoch that has ended; every few epochs, and after the last, samples and an export."""
        run, epoch = self.run, len(self.run.epoch_losses)
        if not self.first:
            return
        if self.writer:
            for step, loss in enumerate(losses, start=run.step - len(losses) + 1):
                self.writer.add_scalar("loss", loss, step)
            self.writer.flush()  # by itself it writes every two minutes, and not at the end
        first_step, seconds_before = self.began
        speed = (run.step - first_step) * run.batch_size / max(run.seconds - seconds_before, 1e-9)
        minutes_left = (run.total_steps - run.step) * run.batch_size / speed / 60
        self.bar.write(
            f"epoch {epoch:3d}/{run.epochs}  loss {run.epoch_losses[-1]:.4f}  {speed:.0f} images/s  "
            f"{minutes_left:.0f} minutes left",
            file=sys.stdout,
        )
        sys.stdout.flush()
        # Where --images counts, an epoch can take a second: at most twenty grids in all.
        every = run.config.sample_every if run.config.images is None else math.ceil(run.epochs / 20)
        if epoch % every == 0 or epoch == run.epochs:
            self.export()
        if epoch == run.epochs:
            checkpoint = quoted(run.out / "diffusion_model.pth")
            self.bar.write(
                f"wrote {checkpoint}; draw from it: python inference_example.py --checkpoint {checkpoint}",
                file=sys.stdout,
            )

    def export(self):
        """Write diffusion_model.pth, what it is to model_info.json, and four samples that are drawn from it."""
        run, checkpoint, info = self.run, self.run.out / "diffusion_model.pth", describe(self.run)
        run.ema.save(checkpoint, **info)
        # Only model_info.json has the checksum: a file cannot hold its own.
        info["sha256"] = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        temporary = run.out / "model_info.json.tmp"
        temporary.write_text(json.dumps(info, indent=2) + "\n")
        os.replace(temporary, run.out / "model_info.json")
        # Drawn from the file, so that the grid shows what inference_example.py draws with --guidance 1.
        model = type(run.ema).load(checkpoint, run.images.device)
        labels = None if run.labels is None else [i % model.network.num_classes for i in range(4)]
        images = model.sample(4, y=labels, seed=run.config.seed, progress=False)
        save_grid(images, run.out / "samples" / f"epoch_{len(run.epoch_losses):04d}.png", columns=2)
        # Below each the training picture that is most like it: whoever has few pictures can see what is a copy.
        alike = most_alike(images, run.images, mirrored=not run.config.no_flip)
        save_grid(torch.cat([images, alike]), run.out / "samples" / "nearest.png", columns=4)
        plot_losses(run.epoch_losses, run.out / "samples" / "loss.png")
