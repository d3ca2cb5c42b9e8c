"""What a fine-tune leaves to be looked at while it runs and afterwards: a log a worker, and its curves."""

from __future__ import annotations

import faulthandler
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cpift.config.training import Tracker
from cpift.errors import Problem, entry
from cpift.text.redaction import RedactingFormatter, is_secret_variable

if TYPE_CHECKING:
    from transformers import TrainerCallback

_log = logging.getLogger(__name__)
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True)
class _Needs:
    """What a tracker needs: modules, what brings them, and how the variables that it reads begin."""

    modules: tuple[str, ...]
    package: str
    variables: str


_NEEDS = {
    "tensorboard": _Needs((), "tensorboardX", "TENSORBOARD_"),  # it comes with Ray Tune
    "mlflow": _Needs(("mlflow",), "mlflow", "MLFLOW_"),
    "wandb": _Needs(("wandb",), "wandb", "WANDB_"),
    "azure_ml": _Needs(("azureml",), "azureml-sdk", "AZUREML_"),
    "clearml": _Needs(("clearml",), "clearml", "CLEARML_"),
    "codecarbon": _Needs(("codecarbon",), "codecarbon", "CODECARBON_"),
    "comet_ml": _Needs(("comet_ml",), "comet-ml", "COMET_"),
    "dagshub": _Needs(("dagshub", "mlflow"), "dagshub mlflow", "DAGSHUB_"),
    "dvclive": _Needs(("dvclive",), "dvclive", "DVC"),
    "flyte": _Needs(("flytekit",), "flytekit", "FLYTE_"),
    "kubeflow": _Needs((), "", "KUBEFLOW_"),
    "neptune": _Needs(("neptune",), "neptune", "NEPTUNE_"),
    "swanlab": _Needs(("swanlab",), "swanlab", "SWANLAB_"),
    "trackio": _Needs(("trackio",), "trackio", "TRACKIO_"),
}
_KUBEFLOW = "KUBEFLOW_TRAINER_SERVER_URL"  # of a job of its trainer, which it reports to


def check_trackers(trackers: Sequence[Tracker]) -> list[Problem]:
    """Trackers that are asked for and not installed."""
    problems = []
    for name in trackers:
        needs = entry(_NEEDS, name, "tracking")
        if any(importlib.util.find_spec(module) is None for module in needs.modules):
            remedy = f"pip install {needs.package}, or leave it out"
            problems.append(Problem("tracking", f"{name!r} is not installed", remedy))
        if name == "kubeflow" and not os.environ.get(_KUBEFLOW):
            what = f"{name!r} reports to a trainer's job, and {_KUBEFLOW} is not set"
            problems.append(Problem("tracking", what, "start the run in one, or leave it out"))
    return problems


@contextmanager
def tracked(trackers: Sequence[Tracker], title: str, folder: Path) -> Iterator[list[TrainerCallback]]:
    """The callbacks that send the curves of one stage of a fine-tune to the trackers that are wanted.

    To TensorBoard in `folder`; to MLflow and W&B as a run named `title`, which ends with the block, so that the next
    one in this process is a run of its own. To all others as transformers' callback does. Their usual variables say
    where to (MLFLOW_TRACKING_URI, WANDB_PROJECT, ...); without them MLflow's is `folder`/mlflow.db, and W&B's local
    files are in `folder` too.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(entry(TRACKERS, name, "tracking")(title, folder)) for name in trackers]


def tracker_variables(trackers: Sequence[Tracker]) -> dict[str, str]:
    """What this process's environment says to the trackers, for workers on other machines.

    Without keys and passwords: Ray shows what it is given. Nodes have those in their own environment.
    """
    wanted = tuple(entry(_NEEDS, name, "tracking").variables for name in trackers if name != "tensorboard")
    meant = {name: value for name, value in os.environ.items() if wanted and name.startswith(wanted)}
    return {name: value for name, value in meant.items() if not is_secret_variable(name, value)}


@contextmanager
def _tensorboard(title: str, folder: Path) -> Iterator[TrainerCallback]:
    from transformers.integrations.integration_utils import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = str(folder)
    yield callback


@contextmanager
def _mlflow(title: str, folder: Path) -> Iterator[TrainerCallback]:
    import mlflow
    from transformers.integrations.integration_utils import MLflowCallback

    ours = not mlflow.is_tracking_uri_set()
    if ours:
        folder.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{folder.absolute()}/mlflow.db")
    try:
        yield MLflowCallback()
    finally:
        mlflow.flush_async_logging()
        if mlflow.active_run() is not None:  # the callback ends its run only where training comes to its end
            mlflow.end_run("FAILED")
        if ours:
            mlflow.set_tracking_uri(None)  # as it was: not set


@contextmanager
def _wandb(title: str, folder: Path) -> Iterator[TrainerCallback]:
    import wandb
    from transformers.integrations.integration_utils import WandbCallback

    folder.mkdir(parents=True, exist_ok=True)
    where = os.environ.get("WANDB_DIR", str(folder))  # read here: W&B itself reads it once in a process
    wandb.init(project=os.environ.get("WANDB_PROJECT", "cpift"), name=title, dir=where)
    try:
        yield WandbCallback()  # goes on with the run that there is
    except BaseException:
        wandb.finish(exit_code=1)
        raise
    wandb.finish()


def _by_transformers(name: str) -> Callable[[str, Path], AbstractContextManager[TrainerCallback]]:
    @contextmanager
    def started(title: str, folder: Path) -> Iterator[TrainerCallback]:
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        yield INTEGRATION_TO_CALLBACK[name]()

    return started


_OWN = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}
TRACKERS: dict[str, Callable[[str, Path], AbstractContextManager[TrainerCallback]]] = {
    name: _OWN.get(name, _by_transformers(name)) for name in _NEEDS
}


@contextmanager
def log_file(path: Path) -> Iterator[TextIO]:
    """Within it, what this process logs and warns of goes to `path` too, and the traceback of what ends it.

    Gives the open file.
    """
    from transformers.utils import logging as transformers_logging

    path.parent.mkdir(parents=True, exist_ok=True)
    stream = path.open("a", encoding="utf-8")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(RedactingFormatter(_FORMAT))
    root, own = logging.getLogger(), logging.getLogger("cpift")
    root.addHandler(handler)
    level = own.level
    own.setLevel(logging.INFO)
    logging.captureWarnings(True)
    transformers_logging.enable_propagation()
    try:
        yield stream
    except BaseException:
        _log.exception("ended by")
        raise
    finally:
        root.removeHandler(handler)
        own.setLevel(level)
        logging.captureWarnings(False)
        stream.close()


@contextmanager
def ended_if_stuck(seconds: float, log: TextIO) -> Iterator[Callable[[bool], None]]:
    """A hung process ends, so that what looks after it (Ray) can start another: a crash it sees, a standstill not.

    Gives a function to call while work goes on: `seconds` after a call with True that no other call follows, the
    tracebacks of all threads go to `log` and the process exits with code 1. A call with False stops the clock, for
    work of no known length. The clock is not Python's, so that it runs while a library holds the interpreter's lock.
    """

    def alive(counting: bool) -> None:
        if counting:
            faulthandler.dump_traceback_later(seconds, exit=True, file=log)
        else:
            faulthandler.cancel_dump_traceback_later()

    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()
