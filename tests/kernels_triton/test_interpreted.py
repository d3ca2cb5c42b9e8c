"""test_operations.py and test_flat.py again, under Triton's interpreter.

It must be chosen before the kernels are imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


PARTS = {
    "quick": ["-m", "not slow", "-k", "not TestSelection", "test_operations.py"],
    "selection": ["-m", "not slow", "-k", "TestSelection", "test_operations.py"],
    "rest": ["-m", "slow", "test_operations.py"],
    "flat": ["-m", "not slow", "test_flat.py"],
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_under_the_interpreter(part: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *part[:-1], str(HERE / part[-1])],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
