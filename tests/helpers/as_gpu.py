"""CPU tensors treated as a GPU's: kernels run as compiled for one, and what was launched is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from cpift_kernels import dispatch
from cpift_kernels.triton import common

from tests.ptx.device import interpreted_ptx


@contextmanager
def as_gpu(target: str = "sm_90") -> Iterator[Counter[str]]:
    """Within it `auto` is the Triton backend everywhere; gives the number of launches by kernel."""
    launches: Counter[str] = Counter()
    with interpreted_ptx(target):
        interpret = common.launch

        def launch(kernel: Any, *args: Any, **options: Any) -> None:
            launches[kernel.__name__] += 1
            interpret(kernel, *args, **options)

        followed = patch.multiple(dispatch, _cpu=lambda device: "triton", _triton=lambda device: "triton")
        with followed, patch.object(common, "launch", launch):
            yield launches


def without_gpu() -> torch.device:
    """The device that stands for one."""
    return torch.device("cpu")
