r"""What a method costs: passes, seconds, peak memory; and the budget that ends it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_dcam import checks
from captum_dcam.errors import BudgetExhaustedError
from captum_dcam.model.forward import DenoisingForward


@dataclass(frozen=True)
class Budget:
    r"""Where an expensive method stops; None: never.

    Args:
        passes (int, optional): forward passes over the image, in examples.
        seconds (float, optional): wall-clock; makes results depend on the machine.
    """

    passes: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.passes is not None:
            passes = checks.whole("budget's passes", self.passes)
            object.__setattr__(self, "passes", passes)
        if self.seconds is not None:
            seconds = checks.real("budget's seconds", self.seconds, above=True)
            object.__setattr__(self, "seconds", seconds)


@dataclass
class Cost:
    r"""What was spent.

    Attributes:
        forwards (int): examples whose image tokens went through the blocks above the tap.
        backwards (int): examples for which a gradient reached the tapped block.
        seconds (float): wall-clock.
        peak_bytes (int or None): memory above what was in use before (CUDA's allocator, or the
            process's resident set); None where the platform does not tell.
    """

    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    peak_bytes: int | None = None


@contextmanager
def metered(forward: DenoisingForward, budget: Budget | None = None) -> Iterator[Cost]:
    """Count passes, time and memory while the context is open; BudgetExhaustedError when spent."""
    budget = Budget() if budget is None else budget
    cost, start = Cost(), time.perf_counter()
    end = forward.request.layout.image_end
    above = forward.adapter.blocks[forward.layer + 1]

    def count(_module: Any, args: tuple, kwargs: dict) -> None:
        hidden = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if hidden is None or hidden.ndim != 3 or hidden.shape[1] < end:
            return
        elapsed = time.perf_counter() - start
        if budget.passes is not None and cost.forwards + len(hidden) > budget.passes:
            raise BudgetExhaustedError(f"budget of {budget.passes} forward passes exhausted")
        if budget.seconds is not None and elapsed > budget.seconds:
            raise BudgetExhaustedError(f"budget of {budget.seconds:g} seconds exhausted")
        cost.forwards += len(hidden)
        if hidden.requires_grad:
            hidden.register_hook(note)

    def note(gradient: Tensor) -> None:
        cost.backwards += len(gradient)

    before = _memory(forward.adapter.device, reset=True)
    try:
        with forward.held(), above.register_forward_pre_hook(count, with_kwargs=True):
            yield cost
    finally:
        if forward.adapter.device.type == "cuda":
            torch.cuda.synchronize(forward.adapter.device)
        cost.seconds = time.perf_counter() - start
        peak = _memory(forward.adapter.device)
        if before is not None and peak is not None:
            cost.peak_bytes = max(0, peak - before)


def _memory(device: torch.device, reset: bool = False) -> int | None:
    """Memory in use (``reset``), or its peak since the last reset."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
            return torch.cuda.memory_allocated(device)
        return torch.cuda.max_memory_allocated(device)
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if sys.platform != "linux" or not status.exists():
        return None
    if reset:
        try:
            clear.write_text("5")  # resets the high-water mark of the resident set
        except OSError:
            return None  # not allowed here (some containers)
    key = "VmRSS:" if reset else "VmHWM:"
    lines = [line.split() for line in status.read_text().splitlines() if line.startswith(key)]
    return int(lines[0][1]) * 1024 if lines else None


def free_memory(device: torch.device) -> int | None:
    """Bytes that may still be taken on a device, what torch holds in reserve among them; None
    where the platform does not tell."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    path = Path("/proc/meminfo")
    if device.type != "cpu" or not path.exists():
        return None
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"), None)
