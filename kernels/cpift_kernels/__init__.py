"""The element-wise work of CPI-FT: core selection, packed masks, overlap, masked Gram, fused merge, freezing.

Every operation has a plain-torch reference and chooses its backend by
`backend="auto"|"triton"|"cpu"|"reference"`. Importing this package imports none of torch, Triton and numba:
they are imported when an operation first needs them.
"""

from .apply import fused_apply
from .dispatch import Backend, resolve
from .elect import elect_signs
from .faults import lost_pages, watch_pages
from .flat import Flat, FlatLayout, flat_apply, flat_gram, flat_overlaps
from .freeze import gather_masked, mask_starts, scatter_masked_, zero_masked_
from .gram import masked_gram
from .held import HeldElements, hold_masked
from .low_rank import add_low_rank
from .magnitudes import Magnitudes, delta_magnitudes
from .masks import count_mask, pack_mask, union_mask, unpack_mask
from .overlap import overlap_counts, overlap_counts_per_tensor, resolve_conflicts
from .placement import SLOT, SLOTS, Lane, Placement, Ready, Staged, lane_bytes, placement_of
from .selection import CoreMask, select_cores
from .slerp import SlerpResult, slerp_coefficients
from .streaming import Core, Mark, Marked, Masks, Models, Range, Selection, SelectionShard, select_over, stream_cores

__all__ = [
    "SLOT",
    "SLOTS",
    "Backend",
    "Core",
    "CoreMask",
    "Flat",
    "FlatLayout",
    "HeldElements",
    "Lane",
    "Magnitudes",
    "Mark",
    "Marked",
    "Masks",
    "Models",
    "Placement",
    "Range",
    "Ready",
    "Selection",
    "SelectionShard",
    "SlerpResult",
    "Staged",
    "add_low_rank",
    "count_mask",
    "delta_magnitudes",
    "elect_signs",
    "flat_apply",
    "flat_gram",
    "flat_overlaps",
    "fused_apply",
    "gather_masked",
    "hold_masked",
    "lane_bytes",
    "lost_pages",
    "mask_starts",
    "masked_gram",
    "overlap_counts",
    "overlap_counts_per_tensor",
    "pack_mask",
    "placement_of",
    "resolve",
    "resolve_conflicts",
    "scatter_masked_",
    "select_cores",
    "select_over",
    "slerp_coefficients",
    "stream_cores",
    "union_mask",
    "unpack_mask",
    "watch_pages",
    "zero_masked_",
]
