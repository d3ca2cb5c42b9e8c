"""What an adapter's folder is made of, for those who write one.

`parts` (keys and configuration as PEFT has them), `low_rank` (factors of a matrix, or of the product of others),
`widened` (models whose values are read in float32, so that updates are not rounded to a model's dtype).

    >>> import torch
    >>> from cpift.checkpoints.adapters import factors
    >>> left, right = factors(torch.ones(3, 4), 1)
    >>> tuple(left.shape), tuple(right.shape), bool(torch.allclose(left @ right, torch.ones(3, 4)))
    ((3, 1), (1, 4), True)
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.checkpoints.adapters.low_rank import factors as factors
    from cpift.checkpoints.adapters.low_rank import shortened as shortened
    from cpift.checkpoints.adapters.parts import AdapterParts as AdapterParts
    from cpift.checkpoints.adapters.widened import in_float32 as in_float32
else:
    __getattr__, __dir__ = handed_out(__name__)
