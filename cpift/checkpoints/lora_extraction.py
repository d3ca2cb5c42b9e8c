"""A fine-tune as a LoRA adapter: of every weight's change the closest product of a given rank.

For a weight's change Δ = θt - θ0 [outputs, inputs] = U·S·Vᵀ the closest matrix of rank r is the one of its r largest
singular values (Eckart and Young, 1936). The factors are B = U·√S [outputs, r] and A = √S·Vᵀ [r, inputs], so that both
are of one size, and the adapter's scaling is 1. Large matrices are decomposed by random projection with power
iterations (Halko, Martinsson and Tropp, 2011), as `torch.svd_lowrank` does it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.checkpoints.checkpoint import Checkpoint, first_problems, require_same_layout
from cpift.checkpoints.finite import all_finite
from cpift.checkpoints.layout import checkpoint_layout
from cpift.checkpoints.lora_config import ADAPTER_CONFIG
from cpift.checkpoints.lora_files import ADAPTER_PREFIX, ADAPTER_WEIGHTS
from cpift.checkpoints.opening import open_models
from cpift.disk.files import write_json
from cpift.errors import CheckpointError, Problem
from cpift.pretrained.architecture import skeleton, stored_transposed, tied_names

if TYPE_CHECKING:
    import torch

RECORD = "extraction.json"
_WHOLE_UP_TO = 1024  # rows or columns of a matrix that is decomposed exactly
_MORE, _ROUNDS = 16, 6  # of the random projection: columns beside the rank, and power iterations
_SEED = 0
OnModule = Callable[[int, int], None]


@dataclass(frozen=True)
class ModuleError:
    """What a module's factors keep of its change: `change` = ‖Δ‖ and `lost` = ‖Δ - B·A‖, Frobenius norms."""

    module: str
    shape: tuple[int, ...]
    change: float
    lost: float

    @property
    def relative(self) -> float:
        """lost ÷ change."""
        return self.lost / self.change


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


@dataclass(frozen=True)
class _Place:
    """A tensor that changed: the parameters that it is (several where they are tied), by module and leaf."""

    tensor: str
    module: str
    leaf: str  # weight, bias
    tied: tuple[str, ...]  # modules whose weight is this one too


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
    places = list(_changed(pretrained, model, problems))
    if not places and not problems:
        problems.append(Problem(str(tuned), "has the same weights as its base", "give another model"))
    products = [spot for spot in places if spot.leaf == "weight" and stored_transposed(base, spot.module) is not None]
    adapted = {module for spot in products for module in (spot.module, *spot.tied)}
    copied = [spot for spot in places if spot not in products]
    problems += _beside_adapted(copied, adapted)
    if problems:
        raise CheckpointError(f"fine-tune {tuned}", first_problems(problems, 20))
    rank = min(rank, max((min(pretrained.tensors[spot.tensor].shape) for spot in products), default=rank))
    tensors = {_key_of(spot, adapted): model.tensor(spot.tensor) for spot in copied}
    errors = []
    for number, place in enumerate(products):
        errors.append(_factorised(pretrained, model, place, rank, tensors))
        if on_module:
            on_module(number + 1, len(products))
    _write(out, tensors, _settings(base, named, rank, adapted, copied))
    extraction = Extraction(rank, tuple(errors), tuple(f"{spot.module}.{spot.leaf}" for spot in copied))
    write_json(out / RECORD, asdict(extraction) | {"relative": extraction.relative})
    return extraction


def _changed(base: Checkpoint, tuned: Checkpoint, problems: list[Problem]) -> Iterator[_Place]:
    """Every tensor that the fine-tune moved."""
    import torch

    layout, ties = checkpoint_layout(base), {} if base.is_apart else tied_names(base.folder)
    for name, info in base.tensors.items():
        one, other = base.mapped(name), tuned.mapped(name)
        if not info.floating or torch.equal(one, other):
            continue
        if not (all_finite(one) and all_finite(other)):
            problems.append(Problem(name, "holds NaN or infinity", "give models without; `cpift merge` names them too"))
            continue
        parameter = next(
            (candidate for candidate, _ in layout.places.get(name, ()) if layout.same(candidate) == name), None
        )
        if parameter is None:
            what = "changed, and is no parameter of its own in its class, as experts that are stacked"
            remedy = "keep it as a full fine-tune: PEFT adapts whole parameters"
            problems.append(Problem(name, what, remedy))
            continue
        module, _, leaf = parameter.rpartition(".")
        yield _Place(name, module, leaf, tuple(tied.rpartition(".")[0] for tied, of in ties.items() if of == parameter))


def _beside_adapted(copied: list[_Place], adapted: set[str]) -> Iterator[Problem]:
    """Parameters that PEFT can keep only together with modules in them that have factors."""
    for place in copied:
        if place.module not in adapted and any(module.startswith(f"{place.module}.") for module in adapted):
            what = "changed, and lies in a module with adapted ones, which PEFT cannot keep whole beside them"
            yield Problem(place.tensor, what, "keep it as a full fine-tune")


def _factorised(
    base: Checkpoint, tuned: Checkpoint, place: _Place, rank: int, tensors: dict[str, torch.Tensor]
) -> ModuleError:
    """Put a weight's factors into `tensors`, for each of the modules that hold it."""
    import torch

    stored = tuned.mapped(place.tensor).float() - base.mapped(place.tensor).float()
    left, right = factors(stored, rank)
    residual = torch.addmm(stored, left, right, alpha=-1)
    for module in (place.module, *place.tied):
        transposed = stored_transposed(base.folder, module)
        a, b = (left.T, right.T) if transposed else (right, left)
        key = f"{ADAPTER_PREFIX}{module}.lora_"
        if _is_embedding(base.folder, module):
            adapter = {f"{key}embedding_A": a, f"{key}embedding_B": b}
        else:
            adapter = {f"{key}A.weight": a, f"{key}B.weight": b}
        tensors.update({name: value.contiguous().clone() for name, value in adapter.items()})
    return ModuleError(place.module, tuple(stored.shape), _norm(stored), _norm(residual))


def factors(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left [rows, rank] and right [rank, columns], whose product is the closest to `change` [rows, columns], float32.

    Columns beyond a matrix's own rank are zero. The same for the same matrix on the same machine.
    """
    import torch

    rows, columns = change.shape
    most = min(rows, columns)
    if most <= max(_WHOLE_UP_TO, 2 * (rank + _MORE)):
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        v = v.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            u, s, v = torch.svd_lowrank(change, rank + _MORE, niter=_ROUNDS)
    components, root = min(rank, most), s[: min(rank, most)].sqrt()
    left, right = torch.zeros(rows, rank), torch.zeros(rank, columns)
    left[:, :components] = u[:, :components] * root
    right[:components] = root[:, None] * v[:, :components].T
    return left, right


def _key_of(place: _Place, adapted: set[str]) -> str:
    """Where PEFT has a norm's or a bias's own values: of a module with factors a level deeper."""
    deeper = ".base_layer" if place.module in adapted else ""
    return f"{ADAPTER_PREFIX}{place.module}{deeper}.{place.leaf}"


def _settings(base: Path, named: str | None, rank: int, adapted: set[str], copied: list[_Place]) -> dict[str, Any]:
    """PEFT's configuration of the adapter."""
    alone = sorted({place.module for place in copied} - adapted)
    linear = [module for module in adapted if not _is_embedding(base, module)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": named or str(base),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(adapted),
        "modules_to_save": alone or None,
        "bias": "all" if any(place.module in adapted for place in copied) else "none",
        "fan_in_fan_out": any(stored_transposed(base, module) for module in linear),
        "inference_mode": True,
    }


def _write(out: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_json(out / ADAPTER_CONFIG, settings)
    shutil.copymode(out / ADAPTER_CONFIG, out / ADAPTER_WEIGHTS)  # the library's is for the owner alone


def _is_embedding(folder: Path, module: str) -> bool:
    import torch

    return isinstance(skeleton(folder).get_submodule(module), torch.nn.Embedding)


def _norm(values: torch.Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
