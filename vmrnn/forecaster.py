"""Forecast a stream: frames go in one by one, and at any time any number of the next ones come out.

    import vmrnn

    forecaster = vmrnn.Forecaster("exps/x/best.safetensors")
    for frame in stream:                    # numpy (H, W) or (H, W, C), in the units of the data
        forecaster.observe(frame)
        coming = forecaster.forecast(10)    # the 10 frames after it, (10, H, W) or (10, H, W, C)

Only the network's states are kept of the past, so memory does not grow with the stream.
"""

import numpy as np
import torch

from vmrnn.checkpoint import load_network
from vmrnn.data.table import DATASETS
from vmrnn.errors import UserError
from vmrnn.graphs import GraphedForward
from vmrnn.rollout import network_input
from vmrnn.values import ValueRange

UNIT_RANGE, BYTE_RANGE = (0.0, 1.0), (0.0, 255.0)
ROUNDING = 1e-3  # how far outside [0, 1] a value may lie


class Forecaster:
    """A trained network and its states after the frames of one stream.

    checkpoint   a file of weights; ours hold their configuration
    config       TOML file whose options replace those of the file; a published file needs one, such as
                 configs/moving_mnist_d.toml
    device       auto, cpu, cuda, cuda:1 or mps
    scan         scan back end, see vmrnn.scan
    cuda_graph   record the kernels of a frame once and replay them. CUDA GPUs only. It pays for streams, where launching
                 the kernels one by one takes longer than running them

    Frames are given and returned in the units of the data: `value_range` maps them to the network's [0, 1] and back.
    If the file knows no range, uint8 means 0 to 255, and all other types must be in [0, 1] already. NaN and the missing
    values of the range are missing pixels. The network sees 0 in their place. Any height and width will do, but every
    frame of a stream must have the same. Sides that the network cannot take are padded, and the forecast is cropped.
    UserError: a file that is missing, damaged or does not fit, no configuration, a device that does not exist,
    cuda_graph without a CUDA GPU.
    """

    def __init__(self, checkpoint, config=None, device="auto", scan="auto", cuda_graph=False):
        trained = load_network(checkpoint, config, device, scan=scan)
        self.model, self.config, self.value_range = trained.model, trained.config, trained.value_range
        if not DATASETS[self.config.dataset].own and self.value_range == ValueRange():
            self.value_range = None  # generated in [0, 1]: users have such frames as bytes or as fractions
        self.device = next(self.model.parameters()).device
        if cuda_graph and self.device.type != "cuda":
            raise UserError(f"cuda_graph is for a CUDA GPU, and the device is {self.device}: leave it out")
        self._advance = GraphedForward(self.model) if cuda_graph else self.model
        self.reset()

    def reset(self):
        """Forget every frame, to begin another stream."""
        self.shape = None  # of the stream's frames, as given
        self.observed_range = None  # ValueRange of the stream's frames
        self._coming = self._states = None  # the frame after the last observed one, and the states that go with it

    @torch.inference_mode()
    def observe(self, frame):
        """Take the next frame of the stream.

        frame   array (H, W) or (H, W, C) of any real type, in the units of the data

        UserError: another shape than the frames before, another number of channels than the network's, or, if the file
        knows no range, values outside [0, 1] that are not uint8.
        """
        frame = np.asarray(frame)
        channels = frame.shape[2] if frame.ndim == 3 else 1
        if frame.ndim not in (2, 3) or channels != self.model.in_chans:
            raise UserError(f"a frame of shape {frame.shape}: the network takes (H, W, {self.model.in_chans})")
        if self.shape not in (None, frame.shape):
            raise UserError(
                f"a frame of shape {frame.shape} after frames of {self.shape}: reset() starts another stream"
            )
        value_range = self.range_of(frame)
        if self.observed_range not in (None, value_range):
            raise UserError(f"a frame of {frame.dtype} after others: uint8 and other types have different ranges here")
        self.shape, self.observed_range = frame.shape, value_range
        values = torch.from_numpy(value_range.to_unit(frame)).view(*frame.shape[:2], channels).permute(2, 0, 1)
        values = network_input(values[None].to(self.device), self.model.stride)
        self._coming, self._states = self._advance(values, self._states)

    def range_of(self, frame):
        """The ValueRange of a frame: the file's or, if the file knows none, the one of the frame's type."""
        if self.value_range:
            return self.value_range
        missing = tuple(self.config.missing_value)
        if frame.dtype == np.uint8:
            return ValueRange(*BYTE_RANGE, missing)
        if ((frame < -ROUNDING) | (frame > 1 + ROUNDING)).any():
            raise UserError(
                f"a frame of {frame.dtype} with values from {np.nanmin(frame):g} to {np.nanmax(frame):g}: the network "
                "knows no data range of its own; give uint8 (0 to 255), or values in [0, 1]"
            )
        return ValueRange(*UNIT_RANGE, missing)

    def forecast(self, horizon):
        """Forecast the next frames. What has been observed stays as it is.

        horizon   number of frames, at least 1

        Returns float32 (horizon, H, W) or (horizon, H, W, C), as the frames were given, in their units.
        UserError: before the first frame, or a horizon below 1.
        """
        unit = self.forecast_in_unit(horizon)
        return self.observed_range.to_data(unit)

    @torch.inference_mode()
    def forecast_in_unit(self, horizon):
        """`forecast` on the network's scale [0, 1]."""
        if self._coming is None:
            raise UserError("forecast() before observe(): there is nothing to continue")
        if horizon < 1:
            raise UserError(f"a forecast of {horizon} frames: ask for 1 or more")
        frames, states = [self._coming], self._states
        for _ in range(horizon - 1):
            frame, states = self._advance(frames[-1], states)
            frames.append(frame)
        height, width = self.shape[:2]
        found = torch.cat(frames)[..., :height, :width].permute(0, 2, 3, 1)
        return found.cpu().numpy().reshape(horizon, *self.shape)
