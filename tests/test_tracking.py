from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from cpift.tracking import check_trackers, log_file


def work(log: Path) -> None:
    with log_file(log):
        logging.getLogger("cpift.finetune").info("step %d", 3)
        warnings.warn("careful", stacklevel=1)
        raise ZeroDivisionError


def test_a_workers_log_holds_warnings_and_what_ended_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        work(tmp_path / "a" / "worker-0.log")
    text = (tmp_path / "a" / "worker-0.log").read_text()
    for line in ("INFO cpift.finetune: step 3", "careful", "Traceback", "ZeroDivisionError"):
        assert line in text
    logging.getLogger("cpift.finetune").info("afterwards")
    assert (tmp_path / "a" / "worker-0.log").read_text() == text


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = check_trackers(("tensorboard", "wandb"))
    assert str(problem) == "tracking: 'wandb' is not installed → pip install wandb, or leave it out"


STUCK = """
import sys, time
from cpift.tracking import ended_if_stuck

def hang():
    time.sleep(60)

with open(sys.argv[1], "w") as log, ended_if_stuck(0.3, log) as alive:
    alive(False)
    time.sleep(0.6)
    for _ in range(4):
        alive(True)
        time.sleep(0.15)
    print("worked", flush=True)
    alive(True)
    hang()
"""


def test_a_process_that_hangs_says_where_and_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ended = subprocess.run([sys.executable, "-c", STUCK, log], capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stdout) == (1, "worked\n"), ended.stderr
    assert "in hang" in log.read_text()
