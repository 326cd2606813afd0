"""Threads on one model of every family find what one alone finds, and leave nothing on it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch

from captum_dcam import DiffusionCAM, explain
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.testing.__main__ import cases_in

CASES = cases_in(Path(__file__).parent / "cases")
FAMILIES = list({case.name.partition(",")[0]: case for case in CASES}.values())


def generated(case, adapter, seed):
    request = adapter.prepare([[case.picture(seed)]], [case.prompt])
    made = adapter.generate(request, generator=case.generator(), **case.settings)
    return (made.tokens, made.commit_step, made.confidence, *made.states)


def explained(case, adapter, seed):
    found = explain(
        adapter, case.picture(seed), case.prompt, preset="base", generator=case.generator(),
        **case.settings,
    )  # fmt: skip
    return found.maps


def attributed(case, adapter, seed):
    forward = DenoisingForward(adapter, 0)
    request = adapter.prepare([[case.picture(seed)]], [case.prompt])
    forward.generate(request, generator=case.generator(), **case.settings)
    stop = adapter.stop_ids
    tokens = forward.trajectory.tokens[0].tolist()
    position = next(p for p, token in enumerate(tokens) if token not in stop)
    target = (position, tokens[position])
    maps = DiffusionCAM(forward, preset="base").attribute(request.pixels, target)
    return maps if isinstance(maps, tuple) else (maps,)


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_threads_on_one_model(case):
    adapter = case.make(torch.float32)
    jobs = [(work, seed) for seed in range(2) for work in (generated, explained, attributed)]
    alone = [work(case, adapter, seed) for work, seed in jobs]
    before = tiny.hooks(adapter.model), sorted(adapter.model.state_dict())
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda job: job[0](case, adapter, job[1]), jobs))
    for job, one, other in zip(jobs, found, alone, strict=True):
        assert len(one) == len(other)
        assert all(map(torch.equal, one, other)), job[0].__name__
    assert (tiny.hooks(adapter.model), sorted(adapter.model.state_dict())) == before


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_threads_on_two_models(case):
    """What belongs to the process (its random state, compiled functions, repairs) is shared."""
    adapters = [case.make(torch.float32) for _ in range(2)]
    alone = explained(case, adapters[0], 0)
    state = torch.random.get_rng_state()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda adapter: explained(case, adapter, 0), adapters * 2))
    assert all(all(map(torch.equal, one, alone)) for one in found)
    assert torch.equal(torch.random.get_rng_state(), state)
