"""How the programs start and end: errors, signals, device, seeds, and the line about the machine."""

import atexit
import logging
import multiprocessing
import os
import platform
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from vmrnn.errors import Stopped, UserError, first_line
from vmrnn.progress import duration

log = logging.getLogger("vmrnn")

LESS_MEMORY = "smaller batches or frames, --accumulate and --grad_checkpoint need less"
KILLED_WORKER = "a process that prepares batches was killed, perhaps because memory ran out (use fewer --num_workers)"
CPUINFO = Path("/proc/cpuinfo")  # Linux
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start the program again


def run_program(main):
    """Run `main()` and end the program with its exit code.

    A UserError, a failed read or write, a lack of memory and a killed worker of a loader end with exit code 2 and one
    line, without a traceback.
    Stopped ends with EXIT_STOPPED. A standard output or error that is missing or fails ends nothing.
    """
    open_missing_streams()
    logging.basicConfig(format="%(message)s", level=logging.INFO, handlers=[StandardOutput(sys.stdout)])
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # command_line.answer left it so for the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        main()
    except (UserError, OSError) as error:  # OSError: such as a full disk; the message names the file
        code = complain(message_of(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        code = complain(f"out of memory ({message_of(error)}); {LESS_MEMORY}")
    except RuntimeError as error:
        if is_dead_worker(error):
            code = complain(KILLED_WORKER)
        elif "DefaultCPUAllocator" in str(error):  # the CPU's out of memory
            code = complain(f"out of memory; {LESS_MEMORY}")
        else:
            raise
    except Stopped as stopped:
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)  # a second signal must not change the exit code
        code = complain(stopped, EXIT_STOPPED, head="")
    except KeyboardInterrupt:
        code = complain("interrupted", 130, head="")
    flush_or_give_up(sys.stdout)
    if code:
        sys.exit(code)


def message_of(error):
    """What an error says. That of a loader's worker is a traceback of the worker, which ends with "KIND: message"."""
    text = str(error)
    return text.splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text


def complain(message, code=2, head="error: "):
    """Write one line to the standard error, if it can be written; returns the exit code."""
    line = " ".join(str(message).split("\n"))
    try:
        print(f"{head}{line}", file=sys.stderr, flush=True)
    except OSError:
        give_up(sys.stderr)
    return code


def open_missing_streams():
    """Give a program without standard output or error (pythonw, some job systems) streams that go nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def flush_or_give_up(stream):
    """Flush a standard stream. If that fails, what it holds is dropped: Python would end with exit code 120 for it."""
    try:
        stream.flush()
    except (OSError, ValueError):
        give_up(stream)


def give_up(stream):
    """Let a standard stream go nowhere from now on. With PYTHONUNBUFFERED a failed write leaves nothing to flush."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):
        pass


class StandardOutput(logging.StreamHandler):
    """Writes the program's lines. If they cannot be written (full disk, closed pipe), it says so once and continues."""

    def handleError(self, record):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        give_up(self.stream)
        complain(f"the standard output cannot be written ({error.strerror}); the program continues", head="warning: ")


# Signals that ask a program to stop: from a terminal, a scheduler, a terminal that is closed, and a job system
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class StopSignals:
    """While this context is open, each signal of STOPS raises Stopped.

    Once `deferred` is set, a signal sets `received` to its name instead, and the program says that it will stop after
    the update. A second SIGINT loses nothing: it says that the save is on its way. A third one ends the program at
    once. The other signals may come any number of times, for instance from torchrun and from whoever stopped torchrun.

    received   name of the first signal, None before
    deferred   whether there is something to save
    seconds    how long the update and the save take, about; 0: not known
    """

    def __init__(self):
        self.received, self.deferred, self.seconds, self.interrupts = None, False, 0, 0

    def __enter__(self):
        # nohup has SIGHUP ignored, and that must stay so.
        stops = [number for number in STOPS if number != getattr(signal, "SIGHUP", None) or not is_ignored(number)]
        self.before = {number: signal.signal(number, self.receive) for number in stops}
        return self

    def receive(self, number, frame):
        name, first = signal.Signals(number).name, self.received is None
        self.received = self.received or name
        if not self.deferred:
            raise Stopped(f"stopped by {self.received} before the first update: start again")
        self.interrupts += number == signal.SIGINT
        if self.interrupts == 3:
            raise KeyboardInterrupt
        if first:
            about = f"; about {duration(self.seconds)}" if self.seconds else ""
            say_now(f"{name}: finishing this update, then saving{about}")
        elif number == signal.SIGINT:
            say_now("SIGINT again: the save is on its way; a third one ends the program at once, without it")

    def __exit__(self, *raised):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def is_ignored(number):
    return signal.getsignal(number) == signal.SIG_IGN


def say_now(line):
    """Write a line from a signal handler, which may have interrupted a print. Only the first process speaks."""
    if log.isEnabledFor(logging.INFO):
        try:
            os.write(1, f"\n{line}\n".encode())
        except OSError:
            pass


def ignore_stop_signals(worker):
    """Start a loader's worker so that it ignores the signals of STOPS.

    A stop reaches the whole process group. The main process finishes its update and needs its workers for that.
    """
    for number in STOPS:
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


@contextmanager
def keep_child_handler():
    """Keep the handler of SIGCHLD that was there before the block, in which a loader starts its workers.

    torch's handler would raise at any moment, such as in the middle of an update of the weights. Without it a loader
    reports a worker that the system killed when the next batch is asked for.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield  # torch installs none there
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def is_dead_worker(error):
    """Whether an error says that a worker of a loader was killed.

    A worker that dies while its batch is fetched shows as a broken connection. Otherwise the loader raises
    RuntimeError. An error that a worker caught and reported ("Caught ...") does not count, whatever its type.
    """
    if isinstance(error, ConnectionError | EOFError):
        return not str(error).startswith("Caught ")
    return "DataLoader worker" in str(error) and ("exited unexpectedly" in str(error) or "killed by" in str(error))


def pick_device(name):
    """The torch.device called `name`.

    name   auto (cuda if the machine has it, else mps, else cpu), cpu, cuda, cuda:1, mps or xpu
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
        raise UserError(f"--device {name}: not there ({first_line(error)}); use --device auto or cpu") from error
    return device


def seed_update(*key):
    """Seed torch's generators of the CPU and of GPUs from whole numbers, 0 or more, such as (seed, update, rank)."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def describe_device(device):
    """One line: the device, its name, the threads of a CPU, and the versions that results depend on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}"
    return f"{device} ({name}), torch {torch.__version__}, Python {platform.python_version()}"


def cpu_name():
    """The name of the processor; only its architecture where the system does not know the name."""
    return cpu_fact("model name") or platform.processor() or platform.machine()


def cpu_fact(key):
    """What Linux says of the first processor, such as its "vendor_id"; "" on other systems and for an unknown key."""
    if CPUINFO.exists():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""
