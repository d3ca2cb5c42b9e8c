"""One file a way to merge: its formula, where it is from, what writes it, and its definition in fp64.

`cpift` (the paper's: cores transplanted, the rest by SLERP), `linear`, `task_arithmetic`, `slerp`, `ties`, `dare`,
`dare_ties`, `nearswap`, `model_stock`, `karcher`, `nuslerp`, `multislerp`, `ram`, `magmax`, `consensus` and
`localize_stitch`. What all have in common is `merging.base`, what most have is
`merging.forms`; by name they stand in `merging.registry.METHODS`.

    >>> from cpift.merging.methods import Dare, Linear
    >>> Dare.seeded, Linear.seeded  # whether the run's seed decides the result
    (True, False)
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.merging.methods.cpift import Fusion as Fusion
    from cpift.merging.methods.dare import Dare as Dare
    from cpift.merging.methods.linear import Linear as Linear
    from cpift.merging.methods.slerp import Slerp as Slerp
    from cpift.merging.methods.task_arithmetic import TaskArithmetic as TaskArithmetic
    from cpift.merging.methods.ties import Ties as Ties
else:
    __getattr__, __dir__ = handed_out(__name__)
