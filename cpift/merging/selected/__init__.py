"""Ways to merge that take some elements of each update, found by a pass of their own; a file each.

The largest updates (`trimmed`): `ties`, `breadcrumbs`, `breadcrumbs_ties`, `localize_stitch`. The largest of other
numbers: `sce` and `pcb`, by `scores` that are read as a model; `arcee_fusion`, by a threshold.

    >>> from cpift.merging.selected import Sce, Ties
    >>> Ties.reads, Sce.reads
    (1, 2)
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.merging.selected.sce import Sce as Sce
    from cpift.merging.selected.ties import Ties as Ties
else:
    __getattr__, __dir__ = handed_out(__name__)
