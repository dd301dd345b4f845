"""Linear layers through oneDNN against torch.nn.functional.linear: outputs and all gradients."""

import platform

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, assert_identical, outputs_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from vmrnn import runtime
from vmrnn.network import linear as module
from vmrnn.network.linear import Linear, gradient_of_input, gradient_of_weight, linear

pytestmark = pytest.mark.usefixtures("nan_filled")
needs_onednn = pytest.mark.skipif(not module.onednn_multiplies(), reason="this torch has no product by oneDNN")


@pytest.fixture
def chosen(monkeypatch):
    """oneDNN multiplies whatever it can, whatever the processor."""
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(module, "LEAST", 1)


class Weights(TorchDispatchMode):
    """Keeps the weights of oneDNN's products."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if "_linear_pointwise" in str(function):
            self.seen.append(arguments[1])
        return function(*arguments, **(options or {}))


def inputs_of(shape, N, bias, dtype=torch.float32):
    K = shape[-1]
    tensors = [torch.randn(shape), torch.randn(N, K), *([torch.randn(N)] if bias else [])]
    return [t.to(dtype).requires_grad_() for t in tensors]


def in_double(inputs):
    return [t.detach().double().requires_grad_() for t in inputs]


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "shape, N",
    [((2, 5, 3, 7), 10), ((37, 19), 5), ((1, 1, 1, 16), 48), ((3, 1), 1), ((130, 17), 90), ((0, 3), 4)],
    ids=str,
)
def test_parity(shape, N, bias, chosen):
    inputs = inputs_of(shape, N, bias)
    with Weights() as weights:
        got = outputs_and_gradients(linear, inputs)
        if bias:  # without gradients it is another branch
            with torch.no_grad():
                assert torch.equal(linear(*inputs), got["output 0"])
    if inputs[0].numel():
        assert len(weights.seen) == 3 + bias, "output and two gradients"
        assert_close(got, outputs_and_gradients(F.linear, in_double(inputs)), 1e-6)
    else:
        assert_identical(got, outputs_and_gradients(F.linear, inputs))


@needs_onednn
def test_parts_of_tensors(chosen):
    """Halves of a weight, rows with gaps, a gradient that is one number everywhere. Each weight has no gaps for oneDNN,
    which is a thousand times slower with them."""
    both, x = torch.randn(9, 14), torch.randn(6, 5, 20)

    def halves(function):
        def apply(x, both):
            left, right = both.chunk(2, dim=1)
            return function(x[..., 3:10], left).sum() + function(x.transpose(0, 1)[..., :7], right).pow(2).sum()

        return apply

    inputs = [x.requires_grad_(), both.requires_grad_()]
    with Weights() as weights:
        got = outputs_and_gradients(halves(linear), inputs)
    assert len(weights.seen) == 6
    assert all(w.is_contiguous() or w.mT.is_contiguous() for w in weights.seen)
    assert_close(got, outputs_and_gradients(halves(F.linear), in_double(inputs)), 1e-6)


@needs_onednn
def test_gradients_as_functions(chosen):
    grad, x, weight = torch.randn(4, 6, 30), torch.randn(4, 6, 8), torch.randn(30, 8)
    for value, exact in (
        (gradient_of_input(grad, weight), grad.double() @ weight.double()),
        (gradient_of_weight(grad, x), torch.einsum("abn,abk->nk", grad.double(), x.double())),
    ):
        with torch.no_grad():
            torch.testing.assert_close(value.double(), exact, rtol=0, atol=1e-5)
    with Weights() as weights:  # with gradients enabled nobody would differentiate oneDNN's product
        gradient_of_input(grad.requires_grad_(), weight)
    assert not weights.seen


@needs_onednn
def test_second_derivatives(chosen):
    inputs = inputs_of((3, 4), 5, True)

    def second(function, inputs):
        first = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs, create_graph=True)
        return dict(enumerate(torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs)))

    with Weights() as weights:
        got = second(linear, inputs)
    assert weights.seen
    assert_close(got, second(F.linear, in_double(inputs)), 1e-5)


@needs_onednn
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_what_is_left_to_torch(chosen):
    """Another dtype, autocast, compilers, exporters, tracing, transforms, shapes without values."""
    x, weight = torch.randn(4, 6), torch.randn(5, 6)
    layer = Linear(6, 5)
    with Weights() as weights, torch.no_grad():
        assert linear(x.double(), weight.double()).dtype == torch.float64
        assert linear(x[0], weight).shape == (5,)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight).dtype == torch.bfloat16
        torch.func.vmap(lambda row: linear(row[None], weight))(x)
        torch.func.jvp(lambda x: linear(x, weight), (x,), (x,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            tangent = torch.autograd.forward_ad.unpack_dual(linear(dual, weight)).tangent
            torch.testing.assert_close(tangent, x @ weight.mT)
        linear(x.to("meta"), weight.to("meta"))
    assert not weights.seen
    torch.func.grad(lambda x: linear(x, weight).sum())(x)
    for program in (torch.export.export(layer, (x,)).graph, torch.jit.trace(layer, x).graph):
        assert "linear" in str(program) and "_linear_pointwise" not in str(program)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    inputs = inputs_of((4, 6), 5, True)
    assert_identical(outputs_and_gradients(compiled, inputs), outputs_and_gradients(F.linear, inputs))
    with pytest.raises(RuntimeError):
        linear(x, weight, torch.randn(5).double())


@needs_onednn
def test_small_products_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    with Weights() as weights, torch.no_grad():
        linear(torch.randn(4, 6), torch.randn(5, 6))
        assert not weights.seen
        linear(torch.randn(1 << 10, 1 << 6), torch.randn(1 << 6, 1 << 6))
        assert len(weights.seen) == 1


@pytest.fixture
def machine(monkeypatch):
    """machine(vendor, capability, **others): whether products go through oneDNN there."""

    def answer(vendor, capability, multiplies=True, mkl=True):
        monkeypatch.setattr(module, "processor_vendor", lambda: vendor)
        monkeypatch.setattr(module, "onednn_multiplies", lambda: multiplies)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
        return module.onednn_is_faster.__wrapped__()

    return answer


def test_the_rule(machine):
    assert machine("AuthenticAMD", "AVX512")
    assert not machine("AuthenticAMD", "AVX2")
    assert not machine("GenuineIntel", "AVX512")
    assert not machine("", "DEFAULT", mkl=False)  # ARM
    assert not machine("AuthenticAMD", "AVX512", multiplies=False)


@pytest.mark.parametrize("kind", [AttributeError, RuntimeError, TypeError, None])
def test_a_torch_without_the_operation_or_with_another_one(kind, monkeypatch):
    def operation(x, weight, bias=None):
        if kind:
            raise kind("not here")
        return F.linear(x, weight)  # another operation: no bias

    monkeypatch.setattr(module, "by_onednn", operation)
    assert not module.onednn_multiplies()


def test_the_vendor_of_the_processor(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: x\n")
    monkeypatch.setattr(runtime, "CPUINFO", tmp_path / "cpuinfo")
    assert module.processor_vendor() == "GenuineIntel" and runtime.cpu_name() == "x"
    monkeypatch.setattr(runtime, "CPUINFO", tmp_path / "absent")
    for said, vendor in (("AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD", "AuthenticAMD"), ("arm", "arm")):
        monkeypatch.setattr(platform, "processor", lambda said=said: said)
        assert module.processor_vendor() == vendor
