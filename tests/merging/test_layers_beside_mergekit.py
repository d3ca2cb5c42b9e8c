"""mergekit's files that name layers and tokens: the tensors that mergekit writes of them, beside ours.

`mergekit_files.json` has what mergekit 0.1.5 wrote of `models()`. With its environment in CPIFT_MERGEKIT it is asked
again, and `python -m tests.merging.test_layers_beside_mergekit` writes the file anew.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from cpift.cli.main import app
from cpift.pretrained.tokens import read_tokens
from tests.helpers.toys import make_toy

KEPT = Path(__file__).with_name("mergekit_files.json")
ENVIRONMENT = os.environ.get("CPIFT_MERGEKIT")


def layers(model: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    return {"model": f"./{model}", "layer_range": [first, end]} | ({"parameters": parameters} if parameters else {})


def slices(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"slices": [part if isinstance(part, dict) else {"sources": part} for part in parts]} | fields


ZERO = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}]
FILES: dict[str, dict[str, Any]] = {
    "frankenmerge": slices([layers("one", 0, 2)], [layers("two", 1, 3)], merge_method="passthrough"),
    "one model deeper": slices([layers("one", 0, 2)], [layers("one", 1, 3)], merge_method="passthrough"),
    "layers that begin as nothing": slices(
        [layers("one", 0, 2)], [layers("one", 1, 2, scale=ZERO)], [layers("one", 2, 3)], merge_method="passthrough"
    ),
    "fewer layers": slices([layers("one", 0, 1)], [layers("one", 2, 3, scale=0.5)], merge_method="passthrough"),
    "linear in the middle": slices(
        [layers("one", 0, 1, weight=1), layers("two", 0, 1, weight=0)],
        {"sources": [layers("one", 1, 3), layers("two", 0, 2)], "parameters": {"weight": 0.5}},
        merge_method="linear",
    ),
}
PAIR: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "./one", "parameters": {"weight": 1}}]}
PAIR["models"] += [{"model": "./other", "parameters": {"weight": 1}}]
ONTO: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "./one", "parameters": {"weight": 0.5}}
ONTO |= {"models": [{"model": f"./{name}"} for name in ("other", "third")]}
FILES |= {
    "union of tokens": PAIR | {"tokenizer_source": "union"},
    "tokens of the base": ONTO | {"tokenizer_source": "base"},
    "tokens of the other": PAIR | {"tokenizer": {"source": "./other"}},
    "union onto a base": ONTO | {"tokenizer": {"source": "union"}},
    "rows of single tokens": ONTO
    | {
        "tokenizer": {
            "source": "union",
            "tokens": {
                "<a>": {"source": "./third"},
                "<b>": {"source": {"kind": "zero"}, "force": True},
                "<c>": {"source": {"kind": "model_token", "model": "./other", "token": "ab"}, "force": True},
                "<new>": {"source": {"kind": "model_token", "model": "./one", "token_id": 2}},
            },
        }
    },
    "the mean of two": PAIR
    | {"models": [*PAIR["models"], {"model": "./third", "parameters": {"weight": 2}}], "tokenizer_source": "union"},
    "union of slices": slices(
        [layers("other", 0, 2)], [layers("one", 1, 2)], [layers("other", 2, 3)], merge_method="passthrough"
    )
    | {"tokenizer": {"source": "union"}},
}


def models(folder: Path) -> None:
    make_toy(folder / "one", 1)
    make_toy(folder / "two", 2)
    make_toy(folder / "other", 3, tokens=("<a>", "<b>"))
    make_toy(folder / "third", 4, tokens=("<b>", "<c>", "<a>"), rows=16)


Written = tuple[dict[str, torch.Tensor], dict[str, int]]  # tensors, and the numbers of tokens


def ours(name: str, folder: Path) -> Written:
    (folder / "merge.yml").write_text(yaml.safe_dump(FILES[name]))
    result = CliRunner().invoke(app, ["merge", "merge.yml", "ours", "--no-verify"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return written(folder / "ours")


def theirs(name: str, folder: Path) -> Written:
    """What mergekit writes."""
    (folder / "theirs.yml").write_text(yaml.safe_dump(FILES[name]))
    command = [f"{ENVIRONMENT}/bin/mergekit-yaml", "theirs.yml", "theirs", "--quiet"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=folder)
    return written(folder / "theirs")


def written(folder: Path) -> Written:
    return load_file(folder / "model.safetensors"), dict(read_tokens(folder).numbers)


def compare(found: Written, wanted: Written) -> None:
    """Bit for bit; rows of tokens by token, for mergekit numbers those that it adds in an order of chance."""
    (mine, numbers), (theirs_, others) = found, wanted
    assert mine.keys() == theirs_.keys()
    assert numbers.keys() == others.keys()
    for name, tensor in theirs_.items():
        assert mine[name].dtype == tensor.dtype
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert mine[name].shape == tensor.shape
            assert torch.equal(mine[name][list(numbers.values())], tensor[[others[token] for token in numbers]]), name
        else:
            assert torch.equal(mine[name], tensor), name


def packed(given: Written) -> dict[str, Any]:
    tensors = {
        name: [list(x.shape), base64.b64encode(x.contiguous().view(torch.uint8).numpy().tobytes()).decode()]
        for name, x in sorted(given[0].items())
    }
    return {"tensors": tensors, "tokens": given[1]}


def unpacked(kept: dict[str, Any]) -> Written:
    tensors = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.bfloat16).view(*shape)
        for name, (shape, text) in kept["tensors"].items()
    }
    return tensors, kept["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_merges_have_the_bits_that_mergekit_gave(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models(tmp_path)
    monkeypatch.chdir(tmp_path)
    compare(ours(name, tmp_path), unpacked(json.loads(KEPT.read_text(encoding="utf-8"))[name]))


@pytest.mark.skipif(ENVIRONMENT is None, reason="CPIFT_MERGEKIT names no environment of mergekit")
@pytest.mark.parametrize("name", FILES)
def test_merges_have_the_bits_that_mergekit_gives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models(tmp_path)
    monkeypatch.chdir(tmp_path)
    compare(ours(name, tmp_path), theirs(name, tmp_path))


def main() -> None:
    kept = {}
    for name in FILES:
        with tempfile.TemporaryDirectory() as folder:
            models(Path(folder))
            kept[name] = packed(theirs(name, Path(folder)))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(tensors)}" for name, tensors in kept.items())
    KEPT.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
