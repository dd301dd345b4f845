"""How stored frames become frames of the network, and its forecasts become frames of the input's size again.

Training, test, Forecaster and predict.py go through this file, so that the network sees the same in use as in training.
"""

from dataclasses import dataclass

import numpy as np
import torch

from vmrnn.data.table import DATASETS
from vmrnn.errors import UserError
from vmrnn.values import ValueRange

GREY = np.array([0.299, 0.587, 0.114])  # of red, green, blue: ITU-R 601, as video decoders and image libraries have it


@dataclass(frozen=True)
class Preparation:
    """What happens to a frame between the file and the network.

    channels      channels of the network's frames, without those of the calendar
    value_range   ValueRange of the training data
    size          (H, W) of the network's frames; None: frames keep their size
    as_stored     True: frames are resized as they are stored, and whole numbers are rounded, as in the cache of decoded
                  pictures; False: the values in [0, 1] are resized
    antialias     whether resizing smooths what it shrinks
    """

    channels: int
    value_range: ValueRange
    size: tuple | None
    as_stored: bool = False
    antialias: bool = True

    @classmethod
    def of(cls, config, value_range, own_size=False):
        """The preparation of a network's training.

        config        Config of the training
        value_range   ValueRange of its data
        own_size      True: frames keep their size

        A network that was trained on crops has seen pixels at their own scale, so frames keep their size then as well.
        """
        spec = DATASETS[config.dataset]
        size = None if own_size or config.frame_fit == "crop" else config.frame_size
        as_stored = spec.pictures and stored_size(config) is not None
        channels = config.input_channels + len(config.forcings)
        return cls(channels, value_range, size, as_stored, spec.antialias)

    def __call__(self, frame):
        """One frame as the network takes it.

        frame   (H, W) or (H, W, C): array, masked array or tensor of real numbers, in the units of the data

        Returns a float32 tensor (C, h, w); a missing pixel is NaN. UserError: no such frame.
        """
        frame = as_channels(as_frame(frame), self.channels)
        if self.size and self.as_stored:
            frame = resized(frame, self.size, self.antialias)
        return self.unit(frame[None])[0]

    def unit(self, frames):
        """Stored frames (T, H, W, C) as a float32 tensor (T, C, h, w) on the scale of the network."""
        values = self.value_range.to_unit(frames).transpose(0, 3, 1, 2)
        values = torch.from_numpy(np.ascontiguousarray(values))
        return resize(values, self.size, self.antialias) if self.size else values

    def restore(self, frames, size):
        """Forecasts on the scale of the network at the size of the input.

        frames   tensor (N, C, h, w)
        size     (H, W) of the input

        Returns a float32 array (N, H, W, C).
        """
        return resize(frames.detach().float().cpu(), size).permute(0, 2, 3, 1).contiguous().numpy()


def stored_size(config):
    """(H, W) to which pictures are resized when they are decoded into the cache; None: they keep their size.

    Frames are not resized in the cache if they are cropped later, or if they have missing pixels, which resizing would
    spread.
    """
    return config.frame_size if config.frame_fit == "resize" and not config.missing_value else None


def as_frame(frame):
    """A frame from anywhere as a plain array of real numbers (H, W, C). Masked pixels become NaN.

    UserError: another shape, or values that are no real numbers.
    """
    if isinstance(frame, torch.Tensor):
        frame = frame.detach().cpu()
        frame = (frame.float() if frame.dtype == torch.bfloat16 else frame).numpy()
    if not isinstance(frame, np.ndarray):
        try:
            frame = np.asarray(frame)
        except ValueError as error:
            raise UserError("a frame with rows of different lengths: give an array (H, W) or (H, W, C)") from error
    if frame.dtype.kind not in "buif" or frame.dtype.itemsize > 8:
        kind = "a table with named columns" if frame.dtype.names else str(frame.dtype)
        raise UserError(f"a frame of {kind}: give real numbers (integers, or floats of 16, 32 or 64 bits)")
    if frame.ndim not in (2, 3) or frame.size == 0:
        raise UserError(f"a frame of shape {frame.shape}: give (H, W) or (H, W, C)")
    if isinstance(frame, np.ma.MaskedArray):
        frame = unmasked(frame)
    return frame[..., None] if frame.ndim == 2 else frame


def unmasked(array):
    """A masked array as a plain one; masked values become NaN, so that whole numbers become floats if there are any."""
    if not np.ma.is_masked(array):
        return array.data
    return array.astype(np.result_type(array.dtype, np.float32)).filled(np.nan)


def as_channels(frame, channels):
    """A frame (H, W, C) with `channels` channels: colours become grey, and grey becomes colours.

    UserError: any other change of channels.
    """
    if frame.shape[-1] == channels:
        return frame
    if (frame.shape[-1], channels) == (3, 1):
        return as_type(frame @ GREY, frame.dtype)[..., None]
    if (frame.shape[-1], channels) == (1, 3):
        return np.repeat(frame, 3, axis=-1)
    raise UserError(f"a frame of shape {frame.shape}: the network takes (H, W, {channels})")


def as_type(values, dtype):
    """Values as another type of numbers. For whole numbers they are rounded, and clipped to what the type holds."""
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return np.rint(values).clip(limits.min, limits.max).astype(dtype)
    if np.issubdtype(dtype, np.bool_):
        return values >= 0.5
    return values.astype(dtype)


def resized(frame, size, antialias=True):
    """A frame (H, W, C) at another size, in its own type; whole numbers are rounded. size None: as it is."""
    if size is None or frame.shape[:2] == tuple(size):
        return frame
    values = resize(frame.astype(np.float32).transpose(2, 0, 1)[None], size, antialias)[0].numpy().transpose(1, 2, 0)
    return as_type(values, frame.dtype)


def resize(frames, size, antialias=True):
    """Frames (T, C, H, W) as float32 (T, C, *size): bilinear, antialiased where it shrinks and that is asked for."""
    if isinstance(frames, np.ndarray):  # torch shares memory only with arrays that may be written
        frames = torch.from_numpy(np.require(frames, np.float32, ["C", "W"]))
    frames = frames.float()
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    return torch.nn.functional.interpolate(
        frames, tuple(size), mode="bilinear", antialias=antialias, align_corners=False
    )
