"""How the programs start and end: errors, signals, device, seeds, and the line about the machine."""

import atexit
import logging
import multiprocessing
import platform
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from vmrnn.errors import Stopped, UserError

LESS_MEMORY = "smaller batches or frames, --accumulate and --grad_checkpoint need less"
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start the program again


def run_program(main):
    """Run `main()` and end the program with its exit code.

    A UserError, a failed read or write and a lack of memory end with exit code 2 and one line, without a traceback.
    Stopped ends with EXIT_STOPPED.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    try:
        main()
    except UserError as error:
        line = (
            str(error).splitlines()[-1].split("UserError: ")[-1]
        )  # an error from a loader's worker carries its traceback
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # such as a full disk; the message names the file
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, torch.OutOfMemoryError) as error:
        print(f"error: out of memory ({error}); {LESS_MEMORY}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):  # the CPU's out of memory
            raise
        print(f"error: out of memory; {LESS_MEMORY}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second SIGTERM must not change the exit code
        print(stopped, file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class StopSignals:
    """While this context is open SIGTERM and SIGINT raise Stopped, or, once `deferred` is set, only set `received` to
    their name. A second SIGINT ends the program as it always would; SIGTERM may come twice, from torchrun and from
    whoever stopped torchrun."""

    def __init__(self):
        self.received, self.deferred = None, False

    def __enter__(self):
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def receive(self, number, frame):
        self.received = signal.Signals(number).name
        if not self.deferred:
            raise Stopped(f"stopped by {self.received} before the first update: start again")
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])

    def __exit__(self, *raised):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def ignore_stop_signals(worker):
    """Start a loader's worker so that it ignores SIGTERM and SIGINT.

    A stop reaches the whole process group. The main process finishes its update and needs its workers for that.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def kill_workers_at_exit():
    """Let this process kill its loaders' workers when it ends.

    Python would send SIGTERM, which they ignore, and wait for them for ever.
    """
    atexit.register(kill_workers)


def kill_workers():
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report each worker as lost
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def pick_device(name):
    """The torch.device called `name`.

    name   auto (cuda if there is one, else mps, else cpu), cpu, cuda, cuda:1 or mps
    UserError: the machine does not have the device.

    Also turns TF32 off. By default torch lets a GPU's convolutions round their inputs to 10 bits, and published weights
    would not give the published numbers. --precision bf16 is faster than TF32.
    """
    torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps", "xpu"):
            raise RuntimeError("not one of cpu, cuda, mps, xpu")
        torch.empty(1, device=device)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            torch.cuda.set_device(device)  # for code that asks for the current GPU
    except (RuntimeError, AssertionError) as error:  # not compiled in, no driver, no such index
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not there ({reason}); use --device auto or cpu") from error
    return device


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_update(*key):
    """Seed torch's generators of the CPU and of GPUs from whole numbers, 0 or more, such as (seed, update, rank)."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def describe_device(device):
    """One line: the device, its name, the threads of a CPU, and the versions that results depend on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return f"{device} ({name}), torch {torch.__version__}, Python {platform.python_version()}"


def cpu_name():
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
