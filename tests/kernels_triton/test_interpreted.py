"""test_operations.py again, under Triton's interpreter: it must be chosen before the kernels are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


PARTS = {
    "quick": ["-m", "not slow", "-k", "not TestSelection"],
    "selection": ["-m", "not slow", "-k", "TestSelection"],
    "rest": ["-m", "slow"],
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_under_the_interpreter(part: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *part, str(HERE / "test_operations.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
