"""What a run reports while it trains: log.jsonl, loss.png, pictures, TensorBoard."""

import logging
from contextlib import contextmanager

from vmrnn.errors import UserError, first_line
from vmrnn.files import make_folder
from vmrnn.run_folder import read_log

log = logging.getLogger("vmrnn")


class Logger:
    """Takes what a run reports. This one ignores everything: it is the logger of all processes but the first.

    A new kind of logger overrides what it shows, and joins the list in make_logger.
    """

    def training(self, progress, values):
        """values {name: number}: training loss, norm of the gradient and learning rate since the last call."""

    def validation(self, progress, values, per_frame):
        """values {name: number}; per_frame {metric: [value of each lead time]}."""

    def forecast(self, progress, batch, inputs, targets, forecast):
        """The first sequences of validation batch `batch` (from 1): tensors (B, T, C, H, W) in [0, 1]."""

    def picture(self, progress, name, path):
        """A PNG or GIF that was saved at `path`."""

    def curve(self):
        """Called after the weights of a validated epoch were saved: draw what the whole log says."""


class RunLogger(Logger):
    """Writes log.jsonl, loss.png, forecast.gif and pictures/ into the run folder, and tells `others`.

    run      RunFolder
    state    RunState at the start of the run
    others   further loggers
    """

    def __init__(self, run, state, others=()):
        # Imported here, by the one process that draws: matplotlib takes a second.
        from vmrnn import pictures
        from vmrnn.colours import Look

        self.pictures, self.look_of = pictures, Look.of
        self.run, self.config, self.value_range, self.others = run, state.config, state.value_range, others
        self.batch = state.config.train_batch_size  # sequences per update

    def training(self, progress, values):
        self.write(progress, values)
        for other in self.others:
            with harmless("training", other):
                other.training(progress, values)

    def validation(self, progress, values, per_frame):
        self.write(progress, values)
        for other in self.others:
            with harmless("validation", other):
                other.validation(progress, values, per_frame)

    def write(self, progress, values):
        progress.count_time()
        place = {"epoch": progress.epoch, "step": progress.step, "samples": progress.global_step * self.batch,
                 "seconds": round(progress.seconds, 2)}  # fmt: skip
        with harmless("an entry", self.run.log_file):
            self.run.append_to_log(place | values)

    def forecast(self, progress, batch, inputs, targets, forecast):
        if (batch - 1) % self.config.log_valid:
            return
        with harmless("the pictures", self.run.path):
            sequence = [frames[0].float().cpu() for frames in (inputs, targets, forecast)]
            look = self.look_of(self.config, self.value_range, sequence[:2])
            path = self.run.path / "pictures" / f"epoch{progress.epoch:04d}_batch{batch:04d}.png"
            with harmless("a picture", path):
                make_folder(path.parent)
                self.pictures.save_strip(path, *sequence, f"epoch {progress.epoch}", look=look)
                self.picture(progress, f"forecast/batch {batch}", path)
            if batch == 1:
                path = self.run.path / "forecast.gif"
                with harmless("the animation", path):
                    self.pictures.save_animation(path, *sequence, look=look)
                    self.picture(progress, "forecast/animation", path)

    def picture(self, progress, name, path):
        for other in self.others:
            with harmless(name, other):
                other.picture(progress, name, path)

    def curve(self):
        path = self.run.path / "loss.png"
        with harmless("the curve", path):
            entries = read_log(self.run.log_file)
            if any("valid_loss" in entry for entry in entries):
                self.pictures.save_curve(path, entries)


@contextmanager
def harmless(what, where):
    """Turn an error of the block into a warning: no picture and no line of a log is worth the training behind it.

    Every error is caught, because matplotlib, TensorBoard and loggers of users each raise their own kinds. One that is
    neither of a file nor of the data is a fault in a program, so its traceback is logged as well.
    """
    try:
        yield
    except Exception as error:
        line, expected = first_line(error), isinstance(error, OSError | UserError)
        log.warning(
            "warning: %s was not written to %s (%s); training continues", what, where, line, exc_info=not expected
        )


def make_logger(run, state):
    """The logger of this process.

    run     RunFolder
    state   RunState at the start of the run
    """
    config, others = state.config, []
    if not run.writes:
        return Logger()
    if config.tensorboard:
        from vmrnn.board import Board  # TensorBoard is imported only if it is asked for

        others.append(Board(run.path / "tensorboard", state.progress, config.train_batch_size))
    return RunLogger(run, state, others)
