"""The model that fits start from, and core regions of its probes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.inputs import ScratchModel
from cpift.config.run import ModelConfig, RegionsConfig
from cpift.method.regions import save_regions, select_regions
from cpift.models.sources import materialise
from cpift.training.fit import fit
from cpift.training.spec import StageSpec
from tests.helpers.fits import TASKS, spec


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    materialise(
        ModelConfig(scratch=ScratchModel(hidden_size=32, intermediate_size=48, heads=2), dtype="bfloat16"), folder
    )
    return folder


@pytest.fixture(scope="module")
def regions(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    probes, out = {}, tmp_path_factory.mktemp("probes")
    for one in TASKS:
        fit(spec(base, out / one.name, StageSpec((one.name,))))
        probes[one.name] = Checkpoint(out / one.name / "export")
    folder = out / "regions"
    folder.mkdir()
    save_regions(select_regions(Checkpoint(base), probes, RegionsConfig(p=0.2)), folder)
    return folder
