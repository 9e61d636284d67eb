"""The compile cache's folders: whole or not there, locked by the living, and nobody else's."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from optim.cache import Cache, CacheUnusable, default_folder

MUCH = 10**9


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", MUCH)


def put(cache: Cache, name: str, **files: bytes) -> None:
    def fill(folder: Path) -> None:
        for file, content in files.items():
            (folder / file).write_bytes(content)

    cache.store(name, fill)


def find(cache: Cache, name: str) -> Path | None:
    with cache.hold(name) as path:
        return path


def test_what_is_stored_is_found_whole(cache: Cache) -> None:
    assert find(cache, "a") is None
    put(cache, "a", one=b"1", two=b"22")
    found = find(cache, "a")
    assert found is not None
    assert {path.name: path.read_bytes() for path in found.iterdir() if path.name != "MANIFEST.json"} == {
        "one": b"1",
        "two": b"22",
    }
    put(cache, "a", one=b"new")
    assert (found / "one").read_bytes() == b"new"
    assert not (found / "two").exists()


@pytest.mark.parametrize("file", ["one", "two", "MANIFEST.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove", "link"])
def test_an_entry_that_was_touched_is_set_aside(cache: Cache, file: str, how: str) -> None:
    put(cache, "a", one=b"content", two=b"more")
    found = find(cache, "a")
    assert found is not None
    path = found / file
    content = path.read_bytes()
    path.unlink()
    if how == "flip":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "link":
        (found.parent / "elsewhere").write_bytes(content)
        path.symlink_to(found.parent / "elsewhere")
    assert find(cache, "a") is None or (how == "link" and file == "MANIFEST.json")
    if not found.exists():
        assert len(cache.notes) == 1
        assert cache.notes[0].startswith("cache entry a was set aside, under ")
        assert len(list((cache.folder / "rejected").iterdir())) == 1
    put(cache, "a", one=b"again")
    assert find(cache, "a") is not None


def test_a_file_that_was_added_is_noticed(cache: Cache) -> None:
    put(cache, "a", one=b"1")
    (cache.folder / "entries" / "a" / "more.so").write_bytes(b"?")
    assert find(cache, "a") is None
    assert "files were added or are gone: more.so" in cache.notes[0]


def test_what_cannot_be_made_leaves_nothing(cache: Cache) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_bytes(b"1")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        cache.store("a", fill)
    assert find(cache, "a") is None
    assert not list(cache.folder.glob("making-*"))


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(CacheUnusable, match=rf"can be written by others \(mode {mode:o}\)"):
        Cache(folder, MUCH)


def test_an_entry_that_others_can_write_to_is_not_used(cache: Cache) -> None:
    put(cache, "a", one=b"1")
    (cache.folder / "entries" / "a").chmod(0o777)
    assert find(cache, "a") is None
    assert "can be written by others" in cache.notes[0]


def test_a_place_where_no_folder_can_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheUnusable, match=r"file.*Not a directory|File exists"):
        Cache(tmp_path / "file", MUCH)


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 2500)
    for age, name in ((30, "old"), (20, "older-but-used")):
        put(cache, name, data=bytes(1000))
        os.utime(cache.folder / "entries" / name, (time.time() - age, time.time() - age))
    assert find(cache, "old") is not None  # so it is the one used last
    put(cache, "new", data=bytes(1000))
    assert {path.name for path in (cache.folder / "entries").iterdir()} == {"old", "new"}


def test_an_entry_in_use_is_not_evicted(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1500)
    put(cache, "used", data=bytes(1000))
    with cache.hold("used") as path:
        put(cache, "new", data=bytes(1000))
        assert path is not None
        assert path.exists()
    cache.evict(keep="new")
    assert find(cache, "used") is None


def test_what_was_set_aside_makes_room_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 2500)
    put(cache, "good", data=bytes(1000))
    put(cache, "bad", data=bytes(1000))
    cache.reject("bad", "it was wrong")
    assert len(list((cache.folder / "rejected").iterdir())) == 1
    put(cache, "new", data=bytes(1000))
    assert {path.name for path in (cache.folder / "entries").iterdir()} == {"good", "new"}
    assert list((cache.folder / "rejected").iterdir()) == []


def test_what_is_stored_stays_where_no_room_can_be_made(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("optim.cache._size", fail)
    put(cache, "a", one=b"1")
    assert find(cache, "a") is not None
    assert "the compile cache may outgrow its limit" in cache.notes[0]


@pytest.mark.parametrize("what", ["entry", "turn"])
def test_a_stuck_owner_is_not_waited_for_without_end(cache: Cache, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optim.cache._PATIENCE_S", 0.2)
    stuck = Cache(cache.folder.parent, MUCH)
    if what == "entry":
        with stuck.hold("a") as ours:
            assert ours is None
            assert find(cache, "a") is None
            put(cache, "a", one=b"1")  # nothing keeps the other one from making it too
            assert (cache.folder / "entries" / "a" / "one").read_bytes() == b"1"
    else:
        with stuck.turn(), cache.turn():
            pass
    assert len(cache.notes) == 1
    assert re.search(r"it has waited \d+ s for", cache.notes[0])


def test_one_makes_it_and_the_others_wait(cache: Cache) -> None:
    made: list[int] = []
    found: list[bytes] = []

    def start(number: int) -> None:
        own = Cache(cache.folder.parent, MUCH)
        with own.hold("a") as path:
            if path is None:
                made.append(number)
                time.sleep(0.2)
                put(own, "a", data=b"made once")
                path = own.folder / "entries" / "a"
            found.append((path / "data").read_bytes())

    threads = [threading.Thread(target=start, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert found == [b"made once"] * 6


def test_a_dead_owner_holds_nobody_up(cache: Cache) -> None:
    code = """
import os, sys
from pathlib import Path
from optim.cache import Cache
cache = Cache(Path(sys.argv[1]), 10**9)
with cache.hold("a") as path:
    assert path is None
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(cache.folder.parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        got = threading.Event()

        def wait() -> None:
            with cache.hold("a"):
                got.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not got.wait(0.5)
        owner.kill()
        waiting.join()
    assert got.is_set()


def test_the_default_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/pt2-serve")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == Path.home() / ".cache" / "pt2-serve"


def make_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be written any more. (Not by a mode, which does not hold for root.)"""
    real = os.open

    def open_to_read(path: Any, flags: int, *mode: int, **more: Any) -> int:
        if flags & (os.O_CREAT | os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *mode, **more)

    def refuse(path: Any, *more: Any, **others: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "open", open_to_read)
    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr("tempfile.mkdtemp", lambda *args, **names: refuse("/tmp"))
    monkeypatch.setattr(Path, "rename", refuse)


def test_a_cache_in_a_read_only_image_is_read(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    put(cache, "a", one=b"1")
    assert find(cache, "a") is not None
    make_read_only(monkeypatch)
    again = Cache(cache.folder.parent, MUCH)
    found = find(again, "a")
    assert found is not None
    assert (found / "one").read_bytes() == b"1"
    assert find(again, "b") is None
    with again.turn():
        pass
    with pytest.raises(OSError, match="Read-only"):
        put(again, "b", one=b"1")


def test_what_cannot_be_set_aside_is_told_and_not_used(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    put(cache, "a", one=b"1")
    found = find(cache, "a")
    assert found is not None
    (found / "one").write_bytes(b"2")
    make_read_only(monkeypatch)
    assert find(cache, "a") is None
    assert find(cache, "a") is None
    why = "is not used, and cannot be set aside (Read-only file system): one is not what was stored"
    assert [note for note in cache.notes if "set aside" in note] == [f"cache entry a {why}"], "said once"


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(lock: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(CacheUnusable, match="No locks available"):
        Cache(tmp_path, MUCH)


def test_a_full_disk_stops_nobody(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Any, *more: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(os, "open", full)
    assert find(cache, "a") is None


def test_locks_that_do_not_exclude_stop_nobody(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    put(cache, "a", one=b"1")

    def flock(lock: int, how: int) -> None:
        if how & fcntl.LOCK_EX:  # as of a network file system that is read-only
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr("fcntl.flock", flock)
    assert find(cache, "a") is not None
    assert find(cache, "b") is None
    with cache.turn():
        pass
