from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from cpift_kernels import pack_mask

from cpift.errors import CpiftError
from cpift.method.freezing import ElementAnchor, ElementFreezer, count_moved, snapshot
from tests.helpers.as_gpu import as_gpu

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1),
}


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Tanh(), torch.nn.Linear(13, 3)).to(dtype)


def bool_masks(model: torch.nn.Module, share: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.rand_like(p, dtype=torch.float32) < share for name, p in model.named_parameters()}


def packed(masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: pack_mask(mask) for name, mask in masks.items()}


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 12, accumulate: int = 2) -> None:
    torch.manual_seed(2)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        for _ in range(accumulate):
            model(torch.randn(5, 7).to(dtype)).float().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_moves_a_frozen_bit(name: str, share: float, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and name == "adagrad":
        pytest.skip("Adagrad's epsilon is zero in float16")
    model = network(dtype)
    masks = packed(bool_masks(model, share))
    before, start = snapshot(model, masks), copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    with ElementFreezer(model, masks) as freezer:
        freezer.attach(optimizer)
        train(model, optimizer)
    assert count_moved(before, snapshot(model, masks)) == 0
    total = sum(p.numel() for p in model.parameters())
    moved = sum(int((a != b).sum()) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    assert moved >= 0.5 * (total - freezer.frozen_elements)


@pytest.mark.parametrize("weighted", [False, True])
def test_kernels_of_a_gpu_hold_and_pull_the_same_bits(weighted: bool) -> None:
    """As compiled for one, in a launch a step for each size of element."""
    results = []
    for on_gpu in (False, True):
        with as_gpu() if on_gpu else nullcontext(Counter()) as launches:
            model = network(torch.bfloat16)
            masks = packed(bool_masks(model, 0.3))
            origin = {name: p.detach() + 1 for name, p in model.named_parameters()}
            freezer = ElementFreezer(model, masks)
            weights = {name: p.detach().abs() for name, p in model.named_parameters()}
            anchor = ElementAnchor(model, masks, 4.0, origin.__getitem__, weights.__getitem__ if weighted else None)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
            held_still = snapshot(model, masks)
            with freezer, anchor:
                freezer.attach(optimizer)
                before = launches["move_list_kernel"]
                train(model, optimizer, steps=2, accumulate=1)
                assert count_moved(held_still, snapshot(model, masks)) == 0
                anchor.attach(optimizer)
                train(model, optimizer, steps=1, accumulate=1)
            assert launches["move_list_kernel"] - before == (5 if on_gpu else 0)  # three put back, one pulled
            results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_free_elements_train_as_if_the_frozen_ones_were_constants() -> None:
    """Against AdamW over the free elements alone, clipped by their own norm: the definition of the masked update."""
    model = network()
    masks = bool_masks(model, 0.3)
    slow = copy.deepcopy(model)
    free = {name: p.detach()[~masks[name]].clone().requires_grad_() for name, p in slow.named_parameters()}
    reference = torch.optim.AdamW(free.values(), lr=0.05, weight_decay=0.1)
    torch.manual_seed(2)
    for _ in range(12):
        for _ in range(2):
            slow(torch.randn(5, 7)).square().mean().backward()
        for name, p in slow.named_parameters():
            assert p.grad is not None
            free[name].grad = p.grad[~masks[name]].clone()
            p.grad = None
        torch.nn.utils.clip_grad_norm_(free.values(), 0.05)
        reference.step()
        with torch.no_grad():
            for name, p in slow.named_parameters():
                p[~masks[name]] = free[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    with ElementFreezer(model, packed(masks)) as freezer:
        freezer.attach(optimizer)
        train(model, optimizer)
    for mine, wanted in zip(model.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)


def test_the_optimizers_state_of_frozen_elements_stays_zero() -> None:
    model = network()
    masks = bool_masks(model, 0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with ElementFreezer(model, packed(masks)) as freezer:
        freezer.attach(optimizer)
        train(model, optimizer)
    for name, parameter in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not optimizer.state[parameter][moment][masks[name]].any()


def test_after_detaching_everything_trains_again() -> None:
    model = network()
    masks = packed(bool_masks(model, 0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ElementFreezer(model, masks) as freezer:
        freezer.attach(optimizer)
    before = snapshot(model, masks)
    train(model, optimizer)
    assert count_moved(before, snapshot(model, masks)) > 0.9 * freezer.frozen_elements


def test_a_mask_for_no_parameter_is_an_error() -> None:
    with pytest.raises(CpiftError, match="cannot freeze ghost"):
        ElementFreezer(network(), {"ghost": torch.zeros(1, dtype=torch.int32)})


def test_a_tied_parameter_answers_to_each_of_its_names_but_takes_one_mask() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(5, 5, bias=False), "b": torch.nn.Linear(5, 5, bias=False)})
    model["b"].weight = model["a"].weight
    mask = pack_mask(torch.arange(25) % 2 == 0)
    assert ElementFreezer(model, {"b.weight": mask}).frozen_elements == 13
    with pytest.raises(CpiftError, match=r"a\.weight and b\.weight are one tied parameter"):
        ElementFreezer(model, {"a.weight": mask, "b.weight": mask})


def test_freezing_under_lora_is_refused() -> None:
    model = torch.nn.ModuleDict({"q": torch.nn.ModuleDict({"lora_A": torch.nn.Linear(5, 2)})})
    with pytest.raises(CpiftError, match=r"cannot freeze q\.weight under LoRA"):
        ElementFreezer(model, {"q.weight": torch.zeros(1, dtype=torch.int32)})


def test_the_freezer_holds_the_masks_the_frozen_values_and_no_more_than_a_few_numbers() -> None:
    model = network()
    masks = packed(bool_masks(model, 0.3))
    freezer = ElementFreezer(model, masks)
    held = {name: words for name, words in masks.items() if words.any()}
    least = sum(words.nbytes for words in held.values()) + 4 * freezer.frozen_elements
    assert least < freezer.nbytes <= least + 100 * len(held)


def test_an_anchor_pulls_only_masked_elements_back() -> None:
    """θ ← step(θ), then lr·strength of the way back where masked: against the same written out."""
    model, masks = network(), bool_masks(network(), 0.4)
    slow, start = copy.deepcopy(model), copy.deepcopy(model)
    optimizer, reference = (torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.1) for m in (model, slow))
    with ElementAnchor(model, packed(masks), 4.0, start.get_parameter) as anchor:
        anchor.attach(optimizer)
        train(model, optimizer)
    origin = dict(start.named_parameters())

    def back(*_: object) -> None:
        with torch.no_grad():
            for name, p in slow.named_parameters():
                p.copy_(torch.where(masks[name], p - 0.05 * 4.0 * (p - origin[name]), p))

    reference.register_step_post_hook(back)
    train(slow, reference)
    for one, other in zip(model.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    free = copy.deepcopy(start)
    train(free, torch.optim.AdamW(free.parameters(), lr=0.05, weight_decay=0.1))
    before = snapshot(start, packed(masks))
    far, near = (
        sum(float((snapshot(m, packed(masks))[name] - before[name]).abs().sum()) for name in before)
        for m in (free, model)
    )
    assert near < 0.5 * far


def test_an_anchor_pulls_by_weight_over_the_mean_weight() -> None:
    model, masks = network(), bool_masks(network(), 0.4)
    start = copy.deepcopy(model)
    weights = {
        name: torch.rand(p.shape, generator=torch.Generator().manual_seed(5)) for name, p in start.named_parameters()
    }
    anchor = ElementAnchor(model, packed(masks), 4.0, start.get_parameter, weights.__getitem__)
    anchor.attach(torch.optim.SGD(model.parameters(), lr=0.05))
    moved = {
        name: torch.randn(p.shape, generator=torch.Generator().manual_seed(6)) for name, p in start.named_parameters()
    }
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(moved[name])
    anchor.pull()
    mean = torch.cat([weights[name][mask] for name, mask in masks.items()]).mean()
    for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=True):
        share = (0.05 * 4.0 * weights[name] / mean).clamp(max=1)
        wanted = torch.where(masks[name], moved[name] + share * (q.detach() - moved[name]), moved[name])
        torch.testing.assert_close(p.detach(), wanted)
    with pytest.raises(CpiftError, match="are 0 wherever it pulls"):
        ElementAnchor(model, packed(masks), 4.0, start.get_parameter, lambda name: 0 * weights[name])


def test_an_anchor_never_goes_past_where_it_began() -> None:
    model, masks = network(), packed(bool_masks(network(), 1.0))
    before, optimizer = snapshot(model, masks), torch.optim.SGD(model.parameters(), lr=0.05)
    with ElementAnchor(model, masks, 1e9, copy.deepcopy(model).get_parameter) as anchor:
        anchor.attach(optimizer)
        train(model, optimizer)
    assert count_moved(before, snapshot(model, masks)) == 0
