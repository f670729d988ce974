"""Files appear wholly, once, with their modes and links as they were; what killed writers leave is swept."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from laser_callback.support.files import (
    appearing,
    cache_root,
    need_files,
    need_writable,
    need_writable_folder,
    told_if_unwritten,
    write_atomically,
    write_json,
)

# ---- new files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_of_many_that_make_one_new_place_exactly_one_succeeds(tmp_path, kind):
    writers = 8
    for round_ in range(20):
        place, barrier = tmp_path / str(round_) / "out", threading.Barrier(writers)
        told: list[int] = []

        def write(author, place=place, barrier=barrier, told=told):
            try:
                with appearing(place) as whole:
                    if kind == "folder":
                        whole.mkdir()
                    (whole / "a" if kind == "folder" else whole).write_text(str(author))
                    barrier.wait(10)
            except FileExistsError:
                return
            told.append(author)

        threads = [threading.Thread(target=write, args=(author,)) for author in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = told
        assert (place / "a" if kind == "folder" else place).read_text() == str(winner)
        assert os.listdir(place.parent) == ["out"]


def test_a_file_system_without_links_is_claimed_too(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    with appearing(tmp_path / "out") as whole:
        whole.write_text("mine")
    assert (tmp_path / "out").read_text() == "mine"
    with pytest.raises(FileExistsError, match="exists already"), appearing(tmp_path / "other") as whole:  # noqa: PT012
        whole.write_text("late")
        (tmp_path / "other").write_text("first")
    assert (tmp_path / "other").read_text() == "first"


def test_the_longest_name_that_a_file_may_have(tmp_path):
    for name in ("x" * 255, "é" * 127):
        write_atomically(tmp_path / name, "whole")
        assert (tmp_path / name).read_text() == "whole"
        with appearing(tmp_path / "new" / name) as whole:
            whole.write_text("new")
    assert len(os.listdir(tmp_path / "new")) == 2


# ---- files that are replaced -----------------------------------------------------------------------------------------


def test_links_and_modes_stay(tmp_path):
    target = tmp_path / "elsewhere" / "target.json"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o600)
    (tmp_path / "link.json").symlink_to(target)
    (tmp_path / "dangling.json").symlink_to(tmp_path / "later.json")
    for name in ("link.json", "dangling.json"):
        write_atomically(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
    assert target.read_text() == (tmp_path / "later.json").read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert os.listdir(target.parent) == ["target.json"]


def test_a_device_is_written_and_not_replaced():
    write_atomically(Path("/dev/null"), "into it")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_json_of_whatever_there_is(tmp_path):
    write_json(tmp_path / "a.json", {"half": "\ud800", "place": tmp_path, 1: float("inf"), "set": {2, 1}})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"half": "\ud800", "place": str(tmp_path), "1": None, "set": [1, 2]}


# ---- killed writers --------------------------------------------------------------------------------------------------

_KILLED = """
import os, signal, sys
from pathlib import Path
from laser_callback.support.files import appearing
with appearing(Path(sys.argv[1])) as whole:
    whole.mkdir()
    (whole / "weights").write_bytes(bytes(1000))
    print("written", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_leaves_is_swept_and_what_a_live_one_writes_is_not(tmp_path):
    place = tmp_path / "out"
    (tmp_path / ".out.laser-mine").write_text("a file of the user's")
    writers = [
        subprocess.Popen([sys.executable, "-c", _KILLED, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"written\n"
        hidden = {path for path in tmp_path.iterdir() if path.is_dir()}
        assert len(hidden) == 2
        writers[0].send_signal(signal.SIGKILL)
        writers[0].wait()
        write_atomically(tmp_path / "other", "a place of its own")
        assert {path for path in tmp_path.iterdir() if path.is_dir()} == hidden
        with pytest.raises(RuntimeError), appearing(place):  # noqa: PT012 - to look from within
            left = {path for path in tmp_path.iterdir() if path.is_dir()}
            assert len(left & hidden) == 1
            raise RuntimeError
        writers[1].communicate()
        assert sorted(os.listdir(tmp_path)) == [".out.laser-mine", "other", "out"]
    finally:
        for writer in writers:
            writer.kill()


# ---- before the work -------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_text("")
    need_writable(report=tmp_path / "new" / "folder" / "report.json", html=None, other=tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]
    (tmp_path / "loop").symlink_to("loop")
    for path, why in (
        (tmp_path, "it is a folder, expected a file"),
        (tmp_path / "file" / "report.json", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / ("x" * 243 + ".json"), "File name too long for the examples beside it, 'x*.examples.jsonl'"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (Path("/proc/none/report.json"), ""),
    ):
        with pytest.raises(OSError, match=f"`report`: '{path}' cannot be written: {why}"):
            need_writable(report=path)
    need_writable(report=tmp_path / ("x" * 240 + ".json"), page=tmp_path / ("x" * 250 + ".html"))


def test_what_is_read_or_written_by_another_option_is_not_written(tmp_path):
    facts = tmp_path / "out.examples.jsonl"
    facts.write_text("{}")
    (tmp_path / "link").symlink_to(facts)
    for path, words in (("link", "is also `facts`"), ("out.json", "has its examples in out.examples.jsonl, which is")):
        with pytest.raises(ValueError, match=f"`output`: '{tmp_path / path}' {words}.*: name another file"):
            need_writable({"facts": facts, "text": None, "plan": "1.fc_in@0.1" * 99}, output=tmp_path / path)
    with pytest.raises(ValueError, match=r"`html`: .* is also `output`"):
        need_writable(output=tmp_path / "new", html=tmp_path / "new")
    need_writable({"facts": facts}, output="/dev/null", html="/dev/null")
    with pytest.raises(NotADirectoryError, match=r"`pictures`: .* is no folder"):
        need_writable_folder(pictures=facts)


def test_a_name_that_no_file_can_have_is_said_with_its_option(tmp_path):
    for name, words in (("x" * 5000, "cannot be read: File name too long"), ("a\0b", "there is no file")):
        with pytest.raises(OSError, match=words) as error:
            need_files(plan=name)
        assert str(error.value).startswith("`plan`: ")
        assert len(str(error.value)) < 1000


def test_no_hidden_folder_is_told_of(tmp_path):
    def full(_):
        raise SafetensorError("Error while serializing: I/O error: File too large (os error 27)")

    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_atomically(tmp_path / "folder", "text")
    assert str(error.value).endswith(f"Is a directory: '{tmp_path / 'folder'}'")
    with pytest.raises(OSError, match=f"File too large: '{tmp_path / 'new'}'"), appearing(tmp_path / "new") as whole:
        full(whole)
    with pytest.raises(FileNotFoundError, match="elsewhere"), appearing(tmp_path / "new"):
        Path("elsewhere").read_text()
    assert os.listdir(tmp_path) == ["folder"]


def test_a_full_disk_costs_the_report_only(tmp_path):
    (tmp_path / "file").write_text("")
    told = pytest.warns(UserWarning, match=r"the report could not be written \(.*'\): going on without it")
    with told, told_if_unwritten("the report"):
        write_atomically(tmp_path / "file" / "report.json", "x")


def test_no_home_is_said_with_its_cure(monkeypatch):
    monkeypatch.delenv("LASER_CALLBACK_CACHE", raising=False)

    def no_home(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", no_home)
    with pytest.raises(OSError, match=r"no home folder .* set \$LASER_CALLBACK_CACHE"):
        cache_root()


def test_a_sweep_among_many_files_is_quick(tmp_path):
    for number in range(2000):
        (tmp_path / f"{number}.json").touch()
    begin = time.perf_counter()
    for _ in range(10):
        write_atomically(tmp_path / "0.json", "x")
    assert time.perf_counter() - begin < 2
