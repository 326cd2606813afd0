"""SDAR-VL's adapter against its authors' decoding loop, on the double.

``CAPTUM_DCAM_UPSTREAM_SDAR_VL=/folder/SDAR-VL pytest -q tests/upstream``; skipped without the
variable.
"""

import pytest
import tiny
import torch
from doubles import block_checks as checks
from upstream import made_sdar_vl as real

from captum_dcam.testing import CHECKS

pytestmark = pytest.mark.skipif(
    real.FOLDER is None, reason="CAPTUM_DCAM_UPSTREAM_SDAR_VL names no checkout of JetAstra/SDAR-VL"
)


@pytest.mark.parametrize("check", ("replay", "feasible", "inputs"))
@pytest.mark.parametrize("number", range(2))
def test_conformance(number, check):
    CHECKS[check](checks.sdar_vl(real.adapter, real.greedy, "script")[number])


def answers(made, settings, seed=None, stops=None):
    """The adapter's answer and the script's, cut to the blocks that were begun."""
    request = made.prepare([[tiny.picture(size=(84, 56))]], ["what is this red circle"])
    draws = None if seed is None else torch.Generator().manual_seed(seed)
    found = made.generate(request, generator=draws, **settings).tokens
    own = {"denoising_steps": made.block_length, **settings}
    own |= {"top_k": 1, "temperature": 1.0} if seed is None else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0 if seed is None else checks.drawn(seed))
        ids = real.loop()(
            made.model,
            made.inputs(request.pixels, request.extras),
            made.mask_id,
            block_length=made.block_length,
            stopping_criteria_idx=stops,
            **own,
        )
    return found, ids[:, request.layout.prefix_length :][:, : found.shape[1]]


@pytest.mark.parametrize("strategy", ("low_confidence_dynamic", "low_confidence_static"))
@pytest.mark.parametrize("seed", range(3))
def test_the_same_sampling(strategy, seed):
    settings = dict(gen_length=13, temperature=1.3, top_k=30, top_p=0.8)
    settings |= dict(remasking_strategy=strategy, confidence_threshold=0.2)
    found, script = answers(real.adapter(), settings, seed)
    assert torch.equal(found, script)


def test_an_answer_that_repeats_itself_is_broken_off():
    made = real.adapter()
    weight = made.head.weight.data
    weight[:] = 0
    made.head.register_forward_hook(lambda _m, _a, out: out.index_fill(-1, torch.tensor(11), 9.0))
    found, script = answers(made, dict(gen_length=60))
    assert 20 <= found.shape[1] < 30 and torch.equal(found, script)


def test_an_answer_ends_with_the_block_of_its_end():
    made = real.adapter()
    end = made.processor.tokenizer.eos_token_id
    found, _ = answers(made, dict(gen_length=40))
    made.head.weight.data[end] = made.head.weight[int(found[0, 2])] * 1.5
    stops = sorted(super(type(made).__mro__[2], made).stop_ids)
    found, script = answers(made, dict(gen_length=40), stops=stops)
    assert end in found[0, -4:].tolist() and found.shape[1] < 20 and torch.equal(found, script)
