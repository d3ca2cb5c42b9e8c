"""Tasks that arrive one after another: what each control holds, what is refused, and a whole comparison."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cpift_kernels import unpack_mask

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.compare.config import Comparison, load_comparison
from cpift.compare.files import arrival_table, write_comparison, written_files
from cpift.compare.findings import Findings
from cpift.compare.methods import methods_of, require_possible
from cpift.compare.record import Record, read_record
from cpift.compare.work import ComparisonWork, run_comparison
from cpift.console.view import quiet
from cpift.errors import ConfigError
from cpift.method.masks import read_mask
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.stages import regions
from cpift.training.spec import read_training
from tests.helpers.sweeps import run_fields

METHODS: dict[str, Any] = {
    "sequential SFT": {},
    "core frozen": {"hold": "core"},
    "random frozen": {"hold": "random"},
    "penalty": {"hold": "core", "penalty": 50.0},
    "weighted penalty": {"hold": "core", "penalty": 50.0, "weighted": True},
    "core only": {"hold": "others"},
    "half": {"hold": "half"},
    "L2-SP": {"hold": "all", "penalty": 50.0},
    "weighted L2-SP": {"hold": "all", "penalty": 50.0, "weighted": True},
    "interpolation": {"keep": 0.25},
    "replay": {"replay": 0.3},
}
RATES = [0.004, 0.01]
ARRIVAL = {"pairs": [["a", "b"]], "learning_rates": RATES, "methods": METHODS, "at": ["sequential SFT", 0.004]}


def load(folder: Path, arrival: dict[str, Any], **changes: Any) -> Comparison:
    path = folder / "compare.yaml"
    fixed = {"tracking": [], "probe.keep_moments": True, "probe.steps_per": "task"}
    fields = {
        "run": run_fields(),
        "fixed": fixed,
        "arrival": ARRIVAL | arrival,
        "methods": ["*: * → *"],
        "resamples": 100,
    }
    path.write_text(yaml.safe_dump(fields | changes, sort_keys=False))
    return load_comparison(path, (), {"output": folder / "out"})


@pytest.mark.parametrize(
    ("arrival", "said"),
    [
        ({"methods": {"x": {"penalty": 1.0}}}, "penalty: pulls back what `hold` names"),
        ({"methods": {"x": {"hold": "all"}}}, "leaves nothing to train"),
        ({"methods": {"x": {"hold": "core", "weighted": True}}}, "weighted: is of a penalty"),
        ({"methods": {"x": {"hold": "cores"}}}, "did you mean 'core'"),
        ({"methods": {"x": {"replay": 1.5}}}, "at most 1"),
        ({"methods": {}}, "methods"),
        ({"learning_rates": [0.1, 0.1]}, "has an entry twice"),
        ({"learning_rates": [0.0]}, "must be above 0"),
        ({"pairs": [["a", "z"]]}, "arrival.pairs: there is no task 'z'"),
        ({"pairs": [["a", "a"]]}, "arrival.pairs: a twice"),
        ({"at": ["sequential SFT", 0.5]}, "'sequential SFT' at 0.5 is none of"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, arrival: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, arrival)
    assert said in str(caught.value)


def test_what_the_run_lacks_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    require_possible(load(tmp_path, {}))
    with pytest.raises(
        ConfigError, match=r"weighted penalty\.weighted: is by the second moments.*keep_moments is false"
    ):
        require_possible(load(tmp_path, {}, fixed={}))
    with pytest.raises(ConfigError, match=r"core frozen\.hold: no mask can hold single elements"):
        require_possible(load(tmp_path, {}, fixed={"probe.lora": {"rank": 2}}))
    contrast = {"method": "penalties", "rival": "L2-SP", "by": "arrival"}
    with pytest.raises(ConfigError, match="did you mean 'penalty'"):
        require_possible(load(tmp_path, {}, contrasts=[contrast]))
    with pytest.raises(ConfigError, match=r"contrasts\.0\.by: arrival, and there is no arrival\.at"):
        load(tmp_path, {"at": None}, contrasts=[contrast])


def test_cpift_takes_part_only_if_it_is_named(tmp_path: Path) -> None:
    names = [method.name for method in methods_of(load(tmp_path, {}))]
    assert names[:2] == ["θ0", "own probes"]
    assert "CPI-FT" not in names
    assert [name for name in names if "→" in name][:2] == [f"sequential SFT {rate:g}: a → b" for rate in RATES]
    assert "CPI-FT" in [method.name for method in methods_of(load(tmp_path, {}, methods=["CPI-FT"]))]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Record]:
    contrast = {"method": "weighted penalty", "rival": "sequential SFT", "by": "arrival"}
    made = load(tmp_path_factory.mktemp("arrivals"), {}, contrasts=[contrast])
    return made, run_comparison(made, InProcessEngine(), quiet())


def models(made: Comparison, rate: float = 0.01) -> dict[str, Path]:
    """The model of every method at one learning rate, and A's probe."""
    work = ComparisonWork(made, InProcessEngine(), quiet())
    arrived = [entry for entry in work.entries if entry.method.arriving and entry.method.arriving.learning_rate == rate]
    paths = {str(entry.method.fields["arrival"]): entry.artifacts()[-1].path for entry in arrived}
    return paths | {
        "before": arrived[0].run.artifacts.probes["a"].path,
        "regions": regions.artifact(arrived[0].run.artifacts).path,
    }


@pytest.mark.slow
def test_every_control_holds_what_it_says(found: tuple[Comparison, Record]) -> None:
    paths = models(found[0])
    before = Checkpoint(paths["before"])
    same: dict[str, int] = dict.fromkeys(METHODS, 0)
    far: dict[str, float] = dict.fromkeys(METHODS, 0.0)
    for name, info in before.tensors.items():
        start = before.tensor(name).flatten()
        own, others = (unpack_mask(read_mask(paths["regions"], task, name), info.numel) for task in ("a", "b"))
        for label in METHODS:
            end = Checkpoint(paths[label]).tensor(name).flatten()
            same[label] += int((start == end).sum())
            far[label] += float((start.float() - end.float()).abs().sum())
            if label == "core frozen":
                assert torch.equal(start[own], end[own])
            if label == "core only":
                assert torch.equal(start[~others], end[~others])
        after, mean = (Checkpoint(paths[label]).tensor(name).flatten() for label in ("sequential SFT", "interpolation"))
        torch.testing.assert_close(mean, 0.25 * start + 0.75 * after, rtol=1e-5, atol=1e-7)
    assert same["half"] > 0.45 * before.numel > same["core frozen"]
    assert same["half"] < 0.6 * before.numel
    assert same["random frozen"] == pytest.approx(same["core frozen"], rel=0.2)
    assert far["random frozen"] != far["core frozen"]
    assert far["core only"] < 0.1 * far["sequential SFT"]
    for label in ("L2-SP", "weighted L2-SP", "penalty", "weighted penalty", "core frozen", "interpolation"):
        assert 0 < far[label] < far["sequential SFT"], label
    assert far["L2-SP"] < 0.8 * far["sequential SFT"]
    assert far["weighted penalty"] != far["penalty"]


@pytest.mark.slow
def test_only_replay_sees_rows_of_the_first_task(found: tuple[Comparison, Record]) -> None:
    paths = models(found[0])
    rows = {label: read_training(paths[label])["rows"][0] for label in METHODS if label != "interpolation"}
    assert {label: sorted(used) for label, used in rows.items() if label != "replay"} == {
        label: ["b"] for label in METHODS if label not in ("replay", "interpolation")
    }
    assert (rows["replay"]["a"]["rows"], rows["replay"]["b"]["rows"]) == (3, 8)  # of 8, rounded up
    tokens = {label: sum(read_training(paths[label])["tokens"]) for label in rows}
    assert tokens["replay"] == pytest.approx(tokens["half"], rel=0.1), "as long as one task's"


@pytest.mark.slow
def test_the_page_draws_a_line_a_method(found: tuple[Comparison, Record], tmp_path: Path) -> None:
    page = write_comparison(found[1], tmp_path).read_text()
    assert {path.name for path in tmp_path.iterdir()} == set(written_files([], [("a", "b")])) - {
        "comparison-methods.svg"
    }
    for text in ("Tasks that arrive", "a → b", "ΔA at the ΔB of sequential SFT 0.004", *METHODS):
        assert text in page
    table = arrival_table(found[1])
    assert table is not None
    assert table.row_count == len(METHODS) * len(RATES)
    unlearnt = replace(found[1].header, admission={task: {"admitted": False, "reasons": []} for task in "abc"})
    assert any(
        "At equal ΔB nothing is compared" in said for said in Findings(replace(found[1], header=unlearnt)).verdict()
    )
    findings = Findings(read_record(tmp_path / "comparison.jsonl"))
    assert len(findings.frontiers.points) == len(METHODS) * len(RATES)
    assert [one.contrast.by for one in findings.primary] == ["arrival"]
    assert findings.verdict()[0].startswith("weighted penalty − sequential SFT, ΔA at equal ΔB: ")
    ((first, kept, difference), *_) = findings.frontiers.estimates()
    assert (first, difference.mean) == ("sequential SFT", 0)
    point = next(point for point in findings.frontiers.points if point.learning_rate == 0.004)
    assert kept.mean == pytest.approx(point.change.first.mean)
    assert findings.pairs == [], "it is no forgetting protocol"


@pytest.mark.slow
def test_the_same_again_makes_nothing_and_a_lost_mean_is_made_without_training(
    found: tuple[Comparison, Record],
) -> None:
    made, record = found

    class Idle(InProcessEngine):
        def fit(self, *_: Any) -> None:
            raise AssertionError("trained again")

    assert run_comparison(made, Idle(), quiet()) == record
    (models(made)["interpolation"] / "model.safetensors").unlink()
    again = run_comparison(made, Idle(), quiet())
    assert [row.scores for row in again.rows] == [row.scores for row in record.rows]
    assert (models(made)["interpolation"] / "model.safetensors").is_file()
    assert [row.tokens for row in record.rows if row.kind == "arrival" and row.tokens is None] == []
