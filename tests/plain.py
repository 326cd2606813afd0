"""What the awkward models compute in one state, in one plain pass: no tap, no replay, no cache.

An independent judge of everything that is read out of a generation: the numbers of a method follow
from :meth:`Plain.hidden` and :attr:`Plain.logits` by its equations.
"""

import functools
from dataclasses import dataclass

import awkward
import torch
from doubles import lavida as lavida_double
from doubles import lavida_bound


@dataclass(frozen=True)
class Plain:
    r"""One state of one example.

    Args:
        entry (Tensor): (1, L, D) what goes into the first block.
        outputs (list of Tensor): (1, L, D) of all blocks, in one graph with the logits.
        logits (Tensor): (L, V) of every place of the sequence.
        images (tuple of Tensor): (h, w) places of every grid's tokens.
        rows (list of int): the place whose logits predict each position of the answer.
        answer (list of int): the place of each position of the answer.
        prompt (list of int): places of the prompt's text.
    """

    entry: torch.Tensor
    outputs: list
    logits: torch.Tensor
    images: tuple
    rows: list
    answer: list
    prompt: list

    @property
    def places(self):
        """(N,) of all image tokens, grid after grid."""
        return torch.cat([at.flatten() for at in self.images])

    @property
    def text(self):
        """Places of the prompt's text, and those that predict the answer."""
        return [*self.prompt, *self.rows]

    def hidden(self, layer=awkward.LAYER):
        """(L, D) output of a block."""
        return self.outputs[layer][0].detach()

    def gradient(self, pairs, layer=awkward.LAYER):
        """(L, D) of the sum of logits of (position, token) pairs at a block's output."""
        total = sum(self.logits[self.rows[p], token] for p, token in pairs)
        (found,) = torch.autograd.grad(total, self.outputs[layer], retain_graph=True)
        return found[0]

    def grids(self, values):
        """Values (L, …) at the grids' places, each (h, w, …)."""
        return [values[at] for at in self.images]


@functools.cache
def plain(family, cache, example, step, dtype=torch.float64):
    """The state of an example before a step; the number of steps stands for the whole answer."""
    forward = awkward.alone(family, cache, example, dtype=dtype)
    trajectory, layout = forward.trajectory, forward.request.layout
    given = trajectory.tokens if step == trajectory.steps else trajectory.states[0][step]
    prefix, count = layout.prefix_length, given.shape[1]
    with torch.enable_grad():
        entry, hidden, logits = PASSES[family](forward.adapter, forward.request, given, cache)
    shift = 1 if family in awkward.SHIFTED else 0
    prompt = forward.adapter.prompt_tokens(forward.request)[0].tolist()
    return Plain(
        entry,
        hidden,
        logits[0],
        tuple(g.positions for g in layout.grids),
        [prefix + p - shift for p in range(count)],
        list(range(prefix, prefix + count)),
        prompt,
    )


def mini(adapter, request, canvas, cache):
    model, prefix = adapter.model, request.layout.prefix_length
    ids = torch.cat((request.extras[0], canvas), 1)
    length = ids.shape[1]
    segments = (prefix, length - prefix) if cache == "prefix" else (length,)
    entry, found = model.embed(ids, request.pixels), []
    hidden = entry
    rope = model.rope(torch.arange(length)[None], hidden.dtype)
    for block in model.layers:
        hidden = block(hidden, rope, segments, (None,) * len(segments))[0]
        found.append(hidden)
    return entry, found, model.unembed(hidden)


def lavida(adapter, request, canvas, cache):
    model, prefix = adapter.model, request.layout.prefix_length
    given = lavida_bound.arguments(adapter, request)
    front = model.prepare_inputs_labels_for_multimodal(
        given["inputs"], None, None, None, None, given["images"], ("image",), given["image_sizes"]
    )[4]
    entry, found = torch.cat((front, model.embed(canvas)), 1), []
    hidden = entry
    held = lavida_double.PrefixCache()
    for block in model.model.layers:
        if cache == "prefix":  # the prefix sees itself, the answer both
            parts = (hidden[:, :prefix], 0), (hidden[:, prefix:], prefix)
            hidden = torch.cat([block(h, held, True, start)[0] for h, start in parts], 1)
        else:
            hidden = block(hidden)[0]
        found.append(hidden)
    return entry, found, model.lm_head(model.model.norm(hidden))


def causal(adapter, request, tokens, _cache):
    """One pass of the family's own forward; what is behind a token does not matter to it."""
    model, (ids, mask, *more) = adapter.model, request.extras
    extras = (torch.cat((ids, tokens), 1), torch.cat((mask, torch.ones_like(tokens)), 1), *more)
    before = model.model.rope_deltas
    out = model(
        **adapter._inputs(request.pixels, extras), use_cache=False, output_hidden_states=True
    )
    model.model.rope_deltas = before
    entry, *found = out.hidden_states  # the last one is normed, nobody reads it
    return entry, found, out.logits


#: the causal family's norms compute in float32 whatever they get
ROUNDING = {"mini": 1e-8, "lavida": 1e-8, "causal": 1e-5}
PASSES = {"mini": mini, "lavida": lavida, "causal": causal}
