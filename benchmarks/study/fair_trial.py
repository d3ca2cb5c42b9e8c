"""The fair trial: which comparisons it has, and that its records are of the protocol that is in the repository.

A record carries the sha256 of protocol.md as it was when the record was made. Whoever changes the protocol afterwards
has records that `study.py check` refuses.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.study import admission
from cpift.compare.config import Comparison, load_comparison
from cpift.compare.files import document
from cpift.compare.record import Record, finished, read_record
from cpift.config.loading import read_yaml
from cpift.errors import CpiftError
from cpift.text.escaping import markdown

HERE = Path(__file__).parent
PROTOCOL = HERE / "protocol.md"
TRIALS = {
    "dev_loss": "Development, tasks by loss",
    "dev_scored": "Development, tasks with real scores",
    "dev_arrival": "Development, tasks that arrive",
    "once_loss": "Train once, tasks by loss",
    "once_scored": "Train once, tasks with real scores",
    "later_5": "Checkpoints exist, 5 % of the probes' tokens",
    "later_20": "Checkpoints exist, 20 % of the probes' tokens",
    "arrival": "Tasks arrive, old data is gone",
}
# The development that a trial's values are chosen on: no test seed runs before its record is there.
DEVELOPMENT = {
    "once_loss": "dev_loss",
    "once_scored": "dev_scored",
    "later_5": "dev_loss",
    "later_20": "dev_loss",
    "arrival": "dev_arrival",
}
ARRIVING = ("dev_arrival", "arrival")  # pairs of tasks: where both count there is a contrast


def load_trial(name: str, data: str | None, changes: Mapping[str, Any]) -> Comparison:
    """A comparison of the trial on the rows in `data`, a folder that `benchmarks.study.tasks` wrote.

    Raises CpiftError where it is the folder of other seeds: development's rows and the tests' are two; and for a seed
    that the trial does not have.
    """
    part = "test" if name in DEVELOPMENT else "dev"
    if not data or Path(data).name != part:
        raise CpiftError(f"{name} needs --data OUT/{part}, the folder that benchmarks.study.tasks writes for its seeds")
    if others := sorted(set(changes.get("seeds", ())) - set(seeds_of(name))):
        raise CpiftError(f"{name} has no seed {', '.join(map(str, others))}: protocol.md names {seeds_of(name)} for it")
    os.environ["STUDY_DATA"] = str(Path(data).absolute())
    return load_comparison(HERE / "fair" / f"{name}.yaml", (), changes)


def seeds_of(name: str) -> list[int]:
    """The seeds that a trial's file names."""
    seeds: list[int] = read_yaml(HERE / "fair" / f"{name}.yaml")["seeds"]
    return seeds


def require_development(name: str, results: Path) -> None:
    """Raise CpiftError where the values that `name` tests were chosen on no record, or on one of which seeds lack; and
    where it is not decided there which tasks count."""
    first = DEVELOPMENT.get(name)
    if first and (first not in (records := _records(results)) or _missing(first, records[first])):
        raise CpiftError(
            f"{name} has no chosen values yet: run {first} to its end, choose as protocol.md says, commit both, then "
            "this"
        )
    if first and records[first].header.admission is None:
        raise CpiftError(f"{name}: which tasks count is not decided → study.py admit {first}, commit the record")
    require_admission(results)


def admit(name: str, results: Path) -> Record:
    """The record of a development with its decision on which tasks count.

    Raises CpiftError where it is no development's, where seeds lack, and where test scores have been seen already.
    """
    known = _records(results)
    if name in DEVELOPMENT or name not in known:
        raise CpiftError(f"{name}: no record of a development → one of {', '.join(sorted({*DEVELOPMENT.values()}))}")
    if missing := _missing(name, known[name]):
        raise CpiftError(f"{name}: seeds {', '.join(map(str, missing))} are not whole → run {name} to its end")
    decision = admission.decided(_of_development(name, known[name]), seeds_of(name))
    tests = [test for test, first in DEVELOPMENT.items() if first == name and test in known]
    if seen := [test for test in tests if known[test].header.admission != decision]:
        raise CpiftError(f"{name}: {', '.join(seen)} was scored under another decision, which comes before scores")
    return replace(known[name], header=replace(known[name].header, admission=decision))


def require_admission(results: Path) -> None:
    """Raise CpiftError where a record says otherwise of which tasks count than the development seeds do."""
    known = _records(results)
    for name, record in known.items():
        first = DEVELOPMENT.get(name, name)
        if first in known:
            development = _of_development(first, known[first])
            kept = known[first].header.admission
            wanted = None if kept is None else admission.decided(development, seeds_of(first))
            if kept != wanted or record.header.admission != kept:
                raise CpiftError(
                    f"{name}.jsonl: the admission of tasks does not follow from {first}.jsonl → study.py admit"
                )
        elif record.header.admission is not None:
            raise CpiftError(f"{name}.jsonl: tasks were admitted, and there is no {first}.jsonl to show it")


def _of_development(name: str, record: Record) -> Record:
    """The record of a development. Raises CpiftError where it has a seed that is none of development's."""
    if others := sorted({row.seed for row in record.rows} - set(seeds_of(name))):
        raise CpiftError(f"{name}.jsonl: seed {others[0]} is no development seed; protocol.md names {seeds_of(name)}")
    return record


def _missing(name: str, record: Record) -> list[int]:
    """Seeds of a trial that a record has not with every method; all of them, where methods were left out."""
    wanted, whole = set(record.header.methods), list(record.header.comparison["methods"]) == ["*"]
    made = {(row.method, row.seed) for row in record.rows}
    return [seed for seed in seeds_of(name) if not whole or any((method, seed) not in made for method in wanted)]


def protocol_hash() -> str:
    """sha256 of the protocol's bytes."""
    return sha256(PROTOCOL.read_bytes()).hexdigest()


def stamped(record: Record, name: str = "", results: Path | None = None) -> Record:
    """A record that says which protocol it was made under; one of test seeds also which tasks count. Of fewer than
    three of them there is no contrast, but of pairs."""
    header = replace(record.header, protocol=protocol_hash())
    if results is not None and name in DEVELOPMENT:
        decision = _records(results)[DEVELOPMENT[name]].header.admission
        header = replace(header, admission=decision)
        if _too_few(name, decision):
            header = replace(header, comparison=header.comparison | {"contrasts": []})
    return replace(record, header=header)


def require_protocol(results: Path) -> None:
    """Raise CpiftError where a record was made under another protocol than the one that is here, or under none."""
    for name, record in _records(results).items():
        if record.header.protocol != protocol_hash():
            raise CpiftError(
                f"{name}.jsonl was made under protocol {record.header.protocol}, and {PROTOCOL.name} is "
                f"{protocol_hash()} → bring back the protocol that it was made under, or make the record again"
            )


def section(results: Path) -> tuple[str, dict[str, str]]:
    """The trial's part of docs/results.md, and its plots."""
    text, plots = (HERE / "about_fair_trial.md").read_text(encoding="utf-8"), dict[str, str]()
    records = _records(results)
    if not records:
        return f"{text}\n**Not run yet: there is no record of it, and nothing is claimed.**\n", plots
    for name, record in records.items():
        drawn = dict[str, str]()
        if missing := _missing(name, record):
            named = len(seeds_of(name))
            part = f"**{named - len(missing)} of {named} seeds are there: nothing is shown before all are.**\n"
        else:
            part, drawn = document(finished(record), f"results/{name}", level=4)
        text, plots = f"{text}\n### {TRIALS[name]}\n\n{_admission(name, record)}{part}", plots | drawn
    return text, plots


def _too_few(name: str, decision: admission.Admission | None) -> bool:
    return name not in ARRIVING and len(admission.admitted(decision or {})) < admission.LEAST


def _admission(name: str, record: Record) -> str:
    """Which tasks count, of a development with the reasons."""
    if name in DEVELOPMENT:
        few = f"*Fewer than {admission.LEAST} tasks were admitted: there is no contrast.*\n\n"
        return few if _too_few(name, record.header.admission) else ""
    if record.header.admission is None:
        return "*Which tasks count is not decided yet.*\n\n"
    lines = "\n".join(f"- {markdown(line)}" for line in admission.told(record.header.admission))
    return f"Which tasks count:\n\n{lines}\n\n"


def _records(results: Path) -> dict[str, Record]:
    return {name: read_record(file) for name in TRIALS if (file := results / f"{name}.jsonl").is_file()}
