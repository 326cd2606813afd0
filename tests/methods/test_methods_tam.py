"""TAM against its equations in plain loops, and against its authors' code where that is given.

``CAPTUM_DCAM_TAM`` may name a folder that holds the authors' ``tam.py``.
"""

import importlib.util
import math
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from awkward import made_ar
from methods import made

import captum_dcam
from captum_dcam.methods import AttributionTask, Budget, metered, method
from captum_dcam.methods.tam import (
    estimated_causal_inference,
    filtered,
    interference,
    joint_min_max,
    least_squares_scale,
    top_candidates,
)
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.sequence import text_tokens
from captum_dcam.model.words import Target


def causal_by_loops(target, context, relevance, same):
    """Eq. 4, 5 and the positive part, one number at a time; s by scanning the derivative's zero."""
    kept = [0.0 if s else r for r, s in zip(relevance, same, strict=True)]
    total = sum(kept) + 1e-8
    mean = [
        sum(r * m[j] for r, m in zip(kept, context, strict=True)) / total
        for j in range(len(target))
    ]
    energy = sum(e * e for e in mean)
    scale = sum(a * e for a, e in zip(target, mean, strict=True)) / energy if energy else 0.0
    return [max(a - scale * e, 0.0) for a, e in zip(target, mean, strict=True)], scale


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", (1e-3, 1.0, 1e3))
def test_estimated_causal_inference_is_the_loop(seed, size):
    g = torch.Generator().manual_seed(seed)
    target = torch.rand(20, generator=g) * size
    context, relevance = torch.rand(6, 20, generator=g) * size, torch.rand(6, generator=g) * size
    same = torch.tensor([False, True, False, False, True, False])
    refined, scale = estimated_causal_inference(target, context, relevance, same)
    expected, s = causal_by_loops(*(x.tolist() for x in (target, context, relevance, same)))
    assert tiny.relative(refined, torch.tensor(expected)) < 1e-5
    assert float(scale) == pytest.approx(s, rel=1e-5)


def test_the_scale_is_the_least_squares_fit():
    g = torch.Generator().manual_seed(0)
    a, e = torch.rand(2, 30, generator=g, dtype=torch.float64)
    best = float(least_squares_scale(a, e))
    residual = [float((a - s * e).square().sum()) for s in (best - 1e-3, best, best + 1e-3)]
    assert residual[1] == min(residual)


@pytest.mark.parametrize("case", ("no context", "all same", "no relevance", "empty maps"))
def test_without_interference_the_map_stays(case):
    target, context = torch.rand(9), torch.rand(3, 9)
    relevance, same = torch.ones(3), torch.zeros(3, dtype=torch.bool)
    if case == "no context":
        context, relevance, same = context[:0], relevance[:0], same[:0]
    elif case == "all same":
        same = ~same
    elif case == "no relevance":
        relevance = relevance * 0
    else:
        context = context * 0
    refined, scale = estimated_causal_inference(target, context, relevance, same)
    assert torch.equal(refined, target) and scale == 0
    assert not interference(context, relevance * ~same).any()


def test_joint_min_max_stretches_image_and_text_together():
    image, text = (
        torch.tensor([[2.0, 4.0], [1.0, 1.0]]),
        torch.tensor([[6.0, math.nan], [1.0, math.nan]]),
    )
    scaled, words = joint_min_max(image, text)
    assert scaled.tolist() == [[0.0, 0.5], [0.0, 0.0]]
    assert words[:, 0].tolist() == [1.0, 0.0] and words[:, 1].isnan().all()


def test_a_word_of_several_tokens_is_their_sum_before_eq_3(cache):
    forward = tiny.bound(cache, steps=4)
    first, last = made.targets(forward, (1, 6))
    both = Target("both", (1, 6), first.token_ids + last.token_ids)
    task = AttributionTask(forward, (first, last, both))
    tam = method("tam", filter=0)
    reader = tam.reader(task)
    parts = [tam.activation(task, reader, t) for t in (first, last)]
    image = parts[0][0] + parts[1][0]
    text = torch.stack([p[1] for p in parts])
    text = text.nansum(0).masked_fill(text.isnan().all(0), math.nan)
    text[text_tokens(forward).prompt + torch.tensor([1, 6])] = math.nan
    image, text = joint_min_max(image, text)
    found = tam.attribute(task)
    assert torch.allclose(found.maps[0][2].flatten(), image)
    assert torch.allclose(found.text[2], text, equal_nan=True)


def test_a_prompt_without_words_and_an_answer_of_one_token(cache):
    forward = tiny.bound(cache, prompts=[""], gen_length=1)
    found = method("tam").attribute(AttributionTask(forward, made.targets(forward, (0,))))
    assert found.text.shape == (1, 1) and found.text.isnan().all() and found.maps[0].any()


def test_candidates_are_a_softmax_over_the_best_three(cache):
    forward = tiny.bound(cache)
    task = AttributionTask(forward, ())
    with torch.no_grad():
        logits = forward(task.pixels, *task.arguments(3))[0, 3]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:3]
    shares = [math.exp(logits[i]) for i in order]
    got = top_candidates(task, 3)
    assert [c.token for c in got] == order
    assert [c.probability for c in got] == pytest.approx(
        [s / sum(shares) for s in shares], rel=1e-4
    )
    assert [c.text for c in got] == forward.adapter.token_texts(order)
    with pytest.raises(ValueError, match="k is 0"):
        top_candidates(task, 3, 0)


def test_a_budget_leaves_the_words_before_it():
    forward = tiny.bound("none", steps=8, block_length=1)  # from left to right
    task = AttributionTask(forward, made.targets(forward, (0, 1, 7)))
    with metered(forward, Budget(passes=2)):
        found = method("tam").attribute(task)
    assert found.done.tolist() == [True, True, False] and not found.maps[0][2].any()


@pytest.mark.parametrize(
    "settings",
    ({"relevance": "x"}, {"order": "left"}, {"filter": 2}, {"filter": -1}, {"filter": True}),
)
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match="expected"):
        method("tam", **settings)


# -- the authors' code ---------------------------------------------------------------------------

FOLDER = os.environ.get("CAPTUM_DCAM_TAM", "")
IMAGE, PROMPT_START, PROMPT_END = 90, 91, 92


@pytest.fixture
def authors(monkeypatch):
    """Their module, with stand-ins for OpenCV and PyMuPDF, which only draw."""
    path = Path(FOLDER) / "tam.py"
    if not FOLDER or not path.is_file():
        pytest.skip("CAPTUM_DCAM_TAM names no folder with the authors' tam.py")
    opencv = types.ModuleType("cv2")
    opencv.cvtColor, opencv.COLOR_RGB2BGR = (lambda image, _code: image), 4
    monkeypatch.setitem(sys.modules, "cv2", opencv)
    monkeypatch.setitem(sys.modules, "fitz", types.ModuleType("fitz"))
    spec = importlib.util.spec_from_file_location("authors_tam", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Words:
    """As much of a processor as their code asks for: token i reads ``w<i>``."""

    @property
    def tokenizer(self):
        return self

    def batch_decode(self, rows, **_):
        return [" ".join(f"w{int(i)}" for i in row) for row in rows]

    def tokenize(self, text):
        return text.split()


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_authors_code(authors, monkeypatch, seed):
    """An autoregressive generation: 5 × 6 image tokens, a prompt of 4, an answer of 6."""
    g = torch.Generator().manual_seed(seed)
    shape, prompt, answer = (5, 6), [10, 11, 12, 13], [20, 11, 21, 20, 22, 23]
    tokens = [IMAGE] * 30 + [PROMPT_START, *prompt, PROMPT_END, *answer]
    length = 30 + 6
    logits = [torch.randn(1, length, 100, generator=g) * 2 + 0.5]
    logits += [torch.randn(1, 1, 100, generator=g) * 2 + 0.5 for _ in answer[1:]]
    logits[0][0, 31, prompt[0]] = 50.0  # their first map is the greedy token's: make it the same
    seen, filters = [], []
    draw, rank = authors.multimodal_process, authors.rank_guassian_filter

    def watch(raw, vision, img_scores, txt_scores, *rest, **options):
        result = draw(raw, vision, img_scores, txt_scores, *rest, **options)
        seen.append((img_scores.copy(), txt_scores.copy(), rest[1:3], result[1]))
        return result

    def watch_filter(image, size=3):
        filters.append((image.copy(), rank(image, size)))
        return filters[-1][1]

    monkeypatch.setattr(authors, "multimodal_process", watch)
    monkeypatch.setattr(authors, "rank_guassian_filter", watch_filter)
    ids = {
        "img_id": [IMAGE],
        "prompt_id": [PROMPT_START, PROMPT_END],
        "answer_id": [PROMPT_END, -1],
    }
    maps = []
    for round_ in range(len(answer)):
        authors.TAM(
            tokens,
            shape,
            logits,
            ids,
            np.zeros((10, 12, 3), np.uint8),
            Words(),
            "",
            round_,
            maps,
            True,
        )
    everything = torch.cat([part[0] for part in logits])
    image_ids = [*prompt, PROMPT_END, *answer[1:]]  # their first answer map is that of this id
    raw = [everything[:30, i].clamp_min(0) for i in image_ids]
    rows = [31, 32, 33, 34, *range(length - 1, length + 5)]  # where a text token's logits are read
    for k in range(1, len(answer)):
        target, word = answer[k], [*prompt, *answer]
        relevance = everything[rows[: 4 + k], target].clamp_min(0)
        same = torch.tensor([w == target for w in word[: 4 + k]])
        refined, _ = estimated_causal_inference(
            raw[4 + k], torch.stack(raw[: 4 + k]), relevance, same
        )
        img, txt, (_, shares), final = seen[5 + k - 1]
        assert np.abs(img - refined.numpy()).max() < 1e-5
        assert np.abs(txt[:-1] - relevance.numpy()).max() < 1e-6
        scaled, _ = joint_min_max(refined, relevance)
        before, after = filters[5 + k - 1]
        assert np.abs(before - scaled.view(shape).numpy()).max() < 1e-5
        ours = filtered((scaled.view(shape),), 3)[0].numpy()
        assert np.abs(after - ours).max() < 1e-5
        assert np.abs(final / 255 - ours).max() <= 1 / 255
        assert np.allclose(shares, everything[rows[4 + k], :].topk(3).values.softmax(0), atol=1e-6)


def demo(authors, model, tokenizer, inputs, grid):
    """Their demo of Qwen2-VL: the maps they recorded, and what they filtered, token by token.

    Two of their records are put right, of the prompt's first token and of the answer's: see
    :class:`captum_dcam.methods.tam.TokenActivationMap`.
    """
    with torch.no_grad():
        own = model.generate(
            **inputs, max_new_tokens=6, output_hidden_states=True, return_dict_in_generate=True
        )
        logits = [model.lm_head(states[-1]) for states in own.hidden_states]
    tokens, count = own.sequences[0].tolist(), inputs["input_ids"].shape[1]
    marks = ("<|vision_start|>", "<|vision_end|>", "<|im_end|>\n<|im_start|>assistant")
    start, end, turn = (tokenizer(mark)["input_ids"] for mark in marks)
    reply = tokenizer("\n<|im_start|>assistant\n")["input_ids"]
    ids = {"img_id": [*start, *end], "prompt_id": [*end, turn], "answer_id": [reply, -1]}
    reader = types.SimpleNamespace(tokenizer=tokenizer, batch_decode=tokenizer.batch_decode)
    shown, records = np.zeros((40, 40, 3), np.uint8), []
    for number in range(len(tokens) - count):
        authors.TAM(tokens, grid.shape, logits, ids, shown, reader, "", number, records, True)
        if not number:
            image = logits[0][0, grid.positions.flatten()].clamp_min(0).numpy()
            records[0] = image[:, tokens[tokens.index(*end) + 1]]
            records[-1] = image[:, tokens[count]]
    return records


@pytest.mark.parametrize("seed", range(3))
def test_on_a_chat_template_the_context_is_the_authors(authors, monkeypatch, seed):
    """On a tiny Qwen2-VL they take 8 of the prompt's 57 text tokens: the question's."""
    parts = replace(made_ar.parts("qwen2_vl"), chat_template=made_ar.chat_template())
    adapter = captum_dcam.wrap(made_ar.model("qwen2_vl", seed), parts)
    forward = DenoisingForward(adapter, 1)
    request = adapter.prepare([[made_ar.picture(seed)]], ["what is red ?"])
    forward.generate(request, max_new_tokens=6)
    answer = forward.trajectory.tokens[0].tolist()
    filters, rank = [], authors.rank_guassian_filter
    monkeypatch.setattr(
        authors, "rank_guassian_filter", lambda *a: filters.append(rank(*a)) or filters[-1]
    )
    inputs = adapter._inputs(request.pixels, request.extras)
    records = demo(authors, adapter.model, parts.tokenizer, inputs, request.layout.grids[0])
    assert len(adapter.prompt_tokens(request)[0]) == 57
    assert len(records) - len(answer) == int(request.dialogue.sum()) == 8
    words = tuple(Target("", (p,), (token,)) for p, token in enumerate(answer))
    found = method("tam", order="position").attribute(AttributionTask(forward, words))
    for p in range(1, len(answer)):
        assert np.abs(filters[8 + p] - found.maps[0][p].numpy()).max() < 1e-5
        assert found.text[p].isfinite().sum() == 8 + p


def test_the_filter_is_the_authors_on_maps_with_empty_regions(authors):
    g = np.random.default_rng(0)
    image = np.maximum(g.normal(0.1, 1, (9, 7)), 0).astype(np.float32)
    image[:4, :4] = 0  # windows with mean 0
    ours = filtered((torch.from_numpy(image),), 3)[0].numpy()
    assert np.abs(authors.rank_guassian_filter(image, 3) - ours).max() < 1e-5
