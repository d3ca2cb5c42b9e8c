"""What is not compiled is said by name; layers are no longer compiled when a stage is over."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from cpift.config.run import TrainingConfig
from cpift.errors import ConfigError
from cpift.pipeline.preflight import preflight
from cpift.training.possible import impossible, missing_here
from cpift.training.weights.compiling import compiled, fixed_length
from cpift.training.weights.reading import load_whole
from tests.helpers.small_runs import run_of, turns


def test_what_cannot_be_compiled_is_refused_by_name(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    asked = run_of(tmp_path, [turns("a", "b"), turns("c", "d")], probe__compile=True)
    preflight(asked)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=r"compile: needs a C compiler, and g\+\+ is not installed"):
        preflight(asked)
    monkeypatch.setenv("CXX", "icpx")
    trainings = [TrainingConfig(steps=1, compile=compile) for compile in (False, True)]
    assert missing_here(trainings[:1], "cpu") == []
    (problem,) = missing_here(trainings, "cpu")
    assert "icpx is not installed" in str(problem)
    (problem,) = missing_here(trainings, "cuda")
    assert "gcc or clang is not installed" in str(problem)
    assert impossible(base, trainings[1], "probe") == []
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "openai-gpt", "n_embd": 8, "n_head": 2, "n_layer": 1})
    )
    (problem,) = impossible(tmp_path, trainings[1], "probe")
    assert str(problem).startswith("probe.compile: is true, and transformers does not say what the model's layers are")


def test_layers_are_compiled_while_a_stage_is_trained(base: Path) -> None:
    import torch

    model = load_whole(base, torch.float32, "cpu")
    names = [name for name, _ in model.named_parameters()]
    with suppress(KeyError), compiled(model, True):
        assert sum(module._compiled_call_impl is not None for module in model.modules()) == 2
        assert [name for name, _ in model.named_parameters()] == names
        raise KeyError
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert [fixed_length(TrainingConfig(steps=1, max_length=24, compile=asked)) for asked in (True, False)] == [
        24,
        None,
    ]
