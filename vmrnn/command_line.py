"""The arguments of the three programs. Nothing here imports torch, so a wrong option is refused in a moment."""

import argparse
import signal
import sys
from pathlib import Path

from vmrnn import config as configuration
from vmrnn.errors import UserError

# Options of how files are read, which predict.py takes too
READING = ("array_key", "array_axes", "variables", "time_from", "time_step", "forcings", "frame_step")

COLOURS = (
    "colours of pictures: grey, rain or a colour map of matplotlib (default: auto, which is rain or viridis for fields, "
    "and grey for all else)"
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
    parser = configuration.Parser(description)
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file")
    parser.add_argument(
        "--init_from", "--checkpoint", "--checkpoint_path", metavar="FILE", help="weights to start a new run from"
    )
    parser.add_argument("--resume", metavar="auto|FILE", help="continue from last.pt of the run folder, or from FILE")
    configuration.add_options(parser)
    return parser


def test_parser(description):
    """The arguments of test.py."""
    parser = configuration.Parser(description)
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
    configuration.add_options(parser)
    return parser


def predict_parser(description):
    """The arguments of predict.py."""
    parser = configuration.Parser(description)
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
        help="files to write, see above (default: <input>_forecast.nc for gridded fields, else .npz, beside the weights)",
    )
    parser.add_argument("--colours", default="auto", metavar="NAME", help=COLOURS)
    parser.add_argument("--fps", type=int, default=5, metavar="N", help="frames per second of a film (default: 5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--scan", default="auto", help="scan back end (default: auto)")
    configuration.add_options(parser, only=READING)
    return parser
