"""Stage 7: a model's scores on every task."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.lora_config import ADAPTER_CONFIG
from cpift.checkpoints.opening import model_files, open_models, quick_fingerprint
from cpift.checkpoints.uniting import with_rows
from cpift.checkpoints.vocabulary import resized
from cpift.checkpoints.writing import write_plain
from cpift.config.identity import identity_of
from cpift.config.run import RunConfig
from cpift.disk.artifacts import Artifact, claimed, require_sound
from cpift.disk.files import digest, read_json, write_json
from cpift.disk.input_watch import noted
from cpift.evaluation.scores import Evaluation, Score, read_scores
from cpift.models.sources import configured_template
from cpift.pipeline.engine import Scoring, keep_scores
from cpift.pipeline.run import Run
from cpift.pipeline.stages import integrate, probe
from cpift.pipeline.stages import model as pretrained
from cpift.pipeline.stages.names import ModelRef, Names
from cpift.pipeline.stages.step import Step, step_of
from cpift.pretrained.architecture import CONFIG
from cpift.pretrained.tokenizer_files import TEMPLATE, chat_template
from cpift.pretrained.tokens import FILE as TOKENIZER
from cpift.pretrained.tokens import copy_tokenizer

VERSION = 1
TITLE = "evaluation"


def artifact(names: Names, model: ModelRef) -> Artifact:
    """Named by the model, the test rows of all tasks, and how they are scored, by code of the user's too."""
    tasks = names.config.scored
    inputs = {"model": model.fingerprint}
    inputs |= {f"data {task.name}": names.rows(task.name, "test", task.test_data) for task in tasks}
    inputs |= names.code("tasks.")
    fields = identity_of(names.config.evaluation, "evaluate") | {"threads": names.config.resources.threads}
    fields |= names.template_fields
    fields["tasks"] = [[task.name, task.metric_name, task.max_new_tokens] for task in tasks]
    return names.artifact("evaluate", VERSION, inputs, fields, model.title.replace(" ", "-"))


def check_rows(run: Run) -> None:
    """Look at the data before fusion where no fine-tune has: all probes are given."""
    if not run.config.trained and not artifact(run.artifacts, pretrained.base(run.artifacts)).complete:
        probe.check_data(run, pretrained.make(run))


def make(run: Run, models: Sequence[ModelRef]) -> dict[str, dict[str, Score]]:
    """Scores by model and task, of these models."""
    artifacts = {model.title: artifact(run.artifacts, model) for model in models}
    if all(scored.complete for scored in artifacts.values()):
        run.say_cached(TITLE)
    else:
        with claimed((scored for scored in artifacts.values() if not scored.complete), run.view.warn):
            _score(run, models, artifacts)
    return {title: read_scores(scored.path) for title, scored in artifacts.items()}


def _score(run: Run, models: Sequence[ModelRef], artifacts: Mapping[str, Artifact]) -> None:
    """Score the models whose scores are missing, and keep each one's as soon as it is there."""
    todo = {
        model.title: loadable(run, model, artifacts[model.title])
        for model in models
        if not artifacts[model.title].complete
    }

    def keep(title: str, result: Evaluation) -> None:
        keep_scores(artifacts[title], result, changes[title])

    run.begin(TITLE)
    require_sound(todo.values(), run.root, run.view.warn)
    changes = {title: noted(model_files(path)) for title, path in todo.items()}
    with run.view.stage(TITLE, list(todo)):
        kept = {model.title: results(run, model, artifacts[model.title]) for model in models if model.title in todo}
        scorings = [scoring(run, title, path, kept[title]) for title, path in todo.items()]
        run.engine.evaluate(scorings, keep, run.view.progress)


def scoring(run: Run, title: str, path: Path, kept: Path | None = None) -> Scoring:
    """A model in a folder, to be scored as the run scores. kept: where a kill leaves the results of rows."""
    return Scoring(title, path, run.config.scored, run.config.evaluation, run.config.resources, kept=kept)


def results(run: Run, model: ModelRef, scored: Artifact) -> Path:
    """For `scoring`: a folder named by the files that decide what a model writes. What `loadable` makes of them is made
    anew each time, and has other times."""
    folders = [model.path]
    if (model.path / ADAPTER_CONFIG).is_file():
        folders.append(pretrained.base(run.artifacts).path)
    return scored.work_dir / "results" / digest([quick_fingerprint(folder) for folder in folders])[:16]


def loadable(run: Run, model: ModelRef, scored: Artifact) -> Path:
    """The folder that an evaluation loads: the model's own; in the work folder of the scores an adapter as the model it
    makes of θ0, and a given model with the run's chat template where that is not its own."""
    template, adapter = configured_template(run.config.model), (model.path / ADAPTER_CONFIG).is_file()
    other = template is not None and chat_template(model.path) != template
    if not adapter and not other:
        return model.path
    folder = scored.work_dir / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if adapter:
        base, opened = open_models(pretrained.base(run.artifacts).path, {model.title: model.path})
        write_plain(opened[model.title], base, folder)
        _with_own_tokens(model.path, resized(base, opened[model.title]), opened[model.title], folder)
    else:
        for file in (file for file in model_files(model.path) if file.name != TEMPLATE):
            (folder / file.name).symlink_to(file.resolve())
    if template is not None:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
    return folder


def _with_own_tokens(adapter: Path, changed: Sequence[str], model: Checkpoint, folder: Path) -> None:
    """Of an adapter with other rows of embeddings than θ0 (`changed`), config.json and tokenizer of the model that it
    makes."""
    if not changed:
        return
    config = read_json(folder / CONFIG)
    write_json(folder / CONFIG, with_rows(config, model.tensors[changed[0]].shape[0]))
    if (adapter / TOKENIZER).is_file():
        copy_tokenizer(adapter, folder)


def possible(config: RunConfig) -> bool:
    """Whether the config has the rows for it, and what comes before."""
    return config.scores and (integrate.trains(config) or config.integration is None)


def plan(names: Names, models: Sequence[ModelRef]) -> Iterator[Step]:
    for model in models:
        yield step_of(artifact(names, model), f"{len(names.config.scored)} tasks")


def outputs(names: Names, models: Sequence[ModelRef]) -> dict[str, Artifact]:
    return {f"evaluate {model.title}": artifact(names, model) for model in models}
