"""A run on the screen: at every width, without a terminal, in another process; and what a killed run left."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.cells import cell_len

from cpift.console.progress import PLACE, Done, Piece, Progress, read_progress, write_progress
from cpift.console.screen import duration, screen, summary
from cpift.console.terminal import Terminal
from cpift.console.view import View, quiet
from cpift.disk.locks import exclusive, is_held
from cpift.errors import StageError
from cpift.pipeline.run_folders import run_state
from cpift.pipeline.watch import Watch
from cpift.untrusted.json import UnreadableError

EVIL = "a\x1b]0;x\x07\x1b[2J\nb\u202e"
NOW = 1_000_100.0


def busy(pieces: int = 3, step: str = "staged backbone") -> Progress:
    found = {
        f"probe {name}": Piece(
            f"probe {name}",
            number / pieces,
            {"loss": 1.25, "step": number, "steps": pieces, "stage": 1, "stages": 3, "task": "数学"} if number else {},
        )
        for number, name in enumerate(["addition", EVIL, "読解" * 9, *map(str, range(pieces))][:pieces])
    }
    expected = ["model θ0", "probes", "core regions", "task groups", step, "fusion", "integration", "evaluation"]
    return Progress(
        "run", NOW - 100, NOW, expected=expected, done=[Done("model θ0", None)], step=step, step_started=NOW - 60,
        first_moved=NOW - 30, pieces=found,
    )  # fmt: skip


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
@pytest.mark.parametrize("pieces", [0, 1, 3, 40])
def test_the_screen_fits(width: int, pieces: int) -> None:
    progress = busy(pieces)
    progress.waiting, progress.waiting_since = "starting Ray on this machine", NOW - 5
    lines = screen(progress, width, 12, NOW)
    assert len(lines) <= 12
    assert all(cell_len(line.plain) <= width and "\n" not in line.plain for line in lines)
    assert not re.search("[\x00-\x1f\u202e]", "".join(line.plain for line in lines))
    if width >= 60:
        text = "\n".join(line.plain for line in lines)
        assert re.search(r"(step 5 of 8:|5/8) staged backbone · 1 min 40 s", text)
        assert "starting Ray on this machine … 5 s" in text
        assert "left" in text or pieces < 3
        assert "loss 1.250" in text or pieces < 3
        assert ("and 32 more: 31 under way, 0 done, 1 to come" in text) == (pieces == 40)


def test_what_is_left_follows_from_what_moved() -> None:
    progress = busy(3)  # thirds: 0, 1/3, 2/3 after 30 s
    assert progress.left(NOW) == pytest.approx(60)
    assert "about 1 min 00 s left" in summary(progress, NOW).replace("1 min 01 s", "1 min 00 s")
    progress.first_moved = 0.0
    assert progress.left(NOW) is None
    assert [duration(one) for one in (-3, 59.9, 60, 3600, 90_000)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "1 h 00 min",
        "1 d 1 h",
    ]


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}, {"CI": "true"}, {"TERM": "dumb"}], ids=str)
def test_lines_with_times_where_nothing_can_be_drawn_anew(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    view = View(Terminal(file=stream, width=60, force_terminal=bool(variables)))
    view.state.expected = ["probes"]
    view.waiting("checking the configuration")
    with view.stage("probes", ["probe a"]):
        view.progress({"waiting": "starting Ray"})
        view._said = 0.0
        view.progress({"title": "probe a", "done": 0.5, "loss": 1.0, "step": 5, "steps": 10})
    text = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in text.splitlines()] == [
        "  checking the configuration …",
        "▸ probes (step 1 of 1) …",
        "  starting Ray …",
        "  probes, 50 %, probe a 50 % loss 1.000 step 5/10",
        "✓ probes 0.0 s",
    ]
    assert "\r" not in text
    assert "\x1b" not in text


def test_the_record_says_how_a_command_ended(tmp_path: Path) -> None:
    ends = {
        "finished": None,
        "failed": StageError("token=hf_abcdefghijklmnopqrstuvwxyz012345"),
        "stopped": KeyboardInterrupt(),
    }
    for state, error in ends.items():
        try:
            with quiet().recorded(tmp_path, "run", ["a", "b"]):
                assert read_progress(tmp_path).state == "running"  # type: ignore[union-attr]
                if error is not None:
                    raise error
        except (StageError, KeyboardInterrupt):
            pass
        found = run_state(tmp_path)
        assert found.kind == state
        assert "abcdefghij" not in (tmp_path / PLACE).read_text()
    assert not list((tmp_path / ".work").glob(".*partial"))


WORK = """
import sys, time
from pathlib import Path
from cpift.disk.locks import exclusive
from cpift.console.view import quiet
root = Path(sys.argv[1])
with exclusive(root):
    view = quiet()
    with view.recorded(root, "run", ["model", "probes", "fusion"]):
        with view.stage("model"):
            pass
        with view.stage("probes", ["probe \\x1b[2Ja"]):
            view.progress({"title": "probe \\x1b[2Ja", "done": 0.5, "loss": 1.5})
            print("there", flush=True)
            view._write()
            sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["finished", "killed"])
def test_watch_shows_a_run_of_another_process(end: str, tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", WORK, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert run.stdin is not None
    assert run.stdout is not None
    run.stdout.readline()
    while len(read_progress(tmp_path).pieces) == 0:  # type: ignore[union-attr]
        time.sleep(0.02)
    assert is_held(tmp_path)
    assert run_state(tmp_path).kind == "running"
    stream = io.StringIO()
    watch = Watch(tmp_path, Terminal(file=stream, width=80))
    watch._look()
    run.stdin.write("\n") if end == "finished" else run.kill()
    run.stdin.close()
    run.wait()
    assert watch.until_the_end(0.05).kind == end
    text = re.sub(r"\d\d:\d\d:\d\d ", "", stream.getvalue())
    assert text.startswith("✓ model 0.0 s\n  probes, 50 %, probe ")
    assert "\x1b" not in text
    assert "loss 1.500" in text
    assert ("✓ probes" in text) == (end == "finished")
    assert not is_held(tmp_path)
    with exclusive(tmp_path):
        assert is_held(tmp_path)


def test_a_run_of_another_machine_is_known_by_what_it_writes(tmp_path: Path) -> None:
    write_progress(tmp_path, Progress("run", 1.0, 2.0, host="elsewhere"), pytest.fail)
    now = time.time()
    assert run_state(tmp_path, now + 5).kind == "running"
    assert run_state(tmp_path, now + 500).kind == "killed"
    write_progress(tmp_path, Progress("run", 1.0, 2.0, host=socket.gethostname()), pytest.fail)
    assert run_state(tmp_path, now + 5).kind == "killed"


BROKEN = [
    "",
    "{",
    "[]",
    "null",
    '{"format": 9}',
    '{"format": 1, "state": "running", "done": 3}',
    "NaN",
    '"\ud83d"',
    "[" * 99,
]


@pytest.mark.parametrize("text", BROKEN, ids=ascii)
def test_a_record_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / ".work").mkdir()
    (tmp_path / PLACE).write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(UnreadableError):
        read_progress(tmp_path)
    assert run_state(tmp_path).kind == "damaged"
    good = json.loads(json.dumps({"format": 1, **vars(Progress("run", host="x"))}))
    for name in good:
        (tmp_path / PLACE).write_text(json.dumps(good | {name: ["?"]}))
        if name not in ("expected",):
            assert run_state(tmp_path).kind in ("damaged", "killed", "running"), name


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / ".work").write_text("")
    view = quiet()
    view.warn = said.append  # type: ignore[method-assign]
    with view.recorded(tmp_path, "run"), view.stage("model"):
        pass
    assert len(said) == 1
    assert "will not see this run" in said[0]
    assert os.listdir(tmp_path) == [".work"]
