"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{end}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for end, base in (("B", 1000), ("", 1000), ("iB", 1024))
}


def parse_size(value: object) -> int:
    """Bytes from a number or text such as 512MiB, 5GB or 1.5G (1 GB = 10⁹, 1 GiB = 2³⁰). Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})\s*([A-Za-z]*)\s*", str(value))
    unit = next((factor for name, factor in _UNITS.items() if match and name.lower() == match[2].lower()), None)
    if match is None or unit is None:
        raise ValueError(f"{value!r} is no size: write for example 512MiB or 5GB")
    return int(float(match[1]) * unit)


def show_size(count: float) -> str:
    """Three digits and a decimal unit: 4.9 GB."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
