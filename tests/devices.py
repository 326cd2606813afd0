r"""Several devices on a machine that has one: tensors that say where they are, and refuse to meet.

A :class:`Placed` holds its values on the CPU, and the name of a device. Operations run on the
values; tensors of two devices in one of them raise, as on real devices, and so do a tensor of the
CPU and one of a device, but for what torch allows: numbers without dimensions, indices, copies.
What this cannot show: kernels, rounding, memory and speed of real devices, and code that asks for a
device by its kind (``cuda``).
"""

import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

#: the only kind beside the CPU that every build of torch lets be named
KIND = "meta"
aten = torch.ops.aten
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
DEVICED = ("device", "dtype")
TAKEN = ("__bool__", "__float__", "__index__", "__int__", "item", "tolist")


class Placed(torch.Tensor):
    """A tensor on a device of :data:`KIND`."""

    @staticmethod
    def __new__(cls, values, place):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, device="cpu", dispatch_device=True,
            requires_grad=values.requires_grad,
        )  # fmt: skip

    def __init__(self, values, place):
        self.values, self.place = values.detach(), torch.device(place)

    def __repr__(self):
        return f"Placed({self.values!r}, {self.place})"

    @classmethod
    def __torch_dispatch__(cls, func, _types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def is_placed(value):
    return isinstance(value, Placed)


def places_of(func, args, kwargs):
    """Devices of the tensors that must be together, None for the CPU."""
    name = func.overloadpacket.__name__
    flat = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if name in INDEXING:
        flat = [t for t in flat if is_placed(t) or t.dtype not in (torch.long, torch.bool)]
    if name in ("copy_", "_to_copy"):
        flat = flat[:1]
    sized = [t for t in flat if t.ndim] or flat
    return {t.place if is_placed(t) else None for t in sized}


def run(func, args, kwargs):
    """An operation on the values; its results are where its tensors are, or where it is told."""
    if func is torch.ops.prim.device.default:
        return args[0].place
    places = places_of(func, args, kwargs)
    if len(places) > 1:
        raise RuntimeError(f"{func}: tensors on {sorted(map(str, places))} (None: cpu)")
    place = next(iter(places), None)
    if kwargs.get("device") is not None:
        asked = torch.device(kwargs["device"])
        place, kwargs = asked if asked.type == KIND else None, {**kwargs, "device": "cpu"}
    if func is aten._fused_sdp_choice.default:
        return 0  # the kernel that is written out in operations
    plain = tree_map(lambda t: t.values if is_placed(t) else t, (args, kwargs))
    out = func(*plain[0], **plain[1])
    if func._schema.is_mutable and isinstance(args[0], torch.Tensor):
        return args[0]
    if place is None:
        return out
    return tree_map(lambda t: Placed(t, place) if isinstance(t, torch.Tensor) else t, out)


class _Named(TorchFunctionMode):
    """Calls that name a device of :data:`KIND`, whose library torch would look for."""

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in TAKEN and is_placed(args[0]):
            return func(args[0].values)
        if func is torch.Tensor.to:
            return to(*args, **kwargs)
        if name in ("__getitem__", "__setitem__") and is_placed(args[0]):
            return func(args[0], listed(args[1]), *args[2:])
        if name == "new_tensor" and is_placed(args[0]):
            return Placed(args[0].values.new_tensor(*args[1:], **kwargs), args[0].place)
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked).type == KIND:
            plain = tree_map(lambda t: t.values if is_placed(t) else t, (args, kwargs))
            return Placed(func(*plain[0], **{**plain[1], "device": "cpu"}), asked)
        return func(*args, **kwargs)


def listed(index):
    """An index with its lists as tensors, which torch would make on the device itself."""
    if isinstance(index, tuple):
        return tuple(listed(one) for one in index)
    return torch.tensor(index) if isinstance(index, list | range) else index


def to(value, *args, **kwargs):
    """``Tensor.to``, with a gradient."""
    given = {"device": None, "dtype": None, **{k: kwargs[k] for k in kwargs if k in DEVICED}}
    for one in args:
        if isinstance(one, torch.Tensor):
            given = {"device": one.device, "dtype": one.dtype}
        elif isinstance(one, torch.dtype):
            given["dtype"] = one
        elif not isinstance(one, bool) and one is not None:
            given["device"] = torch.device(one)
    device = torch.device(given["device"] or value.device)
    dtype = given["dtype"] or value.dtype
    if (device, dtype) == (value.device, value.dtype):
        return value
    return aten._to_copy(value, device=device, dtype=dtype)


class _Moved(TorchDispatchMode):
    """Tensors of the CPU that go to a device."""

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


@contextlib.contextmanager
def devices():
    """Devices of :data:`KIND` can be named while the context is open."""
    first = lambda model: next(model.parameters()).device  # noqa: E731
    with (
        mock.patch("captum_dcam.model.adapter.device_of", first),  # meta is a real device here
        mock.patch.object(torch, "is_autocast_enabled", lambda *_kind: False),
        _Named(),
        _Moved(),
    ):
        yield


def moved(value, place):
    """A tensor, or what holds tensors, on a device."""
    move = lambda t: t.to(place) if isinstance(t, torch.Tensor) else t  # noqa: E731
    return tree_map(move, value)


def place(module, where, alone=False):
    """Put a module's weights on a device, and its inputs whenever it is called, as accelerate's
    hooks do; ``alone``: its own weights, without those of the modules in it."""
    for part in [module] if alone else module.modules():
        for name, held in [*part.named_parameters(recurse=False)]:
            held = torch.nn.Parameter(Placed(held.detach(), where), held.requires_grad)
            part.register_parameter(name, held)
        for name, held in [*part.named_buffers(recurse=False)]:
            setattr(part, name, Placed(held, where))
    if not alone:
        module.register_forward_pre_hook(
            lambda _m, args, kwargs: (moved(args, where), moved(kwargs, where)), with_kwargs=True
        )
