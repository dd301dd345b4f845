"""The report: what is in it, and what it does in a browser."""

import base64
import hashlib
import io
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import test as test_program
from vmrnn import config as configuration, pictures, report
from vmrnn.checkpoint import save_weights
from vmrnn.colours import MISSING, Look, white_level
from vmrnn.field_facts import FieldFacts
from vmrnn.metrics import Metrics, event, figure, row_of
from vmrnn.network import build_model
from vmrnn.rollout import rollout
from vmrnn.values import ValueRange

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
GIVEN, HORIZON, H, W = 3, 4, 9, 12
METRICS = ("mse", "ssim", event("csi", 0.5, 0.5))
NAMES = ("mse", "ssim", "csi_0.5")


def random_sequence(seed, role="best"):
    """report.Shown of one grey sequence, one pixel of the targets missing."""
    frames = torch.rand(GIVEN + 2 * HORIZON, 1, H, W, generator=torch.Generator().manual_seed(seed))
    inputs, targets, forecast = frames.split((GIVEN, HORIZON, HORIZON))
    targets[1, 0, 2, 3] = torch.nan
    return report.Shown(role, seed, figure("mse", forecast, targets), inputs, targets, forecast)


def page_of(path):
    """The JSON object in a report."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture
def written(tmp_path):
    """A report of three sequences, and their frames."""
    sequences = [random_sequence(i, role) for i, role in enumerate(("best", "median", "worst"))]
    results = {}
    for label, black in (("forecast", False), ("black frame", True)):
        total = Metrics(METRICS)
        for shown in sequences:
            forecast = torch.zeros_like(shown.forecast) if black else shown.forecast
            total.update(forecast[None], shown.targets[None])
        results[label] = total.compute()
    config = configuration.Config(num_frames_input=GIVEN, num_frames_output=HORIZON, input_size=[H, W])
    path = tmp_path / "report.html"
    report.write_report(
        path,
        title="a <title>",
        facts={"test set": "</script><b id=hole>"},
        conventions={row.name: str(row) for row in map(row_of, METRICS)},
        results=results,
        sequences=sequences,
        config=config.to_dict(),
        command="python test.py --checkpoint 'x y'",
    )
    return path, sequences, results


def frame_of(sprite, t):
    """Frame t of a sprite as uint8 (H, W) or (H, W, 3)."""
    image = Image.open(io.BytesIO(base64.b64decode(sprite["uri"].split(",")[1])))
    picture = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    y, x = t // sprite["columns"] * H, t % sprite["columns"] * W
    return picture[y : y + H, x : x + W]


def test_the_page_holds_everything_and_asks_for_nothing(written):
    path, sequences, results = written
    text = path.read_text(encoding="utf-8")
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # a name, never fetched
    assert not re.search(r"<(link|img|iframe)|@import|url\(|fetch\(|XMLHttp", text)
    page = page_of(path)
    assert page["results"]["forecast"]["mean"]["ssim"] == results["forecast"]["mean"]["ssim"]
    assert page["results"]["black frame"]["mean"]["csi_0.5"] == 0
    assert page["command"] == "python test.py --checkpoint 'x y'" and page["config"]["input_size"] == [H, W]
    assert page["versions"]["torch"] in torch.__version__
    assert page["published"] is None  # frames of another size than the published task's


@pytest.mark.skipif(shutil.which("git") is None, reason="git absent")
def test_the_revision_is_not_that_of_another_project(tmp_path, monkeypatch):
    """An installed package may lie in the checkout of another project."""
    page, other = tmp_path / "venv" / "report.html", tmp_path / "other.txt"
    page.parent.mkdir()
    page.touch()
    other.touch()
    name = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "other.txt"], [*name, "commit", "-qm", "other"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(report, "TEMPLATE", page)
    assert report.git_revision() == ""
    monkeypatch.setattr(report, "TEMPLATE", other)
    assert len(report.git_revision()) == 12


@pytest.mark.parametrize("width", [W, 3 * W + 1, 4096])
def test_sprites_hold_the_frames(monkeypatch, width):
    monkeypatch.setattr(report, "SPRITE_WIDTH", width)
    shown = random_sequence(0)
    made = report.for_player(shown, Look(), limit=1.0)
    inputs, forecast = shown.inputs, shown.forecast
    grey = [(255 * x[:, 0]).round().to(torch.uint8).numpy() for x in (inputs, forecast)]
    for t in range(GIVEN):
        assert (frame_of(made["truth"], t) == grey[0][t][..., None]).all()
    for t in range(HORIZON):
        assert (frame_of(made["forecast"], t) == grey[1][t]).all()
    missing = frame_of(made["truth"], GIVEN + 1)[2, 3]
    assert tuple(missing) == tuple(round(255 * c) for c in MISSING)
    assert (frame_of(made["error"], 1)[2, 3] == missing).all()
    assert made["mse"] == figure("mse", forecast, shown.targets).tolist()


def test_errors_are_blue_where_too_dark_and_red_where_too_bright():
    targets = np.full((1, 1, 3, 1), 0.5)
    errors = np.array([0.2, 0.0, -0.2])[:, None]
    red, white, blue = pictures.signed_colours(targets + errors, targets, limit=0.2)[0, 0]
    assert red[0] > 2 * red[2] and blue[2] > 2 * blue[0] and (white > 0.95).all()
    assert pictures.error_limit([(targets + 0.2, targets)], Look()) == pytest.approx(0.2)
    least = pictures.error_limit([], Look())
    assert pictures.error_limit([(targets, targets)], Look()) == least == pictures.LEAST_LIMIT


def test_fields_of_small_values_are_shown_brighter():
    rain = torch.zeros(2, 1, 20, 20)
    rain[0, 0, :2] = 0.2
    rain[1, 0, 5, 5] = torch.nan
    assert white_level([rain]) == pytest.approx(0.2)
    assert white_level([rain, rain + 0.5]) == white_level([rain.repeat(1, 3, 1, 1)]) == 1
    shown = report.Shown("best", 0, torch.zeros(1), rain[:1], rain[1:], rain[:1])
    made = report.for_player(shown, Look(high=0.2), limit=1.0)
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(made["forecast"]["uri"].split(",")[1]))))[0, 0] == 255


def test_pick_takes_each_sequence_once_and_none_without_a_figure():
    nan = float("nan")
    assert report.pick([3, 1, nan, 2, 5, 4]) == {"best": 1, "median": 0, "worst": 4}
    assert report.pick([2, 1]) == {"best": 1, "worst": 0}
    assert report.pick([nan, 1]) == {"best": 1}
    assert report.pick([nan]) == {}


def test_published_figures_stand_beside_the_published_task_only(tmp_path, monkeypatch):
    mean = {"mse": 20.0, "ssim_dr2": 0.9}
    generated = configuration.Config().to_dict()
    table = report.published(generated, mean)
    assert table["own"] == [20.0, 0.9]
    assert ["VMRNN-D", "15.3 M", "arXiv 2403.16536", 16.46, 0.9645] in table["rows"]
    errors = [error for *_, error, _ in table["rows"]]
    assert errors == sorted(errors)
    assert "NOT the published one" in table["note"]
    assert report.published(generated | {"num_frames_output": 5}, mean) is None
    assert report.published(generated | {"dataset": "mine"}, mean) is None
    file = tmp_path / "mnist_test_seq.npy"
    file.write_bytes(b"any")
    named = generated | {"test_data_dir": str(file)}
    assert "NOT the published one" in report.published(named, mean)["note"]
    monkeypatch.setattr(report, "STANDARD_MD5", hashlib.md5(b"any").hexdigest())
    assert "is the published one" in report.published(named, mean)["note"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (15.0, "85 % less squared error than a black frame; 50 % more squared error than motion 2; SSIM 0.88."),
        (100.0, "the same squared error as a black frame; 900 % more squared error than motion 2; SSIM 0.88."),
        (
            0.1,
            "more than 99 % less squared error than a black frame; 99 % less squared error than motion 2; SSIM 0.88.",
        ),
        (math.nan, ""),
    ],
)
def test_the_result_in_one_sentence(error, sentence):
    results = {"forecast": {"mse": error, "ssim": 0.876}, "black frame": {"mse": 100.0}, "motion 2": {"mse": 10.0}}
    assert report.headline({label: {"mean": mean} for label, mean in results.items()} | {"z": {"mean": {}}}) == sentence


def test_few_metrics_come_first():
    names = ["mse", "mae", "mse_pixel", "ssim", "ssim_dr2", "psnr", "csi_2", "pod_2", "csi_5"]
    assert report.main_metrics(names) == ["mse", "ssim", "psnr", "csi_2"]
    assert report.main_metrics(["acc", "rmse"]) == ["acc", "rmse"]


@pytest.mark.parametrize(
    ("options", "name", "text"),
    [
        (dict(), "moving_mnist", r"handwritten digits .*; digits per sequence: 2"),
        (dict(num_objects=1), "moving_mnist", r"handwritten digits .*; digits per sequence: 1"),
        (dict(dataset="array", train_data_dir="somewhere/rain.npz"), "rain.npz", r"your own: .npy or .npz, [^;]*"),
    ],
)
def test_the_data_are_named(options, name, text):
    config = configuration.Config(**options)
    assert test_program.data_name(config) == name
    assert re.fullmatch(text, test_program.data_description(config))


def test_json_without_nan():
    assert report.strict_json({"a": [1.5, float("nan")], "b": float("inf")}) == '{"a": [1.5, null], "b": null}'


DRIVER = (
    """
<script>
addEventListener("load", () => {
  const find = id => document.getElementById(id), found = {};
  const pixels = id => Array.from(find(id).getContext("2d").getImageData(0, 0, WIDTH, HEIGHT).data);
  const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  const status = () => find("status").textContent;
  find("player").scrollIntoView();
  found.plays = find("play").textContent;
  found.live = [find("status").getAttribute("aria-live")];
  press(" ");
  found.live.push(find("status").getAttribute("aria-live"));
  press("Home");
  for (let i = 0; i < GIVEN; i++) press("ArrowRight");
  found.value = find("frame").getAttribute("aria-valuetext");
  found.start = [status(), pixels("truth"), pixels("forecast")];
  press("Home");
  found.home = [status(), pixels("truth"), pixels("forecast")];
  press("End"); press("ArrowLeft");
  found.left = status();
  document.querySelectorAll(".tabs button")[2].click();
  found.worst = [status(), pixels("forecast")];
  find("frame").value = 4;
  find("frame").dispatchEvent(new Event("input"));
  found.slider = status();
  find("play").click();
  found.button = find("play").textContent;
  setTimeout(() => {
    found.played = status();
    press(" ");
    found.paused = find("play").textContent;
    found.curves = document.querySelectorAll(".curves path").length;
    document.querySelector(".legend input").click();
    found.fewer = document.querySelectorAll(".curves path").length;
    found.player = find("player").getBoundingClientRect().top;
    found.metrics = document.querySelector("h2").getBoundingClientRect().top;
    found.wide = document.documentElement.scrollWidth - innerWidth;
    found.hole = find("hole") !== null;
    found.text = document.body.innerText;
    document.body.append(Object.assign(document.createElement("pre"),
      {id: "found", textContent: JSON.stringify(found)}));
  }, 600);
});
addEventListener("error", event => { document.documentElement.dataset.error = event.message; });
</script>
""".replace("WIDTH", str(W))
    .replace("HEIGHT", str(H))
    .replace("GIVEN", str(GIVEN))
)


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_works_in_a_browser(written, tmp_path, width):
    """Played, stepped and read back, pixel by pixel, by a script that stands at the end of a copy."""
    path, sequences, _ = written
    driven = tmp_path / "driven.html"
    driven.write_text(path.read_text(encoding="utf-8").replace("<main", DRIVER + "<main"), encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000", driven.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "data-error" not in done.stdout.split(">", 2)[1], done.stdout[:500]
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    found = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))

    def shows(pixels, frame):
        pixels = np.array(pixels).reshape(H, W, 4)
        expected = (255 * frame[0]).round().to(torch.uint8).numpy()
        known = ~np.isnan(frame[0].numpy())
        return (pixels[..., 0] == expected)[known].all() and (pixels[..., 3] == 255).all()

    inputs, targets, forecast = sequences[0].inputs, sequences[0].targets, sequences[0].forecast
    last = GIVEN + HORIZON
    figures = [f"{value:.4f}" if value < 10 else f"{value:.2f}" for value in figure("mse", forecast, targets).tolist()]
    assert found["start"][0] == f"frame {GIVEN + 1} of {last}: forecast, lead time 1, mse {figures[0]}"
    assert shows(found["start"][1], targets[0]) and shows(found["start"][2], forecast[0])
    assert found["plays"] == "Pause" and found["live"] == ["off", "polite"]  # it plays by itself, silently
    assert found["value"] == found["start"][0]  # what a screen reader says of the slider
    assert found["player"] < found["metrics"]
    assert found["home"][0] == f"frame 1 of {last}: given" and shows(found["home"][1], inputs[0])
    assert not any(found["home"][2])  # no forecast yet: transparent
    assert found["left"] == f"frame {last - 1} of {last}: forecast, lead time {HORIZON - 1}, mse {figures[-2]}"
    assert f"lead time {HORIZON - 1}" in found["worst"][0]  # another sequence, the same moment
    assert shows(found["worst"][1], sequences[2].forecast[HORIZON - 2])
    assert found["slider"].startswith(f"frame 5 of {last}")
    assert (found["button"], found["paused"]) == ("Pause", "Play")
    assert found["played"].startswith(f"frame 7 of {last}")  # 600 ms at 250 ms a frame
    assert (found["curves"], found["fewer"]) == (2 * len(NAMES), len(NAMES))
    assert found["wide"] <= 0  # nothing sticks out at this width
    assert not found["hole"] and "</script><b id=hole>" in found["text"] and "a <title>" in found["text"]
    for row in map(row_of, METRICS):
        assert str(row) in found["text"]


def test_the_program_shows_its_best_median_and_worst_sequence(tmp_path):
    options = dict(
        model="VMRNN-B", patch_size=4, embed_dim=16, depths=[1], d_state=4, train_data_dir="builtin", device="cpu",
        input_size=[16], digit_size=8, num_objects=1, num_frames_input=3, num_frames_output=2, test_sequences=7,
        test_batch_size=4,
    )  # fmt: skip
    config = configuration.resolve(None, options)
    model = build_model(**config.network_options).eval()
    save_weights(tmp_path / "w.safetensors", model, config.to_dict())
    arguments = ["--checkpoint", str(tmp_path / "w.safetensors"), "--strips", "1", "--device", "cpu"]
    test_program.main(arguments)
    data = test_program.build_dataset("test", config)
    items = [data[i] for i in range(7)]
    with torch.no_grad():
        errors = [figure("mse", rollout(model, x[None], 2)[:, 2:], y[None]).mean().item() for x, y in items]
    page = page_of(tmp_path / "test_w_moving_mnist_2" / "report.html")
    assert [(s["role"], s["index"]) for s in page["sequences"]] == list(report.pick(errors).items())
    assert len(page["sequences"]) == 3
    for shown in page["sequences"]:
        assert np.mean(shown["mse"]) == pytest.approx(errors[shown["index"]], rel=1e-4)
    assert page["command"].endswith(f"--checkpoint {tmp_path / 'w.safetensors'} --strips 1 --device cpu")
    assert json.loads((tmp_path / "test_w_moving_mnist_2" / "metrics.json").read_text())["results"] == page["results"]


def test_how_long_the_tested_weights_were_trained(tmp_path):
    """best.safetensors is of the epoch with the smallest error, last.pt of the last one."""
    entries = [{"epoch": n, "samples": 1000 * n, "seconds": 60.0 * n, "valid_loss": 1.0, "mse": mse}
               for n, mse in ((1, 3.0), (2, 2.0), (3, 2.5))]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, [*entries, {"epoch": 4, "train_loss": 1.0}])))
    for name, says in (("best.safetensors", "2,000 sequences, 2 epochs"), ("last.pt", "3,000 sequences, 3 epochs")):
        assert test_program.training_facts(tmp_path / name)["training"].startswith(says)
    assert test_program.training_facts(tmp_path / "elsewhere" / "last.pt") == {}


def test_the_animation_shows_truth_forecast_and_difference(tmp_path):
    inputs, targets, forecast = (torch.full((1, 1, 8, 8), value) for value in (0.5, 0.0, 1.0))
    pictures.save_animation(tmp_path / "x.gif", inputs, targets, forecast, pixels=8)
    with Image.open(tmp_path / "x.gif") as gif:
        frames = []
        for t in range(gif.n_frames):
            gif.seek(t)
            frames.append(np.asarray(gif.convert("RGB")).astype(int))
    shown = frames[1][pictures.LABEL_HEIGHT :][:8]
    truth, middle, right = shown[:, :8], shown[:, 10:18], shown[:, 20:28]
    assert truth.max() < 10 and middle.min() > 245 and (right[..., 0] > right[..., 2] + 50).all()  # too bright: red
    # The bar: the given frame is grey, the second is ahead, then blue
    bars = [frame[pictures.LABEL_HEIGHT + 8 + 5] for frame in frames]
    assert abs(bars[0][3] - pictures.BAR["done"]).max() < 12 and abs(bars[0][20] - pictures.BAR["ahead"]).max() < 12
    assert abs(bars[1][3] - pictures.BAR["done"]).max() < 12 and abs(bars[1][20] - pictures.BAR["forecast"]).max() < 12
    assert all((frame[: pictures.LABEL_HEIGHT] < 128).any() for frame in frames)  # text


def test_the_page_and_the_pictures_have_the_same_colours():
    light = report.TEMPLATE.read_text(encoding="utf-8").split("@media")[0]
    names = ("first", "second", "third", "fourth")
    assert [re.search(rf"--{name}: (#\w+)", light)[1] for name in names] == [colour for colour, _ in pictures.LINES]


@pytest.mark.parametrize(
    "tested, options, name",
    [
        ("run/best.safetensors", dict(dataset="kth", num_frames_output=20), "run/test_kth_20"),
        ("run/best.safetensors", dict(dataset="kth", num_frames_output=40), "run/test_kth_40"),
        ("run/last.pt", dict(test_data_dir="standard"), "run/test_last_standard_10"),
        ("theirs.npy", dict(dataset="grid", train_data_dir="a b/*.nc", num_frames_output=5), "test_theirs_a-b_5"),
        ("x.safetensors", dict(dataset="array", train_data_dir="in/rain.npz"), "test_x_rain_10"),
    ],
)
def test_tests_of_other_data_and_horizons_have_folders_of_their_own(tested, options, name):
    assert str(test_program.default_folder(tested, configuration.Config(**options))) == name


@pytest.mark.parametrize("colours", ["grey", "viridis"])
def test_the_error_of_a_sequence_is_that_of_the_metrics(tmp_path, colours):
    """Of values with a transform: on the linear scale, as in the table above the player, whatever the colours are."""
    value_range = ValueRange(0.0, 64.0, transform="sqrt")
    shown, facts = random_sequence(0), FieldFacts(None)
    frames = [each[None] for each in (shown.inputs, shown.targets, shown.forecast)]
    look = Look.of(configuration.Config(dataset="array"), value_range, [shown.targets], colours)
    pictures = test_program.Pictures(tmp_path, 1, facts, look, value_range)
    pictures(*frames)
    expected = figure("mse", shown.forecast.square(), shown.targets.square())
    torch.testing.assert_close(pictures.errors[0], expected)
