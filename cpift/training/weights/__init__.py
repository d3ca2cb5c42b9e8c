"""The weights of a fine-tune: read, kept beside it, written; of a model that is sharded every worker its own share.

`reading` (a checkpoint into a model), `copies` (their average, copies on disk while they are trained), `writing` (a
trained model as a checkpoint), `workers` (those that train together, and which rows each has), `units` (layers, and
what is gathered at a time), `held` (which elements a stage holds or pulls back).

    >>> from cpift.training.weights import rows_of
    >>> [rows_of(10, worker, 4) for worker in range(4)]
    [range(0, 3), range(3, 6), range(6, 9), range(9, 10)]
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.training.weights.copies import Average as Average
    from cpift.training.weights.copies import read_weights as read_weights
    from cpift.training.weights.copies import write_weights as write_weights
    from cpift.training.weights.reading import load_sharded as load_sharded
    from cpift.training.weights.reading import load_whole as load_whole
    from cpift.training.weights.workers import rows_of as rows_of
    from cpift.training.weights.writing import write_trained as write_trained
else:
    __getattr__, __dir__ = handed_out(__name__)
