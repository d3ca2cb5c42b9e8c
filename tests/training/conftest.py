"""The model that fits start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpift.config.inputs import ScratchModel
from cpift.config.run import ModelConfig
from cpift.models.sources import materialise


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    materialise(
        ModelConfig(scratch=ScratchModel(hidden_size=32, intermediate_size=48, heads=2), dtype="bfloat16"), folder
    )
    return folder
