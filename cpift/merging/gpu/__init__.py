"""Which of regions and fusion a GPU takes, where `resources.device` leaves that open.

`choice` times the GPU and the processors on the first elements of the work at hand, and takes the faster.

    >>> from cpift.merging.gpu import SAMPLE
    >>> SAMPLE
    67108864
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.merging.gpu.choice import SAMPLE as SAMPLE
    from cpift.merging.gpu.choice import AutoMerging as AutoMerging
else:
    __getattr__, __dir__ = handed_out(__name__)
