"""An output is named by what was read: inputs that change while it is made are noticed, and it is not kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpift.config.loading import load_config
from cpift.config.run import DataSource, ResourcesConfig
from cpift.console.view import quiet
from cpift.data.tasks import load_examples, same_rows, source_fingerprint
from cpift.disk.artifacts import Artifact
from cpift.disk.files import file_sha256, write_json
from cpift.errors import ChangedInput, StageError
from cpift.pipeline.engine import NoEngine
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.stages import fuse, regions
from cpift.pipeline.stages.inputs import INPUTS_RECORD, Inputs
from cpift.pipeline.stages.names import ModelRef
from cpift.training.spec import RESULT, FitSpec
from tests.helpers.files import flip, forge, replace

Change = Callable[[Path], object]


MODEL_CHANGES: list[tuple[str, Change]] = [
    ("one/model.safetensors", replace),
    ("one/model.safetensors", Path.unlink),
    ("two/model-00001-of-00002.safetensors", replace),
    ("base/model.safetensors", flip),
    ("base/config.json", lambda path: path.write_text(path.read_text() + " ")),
    ("one/tokenizer.json", Path.unlink),
    ("two/model.safetensors.index.json", replace),
    ("two/added_tokens.json", lambda path: path.write_text("{}")),
    ("base/chat_template.jinja", lambda path: path.write_text("other")),
]
SAME = [("one/model.safetensors", lambda path: path.chmod(0o640)), ("base/config.json", lambda path: os.utime(path))]


def pipeline(config: Path) -> Pipeline:
    return Pipeline(load_config(config), NoEngine(), quiet())


def during(monkeypatch: pytest.MonkeyPatch, stage: str, change: Callable[[], object]) -> None:
    """Have `change` called in the middle of regions or of fusion."""
    place = {"write_regions": regions, "fuse_models": fuse}[stage]
    work = getattr(place, stage)

    def changed(*args: Any, **kwargs: Any) -> Any:
        result = work(*args, **kwargs)
        change()
        return result

    monkeypatch.setattr(place, stage, changed)


CASES = [(*change, when) for when in ("write_regions", "fuse_models", "between") for change in MODEL_CHANGES]
QUICK = (*CASES[:1], *CASES[10:12], *CASES[18:20], CASES[25])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change", "when"), [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES]
)
def test_a_model_that_changes_leaves_no_output(
    name: str, change: Change, when: str, merge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, kept = merge.parent / "models", merge.parent / "kept"
    shutil.copytree(place, kept, copy_function=shutil.copy2)
    run = pipeline(merge)
    if when == "between":
        run.group()
        change(place / name)
    else:
        during(monkeypatch, when, lambda: change(place / name))
    with pytest.raises((ChangedInput, StageError)) as caught:
        run.fuse()
    assert Path(name).name in str(caught.value)
    assert not list((run.root / "fuse").glob("[0-9a-f]*"))
    assert (when == "write_regions") is not bool(list((run.root / "regions").glob("[0-9a-f]*")))
    assert not list((run.root / ".work").glob("fuse-*/shards")), "nothing to go on from"
    monkeypatch.undo()
    shutil.rmtree(place)
    shutil.copytree(kept, place, copy_function=shutil.copy2)
    again = pipeline(merge)
    again.fuse()
    assert again.worked, "the original is back, and nothing made of the other is served"


@pytest.mark.parametrize(("name", "change"), SAME)
def test_a_file_with_the_same_bytes_is_the_same(
    name: str, change: Change, merge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during(monkeypatch, "fuse_models", lambda: change(merge.parent / "models" / name))
    assert pipeline(merge).fuse().path.is_dir()


def test_bytes_forged_between_two_commands_are_noticed_where_they_are_read(merge: Path) -> None:
    pipeline(merge).group()
    forge(merge.parent / "models" / "two" / "model-00002-of-00002.safetensors")
    with pytest.raises(ChangedInput, match=r"two: model-00002-of-00002.*regions were selected from .*touch"):
        pipeline(merge).fuse()


def test_bytes_forged_while_they_are_merged_are_noticed(merge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pipeline(merge)
    run.group()
    during(monkeypatch, "fuse_models", lambda: forge(merge.parent / "models" / "one" / "model.safetensors"))
    with pytest.raises(ChangedInput, match=r"one/model.safetensors: was written to"):
        run.fuse()


def test_a_record_without_checksums_is_compared_by_its_hashes(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "one", tmp_path / "one", copy_function=shutil.copy2)
    weights = tmp_path / "one" / "model.safetensors"
    fused = Artifact(tmp_path, "fuse", "", {}, {}, 1)

    def inputs(**fields: bool) -> Inputs:
        return Inputs.of({"one": ModelRef("one", weights.parent, "")}, ResourcesConfig(**fields), {})

    described = inputs(hash_inputs=True).described()
    assert described["one"]["files"][weights.name]["sha256"] == file_sha256(weights)
    record = described["one"]["files"][weights.name]
    del record["xxh3_128"]
    write_json(tmp_path / INPUTS_RECORD, described)
    weights.chmod(0o640)  # the same bytes
    inputs().require_as_recorded(tmp_path / INPUTS_RECORD, inputs().described(), fused)
    forge(weights)
    with pytest.raises(ChangedInput, match="regions were selected from"):
        inputs().require_as_recorded(tmp_path / INPUTS_RECORD, inputs().described(), fused)
    unverified = inputs(verify=False)
    unverified.require_as_recorded(tmp_path / INPUTS_RECORD, unverified.described(), fused)


class Exports:
    """An engine whose fine-tunes export a file, during which `change` happens."""

    def __init__(self, change: Callable[[], object]):
        self.change, self.specs = change, list[FitSpec]()

    def expect(self, specs: Sequence[FitSpec]) -> None:
        """Nothing here takes its time to start."""

    def fit(self, specs: Sequence[FitSpec], on_progress: Any) -> None:
        self.specs += specs
        for spec in specs:
            spec.export.mkdir(parents=True, exist_ok=True)
            (spec.export / "model.safetensors").write_text("x")
            (spec.export / RESULT).write_text(json.dumps({"title": spec.title, "device": "none", "seconds": 1}))
        self.change()

    session = evaluate = merging = None


@pytest.fixture
def training(tmp_path: Path, smoke_config: Path) -> Path:
    """A run whose tasks have files of rows."""
    raw = yaml.safe_load(smoke_config.read_text())
    raw["tasks"] = raw["tasks"][:2]
    for task in raw["tasks"]:
        for split in ("train", "test"):
            file = tmp_path / f"{task['name']}-{split}.jsonl"
            row = {"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}
            file.write_text(json.dumps(row | {"answer": "2"}) + "\n")
            task[split] = {"file": str(file)}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw | {"output": str(tmp_path / "run")}))
    return path


def append(path: Path) -> None:
    path.write_text(path.read_text() * 2)


@pytest.mark.parametrize("change", [append, replace, forge, Path.unlink])
def test_rows_that_change_while_probes_train_leave_no_probe_of_them(change: Change, training: Path) -> None:
    first, second = (task.name for task in load_config(training).tasks)
    file = training.with_name(f"{first}-train.jsonl")
    kept = file.with_name("kept")
    shutil.copy2(file, kept)
    engine: Any = Exports(lambda: change(file))
    run = Pipeline(load_config(training), engine, quiet())
    with pytest.raises(ChangedInput, match=rf"probe {first} is not kept.*\n.*tasks\.{first}\.train: {file}"):
        run.probe()
    assert engine.specs[0].rows == {first: run.artifacts.train_rows(first)}, "workers know what they are to read"
    assert not (run.root / "probe").is_dir() or not list((run.root / "probe").glob(f"{first}-*"))
    assert not list((run.root / ".work").glob(f"probe-{first}-*/export"))
    shutil.copy2(kept, file)
    again: Any = Exports(lambda: None)
    Pipeline(load_config(training), again, quiet()).probe()
    assert first in {task for spec in again.specs for stage in spec.stages for task in stage.tasks}
    assert len(list((run.root / "probe").glob(f"{second}-*"))) == 1


def test_a_base_model_that_changes_while_probes_train_leaves_none(training: Path) -> None:
    config = load_config(training)
    engine: Any = Exports(lambda: flip(next((config.output_dir / "model").glob("*/model.safetensors"))))
    with pytest.raises(ChangedInput, match=r"probes is not kept.*\n.*model.safetensors: was written to"):
        Pipeline(config, engine, quiet()).probe()
    assert not (config.output_dir / "probe").is_dir()


def test_a_worker_refuses_rows_that_are_not_those_of_its_driver(training: Path) -> None:
    source = DataSource(file=training.with_name("addition-train.jsonl"))
    known = {"a": source_fingerprint(source)}
    with same_rows({"a": source}, known) as found:
        assert load_examples(source)
    assert found == known
    with pytest.raises(ChangedInput, match="was written to"), same_rows({"a": source}, known):
        append(training.with_name("addition-train.jsonl"))
    with pytest.raises(ChangedInput, match="a: is not what it was"), same_rows({"a": source}, known):
        pass
