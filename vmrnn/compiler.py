"""Shared libraries from C++ sources. They are kept in the user's cache folder (vmrnn/kernel_cache.py).

Environment: CXX names the compiler.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from vmrnn.errors import UserError
from vmrnn.kernel_cache import cache_folder, distrust

INSTALL = {
    "linux": "g++ (Debian, Ubuntu: apt install g++)",
    "darwin": "clang++ (xcode-select --install)",
    "win32": "g++ (w64devkit, or MSYS2's mingw-w64-ucrt-x86_64-gcc, in the PATH)",
}


def find_compiler():
    """The command of the C++ compiler as a list, or None if there is none.

    It is $CXX, which may hold several words such as "ccache g++", else the first of c++, g++ and clang++ on the PATH.
    Raises UserError if $CXX is set to something else than an existing program: whoever set it wants that compiler.
    """
    named = os.environ.get("CXX")
    if named:
        try:
            # Outside of POSIX rules a backslash is part of a path.
            command = [word.strip('"') for word in shlex.split(named, posix=os.name == "posix")]
        except ValueError as error:
            raise UserError(f"CXX={named}: {str(error).lower()}; set it to a C++ compiler or unset it") from error
        if not command:
            raise UserError(f"CXX={named!r} names no program; set it to a C++ compiler or unset it")
        if not shutil.which(command[0]):
            raise UserError(f"CXX={named}: not found; set it to a C++ compiler or unset it")
        return command
    return next(([path] for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def system_flags(system, version):
    """Sets of flags for an operating system, to be tried in this order: with OpenMP, then without it.

    system   as sys.platform names it
    version  what the compiler prints for --version

    The library must use the OpenMP runtime that torch has loaded, so that both share their threads. On Linux both ask
    for libgomp.so.1 by name, and the loader gives them the same one. Apple's clang has no runtime of its own: torch's
    libomp is linked. On Windows everything is linked into the library, its own OpenMP too.
    """
    if system == "darwin":
        libomp = Path(torch.__file__).parent / "lib" / "libomp.dylib"
        return (("-Xpreprocessor", "-fopenmp", str(libomp)), ())
    if system == "win32":
        # GCC aligns the stack to 16 bytes there, and wider vectors in it must be moved as unaligned ones.
        rest = ("-static",) if "clang" in version else ("-static", "-Wa,-muse-unaligned-vector-move")
        return (("-fopenmp", *rest), rest)
    return (("-fopenmp",), ())


def digest(*parts):
    """16 hexadecimal digits that identify these values."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def output_of(command):
    """The finished process of a command, its output as text. Compilers may print names in any encoding."""
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")


def checksum(path):
    """16 hexadecimal digits that identify the content of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def build(name, sources, flags):
    """The path of a shared library. It is compiled unless the cache has it.

    name     start of the file's name
    sources  paths: the first is compiled, the others are what it includes
    flags    of the compiler, besides those of the system

    Files are named <name>-<digest of sources and flags>-<digest of the compiler>-<their own checksum>.lib. A file is
    written under a temporary name and renamed, so several processes may build at once, and the checksum shows a
    damaged file.

    Raises UserError if there is no compiler or it fails.
    """
    folder = cache_folder()
    compiler = find_compiler()
    version = compiler and output_of([*compiler, "--version"]).stdout
    source = digest(*(path.read_text(encoding="utf-8") for path in sources), flags, sys.platform, platform.machine())

    # A library that was compiled before. Without a compiler, that of any compiler will do.
    for path in sorted(folder.glob(f"{name}-{source}-{digest(compiler, version) if compiler else '*'}-*.lib")):
        try:
            if not distrust(path) and path.stem.rsplit("-", 1)[1] == checksum(path):
                return path
            path.unlink()
        except FileNotFoundError:  # another process has removed it meanwhile
            continue
    if compiler is None:
        raise UserError(f"no C++ compiler: install {INSTALL.get(sys.platform, 'g++ or clang++')}, or set CXX")

    # Compile with the first set of flags that works.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / "library"
        for system in system_flags(sys.platform, version):
            command = [*compiler, *flags, str(sources[0]), "-o", str(output), *system]
            done = output_of(command)
            if done.returncode == 0:
                break
        else:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            first = next((line for line in lines if "error" in line), lines[0])
            raise UserError(f"{' '.join(compiler)} failed: {first}; set CXX to GCC 9 or clang 12 or newer")
        output.chmod(0o700)
        path = folder / f"{name}-{source}-{digest(compiler, version)}-{checksum(output)}.lib"
        os.replace(output, path)
    return path
