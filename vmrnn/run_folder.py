"""The folder of one run: what a start resumes from, the lock, and every file that a run needs to continue.

config.toml              the options
log.jsonl                one line of JSON per entry: training loss every log_train updates, metrics per validation
last.pt                  everything that the run needs to continue
previous_last.pt         the save before last.pt
best.safetensors         the weights with the smallest validation MSE
failed_update_rank0.pt   the batch and the weights of an update whose loss was not finite
lock                     held while a process trains here
loss.png, forecast.gif, pictures/, tensorboard/   see vmrnn.logger
"""

import errno
import json
import logging
import math
import os
import re
import time
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path

import filelock

from vmrnn import checked, checkpoint, config as configuration
from vmrnn.errors import UserError
from vmrnn.files import make_folder, replacing
from vmrnn.values import ValueRange

log = logging.getLogger("vmrnn")

# Errors of a file system that cannot lock files, as NFS and Lustre may be mounted
NO_LOCKS = errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP

# Names in a run folder that are ours, as a regular expression
OURS = (
    r"(previous_)?last\.pt|best\.safetensors|(previous_)?failed_update_rank\d+\.pt|config\.toml|log\.jsonl|lock|"
    r"loss\.png|forecast\.gif|pictures|tensorboard|test.*|.*\.kept\d+|\..*\.tmp"
)


@dataclass
class Progress:
    """How far a run is.

    updates_per_epoch   updates of the weights per epoch
    epoch               the epoch that is running, from 1
    step                updates of this epoch that are done
    loss                sum of the losses of these updates
    window              losses since the last training loss in log.jsonl
    seconds             time of training and validation, over all starts of the run
    best_mse            smallest validation MSE so far
    log_size            bytes of log.jsonl at the last save
    """

    updates_per_epoch: int
    epoch: int = 1
    step: int = 0
    loss: float = 0.0
    window: list[float] = field(default_factory=list)
    seconds: float = 0.0
    best_mse: float = math.inf
    log_size: int = 0

    def __post_init__(self):
        self.clock = time.perf_counter()

    @property
    def global_step(self):
        """Updates that are done since the run began."""
        return self.epoch_start + self.step

    @property
    def epoch_start(self):
        """Updates that were done before this epoch."""
        return (self.epoch - 1) * self.updates_per_epoch

    def count_time(self):
        """Add the time since the last call to `seconds`, and return it."""
        now = time.perf_counter()
        passed, self.clock = now - self.clock, now
        self.seconds += passed
        return passed

    def add_update(self, update):
        """Count an update, a functions.Update."""
        self.step = update.step
        self.loss += update.loss
        self.window.append(update.loss)

    def take_window(self):
        """The mean loss since the last call."""
        mean, self.window = sum(self.window) / len(self.window), []
        return mean

    def next_epoch(self):
        self.epoch, self.step, self.loss, self.window = self.epoch + 1, 0, 0.0, []

    def to_dict(self):
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "updates_per_epoch"}


@dataclass
class RunState:
    """Everything that training changes, and the facts that are stored beside it.

    model, ema    the network and its averaged weights (timm's ModelEmaV3) or None
    optimizer     torch.optim.Optimizer
    scaler        torch.amp.GradScaler
    progress      Progress
    config        vmrnn.config.Config
    value_range   ValueRange of the training data
    data          {"train": checksum of the training data, "valid": that of the validation data}
    """

    model: object
    ema: object
    optimizer: object
    scaler: object
    progress: Progress
    config: object
    value_range: ValueRange
    data: dict

    def to_dict(self):
        """The contents of last.pt."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": self.progress.to_dict(),
            "config": self.config.to_dict(),
            "value_range": self.value_range.to_dict(),
            "data": self.data,
        }

    def load(self, content):
        """Continue from the contents of a last.pt. Learning rate and weight decay stay those of the configuration.

        UserError: the contents are not those of a run with this configuration; a file may come from anywhere.
        """
        checkpoint.load_weights(self.model, content["model"])
        if self.ema:
            checkpoint.load_weights(self.ema.module, content.get("ema") or {})
        # Nothing of the file reaches the optimiser or the scaler before it is checked: torch trusts it.
        try:
            moments = checked.checked_moments(self.optimizer, content["optimizer"].get("state"))
            if self.scaler.is_enabled() and content.get("scaler"):
                checked.check_like(content["scaler"], self.scaler.state_dict(), "the scaler")
            checked.check_like(content["position"], Progress(1).to_dict(), "the position")
        except ValueError as error:
            raise UserError(f"the checkpoint to resume from cannot be used: {error}; start a new run") from error
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        if self.scaler.is_enabled() and content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        self.progress = Progress(self.progress.updates_per_epoch, **content["position"])
        # The data and their range must be those that the run began with.
        changed = [split for split, checksum in (content.get("data") or {}).items() if self.data.get(split) != checksum]
        if changed:
            raise UserError(
                f"the data of the run changed since it began: {', '.join(changed)}; bring them back, or start a new run"
            )
        stored = content.get("value_range")
        if stored and ValueRange.from_dict(stored) != self.value_range:
            raise UserError(
                f"the training data changed: their range is {self.value_range}, and was "
                f"{ValueRange.from_dict(stored)} when the run began; start a new run"
            )


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run continues from, which is read once.

    content   what read_checkpoint returned
    path      the file that was read: last.pt or, if that is damaged, the one before it
    stamp     what stamp_of(path) was then
    """

    content: dict
    path: Path
    stamp: tuple

    @classmethod
    def read(cls, path):
        """UserError: the checkpoint cannot be read, or does not hold what a run needs to continue."""
        content, source = checkpoint.read_last_checkpoint(path)
        if "optimizer" not in content:
            raise UserError(f"--resume {path}: holds only weights; use --init_from to start from them")
        if "position" not in content:
            raise UserError(f"--resume {path}: of an older version; use --init_from to start from its weights")
        return cls(content, source, stamp_of(source))


# Where a start gets its weights from, by --resume and by what the run folder holds:
#   no --resume,    a folder without a run        a new run
#   no --resume,    a folder with a run           refused: nothing is overwritten
#   --resume auto,  a folder without a run        a new run, so that a job script can always say auto
#   --resume auto,  a folder with a run           continues it from its last.pt
#   --resume FILE,  FILE's own folder             continues it from FILE; this is the folder unless --res_dir is given
#   --resume FILE,  another folder without a run  continues there, with a new log and a new best; FILE's folder stays
#   --resume FILE,  another folder with a run     refused
# If last.pt is damaged or missing, previous_last.pt takes its place, with a warning. The damaged file is kept. A
# last.pt that cannot be read, or that a newer version wrote, is refused: it may be whole.
# A folder without a run has no last.pt. If it has best weights or a log all the same, it is refused, see check_new.
def checkpoint_to_resume(folder, resume):
    """Path of the checkpoint that a start in `folder` continues from; None: a new run.

    resume   None, "auto" or the path of a checkpoint
    UserError: the folder already holds another run.
    """
    last = Path(folder) / "last.pt"
    exists = last.exists() or checkpoint.previous_of(last).exists()
    if resume == "auto" and exists:
        return last
    if exists and (resume is None or last.resolve() != Path(resume).resolve()):
        raise UserError(f"{last.parent} already holds a run: --resume auto continues it; or give another --res_dir")
    if not exists:
        check_new(last.parent, resume)
    return None if resume == "auto" else resume


def check_new(folder, resume):
    """UserError: a run that begins in `folder`, which has no last.pt, would destroy something there.

    Files that the run would not touch are reported with a warning.
    """
    try:
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); choose another folder with --res_dir") from error
    if "best.safetensors" in names:
        raise UserError(
            f"{folder}: holds best.safetensors of a run whose last.pt is gone: --init_from starts from it in another "
            "--res_dir, or move it away"
        )
    # A run that was killed before its first save may have a log. With --resume auto a job script starts it again, and
    # no person is there to move the log.
    if resume != "auto" and file_size(folder / "log.jsonl"):
        raise UserError(
            f"{folder}: holds the log.jsonl of a run without a last.pt: give another --res_dir, or move it away"
        )
    if file_size(folder / "lock"):
        raise UserError(f"{folder / 'lock'}: is not the lock of a run; give another --res_dir, or move it away")
    if foreign := sorted(name for name in names if not re.fullmatch(OURS, name)):
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        log.warning("run folder %s already holds %s, which is not of a run and stays as it is", folder, shown)


def stamp_of(path):
    """(inode, bytes, time of change in ns): it changes when a file is replaced. None if the file does not exist."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def file_size(path):
    """Bytes of a file; 0 if it does not exist."""
    try:
        return os.path.getsize(path)
    except (FileNotFoundError, NotADirectoryError):
        return 0


def keep(path):
    """Rename a file, if it exists, to a free name beside it: last.pt becomes last.pt.kept1. Returns the new path."""
    number = 1
    while os.path.lexists(kept := path.with_name(f"{path.name}.kept{number}")):
        number += 1
    if os.path.lexists(path):
        os.replace(path, kept)
    return kept


class RunFolder:
    """The run folder at `path`. All processes of a run have one, and the first process writes to it.

    As a context it keeps the lock, once `open` took it, until the end.
    """

    def __init__(self, path, writes=True):
        self.path, self.writes = Path(path), writes
        self.last = self.path / "last.pt"
        self.best = self.path / "best.safetensors"
        self.log_file = self.path / "log.jsonl"
        self.lock = filelock.FileLock(self.path / "lock", timeout=0)
        self.saved = 0, time.perf_counter()  # global step and time of the last save, or of the start
        self.seconds_per_save = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.lock.release()

    def open(self, state, resumed):
        """Take the folder for this process, and bring its files to where `state` is.

        resumed   Resumed, or None for a new run
        UserError: another process trains in the folder, or took the run further since the checkpoint was read.
        """
        # A run that continues in another folder has a new log and a new best there.
        previous = checkpoint.previous_of(self.last)
        same_folder = resumed and resumed.path.resolve() in (self.last.resolve(), previous.resolve())
        if resumed and not same_folder:
            state.progress.best_mse, state.progress.log_size = math.inf, 0
        self.saved = state.progress.global_step, time.perf_counter()
        if not self.writes:
            return

        # Take the lock. The data were prepared after the checkpoint was read, which may have taken minutes: another
        # process may have trained here and ended.
        make_folder(self.path / "pictures")
        try:
            self.lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{self.path}: another process trains there; wait for it, or give another --res_dir"
            ) from None
        except (NotImplementedError, OSError) as error:  # some versions of filelock raise the first
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            log.warning("%s: this file system has no locks; make sure that no other process trains there", self.path)
        changed = resumed.stamp != stamp_of(resumed.path) if same_folder else self.last.exists()
        if changed:
            raise UserError(f"{self.path}: another process trained there while this one prepared its data; start again")

        # Remove what a kill in the middle of a save left.
        for cut_off in (*self.path.glob(".*.tmp"), *self.path.glob("pictures/.*.tmp")):
            cut_off.unlink()
        # The run continues from previous_last.pt, so last.pt is damaged or missing. The next save would move a damaged
        # last.pt onto previous_last.pt.
        if same_folder and resumed.path.resolve() == previous.resolve():
            keep(self.last)
            os.replace(resumed.path, self.last)
        # A log of a run without a checkpoint is kept under another name.
        if not same_folder and file_size(self.log_file):
            log.warning(
                "%s: a run ended before its first save; its log is kept as %s", self.path, keep(self.log_file).name
            )
        # Cut the log to its length at the checkpoint: later updates are done again and logged again.
        self.log_file.touch()
        os.truncate(self.log_file, min(state.progress.log_size, file_size(self.log_file)))
        toml = self.path / "config.toml"
        if not same_folder and toml.exists() and toml.read_bytes() != configuration.to_toml(state.config).encode():
            log.warning("%s: another one was there and is kept as %s", toml, keep(toml).name)
        with replacing(toml) as temporary:
            configuration.save_toml(state.config, temporary)

    def save_due(self, state):
        """Whether the option save_every asks for a save."""
        step, moment = self.saved
        return state.config.is_save_due(state.progress.global_step - step, time.perf_counter() - moment)

    def is_saved(self, state):
        """Whether the last save, or the checkpoint that the run continues from, holds all updates that are done."""
        return self.saved[0] == state.progress.global_step

    def save(self, state):
        """Write last.pt."""
        state.progress.count_time()
        self.saved = state.progress.global_step, time.perf_counter()
        if self.writes:
            state.progress.log_size = file_size(self.log_file)
            checkpoint.save_checkpoint(self.last, state.to_dict())
        self.seconds_per_save = state.progress.count_time()

    def save_best(self, state, model, mse):
        """Write best.safetensors if `mse`, of the network `model`, is the smallest so far."""
        if mse < state.progress.best_mse:
            state.progress.best_mse = mse
            if self.writes:
                checkpoint.save_weights(self.best, model, state.config.to_dict(), state.value_range)

    def save_failed_update(self, state, failure, rank):
        """Keep the micro-batch and the weights of an update whose loss is not finite; returns the file's path."""
        path = self.path / f"failed_update_rank{rank}.pt"
        stored = ("model", "config", "position", "value_range")
        content = {key: value for key, value in state.to_dict().items() if key in stored}
        checkpoint.save_checkpoint(path, content | {"inputs": failure.inputs, "targets": failure.targets})
        return path

    def append_to_log(self, entry):
        """Add one entry, a dict, to log.jsonl."""
        line = (strict_json(entry) + "\n").encode()
        with open(self.log_file, "ab", buffering=0) as f:
            size = f.seek(0, os.SEEK_END)
            try:
                if f.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                f.truncate(size)  # no half of a line
                raise


def read_log(path):
    """The entries of a log.jsonl, a list of dicts. Lines that are not entries are skipped with one warning."""
    entries, skipped = [], []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            skipped.append(number)
    if skipped:
        warn_once(path, skipped[0], len(skipped))
    return entries


@cache
def warn_once(path, line, count):
    log.warning("%s: line %d is not an entry and is skipped (%d such lines)", path, line, count)


def strict_json(value, indent=None):
    """`value` as JSON text. Numbers that are not finite become null, since JSON has no NaN and no infinity."""
    return json.dumps(without_nan(value), indent=indent, allow_nan=False)


def without_nan(value):
    """`value`, made of dicts, lists and numbers, with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
