"""`cpift extend` and `cpift forget` as users call them, and what their page shows."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cpift_kernels import unpack_mask

import cpift
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.loading import parse_config
from cpift.disk.files import file_sha256, read_json
from cpift.lineage.derive import extended
from cpift.lineage.parent import read_parent
from cpift.method.masks import read_mask
from tests.helpers.killed import killed_in
from tests.helpers.lineage import config_of, fields, finish

PAGE = (Path(cpift.__file__).parents[1] / "docs" / "growing.md").read_text(encoding="utf-8")
RUN: dict[str, Any] = {
    "name": "my-run",
    "model": {"scratch": {"hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2, "max_length": 64}},
    "probe": {"steps": 6, "batch_size": 4, "learning_rate": 3.0e-3, "max_length": 48, "precision": "float32"},
    "integration": {
        "steps": 4, "batch_size": 4, "learning_rate": 1.0e-3, "max_length": 48, "samples_per_task": 4,
        "precision": "float32",
    },
    "regions": {"p": 0.05},
    "evaluation": {"batch_size": 4, "max_length": 64, "precision": "float32"},
    "resources": {"cpus_per_worker": 0.5, "threads_per_worker": 1, "parallel": 2},
}  # fmt: skip


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return str(found)


def sums(folder: Path) -> dict[str, Any]:
    """The task that the page shows, with rows."""
    for split in ("train", "test"):
        rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(8 if split == "train" else 4)]
        path = folder / "data" / f"sums-{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(block("yaml"))
    return dict(yaml.safe_load(block("yaml")))


@pytest.mark.slow
def test_the_task_of_the_page_is_one(tmp_path: Path) -> None:
    raw = fields("a", "b")
    raw["tasks"][0]["name"] = "sounds"
    finish(config_of(raw, tmp_path / "run"))
    config = extended(tmp_path / "run", sums(tmp_path), tmp_path)
    assert [task.name for task in config.integrated] == ["sums", "sounds"]
    assert config.task("sums").train_data.file == tmp_path / "data" / "sums-train.jsonl"
    assert parse_config(yaml.safe_load(_dumped(config)), tmp_path, "again") == config


def _dumped(config: Any) -> str:
    from cpift.config.loading import dump_config

    return dump_config(config)


# ---- with fine-tunes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `runs/my-run`, a finished run of sounds and words, and `sums.yaml` of the page."""
    place = tmp_path_factory.mktemp("descendants")
    tasks = [
        {"name": name, "metric": "loss", "train": {"procedural": kind, "size": 8}, "test": rows}
        for name, kind in (("sounds", "spelling"), ("words", "ending"))
        for rows in [{"procedural": kind, "split": "test", "size": 4}]
    ]
    (place / "my-run.yaml").write_text(yaml.safe_dump(RUN | {"tasks": tasks}))
    cpift.run(place / "my-run.yaml", output=place / "runs" / "my-run", in_process=True)
    sums(place)
    return place


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What a command prints."""
    from cpift.cli.main import app

    monkeypatch.setattr(sys, "argv", ["cpift", *words])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        app()
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_of_the_page_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before, after = cpift.extend, cpift.forget
    monkeypatch.setattr(cpift, "extend", lambda *given, **named: before(*given, in_process=True, **named))
    monkeypatch.setattr(cpift, "forget", lambda *given, **named: after(*given, in_process=True, **named))
    shown: dict[str, Any] = {}
    exec(block("python"), shown)  # our own page
    printed = capsys.readouterr().out
    assert str(shown["wider"].model) in printed
    assert shown["narrower"].output == folder / "runs" / "without"
    # Frozen cores of earlier tasks went through the fine-tune of the last stage without one bit moved.
    parent, wider = read_parent(folder / "runs" / "my-run"), shown["wider"]
    old, new = Checkpoint(parent.final.path), Checkpoint(wider.model)
    kept = moved = 0
    for name in old.names:
        masks = [read_mask(parent.regions.path, task, name) for task in ("sounds", "words")]
        if masks[0] is None or masks[1] is None:
            continue
        numel = old.tensors[name].numel
        inside = unpack_mask((masks[0] | masks[1]).flatten(), numel)
        values = [model.slice(name, 0, numel) for model in (old, new)]
        assert torch.equal(values[0][inside], values[1][inside])
        kept += int(inside.sum())
        moved += int((values[0][~inside] != values[1][~inside]).sum())
    assert kept > 0 < moved
    record = read_json(wider.model / "training.json")
    assert [(one["elements"], one["moved"]) for one in record["frozen"]] == [(kept, 0)]
    assert cpift.extend("runs/my-run", "sums.yaml").cached
    listed = said(capsys, monkeypatch, "runs", "runs")
    assert "+ sums" in listed
    assert "− sounds" in listed
    planned = said(capsys, monkeypatch, "extend", "runs/my-run", "sums.yaml", "--plan", "--output=planned")
    assert "probe sums" in planned
    assert "those of sounds, words are there" in " ".join(planned.split())
    assert not Path("planned").exists(), "a plan touches nothing"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_in_its_own_stage_it_ends_with_the_same_model(folder: Path) -> None:
    run, task = folder / "runs" / "my-run", folder / "sums.yaml"
    whole = cpift.extend(run, task, output=folder / "whole", in_process=True)
    killed_in("integration", folder / "killed", "extend", run, task)
    assert not (folder / "killed" / "summary.json").exists()
    cpift.extend(run, task, output=folder / "killed", in_process=True)
    (final,) = (path for path in (folder / "killed" / "integrate").iterdir() if path.name[0] != ".")
    assert final.name == whole.model.name
    assert file_sha256(final / "model.safetensors") == file_sha256(whole.model / "model.safetensors")
    assert cpift.extend(run, task, output=folder / "killed", in_process=True).cached
