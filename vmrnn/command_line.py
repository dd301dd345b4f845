"""The arguments of the three programs. Nothing here imports torch, so a wrong option is refused in a moment."""

import argparse
import dataclasses
import re
import signal
import sys
from pathlib import Path

from vmrnn.config import FIELDS, LISTS, SCOPES, did_you_mean
from vmrnn.errors import UserError

# Options of how files are read, which predict.py takes too
READING = ("array_key", "array_axes", "variables", "time_from", "time_step", "forcings", "frame_step")

COLOURS = (
    "colours of pictures: grey, rain or a colour map of matplotlib (default: auto, which is rain or viridis for fields "
    "and grey for all else)"
)


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag raises a UserError of one line, and a hyphen in a flag counts as an underscore."""

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        # Before Python 3.14 argparse takes -3.4e38 for the name of an option.
        self._negative_number_matcher = re.compile(r"-(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$")

    def parse_known_args(self, args=None, namespace=None):
        args = [self.known_spelling(word) for word in (sys.argv[1:] if args is None else args)]
        known, unknown = super().parse_known_args(args, namespace)
        if flags := [word.split("=")[0] for word in unknown if word.startswith("--")]:
            helps = {
                action.option_strings[0]: action.help or ""
                for action in self._actions
                if action.option_strings and action.help != argparse.SUPPRESS
            }
            raise UserError(f"unrecognized arguments: {flags[0]}{did_you_mean(flags[0], helps) or '; see --help'}")
        return known, unknown

    def known_spelling(self, word):
        """--patch-size=2 as --patch_size=2, if only the second is a flag."""
        flag, *value = word.split("=", 1)
        if not flag.startswith("--") or flag in self._option_string_actions:
            return word
        name = flag[2:].replace("-", "_")
        spelling = f"--no-{name.removeprefix('no_')}" if name.startswith("no_") else f"--{name}"
        return "=".join([spelling, *value]) if spelling in self._option_string_actions else word

    def error(self, message):
        short = message if len(message) <= 250 else f"{message[:120]} ... {message[-60:]}"
        raise UserError(f"{short}; see --help")


def add_options(parser, only=None):
    """A flag for every key of Config, or for those of `only`. A flag that is not given is absent from the arguments."""
    parser.usage = "%(prog)s [options]"  # a list of them all would hide the text below it
    fields = [f for f in FIELDS.values() if only is None or f.name in only]
    groups = {
        scope: parser.add_argument_group(scope) for scope in SCOPES if any(f.metadata["scope"] == scope for f in fields)
    }
    for f in fields:
        group, choices = groups[f.metadata["scope"]], f.metadata["choices"]
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        is_list = f.type in LISTS
        written = " ".join(map(str, default)) if is_list else default
        text = f"{f.metadata['help']} (default: {written if written != '' else 'none'})".replace("%", "%%")
        if f.type is bool:
            group.add_argument(
                f"--{f.name}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
            continue
        kind = LISTS.get(f.type, f.type)
        group.add_argument(
            f"--{f.name}",
            type=kind,
            nargs=("+" if default else "*") if is_list else None,
            default=argparse.SUPPRESS,
            metavar=None if choices else "X" if kind is float else "TEXT" if kind is str else "N",
            choices=choices,
            help=text,
        )


def answer(parser):
    """Answer --help and refuse wrong options of the command line. A program calls this before it imports torch."""
    # A Ctrl-C during the imports ends the program without a traceback; run_program takes it over.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        parser.parse_args()
    except UserError as error:
        if sys.stderr is not None:
            try:
                print(f"error: {error}", file=sys.stderr, flush=True)
            except OSError:
                sys.stderr = None
        sys.exit(2)


def train_parser(description):
    """The arguments of train.py."""
    parser = Parser(description)
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file")
    parser.add_argument(
        "--init_from", "--checkpoint", "--checkpoint_path", metavar="FILE", help="weights to start a new run from"
    )
    parser.add_argument(
        "--resume",
        metavar="auto|FILE",
        help="auto: continue the run in --res_dir, or begin it there; FILE: continue from this last.pt, or from that "
        "of a folder",
    )
    add_options(parser)
    return parser


def test_parser(description):
    """The arguments of test.py."""
    parser = Parser(description)
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file")
    parser.add_argument("--checkpoint", "--checkpoint_path", metavar="FILE", help="weights to test")
    parser.add_argument(
        "--forecasts",
        metavar="FILE",
        help="test another method's forecasts instead, in the units of the data: .npy or .npz (N, T, H, W[, C]) in the "
        "order of the test set; .nc or .zarr as --save_forecasts and predict.py write it",
    )
    parser.add_argument(
        "--save_forecasts", metavar="FILE", help="write inputs, truths and forecasts: .nc, .zarr or .npz"
    )
    parser.add_argument(
        "--latitude_weights",
        action="store_true",
        help="weigh errors by the cosine of the latitude; gridded fields with a latitude only",
    )
    parser.add_argument(
        "--climatology",
        metavar="FILE",
        help="file of frames whose mean is the climatology; adds the anomaly correlation",
    )
    parser.add_argument(
        "--motion",
        action=argparse.BooleanOptionalAction,
        help="the baseline `motion`, the last frame moved along the optical flow (default: for your own data)",
    )
    parser.add_argument("--colours", default="auto", metavar="NAME", help=COLOURS)
    parser.add_argument("--strips", type=int, default=4, metavar="N", help="sequences to picture (default: 4)")
    add_options(parser)
    return parser


def predict_parser(description):
    """The arguments of predict.py."""
    parser = Parser(description)
    parser.add_argument("--checkpoint", "--checkpoint_path", metavar="FILE", required=True, help="trained weights")
    parser.add_argument(
        "--config", metavar="FILE.toml", help="the network's configuration, where the weights hold none"
    )
    parser.add_argument("--input", metavar="FILE", required=True, help="the frames to continue")
    parser.add_argument(
        "--forcing_data", metavar="FILE", help="fields with the forcings of the frames to forecast, where they change"
    )
    parser.add_argument("--last", type=int, metavar="N", help="use the last N frames alone (default: all)")
    parser.add_argument(
        "--horizon", type=int, metavar="N", help="frames to forecast (default: as many as in the training)"
    )
    parser.add_argument(
        "--own_size", action="store_true", help="forecast at the size of the input; default: at that of the training"
    )
    parser.add_argument(
        "--output",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="files to write, see above "
        "(default: <input>_forecast.nc for gridded fields, else .npz, beside the weights)",
    )
    parser.add_argument("--colours", default="auto", metavar="NAME", help=COLOURS)
    parser.add_argument("--fps", type=int, default=5, metavar="N", help="frames per second of a film (default: 5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, xpu (default: auto)")
    parser.add_argument("--scan", default="auto", help="scan back end (default: auto)")
    add_options(parser, only=READING)
    return parser
