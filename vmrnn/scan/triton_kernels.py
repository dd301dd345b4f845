"""The Triton kernels of the scan: what triton_scan.py launches. Their design and counts: README.md beside this file."""

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


# Inside the kernels a state is [NR, BLOCK_D, NT]: what a lane holds, channels, and what lanes share.


@jit
def state_index(NR: tl.constexpr, NT: tl.constexpr, SPREAD: tl.constexpr):
    """n of each state. The compiler gives a lane four neighbours in n, to load them at once: without
    SPREAD these are axis 2, then a lane holds all states of its channel and a sum over n needs no
    shuffles; with it axis 0, then N / 4 lanes share a channel and a sum over channels needs few."""
    first = tl.arange(0, NR)[:, None, None]
    last = tl.arange(0, NT)[None, None, :]
    return last * NR + first if SPREAD else first * NT + last


@jit
def wide(v):
    return v[None, :, None]


@jit
def place_of(k, i, H: tl.constexpr, W: tl.constexpr):
    """Where in the map step i of direction k stands; past the end the last step, so that loads need
    no mask for it."""
    i = tl.minimum(i, H * W - 1)
    i = tl.where(k >= 2, H * W - 1 - i, i)
    return tl.where(k % 2 == 1, i % H * W + i // H, i)


@jit
def exp_minus_abs(s):
    return tl.exp2(-tl.abs(s) * 1.4426950408889634)


@jit
def softplus(s):
    """log(1 + e^s) with a small relative error for every s (above 20 it is s, as in torch)."""
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
def within(i, bound, H: tl.constexpr, W: tl.constexpr):
    """bound, or 0 where step i is beyond the map."""
    return tl.where(i < H * W, bound, 0)


@jit
def load(base, place, stride, offsets, bound):
    return tl.load(base + place * stride + offsets, mask=offsets < bound, other=0.0).to(tl.float32)


@jit
def decay_rates(A_log, mask):
    """A = -exp(A_log) in units of log(2), so that a step's decay is 2^(dt A). What is masked gets A = -1:
    a decay of at most 1, of a state that is zero and that nothing is added to."""
    return tl.exp2(tl.load(A_log, mask=mask, other=0.0).to(tl.float32) * 1.4426950408889634) * -1.4426950408889634


@jit
def load_forward(x, dbl, raw, d, r, n, Di, k, first, H: tl.constexpr, W: tl.constexpr,
                 N: tl.constexpr, R: tl.constexpr, STEPS: tl.constexpr, PROJECT: tl.constexpr):  # fmt: skip
    """x, step sizes, B and C of STEPS steps."""
    us = ()
    steps = ()
    bs = ()
    cs = ()
    for j in tl.static_range(STEPS):
        place = place_of(k, first + j, H, W)
        us = us + (load(x, place, Di, d, Di),)
        if PROJECT:
            steps = steps + (load(dbl, place, 4 * (R + 2 * N), r, R),)
        else:
            steps = steps + (load(raw, place, Di, d, Di),)
        bs = bs + (load(dbl + R, place, 4 * (R + 2 * N), n, N),)
        cs = cs + (load(dbl + R + N, place, 4 * (R + 2 * N), n, N),)
    return us, steps, bs, cs


@jit
def step_sizes(step, weights, biases, PROJECT: tl.constexpr):
    """From their low rank (PROJECT), or from what they are before softplus."""
    return softplus(tl.sum(tl.sum(weights * step, 2), 0) + biases if PROJECT else step)


@jit
def load_state(checkpoints, chunk, Di, N: tl.constexpr, state_at, n, state_mask):
    """The state before a chunk: zero before the first."""
    return tl.load(checkpoints + (chunk - 1) * Di * N + state_at,
                   mask=state_mask & (n < tl.where(chunk > 0, N, 0)), other=0.0)  # fmt: skip


@jit
def run_forward(loaded, h, As, Ds, weights, biases, y, d, Di, k, first, H: tl.constexpr, W: tl.constexpr,
                STEPS: tl.constexpr, PROJECT: tl.constexpr):  # fmt: skip
    """The state after STEPS steps; stores their y."""
    us, steps, bs, cs = loaded
    for j in tl.static_range(STEPS):
        dt = step_sizes(steps[j], weights, biases, PROJECT)
        h = tl.exp2(wide(dt) * As) * h + wide(dt * us[j]) * bs[j]
        out = tl.sum(tl.sum(h * cs[j], 2), 0) + Ds * us[j]
        tl.store(y + place_of(k, first + j, H, W) * Di + d, out, mask=d < within(first + j, Di, H, W))
    return h


@jit
def load_backward(dy, x, raw, dbl, d, n, Di, k, i, H: tl.constexpr, W: tl.constexpr, N: tl.constexpr, R: tl.constexpr):
    """dy, x, step size, B and C of one step. Past the end dy and the step size are zero, which leaves
    the state and its gradient as they are."""
    place = place_of(k, i, H, W)
    end = within(i, Di, H, W)
    return (
        load(dy, place, Di, d, end),
        load(x, place, Di, d, Di),
        load(raw, place, Di, d, Di),
        load(dbl + R, place, 4 * (R + 2 * N), n, N),
        load(dbl + R + N, place, 4 * (R + 2 * N), n, N),
    )


@jit
def run_end(loaded, v, total, As, weights, biases, d, Di, first, H: tl.constexpr, W: tl.constexpr,
            STEPS: tl.constexpr, PROJECT: tl.constexpr, BACK: tl.constexpr):  # fmt: skip
    """The state, or its gradient if BACK, after STEPS steps, and the sum of their step sizes."""
    us, steps, bs, cs = loaded
    for j in tl.static_range(STEPS - 1 if BACK else 0, -1 if BACK else STEPS, -1 if BACK else 1):
        dt = step_sizes(steps[j], weights, biases, PROJECT)
        if BACK:  # the last part may go beyond the map
            inside = d < within(first + j, Di, H, W)
            dt = tl.where(inside, dt, 0.0)
            v = tl.exp2(wide(dt) * As) * (wide(tl.where(inside, us[j], 0.0)) * cs[j] + v)
        else:
            v = tl.exp2(wide(dt) * As) * v + wide(dt * us[j]) * bs[j]
        total += dt
    return v, total


@jit
def ends_kernel(source, dbl, raw, weight, bias, A_log, ends, totals, B, Di,
                H: tl.constexpr, W: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
                BLOCK_D: tl.constexpr, RR: tl.constexpr, RT: tl.constexpr, NR: tl.constexpr, NT: tl.constexpr,
                SPREAD: tl.constexpr, STEPS: tl.constexpr, PART: tl.constexpr, STRIDE: tl.constexpr,
                SLOTS: tl.constexpr, PROJECT: tl.constexpr, BACK: tl.constexpr):  # fmt: skip
    """The final state of each part of the sequence when scanned from a zero state: ends (K, B, SLOTS, Di, N), of which this part's slot is
    every STRIDE-th; and the sum of its step sizes, totals (K, B, parts - 1, Di).

    The last part's state is not asked for. BACK: what each part but the first makes of the gradient of its states,
    from the last step to the first; source is then dy, otherwise x.
    """
    L: tl.constexpr = H * W
    ROW: tl.constexpr = R + 2 * N
    b = tl.program_id(1) // 4
    k = tl.program_id(1) % 4
    slot = tl.program_id(2)
    parts = tl.num_programs(2)
    begin = (slot + (1 if BACK else 0)) * PART
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = state_index(RR, RT, SPREAD)
    n = state_index(NR, NT, SPREAD)
    state_mask = wide(d < Di) & (n < N)
    state_at = wide(d) * N + n

    source += b.to(tl.int64) * L * Di
    dbl += b.to(tl.int64) * L * 4 * ROW + k * ROW
    raw += (k * B + b).to(tl.int64) * L * Di
    ends += ((k * B + b).to(tl.int64) * SLOTS + (slot + 1) * STRIDE - 1) * Di * N
    totals += ((k * B + b).to(tl.int64) * parts + slot) * Di

    channel = k * Di + d
    weights = tl.load(weight + wide(channel) * R + r, mask=wide(d < Di) & (r < R), other=0.0).to(tl.float32)
    biases = tl.load(bias + channel, mask=d < Di, other=0.0).to(tl.float32)
    As = decay_rates(A_log + k * Di * N + state_at, state_mask)
    v = tl.zeros([NR, BLOCK_D, NT], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)

    towards: tl.constexpr = -STEPS if BACK else STEPS
    first = begin + (PART - STEPS if BACK else 0)
    these = load_forward(source, dbl, raw, d, r, n, Di, k, first, H, W, N, R, STEPS, PROJECT)
    for _ in range(0, PART, 2 * STEPS):
        middle = first + towards
        those = load_forward(source, dbl, raw, d, r, n, Di, k, middle, H, W, N, R, STEPS, PROJECT)
        v, total = run_end(these, v, total, As, weights, biases, d, Di, first, H, W, STEPS, PROJECT, BACK)
        first = middle + towards
        these = load_forward(source, dbl, raw, d, r, n, Di, k, tl.maximum(first, 0), H, W, N, R, STEPS, PROJECT)
        v, total = run_end(those, v, total, As, weights, biases, d, Di, middle, H, W, STEPS, PROJECT, BACK)
    tl.store(ends + state_at, v, mask=state_mask)
    tl.store(totals + d, total, mask=d < Di)


@jit
def chain_kernel(ends, totals, A_log, B, Di, N: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr,
                 SLOTS: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr):  # fmt: skip
    """ends and totals of ends_kernel, PARTS of SLOTS slots: each end, in place, becomes what it is with all parts
    before it (BACK: after it), one by one."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < Di * N
    rates = decay_rates(A_log + tl.program_id(1) // B * Di * N + at, mask)
    ends += tl.program_id(1).to(tl.int64) * SLOTS * Di * N + at
    totals += tl.program_id(1).to(tl.int64) * PARTS * Di + at // N
    own = ()  # all loads before the first store, which none may overtake
    sums = ()
    for part in tl.static_range(PARTS):
        own = own + (tl.load(ends + ((part + 1) * STRIDE - 1) * Di * N, mask=mask, other=0.0),)
        sums = sums + (tl.load(totals + part * Di, mask=mask, other=0.0),)
    v = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS - 1 if BACK else 0, -1 if BACK else PARTS, -1 if BACK else 1):
        v = tl.exp2(rates * sums[part]) * v + own[part]
        tl.store(ends + ((part + 1) * STRIDE - 1) * Di * N, v, mask=mask)


@jit
def forward_kernel(x, dbl, raw, weight, bias, A_log, D, y, checkpoints, B, Di,
                   H: tl.constexpr, W: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
                   BLOCK_D: tl.constexpr, RR: tl.constexpr, RT: tl.constexpr, NR: tl.constexpr, NT: tl.constexpr,
                   SPREAD: tl.constexpr, STEPS: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr,
                   PROJECT: tl.constexpr, SAVE: tl.constexpr):  # fmt: skip
    """y (K, B, L, Di), a part for each direction; checkpoints (K, B, chunks - 1, Di, N), the state before each chunk
    but the first: read where a part of the sequence begins, written within it if SAVE.

    PROJECT: step sizes are made here from their low rank; otherwise raw (K, B, L, Di) holds them
    before softplus.
    """
    L: tl.constexpr = H * W
    ROW: tl.constexpr = R + 2 * N
    b = tl.program_id(1) // 4
    k = tl.program_id(1) % 4
    begin = tl.program_id(2) * PART if PART < L else 0
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = state_index(RR, RT, SPREAD)
    n = state_index(NR, NT, SPREAD)
    state_mask = wide(d < Di) & (n < N)
    state_at = wide(d) * N + n

    x += b.to(tl.int64) * L * Di
    dbl += b.to(tl.int64) * L * 4 * ROW + k * ROW
    raw += (k * B + b).to(tl.int64) * L * Di
    y += (k * B + b).to(tl.int64) * L * Di
    checkpoints += (k * B + b).to(tl.int64) * ((L - 1) // CHUNK) * Di * N

    channel = k * Di + d
    weights = tl.load(weight + wide(channel) * R + r, mask=wide(d < Di) & (r < R), other=0.0).to(tl.float32)
    biases = tl.load(bias + channel, mask=d < Di, other=0.0).to(tl.float32)
    Ds = tl.load(D + channel, mask=d < Di, other=0.0).to(tl.float32)
    As = decay_rates(A_log + k * Di * N + state_at, state_mask)
    h = load_state(checkpoints, begin // CHUNK, Di, N, state_at, n, state_mask)

    # Two sets of registers take turns: one set's inputs are on their way while the other's steps run,
    # since there are few warps to hide a load.
    these = load_forward(x, dbl, raw, d, r, n, Di, k, begin, H, W, N, R, STEPS, PROJECT)
    for first in range(begin, tl.minimum(begin + PART, L) if PART < L else L, 2 * STEPS):
        if SAVE:
            if first % CHUNK == 0 and first > begin:
                tl.store(checkpoints + (first // CHUNK - 1) * Di * N + state_at, h, mask=state_mask)
        middle = first + STEPS
        those = load_forward(x, dbl, raw, d, r, n, Di, k, middle, H, W, N, R, STEPS, PROJECT)
        h = run_forward(these, h, As, Ds, weights, biases, y, d, Di, k, first, H, W, STEPS, PROJECT)
        these = load_forward(x, dbl, raw, d, r, n, Di, k, middle + STEPS, H, W, N, R, STEPS, PROJECT)
        h = run_forward(those, h, As, Ds, weights, biases, y, d, Di, k, middle, H, W, STEPS, PROJECT)


@jit
def backward_kernel(dy, x, dbl, raw, A_log, D, checkpoints, starts, scratch, dx, dbc, dA_log, dD, dbias, B, Di,
                    H: tl.constexpr, W: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
                    BLOCK_D: tl.constexpr, NR: tl.constexpr, NT: tl.constexpr,
                    STEPS: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """dx (K, B, L, Di), dbc (channel blocks, B, L, K, 2N), dA_log (parts, B, K, Di, N), dD and dbias (parts, B, K, Di).

    raw (K, B, L, Di), the step sizes before softplus, is replaced by its own gradient.
    starts (K, B, parts - 1, Di, N): the gradient of the state after each part of the sequence but the last.
    scratch (parts, K, B, CHUNK / STEPS, Di, N): the states of the chunk at hand, one every STEPS steps.
    """
    L: tl.constexpr = H * W
    ROW: tl.constexpr = R + 2 * N
    b = tl.program_id(1) // 4
    k = tl.program_id(1) % 4
    part = tl.program_id(2) if PART < L else 0
    parts = tl.num_programs(2)
    last_chunk = (tl.minimum((part + 1) * PART, L) - 1) // CHUNK
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = state_index(NR, NT, True)
    state_mask = wide(d < Di) & (n < N)
    state_at = wide(d) * N + n

    dy += b.to(tl.int64) * L * Di
    x += b.to(tl.int64) * L * Di
    dbl += b.to(tl.int64) * L * 4 * ROW + k * ROW
    map_at = (k * B + b).to(tl.int64) * L * Di
    raw += map_at
    dx += map_at
    dbc += (tl.program_id(0) * B + b).to(tl.int64) * L * 4 * 2 * N + k * 2 * N
    checkpoints += (k * B + b).to(tl.int64) * ((L - 1) // CHUNK) * Di * N
    starts += (k * B + b).to(tl.int64) * (parts - 1) * Di * N
    scratch += ((part * 4 + k) * B + b).to(tl.int64) * (CHUNK // STEPS) * Di * N

    channel = k * Di + d
    Ds = tl.load(D + channel, mask=d < Di, other=0.0).to(tl.float32)
    As = decay_rates(A_log + k * Di * N + state_at, state_mask)
    dh = tl.load(
        starts + part * Di * N + state_at, mask=state_mask & (n < tl.where(part + 1 < parts, N, 0)), other=0.0
    )  # from the steps after
    dAs = tl.zeros([NR, BLOCK_D, NT], tl.float32)
    dDs = tl.zeros([BLOCK_D], tl.float32)
    dbiases = tl.zeros([BLOCK_D], tl.float32)

    for i in range(last_chunk - part * (PART // CHUNK) + 1):
        chunk = last_chunk - i
        begin = chunk * CHUNK
        groups = (tl.minimum(CHUNK, L - begin) + STEPS - 1) // STEPS
        h = load_state(checkpoints, chunk, Di, N, state_at, n, state_mask)
        tl.store(scratch + state_at, h, mask=state_mask)
        for s in range(1, groups):
            first = begin + (s - 1) * STEPS
            us, raws, bs, _ = load_forward(x, dbl, raw, d, n, n, Di, k, first, H, W, N, R, STEPS, False)
            for j in tl.static_range(STEPS):
                dt = softplus(raws[j])
                h = tl.exp2(wide(dt) * As) * h + wide(dt * us[j]) * bs[j]
            tl.store(scratch + s * Di * N + state_at, h, mask=state_mask)
        tl.debug_barrier()  # another lane may load what this one has stored
        for s in range(groups):
            group = groups - 1 - s
            first = begin + group * STEPS
            h = tl.load(scratch + group * Di * N + state_at, mask=state_mask, other=0.0)
            last = first + STEPS - 1
            ahead = load_backward(dy, x, raw, dbl, d, n, Di, k, last, H, W, N, R)
            us, raws, bs, _ = load_forward(x, dbl, raw, d, n, n, Di, k, first, H, W, N, R, STEPS - 1, False)
            hs = (h,)  # before each step
            for j in tl.static_range(STEPS - 1):
                dt = tl.where(d < within(first + j, Di, H, W), softplus(raws[j]), 0.0)
                h = tl.exp2(wide(dt) * As) * h + wide(dt * us[j]) * bs[j]
                hs = hs + (h,)
            for j in tl.static_range(STEPS - 1, -1, -1):
                # Loaded again, and the decay made again: kept, they would take more registers than
                # hs. One step ahead of the stores that no load may overtake.
                dy_j, u, raw_j, b_j, c_j = ahead
                if j > 0:
                    ahead = load_backward(dy, x, raw, dbl, d, n, Di, k, first + j - 1, H, W, N, R)
                place = place_of(k, first + j, H, W)
                d_mask = d < within(first + j, Di, H, W)
                n_mask = n < within(first + j, N, H, W)
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
                at = dbc + place * 4 * 2 * N + n
                tl.store(at, db, mask=n_mask)
                tl.store(at + N, dc, mask=n_mask)
                tl.store(dx + place * Di + d, from_b * dt + Ds * dy_j, mask=d_mask)
                tl.store(raw + place * Di + d, draw, mask=d_mask)
        tl.debug_barrier()

    b += part * B
    channel += b * 4 * Di
    As = decay_rates(A_log + k * Di * N + state_at, state_mask)  # again: kept, it spills at N = 64 (Triton 3.6)
    dAs *= As * 0.6931471805599453
    tl.store(dA_log + (b * 4 + k).to(tl.int64) * Di * N + state_at, dAs, mask=state_mask)
    tl.store(dD + channel, dDs, mask=d < Di)
    tl.store(dbias + channel, dbiases, mask=d < Di)


@jit
def sum_kernel(parts, total, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """parts (PARTS, size) -> total (size), added in order in fp32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(parts + at, mask=at < size, other=0.0)
    for _ in range(1, PARTS):
        parts += size
        value += tl.load(parts + at, mask=at < size, other=0.0)
    tl.store(total + at, value.to(total.dtype.element_ty), mask=at < size)
