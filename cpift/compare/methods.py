"""What CPI-FT is compared with, as methods over the run's own stages: no second training loop, no second merge.

Plain SFT of any order is the staged backbone's fine-tune over groups that the baseline chooses, for as many epochs as
its budget has tokens; merges are `fusion.method`; CPI-FT without one of its parts is the run with a field set.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cpift.compare.arrivals import Arriving, arrival_problems, arriving
from cpift.compare.budgets import BUDGETS, STAGED, Budgets, Groups
from cpift.compare.config import Budget, Comparison, of_training
from cpift.compare.contrasts import require_compared
from cpift.compare.record import BASE, OURS, PROBES, RECOMMENDED
from cpift.config.loading import Fields
from cpift.data.tasks import count_examples
from cpift.disk.artifacts import Artifact
from cpift.errors import ConfigError, Problem, entry
from cpift.merging.registry import METHODS
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.preflight import field_problems
from cpift.pipeline.shared import Wanted, titled_backbone
from cpift.pipeline.stages import integrate, order

Judged = Literal["base", "probe", "probes", "sft", "backbone", "fused", "final", "arrived"]

MERGES: dict[str, Fields] = {
    method.contender.name: {"fusion.method": name}
    | {f"fusion.{field}": at for field, at in method.contender.fields.items()}
    for name, method in METHODS.items()
    if method.contender is not None
}
PARTS: dict[str, Fields] = {
    "no transplant": {"fusion.transplant": False},
    "no SLERP": {"fusion.omega": 0.0},
    "no fusion": {"fusion.transplant": False, "fusion.omega": 0.0},
    "no freezing": {"integration.freeze": "none"},
    "no grouping": {"groups.tau": 1.0},
    "one mixed stage": {"integration.stages": "mixed"},
    "no fusion, no freezing": {"fusion.transplant": False, "fusion.omega": 0.0, "integration.freeze": "none"},
}
_REPLAY = "no fusion, no freezing"


@dataclass(frozen=True)
class OfCpift:
    """What of CPI-FT's own stages a judged model needs."""

    backbone: bool = False
    fusion: bool = False
    integration: bool = False


JUDGED: dict[str, OfCpift] = {
    **dict.fromkeys(("base", "probe", "probes", "sft", "arrived"), OfCpift()),
    "backbone": OfCpift(backbone=True),
    "fused": OfCpift(backbone=True, fusion=True),
    "final": OfCpift(backbone=True, fusion=True, integration=True),
}


@dataclass(frozen=True)
class ComparedMethod:
    """A way to make one model of all tasks. `judged`: which model of the run with these `fields`.

    order: of plain SFT, the groups by a run (its config and seed); balanced: whether it trains all tasks of a stage
    equally much, not all rows; training: fields of its training alone. pair: the only two tasks, in the order learnt.
    """

    name: str
    kind: str
    judged: Judged
    fields: Mapping[str, Any] = field(default_factory=dict)
    order: Callable[[Pipeline], Groups] | None = None
    budget: Budget | None = None
    balanced: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    pair: tuple[str, str] | None = None
    arriving: Arriving | None = None


def methods_of(comparison: Comparison) -> list[ComparedMethod]:
    """Every method of a comparison, in the order of its tables. θ0, the probes and CPI-FT itself always take part,
    CPI-FT not where tasks arrive one after another.

    Raises ConfigError where a primary contrast names another.
    """
    config, tasks = comparison.config, [task.name for task in comparison.base.tasks]
    methods = [ComparedMethod(BASE, "reference", "base"), ComparedMethod(PROBES, "reference", "probes")]
    methods += [ComparedMethod(f"probe {task}", "probe", "probe", task=task) for task in tasks]
    chosen = [method for budget in config.budgets for method in _plain(comparison, budget)]
    chosen += [ComparedMethod(name, "merge", "fused", fields) for name, fields in MERGES.items()]
    if comparison.base.backbone_source == "staged":
        chosen.append(ComparedMethod(f"{OURS}, backbone alone", "cpift", "backbone"))
    chosen += [ComparedMethod(f"{OURS}, fused alone", "cpift", "fused"), ComparedMethod(OURS, "cpift", "final")]
    chosen += [ComparedMethod(RECOMMENDED, "cpift", "final", config.recommended)] if config.recommended else []
    chosen += [ComparedMethod(name, "part", "final", fields) for name, fields in PARTS.items()]
    chosen += [ComparedMethod(name, "variant", "final", fields) for name, fields in config.variants.items()]
    chosen += [
        ComparedMethod(f"{name} = {value}", "curve", "final", {name: value})
        for name, values in config.curves.items()
        for value in values
    ]
    for first, other in config.forgetting:
        chosen += [*_in_sequence((first, other), config.recommended), *_in_sequence((other, first), config.recommended)]
    chosen += [
        ComparedMethod(one.name, "arrival", "arrived", one.fields, pair=one.pair, arriving=one)
        for one in arriving(config.arrival)
    ]
    _require_names(comparison, [method.name for method in methods + chosen])
    require_compared(comparison, [method.name for method in methods + chosen])  # a piece may have some of them alone
    always = () if config.arrival is not None else ("cpift",)
    return methods + [method for method in chosen if method.kind in always or config.chosen(method.name)]


def _require_names(comparison: Comparison, names: Sequence[str]) -> None:
    """Raise ConfigError where two methods have one name: scores go by it, and theirs would be put together."""
    problems = [
        Problem(
            "methods", f"{name!r} is the name of two", "give variants, sft and curves names and values of their own"
        )
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if problems:
        raise ConfigError(f"comparison {comparison.name}", problems)


def require_possible(comparison: Comparison) -> None:
    """Raise ConfigError for methods whose fields cannot be done, with what a run of them would be refused for, and for
    primary contrasts of methods that are left out."""
    methods = methods_of(comparison)
    require_compared(comparison, [method.name for method in methods])
    if missing := list(arrival_problems(comparison)):
        raise ConfigError(f"comparison {comparison.name}", missing)
    found: dict[Problem, str] = {}
    for method in methods:
        fields = {} if method.arriving is not None else dict(method.fields)
        if method.judged == "sft":  # what `Budgets.sft` makes of it
            fields |= of_training(comparison.base, method.training) | STAGED
        for problem in field_problems(comparison.run(fields, comparison.seeds[0]), "compare"):
            found.setdefault(problem, method.name)
    if found:
        problems = [replace(problem, what=f"{problem.what} (in {name!r})") for problem, name in found.items()]
        raise ConfigError(f"comparison {comparison.name}", problems)


def _plain(comparison: Comparison, budget: Budget) -> list[ComparedMethod]:
    """Plain SFT in every order, with a budget."""
    suffix = "" if budget == comparison.config.budgets[0] else f", {entry(BUDGETS, budget, 'budgets').title}"
    orders: dict[str, Callable[[Pipeline], Groups]] = {
        "full SFT": together,
        "multi-stage SFT, random": lambda run: in_stages(shuffled(run), comparison.config.stages),
        "multi-stage SFT, heuristic": lambda run: (
            comparison.config.heuristic or in_stages(by_rows(run), comparison.config.stages)
        ),
        "sequential SFT": lambda run: in_stages(shuffled(run), len(run.config.tasks)),
    }
    methods = [ComparedMethod(f"{name}{suffix}", "sft", "sft", {}, order, budget) for name, order in orders.items()]
    even = ComparedMethod(f"full SFT, balanced{suffix}", "sft", "sft", {}, together, budget, balanced=True)
    tuned = [
        replace(method, name=f"{method.name.removesuffix(suffix)}, {name}{suffix}", training=fields)
        for name, fields in comparison.config.sft.items()
        for method in (methods[0], even)
    ]
    return [methods[0], even, *tuned, *methods[1:]]


def _in_sequence(pair: tuple[str, str], recommended: Mapping[str, Any]) -> list[ComparedMethod]:
    """The forgetting protocol on A→B: plain SFT on A, then B; the same with CPI-FT's last stage but neither fusion nor
    freezing, whose replay alone may explain a gain; and CPI-FT."""
    title, replay, staged = f"{pair[0]} → {pair[1]}", PARTS[_REPLAY], {"backbone.source": "staged"}
    return [
        ComparedMethod(f"sequential SFT: {title}", "forgetting", "backbone", staged, pair=pair),
        ComparedMethod(f"sequential SFT and replay: {title}", "forgetting", "final", replay | staged, pair=pair),
        ComparedMethod(f"{OURS}: {title}", "forgetting", "final", pair=pair),
        *(
            [ComparedMethod(f"{RECOMMENDED}: {title}", "forgetting", "final", recommended, pair=pair)]
            if recommended
            else []
        ),
    ]


# ---- orders of plain SFT ---------------------------------------------------------------------------------------------


def together(run: Pipeline) -> Groups:
    """All tasks in one stage."""
    return (tuple(task.name for task in run.config.tasks),)


def shuffled(run: Pipeline) -> list[str]:
    """The tasks in an order that the run's seed decides."""
    names = [task.name for task in run.config.tasks]
    return random.Random(f"order/{run.config.seed}").sample(names, len(names))


def by_rows(run: Pipeline) -> list[str]:
    """Tasks of most training rows first, so that the small ones are not overwritten by what follows."""
    tasks = sorted(run.config.tasks, key=lambda task: -count_examples(task.train_data))
    return [task.name for task in tasks]


def in_stages(names: Sequence[str], stages: int) -> Groups:
    """Cut a sequence into `stages` runs whose lengths differ by at most one; never an empty one."""
    stages = min(stages, len(names))
    cuts = [round(stage * len(names) / stages) for stage in range(stages + 1)]
    return tuple(tuple(names[start:stop]) for start, stop in itertools.pairwise(cuts))


# ---- one method with one seed ----------------------------------------------------------------------------------------


@dataclass
class Entry:
    """One method with one seed: its run, and of plain SFT the run that trains it and the groups it goes over."""

    method: ComparedMethod
    run: Pipeline
    sft: Pipeline | None = None
    groups: Groups = ()

    def plan(self, budgets: Budgets) -> None:
        """Choose the groups of plain SFT and how long it trains; the run's own groups must be there."""
        if self.method.judged == "sft":
            assert self.method.order is not None
            assert self.method.budget is not None
            self.groups = self.method.order(self.run)
            training = self.method.training
            fields = of_training(self.run.config, training) if training else {}
            self.sft = budgets.sft(self.run, self.groups, self.method.budget, self.method.balanced, fields)
        elif self.needs_backbone:
            self.groups = self.run.group().groups

    def sft_fit(self) -> Wanted | None:
        """What plain SFT trains."""
        if self.sft is None:
            return None
        artifact = self.sft.artifacts.backbone(self.groups)
        assert artifact is not None
        return artifact, titled_backbone(self.sft, self.groups, artifact), self.sft

    @property
    def needs_backbone(self) -> bool:
        return entry(JUDGED, self.method.judged, "judged").backbone

    @property
    def needs_fusion(self) -> bool:
        return entry(JUDGED, self.method.judged, "judged").fusion

    @property
    def needs_integration(self) -> bool:
        return entry(JUDGED, self.method.judged, "judged").integration

    def fused(self) -> Artifact:
        """The fused model, whose probes and backbone must be there."""
        (fused,) = order.outputs(self.run.artifacts, self.run.known(), "fuse").values()
        return fused

    def integration(self) -> Wanted | None:
        """What CPI-FT's last stage trains."""
        if not self.needs_integration:
            return None
        spec = integrate.spec(self.run, self.run.fuse(), self.groups, self.artifacts()[-1])
        title = f"{self.method.name}, integration"
        return self.artifacts()[-1], replace(spec, title=title), self.run

    def artifacts(self) -> list[Artifact]:
        """Everything that was trained or made for the model, in order; the last one is the model."""
        stages, run = self.run.artifacts, self.run
        if self.method.judged == "base":
            return [stages.model]
        if self.method.arriving is not None:
            return self.method.arriving.artifacts(run)
        if self.sft is not None:
            staged = self.sft.artifacts.backbone(self.groups)
            assert staged is not None
            return [staged]
        if self.method.judged == "probe":
            return [stages.probes[str(self.method.task)]]
        return list(order.outputs(run.artifacts, run.known(), *self._stages()).values())

    def _stages(self) -> Iterator[str]:
        """The stages of CPI-FT that the model comes from."""
        judged = entry(JUDGED, self.method.judged, "judged")
        yield "probe"
        if judged.backbone and self.run.config.fusion.isolates:  # other merges know no regions
            yield from ("regions", "backbone")
        if judged.fusion:
            yield "fuse"
        if judged.integration:
            yield "integrate"


def seconds_of(artifacts: Sequence[Artifact]) -> float:
    """Time that making them took, one after the other."""
    return sum(float(artifact.manifest()["seconds"]) for artifact in artifacts)
