"""Layers of models one after another (`fusion.slices`), each slice merged of its sources by a method of `merging`.

`inputs` opens the layers of each slice under the numbers that they get, and says what keeps models apart; `method` asks
a slice's own method for each of its tensors; `planning` is what a plan says before anything is read.

    >>> from cpift.merging.stacks import StackMerge
    >>> StackMerge.formula
    'each slice by its own'
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.merging.stacks.inputs import StackInputs as StackInputs
    from cpift.merging.stacks.inputs import stack_inputs as stack_inputs
    from cpift.merging.stacks.method import StackMerge as StackMerge
else:
    __getattr__, __dir__ = handed_out(__name__)
