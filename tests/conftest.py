"""Shared by all tests: models to merge, and a stop to anything that would reach for a network."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.helpers.checkpoints import Models

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One mode for a whole process: Ray takes it once, and a test must not depend on which tests came before it.
os.environ["RAY_AUTH_MODE"] = "disabled"
# Compiled kernels are shared with the user's runs; nothing else of the user's cache is read or written.
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()))
_CACHE = tempfile.TemporaryDirectory(prefix="cpift-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
# What takes minutes comes first, so that of two workers (`make test`) none ends long before the other.
LONGEST = ("test_operations", "test_end_to_end", "test_sweep_tune", "test_gates", "test_compare", "test_interpreted")
gc.set_threshold(50_000)  # as `cpift.cli` has it: imports make objects that live to the end


def _settle() -> None:
    """Leave what is there to the end of the process. accelerate collects garbage before each stage of a fine-tune, and
    looking through all that was imported took half of a small one's time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    _settle()


@pytest.hookimpl(trylast=True)  # after the file's own fixtures have ended
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and nextitem.path != item.path:
        _settle()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # libraries look for leaks at the end


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts that a test has cpift keep are its own: others replace what they follow from."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, `base`, and two fine-tunes of it, `one` and `two` (in two shards)."""
    from tests.helpers.merges import make_models

    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def sharded_models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """θ0 of four tensors and three fine-tunes, one in another dtype."""
    from tests.helpers.checkpoints import make_sharded

    return make_sharded(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def smoke_config() -> Path:
    return Path(__file__).parents[1] / "configs" / "smoke.yaml"
