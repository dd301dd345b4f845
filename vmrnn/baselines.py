"""Forecasts without a network, to compare a network with.

Each takes inputs (B, T_in, C, H, W) on the scale [0, 1], NaN where a pixel is missing, a horizon, and the ValueRange of
the data, and returns (B, horizon, C, H, W). The range says what stands in for a pixel that is not known, see
vmrnn.motion.zero_is_nothing.
"""

import numpy as np
import torch

from vmrnn.motion import PAIRS, Motion, without_missing, zero_is_nothing
from vmrnn.values import ValueRange

UNIT = ValueRange()  # 0 is nothing


def black(inputs, horizon, value_range=UNIT):
    """A black frame, 0 on the scale, at every lead time."""
    return torch.zeros_like(inputs[:, :1]).expand(-1, horizon, -1, -1, -1)


def last_frame(inputs, horizon, value_range=UNIT):
    """The last input frame, repeated. A missing pixel becomes 0 where that is nothing, else the nearest known value."""
    frames = inputs[:, -1]
    if frames.isnan().any():
        nothing = zero_is_nothing(value_range, frames.shape[1])
        filled = [without_missing(frame, nothing) for frame in frames.float().cpu().numpy()]
        frames = torch.from_numpy(np.stack(filled)).to(frames)
    return frames[:, None].expand(-1, horizon, -1, -1, -1)


def motion(inputs, horizon, value_range=UNIT):
    """The last input frame, moved along the optical flow of the last inputs.

    The flow is scikit-image's iterative Lucas-Kanade, of the mean over channels, averaged over the last pairs of frames
    and smoothed. It stays as it is over the forecast. Each pixel is traced backwards along the flow (semi-Lagrangian
    advection, as in pysteps and Germann and Zawadzki 2002). What comes from outside the frame is 0 where that is
    nothing, else the nearest value at the edge.
    """
    moved = []
    for sequence in inputs.float().cpu().numpy():
        stream = Motion(value_range)
        for frame in sequence[-PAIRS - 1 :]:
            stream.observe(frame)
        moved.append(stream.forecast(horizon))
    return torch.from_numpy(np.stack(moved)).to(inputs.device)


BASELINES = {"black frame": black, "last input frame": last_frame, "motion": motion}
