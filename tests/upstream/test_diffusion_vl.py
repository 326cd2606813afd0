"""DiffusionVL's adapter on tiny random instances of the upstream code.

``CAPTUM_DCAM_UPSTREAM_DIFFUSION_VL=/folder/DiffusionVL pytest -q tests/upstream``; skipped without
the variable, and under transformers 5, where upstream cannot be imported.
"""

import pytest
import tiny
import torch
from doubles import block_checks as checks
from upstream import made_diffusion_vl as real

from captum_dcam.testing import CHECKS

pytestmark = pytest.mark.skipif(
    real.FOLDER is None,
    reason="CAPTUM_DCAM_UPSTREAM_DIFFUSION_VL names no checkout of hustvl/DiffusionVL",
)


@pytest.fixture(scope="module")
def upstream():
    return real.package()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("number", range(2))
def test_conformance(upstream, number, check):
    def make(dtype=torch.float32):
        return real.adapter(upstream, dtype)

    CHECKS[check](checks.diffusion_vl(make, "upstream", float64=real.exact)[number])


def test_an_image_is_one_id_and_its_tokens_stand_in_its_place(upstream):
    made = real.adapter(upstream)
    request = made.prepare([[tiny.picture(size=(84, 56))] * 2], ["what is this red circle"])
    given = made.inputs(request.pixels, request.extras)
    assert (given["inputs"] == -200).sum() == 2
    memory = made.embed(request.pixels, *request.extras)
    assert memory.embeds.shape[1] == request.layout.prefix_length
    text = made.prompt_tokens(request)
    assert torch.equal(memory.embeds[0, text[0]], made.decoder.embed_tokens(text[1]))


def test_the_same_sampling_as_upstream(upstream):
    made = real.adapter(upstream)
    request = made.prepare([[tiny.picture(size=(84, 56))]], ["what is this red circle"])
    settings = dict(gen_length=6, steps=2, temperature=0.7, top_k=20, top_p=0.9)
    found = made.generate(request, generator=torch.Generator().manual_seed(3), **settings)
    with torch.random.fork_rng(devices=[]):
        own = torch.Generator().manual_seed(3)
        torch.manual_seed(int(torch.randint(2**31, (), generator=own)))
        given = made.inputs(request.pixels, request.extras)
        assert torch.equal(found.tokens, made.model.generate(**given, **settings))
