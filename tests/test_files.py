"""Files in other people's folders: two writers, full disks, folders that cannot be synced, names of any kind."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deepreg_fast.errors import InputError
from deepreg_fast.files import check_outputs, locked, name_bytes, remove_temporaries, same_file, write_atomically


def test_of_two_writers_the_last_wins_whole(tmp_path: Path) -> None:
    """Writers that take turns piece by piece: each has a temporary file of its own."""
    path = tmp_path / "a.bin"
    turn = threading.Barrier(2)

    def pieces(letter: bytes) -> Iterator[bytes]:
        for _ in range(5):
            turn.wait(60)
            yield letter * 1000

    threads = [threading.Thread(target=write_atomically, args=(path, pieces(c))) for c in (b"a", b"b")]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert path.read_bytes() in (b"a" * 5000, b"b" * 5000)
    assert os.listdir(tmp_path) == ["a.bin"]


def _refusing(error: int, when: Callable[[int], bool]) -> Callable[[int], None]:
    real = os.fsync

    def fsync(number: int) -> None:
        if when(number):
            raise OSError(error, os.strerror(error))
        real(number)

    return fsync


def _is_folder(number: int) -> bool:
    return stat.S_ISDIR(os.fstat(number).st_mode)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP, errno.EIO, errno.EACCES])
def test_a_folder_that_cannot_be_synced_or_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    monkeypatch.setattr(os, "fsync", _refusing(error, _is_folder))
    write_atomically(tmp_path / "a", b"1")
    real = os.open

    def windows(path: Any, *rest: Any, **more: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(error, os.strerror(error), str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", windows)
    write_atomically(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"2" and os.listdir(tmp_path) == ["a"]


def test_a_file_system_without_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", _refusing(errno.EINVAL, lambda _: True))
    write_atomically(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("place", ["write", "fsync", "replace"])
def test_a_disk_that_fails_at_any_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: int
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")

    def fail(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    def pieces() -> Iterator[bytes]:
        yield b"some"
        if place == "write":
            fail()
        yield b"more"

    if place != "write":
        monkeypatch.setattr(os, place, fail)
    with pytest.raises(InputError, match=f"{os.strerror(error)}.*unharmed"):
        write_atomically(path, pieces())
    monkeypatch.undo()
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["a"]


def test_an_error_without_a_text_of_the_system(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        raise OSError("the tape is torn")
        yield b""

    with pytest.raises(InputError, match="the tape is torn"):
        write_atomically(tmp_path / "a", pieces())


def test_an_interruption_leaves_no_temporary_file(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"some"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", pieces())
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    for name in (".a.1-ff.tmp", ".ab.1-ff.tmp", "a"):
        (tmp_path / name).write_bytes(b"")
    remove_temporaries(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == [".ab.1-ff.tmp", "a"]
    remove_temporaries(tmp_path / "none" / "a")


@pytest.mark.skipif(os.name == "nt", reason="links and modes of POSIX")
def test_links_modes_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"1")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", b"2")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"2"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640
    write_atomically(Path(os.devnull), b"3")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.parametrize("name", ["x" * 250, "é" * 120, os.fsdecode(b"f\xfcr")])
def test_names_up_to_the_limit_and_of_any_bytes(tmp_path: Path, name: str) -> None:
    write_atomically(tmp_path / name, b"1")
    assert (tmp_path / name).read_bytes() == b"1" and len(os.listdir(tmp_path)) == 1


def test_a_lock_is_held_by_one_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with locked(path, "The run"), pytest.raises(InputError, match="The run must be written by one process"):
        with locked(path, "The run"):
            pass
    # The file of an earlier holder is no lock.
    assert path.exists()
    with locked(path, "The run"):
        pass


def test_a_lock_of_another_process_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    holder = (
        "import sys, time, filelock\n"
        "lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another one is at work"), locked(path, "The run"):
            pass
    finally:
        process.kill()
        process.communicate()
    with locked(path, "The run"):
        pass


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import filelock

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with locked(tmp_path / "run.lock", "The run"):
        write_atomically(tmp_path / "a", b"1")


def test_outputs_that_would_replace_inputs(tmp_path: Path) -> None:
    source = tmp_path / "Grün.png"
    source.write_bytes(b"1")
    other_form = tmp_path / "Gru\u0308n.PNG"
    for output in (source, tmp_path / "x" / ".." / "Grün.png", other_form):
        with pytest.raises(InputError, match="Outputs must not replace inputs.*name another --out"):
            check_outputs([output], [source], "name another --out")
    (tmp_path / "link.png").symlink_to(source)
    with pytest.raises(InputError, match="must not replace"):
        check_outputs([tmp_path / "link.png"], [source], "rename it")
    check_outputs([tmp_path / "out" / "Grün.png", tmp_path / "a.png"], [source], "rename it")
    with pytest.raises(InputError, match="are one file"):
        check_outputs([tmp_path / "figure.png", tmp_path / "Figure.PNG"], [source], "rename it")


def test_names_have_one_form_and_all_bytes(tmp_path: Path) -> None:
    assert name_bytes("é.png") == name_bytes("e\u0301.png") == "é.png".encode()
    assert name_bytes(os.fsdecode(b"f\xfcr")) != name_bytes("für")
    assert same_file(tmp_path / "a", tmp_path / "A") and not same_file(tmp_path / "a", tmp_path / "b")
