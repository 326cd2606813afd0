r"""Is the word true? Scores of words, read from the steps of their generation.

A map shows where a word comes from, not whether it is so. On degraded pictures and false premises
the probability at the commit step tells true words from invented ones, and properties of maps do
not (docs/TRUTH.md); entropies of later steps are those of visible words, which nothing trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from captum_dcam.errors import InputError, MethodError
from captum_dcam.methods.edited import pixel_fill, read, with_pixels
from captum_dcam.model.forward import DenoisingForward, holding, single
from captum_dcam.model.tagging import NOUN_TAGS, tag
from captum_dcam.model.words import Target, answer_token_texts, least_sure, words_of
from captum_dcam.results.explanation import Explanation
from captum_dcam.results.scores import WordScores
from captum_dcam.truth.steps import StepRecord

#: tags of what may stand before a noun in its phrase
MODIFIERS = frozenset(("JJ", "JJR", "JJS", "VBN", "VBG"))


def word_scores(
    source: Explanation | DenoisingForward,
    targets: Sequence[Target] | None = None,
    example: int = 0,
) -> WordScores:
    r"""Score words by what the steps of their generation say.

    Costs one replay of the steps, and two prefills with other pictures.

    Args:
        source (Explanation or DenoisingForward): an explanation, whose scores include what its
            maps give (``erased``, ``overlap``) and a calibrator's verdict, where one is fitted; or
            a forward with a bound generation or a given answer.
        targets (sequence of Target, optional): N words, see
            :func:`captum_dcam.model.words.resolve`; of an explanation: its own.
            Default: every word
        example (int, optional): of the forward's batch. Default: 0

    Returns:
        WordScores: of the words, in order.

    Raises:
        InputError: targets beside an explanation.
        NotBoundError: an explanation that was saved without them.

    Examples::

        >>> from captum_dcam.data.scenes import make_scene
        >>> adapter = captum_dcam.load("mini")
        >>> forward = DenoisingForward(adapter)
        >>> request = adapter.prepare([[make_scene(0, 3).image]], ["describe the image ."])
        >>> trajectory = forward.generate(request, gen_length=8)
        >>> found = word_scores(forward)
        >>> found.words[:3], bool((found.probability[:3] > 0.5).all())
        (('a', 'purple', 'ring'), True)
    """
    if isinstance(source, Explanation):
        if targets is not None or example:
            raise InputError(
                "targets beside an explanation, which has its own words: leave them out, or give "
                "its forward"
            )
        if source.trust is None:
            raise InputError("the explanation holds no trust: explain again with this version")
        return source.trust.scores
    return _scores(source, targets, example)


@holding
def _scores(
    forward: DenoisingForward, targets: Sequence[Target] | None, example: int
) -> WordScores:
    one = single(forward, example)
    if targets is None:
        targets = words_of(one.adapter, one.trajectory.tokens[0].tolist())
    return scores_of(StepRecord(one, targets))


def scores_of(record: StepRecord, pictures: bool = True) -> WordScores:
    """The scores of a record's words, without what maps give; the falls with other pictures, which
    cost two prefills, only with ``pictures``."""
    forward, targets = record.forward, record.targets
    trajectory = forward.trajectory
    rows: list[tuple[float, ...]] = []
    rivals: list[int] = []
    for target in targets:
        own = record.commits(target)
        n, step = record.least_sure(target)
        rival, odds = record.rival(n, step)
        rivals.append(rival)
        until = [record.entropy[: s + 1, m].nanmean() for m, s in own]
        rows.append(
            (
                _committed(record, target),
                float(record.logs[step, n].exp()) - odds,
                float(torch.stack([record.entropy[s, m] for m, s in own]).mean()),
                float(torch.stack(until).mean()),
                float(torch.stack([record.entropy[:, m].nanmean() for m, _ in own]).mean()),
                min(_last(record.logs[:, m].exp(), s, trajectory.forced) for m, s in own),
                float(sum(record.flips(m, s) for m, s in own)),
                float(max(s for _, s in own)),
            )
        )
    columns = torch.tensor(rows, dtype=torch.float64).reshape(-1, 8).T
    names = ("probability", "margin", "entropy", "mean_entropy", "all_entropy", "final")
    found: dict[str, Any] = dict(zip(names, columns, strict=False))
    texts = answer_token_texts(forward.adapter, rivals)
    unknown = torch.full((len(targets),), torch.nan, dtype=torch.float64)
    return WordScores(
        words=tuple(t.text for t in targets),
        **found,
        runner_up=tuple(text.strip() for text in texts),
        flips=columns[6].long(),
        commit_step=columns[7].long(),
        grey=picture_falls(record, "mean") if pictures else unknown,
        blurred=picture_falls(record, "blur") if pictures else unknown,
        erased=unknown,
        overlap=unknown,
        position=torch.tensor([t.positions[0] for t in targets], dtype=torch.int64),
        repetition=_repetitions(forward, targets),
        grounded=unknown,
    )


def with_maps(
    scores: WordScores, erased: Tensor, targets: Sequence[Target], maps: Sequence[Tensor]
) -> WordScores:
    r"""Scores with what the words' maps give.

    Args:
        scores (WordScores): of the words.
        erased (Tensor): (N,) falls where what the maps highlight is removed.
        targets (sequence of Target): N words, in any order.
        maps (sequence of Tensor): non-negative, one (N, h, w) per grid.
    """
    return replace(scores, erased=erased.double(), overlap=overlaps(targets, maps))


def overlaps(targets: Sequence[Target], maps: Sequence[Tensor]) -> Tensor:
    """(N,) mean overlap of each word's map with those of the other words of its phrase."""
    flat = torch.cat([m.detach().cpu().double().flatten(1) for m in maps], dim=1)
    peak = flat.amax(1, keepdim=True)
    flat = flat / peak.masked_fill(peak == 0, 1)
    out = torch.full((len(targets),), torch.nan, dtype=torch.float64)
    for phrase in phrases(targets):
        for n in phrase:
            others = flat[[m for m in phrase if m != n]]
            if len(others):
                both = torch.minimum(others, flat[n]).sum(1)
                either = torch.maximum(others, flat[n]).sum(1)
                out[n] = (both / either.masked_fill(either == 0, 1)).mean()
    return out


def phrases(targets: Sequence[Target]) -> list[list[int]]:
    """Numbers of words that make a phrase: a noun, and what stands right before it and belongs to
    it. English alone, as the tagger is."""
    order = sorted(range(len(targets)), key=lambda n: targets[n].positions)
    tags = tag([targets[n].text for n in order])
    found: list[list[int]] = []
    open_ = False
    for place, (n, own) in enumerate(zip(order, tags, strict=True)):
        before = targets[order[place - 1]].positions[-1] if place else -2
        if not (open_ and targets[n].positions[0] == before + 1):
            found.append([])
        found[-1].append(n)
        more = tags[place + 1] if place + 1 < len(tags) else ""
        open_ = own in MODIFIERS or (own in NOUN_TAGS and more in NOUN_TAGS)
    return [phrase for phrase in found if len(phrase) > 1]


def _committed(record: StepRecord, target: Target) -> float:
    """Probability of a word's least sure token when it was committed: as the decoder reckoned it;
    of tokens that are not the answer's, as the logits have it."""
    trajectory = record.forward.trajectory
    at = list(target.positions)
    if trajectory.tokens[0, at].tolist() == list(target.token_ids):
        return least_sure(trajectory.confidence[0].tolist(), target)
    return min(float(record.logs[s, n].exp()) for n, s in record.commits(target))


def _last(odds: Tensor, commit: int, forced: bool) -> float:
    """A token's probability at the last step that computes it; NaN of a given answer."""
    known = odds[~odds.isnan()]
    return float("nan") if forced or not len(known) else float(known[-1])


def picture_falls(record: StepRecord, baseline: str) -> Tensor:
    """(N,) how far the words' log-probabilities fall where all of the picture is replaced; NaN in
    families whose pixels cannot be edited."""
    forward, targets = record.forward, record.targets
    try:
        fill = pixel_fill(forward, baseline)
    except MethodError:
        return torch.full((len(targets),), torch.nan, dtype=torch.float64)
    removed = torch.ones(1, sum(h * w for h, w in forward.request.layout.shapes)).bool()
    after = read(with_pixels(forward, fill(removed)), [(0, target) for target in targets])
    before = [sum(record.logs[s, m] for m, s in record.commits(t)) for t in targets]
    lengths = [len(t.positions) for t in targets]
    own = [float(b) / n for b, n in zip(before, lengths, strict=True)]
    return torch.tensor(own, dtype=torch.float64) - after


def _repetitions(forward: DenoisingForward, targets: Sequence[Target]) -> Tensor:
    """(N,) how often each word's text stands in the answer before it."""
    words = words_of(forward.adapter, forward.trajectory.tokens[0].tolist())
    before = [
        sum(w.text.lower() == t.text.lower() and w.positions[-1] < t.positions[0] for w in words)
        for t in targets
    ]
    return torch.tensor(before, dtype=torch.int64)
