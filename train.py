"""Train a VMRNN.

    python train.py --config configs/quickstart.toml                    minutes on a laptop, no download
    python train.py --config configs/moving_mnist_d.toml                the paper's network D, one GPU
    python train.py --model VMRNN-B --depths 6 --res_dir exps/b         the same by flags alone
    python train.py --config ... --resume auto                          continue after an interruption
    torchrun --nproc_per_node=4 train.py --config ... --resume auto     four GPUs, or four CPU processes

Every key of the TOML file is also a flag (vmrnn/config.py). A flag wins over the file. The run folder (--res_dir) gets
config.toml, log.jsonl, loss.png, pictures, forecast.gif, best.safetensors, last.pt and previous_last.pt.
After SIGTERM or SIGINT the program finishes the update, saves, and ends with exit code 75. Start it again with
--resume auto.
"""

from vmrnn import command_line

if __name__ == "__main__":
    # Before the imports that take seconds
    command_line.answer(command_line.train_parser(__doc__))

import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

from dataset import DATASETS, build_dataset, make_loader
from functions import NonFinite, Step, evaluate, make_loss, train_one_epoch
from vmrnn import checkpoint, config as configuration, distributed
from vmrnn.data.overlap import overlap_notes
from vmrnn.errors import UserError
from vmrnn.graphs import GraphedStep
from vmrnn.logger import make_logger
from vmrnn.metrics import metric_rows
from vmrnn.network import build_model, compile_model
from vmrnn.optim import Schedule, make_optimizer
from vmrnn.progress import duration
from vmrnn.rollout import Rollout
from vmrnn.run_folder import Progress, Resumed, RunFolder, RunState, checkpoint_to_resume
from vmrnn.runtime import (
    KILLED_WORKER,
    Stopped,
    StopSignals,
    describe_device,
    is_dead_worker,
    pick_device,
    run_program,
)

log = logging.getLogger("vmrnn")


def parse_arguments(argv=None):
    """(Config, path of the weights to start from or None, Resumed or None)."""
    # The options, and what they continue
    parser = command_line.train_parser(__doc__)
    given = vars(parser.parse_args(argv))
    toml, weights, resume = (given.pop(key) for key in ("config", "init_from", "resume"))
    if resume not in (None, "auto"):
        resume = checkpoint.find_checkpoint(resume, ("last.pt", "previous_last.pt"))
        if resume.suffix == ".safetensors":
            raise UserError(
                f"--resume {resume}: holds only weights; resume from last.pt, or start a new run with --init_from"
            )
        # A run continues in its own folder unless another one is named.
        if "res_dir" not in configuration.read_toml(toml) | given:
            given["res_dir"] = str(resume.parent)
    config = configuration.resolve(toml, given)
    path = checkpoint_to_resume(config.res_dir, resume)
    if path is None:
        return config, weights, None

    # A resumed run has the options of its checkpoint, which the command line and the TOML file may change in part.
    resumed = Resumed.read(path)
    stored = resumed.content["config"]
    config = configuration.resolve(toml, given, base=stored | {"res_dir": config.res_dir})
    before = configuration.resolve(None, {}, base=stored)
    if changed := configuration.changed_on_resume(before, config, "data" in resumed.content):
        raise UserError(
            f"--resume {path}: a resumed run cannot change {', '.join(changed)}; leave them out (--resume {path} by "
            "itself keeps all options of the run) or start a new run"
        )
    return config, None, resumed  # --init_from was for the start of the run, and its file may be gone


def main(argv=None):
    config, weights, resumed = parse_arguments(argv)
    with distributed.processes(pick_device(config.device)) as device, StopSignals() as signals:
        # Only the first process speaks and writes.
        if distributed.rank():
            log.setLevel(logging.WARNING)
        with RunFolder(config.res_dir, writes=distributed.rank() == 0) as run:
            train(config, weights, resumed, device, signals, run)


def train(config, weights, resumed, device, signals, run):
    """Train to the last epoch.

    config    vmrnn.config.Config
    weights   path of weights to start from, or None
    resumed   run_folder.Resumed, or None for a new run
    device    torch.device of this process
    signals   runtime.StopSignals
    run       run_folder.RunFolder

    UserError: options, data or a checkpoint that cannot be used, or a loss that is not finite.
    Stopped: after a signal, when everything is saved.
    """
    world = distributed.world_size()
    log.info("device     %s%s", describe_device(device), f", {world} processes" if world > 1 else "")
    check_cuda_graph(config, device, world)

    # Network. Its move to the device logs the back end of the scan, or refuses one that cannot run there.
    torch.manual_seed(config.seed)
    model = build_model(**config.network_options).to(device)
    if weights:
        checkpoint.load_weights(model, weights)

    # Data
    train_loader, valid_loader, parts = make_loaders(config, device)
    train_set, valid_set = train_loader.dataset, valid_loader.dataset
    value_range, updates_per_epoch = train_set.value_range, len(train_set) // config.train_batch_size
    rows = metric_rows(DATASETS[config.dataset].metrics, config.thresholds, value_range, config.lpips)

    # One frame is forecast now, so that frames that do not fit are refused before anything is written.
    with torch.no_grad():
        Rollout(model)(train_set[0][0][None, :1].to(device), 1)
    ema = ModelEmaV3(model, decay=config.ema, use_warmup=True) if config.ema else None
    eval_model = ema.module if ema else model  # evaluated, and saved as best
    if config.compile:
        for network in {model, eval_model}:
            compile_model(network, device)

    # Optimiser and the state of the run
    optimizer = make_optimizer(model, config.optimizer, config.lr, config.weight_decay, device)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    schedule = Schedule(config, updates_per_epoch)
    data = {"train": train_set.identity, "valid": valid_set.identity}
    state = RunState(model, ema, optimizer, scaler, Progress(updates_per_epoch), config, value_range, data)
    if resumed:
        state.load(resumed.content)
    progress = state.progress
    if len(set(distributed.all_gather(progress.global_step))) > 1:
        raise UserError(f"{config.res_dir}: the processes see different checkpoints; put it where all can read it")
    network = Rollout(model, config.grad_checkpoint)
    if world > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    loss_function = make_loss(config)
    train_step = Step(network, loss_function, device, config.precision, parts, scaler)
    if config.cuda_graph:
        train_step = GraphedStep(train_step)

    run.open(state, resumed)
    logger = make_logger(run, state)

    log_plan(state, train_loader, valid_loader, parts)
    if changes := resumed and configuration.changes(resumed.content["config"], config):
        log.info("changed    %s", changes)
    log.info("run folder %s", run.path)

    training = Training(
        state, run, logger, signals, schedule, train_step, train_loader, valid_loader, eval_model, loss_function, rows,
        device,
    )  # fmt: skip
    # From here on there is something to save: a signal ends the run after the next update.
    signals.deferred = True
    validated = False
    with failures_handled(run, state):
        while progress.epoch <= config.epochs:
            training.epoch()
            validated = progress.epoch % config.epoch_valid == 0 or progress.epoch == config.epochs
            if validated:
                training.validate()
            progress.next_epoch()
            run.save(state)
            if validated:
                logger.curve()
    if not validated:  # an earlier start may have ended between the save and the curve
        logger.curve()
    log.info("done: %s; --resume auto --epochs %d trains further", run.path, progress.epoch)
    if run.best.exists():
        best = f'"{run.best}"' if " " in str(run.best) else run.best  # every shell takes these quotes
        log.info("best MSE on the validation set %.2f; next: python test.py --checkpoint %s", progress.best_mse, best)


@dataclass
class Training:
    """What the epochs of a run work with.

    state           run_folder.RunState: network, averaged weights, optimiser, progress, options
    run             run_folder.RunFolder
    logger          logger.Logger
    signals         runtime.StopSignals
    schedule        optim.Schedule
    train_step      functions.Step or graphs.GraphedStep
    train_loader    batches of the training set, from make_loaders
    valid_loader    batches of the validation set
    eval_model      the network that is validated and saved as best: the averaged weights if the run has them, else the
                    plain ones
    loss_function   from functions.make_loss
    rows            the metrics of the validation, from metrics.metric_rows
    device          torch.device of this process
    """

    state: RunState
    run: RunFolder
    logger: object
    signals: StopSignals
    schedule: Schedule
    train_step: object
    train_loader: object
    valid_loader: object
    eval_model: torch.nn.Module
    loss_function: object
    rows: tuple
    device: torch.device

    def epoch(self):
        """The rest of the epoch that the run is in, from its next update on."""
        state, run, signals, schedule = self.state, self.run, self.signals, self.schedule
        config, progress = state.config, state.progress
        sampler = self.train_loader.sampler
        sampler.epoch, sampler.start = progress.epoch, progress.step * config.train_batch_size
        updates = train_one_epoch(
            self.train_step, self.train_loader, state.optimizer, schedule.learning_rate,
            updates_per_epoch=progress.updates_per_epoch, horizon=schedule.horizon, start=progress.step,
            epoch_start=progress.epoch_start, seed=config.seed, clip_grad=config.clip_grad,
            title=f"epoch {progress.epoch}/{config.epochs}", rest=partial(time_left, progress, config.epochs),
        )  # fmt: skip
        for update in updates:
            signals.seconds = run.seconds_per_save + progress.count_time()
            if state.ema:
                state.ema.update(state.model, step=progress.global_step + 1)
            progress.add_update(update)
            if update.step % config.log_train == 0 or update.step == progress.updates_per_epoch:
                lr = schedule.learning_rate(progress.global_step - 1)
                values = {"train_loss": progress.take_window(), "grad_norm": update.grad_norm, "lr": lr}
                self.logger.training(progress, values)
            if any(distributed.all_sum(signals.received is not None)):
                stop(run, state, f"stopped by {signals.received or 'another process'}")
            if run.save_due(state):
                run.save(state)

    def validate(self):
        """Evaluate the network on the validation set, log the figures, and save it if it is the best so far."""
        state, run, config, progress = self.state, self.run, self.state.config, self.state.progress
        # Saved before anything is drawn: a resumed run evaluates again, so that no failure in the validation or its
        # pictures costs the epoch.
        if not run.is_saved(state):
            run.save(state)
        loss, results = evaluate(
            self.eval_model, self.valid_loader, self.device, self.rows, self.loss_function, config.precision,
            value_range=state.value_range, title=f"validate {progress.epoch}",
            on_batch=self.see_forecast,
        )  # fmt: skip
        metrics = results["forecast"]["mean"]
        check_validation(loss, metrics["mse"], state, run)
        losses = {"epoch_loss": progress.loss / progress.updates_per_epoch, "valid_loss": loss}
        self.logger.validation(progress, losses | metrics, results["forecast"]["per_frame"])
        run.save_best(state, self.eval_model, metrics["mse"])
        log.info(
            "epoch %d/%d  train loss %.4f  valid loss %.4f  MSE %.2f  ssim %.4f  best MSE %.2f  %s done, %s",
            progress.epoch, config.epochs, *losses.values(), metrics["mse"], metrics["ssim"], progress.best_mse,
            duration(progress.seconds), time_left(progress, config.epochs),
        )  # fmt: skip

    def see_forecast(self, batch, inputs, targets, forecast):
        """The on_batch of functions.compare in a validation: end the run after a signal, and log the forecast."""
        # Several processes stop only after an update, where all of them agree to.
        if self.signals.received and distributed.world_size() == 1:
            stop(self.run, self.state, f"stopped by {self.signals.received}")  # a resumed run evaluates again
        self.logger.forecast(self.state.progress, batch, inputs, targets, forecast)


def make_loaders(config, device):
    """Loaders of the training and the validation data, and micro-batches per update.

    UserError: data that cannot be used, or too few sequences for one update.
    """
    # One process decodes and downloads for all.
    with distributed.rank_zero_first():
        train_set = build_dataset("train", config)
        valid_set = build_dataset("valid", config, train_set.value_range)
    rank, world = distributed.rank(), distributed.world_size()
    micro_batch, parts = share_of_batch(config, world)
    if len(train_set) < config.train_batch_size:
        raise UserError(
            f"train_sequences, train_data_dir: {len(train_set)} sequences do not fill one batch of "
            f"{config.train_batch_size}"
        )
    options = {"num_workers": config.num_workers, "pin_memory": device.type == "cuda", "rank": rank, "world": world}
    train_loader = make_loader(train_set, micro_batch, shuffle=True, seed=config.seed, drop_last=True, **options)
    return train_loader, make_loader(valid_set, config.valid_batch_size, **options), parts


def log_plan(state, train_loader, valid_loader, parts):
    """Log what will run: network, data, validation, training, and where the run continues."""
    config, progress = state.config, state.progress
    train_set, valid_set = train_loader.dataset, valid_loader.dataset
    parameters = sum(p.numel() for p in state.model.parameters())
    log.info("network    %s, %s parameters, frames %d x %d", config.model, f"{parameters:,}", *config.frame_size)
    log.info(
        "data       %s from %s: %d sequences per epoch, %d -> %d frames", config.dataset, config.train_data_dir,
        len(train_set), config.num_frames_input, config.num_frames_output,
    )  # fmt: skip
    for note in train_set.notes:
        log.info("           %s", note)
    log.info("validation %d sequences: %s", len(valid_set), DATASETS[config.dataset].selection(config))
    own_notes = [note for note in valid_set.notes if note not in train_set.notes]
    for note in own_notes + overlap_notes(valid_set, "valid", config, config.to_dict()):
        log.info("           %s", note)
    if progress.epoch > config.epochs:
        log.info("training   %d of %d epochs are done: --epochs N trains further", progress.epoch - 1, config.epochs)
        return
    log.info(
        "training   epochs %d to %d, %d updates each, %s lr %g %s, %s, "
        "effective batch %d = %d x %d parts x %d processes",
        progress.epoch, config.epochs, progress.updates_per_epoch, config.optimizer, config.lr, config.schedule,
        config.precision, config.train_batch_size, train_loader.batch_size, parts, distributed.world_size(),
    )  # fmt: skip
    if progress.step:
        log.info("continues  after update %d of epoch %d", progress.step, progress.epoch)


def time_left(progress, epochs):
    """Text: the time that the rest of the run takes at the pace so far, validations and pictures included."""
    rest = epochs * progress.updates_per_epoch - progress.global_step
    if not progress.global_step:
        return ""
    return f"about {duration(progress.seconds / progress.global_step * rest)} of the run left" if rest else "all done"


@contextmanager
def failures_handled(run, state):
    """In the block, a loss that is not finite is a UserError, and a killed worker ends the program as a signal does."""
    try:
        yield
    except NonFinite as failure:
        try:
            path = run.save_failed_update(state, failure, distributed.rank())
            kept = f"its batch and the weights before it are in {path}"
        except UserError as error:  # a full disk must not hide what went wrong first
            kept = str(error)
        raise UserError(
            f"{failure} at update {failure.update.step} of epoch {state.progress.epoch}/{state.config.epochs}: "
            f"lower --lr or set --clip_grad 1; {kept}"
        ) from failure
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not (state.config.num_workers and is_dead_worker(error)):
            raise
        stop(run, state, f"{KILLED_WORKER},")


def check_cuda_graph(config, device, world):
    """UserError: --cuda_graph where it cannot work."""
    if config.cuda_graph and (device.type != "cuda" or world > 1 or config.grad_checkpoint):
        raise UserError(
            "--cuda_graph needs a CUDA GPU, one process and no --grad_checkpoint: leave it out, or change the others"
        )


def share_of_batch(config, world):
    """What one of `world` processes does of an update: (sequences per micro-batch, micro-batches per update).

    UserError: train_batch_size cannot be shared evenly.
    """
    parts = math.ceil(config.accumulate / world)
    size, rest = divmod(config.train_batch_size, world * parts)
    if rest:
        raise UserError(
            f"train_batch_size {config.train_batch_size} does not divide among {world} processes with {parts} parts "
            f"each (accumulate {config.accumulate}): give a multiple of {world * parts}"
        )
    return size, parts


def check_validation(loss, mse, state, run):
    """UserError: a validation with a loss that is not finite, or without a known pixel."""
    config, previous = state.config, checkpoint.previous_of(run.last)
    if not math.isfinite(loss):
        # last.pt holds the weights that failed, and a start from it would validate them again.
        start = f"continue from {previous} in another --res_dir" if previous.exists() else "start a new run"
        raise UserError(
            f"the validation loss of epoch {state.progress.epoch} is {loss}: {start} with a lower --lr or --clip_grad 1"
        )
    if math.isnan(mse):
        raise UserError(f"{config.valid_data_dir or config.train_data_dir}: all validation targets are missing")


def stop(run, state, reason):
    """Save, and end the program. `reason` begins the message."""
    run.save(state)
    raise Stopped(
        f"{reason} in epoch {state.progress.epoch} after update {state.progress.step}; {run.last} is saved, "
        "--resume auto continues"
    )


if __name__ == "__main__":
    run_program(main)
