"""conv_silu and norm_gate of recompute.py as Triton kernels: one launch forward instead of two and five,
and a few backward.

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
CHANNELS = 32  # of a program of the convolution: 64 bytes of a bf16 map
POSITIONS = 32  # of a program of the convolution
POSITIONS_BACK = 16  # 4 values a thread, of which it keeps nine taps and adds up ten sums
ELEMENTS = 1024  # of a program of norm_gate
PROGRAMS = 512  # of a backward, which loop over what there is: about four for each of an H200's 132 SMs


@jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * v))


@jit
def tap(x, position, channel, mask, i, j, H, W, C, DI: tl.constexpr, DJ: tl.constexpr):
    """The map at (DI, DJ) from each position, zero beyond the edge: [positions, channels] in fp32."""
    inside = (i + DI >= 0) & (i + DI < H) & (j + DJ >= 0) & (j + DJ < W)
    at = (position + DI * W + DJ).to(tl.int64)[:, None] * C + channel[None, :]
    return tl.load(x + at, mask=mask & inside[:, None], other=0.0).to(tl.float32)


@jit
def convolve(x, weight, position, channel, mask, H, W, C, FLIP: tl.constexpr):
    """Depthwise 3x3 cross-correlation, or (FLIP) its transpose; and the nine taps."""
    i = position // W % H
    j = position % W
    total = tl.zeros(mask.shape, tl.float32)
    taps = ()
    for t in tl.static_range(9):
        v = tap(x, position, channel, mask, i, j, H, W, C, t // 3 - 1, t % 3 - 1)
        w = tl.load(weight + channel * 9 + (8 - t if FLIP else t), mask=channel < C, other=0.0).to(tl.float32)
        total += v * w[None, :]
        taps = taps + (v,)
    return total, taps


@jit
def conv_kernel(x, weight, bias, y, size, H, W, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                BACK: tl.constexpr):  # fmt: skip
    """x (size = B H W, C) -> y alike: SiLU(conv(x) + bias), or (BACK) the transposed convolution."""
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (position < size)[:, None] & (channel < C)[None, :]
    total, _ = convolve(x, weight, position, channel, mask, H, W, C, BACK)
    if not BACK:
        total += tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
        total *= sigmoid(total)
    at = position.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)


@jit
def conv_backward_kernel(dy, x, weight, bias, ds, parts, size, H, W, C,
                         BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """ds (size, C), the gradient before the SiLU; parts (programs, 10, C), each program's sums for the nine
    weights and the bias of a channel."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    biases = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    sums = ()
    for _ in tl.static_range(10):
        sums = sums + (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),)
    for first in range(tl.program_id(0) * BLOCK_P, size, tl.num_programs(0) * BLOCK_P):
        position = first + tl.arange(0, BLOCK_P)
        mask = (position < size)[:, None] & (channel < C)[None, :]
        at = position.to(tl.int64)[:, None] * C + channel[None, :]
        s, taps = convolve(x, weight, position, channel, mask, H, W, C, False)
        s += biases[None, :]
        gate = sigmoid(s)
        g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        g *= gate * (1.0 + s * (1.0 - gate))
        tl.store(ds + at, g.to(ds.dtype.element_ty), mask=mask)
        new = ()
        for t in tl.static_range(9):
            new = new + (sums[t] + g * taps[t],)
        sums = new + (sums[9] + g,)
    parts += tl.program_id(0) * 10 * C
    for t in tl.static_range(10):
        tl.store(parts + t * C + channel, tl.sum(sums[t], 0), mask=channel < C)


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


def blocks_of_rows(size, C):
    """(programs that a forward takes, constants) of norm_gate: whole rows, ELEMENTS together."""
    BLOCK_C = padded(C)
    BLOCK_R = max(1, ELEMENTS // BLOCK_C)
    return -(-size // BLOCK_R), dict(BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C)


T = torch.Tensor


@torch.library.custom_op("vmrnn::conv_silu", mutates_args=())
def conv_silu_op(x: T, weight: T, bias: T) -> T:
    x, weight, bias = (t.contiguous() for t in (x, weight, bias))
    B, H, W, C = x.shape
    y = torch.empty_like(x)
    grid = (-(-B * H * W // POSITIONS), -(-C // CHANNELS))
    with torch.cuda.device_of(x):
        conv_kernel[grid](x, weight, bias, y, B * H * W, H, W, C,
                          BLOCK_P=POSITIONS, BLOCK_C=CHANNELS, BACK=False, **OPTIONS)  # fmt: skip
    return y


@torch.library.custom_op("vmrnn::conv_silu_backward", mutates_args=())
def conv_silu_backward_op(dy: T, x: T, weight: T, bias: T) -> tuple[T, T, T]:
    dy, x, weight, bias = (t.contiguous() for t in (dy, x, weight, bias))
    B, H, W, C = x.shape
    size, channels = B * H * W, -(-C // CHANNELS)
    programs = min(-(-size // POSITIONS_BACK), max(1, PROGRAMS // channels))
    ds, dx = torch.empty_like(x), torch.empty_like(x)
    parts = x.new_empty(programs, 10, C, dtype=torch.float32)
    with torch.cuda.device_of(x):
        conv_backward_kernel[programs, channels](dy, x, weight, bias, ds, parts, size, H, W, C,
                                                 BLOCK_P=POSITIONS_BACK, BLOCK_C=CHANNELS, **OPTIONS)  # fmt: skip
        conv_kernel[-(-size // POSITIONS), channels](ds, weight, bias, dx, size, H, W, C,
                                                     BLOCK_P=POSITIONS, BLOCK_C=CHANNELS, BACK=True, **OPTIONS)  # fmt: skip
    sums = parts.sum(0)
    return dx, sums[:9].mT.contiguous().view_as(weight).to(weight.dtype), sums[9].to(bias.dtype)


@torch.library.custom_op("vmrnn::norm_gate", mutates_args=())
def norm_gate_op(y: T, z: T, weight: T, bias: T, eps: float) -> T:
    y, z, weight, bias = (t.contiguous() for t in (y, z, weight, bias))
    C = y.shape[-1]
    out = torch.empty_like(z)
    programs, blocks = blocks_of_rows(y.numel() // C, C)
    with torch.cuda.device_of(y):
        gate_kernel[programs,](y, z, weight, bias, out, y.numel() // C, C, eps, **blocks, **OPTIONS)
    return out


@torch.library.custom_op("vmrnn::norm_gate_backward", mutates_args=())
def norm_gate_backward_op(dout: T, y: T, z: T, weight: T, bias: T, eps: float) -> tuple[T, T, T, T]:
    dout, y, z, weight, bias = (t.contiguous() for t in (dout, y, z, weight, bias))
    C = y.shape[-1]
    dy, dz = torch.empty_like(y), torch.empty_like(z)
    programs, blocks = blocks_of_rows(y.numel() // C, C)
    programs = min(programs, PROGRAMS)
    parts = y.new_empty(programs, 2, C, dtype=torch.float32)
    with torch.cuda.device_of(y):
        gate_backward_kernel[programs,](
            dout, y, z, weight, bias, dy, dz, parts, y.numel() // C, C, eps, **blocks, **OPTIONS
        )
    dweight, dbias = parts.sum(0)
    return dy, dz, dweight.to(weight.dtype, copy=True), dbias.to(bias.dtype, copy=True)  # no two share memory


def new_like(tensors):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


conv_silu_op.register_fake(lambda x, weight, bias: new_like([x])[0])
conv_silu_backward_op.register_fake(lambda dy, *inputs: new_like(inputs))
conv_silu_op.register_autograd(
    lambda ctx, dy: conv_silu_backward_op(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
norm_gate_op.register_fake(lambda y, z, weight, bias, eps: new_like([z])[0])
norm_gate_backward_op.register_fake(lambda dout, *inputs: new_like(inputs[:-1]))


def keep_for_gate(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


norm_gate_op.register_autograd(
    lambda ctx, dout: (*norm_gate_backward_op(dout, *ctx.saved_tensors, ctx.eps), None), setup_context=keep_for_gate
)


def conv_silu(x, weight, bias):
    """As recompute.conv_silu; x fp32, bf16 or fp16, the weights in any of them."""
    return conv_silu_op(x, weight, bias)


def norm_gate(y, z, weight, bias, eps):
    """As recompute.norm_gate, but in z's type."""
    return norm_gate_op(y, z, weight, bias, eps)
