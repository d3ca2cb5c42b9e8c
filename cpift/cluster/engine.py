"""Ray: the pipeline's engine, and evaluations as Ray tasks.

One group of workers takes a run's fine-tunes and evaluations (`group.py`); what it cannot serve is a Ray
Train run each (`fits.py`), or a task here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import ray

from cpift.cluster.choice import merging_for
from cpift.cluster.fits import cpus_for, free_room, parallel_fits, run_fits, wait_for_room
from cpift.cluster.group import FitGroup, WorkerKind, servable
from cpift.cluster.merging import RayMerging
from cpift.cluster.placement import demand, task_options
from cpift.cluster.session import (
    NAMESPACE,
    POLL_SECONDS,
    progress_board,
    raise_failures,
    ray_answers,
    ray_session,
    show_progress,
    started_here,
    use_assigned_gpus,
)
from cpift.cluster.work import item_of
from cpift.config.run import ResourcesConfig, RunConfig
from cpift.console.ending import stopping
from cpift.console.progress import OnProgress
from cpift.evaluation.scores import Evaluation, OnResult
from cpift.merging.engine import Merging
from cpift.pipeline.engine import Scoring, in_parts, name_of
from cpift.pipeline.inprocess import score_here
from cpift.training.spec import RESULT, FitSpec


def evaluate_models(scorings: Sequence[Scoring], on_result: OnResult, on_progress: OnProgress) -> None:
    """Score models in parallel Ray tasks; `on_result` gets each model's result as soon as it is there."""
    if not scorings:
        return
    with ray_session(scorings[0].resources), progress_board() as (board_name, board):

        def score(some: Sequence[Scoring]) -> dict[str, BaseException | None]:
            pending = {_remote(scoring).remote(scoring, board_name): scoring for scoring in some}
            failures: dict[str, BaseException | None] = {}
            while pending:
                ready, _ = ray.wait(list(pending), num_returns=1, timeout=POLL_SECONDS)
                show_progress(board, on_progress)
                for reference in ready:
                    scoring = pending.pop(reference)
                    try:
                        result = ray.get(reference)
                    except ray.exceptions.RayError as error:
                        failures[name_of(scoring)] = error
                    else:
                        if scoring.part is None:
                            on_result(scoring.title, result)
            return failures

        raise_failures(_whole_and_cut(scorings, free_room(scorings[0].resources), score))


def _whole_and_cut(
    scorings: Sequence[Scoring],
    workers: int,
    score: Callable[[Sequence[Scoring]], dict[str, BaseException | None]],
) -> dict[str, BaseException | None]:
    """Score with so many workers that are busy to the end; what failed, by title. What a part could not do is tried
    again with the whole."""
    first, cut = in_parts(scorings, workers)
    failures = score(first)
    titles = {scoring.title for scoring in first if scoring.part is None}
    return {title: why for title, why in failures.items() if title in titles} | (score(cut) if cut else {})


def _remote(scoring: Scoring) -> Any:
    return _evaluate_worker.options(
        **task_options(demand(scoring.resources)),
        max_retries=2,
        scheduling_strategy="DEFAULT",  # from within a sweep's trial too, whose own share of a CPU is too small
    )


@ray.remote
def _evaluate_worker(scoring: Scoring, board_name: str) -> Evaluation:
    use_assigned_gpus()
    board = ray.get_actor(board_name, namespace=NAMESPACE)
    return score_here(scoring, board.post.remote)


class RayEngine:
    """The pipeline's engine on Ray (see `pipeline.engine.Engine`)."""

    def __init__(self, config: RunConfig, stored: bool = True):
        """`stored`: see `merging.merging_of`."""
        self._resources, self._work = config.resources, config.output_dir / ".work"
        self.merging: Merging | None = merging_for(config.resources, stored=stored)
        self._session: ExitStack | None = None
        self._starting: threading.Event | None = None  # set when Ray and the group are there, or failed to start
        self._failed: BaseException | None = None  # to start
        self._over = threading.Event()  # set when the session has ended
        self._group: FitGroup | None = None
        self._ending: threading.Thread | None = None  # lets all of it end while the caller goes on

    @contextmanager
    def session(self) -> Iterator[None]:
        """Within it one Ray connection serves all stages; it is made when the first of them needs it."""
        self._over = threading.Event()
        try:
            with ExitStack() as self._session:
                try:
                    yield
                finally:
                    if not stopping():
                        self._started()
                        self._ended()
                    if ray_answers():
                        self._leave_group()
        finally:
            self._session = self._starting = self._failed = self._ending = None
            self._over.set()

    def expect(self, specs: Sequence[FitSpec]) -> None:
        """Ray of this machine and its workers start while the caller prepares their work; on a cluster they would hold
        what others could use."""
        kinds = {servable(spec.resources, spec.tracking) for spec in specs}
        if self._session is None or self._starting is not None or ray.is_initialized():
            return
        if self._resources.on_cluster or len(kinds) != 1:
            return
        (kind,) = kinds
        if kind is not None:
            self._starting = threading.Event()
            arguments = (kind, specs[0].resources, len(specs), self._starting, self._over)
            threading.Thread(target=self._start, args=arguments, daemon=True).start()

    def fit(self, specs: Sequence[FitSpec], on_progress: OnProgress) -> None:
        todo = [spec for spec in specs if not (spec.export / RESULT).is_file()]
        if not todo:
            return
        self._connect(on_progress)
        kinds = {servable(spec.resources, spec.tracking) for spec in todo}
        kind = kinds.pop() if len(kinds) == 1 else None
        if kind is None or self._session is None:  # outside of a session there is nothing that a group could outlive
            self._leave_group()
            run_fits(todo, self._resources, on_progress)
            return
        group = self._group_of(kind, todo, on_progress)
        failed = group.run([item_of(spec) for spec in todo], lambda title, _: None, on_progress)
        if self._merges_need(kind):
            group.dismiss()
        raise_failures(failed, f"Logs: {todo[0].logs.parent}")

    def evaluate(self, scorings: Sequence[Scoring], on_result: OnResult, on_progress: OnProgress) -> None:
        self._connect(on_progress)
        if (group := self._group) is None or not self._scores_well(group, scorings):
            self._leave_group()
            evaluate_models(scorings, on_result, on_progress)
            return
        whole = {scoring.title for scoring in scorings}

        def keep(title: str, result: Evaluation) -> None:
            if title in whole:  # of a part there is no result
                on_result(title, result)

        def score(some: Sequence[Scoring]) -> dict[str, BaseException | None]:
            return group.run([item_of(scoring) for scoring in some], keep, on_progress)

        failed = _whole_and_cut(scorings, group.size, score)
        if any(scoring.merge is not None for scoring in scorings):  # a comparison scores its other models next
            raise_failures(failed)
            return
        group.dismiss()
        if self._session is not None and started_here():
            self._ending = threading.Thread(target=self._end, args=(self._session,), daemon=True)
            self._ending.start()
        raise_failures(failed)

    def _merges_need(self, kind: WorkerKind) -> bool:
        """Whether regions and fusion, which come next, ask Ray for what workers of this kind hold: processors as tasks
        of a cluster, or this machine's GPUs."""
        return self._resources.on_cluster or (isinstance(self.merging, RayMerging) and "GPU" in dict(kind.worker))

    # ---- the group -------------------------------------------------------------------------------------------------

    def _group_of(self, kind: WorkerKind, specs: Sequence[FitSpec], on_progress: OnProgress) -> FitGroup:
        """A group for these: the one that there is, unless it has left or is too small."""
        resources = specs[0].resources
        size = min(parallel_fits(resources, specs[0].title), len(specs))
        group = self._group
        if group is not None and group.usable and group.kind == kind and group.size >= size:
            return group
        self._leave_group()
        size = min(wait_for_room(resources, specs[0].title, on_progress), size)
        self._group = FitGroup(kind, size, resources, self._work)
        return self._group

    @staticmethod
    def _scores_well(group: FitGroup, scorings: Sequence[Scoring]) -> bool:
        """Whether the group scores as many models at once as tasks of their own with a CPU for each thread would."""
        resources = scorings[0].resources
        kind = servable(resources, ())
        if not group.usable or kind is None or kind.worker != group.kind.worker:
            return False
        alone = {"cpus_per_worker": cpus_for(resources.threads, resources), "parallel": None}
        return group.size >= min(len(scorings), parallel_fits(resources.model_copy(update=alone), "an evaluation"))

    def _leave_group(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def _start(
        self, kind: WorkerKind, resources: ResourcesConfig, fits: int, there: threading.Event, over: threading.Event
    ) -> None:
        """Start all, and stay: the system ends Ray's processes with the thread that started them."""
        try:
            assert self._session is not None
            self._session.enter_context(ray_session(resources))
            size = min(parallel_fits(resources), fits)
            self._group = FitGroup(kind, size, resources, self._work)
        except BaseException as error:  # for the thread that waits for it
            self._failed = error
        there.set()
        over.wait()

    def _end(self, session: ExitStack) -> None:
        """The last stage that needs workers is over: a Ray of ours ends while the report is written."""
        self._leave_group()
        session.close()

    def _ended(self) -> None:
        if self._ending is not None:
            self._ending.join()
            self._ending = None

    def _started(self) -> None:
        if self._starting is not None:
            self._starting.wait()

    def _connect(self, on_progress: OnProgress) -> None:
        self._ended()
        if self._session is not None:
            if self._starting is not None or not ray.is_initialized():
                on_progress({"waiting": f"starting Ray{self._where}"})
            self._started()
            failed, self._starting, self._failed = self._failed, None, None
            if failed is not None:
                raise failed
            self._session.enter_context(ray_session(self._resources))
        on_progress({"waiting": "waiting for the first worker to start"})

    @property
    def _where(self) -> str:
        address = self._resources.cluster
        return " on this machine" if address is None else f": connecting to {address}"
