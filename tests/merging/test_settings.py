"""Weights and densities that differ by model, over layers and by filter: against a merge of each tensor by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cpift
from cpift.config.run import FusionConfig
from cpift.config.settings import places_of, shown_setting, value_at
from cpift.errors import ConfigError, ProblemsError

NAMES = ("model.embed.weight", *(f"model.layers.{n}.{part}.w" for n in range(3) for part in ("attn", "mlp")), "head.w")
GRADIENT = [{"filter": "attn", "value": [0.2, 0.8]}, {"value": 0.4}]
AT = dict(zip(NAMES, (0.4, 0.2, 0.4, 0.5, 0.4, 0.8, 0.4, 0.4), strict=True))


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, torch.Tensor]]:
    draws = torch.Generator().manual_seed(0)
    base = {name: torch.randn(6, 8, generator=draws) for name in NAMES}
    moved = {
        task: {name: values + 0.1 * torch.randn(6, 8, generator=draws) for name, values in base.items()}
        for task in ("a", "b")
    }
    return {"base": base, **moved}


def merged(
    states: dict[str, dict[str, torch.Tensor]], names: tuple[str, ...], **fields: Any
) -> dict[str, torch.Tensor]:
    base, *tuned = ({name: one[name] for name in names} for one in states.values())
    return cpift.merge_state_dicts(base, dict(zip("ab", tuned, strict=True)), **fields)


@pytest.mark.parametrize(
    ("method", "field", "other"),
    [
        ("linear", "weights", {}),
        ("task_arithmetic", "weights", {"normalize": True, "scale": 0.5}),
        ("slerp", "t", {}),
        ("ties", "densities", {"weight": 0.7}),
        ("ties", "densities", {"normalize": True, "weights": {"a": 0.3, "b": 0.6}}),
        ("dare", "densities", {"weight": 0.7}),
        ("dare_ties", "densities", {"normalize": False}),
    ],
)
def test_each_tensor_has_its_number(
    method: str, field: str, other: dict[str, Any], states: dict[str, dict[str, torch.Tensor]]
) -> None:
    if method in ("ties", "dare"):
        pytest.importorskip("peft")

    def given(value: Any) -> dict[str, Any]:
        return other | {field: value if field == "t" else {"a": value}}

    found = merged(states, NAMES, method=method, **given(GRADIENT))
    for name in NAMES:
        (alone,) = merged(states, (name,), method=method, **given(AT[name])).values()
        assert torch.equal(found[name], alone), name
    assert not torch.equal(found[NAMES[1]], merged(states, NAMES, method=method, **given(0.4))[NAMES[1]])


def test_places_and_gradients() -> None:
    assert list(places_of(NAMES).values()) == [0, 0, 0, 0.5, 0.5, 1, 1, 1]
    ends = ("gpt_neox.embed_in.weight", "decoder.project_in.weight", "decoder.project_out.weight", "embed_out.weight")
    assert list(places_of(ends).values()) == [0, 0, 1, 1]
    assert [value_at([0, 1, 0], "x", place) for place in (0, 0.25, 0.5, 1)] == [0, 0.5, 1, 0]
    assert value_at([0.3], "x", 0.7) == 0.3
    assert shown_setting(GRADIENT) == "(attn 0.2 … 0.8; else 0.4)"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"weight": []}, "has 0 entries"),
        ({"weight": [0.0] * 1001}, "has 1,001 entries"),
        ({"weight": "much"}, "'much' is a text where a number belongs"),
        ({"weight": [[1]]}, "is a list where a number belongs"),
        ({"weights": {"a": [{"filter": "x"}]}}, "a case without `value`"),
        ({"weight": [{"filter": 3, "value": 1}]}, "a filter that is a number"),
        ({"weight": [{"fliter": "x", "value": 1}]}, "a case with 'fliter'"),
        ({"weight": [{"value": 1}, {"filter": "x", "value": 1}]}, "a case without `filter` before its end"),
        ({"weight": [1, {"value": 1}]}, "has a number among cases"),
        ({"weight": [{"value": [{"value": 1}]}]}, "has cases inside a case"),
        ({"density": [0.5, 50]}, "a fraction: 50 % is 0.5"),
        ({"densities": {"a": 0}}, "has to be above 0"),
        ({"t": [0, 1.5]}, "at least 0 and at most 1"),
        ({"weight": [{"filter": "self_attn", "value": 1}, {"value": 2}]}, "the filter 'self_attn' is in no tensor"),
        ({"weight": [{"filter": "attn", "value": 1}]}, "says nothing of 5 tensors"),
        ({"weights": {"a": [1, -1], "b": [-1, 1]}}, "sum to 0, and linear divides by it"),
        ({"method": "ties", "trim": "global", "density": [0.1, 0.2]}, "fusion.trim: is `global`"),
    ],
)
def test_what_is_wrong_is_said_by_name(
    fields: dict[str, Any], told: str, states: dict[str, dict[str, torch.Tensor]]
) -> None:
    with pytest.raises((ConfigError, ProblemsError), match=r"fusion\.") as caught:
        merged(states, NAMES, **({"method": "linear"} | fields))
    assert told in str(caught.value)


def test_a_number_is_kept_as_it_was() -> None:
    assert FusionConfig(weight=1, density=0.5).model_dump(mode="json") | {"weight": 1.0} == FusionConfig(
        weight=1.0, density=0.5
    ).model_dump(mode="json")


def test_a_power_of_ten_is_a_number_as_yaml_leaves_it() -> None:
    """YAML 1.1 takes 1e-3 for a text; a filter of that form is one."""
    given = FusionConfig(weight=[{"filter": "1e3", "value": ["1e-3", 2]}, {"value": "5E-1"}], density="1e-2")
    assert given == FusionConfig(weight=[{"filter": "1e3", "value": [0.001, 2]}, {"value": 0.5}], density=0.01)
    with pytest.raises(ValueError, match="at most 1"):
        FusionConfig(density="1e3")
    with pytest.raises(ValueError, match="is a text where a number belongs"):
        FusionConfig(weight="1e")
    with pytest.raises(ValueError, match="is a number where a number belongs"):
        FusionConfig(weight="1e999")
