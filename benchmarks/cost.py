"""What a network costs: parameters, multiply-adds with and without the scan, frames a second, peak memory.

    python -m benchmarks.cost --config configs/moving_mnist_d.toml
    python -m benchmarks.cost --model VMRNN-B --patch_size 4 --depths 12 --input_channels 2 --input_size 32 \\
        --num_frames_input 4 --num_frames_output 4
    python -m benchmarks.cost --config configs/moving_mnist_d.toml --device cuda --test_batch_size 16 --precision bf16

Any key of the configuration is a flag. Counted, for one frame and for the rollout of a sequence
(num_frames_input - 1 + num_frames_output steps), batch 1:

multiply-adds    of all products and convolutions, the scan's projection of the step size included. Published
                 figures of this family are these alone, under the name of FLOPs.
scan             operations of the recurrence, as VMamba counts them: 9 for each state and 1 for D, at each position,
                 channel and direction. Norms, gates and activations are in neither.

Then measured: forecasting sequences of random frames, --test_batch_size (here 1) at a time, weights as initialised. Peak
memory is the whole process's, with the import of torch, on a CPU; torch's own allocations on a GPU. A table, then one
JSON line.
"""

import json
import sys
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import median_wall_seconds, peak_mib
from functions import mixed_precision
from vmrnn import config as configuration
from vmrnn.network import build_model, compile_model
from vmrnn.network.cell import VMRNNCell
from vmrnn.rollout import rollout
from vmrnn.runtime import describe_device, pick_device, run_program
from vmrnn.scan import DIRECTIONS

ROUNDS = 3


class ScanCount:
    """Stands in for the scan, counts what it would do, and returns a map of the right shape."""

    def __init__(self):
        self.projection = self.operations = 0

    def __call__(self, x, dbl, dt_weight, dt_bias, A_log, D, backend):
        N, R = A_log.shape[-1], dt_weight.shape[-1]
        places = x.numel() * DIRECTIONS  # batch, positions, channels, directions
        self.projection += places * R
        self.operations += places * (9 * N + 1)
        return torch.empty_like(x)


def count(model, size, given, horizon):
    """{"multiply_adds", "scan_operations"} of a rollout, batch 1; of one frame where given and horizon are 1.

    model: any of the two networks, on the meta device: shapes alone, nothing is computed.
    """
    frames = torch.empty(1, given, model.in_chans, *size, device="meta")
    scan = ScanCount()
    with torch.no_grad(), patch("vmrnn.network.ss2d.scan_2d", scan), FlopCounterMode(display=False) as counter:
        rollout(model.eval(), frames, horizon)
    # The counter has two operations for a multiply-add
    return {"multiply_adds": counter.get_total_flops() // 2 + scan.projection, "scan_operations": scan.operations}


def dead_parameters(model):
    """How many more parameters a published file of this network has: no output depends on them, and ours has none.

    A `linear` in every block but a cell's first, and in network D a second patch embedding.
    """
    dead = 0
    for cell in model.modules():
        if isinstance(cell, VMRNNCell):
            dead += (len(cell.VSBs) - 1) * sum(p.numel() for p in cell.VSBs[0].linear.parameters())
    if hasattr(model, "Downsample"):
        dead += sum(p.numel() for p in model.Downsample.patch_embed.parameters())
    return dead


def cost(config):
    """{"parameters", "dead", "frame": count, "sequence": count, "steps"} of a Config's network and task."""
    model = build_model(**config.network_options).to("meta")
    size, given, horizon = config.frame_size, config.num_frames_input, config.num_frames_output
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dead": dead_parameters(model),
        "frame": count(model, size, 1, 1),
        "sequence": count(model, size, given, horizon),
        "steps": given - 1 + horizon,
    }


def measure(config, device):
    """{"frames_per_second": steps of the rollout a second, "peak_mib"} of forecasting on `device`."""
    torch.manual_seed(0)
    model = build_model(**config.network_options).to(device).eval()
    if config.compile:
        compile_model(model, device)
    shape = (config.test_batch_size, config.num_frames_input, config.input_channels, *config.frame_size)
    inputs = torch.rand(shape, device=device)
    with torch.inference_mode(), mixed_precision(device, config.precision):

        def forecast():
            rollout(model, inputs, config.num_frames_output)

        forecast()
        elapsed = median_wall_seconds(forecast, device, ROUNDS)
    steps = config.test_batch_size * (config.num_frames_input - 1 + config.num_frames_output)
    return {"frames_per_second": steps / elapsed, "peak_mib": peak_mib(device)}


def main(argv=None):
    parser = configuration.Parser(__doc__)
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file")
    configuration.add_options(parser)
    given = vars(parser.parse_args(argv))
    config = configuration.resolve(given.pop("config"), {"test_batch_size": 1} | given)
    device = pick_device(config.device)
    found = cost(config)
    measured = measure(config, device)

    published = found["parameters"] + found["dead"]
    print(f"{config.model}, {found['parameters']:,} parameters ({published:,} with the published files' dead ones)")
    sequence = f"{found['steps']}-step sequence"
    print(f"{'':34}{'one frame':>14}{sequence:>18}")
    rows = {
        "multiply-adds without the scan": lambda c: c["multiply_adds"],
        "scan operations (9 a state)": lambda c: c["scan_operations"],
        "with the scan, both added": lambda c: c["multiply_adds"] + c["scan_operations"],
    }
    for title, value in rows.items():
        cells = [f"{value(found[part]) / 1e9:.3f} G" for part in ("frame", "sequence")]
        print(f"{title:34}{cells[0]:>14}{cells[1]:>18}")
    print(f"forecasting, batch {config.test_batch_size}, {config.precision}, {describe_device(device)}:")
    print(f"{measured['frames_per_second']:.1f} frames/s, peak memory {measured['peak_mib']:.0f} MiB")
    print(json.dumps({"benchmark": "cost", "command": sys.argv, **found, **measured}))


if __name__ == "__main__":
    run_program(main)
