"""The scan's CPU kernel for other machines: cross-compiled, run in an emulator, compared with the reference.

    python tests/test_cross.py         prints the errors of every target whose tools are installed

On Debian or Ubuntu the tools are installed by

    apt install qemu-user g++-aarch64-linux-gnu clang libomp-dev g++-mingw-w64-x86-64-posix wine64

As a test, a target whose tools are missing is skipped.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import ROOT, assert_small, fresh_scan_inputs, relative_error

from vmrnn import compiler
from vmrnn.scan import cpu, reference

TOLERANCE = 5e-6  # as tests/test_scan_cpu.py
SHAPES = [  # B, H, W, Di, N, R
    (1, 8, 8, 64, 16, 8),
    (2, 6, 7, 37, 16, 5),
    (1, 1, 67, 32, 16, 4),
    (1, 4, 3, 1, 16, 1),
    (3, 5, 13, 20, 1, 3),
    (1, 9, 8, 40, 17, 4),
]
QEMU, WINE = ("qemu-aarch64",), (shutil.which("wine64") or "/usr/lib/wine/wine64",)  # Debian has it off the PATH
WINDOWS = ("x86_64-w64-mingw32-g++-posix", *compiler.system_flags("win32", "GCC")[0])

# {target: (compiler and its own flags, what runs the program, instruction set)}
TARGETS = {
    "aarch64, g++": (("aarch64-linux-gnu-g++", "-fopenmp", "-static"), QEMU, "default"),
    "aarch64, clang": (("clang++", "--target=aarch64-linux-gnu", "-static"), QEMU, "default"),
    "Windows, g++, SSE2": (WINDOWS, WINE, "sse2"),
    "Windows, g++, AVX2": (WINDOWS, WINE, "avx2"),
    "Windows, g++, AVX-512": (WINDOWS, WINE, "avx512"),
    "here, clang and libomp": (("clang++", "-fopenmp=libomp"), (), cpu.isas()[0]),
    "here, clang, one thread": (("clang++",), (), cpu.isas()[0]),
}


def missing(target):
    """What this machine lacks for a target, or None."""
    command, emulator, isa = TARGETS[target]
    for program in (command[0], *emulator):
        if not shutil.which(program):
            return f"{program} is not installed"
    if emulator != QEMU and isa not in cpu.isas():
        return f"this processor does not have {isa}"
    return None


def cases():
    """[(shape, inputs as the kernel takes them and dy, expected results)]."""
    for shape in SHAPES:
        inputs = fresh_scan_inputs(*shape)
        dy = torch.randn(shape[:4], generator=torch.Generator().manual_seed(1))
        exact = [t.detach().double().requires_grad_() for t in inputs]
        y = reference.scan_2d(*exact)
        gradients = list(torch.autograd.grad(y, exact, dy.double()))
        A = -torch.exp(exact[4].detach())
        gradients[4] = gradients[4] / A  # of A, from that of A_log
        given = [t.detach() for t in inputs]
        given[4] = -torch.exp(given[4])
        yield shape, [*given, dy], [y, *gradients]


def run(target, folder):
    """(what the program printed, {result: relative error})."""
    (name, *own), emulator, isa = TARGETS[target]
    flags = [flag for flag in cpu.FLAGS if flag not in ("-shared", "-fPIC")] + list(cpu.ISA_FLAGS[isa])
    program, given, written = (folder / name for name in ("cross.exe", "input", "output"))
    command = [name, *flags, str(ROOT / "tests" / "cross.cpp"), "-o", str(program), *own]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(given, "wb") as file:
        for shape, inputs, _ in cases():
            file.write(np.array(shape, dtype=np.int64).tobytes())
            for tensor in inputs:
                file.write(tensor.numpy().astype(np.float32).tobytes())
    # wine makes its own home folder, which is not the user's.
    environment = os.environ | {"WINEPREFIX": str(folder / "wine"), "WINEDEBUG": "-all"}
    command = [*emulator, program.name, given.name, written.name, "2"]
    if not emulator:
        command[0] = str(program)
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr

    values, errors = np.fromfile(written, dtype=np.float32), {}
    for shape, _, expected in cases():
        names = ("y", "dx", "ddbl", "ddt_weight", "ddt_bias", "dA", "dD")
        for i, (name, tensor) in enumerate(zip(names, expected, strict=True)):
            copies = 1 if i < 3 else shape[0]  # gradients of parameters have one row per batch item
            found, values = np.split(values, [copies * tensor.numel()])
            found = torch.from_numpy(found).view(copies, *tensor.shape).sum(0)
            errors[f"{name} at {shape}"] = relative_error(found, tensor)
    assert values.size == 0
    return done.stdout.strip(), errors


@pytest.mark.parametrize("target", TARGETS)
def test_parity(target, tmp_path):
    if reason := missing(target):
        pytest.skip(reason)
    printed, errors = run(target, tmp_path)
    assert ("lanes 4" in printed) == (TARGETS[target][2] in ("default", "sse2")), printed
    assert_small(errors, TOLERANCE)


if __name__ == "__main__":
    for target in TARGETS:
        if reason := missing(target):
            print(f"{target:26} not run: {reason}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            printed, errors = run(target, Path(folder))
        worst = max(errors, key=errors.get)
        print(f"{target:26} {printed}; largest error {errors[worst]:.1e} ({worst})")
        assert_small(errors, TOLERANCE)
