"""The factors of a merged adapter.

By concatenation: where a merge is θ0 + Σ c_i·(θi − θ0) and θi − θ0 = B_i·A_i, its update is [c_1·B_1 … c_N·B_N] ·
[A_1; …; A_N]: ranks add up, scalings and coefficients are in B, nothing is lost but rounding in float32.
By singular values: the closest product of a rank to the merged model less θ0 in float32; of such sums of adapters by
their factors alone. What was trained whole is merged and kept whole, in θ0's dtype.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpift.checkpoints.adapters.low_rank import factors, shortened
from cpift.checkpoints.adapters.parts import AdapterParts, Parameter
from cpift.checkpoints.checkpoint import first_problems
from cpift.checkpoints.lora_extraction import RECORD, Extraction, ModuleError
from cpift.checkpoints.slices import sweep
from cpift.checkpoints.writing import TensorRecord
from cpift.disk.files import write_json
from cpift.disk.guarded import guarded_reads
from cpift.errors import CheckpointError, Problem
from cpift.merging.adapters.checks import verify_adapter
from cpift.merging.adapters.inputs import Changed, adapters_of, changed_in, changed_names, room_problems, stored
from cpift.merging.adapters.planning import Asked, concatenates
from cpift.merging.base import MergeMethod
from cpift.merging.checks import Check, OnElements
from cpift.merging.forms import WeightedMerge
from cpift.merging.registry import METHODS

if TYPE_CHECKING:
    import torch

_SUBJECT = "adapter of a merge"
_NEARLY = 1e-9  # of 1, by rounding in fp64


@dataclass(frozen=True)
class MadeAdapter:
    """What happened, tensor by tensor, and what was compared with the definition of the merge afterwards."""

    records: list[TensorRecord]
    checks: list[Check]


def write_adapter(method: MergeMethod, out: Path, asked: Asked, progress: OnElements) -> MadeAdapter:
    """Write what `method`, whose models are read in float32, adds to θ0 into folder `out`, and a record of what is
    lost. Raises CheckpointError for changes that no adapter can hold and for what does not fit."""
    records = method.prepare()
    parts = AdapterParts(method.pretrained)
    changed = _changed(method, parts, asked)
    errors: dict[str, ModuleError] = {}
    for number, place in enumerate(changed.products):
        with guarded_reads(place.tensor):
            error = _add_product(method, parts, place, asked, asked.work / f"{number}.safetensors")
        errors |= {place.tensor: error} if error is not None else {}
        progress(parts.base.tensors[place.tensor].numel, place.tensor)
    for place in changed.whole:
        values = _merged(method, place.tensor, records).reshape(parts.base.tensors[place.tensor].shape)
        parts.add_whole(place, values.to(stored(parts.base).tensors[place.tensor].dtype))
        progress(values.numel(), place.tensor)
    for model in method.models:
        model.require_unchanged()
    if not errors and not changed.whole:
        what, remedy = (
            "merged they are θ0 itself: there is nothing to keep in an adapter",
            "give other models or weights",
        )
        raise CheckpointError(_SUBJECT, [Problem("models", what, remedy)])
    parts.write(out, asked.named)
    whole = tuple(f"{place.module}.{place.leaf}" for place in changed.whole)
    extraction = Extraction(parts.rank, tuple(errors.values()), whole)
    write_json(out / RECORD, asdict(extraction) | {"relative": extraction.relative})
    return MadeAdapter(records, verify_adapter(method, out, errors) if asked.verify else [])


def _changed(method: MergeMethod, parts: AdapterParts, asked: Asked) -> Changed:
    """What changes, all of which fits. Raises CheckpointError."""
    models, problems = dict(method.tuned), list[Problem]()
    every = method.config.method not in METHODS or method.rest[1] is not method.pretrained
    names = changed_names(parts.base, models, every)
    changed = changed_in(parts, names, models, asked.rank, problems)
    by_factors = concatenates(method.config.method) and adapters_of(models) is not None
    problems += room_problems(changed, parts.base, asked.budget, by_factors)
    if problems:
        raise CheckpointError(_SUBJECT, first_problems(problems, 20))
    return changed


def _add_product(
    method: MergeMethod, parts: AdapterParts, place: Parameter, asked: Asked, kept: Path
) -> ModuleError | None:
    """Add a weight's factors; None where the merge leaves it as it is."""
    joined = _joined(method, place.tensor)
    shape = parts.base.tensors[place.tensor].shape
    if asked.rank is None:
        assert joined is not None  # `changed_in` refuses whole fine-tunes
        left, right, (change, lost) = *joined, (_norm_of_product(*joined), 0.0)
    elif joined is not None:
        left, right, (change, lost) = shortened(*joined, min(asked.rank, joined[0].shape[1], *shape))
    else:
        left, right, (change, lost) = _kept(
            kept, lambda: _decomposed(method, place.tensor, min(asked.rank or 1, *shape))
        )
    if not (left.isfinite().all() and right.isfinite().all()):
        problem = Problem(place.tensor, "is NaN or infinite in the merge", "give finite models, or smaller weights")
        raise CheckpointError(_SUBJECT, [problem])
    if change == 0.0:
        return None
    parts.add_factors(place, left, right)
    return ModuleError(place.module, tuple(shape), change, lost)


def _joined(method: MergeMethod, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The factors of Σ c_i·B_i·A_i; None where the merge is no such sum."""
    import torch

    models = adapters_of(method.tuned)
    if models is None or not isinstance(method, WeightedMerge) or not method.combines_updates:
        return None
    at = method.at(name)
    coefficients, _ = at.coefficients(at.pretrained.tensors[name])
    if abs(sum(coefficients) - 1.0) > _NEARLY * max(map(abs, coefficients)):
        what = f"has coefficients that sum to {sum(coefficients):g}: θ0 itself is scaled, which no adapter of it holds"
        raise CheckpointError(_SUBJECT, [Problem(name, what, "give weights that sum to 1, or normalize")])
    of_tasks = coefficients[-len(models) :]  # θ0's comes first where it has one
    pairs = [
        (factor, model.factors(name)) for factor, model in zip(of_tasks, models.values(), strict=True)
        if name in model.adapted and factor != 0.0
    ]  # fmt: skip
    if not pairs:
        rows, columns = at.pretrained.tensors[name].shape
        return torch.zeros(rows, 1), torch.zeros(1, columns)
    return torch.cat([factor * left for factor, (left, _) in pairs], 1), torch.cat(
        [right for _, (_, right) in pairs], 0
    )


def _norm_of_product(left: torch.Tensor, right: torch.Tensor) -> float:
    """‖left·right‖ (Frobenius): √ trace(leftᵀ·left · right·rightᵀ), in fp64."""
    one, other = left.double(), right.double()
    return float(((one.T @ one) * (other @ other.T)).sum().clamp(min=0).sqrt())


def _merged(method: MergeMethod, name: str, records: list[TensorRecord] | None = None) -> torch.Tensor:
    """A merged tensor, float32 [numel]."""
    import torch

    info = method.pretrained.tensors[name]
    record, fill = method.tensor(info)
    if record is not None and records is not None:
        records.append(record)
    out = torch.empty(info.numel)
    for start, stop in sweep(method.at(name).models, info, method.pieces(info)):
        fill(start, stop, out[start:stop])
    return out


_Made = tuple["torch.Tensor", "torch.Tensor", tuple[float, float]]


def _decomposed(method: MergeMethod, name: str, rank: int) -> _Made:
    """Factors of the merged tensor less θ0, and the norms of this change and of what is lost."""
    info = method.pretrained.tensors[name]
    change = _merged(method, name).sub_(method.pretrained.slice(name, 0, info.numel)).reshape(info.shape)
    if not change.isfinite().all():
        return change, change, (0.0, 0.0)  # the caller says so
    left, right = factors(change, rank)
    error = ModuleError.of(name, change, left, right)
    return left, right, (error.change, error.lost)


def _kept(file: Path, make: Callable[[], _Made]) -> _Made:
    """What was made before an interruption, else made and kept."""
    import torch
    from safetensors.torch import load_file, save_file

    if not file.is_file():
        left, right, norms = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        norms_kept = torch.tensor(norms, dtype=torch.float64)
        save_file({"left": left.contiguous(), "right": right.contiguous().clone(), "norms": norms_kept}, partial)
        os.replace(partial, file)
    kept = load_file(file)
    change, lost = kept["norms"].tolist()
    return kept["left"], kept["right"], (change, lost)
