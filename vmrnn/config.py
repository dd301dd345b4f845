"""Every option of an experiment: one dataclass, and its three sources (defaults < TOML < command line)."""

import argparse
import dataclasses
import json
import math
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from vmrnn.errors import UserError

DATASETS = ["moving_mnist", "kth", "taxibj", "human36m", "video", "frames", "array"]  # the rows of dataset.DATASETS


def option(default, help, choices=None):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, "choices": choices})
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Flat on purpose: a key is the same word in a TOML file, as a flag, and in a checkpoint.

    Names are the published code's where they mean the same.
    """

    # Network
    model: str = option("VMRNN-D", "network", ["VMRNN-B", "VMRNN-D"])
    patch_size: int = option(2, "side of a patch: 2, 4, 8, ...")
    embed_dim: int = option(128, "width of the patch embedding")
    depths: list[int] = option([6], "VMRNN-B: VSS blocks of each cell")
    depths_down: list[int] = option([2, 6], "VMRNN-D: VSS blocks of each level on the way down")
    depths_up: list[int] = option([6, 2], "VMRNN-D: VSS blocks on the way up; the coarsest map takes the last")
    d_state: int = option(16, "states per channel of the scan")
    drop_rate: float = option(0.0, "dropout after the patch embedding")
    attn_drop_rate: float = option(0.0, "dropout after each SS2D")
    drop_path_rate: float = option(0.1, "stochastic depth")

    # Data
    dataset: str = option("moving_mnist", "data set; your own: video, frames, array", DATASETS)
    train_data_dir: str = option(
        "mnist",
        "file or folder (data/README.md); Moving MNIST's digits: an idx3 file, mnist (fetched once), builtin (scikit-learn's)",
    )
    valid_data_dir: str = option("", "file or folder of validation; empty: a part of train_data_dir")
    test_data_dir: str = option(
        "", "file or folder of the test; empty: a part of train_data_dir, or sequences generated from held-out digits"
    )
    cache_dir: str = option("data/cache", "folder for what is decoded or unpacked once; it may be deleted between runs")
    digits_split: str = option("all", "all: 50,000 / 10,000 digits; published: 10,000 / 3,000", ["all", "published"])
    split_by: str = option("time", "your own data: each clip is parted in time, or the clips are", ["time", "file"])
    valid_fraction: float = option(0.1, "your own data: part held out for validation, before the test part")
    test_fraction: float = option(0.1, "your own data: part held out for the test, the last")
    array_key: str = option("", "name of the array in a .npz; empty: arr_0, or the only one with 3 dimensions or more")
    data_range: list[float] = option([], "low and high, the values that become 0 and 1; empty: of the training part")
    thresholds: list[float] = option([], "events that CSI, POD and FAR count: values from here on, in the data's units")
    lpips: bool = option(False, "also LPIPS, where its package and weights are there")
    missing_value: list[float] = option([], "values that mean missing, as NaN always does")
    num_frames_input: int = option(10, "frames given")
    num_frames_output: int = option(10, "frames to forecast")
    input_channels: int = option(1, "channels of a frame")
    input_size: list[int] = option([64, 64], "height and width of a frame")
    frame_fit: str = option("resize", "other frames are resized or, in training at random, cropped", ["resize", "crop"])
    num_objects: int = option(2, "digits a sequence")
    digit_size: int = option(28, "side of a digit in pixels")
    step_length: float = option(0.1, "speed of a digit: fraction of the free canvas a frame")
    train_sequences: int = option(10000, "sequences of an epoch, at most as many as there are")
    valid_sequences: int = option(1000, "sequences of a validation at most, the same every time")
    test_sequences: int = option(1000, "sequences of a test of generated or your own data at most")

    # Training
    epochs: int = option(2000, "epochs")
    train_batch_size: int = option(16, "sequences of an update, on all devices together")
    valid_batch_size: int = option(16, "sequences of a validation batch")
    test_batch_size: int = option(16, "sequences of a test batch")
    l1_weight: float = option(1.0, "weight of the absolute error, beside the squared one, in the loss (the paper's: 1)")
    optimizer: str = option(
        "adam", "optimiser; muon: of matrices and filters, AdamW of the rest", ["adam", "adamw", "muon"]
    )
    lr: float = option(1e-4, "learning rate (the peak of it under cosine and onecycle)")
    weight_decay: float = option(0.0, "of matrices and filters alone: never of norms, biases, A_logs, Ds")
    schedule: str = option(
        "constant", "learning rate over the run, stepped per update", ["constant", "cosine", "onecycle"]
    )
    warmup_steps: int = option(0, "updates of linear warm-up (onecycle: 30 % of the run unless given)")
    curriculum: int = option(0, "updates over which the forecast grows from 1 frame to all; 0: all at once")
    clip_grad: float = option(0.0, "largest gradient norm; 0: no clipping")
    accumulate: int = option(1, "parts of a batch computed one after another, to save memory; shared among devices")
    ema: float = option(0.0, "decay of the averaged weights, which are then evaluated and saved as best; 0: none")
    precision: str = option(
        "fp32", "arithmetic of products and convolutions; the rest is fp32", ["fp32", "bf16", "fp16"]
    )
    compile: bool = option(False, "torch.compile the recurrence: a slow start, then faster steps on a GPU")
    cuda_graph: bool = option(False, "record a step's kernels once and replay them: one GPU, more memory, no waits")
    grad_checkpoint: bool = option(
        False, "compute activations again in the backward pass: far less memory, a third to a half slower"
    )
    epoch_valid: int = option(5, "epochs between validations")
    save_every: str = option("10m", "updates (500) or minutes (10m) between saves of last.pt; every epoch's end too")
    log_train: int = option(200, "updates between lines of training loss in log.jsonl; one at every epoch's end too")
    log_valid: int = option(200, "validation batches between saved pictures (the first batch always)")
    tensorboard: bool = option(False, "write curves and forecasts for TensorBoard too")
    seed: int = option(1234, "seed of weights, data and dropout")

    # Machine
    scan: str = option("auto", "scan back end: auto, mamba, triton, cpu, torch, reference")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    num_workers: int = option(0, "processes that make batches beside the main one")
    res_dir: str = option("./results", "run folder")

    def __post_init__(self):
        at_least_one = [
            "patch_size", "embed_dim", "d_state", "num_frames_input", "num_frames_output", "input_channels",
            "num_objects", "digit_size", "train_sequences", "valid_sequences", "test_sequences", "epochs",
            "train_batch_size", "valid_batch_size", "test_batch_size", "epoch_valid", "log_train", "log_valid",
            "accumulate",
        ]  # fmt: skip
        for key in at_least_one:
            if getattr(self, key) < 1:
                raise UserError(f"{key} = {getattr(self, key)}: must be at least 1")
        if not all(map(math.isfinite, self.thresholds)):
            raise UserError(f"thresholds = {self.thresholds}: must be finite")
        for key in ("drop_rate", "attn_drop_rate", "drop_path_rate", "ema"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"{key} = {getattr(self, key)}: must be in [0, 1)")
        for key in (
            "lr",
            "weight_decay",
            "clip_grad",
            "l1_weight",
            "step_length",
            "warmup_steps",
            "curriculum",
            "num_workers",
            "seed",
        ):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"{key} = {getattr(self, key)}: must be zero or more, and finite")
        if not re.fullmatch(r"[1-9]\d*m?", self.save_every):
            raise UserError(f"save_every = {self.save_every!r}: give updates (500) or minutes (10m)")
        if self.seed >= 2**63:
            raise UserError(f"seed = {self.seed}: must be below 2**63")
        if not (self.valid_fraction >= 0 and self.test_fraction >= 0 and self.valid_fraction + self.test_fraction < 1):
            raise UserError(
                f"valid_fraction = {self.valid_fraction}, test_fraction = {self.test_fraction}: zero or more, together below 1"
            )
        low_high = self.data_range
        if low_high and not (len(low_high) == 2 and low_high[0] < low_high[1] and all(map(math.isfinite, low_high))):
            raise UserError(f"data_range = {self.data_range}: give a low and a higher number, or nothing")
        if not all(map(math.isfinite, self.missing_value)):
            raise UserError(f"missing_value = {self.missing_value}: give finite numbers; NaN is missing anyway")
        if len(self.input_size) not in (1, 2):
            raise UserError(f"input_size = {self.input_size}: give one side or height and width")
        if min(self.input_size) < 7:
            raise UserError(f"input_size = {self.input_size}: frames must be 7 pixels or more, the window of SSIM")
        for f in dataclasses.fields(self):
            if f.metadata["choices"] and getattr(self, f.name) not in f.metadata["choices"]:
                raise UserError(
                    f"{f.name} = {getattr(self, f.name)!r}: choose one of {', '.join(f.metadata['choices'])}"
                )

    @property
    def frame_size(self):
        """(H, W) of a frame."""
        return self.input_size[0], self.input_size[-1]

    def is_save_due(self, updates, seconds):
        """Whether to save: `updates` and `seconds` have passed since the last time."""
        if self.save_every.endswith("m"):
            return seconds >= 60 * int(self.save_every[:-1])
        return updates >= int(self.save_every)

    @property
    def network_options(self):
        """The arguments of functions.build_model."""
        keys = ["model", "patch_size", "embed_dim", "depths", "depths_down", "depths_up", "d_state",
                "drop_rate", "attn_drop_rate", "drop_path_rate", "scan"]  # fmt: skip
        options = {key: getattr(self, key) for key in keys}
        return options | {"img_size": self.frame_size, "in_chans": self.input_channels}

    @property
    def data_options(self):
        """The arguments of dataset.build_dataset that the splits share."""
        keys = ["dataset", "train_data_dir", "valid_data_dir", "test_data_dir", "cache_dir", "digits_split", "split_by",
                "valid_fraction", "test_fraction", "array_key", "data_range", "missing_value", "num_frames_input",
                "num_frames_output", "input_channels", "frame_fit", "num_objects", "digit_size", "step_length",
                "seed"]  # fmt: skip
        return {key: getattr(self, key) for key in keys} | {"input_size": self.frame_size}

    def to_dict(self):
        return dataclasses.asdict(self)


GROUPS = {"model": "network", "dataset": "data", "epochs": "training", "scan": "machine"}  # by a group's first key
FIELDS = {f.name: f for f in dataclasses.fields(Config)}
LISTS = {list[int]: int, list[float]: float}  # type of a key -> type of its elements


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is a UserError of one line like any other mistake of the user."""

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message):
        raise UserError(f"{message}; see --help")


def add_options(parser):
    """A flag for every key of Config; one that is not given leaves no trace in the parsed arguments."""
    parser.usage = "%(prog)s [options]"  # a list of them all would hide the text below it
    for f in FIELDS.values():
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        is_list = f.type in LISTS
        shown = " ".join(map(str, default)) if is_list else default
        text = f"{f.metadata['help']} (default: {shown if shown != '' else 'none'})".replace("%", "%%")
        if f.type is bool:
            group.add_argument(
                f"--{f.name}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
            continue
        group.add_argument(
            f"--{f.name}",
            type=LISTS.get(f.type, f.type),
            nargs=("+" if default else "*") if is_list else None,
            default=argparse.SUPPRESS,
            metavar=None if f.metadata["choices"] else {str: "TEXT", float: "X", list[float]: "X"}.get(f.type, "N"),
            choices=f.metadata["choices"],
            help=text,
        )


def resolve(toml_path, given, base=None):
    """Config from `base` (a dict, default: the defaults) < TOML file (path or None) < `given` (a dict)."""
    merged = check_keys(base or {}, "the checkpoint's configuration")
    if toml_path:
        merged |= read_toml(toml_path)
    return Config(**merged | check_keys(given, "the command line"))


def read_toml(path):
    try:
        with open(path, "rb") as f:
            values = tomllib.load(f)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not a TOML file ({error})") from error
    return check_keys(values, path)


def check_keys(values, where):
    """`values` with ints made floats where a float is due; UserError for an unknown key or a wrong type."""
    checked = {}
    for key, value in values.items():
        if key not in FIELDS:
            raise UserError(f"{where}: unknown key {key!r}; see python train.py --help")
        kind = FIELDS[key].type
        if kind is float and type(value) is int:
            value = float(value)
        if kind == list[float] and isinstance(value, list):
            value = [float(v) if type(v) is int else v for v in value]
        if kind in LISTS:
            fits = isinstance(value, list) and all(type(v) is LISTS[kind] for v in value)
            fits = fits and (bool(value) or kind == list[float])
            wanted = "a list of integers" if kind == list[int] else "a list of numbers"
        else:
            fits, wanted = type(value) is kind, kind.__name__
        if not fits:
            raise UserError(f"{where}: {key} = {value!r} is not {wanted}")
        if not str(value).isprintable():  # such as a path in another encoding: no file could hold it
            raise UserError(f"{where}: {key} = {value!r} holds signs that are not text")
        checked[key] = value
    return checked


def save_toml(config, path):
    """The resolved configuration, readable by --config; JSON and TOML agree on these simple values."""
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in config.to_dict().items()]
    Path(path).write_text("".join(lines), encoding="utf-8")
