"""Ways to merge that mergekit has too, beside its own results: those kept here, and its own run where it is installed.

`mergekit.json` has what mergekit 0.1.5 gives of `models()`; with its environment in CPIFT_MERGEKIT (a folder, as
`benchmarks/merging/mergekit_environment.py` makes it) it is asked again, and
`python -m tests.merging.test_beside_mergekit` writes the file anew and prints the table of docs/merging.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import cpift

KEPT = Path(__file__).with_name("mergekit.json")
ENVIRONMENT = os.environ.get("CPIFT_MERGEKIT")
SIZE = 60


@dataclass(frozen=True)
class Case:
    """One merge in both: mergekit's parameters, ours, and by how many units in the last place (of the largest value
    that goes into an element) they may differ."""

    theirs: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    weights: Sequence[float] = (1.0, 1.0, 1.0)
    base: bool = True
    ulps: float = 2.0


CASES = {
    "linear": Case("linear", weights=(0.5, 1.0, 0.25), base=False),
    "task_arithmetic": Case("task_arithmetic", {"lambda": 0.7}, {"scale": 0.7}, (0.5, 1.0, 0.25)),
    "ties": Case("ties", {"density": 0.3}, {"density": 0.3, "normalize": True}, (0.5, 1.0, 0.25)),
    "karcher": Case("karcher", {"max_iter": 100, "tol": 1e-9}, base=False, ulps=4),
    "model_stock": Case("model_stock", ulps=4),
    "nearswap": Case("nearswap", {"t": 0.05}, {"t": 0.05}, (1.0,)),
    "nuslerp": Case("nuslerp", {}, {"space": "delta"}, (0.3, 0.7), ulps=4),
    "nuslerp of weights": Case("nuslerp", weights=(0.3, 0.7), base=False, ulps=4),
    "multislerp": Case("multislerp", {}, {"space": "delta"}, (0.5, 1.0, 0.25), ulps=4),
    "multislerp of weights": Case("multislerp", weights=(0.5, 1.0, 0.25), base=False, ulps=4),
    "ram": Case("ram", {"epsilon": 0.05}, {"threshold": 0.05}),
    "ram_plus": Case(
        "ramplus_tl",
        {"epsilon": 0.05, "r": 0.5, "alpha": 2.0},
        {"threshold": 0.05, "rescale": 0.5, "rescale_limit": 2.0},
    ),
    "sce": Case("sce", {"select_topk": 0.34}, {"density": 0.34}),
    "sce of all": Case("sce", ours={"density": 1.0}),
    "arcee_fusion": Case("arcee_fusion", weights=(1.0,)),
    "breadcrumbs": Case(
        "breadcrumbs", {"density": 0.385, "gamma": 0.1}, {"density": 0.385, "gamma": 0.1}, (0.5, 1.0, 0.25)
    ),
    "breadcrumbs_ties": Case(
        "breadcrumbs_ties",
        {"density": 0.385, "gamma": 0.1, "lambda": 0.7},
        {"density": 0.385, "gamma": 0.1, "scale": 0.7, "normalize": False},
        (0.5, 1.0, 0.25),
    ),
}


def models(number: int) -> list[torch.Tensor]:
    """θ0 and fine-tunes, [SIZE] in fp32, by a formula that every machine computes alike."""
    places = torch.arange(SIZE, dtype=torch.float64)
    base = ((places * 37) % 61 - 30) / 16
    alike = ((places * 7) % 29 - 14) / 128  # so that no two updates point apart
    moved = [alike + (((places * (11 + 6 * task) + 5 * task) % 53) - 26) / 256 for task in range(number)]
    return [base.float(), *((base + update).float() for update in moved)]


def ours(case: Case, name: str) -> torch.Tensor:
    base, *tuned = models(len(case.weights))
    named = {f"t{task}": {"w": values} for task, values in enumerate(tuned)}
    fields: dict[str, Any] = {"weights": dict(zip(named, case.weights, strict=True)), **case.ours}
    if len(set(case.weights)) == 1:
        del fields["weights"]
    return cpift.merge_state_dicts({"w": base}, named, method=name.split()[0], **fields)["w"]


def theirs(case: Case, folder: Path) -> torch.Tensor:
    """What mergekit gives."""
    base, *tuned = models(len(case.weights))
    paths = [folder / f"{number}.safetensors" for number in range(1 + len(tuned))]
    for path, values in zip(paths, (base, *tuned), strict=True):
        save_file({"w": values}, path)
    entries = [
        {"model": str(path), "parameters": {"weight": weight}}
        for path, weight in zip(paths[1:], case.weights, strict=True)
    ]
    file = {"merge_method": case.theirs, "models": entries, "parameters": dict(case.parameters), "dtype": "float32"}
    (folder / "merge.yml").write_text(yaml.safe_dump(file | ({"base_model": str(paths[0])} if case.base else {})))
    command = [f"{ENVIRONMENT}/bin/mergekit-pytorch", folder / "merge.yml", folder / "out", "--quiet"]
    subprocess.run(command, check=True, capture_output=True, env={"PATH": os.environ["PATH"], "HOME": str(folder)})
    return load_file(folder / "out" / "model.safetensors")["w"]


def apart(case: Case, name: str, other: torch.Tensor) -> float:
    """The largest difference, in units in the last place of the largest value that goes into an element."""
    sizes = torch.stack(models(len(case.weights))).abs().max(0).values.double()
    unit = 2.0 ** (sizes.clamp(min=2.0**-20).log2().floor() - 23)
    return float(((ours(case, name).double() - other.double()).abs() / unit).max())


@pytest.mark.parametrize("name", CASES)
def test_merges_are_those_that_mergekit_gave(name: str) -> None:
    kept = torch.tensor(json.loads(KEPT.read_text(encoding="utf-8"))[name])
    assert apart(CASES[name], name, kept) <= CASES[name].ulps


@pytest.mark.skipif(ENVIRONMENT is None, reason="CPIFT_MERGEKIT names no environment of mergekit")
@pytest.mark.parametrize("name", CASES)
def test_merges_are_those_that_mergekit_gives(name: str, tmp_path: Path) -> None:
    assert apart(CASES[name], name, theirs(CASES[name], tmp_path)) <= CASES[name].ulps


def main() -> None:
    kept = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            kept[name] = theirs(case, Path(folder)).tolist()
        print(f"| `{name}` | {apart(case, name, torch.tensor(kept[name])):.2g} |", flush=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in kept.items())
    KEPT.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
