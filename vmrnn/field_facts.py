"""What a test set of a gridded field knows beside its values: times, coordinates, latitudes, a climatology."""

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from vmrnn.data.grid_axes import unlike_place
from vmrnn.data.grid_info import GridInfo, label_notes
from vmrnn.data.inputs import open_input
from vmrnn.data.prepare import Preparation, resize
from vmrnn.data.times import lead_names, moment, usual_step, whole_months
from vmrnn.data.windows import crop_start
from vmrnn.errors import UserError
from vmrnn.pictures import counted_leads


@dataclass
class FieldFacts:
    """Facts of a test set.

    info     GridInfo; None: the data are no gridded field
    times    time of the last input frame of each sequence, float64 (N,); None: the frames have no dates
    valid    times of the frames to forecast, float64 (N, T); None: the frames have no dates
    step     seconds that frames are usually apart; None: the frames have no dates
    months   calendar months that frames are apart, whose seconds differ; 0: they are not whole months apart
    """

    info: GridInfo | None = None
    times: np.ndarray | None = None
    valid: np.ndarray | None = None
    step: float | None = None
    months: int = 0

    @classmethod
    def of(cls, test_set, config):
        """The facts of a test set from dataset.build_dataset.

        config   its Config
        """
        clips = getattr(test_set, "clips", None)
        info = GridInfo.load(Path(clips[0].path).parent) if clips and config.dataset == "grid" else None
        if info is None or info.times is None or not info.calendar:
            return cls(info)
        last = np.array([
            clips[clip].start + clips[clip].step * (first + config.num_frames_input - 1)
            for clip, first in test_set.windows
        ])  # fmt: skip
        step = clips[0].step
        following = last[:, None] + step * np.arange(1, config.num_frames_output + 1)
        first = info.times[last[0] + step * np.arange(1 - config.num_frames_input, config.num_frames_output + 1)]
        months, _ = whole_months(first, info.calendar)
        return cls(info, info.times[last], info.times[following], usual_step(info.times) * step, months)

    def lead_names(self, horizon):
        """A short name of every lead time: 10 min or 1 month where frames have times, else 1, 2, ..."""
        if self.step is None:
            return counted_leads(horizon)
        return lead_names([self.step * i for i in range(1, horizon + 1)], self.months)

    def title(self, index):
        """A name of sequence `index`: its number and, where frames have times, the time of its last input frame."""
        if self.times is None:
            return f"sequence {index}"
        return f"sequence {index}, last input frame {moment(self.times[index], self.info.calendar)}"


def latitude_weights(info, config):
    """Cosine of the latitude of every pixel, with mean 1: float64 (H, W) of the frames of a test.

    info     GridInfo; None: the data are no gridded field
    config   Config of the test

    UserError: the data have no latitude.
    """
    latitude = None if info is None else info.latitude
    if latitude is None:
        raise UserError(
            "--latitude_weights: the data have no coordinate of latitude (units degrees_north); leave it out"
        )
    weights = torch.from_numpy(np.cos(np.deg2rad(latitude)))
    height, width = config.frame_size
    if config.frame_fit == "crop":  # the test takes the centre
        weights = centre(weights, (height, width))
    else:
        size = [1 if own == 1 else side for side, own in zip((height, width), weights.shape)]
        weights = resize(weights[None, None], size)[0, 0].double()
    weights = weights.expand(height, width)
    return weights / weights.mean()


def centre(maps, size):
    """The part of maps (..., H, W) that a test with cropping shows; size: its (H, W). A smaller side stays as it is."""
    top, left = (int(crop_start(max(side - own, 0))) for side, own in zip(maps.shape[-2:], size))
    return maps[..., top : top + size[0], left : left + size[1]]


def climatology(path, config, value_range, info=None, stored=None, notes=None):
    """The mean of the frames of a file, as frames of a test: float32 (C, H, W) on the scale without transform.

    path          any file that predict.py takes, in the units of the data
    config        Config of the test
    value_range   ValueRange of the data
    info          GridInfo of the test set; None: it is no gridded field
    stored        (H, W) of the frames of the test set before they are cropped: a map of that size is cropped, too
    notes         list to which lines are added about what may be another field

    UserError: frames that do not become those of the test, or that are of other places.
    """
    options = replace(config, forcings=[], calendar=False)
    source = open_input(path, options, whole=True)
    if source.info:
        source.info.named(replace(value_range, given=None), options, path)
    if source.info and info:
        plane, other = (info.y, info.x), (source.info.y, source.info.x)
        if name := unlike_place(info.coordinates, plane, source.info.coordinates, other):
            raise UserError(
                f"--climatology {path}: its coordinate {name} is not that of the test set; give frames of the same "
                "places in the same order"
            )
        if notes is not None:
            said = label_notes(source.info.labels, info.labels, "is {} in the test set")
            notes += [f"--climatology {path}: {line}" for line in said]
    prepare, total, count = Preparation.of(options, replace(value_range, given=None)), 0, 0
    for frame in chain.from_iterable(sequence.frames() for sequence in source.sequences):
        unit = value_range.to_linear(prepare(frame), axis=0)
        total, count = total + unit.nan_to_num(0), count + ~unit.isnan()
    mean = total / count  # NaN where no frame has a value
    if config.frame_fit == "crop" and tuple(mean.shape[1:]) == stored:
        mean = centre(mean, config.frame_size)
    if tuple(mean.shape) != (config.input_channels, *config.frame_size):
        raise UserError(
            f"--climatology {path}: its frames become {tuple(mean.shape)}, but those of the test are "
            f"{(config.input_channels, *config.frame_size)}; give frames of that size"
        )
    return mean
