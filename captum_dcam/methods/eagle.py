r"""EAGLE: which regions alone keep a word, and without which it is lost, found by greedy search.

A black box: no gradient, no activation. The answer is held fixed and every token of a word is read
in the state of its own step, masked. A search is a generator that asks for the objective of sets of
regions, so that the searches of all words go on together and images that several words ask for are
run once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from captum_dcam.errors import BudgetExhaustedError
from captum_dcam.methods.base import (
    Attribution,
    AttributionTask,
    Method,
    check_choices,
    check_counts,
    entered,
)
from captum_dcam.methods.edited import read_removed
from captum_dcam.methods.superpixels import regions_of
from captum_dcam.model.sequence import split_grids

#: asks for the objectives of sets of regions that are kept, (K, n) bool, and is sent them, (K,)
Search = Generator[Tensor, Tensor, None]


@dataclass
class Ranking:
    r"""Regions in the order in which a search took them; it grows while the search runs.

    Attributes:
        count (int): n, regions.
        front, back (list of int): those taken first, best first; those put last, worst first.
        objective (dict): number of regions, from the front of the order, that are kept → the
            objective then.
    """

    count: int
    front: list[int] = field(default_factory=list)
    back: list[int] = field(default_factory=list)
    objective: dict[int, float] = field(default_factory=dict)

    @property
    def order(self) -> list[int]:
        """Regions, best first; those that are not ranked yet are missing."""
        return [*self.front, *reversed(self.back)]

    def kept(self, regions: list[int]) -> Tensor:
        """The set (n,) bool of these regions."""
        found = torch.zeros(self.count, dtype=torch.bool)
        found[regions] = True
        return found

    def heights(self) -> Tensor:
        r"""(n,) float64: from region to region it falls by what the objective changed.

        The k-th of the order has :math:`\sum_{j > k} |F_j - F_{j-1}|`, the last 0. Regions that are
        not ranked yet lie between the two ends.
        """
        heights = [0.0] * (self.count + 1)
        for low, high in pairwise(sorted(self.objective)):
            change = abs(self.objective[high] - self.objective[low])
            for place in range(high):
                heights[place] += change
        first, last = len(self.front), self.count - len(self.back)
        out = torch.full((self.count,), heights[last], dtype=torch.float64)
        places = [*range(1, first + 1), *range(last + 1, self.count + 1)]
        for place, region in zip(places, self.order, strict=True):
            out[region] = heights[place]
        return out


def full_search(ranking: Ranking) -> Search:
    r"""Every region that is left is tried in every round: n (n + 1) / 2 sets.

    The set of all regions, which the last round would try, comes first.
    """
    rest = [*range(ranking.count)]
    ranking.objective[ranking.count] = float((yield ranking.kept(rest)[None])[0])
    while len(rest) > 1:
        found = (yield torch.stack([ranking.kept([*ranking.front, r]) for r in rest])).tolist()
        best = found.index(max(found))
        ranking.front.append(rest.pop(best))
        ranking.objective[len(ranking.front)] = found[best]
    ranking.front += rest


def efficient_search(ranking: Ranking, scope: int = 10, pending: int = 8, every: int = 5) -> Search:
    r"""From both ends, with few candidates.

    A round takes the best of the first ``scope`` regions; every ``every``-th tries all of them and
    sorts them. It also puts last that of the last ``pending`` regions without which the others keep
    most, while there are more than these; in the first round the worst of all.
    """
    rest, number = [*range(ranking.count)], 0
    every_region = ranking.kept(rest)
    ranking.objective[ranking.count] = float((yield every_region[None])[0])
    while len(rest) > 1:
        tried = rest if number % every == 0 else rest[:scope]
        sets = torch.stack([ranking.kept([*ranking.front, r]) for r in tried])
        found = (yield sets).tolist()
        best = found.index(max(found))
        if tried is rest:
            order = sorted(range(len(rest)), key=lambda i: -found[i])
            rest, worst = [rest[i] for i in order], found[order[-1]]
            ranking.front.append(rest.pop(0))
        else:
            ranking.front.append(rest.pop(best))
        ranking.objective[len(ranking.front)] = found[best]
        if number == 0:
            ranking.back.append(rest.pop())
            # without a region is the reverse of with it alone
            ranking.objective[ranking.count - 1] = 2.0 - worst
        elif len(rest) > pending:
            without = every_region & ~ranking.kept(ranking.back)
            found = (
                yield torch.stack([without & ~ranking.kept([r]) for r in rest[-pending:]])
            ).tolist()
            best = found.index(max(found))
            ranking.back.append(rest.pop(len(rest) - pending + best))
            ranking.objective[ranking.count - len(ranking.back)] = found[best]
        number += 1
    ranking.front += rest


#: by the method's setting ``search``
SEARCHES: Mapping[str, Callable[[Ranking], Search]] = {
    "efficient": efficient_search,
    "full": full_search,
}


@entered(
    "eagle",
    "EAGLE",
    "perturbation",
    "Chen et al., CVPR 2026",
    "1412 (64 regions)",
    "pixel tokens",
    "scikit-image",
    expensive=True,
)
class Eagle(Method):
    r"""EAGLE (Chen et al., CVPR 2026, arXiv:2509.22496): regions ranked by a greedy search.

    The image is divided into superpixels; the objective of a set of them is
    :math:`F(S) = p(S) + 1 - p(\bar S)`, with p the mean probability of the word's tokens on the
    image of which only these regions are left. A search adds the region that makes F highest, round
    by round. A region's value falls along the order by the change of F
    (:meth:`Ranking.heights`), as in the authors' pictures, but not stretched to [0, 1].

    Image tokens are removed whole, each with the superpixel that covers most of it, and have the
    image's mean colour then, as in deletion and insertion; the authors mask pixels, with black. A
    word of several tokens is searched for once. A budget that ends inside leaves the regions that
    were ranked so far; the searches of all words end together.

    Args:
        regions (int): superpixels per image, about as many. The authors' number. Default: 64
        search (str): ``full`` tries every region that is left in every round, n (n + 1) passes;
            ``efficient`` (the authors' EfficientMLLMSubModularExplanationVision with its defaults)
            works from both ends with few candidates. Default: ``"efficient"``
        batch_size (int): number of masked images per pass. Default: 8
    """

    regions: int = 64
    search: str = "efficient"
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_counts(self, "regions", "batch_size")
        check_choices(self, search=SEARCHES)

    def attribute(self, task: AttributionTask) -> Attribution:
        regions = regions_of(task.forward.request, self.regions, f"method {self.name!r}")
        count = int(regions.max()) + 1
        rankings = [Ranking(count) for _ in task.targets]
        note = self._run(task, regions, rankings)
        heights = [torch.nn.functional.pad(r.heights(), (0, 1)) for r in rankings]
        values = torch.stack(heights)[:, regions].float() if heights else torch.empty(0)
        maps = [split_grids(row, task.forward) for row in values]
        whole = tuple(map(torch.stack, zip(*maps, strict=True))) if maps else task.empty()
        done = torch.tensor([len(r.order) == count for r in rankings], dtype=torch.bool)
        ranked = min((len(r.order) for r in rankings), default=0)
        if note and ranked:
            note += f": an estimate from {ranked} of {count} regions"
        return Attribution(whole, done, note=note)

    def _run(self, task: AttributionTask, regions: Tensor, rankings: list[Ranking]) -> str:
        """Search for every word until all are done; the reason where a budget ended it."""
        searches = [SEARCHES[self.search](ranking) for ranking in rankings]
        asked = {word: next(search) for word, search in enumerate(searches)}
        while asked:
            try:
                found = self._objectives(task, regions, asked)
            except BudgetExhaustedError as error:
                return str(error)
            asked = {}
            for word, values in found.items():
                try:
                    asked[word] = searches[word].send(values)
                except StopIteration:
                    continue
        return ""

    def _objectives(
        self, task: AttributionTask, regions: Tensor, asked: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        """F (K,) of every word's sets (K, n) of regions that are kept."""
        # first a set's images alone, then those without it
        removed = torch.cat([part for kept in asked.values() for part in (~kept, kept)])
        owners = [w for w, kept in asked.items() for _ in range(2 * len(kept))]
        found = read_removed(
            task.forward,
            removed,
            regions,
            [(row, task.targets[word]) for row, word in enumerate(owners)],
            baseline="mean",
            where="pixels",
            score=task.score,
            chunk=self.batch_size,
            value="probability",
        )
        out, parts = {}, found.split([2 * len(kept) for kept in asked.values()])
        for word, both in zip(asked, parts, strict=True):
            alone, without = both.chunk(2)
            out[word] = alone + 1 - without
        return out
