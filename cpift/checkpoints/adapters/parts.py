"""An adapter that is being made: what goes into its file under PEFT's names, and the configuration that says so."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.layout import checkpoint_layout
from cpift.checkpoints.lora_config import ADAPTER_CONFIG
from cpift.checkpoints.lora_files import ADAPTER_PREFIX, ADAPTER_WEIGHTS
from cpift.disk.files import write_json
from cpift.errors import CheckpointError, Problem
from cpift.pretrained.architecture import skeleton, stored_transposed, tied_names

if TYPE_CHECKING:
    import torch

_KEEP = "keep it as a full fine-tune"


@dataclass(frozen=True)
class Parameter:
    """A tensor of θ0 as the parameters that it is (several where they are tied), by module and leaf."""

    tensor: str
    module: str
    leaf: str  # weight, bias
    tied: tuple[str, ...]  # modules whose weight is this one too

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.module, *self.tied)


class AdapterParts:
    """Factors and whole parameters over θ0 `base`; `write` makes the folder of them."""

    def __init__(self, base: Checkpoint):
        self.base = base
        self._layout = checkpoint_layout(base)
        self._ties = {} if base.is_apart else tied_names(base.folder)
        self._tensors: dict[str, torch.Tensor] = {}
        self._ranks: dict[str, int] = {}
        self._whole: list[tuple[Parameter, torch.Tensor]] = []

    @property
    def rank(self) -> int:
        """The largest of all factors; 0 where there are none."""
        return max(self._ranks.values(), default=0)

    def parameter(self, name: str) -> Parameter | Problem:
        """What a tensor of θ0's files is in its class, or why no adapter can hold a change to it."""
        places = self._layout.places.get(name, ())
        parameter = next((one for one, _ in places if self._layout.same(one) == name), None)
        if parameter is None:
            what = "changed, and is no parameter of its own in its class, as experts that are stacked"
            return Problem(name, what, f"{_KEEP}: PEFT adapts whole parameters")
        module, _, leaf = parameter.rpartition(".")
        tied = (other.rpartition(".")[0] for other, of in self._ties.items() if of == parameter)
        return Parameter(name, module, leaf, tuple(tied))

    def is_product(self, place: Parameter) -> bool:
        """Whether it is the weight of a linear layer or an embedding, which may have factors."""
        return place.leaf == "weight" and stored_transposed(self.base.folder, place.module) is not None

    def add_factors(self, place: Parameter, left: torch.Tensor, right: torch.Tensor) -> None:
        """A change left [rows, rank] · right [rank, columns] of a weight as it is stored, of each of its modules."""
        for module in place.modules:
            a, b = (left.T, right.T) if stored_transposed(self.base.folder, module) else (right, left)
            key = f"{ADAPTER_PREFIX}{module}.lora_"
            if _is_embedding(self.base.folder, module):
                adapter = {f"{key}embedding_A": a, f"{key}embedding_B": b}
            else:
                adapter = {f"{key}A.weight": a, f"{key}B.weight": b}
            self._tensors |= {name: value.contiguous().clone() for name, value in adapter.items()}
            self._ranks[module] = left.shape[1]

    def add_whole(self, place: Parameter, values: torch.Tensor) -> None:
        """The new values of a parameter, of its shape."""
        self._whole.append((place, values))

    def write(self, out: Path, named: str | None) -> None:
        """The two files of an adapter; named: how its configuration calls θ0. Raises CheckpointError where nothing has
        factors, for PEFT reads no such adapter."""
        from safetensors.torch import save_file

        if not self._ranks:
            what = "no weight of a linear layer or embedding changes, and norms or biases alone are no LoRA adapter"
            raise CheckpointError("adapter", [Problem("target_modules", what, _KEEP)])
        kept = {
            _key_of(module, place.leaf, self._ranks): values if number == 0 else values.clone()
            for place, values in self._whole
            for number, module in enumerate(place.modules)
        }
        kept = dict(self._beside()) | kept
        save_file(self._tensors | kept, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_json(out / ADAPTER_CONFIG, self._settings(named))
        shutil.copymode(out / ADAPTER_CONFIG, out / ADAPTER_WEIGHTS)  # the library's is for the owner alone

    @property
    def _alone(self) -> list[str]:
        """Modules that PEFT keeps whole, `modules_to_save`; biases alone are kept as biases."""
        whole = {module for place, _ in self._whole if place.leaf != "bias" for module in place.modules}
        return sorted(whole - self._ranks.keys())

    def _beside(self) -> Iterator[tuple[str, torch.Tensor]]:
        """θ0's own parameters of modules that are kept whole, which PEFT asks for too."""
        for module in self._alone:
            for leaf in skeleton(self.base.folder).get_submodule(module).state_dict():
                values = self._layout.parameter(f"{module}.{leaf}", self.base.tensor)
                yield f"{ADAPTER_PREFIX}{module}.{leaf}", values.clone()

    def _settings(self, named: str | None) -> dict[str, Any]:
        """PEFT's configuration. The scaling of every module is 1: its lora_alpha is its rank."""
        adapted = sorted(self._ranks)
        rank = Counter(self._ranks.values()).most_common(1)[0][0] if adapted else 1
        others = {module: self._ranks[module] for module in adapted if self._ranks[module] != rank}
        linear = [module for module in adapted if not _is_embedding(self.base.folder, module)]
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": named,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "target_modules": adapted,
            "modules_to_save": self._alone or None,
            "bias": "all" if any(place.module not in self._alone for place, _ in self._whole) else "none",
            "fan_in_fan_out": any(stored_transposed(self.base.folder, module) for module in linear),
            "inference_mode": True,
            **({"rank_pattern": others, "alpha_pattern": others} if others else {}),
        }


def beside_adapted(whole: Sequence[Parameter], products: Sequence[Parameter]) -> Iterator[Problem]:
    """Parameters that PEFT can keep whole only together with modules in them that have factors."""
    adapted = {module for place in products for module in place.modules}
    for place in whole:
        if place.module not in adapted and any(module.startswith(f"{place.module}.") for module in adapted):
            what = "changed, and lies in a module with adapted ones, which PEFT cannot keep whole beside them"
            yield Problem(place.tensor, what, _KEEP)


def _key_of(module: str, leaf: str, adapted: dict[str, int]) -> str:
    """Where PEFT has a parameter's own values: of a module with factors a level deeper."""
    deeper = ".base_layer" if module in adapted else ""
    return f"{ADAPTER_PREFIX}{module}{deeper}.{leaf}"


def _is_embedding(folder: Path, module: str) -> bool:
    import torch

    return isinstance(skeleton(folder).get_submodule(module), torch.nn.Embedding)
