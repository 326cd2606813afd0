"""TAM, ARC and the logit lens again, token after token, from the logits of the whole sequence."""

import functools
import math

import awkward
import numpy as np
import torch
from refine import loops

from captum_dcam.model.sequence import hidden_states


@functools.cache
def logits_of(family, cache, example, step):
    """Logits (L, V) of every row of the sequence in a state, and the forward."""
    forward = awkward.alone(family, cache, example)
    with torch.no_grad():
        hidden, _ = hidden_states(forward, -1, step)
        return forward.adapter.unembed(hidden).double()


class Loops:
    """What an example's own sequence says, with every place counted by hand."""

    def __init__(self, family, cache, example, score):
        self.forward = awkward.alone(family, cache, example)
        self.logits = functools.partial(logits_of, family, cache, example)
        trajectory, layout = self.forward.trajectory, self.forward.request.layout
        self.answer = trajectory.tokens[0].tolist()
        self.commit = trajectory.commit_step[0].tolist()
        last = {"final": trajectory.steps - 1, "teacher": trajectory.steps}
        self.steps = self.commit if score == "commit" else [last[score]] * len(self.answer)
        self.first = 0 if score == "commit" else self.steps[0]  # where prompt tokens are read
        self.image = torch.cat([g.positions.flatten() for g in layout.grids])
        self.shapes = layout.shapes
        places, ids = self.forward.adapter.prompt_tokens(self.forward.request)
        self.prompt, self.prompt_ids = places.tolist(), ids.tolist()
        start = layout.prefix_length - (family in awkward.SHIFTED)
        self.rows = [*self.prompt, *(start + q for q in range(len(self.answer)))]

    def context(self, position, order):
        """(text token, id, step) of the question and of what was written before, but no stops."""
        rank = self.commit if order == "commit" else range(len(self.answer))
        found = [(k, self.prompt_ids[k], self.first) for k in awkward.question(self.forward)]
        return found + [
            (len(self.prompt) + q, token, self.steps[q])
            for q, token in enumerate(self.answer)
            if rank[q] < rank[position] and token not in self.forward.adapter.stop_ids
        ]

    def grids(self, values):
        parts = torch.as_tensor(values).split([h * w for h, w in self.shapes])
        return [p.view(shape) for p, shape in zip(parts, self.shapes, strict=True)]

    def text(self, step, token):
        return self.logits(step)[self.rows, token]

    def lens(self, step, token):
        return self.logits(step)[self.image, token]

    def without(self, own, maps, weights):
        """Eq. 4 and 5 of TAM, or 8 and 9 of ARC: the positive part without the context."""
        if not sum(weights):
            return own.relu()
        mean = sum(w * m for w, m in zip(weights, maps, strict=True)) / sum(weights)
        scale = np.linalg.lstsq(mean[:, None].numpy(), own.numpy(), rcond=None)[0][0]
        return (own - scale * mean).relu()

    def tam(self, pairs, *, relevance="activation", order="commit", eci=True, filter=3, rows=None):
        """Maps, one per grid, and text of a word that is given as (position, id)."""
        images, shown = [], []
        for position, token in pairs:
            step = self.steps[position]
            own, text = self.lens(step, token).relu(), self.text(step, token).relu()
            context = self.context(position, order)
            known = torch.full((len(self.rows),), math.nan, dtype=torch.float64)
            for k, _, _ in context:
                known[k] = text[k]
            if eci:
                weight = {"activation": text, "mean": torch.ones_like(text)}.get(relevance)
                weight = rows(position) if weight is None else weight
                weights = [float(weight[k]) * (i != token) for k, i, _ in context]
                maps = [self.lens(s, i).relu() for _, i, s in context]
                own = self.without(own, maps, weights)
            images.append(own)
            shown.append(known)
        text = torch.stack(shown)
        text = text.nansum(0).masked_fill(text.isnan().all(0), math.nan)
        text[[len(self.prompt) + p for p, _ in pairs]] = math.nan
        image = sum(images)
        seen = torch.cat((image, text[~text.isnan()]))
        low, span = seen.min(), seen.max() - seen.min()
        maps = [((g - low) / span).numpy() for g in self.grids(image)]
        return [loops.rank_gaussian(m, filter) if filter else m for m in maps], (text - low) / span

    def arc(self, pairs, *, k=50, p=0.9, order="commit", filter=3):
        """Maps of ARC at the image's own size."""
        total = 0
        for position, token in pairs:
            here = self.logits(self.steps[position])
            ranks = [here[row].argsort(descending=True, stable=True)[:k] for row in self.rows]
            own = ranks[len(self.prompt) + position].tolist()
            image = here[self.image]
            maps, weights = [image[:, int(image.sum(0).argmin())]], [1.0]
            for n, i, step in self.context(position, order):
                maps.append(self.lens(step, i))
                weights.append(1 - overlap(ranks[n].tolist(), own, p))
            total = total + self.without(image[:, token], maps, weights)
        maps = [m.numpy() for m in self.grids(total)]
        return [loops.rank_gaussian(m, filter) if filter else m for m in maps]


def overlap(a, b, p):
    """Sum over depths of p^(d-1) times the share of ids in both prefixes, weights made to sum 1."""
    total = norm = 0.0
    for d in range(1, len(a) + 1):
        total += p ** (d - 1) * len(set(a[:d]) & set(b[:d])) / d
        norm += p ** (d - 1)
    return total / norm
