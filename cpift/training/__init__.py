"""One fine-tune, inside one worker: a sequence of stages, each a transformers.Trainer on the model of the last.

`spec` (a fine-tune, described), `fit` (done), `speed` (how fast), `rows` (what a stage goes over), `adapters` (LoRA),
`fsdp` (over several workers), `weights` (read, averaged, kept, written), `steps` (arguments and learning rate),
`compiling`, `optimizers`, `watching` (held-out loss, the best weights), `memory` (what a worker holds), `spacing`
(checkpoints by the clock), `tracking` (logs and curves).

    >>> from cpift.training import stages_of
    >>> for stage in stages_of([["sums"], ["poems", "code"]], "earlier"):
    ...     stage.tasks, stage.frozen
    (('sums',), ())
    (('poems', 'code'), ('sums',))
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.training.adapters import check_lora as check_lora
    from cpift.training.fit import FitHooks as FitHooks
    from cpift.training.rows import stage_data as stage_data
    from cpift.training.spec import FitSpec as FitSpec
    from cpift.training.spec import StageSpec as StageSpec
    from cpift.training.spec import read_training as read_training
    from cpift.training.spec import stages_of as stages_of
    from cpift.training.tracking import check_trackers as check_trackers
else:
    __getattr__, __dir__ = handed_out(__name__)
