"""A network of another make, to show that DiffusionModel takes any: a U-Net around torchvision's ResNet-18."""

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from diffusion_model import Attention, time_embedding


class Grow(nn.Module):
    """Twice the size by a transposed convolution, joined with the skip, told of the time; attention where wanted.

    forward(x, skip, emb): x (B, in_channels, H, W), skip (B, skip_channels, 2H, 2W), emb (B, time_dim)
    -> (B, out_channels, 2H, 2W)
    """

    def __init__(self, in_channels, skip_channels, out_channels, time_dim, num_heads):
        super().__init__()
        self.grow = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)
        self.join = nn.Conv2d(out_channels + skip_channels, out_channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)
        self.time = nn.Linear(time_dim, 2 * out_channels)
        self.conv = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.attention = Attention(out_channels, num_heads) if num_heads else nn.Identity()

    def forward(self, x, skip, emb):
        scale, shift = self.time(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm(self.join(torch.cat([self.grow(x), skip], dim=1)))
        h = F.silu(h * (1 + scale) + shift)
        return self.attention(h + F.silu(self.conv(h)))


class ResNetUNet(nn.Module):
    """ResNet-18 as encoder, transposed convolutions as decoder; skips, time embedding and self-attention.

    forward(x, t): x (B, 3, H, W), t (B,) int64 -> (B, 3, H, W). H and W must be multiples of 32; made for 64x64.
    resnet: the encoder, such as torchvision's resnet18(weights="IMAGENET1K_V1"); None: a random one.

    ResNet brings BatchNorm: in train mode an image's output depends on its batch, in eval mode on running means
    over batches of mixed timesteps. So train in train mode with at least two images a batch, sample in eval mode
    (DiffusionModel.sample sees to it), and where weights are averaged (EMA) take the buffers along.
    """

    def __init__(self, time_dim=256, num_heads=4, resnet=None):
        super().__init__()
        resnet = torchvision.models.resnet18() if resnet is None else resnet
        self.time_dim = time_dim
        self.time_mlp = nn.Sequential(
            nn.Linear(time_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim), nn.SiLU()
        )
        self.encoder = nn.ModuleList(
            [  # for images of 64x64:
                nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu),  # (B, 64, 32, 32)
                nn.Sequential(resnet.maxpool, resnet.layer1),  # (B, 64, 16, 16)
                resnet.layer2,  # (B, 128, 8, 8)
                resnet.layer3,  # (B, 256, 4, 4)
                resnet.layer4,  # (B, 512, 2, 2)
            ]
        )
        # ResNet knows nothing of time: each of its stages is told by a shift of what it is given.
        self.time = nn.ModuleList(
            nn.Linear(time_dim, channels) for channels in (3, 64, 64, 128, 256)
        )
        self.middle = Attention(512, num_heads)
        self.decoder = nn.ModuleList(
            [
                Grow(512, 256, 256, time_dim, num_heads),  # (B, 256, 4, 4)
                Grow(256, 128, 128, time_dim, num_heads),  # (B, 128, 8, 8)
                Grow(128, 64, 64, time_dim, num_heads),  # (B, 64, 16, 16)
                Grow(64, 64, 64, time_dim, 0),  # (B, 64, 32, 32)
                Grow(64, 3, 32, time_dim, 0),  # (B, 32, 64, 64), joined with x itself
            ]
        )
        self.out = nn.Conv2d(32, 3, 1)

    def forward(self, x, t):
        emb = self.time_mlp(time_embedding(t, self.time_dim))  # (B, time_dim)
        skips = []
        for stage, time in zip(self.encoder, self.time):
            skips.append(x)
            x = stage(x + time(emb)[:, :, None, None])
        x = self.middle(x)  # (B, 512, 2, 2)
        for grow in self.decoder:
            x = grow(x, skips.pop(), emb)
        return self.out(x)
