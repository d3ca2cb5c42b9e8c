"""What it costs to make tokens of a task's rows, once for all workers of a run, and what it costs the next stage.

    python -m benchmarks.training.tokens                # 40,000 chats of three turns, some 460 tokens each
    python -m benchmarks.training.tokens --rows 4000    # where others use the machine too: the row says how busy it was

Rows in results/tokens.jsonl, seconds of wall time and of all processors: `asked`, one process in which the template is
asked for every reply (of fewer rows, in proportion); `made`, by `TokenFiles` in as many processes as there are cores;
`kept`, the same rows for another stage; `shorter`, for a stage with half the `max_length`. Tokens and labels of all
rows that `asked` made are compared. The tokenizer and the template are those of the demo's model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.record import append
from cpift.config.loading import read_yaml
from cpift.config.run import DataSource, ModelConfig
from cpift.data import tokenise as tokens
from cpift.data.tasks import load_examples, source_fingerprint
from cpift.data.templates import checked_templates
from cpift.data.token_files import TokenFiles
from cpift.data.written import asked
from cpift.models.sources import source_of

DEMO = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
WORDS = "".join(Path(tokens.__file__).read_text(encoding="utf-8")).split()  # some that a tokenizer cuts, some it knows


def write_chats(path: Path, rows: int, turns: int, words: int) -> DataSource:
    chance = random.Random(0)

    def text(count: int) -> str:
        return " ".join(chance.choices(WORDS, k=count))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            sizes = (("user", words // 3), ("assistant", words)) * turns
            messages = [{"role": role, "content": text(size)} for role, size in sizes]
            file.write(json.dumps({"messages": messages}) + "\n")
    return DataSource(file=path)


def timed(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    started, before = time.perf_counter(), os.times()
    result = work()
    after = os.times()
    spent = sum(after[:4]) - sum(before[:4])
    return {"seconds": round(time.perf_counter() - started, 2), "cpu_seconds": round(spent, 2)}, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 40_000), ("turns", 3), ("words", 45), ("max-length", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    tokenizer = source_of(ModelConfig(**read_yaml(DEMO)["model"])).tokenizer()
    assert tokenizer is not None
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        source = write_chats(folder / "rows.jsonl", options.rows, options.turns, options.words)
        sample = load_examples(source)[: max(options.rows // 20, 200)]

        def one_by_one() -> list[dict[str, list[int]]]:
            with checked_templates(), patch.object(tokens, "written", asked):
                return [tokens.tokenise(example, tokenizer, options.max_length) for example in sample]

        one_by_one()  # what is imported and compiled once
        spent, expected = timed(one_by_one)
        share = options.rows / len(sample)
        row: dict[str, Any] = {
            **vars(options),
            "asked": {name: round(value * share, 2) for name, value in spent.items()},
        }
        fingerprint = source_fingerprint(source)
        for name, part in zip(("made", "kept", "shorter"), (1, 1, 2), strict=True):
            wanted = partial(TokenFiles(folder / "tokens", tokenizer).rows, source, fingerprint)
            row[name], kept = timed(partial(wanted, options.max_length // part))
            if name == "made":
                assert [kept.rows[place] for place in range(len(sample))] == expected, "other tokens"
                row["tokens"] = int(kept.facts[0].sum())
        row["load"] = round(os.getloadavg()[0], 1)
    print(json.dumps(row, indent=1))
    append("tokens", [row])


if __name__ == "__main__":
    main()
