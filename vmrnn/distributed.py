"""The processes of one run that torchrun started, and what they tell each other.

Without torchrun there is one process, and everything here says so. Control values go over gloo
between the CPUs, whatever carries the gradients: they neither wait for a GPU nor make it wait.
"""

import os
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from vmrnn.errors import UserError


@contextmanager
def processes(device):
    """The process group, if torchrun started this process; yields its device, cuda:LOCAL_RANK where `device` is a GPU."""
    if "LOCAL_RANK" not in os.environ:  # some clusters set WORLD_SIZE for all programs
        yield device
        return
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"torchrun --nproc_per_node: process {local} of this machine has no GPU; start fewer")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"torchrun with --device {device.type}: several processes run on cpu or cuda; name one")
    store, rank, world = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps its store over restarts (torch 2.5 to 2.15 at least), and with it the addresses of
        # processes that are gone. Only on one machine do all agree on the count: README, several machines.
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Two hours: one process may decode a data set while the others wait.
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(hours=2))
    # The filters' (C, 1, 3, 3): strides of an axis of length 1, which mean nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def rank_zero_first():
    """What is inside, rank 0 does before the others: they find what it left on the disk."""
    if rank() and world_size() > 1:
        dist.barrier()
    yield
    if not rank() and world_size() > 1:
        dist.barrier()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(*values):
    """The sums of these numbers over all processes, the same floats on each."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return tuple(total.tolist())


def all_gather(value):
    """[value of rank 0, of rank 1, ...] of something that can be pickled, on each."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
