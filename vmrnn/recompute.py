"""Two pieces of SS2D that keep less for the backward pass than autograd would.

Autograd keeps every intermediate map; of the eight of a block these drop three and compute them
again (benchmarks/layers.py has what that costs). Plain aten operations, so any device and
torch.compile take them.
"""

import torch
import torch.nn.functional as F

aten = torch.ops.aten


def conv_silu(x, weight, bias):
    """SiLU of a depthwise 3x3 convolution, padding 1: x (B, H, W, C), weight (C, 1, 3, 3) -> (B, H, W, C)."""
    return ConvSilu.apply(x, weight.to(x.dtype), bias.to(x.dtype))


def norm_gate(y, z, weight, bias, eps):
    """LN(y) * SiLU(z), both (..., C); the norm in fp32 (or fp64) whatever y is."""
    return NormGate.apply(y.to(weight.dtype), z, weight, bias, eps)


def convolve(x, weight, bias):
    # A permuted channels-last tensor is what the fast depthwise kernels want; nothing is copied.
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[-1])


class ConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return F.silu(convolve(x, weight, bias), inplace=True).permute(0, 2, 3, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        grad = aten.silu_backward(grad.permute(0, 3, 1, 2), convolve(x, weight, bias))
        dx, dweight, dbias = aten.convolution_backward(
            grad, x.permute(0, 3, 1, 2), weight, [len(bias)], [1, 1], [1, 1], [1, 1], False, [0, 0], len(bias), [True] * 3
        )  # fmt: skip
        return dx.permute(0, 2, 3, 1), dweight, dbias


class NormGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, weight, bias, eps):
        normed, mean, rstd = aten.native_layer_norm(y, y.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(y, z, weight, bias, mean, rstd)
        ctx.eps = eps
        return normed.mul_(F.silu(z))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, z, weight, bias, mean, rstd = ctx.saved_tensors
        normed = aten.native_layer_norm(y, y.shape[-1:], weight, bias, ctx.eps)[0]
        dz = aten.silu_backward(normed.mul_(grad).to(z.dtype), z)
        dnormed = F.silu(z).to(grad.dtype) * grad
        dy, dweight, dbias = aten.native_layer_norm_backward(
            dnormed, y, y.shape[-1:], mean, rstd, weight, bias, [True] * 3
        )
        return dy, dz, dweight, dbias, None
