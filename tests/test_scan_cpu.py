"""The C++ scan against the reference loop in float64, and its build."""

import functools
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import (
    AT_ONCE,
    ROOT,
    SCAN_NAMES,
    assert_close,
    assert_identical,
    fresh_scan_inputs,
    outputs_and_gradients,
)

from vmrnn import compiler
from vmrnn.errors import UserError
from vmrnn.scan import cpu, reference

pytestmark = pytest.mark.usefixtures("nan_filled")

TOLERANCE = 5e-6  # max abs error / max abs of the reference

LIBRARY, REASON = cpu.attempt(cpu.wanted_isa())
needs_build = pytest.mark.skipif(LIBRARY is None, reason=REASON)

SHAPES = {  # B, H, W, Di, N, R
    "real_32x32": (1, 32, 32, 64, 16, 8),
    "real_16x16": (2, 16, 16, 96, 16, 16),
    "real_8x8": (1, 8, 8, 256, 16, 32),
    "1x1": (2, 1, 1, 32, 16, 2),
    "1xN": (1, 1, 67, 32, 16, 4),
    "Nx1": (1, 67, 1, 32, 16, 4),
    "wide": (3, 5, 13, 48, 16, 3),
    "odd_channels": (2, 6, 7, 37, 16, 5),
    "one_channel": (1, 4, 3, 1, 16, 1),
    "batch_of_9": (9, 3, 4, 80, 16, 5),
    "d_state_1": (1, 9, 8, 40, 1, 4),
    "d_state_8": (1, 9, 8, 40, 8, 17),
    "d_state_17": (1, 9, 8, 40, 17, 4),
}


def in_double(inputs):
    return [t.detach().double().requires_grad_() for t in inputs]


@pytest.fixture(params=cpu.isas())
def isa(request, monkeypatch):
    monkeypatch.setenv("VMRNN_CPU_ISA", request.param)
    return request.param


@functools.cache
def expected_of(shape):
    return outputs_and_gradients(reference.scan_2d, in_double(fresh_scan_inputs(*shape)))


@needs_build
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_gradients(shape, isa):
    assert_close(outputs_and_gradients(cpu.scan_2d, fresh_scan_inputs(*shape)), expected_of(shape), TOLERANCE)


@needs_build
def test_without_gradients_gives_the_same_output(isa):
    inputs = fresh_scan_inputs(*SHAPES["wide"])
    with torch.no_grad():
        y = cpu.scan_2d(*inputs)
    assert torch.equal(y, cpu.scan_2d(*inputs).detach())


@needs_build
@pytest.mark.parametrize("bias", [-100.0, -20.0, 0.0, 20.5, 80.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_extreme_steps_and_decays(bias, scale, isa):
    inputs = fresh_scan_inputs(1, 5, 6, 32, 8, 2)
    inputs[3] = torch.full_like(inputs[3], bias, requires_grad=True)
    inputs[4] = torch.full_like(inputs[4], math.log(scale), requires_grad=True)
    expected = outputs_and_gradients(reference.scan_2d, in_double(inputs))
    actual = outputs_and_gradients(cpu.scan_2d, inputs)
    # fp32 rounds dt A to about eps |dt A|, and that is the relative error of exp(dt A). Where every step forgets
    # everything, the gradients of dt and A_log are smaller than fp32 can hold.
    tolerance = TOLERANCE + 2 * torch.finfo(torch.float32).eps * min(max(bias, 1) * scale, 100)
    for name, a in actual.items():
        e = expected[name]
        assert a.isfinite().all(), name
        error = (a - e).abs().max()
        assert error <= max(tolerance * e.abs().max(), 1e-37), f"{name}: {error:.2e} of {e.abs().max():.2e}"


@needs_build
def test_zeros_and_denormals(isa):
    inputs = [t.detach() for t in fresh_scan_inputs(1, 4, 5, 33, 8, 2)]
    for factor in (0.0, 1e-40):
        scaled = [inputs[0] * factor, *inputs[1:]]
        expected = reference.scan_2d(*(t.double() for t in scaled))
        assert (cpu.scan_2d(*scaled) - expected).abs().max() <= 1e-42


@needs_build
@pytest.mark.parametrize("which", range(6), ids=SCAN_NAMES)
def test_nan_in_gives_nan_out(which, isa):
    inputs = [t.detach() for t in fresh_scan_inputs(2, 4, 5, 33, 8, 2)]
    # A payload in the low bits, as arithmetic on the exponent would see it.
    nan = torch.tensor(0x7FC00123, dtype=torch.int32).view(torch.float32)
    inputs[which].view(-1)[7] = nan
    expected = reference.scan_2d(*inputs).isnan().any(1).any(1)
    assert expected.any()
    assert torch.equal(cpu.scan_2d(*inputs).isnan().any(1).any(1), expected)


@needs_build
def test_two_chained_calls(isa):
    def twice(x, *rest):
        return reference_or_cpu(torch.tanh(reference_or_cpu(x, *rest)), *rest)

    inputs = fresh_scan_inputs(2, 5, 4, 48, 16, 3)
    reference_or_cpu = reference.scan_2d
    expected = outputs_and_gradients(twice, in_double(inputs))
    reference_or_cpu = cpu.scan_2d
    assert_close(outputs_and_gradients(twice, inputs), expected, TOLERANCE)


@needs_build
def test_not_contiguous():
    inputs = fresh_scan_inputs(2, 5, 4, 48, 16, 3)
    expected = outputs_and_gradients(cpu.scan_2d, inputs)
    inputs[0] = inputs[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    inputs[4] = inputs[4].mT.contiguous().mT
    assert_identical(outputs_and_gradients(cpu.scan_2d, inputs), expected)


@needs_build
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    inputs = fresh_scan_inputs(2, 5, 4, 48, 16, 3, dtype=dtype)
    actual = outputs_and_gradients(cpu.scan_2d, inputs)
    assert all(t.dtype == dtype for t in actual.values())
    assert_close(actual, outputs_and_gradients(reference.scan_2d, in_double(inputs)), 2 * torch.finfo(dtype).eps)


@needs_build
def test_no_large_tensor_is_saved():
    B, H, W, Di, N, R = shape = (2, 32, 32, 64, 16, 4)
    sizes = []
    leaves = fresh_scan_inputs(*shape)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        cpu.scan_2d(*leaves)
    assert sizes and max(sizes) < B * H * W * Di * N // 4


@needs_build
def test_bitwise_the_same_for_any_number_of_threads():
    inputs = fresh_scan_inputs(2, 16, 16, 96, 16, 6)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(cpu.scan_2d, inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_identical(other, results[0])


@needs_build
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_openmp_runtime():
    """In a new process: this one has imported libraries (scikit-learn) with OpenMP runtimes that VMRNN does not use."""
    code = """
import torch
from tests.helpers import fresh_scan_inputs, outputs_and_gradients
from vmrnn.scan import cpu
torch.set_num_threads(2)
outputs_and_gradients(cpu.scan_2d, fresh_scan_inputs(2, 8, 8, 64, 8, 2))
maps = open("/proc/self/maps").read().split()
print(*{word for word in maps if any(name in word for name in ("libgomp", "libomp", "libiomp"))})
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and len(done.stdout.split()) == 1, done.stdout + done.stderr


@pytest.fixture
def two_threads():
    """Two threads, so that the kernel enters parallel regions. With the one thread of conftest.py it enters none."""
    torch.set_num_threads(2)  # conftest.py sets it back before the next test


@needs_build
def test_python_threads(two_threads):
    cases = [fresh_scan_inputs(2, 9, 7, 40, 16, 3, seed=seed) for seed in range(4)]
    expected = [outputs_and_gradients(cpu.scan_2d, case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda case: outputs_and_gradients(cpu.scan_2d, case), cases * 4))
    for i, result in enumerate(results):
        assert_identical(result, expected[i % 4])


class ScanDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return outputs_and_gradients(cpu.scan_2d, fresh_scan_inputs(1, 5, 4, 48, 8, 3, seed=i))["gradient of input 0"]


@needs_build
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_forked_workers(two_threads):
    data = ScanDataset()
    expected = [data[i] for i in range(4)]  # the parent has been in a parallel region
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=30
    )
    for i, item in enumerate(loader):
        assert torch.equal(item, expected[i]), i


@needs_build
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(save):
    inputs = [t.detach().requires_grad_(save) for t in fresh_scan_inputs(2, 3, 4, 20, 5, 3)]
    torch.library.opcheck(cpu.scan_op, (*inputs, save))


@needs_build
def test_opcheck_backward():
    inputs = [t.detach() for t in fresh_scan_inputs(2, 3, 4, 20, 5, 3)]
    y, checkpoints = cpu.scan_op(*inputs, True)
    torch.library.opcheck(cpu.scan_backward_op, (y, *inputs, checkpoints))


@needs_build
def test_compile_has_no_graph_break():
    inputs = fresh_scan_inputs(2, 3, 4, 20, 5, 3)
    compiled = torch.compile(cpu.scan_2d, fullgraph=True, backend="aot_eager")
    assert_identical(outputs_and_gradients(compiled, inputs), outputs_and_gradients(cpu.scan_2d, inputs))


def test_can_run_says_why_not():
    assert cpu.can_run("cpu", torch.float32, 16)[0] == (LIBRARY is not None)
    assert cpu.can_run("cpu", torch.float64, 16) == (False, "torch.float64 is not supported: convert to float32")
    assert cpu.can_run("cuda", torch.float32, 16) == (False, "runs on a CPU only")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A process that has built nothing."""
    monkeypatch.setenv("VMRNN_CACHE", str(tmp_path))
    cpu.attempt.cache_clear()
    yield tmp_path
    cpu.attempt.cache_clear()


def test_no_compiler(empty_cache, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(empty_cache))
    ok, reason = cpu.can_run("cpu", torch.float32, 16)
    assert not ok and "install g++" in reason and "\n" not in reason
    with pytest.raises(UserError, match="install g"):
        cpu.load()


@pytest.fixture
def one_build(tmp_path, monkeypatch):
    """The same with a copy of the library that these tests use, so that it is not compiled again: its path."""
    built = cpu.build(cpu.wanted_isa())
    copy = tmp_path / built.name
    shutil.copy2(built, copy)
    monkeypatch.setenv("VMRNN_CACHE", str(tmp_path))
    cpu.attempt.cache_clear()
    assert cpu.build(cpu.wanted_isa()) == copy
    yield copy
    cpu.attempt.cache_clear()


@needs_build
def test_a_cached_build_needs_no_compiler(one_build, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpu.can_run("cpu", torch.float32, 16)[0]


@needs_build
def test_broken_compiler(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    ok, reason = cpu.can_run("cpu", torch.float32, 16)
    assert not ok and "CXX" in reason and "\n" not in reason


@needs_build
@pytest.mark.parametrize("damage", [b"", b"not a library", None], ids=("empty", "text", "truncated"))
def test_damaged_cache_entry_is_rebuilt(damage, one_build):
    content = one_build.read_bytes()
    one_build.write_bytes(content[: len(content) // 2] if damage is None else damage)
    assert cpu.build(cpu.wanted_isa()).stat().st_size == len(content)
    cpu.load()
    inputs = fresh_scan_inputs(1, 2, 2, 4, 2, 1)
    expected = outputs_and_gradients(reference.scan_2d, in_double(inputs))
    assert_close(outputs_and_gradients(cpu.scan_2d, inputs), expected, TOLERANCE)


def test_a_compiler_that_was_named_and_is_not_there(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    ok, reason = cpu.can_run("cpu", torch.float32, 16)
    assert not ok and reason.startswith("CXX=no-such-compiler -O1: not found")


@needs_build
def test_a_compiler_of_several_words(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", f"env {compiler.find_compiler()[0]}")
    assert cpu.can_run("cpu", torch.float32, 16)[0]


@needs_build
def test_concurrent_builds(tmp_path, run_forked):
    code = "from vmrnn.scan import cpu; cpu.load(); print('loaded')"
    done = run_forked("-c", AT_ONCE.format(code=code, count=3), VMRNN_CACHE=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "loaded\n" * 3), done.stderr
    assert {path.suffix for path in tmp_path.iterdir()} == {".lib"}
