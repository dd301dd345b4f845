"""Forecasts without a network, to compare a network with.

Each takes inputs (B, T_in, C, H, W) on the scale [0, 1], NaN where a pixel is missing, and a horizon, and returns
(B, horizon, C, H, W).
"""

import itertools

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from skimage.registration import optical_flow_ilk
from skimage.transform import downscale_local_mean, resize

PAIRS = 2  # pairs of frames that the flow is averaged over
COARSE = 256  # pixels; larger frames are averaged down to about this side before the flow is estimated
RADIUS = 20  # pixels; the flow is estimated in windows of this radius
SMOOTHING = 15  # pixels; the flow is smoothed with a Gaussian of this width
CONTRAST = 32  # log(1 + CONTRAST * value) keeps the strongest values from ruling the flow


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
    frames = inputs.nan_to_num(nan=0.0).float().cpu().numpy()
    moved = np.stack([advect(sequence[-1], flow_of(sequence.mean(1)), horizon) for sequence in frames])
    return torch.from_numpy(moved).to(inputs.device)


def flow_of(frames):
    """The motion of a field, float32 (2, H, W): pixels per frame towards larger rows, and towards larger columns.

    frames   (T, H, W) in [0, 1]; a single frame has no motion
    """
    height, width = frames.shape[1:]
    # Motion varies slowly over a field. Coarser frames are as good for its estimate, and faster.
    coarse = max(1, min(height, width) // COARSE)
    shown = [downscale_local_mean(frame.clip(0), (coarse, coarse)) for frame in frames[-PAIRS - 1 :]]
    shown = [gaussian_filter(np.log1p(CONTRAST * frame), 1) for frame in shown]
    radius = max(2, min(RADIUS // coarse, min(shown[0].shape) // 4))
    flows = [optical_flow_ilk(a, b, radius=radius, gaussian=True) for a, b in itertools.pairwise(shown)]
    mean = np.mean(flows, axis=0) if flows else np.zeros((2, *shown[0].shape))
    smooth = [gaussian_filter(part, SMOOTHING * radius / RADIUS) for part in mean]
    return np.stack([coarse * resize(part, (height, width)) for part in smooth]).astype(np.float32)


def advect(frame, flow, horizon):
    """A frame (C, H, W) moved along a flow (2, H, W) for 1 to `horizon` steps: (horizon, C, H, W)."""
    origin = np.indices(frame.shape[1:], dtype=np.float32)
    moved = []
    for _ in range(horizon):
        origin = origin - np.stack([map_coordinates(part, origin, order=1, mode="nearest") for part in flow])
        moved.append([map_coordinates(channel, origin, order=1, mode="constant") for channel in frame])
    return np.array(moved, dtype=np.float32)


BASELINES = {"black frame": black, "last input frame": last_frame, "motion": motion}
