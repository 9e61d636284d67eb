"""Plans from other machines: taken when whole and signed, never trusted otherwise, and never needed."""

from __future__ import annotations

import errno
import hmac
import io
import json
import os
import tarfile
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from optim import CompiledModel, cache, compile_model
from optim.cache import Cache
from optim.report import CompileReport
from optim.share import KEY_VARIABLE, Exchange, Share, ShareUnusable, UriShare, finish_offers, pack, unpack
from optim.verify import compare
from tests.support import backends, models

pytestmark = pytest.mark.any_torch

assert backends.BACKENDS
KEY = "a key of the operator's"


def build(
    cache: Path, uri: str | None = None, shares: tuple[Share, ...] = (), when: str = "start", **more: Any
) -> CompiledModel:
    section = {
        "compile": {"backend": "pt2test_faithful", "only_if_faster": False, "when": when},
        "cache": {"folder": str(cache), **({"uri": uri} if uri else {}), **more},
    }
    model = compile_model(models.Mlp(), models.features, section, batch_sizes=(1, 4), device="cpu", shares=shares)
    inputs = models.features(3)
    with torch.no_grad():
        assert compare(model(*inputs), models.Mlp().eval()(*inputs)).max_abs < 1e-4
    return model


class Memory:
    """A share in memory."""

    name = "a test"

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}
        self.puts = 0

    def get(self, entry: str) -> bytes | None:
        return self.entries.get(entry)

    def offer(self, entry: str, folder: Path, *, anew: bool = False) -> None:
        if anew or entry not in self.entries:
            self.puts += 1
            self.entries[entry] = pack(folder)


def only_file(folder: Path) -> Path:
    (found,) = (path for path in folder.rglob("*") if path.is_file())
    return found


def test_another_machine_starts_warm(tmp_path: Path) -> None:
    share = Memory()
    cold = build(tmp_path / "one", shares=(share,))
    warm = build(tmp_path / "two", shares=(share,))
    again = build(tmp_path / "two", shares=(share,))
    assert [model.report.start for model in (cold, warm, again)] == ["cold", "warm", "warm"]
    assert "the plan came from a test" in warm.report.notes
    assert "the plan came from a test" not in again.report.notes, "it is in its own cache now"


def test_a_cache_filled_before_is_offered_too(tmp_path: Path) -> None:
    share = Memory()
    build(tmp_path / "one")
    build(tmp_path / "one", shares=(share,))
    assert build(tmp_path / "two", shares=(share,)).report.start == "warm"


@pytest.mark.parametrize("how", ["flip", "cut", "empty"])
def test_what_arrives_damaged_is_not_used(tmp_path: Path, how: str) -> None:
    share = Memory()
    build(tmp_path / "one", shares=(share,))
    ((entry, packed),) = share.entries.items()
    place = packed.index(b'"engine"')
    flipped = packed[:place] + b"X" + packed[place + 1 :]
    share.entries[entry] = {"flip": flipped, "cut": packed[: len(packed) // 2], "empty": b""}[how]
    model = build(tmp_path / "two", shares=(share,))
    assert model.report.start == "cold"
    assert any(note.startswith("nothing is taken from a test: ") for note in model.report.notes)
    assert not list((tmp_path / "two" / "v1").glob("making-*"))


def test_a_share_that_fails_costs_nothing_but_a_note(tmp_path: Path) -> None:
    class Broken:
        name = "a broken network"

        def get(self, entry: str) -> bytes | None:
            raise ConnectionError("no route")

        def offer(self, entry: str, folder: Path, *, anew: bool = False) -> None:
            raise ConnectionError("no route")

    model = build(tmp_path / "one", shares=(Broken(),))
    assert model.report.start == "cold"
    assert "nothing is taken from a broken network: ConnectionError: no route" in model.report.notes
    assert "nothing is left in a broken network: ConnectionError: no route" in model.report.notes


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_plans_go_over_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    uri = f"{protocol}://{tmp_path}/shared"
    cold, warm = build(tmp_path / "one", uri), build(tmp_path / "two", uri)
    assert (cold.report.start, warm.report.start) == ("cold", "warm")
    assert f"the plan came from {uri}" in warm.report.notes


def test_what_is_signed_with_another_key_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"file://{tmp_path}/shared"
    monkeypatch.setenv(KEY_VARIABLE, "somebody else's key")
    build(tmp_path / "one", uri)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    model = build(tmp_path / "two", uri)
    assert model.report.start == "cold"
    assert any("is not signed with the key in PT2_CACHE_KEY, or was changed" in note for note in model.report.notes)
    assert build(tmp_path / "three", uri).report.start == "warm"


@pytest.mark.parametrize("where", [0, 40, -1])
def test_a_changed_byte_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: int) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    uri = f"file://{tmp_path}/shared"
    build(tmp_path / "one", uri)
    file = only_file(tmp_path / "shared")
    content = bytearray(file.read_bytes())
    content[where] ^= 1
    file.write_bytes(bytes(content))
    assert build(tmp_path / "two", uri).report.start == "cold"


def test_an_entry_under_another_name_is_not_believed(tmp_path: Path) -> None:
    folder = tmp_path / "entry"
    folder.mkdir()
    (folder / "plan.json").write_text("{}")
    share = UriShare(f"file://{tmp_path}/shared", KEY)
    share.offer("a", folder)
    file = only_file(tmp_path / "shared")
    file.rename(file.with_name(file.name.replace("a.", "b.", 1)))
    with pytest.raises(ShareUnusable, match="is not signed"):
        share.get("b")


@pytest.mark.parametrize(("key", "reason"), [(None, "is not set"), ("short", "is too short")])
def test_a_uri_without_a_key_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, reason: str
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    if key:
        monkeypatch.setenv(KEY_VARIABLE, key)
    uri = f"file://{tmp_path}/shared"
    (note,) = (note for note in build(tmp_path / "one", uri).report.notes if "pt2.cache.uri" in note)
    assert note.startswith(f"pt2.cache.uri: {uri} is not used: PT2_CACHE_KEY {reason}")
    assert not (tmp_path / "shared").exists()


def test_a_protocol_that_is_not_known_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    notes = build(tmp_path / "one", "nonsense://somewhere").report.notes
    assert any(note.startswith("pt2.cache.uri: nonsense://somewhere is not used: ") for note in notes)


@pytest.mark.parametrize("over_uri", [False, True])
@pytest.mark.parametrize("is_damaged", [False, True])
def test_what_did_not_hold_is_replaced_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over_uri: bool, is_damaged: bool
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    share = Memory()
    how: dict[str, Any] = {"uri": f"file://{tmp_path}/shared"} if over_uri else {"shares": (share,)}

    def spoil(folder: Path) -> None:
        """Let the plan, whole and signed, have other buckets; or let it lack a file."""
        plan = folder / "plan.json"
        found = json.loads(plan.read_text())
        plan.write_text(json.dumps({**found, "buckets": found["buckets"][:1]}))
        if not is_damaged:
            (folder / "MANIFEST.json").unlink()
            cache._write_manifest(folder)

    build(tmp_path / "one", **how)
    (entry,) = (tmp_path / "one" / "v1" / "entries").iterdir()
    spoil(entry)
    if over_uri:
        (file,) = (tmp_path / "shared").rglob("*.signed")
        file.unlink()
        UriShare(how["uri"], KEY).offer(entry.name, entry)
    else:
        share.entries = {entry.name: pack(entry)}
    starts = [build(tmp_path / name, **how).report.start for name in ("two", "three")]
    assert starts == ["cold", "warm"]


def test_what_was_only_slow_here_stays_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = Memory()

    def start(name: str) -> CompiledModel:
        section = {"compile": {"backend": "pt2test_faithful"}, "cache": {"folder": str(tmp_path / name)}}
        sizes = (1, 4)
        return compile_model(models.Mlp(), models.features, section, batch_sizes=sizes, device="cpu", shares=(share,))

    with monkeypatch.context() as patch:
        patch.setattr("optim.builder.time_in_turn", lambda runs, *args, **more: [1.0, 2.0][: len(runs)])
        cold = start("one")
        assert set(cold.report.engines().values()) == {"pt2test_faithful"}, cold.report.all_refusals()
    left = dict(share.entries)
    with monkeypatch.context() as patch:
        patch.setattr("optim.builder.time_in_turn", lambda runs, *args, **more: [2.0, 1.0][: len(runs)])
        slow = start("two").report
    assert slow.start == "cold"
    assert "slower than eager: 2 ms against 1 ms" in slow.notes[-1], slow.notes
    assert share.entries == left


class Hanging(Memory):
    """A share that never answers, until it is let go."""

    def __init__(self, *, refuses: bool) -> None:
        super().__init__()
        self.refuses = refuses
        self.let_go = threading.Event()

    def get(self, entry: str) -> bytes | None:
        self.let_go.wait()
        return super().get(entry)

    def offer(self, entry: str, folder: Path, *, anew: bool = False) -> None:
        self.let_go.wait()
        if self.refuses:
            raise OSError("it is full")
        super().offer(entry, folder, anew=anew)


@pytest.mark.parametrize("refuses", [False, True])
def test_a_storage_that_hangs_is_not_waited_for(tmp_path: Path, refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optim.share._GET_S", 0.1)
    monkeypatch.setattr("optim.share._OFFER_S", 0.1)
    monkeypatch.setattr("optim.share._offers", [])
    share = Hanging(refuses=refuses)
    report = build(tmp_path / "one", shares=(share,)).report
    assert report.start == "cold"
    told = "nothing is taken from a test: TimeoutError: there is no answer after 0 s"
    assert [note for note in report.notes if "a test" in note] == [told]
    share.let_go.set()
    assert finish_offers() is not refuses, "what was on its way has arrived, or not"
    assert len(share.entries) == (0 if refuses else 1)
    assert ("nothing is left in a test: OSError: it is full" in report.notes) == refuses


def test_an_old_plan_is_made_anew_and_takes_its_place_everywhere(tmp_path: Path) -> None:
    share = Memory()
    build(tmp_path / "one", shares=(share,))
    build(tmp_path / "two", shares=(share,))
    shared = dict(share.entries)
    now = datetime.now(UTC).isoformat()
    report = build(tmp_path / "one", shares=(share,), not_before=now).report
    assert report.start == "cold"
    assert any("its plan was made before pt2.cache.not_before" in note for note in report.notes)
    assert share.entries != shared
    again = build(tmp_path / "one", shares=(share,), not_before=now).report
    other = build(tmp_path / "two", shares=(share,), not_before=now).report
    third = build(tmp_path / "three", shares=(share,), not_before=now).report
    assert [again.start, other.start, third.start] == ["warm"] * 3, "once is enough, for all machines"
    assert "the plan came from a test" in other.notes
    assert share.puts == 2, "nobody has replaced a new plan"


def test_an_old_plan_of_a_share_is_replaced(tmp_path: Path) -> None:
    share = Memory()
    build(tmp_path / "one", shares=(share,))
    now = datetime.now(UTC).isoformat()
    assert build(tmp_path / "two", shares=(share,), not_before=now).report.start == "cold"
    assert build(tmp_path / "three", shares=(share,), not_before=now).report.start == "warm"


def test_a_new_plan_of_a_share_is_found_before_anything_is_put_off(tmp_path: Path) -> None:
    share = Memory()
    build(tmp_path / "one", shares=(share,))
    build(tmp_path / "two", shares=(share,))
    now = datetime.now(UTC).isoformat()
    assert build(tmp_path / "one", shares=(share,), not_before=now).report.start == "cold"
    model = build(tmp_path / "two", shares=(share,), when="background", not_before=now)
    assert (model.report.start, model.background) == ("warm", None)
    assert share.puts == 2


def test_behind_an_old_plan_of_one_share_another_has_a_new_one(tmp_path: Path) -> None:
    old, new = Memory(), Memory()
    build(tmp_path / "one", shares=(old,))
    now = datetime.now(UTC).isoformat()
    build(tmp_path / "two", shares=(new,), not_before=now)
    report = build(tmp_path / "three", shares=(old, new), not_before=now).report
    assert report.start == "warm"
    assert build(tmp_path / "four", shares=(old,), not_before=now).report.start == "warm", "it has the new one now"


def test_who_had_half_a_minute_is_asked_again_where_there_is_more_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = Hanging(refuses=False)
    share.let_go.set()
    build(tmp_path / "one", shares=(share,))
    share.let_go.clear()
    (entry,) = share.entries
    exchange = Exchange(Cache(tmp_path / "two", 10**9), entry, [share], CompileReport("", {}, {}))
    monkeypatch.setattr("optim.share._QUICK_S", 0.1)
    assert exchange.adopt(quickly=True) is None
    share.let_go.set()
    assert exchange.adopt() is not None
    assert exchange.adopt() is None


def test_a_time_yet_to_come_makes_nothing_anew(tmp_path: Path) -> None:
    soon = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    assert [build(tmp_path, not_before=soon).report.start for _ in range(2)] == ["cold", "warm"]


def test_offers_that_fail_are_known_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optim.share._offers", [])
    build(tmp_path / "one", shares=(Memory(),))
    assert finish_offers()
    share = Hanging(refuses=True)
    share.let_go.set()
    build(tmp_path / "two", shares=(share,))
    assert not finish_offers()
    assert finish_offers(), "told once"


def test_a_storage_that_is_asked_at_once_and_is_away_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    model = build(tmp_path / "one", "ftp://127.0.0.1:9/plans")
    (note,) = (note for note in model.report.notes if "pt2.cache.uri" in note)
    assert note.startswith("pt2.cache.uri: ftp://127.0.0.1:9/plans is not used: ConnectionRefusedError: ")


def test_an_archive_cannot_write_elsewhere(tmp_path: Path) -> None:
    for name, link in (("../outside", None), ("link", "/etc/passwd")):
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as archive:
            member = tarfile.TarInfo(name)
            if link:
                member.type, member.linkname = tarfile.SYMTYPE, link
            archive.addfile(member, io.BytesIO())
        with pytest.raises(tarfile.TarError):
            unpack(made.getvalue(), tmp_path / "in")
    assert not (tmp_path / "outside").exists()


def test_a_signature_is_of_name_and_content() -> None:
    share = UriShare("memory://somewhere", KEY)
    assert share._sign("entry", b"content") == hmac.digest(KEY.encode(), b"entry\0content", "sha256")


def test_an_upload_that_fails_leaves_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = UriShare(f"file://{tmp_path / 'shared'}", KEY)
    folder = tmp_path / "entry"
    folder.mkdir()
    (folder / "file").write_bytes(b"content")

    def pipe_file(path: str, content: bytes) -> None:
        Path(path).write_bytes(content[:9])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(share._files, "pipe_file", pipe_file)
    with pytest.raises(OSError, match="No space left"):
        share.offer("entry", folder)
    assert not [path for path in (tmp_path / "shared").rglob("*") if path.is_file()]
