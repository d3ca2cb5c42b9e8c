"""A text-only fine-tune as a fine-tune of the language model inside θ0, under θ0's names.

`into` names the module of θ0's class that is the text model's body: what a text model calls `model.layers.0…` is
`into.layers.0…` there. Its output layer is θ0's. Everything else is θ0's own, of which no method makes anything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpift.checkpoints.checkpoint import Checkpoint, first_problems
from cpift.checkpoints.layout import Layout, checkpoint_layout
from cpift.checkpoints.lora_config import ADAPTER_CONFIG
from cpift.errors import CheckpointError, Problem
from cpift.pretrained.architecture import skeleton, tied_names
from cpift.pretrained.fields import tower_problems

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SHOWN = 3


class TowerCheckpoint(Checkpoint):
    """`base` with the tensors `theirs` (name there → name in `text`) of a text-only model."""

    def __init__(self, text: Checkpoint, base: Checkpoint, theirs: Mapping[str, str]):
        self.folder, self.config = text.folder, base.config
        self.text, self._base, self._theirs, self._maps = text, base, dict(theirs), {}
        self.ties, self.is_apart, self.replaced_alone = base.ties, base.is_apart, frozenset(theirs)
        self.tensors = {
            name: replace(text.tensors[theirs[name]], name=name) if name in theirs else info
            for name, info in base.tensors.items()
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.text, self._base, self._theirs)

    @property
    def files(self) -> tuple[Path, ...]:
        """The text model's: θ0's are counted with θ0."""
        return self.text.files

    def require_unchanged(self) -> None:
        self.text.require_unchanged()
        self._base.require_unchanged()

    def unequal_copies(self) -> Iterator[Problem]:
        return self.text.unequal_copies()

    def _lying(self, name: str) -> tuple[Checkpoint, str]:
        return (self.text, self._theirs[name]) if name in self._theirs else (self._base, name)

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """A view of the file that has it."""
        model, there = self._lying(name)
        return model.slice(there, start, stop)

    def gather(self, name: str, starts: np.ndarray, length: int) -> torch.Tensor:
        model, there = self._lying(name)
        return model.gather(there, starts, length)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        model, there = self._lying(name)
        model.prefetch(there, start, stop)

    def release(self, name: str, start: int, stop: int) -> None:
        model, there = self._lying(name)
        model.release(there, start, stop)


def outside(models: Iterable[Checkpoint], name: str) -> bool:
    """Whether all models are of parts of θ0 that a tensor is not in: it stays as it is, whatever the method."""
    kept = [model.replaced_alone for model in models]
    return bool(kept) and all(names is not None and name not in names for names in kept)


def open_tower(folder: Path, base: Checkpoint, into: str) -> TowerCheckpoint:
    """The text-only model in a folder as a fine-tune of θ0's module `into`.

    Raises CheckpointError for what does not fit: a module that is not there, tensors that one of them lacks, other
    shapes, other fields that decide how it computes.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        what = "is an adapter, and what goes into a part of θ0 is a whole text model"
        remedy = "merge it onto its own base first: `cpift merge BASE ADAPTER --method linear --out FOLDER`"
        raise CheckpointError(f"text model {folder}", [Problem(str(folder), what, remedy)])
    text, network = Checkpoint(folder), skeleton(base.folder)
    _require_module(network, text, into)
    problems, mine, theirs = tower_problems(base.folder, folder), checkpoint_layout(base), checkpoint_layout(text)
    pairs = dict(_pairs(mine, theirs, base, text, into, problems))
    taken = {*pairs.values(), *text.ties}
    spare = [name for name, info in text.tensors.items() if info.floating and name not in taken]
    problems += [Problem(into, f"has no place for {len(spare)} of its tensors ({_some(spare)})", _FIT)] if spare else []
    problems += [
        Problem(name, f"has shape {list(text.tensors[there].shape)}, in θ0 {list(base.tensors[name].shape)}", _FIT)
        for name, there in pairs.items()
        if text.tensors[there].shape != base.tensors[name].shape
    ]
    if problems:
        raise CheckpointError(f"text model {folder} into {into}", first_problems(problems, 8))
    return TowerCheckpoint(text, base, pairs)


_FIT = "give a fine-tune of this very language model, with its tokens"


def _require_module(network: PreTrainedModel, text: Checkpoint, into: str) -> None:
    modules = dict(network.named_modules())
    if into in modules and into:
        return
    body = _parameters(_body(skeleton(text.folder)))
    fits = [name for name, module in modules.items() if name and _parameters(module) == body]
    remedy = f"give {' or '.join(fits)}" if fits else "no module of θ0 has this text model's tensors: give another"
    raise CheckpointError("fusion.into", [Problem(into, f"is no module of {type(network).__name__}", remedy)])


def _parameters(module: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters(remove_duplicate=False)}


def _body(network: PreTrainedModel) -> Any:
    """A text model without its output layer."""
    return network.base_model


def _pairs(
    mine: Layout, theirs: Layout, base: Checkpoint, text: Checkpoint, into: str, problems: list[Problem]
) -> Iterator[tuple[str, str]]:
    """Tensors of θ0's files that are the text model's, each with the one there; what has none goes to `problems`."""
    names = _their_names(skeleton(base.folder), skeleton(text.folder), into)
    their_ties, lacking = tied_names(text.folder), []
    for name, info in base.tensors.items():
        holders = [holder for holder, _ in mine.places.get(name, ()) if holder in names]
        if not info.floating or not holders:
            continue
        parameter = names[holders[0]]
        there = theirs.tensor_of(their_ties.get(parameter, parameter))
        if mine.same(holders[0]) != name or there is None:
            lacking.append(name)
        else:
            yield name, there
    if lacking:
        what = f"has {len(lacking)} tensors that the text model lacks or stores otherwise ({_some(lacking)})"
        problems.append(Problem(into, what, _FIT))


def _their_names(network: PreTrainedModel, text: PreTrainedModel, into: str) -> dict[str, str]:
    """Parameters of θ0's class that are the text model's → their names there: of its body, and its output layer."""
    body = {id(module): name for name, module in text.named_modules()}[id(_body(text))]
    before = f"{body}." if body else ""
    own = [name for name in text.state_dict() if name.startswith(before)]
    names = {f"{into}.{name.removeprefix(before)}": name for name in own}
    heads = [_name_of(one, one.get_output_embeddings()) for one in (network, text)]
    if None not in heads:
        names[f"{heads[0]}.weight"] = f"{heads[1]}.weight"
    return names


def _name_of(network: PreTrainedModel, part: Any) -> str | None:
    return next((name for name, module in network.named_modules() if module is part), None)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
