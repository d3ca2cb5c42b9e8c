"""The study: does CPI-FT pay? One command runs it, one writes docs/results.md from its records, one checks the two.

    python -m benchmarks.study.study run tiny                        # a small model from scratch, ten seeds
    python -m benchmarks.study.study run smollm2 --data FOLDER       # SmolLM2-135M on five tasks (see smollm2.yaml)
    python -m benchmarks.study.study run smollm2 --data FOLDER --hours 2 --seeds 0     # a piece of it
    python -m benchmarks.study.study run smollm2 --data FOLDER --hours 2 --seeds 1     # another machine, another day
    python -m benchmarks.study.study run once_loss --data OUT/test   # a part of the fair trial (protocol.md)
    python -m benchmarks.study.study admit dev_loss                  # which of its tasks count, before any test seed
    python -m benchmarks.study.study write                           # docs/results.md, its plots, README's claims
    python -m benchmarks.study.study check                           # the document follows from the records
    python -m benchmarks.study.study check --artifacts tiny          # and the record from the models' scores

`run` keeps everything as artifacts under runs/study-NAME: killed or out of hours, the same command goes on. Its record
goes to benchmarks/results/study/NAME.jsonl, every method's score on every test row, from which all else follows. Pieces
add up there: a method that the record has with a seed is not made again, also where its models are long gone.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from benchmarks.study import admission, fair_trial
from benchmarks.study.fair_trial import TRIALS
from cpift.compare.config import Comparison, load_comparison
from cpift.compare.files import document
from cpift.compare.findings import FULL, Findings
from cpift.compare.methods import methods_of, together
from cpift.compare.record import OURS, PROBES, Record, finished, joined, read_record, write_record
from cpift.compare.work import ComparisonWork
from cpift.config.loading import load_config, read_yaml
from cpift.config.run import ResourcesConfig
from cpift.console.progress import OnProgress
from cpift.console.view import View, quiet
from cpift.disk.artifacts import Artifact
from cpift.disk.files import write_text
from cpift.errors import CpiftError
from cpift.evaluation.scores import OnResult
from cpift.pipeline.engine import Engine, NoEngine, Scoring
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.preflight import preflight
from cpift.pipeline.shared import SharedWork, titled_backbone
from cpift.training.spec import FitSpec

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results" / "study", ROOT / "docs" / "results.md"
README, _CLAIMS, _CLAIMS_END = (
    ROOT / "README.md",
    "<!-- written by benchmarks/study/study.py -->",
    "<!-- up to here -->",
)
# Nats a row of a guess, where a task's loss is that of one answer out of a closed list (LogiQA: a letter of four).
GUESSES = {"smollm2": {"logiqa": math.log(4)}}
STUDIES = {
    "tiny": "A small model from scratch",
    "smollm2": "SmolLM2-135M on five tasks",
}


class OutOfHoursError(CpiftError):
    """The time that this piece of the study may take is over; everything finished is kept."""


class Timed:
    """An engine that starts nothing new once its hours are over."""

    def __init__(self, engine: Engine, hours: float):
        self.merging = engine.merging
        self._engine, self._end = engine, time.monotonic() + 3600 * hours

    def session(self) -> AbstractContextManager[None]:
        return self._engine.session()

    def expect(self, specs: Sequence[FitSpec]) -> None:
        self._engine.expect(specs)

    def fit(self, specs: Sequence[FitSpec], on_progress: OnProgress) -> None:
        self._in_pieces(specs, lambda part: self._engine.fit(part, on_progress))

    def evaluate(self, scorings: Sequence[Scoring], on_result: OnResult, on_progress: OnProgress) -> None:
        self._in_pieces(scorings, lambda part: self._engine.evaluate(part, on_result, on_progress))

    def _in_pieces(self, work: Sequence[Any], do: Callable[[Any], None]) -> None:
        at_once = (work[0].resources.parallel if work else None) or 1
        size = 8 * at_once  # a few rounds, so that workers seldom wait for the last one of a piece
        for start in range(0, len(work), size):
            if time.monotonic() > self._end:
                raise OutOfHoursError("the hours are over; the same command goes on from here")
            do(work[start : start + size])


def load(name: str, options: argparse.Namespace) -> Comparison:
    """A study's comparison; of `tiny` with the θ0 that is trained first."""
    folder = "fair" if name in TRIALS else name  # what the trials share is made once
    changes: dict[str, Any] = {"output": Path(options.output or ROOT / "runs" / f"study-{folder}").absolute()}
    changes |= {"seeds": [int(seed) for seed in options.seeds.split(",")]} if options.seeds else {}
    changes |= {"methods": options.methods} if options.methods else {}
    if name in TRIALS:
        return fair_trial.load_trial(name, options.data, changes)
    if name == "smollm2":
        if not options.data:
            raise CpiftError("smollm2 needs --data FOLDER with NAME_train.jsonl and NAME_test.jsonl of its five tasks")
        os.environ["FIVE_TASKS"] = str(Path(options.data).absolute())
        return load_comparison(HERE / "smollm2.yaml", (), changes)
    path = tiny_base(Path(changes["output"])).path
    os.environ["TINY_BASE"] = str(path if path.is_dir() else HERE)
    return load_comparison(HERE / "tiny.yaml", (), changes)


def _base_run(folder: Path) -> Pipeline:
    return Pipeline(load_config(HERE / "tiny_base.yaml", [f"output={folder / 'base'}"]), NoEngine(), quiet())


def tiny_base(folder: Path) -> Artifact:
    """θ0 of the tiny study: plain SFT of a random model on everything that it should know beforehand."""
    run = _base_run(folder)
    artifact = run.artifacts.backbone(together(run))
    assert artifact is not None
    return artifact


def train_tiny_base(folder: Path, engine: Engine) -> None:
    run, artifact = _base_run(folder), tiny_base(folder)
    if not artifact.complete:
        run.pretrained()
        wanted = [(artifact, titled_backbone(run, together(run), artifact), run)]
        SharedWork([run], engine, View()).train("θ0 of the tiny study", wanted)


def run(options: argparse.Namespace) -> None:
    """Make what is missing of one study and write its record."""
    engine = _engine(options)
    with engine.session():
        if options.study == "tiny":
            train_tiny_base(Path(options.output or ROOT / "runs" / "study-tiny").absolute(), engine)
        comparison = load(options.study, options)
        preflight(comparison.base, stage="run")
        if options.plan:
            folder = comparison.base.output_dir
            print(f"{len(methods_of(comparison))} methods, seeds {comparison.seeds}, results in {folder}")
            return
        fair_trial.require_development(options.study, RESULTS)
        path = RESULTS / f"{options.study}.jsonl"
        known = read_record(path) if path.is_file() else None
        work = ComparisonWork(
            comparison, engine, View(), {(row.method, row.seed) for row in known.rows} if known else ()
        )
        try:
            work.make()
        finally:  # out of hours or killed by a failure, what is finished goes into the record
            if work.done:
                made = work.record()
                if options.study in TRIALS:
                    made = fair_trial.stamped(made, options.study, RESULTS)
                _keep(made, path)


def _keep(record: Record, path: Path) -> None:
    """Add a piece to what is on disk by now: another process may be making other seeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".lock").open("a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_record(joined(read_record(path), record) if path.is_file() else record, path)
    print(f"Record: {path}, {len(record.rows)} rows more; now: study.py write")


def _engine(options: argparse.Namespace) -> Engine:
    if options.here:
        return Timed(InProcessEngine(), options.hours)
    from cpift.cluster.tasks import TaskEngine

    return Timed(TaskEngine(ResourcesConfig()), options.hours)


# ---- the document ----------------------------------------------------------------------------------------------------


def compose() -> dict[Path, str]:
    """docs/results.md and its plots, from the records that are there and the text around them."""
    parts, files = [(HERE / "results_head.md").read_text(encoding="utf-8")], dict[Path, str]()
    for name, title in STUDIES.items():
        about = (HERE / f"about_{name}.md").read_text(encoding="utf-8")
        path = RESULTS / f"{name}.jsonl"
        if not path.is_file():
            parts.append(f"## {title}\n\n{about}\n**Not run yet: there is no record of it, and nothing is claimed.**\n")
            continue
        everything = read_record(path)
        record = finished(everything)
        text, plots = document(record, f"results/{name}", level=3)
        files |= {DOCUMENT.parent / file: svg for file, svg in plots.items()}
        parts.append(f"## {title}\n\n{about}\n{_held(name, everything, record)}{_judged(name, record)}{text}")
        parts += _before(name)
    text, plots = fair_trial.section(RESULTS)
    files |= {DOCUMENT.parent / file: svg for file, svg in plots.items()}
    parts.append(text)
    return {DOCUMENT: "\n".join(parts), README: _readme(), **files}


def _before(name: str) -> list[str]:
    """What an earlier set-up of a study showed, where its record is kept: it is not to be forgotten."""
    path = RESULTS / f"{name}_before.jsonl"
    if not path.is_file():
        return []
    about = (HERE / f"about_{name}_before.md").read_text(encoding="utf-8")
    claims = "\n".join(f"- {claim}" for claim in Findings(read_record(path)).verdict())
    return [f"### What an earlier set-up showed\n\n{about}\n{claims}\n"]


def nats_a_row(record: Record, method: str, task: str) -> list[float]:
    """Mean loss of a test row, nats, with each seed: what a guess among choices is compared with."""
    items = [row.scores[task]["items"] for row in record.rows_of(method)]
    return [sum(loss * tokens for loss, tokens in rows) / len(rows) for rows in items]


def not_learnt(name: str, record: Record) -> list[str]:
    """The tasks whose own probes are no better than a guess with any seed: no method is judged by them."""
    guesses = GUESSES.get(name, {})
    return [task for task, guess in guesses.items() if min(nats_a_row(record, PROBES, task)) >= guess]


def judged(name: str, record: Record) -> Record:
    """A record without the tasks that were not learnt."""
    dropped = set(not_learnt(name, record))
    tasks = {task: metric for task, metric in record.header.tasks.items() if task not in dropped}
    rows = [
        replace(row, scores={task: score for task, score in row.scores.items() if task in tasks})
        for row in record.rows
        if not dropped & set(row.pair or ())
    ]
    return replace(record, header=replace(record.header, tasks=tasks), rows=rows)


def _judged(name: str, record: Record) -> str:
    """What the tasks say that were learnt, where some were not; empty where all were."""
    dropped = not_learnt(name, record)
    if not dropped:
        return ""
    nats = {task: {m: nats_a_row(record, m, task) for m in (PROBES, FULL, "linear average", OURS)} for task in dropped}
    shown = [
        f"{task}, nats a row with each seed, of a guess {GUESSES[name][task]:.2f}: "
        + ", ".join(f"{method} {' '.join(f'{value:.2f}' for value in values)}" for method, values in of_task.items())
        for task, of_task in nats.items()
    ]
    claims = "\n".join(f"- {claim}" for claim in Findings(judged(name, record)).verdict())
    return (
        f"### Without {', '.join(dropped)}, which no probe learnt\n\n{'. '.join(shown)}. Nothing follows from it: "
        f"read these lines, and not those further down, which count it.\n\n{claims}\n\n"
    )


def _readme() -> str:
    """README with its claims as the records give them: the aim's sentence of the paper's recipe in every study."""
    claims = []
    for name, title in STUDIES.items():
        if (path := RESULTS / f"{name}.jsonl").is_file():
            record = finished(read_record(path))
            without = "".join(f" Without {task}, which no probe learnt:" for task in not_learnt(name, record))
            aim = next(claim for claim in Findings(judged(name, record)).verdict() if claim.startswith("With "))
            claims.append(textwrap.fill(f"- *{title}.*{without} {aim}", 120, subsequent_indent="  "))
    before, _, rest = README.read_text(encoding="utf-8").partition(_CLAIMS)
    _, _, after = rest.partition(_CLAIMS_END)
    return "\n".join([before + _CLAIMS, *claims, _CLAIMS_END]) + after


def _held(name: str, everything: Record, record: Record) -> str:
    """What the record has not of what the study's file names, and what of it is not shown; empty where nothing is."""
    wanted = read_yaml(HERE / f"{name}.yaml")["seeds"]
    missing = set(record.header.methods) - {row.method for row in record.rows}
    left_out = ["methods"] if missing or list(record.header.comparison["methods"]) != ["*"] else []
    left_out += [] if set(wanted) <= set(record.header.seeds) else ["seeds"]
    if not left_out:
        return ""
    begun = [str(seed) for seed in everything.header.seeds if seed not in record.header.seeds]
    return (
        f"**A first piece: {len(record.header.seeds)} of the {len(wanted)} seeds that {name}.yaml names"
        f"{', and only the methods below' if 'methods' in left_out else ''}"
        f"{'; seed ' + ', '.join(begun) + ' is begun and not shown' if begun else ''}.** The command goes on from "
        "here.\n\n"
    )


def write(options: argparse.Namespace) -> None:
    for path, text in compose().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    print(f"Written: {DOCUMENT}, its plots, and the claims in {README.name}")


def admit(options: argparse.Namespace) -> None:
    """Decide which tasks of a development's record count, and keep it there with the reasons."""
    path = RESULTS / f"{options.study}.jsonl"
    record = fair_trial.admit(options.study, RESULTS)
    write_record(record, path)
    for line in admission.told(record.header.admission or {}):
        print(line)
    print(f"Record: {path}")


def check(options: argparse.Namespace) -> None:
    """Raise CpiftError where the document, its records and, if asked for, the artifacts do not agree."""
    fair_trial.require_protocol(RESULTS)
    fair_trial.require_admission(RESULTS)
    wrong = [str(path) for path, text in compose().items() if not path.is_file() or path.read_text("utf-8") != text]
    if wrong:
        raise CpiftError(f"{', '.join(wrong)}: not what the records say; run study.py write")
    if options.artifacts:
        _check_artifacts(read_record(RESULTS / f"{options.artifacts}.jsonl"), load(options.artifacts, options))
    print("The document agrees with its records" + (" and these with the artifacts" if options.artifacts else ""))


def _check_artifacts(record: Record, comparison: Comparison) -> None:
    """Make every row of a record again, of these seeds, from the scores that lie in the artifacts."""
    rows = {(row.method, row.seed): row for row in record.rows if row.seed in comparison.seeds}
    others = {(method.name, seed) for method in methods_of(comparison) for seed in comparison.seeds} - set(rows)
    work = ComparisonWork(comparison, NoEngine(), quiet(), others)
    work.make()
    if {(row.method, row.seed): row for row in work.record().rows} != rows:
        raise CpiftError(f"{comparison.name}.jsonl is not what the artifacts hold")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, command in (("run", run), ("admit", admit), ("write", write), ("check", check)):
        sub = commands.add_parser(name)
        sub.set_defaults(command=command, seeds=None, methods=None, data=None, output=None)
        if name == "run":
            sub.add_argument("study", choices=[*STUDIES, *TRIALS])
            sub.add_argument("--hours", type=float, default=2.0, help="start nothing new after so long (default 2)")
            sub.add_argument("--here", action="store_true", help="in this process, without Ray")
            sub.add_argument("--plan", action="store_true", help="check everything and stop before the first fine-tune")
        if name == "admit":
            sub.add_argument("study", choices=sorted({*fair_trial.DEVELOPMENT.values()}))
            continue
        if name == "check":
            sub.add_argument(
                "--artifacts", choices=[*STUDIES, *TRIALS], help="also compare this study's record with its artifacts"
            )
        if name != "write":
            sub.add_argument("--data", help="folder of the tasks (smollm2, the fair trial)")
            sub.add_argument("--seeds", help="for example 0,1,2; default: the study's own")
            sub.add_argument("--methods", nargs="+", help="glob patterns of its methods; default: the study's own")
            sub.add_argument("--output", help="folder for models and scores; default: runs/study-NAME")
    options = parser.parse_args(arguments)
    options.command(options)


if __name__ == "__main__":
    try:
        main()
    except CpiftError as error:
        sys.exit(f"study: {error}")
