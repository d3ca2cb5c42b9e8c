"""The card that is asked, and how large the questions are. Tests put tensors of the CPU in its place."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from cpift_kernels import Placement, placement_of
from cpift_kernels.triton import common
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Action = Callable[[], Any]
NEEDED = 64 * 2**30  # bytes: for conflicts of the timed tensors in plain torch, which the benchmark's masks come from


def absent() -> str | None:
    """Why no card can be asked, by name; None where one can."""
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda or torch.version.hip
    if built is None:
        return f"no GPU can be asked: torch {torch.__version__} is built for CPUs; install one for CUDA or ROCm"
    return f"no GPU is here: torch {torch.__version__} sees none; nvidia-smi or rocm-smi says what the system sees"


def llama(layers: int, hidden: int, inner: int, vocabulary: int) -> list[int]:
    """Elements of each tensor of a Llama."""
    layer = [*[hidden * hidden] * 4, *[hidden * inner] * 3, hidden, hidden]
    return [vocabulary * hidden, *layer * layers, hidden, vocabulary * hidden]


@dataclass(frozen=True)
class Sizes:
    """Elements: of tensors whose every bit is compared, of large ones, of one beyond 32-bit indices, of timed ones, of
    copies, and of a model's tensors. lanes: slices on the host, and elements of each. tasks: of the large ones.
    repeats: runs a time is the median of.
    """

    small: tuple[int, ...] = (1, 31, 4096, 5003, (1 << 18) + 1)
    large: int = 1 << 27
    far: int = (1 << 31) + 4096
    timed: int = 1 << 30
    copied: int = 1 << 30
    lanes: tuple[int, int] = (48, 1 << 22)
    model: list[int] = field(default_factory=lambda: llama(32, 2048, 5504, 32000))
    tasks: tuple[int, ...] = (1, 4)
    repeats: int = 7

    @staticmethod
    def fitting(memory: int) -> Sizes:
        """Halved until a card of that many bytes holds them; `far` is what it is."""
        halvings = max(0, math.ceil(math.log2(NEEDED / memory)))
        full = Sizes()
        model = llama(max(32 >> halvings, 1), 2048, 5504, 32000)
        return replace(full, large=full.large >> halvings, timed=full.timed >> halvings, model=model)


class Card:
    """The first GPU that torch sees."""

    device = "cuda"

    def wait(self) -> None:
        torch.cuda.synchronize()

    def elsewhere(self) -> AbstractContextManager[Any]:
        """Another stream."""
        return torch.cuda.stream(torch.cuda.Stream())

    def pinned(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)

    def there(self, tensor: Tensor) -> Tensor:
        """A copy on the card."""
        return tensor.to(self.device)

    def place(self) -> Placement:
        """Queues of its own."""
        return placement_of(torch.device(self.device, torch.cuda.current_device()))

    def walled(self, action: Action, repeats: int) -> float:
        """The median by the clock, of work that the host has a part in; after one run that is not counted."""

        def once() -> float:
            self.wait()
            began = time.perf_counter()
            action()
            self.wait()
            return time.perf_counter() - began

        once()
        return statistics.median(once() for _ in range(repeats))

    def seconds(self, action: Action, repeats: int) -> float:
        """The median, after one run that is not counted."""
        action()
        return statistics.median(self._once(action) for _ in range(repeats))

    def _once(self, action: Action) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        first.record()
        action()
        last.record()
        self.wait()
        return float(first.elapsed_time(last)) / 1e3

    def captured(self, action: Action) -> Action:
        """The action as a graph's replay; it has run once before."""
        action()
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            action()
        return graph.replay

    @contextmanager
    def waits(self) -> Iterator[list[object]]:
        """Gives what torch says of each time that it waits for the card."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            found: list[object] = []
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode("default")
                found += [one for one in said if "synchroniz" in str(one.message)]

    def counts(self, action: Action) -> dict[str, int]:
        """launches: of this package's kernels; torch_operations: that are no views; waits for the card."""
        launches, launch = 0, common.launch

        def counted(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
            nonlocal launches
            launches += programs > 0
            launch(kernel, programs, *args, **options)

        with patch.object(common, "launch", counted), _Operations() as operations, self.waits() as waits:
            action()
        return {"launches": launches, "torch_operations": operations.count, "waits": len(waits)}


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))
