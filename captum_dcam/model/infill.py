r"""Answers with holes: some words are given, and the model fills the rest.

``[MASK]`` is the library's own mark, in every family: one token that the model writes; ``[MASK:3]``
are three. ``\[MASK]`` is the text itself. A blank in front of a mark belongs to what fills it, as
tokens carry the blank in front of their word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from captum_dcam.errors import InputError, MethodError, TargetError
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.trajectory import Given, Trajectory

#: a mark, or what looks like one: a closed one with at most a word in it, or one that never closes
_MARK = re.compile(
    r"(\\?)(\[\s*mask(?![a-z])\s*(?:[^\w\s\[\]]*\s*[\w.]*\s*\]|(?![^\[]*\])\S*))", re.IGNORECASE
)
_HOLE = re.compile(r"\[MASK(?::([1-9][0-9]{0,4}))?\]")
#: names of the setting that says how long an answer is
LENGTHS = ("gen_length", "max_new_tokens")

#: what an answer is made of: texts that are given, and numbers of tokens to fill
Parts = tuple[str | int, ...]


def parts_of(answer: str) -> Parts:
    r"""Texts and holes of an answer, in order.

    Args:
        answer (str): may hold ``[MASK]``, ``[MASK:n]`` (n of 1 to 99999), and ``\[MASK]``, the text
            itself.

    Returns:
        tuple: of texts, and numbers of tokens to fill; a single text where nothing is to fill.

    Raises:
        InputError: what looks like a mark and is none.

    Examples::

        >>> parts_of("a [MASK] circle and [MASK:2]")
        ('a', 1, ' circle and', 2)
        >>> parts_of(r"it says \[MASK] .")
        ('it says [MASK] .',)
        >>> parts_of("a [mask] circle")
        Traceback (most recent call last):
        captum_dcam.errors.InputError: '[mask]' in the answer 'a [mask] circle': expected [MASK] \
        for one token that the model fills, [MASK:3] for three, or \[mask] for the text itself
    """
    parts: list[str | int] = [""]
    at = 0

    def text(more: str) -> None:
        if isinstance(parts[-1], str):
            parts[-1] += more
        elif more:
            parts.append(more)

    for found in _MARK.finditer(answer):
        text(answer[at : found.start()])
        at, (escaped, mark) = found.end(), found.groups()
        if escaped:
            text(mark)
            continue
        hole = _HOLE.fullmatch(mark)
        if hole is None:
            raise InputError(
                f"{mark!r} in the answer {answer!r}: expected [MASK] for one token that the model "
                f"fills, [MASK:3] for three, or \\{mark} for the text itself"
            )
        if isinstance(parts[-1], str):
            parts[-1] = parts[-1].rstrip(" ")
        parts.append(int(hole[1] or 1))
    text(answer[at:])
    if len(parts) > 1 and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip(" ")
    return tuple(part for part in parts if part != "")


def has_holes(answer: Any) -> bool:
    """Whether an answer is a text with tokens to fill; InputError as :func:`parts_of`."""
    return isinstance(answer, str) and any(isinstance(one, int) for one in parts_of(answer))


def plain(answer: str) -> str:
    r"""A text without holes as it is meant: ``\[MASK]`` is ``[MASK]``."""
    return "".join(map(str, parts_of(answer)))


def given_by(adapter: Adapter, answer: str, settings: Mapping[str, Any] | None = None) -> Given:
    r"""The tokens that an answer with holes gives, and where they stand.

    Args:
        adapter (Adapter): of the family that fills the holes.
        answer (str): with holes.
        settings (mapping, optional): of the decoding; a length must be the answer's own.

    Returns:
        Given: (1, T); 0 stands in the holes.

    Raises:
        MethodError: the family cannot fill holes.
        TargetError: a text that the family encodes to no token, or to its mask.
        InputError: another length.
    """
    if adapter.unfillable:
        raise MethodError(
            f"{adapter.family} cannot fill the holes of {answer!r}: {adapter.unfillable}; give a "
            "whole answer, or load a family that denoises"
        )
    ids: list[int] = []
    at: list[bool] = []
    for part in parts_of(answer):
        own = [0] * part if isinstance(part, int) else adapter.encode(part)
        if isinstance(part, str) and (not own or adapter.mask_id in own):
            what = "its mask token" if own else "no token"
            raise TargetError(
                f"{adapter.family} makes {what} of {part!r} in the answer {answer!r}, which gives "
                "nothing: write words"
            )
        ids += own
        at += [isinstance(part, str)] * len(own)
    for name in LENGTHS:
        asked = (settings or {}).get(name)
        if asked is not None and asked != len(ids):
            raise InputError(
                f"{name} is {asked}, but the answer {answer!r} has {len(ids)} tokens, "
                f"{at.count(False)} of them to fill: leave {name} out, and write [MASK:n] where "
                "the model may write more"
            )
    ids = adapter.whole_answer(ids)  # what fills the last canvas up is given, too
    at += [True] * (len(ids) - len(at))
    device = adapter.device
    return Given(torch.tensor([ids], device=device), torch.tensor([at], device=device))


def fill(
    forward: DenoisingForward,
    answer: str,
    request: Any,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> Trajectory:
    r"""Let the model fill the holes of an answer; binds it to the forward, as a generation.

    The family's own decoding starts from a canvas in which the given tokens stand, with its own
    settings; its length is the answer's. Given tokens are marked (:attr:`Trajectory.given`): no
    step commits them.

    Args:
        forward (DenoisingForward): of the model.
        answer (str): with holes, see :func:`parts_of`.
        request (Request): of one example.
        generator (torch.Generator, optional): for sampled decoding.
        **settings: as :meth:`DenoisingForward.generate` takes them.

    Returns:
        Trajectory: of the filled answer.

    Raises:
        MethodError, TargetError, InputError: see :func:`given_by`; before any work.

    Examples::

        >>> from captum_dcam.data.scenes import make_scene
        >>> adapter = captum_dcam.load("mini")
        >>> forward = DenoisingForward(adapter)
        >>> request = adapter.prepare([[make_scene(0, 3).image]], ["describe the image ."])
        >>> found = fill(forward, "a [MASK] ring .", request)
        >>> adapter.token_texts(found.tokens[0].tolist())
        [' a', ' purple', ' ring', ' .']
    """
    given = given_by(forward.adapter, answer, settings)
    rest = {name: value for name, value in settings.items() if name not in LENGTHS}
    rest["gen_length"] = given.tokens.shape[1]
    return forward.generate(request, generator=generator, given=given, **rest)


def template_of(token_texts: Sequence[str], given: Sequence[bool]) -> str:
    """The answer as it was given, from its tokens' texts: holes are marks."""
    out, holes = "", 0
    for text, own in zip([*token_texts, ""], [*given, True], strict=True):
        if not own:
            holes += 1
            continue
        if holes:
            out += f" [MASK:{holes}]" if holes > 1 else " [MASK]"
            holes = 0
        out += text
    return out.strip()
