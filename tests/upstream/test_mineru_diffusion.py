"""MinerU-Diffusion's adapter on tiny random instances of the upstream code.

``CAPTUM_DCAM_UPSTREAM_MINERU_DIFFUSION=/folder/MinerU-Diffusion pytest -q tests/upstream``; skipped
without the variable.
"""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from doubles import block_checks as checks
from doubles import dream_vl as qwen
from doubles.mineru_diffusion import TEMPLATE
from safetensors.torch import save_file
from upstream import made_mineru_diffusion as real

import captum_dcam
from captum_dcam.adapters.common.block import Blocks
from captum_dcam.adapters.common.loading import Parts
from captum_dcam.testing import CHECKS

pytestmark = pytest.mark.skipif(
    real.FOLDER is None,
    reason="CAPTUM_DCAM_UPSTREAM_MINERU_DIFFUSION names no checkout of MinerU-Diffusion",
)


@pytest.fixture(scope="module")
def upstream():
    return real.package()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("number", range(2))
def test_conformance(upstream, number, check):
    def make(dtype=torch.float32):
        return real.adapter(upstream, dtype)

    CHECKS[check](checks.mineru_diffusion(make, "upstream", float64=real.exact)[number])


@pytest.mark.parametrize("steps", (1, 2, 3, 4))
@pytest.mark.parametrize("seed", range(3))
def test_commit_steps_are_upstreams_step_map(upstream, steps, seed):
    """A step writes over visible tokens where masks are fewer than its number; where it writes what
    stood there already, the token has committed before."""
    made = real.adapter(upstream)
    request = made.prepare([[tiny.picture(size=(84, 56))]], ["what is this red circle"])
    settings = dict(gen_length=12, denoising_steps=steps, dynamic_threshold=0.5)
    draws = torch.Generator().manual_seed(seed)
    found = made.generate(request, generator=draws, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(checks.drawn(seed))
        own = made.options(made.checked(settings, draws))
        tokens, step_map, _ = made.model.generate(
            **made.inputs(request.pixels, request.extras), **own
        )
    count = tokens.shape[1]  # up to what ends the answer
    assert torch.equal(found.tokens[:, :count], tokens)
    theirs = step_map[:, : found.tokens.shape[1]] - 1
    again = found.commit_step != theirs
    assert bool((found.commit_step <= theirs).all())
    after = torch.cat((found.states[0], found.tokens[None]))
    for position in again[0].nonzero()[:, 0].tolist():
        at = int(theirs[0, position])
        assert after[at, 0, position] == after[at + 1, 0, position]


@pytest.mark.parametrize("length", (4, 7, 32))
def test_who_sees_whom(upstream, length):
    theirs = real.model(upstream).language_model
    prompt = 32
    mask = theirs._build_full_attention_mask(prompt, 2 * length, length, torch.device("cpu"))
    assert torch.equal(Blocks(length, prompt, prompt).seen(0, prompt + 2 * length), mask)


def test_a_saved_checkpoint_is_loaded_with_its_code(upstream, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.syspath_prepend(str(tmp_path / "m"))
    plain, folder = real.model(upstream), tmp_path / "checkpoint"
    plain.config.save_pretrained(folder)
    save_file(dict(plain.state_dict()), folder / "model.safetensors", {"format": "pt"})
    for file in (Path(real.FOLDER) / "mineru_diffusion").glob("*_mineru_diffusion.py"):
        shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # upstream gives them twice
        config.pop(name, None)
    config["vision_config"]["model_type"] = "qwen2_vl"  # transformers 5 writes another
    (folder / "config.json").write_text(json.dumps(config))
    processor = Parts(qwen.tokenizer(), qwen.ImageProcessor(), None, TEMPLATE)
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda *_, **__: processor)
    with pytest.raises(PermissionError, match="trust_remote_code=True"):
        captum_dcam.load(folder)
    made = captum_dcam.load(folder, trust_remote_code=True, block_length=real.LENGTH)
    own = plain.state_dict()
    assert all(torch.equal(t, own[name]) for name, t in made.model.state_dict().items())
    picture, draws = tiny.picture(size=(84, 56)), torch.Generator().manual_seed(0)
    found = captum_dcam.explain(made, picture, "what is this", gen_length=8, generator=draws)
    assert found.words and all(bool(m.any()) for m in found.maps)
