"""The Python of this tree, parsed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in ("cpift", "ray_jobs", "benchmarks", "configs", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))
