"""mergekit beside cpift: in an environment of its own, since the two need other versions of the same packages."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

MERGEKIT = "mergekit==0.1.5"
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def mergekit(venv: Path) -> Path:
    """mergekit's command, in an environment of its own, made if it is not there."""
    command = venv / "bin" / "mergekit-yaml"
    if not command.is_file():
        print(f"making {venv} for {MERGEKIT} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        pins = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
        torch_pin = next(line for line in pins if line.startswith("torch=="))
        for package in (torch_pin, MERGEKIT):
            subprocess.run([venv / "bin" / "pip", "install", "--quiet", package], check=True)
    return command


class MergekitSlerp:
    """`mergekit.merge_methods.slerp.slerp` of two vectors, in a process that holds its own copies of them."""

    def __init__(self, venv: Path, models: Sequence[Tensor], t: float):
        self._folder = tempfile.TemporaryDirectory()
        self._result = _shared(Path(self._folder.name) / "result", torch.empty_like(models[0]))
        for number, model in enumerate(models):
            _shared(Path(self._folder.name) / str(number), model).copy_(model)
        command = [mergekit(venv).with_name("python"), Path(__file__).with_name("mergekit_slerp.py"), self._folder.name]
        options = [str(models[0].dtype), models[0].numel(), t, torch.get_num_threads()]
        self._process = subprocess.Popen(
            [*map(str, command), *map(str, options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._ask("load")

    def run(self) -> None:
        """Merge once; the result stays in the other process."""
        self._ask("run")

    def result(self) -> Tensor:
        """What the last `run` made."""
        self._ask("save")
        return self._result

    def close(self) -> None:
        self._process.communicate()
        self._folder.cleanup()

    def _ask(self, what: str) -> None:
        questions, answers = self._process.stdin, self._process.stdout
        if questions is None or answers is None:
            raise RuntimeError("mergekit's process has no pipes")
        questions.write(what + "\n")
        questions.flush()
        if answers.readline().strip() != what:
            raise RuntimeError(f"mergekit's process ended, asked to {what}")


def _shared(path: Path, like: Tensor) -> Tensor:
    return torch.from_file(str(path), shared=True, size=like.numel(), dtype=like.dtype)
