r"""Rotary tables and position ids: are they what their modules say, and computed again where not.

No checkpoint holds them. A model that is built without storage, as transformers 5 does, can be left
with whatever was in memory: it runs, but its answers are nonsense.
"""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_dcam.errors import WeightsError

ROTARY, POSITIONS = "rotary table", "table of position ids"
#: relative error that rounding to bfloat16 or float16 can leave, with room
ROUNDED = 0.01
#: the smallest number of float16: what is smaller than half of it is 0 there
SMALLEST = 2.0**-24
#: radians per position: a table's fastest frequency is 1, or 1 over a factor of scaling
FASTEST = (1e-4, 1 + ROUNDED)
#: what :func:`repair` found in a model so far
_REPAIRED: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()


def repair(model: nn.Module) -> dict[str, int]:
    r"""Compute wrong rotary tables and position ids of a model again.

    A table is wrong where it differs from what its module computes from its own settings, by more
    than a cast to a half-precision type explains. Tables that change with the length of the
    sequence (dynamic and long scaling), and those whose settings nobody tells, are wrong only where
    no rotary table can hold their values. What is right stays as it is, bit for bit; offloaded
    tables are left alone.

    Returns:
        dict: how many modules had wrong ones, by kind; empty where all was right.

    Raises:
        WeightsError: a wrong buffer that cannot be computed; names it.
    """
    found = wrong(model, mend=True)
    known = _REPAIRED.setdefault(model, {})
    for kind, count in found.items():
        known[kind] = known.get(kind, 0) + count
    return found


def repaired(model: nn.Module) -> dict[str, int]:
    """What :func:`repair` has computed again in this model so far, as it returned it."""
    return dict(_REPAIRED.get(model, {}))


def wrong(model: nn.Module, mend: bool = False) -> dict[str, int]:
    r"""How many modules have wrong rotary tables and position ids, by kind.

    Args:
        model (nn.Module): any.
        mend (bool, optional): compute them again, as :func:`repair` does. Default: False

    Raises:
        WeightsError: ``mend``, and a wrong buffer that cannot be computed; names it.
    """
    found: dict[str, int] = {}
    for place, part in model.named_modules():
        for kind, work in ((ROTARY, _rotary), (POSITIONS, _positions)):
            if any([work(part, f"{place}.{n}", n, b, mend) for n, b in _held(part)]):
                found[kind] = found.get(kind, 0) + 1
    return found


def counted(wrong: dict[str, int]) -> str:
    """``2 rotary tables and 1 table of position ids``."""
    parts = (
        "1 " + k if n == 1 else f"{n} {k.replace('table', 'tables')}" for k, n in wrong.items()
    )
    return " and ".join(parts)


def _held(part: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own buffers that have values here."""
    own = part.named_buffers(recurse=False)
    return [(n, b) for n, b in own if not b.is_meta and b.numel()]


def _refused(place: str, held: Tensor) -> WeightsError:
    values = held.flatten()[:3].tolist()
    return WeightsError(
        f"the model's buffer {place} is {values} …, which cannot be, and its module does not tell "
        "how it is computed: expected what no checkpoint holds to be made by the model's own code; "
        "load it with the versions that its authors name, or set the buffer yourself before wrap"
    )


# -- position ids ----------------------------------------------------------------------------------


def _positions(part: Any, place: str, name: str, held: Tensor, mend: bool) -> bool:
    """Whether the positions 0, 1, … of a vision tower are wrong; ``mend`` them."""
    if name != "position_ids" or held.is_floating_point():
        return False
    count = getattr(part, "num_positions", None)
    if isinstance(count, int):
        right = torch.arange(count, device=held.device).expand(1, -1)
        if torch.equal(held, right):
            return False
        if mend:
            part.position_ids = right
        return True
    broken = bool((held < 0).any() | (held >= held.numel()).any())
    if broken and mend:
        raise _refused(place, held)
    return broken


# -- rotary tables ---------------------------------------------------------------------------------


def _rotary(part: Any, place: str, name: str, held: Tensor, mend: bool) -> bool:
    """Whether a rotary table is wrong; ``mend`` it."""
    if not name.endswith("inv_freq") or not held.is_floating_point():
        return False
    first = name.replace("original_", "")  # the table before any change by length
    prefix = first.removesuffix("inv_freq")
    right, scaling, sure = _computed(part, prefix, held)
    sure = sure and right is not None and right.shape == held.shape
    if sure and (name != first or not _changes(part, prefix)):
        assert right is not None
        wrong = not torch.allclose(held.float().cpu(), right.float().cpu(), ROUNDED, SMALLEST)
    else:
        wrong = not _possible(held)
    if not wrong or not mend:
        return wrong
    if right is None or right.shape != held.shape:
        raise _refused(place, held)
    setattr(part, name, right.to(held))
    original = f"{prefix}original_inv_freq"
    if original in vars(part):  # an attribute; where it is a buffer it is seen by itself
        setattr(part, original, right.to(held))
    if scaling is not None:
        setattr(part, f"{prefix}attention_scaling", scaling)
    return True


def _possible(held: Tensor) -> bool:
    """Whether values can be frequencies at all."""
    least, most = FASTEST
    fine = held.isfinite().all() & (held >= 0).all() & (held.amax() >= least)
    return bool(fine & (held.amax() <= most))


def _changes(part: Any, prefix: str) -> bool:
    """Whether a table changes with the length of the sequence."""
    kind = getattr(part, "rope_type", "")
    kind = kind.get(prefix.removesuffix("_"), "") if isinstance(kind, dict) else kind
    return "dynamic" in f"{kind} {type(part).__name__}".lower() or kind == "longrope"


def _computed(part: Any, prefix: str, held: Tensor) -> tuple[Tensor | None, Any, bool]:
    r"""A table as its module computes it.

    Returns:
        tuple: the table on the CPU, or None; the attention's scaling, or None; and whether the
        module's own settings gave it, not a default of its class.
    """
    settings = inspect.signature(type(part)).parameters
    if not prefix and hasattr(part, "base") and hasattr(part, "dim"):  # as LLaMA's first class
        return plain_frequencies(part.base, part.dim), None, True
    with torch.device("cpu"):  # as from_pretrained builds them, also where a GPU is the default
        if not prefix and hasattr(part, "rope_init_fn"):  # transformers 4.45 to 4.57
            own = getattr(part, "rope_kwargs", None) or {}
            return *part.rope_init_fn(part.config, None, **own), True
        if hasattr(part, "config") and next(iter(settings), None) == "config":  # from 5.0
            made = type(part)(part.config)
            scaling = getattr(made, f"{prefix}attention_scaling", None)
            return getattr(made, f"{prefix}inv_freq", None), scaling, True
    if "theta" in settings or hasattr(part, "theta"):  # vision towers' before 5.0
        base = getattr(part, "theta", None) or settings["theta"].default
        return plain_frequencies(base, 2 * len(held)), None, hasattr(part, "theta")
    return None, None, False


def plain_frequencies(base: float, width: int, device: Any = None) -> Tensor:
    """(width / 2,) float32: of rotary embeddings without scaling."""
    even = torch.arange(0, width, 2, dtype=torch.int64, device=device).float()
    return 1.0 / base ** (even / width)
