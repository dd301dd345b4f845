"""Train a VMRNN.

    python train.py --config configs/quickstart.toml                    minutes on a laptop, no download
    python train.py --config configs/moving_mnist_d.toml                the paper's network D, one GPU
    python train.py --model VMRNN-B --depths 6 --res_dir exps/b         the same by flags alone
    python train.py --config ... --resume auto                          go on after an interruption

Every key of the TOML file is a flag (vmrnn/config.py); flags win.
The run folder (--res_dir) gets config.toml, log.jsonl, loss.png, pictures, last.pt and best.safetensors.
"""

import json
import logging
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from dataset import DATASETS, build_dataset, make_loader
from functions import FUSED_ADAM, build_model, compile_model, evaluate, train_one_epoch
from vmrnn import checkpoint, config as configuration, scan
from vmrnn.errors import UserError
from vmrnn.pictures import save_curve, save_strip
from vmrnn.runtime import describe_device, make_folder, pick_device, replacing, run_program, seed_everything

log = logging.getLogger("vmrnn")


# What a resumed run may change: nothing that its data or its network come from.
FREE_ON_RESUME = {
    "epochs", "lr", "weight_decay", "clip_grad", "precision", "compile", "grad_checkpoint", "epoch_valid", "log_train",
    "log_valid", "tensorboard", "scan", "device", "num_workers", "res_dir", "valid_batch_size", "test_batch_size",
    "test_data_dir", "test_sequences",
}  # fmt: skip


def parse_arguments(argv=None):
    """(Config, weights to start from or None, content of the checkpoint to resume or None)."""
    parser = configuration.Parser(__doc__)
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file")
    parser.add_argument("--checkpoint", "--checkpoint_path", metavar="FILE", help="weights to start from")
    parser.add_argument("--resume", metavar="auto|FILE", help="go on from the run folder's last.pt, or from FILE")
    configuration.add_options(parser)
    given = vars(parser.parse_args(argv))
    toml, weights, resume = (given.pop(key) for key in ("config", "checkpoint", "resume"))
    config = configuration.resolve(toml, given)
    last = Path(config.res_dir) / "last.pt"
    if resume == "auto":
        resume = last if last.exists() else None  # a first start with --resume auto in the job script
    if last.exists() and (resume is None or last.resolve() != Path(resume).resolve()):
        raise UserError(f"{last.parent} already holds a run: --resume auto goes on, or give another --res_dir")
    if resume is None:
        return config, weights, None
    state = checkpoint.read_checkpoint(resume)
    if "optimizer" not in state:
        raise UserError(f"--resume {resume}: holds weights alone; use --checkpoint to start from them")
    before = state["config"]
    config = configuration.resolve(toml, given, base=before | {"res_dir": config.res_dir})
    changed = {key for key, value in config.to_dict().items() if value != before.get(key)} - FREE_ON_RESUME
    if changed:
        raise UserError(f"--resume {resume}: the run has other {', '.join(sorted(changed))}; leave them or start anew")
    return config, weights, state


def parameter_groups(model, weight_decay):
    """Decay for matrices and filters; none for norms, biases and what is tagged `_no_weight_decay`."""
    decayed, plain = [], []
    for parameter in model.parameters():
        keep = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
        (plain if keep else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def rate_factor(step, schedule, warmup_steps, total_steps):
    """lr as a factor of its peak at update `step` (from 0): linear warm-up, then constant or half a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def forget_from(log_file, epoch):
    """Drop what log.jsonl has of `epoch` and later, and a line that was cut off: they will be written again."""
    kept = []
    for line in log_file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["epoch"] < epoch:
                kept.append(line + "\n")
        except ValueError:  # the process died while writing it
            continue
    with replacing(log_file) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def main(argv=None):
    config, weights, state = parse_arguments(argv)
    device = pick_device(config.device)
    log.info("device     %s", describe_device(device))
    scan.resolve(config.scan, device.type, d_state=config.d_state)  # says which back end and why, or refuses
    seed_everything(config.seed)

    # Data
    train_set = build_dataset("train", length=config.train_sequences, **config.data_options)
    valid_set = build_dataset("valid", length=config.valid_sequences, **config.data_options)
    pin = device.type == "cuda"
    train_loader = make_loader(
        train_set, config.train_batch_size, config.num_workers, shuffle=True, seed=config.seed, drop_last=True,
        pin_memory=pin,
    )  # fmt: skip
    valid_loader = make_loader(valid_set, config.valid_batch_size, config.num_workers, pin_memory=pin)

    if len(train_loader) == 0:
        raise UserError(f"train_sequences: {len(train_set)} do not fill one batch of {config.train_batch_size}")

    # Network
    model = build_model(**config.network_options).to(device)
    if weights:
        checkpoint.load_weights(model, weights)
    with torch.no_grad():
        model.encode(train_set[0][0].to(device))  # refuses frames that do not fit, before anything is written
    if config.compile:
        compile_model(model, device)

    # Optimiser
    optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    groups = parameter_groups(model, config.weight_decay)
    optimizer = optimizer_class(groups, lr=config.lr, fused=device.type in FUSED_ADAM)
    updates = len(train_loader)

    def learning_rate(epoch, step):
        done = (epoch - 1) * updates + step - 1
        return config.lr * rate_factor(done, config.schedule, config.warmup_steps, config.epochs * updates)

    # Run folder
    folder = make_folder(config.res_dir)
    last, best, log_file = folder / "last.pt", folder / "best.safetensors", folder / "log.jsonl"

    # Resume
    first_epoch, best_mse, curves = 1, float("inf"), {"epoch": [], "loss": [], "valid_epoch": [], "valid_loss": []}
    if state:
        checkpoint.load_weights(model, state["model"])
        # Moments are the checkpoint's, lr and weight decay the configuration's.
        moments = {"state": state["optimizer"]["state"], "param_groups": optimizer.state_dict()["param_groups"]}
        optimizer.load_state_dict(moments)
        torch.set_rng_state(state["rng"])
        first_epoch, curves = state["epoch"] + 1, state["curves"]
        if best.exists():  # not where a run goes on in another folder
            best_mse = state["best_mse"]
        if log_file.exists():
            forget_from(log_file, first_epoch)

    # What will run
    parameters = sum(p.numel() for p in model.parameters())
    log.info("network    %s, %s parameters, frames %d x %d", config.model, f"{parameters:,}", *config.frame_size)
    log.info(
        "data       %s from %s: %d sequences an epoch, %d to validate, %d -> %d frames",
        config.dataset, config.train_data_dir, len(train_set), len(valid_set), config.num_frames_input,
        config.num_frames_output,
    )  # fmt: skip
    log.info(
        "training   epochs %d to %d, %d updates each of batch %d, %s lr %g %s, %s, effective batch %d",
        first_epoch, config.epochs, updates, config.train_batch_size, config.optimizer, config.lr,
        config.schedule, config.precision, config.train_batch_size,
    )  # fmt: skip
    log.info("run folder %s", folder)
    configuration.save_toml(config, folder / "config.toml")

    purge = (first_epoch - 1) * updates + 1  # steps that will be written again
    board = SummaryWriter(folder / "tensorboard", purge_step=purge) if config.tensorboard else None

    def record(epoch, step=updates, **values):
        with open(log_file, "a", encoding="utf-8") as f:
            f.write(json.dumps({"epoch": epoch, "step": step, **values}) + "\n")
        if board:
            for name, value in values.items():
                board.add_scalar(name, value, (epoch - 1) * updates + step)
            board.flush()

    # Loop
    started = time.perf_counter()
    for epoch in range(first_epoch, config.epochs + 1):
        train_loader.sampler.epoch = epoch
        loss = train_one_epoch(
            model, train_loader, optimizer, partial(learning_rate, epoch), device, clip_grad=config.clip_grad,
            grad_checkpoint=config.grad_checkpoint, precision=config.precision, log_every=config.log_train,
            log=lambda step, mean: record(epoch=epoch, step=step, train_loss=mean, lr=learning_rate(epoch, step)),
            title=f"epoch {epoch}/{config.epochs}",
        )  # fmt: skip
        curves["epoch"].append(epoch)
        curves["loss"].append(loss)

        if epoch % config.epoch_valid == 0 or epoch == config.epochs:

            def pictures(step, inputs, targets, forecast):
                if (step - 1) % config.log_valid == 0:
                    name = folder / "pictures" / f"epoch{epoch:04d}_batch{step:04d}.png"
                    save_strip(name, inputs[0].cpu(), targets[0].cpu(), forecast[0].cpu(), f"epoch {epoch}")

            make_folder(folder / "pictures")
            results = evaluate(
                model,
                valid_loader,
                device,
                DATASETS[config.dataset].metrics,
                config.precision,
                on_batch=pictures,
                title=f"validate {epoch}",
            )
            metrics = results["model"]["mean"]
            if not math.isfinite(results["loss"]):  # and last.pt stays what it was
                raise UserError(
                    f"the validation loss of epoch {epoch} is {results['loss']}: lower --lr or set --clip_grad 1"
                )
            seconds = round(time.perf_counter() - started, 1)
            record(epoch=epoch, train_loss=loss, valid_loss=results["loss"], seconds=seconds, **metrics)
            curves["valid_epoch"].append(epoch)
            curves["valid_loss"].append(results["loss"])
            save_curve(folder / "loss.png", *curves.values())
            if metrics["mse"] < best_mse:
                best_mse = metrics["mse"]
                checkpoint.save_weights(best, model, config.to_dict())
            log.info(
                "epoch %d  train loss %.4f  valid loss %.4f  MSE %.2f  ssim %.4f  best MSE %.2f  %.0f s",
                epoch, loss, results["loss"], metrics["mse"], metrics["ssim"], best_mse, seconds,
            )  # fmt: skip
        checkpoint.save_checkpoint(
            last, model=model.state_dict(), optimizer=optimizer.state_dict(),
            rng=torch.get_rng_state(), epoch=epoch, best_mse=best_mse, curves=curves, config=config.to_dict(),
        )  # fmt: skip
    log.info("done: %s", folder)
    if best.exists():
        log.info("best MSE on the validation set %.2f; next: python test.py --checkpoint %s", best_mse, best)


if __name__ == "__main__":
    run_program(main)
