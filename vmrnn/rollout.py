"""The rollout of a network: it is fed the true frames first, then its own forecasts."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from vmrnn.errors import UserError


def pad_frames(frames, multiple):
    """(..., H, W) repeated at the bottom and the right to sides that are multiples of `multiple`."""
    H, W = frames.shape[-2:]
    bottom, right = -H % multiple, -W % multiple
    if not (bottom or right):
        return frames
    padded = F.pad(frames.flatten(0, -4), (0, right, 0, bottom), mode="replicate")
    return padded.unflatten(0, frames.shape[:-3])


def network_input(frames, multiple):
    """Frames as the network sees them: 0 in place of a missing pixel (NaN), sides padded to `multiple`.

    frames     (..., C, H, W) in [0, 1]
    multiple   the network's stride, in pixels
    """
    return pad_frames(torch.where(frames.isnan(), 0.0, frames), multiple)


def rollout(model, inputs, horizon, grad_checkpoint=False, following=None):
    """Feed T_in true frames, then `horizon` - 1 of the network's own. Returns (B, T_in - 1 + horizon, C, H, W).

    model            a network
    inputs           (B, T_in, C + F, H, W) in [0, 1]; the network sees 0 where a pixel is missing (NaN)
    horizon          frames to forecast
    grad_checkpoint  keep only the states between frames, and compute the activations of a frame again in the backward
                     pass: a third to a half more time, a fraction of the memory
    following        (B, horizon - 1 or more, C + F, H, W): the frames after the inputs, of which only the forcings are
                     used; None if the network has none (F = 0)

    Output i is the network's forecast of frame i + 1, so the last `horizon` outputs are the forecast. The last F
    channels are forcings: given at every frame and never forecast. The base of a network, if it has one, is the last of
    the forcings. Sides that do not fit the network are padded, and the outputs are cropped.

    Raises UserError if the network has forcings and those of the forecast are not given.
    """

    def advance(tokens, states):
        if grad_checkpoint and torch.is_grad_enabled():
            return checkpoint(model.advance, tokens, states, use_reentrant=False)
        return model.advance(tokens, states)

    # Embed the true frames in one call. Time is the first axis, so that the tokens of each frame are contiguous:
    # torch.compile would compile a second program for another layout.
    B, T, _, H, W = inputs.shape
    inputs = network_input(inputs, model.stride)
    tokens = model.encode(inputs.transpose(0, 1).flatten(0, 1)).unflatten(0, (T, B)).unbind(0)

    # All true frames but the last: their outputs are decoded in one call.
    warm_up, frames, states = [], [], None
    for t in range(T - 1):
        features, states = advance(tokens[t], states)
        warm_up.append(features)
    if warm_up:
        decoded = model.decode(torch.stack(warm_up, 1).flatten(0, 1), inputs[:, :-1].flatten(0, 1))
        frames = list(decoded.unflatten(0, (B, T - 1)).unbind(1))

    # The forecast: from the last true frame, then from the network's own frames
    forcings = forcings_of(model, following, horizon)
    frame, token = inputs[:, -1], tokens[-1]
    for t in range(horizon):
        features, states = advance(token, states)
        frames.append(model.decode(features, frame))
        if t + 1 < horizon:
            frame = frames[-1] if forcings is None else torch.cat((frames[-1], forcings[:, t]), dim=1)
            token = model.encode(frame)
    return torch.stack(frames, 1)[..., :H, :W]


def forcings_of(model, following, horizon):
    """The forcings of the frames that a forecast feeds on, (B, horizon - 1 or more, F, H, W); None: there are none."""
    if model.out_chans == model.in_chans or horizon == 1:
        return None
    if following is None or following.shape[1] < horizon - 1:
        raise UserError(
            f"the network has {model.in_chans - model.out_chans} forcings: "
            f"give those of the {horizon - 1} frames after the inputs"
        )
    return network_input(following[:, :, model.out_chans :], model.stride)


class Rollout(nn.Module):
    """`rollout` as the forward of a module, which is what DistributedDataParallel can wrap."""

    def __init__(self, model, grad_checkpoint=False):
        super().__init__()
        self.model, self.grad_checkpoint = model, grad_checkpoint

    def forward(self, inputs, horizon, following=None):
        return rollout(self.model, inputs, horizon, self.grad_checkpoint, following)
