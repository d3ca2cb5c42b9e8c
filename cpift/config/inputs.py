"""What a run starts from: models, checkpoints, rows. And what all sections of a run's YAML file share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cpift.config.columns import Template, check_template
from cpift.config.identity import GIVEN, ROWS, identity
from cpift.errors import ConfigError, Problem
from cpift.text.units import parse_size

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Precision = Literal["auto", "bfloat16", "float32"]


def _identifier(name: str) -> str:
    if len(name.encode("utf-8", "replace")) > 120:
        raise ValueError("is too long for a file name: give at most 120 bytes")
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise ValueError("use letters, digits, '-', '_' and '.' only: the name becomes part of file names")
    return name


Bytes = Annotated[int, BeforeValidator(parse_size, json_schema_input_type=int | str), Field(ge=1, lt=2**62)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]  # what torch, numpy and transformers all take, with a stage's number added
_LARGEST = 2**31  # of numbers that count something
_MOST_PARAMETERS = 10**9  # of a model with random weights
Value = TypeVar("Value")


def needed(value: Value | None, field: str, purpose: str) -> Value:
    """A section that a stage needs. Raises ConfigError naming it where the file has none."""
    if value is None:
        raise ConfigError("config", [Problem(field, "is not there", f"{purpose} needs it")])
    return value


def _in_repository(path: str) -> str:
    if not re.fullmatch(r"[\w.*?\[\]-][\w./*?\[\] ,=-]*", path) or ".." in path.split("/"):
        raise ValueError("is no path inside the repository, such as data/train-*.parquet")
    return path


RepositoryFile = Annotated[str, AfterValidator(_in_repository)]
Name = Annotated[str, Field(min_length=1, max_length=60), AfterValidator(_identifier)]


class Section(BaseModel):
    """A part of the file. Unknown fields are errors, as is true for a number; values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _countable(cls, value: Any, info: ValidationInfo) -> Any:
        """Numbers of bytes, which may be large, have their own bound."""
        assert info.field_name is not None
        sized = any(isinstance(mark, BeforeValidator) for mark in cls.model_fields[info.field_name].metadata)
        if isinstance(value, int) and not sized and abs(value) >= _LARGEST:
            raise ValueError(f"is larger than anything that it could count; give less than {_LARGEST:,}")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if _holds_truth(value) and not _takes_truth(cls.model_fields[info.field_name].annotation):
            raise ValueError("true and false are no numbers and no text: give one, in quotes if it is a word")
        return value


def _holds_truth(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return isinstance(value, bool) or any(isinstance(part, bool) for part in parts)


def _takes_truth(annotation: Any) -> bool:
    """Whether a field takes bool; sections, whose own fields are looked at by themselves, and Any do."""
    parts = get_args(annotation)
    section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation is bool or annotation is Any or section or any(_takes_truth(part) for part in parts)


def given_field(section: Section, names: tuple[str, ...]) -> str:
    """The one of these fields that is given."""
    return next(name for name in names if getattr(section, name) is not None)


def exactly_one(section: Section, names: tuple[str, ...]) -> None:
    present = [name for name in names if getattr(section, name) is not None]
    if len(present) != 1:
        what = "none of them is there" if not present else f"found {' and '.join(present)}"
        raise ValueError(f"give exactly one of {', '.join(names)}; {what}")


class GgufFile(Section):
    """A GGUF file, dequantised once and kept as safetensors."""

    file: str = Field(
        **identity("model", by="the file's bytes"),
        description="file name, inside `package` if that is given, else a path",
    )
    package: str | None = Field(
        None,
        **identity("model", by="the file's bytes"),
        description="installed Python package that ships the file",
    )


class ScratchModel(Section):
    """A small Llama with random weights and a byte-level tokenizer, made on the spot."""

    hidden_size: int = Field(64, **identity("model"), ge=8, description="width")
    intermediate_size: int = Field(128, **identity("model"), ge=8, description="width inside the MLP")
    layers: int = Field(2, **identity("model"), ge=1, le=10_000, description="how many")
    heads: int = Field(4, **identity("model"), ge=1, description="of attention")
    max_length: int = Field(256, **identity("model"), ge=16, description="tokens the position encoding is made for")
    seed: Seed = Field(0, **identity("model"), description="of the random weights")

    @model_validator(mode="after")
    def _heads_divide(self) -> ScratchModel:
        each = self.hidden_size * (4 * self.hidden_size + 3 * self.intermediate_size)
        if (parameters := self.layers * each) > _MOST_PARAMETERS:
            raise ValueError(
                f"makes {parameters:,} parameters, at most {_MOST_PARAMETERS:,}: give a checkpoint instead"
            )
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 2 × heads ({2 * self.heads})")
        return self

    @property
    def parameters(self) -> int:
        """How many it has: 259 embeddings (bytes and three special tokens), tied; attention, MLP and norms a layer."""
        hidden = self.hidden_size
        return 259 * hidden + self.layers * (4 * hidden**2 + 3 * hidden * self.intermediate_size + 2 * hidden) + hidden


def _argument(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name in _NO_ARGUMENTS or name.endswith("_token"):
        raise ValueError(f"{name!r} is no variable that a chat template may be given here")
    return name


_NO_ARGUMENTS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
Argument = Annotated[str, AfterValidator(_argument)]
MODELS = ("path", "hub", "gguf", "scratch")


class ModelConfig(Section):
    """The pre-trained model θ0. Exactly one of `path`, `hub`, `gguf`, `scratch`."""

    path: Path | None = Field(
        None,
        **identity("model", by="its files"),
        description="local directory with config.json and safetensors",
    )
    hub: str | None = Field(
        None, **identity("model", by="id and commit"), description="model id on the Hugging Face hub"
    )
    revision: str | None = Field(
        None,
        **identity("model", by="the commit it means"),
        description="branch, tag or commit of `hub`; pin a commit to be exact",
    )
    gguf: GgufFile | None = Field(None, **identity("model", by="its parts"))
    scratch: ScratchModel | None = Field(None, **identity("model", by="its parts"))
    dtype: Dtype = Field(
        "auto",
        **identity("model"),
        description="dtype that checkpoints are kept in; auto = θ0's own, GGUF: bfloat16",
    )

    chat_template: str | None = Field(
        None,
        **identity("model", by="its text", absent=None),
        description="chatml, llama3, alpaca, a file in jinja or its text, for a model that has none; it is in every "
        "output",
    )
    chat_template_kwargs: dict[Argument, bool | int | float | str] = Field(
        **identity("model", by="themselves", absent={}),
        default_factory=dict,
        description="variables of the chat template, for example enable_thinking: false; set in every output",
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        exactly_one(self, MODELS)
        return self

    @property
    def kind(self) -> str:
        """Which of the four it is."""
        return given_field(self, MODELS)


_ROWS = ("file", "hub", "procedural")


class DataSource(Section):
    """Where a split's rows come from. Exactly one of `file`, `hub`, `procedural`.

    A row is chat (`messages` or ShareGPT's `conversations`), `prompt` and `completion`, Alpaca's or Dolly's columns, or
    plain `text`; `answer` (text) and `choices` (list of text) where the metric needs them. `columns` builds these from
    other columns.
    """

    file: Path | None = Field(
        None,
        **identity(*ROWS, by="its bytes"),
        description="JSON lines, a JSON array, CSV or TSV (any of them .gz or .zst), Parquet, Arrow, or a folder that "
        "datasets' save_to_disk wrote",
    )
    hub: str | None = Field(None, **identity(*ROWS), description="data set id on the Hugging Face hub")
    subset: str | None = Field(
        None, **identity(*ROWS, by="of hub"), description="configuration name of the hub data set"
    )
    data_files: tuple[RepositoryFile, ...] | None = Field(
        None,
        **identity(*ROWS, by="of hub", absent=None),
        description="hub: the files to read, by their paths in the repository; * and ** stand for any; their rows are "
        "split train",
    )
    split: str = Field(
        "train",
        **identity(*ROWS, by="of hub and procedural"),
        description="of hub, of a generator, and of a save_to_disk folder with several",
    )
    revision: str | None = Field(None, **identity(*ROWS, by="the commit it means"), description="branch, tag or commit")
    procedural: str | None = Field(
        None,
        **identity(*ROWS, by="with the generators' version"),
        description="name of a generator in cpift.rows.synthetic",
    )
    size: int | None = Field(
        None, **identity(*ROWS, by="of procedural"), ge=1, description="rows to generate (procedural)"
    )
    seed: Seed = Field(0, **identity(*ROWS, by="of procedural"), description="generator seed (procedural)")
    limit: int | None = Field(None, **identity(*ROWS), ge=1, description="use the first so many rows")
    streaming: bool = Field(
        False,
        **identity(),
        description="hub: fetch the first `limit` rows only, not the whole data set",
    )
    columns: dict[str, str | tuple[str, ...]] = Field(
        **identity(*ROWS),
        default_factory=dict,
        description="templates over the row's own columns, for example prompt: '{question}'; {note[by]} reaches into a "
        "column, {input:?} writes nothing where it is null. choices may be a list, the same in every row",
    )

    @field_validator("columns")
    @classmethod
    def _templates(cls, columns: dict[str, Template]) -> dict[str, Template]:
        for name, template in columns.items():
            check_template(name, template)
        return columns

    @model_validator(mode="after")
    def _one_source(self) -> DataSource:
        exactly_one(self, _ROWS)
        if self.procedural is not None and self.size is None:
            raise ValueError("a procedural source needs `size`, the number of rows to generate")
        if self.data_files is not None and self.hub is None:
            raise ValueError("data_files are files of a `hub` data set; a local one is `file`")
        if self.streaming and (self.hub is None or self.limit is None):
            raise ValueError("streaming is for a `hub` source with a `limit`: rows after that are never fetched")
        return self

    @property
    def kind(self) -> str:
        """Which of the three it is."""
        return given_field(self, _ROWS)


class Holdout(Section):
    """Rows of `train` that are taken out of it, to be scored on: the same rows, whatever their order in the file.

    Rows with the same prompt stay together, so there may be a few more than asked for.
    """

    rows: int = Field(**identity(*ROWS, by="the rows"), ge=1, description="how many, at least")
    seed: Seed = Field(0, **identity(*ROWS, by="the rows"), description="decides which")
    max_characters: int | None = Field(
        None,
        **identity(*ROWS, by="the rows"),
        ge=1,
        description="of rows that are not longer: what is scored has to fit into the model as it is",
    )


class CheckpointConfig(Section):
    """A fine-tune of θ0 that exists already, whole or a LoRA adapter. Exactly one of `path`, `hub`."""

    path: Path | None = Field(
        None,
        **identity(*GIVEN, by="its files"),
        description="local directory: safetensors, or adapter_config.json with its weights",
    )
    hub: str | None = Field(
        None, **identity(*GIVEN, by="id and commit"), description="model id on the Hugging Face hub"
    )
    revision: str | None = Field(
        None,
        **identity(*GIVEN, by="the commit it means"),
        description="branch, tag or commit of `hub`; pin a commit to be exact",
    )

    @model_validator(mode="after")
    def _one_source(self) -> CheckpointConfig:
        exactly_one(self, ("path", "hub"))
        return self
