"""Test a trained network: metrics overall and per lead time, and pictures, beside two baselines.

    python test.py --checkpoint exps/quickstart/best.safetensors        configuration read from the file
    python test.py --checkpoint exps/x/best.safetensors --test_data_dir data/mnist_test_seq.npy
    python test.py --checkpoint trained_model_state_dict --model VMRNN-D --test_data_dir data/mnist_test_seq.npy
                                                                        a published file plus flags
Writes report.html (one file to open or to send: figures, curves, a player, how it was made), metrics.json,
lead_times.png, forecast_*.png and forecast.gif into --res_dir (default: a folder `test` beside the checkpoint).
The baselines are a black frame, the last input frame repeated, and the last input frame moved along the optical flow.
"""

import argparse
import logging
import shlex
import sys
from pathlib import Path

import torch

from dataset import DATASETS, build_dataset, make_loader
from functions import evaluate, make_loss
from vmrnn import config as configuration, scan
from vmrnn.baselines import BASELINES
from vmrnn.checkpoint import load_network
from vmrnn.errors import UserError
from vmrnn.files import make_folder
from vmrnn.metrics import figure, metric_rows
from vmrnn.network import compile_model
from vmrnn.pictures import save_animation, save_lead_times, save_strip
from vmrnn.report import pick, write_report
from vmrnn.run_folder import strict_json
from vmrnn.runtime import describe_device, run_program

log = logging.getLogger("vmrnn")


def parse_arguments(argv=None):
    """(checkpoint, TOML file or None, options of the command line, output folder, strips, whether with motion)."""
    parser = configuration.Parser(__doc__)
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file")
    parser.add_argument("--checkpoint", "--checkpoint_path", metavar="FILE", required=True, help="weights to test")
    parser.add_argument(
        "--motion",
        action=argparse.BooleanOptionalAction,
        help="the baseline `motion`, the last frame moved along the optical flow (default: for your own data)",
    )
    parser.add_argument("--strips", type=int, default=4, metavar="N", help="sequences to picture (default: 4)")
    configuration.add_options(parser)
    given = vars(parser.parse_args(argv))
    toml, path, strips = (given.pop(key) for key in ("config", "checkpoint", "strips"))
    with_motion = given.pop("motion")
    if strips < 1:
        raise UserError(f"--strips {strips}: must be at least 1")
    folder = given.get("res_dir") or Path(path).parent / "test"
    return path, toml, given, folder, strips, with_motion


def table(results, conventions):
    """The figures as lines of text: one row per metric with its convention, one column per forecast."""
    lines = ["  ".join(["metric".ljust(12)] + [label.rjust(16) for label in results] + ["convention"])]
    for name in results["forecast"]["mean"]:
        values = [f"{result['mean'][name]:16.4f}" for result in results.values()]
        lines.append("  ".join([name.ljust(12)] + values + [conventions[name]]))
    return lines


def main(argv=None):
    path, toml, given, folder, strips, with_motion = parse_arguments(argv)
    trained = load_network(path, toml, given.pop("device", None), **given)
    model, config = trained.model, trained.config
    device = next(model.parameters()).device
    log.info("device     %s", describe_device(device))
    scan.resolve(config.scan, device.type, d_state=config.d_state)  # logs the back end, or refuses one that cannot run
    test_set = build_dataset("test", config, trained.value_range)
    metrics = metric_rows(DATASETS[config.dataset].metrics, config.thresholds, test_set.value_range, config.lpips)
    conventions = {metric.name: str(metric) for metric in metrics}
    loader = make_loader(test_set, config.test_batch_size, config.num_workers)
    if config.compile:
        compile_model(model, device)
    folder = make_folder(folder)

    log.info("checkpoint %s (%s)", path, config.model)
    log.info("data       %s", test_set)
    for note in test_set.notes:
        log.info("           %s", note)
    errors = []  # mse of each sequence, in the order of the data set: the mean over lead times with known pixels

    def pictures(step, inputs, targets, forecast):
        for i in range(min(len(inputs), strips - len(errors))):
            index = len(errors) + i
            sequence = [frames[i].cpu() for frames in (inputs, targets, forecast)]
            save_strip(folder / f"forecast_{index:04d}.png", *sequence, f"sequence {index}")
            if index == 0:
                save_animation(folder / "forecast.gif", *sequence)
        errors.extend(figure("mse", forecast.cpu(), targets.cpu()).nanmean(dim=1).tolist())

    baselines = dict(BASELINES)
    if not (DATASETS[config.dataset].own if with_motion is None else with_motion):
        del baselines["motion"]
    loss_function = make_loss(config)
    results = evaluate(
        model, loader, device, metrics, loss_function, config.precision, baselines, on_batch=pictures,
        title="test",
    )  # fmt: skip
    loss = results.pop("loss")
    results = {"forecast": results.pop("model")} | results
    loss_name = f"{loss_function}, over all outputs"
    log.info("%d sequences, loss (%s) %.4f", results["forecast"]["count"], loss_name, loss)
    for line in table(results, conventions):
        log.info(line)

    # Only now is it known which sequences the report shows, so these are forecast again.
    roles = pick(errors)
    sequences = []

    def keep(step, inputs, targets, forecast):
        for (role, index), *frames in zip(roles.items(), inputs.cpu(), targets.cpu(), forecast.cpu()):
            sequences.append((role, index, *frames))

    if roles:
        batch = [torch.stack(frames) for frames in zip(*(test_set[index] for index in roles.values()))]
        evaluate(
            model, [batch], device, ("mse",), loss_function, config.precision, on_batch=keep,
            title="sequences of the report",
        )  # fmt: skip

    curves = [name for name in ("mse", "ssim", "psnr") if name in conventions]
    save_lead_times(folder / "lead_times.png", results, curves or [metric.name for metric in metrics[:3]])
    report = {
        "checkpoint": str(path), "data": str(test_set), "loss": loss, "conventions": conventions,
        "results": results, "value_range": test_set.value_range.to_dict(), "config": config.to_dict(),
    }  # fmt: skip
    (folder / "metrics.json").write_text(strict_json(report, indent=1), encoding="utf-8")
    write_report(
        folder / "report.html",
        title=f"{config.model} on {config.dataset}",
        facts={
            "checkpoint": str(path),
            "data": DATASETS[config.dataset].description,
            "test set": str(test_set),
            "task": f"{config.num_frames_input} frames given, {config.num_frames_output} to forecast",
            "loss": f"{loss:.4f} ({loss_name})",
            "device": describe_device(device),
        },
        conventions=conventions,
        results=results,
        sequences=sequences,
        config=config.to_dict(),
        command=shlex.join(["python", "test.py", *map(str, sys.argv[1:] if argv is None else argv)]),
    )
    log.info("report.html, pictures and metrics.json are in %s", folder)


if __name__ == "__main__":
    run_program(main)
