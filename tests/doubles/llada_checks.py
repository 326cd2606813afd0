"""What tests of LLaDA-V and LaViDa-O, of doubles and upstream code, do in the same way."""

from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.words import Target

#: width × height; square, wide, tall, tiny, large
SIZES = (
    (384, 384),
    (500, 375),
    (640, 480),
    (480, 640),
    (1024, 768),
    (1920, 1080),
    (1000, 200),
    (150, 700),
    (40, 30),
    (777, 777),
)


@contextmanager
def heard(module):
    """What a module returns, call after call, copied before the decoder writes into it."""
    seen = []
    handle = module.register_forward_hook(lambda _m, _a, out: seen.append(out.detach().clone()))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def masks_seen(transformer, words, width, mask_id):
    """For every run on embeddings which of the last ``width`` positions held the mask token."""
    seen = []

    def note(_module, _args, kwargs):
        part = kwargs["inputs_embeds"][:1, -width:]
        mask = words(torch.tensor([mask_id]))
        now = torch.zeros(1, width, dtype=torch.bool) if not seen else seen[-1].clone()
        now[:, -part.shape[1] :] = (part == mask).all(-1)
        seen.append(now)

    handle = transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def canvases(seen, tokens, mask_id):
    """(S, 1, T) canvases from what :func:`masks_seen` saw and the answer."""
    return torch.stack([torch.where(m[:, : tokens.shape[1]], mask_id, tokens) for m in seen])


def read_of(forward, position, example=0):
    """The token written at a position as a target, and the step that its commit score reads."""
    token = int(forward.trajectory.tokens[example, position])
    return Target(f"token {position}", (position,), (token,)), forward.trajectory.step_of(
        example, position, "commit"
    )


def against_differences(forward, position, seed=0, eps=1e-5):
    """Largest relative error of the directional derivatives of a token's logit, a grid at a time,
    by central differences at the tap; the gradients must not be zero."""
    target, step = read_of(forward, position)
    (row,) = target_gradients(forward, [target], [0])
    generator = torch.Generator().manual_seed(seed)
    prefix = forward.trajectory.cache == "prefix"
    worst = 0.0
    for index, gradient in enumerate(row.gradients):
        assert gradient.any(), f"grid {index} has no gradient"
        direction = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
        values = []
        for sign in (1, -1):

            def moved(grid, number, s=sign, i=index, d=direction):
                return grid + s * eps * d if number == i else grid

            with torch.no_grad(), forward.edited(moved):
                if prefix:
                    logits = forward.step(
                        forward.prefill(), torch.tensor([0]), torch.tensor([step])
                    )
                else:
                    logits = forward.replay(torch.tensor([0]), torch.tensor([step]))
            values.append(float(logits[0, position, target.token_ids[0]]))
        numeric = (values[0] - values[1]) / (2 * eps)
        parts = gradient * direction  # their sum can be small by chance: no measure of an error
        exact, typical = float(parts.sum()), float(parts.square().sum().sqrt())
        worst = max(worst, abs(numeric - exact) / max(abs(exact), typical))
    return worst


def live_calls(block, head, span, decode):
    r"""Length of the hooked sequence, and whether the call's logits depend on its own image states.

    Args:
        block (nn.Module), head (nn.Module): the hooked block, and what makes the logits.
        span (slice): image tokens in the sequence.
        decode (callable): the family's decoder, with gradients switched on.

    Returns:
        list of (int, bool): one a call of the head.
    """
    out, leaves = [], []

    def open_(_module, _args, output):
        hidden = output[0]
        if hidden.shape[1] < span.stop:
            leaves.append((hidden.shape[1], None))
            return None
        leaf = hidden[:, span].detach().clone().requires_grad_()
        leaves.append((hidden.shape[1], leaf))
        joined = torch.cat((hidden[:, : span.start], leaf, hidden[:, span.stop :]), 1)
        return (joined, *output[1:])

    def read(_module, _args, output):
        logits = getattr(output, "logits", output)
        length, leaf = leaves[-1]
        live = False
        if leaf is not None and logits.requires_grad:
            score = logits[:, -1].max()
            (gradient,) = torch.autograd.grad(score, leaf, retain_graph=True, allow_unused=True)
            live = gradient is not None and bool(gradient.any())
        out.append((length, live))

    handles = [block.register_forward_hook(open_), head.register_forward_hook(read)]
    try:
        with torch.enable_grad():
            decode()
    finally:
        for handle in handles:
            handle.remove()
    return out


def table(name, calls):
    """The calls of one mode as lines, in the manner of the paper's Table 4."""
    lines = [f"{name}: step, length of the hooked sequence, live gradient, feasible"]
    for step, (length, live, holds) in enumerate(calls):
        lines.append(f"  {step:3d} {length:6d}  {live!s:5}  {'yes' if live and holds else 'no'}")
    return "\n".join(lines)


def ramps(size):
    """A picture whose red grows with x and whose green grows with y, both from 0 to 1."""
    width, height = size
    x = (np.arange(width) + 0.5) / width
    y = (np.arange(height) + 0.5) / height
    pixels = np.zeros((height, width, 3))
    pixels[..., 0], pixels[..., 1] = x[None], y[:, None]
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def patch(size, at, share=0.12):
    """A black picture with one white rectangle around the point ``at`` (x, y), as shares."""
    width, height = size
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    half = (max(share * width / 2, 1), max(share * height / 2, 1))
    (x0, x1), (y0, y1) = (
        (int(max(a * n - h, 0)), int(min(a * n + h, n)) + 1)
        for a, n, h in zip(at, size, half, strict=True)
    )
    pixels[y0:y1, x0:x1] = 255
    return Image.fromarray(pixels), ((x0 + min(x1, width)) / 2, (y0 + min(y1, height)) / 2)


def first_channels(embeds, layout):
    """Channels 0 and 1 of the image tokens, a pair of (h, w) a grid."""
    return [(embeds[0, g.positions, 0], embeds[0, g.positions, 1]) for g in layout.grids]
