"""What the tests of Triton kernels share: the interpreter, a GPU, and what the compiler makes of a kernel."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from vmrnn.scan import triton_scan

ARCHITECTURES = (80, 90, 120)
LEVELS = {"32x32": (32, 256, 8), "16x16": (16, 512, 16), "8x8": (8, 1024, 32)}  # H = W, Di, R of network D

GPU, NO_GPU = triton_scan.can_run("cuda", torch.float32, 16)
needs_triton = pytest.mark.skipif(
    triton_scan.triton is None or triton_scan.triton_version() < triton_scan.OLDEST,
    reason=f"no Triton of {triton_scan.OLDEST} or newer",
)


def patch_language_once():
    """Make Triton's interpreter nearly twice as fast.

    At every call of a function inside a kernel it puts its own functions into triton.language again, which takes 44 %
    of its time. Once per launch and module is enough.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()

    def patch_once(function):
        module = function.__globals__["__name__"]
        if module not in patched:
            patched.add(module)
            return patch(function)

    def launch_unpatched(*arguments, **options):
        patched.clear()
        return launch(*arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_unpatched


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_language_once()


def run_interpreter(file):
    """What `file`, run as a program in Triton's interpreter, prints last: JSON.

    A process of its own, since TRITON_INTERPRET must be set before Triton is imported.
    """
    done = subprocess.run(
        [sys.executable, file],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter does not work with NumPy 2.4 and newer (Triton 3.6)")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def scan_kernels(level, batch, N=16):
    """{name: (kernel, constants, options)} as the scan's ops launch them at a level of network D ("32x32", ...)."""
    H, Di, R = LEVELS[level]
    segment, segment_backward, chunk = triton_scan.lengths(torch.empty(batch, H, H, Di, device="meta"), N, R)
    fixed = dict(H=H, W=H, N=N, R=R)
    forward, backward = (
        fixed | blocks for blocks in (triton_scan.forward_blocks(N, R), triton_scan.backward_blocks(N))
    )
    kernels = {
        "forward": (triton_scan.forward_kernel, forward | dict(SEGMENT=segment, CHUNK=chunk, SAVE=True)),
        "backward": (triton_scan.backward_kernel, backward | dict(SEGMENT=segment_backward, CHUNK=chunk)),
    }
    for name, length, stride, rest in (
        ("ends", segment, segment // chunk, dict(BACKWARD=False)),
        ("ends, back", segment_backward, 1, dict(BACKWARD=True, PROJECT_DT=False)),
    ):
        if length < H * H:
            parts = (H * H - 1) // length
            slots = dict(STRIDE=stride, SLOTS=(H * H - 1) // chunk if stride > 1 else parts)
            kernels[name] = triton_scan.segment_ends_kernel, forward | dict(SEGMENT=length) | slots | rest
            kernels[f"chain of {name}"] = (
                triton_scan.chain_kernel,
                slots | dict(N=N, SEGMENTS=parts, BLOCK=triton_scan.CHAIN_BLOCK, BACKWARD=rest["BACKWARD"]),
            )
    kernels["sum"] = triton_scan.sum_kernel, dict(COUNT=4, BLOCK=triton_scan.SUM_BLOCK)
    wide = (triton_scan.chain_kernel, triton_scan.sum_kernel)
    return {
        name: (*found, triton_scan.SUM_OPTIONS if found[0] in wide else triton_scan.OPTIONS)
        for name, found in kernels.items()
    }


def build(kernel, constants, options, dtype, arch):
    """Compile a kernel for CUDA architecture `arch` (90: H100): (registers of a thread, bytes of stack, bytes of shared
    memory). The stack is where registers are spilled. dtype: of the maps, "fp32" or "bf16"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # The type of each argument: constants, pointers (to maps and to all else), sizes.
    types = {name: "constexpr" if name in constants else "*fp32" for name in kernel.arg_names}
    maps = ("x", "y", "z", "dx", "dy", "dz", "out", "dout", "ds", "total", "source")
    if kernel in (triton_scan.forward_kernel, triton_scan.backward_kernel):  # their results are partial sums, in fp32
        maps = ("x", "dy")
    types |= {name: f"*{dtype}" for name in maps if name in types}
    sizes = ("B", "Di", "size", "step", "H", "W", "C")
    types |= {name: "i32" for name in sizes if name in types and name not in constants}
    types |= {name: "fp32" for name in ("eps",) if name in types}

    # What a launch finds out by itself: pointers, channels, steps and sizes are multiples of 16.
    multiples = ("Di", "C", "step", "size")
    aligned = [i for i, name in enumerate(kernel.arg_names) if types[name][0] == "*" or name in multiples]
    source = ASTSource(kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

    # Registers and stack are in the machine code, which a tool of CUDA's that Triton brings along reads.
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [tool, "--dump-resource-usage", cubin.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", report).group(1)) for name in ("REG", "STACK"))
    return registers, stack, compiled.metadata.shared
