"""PEFT's formulas, where a method is written with them."""

from __future__ import annotations

from typing import Any

from cpift.errors import CpiftError


def merge_utilities() -> Any:
    """Raises CpiftError if PEFT is not installed."""
    try:
        from peft.utils import merge_utils
    except ImportError as error:
        raise CpiftError("fusion.method: ties and dare need the package peft → pip install 'cpift[peft]'") from error
    return merge_utils
