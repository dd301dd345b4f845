"""Forecast a stream: frames go in one by one, and at any time any number of the next ones come out.

    import vmrnn

    forecaster = vmrnn.Forecaster("exps/x/best.safetensors")
    for frame in stream:                    # numpy (H, W) or (H, W, C), in the units of the data
        forecaster.observe(frame)
        coming = forecaster.forecast(10)    # the 10 frames after it, (10, H, W) or (10, H, W, C)

The network's states are all that is kept of the past: memory does not grow with the stream.
"""

import numpy as np
import torch

from vmrnn import config as configuration
from vmrnn.checkpoint import load_weights, read_checkpoint, weights_of
from vmrnn.data.table import DATASETS
from vmrnn.errors import UserError
from vmrnn.graphs import GraphedForward
from vmrnn.network import build_model
from vmrnn.rollout import pad_frames
from vmrnn.runtime import pick_device
from vmrnn.values import ValueRange

UNIT_RANGE, BYTE_RANGE = (0.0, 1.0), (0.0, 255.0)
ROUNDING = 1e-3  # how far outside [0, 1] a value may be


class Forecaster:
    """A trained network and what it has seen of one stream of frames.

    checkpoint  a file of weights; ours hold their configuration
    config      a TOML file over that configuration; a published file needs one, such as configs/moving_mnist_d.toml
    device      auto, cpu, cuda, cuda:1, mps
    scan        scan back end, see vmrnn.scan
    cuda_graph  on a CUDA GPU: record a frame's kernels once and replay them; worth it for a stream, since launching
                them one by one takes longer than they do

    Frames are in the units of the data: the data range of the configuration becomes [0, 1] and back. Without one,
    uint8 is 0 to 255, and all other types must be in [0, 1] already. NaN, and the configuration's missing values, are
    missing pixels, which the network sees as 0. Any height and width will do, but the same in every frame: what the
    patches do not divide is padded with the last row and column, and cut off again.
    UserError: a file that is missing, damaged or does not fit, no configuration, a device that is not there, a graph on
    another device than a CUDA GPU.
    """

    def __init__(self, checkpoint, config=None, device="auto", scan="auto", cuda_graph=False):
        content = read_checkpoint(checkpoint)
        if content["config"] is None and config is None:
            raise UserError(f"{checkpoint}: holds weights alone; name the network's configuration with config")
        self.config = configuration.resolve(config, {"scan": scan}, base=content["config"])
        self.device = pick_device(device)
        self.model = build_model(**self.config.network_options)
        load_weights(self.model, weights_of(content), checkpoint)
        self.model.to(self.device).eval()
        if cuda_graph and self.device.type != "cuda":
            raise UserError(f"cuda_graph is for a CUDA GPU, and the device is {self.device}: leave it out")
        self._advance = GraphedForward(self.model) if cuda_graph else self.model
        self.data_range = self.config.data_range or DATASETS[self.config.dataset].data_range
        self.reset()

    def reset(self):
        """Forgets every frame, for another stream."""
        self.shape = None  # of the stream's frames, as given
        self.observed_range = None  # (low, high): the values that are 0 and 1 to the network
        self._coming = self._states = None  # the frame after the last that was observed

    @torch.inference_mode()
    def observe(self, frame):
        """Takes the next frame: an array (H, W) or (H, W, C) of any real type, in the units of the data.

        UserError: another shape than the frames before, another number of channels than the network's, or, where the
        network knows no data range, values outside [0, 1] that are not uint8.
        """
        frame = np.asarray(frame)
        channels = frame.shape[2] if frame.ndim == 3 else 1
        if frame.ndim not in (2, 3) or channels != self.model.in_chans:
            raise UserError(f"a frame of shape {frame.shape}: the network takes (H, W, {self.model.in_chans})")
        if self.shape not in (None, frame.shape):
            raise UserError(
                f"a frame of shape {frame.shape} after frames of {self.shape}: reset() starts another stream"
            )
        value_range = self.data_range or (BYTE_RANGE if frame.dtype == np.uint8 else UNIT_RANGE)
        if self.observed_range not in (None, value_range):
            raise UserError(f"a frame of {frame.dtype} after others: uint8 and other types have different ranges here")
        if value_range is UNIT_RANGE and ((frame < -ROUNDING) | (frame > 1 + ROUNDING)).any():
            raise UserError(
                f"a frame of {frame.dtype} with values from {np.nanmin(frame):g} to {np.nanmax(frame):g}: the network "
                "knows no data range of its own; give uint8 (0 to 255), or values in [0, 1]"
            )
        self.shape, self.observed_range = frame.shape, value_range
        values = ValueRange(*self.observed_range, tuple(self.config.missing_value)).to_unit(frame)
        values = torch.from_numpy(values).view(*frame.shape[:2], channels).permute(2, 0, 1)[None]
        values = torch.where(values.isnan(), 0, values).to(self.device)
        values = pad_frames(values, self.model.stride)
        self._coming, self._states = self._advance(values, self._states)

    @torch.inference_mode()
    def forecast(self, horizon):
        """The next `horizon` frames, float32 (horizon, H, W) or (horizon, H, W, C) as the frames are observed, in
        their units. What has been observed stays as it is. UserError: before the first frame, or horizon below 1."""
        if self._coming is None:
            raise UserError("forecast() before observe(): there is nothing to go on from")
        if horizon < 1:
            raise UserError(f"a forecast of {horizon} frames: ask for 1 or more")
        frames, states = [self._coming], self._states
        for _ in range(horizon - 1):
            frame, states = self._advance(frames[-1], states)
            frames.append(frame)
        height, width = self.shape[:2]
        found = torch.cat(frames)[..., :height, :width].permute(0, 2, 3, 1)
        low, high = self.observed_range
        return (found * (high - low) + low).cpu().numpy().reshape(horizon, *self.shape)
