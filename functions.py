"""The loss, one epoch of training and one evaluation, the same for all networks."""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vmrnn import distributed
from vmrnn.metrics import Metrics
from vmrnn.progress import Bar, still_running
from vmrnn.rollout import rollout
from vmrnn.runtime import seed_update
from vmrnn.values import ValueRange

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# An overflow of fp16's gradients at this scale or below ends the run: a smaller scale would not help. The scales that
# training needs are at least 64 times as large.
SMALLEST_SCALE = 2.0**-14


def mixed_precision(device, precision):
    """The autocast context of a precision: "fp32", "bf16" or "fp16".

    Matrix products and convolutions run in that type. Norms, gates, the scan's state and the loss stay in fp32.
    """
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


class RolloutLoss:
    """MSE + l1_weight * L1 of all outputs of a rollout against the frames that follow (paper, section 3.4).

    l1_weight       weight of the absolute error, 0 or more; the paper's is 1. The absolute error is smallest at the
                    median, so a large weight makes uncertain pixels black, which raises the MSE.
    bright_weight   both errors of a pixel of true value v weigh 1 + bright_weight * v. This moves forecasts upwards
                    where they are uncertain.
    """

    def __init__(self, l1_weight=1.0, bright_weight=0.0):
        self.l1_weight, self.bright_weight = l1_weight, bright_weight

    def __str__(self):
        weighted = f", weighted by 1 + {self.bright_weight:g} value" if self.bright_weight else ""
        return f"MSE + {self.l1_weight:g} L1{weighted}"

    def __call__(self, outputs, inputs, targets):
        """The loss, a scalar tensor: the mean over the samples of the batch, with equal weights.

        outputs   (B, T_in - 1 + T_out, C, H, W), as `rollout` returns them
        inputs    (B, T_in, C + F, H, W) in [0, 1]; NaN marks a missing pixel; the last F channels, forcings, do not
                  count
        targets   (B, T_out, C + F, H, W) likewise

        The loss of a sample is the mean over its known pixels. It does not depend on how samples are batched.
        """
        truth = torch.cat([inputs[:, 1:], targets], dim=1)[:, :, : outputs.shape[2]]
        missing = truth.isnan()
        # A missing pixel takes the value of the output: its error and its gradient are 0.
        truth = torch.where(missing, outputs.detach().to(truth.dtype), truth)
        # With this weight the mean over all pixels of a sample is the mean over its known ones.
        pixels = truth[0].numel()
        weight = pixels / (pixels - missing.flatten(1).sum(1)).clamp(min=1)  # exactly 1 if no pixel is missing
        weight = weight.view(-1, *[1] * (truth.ndim - 1))
        if self.bright_weight:
            weight = weight * (1 + self.bright_weight * truth)
        squared, absolute = (f(outputs, truth, reduction="none") for f in (F.mse_loss, F.l1_loss))
        return (squared * weight).mean() + self.l1_weight * (absolute * weight).mean()


def make_loss(config):
    """The loss that a configuration asks for: a callable with the arguments and the result of RolloutLoss."""
    return RolloutLoss(config.l1_weight, config.bright_weight)


def progress_bar(loader, title, total, first=0, rest=None):
    """Iterate over `loader` with a bar, or lines, that count frames; yields (bar, frames, inputs, targets).

    loader   yields the batches that are left
    title    text before the bar
    total    number of all batches
    first    number of batches that were done before
    rest     function that returns the end of a line, see vmrnn.progress.Bar

    The caller calls bar.update(frames) when the batch is done. A generator cannot do it: after the last batch it is not
    resumed.
    """
    silent = distributed.rank() > 0
    with Bar(title, first=first, rest=rest, silent=silent) as bar:
        for number, (inputs, targets) in enumerate(loader):
            frames = inputs.shape[0] * (inputs.shape[1] + targets.shape[1])
            if number == 0:  # only now is it known how many frames a batch has
                bar.reset(frames * total, frames * first)
            # The first batch may take minutes to compile the network.
            with still_running(f"{title}: first batch", silent) if number == 0 else nullcontext():
                yield bar, frames, inputs, targets


@dataclass(frozen=True)
class Update:
    """What train_one_epoch reports of one update of the weights."""

    step: int  # in its epoch, from 1
    loss: float  # mean over the samples of the update, on all devices
    grad_norm: float  # of the unscaled gradients, before clipping


class NonFinite(Exception):
    """A loss or a gradient is not finite. The weights are still those before the update that failed.

    update            the Update that failed
    inputs, targets   its last micro-batch
    """

    def __init__(self, update, inputs, targets):
        super().__init__(f"the loss is {update.loss} and its gradient's norm {update.grad_norm}")
        self.update, self.inputs, self.targets = update, inputs, targets


class Step:
    """Forward and backward pass of one micro-batch.

    network     Rollout, or DistributedDataParallel around one
    loss        RolloutLoss, or any callable with its arguments and result
    device      torch.device of the network
    precision   "fp32", "bf16" or "fp16"
    parts       micro-batches per update (gradient accumulation)
    scaler      torch.amp.GradScaler, for fp16

    step(inputs (B, T_in, C, H, W), targets (B, T_out, C, H, W)) adds to the gradients. It returns the micro-batch's
    share of the update's loss, a scalar on the device.
    """

    def __init__(self, network, loss, device, precision="fp32", parts=1, scaler=None):
        self.network, self.loss_function = network, loss
        self.device, self.precision, self.parts = device, precision, parts
        self.scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
        self.parameters = list(network.parameters())

    def __call__(self, inputs, targets):
        with mixed_precision(self.device, self.precision):
            outputs = self.network(inputs, targets.shape[1], targets)
        loss = self.loss_function(outputs, inputs, targets) / self.parts
        self.scaler.scale(loss).backward()
        return loss.detach()

    def clear_gradients(self):
        self.network.zero_grad()


def train_one_epoch(
    train_step,
    loader,
    optimizer,
    learning_rate,
    *,
    updates_per_epoch,
    horizon=None,
    start=0,
    epoch_start=0,
    seed=0,
    clip_grad=0.0,
    title="",
    rest=None,
):
    """The updates of one epoch that are left; yields an Update after each.

    train_step          Step, called with each micro-batch
    loader              yields the micro-batches that are left, train_step.parts per update
    optimizer           torch.optim.Optimizer
    learning_rate       function from the number of an update, counted from 0 over the run, to its learning rate
    updates_per_epoch   updates of a whole epoch
    horizon             function from the number of an update to how many target frames it forecasts; None: all
    start               updates of this epoch that were done before
    epoch_start         updates that were done before this epoch
    seed                seed of dropout, 0 or more
    clip_grad           largest norm of the gradient; 0: no clipping
    title, rest         text of the progress bar, and what its lines end with, see vmrnn.progress.Bar

    Raises NonFinite if a loss or a gradient is not finite, before it reaches the weights. Under fp16 the scaler skips
    updates whose gradients overflow, as long as lowering its scale can help.
    """
    train_step.network.train()
    device, scaler, world = train_step.device, train_step.scaler, distributed.world_size()
    batches = progress_bar(loader, title, updates_per_epoch * train_step.parts, start * train_step.parts, rest)
    for step in range(start, updates_per_epoch):
        global_step = epoch_start + step
        # Dropout draws from (seed, update, process), so a resumed run needs no state of a generator.
        seed_update(seed, global_step, distributed.rank())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(global_step)

        # Forward and backward pass of every micro-batch; their gradients add up.
        train_step.clear_gradients()
        total = torch.zeros((), device=device)
        for part in range(train_step.parts):
            bar, frames, inputs, targets = next(batches)
            targets = targets[:, : horizon(global_step)] if horizon else targets
            inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            # The processes exchange their gradients once per update, with the last micro-batch.
            waits = world > 1 and part + 1 < train_step.parts
            with train_step.network.no_sync() if waits else nullcontext():
                total += train_step(inputs, targets)
            bar.update(frames)

        # Clip the gradient, and read its norm and the loss: the one time per update that the CPU waits for the device.
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(train_step.parameters, clip_grad or math.inf)
        loss, norm = torch.stack([total, norm.to(total)]).tolist()
        (loss,) = distributed.all_sum(loss / world)
        update = Update(step + 1, loss, norm)

        # Stop before a loss or a gradient that is not finite reaches the weights. The scaler handles an overflow.
        overflow = scaler.is_enabled() and not math.isfinite(norm) and scaler.get_scale() > SMALLEST_SCALE
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
            raise NonFinite(update, inputs, targets)
        scaler.step(optimizer)
        scaler.update()
        bar.note(loss=f"{loss:.4f}")
        yield update


def network_outputs(model, precision="fp32"):
    """The outputs of a network as `compare` asks for them: a function of (inputs, targets).

    model       the network; it is put into evaluation mode
    precision   see mixed_precision
    """
    model.eval()

    def outputs(inputs, targets):
        with mixed_precision(inputs.device, precision):
            return rollout(model, inputs, targets.shape[1], following=targets)

    return outputs


def evaluate(model, loader, device, metrics, loss, precision="fp32", *, value_range=None, on_batch=None, title=""):
    """`compare` for the forecasts of a network; precision: see mixed_precision."""
    outputs_of = network_outputs(model, precision)
    return compare(outputs_of, loader, device, metrics, loss, value_range=value_range, on_batch=on_batch, title=title)


@torch.no_grad()
def compare(
    outputs_of,
    loader,
    device,
    metrics,
    loss=None,
    *,
    baselines=None,
    value_range=None,
    weights=None,
    on_batch=None,
    title="",
):
    """Forecast all sequences of a loader and compare the forecasts with the truth.

    outputs_of    function of (inputs, targets) that returns outputs (B, T, C, H, W); the last T_out are the forecast.
                  With a loss, T is T_in - 1 + T_out, as `rollout` has it
    loader        any sequence of batches (inputs (B, T_in, C, H, W), targets (B, T_out, C, H, W)) in [0, 1]; NaN is a
                  missing pixel
    metrics       rows or names of vmrnn.metrics
    loss          RolloutLoss; None: no loss is computed
    baselines     {label: function(inputs, horizon, value_range) -> forecast}, see vmrnn.baselines
    value_range   ValueRange of the data; None: no transform. Baselines and metrics are computed without its transform
    weights       (H, W), weights of the pixels in sums of errors, see vmrnn.metrics.Comparison
    on_batch      called with (step, inputs, targets, forecast) of every batch of this process, without forcings
    title         of the progress bar

    Returns (loss, results):
    loss      mean over the samples; None if none is computed
    results   {"forecast": what Metrics.compute returns, label of a baseline: the same of its forecasts}

    Every process evaluates its own samples, and all processes get the results over all samples.
    """
    # Every batch of this process: forecast, loss, and the sums of the metrics
    baselines, value_range = baselines or {}, value_range or ValueRange()
    total, meters = 0.0, {label: Metrics(metrics, weights) for label in ("forecast", *baselines)}
    for step, (bar, frames, inputs, targets) in enumerate(progress_bar(loader, title, len(loader)), 1):
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        horizon = targets.shape[1]
        outputs = outputs_of(inputs, targets)
        inputs, targets = (given[:, :, : outputs.shape[2]] for given in (inputs, targets))  # without forcings
        if loss:
            total += loss(outputs, inputs, targets).item() * len(inputs)
        forecast = outputs[:, -horizon:]
        # A baseline is the same for every network: it does not see the transform of the values.
        known, truth, own = (value_range.to_linear(each, axis=2) for each in (inputs, targets, forecast))
        meters["forecast"].update(own, truth)
        for label, baseline in baselines.items():
            meters[label].update(baseline(known, horizon, value_range), truth)
        if on_batch:
            on_batch(step, inputs, targets, forecast)
        bar.update(frames)

    # Merge the sums of all processes.
    total, samples = distributed.all_sum(total, meters["forecast"].count)
    results = {}
    for label, meter in meters.items():
        merged = Metrics(metrics)
        for state in distributed.all_gather(meter.state()):
            merged.merge(state)
        results[label] = merged.compute()
    return total / samples if loss else None, results
