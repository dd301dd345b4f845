"""Forecast the frames that follow those of a file. No labels are needed.

    python predict.py --checkpoint exps/x/best.safetensors --input clip.avi
    python predict.py --checkpoint exps/x/best.safetensors --input radar.nc --horizon 12 --output next.nc next.mp4
    python predict.py --checkpoint exps/x/best.safetensors --input frames/ --horizon 20 --last 10 --output next.npz
    python predict.py --checkpoint trained_model_state_dict --config configs/moving_mnist_d.toml --input x.npy
                                                                        a published file plus its configuration
--input is a video, a folder of images, a .npy or .npz, (T, H, W[, C]) or (N, T, H, W[, C]), or a gridded field (NetCDF,
HDF5, Zarr, GRIB, GeoTIFF, TIFF). Frames are read one at a time and prepared as in training: a frame of another size
than the network's is resized, and the forecast is resized back. Every one of N sequences gets a forecast of its own.
Where the times of the frames have gaps, only the frames after the last gap are used.

--output, by its ending: .nc and .zarr hold a field with the names, units and coordinates of the input, whose time
continues; .npy and .npz an array in the units and the type of the input, whole numbers rounded; .gif and .mp4 a film of
the last given frames and the forecast; .png one picture per frame.
"""

from vmrnn import command_line

if __name__ == "__main__":
    # Before the imports that take seconds
    command_line.answer(command_line.predict_parser(__doc__))

import itertools
import logging
from collections import deque
from contextlib import nullcontext
from dataclasses import replace

import numpy as np

from dataset import ONLY_FOR
from vmrnn.checkpoint import find_checkpoint
from vmrnn.data.inputs import coming_forcings, open_input
from vmrnn.data.table import OWN
from vmrnn.data.times import step_notes
from vmrnn.errors import UserError
from vmrnn.files import without_pattern
from vmrnn.forecast_files import FILMS, Forecast, check_output
from vmrnn.forecaster import Forecaster
from vmrnn.progress import Bar, still_running
from vmrnn.runtime import describe_device, run_program

log = logging.getLogger("vmrnn")


def parse_arguments(argv=None):
    """The arguments of this program. UserError: a number below 1, or a file that no forecast can be written to."""
    parser = command_line.predict_parser(__doc__)
    args = parser.parse_args(argv)
    for name in ("horizon", "last", "fps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    for path in args.output or ():
        check_output(path, args.input)
    return args


def default_output(args, source):
    """The file to write if --output names none: beside the weights, named after the input.

    args     arguments of this program
    source   Input
    """
    name = f"{without_pattern(args.input).stem}_forecast{'.nc' if source.info else '.npz'}"
    return find_checkpoint(args.checkpoint).parent / name


def check_reading_options(given, source, path):
    """UserError: an option on how the input is read that does not apply to it.

    given    names of the options on the command line
    source   Input
    path     of the input
    """
    for option in given:
        data_sets = [name for name in ONLY_FOR.get(option, OWN) if name in OWN]
        if source.dataset not in data_sets:
            raise UserError(
                f"--{option}: is for {', '.join(data_sets)}, but {path} is read as {source.dataset}; leave it out"
            )


def frames_to_do(sequences, config, args):
    """How many frames are observed and forecast in all; None: only reading the input tells."""
    if any(sequence.count is None for sequence in sequences):
        return None
    return sum(len(sequence.taken(config.frame_step, args.last)) + args.horizon for sequence in sequences)


def forecast_sequence(forecaster, sequence, source, config, args, bar):
    """Observe the frames of a sequence one at a time, and forecast.

    forecaster   Forecaster
    sequence     a Sequence of `source`
    source       Input
    config       Config of the network, with the options of how files are read
    args         arguments of this program
    bar          Bar that counts the frames of all sequences

    Returns (forecast, dtype, count, given):
    forecast   float32 (horizon, H, W, C) on the scale [0, 1], NaN where a pixel was missing in all frames
    dtype      type of the frames
    count      how many frames were observed
    given      for a film the last of them on the scale [0, 1], as many as the training was given; else None
    """
    # Observe the frames, with their dates if the network takes the calendar.
    forecaster.reset()
    dates = itertools.repeat(None)
    dated = sequence.times is not None and source.info.calendar
    if dated and config.calendar:
        dates = source.info.decoded_times(sequence.times[sequence.taken(config.frame_step, args.last)])
    films = any(path.suffix.lower() in FILMS for path in args.output)
    recent = deque(maxlen=config.num_frames_input if films else 0)
    for frame, date in zip(sequence.frames(config.frame_step, args.last), dates):
        # The first frame may wait for the compiler.
        with still_running("the first frame") if bar.done == 0 else nullcontext():
            forecaster.observe(frame, date)
        recent.append(frame)
        bar.update()
    if forecaster.count == 0:
        raise UserError("--input: holds no frames")

    # Forcings and dates of the frames to forecast
    later = dates = None
    if sequence.times is not None and config.forcing_channels and args.horizon > 1:
        later = source.info.next_times(sequence.times[sequence.taken(config.frame_step)], args.horizon)
        dates = source.info.decoded_times(later) if dated else None
    forcings = coming_forcings(source, config, frame, later, args.horizon - 1, args.forcing_data)

    with still_running(f"the forecast of {args.horizon} frames"):
        forecast = forecaster.forecast_in_unit(args.horizon, forcings, dates)
    bar.update(args.horizon)
    forecast[:, forecaster.never_seen] = np.nan
    given = np.stack([forecaster.in_unit(frame) for frame in recent]) if films else None
    return forecast, frame.dtype, forecaster.count, given


def main(argv=None):
    args = parse_arguments(argv)
    forecaster = Forecaster(args.checkpoint, args.config, args.device, args.scan, own_size=args.own_size)
    log.info("device     %s", describe_device(forecaster.device))
    args.horizon = args.horizon or forecaster.config.num_frames_output
    options = {key: value for key, value in vars(args).items() if key in command_line.READING}
    config = replace(forecaster.config, **options)
    source = open_input(args.input, config)
    check_reading_options(options, source, args.input)
    if source.info and forecaster.value_range:
        source.notes += source.info.notes(forecaster.value_range, config)
        forecaster.value_range = source.info.named(forecaster.value_range, config, args.input)
    if forecaster.value_range:
        apart = source.sequences[0].apart * config.frame_step
        source.notes += step_notes(apart, forecaster.value_range.step)
    for note in source.notes:
        log.info("input      %s", note)
    said = len(source.notes)
    args.output = args.output or [default_output(args, source)]
    for path in args.output:
        path.parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made fails before the work

    # Forecast every sequence. Only the forecasts are kept in memory.
    forecasts, given_frames, times = [], [], []
    with Bar("predict", frames_to_do(source.sequences, config, args), "frame") as bar:
        for number, sequence in enumerate(source.sequences):
            forecast, dtype, count, given = forecast_sequence(forecaster, sequence, source, config, args, bar)
            if number == 0:
                log.info("input      %d frames of %dx%d, %s", count, *forecast.shape[1:3], dtype)
                log_size(forecaster, forecast.shape[1:3])
            forecasts.append(forecast)
            given_frames.append(given)
            all_times = sequence.times
            times.append(None if all_times is None else all_times[sequence.taken(config.frame_step)])
    for note in source.notes[said:]:  # of the forcings
        log.info("input      %s", note)
    if source.many:
        log.info("input      %d sequences, each with a forecast of its own", len(forecasts))

    forecast = Forecast(
        np.stack(forecasts), forecaster.observed_range, dtype, source.many, source.info, times, config.frame_step,
        given_frames, config, args.colours,
    )  # fmt: skip
    for path in args.output:
        first, *others = forecast.save(path, args.fps)
        log.info("forecast   %d frames in %s%s", args.horizon, first, f" to {others[-1].name}" if others else "")


def log_size(forecaster, size):
    """Say at which size the network works, if it is not that of the input."""
    trained, used = forecaster.config.frame_size, forecaster.prepare.size
    if used and used != size:
        log.info(
            "size       resized to the %dx%d of the training, and the forecast back; --own_size keeps the input's",
            *used,
        )
    elif size != trained:
        log.info("size       the network was trained on frames of %dx%d", *trained)


if __name__ == "__main__":
    run_program(main)
