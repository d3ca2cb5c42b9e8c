"""The page about the kernels has a row for each, and rows are replaced, not typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from cpift_kernels.triton import catalog
from cpift_kernels.triton.offline import TARGETS

from benchmarks.kernels.compile_report import HEADER, replaced

PAGE = Path(__file__).parents[2] / "kernels" / "GPU.md"


def test_every_kernel_has_one_row() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").split("\n") if line.startswith("| ")]
    found = [(row[0].removeprefix("| "), *row[1:3]) for row in rows if len(row) == len(HEADER) and row[2] in TARGETS]
    dtypes = {name: ["any"] if name in catalog.ANY_DTYPE else [*catalog.DTYPES] for name in catalog.KERNELS}
    wanted = [(name, dtype, target) for name in dtypes for dtype in dtypes[name] for target in TARGETS]
    assert sorted(found) == sorted(wanted)


def test_a_row_takes_the_place_of_the_one_about_the_same() -> None:
    page = "text\n| mark | bf16 | sm_80 | 1 |\n| mark | bf16 | sm_90 | 1 |\n"
    made = replaced(page, [("mark", "bf16", "sm_90", "2")])
    assert made == "text\n| mark | bf16 | sm_80 | 1 |\n| mark | bf16 | sm_90 | 2 |\n"
    with pytest.raises(ValueError, match="the page has 0 rows about mark fp32 sm_90"):
        replaced(page, [("mark", "fp32", "sm_90", "2")])
