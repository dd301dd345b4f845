"""What a run reports while it trains: log.jsonl, loss.png, pictures, TensorBoard."""

from vmrnn.files import make_folder
from vmrnn.run_folder import read_log


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


class RunLogger(Logger):
    """Writes log.jsonl, loss.png, forecast.gif and pictures/ into the run folder, and tells `others`.

    run         RunFolder
    batch       sequences per update
    log_valid   validation batches between saved pictures
    others      further loggers
    """

    def __init__(self, run, batch, log_valid, others=()):
        # Imported here, by the one process that draws: matplotlib takes a second.
        from vmrnn import pictures

        self.pictures = pictures
        self.run, self.batch, self.log_valid, self.others = run, batch, log_valid, others

    def training(self, progress, values):
        self.write(progress, values)
        for other in self.others:
            other.training(progress, values)

    def validation(self, progress, values, per_frame):
        self.write(progress, values)
        self.pictures.save_curve(self.run.path / "loss.png", read_log(self.run.log_file))
        for other in self.others:
            other.validation(progress, values, per_frame)

    def write(self, progress, values):
        progress.count_time()
        place = {"epoch": progress.epoch, "step": progress.step, "samples": progress.global_step * self.batch,
                 "seconds": round(progress.seconds, 2)}  # fmt: skip
        self.run.append_to_log(place | values)

    def forecast(self, progress, batch, inputs, targets, forecast):
        if (batch - 1) % self.log_valid:
            return
        sequence = [frames[0].float().cpu() for frames in (inputs, targets, forecast)]
        folder = make_folder(self.run.path / "pictures")
        path = folder / f"epoch{progress.epoch:04d}_batch{batch:04d}.png"
        self.pictures.save_strip(path, *sequence, f"epoch {progress.epoch}")
        self.picture(progress, f"forecast/batch {batch}", path)
        if batch == 1:
            path = self.run.path / "forecast.gif"
            self.pictures.save_animation(path, *sequence)
            self.picture(progress, "forecast/animation", path)

    def picture(self, progress, name, path):
        for other in self.others:
            other.picture(progress, name, path)


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
    return RunLogger(run, config.train_batch_size, config.log_valid, others)
