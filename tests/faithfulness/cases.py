"""Bound forwards, words, maps and a cheap explanation that tests of this folder share."""

import tiny
import torch

from captum_dcam.methods import AttributionTask, method
from captum_dcam.model.words import Target


def word(forward, *positions):
    tokens = forward.trajectory.tokens[0].tolist()
    return Target("word", positions, tuple(tokens[p] for p in positions))


def words(forward):
    """Two words, the second of two tokens."""
    return (word(forward, 0), word(forward, 2, 5))


def maps(forward, count=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, *shape, generator=g) for shape in forward.request.layout.shapes)


def explain(forward, targets):
    return method("diffusion_cam_base").attribute(AttributionTask(forward, tuple(targets))).maps


def saliency(forward, targets):
    """Gradient through the pixels, at every token's own step, by hand."""
    task = AttributionTask(forward, tuple(targets))
    owners = forward.adapter.pixel_tokens(forward.request)
    rows = []
    for target in targets:
        row = torch.zeros(int(owners.max()) + 1, dtype=torch.float64)
        for position, token in zip(target.positions, target.token_ids, strict=True):
            pixels = task.pixels.detach().clone().requires_grad_()
            logits = forward(pixels, *task.arguments(position))
            (grad,) = torch.autograd.grad(logits[0, position, token], pixels)
            row.index_add_(0, owners.flatten(), grad.double().flatten())
        rows.append(row)
    sizes = [h * w for h, w in task.shapes]
    parts = torch.stack(rows).split(sizes, dim=1)
    return tuple(p.unflatten(1, s) for p, s in zip(parts, task.shapes, strict=True))


def state(forward):
    """What must be as before: hooks, modes, weights, gradients, pixels and the global state."""
    model = forward.model
    return (
        tiny.hooks(forward),
        {n: m.training for n, m in model.named_modules()},
        {n: (p.requires_grad, p.grad is None) for n, p in model.named_parameters()},
        {n: p.detach().clone() for n, p in model.state_dict().items()},
        forward.tap.edit,
        (forward.request.pixels.clone(), forward.request.pixels.requires_grad),
        torch.random.get_rng_state(),
        sorted(forward.trajectory.kept),
    )


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(v, second[k]) for k, v in first.items())
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second
