"""The stages in order: what a run has of all of them, before anything is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpift.config.loading import load_config
from cpift.disk.artifact_state import STAGES
from cpift.pipeline.engine import NoEngine
from cpift.pipeline.identity import StageArtifacts
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.session import steps_of
from cpift.pipeline.stages import order
from cpift.pipeline.stages.names import NOTHING, Known


def artifacts(smoke_config: Path, tmp_path: Path, **changes: Any) -> StageArtifacts:
    return StageArtifacts(load_config(smoke_config, changes={"output": str(tmp_path / "run")} | changes))


def planned(made: StageArtifacts) -> list[str]:
    return [step.stage for step in order.plan(made)]


def test_every_stage_has_its_place_on_the_disk() -> None:
    assert [*order.ORDER, "arrival", "evaluate", "sweep"] == list(STAGES)
    assert [*order.FIRST, *order.LAST] == list(order.ORDER)


def test_what_does_not_follow_yet_is_left_out(smoke_config: Path, tmp_path: Path) -> None:
    made = artifacts(smoke_config, tmp_path)
    probes = [f"probe {task.name}" for task in made.config.tasks]
    assert list(order.outputs(made, NOTHING)) == ["model", *probes, "regions", "group"]
    assert [model.title for model in order.models(made, NOTHING)] == ["base", *probes]
    known = Known([[task.name] for task in made.config.tasks], made.base)
    assert list(order.outputs(made, known))[-3:] == ["backbone", "fuse", "integrate"]
    assert [model.title for model in order.models(made, known, *order.LAST)] == ["fused", "final"]
    assert order.outputs(made, known)["integrate"] == made.integrate(known.groups or (), made.fuse((), made.base))


def test_a_plan_lists_each_stage_in_the_order_of_the_run(smoke_config: Path, tmp_path: Path) -> None:
    staged = planned(artifacts(smoke_config, tmp_path))
    assert staged == ["model", *["probe"] * 3, "regions", "group", "backbone", "fuse", "integrate", "evaluate"]
    merged = planned(artifacts(smoke_config, tmp_path, **{"fusion.method": "linear"}))
    assert merged == [stage for stage in staged if stage != "backbone"]


def test_a_given_backbone_is_planned_before_the_groups_are_known(smoke_config: Path, tmp_path: Path) -> None:
    steps = list(order.plan(artifacts(smoke_config, tmp_path, **{"backbone.source": "org/name"})))
    assert [(step.state, step.detail) for step in steps if step.stage == "backbone"] == [("given", "org/name")]


def test_the_screen_counts_the_steps_that_there_are(smoke_config: Path, tmp_path: Path) -> None:
    def steps(**changes: Any) -> list[str]:
        return steps_of(Pipeline(artifacts(smoke_config, tmp_path, **changes).config, NoEngine()), "run")

    whole = ["model θ0", "probes", "core regions", "task groups", "staged backbone", "fusion", "integration"]
    assert steps() == [*whole, "evaluation", "report"]
    assert "merge: linear" in steps(**{"fusion.method": "linear"}), "as it is announced"
