r"""One model, one user at a time: the lock of a model, and what is changed on it for a while.

An explanation changes the model that it reads: hooks, recorded outputs in place of blocks, frozen
parameters, evaluation mode. Two threads that do so at once would read each other's changes. So
every model has one lock, whichever adapters and forwards share it, and all temporary changes are
made while it is held. Threads on different models run side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_dcam.model.versions import autocast_type
from captum_dcam.model.wrappers import compiled

F = TypeVar("F", bound=Callable[..., Any])
#: number of 64-bit words that a fingerprint samples per tensor, besides the sum of all
SAMPLES = 64
#: tensors of at most so many values are fingerprinted together: a call each would take the time
SMALL = 16384


class Guard:
    r"""The lock of one model, and how it is held.

    Attributes:
        lock (RLock): held while the model runs or is changed.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._depth = 0
        self._known: dict[int, tuple[object, bytes]] = {}
        self._hooks = b""

    @contextmanager
    def held(self, model: nn.Module) -> Iterator[None]:
        """The model is this thread's alone, in evaluation mode, its parameters frozen, what it
        compiles runs as it is written, so that hooks are seen, and what it makes can be in a graph;
        all is as before when the outermost context ends."""
        with self.lock, out_of_inference_mode():
            self._depth += 1
            try:
                if self._depth > 1:
                    yield
                else:
                    self._hooks = hooks_of(model)  # the user's: ours come inside
                    with _still(model), eager() if compiled(model) else nullcontext():
                        yield
            finally:
                self._depth -= 1
                if not self._depth:
                    self._known.clear()

    def fingerprint(self, of: object, compute: Callable[[], bytes]) -> bytes:
        """What ``compute`` found of an object since the lock was taken: nobody else changes it."""
        if not self._depth:
            return compute()
        if id(of) not in self._known:
            self._known[id(of)] = of, compute()
        return self._known[id(of)][1]

    def hooks(self, model: nn.Module) -> bytes:
        """The hooks that were on the model before the lock was taken, see :func:`hooks_of`."""
        return self._hooks if self._depth else hooks_of(model)

    def changed(self) -> None:
        """The holder has changed weights itself: fingerprints are taken anew."""
        self._known.clear()


_GUARDS: WeakKeyDictionary[nn.Module, Guard] = WeakKeyDictionary()
_ENTERING = threading.Lock()


def guard_of(part: nn.Module) -> Guard:
    """The guard of the model that ``part``, its first block, belongs to."""
    with _ENTERING:
        return _GUARDS.setdefault(part, Guard())


@contextmanager
def out_of_inference_mode() -> Iterator[None]:
    """What is made inside the context can be in a graph; inside ``torch.inference_mode`` gradients
    stay off, as under ``torch.no_grad``, until somebody asks for them."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():  # the first alone would turn gradients on
        yield


def alone(method: F) -> F:
    """Method decorator: the lock of ``self`` is held while the method runs. What it makes can be
    in a graph, also inside ``torch.inference_mode``."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.lock, out_of_inference_mode():
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Parameters without ``requires_grad`` inside the context; they are restored afterwards."""
    trainable = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters inside the context."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        with frozen(model):
            yield
    finally:
        for module in training:
            module.training = True


# -- what belongs to the process, not to a model ---------------------------------------------------

#: held while torch's or numpy's global random state is another than the user's
DRAWING = threading.RLock()
#: held while upstream's modules are repaired or a model is built
LOADING = threading.RLock()


class Shared:
    r"""A change of the whole process that several threads may want at once: the first one makes
    it, the last one takes it back.

    Args:
        make (callable): gives the context manager of the change.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make, self._lock, self._users = make, threading.Lock(), 0
        self._open: AbstractContextManager[Any] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._open = self._make()
                self._open.__enter__()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users and self._open is not None:
                    opened, self._open = self._open, None
                    opened.__exit__(None, None, None)


def _eager() -> AbstractContextManager[Any]:
    known = hasattr(torch.compiler, "set_stance")
    return torch.compiler.set_stance("force_eager") if known else nullcontext()


#: functions that a family compiles run as they are written; compiled, before torch 2.6
eager = Shared(_eager)


# -- has a model changed? --------------------------------------------------------------------------


def fingerprint(tensors: Iterable[Tensor]) -> bytes:
    r"""Bytes that change when a value of these tensors does, wherever it was changed.

    torch's version counters do not see what is written through ``.data``. So all values are read:
    the sum of each tensor's bits as 64-bit integers, which is as fast as memory, and a sample of
    them, which tells an order from another. Small tensors are joined to a table, of which the sums
    of rows and columns are taken. Tensors without memory of their own (meta device), and of
    subclasses (quantised ones), count by their version and identity alone.
    """
    found: dict[torch.device, list[Tensor]] = {}
    small: dict[torch.device, list[Tensor]] = {}
    signs: list[Any] = []
    for tensor in tensors:
        signs.append(
            (tensor.shape, tensor.dtype, None if tensor.is_inference() else tensor._version)
        )
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
            signs.append(id(tensor))
            continue
        flat = tensor.detach().reshape(-1)
        if tensor.numel() <= SMALL:
            small.setdefault(tensor.device, []).append(flat.view(torch.uint8))
            continue
        words = _words(flat, 1)
        every = max(1, len(words) // SAMPLES)
        found.setdefault(tensor.device, []).extend((words.sum()[None], words[::every]))
    for device, flats in small.items():
        # of 32-bit integers, summed in 64 bits: no sum goes round, so signs do not cancel
        table = _words(torch.cat(flats), SAMPLES).view(torch.int32).view(-1, 2 * SAMPLES)
        found.setdefault(device, []).extend((table.sum(0), table.sum(1)))
    values = [torch.cat(parts).cpu().numpy().tobytes() for parts in found.values()]
    return b"".join([repr(signs).encode(), *values])


def _words(flat: Tensor, times: int) -> Tensor:
    """The bits of a flat tensor as 64-bit integers, their number a multiple of ``times``."""
    size = flat.element_size()
    missing = -len(flat) % (8 // size * times if size < 8 else times)
    if missing or flat.storage_offset() * size % 8:
        flat = nn.functional.pad(flat, (0, missing))
    return flat.view(torch.int64)


def hooks_of(model: nn.Module) -> bytes:
    """Bytes that change with the forward hooks, and the replaced forwards, of a model's modules."""
    found = [
        (
            number,
            *module._forward_pre_hooks,
            *module._forward_hooks,
            id(vars(module).get("forward")),
        )
        for number, module in enumerate(model.modules())
        if module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module)
    ]
    return repr(found).encode()


#: attributes of PEFT's layers that say which adapters are active, and how much
PEFT = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


def modes(model: nn.Module, device: str) -> bytes:
    """Bytes that change with what a model computes beside its values: active adapters of PEFT, the
    attention that its configuration names, and torch's precision."""
    layers = [
        [vars(module).get(name) for name in PEFT]
        for module in model.modules()
        if "_active_adapter" in vars(module)
    ]
    autocast = autocast_type(device)
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return repr((layers, attention, autocast, torch.get_float32_matmul_precision())).encode()
