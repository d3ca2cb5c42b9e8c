"""`cpift init` writes a run: a short YAML file that says why each value is what it is, and runs as it stands."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.config.inputs import DataSource, Holdout
from cpift.config.loading import one_line_yaml, parse_config
from cpift.config.run import RunConfig
from cpift.config.tasks import EvaluationConfig, TaskConfig
from cpift.data.tasks import count_examples, read_examples
from cpift.data.tokenise import UNCUT, tokenise
from cpift.errors import ConfigError, CpiftError, DataError, Problem
from cpift.evaluation.metrics import METRICS
from cpift.evaluation.rows import check_rows
from cpift.init.files import TaskFiles
from cpift.init.model import BaseModel
from cpift.init.rows import Guess, Lengths, Look, guess_metric, held_out, lengths_of, look_at, share_held
from cpift.models.sources import source_of
from cpift.rows.shapes import size_of
from cpift.untrusted.yaml import parse_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_LENGTH = 1024  # tokens of a training row, unless somebody raises it
_MOST_REPLY = 256  # tokens generated
MOST_SCORED = 4096  # tokens of a row that is held out
_SEEDS = 5  # tried before shorter rows are
_STEPS = (20, 300)
_BATCH = 8  # rows of a step
AT_ONCE = 4096  # tokens that go through the model together in training
# Up to how many parameters which learning rate, for AdamW on all weights.
_RATES = ((50_000_000, 1e-3), (2_000_000_000, 1e-4), (math.inf, 2e-5))


@dataclass(frozen=True)
class Task:
    """A task as it is written. `scored`: tokens of its longest test row, with what is generated."""

    name: str
    train: Look
    test: Look | None
    guess: Guess
    lengths: Lengths
    holdout: Holdout | None
    scored: int
    tested: int  # test rows

    @property
    def rows(self) -> int:
        return self.train.rows - (self.tested if self.holdout else 0)

    @property
    def summary(self) -> str:
        """What was recognised, for people."""
        file = self.train.source.file
        where = file.name if file is not None else self.train.source.hub
        split = f"; {self.tested:,} held out for testing, seed {self.holdout.seed}" if self.holdout else ""
        split = f"; {self.tested:,} for testing" if self.test is not None else split
        return f"{self.name}: {where} is {self.train.title}, {self.train.rows:,} rows{split}"


def rounded(value: float, to: int) -> int:
    """Up to a multiple of `to`, which is the least."""
    return max(to, math.ceil(value / to) * to)


def reply_limit(lengths: Lengths) -> int:
    """`max_new_tokens`."""
    return min(_MOST_REPLY, rounded(lengths.reply * 1.25, 8))


def tasks_of(task_files: Sequence[TaskFiles], base: BaseModel) -> list[Task]:
    """Look at every task's rows. Raises ConfigError with all that is wrong with any of them."""
    problems: list[Problem] = []
    tasks = []
    for files in task_files:
        try:
            tasks.append(_task(files, base))
        except DataError as error:
            problems += [Problem(_place(files, each.where), each.what, each.remedy) for each in error.problems]
        except CpiftError as error:
            problems.append(Problem(_given(files), str(error)))
    if problems:
        raise ConfigError("init", problems)
    return tasks


def _place(files: TaskFiles, where: str) -> str:
    """Where a problem is, for who gave the file or data set and knows of no task yet."""
    argument = _given(files)
    return argument if where in ("file", str(files.train.file)) else f"{argument}, {where}"


def _given(files: TaskFiles) -> str:
    """The file or data set, from the working directory if it is there."""
    file = files.train.file
    if file is None:
        return str(files.train.hub)
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def _task(files: TaskFiles, base: BaseModel) -> Task:
    train = look_at(files.train)
    test = None if files.test is None else look_at(files.test, like=train)
    guess = guess_metric(train) if test is None else _of_both(train, test)
    lengths = lengths_of(train, base.tokenizer)
    task = TaskConfig(
        name=files.name, train=with_choices(train, guess), metric=guess.metric, max_new_tokens=reply_limit(lengths)
    )
    if test is not None:
        task = task.model_copy(update={"test": with_choices(test, guess)})
        return Task(files.name, train, test, guess, lengths, None, longest(task, base.tokenizer), test.rows)
    holdout, scored = _fitting(task, train, base)
    tested = count_examples(task.model_copy(update={"holdout": holdout}).test_data)
    return Task(files.name, train, None, guess, lengths, holdout, scored, tested)


def _of_both(train: Look, test: Look) -> Guess:
    """What fits the test rows; of a list of replies that of the training rows, where they have all."""
    guess, other = guess_metric(train), guess_metric(test)
    if guess == other or (guess.choices and set(test.replies) <= set(guess.choices)):
        return guess
    return other if not other.choices else Guess("loss", "training and test rows have other replies")


def with_choices(look: Look, guess: Guess) -> DataSource:
    """The rows, with the options that all of them have."""
    columns = dict(look.source.columns) | ({"choices": guess.choices} if guess.choices else {})
    return look.source.model_copy(update={"columns": columns})


_ALL = EvaluationConfig(max_length=2**30)


def longest(task: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of its longest test row, with what is generated. Raises DataError for rows that cannot be scored."""
    return check_rows(tokenizer, [task], _ALL)


def _fitting(task: TaskConfig, train: Look, base: BaseModel) -> tuple[Holdout, int]:
    """Rows to hold out that the model can be scored on whole, and the most tokens of one."""
    most = min(base.places or MOST_SCORED, MOST_SCORED)
    for limit in (None, *_limits(train, most, base)):
        fitting = (
            train.rows
            if limit is None
            else sum(size_of(example) <= limit for example in read_examples(task.train_data))
        )
        rows = held_out(train) if limit is None else share_held(fitting)
        for seed in range(_SEEDS):
            holdout = Holdout(rows=rows, seed=seed, max_characters=limit)
            scored = longest(task.model_copy(update={"holdout": holdout}), base.tokenizer)
            if scored <= most:
                return holdout, scored
    remedy = "shorten the rows, or use a model with more places"
    raise DataError(task.name, [Problem("rows", f"too many have more than {most} tokens to score on", remedy)])


def _limits(train: Look, most: int, base: BaseModel) -> Iterator[int]:
    """Sizes of rows in characters up to which they may fit into the model, falling."""
    lengths = (
        (size_of(example), len(tokenise(example, base.tokenizer, UNCUT)["input_ids"])) for example in train.sample
    )
    sizes = sorted(size for size, tokens in lengths if tokens <= most)
    yield from dict.fromkeys(sizes[int(share * (len(sizes) - 1))] for share in (0.9, 0.7, 0.5, 0.3, 0.1) if sizes)


def written(tasks: Sequence[Task], base: BaseModel, out: Path, schema: str, gpus: int) -> str:
    """The YAML file `out` of a run of these tasks."""
    name = out.name.removesuffix("".join(out.suffixes[-1:])) or "run"
    lines = [
        f"# yaml-language-server: $schema={schema}",
        f"# Written by `cpift init`. `cpift plan {out.name}` says what it will take, `cpift run {out.name}` does it.",
        f"name: {one_line_yaml(name)}",
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
    from cpift.pipeline.preflight import preflight

    config = parse_config(parse_yaml(text), out.absolute().parent, str(out))
    preflight(config, stage="run", download=False)
    return config


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _relative(path: Path, folder: Path) -> str:
    """A path from the file's folder, where it is below it or a few folders away; else as it is."""
    relative = os.path.relpath(path, folder)
    return str(path) if relative.startswith(os.path.join("..", "..", "..")) else relative


def _model(base: BaseModel, folder: Path) -> Iterator[str]:
    model = base.model
    size = f"  # {base.parameters:,} parameters" if base.parameters else ""
    yield "model:"
    stated = source_of(model).stated(lambda path: _relative(path, folder))
    yield f"  {model.kind}: {one_line_yaml(stated)}{size}"
    if model.revision is not None:
        yield f"  revision: {one_line_yaml(model.revision)}  # what its main branch is today"
    if base.added:
        why = "plain words" if base.added == "alpaca" else "it has the tokens for it"
        yield f"  chat_template: {base.added}  # the model has none; {why}. Or chatml, llama3, alpaca, a file in jinja"
    if model.dtype != "auto":
        yield f"  dtype: {model.dtype}  # a short fine-tune moves weights by less than bfloat16 can tell"


def _task_lines(task: Task, folder: Path) -> Iterator[str]:
    yield f"  - name: {one_line_yaml(task.name)}  # {task.train.title}, {task.train.rows:,} rows"
    yield f"    metric: {task.guess.metric}  # {task.guess.why}"
    if METRICS[task.guess.metric].generates:
        yield f"    max_new_tokens: {reply_limit(task.lengths)}  # 95 of 100 replies have at most {task.lengths.reply}"
    yield f"    train: {source_line(with_choices(task.train, task.guess), folder)}"
    if task.test is not None:
        yield f"    test: {source_line(with_choices(task.test, task.guess), folder)}"
    elif task.holdout is not None:
        fields = one_line_yaml(task.holdout.model_dump(exclude_none=True))
        fits = ", of what fits the model" if task.holdout.max_characters else ""
        yield f"    holdout: {fields}  # of train{fits}; not trained on"


def source_line(source: DataSource, folder: Path) -> str:
    fields: dict[str, Any] = {}
    if source.file is not None:
        fields["file"] = _relative(source.file, folder)
    else:
        fields |= {"hub": source.hub, "revision": source.revision}
    if source.split != "train":
        fields["split"] = source.split
    columns = {name: column if isinstance(column, str) else list(column) for name, column in source.columns.items()}
    return one_line_yaml(fields | ({"columns": columns} if columns else {}))


def _training(tasks: Sequence[Task], base: BaseModel) -> Iterator[str]:
    places = base.places or _MOST_LENGTH
    smallest = min(task.rows for task in tasks)
    steps = min(max(math.ceil(smallest / _BATCH), _STEPS[0]), _STEPS[1])
    rate = next(rate for most, rate in _RATES if (base.parameters or math.inf) <= most)
    most = max(task.lengths.most for task in tasks)
    length = min(rounded(most, 32), _MOST_LENGTH, places)
    rows = [tokens for task in tasks for tokens in task.lengths.rows]
    fits = sum(tokens <= length for tokens in rows) / len(rows)
    passes = steps * _BATCH / smallest
    yield f"# {steps} steps of {_BATCH} rows go over the smallest task ({smallest:,} rows) {passes:.2g} times."
    yield "# That is for a first look: write epochs: 3 in the place of steps once the report looks right."
    yield "probe:"
    yield f"  steps: {steps}"
    yield from _batch(length)
    yield f"  learning_rate: {one_line_yaml(rate)}  # usual for a model of this size, all weights trained"
    yield f"  max_length: {length}  # tokens; {fits:.0%} of the rows looked at fit, longer ones are cut"
    yield ""
    yield "integration:  # the fused model's last fine-tune, with cores frozen"
    yield f"  steps: {max(_STEPS[0] // 2, steps // 2)}"
    yield from _batch(length)
    yield f"  learning_rate: {one_line_yaml(rate / 2)}"
    yield f"  max_length: {length}"
    scored = max(task.scored for task in tasks)
    most_rows = min(16, max(1, 2 * AT_ONCE // scored))
    yield ""
    yield f"# The longest test row has {scored} tokens."
    yield f"evaluation: {{batch_size: {most_rows}, max_length: {max(rounded(scored, 32), 32)}}}"


def _batch(length: int) -> Iterator[str]:
    """Rows of a step, as many at a time as memory allows."""
    rows = min(_BATCH, 2 ** int(math.log2(max(1, AT_ONCE // length))))
    yield f"  batch_size: {rows}" + (f"  # of {_BATCH} rows a step, for memory" if rows < _BATCH else "")
    if rows < _BATCH:
        yield f"  gradient_accumulation: {_BATCH // rows}"
