"""compare_models(): rows as compare() gives them, agreement, order of writing, other layouts."""

import functools

import pytest
import tiny
import torch

import captum_dcam
from captum_dcam.comparing import compare, compare_models
from captum_dcam.comparing.models import _over
from captum_dcam.errors import ExplanationError, InputError, InputTypeError, TargetError
from captum_dcam.metrics import agreement
from captum_dcam.mini.loading import MiniImageProcessor, MiniProcessor
from captum_dcam.model.layout import Layout, uniform_grid
from captum_dcam.model.words import words_of
from captum_dcam.results.comparison import Comparison
from captum_dcam.results.model_comparison import ModelComparison
from captum_dcam.viewer import comparison_panel, models_panel

ANSWER = "a red circle and two moons ."
METHODS = ("diffusion_cam_base", "logit_lens")


def coarse():
    """A model that sees the image in 4×4 tokens; the others see 8×8."""
    processor = MiniProcessor(MiniImageProcessor(32), tiny.tokenizer(), 4)
    return captum_dcam.wrap(tiny.model(seed=1, image_size=32), processor)


@functools.cache
def models():
    return tiny.adapter("prefix"), tiny.twin("none"), coarse()


@functools.cache
def found(answer=ANSWER, words="nouns"):
    own = [{"gen_length": 8}] * 3
    return compare_models(
        models(), tiny.picture(), tiny.PROMPT, words, METHODS, answer=answer, generation=own
    )


def test_every_model_has_the_rows_that_it_has_alone():
    for name, adapter in zip(("mini", "mini_ar"), models(), strict=False):
        alone = compare(adapter, tiny.picture(), tiny.PROMPT, "nouns", METHODS, answer=ANSWER)
        two = compare_models(
            models()[:2], tiny.picture(), tiny.PROMPT, "nouns", METHODS, answer=ANSWER,
            generation=[{"gen_length": 4}] * 2,
        )  # fmt: skip
        for row in alone.rows:
            joined = two.comparison.row(f"{name}: {row.name}")
            assert joined.group == name and joined.label == row.label
            for one, other in zip(joined.maps + joined.raw, row.maps + row.raw, strict=True):
                assert torch.equal(one, other)
        assert two.comparison.words == alone.words


def test_agreement_is_of_the_rows():
    all_ = found()
    assert all_.models == ("mini", "mini_ar", "mini#2")
    pairs = {(a.first, a.second) for a in all_.agreement}
    assert pairs == {("mini", "mini_ar"), ("mini", "mini#2"), ("mini_ar", "mini#2")}
    assert len(all_.agreement) == len(pairs) * len(METHODS) * len(all_.comparison.words)
    for one in all_.agreement:
        maps = [
            all_.comparison.row(f"{m}: {one.method}").maps[0][one.word]
            for m in (one.first, one.second)
        ]
        wanted = agreement(*maps)
        assert one.rank == pytest.approx(float(wanted.rank))
        assert one.overlap == float(wanted.overlap) and one.distance == float(wanted.distance)


def test_an_autoregressive_model_writes_nothing_early():
    orders = dict(zip(found().models, found().orders, strict=True))
    assert not orders["mini_ar"].early
    adapter = models()[0]
    request = adapter.prepare([[tiny.picture()]], [tiny.PROMPT])
    made = adapter.generate(request, gen_length=8)
    tokens, steps = made.tokens[0].tolist(), made.commit_step[0].tolist()
    words = words_of(adapter, tokens)
    assert orders["mini"].words == tuple(w.text for w in words)
    for word, step, missing in zip(
        words, orders["mini"].steps, orders["mini"].missing, strict=True
    ):
        first = min(word.positions, key=lambda p: steps[p])
        assert step == steps[first]
        # what the canvas of that step shows to the word's left
        left = made.states[0][step, 0, : word.positions[0]].tolist()
        unwritten = [t for t, own in zip(left, tokens, strict=False) if t == adapter.mask_id]
        assert missing <= len(unwritten)  # stop tokens do not count
        if not set(tokens[: word.positions[0]]) & adapter.stop_ids:
            assert missing == len(unwritten)
    assert orders["mini"].early  # a random model fills its canvas anyhow


def test_maps_of_other_layouts_come_to_one_grid():
    all_ = found()
    (grid,) = all_.comparison.layout.grids
    assert grid.shape == (6, 8)  # of an image of 80×60 px, as fine as the finest model
    assert all(row.maps[0].shape[-2:] == grid.shape for row in all_.comparison.rows)
    for model, side in (("mini", 8), ("mini#2", 4)):
        alone = compare(
            models()[0 if side == 8 else 2], tiny.picture(), tiny.PROMPT, "nouns", METHODS[1:],
            answer=ANSWER,
        )  # fmt: skip
        ours, theirs = all_.comparison.row(f"{model}: logit_lens").maps[0], alone.rows[0].maps[0]
        size = (48, 64)
        shown = Layout((grid,), 99).over_image([ours], 0, size)
        wanted = alone.layout.over_image([theirs], 0, size)
        # bilinear to another grid and back: about the same picture
        assert float(torch.corrcoef(torch.stack((shown.flatten(), wanted.flatten())))[0, 1]) > 0.8
    flat = torch.ones(1, 8, 8)
    fine = Layout((uniform_grid(0, (8, 8), (60, 80)),), 64)
    (out,) = _over(all_.comparison.layout, fine, [flat])
    assert torch.allclose(out, torch.ones(1, 6, 8))


def test_saved_loaded_and_drawn(tmp_path):
    all_ = found()
    all_.save(tmp_path / "models")
    again = ModelComparison.load(tmp_path / "models")
    assert again.agreement == all_.agreement and again.orders == all_.orders
    assert repr(again) == repr(all_) and again.records() == all_.records()
    assert models_panel(again).height > comparison_panel(all_.comparison).height
    all_.comparison.save(tmp_path / "plain")
    with pytest.raises(ExplanationError, match=r"methods on one model: read it with Comparison"):
        ModelComparison.load(tmp_path / "plain")
    assert Comparison.load(tmp_path / "models").words == all_.comparison.words


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"models": 1}, InputError, "1 models: expected at least two"),
        ({"models": "names"}, InputTypeError, r"a model is a str: expected adapters"),
        ({"answer": [5, 6]}, InputTypeError, "expected a text, since token ids differ"),
        ({"answer": " "}, TargetError, "has no token"),
        ({"answer": "a red zebra ."}, TargetError, "mini cannot spell the answer 'a red zebra .'"),
        ({"words": (0, 7)}, TargetError, "positions and ids of tokens differ between models"),
        ({"words": ["moons", 3]}, TargetError, "word 3 is no text"),
        ({"words": "zebra"}, TargetError, "'zebra' is not in the answer"),
        ({"layers": [1]}, InputError, "layers is .* one for each of the 2 models"),
        ({"generation": {"gen_length": 8}}, InputError, "generation is .* one for each"),
        ({"score": 3}, InputError, "no denoising steps"),
        ({"methods": "tamm"}, ValueError, "tam"),
    ],
)
def test_bad_input_is_named_before_any_work(changes, error, text, monkeypatch):
    asked = {"words": "nouns", "answer": ANSWER, "methods": METHODS[:1], **changes}
    two = models()[: changes.get("models", 2)] if changes.get("models") != "names" else ["a", "b"]
    asked.pop("models", None)
    if changes.get("words") != "zebra":

        def fail(*_args, **_settings):
            raise AssertionError("it ran")

        for one in {type(m) for m in models()}:
            monkeypatch.setattr(one, "generate", fail)
    with pytest.raises(error, match=text):
        compare_models(two, tiny.picture(), tiny.PROMPT, **asked)
