"""Check 6: nothing is left behind on the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from captum_dcam.errors import ConformanceError
from captum_dcam.explaining import explain_generation
from captum_dcam.model.tap import recorded
from captum_dcam.testing.case import AdapterCase, expect, explained

#: values that are compared as such; others by identity
PLAIN = (bool, int, float, str, bytes, type(None))


class _Interrupted(RuntimeError):
    """Stands for an error in the middle of the work."""


def check_nothing_left(case: AdapterCase) -> str:
    r"""Generating and explaining, and an error in the middle of each, leave everything as it was:
    the model's hooks, modes, attributes, caches, weights and gradients, the methods of its classes,
    and torch's random state and gradient mode.

    Raises:
        ConformanceError: what is left, and after what.
    """
    adapter = case.make(torch.float32)
    model = adapter.model
    request = adapter.prepare([[case.picture()]], [case.prompt])
    case.own(adapter, request)  # what the family's own code leaves behind does not count
    model.train()
    for number, p in enumerate(model.parameters()):
        p.requires_grad_(p.is_floating_point() and number % 2 == 0)
    before = snapshot(model)

    def compare(what: str) -> None:
        changed = difference(before, snapshot(model))
        expect(not changed, f"after {what} something is left behind: {'; '.join(changed[:5])}")

    last = adapter.blocks[-1]
    with recorded([last], keep=False) as (lengths, _):
        forward = case.bound(adapter)
    compare("generating")
    word = explained(forward)[0]
    explain_generation(forward, [word], preset="base")
    compare("explaining")
    for what, calls in (("generating", len(lengths) - 1), ("explaining", len(lengths))):
        try:
            with _broken(last, calls):
                bound = case.bound(adapter, keep=what == "generating")
                if what == "explaining":
                    explain_generation(bound, [word], preset="base")
        except _Interrupted:
            compare(f"an error while {what}")
        else:
            raise ConformanceError(f"an error inside the last block is swallowed while {what}")
    return "nothing"


@contextmanager
def _broken(block: nn.Module, after: int) -> Iterator[None]:
    """Let a block raise when it was called ``after`` times already."""
    calls = count()

    def fail(_module: nn.Module, _args: Any) -> None:
        if next(calls) >= after:
            raise _Interrupted("an error in the middle of the work")

    with block.register_forward_pre_hook(fail):
        yield


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a generation or an explanation could change, by name: on a model and around it."""
    found: dict[str, Any] = {
        "torch.get_rng_state()": torch.get_rng_state().clone(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.get_default_dtype()": torch.get_default_dtype(),
    }
    for name, module in model.named_modules():
        place = f"model.{name}" if name else "model"
        for key, value in vars(module).items():
            if isinstance(value, dict):  # of parameters, hooks and the like: entry by entry
                found |= {f"{place}.{key}[{entry!r}]": _kept(v) for entry, v in value.items()}
            found[f"{place}.{key}"] = dict if isinstance(value, dict) else _kept(value)
        for cls in type(module).__mro__:
            if not cls.__module__.startswith(("torch.", "builtins")):
                for key, value in vars(cls).items():
                    found[f"class {cls.__qualname__}.{key}"] = _Same(value)
    for name, parameter in model.named_parameters():
        found[f"model.{name}.requires_grad"] = parameter.requires_grad
        found[f"model.{name}.grad"] = _Same(parameter.grad)
    for name in ("config", "generation_config"):
        settings: Any = getattr(model, name, None)
        if hasattr(settings, "to_dict"):
            found[f"model.{name}"] = settings.to_dict()
    return found


class _Same:
    """Holds a value, and equals another that holds the same object."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _kept(value: Any) -> Any:
    """What a later value is compared with."""
    if isinstance(value, Tensor):
        return (_Same(value), value.detach().clone())
    if isinstance(value, dict):
        return {k: _kept(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [v if isinstance(v, PLAIN) else _Same(v) for v in value]
    return value if isinstance(value, PLAIN) else _Same(value)


def difference(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what is new, gone or changed."""
    came = [f"{k} is new" for k in after if k not in before]
    gone = [f"{k} is gone" for k in before if k not in after]
    changed = [f"{k} changed" for k in before if k in after and not _equal(before[k], after[k])]
    return came + gone + changed


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    return bool(type(one) is type(other) and one == other)
