"""The check of the Triton kernels at their first use: what it catches, what it remembers, and what then happens."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from helpers import AT_ONCE
from triton_helpers import needs_triton, run_interpreter

from vmrnn import kernel_cache as cache, scan, selfcheck
from vmrnn.errors import UserError
from vmrnn.network import fused_triton
from vmrnn.scan import triton_kernels
from vmrnn.scan.triton_kernels import jit, tl

# Functions that take the place of those of the same name in the kernels.


@jit
def softplus(s):
    return tl.maximum(s, 0.0)


@jit
def sigmoid(s):
    return s * 0.0 + 0.5


@jit
def tanh(v):
    return v


@jit
def normalise(y, at, mask, C, eps):
    v = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    return v, tl.sum(v, 1) * 0.0 + 1.0


@jit
def load_weights(weight, channel, C, FLIP):
    return weight


# {name: (the module of the kernel, the wrong function, the check that fails, what it says)}
WRONG = {
    "softplus": (triton_kernels, softplus, "scan", "differs by"),
    "sigmoid": (triton_kernels, sigmoid, "scan", "gradient of input"),
    "tanh": (fused_triton, tanh, "cell_gate", "differs by"),
    "normalise": (fused_triton, normalise, "norm", "differs by"),
    "load_weights": (fused_triton, load_weights, "conv_silu", "Error"),
}


def interpret():
    """{what was made wrong: the complaint, or None}, in Triton's interpreter."""
    torch.set_num_threads(1)
    selfcheck.CASES = {"odd sizes": ((1, 2, 3, 4, 2), torch.float32)}
    answers = {"nothing": selfcheck.check_all("triton", "cpu", 3)[0]}
    for name, (module, wrong, *_) in WRONG.items():
        right = getattr(module, name)
        setattr(module, name, wrong)
        answers[name] = selfcheck.check_all("triton", "cpu", 3)[0]
        setattr(module, name, right)
    return answers


@pytest.fixture(scope="module")
def interpreted():
    return run_interpreter(__file__)


@needs_triton
@pytest.mark.parametrize("name", WRONG)
def test_a_kernel_that_is_made_wrong_is_caught(interpreted, name):
    _, _, where, words = WRONG[name]
    assert interpreted["nothing"] is None
    assert interpreted[name].startswith(f"{where}, odd sizes: ") and words in interpreted[name]


@pytest.fixture
def checks(tmp_path, monkeypatch):
    """The checks that are made; each passes unless `checks.complaint` is set."""

    class Checks(list):
        complaint = None

    made = Checks()

    def check(*arguments):
        made.append(arguments)
        return made.complaint

    monkeypatch.setenv("VMRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(selfcheck, "in_own_process", check)
    new_process()
    yield made
    new_process()


def new_process():
    selfcheck.first_use.cache_clear()
    cache._folder.cache_clear()


def test_a_check_that_was_passed_is_remembered(checks):
    for _ in range(3):
        assert selfcheck.first_use("triton", "cpu") is None
    new_process()
    assert selfcheck.first_use("triton", "cpu") is None
    assert len(checks) == 1
    assert selfcheck.first_use("triton", "cpu", 32) is None and len(checks) == 2  # other kernels
    assert selfcheck.first_use("cpu", "cpu") is selfcheck.first_use("mamba", "cuda") is None and len(checks) == 2


@pytest.mark.parametrize("what", ["torch", "driver", "source", "GPU"])
def test_a_stale_result_is_not_used(what, checks, monkeypatch):
    facts = selfcheck.facts
    selfcheck.first_use("triton", "cpu")
    new_process()
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    else:
        monkeypatch.setattr(selfcheck, "facts", lambda *arguments: facts(*arguments) + what)
    selfcheck.first_use("triton", "cpu")
    assert len(checks) == 2


def test_facts_hold_the_source_of_every_kernel():
    facts = selfcheck.facts(torch.device("cpu"), 16)
    assert torch.__version__ in facts
    for name in ("backward_kernel", "find_segment_ends", "conv_backward_kernel", "def connect"):
        assert name in facts


def test_a_check_that_failed_is_said_and_made_again(checks, caplog):
    checks.complaint = "scan, bf16: output 0 differs by 3.0e-01 of its largest value (allowed 0.02)"
    for _ in range(2):
        new_process()
        with caplog.at_level(logging.WARNING, logger="vmrnn"):
            reason = selfcheck.first_use("triton", "cpu")
        assert "differs by 3.0e-01" in reason
    assert len(checks) == 2 and sum("WRONG ON THIS GPU" in r.message for r in caplog.records) == 2


def test_auto_takes_the_next_back_end_and_a_named_one_is_refused(checks, monkeypatch, caplog):
    checks.complaint = "conv_silu, odd sizes: gradient of input 1 differs by 1.0e-02 of its largest value"
    monkeypatch.setattr(scan.triton_scan, "can_run", lambda *_: (True, "here"))
    monkeypatch.setattr(scan, "ORDER", {"cpu": ("triton", "torch")})
    monkeypatch.setattr(scan, "_logged", set())
    with caplog.at_level(logging.INFO, logger="vmrnn"):
        assert scan.resolve("auto", "cpu") == "torch"
    (choice,) = [r.message for r in caplog.records if r.message.startswith("scan ")]
    assert "gradient of input 1 differs" in choice
    with pytest.raises(UserError, match="'triton' cannot run on cpu here: its check failed: conv_silu"):
        scan.resolve("triton", "cpu")
    new_process()
    checks.complaint = None
    assert scan.resolve("auto", "cpu") == "triton"


def test_a_cache_that_cannot_be_written(checks, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VMRNN_CACHE", str(tmp_path / "file" / "cache"))
    assert selfcheck.first_use("triton", "cpu") is None and len(checks) == 1


def test_a_planted_result_is_not_used(checks, tmp_path):
    selfcheck.first_use("triton", "cpu")
    (result,) = (tmp_path / "cache").glob("selfcheck-*.json")
    result.chmod(0o666)
    new_process()
    selfcheck.first_use("triton", "cpu")
    assert len(checks) == 2


def test_a_process_that_fails_crashes_or_hangs(monkeypatch, run_forked):
    """Kernels cannot be launched on a CPU outside of the interpreter: the real check says so."""
    complaint = selfcheck.in_own_process("triton", "cpu", 4)
    assert complaint and "\n" not in complaint
    if hasattr(os, "fork"):
        monkeypatch.setattr(subprocess, "run", lambda command, **_: run_forked(*command[1:]))
    assert selfcheck.in_own_process("cpu", "cpu", 4) is None or scan.cpu.attempt(scan.cpu.wanted_isa())[0] is None
    monkeypatch.undo()
    monkeypatch.setattr(selfcheck, "SECONDS", 0.01)
    assert "did not end" in selfcheck.in_own_process("cpu", "cpu", 4)
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "exit code 1" in selfcheck.in_own_process("cpu", "cpu", 4)


def test_a_gpu_without_room_for_a_second_process_is_checked_in_this_one(monkeypatch):
    busy = {
        "complaint": "scan, odd sizes: AcceleratorError: CUDA error: CUDA-capable device(s) is/are busy or unavailable"
    }
    done = subprocess.CompletedProcess([], 0, json.dumps(busy), "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert selfcheck.in_own_process("torch", "cpu", 4) is None


def test_two_processes_at_once(tmp_path, run_forked):
    code = """
from vmrnn import selfcheck
selfcheck.in_own_process = lambda *arguments: print("checked") and None
assert selfcheck.first_use("triton", "cpu") is None
"""
    done = run_forked("-c", AT_ONCE.format(code=code, count=2), VMRNN_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    (result,) = (tmp_path / "cache").iterdir()
    assert json.loads(result.read_text())["passed"]


def test_the_table(run_forked):
    done = run_forked("-m", "vmrnn.selfcheck")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "all checks passed" and "torch" in lines[0]
    rows = [line for line in lines if line.startswith("cpu     torch")]
    assert len(rows) == 3 + 2 * 4 and all(row.endswith("ok") for row in rows)
    assert any("cpu     triton     not checked" in line for line in lines)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        print(json.dumps(interpret()))
    else:
        sys.exit("run by pytest")
