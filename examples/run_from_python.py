"""A whole run from Python: what it will do, then the run, then its scores.

    python examples/run_from_python.py configs/smoke.yaml

The same call again finds everything done. Fine-tunes run on Ray; with --in-process one after another in this process.
"""

import sys

import cpift


def main(config: str, in_process: bool) -> None:
    for step in cpift.plan(config).steps:
        print(f"{step.stage:>10} {step.label:<12} {step.state}")

    result = cpift.run(config, in_process=in_process, progress=True)
    for model, tasks in result.scores.items():
        print(model, {task: round(score["loss"], 3) for task, score in tasks.items()})
    print(f"model: {result.model}\nreport: {result.report}")


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--in-process"]
    if len(arguments) != 1:
        sys.exit(__doc__)
    try:
        main(arguments[0], "--in-process" in sys.argv)
    except cpift.CpiftError as error:
        sys.exit(str(error))
