"""The tiny stand-in for LaViDa, bound to pictures, and how its own generate ran."""

import contextlib

import tiny
import torch
from doubles import lavida as double

import captum_dcam
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.testing import Reference

VARIANTS = ("llada", "dream")
PROMPT = "what is this ?"
#: settings of the adapter, and of the model's own generate
LLADA = (
    ({}, {"max_new_tokens": 8, "block_length": 8}),
    ({"steps": 4}, {"max_new_tokens": 8, "block_length": 8, "step_per_block": 4}),
    ({"max_new_tokens": 6}, {"max_new_tokens": 6, "block_length": 6}),
    (
        {"gen_length": 12, "block_length": 4, "step_ratio": 0.5},
        {"max_new_tokens": 12, "block_length": 4, "step_ratio": 0.5},
    ),
    (
        {"schedule": "shift", "step_ratio": 0.5},
        {"max_new_tokens": 8, "block_length": 8, "schedule": "shift", "step_ratio": 0.5},
    ),
    (
        {"gen_length": 16, "schedule": "shift", "shift": 0.33, "step_ratio": 0.5},
        {
            "max_new_tokens": 16,
            "block_length": 16,
            "schedule": "shift",
            "schedule_kwargs": {"shift": 0.33},
            "step_ratio": 0.5,
        },
    ),
    *(
        (
            {"gen_length": 12, "schedule": s, "steps": 5},
            {"max_new_tokens": 12, "block_length": 12, "schedule": s, "step_per_block": 5},
        )
        for s in ("cosine", "logit_normal", "linear")
    ),
    ({"remasking": "margin"}, {"max_new_tokens": 8, "block_length": 8, "remasking": "margin"}),
    ({"remasking": "entropy"}, {"max_new_tokens": 8, "block_length": 8, "remasking": "entrophy"}),
)
DREAM = (
    ({}, {"max_new_tokens": 8, "steps": 8}),
    ({"steps": 4}, {"max_new_tokens": 8, "steps": 4}),
    ({"step_ratio": 0.5}, {"max_new_tokens": 8, "step_ratio": 0.5}),
    (
        {"gen_length": 9, "schedule": "shift", "steps": 4},
        {"max_new_tokens": 9, "steps": 4, "schedule": "shift"},
    ),
    (
        {"gen_length": 9, "schedule": "shift", "shift": 0.33, "step_ratio": 0.5},
        {
            "max_new_tokens": 9,
            "schedule": "shift",
            "schedule_kwargs": {"shift": 0.33},
            "step_ratio": 0.5,
        },
    ),
    (
        {"alg": "topk_margin", "top_p": None},
        {"max_new_tokens": 8, "alg": "topk_margin", "top_p": None},
    ),
    ({"alg": "maskgit_plus"}, {"max_new_tokens": 8, "alg": "maskgit_plus"}),
)
GREEDY = [("llada", *one) for one in LLADA] + [("dream", *one) for one in DREAM]
SAMPLED = (
    ("llada", {"temperature": 0.7}, {"temperature": 0.7, "block_length": 8}),
    ("llada", {"remasking": "random"}, {"remasking": "random", "block_length": 8}),
    ("dream", {"temperature": 0.7}, {"temperature": 0.7}),
    ("dream", {"alg": "origin", "steps": 4}, {"alg": "origin", "steps": 4}),
    ("dream", {"alg_temp": 0.5}, {"alg_temp": 0.5}),
)


def adapter(variant, cache="prefix", seed=0, dtype=torch.float32, **changes):
    own = {k: changes.pop(k) for k in ("system", "single") if k in changes}
    tile = changes.get("tile", 104)
    made = double.model(variant, seed, dtype, **changes)
    return captum_dcam.wrap(made, double.processor(tile), cache=cache, **{"system": None, **own})


def bound(
    variant,
    cache="prefix",
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
    made = adapter(variant, cache, dtype=dtype, **(changes or {}))
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


def arguments(adapter, request):
    """What the model's own generate is called with for a request: its packing, spelt out."""
    ids, sizes = request.extras
    views, wh = request.pixels[0], [tuple(s) for s in sizes[0].tolist()]
    if len(views) > len(wh):
        images = [views]  # one picture, with tiles
    else:
        images = list(views) if adapter._packing.single == "list" else views
    return {"inputs": ids, "images": images, "image_sizes": wh}


def own(adapter, request, length, **settings):
    """Canvases (before every step, then the answer) and the logits of every run of the model."""
    model, cached, dream = adapter.model, adapter.cache == "prefix", adapter.variant == "dream"
    seen = []

    def note(_module, _args, output):
        seen.append((output if isinstance(output, torch.Tensor) else output.logits)[0].clone())

    if dream:
        given = {"output_history": True, "temperature": 0.0, "top_k": 50}
    else:
        given = {"verbose": True, "mask_id": double.MASK}
    frozen = [p for p in model.parameters() if p.requires_grad]
    for p in frozen:  # for trainable weights convolutions choose other kernels
        p.requires_grad_(False)
    handle = (model.lm_head if dream else model.model).register_forward_hook(note)
    try:
        settings = {"max_new_tokens": length, "prefix_lm": cached, **given, **settings}
        out = model.generate(**arguments(adapter, request), **settings)
    finally:
        handle.remove()
        for p in frozen:
            p.requires_grad_(True)
    history = [h[0, -length:] for h in (out.history if dream else out[1])]
    first = torch.full((length,), double.MASK, device=request.pixels.device)
    if dream and cached:
        first[0] = seen[0][-1].argmax()
    return [first, *history], seen


def expected_logits(adapter, length, seen):
    """Logits (T, V) of every step by canvas position, from the runs of the model's own generate."""
    dream, cached = adapter.variant == "dream", adapter.cache == "prefix"
    steps = seen[1:] if cached else seen
    if not dream:
        return [s[-length:] for s in steps]
    if cached:
        return [torch.cat((seen[0][-1:], s[:-1])) for s in steps]
    return [s[-length - 1 : -1] for s in steps]


def reference(adapter, request, settings):
    """For the conformance checks; settings are the adapter's: gen_length, steps, block_length."""
    length, steps = settings["gen_length"], settings["steps"]
    given = {"steps": steps}
    if adapter.variant == "llada":
        block = settings.get("block_length", length)
        given = {"block_length": block, "step_per_block": steps * block // length}
    canvases, seen = own(adapter, request, length, **given)
    before = torch.stack(canvases[:-1])[:, None]
    commits = ((before == double.MASK).sum(0) - 1).clamp_min(0)
    logits = [s[None] for s in expected_logits(adapter, length, seen)]
    return Reference(canvases[-1][None], logits, before, commits)
