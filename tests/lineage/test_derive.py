"""A finished run gains a task and loses one: what is made, what is taken from it, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cpift_kernels import unpack_mask

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.run import RunConfig
from cpift.disk.files import file_sha256, read_json
from cpift.disk.top_files import marked
from cpift.errors import ConfigError
from cpift.lineage.derive import extended, forgotten
from cpift.lineage.history import generation
from cpift.lineage.parent import read_parent
from cpift.method.masks import read_mask, read_summary
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.preflight import preflight
from cpift.pipeline.run_folders import free, freeable
from cpift.pipeline.stages import order
from tests.helpers.lineage import Noise, config_of, fields, finish
from tests.helpers.sweeps import run_fields

NEW = run_fields()["tasks"][2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tasks a and b, whose rows are files."""
    folder = tmp_path_factory.mktemp("runs")
    raw = fields("a", "b")
    for task in raw["tasks"]:
        for split in ("train", "test"):
            rows = [{"prompt": f"{task['name']} {split} {row}", "completion": str(row)} for row in range(8)]
            path = folder / f"{task['name']}-{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            task[split] = {"file": str(path)}
    finish(config_of(raw, folder / "run"))
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, with its rows beside it."""
    shutil.copytree(made, tmp_path / "runs", copy_function=shutil.copy2)
    config = tmp_path / "runs" / "run" / "config.yaml"
    text = config.read_text().partition("\n")[2].replace(str(made), str(tmp_path / "runs"))
    config.write_text(marked("config.yaml", text))
    return tmp_path / "runs" / "run"


def files(folder: Path) -> dict[str, str]:
    """Every file of a run but its logs and locks, by sha256."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and ".work" not in path.parts)
    return {str(path.relative_to(folder)): file_sha256(path) for path in found if path.name != ".lock"}


def plan(config: RunConfig) -> dict[str, str]:
    preflight(config, stage="run")
    pipeline = Pipeline(config, Noise())
    return {f"{step.stage} {step.label}".strip(): step.state for step in order.plan(pipeline.artifacts)}


def refused(call: Callable[[], object]) -> dict[str, str]:
    """What is refused, by field."""
    with pytest.raises(ConfigError) as error:
        call()
    return {problem.where: f"{problem.what} → {problem.remedy}" for problem in error.value.problems}


def elements(folder: Path, regions: Path, tasks: list[str]) -> dict[str, torch.Tensor]:
    """By tensor, where one of these tasks has its core."""
    model, named = Checkpoint(folder), {}
    for name in model.names:
        masks = [mask for task in tasks if (mask := read_mask(regions, task, name)) is not None]
        numel = model.tensors[name].numel
        named[name] = torch.stack([unpack_mask(mask.flatten(), numel) for mask in masks]).any(0)
    return named


@pytest.mark.slow
def test_a_task_is_added_and_earlier_cores_stay_as_they_were(run: Path) -> None:
    before, parent = files(run), read_parent(run)
    config = extended(run, NEW, run)
    assert plan(config)["model"] == "cached"
    pipeline, (data, page), engine = finish(config)
    assert files(run) == before, "the finished run is only read"
    assert pipeline.root == run.with_name("run-with-c")
    assert engine.fits.keys() == {"probe c", "integration"}
    assert list(data.models) == ["base", "probe c", "before", "fused", "final"]
    assert data.tasks == ["a", "b", "c"]
    # Masks of a and b are the finished run's, and all three are what a run of three tasks would have selected.
    regions = pipeline.artifacts.regions.path
    for task in ("a", "b"):
        assert (regions / f"{task}.safetensors").read_bytes() == (
            parent.regions.path / f"{task}.safetensors"
        ).read_bytes()
    whole = Pipeline(config_of(fields("a", "b", "c"), run.with_name("whole")), Noise())
    summary = read_summary(regions)
    assert summary["tasks"] == ["a", "b", "c"]
    masks = [elements(parent.final.path, regions, [task]) for task in ("a", "b", "c")]
    counted = [[sum(int((x[n] & y[n]).sum()) for n in x) for y in masks] for x in masks]
    assert summary["overlaps"] == counted
    assert whole.artifacts.regions.fields == pipeline.artifacts.regions.fields
    # In the fused model, earlier cores have the finished model's bits; the new task's has its probe's.
    old, fused = Checkpoint(parent.final.path), Checkpoint(pipeline.outputs()["fuse"].path)
    probe = Checkpoint(pipeline.artifacts.probes["c"].path)
    kept, mine = elements(parent.final.path, regions, ["a", "b"]), masks[2]
    for name in fused.names:
        values = [model.slice(name, 0, model.tensors[name].numel) for model in (old, fused, probe)]
        assert torch.equal(values[1][kept[name]], values[0][kept[name]])
        own = mine[name] & ~kept[name]
        assert torch.equal(values[1][own], values[2][own])
    assert "Earlier tasks: a loss" in data.headline
    assert data.history == [(str(run), "a, b"), (str(pipeline.root), "+ c")]
    assert "Where the model comes from" in page.read_text()
    assert generation(pipeline.root).change == "+ c"  # type: ignore[union-attr]


@pytest.mark.slow
def test_the_second_call_makes_nothing_and_a_third_task_goes_on(run: Path) -> None:
    finish(extended(run, NEW, run))
    pipeline, _, engine = finish(extended(run, NEW, run))
    assert not engine.fits + engine.scored
    assert not pipeline.worked
    fourth = {**NEW, "name": "d", "train": {"procedural": "reverse", "size": 8}}
    further, (data, _), engine = finish(extended(pipeline.root, fourth, run))
    assert [task.name for task in further.config.earlier] == ["a", "b", "c"]
    assert engine.fits.keys() == {"probe d", "integration"}
    assert [change for _, change in data.history] == ["a, b", "+ c", "+ d"]
    (record,) = [one for one in data.provenance if one["stage"] == "fuse"]
    assert record["fields"]["protected"] == ["a", "b", "c"]


@pytest.mark.slow
def test_rows_that_are_gone_are_not_needed_and_those_that_are_named_are_replayed(run: Path) -> None:
    folder = run.parent
    (folder / "a-train.jsonl").unlink()
    (folder / "b-test.jsonl").unlink()
    told = refused(lambda: extended(run, NEW | {"replay": ["a", "x"]}, run))
    assert list(told) == ["replay"]
    assert "no earlier task" in told["replay"]
    config = extended(run, NEW | {"replay": ["b"]}, run)
    assert [task.name for task in config.integrated] == ["c", "b"]
    pipeline, (data, _), _ = finish(config)
    assert data.tasks == ["a", "c"]
    assert "Not scored, for their test rows are not there: b" in data.headline
    manifest = pipeline.outputs()["integrate"].manifest()
    assert {name for name in manifest["inputs"] if name.startswith("data ")} == {"data b", "data c"}
    assert manifest["fields"]["groups"] == [["a", "b"], ["c", "b"]]


def test_what_cannot_be_extended_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    def asked(task: dict[str, Any] = NEW, folder: Path = run, **set_to: Any) -> Callable[[], object]:
        changes = {name.replace("__", "."): value for name, value in set_to.items()}
        return lambda: preflight(extended(folder, task, run, changes=changes), stage="run")

    assert "'a' is a task of" in refused(asked(NEW | {"name": "a"}))["name"]
    assert "is not there" in refused(asked({"train": NEW["train"]}))["name"]
    assert "is 7, and no text" in refused(asked(NEW | {"name": 7}))["name"]
    assert "'c/d'" in str(refused(asked(NEW | {"name": "c/d"})))
    assert "is inside of" in refused(asked(output=str(run / "inside")))["output"]
    assert "one is added at a time" in refused(asked({"tasks": [NEW]}))["tasks"]
    assert "no folder" in refused(asked(folder=tmp_path / "nowhere"))["RUN"]
    assert "is not the θ0" in refused(asked(model__scratch__seed=5))["model.scratch"]
    assert "is 0.2, and 0.1 in" in refused(asked(regions__p=0.2))["regions.p"]
    assert "gone on from" in refused(asked(output=str(run)))["output"]
    assert "leaves no core in place" in str(refused(asked(fusion__transplant=False)))
    with pytest.raises(ConfigError, match=r"varies runs that begin with θ0"):
        preflight(extended(run, NEW, run), stage="sweep final")
    (run / "summary.json").unlink()
    assert "holds no finished run" in refused(asked())["RUN"]


@pytest.mark.slow
def test_a_finished_run_that_changed_meanwhile_is_refused(run: Path) -> None:
    config = extended(run, NEW, run)
    final = read_parent(run).final.path
    shutil.rmtree(run / "evaluate")  # not what is gone on from
    preflight(config, stage="run")
    mask = next(read_parent(run).regions.path.glob("*.safetensors"))
    whole = mask.read_bytes()
    mask.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "is damaged" in refused(lambda: preflight(config, stage="run"))["parent.run"]
    mask.write_bytes(whole)
    raw = yaml.safe_load((run / "config.yaml").read_text())
    finish(config_of(raw | {"seed": 1}, run))  # the same folder has another final model now
    assert read_parent(run).final.path != final
    assert "is another run now" in refused(lambda: preflight(config, stage="run"))["parent.fingerprint"]


def test_runs_of_given_checkpoints_say_nothing_of_training(run: Path) -> None:
    raw = yaml.safe_load((run / "config.yaml").read_text())
    for task in raw["tasks"]:
        task["checkpoint"] = {"path": str(read_parent(run).final.path)}
    (run / "config.yaml").write_text(yaml.safe_dump(raw))
    assert "all probes of" in refused(lambda: extended(run, NEW, run))["RUN"]


@pytest.mark.slow
def test_after_clean_a_task_can_be_added_and_none_forgotten(run: Path) -> None:
    for removed in freeable(run)[0]:
        free(removed, run)
    told = refused(lambda: forgotten(run, "a"))
    assert "cpift clean" in told["probe b"]
    assert f"cpift run {run / 'config.yaml'}" in told["probe b"]
    _, (data, _), engine = finish(extended(run, NEW, run))
    assert engine.fits.keys() == {"probe c", "integration"}
    assert data.models[-1] == "final"


@pytest.mark.slow
def test_a_task_is_forgotten_from_kept_probes(run: Path) -> None:
    before = files(run)
    config = forgotten(run, "a")
    states = plan(config)
    assert (states["model"], states["probe b"], states["regions"]) == ("cached", "cached", "to do")
    pipeline, (data, _), engine = finish(config)
    assert files(run) == before
    assert engine.fits.keys() == {"backbone", "integration"}, "the probe and its core are the finished run's"
    assert data.models == ["base", "probe b", "before", "backbone", "fused", "final"]
    assert data.headline.startswith("run without a: b loss")
    assert read_summary(pipeline.artifacts.regions.path)["tasks"] == ["b"]
    # The same bytes as those of a run that never had the task.
    alone, _, _ = finish(config_of({**yaml.safe_load((run / "config.yaml").read_text()), "name": "alone",
                                    "tasks": config.model_dump(mode="json", exclude_none=True)["tasks"]},
                                   run.with_name("alone")))  # fmt: skip
    assert alone.outputs()["integrate"].fingerprint == pipeline.outputs()["integrate"].fingerprint
    ours, theirs = (one.outputs()["fuse"].path / "model.safetensors" for one in (pipeline, alone))
    assert file_sha256(ours) == file_sha256(theirs)
    assert read_json(pipeline.root / "summary.json")["history"][-1]["change"] == "− a"


def test_what_cannot_be_forgotten_is_refused_by_name(run: Path) -> None:
    assert "did you mean a?" in refused(lambda: forgotten(run, "aa"))["TASK"]
    (run.parent / "b-train.jsonl").unlink()
    assert "no such file" in str(refused(lambda: forgotten(run, "a")))
    raw = yaml.safe_load((run / "config.yaml").read_text())  # as if it had been extended
    (run / "config.yaml").write_text(yaml.safe_dump(raw | {"fusion": None, "parent": {"tasks": None}}))
    assert "is empty" in refused(lambda: forgotten(run, "a"))["fusion"]
    earlier = [{"name": "x"}, {"name": "y"}]
    (run / "config.yaml").write_text(yaml.safe_dump(raw | {"parent": {"run": "/before", "tasks": earlier}}))
    assert "the model without it is the one of /before" in refused(lambda: forgotten(run, "b"))["TASK"]
    assert "cpift forget /before x, and then" in refused(lambda: forgotten(run, "x"))["TASK"]


def test_the_rows_behind_a_kept_probe_must_be_as_they_were(run: Path) -> None:
    rows = run.parent / "b-train.jsonl"
    rows.write_text(rows.read_text().replace("b train 3", "b train three"))
    assert "are not those that" in refused(lambda: preflight(forgotten(run, "a"), stage="run"))["tasks.b"]
