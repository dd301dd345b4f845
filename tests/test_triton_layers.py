"""The Triton kernels around the scan: against the plain pieces in float64, and what the compiler makes of them.

As in test_scan_triton.py: numbers from Triton's interpreter, in a process of its own; registers and
spills from compiling ahead of time; a GPU where there is one.
"""

import json
import os
import sys

import pytest
import torch
from helpers import assert_small, nan_filled_memory, outputs_and_gradients, relative_errors
from triton_helpers import ARCHITECTURES, GPU, NO_GPU, build, needs_triton, run_interpreter

from vmrnn import scan
from vmrnn.network import fused, fused_triton
from vmrnn.network.cell import VMRNNCell
from vmrnn.network.fused_triton import conv_blocks
from vmrnn.scan import triton_scan

TOLERANCE = 2e-6
# (B, H, W, C): single pixels, edges, blocks and parts of columns, rows and channels
MAPS = [(1, 1, 1, 5), (2, 5, 3, 40), (1, 7, 19, 3), (2, 4, 4, 32)]
MAPS_GPU = [*MAPS, (16, 32, 32, 256), (16, 8, 8, 1024), (2, 9, 17, 2000)]


def with_eps(layers):
    return lambda *tensors: layers.norm_gate_linear(*tensors[:4], 1e-5, *tensors[4:])


# {name: function of the shape of a map (B, H, W, C), which gives: the Triton layer, the torch layer, the shapes of the
# inputs, how many of the inputs are in half precision under autocast}
LAYERS = {
    "conv_silu": lambda m: (fused_triton.conv_silu, fused.conv_silu, [m, (m[-1], 1, 3, 3), m[-1:]], 1),
    "norm": lambda m: (
        lambda *t: fused_triton.norm(*t, 1e-5),
        lambda *t: fused.norm(*t, 1e-5),
        [m, m[-1:], m[-1:]],
        0,
    ),
    "norm_gate_linear": lambda m: (
        with_eps(fused_triton),
        with_eps(fused),
        [m, m, m[-1:], m[-1:], (7, m[-1])],
        2,
    ),
    "cell_gate": lambda m: (fused_triton.cell_gate, fused.cell_gate, [m, m], 0),
}


def errors_of(case, shape, dtype=torch.float32, device="cpu"):
    """{each output and gradient: relative error}. In a half precision: under autocast, with the dtypes it gives."""
    function, plain, shapes, halves = LAYERS[case](shape)
    torch.manual_seed(0)
    inputs = [torch.randn(s, device=device).to(dtype if i < halves else torch.float32).requires_grad_()
              for i, s in enumerate(shapes)]  # fmt: skip
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        got = outputs_and_gradients(function, inputs)
    assert got["output 0"].dtype == (torch.float32 if case == "cell_gate" else dtype)
    return relative_errors(got, outputs_and_gradients(plain, [t.detach().double().requires_grad_() for t in inputs]))


def interpret():
    """Everything that needs the interpreter; {case: {what: error}}."""
    torch.set_num_threads(1)
    fused_triton.NORM_PROGRAMS = 2  # whose loops then run more than once
    fused_triton.NORM_ELEMENTS, fused_triton.ELEMENTS = 64, 128
    fused_triton.ROWS, fused_triton.ROWS_BACKWARD = 4, 3  # several strips, and strips that are not full
    answers = {f"{case} {shape}": errors_of(case, shape) for case in LAYERS for shape in MAPS}
    for dtype in (torch.bfloat16, torch.float16):
        answers |= {f"{case} {dtype}": errors_of(case, (2, 3, 2, 8), dtype) for case in LAYERS}

    # torch.compile, an input with a stride between positions, and one that is not contiguous change no bit.
    answers["exact"] = {}
    for case, make in LAYERS.items():
        function, _, shapes, _ = make((2, 3, 5, 4))
        inputs = [torch.randn(s).requires_grad_() for s in shapes]
        expected = outputs_and_gradients(function, inputs)
        half = [
            t.repeat(*[1] * (t.ndim - 1), 2).chunk(2, -1)[0] if t.ndim == 4 and t.shape[1] > 1 else t for t in inputs
        ]
        turned = [inputs[0].transpose(1, 2).contiguous().transpose(1, 2), *inputs[1:]]
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for name, got in (
            ("compiled", outputs_and_gradients(compiled, inputs)),
            ("half of the columns", outputs_and_gradients(function, half)),
            ("strides", outputs_and_gradients(function, turned)),
        ):
            answers["exact"][f"{case} {name}"] = max(relative_errors(got, expected).values())

    # opcheck raises where an op is not registered as it should be.
    maps, channels = [torch.randn(2, 3, 5, 4).requires_grad_() for _ in range(2)], torch.randn(2, 4).unbind()
    for name, arguments in {
        "conv_silu": (maps[0], torch.randn(4, 1, 3, 3), channels[0]),
        "norm": (maps[0], *channels, 1e-5, torch.bfloat16),
        "norm_gate": (*[m.detach() for m in maps], *channels, 1e-5),
        "norm_gate_backward": (*[m.detach() for m in (maps[0], *maps)], *channels, 1e-5),
        "cell_gate": maps,
    }.items():
        torch.library.opcheck(getattr(torch.ops.vmrnn, name), tuple(arguments))

    # A cell whose scan is Triton's uses Triton layers and the Triton gate.
    triton_scan.can_run = lambda *_: (True, "in the interpreter")
    scan.first_use = lambda *_: None  # the check of a GPU would take minutes here, and test_selfcheck.py tests it
    launches = []
    for name in ("conv_kernel", "norm_kernel", "cell_gate_kernel"):
        setattr(fused_triton, name, Counted(getattr(fused_triton, name), launches))
    inputs = [torch.randn(B, 3, 2, 4).requires_grad_() for B in (2, 1, 1)]  # one state for all frames
    runs = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        cell = VMRNNCell(4, drop_path=[0.0], d_state=2, scan=backend)

        def step(x, h, c, *parameters, cell=cell):
            h, (_, c) = cell(x, (h, c))
            return h, c

        runs.append(outputs_and_gradients(step, [*inputs, *cell.parameters()]))
    answers["cell"] = relative_errors(*runs)
    answers["exact"]["launches"] = abs(len(launches) - 6)  # conv forward and backward, LN of x and h, norm, gate
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
def test_in_a_cell_and_the_same_bits_in_the_interpreter(interpreted):
    """Strides and torch.compile (in one graph) change nothing; opcheck has passed."""
    assert_small(interpreted["exact"], 0.0)
    assert_small(interpreted["cell"], 1e-5)


@pytest.mark.gpu
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
        conv = conv_blocks((16, side, side, C), fused_triton.ROWS)[2]
        back = conv_blocks((16, side, side, C), fused_triton.ROWS_BACKWARD)[2]
        built |= {
            f"conv {side}": (fused_triton.conv_kernel, conv | dict(TRANSPOSED=False)),
            f"conv transposed {side}": (fused_triton.conv_kernel, conv | dict(TRANSPOSED=True)),
            f"conv backward {side}": (fused_triton.conv_backward_kernel, back),
        }
    for C in (256, 1024):
        blocks = fused_triton.norm_blocks(1, C)[1]
        built |= {
            f"norm {C}": (fused_triton.norm_kernel, blocks | dict(GATED=False)),
            f"norm backward {C}": (fused_triton.norm_backward_kernel, blocks | dict(GATED=False)),
            f"norm and gate {C}": (fused_triton.norm_kernel, blocks | dict(GATED=True)),
            f"norm and gate backward {C}": (fused_triton.norm_backward_kernel, blocks | dict(GATED=True)),
        }
    block = dict(BLOCK=fused_triton.NORM_ELEMENTS)
    built["cell gate"] = fused_triton.cell_gate_kernel, block
    built["cell gate backward"] = fused_triton.cell_gate_backward_kernel, block
    return built


@needs_triton
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_without_spills(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, (kernel, constants) in kernels().items():
        registers, stack, shared = build(kernel, constants, fused_triton.OPTIONS, "bf16", arch)
        assert stack == 0, f"{name}: {stack} bytes of spills"
        assert registers <= 168 and shared <= 8192, f"{name}: {registers} registers, {shared} bytes shared"


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        with nan_filled_memory():
            print(json.dumps(interpret()))
    else:
        sys.exit("run by pytest")
