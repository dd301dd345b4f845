"""The layers around the scan against the plain expression: outputs and all gradients."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, assert_close, outputs_and_gradients

from vmrnn.network.fused import cell_gate, conv_silu, in_proj, norm, norm_gate_linear

pytestmark = pytest.mark.usefixtures("nan_filled")


def plain_conv_silu(x, weight, bias):
    return F.silu(F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(bias))).permute(0, 2, 3, 1)


def plain_norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def plain_norm_gate_linear(y, z, norm_weight, norm_bias, weight):
    return F.linear(plain_norm(y, norm_weight, norm_bias) * F.silu(z), weight)


def plain_cell_gate(o, c):
    f = torch.sigmoid(o)
    c = f * (c + torch.tanh(o))
    return f * torch.tanh(c), c


def with_eps(function):
    return lambda *tensors: function(*tensors[:4], 1e-5, *tensors[4:])


MAP = (2, 5, 3, 7)
# The function, what it must equal, the shapes of its inputs, and how many of them are maps in bf16 under autocast
CASES = {
    "in_proj": (in_proj, lambda u, weight: F.linear(u, weight).chunk(2, -1), [MAP, (10, 7)], 1),
    "conv_silu": (conv_silu, plain_conv_silu, [MAP, (7, 1, 3, 3), (7,)], 1),
    "conv_silu of one pixel": (conv_silu, plain_conv_silu, [(1, 1, 1, 4), (4, 1, 3, 3), (4,)], 1),
    "norm": (lambda *t: norm(*t, 1e-5), plain_norm, [MAP, (7,), (7,)], 0),
    "norm_gate_linear": (with_eps(norm_gate_linear), plain_norm_gate_linear, [MAP, MAP, (7,), (7,), (4, 7)], 2),
    "cell_gate": (cell_gate, plain_cell_gate, [MAP, MAP], 0),
}


@pytest.mark.device
@pytest.mark.parametrize("name", CASES)
def test_parity(name):
    function, plain, shapes, _ = CASES[name]
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(function, inputs)
    got = outputs_and_gradients(function, [t.detach().float().to(DEVICE).requires_grad_() for t in inputs])
    assert_close(got, outputs_and_gradients(plain, inputs), 5e-6)


@pytest.mark.device
@pytest.mark.parametrize("name", CASES)
def test_under_autocast(name):
    function, plain, shapes, maps = CASES[name]
    types = [torch.bfloat16] * maps + [torch.float32] * (len(shapes) - maps)
    inputs = [torch.randn(shape).to(DEVICE, dtype).requires_grad_() for shape, dtype in zip(shapes, types, strict=True)]
    expected = outputs_and_gradients(plain, [t.detach().cpu().double().requires_grad_() for t in inputs])
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        got = outputs_and_gradients(function, inputs)
    assert_close(got, expected, 0.05)


def test_what_autocast_leaves_alone():
    """fp64 under autocast, and maps of any dtype without autocast."""
    x, weight, bias = torch.randn(2, 3), torch.ones(3), torch.zeros(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x, weight, bias, 1e-5).dtype == torch.bfloat16
        assert norm(x.double(), weight.double(), bias.double(), 1e-5).dtype == torch.float64
    assert norm(x.half(), weight.half(), bias.half(), 1e-5).dtype == torch.float16
