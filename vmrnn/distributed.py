"""The processes of one run that torchrun started, and the numbers that they exchange.

Without torchrun there is one process, and every function here works with that one. Control values always travel over
gloo between the CPUs, also if NCCL carries the gradients. They neither wait for a GPU nor make one wait.
"""

import os
import re
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from vmrnn.errors import UserError


@contextmanager
def processes(device):
    """Join the process group if torchrun started this process. Yields the device of this process.

    device   torch.device of the run; on GPUs each process gets cuda:LOCAL_RANK
    UserError: fewer GPUs than processes, or a device that several processes cannot share.
    """
    # Not WORLD_SIZE: some clusters set it for all programs.
    if "LOCAL_RANK" not in os.environ:
        yield device
        return
    check_environment()
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
        # torchrun keeps its store when it restarts the processes (seen in torch 2.5 to 2.15). The store then holds
        # addresses of processes that are gone, so each start gets its own part of it. Only on one machine do all
        # processes have the same count of restarts (docs, several machines).
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # One process may decode a data set for two hours while the others wait.
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(hours=2))
    # The warning is about the filters (C, 1, 3, 3). The stride of an axis of length 1 has no meaning.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def check_environment():
    """UserError: LOCAL_RANK is set, but not all that torchrun sets beside it."""
    numbers = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT")
    wrong = [name for name in numbers if not re.fullmatch(r"\d{1,9}", os.environ.get(name, ""))]
    wrong += [] if os.environ.get("MASTER_ADDR") else ["MASTER_ADDR"]
    if wrong:
        raise UserError(
            f"LOCAL_RANK is set, as torchrun does, but {', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} missing "
            "or no number: start with torchrun, or unset LOCAL_RANK"
        )


@contextmanager
def rank_zero_first():
    """Run the block on rank 0 first, then on the others, which find its files on the disk."""
    if rank() and world_size() > 1:
        dist.barrier()
    yield
    if not rank() and world_size() > 1:
        dist.barrier()


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(*values):
    """The sums of these numbers over all processes. Every process gets the same floats."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return tuple(total.tolist())


def all_gather(value):
    """[value of rank 0, value of rank 1, ...]; the values can be anything that pickle takes."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
