"""Train a diffusion model on CIFAR-10 and draw pictures with it, in one file.

    python diffusion_model.py        trains: downloads CIFAR-10, writes diffusion_model.pth, and pictures into samples/
    python inference_example.py      draws pictures from diffusion_model.pth

    python diffusion_model.py --data shapes --image-size 16 --hidden-channels 16 --out my_shapes       no download
    python diffusion_model.py --data FOLDER --out my_run                                               your own images

A run that was stopped goes on when the same command is given again. All flags: --help. From Python:

    from diffusion_model import SimpleDiffusion
    images = SimpleDiffusion.load().sample(10, y=range(10), guidance=2, seed=0)      # (10, 3, 32, 32) in [0, 1]

The parts: 0 the machine, 1 the U-Net, 2 the diffusion process and its samplers, 3 the two together and their file,
4 training, 5 what surrounds it: data, pictures, several processes, the command line. Parts 0 to 3 and their imports
need torch alone and can be copied into a project of your own. Images are in [-1, 1] everywhere but in what
SimpleDiffusion.sample returns.

Where no paper is named, equations and algorithms are those of Ho et al. 2020, Denoising Diffusion Probabilistic Models
(arXiv 2006.11239). The others: Nichol and Dhariwal 2021 (2102.09672: cosine schedule), Song et al. 2021 (2010.02502:
DDIM), Salimans and Ho 2022 (2202.00512: v prediction), Ho and Salimans 2022 (2207.12598: guidance), Karras et al. 2022
(2206.00364: which noise levels to train on), Lu et al. 2022 (2211.01095: DPM-Solver++).
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

# What follows is needed in parts 4 and 5 only.
import argparse
import copy
import datetime
import hashlib
import inspect
import json
import operator
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields

# ---------------------------------------------------------------------------------------------------------------------
# 0. The machine: device, bfloat16, memory, progress bar


def brief(error):
    """What is wrong, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def pick_device(name=None):
    """MPS, then CUDA, then CPU. With a name that very device, or a ValueError if it is not available."""
    if name is not None:
        try:
            torch.zeros(1, device=name).tolist()  # really use it: that a name is known says nothing
            return torch.device(name)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {name} is not available here ({brief(error)}): leave --device out to use "
                             f"the best there is") from None
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bfloat16(device):
    """Whether the device multiplies bfloat16 in hardware: elsewhere it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))


def autocast(device):
    """Convolutions and matrix products in bfloat16 where that is fast; weights, tables and the loss stay float32."""
    # Never float16: its range is too small to train in without loss scaling.
    return torch.autocast(device.type, torch.bfloat16) if has_bfloat16(device) else contextlib.nullcontext()


def memory_format(device):
    """The order of an image's numbers in memory that makes convolutions fastest."""
    # On MPS channels_last is slow, and some versions of torch computed wrong results with it.
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def keep_freed_memory():
    """Have the C library keep freed memory for the next tensor: new memory costs a fifth of a step on the CPU."""
    with contextlib.suppress(OSError, AttributeError):  # only Linux has glibc
        import ctypes
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)   # M_MMAP_MAX = 0: no large tensor is returned to the system as soon as it is freed
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD = -1 (none): nor is the end of the heap


@contextlib.contextmanager
def eval_mode(module):
    """Inside the block `module` is in eval mode (no dropout); after it each of its parts is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def progress_bar(steps, show):
    """Wrap `steps` in a progress bar if `show` is set and tqdm is installed."""
    with contextlib.suppress(ImportError):  # parts 0 to 3 need torch alone
        from tqdm import tqdm
        return tqdm(steps, disable=not show, desc="sampling", leave=False)
    return steps


# ---------------------------------------------------------------------------------------------------------------------
# 1. The U-Net: time embedding, attention, residual block, SimpleUNet


def time_embedding(t, width):
    """Sinusoids of the timestep (Vaswani et al. 2017): t (B,) in 0..n_steps-1 -> (B, width) float32."""
    half = (width + 1) // 2                                                 # rounded up: width may be odd
    # All in float32: in bfloat16 neighbouring timesteps would be equal.
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies                               # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)[:, :width]


def divisors(n, limit):
    """The whole numbers up to `limit` that divide n: into how many equal parts n channels can be split."""
    return [k for k in range(1, limit + 1) if n % k == 0]


def group_norm(channels):
    # At least 16 channels a group: with fewer, its backward in bfloat16 on the CPU is up to ten times slower.
    return nn.GroupNorm(max(divisors(channels, min(32, max(1, channels // 16)))), channels)


def zero_init(layer):
    """Zero the last layer of a residual branch, so that at first the branch adds nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Multi-head self-attention between the pixels of an image, added to it: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels, num_heads):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide the {channels} channels of its level: "
                             f"take one of {', '.join(map(str, divisors(channels, 32)))}")
        self.num_heads = num_heads
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)                    # (B, HW, C): a view where channels_last
        # Each of the three is (B, heads, HW, C / heads).
        q, k, v = self.qkv(tokens).view(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if x.device.type == "cpu" and torch.is_grad_enabled():  # written out: on the CPU fused backward is slower
            h = ((q.shape[-1] ** -0.5 * q) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        elif x.device.type == "mps":  # contiguous: there, permuted ones gave wrong results without an error
            h = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        h = self.out(h.transpose(1, 2).reshape(B, H * W, C))                # the heads side by side again
        return x + h.transpose(1, 2).view(B, C, H, W)


class ResidualBlock(nn.Module):
    """Two convolutions, between which time and class scale and shift the features; then attention if num_heads > 0.

    forward(x, emb): x (B, channels, H, W), emb (B, time_dim) -> (B, channels, H, W)
    """

    def __init__(self, channels, time_dim, dropout, num_heads):
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale_shift = nn.Linear(time_dim, 2 * channels)                # of each channel
        self.norm2 = group_norm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))
        self.attention = Attention(channels, num_heads) if num_heads else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)      # (B, channels, 1, 1) each
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)                  # shift + norm * (1 + scale), in one pass
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(x + h)


class SimpleUNet(nn.Module):
    """The network: noisy images and their timesteps in, a prediction of the same shape out.

    forward(x, t, y=None): x (B, in_channels, H, W), t (B,) int64 in 0..n_steps-1, y (B,) int64 or None -> like x.
    Label num_classes is the null label ("no class"); y=None means null for every image. Raises ValueError if H or W is
    not a multiple of 2**(levels - 1), or if labels are given to a network without classes.
    """

    def __init__(self,
                 in_channels=3,
                 hidden_channels=64,
                 channel_mults=(1, 2, 2),       # level i has hidden_channels * channel_mults[i], works at H / 2**i
                 num_res_blocks=2,              # of a level, down and again up: one number, or one a level
                 attention_levels=None,         # where each pixel looks at all others; None: the last level
                 num_heads=None,                # of the attention; None: 4, or fewer where 4 does not divide
                 time_dim=256,                  # channels of the embedding of time and class
                 dropout=0.0,                   # share of the values dropped in each block while training
                 num_classes=None):             # None: the network knows no classes
        super().__init__()
        levels = len(channel_mults)
        num_res_blocks = [num_res_blocks] if isinstance(num_res_blocks, int) else list(num_res_blocks)
        if len(num_res_blocks) == 1:
            num_res_blocks = num_res_blocks * levels
        attention_levels = [levels - 1] if attention_levels is None else list(attention_levels)
        self.config = dict(in_channels=in_channels, hidden_channels=hidden_channels, channel_mults=list(channel_mults),
                           num_res_blocks=num_res_blocks, attention_levels=attention_levels, num_heads=num_heads,
                           time_dim=time_dim, dropout=dropout, num_classes=num_classes)
        sizes = [in_channels, hidden_channels, time_dim, num_heads, num_classes, *num_res_blocks, *channel_mults]
        if not levels or min(size for size in sizes if size is not None) < 1:
            raise ValueError(f"every size of the network must be at least 1, got {self.config}")
        if len(num_res_blocks) != levels:
            raise ValueError(f"num_res_blocks must be one number or {levels}, one a level, got {num_res_blocks}")
        if not set(attention_levels) <= set(range(levels)):
            raise ValueError(f"attention_levels must be in 0..{levels - 1}, got {attention_levels}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.time_dim = time_dim
        self.num_classes = num_classes
        self.size_multiple = 2 ** (levels - 1)
        self._build(**self.config)

    def _build(self, in_channels, hidden_channels, channel_mults, num_res_blocks, attention_levels, num_heads,
               time_dim, dropout, num_classes):
        widths = [hidden_channels * mult for mult in channel_mults]
        levels = len(widths)
        ways = list(zip(widths, widths[1:]))                                # from a level to the one below it

        def block(level, attention=True):
            heads = num_heads or max(divisors(widths[level], 4))
            attention = attention and level in attention_levels
            return ResidualBlock(widths[level], time_dim, dropout, heads if attention else 0)

        self.time_mlp = nn.Sequential(nn.Linear(time_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.class_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, time_dim)  # + 1: null
        # Down: the entry of level 0 reads the image, that of every other level halves its size.
        entries = [nn.Conv2d(in_channels, widths[0], 3, padding=1)]
        entries += [nn.Conv2d(above, below, 3, stride=2, padding=1) for above, below in ways]
        self.down = nn.ModuleList()
        for level in range(levels):
            blocks = nn.ModuleList([block(level) for _ in range(num_res_blocks[level])])
            self.down.append(nn.ModuleDict(dict(entry=entries[level], blocks=blocks)))
        # Bottleneck: a block, attention if the last level has it, a block.
        self.middle = nn.ModuleList([block(levels - 1), block(levels - 1, attention=False)])
        # Up: before each block, one of the results of the way down is merged in. The exit of level 0 writes the
        # prediction, that of every other level doubles the size.
        exits = [nn.Sequential(group_norm(widths[0]), nn.SiLU(),
                               zero_init(nn.Conv2d(widths[0], in_channels, 3, padding=1)))]
        exits += [nn.Sequential(nn.Conv2d(below, above, 1), nn.Upsample(scale_factor=2)) for above, below in ways]
        self.up = nn.ModuleList()
        for level in reversed(range(levels)):
            blocks = nn.ModuleList([block(level) for _ in range(num_res_blocks[level])])
            merges = nn.ModuleList([nn.Conv2d(2 * widths[level], widths[level], 1) for _ in blocks])
            self.up.append(nn.ModuleDict(dict(merges=merges, blocks=blocks, exit=exits[level])))

    def forward(self, x, t, y=None):
        if x.shape[2] % self.size_multiple or x.shape[3] % self.size_multiple:
            raise ValueError(f"height and width must be multiples of {self.size_multiple}, got {tuple(x.shape[2:])}")
        if y is not None and self.num_classes is None:
            raise ValueError("labels y for a network without classes")
        emb = self.time_mlp(time_embedding(t, self.time_dim))               # (B, time_dim)
        if self.num_classes is not None:
            emb = emb + self.class_embedding(torch.full_like(t, self.num_classes) if y is None else y)
        emb = F.silu(emb)                                                   # here once, not in every block

        # The shapes in these comments are those of the defaults and 32x32 images.
        skips = []
        for level in self.down:
            x = level["entry"](x)                                           # (B, 64, 32, 32)
            for block in level["blocks"]:                                   # then (B, 128, 16, 16), (B, 128, 8, 8)
                x = block(x, emb)
                skips.append(x)
        for block in self.middle:
            x = block(x, emb)                                               # (B, 128, 8, 8)
        for level in self.up:                                               # the newest of the skips first
            for merge, block in zip(level["merges"], level["blocks"]):
                x = block(merge(torch.cat([x, skips.pop()], dim=1)), emb)
            x = level["exit"](x)                                            # (B, 128, 16, 16), (B, 64, 32, 32)
        return x                                                            # (B, 3, 32, 32)


# ---------------------------------------------------------------------------------------------------------------------
# 2. The diffusion process and its samplers: DiffusionModel
#
# Training: mix an image with noise, x_t = alpha * x_0 + sigma * noise (the larger t, the more noise), and teach the
# network to tell the two apart. Drawing: begin with noise alone; in each step the network estimates the clean image
# x_0 that is in x_t, and the next x_t is that estimate with less noise. The papers call the first direction
# q(x_t | x_0), the second p(x_{t-1} | x_t).


# Which noise levels to train on where t_distribution is "lognormal": mean and standard deviation of ln(sigma / alpha).
LOG_NOISE_MEAN = -0.8
LOG_NOISE_STD = 1.2


def make_betas(schedule, n_steps, beta_start=1e-4, beta_end=0.02):
    """The variance of the noise that each step adds: (n_steps,) float64, below 1."""
    if schedule == "linear":  # Ho et al.'s for 1000 steps, scaled so that x_T is noise for every n_steps
        betas = torch.linspace(beta_start, beta_end, n_steps, dtype=torch.float64, device="cpu") * (1000 / n_steps)
    elif schedule == "cosine":  # Nichol and Dhariwal 2021, eq. 17
        u = torch.linspace(0, 1, n_steps + 1, dtype=torch.float64, device="cpu")  # t / T; the paper's s is 0.008
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2               # alphas_cumprod is f / f[0]
        betas = 1 - f[1:] / f[:-1]
    else:
        raise ValueError(f"schedule must be linear or cosine, got {schedule!r}")
    return betas.clamp(max=0.999)  # a beta of 1 would leave nothing of the image


class Moment(NamedTuple):
    """What is known in the step from timestep t to s: x_t, and x_0, what the network takes it for."""
    t: int
    s: int
    x_t: torch.Tensor
    x_0: torch.Tensor


def aim_at_x_0(process, now, before, denoise):
    """First order: the step goes straight to the network's estimate."""
    return now.x_0


def aim_ahead(process, now, before, denoise):
    """Second order: the estimate, continued by half a step as it changed since the last (D in Lu et al.)."""
    if before is None or now.s == -1:  # nothing to continue; the step to the clean image is infinitely long in lambda
        return now.x_0
    length = process.log_alpha_over_sigma(now.s) - process.log_alpha_over_sigma(now.t)
    length_before = process.log_alpha_over_sigma(now.t) - process.log_alpha_over_sigma(before.t)
    return now.x_0 + (now.x_0 - before.x_0) * length / (2 * length_before)


class Sampler(NamedTuple):
    """One entry of the table. To add a sampler is to add an entry: SAMPLERS["mine"] = Sampler(...)."""
    steps: int          # how many by default; None: n_steps
    even_in: str        # "t", or "lambda" = log(alpha / sigma): in what the timesteps are evenly spaced
    eta: float          # the noise that a step adds: 1 that of the posterior, 0 none (DiffusionModel.step)
    aim: Callable       # aim(process, now, before, denoise) -> the image that the step from now.t to now.s aims at;
    #                     before is the Moment of the last step or None, denoise(x_t, t) -> x_0 calls the network


SAMPLERS = {
    "ddpm": Sampler(None, "t", 1.0, aim_at_x_0),            # Ho et al. 2020, Algorithm 2
    "ddim": Sampler(50, "t", 0.0, aim_at_x_0),              # Song et al. 2021
    "dpm++": Sampler(20, "lambda", 0.0, aim_ahead),         # DPM-Solver++(2M), Lu et al. 2022
}


def noise_of_seeds(shape, seed, device):
    """A function that draws noise of that shape (N, ...), image i from a generator of its own, seeded seed + i."""
    # On the CPU: so the noise depends on the seed alone, not on batch or device.
    seed = torch.Generator().seed() % 2**31 if seed is None else seed   # seed() draws one from the system
    generators = [torch.Generator().manual_seed(seed + i) for i in range(shape[0])]

    def draw_noise():
        return torch.stack([torch.randn(shape[1:], generator=generator) for generator in generators]).to(device)
    return draw_noise


class DiffusionModel(nn.Module):
    """The forward process q, the training loss and the reverse process p, around any network.

    model: maps x_t (B, C, H, W) and t (B,) int64 in 0..n_steps-1 to a prediction like x_t. Labels y (B,) int64 are its
    third argument, where they are given. For guidance, its attribute num_classes is the null label.
    prediction: what it predicts: "noise" (Ho et al.), or "v" = alpha * noise - sigma * x_0 (Salimans and Ho 2022).
    alpha and sigma are the factors in x_t = alpha * x_0 + sigma * noise, as Salimans and Ho name them: alpha^2 =
    alphas_cumprod, sigma^2 = 1 - alpha^2. Ho et al. call another number alpha_t: 1 - beta_t.
    Timesteps count from 0: t = 0 is the papers' t = 1, an image with the noise of one step. The clean image is x_0, as
    an argument x_start, and where a timestep stands for it, that is -1.
    schedule: "linear" multiplies beta_start and beta_end by 1000 / n_steps, so that x_T is noise for every n_steps;
    "cosine" ignores them.
    t_distribution: which timesteps training draws: "uniform" (Algorithm 1), or "lognormal": those around the noise
    levels where there is most to learn (Karras et al. 2022). Raises ValueError if an option is out of range.
    """

    def __init__(self, model, n_steps=1000, beta_start=1e-4, beta_end=0.02, schedule="linear", prediction="noise",
                 t_distribution="uniform"):
        super().__init__()
        if not 1 <= n_steps <= 100_000:
            raise ValueError(f"n_steps must be in 1..100000, got {n_steps}")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"0 < beta_start <= beta_end < 1 must hold, got {beta_start} and {beta_end}")
        if prediction not in ("noise", "v"):
            raise ValueError(f"prediction must be noise or v, got {prediction!r}")
        if t_distribution not in ("uniform", "lognormal"):
            raise ValueError(f"t_distribution must be uniform or lognormal, got {t_distribution!r}")
        self.model = model
        self.n_steps = n_steps
        self.schedule = schedule
        self.prediction = prediction
        self.t_distribution = t_distribution
        self.config = dict(n_steps=n_steps, beta_start=beta_start, beta_end=beta_end, schedule=schedule,
                           prediction=prediction, t_distribution=t_distribution)
        # Computed in float64, since a thousand factors near 1 are multiplied; kept as float32, all that MPS has.
        betas = make_betas(schedule, n_steps, beta_start, beta_end)
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)                    # section 2, above eq. 4
        if alphas_cumprod[-1] < 1e-30:  # samplers divide by its root, which must not be 0 in float32
            raise ValueError(f"beta_end {beta_end} is too large: with {n_steps} steps nothing is left of the image")
        alphas_cumprod_prev = torch.cat([torch.ones_like(betas[:1]), alphas_cumprod[:-1]])  # 1: the clean image
        tables = dict(
            betas=betas,
            alphas_cumprod=alphas_cumprod,
            sqrt_alphas_cumprod=alphas_cumprod.sqrt(),                      # alpha: the factor of the image in x_t
            sqrt_one_minus_alphas_cumprod=(1 - alphas_cumprod).sqrt(),      # sigma: standard deviation of the noise
            posterior_variance=betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod),  # eq. 7; 0 where t = 0
        )
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)     # not in files: config rebuilds them

    def alpha_sigma(self, t):
        """The factors in x_t = alpha * x_0 + sigma * noise: t an int or (B,) -> two (B, 1, 1, 1). t = -1: 1 and 0."""
        alphas = F.pad(self.sqrt_alphas_cumprod, (0, 1), value=1.0)         # index -1 reaches the entry added here
        sigmas = F.pad(self.sqrt_one_minus_alphas_cumprod, (0, 1), value=0.0)
        return alphas[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1)

    def log_alpha_over_sigma(self, t):
        """The lambda of Lu et al., half the log of the signal-to-noise ratio: t as above -> (B, 1, 1, 1)."""
        alpha, sigma = self.alpha_sigma(t)
        return (alpha / sigma).log()

    # ---- Training: Algorithm 1

    def draw_timesteps(self, count):
        """Draw timesteps to train on: -> (count,) int64 in 0..n_steps-1, one from each of `count` equal shares."""
        device = self.betas.device
        # Spread over the batch: each timestep is as likely as if all were drawn alone, but the loss varies less.
        quantiles = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
        if self.t_distribution == "uniform":
            return (quantiles * self.n_steps).long().clamp(max=self.n_steps - 1)    # rounding can reach n_steps
        # Karras et al. 2022, table 1: ln(sigma / alpha) is normally distributed. Half of all uniformly drawn timesteps
        # of the linear schedule lie above sigma / alpha = 3.4, where next to nothing of the image can be seen.
        wanted = LOG_NOISE_MEAN + LOG_NOISE_STD * math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
        levels = (self.sqrt_one_minus_alphas_cumprod / self.sqrt_alphas_cumprod).log()   # rises with t
        return torch.searchsorted((levels[1:] + levels[:-1]) / 2, wanted)   # the timestep whose level is nearest

    def q_sample(self, x_start, t, noise=None):
        """Draw x_t from q(x_t | x_0) (eq. 4): x_start (B, C, H, W) in [-1, 1], t (B,) int64 -> like x_start."""
        noise = torch.randn_like(x_start) if noise is None else noise
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x_start + sigma * noise

    def predict(self, x_t, t, y=None):
        """The network's output, in float32. Without labels it gets no third argument, so that any network will do."""
        return (self.model(x_t, t) if y is None else self.model(x_t, t, y)).float()

    def forward(self, x_start, y=None, t=None, noise=None):
        """The training loss (Algorithm 1; eq. 14, or its like for v): x_start (B, C, H, W) in [-1, 1] -> scalar.

        y: labels (B,) or None. t (B,) and noise, like x_start: drawn at random where None.
        """
        if t is None:
            t = self.draw_timesteps(len(x_start))                                         # Algorithm 1, line 3
        if noise is None:
            noise = torch.randn_like(x_start)                                             # line 4
        x_t = self.q_sample(x_start, t, noise)                                            # line 5, in the brackets
        alpha, sigma = self.alpha_sigma(t)
        target = noise if self.prediction == "noise" else alpha * noise - sigma * x_start
        return F.mse_loss(self.predict(x_t, t, y), target)                                # line 5; backward() follows

    # ---- Drawing: Algorithm 2 and its shortcuts

    def predict_x_start(self, x_t, t, y=None, guidance=1.0):
        """Estimate x_0 from x_t: x_t (B, C, H, W), t (B,) int64 -> x_0 (B, C, H, W), clipped to [-1, 1]."""
        if guidance == 1:
            prediction = self.predict(x_t, t, y)
        else:  # Ho and Salimans 2022, eq. 6, with guidance = 1 + their w; both halves in one batch
            labels = torch.cat([y, torch.full_like(y, self.model.num_classes)])
            conditional, null = self.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), labels).chunk(2)
            prediction = null + guidance * (conditional - null)
        alpha, sigma = self.alpha_sigma(t)
        if self.prediction == "noise":
            x_0 = (x_t - sigma * prediction) / alpha                        # eq. 4, solved for x_0
        else:
            x_0 = alpha * x_t - sigma * prediction                          # Salimans and Ho 2022, section 4
        return x_0.clamp(-1, 1)  # no image lies outside; later steps would make the error larger

    def step(self, x_t, x_0, t, s, eta=0.0, new_noise=0.0):
        """From x_t to the less noisy x_s, aiming at the image x_0 (Song et al. 2021, eq. 12): -> x_s, like x_t.

        t and s < t: ints or (B,) int64; s = -1 lands on x_0. eta: how much of the noise is new_noise: 0 none; 1 as
        much as in the posterior q(x_s | x_t, x_0), whose mean and variance are eq. 7 where s = t - 1.
        """
        alpha_t, sigma_t = self.alpha_sigma(t)
        alpha_s, sigma_s = self.alpha_sigma(s)
        # From x_t and x_0, not the network's own: where x_0 was clipped, only this noise goes with it to x_t.
        noise = (x_t - alpha_t * x_0) / sigma_t                             # eq. 4, solved for the noise
        # The beta of the whole way from s to t, 1 - (alpha_t / alpha_s)^2, written so that it is exact when small.
        beta = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
        spread = eta * sigma_s / sigma_t * beta.sqrt()                      # eta 1: posterior_variance.sqrt()
        return alpha_s * x_0 + (sigma_s**2 - spread**2).sqrt() * noise + spread * new_noise

    @torch.no_grad()
    def p_sample(self, x_t, t, y=None):
        """One ancestral step (Algorithm 2, lines 3 and 4): x_t (B, C, H, W), t (B,) int64 -> x_{t-1}, like x_t."""
        # Of the two variances that Ho et al. name (section 3.2) the posterior's: it also serves where steps are left
        # out, and is 0 at t = 0, so that no noise is left in the picture.
        return self.step(x_t, self.predict_x_start(x_t, t, y), t, t - 1, eta=1.0, new_noise=torch.randn_like(x_t))

    def timesteps(self, sampler="dpm++", steps=None):
        """The strictly decreasing list of timesteps that a sampler visits. After the last comes the clean image."""
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
        if steps is None:
            steps = min(SAMPLERS[sampler].steps or self.n_steps, self.n_steps)
        if not 1 <= steps <= self.n_steps:
            raise ValueError(f"steps must be in 1..{self.n_steps}, the n_steps of this model, got {steps}")
        if SAMPLERS[sampler].even_in == "t":
            return torch.linspace(self.n_steps - 1, 0, steps, dtype=torch.float64, device="cpu").round().int().tolist()
        # Evenly spaced in lambda = log(alpha / sigma): best for small images, says the README of Lu et al.'s code.
        lambdas = (self.sqrt_alphas_cumprod / self.sqrt_one_minus_alphas_cumprod).cpu().double().log()  # falls with t
        # The last timesteps of cosine hold nothing but noise: start no lower than -5.1 there, as that code does.
        start = lambdas[lambdas >= -5.1].min() if self.schedule == "cosine" else lambdas[-1]
        wanted = torch.linspace(start.item(), lambdas[0].item(), steps, dtype=torch.float64, device="cpu")
        nearest = {(lambdas - value).abs().argmin().item() for value in wanted}  # two may have the same nearest one
        return sorted(nearest, reverse=True)

    def sample(self, shape, sampler="dpm++", steps=None, y=None, guidance=1.0, seed=None, init_image=None,
               strength=1.0, mask=None, progress=True, callback=None, x_T=None):
        """Draw images (Algorithm 2 and its shortcuts): shape (N, C, H, W) -> x_0 (N, C, H, W) in [-1, 1].

        sampler: "ddpm" (ancestral, Ho et al.), "ddim" (eta = 0, Song et al.) or "dpm++" (DPM-Solver++(2M), Lu et al.);
        they are in the table SAMPLERS. steps: how often the network is called; None: that of the table.
        y: labels (N,); None: no class. guidance 1: as trained; above 1: more typical of the class, in twice the time.
        seed: image i is drawn with seed + i, whatever batch it is in; None: random. torch's random state is not used.
        init_image (N, C, H, W) in [-1, 1] and strength in 0..1: start from it, noised that far; 0 returns it.
        mask, broadcast to init_image: 1 repaints, 0 keeps the pixels of init_image, exactly.
        callback(i, t, x_t, x_0): called in step i with the images at timestep t and the estimate of x_0 from them.
        x_T (N, C, H, W): the starting noise, in place of the seed's.
        Raises ValueError if the options do not fit together.
        """
        device = self.betas.device
        y, init_image, mask, x_T = self._check_options(shape, y, guidance, init_image, strength, mask, x_T)
        timesteps = self.timesteps(sampler, steps)
        draw_noise = noise_of_seeds(shape, seed, device)

        def denoise(x_t, t):
            x_t = x_t.contiguous(memory_format=memory_format(device))
            return self.predict_x_start(x_t, torch.full(shape[:1], t, device=device), y, guidance)

        x_t = draw_noise() if x_T is None else x_T                          # Algorithm 2, line 1
        if init_image is not None:
            if strength == 0:
                return init_image.clone()
            timesteps = [t for t in timesteps if t <= round(strength * self.n_steps, 6)]  # 0.29 * 100 is below 29
            if not timesteps:
                raise ValueError(f"strength {strength} is too low for so few steps: raise strength or steps")
            x_t = self.q_sample(init_image, timesteps[0], x_t)

        now = None
        pairs = list(zip(timesteps, timesteps[1:] + [-1]))
        with torch.inference_mode(), eval_mode(self.model), autocast(device):
            for i, (t, s) in enumerate(progress_bar(pairs, progress)):      # line 2; from timestep t to the next, s
                before, now = now, Moment(t, s, x_t, denoise(x_t, t))
                if callback is not None:
                    callback(i, t, x_t, now.x_0)
                # Lines 3 and 4, for any sampler.
                kind = SAMPLERS[sampler]
                new_noise = draw_noise() if kind.eta > 0 and s >= 0 else 0.0
                x_t = self.step(x_t, kind.aim(self, now, before, denoise), t, s, kind.eta, new_noise)
                if mask is not None:                                        # kept pixels: as noisy as the others
                    x_t = mask * x_t + (1 - mask) * self.q_sample(init_image, s, draw_noise())
        return x_t.clone()  # outside of inference mode, so that it can be used in training too

    def _check_options(self, shape, y, guidance, init_image, strength, mask, x_T):
        """Check what `sample` is asked for (else ValueError), and bring it to the device."""
        def tensor(value, dtype=torch.float32):
            return None if value is None else torch.as_tensor(value, dtype=dtype, device=self.betas.device)

        y, init_image, mask, x_T = tensor(y, torch.int64), tensor(init_image), tensor(mask), tensor(x_T)
        num_classes = getattr(self.model, "num_classes", None)              # a network of one's own may have none
        if shape[0] < 1:
            raise ValueError(f"at least one image must be asked for, got {shape[0]}")
        for name, value, wanted in (("y", y, shape[:1]), ("init_image", init_image, shape), ("x_T", x_T, shape)):
            if value is not None and tuple(value.shape) != tuple(wanted):
                raise ValueError(f"{name} must have the shape {tuple(wanted)}, got {tuple(value.shape)}")
        if y is not None and num_classes is not None and not 0 <= y.min() <= y.max() <= num_classes:
            raise ValueError(f"labels must be in 0..{num_classes}, where {num_classes} is no class, got {y.tolist()}")
        if guidance != 1 and (y is None or num_classes is None):
            raise ValueError("guidance needs labels y, and a network with the attribute num_classes")
        if mask is not None:
            fits = mask.ndim <= len(shape) and all(m in (1, n) for m, n in zip(mask.shape[::-1], shape[::-1]))
            if init_image is None or not fits or not 0 <= mask.min() <= mask.max() <= 1:
                raise ValueError(f"a mask needs an init_image whose pixels to keep, a shape that broadcasts to "
                                 f"{tuple(shape)}, and values in 0..1")
        if init_image is not None and init_image.abs().max() > 1.001:
            raise ValueError(f"init_image must be in [-1, 1], got {init_image.min():.3g} to {init_image.max():.3g}")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be in 0..1, got {strength}")
        if init_image is None and self.alphas_cumprod[-1] > 0.01:
            warnings.warn(f"the noisiest timestep still holds {self.alphas_cumprod[-1]:.0%} of the image's variance: "
                          f"from pure noise it draws wrongly; raise beta_end")
        return y, init_image, mask, x_T


# ---------------------------------------------------------------------------------------------------------------------
# 3. The whole: SimpleDiffusion (network, process, configuration) and its file


@contextlib.contextmanager
def replacing(path):
    """Give a temporary file to write to, which takes the place of `path` only once all of it is on the disk."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # or a power cut could leave a renamed, empty file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: what torch.save raises where the disk is full
        raise OSError(f"{path} could not be written, what was there is unchanged: {brief(error)}") from None
    finally:
        with contextlib.suppress(OSError):  # nothing to remove where the folder could not be made
            temporary.unlink()


@contextlib.contextmanager
def reading(path, remedy="give another file"):
    """Turn whatever goes wrong in the block, where `path` is read, into a ValueError that names it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        yield
    except Exception as error:  # zipfile, pickle, torch and our own checks raise a dozen kinds
        reason = f"it holds no {error}" if isinstance(error, KeyError) else brief(error)
        raise ValueError(f"{path} is damaged, or no file of this kind ({reason}): {remedy}") from None


def check_contents(value, depth=0):
    """Let only finite tensors, numbers, strings, and a few levels of lists and dicts of them pass."""
    if isinstance(value, torch.Tensor):
        # A tensor of stride 0 repeats one number: it can claim terabytes that the file does not hold.
        repeats = value.untyped_storage().nbytes() < value.numel() * value.element_size()
        if repeats or not value.is_floating_point() or not value.isfinite().all():
            raise ValueError("a tensor in it does not hold finite numbers")
    elif isinstance(value, (list, tuple, dict)) and depth < 6:  # deeper: a short pickle can nest without end
        for entry in [*value, *value.values()] if isinstance(value, dict) else value:
            check_contents(entry, depth + 1)
    elif not isinstance(value, (int, float, str, type(None))):
        raise ValueError(f"it holds a {type(value).__name__}")


def read_checkpoint(path):
    """What torch.save wrote to `path`, from wherever it comes: no code in it is run, no absurd size is allocated."""
    # torch.load checks no checksums and would unpack a compressed file to any size. Ours are not compressed.
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path) or archive.testzip():
            raise ValueError("its checksums or sizes are wrong")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    check_contents(saved)
    return saved


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


class SimpleDiffusion(nn.Module):
    """A SimpleUNet in a DiffusionModel, with image size and class names: what is trained, saved and drawn from.

    With class_names (or num_classes) it learns classes. unet_options: the other options of SimpleUNet; where
    attention_levels is not among them, the smallest images have attention, unless they are larger than 16x16.
    Unlike the bare DiffusionModel, which is Ho et al.'s, it predicts v and draws t lognormally unless told otherwise.
    """

    def __init__(self, image_size=32, n_steps=1000, hidden_channels=64, schedule="linear", prediction="v",
                 class_names=None, channel_mults=(1, 2, 2), beta_start=1e-4, beta_end=0.02,
                 t_distribution="lognormal", **unet_options):
        super().__init__()
        if class_names is not None:
            class_names = [str(name) for name in class_names]
            if unet_options.setdefault("num_classes", len(class_names)) != len(class_names):
                raise ValueError(f"{len(class_names)} class names for {unet_options['num_classes']} classes")
        if unet_options.get("attention_levels") is None:
            smallest = image_size // 2 ** (len(channel_mults) - 1)
            unet_options["attention_levels"] = [len(channel_mults) - 1] if smallest <= 16 else []
        network = SimpleUNet(hidden_channels=hidden_channels, channel_mults=channel_mults, **unet_options)
        if not network.size_multiple <= image_size <= 4096 or image_size % network.size_multiple:
            raise ValueError(f"image_size must be a multiple of {network.size_multiple}, up to 4096, got {image_size}")
        self.image_size = image_size
        self.class_names = class_names
        self.diffusion = DiffusionModel(network, n_steps, beta_start, beta_end, schedule, prediction, t_distribution)

    @property
    def model(self):  # a property, for an attribute would put the weights into the state dict twice
        return self.diffusion.model

    def forward(self, x, y=None, t=None, noise=None):
        """The training loss: x (B, C, S, S) in [-1, 1], y (B,) int64 or None -> scalar. t and noise: drawn if None."""
        return self.diffusion(x, y, t, noise)

    def sample(self, batch_size=4, **options):
        """Draw images: -> (batch_size, C, S, S) in [0, 1]. options: those of DiffusionModel.sample.

        Only the result is in [0, 1]: init_image, and the images that callback gets, are in [-1, 1].
        """
        shape = (batch_size, self.model.config["in_channels"], self.image_size, self.image_size)
        return (self.diffusion.sample(shape, **options) + 1) / 2

    def save(self, path="diffusion_model.pth", **info):
        """Write weights (float16) and configuration: all that `load` needs. info: numbers and strings, for humans."""
        weights = {name: tensor.to("cpu", torch.float16) for name, tensor in self.model.state_dict().items()}
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise FloatingPointError(f"the weights are not finite, or too large for float16: {path} was not written")
        with replacing(path) as temporary:
            torch.save(dict(model_config=self.model.config, diffusion_config=self.diffusion.config,
                            model_state_dict=weights, image_size=self.image_size, class_names=self.class_names,
                            info=info), temporary)

    @classmethod
    def load(cls, path="diffusion_model.pth", device=None):
        """Read what `save` wrote, onto `device` (None: the best there is), in eval mode.

        Raises FileNotFoundError, or a ValueError that says what is wrong with the file.
        """
        with reading(path):
            saved = read_checkpoint(path)
            weights = {name.replace("_orig_mod.", "").replace("module.", ""): tensor.float()  # torch.compile, DDP
                       for name, tensor in saved["model_state_dict"].items()}
            if "stem.weight" in weights:
                raise ValueError("it is of this project's first release, whose network had other parts")
            config = saved["model_config"]
            if len(config["channel_mults"]) * max(config["num_res_blocks"]) > len(weights):  # they would take long
                raise ValueError("it claims more blocks than it holds weights")
            with torch.device("meta"):  # the file can claim any size: memory is only taken for the weights it holds
                model = cls(**config, **saved["diffusion_config"], image_size=saved["image_size"],
                            class_names=saved["class_names"])
            model.model.load_state_dict(weights, assign=True)
        device = pick_device(device)
        return model.to(device, memory_format=memory_format(device)).eval()


# ---------------------------------------------------------------------------------------------------------------------
# 4. Training: the configuration, one step, the run, the loop


def option(default, meaning, least=-math.inf, below=math.inf):
    """A field of TrainConfig. least and below: bounds of its numbers, where the classes above have none."""
    return field(default=default, metadata=dict(meaning=meaning, least=least, below=below))


def flag_of(name):
    return "--" + name.replace("_", "-")


@dataclass
class TrainConfig:
    """Every option of a run. The flags are the same names with dashes: image_size is --image-size."""

    data: str = option("cifar10", "cifar10, shapes, or a folder: of images, or one that holds cifar-10-batches-py")
    out: str = option(".", "folder for diffusion_model.pth, model_info.json, samples/ and training_state.pth")
    image_size: int = option(32, "height and width; images are resized and cropped to the centre", least=1)
    limit: int = option(None, "use the first LIMIT images only (of a folder in the order of their paths)", least=1)
    epochs: int = option(100, "passes over the data", least=1)
    batch_size: int = option(64, "images a step, over all processes", least=1)
    lr: float = option(3e-3, "peak learning rate, after the warm-up and before the decay to 0", least=1e-12)
    hidden_channels: int = option(64, "channels of the first level")
    channel_mults: tuple = option((1, 2, 2), "channels of each level, as multiples of the first")
    num_res_blocks: tuple = option((2,), "residual blocks of a level: one number, or one a level", below=101)
    attention_levels: tuple = option(None, "levels that have attention; 0 is the full size (by default the last)")
    num_heads: int = option(None, "heads of the attention (by default 4, or fewer where 4 does not divide)")
    dropout: float = option(0.0, "share of the residual blocks' values dropped in training")
    n_steps: int = option(1000, "timesteps of the diffusion process")
    schedule: str = option("linear", "noise schedule: linear or cosine")
    prediction: str = option("v", "what the network predicts: v (mixed of noise and image) or noise")
    t_distribution: str = option("lognormal", "timesteps to train on: lognormal (where most is learned) or uniform")
    unconditional: bool = option(False, "ignore the classes of the data")
    no_flip: bool = option(False, "never mirror the images: for letters, digits and all that has a left and a right")
    sample_every: int = option(5, "epochs from one grid of samples and export to the next", least=1)
    seed: int = option(0, "of the weights, the order of the data and all noise", least=0, below=2**31)
    device: str = option(None, "mps, cuda or cpu; by default the first of them that is there")
    compile: bool = option(False, "compile the network with torch.compile")
    tensorboard: bool = option(False, "write loss curves to OUT/tensorboard")
    restart: bool = option(False, "begin again, even where a stopped run could go on")

    def __post_init__(self):
        for entry in fields(self):
            value, least, below = getattr(self, entry.name), entry.metadata["least"], entry.metadata["below"]
            if value is None:
                continue
            try:  # to plain types, all that a file can hold: from Python come also a Path, a list, numbers of numpy's
                if entry.type in (str, float):
                    value = entry.type(value)
                elif entry.type is tuple:
                    value = tuple(map(operator.index, [value] if isinstance(value, int) else value))
                else:
                    value = entry.type(operator.index(value))
            except (TypeError, ValueError):
                raise ValueError(f"{flag_of(entry.name)} cannot be {value!r}") from None
            setattr(self, entry.name, value)
            for number in value if entry.type is tuple else [value]:
                if entry.type is not str and not least <= number < below:
                    raise ValueError(f"{flag_of(entry.name)} must be at least {least} and below {below}, got {number}")


# When a stopped run goes on, any other option must be as it was, or it would be another run.
MAY_CHANGE_ON_RESUME = ("out", "epochs", "lr", "sample_every", "device", "compile", "tensorboard", "restart")


def learning_rate(step, total_steps, peak):
    """Warm-up over 500 steps (5 % of a short run) from above 0, times a cosine to 0. step: 0..total_steps-1."""
    warmup = min(500, max(1, total_steps // 20))
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


@torch.no_grad()
def update_ema(ema, model, step):
    """Move the average towards the weights after `step` steps: half of it is made of the last 3 % of them."""
    decay = 0.5 ** (1 / (0.03 * step))                                      # decay ** (0.03 * step) is 1/2
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def training_batch(images, labels, index, num_classes, flip=True):
    """The images at `index`, half of them flipped, one label in ten dropped: -> x (B, C, S, S) in [-1, 1], y (B,)."""
    x = from_uint8(images[index])
    if flip:
        flipped = torch.rand(len(index), device=x.device) < 0.5
        x = torch.where(flipped[:, None, None, None], x.flip(3), x)
    x = x.contiguous(memory_format=memory_format(x.device))
    if labels is None:
        return x, None
    # One label in ten becomes the null label: guidance needs a network that knows it (Ho and Salimans, Algorithm 1).
    dropped = torch.rand(len(index), device=x.device) < 0.1
    return x, labels[index].masked_fill(dropped, num_classes)


class KernelMuon(torch.optim.Muon):
    """torch.optim.Muon, which takes matrices alone, for kernels too: each as a matrix that shares its memory."""

    def __init__(self, kernels, lr, **options):
        self.kernels = list(kernels)
        super().__init__([self.matrix(kernel, kernel.detach()) for kernel in self.kernels], lr, **options)

    @staticmethod
    def matrix(kernel, values):
        """`values`, like `kernel` (out, in, k, k), as a matrix (out, in * k * k): a view, in both memory formats."""
        return values.flatten(1) if kernel.is_contiguous() else values.permute(0, 2, 3, 1).flatten(1)

    def step(self):
        matrices = self.param_groups[0]["params"]
        for kernel, matrix in zip(self.kernels, matrices):
            matrix.grad = self.matrix(kernel, kernel.grad)
        super().step()


def make_optimizers(network, lr):
    """Muon (Jordan et al. 2024) for what maps features to features, AdamW for the rest: -> a list of optimisers.

    What touches pixels or labels (stem, head, class embedding), norms and biases are no such maps.
    """
    stem, head = network.down[0]["entry"], network.up[-1]["exit"][-1]
    maps = [part.weight for part in network.modules()
            if isinstance(part, (nn.Conv2d, nn.Linear)) and part not in (stem, head)]
    rest = [parameter for parameter in network.parameters() if all(parameter is not weight for weight in maps)]
    # match_rms_adamw: updates as large as AdamW's would be, so that the two rates are of one size.
    return [KernelMuon(maps, lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, 0.4 * lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]


def options_of(config):
    """Those fields of a TrainConfig that are options of SimpleDiffusion, of which None means its default."""
    names = {name for model in (SimpleUNet, SimpleDiffusion) for name in inspect.signature(model).parameters}
    return {name: value for name, value in asdict(config).items() if name in names and value is not None}


class TrainingRun:
    """The network, its average, the optimisers and how far they have come: what a step changes and a state holds.

    The random numbers of a step follow from the seed, the step and the process alone. So a run that was stopped
    anywhere goes on as if it had not been, and no random state has to be saved.
    """

    def __init__(self, config, images, labels, class_names, processes, make_optimizers):
        self.config = config
        self.processes = processes
        self.out = Path(config.out).resolve()
        device = processes.device
        # All of the data as uint8 on the device: a batch is an index away, and no worker process is needed.
        self.images = images.to(device)
        self.labels = None if labels is None else labels.to(device)
        self.batch_size = min(config.batch_size, len(images)) // processes.count * processes.count
        if self.batch_size == 0 or config.batch_size % processes.count:
            raise ValueError(f"--batch-size {config.batch_size}: {len(images)} images cannot be shared evenly by "
                             f"{processes.count} processes")
        self.steps_per_epoch = len(images) // self.batch_size  # images that do not fill a batch wait for another epoch
        self.total_steps = config.epochs * self.steps_per_epoch

        torch.manual_seed(config.seed)
        self.model = SimpleDiffusion(class_names=class_names, in_channels=images.shape[1], **options_of(config))
        self.model.to(device, memory_format=memory_format(device))
        # A moving average of the weights over the steps: what is drawn from and exported.
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizers = make_optimizers(self.model.model, config.lr)
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.loss_function = processes.wrap(self.model)
        if config.compile:
            torch._dynamo.config.suppress_errors = True  # what it cannot compile runs as it is, with a warning
            self.loss_function = torch.compile(self.loss_function)

        self.order = None                                                   # of the images in this epoch
        self.step = 0                                                       # steps done
        self.seconds = 0.0                                                  # time spent on them
        self.epoch_losses = []                                              # the mean loss of each finished epoch
        self.losses = torch.zeros(self.steps_per_epoch, device=device)      # of each step of this epoch

        self.resumed_at = 0, 0.0                                            # step and seconds when this start began

    def batch(self, index):
        return training_batch(self.images, self.labels, index, self.model.model.num_classes, not self.config.no_flip)

    def train_step(self):
        """One pass through the loop of Algorithm 1. Its lines 3 to 5 are in DiffusionModel.forward."""
        epoch, i = divmod(self.step, self.steps_per_epoch)
        seed = 1_000_003 * self.config.seed                                 # a prime: no two runs have a step's seed
        if self.order is None or i == 0:                                    # the order of this epoch's images
            generator = torch.Generator().manual_seed(seed + epoch)
            self.order = torch.randperm(len(self.images), generator=generator, device="cpu").to(self.images.device)
        # For all random numbers from here on: a seed of its own for each step and process.
        torch.manual_seed((seed + self.step) * self.processes.count + self.processes.rank)
        whole_batch = self.order[i * self.batch_size:(i + 1) * self.batch_size]
        x, y = self.batch(whole_batch[self.processes.rank::self.processes.count])  # line 2: this process's share
        with autocast(x.device):
            loss = self.loss_function(x, y)                                 # lines 3 to 5
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)       # a rare bad batch does little harm
        for optimizer, peaks in zip(self.optimizers, self.peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = learning_rate(self.step, self.total_steps, peak)
            optimizer.step()                                                # line 5: the gradient step
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        update_ema(self.ema, self.model, self.step)
        self.losses[i] = loss.detach() + 0 * norm                           # not finite where one of the two is not

    def fetch_losses(self):
        """The losses of this epoch's steps, as a list; FloatingPointError if one is not finite. A GPU waits for it."""
        done = self.losses[:(self.step - 1) % self.steps_per_epoch + 1].tolist()
        wrong = [i for i, loss in enumerate(done) if not math.isfinite(loss)]
        if wrong:
            step = self.step - len(done) + wrong[0] + 1
            raise FloatingPointError(f"the loss is not finite at step {step} of this run: give the same command with "
                                     f"a lower --lr; it goes on from training_state.pth, which is from before that")
        return done

    def state(self):
        """All that a run needs to go on as if it had not been stopped."""
        done = self.losses[:self.step % self.steps_per_epoch].tolist()
        return dict(model=self.model.model.state_dict(), ema=self.ema.model.state_dict(),
                    optimizers=[optimizer.state_dict()["state"] for optimizer in self.optimizers],
                    memory_format=str(memory_format(self.images.device)), step=self.step, seconds=self.seconds,
                    epoch_losses=self.epoch_losses, losses=done, images=len(self.images), config=asdict(self.config))

    def restore(self, state):
        """Go on from what `state` returned. Raises a ValueError of some kind if anything in it does not fit."""
        self.step, self.seconds, self.epoch_losses = state["step"], state["seconds"], state["epoch_losses"]
        self.resumed_at = self.step, self.seconds
        epochs, steps = divmod(self.step, self.steps_per_epoch)
        finite = all(map(math.isfinite, [*state["epoch_losses"], *state["losses"]]))
        if (type(self.step) is not int or (epochs, steps) != (len(state["epoch_losses"]), len(state["losses"]))
                or not 0 <= self.seconds < 1e9 or not finite):
            raise ValueError("its step, seconds and losses do not fit together")
        self.losses[:steps] = torch.tensor(state["losses"])
        self.model.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        if state["memory_format"] != str(memory_format(self.images.device)):
            return  # on another kind of device: Muon's matrices have other columns there, so momentum begins anew
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": saved})
            for parameter, values in optimizer.state.items():
                for value in values.values():
                    if value is not None and getattr(value, "shape", None) not in (parameter.shape, ()):
                        raise ValueError("the state of its optimisers does not fit the network")


def train(config, make_optimizers=make_optimizers):
    """Train as `config` says, or go on with such a run: -> the SimpleDiffusion of averaged weights.

    It is in eval mode and has no gradients: to train it on, .train().requires_grad_(True).
    make_optimizers(network, lr) -> a list of optimisers, to train with others than Muon and AdamW.
    Raises ValueError or OSError where an option, the data or a file is wrong, FloatingPointError where the loss is not
    finite, and SystemExit (130 or 143) after Ctrl-C or SIGTERM, with the state saved.
    """
    from tqdm import tqdm
    keep_freed_memory()
    torch.set_flush_denormal(True)  # numbers below 1e-38 become 0: a CPU is many times slower with them
    torch.backends.cudnn.benchmark = True  # all batches have one shape: worth trying which convolution is fastest
    processes = Processes(config.device)
    state = read_state(config)
    with processes.first_goes_ahead():  # it downloads the data, while the others wait
        images, labels, class_names = load_images(config.data, config.image_size, config.limit)
    if config.unconditional:
        labels = class_names = None
    run = TrainingRun(config, images, labels, class_names, processes, make_optimizers)
    if state is not None:
        restore(run, state)
    if processes.largest(run.step) != -processes.largest(-run.step):
        raise ValueError("not every process finds the same training_state.pth: --out must be a folder that all "
                         "machines share")
    if run.step == run.total_steps:
        processes.say(f"finished already, after {config.epochs} epochs: more --epochs go on, --restart begins again")
        return run.ema
    begin(run, state)
    writer = tensorboard_writer(run)
    bar = tqdm(total=run.total_steps * run.batch_size, initial=run.step * run.batch_size, unit=" images",
               unit_scale=True, dynamic_ncols=True, disable=processes.rank > 0 or not sys.stderr.isatty())
    last = saved = shown = time.monotonic()
    with bar, stop_signals() as received:
        while run.step < run.total_steps:
            run.train_step()
            now = time.monotonic()
            run.seconds += now - last
            last = now
            bar.update(run.batch_size)
            if now - shown > 1:                                             # a GPU has to wait for it: once a second
                recent = run.fetch_losses()[-100:]
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}")
                shown = now
            stop = processes.largest(received[0] if received else 0)        # all of them stop after the same step
            epoch_done = run.step % run.steps_per_epoch == 0
            if epoch_done:
                end_epoch(run, bar, writer)
            if epoch_done or stop or now - saved > 300:                     # a crash costs five minutes at most
                save_state(run)
                saved = now
            if stop:
                processes.say(f"stopped after step {run.step} of {run.total_steps}: give the same command to go on")
                sys.exit(128 + stop)                                        # 130 or 143, as shells have it
    if processes.count > 1:
        torch.distributed.destroy_process_group()
    checkpoint = run.out / "diffusion_model.pth"
    processes.say(f"wrote {checkpoint}; draw from it: python inference_example.py --checkpoint {checkpoint}")
    return run.ema


# ---------------------------------------------------------------------------------------------------------------------
# 5. Around it: data, pictures, files of a run, several processes and signals, the command line


def from_uint8(pixels):
    """Pixels 0..255 -> images in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(images):
    """Images in [0, 1], as SimpleDiffusion.sample gives them -> pixels 0..255, rounded."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


SHAPES = {  # which points belong to a shape; a and b are |x| and |y|, from 0 in the centre to 1 at the edge
    "circle": lambda x, y, a, b: a**2 + b**2 < 0.8,
    "ring": lambda x, y, a, b: (a**2 + b**2 - 0.6).abs() < 0.3,
    "square": lambda x, y, a, b: torch.maximum(a, b) < 0.75,
    "frame": lambda x, y, a, b: (torch.maximum(a, b) - 0.7).abs() < 0.2,
    "diamond": lambda x, y, a, b: a + b < 1,
    "triangle": lambda x, y, a, b: (y < 0.8) & (a < (y + 1) / 2),
    "plus": lambda x, y, a, b: (torch.minimum(a, b) < 0.28) & (torch.maximum(a, b) < 0.95),
    "cross": lambda x, y, a, b: ((a - b).abs() < 0.35) & (torch.maximum(a, b) < 0.85),
    "bar": lambda x, y, a, b: (a < 0.95) & (b < 0.3),
    "stripes": lambda x, y, a, b: (torch.maximum(a, b) < 0.95) & (torch.cos(9.9 * x) > 0),
}


def draw_shapes(image_size, count, seed=0):
    """Coloured shapes, the same ones for a seed: -> uint8 (count, 3, S, S), labels (count,), the ten class names."""
    numbers = torch.rand(count, 11, generator=torch.Generator().manual_seed(seed), device="cpu")
    labels = (numbers[:, 0] * len(SHAPES)).long()
    places, colours = numbers[:, 1:4], numbers[:, 4:10].view(count, 2, 3) * 90  # centre, size; shape, background
    colours[torch.arange(count), (2 * numbers[:, 10]).long()] += 150        # one of the two is bright
    axis = (torch.arange(4 * image_size) + 0.5) / (2 * image_size) - 1      # four by four points in each pixel
    images = torch.empty(count, 3, image_size, image_size, dtype=torch.uint8)
    for i, (centre_x, centre_y, size) in enumerate(places.tolist()):
        size = 0.55 + 0.3 * size
        x, y = ((axis - (centre - 0.5) / 4) / size for centre in (centre_x, centre_y))
        x, y = torch.meshgrid(x, y, indexing="xy")                          # (4 S, 4 S) each
        inside = list(SHAPES.values())[labels[i]](x, y, x.abs(), y.abs())
        cover = F.avg_pool2d(inside[None].float(), 4)                       # (1, S, S): how much of each pixel
        shape, background = colours[i, :, :, None, None]
        images[i] = (cover * shape + (1 - cover) * background).round()
    return images, labels, list(SHAPES)


def open_picture(path):
    """Any picture file -> a PIL image: upright, RGB, on white if transparent."""
    import numpy
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
        if picture.mode.startswith(("I", "F")):  # 16 bits and more: PIL would make all above 255 white
            values = numpy.asarray(picture, dtype=float)
            values = values / 257 if picture.mode.startswith("I;16") or values.max() > 255 else values  # 65535 -> 255
            picture = Image.fromarray(values.clip(0, 255).round().astype("uint8"))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except Exception as error:  # PIL raises many kinds of them
        raise ValueError(f"{path}: not a readable picture: {brief(error)}") from None


def read_picture(path, image_size):
    """Any picture file -> uint8 (3, S, S), resized and cropped to its centre."""
    import numpy
    from PIL import ImageOps
    picture = ImageOps.fit(open_picture(path), [image_size] * 2)
    return torch.tensor(numpy.asarray(picture)).permute(2, 0, 1)


def load_folder(folder, image_size, limit):
    """All pictures below `folder`. Its immediate subfolders are the classes, unless pictures lie beside them."""
    suffixes = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    images, kept, unreadable = [], [], []
    for path in sorted(paths)[:limit]:
        try:
            images.append(read_picture(path, image_size))
            kept.append(path.relative_to(folder))
        except ValueError as error:
            unreadable.append(str(error))
            print(f"skipped: {error}", file=sys.stderr)
    if len(unreadable) > len(kept):
        raise ValueError(f"{len(unreadable)} of {len(paths)} pictures cannot be read, the first: {unreadable[0]}")
    if not kept:
        raise ValueError(f"{folder}: no pictures found ({' '.join(sorted(suffixes))})")
    images = torch.stack(images)
    if (images == images[:, :1]).all():  # grey, all of them: one channel says it all
        images = images[:, :1].contiguous()
    if not all(len(path.parts) > 1 for path in kept):  # some pictures lie in `folder` itself
        return images, None, None
    class_names = sorted({path.parts[0] for path in kept})
    return images, torch.tensor([class_names.index(path.parts[0]) for path in kept]), class_names


def is_cifar10(data):
    return data == "cifar10" or (Path(data) / "cifar-10-batches-py").is_dir()


def load_images(data, image_size=32, limit=None):
    """Read a data set: -> images uint8 (N, 3, S, S), labels int64 (N,) or None, class_names or None.

    data: "cifar10" (in ./data, downloaded where missing), a folder that holds cifar-10-batches-py, any other folder of
    images, or "shapes". limit: the first images only. Raises a ValueError that says what is wrong and what to do.
    """
    if data == "shapes":
        return draw_shapes(image_size, limit or 5_000)
    if not is_cifar10(data):
        if not Path(data).is_dir():
            raise ValueError(f"--data {data}: no such folder; give a folder of images, cifar10 or shapes")
        return load_folder(Path(data), image_size, limit)
    from torchvision.datasets import CIFAR10
    root = Path("data" if data == "cifar10" else data).resolve()
    try:
        cifar = CIFAR10(root, train=True, download=(data == "cifar10"))     # checks the checksums of what is there
    except Exception as error:  # no network, a full disk, a file cut off
        raise ValueError(f"CIFAR-10 could not be loaded ({brief(error)}): fetch it with curl, which goes on where it "
                         f"broke off: curl -C - --create-dirs -o {root / CIFAR10.filename} {CIFAR10.url}; "
                         f"or train without it: --data shapes, or --data FOLDER of your images") from None
    images, labels = torch.from_numpy(cifar.data[:limit]).permute(0, 3, 1, 2), torch.tensor(cifar.targets[:limit])
    if image_size != 32:
        images = F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
    return images, labels, cifar.classes


def save_grid(images, path, columns, scale=None):
    """Write images (N, C, S, S) in [0, 1] as one PNG, each pixel `scale` wide (None: images of about 128 pixels)."""
    from PIL import Image
    from torchvision.utils import make_grid
    scale = max(1, 128 // images.shape[-1]) if scale is None else scale
    pixels = to_uint8(images.cpu()).repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    with replacing(path) as temporary:
        Image.fromarray(make_grid(pixels, nrow=columns).permute(1, 2, 0).numpy()).save(temporary, format="PNG")


def plot_losses(losses, path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout="constrained")
    figure.add_subplot(xlabel="epoch", ylabel="training loss").plot(range(1, len(losses) + 1), losses, marker=".")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def plot_noising(image, config, path):
    """Above, one image (C, S, S) in [-1, 1] at five timesteps; below, alphas_cumprod of the two schedules."""
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid
    figure = Figure(figsize=(10, 5), layout="constrained")
    t = torch.tensor([min(round(share * config.n_steps), config.n_steps - 1) for share in (0, 0.1, 0.3, 0.5, 1)])
    noised = DiffusionModel(None, config.n_steps, schedule=config.schedule).q_sample(image.expand(5, -1, -1, -1), t)
    axes = figure.add_subplot(2, 1, 1, title="t = " + ", ".join(map(str, t.tolist())))
    axes.imshow(make_grid(to_uint8((noised + 1) / 2), nrow=5).permute(1, 2, 0).numpy())
    axes.axis("off")
    axes = figure.add_subplot(2, 1, 2, xlabel="t", ylabel="alphas_cumprod")
    for schedule in ("linear", "cosine"):
        axes.plot(DiffusionModel(None, config.n_steps, schedule=schedule).alphas_cumprod.numpy(), label=schedule)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


class Processes:
    """This process among those of torchrun, each on a GPU of its own, or all on the CPU. Without torchrun: alone."""

    def __init__(self, device=None):
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device)
        if self.count == 1:
            return
        on_gpu = self.device.type == "cuda"
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
        if not torch.distributed.is_initialized():  # it can be, where a program calls train() more than once
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                                                 timeout=datetime.timedelta(days=1))  # as long as a download may take

    def say(self, line):
        if self.rank == 0:
            print(line, flush=True)

    def largest(self, number):
        """The largest of the numbers (int) of all processes, once all have come here."""
        if self.count == 1:
            return number
        number = torch.tensor(number, device="cpu")
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return number.item()

    @contextlib.contextmanager
    def first_goes_ahead(self):
        """The first process runs the block before the others do."""
        if self.rank > 0:
            self.largest(0)
        yield
        if self.rank == 0:
            self.largest(0)

    def wrap(self, model):
        """`model`, whose gradients backward() averages over the processes."""
        return model if self.count == 1 else nn.parallel.DistributedDataParallel(model)


@contextlib.contextmanager
def stop_signals():
    """Collect Ctrl-C and SIGTERM in a list, so that the batch in hand can be finished; a second one ends at once."""
    received, handlers = [], {}
    if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(number, frame):
        received.append(number)
        signal.signal(number, handlers[number])

    try:
        for number in handlers:
            signal.signal(number, receive)
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def save_state(run):
    run.fetch_losses()  # raises an error if one is not finite: then the last good state stays
    if run.processes.rank == 0:
        with replacing(run.out / "training_state.pth") as temporary:
            torch.save(run.state(), temporary)


def read_state(config):
    """The state of a stopped run in config.out, checked to be one of these options; None where there is none."""
    path = Path(config.out).resolve() / "training_state.pth"
    if config.restart or not path.exists():
        return None
    with reading(path, "--restart begins again"):
        state = read_checkpoint(path)
        before = TrainConfig(**state["config"])
    for name, new in asdict(config).items():
        old = getattr(before, name)
        if name not in MAY_CHANGE_ON_RESUME and old != new:
            raise ValueError(f"the run in {path.parent} was begun with {flag_of(name)} {old}, not {new}: give the "
                             f"same, another --out, or --restart")
    return state


def begin(run, state):
    """Say what is trained on what. At the very start, show what the network is fed and keep an old checkpoint."""
    config, say, device = run.config, run.processes.say, run.processes.device
    network = run.model.model
    few = run.batch_size < config.batch_size
    few = f" (there are fewer images than --batch-size {config.batch_size})" if few else ""
    if state is not None:
        say(f"going on after step {run.step} from {run.out / 'training_state.pth'} (--restart begins again)")
    say(f"device    {device}, {'bfloat16' if has_bfloat16(device) else 'float32'}\n"
        f"network   {count_parameters(network) / 1e6:.1f} M parameters, {network.num_classes or 'no'} classes\n"
        f"data      {len(run.images):,} images of {config.data}, {config.image_size} pixels wide\n"
        f"training  {config.epochs} epochs of {run.steps_per_epoch} steps, batch {run.batch_size}{few}\n"
        f"files     {run.out}")
    if state is not None or run.processes.rank > 0:
        return
    for name in ("diffusion_model.pth", "model_info.json"):
        old = run.out / name
        if old.exists():
            with replacing(f"{old}.bak") as temporary:
                temporary.write_bytes(old.read_bytes())
    x, _ = run.batch(torch.arange(min(64, len(run.images))))
    save_grid((x + 1) / 2, run.out / "samples" / "data.png", columns=8)
    plot_noising(x[0].cpu(), config, run.out / "samples" / "noising.png")
    save_state(run)  # before the first step, so that a full disk is noticed at once


def restore(run, state):
    """Have the run go on from a state; its tensors and numbers may still be anything."""
    if state.get("images") != len(run.images):
        raise ValueError(f"the run in {run.out} was begun with {state.get('images')} images, now "
                         f"there are {len(run.images)}: give the same --data, another --out, or --restart")
    with reading(run.out / "training_state.pth", "--restart begins again"):
        run.restore(state)


def tensorboard_writer(run):
    """What writes the loss curves of --tensorboard, or None."""
    if not run.config.tensorboard or run.processes.rank > 0:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs one more package: pip install tensorboard") from None
    # purge_step: a run that was killed may have written a later epoch, which now comes again.
    return SummaryWriter(run.out / "tensorboard", purge_step=run.step - run.step % run.steps_per_epoch + 1)


def end_epoch(run, bar, writer):
    """Report; every few epochs, and after the last, draw samples and export the model."""
    config, epoch = run.config, run.step // run.steps_per_epoch
    losses = run.fetch_losses()
    run.epoch_losses.append(sum(losses) / len(losses))
    if run.processes.rank > 0:
        return
    first_step, seconds_before = run.resumed_at                             # an earlier start may have been elsewhere
    for step, loss in enumerate(losses if writer else [], start=run.step - len(losses) + 1):
        writer.add_scalar("loss", loss, step)
    speed = (run.step - first_step) * run.batch_size / (run.seconds - seconds_before)
    minutes_left = (run.total_steps - run.step) * run.batch_size / speed / 60
    bar.write(f"epoch {epoch:3d}/{config.epochs}  loss {run.epoch_losses[-1]:.4f}  {speed:.0f} images/s  "
              f"{minutes_left:.0f} minutes left", file=sys.stdout)
    sys.stdout.flush()
    if epoch % config.sample_every == 0 or epoch == config.epochs:
        export(run)
        # Drawn from the file, so that the grid shows what inference_example.py draws with --guidance 1.
        model = SimpleDiffusion.load(run.out / "diffusion_model.pth", run.processes.device)
        classes = model.model.num_classes
        labels = None if classes is None else [i % classes for i in range(4)]
        images = model.sample(4, y=labels, seed=config.seed, progress=False)
        save_grid(images, run.out / "samples" / f"epoch_{epoch:04d}.png", columns=2)
        plot_losses(run.epoch_losses, run.out / "samples" / "loss.png")


def export(run):
    """Write diffusion_model.pth, and what it is into model_info.json."""
    config, ours = run.config, is_cifar10(run.config.data) or run.config.data == "shapes"
    info = dict(
        architecture=f"SimpleUNet {run.model.model.config}", parameters=count_parameters(run.model),
        dataset="CIFAR-10" if is_cifar10(config.data) else config.data, images_seen=run.step * run.batch_size,
        epochs=len(run.epoch_losses), batch_size=run.batch_size, learning_rate=config.lr,
        optimizer=" and ".join(type(optimizer).__name__ for optimizer in run.optimizers) + ", cosine decay",
        **run.model.diffusion.config, final_loss=round(run.epoch_losses[-1], 5),
        training_minutes=round(run.seconds / 60, 1), device=str(run.processes.device), torch=str(torch.__version__),
        date=time.strftime("%Y-%m-%d"), license="MIT" if ours else "not stated")
    checkpoint = run.out / "diffusion_model.pth"
    run.ema.save(checkpoint, **info)
    # Only model_info.json has the checksum: a file cannot hold its own.
    info["sha256"] = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    with replacing(run.out / "model_info.json") as temporary:
        temporary.write_text(json.dumps(info, indent=2) + "\n")


class Parser(argparse.ArgumentParser):
    def error(self, message):  # where argparse would print all flags and exit
        raise ValueError(f"{message} (all flags: --help)")


@contextlib.contextmanager
def ends_in_one_line():
    """Let what a user can cause end in exit code 2 and one line that begins with "error:"."""
    try:
        yield
        return
    except KeyboardInterrupt:  # before or after the training loop, which handles it by itself
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        message = " ".join(str(error).split())
    except ImportError as error:
        message = f"{error}: pip install -r requirements.txt"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise  # no lack of memory, which CPU, CUDA and MPS all report with this word, but a bug: show where
        message = (f"out of memory ({brief(error)}): lower --batch-size, --hidden-channels or --image-size, together "
                   f"with --restart; to draw, -n below 16 or --device cpu")
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@ends_in_one_line()
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for entry in fields(TrainConfig):
        default, meaning = entry.default, entry.metadata["meaning"]
        if entry.type is bool:
            options = dict(action="store_true")
        elif entry.type is tuple:
            options = dict(type=int, nargs="*", default=default, metavar="")
            meaning += f" ({' '.join(map(str, default))})" if default else ""
        else:
            options = dict(type=entry.type, default=default, metavar="")
            meaning += "" if default is None else f" ({default})"
        parser.add_argument(flag_of(entry.name), help=meaning, **options)
    train(TrainConfig(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
