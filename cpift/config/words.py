"""The words of fields that code outside the config lists too: `cpift --help` reads them, so nothing is imported here.

Each is a key of a table, which `tests/test_tables.py` holds to it: `merging.registry.METHODS`,
`merging.conflicts.CONFLICTS`, `evaluation.metrics.METRICS`, `method.measures.SCOPES` and `MEASURES`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

MergeName = Literal[
    "cpift",
    "linear",
    "task_arithmetic",
    "slerp",
    "ties",
    "dare",
    "dare_ties",
    "nearswap",
    "model_stock",
    "karcher",
    "ram",
    "magmax",
    "consensus",
    "localize_stitch",
    "nuslerp",
    "multislerp",
    "breadcrumbs",
    "breadcrumbs_ties",
    "ram_plus",
    "passthrough",
    "della",
    "della_linear",
    "sce",
    "arcee_fusion",
    "pcb",
    "iso_c",
    "tsv_m",
    "fisher",
]
ConflictName = Literal["magnitude", "last", "mean", "agree"]
MetricName = Literal["loss", "choice", "number", "rouge", "judge"]
ScopeName = Literal["global", "tensor"]
MeasureName = Literal["update", "significance", "curvature"]


def listed(words: Any) -> str:
    """The words of a Literal as a sentence has them: `a, b or c`."""
    *first, last = map(str, get_args(words))
    return f"{', '.join(first)} or {last}" if first else last
