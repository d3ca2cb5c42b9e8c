"""Rows that hold several examples: every class that is listed gives each what it gives it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cpift.pretrained.attention import APART, keeps_apart, mixing
from tests.helpers.classes import tiny

LENGTHS = (9, 5, 12)


@torch.no_grad()
def difference(model: Any) -> float:
    """Of logits in one row from those alone, relative to the largest; at least two examples."""
    rows = [torch.randint(3, 64, (length,)) for length in LENGTHS]
    alone = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    together = model(input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False).logits[0]
    return float((together - alone).abs().max() / alone.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(APART))
def test_a_listed_class_keeps_examples_apart(kind: str) -> None:
    model = tiny(kind)
    assert keeps_apart(model.config.to_dict())
    assert difference(model) < 1e-4


@pytest.mark.parametrize("kind", ["gpt_oss", "opt", "bloom"])
def test_of_others_some_do_not(kind: str) -> None:
    model = tiny(kind)
    assert not keeps_apart(model.config.to_dict())
    assert difference(model) > 1e-3


def test_layers_of_another_kind_are_not_known(tmp_path: Path) -> None:
    assert keeps_apart({"model_type": "llama", "layer_types": ["full_attention", "sliding_attention"]})
    assert not keeps_apart({"model_type": "llama", "layer_types": ["full_attention", "linear_attention"]})
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    (problem,) = mixing(tmp_path, "probe.packing")
    assert str(problem).startswith("probe.packing: is true, and with model_type 'mamba' examples")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert mixing(tmp_path, "probe.packing") == []
