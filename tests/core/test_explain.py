"""explain() end to end: dtypes, determinism, targets, batches, refinements, sign check, devices."""

import pytest
import tiny
import torch

import captum_dcam
from captum_dcam import refine
from captum_dcam.model.tagging import tag
from captum_dcam.model.words import Target, resolve, words_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", ("default", "paper", "base"))
def test_every_dtype_end_to_end(cache, dtype, preset):
    adapter = tiny.adapter(cache, dtype=dtype)
    found = captum_dcam.explain(adapter, tiny.picture(), tiny.PROMPT, preset=preset, gen_length=4)
    (maps,) = found.maps
    assert maps.shape == (len(found.words), 8, 8) and maps.dtype == torch.float32
    assert torch.isfinite(maps).all() and maps.min() >= 0 and maps.any()
    assert found.settings["dtype"] == str(dtype) and found.trajectory.tokens.shape == (1, 4)
    assert found.pixel_maps().shape == (len(found.words), 60, 80)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_low_precision_maps_are_close_to_exact_ones(cache, dtype):
    maps = []
    for kind in (torch.float64, dtype):
        forward = tiny.bound(cache, dtype=torch.float64)
        target = tiny.pair(forward, 2)
        if kind != torch.float64:
            low = tiny.bound(cache, dtype=kind)
            low.bind(low.request, __import__("dataclasses").replace(forward.trajectory, kept={}))
            forward = low
        maps.append(captum_dcam.explain_generation(forward, [target]).maps[0].double().flatten())
    assert torch.corrcoef(torch.stack(maps))[0, 1] > 0.95


@pytest.mark.parametrize("preset", ("default", "paper"))
def test_the_same_call_gives_the_same_bits(cache, preset):
    def once():
        adapter = tiny.adapter(cache)
        return captum_dcam.explain(
            adapter,
            tiny.picture(),
            tiny.PROMPT,
            preset=preset,
            gen_length=8,
            temperature=0.5,
            generator=torch.Generator().manual_seed(1),
        )

    one, two = once(), once()
    assert one.answer == two.answer and one.targets == two.targets
    for a, b in zip(one.maps + one.peaks, two.maps + two.peaks, strict=True):
        assert torch.equal(a, b)


def test_explain_and_attribute_agree(cache):
    forward = tiny.bound(cache, batch=2)
    for preset in ("default", "base", "paper"):
        cam = captum_dcam.DiffusionCAM(forward, preset=preset)
        target = tiny.pairs(forward, 3)
        maps = cam.attribute(forward.request.pixels, target)
        for b in range(2):
            one = captum_dcam.explain_generation(forward, [target[b]], example=b, preset=preset)
            assert tiny.relative(one.maps[0], maps[b]) < 1e-3
            assert one.trajectory.tokens.shape == (1, 8)
            assert torch.equal(one.trajectory.tokens[0], forward.trajectory.tokens[b])


def test_peaks_keep_the_scale_that_refinements_lose(cache):
    forward = tiny.bound(cache)
    raw = captum_dcam.explain_generation(forward, preset="base")
    fine = captum_dcam.explain_generation(forward, preset="base", refinements=refine.MinMax())
    assert torch.equal(raw.peaks[0], raw.maps[0].amax((1, 2)))
    assert torch.equal(fine.peaks[0], raw.peaks[0])
    assert torch.allclose(fine.maps[0].amax((1, 2)), torch.ones(len(fine.words)))


def test_words_of_an_answer():
    adapter = tiny.adapter("prefix")
    ids = tiny.tokenizer()("a red circle , a star .")["input_ids"]
    tokens = [*ids, 2, 0]
    words = words_of(adapter, tokens)
    assert [w.text for w in words] == ["a", "red", "circle", "a", "star"]
    assert [w.positions for w in words] == [(0,), (1,), (2,), (4,), (5,)]
    assert all(tokens[w.positions[0]] == w.token_ids[0] for w in words)
    assert [w.positions for w in resolve(adapter, tokens, "a")] == [(0,), (4,)]
    (phrase,) = resolve(adapter, tokens, "Red Circle")
    assert phrase.positions == (1, 2) and phrase.token_ids == tuple(ids[1:3])
    assert {w.text for w in resolve(adapter, tokens, "nouns")} >= {"circle", "star"}
    assert resolve(adapter, tokens, 2) == (Target("circle", (2,), (ids[2],)),)
    assert resolve(adapter, tokens, (2, 9))[0].token_ids == (9,)
    mixed = resolve(adapter, tokens, ["star", 0, (1, 8), phrase])
    assert [t.positions for t in mixed] == [(5,), (0,), (1,), (1, 2)]
    assert resolve(adapter, tokens, None) == resolve(adapter, tokens, "all") == words


def test_sicd_gets_the_maps_of_repeated_function_words(monkeypatch, cache):
    """Eq. of SICD: the mean of the repeated words' maps, min-max normalised."""
    forward = tiny.bound(cache)
    ids = tiny.tokenizer()("a red circle and a star . <eos>")["input_ids"]
    t = forward.trajectory
    t.tokens[:] = t.final_state[0][:] = torch.tensor(ids)
    seen = []
    original = refine.SICD.__call__

    def spy(self, maps, context):
        seen.append(context.repeated_maps)
        return original(self, maps, context)

    monkeypatch.setattr(refine.SICD, "__call__", spy)
    captum_dcam.explain_generation(forward, "circle", preset="paper")
    both = captum_dcam.explain_generation(forward, [0, 4], preset="base").maps[0].mean(0)
    expected = (both - both.min()) / (both.max() - both.min())
    assert tiny.relative(seen[0].squeeze(), expected) < 1e-4


def test_sign_check_reads_probabilities(cache):
    forward = tiny.bound(cache, dtype=torch.float64)
    target = Target("x", *zip(tiny.pair(forward, 3)))
    found = captum_dcam.explain_generation(forward, [target])
    g = torch.Generator().manual_seed(0)
    falls = captum_dcam.sign_check(forward, [target], found.maps, g)
    assert falls.shape == (1, 2) and torch.isfinite(falls).all() and forward.tap.edit is None
    # the first column by hand: six tokens (a tenth of 64) replaced by the mean token
    top = found.maps[0][0].flatten().argsort(descending=True, stable=True)[:6]
    step = forward.trajectory.step_of(0, 3, "commit")
    at = torch.tensor([0]), torch.tensor([step])

    def erase(f, _i):
        flat = f.flatten(2).clone()
        flat[:, :, top] = f.mean((2, 3))[..., None]
        return flat.view_as(f)

    with torch.no_grad():
        before = forward.replay(*at)[0, 3].log_softmax(-1)[target.token_ids[0]]
        with forward.edited(erase):
            after = forward.replay(*at)[0, 3].log_softmax(-1)[target.token_ids[0]]
    assert float(falls[0, 0]) == pytest.approx(float(before - after), rel=1e-9)


def test_two_pictures_of_different_sizes(cache):
    adapter = tiny.adapter(cache)
    images = [tiny.picture(0, (80, 60)), tiny.picture(1, (30, 90))]
    found = captum_dcam.explain(adapter, images, tiny.PROMPT, gen_length=8)
    assert [m.shape[1:] for m in found.maps] == [(8, 8)] * 2
    assert found.pixel_maps(0).shape[1:] == (60, 80) and found.pixel_maps(1).shape[1:] == (90, 30)


def test_the_packaged_model_sees(packaged, cache):
    """The trained model names the scene's objects, and the words' maps differ."""
    from captum_dcam.data.scenes import make_scene

    adapter = captum_dcam.load("mini", cache=cache)
    scene = make_scene(7, 3)
    found = captum_dcam.explain(adapter, scene.image, tiny.PROMPT, words="nouns", gen_length=16)
    assert set(found.words) & {o.shape for o in scene.objects}
    assert found.maps[0].shape[1:] == (24, 24)
    assert len(torch.unique(found.maps[0].flatten(1), dim=0)) > 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu(cache):
    forward = tiny.bound(cache)
    target = tiny.pair(forward, 2)
    here = captum_dcam.explain_generation(forward, [target]).maps[0]
    adapter = captum_dcam.wrap(tiny.model().cuda(), tiny.processor(), cache=cache)
    other = captum_dcam.DenoisingForward(adapter, 1)
    request = adapter.prepare([[tiny.picture()]], [tiny.PROMPT])
    assert request.pixels.is_cuda
    other.generate(request, gen_length=8)
    found = captum_dcam.explain_generation(other, [target]).maps[0]
    assert found.device.type == "cpu"
    assert tiny.relative(found, here) < 0.05


def test_a_smaller_internal_batch_gives_the_same_maps(cache, monkeypatch):
    from captum_dcam.model import gradients as vjp

    whole = captum_dcam.explain_generation(tiny.bound(cache))
    forward = tiny.bound(cache)
    forward.internal_batch_size = 1
    sizes = []
    name = "_cache_gradients" if cache == "prefix" else "_full_rows"
    real = getattr(vjp, name)

    def seen(*args):
        sizes.append(len(args[-2]))
        return real(*args)

    monkeypatch.setattr(vjp, name, seen)
    part = captum_dcam.explain_generation(forward)
    assert len(sizes) >= len(part.words) > 1 and set(sizes) == {1}
    assert tiny.relative(part.maps[0], whole.maps[0]) < 1e-5
    with pytest.raises(ValueError, match="internal_batch_size is 0"):
        captum_dcam.DenoisingForward(forward.adapter, internal_batch_size=0)
    found = captum_dcam.explain(
        forward.adapter, tiny.picture(), tiny.PROMPT, layer=1, gen_length=8, internal_batch_size=2
    )
    assert set(sizes[-3:]) <= {1, 2} and 2 in sizes and found.words == part.words


def test_too_little_memory_says_what_needs_less(cache, monkeypatch):
    from captum_dcam.model import gradients as vjp

    def full(*_args):
        raise torch.cuda.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(vjp, "_cache_gradients" if cache == "prefix" else "_full_rows", full)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"internal_batch_size=1.*20 GiB"):
        captum_dcam.explain_generation(tiny.bound(cache))


def test_every_word_has_one_tag():
    """Also those that a tagger would split or drop."""
    words = ["a\nb", "", "cat", "two dogs", "\n", ".", "don't", "t-shirt", "\u3000"]
    tags = tag(words)
    assert len(tags) == len(words) and tags[2] == "NN" and tags[3] == "NNS"
