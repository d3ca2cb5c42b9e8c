"""What is held where it is not cores: complements, random halves and everything, of tensors of any size."""

from __future__ import annotations

import torch
from cpift_kernels import pack_mask, unpack_mask

from cpift.method.held import HELD

SIZES = {"a": 1000, "b": 64, "c": 1, "outside": 40}


def held(kind: str, seed: str = "3/0") -> dict[str, torch.Tensor]:
    masks = HELD[kind](cores(), SIZES, seed)
    assert len(masks) == len([*masks]) == (3 if kind in ("cores", "random") else 4)
    return {name: unpack_mask(masks[name], SIZES[name]) for name in masks}


def cores() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: pack_mask(torch.rand(SIZES[name], generator=generator) < 0.1) for name in ("a", "b", "c")}


def test_others_are_all_but_the_cores_also_outside_of_the_parameter_space() -> None:
    inside, outside = held("cores"), held("others")
    assert all(torch.equal(outside[name], ~mask) for name, mask in inside.items())
    assert bool(outside["outside"].all())
    assert all(bool(mask.all()) for mask in held("all").values())
    assert all(torch.equal(pack_mask(mask), HELD["all"]({}, SIZES, "")[name]) for name, mask in held("all").items())


def test_a_half_is_drawn_anew_for_each_seed_and_tensor_and_alike_each_time() -> None:
    one, again, other = held("half"), held("half"), held("half", "3/1")
    assert all(torch.equal(one[name], again[name]) for name in SIZES)
    assert 400 < int(one["a"].sum()) < 600
    assert 350 < int((one["a"] ^ other["a"]).sum()) < 650
    assert not torch.equal(one["a"][:64], one["b"])
    assert all(torch.equal(pack_mask(mask), HELD["half"]({}, SIZES, "3/0")[name]) for name, mask in one.items())


def test_random_elements_are_as_many_in_every_tensor_and_others() -> None:
    inside, placed, other = held("cores"), held("random"), held("random", "4/0")
    assert {name: int(mask.sum()) for name, mask in placed.items()} == {n: int(m.sum()) for n, m in inside.items()}
    assert int((placed["a"] & inside["a"]).sum()) < 0.5 * int(inside["a"].sum())
    assert not torch.equal(placed["a"], other["a"])
