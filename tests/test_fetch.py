"""Downloads of published data sets, against a local server. Nothing here needs the internet."""

import functools
import hashlib
import http.server
import os
import signal
import threading
import time
import zipfile

import numpy as np
import pytest
from helpers import data_set, write_video

from vmrnn.data import fetch
from vmrnn.errors import UserError

NPY = "mnist_test_seq.npy"
UNREACHABLE = "http://127.0.0.1:1/"


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder.

    requests   how many files were asked for
    cut_off    whether an answer ends after half of the bytes that it announces
    stalled    an Event if an answer stops after half, and goes on when the Event is set; None: it does not stop
    """

    requests, cut_off, stalled = 0, False, None


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests += 1
        super().do_GET()

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: len(content) // 2])
        if self.server.stalled:
            self.server.stalled.wait(60)
        if not self.server.cut_off:
            outputfile.write(content[len(content) // 2 :])


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server of tmp_path/server, from which both data sets are fetched."""
    folder = tmp_path / "server"
    folder.mkdir()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        server.folder, server.url = folder, f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(fetch, "STANDARD_URL", server.url + NPY)
        monkeypatch.setattr(fetch, "KTH_URL", server.url)
        yield server
        server.shutdown()
        thread.join()


# Moving MNIST


@pytest.fixture
def published(server, monkeypatch):
    """A small file of the layout of the published one; returns its frames."""
    frames = np.random.default_rng(0).integers(0, 256, (20, 3, 64, 64), np.uint8)
    np.save(server.folder / NPY, frames)
    monkeypatch.setattr(fetch, "STANDARD_MD5", hashlib.md5((server.folder / NPY).read_bytes()).hexdigest())
    return frames


def test_the_standard_file_is_fetched_once(published, server, tmp_path, monkeypatch):
    """test_data_dir standard gives the sequences of the published file; a second test needs no server."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        test = data_set("test", test_data_dir="standard")
        assert len(test) == 3
        frames = np.concatenate(test[1])[:, 0]
        np.testing.assert_array_equal(frames, published[:, 1] / np.float32(255))
        asked, server.requests = server.requests, 0
        assert [path.name for path in (tmp_path / "data").iterdir()] == [NPY]
    assert asked == 0


def test_a_file_that_is_there_is_used(published, server, tmp_path):
    """Also where torchvision keeps it. Another file of that name is refused and left alone."""
    kept = tmp_path / "data" / "MovingMNIST" / NPY
    kept.parent.mkdir(parents=True)
    kept.write_bytes((server.folder / NPY).read_bytes())
    assert fetch.fetch_standard(tmp_path / "data") == kept
    kept.write_bytes(b"another")
    with pytest.raises(UserError, match="md5.*remove it"):
        fetch.fetch_standard(tmp_path / "data")
    assert kept.read_bytes() == b"another" and server.requests == 0


@pytest.mark.parametrize("fault", ["absent", "damaged", "cut off", "no network"])
def test_a_failed_download_of_the_standard_file(published, server, tmp_path, monkeypatch, fault):
    """One line says what to do instead, and nothing is left."""
    break_server(server, NPY, fault, monkeypatch)
    with pytest.raises(UserError, match=f"could not be fetched.*put {NPY} into .*data/ by hand") as caught:
        fetch.fetch_standard(tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_killed_download_leaves_nothing_that_looks_whole(published, server, tmp_path, start):
    server.stalled = threading.Event()
    code = f"""
from vmrnn.data import fetch
fetch.STANDARD_URL, fetch.STANDARD_MD5 = {fetch.STANDARD_URL!r}, {fetch.STANDARD_MD5!r}
fetch.fetch_standard({str(tmp_path / "data")!r})
"""
    pid, wait = start(tmp_path / "run", code)
    end = time.monotonic() + 60
    while not any(tmp_path.glob(f"data/.fetch-*/{NPY}")) and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    assert wait() == -signal.SIGKILL
    server.stalled.set()
    left = list((tmp_path / "data").iterdir())
    assert [path.name[:7] for path in left] == [".fetch-"]  # it was killed in the middle
    server.stalled = None
    assert fetch.fetch_standard(tmp_path / "data").read_bytes() == (server.folder / NPY).read_bytes()


def break_server(server, name, fault, monkeypatch):
    path = server.folder / name
    if fault == "absent":
        path.unlink()
    elif fault == "damaged":
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    elif fault == "cut off":
        server.cut_off = True
    else:
        monkeypatch.setattr(fetch, "STANDARD_URL", UNREACHABLE + NPY)
        monkeypatch.setattr(fetch, "KTH_URL", UNREACHABLE)


# KTH

PERSONS = (1, 16, 17)  # of training, validation and test


@pytest.fixture
def kth(server, tmp_path):
    """The six zip files and the list, as published but with three short videos per action."""
    video = tmp_path / "video.avi"
    write_video(video, np.random.default_rng(0).integers(0, 256, (25, 8, 10, 1), np.uint8))
    lines = ["Sequences", ""]
    for action in fetch.KTH_ACTIONS:
        names = [f"person{person:02}_{action}_d4" for person in PERSONS]
        pack(server.folder / f"{action}.zip", {f"{name}_uncomp.avi": video.read_bytes() for name in names})
        lines += [f"{name}\t\tframes\t1-25" for name in names]
    (server.folder / fetch.KTH_LIST).write_text("\n".join(lines))
    return video.read_bytes()


def pack(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def test_kth_is_fetched_once(kth, server, tmp_path):
    """What is fetched is read as KTH; a second call asks the server for nothing."""
    folder = fetch.fetch_kth(tmp_path / "kth")
    assert sorted(path.name for path in folder.iterdir()) == sorted([*fetch.KTH_ACTIONS, fetch.KTH_LIST])
    options = dict(dataset="kth", train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"), input_size=(8, 10))
    assert len(data_set("train", length=1000, **options)) == 6 * (25 - 19)
    assert len(data_set("test", **options)) == 4 * 1 + 2 * 2
    server.requests = 0
    fetch.fetch_kth(folder)
    assert server.requests == 0


@pytest.mark.parametrize("name", [fetch.KTH_LIST, "jogging.zip"])
@pytest.mark.parametrize("fault", ["absent", "damaged", "cut off", "no network"])
def test_a_failed_download_of_kth(kth, server, tmp_path, monkeypatch, name, fault):
    """One line says what to do instead. What was whole stays, and the next call goes on from there."""
    if (name, fault) == (fetch.KTH_LIST, "damaged"):
        (server.folder / name).write_text("<html>log in first</html>")
    elif name == fetch.KTH_LIST:
        break_server(server, name, fault, monkeypatch)
    else:
        whole = fetch.download_whole

        def breaking(url, path):
            if url.endswith(name):
                break_server(server, name, fault, monkeypatch)
                url = fetch.KTH_URL + name
            whole(url, path)

        monkeypatch.setattr(fetch, "download_whole", breaking)
    with pytest.raises(UserError, match=f"{name} could not be fetched.*{name} into .* by hand") as caught:
        fetch.fetch_kth(tmp_path / "kth")
    assert "\n" not in str(caught.value)
    before = [] if name == fetch.KTH_LIST else [fetch.KTH_LIST, *fetch.KTH_ACTIONS[:3]]
    assert sorted(path.name for path in (tmp_path / "kth").iterdir()) == before


def test_a_zip_file_of_something_else_is_refused(kth, server, tmp_path):
    for foreign in ("../person01_boxing_d1_uncomp.avi", "person01_running_d1_uncomp.avi", "setup.exe"):
        pack(server.folder / "boxing.zip", {foreign: kth})
        with pytest.raises(UserError, match="is no video of boxing"):
            fetch.fetch_kth(tmp_path / "kth")
    assert [path.name for path in (tmp_path / "kth").iterdir()] == [fetch.KTH_LIST]


def test_the_published_video_that_is_cut_off_is_left_out(kth, server, tmp_path, caplog):
    """Only where it is cut off: the fixture's whole video of that name stays."""
    caplog.set_level("INFO")
    kept = fetch.fetch_kth(tmp_path / "whole") / "boxing" / fetch.KTH_CUT_OFF
    assert kept.exists() and "left out" not in caplog.text
    content = {fetch.KTH_CUT_OFF: kth[: len(kth) // 2], "person16_boxing_d4_uncomp.avi": kth}
    pack(server.folder / "boxing.zip", content)
    folder = fetch.fetch_kth(tmp_path / "cut") / "boxing"
    assert [path.name for path in folder.iterdir()] == ["person16_boxing_d4_uncomp.avi"]
    assert f"{fetch.KTH_CUT_OFF} is left out" in caplog.text


def test_the_command_says_what_went_wrong(run_forked, tmp_path):
    done = run_forked("-m", "vmrnn.data.fetch", "kth", tmp_path / "kth", https_proxy="http://127.0.0.1:1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "00sequences.txt could not be fetched" in done.stderr
