"""A tiny embedded model with random weights, and what tests do with it again and again."""

import functools
from dataclasses import replace

import numpy as np
import torch
from copying import copied
from PIL import Image

import captum_dcam
from captum_dcam.mini.causal import MiniForCausalLM
from captum_dcam.mini.configuration import MiniConfig
from captum_dcam.mini.loading import WEIGHTS, MiniImageProcessor, MiniProcessor, tokenizer_of
from captum_dcam.mini.modeling import MiniForMaskedDiffusion
from captum_dcam.model.forward import DenoisingForward

CACHES = ("prefix", "none")
PROMPT = "describe the image ."
SIDE = 8  # image tokens a row


@functools.cache
def tokenizer():
    """The embedded model's own."""
    return tokenizer_of(WEIGHTS)


SHAPE = dict(
    hidden_size=48,
    num_attention_heads=3,
    num_hidden_layers=4,
    intermediate_size=64,
    vision_layers=1,
    vision_intermediate_size=64,
    stem_channels=(8, 8, 16),
)


def config(**changes):
    return MiniConfig(vocab_size=len(tokenizer()), **{**SHAPE, "image_size": 64, **changes})


@copied
def model(seed=0, dtype=torch.float32, kind=MiniForMaskedDiffusion, **changes):
    """Random weights; keys are enlarged so that attention is far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = kind(kind.config_class.from_dict(config(**changes).to_dict()))
    with torch.no_grad():
        for block in made.layers:
            block.attention.k_proj.weight.mul_(4)
    return made.to(dtype).eval()


def processor():
    return MiniProcessor(MiniImageProcessor(SIDE * 8), tokenizer(), SIDE)


def adapter(cache, seed=0, dtype=torch.float32):
    return captum_dcam.wrap(model(seed, dtype), processor(), cache=cache)


def twin(cache, dtype=torch.float32, seed=0):
    """The autoregressive twin of :func:`adapter`: the same weights."""
    return captum_dcam.wrap(model(seed, dtype, MiniForCausalLM), processor(), cache=cache)


def picture(seed=0, size=(80, 60), mode="RGB"):
    g = np.random.default_rng(seed)
    coarse = Image.fromarray(g.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def bound(
    cache, *, layer=1, seed=0, dtype=torch.float32, batch=1, prompts=None, keep=True, images=1,
    anew=False, **g,
):  # fmt: skip
    """A forward with a bound generation of ``batch`` different pictures.

    What is generated is generated once, and every caller has a copy of it and of the model;
    ``anew``: nothing is shared with anybody.
    """
    asked = tuple(prompts or [PROMPT] * batch)
    settings = tuple(sorted({"gen_length": 8, **g}.items()))
    make = _bound.__wrapped__ if anew or "generator" in g else _bound
    first = make(cache, layer, seed, dtype, batch, asked, keep, images, settings)
    if make is not _bound:
        return first
    made = adapter(cache, seed, dtype)
    forward = DenoisingForward(made, layer)
    r, t = first.request, first.trajectory
    request = replace(r, pixels=r.pixels.clone(), extras=tuple(e.clone() for e in r.extras))
    made_once = {n: v for n, v in t.kept.items() if n != "embedded"}
    trajectory = replace(
        t,
        tokens=t.tokens.clone(),
        states=tuple(one.clone() for one in t.states),
        final_state=tuple(one.clone() for one in t.final_state),
        commit_step=t.commit_step.clone(),
        confidence=t.confidence.clone(),
        settings=dict(t.settings),
        kept=made_once,
    )
    forward.bind(request, trajectory)
    made_once["stamp"] = forward._stamp()
    return forward


@functools.cache
def _bound(cache, layer, seed, dtype, batch, prompts, keep, images, settings):
    made = adapter(cache, seed, dtype)
    forward = DenoisingForward(made, layer)
    pictures = [[picture(10 * b + i) for i in range(images)] for b in range(batch)]
    request = made.prepare(pictures, list(prompts))
    forward.generate(request, keep=keep, **dict(settings))
    return forward


def pair(forward, position, example=0):
    """Captum's target: a position and the token that was written there."""
    return position, int(forward.trajectory.tokens[example, position])


def pairs(forward, position):
    return [pair(forward, position, b) for b in range(forward.request.batch)]


def hooks(module):
    """Everything that hangs on a model: hooks of all kinds, and replaced forward functions."""
    found = []
    for name, part in module.named_modules():
        for kind in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        ):
            found += [(name, kind)] * len(getattr(part, kind))
        if "forward" in vars(part):
            found.append((name, "forward"))
    return found


def relative(found, expected):
    """Largest difference over the largest expected value."""
    found, expected = found.double(), expected.double()
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))
