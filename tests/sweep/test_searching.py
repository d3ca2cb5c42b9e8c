"""Optuna's studies: on disk they outlive a killed search, and each sampler finds what is better."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpift.errors import CpiftError
from cpift.sweep.searching import Search, optuna_study

optuna = pytest.importorskip("optuna")


@pytest.mark.slow
def test_a_study_on_disk_goes_on(tmp_path: Path) -> None:
    search = Search(method="optuna", samples=9, storage=f"sqlite:///{tmp_path / 'new' / 'study.db'}")
    first = optuna_study(search, "ways", [("mean_retention", 1), ("mean_loss", -1)]).opened()
    assert [direction.name for direction in first.directions] == ["MAXIMIZE", "MINIMIZE"]
    space = {"fusion.weight": optuna.distributions.FloatDistribution(0.2, 1.5)}
    asked = [first.ask(space) for _ in range(3)]
    first.tell(asked[0], [0.9, 0.1])
    first.tell(asked[1], state=optuna.trial.TrialState.FAIL)
    again = optuna_study(search, "ways", [("mean_retention", 1), ("mean_loss", -1)])
    assert again.tried(close=False) == [asked[0].params]
    assert again.opened().trials[2].state.name == "RUNNING"
    assert again.tried(close=True) == [asked[0].params]  # and what the killed search left open is closed
    assert again.opened().trials[2].state.name == "FAIL"
    assert again.opened().ask(space).params not in [trial.params for trial in asked]
    assert optuna_study(search, "others", [("mean_retention", 1)]).tried(close=True) == []


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_samplers_find_what_is_better(sampler: str) -> None:
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    study = optuna_study(Search(method="optuna", samples=60, sampler=sampler), "hill", [("score", 1)]).opened()
    study.optimize(lambda trial: -sum((trial.suggest_float(name, 0, 1) - 0.3) ** 2 for name in "ab"), 60)
    assert study.best_value > -0.01


def test_a_storage_that_cannot_be_used_is_named() -> None:
    with pytest.raises(CpiftError, match=r"search\.storage nosuch://") as error:
        optuna_study(Search(method="optuna", samples=1, storage="nosuch://x/y"), "ways", [("score", 1)])
    assert "check the URL" in str(error.value)
