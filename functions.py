"""The rollout, the loss, one epoch of training and one evaluation: the same for both networks."""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import VMRNN_B
import VMRNN_D
from vmrnn.errors import UserError
from vmrnn.metrics import Metrics
from vmrnn.scan.cpu import find_compiler


def build_model(model, *, img_size, patch_size, in_chans, embed_dim, depths, depths_down, depths_up, drop_rate=0.0,
                attn_drop_rate=0.0, drop_path_rate=0.1, d_state=16, scan="auto"):  # fmt: skip
    """The network called `model` ("VMRNN-B" uses depths, "VMRNN-D" depths_down and depths_up)."""
    frame = (img_size, patch_size, in_chans, embed_dim)
    rest = (drop_rate, attn_drop_rate, drop_path_rate, d_state, scan)
    table = {
        "VMRNN-B": lambda: VMRNN_B.VMRNN(*frame, depths, *rest),
        "VMRNN-D": lambda: VMRNN_D.VMRNN(*frame, depths_down, depths_up, *rest),
    }
    return table[model]()


FUSED_ADAM = ("cpu", "cuda")  # device types whose Adam and AdamW have one kernel for all weights


def compile_model(model, device):
    """Compile the recurrence step of `model` in place (torch.compile, one graph a frame, no breaks).

    The first steps of a run then take a minute or more; weights and checkpoints are unchanged.
    UserError on a CPU without a C++ compiler.
    """
    if device.type == "cpu" and find_compiler() is None:
        raise UserError("--compile on a CPU needs a C++ compiler: install g++ or leave it out")
    model.advance = torch.compile(model.advance, fullgraph=True, dynamic=False)


def rollout(model, inputs, horizon, grad_checkpoint=False):
    """Feed T_in true frames, then `horizon` - 1 of the network's own: (B, T_in - 1 + horizon, C, H, W).

    inputs (B, T_in, C, H, W). Output i is the network's view of frame i + 1, so the last `horizon`
    are the forecast. The known frames are embedded in one call and the outputs before the forecast,
    which nothing feeds on, are decoded in one. grad_checkpoint: keep only the states between frames
    and compute a frame's activations again in the backward pass (a third to a half more time, a
    fraction of the memory).
    """

    def advance(tokens, states):
        if grad_checkpoint and torch.is_grad_enabled():
            return checkpoint(model.advance, tokens, states, use_reentrant=False)
        return model.advance(tokens, states)

    B, T = inputs.shape[:2]
    tokens = model.encode(inputs.flatten(0, 1)).unflatten(0, (B, T)).unbind(1)
    warm_up, frames, states = [], [], None
    for t in range(T - 1):
        features, states = advance(tokens[t], states)
        warm_up.append(features)
    if warm_up:
        decoded = model.decode(torch.stack(warm_up, 1).flatten(0, 1))
        frames = list(decoded.unflatten(0, (B, T - 1)).unbind(1))
    token = tokens[-1]
    for t in range(horizon):
        features, states = advance(token, states)
        frames.append(model.decode(features))
        if t + 1 < horizon:
            token = model.encode(frames[-1])
    return torch.stack(frames, 1)


def mixed_precision(device, precision):
    """The context that `precision` means: "fp32" or "bf16" (products and convolutions in bf16; norms,
    gates, the scan's state and the loss stay in fp32)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def rollout_loss(outputs, inputs, targets):
    """MSE + L1 over all outputs against the frames that follow (paper section 3.4); a scalar."""
    truth = torch.cat([inputs[:, 1:], targets], dim=1)
    return F.mse_loss(outputs, truth) + F.l1_loss(outputs, truth)


def progress(loader, title):
    """A bar over `loader` that counts frames, so it shows frames a second: yields (bar, step, inputs, targets)."""
    # disable=None: no bar where nobody watches (a log file)
    with tqdm(desc=title, unit="frame", unit_scale=True, leave=False, dynamic_ncols=True, disable=None) as bar:
        for step, (inputs, targets) in enumerate(loader, 1):
            frames = inputs.shape[0] * (inputs.shape[1] + targets.shape[1])
            if step == 1:
                bar.reset(total=frames * len(loader))
            yield bar, step, inputs, targets
            bar.update(frames)


def train_one_epoch(
    model,
    loader,
    optimizer,
    learning_rate,
    device,
    clip_grad=0.0,
    grad_checkpoint=False,
    precision="fp32",
    log_every=200,
    log=None,
    title="",
):
    """One pass over `loader`, one update a batch; returns the mean loss of a sample.

    learning_rate(step) is the lr of update `step`, from 1. log(step, mean loss since the last call) is
    called every `log_every` updates. A loss or a gradient that is not finite raises UserError before
    it reaches the weights.
    """
    model.train()
    total, count, window = 0.0, 0, []
    for bar, step, inputs, targets in progress(loader, title):
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        with mixed_precision(device, precision):
            outputs = rollout(model, inputs, targets.shape[1], grad_checkpoint)
        loss = rollout_loss(outputs, inputs, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad or math.inf).item()
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise UserError(
                f"the loss is {value} and its gradient's norm {norm} at update {step} of {title}: "
                "lower --lr or set --clip_grad 1"
            )
        optimizer.step()
        total, count = total + value * len(inputs), count + len(inputs)
        window.append(value)
        bar.set_postfix(loss=f"{value:.4f}", refresh=False)
        if log and step % log_every == 0:
            log(step, sum(window) / len(window))
            window.clear()
    return total / count


@torch.no_grad()
def evaluate(model, loader, device, metrics, precision="fp32", baselines=False, on_batch=None, title=""):
    """`metrics` (names) of the forecast over all of `loader`: {"loss": ..., "model": Metrics.compute()}.

    With `baselines` also "black" (a black frame) and "last" (the last input frame, repeated).
    on_batch(step, inputs, targets, forecast) sees every batch.
    """
    model.eval()
    total, meters = 0.0, {}
    for _, step, inputs, targets in progress(loader, title):
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with mixed_precision(device, precision):
            outputs = rollout(model, inputs, targets.shape[1])
        total += rollout_loss(outputs, inputs, targets).item() * len(inputs)
        forecast = outputs[:, inputs.shape[1] - 1 :]
        forecasts = {"model": forecast}
        if baselines:
            forecasts["black"] = torch.zeros_like(targets)
            forecasts["last"] = inputs[:, -1:].expand_as(targets)
        for name, frames in forecasts.items():
            meters.setdefault(name, Metrics(metrics)).update(frames, targets)
        if on_batch:
            on_batch(step, inputs, targets, forecast)
    results = {name: meter.compute() for name, meter in meters.items()}
    return {"loss": total / results["model"]["count"], **results}
