"""Ways to merge as tests call for them: with how many tasks and which fields, and the masks that they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpift.config.run import FusionConfig
from cpift.merging.settings import Largest, write_trimmed
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
    "multislerp": (3, {"weights": {"t1": 0.5}, "space": "delta"}),
}


def masks_of(config: FusionConfig, folder: Path, wanted: Largest) -> list[Path]:
    folders = [folder / str(number) for number in range(len(wanted.shares))]
    for one in folders:
        one.mkdir(parents=True)
    write_trimmed(wanted, config, folders, Streaming())
    return folders
