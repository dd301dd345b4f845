"""The 2-D selective scan as a plain loop. Every back end is tested against it. It imports only torch.

Shape letters, used in all of vmrnn/scan: B batch, H, W map, L = H*W positions, K = 4 directions,
Di inner channels, N state size (d_state), R rank of the step-size projection.
"""

import torch
import torch.nn.functional as F

DIRECTIONS = 4


def split_directions(t, H, W):
    """(B, L, K, *) in row-major order, one entry per direction -> list of K tensors (B, L, *) in scan order.

    Directions: 0 row-major, 1 column-major, 2 and 3 their reverses.
    """
    rows, columns, rows_back, columns_back = t.unbind(2)

    def transpose(v):
        return v.unflatten(1, (H, W)).transpose(1, 2).flatten(1, 2)

    return [rows, transpose(columns), rows_back.flip(1), transpose(columns_back).flip(1)]


def merge_directions(ys, H, W):
    """The sum over directions, put back in place: K tensors (B, L, Di) in scan order -> (B, H, W, Di)."""
    rows, columns, rows_back, columns_back = ys
    columns = columns + columns_back.flip(1)
    return (rows + rows_back.flip(1)).unflatten(1, (H, W)) + columns.unflatten(1, (W, H)).transpose(1, 2)


def scan_2d(x, dbl, dt_weight, dt_bias, A_log, D):
    """Selective scan of a feature map in four directions, summed (arXiv 2401.10166, section 4).

    x          (B, H, W, Di)       feature map, channels last
    dbl        (B, H, W, K, R+2N)  per direction and position: low-rank step size (R), B (N), C (N)
    dt_weight  (K, Di, R)          expands the low-rank step size
    dt_bias    (K, Di)
    A_log      (K, Di, N)          A = -exp(A_log), negative
    D          (K, Di)
    returns y  (B, H, W, Di)

    For each direction k, along its order of the positions l:
        dt_l = softplus(dt_weight dt_low_l + dt_bias)
        h_l  = exp(dt_l A) h_{l-1} + dt_l B_l x_l          h is (B, Di, N), zero at the start
        y_l  = <C_l, h_l> + D x_l

    Any device, fp32 or fp64. Autograd differentiates the loop. It takes L steps one after the other and O(B L Di N)
    memory, so it is for tests and tiny maps.
    """
    B, H, W, Di = x.shape
    K, _, R = dt_weight.shape
    N = A_log.shape[-1]
    A = -torch.exp(A_log)
    xs = split_directions(x.flatten(1, 2).unsqueeze(2).expand(-1, -1, K, -1), H, W)
    dbls = split_directions(dbl.flatten(1, 2), H, W)
    ys = []
    for k in range(K):
        dt_low, b, c = dbls[k].split([R, N, N], dim=-1)
        dt = F.softplus(dt_low @ dt_weight[k].mT + dt_bias[k])
        ys.append(selective_scan(xs[k], dt, A[k], b, c) + D[k] * xs[k])
    return merge_directions(ys, H, W)


def selective_scan(u, dt, A, b, c):
    """One direction: u, dt (B, L, Di); A (Di, N); b, c (B, L, N) -> (B, L, Di).

    The loop uses unbind and stack. The backward of indexing by l would write a full-size tensor of zeros per step,
    which makes it quadratic in L.
    """
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[-1])
    ys = []
    for u_l, dt_l, b_l, c_l in zip(u.unbind(1), dt.unbind(1), b.unbind(1), c.unbind(1)):
        h = torch.exp(dt_l[..., None] * A) * h + (dt_l * u_l)[..., None] * b_l[:, None, :]
        ys.append((h @ c_l[..., None]).squeeze(-1))
    return torch.stack(ys, 1)


def can_run(device, dtype, d_state):
    return True, "the plain loop: for tests and tiny maps"
