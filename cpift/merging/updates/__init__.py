"""Ways to merge that look at updates θi − θ0 element by element; a file each, with what `merging.methods` says of one.

`ties`, `dare`, `dare_ties`, `breadcrumbs`, `breadcrumbs_ties`, `nearswap`, `ram`, `ram_plus`, `magmax`, `consensus` and
`localize_stitch`.

    >>> from cpift.merging.updates import Dare, Ties
    >>> Dare.seeded, Ties.seeded
    (True, False)
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.merging.updates.dare import Dare as Dare
    from cpift.merging.updates.ties import Ties as Ties
else:
    __getattr__, __dir__ = handed_out(__name__)
