"""Quantised checkpoints: told by config.json or by their tensors, and refused with what makes them dense."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cpift.errors import Problem
from cpift.formats.safetensors import DTYPES, TensorInfo

_AFTER = "after"  # loaded as it is, then `dequantize()`
# transformers' quantisation methods → how its loader gives dense weights; None where it cannot.
METHODS: Mapping[str, str | None] = {
    "bitsandbytes": _AFTER,
    "higgs": _AFTER,
    "fp8": "FineGrainedFP8Config",
    "mxfp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "metal": "MetalConfig",
    "compressed-tensors": "CompressedTensorsConfig",
    **dict.fromkeys(("gptq", "awq", "aqlm", "vptq", "quanto", "eetq", "hqq", "fbgemm_fp8", "torchao", "bitnet")),
    **dict.fromkeys(("gguf", "spqr", "quark", "fp_quant", "auto-round", "nvfp4", "fouroversix", "sinq", "gemma")),
}
# Tensors that only a quantised file has, by the end of their names.
_MARKS = {
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_scale_inv": "fp8",
    ".weight_packed": "compressed-tensors",
    "_proj_blocks": "mxfp4",
    ".qweight": "gptq or awq",
}


def quantised(folder: Path, config: Mapping[str, Any], names: Iterable[str] = ()) -> Problem | None:
    """What is wrong with a quantised model folder: which method, and what to do; None if it is dense.

    config: its config.json; names: the tensors of its files, where they are known.
    """
    said = next((how for part in (config, *_nested(config)) if (how := _method(part))), None)
    mark = next((method for name in names for end, method in _MARKS.items() if name.endswith(end)), None)
    if said is None and mark is None:
        return None
    method = said or mark or ""
    what = f"holds quantised weights ({method}); core regions are elements of dense tensors"
    return Problem(str(folder), what, dense_remedy(folder, method))


def whole_numbers(base: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo]) -> Iterator[Problem]:
    """Where a tune has whole numbers under the name of θ0's floats."""
    for name, info in base.items():
        theirs = other.get(name)
        if theirs is not None and info.floating and not theirs.floating:
            kinds = " and ".join(DTYPES[tensor.kind] for tensor in (theirs, info))
            what = f"has whole numbers where θ0 has floats ({kinds}): it is quantised"
            yield Problem(name, what, "give the unquantised checkpoint that it was made from")
            return


def dense_remedy(folder: Path, method: str) -> str:
    """How to come from a quantised folder to dense weights."""
    how = METHODS.get(method)
    if how is None:
        return "give the unquantised checkpoint that it was made from; transformers does not make it dense"
    options = "" if how == _AFTER else f", quantization_config=t.{how}(dequantize=True)"
    code = (
        f"import transformers as t; f = {str(folder)!r}; o = {str(folder) + '-dense'!r}; "
        f"m = t.AutoModelForCausalLM.from_pretrained(f, dtype='bfloat16'{options}); "
        f"{'m = m.dequantize(); ' if how == _AFTER else ''}"
        # What was dequantised while it was loaded would be quantised again in the original format.
        "m.save_pretrained(o, save_original_format=False); t.AutoTokenizer.from_pretrained(f).save_pretrained(o)"
    )
    return f'make it dense and give the folder that it writes: python -c "{code}"'


def _method(config: Mapping[str, Any]) -> str | None:
    section = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(section, dict):
        return None
    bits = any(section.get(name) for name in ("load_in_4bit", "load_in_8bit"))
    return "bitsandbytes" if bits else str(section.get("quant_method", "a method that it does not name"))


def _nested(config: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return (value for value in config.values() if isinstance(value, dict))
