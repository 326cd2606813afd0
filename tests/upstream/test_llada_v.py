"""LLaDA-V's adapter on tiny random instances of the upstream code.

``CAPTUM_DCAM_UPSTREAM_LLADA_V=/folder/LLaDA-V pytest tests/upstream/test_llada_v.py``; skipped
without the variable. The package is under ``train/`` and needs requests and einops. Fast-dLLM is
tested where the checkout has its hook (``vukrosic/LLaDA-V``), decoding that edits where it has
that (``jiyt17/ReDiff``).
"""

import json
import os
import sys
from pathlib import Path

import pytest
import tiny
import torch
from doubles import llada_checks as checks
from doubles import llada_v as double
from upstream import made_llada_v as real
from upstream.commands import explained_and_compared

import captum_dcam
from captum_dcam.adapters.common import packing
from captum_dcam.adapters.llada_v import LladaVAdapter
from captum_dcam.adapters.llada_v.loading import package
from captum_dcam.errors import LayerError, MethodError, WeightsError
from captum_dcam.model.buffers import ROTARY, repair
from captum_dcam.model.forward import DenoisingForward

FOLDER = os.environ.get("CAPTUM_DCAM_UPSTREAM_LLADA_V")
pytestmark = [
    pytest.mark.skipif(
        FOLDER is None, reason="CAPTUM_DCAM_UPSTREAM_LLADA_V names no checkout of LLaDA-V"
    ),
    pytest.mark.filterwarnings("ignore"),
]
HOOK = Path(FOLDER or ".") / "train" / "llava" / "hooks" / "fast_dllm_hook.py"
fast_only = pytest.mark.skipif(not HOOK.is_file(), reason="the checkout has no Fast-dLLM")
QUICK = dict(gen_length=8, block_length=4, steps=4)
SIZE = (90, 70)
PROMPT = "what is this ?"


@pytest.fixture(scope="module")
def upstream():
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(Path(FOLDER) / "train"))
    yield package()
    sys.path.remove(str(Path(FOLDER) / "train"))
    if before is None:
        del os.environ["HF_HUB_OFFLINE"]


def config(upstream, **changes):
    return real.config(upstream.LlavaLLaDAConfig, **changes)


def model(upstream, dtype=torch.float32, tile=48, seed=0, **changes):
    made = config(upstream, **changes)
    return real.model(upstream.LlavaLLaDAModelLM, made, dtype, tile, seed)


def adapter(upstream, dtype=torch.float32, tile=48, **changes):
    made = model(upstream, dtype, tile, **changes)
    return captum_dcam.wrap(made, double.processor(tile), system="describe the image")


def bound(made, layer=1, **settings):
    forward = DenoisingForward(made, layer)
    request = made.prepare([[tiny.picture(0, SIZE)]], [PROMPT])
    forward.generate(request, **{**QUICK, **settings})
    return forward


def check_replay(forward, **settings):
    """Answer and logits of upstream's own generate against the recorded ones; bit by bit."""
    made, t, request = forward.adapter, forward.trajectory, forward.request
    views = made._packing.arguments(request.pixels, request.extras[1])
    options = {**QUICK, "tokenizer": made.tokenizer, **settings}
    with checks.heard(made.model.lm_head) as logits:
        answer = made.model.generate(request.extras[0], **views, **options)
    length = min(answer.shape[1], options["gen_length"])
    assert torch.equal(t.tokens[:, :length], answer[:, :length])
    assert t.steps == len(logits)
    for step, seen in enumerate(logits):
        seen = seen.float()
        if len(seen) == 2:
            seen = seen[1:] + (settings["cfg_scale"] + 1) * (seen[:1] - seen[1:])
        ran = min(seen.shape[1], t.tokens.shape[1])
        with torch.no_grad():
            got = forward.replay(torch.tensor([0]), torch.tensor([step]))
        assert torch.equal(got[:, -ran:], seen[:, -ran:])
    masked = t.states[0] == double.MASK
    assert torch.equal(
        masked[:, 0, :length], t.commit_step[0, :length] >= torch.arange(t.steps)[:, None]
    )
    return answer


@pytest.mark.parametrize(
    "settings",
    (
        {},
        {"steps": 6, "block_length": 8},
        {"cfg_scale": 1.5},
        {"generation_suffix": "the dog"},
        {"gen_length": 1, "block_length": 1, "steps": 1},
    ),
)
def test_recorded_and_replayed_as_decoded(upstream, settings):
    check_replay(bound(adapter(upstream), **settings), **settings)


def test_the_answer_ends_before_the_stop(upstream):
    made = adapter(upstream)
    token = int(bound(made).trajectory.tokens[0, 6])
    settings = {"stopping_criteria": [f"tok{token}"]}
    forward = bound(made, **settings)
    answer = check_replay(forward, **settings)
    assert answer.shape[1] < 8
    assert forward.trajectory.tokens[0, answer.shape[1] :].tolist() == [double.EOS] * (
        8 - answer.shape[1]
    )


@pytest.fixture
def float64(upstream):
    """Upstream normalises in float32 whatever the weights' type, which drowns finite differences:
    here the norm keeps its input's type."""
    with real.exact(model(upstream)):
        yield


@pytest.mark.parametrize(
    ("layer", "settings"), ((0, {}), (1, {}), (2, {}), (1, {"cfg_scale": 1.0}))
)
@pytest.mark.usefixtures("float64")
def test_gradients_equal_finite_differences(upstream, layer, settings):
    forward = bound(adapter(upstream, torch.float64), layer, **settings)
    for position in (0, 5):
        assert checks.against_differences(forward, position) < 1e-6


def test_the_last_block_is_refused(upstream):
    with pytest.raises(LayerError, match="deepest usable block of llada_v is 2"):
        DenoisingForward(adapter(upstream), 3)


def measured(made, decoder, **settings):
    request = made.prepare([[tiny.picture(0, SIZE)]], [PROMPT])
    embeds = made.embed(request.pixels, *request.extras).embeds.detach()
    positions = torch.cat([g.positions.flatten() for g in request.layout.grids])
    span = slice(int(positions.min()), int(positions.max()) + 1)
    for p in made.model.parameters():
        p.requires_grad_(False)
    options = {**QUICK, "tokenizer": made.tokenizer, **settings}
    calls = checks.live_calls(
        made.blocks[1], made.model.lm_head, span, lambda: decoder(embeds, **options)
    )
    return [(n, live, n >= request.layout.image_end) for n, live in calls], request


@pytest.mark.parametrize("settings", ({}, {"cfg_scale": 1.0}))
def test_every_call_is_feasible_without_a_cache(upstream, settings):
    made = adapter(upstream)
    bare = upstream.LLaDAModelLM.generate_with_embeds.__wrapped__
    calls, request = measured(made, lambda e, **o: bare(made.model, e, **o), **settings)
    total = request.layout.prefix_length + 8
    assert calls == [(total, True, True)] * 4
    assert bound(made, **settings).trajectory.lengths == (total,) * 4


def test_dllm_cache_is_measured_and_refused(upstream):
    from llava.cache import dLLMCache
    from llava.hooks import register_cache_LLaDA_V

    made = adapter(upstream)
    dLLMCache.new_instance(prompt_interval_steps=3, gen_interval_steps=1, transfer_ratio=0.25)
    register_cache_LLaDA_V(made.model, "model.layers")
    bare = upstream.LLaDAModelLM.generate_with_embeds.__wrapped__
    settings = {"block_length": 8, "steps": 8}
    calls, request = measured(made, lambda e, **o: bare(made.model, e, **o), **settings)
    print(checks.table("dLLM-Cache", calls))
    total = request.layout.prefix_length + 8
    assert [(n, holds) for n, _, holds in calls] == [(total, True)] * 8
    assert [live for _, live, _ in calls] == [True, False, False, True, False, False, True, False]
    with pytest.raises(MethodError, match="replaced the forward of 4 of 4 blocks"):
        DenoisingForward(made, 1).generate(request, **QUICK)


@fast_only
@pytest.mark.usefixtures("float64")
def test_fast_dllm_through_its_cache_equals_finite_differences(upstream):
    from llava.hooks.fast_dllm_hook import register_fast_dllm_hook

    made = adapter(upstream, torch.float64)
    register_fast_dllm_hook(made.model)
    forward = bound(made)
    steps = forward.trajectory.commit_step[0]
    late = next(p for p in range(8) if int(steps[p]) % 2)
    assert checks.against_differences(forward, late) < 1e-6


@fast_only
def test_fast_dllm(upstream):
    from llava.hooks.fast_dllm_hook import register_fast_dllm_hook, unregister_fast_dllm_hook

    made = adapter(upstream)
    hook = register_fast_dllm_hook(made.model)
    bare = type(hook)._fast_generate_with_embeds.__wrapped__
    settings = {"gen_length": 16, "block_length": 8, "steps": 8}
    calls, request = measured(made, lambda e, **o: bare(hook, e, **o), **settings)
    print(checks.table("Fast-dLLM", calls))
    whole = request.layout.prefix_length + 16
    assert [n for n, _, _ in calls] == [whole, 16, 16, 16, whole, 8, 8, 8]
    assert [live and holds for _, live, holds in calls] == [True, *[False] * 3] * 2
    forward = bound(made, **settings)
    assert forward.trajectory.feasible == (0, 4)
    check_fast(forward, **settings)
    unregister_fast_dllm_hook(hook)
    assert not made.fast


def check_fast(forward, **settings):
    made, t, request = forward.adapter, forward.trajectory, forward.request
    views = made._packing.arguments(request.pixels, request.extras[1])
    with checks.heard(made.model.lm_head) as logits:
        answer = made.model.generate(
            request.extras[0], **views, **{**QUICK, "tokenizer": made.tokenizer, **settings}
        )
    assert torch.equal(answer, t.tokens)
    for step, seen in enumerate(logits):
        ran = min(seen.shape[1], t.tokens.shape[1])
        with torch.no_grad():
            got = forward.replay(torch.tensor([0]), torch.tensor([step]))
        assert torch.equal(got[:, -ran:], seen[:, -ran:].float())


@pytest.mark.parametrize(
    "settings",
    (
        {},
        {"block_length": 8, "steps": 8},
        {"revise_start": 0.5},
        {"revise_topk": 0.5},
        {"cfg_scale": 1.0},
        {"generation_suffix": "the dog"},
    ),
)
def test_rediffs_decoder_is_recorded_as_it_edits(upstream, settings):
    made = adapter(upstream)
    if not made.revises:
        pytest.skip("the checkout has no ReDiff")
    settings = {**QUICK, "revise": True, "stopping_criteria": [], **settings}
    forward = bound(made, **settings)
    t, request = forward.trajectory, forward.request
    ids, width, original = [], t.tokens.shape[1], torch.topk

    def spied(values, *args, **options):
        """Upstream's ids are a local of the frame that ranks what is masked, once per step."""
        frame = sys._getframe(1)
        if frame.f_code.co_name == "generate_with_embeds":
            own = frame.f_locals
            ids.append((own["num_block"], own["i"], own["x"].clone()))
        return original(values, *args, **options)

    views = made._packing.arguments(request.pixels, request.extras[1])
    with pytest.MonkeyPatch.context() as patch, checks.heard(made.model.lm_head) as logits:
        patch.setattr(torch, "topk", spied)
        answer = made.model.generate(
            request.extras[0], tokenizer=made.tokenizer, **views, **settings
        )
    own = {(block, step): x[:, -width:] for block, step, x in reversed(ids)}  # the first of a step
    canvases = torch.stack([own[key] for key in sorted(own)])
    length = settings["gen_length"]
    assert torch.equal(t.tokens[:, :length], answer[:, :length])
    assert torch.equal(t.states[0], canvases) and len(logits) == t.steps
    after = torch.cat((canvases[1:, :, :length], answer[None, :, :length]))
    moved = after != canvases[:, :, :length]
    steps = torch.arange(t.steps)[:, None, None]
    assert torch.equal(t.commit_step[:, :length], torch.where(moved, steps, -1).amax(0))
    rewritten = moved & (canvases[:, :, :length] != double.MASK)
    assert rewritten.any(), "nothing was edited"
    for step, seen in enumerate(logits):
        seen = seen.float()
        if len(seen) == 2:
            seen = seen[1:] + (settings["cfg_scale"] + 1) * (seen[:1] - seen[1:])
        with torch.no_grad():
            got = forward.replay(torch.tensor([0]), torch.tensor([step]))
        assert torch.equal(got, seen[:, -width:])
        odds = seen[0, -width:].double()
        odds[:, [double.EOS, double.BOS, double.HEADER, double.HEADER_END]] = -torch.inf
        for p in (t.commit_step[0, :length] == step).nonzero()[:, 0].tolist():
            wanted = float(odds[p].softmax(-1)[answer[0, p]])
            assert float(t.confidence[0, p]) == pytest.approx(wanted, rel=1e-5)


# -- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", checks.SIZES)
def test_pictures_are_cut_and_packed_as_upstream_does(upstream, size):
    from llava.mm_utils import process_images

    pins = "(1x1),...,(6x6)"
    made = adapter(upstream, tile=384, image_grid_pinpoints=pins, num=2)
    inner = made.model.model
    with torch.no_grad():
        for part in (inner.vision_tower.patch, inner.vision_tower.mlp, inner.mm_projector):
            part.weight.zero_()
            part.bias.zero_()
        inner.vision_tower.patch.weight[0, 0] = inner.vision_tower.patch.weight[1, 1] = 1 / 196
        inner.mm_projector.weight.copy_(torch.eye(16))
    picture = checks.ramps(size)
    request = made.prepare([[picture]], [PROMPT])
    theirs = process_images([picture], made._packing.image_processor, made.model.config)
    assert torch.equal(request.pixels[0], theirs[0])
    with torch.no_grad():
        embeds = made.embed(request.pixels, *request.extras).embeds
    assert embeds.shape[1] == request.layout.prefix_length
    found = checks.first_channels(embeds, request.layout)
    for grid, (red, green) in zip(request.layout.grids, found, strict=True):
        columns = (grid.x_edges[:, 0] >= 0) & (grid.x_edges[:, 1] <= size[0])
        rows = (grid.y_edges[:, 0] >= 0) & (grid.y_edges[:, 1] <= size[1])
        x = (grid.x_edges.mean(1) / size[0]).float()[columns]
        y = (grid.y_edges.mean(1) / size[1]).float()[rows]
        seen = ((c[rows][:, columns] + 1) / 2 for c in (red, green))
        assert (next(seen) - x).abs().max() < 0.03 and (next(seen) - y[:, None]).abs().max() < 0.03


def test_ids_are_those_of_upstreams_tokenizing(upstream):
    from llava.mm_utils import tokenizer_image_token

    tokenizer = double.Tokenizer()
    text = "<|bos|>what is <image> this <image>\n?"
    assert packing.ids_of(tokenizer, text) == tokenizer_image_token(text, tokenizer)


# -- loading --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(upstream, tmp_path_factory):
    """A tiny checkpoint with upstream's own SigLIP classes, as save_pretrained writes it."""
    from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionConfig, SigLipVisionModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llada_v")
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    SigLipVisionModel(SigLipVisionConfig(**shape)).save_pretrained(folder / "siglip")
    changes = dict(
        mm_vision_tower=str(folder / "siglip"),
        mm_projector_type="linear",
        mm_hidden_size=16,
        image_grid_pinpoints="(1x1),...,(2x2)",
    )
    made = upstream.LlavaLLaDAModelLM(config(upstream, **changes))
    with torch.no_grad():
        made.model.image_newline.normal_()
    made.save_pretrained(folder / "model")
    words = {w: i for i, w in enumerate("<unk> <s> </s> what is this ?".split())}
    words |= {f"w{i}": i for i in range(len(words), double.VOCABULARY)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    described = json.loads((folder / "model" / "tokenizer_config.json").read_text())
    described["tokenizer_class"] = "PreTrainedTokenizerFast"  # as the checkpoint says
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(described))
    return folder / "model", made


def test_loaded_as_its_authors_do(saved):
    with captum_dcam.repair("llada_v"):
        from llava.model.builder import load_pretrained_model

        tokenizer, model, images, _ = load_pretrained_model(
            str(saved[0]), None, "llava_llada", attn_implementation="sdpa", device_map="auto"
        )
    found = captum_dcam.wrap(model.float(), (tokenizer, images))
    shown = dict(gen_length=4, steps=2, block_length=4)
    explained = captum_dcam.explain(found, tiny.picture(0, SIZE), PROMPT, words="all", **shown)
    assert explained.words and all(bool(m.any()) for m in explained.maps)


def test_a_saved_checkpoint_is_loaded_whole(saved):
    folder, made = saved
    found = LladaVAdapter.load(str(folder), dtype=torch.float32)
    assert found._packing.tiling(1).tile == 384 and found._packing.tiling(1).side == 27
    theirs = found.model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in made.state_dict().items())
    assert not repair(found.model)
    rotary = found.model.model.layers[0].self_attn.rotary_emb
    assert torch.equal(rotary.inv_freq, made.model.layers[0].self_attn.rotary_emb.inv_freq)
    rotary.inv_freq = rotary.inv_freq * 0 - 7
    assert repair(found.model) == {ROTARY: 1}
    assert torch.equal(rotary.inv_freq, made.model.layers[0].self_attn.rotary_emb.inv_freq)


def test_explain_and_compare_run_from_the_command_line(saved, tmp_path):
    settings = ["--gen-length", 6, "--steps", 3, "--block-length", 6]
    found = explained_and_compared(saved[0], tmp_path, "what is this ?", *settings)
    assert found["feasible_calls"] == found["calls"] == 3


def test_the_real_tower_carries_gradients_to_the_pixels(saved):
    folder, _ = saved
    found = LladaVAdapter.load(str(folder), dtype=torch.float32)
    request = found.prepare([[tiny.picture(0, (300, 200))]], [PROMPT])
    pixels = request.pixels.clone().requires_grad_()
    embeds = found.embed(pixels, *request.extras).embeds
    assert embeds.shape[1] == request.layout.prefix_length
    embeds[0, request.layout.grids[1].positions[2, 2]].sum().backward()
    assert pixels.grad[0, 1].any() and not pixels.grad[0, 0].any()


def test_checkpoints_that_are_not_whole(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = saved
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    less = {k: v for k, v in tensors.items() if "vision_tower" not in k}
    save_file(less, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks .* tensors .*vision tower included"):
        LladaVAdapter.load(str(tmp_path))
    other = json.loads((folder / "config.json").read_text())
    other["architectures"] = ["LlavaLladaForMaskedDiffusion"]
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(WeightsError, match="expected LlavaLLaDAModelLM; other families"):
        LladaVAdapter.load(str(tmp_path))
    with pytest.raises(WeightsError, match="cannot be loaded"):
        LladaVAdapter.load(str(tmp_path / "nowhere"))


def test_nothing_is_left_behind(upstream):
    made = adapter(upstream)
    made.model.train()
    before = {n: set(vars(m)) for n, m in made.model.named_modules()}
    captum_dcam.explain_generation(bound(made), [0, 1])
    assert not tiny.hooks(made.model)
    assert {n: set(vars(m)) for n, m in made.model.named_modules()} == before
    assert all(m.training for m in made.model.modules())
    assert all(p.grad is None and p.requires_grad for p in made.model.parameters())
