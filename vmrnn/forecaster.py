"""Forecast a stream: frames go in one by one, and at any time any number of the next ones come out.

    import vmrnn

    forecaster = vmrnn.Forecaster("exps/x/best.safetensors")
    for frame in stream:                    # numpy (H, W) or (H, W, C), in the units of the data
        forecaster.observe(frame)
        coming = forecaster.forecast(10)    # the 10 frames after it, (10, H, W) or (10, H, W, C)

Only the network's states, and the motion if it is the base, are kept of the past, so memory does not grow
with the stream.
"""

import logging
from copy import copy
from dataclasses import replace

import numpy as np
import torch

from vmrnn.checkpoint import load_network
from vmrnn.data.prepare import Preparation, as_channels, as_frame
from vmrnn.data.ranges import SMALL
from vmrnn.data.table import DATASETS
from vmrnn.data.times import calendar_features
from vmrnn.errors import UserError
from vmrnn.graphs import GraphedForward
from vmrnn.motion import Motion
from vmrnn.rollout import network_input
from vmrnn.values import ROUNDING, ValueRange, outside

UNIT_RANGE, BYTE_RANGE = (0.0, 1.0), (0.0, 255.0)

log = logging.getLogger("vmrnn")


class Forecaster:
    """A trained network and its states after the frames of one stream.

    checkpoint   a file of weights; ours hold their configuration
    config       TOML file whose options replace those of the file; a published file needs one, such as
                 configs/moving_mnist_d.toml
    device       auto, cpu, cuda, cuda:1 or mps
    scan         scan back end, see vmrnn.scan
    cuda_graph   record the kernels of a frame once and replay them. CUDA GPUs only. It pays for streams, where
                 launching the kernels one by one takes longer than running them
    own_size     True: frames keep their size. False: frames of another size than those of the training are resized as
                 the training did, and forecasts are resized back. A network that was trained on crops keeps the size of
                 its frames either way

    Frames are given and returned in the units of the data: `value_range` maps them to the network's [0, 1] and back.
    If the file knows no range, uint8 means 0 to 255, and all other types must be in [0, 1] already. NaN, masked pixels
    and the missing values of the range are missing pixels. The network sees 0 in their place. Colours become grey for a
    network of one channel. All frames of a stream must have the same height and width.
    UserError: a file that is missing, damaged or does not fit, no configuration, a device that does not exist,
    cuda_graph without a CUDA GPU.
    """

    def __init__(self, checkpoint, config=None, device="auto", scan="auto", cuda_graph=False, own_size=False):
        trained = load_network(checkpoint, config, device, scan=scan)
        self.model, self.config, self.value_range = trained.model, trained.config, trained.value_range
        if not DATASETS[self.config.dataset].own and self.value_range == ValueRange():
            self.value_range = None  # generated in [0, 1]: users have such frames as bytes or as fractions
        self.prepare = Preparation.of(self.config, self.value_range, own_size)
        self.device = next(self.model.parameters()).device
        if cuda_graph and self.device.type != "cuda":
            raise UserError(f"cuda_graph is for a CUDA GPU, and the device is {self.device}: leave it out")
        self._advance = GraphedForward(self.model) if cuda_graph else self.model
        self.reset()

    def __repr__(self):
        size = "any size" if self.shape is None else "x".join(map(str, self.shape))
        return f"<Forecaster: {self.config.model} on {self.device}, frames of {size}, {self.count} observed>"

    def reset(self):
        """Forget every frame, to begin another stream."""
        self.shape = None  # of the stream's frames, as given
        self.observed_range = None  # ValueRange of the stream's frames
        self.never_seen = None  # bool (H, W): pixels that were missing in every frame, in every channel
        self.count = 0  # frames of the stream
        self._warned = False  # whether values were reported that may be in other units
        self._ends = None  # lowest and highest value of each channel on the linear scale, a tensor (2, C)
        self._size = None  # (h, w) of the prepared frames
        self._next_frame = None  # the forecast of the frame after the last observed one
        self._states = None  # the network's states after the last observed frame
        self._motion = Motion(self.value_range or ValueRange())  # of the last frames, for a network whose base it is

    @torch.inference_mode()
    def observe(self, frame, date=None):
        """Take the next frame of the stream.

        frame   array, masked array or tensor (H, W) or (H, W, C) of any real type, in the units of the data; the
                forcings of the network are its last channels
        date    numpy.datetime64 or cftime date of the frame (UTC), for a network that was trained with --calendar

        A frame that is refused changes nothing. Values outside the range that the network was trained on are reported
        once per stream. A stream whose values span less than 2 % of it is reported with its first forecast.

        UserError: no frame of real numbers, another shape than the frames before, another number of channels than the
        network's, or, if the file knows no range, values outside [0, 1] that are not uint8.
        """
        given = tuple(np.shape(frame))
        values = as_frame(frame)
        if self.shape not in (None, given):
            raise UserError(f"a frame of shape {given} after frames of {self.shape}: reset() starts another stream")
        value_range = self.range_of(values)
        if self.observed_range not in (None, value_range):
            raise UserError(f"a frame of {values.dtype} after others: uint8 and other types have different ranges here")
        unit = replace(self.prepare, value_range=value_range)(values)
        self._report_outside(unit, value_range)
        ends = self._ends_with(unit, value_range)
        missing = value_range.is_missing(values[..., : self.model.out_chans]).all(axis=-1)
        if self.config.calendar:
            unit = torch.cat((unit, self._waves([date], 1, unit.shape[-2:])[0]))
        motion = self._motion
        if self.config.base_channels:
            motion = copy(self._motion)
            motion.observe(unit[: self.model.out_chans].numpy())
            unit = torch.cat((unit, torch.from_numpy(motion.forecast(1)[0])))
        advanced = self._advance(network_input(unit[None].to(self.device), self.model.stride), self._states)

        self._motion = motion
        self._next_frame, self._states = advanced
        self._ends = ends
        self.shape, self.observed_range, self._size = given, value_range, tuple(unit.shape[-2:])
        self.never_seen = missing if self.never_seen is None else self.never_seen & missing
        self.count += 1

    def in_unit(self, frame):
        """What the network forecasts of a frame, at the frame's own size: float32 (H, W, C) on the scale [0, 1]."""
        frame = as_channels(as_frame(frame), self.prepare.channels)[..., : self.model.out_chans]
        return replace(self.range_of(frame), given=None).to_unit(frame)

    def range_of(self, frame):
        """The ValueRange of a frame: the file's or, if the file knows none, the one of the frame's type."""
        if self.value_range:
            return self.value_range
        missing = tuple(self.config.missing_value)
        if frame.dtype == np.uint8:
            return ValueRange(*BYTE_RANGE, missing)
        value_range = ValueRange(*UNIT_RANGE, missing)
        known = frame[~value_range.is_missing(frame)]
        if ((known < -ROUNDING) | (known > 1 + ROUNDING)).any():
            raise UserError(
                f"a frame of {frame.dtype} with values from {known.min():g} to {known.max():g}: the network "
                "knows no data range of its own; give uint8 (0 to 255), or values in [0, 1]"
            )
        return value_range

    def _report_outside(self, unit, value_range):
        """Warn once of values far outside the training range: a fill value that is not named, or data in other units.

        unit          tensor of a prepared frame, on the network's scale
        value_range   ValueRange of the frame
        """
        beyond, far = outside(unit)
        if self._warned or not (far.any() or beyond.sum() > 0.5 * unit.isfinite().sum()):
            return
        self._warned = True
        known = unit[~unit.isnan()]
        worst = known[known.abs().argmax()]
        log.warning(
            "frame %d: %d of its %d values lie outside the range of the training (%s), %d of them far outside "
            "(the farthest is %.4g on the scale from 0 to 1); name a fill value with missing_value, or check the units",
            self.count, int(beyond.sum()), unit.numel(), value_range, int(far.sum()), worst,
        )  # fmt: skip

    def _ends_with(self, unit, value_range):
        """`_ends` of the stream and one more prepared frame; parameters as in `_report_outside`."""
        count = self.model.out_chans
        values = torch.cat((value_range.to_linear(unit[:count], axis=0), unit[count:])).flatten(1)
        ends = torch.stack((values.nan_to_num(torch.inf).amin(1), values.nan_to_num(-torch.inf).amax(1)))
        if self._ends is None:
            return ends
        return torch.stack((ends[0].minimum(self._ends[0]), ends[1].maximum(self._ends[1])))

    def _report_small(self):
        """Warn once of values that span next to nothing of the training range, as ranges.outside_notes does of a test.

        The frames of a stream count together: one that is dry everywhere says nothing of the units.
        """
        for channel, share in enumerate((self._ends[1] - self._ends[0]).tolist()):
            if not self._warned and 0 < share < SMALL:
                self._warned = True
                log.warning(
                    "%d frames: the values%s span only %.2g %% of the range of the training (%s): check the units",
                    self.count, f" of channel {channel}" if len(self._ends[0]) > 1 else "", 100 * share,
                    self.observed_range,
                )  # fmt: skip

    def forecast(self, horizon, forcings=None, dates=None):
        """Forecast the next frames. What has been observed stays as it is.

        horizon    number of frames, at least 1
        forcings   (horizon - 1 or more, H, W, F) of the frames to forecast, in the units of the data; the last frame
                   needs none. None: the network has no forcings
        dates      of the frames to forecast, for a network that was trained with --calendar

        Returns float32 (horizon, H, W) if the frames were given so, else (horizon, H, W, C), in the units of the data.
        UserError: before the first frame, a horizon below 1, forcings that are missing, or a forecast that
        is not finite.
        """
        unit = self.forecast_in_unit(horizon, forcings, dates)
        frames = self.observed_range.to_data(unit)
        return frames[..., 0] if len(self.shape) == 2 else frames

    @torch.inference_mode()
    def forecast_in_unit(self, horizon, forcings=None, dates=None):
        """`forecast` on the network's scale [0, 1], always (horizon, H, W, C)."""
        if self._next_frame is None:
            raise UserError("forecast() before observe(): there is nothing to continue")
        if horizon < 1:
            raise UserError(f"a forecast of {horizon} frames: ask for 1 or more")
        self._report_small()
        given = self._given_channels(horizon - 1, forcings, dates)
        frames, states = [self._next_frame], self._states
        for t in range(horizon - 1):
            frame = frames[-1] if given is None else torch.cat((frames[-1], given[t : t + 1]), dim=1)
            frame, states = self._advance(frame, states)
            frames.append(frame)
        height, width = self._size
        forecast = torch.cat(frames)[..., :height, :width]
        if not forecast.isfinite().all():
            raise UserError(
                f"the forecast is not finite after {self.count} frames: their values are too far outside the range of "
                f"the training ({self.observed_range})"
            )
        return self.prepare.restore(forecast, self.shape[:2])

    def _given_channels(self, count, forcings, dates):
        """Forcings, calendar and base of the first frames of a forecast, (count, F, h, w); None: there are none.

        count      frames that the network feeds on
        forcings   as in `forecast`
        dates      as in `forecast`

        UserError: the network has forcings or a calendar, and they are not given for all frames.
        """
        names = self.config.forcings
        if self.config.forcing_channels + self.config.base_channels == 0 or count == 0:
            return None
        parts = []
        if names:
            if forcings is None or len(forcings) < count or forcings.shape[1:] != (*self.shape[:2], len(names)):
                raise UserError(
                    f"the network needs its forcings ({', '.join(names)}) for {count} frames of the forecast"
                )
            prepare = replace(self.prepare, channels=len(names), value_range=self.observed_range.given)
            parts.append(prepare.unit(np.asarray(forcings[:count])))
        if self.config.calendar:
            parts.append(self._waves(dates, count, self._size))
        if self.config.base_channels:
            parts.append(torch.from_numpy(self._motion.forecast(count + 1)[1:]))
        return network_input(torch.cat(parts, dim=1).to(self.device), self.model.stride)

    def _waves(self, dates, count, size):
        """The channels of the calendar for `count` frames, (count, 4, h, w). UserError: there are no such dates."""
        if dates is None or len(dates) < count or any(date is None for date in dates):
            raise UserError("the network was trained with --calendar and needs the date of every frame")
        return torch.from_numpy(calendar_features(np.asarray(dates[:count])))[:, :, None, None].expand(-1, -1, *size)
