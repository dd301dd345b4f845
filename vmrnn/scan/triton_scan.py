"""The 2-D selective scan on CUDA: Triton kernels, forward and backward, fused over the four directions.

Layout, recurrences, counts and register use: README.md beside this file. In short: a program is one
warp and owns one batch item, one direction and BLOCK_D channels. It walks the channels-last map in
its direction's order with the state in registers, in fp32. What several programs add to is written
once per program and added by `sum_kernel` in a fixed order: no atomics, so results repeat bit for bit.
"""

import torch
from torch import Tensor

from vmrnn.scan.op import call, connect
from vmrnn.scan.reference import DIRECTIONS
from vmrnn.scan.triton_kernels import (
    backward_kernel,
    chain_kernel,
    ends_kernel,
    forward_kernel,
    sum_kernel,
    triton,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The sizes below were chosen by counting instructions of compiled kernels. No GPU has timed them yet.
CHUNK = 128  # steps between the states that the forward keeps for the backward
STEPS = 2  # of the forward, loaded together
STEPS_BACK = 4  # of the backward, whose states are in registers together; it divides CHUNK
MAX_RANK_INSIDE = 16  # up to which the forward kernel makes the step sizes from their low rank
# Where there are few channels and batch items the sequence is split, too.
WARPS = 1056  # that a launch would have: two for each of an H200's 528 schedulers
SHORTEST, MOST = 32, 32  # steps of a part of the sequence, and parts, whose ends a lane holds together
WORTH, WORTH_BACK = 4, 2  # parts from which it pays: their ends cost a forward again, a fifth of a backward
CHAIN_BLOCK = 128
SUM_BLOCK = 1024
# One warp meets no barrier of others and leaves more programs. FMA is Triton's default up to 3.9 only.
OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}
SUM_OPTIONS = OPTIONS | {"num_warps": 4}

INSTALL = "pip install triton (torch's CUDA builds for Linux bring it)"
OLDEST = (3, 3)
UPDATE = "pip install --upgrade torch (2.7 and newer bring 3.3 and newer)"


def triton_version():
    return tuple(map(int, triton.__version__.split(".")[:2]))


def can_run(device, dtype, d_state):
    if device != "cuda":
        return False, f"the Triton kernels run on CUDA only, the device is {device}"
    if triton is None:
        return False, f"Triton is not installed: {INSTALL}"
    if triton_version() < OLDEST:
        return False, f"Triton {triton.__version__} cannot compile functions that return tuples: {UPDATE}"
    if not torch.cuda.is_available():
        return False, "torch finds no CUDA GPU"
    if dtype not in DTYPES:
        return False, f"{dtype} is not supported: convert to float32"
    if d_state > 64:
        return False, f"the state of a warp's channels would not fit its registers: d_state up to 64, got {d_state}"
    return True, f"fused Triton kernels, Triton {triton.__version__}"


def add_up(parts, dtype):
    """The sum over the first axis, which the kernels leave to be done in a fixed order."""
    total = parts.new_empty(parts.shape[1:], dtype=dtype)
    size = total.numel()
    grid = (-(-size // SUM_BLOCK),)
    sum_kernel[grid](parts, total, size, PARTS=len(parts), BLOCK=SUM_BLOCK, **SUM_OPTIONS)
    return total


def padded(n):
    """The next power of two, n if it is one."""
    return 1 << (n - 1).bit_length()


def split(n):
    """An axis of n, padded to a power of two, as (the rest, up to four neighbours)."""
    return padded(n) // min(padded(n), 4), min(padded(n), 4)


def forward_blocks(N, R):
    spread = N > 32  # the states of a channel would not fit a lane
    order = -1 if spread else 1
    RR, RT = split(R)[::order]
    NR, NT = split(N)[::order]
    shape = dict(BLOCK_D=8 if spread else 32, RR=RR, RT=RT, NR=NR, NT=NT, SPREAD=spread)
    return shape | dict(STEPS=STEPS, PROJECT=R <= MAX_RANK_INSIDE)


def backward_blocks(N):
    NT, NR = split(N)
    return dict(BLOCK_D=32 if N <= 16 else 8, NR=NR, NT=NT, STEPS=STEPS_BACK if N <= 32 else 2)


def part_length(x, BLOCK_D, worth):
    """Steps that a program walks, a power of two: all of them, or so few that WARPS programs have work, if that makes
    `worth` parts of the sequence."""
    B, H, W, Di = x.shape
    parts = min(WARPS // (B * DIRECTIONS * -(-Di // BLOCK_D)), H * W // SHORTEST, MOST)
    return padded(max(-(-H * W // (parts if parts >= worth else 1)), SHORTEST))


def lengths(x, N, R):
    """(steps of a program of the forward, of the backward, between the states kept for the backward): powers of two, so
    that the states before all parts are among those kept."""
    forward = part_length(x, forward_blocks(N, R)["BLOCK_D"], WORTH)
    backward = part_length(x, backward_blocks(N)["BLOCK_D"], WORTH_BACK)
    return forward, backward, min(forward, backward, CHUNK)


def checkpoint_shape(x, A_log, dt_weight):
    B, H, W, Di = x.shape
    N = A_log.shape[-1]
    return DIRECTIONS, B, (H * W - 1) // lengths(x, N, dt_weight.shape[-1])[2], Di, N


def ends_of_parts(source, dbl, raw, dt_weight, dt_bias, A_log, ends, part, chunk, blocks, back):
    """The state before each part of `part` steps but the first, written to ends (K, B, slots, Di, N), one slot for
    `chunk` steps; back: the gradient of the state after each part but the last."""
    B, H, W, Di = source.shape
    K, _, N = A_log.shape
    parts = (H * W - 1) // part
    totals = ends.new_empty(K, B, parts, Di)
    ends_kernel[-(-Di // blocks["BLOCK_D"]), B * K, parts](
        source, dbl, raw, dt_weight, dt_bias, A_log, ends, totals, B, Di,
        H=H, W=W, N=N, R=dt_weight.shape[-1], PART=part, STRIDE=part // chunk, SLOTS=ends.shape[2],
        BACK=back, **blocks, **OPTIONS,
    )  # fmt: skip
    chain_kernel[-(-Di * N // CHAIN_BLOCK), B * K](
        ends, totals, A_log, B, Di, N=N, PARTS=parts, STRIDE=part // chunk, SLOTS=ends.shape[2], BLOCK=CHAIN_BLOCK,
        BACK=back, **SUM_OPTIONS,
    )  # fmt: skip


def raw_step_sizes(dbl, dt_weight, dt_bias):
    """Step sizes before softplus, (K, B L, Di) in fp32, and the low rank they are made from, (K, B L, R)."""
    K, _, R = dt_weight.shape
    low = dbl.view(-1, K, dbl.shape[-1])[..., :R].transpose(0, 1)
    return torch.baddbmm(dt_bias.float()[:, None], low, dt_weight.float().mT), low


@torch.library.custom_op("vmrnn::scan_triton", mutates_args=())
def scan_op(
    x: Tensor, dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    """y, and for the backward (if save) the state before every chunk but the first."""
    x, dbl, dt_weight, dt_bias, A_log, D = (t.contiguous() for t in (x, dbl, dt_weight, dt_bias, A_log, D))
    B, H, W, Di = x.shape
    K, _, N = A_log.shape
    R = dt_weight.shape[-1]
    dbl = dbl.float()  # once; in the kernel every block of channels would convert it again
    blocks = forward_blocks(N, R)
    part, _, chunk = lengths(x, N, R)
    chunk = chunk if save else part
    ys = x.new_empty(K, B, H * W, Di, dtype=torch.float32)
    checkpoints = x.new_empty(K, B, (H * W - 1) // chunk, Di, N, dtype=torch.float32)
    # Autocast would make the product of the step sizes in bf16.
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        raw = ys if blocks["PROJECT"] else raw_step_sizes(dbl, dt_weight, dt_bias)[0]  # ys: not read
        if part < H * W:
            ends_of_parts(x, dbl, raw, dt_weight, dt_bias, A_log, checkpoints, part, chunk, blocks, back=False)
        forward_kernel[-(-Di // blocks["BLOCK_D"]), B * K, -(-H * W // part)](
            x, dbl, raw, dt_weight, dt_bias, A_log, D, ys, checkpoints, B, Di,
            H=H, W=W, N=N, R=R, PART=part, CHUNK=chunk, SAVE=save, **blocks, **OPTIONS,
        )  # fmt: skip
        return add_up(ys, x.dtype).view(B, H, W, Di), checkpoints if save else checkpoints.new_empty(0)


@scan_op.register_fake
def _(x, dbl, dt_weight, dt_bias, A_log, D, save):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(checkpoint_shape(x, A_log, dt_weight) if save else 0, dtype=torch.float32)


@torch.library.custom_op("vmrnn::scan_triton_backward", mutates_args=())
def scan_backward_op(
    dy: Tensor,
    x: Tensor,
    dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy, x, dbl, dt_weight, dt_bias, A_log, D = (t.contiguous() for t in (dy, x, dbl, dt_weight, dt_bias, A_log, D))
    B, H, W, Di = x.shape
    K, _, N = A_log.shape
    R = dt_weight.shape[-1]
    blocks = backward_blocks(N)
    _, part, chunk = lengths(x, N, R)
    parts = -(-H * W // part)
    grid = -(-Di // blocks["BLOCK_D"]), B * K, parts
    dbl_dtype = dbl.dtype

    def empty(*shape):
        return x.new_empty(shape, dtype=torch.float32)

    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        dbl = dbl.float()
        raw, low = raw_step_sizes(dbl, dt_weight, dt_bias)
        dx, dbc = empty(K, B, H, W, Di), empty(grid[0], B, H, W, K, 2 * N)
        dA_log, dD, dbias = empty(parts * B, K, Di, N), empty(parts * B, K, Di), empty(parts * B, K, Di)
        scratch = empty(parts, K, B, chunk // blocks["STEPS"], Di, N)
        starts = empty(K, B, parts - 1, Di, N)
        if parts > 1:
            shape = forward_blocks(N, R) | dict(PROJECT=False)
            ends_of_parts(dy, dbl, raw, dt_weight, dt_bias, A_log, starts, part, part, shape, back=True)
        backward_kernel[grid](
            dy, x, dbl, raw, A_log, D, checkpoints, starts, scratch, dx, dbc, dA_log, dD, dbias, B, Di,
            H=H, W=W, N=N, R=R, PART=part, CHUNK=chunk, **blocks, **OPTIONS,
        )  # fmt: skip
        draw = raw  # the kernel has put its gradient there
        dlow = torch.bmm(draw, dt_weight.float()).view(K, B, H, W, R).movedim(0, 3)
        dweight = torch.bmm(draw.mT, low)
        return (
            add_up(dx, x.dtype),
            torch.cat((dlow, add_up(dbc, torch.float32)), -1).to(dbl_dtype),
            dweight.to(dt_weight.dtype),
            add_up(dbias, dt_bias.dtype),
            add_up(dA_log, A_log.dtype),
            add_up(dD, D.dtype),
        )


connect(scan_op, scan_backward_op)


def scan_2d(x, dbl, dt_weight, dt_bias, A_log, D):
    """As reference.scan_2d; fp32 arithmetic whatever the inputs' types, y in x's type."""
    return call(scan_op, x, dbl, dt_weight, dt_bias, A_log, D)
