"""The Triton scan: against the reference in float64, and what the compiler makes of it.

No GPU is needed. Numbers come from Triton's interpreter, in one process of its own, since
TRITON_INTERPRET must be set before triton is imported; registers and spills from compiling ahead of time.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import (
    ROOT,
    SCAN_SHAPES,
    assert_small,
    nan_filled_memory,
    outputs_and_gradients,
    relative_error,
    relative_errors,
    scan_inputs,
)
from triton_helpers import ARCHITECTURES, GPU, NO_GPU, build, needs_triton, run_interpreter, scan_kernels

from vmrnn.scan import reference, triton_scan

TOLERANCE = 5e-6  # max abs error / max abs of the reference

# name: (shape (B, H, W, Di, N, R), segments that forward and backward split the sequence into, steps of a chunk and of
# the shortest segment). The interpreter takes about 20 ms per step of a program, and a program is a batch item, a
# direction, a block of channels and a segment.
CASES = {
    "1x1": ((1, 1, 1, 8, 2, 1), (1, 1), 8),
    "rows and columns differ": ((1, 3, 5, 9, 16, 3), (1, 1), 8),
    "a block that is not full": ((1, 2, 5, 40, 4, 2), (1, 1), 8),
    "one row": ((1, 1, 11, 5, 5, 1), (1, 1), 8),
    "one column, one state": ((2, 9, 1, 8, 1, 1), (1, 1), 8),
    "rank outside": ((1, 3, 3, 8, 16, 17), (1, 1), 8),
    "many states": ((1, 2, 3, 3, 33, 2), (1, 1), 8),
    "split in the backward alone": ((1, 3, 7, 12, 4, 3), (1, 2), 8),
    "split, with chunks in a segment": ((1, 3, 6, 5, 2, 1), (3, 3), 4),
    "split, the last segment longer than a chunk": ((1, 5, 6, 3, 2, 1), (4, 4), 4),
    "split, blocks and rank outside": ((1, 4, 4, 33, 1, 17), (4, 4), 4),
    "split, batch and many states": ((2, 4, 4, 3, 33, 2), (4, 4), 4),
}
HALF = {"torch.bfloat16": torch.bfloat16, "torch.float16": torch.float16}
EXTREMES = (-80.0, -20.0, 20.5, 80.0)  # dt_bias


def errors_of(function, inputs, dtype=torch.float32, oracle=reference.scan_2d):
    """{y and each gradient: relative error}, both from the inputs as dtype holds them."""
    inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    expected = outputs_and_gradients(oracle, [t.detach().double().requires_grad_() for t in inputs])
    got = outputs_and_gradients(function, inputs)
    wrong_type = [name for name, t in got.items() if t.dtype != dtype]
    assert not wrong_type, wrong_type
    return relative_errors(got, expected)


def interpret():
    """Everything that needs the interpreter; {case: {what: error}}."""
    torch.set_num_threads(1)
    answers = {}
    for name, (shape, segments, shortest) in CASES.items():
        triton_scan.CHUNK = triton_scan.SHORTEST_SEGMENT = shortest  # several chunks and segments on small maps
        triton_scan.WARPS = 1 << 30 if max(segments) > 1 else 0
        inputs = scan_inputs(*shape)
        steps = shape[1] * shape[2]
        lengths = triton_scan.lengths(inputs[0], *shape[4:])[:2]
        assert tuple(-(-steps // length) for length in lengths) == segments, name
        answers[name] = errors_of(triton_scan.scan_2d, inputs)
    triton_scan.WARPS = 0
    for name, dtype in HALF.items():
        answers[name] = errors_of(triton_scan.scan_2d, scan_inputs(1, 3, 3, 8, 16, 2), dtype)
    for bias in EXTREMES:
        inputs = scan_inputs(1, 2, 2, 4, 2, 1)
        inputs[3] = torch.full_like(inputs[3], bias)
        answers[f"bias {bias}"] = errors_of(triton_scan.scan_2d, inputs)

    def twice(scan):
        return lambda x, *rest: scan(torch.tanh(scan(x, *rest)), *rest)

    inputs = scan_inputs(1, 3, 4, 8, 4, 2)
    answers["chained"] = errors_of(twice(triton_scan.scan_2d), inputs, oracle=twice(reference.scan_2d))

    # Strides, gradients and torch.compile change no bit. Four segments: without gradients the forward keeps the states
    # before them alone.
    triton_scan.WARPS = 1 << 30
    inputs = [t.detach().float() for t in scan_inputs(1, 4, 4, 4, 4, 2)]
    turned = [inputs[0].transpose(1, 2).contiguous().transpose(1, 2), *inputs[1:]]
    leaves = [t.clone().requires_grad_() for t in inputs]
    assert triton_scan.lengths(inputs[0], 4, 2)[:2] == (4, 4)
    compiled = torch.compile(triton_scan.scan_2d, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(triton_scan.scan_2d, leaves)
    answers["exact"] = relative_errors(outputs_and_gradients(compiled, leaves), expected)
    for name, given in {"without gradients": inputs, "not contiguous": turned}.items():
        answers["exact"][name] = relative_error(triton_scan.scan_2d(*given), expected["output 0"])
    triton_scan.WARPS = 0

    leaves = [t.detach().float().requires_grad_() for t in scan_inputs(1, 2, 1, 3, 2, 1)]
    torch.library.opcheck(triton_scan.scan_op, (*leaves, True))
    plain = [t.detach() for t in leaves]
    y, checkpoints = triton_scan.scan_op(*plain, True)
    torch.library.opcheck(triton_scan.scan_backward_op, (y, *plain, checkpoints))
    return answers


@pytest.fixture(scope="module")
def interpreted():
    return run_interpreter(__file__)


@needs_triton
@pytest.mark.parametrize("case", [*CASES, "chained"])
def test_parity_in_the_interpreter(interpreted, case):
    assert_small(interpreted[case], TOLERANCE)


@needs_triton
@pytest.mark.parametrize("name", HALF)
def test_half_precision_in_the_interpreter(interpreted, name):
    assert_small(interpreted[name], torch.finfo(HALF[name]).eps)  # one rounding of each result


@needs_triton
@pytest.mark.parametrize("bias", EXTREMES)
def test_extreme_step_sizes_in_the_interpreter(interpreted, bias):
    # fp32 rounds dt A to eps |dt A|, which is then the relative error of exp(dt A); below -80 all
    # but the smallest numbers are flushed to zero.
    assert_small(interpreted[f"bias {bias}"], TOLERANCE + 2 * torch.finfo(torch.float32).eps * max(bias, 0))


@needs_triton
def test_same_bits_in_the_interpreter(interpreted):
    """Strides, gradients and torch.compile (in one graph) change nothing; opcheck has passed."""
    assert_small(interpreted["exact"], 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason=NO_GPU)
@pytest.mark.parametrize(
    "shape",
    [
        *SCAN_SHAPES,
        (1, 32, 32, 256, 16, 8),
        (8, 32, 32, 256, 16, 8),
        (16, 16, 16, 512, 16, 16),
        (16, 8, 8, 1024, 16, 32),
    ],
    ids=str,
)
def test_parity_on_a_gpu(shape):
    inputs = scan_inputs(*shape, device="cuda")
    # A GPU's exp2 is right to 2 units of the last place, and off to one side for a state that hardly decays: the
    # product of all steps' decays is then off by as many times that.
    assert_small(errors_of(triton_scan.scan_2d, inputs), TOLERANCE + shape[1] * shape[2] * 2**-24)
    assert_small(errors_of(triton_scan.scan_2d, inputs, torch.bfloat16), torch.finfo(torch.bfloat16).eps)
    first, second = (
        outputs_and_gradients(triton_scan.scan_2d, [t.float().detach().requires_grad_() for t in inputs]) for _ in "ab"
    )
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


@needs_triton
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("batch, side", [(1, "32x32"), (16, "16x16"), (16, "8x8")])
def test_compiled_without_spills(batch, side, arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dtype = "bf16" if side == "16x16" else "fp32"  # both, in half the time that both of each take
    for name, kernel in scan_kernels(side, batch).items():
        registers, stack, shared = build(*kernel, dtype, arch)
        assert stack == 0, f"{name}: {stack} bytes of spills"
        assert registers <= 255 and shared <= 1024, f"{name}: {registers} registers, {shared} bytes shared"


@needs_triton
def test_many_states_compiled_without_spills(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, kernel in scan_kernels("32x32", 16, N=64).items():
        assert build(*kernel, "fp32", 90)[1] == 0, name


@pytest.mark.parametrize("B", [1, 3, 8, 64])
def test_parts_of_the_sequence_fit_together(B):
    """Every step is in one part, parts are whole chunks, and no launch has far more programs than asked for."""
    for H, W, Di in [(1, 1, 8), (5, 7, 24), (8, 8, 1024), (32, 32, 256), (127, 129, 96), (128, 128, 128)]:
        for N, R in ((16, 8), (33, 17)):
            *parts, chunk = triton_scan.lengths(torch.empty(B, H, W, Di, device="meta"), N, R)
            for part, block in zip(
                parts, (triton_scan.forward_blocks(N, R), triton_scan.backward_blocks(N)), strict=True
            ):
                assert part % chunk == 0 and chunk % block["STEPS"] == 0 and part % (2 * triton_scan.STEPS) == 0
                pieces = -(-H * W // part)
                assert pieces == 1 or (
                    part >= triton_scan.SHORTEST_SEGMENT and pieces * B * 4 * (Di // 32) <= triton_scan.WARPS
                )


def test_can_run_says_why_not(monkeypatch):
    assert triton_scan.can_run("cpu", torch.float32, 16) == (
        False,
        "the Triton kernels run on CUDA only, the device is cpu",
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ok, reason = triton_scan.can_run("cuda", torch.float32, 16)
    assert not ok and reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_scan, "triton", triton_scan.triton or sys)
    monkeypatch.setattr(triton_scan.triton, "__version__", "3.9", raising=False)
    assert triton_scan.can_run("cuda", torch.bfloat16, 16) == (True, "fused Triton kernels, Triton 3.9")
    assert "convert to float32" in triton_scan.can_run("cuda", torch.float64, 16)[1]
    assert "d_state" in triton_scan.can_run("cuda", torch.float32, 65)[1]
    monkeypatch.setattr(triton_scan.triton, "__version__", "3.2.0")
    ok, reason = triton_scan.can_run("cuda", torch.float32, 16)
    assert not ok and "Triton 3.2.0 cannot compile" in reason and "pip install --upgrade torch" in reason


def test_imports_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from vmrnn.scan import triton_scan
import vmrnn.network.ss2d
print(triton_scan.can_run("cuda", torch.float32, 16))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "pip install triton" in done.stdout, done.stdout + done.stderr


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        with nan_filled_memory():
            print(json.dumps(interpret()))
    else:
        sys.exit("run by pytest")
