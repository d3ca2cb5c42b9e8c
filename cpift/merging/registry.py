"""The table of all ways to merge: config, plan, identity, model card, reference and comparisons ask it."""

from __future__ import annotations

from collections.abc import Iterator

from cpift.config.identity import marks_of
from cpift.config.needs import EXTRAS
from cpift.config.run import FusionConfig
from cpift.errors import ConfigError, Problem
from cpift.extensions import find, load_class, short_name
from cpift.merging.base import MergeMethod
from cpift.merging.methods.cpift import Fusion
from cpift.merging.methods.iso_c import IsoC
from cpift.merging.methods.karcher import Karcher
from cpift.merging.methods.linear import Linear
from cpift.merging.methods.model_stock import ModelStock
from cpift.merging.methods.multislerp import MultiSlerp
from cpift.merging.methods.nuslerp import NuSlerp
from cpift.merging.methods.passthrough import Passthrough
from cpift.merging.methods.slerp import Slerp
from cpift.merging.methods.task_arithmetic import TaskArithmetic
from cpift.merging.methods.tsv_m import TsvM
from cpift.merging.selected.arcee_fusion import ArceeFusion
from cpift.merging.selected.breadcrumbs import Breadcrumbs
from cpift.merging.selected.breadcrumbs_ties import BreadcrumbsTies
from cpift.merging.selected.localize_stitch import LocalizeStitch
from cpift.merging.selected.pcb import Pcb
from cpift.merging.selected.sce import Sce
from cpift.merging.selected.ties import Ties
from cpift.merging.updates.consensus import Consensus
from cpift.merging.updates.dare import Dare
from cpift.merging.updates.dare_ties import DareTies
from cpift.merging.updates.della import Della, DellaLinear
from cpift.merging.updates.fisher import Fisher
from cpift.merging.updates.magmax import MagMax
from cpift.merging.updates.nearswap import NearSwap
from cpift.merging.updates.ram import Ram
from cpift.merging.updates.ram_plus import RamPlus

METHODS: dict[str, type[MergeMethod]] = {
    "cpift": Fusion,
    "linear": Linear,
    "slerp": Slerp,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": Dare,
    "dare_ties": DareTies,
    "nearswap": NearSwap,
    "model_stock": ModelStock,
    "karcher": Karcher,
    "ram": Ram,
    "magmax": MagMax,
    "consensus": Consensus,
    "localize_stitch": LocalizeStitch,
    "nuslerp": NuSlerp,
    "multislerp": MultiSlerp,
    "breadcrumbs": Breadcrumbs,
    "breadcrumbs_ties": BreadcrumbsTies,
    "ram_plus": RamPlus,
    "passthrough": Passthrough,
    "della": Della,
    "della_linear": DellaLinear,
    "sce": Sce,
    "arcee_fusion": ArceeFusion,
    "pcb": Pcb,
    "iso_c": IsoC,
    "tsv_m": TsvM,
    "fisher": Fisher,
}


# Fields of `fusion` that every merge has, whatever its method.
OF_ALL = (
    *("method", "vocabulary", "tokens", "missing_tokens", "pad_to_multiple_of", "slices", "as_lora", "rank"),
    *("into", "shard_size"),
)
# What a merge of any method is named by; a method reads of these, and of no other field.
READABLE = tuple(
    name for name, mark in marks_of(FusionConfig).items() if "merge" in mark["named"] and name not in OF_ALL
)


def method_named(word: str) -> type[MergeMethod]:
    """The method that a config names: one of METHODS, or the user's, which is imported.

    Raises ConfigError for what is not there, is no MergeMethod, or does not say what it is.
    """
    if word in METHODS:
        return METHODS[word]
    method = load_class(find("methods", word), MergeMethod)  # type: ignore[type-abstract]  # an abstract class, not to be made
    if problems := [Problem(short_name(word), *missing) for missing in _unsaid(method)]:
        raise ConfigError("extensions", problems)
    return method


def _unsaid(method: type[MergeMethod]) -> Iterator[tuple[str, str]]:
    """What a class does not say of itself, or says wrongly, and the remedy."""
    for name, what in {"formula": "a text", "fields": "a tuple of names of `fusion`"}.items():
        if not isinstance(getattr(method, name, None), tuple if name == "fields" else str):
            yield f"{method.__name__} has no `{name}`", f"give {what}, for people who read what was merged"
    for name in getattr(method, "fields", ()):
        if name not in READABLE:
            yield f"`fields` has {name!r}", f"one of {', '.join(READABLE)}"
    if method.needs_moments:
        yield "`needs_moments` is set", "leave it out: cpift's own methods alone are given second moments"
    if method.extra and method.extra not in EXTRAS:
        yield f"`extra` is {method.extra!r}", f"one of {', '.join(EXTRAS)}; import what else it needs in its module"


def named_also(word: str) -> tuple[str, ...]:
    """Fields of `fusion` that a merge by this method is named by, beside those that every merge is."""
    return tuple(name for name in METHODS[word].fields if name not in READABLE) if word in METHODS else ()


def reads_moments(word: str) -> bool:
    """Whether a method reads second moments of the fine-tunes; a user's own does not."""
    return word in METHODS and METHODS[word].needs_moments


def seeded(word: str) -> bool:
    """Whether a merge is named by the seed too: of a user's method always, for it is not imported to name an output."""
    return word not in METHODS or METHODS[word].seeded
