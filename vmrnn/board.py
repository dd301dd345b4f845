"""What TensorBoard shows of a run."""

import time
from pathlib import Path

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from vmrnn.logger import Logger


class Board(Logger):
    """Writes the TensorBoard event file of a run into `folder`.

    progress   Progress at the start; entries after it come from an interrupted start and are dropped
    batch      sequences per update
    """

    def __init__(self, folder, progress, batch):
        self.writer = SummaryWriter(folder, purge_step=progress.global_step + 1)
        self.batch = batch
        self.since = progress.global_step, time.perf_counter()

    def __str__(self):
        return "TensorBoard"

    def training(self, progress, values):
        # Sequences per second since the last call, validation included
        step, moment = self.since
        self.since = progress.global_step, time.perf_counter()
        speed = (progress.global_step - step) * self.batch / (self.since[1] - moment)
        self.scalars(progress, values | {"sequences_per_second": speed})

    def validation(self, progress, values, per_frame):
        lead_times = {f"{name}_at/{t:03d}": v for name, vs in per_frame.items() for t, v in enumerate(vs, 1)}
        self.scalars(progress, values | lead_times)

    def scalars(self, progress, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, progress.global_step)
        self.writer.flush()

    def picture(self, progress, name, path):
        # The file goes in as it is: TensorBoard plays GIFs, and its own encoder would need moviepy.
        with Image.open(path) as image:
            width, height = image.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=Path(path).read_bytes())
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self.writer.file_writer.add_summary(summary, progress.global_step)
