"""Merging side by side with mergekit: same checkpoints, same disk, same dtype, same run.

    python -m benchmarks.merging.speed --work DIR [--venv DIR] [--size 1.2B 5B] [--cases slerp cpift-2 cpift-4]
    python -m benchmarks.merging.speed --work DIR --verification 5 [--size 1.2B] [--cases slerp cpift-2]

It writes Llama-shaped bf16 checkpoints into DIR (2.5 GB each at 1.2B, 5.4 GB at 2.7B, 10 GB at 5B), makes an
environment for mergekit (not this one) and measures whole commands, imports included: wall and processor time, peak
anonymous memory and peak resident memory of the process tree (mapped files included), and seconds to flush what a tool
left unwritten. Files that fit are read once before each measurement, so that both find them in the page cache.
`--verification N` asks what verification costs: N pairs of commands with and without it, each pair the other way round
than the one before, and the ratios of their times, with the load of the machine. Rows go to results/fusion.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.merging.mergekit_environment import MERGEKIT, mergekit
from benchmarks.record import append
from cpift.checkpoints.slices import pieces
from cpift.checkpoints.writing import ShardRecord, WriteBehind, plan_shards, write_index, write_shard
from cpift.formats.safetensors import FileWriter, TensorInfo

POLL_SECONDS = 0.02
TOOLS = ("mergekit", "cpift", "cpift+verify")
BLOCK = 1 << 24  # elements of the noise that weights are made of


@dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int = 8
    vocabulary: int = 128_256

    def tensors(self) -> list[TensorInfo]:
        h, i, kv = self.hidden, self.intermediate, self.hidden // self.heads * self.kv_heads
        shapes = {"model.embed_tokens.weight": (self.vocabulary, h), "model.norm.weight": (h,)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            shapes |= {f"{at}self_attn.{name}_proj.weight": shape for name, shape in _attention(h, kv).items()}
            shapes |= {f"{at}mlp.{name}_proj.weight": (i, h) for name in ("gate", "up")}
            shapes |= {f"{at}mlp.down_proj.weight": (h, i)}
            shapes |= {f"{at}{name}.weight": (h,) for name in ("input_layernorm", "post_attention_layernorm")}
        return [TensorInfo(name, shape, "BF16", Path()) for name, shape in sorted(shapes.items())]

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }


def _attention(hidden: int, kv: int) -> dict[str, tuple[int, int]]:
    return {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}


SHAPES = {
    "tiny": Shape(256, 512, 2, 8, vocabulary=4096),
    "1.2B": Shape(2048, 8192, 16, 32),
    "2.7B": Shape(2560, 10240, 25, 32),
    "5B": Shape(3072, 12288, 33, 24),
}


def make_checkpoint(folder: Path, shape: Shape, seed: int) -> None:
    """θ0 for seed 0, a fine-tune of it for others: weights of about 0.02, updates of about 1 % of that."""
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    base = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02
    moved = base if seed == 0 else base + torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed)) * 2e-4
    noise = torch.cat([moved, moved]).bfloat16()
    shards = plan_shards(shape.tensors(), 5 * 10**9)
    with WriteBehind(2 * BLOCK, 2) as writing:
        for shard in shards:
            write_shard(shard, folder, "made", partial(_noise, infos=shard.tensors, noise=noise, writing=writing))
    write_index(shards, folder)
    for note in folder.glob(".*.json"):
        note.unlink()
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")


def _noise(file: FileWriter, infos: Sequence[TensorInfo], noise: torch.Tensor, writing: WriteBehind) -> ShardRecord:
    for number, info in enumerate(infos):
        for start, stop in pieces(info.numel):
            out, at = writing.buffer(stop - start, info.dtype), (start + 7919 * number) % BLOCK
            out.copy_(noise[at : at + stop - start])
            writing.write(file, info.name, start, out)
    writing.drain()
    return {"tensors": []}


@dataclass
class Measured:
    """One command. Seconds; bytes. `flush`: what the disk still had to write when the command had ended."""

    wall: float
    user: float
    system: float
    flush: float
    peak_anonymous: int
    peak_resident: int


def measure(command: Sequence[str | Path], environment: dict[str, str]) -> Measured:
    """Run a command and watch its process tree. Raises RuntimeError with its output if it fails."""
    os.sync()
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output, env=os.environ | environment)
        watcher = _Watcher(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        watcher.stop()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(map(str, command))}\n{output.read()[-4000:]}")
    started = time.perf_counter()
    os.sync()
    flush = time.perf_counter() - started
    return Measured(wall, usage.ru_utime, usage.ru_stime, flush, watcher.anonymous, watcher.resident)


class _Watcher(threading.Thread):
    """Peaks of the sums over a process and its descendants, looked at every POLL_SECONDS.

    A process counts from the second look at it: until it executes its program, a child shares its parent's memory
    (vfork), which would be counted twice.
    """

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._pid, self._over = pid, threading.Event()
        self.anonymous = self.resident = 0
        self.start()

    def run(self) -> None:
        known: set[int] = set()
        while not self._over.wait(POLL_SECONDS):
            tree = set(_tree(self._pid))
            memories = [memory for pid in tree & known if (memory := _memory(pid))]
            known = tree
            self.anonymous = max(self.anonymous, sum(anonymous for anonymous, _ in memories))
            self.resident = max(self.resident, sum(resident for _, resident in memories))

    def stop(self) -> None:
        self._over.set()
        self.join()


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="utf-8").split():
                yield from _tree(int(child))
    except OSError:
        return


def _memory(pid: int) -> tuple[int, int] | None:
    """RssAnon and VmRSS in bytes."""
    try:
        lines = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        )
        return int(lines["RssAnon"].split()[0]) << 10, int(lines["VmRSS"].split()[0]) << 10
    except (OSError, KeyError):
        return None


def mergekit_slerp(work: Path, size: str, command: Path) -> list[str | Path]:
    config = work / "mergekit.yaml"
    models = [str(work / size / name) for name in ("t1", "t2")]
    recipe = {"merge_method": "slerp", "base_model": models[0], "models": [{"model": model} for model in models]}
    config.write_text(yaml.safe_dump(recipe | {"parameters": {"t": 0.5}, "dtype": "bfloat16"}), encoding="utf-8")
    return [command, config, work / "out", "--no-copy-tokenizer"]


def ours(work: Path, size: str, case: str, budget: str, *options: str) -> list[str | Path]:
    """`cpift fuse`: `slerp` of two fine-tunes, or `cpift-N`, regions and fusion of N."""
    count = 2 if case == "slerp" else int(case.split("-")[1])
    folders = {f"t{i}": {"path": str(work / size / f"t{i}")} for i in range(1, count + 1)}
    config = {
        "name": case,
        "model": {"path": str(work / size / "base")},
        "tasks": [{"name": name, "checkpoint": folder} for name, folder in folders.items()],
        "regions": {"p": 0.01},
        "backbone": {"source": "pretrained"},
        "fusion": {"method": "slerp"} if case == "slerp" else {},
    }
    path = work / f"{case}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = Path(sys.executable).with_name("cpift")
    return [command, "fuse", path, "--output", work / "out", "--memory-budget", budget, *options]


def warm(folders: Sequence[Path]) -> None:
    """Read files once, if all of them fit into half of the memory."""
    files = [file for folder in folders for file in folder.glob("*.safetensors")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sum(file.stat().st_size for file in files) < memory / 2:
        for file in files:
            subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)


def both_ways(work: Path, size: str, case: str, budget: str) -> dict[str, list[str | Path]]:
    return {"cpift": ours(work, size, case, budget, "--no-verify"), "cpift+verify": ours(work, size, case, budget)}


def folders_of(work: Path, size: str, case: str) -> list[Path]:
    """The models that a case reads."""
    count = 2 if case == "slerp" else int(case.split("-")[1])
    return [work / size / name for name in ([] if case == "slerp" else ["base"]) + [f"t{i + 1}" for i in range(count)]]


def verification(work: Path, size: str, cases: Sequence[str], budget: str, pairs: int) -> Iterator[dict[str, Any]]:
    """What verification costs: medians over pairs of runs, one beside the other."""
    for case in cases:
        found: list[dict[str, Measured]] = []
        for number in range(pairs):
            runs = list(both_ways(work, size, case, budget).items())
            found.append({})
            for tool, command in runs[:: -1 if number % 2 else 1]:
                shutil.rmtree(work / "out", ignore_errors=True)
                warm(folders_of(work, size, case))
                found[-1][tool] = measure(command, {"HF_HUB_OFFLINE": "1"})
        shutil.rmtree(work / "out", ignore_errors=True)
        walls = [[pair[tool].wall for pair in found] for tool in ("cpift", "cpift+verify")]
        processor = [[pair[tool].user + pair[tool].system for pair in found] for tool in ("cpift", "cpift+verify")]
        yield {
            "case": case,
            "tool": "cpift+verify / cpift",
            "size": size,
            "budget": budget,
            "pairs": pairs,
            "wall": [[round(value, 2) for value in tool] for tool in walls],
            "processor": [[round(value, 2) for value in tool] for tool in processor],
            "wall_ratio": round(statistics.median(with_ / without for without, with_ in zip(*walls, strict=True)), 3),
            "processor_ratio": round(statistics.median(w / o for o, w in zip(*processor, strict=True)), 3),
            "peak_anonymous": max(pair["cpift+verify"].peak_anonymous for pair in found),
            "load": round(os.getloadavg()[1], 1),  # processes over five minutes; one alone has about 1.5
        }


def rows(
    work: Path, size: str, cases: Sequence[str], venv: Path | None, budget: str, tools: Sequence[str]
) -> Iterator[dict[str, Any]]:
    parameters = sum(info.numel for info in SHAPES[size].tensors())
    for case in cases:
        read = 2 if case == "slerp" else int(case.split("-")[1]) + 1
        runs = both_ways(work, size, case, budget)
        if case == "slerp" and venv is not None:
            runs = {"mergekit": mergekit_slerp(work, size, mergekit(venv))} | runs
        for tool, command in ((tool, command) for tool, command in runs.items() if tool in tools):
            shutil.rmtree(work / "out", ignore_errors=True)
            warm(folders_of(work, size, case))
            measured = measure(command, {"HF_HUB_OFFLINE": "1"})
            yield {
                "case": case,
                "tool": MERGEKIT if tool == "mergekit" else tool,
                "size": size,
                "parameters": parameters,
                "models_read": read,
                "budget": None if tool == "mergekit" else budget,
                "ns_per_parameter_read": round(1e9 * measured.wall / (parameters * read), 3),
                **{key: round(value, 3) for key, value in asdict(measured).items()},
            }
            shutil.rmtree(work / "out", ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and outputs")
    parser.add_argument("--venv", type=Path, help="mergekit's environment [default: WORK/mergekit]")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS, help="what is measured [default: all]")
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=["1.2B"])
    parser.add_argument("--cases", nargs="+", default=["slerp", "cpift-2", "cpift-4"])
    parser.add_argument("--budget", default="512MiB")
    parser.add_argument("--verification", type=int, metavar="N", help="pairs of runs with and without verification")
    parser.add_argument("--prepare", action="store_true", help="make checkpoints and environment, measure nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the rows, keep none")
    options = parser.parse_args()
    beside = "mergekit" in options.tools and not options.verification
    venv = (options.venv or options.work / "mergekit") if beside else None
    for size in options.size:
        tasks = max(2 if case == "slerp" else int(case.split("-")[1]) for case in options.cases)
        for seed in range(tasks + 1):
            make_checkpoint(options.work / size / (f"t{seed}" if seed else "base"), SHAPES[size], seed)
        if venv is not None:
            mergekit(venv)
        if options.prepare:
            continue
        measured = rows(options.work, size, options.cases, venv, options.budget, options.tools)
        if options.verification:
            measured = verification(options.work, size, options.cases, options.budget, options.verification)
        for row in measured:
            print(json.dumps(row), flush=True)
            if not options.dry_run:
                append("fusion", [row])


if __name__ == "__main__":
    main()
