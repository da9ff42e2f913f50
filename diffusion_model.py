"""A diffusion model for CIFAR-10, complete in one file: network, process, sampling and training.

    python diffusion_model.py --out my_run       downloads CIFAR-10 and trains on it
    python diffusion_model.py --data shapes --out my_shapes
                                                 needs no download, learns within minutes
    python diffusion_model.py --data FOLDER --init diffusion_model.pth --out my_model
                                                 learns your own pictures from the released weights
    python inference_example.py                  draws pictures from diffusion_model.pth

The same command again goes on with a run that was stopped, and --help lists all options. In Python:

    from diffusion_model import SimpleDiffusion
    model = SimpleDiffusion.load("diffusion_model.pth")
    images = model.sample(2, y=["cat", "ship"], guidance=2.5, seed=0)  # (2, 3, 32, 32) in [0, 1]

The file has five sections: 1 the network, 2 the diffusion process, 3 the model and its file, 4 the
data, 5 training. If diffusion is new to you, begin with section 2. Sections 1 to 3 need nothing but
torch and can be copied into a project of your own as they are. Sections 1 and 2 have images in
[-1, 1], and SimpleDiffusion.sample hands them out in [0, 1].

Equations and algorithms without a name are those of Ho et al. 2020 (DDPM, arXiv 2006.11239).
"""

import argparse
import contextlib
import copy
import datetime
import gc
import hashlib
import inspect
import io
import json
import math
import operator
import os
import re
import shlex
import shutil
import signal
import sys
import time
import uuid
import warnings
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# 1. The network: a U-Net that sees a noisy image and a timestep, and says what is noise in it
#
# A U-Net makes the image smaller, level by level, works on it where it is small, and enlarges it
# again. On the way up, each level also gets what it had on the way down (the skips), so that no
# detail is lost. Beside the image it is told the timestep t, which says how noisy the image is, and
# a class. Section 2 explains what for.


def time_embedding(t, width):
    """Sinusoids of the timestep (Vaswani et al. 2017): t (B,) -> (B, width) float32."""
    half = (width + 1) // 2  # rounded up, because width may be odd
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponents)  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)[:, :width]


def group_norm(channels):
    """GroupNorm with up to 32 groups of 16 channels or more (smaller groups are slow on a CPU)."""
    return nn.GroupNorm(math.gcd(channels, max(1, min(32, channels // 16))), channels)


def zero_init(layer):
    """Set a layer to zero, so that the branch which ends in it adds nothing at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Lets each pixel look at all others: multi-head self-attention, x (B, C, H, W) -> like x."""

    def __init__(self, channels, num_heads):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide {channels} channels")
        self.num_heads = num_heads
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        qkv = self.qkv(tokens).view(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.contiguous()  # (B, heads, HW, C / heads) each; Apple's MPS needs contiguous
        if x.device.type == "cpu" and torch.is_grad_enabled():
            # Training on a CPU is a tenth faster without the fused function.
            h = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        h = self.out(h.transpose(1, 2).reshape(B, H * W, C))  # the heads side by side again
        return x + h.transpose(1, 2).view(B, C, H, W)


class ResidualBlock(nn.Module):
    """Two convolutions, with a scale and a shift by time and class between them, added to x.

    forward(x, emb): x (B, channels, H, W), emb (B, time_dim) -> like x. Attention follows if
    num_heads is not 0.
    """

    def __init__(self, channels, time_dim, dropout, num_heads):
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale_shift = nn.Linear(time_dim, 2 * channels)
        self.norm2 = group_norm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))
        self.attention = Attention(channels, num_heads) if num_heads else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)  # shift + norm2(h) * (1 + scale)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(x + h)


class SimpleUNet(nn.Module):
    """The network. forward(x, t, y=None) maps noisy images to a prediction of the same shape.

    x is (B, in_channels, H, W), the timesteps t and the labels y are (B,) int64. Label num_classes
    is the null label, which stands for "no class"; y=None means null for every image. H and W must
    be multiples of 2**(levels - 1). Raises a ValueError if they are not, or if a network without
    classes is given labels.
    """

    def __init__(
        self,
        in_channels=3,
        hidden_channels=64,
        channel_mults=(1, 2, 2),  # level i has hidden_channels * channel_mults[i], at H / 2**i
        num_res_blocks=2,  # per level, on the way down and again up: an int, or one int per level
        attention_levels=None,  # the levels that have attention; None means the last one
        num_heads=None,  # heads of the attention; None means 4, or fewer where 4 does not divide
        time_dim=256,  # width of the embedding of time and class
        dropout=0.0,  # share of the values in a residual block that training drops
        num_classes=None,  # None means that the network knows no classes
    ):
        super().__init__()
        levels = len(channel_mults)
        depths = [num_res_blocks] if isinstance(num_res_blocks, int) else list(num_res_blocks)
        depths = depths * levels if len(depths) == 1 else depths
        attention_levels = [levels - 1] if attention_levels is None else list(attention_levels)
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
        if (
            len(depths) != levels
            or min(levels, hidden_channels, num_heads or 1, *channel_mults, *depths) < 1
            or not set(attention_levels) <= set(range(levels))
        ):
            raise ValueError(
                "every size must be at least 1, num_res_blocks must be one number or one a level, "
                f"and attention_levels must be in 0..{levels - 1}, got {self.config}"
            )
        self.num_classes = num_classes
        widths = [hidden_channels * mult for mult in channel_mults]
        heads = [0] * levels  # 0 stands for a level without attention
        for level in attention_levels:
            heads[level] = num_heads or math.gcd(widths[level], 4)

        def blocks(width, heads_of_each):
            return nn.ModuleList(ResidualBlock(width, time_dim, dropout, n) for n in heads_of_each)

        self.time_mlp = nn.Sequential(
            nn.Linear(time_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )
        if num_classes is not None:  # one row more than there are classes, for the null label
            self.class_embedding = nn.Embedding(num_classes + 1, time_dim)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()  # up begins with the last level
        self.middle = blocks(widths[-1], [heads[-1], 0])
        for level, (width, depth) in enumerate(zip(widths, depths)):
            if level == 0:  # The first level reads the image and writes the prediction.
                entry = nn.Conv2d(in_channels, width, 3, padding=1)
                to_image = zero_init(nn.Conv2d(width, in_channels, 3, padding=1))
                leave = nn.Sequential(group_norm(width), nn.SiLU(), to_image)
            else:  # The others halve the size on entry and double it on leaving.
                above = widths[level - 1]
                entry = nn.Conv2d(above, width, 3, stride=2, padding=1)
                leave = nn.Sequential(nn.Conv2d(width, above, 1), nn.Upsample(scale_factor=2))
            down = dict(entry=entry, blocks=blocks(width, [heads[level]] * depth))
            # On the way up a 1x1 convolution merges each skip into what comes from below.
            merges = nn.ModuleList(nn.Conv2d(2 * width, width, 1) for _ in range(depth))
            up = dict(merges=merges, blocks=blocks(width, [heads[level]] * depth), exit=leave)
            self.down.append(nn.ModuleDict(down))
            self.up.insert(0, nn.ModuleDict(up))

    def forward(self, x, t, y=None):
        multiple = 2 ** (len(self.down) - 1)
        if x.shape[2] % multiple or x.shape[3] % multiple:
            size = tuple(x.shape[2:])
            raise ValueError(f"height and width must be multiples of {multiple}, got {size}")
        if y is not None and self.num_classes is None:
            raise ValueError("labels y were given to a network without classes")
        emb = time_embedding(t, self.config["time_dim"])
        emb = self.time_mlp(emb.to(self.time_mlp[0].weight.dtype))  # (B, time_dim)
        if self.num_classes is not None:
            y = torch.full_like(t, self.num_classes) if y is None else y
            emb = emb + self.class_embedding(y)
        emb = F.silu(emb)
        # The shapes are those of the defaults at 32x32, one for each of the three levels.
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
# 2. The diffusion process: how images become noise, and how noise becomes images
#
# Training mixes an image x_0 with noise, x_t = alpha * x_0 + sigma * noise. The timestep t decides
# how much of each there is. From t = 0 to the last t, alpha falls from 1 to nearly 0 and sigma
# rises from nearly 0 to 1, always with alpha^2 + sigma^2 = 1. The network sees the mixture and t,
# and learns to say which noise was mixed in.
#
# Sampling begins with pure noise. In each step the network says which noise it sees in x_t, and
# what is left without it is an estimate of x_0. This estimate is mixed with the noise again, but
# with a little less of it, and that is the next x_t. The first estimate alone would not do.
# Training makes the squared error small, and the guess of smallest squared error is the mean of all
# images that may be behind x_t. Behind pure noise may be any image, and the mean of all images is a
# blur. But a small step towards it rules some of them out. The next estimate is the mean of fewer
# images, and sharper.
#
# Instead of the noise the network may predict v = alpha * noise - sigma * x_0 (Salimans and Ho
# 2022), which is the default of SimpleDiffusion. To get x_0 from the noise one divides by alpha,
# and at the last t, where alpha is 1/160, that magnifies every error 160 times. To get x_0 from v
# one never divides. v is nearly the noise where x_t is clean, and nearly -x_0 where it is noisy, so
# the network is always asked for what cannot be read off x_t.
#
# A network that knows classes is trained without the label now and then. So it can be asked twice
# in sampling, with the label and without. The difference is what the label changes, and guidance
# exaggerates it.
#
# To learn how it works, read `forward` (Algorithm 1), then `algorithm_2`, then `predict_x_start`
# and `step`. The rest can wait. If you know the papers, these are their names for ours:
#
#   here              Ho et al. 2020 (DDPM)   Song et al. 2021 (DDIM)   Lu et al. 2022 (DPM++)
#   alphas_cumprod    alpha_bar_t             alpha_t                   alpha_t^2
#   alpha             sqrt(alpha_bar_t)       sqrt(alpha_t)             alpha_t
#   sigma             sqrt(1 - alpha_bar_t)   sqrt(1 - alpha_t)         sigma_t
#   betas             beta_t                  1 - alpha_t/alpha_{t-1}
#   spread            sigma_t                 sigma_t
#   eta                                       eta
#   lambdas                                                             lambda_t
#
# lambda is log(alpha / sigma), large where x_t is clean. In the code x_start is a true image, which
# training knows, and x_0 an estimate of it. Timesteps count from 0, where the papers count from 1,
# and t = -1 stands for the clean image (alpha 1, sigma 0).


# For tensors that must not depend on torch's default type and device. On the CPU, because MPS has
# no float64, and because random numbers differ between devices.
EXACT = dict(dtype=torch.float64, device="cpu")
PLAIN = dict(dtype=torch.float32, device="cpu")


def make_betas(schedule, n_steps, beta_start=1e-4, beta_end=0.02):
    """beta in x_t = sqrt(1 - beta) * x_{t-1} + sqrt(beta) * noise (eq. 2): (n_steps,) float64."""
    if schedule == "linear":  # Ho et al.'s for 1000 steps, scaled to end in noise after any number
        betas = torch.linspace(beta_start, beta_end, n_steps, **EXACT) * (1000 / n_steps)
    elif schedule == "cosine":  # Nichol and Dhariwal 2021, eq. 17
        u = torch.linspace(0, 1, n_steps + 1, **EXACT)  # the paper's t / T, and its s is 0.008
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2  # f / f[0] is the product of 1 - beta
        betas = 1 - f[1:] / f[:-1]
    else:
        raise ValueError(f"schedule must be linear or cosine, got {schedule!r}")
    return betas.clamp(max=0.999)  # a beta of 1 would leave nothing of the image


class DiffusionModel(nn.Module):
    """The forward process, the training loss and the samplers, around any network.

    model: maps x_t (B, C, H, W) and t (B,) int64 in 0..n_steps-1 to a prediction like x_t. It is
        given labels y (B,) int64 as a third argument only where there are any. Guidance needs its
        attribute num_classes, which is the null label.
    schedule: "cosine", or "linear" from beta_start to beta_end (both times 1000 / n_steps).
    prediction: "noise" as in Ho et al., or "v" (Salimans and Ho 2022).
    t_distribution: the timesteps of training are "uniform" as in Algorithm 1, or "lognormal", which
        prefers the noise levels where there is most to learn (Karras et al. 2022).
    The defaults are those of Ho et al., and SimpleDiffusion has others. Raises a ValueError if an
    option is out of range.
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
        self.config = dict(
            n_steps=n_steps,
            beta_start=beta_start,
            beta_end=beta_end,
            schedule=schedule,
            prediction=prediction,
            t_distribution=t_distribution,
        )
        known = prediction in ("noise", "v") and t_distribution in ("uniform", "lognormal")
        if not (known and 1 <= n_steps <= 100_000 and 0 < beta_start <= beta_end < 1):
            raise ValueError(
                "n_steps must be in 1..100000, 0 < beta_start <= beta_end < 1, prediction noise or "
                f"v, and t_distribution uniform or lognormal, got {self.config}"
            )
        self.model = model
        self.n_steps = n_steps
        # In float64, because a thousand factors near 1 are multiplied. MPS has none, so on the CPU.
        betas = make_betas(schedule, n_steps, beta_start, beta_end)
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if not 1e-30 < alphas_cumprod[-1] < 0.01:
            end = f"alphas_cumprod ends at {alphas_cumprod[-1]:.2g}, not within 1e-30..0.01"
            warnings.warn(f"x_T should be noise with a trace of the image: {end}", stacklevel=2)
        tables = dict(
            betas=betas,
            alphas_cumprod=alphas_cumprod,
            sqrt_alphas_cumprod=alphas_cumprod.sqrt(),  # alpha
            sqrt_one_minus_alphas_cumprod=(1 - alphas_cumprod).sqrt(),  # sigma
            # The beta tilde of eq. 7, for whoever wants it. `step` computes it for any t and s.
            posterior_variance=betas * (1 - alphas_cumprod / (1 - betas)) / (1 - alphas_cumprod),
        )
        for name, table in tables.items():  # not saved with the weights, as they follow from config
            self.register_buffer(name, table.float(), persistent=False)
        # A list, so that a sampler which plans its steps does not wait for the device.
        self.lambdas = ((alphas_cumprod / (1 - alphas_cumprod)).log() / 2).tolist()
        self.unseen = True  # no images so far, see `forward`

    def alpha_sigma(self, t):
        """alpha and sigma of x_t, for t an int or (B,) int64: two tensors (B, 1, 1, 1)."""
        # Entry 0 belongs to the clean image, so every t is shifted by one and t = -1 means clean.
        alphas = F.pad(self.sqrt_alphas_cumprod, (1, 0), value=1.0)
        sigmas = F.pad(self.sqrt_one_minus_alphas_cumprod, (1, 0), value=0.0)
        return alphas[t + 1].view(-1, 1, 1, 1), sigmas[t + 1].view(-1, 1, 1, 1)

    def predict(self, x_t, t, y=None):
        """What the network says of x_t (B, C, H, W), whatever its precision: -> like x_t."""
        x = x_t.to(next(self.parameters(), x_t).dtype)
        prediction = self.model(x, t) if y is None else self.model(x, t, y)
        if prediction.shape != x_t.shape:
            got, wanted = tuple(prediction.shape), tuple(x_t.shape)
            raise ValueError(f"the network was given {wanted} and must return the same, not {got}")
        return prediction.to(x_t.dtype)

    # ---- Training: Algorithm 1

    def q_sample(self, x_start, t, noise=None):
        """x_t ~ q(x_t | x_0) (eq. 4): x_start (B, C, H, W), t an int or (B,) -> like x_start."""
        if x_start.dim() != 4:
            raise ValueError(f"images must be (B, C, H, W), got {tuple(x_start.shape)}")
        noise = torch.randn_like(x_start) if noise is None else noise
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x_start + sigma * noise

    def forward(self, x_start, y=None, t=None, noise=None):
        """The training loss (eq. 14), a scalar.

        An error in v is the error in the noise divided by alpha. So with v each term weighs
        1 / alpha^2 times as much as with noise.

        x_start (B, C, H, W) in [-1, 1], labels y (B,) int64 or None. The timesteps t (B,) int64 and
        the noise, like x_start, are drawn if they are not given. Raises a ValueError if x_start
        has another number of dimensions or the network returns another shape.
        """
        self.look_once(x_start)
        t = self.draw_timesteps(len(x_start)) if t is None else t  # Algorithm 1, line 3
        noise = torch.randn_like(x_start) if noise is None else noise  # line 4
        x_t = self.q_sample(x_start, t, noise)  # line 5, what the network sees
        alpha, sigma = self.alpha_sigma(t)
        target = alpha * noise - sigma * x_start if self.config["prediction"] == "v" else noise
        return F.mse_loss(self.predict(x_t, t, y), target)  # line 5; backward() follows

    def look_once(self, x_start):
        """Warn if the first images are far outside [-1, 1]. Only those, as it makes a GPU wait."""
        if self.unseen and not torch.compiler.is_compiling():
            self.unseen = False
            if (largest := x_start.abs().max().item()) > 1.5:
                warnings.warn(f"images must be in [-1, 1], these reach {largest:.4g}", stacklevel=3)

    def draw_timesteps(self, count):
        """The timesteps of a batch: (count,) int64."""
        # Uniform numbers in 0..1, but one in each of `count` equal ranges, so that every batch has
        # both small and large ones and the loss varies less from batch to batch.
        device = self.betas.device
        ranges = torch.randperm(count, device=device)
        u = (ranges + torch.rand(count, device=device, dtype=torch.float32)) / count
        if self.config["t_distribution"] == "lognormal":
            return self.lognormal_timesteps(u)
        return (u * self.n_steps).long().clamp(max=self.n_steps - 1)  # rounding can reach n_steps

    def lognormal_timesteps(self, u):
        """Uniform u (B,) -> timesteps (B,) int64 whose ln(sigma / alpha) is normally distributed.

        Half of all uniform t of the linear schedule have more than 3.4 times as much noise as
        image, and little can be seen there. Karras et al. 2022 (table 1) train on a normal
        distribution instead, of deviation 1.2. Of the means that were tried, -0.8 was the best.
        """
        normal = math.sqrt(2) * torch.erfinv(2 * u - 1)  # its quantile function
        ratios = (self.sqrt_one_minus_alphas_cumprod / self.sqrt_alphas_cumprod).float().log()
        middles = (ratios[1:] + ratios[:-1]) / 2
        return torch.searchsorted(middles, 1.2 * normal - 0.8)  # the t of the nearest ratio

    # ---- Sampling: Algorithm 2, then the faster samplers that grew out of it

    @torch.no_grad()
    def algorithm_2(self, x_T, y=None):
        """Algorithm 2: noise x_T (N, C, H, W) -> images x_0 in [-1, 1]. Call eval() first.

        Line 4 goes by way of x_0. `step` with eta=1 draws from the posterior (eq. 7), whose mean is
        that of line 4 (eq. 11) if x_0 is put in, and only the clipping of x_0 is added. `sample`
        takes the same steps with sampler="ddpm". This is here to be read, and to be copied: change
        the timesteps, eta, or x_0 itself, and you have a sampler of your own.
        """
        x_t = x_T  # line 1
        for t in reversed(range(self.n_steps)):  # line 2
            z = torch.randn_like(x_t) if t > 0 else 0.0  # line 3
            x_0 = self.predict_x_start(x_t, t, y)  # line 4, in two halves
            x_t = self.step(x_t, x_0, t, t - 1, eta=1.0, new_noise=z)
        return x_t  # line 6

    def predict_x_start(self, x_t, t, y=None, guidance=1.0):
        """Estimate the clean image: x_t (B, C, H, W), t an int or (B,) -> x_0 in [-1, 1]."""
        t = torch.full(x_t.shape[:1], t, device=x_t.device) if isinstance(t, int) else t
        if guidance == 1:
            prediction = self.predict(x_t, t, y)
        else:  # Ho and Salimans 2022, eq. 6, where w is guidance - 1
            labels = torch.cat([y, torch.full_like(y, self.model.num_classes)])
            both = self.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), labels)
            conditional, null = both.chunk(2)
            prediction = null + guidance * (conditional - null)
        alpha, sigma = self.alpha_sigma(t)
        if self.config["prediction"] == "v":
            x_0 = alpha * x_t - sigma * prediction  # put x_t and v in: the noise cancels
        else:
            x_0 = (x_t - sigma * prediction) / alpha  # eq. 4, solved for x_0
        # Ho et al.'s code clips too. What lies outside would grow from step to step.
        return x_0.clamp(-1, 1)

    def step(self, x_t, x_0, t, s, eta=0.0, new_noise=0.0):
        """Go from t to s < t with the estimate x_0: -> x_s = alpha_s * x_0 + sigma_s * noise.

        t and s are ints or (B,) int64, and s = -1 lands on x_0. eta says how much of the noise is
        new. 0 keeps the old noise, which is DDIM (Song et al. 2021, eq. 7). 1 replaces as much of
        it as Algorithm 2 does, which is the variance of q(x_s | x_t, x_0), the posterior (eq. 7).
        """
        alpha_t, sigma_t = self.alpha_sigma(t)
        alpha_s, sigma_s = self.alpha_sigma(s)
        # Recompute the noise. After x_0 was clipped, the network's own no longer adds up to x_t.
        noise = (x_t - alpha_t * x_0) / sigma_t
        # 1 - (alpha_t / alpha_s)^2 is the beta of the whole way from s to t. This form of it is
        # accurate where it is small.
        beta = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
        spread = eta * sigma_s / sigma_t * beta.sqrt()
        # spread^2 + kept^2 = sigma_s^2, so that x_s has just the noise that belongs to s.
        kept = (sigma_s**2 - spread**2).clamp(min=0).sqrt()  # rounding can make it negative
        return alpha_s * x_0 + kept * noise + spread * new_noise

    @torch.no_grad()
    def p_sample(self, x_t, t, y=None):
        """One step of Algorithm 2: x_t (B, C, H, W), t an int or (B,) int64 -> x_{t-1}."""
        x_0 = self.predict_x_start(x_t, t, y)
        return self.step(x_t, x_0, t, t - 1, eta=1.0, new_noise=torch.randn_like(x_t))

    def timesteps(self, sampler="dpm++", steps=None):
        """The timesteps that a sampler visits, strictly decreasing. After the last comes x_0.

        steps is how many. With dpm++ there may be fewer, as timesteps that coincide count once.
        """
        if sampler not in DEFAULT_STEPS:
            raise ValueError(f"sampler must be {', '.join(DEFAULT_STEPS)}, got {sampler!r}")
        if steps is None:
            steps = min(DEFAULT_STEPS[sampler] or self.n_steps, self.n_steps)
        if not 1 <= steps <= self.n_steps:
            raise ValueError(f"steps must be in 1..{self.n_steps} (n_steps), got {steps}")
        if sampler != "dpm++":
            return torch.linspace(self.n_steps - 1, 0, steps, **EXACT).round().int().tolist()
        # Evenly spaced in lambda. The noisiest timesteps of the cosine schedule show nothing of the
        # image, so there we begin at -5.1, as Lu et al.'s code does.
        lambdas = torch.tensor(self.lambdas, **EXACT)
        cosine = self.config["schedule"] == "cosine"
        first = lambdas[lambdas > -5.1].min() if cosine else lambdas[-1]
        wanted = torch.linspace(first.item(), lambdas[0].item(), steps, **EXACT)
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
        guidance_interval=(0.3, 3.0),
    ):
        """Draw images: shape (N, C, H, W) -> x_0 in [-1, 1].

        sampler: "ddpm" (Algorithm 2), "ddim" (Song et al. 2021) or "dpm++" (DPM-Solver++(2M), Lu et
            al. 2022).
        steps: up to n_steps. None means n_steps, 50 and 13 for the three.
        y: labels (N,). None draws without a class.
        guidance: 1 draws as trained. More makes pictures more typical of their class, for twice the
            time, and only where sigma / alpha is in guidance_interval (Kynkaanniemi et al. 2024).
        seed: image i is drawn from seed + i, whatever the batch. None is random.
        init_image: in [-1, 1], the picture to start from. strength in 0..1 says how much of it is
            redrawn. 0 returns it, 1 starts from pure noise and forgets it.
        mask: 1 where init_image is to be repainted, 0 where it is kept exactly, or between.
        progress: show a bar.
        callback: is called with (i, t, x_t, x_0) in each step, before the update.
        x_T: the starting noise, in place of the seed's.
        init_image, mask and x_T are broadcast to `shape`. Raises a ValueError if one does not fit.
        """
        device = self.betas.device
        timesteps = self.timesteps(sampler, steps)
        num_classes = getattr(self.model, "num_classes", None)
        highest = num_classes or math.inf
        y = fitting("labels y", y, shape[:1], 0, highest, device, torch.int64)
        init_image = fitting("init_image", init_image, shape, -1.001, 1.001, device)
        mask = fitting("mask", mask, shape, 0, 1, device)
        x_T = fitting("x_T", x_T, shape, -100, 100, device)
        if guidance != 1 and (y is None or num_classes is None or not math.isfinite(guidance)):
            raise ValueError(f"guidance {guidance} needs labels y and a network with num_classes")
        if init_image is None and (strength != 1 or mask is not None):
            raise ValueError("strength and mask need an init_image")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength {strength} is not in 0..1")
        draw_noise = noise_of_seeds(shape, seed, device)
        noise = draw_noise()  # drawn even if x_T is given, so that later noise differs from x_T
        x_t = noise if x_T is None else x_T
        if strength == 0:
            return init_image.clone()
        if strength < 1:
            start = min(int(round(strength * self.n_steps, 6)), self.n_steps - 1)
            # It takes the place of the first timestep that is left, so that no step is tiny.
            timesteps = [start, *[t for t in timesteps if t <= start][1:]]
            x_t = self.q_sample(init_image, start, x_t)

        x_0_before = h_before = None
        lambdas = [*self.lambdas, math.inf]  # the last one, at index -1, is the clean image's
        pairs = list(zip(timesteps, [*timesteps[1:], -1]))  # each t with the next one, s
        with torch.no_grad(), eval_mode(self), autocast(device):
            for i, (t, s) in enumerate(progress_bar(pairs, progress)):
                ratio = math.exp(-lambdas[t])  # sigma / alpha
                guided = guidance_interval[0] <= ratio <= guidance_interval[1]
                x_t = x_t.contiguous(memory_format=memory_format(device))
                x_0 = self.predict_x_start(x_t, t, y, guidance if guided else 1.0)
                if mask is not None:
                    x_0 = mask * x_0 + (1 - mask) * init_image
                if callback is not None:
                    callback(i, t, x_t, x_0)
                estimate, h = x_0, lambdas[s] - lambdas[t]
                if sampler == "dpm++" and i > 0 and s >= 0:
                    # The estimate changes from step to step. Guess what it will be in the middle of
                    # this one, from how it changed in the last. h is a step's length in lambda.
                    # Lu et al. write `step` with eta=0 in another form, with exp(-h) - 1.
                    estimate = x_0 + (x_0 - x_0_before) * (h / (2 * h_before))
                eta, z = (1.0, draw_noise()) if sampler == "ddpm" and s >= 0 else (0.0, 0.0)
                x_t = self.step(x_t, estimate, t, s, eta, z)
                x_0_before, h_before = x_0, h
        return x_t


DEFAULT_STEPS = {"ddpm": None, "ddim": 50, "dpm++": 13}  # None means all n_steps


def noise_of_seeds(shape, seed, device):
    """A function that draws noise (N, C, H, W), image i of it from seed + i on every device."""
    seed = torch.Generator().seed() % 2**31 if seed is None else operator.index(seed)
    if not 0 <= seed < 2**62:
        raise ValueError(f"seed must be in 0..2**62, got {seed}")
    generators = [torch.Generator().manual_seed(seed + i) for i in range(shape[0])]
    return lambda: torch.stack(
        [torch.randn(shape[1:], generator=each, **PLAIN) for each in generators]
    ).to(device)


def fitting(name, value, shape, low, high, device, dtype=torch.float32):
    """`value` as a tensor broadcast to `shape`, and None as None. ValueError if it does not fit."""
    if value is None:
        return None
    value = torch.as_tensor(value, device="cpu").double()
    try:
        fitted = value.to(dtype).broadcast_to(shape)
        fits = torch.allclose(fitted.double(), value)  # neither 2.5 as a label nor a nan
    except RuntimeError:
        fits = False
    if not fits or ((value < low) | (value > high)).any():
        got = f"{tuple(value.shape)}, {brief(value)}"
        raise ValueError(f"{name} must be {tuple(shape)} in {low}..{high}, got {got}")
    return fitted.to(device)


@contextlib.contextmanager
def eval_mode(module):
    """Turn dropout off in the block. Afterwards each part is in the mode in which it was."""
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

        return tqdm(steps, disable=not show or sys.stderr is None, desc="sampling", leave=False)
    return steps


# --------------------------------------------------------------------------------------------------
# 3. The model and its file: a network and a process in one, where they run, how they are kept


def pick_device(name=None):
    """MPS, then CUDA, then CPU, whichever works. With a name that device, or a ValueError."""
    mps, cuda = torch.backends.mps.is_available(), torch.cuda.is_available()
    best = "mps" if mps else "cuda" if cuda else "cpu"
    try:  # Torch accepts names of devices that are not there, and sees GPUs that it cannot use.
        torch.ones(1, device=name or best).add(1).tolist()
        return torch.device(name or best)
    except (RuntimeError, AssertionError) as error:
        if name is not None:
            raise ValueError(f"device {name} does not work: {brief(error)}") from error
        say(f"{best} does not work, so the CPU is used: {brief(error)}")
        return torch.device("cpu")


def has_bfloat16(device):
    """Whether this device is known to multiply bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # old torch cannot tell
        found = torch.cpu.get_capabilities()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    return False


def autocast(device):
    """A context in which convolutions and matrix products use bfloat16, if `device` is fast at it.

    Otherwise it does nothing. It never uses float16, which would need loss scaling.
    """
    fast = has_bfloat16(device)
    return torch.autocast(device.type, torch.bfloat16) if fast else contextlib.nullcontext()


def memory_format(device):
    """The order of an image's numbers in memory that makes convolutions fastest."""
    # On MPS channels_last is slow, and some versions of torch computed wrong results with it.
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def brief(error):
    """What is wrong, in one line."""
    return " ".join(str(error).split())[:600] or type(error).__name__


def say(line, bar=None):
    """Print a line, above the bar if there is one. Of several processes only the first does."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ["RANK"] == "0":
        try:
            if bar is not None:
                bar.clear()
            print(line, flush=True)
        except OSError:  # Nobody reads it any more, as after `| head -1`. The run goes on.
            sys.stdout = None


def write(contents, path):
    """Write bytes or what torch.save takes, so that `path` holds the old or the new, never half."""
    path, buffer = Path(path).expanduser(), io.BytesIO()
    if isinstance(contents, bytes):
        buffer.write(contents)
    else:
        torch.save(contents, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, as another process may write to the same path.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave an empty file under the new name
        for _ in range(5):
            with contextlib.suppress(PermissionError):  # while a virus scanner on Windows reads it
                return os.replace(temporary, path)
            time.sleep(0.3)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path, key):
    """The dict with this key that `write` wrote. No code that a file may hold is run.

    Raises an OSError if there is no such file, a ValueError if it is damaged or of another kind.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        contents = torch.load(path, map_location="cpu", weights_only=True)
        if key not in contents:
            raise ValueError(f"it has no {key}")
        return contents
    except Exception as error:  # zipfile, pickle and torch raise many kinds
        if isinstance(error, OSError) and error.filename:  # it cannot be opened
            raise
        raise ValueError(f"{path} is damaged or of another kind: {brief(error)}") from error


class SimpleDiffusion(nn.Module):
    """A SimpleUNet in a DiffusionModel, with image size and class names: what is trained and saved.

    With class_names (or num_classes) it learns classes. Its defaults are those of the released
    weights, and unet_options are SimpleUNet's. Raises a ValueError if an option is out of range.
    """

    def __init__(
        self,
        image_size=32,
        n_steps=1000,
        hidden_channels=64,
        schedule="linear",
        prediction="v",
        class_names=None,
        beta_start=1e-4,
        beta_end=0.02,
        t_distribution="lognormal",
        **unet_options,
    ):
        super().__init__()
        if class_names is not None:
            class_names = [str(name) for name in class_names]
            unet_options["num_classes"] = len(class_names)
        self.image_size = image_size
        self.class_names = class_names
        self.diffusion = DiffusionModel(
            SimpleUNet(hidden_channels=hidden_channels, **unet_options),
            n_steps=n_steps,
            beta_start=beta_start,
            beta_end=beta_end,
            schedule=schedule,
            prediction=prediction,
            t_distribution=t_distribution,
        )

    @property
    def network(self):  # As an attribute it would put the weights into the state dict twice.
        return self.diffusion.model

    model = network  # the name that DiffusionModel has for it

    def forward(self, x, y=None, t=None, noise=None):
        """The training loss of DiffusionModel.forward: x (B, C, S, S) in [-1, 1] -> scalar."""
        return self.diffusion(x, y, t, noise)

    def sample(self, batch_size=4, y=None, **options):
        """Draw images (batch_size, C, S, S) in [0, 1].

        y: labels, or names of classes. options: those of DiffusionModel.sample. There init_image
        and what callback sees are in [-1, 1], so an image of this method goes back in as
        init_image=2 * image - 1. Raises a ValueError if they do not fit.
        """
        if isinstance(y, (str, list, tuple)):
            y = [y] if isinstance(y, str) else y
            y = [self.label(each) if isinstance(each, str) else each for each in y]
        shape = (batch_size, self.network.config["in_channels"], self.image_size, self.image_size)
        return (self.diffusion.sample(shape, y=y, **options) + 1) / 2

    def label(self, name):
        """The label of a class, whose name may be in upper or lower case."""
        names = [each.lower() for each in self.class_names or []]
        if name.lower() not in names:
            known = ", ".join(self.class_names or ["none"])
            raise ValueError(f"there is no class {name!r}, the classes are: {known}")
        return names.index(name.lower())

    def save(self, path="diffusion_model.pth", **info):
        """Write the weights, in float16, and what rebuilds the model. info is for humans."""
        weights = self.network.state_dict().items()
        contents = dict(
            model_config=self.network.config,
            diffusion_config=self.diffusion.config,
            model_state_dict={
                # torch.compile, if you have called it, puts _orig_mod. before each name.
                name.removeprefix("_orig_mod."): tensor.to("cpu", torch.float16)
                for name, tensor in weights
            },
            image_size=self.image_size,
            class_names=self.class_names,
            info=json.loads(json.dumps(info, default=str)),  # plain values, which can be loaded
        )
        write(contents, path)

    @classmethod
    def load(cls, path="diffusion_model.pth", device=None):
        """The model that `save` wrote to `path`, in eval mode.

        path: a file, or a folder with a diffusion_model.pth in it. device: None is the best there
        is. Raises an OSError if there is no such file, a ValueError if it is damaged or of another
        kind.
        """
        path = Path(path).expanduser()
        path = path / "diffusion_model.pth" if path.is_dir() else path
        saved = read(path, "model_config")
        try:
            options = {**saved["model_config"], **saved["diffusion_config"]}
            with torch.device("meta"):  # A file can claim any size, and this takes no memory yet.
                model = cls(saved["image_size"], class_names=saved["class_names"], **options)
            model.network.load_state_dict(saved["model_state_dict"], assign=True)
        except Exception as error:  # it can hold anything
            raise ValueError(f"{path} holds no model of this kind: {brief(error)}") from error
        device = pick_device(device)
        return model.to(device, torch.float32, memory_format=memory_format(device)).eval()


# --------------------------------------------------------------------------------------------------
# 4. The data: CIFAR-10, a folder of pictures, or coloured shapes


def load_images(data, image_size=32, limit=None):
    """Read a data set: -> images uint8 (N, C, S, S), labels int64 (N,), class names.

    data: "cifar10" (in ./data, downloaded if it is missing), a folder with cifar-10-batches-py in
    it, any other folder of pictures, or "shapes". limit: the first images only, of a folder in the
    order of their paths. C is 1 where all pictures of a folder are grey. Where there are no classes
    the labels and their names are None. Prints what it ignored and why there are no classes.
    Raises a ValueError that says what is wrong with the data.
    """
    if data == "shapes":
        return draw_shapes(image_size, limit or 5_000)
    folder = Path("data" if data == "cifar10" else data).expanduser()
    if data != "cifar10" and not (folder / "cifar-10-batches-py").exists():
        return load_folder(folder, image_size, limit)
    from torchvision.datasets import CIFAR10

    try:
        cifar = CIFAR10(folder, train=True, download=data == "cifar10")
    except Exception as error:  # no network, a full disk, a download that broke off
        raise ValueError(
            f"CIFAR-10 could not be loaded: {brief(error)}. Put {CIFAR10.url} into "
            f"{folder.resolve()} yourself, or train on --data shapes or a folder of pictures"
        ) from error
    images = torch.from_numpy(cifar.data[:limit]).permute(0, 3, 1, 2)
    if image_size != 32:
        images = F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
    return images, torch.tensor(cifar.targets[:limit], device="cpu"), cifar.classes


def load_folder(folder, image_size, limit):
    """All pictures in and below a folder, whose immediate subfolders are the classes."""
    import numpy
    from PIL import Image

    if not folder.is_dir():
        raise ValueError(f"--data {folder} is no folder, nor is it cifar10 or shapes")
    endings = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths, ignored = [], Counter()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=say):
        # A link must not lead back to where we came from.
        way = [path.resolve() for path in (Path(parent), *Path(parent).parents)]
        folders[:] = [f for f in folders if Path(parent, f).resolve() not in way]
        folders[:] = [f for f in folders if not f.startswith(".")]
        for path in (Path(parent, name) for name in files if not name.startswith(".")):
            if path.suffix.lower() in endings:
                paths.append(path)
            else:
                ignored[path.suffix.lower() or "without ending"] += 1
    if ignored:
        kinds = ", ".join(f"{count} {ending}" for ending, count in ignored.most_common())
        say(f"ignored   {kinds}: convert what is a picture to PNG or JPEG")
    images, kept = [], []
    for path in sorted(paths)[:limit]:
        try:
            pixels = torch.from_numpy(numpy.array(open_picture(path, image_size)))
            images.append(pixels.permute(2, 0, 1))
            kept.append(path.relative_to(folder))
        except ValueError as error:
            say(f"skipped   {error}")
    if not images:
        raise ValueError(f"--data {folder} holds no picture that can be read")
    images = torch.stack(images)
    if (images == images[:, :1]).all():  # all are grey, and one channel says it all
        images = images[:, :1]
    outside = [path for path in kept if len(path.parts) == 1]
    if outside:
        if len(outside) < len(kept):
            say(f"no classes, as {len(outside)} pictures lie beside the subfolders: {outside[0]}")
        return images, None, None
    classes = Counter(path.parts[0] for path in kept)
    class_names = sorted(classes)
    say("classes   " + ", ".join(f"{classes[name]:,} {name}" for name in class_names))
    if len(classes) == 1:
        inner = folder / class_names[0]
        say(f"only one class. If there should be more, in {inner}, give --data {inner}")
    labels = [class_names.index(path.parts[0]) for path in kept]
    return images, torch.tensor(labels, device="cpu"), class_names


def open_picture(path, size):
    """Any picture file -> a PIL image of size x size, upright, RGB, white where transparent."""
    import numpy
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            file.draft("RGB", (2 * size, 2 * size))  # reads large JPEGs several times as fast
            picture = ImageOps.exif_transpose(file)
        if picture.mode.startswith(("I", "F")):  # PIL would make everything above 255 white
            values = numpy.asarray(picture, dtype="float32")
            if picture.mode.startswith("I;16") or values.max() > 255:
                values = values / 257  # 65535 becomes 255
            elif picture.mode == "F" and values.max() <= 1:
                values = values * 255
            picture = Image.fromarray(values.clip(0, 255).round().astype("uint8"))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return ImageOps.fit(picture.convert("RGB"), (size, size))
    except Exception as error:  # PIL raises many kinds
        raise ValueError(f"{path} is no readable picture: {brief(error)}") from error


SHAPES = ["circle", "diamond", "ring", "square", "triangle"]


def draw_shapes(image_size, count, seed=0):
    """Coloured shapes that follow from seed: -> images (count, 3, S, S), labels, class names."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.rand(10, count, 1, 1, generator=generator, **PLAIN)
    labels = (random[0].flatten() * len(SHAPES)).long()
    size = 0.55 + 0.25 * random[1]
    axis = torch.linspace(-1, 1, image_size, **PLAIN)
    x = (axis - random[2] + 0.5) / size  # (count, 1, S), from -1 to 1 inside of a shape
    y = (axis[:, None] - random[3] + 0.5) / size
    radius, a, b = torch.hypot(x, y), x.abs(), y.abs()
    depths = [  # how deep a point lies inside each of the shapes
        0.9 - radius,
        1 - a - b,
        0.25 - (radius - 0.7).abs(),
        0.8 - torch.maximum(a, b),
        torch.minimum(0.8 - y, (y + 1) / 2 - a),
    ]
    depth = torch.stack(depths)[labels, range(count)]  # (count, S, S)
    cover = (depth * size * image_size / 2 + 0.5).clamp(0, 1)  # the share of each pixel
    bright, dark = 90 + 165 * random[4:7], 90 * random[7:]  # (3, count, 1, 1) each
    images = (cover * bright + (1 - cover) * dark).round().to(torch.uint8)
    return images.transpose(0, 1).contiguous(), labels, SHAPES


def save_grid(images, path, columns):
    """Write images (N, C, S, S) in [0, 1] as one picture, each enlarged to about 128 pixels."""
    from torchvision.utils import save_image

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    images = F.interpolate(images.cpu().float(), scale_factor=max(1, 128 // images.shape[-1]))
    save_image(images, path, nrow=columns)


# --------------------------------------------------------------------------------------------------
# 5. Training: the options, the optimisers, and a run from its first step to its last
#
# The run itself is `train`. Above it stands what a training step needs, which are the optimisers,
# the learning rate, the moving average and a batch. Below it stands what is around the run, such as
# several processes, signals, files and errors. If you want to learn how to train, skip the latter.


@dataclass
class TrainConfig:
    """Every option of a run. The flags have the same names, and these comments are their help."""

    data: str = "cifar10"  # cifar10, shapes, or a folder of pictures (or of CIFAR-10)
    out: str = "."  # the folder to write to: the weights, the training state and samples/
    init: str = None  # a checkpoint to begin from, with its network and its weights
    image_size: int = 32  # height and width, to which pictures are scaled and cropped
    limit: int = None  # how many images of the data to use, all by default
    epochs: int = 100  # passes over the data
    images: int = None  # instead of epochs, how many images to train on, counting repeats
    batch_size: int = 64  # images in a training step, over all processes
    lr: float = 3e-3  # the highest learning rate (Muon's, and AdamW's is 0.4 of it)
    hidden_channels: int = 64  # channels of the first level
    channel_mults: tuple = (1, 2, 2)  # channels of each level, as multiples of the first's
    num_res_blocks: tuple = (2,)  # residual blocks in a level, one number or one for each level
    attention_levels: tuple = None  # levels with attention, 0 is the full size; by default the last
    num_heads: int = None  # heads of the attention, by default 4, or fewer where 4 does not divide
    dropout: float = 0.0  # share of a residual block's values that is dropped
    n_steps: int = 1000  # timesteps of the diffusion process
    schedule: str = "linear"  # noise schedule, linear or cosine
    prediction: str = "v"  # what the network predicts, v or noise
    t_distribution: str = "lognormal"  # which timesteps to train on, lognormal or uniform
    unconditional: bool = False  # ignore the classes of the data
    no_flip: bool = False  # never mirror the images, for letters, digits and the like
    sample_every: int = 5  # epochs between samples; with --images it is a twentieth of the run
    seed: int = 0  # of the weights, of the order of the data and of all noise
    device: str = None  # such as mps, cuda or cpu, by default the first of these that works
    compile: bool = False  # compile the network with torch.compile
    tensorboard: bool = False  # write the loss to OUT/tensorboard
    restart: bool = False  # begin again, even if a stopped run could go on

    def __post_init__(self):
        """Turn each value into an int, a float and so on. ValueError if one is out of range."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is None:
                continue
            if entry.type is tuple:  # a single number will do
                value = value if hasattr(value, "__iter__") else [value]
                value = tuple(map(operator.index, value))
            value = operator.index(value) if entry.type is int else entry.type(value)
            if entry.name in POSITIVE and not value > 0:
                raise ValueError(f"{entry.name} must be above 0, got {value}")
            setattr(self, entry.name, value)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0..{2**32 - 1}, got {self.seed}")


POSITIVE = ["image_size", "limit", "epochs", "images", "batch_size", "lr", "sample_every"]
ARCHITECTURE = ["hidden_channels", "channel_mults", "num_res_blocks", "attention_levels"]
ARCHITECTURE += ["num_heads", "n_steps", "schedule", "prediction"]
# What may differ when a run goes on. With another value of the rest it would be another run.
MAY_CHANGE = ["data", "out", "epochs", "images", "lr", "sample_every"]
MAY_CHANGE += ["device", "compile", "tensorboard", "restart"]


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal (Jordan et al. 2024), for kernels and matrices.

    In an orthogonal update no direction outweighs the others, and the network learns in fewer
    steps. A kernel (out, in, k, k) counts as a matrix (out, in * k * k). The factor 0.2 *
    sqrt(max(shape)) makes an update about as large as one of AdamW's.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            grads = [p.grad for p in params]
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's momentum
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            alike = {}  # matrices of the same shape are made orthogonal together
            for p, update in zip(params, updates):
                alike.setdefault((len(p), p[0].numel()), []).append((p, update.flatten(1)))
            for shape, pairs in alike.items():
                orthogonals = orthogonal(torch.stack([matrix for _, matrix in pairs]))
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                for (p, _), matrix in zip(pairs, orthogonals):
                    p.add_(matrix.view(p.shape), alpha=-rate)


def orthogonal(matrices):
    """Roughly the nearest orthogonal matrices (Newton-Schulz): (N, rows, columns) -> like it."""
    X = matrices.bfloat16()
    if X.shape[1] > X.shape[2]:
        return orthogonal(X.mT).mT.contiguous()
    size = torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True)
    X = X / size.clamp(min=1e-7)  # so that no singular value is above 1
    for _ in range(5):  # Each pass moves them towards 1. Jordan chose the three numbers for speed.
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X


def make_optimizers(network, lr):
    """Muon for what maps features to features, AdamW for the rest: -> a list of both.

    The rest are the biases, the norms, the embedding of the classes, and the two convolutions that
    read the image and write the prediction.
    """
    first, last = network.down[0]["entry"], network.up[-1]["exit"][-1]
    layers = [part for part in network.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    maps = [layer.weight for layer in layers if layer not in (first, last)]
    rest = [p for p in network.parameters() if all(p is not weight for weight in maps)]
    # AdamW worked well with 0.4 of Muon's rate.
    adamw = torch.optim.AdamW(rest, 0.4 * lr, betas=(0.9, 0.99), weight_decay=0.01)
    return [Muon(maps, lr), adamw]


def learning_rate(step, total_steps, peak):
    """Linear warm-up over 500 steps, or 5 % of a short run, times a cosine. step counts from 0."""
    warmup = min(500, max(1, total_steps // 20))
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


@torch.no_grad()
def update_ema(ema, model, step):
    """Update the exponential moving average, for the step'th time (counted from 1).

    The weights of single steps scatter around a good point, and their average is closer to it. The
    most recent 3 % of the steps make up half of it.
    """
    decay = 0.5 ** (1 / (0.03 * step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for ours, theirs in zip(ema.buffers(), model.buffers()):  # the network may have some
        ours.copy_(theirs)


def training_batch(images, labels, index, num_classes, flip=True):
    """The images at `index`, half of them mirrored: -> x in [-1, 1] and labels y, or None."""
    x = images[index].float() / 127.5 - 1
    if flip:
        mirrored = torch.rand(len(index), device=x.device) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    x = x.contiguous(memory_format=memory_format(x.device))
    if labels is None:
        return x, None
    # One label in ten becomes the null label, so that guidance has something to compare with (Ho
    # and Salimans 2022, Algorithm 1).
    dropped = torch.rand(len(index), device=x.device) < 0.1
    return x, labels[index].masked_fill(dropped, num_classes)


def train(config, data=None):
    """Train as `config` says, or go on with such a run: -> SimpleDiffusion with averaged weights.

    data: images, labels and class names as load_images returns them, in place of config.data.
    Raises a ValueError or an OSError for a bad option, data set or file, a FloatingPointError if
    the loss is not finite, and after a signal a KeyboardInterrupt, once the state is saved.
    """
    from tqdm import tqdm

    device, rank, world_size = join_processes(config.device)
    if config.compile and device.type == "mps":
        raise ValueError("--compile gives wrong results on MPS with some versions of torch")
    tune_torch()

    # What a stopped run has left, if there was one.
    out = Path(config.out).expanduser().resolve()
    state_path, state = out / "training_state.pth", None
    if state_path.exists() and not config.restart:
        state = read(state_path, "run")
        say(f"going on after step {state['step']:,} (--restart begins again)")

    # The data, and how many steps will be made with it.
    if data is not None:
        config = replace(config, data="tensors")
    images, labels, class_names = training_data(config, data, out, rank)
    batch_size = min(config.batch_size, len(images)) // world_size * world_size
    if batch_size == 0 or config.batch_size % world_size:
        raise ValueError(
            f"{world_size} processes cannot share {len(images)} images or --batch-size "
            f"{config.batch_size} evenly"
        )
    steps_per_epoch = len(images) // batch_size  # what is left over waits for another epoch
    epochs, sample_every = config.epochs, config.sample_every
    if config.images is not None:
        epochs = max(1, round(config.images / (steps_per_epoch * batch_size)))
        sample_every = math.ceil(epochs / 20)
    total_steps = epochs * steps_per_epoch

    # The caller's random state is left as it was, and a signal stops the run between two steps.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(gpus), stop_signals() as received:
        # The model, its moving average, which draws better than the weights of any one step, and
        # the optimisers.
        torch.manual_seed(mixed_seed(config.seed, -(2**31)))
        model = new_model(config, images, class_names)
        run = {**asdict(config), **fingerprint(images, labels, model.class_names)}
        model.to(device, memory_format=memory_format(device))
        ema = copy.deepcopy(model).eval()
        optimizers = make_optimizers(model.network, config.lr)
        # The highest learning rates are those of this command. A state may hold others.
        peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        # All images stay on the device, in bytes. Grey ones become colour if --init's network is.
        images = images.expand(-1, model.network.config["in_channels"], -1, -1).to(device)
        labels = None if labels is None else labels.to(device)

        # Where the run stands: at its beginning, or where it was stopped.
        step, seconds = 0, 0.0
        if state is not None:
            refuse_another_run(state_path, state["run"], run)
            step, seconds = state["step"], state["seconds"]
            model.network.load_state_dict(state["model"])
            ema.network.load_state_dict(state["ema"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        if largest(step) != step:
            raise ValueError(f"the processes do not all find {state_path}: share its folder")
        if step >= total_steps:
            say("finished (with more --epochs or --images it goes on)")
            return ema
        losses = torch.zeros(total_steps, **PLAIN).to(device)  # of all the steps of the run
        if state is not None:
            losses[:step] = state["losses"]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]

        # What is said and written at the beginning.
        info = describe(
            config, model, optimizers, images, batch_size, epochs, total_steps, device, out
        )
        if rank == 0 and step == 0:
            keep_old_checkpoint(out / "diffusion_model.pth")
            save_grid(images[:64] / 255, out / "samples/data.png", columns=8)
        if config.tensorboard and rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)
        hide = rank > 0 or sys.stderr is None or not sys.stderr.isatty()
        bar = tqdm(total=total_steps, initial=step, dynamic_ncols=True, unit="step", disable=hide)

        # Calling the model gives the loss of a batch.
        loss_of = torch.compile(model) if config.compile else model
        if world_size > 1:
            loss_of = nn.parallel.DistributedDataParallel(loss_of)
        order = None  # of the images in this epoch
        began = time.monotonic() - seconds  # as if there had been no break
        saved_at = shown_at = seconds
        while step < total_steps:
            # ---- A training step, one pass of Algorithm 1. Its random numbers follow from the seed
            # and the number of the step. So a run can stop anywhere and go on as if it had not (on
            # a CPU to the bit), and no random state has to be saved.
            epoch, i = divmod(step, steps_per_epoch)
            if order is None or i == 0:
                generator = torch.Generator().manual_seed(mixed_seed(config.seed, -1 - epoch))
                order = torch.randperm(len(images), generator=generator, device="cpu").to(device)
            torch.manual_seed(mixed_seed(config.seed, step * world_size + rank))
            index = order[i * batch_size : (i + 1) * batch_size][rank::world_size]
            null = model.network.num_classes
            x, y = training_batch(images, labels, index, null, flip=not config.no_flip)
            with autocast(device):
                loss = loss_of(x, y)  # lines 3 to 5, which are in DiffusionModel.forward
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # bad batches do little harm
            for group, peak in zip(groups, peaks):
                group["lr"] = learning_rate(step, total_steps, peak)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses[step] = torch.where(norm.isfinite(), loss.detach(), math.nan)
            step += 1
            update_ema(ema, model, step)

            # ---- What is to be done after this step? Mostly nothing.
            seconds = time.monotonic() - began
            epoch_done = step % steps_per_epoch == 0
            run_done = step == total_steps
            stop = largest(max(received, default=0))  # the number of a signal, or 0
            # Save every five minutes, and after each epoch unless the last time was less than 20
            # seconds ago (or a tenth of the time of a young run).
            pause = min(20, seconds / 10) if epoch_done else 300
            saving = stop or run_done or seconds - saved_at > pause
            exporting = epoch_done and ((epoch + 1) % sample_every == 0 or run_done)
            showing = epoch_done or saving or seconds - shown_at > 1
            if not showing:
                continue

            # ---- Show the loss. Fetching it makes a GPU wait, so this is not done in every step.
            shown_at = seconds
            known = losses.cpu()[:step]
            if not known.isfinite().all():
                bad = known.isfinite().tolist().index(False) + 1
                advice = "give the same command with a lower --lr, if need be with --restart"
                raise FloatingPointError(f"the loss is not finite at step {bad}: {advice}")
            with contextlib.suppress(OSError):  # the terminal may be gone
                bar.set_postfix(loss=f"{known[-100:].mean():.4f}", refresh=False)
                bar.update(step - bar.n)

            # ---- Draw samples and write the model, and save the state.
            if exporting and rank == 0:
                info.update(images_seen=step * batch_size, training_minutes=seconds / 60)
                export(ema, out, config.seed, known.view(-1, steps_per_epoch).mean(1), info)
            if saving:
                saved_at = seconds
                if rank == 0:
                    state = dict(
                        run=run,
                        step=step,
                        seconds=seconds,
                        losses=known,
                        model=model.network.state_dict(),
                        ema=ema.network.state_dict(),
                        optimizers=[optimizer.state_dict() for optimizer in optimizers],
                    )
                    write(state, state_path)
                if stop or run_done:
                    wait_for_all()  # none leaves while the first one writes

            # ---- Say how it goes after each epoch, or with --images after each of twenty parts.
            if epoch_done and (exporting or config.images is None):
                say(
                    f"epoch {epoch + 1:3d}/{epochs}  loss {known[-steps_per_epoch:].mean():.4f}  "
                    f"{step * batch_size / seconds:.0f} images/s  "
                    f"{seconds / step * (total_steps - step) / 60:.0f} minutes left",
                    bar,
                )
            if epoch_done and config.tensorboard and rank == 0:
                writer.add_scalar("loss", known[-steps_per_epoch:].mean(), step)
                writer.flush()
            if stop and not run_done:
                how = " without --restart" if config.restart else ""
                say(f"stopped after step {step:,}: the same command{how} goes on", bar)
                raise KeyboardInterrupt(stop)
        checkpoint = shlex.quote(str(out / "diffusion_model.pth"))
        say(f"wrote {checkpoint}, draw: python inference_example.py --checkpoint {checkpoint}", bar)
    return ema


def join_processes(name):
    """The device, and which of how many processes this is: -> device, rank, world_size.

    torchrun starts several processes and tells each of them in the environment which one it is.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return pick_device(name), 0, 1
    on_gpus = torch.cuda.is_available() if name is None else name.startswith("cuda")
    device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpus else name or "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(timeout=datetime.timedelta(days=1))
    return device, int(os.environ["RANK"]), world_size


def training_data(config, data, out, rank):
    """What `data` or else config.data holds, if one can train on it: -> as load_images."""
    if data is None:
        folder = Path(config.data).expanduser().resolve()
        if config.data not in ("cifar10", "shapes") and (out / "samples").is_relative_to(folder):
            raise ValueError(f"--out {out} would put its samples among the pictures of --data")
        # It may have to be downloaded, so the first process reads it while the others wait.
        if rank > 0:
            wait_for_all()
        data = load_images(config.data, config.image_size, config.limit)
        if rank == 0:
            wait_for_all()
    images, labels, class_names = data
    square = images.dim() == 4 and images.shape[2] == images.shape[3]
    if images.dtype != torch.uint8 or not square or (labels is None) != (class_names is None):
        got = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(
            f"images must be uint8 (N, C, S, S), got {got}, and labels need class names"
        )
    if config.unconditional or labels is None:
        return images, None, None
    last = len(class_names) - 1
    labels = fitting("labels", labels, images.shape[:1], 0, last, "cpu", torch.int64)
    return images, labels, class_names


def describe(config, model, optimizers, images, batch_size, epochs, total_steps, device, out):
    """Print what will be trained and on what, and return it for model_info.json, as a dict."""
    network = model.network
    info = dict(
        architecture=f"SimpleUNet {network.config}",
        parameters=sum(p.numel() for p in network.parameters()),
        dataset=config.data,
        batch_size=batch_size,
        optimizer=" and ".join(type(optimizer).__name__ for optimizer in optimizers),
        learning_rate=config.lr,
        **model.diffusion.config,
        device=str(device),
        torch=str(torch.__version__),
        license="MIT" if config.data in ("cifar10", "shapes") else "not stated",
    )
    say(
        f"device    {device}, {'bfloat16' if has_bfloat16(device) else 'float32'}\n"
        f"network   {info['parameters'] / 1e6:.1f} M parameters\n"
        f"data      {len(images):,} images of {config.data}, {images.shape[-1]} pixels wide, "
        f"{', '.join(model.class_names or ['no classes'])}\n"
        f"training  {epochs:,} epochs of {total_steps // epochs:,} steps of {batch_size} images\n"
        f"files     {out}"
    )
    if total_steps < 1000 and config.images is None:
        say(f"hint      {total_steps} steps are few, --images 30000 makes more of them")
    signs = [len(name) == 1 or name.isdigit() for name in model.class_names or []]
    if signs and all(signs) and not config.no_flip:
        say("hint      letters and digits should not be mirrored: --no-flip")
    return info


def new_model(config, images, class_names):
    """The model that a run begins with, from the options, or from the checkpoint of --init."""
    options = dict(image_size=images.shape[-1], class_names=class_names, dropout=config.dropout)
    options.update(t_distribution=config.t_distribution)
    if config.init is None:
        architecture = {name: getattr(config, name) for name in ARCHITECTURE}
        return SimpleDiffusion(in_channels=images.shape[1], **options, **architecture)
    given = [name for name in ARCHITECTURE if getattr(config, name) != getattr(TrainConfig, name)]
    if given:
        raise ValueError(f"{', '.join(given)} comes with --init, leave it out")
    source = SimpleDiffusion.load(config.init, "cpu")
    theirs = {**source.network.config, **source.diffusion.config, "num_classes": None}
    if images.shape[1] > theirs["in_channels"]:
        raise ValueError("the network of --init draws in grey, but the images are in colour")
    model = SimpleDiffusion(**{**theirs, **options})
    # Classes go by their names, and one that is new begins as the null class, the last row.
    weights = source.network.state_dict()
    rows = weights.pop("class_embedding.weight", torch.zeros(1, theirs["time_dim"]))
    model.network.load_state_dict(weights, strict=False)
    known = dict(zip(source.class_names or [], rows))
    with torch.no_grad():
        if class_names is None:  # such a network draws the null class of the other
            model.network.time_mlp[-1].bias += rows[-1]
        else:
            wanted = [known.get(name, rows[-1]) for name in model.class_names]
            model.network.class_embedding.weight.copy_(torch.stack([*wanted, rows[-1]]))
    return model


def refuse_another_run(path, before, run):
    """Raises a ValueError that says what differs, if the state at `path` is not of this run."""
    changed = [
        f"{name} {before.get(name)}, not {run.get(name)}"
        for name in {**before, **run}
        if name not in MAY_CHANGE and before.get(name) != run.get(name)
    ]
    if changed:
        advice = "Give the same again, another --out, or --restart"
        raise ValueError(f"{path} was begun with {'; '.join(changed)}. {advice}")


def fingerprint(images, labels, classes):
    """By which a run knows that it goes on with the same data."""
    checksum = hashlib.sha256(images.cpu().contiguous().numpy())
    checksum.update(str(None if labels is None else labels.tolist()).encode())
    return dict(number_of_images=len(images), classes=classes, checksum=checksum.hexdigest())


def mixed_seed(seed, number):
    """A seed of 32 bits, which is all that torch's generators use, for a step of a run."""
    # Think of the 2**32 numbers as a circle. The seed of the run picks a point on it (by 2**32 over
    # the golden ratio, which spreads them well). From there the steps count up, the orders of the
    # epochs count down, and the first weights take the opposite point. Runs whose seeds differ by
    # less than 10,000 begin more than 190,000 apart, so that shorter ones share no random numbers.
    return (seed * 2654435769 + number) % 2**32


def largest(number):
    """The largest of the numbers of all processes, once all of them have come here."""
    if dist.is_initialized():
        number = torch.tensor(number, device="cpu")
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def wait_for_all():
    """Return once all processes have come here."""
    largest(0)


@contextlib.contextmanager
def stop_signals():
    """Collect Ctrl-C, SIGTERM and SIGHUP in a list. A second Ctrl-C ends at once."""
    received = []

    def receive(number, frame):
        received.append(number)
        if received.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    before = {}
    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
                before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tune_torch():
    """Settings of torch and of the C library that make a training step faster."""
    torch.set_flush_denormal(True)  # CPUs are many times slower with numbers below 1e-38
    torch.backends.cudnn.benchmark = True  # all batches have one shape, so a search pays off
    with contextlib.suppress(OSError, AttributeError):  # only Linux has glibc
        import ctypes

        libc = ctypes.CDLL("libc.so.6")
        # Keep freed memory for the next tensor. To get it anew costs a fifth of a step on a CPU.
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def keep_old_checkpoint(path):
    """Copy the weights of an earlier run to diffusion_model.pth.bak, or to .bak2, .bak3, ..."""
    backup, number = Path(f"{path}.bak"), 1
    while backup.exists():
        number += 1
        backup = Path(f"{path}.bak{number}")
    if path.exists():
        shutil.copyfile(path, backup)


def export(ema, out, seed, curve, info):
    """Write the model, model_info.json, a grid of four samples, and the loss of each epoch."""
    from matplotlib.figure import Figure

    today = time.strftime("%Y-%m-%d")
    info = dict(info, epochs=len(curve), final_loss=curve[-1].item(), date=today)
    ema.save(out / "diffusion_model.pth", **info)
    write((json.dumps(info, indent=2) + "\n").encode(), out / "model_info.json")
    classes = ema.network.num_classes
    y = None if classes is None else [i % classes for i in range(4)]
    images = ema.sample(4, y=y, seed=seed, progress=False)
    save_grid(images, out / f"samples/epoch_{len(curve):04d}.png", columns=2)
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot(xlabel="epoch", ylabel="training loss")
    axes.plot(range(1, len(curve) + 1), curve)
    figure.savefig(out / "samples/loss.png")


@contextlib.contextmanager
def errors_in_one_line():
    """Let what a user can cause end in one line that begins with "error:", and an exit code."""
    try:
        yield
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))  # the shells' convention
    except Exception as error:
        kinds = (ValueError, OSError, FloatingPointError, ImportError, MemoryError)
        causes = ("out of memory", "enough memory", "allocate", "compiler")
        if not isinstance(error, kinds) and not any(cause in str(error) for cause in causes):
            raise  # a bug, which has to show where it is
        advice = ""
        if isinstance(error, ImportError):
            advice = ": pip install -r requirements.txt (and tensorboard for --tensorboard)"
        elif isinstance(error, MemoryError) or "memory" in str(error):
            advice = ": lower --batch-size, --image-size, --hidden-channels or -n"
        with contextlib.suppress(OSError, AttributeError):
            print(f"error: {brief(error)}{advice}", file=sys.stderr)
        sys.exit(2)


def main(argv=None):
    """Read the options from the command line, and train."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=layout, allow_abbrev=False
    )
    parser.error = refuse_options
    comments = dict(re.findall(r"(\w+): .* = .*  # (.*)", inspect.getsource(TrainConfig)))
    kinds = {bool: dict(action="store_true"), tuple: dict(type=int, nargs="*")}
    for entry in fields(TrainConfig):
        name, default = "--" + entry.name.replace("_", "-"), entry.default
        help = comments[entry.name] + ("" if default in (None, False) else " (%(default)s)")
        kind = kinds.get(entry.type, dict(type=entry.type))
        parser.add_argument(name, help=help, default=default, **kind)
    with errors_in_one_line():
        try:
            train(TrainConfig(**vars(parser.parse_args(argv))))
        finally:
            if dist.is_initialized():
                gc.collect()  # of what still holds the group, whose threads must not outlive Python
                dist.destroy_process_group()


def refuse_options(message):
    raise ValueError(f"{message} (--help lists all options)")


if __name__ == "__main__":
    main()
