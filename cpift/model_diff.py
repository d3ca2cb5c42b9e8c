"""What a fine-tune changed, by tensor, and by layer and kind of module: `cpift diff` and `cpift.diff`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from cpift.checkpoints.checkpoint import require_same_layout
from cpift.checkpoints.opening import FITTED, locate, model_files, open_models, pinned
from cpift.config.inputs import CheckpointConfig
from cpift.console.view import View
from cpift.disk.guarded import guarded_reads
from cpift.errors import CheckpointError, ConfigError, Problem
from cpift.merge_folder import given_source
from cpift.method.changes import Change, changes, together
from cpift.method.experts import Expert, by_expert, stacked
from cpift.report.tensor_names import Cell, by_module

_SUBJECT, _TITLE = "diff", "comparing"


@dataclass(frozen=True)
class ModelDiff:
    """What `tuned` changed of `base`, as they were given. tensors: by name, in name order; stacks: of tensors that hold
    several experts, what changed of each."""

    base: str
    tuned: str
    tensors: Mapping[str, Change] = field(repr=False)
    stacks: Mapping[str, Sequence[Change]] = field(default_factory=dict, repr=False)

    @cached_property
    def whole(self) -> Change:
        """Of all tensors together."""
        return together(self.tensors.values())

    @cached_property
    def modules(self) -> dict[Cell, Change]:
        """By layer and kind of module, as `report.tensor_names.by_module` has it."""
        return by_module(self.tensors)

    @cached_property
    def experts(self) -> dict[Expert, Change]:
        """Of a mixture of experts by block and number, as `method.experts.by_expert` has it."""
        return by_expert(self.tensors, self.stacks)

    def of_kind(self, kind: str) -> Change:
        """Of all modules of a kind."""
        return together(change for (_, of), change in self.modules.items() if of == kind)

    def record(self) -> dict[str, Any]:
        """As `--json` gives it; fields are added and none changes its meaning within one `format`."""
        modules = [{"layer": layer, "module": kind, **_figures(at)} for (layer, kind), at in self.modules.items()]
        tensors = [{"tensor": name, **_figures(change)} for name, change in self.tensors.items()]
        experts = [{"block": block, "expert": n, **_figures(at)} for (block, n), at in self.experts.items()]
        head = {"format": 1, "base": self.base, "tuned": self.tuned}
        return {**head, **_figures(self.whole), "modules": modules, "experts": experts, "tensors": tensors}


def _figures(change: Change) -> dict[str, Any]:
    return {**asdict(change), "share": change.share, "relative": change.relative}


def model_diff(base: str | os.PathLike[str], tuned: str | os.PathLike[str], vocabulary: str, view: View) -> ModelDiff:
    """Read both models once, in slices.

    base, tuned: model folders, adapters (tuned alone) or hub ids (`org/name@revision`). vocabulary: `error`, or `base`
    for a fine-tune with other tokens, of which those that `base` has are compared. Raises ConfigError for arguments,
    CheckpointError for models that do not fit each other and for values that are not finite.
    """
    problems = list[Problem]()
    sources = {name: given_source(name, model, problems) for name, model in (("base", base), ("tuned", tuned))}
    if vocabulary not in FITTED:
        problems.append(Problem("vocabulary", f"is {vocabulary!r}", f"one of {', '.join(FITTED)}"))
    if problems:
        raise ConfigError(_SUBJECT, problems)
    with view.stage(_TITLE, [_TITLE]):
        theirs, mine = (locate(pinned(CheckpointConfig(**sources[name]))) for name in ("base", "tuned"))
        with guarded_reads(_TITLE, [*model_files(theirs), *model_files(mine)]):
            pretrained, opened = open_models(theirs, {"tuned": mine}, vocabulary)
            require_same_layout(pretrained, opened)
            stacks: dict[str, list[Change]] = {}
            found = changes(
                pretrained,
                opened["tuned"],
                lambda done, of: view.progress({"title": _TITLE, "done": done / of}),
                lambda info: stacked(info.name, info.shape),
                stacks,
            )
    if not found:
        raise CheckpointError(str(base), [Problem("its tensors", "hold no floating-point values", "give a model")])
    return ModelDiff(os.fspath(base), os.fspath(tuned), found, stacks)
