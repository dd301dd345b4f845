"""The Triton kernels around the scan: against the plain pieces in float64, and what the compiler makes of them.

As in test_scan_triton.py: numbers from Triton's interpreter, in a process of its own; registers and
spills from compiling ahead of time; a GPU where there is one.
"""

import json
import os
import sys

import pytest
import torch
from conftest import relative_error
from test_scan_triton import ARCHITECTURES, GPU, NO_GPU, assert_small, needs_triton, resources, run_interpreter

from vmrnn import fused_layers, recompute
from vmrnn.fused_layers import conv_blocks
from vmrnn.scan import fused
from vmrnn.ss2d import SS2D

TOLERANCE = 2e-6
# (B, H, W, C): single pixels, edges, blocks and parts of columns, rows and channels
MAPS = [(1, 1, 1, 5), (2, 5, 3, 40), (1, 7, 19, 3), (2, 4, 4, 32)]
MAPS_GPU = [*MAPS, (16, 32, 32, 256), (16, 8, 8, 1024), (2, 9, 17, 2000)]


def conv_case(B, H, W, C):
    return fused_layers.conv_silu, recompute.conv_silu, [(B, H, W, C), (C, 1, 3, 3), (C,)]


def gate_case(B, H, W, C):
    def with_eps(function):
        return lambda *tensors: function(*tensors, 1e-5)

    return with_eps(fused_layers.norm_gate), with_eps(recompute.norm_gate), [(B, H, W, C), (B, H, W, C), (C,), (C,)]


LAYERS = {"conv_silu": conv_case, "norm_gate": gate_case}


def results(function, inputs, weights):
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


def errors_of(case, shape, dtype=torch.float32, device="cpu"):
    """{y and each gradient: relative error} with maps in dtype and parameters in fp32, as autocast has them."""
    function, plain, shapes = LAYERS[case](*shape)
    torch.manual_seed(0)
    inputs = [torch.randn(s, device=device).to(torch.float32 if len(s) == 1 or s[1:] == (1, 3, 3) else dtype)
              .requires_grad_() for s in shapes]  # fmt: skip
    exact = [t.detach().double().requires_grad_() for t in inputs]
    weights = torch.randn(shape, device=device).to(dtype)
    got, expected = results(function, inputs, weights), results(plain, exact, weights.double())
    assert [t.dtype for t in got[1:]] == [t.dtype for t in inputs] and got[0].dtype == dtype
    return {f"result {i}": relative_error(g.cpu(), e.cpu()) for i, (g, e) in enumerate(zip(got, expected, strict=True))}


def interpret():
    """Everything that needs the interpreter; {case: {what: error}}."""
    torch.set_num_threads(1)
    fused_layers.GATE_PROGRAMS = 2  # whose loops then run more than once
    fused_layers.GATE_ELEMENTS, fused_layers.ELEMENTS = 64, 128
    fused_layers.ROWS, fused_layers.ROWS_BACK = 4, 3  # several strips, and parts of them
    answers = {f"{case} {shape}": errors_of(case, shape) for case in LAYERS for shape in MAPS}
    for dtype in (torch.bfloat16, torch.float16):
        answers |= {f"{case} {dtype}": errors_of(case, (2, 3, 2, 8), dtype) for case in LAYERS}
    answers["exact"] = {}
    for case, make in LAYERS.items():
        function, _, shapes = make(2, 3, 5, 4)
        inputs = [torch.randn(s).requires_grad_() for s in shapes]
        weights = torch.randn(shapes[0])
        expected = results(function, inputs, weights)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        turned = [inputs[0].transpose(1, 2).contiguous().transpose(1, 2), *inputs[1:]]
        turned_weights = weights.transpose(1, 2).contiguous().transpose(1, 2)
        for name, got in (
            ("compiled", results(compiled, inputs, weights)),
            ("strides", results(function, turned, turned_weights)),
        ):
            answers["exact"][f"{case} {name}"] = max(
                (g - e).abs().max().item() for g, e in zip(got, expected, strict=True)
            )
        op = getattr(torch.ops.vmrnn, case)
        torch.library.opcheck(op, (*inputs, 1e-5) if case == "norm_gate" else tuple(inputs))

    # Where SS2D's scan is Triton's, so are its layers.
    fused.can_run = lambda *_: (True, "in the interpreter")
    calls = []
    fused_layers.conv_kernel = Counted(fused_layers.conv_kernel, calls)
    torch.manual_seed(0)
    layer, u = SS2D(4, d_state=2, scan="triton"), torch.randn(1, 3, 2, 4)
    for name in ("triton", "reference"):
        layer.scan, layer.out_norm.eps = name, 1e-5
        y = layer(u)
        answers[name] = [y.detach(), *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]
    pairs = zip(answers.pop("triton"), answers.pop("reference"), strict=True)
    answers["SS2D"] = {f"result {i}": relative_error(a, b) for i, (a, b) in enumerate(pairs)}
    answers["exact"]["kernels that ran"] = abs(len(calls) - 2)
    return answers


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel, calls):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        self.calls.append(grid)
        return self.kernel[grid]


@pytest.fixture(scope="module")
def interpreted():
    return run_interpreter(__file__)


@needs_triton
@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("case", LAYERS)
def test_parity_in_the_interpreter(interpreted, case, shape):
    assert_small(interpreted[f"{case} {shape}"], TOLERANCE)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LAYERS)
def test_half_precision_in_the_interpreter(interpreted, case, dtype):
    # One rounding of each result; dx of the convolution comes from gradients rounded once before.
    assert_small(interpreted[f"{case} {dtype}"], 2 * torch.finfo(dtype).eps)


@needs_triton
def test_in_ss2d_and_the_same_bits_in_the_interpreter(interpreted):
    """Strides and torch.compile (in one graph) change nothing; opcheck has passed."""
    assert_small(interpreted["exact"], 0.0)
    assert_small(interpreted["SS2D"], 1e-5)


@pytest.mark.skipif(not GPU, reason=NO_GPU)
@pytest.mark.parametrize("shape", MAPS_GPU, ids=str)
@pytest.mark.parametrize("case", LAYERS)
def test_parity_on_a_gpu(case, shape):
    assert_small(errors_of(case, shape, device="cuda"), TOLERANCE)
    assert_small(errors_of(case, shape, torch.bfloat16, device="cuda"), 2 * torch.finfo(torch.bfloat16).eps)


def kernels():
    """{name: (kernel, constants)} at the blocks of network D."""
    built = {}
    for side, C in ((32, 256), (8, 1024)):
        conv = conv_blocks((16, side, side, C), fused_layers.ROWS)[2]
        back = conv_blocks((16, side, side, C), fused_layers.ROWS_BACK)[2]
        built |= {
            f"conv {side}": (fused_layers.conv_kernel, conv | dict(TRANSPOSED=False)),
            f"conv transposed {side}": (fused_layers.conv_kernel, conv | dict(TRANSPOSED=True)),
            f"conv backward {side}": (fused_layers.conv_backward_kernel, back),
        }
    for C in (256, 1024):
        blocks = fused_layers.gate_blocks(1, C)[1]
        built |= {
            f"gate {C}": (fused_layers.gate_kernel, blocks),
            f"gate backward {C}": (fused_layers.gate_backward_kernel, blocks),
        }
    return built


@needs_triton
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_without_spills(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, (kernel, constants) in kernels().items():
        registers, stack, shared = resources(kernel, constants, fused_layers.OPTIONS, "bf16", arch)
        assert stack == 0, f"{name}: {stack} bytes of spills"
        assert registers <= 168 and shared <= 8192, f"{name}: {registers} registers, {shared} bytes shared"


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        print(json.dumps(interpret()))
    else:
        sys.exit("run by pytest")
