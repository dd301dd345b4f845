"""Test a trained network: metrics overall and per lead time, and pictures, beside baselines.

    python test.py --checkpoint exps/quickstart/best.safetensors        configuration read from the file
    python test.py --checkpoint exps/x/best.safetensors --test_data_dir standard
    python test.py --checkpoint trained_model_state_dict --model VMRNN-D --test_data_dir data/mnist_test_seq.npy
                                                                        a published file plus flags
    python test.py --forecasts theirs.npy --config configs/radar.toml   another method's forecasts of the same test set

Writes report.html (one file to open or to send: figures, curves, a player, how it was made), metrics.json,
lead_times.png, spectrum.png, forecast_*.png and forecast.gif into --res_dir. The default is a folder beside the
checkpoint or the forecasts. It is named after the test set and the horizon, such as test_kth_20.
--save_forecasts writes inputs, truths and forecasts of all sequences into one file.
The baselines are a black frame and the last input frame repeated. For your own data, or with --motion, a third one is
the last input frame moved along the optical flow.
"""

from vmrnn import command_line

if __name__ == "__main__":
    # Before the imports that take seconds
    command_line.answer(command_line.test_parser(__doc__))

import argparse
import logging
import re
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from dataset import DATASETS, build_dataset, make_loader
from functions import compare, make_loss, network_outputs
from vmrnn import config as configuration
from vmrnn.baselines import BASELINES
from vmrnn.checkpoint import find_checkpoint, load_network
from vmrnn.colours import Look
from vmrnn.data.overlap import overlap_notes
from vmrnn.errors import UserError
from vmrnn.field_facts import FieldFacts, climatology, latitude_weights
from vmrnn.files import make_folder, replacing, without_pattern
from vmrnn.forecast_store import ForecastWriter, StoredForecasts
from vmrnn.metrics import anomaly_correlation, figure, metric_rows
from vmrnn.network import compile_model
from vmrnn.pictures import save_animation, save_lead_times, save_strip
from vmrnn.progress import duration
from vmrnn.report import Shown, is_compared, pick, write_report
from vmrnn.run_folder import read_log, strict_json
from vmrnn.runtime import describe_device, pick_device, run_program
from vmrnn.spectrum import Spectrum

log = logging.getLogger("vmrnn")


def parse_arguments(argv=None):
    """(the arguments of this program, an argparse.Namespace; the options of Config on the command line, a dict)."""
    parser = command_line.test_parser(__doc__)
    given = vars(parser.parse_args(argv))
    args = argparse.Namespace(**{key: given.pop(key) for key in given.keys() - configuration.FIELDS.keys()})
    if args.checkpoint:
        args.checkpoint = str(find_checkpoint(args.checkpoint))
    if args.strips < 1:
        raise UserError(f"--strips {args.strips}: must be at least 1")
    if not args.checkpoint and not args.forecasts:
        raise UserError("name the weights to test with --checkpoint, or another method's --forecasts; see --help")
    if args.forecasts and not (args.checkpoint or args.config or given):
        raise UserError("--forecasts: name the test set with --config FILE.toml or with options such as --dataset")
    return args, given


def load(args, given):
    """The network to test, and the options of its test set.

    Returns (network or None, Config, ValueRange or None, options of the training as a dict, device).
    """
    if args.checkpoint:
        trained = load_network(args.checkpoint, args.config, **{"device": None} | given)
        model = None if args.forecasts else trained.model
        device = next(trained.model.parameters()).device
        return model, trained.config, trained.value_range, trained.training, device
    config = configuration.resolve(args.config, given)
    return None, config, None, config.to_dict(), pick_device(config.device)


def rows_of(args, config, test_set, info, notes):
    """The metrics of the test.

    args       arguments of this program
    config     Config of the test
    test_set   from dataset.build_dataset
    info       GridInfo of the test set; None if it is not a gridded field
    notes      list to which lines are added about the climatology
    """
    spec, value_range = DATASETS[config.dataset], test_set.value_range
    rows = metric_rows(
        spec.metrics, config.thresholds, value_range, config.lpips, config.fss_windows, data_units=spec.own
    )
    if args.climatology:
        stored = test_set.clips[0].frames().shape[1:3] if config.frame_fit == "crop" else None
        rows += (anomaly_correlation(climatology(args.climatology, config, value_range, info, stored, notes)),)
    return rows


def table(results, rows, config):
    """The figures as lines of text: one row per metric, one column per forecast, and below what the metrics are.

    Metrics that only the published figures of other data sets use are left out. The report shows them.
    """
    shown = [row for row in rows if is_compared(row.name, config)]
    widths = {label: max(12, len(label)) for label in results}
    lines = ["  ".join(["metric".ljust(14)] + [label.rjust(width) for label, width in widths.items()])]
    for row in shown:
        values = [f"{result['mean'][row.name]:{widths[label]}.4f}" for label, result in results.items()]
        lines.append("  ".join([row.name.ljust(14), *values]))
    about = dict(row.family or (row.name, str(row)) for row in shown)
    return lines + [""] + [f"{name}: {text}" for name, text in about.items()]


def data_name(config):
    """A short name of the test set: that of the file or folder for a user's own data, else of the data set."""
    path = config.test_data_dir or config.train_data_dir
    return without_pattern(path).name if DATASETS[config.dataset].own and path else config.dataset


def training_facts(checkpoint):
    """{"training": how long the network was trained}, from the log.jsonl beside the weights; {} if there is no log."""
    checkpoint = Path(checkpoint)
    log_file = checkpoint.parent / "log.jsonl"
    entries = [e for e in read_log(log_file) if "valid_loss" in e] if log_file.is_file() else []
    entries = [entry for entry in entries if isinstance(entry.get("mse"), float)]
    if not entries:
        return {}
    entry = min(entries, key=lambda entry: entry["mse"]) if checkpoint.name == "best.safetensors" else entries[-1]
    return {"training": f"{entry['samples']:,} sequences, {entry['epoch']} epochs, {duration(entry['seconds'])}"}


class Clock:
    """Calls outputs_of(inputs, targets) and measures how many frames per second it makes.

    outputs_of   see functions.compare
    device       where it runs

    The first call may compile kernels. It counts only if there is no other.
    """

    def __init__(self, outputs_of, device):
        self.outputs_of, self.device = outputs_of, device
        self.calls = []  # (frames, seconds)

    def __call__(self, inputs, targets):
        begun = time.perf_counter()
        outputs = self.outputs_of(inputs, targets)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        self.calls.append((outputs.shape[0] * outputs.shape[1], time.perf_counter() - begun))
        return outputs

    def __str__(self):
        frames, seconds = map(sum, zip(*self.calls[1:] or self.calls))
        return f"{frames / seconds:.3g} frames per second through the network"


def default_folder(tested, config):
    """The folder of a test: beside the tested file, named after the test set and the horizon.

    tested   file of weights or forecasts; its name is part of the folder's, unless it is a run's best.safetensors

    Tests on files of the same name share a folder: --res_dir keeps them apart.
    """
    tested, data = Path(tested), config.test_data_dir or (DATASETS[config.dataset].own and config.train_data_dir)
    parts = [
        "test",
        "" if tested.name == "best.safetensors" else tested.stem,
        without_pattern(data).stem if data else config.dataset,
    ]
    name = "_".join(filter(None, (*parts, str(config.num_frames_output))))
    return tested.parent / re.sub(r"[^\w.-]+", "-", name)


def data_description(config):
    """What the data are, in one line."""
    text = DATASETS[config.dataset].description
    return f"{text}; digits per sequence: {config.num_objects}" if config.dataset == "moving_mnist" else text


class Pictures:
    """Called with every batch of the test set: draws the first sequences, and keeps the error of each sequence.

    folder        where pictures are saved
    count         sequences to picture
    facts         FieldFacts
    look          Look
    value_range   ValueRange of the data. The errors are those of the metrics: computed without its transform
    """

    def __init__(self, folder, count, facts, look, value_range):
        self.folder, self.count, self.facts, self.look, self.value_range = folder, count, facts, look, value_range
        self.errors = []  # mse of each sequence, a tensor (T,); NaN where no pixel is known

    def __call__(self, inputs, targets, forecast):
        for i in range(min(len(inputs), self.count - len(self.errors))):
            index = len(self.errors) + i
            sequence = [frames[i].cpu() for frames in (inputs, targets, forecast)]
            leads = self.facts.lead_names(len(sequence[1]))
            path = self.folder / f"forecast_{index:04d}.png"
            save_strip(path, *sequence, self.facts.title(index), leads, self.look)
            if index == 0:
                save_animation(self.folder / "forecast.gif", *sequence, leads, self.look)
        forecast, targets = (self.value_range.to_linear(frames.cpu(), axis=2) for frames in (forecast, targets))
        self.errors += figure("mse", forecast, targets)


def look_at(test_set, config, colours):
    """The Look of a test set, whose scale fits the last frames of some of its sequences.

    test_set   from dataset.build_dataset
    config     its Config
    colours    see Look.of
    """
    count = min(len(test_set), 16)
    last = [test_set[i * len(test_set) // count][1][-1:, : config.input_channels] for i in range(count)]
    return Look.of(config, test_set.value_range, last, colours)


def forecasts_to_test(args, config, model, device, test_set, facts):
    """(function of (inputs, targets) that returns the forecasts, see functions.compare; the file that is tested)."""
    if model is None:
        shape = (config.num_frames_output, config.input_channels, *config.frame_size)
        log.info("forecasts  %s", args.forecasts)
        stored = StoredForecasts(args.forecasts, config.array_key, len(test_set), shape, test_set.value_range, facts)
        for note in stored.notes:
            log.info("           %s", note)
        return stored, args.forecasts
    if config.compile:
        compile_model(model, device)
    log.info("checkpoint %s (%s)", args.checkpoint, config.model)
    return Clock(network_outputs(model, config.precision), device), args.checkpoint


def forecast_again(roles, errors, outputs_of, test_set, device):
    """The sequences of the report, a list of Shown.

    roles        {role: index in the test set}, from report.pick
    errors       mse of every sequence and lead time, a list of (T,)
    outputs_of   from forecasts_to_test
    test_set     from dataset.build_dataset
    device       where the forecasts are made
    """
    if not roles:
        return []
    sequences = []

    def keep(step, inputs, targets, forecast):
        for (role, index), *frames in zip(roles.items(), inputs.cpu(), targets.cpu(), forecast.cpu()):
            sequences.append(Shown(role, index, errors[index], *frames))

    if isinstance(outputs_of, StoredForecasts):
        outputs_of.restart(roles.values())
    batch = [torch.stack(frames) for frames in zip(*(test_set[index] for index in roles.values()))]
    compare(outputs_of, [batch], device, ("mse",), on_batch=keep, title="sequences of the report")
    return sequences


def about_motion(baselines, config, test_set):
    """{"motion": a warning} if the network sees more of the map than the baseline `motion` does; else {}.

    The base of a network is computed on the whole map. The baseline gets the inputs of the test, which may be crops.
    """
    if "motion" not in baselines or not config.base_channels or config.frame_fit != "crop":
        return {}
    height, width = test_set.clips[0].frames().shape[1:3]
    if (height, width) == test_set.size:
        return {}
    return {
        "motion": "this baseline sees only the crop, but the network's base is computed on the whole map: compare the "
        f"two on whole maps, with --input_size {height} {width}"
    }


def facts_of_report(args, config, model, device, test_set, outputs_of, overlap, remarks):
    """{label: text} of what was tested and how, for the report.

    overlap   lines about frames of the training in the test set, a list
    remarks   {"loss": text} where one was computed, and that of about_motion
    The others are those of forecasts_to_test.
    """
    network = {}
    if model:
        parameters = sum(p.numel() for p in model.parameters())
        network = {"parameters": f"{parameters / 1e6:.2f} M", **training_facts(args.checkpoint)}
    return {
        "checkpoint" if model else "forecasts": str(args.checkpoint if model else args.forecasts),
        **network,
        "data": data_description(config),
        "test set": "; ".join([str(test_set), *overlap]),
        "values": str(test_set.value_range),
        "task": f"{config.num_frames_input} frames given, {config.num_frames_output} to forecast",
        **remarks,
        "device": describe_device(device),
        **({"speed": str(outputs_of)} if model else {}),
    }


def main(argv=None):
    args, given = parse_arguments(argv)
    model, config, value_range, training, device = load(args, given)
    log.info("device     %s", describe_device(device))

    # Test set, metrics and baselines
    test_set = build_dataset("test", config, value_range)
    if "test_sequences" in given and len(test_set) > config.test_sequences:
        raise UserError(
            f"--test_sequences {config.test_sequences}: this test set has {len(test_set)} sequences, and all of them "
            "count, as in published figures; leave it out"
        )
    value_range = test_set.value_range
    loader = make_loader(test_set, config.test_batch_size, config.num_workers)
    facts = FieldFacts.of(test_set, config)
    notes = []
    rows = rows_of(args, config, test_set, facts.info, notes)
    weights = latitude_weights(facts.info, config) if args.latitude_weights else None
    baselines = dict(BASELINES)
    if not (DATASETS[config.dataset].own if args.motion is None else args.motion):
        del baselines["motion"]

    # The forecasts to test: those of a network, or those of a file
    outputs_of, tested = forecasts_to_test(args, config, model, device, test_set, facts)
    loss_function = make_loss(config) if model else None
    about = about_motion(baselines, config, test_set) if model else {}
    log.info("data       %s", test_set)
    overlap = overlap_notes(test_set, "test", config, training)
    for note in [*test_set.notes, *notes, *overlap]:
        log.info("           %s", note)
    folder = make_folder(given.get("res_dir") or default_folder(tested, config))
    for old in folder.glob("forecast_[0-9][0-9][0-9][0-9].png"):  # an earlier test may have drawn more sequences
        old.unlink()

    # One pass over the test set
    leads = facts.lead_names(config.num_frames_output)
    look = look_at(test_set, config, args.colours)
    pictures, spectrum = Pictures(folder, args.strips, facts, look, value_range), Spectrum()
    with ExitStack() as stack:
        writer = None
        if path := args.save_forecasts:
            writer = stack.enter_context(ForecastWriter(path, len(test_set), value_range, facts))

        def see(step, inputs, targets, forecast):
            pictures(inputs, targets, forecast)
            spectrum.update("truth", targets)
            spectrum.update("forecast", forecast)
            if writer:
                writer(inputs, targets, forecast)

        loss, results = compare(
            outputs_of, loader, device, rows, loss_function, baselines=baselines, value_range=value_range,
            weights=weights, on_batch=see, title="test",
        )  # fmt: skip
    if args.save_forecasts:
        log.info("forecasts  of all sequences are in %s", args.save_forecasts)
    losses = {"loss": f"{loss:.4f} ({loss_function}, over all outputs)"} if model else {}
    log.info("%d sequences%s", results["forecast"]["count"], "".join(f", {k} {v}" for k, v in losses.items()))
    for line in [*table(results, rows, config.to_dict()), *(f"{name}: {text}" for name, text in about.items())]:
        log.info("%s", line)

    # Forecast the sequences of the report again. The errors of all sequences decide which ones it shows.
    roles = pick([errors.nanmean().item() for errors in pictures.errors])
    sequences = forecast_again(roles, pictures.errors, outputs_of, test_set, device)

    # Write metrics.json, the figures and the report.
    conventions = {row.name: str(row) for row in rows}
    curves = [row for row in rows if row.name in ("mse", "ssim", "psnr")]
    save_lead_times(folder / "lead_times.png", results, curves or rows[:3], leads)
    spectrum.draw(folder / "spectrum.png", leads)
    content = {
        "checkpoint": str(tested), "data": str(test_set), "loss": loss, "conventions": conventions,
        "results": results, "value_range": value_range.to_dict(), "lead_times": leads, "baselines": about,
        "spectrum": {label: power.tolist() for label, power in spectrum.compute().items()}, "config": config.to_dict(),
    }  # fmt: skip
    with replacing(folder / "metrics.json") as temporary:
        temporary.write_text(strict_json(content, indent=1), encoding="utf-8")
    write_report(
        folder / "report.html",
        title=f"{config.model if model else Path(args.forecasts).name} on {data_name(config)}",
        facts=facts_of_report(args, config, model, device, test_set, outputs_of, overlap, losses | about),
        conventions=conventions,
        results=results,
        sequences=sequences,
        config=config.to_dict(),
        command=shlex.join(["python", "test.py", *map(str, sys.argv[1:] if argv is None else argv)]),
        look=look,
        leads=leads,
        channels=facts.info.names[: config.input_channels] if facts.info else None,
        spectrum=folder / "spectrum.png",
    )
    log.info("report.html, pictures and metrics.json are in %s", folder)


if __name__ == "__main__":
    run_program(main)
