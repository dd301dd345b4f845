"""The 2-D selective scan on CUDA: Triton kernels, forward and backward, fused over the four directions.

Layout, recurrences and memory: README.md beside this file. In short: a program is one warp and owns one batch item, one
direction and BLOCK_D channels. It walks the channels-last map in the order of its direction, with the state in fp32 in
registers. Where several programs add to a value, each writes its own share, and `sum_kernel` adds the shares in a fixed
order. There are no atomics, so results repeat bit for bit.
"""

import torch
from torch import Tensor

from vmrnn.scan.op import call, connect
from vmrnn.scan.reference import DIRECTIONS
from vmrnn.scan.triton_kernels import (
    backward_kernel,
    chain_kernel,
    forward_kernel,
    segment_ends_kernel,
    sum_kernel,
    triton,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# These sizes were chosen by counting instructions of the compiled kernels. No GPU has timed them yet.
CHUNK = 128  # steps between the states that the forward keeps for the backward
STEPS = 2  # steps of the forward that are loaded together
STEPS_BACKWARD = 4  # steps of the backward whose states are in registers together; divides CHUNK
MAX_RANK_INSIDE = 16  # up to this rank the forward kernel makes the step sizes from their low rank

# With few channels and batch items, the sequence is split into segments that run at the same time.
WARPS = 1056  # wanted per launch: two for each of the 528 schedulers of an H200
SHORTEST_SEGMENT = 32  # steps
MOST_SEGMENTS = 32  # a lane of chain_kernel holds the ends of all of them
SEGMENTS_WORTH = 4  # fewer are not worth it: finding their ends costs a second forward
SEGMENTS_WORTH_BACKWARD = 2  # here it costs a fifth of a backward

CHAIN_BLOCK = 128  # states per program of chain_kernel
SUM_BLOCK = 1024  # elements per program of sum_kernel

# One warp per program needs no barriers between warps and leaves more programs. Newer Triton than 3.9 fuses
# multiply-adds only if told to.
OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}
SUM_OPTIONS = OPTIONS | {"num_warps": 4}

INSTALL = "pip install triton (torch's CUDA builds for Linux bring it)"
OLDEST = (3, 3)
UPDATE = "pip install --upgrade torch (2.7 and newer bring 3.3 and newer)"


def triton_version():
    """(major, minor) of the installed Triton."""
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


def add_up(partial, dtype):
    """The sum over the first axis, in order."""
    total = partial.new_empty(partial.shape[1:], dtype=dtype)
    size = total.numel()
    grid = (-(-size // SUM_BLOCK),)
    sum_kernel[grid](partial, total, size, COUNT=len(partial), BLOCK=SUM_BLOCK, **SUM_OPTIONS)
    return total


def padded(n):
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def split(n):
    """An axis of n, padded to a power of two, as (number of groups, up to four neighbours per group)."""
    return padded(n) // min(padded(n), 4), min(padded(n), 4)


def forward_blocks(N, R):
    """The constants that lay out the forward kernel, for N states and rank R."""
    lanes_share = N > 32  # the states of a channel would not fit into the registers of one lane
    order = -1 if lanes_share else 1
    R_FIRST, R_LAST = split(R)[::order]
    N_FIRST, N_LAST = split(N)[::order]
    return dict(
        BLOCK_D=8 if lanes_share else 32,
        R_FIRST=R_FIRST,
        R_LAST=R_LAST,
        N_FIRST=N_FIRST,
        N_LAST=N_LAST,
        LANES_SHARE=lanes_share,
        STEPS=STEPS,
        PROJECT_DT=R <= MAX_RANK_INSIDE,
    )


def backward_blocks(N):
    """The constants that lay out the backward kernel, for N states."""
    N_LAST, N_FIRST = split(N)
    return dict(BLOCK_D=32 if N <= 16 else 8, N_FIRST=N_FIRST, N_LAST=N_LAST, STEPS=STEPS_BACKWARD if N <= 32 else 2)


def segment_length(x, BLOCK_D, worth):
    """Steps per program, a power of two.

    x         (B, H, W, Di)
    BLOCK_D   channels per program
    worth     number of segments from which splitting the sequence pays

    The sequence is split if its programs are so few that WARPS leaves room for `worth` segments or more.
    """
    B, H, W, Di = x.shape
    segments = min(WARPS // (B * DIRECTIONS * -(-Di // BLOCK_D)), H * W // SHORTEST_SEGMENT, MOST_SEGMENTS)
    return padded(max(-(-H * W // (segments if segments >= worth else 1)), SHORTEST_SEGMENT))


def lengths(x, N, R):
    """Steps (per program of the forward, per program of the backward, between the states kept for the backward).

    All three are powers of two, so the states before all segments are among those that are kept.
    """
    forward = segment_length(x, forward_blocks(N, R)["BLOCK_D"], SEGMENTS_WORTH)
    backward = segment_length(x, backward_blocks(N)["BLOCK_D"], SEGMENTS_WORTH_BACKWARD)
    return forward, backward, min(forward, backward, CHUNK)


def checkpoint_shape(x, A_log, dt_weight):
    """Shape of the states before every chunk but the first: (K, B, chunks - 1, Di, N)."""
    B, H, W, Di = x.shape
    N = A_log.shape[-1]
    return DIRECTIONS, B, (H * W - 1) // lengths(x, N, dt_weight.shape[-1])[2], Di, N


def find_segment_ends(source, dbl, raw, dt_weight, dt_bias, A_log, ends, segment, chunk, blocks, backward):
    """Write the state before every segment but the first to `ends` (K, B, slots, Di, N).

    With `backward` it is the gradient of the state after every segment but the last.

    source   x, with `backward` dy
    raw      step sizes before softplus, where the kernel does not make them
    segment  steps per segment
    chunk    steps per slot
    blocks   layout of the kernel
    """
    B, H, W, Di = source.shape
    K, _, N = A_log.shape
    count = (H * W - 1) // segment
    totals = ends.new_empty(K, B, count, Di)
    sizes = dict(STRIDE=segment // chunk, SLOTS=ends.shape[2], BACKWARD=backward)
    segment_ends_kernel[-(-Di // blocks["BLOCK_D"]), B * K, count](
        source, dbl, raw, dt_weight, dt_bias, A_log, ends, totals, B, Di,
        H=H, W=W, N=N, R=dt_weight.shape[-1], SEGMENT=segment, **sizes, **blocks, **OPTIONS,
    )  # fmt: skip
    chain_kernel[-(-Di * N // CHAIN_BLOCK), B * K](
        ends, totals, A_log, B, Di, N=N, SEGMENTS=count, BLOCK=CHAIN_BLOCK, **sizes, **SUM_OPTIONS
    )


def raw_step_sizes(dbl, dt_weight, dt_bias):
    """Step sizes before softplus (K, B L, Di) in fp32, and the low rank (K, B L, R) that they are made from."""
    K, _, R = dt_weight.shape
    low = dbl.view(-1, K, dbl.shape[-1])[..., :R].transpose(0, 1)
    return torch.baddbmm(dt_bias.float()[:, None], low, dt_weight.float().mT), low


@torch.library.custom_op("vmrnn::scan_triton", mutates_args=())
def scan_op(
    x: Tensor, dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    """y, and the state before every chunk but the first for the backward (empty unless `save`)."""
    x, dbl, dt_weight, dt_bias, A_log, D = (t.contiguous() for t in (x, dbl, dt_weight, dt_bias, A_log, D))
    B, H, W, Di = x.shape
    K, _, N = A_log.shape
    R = dt_weight.shape[-1]
    dbl = dbl.float()  # once here; every block of channels would convert it again in the kernel
    blocks = forward_blocks(N, R)
    segment, _, chunk = lengths(x, N, R)
    chunk = chunk if save else segment
    ys = x.new_empty(K, B, H * W, Di, dtype=torch.float32)
    checkpoints = x.new_empty(K, B, (H * W - 1) // chunk, Di, N, dtype=torch.float32)
    # Without autocast, which would compute the step sizes in bf16.
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        # With PROJECT_DT the kernel does not read `raw`; ys stands in for it.
        raw = ys if blocks["PROJECT_DT"] else raw_step_sizes(dbl, dt_weight, dt_bias)[0]
        if segment < H * W:
            find_segment_ends(
                x, dbl, raw, dt_weight, dt_bias, A_log, checkpoints, segment, chunk, blocks, backward=False
            )
        forward_kernel[-(-Di // blocks["BLOCK_D"]), B * K, -(-H * W // segment)](
            x, dbl, raw, dt_weight, dt_bias, A_log, D, ys, checkpoints, B, Di,
            H=H, W=W, N=N, R=R, SEGMENT=segment, CHUNK=chunk, SAVE=save, **blocks, **OPTIONS,
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
    _, segment, chunk = lengths(x, N, R)
    segments = -(-H * W // segment)
    grid = -(-Di // blocks["BLOCK_D"]), B * K, segments
    dbl_dtype = dbl.dtype

    def empty(*shape):
        return x.new_empty(shape, dtype=torch.float32)

    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        # Inputs, and what the kernel writes: one share per program where several add to a value
        dbl = dbl.float()
        raw, low = raw_step_sizes(dbl, dt_weight, dt_bias)
        dx, dbc = empty(K, B, H, W, Di), empty(grid[0], B, H, W, K, 2 * N)
        dA_log, dD, dbias = empty(segments * B, K, Di, N), empty(segments * B, K, Di), empty(segments * B, K, Di)
        scratch = empty(segments, K, B, chunk // blocks["STEPS"], Di, N)

        # The gradient of the state at the end of every segment
        starts = empty(K, B, segments - 1, Di, N)
        if segments > 1:
            shape = forward_blocks(N, R) | dict(PROJECT_DT=False)
            find_segment_ends(dy, dbl, raw, dt_weight, dt_bias, A_log, starts, segment, segment, shape, backward=True)

        backward_kernel[grid](
            dy, x, dbl, raw, A_log, D, checkpoints, starts, scratch, dx, dbc, dA_log, dD, dbias, B, Di,
            H=H, W=W, N=N, R=R, SEGMENT=segment, CHUNK=chunk, **blocks, **OPTIONS,
        )  # fmt: skip

        # The projection of the step sizes, and the sums over the shares
        draw = raw  # the kernel has replaced the step sizes by their gradient
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
    """See `reference.scan_2d`. Computes in fp32 whatever the inputs' dtypes; y has x's dtype."""
    return call(scan_op, x, dbl, dt_weight, dt_bias, A_log, D)
