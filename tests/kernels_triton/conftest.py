"""Which cases are executed as compiled for which GPU."""

from __future__ import annotations

import pytest

OTHERS = ("sm_80", "sm_100")
# Several launches of several versions, where another test of the same kernels has fewer.
LONG = ("TestSelection::test_random", "TestGram::test_tensor", "TestGram::test_rows", "TestGram::test_more_vectors")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """sm_90 has every case, the others those of its fast set that are not LONG: to compile takes seconds a version
    where no earlier run has left them, and `test_gates` compiles and runs every kernel for all."""
    left_out = {item for item in items if _elsewhere(item) and (_long(item) or _slow_by_itself(item))}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _elsewhere(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    return item.path.stem == "test_operations" and call is not None and call.params.get("mode") in OTHERS


def _slow_by_itself(item: pytest.Item) -> bool:
    """Not for its mode alone."""
    return len(list(item.iter_markers("slow"))) > 1


def _long(item: pytest.Item) -> bool:
    return any(name in item.nodeid for name in LONG)
