"""One file a way to merge: its formula, where it is from, what writes it, and its definition in fp64.

`cpift` (the paper's: cores transplanted, the rest by SLERP), and what has one factor a tensor for each model:
`linear`, `task_arithmetic`, `slerp`, `nuslerp`, `multislerp`, `model_stock`, `karcher`, `passthrough`; of the singular
vectors of whole matrices `iso_c` and `tsv_m`. Those that look at single elements are in `merging.updates`. What all
have in common is `merging.base`, what most have is `merging.forms`; by name they stand in `merging.registry.METHODS`.

    >>> from cpift.merging.methods import Linear, Slerp
    >>> Linear.seeded, Slerp.needs_base
    (False, False)
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.merging.methods.cpift import Fusion as Fusion
    from cpift.merging.methods.linear import Linear as Linear
    from cpift.merging.methods.slerp import Slerp as Slerp
    from cpift.merging.methods.task_arithmetic import TaskArithmetic as TaskArithmetic
else:
    __getattr__, __dir__ = handed_out(__name__)
