"""inference_example.py: each of its features, by the command line and by its functions, on tiny checkpoints."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY, error_of, perturb, run

import diffusion_model
import support
import inference_example
from inference_example import generate_images, interpolated_noise

SIZE = 8


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_model):
    """The working folder, with diffusion_model.pth (classes a, b, c) and without_classes.pth in it."""
    monkeypatch.chdir(tmp_path)
    tiny_model.save()
    perturb(diffusion_model.SimpleDiffusion(SIZE, **TINY)).save("without_classes.pth")
    return tmp_path


def pixels(path):
    return np.asarray(Image.open(path))


def close(a, b):
    """Equal but for rounding: the same pictures in another batch, whose sums may be done in another order."""
    return np.abs(a.astype(int) - b.astype(int)).max() <= 2


def draw(*args, out="out.png"):
    """Run the command line on the CPU, three steps unless told (guidance acts in the second): -> the grid."""
    args = list(map(str, args)) if "--steps" in args else [*map(str, args), "--steps", "3"]
    inference_example.main([*args, "--device", "cpu", "--out", out])
    return pixels(out)


def draw_each(folder, *args):
    """-> the pixels of the single files, in their order."""
    draw(*args, "--save-each", folder)
    return [pixels(path) for path in sorted(folder.iterdir())]


def tiles(grid, columns):
    """The pictures of a grid, row by row, back in their own size. The border is two pixels wide."""
    step = (grid.shape[1] - 2) // columns
    scale = (step - 2) // SIZE
    return [
        grid[y + 2 : y + step : scale, x + 2 : x + step : scale]
        for y in range(0, grid.shape[0] - step, step)
        for x in range(0, grid.shape[1] - step, step)
    ]


def save_picture(path, shape, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(values).save(path)
    return values


def test_without_flags(here):
    """A row of eight a class; three lines that say what was done; the same pictures at the second time."""
    first = run("inference_example.py", cwd=here)
    assert first.returncode == 0 and first.stderr == "", first.stderr
    out = here / "samples" / "generated.png"
    lines = first.stdout.splitlines()
    assert (
        len(lines) == 3
        and lines[0].endswith("a, b, c")
        and "dpm++, 13 steps" in lines[1]
        and str(out) in lines[2]
    )
    once = pixels(out)
    grid = draw("--steps", 13, "--save-each", "each", out=str(out))
    assert close(grid, once)  # the first may have been drawn on a GPU
    found = tiles(grid, 8)
    assert len(found) == 24
    for i, path in enumerate(sorted((here / "each").iterdir())):
        assert path.name == f"{i:05d}_{'abc'[i // 8]}.png" and np.array_equal(
            pixels(path), found[i]
        )


def test_without_classes(here):
    """Sixteen pictures, four by four; files without a class; drawn without guidance."""
    assert len(draw_each(here / "each", "--checkpoint", "without_classes.pth")) == 16
    assert sorted(path.name for path in (here / "each").iterdir())[15] == "00015.png"
    height, width, _ = pixels("out.png").shape
    assert height == width == 2 + 4 * (2 + SIZE * 16)


@pytest.mark.parametrize("n", [1, 7, 10, 17])
def test_exactly_n(here, n):
    """17 is more than a batch; the classes come in turn; picture i does not depend on how many there are."""
    images = draw_each(here / "each", "-n", n)
    assert len(images) == n and all(image.shape == (SIZE, SIZE, 3) for image in images)
    assert (here / "each" / f"{n - 1:05d}_{'abc'[(n - 1) % 3]}.png").exists()
    fewer = draw_each(here / "fewer", "-n", 3)
    assert all(close(a, b) for a, b in zip(images, fewer))
    if n == 17:
        single = draw(
            "-n", 1, "--class", "b", "--seed", 16
        )  # what the second batch begins with: label 16 % 3 = 1
        assert close(single[:: 128 // SIZE, :: 128 // SIZE], images[16])
        assert not close(images[0], images[3])


def test_class_rows(here):
    """Rows in the order of the names; `all` stands for all."""
    found = tiles(draw("--class", "c", "a", "-n", 2), 2)
    model = diffusion_model.SimpleDiffusion.load(device="cpu")
    wanted = generate_images(
        model,
        4,
        [2, 2, 0, 0],
        seed=0,
        steps=3,
        guidance=inference_example.GUIDANCE,
        guidance_interval=inference_example.INTERVAL,
        progress=False,
    )
    wanted = support.to_uint8(wanted).permute(0, 2, 3, 1).numpy()
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted))
    assert np.array_equal(draw("--class", "all", "-n", 2), draw("--class", "a", "b", "c", "-n", 2))


def test_seed_and_guidance_change_the_pictures(here):
    plain = draw("-n", 3)
    assert np.array_equal(
        plain, draw("-n", 3, "--seed", 0, "--guidance", inference_example.GUIDANCE)
    )
    assert not np.array_equal(plain, draw("-n", 3, "--seed", 1))
    assert not np.array_equal(plain, draw("-n", 3, "--guidance", 8))


def test_every_sampler(here):
    grids = [
        draw("-n", 2, "--sampler", sampler, "--steps", 5) for sampler in ("ddpm", "ddim", "dpm++")
    ]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(grids, 2))


@pytest.mark.parametrize("checkpoint", ["diffusion_model.pth", "without_classes.pth"])
def test_init_image_and_mask(here, capsys, checkpoint):
    """Strength 0 is the picture itself. Under a mask black is kept to the bit, white repainted; grey is the nearer."""
    picture = save_picture("init.png", (SIZE, SIZE, 3))
    start = ["--checkpoint", checkpoint, "--init-image", "init.png", "-n", 2]
    assert all(
        np.array_equal(image, picture)
        for image in draw_each(here / "zero", *start, "--strength", 0)
    )
    images = draw_each(here / "some", *start, "--strength", 0.5, "--steps", 10)
    assert "up to 10 steps" in capsys.readouterr().out  # it made five of them
    assert not np.array_equal(images[0], picture) and not np.array_equal(images[0], images[1])

    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:2], mask[2:4], mask[4:6] = 255, 128, 127
    Image.fromarray(mask).save("mask.png")
    for i, image in enumerate(draw_each(here / "mask", *start, "--mask", "mask.png")):
        assert np.array_equal(image[4:], picture[4:]) and (image[:4] != picture[:4]).mean() > 0.9, i


@pytest.mark.parametrize(
    "mode, shape", [("L", (8, 8)), ("RGBA", (30, 9)), ("RGB", (130, 200)), ("P", (5, 5))]
)
def test_odd_init_images(here, mode, shape):
    """Any size and mode: what is drawn at strength 0 is what the reader of the training data makes of it."""
    save_picture("any.png", (*shape, 4))
    Image.open("any.png").convert(mode).save("any.png")
    (image,) = draw_each(here / "each", "-n", 1, "--init-image", "any.png", "--strength", 0)
    assert np.array_equal(image, support.read_picture("any.png", SIZE).permute(1, 2, 0).numpy())


def test_a_grey_network_starts_from_any_picture(here):
    """The picture is made grey for it."""
    perturb(diffusion_model.SimpleDiffusion(SIZE, **TINY, in_channels=1)).save("grey.pth")
    save_picture("init.png", (SIZE, SIZE, 3))
    (image,) = draw_each(
        here / "each",
        "--checkpoint",
        "grey.pth",
        "-n",
        1,
        "--init-image",
        "init.png",
        "--strength",
        0,
    )
    assert (
        np.abs(image[..., 0] - np.asarray(Image.open("init.png").convert("L")).astype(int)).max()
        <= 1
    )


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_interpolation(here, sampler):
    """The ends of each row are the plain pictures of the two seeds, and no two neighbours are equal."""
    rows = draw_each(
        here / "rows", "--interpolate", 3, 11, "--class", "c", "a", "--sampler", sampler
    )
    assert len(rows) == 16 and not any(np.array_equal(a, b) for a, b in zip(rows[:7], rows[1:8]))
    for row, seed, name in ((0, 3, "c"), (7, 11, "c"), (8, 3, "a"), (15, 11, "a")):
        (plain,) = draw_each(
            here / f"{row}", "-n", 1, "--seed", seed, "--class", name, "--sampler", sampler
        )
        assert close(rows[row], plain)
    assert (
        len(
            draw_each(
                here / "none", "--checkpoint", "without_classes.pth", "--interpolate", 1, 2, "-n", 3
            )
        )
        == 3
    )
    assert (
        len(draw_each(here / "steps", "--interpolate", 3, 11, "--class", "c", "--denoising")) == 8
    )


def test_a_bar_over_several_batches(here, monkeypatch):
    """Unless told otherwise, as in SimpleDiffusion.sample."""
    shown, model = [], diffusion_model.SimpleDiffusion.load("diffusion_model.pth", "cpu")
    monkeypatch.setattr(
        inference_example, "progress_bar", lambda steps, show: shown.append(bool(show)) or steps
    )
    for count, options in ((17, {}), (17, dict(progress=False)), (16, {})):
        generate_images(model, count, steps=1, **options)
    assert shown == [True, False, False]


def test_interpolated_noise_is_as_strong_as_noise():
    """The norms lie within 2 % of those of the ends; in the middle of the straight line it would be 0.71 of them."""
    noise = interpolated_noise(diffusion_model.SimpleDiffusion(32, **TINY), 3, 8)
    norms = noise.flatten(1).norm(dim=1)
    assert 0.98 * min(norms[0], norms[-1]) < norms.min() and norms.max() < 1.02 * max(
        norms[0], norms[-1]
    )
    assert torch.equal(noise[0], torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(3)))


def test_denoising(here, capsys):
    """x_t above x_0 at ten moments, the last of which is the plain picture in both rows; and a moving picture."""
    strip = tiles(draw("--denoising", "-n", 2, "--steps", 12), 10)
    assert (
        str(here / "out.png") in (said := capsys.readouterr().out) and str(here / "out.gif") in said
    )
    plain = tiles(draw("-n", 2, "--steps", 12, out="plain.png"), 2)
    assert len(strip) == 40 and strip[0].std() > 80  # which begins with noise
    assert all(np.array_equal(strip[i], plain[i // 20]) for i in (9, 19, 29, 39))
    with Image.open("out.gif") as film:
        assert film.n_frames > 1 and film.size[0] == film.size[1]


def test_grid_of_training_is_what_inference_draws(here):
    """The same checkpoint, seed, labels and steps make the same file."""
    config = diffusion_model.TrainConfig(
        data="shapes",
        image_size=SIZE,
        limit=64,
        epochs=1,
        batch_size=32,
        out="run",
        device="cpu",
        seed=5,
        **{key: value for key, value in TINY.items() if key != "time_dim"},
    )
    model = diffusion_model.train(config)
    assert model.class_names
    draw(
        "--checkpoint",
        "run/diffusion_model.pth",
        "-n",
        4,
        "--seed",
        5,
        "--guidance",
        1,
        "--steps",
        13,
    )
    assert np.array_equal(pixels("run/samples/epoch_0001.png"), pixels("out.png"))
    exported = diffusion_model.SimpleDiffusion.load("run/diffusion_model.pth", device="cpu")
    images = exported.sample(4, y=[0, 1, 2, 3], seed=5, progress=False)
    assert torch.equal(images, generate_images(exported, 4, [0, 1, 2, 3], seed=5, progress=False))


@pytest.mark.parametrize(
    "flags",
    [
        "--interpolate 1 2 --init-image init.png",
        "--interpolate 1 2 --sampler ddpm",
        "--interpolate 1 2 --denoising --class a",
        "--interpolate 1 2 -n 1",
        "--interpolate 4 4",
    ],
)
def test_harmless_combinations(here, flags):
    """They draw."""
    save_picture("init.png", (SIZE, SIZE, 3))
    assert draw(*flags.split()).std() > 0


@pytest.mark.parametrize(
    "flags, plain",
    [
        ("-n 2 --strength 0.5", "-n 2"),
        ("--interpolate 1 2 --seed 3", "--interpolate 1 2"),
        ("--checkpoint without_classes.pth --guidance 2", "--checkpoint without_classes.pth"),
    ],
)
def test_what_has_no_meaning_changes_nothing(here, flags, plain):
    assert np.array_equal(draw(*flags.split()), draw(*plain.split()))


@pytest.mark.parametrize(
    "args, word",
    [
        ("-n 0", "-n"),
        ("-n -3", "-n"),
        ("-n two", "-n"),
        ("--nmu 3", "--nmu"),
        ("--class b dog", "--class dog"),
        ("--class dog", "a, b, c"),
        ("--class", "a, b, c"),
        ("--checkpoint without_classes.pth --class a", "--class"),
        ("--checkpoint init.png", "init.png"),
        ("--checkpoint none.pth", "none.pth"),
        ("--checkpoint none.pth", "python diffusion_model.py"),
        ("--guidance -1", "--guidance"),
        ("--guidance nan", "--guidance"),
        ("--guidance inf", "--guidance"),
        ("--sampler euler", "--sampler"),
        ("--steps 0", "steps must be"),
        ("--steps 1001", "steps must be"),
        ("--seed -1", "--seed"),
        ("--interpolate 1 -2", "--interpolate"),
        ("--device nonsense", "device nonsense"),
        ("--out a.what", "extension"),
        ("--out init.png/a.png", "init.png"),
        ("--save-each .", "--save-each"),
        ("--init-image init.png --strength 1.5", "--strength"),
        ("--init-image init.png --strength nan", "--strength"),
        ("--init-image none.png", "none.png"),
        ("--init-image diffusion_model.pth", "not a readable picture"),
        ("--mask init.png", "a mask needs"),
        ("--init-image init.png --mask none.png", "none.png"),
        ("--denoising -n 17", "--denoising: at most 16"),
        ("--denoising --out strip.gif", "--out"),
        ("--denoising --out strip.GIF", "--out"),
        ("-n 401", "--save-each"),
        (
            "--denoising --interpolate 1 2 --class a b c",
            "at most 16 pictures (-n, --class), here 24",
        ),
    ],
)
def test_mistakes(here, capsys, args, word):
    """Each ends in one line that names the flag, before anything is written."""
    save_picture("init.png", (SIZE, SIZE, 3))
    assert word in error_of(inference_example.main, capsys, *args.split())
    assert sorted(path.name for path in here.iterdir()) == [
        "diffusion_model.pth",
        "init.png",
        "without_classes.pth",
    ]


def test_many_files_go_on_where_they_stopped(here, monkeypatch, capsys):
    """What is there is not drawn again but for the last, to see that it is the same. No grid, a batch at a time."""
    monkeypatch.setattr(inference_example, "GRID", 8)
    monkeypatch.setattr(inference_example, "BATCH", 4)
    sizes, there, real = [], [], diffusion_model.SimpleDiffusion.sample

    def sample(self, count, **options):
        sizes.append(count)
        there.append(len(list((here / "each").glob("*.png"))))
        return real(self, count, **options)

    monkeypatch.setattr(diffusion_model.SimpleDiffusion, "sample", sample)
    ten = [
        "-n",
        "10",
        "--save-each",
        "each",
        "--steps",
        "3",
        "--device",
        "cpu",
        "--out",
        "grid.png",
    ]
    inference_example.main(ten)
    whole = {path.name: path.read_bytes() for path in (here / "each").iterdir()}
    assert (
        len(whole) == 10
        and sizes == [4, 4, 2]
        and there == [0, 4, 8]
        and not (here / "grid.png").exists()
    )
    for name in sorted(whole)[7:]:
        (here / "each" / name).unlink()
    capsys.readouterr()
    inference_example.main(ten)
    assert capsys.readouterr().out.splitlines()[1].startswith("4 pictures")
    assert {path.name: path.read_bytes() for path in (here / "each").iterdir()} == whole and sizes[
        3:
    ] == [4]
    (here / "each" / sorted(whole)[-1]).write_bytes(b"")  # killed while it was written
    inference_example.main(ten)
    assert {path.name: path.read_bytes() for path in (here / "each").iterdir()} == whole
    for other in (["--seed", "1"], ["--guidance", "9"], ["-n", "9"]):
        assert "--save-each" in error_of(inference_example.main, capsys, *ten, *other)
    assert {path.name: path.read_bytes() for path in (here / "each").iterdir()} == whole


def test_many_classes():
    """Eight of each, unless the grid would be too large."""
    names = [f"class {i}" for i in range(100)]
    for flags, count, columns in (("--class", "class 7"), 8, 8), ((), 400, 4):
        args = inference_example.parse(list(flags))
        labels, found = inference_example.layout(args, names)
        assert len(labels) == count and found == columns


def test_names_in_a_checkpoint_stay_in_the_folder(here, tiny_model):
    tiny_model.class_names = ["../../x", "a/b", "c d"]
    tiny_model.save()
    draw("-n", 3, "--save-each", "each")
    assert {path.name for path in (here / "each").iterdir()} == {
        "00000_-x.png",
        "00001_a-b.png",
        "00002_c-d.png",
    }


def test_generate_images_refuses():
    model = diffusion_model.SimpleDiffusion(SIZE, **TINY)
    for count, labels in ((0, None), (3, [0, 0])):
        with pytest.raises(ValueError, match="images"):
            generate_images(model, count, labels)
