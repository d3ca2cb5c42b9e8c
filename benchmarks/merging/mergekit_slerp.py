"""Runs in mergekit's environment, not in cpift's: see `mergekit_environment.MergekitSlerp`, which starts it.

    python mergekit_slerp.py FOLDER DTYPE ELEMENTS T THREADS

Vectors are FOLDER/0 and FOLDER/1, the result goes to FOLDER/result. Each line of the standard input (load, run, save)
is done and then echoed.
"""

from __future__ import annotations

import sys

import torch
from mergekit.merge_methods.slerp import slerp  # type: ignore[import-not-found]  # of another environment


def main(folder: str, dtype: str, elements: str, t: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    kind, factor = getattr(torch, dtype.removeprefix("torch.")), torch.tensor([float(t)])

    def mapped(name: str) -> torch.Tensor:
        return torch.from_file(f"{folder}/{name}", shared=True, size=int(elements), dtype=kind)

    vectors: list[torch.Tensor] = []
    merged = torch.empty(0)
    for line in sys.stdin:
        with torch.inference_mode():
            if line.strip() == "load":
                vectors = [mapped(name).clone()[None] for name in ("0", "1")]
            elif line.strip() == "run":
                merged = slerp(factor, *vectors)
            else:
                mapped("result").copy_(merged[0])
        print(line.strip(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
