"""The layers around the scan and the cell's gate, in plain torch: for any device, and for torch.compile.

Three of them keep less for the backward pass than autograd would: their inputs alone, from which the backward
makes the maps between again (benchmarks/layers.py has what that costs). triton_layers.py has the same functions as
Triton kernels.
"""

import torch
import torch.nn.functional as F

aten = torch.ops.aten
once_differentiable = torch.autograd.function.once_differentiable


def norm(x, weight, bias, eps):
    """LN over the last axis, made in fp32 (or fp64); under autocast in the type of the products that follow, so that
    two products of it share one copy."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(product_dtype(x))


def product_dtype(x):
    """What autocast, where it is on, makes x as an input of a product: fp64 it leaves alone."""
    device = x.device.type
    # On the meta device, of shapes alone, the question has no answer.
    on = not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else x.dtype


def in_proj(u, weight):
    """u (..., C), weight (2 Di, C) -> x, z, both (..., Di)."""
    # Two products, not one and a split: the halves are contiguous, so neither the convolution nor
    # the gate's backward copies (benchmarks/layers.py, in_proj).
    to_x, to_z = weight.chunk(2)
    return F.linear(u, to_x), F.linear(u, to_z)


def conv_silu(x, weight, bias):
    """SiLU of a depthwise 3x3 convolution, padding 1: x (B, H, W, C), weight (C, 1, 3, 3) -> (B, H, W, C)."""
    return ConvSilu.apply(x, weight.to(x.dtype), bias.to(x.dtype))


def norm_gate_linear(y, z, norm_weight, norm_bias, eps, weight):
    """(LN(y) * SiLU(z)) weight^T, y and z (..., Di), weight (C, Di) -> (..., C); the norm in fp32 (or fp64)."""
    return NormGateLinear.apply(y, z, norm_weight, norm_bias, eps, weight)


def cell_gate(o, c):
    """The cell's one gate for input, forget and output: h, c of the same shape; f = sigmoid(o), c = f (c + tanh(o)),
    h = f tanh(c)."""
    return CellGate.apply(o, c)


def convolve(x, weight, bias):
    # A permuted channels-last tensor is what the fast depthwise kernels want; nothing is copied.
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
            grad, x.permute(0, 3, 1, 2), weight, [len(bias)], [1, 1], [1, 1], [1, 1], False, [0, 0], len(bias), [True] * 3
        )  # fmt: skip
        return dx.permute(0, 2, 3, 1), dweight, dbias


class NormGateLinear(torch.autograd.Function):
    """The product belongs to it so that its input need not be kept either."""

    @staticmethod
    def forward(ctx, y, z, norm_weight, norm_bias, eps, weight):
        ctx.save_for_backward(y, z, norm_weight, norm_bias, weight)
        ctx.eps = eps
        normed = F.layer_norm(y.to(norm_weight.dtype), y.shape[-1:], norm_weight, norm_bias, eps)
        return F.linear(normed.mul_(F.silu(z)), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, z, norm_weight, norm_bias, weight = ctx.saved_tensors
        y = y.to(norm_weight.dtype)
        normed, mean, rstd = aten.native_layer_norm(y, y.shape[-1:], norm_weight, norm_bias, ctx.eps)
        gate = F.silu(z).to(y.dtype)
        product = (normed * gate).to(grad.dtype)
        dweight = (grad.flatten(0, -2).mT @ product.flatten(0, -2)).to(weight.dtype)
        grad = (grad @ weight.to(grad.dtype)).to(y.dtype)
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
        # Not in place: torch 2.11's compiler drops the gradient of what a Function so returns.
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
