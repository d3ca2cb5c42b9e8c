"""What freezing adds to a training step: a Llama of SmolLM2-135M's shape, random weights, real forward and backward.

    python benchmarks/bench_freezing.py                    # 1, 10 and 30 % frozen; about three minutes on two cores
    python benchmarks/bench_freezing.py --shares 0.1 --steps 20

Steps with and without the freezer alternate, on one model and optimizer (AdamW, clipping, bf16 autocast where the
machine has it, as in cpift's fine-tunes). Rows in results/freezing.jsonl: medians of both, their ratio, the time of the
freezer by itself (zeroing gradients, restoring values), and its memory beside D/8 bytes of masks + the frozen values.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from cpift_kernels import pack_mask
from record import append

from cpift import freezing
from cpift.devices import native_bf16
from cpift.freezing import ElementFreezer, count_moved, snapshot

SHAPE = {
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


def measure(model: torch.nn.Module, share: float, steps: int, ids: torch.Tensor) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    masks = masks_of(model, share)
    before, freezer = snapshot(model, masks), ElementFreezer(model, masks)
    times: dict[str, list[float]] = {"without": [], "with": []}
    for number in range(2 * (steps + 1)):
        kind = ("without", "with")[number % 2]
        if kind == "with":
            freezer.restore()  # the step before has moved them
            freezer.attach(optimizer)
        times[kind].append(step(model, optimizer, ids))
        freezer.detach()
    assert count_moved(before, snapshot(model, masks)) == 0
    parameters = sum(parameter.numel() for parameter in model.parameters())
    median = {kind: statistics.median(found[1:]) for kind, found in times.items()}  # the first of each warms up
    return {
        "parameters": parameters,
        "frozen": freezer.frozen_elements,
        "share": share,
        "tokens": ids.numel(),
        "steps": steps,
        "seconds_without": round(median["without"], 4),
        "seconds_with": round(median["with"], 4),
        "overhead": round(median["with"] / median["without"] - 1, 4),
        "bytes_held": freezer.nbytes,
        "bytes_masks_and_values": parameters // 8 + 4 * freezer.frozen_elements,
    }


def freezer_alone(model: torch.nn.Module, share: float, repeats: int) -> dict[str, float]:
    """Median seconds of what one step calls: every gradient zeroed, every value restored."""
    masks = masks_of(model, share)
    freezer = ElementFreezer(model, masks)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradients = [(freezing._flat(parameter.grad), masks[name]) for name, parameter in model.named_parameters()]  # type: ignore[arg-type]
    times: dict[str, list[float]] = {"zero": [], "restore": []}
    for _ in range(repeats):
        started = time.perf_counter()
        for gradient, words in gradients:
            freezing.zero_masked_(gradient, words)
        middle = time.perf_counter()
        freezer.restore()
        times["zero"].append(middle - started)
        times["restore"].append(time.perf_counter() - middle)
    for parameter in model.parameters():
        parameter.grad = None
    return {f"seconds_{name}": round(statistics.median(found), 5) for name, found in times.items()}


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
        row = measure(model, share, options.steps, ids) | freezer_alone(model, share, 9) | {"threads": options.threads}
        row["alone_share_of_step"] = round((row["seconds_zero"] + row["seconds_restore"]) / row["seconds_without"], 4)
        append("freezing", [row])
        print(row, flush=True)


if __name__ == "__main__":
    main()
