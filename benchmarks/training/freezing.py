"""What freezing adds to a training step: a Llama of SmolLM2-135M's shape, random weights, real forward and backward.

    python -m benchmarks.training.freezing                    # 1, 10 and 30 % frozen; about three minutes on two cores
    python -m benchmarks.training.freezing --shares 0.1 --steps 20

Steps with and without the freezer alternate, on one model and optimizer (AdamW, clipping, bf16 autocast where the
machine has it, as in cpift's fine-tunes). Rows in results/freezing.jsonl:

    overhead          median of the ratios with / without of neighbouring steps, less 1; its quartiles are the noise
    in_step           seconds that a step spends in the freezer (zeroing gradients, restoring values), clocked inside
                      the very steps; in_step_share: of the step without. Steady where the steps themselves are not
    bytes_held        its memory, beside D/8 bytes of masks + the frozen values
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from cpift_kernels import pack_mask

from benchmarks.record import append
from cpift.devices import native_bf16
from cpift.method.freezing import ElementFreezer, count_moved, snapshot

SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def build() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**SHAPE))
    return model


def masks_of(model: torch.nn.Module, share: float) -> dict[str, torch.Tensor]:
    """Random elements: the worst case, for real cores lie closer together."""
    generator = torch.Generator().manual_seed(1)
    return {n: pack_mask(torch.rand(p.shape, generator=generator) < share) for n, p in model.named_parameters()}


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=native_bf16("cpu")):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


class Clock:
    """Adds up the seconds within the freezer's calls."""

    def __init__(self) -> None:
        self.seconds = {"zero": 0.0, "restore": 0.0}

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = call(*arguments)
            self.seconds[name] += time.perf_counter() - started
            return result

        return clocked


def measure(model: torch.nn.Module, share: float, steps: int, ids: torch.Tensor) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    masks = masks_of(model, share)
    before, freezer, clock = snapshot(model, masks), ElementFreezer(model, masks), Clock()
    freezer.restore = clock.around("restore", freezer.restore)  # type: ignore[method-assign]  # timed in place
    times: dict[str, list[float]] = {"without": [], "with": []}
    inside: dict[str, list[float]] = {"zero": [], "restore": []}
    zeroing = freezer._zeroing
    with mock.patch.object(freezer, "_zeroing", lambda place: clock.around("zero", zeroing(place))):
        for number in range(2 * (steps + 1)):
            kind = ("without", "with")[number % 2]
            if kind == "with":
                freezer.restore()  # the step before has moved them
                freezer.attach(optimizer)
                clock.seconds = dict.fromkeys(inside, 0.0)
            times[kind].append(step(model, optimizer, ids))
            freezer.detach()
            if kind == "with":
                for name, seconds in clock.seconds.items():
                    inside[name].append(seconds)
    assert count_moved(before, snapshot(model, masks)) == 0
    return figures(model, freezer, times, inside) | {"share": share, "tokens": ids.numel(), "steps": steps}


def figures(
    model: torch.nn.Module, freezer: ElementFreezer, times: dict[str, list[float]], inside: dict[str, list[float]]
) -> dict[str, Any]:
    """Of all steps but the first of each kind, which warms up."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    median = {kind: statistics.median(seconds[1:]) for kind, seconds in (times | inside).items()}
    ratios = [frozen / free - 1 for free, frozen in zip(times["without"][1:], times["with"][1:], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "parameters": parameters,
        "frozen": freezer.frozen_elements,
        "seconds_without": round(median["without"], 4),
        "seconds_with": round(median["with"], 4),
        "overhead": round(quartiles[1], 4),
        "overhead_quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "in_step": {name: round(median[name], 5) for name in inside},
        "in_step_share": round(sum(median[name] for name in inside) / median["without"], 4),
        "bytes_held": freezer.nbytes,
        "bytes_masks_and_values": parameters // 8 + 4 * freezer.frozen_elements,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.1, 0.3], help="of the elements frozen")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each kind")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build()
    ids = torch.randint(SHAPE["vocab_size"], (options.batch, options.length))
    for share in options.shares:
        row = measure(model, share, options.steps, ids) | {"threads": options.threads}
        append("freezing", [row])
        print(row, flush=True)


if __name__ == "__main__":
    main()
