"""cpift: Core Parameter Isolation Fine-Tuning (CPI-FT, arXiv 2508.21741)."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("cpift")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
