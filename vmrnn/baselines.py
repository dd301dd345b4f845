"""Forecasts without a network, to compare a network with.

Each takes inputs (B, T_in, C, H, W) on the scale [0, 1], NaN where a pixel is missing, and a horizon, and returns
(B, horizon, C, H, W).
"""

import numpy as np
import torch

from vmrnn.motion import PAIRS, Motion


def black(inputs, horizon):
    """A black frame, at every lead time."""
    return torch.zeros_like(inputs[:, :1]).expand(-1, horizon, -1, -1, -1)


def last_frame(inputs, horizon):
    """The last input frame, repeated. A missing pixel becomes 0."""
    return inputs[:, -1:].nan_to_num(nan=0.0).expand(-1, horizon, -1, -1, -1)


def motion(inputs, horizon):
    """The last input frame, moved along the optical flow of the last inputs.

    The flow is scikit-image's iterative Lucas-Kanade, of the mean over channels, averaged over the last pairs of frames
    and smoothed. It stays as it is over the forecast. Each pixel is traced backwards along the flow (semi-Lagrangian
    advection, as in pysteps and Germann and Zawadzki 2002). What comes from outside the frame is 0.
    """
    moved = []
    for sequence in inputs.float().cpu().numpy():
        stream = Motion()
        for frame in sequence[-PAIRS - 1 :]:
            stream.observe(frame)
        moved.append(stream.forecast(horizon))
    return torch.from_numpy(np.stack(moved)).to(inputs.device)


BASELINES = {"black frame": black, "last input frame": last_frame, "motion": motion}
