"""CPI-FT's fusion of all tensors that lie on a device in one buffer a model: at one pass, not tensor by tensor.

Owners of contested elements, unions of the cores, their sizes and the Gram matrices take a launch each for all tensors
of a group (`resident.flat`), and the host waits once, for sizes and matrices of all of them. The fused tensors take one
more launch, and leave in slices as a merge asks for them. The bits are those of the tensors alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

from cpift_kernels import (
    Lane,
    Placement,
    flat_apply,
    flat_gram,
    flat_overlaps,
    resolve_conflicts,
    slerp_coefficients,
    union_mask,
)

from cpift.checkpoints.slices import SLICE
from cpift.checkpoints.towers.tower import outside
from cpift.checkpoints.writing import TensorRecord
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import Destination, Merged, MergeMethod
from cpift.merging.gpu.lanes import within_memory
from cpift.merging.methods.cpift import Fusion
from cpift.merging.on_device import OnDevice
from cpift.merging.resident.flat import Group, groups_of

if TYPE_CHECKING:
    import torch
    from cpift_kernels import Ready

# Conflict rules that kernels settle for a whole buffer; `agree` holds updates in float32, which whole models have no
# room for.
POLICIES: Mapping[str, Literal["magnitude", "last", "mean"]] = {
    "magnitude": "magnitude",
    "last": "last",
    "mean": "mean",
}


def groups_to_fuse(method: MergeMethod, infos: Sequence[TensorInfo]) -> list[Group]:
    """Those of these tensors that can be fused at one pass, together; none of a method, or a setting, that is computed
    tensor by tensor: rows have angles of their own, and are many."""
    if type(method) is not Fusion or method.vector.row or method.config.conflict not in POLICIES:
        return []
    fused = [info for info in infos if info.numel and not outside(method.tuned.values(), info.name)]
    return groups_of(method.models, fused)


@dataclass(frozen=True)
class _Cores:
    """Packed masks of a group on the device. donated: what the backbone keeps, and what each task gives; union: of all
    cores."""

    donated: list[torch.Tensor | None]
    union: torch.Tensor


class FusedWhole(OnDevice):
    """A fusion as `merge_shards` asks for it: everything is computed when the first tensor of `groups` is asked for.

    at: where models and masks lie in the groups' buffers.
    """

    def __init__(self, method: Fusion, place: Callable[[], Placement], at: Destination, groups: Sequence[Group]):
        super().__init__(method, place, at)
        self._fusion = cast(Fusion, self._placed)
        self._groups, self._lane, self._lock = groups, Lane(place()), threading.Lock()
        self._infos = method.rest[1].tensors
        self._names = {name for group in groups for name in group.names}
        self._made: dict[str, tuple[TensorRecord, torch.Tensor]] = {}

    def tensor(self, info: TensorInfo) -> Merged:
        if info.name not in self._names or info.dtype != self._infos[info.name].dtype:
            return super().tensor(info)
        with self._lock, within_memory(), self._lane.place.computing():
            if not self._made:
                self._compute()
        record, values = self._made[info.name]

        def fill(start: int, stop: int, out: torch.Tensor) -> Ready:
            return self._lane.fetch(values[start:stop], out)

        return record, fill

    def load(self) -> None:
        """Have models and masks on the device. Raises GpuMemoryError where they have no room there."""
        for group in self._groups:
            for model in self._fusion.models:
                group.model(model)
            for task in (*self._fusion.inputs.protected, *self._fusion.tuned):
                group.mask(self._fusion.masks, task)

    def _compute(self) -> None:
        known = self._fusion.statistics if self._fusion.statistics is not None else {}
        cores = [self._fusion.reuse(("whole", group), partial(self._cores, group)) for group in self._groups]
        asked = [one for one in zip(self._groups, cores, strict=True) if not known.keys() >= set(one[0].names)]
        if asked:
            self._learn(asked, known)
        records, scales = self._folded(known)
        for group, one in zip(self._groups, cores, strict=True):
            fused = self._fused(group, one, scales)
            for number, name in enumerate(group.names):
                self._made[name] = records[name], group.layout.tensor(fused, number)

    # ---- cores -------------------------------------------------------------------------------------------------------

    def _cores(self, group: Group) -> _Cores:
        """As `Fusion._donors`."""
        fusion, inputs = self._fusion, self._fusion.inputs
        protected = [group.mask(fusion.masks, task) for task in inputs.protected]
        kept = union_mask(protected) if protected else None
        tasks = list(inputs.priority) if fusion.config.conflict == "last" else list(fusion.tuned)
        claimed = [group.mask(fusion.masks, task) for task in tasks]
        if kept is not None:
            claimed = [words & ~kept for words in claimed]
        origin, tuned = group.model(fusion.pretrained), [group.model(fusion.tuned[task]) for task in tasks]
        owners = dict(
            zip(tasks, resolve_conflicts(POLICIES[fusion.config.conflict], origin, tuned, claimed), strict=True)
        )
        union = union_mask([*claimed, *([] if kept is None else [kept])])
        return _Cores([kept, *(owners[task] for task in fusion.tuned)], union)

    # ---- angles ------------------------------------------------------------------------------------------------------

    def _learn(self, asked: Sequence[tuple[Group, _Cores]], known: dict[str, Any]) -> None:
        """Gram matrices [1, M, M] and sizes of cores by tensor, with one wait."""
        grams = [flat_gram(*self._vectors(one), cores.union, one.layout, elements=SLICE) for one, cores in asked]
        sizes = [flat_overlaps([cores.union], one.layout) for one, cores in asked]
        found = self._lane.bring([one.view(-1) for one in (*grams, *sizes)])
        for number, (group, _) in enumerate(asked):
            of_runs = found[number].view(grams[number].shape)
            tensor, counts = group.layout.runs(SLICE)[0], found[len(asked) + number].tolist()
            for place, name in enumerate(group.names):
                first, *others = of_runs[tensor == place].split(1)
                known[name] = sum(others, first), counts[place]

    def _vectors(self, group: Group) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As `Fusion.sources`: the first one, and the others."""
        fusion = self._fusion
        first = [fusion.pretrained] if fusion.from_origin else []
        reference, *vectors = [group.model(one) for one in (*first, fusion.inputs.backbone, *fusion.tuned.values())]
        return reference, vectors

    def _folded(self, known: Mapping[str, Any]) -> tuple[dict[str, TensorRecord], dict[str, torch.Tensor]]:
        """By tensor what `Fusion.merged` says of it, and its coefficients [M]."""
        import torch

        fusion, names = self._fusion, [info.name for info in self._infos.values() if info.name in self._names]
        records: dict[str, TensorRecord] = {
            name: {"tensor": name, "numel": self._infos[name].numel, "core": known[name][1]} for name in names
        }
        if fusion.of_model is not None:
            return records, dict.fromkeys(names, fusion.of_model[0][0])
        try:
            grams = torch.cat([known[name][0] for name in names])
            result = slerp_coefficients(grams, fusion.factors, fusion.config.epsilon, space=fusion.config.space)
        except ValueError:
            for name in names:
                fusion.slerp(known[name][0], name)  # says which model is not finite
            raise
        folds = zip(names, result.angles.tolist(), result.lerp.double().tolist(), strict=True)
        for name, angles, lerp in folds:
            records[name] |= {"angles": angles, "lerp": lerp}
        return records, dict(zip(names, result.coefficients, strict=True))

    def _fused(self, group: Group, cores: _Cores, scales: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[total] on the device."""
        import torch

        reference, vectors = self._vectors(group)
        rows = torch.stack([scales[name] for name in group.names]).to(torch.float32)
        sources, dtype = [reference, *vectors], self._infos[group.names[0]].dtype
        out = self._lane.place.room(group.layout.total * dtype.itemsize, "compute").view(dtype)
        masks = [*[None] * (len(sources) - len(cores.donated)), *cores.donated]
        flat_apply(out, sources, self._lane.load(rows.view(-1)).view(rows.shape), masks, group.layout)
        return out
