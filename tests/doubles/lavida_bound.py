"""The tiny stand-in for LaViDa, bound to pictures, and how its own generate ran."""

import contextlib

import tiny
import torch
from doubles import lavida as double

import captum_dcam
from captum_dcam.denoising import DenoisingForward

VARIANTS = ("llada", "dream")
PROMPT = "what is this ?"


def adapter(variant, regime="prefix", seed=0, dtype=torch.float32, **changes):
    own = {k: changes.pop(k) for k in ("system", "single") if k in changes}
    tile = changes.get("tile", 104)
    made = double.model(variant, seed, dtype, **changes)
    return captum_dcam.wrap(made, double.processor(tile), regime=regime, **{"system": None, **own})


def bound(
    variant,
    regime="prefix",
    *,
    layer=1,
    dtype=torch.float32,
    size=(160, 120),
    keep=True,
    generator=None,
    changes=None,
    prompt=PROMPT,
    **settings,
):
    made = adapter(variant, regime, dtype=dtype, **(changes or {}))
    forward = DenoisingForward(made, layer)
    request = made.prepare([[tiny.picture(1, size)]], [prompt])
    if "max_new_tokens" not in settings:
        settings.setdefault("gen_length", 8)
    forward.generate(request, keep=keep, generator=generator, **settings)
    return forward


@contextlib.contextmanager
def as_drawn(generator):
    """The global generators as an adapter sets them for code that draws from them."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def arguments(forward):
    """What the model's own generate is called with for the bound request."""
    ids, sizes = forward.request.extras
    tile = forward.model.get_vision_tower().image_size
    views = forward.request.pixels[0]
    assert views.shape[-1] == tile
    wh = [tuple(s) for s in sizes[0].tolist()]
    return {"inputs": ids, "images": [views], "image_sizes": wh}


def own(forward, **settings):
    """Canvases (before every step, then the answer) and the logits of every run of the model."""
    model, cached = forward.model, forward.adapter.regime == "prefix"
    seen = []

    def note(_module, _args, output):
        seen.append((output if isinstance(output, torch.Tensor) else output.logits)[0].clone())

    dream = forward.adapter.variant == "dream"
    handle = (model.lm_head if dream else model.model).register_forward_hook(note)
    if dream:
        given = {"output_history": True, "temperature": 0.0, "top_k": 50}
    else:
        given = {"verbose": True, "mask_id": double.MASK}
    frozen = [p for p in model.parameters() if p.requires_grad]
    for (
        p
    ) in frozen:  # convolutions choose other kernels, with other rounding, for trainable weights
        p.requires_grad_(False)
    try:
        out = model.generate(**arguments(forward), prefix_lm=cached, **{**given, **settings})
    finally:
        handle.remove()
        for p in frozen:
            p.requires_grad_(True)
    history = out.history if dream else out[1]
    length = forward.trajectory.tokens.shape[1]
    history = [h[0, -length:] for h in history]
    first = torch.full((length,), double.MASK)
    if dream and cached:
        first[0] = seen[0][-1].argmax()
    return [first, *history], seen


def expected_logits(forward, seen):
    """Logits (T, V) of every step by canvas position, from the runs of the model's own generate."""
    trajectory = forward.trajectory
    length, dream = trajectory.tokens.shape[1], forward.adapter.variant == "dream"
    cached = forward.adapter.regime == "prefix"
    steps = seen[1:] if cached else seen
    if not dream:
        return [s[-length:] for s in steps]
    if cached:
        return [torch.cat((seen[0][-1:], s[:-1])) for s in steps]
    return [s[-length - 1 : -1] for s in steps]
