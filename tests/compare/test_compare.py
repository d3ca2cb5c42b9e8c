"""Comparisons: what is refused, orders and budgets of baselines, and a whole one in this process."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cpift.compare.budgets import Budgets
from cpift.compare.config import Comparison, load_comparison, of_training
from cpift.compare.files import document, write_comparison, written_files
from cpift.compare.findings import Findings
from cpift.compare.methods import (
    MERGES,
    PARTS,
    Entry,
    by_rows,
    in_stages,
    methods_of,
    require_possible,
    shuffled,
    together,
)
from cpift.compare.record import PROBES, Record, finished, joined, read_record, write_record
from cpift.compare.run_baselines import OF_RUNS, fits_beside, make_baselines, plan_all
from cpift.compare.words import side
from cpift.compare.work import ComparisonWork, run_comparison
from cpift.config.loading import load_config, parse_config, with_fields
from cpift.config.run import RunConfig
from cpift.console.progress import OnProgress
from cpift.console.view import quiet
from cpift.disk.artifacts import Artifact
from cpift.disk.files import file_sha256, write_json
from cpift.errors import ConfigError, StageError
from cpift.merging.on_device import DeviceMerging
from cpift.merging.registry import METHODS
from cpift.merging.resident.engine import asking
from cpift.pipeline.engine import NoEngine, Scoring
from cpift.pipeline.identity import StageArtifacts
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.preflight import preflight
from cpift.pipeline.report import gather, report
from cpift.pipeline.stages import integrate, order
from cpift.pipeline.stages.names import ModelRef
from cpift.report.facts import tokens_of
from cpift.text.escaping import html
from cpift.training.spec import FitSpec
from tests.helpers.holders import holders
from tests.helpers.sweeps import TASKS, run_fields


def comparison_file(folder: Path, **changes: Any) -> Path:
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump({"run": run_fields(), "fixed": {"tracking": []}} | changes, sort_keys=False))
    return path


def load(folder: Path, **changes: Any) -> Comparison:
    return load_comparison(comparison_file(folder, **changes), (), {"output": folder / "out"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budgets": ["all"]}, ["budgets", "'all'"]),
        ({"seeds": [1, 1]}, ["seeds has an entry twice"]),
        ({"variants": {"x": {"fusion.spice": 1}}}, ["variants.x", "is not a field"]),
        ({"recommended": {"fusion.spice": 1}}, ["recommended", "is not a field"]),
        ({"curves": {"regions.p": [0.1, 2.0]}}, ["curves.regions.p", "at most 1"]),
        ({"curves": {"seed": [1, 2]}}, ["list repeats under `seeds`"]),
        ({"forgetting": [["a", "z"]]}, ["no task 'z'", "a, b, c"]),
        ({"forgetting": [["a", "a"]]}, ["name two tasks"]),
        ({"heuristic": [["a"], ["b"]]}, ["name every task once"]),
        ({"sft": {"x": {"spice": 1}}}, ["sft.x", "is not a field"]),
        ({"sft": {"x": {"steps": 9, "steps_per": "task"}}}, ["sft.x.steps:", "sft.x.steps_per:", "the budget's"]),
        (
            {
                "fixed": {f"tasks.{number}.metric": "choice" for number in range(3)},
                "contrasts": [{"method": "CPI-FT", "rival": "θ0", "by": "loss"}],
            },
            ["contrasts.0.by", "take retention"],
        ),
        ({"contrasts": [{"method": "CPI-FT", "rival": "θ0"}] * 2}, ["contrasts has an entry twice"]),
        ({"contrasts": [{"method": "CPI-FT", "rival": "CPI-FT"}]}, ["contrasts.0.rival", "the method itself"]),
        ({"budget": "total"}, ["budget: is not a field", "did you mean 'budgets'?"]),
    ],
)
def test_bad_comparisons_are_refused(tmp_path: Path, changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **changes)
    assert all(part in str(caught.value) for part in said)


def test_contrasts_of_methods_that_are_not_compared_are_refused(tmp_path: Path) -> None:
    contrasts = [{"method": "CPI-FT", "rival": "full SFT, balance"}, {"method": "x", "rival": "θ0"}]
    with pytest.raises(ConfigError) as caught:
        methods_of(load(tmp_path, contrasts=contrasts))
    assert "did you mean 'full SFT, balanced'?" in str(caught.value)
    assert "contrasts.1.method: 'x' is not compared" in str(caught.value)


WATCHED = {"evaluate_every": 2, "validation": {"rows": 2}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variants": {"curved": {"regions.measure": "curvature"}}}, "probe.keep_moments: is false.*(in 'curved')"),
        ({"recommended": {"regions.measure": "curvature"}}, "probe.keep_moments: is false.*(in 'CPI-FT, recommended')"),
        ({"curves": {"backbone.source": ["staged", "/nowhere"]}}, "'/nowhere' is no folder"),
        ({"variants": {"none": {"regions.include": ["nothing"]}}}, "leave no parameter"),
        ({"sft": {"hasty": WATCHED | {"patience": 1}}}, "backbone.training.patience: ends stages early.*hasty"),
        ({"sft": {"seen": {"evaluate_every": 2}}}, "backbone.training.evaluate_every: watches a loss on held-out"),
        ({"sft": {"small": {"optimizer": "adamw_8bit"}}}, "adamw_8bit needs bitsandbytes.*full SFT, small"),
    ],
)
def test_what_no_method_can_do_is_refused_before_any_is_trained(
    tmp_path: Path, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    comparison = load(tmp_path, **changes)
    preflight(comparison.base, stage="compare")
    with pytest.raises(ConfigError, match=said):
        require_possible(comparison)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"variants": {"CPI-FT": {"groups.tau": 0.5}}}, "CPI-FT"),
        ({"variants": {"linear average": {"groups.tau": 0.5}}}, "linear average"),
        ({"sft": {"balanced": {"learning_rate": 0.1}}}, "full SFT, balanced"),
        ({"sft": {"after probes": {}}, "budgets": ["total", "after_probes"]}, "full SFT, after probes"),
        ({"curves": {"regions.p": [0.1, 0.1]}}, "regions.p = 0.1"),
        ({"forgetting": [["a", "b"], ["b", "a"]]}, "CPI-FT: a → b"),
    ],
)
def test_no_two_methods_have_one_name(tmp_path: Path, changes: dict[str, Any], name: str) -> None:
    """Scores go by it."""
    with pytest.raises(ConfigError, match=f"methods: '{name}' is the name of two"):
        methods_of(load(tmp_path, **changes))


def test_a_primary_contrast_is_not_left_out(tmp_path: Path) -> None:
    contrasts = [{"method": "CPI-FT", "rival": "full SFT"}]
    comparison = load(tmp_path, contrasts=contrasts, methods=["linear*"])
    methods_of(comparison)  # a piece of it may be made alone
    with pytest.raises(ConfigError, match=r"contrasts\.0\.rival: 'full SFT' is not compared"):
        require_possible(comparison)


def test_methods_that_can_be_done_are_not_refused(tmp_path: Path) -> None:
    """Also where probes keep second moments: of plain SFT, trained as they are, nobody asks any."""
    kept = {"fixed": {"probe.keep_moments": True}, "variants": {"curved": {"regions.measure": "curvature"}}}
    comparison = load(tmp_path, **kept, sft={"half rate": {"learning_rate": 0.005}}, forgetting=[["a", "b"]])
    require_possible(comparison)
    fields = of_training(comparison.base, {})
    assert not comparison.run(fields, 0).backbone_training.keep_moments
    assert comparison.run(fields, 0).probe_training.keep_moments


def test_a_runs_own_file_is_a_comparison(smoke_config: Path) -> None:
    made = load_comparison(smoke_config)
    assert (made.name, made.base.output_dir.name) == ("smoke", "smoke")
    names = [method.name for method in methods_of(made)]
    assert names[:2] == ["θ0", "own probes"]
    assert set(MERGES) | set(PARTS) | {"full SFT", "sequential SFT", "CPI-FT"} <= set(names)


def test_methods_are_chosen_by_pattern(tmp_path: Path) -> None:
    made = load(tmp_path, methods=["*SFT*"], budgets=["after_probes", "total"])
    kinds = {method.kind for method in methods_of(made)}
    assert kinds == {"reference", "probe", "sft", "cpift"}
    assert [m.name for m in methods_of(made) if m.kind == "sft"][::5] == ["full SFT", "full SFT, total"]


@pytest.mark.parametrize(
    ("tasks", "stages", "sizes"), [(5, 3, [2, 1, 2]), (3, 3, [1, 1, 1]), (2, 5, [1, 1]), (4, 2, [2, 2])]
)
def test_stages_share_the_tasks(tasks: int, stages: int, sizes: list[int]) -> None:
    names = [f"t{number}" for number in range(tasks)]
    groups = in_stages(names, stages)
    assert [len(group) for group in groups] == sizes
    assert [name for group in groups for name in group] == names


def test_orders(tmp_path: Path) -> None:
    made = load(tmp_path)
    runs = [Pipeline(made.run({"tasks.1.train.size": 9}, seed), NoEngine(), quiet()) for seed in range(8)]
    assert together(runs[0]) == (TASKS,)
    assert by_rows(runs[0]) == ["b", "a", "c"]
    orders = {tuple(shuffled(run)) for run in runs}
    assert all(sorted(order) == sorted(TASKS) for order in orders)
    assert len(orders) > 2
    assert shuffled(runs[3]) == shuffled(runs[3])


def test_fine_tunes_from_before_tokens_were_counted_leave_no_number(tmp_path: Path) -> None:
    made = [Artifact(tmp_path, "probe", name, {}, {}, 1) for name in ("new", "old", "model")]
    for artifact, kept in zip(made, ({"tokens": [3, 4]}, {"seconds": 1.0}), strict=False):
        artifact.path.mkdir(parents=True)
        write_json(artifact.path / "training.json", kept)
    assert tokens_of([made[0], made[2]]) == 7
    assert tokens_of(made) is None


class Idle(InProcessEngine):
    """Nothing is to be made."""

    def fit(self, *_: Any) -> None:
        raise AssertionError("trained again")

    def evaluate(self, *_: Any) -> None:
        raise AssertionError("scored again")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Record]:
    folder = tmp_path_factory.mktemp("compare")
    made = load(
        folder,
        fixed={"tracking": [], "groups.tau": 1.0},
        seeds=[0, 1],
        methods=["full SFT*", "linear*", "one mixed stage", "in one stage", "*: ? → ?"],
        budgets=["total", "after_probes"],
        recommended={"fusion.omega": 0.0, "backbone.training": {**run_fields()["probe"], "steps_per": "task"}},
        variants={"in one stage": PARTS["one mixed stage"]},
        curves={"regions.p": [0.01, 0.05]},
        forgetting=[["a", "b"]],
        sft={"half rate": {"learning_rate": run_fields()["probe"]["learning_rate"] / 2}},
        contrasts=[
            {"method": "own probes", "rival": "θ0"},
            {"method": "CPI-FT", "rival": "full SFT, balanced, half rate", "by": "worst"},
        ],
        resamples=100,
    )
    return made, run_comparison(made, InProcessEngine(), quiet())


@pytest.mark.slow
def test_every_method_is_scored_on_every_row_with_every_seed(found: tuple[Comparison, Record]) -> None:
    made, record = found
    names = [method.name for method in methods_of(made)]
    assert [(row.seed, row.method) for row in record.rows] == [(seed, name) for seed in (0, 1) for name in names]
    assert all([len(one["items"]) for one in row.scores.values()] == [8, 8, 8] for row in record.rows)
    own = record.rows_of(PROBES)[0].scores
    assert own["b"] == record.rows_of("probe b")[0].scores["b"]


@pytest.mark.slow
def test_budgets_are_equal_in_tokens(found: tuple[Comparison, Record]) -> None:
    """Plain SFT sees what CPI-FT's fine-tunes saw, up to one batch of 4 rows of some 17 tokens."""
    record = found[1]
    tokens = {row.method: row.tokens for row in record.rows if row.seed == 0}
    assert tokens["full SFT"] == pytest.approx(tokens["CPI-FT"], abs=4 * 20)
    assert tokens["full SFT, balanced"] == pytest.approx(tokens["CPI-FT"], abs=4 * 20)
    later = tokens["CPI-FT"] - tokens["own probes"]
    assert 0 < tokens["full SFT, after probes"] == pytest.approx(later, abs=4 * 20)
    assert tokens["linear average"] == tokens["own probes"] == sum(tokens[f"probe {task}"] for task in TASKS)
    assert tokens["sequential SFT and replay: a → b"] == tokens["CPI-FT: a → b"] > tokens["sequential SFT: a → b"]


@pytest.mark.slow
def test_plain_sft_is_tuned_over_the_same_tokens(found: tuple[Comparison, Record]) -> None:
    record = found[1]
    for name in ("full SFT", "full SFT, balanced"):
        for budget in ("", ", after probes"):
            plain, tuned = (record.rows_of(f"{name}{title}{budget}")[0] for title in ("", ", half rate"))
            assert (tuned.tokens, tuned.groups, tuned.budget) == (plain.tokens, plain.groups, plain.budget)
            assert tuned.scores != plain.scores
            training = tuned.fields["backbone.training"]
            assert training["learning_rate"] == run_fields()["probe"]["learning_rate"] / 2
            assert not plain.fields


@pytest.mark.slow
def test_primary_contrasts_come_first(found: tuple[Comparison, Record], tmp_path: Path) -> None:
    findings = Findings(found[1])
    assert [outcome.contrast.method for outcome in findings.primary] == ["own probes", "CPI-FT"]
    first = findings.verdict()[0]
    assert first.startswith("own probes − θ0, mean retention: ")
    page = write_comparison(found[1], tmp_path).read_text()
    assert "Primary contrasts" in page
    assert "Primary contrasts" in (tmp_path / "comparison.md").read_text().partition("What it shows")[0]


@pytest.mark.slow
def test_planned_tokens_are_those_that_training_sees(found: tuple[Comparison, Record]) -> None:
    made, record = found
    run = Pipeline(made.run({}, 0), NoEngine(), quiet())
    planned = Budgets().of(run, "total")
    assert record.rows_of("CPI-FT")[0].tokens == pytest.approx(planned, rel=0.02)


@pytest.mark.slow
def test_a_mixed_stage_is_one_stage_of_the_same_length(found: tuple[Comparison, Record]) -> None:
    made, record = found
    run = Pipeline(made.run(PARTS["one mixed stage"], 0), NoEngine(), quiet())
    groups = run.group().groups
    artifact = order.outputs(run.artifacts, run.known())["integrate"]
    spec = integrate.spec(run, run.fuse(), groups, artifact)
    assert len(groups) == 3
    assert spec.training.steps == 3 * 2
    ((tasks, frozen),) = [(stage.tasks, stage.frozen) for stage in spec.stages]
    assert (sorted(tasks), frozen) == (sorted(TASKS), ())
    mixed, staged = (record.rows_of(name)[0].tokens for name in ("one mixed stage", "CPI-FT"))
    assert mixed == pytest.approx(staged, rel=0.05)


def test_parts_that_are_on_leave_fingerprints_as_they_were(tmp_path: Path) -> None:
    """Artifacts made before these fields existed are still found."""
    stages = Pipeline(load(tmp_path).base, NoEngine(), quiet()).artifacts
    fused = stages.fuse(((TASKS),), stages.base)
    assert "transplant" not in fused.fields
    assert "stages" not in stages.integrate(((TASKS),), fused).fields
    off = Pipeline(load(tmp_path).run(PARTS["no transplant"], 0), NoEngine(), quiet()).artifacts
    assert off.fuse(((TASKS),), off.base).fingerprint != fused.fingerprint


@pytest.mark.slow
def test_the_same_comparison_again_makes_nothing(found: tuple[Comparison, Record]) -> None:
    made, record = found

    assert run_comparison(made, Idle(), quiet()) == record


@pytest.mark.slow
def test_the_recommended_recipe_is_judged_like_the_papers(found: tuple[Comparison, Record]) -> None:
    verdict = Findings(found[1]).verdict()
    for name in ("CPI-FT", "CPI-FT, recommended"):
        assert any(f"{name} is shown above" in claim for claim in verdict)
        assert any(claim.startswith(f"{name} − full SFT") for claim in verdict)
        assert any(claim.startswith(f"{name}, forgetting against sequential SFT:") for claim in verdict)
    assert any(claim.startswith("CPI-FT, recommended − CPI-FT:") for claim in verdict)
    assert found[1].rows_of("CPI-FT, recommended: a → b")[0].fields["fusion.omega"] == 0.0


@pytest.mark.slow
def test_the_best_variant_is_told_with_what_picked_it(found: tuple[Comparison, Record]) -> None:
    parts = found[1].of_kind("part")
    others = [row for row in found[1].rows if row.kind != "variant"]
    rows = [replace(row, kind="variant") if row.kind == "part" else row for row in others]
    findings = Findings(replace(found[1], rows=rows))
    best = max(parts, key=lambda name: findings.line(name).mean.mean)
    (claim,) = (claim for claim in findings.verdict() if claim.startswith(f"Of {len(parts)} variants “{best}”"))
    assert "picked by these very scores" in claim
    assert f"{best} is shown above" in claim


@pytest.mark.slow
def test_the_aim_counts_what_is_shown_and_what_each_seed_alone_has(found: tuple[Comparison, Record]) -> None:
    findings = Findings(found[1])
    rivals = [name for name in findings.methods if findings.kind(name) in ("sft", "merge")]
    outcomes = [findings.against("CPI-FT", rival) for rival in rivals]
    ahead = sum(side(one.mean) > 0 for one in outcomes)
    larger = sum(all(value > 0 for value in [*one.mean.values, *one.worst.values]) for one in outcomes)
    claim = findings.aim("CPI-FT", rivals)
    assert f"of {len(rivals)} baselines in both" in claim
    assert f"in mean retention alone above {ahead}, and below" in claim
    assert f"it is above {larger} in both" in claim


@pytest.mark.slow
def test_a_pair_is_learnt_in_both_orders(found: tuple[Comparison, Record]) -> None:
    """Both have the same probes and regions, so that the second's groups could be taken for the first's."""
    for name in ("sequential SFT", "CPI-FT", "CPI-FT, recommended"):
        assert found[1].rows_of(f"{name}: a → b")[0].groups == [["a"], ["b"]]
        assert found[1].rows_of(f"{name}: b → a")[0].groups == [["b"], ["a"]]


@pytest.mark.slow
def test_a_record_reads_as_it_was_written(found: tuple[Comparison, Record], tmp_path: Path) -> None:
    write_record(found[1], tmp_path / "one.jsonl")
    again = read_record(tmp_path / "one.jsonl")
    assert document(again, "x") == document(found[1], "x")
    (tmp_path / "two.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="cpift compare"):
        read_record(tmp_path / "two.jsonl")


@pytest.mark.slow
def test_the_report_has_every_method_and_no_absolute_path(found: tuple[Comparison, Record], tmp_path: Path) -> None:
    page = write_comparison(found[1], tmp_path).read_text()
    for method in methods_of(found[0]):
        shown = html(method.name.partition(":")[0] if method.pair else method.name.removeprefix("regions.p = "))
        assert shown in page
    assert "no difference shown" in page
    assert page.index(html(Findings(found[1]).verdict()[0])) < page.index("<table") < page.index("<svg")
    assert page.count("<svg") == page.count('role="img"><title>') == page.count('class="behind"')
    assert {file.name for file in tmp_path.iterdir()} == set(written_files([])), "no method of its curve was chosen"
    assert str(tmp_path.parent.parent) not in page
    assert all((tmp_path / file).read_text().startswith("<svg") for file in document(found[1], "comparison")[1])


@pytest.mark.slow
def test_pieces_add_up_to_the_whole(found: tuple[Comparison, Record], tmp_path: Path) -> None:
    """Two seeds recorded on two days, the second of them in two goes, are the comparison of both."""
    made, record = found
    first, second = (
        run_comparison(replace(made, config=made.config.model_copy(update={"seeds": (seed,)})), Idle(), quiet())
        for seed in (0, 1)
    )
    assert joined(first, second).rows == record.rows
    assert joined(first, second).header.seeds == [0, 1]
    begun = replace(second, rows=[row for row in second.rows if row.kind == "reference"])
    piece = joined(first, begun)
    assert finished(piece).rows == first.rows
    assert finished(record) == record
    rest = ComparisonWork(made, Idle(), quiet(), {(row.method, row.seed) for row in piece.rows})
    rest.make()
    assert {row.seed for row in rest.record().rows} == {1}
    assert joined(piece, rest.record()).rows == record.rows
    late = [[row for row in record.rows if (row.kind == "sft") == trained] for trained in (False, True)]
    assert joined(*(replace(record, rows=rows) for rows in late)).rows == record.rows  # in the comparison's order


@pytest.mark.slow
def test_a_piece_that_was_stopped_keeps_what_is_finished(found: tuple[Comparison, Record], tmp_path: Path) -> None:
    config = found[0].config.model_copy(update={"seeds": (0,), "methods": ("linear average",)})
    made = replace(found[0], base=found[0].base.model_copy(update={"output": tmp_path}), config=config)

    class Stopping(InProcessEngine):
        def evaluate(self, scorings: Sequence[Scoring], *rest: Any) -> None:
            super().evaluate(scorings[:3], *rest)
            raise KeyboardInterrupt

    work = ComparisonWork(made, Stopping(), quiet())
    with pytest.raises(KeyboardInterrupt):
        work.make()
    rows = work.record().rows
    assert 0 < len(rows) < len(work.entries)
    by_name = {(row.method, row.seed): row.scores for row in found[1].rows}
    assert all(row.scores == by_name[row.method, row.seed] for row in rows)


@pytest.mark.slow
def test_merges_that_are_only_scored_are_never_written(
    found: tuple[Comparison, Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between them the comparison goes on, with the rows of the one whose merges were written and read."""
    config = found[0].config.model_copy(update={"seeds": (0,), "methods": ("linear average", "SLERP")})
    folder = shutil.copytree(found[0].base.output_dir, tmp_path / "out")
    made = replace(found[0], base=found[0].base.model_copy(update={"output": folder}), config=config)

    def merges() -> list[Entry]:
        work = ComparisonWork(made, InProcessEngine(), quiet())
        return [entry for entry in work.entries if entry.method.kind == "merge"]

    def forget() -> None:
        for entry in merges():
            scored = entry.run.artifacts.evaluate(ModelRef.of("fused", entry.fused()))
            shutil.rmtree(scored.path, ignore_errors=True)
            shutil.rmtree(entry.fused().path, ignore_errors=True)

    forget()
    on_gpu = InProcessEngine(DeviceMerging(torch.device("cpu")))
    assert len(ComparisonWork(made, on_gpu, quiet())._only_scored()) == 2
    spread = made.base.resources.model_copy(update={"distributed": True})
    cluster = replace(made, base=made.base.model_copy(update={"resources": spread}))
    assert ComparisonWork(cluster, InProcessEngine(), quiet())._only_scored() == [], "whose nodes' memory is not known"
    with monkeypatch.context() as through_disk:
        through_disk.setattr(ComparisonWork, "_only_scored", lambda self: [])
        record = run_comparison(made, InProcessEngine(), quiet())
    assert all(entry.fused().has_weights for entry in merges())
    forget()

    class Stopping(InProcessEngine):
        def evaluate(self, scorings: Sequence[Scoring], *rest: Any) -> None:
            assert [scoring.merge is not None for scoring in scorings] == [True, True], "side by side"
            super().evaluate(scorings[:1], *rest)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_comparison(made, Stopping(), quiet())
    of = holders(2)

    class Keeping(InProcessEngine):
        @contextmanager
        def keeping(self, runs: Sequence[Pipeline], view: Any) -> Iterator[Any]:
            yield partial(asking, holders=of)

    again = run_comparison(made, Keeping(), quiet())
    assert all(ask.calls["piece"] for ask in of.asks), "models that others hold are merged there"  # type: ignore[attr-defined]  # what stands in for them counts
    assert [(row.method, row.scores) for row in again.rows] == [(row.method, row.scores) for row in record.rows]
    states = {entry.method.name: entry.fused().state().kind for entry in merges()}
    assert states == {"linear average": "dropped", "SLERP": "dropped"}
    run_comparison(made, Idle(), quiet())  # and stays cached
    entry = merges()[0]
    arguments = shlex.split(entry.fused().manifest()["dropped"]["remake"])
    assert arguments[:2] == ["cpift", "fuse"]
    remade = load_config(Path(arguments[2]), [argument.removeprefix("--set=") for argument in arguments[3:]])
    fused = Pipeline(remade, NoEngine(), quiet()).fuse()
    assert fused.path == entry.fused().path
    hashed = entry.fused().manifest()["outputs"]["model.safetensors"]
    assert file_sha256(fused.path / "model.safetensors") == hashed


@pytest.mark.slow
def test_pieces_of_different_comparisons_do_not_add_up(found: tuple[Comparison, Record]) -> None:
    record = found[1]
    other = replace(record, header=replace(record.header, config=record.header.config | {"regions": {"p": 0.5}}))
    with pytest.raises(ConfigError, match="run: differs between the pieces"):
        joined(record, other)
    newer = record.header.config | {"spice": 1, "regions": record.header.config["regions"] | {"salt": 2}}
    assert joined(record, replace(record, header=replace(record.header, config=newer))).rows == record.rows
    renamed = [replace(row, fields={"regions.p": 0.5}) if row.method == "CPI-FT" else row for row in record.rows]
    with pytest.raises(ConfigError, match="CPI-FT: has other fields"):
        joined(record, replace(record, rows=renamed))


# ---- baselines of a run ----------------------------------------------------------------------------------------------

BESIDE = {"linear": {}, "ties": {"weight": 1.5}, "full_sft": {"learning_rate": 0.004, "balanced": True}}


class Asked(InProcessEngine):
    """Keeps what it was asked to train; `failing` fails."""

    def __init__(self, failing: str = "") -> None:
        super().__init__()
        self.failing, self.asked = failing, list[list[str]]()

    def fit(self, specs: Sequence[FitSpec], on_progress: OnProgress) -> None:
        self.asked.append([spec.title for spec in specs])
        super().fit([spec for spec in specs if spec.title != self.failing], on_progress)
        if any(spec.title == self.failing for spec in specs):
            raise StageError(f"1 of {len(specs)} failed")


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A run with baselines, made in this process."""
    config = run_config(tmp_path_factory.mktemp("beside"), baselines=BESIDE)
    run = Pipeline(config, Asked(), quiet(), baselines=OF_RUNS)
    report(run)
    return run


def run_config(folder: Path, **changes: Any) -> RunConfig:
    fields = run_fields() | {"output": str(folder / "out"), "tracking": [], "groups": {"tau": 1.0}} | changes
    return parse_config(fields, folder, "test")


@pytest.mark.slow
def test_a_runs_baselines_are_scored_and_reported(beside: Pipeline) -> None:
    data = gather(beside)
    assert data.models == [
        "base", "probe a", "probe b", "probe c", "backbone", "average", "TIES", "full SFT", "fused", "final"
    ]  # fmt: skip
    assert set(data.curves) > {"full SFT", "integration"}
    assert {"average", "TIES", "full SFT", "evaluate TIES"} <= set(beside.outputs())
    page = (beside.root / "report.html").read_text()
    assert page.index("One model: ") < page.index("from transformers import pipeline") < page.index("<table")
    assert (beside.root / data.model / "model.safetensors").is_file()


@pytest.mark.slow
def test_plain_sft_is_trained_beside_the_integration(beside: Pipeline, tmp_path: Path) -> None:
    assert isinstance(beside.engine, Asked)
    assert beside.engine.asked == [["probe a", "probe b", "probe c"], ["backbone"], ["integration", "full SFT"]]
    alone = with_fields(beside.config, {"resources.threads_alone": 2}, "test")
    assert fits_beside(Pipeline(alone, NoEngine(), quiet())) == [], "two threads there, one here"
    made = beside.outputs()
    again = with_fields(beside.config, {"output": str(tmp_path / "out")}, "test")
    shutil.copytree(beside.root, tmp_path / "out")
    for artifact in (made["full SFT"], made["integrate"]):
        shutil.rmtree(tmp_path / "out" / artifact.path.relative_to(beside.root))
    run = Pipeline(again, Asked("full SFT"), quiet(), baselines=OF_RUNS)
    with pytest.raises(StageError, match="1 of 2 failed"):
        report(run)
    final = run.artifacts.integrate(run.group().groups, made["fuse"])
    kept, first = (one.manifest()["outputs"]["model.safetensors"] for one in (final, made["integrate"]))
    assert kept == first, "a failed baseline costs no other"
    report(Pipeline(again, engine := Asked(), quiet(), baselines=OF_RUNS))
    assert engine.asked == [["full SFT"]]


@pytest.mark.slow
def test_a_runs_baselines_are_those_of_a_comparison(beside: Pipeline, tmp_path: Path) -> None:
    """The same artifacts but for λ and learning rate, which a run may choose; and as many tokens as its fine-tunes."""
    made = load_comparison(comparison_file(tmp_path, fixed={"groups.tau": 1.0}), (), {"output": beside.root})
    average = next(method for method in methods_of(made) if method.name == "linear average")
    own = Pipeline(made.run(average.fields, 0), NoEngine(), quiet())
    found = make_baselines(beside)
    assert own.artifacts.fuse((), own.pretrained()).path == found["average"].path
    assert found["TIES"].fields["weight"] == 1.5
    fits = [*beside.artifacts.probes.values(), beside.artifacts.backbone(beside.group().groups)]
    fits.append(beside.outputs()["integrate"])
    assert tokens_of([found["full SFT"]]) == pytest.approx(tokens_of(fits), abs=4 * 20)
    assert found["full SFT"].fields["learning_rate"] == 0.004


@pytest.mark.slow
def test_a_runs_baselines_are_planned_and_made_once(beside: Pipeline) -> None:
    def planned(config: RunConfig) -> list[str]:
        artifacts = StageArtifacts(config)
        return [step.state for step in plan_all(artifacts).steps]

    again = Pipeline(beside.config, InProcessEngine(), quiet(), baselines=OF_RUNS)
    report(again)  # counts rows anew: each test has a cache of its own
    assert not again.worked
    assert set(planned(beside.config)) == {"cached"}
    other = with_fields(beside.config, {"baselines.ties.density": 0.5}, "test")
    assert planned(other).count("to do") == 2, "the merge and its scores"
    uncounted = with_fields(beside.config, {"integration.max_length": 31}, "test")
    assert planned(uncounted)[-2:] == ["after group"] * 2, "rows are not counted for a plan"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"baselines": {"mean": {}}}, ["baselines.mean", "is not a field"]),
        ({"baselines": {"linear": {"weight": 2}}}, ["baselines.linear.weight"]),
        ({"baselines": ["linear"]}, ["baselines"]),
        ({"baselines": {"full_sft": {}}, "integration": None}, ["baselines.full_sft", "no `integration`"]),
        ({"baselines": {"ties": {}}, "absent": "peft"}, ["baselines.ties", "pip install 'cpift[peft]'"]),
        ({"fusion": {"method": "dare"}, "absent": "peft"}, ["fusion.method", "pip install 'cpift[peft]'"]),
    ],
)
def test_baselines_that_cannot_be_made_are_refused(
    changes: dict[str, Any], said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = changes.pop("absent", None)
    for name in ("ties", "dare"):
        monkeypatch.setattr(METHODS[name], "extra", "peft")
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == absent else find(name, *more))
    with pytest.raises(ConfigError) as caught:
        preflight(run_config(tmp_path, **changes))
    assert all(part in str(caught.value) for part in said)
