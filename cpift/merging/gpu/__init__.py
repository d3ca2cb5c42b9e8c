"""What `on_device` needs of a GPU: slices on their way there, and whether it is faster.

`lanes` has models and masks whose slices are copied while others are computed. `choice` times the GPU and the
processors on the first elements of the work at hand, and takes the faster. `room` says what a merge holds.

    >>> from cpift.merging.gpu import SAMPLE
    >>> SAMPLE
    67108864
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.merging.gpu.choice import SAMPLE as SAMPLE
    from cpift.merging.gpu.choice import AutoMerging as AutoMerging
    from cpift.merging.gpu.lanes import DeviceCheckpoint as DeviceCheckpoint
else:
    __getattr__, __dir__ = handed_out(__name__)
