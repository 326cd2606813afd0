"""LaViDa's adapter on tiny random instances of the upstream code.

``CAPTUM_DCAM_UPSTREAM_LAVIDA=/folder/LaViDa pytest tests/upstream/test_lavida.py``; skipped without
the variable. The package needs einops and requests beside what this library needs. The seven
conformance checks: ``python -m captum_dcam.testing tests/upstream/cases/lavida.py``.
"""

import os

import numpy as np
import pytest
import tiny
import torch
from doubles import lavida as double
from doubles import lavida_bound as bound
from PIL import Image
from upstream import made_lavida as made
from upstream.commands import explained_and_compared

import captum_dcam
from captum_dcam.adapters.lavida import LavidaAdapter
from captum_dcam.errors import RemoteCodeError, WeightsError
from captum_dcam.model.buffers import repair
from captum_dcam.model.forward import DenoisingForward

pytestmark = [
    pytest.mark.skipif(
        made.NAME not in os.environ, reason=f"{made.NAME} names no checkout of LaViDa"
    ),
    pytest.mark.filterwarnings("ignore"),
]
SIZES = (
    (640, 480), (480, 640), (500, 500), (768, 768), (1000, 300), (200, 150), (97, 61), (9, 7),
    (30, 400), (1920, 1080), (384, 384),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def package():
    return made.package()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {v: made.model(v, tmp_path_factory.mktemp(v)) for v in bound.VARIANTS}


def adapter(model, cache="prefix", **options):
    processor = double.Tokenizer(), model.get_vision_tower().image_processor
    return LavidaAdapter(model, processor, cache, **{"system": None, **options})


def ramp(size):
    """A picture that encodes its own coordinates."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    planes = (x * 255 // size[0], y * 255 // size[1], (x * 31 + y * 17) % 256)
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


# -- input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("aspect", ("anyres", "pad", "square"))
def test_pixels_are_those_of_upstream(models, monkeypatch, size, aspect):
    from llava.mm_utils import process_images

    model = models["llada"]
    monkeypatch.setattr(model.config, "image_aspect_ratio", aspect)
    a = adapter(model)
    own = process_images([ramp(size)], a._packing.image_processor, model.config)
    assert torch.equal(
        a.prepare([[ramp(size)]], ["a"]).pixels[0], own[0] if aspect == "anyres" else own
    )


def test_ids_are_those_of_upstream(models):
    from llava.mm_utils import tokenizer_image_token

    a = adapter(models["llada"])
    request = a.prepare([[ramp((80, 60))]], ["what <image> is this ?"])
    turn = [{"role": "user", "content": "what <image> is this ?"}]
    text = a.tokenizer.apply_chat_template(turn, add_generation_prompt=True)
    assert request.extras[0][0].tolist() == tokenizer_image_token(text, a.tokenizer)


@pytest.mark.parametrize("size", SIZES)
def test_spans_are_those_of_upstream(models, size):
    a = adapter(models["dream"])
    request = a.prepare([[ramp(size)]], ["a dog"])
    with torch.no_grad():
        embeds = a.embed(request.pixels, *request.extras).embeds[0]
    assert len(embeds) == request.layout.prefix_length
    mosaic = request.layout.grids[1]
    newlines = mosaic.positions[:, -1] + 1
    assert (embeds[newlines] == a.model.model.image_newline).all()
    text, ids = a.prompt_tokens(request)
    assert torch.equal(embeds[text], a.model.model.embed_tokens(ids))


@pytest.mark.parametrize(
    ("single", "pooled", "count"),
    (("tensor", True, 729), ("tensor", False, 729), ("list", True, 197), ("list", False, 730)),
)
def test_low_resolution(models, monkeypatch, single, pooled, count):
    from llava.model import llava_arch

    monkeypatch.setattr(llava_arch, "ALWASY_DO_2DPOOL", pooled)
    monkeypatch.setattr(models["llada"].config, "image_aspect_ratio", "pad")
    a = adapter(models["llada"], single=single)
    request = a.prepare([[ramp((80, 60))]], ["a"])
    with torch.no_grad():
        assert a.embed(request.pixels, *request.extras).embeds.shape[1] == (
            request.layout.prefix_length
        )
    assert request.layout.prefix_length == int((request.extras[0] >= 0).sum()) + count


def test_without_pooling(models, monkeypatch):
    from llava.model import llava_arch

    monkeypatch.setattr(llava_arch, "ALWASY_DO_2DPOOL", False)
    a = adapter(models["llada"])
    request = a.prepare([[ramp((640, 480))]], ["a"])
    assert [g.shape for g in request.layout.grids] == [(27, 27), (40, 54)]
    with torch.no_grad():
        embeds = a.embed(request.pixels, *request.extras).embeds
    assert embeds.shape[1] == request.layout.prefix_length


# -- decoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", tiny.CACHES)
@pytest.mark.parametrize(("variant", "settings", "own"), bound.GREEDY)
def test_upstreams_generate_is_recorded_and_replayed(models, cache, variant, settings, own):
    forward = DenoisingForward(adapter(models[variant], cache), 1)
    request = forward.adapter.prepare([[tiny.picture(1, (200, 150))]], [bound.PROMPT])
    own = dict(own)
    length = own.pop("max_new_tokens")
    t = forward.generate(request, **{"gen_length": length, **settings} if length == 8 else settings)
    canvases, seen = bound.own(forward.adapter, request, length, **own)
    assert torch.equal(t.states[0][:, 0], torch.stack(canvases[:-1]))
    assert torch.equal(t.tokens[0], canvases[-1])
    for step, expected in enumerate(bound.expected_logits(forward.adapter, length, seen)):
        with torch.no_grad():
            got = forward.replay(torch.tensor([0]), torch.tensor([step]))[0]
        assert torch.equal(got, expected)


@pytest.mark.parametrize("cache", tiny.CACHES)
@pytest.mark.parametrize(("variant", "settings", "own"), bound.SAMPLED)
def test_sampling_is_upstreams_own(models, cache, variant, settings, own):
    g = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    a = adapter(models[variant], cache)
    request = a.prepare([[tiny.picture(1, (200, 150))]], [bound.PROMPT])
    t = DenoisingForward(a, 1).generate(request, generator=g(), gen_length=8, **settings)
    with bound.as_drawn(g()):
        canvases, _ = bound.own(a, request, 8, **own)
    assert torch.equal(t.states[0][:, 0], torch.stack(canvases[:-1]))
    assert torch.equal(t.tokens[0], canvases[-1])


def test_traps_of_the_facts(models):
    """What the adapter's checks keep from, and what it says of upstream's defaults."""
    model = models["llada"]
    a = adapter(model)
    request = a.prepare([[tiny.picture(1, (200, 150))]], [bound.PROMPT])
    run = lambda **s: bound.own(a, request, 8, block_length=8, **s)[0]  # noqa: E731
    assert len(run(steps=2)) == len(run()) == 9  # steps is ignored
    late, early = (
        [int((c == made.MASK).sum()) for c in bound.own(a, request, 32, block_length=32, **s)[0]]
        for s in (
            dict(schedule="shift", step_ratio=0.25),
            dict(schedule="shift", schedule_kwargs={"shift": 0.33}, step_ratio=0.25),
        )
    )
    assert late[4] > 16 > early[4]
    with pytest.raises(AssertionError):  # block_length is 128 by default
        bound.own(a, request, 8)
    assert model.model.activation_checkpointing_strategy == "whole_layer"
    dream = adapter(models["dream"])
    with pytest.raises(IndexError):
        bound.own(dream, request, 8, schedule="shift", steps=8)
    with pytest.raises(ValueError, match="the 7 tokens that the prefill leaves"):
        DenoisingForward(dream, 1).generate(request, gen_length=8, schedule="shift")


# -- loading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", bound.VARIANTS)
def test_a_saved_checkpoint_loads_through_the_authors_builder(tmp_path, variant):
    model = made.model(variant, tmp_path, mm_use_im_patch_token=False)
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    made.save_tokenizer(folder)
    options = dict(vision_tower=None, dtype=torch.float32)
    if variant == "dream":
        with pytest.raises(RemoteCodeError, match="trust_remote_code"):
            LavidaAdapter.load(str(folder), **options)
        options["trust_remote_code"] = True
    made_up = LavidaAdapter.load(str(folder), **options)
    assert made_up.variant == variant
    assert not repair(made_up.model)
    images = torch.randn(2, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 3]])
    rounded = model.bfloat16().float()  # as the builder loads
    with torch.no_grad():
        for part in (lambda m: m.encode_images(images), lambda m: m.get_model().embed_tokens(ids)):
            assert tiny.relative(part(made_up.model), part(rounded)) < 1e-6
    forward = DenoisingForward(made_up, 1)
    forward.generate(made_up.prepare([[ramp((200, 150))]], ["a dog"]), gen_length=4)
    other = DenoisingForward(adapter(rounded, system=made_up._system), 1)
    other.generate(forward.request, gen_length=4)
    assert torch.equal(forward.trajectory.tokens, other.trajectory.tokens)


@pytest.mark.parametrize("variant", bound.VARIANTS)
def test_loaded_as_its_authors_do(tmp_path, variant):
    folder = tmp_path / "checkpoint"
    made.model(variant, tmp_path, mm_use_im_patch_token=False).save_pretrained(folder)
    made.save_tokenizer(folder)
    with captum_dcam.repair("lavida"):
        from llava.model.builder import load_pretrained_model

        tokenizer, model, images, _ = load_pretrained_model(
            str(folder), None, f"llava_{variant}", device_map="auto", torch_dtype="bfloat16"
        )
    found = captum_dcam.wrap(model, (tokenizer, images))
    explained = captum_dcam.explain(found, ramp((200, 150)), "a dog", words="all", gen_length=4)
    assert explained.words and all(bool(m.any()) for m in explained.maps)


@pytest.mark.parametrize("cache", ("prefix", "none"))
@pytest.mark.parametrize("variant", bound.VARIANTS)
def test_explain_and_compare_run_from_the_command_line(tmp_path, variant, cache):
    folder = tmp_path / "checkpoint"
    made.model(variant, tmp_path, mm_use_im_patch_token=False).save_pretrained(folder)
    made.save_tokenizer(folder)
    options = ["--load", "vision_tower=null", "--cache", cache, "--gen-length", 6, "--steps", 3]
    if variant == "dream":
        options += ["--load", "trust_remote_code=true"]
    found = explained_and_compared(folder, tmp_path / "out", "a dog", *options)
    assert found["feasible_calls"] == (1 if cache == "prefix" else 3)


@pytest.mark.parametrize("lost", ("vision_tower", "ln_f"))
def test_what_a_checkpoint_does_not_hold(tmp_path, lost):
    """The tower comes from its own folder then; anything else would be random."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "checkpoint"
    model = made.model("llada", tmp_path, mm_use_im_patch_token=False)
    tower = model.get_vision_tower().vision_tower
    model.save_pretrained(folder)
    made.save_tokenizer(folder)
    held = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in held.items() if lost not in k}
    assert len(kept) < len(held)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    if lost == "ln_f":
        with pytest.raises(WeightsError, match=r"lacks 1 of the model's tensors .*ln_f"):
            LavidaAdapter.load(str(folder), vision_tower=None)
        return
    found = LavidaAdapter.load(str(folder), vision_tower=None, dtype=torch.float32)
    own = type(tower).from_pretrained(model.config.mm_vision_tower).state_dict()
    for name, value in found.model.get_vision_tower().vision_tower.state_dict().items():
        assert torch.equal(value, own[name].bfloat16().float())
