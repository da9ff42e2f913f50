"""Does a GPU compute what the CPU does? For a Mac or a GPU: python -m pytest tests/test_device.py

On some versions of PyTorch some devices gave wrong results without an error. These tests skip if
there is no device but the CPU. There, the tests on a pretended device run in their place.
"""

import copy
import itertools
import warnings
from unittest.mock import patch

import pytest
import torch
from conftest import TINY, TINY_RUN, perturb, same, state, stopped_in_step
from PIL import Image
from pretend_device import DeviceError, pretend_device, what_is_missing
from torchvision.transforms.functional import pil_to_tensor

import diffusion_model as dm
import inference_example

DEVICE = dm.pick_device()


@pytest.fixture
def float32(monkeypatch):
    """No device seems to be fast at bfloat16, so that the others can be compared with the CPU."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no device but the CPU")
class TestRealDevice:
    @pytest.fixture
    def pair(self, float32, monkeypatch):
        """The default model, untrained, on the CPU and on the device."""
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        torch.manual_seed(0)
        model = perturb(dm.SimpleDiffusion(class_names="abc"))
        return model, copy.deepcopy(model).to(DEVICE, memory_format=dm.memory_format(DEVICE))

    def test_a_drawing(self, pair):
        """The device draws the CPU's pictures from the same seed, but for rounding."""
        options = dict(y=[0, 1, 2, 1], guidance=2.0, seed=0)
        ours, theirs = (model.sample(4, **options).cpu() for model in pair)
        assert (ours - theirs).abs().mean() < 1 / 255, f"{DEVICE} draws other pictures"

    def test_attention_without_gradients(self):
        """Drawing uses a kernel of its own on some devices. Weights this large show its errors."""
        torch.manual_seed(0)
        attention = dm.Attention(128, num_heads=4)
        for parameter in attention.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        x = torch.randn(2, 128, 8, 16)
        with torch.no_grad():
            ours = attention(x) - x
            theirs = copy.deepcopy(attention).to(DEVICE)(x.to(DEVICE)).cpu() - x
        assert (ours - theirs).norm() < 0.003 * ours.norm(), f"{DEVICE} has another attention"

    def test_a_training_step(self, pair):
        """Loss, gradients and the optimisers' step are the CPU's. What differs is named."""
        generator = torch.Generator().manual_seed(0)
        x, noise = (torch.randn(8, 3, 32, 32, generator=generator) for _ in range(2))
        y, t = torch.arange(8) % 4, torch.arange(8) * 120
        before = copy.deepcopy(pair[0])
        losses = []
        for model in pair:
            device = model.diffusion.betas.device
            loss = model(*(tensor.to(device) for tensor in (x.tanh(), y, t, noise)))
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-3), f"{DEVICE} has another loss"

        def differing(share, difference, size):
            parts = zip(before.named_parameters(), *(model.parameters() for model in pair))
            return [
                name
                for (name, old), ours, theirs in parts
                if difference(ours, theirs).norm() > share * size(ours, old).norm() + 1e-6
            ]

        names = differing(0.01, lambda a, b: a.grad - b.grad.cpu(), lambda a, old: a.grad)
        assert not names, f"{DEVICE} has other gradients: {names}"
        for model in pair:
            for parameter, old in zip(model.parameters(), before.parameters()):
                parameter.grad = torch.empty_like(parameter).copy_(torch.sin(1000 * old.detach()))
            for optimizer in dm.make_optimizers(model.network, 1e-3):
                optimizer.step()
        names = differing(0.1, lambda a, b: a - b.detach().cpu(), lambda a, old: a - old)
        assert not names, f"{DEVICE} takes other steps: {names}"  # Muon's are rounded to bfloat16

    def test_a_run(self, here):
        """A run of the device's own precision has finite losses and weights, and draws."""
        options = dict(data="shapes", limit=64, batch_size=32, epochs=2, hidden_channels=32)
        model = dm.train(dm.TrainConfig(**options))
        assert next(model.parameters()).device.type == DEVICE.type
        assert all(0.1 < loss < 1.5 for loss in state()["losses"])
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert model.sample(2, y=[0, 1]).isfinite().all()


class TestPretendedDevice:
    """What needs no real device: where tensors are, what waits, and that all code runs at all."""

    __test__ = DEVICE.type == "cpu"  # A real one is not disturbed, and its tests say more.
    KINDS = pytest.mark.parametrize("kind", ["cuda", "mps"])

    @pytest.fixture(autouse=True)
    def possible(self):
        if missing := what_is_missing():
            pytest.skip(missing)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Some are given on such a device only.
            yield

    @staticmethod
    def train(out, **options):
        return dm.train(dm.TrainConfig(**{**TINY_RUN, "n_steps": 5, "out": out, **options}))

    def test_it_refuses_what_a_device_refuses(self):
        """The other tests of this class rest on this one."""
        with pretend_device("mps") as device:
            x = torch.arange(3.0, device="mps")
            assert (x + torch.tensor(1.0)).device.type == "mps" and not device.waits
            for refused in (
                lambda: x + torch.ones(3),
                lambda: torch.ones(3)[x.long()],
                lambda: x.double(),
                lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
                lambda: torch.heaviside(x, x),
            ):
                with pytest.raises(DeviceError):
                    refused()
            for number, wait in enumerate(
                (x[1].item, x.tolist, x.cpu, x.nonzero, lambda: bool(x[0]), lambda: x[x > 1]), 1
            ):
                wait()
                assert device.waits.total() == number
            assert torch.tensor([1, 2]).to("mps").sum() == 3 and device.uploads.total() == 1

    @KINDS
    def test_a_run(self, kind, here, float32, monkeypatch):
        """From nothing, stopped within an epoch, resumed, begun with --init: all as on the CPU.

        A resumed run is the whole run to the bit, and in float32 it is the CPU's but for rounding.
        """
        order = dm.memory_format(torch.device(kind))  # in which noise is drawn
        with monkeypatch.context() as patch:
            patch.setattr(dm, "memory_format", lambda device: order)
            self.train("cpu", device="cpu")
            self.train("cpu_init", device="cpu", init="cpu", data="shapes", **self.INIT)
        with pretend_device(kind):
            self.train("whole")
            with stopped_in_step(2, monkeypatch), pytest.raises(KeyboardInterrupt):
                self.train("parts")
            assert state("parts")["step"] == 2
            weights = list(self.train("parts").parameters())
            assert all(weight.device.type == kind for weight in weights)
            # MPS erred with channels_last, in which a kernel is not contiguous.
            assert all(weight.is_contiguous() for weight in weights) is (kind == "mps")
            self.train("parts_init", init="cpu", data="shapes", **self.INIT)
        assert same(state("whole"), state("parts"))
        for ours, theirs in (("cpu", "parts"), ("cpu_init", "parts_init")):
            ours, theirs = state(ours), state(theirs)
            assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-4)
            pairs = zip(ours["ema"].values(), theirs["ema"].values())
            different = torch.cat([(a - b).abs().flatten() for a, b in pairs])
            assert different.mean() < 1e-4  # Muon's updates, of 3e-3 each, are rounded to bfloat16

    INIT = {name: getattr(dm.TrainConfig, name) for name in dm.ARCHITECTURE} | {"seed": 1}

    @pytest.mark.parametrize("kind, capability", [("cuda", (7, 5)), ("cuda", (8, 0)), ("mps", ())])
    def test_a_training_step_waits_for_nothing(self, kind, capability, here, monkeypatch):
        """Five steps wait for the device as often as two, and copy as little to it.

        All losses are fetched together, once a second and at the end. The products of the network
        are in bfloat16 exactly if the capability is 8.0.
        """

        def count(steps, seconds_a_look):
            clock = itertools.count(1.0, seconds_a_look)
            monkeypatch.setattr(dm.time, "monotonic", clock.__next__)
            with pretend_device(kind, capability) as device:
                self.train("out", batch_size=32, limit=32 * steps, epochs=1, restart=True)
            return device

        short, long, slow = count(2, 1e-6), count(5, 1e-6), count(5, 2.0)
        fetch = "aten::_to_copy of ({},)"
        assert long.waits - short.waits == {fetch.format(5): 1}
        assert short.waits - long.waits == {fetch.format(2): 1}
        assert long.uploads == short.uploads
        assert slow.waits - long.waits == {fetch.format(5): 4}
        products = {
            dtype for name, dtype in long.dtypes if name in ("aten::convolution", "aten::addmm")
        }
        assert products == {torch.bfloat16 if capability == (8, 0) else torch.float32}

    WAYS = {
        "plain": dict(),
        "guidance": dict(y=torch.tensor([0, 2]), guidance=3.0, guidance_interval=(0, 1e9)),
        "mask": dict(
            y=torch.tensor([1, 1]),
            init_image=torch.linspace(-1, 1, 192).view(3, 8, 8),
            mask=torch.arange(8.0) / 7,
            strength=0.8,
            sampler="ddim",
        ),
        "ddpm": dict(y=torch.tensor([0, 1]), sampler="ddpm"),
    }

    @KINDS
    @pytest.mark.parametrize("way", WAYS)
    def test_drawing_waits_only_before_and_after_its_loop(self, way, kind, float32, tiny_model):
        """Ten steps wait for the device as often as five, and draw what the CPU draws.

        Each step of ddpm copies its new noise, which is drawn on the CPU, and others copy nothing.
        What is given may lie on the device or on the CPU.
        """

        def draw(steps, place="cpu"):
            here = {k: v.to(place) if torch.is_tensor(v) else v for k, v in self.WAYS[way].items()}
            return tiny_model.sample(2, steps=steps, seed=0, **here)

        ours, counts = draw(10), []
        with pretend_device(kind) as device:
            tiny_model.to(kind)
            for steps in (5, 10):
                device.waits.clear()
                device.uploads.clear()
                theirs = draw(steps, kind)
                counts.append((device.waits.copy(), device.uploads.total()))
            assert theirs.device.type == kind and theirs.equal(draw(10))
            torch.testing.assert_close(theirs.cpu(), ours, rtol=0, atol=1e-4)
        (few, copies), (many, more_copies) = counts
        assert few == many and more_copies - copies == (5 if way == "ddpm" else 0)

    @KINDS
    def test_the_script(self, kind, here, float32, tiny_model, capsys):
        """inference_example.py finds the device itself and writes the pictures of the CPU."""
        tiny_model.save("diffusion_model.pth")
        words = "--denoising --class a --steps 10 --interpolate 0 3 -n 2 --out {0}.png".split()
        inference_example.main([word.format("cpu") for word in words] + ["--device", "cpu"])
        with pretend_device(kind):
            inference_example.main([word.format(kind) for word in words])
        assert f" on {kind}:0, see {kind}.png" in capsys.readouterr().out
        ours, theirs = (pil_to_tensor(Image.open(f"{name}.png")).int() for name in ("cpu", kind))
        assert (ours - theirs).abs().max() <= 1

    @KINDS
    @pytest.mark.parametrize(
        "schedule, t_distribution", [("linear", "uniform"), ("cosine", "lognormal")]
    )
    def test_the_bare_process(self, kind, schedule, t_distribution, float32):
        """Algorithms 1 and 2 of a DiffusionModel compute what they compute on the CPU."""
        torch.manual_seed(0)
        network = perturb(dm.SimpleUNet(num_classes=2, **TINY))
        for name, parameter in network.named_parameters():
            if "attention" in name:  # so large that all of its parts can be seen
                torch.nn.init.normal_(parameter, std=0.3)
        options = dict(n_steps=20, schedule=schedule, t_distribution=t_distribution)
        process, found = dm.DiffusionModel(network, **options), []
        x, y = torch.rand(2, 3, 8, 8) * 2 - 1, torch.tensor([0, 1])
        with pretend_device(kind):
            for device in ("cpu", kind):
                process.to(device)
                torch.manual_seed(1)
                loss = process(x.to(device), y.to(device))
                loss.backward()
                gradient = torch.cat([p.grad.flatten().cpu() for p in network.parameters()])
                network.zero_grad()
                images = process.algorithm_2(x.to(device), y.to(device)).cpu()
                last = process.p_sample(x.to(device), torch.tensor([0, 9], device=device)).cpu()
                found.append((loss.detach().cpu(), gradient, images, last))
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)

    def test_mps_comes_before_cuda(self):
        """Where torch has both, it is picked, and each device by its name."""
        with pretend_device("mps"), patch("torch.cuda.is_available", lambda: True):
            assert dm.pick_device().type == "mps" and dm.pick_device("cpu").type == "cpu"

    def test_a_gpu_without_kernels(self, here, capsys):
        """Torch sees GPUs for which it has no kernels. One line says so, and the CPU is used."""
        with pretend_device("cuda", works=False):
            assert dm.pick_device() == torch.device("cpu")
            [line] = capsys.readouterr().out.splitlines()
            assert "cuda" in line and "no kernel image" in line and "CPU" in line
            with pytest.raises(ValueError, match="cuda:0.*no kernel image"):
                dm.pick_device("cuda:0")
            self.train("out")
        assert "device    cpu" in capsys.readouterr().out
