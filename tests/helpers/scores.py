"""Scores by hand, as `scores.json` has them: (model, task) → a record."""

from __future__ import annotations

from typing import Any

Scores = dict[str, dict[str, dict[str, Any]]]


def scored(metric: str, rows: list[Any], options: int = 4) -> dict[str, Any]:
    """A score as `scores.json` has it: rows of 0..1, of losses (loss, tokens)."""
    if metric == "loss":
        examples = [{"loss": loss, "tokens": tokens} for loss, tokens in rows]
    else:
        examples = [{"loss": 1.0, "tokens": 2, "score": value} for value in rows]
    if metric == "choice":
        examples = [row | {"option_nll": [0.0] * options} for row in examples]
    tokens = sum(row["tokens"] for row in examples)
    loss = sum(row["loss"] * row["tokens"] for row in examples) / tokens
    value = None if metric == "loss" else sum(row["score"] for row in examples) / len(examples)
    return {
        "metric": metric, "score": value, "loss": loss, "tokens": tokens, "rows": len(rows), "examples": examples
    }  # fmt: skip


def run_of(**rows: dict[str, list[Any]]) -> Scores:
    """Scores of the tasks `right`, of rows of 0 or 1, and `loss`, of losses over two tokens each, by model."""
    return {
        model.replace("_", " "): {
            "right": scored("number", values["right"]),
            "loss": scored("loss", [(value, 2) for value in values["loss"]]),
        }
        for model, values in rows.items()
    }


RUN = run_of(
    base={"right": [0, 0, 0, 0, 1], "loss": [4.0, 3.0, 4.0, 5.0]},
    probe_right={"right": [1, 1, 1, 1, 0], "loss": [4.0, 4.0, 4.0, 4.0]},
    probe_loss={"right": [0, 0, 0, 0, 0], "loss": [1.0, 2.0, 1.0, 2.0]},
    average={"right": [1, 1, 0, 0, 0], "loss": [2.0, 3.0, 3.0, 2.0]},
    full_SFT={"right": [1, 1, 1, 1, 1], "loss": [1.0, 2.0, 1.0, 2.0]},
    fused={"right": [1, 0, 0, 0, 0], "loss": [2.0, 2.0, 2.0, 2.0]},
    final={"right": [1, 1, 1, 0, 0], "loss": [1.5, 2.0, 1.5, 2.0]},
)
