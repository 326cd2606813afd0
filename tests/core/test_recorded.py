"""What a generation recorded is used as long as it is true, and computed again afterwards."""

import dataclasses

import pytest
import tiny
import torch
from torch import nn

from captum_dcam.explaining import explain_generation
from captum_dcam.model.guard import SMALL, fingerprint


def maps(forward):
    return explain_generation(forward, [0, 1], preset="base").maps


def unrecorded(forward):
    """The same generation with nothing kept: every block is computed."""
    return forward.again(trajectory=dataclasses.replace(forward.trajectory, kept={}))


def chosen(model, part):
    found = [p for n, p in model.named_parameters() if part in n and p.ndim > 1]
    assert found
    return found


def through_data(p):
    p.data.mul_(0.5)


def under_no_grad(p):
    with torch.no_grad():
        p.mul_(0.5)


def other_memory(p):
    p.data = p.data * 0.5


def other_order(p):
    p.data.copy_(p.data.flip(0))


CHANGES = (through_data, under_no_grad, other_memory, other_order)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", ("layers.0.", "layers.1.", "layers.2."))
def test_changed_weights_are_seen(cache, part, change):
    forward = tiny.bound(cache, layer=1)
    before = maps(forward)
    for p in chosen(forward.model, part):
        change(p)
    found = maps(forward)
    assert not torch.equal(found[0], before[0])
    assert torch.equal(found[0], maps(unrecorded(forward))[0])
    assert torch.equal(found[0], maps(forward)[0])


def test_weights_that_come_back_give_the_maps_of_before(cache):
    forward = tiny.bound(cache, layer=1)
    before, state = maps(forward), {k: v.clone() for k, v in forward.model.state_dict().items()}
    for p in chosen(forward.model, "layers."):
        p.data.normal_()
    assert not torch.equal(maps(forward)[0], before[0])
    forward.model.load_state_dict(state)
    assert torch.equal(maps(forward)[0], before[0])


def test_changed_pixels_are_seen(cache):
    forward = tiny.bound(cache, layer=1)
    before = maps(forward)
    forward.request.pixels.data.mul_(0.5)
    found = maps(forward)
    assert not torch.equal(found[0], before[0])
    assert torch.equal(found[0], maps(unrecorded(forward))[0])


def test_another_request_does_not_get_the_records_of_the_first(cache):
    forward = tiny.bound(cache, layer=1)
    request = dataclasses.replace(forward.request, pixels=forward.request.pixels * 0.5)
    found = maps(forward.again(request=request))
    clean = dataclasses.replace(forward.trajectory, kept={})
    assert torch.equal(found[0], maps(forward.again(request=request, trajectory=clean))[0])


class Switched(nn.Module):
    """As a layer of PEFT: what it adds depends on attributes, not on weights."""

    def __init__(self, base):
        super().__init__()
        self.base, self._active_adapter, self._disable_adapters = base, ["a"], False
        self.scaling = {"a": 0.5, "b": -0.5}

    def forward(self, x):
        out = self.base(x)
        if self._disable_adapters:
            return out
        return out * (1 + self.scaling[self._active_adapter[0]])


@pytest.mark.parametrize(
    "switch",
    (
        lambda s: setattr(s, "_disable_adapters", True),
        lambda s: setattr(s, "_active_adapter", ["b"]),
        lambda s: s.scaling.update(a=0.25),
    ),
)
def test_other_active_adapters_are_seen(cache, switch):
    forward = tiny.bound(cache, layer=1)
    block = forward.adapter.blocks[0]
    name, linear = next((n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear))
    holder = block.get_submodule(name.rpartition(".")[0])
    setattr(holder, name.rpartition(".")[2], Switched(linear))
    forward.generate(forward.request, **tiny_settings(forward))
    before = maps(forward)
    switch(getattr(holder, name.rpartition(".")[2]))
    found = maps(forward)
    assert not torch.equal(found[0], before[0])
    assert torch.equal(found[0], maps(unrecorded(forward))[0])


@pytest.mark.parametrize("block", (0, 1, 2))
@pytest.mark.parametrize("kind", ("hook", "pre-hook", "forward"))
def test_an_ablation_by_a_users_hook_is_seen(cache, kind, block):
    forward = tiny.bound(cache, layer=1)
    before = maps(forward)
    module = forward.adapter.blocks[block]
    part = next(m for m in module.modules() if isinstance(m, nn.Linear))
    if kind == "hook":
        handle = part.register_forward_hook(lambda _m, _args, out: out * 0.5)
    elif kind == "pre-hook":
        handle = part.register_forward_pre_hook(lambda _m, args: (args[0] * 0.5,))
    else:
        plain = part.forward
        part.forward = lambda x: plain(x) * 0.5
    found = maps(forward)
    assert not torch.equal(found[0], before[0])
    assert torch.equal(found[0], maps(unrecorded(forward))[0])
    if kind == "forward":
        del part.forward
    else:
        handle.remove()
    assert torch.equal(maps(forward)[0], before[0])


def tiny_settings(forward):
    made = forward.trajectory.settings
    return {n: made[n] for n in ("gen_length", "block_length", "steps") if n in made}


def test_training_mode_changes_nothing(cache):
    forward = tiny.bound(cache, layer=1)
    before = maps(forward)
    kept = forward.trajectory.kept["calls"]
    forward.model.train()
    assert torch.equal(maps(forward)[0], before[0])
    assert forward.trajectory.kept["calls"] is kept  # nothing was thrown away
    assert forward.model.training


TYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn),
)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", ((), (1,), (3,), (7, 5), (64, 64), (130, 128)), ids=str)
def test_a_fingerprint_sees_every_value(dtype, shape):
    """Also in a view that begins anywhere in its memory; large ones are summed by themselves."""
    assert 64 * 64 <= SMALL < 130 * 128
    for offset in (0, 1, 3):
        memory = torch.zeros(140 * 140).to(dtype)
        count = int(torch.tensor(shape).prod()) if shape else 1
        view = memory[offset : offset + count].reshape(shape)
        before = fingerprint([view])
        flat = view.data.view(-1)
        for place in {0, count // 2, count - 1}:
            flat[place : place + 1].copy_(torch.ones(1).to(dtype))  # float8 cannot be filled
            assert fingerprint([view]) != before
            flat[place : place + 1].copy_(torch.zeros(1).to(dtype))
            assert fingerprint([view]) == before


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64), ids=str)
def test_a_fingerprint_sees_all_signs_change_and_two_values_change_places(dtype):
    one, other = torch.randn(64, 64).to(dtype), torch.randn(64, 64).to(dtype)
    before = fingerprint([one, other])
    other.data.neg_()
    assert fingerprint([one, other]) != before
    other.data.neg_()
    assert fingerprint([one, other]) == before
    one.data[0, 0], other.data[40, 32] = other[40, 32].clone(), one[0, 0].clone()
    assert fingerprint([one, other]) != before


def test_a_fingerprint_of_what_is_not_contiguous_or_empty():
    turned = torch.randn(4, 6).t()
    before = fingerprint([turned])
    turned.data[5, 3] += 1
    assert fingerprint([turned]) != before
    assert fingerprint([torch.zeros(0)]) == fingerprint([torch.zeros(0)])
    assert fingerprint([torch.zeros(0, 2)]) != fingerprint([torch.zeros(0)])
