"""The mamba back end without a GPU: what it hands to mamba-ssm's extension, and what it makes of the results.

The stand-in has the signatures of `selective_scan_cuda` (mamba-ssm 1.x to 2.3) and refuses what its
selective_scan.cpp refuses. On a GPU with the extension test_scan.py has the parity test of the real one.
"""

import pytest
import torch
from helpers import SCAN_SHAPES, assert_close, outputs_and_gradients, relative_error, scan_inputs

from vmrnn.scan import mamba, reference


class StandIn:
    """selective_scan_cuda on a CPU: u, delta (B, D, L), A (D, N), B and C (B, groups, N, L), D and bias (D)."""

    @staticmethod
    def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        check(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        y = selective_scan(u, delta, A, B, C, D, delta_bias)
        return [y, torch.full((*u.shape[:2], 1, 2 * A.shape[1]), torch.nan)]  # out, x: the states of its own chunks

    @staticmethod
    def bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
        check(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        assert dout.shape == u.shape and dout.dtype == u.dtype and (dout.stride(-1) == 1 or dout.shape[-1] == 1)
        assert x.shape == (*u.shape[:2], 1, 2 * A.shape[1]) and (out, dz, recompute_out_z) == (None, None, False)
        leaves = [t.detach().requires_grad_() for t in (u, delta, A, B, C, D, delta_bias)]
        with torch.enable_grad():
            return list(torch.autograd.grad(selective_scan(*leaves), leaves, dout))


def check(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    batch, dim, length = u.shape
    groups, N = B.shape[1], A.shape[1]
    assert delta.shape == u.shape and A.shape == (dim, N) and D.shape == delta_bias.shape == (dim,)
    assert B.shape == C.shape == (batch, groups, N, length) and dim % groups == 0
    for t in (u, delta, A, B, C, D, delta_bias):
        assert t.dtype == torch.float32 and (t.stride(-1) == 1 or t.shape[-1] == 1)
    assert z is None and delta_softplus is True


def selective_scan(u, delta, A, B, C, D, delta_bias):
    dt = torch.nn.functional.softplus(delta + delta_bias[:, None])
    rows = u.shape[1] // B.shape[1]
    ys = [
        reference.selective_scan(*(t[:, i * rows : (i + 1) * rows].mT for t in (u, dt)), A[i * rows : (i + 1) * rows],
                                 B[:, i].mT, C[:, i].mT).mT
        for i in range(B.shape[1])
    ]  # fmt: skip
    return torch.cat(ys, 1) + D[:, None] * u


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(mamba, "extension", lambda: (StandIn, None))


@pytest.mark.parametrize("shape", SCAN_SHAPES, ids=str)
def test_parity_with_a_stand_in(stand_in, shape):
    expected = outputs_and_gradients(reference.scan_2d, scan_inputs(*shape))
    got = outputs_and_gradients(mamba.scan_2d, scan_inputs(*shape, dtype=torch.float32))
    assert_close(got, expected, 5e-6)


def test_half_precision_goes_in_as_fp32(stand_in):
    inputs = scan_inputs(1, 3, 4, 8, 4, 2, dtype=torch.bfloat16)
    expected = outputs_and_gradients(reference.scan_2d, [t.detach().double().requires_grad_() for t in inputs])
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs_and_gradients(mamba.scan_2d, inputs)
    for name, value in got.items():
        assert value.dtype == torch.bfloat16 and relative_error(value, expected[name]) <= 2**-7, name


def test_what_to_install_where_it_is_absent(monkeypatch):
    monkeypatch.setattr(mamba, "extension", lambda: (None, "No module named 'selective_scan_cuda'"))
    ok, reason = mamba.can_run("cuda", torch.float32, 16)
    assert not ok and "No module named 'selective_scan_cuda'" in reason and "requirements-cuda.txt" in reason
    assert mamba.can_run("cuda", torch.float64, 16) == (False, "mamba-ssm's kernel has no fp64")
