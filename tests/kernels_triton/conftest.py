"""Which cases are executed as compiled for which GPU."""

from __future__ import annotations

import pytest

OTHERS = ("sm_80", "sm_100")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """sm_90 has every case, the others those of its fast set: to compile takes seconds a version where no earlier run
    has left them, and `test_gates` compiles every kernel and dtype for all."""
    left_out = {item for item in items if _elsewhere(item) and len(list(item.iter_markers("slow"))) > 1}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _elsewhere(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    return item.path.stem == "test_operations" and call is not None and call.params.get("mode") in OTHERS
