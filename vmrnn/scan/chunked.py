"""The scan in plain torch, chunk by chunk, for machines without a kernel.

The contract is that of `reference.scan_2d`. All four directions advance together. The positions of one chunk are
gathered, a copy of CHUNK positions and never of the map. The recurrence is one fused multiply-add per step. Everything
else is a few large operations per chunk. The forward pass keeps the state at the start of every chunk, and the backward
pass computes the other states again. So no (B, L, K, Di, N) tensor exists in either pass. The largest tensors are the
step sizes (B, L, K, Di) and the states of one chunk (CHUNK, K, B, Di, N).
"""

import torch
import torch.nn.functional as F

CHUNK = 32  # steps. 16 to 64 are equally fast on a CPU. Memory grows with it: 4 B Di N floats per step


def can_run(device, dtype, d_state):
    return True, "runs anywhere torch does, several times slower than a fused kernel"


def scan_2d(x, dbl, dt_weight, dt_bias, A_log, D):
    """See `reference.scan_2d`. bf16 and fp16 inputs are computed in fp32."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    inputs = [t.to(compute) for t in (x, dbl, dt_weight, dt_bias, A_log, D)]
    with torch.autocast(x.device.type, enabled=False):
        return _scan(*inputs).to(x.dtype)


def _scan(x, dbl, dt_weight, dt_bias, A_log, D):
    B, H, W, Di = x.shape
    N, R = A_log.shape[-1], dt_weight.shape[-1]
    dt_low, b, c = dbl.flatten(1, 2).split([R, N, N], dim=-1)  # each (B, L, K, *)
    dt = F.softplus(torch.einsum("blkr,kdr->blkd", dt_low, dt_weight) + dt_bias)
    y = ChunkedScan.apply(x.flatten(1, 2), dt, -torch.exp(A_log), b, c, scan_order(H, W, x.device))
    return (y + D.sum(0) * x.flatten(1, 2)).unflatten(1, (H, W))


def scan_order(H, W, device):
    """(K, L) positions in the order each direction visits them."""
    rows = torch.arange(H * W, device=device)
    columns = rows.view(H, W).T.flatten()
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])


class ChunkedScan(torch.autograd.Function):
    """u (B, L, Di), dt (B, L, K, Di), A (K, Di, N), b and c (B, L, K, N), order (K, L) -> (B, L, Di).

    With g the gradient of the state h:  g_l = dy_l c_l + a_{l+1} g_{l+1},  a_l = exp(dt_l A). Every other gradient is a
    product of g, h and the inputs at l, summed over the axes that its input does not have (README.md beside this file).
    """

    @staticmethod
    def forward(ctx, u, dt, A, b, c, order):
        B, L, Di = u.shape
        K, _, N = A.shape
        h = u.new_zeros(K, B, Di, N)
        y = torch.zeros_like(u)
        starts = []  # the state before each chunk
        for index in order.split(CHUNK, dim=1):
            starts.append(h)
            u_c, dt_c, b_c, c_c = gather(index, u, dt, b, c)
            hs = states(h, u_c, dt_c, A, b_c)[1]
            h = hs[-1].clone()
            y_c = torch.einsum("tkbdn,tkbn->tkbd", hs, c_c)
            for k in range(K):
                y.index_add_(1, index[k], y_c[:, k].transpose(0, 1))
        ctx.save_for_backward(u, dt, A, b, c, order, torch.stack(starts))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        u, dt, A, b, c, order, starts = ctx.saved_tensors
        du, ddt, dA = torch.zeros_like(u), torch.zeros_like(dt), torch.zeros_like(A)
        db, dc = torch.zeros_like(b), torch.zeros_like(c)
        g = torch.zeros_like(starts[0])  # a_{l+1} g_{l+1} of the following chunk
        chunks = order.split(CHUNK, dim=1)
        for index, start in zip(reversed(chunks), reversed(starts.unbind(0))):
            u_c, dt_c, b_c, c_c = gather(index, u, dt, b, c)
            (dy_c,) = gather(index, dy)
            a, hs = states(start, u_c, dt_c, A, b_c)
            gs = dy_c[..., None] * c_c[..., None, :]
            for l in reversed(range(len(gs))):
                gs[l] += g
                torch.mul(a[l], gs[l], out=g)
            dc_c = torch.einsum("tkbdn,tkbd->tkbn", hs, dy_c)
            dtu = dt_c * u_c
            db_c = torch.einsum("tkbdn,tkbd->tkbn", gs, dtu)
            ddtu = torch.einsum("tkbdn,tkbn->tkbd", gs, b_c)
            # From here on gs is the gradient of dt A, which is g h_{l-1} a.
            gs[1:] *= hs[:-1]
            gs[0] *= start
            gs *= a
            dA += torch.einsum("tkbdn,tkbd->kdn", gs, dt_c)
            ddt_c = torch.einsum("tkbdn,kdn->tkbd", gs, A).addcmul_(ddtu, u_c)
            du_c = ddtu * dt_c
            for k in range(len(index)):
                du.index_add_(1, index[k], du_c[:, k].transpose(0, 1))
                for whole, chunk in ((ddt, ddt_c), (db, db_c), (dc, dc_c)):
                    whole[:, index[k], k] = chunk[:, k].transpose(0, 1)
        return du, ddt, dA, db, dc, None


def gather(index, *tensors):
    """One chunk of each tensor in scan order: index (K, T), tensor (B, L, [K,] *) -> (T, K, B, *)."""
    gathered = []
    for t in tensors:
        if t.dim() == 3:  # shared by the directions
            picked = t[:, index].movedim((2, 1), (0, 1))
        else:
            directions = torch.arange(len(index), device=index.device)[:, None]
            picked = t[:, index, directions].movedim((2, 1), (0, 1))
        gathered.append(picked)
    return gathered


def states(h, u, dt, A, b):
    """The decays a and the states h of one chunk, both (T, K, B, Di, N), from the state before it."""
    a = torch.exp(dt[..., None] * A[:, None])
    hs = (dt * u)[..., None] * b[..., None, :]
    for l in range(len(hs)):
        h = hs[l].addcmul_(a[l], h)
    return a, hs
