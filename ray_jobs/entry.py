"""What the entry points share: a job's flags, handed on to the `cpift` command."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from cpift.cli.main import process


def start(command: str, document: str | None) -> None:
    """Run `cpift COMMAND CONFIG` with the job's flags; everything but --config is passed on (--set, --output).

    A job's working directory is a copy that Ray deletes later. So without --output the results go to the folder
    `$CPIFT_RUNS/<config's name>` (default ~/cpift-runs), which on several nodes must be storage that all of them see.
    """
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="the YAML file, relative to the working directory")
    known, rest = parser.parse_known_args()
    if not any(flag.split("=")[0] == "--output" for flag in rest):
        folder = Path(os.environ.get("CPIFT_RUNS", "~/cpift-runs")).expanduser() / Path(known.config).stem
        print(f"Results: {folder}", flush=True)
        rest += ["--output", str(folder)]
    sys.argv = ["cpift", command, known.config, *rest]
    process()
