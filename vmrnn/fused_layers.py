"""conv_silu and norm_gate of recompute.py as Triton kernels: one launch forward instead of two and five,
and three and two backward instead of five and eleven.

What they are and must equal is in recompute.py; everything but loads and stores is fp32. Like the
autograd functions there they keep their inputs alone for the backward pass. Sums over positions are
made per program and added by torch in a fixed order: no atomics, so results repeat bit for bit.
SS2D uses them where its scan runs in Triton.
"""

# Annotations stay text, so that this file can be imported where Triton is not installed.
from __future__ import annotations

import torch

from vmrnn.scan.fused import jit, tl

OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
ELEMENTS = 512  # of a row of the map that a program of the convolution holds: 4 a thread
ROWS = 8  # of the map that it walks down
ROWS_BACK = 16  # more: each program leaves ten sums a channel
GATE_ELEMENTS = 1024  # of a program of norm_gate
GATE_PROGRAMS = 512  # of its backward, which loop over what there is: about four for each of an H200's 132 SMs


@jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * v))


# A program of the convolution owns some columns and channels, and walks down ROWS rows: a row is loaded
# once, in three positions, and serves the three rows that it is a neighbour of.


@jit
def place_of(H, W, C, ROWS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr):
    """(columns, channels, first row, where the image starts) of this program; neighbours share columns."""
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    blocks_j = (W + BLOCK_J - 1) // BLOCK_J
    strips = (H + ROWS - 1) // ROWS
    at = tl.program_id(0)
    channel = at % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    at = at // blocks_c
    j = at % blocks_j * BLOCK_J + tl.arange(0, BLOCK_J)
    at = at // blocks_j
    return j[:, None], channel[None, :], at % strips * ROWS, (at // strips).to(tl.int64) * H * W * C


@jit
def load_weights(weight, channel, C, FLIP: tl.constexpr):
    weights = ()
    for t in tl.static_range(9):
        w = tl.load(weight + channel * 9 + (8 - t if FLIP else t), mask=channel < C, other=0.0)
        weights = weights + (w.to(tl.float32),)
    return weights


@jit
def load_row(x, i, j, channel, H, W, C):
    """Row i of the map, each column with its left and right neighbour; zero beyond the edge."""
    at = (i * W + j) * C + channel
    inside = (channel < C) & (j < tl.where((i >= 0) & (i < H), W, 0))
    left = tl.load(x + at - C, mask=inside & (j > 0), other=0.0)
    middle = tl.load(x + at, mask=inside, other=0.0)
    right = tl.load(x + at + C, mask=inside & (j + 1 < W), other=0.0)
    return left.to(tl.float32), middle.to(tl.float32), right.to(tl.float32)


@jit
def conv_kernel(x, weight, bias, y, H, W, C, ROWS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
                TRANSPOSED: tl.constexpr):  # fmt: skip
    """x (B, H, W, C) -> y alike: SiLU(conv(x) + bias), or the transposed convolution alone."""
    j, channel, first, image = place_of(H, W, C, ROWS, BLOCK_J, BLOCK_C)
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = load_weights(weight, channel, C, TRANSPOSED)
    biases = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    x += image
    y += image
    above = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)  # what is there already of the row above the one at hand
    here = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)  # and of that one
    for i in range(first - 1, tl.minimum(first + ROWS, H) + 1):
        left, middle, right = load_row(x, i, j, channel, H, W, C)
        done = above + left * w6 + middle * w7 + right * w8
        above = here + left * w3 + middle * w4 + right * w5
        here = left * w0 + middle * w1 + right * w2
        if not TRANSPOSED:
            done += biases
            done *= sigmoid(done)
        mask = (channel < C) & (j < tl.where(i > first, W, 0))
        tl.store(y + ((i - 1) * W + j) * C + channel, done.to(y.dtype.element_ty), mask=mask)


@jit
def conv_backward_kernel(dy, x, weight, bias, ds, parts, H, W, C,
                         ROWS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """ds (B, H, W, C), the gradient before the SiLU; parts (strips of B and H, column blocks, 10 C), the sums of
    each for the weights (C, 9) and the biases (C)."""
    j, channel, first, image = place_of(H, W, C, ROWS, BLOCK_J, BLOCK_C)
    weights = load_weights(weight, channel, C, False)
    biases = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    dy += image
    x += image
    ds += image
    zeros = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)
    sums = (zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    dbias = zeros
    rows = load_row(x, first - 1, j, channel, H, W, C) + load_row(x, first, j, channel, H, W, C)
    for i in range(first, tl.minimum(first + ROWS, H)):
        rows = rows + load_row(x, i + 1, j, channel, H, W, C)
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
def gate_kernel(y, z, weight, bias, out, size, C, eps, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """out (size, C) = LN(y) SiLU(z)."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)
    mask = (row < size)[:, None] & (channel < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    normed, _ = normalise(y, at, mask, C, eps)
    w = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    v = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    value = (normed * w[None, :] + b[None, :]) * v * sigmoid(v)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@jit
def gate_backward_kernel(dout, y, z, weight, bias, dy, dz, parts, size, C, eps,
                         BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """dy, dz (size, C); parts (programs, 2, C), each program's sums for weight and bias."""
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
        v = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
        gate = sigmoid(v)
        gated = g * (normed * w + b) * gate * (1.0 + v * (1.0 - gate))
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


def padded(n):
    return 1 << (n - 1).bit_length()


def conv_blocks(shape, rows):
    """(programs, of them for one block of channels, constants) of the convolution of a (B, H, W, C) map."""
    B, H, W, C = shape
    BLOCK_J = min(16, padded(W))
    BLOCK_C = ELEMENTS // BLOCK_J
    strips = B * -(-H // rows) * -(-W // BLOCK_J)
    return strips * -(-C // BLOCK_C), strips, dict(ROWS=rows, BLOCK_J=BLOCK_J, BLOCK_C=BLOCK_C)


def gate_blocks(rows, C):
    """(programs that a forward takes, constants) of norm_gate: whole rows of C, GATE_ELEMENTS together."""
    BLOCK_C = padded(C)
    BLOCK_R = max(1, GATE_ELEMENTS // BLOCK_C)
    return -(-rows // BLOCK_R), dict(BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C)


# The backward ops give the gradients of their parameters as one tensor, since no two results of an op may
# share memory; what registers them takes it apart.

T = torch.Tensor


@torch.library.custom_op("vmrnn::conv_silu", mutates_args=())
def conv_silu(x: T, weight: T, bias: T) -> T:
    """As recompute.conv_silu; x fp32, bf16 or fp16, the weights in any of them."""
    x, weight, bias = (t.contiguous() for t in (x, weight, bias))
    y = torch.empty_like(x)
    programs, _, blocks = conv_blocks(x.shape, ROWS)
    with torch.cuda.device_of(x):
        conv_kernel[programs,](x, weight, bias, y, *x.shape[1:], TRANSPOSED=False, **blocks, **OPTIONS)
    return y


@torch.library.custom_op("vmrnn::conv_silu_backward", mutates_args=())
def conv_silu_backward_op(dy: T, x: T, weight: T, bias: T) -> tuple[T, T]:
    dy, x, weight, bias = (t.contiguous() for t in (dy, x, weight, bias))
    ds, dx = torch.empty_like(x), torch.empty_like(x)
    with torch.cuda.device_of(x):
        programs, strips, blocks = conv_blocks(x.shape, ROWS_BACK)
        parts = x.new_empty(strips, 10 * x.shape[-1], dtype=torch.float32)
        conv_backward_kernel[programs,](dy, x, weight, bias, ds, parts, *x.shape[1:], **blocks, **OPTIONS)
        programs, _, blocks = conv_blocks(x.shape, ROWS)
        conv_kernel[programs,](ds, weight, bias, dx, *x.shape[1:], TRANSPOSED=True, **blocks, **OPTIONS)
        return dx, parts.sum(0)


@torch.library.custom_op("vmrnn::norm_gate", mutates_args=())
def norm_gate(y: T, z: T, weight: T, bias: T, eps: float) -> T:
    """As recompute.norm_gate, but in z's type."""
    y, z, weight, bias = (t.contiguous() for t in (y, z, weight, bias))
    C = y.shape[-1]
    out = torch.empty_like(z)
    programs, blocks = gate_blocks(y.numel() // C, C)
    with torch.cuda.device_of(y):
        gate_kernel[programs,](y, z, weight, bias, out, y.numel() // C, C, eps, **blocks, **OPTIONS)
    return out


@torch.library.custom_op("vmrnn::norm_gate_backward", mutates_args=())
def norm_gate_backward_op(dout: T, y: T, z: T, weight: T, bias: T, eps: float) -> tuple[T, T, T]:
    dout, y, z, weight, bias = (t.contiguous() for t in (dout, y, z, weight, bias))
    C = y.shape[-1]
    dy, dz = torch.empty_like(y), torch.empty_like(z)
    programs, blocks = gate_blocks(y.numel() // C, C)
    programs = min(programs, GATE_PROGRAMS)
    parts = y.new_empty(programs, 2, C, dtype=torch.float32)
    with torch.cuda.device_of(y):
        gate_backward_kernel[programs,](
            dout, y, z, weight, bias, dy, dz, parts, y.numel() // C, C, eps, **blocks, **OPTIONS
        )
        return dy, dz, parts.sum(0)


def alike(t):
    return torch.empty_like(t, memory_format=torch.contiguous_format)


@conv_silu.register_fake
def _(x, weight, bias):
    return alike(x)


@conv_silu_backward_op.register_fake
def _(dy, x, weight, bias):
    return alike(x), x.new_empty(10 * x.shape[-1], dtype=torch.float32)


@norm_gate.register_fake
def _(y, z, weight, bias, eps):
    return alike(z)


@norm_gate_backward_op.register_fake
def _(dout, y, z, weight, bias, eps):
    return alike(y), alike(z), y.new_empty(2, y.shape[-1], dtype=torch.float32)


def keep_for_conv(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def keep_for_gate(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def conv_silu_gradients(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    dx, sums = conv_silu_backward_op(dy, x, weight, bias)
    dweight, dbias = sums.split((weight.numel(), bias.numel()))
    return dx, dweight.view(weight.shape).to(weight.dtype), dbias.to(bias.dtype)


def norm_gate_gradients(ctx, dout):
    y, z, weight, bias = ctx.saved_tensors
    dy, dz, sums = norm_gate_backward_op(dout, y, z, weight, bias, ctx.eps)
    return dy, dz, sums[0].to(weight.dtype), sums[1].to(bias.dtype), None


conv_silu.register_autograd(conv_silu_gradients, setup_context=keep_for_conv)
norm_gate.register_autograd(norm_gate_gradients, setup_context=keep_for_gate)
