"""The diffusion process against the papers' equations, written out here a second time and in float64.

Networks that know the answer stand in for a trained one: that finds the bugs that only make pictures a little worse.
"""

import contextlib
import math
import textwrap

import pytest
import torch
import torch.nn as nn
from conftest import TINY, perturb

import diffusion_model
from diffusion_model import DiffusionModel, SimpleUNet

SAMPLERS, SCHEDULES = ("ddpm", "ddim", "dpm++"), ("linear", "cosine")
KINDS = [(prediction, schedule) for schedule in SCHEDULES for prediction in ("noise", "v")]
IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def truth(schedule="linear", n_steps=1000):
    """alpha and sigma of each timestep (n_steps + 1,), by the papers; the last entry is the clean image, 1 and 0."""
    if schedule == "linear":  # Ho et al., section 4, times 1000 / n_steps
        betas = torch.linspace(1e-4, 0.02, n_steps, dtype=torch.float64) * 1000 / n_steps
    else:  # Nichol and Dhariwal, eq. 17 and the cap below it
        f = (
            torch.cos(
                (torch.arange(n_steps + 1, dtype=torch.float64) / n_steps + 0.008)
                / 1.008
                * math.pi
                / 2
            )
            ** 2
        )
        betas = 1 - f[1:] / f[:-1]
    abar = torch.cat([(1 - betas.clamp(max=0.999)).cumprod(0), torch.ones(1)])
    return abar.sqrt(), (1 - abar).sqrt()


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


class Stub(nn.Module):
    """A function of (x_t, t) or (x_t, t, y) in place of the network. It keeps what it was called with."""

    num_classes = 3

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, []

    def forward(self, x_t, t, *y):
        assert t.dtype == torch.int64 and t.shape == x_t.shape[:1]
        self.calls.append((x_t, t, *y))
        return self.function(x_t, t, *y)


def oracle(x_start, prediction="noise", schedule="linear", n_steps=1000):
    """A process whose network takes each x_t for the image x_start(x_t, alpha, sigma)."""
    alphas, sigmas = truth(schedule, n_steps)

    def network(x_t, t):
        alpha, sigma = alphas[t[0]], sigmas[t[0]]
        x_0 = x_start(x_t.double(), alpha, sigma)
        noise = (x_t - alpha * x_0) / sigma
        return (noise if prediction == "noise" else alpha * noise - sigma * x_0).float()

    return DiffusionModel(Stub(network), n_steps, schedule=schedule, prediction=prediction)


def visited(process):
    return [t[0].item() for _, t in process.model.calls]


def timesteps(sampler, steps=None, schedule="linear", n_steps=1000):
    """The timesteps that the network is given."""
    process = oracle(lambda x, alpha, sigma: torch.zeros_like(x), "v", schedule, n_steps)
    process.sample((1, 1, 1, 1), sampler, steps, progress=False)
    return visited(process)


def noise_of(seed, shape, draws=1):
    """Image i draws from its own generator, seeded seed + i: -> (draws, N, C, H, W)."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(shape[0])]
    return torch.stack(
        [
            torch.stack([torch.randn(shape[1:], generator=g) for g in generators])
            for _ in range(draws)
        ]
    )


def wild(x, t, y=None):
    """A network that is often wrong, and so has to be clipped; to each pixel in its own way."""
    return torch.sin(3 * x + t[:, None, None, None] / 50)


# ---- noising and the loss


@pytest.mark.parametrize("n_steps", [50, 100, 1000, 4000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule(schedule, n_steps):
    """The papers' tables, and noise at the end for any n_steps: 1e-4..0.02 in 100 steps leave 0.36."""
    process, (alphas, sigmas) = (
        DiffusionModel(None, n_steps, schedule=schedule),
        truth(schedule, n_steps),
    )
    abar = process.alphas_cumprod
    assert (
        0 < abar[-1] < 1e-3
        and (abar.diff() < 0).all()
        and (process.betas > 0).all()
        and (process.betas < 1).all()
    )
    for table, expected in (
        (abar, alphas**2),
        (process.sqrt_alphas_cumprod, alphas),
        (process.sqrt_one_minus_alphas_cumprod, sigmas),
        (1 - process.betas, (alphas / alphas.roll(1)) ** 2),
    ):  # the last entry is 1
        torch.testing.assert_close(table.double(), expected[:-1], rtol=1e-4, atol=1e-7)


def test_known_values():
    """Ho et al.: betas 1e-4..0.02. The tests of diffusers hold the posterior variances 0, 0.00979 and 0.02."""
    process = DiffusionModel(None)
    close(process.betas, torch.linspace(1e-4, 0.02, 1000), 1e-8)
    assert process.posterior_variance[0] == 0
    close(process.posterior_variance[[487, 999]], torch.tensor([0.00979, 0.02]), 1e-5)


def test_tables_are_no_weights():
    """float32 (MPS has no float64), and not in the state_dict: a file must not bring a schedule along."""
    process = DiffusionModel(nn.Linear(1, 1))
    names = "betas alphas_cumprod sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod lambdas posterior_variance".split()
    assert {name: table.dtype for name, table in process.named_buffers()} == dict.fromkeys(
        names, torch.float32
    )
    assert list(process.state_dict()) == ["model.weight", "model.bias"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_q_sample_is_step_by_step_noising(schedule):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z (eq. 2) iterated: its mean and variance are those of eq. 4."""
    process, t, ones = (
        DiffusionModel(None, schedule=schedule),
        torch.arange(1000),
        torch.ones(1000, 1, 1, 1),
    )
    mean, variance, steps = 1.0, 0.0, []
    for beta in process.betas.tolist():
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        steps.append((mean, math.sqrt(variance)))
    closed = torch.cat(
        [process.q_sample(ones, t, 0 * ones), process.q_sample(0 * ones, t, ones)], dim=1
    ).flatten(1)
    torch.testing.assert_close(closed, torch.tensor(steps), rtol=1e-4, atol=1e-6)


def test_each_image_has_its_own_t():
    """A factor of shape (B,) would go along the width, with no error where B equals it."""
    process, x, z, t = (
        DiffusionModel(None),
        torch.randn(8, 3, 8, 8),
        torch.randn(8, 3, 8, 8),
        torch.arange(8) * 120,
    )
    one_by_one = [process.q_sample(x[i : i + 1], t[i : i + 1], z[i : i + 1]) for i in range(8)]
    close(process.q_sample(x, t, z), torch.cat(one_by_one), 1e-6)


@pytest.mark.parametrize("prediction, schedule", KINDS)
def test_loss(prediction, schedule):
    """Eq. 14: the mean square of noise - output; for v (Salimans and Ho) of alpha noise - sigma x_0 - output."""
    x, z, t, y = (
        IMAGES.repeat(2, 1, 1, 1),
        torch.randn(6, 3, 4, 4),
        torch.arange(0, 1000, 199),
        torch.arange(6),
    )
    alpha, sigma = (table[t].view(6, 1, 1, 1) for table in truth(schedule))
    process = DiffusionModel(Stub(wild), schedule=schedule, prediction=prediction)
    loss = process(x, y, t, z)
    ((x_t, t_seen, y_seen),) = process.model.calls
    close(x_t, alpha * x + sigma * z, 1e-5)
    assert torch.equal(t_seen, t) and torch.equal(y_seen, y)
    error = (z if prediction == "noise" else alpha * z - sigma * x) - wild(x_t, t)
    assert loss.shape == () and loss.item() == pytest.approx(error.square().mean().item(), rel=1e-4)


def test_drawn_timesteps_and_noise():
    """t is uniform in 0..n_steps-1, both ends included: each of 10 some 2000 of 20,000 times, give or take 45.
    The noise is N(0, 1): a network that says 0 has the loss 1."""
    process = DiffusionModel(Stub(lambda x_t, t: torch.zeros_like(x_t)), n_steps=10)
    loss = process(torch.ones(20_000, 1, 2, 2))
    counts = torch.bincount(process.model.calls[0][1])
    assert len(counts) == 10 and (counts - 2000).abs().max() < 250 and abs(loss.item() - 1) < 0.03


@pytest.mark.parametrize(
    "t_distribution, schedule, n_steps",
    [
        *(
            ("lognormal", schedule, n_steps)
            for schedule in SCHEDULES
            for n_steps in (50, 100, 1000, 4000)
        ),
        ("uniform", "linear", 1000),
        ("uniform", "cosine", 50),
    ],
)
def test_timesteps_to_train_on(t_distribution, schedule, n_steps):
    """lognormal: the quantiles of ln(sigma / alpha) over 10^5 draws are those of N(-0.8, 1.2^2) (Karras et al. 2022,
    table 1, "noise distribution"; the numbers were measured here) but for the distance of neighbouring timesteps, as
    far as the table reaches. uniform: those of t."""
    process = DiffusionModel(None, n_steps, schedule=schedule, t_distribution=t_distribution)
    t = torch.cat([process.draw_timesteps(64) for _ in range(1600)])
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() < n_steps
    shares = torch.tensor([0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95], dtype=torch.float64)
    if t_distribution == "uniform":
        close((t + 0.5).double().quantile(shares), shares * n_steps, 0.51 + 0.002 * n_steps)
        return
    alphas, sigmas = truth(schedule, n_steps)
    levels = (sigmas / alphas).log()[:-1]
    wanted = -0.8 + 1.2 * torch.special.ndtri(shares)
    nearest = levels[(levels[:, None] - wanted).abs().argmin(dim=0)]
    gap = levels.diff().max() if n_steps < 1000 else 0.05
    close(levels[t].quantile(shares), nearest, 0.02 + gap)
    close(levels[t].quantile(shares[3:4]), wanted[3:4], 0.03 + 2 / n_steps**0.5)
    assert abs(levels[t].mean() + 0.8) < 0.06 and abs(levels[t].std() - 1.2) < 0.1


@pytest.mark.parametrize("t_distribution", ["uniform", "lognormal"])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_timesteps_are_spread_over_the_batch(t_distribution, count):
    """One from each of `count` equal shares of the distribution, in any order; each call draws others."""
    process = DiffusionModel(None, t_distribution=t_distribution)
    shares = (
        process.draw_timesteps(100_000)
        .double()
        .quantile(torch.linspace(0, 1, count + 1, dtype=torch.float64))
    )
    draws = [process.draw_timesteps(count) for _ in range(20)]
    for t in draws:
        assert ((shares[:-1] - 2 <= t.sort().values) & (t.sort().values <= shares[1:] + 2)).all()
    assert len({tuple(t.tolist()) for t in draws}) > 10 and (
        count == 1 or any(t[0] > t[-1] for t in draws)
    )


# ---- the samplers


@pytest.mark.parametrize("prediction, schedule", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 99, 100])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_image(sampler, steps, prediction, schedule):
    """If the data is one image, that is what comes out, or noise was left at the end. ddim and dpm++
    keep at every call to alpha x_0 + sigma noise with their first noise, or they mix up timesteps."""
    image, (alphas, sigmas) = IMAGES[:2].double(), truth(schedule, 100)
    process = oracle(lambda x, alpha, sigma: image, prediction, schedule, 100)
    result = process.sample(image.shape, sampler, steps, progress=False)
    # x_0 from the noise is divided by alpha, which begins at 0.006, or for cosine at 5e-5.
    tolerance = {"v": 1e-4, "noise": 1e-3 if schedule == "linear" else 2e-2}[prediction]
    close(result, image, tolerance)
    if sampler != "ddpm":
        x_T, t = process.model.calls[0]
        noise = (x_T - alphas[t[0]] * image) / sigmas[t[0]]
        for x_t, t in process.model.calls:
            close(x_t, alphas[t[0]] * image + sigmas[t[0]] * noise, tolerance)


@pytest.mark.parametrize("n_steps, steps", [(1000, 1000), (1001, 51), (1001, 11)])
def test_one_image_variance(n_steps, steps):
    """There ddpm's x_t is alpha x_0 + sigma N(0, 1) at every call, also at every 20th or 100th timestep."""
    image, (alphas, sigmas) = torch.full((1, 3, 64, 64), 0.5), truth(n_steps=n_steps)
    process = oracle(lambda x, alpha, sigma: image.double(), n_steps=n_steps)
    process.sample(image.shape, "ddpm", steps, seed=0, progress=False)
    for x_t, t in process.model.calls:
        z = (x_t - alphas[t] * image) / sigmas[t]
        assert abs(z.mean()) < 0.04 and abs(z.std() - 1) < 0.03, t


@pytest.mark.parametrize(
    "sampler, steps, tolerance", [("ddpm", 1000, 0.03), ("ddim", 1000, 0.03), ("dpm++", 20, 0.05)]
)
def test_gaussian_data(sampler, steps, tolerance):
    """Data from N(0, 0.25^2), where the best x_0 is alpha x_t 0.25^2 / (alpha^2 0.25^2 + sigma^2), comes out with that
    spread; not with noise scaled by a variance. ddim and ddpm in few steps are too narrow, rightly so."""
    process = oracle(lambda x, alpha, sigma: alpha * x / 16 / (alpha**2 / 16 + sigma**2))
    result = process.sample((1, 3, 64, 64), sampler, steps, seed=0, progress=False)
    assert result.std().item() == pytest.approx(0.25, rel=tolerance) and abs(result.mean()) < 0.02


@pytest.mark.parametrize("prediction, schedule", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_tiny_data_set(sampler, prediction, schedule):
    """For three images the best x_0 is their mean, weighted by how likely each is under x_t. Every sampler ends in one
    of them, and not always in the same."""

    def x_start(x, alpha, sigma):
        distance = (x[:, None] - alpha * IMAGES).square().sum(dim=(2, 3, 4)) / (2 * sigma**2)
        return torch.einsum("bi,ichw->bchw", (-distance).softmax(dim=1), IMAGES.double())

    result = oracle(x_start, prediction, schedule, 200).sample(
        (16, 3, 4, 4), sampler, seed=0, progress=False
    )
    distance = (result[:, None] - IMAGES).abs().amax(dim=(2, 3, 4))
    assert distance.amin(dim=1).max() < 1e-3 and len(distance.argmin(dim=1).unique()) > 1


@pytest.mark.parametrize("prediction, schedule", KINDS[::3])
@pytest.mark.parametrize(
    "sampler, n_steps, steps",
    [
        ("ddpm", 1000, 1000),
        ("ddpm", 1000, 20),
        ("ddim", 1000, 50),
        ("dpm++", 1000, 20),
        ("dpm++", 50, 30),
    ],
)
def test_each_step_is_the_papers(sampler, n_steps, steps, prediction, schedule):
    """What the network is given next follows by the paper's formula from what it was given and said: with the clipped
    x_0 throughout, the variance of the whole step, dpm++'s second order (50, 30: uneven)."""
    seen, (alphas, sigmas) = [], truth(schedule, n_steps)
    process = DiffusionModel(Stub(wild), n_steps, schedule=schedule, prediction=prediction)
    result = process.sample(
        (2, 3, 8, 8),
        sampler,
        steps,
        seed=3,
        progress=False,
        callback=lambda i, t, x_t, x_0: seen.append((t, x_t.double(), x_0.double())),
    )
    z = noise_of(3, result.shape, steps + 1)
    close(seen[0][1], z[0], 0)
    clipped = 0
    for i, ((t, x_t, x_0), (s, x_s, _)) in enumerate(
        zip(seen, seen[1:] + [(n_steps, result, None)])
    ):
        a_t, s_t, a_s, s_s = alphas[t], sigmas[t], alphas[s], sigmas[s]
        output = wild(x_t, torch.tensor([t]))
        x_start = (x_t - s_t * output) / a_t if prediction == "noise" else a_t * x_t - s_t * output
        close(x_0, x_start.clamp(-1, 1), 1e-5 / min(1, 10 * a_t))
        clipped += (x_start.abs() > 1).sum()
        if s == n_steps:  # the last step lands on x_0
            expected = x_0
        elif sampler == "ddpm":  # Ho et al., eq. 6 and 7, with the beta of the whole step
            beta = 1 - (a_t / a_s) ** 2
            mean = (a_s * beta * x_0 + (1 - beta).sqrt() * s_s**2 * x_t) / s_t**2
            expected = mean + s_s / s_t * beta.sqrt() * z[i + 1]
        elif sampler == "ddim":  # Song et al., eq. 12, eta = 0
            expected = a_s * x_0 + s_s * (x_t - a_t * x_0) / s_t
        else:  # Lu et al., Algorithm 2; the first step is first order
            h = (a_s / s_s).log() - (a_t / s_t).log()
            D = x_0 if i == 0 else (1 + h / h_before / 2) * x_0 - h / h_before / 2 * x_0_before
            expected = s_s / s_t * x_t - a_s * ((-h).exp() - 1) * D
            h_before, x_0_before = h, x_0
        close(x_s, expected, 2e-5)
    assert clipped > 100


def test_p_sample():
    """Algorithm 2, lines 3 and 4, for images at different t: (x_{t-1} - mean) / std is N(0, 1) by eq. 7. At t = 0 the
    clipped x_0 comes out, without noise."""
    t, x_t, process = (
        torch.tensor([0, 1, 500, 999]),
        torch.randn(4, 1, 128, 128),
        DiffusionModel(Stub(wild)),
    )
    first, second = process.p_sample(x_t, t), process.p_sample(x_t, t)
    # Entry -1 is the clean image, which is right for t - 1 where t = 0.
    alpha, sigma, alpha_s, sigma_s = (
        table[u].view(-1, 1, 1, 1) for u in (t, t - 1) for table in truth()
    )
    x_0 = ((x_t - sigma * wild(x_t, t)) / alpha).clamp(-1, 1)
    beta = 1 - (alpha / alpha_s) ** 2
    mean = (alpha_s * beta * x_0 + (1 - beta).sqrt() * sigma_s**2 * x_t) / sigma**2
    close(first[0], x_0[0], 1e-5)
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    z = ((first - mean) / (sigma_s / sigma * beta.sqrt()))[1:]
    assert (z.mean(dim=(1, 2, 3)).abs() < 0.04).all() and (
        (z.std(dim=(1, 2, 3)) - 1).abs() < 0.03
    ).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 13, 50, 333, 999, 1000])
@pytest.mark.parametrize("sampler", SAMPLERS[:2])
def test_even_timesteps(sampler, steps):
    """Exactly `steps` of them, evenly from n_steps - 1 to 0 but for the rounding: lists that begin at 900 or end at 1
    draw duller or noisier pictures."""
    seen = timesteps(sampler, steps)
    assert len(seen) == steps and seen[0] == 999 and (steps == 1 or seen[-1] == 0)
    assert all(abs(t - (999 - i * 999 / max(1, steps - 1))) < 0.51 for i, t in enumerate(seen))
    assert seen == sorted(set(seen), reverse=True)


@pytest.mark.parametrize(
    "schedule, n_steps", [("linear", 1000), ("cosine", 1000), ("linear", 50), ("cosine", 4000)]
)
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
def test_timesteps_even_in_lambda(steps, schedule, n_steps):
    """dpm++ takes the timesteps nearest to even spacing of lambda = log(alpha / sigma), none twice, from n_steps - 1
    to 0; with cosine, where lambda < -5.1 is nothing but noise, from there."""
    lambdas = (truth(schedule, n_steps)[0] / truth(schedule, n_steps)[1]).log()[:-1]
    seen = timesteps("dpm++", steps, schedule, n_steps)
    wanted = torch.linspace(lambdas[seen[0]], lambdas[0], steps, dtype=torch.float64)
    nearest = (lambdas - wanted[:, None]).abs().argmin(dim=1).tolist()
    assert seen == sorted(set(nearest), reverse=True) and (steps == 1 or seen[-1] == 0)
    assert (
        seen[0] == n_steps - 1
        if schedule == "linear"
        else seen[0] == (lambdas >= -5.1).nonzero().max()
    )


@pytest.mark.parametrize("sampler", diffusion_model.SAMPLERS)
def test_no_float64_is_made_where_mps_would_make_it(sampler):
    """lambda goes to the CPU before it becomes float64, which MPS has not."""
    called = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), options=None):
            called.append(function)
            given = options or {}
            assert given.get("dtype") is not torch.float64 or given.get("device") == "cpu"
            assert function is not torch.Tensor.to
            assert function is not torch.Tensor.double or torch.Tensor.cpu in called
            return function(*args, **(options or {}))

    process = DiffusionModel(Stub(wild), schedule="cosine")
    with Watch():
        process.timesteps(sampler)
    assert diffusion_model.SAMPLERS[sampler].even_in == "t" or torch.Tensor.double in called


@pytest.mark.filterwarnings("ignore:x_T is not noise")  # of one step
@pytest.mark.parametrize(
    "sampler, n_steps, expected",
    [
        ("ddpm", 1000, 1000),
        ("ddim", 1000, 50),
        ("dpm++", 1000, 13),
        ("ddpm", 1, 1),
        ("ddim", 10, 10),
        ("dpm++", 1, 1),
    ],
)
def test_default_steps(sampler, n_steps, expected):
    """As documented, and no more than there are."""
    assert len(timesteps(sampler, n_steps=n_steps)) == expected


def test_step_is_the_posterior():
    """With eta 1 the spread of a step to t - 1 is the posterior's: the table of eq. 7, and no noise at t = 0."""
    process, t, zero = DiffusionModel(None), torch.arange(1000), torch.zeros(1000, 1, 1, 1)
    spread = process.step(
        zero, zero, t, t - 1, eta=1.0, new_noise=torch.ones(1000, 1, 1, 1)
    ).flatten()
    torch.testing.assert_close(spread.square(), process.posterior_variance, rtol=1e-4, atol=1e-9)


def heun(process, now, before, denoise):
    """Karras et al. 2022, Algorithm 1: the noise to follow is the mean of that here and that after the step."""
    alpha, sigma = process.alpha_sigma(now.t)
    alpha_s, sigma_s = process.alpha_sigma(now.s)
    x_s = process.step(now.x_t, now.x_0, now.t, now.s)
    noise = (
        (now.x_t - alpha * now.x_0) / sigma + (x_s - alpha_s * denoise(x_s, now.s)) / sigma_s
    ) / 2
    return (now.x_t - sigma * noise) / alpha


def test_a_sampler_of_ones_own(monkeypatch):
    """An entry in the table is a sampler; this one calls the network twice a step. For data from N(0, 0.25^2) x_T is
    known to end at 0.25 x_T. In twice as many steps Heun's error falls to a quarter, a first order's to a half."""
    monkeypatch.setattr(diffusion_model, "SAMPLERS", dict(diffusion_model.SAMPLERS))
    docstring = diffusion_model.Sampler.__doc__
    exec(
        textwrap.dedent(docstring[docstring.index("        def heun") :]),
        vars(diffusion_model).copy(),
    )
    process = oracle(lambda x, alpha, sigma: alpha * x / 16 / (alpha**2 / 16 + sigma**2))
    now = diffusion_model.Step(*noise_of(0, (1, 3, 4, 4), draws=2), t=700, s=500)
    theirs = diffusion_model.SAMPLERS["heun"].aim(process, now, None, lambda x_t, t: x_t / 3)
    torch.testing.assert_close(
        theirs, heun(process, now, None, lambda x_t, t: x_t / 3), rtol=1e-4, atol=1e-4
    )
    x_T = noise_of(0, (1, 3, 16, 16))[0]
    errors = [
        (process.sample(x_T.shape, "heun", steps, x_T=x_T, progress=False) - 0.25 * x_T)
        .abs()
        .mean()
        for steps in (20, 40, 80)
    ]
    assert errors[0] < 0.01 and errors[0] > 3.5 * errors[1] > 3.5 * 3.5 * errors[2]
    process.model.calls.clear()
    process.sample(x_T.shape, "heun", progress=False)
    assert len(process.model.calls) == 2 * 18 - 1


def test_a_schedule_that_leaves_signal():
    """From pure noise such a process draws wrongly: it says so before it is trained."""
    with pytest.warns(UserWarning, match="beta_end"):
        DiffusionModel(Stub(wild), beta_end=0.002)


# ---- the options of sample


@pytest.mark.parametrize(
    "options",
    [
        dict(schedule="sigmoid"),
        dict(prediction="x0"),
        dict(n_steps=0),
        dict(t_distribution="cosine"),
        dict(beta_start=0.1, beta_end=0.01),
        dict(n_steps=50, beta_end=0.4),
    ],
)
def test_impossible_process(options):
    """A misspelt option must not silently be another one, and betas that leave nothing of the image divide by 0."""
    with pytest.raises(ValueError):
        DiffusionModel(None, **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(steps=0),
        dict(steps=11),
        dict(sampler="dpm++", steps=11),
        dict(sampler="dpm"),
        dict(y=torch.tensor([0])),
        dict(y=torch.tensor([0, 4])),
        dict(y=torch.tensor([0, -1])),
        dict(mask=torch.ones(2, 3, 4, 4)),
        dict(init_image=IMAGES[:2], strength=1.1),
        dict(init_image=IMAGES[:2], strength=-0.1),
        dict(init_image=IMAGES),
        dict(init_image=IMAGES[:2], strength=0, sampler="dpm"),
        dict(init_image=IMAGES[:1], mask=torch.ones(8, 1, 4, 4), shape=(1, 3, 4, 4)),
        dict(init_image=IMAGES[:2], mask=torch.full((4, 4), 255)),
        dict(init_image=127.5 * IMAGES[:2]),
    ],
)
def test_impossible_options(options):
    """Said in words before the first step, not by an index error far below or by a picture of something else."""
    process = DiffusionModel(SimpleUNet(**TINY, num_classes=3), n_steps=10)
    with pytest.raises(ValueError):
        process.sample(**{"shape": (2, 3, 4, 4), "sampler": "ddim", "progress": False, **options})


@pytest.mark.parametrize("w", [0, 1, 3])
def test_guidance(w):
    """Where the network says c for a label and u for null it becomes u + w (c - u), on all channels: w = 1 in one call
    without the null label, any other w in one call with both halves."""
    c, u = torch.tensor([0.1, 0.2, -0.1]), 0.05
    network = Stub(
        lambda x, t, y: torch.cat([c, torch.tensor([u])])[y].view(-1, 1, 1, 1).expand_as(x)
    )
    process, (alphas, sigmas) = DiffusionModel(network, prediction="v"), truth()
    result = process.sample(
        (3, 3, 4, 4), "ddim", 1, y=torch.tensor([0, 1, 2]), guidance=w, seed=0, progress=False
    )
    close(
        result,
        alphas[999] * noise_of(0, result.shape)[0]
        - sigmas[999] * (u + w * (c - u)).view(3, 1, 1, 1),
        1e-5,
    )
    ((x_t, _, labels),) = network.calls
    assert sorted(labels.tolist()) == ([0, 1, 2] if w == 1 else [0, 1, 2, 3, 3, 3]) and len(
        x_t
    ) == len(labels)


@pytest.mark.parametrize("low, high", [(0.2, 5), (0, math.inf), (5, 0.2)])
def test_guidance_interval(low, high):
    """Inside the interval of sigma / alpha as above, outside of it in one call as without guidance: DDIM by hand."""
    c, u = torch.tensor([0.1, 0.2, -0.1]), 0.05
    network = Stub(lambda x, t, y: x / 2 + torch.cat([c, torch.tensor([u])])[y].view(-1, 1, 1, 1))
    process, (alphas, sigmas) = DiffusionModel(network, prediction="v"), truth()
    result = process.sample(
        (2, 3, 4, 4),
        "ddim",
        10,
        y=torch.tensor([0, 1]),
        guidance=3,
        seed=0,
        progress=False,
        guidance_interval=(low, high),
    )
    x, visited = noise_of(0, result.shape)[0], process.timesteps("ddim", 10)
    for t, s, (x_t, _, _) in zip(visited, [*visited[1:], None], network.calls, strict=True):
        inside = low <= sigmas[t] / alphas[t] <= high
        assert len(x_t) == (4 if inside else 2)
        v = x / 2 + (u + (3 if inside else 1) * (c[:2] - u)).view(2, 1, 1, 1)
        x_0 = (alphas[t] * x - sigmas[t] * v).clamp(-1, 1)
        x = x_0 if s is None else alphas[s] * x_0 + sigmas[s] * (x - alphas[t] * x_0) / sigmas[t]
    close(result, x, 1e-4)


@pytest.mark.parametrize("inpaint", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_seeds(sampler, inpaint):
    """Image i of seed s is the image of seed s + i, whatever batch it comes in; None is another one each time."""
    process = DiffusionModel(Stub(wild), n_steps=20)

    def draw(size, seed):
        shape = (size, 3, 4, 4)
        repaint = (
            dict(init_image=IMAGES[:1].expand(shape), mask=torch.ones(shape).tril())
            if inpaint
            else {}
        )
        return process.sample(shape, sampler, 10, seed=seed, progress=False, **repaint)

    four = draw(4, 5)
    assert (
        torch.equal(four, torch.cat([draw(1, 5 + i) for i in range(4)]))
        and len(four.unique(dim=0)) == 4
    )
    torch.manual_seed(0)
    random = draw(1, None)
    torch.manual_seed(0)
    assert not torch.equal(random, draw(1, None))


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_leaves_no_trace(sampler, stop):
    """It draws in eval mode; then each part of the network and torch's random numbers are as they were, or
    pictures on the way would change the training. So too when it is interrupted."""
    network = Stub(lambda x, t: modes.extend(part.training for part in network.modules()) or x)
    network.on, network.off, modes, state = (
        nn.Dropout(),
        nn.Dropout().eval(),
        [],
        torch.get_rng_state(),
    )
    with pytest.raises(ZeroDivisionError) if stop else contextlib.nullcontext():
        DiffusionModel(network, n_steps=10).sample(
            (2, 3, 4, 4), sampler, 5, progress=False, callback=lambda i, *_: 1 // (0 if stop else 1)
        )
    assert not any(modes) and network.training and network.on.training and not network.off.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("prediction, schedule", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_result(sampler, prediction, schedule):
    """Of the shape asked for, in [-1, 1], finite though the network is untrained, and without a graph."""
    process = DiffusionModel(
        perturb(SimpleUNet(**TINY)), 100, schedule=schedule, prediction=prediction
    )
    result = process.sample((2, 3, 8, 4), sampler, 10, progress=False)
    assert (
        result.shape == (2, 3, 8, 4) and result.dtype == torch.float32 and not result.requires_grad
    )
    assert result.isfinite().all() and result.abs().max() <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_x_T_takes_the_place_of_the_seeds_noise(sampler):
    """Of that alone: what ddpm and a mask draw later is as without it. And the network may be a plain function."""
    process = DiffusionModel(lambda x_t, t: 0.1 * x_t, 50)
    options = dict(
        sampler=sampler, seed=7, init_image=IMAGES[:2], mask=torch.eye(4), progress=False
    )
    drawn = process.sample((2, 3, 4, 4), **options)
    assert torch.equal(
        drawn, process.sample((2, 3, 4, 4), x_T=noise_of(7, (2, 3, 4, 4))[0], **options)
    )
    assert not torch.equal(
        drawn, process.sample((2, 3, 4, 4), x_T=torch.zeros(2, 3, 4, 4), **options)
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_callback(sampler):
    """Once a step, with i, t, the x_t that the network is given at t, and what it takes that for."""
    process, steps = oracle(lambda x, alpha, sigma: 0.5 * x.tanh(), "v"), []
    result = process.sample(
        (2, 3, 4, 4), sampler, 7, progress=False, callback=lambda *step: steps.append(step)
    )
    assert (
        [step[:2] for step in steps]
        == list(enumerate(timesteps(sampler, 7)))
        == list(enumerate(visited(process)))
    )
    for (_, _, x_t, x_0), (given, _) in zip(steps, process.model.calls):
        assert torch.equal(x_t, given)
        close(x_0, 0.5 * x_t.tanh(), 1e-5)
    close(result, steps[-1][3], 1e-6)


@pytest.mark.parametrize("strength", [0, 0.02, 0.5, 0.8, 1])
@pytest.mark.parametrize("sampler, steps", [("ddpm", 1000), ("ddim", 50), ("dpm++", 20)])
def test_init_image(sampler, steps, strength):
    """The image is noised to the first timestep of the list that is at most strength * n_steps, the network given that
    very t and then the rest of the list; at strength 0 nothing happens at all."""
    image = IMAGES[:2]
    process = oracle(lambda x, alpha, sigma: image.double(), "v")
    result = process.sample(
        image.shape, sampler, steps, seed=4, init_image=image, strength=strength, progress=False
    )
    assert visited(process) == [
        t for t in timesteps(sampler, steps) if t <= strength * 1000 and strength > 0
    ]
    close(result, image, 1e-4 if strength else 0)
    if strength:
        x_t, t = process.model.calls[0]
        close(x_t, process.q_sample(image, t, noise_of(4, image.shape)[0]), 1e-6)


def test_init_image_in_one_step():
    """The one timestep of the list may be above the strength: the step then begins there."""
    process, image = oracle(lambda x, alpha, sigma: torch.zeros_like(x)), IMAGES[:1]
    process.sample(image.shape, steps=1, init_image=image, strength=0.29, progress=False)
    assert visited(process) == [290]


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_mask(sampler, strength):
    """What is kept equals the image to the bit and is alpha x_0 + sigma N(0, 1) at every call, as noisy as the
    rest; what is repainted is what the network says, here 0.5."""
    image, (alphas, sigmas) = (torch.arange(3072.0).view(1, 3, 32, 32) % 7 - 3) / 3, truth()
    mask = (torch.arange(32) >= 16).float().expand(image.shape)
    process = oracle(lambda x, alpha, sigma: torch.full_like(x, 0.5), "v")
    result = process.sample(
        image.shape,
        sampler,
        20,
        seed=0,
        init_image=image,
        strength=strength,
        mask=mask,
        progress=False,
    )
    assert torch.equal(result[..., :16], image[..., :16])
    close(result[..., 16:], torch.full((1, 3, 32, 16), 0.5), 1e-4)
    for x_t, t in process.model.calls:
        z = ((x_t - alphas[t] * image) / sigmas[t])[..., :16]
        assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1, t


def test_timesteps_end_before_n_steps():
    """Counted from 1, as papers do, the last would be n_steps: an error, not the clean image of t = -1."""
    process = DiffusionModel(Stub(lambda x, t: x), n_steps=10)
    image = torch.ones(1, 3, 4, 4)
    with pytest.raises(IndexError):
        process.q_sample(image, torch.tensor([10]))
    assert torch.equal(process.q_sample(image, torch.tensor([-1])), image)
