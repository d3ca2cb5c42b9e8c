"""`cpift init` writes a run: a short YAML file that says why each value is what it is, and runs as it stands."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cpift.config import RunConfig
from cpift.config_inputs import DataSource
from cpift.config_loading import parse_config
from cpift.errors import ConfigError, CpiftError, DataError, Problem
from cpift.init_files import Found
from cpift.init_model import BaseModel
from cpift.init_rows import Guess, Lengths, Look, guess_metric, held_out, lengths_of, look_at
from cpift.metrics import METRICS
from cpift.untrusted_yaml import parse_yaml

_MOST_LENGTH = 1024  # tokens of a training row, unless somebody raises it
_MOST_REPLY = 256  # tokens generated
_STEPS = (20, 300)
_BATCH = 8
# Up to how many parameters which learning rate, for AdamW on all weights.
_RATES = ((50_000_000, 1e-3), (2_000_000_000, 1e-4), (math.inf, 2e-5))


@dataclass(frozen=True)
class Task:
    """A task as it is written."""

    name: str
    train: Look
    test: Look | None
    guess: Guess
    lengths: Lengths
    holdout: int | None

    @property
    def rows(self) -> int:
        return self.train.rows - (self.holdout or 0)

    @property
    def reply(self) -> int:
        """`max_new_tokens`."""
        return min(_MOST_REPLY, _rounded(self.lengths.reply * 1.25, 8))

    @property
    def told(self) -> str:
        """What was recognised, for people."""
        file = self.train.source.file
        where = file.name if file is not None else self.train.source.hub
        split = f"; {self.holdout:,} held out for testing, seed 0" if self.holdout else ""
        split = f"; {self.test.rows:,} for testing" if self.test is not None else split
        return f"{self.name}: {where} is {self.train.title}, {self.train.rows:,} rows{split}"


def _rounded(value: float, to: int) -> int:
    return max(to, math.ceil(value / to) * to)


def tasks_of(found: Sequence[Found], base: BaseModel) -> list[Task]:
    """Look at every task's rows. Raises ConfigError with all that is wrong with any of them."""
    problems: list[Problem] = []
    tasks = []
    for one in found:
        try:
            tasks.append(_task(one, base))
        except DataError as error:
            problems += [Problem(f"{one.name}, {each.where}", each.what, each.remedy) for each in error.problems]
        except CpiftError as error:
            problems.append(Problem(one.name, str(error)))
    if problems:
        raise ConfigError("init", problems)
    return tasks


def _task(found: Found, base: BaseModel) -> Task:
    train = look_at(found.train)
    test = None if found.test is None else look_at(found.test.model_copy(update={"columns": train.source.columns}))
    guess = guess_metric(train)
    if test is not None and guess_metric(test) != guess:  # what fits the rows that are scored, where options may lack
        guess = guess_metric(test) if not guess_metric(test).choices else Guess("loss", "replies are of many kinds")
    lengths = [lengths_of(look, base.tokenizer) for look in (train, test) if look is not None]
    longest = Lengths(
        lengths[0].most, max(one.longest for one in lengths), max(one.reply for one in lengths), lengths[0].fitted
    )
    return Task(found.name, train, test, guess, longest, None if test else held_out(train))


def written(tasks: Sequence[Task], base: BaseModel, out: Path, schema: str, gpus: int) -> str:
    """The YAML file `out` of a run of these tasks."""
    name = out.name.removesuffix("".join(out.suffixes[-1:])) or "run"
    lines = [
        f"# yaml-language-server: $schema={schema}",
        f"# Written by `cpift init`. `cpift plan {out.name}` says what it will take, `cpift run {out.name}` does it.",
        f"name: {_scalar(name)}",
        "seed: 0",
        "",
        *_model(base, out.absolute().parent),
        "",
        "tasks:",
        *(line for task in tasks for line in _task_lines(task, out.absolute().parent)),
        "",
        *_training(tasks, base),
        *([] if not gpus else ["", "resources: {gpus_per_worker: 1}  # this machine has " + _counted(gpus, "GPU")]),
    ]
    return "\n".join(lines) + "\n"


def check(text: str, out: Path) -> RunConfig:
    """What a plan would find wrong with the file, before it is there. Raises ConfigError."""
    from cpift.preflight import preflight

    config = parse_config(parse_yaml(text), out.absolute().parent, str(out))
    preflight(config, stage="run", download=False)
    return config


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _scalar(value: Any) -> str:
    """A value as YAML has it in a line."""
    dumped = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False)
    return dumped.removesuffix("\n").removesuffix("\n...")


def _relative(path: Path, folder: Path) -> str:
    """A path from the file's folder, where it is below it or a few folders away; else as it is."""
    found = os.path.relpath(path, folder)
    return str(path) if found.startswith(os.path.join("..", "..", "..")) else found


def _model(base: BaseModel, folder: Path) -> Iterator[str]:
    model = base.model
    size = f"  # {base.parameters:,} parameters" if base.parameters else ""
    yield "model:"
    if model.path is not None:
        yield f"  path: {_scalar(_relative(model.path, folder))}{size}"
    elif model.gguf is not None:
        yield f"  gguf: {{file: {_scalar(_relative(Path(model.gguf.file), folder))}}}{size}"
    else:
        yield f"  hub: {_scalar(model.hub)}"
        yield f"  revision: {_scalar(model.revision)}  # what its main branch is today"
    if base.added:
        why = "plain words" if base.added == "alpaca" else "it has the tokens for it"
        yield f"  chat_template: {base.added}  # the model has none; {why}. Or chatml, llama3, alpaca, a file in jinja"
    if model.dtype != "auto":
        yield f"  dtype: {model.dtype}  # a short fine-tune moves weights by less than bfloat16 can tell"


def _task_lines(task: Task, folder: Path) -> Iterator[str]:
    yield f"  - name: {_scalar(task.name)}  # {task.train.title}, {task.train.rows:,} rows"
    yield f"    metric: {task.guess.metric}  # {task.guess.why}"
    if METRICS[task.guess.metric].generates:
        yield f"    max_new_tokens: {task.reply}  # 95 of 100 replies have at most {task.lengths.reply}"
    yield f"    train: {_source(task.train.source, task.guess, folder)}"
    if task.test is not None:
        yield f"    test: {_source(task.test.source, task.guess, folder)}"
    else:
        yield f"    holdout: {{rows: {task.holdout}, seed: 0}}  # of train: scored on, and never trained on"


def _source(source: DataSource, guess: Guess, folder: Path) -> str:
    fields: dict[str, Any] = {}
    if source.file is not None:
        fields["file"] = _relative(source.file, folder)
    else:
        fields |= {"hub": source.hub, "revision": source.revision}
    if source.split != "train":
        fields["split"] = source.split
    columns: dict[str, Any] = dict(source.columns) | ({"choices": list(guess.choices)} if guess.choices else {})
    return _scalar(
        {name: value for name, value in (fields | ({"columns": columns} if columns else {})).items() if value}
    )


def _training(tasks: Sequence[Task], base: BaseModel) -> Iterator[str]:
    places = base.places or _MOST_LENGTH
    smallest = min(task.rows for task in tasks)
    steps = min(max(math.ceil(smallest / _BATCH), _STEPS[0]), _STEPS[1])
    rate = next(rate for most, rate in _RATES if (base.parameters or math.inf) <= most)
    most = max(task.lengths.most for task in tasks)
    length = min(_rounded(most, 32), _MOST_LENGTH, places)
    passes = steps * _BATCH / smallest
    yield f"# {steps} steps of {_BATCH} rows go over the smallest task ({smallest:,} rows) {passes:.2g} times."
    yield "# That is for a first look: write epochs: 3 in the place of steps once the report looks right."
    yield "probe:"
    yield f"  steps: {steps}"
    yield f"  batch_size: {_BATCH}"
    yield f"  learning_rate: {_scalar(rate)}  # usual for a model of this size, all weights trained"
    yield f"  max_length: {length}  # 99 of 100 rows have at most {most} tokens; longer ones are cut"
    yield ""
    yield "integration:  # the fused model's last fine-tune, with cores frozen"
    yield f"  steps: {max(_STEPS[0] // 2, steps // 2)}"
    yield f"  batch_size: {_BATCH}"
    yield f"  learning_rate: {_scalar(rate / 2)}"
    yield f"  max_length: {length}"
    longest = max(task.lengths.longest + (task.reply if METRICS[task.guess.metric].generates else 0) for task in tasks)
    scored = max(min(_rounded(longest, 32), places), 32)
    yield ""
    yield f"evaluation: {{max_length: {scored}}}  # the longest row with its reply has {longest} tokens"
