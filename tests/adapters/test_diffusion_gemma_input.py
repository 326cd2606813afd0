"""DiffusionGemma: which image token sees which pixels, prompts, and input that cannot work."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers.models.diffusion_gemma")
sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not

import made_diffusion_gemma as made_dg

import captum_dcam
from captum_dcam.adapters.common.loading import Parts
from captum_dcam.errors import WeightsError

#: (width, height): square, wide, tall, tiny, large, and the grid (h, w) of 70 tokens at most
SIZES = {
    (40, 40): (8, 8),
    (96, 32): (4, 14),
    (30, 100): (15, 4),
    (9, 9): (8, 8),
    (5, 11): (12, 5),
    (333, 250): (7, 9),
    (97, 61): (6, 10),
    (512, 300): (6, 10),
    (1920, 1080): (6, 11),
    (3, 300): (70, 1),
}


def pooled(made, request):
    """(N, 3) mean colour of every image token, as the family's own pooling orders them."""
    tower = made.model.model.encoder.vision_tower
    pixels, at = request.pixels[0], request.extras[2][0]
    colours = pixels.unflatten(2, (-1, 3)).mean(2)
    padding = (at == -1).all(-1)
    found, mask = tower.pooler(
        hidden_states=colours,
        pixel_position_ids=at,
        padding_positions=padding,
        output_length=pixels.shape[1] // made_dg.KERNEL**2,
    )
    return found[mask] / tower.pooler.root_hidden_size


@pytest.mark.parametrize("size", SIZES)
def test_tokens_see_the_pixels_of_their_boxes(size):
    """A picture whose red grows to the right and whose green grows downwards."""
    width, height = size
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    ramps = Image.fromarray((np.stack((x, y, 0 * x), -1) * 255).round().astype(np.uint8))
    made = made_dg.adapter()
    request = made.prepare([[ramps]], [made_dg.PROMPT])
    (grid,) = request.layout.grids
    assert grid.shape == SIZES[size] and grid.image_size == (height, width)
    colours = pooled(made, request).view(*grid.shape, 3)
    for r in range(grid.shape[0]):
        for c in range(grid.shape[1]):
            x0, y0, x1, y1 = grid.box(r, c)
            red, green, _ = colours[r, c].tolist()
            # resizing blurs: half a cell, and a pixel of the tiny picture
            assert abs(red * width - (x0 + x1) / 2) <= 0.5 * (x1 - x0) + 1
            assert abs(green * height - (y0 + y1) / 2) <= 0.5 * (y1 - y0) + 1
    owned = torch.zeros(grid.shape).flatten()
    owners = made.pixel_tokens(request).expand_as(request.pixels)
    inside = owners >= 0
    owned.index_add_(0, owners[inside], request.pixels[inside])
    per_token = made_dg.KERNEL**2 * made_dg.PATCH**2
    assert torch.allclose(owned / per_token, colours.sum(-1).flatten(), atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_a_bright_patch_comes_back_where_it_is(size):
    width, height = size
    made = made_dg.adapter()
    for fx, fy in ((0.1, 0.2), (0.5, 0.5), (0.93, 0.85)):
        canvas = np.zeros((height, width, 3), dtype=np.uint8)
        x, y = int(fx * width), int(fy * height)
        dx, dy = max(1, width // 12), max(1, height // 12)
        canvas[max(0, y - dy // 2) : y + dy // 2 + 1, max(0, x - dx // 2) : x + dx // 2 + 1] = 255
        request = made.prepare([[Image.fromarray(canvas)]], [""])
        (grid,) = request.layout.grids
        values = pooled(made, request).sum(-1).view(grid.shape)
        pixels = grid.to_pixels(values)
        assert pixels.shape == (height, width)
        peak = int(pixels.argmax())
        wide, high = width / grid.shape[1], height / grid.shape[0]
        assert abs(peak % width - x) <= wide + dx and abs(peak // width - y) <= high + dy


def test_image_tokens_lie_where_the_layout_says():
    made = made_dg.adapter()
    given = [made_dg.picture(0), made_dg.picture(1, (90, 30))]
    request = made.prepare([given], [made_dg.PROMPT])
    ids = request.extras[0][0]
    at = torch.cat([g.positions.flatten() for g in request.layout.grids])
    config = made.model.config
    assert torch.equal(at, (ids == config.image_token_id).nonzero()[:, 0])
    assert [g.image for g in request.layout.grids] == [0, 1]
    for grid in request.layout.grids:
        first, last = int(grid.positions[0, 0]), int(grid.positions[-1, -1])
        assert ids[first - 1] == config.boi_token_id and ids[last + 1] == config.eoi_token_id
    embedded = made.embed(request.pixels, *request.extras)
    features = made.model.model.encoder.get_image_features(
        request.pixels[0], request.extras[2][0], return_dict=True
    ).pooler_output
    assert torch.equal(embedded.embeds[0, at], features)


def text_of(made, request):
    return "".join(made._tokenizer.convert_ids_to_tokens(request.extras[0][0])).replace("▁", " ")


def test_the_published_format_and_conversations():
    made = made_dg.adapter()
    request = made.prepare([[made_dg.picture()]], ["what is red ?"])
    seen = text_of(made, request)
    image = f"<|image>{'<|image|>' * 64}<image|>"
    assert seen == f"<bos><|turn>user\n{image}what is red ?<turn|>\n<|turn>model\n"
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "what "}, {"type": "image"}]},
        {"role": "assistant", "content": "a red square"},
        {"role": "user", "content": "is the image blue ?"},
    ]
    seen = text_of(made, made.prepare([[made_dg.picture()]], [talk]))
    assert seen == (
        f"<bos><|turn>user\nwhat {image}<turn|>\n<|turn>model\na red square<turn|>\n"
        "<|turn>user\nis the image blue ?<turn|>\n<|turn>model\n"
    )


def test_the_checkpoints_own_template_is_used():
    template = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] if p['type'] == "
    template += "'text' else '<|image|>' }}{% endfor %}{% endfor %}?"
    parts = Parts(made_dg.tokenizer(), made_dg.image_processor(), None, template)
    made = captum_dcam.wrap(made_dg.model(), parts)
    seen = text_of(made, made.prepare([[made_dg.picture()]], ["a"]))
    assert seen == f"<|image>{'<|image|>' * 64}<image|>a?"


def test_prompt_tokens_are_the_text():
    made = made_dg.adapter()
    request = made.prepare([[made_dg.picture()]], ["what is red ?"])
    positions, ids = made.prompt_tokens(request)
    assert torch.equal(request.extras[0][0, positions], ids)
    assert "".join(made.token_texts(ids.tolist())) == "user\nwhat is red ?\nmodel\n"
    assert made.encode("what is red ?") == ids.tolist()[5:-7]


@pytest.mark.skipif(not made_dg.TORCHVISION, reason="the whole processor needs torchvision")
def test_requests_equal_the_familys_processor():
    whole = made_dg.whole_processor()
    made = captum_dcam.wrap(made_dg.model(), whole)
    for size in SIZES:
        picture = made_dg.picture(0, size)
        request = made.prepare([[picture]], ["what is red ?"])
        text = "<bos><|turn>user\n<|image|>what is red ?<turn|>\n<|turn>model\n"
        out = whole(images=[picture], text=text, return_tensors="pt", add_special_tokens=False)
        assert torch.equal(request.extras[0], out["input_ids"])
        assert torch.equal(request.extras[2][0], out["image_position_ids"])
        assert torch.equal(request.pixels[0], out["pixel_values"])
        types = made._inputs(request.pixels, request.extras)["mm_token_type_ids"]
        assert torch.equal(types, out["mm_token_type_ids"])


# -- input that cannot work ------------------------------------------------------------------------


def test_a_picture_too_large_for_the_context():
    made = made_dg.adapter(max_position_embeddings=80)
    with pytest.raises(ValueError, match="context is 80: the image span would be truncated"):
        made.prepare([[made_dg.picture()]], [made_dg.PROMPT])


def test_video_is_refused():
    made = made_dg.adapter()
    with pytest.raises(ValueError, match=r"takes no video|takes none"):
        made.prepare([[[made_dg.picture(), made_dg.picture()]]], ["what ?"])


def test_a_processor_that_does_not_fit():
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    other = Parts(made_dg.tokenizer(), Gemma4ImageProcessorPil(patch_size=8, max_soft_tokens=70))
    with pytest.raises(ValueError, match="do not fit"):
        captum_dcam.wrap(made_dg.model(), other)
    with pytest.raises(TypeError, match="without tokenizer and image_processor"):
        captum_dcam.wrap(made_dg.model(), made_dg.tokenizer())


def test_a_model_without_bidirectional_pictures_is_refused():
    with pytest.raises(ValueError, match='expected "vision"'):
        made_dg.adapter(use_bidirectional_attention=None)


def test_models_of_other_families_are_refused():
    from captum_dcam.adapters.diffusion_gemma import DiffusionGemmaAdapter

    with pytest.raises(ValueError, match="expected DiffusionGemmaForBlockDiffusion"):
        DiffusionGemmaAdapter(made_dg.model().model, made_dg.parts())
    with pytest.raises(ValueError, match="knows \\('prefix',\\)"):
        captum_dcam.wrap(made_dg.model(), made_dg.parts(), cache="none")


def test_loading(tmp_path):
    model = made_dg.model()
    made_dg.save(model, tmp_path)
    made = captum_dcam.load(tmp_path)
    assert made.family == "diffusion_gemma"
    request = made.prepare([[made_dg.picture()]], [made_dg.PROMPT])
    same = captum_dcam.wrap(model, made_dg.parts()).generate(request, gen_length=6, steps=3, seed=1)
    assert torch.equal(made.generate(request, gen_length=6, steps=3, seed=1).tokens, same.tokens)
    with pytest.raises(WeightsError, match="diffusiongemma-26B"):
        captum_dcam.load("diffusion_gemma")
    with pytest.raises(WeightsError, match="not 'autoregressive'"):
        captum_dcam.load(tmp_path, family="autoregressive")
