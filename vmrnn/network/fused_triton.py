"""The layers of layers.py as Triton kernels: one launch forward where torch has two to six, up to three backward
instead of four to eighteen, and less memory moved.

What they are and must equal is in layers.py; everything but loads and stores is fp32. Like the
autograd functions there they keep their inputs alone for the backward pass. Sums over positions are
made per program and added by torch in a fixed order: no atomics, so results repeat bit for bit.
SS2D and the cell use them where the scan runs in Triton.
"""

# Annotations stay text, so that this file can be imported where Triton is not installed.
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmrnn.network.fused import once_differentiable, product_dtype
from vmrnn.scan.triton_kernels import jit, tl
from vmrnn.scan.triton_scan import padded

# Chosen by registers and spills of the compiled kernels; no GPU has timed them yet.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
ELEMENTS = 512  # of a row of the map that a program of the convolution holds: 4 a thread
ROWS = 8  # of the map that it walks down
ROWS_BACK = 16  # more: each program leaves ten sums a channel
NORM_ELEMENTS = 1024  # of a program of the norms, and of the cell's gate
NORM_PROGRAMS = 512  # of their backward, which loop over what there is: about four for each of an H200's 132 SMs


@jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * v))


# A program of the convolution owns some columns and channels, and walks down ROWS rows: a row is loaded
# once, in three positions, and serves the three rows that it is a neighbour of.


@jit
def place_of(H, W, C, ROWS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr):
    """(columns, channels, first row, positions before the image) of this program; neighbours share columns."""
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    blocks_j = (W + BLOCK_J - 1) // BLOCK_J
    strips = (H + ROWS - 1) // ROWS
    at = tl.program_id(0)
    channel = at % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    at = at // blocks_c
    j = at % blocks_j * BLOCK_J + tl.arange(0, BLOCK_J)
    at = at // blocks_j
    return j[:, None], channel[None, :], at % strips * ROWS, (at // strips).to(tl.int64) * H * W


@jit
def load_weights(weight, channel, C, FLIP: tl.constexpr):
    weights = ()
    for t in tl.static_range(9):
        w = tl.load(weight + channel * 9 + (8 - t if FLIP else t), mask=channel < C, other=0.0)
        weights = weights + (w.to(tl.float32),)
    return weights


@jit
def load_row(x, i, j, channel, H, W, C, step):
    """Row i of the map, each column with its left and right neighbour; zero beyond the edge."""
    at = (i * W + j) * step + channel
    inside = (channel < C) & (j < tl.where((i >= 0) & (i < H), W, 0))
    left = tl.load(x + at - step, mask=inside & (j > 0), other=0.0)
    middle = tl.load(x + at, mask=inside, other=0.0)
    right = tl.load(x + at + step, mask=inside & (j + 1 < W), other=0.0)
    return left.to(tl.float32), middle.to(tl.float32), right.to(tl.float32)


@jit
def conv_kernel(x, weight, bias, y, step, H, W, C,
                ROWS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, TRANSPOSED: tl.constexpr):  # fmt: skip
    """x (B, H, W, C), a position every `step` elements -> y: SiLU(conv(x) + bias), or the transposed convolution
    alone."""
    j, channel, first, image = place_of(H, W, C, ROWS, BLOCK_J, BLOCK_C)
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = load_weights(weight, channel, C, TRANSPOSED)
    biases = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    x += image * step
    y += (image + (first - 2) * W + j) * C + channel  # two rows above the first: what is done lags by one
    above = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)  # what is there already of the row above the one at hand
    here = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)  # and of that one
    for i in range(first - 1, tl.minimum(first + ROWS, H) + 1):
        left, middle, right = load_row(x, i, j, channel, H, W, C, step)
        done = above + left * w6 + middle * w7 + right * w8
        above = here + left * w3 + middle * w4 + right * w5
        here = left * w0 + middle * w1 + right * w2
        if not TRANSPOSED:
            done += biases
            done *= sigmoid(done)
        mask = (channel < C) & (j < tl.where(i > first, W, 0))
        tl.store(y, done.to(y.dtype.element_ty), mask=mask)
        y += W * C


@jit
def conv_backward_kernel(dy, x, weight, bias, ds, parts, step, H, W, C,
                         ROWS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """ds (B, H, W, C), the gradient before the SiLU; parts (strips of B and H, column blocks, 10 C), the sums of
    each for the weights (C, 9) and the biases (C)."""
    j, channel, first, image = place_of(H, W, C, ROWS, BLOCK_J, BLOCK_C)
    weights = load_weights(weight, channel, C, False)
    biases = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    dy += image * C
    x += image * step
    ds += image * C
    zeros = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)
    sums = (zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    dbias = zeros
    rows = load_row(x, first - 1, j, channel, H, W, C, step) + load_row(x, first, j, channel, H, W, C, step)
    for i in range(first, tl.minimum(first + ROWS, H)):
        rows = rows + load_row(x, i + 1, j, channel, H, W, C, step)
        s = zeros + biases
        for t in tl.static_range(9):
            s += rows[t] * weights[t]
        gate = sigmoid(s)
        mask = (channel < C) & (j < W)
        at = (i * W + j) * C + channel
        g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        g *= gate * (1.0 + s * (1.0 - gate))
        tl.store(ds + at, g.to(ds.dtype.element_ty), mask=mask)
        new = ()
        for t in tl.static_range(9):
            new = new + (sums[t] + g * rows[t],)
        sums = new
        dbias += g
        rows = (rows[3], rows[4], rows[5], rows[6], rows[7], rows[8])
    parts += tl.program_id(0) // ((C + BLOCK_C - 1) // BLOCK_C) * 10 * C
    channel = tl.ravel(channel)
    for t in tl.static_range(9):
        tl.store(parts + channel * 9 + t, tl.sum(sums[t], 0), mask=channel < C)
    tl.store(parts + 9 * C + channel, tl.sum(dbias, 0), mask=channel < C)


@jit
def normalise(y, at, mask, C, eps):
    """y of each row less its mean, over its deviation; and one over the deviation."""
    v = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, v - (tl.sum(v, 1) / C)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * scale[:, None], scale


@jit
def norm_kernel(y, z, weight, bias, out, size, C, step, eps,
                BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """out (size, C) = LN(y), times SiLU(z) if GATED; z has a row every `step` elements."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)
    mask = (row < size)[:, None] & (channel < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    normed, _ = normalise(y, at, mask, C, eps)
    w = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    value = normed * w[None, :] + b[None, :]
    if GATED:
        v = tl.load(z + row.to(tl.int64)[:, None] * step + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        value *= v * sigmoid(v)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@jit
def norm_backward_kernel(dout, y, z, weight, bias, dy, dz, out, parts, size, C, step, eps,
                         BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """dy, and if GATED dz and once more out, all (size, C); parts (programs, 2, C), the sums for weight and bias."""
    channel = tl.arange(0, BLOCK_C)
    w = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(tl.program_id(0) * BLOCK_R, size, tl.num_programs(0) * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        mask = (row < size)[:, None] & (channel < C)[None, :]
        at = row.to(tl.int64)[:, None] * C + channel[None, :]
        normed, scale = normalise(y, at, mask, C, eps)
        g = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            v = tl.load(z + row.to(tl.int64)[:, None] * step + channel[None, :], mask=mask, other=0.0).to(tl.float32)
            gate = sigmoid(v)
            value = normed * w + b
            tl.store(out + at, (value * v * gate).to(out.dtype.element_ty), mask=mask)
            gated = g * value * gate * (1.0 + v * (1.0 - gate))
            tl.store(dz + at, gated.to(dz.dtype.element_ty), mask=mask)
            g *= v * gate  # of the norm's output
        dweight += g * normed
        dbias += g
        g *= w
        g -= (tl.sum(g, 1) / C)[:, None] + normed * (tl.sum(g * normed, 1) / C)[:, None]
        tl.store(dy + at, (g * scale[:, None]).to(dy.dtype.element_ty), mask=mask)
    parts += tl.program_id(0) * 2 * C + channel
    tl.store(parts, tl.sum(dweight, 0), mask=channel < C)
    tl.store(parts + C, tl.sum(dbias, 0), mask=channel < C)


@jit
def tanh(v):
    by_exp = 2.0 * sigmoid(2.0 * v) - 1.0  # which has no digits near 0
    square = v * v
    series = v + v * square * (-0.333333333 + square * (0.133333333 - square * 0.053968254))
    return tl.where(square < 0.04, series, by_exp)


@jit
def cell_gate_kernel(o, c, h, after, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(o + at, mask=at < size, other=0.0).to(tl.float32)
    f = sigmoid(v)
    state = f * (tl.load(c + at, mask=at < size, other=0.0).to(tl.float32) + tanh(v))
    tl.store(h + at, (f * tanh(state)).to(h.dtype.element_ty), mask=at < size)
    tl.store(after + at, state.to(after.dtype.element_ty), mask=at < size)


@jit
def cell_gate_backward_kernel(dh, dafter, o, c, do, dc, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(o + at, mask=at < size, other=0.0).to(tl.float32)
    f = sigmoid(v)
    t = tanh(v)
    s = tl.load(c + at, mask=at < size, other=0.0).to(tl.float32) + t
    q = tanh(f * s)
    gh = tl.load(dh + at, mask=at < size, other=0.0).to(tl.float32)
    g = tl.load(dafter + at, mask=at < size, other=0.0).to(tl.float32) + gh * f * (1.0 - q * q)
    dv = f * ((1.0 - f) * (gh * q + g * s) + g * (1.0 - t * t))
    tl.store(do + at, dv.to(do.dtype.element_ty), mask=at < size)
    tl.store(dc + at, (g * f).to(dc.dtype.element_ty), mask=at < size)


def conv_blocks(shape, rows):
    """(programs, of them for one block of channels, constants) of the convolution of a (B, H, W, C) map."""
    B, H, W, C = shape
    BLOCK_J = min(16, padded(W))
    BLOCK_C = ELEMENTS // BLOCK_J
    strips = B * -(-H // rows) * -(-W // BLOCK_J)
    return strips * -(-C // BLOCK_C), strips, dict(ROWS=rows, BLOCK_J=BLOCK_J, BLOCK_C=BLOCK_C)


def norm_blocks(rows, C):
    """(programs that a forward takes, constants) of the norms: whole rows of C, NORM_ELEMENTS together."""
    BLOCK_C = padded(C)
    BLOCK_R = max(1, NORM_ELEMENTS // BLOCK_C)
    return -(-rows // BLOCK_R), dict(BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C)


def stepped(t):
    """t (..., C) and the elements from a position to the next, copied only where that is not always the same: half of a
    product's columns is taken as it is."""
    flat = t.flatten(0, -2)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    return flat, flat.stride(0)


# The backward ops give the gradients of their parameters as one tensor, since no two results of an op may
# share memory; what registers them takes it apart.


@torch.library.custom_op("vmrnn::conv_silu", mutates_args=())
def conv_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As layers.conv_silu; x fp32, bf16 or fp16, the weights in any of them."""
    weight, bias, y = weight.contiguous(), bias.contiguous(), alike(x)
    flat, step = stepped(x)
    programs, _, blocks = conv_blocks(x.shape, ROWS)
    with torch.cuda.device_of(x):
        conv_kernel[programs,](flat, weight, bias, y, step, *x.shape[1:], TRANSPOSED=False, **blocks, **OPTIONS)
    return y


@torch.library.custom_op("vmrnn::conv_silu_backward", mutates_args=())
def conv_silu_backward_op(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dy, weight, bias = (t.contiguous() for t in (dy, weight, bias))
    ds, dx = alike(x), alike(x)
    flat, step = stepped(x)
    with torch.cuda.device_of(x):
        programs, strips, blocks = conv_blocks(x.shape, ROWS_BACK)
        parts = x.new_empty(strips, 10 * x.shape[-1], dtype=torch.float32)
        conv_backward_kernel[programs,](dy, flat, weight, bias, ds, parts, step, *x.shape[1:], **blocks, **OPTIONS)
        programs, _, blocks = conv_blocks(x.shape, ROWS)
        conv_kernel[programs,](ds, weight, bias, dx, x.shape[-1], *x.shape[1:], TRANSPOSED=True, **blocks, **OPTIONS)
        return dx, parts.sum(0)


def launch_norm(y, z, weight, bias, out, eps):
    """out = LN(y), times SiLU(z) unless z is None."""
    y, weight, bias = (t.contiguous() for t in (y, weight, bias))
    flat, step = (y, 0) if z is None else stepped(z)
    C = y.shape[-1]
    programs, blocks = norm_blocks(y.numel() // C, C)
    with torch.cuda.device_of(y):
        norm_kernel[programs,](
            y, flat, weight, bias, out, y.numel() // C, C, step, eps, GATED=z is not None, **blocks, **OPTIONS
        )
    return out


def launch_norm_backward(dout, y, z, weight, bias, eps):
    """dy, sums (2, C) for weight and bias, and unless z is None also dz and once more out."""
    dout, y, weight, bias = (t.contiguous() for t in (dout, y, weight, bias))
    flat, step = (y, 0) if z is None else stepped(z)
    dy = alike(y)
    dz, out = (dy, dy) if z is None else (alike(z), alike(z))
    C = y.shape[-1]
    programs, blocks = norm_blocks(y.numel() // C, C)
    programs = min(programs, NORM_PROGRAMS)
    parts = y.new_empty(programs, 2, C, dtype=torch.float32)
    with torch.cuda.device_of(y):
        norm_backward_kernel[programs,](
            dout, y, flat, weight, bias, dy, dz, out, parts, y.numel() // C, C, step, eps,
            GATED=z is not None, **blocks, **OPTIONS,
        )  # fmt: skip
        return dy, parts.sum(0), dz, out


@torch.library.custom_op("vmrnn::norm", mutates_args=())
def norm_op(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return launch_norm(x, None, weight, bias, alike(x, dtype), eps)


@torch.library.custom_op("vmrnn::norm_backward", mutates_args=())
def norm_backward_op(du: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return launch_norm_backward(du, x, None, weight, bias, eps)[:2]


@torch.library.custom_op("vmrnn::norm_gate", mutates_args=())
def norm_gate_op(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return launch_norm(y, z, weight, bias, alike(z), eps)


@torch.library.custom_op("vmrnn::norm_gate_backward", mutates_args=())
def norm_gate_backward_op(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_norm_backward(dout, y, z, weight, bias, eps)


@torch.library.custom_op("vmrnn::cell_gate", mutates_args=())
def cell_gate(o: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """As layers.cell_gate."""
    o, c = o.contiguous(), c.contiguous()
    h, after = alike(o), alike(c)
    with torch.cuda.device_of(o):
        cell_gate_kernel[-(-o.numel() // NORM_ELEMENTS),](o, c, h, after, o.numel(), BLOCK=NORM_ELEMENTS, **OPTIONS)
    return h, after


@torch.library.custom_op("vmrnn::cell_gate_backward", mutates_args=())
def cell_gate_backward_op(dh: Tensor, dafter: Tensor, o: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    dh, dafter, o, c = (t.contiguous() for t in (dh, dafter, o, c))
    do, dc = alike(o), alike(c)
    with torch.cuda.device_of(o):
        cell_gate_backward_kernel[-(-o.numel() // NORM_ELEMENTS),](
            dh, dafter, o, c, do, dc, o.numel(), BLOCK=NORM_ELEMENTS, **OPTIONS
        )
    return do, dc


def alike(t, dtype=None):
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)


def sums(t, *shape):
    return t.new_empty(shape, dtype=torch.float32)


conv_silu.register_fake(lambda x, weight, bias: alike(x))
conv_silu_backward_op.register_fake(lambda dy, x, weight, bias: (alike(x), sums(x, 10 * x.shape[-1])))
norm_op.register_fake(lambda x, weight, bias, eps, dtype: alike(x, dtype))
norm_backward_op.register_fake(lambda du, x, weight, bias, eps: (alike(x), sums(x, 2, x.shape[-1])))
norm_gate_op.register_fake(lambda y, z, weight, bias, eps: alike(z))
norm_gate_backward_op.register_fake(
    lambda dout, y, z, weight, bias, eps: (alike(y), sums(y, 2, y.shape[-1]), alike(z), alike(z))
)
cell_gate.register_fake(lambda o, c: (alike(o), alike(c)))
cell_gate_backward_op.register_fake(lambda dh, dafter, o, c: (alike(o), alike(c)))


def keep_tensors(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def keep_for_norm(ctx, inputs, output):
    x, weight, bias, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight, bias)


def conv_silu_gradients(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    dx, both = conv_silu_backward_op(dy, x, weight, bias)
    dweight, dbias = both.split((weight.numel(), bias.numel()))
    return dx, dweight.view(weight.shape).to(weight.dtype), dbias.to(bias.dtype)


def norm_gradients(ctx, du):
    x, weight, bias = ctx.saved_tensors
    dx, both = norm_backward_op(du, x, weight, bias, ctx.eps)
    return dx, both[0].to(weight.dtype), both[1].to(bias.dtype), None, None


conv_silu.register_autograd(conv_silu_gradients, setup_context=keep_tensors)
norm_op.register_autograd(norm_gradients, setup_context=keep_for_norm)
cell_gate.register_autograd(
    lambda ctx, dh, dafter: cell_gate_backward_op(dh, dafter, *ctx.saved_tensors), setup_context=keep_tensors
)


def norm(x, weight, bias, eps):
    """As layers.norm."""
    return norm_op(x, weight, bias, eps, product_dtype(x))


def in_proj(u, weight):
    """As layers.in_proj, but one product, whose halves the kernels take as they are."""
    return F.linear(u, weight).chunk(2, -1)


def norm_gate_linear(y, z, norm_weight, norm_bias, eps, weight):
    """As layers.norm_gate_linear, the product in z's type."""
    return NormGateLinear.apply(y, z, norm_weight, norm_bias, eps, weight)


class NormGateLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, norm_weight, norm_bias, eps, weight):
        ctx.save_for_backward(y, z, norm_weight, norm_bias, weight)
        ctx.eps = eps
        return F.linear(norm_gate_op(y, z, norm_weight, norm_bias, eps), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, z, norm_weight, norm_bias, weight = ctx.saved_tensors
        dout = grad @ weight.to(grad.dtype)
        dy, both, dz, out = norm_gate_backward_op(dout, y, z, norm_weight, norm_bias, ctx.eps)
        dweight = grad.flatten(0, -2).mT @ out.flatten(0, -2)
        return dy, dz, both[0].to(norm_weight.dtype), both[1].to(norm_bias.dtype), None, dweight.to(weight.dtype)
