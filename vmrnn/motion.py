"""The motion of a field, as pixels per frame, and frames that are moved along it."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates
from skimage.registration import optical_flow_ilk
from skimage.transform import downscale_local_mean

PAIRS = 2  # pairs of frames that the flow is averaged over
COARSE = 256  # pixels; larger frames are averaged down to about this side before the flow is estimated
RADIUS = 20  # pixels; the flow is estimated in windows of this radius
SMOOTHING = 15  # pixels; the flow is smoothed with a Gaussian of this width
CONTRAST = 32  # log(1 + CONTRAST * value) keeps the strongest values from ruling the flow


@dataclass(frozen=True, eq=False)
class Flow:
    """The motion of a field between two frames.

    steps    float32 (2, h, w): towards larger rows and larger columns, in pixels of the coarse map per frame
    coarse   pixels of a frame per pixel of the coarse map
    """

    steps: np.ndarray
    coarse: int

    def at(self, places):
        """The motion at places (2, h, w), rows and columns in pixels of the frame: (2, h, w) in pixels of the frame."""
        inside = (places + 0.5) / self.coarse - 0.5
        return self.coarse * np.stack([map_coordinates(part, inside, order=1, mode="nearest") for part in self.steps])


def flow_between(first, second):
    """The Flow from one frame (H, W) in [0, 1] to the next: scikit-image's iterative Lucas-Kanade, not smoothed."""
    # Motion varies slowly over a field. Coarser frames are as good for its estimate, and faster.
    coarse = max(1, min(first.shape) // COARSE)
    shown = [downscale_local_mean(frame.clip(0), (coarse, coarse)) for frame in (first, second)]
    shown = [gaussian_filter(np.log1p(CONTRAST * frame), 1) for frame in shown]
    return Flow(optical_flow_ilk(*shown, radius=radius_of(shown[0].shape, coarse), gaussian=True), coarse)


def radius_of(shape, coarse):
    """The radius of the windows of flow_between, in pixels of a coarse map of this shape."""
    return max(2, min(RADIUS // coarse, min(shape) // 4))


@lru_cache(maxsize=256)  # most frames are in many windows
def mean_flow(flows):
    """The mean of a tuple of Flows, smoothed."""
    mean, coarse = np.mean([flow.steps for flow in flows], axis=0), flows[0].coarse
    width = SMOOTHING * radius_of(mean.shape[1:], coarse) / RADIUS
    return Flow(np.stack([gaussian_filter(part, width) for part in mean]).astype(np.float32), coarse)


def zero_is_nothing(value_range, channels):
    """Per channel, whether 0 on the scale [0, 1] means that there is nothing, a list of bool.

    value_range   ValueRange of the data
    channels      number of channels

    It does if it stands for 0 in the units of the data, as for rain and for the black of a picture. Otherwise it is
    only the lowest value of the range, such as the coldest temperature of the training data.
    """
    nothing = [bool(value_range.forward(np.asarray(low, np.float64)) == 0) for low, _ in value_range.pairs()]
    return nothing * channels if len(nothing) == 1 else nothing


def without_missing(frame, nothing):
    """A frame (C, H, W) with a value in place of each missing one (NaN).

    nothing   from zero_is_nothing: such a channel gets 0; another one gets the nearest known value, or 0 if it has none
    """
    missing = np.isnan(frame)
    if not missing.any():
        return frame
    filled = np.where(missing, np.float32(0), frame)
    for values, absent, empty in zip(filled, missing, nothing):
        if not empty and absent.any() and not absent.all():
            rows, columns = distance_transform_edt(absent, return_distances=False, return_indices=True)
            values[absent] = values[rows, columns][absent]
    return filled


def advect(frame, flow, horizon, nothing, place=None):
    """A frame moved along a flow, traced backwards (semi-Lagrangian).

    What comes from outside the frame is not known: a channel whose 0 is nothing gets 0, another one the nearest value
    at the edge.

    frame     (C, H, W)
    flow      Flow; None: the frame stands still
    horizon   frames to forecast
    nothing   from zero_is_nothing
    place     (rows, columns): the slices of the frame that are returned; None: all of it

    Returns float32 (horizon, C, h, w): the frame after 1 to `horizon` steps.
    """
    rows, columns = place or (slice(None), slice(None))
    if flow is None:
        return np.repeat(frame[None, :, rows, columns], horizon, axis=0).astype(np.float32)
    origin = np.indices(frame.shape[1:], dtype=np.float32)[:, rows, columns]
    moved = []
    for _ in range(horizon):
        origin = origin - flow.at(origin)
        moved.append([
            map_coordinates(channel, origin, order=1, mode="constant" if empty else "nearest")
            for channel, empty in zip(frame, nothing, strict=True)
        ])  # fmt: skip
    return np.array(moved, dtype=np.float32)


class Motion:
    """Frames of a stream, moved along their optical flow. Channels move together.

    value_range   ValueRange of the data: see zero_is_nothing
    flow_of       function of two frames (C, H, W) that returns their Flow, such as one that remembers; None:
                  flow_between of the means over channels
    """

    def __init__(self, value_range, flow_of=None):
        self.value_range = value_range
        self.flow_of = flow_of or (lambda first, second: flow_between(first.mean(0), second.mean(0)))
        self.flows, self.frame, self.nothing = (), None, None

    def observe(self, frame):
        """Take the next frame, float32 (C, H, W) on the scale [0, 1]; NaN is a missing pixel, see without_missing."""
        self.nothing = zero_is_nothing(self.value_range, len(frame))
        frame = without_missing(frame, self.nothing)
        if self.frame is not None:
            self.flows = (*self.flows, self.flow_of(self.frame, frame))[-PAIRS:]
        self.frame = frame

    def forecast(self, horizon, place=None):
        """The next frames, (horizon, C, h, w): `advect` of the last frame along the mean of the last flows."""
        return advect(self.frame, mean_flow(self.flows) if self.flows else None, horizon, self.nothing, place)
