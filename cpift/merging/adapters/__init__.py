"""A merge as one PEFT adapter (`fusion.as_lora`): θ0 stays as it is, what the merge adds to it is the adapter.

`inputs` opens the models in float32 and says which tensors they change, `making` writes factors by concatenation or by
singular values, `checks` reads them back, `planning` is what a plan refuses by name.

    >>> from cpift.merging.adapters import concatenates
    >>> [concatenates(method) for method in ("linear", "task_arithmetic", "ties")]
    [True, True, False]
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.merging.adapters.inputs import widened_inputs as widened_inputs
    from cpift.merging.adapters.making import write_adapter as write_adapter
    from cpift.merging.adapters.planning import concatenates as concatenates
else:
    __getattr__, __dir__ = handed_out(__name__)
