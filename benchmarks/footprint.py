"""How much GPU memory a training step needs, found on any machine.

    python -m benchmarks.footprint --config configs/moving_mnist_d.toml --precision bf16
    python -m benchmarks.footprint --model VMRNN-B --train_batch_size 8 --grad_checkpoint

Any key of the configuration is a flag. The batch is train_batch_size divided by `accumulate`. The step runs with fake
tensors, which have shapes and dtypes and no values, and with the Triton kernels (--scan names another back end). The
bytes of every tensor are counted while it lives:

kept  after the forward pass: parameters, inputs, and what is saved for the backward pass
peak  the maximum during forward and backward pass, without scratch memory inside an operation

A GPU needs more: that scratch memory, its allocator's rounding, and the CUDA context. Under bf16 and fp16 the rules are
those of autocast on a CPU, which runs a few norms in half precision that a GPU runs in fp32. Prints both numbers, and
adds a line to exps/benchmarks/footprint.jsonl.
"""

import sys
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.record import record
from functions import mixed_precision
from vmrnn import command_line, config as configuration
from vmrnn.network import build_model
from vmrnn.network.kernels import UsesKernels, kernels_of
from vmrnn.rollout import rollout
from vmrnn.runtime import run_program

CPU = torch.device("cpu")
BLOCK = 512  # bytes that CUDA's allocator rounds up to


class Ledger(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make under it, from their making to their end.

    torch's own MemTracker refuses networks whose modules run more than once, and a recurrent network's do.
    """

    def __init__(self, *tensors):
        super().__init__()
        self.live, self.bytes, self.peak = set(), 0, 0
        self.add(*tensors)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        self.add(*(t for t in tree_leaves(results) if isinstance(t, torch.Tensor)))
        return results

    def add(self, *tensors):
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage._cdata not in self.live:
                size = -(-storage.nbytes() // BLOCK) * BLOCK
                self.live.add(storage._cdata)
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self.remove, storage._cdata, size)

    def remove(self, address, size):
        self.live.discard(address)
        self.bytes -= size


def footprint(model, shape, horizon, precision="fp32", grad_checkpoint=False):
    """{"kept", "peak"} in bytes, of a training step on inputs of `shape` (B, T, C, H, W).

    The model is a real one or, under FakeTensorMode, a fake one.
    """
    inputs, following = torch.zeros(shape), torch.zeros(shape[0], shape[1] - 1 + horizon, *shape[2:])
    truth = following[:, :, : model.out_chans]  # without forcings
    with Ledger(*model.train().parameters(), inputs, following) as ledger:
        with mixed_precision(CPU, precision):
            outputs = rollout(model, inputs, horizon, grad_checkpoint, following[:, shape[1] - 1 :])
        loss = (outputs - truth).square().mean()
        kept = ledger.bytes
        loss.backward()
    return {"kept": kept, "peak": ledger.peak}


def fake_network(config, kernels):
    """(network of a Config, FakeTensorMode): under this mode the network computes shapes alone.

    kernels   Kernels of all its layers
    """
    model = build_model(**config.network_options)
    mode = FakeTensorMode()
    for module in model.modules():
        if isinstance(module, UsesKernels):
            module.kernels = kernels
        for tensors in (module._parameters, module._buffers):
            tensors |= {name: mode.from_tensor(t) for name, t in tensors.items() if t is not None}
    return model, mode


def fake_footprint(config):
    """footprint of the training step that a Config describes."""
    model, mode = fake_network(config, kernels_of("triton" if config.scan == "auto" else config.scan))
    shape = (config.train_batch_size // config.accumulate, config.num_frames_input, model.in_chans)
    with mode:
        return footprint(
            model, (*shape, *config.frame_size), config.num_frames_output, config.precision, config.grad_checkpoint
        )


def main(argv=None):
    parser = command_line.Parser(__doc__)
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file")
    command_line.add_options(parser)
    given = vars(parser.parse_args(argv))
    config = configuration.resolve(given.pop("config"), given)
    found = fake_footprint(config)
    print(f"{config.model}, batch {config.train_batch_size // config.accumulate}, {config.precision}")
    print(f"kept for the backward {found['kept'] / 2**20:.0f} MiB, peak {found['peak'] / 2**20:.0f} MiB")
    record("footprint", {"command": sys.argv, **found})


if __name__ == "__main__":
    run_program(main)
