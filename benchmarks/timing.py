"""How long a function takes, on a CPU and on a GPU, and how much memory."""

import statistics
import sys
import time

import torch

HEAD_START = 10_000_000  # clocks, about 5 ms, in which a GPU waits while all launches are queued


def seconds(function, device):
    """Of one call. On a GPU from the first kernel to the end of the last: with a head start, so that what takes the
    host less than that to launch is not timed by its launches."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def median_wall_seconds(function, device, times):
    """Of one call as a user waits for it, launches included: the median of `times`."""
    measured = []
    for _ in range(times):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        measured.append(time.perf_counter() - start)
    return statistics.median(measured)


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_mib(device):
    """The most memory so far: a GPU's of torch's tensors, a CPU's of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
