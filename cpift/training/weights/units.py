"""The layers of a network, and which of them are gathered, each alone, where workers have a share of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch


def layers_of(network: Any) -> list[torch.nn.Module]:
    """The decoder layers, as transformers names their classes; of one in another, the outer."""
    return _outermost(network, lambda layer: True)


def units_of(network: Any) -> list[torch.nn.Module]:
    """Layers that share no parameter with the rest of the network; of one that does, the layers in it that do not."""
    places = _places(network)
    return _outermost(network, lambda layer: all(places[held] == n for held, n in _places(layer).items()))


def _outermost(network: Any, fits: Callable[[torch.nn.Module], bool]) -> list[torch.nn.Module]:
    """Layers that fit and lie in no other that does."""
    names, found, within = set(network._no_split_modules or ()), list[torch.nn.Module](), set[int]()
    for module in network.modules():  # the outer before what it holds
        named = type(module).__name__.removeprefix("FSDP") in names
        if named and id(module) not in within and fits(module):
            found.append(module)
            within.update(id(held) for held in module.modules())
    return found


def _places(module: torch.nn.Module) -> Counter[int]:
    """Under how many names a module has each parameter."""
    return Counter(id(held) for _, held in module.named_parameters(remove_duplicate=False))
