"""What tests of Dream-VL check on the double and on upstream's code alike."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import tiny
import torch
from PIL import Image

from captum_dcam.adapters.dream_vl.compat import callable_generate, generation_class, is_dimple
from captum_dcam.testing import AdapterCase, Reference
from captum_dcam.testing.case import SIZES as CASE_SIZES

QUICK = dict(max_new_tokens=6, steps=4)
#: width, height: square, wide, tall, tiny, above the largest size
SIZES = (
    (56, 56),
    (84, 56),
    (100, 60),
    (60, 100),
    (200, 56),
    (20, 50),
    (9, 9),
    (640, 480),
    (31, 300),
)
PROMPTS = ["what is this", "what is this red circle on the left"]


@contextmanager
def open_mask(model):
    """What upstream's users must do on a CPU, written here once more."""

    def expand(_module, args, kwargs):
        mask = kwargs["attention_mask"]
        if mask.ndim == 2:
            mask = mask.bool()[:, None, None].expand(-1, 1, mask.shape[1], -1)
        return args, {**kwargs, "attention_mask": mask}

    handle = model.model.register_forward_pre_hook(expand, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def reference(adapter, request, settings):
    """The model's own generation, example by example: answers, canvases from its history, and the
    shifted logits of every step."""
    found = [one_reference(adapter, request, settings, b) for b in range(request.batch)]
    answers, canvases, logits = zip(*found, strict=True)
    steps = [torch.cat(same) for same in zip(*logits, strict=True)]
    return Reference(torch.cat(answers), steps, torch.cat(canvases, dim=1))


def one_reference(adapter, request, settings, example):
    made = adapter.model
    ids, mask, images, videos = (e[example : example + 1] for e in request.extras)
    config = generation_class(type(made))(
        **{**QUICK, "alg": "maskgit_plus", "temperature": 0.0, **settings},
        use_cache=False,
        output_history=True,
        return_dict_in_generate=True,
        mask_token_id=made.config.mask_token_id,
        pad_token_id=made.config.pad_token_id,
    )
    logits, start = [], ids.shape[1]

    def note(_step, _x, shifted):
        logits.append(shifted[:, start:].clone())
        return shifted

    pictures = {}
    count = int(images[0].prod(-1).sum())
    pixels = request.pixels[example]
    if images.shape[1]:
        pictures |= {"pixel_values": pixels[:count], "image_grid_thw": images[0]}
    if videos.shape[1]:
        pictures |= {"pixel_values_videos": pixels[count:], "video_grid_thw": videos[0]}
    opened = nullcontext() if is_dimple(type(made)) else open_mask(made)
    with callable_generate(made), opened:
        out = made.diffusion_generate(
            ids,
            generation_config=config,
            attention_mask=mask,
            generation_logits_hook_func=note,
            **pictures,
        )
    first = torch.full_like(out.sequences[:, start:], made.config.mask_token_id)
    canvases = [first, *[h[:, start:] for h in out.history[:-1]]]
    return out.sequences[:, start:], torch.stack(canvases), logits


def check_against_history(forward, settings):
    """Answer, canvases, commits and replayed logits are those of the family's history, bit for
    bit; a step fills int(m (1 - s/t)) of m masks, the last one the rest."""
    t = forward.trajectory
    found = reference(forward.adapter, forward.request, settings)
    answer, canvases, logits = found.tokens, found.canvases, found.logits
    assert torch.equal(t.tokens, answer)
    assert torch.equal(t.states[0], canvases)
    assert len(logits) == t.steps and t.feasible == tuple(range(t.steps))
    for step, expected in enumerate(logits):
        with torch.no_grad():
            got = forward.replay(torch.tensor([0]), torch.tensor([step]))
            state = t.state_at(torch.tensor([0]), torch.tensor([step]))
            plain = forward(forward.request.pixels, *forward.request.extras, *state)
        assert torch.equal(got, expected)
        assert torch.equal(plain, expected)
        new = (t.commit_step == step)[0].nonzero()[:, 0].tolist()
        for p in new:
            sure = float(expected[0, p].double().softmax(-1)[answer[0, p]])
            assert abs(float(t.confidence[0, p]) - sure) < 1e-5
    with torch.enable_grad():
        got = forward.replay(torch.tensor([0]), torch.tensor([0]))
    assert torch.equal(got.detach(), logits[0])
    left, eps = t.tokens.shape[1], 1e-3
    times = [1 + (eps - 1) * i / t.steps for i in range(t.steps + 1)]
    for step in range(t.steps):
        count = int(left * (1 - times[step + 1] / times[step])) if step < t.steps - 1 else left
        assert int((t.commit_step == step).sum()) == count
        left -= count


def check_ramps(made, size):
    """Red and green are ramps over x and y: a token's mean colour is the centre of its box."""
    width, height = size
    x, y = ((np.arange(n) + 0.5) / n * 255 for n in size)
    array = np.stack((*np.meshgrid(x, y), np.zeros((height, width))), axis=-1)
    request = made.prepare([[Image.fromarray(array.round().astype(np.uint8))]], ["what"])
    (grid,) = request.layout.grids
    h, w = grid.shape
    owners = made.pixel_tokens(request)[0]
    values = request.pixels[0].view(-1, 3, 2, 14, 14).double()
    owners = owners.expand_as(request.pixels[0])[:, 0]
    mean, std = (0.48145466, 0.4578275), (0.26862954, 0.26130258)
    for k in range(h * w):
        x0, y0, x1, y1 = grid.box(*divmod(k, w))
        assert -1e-6 <= x0 < x1 <= width + 1e-6 and -1e-6 <= y0 < y1 <= height + 1e-6
        red, green = (float(values[owners == k, c].mean()) * std[c] + mean[c] for c in range(2))
        assert abs(red * width - (x0 + x1) / 2) < 0.02 * width + 1.5
        assert abs(green * height - (y0 + y1) / 2) < 0.02 * height + 1.5


def check_batch(bound):
    """Examples of a batch, padded behind the picture, are what they are alone."""
    pictures = [[tiny.picture(i, (84, 56))] for i in range(2)]
    both = bound(pictures=pictures, prompts=PROMPTS)
    assert not bool(both.request.extras[1].all())  # there is padding
    length = both.request.layout.prefix_length + 6
    assert both.trajectory.lengths == (length,) * 4
    for b in range(2):
        alone = bound(pictures=pictures[b : b + 1], prompts=PROMPTS[b : b + 1])
        assert torch.equal(both.trajectory.tokens[b], alone.trajectory.tokens[0])
        for step in range(4):
            with torch.no_grad():
                got = both.replay(torch.tensor([b]), torch.tensor([step]))
                expected = alone.replay(torch.tensor([0]), torch.tensor([step]))
            assert tiny.relative(got, expected) < 1e-4
    with torch.no_grad():
        several = both.replay(torch.tensor([1, 0, 1]), torch.tensor([0, 2, 3]))
        one = both.replay(torch.tensor([0]), torch.tensor([2]))
    assert tiny.relative(several[1:2], one) < 1e-4


def entering(adapter, request):
    """(B, N, D): image tokens as the first block gets them; examples are decoded one by one."""
    with torch.no_grad():
        embeds = adapter.embed(request.pixels, *request.extras).embeds
    return embeds[:, torch.cat([g.positions.flatten() for g in request.layout.grids])]


def cases(make, source, dimple=False, **changes):
    """The default algorithm and one that ranks otherwise; Dimple's, which takes the sure."""

    def case(name, feasible=range(4), **more):
        return AdapterCase(
            f"dream_vl, {name}",
            make,
            reference,
            settings={**QUICK, **more},
            one_token={**dict(max_new_tokens=1, steps=1), **more},
            other_prompt="is this a red circle on the left ?",
            feasible=feasible,
            image_states=entering,
            source=source,
            **changes,
        )

    if dimple:
        sure = dict(alg_p_threshold=0.1, decoding_pipeline="dim")
        # its image processor refuses sides below 28 pixels
        larger = tuple((max(w, 28), max(h, 28)) for w, h in CASE_SIZES if max(w, h) > 20)
        return [replace(case("Dimple", **sure), sizes=larger)]
    return [case("full"), case("full, entropy", alg="entropy")]


def left(made):
    model = made.model
    return (
        [m.training for m in model.modules()],
        [(p.requires_grad, p.grad is None) for p in model.parameters()],
        tiny.hooks(model),
        sorted(vars(model)),
        sorted(vars(model.config)),
        torch.random.get_rng_state().tolist(),
    )
