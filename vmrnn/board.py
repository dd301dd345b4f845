"""What TensorBoard shows of a run."""

import time
from pathlib import Path

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter


class Board:
    """The event file of a run in `folder`; what an earlier start wrote after `begun` updates is dropped."""

    def __init__(self, folder, begun):
        self.writer = SummaryWriter(folder, purge_step=begun + 1)
        self.since = begun, time.perf_counter()

    def scalars(self, values, update):
        for name, value in values.items():
            self.writer.add_scalar(name, value, update)
        self.writer.flush()

    def throughput(self, batch, update):
        """Sequences a second since the last call, validation included; batch: sequences of an update."""
        (before, moment), self.since = self.since, (update, time.perf_counter())
        self.scalars({"sequences_per_second": (update - before) * batch / (self.since[1] - moment)}, update)

    def lead_times(self, per_frame, update):
        """per_frame {metric: [value of each lead time]}, as Metrics.compute() has it."""
        self.scalars({f"{name}_at/{t:03d}": v for name, vs in per_frame.items() for t, v in enumerate(vs, 1)}, update)

    def picture(self, name, path, update):
        """A PNG or a GIF as it is: TensorBoard plays animations, and its own encoder would need moviepy."""
        with Image.open(path) as image:
            width, height = image.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=Path(path).read_bytes())
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), update)
