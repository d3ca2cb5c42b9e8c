from __future__ import annotations

import pickle

import pytest

from cpift.errors import CheckpointError, ConfigError, DataError, Problem


@pytest.mark.parametrize("kind", [CheckpointError, ConfigError, DataError])
def test_errors_travel_between_processes(kind: type[DataError]) -> None:
    error = kind("task x", [Problem("row 1", "is empty", "fill it"), Problem("row 2", "is long")])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.problems) == (str(error), error.problems)
    assert str(error) == "task x: 2 problems\n  - row 1: is empty → fill it\n  - row 2: is long"
