"""`cpift init`: a run, a merge or a sweep written from what there is, and examples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cpift.cli.schema import schema_of
from cpift.cli.score import Tests
from cpift.console.terminal import say
from cpift.errors import ConfigError, CpiftError, Problem


def register(app: typer.Typer, panel: str) -> None:
    """Add the command."""
    app.command(rich_help_panel=panel)(init)


def init(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA... | merge BASE MODEL... | sweep RUN.yaml",
            help="files of rows (JSON, CSV, Parquet, ...), their folder, or hub data sets; or what to merge or sweep",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="θ0: a model folder, a .gguf file, or an id on the hub")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="the file to write; my-run.yaml if not given")] = None,
    tests: Tests = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(
            "--vocabulary",
            help="of a merge, where models have other tokens: `base`, `union`, `pretrained` or a model's name",
        ),
    ] = None,
    example: Annotated[
        str | None, typer.Option("--example", metavar="NAME", help="copy an example that comes with cpift, e.g. smoke")
    ] = None,
) -> None:
    """Look at data and a model, say what they are, and write a run that works as it stands.

    A task a data set. NAME_train and NAME_test are one; of other files rows are held out for testing. Comments
    say why each value is what it is. Nothing that exists is replaced.
    """
    arguments = inputs or []
    _require_meant(arguments, model, out, example, tests, vocabulary)
    if example is not None:
        _example(example)
    elif arguments[:1] == ["merge"]:
        _merge(arguments[1:], out, tests or [], vocabulary)
    elif arguments[:1] == ["sweep"]:
        _sweep(arguments[1:], out)
    else:
        _run(arguments, model, out or Path("my-run.yaml"))


def _require_meant(
    arguments: Sequence[str],
    model: str | None,
    out: Path | None,
    example: str | None,
    tests: Sequence[str] | None,
    vocabulary: str | None,
) -> None:
    """Raise ConfigError for what would be ignored."""
    kind = (
        f"--example {example}"
        if example is not None
        else arguments[0]
        if arguments and arguments[0] in _OTHERS
        else None
    )
    beside = {"--model": model, "--out": out if example is not None else None}
    beside |= {"DATA": ", ".join(arguments) or None} if example is not None else {}
    beside |= {"--test": ", ".join(tests or []) or None} if kind != "merge" else {}
    beside |= {"--vocabulary": vocabulary} if kind != "merge" else {}
    ignored = [name for name, value in beside.items() if value is not None]
    if kind is None and vocabulary is not None:
        what = "means nothing beside data to train on"
        raise ConfigError("init", [Problem("--vocabulary", what, "it is for `cpift init merge`")])
    if kind is None and tests:
        remedy = "files NAME_train and NAME_test are one task; --test is for `cpift init merge`"
        raise ConfigError("init", [Problem("--test", "means nothing beside data to train on", remedy)])
    if kind is not None and ignored:
        raise ConfigError("init", [Problem(name, f"means nothing beside {kind}", "leave it out") for name in ignored])


def _run(data: Sequence[str], model: str | None, out: Path) -> None:
    _require_free(out)
    from cpift.init.files import tasks_of as found_in

    files = found_in(data)
    if model is None:
        problem = Problem("--model", "is not given", "name the model to fine-tune: a folder, a .gguf file or a hub id")
        raise ConfigError("init", [problem])
    say(f"Looking at {model} and {len(files)} data set{'s' * (len(files) != 1)} ...")
    from cpift.devices import visible_gpus
    from cpift.init.model import base_model
    from cpift.init.run import check, tasks_of, written

    base = base_model(model)
    tasks = tasks_of(files, base)
    for task in tasks:
        say(task.summary)
        say(f"  metric {task.guess.metric}: {task.guess.why}")
    size = f"{base.parameters:,} parameters" if base.parameters else "size known once it is downloaded"
    template = f"; it has no chat template, and gets {base.added}'s" if base.added else ""
    say(f"model: {model}, {size}{template}")
    text = written(tasks, base, out, _schema_name("run"), visible_gpus())
    check(text, out)
    _write(out, text, "run")
    say(f"Next: cpift plan {out}, then cpift run {out}")


def _merge(models: Sequence[str], out: Path | None, tests: Sequence[str], vocabulary: str | None) -> None:
    from cpift.init.others import check_merge, merge_file

    out = out or Path("my-merge.yaml")
    _require_free(out)
    text = merge_file(models, out, _schema_name("run"), tests, vocabulary)
    check_merge(text, out)
    _write(out, text, "run")
    then = f"cpift evaluate {out}, or cpift init sweep {out}" if tests else f"cpift fuse {out}"
    say(f"Next: cpift plan {out}, then {then}")


def _sweep(runs: Sequence[str], out: Path | None) -> None:
    from cpift.init.others import check_sweep, sweep_file

    out = out or Path("my-sweep.yaml")
    _require_free(out)
    if len(runs) != 1:
        raise ConfigError("init sweep", [Problem("RUN.yaml", f"{len(runs)} given", "give the file of one run")])
    text = sweep_file(Path(runs[0]), out, _schema_name("sweep"))
    check_sweep(text, out)
    _write(out, text, "sweep")
    say(f"Next: cpift sweep {out}")


_OTHERS = ("merge", "sweep")


def _example(name: str) -> None:
    from cpift.init.others import example_files

    files = example_files(name)
    for target in files:
        _require_free(target)
    for target, source in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as copy, source.open("rb") as original:
            shutil.copyfileobj(original, copy)
        say(f"Wrote {target}")
    programs = [f"python {target}, then " for target in files if target.suffix == ".py"]
    config = next(target for target in files if target.suffix == ".yaml")
    say(f"Next: {''.join(programs)}cpift plan {config}")


def _require_free(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise CpiftError(f"{out} exists already, and is not replaced → give another name with --out, or move it away")
    if not out.absolute().parent.is_dir() and out.is_absolute():
        raise CpiftError(f"{out}: there is no folder {out.parent} → make it, or give another name with --out")


def _schema_name(kind: str) -> str:
    return f"{kind}.schema.json"


def _write(out: Path, text: str, kind: str) -> None:
    """The file, and beside it the schema that its first line names, for editors."""
    out.parent.mkdir(parents=True, exist_ok=True)
    schema = out.parent / _schema_name(kind)
    beside = ""
    if not schema.exists():
        described = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema_of(kind)}
        with schema.open("x", encoding="utf-8") as file:
            file.write(json.dumps(described, indent=1, ensure_ascii=False) + "\n")
        beside = f" ({schema} beside it, for editors)"
    with out.open("x", encoding="utf-8") as file:
        file.write(text)
    say(f"Wrote {out}{beside}")
