"""The Triton kernels of the scan, which triton_scan.py launches. Why they are built so: README.md beside this file.

Shape letters as in reference.py: B batch, H and W map, L = H W positions, K = 4 directions, Di channels, N states,
R rank of the step size. ROW = R + 2N is the length of one direction's row of dbl: low-rank step size, B, C.

A state is a tensor [N_FIRST, BLOCK_D, N_LAST]: the N states of BLOCK_D channels, with the states laid out over the
first and the last axis. Rows of the step-size weights are [R_FIRST, BLOCK_D, R_LAST] in the same way. `wide` gives a
vector over channels these three axes. All arithmetic is fp32.
"""

# Annotations stay text, so that this file can be imported where Triton is not installed.
from __future__ import annotations

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:
    triton = tl = None

    def jit(function):
        return function


@jit
def state_index(FIRST: tl.constexpr, LAST: tl.constexpr, LANES_SHARE: tl.constexpr):
    """The number n of each state, [FIRST, 1, LAST].

    The compiler gives a lane four neighbours in n, to load them at once. Without LANES_SHARE these four are the last
    axis: a lane then holds all states of its channel, and a sum over n needs no shuffles. With LANES_SHARE they are the
    first axis: N / 4 lanes then share a channel, and a sum over channels needs few shuffles.
    """
    first = tl.arange(0, FIRST)[:, None, None]
    last = tl.arange(0, LAST)[None, None, :]
    return last * FIRST + first if LANES_SHARE else first * LAST + last


@jit
def wide(v):
    return v[None, :, None]


@jit
def position_of(k, i, H: tl.constexpr, W: tl.constexpr):
    """The position in the map, row-major, of step i in direction k.

    Steps beyond the end give the position of the last step, so that loads need no mask for them.
    """
    i = tl.minimum(i, H * W - 1)
    i = tl.where(k >= 2, H * W - 1 - i, i)
    return tl.where(k % 2 == 1, i % H * W + i // H, i)


@jit
def within(i, bound, H: tl.constexpr, W: tl.constexpr):
    """`bound`, or 0 if step i is beyond the map."""
    return tl.where(i < H * W, bound, 0)


@jit
def exp_minus_abs(s):
    return tl.exp2(-tl.abs(s) * 1.4426950408889634)


@jit
def softplus(s):
    """log(1 + e^s) with a small relative error for every s. Above 20 it is s, as in torch."""
    z = exp_minus_abs(s)
    t = z / (2.0 + z)  # log(1 + z) = 2 artanh(t), t <= 1/3
    q = t * t
    p = 2.801198958900e-1
    p = p * q + 2.800180315971e-1
    p = p * q + 4.002152681350e-1
    p = p * q + 6.666641831398e-1
    p = p * q + 2.0
    return tl.maximum(s, 0.0) + p * t


@jit
def sigmoid(s):
    """The derivative of softplus."""
    z = exp_minus_abs(s)
    return tl.where(s < 0, z, 1.0) / (1.0 + z)


@jit
def load(base, position, stride, offsets, bound):
    return tl.load(base + position * stride + offsets, mask=offsets < bound, other=0.0).to(tl.float32)


@jit
def decay_rates(A_log, mask):
    """A = -exp(A_log) in units of log(2), so that the decay of a step is 2^(dt A).

    Masked states get A = -1 in these units: their decay is at most 1, they start at zero, and nothing is added to them.
    """
    return tl.exp2(tl.load(A_log, mask=mask, other=0.0).to(tl.float32) * 1.4426950408889634) * -1.4426950408889634


@jit
def load_forward(
    # Pointers, at the first position of this batch item and direction
    x,
    dbl,
    raw,
    # Indices of channels, of the rank and of states. r is used only with PROJECT_DT
    d,
    r,
    n,
    # Where
    Di,
    k,
    first,
    H: tl.constexpr,
    W: tl.constexpr,
    # Sizes
    N: tl.constexpr,
    R: tl.constexpr,
    STEPS: tl.constexpr,
    PROJECT_DT: tl.constexpr,
):
    """x, step sizes (low-rank with PROJECT_DT, else before softplus), B and C of STEPS steps, each a tuple."""
    us = ()
    steps = ()
    bs = ()
    cs = ()
    for j in tl.static_range(STEPS):
        position = position_of(k, first + j, H, W)
        us = us + (load(x, position, Di, d, Di),)
        if PROJECT_DT:
            steps = steps + (load(dbl, position, 4 * (R + 2 * N), r, R),)
        else:
            steps = steps + (load(raw, position, Di, d, Di),)
        bs = bs + (load(dbl + R, position, 4 * (R + 2 * N), n, N),)
        cs = cs + (load(dbl + R + N, position, 4 * (R + 2 * N), n, N),)
    return us, steps, bs, cs


@jit
def step_sizes(step, weights, biases, PROJECT_DT: tl.constexpr):
    """dt of one step from what load_forward has loaded for it."""
    return softplus(tl.sum(tl.sum(weights * step, 2), 0) + biases if PROJECT_DT else step)


@jit
def load_state(checkpoints, chunk, Di, N: tl.constexpr, state_at, n, state_mask):
    """The state before a chunk: zero before the first."""
    return tl.load(
        checkpoints + (chunk - 1) * Di * N + state_at,
        mask=state_mask & (n < tl.where(chunk > 0, N, 0)),
        other=0.0,
    )


@jit
def run_forward(
    # What load_forward has loaded, and the state before
    loaded,
    h,
    # Parameters of the channels
    As,
    Ds,
    weights,
    biases,
    # Where y goes
    y,
    d,
    Di,
    k,
    first,
    H: tl.constexpr,
    W: tl.constexpr,
    STEPS: tl.constexpr,
    PROJECT_DT: tl.constexpr,
):
    """The state after STEPS steps. Stores their y."""
    us, steps, bs, cs = loaded
    for j in tl.static_range(STEPS):
        dt = step_sizes(steps[j], weights, biases, PROJECT_DT)
        h = tl.exp2(wide(dt) * As) * h + wide(dt * us[j]) * bs[j]
        out = tl.sum(tl.sum(h * cs[j], 2), 0) + Ds * us[j]
        tl.store(y + position_of(k, first + j, H, W) * Di + d, out, mask=d < within(first + j, Di, H, W))
    return h


@jit
def load_backward(dy, x, raw, dbl, d, n, Di, k, i, H: tl.constexpr, W: tl.constexpr, N: tl.constexpr, R: tl.constexpr):
    """dy, x, step size before softplus, B and C of one step. Beyond the end dy is zero."""
    position = position_of(k, i, H, W)
    end = within(i, Di, H, W)
    return (
        load(dy, position, Di, d, end),
        load(x, position, Di, d, Di),
        load(raw, position, Di, d, Di),
        load(dbl + R, position, 4 * (R + 2 * N), n, N),
        load(dbl + R + N, position, 4 * (R + 2 * N), n, N),
    )


@jit
def run_segment(
    # What load_forward has loaded, the state (or its gradient) before, and the sum of the step sizes so far
    loaded,
    v,
    total,
    # Parameters of the channels
    As,
    weights,
    biases,
    # Where
    d,
    Di,
    first,
    H: tl.constexpr,
    W: tl.constexpr,
    STEPS: tl.constexpr,
    PROJECT_DT: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """The state (with BACKWARD its gradient) after STEPS steps, and the sum of the step sizes with theirs."""
    us, steps, bs, cs = loaded
    for j in tl.static_range(STEPS - 1 if BACKWARD else 0, -1 if BACKWARD else STEPS, -1 if BACKWARD else 1):
        dt = step_sizes(steps[j], weights, biases, PROJECT_DT)
        if BACKWARD:  # the last segment may reach beyond the map
            inside = d < within(first + j, Di, H, W)
            dt = tl.where(inside, dt, 0.0)
            v = tl.exp2(wide(dt) * As) * (wide(tl.where(inside, us[j], 0.0)) * cs[j] + v)
        else:
            v = tl.exp2(wide(dt) * As) * v + wide(dt * us[j]) * bs[j]
        total += dt
    return v, total


@jit
def segment_ends_kernel(
    # Inputs: source is x, with BACKWARD dy
    source,
    dbl,
    raw,
    weight,
    bias,
    A_log,
    # Results
    ends,
    totals,
    # Sizes
    B,
    Di,
    H: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    SEGMENT: tl.constexpr,
    STRIDE: tl.constexpr,
    SLOTS: tl.constexpr,
    # Layout
    BLOCK_D: tl.constexpr,
    R_FIRST: tl.constexpr,
    R_LAST: tl.constexpr,
    N_FIRST: tl.constexpr,
    N_LAST: tl.constexpr,
    LANES_SHARE: tl.constexpr,
    STEPS: tl.constexpr,
    # Variants
    PROJECT_DT: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """The final state of every segment of the sequence but the last, scanned from a zero state.

    With BACKWARD: what every segment but the first contributes to the gradient of the state before it, from its last
    step to its first.

    ends    (K, B, SLOTS, Di, N): segment i writes slot (i + 1) STRIDE - 1
    totals  (K, B, segments - 1, Di): the sum of the segment's step sizes
    """
    L: tl.constexpr = H * W
    ROW: tl.constexpr = R + 2 * N
    b = tl.program_id(1) // 4
    k = tl.program_id(1) % 4
    slot = tl.program_id(2)
    segments = tl.num_programs(2)
    begin = (slot + (1 if BACKWARD else 0)) * SEGMENT
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = state_index(R_FIRST, R_LAST, LANES_SHARE)
    n = state_index(N_FIRST, N_LAST, LANES_SHARE)
    state_mask = wide(d < Di) & (n < N)
    state_at = wide(d) * N + n

    # Pointers to this batch item and direction
    source += b.to(tl.int64) * L * Di
    dbl += b.to(tl.int64) * L * 4 * ROW + k * ROW
    raw += (k * B + b).to(tl.int64) * L * Di
    ends += ((k * B + b).to(tl.int64) * SLOTS + (slot + 1) * STRIDE - 1) * Di * N
    totals += ((k * B + b).to(tl.int64) * segments + slot) * Di

    # Parameters of the channels
    channel = k * Di + d
    weights = tl.load(weight + wide(channel) * R + r, mask=wide(d < Di) & (r < R), other=0.0).to(tl.float32)
    biases = tl.load(bias + channel, mask=d < Di, other=0.0).to(tl.float32)
    As = decay_rates(A_log + k * Di * N + state_at, state_mask)
    v = tl.zeros([N_FIRST, BLOCK_D, N_LAST], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)

    # Two sets of registers take turns, as in forward_kernel.
    towards: tl.constexpr = -STEPS if BACKWARD else STEPS
    first = begin + (SEGMENT - STEPS if BACKWARD else 0)
    these = load_forward(source, dbl, raw, d, r, n, Di, k, first, H, W, N, R, STEPS, PROJECT_DT)
    for _ in range(0, SEGMENT, 2 * STEPS):
        middle = first + towards
        those = load_forward(source, dbl, raw, d, r, n, Di, k, middle, H, W, N, R, STEPS, PROJECT_DT)
        v, total = run_segment(these, v, total, As, weights, biases, d, Di, first, H, W, STEPS, PROJECT_DT, BACKWARD)
        first = middle + towards
        these = load_forward(source, dbl, raw, d, r, n, Di, k, tl.maximum(first, 0), H, W, N, R, STEPS, PROJECT_DT)
        v, total = run_segment(those, v, total, As, weights, biases, d, Di, middle, H, W, STEPS, PROJECT_DT, BACKWARD)
    tl.store(ends + state_at, v, mask=state_mask)
    tl.store(totals + d, total, mask=d < Di)


@jit
def chain_kernel(
    # Pointers
    ends,
    totals,
    A_log,
    # Sizes
    B,
    Di,
    N: tl.constexpr,
    SEGMENTS: tl.constexpr,
    STRIDE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Passes the states of segment_ends_kernel along, in place: each end becomes the true state after its segment.

    With BACKWARD the gradients are passed from the last segment to the first. SEGMENTS counts the ends.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < Di * N
    rates = decay_rates(A_log + tl.program_id(1) // B * Di * N + at, mask)
    ends += tl.program_id(1).to(tl.int64) * SLOTS * Di * N + at
    totals += tl.program_id(1).to(tl.int64) * SEGMENTS * Di + at // N
    own = ()  # every load comes before the first store: the compiler moves no load ahead of a store
    sums = ()
    for segment in tl.static_range(SEGMENTS):
        own = own + (tl.load(ends + ((segment + 1) * STRIDE - 1) * Di * N, mask=mask, other=0.0),)
        sums = sums + (tl.load(totals + segment * Di, mask=mask, other=0.0),)
    v = tl.zeros([BLOCK], tl.float32)
    for segment in tl.static_range(
        SEGMENTS - 1 if BACKWARD else 0, -1 if BACKWARD else SEGMENTS, -1 if BACKWARD else 1
    ):
        v = tl.exp2(rates * sums[segment]) * v + own[segment]
        tl.store(ends + ((segment + 1) * STRIDE - 1) * Di * N, v, mask=mask)


@jit
def forward_kernel(
    # Inputs
    x,
    dbl,
    raw,
    weight,
    bias,
    A_log,
    D,
    # Results
    y,
    checkpoints,
    # Sizes
    B,
    Di,
    H: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    SEGMENT: tl.constexpr,
    CHUNK: tl.constexpr,
    # Layout
    BLOCK_D: tl.constexpr,
    R_FIRST: tl.constexpr,
    R_LAST: tl.constexpr,
    N_FIRST: tl.constexpr,
    N_LAST: tl.constexpr,
    LANES_SHARE: tl.constexpr,
    STEPS: tl.constexpr,
    # Variants
    PROJECT_DT: tl.constexpr,
    SAVE: tl.constexpr,
):
    """The scan of one segment of the sequence, for one batch item, one direction and BLOCK_D channels.

    raw          (K, B, L, Di): step sizes before softplus. Not read with PROJECT_DT, which makes them from their low
                 rank in dbl
    y            (K, B, L, Di): one result per direction
    checkpoints  (K, B, chunks - 1, Di, N): the state before every chunk but the first. Read where a segment begins,
                 written inside it with SAVE
    """
    L: tl.constexpr = H * W
    ROW: tl.constexpr = R + 2 * N
    b = tl.program_id(1) // 4
    k = tl.program_id(1) % 4
    begin = tl.program_id(2) * SEGMENT if SEGMENT < L else 0
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = state_index(R_FIRST, R_LAST, LANES_SHARE)
    n = state_index(N_FIRST, N_LAST, LANES_SHARE)
    state_mask = wide(d < Di) & (n < N)
    state_at = wide(d) * N + n

    # Pointers to this batch item and direction
    x += b.to(tl.int64) * L * Di
    dbl += b.to(tl.int64) * L * 4 * ROW + k * ROW
    raw += (k * B + b).to(tl.int64) * L * Di
    y += (k * B + b).to(tl.int64) * L * Di
    checkpoints += (k * B + b).to(tl.int64) * ((L - 1) // CHUNK) * Di * N

    # Parameters of the channels, and the state before the segment
    channel = k * Di + d
    weights = tl.load(weight + wide(channel) * R + r, mask=wide(d < Di) & (r < R), other=0.0).to(tl.float32)
    biases = tl.load(bias + channel, mask=d < Di, other=0.0).to(tl.float32)
    Ds = tl.load(D + channel, mask=d < Di, other=0.0).to(tl.float32)
    As = decay_rates(A_log + k * Di * N + state_at, state_mask)
    h = load_state(checkpoints, begin // CHUNK, Di, N, state_at, n, state_mask)

    # Two sets of registers take turns: one is loaded while the steps of the other run. Few warps run at one time, so
    # other warps cannot hide the latency of a load.
    these = load_forward(x, dbl, raw, d, r, n, Di, k, begin, H, W, N, R, STEPS, PROJECT_DT)
    for first in range(begin, tl.minimum(begin + SEGMENT, L) if SEGMENT < L else L, 2 * STEPS):
        if SAVE:
            if first % CHUNK == 0 and first > begin:
                tl.store(checkpoints + (first // CHUNK - 1) * Di * N + state_at, h, mask=state_mask)
        middle = first + STEPS
        those = load_forward(x, dbl, raw, d, r, n, Di, k, middle, H, W, N, R, STEPS, PROJECT_DT)
        h = run_forward(these, h, As, Ds, weights, biases, y, d, Di, k, first, H, W, STEPS, PROJECT_DT)
        these = load_forward(x, dbl, raw, d, r, n, Di, k, middle + STEPS, H, W, N, R, STEPS, PROJECT_DT)
        h = run_forward(those, h, As, Ds, weights, biases, y, d, Di, k, middle, H, W, STEPS, PROJECT_DT)


@jit
def backward_kernel(
    # Inputs
    dy,
    x,
    dbl,
    raw,
    A_log,
    D,
    checkpoints,
    starts,
    # Scratch memory
    scratch,
    # Results
    dx,
    dbc,
    dA_log,
    dD,
    dbias,
    # Sizes
    B,
    Di,
    H: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    SEGMENT: tl.constexpr,
    CHUNK: tl.constexpr,
    # Layout
    BLOCK_D: tl.constexpr,
    N_FIRST: tl.constexpr,
    N_LAST: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The backward pass over one segment, for one batch item, one direction and BLOCK_D channels.

    raw       (K, B, L, Di): step sizes before softplus; replaced by their gradient
    starts    (K, B, segments - 1, Di, N): the gradient of the state after every segment but the last
    scratch   (segments, K, B, CHUNK / STEPS, Di, N): the states of the current chunk, one per STEPS steps
    dx        (K, B, L, Di): one result per direction
    dbc       (blocks of channels, B, L, K, 2N): gradients of B and C, one result per block of channels
    dA_log    (segments, B, K, Di, N)
    dD, dbias (segments, B, K, Di)
    """
    L: tl.constexpr = H * W
    ROW: tl.constexpr = R + 2 * N
    b = tl.program_id(1) // 4
    k = tl.program_id(1) % 4
    segment = tl.program_id(2) if SEGMENT < L else 0
    segments = tl.num_programs(2)
    last_chunk = (tl.minimum((segment + 1) * SEGMENT, L) - 1) // CHUNK
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = state_index(N_FIRST, N_LAST, True)
    state_mask = wide(d < Di) & (n < N)
    state_at = wide(d) * N + n

    # Pointers to this batch item and direction
    dy += b.to(tl.int64) * L * Di
    x += b.to(tl.int64) * L * Di
    dbl += b.to(tl.int64) * L * 4 * ROW + k * ROW
    map_at = (k * B + b).to(tl.int64) * L * Di
    raw += map_at
    dx += map_at
    dbc += (tl.program_id(0) * B + b).to(tl.int64) * L * 4 * 2 * N + k * 2 * N
    checkpoints += (k * B + b).to(tl.int64) * ((L - 1) // CHUNK) * Di * N
    starts += (k * B + b).to(tl.int64) * (segments - 1) * Di * N
    scratch += ((segment * 4 + k) * B + b).to(tl.int64) * (CHUNK // STEPS) * Di * N

    # Parameters of the channels, the gradient that the later segments send back, and sums
    channel = k * Di + d
    Ds = tl.load(D + channel, mask=d < Di, other=0.0).to(tl.float32)
    As = decay_rates(A_log + k * Di * N + state_at, state_mask)
    dh = tl.load(
        starts + segment * Di * N + state_at,
        mask=state_mask & (n < tl.where(segment + 1 < segments, N, 0)),
        other=0.0,
    )
    dAs = tl.zeros([N_FIRST, BLOCK_D, N_LAST], tl.float32)
    dDs = tl.zeros([BLOCK_D], tl.float32)
    dbiases = tl.zeros([BLOCK_D], tl.float32)

    for i in range(last_chunk - segment * (SEGMENT // CHUNK) + 1):
        # Forward again from the checkpoint: store the state before every group of STEPS steps.
        chunk = last_chunk - i
        begin = chunk * CHUNK
        groups = (tl.minimum(CHUNK, L - begin) + STEPS - 1) // STEPS
        h = load_state(checkpoints, chunk, Di, N, state_at, n, state_mask)
        tl.store(scratch + state_at, h, mask=state_mask)
        for s in range(1, groups):
            first = begin + (s - 1) * STEPS
            # The second n stands for r, which is not used here.
            us, raws, bs, _ = load_forward(x, dbl, raw, d, n, n, Di, k, first, H, W, N, R, STEPS, False)
            for j in tl.static_range(STEPS):
                dt = softplus(raws[j])
                h = tl.exp2(wide(dt) * As) * h + wide(dt * us[j]) * bs[j]
            tl.store(scratch + s * Di * N + state_at, h, mask=state_mask)
        tl.debug_barrier()  # a lane may load what another lane has stored

        # The groups from the last to the first.
        for s in range(groups):
            # The states before each step of the group, in registers.
            group = groups - 1 - s
            first = begin + group * STEPS
            h = tl.load(scratch + group * Di * N + state_at, mask=state_mask, other=0.0)
            last = first + STEPS - 1
            ahead = load_backward(dy, x, raw, dbl, d, n, Di, k, last, H, W, N, R)
            us, raws, bs, _ = load_forward(x, dbl, raw, d, n, n, Di, k, first, H, W, N, R, STEPS - 1, False)
            hs = (h,)
            for j in tl.static_range(STEPS - 1):
                dt = tl.where(d < within(first + j, Di, H, W), softplus(raws[j]), 0.0)
                h = tl.exp2(wide(dt) * As) * h + wide(dt * us[j]) * bs[j]
                hs = hs + (h,)

            # The gradient through the steps of the group. Inputs are loaded again and decays computed again: kept, they
            # would need more registers than hs. Loads run one step ahead of the stores, which no load may overtake.
            for j in tl.static_range(STEPS - 1, -1, -1):
                dy_j, u, raw_j, b_j, c_j = ahead
                if j > 0:
                    ahead = load_backward(dy, x, raw, dbl, d, n, Di, k, first + j - 1, H, W, N, R)
                position = position_of(k, first + j, H, W)
                d_mask = d < within(first + j, Di, H, W)
                n_mask = n < within(first + j, N, H, W)
                # Beyond the end dy and dt are zero, which leaves the state and its gradient as they are.
                dt = tl.where(d_mask, softplus(raw_j), 0.0)
                a = tl.exp2(wide(dt) * As)
                after = a * hs[j] + wide(dt * u) * b_j if j == STEPS - 1 else hs[j + 1]
                g = wide(dy_j) * c_j + dh
                dh = a * g
                q = dh * hs[j]
                db = tl.sum(g * wide(dt * u), 1, keep_dims=True)
                dc = tl.sum(wide(dy_j) * after, 1, keep_dims=True)
                dAs += q * wide(dt)
                from_a = tl.sum(tl.sum(q * As, 0), 1)
                from_b = tl.sum(tl.sum(g * b_j, 0), 1)
                draw = (from_a * 0.6931471805599453 + from_b * u) * sigmoid(raw_j)
                dDs += dy_j * u
                dbiases += tl.where(d_mask, draw, 0.0)
                at = dbc + position * 4 * 2 * N + n
                tl.store(at, db, mask=n_mask)
                tl.store(at + N, dc, mask=n_mask)
                tl.store(dx + position * Di + d, from_b * dt + Ds * dy_j, mask=d_mask)
                tl.store(raw + position * Di + d, draw, mask=d_mask)
        tl.debug_barrier()

    # The gradients of the parameters
    b += segment * B
    channel += b * 4 * Di
    # Computed again: kept through the loop, it spills at N = 64 (Triton 3.6).
    As = decay_rates(A_log + k * Di * N + state_at, state_mask)
    dAs *= As * 0.6931471805599453
    tl.store(dA_log + (b * 4 + k).to(tl.int64) * Di * N + state_at, dAs, mask=state_mask)
    tl.store(dD + channel, dDs, mask=d < Di)
    tl.store(dbias + channel, dbiases, mask=d < Di)


@jit
def sum_kernel(partial, total, size, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """partial (COUNT, size) -> total (size), added in order in fp32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(partial + at, mask=at < size, other=0.0)
    for _ in range(1, COUNT):
        partial += size
        value += tl.load(partial + at, mask=at < size, other=0.0)
    tl.store(total + at, value.to(total.dtype.element_ty), mask=at < size)
