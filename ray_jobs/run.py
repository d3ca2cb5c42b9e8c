"""Entry point for `ray job submit`: a whole run on the cluster that the job was submitted to.

ray job submit --address http://HEAD:8265 --working-dir . -- python ray_jobs/run.py --config configs/smoke.yaml
"""

from __future__ import annotations

import argparse
import sys

from cpift.cli import main


def arguments() -> list[str]:
    """Translate the job's flags to `cpift run`; everything unknown is passed on (for example --set, --output)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the run's YAML file, relative to the working directory")
    known, rest = parser.parse_known_args()
    return ["run", known.config, *rest]


if __name__ == "__main__":
    sys.argv = ["cpift", *arguments()]
    main()
