"""Forecasts of a whole test set: written while they are made, and read back from any method's file."""

import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from vmrnn.data.arrays import npz_member, npz_rows, open_npy
from vmrnn.data.grid_axes import labels_of, rows_first, scalar_levels, unlike_place
from vmrnn.data.grid_files import is_zarr
from vmrnn.data.grid_info import import_xarray, label_notes, unlike_level
from vmrnn.data.units import same_unit
from vmrnn.errors import UserError
from vmrnn.files import replacing

NAMES = ("input", "truth", "forecast")
ENDINGS = (".nc", ".npz", ".zarr")
FIELDS = (".nc", ".zarr")


class ForecastWriter:
    """Writes inputs, truths and forecasts of all sequences into one file, a batch at a time.

    path          .nc, .zarr or .npz; the arrays input, truth and forecast are (N, T, C, H, W), float32 in the units of
                  the data, NaN where a pixel is missing
    count         number of sequences
    value_range   ValueRange of the data
    facts         FieldFacts of the test set, whose names, units, coordinates and times are written

    with ForecastWriter(...) as writer: call it with each batch. The file appears under its name at the end, and only if
    no error was raised.

    UserError: a file that cannot be written.
    """

    def __init__(self, path, count, value_range, facts):
        self.path, self.count, self.value_range = Path(path), count, value_range
        self.facts, self.info, self.written, self.arrays = facts, facts.info, 0, None
        self.file = None  # an open h5netcdf.File
        if self.path.suffix.lower() not in ENDINGS:
            raise UserError(f"--save_forecasts {path}: its name must end as one of {' '.join(ENDINGS)}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The folder is on the same disk, so that the finished file can take its name.
        self.folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))

    def __call__(self, inputs, targets, forecast):
        """Add a batch, tensors (B, T, C, H, W) on the scale [0, 1]."""
        batch = [
            self.value_range.to_data(frames.float().cpu(), axis=2).numpy() for frames in (inputs, targets, forecast)
        ]
        if self.arrays is None:
            self.arrays = self.create([frames.shape[1:] for frames in batch])
        stop = self.written + len(batch[0])
        for array, frames in zip(self.arrays, batch):
            array[self.written : stop] = frames
        self.written = stop

    def create(self, shapes):
        """The three arrays in their file, for frames of these shapes (T, C, H, W)."""
        suffix = self.path.suffix.lower()
        if suffix == ".npz":
            return [
                np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", np.float32, (self.count, *shape))
                for name, shape in zip(NAMES, shapes)
            ]
        dims = "channel", *self.plane()
        axes = [("sequence", time, *dims) for time in ("input_time", "time", "time")]
        about = {"units": self.info.units(0)} if self.info and len(self.info.names) == 1 else {}
        create = self.create_zarr if suffix == ".zarr" else self.create_netcdf
        return create(self.coordinates(shapes), shapes, axes, about)

    def create_zarr(self, header, shapes, axes, about):
        """The arrays in a Zarr store.

        header   xarray.Dataset of the coordinates
        shapes   (T, C, H, W) of each array
        axes     names of the dimensions of each array
        about    attributes of all of them
        """
        try:
            import zarr
        except ImportError as error:
            raise UserError(f"{self.path}: needs the package zarr; pip install zarr, or name a .nc file") from error
        if not hasattr(zarr.Group, "create_array"):
            raise UserError(f"{self.path}: needs zarr 3, not {zarr.__version__}; pip install --upgrade zarr")
        header.to_zarr(self.folder / "store", mode="w", consolidated=False)
        group = zarr.open_group(self.folder / "store", mode="a")
        return [
            group.create_array(
                name, shape=(self.count, *shape), chunks=(1, *shape), dtype="f4", fill_value=np.nan,
                dimension_names=axis, attributes=about,
            )
            for name, shape, axis in zip(NAMES, shapes, axes)
        ]  # fmt: skip

    def create_netcdf(self, header, shapes, axes, about):
        """The arrays in a NetCDF file; parameters as in create_zarr."""
        import h5netcdf

        header.to_netcdf(self.folder / "store", engine="h5netcdf")
        self.file = h5netcdf.File(self.folder / "store", "a")
        variables = []
        for name, shape, axis in zip(NAMES, shapes, axes):
            for dim, size in zip(axis, (self.count, *shape)):
                if dim not in self.file.dimensions:
                    self.file.dimensions[dim] = size
            variable = self.file.create_variable(
                name, axis, "f4", chunks=(1, *shape), compression="gzip", compression_opts=4, shuffle=True,
                fillvalue=np.nan,
            )  # fmt: skip
            variable.attrs.update(about)
            variables.append(variable)
        return variables

    def plane(self):
        """Names of the dimensions of rows and columns."""
        return (self.info.y, self.info.x) if self.info else ("y", "x")

    def coordinates(self, shapes):
        """An xarray.Dataset of what is known of the axes."""
        xarray = import_xarray()
        (inputs, channels, height, width), (horizon, *_), _ = shapes
        found = xarray.Dataset(coords={"input_time": np.arange(1 - inputs, 1)})
        found.input_time.attrs["long_name"] = "frames after the last input frame"
        lead = np.arange(1, horizon + 1), {"long_name": "frames after the last input frame", "units": "1"}
        if self.info:
            # Texts of any length: Zarr has no standard form for those of a fixed one
            names, units = (np.array(texts[:channels], object) for texts in (self.info.names, self.info.all_units))
            found = found.assign_coords(channel=names, channel_units=("channel", units))
            sizes = dict(zip(self.plane(), (height, width)))
            fits = {
                name: coordinate.variable
                for name, coordinate in self.info.coordinates.coords.items()
                if all(sizes.get(dim) == size for dim, size in coordinate.sizes.items())
            }
            found = found.assign_coords(fits).assign_attrs(self.info.coordinates.attrs)
        times, valid = self.facts.times, self.facts.valid
        if times is not None:
            lead, dates = self.info.lead_time(valid, times), self.info.decoded_times
            about = {"standard_name": "forecast_reference_time", "long_name": "time of the last input frame"}
            found = found.assign_coords(
                forecast_reference_time=("sequence", dates(times), about),
                valid_time=(("sequence", "time"), dates(valid.ravel()).reshape(valid.shape), {"standard_name": "time"}),
            )
        return found.assign_coords(lead_time=("time", *lead))

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        try:
            if self.file:
                self.file.close()
            if error is None:
                self.finish()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self):
        """Give the file its name. An older file of that name is replaced."""
        if self.path.suffix.lower() == ".npz":
            for array in self.arrays:
                array.flush()
            with (
                replacing(self.path) as temporary,
                zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as archive,
            ):
                for name in NAMES:
                    archive.write(self.folder / f"{name}.npy", f"{name}.npy")
            return
        if self.path.is_dir() and not is_zarr(self.path):
            raise UserError(f"{self.path}: is a folder and no Zarr store; name another")
        if self.path.is_dir():
            shutil.rmtree(self.path)
        (self.folder / "store").replace(self.path)


class StoredForecasts:
    """Another method's forecasts for the sequences of a test set, in the order of the test set.

    path          .npy or .npz, (N, T, H, W[, C]) or (N, T, C, H, W), in the units of the data; or .nc or .zarr as
                  `test.py --save_forecasts` and predict.py write it, see StoredFields
    array_key     name of the array of a .npz; "": `forecast`, or the only one
    count         sequences of the test set
    shape         (T, C, H, W) of the targets
    value_range   ValueRange of the data
    facts         FieldFacts of the test set

    Called with the inputs and targets of a batch, it returns the forecasts of the next sequences (B, T, C, H, W), as
    functions.compare asks for them. UserError: a file that is missing or damaged, or that does not fit the test set.
    """

    def __init__(self, path, array_key, count, shape, value_range, facts):
        self.path, self.key, self.value_range, self.shape = Path(path), array_key, value_range, shape
        steps, channels, height, width = shape
        self.fields, self.notes = None, []  # notes: lines that say how the file was read, for a program's start
        if self.path.suffix.lower() in FIELDS:
            self.fields, self.channels_first = StoredFields(self.path, count, shape, facts), True
            self.notes = self.fields.notes
            self.restart(range(count))
            return
        if self.path.suffix.lower() == ".npz":
            self.key, found, dtype = npz_member(self.path, array_key or self.default_key())
        else:
            array = open_npy(self.path)
            found, dtype = array.shape, array.dtype
        last = (count, steps, height, width, channels)
        self.channels_first = found == (count, *shape) and found != last
        if dtype.kind not in "buif" or (
            not self.channels_first and found not in (last, last[:4] if channels == 1 else last)
        ):
            raise UserError(
                f"--forecasts {path}: holds {dtype} {found}, but the test set has {count} sequences of {steps} frames "
                f"to forecast, {height}x{width} with {channels} channels: give {last} in the units of the data"
            )
        self.restart(range(count))

    def default_key(self):
        with zipfile.ZipFile(self.path) as archive:
            return "forecast" if "forecast.npy" in archive.namelist() else ""

    def restart(self, numbers):
        """Begin again, with these sequences in this order."""
        self.numbers = list(numbers)
        self.rows = self.read_rows(self.numbers)

    def read_rows(self, numbers):
        """Yields the forecasts of these sequences, in this order. A .npz can only be read from its start."""
        wanted = set(numbers)
        if self.fields:
            yield from map(self.fields.row, numbers)
        elif self.path.suffix.lower() != ".npz":
            array = open_npy(self.path)
            yield from (array[number] for number in numbers)
        elif numbers == sorted(numbers):
            yield from (row for i, row in enumerate(npz_rows(self.path, self.key)) if i in wanted)
        else:
            kept = {i: row.copy() for i, row in enumerate(npz_rows(self.path, self.key)) if i in wanted}
            yield from (kept[number] for number in numbers)

    def __call__(self, inputs, targets):
        frames = np.stack([next(self.rows) for _ in range(len(inputs))])
        if self.channels_first:
            frames = np.moveaxis(frames, 2, -1)
        unit = self.value_range.to_unit(frames.reshape(len(frames), *np.array(self.shape)[[0, 2, 3, 1]]))
        unit = torch.from_numpy(np.ascontiguousarray(np.moveaxis(unit, -1, 2))).to(targets.device)
        missing, known = unit.isnan(), ~targets[:, :, : unit.shape[2]].isnan()
        if (missing & known).any():
            raise UserError(
                f"--forecasts {self.path}: holds NaN or missing values where the truth is known; a forecast gives a "
                "value to every such pixel"
            )
        return torch.where(missing, 0, unit)


class StoredFields:
    """The forecasts of a NetCDF or Zarr file, read one at a time.

    path    .nc or .zarr with the variable `forecast`, as test.py --save_forecasts writes it, or with the variables of
            the data, as predict.py does. Dimensions are told by their names: sequence, time, channel, and those of the
            test set's rows and columns; two others are rows and columns as grid_axes.rows_first tells them
    count   sequences of the test set
    shape   (T, C, H, W) of the targets
    facts   FieldFacts of the test set

    Where both have times, the forecasts are found by their reference time, and the file may hold more of them than the
    test set. Where sequences share a reference time, as the members of an ensemble do, forecasts and sequences
    must have the same times in the same order. These forecasts, and those without times, are taken in order, and
    `notes` says so. It also says if a scalar coordinate, such as band, has another value than in the test set.
    UserError: a variable, a forecast or a lead time that is not there, another size, unit or place, another number of
    forecasts, or shared reference times in another order.
    """

    def __init__(self, path, count, shape, facts):
        self.path = path
        self.notes = []  # lines that say how forecasts and sequences were matched, for a program's start
        steps, channels, height, width = shape
        dataset = self.opened()
        arrays = self.arrays(dataset, channels, facts.info)
        self.channels = [self.in_axes(array, facts) for array in arrays]
        self.check_alike(dataset, self.channels, facts.info)
        found = self.channels[0].shape
        if found[1:] != (steps, height, width):
            raise UserError(
                f"--forecasts {path}: holds {found[0]} forecasts of {found[1]} frames, {found[2]}x{found[3]}, but the "
                f"test set has {steps} frames to forecast, {height}x{width}; write forecasts of that size"
            )
        self.numbers = self.matched(dataset, found[0], count, facts)

    def opened(self):
        """The file as an xarray.Dataset."""
        if not self.path.exists():
            raise UserError(f"--forecasts {self.path}: no such file")
        how = {"engine": "zarr", "consolidated": False} if self.path.is_dir() else {"engine": "h5netcdf"}
        try:
            return import_xarray().open_dataset(self.path, decode_timedelta=False, **how)
        except Exception as error:  # each library has its own kinds
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"--forecasts {self.path}: cannot be read ({reason}); write it again as .nc or .zarr"
            ) from error

    def arrays(self, dataset, count, info):
        """The DataArray of each of `count` channels."""
        if "forecast" in dataset:
            whole = dataset["forecast"]
            if "channel" not in whole.dims:
                whole = whole.expand_dims("channel")
            if whole.sizes["channel"] != count:
                raise UserError(
                    f"--forecasts {self.path}: holds {whole.sizes['channel']} channels, but the test set {count}"
                )
            names = [str(name) for name in whole["channel"].values]
            if not info or whole["channel"].dtype.kind not in "SUOT" or "channel" not in whole.coords:
                return [whole.isel(channel=i) for i in range(count)]
            if sorted(names) != sorted(info.names):
                raise UserError(
                    f"--forecasts {self.path}: its channels are {', '.join(names)}, but those of the test set are "
                    f"{', '.join(info.names)}; give them the same names"
                )
            return [whole.isel(channel=names.index(name)) for name in info.names]
        arrays = []
        for channel in info.channels if info else []:
            label, name = (text.replace("/", "_") for text in (channel.name, channel.variable))
            if label in dataset:
                arrays.append(dataset[label])
            elif name in dataset and set(channel.value) <= set(dataset[name].indexes):
                arrays.append(dataset[name].sel(channel.value))
        if len(arrays) != count:
            asked = ", ".join(info.names) if info else "forecast"
            raise UserError(
                f"--forecasts {self.path}: holds {', '.join(sorted(map(str, dataset.data_vars)))}, but the test set "
                f"needs {asked}; write forecasts under these names, or as one variable called forecast"
            )
        return arrays

    def check_alike(self, dataset, arrays, info):
        """Adds to `notes`. UserError: forecasts in other units, at other levels or of other places."""
        if info is None:
            return
        for i, array in enumerate(arrays):
            unit, wanted = str(array.attrs.get("units", "")), info.units(i)
            if unit and wanted and not same_unit(unit, wanted):
                raise UserError(
                    f"--forecasts {self.path}: {info.names[i]} is in {unit}, but in {wanted} in the test set; write "
                    f"it in {wanted}"
                )
            coordinates = {name: coordinate.variable for name, coordinate in array.coords.items()}
            for level in scalar_levels(coordinates, coordinates):
                if all(unlike_level(level, own) for own in info.levels[i].split(", ")):
                    raise UserError(
                        f"--forecasts {self.path}: {info.names[i]} is at {level}, but at {info.levels[i]} in the test "
                        "set; write forecasts of that level"
                    )
            said = label_notes(labels_of(array.coords), info.labels, "is {} in the test set")
            self.notes += [line for line in said if line not in self.notes]
        if name := unlike_place(info.coordinates, (info.y, info.x), dataset, arrays[0].dims[-2:]):
            raise UserError(
                f"--forecasts {self.path}: its coordinate {name} is not that of the test set; write forecasts of the "
                "same places in the same order"
            )

    def in_axes(self, array, facts):
        """A DataArray with the dimensions sequence, time, rows, columns."""
        time = facts.info.time if facts.info and facts.info.time in array.dims else "time"
        if "sequence" not in array.dims:
            array = array.expand_dims("sequence")
        plane = [dim for dim in array.dims if dim not in ("sequence", time)]
        if facts.info and set(plane) == {facts.info.y, facts.info.x}:
            plane = [facts.info.y, facts.info.x]
        elif len(plane) == 2:
            plane = rows_first(plane, {name: coordinate.variable for name, coordinate in array.coords.items()})
        if time not in array.dims or len(plane) != 2:
            raise UserError(
                f"--forecasts {self.path}: {array.name} has the dimensions {', '.join(map(str, array.dims))}; they "
                "must be [sequence,] time, rows and columns"
            )
        return array.transpose("sequence", time, *plane)

    def matched(self, dataset, held, count, facts):
        """The number in the file of each sequence of the test set, a list."""
        if facts.times is None or "forecast_reference_time" not in dataset.coords:
            if held != count:
                raise UserError(
                    f"--forecasts {self.path}: holds {held} forecasts without times, but the test set has {count} "
                    "sequences"
                )
            self.notes.append("forecasts without times are taken in the order of the test set")
            return list(range(count))
        # Not when the file was opened: a field in hours would become a span of time as well
        leads = import_xarray().decode_cf(dataset[[*dataset.coords]], decode_timedelta=True).get("lead_time")
        if leads is not None and leads.dtype.kind == "m":
            seconds = leads.values / np.timedelta64(1, "s")
            wanted = facts.valid - facts.times[:, None]  # (N, T); those of months differ
            if ((seconds < wanted.min(0) - 0.5) | (seconds > wanted.max(0) + 0.5)).any():
                raise UserError(
                    f"--forecasts {self.path}: its lead times are {seconds.tolist()} s, but those of the test set are "
                    f"{wanted[0].tolist()} s"
                )
        wanted = [moment_of(time) for time in facts.info.decoded_times(facts.times)]
        moments = [moment_of(time) for time in dataset["forecast_reference_time"].values.ravel()]
        moments = moments * held if len(moments) == 1 else moments
        if len(set(moments)) < len(moments) or len(moments) != held or len(set(wanted)) < count:
            # The time alone would give all members of an ensemble the forecast of the last one
            if moments != wanted:
                raise UserError(
                    f"--forecasts {self.path}: some of its {held} forecasts, or of the {count} test sequences, share "
                    "a reference time, and the times of both are not the same in the same order; write one forecast "
                    "per test sequence, in the order of the test set"
                )
            self.notes.append("sequences share their reference times: forecasts are taken in the order of the test set")
            return list(range(count))
        places = {moment: i for i, moment in enumerate(moments)}
        absent = [moment for moment in wanted if moment not in places]
        if absent:
            raise UserError(
                f"--forecasts {self.path}: has no forecast from {absent[0]}, the last input of a test sequence; its "
                f"{held} start from {min(places)} to {max(places)}"
            )
        return [places[moment] for moment in wanted]

    def row(self, number):
        """The forecast of a sequence of the test set, (T, C, H, W)."""
        place = self.numbers[number]
        return np.stack([np.asarray(channel[place].values, np.float32) for channel in self.channels], axis=1)


def moment_of(time):
    """A numpy or cftime date as text, to the second."""
    return str(np.datetime64(time, "s")) if isinstance(time, np.datetime64) else time.isoformat(timespec="seconds")
