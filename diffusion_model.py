"""A diffusion model for CIFAR-10 in one readable file: network, process, samplers and training.

    python diffusion_model.py       trains: downloads CIFAR-10, writes diffusion_model.pth, samples/
    python inference_example.py     draws pictures from diffusion_model.pth
    python diffusion_model.py --data FOLDER --init diffusion_model.pth --out my_own

The third trains on your own pictures. The same command again resumes an interrupted run. All flags:
--help. The first made the released weights in 15 hours on two CPU cores. From Python:

    from diffusion_model import SimpleDiffusion
    images = SimpleDiffusion.load().sample(10, y=range(10), guidance=2)  # (10, 3, 32, 32) in [0, 1]

Parts: 0 the machine, 1 the U-Net, 2 the diffusion process and its samplers (start here to learn),
3 both in one model, saved and loaded, 4 training. Parts 0 to 3 need torch alone and can be copied.
Data, pictures, flags: support.py. Images: [-1, 1]; only SimpleDiffusion.sample returns [0, 1].

Equations and algorithms without a name are those of Ho et al. 2020, DDPM (arXiv 2006.11239). The
others: Nichol and Dhariwal 2021 (2102.09672: cosine), Song et al. 2021 (2010.02502: DDIM), Salimans
and Ho 2022 (2202.00512: v), Ho and Salimans 2022 (2207.12598: guidance), Karras et al. 2022
(2206.00364: noise levels), Lu et al. 2022 (2211.01095: DPM-Solver++), Kynkaanniemi et al. 2024
(2404.07724: guidance interval), Vaswani et al. 2017 (1706.03762: time), Jordan et al. 2024 (Muon).
"""

import contextlib
import math
import os
import warnings
import zipfile
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# The imports that follow are for part 4 only.
import copy
import sys
import time
from dataclasses import asdict, dataclass, field

try:
    import support
    from support import load_images
except ImportError as error:  # this file was copied alone, or torch is older than 2.9
    support = None
    no_support = f"training needs support.py beside this file, and torch 2.9 or newer ({error})"

# --------------------------------------------------------------------------------------------------
# 0. The machine: device, bfloat16, progress bar


def pick_device(name=None):
    """MPS, then CUDA, then CPU. With a name: that device, or ValueError if it is not available."""
    if name is None:
        best = (
            "mps"
            if torch.backends.mps.is_available()
            else "cuda"
            if torch.cuda.is_available()
            else "cpu"
        )
        return torch.device(best)
    try:
        torch.zeros(1, device=name).tolist()  # torch accepts names of devices that are not there
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name} is not available ({brief(error)}): name another") from None


def has_bfloat16(device):
    """Whether bfloat16 is known to be fast: on CUDA GPUs and x86 CPUs that have it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # torch 2.9 lacks it
        found = torch.cpu.get_capabilities()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    return False


def autocast(device):
    """bfloat16, where fast, for convolutions and matrices. Never float16: it needs loss scaling."""
    return (
        torch.autocast(device.type, torch.bfloat16)
        if has_bfloat16(device)
        else contextlib.nullcontext()
    )


def memory_format(device):
    """The order of an image's numbers in memory that makes convolutions fastest."""
    # On MPS channels_last is slow, and some versions of torch computed wrong results with it.
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


@contextlib.contextmanager
def eval_mode(module):
    """Put `module` in eval mode (no dropout) for the block; then each part back in its own mode."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def progress_bar(steps, show):
    """Wrap `steps` in a progress bar if `show` is set and tqdm is installed."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        return tqdm(steps, disable=not show, desc="sampling", leave=False)
    return steps


def brief(error):
    """What is wrong, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# --------------------------------------------------------------------------------------------------
# 1. The U-Net: time embedding, attention, residual block, SimpleUNet


def time_embedding(t, width):
    """Sinusoids of the timestep (Vaswani et al. 2017): t (B,) -> (B, width) float32."""
    half = (width + 1) // 2  # rounded up: width may be odd
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device).float() / half)
    angles = t.float()[:, None] * frequencies  # (B, half); in bfloat16 neighbours would be equal
    return torch.cat([angles.cos(), angles.sin()], dim=1)[:, :width]  # their order does not matter


def divisors(n, limit):
    """The divisors of n up to `limit`, smallest first."""
    return [k for k in range(1, limit + 1) if n % k == 0]


def group_norm(channels):
    """GroupNorm of up to 32 groups of 16 channels or more: smaller ones are slow in bfloat16."""
    return nn.GroupNorm(max(divisors(channels, min(32, channels // 16)), default=1), channels)


def zero_init(layer):
    """Zero a layer, so that the branch (or the network) that ends in it outputs 0 at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Multi-head self-attention of an image's pixels, added to it: x (B, C, H, W) -> like x."""

    def __init__(self, channels, num_heads):
        super().__init__()
        if channels % num_heads:
            raise ValueError(
                f"num_heads {num_heads} does not divide {channels} channels: {divisors(channels, 32)} do"
            )
        self.num_heads = num_heads
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C): a view where channels_last
        # Each of the three is (B, heads, HW, C / heads).
        q, k, v = self.qkv(tokens).view(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if x.device.type == "cpu" and torch.is_grad_enabled():  # the fused backward is slower there
            h = ((q.shape[-1] ** -0.5 * q) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        else:  # contiguous: on MPS permuted ones gave wrong results without an error
            h = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        h = self.out(h.transpose(1, 2).reshape(B, H * W, C))  # the heads side by side again
        return x + h.transpose(1, 2).view(B, C, H, W)


class ResidualBlock(nn.Module):
    """Two convolutions, between them a scale and shift by time and class; then attention, if any.

    forward(x, emb): x (B, channels, H, W), emb (B, time_dim) -> (B, channels, H, W)
    """

    def __init__(self, channels, time_dim, dropout, num_heads):
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale_shift = nn.Linear(time_dim, 2 * channels)  # one of each for every channel
        self.norm2 = group_norm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))
        self.attention = Attention(channels, num_heads) if num_heads else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)  # shift + norm * (1 + scale), fused
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(x + h)


class SimpleUNet(nn.Module):
    """The network: noisy images and their timesteps in, a prediction of the same shape out.

    forward(x, t, y=None): x (B, in_channels, H, W), timesteps t and labels y (B,) int64 -> like x.
    Label num_classes is the null label ("no class"); y=None means null for every image. ValueError
    if H or W is not a multiple of 2**(levels - 1), or if a network without classes is given labels.
    """

    def __init__(
        self,
        in_channels=3,
        hidden_channels=64,
        channel_mults=(1, 2, 2),  # level i: hidden_channels * its entry, at size H / 2**i
        num_res_blocks=2,  # of a level, down and again up: one number, or one each
        attention_levels=None,  # where each pixel looks at all others; None: the last
        num_heads=None,  # of the attention; None: 4, or fewer if 4 won't divide
        time_dim=256,  # channels of the embedding of time and class
        dropout=0.0,  # share of the values dropped in a block while training
        num_classes=None,
    ):  # None: the network knows no classes
        super().__init__()
        last = len(channel_mults) - 1
        depths = [num_res_blocks] if isinstance(num_res_blocks, int) else list(num_res_blocks)
        depths = depths * len(channel_mults) if len(depths) == 1 else depths
        attention_levels = [last] if attention_levels is None else list(attention_levels)
        self.config = dict(
            in_channels=in_channels,
            hidden_channels=hidden_channels,
            channel_mults=list(channel_mults),
            num_res_blocks=depths,
            attention_levels=attention_levels,
            num_heads=num_heads,
            time_dim=time_dim,
            dropout=dropout,
            num_classes=num_classes,
        )
        sizes = [
            in_channels,
            hidden_channels,
            time_dim,
            num_heads,
            num_classes,
            *depths,
            *channel_mults,
        ]
        if last < 0 or min(size for size in sizes if size is not None) < 1:
            raise ValueError(f"every size of the network must be at least 1, got {self.config}")
        if len(depths) != last + 1 or not set(attention_levels) <= set(range(last + 1)):
            raise ValueError(
                f"attention_levels {attention_levels}, num_res_blocks {depths}: levels are 0..{last}"
            )
        self.num_classes = num_classes
        self.size_multiple = 2**last
        widths = [hidden_channels * mult for mult in channel_mults]
        level_heads = [0] * len(widths)  # 0: no attention
        for level in attention_levels:
            level_heads[level] = num_heads or max(divisors(widths[level], 4))

        def blocks(width, heads_of_each):
            return nn.ModuleList(
                ResidualBlock(width, time_dim, dropout, heads) for heads in heads_of_each
            )

        self.time_mlp = nn.Sequential(
            nn.Linear(time_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )
        # One row more than there are classes: the null label's.
        self.class_embedding = (
            None if num_classes is None else nn.Embedding(num_classes + 1, time_dim)
        )
        # Entry and exit read and write the image on level 0, halve and double the size elsewhere.
        to_image = zero_init(nn.Conv2d(widths[0], in_channels, 3, padding=1))
        entries = [nn.Conv2d(in_channels, widths[0], 3, padding=1)]
        exits = [nn.Sequential(group_norm(widths[0]), nn.SiLU(), to_image)]
        for above, below in zip(widths, widths[1:]):
            entries.append(nn.Conv2d(above, below, 3, stride=2, padding=1))
            exits.append(nn.Sequential(nn.Conv2d(below, above, 1), nn.Upsample(scale_factor=2)))
        self.down = nn.ModuleList()
        self.middle = blocks(widths[-1], [level_heads[-1], 0])
        self.up = nn.ModuleList()  # the last level first
        for width, depth, heads, entry, leave in zip(widths, depths, level_heads, entries, exits):
            self.down.append(
                nn.ModuleDict(dict(entry=entry, blocks=blocks(width, [heads] * depth)))
            )
            merges = nn.ModuleList(
                nn.Conv2d(2 * width, width, 1) for _ in range(depth)
            )  # x and skip
            self.up.insert(
                0,
                nn.ModuleDict(
                    dict(merges=merges, blocks=blocks(width, [heads] * depth), exit=leave)
                ),
            )

    def forward(self, x, t, y=None):
        if x.shape[2] % self.size_multiple or x.shape[3] % self.size_multiple:
            raise ValueError(
                f"height and width must be multiples of {self.size_multiple}, got {tuple(x.shape[2:])}"
            )
        if y is not None and self.num_classes is None:
            raise ValueError("labels y for a network without classes")
        emb = self.time_mlp(time_embedding(t, self.config["time_dim"]))  # (B, time_dim)
        if self.num_classes is not None:
            emb = emb + self.class_embedding(
                torch.full_like(t, self.num_classes) if y is None else y
            )
        emb = F.silu(emb)  # here once, not in every block
        # Shapes for the defaults at 32x32; where there are three, one for each pass of the loop.
        skips = []
        for level in self.down:
            x = level["entry"](x)  # (B, 64, 32, 32), (B, 128, 16, 16), (B, 128, 8, 8)
            for block in level["blocks"]:
                x = block(x, emb)
                skips.append(x)
        for block in self.middle:
            x = block(x, emb)  # (B, 128, 8, 8)
        for level in self.up:
            for merge, block in zip(level["merges"], level["blocks"]):
                x = block(merge(torch.cat([x, skips.pop()], dim=1)), emb)  # the newest skip first
            x = level["exit"](x)  # (B, 128, 16, 16), (B, 64, 32, 32), (B, 3, 32, 32)
        return x


# --------------------------------------------------------------------------------------------------
# 2. The diffusion process and its samplers: DiffusionModel
#
# Training: mix an image x_0 with noise, x_t = alpha * x_0 + sigma * noise (q(x_t | x_0)), and teach
# the network to tell the two apart. The timestep t, drawn for each image, sets both factors: as it
# grows to T, alpha falls to nearly 0, and sigma = sqrt(1 - alpha^2) rises: x_T is almost noise.
# Sampling: begin with pure noise. In each step the network estimates the x_0 behind x_t; this x_0,
# mixed with a little less noise than x_t has, is the next x_t (p(x_{t-1} | x_t)). It takes many
# steps: the estimate is the mean of all images that x_t may come from, blurrier with more noise.
#
# The network may predict the noise or, as in SimpleDiffusion, v = alpha * noise - sigma * x_0; with
# x_t, both give x_0: noise after a division by alpha (0.006 at the linear schedule's last t), which
# multiplies errors; v without. v is nearly the noise at small t, -x_0 at large: what x_t hides.


def make_betas(schedule, n_steps, beta_start=1e-4, beta_end=0.02):
    """beta in x_t = sqrt(1 - beta) * x_{t-1} + sqrt(beta) * noise (eq. 2): (n_steps,) float64."""
    exact = dict(dtype=torch.float64, device="cpu")
    if schedule == "linear":  # Ho et al.'s for 1000 steps, scaled so that x_T is always noise
        betas = torch.linspace(beta_start, beta_end, n_steps, **exact) * (1000 / n_steps)
    elif schedule == "cosine":  # Nichol and Dhariwal 2021, eq. 17
        u = torch.linspace(0, 1, n_steps + 1, **exact)  # the paper's t / T; its s is 0.008
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2  # f / f[0]: the product of 1 - beta
        betas = 1 - f[1:] / f[:-1]
    else:
        raise ValueError(f"schedule must be linear or cosine, got {schedule!r}")
    return betas.clamp(max=0.999)  # a beta of 1 would leave nothing of the image


class DiffusionModel(nn.Module):
    """The forward process q, the training loss and the reverse process p, around any network.

    model: maps x_t (B, C, H, W) and t (B,) int64 in 0..n_steps-1 to a prediction like x_t. Labels y
    (B,) int64 come third, where there are any. For guidance, model.num_classes is the null label.
    schedule: "cosine", or "linear": beta_start to beta_end, times 1000 / n_steps.
    prediction: "noise" (Ho et al.), or "v" = alpha * noise - sigma * x_0 (Salimans and Ho 2022).
    t_distribution: in training: "uniform" (Algorithm 1), or "lognormal": around the noise levels
    where there is most to learn (Karras et al. 2022). ValueError if an option is out of range.

    Timesteps count from 0: t = 0 is the papers' t = 1, and t = -1 is the clean image, called
    x_start where it is given and x_0 where it is estimated. alpha^2 is alphas_cumprod, the product
    of 1 - beta up to t. (alpha_t is 1 - beta_t in Ho et al., and our alpha^2 in DDIM.)
    """

    def __init__(
        self,
        model,
        n_steps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        schedule="linear",
        prediction="noise",
        t_distribution="uniform",
    ):
        super().__init__()
        if not (1 <= n_steps <= 100_000 and 1e-10 < beta_start <= beta_end < 1):
            raise ValueError(
                "n_steps must be in 1..100000 and 1e-10 < beta_start <= beta_end < 1, "
                f"got {n_steps}, {beta_start} and {beta_end}"
            )
        if prediction not in ("noise", "v") or t_distribution not in ("uniform", "lognormal"):
            raise ValueError(
                "prediction must be noise or v, t_distribution uniform or lognormal, got "
                f"{prediction!r} and {t_distribution!r}"
            )
        self.model = model
        self.config = dict(
            n_steps=n_steps,
            beta_start=beta_start,
            beta_end=beta_end,
            schedule=schedule,
            prediction=prediction,
            t_distribution=t_distribution,
        )
        self.n_steps = n_steps
        # float64, as a thousand factors near 1 are multiplied; on the CPU, as MPS has no float64.
        betas = make_betas(schedule, n_steps, beta_start, beta_end)
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # alpha^2 (section 2, above eq. 4)
        if alphas_cumprod[-1] < 1e-30:  # its root, by which samplers divide, would be 0 in float32
            raise ValueError(
                f"beta_end {beta_end} is too large: with {n_steps} steps nothing is left of the image"
            )
        if alphas_cumprod[-1] > 0.01:
            warnings.warn(
                f"x_T is not noise (alphas_cumprod {alphas_cumprod[-1]:.2g}): raise beta_end"
            )
        tables = dict(
            betas=betas,
            alphas_cumprod=alphas_cumprod,  # for your own loops, like the last (eq. 7)
            sqrt_alphas_cumprod=alphas_cumprod.sqrt(),  # alpha: the factor of the image in x_t
            sqrt_one_minus_alphas_cumprod=(1 - alphas_cumprod).sqrt(),  # sigma: that of the noise
            lambdas=(alphas_cumprod / (1 - alphas_cumprod)).log() / 2,  # log(alpha / sigma)
            posterior_variance=betas * (1 - alphas_cumprod / (1 - betas)) / (1 - alphas_cumprod),
        )
        for name, table in tables.items():  # not in the state dict: they follow from `config`
            self.register_buffer(name, table.float(), persistent=False)

    def alpha_sigma(self, t):
        """Factors in x_t = alpha * x_0 + sigma * noise: t an int or (B,) -> two (B, 1, 1, 1)."""
        # 1 and 0, of the clean image, come first: t = -1 finds them, and t = n_steps is an error.
        alphas = F.pad(self.sqrt_alphas_cumprod, (1, 0), value=1.0)
        sigmas = F.pad(self.sqrt_one_minus_alphas_cumprod, (1, 0), value=0.0)
        return alphas[t + 1].view(-1, 1, 1, 1), sigmas[t + 1].view(-1, 1, 1, 1)

    # ---- Training: Algorithm 1

    def draw_timesteps(self, count):
        """Draw timesteps: -> (count,) int64, one in each of `count` equally likely ranges."""
        device = self.betas.device
        # Stratified: each is as likely as if drawn alone, but the loss varies less between batches.
        quantiles = (
            torch.randperm(count, device=device) + torch.rand(count, device=device)
        ) / count
        if self.config["t_distribution"] == "uniform":  # clamp, as rounding can reach n_steps
            return (quantiles * self.n_steps).long().clamp(max=self.n_steps - 1)
        # ln(sigma / alpha) is normal: deviation 1.2 as in Karras et al. 2022, table 1; mean -0.8
        # (theirs: -1.2) was the best of those tried (tests/MEASURED.md). Half of all uniform t of
        # the linear schedule lie above sigma / alpha = 3.4, where little of the image can be seen.
        wanted = -0.8 + 1.2 * math.sqrt(2) * torch.erfinv(2 * quantiles - 1)  # a normal's quantiles
        midpoints = -(self.lambdas[1:] + self.lambdas[:-1]) / 2  # ln(sigma / alpha) between two t
        return torch.searchsorted(midpoints, wanted)  # the timestep nearest to each

    def q_sample(self, x_start, t, noise=None):
        """x_t ~ q(x_t | x_0) (eq. 4): x_start (B, C, H, W), t an int or (B,) -> like x_start."""
        noise = torch.randn_like(x_start) if noise is None else noise
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x_start + sigma * noise

    def predict(self, x_t, t, y=None):
        """The network's output, in float32; where there is no y, it gets no third argument."""
        return (self.model(x_t, t) if y is None else self.model(x_t, t, y)).float()

    def forward(self, x_start, y=None, t=None, noise=None):
        """The training loss (eq. 14; predicting v weights each term by 1 / alpha^2): -> scalar.

        x_start: (B, C, H, W) in [-1, 1]. y: labels (B,). t (B,), noise like x_start: drawn if None.
        """
        t = self.draw_timesteps(len(x_start)) if t is None else t  # Algorithm 1, line 3
        noise = torch.randn_like(x_start) if noise is None else noise  # line 4
        x_t = self.q_sample(x_start, t, noise)  # line 5, in the brackets
        alpha, sigma = self.alpha_sigma(t)
        target = alpha * noise - sigma * x_start if self.config["prediction"] == "v" else noise
        return F.mse_loss(self.predict(x_t, t, y), target)  # line 5; backward() follows

    # ---- Sampling: Algorithm 2 and its shortcuts

    def predict_x_start(self, x_t, t, y=None, guidance=1.0):
        """Estimate x_0: x_t (B, C, H, W), t (B,) int64 -> x_0 (B, C, H, W), clipped to [-1, 1]."""
        if guidance == 1:
            prediction = self.predict(x_t, t, y)
        else:  # away from "no class": Ho and Salimans 2022, eq. 6, on noise or v; guidance is 1 + w
            labels = torch.cat([y, torch.full_like(y, self.model.num_classes)])
            conditional, null = self.predict(
                torch.cat([x_t, x_t]), torch.cat([t, t]), labels
            ).chunk(2)
            prediction = null + guidance * (conditional - null)
        alpha, sigma = self.alpha_sigma(t)
        if self.config["prediction"] == "v":
            x_0 = alpha * x_t - sigma * prediction  # = (alpha^2 + sigma^2) * x_0
        else:
            x_0 = (x_t - sigma * prediction) / alpha  # eq. 4, solved for x_0
        # Not in Algorithm 2, but in Ho et al.'s code: later steps would magnify what lies outside.
        return x_0.clamp(-1, 1)

    def step(self, x_t, x_0, t, s, eta=0.0, new_noise=0.0):
        """Go from timestep t to s: x_s = alpha_s * x_0 + sigma_s * noise, with the noise in x_t.

        It is eq. 7 of Song et al. 2021. x_0: the clean image to head for. t and s < t: ints or (B,)
        int64; s = -1 lands on x_0. eta: how much of the noise is replaced by new_noise (their eq.
        16): 0 none; 1 as in the posterior, Ho et al.'s eq. 7 (with s = t - 1: Algorithm 2).
        """
        alpha_t, sigma_t = self.alpha_sigma(t)
        alpha_s, sigma_s = self.alpha_sigma(s)
        # Not the network's noise: with a clipped or extrapolated x_0, that does not add up to x_t.
        noise = (x_t - alpha_t * x_0) / sigma_t  # eq. 4, solved for the noise
        # 1 - (alpha_t / alpha_s)^2, the beta of the whole way from s to t, accurate where small.
        beta = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
        spread = eta * sigma_s / sigma_t * beta.sqrt()  # the papers' sigma_t; eta 1: posterior's
        return (
            alpha_s * x_0
            + (sigma_s**2 - spread**2).clamp(min=0).sqrt() * noise
            + spread * new_noise
        )

    @torch.no_grad()
    def p_sample(self, x_t, t, y=None):
        """One step of Algorithm 2 (lines 3 and 4): x_t (B, C, H, W), t (B,) int64 -> x_{t-1}."""
        x_0 = self.predict_x_start(x_t, t, y)
        # Of the two variances of section 3.2 (similar results) the posterior's, 0 at t = 0.
        return self.step(x_t, x_0, t, t - 1, eta=1.0, new_noise=torch.randn_like(x_t))

    def timesteps(self, sampler="dpm++", steps=None):
        """The timesteps that a sampler visits, strictly decreasing. The last step leads to x_0."""
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
        chosen = SAMPLERS[sampler]
        steps = min(chosen.steps or self.n_steps, self.n_steps) if steps is None else steps
        if not 1 <= steps <= self.n_steps:
            raise ValueError(f"steps must be in 1..{self.n_steps} (n_steps), got {steps}")
        exact = dict(dtype=torch.float64, device="cpu")
        if chosen.even_in == "t":
            return torch.linspace(self.n_steps - 1, 0, steps, **exact).round().int().tolist()
        # Evenly spaced in lambda: best for small images, says the README of Lu et al.'s code.
        lambdas = self.lambdas.cpu().double()  # in this order, as MPS has no float64
        # Cosine's noisiest t show nothing of the image: begin at -5.1 (as that code does for all).
        start = (
            lambdas[lambdas >= -5.1].min() if self.config["schedule"] == "cosine" else lambdas[-1]
        )
        wanted = torch.linspace(start.item(), lambdas[0].item(), steps, **exact)
        return sorted({(lambdas - value).abs().argmin().item() for value in wanted}, reverse=True)

    def sample(
        self,
        shape,
        sampler="dpm++",
        steps=None,
        y=None,
        guidance=1.0,
        seed=None,
        init_image=None,
        strength=1.0,
        mask=None,
        progress=True,
        callback=None,
        x_T=None,
        guidance_interval=(0.0, math.inf),
    ):
        """Sample images (Algorithm 2 and its shortcuts): shape (N, C, H, W) -> x_0 in [-1, 1].

        sampler: a name in SAMPLERS. steps: up to n_steps (dpm++ skips repeats); None: its default.
        y: labels (N,), None: no class. guidance: 1 as trained; more: more typical of the class, in
        twice the time, only where sigma / alpha is in guidance_interval (Kynkaanniemi et al. 2024).
        seed: image i is drawn from seed + i in any batch; None: random. torch's state is not used.
        init_image (N, C, H, W) in [-1, 1]: start from it, noised by strength (0..1; 0 returns it).
        mask, broadcast to init_image: 1 repaints, 0 keeps the pixels of init_image, exactly.
        x_T (N, C, H, W): the starting noise, not the seed's. progress: show a bar.
        callback(i, t, x_t, x_0): called in step i, x_0 estimated. ValueError if options do not fit.
        """
        device = self.betas.device
        y, init_image, mask, x_T = self._check_options(
            shape, y, guidance, init_image, strength, mask, x_T
        )
        timesteps = self.timesteps(sampler, steps)
        if init_image is not None and strength == 0:
            return init_image.clone()
        draw_noise = noise_of_seeds(shape, seed, device)
        noise = draw_noise()  # even where x_T is given: it may be this noise, and z must be another
        x_t = noise if x_T is None else x_T  # Algorithm 2, line 1
        if init_image is not None:
            highest = strength * self.n_steps + 1e-6  # 0.29 * 100 is 28.999...
            timesteps = [t for t in timesteps if t <= highest] or [int(highest)]
            x_t = self.q_sample(init_image, timesteps[0], noise=x_t)

        def denoise(x_t, t):
            guided = guidance_interval[0] <= math.exp(-self.lambdas[t]) <= guidance_interval[1]
            x_t = x_t.contiguous(memory_format=memory_format(device))
            t = torch.full(shape[:1], t, device=device)
            return self.predict_x_start(x_t, t, y, guidance if guided else 1.0)

        chosen = SAMPLERS[sampler]
        before = None
        pairs = list(zip(timesteps, [*timesteps[1:], -1]))  # each t with the next one, s
        with torch.inference_mode(), eval_mode(self), autocast(device):
            for i, (t, s) in enumerate(progress_bar(pairs, progress)):  # line 2
                now = Step(x_t, denoise(x_t, t), t, s)
                if callback is not None:
                    callback(i, t, x_t, now.x_0)
                aim = now.x_0 if s == -1 else chosen.aim(self, now, before, denoise)
                z = draw_noise() if chosen.eta > 0 and s >= 0 else 0.0  # line 3
                x_t = self.step(x_t, aim, t, s, chosen.eta, z)  # line 4
                if mask is not None:  # what is kept: from init_image, as noisy as the rest
                    x_t = mask * x_t + (1 - mask) * self.q_sample(init_image, s, draw_noise())
                before = now
        return x_t.clone()  # outside of inference mode, so that it can be used in training too

    def _check_options(self, shape, y, guidance, init_image, strength, mask, x_T):
        """The options of `sample`, as tensors on the device. ValueError if they do not fit."""

        def check(name, value, wanted, low, high, dtype=torch.float32):
            if value is None:
                return None
            value = torch.as_tensor(value, dtype=dtype, device=self.betas.device)
            if name == "mask":
                with contextlib.suppress(RuntimeError):  # a misfit is refused below
                    value = value.expand(wanted)
            if value.shape != torch.Size(wanted):
                raise ValueError(
                    f"{name} must have the shape {tuple(wanted)}, got {tuple(value.shape)}"
                )
            if not low <= value.min() <= value.max() <= high:
                raise ValueError(
                    f"{name} must be in {low}..{high}, got {value.min():.4g} to {value.max():.4g}"
                )
            return value

        num_classes = getattr(self.model, "num_classes", None)  # your network may have none
        if guidance != 1 and (y is None or num_classes is None):
            raise ValueError(
                "guidance needs labels y, and a network with the attribute num_classes"
            )
        if mask is not None and init_image is None:
            raise ValueError("a mask needs an init_image, whose pixels it keeps")
        if not 0 <= strength <= 1 or shape[0] < 1:
            raise ValueError(
                f"strength must be in 0..1 and shape[0] at least 1, got {strength} and {shape[0]}"
            )
        return (
            check("y", y, shape[:1], 0, num_classes or math.inf, torch.int64),
            check("init_image", init_image, shape, -1.001, 1.001),
            check("mask", mask, shape, 0, 1),
            check("x_T", x_T, shape, -math.inf, math.inf),
        )


class Step(NamedTuple):
    """The first arguments of DiffusionModel.step: x_t, its x_0 (estimated), t and the next t: s."""

    x_t: torch.Tensor
    x_0: torch.Tensor
    t: int
    s: int


class Sampler(NamedTuple):
    """An entry of the table of samplers. One of your own, Heun's (Karras et al. 2022, Algorithm 1):

    def heun(process, now, before, denoise):
        x_0_at_s = denoise(process.step(*now), now.s)  # one more call of the network
        ratio = torch.exp(process.lambdas[now.s] - process.lambdas[now.t])
        return now.x_0 + (x_0_at_s - now.x_0) * ratio / 2  # along the mean of both noises

    SAMPLERS["heun"] = Sampler(18, "lambda", 0.0, heun)
    """

    steps: int  # how many by default; None: n_steps
    even_in: str  # what the timesteps are evenly spaced in: "t", or "lambda", log(alpha / sigma)
    eta: float  # the share of new noise in a step: 0 none, 1 as much as in Algorithm 2
    # aim(process, now, before, denoise) -> the clean image to head for (the last step takes x_0).
    # now, before: this Step and the last one, or None. denoise(x_t, t) -> x_0.
    aim: Callable = lambda process, now, before, denoise: now.x_0


def aim_ahead(process, now, before, denoise):
    """D of DPM-Solver++(2M) (Lu et al. 2022): x_0 extrapolated to the middle of the step."""
    if before is None:
        return now.x_0
    # `step` with eta 0 is theirs, as alpha_s - alpha_t * sigma_s / sigma_t = alpha_s * (1 - e^-h).
    h = process.lambdas[now.s] - process.lambdas[now.t]
    h_before = process.lambdas[now.t] - process.lambdas[before.t]
    return now.x_0 + (now.x_0 - before.x_0) * h / (2 * h_before)  # their r is h_before / h


SAMPLERS = {
    "ddpm": Sampler(None, "t", 1.0),  # Ho et al. 2020, Algorithm 2
    "ddim": Sampler(50, "t", 0.0),  # Song et al. 2021
    "dpm++": Sampler(13, "lambda", 0.0, aim_ahead),  # DPM-Solver++(2M), Lu et al. 2022
}


def noise_of_seeds(shape, seed, device):
    """A function that draws noise (N, ...): image i from seed + i, in any batch, on any device."""
    seed = torch.Generator().seed() % 2**31 if seed is None else seed  # from the system
    generators = [torch.Generator().manual_seed(seed + i) for i in range(shape[0])]
    return lambda: torch.stack(
        [torch.randn(shape[1:], generator=g, device="cpu") for g in generators]
    ).to(device)


# --------------------------------------------------------------------------------------------------
# 3. The whole: SimpleDiffusion (network, process, configuration) and its file


class SimpleDiffusion(nn.Module):
    """A SimpleUNet in a DiffusionModel, with image size and class names: what is trained and saved.

    With class_names (or num_classes) it learns classes. Unlike the bare process it predicts v and
    draws t lognormally. unet_options: SimpleUNet's; the last level has attention if at most 16x16.
    """

    def __init__(
        self,
        image_size=32,
        n_steps=1000,
        hidden_channels=64,
        schedule="linear",
        prediction="v",
        class_names=None,
        channel_mults=(1, 2, 2),
        beta_start=1e-4,
        beta_end=0.02,
        t_distribution="lognormal",
        **unet_options,
    ):
        super().__init__()
        if class_names is not None:
            class_names = [str(name) for name in class_names]
            if unet_options.setdefault("num_classes", len(class_names)) != len(class_names):
                raise ValueError(
                    f"{len(class_names)} class names for {unet_options['num_classes']} classes"
                )
        if (
            unet_options.get("attention_levels") is None
            and image_size // 2 ** (len(channel_mults) - 1) > 16
        ):
            unet_options["attention_levels"] = []
        network = SimpleUNet(
            hidden_channels=hidden_channels, channel_mults=channel_mults, **unet_options
        )
        if not network.size_multiple <= image_size <= 4096 or image_size % network.size_multiple:
            raise ValueError(
                f"image_size must be a multiple of {network.size_multiple}, up to 4096, got {image_size}"
            )
        self.image_size = image_size
        self.class_names = class_names
        self.diffusion = DiffusionModel(
            network, n_steps, beta_start, beta_end, schedule, prediction, t_distribution
        )

    @property
    def network(self):  # an attribute would put the weights into the state dict twice
        return getattr(self.diffusion.model, "_orig_mod", self.diffusion.model)  # of torch.compile

    model = network  # as DiffusionModel calls it

    def forward(self, x, y=None, t=None, noise=None):
        """The training loss of DiffusionModel.forward: x (B, C, S, S) in [-1, 1] -> scalar."""
        return self.diffusion(x, y, t, noise)

    def sample(self, batch_size=4, **options):
        """Draw (batch_size, C, S, S) in [0, 1]. options: DiffusionModel.sample's, in its range."""
        shape = (batch_size, self.network.config["in_channels"], self.image_size, self.image_size)
        return (self.diffusion.sample(shape, **options) + 1) / 2

    def save(self, path="diffusion_model.pth", **info):
        """Write the weights, in float16, and what rebuilds the model. info: more, for humans."""
        weights = {
            name: tensor.to("cpu", torch.float16)
            for name, tensor in self.network.state_dict().items()
        }
        write(
            dict(
                model_config=self.network.config,
                diffusion_config=self.diffusion.config,
                info=info,
                model_state_dict=weights,
                image_size=self.image_size,
                class_names=self.class_names,
            ),
            path,
        )

    @classmethod
    def load(cls, path="diffusion_model.pth", device=None):
        """What `save` wrote, in eval mode, on `device` (None: the best). ValueError or OSError."""
        with reading(path) as saved:
            config = saved["model_config"]
            weights = {
                name.replace("_orig_mod.", "").replace(
                    "module.", ""
                ): tensor  # torch.compile's, DDP's
                for name, tensor in saved["model_state_dict"].items()
            }
            if "stem.weight" in weights:
                raise ValueError(
                    "it is from this project's first release, whose network had other parts"
                )
            if len(config["channel_mults"]) * max(config["num_res_blocks"]) > len(weights):
                raise ValueError(
                    "it claims more blocks than it holds weights"
                )  # building takes ages
            with torch.device("meta"):  # a file can claim any size: this takes no memory yet
                model = cls(
                    **config,
                    **saved["diffusion_config"],
                    image_size=saved["image_size"],
                    class_names=saved["class_names"],
                )
            model.network.load_state_dict(weights, assign=True)
        device = pick_device(device)
        return model.to(device, torch.float32, memory_format=memory_format(device)).eval()


# ---- The files: written whole or not at all, and read as if anybody may have written them
def write(contents, path):
    """torch.save, but `path` keeps what it held until the new is on disk. Errors are OSErrors."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        check_contents(contents)  # what `reading` would refuse must not replace a good file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(contents, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # or a power cut could leave a renamed, empty file
        os.replace(temporary, path)
    except (OSError, RuntimeError, ValueError) as error:  # the last two: torch.save, check_contents
        raise OSError(
            f"{path} could not be written; what was there is unchanged: {brief(error)}"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it was moved, or never made
            temporary.unlink()


@contextlib.contextmanager
def reading(path, remedy="give a diffusion_model.pth"):
    """Yield what `write` wrote to `path`. ValueError if it is damaged or does not fit the block."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        # torch.load checks no checksums, and unpacks a compressed file (ours is not) to any size.
        with zipfile.ZipFile(path) as archive:
            if (
                sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path)
                or archive.testzip()
            ):
                raise ValueError("its checksums or sizes are wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        check_contents(saved)
        yield saved
    except (PermissionError, MemoryError, torch.OutOfMemoryError):  # the file may be sound
        raise
    except Exception as error:  # zipfile, pickle, torch and our own checks raise a dozen kinds
        reason = f"it holds no {error}" if isinstance(error, KeyError) else brief(error)
        raise ValueError(
            f"{path} is damaged, or no file of this kind ({reason}): {remedy}"
        ) from error


def check_contents(value, depth=0):
    """Refuse all but finite tensors and numbers, strings, and some levels of lists and dicts."""
    if isinstance(value, torch.Tensor):
        # A tensor of stride 0 repeats one number: it can claim terabytes that are not in the file.
        repeats = value.untyped_storage().nbytes() < value.numel() * value.element_size()
        if repeats or value.is_complex() or not value.isfinite().all():
            raise ValueError("a tensor does not hold finite numbers")
    elif isinstance(value, dict):
        check_contents([*value, *value.values()], depth)
    elif isinstance(value, (list, tuple)) and depth < 6:  # a short pickle can nest without end
        for entry in value:
            check_contents(entry, depth + 1)
    elif not (
        type(value) in (bool, int, str, type(None)) or type(value) is float and math.isfinite(value)
    ):
        raise ValueError(f"it holds a {type(value).__name__}, or a number that is not finite")


# --------------------------------------------------------------------------------------------------
# 4. Training: the configuration, one step, the run, the loop


def option(default, meaning, least=-math.inf, below=math.inf):
    """A field of TrainConfig. least, below: bounds of its numbers that no class above checks."""
    return field(default=default, metadata=dict(meaning=meaning, least=least, below=below))


@dataclass
class TrainConfig:
    """Every option of a run. The flags are these names with dashes: image_size is --image-size."""

    data: str = option(
        "cifar10", "cifar10, shapes, or a folder: of images, or one that holds cifar-10-batches-py"
    )
    out: str = option(
        ".", "folder for diffusion_model.pth, model_info.json, samples/ and training_state.pth"
    )
    init: str = option(
        None,
        "begin with this checkpoint's network and weights; resuming reads it again, so keep it",
    )
    image_size: int = option(
        32, "height and width; images are resized and cropped to the centre", least=1
    )
    limit: int = option(
        None, "use the first LIMIT images only (of a folder in the order of their paths)", least=1
    )
    epochs: int = option(100, "passes over the data", least=1)
    images: int = option(
        None,
        "in place of --epochs: train on this many, repeats included (in whole epochs)",
        least=1,
    )
    batch_size: int = option(64, "images a step, over all processes", least=1)
    lr: float = option(
        3e-3, "peak learning rate, after the warm-up and before the decay to 0", least=1e-12
    )
    hidden_channels: int = option(64, "channels of the first level")
    channel_mults: tuple = option((1, 2, 2), "channels of each level, as multiples of the first")
    num_res_blocks: tuple = option(
        (2,), "residual blocks of a level: one number, or one a level", below=101
    )
    attention_levels: tuple = option(
        None, "levels with attention, 0 the full size (the last, if at most 16x16)"
    )
    num_heads: int = option(
        None, "heads of the attention (by default 4, or fewer where 4 does not divide)"
    )
    dropout: float = option(
        0.0, "share of the residual blocks' values dropped in training", least=0, below=1
    )
    n_steps: int = option(1000, "timesteps of the diffusion process")
    schedule: str = option("linear", "noise schedule: linear or cosine")
    prediction: str = option(
        "v", "what the network predicts: v (a mix of noise and image) or noise"
    )
    t_distribution: str = option(
        "lognormal", "timesteps to train on: lognormal (where most is learned) or uniform"
    )
    unconditional: bool = option(False, "ignore the classes of the data")
    no_flip: bool = option(
        False, "never mirror the images: for letters, digits and whatever has a left and a right"
    )
    sample_every: int = option(
        5, "epochs between grids and exports (--images: a twentieth of all)", least=1
    )
    seed: int = option(
        0, "of the weights, the order of the data and all noise", least=0, below=2**31
    )
    device: str = option(None, "mps, cuda or cpu; by default the first of them that is there")
    compile: bool = option(False, "compile the network with torch.compile")
    tensorboard: bool = option(False, "write loss curves to OUT/tensorboard")
    restart: bool = option(False, "begin again, even where a stopped run could go on")

    def __post_init__(self):
        if support is None:
            raise ImportError(no_support)
        support.check_config(self)


def make_optimizers(network, lr):
    """Muon (Jordan et al. 2024) for what maps features to features, AdamW for the rest: -> both."""
    stem, head = network.down[0]["entry"], network.up[-1]["exit"][-1]
    maps = [
        part.weight
        for part in network.modules()
        if isinstance(part, (nn.Conv2d, nn.Linear)) and part not in (stem, head)
    ]
    rest = [
        p for p in network.parameters() if all(p is not weight for weight in maps)
    ]  # stem, head, biases
    # match_rms_adamw: Muon's updates are about AdamW's size, so one lr sets both (AdamW's: 0.4 lr).
    return [
        support.Muon(maps, lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, 0.4 * lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    ]


def learning_rate(step, total_steps, peak):
    """Linear warm-up over 500 steps (5 % of a short run), times a cosine to 0. step: from 0."""
    warmup = min(500, max(1, total_steps // 20))
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


@torch.no_grad()
def update_ema(ema, model, step):
    """Update the average after step `step`, from 1: the last 3 % of steps so far are half of it."""
    decay = 0.5 ** (1 / (0.03 * step))  # decay ** (0.03 * step) is 1/2
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)  # in one call
    for ours, theirs in zip(ema.buffers(), model.buffers()):  # a network of your own may have some
        ours.copy_(theirs)


def training_batch(images, labels, index, num_classes, flip=True):
    """The images at `index`, half flipped, one label in ten dropped: -> x in [-1, 1], y or None."""
    x = support.from_uint8(images[index])
    if flip:
        flipped = torch.rand(len(index), device=x.device) < 0.5
        x = torch.where(flipped[:, None, None, None], x.flip(3), x)
    x = x.contiguous(memory_format=memory_format(x.device))
    if labels is None:
        return x, None
    # One label in ten becomes the null label, for guidance (Ho and Salimans 2022, Algorithm 1).
    dropped = torch.rand(len(index), device=x.device) < 0.1
    return x, labels[index].masked_fill(dropped, num_classes)


class TrainingRun:
    """A run: the network, its average, the optimisers, and how far they have come.

    A step's random numbers follow from seed, step and process (which of how many) alone. So a run
    that was stopped anywhere goes on as if it had not been, and no random state has to be saved.
    """

    def __init__(
        self, config, images, labels, class_names, processes, make_optimizers=make_optimizers
    ):
        self.config = config
        self.processes = processes  # support.Processes
        self.out = Path(config.out).resolve()
        self.batch_size = processes.shared(config.batch_size, len(images))
        self.steps_per_epoch = len(images) // self.batch_size  # the rest waits for another epoch
        epochs = (
            config.epochs
            if config.images is None
            else config.images / self.steps_per_epoch / self.batch_size
        )
        self.epochs = max(1, round(epochs))
        self.total_steps = self.epochs * self.steps_per_epoch
        torch.manual_seed(config.seed)
        self.model = support.begin_model(SimpleDiffusion, config, images.shape[1], class_names)
        self.origin = support.origin_of(config.init)  # for model_info.json
        self.model.to(processes.device, memory_format=memory_format(processes.device))
        # All data as uint8 on the device: a batch is an index away, and needs no worker process.
        self.images = support.with_channels(images, self.model.network.config["in_channels"]).to(
            processes.device
        )
        self.labels = None if self.model.class_names is None else labels.to(processes.device)
        # The weights' moving average draws better pictures than any step's: it is what is exported.
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizers = make_optimizers(self.model.network, config.lr)
        self.peak_rates = [
            [group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers
        ]
        self.loss_function = support.compiled(processes.wrap(self.model), config.compile)
        self.step = 0  # steps done
        self.seconds = 0.0  # of training so far
        self.saved_at = 0.0  # `seconds` at the last save
        self.order = None  # of the images in this epoch
        self.losses = []  # of this epoch's steps, in this process
        self.epoch_losses = []  # the mean of each finished epoch

    def batch(self, index):
        return training_batch(
            self.images, self.labels, index, self.model.network.num_classes, not self.config.no_flip
        )

    def train_step(self):
        """One pass of Algorithm 1's loop. Lines 3, 4 and the loss in 5: DiffusionModel.forward."""
        epoch, i = divmod(self.step, self.steps_per_epoch)
        rank, count = self.processes.rank, self.processes.count
        first_seed = 1_000_003 * self.config.seed  # no two seeds share numbers for 10^6 steps
        if self.order is None or i == 0:
            generator = torch.Generator().manual_seed(first_seed + epoch)
            self.order = torch.randperm(len(self.images), generator=generator, device="cpu").to(
                self.images.device
            )
        torch.manual_seed((first_seed + self.step) * count + rank)  # flips, t, noise
        whole_batch = self.order[i * self.batch_size : (i + 1) * self.batch_size]
        x, y = self.batch(whole_batch[rank::count])  # line 2: this process's share
        with autocast(x.device):
            loss = self.loss_function(x, y)  # lines 3 to 5: the loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)  # bad batches do little harm
        for optimizer, peak_rates in zip(self.optimizers, self.peak_rates):
            for group, peak in zip(optimizer.param_groups, peak_rates):
                group["lr"] = learning_rate(self.step, self.total_steps, peak)
            optimizer.step()  # line 5: the gradient descent step
        self.model.zero_grad()
        self.step += 1
        update_ema(self.ema.network, self.model.network, self.step)
        self.losses.append(
            torch.where(norm.isfinite(), loss.detach(), math.nan)
        )  # nan if the gradient is bad

    def fetch_losses(self):
        """The losses of this epoch's steps (waits for a GPU). FloatingPointError if not finite."""
        losses = torch.stack(self.losses).tolist() if self.losses else []
        for step, loss in enumerate(losses, start=self.step - len(losses) + 1):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"loss not finite at step {step}: give the same command with a lower --lr"
                )
        return losses

    def end_epoch(self):
        """Record the mean loss of the epoch that has ended: -> the losses of its steps."""
        losses = self.fetch_losses()
        self.epoch_losses.append(sum(losses) / len(losses))
        self.losses = []
        return losses

    def save(self):
        """Write all that a run needs to go on as if it had not been stopped."""
        state = dict(
            model=self.model.network.state_dict(),
            ema=self.ema.network.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            memory_format=str(memory_format(self.images.device)),
            step=self.step,
            seconds=self.seconds,
            losses=self.fetch_losses(),
            epoch_losses=self.epoch_losses,
            images=len(self.images),
            origin=self.origin,
            config=asdict(self.config),
        )
        if self.processes.rank == 0:
            write(state, self.out / "training_state.pth")
        self.saved_at = self.seconds

    def resume(self):
        """Go on from what `save` wrote: -> whether it did. ValueError if it is of another run."""
        path = self.out / "training_state.pth"
        if self.config.restart or not path.exists():
            return False
        with reading(path, "--restart begins again, with --init FILE from other weights") as state:
            changed = support.changed_options(TrainConfig(**state["config"]), self.config)
            if state["images"] != len(self.images):
                changed.append(f"{state['images']} images, not {len(self.images)}")
            if not changed:
                self.restore(state)
        if changed:  # outside `reading`, which would call the file damaged
            raise ValueError(
                f"the run in {self.out} was begun with {', '.join(changed)}: give the same or --restart, "
                f"or begin another --out from its weights with --init"
            )
        return True

    def restore(self, state):
        self.model.network.load_state_dict(state["model"])
        self.ema.network.load_state_dict(state["ema"])
        self.step = state["step"]
        self.seconds = self.saved_at = float(state["seconds"])
        self.origin = dict(state["origin"])
        self.losses = list(torch.tensor(state["losses"], device=self.images.device).flatten())
        self.epoch_losses = torch.tensor(
            state["epoch_losses"], dtype=torch.float64
        ).tolist()  # refuses text
        if divmod(self.step, self.steps_per_epoch) != (len(self.epoch_losses), len(self.losses)):
            raise ValueError("its steps and losses do not fit together")
        # In another memory format Muon's matrices have other columns: the optimisers start afresh.
        if state["memory_format"] == str(memory_format(self.images.device)):
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                support.restore_optimizer(optimizer, saved)


def train(config, make_optimizers=make_optimizers):
    """Train as `config` says, or go on with such a run: -> the SimpleDiffusion of averaged weights.

    make_optimizers(network, lr) -> a list of optimisers. ValueError or OSError: a bad option, data
    set or file. FloatingPointError: the loss is not finite. SystemExit (130, 143): once stopped.
    """
    support.tune_torch()
    processes = support.Processes(pick_device(config.device))
    support.begin_model(SimpleDiffusion, config, 3, None)  # bad options fail before data is read
    with processes.first_goes_ahead():  # it downloads the data, while the others wait
        images, labels, class_names = load_images(
            config.data, config.image_size, config.limit, config.out
        )
    run = TrainingRun(config, images, labels, class_names, processes, make_optimizers)
    resumed = run.resume()
    processes.check_equal(
        run.step, "training_state.pth: --out must be a folder that all machines share"
    )
    if run.step >= run.total_steps:
        processes.say(
            f"finished ({len(run.epoch_losses)} epochs): raise --epochs or --images, or --restart"
        )
        return run.ema
    report = support.Report(
        run, resumed, "bfloat16" if has_bfloat16(processes.device) else "float32"
    )
    started = time.monotonic() - run.seconds  # as if there had been no break
    with report.bar, support.stop_signals() as received:  # a second Ctrl-C ends at once, unsaved
        while run.step < run.total_steps:
            run.train_step()
            run.seconds = time.monotonic() - started
            report.step()
            epoch_done = run.step % run.steps_per_epoch == 0
            if epoch_done:
                report.epoch(run.end_epoch())  # prints; every few epochs exports and samples
            stop = processes.largest(received[0] if received else 0)  # any process's signal, or 0
            # A crash costs at most five minutes; not every short epoch is worth a file.
            seconds_at_risk = min(20, run.seconds / 10) if epoch_done else 300
            if stop or run.step == run.total_steps or run.seconds - run.saved_at > seconds_at_risk:
                run.save()
            if stop and run.step < run.total_steps:
                processes.say(
                    f"stopped after step {run.step} of {run.total_steps}: give the same command to go on"
                )
                sys.exit(128 + stop)  # 130 or 143, the shells' convention
    return run.ema


def main(argv=None):
    if support is None:
        print("error:", no_support, file=sys.stderr)
        sys.exit(2)
    with support.ends_in_one_line():
        train(support.parse_options(TrainConfig, argv, __doc__))


if __name__ == "__main__":
    main()
