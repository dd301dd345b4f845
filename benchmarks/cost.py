"""What a network costs: parameters, multiply-adds with and without the scan, frames per second, peak memory.

    python -m benchmarks.cost --config configs/moving_mnist_d.toml
    python -m benchmarks.cost --model VMRNN-B --patch_size 4 --depths 12 --input_channels 2 --input_size 32 \\
        --num_frames_input 4 --num_frames_output 4
    python -m benchmarks.cost --config configs/moving_mnist_d.toml --device cuda --test_batch_size 16 --precision bf16

Any key of the configuration is a flag. Counted, with batch 1, for one frame and for the rollout of a sequence
(num_frames_input - 1 + num_frames_output steps):

multiply-adds    of all products and convolutions, the scan's projection of the step size included. This is what papers
                 of this family publish under the name of FLOPs
scan             operations of the recurrence, counted as VMamba does: 9 per state and 1 for D, per position, channel
                 and direction. Norms, gates and activations are in neither count

Measured: the forecast of sequences of random frames with fresh weights, --test_batch_size (here 1) at a time. Peak
memory on a CPU is that of the whole process, the import of torch included; on a GPU it is that of torch's tensors.
Prints a table, and adds a line to exps/benchmarks/cost.jsonl.
"""

import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.footprint import fake_network
from benchmarks.record import record
from benchmarks.timing import peak_mib, wall_seconds
from functions import mixed_precision
from vmrnn import command_line, config as configuration
from vmrnn.network import build_model, compile_model
from vmrnn.network.kernels import kernels_of
from vmrnn.rollout import rollout
from vmrnn.runtime import describe_device, pick_device, run_program
from vmrnn.scan import DIRECTIONS


class ScanCount:
    """Takes the place of the scan: counts what a scan would do, and returns a map of the right shape."""

    def __init__(self):
        self.projection = self.operations = 0

    def __call__(self, x, dbl, dt_weight, dt_bias, A_log, D):
        N, R = A_log.shape[-1], dt_weight.shape[-1]
        steps = x.numel() * DIRECTIONS  # batch, positions, channels, directions
        self.projection += steps * R
        self.operations += steps * (9 * N + 1)
        return torch.empty_like(x)


def count(config, given, horizon):
    """{"multiply_adds", "scan_operations"} of the network of a Config: of a rollout with batch 1, shapes alone.

    given    frames that are known
    horizon  frames to forecast
    """
    scan = ScanCount()
    model, mode = fake_network(config, kernels_of("torch")._replace(scan=scan))
    with mode, torch.no_grad(), FlopCounterMode(display=False) as counter:
        frames = torch.empty(1, given + horizon, model.in_chans, *config.frame_size)
        rollout(model.eval(), frames[:, :given], horizon, following=frames[:, given:])
    # The counter counts two operations per multiply-add.
    return {"multiply_adds": counter.get_total_flops() // 2 + scan.projection, "scan_operations": scan.operations}


def cost(config):
    """{"parameters", "frame": count, "sequence": count, "steps"} of the network and the task of a Config."""
    given, horizon = config.num_frames_input, config.num_frames_output
    return {
        "parameters": sum(parameter.numel() for parameter in build_model(**config.network_options).parameters()),
        "frame": count(config, 1, 1),
        "sequence": count(config, given, horizon),
        "steps": given - 1 + horizon,
    }


def measure(config, device):
    """{"frames_per_second": steps of the rollout per second, "peak_mib"} of forecasting on `device`."""
    torch.manual_seed(0)
    model = build_model(**config.network_options).to(device).eval()
    if config.compile:
        compile_model(model, device)
    given, horizon = config.num_frames_input, config.num_frames_output
    frames = torch.rand(config.test_batch_size, given + horizon, model.in_chans, *config.frame_size, device=device)
    with torch.inference_mode(), mixed_precision(device, config.precision):

        def forecast():
            rollout(model, frames[:, :given], horizon, following=frames[:, given:])

        elapsed = wall_seconds(forecast)
    steps = config.test_batch_size * (given - 1 + horizon)
    return {"frames_per_second": steps / elapsed, "peak_mib": peak_mib(device)}


def main(argv=None):
    parser = command_line.Parser(__doc__)
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file")
    command_line.add_options(parser)
    given = vars(parser.parse_args(argv))
    config = configuration.resolve(given.pop("config"), {"test_batch_size": 1} | given)
    device = pick_device(config.device)
    found = cost(config)
    measured = measure(config, device)

    print(f"{config.model}, {found['parameters']:,} parameters")
    sequence = f"{found['steps']}-step sequence"
    print(f"{'':34}{'one frame':>14}{sequence:>18}")
    rows = {
        "multiply-adds without the scan": lambda c: c["multiply_adds"],
        "scan operations (9 per state)": lambda c: c["scan_operations"],
        "sum of both": lambda c: c["multiply_adds"] + c["scan_operations"],
    }
    for title, value in rows.items():
        cells = [f"{value(found[part]) / 1e9:.3f} G" for part in ("frame", "sequence")]
        print(f"{title:34}{cells[0]:>14}{cells[1]:>18}")
    print(f"forecasting, batch {config.test_batch_size}, {config.precision}, {describe_device(device)}:")
    print(f"{measured['frames_per_second']:.1f} frames/s, peak memory {measured['peak_mib']:.0f} MiB")
    record("cost", {"command": sys.argv, **found, **measured})


if __name__ == "__main__":
    run_program(main)
