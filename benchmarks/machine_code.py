"""What the compiler makes of the scan's Triton kernels for a GPU, read off without one.

    python -m benchmarks.machine_code                      sm_90, fp32 maps, batch 16, the shapes of network D
    python -m benchmarks.machine_code --arch 80 --dtype bf16 --batch 1

For each kernel the registers of a thread, spilled bytes and shared memory; for each innermost loop what a warp does for
one step of the sequence: instructions, of these special functions (exp2, reciprocals) and memory or shuffles; then
cycles. Instructions are a lower bound of the cycles. The cycles are a model, no measurement: the loop is issued in order,
one instruction a clock for each scheduler, with the waits that the compiler wrote into the code, by 1 to 4 warps that share
a scheduler, and the latencies below. "time" goes over all warps of the launch, as many at once as registers leave room for,
on an H200. It is for comparing two versions of a kernel, and says what of it nothing hides. A table, then one JSON line.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch

from vmrnn.errors import UserError
from vmrnn.runtime import run_program
from vmrnn.scan import triton_scan

SHAPES = {"32x32": (32, 256, 8), "16x16": (16, 512, 16), "8x8": (8, 1024, 32)}  # H = W, Di, R of network D
D_STATE = 16

# An H200
SCHEDULERS, CLOCK, REGISTERS = 528, 1.98e9, 16384  # registers of all lanes of a scheduler's warps

# Clocks until a result is there, by instruction; the rest of what a warp waits for by name. Loads are from the L2.
LATENCY = {"LDG": 300, "LDS": 31, "SHFL": 25, "MUFU": 22, "LDC": 40, "S2R": 30, "BAR": 20}
OTHER_LATENCY, READ = 20, 12  # READ: until a store or a shuffle has read its registers
# Clocks for which a warp's instruction keeps its unit: 32 lanes of multiply-adds, 16 of integers, 4 of special functions,
# and a quarter of the SM's 32 lanes of loads, stores and shuffles.
UNITS = {"fma": 1, "multiply": 2, "integer": 2, "special": 8, "memory": 4, "uniform": 2, "control": 1}
NAMES = {
    "fma": "FFMA FMUL FADD",
    "multiply": "IMAD",
    "special": "MUFU F2F I2F F2I",
    "memory": "LDG STG LDS STS LDSM LDL STL LDC SHFL S2R",
    "control": "BRA NOP BAR EXIT BSSY BSYNC WARPSYNC DEPBAR",
}
UNIT_OF = {name: unit for unit, names in NAMES.items() for name in names.split()}


def kernels_of(shape, batch, N=D_STATE):
    """{name: (kernel, constants, options)} as scan_op and scan_backward_op launch them for (H = W, Di, R)."""
    H, Di, R = shape
    part, part_back, chunk = triton_scan.lengths(torch.empty(batch, H, H, Di, device="meta"), N, R)
    fixed = dict(H=H, W=H, N=N, R=R)
    forward, backward = (
        fixed | blocks for blocks in (triton_scan.forward_blocks(N, R), triton_scan.backward_blocks(N))
    )
    kernels = {
        "forward": (triton_scan.forward_kernel, forward | dict(PART=part, CHUNK=chunk, SAVE=True)),
        "backward": (triton_scan.backward_kernel, backward | dict(PART=part_back, CHUNK=chunk)),
    }
    for name, length, stride, rest in (
        ("ends", part, part // chunk, dict(BACK=False)),
        ("ends, back", part_back, 1, dict(BACK=True, PROJECT=False)),
    ):
        if length < H * H:
            parts = (H * H - 1) // length
            slots = dict(STRIDE=stride, SLOTS=(H * H - 1) // chunk if stride > 1 else parts)
            kernels[name] = triton_scan.ends_kernel, forward | dict(PART=length) | slots | rest
            kernels[f"chain of {name}"] = (
                triton_scan.chain_kernel,
                slots | dict(N=N, PARTS=parts, BLOCK=triton_scan.CHAIN_BLOCK, BACK=rest["BACK"]),
            )
    kernels["sum"] = triton_scan.sum_kernel, dict(PARTS=4, BLOCK=triton_scan.SUM_BLOCK)
    wide = (triton_scan.chain_kernel, triton_scan.sum_kernel)
    return {
        name: (*found, triton_scan.SUM_OPTIONS if found[0] in wide else triton_scan.OPTIONS)
        for name, found in kernels.items()
    }


def build(kernel, constants, options, dtype, arch):
    """(registers of a thread, bytes of stack, which is where spills go, bytes of shared memory, path of the cubin)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: "constexpr" if name in constants else "*fp32" for name in kernel.arg_names}
    maps = ("x", "y", "z", "dx", "dy", "dz", "out", "dout", "ds", "total", "source")
    if kernel in (triton_scan.forward_kernel, triton_scan.backward_kernel):  # whose results are parts, in fp32
        maps = ("x", "dy")
    types |= {name: f"*{dtype}" for name in maps if name in types}
    types |= {
        name: "i32" for name in ("B", "Di", "size", "step", "H", "W", "C") if name in types and name not in constants
    }
    types |= {name: "fp32" for name in ("eps",) if name in types}
    # What a launch finds out by itself: pointers, channels, steps and sizes are multiples of 16.
    multiples = ("Di", "C", "step", "size")
    aligned = [i for i, name in enumerate(kernel.arg_names) if types[name][0] == "*" or name in multiples]
    source = ASTSource(kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    report = tool("cuobjdump", "--dump-resource-usage", cubin)
    registers, stack = (int(re.search(rf"{name}:(\d+)", report).group(1)) for name in ("REG", "STACK"))
    return registers, stack, compiled.metadata.shared, cubin


def tool(name, *arguments):
    """What a program of CUDA's that Triton brings along prints."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise UserError(f"this Triton brings no {name} ({path}): pip install --upgrade triton")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


class Instruction:
    """One line of machine code: its name, text and unit, and what its control bits say: clocks before the next
    instruction, and which of six counters it waits for, and holds until its result is there or its registers are read."""

    def __init__(self, text, control):
        self.text = text
        words = text.split()
        self.name = words[words[0].startswith("@")].split(".")[0]
        self.unit = UNIT_OF.get(self.name, "uniform" if self.name[0] == "U" else "integer")
        control >>= 41
        self.stall = control & 15
        self.result, self.read = control >> 5 & 7, control >> 8 & 7  # 7: none
        self.waits = [i for i in range(6) if control >> 11 >> i & 1]


def innermost_loops(cubin):
    """The instructions of each, in the order of the code."""
    code, labels, text = [], {}, None
    for line in tool("nvdisasm", "-hex", "-c", cubin).splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label.group(1)] = len(code)
        elif first := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]+ \*/", line):
            text = first.group(1)
        elif text and (second := re.match(r"\s+/\* 0x([0-9a-f]+) \*/", line)):
            code.append(Instruction(text, int(second.group(1), 16)))
            text = None
    loops = []
    for end, instruction in enumerate(code):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction.text)
        if target and labels[target.group(1)] < end:
            loops.append((labels[target.group(1)], end))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [code[start : end + 1] for start, end in inner]


def cycles(loop, warps, rounds=8):
    """Of one pass of the loop by each of `warps` that share a scheduler, over their number: by the model above."""
    at, ready, laps = [0] * warps, [0] * warps, [[] for _ in range(warps)]
    counters = [[0] * 6 for _ in range(warps)]  # the clock at which each is down
    free = collections.Counter()
    clock = last = 0
    while any(len(lap) < rounds for lap in laps):
        for warp in (*range(last + 1, warps), *range(last + 1)):  # in turn
            instruction = loop[at[warp]]
            waits = max((counters[warp][i] for i in instruction.waits), default=0)
            if max(ready[warp], waits, free[instruction.unit]) > clock:
                continue
            free[instruction.unit] = clock + UNITS[instruction.unit]
            for counter, wait in (
                (instruction.result, LATENCY.get(instruction.name, OTHER_LATENCY)),
                (instruction.read, READ),
            ):
                if counter < 6:
                    counters[warp][counter] = max(counters[warp][counter], clock + wait)
            ready[warp] = clock + max(1, instruction.stall)
            at[warp] = (at[warp] + 1) % len(loop)
            if at[warp] == 0:
                laps[warp].append(clock)
            last = warp
            break
        clock += 1
    first, *_, end = laps[0]
    return (end - first) / (len(laps[0]) - 1) / warps


def measure(name, kernel, constants, options, dtype, arch, programs):
    """What the table shows of one kernel; the sum and the chain do not walk the sequence and have no loops in it."""
    registers, stack, shared, cubin = build(kernel, constants, options, dtype, arch)
    found = {"kernel": name, "registers": registers, "spilled": stack, "shared": shared, "loops": []}
    if "STEPS" not in constants:
        return found
    steps = constants["STEPS"] * (1 if kernel is triton_scan.backward_kernel else 2)
    resident = min(REGISTERS // (32 * registers) or 1, max(1, round(programs / SCHEDULERS)), 4)
    walked = min(constants["PART"], constants["H"] * constants["W"])
    found["time"] = 0
    for loop in innermost_loops(cubin):
        if len(loop) < 20 * steps:  # no step of the sequence
            continue
        units = collections.Counter(instruction.unit for instruction in loop)
        clocks = [cycles(loop, warps) / steps for warps in range(1, 5)]
        found["loops"].append({unit: units[unit] / steps for unit in ("special", "memory")})
        found["loops"][-1] |= {"instructions": len(loop) / steps, "cycles": clocks}
        found["time"] += walked * max(1, programs / SCHEDULERS) * clocks[resident - 1] / CLOCK
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="80, 90 or 120")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the maps")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    if triton_scan.triton is None:
        raise UserError(f"Triton is not installed: {triton_scan.INSTALL}")
    print(
        f"Triton {triton_scan.triton.__version__}, sm_{args.arch}, {args.dtype}, batch {args.batch}, {D_STATE} states"
    )
    print(f"{'map':6}{'kernel':22}{'registers':>10}{'spilled':>8}{'shared':>7}{'':3}a step:{'instr.':>8}{'special':>8}"
          f"{'memory':>8}{'cycles, 1 to 4 warps':>26}{'time [us]':>11}")  # fmt: skip
    results = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for map_name, shape in SHAPES.items():
            for name, (kernel, constants, options) in kernels_of(shape, args.batch).items():
                H, Di, _ = shape
                parts = -(-H * H // constants.get("PART", H * H)) - (kernel is triton_scan.ends_kernel)
                programs = args.batch * triton_scan.DIRECTIONS * -(-Di // constants.get("BLOCK_D", Di)) * parts
                found = measure(name, kernel, constants, options, args.dtype, args.arch, programs)
                results.append({"map": map_name, **found})
                head = f"{map_name:6}{name:22}{found['registers']:10}{found['spilled']:8}{found['shared']:7}"
                for i, loop in enumerate(found["loops"] or [None]):
                    line = head if i == 0 else " " * len(head)
                    if loop:
                        line += f"{'':10}{loop['instructions']:8.0f}{loop['special']:8.0f}{loop['memory']:8.0f}"
                        line += f"{' '.join(f'{c:.0f}' for c in loop['cycles']):>26}"
                        line += f"{1e6 * found['time']:11.0f}" if i == 0 else ""
                    print(line, flush=True)
    print(
        json.dumps(
            {"benchmark": "machine_code", "triton": triton_scan.triton.__version__, **vars(args), "results": results}
        )
    )


if __name__ == "__main__":
    run_program(main)
