"""The table of data sets: the facts of each that the programs need to know."""

from collections.abc import Callable
from dataclasses import dataclass

from vmrnn.data import splits

IMAGE_METRICS = ("mse", "mae", "mse_pixel", "mae_pixel", "ssim", "ssim_dr2", "psnr", "psnr_uint8")
FIELD_METRICS = ("mse", "mae", "mse_pixel", "mae_pixel", "ssim", "psnr")


@dataclass(frozen=True)
class Spec:
    """The facts of one data set that the programs need to know; None: the configuration says."""

    description: str
    metrics: tuple  # names of vmrnn.metrics.CONVENTIONS, in the order of the tables
    selects: str  # the sequences that select the checkpoint, never the test set
    shape: tuple | None = None  # (C, H, W) of the literature; other sizes work where the frames are resized
    frames: tuple | None = None  # (input, output) of training in the literature
    data_range: tuple | None = None  # (low, high), the stored values that become 0 and 1
    find: Callable | None = None  # vmrnn.data.splits: (clips, windows) of a split


DATASETS = {
    "moving_mnist": Spec(
        description="two handwritten digits that move and bounce (Srivastava et al. 2015); values in [0, 1]",
        metrics=IMAGE_METRICS,
        selects="sequences generated from digits that training does not use",
        shape=(1, 64, 64),
        frames=(10, 10),
    ),
    "kth": Spec(
        description="25 people in 6 actions, grey video (Schuldt et al. 2004); test 10 -> 20 or 40",
        metrics=IMAGE_METRICS,
        selects="person 16, whom training does not use",
        shape=(1, 128, 128),
        frames=(10, 10),
        data_range=(0.0, 255.0),
        find=splits.kth,
    ),
    "taxibj": Spec(
        description="inflow and outflow of taxis in Beijing, every 30 minutes (Zhang et al. 2017)",
        metrics=("mse", "mae", "rmse", "mse_pixel", "mae_pixel", "ssim", "ssim_dr2", "psnr"),
        selects="the last tenth of X_train",
        shape=(2, 32, 32),
        frames=(4, 4),
        data_range=(-1.0, 1.0),
        find=splits.taxibj,
    ),
    "human36m": Spec(
        description="people in 15 scenarios, colour video (Ionescu et al. 2014), every fifth frame",
        metrics=IMAGE_METRICS,
        selects="the last tenth of each training clip",
        shape=(3, 128, 128),
        frames=(4, 4),
        data_range=(0.0, 255.0),
        find=splits.human36m,
    ),
    "video": Spec(
        description="your own: a video or a folder of videos",
        metrics=FIELD_METRICS,
        selects="valid_data_dir, or a part of train_data_dir (split_by, valid_fraction)",
        data_range=(0.0, 255.0),
    ),
    "frames": Spec(
        description="your own: a folder of folders of images",
        metrics=FIELD_METRICS,
        selects="valid_data_dir, or a part of train_data_dir (split_by, valid_fraction)",
    ),
    "array": Spec(
        description="your own: .npy or .npz, (T, H, W[, C]) or (N, T, H, W[, C])",
        metrics=FIELD_METRICS,
        selects="valid_data_dir, or a part of train_data_dir (split_by, valid_fraction)",
    ),
}

OWN = ("video", "frames", "array")
