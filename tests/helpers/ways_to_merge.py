"""Ways to merge as tests call for them: with how many tasks and which fields, and the masks that they ask for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.opening import MOMENTS
from cpift.config.run import FusionConfig
from cpift.merging.settings import Largest, write_trimmed
from cpift.method.moments import open_moments
from cpift.method.regions import Streaming

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "dare_ties": (3, {"density": 0.5, "weights": {"t1": 0.5}}),
    "nearswap": (1, {"t": 0.05}),
    "model_stock": (3, {}),
    "karcher": (3, {"weights": {"t1": 0.5}}),
    "ram": (3, {"threshold": 0.1}),
    "magmax": (3, {"scale": 0.7}),
    "consensus": (3, {"weights": {"t1": 0.5}}),
    "breadcrumbs": (3, {"density": 0.5, "gamma": 0.1, "weights": {"t1": 0.5}, "normalize": True}),
    "breadcrumbs_ties": (3, {"density": 0.5, "gamma": 0.1, "densities": {"t1": 0.95}, "trim": "global"}),
    "ram_plus": (3, {"threshold": 0.1, "rescale": 1.0, "rescale_limit": 5.0, "granularity": "model"}),
    "della": (3, {"density": 0.5, "window": 0.2, "weights": {"t1": 0.5}}),
    "della_linear": (3, {"density": 0.5, "window": 0.2, "weights": {"t1": 0.5}}),
    "sce": (3, {"density": 0.3, "scale": 0.7}),
    "arcee_fusion": (1, {}),
    "pcb": (3, {"density": 0.3, "scale": 0.7, "trim": "global"}),
    "iso_c": (3, {"scale": 0.7}),
    "tsv_m": (3, {"scale": 0.7}),
    "nuslerp": (2, {"weights": {"t1": 0.5}, "space": "delta"}),
    "fisher": (3, {"weights": {"t1": 0.5}, "scale": 0.7}),
    "multislerp": (3, {"weights": {"t1": 0.5}, "space": "delta"}),
}


def masks_of(config: FusionConfig, folder: Path, wanted: Largest) -> list[Path]:
    folders = [folder / str(number) for number in range(len(wanted.shares))]
    for one in folders:
        one.mkdir(parents=True)
    write_trimmed(wanted, config, folders, Streaming())
    return folders


def write_moments(folder: Path, base: Checkpoint, seed: int) -> Path:
    """Second moments of a fine-tune of `base`, bf16, in its folder: squares over many magnitudes, a tenth of them 0."""
    draws = torch.Generator().manual_seed(seed)
    values = {}
    for name, info in base.tensors.items():
        if info.floating:
            size = 10.0 ** -torch.randint(4, 20, info.shape, generator=draws)
            moved = torch.rand(info.shape, generator=draws) > 0.1
            values[name] = (torch.randn(info.shape, generator=draws) ** 2 * size * moved).bfloat16()
    folder.mkdir(exist_ok=True)
    save_file(values, folder / MOMENTS)
    return folder / MOMENTS


def moments_for(base: Checkpoint, tasks: Iterable[str], folder: Path) -> dict[str, Checkpoint]:
    """Second moments of each task, in folders below `folder`."""
    files = {task: write_moments(folder / f"moments-{task}", base, seed) for seed, task in enumerate(tasks)}
    return open_moments(files, base)
