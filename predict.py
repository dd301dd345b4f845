"""Forecast the frames that follow those of a file. No labels are needed.

    python predict.py --checkpoint exps/x/best.safetensors --input clip.avi --horizon 10
    python predict.py --checkpoint exps/x/best.safetensors --input frames/ --horizon 20 --output next.npz next.gif next.mp4
    python predict.py --checkpoint trained_model_state_dict --config configs/moving_mnist_d.toml --input x.npy --horizon 10
                                                                        a published file plus its configuration
--input is a video, a folder of images, a .npy or a .npz (T, H, W[, C]). Every frame is observed, in order, at its own
size. A .npz output holds `forecast`, (N, H, W) or (N, H, W, C), in the units and the type of the input; whole numbers are
rounded. .gif and .mp4 show the same frames: low of the data range is black, high is white.
"""

import logging
from pathlib import Path

import numpy as np

from vmrnn import config as configuration
from vmrnn.data.media import read_frames
from vmrnn.errors import UserError
from vmrnn.files import replacing
from vmrnn.forecaster import Forecaster
from vmrnn.pictures import save_video
from vmrnn.runtime import describe_device, run_program

log = logging.getLogger("vmrnn")

OUTPUTS = (".npz", ".gif", ".mp4")
GREY = np.array([0.299, 0.587, 0.114])  # weights of red, green, blue (ITU-R 601), as video decoders use them


def parse_arguments(argv=None):
    parser = configuration.Parser(__doc__)
    parser.add_argument("--checkpoint", "--checkpoint_path", metavar="FILE", required=True, help="trained weights")
    parser.add_argument(
        "--config", metavar="FILE.toml", help="the network's configuration, where the weights hold none"
    )
    parser.add_argument("--input", metavar="FILE", required=True, help="the frames to continue")
    parser.add_argument("--array_key", metavar="NAME", default="", help="the array of a .npz that holds several")
    parser.add_argument("--horizon", type=int, metavar="N", required=True, help="frames to forecast")
    parser.add_argument(
        "--output",
        nargs="+",
        type=Path,
        metavar="FILE",
        help=f"{', '.join(OUTPUTS)} (default: <input>_forecast.npz here)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--scan", default="auto", help="scan back end (default: auto)")
    args = parser.parse_args(argv)
    args.output = args.output or [Path(f"{Path(args.input).resolve().stem}_forecast.npz")]
    for path in args.output:
        if path.suffix.lower() not in OUTPUTS:
            raise UserError(f"--output {path}: its name must end as one of {' '.join(OUTPUTS)}")
        if path.resolve() == Path(args.input).resolve():
            raise UserError(f"--output {path}: is the input; name another file")
    if args.horizon < 1:
        raise UserError(f"--horizon {args.horizon}: must be at least 1")
    return args


def in_channels(frame, channels):
    """A frame (H, W, C) as the network takes it: colours become grey if the network takes one channel."""
    if frame.shape[-1] == 3 and channels == 1:
        return as_type(frame @ GREY, frame.dtype)[..., None]
    return frame


def as_type(values, dtype):
    """Values as another type of numbers. For whole numbers they are rounded, and clipped to what the type holds."""
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return np.rint(values).clip(limits.min, limits.max).astype(dtype)
    if np.issubdtype(dtype, np.bool_):
        return values >= 0.5
    return values.astype(dtype)


def save(path, forecast, value_range, dtype):
    """Write a forecast as the ending of `path` says.

    forecast      (N, H, W, C) on the network's scale [0, 1]
    value_range   ValueRange, the way to the units of the input
    dtype         the input's, of the numbers in a .npz
    """
    with replacing(path) as temporary:
        if path.suffix.lower() == ".npz":
            frames = forecast[..., 0] if forecast.shape[-1] == 1 else forecast
            with open(temporary, "wb") as f:  # np.savez would add .npz to another name
                np.savez_compressed(f, forecast=as_type(value_range.to_data(frames), dtype))
        else:
            save_video(temporary, forecast.transpose(0, 3, 1, 2), path.suffix.lower())


def main(argv=None):
    args = parse_arguments(argv)
    forecaster = Forecaster(args.checkpoint, args.config, args.device, args.scan)
    log.info("device     %s", describe_device(forecaster.device))
    frames = read_frames(args.input, args.array_key)
    trained = forecaster.config.frame_size
    log.info("input      %d frames of %dx%d, %s", *frames.shape[:3], frames.dtype)
    if frames.shape[1:3] != trained:
        log.info("note       the network was trained on frames of %dx%d", *trained)
    for path in args.output:
        path.parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made fails before the work
    for frame in frames:
        forecaster.observe(in_channels(frame, forecaster.model.in_chans))
    forecast = forecaster.forecast_in_unit(args.horizon)
    for path in args.output:
        save(path, forecast, forecaster.observed_range, frames.dtype)
        log.info("forecast   %d frames in %s", args.horizon, path)


if __name__ == "__main__":
    run_program(main)
