"""How many tokens a run's fine-tunes see, and plain SFT of as many: counted from the very rows, before any training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cpift.compare.config import Budget
from cpift.config.loading import with_fields
from cpift.config.training import Mixing
from cpift.data.tokenise import count_tokens
from cpift.disk.facts import recalled, remembered
from cpift.disk.files import digest
from cpift.errors import entry
from cpift.models.sources import load_tokenizer
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.stages import backbone, integrate, order, probe
from cpift.training.rows import stage_data
from cpift.training.spec import FitSpec, StageSpec

Groups = tuple[tuple[str, ...], ...]
_EVEN = Mixing(temperature=1000)  # shares ∝ rows^(1/1000): within half a percent of equal up to 100 times the rows
_FACT = "tokens of a stage"
STAGED = {"backbone.source": "staged", "fusion.method": "cpift"}  # of the run whose backbone is plain SFT


@dataclass(frozen=True)
class Allowance:
    """What `budgets` may name."""

    title: str
    with_probes: bool


BUDGETS = {"total": Allowance("total", True), "after_probes": Allowance("after probes", False)}


class NotCounted(LookupError):
    """The tokens of a fine-tune are not known, and were not to be counted."""


class Budgets:
    """Tokens of fine-tunes before they run, from the very rows that they will go over. What was counted once is kept in
    the user's cache folder.

    count: whether rows may be read to be counted; else NotCounted is raised where that is not known yet.
    """

    def __init__(self, count: bool = True) -> None:
        self._rows: dict[str, tuple[int, int]] = {}
        self._count = count

    def planned(self, spec: FitSpec) -> float:
        """Input tokens that a fine-tune will see, padding apart; batches that are not full count as they are."""
        total = 0.0
        for index in range(len(spec.stages)):
            rows, tokens = self.stage(spec, index)
            total += tokens * (spec.training.epochs or self._seen(spec, index) / rows)
        return total

    def stage(self, spec: FitSpec, index: int) -> tuple[int, int]:
        """Rows and tokens of one epoch of a stage. Where nothing is sampled or packed, tasks simply add up."""
        training, tasks = spec.training, spec.stages[index].tasks
        together = not (spec.balanced or training.packing) and training.mixing.temperature == 1
        if together and len(tasks) > 1:
            parts = [self.stage(replace(spec, stages=(StageSpec((task,)),)), 0) for task in tasks]
            return sum(rows for rows, _ in parts), sum(tokens for _, tokens in parts)
        sources = [spec_task.model_dump(mode="json") for spec_task in spec.tasks if spec_task.name in tasks]
        key = digest([str(spec.model), sources, training.max_length, training.packing, training.mixing.model_dump()])
        key += "" if training.validation is None else f"/{training.validation.model_dump_json()}"
        key += "" if together else f"/{spec.seed + index}/{spec.balanced}/{spec.samples_per_task}"
        if key not in self._rows:
            inputs = [key, {task: (spec.rows or {}).get(task) for task in tasks}]
            count = recalled(_FACT, inputs) if spec.rows else None  # None: what the rows are nobody asked
            if count is None and not self._count:
                raise NotCounted(spec.title)
            if count is None:
                count = remembered(_FACT, inputs, lambda: _counted(spec, index)) if spec.rows else _counted(spec, index)
            self._rows[key] = count[0], count[1]
        return self._rows[key]

    @staticmethod
    def _seen(spec: FitSpec, stage: int) -> int:
        """Rows of a stage that is measured in steps."""
        training, steps = spec.training, spec.steps(stage) or 0
        return steps * training.batch_size * training.gradient_accumulation * spec.resources.workers

    def of(self, run: Pipeline, budget: Budget) -> float:
        """What CPI-FT trains in this run, in tokens."""
        base, groups = run.pretrained(), run.group().groups
        outputs = order.outputs(run.artifacts, run.known())
        specs = [integrate.spec(run, base, groups, outputs["integrate"])]
        specs += [backbone.spec(run, base, groups, outputs["backbone"])] if "backbone" in outputs else []
        specs += probe.specs(run, base) if entry(BUDGETS, budget, "budgets").with_probes else []
        return sum(self.planned(spec) for spec in specs)

    def sft(
        self, run: Pipeline, groups: Groups, budget: Budget, balanced: bool = False, fields: Mapping[str, Any] = {}
    ) -> Pipeline:
        """The run whose staged backbone, over these groups, is plain SFT of as many tokens: every row equally often, or
        if `balanced` every task of a stage. `fields` are set in it alone, and count nothing."""
        tokens = self.of(run, budget)
        own = Pipeline(with_fields(run.config, fields, "plain SFT"), run.engine, run.view)
        changes = {"steps": None, "steps_per": "stage", "epochs": 1.0} | ({"mixing": _EVEN} if balanced else {})
        training = own.config.backbone_training.model_copy(update=changes)
        sized = self._with(own, training.model_dump(mode="json", exclude_none=True))
        artifact = sized.artifacts.backbone(groups)
        assert artifact is not None
        epoch = self.planned(backbone.spec(sized, run.pretrained(), groups, artifact))
        return self._with(own, training.model_dump(mode="json", exclude_none=True) | {"epochs": tokens / epoch})

    @staticmethod
    def _with(run: Pipeline, training: Mapping[str, Any]) -> Pipeline:
        fields = {"backbone.training": dict(training), **STAGED}
        return Pipeline(with_fields(run.config, fields, "plain SFT"), run.engine, run.view)


def _counted(spec: FitSpec, index: int) -> tuple[int, int]:
    lengths = list(count_tokens(stage_data(spec, index, load_tokenizer(spec.model))))
    return len(lengths), sum(lengths)
