"""One model and several threads: every answer and map as alone, and the model untouched."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch

from captum_dcam import compare, explain
from captum_dcam.attribution import DiffusionCAM
from captum_dcam.faithfulness.sanity import parameter_randomization
from captum_dcam.maps import Reading
from captum_dcam.maps import word_maps as maps_of
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.words import resolve

#: `python3 start.py attacks` runs 50
ROUNDS = 50 if os.environ.get("CAPTUM_DCAM_EVERY_CASE") else 3
PROMPT = "what is red ?"
PICTURES = [tiny.picture(seed) for seed in range(3)]
METHODS = ("diffusion_cam", "attn_lrp", "attention", "tam", "saliency", "llava_cam")
SETTINGS = {"gen_length": 4, "block_length": 4, "steps": 2}


def explained(adapter, n):
    found = explain(adapter, PICTURES[n], PROMPT, layer=1, **SETTINGS)
    return (found.answer, *found.maps)


def compared(adapter, n):
    found = compare(adapter, PICTURES[n], PROMPT, [0], METHODS, layer=1, errors="raise", **SETTINGS)
    return (found.answer, *(m for row in found.rows for m in row.raw))


def generated(adapter, n):
    request = adapter.prepare([[PICTURES[n]]], [PROMPT])
    made = adapter.generate(request, generator=None, **SETTINGS)
    return made.tokens, made.confidence


def sampled(adapter, n):
    request = adapter.prepare([[PICTURES[n]]], [PROMPT])
    draws = torch.Generator().manual_seed(n)
    made = adapter.generate(request, generator=draws, temperature=1.0, **SETTINGS)
    return made.tokens, made.confidence


def attributed(adapter, n):
    forward = DenoisingForward(adapter, 1)
    forward.generate(adapter.prepare([[PICTURES[n]]], [PROMPT]), **SETTINGS)
    target = (1, int(forward.trajectory.tokens[0, 1]))
    return (DiffusionCAM(forward).attribute(forward.request.pixels, target),)


WORK = (explained, compared, generated, sampled, attributed)


def state(model):
    return (
        [(name, value.clone()) for name, value in model.state_dict().items()],
        tiny.hooks(model),
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [sorted(vars(module)) for module in model.modules()],  # a stand-in would be there
    )


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def test_threads_on_one_model_find_what_one_alone_finds(cache):
    adapter = tiny.adapter(cache)
    adapter.model.train()
    jobs = [(work, n) for n in range(len(PICTURES)) for work in WORK]
    alone = {job: job[0](adapter, job[1]) for job in jobs}
    before = state(adapter.model)
    with ThreadPoolExecutor(4) as pool:
        for turn in range(ROUNDS):
            order = jobs[turn:] + jobs[:turn]
            some = order if ROUNDS > 3 else order[turn % 2 :: 2]
            for job, found in zip(some, pool.map(lambda j: j[0](adapter, j[1]), some), strict=True):
                assert same(found, alone[job]), (job[0].__name__, job[1], turn)
    assert same(state(adapter.model), before)


def test_two_adapters_of_one_model_share_its_lock_and_two_models_do_not():
    adapter = tiny.adapter("prefix")
    twin = type(adapter)(adapter.model, adapter.processor, "none")
    assert adapter.lock is twin.lock
    assert adapter.lock is not tiny.adapter("prefix").lock


def test_a_user_who_holds_the_lock_has_the_model_alone():
    adapter = tiny.adapter("prefix")
    done = threading.Event()

    def work():
        explained(adapter, 0)
        done.set()

    with adapter.lock:
        thread = threading.Thread(target=work)
        thread.start()
        before = state(adapter.model)
        for _ in range(20):
            generated(adapter, 1)  # re-entrant
        assert not done.is_set() and same(state(adapter.model), before)
    thread.join()
    assert done.is_set()


def test_threads_on_different_models_run_side_by_side():
    """Each waits inside its own model for the other one: neither would come without it."""
    both = threading.Barrier(2)
    adapters = [tiny.adapter("prefix") for _ in range(2)]
    for adapter in adapters:
        once = []

        def meet(*_, once=once):
            if not once:
                once.append(1)
                both.wait()

        adapter.blocks[0].register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda a: explained(a, 0)[0], adapters))
    assert answers[0] == answers[1]


def test_a_thread_that_randomises_weights_shows_them_to_nobody():
    adapter = tiny.adapter("none")
    wanted = explained(adapter, 0)
    forward = DenoisingForward(adapter, 1)
    forward.generate(adapter.prepare([[PICTURES[1]]], [PROMPT]), **SETTINGS)
    words = resolve(adapter, forward.trajectory.tokens[0].tolist(), None)[:1]
    inside = threading.Event()

    def maps(fresh, targets):
        inside.set()
        return maps_of(fresh, targets, [0] * len(targets), Reading())

    draws = torch.Generator().manual_seed(0)
    with ThreadPoolExecutor(2) as pool:
        cascade = pool.submit(parameter_randomization, forward, words, maps, draws, stages=2)
        inside.wait()
        assert same(explained(adapter, 0), wanted)
        cascade.result()


@pytest.mark.parametrize("failing", (explained, compared))
def test_an_error_in_one_thread_leaves_the_model_to_the_others(failing):
    adapter = tiny.adapter("prefix")
    wanted = explained(adapter, 0)
    handle = adapter.blocks[2].register_forward_hook(lambda *_: 1 / 0)

    def fail(n):
        with pytest.raises(ZeroDivisionError):
            failing(adapter, n)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fail, [*range(len(PICTURES)), 0]))
    handle.remove()
    assert same(explained(adapter, 0), wanted)
