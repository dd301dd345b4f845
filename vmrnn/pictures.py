"""Pictures of forecasts and of metrics. Frames are arrays or tensors (T, C, H, W) in [0, 1], NaN for missing pixels."""

import json
from pathlib import Path

import av
import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")  # no window is ever opened
import matplotlib.pyplot as plt

from vmrnn.files import replacing

MISSING = (0.78, 0.82, 0.88)  # the colour of a missing pixel, found in no grey frame
LEAST_LIMIT = 0.01  # of the values that colours span, so that rounding is not painted red


def save_strip(path, inputs, targets, forecast, title=""):
    """PNG of one sequence: rows input, truth, forecast and difference (blue too dark, red too bright)."""
    difference = signed_colours(forecast, targets)
    inputs, targets, forecast = (as_images(f) for f in (inputs, targets, forecast))
    rows = {"input": inputs, "truth": targets, "forecast": forecast, "difference": difference}
    columns = max(len(frames) for frames in rows.values())
    height = 1.1 * len(rows) + 0.4
    figure, axes = plt.subplots(len(rows), figsize=(0.7 + 1.05 * columns, height), layout="constrained")
    for axis, (name, frames) in zip(axes, rows.items()):
        axis.imshow(side_by_side(frames, columns), interpolation="nearest", vmin=0, vmax=1)
        axis.set_ylabel(name, fontsize=9)
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def save_animation(path, inputs, targets, forecast, pixels=192, milliseconds=200):
    """GIF of one sequence: truth, forecast and difference side by side, after the input frames."""
    difference = signed_colours(forecast, targets)
    inputs, targets, forecast = (as_images(f) for f in (inputs, targets, forecast))
    blank = np.ones_like(inputs)
    left = np.concatenate([inputs, targets])
    middle = np.concatenate([inputs, forecast])
    right = np.concatenate([blank, difference])
    scale = max(1, pixels // max(left.shape[1:3]))
    frames = as_bytes(np.stack([side_by_side(np.stack(trio), 3) for trio in zip(left, middle, right)]), scale)
    hold = [milliseconds] * len(frames)
    hold[-1] = 5 * milliseconds
    with replacing(path) as temporary:
        save_gif(temporary, frames, hold)


def save_video(path, frames, kind, pixels=256, fps=5):
    """The frames as a GIF (kind ".gif") or an H.264 MP4 (".mp4"), enlarged to about `pixels` where they are smaller."""
    images = as_images(frames)
    images = as_bytes(images, max(1, pixels // max(images.shape[1:3])))
    if kind == ".gif":
        save_gif(path, images, 1000 // fps)
        return
    height, width = images.shape[1:3]
    images = np.pad(images, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")  # H.264 halves the colours
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = "yuv420p"  # what every player takes
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def as_bytes(images, scale):
    """Images (T, H, W, 3) in [0, 1] as uint8, each pixel a square of `scale`."""
    return (255 * images.clip(0, 1)).round().astype(np.uint8).repeat(scale, 1).repeat(scale, 2)


def save_gif(path, images, milliseconds):
    """images: uint8 (T, H, W, 3); milliseconds of each, or of every one."""
    first, *rest = map(Image.fromarray, images)
    first.save(path, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)


def save_lead_times(path, results, names):
    """PNG with one panel a metric: its value at each lead time, a line for each entry of
    results = {label: Metrics.compute()}."""
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.8), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names):
        for label, result in results.items():
            values = result["per_frame"][name]
            axis.plot(range(1, len(values) + 1), values, marker=".", label=label)
        axis.set(title=name, xlabel="lead time [frames]")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    save(figure, path)


def save_curve(path, log_file):
    """PNG of the loss against the samples seen, from a run's log.jsonl."""
    entries = read_log(log_file)
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    for name, label, marker in (("train_loss", "training", ""), ("valid_loss", "validation", ".")):
        points = [(e["samples"], e[name]) for e in entries if name in e]
        axis.plot(*zip(*points), marker=marker, label=label)
    axis.set(xlabel="samples seen", ylabel="loss", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    save(figure, path)


def read_log(path):
    """The entries of a log.jsonl, a list of dicts."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def save(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def shown_channels(frames):
    """(T, C, H, W) -> float32 (T, H, W, 3 or 1): three channels are colours, of any other number the first is shown."""
    frames = np.asarray(frames, dtype=np.float32)
    return (frames if frames.shape[1] == 3 else frames[:, :1]).transpose(0, 2, 3, 1)


def as_images(frames):
    """(T, C, H, W) -> (T, H, W, 3), colours or grey; a missing pixel has the colour MISSING."""
    images = shown_channels(frames)
    return np.where(np.isnan(images).any(-1, keepdims=True), np.float32(MISSING), images)


def signed_colours(forecast, targets, limit=1.0):
    """(T, H, W, 3): blue where the forecast is too dark, red where too bright, full colour from an error of `limit`."""
    difference = (shown_channels(forecast) - shown_channels(targets)).mean(-1)
    colours = matplotlib.colormaps["RdBu_r"](difference / (2 * limit) + 0.5)[..., :3].astype(np.float32)
    return np.where(np.isnan(difference)[..., None], np.float32(MISSING), colours)


def error_limit(pairs):
    """The error of full colour for some (forecast, targets): the largest but for one pixel in a thousand."""
    return max(LEAST_LIMIT, nearly_largest(np.abs(shown_channels(f) - shown_channels(t)).mean(-1) for f, t in pairs))


def white_level(frames):
    """The value to show as white for some fields (T, C, H, W): 1, but less for those of small values, such as rain."""
    frames = list(map(shown_channels, frames))
    largest = nearly_largest(frames)
    return 1.0 if largest > 0.5 or any(f.shape[-1] == 3 for f in frames) else max(LEAST_LIMIT, largest)


def nearly_largest(arrays):
    """The largest value but for one in a thousand and NaN; 0 where there is none."""
    values = np.concatenate([np.zeros(1, np.float32), *(array.ravel() for array in arrays)])
    return float(np.nanquantile(values, 0.999))


def side_by_side(frames, columns, gap=2):
    """(T, H, W, 3) -> one (H, columns * (W + gap), 3) picture on white."""
    T, H, W, _ = frames.shape
    canvas = np.ones((H, columns * (W + gap) - gap, 3), dtype=np.float32)
    for t, frame in enumerate(frames):
        canvas[:, t * (W + gap) : t * (W + gap) + W] = np.clip(frame, 0, 1)
    return canvas
