"""A fine-tune as a LoRA adapter: of every weight's change the closest product of a given rank.

For a weight's change Δ = θt - θ0 [outputs, inputs] the factors are B [outputs, r] and A [r, inputs] of
`adapters.low_rank.factors`; the adapter's scaling is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpift.checkpoints.adapters.low_rank import factors
from cpift.checkpoints.adapters.parts import AdapterParts, Parameter, beside_adapted
from cpift.checkpoints.checkpoint import Checkpoint, first_problems, require_same_layout
from cpift.checkpoints.finite import all_finite
from cpift.checkpoints.opening import open_models
from cpift.disk.files import read_json, write_json
from cpift.errors import CheckpointError, Problem

if TYPE_CHECKING:
    import torch

RECORD = "extraction.json"
OnModule = Callable[[int, int], None]


@dataclass(frozen=True)
class ModuleError:
    """What a module's factors keep of its change: `change` = ‖Δ‖ and `lost` = ‖Δ - B·A‖, Frobenius norms."""

    module: str
    shape: tuple[int, ...]
    change: float
    lost: float

    @classmethod
    def of(cls, module: str, change: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> ModuleError:
        """What left [rows, rank] · right [rank, columns] keeps of `change` [rows, columns], float32."""
        import torch

        residual = torch.addmm(change, left, right, alpha=-1)
        return cls(module, tuple(change.shape), _norm(change), _norm(residual))

    @property
    def relative(self) -> float:
        """lost ÷ change."""
        return self.lost / self.change


def read_extraction(folder: Path) -> Extraction:
    """What the record beside an adapter of ours says. Raises OSError where there is none."""
    raw = read_json(folder / RECORD)
    modules = (ModuleError(**(one | {"shape": tuple(one["shape"])})) for one in raw["modules"])
    return Extraction(raw["rank"], tuple(modules), tuple(raw["whole"]))


@dataclass(frozen=True)
class Extraction:
    """An adapter that was made. `modules` have factors; of `whole` the file holds the fine-tune's own values."""

    rank: int
    modules: tuple[ModuleError, ...]
    whole: tuple[str, ...]

    @property
    def relative(self) -> float:
        """‖all that was lost‖ ÷ ‖all changes that were approximated‖; 0 where nothing was."""
        lost, change = (math.hypot(*(getattr(module, name) for module in self.modules)) for name in ("lost", "change"))
        return lost / change if change else 0.0


def extract_lora(
    base: Path, tuned: Path, out: Path, rank: int, named: str | None = None, on_module: OnModule | None = None
) -> Extraction:
    """Write the change from `base` to `tuned` (model folders of one architecture) as a PEFT adapter into folder `out`.

    Linear layers and embeddings that changed get float32 factors of `rank`, or of the largest that any of them has if
    that is less; what else changed (norms, biases) is kept
    whole. `named`: how the adapter's config calls its base model, else by its path. Raises CheckpointError for models
    that do not fit each other, for values that are not finite and for changes that no adapter can hold.
    """
    pretrained, opened = open_models(base, {"tuned": tuned})
    model, problems = opened["tuned"], list[Problem]()
    require_same_layout(pretrained, opened)
    parts = AdapterParts(pretrained)
    places = list(_changed(parts, model, problems))
    if not places and not problems:
        problems.append(Problem(str(tuned), "has the same weights as its base", "give another model"))
    products = [place for place in places if parts.is_product(place)]
    copied = [place for place in places if place not in products]
    problems += beside_adapted(copied, products)
    if problems:
        raise CheckpointError(f"fine-tune {tuned}", first_problems(problems, 20))
    rank = min(rank, max((min(pretrained.tensors[place.tensor].shape) for place in products), default=rank))
    for place in copied:
        parts.add_whole(place, model.tensor(place.tensor))
    errors = []
    for number, place in enumerate(products):
        errors.append(_factorised(parts, model, place, rank))
        if on_module:
            on_module(number + 1, len(products))
    parts.write(out, named or str(base))
    extraction = Extraction(rank, tuple(errors), tuple(f"{spot.module}.{spot.leaf}" for spot in copied))
    write_json(out / RECORD, asdict(extraction) | {"relative": extraction.relative})
    return extraction


def _changed(parts: AdapterParts, tuned: Checkpoint, problems: list[Problem]) -> Iterator[Parameter]:
    """Every tensor that the fine-tune moved."""
    import torch

    for name, info in parts.base.tensors.items():
        one, other = parts.base.mapped(name), tuned.mapped(name)
        if not info.floating or torch.equal(one, other):
            continue
        if not (all_finite(one) and all_finite(other)):
            problems.append(Problem(name, "holds NaN or infinity", "give models without; `cpift merge` names them too"))
            continue
        place = parts.parameter(name)
        if isinstance(place, Problem):
            problems.append(place)
        else:
            yield place


def _factorised(parts: AdapterParts, tuned: Checkpoint, place: Parameter, rank: int) -> ModuleError:
    """Put a weight's factors into `parts`."""
    change = tuned.mapped(place.tensor).float() - parts.base.mapped(place.tensor).float()
    left, right = factors(change, rank)
    parts.add_factors(place, left, right)
    return ModuleError.of(place.module, change, left, right)


def _norm(values: torch.Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
