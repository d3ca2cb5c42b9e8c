"""One model's scores, and what they say.

`scoring` (a model on the tasks' test rows), `scores` (what comes of it), `metrics` (the table of them), `text`,
`likelihood`, `generation`, `judge`, `rows` and `checks` (which rows can be scored), `standard` and `task_files`
(lm-eval); `retention` (what a model keeps of each task's own fine-tune), `estimates` and `measures` (figures with
intervals), `verdict` (a run in one sentence).

    >>> from cpift.evaluation import METRICS, rouge_l, same_final_number
    >>> list(METRICS)
    ['loss', 'choice', 'number', 'rouge', 'judge']
    >>> same_final_number("so 3 + 4 is 7.0", "7"), rouge_l("the red house", "the house")
    (True, 0.8)
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.evaluation.estimates import Estimate as Estimate
    from cpift.evaluation.estimates import estimate as estimate
    from cpift.evaluation.metrics import METRICS as METRICS
    from cpift.evaluation.metrics import Metric as Metric
    from cpift.evaluation.metrics import metric_of as metric_of
    from cpift.evaluation.retention import condensed as condensed
    from cpift.evaluation.retention import judged as judged
    from cpift.evaluation.retention import learning_of as learning_of
    from cpift.evaluation.scoring import TaskScore as TaskScore
    from cpift.evaluation.scoring import evaluate_model as evaluate_model
    from cpift.evaluation.text import rouge_l as rouge_l
    from cpift.evaluation.text import same_final_number as same_final_number
    from cpift.evaluation.verdict import verdict_sentence as verdict_sentence
else:
    __getattr__, __dir__ = handed_out(__name__)
