"""The layers of fused.py as Triton kernels: fewer launches and less memory traffic (counted in vmrnn/scan/README.md).

fused.py says what each layer computes. All arithmetic is fp32, whatever the dtypes in memory. Only the inputs are saved
for the backward pass, as in fused.py. Each program makes its share of a sum over positions, and torch adds the shares
in a fixed order. There are no atomics, so results repeat bit for bit. Networks use these kernels if their scan is
Triton's (kernels.py).
"""

# Annotations stay text, so that this file can be imported where Triton is not installed.
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmrnn.network.fused import once_differentiable, product_dtype
from vmrnn.scan.triton_kernels import jit, tl
from vmrnn.scan.triton_scan import padded

# These sizes were chosen by the registers and spills of the compiled kernels. No GPU has timed them yet.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
ELEMENTS = 512  # elements of one row of the map per program of the convolution: 4 per thread
ROWS = 8  # rows of the map per program of the convolution
ROWS_BACKWARD = 16  # the same in the backward; more, since every program leaves ten sums per channel
NORM_ELEMENTS = 1024  # elements per program of the norms and of the cell's gate
NORM_PROGRAMS = 512  # at most, for the backward of the norms, whose programs loop: about four per SM of an H200


@jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * v))


# A program of the convolution owns some columns and channels and walks down ROWS rows. It loads a row once, with its
# left and right neighbours, and uses it for the three rows that it is a neighbour of.


@jit
def share_of_map(H, W, C, ROWS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr):
    """What this program computes: (columns, channels, first row, number of positions before its image).

    Programs with neighbouring numbers have the same columns and other channels.
    """
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
    """Row i of the map: left neighbours, the row itself, right neighbours. Zero beyond the edge."""
    at = (i * W + j) * step + channel
    inside = (channel < C) & (j < tl.where((i >= 0) & (i < H), W, 0))
    left = tl.load(x + at - step, mask=inside & (j > 0), other=0.0)
    middle = tl.load(x + at, mask=inside, other=0.0)
    right = tl.load(x + at + step, mask=inside & (j + 1 < W), other=0.0)
    return left.to(tl.float32), middle.to(tl.float32), right.to(tl.float32)


@jit
def conv_kernel(
    # Pointers
    x,
    weight,
    bias,
    y,
    # Sizes
    step,
    H,
    W,
    C,
    # Layout
    ROWS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    # Variants
    TRANSPOSED: tl.constexpr,
):
    """y = SiLU(conv(x) + bias), or with TRANSPOSED the transposed convolution alone. x (B, H, W, C), y contiguous.

    step  elements from one position of x to the next
    """
    j, channel, first, image = share_of_map(H, W, C, ROWS, BLOCK_J, BLOCK_C)
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = load_weights(weight, channel, C, TRANSPOSED)
    biases = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    x += image * step
    y += (image + (first - 2) * W + j) * C + channel  # two rows above the first: a row of y is complete one row later
    above = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)  # the sum so far of the row of y above row i
    here = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)  # the sum so far of row i of y
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
def conv_backward_kernel(
    # Inputs
    dy,
    x,
    weight,
    bias,
    # Results
    ds,
    partial,
    # Sizes
    step,
    H,
    W,
    C,
    # Layout
    ROWS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient before the SiLU, and this program's share of the gradients of weight and bias.

    ds       (B, H, W, C)
    partial  (strips of rows over the batch, blocks of columns, 10 C): sums for the weights (C, 9), then the biases (C)
    """
    j, channel, first, image = share_of_map(H, W, C, ROWS, BLOCK_J, BLOCK_C)
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
    partial += tl.program_id(0) // ((C + BLOCK_C - 1) // BLOCK_C) * 10 * C
    channel = tl.ravel(channel)
    for t in tl.static_range(9):
        tl.store(partial + channel * 9 + t, tl.sum(sums[t], 0), mask=channel < C)
    tl.store(partial + 9 * C + channel, tl.sum(dbias, 0), mask=channel < C)


@jit
def normalise(y, at, mask, C, eps):
    """(y minus the mean of its row, divided by the row's deviation; one divided by the deviation)."""
    v = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, v - (tl.sum(v, 1) / C)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * scale[:, None], scale


@jit
def norm_kernel(
    # Pointers
    y,
    z,
    weight,
    bias,
    out,
    # Sizes
    size,
    C,
    step,
    eps,
    # Layout
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    # Variants
    GATED: tl.constexpr,
):
    """out = LN(y), with GATED times SiLU(z). y and out (size, C).

    step  elements from one row of z to the next
    """
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
def norm_backward_kernel(
    # Inputs
    dout,
    y,
    z,
    weight,
    bias,
    # Results
    dy,
    dz,
    out,
    partial,
    # Sizes
    size,
    C,
    step,
    eps,
    # Layout
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    # Variants
    GATED: tl.constexpr,
):
    """dy, with GATED also dz and the forward's out, and this program's share of the gradients of weight and bias.

    dy, dz, out  (size, C)
    partial      (programs, 2, C)
    """
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
            g *= v * gate  # the gradient of the norm's output
        dweight += g * normed
        dbias += g
        g *= w
        g -= (tl.sum(g, 1) / C)[:, None] + normed * (tl.sum(g * normed, 1) / C)[:, None]
        tl.store(dy + at, (g * scale[:, None]).to(dy.dtype.element_ty), mask=mask)
    partial += tl.program_id(0) * 2 * C + channel
    tl.store(partial, tl.sum(dweight, 0), mask=channel < C)
    tl.store(partial + C, tl.sum(dbias, 0), mask=channel < C)


@jit
def tanh(v):
    by_exp = 2.0 * sigmoid(2.0 * v) - 1.0  # loses all digits near 0
    square = v * v
    series = v + v * square * (-0.333333333 + square * (0.133333333 - square * 0.053968254))
    return tl.where(square < 0.04, series, by_exp)


@jit
def cell_gate_kernel(o, c, h, after, size, BLOCK: tl.constexpr):
    """h and `after`, the new c, of fused.cell_gate. All tensors have `size` elements and are contiguous."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(o + at, mask=at < size, other=0.0).to(tl.float32)
    f = sigmoid(v)
    state = f * (tl.load(c + at, mask=at < size, other=0.0).to(tl.float32) + tanh(v))
    tl.store(h + at, (f * tanh(state)).to(h.dtype.element_ty), mask=at < size)
    tl.store(after + at, state.to(after.dtype.element_ty), mask=at < size)


@jit
def cell_gate_backward_kernel(dh, dafter, o, c, do, dc, size, BLOCK: tl.constexpr):
    """The gradients of o and c from those of h and of the new c."""
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
    """(number of programs, programs per block of channels, layout) of the convolution of a (B, H, W, C) map."""
    B, H, W, C = shape
    BLOCK_J = min(16, padded(W))
    BLOCK_C = ELEMENTS // BLOCK_J
    strips = B * -(-H // rows) * -(-W // BLOCK_J)
    return strips * -(-C // BLOCK_C), strips, dict(ROWS=rows, BLOCK_J=BLOCK_J, BLOCK_C=BLOCK_C)


def norm_blocks(rows, C):
    """(number of programs of a forward, layout) of the norms. A program has whole rows, NORM_ELEMENTS in all."""
    BLOCK_C = padded(C)
    BLOCK_R = max(1, NORM_ELEMENTS // BLOCK_C)
    return -(-rows // BLOCK_R), dict(BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C)


def stepped(t):
    """(t (..., C) with one axis of positions, elements from one position to the next).

    It is copied only if that step is not constant. The half of a product's columns is not copied.
    """
    flat = t.flatten(0, -2)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    return flat, flat.stride(0)


# A backward op returns the gradients of all its parameters as one tensor, since two results of an op must not share
# memory. The functions that register the gradients split it.


@torch.library.custom_op("vmrnn::conv_silu", mutates_args=())
def conv_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See fused.conv_silu. x and the parameters may be fp32, bf16 or fp16, each on its own."""
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
        programs, strips, blocks = conv_blocks(x.shape, ROWS_BACKWARD)
        partial = x.new_empty(strips, 10 * x.shape[-1], dtype=torch.float32)
        conv_backward_kernel[programs,](dy, flat, weight, bias, ds, partial, step, *x.shape[1:], **blocks, **OPTIONS)
        programs, _, blocks = conv_blocks(x.shape, ROWS)
        conv_kernel[programs,](ds, weight, bias, dx, x.shape[-1], *x.shape[1:], TRANSPOSED=True, **blocks, **OPTIONS)
        return dx, partial.sum(0)


def launch_norm(y, z, weight, bias, out, eps):
    """out = LN(y), times SiLU(z) if z is given."""
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
    """dy, the gradients of weight and bias (2, C), and if z is given also dz and the forward's out."""
    dout, y, weight, bias = (t.contiguous() for t in (dout, y, weight, bias))
    flat, step = (y, 0) if z is None else stepped(z)
    dy = alike(y)
    dz, out = (dy, dy) if z is None else (alike(z), alike(z))
    C = y.shape[-1]
    programs, blocks = norm_blocks(y.numel() // C, C)
    programs = min(programs, NORM_PROGRAMS)
    partial = y.new_empty(programs, 2, C, dtype=torch.float32)
    with torch.cuda.device_of(y):
        norm_backward_kernel[programs,](
            dout, y, flat, weight, bias, dy, dz, out, partial, y.numel() // C, C, step, eps,
            GATED=z is not None, **blocks, **OPTIONS,
        )  # fmt: skip
        return dy, partial.sum(0), dz, out


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
    """See fused.cell_gate."""
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
    """An empty contiguous tensor of t's shape."""
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)


def sums(t, *shape):
    """An empty fp32 tensor on t's device, for sums over positions."""
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
    """See fused.norm."""
    return norm_op(x, weight, bias, eps, product_dtype(x))


def in_proj(u, weight):
    """See fused.in_proj. One product: the kernels take its halves without a copy."""
    return F.linear(u, weight).chunk(2, -1)


def norm_gate_linear(y, z, norm_weight, norm_bias, eps, weight):
    """See fused.norm_gate_linear. The product has z's dtype."""
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
