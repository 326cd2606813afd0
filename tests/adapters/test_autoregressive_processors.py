"""Requests equal what the families' own processors make, where torchvision lets them be built."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not

import made_ar
from test_autoregressive_input import TALK

import captum_dcam

every = pytest.mark.parametrize("kind", made_ar.KINDS)


def have_torchvision():
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):  # also where torch and torchvision do not fit
        return False
    return True


needs_torchvision = pytest.mark.skipif(
    not have_torchvision(), reason="video processors need torchvision"
)


def processor(kind, fast=False):
    """The family's whole processor; ``fast`` with torchvision's image processor."""
    import transformers as t

    tokenizer, image = made_ar.TOKENIZERS[kind](), made_ar.image_processor(kind)
    if fast:
        name = type(image).__name__.removesuffix("Pil")
        image = getattr(t, name)(**{k: v for k, v in image.to_dict().items() if v is not None})
    if kind == "llava":
        return t.LlavaProcessor(
            image, tokenizer, patch_size=4, vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )  # fmt: skip
    if kind == "internvl":
        video = t.InternVLVideoProcessor(size={"height": 32, "width": 32}, do_sample_frames=False)
        return t.InternVLProcessor(image, tokenizer, video, image_seq_length=16)
    pixels = {**made_ar.QWEN_PIXELS, "size": made_ar.VideoSize().size}
    cls = t.Qwen3VLVideoProcessor if kind == "qwen3_vl" else t.Qwen2VLVideoProcessor
    whole = {
        "qwen2_vl": t.Qwen2VLProcessor,
        "qwen2_5_vl": t.Qwen2_5_VLProcessor,
        "qwen3_vl": t.Qwen3VLProcessor,
    }[kind]
    video = cls(**pixels, do_sample_frames=False, cap_pixels_per_frame=False,
                image_mean=image.image_mean, image_std=image.image_std)  # fmt: skip
    return whole(image, tokenizer, video)


def text_of(made, visuals, prompt):
    """The conversation before its placeholders are expanded."""
    from captum_dcam.adapters.common.conversations import rendered
    from captum_dcam.adapters.common.visuals import visuals_of
    from captum_dcam.model.prompts import messages_of

    return rendered(made._family, messages_of(prompt, visuals_of(visuals)), None)


def compare(made, given, prompt, tolerance=0.0):
    """A request and the processor's own call on the same pictures and text."""
    request = made.prepare([given], [prompt])
    pictures = [g for g in given if not isinstance(g, list)]
    videos = [g for g in given if isinstance(g, list)]
    whole = made.processor
    out = whole(
        text=[text_of(made, given, prompt)],
        images=pictures or None,
        videos=videos or None,
        return_tensors="pt",
    )
    ours = made._inputs(request.pixels, request.extras)
    assert torch.equal(ours["input_ids"], out["input_ids"])
    assert torch.equal(ours["attention_mask"], out["attention_mask"])
    for name in ("pixel_values", "pixel_values_videos"):
        assert (name in ours) == (name in out)
        if name in ours:
            assert ours[name].shape == out[name].shape
            assert float((ours[name] - out[name]).abs().max()) <= tolerance
    for name in ("image_grid_thw", "video_grid_thw", "mm_token_type_ids"):
        assert (name in ours) == (name in out)
        if name in ours:
            assert torch.equal(ours[name], out[name])
    if "second_per_grid_ts" in out:
        assert [float(s) for s in ours["second_per_grid_ts"]] == pytest.approx(
            [float(s) for s in out["second_per_grid_ts"]]
        )
    return request


def test_llavas_processor():
    made = captum_dcam.wrap(made_ar.model("llava"), processor("llava"))
    for size in ((40, 40), (96, 32), (30, 100)):
        compare(made, [made_ar.picture(1, size)], "is it red ?")
    compare(made, [made_ar.picture(1), made_ar.picture(2, (60, 30))], TALK)


@needs_torchvision
@every
def test_pictures(kind):
    made = captum_dcam.wrap(made_ar.model(kind), processor(kind))
    for size in ((40, 40), (96, 32), (30, 100), (9, 9), (333, 250)):
        compare(made, [made_ar.picture(1, size)], "is it red ?")
    compare(made, [made_ar.picture(1), made_ar.picture(2, (60, 30))], TALK)


@needs_torchvision
@every
def test_torchvisions_image_processors(kind):
    made = captum_dcam.wrap(made_ar.model(kind), processor(kind, fast=True))
    for size in ((40, 40), (96, 32), (30, 100)):
        compare(made, [made_ar.picture(1, size)], "is it red ?")
    assert made.generate(made.prepare([[made_ar.picture()]], [""]), max_new_tokens=1)


@needs_torchvision
@pytest.mark.parametrize("kind", (*made_ar.QWEN, "internvl"))
@pytest.mark.parametrize("frames", (2, 4, 5))
def test_videos(kind, frames):
    """Frames are resized by Pillow here and by torchvision there: a few grey values apart."""
    made = captum_dcam.wrap(made_ar.model(kind), processor(kind))
    compare(made, [made_ar.video(frames)], "is it red ?", tolerance=0.05)
    compare(made, [made_ar.video(frames, (24, 40)), made_ar.picture()], "a", tolerance=0.05)


@needs_torchvision
@every
def test_a_checkpoint_with_its_whole_processor_loads(kind, tmp_path):
    made_ar.model(kind).save_pretrained(tmp_path)
    processor(kind, fast=True).save_pretrained(tmp_path)
    made = captum_dcam.load(tmp_path)
    assert type(made.processor).__name__.endswith("Processor")
    request = made.prepare([[made_ar.picture()]], ["is it red ?"])
    assert made.generate(request, max_new_tokens=2).tokens.shape[0] == 1
