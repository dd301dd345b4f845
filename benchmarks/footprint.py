"""What a training step asks of a GPU, counted on any machine: memory and operations.

    python -m benchmarks.footprint --config configs/moving_mnist_d.toml --precision bf16
    python -m benchmarks.footprint --model VMRNN-B --train_batch_size 8 --grad_checkpoint

Any key of the configuration is a flag; the batch is train_batch_size in its `accumulate` parts. The step runs in torch's
fake tensors, which have shapes and types and no numbers, with the Triton kernels (--scan names another back end). Counted:

kept         MiB that the forward leaves for the backward, weights included
peak         the most at one time, with the gradients; inside an operation only its results count, so a GPU needs
             somewhat more, and its allocator rounds up
operations   that launch kernels: all but views and allocations. One of ours counts as one and launches up to twelve.

Under bf16 and fp16 the rules are those of autocast on a CPU, which leaves a few norms in half precision that a GPU has in
fp32. A table, then one JSON line.
"""

import json
import sys
import weakref
from collections import Counter
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from functions import RolloutLoss, Step
from vmrnn import config as configuration, scan
from vmrnn.network import build_model
from vmrnn.rollout import Rollout
from vmrnn.runtime import run_program

BLOCK = 512  # bytes that CUDA's allocator rounds up to
SHOWN = 12


class Ledger(TorchDispatchMode):
    """Keeps count of the operations that run under it, and of the bytes of the tensors that they make."""

    def __init__(self):
        super().__init__()
        self.operations, self.live, self.bytes, self.peak = Counter(), set(), 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        name = operation.name().removeprefix("aten::")
        is_view = any(r.alias_info and not r.alias_info.is_write for r in operation._schema.returns)
        if not (is_view or "view" in name or "empty" in name or name.startswith(("prim::", "detach", "promote_types"))):
            self.operations[name] += 1
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return results

    def add(self, tensor):
        storage = tensor.untyped_storage()
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
    """{"kept", "peak" (bytes), "forward", "backward" ({operation: times})} of a step on inputs of `shape`
    (B, T, C, H, W). The model may be a real one or, under FakeTensorMode, a fake one."""
    step = Step(Rollout(model.train(), grad_checkpoint), RolloutLoss(), torch.device("cpu"), precision)
    inputs, targets = torch.zeros(shape), torch.zeros(shape[0], horizon, *shape[2:])
    with Ledger() as ledger:
        for tensor in (*model.parameters(), inputs, targets):
            ledger.add(tensor)
        found = {}

        def between(loss):
            found.update(kept=ledger.bytes, forward=dict(ledger.operations))
            ledger.operations.clear()
            return loss

        with patch.object(step.scaler, "scale", between):
            step(inputs, targets)
        return found | {"peak": ledger.peak, "backward": dict(ledger.operations)}


def fake_footprint(config):
    model = build_model(**(config.network_options | {"scan": "triton" if config.scan == "auto" else config.scan}))
    mode = FakeTensorMode()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = mode.from_tensor(parameter)
    shape = (config.train_batch_size // config.accumulate, config.num_frames_input, config.input_channels)
    with mode, patch.object(scan, "choose", lambda backend, *_: backend):
        return footprint(
            model, (*shape, *config.frame_size), config.num_frames_output, config.precision, config.grad_checkpoint
        )


def main(argv=None):
    parser = configuration.Parser(__doc__)
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file")
    configuration.add_options(parser)
    given = vars(parser.parse_args(argv))
    config = configuration.resolve(given.pop("config"), given)
    found = fake_footprint(config)
    forward, backward = Counter(found["forward"]), Counter(found["backward"])
    print(f"{config.model}, batch {config.train_batch_size // config.accumulate}, {config.precision}")
    print(f"kept for the backward {found['kept'] / 2**20:.0f} MiB, peak {found['peak'] / 2**20:.0f} MiB")
    print(f"{'operations':28}{'forward':>9}{'backward':>9}")
    print(f"{'all':28}{forward.total():9}{backward.total():9}")
    for name, _ in (forward + backward).most_common(SHOWN):
        print(f"{name:28}{forward[name]:9}{backward[name]:9}")
    print(json.dumps({"benchmark": "footprint", "command": sys.argv, **found}))


if __name__ == "__main__":
    run_program(main)
