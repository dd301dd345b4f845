"""The layers between frames and maps (B, H, W, C): patch embedding, merging, expanding and the head."""

import torch
import torch.nn as nn
from einops import rearrange
from timm.layers import PatchEmbed

from vmrnn.network.linear import Linear


def patch_embed(patch_size, in_chans, embed_dim):
    """(B, in_chans, H, W) -> (B, H/p, W/p, embed_dim): strided convolution, then LN. H, W: any multiples of p."""
    return PatchEmbed(
        img_size=None,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        norm_layer=nn.LayerNorm,
        output_fmt="NHWC",
    )


class PatchMerging(nn.Module):
    """(B, H, W, C) -> (B, H/2, W/2, 2C).

    The four neighbours are taken in the order (0,0), (1,0), (0,1), (1,1), as (row, column).
    """

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        return self.reduction(self.norm(rearrange(x, "b (h p1) (w p2) c -> b h w (p2 p1 c)", p1=2, p2=2)))


class PatchExpanding(nn.Module):
    """(B, H, W, C) -> (B, 2H, 2W, C/2)."""

    def __init__(self, dim):
        super().__init__()
        self.expand = Linear(dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(dim // 2)

    def forward(self, x):
        return self.norm(rearrange(self.expand(x), "b h w (p1 p2 c) -> b (h p1) (w p2) c", p1=2, p2=2))


def doubling_convolution(in_chans, out_chans):
    """(B, in_chans, H, W) -> (B, out_chans, 2H, 2W)."""
    return nn.ConvTranspose2d(in_chans, out_chans, 3, stride=2, padding=1, output_padding=1)


class PatchInflated(nn.Module):
    """The head: features (B, H/p, W/p, C) and the network's input -> the forecast (B, out_chans, H, W) in [0, 1].

    patch_size   p, side of a patch in pixels
    dim          width C
    out_chans    channels of the forecast
    base         "none": a forecast is the sigmoid of the logits. "motion": their tanh is added to the base, the last
                 out_chans channels of the input; the last layer starts at zero, so that an untrained network does not
                 change its base

    It doubles the map log2(p) times. The published code doubles it p // 4 + 1 times, which is the same for p = 2, 4 and
    8, but five times instead of four for p = 16.
    """

    def __init__(self, patch_size, dim, out_chans, base="none"):
        super().__init__()
        self.base = base
        inner = []
        for _ in range(patch_size.bit_length() - 2):
            inner += [doubling_convolution(dim, dim), nn.GroupNorm(16, dim), nn.LeakyReLU(0.2)]
        self.Conv_ = nn.Sequential(*inner)
        self.Conv = doubling_convolution(dim, out_chans)
        if base != "none":
            nn.init.zeros_(self.Conv.weight)
            nn.init.zeros_(self.Conv.bias)

    def logits(self, features):
        x = self.Conv(self.Conv_(rearrange(features, "b h w c -> b c h w")))
        return x.to(torch.promote_types(x.dtype, torch.float32))  # the 8 bits of bf16 are too few for a frame

    def forward(self, features, frame=None):
        """frame: the network's input (B, in_chans, H, W), which a base needs."""
        logits = self.logits(features)
        if self.base == "none":
            return torch.sigmoid(logits)
        corrected = frame[:, -logits.shape[1] :] + torch.tanh(logits)
        # Clipped, but with the gradient of the unclipped sum: dry pixels would learn nothing otherwise.
        return corrected + (corrected.clamp(0, 1) - corrected).detach()
