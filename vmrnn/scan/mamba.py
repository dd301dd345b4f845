"""The scan by mamba-ssm's CUDA kernel (github.com/state-spaces/mamba), if that is installed.

The kernel is one-dimensional and takes (B, K*Di, L), so this back end makes the permuted copies that the others avoid.
It needs only the compiled extension `selective_scan_cuda`. The package `mamba_ssm` is not imported, since it imports
many large packages.
"""

import functools
import importlib

import torch

from vmrnn.errors import first_line
from vmrnn.scan.reference import merge_directions, split_directions

INSTALL = (
    "MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation --no-deps "
    "-r requirements-cuda.txt (needs nvcc of torch's CUDA version; see there)"
)


@functools.cache
def extension():
    """(the module, None), or (None, the reason why it cannot be imported)."""
    try:
        return importlib.import_module("selective_scan_cuda"), None
    except ImportError as error:  # absent, or built for another torch or CUDA
        return None, first_line(error)


def can_run(device, dtype, d_state):
    if device != "cuda":
        return False, f"mamba-ssm's kernel runs on CUDA only, the device is {device}"
    if dtype == torch.float64:
        return False, "mamba-ssm's kernel has no fp64"
    if d_state > 256:
        return False, f"mamba-ssm's kernel takes d_state up to 256, got {d_state}"
    module, why = extension()
    if module is None:
        return False, f"selective_scan_cuda cannot be imported ({why}); {INSTALL}"
    return True, f"selective_scan_cuda from {getattr(module, '__file__', 'mamba-ssm')}"


def scan_2d(x, dbl, dt_weight, dt_bias, A_log, D):
    """See `reference.scan_2d`. Computes in fp32, as the published code does."""
    H, W, Di = x.shape[1:]
    K, _, R = dt_weight.shape
    N = A_log.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        xs, dbl, dt_weight = x.float().flatten(1, 2), dbl.float().flatten(1, 2), dt_weight.float()
        xs = torch.stack(split_directions(xs.unsqueeze(2).expand(-1, -1, K, -1), H, W), 1)
        dbl = torch.stack(split_directions(dbl, H, W), 1)  # (B, K, L, R+2N)
        dt_low, b, c = dbl.split([R, N, N], dim=-1)
        dt = torch.einsum("bklr,kdr->bkdl", dt_low, dt_weight)
        y = SelectiveScan.apply(
            xs.mT.flatten(1, 2).contiguous(),
            dt.flatten(1, 2).contiguous(),
            -torch.exp(A_log.float()).flatten(0, 1).contiguous(),
            b.mT.contiguous(),
            c.mT.contiguous(),
            D.float().flatten().contiguous(),
            dt_bias.float().flatten().contiguous(),
        )
    ys = y.unflatten(1, (K, Di)).mT.unbind(1)
    return merge_directions(ys, H, W).to(x.dtype)


class SelectiveScan(torch.autograd.Function):
    """The two functions of the extension. They are the same in mamba-ssm 1.x and 2.x.

    u, dt (B, K*Di, L); A (K*Di, N); b, c (B, K, N, L); D, bias (K*Di) -> (B, K*Di, L)
    """

    @staticmethod
    def forward(ctx, u, dt, A, b, c, D, bias):
        y, states, *_ = extension()[0].fwd(u, dt, A, b, c, D, None, bias, True)
        ctx.save_for_backward(u, dt, A, b, c, D, bias, states)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        u, dt, A, b, c, D, bias, states = ctx.saved_tensors
        grads = extension()[0].bwd(u, dt, A, b, c, D, None, bias, dy.contiguous(), states, None, None, True, False)
        du, ddt, dA, db, dc, dD, dbias, *_ = grads
        return du, ddt, dA, db, dc, dD, dbias
