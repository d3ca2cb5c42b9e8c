"""Layers of a model under other numbers, and the model that several such make."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.stacked import Layers, Place, Stack, layers_in
from cpift.errors import CheckpointError
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.toys import make_toy


def test_layers_have_other_numbers_and_the_same_values(tmp_path: Path) -> None:
    model = Checkpoint(make_toy(tmp_path / "toy", 1, layers=4))
    assert layers_in(model) == 4
    views = [Layers(model, Place(0, 2, 0, 5)), Layers(model, Place(1, 3, 2, 5))]
    found = {name: view.tensor(name) for view in views for name in view.names}
    assert len(found) == 5 * 9 + 3
    name = "model.layers.{}.mlp.down_proj.weight"
    for new, old in ((0, 0), (1, 1), (2, 1), (3, 2), (4, 3)):
        assert torch.equal(found[name.format(new)], model.tensor(name.format(old)))
    assert "model.embed_tokens.weight" in views[0].tensors
    assert {"model.norm.weight", "lm_head.weight"} <= set(views[1].tensors)
    assert not {"model.norm.weight", "lm_head.weight"} & set(views[0].tensors)
    last = pickle.loads(pickle.dumps(views[1]))
    places = np.array([0, 7])
    assert torch.equal(last.gather(name.format(2), places, 3), model.gather(name.format(1), places, 3))
    assert torch.equal(last.slice(name.format(4), 3, 20), model.slice(name.format(3), 3, 20))

    stack = Stack(model, views, {**model.config, "num_hidden_layers": 5})
    assert set(stack.tensors) == set(found)
    assert stack.rewritten["config.json"]["num_hidden_layers"] == 5
    assert pickle.loads(pickle.dumps(stack)).tensors == stack.tensors
    assert stack.files == model.files


def test_what_stands_before_the_layers_is_the_first_slices(tmp_path: Path) -> None:
    before = (
        "decoder.embed_tokens.weight",
        "decoder.embed_positions.weight",
        "decoder.project_in.weight",
        "wpe.weight",
    )
    after = ("decoder.project_out.weight", "embed_out.weight", "ln_f.weight")
    names = (*before, *after, "decoder.layers.0.weight", "decoder.layers.1.weight")
    model = Checkpoint(save_checkpoint(tmp_path / "m", {name: torch.zeros(2) for name in names}))
    assert set(Layers(model, Place(0, 1, 0, 2)).tensors) == {*before, "decoder.layers.0.weight"}
    assert set(Layers(model, Place(0, 1, 1, 2)).tensors) == {*after, "decoder.layers.1.weight"}


def test_a_model_without_one_stack_of_layers_has_none_to_give(tmp_path: Path) -> None:
    both = {f"{side}.layers.0.weight": torch.zeros(2) for side in ("encoder", "decoder")}
    for name, tensors, told in (("two", both, "has layers in 2 places"), ("none", {"w": torch.zeros(2)}, "no layers")):
        with pytest.raises(CheckpointError, match=told):
            layers_in(Checkpoint(save_checkpoint(tmp_path / name, tensors)))
