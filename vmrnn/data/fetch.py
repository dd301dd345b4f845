"""Data sets of the paper's table from their original addresses, each by one command.

    python -m vmrnn.data.fetch mnist data           # also: python train.py ... --train_data_dir mnist
    python -m vmrnn.data.fetch moving_mnist data    # also: python test.py ... --test_data_dir standard
    python -m vmrnn.data.fetch kth data/kth

A file takes its name only when it is whole and checked. What is there already is not fetched again.
"""

import argparse
import logging
import os
import socket
import tempfile
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from torch.hub import download_url_to_file

from vmrnn.data.published import KTH_NAME, kth_annotations
from vmrnn.data.videos import video_frames
from vmrnn.errors import UserError
from vmrnn.runtime import run_program

log = logging.getLogger("vmrnn")

STANDARD = "standard"  # the value of test_data_dir that names the published test file of Moving MNIST
STANDARD_URL = "http://www.cs.toronto.edu/~nitish/unsupervised_video/mnist_test_seq.npy"
STANDARD_MD5 = "be083ec986bfe91a449d63653c411eb2"

KTH_URL = "https://www.csc.kth.se/cvap/actions/"
KTH_ACTIONS = ("boxing", "handclapping", "handwaving", "jogging", "running", "walking")
KTH_LIST = "00sequences.txt"
# Users of the published boxing.zip report that this video ends after 304 of 370 frames. The reader refuses such a file.
KTH_CUT_OFF = "person01_boxing_d4_uncomp.avi"

TIMEOUT = 60  # seconds without a byte before a download is given up


def fetch_mnist(folder="data"):
    """The path of MNIST's training images under `folder`; they are fetched if they are absent.

    folder   holds train-images-idx3-ubyte, plain or gzipped, or MNIST/raw/train-images-idx3-ubyte as
             torchvision keeps it

    UserError: a download that failed.
    """
    folder, name = Path(folder), "train-images-idx3-ubyte"
    kept = folder / f"{name}.gz"
    for path in (kept, folder / name, folder / "MNIST" / "raw" / name):
        if path.is_file():
            return path
    from torchvision.datasets import MNIST  # here: no other program start waits for it

    way_out = f"put {kept.name} into {folder}{os.sep} by hand, or use the digits `builtin`, which need no network"
    with fetching("MNIST", folder, way_out) as scratch:
        MNIST(scratch, train=True, download=True)  # checks the md5 sums, shows a bar
        os.replace(scratch / "MNIST" / "raw" / kept.name, kept)
    return kept


def fetch_standard(folder="data"):
    """The path of Moving MNIST's published test file under `folder`; it is fetched if it is absent.

    folder   holds mnist_test_seq.npy, or MovingMNIST/mnist_test_seq.npy as torchvision keeps it

    UserError: a file with another md5 sum, or a download that failed.
    """
    from torchvision.datasets.utils import check_integrity, download_url  # here: no other program start waits for it

    folder, name = Path(folder), STANDARD_URL.rpartition("/")[2]
    for path in (folder / name, folder / "MovingMNIST" / name):
        if path.is_file():
            if not check_integrity(path, STANDARD_MD5):
                raise UserError(
                    f"{path}: damaged or another file, its md5 is not {STANDARD_MD5}; remove it and start again"
                )
            return path
    with fetching(STANDARD_URL, folder, f"put {name} into {folder}{os.sep} by hand") as scratch:
        download_url(STANDARD_URL, scratch, name, STANDARD_MD5)
        os.replace(scratch / name, folder / name)
    return folder / name


def fetch_kth(folder="data/kth"):
    """KTH's videos and the list of their sequences, as vmrnn.data.published.kth reads them. Returns the folder.

    folder   receives 00sequences.txt and a folder of videos per action

    No checksums are published. The size that the server states, the checksums inside a zip file and the names of the
    videos are checked. UserError: a download that failed or is damaged.
    """
    folder = Path(folder)
    if not (folder / KTH_LIST).is_file():
        with fetching(KTH_URL + KTH_LIST, folder, f"put {KTH_LIST} into {folder}{os.sep} by hand") as scratch:
            download_whole(KTH_URL + KTH_LIST, scratch / KTH_LIST)
            kth_annotations(scratch / KTH_LIST)
            os.replace(scratch / KTH_LIST, folder / KTH_LIST)
    for action in KTH_ACTIONS:
        videos = folder / action
        if not any(videos.glob("*.avi")):
            url = f"{KTH_URL}{action}.zip"
            with fetching(url, folder, f"unpack {action}.zip into {videos}{os.sep} by hand") as scratch:
                download_whole(url, scratch / "zip")
                unpack_videos(scratch / "zip", scratch / action, action)
                leave_out_cut_off(scratch / action / KTH_CUT_OFF)
                os.replace(scratch / action, videos)
        log.info("%s: %d videos", videos, len(list(videos.glob("*.avi"))))
    return folder


@contextmanager
def fetching(url, folder, way_out):
    """A hidden folder to download into, inside `folder`, which is made. It is removed at the end.

    A killed download leaves nothing that is read: readers pass over hidden folders. Two programs may fetch at the same
    time.

    url       what is fetched
    way_out   what the user can do if it fails

    UserError: whatever failed inside, in one line.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # the libraries take no timeout of their own
    log.info("fetching %s", url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
            yield Path(scratch)
    except (OSError, RuntimeError, EOFError, UserError, HTTPException, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{url} could not be fetched ({reason}); start again, or {way_out}") from error
    finally:
        socket.setdefaulttimeout(timeout)


def download_whole(url, path):
    """Download a file that has no published checksum, and compare its size with the one that the server states.

    OSError: a connection that failed or ended early. RuntimeError: the server states no size.
    """
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
        size = answer.headers["Content-Length"]
    if size is None:
        raise RuntimeError("the server does not state its size")
    download_url_to_file(url, str(path))
    if path.stat().st_size != int(size):
        raise OSError(f"{path.stat().st_size} of {size} bytes came")


def unpack_videos(path, folder, action):
    """Unpack the videos of one action. The zip file's own checksums are compared.

    UserError: a file that is not a video of this action.
    """
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        for name in names:
            known = KTH_NAME.match(name)
            if not (known and known[3] == action and name.endswith(".avi")) or "/" in name:
                raise UserError(f"{name!r} in it is no video of {action}")
        if not names:
            raise UserError("it is empty")
        archive.extractall(folder, names)


def leave_out_cut_off(path):
    """Remove the video if it is there and cannot be decoded to its end."""
    try:
        if path.exists():
            for _ in video_frames(path):
                pass
    except UserError as error:
        log.info("%s is left out: %s", path.name, error)
        path.unlink()


FETCH = {"mnist": fetch_mnist, "moving_mnist": fetch_standard, "kth": fetch_kth}


def main():
    parser = argparse.ArgumentParser(prog="python -m vmrnn.data.fetch", description="Fetch a data set once.")
    parser.add_argument(
        "dataset", choices=FETCH, help="mnist: its training images. moving_mnist: its published test file"
    )
    parser.add_argument("folder", help="where it goes, such as data or data/kth")
    arguments = parser.parse_args()
    log.info("%s: ready", FETCH[arguments.dataset](arguments.folder))


if __name__ == "__main__":
    run_program(main)
