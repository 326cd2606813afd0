r"""Why was this word written, and why then? The record of one word's commitment.

A word that became sure when the picture was looked at is another thing than one that became sure
when its neighbours stood there: that one agrees with the model's own text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from captum_dcam import maps
from captum_dcam.errors import InfeasibleStepError
from captum_dcam.methods.text_relevance import text_relevance
from captum_dcam.model.forward import DenoisingForward, holding, single
from captum_dcam.model.words import Target, WordsLike, answer_token_texts, resolve
from captum_dcam.presets import Preset
from captum_dcam.presets import preset as find_preset
from captum_dcam.results.trust import Candidate
from captum_dcam.truth.scores import picture_falls
from captum_dcam.truth.steps import StepRecord


@dataclass(frozen=True, eq=False)
class CommitRecord:
    r"""How one word came to be written, over S steps. Of several tokens, the least sure decides.

    Args:
        target (Target): the word.
        commit (int): the step that committed its least sure token.
        position (int): of that token in the answer.
        candidates (tuple): per step, that token's likeliest candidates, the likeliest first; empty
            where a step does not compute it.
        probability (Tensor): (S,) float64, of that token; NaN where a step does not compute it.
        entropy (Tensor): (S,) float64 in nats, likewise.
        maps (tuple of Tensor): one (S, h, w) per grid: the word's map at every step, as
            :class:`captum_dcam.results.steps.StepMaps` scales it.
        runner_up (Candidate): the likeliest other token at the commit.
        contrast (tuple of Tensor): one (h, w) per grid: the map of the word against the runner-up
            at the commit: why this word and not that one.
        revealed (tuple of Target): what changed between the step before and the commit: the tokens
            that became visible. Empty where the word was committed at its first step.
        relevance (Tensor): (R,) float32, of each of these for the word at the commit, gradient ×
            activation, -1 to 1 on one scale with image and prompt.
        shares (dict): how much of what speaks for the word at the commit lies on the ``image``, the
            ``prompt``, the words that were ``revealed`` last, and the rest of the ``answer``; they
            add up to 1, or are all 0.
        gained (float): how much its log-probability rose from the step before to the commit; that
            is what the revealed words gave. NaN at its first step.
        picture (float): how much its log-probability at the commit falls with a grey picture; that
            is what the picture gave. NaN in families whose pixels cannot be edited.
    """

    target: Target
    commit: int
    position: int
    candidates: tuple[tuple[Candidate, ...], ...]
    probability: Tensor
    entropy: Tensor
    maps: tuple[Tensor, ...]
    runner_up: Candidate
    contrast: tuple[Tensor, ...]
    revealed: tuple[Target, ...]
    relevance: Tensor
    shares: dict[str, float]
    gained: float
    picture: float

    def __str__(self) -> str:
        words = ", ".join(
            f"{t.text} {value:+.2f}"
            for t, value in zip(self.revealed, self.relevance.tolist(), strict=True)
        )
        before = (
            f"the words before it gave {self.gained:+.2f}" if self.revealed else "no word stood"
        )
        sure = float(self.probability[self.commit])
        shares = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        return "\n".join(
            (
                f"{self.target.text!r} at step {self.commit}: {sure:.0%}, or "
                f"{self.runner_up.text!r} {self.runner_up.probability:.0%}",
                f"the picture gave {self.picture:+.2f}, {before} (log-probability)",
                f"revealed last: {words or 'nothing'}",
                f"what speaks for it: {shares}",
            )
        )


@holding
def commit_record(
    forward: DenoisingForward,
    word: WordsLike,
    example: int = 0,
    *,
    preset: str | Preset = "default",
) -> CommitRecord:
    r"""Record how a word of a bound generation came to be written.

    Costs a replay of the steps, a gradient of every step, two gradients at the commit, and a
    prefill with a grey picture.

    Args:
        forward (DenoisingForward): with a bound generation; no given answer, which has no steps.
        word: one word, as :func:`captum_dcam.model.words.resolve` takes it; of several, the first.
        example (int, optional): of the batch. Default: 0
        preset (str or Preset, optional): how maps are read and refined; the score is the commit
            step's. Default: ``"default"``

    Returns:
        CommitRecord: of the word.

    Raises:
        InfeasibleStepError: a given answer, or a word whose tokens no step computes together.
        TargetError: the answer does not contain the word.

    Examples::

        >>> from captum_dcam.data.scenes import make_scene
        >>> adapter = captum_dcam.load("mini")
        >>> forward = DenoisingForward(adapter)
        >>> request = adapter.prepare([[make_scene(0, 3).image]], ["describe the image ."])
        >>> trajectory = forward.generate(request, gen_length=8)
        >>> found = commit_record(forward, "ring")
        >>> found.candidates[found.commit][0].text.strip(), found.maps[0].shape
        ('ring', torch.Size([8, 24, 24]))
    """
    one = single(forward, example)
    if one.trajectory.forced:
        raise InfeasibleStepError(
            "the commit record of an answer that was given, not generated: no step of it decided "
            "anything; generate it"
        )
    chosen = find_preset(preset)
    reading, refine = replace(chosen.reading(), score="commit"), chosen.refinements()
    target = resolve(one.adapter, one.trajectory.tokens[0].tolist(), word, reading.tagger)[0]
    record = StepRecord(one, [target])
    number, commit = record.least_sure(target)
    (position,) = record.tokens[number].positions
    stepped, _, _ = maps.explained_steps(one, [target], reading, refine)
    rival, odds = record.rival(number, commit)
    text = answer_token_texts(one.adapter, [rival])[0].strip()
    _, contrast = maps.explained(one, [_against(target, position, rival)], reading, refine)
    known = (~record.logs[:commit, number].isnan()).nonzero()[:, 0].tolist()
    before = known[-1] if known else None
    revealed = () if before is None else _revealed(one, before, commit, target)
    relevance, shares = _relevance(one, target, revealed)
    gained = float("nan")
    if before is not None:
        gained = float(record.logs[commit, number] - record.logs[before, number])
    return CommitRecord(
        target=target,
        commit=commit,
        position=position,
        candidates=_candidates(record, number),
        probability=record.logs[:, number].exp(),
        entropy=record.entropy[:, number],
        maps=tuple(m[:, 0].cpu() for m in stepped),
        runner_up=Candidate(rival, text, odds),
        contrast=tuple(m[0].float().cpu() for m in contrast),
        revealed=revealed,
        relevance=relevance,
        shares=shares,
        gained=gained,
        picture=float(picture_falls(record, "mean")[0]),
    )


def _against(target: Target, position: int, rival: int) -> Target:
    """The word with the rival in its least sure token's place."""
    places = zip(target.positions, target.token_ids, strict=True)
    return replace(target, foil_ids=tuple(rival if p == position else t for p, t in places))


def _candidates(record: StepRecord, number: int) -> tuple[tuple[Candidate, ...], ...]:
    """A token's candidates at every step; none where a step does not compute it."""
    out = []
    for ids, odds in zip(record.best[:, number].tolist(), record.odds[:, number], strict=True):
        known = [(i, p) for i, p in zip(ids, odds.tolist(), strict=True) if i >= 0]
        texts = answer_token_texts(record.forward.adapter, [i for i, _ in known])
        out.append(tuple(Candidate(i, t, p) for (i, p), t in zip(known, texts, strict=True)))
    return tuple(out)


def _revealed(
    forward: DenoisingForward, before: int, commit: int, target: Target
) -> tuple[Target, ...]:
    """The tokens of the answer that are not the word's own and became visible from one step to the
    other: what these two states differ in."""
    trajectory = forward.trajectory
    committed = trajectory.commit_step[0].tolist()
    tokens = trajectory.tokens[0].tolist()
    at = [
        p
        for p, step in enumerate(committed)
        if before <= step < commit and p not in target.positions
    ]
    texts = answer_token_texts(forward.adapter, [tokens[p] for p in at])
    return tuple(Target(t.strip(), (p,), (tokens[p],)) for p, t in zip(at, texts, strict=True))


def _relevance(
    forward: DenoisingForward, target: Target, revealed: Sequence[Target]
) -> tuple[Tensor, dict[str, float]]:
    """Relevance of the revealed words at the commit, and the shares of all that speaks for it."""
    text = text_relevance(forward, [target], score="commit").normalised()
    cut = text.tokens.prompt
    values = text.values[0].nan_to_num().cpu()
    at = [cut + t.positions[0] for t in revealed]
    own = values.relu()
    image = float(torch.stack([m[0].relu().sum() for m in text.maps]).sum())
    last = float(own[at].sum())
    parts = {
        "image": image,
        "prompt": float(own[:cut].sum()),
        "revealed": last,
        "answer": float(own[cut:].sum()) - last,
    }
    total = sum(parts.values())
    return values[at], {name: value / total if total else 0.0 for name, value in parts.items()}
