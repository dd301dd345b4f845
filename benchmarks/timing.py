"""How long a function takes, and how much memory a process takes."""

import statistics
import sys
import time

import torch
from torch.utils.benchmark import Timer


def wall_seconds(function, at_least=0.2):
    """Median seconds of one call as a user waits for it: on a GPU launches are included.

    at_least  the function is called for this many seconds in all, and twice at least
    """
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=at_least).median


def cpu_seconds(function, at_least=0.2):
    """Median seconds of CPU time of one call, of all threads: what other programs do on the machine matters less.

    at_least  the function is called for this many seconds in all, and twice at least
    """
    times = []
    while len(times) < 2 or sum(times) < at_least:
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def kernel_seconds(function, device, at_least=0.2):
    """Median seconds of one call: on a GPU of its kernels alone, launched ahead, with an empty L2 cache."""
    if device.type != "cuda":
        return wall_seconds(function, at_least)
    from triton.testing import do_bench

    return do_bench(function, rep=int(1e3 * at_least), return_mode="median") / 1e3


def peak_mib(device):
    """The largest memory so far: of torch's tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # does not exist on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
