"""The network: its sizes, and what its output may and what it must depend on.

Layers that start at zero hide everything before them, so every network here is perturbed first.
"""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY, attention_sizes, perturb, spy

from diffusion_model import Attention, SimpleUNet, time_embedding


def network(**options):
    """A network of two levels and three classes, in eval mode, whose every layer does something."""
    torch.manual_seed(0)
    return perturb(SimpleUNet(**{**TINY, "num_classes": 3, **options})).eval()


def batch(size, height=8, width=8, channels=3):
    """Noisy images, timesteps and labels, among them the null label. No two images are alike."""
    x = torch.randn(size, channels, height, width, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(0, 999, size).long(), torch.arange(size) % 4


def differ(a, b):
    """The largest difference, in units of the deviation of `a`."""
    return ((a - b).abs().max() / a.std()).item()


@pytest.mark.parametrize(
    "options, millions, sizes",
    [
        ({}, 4.9, {8}),
        (dict(channel_mults=(1, 2, 4), attention_levels=(1, 2), num_res_blocks=3), 16.6, {8, 16}),
    ],
)
def test_sizes_that_are_spoken_of(options, millions, sizes):
    """The default network and 64-128-256 have the parameters that README states. Level i works at
    H / 2**i, so that attention sees images of 32x32 pixels at exactly these sizes."""
    net = SimpleUNet(**options)
    assert attention_sizes(net, 32) == sizes
    assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    "options",
    [
        *(dict(hidden_channels=channels) for channels in (1, 5, 33)),
        *(dict(hidden_channels=channels, num_heads=None) for channels in (3, 48)),
        dict(time_dim=17),
        dict(channel_mults=(2,), attention_levels=(0,)),
        dict(channel_mults=(1, 1, 3), attention_levels=None),
        dict(num_res_blocks=(1, 3), attention_levels=()),
        dict(in_channels=1, num_classes=None),
    ],
)
def test_any_size_works(options):
    """Groups and heads find a divisor of any width. The shape is kept, also if H is not W, and the
    config rebuilds the network, as it does from a checkpoint."""
    net = network(**options)
    x, t, y = batch(2, 8, 12, options.get("in_channels", 3))
    y = None if net.num_classes is None else y
    out = net(x, t, y)
    assert out.shape == x.shape and out.isfinite().all() and out.std() > 0
    again = SimpleUNet(**net.config).eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x, t, y), out) and again.config == net.config


@pytest.mark.parametrize(
    "options, size, words",
    [
        (dict(hidden_channels=0), 8, "at least 1"),
        (dict(channel_mults=(1, 0)), 8, "at least 1"),
        (dict(channel_mults=()), 8, "at least 1"),
        (dict(num_res_blocks=(1, 2, 3)), 8, "one a level"),
        (dict(attention_levels=(2,)), 8, r"0\.\.1"),
        (dict(num_heads=3), 8, "3 .* 16"),
        (dict(num_classes=None), 8, "without classes"),
        (dict(channel_mults=(1,) * 4), 28, r"multiples of 8\b"),
    ],
)
def test_what_does_not_fit(options, size, words):
    """It is refused in words: sizes, labels of no classes, images that cannot be halved."""
    with pytest.raises(ValueError, match=words):
        network(**options)(*batch(1, size, 32))


def test_time_and_class_matter():
    """The same image gives another output at each time and for each label, and label num_classes is
    what no label means."""
    net, x = network(), batch(1)[0].expand(4, 3, 8, 8)
    ten = torch.full((4,), 10)
    for out in (net(x, torch.tensor([0, 10, 500, 999])), net(x, ten, torch.arange(4))):
        assert all(differ(out[i], out[j]) > 1e-3 for i in range(4) for j in range(i))
    assert torch.equal(net(x, ten), net(x, ten, torch.full((4,), 3)))


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (16, 48)])
def test_each_image_alone(size):
    """An image of a batch comes out as it does alone, with gradients or without, in training mode
    or in eval mode, and in either memory format. Batch statistics or a wrong view would show."""
    net = network(channel_mults=(1, 2, 2), attention_levels=(0, 1, 2) if size[0] < 9 else (1, 2))
    x, t, y = batch(4, *size)
    out = net.train()(x, t, y)
    with torch.no_grad():
        alone = [net.eval()(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)]
        net.to(memory_format=torch.channels_last)
        last = net(x.contiguous(memory_format=torch.channels_last), t, y)
    assert differ(out, torch.cat(alone)) < 1e-4 and differ(out, last) < 1e-4


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_pytorchs(monkeypatch, heads, gradients):
    """With the weights of torch's own MultiheadAttention it adds the same to x. The fused function
    is given contiguous tensors, as on MPS permuted ones gave wrong results without an error."""
    torch.manual_seed(0)
    ours, theirs = Attention(8, heads), nn.MultiheadAttention(8, heads, batch_first=True)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.in_proj_weight, theirs.in_proj_bias = ours.qkv.weight, ours.qkv.bias
    theirs.out_proj.weight, theirs.out_proj.bias = ours.out.weight, ours.out.bias
    x, given = torch.randn(2, 8, 4, 6), []
    tokens = ours.norm(x).flatten(2).mT
    expected = x + theirs(tokens, tokens, tokens)[0].mT.reshape(x.shape)
    spy(monkeypatch.setattr, F, "scaled_dot_product_attention", lambda *qkv: given.extend(qkv))
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
    assert all(tensor.is_contiguous() for tensor in given)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_time_embedding(bfloat16):
    """Its columns are cos and sin of t / 10000**(i / half), in float32 under autocast too, because
    bfloat16 cannot tell neighbouring timesteps apart."""
    t = torch.arange(1000)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        rows = time_embedding(t, 255)
    angles = t[:, None].double() / 10000 ** (torch.arange(128).double() / 128)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)[:, :255].float()
    torch.testing.assert_close(rows, expected, rtol=0, atol=2e-4)


def test_dropout():
    """It drops in training and not afterwards."""
    net = network(dropout=0.5)
    assert differ(net.train()(*batch(2)), net.eval()(*batch(2))) > 1e-3
    assert torch.equal(net(*batch(2)), net(*batch(2)))


def test_every_parameter_learns():
    """What gets no gradient is not connected: a skip, the time, a row of the class embedding."""
    net = network(channel_mults=(1, 2, 4), attention_levels=(1, 2), num_res_blocks=2)
    F.mse_loss(net(*batch(8)), torch.ones(8, 3, 8, 8)).backward()
    assert not [name for name, each in net.named_parameters() if not each.grad.abs().max() > 0]
    assert (net.class_embedding.weight.grad.abs().amax(dim=1) > 0).tolist() == [True] * 4
