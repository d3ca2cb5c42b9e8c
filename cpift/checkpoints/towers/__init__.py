"""Text-only fine-tunes of the language model inside a larger one (`fusion.into`).

`tower` reads one under the larger model's names; all else is the larger model's.

    >>> from cpift.checkpoints.towers import TowerCheckpoint
    >>> TowerCheckpoint.__mro__[1].__name__
    'Checkpoint'
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.checkpoints.towers.tower import TowerCheckpoint as TowerCheckpoint
    from cpift.checkpoints.towers.tower import open_tower as open_tower
else:
    __getattr__, __dir__ = handed_out(__name__)
