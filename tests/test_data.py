"""What a run learns from: CIFAR-10, folders of pictures of every kind, shapes, and its batches."""

import math
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import error_of, flags, other_defaults, spy
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms.functional import pil_to_tensor

import diffusion_model as dm
from diffusion_model import load_images

pytestmark = pytest.mark.usefixtures("here")
RED, BLUE, WHITE, GREY = (255, 0, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)


def save(path, colour=RED, mode="RGB", size=(9, 9), **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


# ---- CIFAR-10


@pytest.fixture
def cifar(here, monkeypatch):
    """A CIFAR-10 of ten pictures in ./elsewhere, which can be "downloaded" into a folder that is not
    there yet: -> rows, labels."""
    rows = np.random.default_rng(0).integers(0, 256, (10, 3 * 32 * 32), dtype=np.uint8)
    labels = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    batch, meta = dict(data=rows, labels=labels), dict(label_names=list("abcdefghij"))
    Path("elsewhere/cifar-10-batches-py").mkdir(parents=True)
    for name, contents in (("data_batch_1", batch), ("batches.meta", meta)):
        Path("elsewhere/cifar-10-batches-py", name).write_bytes(pickle.dumps(contents))
    monkeypatch.setattr(CIFAR10, "train_list", [("data_batch_1", None)])  # without a checksum
    monkeypatch.setattr(CIFAR10, "test_list", [])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    download = lambda url, root, **_: shutil.copytree("elsewhere", root)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", download)
    return torch.from_numpy(rows.reshape(10, 3, 32, 32)), labels


def test_cifar10(cifar):
    """It is downloaded into ./data, once. A folder that holds cifar-10-batches-py is used where it
    is. Another size is resized as PIL does it, to one grey level."""
    rows, labels = cifar
    for data in ("cifar10", "cifar10", "elsewhere"):
        images, found, class_names = load_images(data)
        assert torch.equal(images, rows) and images.dtype == torch.uint8
        assert found.tolist() == labels and found.dtype == torch.int64
        assert class_names == list("abcdefghij")
    assert Path("data/cifar-10-batches-py").is_dir()
    images, found, _ = load_images(Path("elsewhere"), 16, limit=3)
    assert images.shape == (3, 3, 16, 16) and found.tolist() == labels[:3]
    for image, row in zip(images, rows):
        small = Image.fromarray(row.permute(1, 2, 0).numpy()).resize((16, 16), Image.BILINEAR)
        assert (image.int() - pil_to_tensor(small).int()).abs().max() <= 1


def test_cifar10_that_cannot_be_had(cifar, capsys):
    """If it cannot be downloaded, or a file of the folder is damaged, one line says what to fetch,
    where to put it, and what to do without it."""
    Path("elsewhere/cifar-10-batches-py/data_batch_1").write_bytes(b"half")
    Path("data").touch()  # so that nothing can be written there
    for data, folder in (("cifar10", "data"), ("elsewhere", "elsewhere")):
        line = error_of(dm.main, capsys, *flags(data=data))
        for words in (CIFAR10.url, str(Path(folder).resolve()), "--data shapes"):
            assert words in line


# ---- Shapes


def test_shapes():
    """The same for a seed, whatever torch's random state and defaults, which stay as they are."""
    before = torch.get_rng_state()
    images, labels, class_names = load_images("shapes", 12, 500)
    assert torch.equal(torch.get_rng_state(), before)
    assert images.shape == (500, 3, 12, 12) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and set(labels.tolist()) == set(range(len(class_names)))
    assert len(images.flatten(1).unique(dim=0)) == 500
    assert len(load_images("shapes", 4)[0]) >= 1000
    torch.manual_seed(7)
    with other_defaults():
        again = dm.draw_shapes(12, 500)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(images, dm.draw_shapes(12, 500, seed=1)[0])


def test_shapes_are_what_their_names_say():
    """The share of its bounding box that a shape covers: pi / 4 for a circle, 1 for a square, 1 / 2
    for a diamond and a triangle, and a ring of the radii 0.45 and 0.95 has pi (0.95^2 - 0.45^2)
    of 1.9^2."""
    images, labels, class_names = load_images("shapes", 64, 300)
    ring = math.pi * (0.95**2 - 0.45**2) / 1.9**2
    wanted = dict(circle=math.pi / 4, square=1, diamond=0.5, triangle=0.5, ring=ring)
    shares = {name: [] for name in class_names}
    for image, label in zip(images.float().mean(dim=1), labels):
        mask = image > (image.min() + image.max()) / 2
        rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].float()
        if min(rows[0], columns[0]) > 0 and max(rows[-1], columns[-1]) < 63:  # all of it is seen
            shares[class_names[label]].append(box.mean().item())
    assert shares.keys() == wanted.keys()
    for name, found in shares.items():
        assert np.median(found) == pytest.approx(wanted[name], abs=0.04), name


# ---- Folders


@pytest.fixture
def expected(here):
    """Pictures of every kind: -> {file: the colours of its left and of its right half}."""
    colours = {}

    def put(name, picture, left, right=None, **options):
        path = Path("pictures", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, **options)
        colours[path] = left, right or left

    def new(mode, colour, size=(20, 20)):
        return Image.new(mode, size, colour)

    def deep(value):
        return Image.fromarray(np.full((20, 20), value, np.uint16))

    palette, turned, wide = new("P", 1), new("RGB", RED, (40, 20)), new("RGB", WHITE, (2000, 30))
    palette.putpalette([0, 255, 0, *RED])
    turned.paste(BLUE, (0, 10, 40, 20))  # red above blue: turned to the right, blue left of red
    wide.paste(RED, (985, 0, 1015, 30))
    orientation = Image.Exif()
    orientation[0x0112] = 6
    half = new("RGBA", (*RED, 255))
    half.paste((*BLUE, 0), (0, 0, 10, 20))
    fine = dict(quality=95, subsampling=0)
    put("grey.png", new("L", 128), GREY)
    put("palette.png", palette, RED)
    put("cmyk.jpg", new("CMYK", (0, 255, 255, 0)), RED, **fine)
    put("rgba.png", half, WHITE, RED)
    put("grey and transparent.png", new("LA", (0, 0)), WHITE)
    put("transparent palette.png", palette, WHITE, transparency=1)
    put("transparent red.png", new("RGB", RED), WHITE, transparency=RED)
    put("white 16 bit.png", deep(65535), WHITE)
    put("grey 16 bit.png", deep(32896), GREY)
    put("nearly black 16 bit.png", deep(200), (1, 1, 1))
    put("one pixel.bmp", new("RGB", BLUE, (1, 1)), BLUE)
    put("wide.webp", wide, RED, lossless=True)
    put("TURNED.JPEG", turned, BLUE, RED, exif=orientation, **fine)
    put("moving.GIF", new("RGB", RED), RED, save_all=True, append_images=[new("RGB", BLUE)])
    put("rare.tga", new("RGB", RED), RED)
    put("rare.jfif", new("RGB", RED), RED, format="JPEG", **fine)
    put("deep/er/blue.tiff", new("RGB", BLUE), BLUE)
    return colours


def test_pictures_of_every_kind(expected):
    """They become upright, RGB, white where they are transparent, and a square of their middle.
    Hidden files and folders are left alone."""
    for hidden in ("pictures/.hidden.png", "pictures/.thumbnails/small.png"):
        save(hidden)
    images, labels, class_names = load_images("pictures", 16)
    assert images.shape == (len(expected), 3, 16, 16) and images.dtype == torch.uint8
    assert labels is None and class_names is None
    wrong = []
    for path, image in zip(sorted(expected), images):
        for half, colour in zip((image[:, 4:12, 2:5], image[:, 4:12, 11:14]), expected[path]):
            found = half.float().mean(dim=(1, 2))
            if (found - torch.tensor(colour)).abs().max() > (30 if "TURNED" in path.name else 3):
                wrong.append(f"{path.name}: {found.tolist()}, not {colour}")
    assert not wrong


def test_a_photograph():
    """A large JPEG is scaled and cropped to its middle. Of a picture whose brightness rises evenly,
    each pixel is what the large one is at its centre, here at 500 + 125 (i + 1/2) in x."""
    x, y = np.meshgrid(np.arange(3000) + 0.5, np.arange(2000) + 0.5)
    photo = np.stack([x / 12, y / 8, 0 * x + 40], axis=2).astype(np.uint8)
    Path("photos").mkdir()
    Image.fromarray(photo).save("photos/1.jpg", quality=95)
    images, _, _ = load_images("photos", 16)
    middle = 125 * (torch.arange(16) + 0.5)
    wanted = torch.stack([(500 + middle).expand(16, 16) / 12, middle.expand(16, 16).T / 8])
    assert (images[0, :2] - wanted).abs().max() < 4 and (images[0, 2].int() - 40).abs().max() < 4


def test_grey_pictures():
    """Where all are grey, there is one channel, also where a file holds three. One in colour among
    them, and there are three."""
    save("data/1.png", 90, mode="L")
    save("data/2.png", (70, 70, 70))
    assert load_images("data", 4)[0][:, :, 2, 2].tolist() == [[90], [70]]
    save("data/3.png", (70, 70, 71))
    assert load_images("data", 4)[0][:, :, 2, 2].tolist() == [[90] * 3, [70] * 3, [70, 70, 71]]


def test_folders_are_classes(capsys, monkeypatch):
    """The immediate subfolders, in the order of their names, with what lies deeper in them. Limit
    takes the first pictures, and ~ is the user's own folder."""
    for name, colour in {"cat/a/1.png": RED, "cat/2.png": RED, "bird/1.png": BLUE}.items():
        save("data/" + name, colour)
    monkeypatch.setenv("HOME", os.getcwd())
    for data in ("data", Path("data"), "data/", os.path.abspath("data"), "~/data"):
        images, labels, class_names = load_images(data, 8)
        assert class_names == ["bird", "cat"] and labels.tolist() == [0, 1, 1]
        assert labels.dtype == torch.int64
        assert images[:, :, 4, 4].tolist() == [[0, 0, 255], [255, 0, 0], [255, 0, 0]]
    assert "1 bird, 2 cat" in capsys.readouterr().out
    assert load_images("data", 8, limit=2)[1].tolist() == [0, 1]
    with other_defaults():
        images, labels, _ = load_images("data", 8)
    assert images.device.type == labels.device.type == "cpu"


def test_linked_folders(monkeypatch):
    """A class may be a link. A link that leads back to a folder in which it lies is not followed,
    nor are two folders that hold links to each other: each picture counts once in its class."""
    listed = []

    def listing(path):
        listed.append(path)
        assert len(listed) < 500, "it goes round and round"

    spy(monkeypatch.setattr, os, "scandir", listing)
    save("far away/1.png", BLUE)
    save("data/cat/1.png")
    links = {"dog": "../far away", "cat/self": ".", "cat/up": "..", "loop": "loop"}
    links.update({"top": "..", "cat/gone.png": "nowhere"})
    for name, target in links.items():
        os.symlink(target, "data/" + name)
    images, labels, class_names = load_images("data", 8)
    assert class_names == ["cat", "dog"] and labels.tolist() == [0, 1]
    assert images[:, 2, 4, 4].tolist() == [0, 255]

    for name, other in (("a", "b"), ("b", "a")):
        save(f"pair/{name}/{name}.png")
        os.symlink(f"../{other}", f"pair/{name}/link")
    _, labels, class_names = load_images("pair", 8)
    assert class_names == ["a", "b"] and labels.tolist() == [0, 0, 1, 1]  # a, link/b and b, link/a


def test_what_is_not_read_is_said(capsys, monkeypatch):
    """A folder that may not be read, a picture that is broken, and how many files of which endings
    were ignored."""
    for name in ("a/fine.jpg", "b/half.png", "c/fine.jpg", "d/x.jpg"):
        save("data/" + name, size=(300, 300))
    half = Path("data/b/half.png")
    half.write_bytes(half.read_bytes()[:200])
    Path("data/b/empty.png").touch()
    for name in ("b/text.png", "a/1.svg", "a/2.svg", "b/3.SVG", "notes.txt", "c/README"):
        Path("data", name).write_text("no picture")

    def forbid(path):
        if Path(path).name == "d":
            raise PermissionError(13, "Permission denied", str(path))

    spy(monkeypatch.setattr, os, "scandir", forbid)
    images, labels, class_names = load_images("data", 8)
    assert len(images) == 2 and labels.tolist() == [0, 1] and class_names == ["a", "c"]
    lines = capsys.readouterr().out.splitlines()
    for name in ("half.png", "empty.png", "text.png"):
        assert len([line for line in lines if "skipped" in line and name in line]) == 1
    (line,) = [line for line in lines if "ignored" in line]
    assert all(words in line for words in ("3 .svg", "1 .txt", "1 without ending"))
    assert any("Permission denied" in line and str(Path("data/d")) in line for line in lines)


def test_folders_that_make_no_classes(capsys):
    """A picture beside the class folders turns classes off. A single class is none, as it comes of
    an archive unpacked into one folder too many. Both are said, with a name to look for."""
    for name in ("unpacked/cats/1.png", "unpacked/dogs/1.png"):
        save(name)
    assert load_images(".", 8)[2] == ["unpacked"]
    out = capsys.readouterr().out
    assert "one class" in out and "--data unpacked" in out
    save("unpacked/stray.png")
    images, labels, class_names = load_images("unpacked", 8)
    assert len(images) == 3 and labels is None and class_names is None
    out = capsys.readouterr().out
    assert "no classes" in out and "stray.png" in out
    os.makedirs("flat")
    os.rename("unpacked/stray.png", "flat/1.png")
    assert load_images("flat", 8)[1:] == (None, None)
    assert "no classes" not in capsys.readouterr().out  # nobody expects any


@pytest.mark.parametrize(
    "data, words",
    [
        ("file.png", "file.png is no folder"),
        ("nowhere", "nowhere is no folder.*shapes"),
        ("empty", "empty holds no picture"),
        ("broken", "broken holds no picture"),
    ],
)
def test_data_that_is_not_there(capsys, data, words):
    """A file given for a folder, and folders that are missing or hold nothing of use."""
    save("file.png")
    os.makedirs("empty/er")
    os.makedirs("broken")
    Path("broken/1.png").write_text("no picture")
    assert re.search(words, error_of(dm.main, capsys, *flags(data=data, out="out")))
    assert not Path("out").exists()


# ---- Batches


def test_training_batch():
    """Of 10,000 images at given places half are mirrored, and apart from that a tenth lose their
    label. With 10,000 coins the shares err by less than 0.02 (four standard deviations)."""
    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (50, 3, 2, 4), dtype=torch.uint8), torch.arange(50) % 7
    before, index = images.clone(), torch.randint(0, 50, (10_000,))
    x, y = dm.training_batch(images, labels, index, num_classes=7)
    wanted = before[index].float() / 127.5 - 1
    mirrored = (x == wanted.flip(3)).flatten(1).all(dim=1)
    assert torch.equal(x[~mirrored], wanted[~mirrored]) and torch.equal(images, before)
    dropped = y == 7
    assert torch.equal(y[~dropped], labels[index][~dropped]) and y.dtype == torch.int64
    shares = [each.float().mean().item() for each in (mirrored, dropped, mirrored & dropped)]
    assert shares == pytest.approx([0.5, 0.1, 0.05], abs=0.02)

    x, y = dm.training_batch(images, None, index, None, flip=False)
    assert y is None and torch.equal(x, wanted)
    assert x.min() == -1 and x.max() == 1 and x.dtype == torch.float32
