"""benchmarks/machine_code.py: loops whose cycles are known, and the special functions that the kernels must have."""

import pytest
from test_scan_triton import needs_triton

from benchmarks.machine_code import D_STATE, LATENCY, SHAPES, Instruction, build, cycles, innermost_loops, kernels_of


def instruction(text, stall=1, result=7, waits=()):
    """One with these control bits; `read` is 7, none."""
    bits = stall | result << 5 | 7 << 8 | sum(1 << i for i in waits) << 11
    return Instruction(text, bits << 41)


@pytest.mark.parametrize(
    "loop, warps, expected",
    {
        "waits between two": ([instruction("FFMA R0, R0, R1, R2", stall=4)], 1, 4),
        "which other warps fill": ([instruction("FFMA R0, R0, R1, R2", stall=4)], 4, 1),
        "a unit that all share": ([instruction("@P0 MUFU.EX2 R0, R1")], 4, 8),
        "a load and its use": (
            [instruction("LDG.E R0, [R2.64]", result=3), instruction("FADD R1, R0, R1", waits=[3])],
            1,
            LATENCY["LDG"] + 1,
        ),
        "one instruction a clock": ([instruction("FADD R0, R1, R2"), instruction("UIADD3 UR4, UR5, UR6, URZ")], 1, 2),
    }.values(),
    ids=str,
)
def test_cycles_of_loops(loop, warps, expected):
    assert cycles(loop, warps, rounds=50) == pytest.approx(expected, abs=0.1)


@needs_triton
def test_special_functions_of_the_scan(tmp_path, monkeypatch):
    """One exp2 a state and two special functions a step size. The backward's walk makes 3/4 of them once more, and a
    sigmoid; the compiler shares some of what step sizes and sigmoid need."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def special(name):
        kernel, constants, options = kernels_of(SHAPES["16x16"], 16)[name]
        steps = constants["STEPS"] * (1 if name == "backward" else 2)
        loops = innermost_loops(build(kernel, constants, options, "fp32", 90)[3])
        return [sum(i.name == "MUFU" for i in loop) / steps for loop in loops if len(loop) > 20 * steps]

    assert special("forward") == [D_STATE + 2]
    again, walk = special("backward")
    assert again == D_STATE + 2
    assert 1.75 * D_STATE + 2 <= walk <= 1.75 * (D_STATE + 2) + 1
