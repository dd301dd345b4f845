"""How long a function takes, on a CPU and on a GPU."""

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
