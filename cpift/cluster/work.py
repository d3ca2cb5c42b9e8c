"""Ray: what the workers of a group do, which stay for a whole run: torch and transformers are imported once.

It is done as `pipeline/inprocess.py` does it, so a fine-tune ends with the same bits here, there and in a Ray Train run
of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray import cloudpickle

from cpift.cluster.desk import CLOSED
from cpift.cluster.session import NAMESPACE, leave_modules_alone, use_assigned_gpus
from cpift.cluster.work_queue import Outcome, WorkItem
from cpift.console.progress import OnProgress, ProgressMessage
from cpift.errors import CpiftError, explain_os_error
from cpift.pipeline.engine import Scoring, name_of
from cpift.pipeline.inprocess import fit_here, give_back_memory, score_here
from cpift.training.spec import FitSpec

_SCORING_FAILURES = 2  # workers that end under the evaluation of one model before it has failed


def item_of(work: FitSpec | Scoring) -> WorkItem:
    """For a desk, which does not look into it."""
    failures = work.resources.max_failures if isinstance(work, FitSpec) else _SCORING_FAILURES
    title = work.title if isinstance(work, FitSpec) else name_of(work)
    return WorkItem(title, cloudpickle.dumps(work), failures)


def serve(config: dict[str, Any]) -> None:
    """What each worker of a group runs: one piece of work after another until the desk `config["desk"]` closes."""
    use_assigned_gpus()
    import cpift.evaluation.scoring
    import cpift.training.fit  # noqa: F401  # both here: while the driver still prepares the first piece

    leave_modules_alone()
    desk = ray.get_actor(config["desk"], namespace=NAMESPACE)
    context = ray.get_runtime_context()
    worker = context.get_actor_id()
    assert worker is not None, "an actor serves"

    def taken() -> Any:
        return ray.get(desk.take.remote(worker, context.current_actor))

    while (content := taken()) != CLOSED:
        if content is not None:
            _do(cloudpickle.loads(content), desk, worker)


def _do(work: Any, desk: Any, worker: str) -> None:
    """A failure that would only come again is told at once. After any other this process is not to be trusted: it ends
    with the error, and what it did is done again elsewhere."""
    try:
        outcome = Outcome(_PERFORM[type(work)](work, desk.post.remote))
    except Exception as error:
        reason = str(error) if isinstance(error, CpiftError) else explain_os_error(error)
        if reason is None:
            ray.get(desk.lose.remote(worker, str(error).strip()))
            raise
        outcome = Outcome(failure=reason)
    give_back_memory()
    ray.get(desk.finish.remote(worker, outcome))


def _fit(spec: FitSpec, post: OnProgress) -> None:
    from cpift.training.tracking import ended_if_stuck, log_file

    with (
        log_file(spec.logs / "worker-0.log") as log,
        ended_if_stuck(spec.resources.hang_timeout, log) as alive,
    ):

        def on_progress(message: ProgressMessage) -> None:
            alive(message["step"] < message["steps"])  # what comes after a stage's last step has no known length
            post(message)

        fit_here(spec, on_progress)


_PERFORM: dict[type, Callable[[Any, OnProgress], Any]] = {FitSpec: _fit, Scoring: score_here}
