"""The C++ scan against the reference loop in float64, and its build."""

import functools
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from vmrnn.errors import UserError
from vmrnn.scan import cpu, reference

NAMES = ("y", "dx", "ddbl", "d dt_weight", "d dt_bias", "dA_log", "dD")
TOLERANCE = 5e-6  # max abs error / max abs of the reference
ROOT = Path(__file__).resolve().parents[1]

LIBRARY, REASON = cpu.attempt(cpu.wanted_isa())
needs_build = pytest.mark.skipif(LIBRARY is None, reason=REASON)

SHAPES = {  # B, H, W, Di, R, N
    "real_32x32": (1, 32, 32, 64, 8, 16),
    "real_16x16": (2, 16, 16, 96, 16, 16),
    "real_8x8": (1, 8, 8, 256, 32, 16),
    "1x1": (2, 1, 1, 32, 2, 16),
    "1xN": (1, 1, 67, 32, 4, 16),
    "Nx1": (1, 67, 1, 32, 4, 16),
    "wide": (3, 5, 13, 48, 3, 16),
    "odd_channels": (2, 6, 7, 37, 5, 16),
    "one_channel": (1, 4, 3, 1, 1, 16),
    "batch_of_9": (9, 3, 4, 80, 5, 16),
    "d_state_1": (1, 9, 8, 40, 4, 1),
    "d_state_8": (1, 9, 8, 40, 17, 8),
    "d_state_17": (1, 9, 8, 40, 4, 17),
}


def make_inputs(B, H, W, Di, R, N, seed=0):
    """x, dbl, dt_weight, dt_bias, A_log, D as a fresh network has them: dt of 0.001 to 0.1, A near -(1..N)."""
    g = torch.Generator().manual_seed(seed)
    K = 4
    dt = torch.exp(torch.empty(K, Di).uniform_(math.log(1e-3), math.log(0.1), generator=g))
    return [
        torch.randn(B, H, W, Di, generator=g),
        torch.randn(B, H, W, K, R + 2 * N, generator=g),
        torch.randn(K, Di, R, generator=g) * R**-0.5,
        dt + torch.log(-torch.expm1(-dt)),
        torch.log(torch.arange(1.0, N + 1) * torch.empty(K, Di, N).uniform_(0.5, 2, generator=g)),
        torch.randn(K, Di, generator=g),
    ]


def run(scan, inputs, dtype=torch.float32, seed=1):
    """y and the six gradients."""
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
    y = scan(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_close(actual, expected, tolerance=TOLERANCE):
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert a.shape == e.shape, f"{name}: shape {tuple(a.shape)}, not {tuple(e.shape)}"
        error = (a.double() - e).abs().max() / e.abs().max().clamp_min(1e-300)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.fixture(params=cpu.isas())
def isa(request, monkeypatch):
    monkeypatch.setenv("VMRNN_CPU_ISA", request.param)
    return request.param


@functools.cache
def expected_of(shape):
    return run(reference.scan_2d, make_inputs(*shape), torch.float64)


@needs_build
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_gradients(shape, isa):
    assert_close(run(cpu.scan_2d, make_inputs(*shape)), expected_of(shape))


@needs_build
def test_without_gradients_gives_the_same_output(isa):
    inputs = make_inputs(*SHAPES["wide"])
    with torch.no_grad():
        y = cpu.scan_2d(*inputs)
    assert torch.equal(y, run(cpu.scan_2d, inputs)[0])


@needs_build
@pytest.mark.parametrize("bias", [-100.0, -20.0, 0.0, 20.5, 80.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_extreme_steps_and_decays(bias, scale, isa):
    inputs = make_inputs(1, 5, 6, 32, 2, 8)
    inputs[3] = inputs[3] * 0 + bias
    inputs[4] = torch.full_like(inputs[4], math.log(scale))
    expected = run(reference.scan_2d, inputs, torch.float64)
    actual = run(cpu.scan_2d, inputs)
    # fp32 rounds dt A to some eps |dt A|, which is then the relative error of exp(dt A). Gradients of
    # dt and A_log shrink to what fp32 cannot hold when every step forgets all.
    tolerance = TOLERANCE + 2 * torch.finfo(torch.float32).eps * min(max(bias, 1) * scale, 100)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert a.isfinite().all(), name
        error = (a - e).abs().max()
        assert error <= max(tolerance * e.abs().max(), 1e-37), f"{name}: {error:.2e} of {e.abs().max():.2e}"


@needs_build
def test_zeros_and_denormals(isa):
    inputs = make_inputs(1, 4, 5, 33, 2, 8)
    for factor in (0.0, 1e-40):
        scaled = [inputs[0] * factor, *inputs[1:]]
        expected = reference.scan_2d(*(t.double() for t in scaled))
        assert (cpu.scan_2d(*scaled) - expected).abs().max() <= 1e-42


@needs_build
@pytest.mark.parametrize("which", range(6), ids=("x", "dbl", "dt_weight", "dt_bias", "A_log", "D"))
def test_nan_in_gives_nan_out(which, isa):
    inputs = make_inputs(2, 4, 5, 33, 2, 8)
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

    inputs = make_inputs(2, 5, 4, 48, 3, 16)
    reference_or_cpu = reference.scan_2d
    expected = run(twice, inputs, torch.float64)
    reference_or_cpu = cpu.scan_2d
    assert_close(run(twice, inputs), expected)


@needs_build
def test_not_contiguous():
    inputs = make_inputs(2, 5, 4, 48, 3, 16)
    expected = run(cpu.scan_2d, inputs)
    inputs[0] = inputs[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    inputs[4] = inputs[4].mT.contiguous().mT
    for name, a, e in zip(NAMES, run(cpu.scan_2d, inputs), expected, strict=True):
        assert torch.equal(a, e), name


@needs_build
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    inputs = [t.to(dtype) for t in make_inputs(2, 5, 4, 48, 3, 16)]
    actual, expected = run(cpu.scan_2d, inputs, dtype), run(reference.scan_2d, inputs, torch.float64)
    assert all(t.dtype == dtype for t in actual)
    assert_close(actual, expected, 2 * torch.finfo(dtype).eps)


@needs_build
def test_no_large_tensor_is_saved():
    B, H, W, Di, R, N = shape = (2, 32, 32, 64, 4, 16)
    sizes = []
    leaves = [t.requires_grad_() for t in make_inputs(*shape)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        cpu.scan_2d(*leaves)
    assert sizes and max(sizes) < B * H * W * Di * N // 4


@needs_build
def test_bitwise_the_same_for_any_number_of_threads():
    inputs = make_inputs(2, 16, 16, 96, 6, 16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(run(cpu.scan_2d, inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, a, e in zip(NAMES, other, results[0], strict=True):
            assert torch.equal(a, e), name


@needs_build
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_openmp_runtime():
    """In a process of its own: other libraries of this one (scikit-learn) bring runtimes that VMRNN does not use."""
    code = """
import torch
from tests.test_scan_cpu import cpu, make_inputs, run
torch.set_num_threads(2)
run(cpu.scan_2d, make_inputs(2, 8, 8, 64, 2, 8))
maps = open("/proc/self/maps").read().split()
print(*{word for word in maps if any(name in word for name in ("libgomp", "libomp", "libiomp"))})
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0 and len(done.stdout.split()) == 1, done.stdout + done.stderr


@pytest.fixture
def two_threads():
    """Parallel regions are entered: conftest's one thread enters none."""
    torch.set_num_threads(2)  # conftest sets it back before the next test


@needs_build
def test_python_threads(two_threads):
    cases = [make_inputs(2, 9, 7, 40, 3, 16, seed) for seed in range(4)]
    expected = [run(cpu.scan_2d, case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda case: run(cpu.scan_2d, case), cases * 4))
    for i, result in enumerate(results):
        for name, a, e in zip(NAMES, result, expected[i % 4], strict=True):
            assert torch.equal(a, e), f"{name} of call {i}"


class ScanDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return run(cpu.scan_2d, make_inputs(1, 5, 4, 48, 3, 8, i))[1]


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
    inputs = [t.requires_grad_(save) for t in make_inputs(2, 3, 4, 20, 3, 5)]
    torch.library.opcheck(cpu.scan_op, (*inputs, save))


@needs_build
def test_opcheck_backward():
    inputs = make_inputs(2, 3, 4, 20, 3, 5)
    y, checkpoints = cpu.scan_op(*inputs, True)
    torch.library.opcheck(cpu.scan_backward_op, (y, *inputs, checkpoints))


@needs_build
def test_compile_has_no_graph_break():
    inputs = make_inputs(2, 3, 4, 20, 3, 5)
    compiled = torch.compile(cpu.scan_2d, fullgraph=True, backend="aot_eager")
    for name, a, e in zip(NAMES, run(compiled, inputs), run(cpu.scan_2d, inputs), strict=True):
        assert torch.equal(a, e), name


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


@needs_build
def test_a_cached_build_needs_no_compiler(empty_cache, monkeypatch):
    cpu.load()
    cpu.attempt.cache_clear()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(empty_cache))
    assert cpu.can_run("cpu", torch.float32, 16)[0]


@needs_build
def test_broken_compiler(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    ok, reason = cpu.can_run("cpu", torch.float32, 16)
    assert not ok and "CXX" in reason and "\n" not in reason


@needs_build
@pytest.mark.parametrize("damage", [b"", b"not a library", None], ids=("empty", "text", "truncated"))
def test_damaged_cache_entry_is_rebuilt(damage, empty_cache):
    whole = cpu.build(cpu.wanted_isa())
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) // 2] if damage is None else damage)
    assert cpu.build(cpu.wanted_isa()).stat().st_size == len(content)
    cpu.load()
    assert_close(run(cpu.scan_2d, x := make_inputs(1, 2, 2, 4, 1, 2)), run(reference.scan_2d, x, torch.float64))


def test_a_compiler_that_was_named_and_is_not_there(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    ok, reason = cpu.can_run("cpu", torch.float32, 16)
    assert not ok and reason.startswith("CXX=no-such-compiler -O1: not found")


@needs_build
def test_a_compiler_of_several_words(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", f"env {cpu.find_compiler()[0]}")
    assert cpu.can_run("cpu", torch.float32, 16)[0]


@needs_build
def test_concurrent_builds(tmp_path):
    code = "from vmrnn.scan import cpu; cpu.load(); print('loaded')"
    environment = dict(os.environ, VMRNN_CACHE=str(tmp_path), PYTHONPATH=str(ROOT))
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [p.communicate(timeout=120)[0] for p in processes] == ["loaded\n"] * 3
    assert {path.suffix for path in tmp_path.iterdir()} == {".lib"}
