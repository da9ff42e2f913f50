"""The diffusion process against the papers' equations, written out here a second time in float64.

Functions that know the answer stand in for a trained network. So errors show that would make
pictures only a little worse.
"""

import contextlib
import math
import warnings

import numpy
import pytest
import torch
import torch.nn as nn
from conftest import TINY, other_defaults, perturb

from diffusion_model import DiffusionModel, SimpleUNet

SAMPLERS, SCHEDULES = ("ddpm", "ddim", "dpm++"), ("linear", "cosine")
KINDS = [(prediction, schedule) for schedule in SCHEDULES for prediction in ("noise", "v")]
SHAPE = (2, 3, 4, 4)
IMAGES = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def truth(schedule="linear", n_steps=1000):
    """alpha and sigma (n_steps + 1,) by the papers. The last entry is clean, 1 and 0."""
    exact = dict(dtype=torch.float64)
    if schedule == "linear":  # Ho et al., section 4, times 1000 / n_steps
        betas = torch.linspace(1e-4, 0.02, n_steps, **exact) * 1000 / n_steps
    else:  # Nichol and Dhariwal, eq. 17
        u = torch.arange(n_steps + 1, **exact) / n_steps
        f = ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        betas = 1 - f[1:] / f[:-1]
    abar = torch.cat([(1 - betas.clamp(max=0.999)).cumprod(0), torch.ones(1, **exact)])
    return abar.sqrt(), (1 - abar).sqrt()


def close(actual, expected, atol, rtol=0.0):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


class Stub(nn.Module):
    """A function of (x_t, t) or (x_t, t, y) in place of a network. It keeps what it was given."""

    num_classes = 3

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, []

    def forward(self, x_t, t, *y):
        assert t.dtype == torch.int64 and t.shape == x_t.shape[:1]
        self.calls.append((x_t, t, *y))
        return self.function(x_t, t, *y)


def wild(x, t, *y):
    """A network that is often so wrong that x_0 has to be clipped. Labels change what it says."""
    wave = torch.sin(2 * x + t[:, None, None, None] / 50)
    return wave * (1 + y[0].view(-1, 1, 1, 1)) if y else wave


def wild_process(n_steps=1000, schedule="linear", prediction="v"):
    return DiffusionModel(Stub(wild), n_steps, schedule=schedule, prediction=prediction)


def oracle(x_start, prediction="v", schedule="linear", n_steps=1000):
    """A process whose network takes every x_t for the image x_start."""
    tables = truth(schedule, n_steps)

    def network(x_t, t):
        alpha, sigma = (table[t[0]] for table in tables)
        noise = (x_t.double() - alpha * x_start) / sigma
        return (noise if prediction == "noise" else alpha * noise - sigma * x_start).float()

    return DiffusionModel(Stub(network), n_steps, schedule=schedule, prediction=prediction)


def visited(process):
    """The timesteps that the network was given."""
    return [t[0].item() for _, t, *_ in process.model.calls]


def noise_of(seed, draws=1):
    """What images draw, each from a generator of its own, seeded seed + i: -> (draws, *SHAPE)."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(SHAPE[0])]
    draws = [[torch.randn(SHAPE[1:], generator=g) for g in generators] for _ in range(draws)]
    return torch.stack([torch.stack(each) for each in draws])


def draw(process, shape=SHAPE, **options):
    return process.sample(shape, **{"seed": 3, "progress": False, **options})


# ---- The tables and the loss


@pytest.mark.parametrize("n_steps", [50, 1000, 4000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables(schedule, n_steps):
    """They are the papers', and x_T is noise for any n_steps. They are float32, as MPS has no
    float64, and not in the state dict, as a file must not bring another schedule along."""
    process = DiffusionModel(nn.Linear(1, 1), n_steps, schedule=schedule)
    alpha, sigma = (table[:-1] for table in truth(schedule, n_steps))
    before = torch.cat([torch.ones(1), alpha[:-1] ** 2])
    betas = 1 - alpha**2 / before
    expected = dict(
        betas=betas,
        alphas_cumprod=alpha**2,
        sqrt_alphas_cumprod=alpha,
        sqrt_one_minus_alphas_cumprod=sigma,
        posterior_variance=betas * (1 - before) / sigma**2,  # eq. 7
    )
    tables = dict(process.named_buffers())
    assert tables.keys() == expected.keys() and 0 < process.alphas_cumprod[-1] < 1e-3
    for name, table in tables.items():
        assert table.dtype == torch.float32
        close(table, expected[name], 1e-7, rtol=1e-4)
    assert list(process.state_dict()) == ["model.weight", "model.bias"]


def test_known_values():
    """Ho et al. state their betas, and the tests of diffusers three posterior variances."""
    process = DiffusionModel(None)
    close(process.betas[[0, -1]], [1e-4, 0.02], 1e-8)
    close(process.posterior_variance[[0, 487, 999]], [0, 0.00979, 0.02], 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        *(dict.fromkeys([name], "x0") for name in ("schedule", "prediction", "t_distribution")),
        dict(n_steps=0),
        dict(beta_start=0.1, beta_end=0.01),
    ],
)
def test_impossible_process(options):
    """A misspelt option is not silently another one."""
    with pytest.raises(ValueError, match="must be"):
        DiffusionModel(None, **options)


def test_a_schedule_that_leaves_signal():
    """It would draw from the wrong noise, and says so before it is trained."""
    with pytest.warns(UserWarning, match="x_T"):
        DiffusionModel(None, beta_end=0.002)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_q_sample_is_step_by_step_noising(schedule):
    """Eq. 2 iterated, x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z, has the mean and variance of
    the closed form, and each image of a batch has its own t."""
    process, ones = wild_process(schedule=schedule), torch.ones(1000, 1, 1, 1)
    mean, variance, expected = 1.0, 0.0, []
    for beta in process.betas.tolist():
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        expected.append((mean, math.sqrt(variance)))
    pairs = [(ones, 0 * ones), (0 * ones, ones)]  # the image alone, the noise alone
    closed = [process.q_sample(x, torch.arange(1000), z).flatten() for x, z in pairs]
    close(torch.stack(closed, dim=1), expected, 1e-6, rtol=1e-4)


@pytest.mark.parametrize("prediction, schedule", KINDS)
def test_loss(prediction, schedule):
    """It is the mean square of noise - output (eq. 14), for v that of alpha * noise - sigma * x_0 -
    output. The network sees x_t and is given t and y."""
    z, t, y = noise_of(1)[0], torch.tensor([5, 700]), torch.tensor([0, 2])
    alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in truth(schedule))
    process = wild_process(1000, schedule, prediction)
    loss = process(IMAGES, y, t, z)
    ((x_t, *given),) = process.model.calls
    close(x_t, alpha * IMAGES + sigma * z, 1e-5)
    assert torch.equal(torch.stack(given), torch.stack([t, y])) and loss.shape == ()
    target = z if prediction == "noise" else alpha * z - sigma * IMAGES
    close(loss, (target - wild(x_t, t, y)).square().mean(), 1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t_distribution", ["uniform", "lognormal"])
def test_drawn_timesteps_and_noise(t_distribution, schedule):
    """A batch has one t of each equal share of 0..n_steps-1, or of N(-0.8, 1.2^2) in ln(sigma /
    alpha), in any order. The noise is N(0, 1), so that a network which says 0 has the loss 1."""
    network = Stub(lambda x_t, t: torch.zeros_like(x_t))
    process = DiffusionModel(network, schedule=schedule, t_distribution=t_distribution)
    close(process(torch.ones(500, 1, 16, 16)), 1, 0.02)
    t = network.calls[0][1]
    assert not torch.equal(t, t.sort().values)
    if t_distribution == "uniform":
        assert torch.equal(t.sort().values // 2, torch.arange(500))
    else:
        alphas, sigmas = truth(schedule)
        levels = (sigmas / alphas).log()[t].sort().values
        wanted = -0.8 + 1.2 * torch.special.ndtri((torch.arange(500.0) + 0.5) / 500)
        close(levels[25:-25], wanted[25:-25], 0.1)


@pytest.mark.parametrize("shape", [(64, 2), (3, 32, 32)])
def test_what_is_no_batch_of_images(shape):
    """Points and a single picture would be broadcast to a loss that means nothing."""
    x = torch.zeros(shape)
    for use in (wild_process(), lambda x: wild_process().q_sample(x, torch.zeros(len(x)).long())):
        with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
            use(x)


@pytest.mark.parametrize("use", [lambda process: process(IMAGES), draw])
def test_a_network_that_returns_another_shape(use):
    """One channel for three would be broadcast. The error has the shape that was expected."""
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\)"):
        use(DiffusionModel(Stub(lambda x_t, t: x_t[:, :1])))


def test_images_of_another_range():
    """Images of 0..255 train without an error and draw noise, which is said, and said once."""
    process = wild_process()
    with pytest.warns(UserWarning, match=r"\[-1, 1\]"):
        process(127.5 + 127.5 * IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        process(127.5 + 127.5 * IMAGES)
        wild_process()(IMAGES)


# ---- One step


@pytest.mark.parametrize("w", [1, 0, 3])
@pytest.mark.parametrize("prediction, schedule", KINDS)
def test_predict_x_start(prediction, schedule, w):
    """Where the network says c of a label and u of none, that becomes u + w * (c - u), in one call
    with both. It is solved for x_0, and clipped."""
    process, x_t = wild_process(1000, schedule, prediction), noise_of(1)[0]
    t, y, null = torch.tensor([700, 30]), torch.tensor([1, 0]), torch.tensor([3, 3])
    alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in truth(schedule))
    output = wild(x_t, t, null) + w * (wild(x_t, t, y) - wild(x_t, t, null))
    noise = output if prediction == "noise" else alpha * output + sigma * x_t
    x_0 = (x_t - sigma * noise) / alpha
    close(process.predict_x_start(x_t, t, y, w), x_0.clamp(-1, 1), 1e-4)
    assert [len(x) for x, *_ in process.model.calls] == [2 if w == 1 else 4]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t, s", [(999, 998), (999, 0), (500, 321), (1, 0), (500, -1), (0, -1)])
def test_step(schedule, t, s):
    """eta 0 is DDIM (Song et al., eq. 12), eta 1 has the mean and the variance of the posterior
    (Ho et al., eq. 6 and 7) with the beta of the whole step, and s = -1 lands on x_0 exactly."""
    process, (x_t, z) = wild_process(schedule=schedule), noise_of(1, 2)
    a_t, a_s, s_t, s_s = (table[each] for table in truth(schedule) for each in (t, s))
    beta = 1 - (a_t / a_s) ** 2
    mean = (a_s * beta * IMAGES + (1 - beta).sqrt() * s_s**2 * x_t) / s_t**2
    ancestral = process.step(x_t, IMAGES, t, s, 1.0, z)
    close(ancestral, mean + s_s / s_t * beta.sqrt() * z, 2e-5)
    close(process.step(x_t, IMAGES, t, s), a_s * IMAGES + s_s * (x_t - a_t * IMAGES) / s_t, 1e-5)
    assert s >= 0 or torch.equal(ancestral, IMAGES)
    each = process.step(x_t, IMAGES, torch.tensor([t, 50]), torch.tensor([s, 20]), 1.0, z)
    assert torch.equal(each[0], ancestral[0]) and not torch.equal(each[1], ancestral[1])


@pytest.mark.parametrize("prediction, schedule", KINDS)
def test_algorithm_2(prediction, schedule):
    """From the same noise it draws what sampler="ddpm" and repeated calls of p_sample draw. One
    image of seed 5 draws the numbers that torch draws after manual_seed(5)."""
    process, y = wild_process(50, schedule, prediction), torch.tensor([2])
    torch.manual_seed(5)
    drawn = process.algorithm_2(torch.randn(1, 3, 4, 4), y)
    torch.manual_seed(5)
    x_t = torch.randn(1, 3, 4, 4)
    for t in range(49, -1, -1):
        x_t = process.p_sample(x_t, t, y)
    assert torch.equal(drawn, x_t)
    assert torch.equal(drawn, draw(process, (1, 3, 4, 4), sampler="ddpm", seed=5, y=y))


# ---- The samplers


@pytest.mark.parametrize("schedule, n_steps", [("linear", 1000), ("cosine", 1000), ("cosine", 7)])
def test_timesteps(schedule, n_steps):
    """ddpm and ddim are even in t, from n_steps - 1 to 0. dpm++ takes what is nearest to an even
    spacing of log(alpha / sigma), from the last t or, with cosine, from -5.1 on, below which all is
    noise. Without a number there are n_steps, 50 and 13, and no more than there are."""
    process, (alphas, sigmas) = wild_process(n_steps, schedule), truth(schedule, n_steps)
    lambdas = (alphas / sigmas).log()[:-1]
    first = lambdas[-1] if schedule == "linear" else lambdas[lambdas > -5.1].min()
    for steps in (1, 2, 3, 5, 7, 50, 333, 1000)[: 5 if n_steps == 7 else None]:
        even = numpy.linspace(n_steps - 1, 0, steps).round().astype(int).tolist()
        assert process.timesteps("ddpm", steps) == process.timesteps("ddim", steps) == even
        wanted = torch.linspace(first, lambdas[0], steps, dtype=torch.float64)
        nearest = (lambdas - wanted[:, None]).abs().argmin(dim=1).tolist()
        assert process.timesteps("dpm++", steps) == sorted(set(nearest), reverse=True)
    for sampler, steps in zip(SAMPLERS, (n_steps, 50, 13)):
        assert process.timesteps(sampler) == process.timesteps(sampler, min(steps, n_steps))


@pytest.mark.filterwarnings("ignore:.*x_T")  # of a single step
@pytest.mark.parametrize("prediction, schedule", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_image(sampler, prediction, schedule):
    """If the data is one image, it comes out in any number of steps, and no noise is left."""
    # A predicted noise gives x_0 after a division by alpha, which is 5e-5 at the end of cosine.
    atol = 2e-2 if (prediction, schedule) == ("noise", "cosine") else 1e-3
    for n_steps, steps in ((100, 1), (100, 2), (100, 3), (100, 20), (100, 100), (1, 1), (2, 2)):
        process = oracle(IMAGES.double(), prediction, schedule, n_steps)
        close(draw(process, sampler=sampler, steps=steps), IMAGES, atol)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler, steps", [("ddpm", 7), ("ddim", 50), ("dpm++", 1), ("dpm++", 60)])
def test_every_step(sampler, steps, schedule):
    """Each is `step` from t to the next of the list with the estimate x_0, for ddpm with eta 1 and
    new noise. dpm++ extrapolates x_0 by h / (2 * h of the step before), where h is the growth of
    log(alpha / sigma), but not in the first step or the last. The callback sees all of it."""
    process, seen = wild_process(100, schedule), []
    result = draw(process, sampler=sampler, steps=steps, callback=lambda *step: seen.append(step))
    timesteps, z = process.timesteps(sampler, steps), noise_of(3, steps + 1)
    assert [step[:2] for step in seen] == list(enumerate(timesteps))
    assert visited(process) == timesteps and torch.equal(seen[0][2], z[0])
    alphas, sigmas = truth(schedule, 100)
    lambdas = (alphas / sigmas).log()
    for i, t, x_t, x_0 in seen:
        assert torch.equal(x_t, process.model.calls[i][0])
        assert torch.equal(x_0, process.predict_x_start(x_t, t))
        s, x_s = (seen[i + 1][1:3]) if i + 1 < len(seen) else (-1, result)
        if sampler == "dpm++" and 0 < i and s >= 0:
            before = seen[i - 1]
            r = (lambdas[s] - lambdas[t]) / (lambdas[t] - lambdas[before[1]])
            x_0 = x_0 + r / 2 * (x_0 - before[3])
        noise = (1.0, z[i + 1]) if sampler == "ddpm" and s >= 0 else ()
        close(x_s, process.step(x_t, x_0, t, s, *noise), 1e-5)


@pytest.mark.parametrize("prediction, schedule", KINDS)
@pytest.mark.parametrize("sampler, steps", [("ddpm", 50), ("ddim", 28), ("dpm++", 20)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_diffusers_draws_the_same(sampler, steps, prediction, schedule):
    """Its schedulers draw our images with our network and timesteps. They clip x_0 as we do if DDIM
    recomputes the noise (use_clipped_model_output) and DPM-Solver++ has a threshold of 1. DDIM is
    given no list of timesteps, but goes down by 1000 // 27 = 37, as our 28 from 999 to 0 do."""
    diffusers = pytest.importorskip("diffusers")
    generators = [torch.Generator().manual_seed(3 + i) for i in range(2)]
    plain = dict(final_sigmas_type="zero", thresholding=True, sample_max_value=1.0)
    ddim = dict(num_inference_steps=27)
    kind, options, extra = dict(
        ddpm=("DDPM", dict(variance_type="fixed_small"), dict(generator=generators)),
        ddim=("DDIM", {}, dict(use_clipped_model_output=True)),
    ).get(sampler, ("DPMSolverMultistep", plain, {}))
    options.update(beta_start=1e-4, beta_end=0.02)
    options.update(beta_schedule="linear" if schedule == "linear" else "squaredcos_cap_v2")
    options.update(prediction_type="epsilon" if prediction == "noise" else "v_prediction")
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**options)
    process = wild_process(1000, schedule, prediction)
    timesteps = process.timesteps(sampler, steps)
    scheduler.set_timesteps(**(dict(timesteps=timesteps) if sampler != "ddim" else ddim))
    x_t = torch.stack([torch.randn(SHAPE[1:], generator=each) for each in generators])
    for t in timesteps:
        x_t = scheduler.step(wild(x_t, torch.tensor([t])), t, x_t, **extra).prev_sample
    close(draw(process, sampler=sampler, steps=steps), x_t, 2e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "sampler, steps, name",
    [("ddpm", 50, "euler_ancestral"), ("ddim", 50, "euler"), ("dpm++", 20, "dpmpp_2m")],
)
def test_k_diffusion_draws_the_same(sampler, steps, name, schedule):
    """Its samplers know x_t / alpha and sigma / alpha alone, and draw our images with our x_0."""
    sampling = pytest.importorskip("k_diffusion.sampling", exc_type=ImportError)
    process, (alphas, sigmas) = wild_process(schedule=schedule), truth(schedule)
    timesteps, z = process.timesteps(sampler, steps), iter(noise_of(3, steps + 1).double())
    calls, levels = iter(timesteps), (sigmas / alphas)[[*timesteps, -1]]

    def denoise(x, level):
        t = next(calls)
        return process.predict_x_start(x * alphas[t], t)

    extra = dict(noise_sampler=lambda *_: next(z)) if sampler == "ddpm" else {}
    x_T = next(z) / alphas[timesteps[0]]
    expected = getattr(sampling, f"sample_{name}")(denoise, x_T, levels, disable=True, **extra)
    close(draw(process, sampler=sampler, steps=steps), expected, 2e-3)


# ---- The options of sample


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_seeds(sampler):
    """Image i of seed s is that of seed s + i, whatever batch it comes in. x_T replaces the first
    noise alone, and without a seed each drawing is another one. The network is a plain function."""
    options = dict(process=DiffusionModel(lambda x_t, t: wild(x_t, t), 20), sampler=sampler)
    both = draw(**options)
    alone = [draw(shape=(1, *SHAPE[1:]), seed=seed, **options) for seed in (3, 4)]
    assert torch.equal(both, torch.cat(alone)) and not torch.equal(*alone)
    assert torch.equal(both, draw(x_T=noise_of(3)[0], **options))
    assert not torch.equal(both, draw(x_T=torch.zeros(SHAPE), **options))
    assert not torch.equal(draw(seed=None, **options), draw(seed=None, **options))


@pytest.mark.parametrize("stop", [False, True])
def test_sampling_leaves_no_trace(stop):
    """It draws in eval mode and without gradients. Then each part of the network and torch's random
    state are as they were, even after an interruption, or drawing would change a training run."""
    modes, state = [], torch.get_rng_state()
    network = Stub(lambda x, t: modes.append((network.training, torch.is_grad_enabled())) or x)
    network.on, network.off = nn.Dropout(), nn.Dropout().eval()
    with pytest.raises(ZeroDivisionError) if stop else contextlib.nullcontext():
        draw(DiffusionModel(network), steps=5, callback=lambda *_: 1 // (not stop))
    assert set(modes) == {(False, False)}
    assert network.training and network.on.training and not network.off.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("interval", [(), (1, 50), (5, 0.2)])
def test_guidance_interval(interval):
    """Where sigma / alpha is in the interval, by default 0.3..3, there is guidance in a doubled
    batch. Elsewhere the network is called as without it."""
    process, (alphas, sigmas) = wild_process(), truth()
    options = dict(guidance_interval=interval) if interval else {}
    draw(process, y=[0, 2], guidance=3.0, steps=20, **options)
    low, high = interval or (0.3, 3.0)
    levels = (sigmas / alphas)[visited(process)].tolist()
    sizes = [len(x_t) for x_t, *_ in process.model.calls]
    assert sizes == [4 if low <= level <= high else 2 for level in levels]


@pytest.mark.parametrize("strength, start", [(0.01, 1), (0.57, 57), (0.9, 90), (0.9999, 99)])
@pytest.mark.parametrize("sampler, steps", [("ddpm", 20), ("ddim", 2), ("dpm++", 13)])
def test_strength(sampler, steps, strength, start):
    """Sampling starts from the noised image at exactly the timestep that strength names, although
    0.57 * 100 is less than 57 to a computer. Then it takes the rest of the list."""
    process, (alphas, sigmas) = wild_process(100), truth(n_steps=100)
    draw(process, sampler=sampler, steps=steps, init_image=IMAGES, strength=strength)
    below = [t for t in process.timesteps(sampler, steps) if t <= start]
    assert visited(process) == [start, *below[1:]]
    expected = alphas[start] * IMAGES + sigmas[start] * noise_of(3)[0]
    close(process.model.calls[0][0], expected, 1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_ends_of_strength(sampler):
    """At 0 the image comes back and the network is not asked. At 1 the image is forgotten, also
    with a mask that keeps nothing."""
    process = wild_process(50)
    assert torch.equal(draw(process, sampler=sampler, init_image=IMAGES, strength=0), IMAGES)
    assert not process.model.calls
    ways = ({}, dict(init_image=IMAGES), dict(init_image=-IMAGES, mask=torch.ones(4, 4)))
    first, *others = (draw(process, sampler=sampler, **options) for options in ways)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_mask(sampler, strength):
    """A kept pixel equals the image to the bit, a repainted one is what the network says, here 0.5,
    and a soft mask blends the two. All have as much noise on the way as the network is told."""
    image = (torch.arange(3072.0).view(1, 3, 32, 32) % 7 - 3) / 3
    mask = torch.tensor([0, 0.3, 0.7, 1]).repeat(8)
    process, blend = oracle(torch.tensor(0.5)), mask * 0.5 + (1 - mask) * image
    options = dict(sampler=sampler, steps=20, init_image=image, strength=strength, mask=mask)
    result = draw(process, image.shape, **options)
    close(result, blend, 1e-4)
    assert torch.equal(result[..., ::4], image[..., ::4])
    alphas, sigmas = truth()
    for x_t, t in process.model.calls:
        noise = (x_t - alphas[t] * blend) / sigmas[t]
        close(noise.unflatten(3, (8, 4)).std(dim=(0, 1, 2, 3)), torch.ones(4), 0.15)


@pytest.mark.parametrize(
    "options",
    [
        *(dict(steps=steps, sampler=sampler) for steps in (0, 11) for sampler in SAMPLERS),
        *(dict(y=y) for y in ([0, 1, 2], [0, 4], [0, -1], [0, 1.5], [0, math.nan])),
        *(dict(guidance=guidance, y=[0, 1]) for guidance in (math.nan, math.inf)),
        dict(guidance=2.0),
        *(dict(x_T=x_T) for x_T in (noise_of(0) / 0, torch.zeros(3, 3, 4, 4))),
        dict(mask=torch.ones(SHAPE)),
        dict(strength=0.5),
        *(dict(strength=strength, init_image=IMAGES) for strength in (-0.1, 1.1, math.nan)),
        *(dict(init_image=image) for image in (IMAGES[:, :2], 127.5 * IMAGES, IMAGES * math.nan)),
        *(dict(mask=torch.full((4, 4), each), init_image=IMAGES) for each in (255, math.nan)),
        dict(sampler="dpm", init_image=IMAGES, strength=0),
    ],
)
def test_impossible_options(options):
    """They are refused by a sentence that names the first of these, before the network is asked."""
    process = wild_process(10)
    with pytest.raises(ValueError, match=next(iter(options))):
        draw(process, **options)
    assert not process.model.calls


def test_guidance_of_a_network_without_classes():
    """It has no null label to compare with."""
    with pytest.raises(ValueError, match="num_classes"):
        draw(DiffusionModel(SimpleUNet(**TINY), 10), y=[0, 1], guidance=2.0)


def test_numpys_numbers():
    """Its integers are seeds, steps and labels as Python's are, and its arrays are images."""
    plain = dict(seed=4, steps=5, y=[0, 2], init_image=IMAGES, strength=0.8)
    numpys = dict(seed=numpy.int64(4), steps=numpy.int64(5), y=numpy.array([0, 2]))
    numpys.update(init_image=IMAGES.double().numpy(), strength=numpy.float32(0.8))
    assert torch.equal(draw(wild_process(20), **plain), draw(wild_process(20), **numpys))


def test_another_default_type_and_device():
    """What is drawn and trained is the same where torch's defaults are float64 and another device."""
    drawn, options = [], dict(y=[0, 2], guidance=2.0, init_image=IMAGES, strength=0.9)
    for defaults in (contextlib.nullcontext(), other_defaults()):
        with defaults:
            process = DiffusionModel(Stub(wild), 20, t_distribution="lognormal")
            images = [draw(process, sampler=sampler, **options) for sampler in SAMPLERS]
            torch.manual_seed(0)
            drawn.append(torch.stack([*images, process(IMAGES).expand(SHAPE)]))
    assert drawn[1].dtype == torch.float32
    close(drawn[1], drawn[0], 1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float64, 1e-4)])
def test_networks_of_another_precision(dtype, tolerance):
    """They compute the same in their own type, train, and draw about the same in float32, as only
    the network is in that precision."""
    torch.manual_seed(0)
    network, y = perturb(SimpleUNet(num_classes=3, **TINY)), torch.tensor([0, 2])
    process = DiffusionModel(network, prediction="v")
    output, expected = network(IMAGES, y, y), draw(process, y=y)
    network.to(dtype)
    moved, drawn = network(IMAGES.to(dtype), y, y), draw(process, y=y)
    assert moved.dtype == dtype and drawn.dtype == torch.float32
    close(moved, output, tolerance * output.std().item())
    close(drawn, expected, 0.05)
    assert process(IMAGES, y).isfinite()
