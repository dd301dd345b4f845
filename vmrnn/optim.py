"""The optimiser, which weights decay, and the learning rate over a run."""

import math
from functools import partial

import torch
from timm.optim import Muon, muon as timm_muon

# Device types on which Adam and AdamW have one kernel for all weights
FUSED = ("cpu", "cuda")


class CPUMuon(Muon):
    """timm's Muon for a CPU: it orthogonalizes the updates in fp32.

    timm orthogonalizes in bf16 and has no option for another type. Products of bf16 matrices are slow on most CPUs. So
    the function of timm's module that does it is replaced during a step, and put back after it.
    """

    def step(self, closure=None):
        original = timm_muon.zeropower_via_newtonschulz
        timm_muon.zeropower_via_newtonschulz = partial(original, dtype=torch.float32)
        try:
            return super().step(closure)
        finally:
            timm_muon.zeropower_via_newtonschulz = original


def parameter_groups(model, weight_decay):
    """Two groups: matrices and filters decay; norms, biases and parameters tagged `_no_weight_decay` do not."""
    decayed, plain = [], []
    for parameter in model.parameters():
        keep = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
        (plain if keep else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make_optimizer(model, name, lr, weight_decay, device):
    """A torch.optim.Optimizer.

    model          the network
    name           adam and adamw: those of torch. muon: timm's Muon for matrices and for filters of several channels,
                   AdamW with Nesterov momentum for all other parameters, among them the scan's projections for each
                   direction. Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982), so lr and
                   weight_decay keep their meaning.
    lr             learning rate
    weight_decay   decay of the groups that parameter_groups lets decay
    device         torch.device of the network
    """
    groups = parameter_groups(model, weight_decay)
    if name == "muon":
        matrices = [p for p in groups[0]["params"] if p.ndim in (2, 4) and min(p.shape[:2]) > 1]
        ids = {id(p) for p in matrices}
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in ids]
            group["use_fallback"] = True
        muon = CPUMuon if device.type == "cpu" else Muon
        return muon([{"params": matrices, "weight_decay": weight_decay}, *groups], lr=lr, nesterov=True)
    optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return optimizer_class(groups, lr=lr, fused=device.type in FUSED)


def lr_factor(step, schedule, warmup_steps, total_steps, decay_steps=0):
    """The learning rate at one update, as a factor of its peak.

    step           update of the run, from 0
    schedule       constant, cosine (half a period, to 0) or wsd (constant, then linear to 0), each after a linear
                   warm-up; or onecycle, which is torch's OneCycleLR
    warmup_steps   updates of the warm-up; onecycle: 0 means 30 % of the run
    total_steps    updates of the run
    decay_steps    wsd: updates of the fall at the end; 0 means 20 % of the run

    The factor depends only on these numbers. A resumed run needs no scheduler's state, and it follows options that
    were changed. wsd is the warmup-stable-decay schedule of arXiv 2404.06395: the end of the run may be decided late.
    """

    def half_cosine(start, end, part):
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))

    if schedule == "onecycle":
        rise = (warmup_steps or 0.3 * total_steps) - 1
        if step <= rise:
            return half_cosine(1 / 25, 1, step / rise if rise else 1)
        return half_cosine(1, 1 / 25e4, (step - rise) / (total_steps - 1 - rise))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "wsd":
        return min(1.0, (total_steps - step) / (decay_steps or max(1, total_steps // 5)))
    return half_cosine(1, 0, (step - warmup_steps) / max(1, total_steps - warmup_steps))


class Schedule:
    """Learning rate and forecast length of every update of a run. Both depend only on the number of the update.

    config              vmrnn.config.Config
    updates_per_epoch   updates of the weights per epoch
    """

    def __init__(self, config, updates_per_epoch):
        self.config, self.total_steps = config, config.epochs * updates_per_epoch

    def learning_rate(self, step):
        """The learning rate of update `step` of the run, from 0."""
        config = self.config
        return config.lr * lr_factor(step, config.schedule, config.warmup_steps, self.total_steps, config.decay_steps)

    def horizon(self, step):
        """How many of the target frames update `step` forecasts (the option curriculum)."""
        frames, curriculum = self.config.num_frames_output, self.config.curriculum
        return frames if step >= curriculum else 1 + step * frames // curriculum
