"""The stages of a run, one file each: what names its output, its version, its work, and what a plan and the screen say.

A stage imports the ones before it, and `order` has them all. `names` is what outputs are named with, `step` a line of a
plan; `fits` is common to the three stages that train, `inputs` to the two that read every model. `handover` is fuse and
evaluate in one, for a fused model that nobody reads again.

    >>> from cpift.pipeline.stages import ORDER
    >>> list(ORDER)
    ['model', 'probe', 'regions', 'group', 'backbone', 'fuse', 'integrate']
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.pipeline.stages.names import Known as Known
    from cpift.pipeline.stages.names import ModelRef as ModelRef
    from cpift.pipeline.stages.names import Names as Names
    from cpift.pipeline.stages.order import ORDER as ORDER
    from cpift.pipeline.stages.order import Stage as Stage
    from cpift.pipeline.stages.step import Step as Step
    from cpift.pipeline.stages.step import step_of as step_of
else:
    __getattr__, __dir__ = handed_out(__name__)
