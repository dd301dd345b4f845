"""The layers around the scan and the cell's gate in plain torch, for any device and for torch.compile.

Three of them keep less memory for the backward pass than autograd would: they save their inputs alone, and the backward
pass computes the rest again (benchmarks/layers.py measures what that costs). fused_triton.py has the same functions as
Triton kernels. Letters: C is the width of a block, Di the inner width. (...) stands for any leading axes.
"""

import torch
import torch.nn.functional as F

from vmrnn.network.linear import gradient_of_input, gradient_of_weight, linear

aten = torch.ops.aten
once_differentiable = torch.autograd.function.once_differentiable


def norm(x, weight, bias, eps):
    """LN over the last axis of x (..., C), computed in fp32 (or fp64).

    Under autocast the result has the dtype of the products that follow, so that two products share one copy.
    """
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(product_dtype(x))


def product_dtype(x):
    """The dtype that autocast gives x as the input of a product: x's own without autocast and for fp64."""
    device = x.device.type
    # Autocast cannot be asked for on the meta device.
    on = not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else x.dtype


def in_proj(u, weight):
    """The two halves of a linear layer: u (..., C), weight (2 Di, C) -> x, z, both (..., Di)."""
    # Two products instead of one that is split: both halves are contiguous, so nothing after them copies.
    to_x, to_z = weight.chunk(2)
    return linear(u, to_x), linear(u, to_z)


def conv_silu(x, weight, bias):
    """SiLU of a depthwise 3x3 convolution with padding 1: x (B, H, W, Di), weight (Di, 1, 3, 3) -> (B, H, W, Di)."""
    return ConvSilu.apply(x, weight.to(x.dtype), bias.to(x.dtype))


def norm_gate_linear(y, z, norm_weight, norm_bias, eps, weight):
    """(LN(y) * SiLU(z)) weight^T: y and z (..., Di), weight (C, Di) -> (..., C). The norm is in fp32 (or fp64)."""
    return NormGateLinear.apply(y, z, norm_weight, norm_bias, eps, weight)


def cell_gate(o, c):
    """The gate of the cell: h and the new c, both of o's shape.

    One gate f = sigmoid(o) for input, forget and output: new c = f (c + tanh(o)), h = f tanh(new c).
    """
    return CellGate.apply(o, c)


def convolve(x, weight, bias):
    """The convolution of conv_silu, (B, H, W, Di) -> (B, Di, H, W)."""
    # The fast depthwise kernels take a permuted channels-last tensor as it is: nothing is copied.
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[-1])


class ConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return F.silu(convolve(x, weight, bias), inplace=True).permute(0, 2, 3, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        grad = aten.silu_backward(grad.permute(0, 3, 1, 2), convolve(x, weight, bias))
        dx, dweight, dbias = aten.convolution_backward(
            grad, x.permute(0, 3, 1, 2), weight, [len(bias)], [1, 1], [1, 1], [1, 1], False, [0, 0], len(bias),
            [True] * 3,
        )  # fmt: skip
        return dx.permute(0, 2, 3, 1), dweight, dbias


class NormGateLinear(torch.autograd.Function):
    """The product is part of this function, so that its input need not be saved either."""

    @staticmethod
    def forward(ctx, y, z, norm_weight, norm_bias, eps, weight):
        ctx.save_for_backward(y, z, norm_weight, norm_bias, weight)
        ctx.eps = eps
        normed = F.layer_norm(y.to(norm_weight.dtype), y.shape[-1:], norm_weight, norm_bias, eps)
        return linear(normed.mul_(F.silu(z)), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, z, norm_weight, norm_bias, weight = ctx.saved_tensors
        y = y.to(norm_weight.dtype)
        normed, mean, rstd = aten.native_layer_norm(y, y.shape[-1:], norm_weight, norm_bias, ctx.eps)
        gate = F.silu(z).to(y.dtype)
        product = (normed * gate).to(grad.dtype)
        dweight = gradient_of_weight(grad, product).to(weight.dtype)
        grad = gradient_of_input(grad, weight.to(grad.dtype)).to(y.dtype)
        dz = aten.silu_backward(normed.mul_(grad).to(z.dtype), z)
        dy, dnorm_weight, dnorm_bias = aten.native_layer_norm_backward(
            gate.mul_(grad), y, y.shape[-1:], mean, rstd, norm_weight, norm_bias, [True] * 3
        )
        return dy, dz, dnorm_weight, dnorm_bias, None, dweight


class CellGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, c):
        ctx.save_for_backward(o, c)
        f = torch.sigmoid(o)
        # The last product is not in place: torch 2.11's compiler loses the gradient of a result made in place.
        c = torch.tanh(o).add_(c) * f
        return torch.tanh(c) * f, c

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, dc):
        o, before = ctx.saved_tensors
        f, t = torch.sigmoid(o), torch.tanh(o)
        s = t + before
        q = torch.tanh(f * s)
        dc = torch.addcmul(dc, dh * f, 1 - q * q)
        df = torch.addcmul(dh * q, dc, s)
        dc *= f
        return torch.addcmul(df * f * (1 - f), dc, 1 - t * t), dc
