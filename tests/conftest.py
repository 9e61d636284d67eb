"""For all tests: what compiling keeps goes to folders of the tests' own."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from contextlib import suppress

import pytest

# Before anything is compiled, and for the processes that tests start; the tests of one session share it.
_FOLDER = tempfile.mkdtemp(prefix="pt2-tests-")
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = _FOLDER
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # tests import it before the package can say so

with suppress(ImportError):  # a GPU machine may have pytest alone
    from hypothesis import HealthCheck, settings

    # Its own limits are on the clock, and two tests run at a time.
    settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("no clock")


@pytest.fixture(autouse=True)
def own_compile_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a compile cache of its own: none finds what another one left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
