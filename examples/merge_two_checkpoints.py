"""Merge two fine-tunes of one model into a folder that transformers loads.

    python examples/merge_two_checkpoints.py BASE FIRST SECOND OUT

BASE is the model that both were tuned from. Each is a folder, a LoRA adapter's folder, or a hub id.
"""

import sys

import cpift


def main(base: str, first: str, second: str, out: str) -> None:
    models = {"first": first, "second": second}
    cores = cpift.regions(base, models, p=0.01)
    print(cores)
    print("groups at one and a half times chance:", cores.groups(tau_chance=1.5).groups)

    merged = cpift.merge(base, models, out, cores=cores)
    print(f"{len(merged.checks)} checks passed; the model is in {merged.path}")

    plain = cpift.merge(base, models, f"{out}-ties", method="ties", density=0.2)
    print(f"the same two by TIES, to compare with: {plain.path}")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except cpift.CpiftError as error:
        sys.exit(str(error))
