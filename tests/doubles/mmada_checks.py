"""What tests of MMaDA check on the double and on upstream's code alike."""

import tiny
import torch
from doubles import mmada as double

from captum_dcam.adapters.mmada.compat import callable_model
from captum_dcam.testing import AdapterCase, Reference

QUICK = dict(max_new_tokens=8, block_length=4, steps=4)
SIDE = 64  # pixels: 4 × 4 tokens
TOKENS = (SIDE // 16) ** 2
SIZES = ((64, 64), (300, 200), (200, 300), (640, 480), (100, 30), (17, 40), (9, 5), (1024, 768))


def own_ids(adapter, request):
    """The prompt as the facts describe it, put together by hand."""
    codes = adapter.processor[1].get_code(request.pixels) + double.TEXT
    n = len(codes)
    return torch.cat(
        (
            torch.tensor([double.MARKS[:2]]).expand(n, 2),
            codes,
            torch.tensor([double.MARKS[2:]]).expand(n, 1),
            request.extras[0],
        ),
        dim=1,
    )


def reference(adapter, request, settings):
    """The model's own ``mmu_generate``: answer, canvases and logits of every step."""
    ids = own_ids(adapter, request)
    start, canvases, logits = ids.shape[1], [], []

    def hear(_module, args, output):
        canvases.append(args[0][: len(ids), start:].clone())
        found = output.logits[:, start:].clone()
        if len(found) > len(ids):
            seeing, blind = found.chunk(2)
            found = blind + (settings["cfg_scale"] + 1) * (seeing - blind)
        logits.append(found)

    def keep(_module, args):
        return (args[0].clone(),)  # the decoder changes its own in place

    handles = [
        adapter.model.register_forward_pre_hook(keep),
        adapter.model.register_forward_hook(hear),
    ]
    try:
        with callable_model(adapter.model):
            answer = adapter.model.mmu_generate(ids, **settings)
    finally:
        for handle in handles:
            handle.remove()
    return Reference(answer[:, start:], logits, torch.stack(canvases))


def before_quantisation(adapter, request):
    """(B, n, 13): what the VQ encoder says of every token, before its signs are taken."""
    with torch.no_grad():
        return adapter.processor[1].encoder(request.pixels).flatten(2).mT


def cases(make, source, **changes):
    """Plain and guided."""

    def case(name, **more):
        return AdapterCase(
            f"mmada, {name}",
            make,
            reference,
            settings={**QUICK, **more},
            one_token={**dict(max_new_tokens=1, block_length=1, steps=1), **more},
            other_prompt="is this red ?",  # as many tokens: see MmadaAdapter.prepare
            picture_size=(80, 60),
            feasible=range(4),
            image_states=before_quantisation,
            source=source,
            **changes,
        )

    return [case("full"), case("full, guided", cfg_scale=1.5)]


def left(made):
    model, vq = made.model, made.processor[1]
    return (
        [m.training for m in model.modules()],
        [(p.requires_grad, p.grad is None) for m in (model, vq) for p in m.parameters()],
        tiny.hooks(model) + tiny.hooks(vq),
        sorted(vars(model)),
        sorted(vars(model.config)),
        torch.random.get_rng_state().tolist(),
    )
