"""Files of forecasts: NetCDF and Zarr with names, units and coordinates, arrays, films and pictures."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vmrnn.colours import Look
from vmrnn.data.grid_files import is_zarr
from vmrnn.data.grid_info import import_xarray
from vmrnn.data.prepare import as_type
from vmrnn.data.times import lead_names, whole_months
from vmrnn.errors import UserError
from vmrnn.files import replacing
from vmrnn.pictures import save_film, save_images
from vmrnn.values import ValueRange

FIELDS, ARRAYS, FILMS, PICTURES = (".nc", ".zarr"), (".npz", ".npy"), (".gif", ".mp4"), (".png",)
ENDINGS = (".npz", *FILMS, ".npy", *FIELDS, *PICTURES)
COMPRESSION = {"zlib": True, "complevel": 4, "shuffle": True}


@dataclass
class Forecast:
    """Forecasts of the sequences of one input.

    unit          float32 (S, T, H, W, C) on the scale [0, 1]; NaN where a pixel was missing in all frames
    value_range   ValueRange, the way to the units of the input
    dtype         type of the numbers of the input
    many          whether the input has an axis of sequences; if not, S is 1 and files leave it out
    info          GridInfo of a gridded field; None for other inputs
    times         times of the observed frames of each sequence, float64 (n,), or None
    step          frames of the input per frame of the forecast
    given         the last observed frames of each sequence, for films: a list of float32 (n, H, W, C) on the scale
                  [0, 1], or of None
    config        Config of the network, which tells pictures from fields; None: pictures
    colours       see Look.of
    """

    unit: np.ndarray
    value_range: ValueRange
    dtype: np.dtype
    many: bool = False
    info: object = None
    times: list | None = None
    step: int = 1
    given: list | None = None
    config: object = None
    colours: str = "auto"

    @property
    def horizon(self):
        return self.unit.shape[1]

    def values(self):
        """The forecasts in the units of the input, float32, (S, T, H, W, C)."""
        return np.asarray(self.value_range.to_data(self.unit), np.float32)

    def array(self):
        """The forecasts in the units and the type of the input: ([S,] T, H, W[, C]).

        Whole numbers are rounded. Pixels that were never seen have the first missing value of the input.
        """
        values = self.values()
        if self.dtype.kind != "f" and self.value_range.missing:
            values = np.where(np.isnan(values), self.value_range.missing[0], values)
        values = as_type(values, self.dtype)
        values = values[..., 0] if values.shape[-1] == 1 else values
        return values if self.many else values[0]

    def reference_times(self):
        """The time of the last observed frame of each sequence, float64 (S,); None: the frames have no times."""
        if self.info is None or self.info.times is None or any(times is None or len(times) < 2 for times in self.times):
            return None
        return np.array([times[-1] for times in self.times])

    def next_times(self):
        """The times of the forecast frames, float64 (S, T); None: the frames have no times."""
        if self.reference_times() is None:
            return None
        return np.stack([self.info.next_times(times, self.horizon) for times in self.times])

    def lead_names(self):
        """Names of the lead times, such as 10 min; None: they are counted."""
        times = self.next_times()
        if times is None or not self.info.calendar:
            return None
        months, _ = whole_months(np.append(self.times[0], times[0]), self.info.calendar)
        return lead_names((times[0] - self.reference_times()[0]).tolist(), months)

    def dataset(self):
        """The forecasts as an xarray.Dataset that has the names, units, coordinates and attributes of the input.

        The time coordinate continues with the step of the input. `lead_time` counts from the last observed frame, whose
        time is `forecast_reference_time`. Several sequences have the coordinate `valid_time` (sequence, time) instead.
        """
        xarray = import_xarray()
        extra = ("sequence",) if self.many else ()
        values = self.values() if self.many else self.values()[0]
        times, reference = self.next_times(), self.reference_times()
        if self.info is None:
            axes = (*extra, "time", "y", "x")
            if values.shape[-1] == 1:
                found = xarray.Dataset({"forecast": (axes, values[..., 0])})
            else:
                found = xarray.Dataset({"forecast": ((*axes, "channel"), values)})
            time = "time"
        else:
            found = self.info.dataset(values, None if self.many or times is None else times[0], extra)
            time = self.info.time
        if times is None:
            about = {"long_name": "frames after the last observed one", "units": "1"}
            return found.assign_coords(lead_time=(time, np.arange(1, self.horizon + 1) * self.step, about))
        dates = self.info.decoded_times
        found = found.assign_coords(lead_time=(time, *self.info.lead_time(times, reference)))
        about = {"standard_name": "forecast_reference_time"} if self.info.calendar else {}
        about |= {"long_name": "time of the last observed frame"} | self.info.time_unit
        if not self.many:
            return found.assign_coords(forecast_reference_time=((), dates(reference)[0], about))
        valid = dates(times.ravel()).reshape(times.shape)
        return found.assign_coords(
            forecast_reference_time=("sequence", dates(reference), about),
            valid_time=(("sequence", time), valid, {"standard_name": "time"} | self.info.time_unit),
        )

    def save(self, path, fps=5):
        """Write the forecasts in the form that the ending of `path` names.

        path   .nc, .zarr   a field with coordinates
               .npy, .npz   an array; .npz calls it `forecast` and adds `time` where the input has times
               .gif, .mp4   a film of the last observed frames and the forecast
               .png         one picture per frame: next.png becomes next_001.png, next_002.png, ...
        fps    frames per second of a film

        Several sequences make films and pictures of each: next.gif becomes next_sequence000.gif, ...
        Returns the paths of the files. UserError: a file that cannot be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix in FIELDS:
            self.save_field(path)
        elif suffix in ARRAYS:
            self.save_array(path)
        else:
            return self.save_pictures(path, fps)
        return [path]

    def save_field(self, path):
        """Write a NetCDF file or a Zarr store."""
        found = self.dataset()
        if path.suffix.lower() == ".zarr":
            save_zarr(found, path)
            return
        with replacing(path) as temporary:
            for variable in found.data_vars.values():
                variable.encoding |= COMPRESSION
            found.to_netcdf(temporary, engine="h5netcdf")

    def save_array(self, path):
        """Write a .npy or .npz file."""
        with replacing(path) as temporary, open(temporary, "wb") as f:  # np.savez would add .npz to another name
            if path.suffix.lower() == ".npy":
                np.save(f, self.array())
                return
            times = self.next_times()
            extra = {} if times is None else {"time": self.info.decoded_times(times.ravel()).reshape(times.shape)}
            np.savez_compressed(f, forecast=self.array(), **(extra if self.many else first_of(extra)))

    def save_pictures(self, path, fps):
        """Write films, or one picture per frame. Returns the paths of the files."""
        suffix, paths = path.suffix.lower(), []
        forecasts = self.unit.transpose(0, 1, 4, 2, 3)
        given = [own.transpose(0, 3, 1, 2) for own in self.given or () if own is not None]
        given = given or [forecasts[0, :0]] * len(forecasts)
        look = Look()
        if self.config:
            look = Look.of(self.config, self.value_range, [*given, *forecasts], self.colours)
        for number, frames in enumerate(forecasts):
            own = path.with_stem(f"{path.stem}_sequence{number:03d}") if self.many else path
            if suffix in PICTURES:
                paths += save_images(own, frames, look)
            else:
                with replacing(own) as temporary:
                    save_film(temporary, given[number], frames, suffix, self.lead_names(), look, fps=fps)
                paths.append(own)
        return paths


def first_of(arrays):
    """{name: the first element of the array}: of the only sequence."""
    return {name: array[0] for name, array in arrays.items()}


def save_zarr(dataset, path):
    """Write a Dataset as a Zarr folder. An older one of that name is replaced; another kind of folder is not."""
    if path.exists() and not is_zarr(path):
        raise UserError(f"{path}: exists and is no Zarr store; name another")
    try:
        dataset.to_zarr(path, mode="w", consolidated=False)
    except ImportError as error:
        raise UserError(f"{path}: Zarr needs the package zarr; pip install zarr, or write .nc") from error


def check_output(path, source):
    """UserError: a path that no forecast can be written to, or the input itself."""
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"--output {path}: its name must end as one of {' '.join(ENDINGS)}")
    if path.resolve() == Path(source).resolve():
        raise UserError(f"--output {path}: is the input; name another file")
