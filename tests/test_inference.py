"""inference_example.py on tiny checkpoints: whatever it draws is held against what Python draws."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, error_of, perturb, pixels, run, tiles
from PIL import Image

import diffusion_model as dm
import inference_example as script

PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
MASK = np.repeat(np.uint8([255, 255, 153, 0, 0, 0, 0, 0]), 8).reshape(8, 8)  # white, 0.6, black


@pytest.fixture(autouse=True)
def folder(here, tiny_model, monkeypatch):
    """The working folder has three checkpoints, a picture, a mask and a file that is neither."""
    monkeypatch.setattr(dm, "has_bfloat16", lambda device: False)  # for sharp comparisons
    tiny_model.class_names = ["a", "B", "c"]
    tiny_model.save()
    perturb(dm.SimpleDiffusion(8, **TINY), 1).save("plain.pth")
    perturb(dm.SimpleDiffusion(8, in_channels=1, **TINY), 2).save("grey.pth")
    Image.fromarray(PICTURE).save("i.png")
    Image.fromarray(MASK).save("mask.png")
    Path("text.txt").write_text("no picture")
    return here


def draw(line="", out="samples/generated.png"):
    """Run the script on the CPU with a line of options: -> the pixels of the picture it writes."""
    script.main(["--device", "cpu", "--out", out, *line.split()])
    return pixels(out) if Path(out).exists() else None


def sampled(count, checkpoint="diffusion_model.pth", **options):
    """What Python draws, as pixels."""
    model = dm.SimpleDiffusion.load(checkpoint, "cpu")
    images = model.sample(count, **{"seed": 0, **options})
    return np.asarray((images * 255).round()).transpose(0, 2, 3, 1).astype(int)


def close(a, b):
    """Equal but for rounding, as the script draws in batches of another size."""
    return np.abs(a - b).max() <= 1


ABC = [label for label in range(3) for _ in range(8)]


@pytest.mark.parametrize(
    "line, options",
    [
        ("", dict(y=ABC, guidance=2.5)),
        ("--class C a -n 2 --seed 5 --guidance 9", dict(y=[2, 2, 0, 0], seed=5, guidance=9)),
        ("--class b -n 17 --guidance 1", dict(y=[1] * 17)),
        ("--checkpoint plain.pth", dict(checkpoint="plain.pth")),
        ("--checkpoint grey.pth -n 3", dict(checkpoint="grey.pth")),
        ("--class a -n 1 --sampler ddim", dict(y=[0], guidance=2.5, sampler="ddim")),
        ("-n 1 --sampler ddpm --steps 9", dict(y=[0, 1, 2], guidance=2.5, sampler="ddpm", steps=9)),
        ("--class a -n 2 --init-image i.png", dict(y=["A", "a"], guidance=2.5, strength=0.6)),
        ("--class b -n 2 --init-image i.png --mask mask.png", dict(y=[1, 1], guidance=2.5)),
        (
            "--checkpoint plain.pth -n 2 --init-image i.png --strength 0.3 --mask mask.png",
            dict(checkpoint="plain.pth", strength=0.3),
        ),
    ],
)
def test_script_and_python_draw_the_same(line, options):
    """A row for each class, or rows of 16 for a single one, and picture i, counted over all rows, is
    that of the seed plus i."""
    columns = min(int(line.partition("-n ")[2].split()[0]), 16) if "-n " in line else 8
    count = len(options.get("y", range(columns)))
    if "--init-image" in line:
        options["init_image"] = torch.from_numpy(PICTURE).permute(2, 0, 1) / 127.5 - 1
    if "--mask" in line:
        options["mask"] = torch.from_numpy(MASK)[None] / 255
    drawn = tiles(draw(line), columns)
    assert 0 <= len(drawn) - count < columns and not drawn[count:].any()
    assert close(drawn[:count], sampled(count, **options))
    assert count == 1 or not close(drawn[0], drawn[-1])
    if "guidance" in options:  # which is not without effect
        assert (drawn != sampled(count, **{**options, "guidance": 1})).mean() > 0.1


def test_a_mask_keeps_what_is_black():
    """The kept part is the picture's own, to the bit, and the white part is another one."""
    for picture in tiles(draw("--class a --init-image i.png --mask mask.png"), 8):
        assert (picture[3:] == PICTURE[3:]).all() and (picture[:2] != PICTURE[:2]).mean() > 0.9


def test_strength_0_returns_any_picture():
    """It is cropped to a square and scaled, or it is made grey."""
    wide = np.zeros((16, 40, 3), np.uint8)
    wide[:, 12:28] = (200, 100, 50)  # the middle square
    Image.fromarray(wide).save("wide.png")
    (drawn,) = tiles(draw("--class a -n 1 --strength 0 --init-image wide.png"), 1)
    assert np.abs(drawn[:, 1:-1] - [200, 100, 50]).max() < 5  # scaling smooths the borders
    (grey,) = tiles(draw("--checkpoint grey.pth -n 1 --strength 0 --init-image i.png"), 1)
    assert close(grey[..., 0], np.asarray(Image.fromarray(PICTURE).convert("L")).astype(int))


def test_interpolation_goes_from_one_seeds_picture_to_the_others():
    """In each row. On the way the noise stays as strong, as it does not on a straight line."""
    rows = tiles(draw("--interpolate 3 8 --class c a -n 5"), 5)
    for row, (seed, y) in {0: (3, 2), 4: (8, 2), 5: (3, 0), 9: (8, 0)}.items():
        assert close(rows[row], sampled(1, seed=seed, y=[y], guidance=2.5)[0])
    assert not any(close(a, b) for a, b in zip(rows[:4], rows[1:5]))
    noise = script.interpolated_noise(dm.SimpleDiffusion(32, **TINY), 3, 8, 9).flatten(1)
    norms = noise.norm(dim=1) / noise[0].norm()
    assert 0.97 < norms.min() and norms.max() < 1.03


def test_denoising_shows_the_way_from_noise_to_the_picture():
    """Ten moments of x_t above those of x_0. The first is pure noise, the last the picture."""
    strip = tiles(draw("--denoising --class b a --seed 4"), 10)
    noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(4)).permute(1, 2, 0)
    assert len(strip) == 40
    assert close(strip[0], np.asarray(((noise + 1) * 127.5).clamp(0, 255).round()).astype(int))
    for row, y, seed in ((19, 1, 4), (39, 0, 5)):
        assert close(strip[row], sampled(1, y=[y], seed=seed, guidance=2.5)[0])


def test_save_each_names_files_by_seed_and_class_and_keeps_what_is_there(
    tiny_model, capsys, monkeypatch
):
    """Another seed adds files. A second run draws what is missing, and leaves what is there."""
    draw("--save-each each -n 2 --class a c --seed 7")
    first = {path.name: path.read_bytes() for path in Path("each").iterdir()}
    assert sorted(first) == ["00007_a.png", "00008_a.png", "00009_c.png", "00010_c.png"]
    assert close(pixels("each/00009_c.png"), sampled(1, seed=9, y=["c"], guidance=2.5)[0])
    draw("--save-each each -n 2 --class a c --seed 8")
    assert len(list(Path("each").iterdir())) == 4 + 2  # 8 was there as an a, 10 as a c
    Path("each/00008_a.png").unlink()
    capsys.readouterr()
    draw("--save-each each -n 2 --class a c --seed 7 --guidance 9")
    assert "3 of 4 pictures are there already" in capsys.readouterr().out
    found = {path.name: path.read_bytes() for path in Path("each").iterdir()}
    assert found["00008_a.png"] != first.pop("00008_a.png") and first.items() <= found.items()
    with monkeypatch.context() as patch:
        patch.setattr(dm.SimpleDiffusion, "sample", None)  # as nothing is missing any more
        draw("--save-each each -n 2 --class a c --seed 7")
    tiny_model.class_names = ["../../up", "a/b", "c d"]
    tiny_model.save()
    draw("--save-each odd -n 1")
    assert {path.name for path in Path("odd").iterdir()} == {
        *("00000_-up.png", "00001_a-b.png", "00002_c-d.png")
    }


@pytest.mark.parametrize("there", ["--checkpoint=box", "--checkpoint=~/box", "--out=~/new.png", ""])
def test_where_files_are_found(folder, monkeypatch, there):
    """In a folder, from the home folder's ~, and without a word beside the script."""
    wanted = draw("-n 1")
    box = folder / "box"
    box.mkdir()
    Path("diffusion_model.pth").rename(box / "diffusion_model.pth")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setattr(script, "__file__", str(box / "inference_example.py"))
    draw(f"-n 1 {there}", out="new.png")
    assert (pixels(folder / "new.png") == wanted).all()


@pytest.mark.parametrize(
    "line, words",
    [
        ("-n 0", "-n 0"),
        ("-n -1 --interpolate 1 2", "-n -1"),
        ("-n -3", ""),
        ("-n two", "-n"),
        ("--nmu 3", "--nmu"),
        ("--class b dog", "'dog', the classes are: a, "),
        ("--class", "--class"),
        ("--checkpoint plain.pth --class a", "'a'"),
        ("--checkpoint i.png", "i.png is damaged or of another kind"),
        ("--checkpoint none.pth", "none.pth"),
        ("--guidance nan", "guidance nan"),
        ("--sampler euler", "'ddpm', 'ddim', 'dpm++'"),
        ("--steps 0", "1..1000"),
        ("--seed 99999999999999999999", ""),
        ("--device nonsense", "device nonsense"),
        ("--out a.what", ".what"),
        ("--out a.psd", ".psd"),  # which PIL can read, but not write
        ("--out i.png/a.png", "i.png"),
        ("--save-each i.png", "i.png"),
        ("--init-image i.png --strength 1.5", "strength 1.5"),
        ("--init-image none.png", "none.png"),
        ("--init-image text.txt", "text.txt is no readable picture"),
        ("--init-image i.png --mask text.txt", "text.txt is no readable picture"),
        ("--mask mask.png", "init_image"),
        ("--denoising -n 6", "18"),
        ("--denoising --init-image i.png --strength 0", ""),
        ("--denoising --save-each each", ""),
    ],
)
def test_every_mistake_ends_in_one_line(folder, capsys, line, words):
    """It begins with "error:", names what is wrong, and nothing has been written."""
    before = sorted(folder.iterdir())
    error = error_of(script.main, capsys, "--device", "cpu", *line.split())
    assert error and words in error
    assert [path for path in sorted(folder.iterdir()) if path.is_file()] == before


def test_generate_images(tiny_model):
    """It draws in batches what one call of sample draws, and by default eight pictures."""
    images = script.generate_images(tiny_model, num_images=8)
    assert images.shape == (8, 3, 8, 8) and 0 <= images.min() < images.max() <= 1
    noise = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for options in (dict(seed=3), dict(x_T=noise)):
        options.update(y=[0, 1, 2, 1] * 5, guidance=2, steps=4)
        images = script.generate_images(tiny_model, 20, **options)
        torch.testing.assert_close(images, tiny_model.sample(20, **options), atol=1e-5, rtol=0)
    for count, y in ((0, None), (3, [0, 0]), (17, [0])):
        with pytest.raises(ValueError):
            script.generate_images(tiny_model, count, y, steps=1)


def test_closed_outputs_do_not_end_a_drawing(folder):
    """As a pipe whose reader has gone, and as no output at all. The exit code is 0 in both."""
    line = "-n 1 --steps 1 --device cpu --checkpoint diffusion_model.pth"
    command = f"'{sys.executable}' '{ROOT / 'inference_example.py'}' {line}"
    for ending in ("2>error | true", "2>&- >&-"):
        shell = f"set -o pipefail; {command} {ending}"
        assert run("bash", "-c", shell, CUDA_VISIBLE_DEVICES="").returncode == 0
        Path("samples/generated.png").unlink()  # which was drawn
    assert Path("error").read_text() == ""
