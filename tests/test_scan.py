"""Every scan back end against the reference in float64: the output and all six gradients."""

import logging

import pytest
import torch
from helpers import DEVICE, SCAN_NAMES, SCAN_SHAPES, assert_close, outputs_and_gradients, relative_error, scan_inputs

from vmrnn import scan
from vmrnn.errors import UserError
from vmrnn.scan import reference

pytestmark = pytest.mark.usefixtures("nan_filled")


@pytest.mark.device
@pytest.mark.parametrize("shape", SCAN_SHAPES, ids=str)
@pytest.mark.parametrize(
    "name, device",
    [
        ("cpu", "cpu"),
        ("torch", DEVICE),
        *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ("mamba", "triton", "torch")),
    ],
)
def test_parity(name, device, shape):
    ok, reason = scan.BACKENDS[name].can_run(device, torch.float32, shape[4])
    if not ok or (device == "cuda" and not torch.cuda.is_available()):
        pytest.skip(f"{name}: {reason if not ok else 'no CUDA device'}")
    expected = outputs_and_gradients(reference.scan_2d, scan_inputs(*shape))
    inputs = scan_inputs(*shape, dtype=torch.float32, device=device)
    got = outputs_and_gradients(lambda *t: scan.scan_2d(*t, backend=name), inputs)
    steps = shape[1] * shape[2] if device != "cpu" else 0  # see test_scan_triton.py
    assert_close(got, expected, 5e-6 + steps * 2**-24)


def test_the_reference_against_four_explicit_walks():
    """An oracle that shares nothing with the reference: positions visited one by one in numpy order."""
    x, dbl, dt_weight, dt_bias, A_log, D = (t.detach() for t in scan_inputs(1, 3, 4, 2, 2, 1))
    H, W = 3, 4
    rows = [(i, j) for i in range(H) for j in range(W)]
    columns = [(i, j) for j in range(W) for i in range(H)]
    y = torch.zeros(H, W, 2, dtype=torch.float64)
    for k, order in enumerate([rows, columns, rows[::-1], columns[::-1]]):
        h = torch.zeros(2, 2, dtype=torch.float64)
        for i, j in order:
            dt_low, b, c = dbl[0, i, j, k, :1], dbl[0, i, j, k, 1:3], dbl[0, i, j, k, 3:]
            dt = torch.log1p(torch.exp(dt_weight[k] @ dt_low + dt_bias[k]))
            h = torch.exp(-dt[:, None] * torch.exp(A_log[k])) * h + dt[:, None] * b * x[0, i, j][:, None]
            y[i, j] += h @ c + D[k] * x[0, i, j]
    assert relative_error(reference.scan_2d(x, dbl, dt_weight, dt_bias, A_log, D)[0], y) < 1e-12


def test_gradients_of_the_chunked_path_numerically(monkeypatch):
    monkeypatch.setattr(scan.chunked, "CHUNK", 4)  # 6 positions: a whole chunk and a short one
    inputs = scan_inputs(1, 2, 3, 2, 2, 1)
    assert torch.autograd.gradcheck(lambda *t: scan.scan_2d(*t, backend="torch"), inputs)


def test_bf16_goes_through_fp32():
    inputs = scan_inputs(1, 4, 4, 16, 16, 1, dtype=torch.bfloat16)
    y = scan.scan_2d(*inputs, backend="torch")
    exact = reference.scan_2d(*(t.double() for t in inputs))
    assert y.dtype == torch.bfloat16
    assert relative_error(y, exact) < 2**-8
    singles = [t.float() for t in inputs]
    with torch.autocast("cpu", torch.bfloat16):  # does not reach into it
        assert relative_error(scan.scan_2d(*singles, backend="torch"), exact) < 1e-5


@pytest.mark.parametrize("wrong", range(1, 6), ids=SCAN_NAMES[1:])
def test_shapes_that_do_not_belong_together_reach_no_kernel(wrong):
    inputs = scan_inputs(1, 3, 4, 8, 4, 2, dtype=torch.float32)
    inputs[wrong] = inputs[wrong][..., :-1]
    with pytest.raises(ValueError, match="scan: "):
        scan.scan_2d(*inputs)


def test_a_named_back_end_never_falls_back():
    with pytest.raises(UserError, match="CUDA"):
        scan.resolve("mamba", "cpu")
    with pytest.raises(UserError, match="does not exist: choose auto"):
        scan.resolve("fast", "cpu")


def test_auto_says_when_it_is_slow(monkeypatch, caplog):
    monkeypatch.setattr(scan, "ORDER", {"cpu": ("mamba", "torch")})
    monkeypatch.setattr(scan, "_logged", set())
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="vmrnn"):
        assert [scan.resolve("auto", "cpu") for _ in range(3)] == ["torch"] * 3
    (entry,) = caplog.records  # once, not at every call
    assert entry.levelno == logging.WARNING
    assert "SLOW" in entry.message and "mamba" in entry.message


def test_every_back_end_gives_a_reason():
    answers = {name: module.can_run("cpu", torch.float32, 16) for name, module in scan.BACKENDS.items()}
    assert all(reason for _, reason in answers.values())
    assert answers["torch"][0] and not answers["mamba"][0]
