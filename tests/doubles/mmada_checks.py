"""What tests of MMaDA check on the double and on upstream's code alike."""

import tiny
import torch
from doubles import mmada as double

from captum_dcam.adapters.mmada import MmadaAdapter
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


class RowsAdapter(MmadaAdapter):
    """Lumina-DiMOO's with the ids of the double."""

    ids, row_marks, first_code = double.IDS, double.ROW_MARKS, double.FIRST_CODE


def rows_ids(adapter, request):
    """Prompts of Lumina-DiMOO as its script puts them together, by hand: the answer's mark last."""
    vq = adapter.processor[1]
    start, newline, end, answer, _ = double.ROW_MARKS
    width, out = request.pixels.shape[-1] // 16, []
    for pixels, text in zip(request.pixels, request.extras[0].tolist(), strict=True):
        codes = vq.quantize(vq.encode(pixels[None]).latents)[2][2] + double.FIRST_CODE
        rows = [[*row, newline] for row in codes.view(-1, width).tolist()]
        image = [start, *(i for row in rows for i in row), end]
        out.append([*text[:-1], *image, text[-1], answer])
    return torch.tensor(out)


def rows_reference(loop):
    """Generations by ``loop``, Lumina-DiMOO's script or ours of the double, one by one."""

    def made(adapter, request, settings):
        found = [one(adapter, ids[None], settings) for ids in rows_ids(adapter, request)]
        tokens, canvases, logits = zip(*found, strict=True)
        steps = [torch.cat(rows) for rows in zip(*logits, strict=True)]
        return Reference(torch.cat(tokens), steps, torch.cat(canvases, 1))

    def one(adapter, ids, settings):
        mask = torch.full((1, settings["gen_length"]), double.MASK)
        start, canvases, logits = ids.shape[1], [], []

        def hear(_module, args, output):
            canvases.append(args[0][:1, start:].clone())
            found = output.logits[:, start:].clone()
            if len(found) == 2:
                found = found[1:] + (settings["cfg_scale"] + 1) * (found[:1] - found[1:])
            logits.append(found)

        given = torch.cat((ids, mask, torch.tensor([double.ROW_MARKS[-1:]])), 1)
        with adapter.model.register_forward_hook(hear), callable_model(adapter.model):
            answer = loop(adapter.model, given, code_start=start, **settings)
        return answer[:, start:], torch.stack(canvases), logits

    return made


def rows_cases(make, loop, source, **changes):
    """Lumina-DiMOO's, plain and guided."""

    def case(name, **more):
        return AdapterCase(
            f"mmada, {name}",
            make,
            rows_reference(loop),
            settings=dict(gen_length=8, block_length=4, steps=4, **more),
            one_token=dict(gen_length=1, block_length=1, steps=1, **more),
            shortest=2,  # the token that closes the answer
            other_prompt="is this red ?",
            picture_size=(80, 60),
            feasible=range(4),
            image_states=rows_before_quantisation,
            source=source,
            **changes,
        )

    return [case("Lumina-DiMOO"), case("Lumina-DiMOO, guided", cfg_scale=1.5)]


def rows_before_quantisation(adapter, request):
    with torch.no_grad():
        return adapter.processor[1].encode(request.pixels).latents.flatten(2).mT


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
