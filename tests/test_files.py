"""A file or folder is written completely, or not at all."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from phogpt_raw import files
from phogpt_raw.files import (
    awaited_file,
    check_place,
    check_space,
    expanded,
    save_tensors,
    whole_file,
    whole_folder,
)
from phogpt_raw.refusal import Refusal


def test_a_command_of_the_project_can_be_given_from_any_folder(tmp_path, monkeypatch):
    root = Path(files.__file__).parents[1]
    monkeypatch.chdir(root)
    assert files.script("train.py") == "train.py"
    monkeypatch.chdir(tmp_path)
    assert files.script("train.py") == str(root / "train.py")
    assert files.script("not_there.py") == "not_there.py"


def test_a_file_takes_its_name_at_the_end(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with whole_file(file) as unfinished:
        unfinished.write_text("new")
        assert file.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"] and file.read_text() == "new"


def test_a_folder_takes_its_name_at_the_end(tmp_path):
    with whole_folder(tmp_path / "deep" / "a") as unfinished:
        (unfinished / "one").write_text("1")
        assert not (tmp_path / "deep" / "a").exists()
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["a"]
    assert (tmp_path / "deep" / "a" / "one").read_text() == "1"


@pytest.mark.parametrize("writer", [whole_file, whole_folder])
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_an_error_leaves_nothing(tmp_path, writer, error):
    with pytest.raises(type(error)), writer(tmp_path / "a") as unfinished:
        (unfinished if writer is whole_file else unfinished / "one").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code, line", [
    (errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"),
    (errno.EROFS, "cannot be written to"), (errno.EACCES, "cannot be written to")])
def test_a_full_or_closed_disk_is_one_line(tmp_path, code, line):
    with pytest.raises(Refusal, match=line), whole_folder(tmp_path / "a"):
        raise OSError(code, os.strerror(code))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["taken/a", "x" * 300])
def test_a_name_that_cannot_be_is_one_line(tmp_path, name):
    (tmp_path / "taken").write_text("a file")
    for writer in (whole_file, whole_folder):
        with (pytest.raises(Refusal, match=r"cannot be written to|the name is too long"),
              writer(tmp_path / name) as made):
            made.write_text("x")
    assert [f.name for f in tmp_path.iterdir()] == ["taken"]


def test_another_error_of_the_system_is_not_hidden(tmp_path):
    with pytest.raises(OSError, match="broken"), whole_file(tmp_path / "a"):
        raise OSError(errno.EIO, "broken")


@pytest.mark.parametrize("content", [b"", b"[1]", b"null", b"\xff{}", b"[" * 100_000, b'{"a": 1']
                         )
def test_a_file_without_a_json_object_is_refused_with_the_remedy(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(Refusal, match=r"a\.json: not .*; do that"):
        files.read_object(tmp_path / "a.json", "do that")


def test_what_a_killed_write_left_is_removed_by_the_next(tmp_path):
    script = ("import os, signal, sys; from pathlib import Path\n"
              "from phogpt_raw.files import whole_folder\n"
              "with whole_folder(Path(sys.argv[1])) as made:\n"
              "    (made / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n")
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")])
    assert killed.returncode == -signal.SIGKILL
    assert [f.name for f in tmp_path.iterdir()] == ["a" + files.UNFINISHED]
    with whole_folder(tmp_path / "a") as made:
        (made / "whole").write_text("y")
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["whole"]


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path):
    with whole_folder(tmp_path / "a") as first:
        (first / "one").write_text("1")
        busy = pytest.raises(Refusal, match="a: another process is writing it")
        with busy, whole_folder(tmp_path / "a"):
            pass
        assert (first / "one").read_text() == "1"
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["one"]


def test_a_folder_that_appears_meanwhile_stays(tmp_path):
    with pytest.raises(Refusal, match="a: exists already"), whole_folder(tmp_path / "a") as made:
        (made / "one").write_text("1")
        (tmp_path / "a").mkdir()  # a rename would replace an empty folder
    assert [f.name for f in tmp_path.rglob("*")] == ["a"]


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    other = tmp_path / ("a" + files.UNFINISHED)
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(Refusal, match="exists, but this name"), whole_folder(tmp_path / "a"):
        pass
    assert (other / "notes.txt").read_text() == "mine"


def test_a_lock_that_is_not_ours_is_left_alone(tmp_path):
    """Other programs also name their lock files .lock."""
    other = tmp_path / ("a" + files.UNFINISHED)
    other.mkdir()
    (other / files.LOCK).write_text("pid 1")
    with pytest.raises(Refusal, match="exists, but this name"), whole_folder(tmp_path / "a"):
        pass
    assert (other / files.LOCK).read_text() == "pid 1"


@pytest.mark.parametrize("lock", [False, True])
def test_what_is_left_of_a_process_killed_before_it_signed_is_taken_over(tmp_path, lock):
    left = tmp_path / ("a" + files.UNFINISHED)
    left.mkdir()
    if lock:
        (left / files.LOCK).touch()
    with whole_folder(tmp_path / "a") as made:
        (made / "one").write_text("1")
    assert [f.name for f in tmp_path.rglob("*")] == ["a", "one"]


def test_a_folder_made_before_the_lock_was_ours_is_refused(tmp_path, monkeypatch):
    """Another process may finish the folder between our check and our lock."""
    (tmp_path / "a").mkdir()
    with pytest.raises(Refusal, match="a: exists already"), whole_folder(tmp_path / "a"):
        raise AssertionError("nothing should be written")
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def test_a_lock_that_was_moved_away_between_is_not_held(tmp_path, monkeypatch):
    """The process that held the lock has renamed its folder.

    Another process may already write to a new folder with the old name.
    """
    flock = files.fcntl.flock

    def late(opened, how):
        (tmp_path / "lock").rename(tmp_path / "moved")
        (tmp_path / "lock").touch()
        flock(opened, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with pytest.raises(Refusal, match="busy"), files.locked(tmp_path / "lock", "busy"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_drive_without_locks_and_flushes_is_written_all_the_same(tmp_path, monkeypatch, code):
    """An example is a cloud drive that is mounted as a folder."""
    def missing(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.fcntl, "flock", missing)
    monkeypatch.setattr(files.os, "fsync", missing)
    with whole_folder(tmp_path / "a") as made:
        (made / "one").write_text("1")
    with whole_file(tmp_path / "b") as made:
        made.write_text("2")
    assert {f.name for f in tmp_path.rglob("*")} == {"a", "one", "b"}


def test_a_disk_that_fails_to_flush_is_an_error(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(files.os, "fsync", broken)
    with pytest.raises(OSError, match="broken"), whole_file(tmp_path / "a") as made:
        made.write_text("1")
    assert list(tmp_path.iterdir()) == []


def test_tensors_may_be_read_by_those_who_read_other_files(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_home_folder_that_is_not_there_is_one_line():
    with pytest.raises(Refusal, match="~nobody-of-that-name/x: this computer has no user of"):
        expanded("~nobody-of-that-name/x")
    assert expanded("~/x").is_absolute()


def test_folders_within_are_flushed_too(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files, "flush", lambda path: flushed.append(path.name))
    with whole_folder(tmp_path / "a") as made:
        (made / "deep").mkdir()
        (made / "deep" / "one").write_text("1")
    assert {"one", "deep", "a" + files.UNFINISHED, tmp_path.name} <= set(flushed)
    with whole_file(tmp_path / "b") as made:
        made.write_text("1")
    assert flushed[-2:] == ["b" + files.UNFINISHED, tmp_path.name]


def test_space_is_checked_before(tmp_path):
    check_space(tmp_path / "not" / "there", 1000)
    with pytest.raises(Refusal, match=r"1000000\.00 GB are needed and .* are free"):
        check_space(tmp_path / "not" / "there", 10**15)


def test_space_is_enough_to_the_byte(tmp_path, monkeypatch):
    from collections import namedtuple

    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    check_space(tmp_path, 1000)
    with pytest.raises(Refusal):
        check_space(tmp_path, 1001)


def test_a_file_that_another_process_is_about_to_write_is_refused(tmp_path):
    with awaited_file(tmp_path / "a"):
        with pytest.raises(Refusal, match="a: another process is about to write it"), \
                awaited_file(tmp_path / "a"):
            raise AssertionError("two write it")
        with awaited_file(tmp_path / "b"):
            pass
    with awaited_file(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_trial_of_a_place_leaves_what_another_process_is_writing(tmp_path):
    (tmp_path / "a.unfinished").write_text("half")
    check_place(tmp_path / "a")
    assert (tmp_path / "a.unfinished").read_text() == "half"


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    with pytest.raises(Refusal, match="gone: this folder is"), whole_file(tmp_path / "gone" / "a"):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(Refusal, match="a: is a folder"), whole_file(tmp_path / "a"):
        raise AssertionError("written")


def test_a_place_for_a_file_is_tried_and_left_as_it_was(tmp_path):
    place = tmp_path / "new" / "folder" / "file"
    check_place(place)
    assert place.parent.is_dir() and not any(place.parent.iterdir())
    (tmp_path / "file").touch()
    for taken in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(Refusal, match=taken.name):
            check_place(taken)
