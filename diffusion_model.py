"""Train a diffusion model on CIFAR-10 and draw pictures with it, in one file.

    python diffusion_model.py        trains: downloads CIFAR-10, writes diffusion_model.pth, and pictures into samples/
    python inference_example.py      draws pictures from diffusion_model.pth

    python diffusion_model.py --data shapes --image-size 16 --hidden-channels 16 --out my_shapes       no download
    python diffusion_model.py --data FOLDER --out my_run                                               your own images

A run that was stopped goes on when the same command is given again. All flags: --help. From Python:

    from diffusion_model import SimpleDiffusion
    images = SimpleDiffusion.load().sample(10, y=range(10), guidance=2, seed=0)      # (10, 3, 32, 32) in [0, 1]

The released weights: --channel-mults 1 2 2 --num-res-blocks 1 --attention-levels 2 --batch-size 64 --lr 1.2e-3
--epochs 14 (4.8 M parameters, loss 0.140) took 115 minutes on two cores of an AMD EPYC without a GPU, torch 2.15. What
they draw is measured in the README.

The classes need torch alone: parts 1 to 3 and their imports can be copied into a project of your own. Images are in
[-1, 1] everywhere but in what SimpleDiffusion.sample returns.

Where no paper is named, equations and algorithms are those of Ho et al. 2020, Denoising Diffusion Probabilistic Models
(arXiv 2006.11239). The others: Nichol and Dhariwal 2021 (2102.09672: cosine schedule), Song et al. 2021 (2010.02502:
DDIM), Salimans and Ho 2022 (2202.00512: v prediction), Ho and Salimans 2022 (2207.12598: guidance), Lu et al. 2022
(2211.01095: DPM-Solver++).
"""
import contextlib
import math
import os
import zipfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# What follows is needed in part 4 only.
import argparse
import copy
import ctypes
import hashlib
import json
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields

# ---------------------------------------------------------------------------------------------------------------------
# 1. The U-Net: time embedding, attention, residual block, SimpleUNet


def time_embedding(t, width):
    """Sinusoids of the timestep (Vaswani et al. 2017): t (B,) in 0..n_steps-1 -> (B, width) float32."""
    half = (width + 1) // 2                                                 # rounded up: width may be odd
    # All in float32: in bfloat16 neighbouring timesteps would be equal.
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies                               # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)[:, :width]


def largest_divisor(n, limit):
    """The largest whole number up to `limit` that divides n, so that any number of channels can be split evenly."""
    return next(k for k in range(min(n, limit), 0, -1) if n % k == 0)


def group_norm(channels):
    # At least 16 channels a group: with fewer, its backward in bfloat16 on the CPU is up to ten times slower.
    return nn.GroupNorm(largest_divisor(channels, min(32, max(1, channels // 16))), channels)


def zero_init(layer):
    """Zero the last layer of a residual branch, so that at first the branch adds nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Multi-head self-attention between the pixels of an image, added to it: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels, num_heads):
        super().__init__()
        self.num_heads = largest_divisor(channels, num_heads)
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
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        h = self.out(h.transpose(1, 2).reshape(B, H * W, C))                # the heads side by side again
        return x + h.transpose(1, 2).view(B, C, H, W)


class ResidualBlock(nn.Module):
    """Two convolutions, between which time and class scale and shift the features; then attention if num_heads > 0.

    forward(x, emb): x (B, in_channels, H, W), emb (B, time_dim) -> (B, out_channels, H, W)
    """

    def __init__(self, in_channels, out_channels, time_dim, dropout, num_heads):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_channels)                   # -> a scale and a shift for each channel
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = Attention(out_channels, num_heads) if num_heads else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.time(emb)[:, :, None, None].chunk(2, dim=1)     # (B, out_channels, 1, 1) each
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)                  # shift + norm * (1 + scale), in one pass
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(self.skip(x) + h)


class SimpleUNet(nn.Module):
    """The network: noisy images and their timesteps in, a prediction of the same shape out.

    forward(x, t, y=None): x (B, in_channels, H, W), t (B,) int64 in 0..n_steps-1, y (B,) int64 or None -> like x.
    Label num_classes is the null label ("no class"); y=None means null for every image. Raises ValueError if H or W is
    not a multiple of 2**(levels - 1), or if labels are given to a network without classes.
    """

    def __init__(self,
                 in_channels=3,
                 hidden_channels=64,
                 channel_mults=(1, 2, 4),       # level i has hidden_channels * channel_mults[i], works at H / 2**i
                 num_res_blocks=2,              # of each level on the way down; on the way up it is one more
                 attention_levels=(1, 2),       # where each pixel looks at all others; 0 is the full size
                 num_heads=4,                   # of the attention
                 time_dim=256,                  # channels of the embedding of time and class
                 dropout=0.0,                   # share of the values dropped in each block while training
                 num_classes=None):             # None: the network knows no classes
        super().__init__()
        self.config = dict(in_channels=in_channels, hidden_channels=hidden_channels, channel_mults=list(channel_mults),
                           num_res_blocks=num_res_blocks, attention_levels=list(attention_levels), num_heads=num_heads,
                           time_dim=time_dim, dropout=dropout, num_classes=num_classes)
        sizes = [in_channels, hidden_channels, num_res_blocks, num_heads, time_dim, *channel_mults]
        if not channel_mults or min(sizes) < 1 or (num_classes is not None and num_classes < 1):
            raise ValueError(f"every size of the network must be at least 1, got {self.config}")
        if len(channel_mults) * num_res_blocks > 1000:  # building more would take very long
            raise ValueError(f"num_res_blocks {num_res_blocks} on {len(channel_mults)} levels: more than 1000 blocks")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.time_dim, self.num_classes, self.size_multiple = time_dim, num_classes, 2 ** (len(channel_mults) - 1)

        def block(c_in, c_out, level):
            return ResidualBlock(c_in, c_out, time_dim, dropout, num_heads if level in attention_levels else 0)

        self.time_mlp = nn.Sequential(nn.Linear(time_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.class_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, time_dim)  # + 1: null
        self.stem = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)

        # Down: every result is kept for the way up. `skips` holds their numbers of channels, the newest last.
        widths, skips = [hidden_channels * mult for mult in channel_mults], [hidden_channels]
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            if level > 0:
                self.shrink.append(nn.Conv2d(skips[-1], skips[-1], 3, stride=2, padding=1))  # halves H and W
                skips.append(skips[-1])
            self.down.append(nn.ModuleList())
            for _ in range(num_res_blocks):
                self.down[-1].append(block(skips[-1], width, level))
                skips.append(width)
        # Bottleneck: a block, attention if the last level has it, a block.
        last, channels = len(widths) - 1, widths[-1]
        self.middle = nn.ModuleList([block(channels, channels, last), block(channels, channels, None)])
        # Up: each block takes one of the kept results: those of the level's blocks, and the one before them.
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level in range(last, -1, -1):
            if level < last:
                self.grow.append(nn.Conv2d(channels, channels, 3, padding=1))
            self.up.append(nn.ModuleList())
            for _ in range(num_res_blocks + 1):
                self.up[-1].append(block(channels + skips.pop(), widths[level], level))
                channels = widths[level]
        self.norm = group_norm(channels)
        self.out = zero_init(nn.Conv2d(channels, in_channels, 3, padding=1))

    def forward(self, x, t, y=None):
        if x.shape[2] % self.size_multiple or x.shape[3] % self.size_multiple:
            raise ValueError(f"height and width must be multiples of {self.size_multiple}, got {tuple(x.shape[2:])}")
        if y is not None and self.num_classes is None:
            raise ValueError("labels y for a network without classes")
        emb = self.time_mlp(time_embedding(t, self.time_dim))               # (B, time_dim)
        if self.num_classes is not None:
            emb = emb + self.class_embedding(torch.full_like(t, self.num_classes) if y is None else y)
        emb = F.silu(emb)                                                   # here once, not in every block

        # Down. The shapes in these comments are those of the defaults and 32x32 images.
        x = self.stem(x)                                                    # (B, 64, 32, 32)
        skips = [x]
        for level, blocks in enumerate(self.down):
            if level > 0:
                x = self.shrink[level - 1](x)                   # level 1: (B, 64, 16, 16), level 2: (B, 128, 8, 8)
                skips.append(x)
            for block in blocks:
                x = block(x, emb)       # level 0: (B, 64, 32, 32), level 1: (B, 128, 16, 16), level 2: (B, 256, 8, 8)
                skips.append(x)
        # Bottleneck.
        for block in self.middle:
            x = block(x, emb)                                               # (B, 256, 8, 8)
        # Up: the newest skip first.
        for i, blocks in enumerate(self.up):
            if i > 0:
                x = self.grow[i - 1](F.interpolate(x, scale_factor=2.0, mode="nearest"))
            for block in blocks:
                x = block(torch.cat([x, skips.pop()], dim=1), emb)          # (B, 256, 8, 8), at last (B, 64, 32, 32)
        return self.out(F.silu(self.norm(x)))


# ---------------------------------------------------------------------------------------------------------------------
# 2. The diffusion process: DiffusionModel
#
# Training: mix an image with noise, x_t = alpha * x_0 + sigma * noise (the larger t, the more noise), and teach the
# network to tell the two apart. Drawing: begin with noise alone; in each step the network estimates the clean image
# x_0 that is in x_t, and the next x_t is that estimate with less noise. The papers call the first direction
# q(x_t | x_0), the second p(x_{t-1} | x_t).


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


def extract(table, t):
    """The table's values at timesteps t (B,), shaped (B, 1, 1, 1) to multiply images with."""
    return table[t][:, None, None, None]


def has_bfloat16(device):
    """Whether the device multiplies bfloat16 in hardware: elsewhere it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older versions of torch have no get_capabilities: dict() then stands for a CPU that has none.
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))


def autocast(device):
    """Convolutions and matrix products in bfloat16 where that is fast; weights, tables and the loss stay float32."""
    # Never float16: its range is too small to train in without loss scaling.
    return torch.autocast(device.type, torch.bfloat16) if has_bfloat16(device) else contextlib.nullcontext()


def memory_format(device):
    """The order of an image's numbers in memory that makes convolutions fastest."""
    # On MPS channels_last is slow, and some versions of torch computed wrong results with it.
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


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
    with contextlib.suppress(ImportError):  # parts 1 to 3 need torch alone
        from tqdm import tqdm
        return tqdm(steps, disable=not show, desc="sampling", leave=False)
    return steps


class DiffusionModel(nn.Module):
    """The forward process q, the training loss and the reverse process p, around any network.

    model: maps x_t (B, C, H, W) and t (B,) int64 in 0..n_steps-1 to a prediction like x_t. Labels y (B,) int64 are its
    third argument, where they are given. For guidance, its attribute num_classes is the null label.
    prediction: what it predicts: "noise" (Ho et al.), or "v" = alpha * noise - sigma * x_0 (Salimans and Ho 2022).
    alpha and sigma are the factors in x_t = alpha * x_0 + sigma * noise, as Salimans and Ho name them: alpha^2 =
    alphas_cumprod, sigma^2 = 1 - alpha^2. Ho et al. call another number alpha_t: 1 - beta_t.
    Timesteps count from 0: t = 0 is the papers' t = 1, an image with the noise of one step. The clean image is x_0, as
    an argument x_start.
    schedule: "linear" multiplies beta_start and beta_end by 1000 / n_steps, so that x_T is noise for every n_steps;
    "cosine" ignores them. Raises ValueError if an option is out of range.
    """

    def __init__(self, model, n_steps=1000, beta_start=1e-4, beta_end=0.02, schedule="linear", prediction="noise"):
        super().__init__()
        if not 1 <= n_steps <= 100_000:
            raise ValueError(f"n_steps must be in 1..100000, got {n_steps}")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"0 < beta_start <= beta_end < 1 must hold, got {beta_start} and {beta_end}")
        if prediction not in ("noise", "v"):
            raise ValueError(f"prediction must be noise or v, got {prediction!r}")
        self.model, self.n_steps, self.schedule, self.prediction = model, n_steps, schedule, prediction
        self.config = dict(n_steps=n_steps, beta_start=beta_start, beta_end=beta_end, schedule=schedule,
                           prediction=prediction)
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
        """The factors in x_t = alpha * x_0 + sigma * noise, alpha^2 + sigma^2 = 1: t (B,) -> two (B, 1, 1, 1)."""
        return extract(self.sqrt_alphas_cumprod, t), extract(self.sqrt_one_minus_alphas_cumprod, t)

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
            t = torch.randint(0, self.n_steps, x_start.shape[:1], device=x_start.device)  # Algorithm 1, line 3
        if noise is None:
            noise = torch.randn_like(x_start)                                             # line 4
        x_t = self.q_sample(x_start, t, noise)                                            # line 5, in the brackets
        alpha, sigma = self.alpha_sigma(t)
        target = noise if self.prediction == "noise" else alpha * noise - sigma * x_start
        return F.mse_loss(self.predict(x_t, t, y), target)                                # line 5; backward() follows

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

    @torch.no_grad()
    def p_sample(self, x_t, t, y=None):
        """One ancestral step (Algorithm 2, lines 3 and 4): x_t (B, C, H, W), t (B,) int64 -> x_{t-1}, like x_t."""
        x_0 = self.predict_x_start(x_t, t, y)
        alpha, sigma = self.alpha_sigma(t)
        beta, variance = extract(self.betas, t), extract(self.posterior_variance, t)
        # Eq. 7, where sqrt(alphas_cumprod_{t-1}) = alpha / sqrt(1 - beta), (1 - alphas_cumprod_{t-1}) / sigma^2 =
        # variance / beta and alphas_t = 1 - beta. At t = 0 the mean is x_0, the variance 0.
        mean = alpha * beta / ((1 - beta).sqrt() * sigma**2) * x_0 + (1 - beta).sqrt() * variance / beta * x_t
        return mean + variance.sqrt() * torch.randn_like(x_t)

    def timesteps(self, sampler="dpm++", steps=None):
        """The strictly decreasing list of timesteps that a sampler visits. After the last comes the clean image."""
        if sampler not in ("ddpm", "ddim", "dpm++"):
            raise ValueError(f"sampler must be ddpm, ddim or dpm++, got {sampler!r}")
        if steps is None:
            steps = min({"ddpm": self.n_steps, "ddim": 50, "dpm++": 20}[sampler], self.n_steps)
        if not 1 <= steps <= self.n_steps:
            raise ValueError(f"steps must be in 1..{self.n_steps}, the n_steps of this model, got {steps}")
        if sampler != "dpm++":
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

        sampler: "ddpm" (ancestral, Ho et al.), "ddim" (eta = 0, Song et al.) or "dpm++" (DPM-Solver++(2M), Lu et al.).
        steps: how often the network is called; None: n_steps, 50 and 20. dpm++ leaves out repeated timesteps.
        y: labels (N,); None: no class. guidance 1: as trained; above 1: more typical of the class, in twice the time.
        seed: image i is drawn with seed + i, whatever batch it is in; None: random. torch's random state is not used.
        init_image (N, C, H, W) in [-1, 1] and strength in 0..1: start from it, noised that far; 0 returns it.
        mask, broadcast to init_image: 1 repaints, 0 keeps the pixels of init_image, exactly.
        callback(i, t, x_t, x_0): called in step i with the images at timestep t and the estimate of x_0 from them.
        x_T (N, C, H, W): the starting noise, in place of the seed's.
        Raises ValueError if the options do not fit together.
        """
        device, layout = self.betas.device, memory_format(self.betas.device)
        y, init_image, mask, x_T = self._prepare_options(shape, y, guidance, init_image, strength, mask, x_T)
        timesteps = self.timesteps(sampler, steps)
        if init_image is not None:
            if strength == 0:
                return init_image.clone()
            highest = round(strength * self.n_steps, 6)                     # rounded, for 0.29 * 100 is below 29
            timesteps = [t for t in timesteps if t <= highest]
            if not timesteps:
                raise ValueError(f"strength {strength} is too low for so few steps: raise strength or steps")
        # A generator for each image, on the CPU: its noise depends on its seed alone, not on batch or device.
        seed = torch.Generator().seed() % 2**31 if seed is None else seed   # seed() draws one from the system
        generators = [torch.Generator().manual_seed(seed + i) for i in range(shape[0])]

        def draw_noise():
            noises = [torch.randn(shape[1:], generator=generator, device="cpu") for generator in generators]
            return torch.stack(noises).to(device)

        alphas = self.sqrt_alphas_cumprod.tolist() + [1.0]                  # at -1, after timestep 0, the clean image
        sigmas = self.sqrt_one_minus_alphas_cumprod.tolist() + [0.0]
        x_t = draw_noise() if x_T is None else x_T                          # Algorithm 2, line 1
        if init_image is not None:                                          # eq. 4
            x_t = alphas[timesteps[0]] * init_image + sigmas[timesteps[0]] * x_t
        pairs, x_0, h = list(zip(timesteps, timesteps[1:] + [-1])), None, None
        with torch.inference_mode(), eval_mode(self.model), autocast(device):
            for i, (t, s) in enumerate(progress_bar(pairs, progress)):      # line 2; from timestep t to the next, s
                # Lines 3 and 4, for any sampler: estimate x_0 from x_t, then go to x_s.
                x_t, t_batch = x_t.contiguous(memory_format=layout), torch.full(shape[:1], t, device=device)
                x_0_previous, x_0 = x_0, self.predict_x_start(x_t, t_batch, y, guidance)
                if callback is not None:
                    callback(i, t, x_t, x_0)
                alpha_t, sigma_t, alpha_s, sigma_s = alphas[t], sigmas[t], alphas[s], sigmas[s]
                D, spread = x_0, 0.0                                        # the image to aim at; the noise to add
                if sampler == "dpm++" and s >= 0:           # Lu et al. 2022, Algorithm 2; lambda at s = -1 is infinite
                    h_previous, h = h, math.log(alpha_s / sigma_s) - math.log(alpha_t / sigma_t)  # step in lambda
                    if i > 0:
                        D = x_0 + (x_0 - x_0_previous) * h / (2 * h_previous)  # x_0 extrapolated by half a step
                if sampler == "ddpm":                                       # eq. 7; beta is 1 - (alpha_t / alpha_s)^2
                    spread = sigma_s / sigma_t * math.sqrt(1 - (alpha_t / alpha_s) ** 2)
                noise = (x_t - alpha_t * D) / sigma_t                       # eq. 4, solved for the noise
                x_t = alpha_s * D + math.sqrt(max(0.0, sigma_s**2 - spread**2)) * noise  # Song et al. 2021, eq. 12
                if spread > 0:
                    x_t = x_t + spread * draw_noise()
                if mask is not None:                                        # kept pixels: as noisy as the others
                    x_t = mask * x_t + (1 - mask) * (alpha_s * init_image + sigma_s * draw_noise())
        return x_t.clone()  # outside of inference mode, so that it can be used in training too

    def _prepare_options(self, shape, y, guidance, init_image, strength, mask, x_T):
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
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be in 0..1, got {strength}")
        return y, init_image, mask, x_T


# ---------------------------------------------------------------------------------------------------------------------
# 3. The whole: SimpleDiffusion (network, process, configuration) and its file


def brief(error):
    """What is wrong, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


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


def read_tensors(path):
    """What torch.save wrote to `path`. weights_only: code that the file may hold is not run."""
    # torch.load checks no checksums and would unpack a compressed file to any size. Ours are not compressed.
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path) or archive.testzip():
            raise ValueError("its checksums or sizes are wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def check_plain(values):
    """Let only numbers, strings and flat lists pass: a short pickle can nest lists that take terabytes to print."""
    for value in values:
        for entry in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(entry, (int, float, str, type(None))):
                raise ValueError(f"its configuration holds a {type(entry).__name__}")


def load_weights(network, weights, assign=False):
    """Load a state dict from a file that may hold anything. assign: for a network on the meta device."""
    for name, tensor in weights.items():
        # A tensor of stride 0 repeats one number: it can claim terabytes that the file does not hold.
        repeats = tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()
        if repeats or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{name} does not hold {tensor.numel()} finite numbers")
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=assign)


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


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


class SimpleDiffusion(nn.Module):
    """A SimpleUNet in a DiffusionModel, with image size and class names: what is trained, saved and drawn from.

    With class_names (or num_classes) it learns classes. unet_options: the other options of SimpleUNet. Other than
    DiffusionModel, which predicts noise as Ho et al. do, it predicts v unless told otherwise.
    """

    def __init__(self, image_size=32, n_steps=1000, hidden_channels=64, schedule="linear", prediction="v",
                 class_names=None, beta_start=1e-4, beta_end=0.02, **unet_options):
        super().__init__()
        if class_names is not None:
            class_names = [str(name) for name in class_names]
            if unet_options.setdefault("num_classes", len(class_names)) != len(class_names):
                raise ValueError(f"{len(class_names)} class names for {unet_options['num_classes']} classes")
        self.image_size, self.class_names = image_size, class_names
        unet_options["hidden_channels"] = hidden_channels
        with torch.device("meta"):  # tensors without memory: count before anything is allocated
            size = count_parameters(SimpleUNet(**unet_options))
        if size > 10**9:
            raise ValueError(f"a network of {size / 1e9:,.0f} billion parameters is too large: lower hidden_channels")
        network = SimpleUNet(**unet_options)
        if not network.size_multiple <= image_size <= 4096 or image_size % network.size_multiple:
            raise ValueError(f"image_size must be a multiple of {network.size_multiple}, up to 4096, got {image_size}")
        self.diffusion = DiffusionModel(network, n_steps, beta_start, beta_end, schedule, prediction)

    @property
    def model(self):  # a property, for an attribute would put the weights into the state dict twice
        return self.diffusion.model

    def forward(self, x, y=None):
        """The training loss: x (B, C, S, S) in [-1, 1], y (B,) int64 or None -> scalar."""
        return self.diffusion(x, y)

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
            saved = read_tensors(path)
            weights = {name.replace("_orig_mod.", "").replace("module.", ""): tensor  # left by torch.compile and DDP
                       for name, tensor in saved["model_state_dict"].items()}
            config = dict(saved["model_config"], **saved["diffusion_config"], image_size=saved["image_size"],
                          class_names=saved["class_names"])
            check_plain(config.values())
            with torch.device("meta"):  # the file can claim any size: memory is only taken for the weights it holds
                model = cls(**config)
            load_weights(model.model, weights, assign=True)
        device = pick_device(device)
        return model.to(device, memory_format=memory_format(device)).eval()


# ---------------------------------------------------------------------------------------------------------------------
# 4. Data, training, the command line


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


def read_picture(path, image_size):
    """Any picture file -> uint8 (3, S, S): upright, RGB, on white if transparent, resized, cropped to its centre."""
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
        return torch.tensor(numpy.asarray(ImageOps.fit(picture.convert("RGB"), [image_size] * 2))).permute(2, 0, 1)
    except Exception as error:  # PIL raises many kinds of them
        raise ValueError(f"{path}: not a readable picture: {brief(error)}") from None


def load_folder(folder, image_size, limit):
    """All pictures below `folder`. Its immediate subfolders are the classes, unless pictures lie beside them."""
    suffixes = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    paths = sorted(paths)[:limit]
    if not paths:
        raise ValueError(f"{folder}: no pictures found ({' '.join(sorted(suffixes))})")
    images = torch.stack([read_picture(path, image_size) for path in paths])
    subfolders = [path.relative_to(folder).parts[:-1] for path in paths]
    if not all(subfolders):  # some pictures lie in `folder` itself
        return images, None, None
    class_names = sorted({parts[0] for parts in subfolders})
    return images, torch.tensor([class_names.index(parts[0]) for parts in subfolders]), class_names


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
    root = Path("data" if data == "cifar10" else data)
    try:
        cifar = CIFAR10(root, train=True, download=(data == "cifar10"))     # checks the checksums of what is there
    except Exception as error:  # no network, a full disk, a file cut off
        raise ValueError(f"CIFAR-10 could not be loaded ({brief(error)}): unpack cifar-10-python.tar.gz of "
                         f"https://www.cs.toronto.edu/~kriz/cifar.html in {root.resolve()}, or train without a "
                         f"download: --data shapes, or --data FOLDER of your images") from None
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


def flag_of(name):
    return "--" + name.replace("_", "-")


def option(default, meaning, **rules):
    """A field of TrainConfig. rules: low <= value < below, or choices."""
    return field(default=default, metadata=dict(meaning=meaning, **rules))


@dataclass
class TrainConfig:
    """Every option of a run. The flags are the same names with dashes: image_size is --image-size."""

    data: str = option("cifar10", "cifar10, shapes, or a folder: of images, or one that holds cifar-10-batches-py")
    out: str = option(".", "folder for diffusion_model.pth, model_info.json, samples/ and training_state.pth")
    image_size: int = option(32, "height and width; images are resized and cropped to the centre", low=1, below=1025)
    limit: int = option(None, "use the first LIMIT images only (of a folder in the order of their paths)", low=1)
    epochs: int = option(100, "passes over the data", low=1)
    batch_size: int = option(128, "images a step, over all processes", low=1)
    lr: float = option(4e-4, "peak learning rate, after the warm-up and before the decay to 0", low=1e-12)
    hidden_channels: int = option(64, "channels of the first level", low=1)
    channel_mults: tuple = option((1, 2, 4), "channels of each level, as multiples of the first", low=1)
    num_res_blocks: int = option(2, "residual blocks a level", low=1)
    attention_levels: tuple = option((1, 2), "those of the levels that have attention; 0 is the full size", low=0)
    num_heads: int = option(4, "heads of the attention", low=1)
    dropout: float = option(0.0, "share of the residual blocks' values dropped in training", low=0.0, below=1.0)
    n_steps: int = option(1000, "timesteps of the diffusion process", low=1)
    schedule: str = option("linear", "noise schedule: linear or cosine", choices=("linear", "cosine"))
    prediction: str = option("v", "what the network predicts: v (mixed of noise and image) or noise",
                             choices=("v", "noise"))
    unconditional: bool = option(False, "ignore the classes of the data")
    sample_every: int = option(5, "epochs from one grid of samples and export to the next", low=1)
    seed: int = option(0, "of the weights, the order of the data and all noise", low=0, below=2**31)
    device: str = option(None, "mps, cuda or cpu; by default the first of them that is there")
    compile: bool = option(False, "compile the network with torch.compile")
    tensorboard: bool = option(False, "write loss curves to OUT/tensorboard")
    restart: bool = option(False, "begin again, even where a stopped run could go on")

    def __post_init__(self):
        for entry in fields(self):
            value, rules, flag = getattr(self, entry.name), entry.metadata, flag_of(entry.name)
            several = isinstance(entry.default, tuple)
            if value is not None:  # from Python also a Path, a list, a number of numpy's, which no file of ours holds
                try:
                    plain = tuple(map(int, value)) if several else entry.type(value)
                except (TypeError, ValueError, OverflowError):
                    plain = None
                if plain is None or (entry.type is not str and plain != (tuple(value) if several else value)):
                    raise ValueError(f"{flag} cannot be {value!r}")
                value = plain
                setattr(self, entry.name, value)
            for number in value if several else [value]:
                if "low" in rules and number is not None and not rules["low"] <= number < rules.get("below", math.inf):
                    below = f" and below {rules['below']}" if "below" in rules else ""
                    raise ValueError(f"{flag} must be at least {rules['low']}{below}, got {number}")
            if "choices" in rules and value not in rules["choices"]:
                raise ValueError(f"{flag} must be one of {', '.join(rules['choices'])}, got {value}")


# When a stopped run goes on, any other option must be as it was, or it would be another run.
MAY_CHANGE_ON_RESUME = ("out", "epochs", "sample_every", "device", "compile", "tensorboard", "restart")


def learning_rate(step, total_steps, peak):
    """Warm-up over 500 steps (5 % of a short run) from above 0, times a cosine to 0. step: 0..total_steps-1."""
    warmup = min(500, max(1, total_steps // 20))
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


@torch.no_grad()
def update_ema(ema, model, step):
    """Move the average towards the weights after `step` steps: half of it is made of the last 3 % of them."""
    decay = 0.5 ** (1 / (0.03 * step))                                      # decay ** (0.03 * step) is 1/2
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def training_batch(images, labels, index, num_classes):
    """The images at `index`, half of them flipped, one label in ten dropped: -> x (B, C, S, S) in [-1, 1], y (B,)."""
    x = from_uint8(images[index])
    flipped = torch.rand(len(index), device=x.device) < 0.5
    x = torch.where(flipped[:, None, None, None], x.flip(3), x).contiguous(memory_format=memory_format(x.device))
    if labels is None:
        return x, None
    # One label in ten becomes the null label: guidance needs a network that knows it (Ho and Salimans, Algorithm 1).
    dropped = torch.rand(len(index), device=x.device) < 0.1
    return x, labels[index].masked_fill(dropped, num_classes)


def keep_freed_memory():
    """Have the C library keep freed memory for the next tensor: new memory costs a fifth of a step on the CPU."""
    with contextlib.suppress(OSError, AttributeError):  # only Linux has glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)   # M_MMAP_MAX = 0: no large tensor is returned to the system as soon as it is freed
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD = -1 (none): nor is the end of the heap


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


class TrainingRun:
    """All that a run consists of: the data, the network, its average, the optimiser, and how far it has come.

    The random numbers of a step follow from the seed, the step and the process alone. So a run that was stopped
    anywhere goes on as if it had not been, and no random state has to be saved.
    """

    def __init__(self, config):
        self.config, self.out = config, Path(config.out).resolve()
        self.state_path, self.checkpoint = self.out / "training_state.pth", self.out / "diffusion_model.pth"
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
        self.device = pick_device(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.world > 1:
            self.join_processes()
        self.step, self.seconds = 0, 0.0  # steps done, and time spent on them, in earlier starts of the run too
        self.epoch_losses = []            # the mean loss of each finished epoch
        self.losses = []                  # the loss of each step of this epoch, as far as it was fetched
        self.pending = []                 # loss and gradient norm of the latest steps, still on the device
        self.order = self.tensorboard = None
        state = self.read_state() if self.state_path.exists() and not config.restart else None
        self.fresh = state is None

        if self.rank > 0:
            torch.distributed.barrier()  # wait until the first process has downloaded the data
        images, labels, class_names = load_images(config.data, config.image_size, config.limit)
        if self.rank == 0 and self.world > 1:
            torch.distributed.barrier()  # it has
        if config.unconditional:
            labels = class_names = None
        # All of it as uint8 on the device: a batch is an index away, and no worker process is needed.
        self.images, self.labels = images.to(self.device), None if labels is None else labels.to(self.device)
        self.batch_size = min(config.batch_size, len(images)) // self.world * self.world  # of all processes together
        if self.batch_size == 0 or config.batch_size % self.world:
            raise ValueError(f"--batch-size {config.batch_size}: {len(images)} images cannot be shared evenly by "
                             f"{self.world} processes")
        self.steps_per_epoch = len(images) // self.batch_size  # images that do not fill a batch wait for another epoch
        self.total_steps = config.epochs * self.steps_per_epoch

        torch.manual_seed(config.seed)
        self.model = SimpleDiffusion(
            config.image_size, config.n_steps, config.hidden_channels, config.schedule, config.prediction, class_names,
            channel_mults=config.channel_mults, num_res_blocks=config.num_res_blocks, dropout=config.dropout,
            attention_levels=config.attention_levels, num_heads=config.num_heads)
        self.model.to(self.device, memory_format=memory_format(self.device))
        # A moving average of the weights over the steps: what is drawn from and exported.
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=0.01,
                                           fused=True)  # all parameters in one pass
        if state is not None:
            self.restore(state)
        self.resumed_at = self.step, self.seconds
        if self.world > 1:
            self.check_all_begin_alike()
        # Under torchrun, backward() of the wrapped model averages the gradients over the processes.
        self.loss = self.model if self.world == 1 else nn.parallel.DistributedDataParallel(self.model)
        if config.compile:
            self.compile()
        if config.tensorboard and self.rank == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard needs one more package: pip install tensorboard") from None
            # purge_step: a run that was killed may have written later steps, which now come again.
            self.tensorboard = SummaryWriter(self.out / "tensorboard", purge_step=self.step + 1)

    def join_processes(self):
        """Connect with the other processes of torchrun, each on a GPU of its own, or all on the CPU."""
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
        if not torch.distributed.is_initialized():  # it can be, where a program calls train() more than once
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    def check_all_begin_alike(self):
        """Refuse to start where some machines have found the state of a stopped run and others have not."""
        most_and_least = torch.tensor([self.step, -self.step], device="cpu")
        torch.distributed.all_reduce(most_and_least, torch.distributed.ReduceOp.MAX)
        if most_and_least.sum() != 0:
            raise ValueError(f"not every process finds the same {self.state_path}: --out must be a folder that all "
                             f"machines share")

    def compile(self):
        """Compile the loss, and try it on a batch; where that fails, warn and go on without."""
        try:
            compiled = torch.compile(self.loss)
            with autocast(self.device):
                compiled(*self.batch(torch.arange(self.batch_size // self.world))).backward()
            self.loss = compiled
        except Exception as error:  # no C++ compiler, an unknown platform and many more
            print(f"warning: --compile does not work here, going on without: {brief(error)}", file=sys.stderr)
        self.optimizer.zero_grad(set_to_none=True)  # that batch was no training

    def say(self, line):
        if self.rank == 0:
            print(line, flush=True)

    def batch(self, index):
        return training_batch(self.images, self.labels, index, self.model.model.num_classes)

    def train_step(self):
        """One pass through the loop of Algorithm 1. Its lines 3 to 5 are in DiffusionModel.forward."""
        epoch, i = divmod(self.step, self.steps_per_epoch)
        if self.order is None or i == 0:                                    # the order of this epoch's images
            generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + epoch)
            self.order = torch.randperm(len(self.images), generator=generator, device="cpu").to(self.device)
        # For all random numbers from here on: a seed of its own for each step and process (the factor is a prime).
        torch.manual_seed((1_000_003 * self.config.seed + self.step) * self.world + self.rank)
        whole_batch = self.order[i * self.batch_size:(i + 1) * self.batch_size]
        x, y = self.batch(whole_batch[self.rank::self.world])               # line 2: the share of this process
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total_steps, self.config.lr)
        with autocast(self.device):
            loss = self.loss(x, y)                                          # lines 3 to 5
        loss.backward()
        gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)  # a rare bad batch does little harm
        self.optimizer.step()                                               # line 5: the gradient step
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        update_ema(self.ema, self.model, self.step)
        self.pending.append(torch.stack([loss.detach(), gradient_norm]))

    def fetch_losses(self):
        """Fetch the pending losses from the device and check them: many at once, since a GPU has to wait for it."""
        pending = torch.stack(self.pending).tolist() if self.pending else []
        self.pending = []
        for step, (loss, gradient_norm) in enumerate(pending, start=self.step - len(pending) + 1):
            if not math.isfinite(loss + gradient_norm):
                raise FloatingPointError(f"the loss is not finite at step {step} (loss {loss}, gradient norm "
                                         f"{gradient_norm}): try a lower --lr. {self.state_path} is from before that")
            self.losses.append(loss)
            if self.tensorboard:
                self.tensorboard.add_scalar("loss", loss, step)

    def save_state(self):
        self.fetch_losses()  # raises an error if one is not finite: then the last good state stays
        if self.tensorboard:
            self.tensorboard.flush()
        if self.rank == 0:
            with replacing(self.state_path) as temporary:
                torch.save(dict(model=self.model.model.state_dict(), ema=self.ema.model.state_dict(),
                                optimizer=self.optimizer.state_dict()["state"], step=self.step, seconds=self.seconds,
                                images=len(self.images), epoch_losses=self.epoch_losses, losses=self.losses,
                                config=asdict(self.config)), temporary)

    def read_state(self):
        """Read the state of a stopped run, and check that its options are those of this one."""
        with reading(self.state_path, "--restart begins again"):
            state = read_tensors(self.state_path)
            check_plain([*state["config"].values(), state["step"], state["images"]])
            before = TrainConfig(**state["config"])
        for name, new in asdict(self.config).items():
            old = getattr(before, name)
            if name not in MAY_CHANGE_ON_RESUME and old != new:
                raise ValueError(f"the run in {self.out} was begun with {flag_of(name)} {old}, not {new}: give the "
                                 f"same, another --out, or --restart")
        return state

    def restore(self, state):
        """Go on from `state`, which read_state has returned; its tensors and numbers may still be anything."""
        if state["images"] != len(self.images):
            raise ValueError(f"the run in {self.out} was begun with {state['images']} images, now there are "
                             f"{len(self.images)}: give the same --data, another --out, or --restart")
        with reading(self.state_path, "--restart begins again"):
            self.step, self.seconds = state["step"], state["seconds"]
            self.epoch_losses, self.losses = state["epoch_losses"], state["losses"]
            done = (len(self.epoch_losses), len(self.losses))  # whole epochs, and steps of the current one
            if (type(self.step) is not int or divmod(self.step, self.steps_per_epoch) != done
                    or not 0 <= self.seconds < 1e9 or not all(map(math.isfinite, self.epoch_losses + self.losses))):
                raise ValueError("its step, seconds and losses do not fit together")
            load_weights(self.model.model, state["model"])
            load_weights(self.ema.model, state["ema"])
            for i, parameter in enumerate(self.model.parameters() if self.step > 0 else []):  # none before step 1
                self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step), device=self.device)}
                for name in ("exp_avg", "exp_avg_sq"):
                    moment = state["optimizer"][i][name]
                    if moment.shape != parameter.shape or not moment.isfinite().all():
                        raise ValueError(f"its optimiser state does not fit parameter {i}")
                    # Copied, so that it lies in memory as the weights do: on another device that may differ.
                    self.optimizer.state[parameter][name] = torch.empty_like(parameter).copy_(moment)

    def begin(self):
        """Say what is trained on what. At the very start, show what the network is fed and keep an old checkpoint."""
        config, classes, parameters = self.config, self.model.model.num_classes, count_parameters(self.model)
        small = slow = ""
        if self.batch_size < config.batch_size:
            small = f" (there are fewer images than --batch-size {config.batch_size})"
        if self.device.type == "cpu" and parameters > 10e6:
            slow = " (slow on a CPU: the README has a smaller one)"
        if not self.fresh:
            self.say(f"going on after step {self.step} from {self.state_path} (--restart begins again)")
        self.say(f"device    {self.device}, {'bfloat16' if has_bfloat16(self.device) else 'float32'}\n"
                 f"network   {parameters / 1e6:.1f} M parameters, {classes or 'no'} classes{slow}\n"
                 f"data      {len(self.images):,} images of {config.data}, {config.image_size} pixels wide\n"
                 f"training  {config.epochs} epochs of {self.steps_per_epoch} steps, batch {self.batch_size}{small}\n"
                 f"files     {self.out}")
        if self.rank > 0 or not self.fresh:
            return
        for old in (self.checkpoint, self.out / "model_info.json"):
            if old.exists():
                with replacing(f"{old}.bak") as temporary:
                    temporary.write_bytes(old.read_bytes())
        x, _ = self.batch(torch.arange(min(64, len(self.images))))
        save_grid((x + 1) / 2, self.out / "samples" / "data.png", columns=8)
        plot_noising(x[0].cpu(), config, self.out / "samples" / "noising.png")
        self.save_state()  # before the first step, so that a full disk is noticed at once

    def end_epoch(self, bar):
        """Report; every few epochs, and after the last, draw samples and export the model."""
        config, epoch = self.config, self.step // self.steps_per_epoch
        self.fetch_losses()
        self.epoch_losses.append(sum(self.losses) / len(self.losses))
        self.losses = []
        if self.rank > 0:
            return
        first_step, seconds_before = self.resumed_at  # an earlier start may have been on another machine
        speed = (self.step - first_step) * self.batch_size / (self.seconds - seconds_before)
        minutes_left = (self.total_steps - self.step) * self.batch_size / speed / 60
        bar.write(f"epoch {epoch:3d}/{config.epochs}  loss {self.epoch_losses[-1]:.4f}  {speed:.0f} images/s  "
                  f"{minutes_left:.0f} minutes left", file=sys.stdout)
        sys.stdout.flush()
        if epoch % config.sample_every == 0 or epoch == config.epochs:
            classes = self.model.model.num_classes
            labels = None if classes is None else [i % classes for i in range(4)]
            self.export()
            # Drawn from the file, so that the grid shows what inference_example.py draws with --guidance 1.
            model = SimpleDiffusion.load(self.checkpoint, self.device)
            images = model.sample(4, y=labels, seed=config.seed, progress=False)
            save_grid(images, self.out / "samples" / f"epoch_{epoch:04d}.png", columns=2)
            plot_losses(self.epoch_losses, self.out / "samples" / "loss.png")

    def export(self):
        """Write diffusion_model.pth, and what it is into model_info.json."""
        config = self.config
        info = dict(
            architecture=f"SimpleUNet, {config.hidden_channels} channels x {config.channel_mults}, "
                         f"{config.num_res_blocks} blocks a level, attention at levels {config.attention_levels}",
            parameters=count_parameters(self.model),
            dataset="CIFAR-10" if is_cifar10(config.data) else config.data,
            images_seen=self.step * self.batch_size, epochs=len(self.epoch_losses), batch_size=self.batch_size,
            optimizer="AdamW, betas 0.9 0.99, weight decay 0.01, gradient norm 1, cosine decay",
            learning_rate=config.lr, prediction=config.prediction, schedule=config.schedule,
            n_steps=config.n_steps, final_loss=round(self.epoch_losses[-1], 5),
            training_minutes=round(self.seconds / 60, 1),
            device=str(self.device), torch=str(torch.__version__), date=time.strftime("%Y-%m-%d"),
            license="MIT" if is_cifar10(config.data) or config.data == "shapes" else "not stated")
        self.ema.save(self.checkpoint, **info)
        # Only model_info.json has the checksum: a file cannot hold its own.
        info["sha256"] = hashlib.sha256(self.checkpoint.read_bytes()).hexdigest()
        with replacing(self.out / "model_info.json") as temporary:
            temporary.write_text(json.dumps(info, indent=2) + "\n")

    def signal_of_any_process(self, received):
        """The signal that any of the processes has received, or 0: they all have to stop after the same step."""
        number = torch.tensor(received[0] if received else 0, device="cpu")
        if self.world > 1:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return number.item()


def train(config):
    """Train as `config` says, or go on with such a run: -> the SimpleDiffusion of averaged weights.

    It is in eval mode and has no gradients: to train it on, .train().requires_grad_(True).
    Raises ValueError or OSError where an option, the data or a file is wrong, FloatingPointError where the loss is not
    finite, and SystemExit (130 or 143) after Ctrl-C or SIGTERM, with the state saved.
    """
    from tqdm import tqdm
    torch.set_flush_denormal(True)  # numbers below 1e-38 become 0: a CPU is many times slower with them
    torch.backends.cudnn.benchmark = True  # all batches have one shape: worth trying which convolution is fastest
    run = TrainingRun(config)
    if run.step >= run.total_steps:
        run.say(f"finished already, after {len(run.epoch_losses)} epochs: more --epochs go on, --restart begins again")
        return run.ema
    run.begin()
    bar = tqdm(total=run.total_steps * run.batch_size, initial=run.step * run.batch_size, unit=" images",
               unit_scale=True, dynamic_ncols=True, disable=run.rank > 0 or not sys.stderr.isatty())
    last = saved = fetched = time.monotonic()
    with bar, stop_signals() as received:
        while run.step < run.total_steps:
            run.train_step()
            now = time.monotonic()
            run.seconds += now - last
            last = now
            bar.update(run.batch_size)
            if now - fetched > 1:                                           # once a second, for the bar
                run.fetch_losses()
                recent = run.losses[-100:]
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}")
                fetched = now
            stop, epoch_done = run.signal_of_any_process(received), run.step % run.steps_per_epoch == 0
            if epoch_done:
                run.end_epoch(bar)
            if epoch_done or stop or now - saved > 300:                     # a crash costs five minutes at most
                run.save_state()
                saved = now
            if stop:
                run.say(f"stopped after step {run.step} of {run.total_steps}: give the same command to go on")
                sys.exit(128 + stop)                                        # 130 or 143, as shells have it
    if run.world > 1:
        torch.distributed.destroy_process_group()
    run.say(f"wrote {run.checkpoint}; draw from it: python inference_example.py --checkpoint {run.checkpoint}")
    return run.ema


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
        flag, default, meaning = flag_of(entry.name), entry.default, entry.metadata["meaning"]
        if default is False:
            parser.add_argument(flag, action="store_true", help=meaning)
            continue
        several = isinstance(default, tuple)
        if default is not None:
            meaning += f" ({' '.join(map(str, default)) if several else default})"
        parser.add_argument(flag, help=meaning, default=default, metavar="", type=int if several else entry.type,
                            nargs="*" if several else None)
    train(TrainConfig(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
