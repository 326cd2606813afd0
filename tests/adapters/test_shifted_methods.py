"""Methods on families that predict p from p - 1, and on the tiny model: numbers from a plain pass.

Autoregressive ones and LaViDa-Dream, with a cached prefix and without, every example of a batch,
two grids, words of two tokens, ends in the middle.
"""

import math

import awkward
import pytest
import tiny
import torch
from doubles.lavida import turned
from methods.test_methods_msea_arc import rbo_by_definition
from methods.test_methods_tam import causal_by_loops
from plain import plain

from captum_dcam.methods import AttributionTask, method
from captum_dcam.methods.text_relevance import text_relevance
from captum_dcam.model.forward import single
from captum_dcam.model.words import resolve

TOLERANCE = {"mini": 1e-5, "lavida": 1e-5, "causal": 1e-4}
examples = pytest.mark.parametrize(("family", "cache", "example"), awkward.batches())
#: in a causal model the whole answer tells a token no more than what is before it
scores = pytest.mark.parametrize(
    ("family", "cache", "example", "score"),
    [
        (*b, s)
        for b in awkward.batches()
        for s in ("commit", "teacher")
        if s == "commit" or b[0] != "causal"
    ],
)
shifted = pytest.mark.parametrize(
    ("family", "cache", "example"), [b for b in awkward.batches() if b[0] in awkward.SHIFTED]
)


class Problem:
    """A word of one token in the middle, one of two tokens, and the last word of an answer."""

    def __init__(self, family, cache, example, score):
        self.forward = single(awkward.bound(family, cache, dtype=torch.float64), example)
        self.key, self.near = (family, cache, example), TOLERANCE[family]
        self.tokens = self.forward.trajectory.tokens[0].tolist()
        words = resolve(self.forward.adapter, self.tokens, None)
        two = next(w for w in words if len(w.positions) == 2)
        self.targets = (words[1], two, words[-1])
        self.task = AttributionTask(self.forward, self.targets, score)
        self.score = score
        self.prompt = self.forward.adapter.prompt_tokens(self.forward.request)[1].tolist()

    def state(self, position):
        """The state in which the score reads a position."""
        t = self.forward.trajectory
        at = t.steps if self.score == "teacher" else int(t.commit_step[0, position])
        return plain(*self.key, at)

    def pairs(self, target):
        return list(zip(target.positions, target.token_ids, strict=True))

    def context(self, position):
        """(token id, state, number among the text tokens) of what stood before a position."""
        t, stops = self.forward.trajectory, self.forward.adapter.stop_ids
        first = plain(*self.key, 0 if self.score == "commit" else t.steps)
        out = [(self.prompt[k], first, k) for k in awkward.question(self.forward)]
        commit = t.commit_step[0].tolist()
        for p, token in enumerate(self.tokens):
            if commit[p] < commit[position] and token not in stops:
                out.append((token, self.state(p), len(self.prompt) + p))
        return out

    def agree(self, found, expected):
        """Maps (h, w) of both grids with values (N,) of all image tokens."""
        own = torch.cat([m.flatten() for m in found]).double()
        assert own.abs().max() > 0
        assert tiny.relative(own, torch.as_tensor(expected).double()) < self.near


@scores
def test_the_lens_is_the_heads_logits(family, cache, example, score):
    problem = Problem(family, cache, example, score)
    found = method("logit_lens").attribute(problem.task)
    for n, target in enumerate(problem.targets):
        rows = [(problem.state(p).logits[:, t], problem.state(p)) for p, t in problem.pairs(target)]
        problem.agree([m[n] for m in found.maps], sum(r[s.places] for r, s in rows).detach())
        text = sum(r[s.text] for r, s in rows).detach()
        assert tiny.relative(found.text[n], text) < problem.near


def tam(problem, target):
    """Eq. 1, 2, 4 and 5: image (N,) and text (K,) of a word before Eq. 3."""
    count = len(problem.prompt) + len(problem.tokens)
    image, text = 0, torch.full((count,), math.nan).double()
    for position, token in problem.pairs(target):
        state = problem.state(position)
        own = state.logits[:, token].detach().clamp_min(0)
        maps, weights, same = [], [], []
        for i, at, k in problem.context(position):
            maps.append(at.logits[at.places, i].detach().clamp_min(0).tolist())
            weights.append(float(own[state.text[k]]))
            same.append(i == token)
            before = 0 if text[k].isnan() else text[k]
            text[k] = before + own[state.text[k]]
        refined, _ = causal_by_loops(own[state.places].tolist(), maps, weights, same)
        image = image + torch.tensor(refined)
    for position in target.positions:
        text[len(problem.prompt) + position] = math.nan
    return image, text


@scores
def test_tam_is_its_equations(family, cache, example, score):
    problem = Problem(family, cache, example, score)
    raw = text_relevance(problem.forward, problem.targets, score=score, by="activation")
    found = method("tam", filter=0).attribute(problem.task)
    for n, target in enumerate(problem.targets):
        image, text = tam(problem, target)
        seen = ~text.isnan()
        problem.agree([m[n] for m in raw.maps], image)
        assert torch.equal(raw.values[n].isnan(), ~seen)
        assert tiny.relative(raw.values[n][seen], text[seen]) < problem.near
        both = torch.cat((image, text[seen]))  # Eq. 3
        low, span = both.min(), both.max() - both.min()
        problem.agree([m[n] for m in found.maps], (image - low) / span)
        assert torch.allclose(found.text[n][seen].double(), (text[seen] - low) / span, atol=1e-4)


@examples
def test_arc_is_its_equations(family, cache, example, score="commit", k=6, p=0.8):
    problem = Problem(family, cache, example, score)
    found = method("arc", filter=0, k=k, p=p).attribute(problem.task)
    for n, target in enumerate(problem.targets):
        total = 0
        for position, token in problem.pairs(target):
            state = problem.state(position)
            logits = state.logits.detach()
            ranked = logits.topk(k).indices.tolist()
            least = int(logits[state.places].sum(0).argmin())
            maps, weights = [logits[state.places, least].tolist()], [1.0]
            for i, at, number in problem.context(position):
                maps.append(at.logits[at.places, i].tolist())
                own, other = ranked[state.rows[position]], ranked[state.text[number]]
                weights.append(1 - rbo_by_definition(other, own, p))
            image = logits[state.places, token].tolist()
            total = total + torch.tensor(
                causal_by_loops(image, maps, weights, [False] * len(maps))[0]
            )
        problem.agree([m[n] for m in found.maps], total)


@scores
def test_the_relevance_of_text_is_gradient_times_activation(family, cache, example, score):
    problem = Problem(family, cache, example, score)
    found = text_relevance(problem.forward, problem.targets, score=score)
    for n, target in enumerate(problem.targets):
        values = 0
        for pair in problem.pairs(target):
            state = problem.state(pair[0])
            values = values + (state.gradient([pair]) * state.hidden()).sum(-1)
        problem.agree([m[n] for m in found.maps], values[state.places])
        at = [*state.prompt, *state.answer]
        own = [len(problem.prompt) + p for p in target.positions]
        template = set(range(len(problem.prompt))) - set(awkward.question(problem.forward))
        assert found.values[n].isnan().nonzero()[:, 0].tolist() == [*sorted(template), *own]
        seen = ~found.values[n].isnan()
        assert tiny.relative(found.values[n][seen], values[at][seen]) < problem.near


def attention_row(problem, position):
    """(L,) weights of the place that predicts a position, averaged over heads and blocks."""
    state, rows = problem.state(position), []
    row, (prefix, *_) = state.rows[position], state.answer
    cut = prefix if problem.key[1] == "prefix" and row < prefix else len(state.logits)
    for block, x in zip(
        problem.forward.adapter.blocks, [state.entry, *state.outputs], strict=False
    ):
        part, normed = block.self_attn, block.input_layernorm(x)
        q, k = (
            turned(project(normed).unflatten(-1, (part.heads, -1)).transpose(1, 2))[0]
            for project in (part.q_proj, part.k_proj)
        )
        scores = (q[:, row, None] * k).sum(-1) / q.shape[-1] ** 0.5
        scores[:, cut:] = -math.inf
        rows.append(scores.softmax(-1).mean(0))
    return torch.stack(rows).mean(0)


@pytest.mark.parametrize("cache", awkward.CACHES)
@pytest.mark.parametrize("score", ("commit", "teacher"))
def test_attention_is_that_of_the_place_that_predicts(cache, score):
    """LaViDa-Dream's, from its queries and keys; autoregressive families have their own test."""
    problem = Problem("lavida", cache, 0, score)
    found = method("attention").attribute(problem.task)
    for n, target in enumerate(problem.targets):
        expected = sum(attention_row(problem, p) for p in target.positions)
        problem.agree([m[n] for m in found.maps], expected[problem.state(0).places].detach())


@shifted
def test_grad_cam_is_plain_autograds(family, cache, example):
    problem = Problem(family, cache, example, "commit")
    found = method("layer_grad_cam").attribute(problem.task)
    for n, target in enumerate(problem.targets):
        total = 0
        for pair in problem.pairs(target):
            state = problem.state(pair[0])
            grids = zip(
                state.grids(state.hidden()), state.grids(state.gradient([pair])), strict=True
            )
            total = total + torch.cat([(f * g.mean((0, 1))).sum(-1).flatten() for f, g in grids])
        problem.agree([m[n] for m in found.maps], total)
