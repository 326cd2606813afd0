"""What is Qwen3.5's, Gemma 4's and LLaVA-OneVision's own; the rest is in the conformance suite."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not

import made_ar
import tiny
from hypothesis import example, given
from hypothesis import strategies as st

from captum_dcam.adapters.common import anyres
from captum_dcam.comparing import compare_generation
from captum_dcam.errors import InputError, LayerError, MethodError
from captum_dcam.explaining import explain_generation
from captum_dcam.model import gradients as vjp
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.words import Target

#: LLaVA-OneVision's, (H, W)
PINPOINTS = [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)]


@given(st.integers(60, 1700), st.integers(60, 1700))
@example(369, 820)  # 27 · 820 / 369 is 60, and in floating point less
@example(375, 1375)
@example(1375, 375)
def test_an_image_has_the_tokens_that_the_processor_counts(width, height):
    made_ar.needs()
    from transformers.models.llava_onevision import processing_llava_onevision as theirs

    counts = object.__new__(theirs.LlavaOnevisionProcessor)  # whole it would need torchvision
    counts.image_processor = SimpleNamespace(image_grid_pinpoints=PINPOINTS)
    counts.num_image_tokens, counts.vision_aspect_ratio = 27**2, "anyres_max_9"
    pins = tuple((w, h) for h, w in PINPOINTS)
    tiling = anyres.Tiling(384, 27, 14, pins, most=9, digits=7)
    wanted = counts._get_number_of_features(height, width, 384, 384)
    assert anyres.token_count((width, height), tiling) == wanted


def test_several_images_are_a_view_each():
    adapter = made_ar.shared_adapter("llava_onevision")
    one, two = made_ar.picture(0, (120, 40)), made_ar.picture(1, (30, 60))
    alone = adapter.prepare([[one]], ["a"])
    together = adapter.prepare([[one, two]], ["a"])
    assert [g.shape for g in alone.layout.grids] == [(8, 8), (6, 19)]
    assert [g.shape for g in together.layout.grids] == [(8, 8)] * 2
    # padded to a square: the middle rows of the wide image lie in it, the first ones outside
    box = together.layout.grids[0].box
    assert box(0, 0)[3] <= 0 < box(4, 0)[1] < 40
    for request, count in ((alone, 1), (together, 2)):
        inputs = adapter._inputs(request.pixels, request.extras)
        assert inputs["batch_num_images"].tolist() == [count]
    video = made_ar.video(3)
    shown = adapter.prepare([[video, one]], ["a"])
    assert [g.shape for g in shown.layout.grids] == [(4, 4)] * 3 + [(8, 8), (6, 19)]
    with pytest.raises(InputError, match=r"videos have \[2, 3\] frames"):
        adapter.prepare([[video, video[:2]]], ["a"])


@pytest.mark.parametrize("kind", ["qwen3_5", "gemma4"])
def test_a_batch_needs_prompts_of_one_length(kind):
    adapter = made_ar.shared_adapter(kind)
    shown = [[made_ar.picture()], [made_ar.picture(1)]]
    with pytest.raises(InputError, match=r"padding, too, so a batch needs prompts of one length"):
        adapter.prepare(shown, ["what is red ?", "what ?"])
    assert adapter.prepare(shown, ["what is red ?", "what is blue ?"]).batch == 2


def test_recurrent_states_are_read_and_not_written():
    """A single token, several, and the gradients of both: the prefix stays as it was."""
    forward = made_ar.shared("qwen3_5")
    adapter, tokens = forward.adapter, forward.trajectory.tokens
    with torch.no_grad():
        memory = adapter.prefill(adapter.embed(forward.request.pixels, *forward.request.extras))
        before = [t.clone() for t in adapter.memory_tensors(memory)]
        whole = adapter.denoise(memory, tokens)
        one = adapter.denoise(memory, tokens[:, :1])
        assert tiny.relative(one, whole[:, :1]) < 1e-5
        assert torch.equal(adapter.denoise(memory, tokens), whole)
    assert all(map(torch.equal, adapter.memory_tensors(memory), before))
    kinds = adapter.model.config.text_config.layer_types
    assert kinds == ["linear_attention"] * 3 + ["full_attention"]
    targets = [Target(str(p), (p,), (int(tokens[0, p]),)) for p in (1, 3)]
    both = vjp.target_gradients(forward, targets)
    alone = [vjp.target_gradients(forward.again(), [t])[0] for t in targets]
    for row, own in zip(both, alone, strict=True):
        assert tiny.relative(row.gradients[0], own.gradients[0]) < 1e-5 and row.gradients[0].any()


def test_linear_attention_has_no_weights():
    with pytest.raises(MethodError, match=r"blocks \[0, 1, 2\].*it is linear attention"):
        compare_generation(made_ar.shared("qwen3_5"), methods=["attention"], errors="raise")


def test_blocks_that_read_the_keys_of_others_have_no_path():
    adapter = made_ar.shared_adapter("gemma4_e")
    assert len(adapter.blocks) == 6 and adapter.deepest_block == 2
    with pytest.raises(LayerError, match="block 3 has no path"):
        DenoisingForward(adapter, 3)
    forward = made_ar.shared("gemma4_e").again(2)
    found = explain_generation(forward)
    assert found.words and all(bool(torch.isfinite(m).all()) for m in found.maps)
    logits = adapter.unembed(torch.randn(1, 32) * 50)
    assert float(logits.abs().max()) <= 30.0  # the soft cap
