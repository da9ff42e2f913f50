"""The network: sizes, what its output may and must depend on, and attention against PyTorch's own.

Layers that start at zero hide everything before them, so every network here is perturbed first.
"""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY, perturb

from diffusion_model import Attention, SimpleDiffusion, SimpleUNet, time_embedding


def network(**options):
    """A small network in eval mode whose every layer does something: by default two levels and three classes."""
    torch.manual_seed(0)
    return perturb(SimpleUNet(**{**TINY, "num_classes": 3, **options})).eval()


def batch(size, height, width, channels=3):
    """Noisy images, their timesteps and their labels (three classes and the null label), all different."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, channels, height, width, generator=generator)
    return x, torch.linspace(0, 999, size).long(), torch.arange(size) % 4


def spread(*outputs):
    """The largest difference between outputs, in units of what the first varies by."""
    return (
        max((output - outputs[0]).abs().max().item() for output in outputs[1:])
        / outputs[0].std().item()
    )


@pytest.mark.parametrize(
    "options, millions",
    [({}, 4.9), (dict(channel_mults=(1, 2, 4), num_res_blocks=3, attention_levels=(1, 2)), 16.6)],
)
def test_parameters(options, millions):
    """The size that README and the released weights speak of, and that of the second project in the README's table."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in SimpleUNet(**options).parameters())
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize("size", [(1, 32, 32), (2, 16, 48), (3, 4, 8)])
def test_shapes(size):
    """The output is what the loss compares with the noise: of x's shape, also where H != W."""
    x, t, _ = batch(*size)
    assert network(channel_mults=(1, 2, 4), attention_levels=(1, 2))(x, t).shape == x.shape


@pytest.mark.parametrize("levels, size", [(2, (5, 4)), (3, (32, 30)), (4, (28, 32))])
def test_sizes_that_do_not_halve(levels, size):
    """Each level but the first halves: sizes are multiples of 2**(levels - 1), and the error has to say so."""
    x, t, _ = batch(1, *size)
    with pytest.raises(ValueError, match=rf"\b{2 ** (levels - 1)}\b"):
        network(channel_mults=(1,) * levels)(x, t)


@pytest.mark.parametrize(
    "options",
    [
        *(dict(hidden_channels=channels) for channels in (1, 5, 8, 24, 33, 48)),
        dict(time_dim=17),
        dict(time_dim=1),
        dict(num_heads=None),
        dict(channel_mults=(2,), attention_levels=(0,)),
        dict(attention_levels=()),
        dict(attention_levels=None),
        dict(in_channels=1),
        dict(num_res_blocks=(2,)),
        dict(num_res_blocks=(1, 3)),
    ],
)
def test_any_width(options):
    """Groups and heads have to divide the channels, sine and cosine the time_dim: it runs whatever these are."""
    net = network(**options)
    x, t, y = batch(2, 8, 8, options.get("in_channels", 3))
    out = net(x, t, y)
    assert out.shape == x.shape and out.isfinite().all() and out.std() > 0


@pytest.mark.parametrize(
    "options",
    [
        dict(hidden_channels=0),
        dict(in_channels=0),
        dict(channel_mults=()),
        dict(channel_mults=(1, 0)),
        dict(num_heads=0),
        dict(num_classes=-1),
    ],
)
def test_impossible_sizes(options):
    """Said at once and in words, not by a shape error in the middle of the first batch."""
    with pytest.raises(ValueError):
        network(**options)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(attention_levels=(2,)), "0..1"),
        (dict(attention_levels=(-1,)), "0..1"),
        (dict(num_res_blocks=(1, 2, 3)), "2"),
        (dict(num_heads=3), "1, 2, 4, 8, 16"),
    ],
)
def test_options_that_do_not_fit(options, words):
    """Neither ignored nor changed in silence: the error has the numbers that would do."""
    with pytest.raises(ValueError, match=f"{list(options)[0]}.*{words}"):
        network(**options)


@pytest.mark.parametrize("image_size, levels", [(32, [2]), (64, [2]), (128, [])])
def test_attention_by_default(image_size, levels):
    """Where it is affordable: on the last level, if that works at 16x16 or less."""
    with torch.device("meta"):
        assert SimpleDiffusion(image_size).network.config["attention_levels"] == levels


def test_rebuilt_from_its_config():
    """A checkpoint holds net.config and the weights: the two have to belong together, whatever was chosen."""
    net = network(
        hidden_channels=12,
        channel_mults=(1, 3),
        num_res_blocks=2,
        attention_levels=(0,),
        time_dim=20,
    )
    x, t, y = batch(2, 4, 4)
    again = SimpleUNet(**net.config).eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(net(x, t, y), again(x, t, y)) and again.config == net.config


def test_time_and_class_change_the_output():
    """An embedding that is computed and never used trains without any error."""
    net = network()
    x = batch(1, 8, 8)[0].expand(4, 3, 8, 8)
    over_time = net(x, torch.tensor([0, 10, 500, 999]))
    over_class = net(x, torch.full((4,), 10), torch.arange(4))
    for out in (over_time, over_class):
        assert all(spread(out[i], out[j]) > 1e-3 for i in range(4) for j in range(i))
    # No label is the null label, which is the last one.
    assert torch.equal(
        net(x, torch.full((4,), 10)), net(x, torch.full((4,), 10), torch.full((4,), 3))
    )


def test_labels_without_classes():
    """Labels that nothing reads would go unnoticed."""
    x, t, y = batch(2, 8, 8)
    with pytest.raises(ValueError):
        network(num_classes=None)(x, t, y)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (16, 48), (64, 64)])
def test_images_do_not_mix(size):
    """Image i of a batch comes out as it does alone: a reshape for one fixed image size folds others together."""
    net = network(channel_mults=(1, 2, 2), attention_levels=(0, 1, 2) if size[0] < 32 else (1, 2))
    x, t, y = batch(4, *size)
    assert (
        spread(
            net(x, t, y),
            torch.cat([net(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)]),
        )
        < 1e-4
    )


@pytest.fixture(params=[(1, True), (4, True), (1, False), (4, False)])
def attention(request):
    """An attention block of 8 channels with one and with four heads, weights of order 1; as it trains and as it draws:
    with gradients it is written out, without it is PyTorch's own."""
    heads, gradients = request.param
    torch.manual_seed(0)
    block = Attention(8, heads)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    with torch.set_grad_enabled(gradients):
        yield block.eval()


def test_attention_is_pytorchs(attention):
    """x + out(softmax(q k^T / sqrt(d)) v), the middle by PyTorch: finds a wrong scale, a softmax over the wrong axis,
    heads that are cut wrongly."""
    x = torch.randn(2, 8, 4, 6)
    tokens = attention.norm(x).flatten(2).transpose(1, 2)
    q, k, v = (
        part.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        for part in attention.qkv(tokens).chunk(3, dim=2)
    )
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    expected = x + attention.out(h).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-4)


def test_fused_attention_gets_contiguous_tensors(monkeypatch):
    """On MPS permuted ones gave wrong results without an error."""
    fused, given = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *qkv: given.extend(qkv) or fused(*qkv)
    )
    with torch.no_grad():
        Attention(8, 4)(torch.randn(2, 8, 4, 6))
    assert len(given) == 3 and all(tensor.is_contiguous() for tensor in given)


def test_attention_knows_no_positions(attention):
    """Pixels in another order come out in that order: a reshape where a permute belongs breaks that."""
    x, order = torch.randn(2, 8, 4, 6), torch.randperm(24)

    def shuffled(images):
        return images.flatten(2)[:, :, order].view(images.shape)

    torch.testing.assert_close(attention(shuffled(x)), shuffled(attention(x)), rtol=1e-4, atol=1e-4)


def test_attention_is_an_average(attention):
    """The weights of each pixel sum to 1, so where every value is c so is the result; not with softmax over q."""
    c = torch.randn(8)
    with torch.no_grad():
        attention.qkv.weight[16:], attention.qkv.bias[16:] = 0, c
        attention.out.weight.copy_(torch.eye(8)), attention.out.bias.zero_()
    x = torch.randn(2, 8, 4, 6)
    torch.testing.assert_close(
        attention(x) - x, c[:, None, None].expand_as(x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("bfloat16", [False, True])
def test_time_embedding(bfloat16):
    """A row depends on its timestep alone, not on its place in the batch. All 1000 differ, the ends much,
    which t / 1000 in these sinusoids would not give, nor t in bfloat16, which makes 507 of them."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        rows, mixed, one = (
            time_embedding(torch.tensor(t), 256) for t in (range(1000), [5, 5, 900, 5], [7])
        )
    assert (
        rows.shape == (1000, 256)
        and rows.dtype == torch.float32
        and len(rows.unique(dim=0)) == 1000
    )
    assert F.cosine_similarity(rows[0], rows[999], dim=0) < 0.9
    torch.testing.assert_close(torch.cat([mixed, one]), rows[[5, 5, 900, 5, 7]])


def test_training_and_drawing_see_one_network():
    """Without dropout nothing depends on the mode: batch statistics would, and EMA weights have none."""
    net = network()
    x, t, y = batch(2, 8, 8)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
    assert torch.equal(net.train()(x, t, y), net.eval()(x, t, y))


def test_dropout():
    """It drops in training and not afterwards; the option reaches the layers."""
    net = network(dropout=0.5)
    x, t, y = batch(2, 8, 8)
    assert torch.equal(net(x, t, y), net(x, t, y))
    assert spread(net.train()(x, t, y), net(x, t, y)) > 1e-3


def test_every_parameter_learns():
    """What gets no gradient is not connected: a projection of time, a skip, a row of the class embedding."""
    net = network(channel_mults=(1, 2, 4), attention_levels=(1, 2), num_res_blocks=2)
    x, t, y = batch(8, 8, 8)
    F.mse_loss(net(x, t, y), torch.randn_like(x)).backward()
    assert [
        name for name, parameter in net.named_parameters() if not parameter.grad.abs().max() > 0
    ] == []
    assert (net.class_embedding.weight.grad.abs().amax(dim=1) > 0).all() and len(
        net.class_embedding.weight
    ) == 4


def test_memory_layout():
    """channels_last is a matter of speed: a view that takes the layout for granted would give another picture."""
    net = network()
    x, t, y = batch(2, 16, 16)
    last = x.contiguous(memory_format=torch.channels_last)
    out = net(x, t, y)
    assert spread(out, net(last, t, y)) < 1e-4
    assert spread(out, net.to(memory_format=torch.channels_last)(last, t, y)) < 1e-4
