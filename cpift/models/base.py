"""What every source of θ0 answers: `sources.SOURCES` has one class for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.config.run import ModelConfig
from cpift.errors import Problem
from cpift.models.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Source(ABC):
    """Everything that differs by which of `model.path`, `hub`, `gguf` and `scratch` is given.

    in_place: it is a folder of safetensors before θ0 is made, which merges read where it lies (`opening.locate`).
    repository: its id on the hub, if it is from there. dtype: that θ0 is kept in, `auto` where its files say.
    """

    in_place = False
    repository: str | None = None
    auto = "auto"  # what `model.dtype: auto` means

    def __init__(self, model: ModelConfig):
        self.model, self.value = model, getattr(model, model.kind)
        self.dtype = self.auto if model.dtype == "auto" else model.dtype

    @abstractmethod
    def decided_by(self) -> Iterator[str]:
        """What decides the weights, as lines."""

    @abstractmethod
    def load(self, chats: bool) -> tuple[Any, PreTrainedTokenizerBase]:
        """The network and its tokenizer. chats: whether that has to write conversations."""

    @abstractmethod
    def stated(self, relative: Callable[[Path], str]) -> Any:
        """Its field as a run's file has it, with paths as `relative` gives them."""

    @property
    @abstractmethod
    def description(self) -> str:
        """In a word or two."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """A sentence for the model card."""

    @property
    def elsewhere(self) -> str:
        """As `description`, for those who do not have this machine's folders."""
        return self.description

    def check(self) -> list[Problem]:
        return []

    def files(self) -> list[Path]:
        """Those on this machine that decide it."""
        return []

    def fetched(self) -> list[Path]:
        """The files of a download that θ0 is made from, which others may change."""
        return []

    def folder(self) -> Path | None:
        """Of a source in place, where config.json and tokenizer lie; None where they would have to be downloaded."""
        return None

    def names(self) -> list[str]:
        """Of θ0's parameters; none where only a download or a conversion tells."""
        return []

    def parameters(self) -> int | None:
        """How many, tied ones once; None where only a download can tell."""
        return None

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, where it is at hand before θ0 is made. Raises CheckpointError where it cannot be used."""
        return None

    def row_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """As `tokenizer`, to write and count rows and for nothing else."""
        return self.tokenizer()

    def raw_tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        """The tokenizer as it is, without the config's template. folder: of the small files, where there is one."""
        return read_tokenizer(folder)
