"""--init and --images: a run on pictures of one's own that begins with trained weights."""

import dataclasses
import hashlib
import inspect
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import TINY, error_of, new_run, perturb, same, state, stopped_in_step

import diffusion_model
import support
from diffusion_model import SimpleDiffusion, SimpleUNet, TrainConfig, TrainingRun

RUN = dict(
    data="FOLDER",
    init="source.pth",
    image_size=8,
    batch_size=4,
    images=40,
    sample_every=1,
    device="cpu",
)


@pytest.fixture
def here(here, tiny_model):
    """A folder with source.pth (classes a, b, c), plain.pth (without classes), and eight pictures of b and of z."""
    tiny_model.save("source.pth")
    perturb(SimpleDiffusion(8, **TINY), seed=1).save("plain.pth")
    for name, red in (("b", 0), ("z", 100)):
        Path("FOLDER", name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (8, 8), (red + i, 20 * i, 50)).save(f"FOLDER/{name}/{i}.png")
    return here


def outputs(model, labels):
    """What the network says to some noise, with these labels."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.model.eval()(x, torch.tensor([0, 9, 99, 999]), labels)


def label(number):
    return torch.full((4,), number)


def test_classes_go_by_their_names(here):
    """b is b, z begins as the null class, and so does the null class; every other weight is that of the file."""
    source, run = SimpleDiffusion.load("source.pth", "cpu"), new_run(**RUN)
    assert run.model.class_names == ["b", "z"]
    for model in (run.model, run.ema):
        for ours, theirs in ((0, 1), (1, 3), (2, 3)):
            assert torch.equal(outputs(model, label(ours)), outputs(source, label(theirs)))
    assert not torch.equal(outputs(source, label(1)), outputs(source, label(3)))


@pytest.mark.parametrize(
    "to, flags",
    [("source", dict(unconditional=True)), ("plain", {}), ("plain", dict(unconditional=True))],
)
def test_without_classes(here, to, flags):
    """A network without classes begins as the null class; classes that begin with such a network, each as that."""
    source, run = (
        SimpleDiffusion.load(f"{to}.pth", "cpu"),
        new_run(**RUN | flags | dict(init=f"{to}.pth")),
    )
    for labels in [None] if flags else [None, label(0), label(1)]:
        torch.testing.assert_close(
            outputs(run.model, labels), outputs(source, None), rtol=1e-4, atol=1e-5
        )
    run.train_step()


def test_another_size(here):
    """The network is convolutional: it goes on at 16x16."""
    model = diffusion_model.train(TrainConfig(**RUN | dict(image_size=16, out="large")))
    assert SimpleDiffusion.load("large/diffusion_model.pth").image_size == 16
    assert model.sample(1, y=[0], steps=2, progress=False).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    "flags",
    [
        dict(hidden_channels=16),
        dict(channel_mults=(1, 3)),
        dict(num_res_blocks=3),
        dict(schedule="cosine"),
        dict(n_steps=50),
        dict(attention_levels=()),
    ],
)
def test_a_flag_that_contradicts_the_file(here, flags):
    """It is an error that names both."""
    ((name, value),) = flags.items()
    with pytest.raises(ValueError, match=f"{support.flag_of(name)} .*source.pth"):
        new_run(**RUN | flags)


def test_flags_that_do_not_contradict(here):
    """What the file has as well, and dropout, on which no weight depends."""
    same_as_the_file = dict(
        hidden_channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_levels=(1,)
    )
    assert new_run(**RUN, **same_as_the_file, dropout=0.3).model.network.config["dropout"] == 0.3


def test_no_option_of_the_network_is_forgotten():
    """Whatever SimpleDiffusion and SimpleUNet take and TrainConfig has, a run passes on."""
    takes = {
        *inspect.signature(SimpleDiffusion).parameters,
        *inspect.signature(SimpleUNet).parameters,
    }
    assert set(support.MODEL_OPTIONS) == takes & {
        entry.name for entry in dataclasses.fields(TrainConfig)
    }


def test_a_flag_at_its_default_contradicts_as_well(here, capsys):
    """On the command line, where it is known that it was given."""
    flags = "--data FOLDER --init source.pth --device cpu --hidden-channels 64".split()
    line = error_of(diffusion_model.main, capsys, *flags)
    assert line.startswith("error: --hidden-channels 64") and "source.pth, which has 8" in line


def test_the_size_of_the_file_is_not_changed_in_silence(here, capsys):
    """Where no --image-size is given, the default of 32 would be another than what the file draws."""
    assert "--image-size 8" in error_of(
        diffusion_model.main, capsys, *"--data FOLDER --init source.pth".split()
    )


def test_grey_and_colour(here):
    """Grey pictures will do for a network in colour; the other way round is an error."""
    for path in Path("FOLDER").rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert diffusion_model.load_images("FOLDER", 8)[0].shape[1] == 1
    run = new_run(**RUN)
    assert run.images.shape[1] == 3
    run.train_step()
    SimpleDiffusion(8, **TINY, in_channels=1).save("grey.pth")
    Image.new("RGB", (8, 8), "red").save("FOLDER/b/red.png")
    with pytest.raises(ValueError, match="--init.*grey"):
        new_run(**RUN | dict(init="grey.pth"))


def test_it_resumes_to_the_bit(here, monkeypatch):
    """Also where the run's own export has taken the place of the file it began with, which is kept as .bak."""
    diffusion_model.train(TrainConfig(**RUN | dict(out="whole")))
    Path("source.pth").rename("diffusion_model.pth")
    before = Path("diffusion_model.pth").read_bytes()
    config, stops = TrainConfig(**RUN | dict(init="diffusion_model.pth")), 0
    for _ in range(3):
        with stopped_in_step(5, monkeypatch):
            try:
                diffusion_model.train(config)
            except SystemExit:
                stops += 1
    assert stops == 1
    for name in ("model", "ema", "optimizers", "epoch_losses", "step"):
        assert same(state()[name], state("whole")[name]), name
    assert (
        Path("diffusion_model.pth").read_bytes()
        != before
        == Path("diffusion_model.pth.bak").read_bytes()
    )
    info = json.loads(Path("model_info.json").read_text())
    assert (
        info["init"] == "diffusion_model.pth"
        and info["init_sha256"] == hashlib.sha256(before).hexdigest()
    )


def test_a_picture_more(here):
    """One line says so, and what can be done."""
    diffusion_model.train(TrainConfig(**RUN))
    Image.new("RGB", (8, 8), "red").save("FOLDER/b/red.png")
    with pytest.raises(ValueError, match="16 images, not 17.*--restart.*--init"):
        diffusion_model.train(TrainConfig(**RUN))


@pytest.mark.parametrize(
    "images, epochs, grids",
    [(1, 1, 1), (40, 2, 2), (160, 10, 10), (480, 30, 15), (624, 39, 20), (1600, 100, 20)],
)
def test_how_long(here, monkeypatch, images, epochs, grids):
    """--images is rounded to epochs, and there are at most twenty grids, however many they are."""
    monkeypatch.setattr(
        TrainingRun,
        "train_step",
        lambda run: (setattr(run, "step", run.step + 1), run.losses.append(torch.tensor(1.0))),
    )
    exported = []
    monkeypatch.setattr(
        support.Report, "export", lambda report: exported.append(len(report.run.epoch_losses))
    )
    diffusion_model.train(TrainConfig(**RUN | dict(images=images)))
    assert len(state()["epoch_losses"]) == epochs == exported[-1] and len(exported) == grids


def test_pictures_that_are_far_from_square(here, capsys):
    """What cropping cuts off is said, once."""
    Image.new("RGB", (40, 10), "red").save("FOLDER/b/wide.png")
    diffusion_model.load_images("FOLDER", 8)
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 of 17 " in line and "wide.png" in line and "75%" in line
