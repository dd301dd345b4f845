"""The recomputing pieces against the plain expression: outputs and all gradients."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from vmrnn.recompute import conv_silu, norm_gate


def plain_conv_silu(x, weight, bias):
    return F.silu(F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(bias))).permute(0, 2, 3, 1)


def plain_norm_gate(y, z, weight, bias):
    return F.layer_norm(y, y.shape[-1:], weight, bias, 1e-5) * F.silu(z)


CASES = {
    "conv_silu": (conv_silu, plain_conv_silu, [(2, 5, 3, 7), (7, 1, 3, 3), (7,)]),
    "conv_silu of one pixel": (conv_silu, plain_conv_silu, [(1, 1, 1, 4), (4, 1, 3, 3), (4,)]),
    "norm_gate": (lambda *t: norm_gate(*t, 1e-5), plain_norm_gate, [(2, 5, 3, 7), (2, 5, 3, 7), (7,), (7,)]),
}


@pytest.mark.parametrize("name", CASES)
def test_parity(name):
    function, plain, shapes = CASES[name]
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    torch.testing.assert_close(function(*inputs), plain(*inputs))
    assert torch.autograd.gradcheck(function, inputs)
    single = [t.detach().float().requires_grad_() for t in inputs]
    weights = torch.randn(plain(*inputs).shape)
    got = torch.autograd.grad((function(*single) * weights).sum(), single)
    expected = torch.autograd.grad((plain(*inputs) * weights.double()).sum(), inputs)
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert relative_error(g, e) < 5e-6, f"gradient {i}"


@pytest.mark.parametrize("name", CASES)
def test_under_autocast_gradients_arrive_in_the_type_of_their_inputs(name):
    function, plain, shapes = CASES[name]
    types = [torch.bfloat16] * (1 if name.startswith("conv") else 2) + [torch.float32] * 2
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape, dtype in zip(shapes, types, strict=True)]
    with torch.autocast("cpu", torch.bfloat16):
        function(*inputs).float().sum().backward()
    reference = [t.detach().double().requires_grad_() for t in inputs]
    plain(*reference).sum().backward()
    for i, (t, r) in enumerate(zip(inputs, reference, strict=True)):
        assert t.grad.dtype == t.dtype
        assert relative_error(t.grad, r.grad) < 0.05, f"gradient {i}"
