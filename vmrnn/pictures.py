"""Pictures of forecasts and of metrics. Frames are arrays or tensors (T, C, H, W) in [0, 1], NaN for missing pixels."""

import av
import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure  # not pyplot, which keeps figures in global state and looks for a display
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from vmrnn.colours import MISSING, Look, nearly_largest, shrunk
from vmrnn.files import replacing

# Lines of the forecast and of its baselines, in the order of the results; report.html has the same colours and dashes.
LINES = [("#1f66cf", "-"), ("#7b838c", (0, (2.5, 2))), ("#b9590c", (0, (1, 1.5))), ("#2b7a3d", (0, (4, 1.5, 1, 1.5)))]
TRUTH = "#1b1e22"  # colour of lines of the truth
TILE = 115  # pixels, about the side of a frame in a strip; larger frames are averaged, smaller ones keep sharp pixels
LARGEST = 256  # pixels, the longest side of a frame in an animation or film; larger frames are averaged
# Colours of the bar of frames below an animation or film
BAR = {"done": (150, 158, 168), "forecast": (31, 102, 207), "ahead": (224, 228, 232)}
LABEL_HEIGHT, BAR_HEIGHT, SCALE_WIDTH = 20, 10, 62  # pixels of an animation or film
# Units of metrics for the titles of their curves
UNITS = {"mse": "sum over a frame", "mae": "sum over a frame", "psnr": "dB", "psnr_uint8": "dB"}
# Smallest error that gets the full colour, as a part of the scale, so that rounding errors stay pale
LEAST_LIMIT = 0.01


def frame_names(given, leads):
    """The names of given and of forecast frames, two lists.

    given   number of given frames; the last one has lead time 0
    leads   names of the lead times, such as 10 min; or 1, 2, ..., which count frames

    Given frames before the last one have negative times in the unit of the lead times.
    """
    step, _, unit = leads[0].partition(" ")
    before = [f"{-k * float(step):g} {unit}".strip() if k else f"0 {unit}".strip() for k in reversed(range(given))]
    return before, [f"+{lead}" for lead in leads]


def counted_leads(horizon):
    """Names of lead times that count frames: 1, 2, ..."""
    return [str(step) for step in range(1, horizon + 1)]


def save_strip(path, inputs, targets, forecast, title="", leads=None, look=None):
    """Draw one sequence as a PNG with four rows: input, truth, forecast, and the difference of the last two.

    The lead time is above each column; the last input frame has lead time 0.

    path                        file to write
    inputs, targets, forecast   (T, C, H, W) each; the difference is blue where the forecast is too low, red where it
                                is too high
    title                       text above the rows
    leads                       the name of each lead time, such as 10 min; None: they are counted
    look                        Look; None: grey
    """
    # Values and colours
    look = look or Look()
    inputs, targets, forecast = (shrunk(look.values(f), 2 * TILE) for f in (inputs, targets, forecast))
    limit = 1.0 if look.value_range is None else error_limit([(forecast, targets)], look)
    rows = {"input": look.paint(inputs), "truth": look.paint(targets), "forecast": look.paint(forecast)}
    rows["difference"] = signed_colours(forecast, targets, limit)
    names = dict(zip(("input", "truth"), frame_names(len(inputs), leads or counted_leads(len(targets)))))

    # Rows of frames
    columns = max(len(frames) for frames in rows.values())
    width = inputs.shape[2]
    gap = max(2, width // 32)
    figure = Figure((1.6 + 1.05 * columns, 1.1 * len(rows) + 0.8), layout="constrained")
    grid = figure.add_gridspec(len(rows), 2, width_ratios=(columns, 0.12))
    axes = [figure.add_subplot(grid[row, 0]) for row in range(len(rows))]
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

    # Scales
    if look.label:
        ticks = look.edges or None
        scale = ScalarMappable(look.norm(), look.colour_map())
        place = figure.add_subplot(grid[:3, 1])
        bar = figure.colorbar(scale, cax=place, ticks=ticks, format="%g" if ticks else None)
        bar.set_label(look.label, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    scale = ScalarMappable(Normalize(-limit, limit), "RdBu_r")
    bar = figure.colorbar(scale, cax=figure.add_subplot(grid[3, 1]), ticks=[-limit, 0, limit], format="%.2g")
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def save_animation(path, inputs, targets, forecast, leads=None, look=None, pixels=192, milliseconds=200):
    """Draw one sequence as a GIF: truth, forecast and difference side by side, after the input frames.

    path                        file to write
    inputs, targets, forecast   (T, C, H, W) each
    leads                       the name of each lead time, such as 10 min; None: they are counted
    look                        Look; None: grey
    pixels                      smaller frames are enlarged to about this side
    milliseconds                time per frame; the last frame stays five times as long
    """
    # Values and colours of the three panels. The input frames have no error.
    look, given = look or Look(), len(inputs)
    names = [name for part in frame_names(given, leads or counted_leads(len(targets))) for name in part]
    inputs, targets, forecast = (shrunk(look.values(f), LARGEST) for f in (inputs, targets, forecast))
    limit = 1.0 if look.value_range is None else error_limit([(forecast, targets)], look)
    right = np.concatenate([signed_colours(inputs, inputs), signed_colours(forecast, targets, limit)])
    inputs, targets, forecast = (look.paint(values) for values in (inputs, targets, forecast))
    panels = (np.concatenate([inputs, targets]), np.concatenate([inputs, forecast]), right)

    # Frames with labels
    scale = max(1, pixels // max(inputs.shape[1:3]))
    frames = as_bytes(np.stack([side_by_side(np.stack(trio), 3) for trio in zip(*panels)]), scale)
    step = (inputs.shape[2] + 2) * scale
    difference = "difference: blue too low, red too high"
    if text_width(difference) > step - 4:
        difference = "difference"
    labels = [
        [f"given, {name}", "given", ""] if t < given else [f"truth, {name}", f"forecast, {name}", difference]
        for t, name in enumerate(names)
    ]
    frames = [labelled(frame, t, labels, given, step, look) for t, frame in enumerate(frames)]
    hold = [milliseconds] * len(frames)
    hold[-1] = 5 * milliseconds
    with replacing(path) as temporary:
        save_gif(temporary, frames, hold)


def text_width(text):
    return ImageFont.load_default(10).getlength(text)


def labelled(image, t, labels, given, step, look):
    """Frame t of an animation with a text over each panel and a bar of all frames below: uint8 (h, w, 3).

    image    the panels side by side, uint8 (H, W, 3)
    t        number of the frame, from 0
    labels   the texts of each frame, a list of lists
    given    how many frames the network is given; the bar has another colour from there on
    step     pixels from the left side of a panel to that of the next
    look     Look; its scale of colours stands on the right, unless the frames are pictures
    """
    height, width = image.shape[:2]
    canvas = Image.new("RGB", (width + SCALE_WIDTH * bool(look.label), LABEL_HEIGHT + height + BAR_HEIGHT), "white")
    canvas.paste(Image.fromarray(image), (0, LABEL_HEIGHT))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(10)
    for panel, text in enumerate(labels[t]):
        draw.text((panel * step + 3, 3), text, TRUTH, font)
    if look.label:
        draw_scale(draw, look, width + 6, LABEL_HEIGHT, height, font)
    top = LABEL_HEIGHT + height + 3
    for k in range(len(labels)):
        colour = BAR["ahead" if k > t else "done" if k < given else "forecast"]
        left, right = (round(edge * width / len(labels)) for edge in (k, k + 1))
        draw.rectangle((left, top, max(left, right - 2), top + BAR_HEIGHT - 4), colour)
    return np.asarray(canvas)


def draw_scale(draw, look, left, top, height, font):
    """Draw the scale of a Look, its low end at the bottom, `height` pixels high, with its unit on top."""
    colours, ticks = look.scale()
    for i, colour in enumerate(colours):
        ends = [round(top + height * (1 - place / len(colours))) for place in (i + 1, i)]
        draw.rectangle((left, ends[0], left + 9, ends[1] - 1), tuple(round(255 * float(c)) for c in colour))
    draw.rectangle((left - 1, top, left + 10, top + height - 1), outline=BAR["done"])
    for place, text in ticks:
        y = min(max(top + height * (1 - place) - 6, top - 2), top + height - 12)
        draw.text((left + 14, y), text, TRUTH, font)
    unit = look.unit if text_width(look.unit) < SCALE_WIDTH - 4 else ""
    draw.text((left - 3, top - 17), unit, TRUTH, font)


def save_film(path, given, forecast, kind, leads=None, look=None, pixels=256, fps=5):
    """Write given frames and a forecast as a film with labels and a bar that shows where the forecast begins.

    path       file to write
    given      the last given frames (T, C, H, W)
    forecast   (T, C, H, W)
    kind       ".gif", or ".mp4" for H.264
    leads      the name of each lead time, such as 10 min; None: they are counted
    look       Look; None: grey
    pixels     smaller frames are enlarged to about this side
    fps        frames per second
    """
    look = look or Look()
    before, after = frame_names(len(given), leads or counted_leads(len(forecast)))
    images = look.paint(shrunk(np.concatenate([look.values(given), look.values(forecast)]), LARGEST))
    images = as_bytes(images, max(1, pixels // max(images.shape[1:3])))
    labels = [[f"given, {name}"] for name in before] + [[f"forecast, {name}"] for name in after]
    images = np.stack([labelled(image, t, labels, len(before), 0, look) for t, image in enumerate(images)])
    if kind == ".gif":
        save_gif(path, images, 1000 // fps)
        return
    # Even sides: H.264 halves the resolution of the colours
    images = np.pad(images, ((0, 0), *((0, side % 2) for side in images.shape[1:3]), (0, 0)), "edge")
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = "yuv420p"  # every player can show it
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def save_images(path, frames, look=None):
    """Write frames (T, C, H, W) as PNGs: next.png becomes next_001.png, next_002.png, ... look: Look; None: grey.

    Returns the paths of the files.
    """
    look, paths = look or Look(), []
    for number, image in enumerate(as_bytes(look.paint(look.values(frames)), 1), 1):
        paths.append(path.with_stem(f"{path.stem}_{number:03d}"))
        with replacing(paths[-1]) as temporary:
            Image.fromarray(image).save(temporary, "PNG")
    return paths


def as_bytes(images, scale):
    """Images (T, H, W, 1 or 3) in [0, 1] as uint8 (T, h, w, 3). Every pixel becomes a square of `scale` pixels."""
    images = np.broadcast_to(images, (*images.shape[:3], 3))
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
    horizon = len(next(iter(results.values()))["per_frame"][rows[0].name])
    times, axis_name = lead_axis(leads or counted_leads(horizon))
    figure = Figure((max(4.5, 3.2 * len(rows)), 3), layout="constrained")
    axes = figure.subplots(1, len(rows), squeeze=False)
    for axis, row in zip(axes[0], rows):
        for i, (label, result) in enumerate(results.items()):
            values, (colour, dashes) = result["per_frame"][row.name], LINES[i % len(LINES)]
            axis.plot(times, values, marker=".", label=label, color=colour, linestyle=dashes)
        unit = f" [{UNITS[row.name]}]" if row.name in UNITS else ""
        axis.set_title(f"{row.name}{unit}, {row.better} is better", fontsize=9)
        axis.set_xlabel(axis_name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(times) <= 12:
            axis.set_xticks(times)
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside upper center", ncols=len(labels), frameon=False)
    save(figure, path)


def lead_axis(leads):
    """Lead times as numbers, and the name of their axis: 10 min, 20 min give [10.0, 20.0], lead time [min]."""
    units = {lead.partition(" ")[2] for lead in leads}
    if len(units) > 1:
        return list(range(1, len(leads) + 1)), f"lead time [frames], up to {leads[-1]}"
    return [float(lead.partition(" ")[0]) for lead in leads], f"lead time [{units.pop() or 'frames'}]"


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


def signed_colours(forecast, targets, limit=1.0):
    """Errors as colours (T, H, W, 3): blue where the forecast is too low, red where it is too high.

    forecast, targets   values (T, H, W, 1 or 3)
    limit               errors from here on get the full colour
    """
    difference = (forecast - targets).mean(-1)
    colours = colormaps["RdBu_r"](difference / (2 * limit) + 0.5)[..., :3].astype(np.float32)
    return np.where(np.isnan(difference)[..., None], np.float32(MISSING), colours)


def error_limit(pairs, look):
    """The error that gets the full colour: the 99.9th percentile of |error| over pairs (forecast, targets)."""
    return max(LEAST_LIMIT * (look.high - look.low), nearly_largest(np.abs(f - t).mean(-1) for f, t in pairs))


def side_by_side(frames, columns, gap=2):
    """Frames (T, H, W, 1 or 3) in one row on white: (H, columns * (W + gap) - gap, 3)."""
    T, H, W, _ = frames.shape
    canvas = np.ones((H, columns * (W + gap) - gap, 3), dtype=np.float32)
    for t, frame in enumerate(frames):
        canvas[:, t * (W + gap) : t * (W + gap) + W] = np.clip(frame, 0, 1)
    return canvas
