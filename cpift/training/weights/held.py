"""Which elements a stage of a fine-tune holds or pulls back, as masks of the model's parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.layout import Layout
from cpift.errors import StageError, entry
from cpift.method.freezing import ElementAnchor
from cpift.method.held import HELD
from cpift.method.masks import JointCores
from cpift.method.moments import Moments
from cpift.training.spec import FitSpec

if TYPE_CHECKING:
    import torch


def held_masks(spec: FitSpec, index: int, layout: Layout, model: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """The packed masks of what a stage holds, by the checkpoint's names; empty where nothing is held.

    Raises StageError for cores of no regions.
    """
    tasks = spec.stages[index].frozen
    if tasks and spec.regions is None:
        raise StageError(f"{spec.title}: a stage freezes cores but no regions are given")
    if not tasks and spec.holds == "cores":
        return {}
    cores = JointCores(spec.regions, tasks) if tasks and spec.regions else {}
    sizes = {name: math.prod(layout.sizes[name]) for name in layout.trained(model)} if spec.holds != "cores" else {}
    return entry(HELD, spec.holds, "holds")(cores, sizes, f"{spec.seed}/{index}")


def anchored(spec: FitSpec, layout: Layout, model: torch.nn.Module, masks: Mapping[str, torch.Tensor]) -> ElementAnchor:
    """What pulls the masked elements back to the model that the whole fine-tune begins with.

    Raises CheckpointError for second moments of another model.
    """
    origin = Checkpoint(spec.model)
    moments = Moments(spec.moments, origin) if spec.moments is not None else None

    def first(name: str) -> torch.Tensor:
        return layout.parameter(name, origin.tensor)

    def weight(name: str) -> torch.Tensor:
        assert moments is not None
        return layout.parameter(name, moments.tensor)

    return ElementAnchor(model, masks, spec.penalty or 0.0, first, weight if moments is not None else None)
