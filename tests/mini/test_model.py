"""The embedded model: attention, cache, tokenizer, files, packed pairs."""

import json

import pytest
import tiny
import torch
from transformers import AutoModel

from benchmarks.mini.batches import build_tokenizer, packed_mask
from captum_dcam import explain, load
from captum_dcam.data.scenes import HELD_OUT, PROMPTS, make_scene, scene_mask
from captum_dcam.mini import modeling as generation
from captum_dcam.mini.loading import load_mini
from captum_dcam.mini.modeling import attend
from captum_dcam.model.versions import in_type


def inputs(batch=2, prompt=tiny.PROMPT, answer=6):
    model = tiny.model(dtype=torch.float64)
    pictures = [[tiny.picture(b)] for b in range(batch)]
    made = tiny.processor()(pictures, [prompt] * batch)
    canvas = torch.randint(5, 71, (batch, answer), generator=torch.Generator().manual_seed(1))
    canvas[:, ::2] = model.config.mask_token_id
    return model, made["pixel_values"].double(), made["input_ids"], canvas


def by_softmax(q, k, v, mask):
    """Attention with loops over batch, heads and queries."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                score = (k[b, h] @ q[b, h, i]) / q.shape[-1] ** 0.5
                if mask is not None:
                    score = score.masked_fill(~mask[b, 0, i % mask.shape[2]], -torch.inf)
                out[b, h, i] = score.softmax(0) @ v[b, h]
    return out


@pytest.mark.parametrize("masked", (True, False))
def test_eager_and_fused_attention_are_softmax(masked):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, generator=g).double() for n in (5, 7, 7))
    mask = torch.rand(2, 1, 5, 7, generator=g) > 0.4
    mask[..., 0] = True
    mask = mask if masked else None
    expected = by_softmax(q, k, v, mask)
    for eager in (True, False):
        torch.testing.assert_close(attend(q, k, v, mask, eager), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("segments", (None, (69, 6)))
def test_eager_and_sdpa_models_agree(segments):
    model, pixels, ids, canvas = inputs()
    whole = torch.cat((ids, canvas), dim=1)
    assert whole.shape[1] == 75
    found = []
    with torch.no_grad():
        for kind in ("sdpa", "eager"):
            model.config._attn_implementation = kind
            found.append(model(whole, pixels, segments=segments).logits)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)


def test_cached_prefix_equals_two_segments():
    model, pixels, ids, canvas = inputs()
    with torch.no_grad():
        prefix = generation.cache_prefix(model, generation.embed_prefix(model, pixels, ids))
        cached = generation.denoise(model, prefix, canvas)
        segments = (ids.shape[1], canvas.shape[1])
        whole = model(torch.cat((ids, canvas), 1), pixels, segments=segments).logits
        full = model(torch.cat((ids, canvas), 1), pixels).logits
    torch.testing.assert_close(cached, whole[:, ids.shape[1] :], rtol=0, atol=1e-10)
    assert not torch.allclose(cached, full[:, ids.shape[1] :], atol=1e-4)  # another cache


def test_segments_see_what_is_before_their_end():
    """Changing the response leaves the prefix's logits alone, and only with two segments."""
    model, pixels, ids, canvas = inputs()
    other = canvas.clone()
    other[:, 1] = 20
    n = ids.shape[1]
    with torch.no_grad():
        for segments, same in (((n, canvas.shape[1]), True), (None, False)):
            a, b = (
                model(torch.cat((ids, c), 1), pixels, segments=segments).logits[:, :n]
                for c in (canvas, other)
            )
            assert torch.equal(a, b) == same


def test_packed_pairs_do_not_see_one_another():
    """Change one pair's prompt and answer: no logit of another pair moves, its own do."""
    model, pixels, _, _ = inputs(batch=1)
    lengths = ((4, 5), (3, 6), (5, 2))  # prompt and canvas of three pairs
    pair = torch.cat([torch.full((p + c,), n) for n, (p, c) in enumerate(lengths)])[None]
    response = torch.cat([torch.arange(p + c) >= p for p, c in lengths])[None]
    pair = torch.cat((pair, torch.full((1, 3), -1)), 1)  # padding
    response = torch.cat((response, torch.zeros(1, 3, dtype=torch.bool)), 1)
    offset = torch.cat([torch.arange(p + c) for p, c in lengths] + [torch.zeros(3)]).long()
    where = torch.cat((torch.arange(64), 64 + offset))[None]
    mask = packed_mask(pair, response, 64)
    assert mask.shape == (1, 1, 28, 92)
    for q in range(28):
        for k in range(92):
            own = k >= 64 and pair[0, q] == pair[0, k - 64]
            seen = k < 64 or (own and bool(response[0, q] or not response[0, k - 64]))
            assert bool(mask[0, 0, q, k]) == seen
    text = torch.randint(5, 71, (1, 28), generator=torch.Generator().manual_seed(2))

    def logits(text):
        with torch.no_grad():
            embeds = torch.cat((model.get_image_features(pixels[:, 0]), model.embed_words(text)), 1)
            return model(
                inputs_embeds=embeds,
                segments=(64, 28),
                segment_masks=(None, mask),
                position_ids=where,
            ).logits

    before = logits(text)
    for number in range(3):
        changed = torch.where(pair == number, (text + 7) % 66 + 5, text)
        after = logits(changed)
        moved = ((after - before).abs().amax(-1) > 1e-12)[0]
        assert not moved[:64].any()  # image tokens attend to images only
        assert not moved[64:][pair[0] != number].any()
        assert moved[64:][pair[0] == number].all()
        # an answer does not reach back to its own prompt
        answer_only = torch.where((pair == number) & response, changed, text)
        moved = ((logits(answer_only) - before).abs().amax(-1) > 1e-12)[0, 64:]
        assert torch.equal(moved, ((pair == number) & response)[0])


def test_packed_equals_unpacked():
    """A pair behind the shared image has the logits it has alone in the block-causal regime."""
    model, pixels, ids, canvas = inputs(batch=1)
    prompt = ids[:, 64:]
    p, c = prompt.shape[1], canvas.shape[1]
    pair = torch.tensor([[0] * 4 + [1] * (p + c)])
    response = torch.tensor([[False] * 2 + [True] * 2 + [False] * p + [True] * c])
    text = torch.cat((torch.full((1, 4), 30), prompt, canvas), 1)
    where = torch.cat((torch.arange(64), 64 + torch.arange(4), 64 + torch.arange(p + c)))[None]
    with torch.no_grad():
        image = model.get_image_features(pixels[:, 0])
        packed = model(
            inputs_embeds=torch.cat((image, model.embed_words(text)), 1),
            segments=(64, 4 + p + c),
            segment_masks=(None, packed_mask(pair, response, 64)),
            position_ids=where,
        ).logits[:, 68:]
        alone = model(torch.cat((ids, canvas), 1), pixels, segments=(64, p, c)).logits[:, 64:]
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-10)


def test_rope_turns_by_the_angle_of_the_position():
    model = tiny.model(dtype=torch.float64)
    cos, sin = model.rope(torch.tensor([[0.0, 1.0, 2.5]]), torch.float64)
    assert cos.shape == (1, 1, 3, 8)
    angles = torch.tensor([2.5 * 10000 ** (-i / 8) for i in range(8)], dtype=torch.float64)
    torch.testing.assert_close(cos[0, 0, 2], angles.cos())
    torch.testing.assert_close(sin[0, 0, 2], angles.sin())


def test_save_and_load_give_the_same_bits(tmp_path):
    model, processor = tiny.model(seed=3), tiny.processor()
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    found, other = load_mini(tmp_path)
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    state = found.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value)
    pictures, text = [[tiny.picture()]], ["is there a red circle ?"]
    one, two = processor(pictures, text), other(pictures, text)
    for name in one:
        assert torch.equal(one[name], two[name])
    with torch.no_grad():
        assert torch.equal(
            model(one["input_ids"], one["pixel_values"]).logits,
            found(two["input_ids"], two["pixel_values"]).logits,
        )
    assert found.config.stem_channels == (8, 8, 16)
    half, _ = load_mini(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_the_tokenizer_knows_every_word_of_the_scenes():
    tokenizer = build_tokenizer()
    built, packaged = (
        json.loads(one.backend_tokenizer.to_str()) for one in (tokenizer, tiny.tokenizer())
    )
    for parts in (built, packaged):  # older tokenizers make none of one that adds nothing
        del parts["post_processor"]
    assert built == packaged
    unknown = tokenizer.unk_token_id
    texts = {p for prompts in PROMPTS.values() for p in prompts}
    for index in range(200):
        scene = make_scene(11, index)
        texts |= set(scene.captions.values())
        texts |= {part for _, *qa in scene.questions for part in qa}
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert unknown not in ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer("zebra")["input_ids"] == [unknown]
    assert tokenizer("A RED circle.")["input_ids"] == tokenizer("a red circle .")["input_ids"]


def test_placeholders_must_match_the_pictures():
    model, pixels, ids, _ = inputs()
    with pytest.raises(ValueError, match=r"126 image placeholders .* 128 image tokens"):
        model(ids[:, 1:], pixels)
    with pytest.raises(ValueError, match="add up to 5"):
        model(ids, pixels, segments=(2, 3))
    with pytest.raises(ValueError, match="both are None"):
        model()


def test_the_packaged_model_answers(packaged):
    """It reads a question about colour right in most of 6 held-out scenes, in both caches."""
    model, processor = load_mini()
    asked = []
    for index in range(6):
        scene = make_scene(2_000_003, 5000 + index)
        asked += [(scene, q, a) for kind, q, a in scene.questions if kind == "color"][:1]
    made = processor([[s.image] for s, _, _ in asked], [q for _, q, _ in asked])
    for cache in (True, False):
        out = generation.generate(model, **made, gen_length=8, steps=2, prefix_cache=cache)
        texts = processor.tokenizer.batch_decode(out.tokens, skip_special_tokens=True)
        right = sum(t == a for t, (_, _, a) in zip(texts, asked, strict=True))
        assert right >= 0.7 * len(asked)


def test_every_words_peak_lies_on_its_object(packaged):
    """On the scene that the command line draws by default: shapes, colours and a plural."""
    scene = make_scene(HELD_OUT, 12)
    found = explain(load("mini"), scene.image, "describe the image .")
    seen = {}
    for target, heat in zip(found.targets, found.layout.to_pixels(found.maps[0]), strict=True):
        mask = scene_mask(scene, found.token_texts, target)
        if mask is not None:
            seen[target.text] = bool(mask.flatten()[heat.argmax()])
    words = ("pink", "circle", "yellow", "circles", "cyan", "cross")
    assert seen == dict.fromkeys(words, True)


def test_the_model_is_known_to_the_auto_classes(tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path)
    found = AutoModel.from_pretrained(tmp_path, **in_type(torch.float32))
    assert type(found) is type(model)
    assert torch.equal(found.embed_tokens.weight, model.embed_tokens.weight)
