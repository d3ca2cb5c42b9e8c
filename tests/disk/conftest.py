"""A merge of models that a test may change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.merges import config_file


@pytest.fixture
def merge(models: Path, tmp_path: Path) -> Path:
    """The file of a merge of its own copies of the models, which lie in `models` beside it."""
    shutil.copytree(models, tmp_path / "models", copy_function=shutil.copy2)
    return config_file(tmp_path, tmp_path / "models")
