from __future__ import annotations

import subprocess
import threading
import time

import pytest
import torch

from optim.deadline import OutOfTime, run_within, stuck_calls


@pytest.mark.parametrize("inline", [False, True])
def test_a_result_and_an_error_come_through(inline: bool) -> None:
    assert run_within(60, "test", lambda: 7, inline=inline) == 7
    with pytest.raises(ValueError, match="nothing"):
        run_within(60, "test", lambda: int("nothing"), inline=inline)


def test_the_helper_thread_has_the_callers_settings() -> None:
    with torch.no_grad():
        found = run_within(60, "test", lambda: (torch.is_grad_enabled(), torch.get_num_threads()))
    assert found == (False, torch.get_num_threads())


@pytest.mark.parametrize("inline", [False, True])
def test_a_loop_is_interrupted(inline: bool) -> None:
    ended = threading.Event()

    def loop() -> None:
        try:
            while True:
                time.sleep(0.001)
        finally:
            ended.set()

    with pytest.raises(OutOfTime, match="was stopped"):
        run_within(0.2, "test", loop, inline=inline)
    assert ended.is_set()
    assert stuck_calls() == ()


@pytest.mark.parametrize("inline", [False, True])
def test_a_hanging_child_process_is_ended(inline: bool) -> None:
    with pytest.raises(OutOfTime, match="was stopped"):
        run_within(0.2, "test", lambda: subprocess.run(["sleep", "600"], check=True), inline=inline)


def test_a_call_that_cannot_be_interrupted_is_left_behind_and_named() -> None:
    go = threading.Event()
    with pytest.raises(OutOfTime, match="cannot be stopped"):
        run_within(0.1, "waiting for ever", lambda: go.wait())
    assert stuck_calls() == ("waiting for ever",)
    go.set()
    while stuck_calls():
        time.sleep(0.001)
