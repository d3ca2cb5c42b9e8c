"""What θ0's tokenizer and config tell of the tasks' rows: whether they can be written, and how much of them is used."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.config.code import code_of
from cpift.config.needs import NEEDS, trained_in
from cpift.data.tasks import balanced_sample, count_examples, read_examples, source_fingerprint
from cpift.data.templates import ASKS_TODAY, checked_templates, renderer
from cpift.data.tokenise import UNCUT, learnable, tokenise
from cpift.data.use import RowFacts, RowUse, TokenUse
from cpift.disk.facts import recalled, remembered
from cpift.errors import CheckpointError, CpiftError, DataError, Problem
from cpift.rows.problems import one_per_kind
from cpift.rows.shapes import Shapes, size_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cpift.config.run import DataSource, EvaluationConfig, RunConfig, TaskConfig
    from cpift.rows.examples import Example

# What `plan` writes of a task: training rows, up to so many characters, and texts of test rows; problems that it tells.
SAMPLE, _CHARACTERS, _TESTED, _SHOWN = 128, 40_000, 48, 5
_INTEGRATION = "integration.max_length"


@dataclass
class RowChecks:
    """What a look at the rows brought: problems end the command, notes are worth knowing."""

    longest: int = 0  # tokens of a training row
    scored: int = 0  # tokens of a test row as it is scored, with what may be generated after it
    largest: int = 0  # token in it
    unlearnt: set[str] = field(default_factory=set)  # tasks of whose rows the integration leaves some out
    day: str = ""  # on which the chat template writes this, where it writes the date
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[RowFacts] = field(default_factory=list)  # of each task and field


def check_written(config: RunConfig, stage: str | None, download: bool = True) -> RowChecks:
    """The first rows of every task in the chat template of θ0, if its tokenizer is at hand without a download.

    stage: what is to be made, None: all of the run. download: whether rows of hub data sets are fetched to look at.
    What was found good is kept by all that it depends on, and not looked at again.
    """
    try:
        if not _wanted(config, stage):
            return RowChecks()
        inputs = _inputs(config, stage)
    except CheckpointError as error:
        return RowChecks(problems=_of_model(error))
    if inputs is None:
        return _look(config, stage, download)
    record = remembered("rows", inputs, lambda: _plain(_look(config, stage, download)), holds=_holds)
    problems = [Problem(**problem) for problem in record["problems"]]
    return RowChecks(**{**record, "problems": problems, "unlearnt": set(record["unlearnt"])})


def ask_ahead(config: RunConfig, stage: str | None) -> None:
    """Start the process that will write rows for `check_written`, which takes a while, if any will be written."""
    with suppress(CpiftError):
        if _wanted(config, stage) and not ((inputs := _inputs(config, stage)) and recalled("rows", inputs)):
            renderer().start()


def _scored(config: RunConfig, stage: str | None) -> bool:
    return bool(NEEDS[stage or "run"].scores and config.scores)


def _wanted(config: RunConfig, stage: str | None) -> bool:
    return _scored(config, stage) or any(trained_in(config, task, stage) for task in config.every_task)


def _plain(checks: RowChecks) -> dict[str, Any]:
    return asdict(checks) | {"unlearnt": sorted(checks.unlearnt)}


def _of_model(error: CheckpointError) -> list[Problem]:
    return [Problem(f"model, {problem.where}", problem.what, problem.remedy) for problem in error.problems]


def _inputs(config: RunConfig, stage: str | None) -> list[Any] | None:
    """Everything that decides `_look`, as JSON; None where some is not here or unreadable. Raises CheckpointError."""
    from cpift.checkpoints.opening import quick_fingerprint
    from cpift.data.chat_templates import decided_by
    from cpift.models.sources import source_of

    folder, scored = folder_at_hand(config), _scored(config, stage)
    both = (one for task in config.every_task for one in (task.source("train"), task.source("test"), task.validation))
    sources = [source for source in both if source is not None]
    if any(source.hub for source in sources) or (folder is None and source_of(config.model).in_place):
        return None
    try:
        model = list(source_of(config.model).decided_by()) if folder is None else quick_fingerprint(folder)
        rows, template = [source_fingerprint(source) for source in sources], list(decided_by(config.model))
    except (CpiftError, OSError):
        return None  # `_look` and `check_task` say what is wrong
    fields = config.model_dump(mode="json", exclude={"name", "output"})
    codes = {field: extension.fingerprint for field, extension in code_of(config).items()}
    return [model, str(folder), rows, fields, stage, scored, template, codes]


def _holds(record: Mapping[str, Any]) -> bool:
    return not record["problems"] and record["day"] in ("", date.today().isoformat())


def _look(config: RunConfig, stage: str | None, download: bool) -> RowChecks:
    checks, folder = RowChecks(), folder_at_hand(config)
    renderer().start()  # while the imports go on here
    try:
        tokenizer = _tokenizer(config, folder)
    except CheckpointError as error:
        checks.problems += _of_model(error)
        return checks
    if tokenizer is None:
        checks.notes.append("Rows are written in the chat template once the model is there, before anything is trained")
        return checks
    if ASKS_TODAY in str(tokenizer.chat_template):
        checks.day = date.today().isoformat()
    for task in config.every_task:
        if task.train is not None and (download or task.train.hub is None):
            for where, source, lengths in _uses(config, task, stage):
                _check_train(checks, task, where, source, tokenizer, lengths)
    here = download or not any(task.train is not None and task.train.hub for task in config.tasks)
    if checks.unlearnt and here and not checks.problems:
        checks.problems += _unlearnt_samples(config, tokenizer, checks.unlearnt)
    for task in config.scored:
        if _scored(config, stage) and (download or task.test_data.hub is None):
            _check_test(checks, task, config.evaluation, tokenizer)
    if folder is not None:
        _check_model(checks, config, folder, tokenizer, stage)
    checks.problems = one_per_kind(checks.problems)
    return checks


def keep_train_rows(config: RunConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """As `check_written`, of all training rows and of nothing else: as tokens they are kept in `folder` for those who
    train. Raises DataError with what is wrong with them."""
    from cpift.data.token_files import TokenFiles

    checks, kept = RowChecks(), TokenFiles(folder, tokenizer)
    wanted = []
    for task in config.every_task:
        for where, source, lengths in _uses(config, task, None):
            if not kept.has(fingerprint := source_fingerprint(source), max(lengths.values())):
                wanted.append((source, fingerprint, max(lengths.values())))
                _check_train(checks, task, where, source, tokenizer, lengths)
    if checks.problems:
        raise DataError("training rows", one_per_kind(checks.problems))
    for source, fingerprint, length in wanted:
        kept.rows(source, fingerprint, length)


def _uses(config: RunConfig, task: TaskConfig, stage: str | None) -> Iterator[tuple[str, DataSource, dict[str, int]]]:
    """The rows that a task's fine-tunes go over or watch, each source once: its field, and `max_length` by field."""
    uses: dict[tuple[str, str], tuple[str, DataSource, dict[str, int]]] = {}
    for section, fit in trained_in(config, task, stage).items() if task.train is not None else ():
        for split, source in (("train", task.trained_rows(fit)), ("validation", task.watched_rows(fit))):
            if source is not None:
                key = (split, source.model_dump_json())
                uses.setdefault(key, (f"tasks.{task.name}.{split}", source, {}))[2][f"{section}.max_length"] = (
                    fit.max_length
                )
    yield from uses.values()


def folder_at_hand(config: RunConfig) -> Path | None:
    """Where θ0's config.json and tokenizer lie, None where they would have to be downloaded or made."""
    from cpift.models.sources import source_of
    from cpift.pipeline.stages import model, names

    source = source_of(config.model)
    if source.in_place:
        return source.folder()
    artifact = model.artifact(names.Names(config))
    return artifact.path if artifact.complete else None


def _tokenizer(config: RunConfig, folder: Path | None) -> PreTrainedTokenizerBase | None:
    """θ0's, to write and count rows; None where it would have to be downloaded.

    Raises CheckpointError where it cannot be used.
    """
    from cpift.models.sources import source_of
    from cpift.models.tokenizer import load_row_tokenizer

    source = source_of(config.model)
    return source.row_tokenizer() if folder is None or source.in_place else load_row_tokenizer(folder)


def _check_model(
    checks: RowChecks, config: RunConfig, folder: Path, tokenizer: PreTrainedTokenizerBase, stage: str | None
) -> None:
    """Whether the class that config.json names can be made, and has a row for every token and place of the sample."""
    from cpift.pretrained.architecture import room

    try:
        rows, places = room(folder)
    except CheckpointError as error:
        checks.problems += _of_model(error)
        return
    largest = max(checks.largest, int(tokenizer.pad_token_id or 0))
    if largest >= rows:
        what = f"token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) has no row in {rows}"
        checks.problems.append(Problem("model, embeddings", what, "use the tokenizer that the model was saved with"))
    if places is not None:
        fits = [trained_in(config, task, stage) for task in config.every_task]
        lengths = {f"{section}.max_length": fit.max_length for one in fits for section, fit in one.items()}
        for name, length in lengths.items():
            if min(length, checks.longest) > places:
                what = f"{length} is more than the {places} places of the model, and there are rows so long"
                checks.problems.append(Problem(name, what, f"give at most {places}"))
        if checks.scored > places:
            what = f"a row of {checks.scored} tokens, generated ones included, exceeds the model's {places} places"
            remedy = f"give at most {places}, a smaller max_new_tokens to tasks that generate, or leave the row out"
            checks.problems.append(Problem("evaluation.max_length", what, remedy))


def _check_train(
    checks: RowChecks,
    task: TaskConfig,
    where: str,
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Mapping[str, int],
) -> None:
    uses = {name: TokenUse(length) for name, length in lengths.items()}
    try:
        others = {name: RowUse(length) for name, length in lengths.items()}  # rows that are looked at, not counted
        rows = _sampled(read_examples(source), tokenizer, list(uses.values()), list(others.values()), checks)
    except CpiftError:
        return  # `check_task` says what is wrong with the rows
    trains = where.endswith(".train")
    if trains and any(use.left_out for fits in (uses, others) for name, use in fits.items() if name == _INTEGRATION):
        checks.unlearnt.add(task.name)
    for name, use in uses.items():
        if use.rows and not use.used:
            what = f"no reply begins within {name} = {use.max_length} tokens in any of its {use.rows:,} rows"
            checks.problems.append(Problem(where, what, f"raise {name}"))
    all_seen = all(use.rows == rows for use in uses.values())
    if trains:
        checks.rows += [use.facts(task.name, name, all_seen, rows) for name, use in uses.items()]
    sentences = {(use.max_length, str(use)): name for name, use in reversed(uses.items()) if use.rows}
    for (_, sentence), name in reversed(sentences.items()):
        first = "" if all_seen else "of the first rows, "
        checks.notes.append(f"{where} at {name} = {uses[name].max_length}: {first}{sentence}")


def _sampled(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    uses: Collection[RowUse],
    others: Collection[RowUse],
    checks: RowChecks,
) -> int:
    """Count the first rows, and more where none of those would be learnt from. Returns how many rows were read: all, if
    nothing was wrong with them. Of the others one of each shape is written, for its template may refuse it, and the
    longest.
    """
    shapes, bad, number, longest, characters = Shapes(tokenizer), 0, 0, None, 0
    for number, example in enumerate(examples, start=1):
        counted = (number <= SAMPLE and characters <= _CHARACTERS) or not all(use.used for use in uses)
        characters += size_of(example)
        if not shapes.add(example) and not counted:
            longest = example if longest is None or size_of(example) > size_of(longest) else longest
            continue
        bad += not _counted(example, tokenizer, uses if counted else others, checks)
        if bad == _SHOWN:
            return number
    if longest is not None:
        _counted(longest, tokenizer, others, checks)
    return number


def _counted(example: Example, tokenizer: PreTrainedTokenizerBase, uses: Iterable[RowUse], checks: RowChecks) -> bool:
    """Whether a row can be written; if it can, it is counted."""
    try:
        row = tokenise(example, tokenizer, UNCUT)
    except DataError as error:
        checks.problems += error.problems
        return False
    checks.longest = max(checks.longest, len(row["input_ids"]))
    checks.largest = max(checks.largest, *row["input_ids"])
    for use in uses:
        use.add(len(row["input_ids"]), learnable({"labels": row["labels"][: use.max_length]}))
    return True


def _unlearnt_samples(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, tasks: Collection[str]
) -> Iterator[Problem]:
    """Tasks whose balanced sample could be of rows alone that are left out, whatever the groups turn out to be."""
    settings = config.integration
    if settings is None:
        return
    sources = {task.name: task.trained_rows(settings) for task in config.integrated if task.train is not None}
    counts = {name: count_examples(source) for name, source in sources.items()}
    for place, task in enumerate(config.integrated):
        if task.name not in tasks or task.train is None:
            continue
        rows = read_examples(sources[task.name])
        with checked_templates():
            learnt = [learnable(tokenise(example, tokenizer, settings.max_length)) for example in rows]
        sizes = {settings.samples_per_task} if settings.samples_per_task else {*counts.values()}
        sizes = {min(size, len(learnt)) for size in sizes}
        samples = (balanced_sample([learnt] * (place + 1), size, config.seed) for size in sizes)
        if not all(any(rows) for sample in samples for rows in sample):
            what = f"a sample of {min(sizes)} of {len(learnt)} rows of task {task.name} may have none with a reply "
            remedy = f"raise {_INTEGRATION}, or samples_per_task"
            yield Problem("integration.samples_per_task", what + f"within {settings.max_length} tokens", remedy)


def _check_test(
    checks: RowChecks, task: TaskConfig, settings: EvaluationConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    from cpift.evaluation.rows import check_rows

    try:
        checks.scored = max(checks.scored, check_rows(tokenizer, [task], settings, _TESTED))
    except DataError as error:
        checks.problems += error.problems[:_SHOWN]
