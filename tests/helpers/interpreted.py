"""Triton's interpreter with fused multiply-adds rounded once, as GPUs round them: its own are rounded twice."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from cpift_kernels.rounding import fma
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def rounded_as_gpus() -> AbstractContextManager[Any]:
    """Within it `tl.fma` of fp32 rounds once."""
    return patch.object(InterpreterBuilder, "create_fma", _fma)


def _fma(builder: Any, left: Any, right: Any, addend: Any) -> Any:
    del builder
    assert left.data.dtype == np.float32
    values = np.broadcast_arrays(left.data, right.data, addend.data)
    found = fma(*(torch.from_numpy(np.ascontiguousarray(value)) for value in values))
    return TensorHandle(found.numpy(), addend.dtype)
