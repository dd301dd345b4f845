"""The table of data sets: one row per data set, and the only list of their names.

It imports nothing but the standard library, so that options can be read before torch is imported.
"""

from dataclasses import dataclass

SPLITS = ("train", "valid", "test")
SPLIT_NAMES = {"train": "training", "valid": "validation", "test": "test"}  # in messages

IMAGE_METRICS = ("mse", "mae", "mse_pixel", "mae_pixel", "ssim", "ssim_dr2", "psnr", "psnr_uint8")
FIELD_METRICS = ("mse", "mae", "mse_pixel", "mae_pixel", "ssim", "psnr")


@dataclass(frozen=True)
class Spec:
    """The facts of one data set.

    description   one line for reports
    metrics       names from vmrnn.metrics, in the order of the tables
    find          "module:function" that makes the data set of one split: find(split, options, value_range), where
                  options is a vmrnn.config.Config, and value_range is the ValueRange of the training data or None
    selects       the sequences that select the best checkpoint, never the test set; "" for the user's own data
    own           whether the data are the user's own, so that their range, size and missing values are options
    channels      the value that input_channels must have; None: any number
    pictures      whether the data are pictures, which are resized when they are decoded into the cache
    field         whether the values have a unit: they are drawn with a scale of colours, not in grey
    antialias     whether resizing smooths what it shrinks
    data_range    (low, high), the stored values that become 0 and 1; None: data_range says, or the data
    section       the section of data/README.md that says where to get data that nothing fetches by itself
    """

    description: str
    metrics: tuple
    find: str
    selects: str = ""
    own: bool = False
    channels: int | None = None
    pictures: bool = False
    field: bool = False
    antialias: bool = True
    data_range: tuple | None = None
    section: str = ""

    def selection(self, config):
        """The sequences that select the best checkpoint of a run with this Config, in words."""
        if not self.own:
            return self.selects
        if config.valid_data_dir:
            return config.valid_data_dir
        test = 0 if config.test_data_dir else config.test_fraction
        last = f"before the last {100 * test:g} %" if test else "at the end"
        part = "each clip's time" if config.split_by == "time" else "the clips"
        return f"the {100 * config.valid_fraction:g} % of {part} {last}"


DATASETS = {
    "moving_mnist": Spec(
        description="handwritten digits that move and bounce (Srivastava et al. 2015); values in [0, 1]",
        metrics=IMAGE_METRICS,
        selects="sequences generated from digits that training does not use",
        find="vmrnn.data.moving_mnist:moving_mnist",
    ),
    "kth": Spec(
        description="25 people in 6 actions, grey video (Schuldt et al. 2004); test 10 -> 20 or 40",
        metrics=IMAGE_METRICS,
        selects="person 16, whom training does not use",
        find="vmrnn.data.published:kth",
        pictures=True,
        antialias=False,  # cv2.resize, as in the literature
        channels=1,
        data_range=(0.0, 255.0),
        section="KTH",
    ),
    "taxibj": Spec(
        description="inflow and outflow of taxis in Beijing, every 30 minutes (Zhang et al. 2017)",
        metrics=("mse", "mae", "rmse", "mse_pixel", "mae_pixel", "ssim", "ssim_dr2", "psnr"),
        selects="the last tenth of X_train",
        find="vmrnn.data.published:taxibj",
        field=True,
        channels=2,
        data_range=(-1.0, 1.0),
        section="TaxiBJ",
    ),
    "human36m": Spec(
        description="people in 15 scenarios, colour video (Ionescu et al. 2014), every fifth frame",
        metrics=IMAGE_METRICS,
        selects="the last tenth of each training clip",
        find="vmrnn.data.published:human36m",
        pictures=True,
        channels=3,
        data_range=(0.0, 255.0),
        section="Human3.6M",
    ),
    "video": Spec(
        description="your own: a video or a folder of videos",
        metrics=FIELD_METRICS,
        find="vmrnn.data.own:video",
        pictures=True,
        own=True,
    ),
    "frames": Spec(
        description="your own: a folder of folders of images",
        metrics=FIELD_METRICS,
        find="vmrnn.data.own:frames",
        pictures=True,
        own=True,
    ),
    "array": Spec(
        description="your own: .npy or .npz, (T, H, W[, C]) or (N, T, H, W[, C])",
        metrics=FIELD_METRICS,
        find="vmrnn.data.own:array",
        field=True,
        own=True,
    ),
    "grid": Spec(
        description="your own: gridded fields in NetCDF, HDF5, Zarr, GRIB, GeoTIFF or TIFF",
        metrics=FIELD_METRICS,
        find="vmrnn.data.own:grid",
        field=True,
        own=True,
    ),
}

OWN = tuple(name for name, spec in DATASETS.items() if spec.own)
DIGITS = ("digits_split", "num_objects", "digit_size", "step_length")  # the options of Moving MNIST alone
