"""Train a VMRNN.

    python train.py --config configs/quickstart.toml                    minutes on a laptop, no download
    python train.py --config configs/moving_mnist_d.toml                the paper's network D, one GPU
    python train.py --model VMRNN-B --depths 6 --res_dir exps/b         the same by flags alone
    python train.py --config ... --resume auto                          go on after an interruption
    torchrun --nproc_per_node=4 train.py --config ... --resume auto     four GPUs, or four CPU processes

Every key of the TOML file is a flag (vmrnn/config.py); flags win. The run folder (--res_dir) gets
config.toml, log.jsonl, loss.png, pictures, forecast.gif, best.safetensors, last.pt and the one before it.
SIGTERM and SIGINT finish the update, save, and end with exit code 75: start again with --resume auto.
"""

import logging
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

from dataset import DATASETS, build_dataset, make_loader
from functions import (
    NonFinite,
    RolloutLoss,
    Step,
    evaluate,
    train_one_epoch,
)
from vmrnn import checkpoint, config as configuration, distributed, scan
from vmrnn.board import Board
from vmrnn.errors import UserError
from vmrnn.graphs import GraphedStep
from vmrnn.metrics import metric_rows
from vmrnn.network import build_model, compile_model
from vmrnn.optim import lr_factor, make_optimizer
from vmrnn.pictures import save_animation, save_curve, save_strip
from vmrnn.report import strict_json
from vmrnn.rollout import Rollout
from vmrnn.runtime import (
    Stopped,
    StopSignals,
    describe_device,
    hold_folder,
    make_folder,
    pick_device,
    run_program,
    seed_everything,
)

log = logging.getLogger("vmrnn")


@dataclass
class Position:
    """Where in a run: `step` updates of `epoch` are done. All that a run needs to go on beside weights and optimiser."""

    epoch: int = 1
    step: int = 0
    loss: float = 0.0  # summed over the epoch's updates
    window: list[float] = field(default_factory=list)  # losses since the last train_loss of log.jsonl
    seconds: float = 0.0  # of training and validation, over all starts of the run
    best_mse: float = math.inf
    log_size: int = 0  # bytes of log.jsonl


def parse_arguments(argv=None):
    """(Config, weights to start from or None, (content, path) of the checkpoint to resume or None)."""
    parser = configuration.Parser(__doc__)
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file")
    parser.add_argument(
        "--init_from", "--checkpoint", "--checkpoint_path", metavar="FILE", help="weights to start a new run from"
    )
    parser.add_argument("--resume", metavar="auto|FILE", help="go on from the run folder's last.pt, or from FILE")
    configuration.add_options(parser)
    given = vars(parser.parse_args(argv))
    toml, weights, resume = (given.pop(key) for key in ("config", "init_from", "resume"))
    config = configuration.resolve(toml, given)
    named = "res_dir" in given or (toml and "res_dir" in configuration.read_toml(toml))
    if resume not in (None, "auto") and not named:
        config.res_dir = str(Path(resume).parent)
    last = Path(config.res_dir) / "last.pt"
    exists = last.exists() or checkpoint.previous_of(last).exists()
    if resume == "auto":
        resume = last if exists else None  # a first start with --resume auto in the job script
    if exists and (resume is None or last.resolve() != Path(resume).resolve()):
        raise UserError(f"{last.parent} already holds a run: --resume auto goes on, or give another --res_dir")
    if resume is None:
        return config, weights, None
    state, source = checkpoint.read_last_checkpoint(resume)
    if "optimizer" not in state:
        raise UserError(f"--resume {resume}: holds weights alone; use --init_from to start from them")
    if "position" not in state:
        raise UserError(f"--resume {resume}: of an older version; use --init_from to start from its weights")
    before = configuration.resolve(None, {}, base=state["config"])
    config = configuration.resolve(toml, given, base=state["config"] | {"res_dir": config.res_dir})
    config.data_range = config.data_range or before.data_range  # a TOML may leave it to the data
    changed = {key for key, value in config.to_dict().items() if value != getattr(before, key)}
    changed -= configuration.changeable_on_resume()
    if changed:
        raise UserError(
            f"--resume {resume}: a resumed run cannot change {', '.join(sorted(changed))}; leave them out or start anew"
        )
    return config, weights, (state, source)


def share_of_batch(config):
    """(sequences of a micro-batch, micro-batches of an update) of each process; the batch is all processes'."""
    world = distributed.world_size()
    parts = math.ceil(config.accumulate / world)
    size, rest = divmod(config.train_batch_size, world * parts)
    if rest:
        raise UserError(
            f"train_batch_size {config.train_batch_size} does not divide among {world} processes with {parts} parts "
            f"each (accumulate {config.accumulate}): give a multiple of {world * parts}"
        )
    return size, parts


def main(argv=None):
    config, weights, resumed = parse_arguments(argv)
    with distributed.processes(pick_device(config.device)) as device, StopSignals() as signals:
        train(config, weights, resumed, device, signals)


def train(config, weights, resumed, device, signals):
    rank, world = distributed.rank(), distributed.world_size()
    if rank:
        log.setLevel(logging.WARNING)  # one process speaks, and writes
    log.info("device     %s%s", describe_device(device), f", {world} processes" if world > 1 else "")
    scan.resolve(config.scan, device.type, d_state=config.d_state)  # says which back end and why, or refuses
    if config.cuda_graph and (device.type != "cuda" or world > 1 or config.grad_checkpoint):
        raise UserError(
            "--cuda_graph needs a CUDA GPU, one process and no --grad_checkpoint: leave it or the other out"
        )
    seed_everything(config.seed)

    # Data
    with distributed.rank_zero_first():  # one process decodes and fetches for all
        train_set = build_dataset("train", config)
        config.data_range = list(train_set.data_range)  # the checkpoint says how its numbers become data again
        valid_set = build_dataset("valid", config, train_set.value_range)
    metrics = metric_rows(DATASETS[config.dataset].metrics, config.thresholds, valid_set.value_range, config.lpips)
    micro_batch, parts = share_of_batch(config)
    place = {"num_workers": config.num_workers, "pin_memory": device.type == "cuda", "rank": rank, "world": world}
    train_loader = make_loader(train_set, micro_batch, shuffle=True, seed=config.seed, drop_last=True, **place)
    valid_loader = make_loader(valid_set, config.valid_batch_size, **place)
    updates = len(train_set) // config.train_batch_size  # of an epoch
    if updates == 0:
        raise UserError(
            f"train_sequences, train_data_dir: {len(train_set)} sequences do not fill one batch of "
            f"{config.train_batch_size}"
        )

    # Network
    model = build_model(**config.network_options).to(device)
    if weights:
        checkpoint.load_weights(model, weights)
    with torch.no_grad():
        Rollout(model)(train_set[0][0][None, :1].to(device), 1)  # refuses what does not fit, before anything is written
    ema = ModelEmaV3(model, decay=config.ema, use_warmup=True) if config.ema else None
    eval_model = ema.module if ema else model  # what is evaluated, and saved as best
    if config.compile:
        for network in {model, eval_model}:
            compile_model(network, device)

    # Optimiser
    optimizer = make_optimizer(model, config.optimizer, config.lr, config.weight_decay, device)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    def learning_rate(n):
        return config.lr * lr_factor(
            n, config.schedule, config.warmup_steps, config.epochs * updates, config.decay_steps
        )

    def horizon(n):
        if n >= config.curriculum:
            return config.num_frames_output
        return 1 + n * config.num_frames_output // config.curriculum

    # Resume
    position = Position()
    if resumed:
        state, source = resumed
        position = Position(**state["position"])
        checkpoint.load_weights(model, state["model"])
        if ema:
            checkpoint.load_weights(ema.module, state["ema"])
        # Moments are the checkpoint's, lr and weight decay the configuration's.
        moments = {"state": state["optimizer"]["state"], "param_groups": optimizer.state_dict()["param_groups"]}
        optimizer.load_state_dict(moments)
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    if len({(p.epoch, p.step) for p in distributed.all_gather(position)}) > 1:
        raise UserError(f"{config.res_dir}: the processes see different checkpoints; put it where all can read it")
    loss_function = RolloutLoss(config.l1_weight)
    network = Rollout(model, config.grad_checkpoint)
    if world > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    one_step = Step(network, loss_function, device, config.precision, parts, scaler)
    if config.cuda_graph:
        one_step = GraphedStep(one_step)

    # Run folder
    folder = Path(config.res_dir)
    last, best, log_file = folder / "last.pt", folder / "best.safetensors", folder / "log.jsonl"
    if rank == 0:
        make_folder(folder / "pictures")
        hold_folder(folder)
        goes_on = resumed and source.resolve() in (last.resolve(), checkpoint.previous_of(last).resolve())
        there = checkpoint.read_last_checkpoint(source if goes_on else last)[0] if goes_on or last.exists() else {}
        if there.get("position") != (state["position"] if goes_on else None):
            raise UserError(f"{folder}: another process trained there while this one prepared its data; start again")
        for cut_off in (*folder.glob(".*.tmp"), *folder.glob("pictures/.*.tmp")):  # by a kill in the middle of a save
            cut_off.unlink()
        if resumed and source.resolve() == checkpoint.previous_of(last).resolve():
            os.replace(source, last)  # or the next save would keep the damaged one and drop this
        elif resumed and not goes_on:  # the run goes on in a new folder
            position.best_mse, position.log_size = math.inf, 0
        log_file.touch()
        os.truncate(log_file, min(position.log_size, log_file.stat().st_size))  # what follows is written again
        configuration.save_toml(config, folder / "config.toml")
    begun = (position.epoch - 1) * updates + position.step
    board = Board(folder / "tensorboard", begun) if config.tensorboard and rank == 0 else None
    clock = time.perf_counter() - position.seconds

    def record(step, **values):
        position.seconds = time.perf_counter() - clock
        if rank:
            return
        update = (position.epoch - 1) * updates + step
        place = {"epoch": position.epoch, "step": step, "samples": update * config.train_batch_size,
                 "seconds": round(position.seconds, 2)}  # fmt: skip
        with open(log_file, "a", encoding="utf-8") as f:
            f.write(strict_json(place | values) + "\n")
        if board:
            board.scalars(values, update)

    def save():
        nonlocal saved
        position.seconds = time.perf_counter() - clock
        saved = (position.epoch, position.step, time.perf_counter())
        if rank:
            return
        position.log_size = log_file.stat().st_size
        checkpoint.save_checkpoint(
            last, model=model.state_dict(), ema=ema and ema.module.state_dict(), optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict(), position=asdict(position), config=config.to_dict(),
        )  # fmt: skip

    def stop():
        save()
        raise Stopped(
            f"stopped by {signals.received or 'another process'} in epoch {position.epoch} after update "
            f"{position.step}; {last} is saved, --resume auto goes on"
        )

    # What will run
    parameters = sum(p.numel() for p in model.parameters())
    log.info("network    %s, %s parameters, frames %d x %d", config.model, f"{parameters:,}", *config.frame_size)
    log.info(
        "data       %s from %s: %d sequences an epoch, %d -> %d frames", config.dataset, config.train_data_dir,
        len(train_set), config.num_frames_input, config.num_frames_output,
    )  # fmt: skip
    for note in train_set.notes:
        log.info("           %s", note)
    log.info("validation %d sequences: %s", len(valid_set), DATASETS[config.dataset].selects)
    log.info(
        "training   epochs %d to %d, %d updates each, %s lr %g %s, %s, effective batch %d = %d x %d parts x %d processes",
        position.epoch, config.epochs, updates, config.optimizer, config.lr, config.schedule, config.precision,
        config.train_batch_size, micro_batch, parts, world,
    )  # fmt: skip
    log.info("run folder %s", folder)
    if position.step:
        log.info("going on   after update %d of epoch %d", position.step, position.epoch)

    # Loop
    saved = (position.epoch, position.step, time.perf_counter())
    signals.deferred = True  # until here there is nothing to save
    while position.epoch <= config.epochs:
        epoch, before = position.epoch, (position.epoch - 1) * updates
        train_loader.sampler.epoch, train_loader.sampler.start = epoch, position.step * config.train_batch_size
        try:
            for update in train_one_epoch(
                one_step, train_loader, optimizer, learning_rate, horizon=horizon, updates=updates, done=position.step,
                before=before, seed=config.seed, clip_grad=config.clip_grad, title=f"epoch {epoch}/{config.epochs}",
            ):  # fmt: skip
                if ema:
                    ema.update(model, step=before + update.step)
                position.step = update.step
                position.loss += update.loss
                position.window.append(update.loss)
                if update.step % config.log_train == 0 or update.step == updates:
                    record(
                        update.step, train_loss=sum(position.window) / len(position.window),
                        grad_norm=update.grad_norm, lr=learning_rate(before + update.step - 1),
                    )  # fmt: skip
                    if board:
                        board.throughput(config.train_batch_size, before + update.step)
                    position.window = []
                if any(distributed.all_sum(signals.received is not None)):
                    stop()
                if config.is_save_due(update.step - saved[1], time.perf_counter() - saved[2]):
                    save()
        except NonFinite as failure:
            path = folder / f"failed_update_rank{rank}.pt"
            checkpoint.save_checkpoint(
                path, model=model.state_dict(), inputs=failure.inputs, targets=failure.targets, config=config.to_dict(),
                position=asdict(position),
            )  # fmt: skip
            raise UserError(
                f"{failure} at update {failure.update.step} of epoch {epoch}/{config.epochs}: lower --lr or set "
                f"--clip_grad 1; its batch and the weights before it are in {path}"
            ) from failure
        loss = position.loss / updates

        if epoch % config.epoch_valid == 0 or epoch == config.epochs:

            def watch(step, inputs, targets, forecast):
                if signals.received and world == 1:  # several processes go on to where all of them agree
                    stop()  # the evaluation is run again
                if rank == 0 and (step - 1) % config.log_valid == 0:
                    sequence = [frames[0].float().cpu() for frames in (inputs, targets, forecast)]
                    picture = folder / "pictures" / f"epoch{epoch:04d}_batch{step:04d}.png"
                    save_strip(picture, *sequence, f"epoch {epoch}")
                    if board:
                        board.picture(f"forecast/batch {step}", picture, before + updates)
                    if step == 1:
                        save_animation(folder / "forecast.gif", *sequence)
                        if board:
                            board.picture("forecast/animation", folder / "forecast.gif", before + updates)

            results = evaluate(
                eval_model, valid_loader, device, metrics, loss_function, config.precision, on_batch=watch,
                title=f"validate {epoch}",
            )  # fmt: skip
            metrics = results["model"]["mean"]
            if math.isnan(metrics["mse"]):
                raise UserError(f"{config.valid_data_dir or config.train_data_dir}: all validation targets are missing")
            if not math.isfinite(results["loss"]):  # and last.pt stays what it was
                raise UserError(
                    f"the validation loss of epoch {epoch} is {results['loss']}: lower --lr or set --clip_grad 1"
                )
            record(updates, epoch_loss=loss, valid_loss=results["loss"], **metrics)
            is_best = metrics["mse"] < position.best_mse
            position.best_mse = min(position.best_mse, metrics["mse"])  # in this order nan is not the best
            if rank == 0:
                save_curve(folder / "loss.png", log_file)
                if is_best:
                    checkpoint.save_weights(best, eval_model, config.to_dict())
            if board:
                board.lead_times(results["model"]["per_frame"], before + updates)
            log.info(
                "epoch %d  train loss %.4f  valid loss %.4f  MSE %.2f  ssim %.4f  best MSE %.2f  %.0f s",
                epoch, loss, results["loss"], metrics["mse"], metrics["ssim"], position.best_mse, position.seconds,
            )  # fmt: skip
        position = Position(epoch + 1, best_mse=position.best_mse)
        save()
    log.info("done: %s", folder)
    if best.exists():
        log.info("best MSE on the validation set %.2f; next: python test.py --checkpoint %s", position.best_mse, best)


if __name__ == "__main__":
    run_program(main)
