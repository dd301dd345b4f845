"""Every option of an experiment: one row per option, and the three sources of its value.

Sources, from weak to strong: the default, the TOML file, the command line.
"""

import dataclasses
import difflib
import json
import math
import re
import tomllib
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from vmrnn.data.table import DATASETS
from vmrnn.errors import UserError, first_line, range_complaint
from vmrnn.values import TRANSFORMS, ValueRange

SCOPES = ("network", "data", "evaluation", "training", "machine")


def option(scope, default, help, *, choices=None, at_least=None, below=None, rule=None, resume=False, test=True):
    """One row of Config: everything that the project knows about one option.

    scope      what the option belongs to, one of SCOPES. All options of scope "network" go to build_model. Those
               of scope "data" are read by vmrnn.data.
    default    value if no source gives one. A list that is empty by default may be empty.
    help       text of --help
    choices    the allowed values; None: any
    at_least   smallest allowed number, or smallest allowed element of a list
    below      first number that is too large; whole numbers are below 2**31 unless the row says otherwise
    rule       function from a value to what is wrong with it, or to None
    resume     whether a resumed run may change the option
    test       whether a test or a forecast takes the value of the training run
    """
    row = {
        "scope": scope, "help": help, "choices": choices, "at_least": at_least, "below": below, "rule": rule,
        "resume": resume, "test": test,
    }  # fmt: skip
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=row)
    return field(default=default, metadata=row)


def key_of(table):
    """The rule of model, cell and head: a key of a table of vmrnn.network."""

    def rule(name):
        from vmrnn import network  # imports torch, which --help can do without

        if name not in (names := getattr(network, table)):
            return f"choose one of {', '.join(names)}"

    return rule


def low_and_high(values):
    """The rule of data_range: nothing, or pairs of numbers that ValueRange accepts."""
    if len(values) % 2:
        return "give a low and a higher number, or a pair of them per channel, or nothing"
    if values:
        ValueRange(tuple(values[::2]), tuple(values[1::2]))  # raises UserError


def not_nan(values):
    """The rule of missing_value."""
    if any(map(math.isnan, values)):
        return "give numbers; NaN is missing anyway"


def axes(value):
    """The rule of array_axes: letters of dimensions, rows and columns among them."""
    if value and not ({"H", "W"} <= set(value.upper()) <= set("NTCHW")):
        return "give one of N T C H W per dimension, H and W among them, such as THW"


def odd_numbers(values):
    """The rule of fss_windows."""
    if any(value < 1 or value % 2 == 0 for value in values):
        return "give odd numbers of pixels, such as 1 5 17"


def height_and_width(values):
    """The rule of input_size: one or two sides, each at least the window of SSIM."""
    if len(values) > 2:
        return "give one side or height and width"
    if min(values) < 7:
        return "frames must be 7 pixels or more, the window of SSIM"


def updates_or_minutes(value):
    """The rule of save_every."""
    if not re.fullmatch(r"[1-9]\d{0,8}m?", value):
        return "give updates (500) or minutes (10m)"


@dataclass(frozen=True)
class Config:
    """The options of one experiment. An option has the same name in a TOML file, as a flag and in a checkpoint.

    Names are those of the published code where they mean the same.
    UserError: a value that its row does not allow.
    """

    # The table is laid out by hand: the formatter would give every argument a line of its own.
    # fmt: off
    model: str = option("network", "VMRNN-D", "network: VMRNN-B or VMRNN-D", rule=key_of("NETWORKS"))
    patch_size: int = option("network", 2, "side of a patch in pixels: 2, 4, 8, ...", at_least=1)
    embed_dim: int = option("network", 128, "channels of the patch embedding", at_least=1)
    depths: list[int] = option("network", [6], "VMRNN-B: blocks per cell, one number per cell", at_least=1)
    depths_down: list[int] = option("network", [2, 6], "VMRNN-D: blocks per level on the way down",
        at_least=1)
    depths_up: list[int] = option("network", [6, 2],
        "VMRNN-D: blocks per level on the way up; the last number is the coarsest level", at_least=1)
    cell: str = option("network", "vss", "blocks of the cells: vss (the paper's), swin (SwinLSTM) or conv (ConvLSTM)",
        rule=key_of("CELLS"))
    base: str = option("network", "none",
        "what a forecast starts from; none: nothing; motion: the last frame moved along the optical flow, which the "
        "network is given and corrects", choices=["none", "motion"])
    head: str = option("network", "plain",
        "how a frame is made of features; plain: drawn from nothing, as published; advection: a mixture of copies of "
        "the last frame, which the network moves, and of a frame that it draws", rule=key_of("HEADS"))
    d_state: int = option("network", 16, "states per channel of the scan", at_least=1)
    drop_rate: float = option("network", 0.0, "dropout rate after the patch embedding", at_least=0, below=1)
    attn_drop_rate: float = option("network", 0.0, "dropout rate in every block", at_least=0, below=1)
    drop_path_rate: float = option("network", 0.1, "stochastic depth: rate of dropped blocks", at_least=0, below=1)

    dataset: str = option("data", "moving_mnist", "data set; your own: video, frames, array, grid",
        choices=list(DATASETS))
    train_data_dir: str = option("data", "mnist",
        "training data: a file or folder (data/README.md); of Moving MNIST the digits: an idx3 file, mnist (downloaded "
        "once) or builtin (those of scikit-learn)")
    valid_data_dir: str = option("data", "", "file or folder for validation; empty: a part of train_data_dir")
    test_data_dir: str = option("data", "",
        "file or folder for the test; empty: a part of train_data_dir, or for Moving MNIST sequences of held-out "
        "digits; standard: the published test file of Moving MNIST (downloaded once)")
    cache_dir: str = option("data", "data/cache",
        "folder for decoded and unpacked data; it may be deleted between runs", resume=True, test=False)
    digits_split: str = option("data", "all",
        "how many digits train, and how many are held out; all: 50,000 and 10,000; published: 10,000 and 3,000",
        choices=["all", "published"])
    split_by: str = option("data", "time",
        "your own data: time splits every clip in time; file puts whole clips into one split", choices=["time", "file"])
    valid_fraction: float = option("data", 0.1,
        "your own data: fraction held out for validation, just before the test part", at_least=0, below=1)
    test_fraction: float = option("data", 0.1, "your own data: fraction held out for the test, at the end", at_least=0,
        below=1)
    array_key: str = option("data", "",
        "name of the array in a .npz; empty: the only one with 3 dimensions or more")
    variables: list[str] = option("data", [],
        "grid: fields of the file in the order of the channels: t2m tp, image1/image_data, one level u@850; empty: its "
        "only field")
    array_axes: str = option("data", "",
        "grid: the dimensions of a field in order, as letters: N sequences, T time, C channels, H rows, W columns; "
        "empty: by their names and attributes", rule=axes)
    time_from: str = option("data", "",
        "grid: where a frame's time is: name:%Y%m%d%H%M (in the file's name), variable:NAME or attribute:NAME; empty: "
        "in the time coordinate, else in a scalar variable or an attribute")
    time_step: str = option("data", "",
        "your own data with times: take the frames nearest to a regular step, such as 10min or 1h; empty: all frames")
    forcings: list[str] = option("data", [],
        "grid: fields that are known in advance; the network is given them at every frame, those of the forecast too, "
        "and never forecasts them; FILE:NAME: a field of another file that does not change with time")
    calendar: bool = option("data", False,
        "grid: give the network sine and cosine of the hour of the day and of the day of the year (UTC)")
    frame_step: int = option("data", 1, "your own data: take every k-th frame", at_least=1)
    data_range: list[float] = option("data", [],
        "the stored values that become 0 and 1: low and high of all channels, or a pair per channel; empty: 0 and 255 "
        "for pictures of 8 bits, else the range of each channel in the training data", rule=low_and_high)
    transform: str = option("data", "none",
        "function of the values before data_range; sqrt and log spread small values, such as light rain, over more of "
        "the scale", choices=list(TRANSFORMS))
    zero_below: float = option("data", 0.0,
        "with transform: values below this one count as 0, in the units of the data", at_least=0)
    missing_value: list[float] = option("data", [], "stored values that mean a missing pixel; NaN always does",
        rule=not_nan)
    num_frames_input: int = option("data", 10, "frames given to the network", at_least=1)
    num_frames_output: int = option("data", 10, "frames to forecast", at_least=1)
    input_channels: int = option("data", 1, "channels per frame, without forcings", at_least=1)
    input_size: list[int] = option("data", [64, 64], "height and width of a frame in pixels", rule=height_and_width)
    frame_fit: str = option("data", "resize",
        "frames of another size: resize them, or crop them (at random positions in training)",
        choices=["resize", "crop"])
    num_objects: int = option("data", 2, "digits per sequence", at_least=1)
    digit_size: int = option("data", 28, "side of a digit in pixels", at_least=1)
    step_length: float = option("data", 0.1, "speed of a digit: fraction of the free canvas per frame", at_least=0)
    seed: int = option("data", 1234, "seed of weights, data and dropout", at_least=0, below=2**63)

    valid_sequences: int = option("evaluation", 1000, "largest number of validation sequences", at_least=1)
    test_sequences: int = option("evaluation", 1000,
        "largest number of test sequences, for generated and for your own data", at_least=1, resume=True)
    valid_batch_size: int = option("evaluation", 16, "sequences per validation batch", at_least=1, resume=True)
    test_batch_size: int = option("evaluation", 16, "sequences per test batch", at_least=1, resume=True)
    thresholds: list[float] = option("evaluation", [],
        "thresholds in the units of the data; a value at or above one is an event, which CSI, POD, FAR and other "
        "scores count",
        resume=True)
    fss_windows: list[int] = option("evaluation", [],
        "test.py, with thresholds: sides of the windows of the fractions skill score, odd numbers of pixels",
        rule=odd_numbers, resume=True)
    lpips: bool = option("evaluation", False, "also compute LPIPS; needs the package lpips and its weights",
        resume=True)
    epoch_valid: int = option("evaluation", 5, "epochs between validations", at_least=1, resume=True)
    log_valid: int = option("evaluation", 200,
        "validation batches between saved pictures; the first batch is always saved", at_least=1, resume=True)

    epochs: int = option("training", 2000, "epochs", at_least=1, resume=True)
    train_sequences: int = option("training", 10000,
        "sequences per epoch; without random crops at most as many as the data hold", at_least=1)
    train_batch_size: int = option("training", 16, "sequences per update, over all devices together", at_least=1)
    l1_weight: float = option("training", 1.0,
        "weight of the absolute error in the loss, next to the squared error (paper: 1)", at_least=0)
    bright_weight: float = option("training", 0.0,
        "the error of a pixel of value v, on the scale [0, 1], weighs 1 + bright_weight v in the loss; for fields of "
        "mostly small values, such as rain", at_least=0)
    optimizer: str = option("training", "adam",
        "optimiser; muon: Muon for matrices and filters, AdamW for the other weights",
        choices=["adam", "adamw", "muon"])
    lr: float = option("training", 1e-4, "learning rate: the highest of the run, whatever the schedule", at_least=0,
        resume=True)
    weight_decay: float = option("training", 0.0,
        "decay of matrices and filters; never of norms, biases, A_logs and Ds", at_least=0, resume=True)
    schedule: str = option("training", "constant",
        "learning rate over the run; cosine falls to 0, onecycle rises and falls to almost 0, wsd is constant and then "
        "falls to 0",
        choices=["constant", "cosine", "onecycle", "wsd"], resume=True)
    warmup_steps: int = option("training", 0,
        "updates of linear warm-up; onecycle warms up for 30 % of the run if this is 0", at_least=0)
    decay_steps: int = option("training", 0,
        "updates at the end over which wsd falls linearly to zero; 0: a fifth of the run", at_least=0, resume=True)
    curriculum: int = option("training", 0,
        "updates over which the forecast grows from 1 frame to all; 0: all from the start", at_least=0)
    clip_grad: float = option("training", 0.0, "largest norm of the gradient; 0: no clipping", at_least=0, resume=True)
    accumulate: int = option("training", 1,
        "split each batch into this many micro-batches, to save memory; shared among the devices", at_least=1,
        resume=True)
    ema: float = option("training", 0.0,
        "decay of the averaged weights, which are then evaluated and saved as best; 0: no averaging", at_least=0,
        below=1)
    precision: str = option("training", "fp32", "number format of matrix products and convolutions; the rest is fp32",
        choices=["fp32", "bf16", "fp16"], resume=True)
    compile: bool = option("training", False, "torch.compile the recurrence: a slow start, then faster steps on a GPU",
        resume=True, test=False)
    cuda_graph: bool = option("training", False,
        "record the kernels of a step once and replay them: one GPU, more memory", resume=True)
    grad_checkpoint: bool = option("training", False,
        "compute activations again in the backward pass: far less memory, a third to a half slower", resume=True)
    save_every: str = option("training", "10m",
        "updates (500) or minutes (10m) between saves of last.pt; the end of an epoch is always saved",
        rule=updates_or_minutes, resume=True)
    log_train: int = option("training", 200,
        "updates between training losses in log.jsonl; the end of an epoch is always logged", at_least=1, resume=True)
    tensorboard: bool = option("training", False, "also write curves and forecasts for TensorBoard", resume=True)

    scan: str = option("machine", "auto", "scan back end: auto, mamba, triton, cpu, torch, reference", resume=True,
        test=False)
    device: str = option("machine", "auto", "auto, cpu, cuda, cuda:1, mps, xpu", resume=True, test=False)
    num_workers: int = option("machine", 0, "processes that prepare batches; 0: the main process", at_least=0,
        resume=True, test=False)
    res_dir: str = option("machine", "./results", "run folder", resume=True, test=False)
    # fmt: on

    def __post_init__(self):
        for f in FIELDS.values():
            complaint = check_value(f, getattr(self, f.name))
            if complaint:
                raise UserError(f"{f.name} = {shown(getattr(self, f.name))}: {complaint}")
        if self.valid_fraction + self.test_fraction >= 1:
            raise UserError(
                f"valid_fraction = {self.valid_fraction}, test_fraction = {self.test_fraction}: together below 1"
            )
        if self.zero_below and self.transform == "none":
            raise UserError(
                f"zero_below = {self.zero_below}: belongs to transform sqrt or log; leave it out or choose one"
            )
        if len(self.data_range) not in (0, 2, 2 * self.input_channels):
            raise UserError(
                f"data_range = {self.data_range}: give 2 numbers, or 2 per channel for input_channels "
                f"{self.input_channels}"
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
        """The arguments of build_model. `in_chans` is the published name."""
        given = self.forcing_channels + self.base_channels
        channels = {"in_chans": self.input_channels + given, "out_chans": self.input_channels}
        return self.of_scope("network") | channels | {"scan": self.scan}

    @property
    def forcing_channels(self):
        """Channels that are given and never forecast: one per forcing, four of the calendar."""
        return len(self.forcings) + 4 * self.calendar

    @property
    def base_channels(self):
        """Channels of the base, which come last."""
        return self.input_channels if self.base != "none" else 0

    def of_scope(self, scope):
        """{name: value} of the options of one scope."""
        return {f.name: getattr(self, f.name) for f in FIELDS.values() if f.metadata["scope"] == scope}

    def to_dict(self):
        return dataclasses.asdict(self)


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
LISTS = {list[int]: int, list[float]: float, list[str]: str}  # type of an option -> type of its elements


def check_value(option, value):
    """What the row of an option finds wrong with a value of the right type; None if nothing."""
    row = option.metadata
    kind = LISTS.get(option.type, option.type)
    if row["choices"] and value not in row["choices"]:
        return f"choose one of {', '.join(row['choices'])}"
    complaint = row["rule"](value) if row["rule"] else None
    if complaint or kind in (str, bool):
        return complaint
    below = row["below"] or (2**31 if kind is int else None)
    numbers = value if option.type in LISTS else [value]
    return next(filter(None, (range_complaint(number, row["at_least"], below) for number in numbers)), None)


def for_test(trained):
    """The options of a training run, a dict, without those of its machine, which a test or a forecast sets itself."""
    return {key: value for key, value in trained.items() if key not in FIELDS or FIELDS[key].metadata["test"]}


PATHS = ("train_data_dir", "valid_data_dir", "test_data_dir")


def changed_on_resume(before, after, data_known=False):
    """Names of the options in which two Configs differ although a resumed run may not change them.

    data_known   the checkpoint has checksums of its data, which are compared later: the data may lie elsewhere now
    """
    fixed = sorted(name for name, f in FIELDS.items() if not f.metadata["resume"])
    changed = [name for name in fixed if getattr(before, name) != getattr(after, name)]
    allowed = {name for name in PATHS if data_known and getattr(before, name) and getattr(after, name)}
    if not after.data_range:
        allowed.add("data_range")  # the range is then found in the data
    return [name for name in changed if name not in allowed]


def changes(before, after):
    """The options that a resumed run changes, as text such as lr 0.01 -> 0.001. res_dir does not count.

    before   options of its checkpoint, a dict
    after    Config of the resumed run
    """
    now = after.to_dict()
    changed = [name for name in before if name in now and name != "res_dir" and before[name] != now[name]]
    return ", ".join(f"{name} {shown(before[name])} -> {shown(now[name])}" for name in changed)


def did_you_mean(word, helps):
    """The end of a message about an unknown option: the names that were probably meant, or nothing.

    word    what was given, such as --batch_size
    helps   {name: help text} of the options that there are
    """
    bare = word.strip("-").replace("-", "_").lower()
    found = [name for name in helps if bare in name]
    found += difflib.get_close_matches(word, helps, 3, 0.75)
    found += [name for name, text in helps.items() if text.lower().startswith(bare.replace("_", " "))]
    found = list(dict.fromkeys(found))[:4] if bare else []
    return f"; did you mean {' or '.join(found)}?" if found else ""


def resolve(toml_path, given, base=None):
    """Config from `base` (a dict, default: the defaults) < TOML file (path or None) < `given` (a dict)."""
    merged = check_keys(base or {}, "the checkpoint's configuration")
    return Config(**merged | read_toml(toml_path) | check_keys(given, "the command line"))


def read_toml(path):
    """{option: value} of a TOML file; {} without a path. UserError: it cannot be read, or holds what is no option."""
    if not path:
        return {}
    try:
        values = tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))  # some editors begin with a byte order mark
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and deep nesting
        raise UserError(f"--config {path}: not a TOML file of options ({first_line(error)[:100]})") from error
    return check_keys(values, path)


def check_keys(values, where):
    """`values` with ints made floats where a float is due; UserError for an unknown key or a wrong type."""
    checked = {}
    for key, value in values.items():
        if key not in FIELDS:
            names = {name: f.metadata["help"] for name, f in FIELDS.items()}
            hint = did_you_mean(str(key), names) or "; see python train.py --help"
            raise UserError(f"{where}: unknown key {shown(key)}{hint}")
        try:
            checked[key] = with_floats(FIELDS[key], value)
        except OverflowError as error:
            raise UserError(f"{where}: {key} = {shown(value)} is too large") from error
        if complaint := type_complaint(FIELDS[key], checked[key]):
            raise UserError(f"{where}: {key} = {shown(checked[key])} {complaint}")
    return checked


def with_floats(option, value):
    """The value with ints made floats if the option is a float or a list of floats. OverflowError: one is too large."""
    if option.type is float and type(value) is int:
        return float(value)
    if option.type == list[float] and isinstance(value, list):
        return [float(v) if type(v) is int else v for v in value]
    return value


def type_complaint(option, value):
    """Why a value cannot be one of the option, whatever its range, as the end of a sentence; None if it can."""
    kind = option.type
    if kind in LISTS:
        fits = isinstance(value, list) and all(type(v) is LISTS[kind] for v in value)
        fits = fits and (bool(value) or not option.default_factory())
        wanted = {int: "a list of integers", float: "a list of numbers", str: "a list of texts"}[LISTS[kind]]
    else:
        fits, wanted = type(value) is kind, kind.__name__
    if not fits:
        return f"is not {wanted}"
    # Text that cannot be shown, such as a path in another encoding. Spaces of all kinds are text.
    texts = {str: [value], list[str]: value}.get(kind, [])
    if not all(sign.isprintable() or unicodedata.category(sign) == "Zs" for text in texts for sign in text):
        return "holds signs that are not text"
    return None


def shown(value):
    """A value as a part of a message: at most 80 characters, of any value."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, deep nesting
        return "a huge value"
    return text if len(text) <= 80 else f"{text[:77]}..."


def save_toml(config, path):
    """Write a configuration that --config can read."""
    Path(path).write_text(to_toml(config), encoding="utf-8")


def to_toml(config):
    """The text of a TOML file. JSON and TOML write these simple values alike."""
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in config.to_dict().items()]
    return "".join(lines)
