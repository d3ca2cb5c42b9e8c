"""`cpift runs` and `cpift clean`: what is in output folders, damaged or somebody else's, and what of it may go."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cpift.cli.main import app
from cpift.console.progress import PLACE
from cpift.console.view import quiet
from cpift.disk.artifacts import Artifact
from cpift.disk.locks import exclusive
from cpift.errors import CpiftError
from cpift.pipeline.run_folders import freeable, run_state, size_of


def made(root: Path, stage: str, label: str = "", version: int = 1) -> Artifact:
    artifact = Artifact(root, stage, label, {"x": label}, {}, version)
    with artifact.build() as out:
        (out / "model.safetensors").write_bytes(b"w" * 100)
        (out / "training.json").write_text("{}")
    return artifact


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, with all that may lie in one."""
    root = tmp_path / "runs" / "first"
    for stage, label in (
        ("model", ""),
        ("probe", "a"),
        ("probe", "b"),
        ("backbone", ""),
        ("fuse", ""),
        ("integrate", ""),
    ):
        made(root, stage, label)
    made(root, "regions")
    with exclusive(root), quiet().recorded(root, "run"):
        pass
    return root


def called(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*")}


def test_clean_frees_what_can_be_made_again(run: Path) -> None:
    probe, (final,) = Artifact(run, "probe", "a", {"x": "a"}, {}, 1), (run / "integrate").iterdir()
    other = Artifact(run, "fuse", "other", {"x": "other"}, {}, 1)
    for place in (probe.work_dir, other.work_dir):  # of what is complete, and of what a run goes on from
        place.mkdir(parents=True)
        (place / "checkpoint").write_bytes(b"c" * 50)
    partial = run / "probe" / f".{other.name}.partial"
    partial.mkdir()
    (partial / "x").write_bytes(b"x" * 7)
    tokens = run / ".work" / "tokens" / "0123-512"
    tokens.mkdir(parents=True)
    (tokens / "rows.arrow").write_bytes(b"t" * 100)
    before = tree(run)
    said = called("clean", run, "--dry-run")
    assert (said.exit_code, tree(run)) == (0, before)
    assert "657 B could be freed" in said.output
    assert called("clean", run).exit_code != 0, "nobody can be asked"
    assert tree(run) == before
    assert "Freed 657 B" in called("clean", run, "--yes").output
    assert probe.state().kind == "dropped"
    assert probe.manifest()["dropped"]["remake"]
    assert (final / "model.safetensors").is_file()
    assert (other.work_dir / "checkpoint").is_file()
    assert len(list((run / "regions").glob("*/*.safetensors"))) == 1
    assert not any(left.exists() for left in (probe.work_dir, partial, tokens.parent))
    assert "Nothing to free" in called("clean", run, "--yes").output


def test_clean_leaves_what_is_not_ours(run: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    probe, other = Artifact(run, "probe", "a", {"x": "a"}, {}, 1), Artifact(run, "probe", "b", {"x": "b"}, {}, 1)
    theirs = {
        probe.path / "mine.safetensors": b"1",
        run / "probe" / "notes" / "model.safetensors": b"2",
        run / "probe" / "mine-0123456789ab" / "model.safetensors": b"3",
        run / ".work" / "mine" / "x": b"4",
        run / ".work" / "probe-mine-0123456789ab" / "x": b"5",
        run / "mine.safetensors": b"6",
        run / "fuse.damaged" / "model.safetensors": b"7",
        tmp_path / "theirs" / "model.safetensors": b"8",
    }
    for path, data in theirs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    shutil.move(other.path, tmp_path / "moved")
    other.path.symlink_to(tmp_path / "moved")  # a model on another disk
    (backbone,) = (run / "backbone").iterdir()
    (backbone / "model.safetensors").unlink()
    (backbone / "model.safetensors").symlink_to(tmp_path / "theirs" / "model.safetensors")
    (run / "model.real").symlink_to(tmp_path / "theirs")
    partial = run / "probe" / f".{probe.name}.partial"
    partial.symlink_to(tmp_path / "theirs")
    assert called("clean", run, "--yes").exit_code == 0
    for path, data in theirs.items():
        assert path.read_bytes() == data, path
    assert (tmp_path / "moved" / "model.safetensors").is_file()
    assert partial.is_symlink()
    assert not (probe.path / "model.safetensors").exists()


def test_clean_never_touches_a_run_at_work(run: Path) -> None:
    before = tree(run)
    code = "import sys, time; from pathlib import Path; from cpift.disk.locks import exclusive\n"
    code += "with exclusive(Path(sys.argv[1])):\n    print(flush=True); time.sleep(100)"
    holder = subprocess.Popen([sys.executable, "-c", code, run], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        said = called("clean", run, "--yes")
        assert isinstance(said.exception, CpiftError)
        assert "in use" in str(said.exception)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert {name: size for name, size in tree(run).items() if name != ".lock"} == {
        name: size for name, size in before.items() if name != ".lock"
    }


def test_runs_lists_what_is_there(run: Path, tmp_path: Path) -> None:
    runs = run.parent
    named = runs / "evil \x1b[2J\u202e"
    made(named, "probe", "a")
    damaged = runs / "damaged"
    (damaged / ".work").mkdir(parents=True)
    (damaged / PLACE).write_text("{")
    nested = runs / "sweeps" / "one"
    made(nested, "fuse")
    (runs / "nothing" / "probe").mkdir(parents=True)
    (runs / "file").write_text("")
    (runs / "linked").symlink_to(run)
    (runs / "loop").symlink_to(runs)
    said = called("runs", runs, "--json")
    found: dict[str, Any] = {one["run"]: one for one in json.loads(said.output)}
    states = {Path(name).name: one["state"] for name, one in found.items()}
    assert states == {"first": "finished", named.name: "unknown", "damaged": "damaged", "one": "unknown"}
    assert found[str(run)]["bytes"] == size_of(run) > 600
    shown = called("runs", runs).output
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "4 runs" in shown
    os.link(next((run / "probe").glob("*/*.safetensors")), run / "again")
    assert size_of(run) == found[str(run)]["bytes"]


@pytest.mark.parametrize("command", ["watch", "clean", "runs"])
def test_what_is_no_run_is_refused(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "absent", *([tmp_path] if command != "runs" else [])):
        assert isinstance(called(command, place).exception, CpiftError)
    assert os.listdir(tmp_path) == ["file"]


def test_watch_of_what_has_ended(run: Path) -> None:
    said = called("watch", run)
    assert (said.exit_code, "finished" in said.output) == (0, True)
    with exclusive(run), pytest.raises(KeyboardInterrupt), quiet().recorded(run, "run"):
        raise KeyboardInterrupt
    said = called("watch", run)
    assert (said.exit_code, "; the same command goes on" in said.output) == (1, True)
    assert run_state(run).kind == "stopped"
    assert freeable(run)[1] == []
