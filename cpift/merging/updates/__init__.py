"""Ways to merge that look at updates θi − θ0 element by element; a file each, with what `merging.methods` says of one.

`dare`, `dare_ties`, `della`, `della_linear`, `nearswap`, `ram`, `ram_plus`, `magmax`, `consensus` and `fisher`;
`measured` is for those that need numbers of a whole tensor. What takes selected elements only is in `merging.selected`.

    >>> from cpift.merging.updates import Dare, Ram
    >>> Dare.seeded, Ram.seeded
    (True, False)
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.merging.updates.dare import Dare as Dare
    from cpift.merging.updates.ram import Ram as Ram
else:
    __getattr__, __dir__ = handed_out(__name__)
