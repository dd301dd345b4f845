"""Test a VMRNN: metrics overall and per lead time, pictures, beside two baselines.

    python test.py --checkpoint exps/quickstart/best.safetensors        configuration read from the file
    python test.py --checkpoint exps/x/best.safetensors --test_data_dir data/mnist_test_seq.npy
    python test.py --checkpoint trained_model_state_dict --model VMRNN-D --test_data_dir data/mnist_test_seq.npy
                                                                        a published file plus flags
Writes metrics.json, lead_times.png, forecast_*.png and forecast.gif into --res_dir (default: a folder
`test` beside the checkpoint). Baselines: a black frame, and the last input frame repeated.
"""

import json
import logging
from pathlib import Path

from dataset import DATASETS, build_dataset, make_loader
from functions import build_model, compile_model, evaluate
from vmrnn import checkpoint, config as configuration, scan
from vmrnn.errors import UserError
from vmrnn.metrics import CONVENTIONS
from vmrnn.pictures import save_animation, save_lead_times, save_strip
from vmrnn.runtime import describe_device, make_folder, pick_device, run_program

log = logging.getLogger("vmrnn")

# Where the weights were trained says nothing of where they are tested.
ELSEWHERE = ("device", "scan", "compile", "num_workers", "res_dir", "cache_dir")
LABELS = {"model": "forecast", "black": "black frame", "last": "last input frame"}


def parse_arguments(argv=None):
    """(checkpoint content, Config, run folder, number of strips)."""
    parser = configuration.Parser(__doc__)
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file")
    parser.add_argument("--checkpoint", "--checkpoint_path", metavar="FILE", required=True, help="weights to test")
    parser.add_argument("--strips", type=int, default=4, metavar="N", help="sequences to picture (default: 4)")
    configuration.add_options(parser)
    given = vars(parser.parse_args(argv))
    toml, path, strips = (given.pop(key) for key in ("config", "checkpoint", "strips"))
    if strips < 1:
        raise UserError(f"--strips {strips}: must be at least 1")
    content = checkpoint.read_checkpoint(path)
    trained = {k: v for k, v in (content["config"] or {}).items() if k not in ELSEWHERE}
    config = configuration.resolve(toml, given, base=trained)
    folder = given.get("res_dir") or Path(path).parent / "test"
    return path, content, config, folder, strips


def table(results):
    """Lines of text: a row a metric with its convention, a column a forecast."""
    names = list(results["model"]["mean"])
    lines = ["  ".join(["metric".ljust(12)] + [LABELS[k].rjust(16) for k in results] + ["convention"])]
    for name in names:
        values = [f"{result['mean'][name]:16.4f}" for result in results.values()]
        lines.append("  ".join([name.ljust(12)] + values + [CONVENTIONS[name]]))
    return lines


def main(argv=None):
    path, content, config, folder, strips = parse_arguments(argv)
    device = pick_device(config.device)
    log.info("device     %s", describe_device(device))
    scan.resolve(config.scan, device.type, d_state=config.d_state)  # says which back end and why, or refuses
    test_set = build_dataset("test", length=config.test_sequences, **config.data_options)
    loader = make_loader(test_set, config.test_batch_size, config.num_workers)
    model = build_model(**config.network_options)
    checkpoint.load_weights(model, content["model"])
    model.to(device)
    if config.compile:
        compile_model(model, device)
    folder = make_folder(folder)

    log.info("checkpoint %s (%s)", path, config.model)
    log.info("data       %s", test_set)

    def pictures(step, inputs, targets, forecast):
        for i in range(len(inputs)):
            index = (step - 1) * config.test_batch_size + i
            if index < strips:
                sequence = [frames[i].cpu() for frames in (inputs, targets, forecast)]
                save_strip(folder / f"forecast_{index:04d}.png", *sequence, f"sequence {index}")
                if index == 0:
                    save_animation(folder / "forecast.gif", *sequence)

    results = evaluate(
        model,
        loader,
        device,
        DATASETS[config.dataset].metrics,
        config.precision,
        baselines=True,
        on_batch=pictures,
        title="test",
    )
    loss = results.pop("loss")
    log.info("%d sequences, loss (MSE + L1 over all outputs) %.4f", results["model"]["count"], loss)
    for line in table(results):
        log.info(line)
    save_lead_times(folder / "lead_times.png", {LABELS[k]: r for k, r in results.items()}, ["mse", "ssim", "psnr"])
    report = {
        "checkpoint": str(path), "data": str(test_set), "loss": loss, "conventions": CONVENTIONS,
        "results": {LABELS[k]: r for k, r in results.items()}, "config": config.to_dict(),
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    log.info("pictures and metrics.json are in %s", folder)


if __name__ == "__main__":
    run_program(main)
