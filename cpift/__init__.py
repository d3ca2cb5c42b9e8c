"""cpift: Core Parameter Isolation Fine-Tuning (CPI-FT, arXiv 2508.21741)."""

import os
from importlib.metadata import PackageNotFoundError, version

# Before transformers is imported: with the package `kernels` installed it would run compiled code from the hub.
os.environ.setdefault("USE_HUB_KERNELS", "NO")

try:
    __version__ = version("cpift")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
