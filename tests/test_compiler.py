"""Which cached kernels are trusted, and the messages about a compiler or a folder that cannot be used."""

import logging
import os
import stat
import sys

import pytest

from vmrnn import compiler, kernel_cache as cache
from vmrnn.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="owners and permissions as POSIX has them")

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def new_process():
    """A process that has chosen no folder yet."""
    cache._folder.cache_clear()
    yield
    cache._folder.cache_clear()


@pytest.fixture
def build(tmp_path):
    if compiler.find_compiler() is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "answer.cpp"
    source.write_text(SOURCE)
    return lambda: compiler.build("answer", (source,), ("-shared", "-fPIC"))


def warnings(caplog):
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_the_folder_and_its_files_are_made_for_this_user_alone(tmp_path, monkeypatch, build, caplog):
    monkeypatch.setenv("VMRNN_CACHE", str(tmp_path / "new" / "folder"))
    before = os.umask(0o002)  # as many systems have it: new files can be written by the group
    try:
        path = build()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.parent == tmp_path / "new" / "folder" and build() == path and not warnings(caplog)


@pytest.mark.parametrize("what", ["folder", "parent", "owner"])
def test_a_folder_that_others_can_write_is_not_used(what, tmp_path, monkeypatch, build, caplog):
    folder = tmp_path / "shared" / "cache"
    folder.mkdir(parents=True, mode=0o700)
    if what == "owner":
        if os.getuid():
            pytest.skip("only root can give a folder away")
        os.chown(folder, 12345, -1)
    else:
        (folder if what == "folder" else folder.parent).chmod(0o777)
    monkeypatch.setenv("VMRNN_CACHE", str(folder))
    paths = {build(), build()}
    assert len(paths) == 1 and paths.pop().parent not in (folder, folder.parent) and not any(folder.iterdir())
    (message,) = warnings(caplog)  # said once
    assert (
        str(folder) in message
        and {"folder": "chmod 700", "parent": "everybody", "owner": "another user"}[what] in message
    )


def test_permissions_of_the_default_folder_are_mended(tmp_path, monkeypatch, build, caplog):
    monkeypatch.delenv("VMRNN_CACHE", raising=False)
    monkeypatch.setattr(cache.platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "vmrnn"))
    (tmp_path / "vmrnn").mkdir()
    (tmp_path / "vmrnn").chmod(0o775)
    assert build().parent == tmp_path / "vmrnn" and not warnings(caplog)
    assert stat.S_IMODE((tmp_path / "vmrnn").stat().st_mode) == 0o700


@pytest.mark.parametrize("how", ["writable", "owner"])
def test_a_planted_library_is_not_loaded(how, tmp_path, monkeypatch, build):
    """Its name and checksum are right: whoever can write there can make them so."""
    monkeypatch.setenv("VMRNN_CACHE", str(tmp_path))
    path = build()
    planted = path.read_bytes() + b"planted"
    path.write_bytes(planted)
    renamed = path.with_name(path.name.rsplit("-", 1)[0] + f"-{compiler.checksum(path)}.lib")
    path.rename(renamed)
    assert build() == renamed  # ours: trusted
    if how == "owner":
        if os.getuid():
            pytest.skip("only root can give a file away")
        os.chown(renamed, 12345, -1)
    else:
        renamed.chmod(0o777)
    assert build().read_bytes() != planted and not renamed.exists()


def test_a_folder_that_cannot_be_used_is_named_with_its_cause(tmp_path, monkeypatch, build, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VMRNN_CACHE", str(tmp_path / "file" / "folder"))
    assert build().exists()
    (message,) = warnings(caplog)
    assert str(tmp_path / "file" / "folder") in message and "Not a directory" in message and "VMRNN_CACHE" in message


def test_no_home_folder(monkeypatch, caplog):
    monkeypatch.delenv("VMRNN_CACHE", raising=False)
    monkeypatch.setattr(cache.platformdirs, "user_cache_dir", lambda *_, **__: "~/.cache/vmrnn")
    assert cache.cache_folder().is_absolute() and "no home folder" in warnings(caplog)[0]


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_name_means_the_default(value, tmp_path, monkeypatch):
    monkeypatch.setenv("VMRNN_CACHE", value)
    monkeypatch.setattr(cache.platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "vmrnn"))
    assert cache.cache_folder() == tmp_path / "vmrnn"


@pytest.mark.parametrize(
    "value, reason",
    [(" ", "names no program"), ('g++ "-O2', "no closing quotation"), ("no-such-compiler", "not found")],
)
def test_a_wrong_cxx_is_named(value, reason, monkeypatch):
    monkeypatch.setenv("CXX", value)
    with pytest.raises(UserError, match=reason) as error:
        compiler.find_compiler()
    assert "CXX" in str(error.value) and "\n" not in str(error.value)


def test_a_compiler_that_speaks_latin_1(tmp_path, monkeypatch, build):
    """Its version and its errors hold bytes that are not UTF-8."""
    program = tmp_path / "c++"
    program.write_bytes(b"#!/bin/sh\nprintf 'Fehler: \\344\\366\\374 error\\n' | tee /dev/stderr\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("VMRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(program))
    with pytest.raises(UserError, match="Fehler: .* error; set CXX"):
        build()
