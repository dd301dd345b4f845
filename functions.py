"""The rollout, the loss, one epoch of training and one evaluation: the same for both networks."""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import VMRNN_B
import VMRNN_D
from vmrnn import distributed
from vmrnn.errors import UserError
from vmrnn.metrics import Metrics
from vmrnn.runtime import seed_update
from vmrnn.scan.cpu import find_compiler

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_SCALE = 2.0**-14  # of fp16's gradients: half a dozen halvings below any that training needs


def build_model(model, *, img_size, patch_size, in_chans, embed_dim, depths, depths_down, depths_up, drop_rate=0.0,
                attn_drop_rate=0.0, drop_path_rate=0.1, d_state=16, scan="auto"):  # fmt: skip
    """The network called `model` ("VMRNN-B" uses depths, "VMRNN-D" depths_down and depths_up), on the CPU.

    img_size: (H, W) of the data, or an int; what the patches do not divide, `rollout` pads. The others as in
    VMRNN_B.py and VMRNN_D.py. UserError: sizes that cannot work.
    """
    unit = patch_size * 2 ** (len(depths_down) if model == "VMRNN-D" else 0)
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    frame = (tuple(-(-side // max(unit, 1)) * unit for side in sides), patch_size, in_chans, embed_dim)
    rest = (drop_rate, attn_drop_rate, drop_path_rate, d_state, scan)
    table = {
        "VMRNN-B": lambda: VMRNN_B.VMRNN(*frame, depths, *rest),
        "VMRNN-D": lambda: VMRNN_D.VMRNN(*frame, depths_down, depths_up, *rest),
    }
    return table[model]()


def compile_model(model, device):
    """Compile the recurrence step of `model` in place (torch.compile, one graph a frame, no breaks).

    The first steps of a run then take a minute or more; weights and checkpoints are unchanged.
    UserError on a CPU without a C++ compiler.
    """
    if device.type == "cpu" and find_compiler() is None:
        raise UserError("--compile on a CPU needs a C++ compiler: install g++ or leave it out")
    model.advance = torch.compile(model.advance, fullgraph=True, dynamic=False)


def pad_frames(frames, multiple):
    """(..., H, W) repeated at the bottom and the right to sides that are multiples of `multiple`."""
    H, W = frames.shape[-2:]
    bottom, right = -H % multiple, -W % multiple
    if not (bottom or right):
        return frames
    padded = F.pad(frames.flatten(0, -4), (0, right, 0, bottom), mode="replicate")
    return padded.unflatten(0, frames.shape[:-3])


def rollout(model, inputs, horizon, grad_checkpoint=False):
    """Feed T_in true frames, then `horizon` - 1 of the network's own: (B, T_in - 1 + horizon, C, H, W).

    inputs (B, T_in, C, H, W), NaN where a pixel is missing: the network sees 0. Output i is the
    network's view of frame i + 1, so the last `horizon` are the forecast. Sides that the network
    cannot take are padded, and its outputs cropped. The known frames are embedded in one call and the
    outputs before the forecast, which nothing feeds on, are decoded in one. grad_checkpoint: keep only
    the states between frames and compute a frame's activations again in the backward pass (a third to
    a half more time, a fraction of the memory).
    """

    def advance(tokens, states):
        if grad_checkpoint and torch.is_grad_enabled():
            return checkpoint(model.advance, tokens, states, use_reentrant=False)
        return model.advance(tokens, states)

    B, T, _, H, W = inputs.shape
    inputs = pad_frames(torch.where(inputs.isnan(), 0.0, inputs), model.stride)
    # Time first, so that each frame's tokens are contiguous: compiled, another layout would be another program.
    tokens = model.encode(inputs.transpose(0, 1).flatten(0, 1)).unflatten(0, (T, B)).unbind(0)
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
    return torch.stack(frames, 1)[..., :H, :W]


class Rollout(nn.Module):
    """`rollout` as the forward of a module, which is what DistributedDataParallel can wrap."""

    def __init__(self, model, grad_checkpoint=False):
        super().__init__()
        self.model, self.grad_checkpoint = model, grad_checkpoint

    def forward(self, inputs, horizon):
        return rollout(self.model, inputs, horizon, self.grad_checkpoint)


def mixed_precision(device, precision):
    """The context that `precision` means: "fp32", "bf16" or "fp16" (products and convolutions in that type;
    norms, gates, the scan's state and the loss stay in fp32)."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def rollout_loss(outputs, inputs, targets, l1_weight=1.0):
    """MSE + l1_weight * L1 over all outputs against the frames that follow (paper section 3.4: 1); a scalar.

    outputs (B, T_in - 1 + T_out, C, H, W) as `rollout` gives them, inputs (B, T_in, C, H, W), targets
    (B, T_out, C, H, W), in [0, 1]. A NaN in inputs or targets is a missing pixel: a sample's loss is the mean
    over its others, and all samples weigh the same, however they are batched.
    L1 is minimised by the median, so with a large weight an uncertain pixel becomes black, which costs MSE.
    """
    truth = torch.cat([inputs[:, 1:], targets], dim=1)
    missing = truth.isnan()
    truth = torch.where(missing, outputs.detach().to(truth.dtype), truth)  # no error there, and no gradient
    pixels = truth[0].numel()
    share = pixels / (pixels - missing.flatten(1).sum(1)).clamp(min=1)  # exactly 1 where all is there
    share = share.view(-1, *[1] * (truth.ndim - 1))
    squared, absolute = (f(outputs, truth, reduction="none") for f in (F.mse_loss, F.l1_loss))
    return (squared * share).mean() + l1_weight * (absolute * share).mean()


def progress(loader, title, total, first=0):
    """A bar over `loader` that counts frames, so it shows frames a second: yields (bar, inputs, targets).

    total: batches in all, of which `first` are done.
    """
    # disable=None: no bar where nobody watches (a log file)
    hidden = True if distributed.rank() else None
    with tqdm(desc=title, unit="frame", unit_scale=True, leave=False, dynamic_ncols=True, disable=hidden) as bar:
        for i, (inputs, targets) in enumerate(loader):
            frames = inputs.shape[0] * (inputs.shape[1] + targets.shape[1])
            if i == 0:
                bar.reset(total=frames * total)
                bar.update(frames * first)
            yield bar, inputs, targets
            bar.update(frames)


@dataclass(frozen=True)
class Update:
    """What train_one_epoch says of one update of the weights."""

    step: int  # in its epoch, from 1
    loss: float  # mean over the samples of the update, on all devices
    grad_norm: float  # of the unscaled gradients, before clipping


class NonFinite(Exception):
    """A loss or a gradient is not finite; the weights are those before the update that failed, inputs and
    targets its last micro-batch."""

    def __init__(self, update, inputs, targets):
        super().__init__(f"the loss is {update.loss} and its gradient's norm {update.grad_norm}")
        self.update, self.inputs, self.targets = update, inputs, targets


class Step:
    """Forward and backward of one micro-batch: step(inputs (B, T_in, C, H, W), targets (B, T_out, C, H, W)) adds to
    the gradients and gives its part of the update's loss, a scalar on the device.

    network     Rollout, or DistributedDataParallel around one
    parts       micro-batches of an update (gradient accumulation)
    scaler      torch.amp.GradScaler, for fp16
    l1_weight   of rollout_loss
    """

    def __init__(self, network, device, precision="fp32", parts=1, scaler=None, l1_weight=1.0):
        self.network, self.device, self.precision, self.parts = network, device, precision, parts
        self.l1_weight = l1_weight
        self.scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
        self.parameters = list(network.parameters())

    def __call__(self, inputs, targets):
        with mixed_precision(self.device, self.precision):
            outputs = self.network(inputs, targets.shape[1])
        loss = rollout_loss(outputs, inputs, targets, self.l1_weight) / self.parts
        self.scaler.scale(loss).backward()
        return loss.detach()

    def clear_gradients(self):
        self.network.zero_grad()


def capture(function, device):
    """(CUDA graph of the kernels that function() launches, what it returned). It is called four times."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is built or chosen at a first call must not be recorded
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on, such as the loader's that pins memory.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        return graph, function()


class GraphedStep(Step):
    """Step as one CUDA graph: all kernels of a rollout and its backward are recorded once, then replayed.

    A step is hundreds of small kernels a frame; to launch them one by one takes longer than to run them.
    Micro-batches of another shape are recorded anew. Weights, gradients and the memory of activations stay at
    their addresses, so nothing else can use that memory.
    """

    graph = None

    def __call__(self, inputs, targets):
        if self.graph is None or self.targets.shape != targets.shape or self.inputs.shape != inputs.shape:
            self.capture(inputs, targets)
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.loss.clone()

    def capture(self, inputs, targets):
        self.graph = None  # its memory serves the next
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]
        random_state = torch.cuda.get_rng_state(self.device)
        self.inputs, self.targets = inputs.clone(), targets.clone()
        self.graph, self.loss = capture(
            lambda: super(GraphedStep, self).__call__(self.inputs, self.targets), self.device
        )
        torch.cuda.set_rng_state(random_state, self.device)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad.copy_(gradient)

    def clear_gradients(self):
        self.network.zero_grad(set_to_none=False)  # the graph adds to this very memory


class GraphedForward:
    """model(frame, states) -> (frame, states) as one CUDA graph, for a stream: a frame's few hundred kernels take
    longer to launch than to run.

    The first frame, without states, is not recorded; frames of another shape are recorded anew. Under autocast only
    within one context of it: the recorded kernels read its copies of the weights.
    """

    def __init__(self, model):
        self.model, self.graph, self.inputs = model, None, (None, None)

    def __call__(self, frame, states=None):
        if states is None:
            return self.model(frame)
        if self.graph is None or self.inputs[0].shape != frame.shape:
            self.capture(frame, states)
        for mine, given in zip(tree_leaves(self.inputs), tree_leaves((frame, states)), strict=True):
            mine.copy_(given)
        self.graph.replay()
        return tree_map(torch.clone, self.outputs)

    def capture(self, frame, states):
        self.graph = self.outputs = None  # their memory serves the next
        self.inputs = tree_map(torch.clone, (frame, states))
        self.graph, self.outputs = capture(lambda: self.model(*self.inputs), frame.device)


def train_one_epoch(
    step, loader, optimizer, learning_rate, *, updates, horizon=None, done=0, before=0, seed=0, clip_grad=0.0, title=""
):
    """The updates `done` + 1 to `updates` of one epoch; yields an Update after each.

    step        Step, called with each micro-batch
    loader      yields the micro-batches that are left, step.parts for each update
    learning_rate(n)   the lr of update n of the run, from 0; `before` updates came before this epoch
    horizon(n)  how many of the target frames it forecasts; None: all

    Dropout draws from (seed, n, rank), so no generator's state needs to be kept to go on exactly.
    A loss or a gradient that is not finite raises NonFinite before it reaches the weights; under fp16
    the scaler skips updates whose gradients overflow, until its scale is beyond repair.
    """
    step.network.train()
    device, scaler, world = step.device, step.scaler, distributed.world_size()
    batches = progress(loader, title, updates * step.parts, done * step.parts)
    for number in range(done + 1, updates + 1):
        seed_update(seed, before + number - 1, distributed.rank())
        step.clear_gradients()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(before + number - 1)
        total = torch.zeros((), device=device)
        for part in range(step.parts):
            bar, inputs, targets = next(batches)
            targets = targets[:, : horizon(before + number - 1)] if horizon else targets
            inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            waits = world > 1 and part + 1 < step.parts  # gradients travel with the last part
            with step.network.no_sync() if waits else nullcontext():
                total += step(inputs, targets)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(step.parameters, clip_grad or math.inf)
        loss, norm = torch.stack([total, norm.to(total)]).tolist()  # the one wait for the device
        (loss,) = distributed.all_sum(loss / world)
        update = Update(number, loss, norm)
        overflow = scaler.is_enabled() and not math.isfinite(norm) and scaler.get_scale() > SMALLEST_SCALE
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
            raise NonFinite(update, inputs, targets)
        scaler.step(optimizer)
        scaler.update()
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        yield update


@torch.no_grad()
def evaluate(model, loader, device, metrics, precision="fp32", l1_weight=1.0, baselines=False, on_batch=None, title=""):
    """`metrics` (names) of the forecast over all of `loader`: {"loss": ..., "model": Metrics.compute()}.

    loader: any sequence of batches (inputs (B, T_in, C, H, W), targets (B, T_out, C, H, W)) in [0, 1], NaN where a pixel
    is missing; "loss" is rollout_loss, the mean over samples. With `baselines` also "black" (a black frame) and "last"
    (the last input frame, repeated). on_batch(step, inputs, targets, forecast) sees every batch of this process.
    With several processes each has its own samples in `loader`, and all get the results over all samples.
    """
    model.eval()
    total, meters = 0.0, {name: Metrics(metrics) for name in (("model", "black", "last") if baselines else ("model",))}
    for step, (_, inputs, targets) in enumerate(progress(loader, title, len(loader)), 1):
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with mixed_precision(device, precision):
            outputs = rollout(model, inputs, targets.shape[1])
        total += rollout_loss(outputs, inputs, targets, l1_weight).item() * len(inputs)
        forecast = outputs[:, inputs.shape[1] - 1 :]
        meters["model"].update(forecast, targets)
        if baselines:
            meters["black"].update(torch.zeros_like(targets), targets)
            meters["last"].update(torch.where(inputs[:, -1:].isnan(), 0.0, inputs[:, -1:]).expand_as(targets), targets)
        if on_batch:
            on_batch(step, inputs, targets, forecast)
    (total, samples) = distributed.all_sum(total, meters["model"].count)
    results = {}
    for name, meter in meters.items():
        merged = Metrics(metrics)
        for state in distributed.all_gather(meter.state()):
            merged.merge(state)
        results[name] = merged.compute()
    return {"loss": total / samples, **results}
