"""Closed lists are tables: a config may say exactly what the code knows, and all else is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from pydantic import BaseModel
from transformers.trainer_utils import SchedulerType

from cpift import devices
from cpift.checkpoints import opening as given
from cpift.checkpoints import uniting
from cpift.compare import arrivals, contrasts
from cpift.compare import methods as baselines
from cpift.compare.config import CompareConfig
from cpift.config import needs
from cpift.config.inputs import DataSource, ModelConfig, ScratchModel
from cpift.config.resources import SHARDED
from cpift.config.run import FusionConfig, RunConfig
from cpift.config.tasks import BASELINES
from cpift.config.training import BASES, KEEPS, WARMUPS
from cpift.data import sources as row_sources
from cpift.data import tasks as data
from cpift.errors import CpiftError, entry
from cpift.evaluation import metrics
from cpift.merging import conflicts, on_device, registry
from cpift.merging.methods import cpift as fusion
from cpift.method import groups as grouping
from cpift.method import measures, placement
from cpift.method.groups import group_tasks
from cpift.models import sources as models
from cpift.pipeline import outcomes
from cpift.pipeline import plan as planning
from cpift.pipeline.stages import integrate
from cpift.pretrained import attention
from cpift.sweep import config as sweep_config
from cpift.sweep import searching as sweep_searching
from cpift.training import optimizers, steps, tracking
from cpift.training import spec as fit_spec
from tests.helpers.config_sections import sections

# Every field with a list of words, and the table of those words. (`"uniform"` and `"all-linear"` stand beside other
# types: another word would be no number, and no list.)
TABLES: dict[str, Collection[str]] = {
    "TaskConfig.metric": metrics.METRICS,
    "RegionsConfig.scope": measures.SCOPES,
    "RegionsConfig.measure": measures.MEASURES,
    "RegionsConfig.placement": placement.PLACEMENTS,
    "GroupsConfig.order": grouping.ORDERS,
    "FusionConfig.method": registry.METHODS,
    "FusionConfig.trim": measures.SCOPES,
    "FusionConfig.granularity": fusion.VECTORS,
    "FusionConfig.space": fusion.SPACES,
    "FusionConfig.conflict": conflicts.CONFLICTS,
    "FusionConfig.missing_tokens": uniting.BEFORE,
    "FusionConfig.vocabulary": {**given.FITTED, **uniting.KEPT},
    "Mixing.by": data.SIZES,
    "TrainingConfig.steps_per": fit_spec.STEPS_PER,
    "IntegrationConfig.steps_per": fit_spec.STEPS_PER,
    "TrainingConfig.optimizer": optimizers.OPTIMIZERS,
    "IntegrationConfig.optimizer": optimizers.OPTIMIZERS,
    "LoraConfig.base": BASES,
    "TrainingConfig.attention": attention.IMPLEMENTATIONS,
    "IntegrationConfig.attention": attention.IMPLEMENTATIONS,
    "TrainingConfig.keep": KEEPS,
    "IntegrationConfig.keep": KEEPS,
    "TrainingConfig.warmup": WARMUPS,
    "IntegrationConfig.warmup": WARMUPS,
    "TrainingConfig.gather": devices.GATHERS,
    "IntegrationConfig.gather": devices.GATHERS,
    "TrainingConfig.precision": devices.PRECISIONS,
    "IntegrationConfig.precision": devices.PRECISIONS,
    "EvaluationConfig.precision": devices.PRECISIONS,
    "IntegrationConfig.freeze": fit_spec.FREEZES,
    "IntegrationConfig.stages": integrate.STAGES,
    "ResourcesConfig.strategy": SHARDED,
    "ResourcesConfig.device": on_device.DEVICES,
    "RunConfig.tracking": tracking.TRACKERS,
    "ModelConfig.dtype": planning.KEPT_BYTES,
    "Search.method": sweep_searching.SEARCHES,
    "Search.sampler": sweep_searching.SAMPLERS,
    "Objective.mode": sweep_config.MODES,
    "SweepConfig.model": outcomes.INTEGRATES,
    "SweepConfig.keep": sweep_config.KEEPS,
    "CompareConfig.budgets": baselines.BUDGETS,
    "Contrast.by": contrasts.SCALES,
    "ArrivalMethod.hold": arrivals.CONTROLS,
}
SCHEDULES = {"TrainingConfig.schedule", "IntegrationConfig.schedule"}  # transformers' own list


def literals(annotation: Any) -> Iterator[tuple[str, ...]]:
    """Every list of words inside an annotation that has more than one."""
    if get_origin(annotation) is Literal:
        yield get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from literals(part)


def fields() -> dict[str, tuple[str, ...]]:
    every = sections(RunConfig) | sections(sweep_config.SweepConfig) | sections(CompareConfig)
    found: dict[str, tuple[str, ...]] = {}
    for section in every:
        for name, field in section.model_fields.items():
            found |= {f"{section.__name__}.{name}": words for words in literals(field.annotation) if len(words) > 1}
    return found


def test_what_a_config_may_say_is_what_the_tables_hold() -> None:
    found = fields()
    assert found.keys() == TABLES.keys() | SCHEDULES, "a field with a list of words needs a table, and a line here"
    assert {name: set(table) for name, table in TABLES.items()} == {
        name: set(words) for name, words in found.items() if name in TABLES
    }
    for name in SCHEDULES:
        assert set(found[name]) <= {kind.value for kind in SchedulerType}
        assert set(found[name]) == set(steps.DECAYS)


def test_sources_and_judged_models_are_tables_too() -> None:
    assert set(models.SOURCES) == set(ModelConfig.model_fields) - {
        *("revision", "dtype", "chat_template", "chat_template_kwargs")
    }
    others = {"subset", "split", "revision", "size", "seed", "limit", "streaming", "columns", "data_files"}
    assert set(row_sources.ROWS) == set(DataSource.model_fields) - others
    assert set(baselines.JUDGED) == set(get_args(baselines.Judged))
    for dtype in set(planning.KEPT_BYTES) - {"auto"}:
        assert torch.empty(0, dtype=getattr(torch, dtype)).element_size() == planning.KEPT_BYTES[dtype]


def unchecked(section: BaseModel, **fields: Any) -> Any:
    """A section that says what no table holds, as one would that was added to the config alone."""
    return section.model_copy(update=fields)


class NewKind(ModelConfig):
    @property
    def kind(self) -> str:
        return "revision"


class NewRows(DataSource):
    @property
    def kind(self) -> str:
        return "subset"


NEW_MODEL = NewKind(scratch=ScratchModel())
NEW_ROWS = NewRows(procedural="addition", size=4)
CASES: dict[str, Callable[[], Any]] = {
    "model, fingerprint": lambda: models.model_fingerprint(NEW_MODEL),
    "model, check": lambda: models.check_model(NEW_MODEL),
    "model, materialise": lambda: models.materialise(NEW_MODEL, Path("nowhere")),
    "model, plan and card": lambda: models.source_of(NEW_MODEL),
    "rows, fingerprint": lambda: data.source_fingerprint(NEW_ROWS),
    "rows": lambda: data.load_examples(NEW_ROWS),
    "freeze": lambda: fit_spec.stages_of([["a"], ["b"]], "new"),  # type: ignore[arg-type]
    "precision": lambda: devices.resolved("new", "cpu"),  # type: ignore[arg-type]
    "order": lambda: grouped("new"),
}


def grouped(order: str) -> Any:
    import numpy as np

    config = unchecked(RunConfig.model_fields["groups"].default, order=order)
    return group_tasks(["a", "b"], np.eye(2, dtype=np.int64), 0.1, config, 0)


@pytest.mark.parametrize("name", CASES)
def test_what_no_table_holds_is_refused_by_name(name: str) -> None:
    with pytest.raises(CpiftError, match=r"nothing is known of '(new|revision|subset)' → one of "):
        CASES[name]()


def test_a_method_says_what_it_is() -> None:
    """What a plan, a fingerprint, a card and the reference ask a class for is there, and names real fields."""
    of_fusion = set(FusionConfig.model_fields) - set(registry.OF_ALL)
    for name, method in registry.METHODS.items():
        assert not method.__abstractmethods__, f"{name}: {', '.join(method.__abstractmethods__)}"
        assert method.formula, name
        assert method.source, name
        assert set(method.fields) <= of_fusion, name
        assert not method.extra or method.extra in needs.EXTRAS, name
        assert method.described(FusionConfig()), name
    assert {field for method in registry.METHODS.values() for field in method.fields} == of_fusion, "read by none"
    merged = {name for name, one in BASELINES.items() if not one.trained}
    assert merged <= registry.METHODS.keys()
    assert entry({"a": 1}, "a", "x") == 1
