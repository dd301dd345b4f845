"""Pictures of forecasts and of metrics. Frames are arrays or tensors (T, C, H, W) in [0, 1], NaN for missing pixels."""

import av
import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure  # not pyplot, which keeps figures in global state and looks for a display
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from vmrnn.files import replacing

MISSING = (0.78, 0.82, 0.88)  # colour of a missing pixel; no grey frame holds it
# Lines of the forecast and of its baselines, in the order of the results; report.html has the same colours and dashes.
LINES = [("#1f66cf", "-"), ("#7b838c", (0, (2.5, 2))), ("#b9590c", (0, (1, 1.5))), ("#2b7a3d", (0, (4, 1.5, 1, 1.5)))]
TRUTH = "#1b1e22"  # colour of lines of the truth
TILE = 115  # pixels, about the side of a frame in a strip; larger frames are resampled, smaller ones keep sharp pixels
BAR = {
    "done": (150, 158, 168),
    "forecast": (31, 102, 207),
    "ahead": (224, 228, 232),
}  # colours of a GIF's bar of frames
LABEL_HEIGHT, BAR_HEIGHT = 20, 10  # pixels of a GIF
# Units of metrics on the axis of their curves, where there is one.
UNITS = {"mse": "sum over a frame", "mae": "sum over a frame", "psnr": "dB", "psnr_uint8": "dB"}
LEAST_LIMIT = 0.01  # smallest error that gets the full colour, so that rounding errors stay pale


def save_strip(path, inputs, targets, forecast, title="", leads=None):
    """Draw one sequence as a PNG with four rows: input, truth, forecast, and the difference of the last two.

    The lead time is above each column; the last input frame has lead time 0.

    path                        file to write
    inputs, targets, forecast   (T, C, H, W) each; the difference is blue where the forecast is too dark, red where it
                                is too bright
    title                       text above the rows
    leads                       the name of each lead time, such as 10 min; None: they are counted
    """
    difference = signed_colours(forecast, targets)
    inputs, targets, forecast = (as_images(f) for f in (inputs, targets, forecast))
    rows = {"input": inputs, "truth": targets, "forecast": forecast, "difference": difference}
    names = {"input": [str(t + 1 - len(inputs)) for t in range(len(inputs))]}
    names["truth"] = [f"+{lead}" for lead in leads or range(1, len(targets) + 1)]
    columns = max(len(frames) for frames in rows.values())
    width = inputs.shape[2]
    gap = max(2, width // 32)
    figure = Figure((1.3 + 1.05 * columns, 1.1 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots(len(rows))
    for axis, (name, frames) in zip(axes, rows.items()):
        interpolation = "nearest" if max(frames.shape[1:3]) <= TILE else "hanning"
        axis.imshow(side_by_side(frames, columns, gap), interpolation=interpolation, vmin=0, vmax=1)
        axis.set_ylabel(name, fontsize=9)
        centres = [t * (width + gap) + width / 2 for t in range(len(names.get(name, ())))]
        axis.set_xticks(centres, names.get(name, ()), fontsize=7)
        axis.tick_params(top=False, bottom=False, labeltop=True, labelbottom=False, pad=1)
        axis.set(yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    scale = ScalarMappable(Normalize(-1, 1), "RdBu_r")
    bar = figure.colorbar(scale, ax=axes, shrink=0.22, anchor=(0, 0), aspect=8, ticks=[-1, 0, 1])
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def save_animation(path, inputs, targets, forecast, pixels=192, milliseconds=200):
    """Draw one sequence as a GIF: truth, forecast and difference side by side, after the input frames.

    path                        file to write
    inputs, targets, forecast   (T, C, H, W) each
    pixels                      smaller frames are enlarged to about this side
    milliseconds                time per frame; the last frame stays five times as long
    """
    given = len(inputs)
    right = np.concatenate([signed_colours(inputs, inputs), signed_colours(forecast, targets)])  # no difference yet
    inputs, targets, forecast = (as_images(f) for f in (inputs, targets, forecast))
    left = np.concatenate([inputs, targets])
    middle = np.concatenate([inputs, forecast])
    scale = max(1, pixels // max(left.shape[1:3]))
    frames = as_bytes(np.stack([side_by_side(np.stack(trio), 3) for trio in zip(left, middle, right)]), scale)
    step = (left.shape[2] + 2) * scale
    frames = np.stack([labelled(frame, t, len(frames), given, step) for t, frame in enumerate(frames)])
    hold = [milliseconds] * len(frames)
    hold[-1] = 5 * milliseconds
    with replacing(path) as temporary:
        save_gif(temporary, frames, hold)


def labelled(image, t, total, given, step):
    """Frame t of an animation with names above its three panels and a bar of all frames below: (H + 30, W, 3).

    image   the panels side by side, uint8 (H, W, 3)
    t       number of the frame, from 0
    total   number of frames
    given   how many of them the network is given; the bar has another colour from there on
    step    pixels from the left side of a panel to that of the next
    """
    height, width = image.shape[:2]
    canvas = Image.new("RGB", (width, LABEL_HEIGHT + height + BAR_HEIGHT), "white")
    canvas.paste(Image.fromarray(image), (0, LABEL_HEIGHT))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(10)
    difference = "difference: blue too dark, red too bright"
    if draw.textlength(difference, font) > step - 4:
        difference = "difference"
    for panel, text in enumerate(("truth", *(("given", "") if t < given else ("forecast", difference)))):
        draw.text((panel * step + 3, 3), text, "#1b1e22", font)
    top = LABEL_HEIGHT + height + 3
    for k in range(total):
        colour = BAR["ahead" if k > t else "done" if k < given else "forecast"]
        left, right = (round(edge * width / total) for edge in (k, k + 1))
        draw.rectangle((left, top, max(left, right - 2), top + BAR_HEIGHT - 4), colour)
    return np.asarray(canvas)


def save_video(path, frames, kind, pixels=256, fps=5):
    """Write frames as a film.

    path     file to write
    frames   (T, C, H, W)
    kind     ".gif", or ".mp4" for H.264
    pixels   smaller frames are enlarged to about this side
    fps      frames per second
    """
    images = as_images(frames)
    images = as_bytes(images, max(1, pixels // max(images.shape[1:3])))
    if kind == ".gif":
        save_gif(path, images, 1000 // fps)
        return
    height, width = images.shape[1:3]
    images = np.pad(
        images, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge"
    )  # even sides: H.264 halves the resolution of the colours
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = "yuv420p"  # every player can show it
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def save_images(path, frames):
    """Write frames (T, C, H, W) as PNGs: next.png becomes next_001.png, next_002.png, ..."""
    for number, image in enumerate(as_bytes(as_images(frames), 1), 1):
        with replacing(path.with_stem(f"{path.stem}_{number:03d}")) as temporary:
            Image.fromarray(image).save(temporary, "PNG")


def as_bytes(images, scale):
    """Images (T, H, W, 3) in [0, 1] as uint8. Every pixel becomes a square of `scale` pixels."""
    return (255 * images.clip(0, 1)).round().astype(np.uint8).repeat(scale, 1).repeat(scale, 2)


def save_gif(path, images, milliseconds):
    """Write images, uint8 (T, H, W, 3), as a GIF; milliseconds: the time per frame, one number or a list."""
    first, *rest = map(Image.fromarray, images)
    first.save(path, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)


def save_lead_times(path, results, rows, leads=None):
    """Draw metrics by lead time as a PNG, one panel per metric.

    path      file to write
    results   {label: Metrics.compute()}, one line per label
    rows      metrics to draw, of vmrnn.metrics.Metric
    leads     the name of each lead time, such as 10 min; None: they are counted
    """
    figure = Figure((max(4.5, 3.2 * len(rows)), 3), layout="constrained")
    axes = figure.subplots(1, len(rows), squeeze=False)
    for axis, row in zip(axes[0], rows):
        for i, (label, result) in enumerate(results.items()):
            values, (colour, dashes) = result["per_frame"][row.name], LINES[i % len(LINES)]
            axis.plot(range(1, len(values) + 1), values, marker=".", label=label, color=colour, linestyle=dashes)
        unit = f" [{UNITS[row.name]}]" if row.name in UNITS else ""
        axis.set_title(f"{row.name}{unit}, {row.better} is better", fontsize=9)
        axis.set_xlabel("lead time [frames]")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if leads and leads[0] != "1":
            axis.set_xlabel(f"lead time [frames], up to {leads[-1]}")
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside upper center", ncols=len(labels), frameon=False)
    save(figure, path)


def save_curve(path, entries):
    """Draw the losses of a run by the number of samples seen, as a PNG.

    entries   those of log.jsonl, a list of dicts
    """
    figure = Figure((5, 3), layout="constrained")
    axis = figure.subplots()
    lines = (("train_loss", "training", "", LINES[1]), ("valid_loss", "validation", ".", LINES[0]))
    for name, label, marker, (colour, dashes) in lines:
        points = [(e.get("samples"), e.get(name)) for e in entries]
        points = [point for point in points if all(isinstance(value, int | float) for value in point)]
        axis.plot(*zip(*points), marker=marker, label=label, color=colour, linestyle=dashes)
    axis.set(xlabel="samples seen", ylabel="loss", yscale="log")
    axis.locator_params(axis="x", nbins=6)  # ticks of long numbers would touch
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    save(figure, path)


def save(figure, path):
    """Write a matplotlib figure as a PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def shown_channels(frames):
    """(T, C, H, W) -> float32 (T, H, W, 3 or 1). Three channels are colours. Of any other number the first is shown."""
    frames = np.asarray(frames, dtype=np.float32)
    return (frames if frames.shape[1] == 3 else frames[:, :1]).transpose(0, 2, 3, 1)


def as_images(frames):
    """(T, C, H, W) -> (T, H, W, 3), in colour or grey. A missing pixel has the colour MISSING."""
    images = shown_channels(frames)
    return np.where(np.isnan(images).any(-1, keepdims=True), np.float32(MISSING), images)


def signed_colours(forecast, targets, limit=1.0):
    """The errors of a forecast as colours (T, H, W, 3): blue where it is too dark, red where it is too bright.

    forecast, targets   (T, C, H, W)
    limit               errors from here on get the full colour
    """
    difference = (shown_channels(forecast) - shown_channels(targets)).mean(-1)
    colours = colormaps["RdBu_r"](difference / (2 * limit) + 0.5)[..., :3].astype(np.float32)
    return np.where(np.isnan(difference)[..., None], np.float32(MISSING), colours)


def error_limit(pairs):
    """The 99.9th percentile of the absolute error over pairs (forecast, targets). It gets the full colour."""
    return max(LEAST_LIMIT, nearly_largest(np.abs(shown_channels(f) - shown_channels(t)).mean(-1) for f, t in pairs))


def white_level(frames):
    """The value to show as white for some fields (T, C, H, W): 1, or less if the values are small, such as rain."""
    frames = list(map(shown_channels, frames))
    largest = nearly_largest(frames)
    return 1.0 if largest > 0.5 or any(f.shape[-1] == 3 for f in frames) else max(LEAST_LIMIT, largest)


def nearly_largest(arrays):
    """The 99.9th percentile of some arrays without their NaN, at least 0."""
    values = np.concatenate([np.zeros(1, np.float32), *(array.ravel() for array in arrays)])
    return float(np.nanquantile(values, 0.999))


def side_by_side(frames, columns, gap=2):
    """Frames (T, H, W, 3) in one row on white: (H, columns * (W + gap) - gap, 3)."""
    T, H, W, _ = frames.shape
    canvas = np.ones((H, columns * (W + gap) - gap, 3), dtype=np.float32)
    for t, frame in enumerate(frames):
        canvas[:, t * (W + gap) : t * (W + gap) + W] = np.clip(frame, 0, 1)
    return canvas
