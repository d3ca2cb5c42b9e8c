"""Fields that change nothing beside the others are said by name, and those that do something are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cpift.config.loading import parse_config, with_fields
from cpift.config.run import RunConfig
from cpift.pipeline.checks.idle import idle_notes
from cpift.pipeline.stages import integrate
from tests.helpers.sweeps import run_fields

MIXED = {"integration.stages": "mixed"}
CASES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    (MIXED, ["integration.freeze: earlier"]),
    (MIXED | {"integration.freeze": "all", "integration.penalty": 9.0}, []),
    (MIXED | {"integration.penalty": 9.0}, ["integration.freeze: earlier", "integration.penalty"]),
    ({"integration.freeze": "none", "integration.penalty": 9.0}, ["integration.penalty"]),
    ({"probe.mixing.temperature": 2.0}, []),
    ({"probe.mixing.temperature": 2.0, "backbone.source": "pretrained"}, ["probe.mixing"]),
    ({"regions.p": 0.2, "groups.tau": 0.3, "fusion.method": "linear"}, []),
    ({"fusion.method": "linear", "backbone.source": "pretrained"}, ["backbone.source"]),
    (
        {"regions.p": 0.2, "groups.tau": 0.3, "fusion.method": "linear", "integration": None},
        ["regions.p", "groups.tau"],
    ),
    ({"backbone.training": {"steps": 2}, "backbone.source": "pretrained"}, ["backbone.training"]),
    ({"backbone.training": {"steps": 2}, "backbone.source": "pretrained", "baselines": {"full_sft": {}}}, []),
    ({"backbone.revision": "main"}, ["backbone.revision"]),
    ({"fusion.method": "ties", "fusion.density": 0.5, "fusion.omega": 0.5}, ["fusion.omega"]),
    ({"fusion.density": 0.5}, ["fusion.density"]),
    ({"fusion.transplant": False, "fusion.conflict": "last"}, ["fusion.conflict"]),
    ({"fusion.rank": 4, "fusion.missing_tokens": "mean"}, ["fusion.rank", "fusion.missing_tokens"]),
    ({"tasks.1.validation": {"procedural": "addition", "size": 8}}, ["tasks.b.validation"]),
    ({"tasks.1.validation": {"procedural": "addition", "size": 8}, "probe.evaluate_every": 2}, []),
    ({"tasks.0.max_new_tokens": 9}, ["tasks.a.max_new_tokens"]),
    ({"tasks.0.max_new_tokens": 9, "tasks.0.metric": "number"}, []),
    ({"evaluation.judge": {"url": "http://x", "model": "y"}}, ["evaluation.judge"]),
    ({"resources.strategy": "fsdp"}, ["resources.strategy: fsdp"]),
    ({"resources.strategy": "fsdp", "resources.workers": 2, "probe.gather": "bfloat16"}, []),
    ({"probe.gather": "float32"}, ["probe.gather"]),
]


@pytest.fixture(scope="module")
def base() -> RunConfig:
    return parse_config(run_fields(), Path.cwd(), "tiny")


@pytest.mark.parametrize(("fields", "said"), CASES, ids=lambda value: " ".join(value) or "nothing")
def test_what_changes_nothing_is_said(base: RunConfig, fields: dict[str, Any], said: list[str]) -> None:
    notes = list(idle_notes(with_fields(base, fields, "tiny")))
    assert [note.partition(" does nothing: ")[0] for note in notes] == said
    assert all(note.partition(" does nothing: ")[2] for note in notes)


def test_a_mixed_stage_is_planned_as_one(base: RunConfig) -> None:
    groups = [("a",), ("b", "c")]
    each = "2 steps of 4 examples"
    for fields, said in (
        ({}, f"2 stages, {each} each"),
        (MIXED, f"1 stage of all tasks, 2 × {each}"),
        (MIXED | {"integration.steps_per": "task"}, "1 stage of all tasks, 2 steps for each task of 4 examples"),
    ):
        assert integrate.detail(with_fields(base, fields, "tiny"), groups) == said
