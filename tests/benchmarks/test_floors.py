"""The tables of kernels/GPU.md are those that their command makes."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gpu.card import Sizes
from benchmarks.gpu.floors import floors, tables, with_tables

PAGE = Path(__file__).parents[2] / "kernels" / "GPU.md"


def test_the_page_has_what_follows_from_the_kernels_and_the_rows() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page, tables()) == page, "run python -m benchmarks.gpu.floors --into kernels/GPU.md"


def test_what_a_card_took_stands_beside_what_it_should(tmp_path: Path) -> None:
    """The newest row of an operation, and how many elements it was where a smaller card was asked."""
    environment = {"device": {"gpu": {"name": "H100"}}}
    rows = [
        {"step": "kernels", "operation": "copy", "gb_per_second": 1.0},
        {"step": "kernels", "operation": "fused_apply", "elements": Sizes().timed, "seconds": 0.5},
        {"step": "kernels", "operation": "fused_apply", "elements": Sizes().timed, "seconds": 0.25},
        {"step": "kernels", "operation": "overlap_counts", "elements": 1024, "seconds": 0.125},
        {"step": "calls", "operation": "masked_gram", "elements": 7, "seconds": 9.0},
    ]
    lines = [json.dumps(row | {"environment": environment}) for row in rows]
    (tmp_path / "gpu.jsonl").write_text("\n".join(lines))
    found = {line.split(" | ")[0]: line.split(" | ")[-2:] for line in floors(tmp_path) if line.startswith("| ")}
    assert found["| fused_apply"] == ["250.00", "H100 |"]
    assert found["| overlap_counts"] == ["125.00, of 1024 elements", "H100 |"]
    assert found["| masked_gram"] == ["", " |"]
