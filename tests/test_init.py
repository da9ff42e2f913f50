"""--init: a run that begins with the network and the weights of a checkpoint."""

from pathlib import Path

import pytest
import torch
from conftest import TINY, error_of, perturb, pictures, same, state, stopped_in_step
from PIL import Image

import diffusion_model as dm

RUN = dict(data="pictures", init="source.pth", image_size=8, batch_size=4, epochs=2)


@pytest.fixture(autouse=True)
def folder(here, tiny_model):
    """A folder with source.pth (classes a, b, c), plain.pth (no classes) and pictures of b and
    z."""
    tiny_model.save("source.pth")
    perturb(dm.SimpleDiffusion(8, **TINY), seed=1).save("plain.pth")
    pictures("pictures", ["b", "z"])


def train(**options):
    return dm.train(dm.TrainConfig(**{**RUN, **options}))


def begin(**options):
    """The model with which a run begins: a learning rate that is next to nothing leaves it so."""
    return train(epochs=1, lr=1e-30, out="begin", **options)


def outputs(model, label):
    """What the network says to some noise, with this label or without one."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = None if label is None else torch.full((4,), label)
    with torch.no_grad():
        return model.network(x, torch.tensor([0, 9, 99, 999]), y)


def test_classes_go_by_their_names():
    """b is b, and z, which is new, begins as the null class, which stays the null class."""
    source, model = dm.SimpleDiffusion.load("source.pth", "cpu"), begin()
    assert model.class_names == ["b", "z"]
    for ours, theirs in ((0, 1), (1, 3), (2, 3), (None, None)):
        torch.testing.assert_close(outputs(model, ours), outputs(source, theirs))
    assert not torch.allclose(outputs(source, 1), outputs(source, 3))


@pytest.mark.parametrize(
    "source, unconditional", [("source", True), ("plain", False), ("plain", True)]
)
def test_without_classes(source, unconditional):
    """A network without classes begins as the null class of the other, and classes that begin with
    such a network begin as what it draws. Both can be trained."""
    model = begin(init=f"{source}.pth", unconditional=unconditional)
    wanted = outputs(dm.SimpleDiffusion.load(f"{source}.pth", "cpu"), None)
    for label in [None] if unconditional else [None, 0, 1]:
        torch.testing.assert_close(outputs(model, label), wanted, rtol=1e-4, atol=1e-5)
    train(init=f"{source}.pth", unconditional=unconditional)
    assert (state()["run"]["classes"] is None) == unconditional


def test_another_size():
    """The network is convolutional, so it goes on at 16x16. What it is made of comes from the
    file."""
    model = begin(image_size=16, dropout=0.3, t_distribution="uniform")
    kept = dm.SimpleDiffusion.load("source.pth", "cpu")
    changed = dict(dropout=0.3, num_classes=2)
    assert model.network.config == {**kept.network.config, **changed}
    assert model.diffusion.config == {**kept.diffusion.config, "t_distribution": "uniform"}
    loaded = dm.SimpleDiffusion.load("begin", "cpu")
    assert loaded.image_size == 16
    assert loaded.sample(1, y=[0], steps=2).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    "words",
    """--hidden-channels 16|--channel-mults 1 3|--num-res-blocks 3|--schedule cosine|--n-steps 50
--attention-levels|--num-heads 4|--prediction noise""".replace("\n", "|").split("|"),
)
def test_an_option_that_the_file_decides(capsys, words):
    """It is an error that names it, and nothing is written."""
    command = ["--data", "pictures", "--image-size", 8, "--init", "source.pth", *words.split()]
    line = error_of(dm.main, capsys, *command).replace("_", "-")
    assert words.split()[0].strip("-") in line and "--init" in line
    assert not Path("training_state.pth").exists()


def test_grey_and_colour():
    """Grey pictures will do for a network in colour. The other way round is an error."""
    dm.SimpleDiffusion(8, **TINY, in_channels=1).save("grey.pth")
    with pytest.raises(ValueError, match="grey.*colour"):
        train(init="grey.pth")
    for path in Path("pictures").rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert dm.load_images("pictures", 8)[0].shape[1] == 1
    assert train().network.config["in_channels"] == 3
    assert train(init="grey.pth", out="grey").network.config["in_channels"] == 1


def test_it_resumes_to_the_bit(monkeypatch):
    """This also holds where the run's own export takes the place of the file with which it began,
    which is kept as .bak. Another --init is another run, and its state is not called damaged."""
    train(out="whole")
    Path("source.pth").rename("diffusion_model.pth")
    before = Path("diffusion_model.pth").read_bytes()
    for step in (3, 3):
        with stopped_in_step(step, monkeypatch), pytest.raises(KeyboardInterrupt):
            train(init="diffusion_model.pth", sample_every=1)
    with pytest.raises(ValueError, match="init diffusion_model.pth, not plain.pth.*--restart"):
        train(init="plain.pth", hidden_channels=64)
    train(init="diffusion_model.pth")
    for name in ("model", "ema", "optimizers", "losses", "step"):
        assert same(state()[name], state("whole")[name]), name
    assert Path("diffusion_model.pth.bak").read_bytes() == before
    assert Path("diffusion_model.pth").read_bytes() != before
