"""How fine-tunes are merged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cpift.config.code import Conflict, Method
from cpift.config.identity import identity
from cpift.config.inputs import Bytes, Name, Section
from cpift.config.settings import Blend, Setting, Share, shown_setting
from cpift.config.words import ScopeName
from cpift.extensions import short_name

THETA0, ZERO = "pretrained", "zero"  # in the place of a task's name: θ0, and no row of any model


class TokenConfig(Section):
    """Whose row a token has in models that lack it."""

    source: str | None = Field(
        None, **identity("merge", absent=None), description="a task's name, pretrained: θ0, or zero; default: as others"
    )
    token: str | None = Field(
        None, **identity("merge", absent=None), description="another token of that model, whose row is taken"
    )
    token_id: int | None = Field(None, **identity("merge", absent=None), ge=0, description="the same by its number")
    force: bool = Field(
        False, **identity("merge", absent=False), description="in place of their own row in models that have it too"
    )

    @model_validator(mode="after")
    def _names_one_row(self) -> TokenConfig:
        other = self.token is not None or self.token_id is not None
        if other and (self.source in (None, ZERO) or None not in (self.token, self.token_id)):
            raise ValueError("give one of token and token_id, beside a source that is a model")
        if self.force and self.source is None:
            raise ValueError("force: has no source to be taken from; give one")
        return self


class SourceConfig(Section):
    """Layers of one model in a slice. Settings: in place of the slice's."""

    model: str = Field(**identity("merge", absent=None), description="a task's name, or pretrained: θ0")
    layer_range: tuple[Annotated[int, Field(ge=0)], int] = Field(
        **identity("merge", absent=None), description="[first, one after the last], counted from 0"
    )
    weight: Setting | None = Field(None, **identity("merge", absent=None), description="as fusion.weight")
    density: Share | None = Field(None, **identity("merge", absent=None), description="as fusion.density")

    @field_validator("layer_range")
    @classmethod
    def _has_layers(cls, layers: tuple[int, int]) -> tuple[int, int]:
        if layers[0] >= layers[1]:
            raise ValueError(f"[{layers[0]}, {layers[1]}] has no layer; give [first, one after the last]")
        return layers

    @property
    def described(self) -> str:
        """In words: the model, its layers, and settings of its own."""
        first, end = self.layer_range
        return f"{self.model} {first}–{end - 1}{_own(weight=self.weight, density=self.density)}"


class SliceConfig(Section):
    """Layers that follow one another in the merged model, of one model or merged of several. Settings: in place of
    those of all slices; a gradient goes from the slice's first layer to its last."""

    sources: tuple[SourceConfig, ...] = Field(
        **identity("merge", absent=None),
        min_length=1,
        max_length=17,
        description="models, and as many layers of each",
    )
    weight: Setting | None = Field(None, **identity("merge", absent=None), description="as fusion.weight")
    density: Share | None = Field(None, **identity("merge", absent=None), description="as fusion.density")
    t: Blend | None = Field(None, **identity("merge", absent=None), description="as fusion.t")
    normalize: bool | None = Field(None, **identity("merge", absent=None), description="as fusion.normalize")
    scale: float | None = Field(None, **identity("merge", absent=None), description="as fusion.scale")

    @model_validator(mode="after")
    def _fits_together(self) -> SliceConfig:
        names = [source.model for source in self.sources]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"{twice[0]!r} stands twice in one slice; a slice is merged of different models")
        if len({source.layer_range[1] - source.layer_range[0] for source in self.sources}) > 1:
            ranges = ", ".join(f"{source.model} {list(source.layer_range)}" for source in self.sources)
            raise ValueError(f"sources have other numbers of layers ({ranges}); give as many of each")
        return self

    @property
    def layers(self) -> int:
        """How many."""
        first, last = self.sources[0].layer_range
        return last - first

    @property
    def described(self) -> str:
        """In words."""
        own = _own(weight=self.weight, density=self.density, t=self.t, normalize=self.normalize, scale=self.scale)
        return " with ".join(source.described for source in self.sources) + own


def _own(**settings: object) -> str:
    """Settings that are given, as people read them."""
    said = (f"{name} {shown_setting(value)}" for name, value in settings.items() if value is not None)
    text = ", ".join(said)
    return f" ({text})" if text else ""


class FusionConfig(Section):
    """Transplant and SLERP; or another way to merge, to compare with. A setting is a number; or a list of numbers,
    interpolated over the layers; or a list of `{filter: part of a tensor's name, value: …}`, whose first that fits a
    tensor is taken."""

    method: Method = Field(
        "cpift",
        **identity("merge"),
        description="cpift: the paper's; the others merge θ1..θN onto θ0, with no regions and no backbone; or one of "
        "your own, `module:attribute` (docs/extending)",
    )
    weight: Setting = Field(
        1.0,
        **identity("merge"),
        description="of every task: linear and karcher (normalised), λ of task_arithmetic, ties, dare, breadcrumbs and "
        "their like",
    )
    weights: dict[str, Setting] = Field(
        **identity("merge"),
        default_factory=dict,
        description="by task, where they differ from `weight`",
    )
    density: Share = Field(
        0.2, **identity("merge"), description="share of each update that ties, dare, breadcrumbs and their like keep"
    )
    densities: dict[str, Share] = Field(
        **identity("merge", absent={}),
        default_factory=dict,
        description="by task, where they differ from `density`",
    )
    normalize: bool | None = Field(
        None,
        **identity("merge", absent=None),
        description="whether weights are divided by their sum, in ties and dare_ties by that of updates that agree; "
        "default: linear does, task_arithmetic and dare do not, ties and dare_ties divide by the number of updates "
        "that agree. Given, signs are elected by weighted updates",
    )
    scale: float = Field(
        1.0,
        **identity("merge", absent=1.0),
        description="λ: what the merged update is multiplied by, of all methods that add one to θ0 by a formula",
    )
    trim: ScopeName = Field(
        "tensor", **identity("merge"), description="ties, breadcrumbs, sce: keep the largest of each tensor, or of all"
    )
    gamma: float = Field(
        0.01,
        **identity("merge", absent=0.01),
        ge=0,
        lt=1,
        description="breadcrumbs and breadcrumbs_ties: share of each update that is left out, its largest elements",
    )
    window: float = Field(
        0.1,
        **identity("merge", absent=0.1),
        ge=0,
        le=0.5,
        description="della and della_linear: how far the chance to be kept goes from `density`, down for a row's "
        "smallest update and up for its largest",
    )
    threshold: float = Field(
        1e-5,
        **identity("merge", absent=1e-5),
        ge=0,
        description="ram and ram_plus: an update that is no larger is no change",
    )
    rescale: float = Field(
        0.1,
        **identity("merge", absent=0.1),
        ge=0,
        description="ram_plus: r, by how much what one task alone changed grows with its share of shared elements",
    )
    rescale_limit: float = Field(
        0.2, **identity("merge", absent=0.2), ge=0, description="ram_plus: the most that this share counts"
    )
    selectivity: float = Field(
        0.4,
        **identity("merge", absent=0.4),
        ge=0,
        description="consensus: a task needs an element where its update is at least so many times what others add",
    )
    agreement: int = Field(
        2, **identity("merge", absent=2), ge=1, description="consensus: tasks that have to need an element to move it"
    )
    t: Blend = Field(
        0.5,
        **identity("merge"),
        description="slerp of two tasks: 0 is the first, 1 the second; of more, each weighs the same; nearswap: the "
        "most that an element moves",
    )
    omega: Literal["uniform"] | Annotated[float, Field(ge=0, le=1)] = Field(
        "uniform",
        **identity("fuse"),
        description="uniform: ω_i = 1/(i+1), every model weighs the same; a number: the paper's fixed ω",
    )
    epsilon: float = Field(
        1e-6, **identity("fuse", "merge"), ge=0, description="radians; LERP where the angle is smaller"
    )
    granularity: Literal["tensor", "row", "model"] = Field(
        "tensor",
        **identity("fuse"),
        description="what has an angle of its own; ram_plus: what shared elements are counted in, tensor or model",
    )
    space: Literal["weights", "delta"] = Field(
        "weights",
        **identity("fuse"),
        description="SLERP of the models themselves (paper), or of their updates, θi − θ0; nuslerp and multislerp too",
    )
    conflict: Conflict = Field(
        "magnitude",
        **identity("fuse"),
        description="where an element is core of several tasks: magnitude: the largest update wins; last: the later "
        "stage; mean: their mean; agree: the largest if all pull one way, else none of them transplants it; or one of "
        "your own, `module:attribute` (docs/extending)",
    )
    transplant: bool = Field(
        True,
        **identity("fuse", absent=True, swept=True),
        description="false: no cores, SLERP everywhere, to see what the transplant does",
    )
    vocabulary: Literal["error", "base", "union", "pretrained"] | Name = Field(
        "error",
        **identity("merge"),
        description="where models have other tokens. base: as many rows as θ0 has, by number, with its rows where "
        "missing; by tokens: union: θ0's and all others; pretrained: θ0's; or a task's name: that task's",
    )
    tokens: dict[str, TokenConfig] = Field(
        **identity("merge", absent={}),
        default_factory=dict,
        max_length=100_000,
        description="by token: whose row it has in models that lack it; one that no tokenizer has is added",
    )
    missing_tokens: Literal["pretrained", "mean"] = Field(
        "pretrained",
        **identity("merge", absent="pretrained"),
        description="whose row models get that lack a token: pretrained: θ0's, or where it lacks it too the mean of "
        "the tasks that have it; mean: that mean always",
    )
    pad_to_multiple_of: int | None = Field(
        None,
        **identity("merge", absent=None),
        ge=1,
        description="of a vocabulary by tokens: rows of the mean are added to a multiple of it",
    )
    slices: tuple[SliceConfig, ...] = Field(
        (),
        **identity("merge", absent=[]),
        max_length=1000,
        description="layers of models one after another, each slice merged of its sources; embeddings are the first "
        "slice's, what comes after the layers the last one's; empty: all layers of all models",
    )
    into: dict[str, str] = Field(
        **identity("merge", absent={}),
        default_factory=dict,
        description="by task: the module of θ0's class that its text-only model is, for example "
        "model.language_model of a vision-language model; all else stays θ0's",
    )
    as_lora: bool = Field(
        False,
        **identity("fuse", "merge", absent=False),
        description="the merged update as one PEFT adapter in place of a model: without `rank` by concatenation of "
        "adapters, exact, their ranks added up (linear, task_arithmetic, model_stock)",
    )
    rank: int | None = Field(
        None,
        **identity("fuse", "merge", absent=None),
        ge=1,
        description="of `as_lora`: the closest product of this rank to what any method changes, by singular values",
    )
    shard_size: Bytes = Field(
        5 * 10**9,
        **identity("fuse", "merge"),
        description="most bytes of one file of the fused model, for example 5GB",
    )

    @property
    def by_tokens(self) -> bool:
        """Whether rows of embeddings follow a tokenizer's tokens, not numbers."""
        return self.vocabulary not in ("error", "base")

    @property
    def fitted(self) -> str:
        """How models are opened, before any goes by tokens."""
        return "error" if self.by_tokens else self.vocabulary

    @property
    def method_name(self) -> str:
        """As people and records have it: of a user's own without the place of its file."""
        return short_name(self.method)

    @property
    def conflict_name(self) -> str:
        """The same of the conflict rule."""
        return short_name(self.conflict)

    @property
    def isolates(self) -> bool:
        """Whether it transplants core regions into a backbone, as the paper does; else it merges θ1..θN onto θ0."""
        return self.method == "cpift"
