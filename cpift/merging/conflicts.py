"""Elements that are core of several tasks: who donates them, by which rule (`fusion.conflict`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from cpift_kernels import pack_mask, resolve_conflicts, union_mask, unpack_mask

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.errors import CpiftError
from cpift.extensions import find, load_class, own_code, short_name

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Claims:
    """Elements start..stop-1 of one tensor, and which task has which of them in its core. start is a multiple of 32.

    cores: packed masks by task (int32, ⌈n/32⌉ words, bit j%32 of word j//32), in the order that the rule asks for.
    Values are read when a rule asks for them.
    """

    base: Checkpoint
    models: Mapping[str, Checkpoint]
    name: str
    start: int
    stop: int
    cores: Mapping[str, torch.Tensor]
    known: Mapping[str, torch.Tensor] = field(default_factory=dict)  # values of tasks that were read before

    @cached_property
    def pretrained(self) -> torch.Tensor:
        """θ0, [n] in its own dtype."""
        return self.base.slice(self.name, self.start, self.stop)

    @cached_property
    def tuned(self) -> dict[str, torch.Tensor]:
        """θi by task, [n] each."""
        return {task: self._values(task) for task in self.cores}

    @property
    def updates(self) -> dict[str, torch.Tensor]:
        """θi − θ0 in fp32 by task, [n] each."""
        return {task: values.float() - self.pretrained.float() for task, values in self.tuned.items()}

    def without(self, excluded: torch.Tensor) -> Claims:
        """The same with the elements of a packed mask in no core."""
        return replace(self, cores={task: words & ~excluded for task, words in self.cores.items()})

    def _values(self, task: str) -> torch.Tensor:
        return self.known[task] if task in self.known else self.models[task].slice(self.name, self.start, self.stop)


class ConflictRule(ABC):
    """Who donates an element that is core of several tasks."""

    formula: ClassVar[str] = ""  # of an element that several tasks claim
    by_stage: ClassVar[bool] = False  # claims come in stage order, earliest first; else as the config has the tasks

    def excluded(self, claims: Claims) -> torch.Tensor | None:
        """A packed mask of elements that become core of none, so that SLERP decides them; None: there are none."""
        return None

    @abstractmethod
    def owners(self, claims: Claims) -> Sequence[torch.Tensor]:
        """A packed mask a task, in the order of `claims.cores`: what it donates of its core. Every claimed element has
        an owner; of one that has several the mean of their values is taken."""


class Largest(ConflictRule):
    formula = "the value of the task with the largest |θi − θ0|, of equal ones the first task's"

    def owners(self, claims: Claims) -> Sequence[torch.Tensor]:
        tuned, cores = list(claims.tuned.values()), list(claims.cores.values())
        return resolve_conflicts("magnitude", claims.pretrained, tuned, cores)


class Later(ConflictRule):
    formula = "the value of the task whose group is trained later"
    by_stage = True

    def owners(self, claims: Claims) -> Sequence[torch.Tensor]:
        tuned, cores = list(claims.tuned.values()), list(claims.cores.values())
        return resolve_conflicts("last", claims.pretrained, tuned, cores)


class Mean(ConflictRule):
    formula = "the mean of the tasks' values"

    def owners(self, claims: Claims) -> Sequence[torch.Tensor]:
        return list(claims.cores.values())


class Agreeing(Largest):
    formula = "the largest's value where all tasks move it one way, else core of none"

    def excluded(self, claims: Claims) -> torch.Tensor | None:
        import torch

        where = claims.pretrained.device
        up, down = torch.zeros(2, claims.stop - claims.start, dtype=torch.bool, device=where)
        for task, update in claims.updates.items():
            core = unpack_mask(claims.cores[task], len(update))
            up, down = up | core & (update > 0), down | core & (update < 0)
        return pack_mask(up & down)


CONFLICTS: dict[str, type[ConflictRule]] = {
    "magnitude": Largest,
    "last": Later,
    "mean": Mean,
    "agree": Agreeing,
}


def conflict_named(word: str) -> type[ConflictRule]:
    """The rule that a config names: one of CONFLICTS, or the user's, which is imported.

    Raises ConfigError for what is not there, or is no ConflictRule.
    """
    if word in CONFLICTS:
        return CONFLICTS[word]
    return load_class(find("conflicts", word), ConflictRule)  # type: ignore[type-abstract]  # an abstract class, not to be made


def by_stage(word: str) -> bool:
    """Whether a rule's result depends on the order of stages. A user's rule is taken to: it is not imported to name an
    output."""
    return word not in CONFLICTS or CONFLICTS[word].by_stage


def owned(rule: ConflictRule, claims: Claims, word: str) -> dict[str, torch.Tensor]:
    """What each task donates. Raises CpiftError for a user's rule, called `word`, whose masks do not fit the claims."""
    where = f"conflict rule {short_name(word)}: tensor {claims.name}, elements {claims.start} to {claims.stop - 1}"
    cores = claims.cores
    with own_code(type(rule), where):
        owners = list(rule.owners(claims))
    if len(owners) != len(cores):
        raise CpiftError(f"{where}: gives {len(owners)} masks → give one for each of {len(cores)} tasks, in order")
    if type(rule) not in CONFLICTS.values():
        _require_owners(cores, owners, where)
    return dict(zip(cores, owners, strict=True))


def _require_owners(cores: Mapping[str, torch.Tensor], owners: Sequence[torch.Tensor], where: str) -> None:
    """Raise CpiftError unless every element of a core is donated by tasks that hold it."""
    import torch

    for (task, core), mask in zip(cores.items(), owners, strict=True):
        _require_mask(mask, core, f"{where}: of task {task}")
    outside = [mask & ~core for core, mask in zip(cores.values(), owners, strict=True)]
    lost = union_mask(list(cores.values())) & ~union_mask(owners)
    *beyond, unowned = torch.stack([words.any() for words in (*outside, lost)]).tolist()  # read once from a GPU
    for task in (task for task, found in zip(cores, beyond, strict=True) if found):
        raise CpiftError(f"{where}: task {task} donates what its core does not hold → keep to `claims.cores`")
    if unowned:
        raise CpiftError(f"{where}: an element of a core has no owner → give it one, or leave it out by `excluded`")


def remaining(rule: ConflictRule, claims: Claims, word: str) -> Claims:
    """The claims without what a rule takes from all cores. Raises CpiftError for a mask that does not fit."""
    where = f"conflict rule {short_name(word)}: tensor {claims.name}, elements {claims.start} to {claims.stop - 1}"
    with own_code(type(rule), f"{where}: excluded"):
        excluded = rule.excluded(claims)
    if excluded is None:
        return claims
    _require_mask(excluded, next(iter(claims.cores.values())), f"{where}: excluded")
    return claims.without(excluded)


def _require_mask(mask: Any, like: torch.Tensor, where: str) -> None:
    fits = all(getattr(mask, field, None) == getattr(like, field) for field in ("dtype", "shape", "device"))
    if not fits:
        what = f"{getattr(mask, 'dtype', type(mask).__name__)} {list(getattr(mask, 'shape', ()))}"
        raise CpiftError(f"{where}: {what} → give a packed mask, int32 {list(like.shape)}, as `pack_mask` makes it")
