"""How many words run at once follows from bytes, and changes no map."""

import pytest
import tiny
import torch

import captum_dcam
from captum_dcam.model import budget
from captum_dcam.model import gradients as vjp
from captum_dcam.model.budget import MOST, free_bytes, rows_at_once
from captum_dcam.model.words import Target


@pytest.fixture(params=tiny.CACHES)
def cache(request):
    return request.param


def test_rows_follow_from_the_budget(cache):
    forward = tiny.bound(cache)
    assert free_bytes(forward.adapter) is None and rows_at_once(forward) == MOST[cache]
    assert rows_at_once(forward, budget=0) == 1
    assert rows_at_once(forward, budget=2**40) == MOST[cache]
    # a block has q, k, v, out (d to d) and three products between d and the MLP's width m
    d, m = tiny.SHAPE["hidden_size"], tiny.SHAPE["intermediate_size"]
    layout = forward.request.layout
    tokens = 8 + (0 if cache == "prefix" else layout.prefix_length)
    blocks = 4 if cache == "prefix" else 4 - forward.layer - 1
    row = tokens * (blocks * (8 * d + 3 * (d + m)) + 2 * forward.adapter.vocabulary) * 4
    for cached in (0, 10**6):
        assert rows_at_once(forward, cached, 2 * (row + cached)) == 2
        assert rows_at_once(forward, cached, 2 * (row + cached) - 1) == 1


def test_what_is_free_decides_and_maps_stay(cache, monkeypatch):
    forward = tiny.bound(cache)
    plain = captum_dcam.explain_generation(forward)
    name = "_cache_gradients" if cache == "prefix" else "_full_rows"
    real, sizes = getattr(vjp, name), []

    def seen(*args):
        sizes.append(len({r.target for r in args[-2]}))
        return real(*args)

    monkeypatch.setattr(vjp, name, seen)
    monkeypatch.setattr(budget, "free_bytes", lambda _adapter: 0)
    found = captum_dcam.explain_generation(tiny.bound(cache))
    assert set(sizes) == {1} and len(sizes) >= len(found.words) > 1
    assert tiny.relative(found.maps[0], plain.maps[0]) < 1e-5


def test_a_word_of_a_batch_gets_its_own_gradient():
    """The cotangent of one row is that row itself, of several their sum."""
    forward = tiny.bound("prefix", batch=2)
    tokens = forward.trajectory.tokens
    targets = [
        Target(str((b, p)), p, tuple(int(tokens[b, i]) for i in p))
        for b in range(2)
        for p in ((1,), (2, 5))
    ]
    together = vjp.target_gradients(forward, targets, [0, 0, 1, 1])
    for number, target in enumerate(targets):
        single = tiny.bound("prefix", batch=2)
        (alone,) = vjp.target_gradients(single, [target], [number // 2])
        assert tiny.relative(together[number].gradients[0], alone.gradients[0]) < 1e-5


def test_memory_of_a_gpu_is_what_it_has_and_what_torch_holds_unused(monkeypatch):
    adapter = tiny.adapter("prefix")
    assert budget.places_of(adapter) == {torch.device("cpu")}
    places = {torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")}
    monkeypatch.setattr(budget, "places_of", lambda _adapter: places)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: ([100, 300][place.index], 999))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda place: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda place: 20)
    assert free_bytes(adapter) == 130
