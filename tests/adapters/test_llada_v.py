"""LLaDA-V against a double of our own: recording, gradients, feasible calls, layout, caches."""

import dataclasses

import pytest
import tiny
import torch
from doubles import llada_checks as checks
from doubles import llada_v as double
from doubles import llada_v_caches as caches

import captum_dcam
from captum_dcam.adapters.llada_v import LladaVAdapter
from captum_dcam.comparing import compare_generation
from captum_dcam.errors import (
    InfeasibleStepError,
    InputError,
    LayerError,
    MethodError,
    SettingError,
)
from captum_dcam.model.answers import force
from captum_dcam.model.forward import DenoisingForward

PROMPT = "what is this ?"
QUICK = dict(gen_length=8, block_length=4, steps=4)
SIZE = (90, 70)


def adapter(seed=0, dtype=torch.float32, fast=False, edits=False, **config):
    model = double.model(seed, dtype, edits=edits, **config)
    if fast:
        caches.register_fast_dllm_hook(model)
    parts = double.processor(config.get("tile", double.TILE))
    made = captum_dcam.wrap(model, parts, system="describe the image")
    made.ids = double.IDS
    return made


def bound(layer=1, keep=True, prompt=PROMPT, pictures=None, made=None, **settings):
    made = adapter() if made is None else made
    forward = DenoisingForward(made, layer)
    request = made.prepare([pictures or [tiny.picture(0, SIZE)]], [prompt])
    forward.generate(request, keep=keep, **{**QUICK, **settings})
    return forward


def reference(forward, monkeypatch, **settings):
    """The double's own decoding of the same request: its answer, logits, and what stood when."""
    made, request = forward.adapter, forward.request
    after = []
    original = double.first_stop

    def spy(answer, *args):
        after.append(answer.clone())
        return original(answer, *args)

    monkeypatch.setattr(double, "first_stop", spy)
    options = {**QUICK, "tokenizer": made.tokenizer, **settings}
    views = made._packing.arguments(request.pixels, request.extras[1])
    with checks.heard(made.model.lm_head) as logits:
        answer = made.model.generate(request.extras[0], **views, **options)
    monkeypatch.setattr(double, "first_stop", original)
    return answer, [x.float() for x in logits], torch.stack(after)


# -- 1. trajectory and replay ---------------------------------------------------------------------

SETTINGS = (
    {},
    {"keep": False},
    {"steps": 6, "block_length": 8, "keep": False},
    {"gen_length": 1, "block_length": 1, "steps": 1},
    {"generation_suffix": "the dog"},
    {"cfg_scale": 1.5},
)


@pytest.mark.parametrize("settings", SETTINGS)
def test_recorded_and_replayed_as_decoded(monkeypatch, settings):
    settings = dict(settings)
    forward = bound(keep=settings.pop("keep", True), **settings)
    t = forward.trajectory
    answer, logits, after = reference(forward, monkeypatch, **settings)
    length, width = after.shape[1], t.tokens.shape[1]
    assert torch.equal(t.tokens[:, :length], answer[:, :length])
    assert t.steps == len(logits) and t.cache == "none"
    before = torch.cat((torch.full((1, length), double.MASK), after[:-1]))
    assert torch.equal(t.states[0][:, 0, :length], before)
    for step, seen in enumerate(logits):
        if len(seen) == 2:
            scale = settings["cfg_scale"]
            seen = seen[1:] + (scale + 1) * (seen[:1] - seen[1:])
        with torch.no_grad():
            got = forward.replay(torch.tensor([0]), torch.tensor([step]))
            state = t.state_at(torch.tensor([0]), torch.tensor([step]))
            plain = forward(forward.request.pixels, *forward.request.extras, *state)
        assert torch.equal(got, seen[:, -width:])
        assert torch.equal(plain, got)
        mine = t.commit_step[0, :length] == step
        assert torch.equal(mine, before[step] != after[step])
        probability = seen[0, -width:].double()
        masked = t.states[0][step, 0] == double.MASK
        for token in (double.EOS, double.BOS, double.HEADER, double.HEADER_END):
            probability[masked, token] = -torch.inf
        sure = probability.softmax(-1)
        for p in mine.nonzero()[:, 0].tolist():
            assert float(t.confidence[0, p]) == pytest.approx(
                float(sure[p, answer[0, p]]), rel=1e-5
            )


def test_the_suffix_is_seen_and_never_explained():
    forward = bound(generation_suffix="the dog")
    t = forward.trajectory
    assert t.tokens.shape == (1, 10) and t.tokens[0, 8:].tolist() == [double.EOS] * 2
    assert (t.states[0][:, 0, 8:] == torch.tensor(double.Tokenizer().encode("the dog"))).all()
    found = captum_dcam.explain_generation(forward)
    assert all(max(w.positions) < 8 for w in found.targets) and "dog" not in found.answer


@pytest.mark.parametrize("guided", (0.0, 1.0))
def test_the_answer_ends_before_the_earliest_stop(monkeypatch, guided):
    whole = bound(cfg_scale=guided).trajectory.tokens[0].tolist()
    stop = f"tok{whole[5]}"
    at = whole.index(whole[5])
    settings = {"cfg_scale": guided, "stopping_criteria": ["tok7", stop]}
    forward = bound(**settings)
    t = forward.trajectory
    answer, logits, _ = reference(forward, monkeypatch, **settings)
    length = answer.shape[1]
    assert length < 8 and length <= at + 1 and t.steps == len(logits)
    assert torch.equal(t.tokens[:, :length], answer)
    assert t.tokens[0, length:].tolist() == [double.EOS] * (8 - length)
    assert int(t.states[0][-1, 0, length]) in (whole[5], double.MASK)
    found = captum_dcam.explain_generation(forward) if length else None
    assert found is None or all(max(w.positions) < length for w in found.targets)


def test_the_demos_stop_string_is_the_default(monkeypatch):
    made = adapter()
    with torch.no_grad():
        head = made.model.lm_head.weight
        head[double.TURN_END] = 3 * head[int(bound().trajectory.tokens[0, 3])]
    forward = bound(made=made)
    assert forward.trajectory.tokens[0].tolist().count(double.EOS) > 0
    open_ended = bound(made=made, stopping_criteria=[])
    assert double.TURN_END in open_ended.trajectory.tokens[0].tolist()


@pytest.mark.parametrize("settings", ({"temperature": 0.8}, {"remasking": "random"}))
def test_same_seed_same_bits(settings):
    made = adapter(layers=2)
    state = torch.get_rng_state()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        options = {"generator": generator, "block_length": 8, **settings}
        return bound(0, made=made, **options).trajectory

    one, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(one.tokens, again.tokens) and torch.equal(one.states[0], again.states[0])
    assert not torch.equal(one.commit_step, other.commit_step)
    assert torch.equal(torch.get_rng_state(), state)


# -- 2. gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "settings"),
    ((0, {}), (1, {}), (2, {}), (1, {"cfg_scale": 1.0}), (0, {"fast": True}), (2, {"fast": True})),
)
def test_gradients_equal_finite_differences(layer, settings):
    options = dict(settings)
    made = adapter(dtype=torch.float64, fast=options.pop("fast", False))
    forward = bound(layer, made=made, **options)
    part = [c.length < c.image_end for c in forward.trajectory.calls]
    for position in (0, 5):
        assert checks.against_differences(forward, position) < 1e-6
    if settings.get("fast"):  # at least one of the steps read runs a part of the sequence only
        steps = forward.trajectory.commit_step[0]
        late = next(p for p in range(8) if part[int(steps[p])])
        assert checks.against_differences(forward, late) < 1e-6


def test_the_last_block_is_refused_and_has_no_path():
    made = adapter(dtype=torch.float64)
    with pytest.raises(LayerError, match="deepest usable block of llada_v is 2"):
        DenoisingForward(made, 3)
    forward = bound(1, made=made)
    block = made.blocks[3]
    states = []
    handle = block.register_forward_hook(
        lambda _m, _a, out: states.append(out[0].detach().requires_grad_()) or (states[0],)
    )
    logits = forward.replay(torch.tensor([0]), torch.tensor([0]))
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[0, :, 5].sum(), states[0])
    image = torch.cat([g.positions.flatten() for g in forward.request.layout.grids])
    assert not gradient[0, image].any() and gradient[0, -8:].any()


def test_guided_gradients_come_from_the_row_that_sees_the_image():
    """The unconditional row's states at image positions are the mask's: the tap leaves them."""
    forward = bound(cfg_scale=1.0)
    seen = []
    handle = forward.tap.register_forward_hook(lambda _m, maps, _o: seen.append(maps[0].shape))
    forward.replay(torch.tensor([0, 0]), torch.tensor([0, 1]))
    handle.remove()
    assert seen == [(2, 16, 3, 3)]
    assert forward.trajectory.kept == {} or "calls" not in forward.trajectory.kept


# -- 3. feasible calls ----------------------------------------------------------------------------


def with_gradients(made, request, **settings):
    """The double's decoder of embeddings, gradients on."""
    embeds = made.embed(request.pixels, *request.extras).embeds.detach()
    options = {**QUICK, "tokenizer": made.tokenizer, **settings}

    def decode():
        if made.fast:
            caches.fast_decode(made.model, embeds, **options)
            return
        bare = made.model.generate_with_embeds.__wrapped__
        own = () if "generate_with_embeds" in vars(made.model) else (made.model,)
        bare(*own, embeds, **options)

    return decode


def measured(made, settings):
    request = made.prepare([[tiny.picture(0, SIZE)]], [PROMPT])
    positions = torch.cat([g.positions.flatten() for g in request.layout.grids])
    span = slice(int(positions.min()), int(positions.max()) + 1)
    for p in made.model.parameters():
        p.requires_grad_(False)
    decode = with_gradients(made, request, **settings)
    calls = checks.live_calls(made.blocks[1], made.model.lm_head, span, decode)
    return [(n, live, n >= request.layout.image_end) for n, live in calls], request


@pytest.mark.parametrize("settings", ({}, {"cfg_scale": 1.0}))
def test_every_call_is_feasible_without_a_cache(settings):
    made = adapter()
    calls, request = measured(made, settings)
    total = request.layout.prefix_length + 8
    assert calls == [(total, True, True)] * 4
    t = bound(**settings).trajectory
    assert t.lengths == (total,) * 4 and t.feasible == (0, 1, 2, 3) and t.valid_ratio == 1


def test_fast_dllm_is_feasible_where_the_prefix_is_refreshed():
    settings = {"gen_length": 16, "block_length": 8, "steps": 8}
    made = adapter(fast=True)
    calls, request = measured(made, settings)
    prefix = request.layout.prefix_length
    expected = [prefix + 16, 16, 16, 16, prefix + 16, 8, 8, 8]
    print(checks.table("Fast-dLLM", calls))
    assert [n for n, _, _ in calls] == expected
    assert [live and holds for _, live, holds in calls] == [n > 16 for n in expected]
    forward = bound(made=made, **settings)
    assert forward.trajectory.lengths == tuple(expected)
    assert forward.trajectory.feasible == (0, 4)
    with pytest.raises(InfeasibleStepError, match="has 16 tokens"):
        captum_dcam.explain_generation(forward, [0], step=1)
    # a block of 8 in the cache of the rest: gradients go through it, one pass over all does not
    commits = forward.trajectory.commit_step[0].tolist()
    partly = next(p for p, step in enumerate(commits) if step not in (0, 4))
    names = ["diffusion_cam", "tam", "logit_lens", "attention"]
    cam, *others = compare_generation(forward, [partly], names).rows
    assert cam.status == "done" and {r.status for r in others} == {"failed"}
    assert all("of the sequence's" in r.note and "without that cache" in r.note for r in others)
    every = {"prefix_refresh_interval": 2}
    assert bound(made=made, **settings, **every).trajectory.feasible == (0, 2, 4, 6)


def test_dllm_cache_keeps_the_length_and_cuts_the_path():
    made = adapter()
    caches.register_cache_LLaDA_V(made.model, prompt_every=3)
    settings = {"gen_length": 8, "block_length": 8, "steps": 8}
    calls, request = measured(made, settings)
    print(checks.table("dLLM-Cache", calls))
    total = request.layout.prefix_length + 8
    assert [(n, holds) for n, _, holds in calls] == [(total, True)] * 8
    assert [live for _, live, _ in calls] == [True, False, False, True, False, False, True, False]
    with pytest.raises(MethodError, match=r"replaced the forward of 4 of 4 blocks.*Switch the"):
        DenoisingForward(made, 1).generate(request, **settings)


@pytest.mark.parametrize("settings", ({}, {"block_length": 2, "steps": 8}))
def test_fast_dllm_is_replayed_through_its_cache(monkeypatch, settings):
    made = adapter(fast=True)
    forward = bound(made=made, **settings)
    t = forward.trajectory
    answer, logits, after = reference(forward, monkeypatch, **settings)
    assert torch.equal(t.tokens, answer)
    assert torch.equal(t.states[0][1:, 0], after[:-1])
    for step, seen in enumerate(logits):
        with torch.no_grad():
            got = forward.replay(torch.tensor([0]), torch.tensor([step]))
        ran = min(seen.shape[1], 8)
        assert torch.equal(got[:, -ran:], seen[:, -ran:]) and not got[:, :-ran].any()
    together = forward.replay(torch.zeros(t.steps, dtype=torch.long), torch.arange(t.steps))
    alone = [forward.replay(torch.tensor([0]), torch.tensor([s])) for s in range(t.steps)]
    assert tiny.relative(together.detach(), torch.cat(alone).detach()) < 1e-5
    maps = captum_dcam.explain_generation(forward, list(range(8)), score="final").maps
    assert all(torch.isfinite(m).all() and m.flatten(1).any(1).all() for m in maps[:1])


# -- 4. layout ------------------------------------------------------------------------------------


def measuring(tile=384, size_of_patch=14, **config):
    """An adapter whose tokens hold the mean red and green of what they see."""
    made = adapter(layers=2, tile=tile, patch=size_of_patch, **config)
    inner = made.model.model
    with torch.no_grad():
        for part in (inner.vision_tower.patch, inner.vision_tower.mlp, inner.mm_projector):
            part.weight.zero_()
            part.bias.zero_()
        inner.vision_tower.patch.weight[0, 0] = inner.vision_tower.patch.weight[1, 1] = (
            1 / size_of_patch**2
        )
        inner.mm_projector.weight.copy_(torch.eye(16))
    return made


@pytest.fixture(scope="module")
def big():
    return measuring()


def embedded(made, picture):
    request = made.prepare([[picture]], [PROMPT])
    with torch.no_grad():
        return request, made.embed(request.pixels, *request.extras).embeds


TOKENS = {
    (384, 384): (27, 27, 1485),
    (500, 375): (27, 36, 1728),
    (640, 480): (40, 54, 2929),
    (1024, 768): (46, 62, 3627),
    (1920, 1080): (40, 72, 3649),
    (1000, 200): (17, 81, 2123),
}


@pytest.mark.parametrize("size", checks.SIZES)
def test_ramps_come_out_where_the_boxes_say(big, size):
    request, embeds = embedded(big, checks.ramps(size))
    assert embeds.shape[1] == request.layout.prefix_length
    if size in TOKENS:
        rows, columns, count = TOKENS[size]
        assert request.layout.shapes == ((27, 27), (rows, columns))
        text = len(request.extras[0][0]) - 1
        assert request.layout.prefix_length == text + count
    for grid, found in zip(
        request.layout.grids, checks.first_channels(embeds, request.layout), strict=True
    ):
        red, green = ((f + 1) / 2 for f in found)
        x = (grid.x_edges.mean(1) / size[0]).float()
        y = (grid.y_edges.mean(1) / size[1]).float()
        inside = (grid.x_edges[:, 0] >= 0) & (grid.x_edges[:, 1] <= size[0])
        rows = (grid.y_edges[:, 0] >= 0) & (grid.y_edges[:, 1] <= size[1])
        assert (red[rows][:, inside] - x[inside]).abs().max() < 0.03
        assert (green[rows][:, inside] - y[rows, None]).abs().max() < 0.03
    image = torch.zeros(embeds.shape[1], dtype=torch.bool)
    for grid in request.layout.grids:
        image[grid.positions] = True
    start = int(request.layout.grids[0].positions[0, 0])
    between = ~image[start : request.layout.image_end]
    newlines = embeds[0, start : request.layout.image_end][between]
    assert torch.equal(newlines, big.model.model.image_newline.expand_as(newlines))
    assert int((request.extras[0][0] == -200).nonzero()) == start


@pytest.mark.parametrize("size", checks.SIZES)
def test_a_bright_patch_goes_to_its_token_and_back(big, size):
    for at in ((0.2, 0.3), (0.75, 0.6)):
        picture, (x, y) = checks.patch(size, at)
        request, embeds = embedded(big, picture)
        found = checks.first_channels(embeds, request.layout)
        for grid, (red, _) in zip(request.layout.grids, found, strict=True):
            weight = (red + 1).clamp_min(0).double()
            total = weight.sum()
            cell_x, cell_y = (
                float((e[:, 1] - e[:, 0]).max()) for e in (grid.x_edges, grid.y_edges)
            )
            assert abs(float((weight.sum(0) * grid.x_edges.mean(1)).sum() / total) - x) < cell_x
            assert abs(float((weight.sum(1) * grid.y_edges.mean(1)).sum() / total) - y) < cell_y
            back = grid.to_pixels((red + 1)[None])[0]
            row, column = divmod(int(back.argmax()), back.shape[1])
            half = 0.06 * size[0] + cell_x, 0.06 * size[1] + cell_y
            assert abs(column + 0.5 - x) < half[0] + 1 and abs(row + 0.5 - y) < half[1] + 1


def test_pixels_belong_to_the_tokens_that_move_with_them(big):
    made, picture = big, tiny.picture(3, (500, 375))
    request, _ = embedded(made, picture)
    owner = made.pixel_tokens(request)
    assert owner.shape == request.pixels.shape
    pixels = request.pixels.clone().requires_grad_()
    embeds = made.embed(pixels, *request.extras).embeds
    positions = torch.cat([g.positions.flatten() for g in request.layout.grids])
    for token in (0, 400, 729, 1000, 729 + 27 * 36 - 1):
        (gradient,) = torch.autograd.grad(embeds[0, positions[token], 0], pixels, retain_graph=True)
        moved = gradient[0, :, 0] != 0
        assert torch.equal(moved, owner[0, :, 0] == token)


def test_padded_pictures_without_tiles():
    made = adapter(image_aspect_ratio="pad")
    request = made.prepare([[tiny.picture(0, (80, 40))]], [PROMPT])
    assert request.layout.shapes == ((3, 3),) and request.pixels.shape == (1, 1, 3, 48, 48)
    embeds = made.embed(request.pixels, *request.extras).embeds
    assert embeds.shape[1] == request.layout.prefix_length
    (grid,) = request.layout.grids
    assert grid.y_edges[0, 0] == -20 and grid.x_edges[0, 0] == 0


# -- 5. several images, prompts -------------------------------------------------------------------


def test_several_pictures_in_one_prompt():
    made = adapter()
    pictures = [tiny.picture(0, (90, 70)), tiny.picture(1, (40, 120))]
    request = made.prepare([pictures], ["<image> what is this <image> ?"])
    assert [g.image for g in request.layout.grids] == [0, 0, 1, 1]
    embeds = made.embed(request.pixels, *request.extras).embeds
    assert embeds.shape[1] == request.layout.prefix_length
    single = made.prepare([pictures[1:]], [PROMPT])
    alone = made.embed(single.pixels, *single.extras).embeds
    for mine, theirs in zip(request.layout.grids[2:], single.layout.grids, strict=True):
        found, expected = embeds[0, mine.positions], alone[0, theirs.positions]
        assert torch.allclose(found, expected, atol=1e-6)
    owners = made.pixel_tokens(request)
    assert owners.max() + 1 == sum(g.positions.numel() for g in request.layout.grids)
    forward = DenoisingForward(made, 1)
    forward.generate(request, **QUICK)
    found = captum_dcam.explain_generation(forward, [0])
    assert len(found.maps) == 4 and all(m.any() for m in found.maps)


def test_prompt_tokens_are_the_text_between_markers():
    made = adapter()
    request = made.prepare([[tiny.picture(0, SIZE)]], [PROMPT])
    positions, ids = made.prompt_tokens(request)
    embeds = made.embed(request.pixels, *request.extras).embeds[0]
    assert torch.equal(embeds[positions], made.model.model.embed_tokens(ids))
    text = "".join(made.token_texts(ids.tolist()))
    assert "describe the image" in text and "what is this ?" in text and "<|" not in text


@pytest.mark.parametrize("prompt", ("", "what"))
def test_empty_prompt_and_one_token(prompt):
    forward = bound(prompt=prompt, gen_length=1, block_length=1, steps=1)
    assert forward.trajectory.tokens.shape == (1, 1)
    assert captum_dcam.explain_generation(forward, [0]).maps[0].any()


def test_conversations():
    made = adapter()
    turns = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "what is this ?"}],
        },
        {"role": "assistant", "content": "a dog ."},
        {"role": "user", "content": "is the dog red ?"},
    ]
    request = made.prepare([[tiny.picture(0, SIZE)]], [turns])
    text = "".join(made.token_texts([i for i in request.extras[0][0].tolist() if i >= 0]))
    assert text.index("what is this") < text.index("a dog") < text.index("is the dog red")
    assert request.prompts[0].startswith("user: what is this")


def test_a_given_answer_is_read_token_by_token():
    forward = bound()
    made = force(forward, "a red dog .")
    assert made.states[0].shape == (4, 1, 4)
    assert captum_dcam.explain_generation(forward, ["red"]).maps[0].any()


# -- 6. nothing left behind -----------------------------------------------------------------------


@pytest.mark.parametrize("settings", ({}, {"cfg_scale": 1.0}, {"generation_suffix": "a dog"}))
def test_nothing_is_left_behind(settings):
    made = adapter()
    made.model.train()
    before = {n: set(vars(m)) for n, m in made.model.named_modules()}
    forward = bound(made=made, **settings)
    captum_dcam.explain_generation(forward, [0, 1])
    assert not tiny.hooks(made.model) and not tiny.hooks(forward)
    assert {n: set(vars(m)) for n, m in made.model.named_modules()} == before
    assert all(m.training for m in made.model.modules())
    assert all(p.grad is None and p.requires_grad for p in made.model.parameters())


def test_nothing_is_left_behind_after_an_error(monkeypatch):
    made = adapter()
    request = made.prepare([[tiny.picture(0, SIZE)]], [PROMPT])

    def broken(*_args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(made.model.model.norm, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        DenoisingForward(made, 1).generate(request, **QUICK)
    monkeypatch.undo()
    assert not tiny.hooks(made.model)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    (
        ({"max_new_tokens": 8}, TypeError, "LLaDA-V ignores it: use gen_length"),
        ({"schedule": "cosine"}, TypeError, "unknown setting 'schedule'"),
        ({"gen_length": 0}, ValueError, "at least one token"),
        ({"block_length": 3}, ValueError, "not a multiple of block_length 3"),
        ({"steps": 3}, ValueError, "multiple of the 2 blocks"),
        ({"remasking": "entropy"}, ValueError, "expected one of"),
        ({"temperature": 1.0}, ValueError, "needs a generator"),
        ({"stopping_criteria": "<|eot_id|>"}, TypeError, "expected a list of stop strings"),
        ({"prefix_refresh_interval": 4}, ValueError, "setting of Fast-dLLM"),
    ),
)
def test_settings_that_cannot_work(settings, error, message):
    with pytest.raises(error, match=message):
        bound(**settings)


def test_guidance_with_fast_dllm_is_refused():
    with pytest.raises(ValueError, match="Fast-dLLM fails on guided decoding"):
        bound(made=adapter(fast=True), cfg_scale=1.0)


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    (
        (2, 2, "llada_v runs one at a time"),
        (1, 2, "one prompt and one list of images"),
        ("video", 1, "takes no video"),
        (0, 1, "no image"),
    ),
)
def test_requests_that_cannot_work(images, prompts, message):
    picture = tiny.picture(0, SIZE)
    given = [[[picture, picture]]] if images == "video" else [[picture]] * images or [[]]
    with pytest.raises(ValueError, match=message):
        adapter().prepare(given, [PROMPT] * prompts)


def test_pictures_and_signs_must_match():
    with pytest.raises(ValueError, match="places 2 images by <image>, but 1 were given"):
        adapter().prepare([[tiny.picture()]], ["<image> and <image>"])


def test_too_many_tokens_for_the_context():
    made = adapter(tokenizer_model_max_length=60)
    with pytest.raises(ValueError, match="tokenizer_model_max_length is 60: the image span would"):
        made.prepare([[tiny.picture(0, (300, 300))]], [PROMPT])


def test_models_and_processors_that_do_not_fit():
    model = double.model(layers=2)
    with pytest.raises(TypeError, match=r"expected \(tokenizer, image_processor\)"):
        LladaVAdapter(model, object())
    with pytest.raises(TypeError, match="expected LlavaLLaDAModelLM"):
        LladaVAdapter(tiny.model(), double.processor())
    other = double.ImageProcessor()
    other.crop_size = {"height": 224, "width": 224}
    with pytest.raises(ValueError, match=r"cuts 224 px, the model's vision tower takes 48 px"):
        LladaVAdapter(model, (double.Tokenizer(), other))
    with pytest.raises(ValueError, match=r"image_aspect_ratio 'highres'.*expected 'pad'"):
        adapter(layers=2, image_aspect_ratio="highres")


def test_wrap_finds_the_family():
    assert isinstance(adapter(layers=2), LladaVAdapter)
    assert adapter(layers=2).cache == "none"
    with pytest.raises(ValueError, match="knows"):
        captum_dcam.wrap(double.model(layers=2), double.processor(), cache="prefix")


def test_a_saved_trajectory_replays(monkeypatch):
    forward = bound()
    other = DenoisingForward(forward.adapter, 2)
    other.bind(forward.request, dataclasses.replace(forward.trajectory, kept={}))
    at = torch.tensor([0]), torch.tensor([2])
    with torch.no_grad():
        assert torch.equal(other.replay(*at), forward.replay(*at))


# -- ReDiff: a decoder that edits -----------------------------------------------------------------

EDITING = dict(revise=True, stopping_criteria=[])


@pytest.fixture(scope="module")
def edited():
    return bound(made=adapter(edits=True), **EDITING)


def last_of_blocks(t, length=4):
    """(T,) the last step before which the token's block held a mask: none is filled in another."""
    masked = (t.states[0][:, 0] == double.MASK).unflatten(1, (-1, length)).any(-1)
    steps = torch.arange(t.steps)[:, None].where(masked, -1).amax(0)
    return steps.repeat_interleave(length)


def test_a_commit_is_the_last_change(edited):
    t = edited.trajectory
    after = torch.cat((t.states[0][1:, 0], t.tokens))
    moved = after != t.states[0][:, 0]
    steps = torch.arange(t.steps)[:, None].where(moved, -1).amax(0)
    assert torch.equal(t.commit_step[0], steps)
    at = t.states[0][steps, 0, torch.arange(8)]
    wrote_over = at != double.MASK
    assert wrote_over.any() and torch.equal(
        t.unsettled[0], wrote_over & (steps == last_of_blocks(t))
    )
    for p, step in enumerate(steps.tolist()):
        with torch.no_grad():
            logits = edited.replay(torch.tensor([0]), torch.tensor([step]))[0, p].double()
        logits[[double.EOS, double.BOS, double.HEADER, double.HEADER_END]] = -torch.inf
        assert int(logits.argmax()) == int(t.tokens[0, p])
        assert float(logits.softmax(-1).max()) == pytest.approx(float(t.confidence[0, p]), rel=1e-5)


def test_tokens_that_never_settled(edited):
    t = edited.trajectory
    late = int(t.unsettled[0].nonzero()[0, 0])
    step = int(t.commit_step[0, late])
    said = rf"token {late} of the answer never settled: step {step}.*score={step} .*'final'"
    with pytest.raises(InfeasibleStepError, match=said):
        captum_dcam.explain_generation(edited, late)
    with pytest.raises(InfeasibleStepError, match=said):
        captum_dcam.compare_generation(edited, late, "diffusion_cam", errors="raise")
    with pytest.warns(UserWarning, match="left out, as words that the last step still edited"):
        found = captum_dcam.explain_generation(edited)
    kept = {p for word in found.targets for p in word.positions}
    assert kept and not t.unsettled[0, sorted(kept)].any()
    everything = captum_dcam.explain_generation(edited, score="final")
    assert {p for w in everything.targets for p in w.positions} == set(range(8))
    own = captum_dcam.explain_generation(edited, late, score=step)
    assert own.maps[0].any()


def test_a_decoder_that_writes_over_its_prompt_is_refused():
    forward = bound(made=adapter(edits=True), **EDITING)
    whole = dict(gen_length=16, block_length=16, steps=16, revise=True, revise_topk=1.0)
    with pytest.raises(MethodError, match=r"step \d+ wrote over the prompt's embeddings at \[\d+"):
        for stop in range(100, 120):
            forward.generate(forward.request, **whole, stopping_criteria=[f"tok{stop}"])


@pytest.mark.parametrize(
    ("edits", "given", "said"),
    (
        (False, dict(revise=True), "generate knows no such argument and would ignore it"),
        (True, dict(revise_topk=0.5), "revise_topk is 0.5: it is a setting of revise=True"),
        (True, dict(revise=True, revise_start=0), "revise_start is 0: expected a share"),
        (True, dict(revise="yes"), "revise is 'yes': expected one of"),
        (True, dict(revise=True, fake_ans=[1]), "unknown setting 'fake_ans' .*a draft would be"),
    ),
)
def test_settings_of_an_editing_decoder_that_cannot_work(edits, given, said):
    with pytest.raises((InputError, SettingError), match=said):
        bound(made=adapter(edits=edits), **given)
