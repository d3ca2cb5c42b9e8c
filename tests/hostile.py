"""Hostile inputs for every reader of files: a seed each, ways to break it, and what may come out: our errors alone.

    python -m tests.hostile --count 200000 [READER ...]

runs that many inputs a reader and prints how many were taken, refused, and the slowest; it stops at the first that
gets anything else out. `tests/untrusted/test_json.py` runs a few hundred of the same.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpift.checkpoints.lora_config import adapter_settings, setting_problems
from cpift.compare.record import read_record
from cpift.config.inputs import DataSource
from cpift.config.loading import load_config
from cpift.data.tasks import load_examples
from cpift.errors import CpiftError
from cpift.formats.gguf import read_gguf
from cpift.formats.safetensors import read_header
from cpift.formats.sizes import folder_problems
from cpift.report.model_card import license_of
from cpift.sweep.config import load_sweep
from cpift.untrusted.json import ANSWER, MODEL_CONFIG, parse_json, read_weight_map
from cpift.untrusted.patterns import Patterns
from cpift.untrusted.yaml import parse_yaml

RUN = """name: one
model: {scratch: {hidden_size: 16, layers: 1, heads: 2}}
tasks:
  - name: a
    train: &rows {procedural: addition, size: 4}
    test: *rows
probe: {steps: 2, batch_size: 2, learning_rate: 1.0e-3}
regions: {p: 0.1}
"""
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1 << 31, 1 << 40, 1 << 63, 1 << 64, 10**25, 10**400, 0.5, -0.0, 1e308, 1e-320),
    *(
        float("nan"),
        float("inf"),
        "",
        "a",
        "\0",
        "\ud800",
        "é" * 50,
        "../x",
        "/etc/passwd",
        "a" * 300,
        "(a+)+b",
        "[",
        {},
    ),
    *([], [[]], {"a": {"a": {}}}, ["a"], [1, 2, 3], {"": None}, "1e999", "{x:>99}", "F64", "true", "-", "\u202e"),
)
_TOKENS = (
    *(b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\n", b"\r", b"\0", b"\xff", b"\xef\xbb\xbf", b"null", b"true"),
    *(
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 50,
        b"9" * 5000,
        b"-0",
        b"\\ud800",
        b"[" * 2000,
        b'{"a":' * 300,
        b"&a ",
        b"*a",
    ),
    *(
        b"<<: ",
        b"- ",
        b"? ",
        b"!!python/name:os.system ",
        b"!!binary ",
        b"1:30",
        b"010",
        b".inf",
        b"---\n",
        b"\t",
        b"#",
        b"%",
    ),
    *(b"${HOME}", b"\x1b[31m", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", struct.pack("<Q", 1 << 63), struct.pack("<I", 9)),
)


def safetensors_seed() -> bytes:
    entry = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}
    other = {"dtype": "BF16", "shape": [3], "data_offsets": [8, 14]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": entry, "b": other}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(14)


def gguf_seed() -> bytes:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    fields = [
        text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama"),
        text(b"llama.block_count") + struct.pack("<II", 4, 1),
        text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"b"),
        text(b"tokenizer.ggml.scores") + struct.pack("<IIQff", 9, 6, 2, 0, 1),
    ]
    tensors = [text(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)) + b"".join(fields + tensors)
    return head + bytes(-len(head) % 32) + bytes(32)


def _header(file: Path) -> object:
    """What is taken here, the safetensors library takes too, and reads the same of it."""
    from safetensors import safe_open

    shapes = {info.name: info.shape for info in read_header(file)}
    with safe_open(file, framework="numpy") as opened:
        theirs = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    assert shapes == theirs, (shapes, theirs)
    return shapes


def _adapter(file: Path) -> object:
    settings = adapter_settings(file.parent)
    if not list(setting_problems(settings)):
        for field in ("rank_pattern", "alpha_pattern"):
            Patterns(settings.get(field) or {}, r"(.*\.)?({})$").first("model.layers.0.self_attn.q_proj")
    return settings


def _pattern(file: Path) -> object:
    pattern = file.read_bytes().decode("latin-1")
    return Patterns([pattern], r"(.*\.)?({})$").first("model.layers.0.self_attn.q_proj" + "a" * 40)


_LORA = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "rank_pattern": {"q_proj": 2, ".*v_proj": 8},
    "alpha_pattern": {},
}
_LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "vocab_size": 300,
    "text_config": {"n_layer": 2},
}
_ROW = {"messages": [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "b"}], "tools": '[{"a": 1}]'}
_SWEEP = (
    "run:\n"
    + "".join(f"  {line}\n" for line in RUN.splitlines())
    + "space: {regions.p: [0.1, 0.2], groups.tau: [0.1, 0.2]}\n"
)
_HEAD = {
    "name": "a",
    "config": {},
    "comparison": {},
    "tasks": {"a": "loss"},
    "seeds": [0],
    "parameters": 1,
    "versions": {},
}
_HEAD |= {"device": "cpu", "commit": None, "confidence": 0.95, "resamples": 100}
_MADE = {
    "method": "θ0",
    "kind": "reference",
    "seed": 0,
    "budget": None,
    "pair": ["a", "b"],
    "fields": {},
    "groups": [["a"]],
}
_MADE |= {"tokens": 1, "seconds": 0.5, "scores": {"a": {"score": None, "loss": 1.5, "items": [[1.5, 2]]}}}

# Reader → (the name of its file, a seed, what reads it).
READERS: dict[str, tuple[str, bytes, Callable[[Path], object]]] = {
    "json": ("x.json", json.dumps(_LLAMA).encode(), lambda file: parse_json(file.read_bytes(), MODEL_CONFIG)),
    "answer": ("x.json", b'{"choices": [{"message": {"content": "x"}}]}', lambda f: parse_json(f.read_bytes(), ANSWER)),
    "yaml": ("x.yaml", RUN.encode(), lambda file: parse_yaml(file.read_bytes())),
    "run": ("run.yaml", RUN.encode(), lambda file: load_config(file)),
    "set": ("set", b"regions.p=0.1", lambda file: load_config(file.parent / "kept.yaml", [_argument(file)])),
    "sweep": ("sweep.yaml", _SWEEP.encode(), lambda file: load_sweep(file)),
    "rows": ("x.jsonl", (json.dumps(_ROW) + "\n").encode() * 3, lambda file: load_examples(DataSource(file=file))),
    "header": ("model.safetensors", safetensors_seed(), _header),
    "index": (
        "i.json",
        b'{"metadata": {}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}',
        read_weight_map,
    ),
    "adapter": ("adapter_config.json", json.dumps(_LORA).encode(), _adapter),
    "pattern": ("pattern", rb"^model\.layers\.(0|1|[2-9]).*(q|v)_proj{1,3}$", _pattern),
    "sizes": ("config.json", json.dumps(_LLAMA).encode(), lambda file: folder_problems(file.parent, "model")),
    "gguf": ("x.gguf", gguf_seed(), read_gguf),
    "record": ("r.jsonl", f"{json.dumps(_HEAD)}\n{json.dumps(_MADE)}\n".encode(), read_record),
    "license": ("README.md", b"---\nlicense: mit\ntags: [a, b]\n---\n# Model\n", lambda file: license_of(file.parent)),
}


def _argument(file: Path) -> str:
    (file.parent / "kept.yaml").write_text(RUN, encoding="utf-8")
    return file.read_bytes().decode("utf-8", "surrogateescape")


def broken(seed: bytes, number: int) -> bytes:
    """The seed, damaged in the way of this number."""
    chance = random.Random(number)
    data = seed
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        data = chance.choice((_value, _value, _token, _token, _flip, _cut, _repeat, _end))(data, chance)
    return data


def _value(data: bytes, chance: random.Random) -> bytes:
    """Another value somewhere in a JSON text; a length before it (safetensors) is mended."""
    start = 8 if data[8:9] == b"{" else 0
    length = struct.unpack("<Q", data[:8])[0] if start else len(data.split(b"\n")[0])
    try:
        root = json.loads(data[start : start + length])
        node, places = root, list[Any]()
        while isinstance(node, (dict, list)) and node and (not places or chance.random() < 0.8):
            key = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
            places.append((node, key))
            node = node[key]
        holder, key = places[-1]
        holder[key] = chance.choice(_VALUES)
        if isinstance(holder, dict) and chance.random() < 0.2:
            holder[chance.choice(("extra", "", "shape", "x" * 100))] = holder.pop(key)
        text = json.dumps(root).encode()
    except (ValueError, IndexError, RecursionError):
        return _token(data, chance)
    return (struct.pack("<Q", len(text)) if start else b"") + text + data[start + length :]


def _token(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.choice(_TOKENS) + data[at + chance.choice((0, 0, 1, 4)) :]


def _flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data or b"x")
    for _ in range(chance.choice((1, 2, 10))):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def _cut(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    return data[:start] + data[start + chance.randrange(20) :]


def _repeat(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    stop = start + chance.randrange(60)
    return data[:stop] + data[start:stop] * chance.choice((1, 1, 50)) + data[stop:]


def _end(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def outcome(reader: str, data: bytes, folder: Path) -> str:
    """ "taken" or "refused"; any other exception comes out."""
    name, _, read = READERS[reader]
    (folder / name).write_bytes(data)
    try:
        read(folder / name)
    except CpiftError:
        return "refused"
    return "taken"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", default=list(READERS))
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        for reader in arguments.readers:
            folder = Path(scratch) / reader
            folder.mkdir()
            counts, slowest = {"taken": 0, "refused": 0}, (0.0, 0)
            for number in range(arguments.first, arguments.first + arguments.count):
                started = time.process_time()
                try:
                    counts[outcome(reader, broken(READERS[reader][1], number), folder)] += 1
                except BaseException as error:
                    error.add_note(f"{reader}, input {number}") if hasattr(error, "add_note") else None
                    raise
                slowest = max(slowest, (time.process_time() - started, number))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(f"{reader}: {counts}, slowest {slowest[0]:.2f} s (input {slowest[1]}), peak {peak} MiB", flush=True)


if __name__ == "__main__":
    main()
