r"""Affinity propagation: image tokens of one object resemble each other, so they share a map.

A map of gradients is a spike on its object; the states of the object's other tokens say how far it
reaches. Not scikit-learn's clustering method ``AffinityPropagation``, which has only the name in
common.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.refine._maps import to_working
from captum_dcam.refine.base import NamedRefinement, RefineContext, register_refinement, required
from captum_dcam.refine.checks import (
    Check,
    check_features,
    check_flag,
    check_maps,
    check_number,
    check_settings,
)
from captum_dcam.refine.normalise import ROUNDING_UNITS

# Similarities held at once: those of 4096 tokens with each other. Of more tokens, blocks of rows.
_KERNEL_VALUES = 2**24
# Rows of similarities that are made at once.
_ROWS = 256

_CHECKS: dict[str, Check] = {
    "power": partial(check_number, open_low=True),
    "square": partial(check_number, open_low=True),
    "center": check_flag,
}


def affinity_propagation(
    maps: Sequence[Tensor],
    features: Sequence[Tensor],
    shares: Sequence[Tensor | None] | None = None,
    pictures: Sequence[int] | None = None,
    *,
    power: float = 6.0,
    square: float = 2.0,
    center: bool = True,
) -> tuple[Tensor, ...]:
    r"""Spread maps over the image tokens whose states resemble those they lie on.

    .. math::
        K_{ij} = \max\left(0, \frac{2 \, c_i \cdot c_j}{|c_i|^2 + |c_j|^2}\right)^{power}, \quad
        d_i = \sum_j m_j K_{ij}, \quad a_i = \sum_j \frac{m_j K_{ij} s_j}{\sqrt{d_i d_j}}, \quad
        M'_i = \left(\frac{a_i}{\max a}\right)^{square}

    s is the map that comes in, c the features without their mean over the picture, m the share of
    the picture that a token shows. All grids of one picture make one graph, so that tiles and
    their overview help each other, and a grid that is given twice changes nothing. The maximum is
    that of the map over all grids of all pictures: a frame without the object stays dark.

    The similarity is Dice's: the cosine, times how far two lengths agree. The cosine alone would
    liken background, whose centred features are short and point anywhere, to whatever points the
    same way; and a token of outlying length resembles none but those as long.

    A token that is the mean of all, or zero, resembles only itself. So do all tokens where their
    features are the same throughout, whatever ``center`` is: M' then is (s / max s)^square, the
    order of the map that came in. All-zero maps stay zero.

    Args:
        maps (sequence of Tensor): non-negative maps (..., H, W), one per grid, with the same
            leading dimensions.
        features (sequence of Tensor): (D, H, W), one per grid, for all maps; or (R, D, H, W) for
            maps (R, ..., H, W): each row its own.
        shares (sequence of Tensor, optional): m, (H, W), one per grid, on any scale. Default: all
            tokens alike
        pictures (sequence of int, optional): which picture a grid shows. Default: all the same
        power (float, optional): of the similarity, above 0; higher: closer relatives only.
            Default: 6
        square (float, optional): power of the result, above 0; higher: a fainter tail. Default: 2
        center (bool, optional): compare features without their mean. Default: True

    Returns:
        tuple of Tensor: each of its map's shape and dtype, from 0 to 1. Maps of one call share the
        kernel; alone they come out the same within rounding, and bit for bit where each row has
        features of its own.

    Raises:
        TypeError, ValueError: maps, features, shares or settings out of their range.

    Source:
        Ahn et al., Weakly supervised learning of instance segmentation with inter-pixel relations
        (IRN), CVPR 2019: a random walk spreads class activation maps. Lin et al., CLIP is also an
        efficient segmenter (CLIP-ES), CVPR 2023: the affinity is the model's own, there from
        its attention, here from its states.
    """
    caller = "affinity_propagation"
    check_settings(caller, _CHECKS, power=power, square=square, center=center)
    shown = [0] * len(maps) if pictures is None else list(pictures)
    weights = _checked(maps, features, shares, shown, caller)
    seeds = _over_peak([to_working(m) for m in maps])
    spread = list(seeds)
    for picture in dict.fromkeys(shown):
        at = [i for i, one in enumerate(shown) if one == picture]
        seed = torch.cat([seeds[i].flatten(-2) for i in at], dim=-1)
        tokens = torch.cat([to_working(features[i]).flatten(-2) for i in at], dim=-1).mT
        share = torch.cat([weights[i].flatten() for i in at])
        share = (share / share.amax()).to(seed)
        own = torch.empty_like(seed)
        rows = zip(own, seed, tokens, strict=True) if tokens.dim() == 3 else [(own, seed, tokens)]
        for out, one, states in rows:
            compared = _states(states, share, center).to(one)
            out.copy_(_propagated(one, compared, share, power))
        parts = own.split([weights[i].numel() for i in at], dim=-1)
        for i, part in zip(at, parts, strict=True):
            spread[i] = part.unflatten(-1, seeds[i].shape[-2:])
    found = zip(_over_peak(spread), maps, strict=True)
    return tuple(values.pow(square).to(m.dtype) for values, m in found)


def _checked(
    maps: Sequence[Tensor],
    features: Sequence[Tensor],
    shares: Sequence[Tensor | None] | None,
    pictures: Sequence[int],
    caller: str,
) -> list[Tensor]:
    r"""Refuse grids that do not fit together; gives every grid's shares."""
    shares = [None] * len(maps) if shares is None else shares
    if not maps or {len(features), len(shares), len(pictures)} != {len(maps)}:
        raise InputError(
            f"{caller}: {len(maps)} maps, {len(features)} features, {len(shares)} shares and "
            f"{len(pictures)} pictures: expected one of each per grid, and a grid."
        )
    for one, states in zip(maps, features, strict=True):
        check_maps(one, caller)
        check_features(states, caller)
        own, grid = tuple(states.shape), tuple(one.shape)
        rows = own[:-3] if one.dim() > 2 else ()
        if own[-2:] != grid[-2:] or own[:-3] != rows or rows not in ((), grid[:1]):
            raise InputError(
                f"{caller}: `features` {own} do not fit `maps` {grid}: expected (D, H, W), or (R, "
                "D, H, W) for maps (R, ..., H, W), on the same grid of image tokens."
            )
    kinds = {(f.shape[:-2], m.shape[:-2]) for f, m in zip(features, maps, strict=True)}
    if len(kinds) > 1:
        raise InputError(
            f"{caller}: `features` {[tuple(f.shape) for f in features]} and `maps` "
            f"{[tuple(m.shape) for m in maps]} differ between grids in more than H and W: give "
            "the same maps and one block's features on every grid."
        )
    if all(share is None for share in shares):
        return [torch.ones(m.shape[-2:]) for m in maps]
    found = []
    for share, one in zip(shares, maps, strict=True):
        if share is None or share.shape != one.shape[-2:]:
            given = None if share is None else tuple(share.shape)
            raise InputError(
                f"{caller}: `shares` of a grid {tuple(one.shape[-2:])} are {given}: expected "
                "(H, W) for every grid, or for none."
            )
        check_maps(share, caller, name="shares")
        found.append(share)
    seen = {picture for share, picture in zip(found, pictures, strict=True) if bool(share.any())}
    if unseen := sorted(set(pictures) - seen):
        raise InputError(
            f"{caller}: all `shares` of picture {unseen[0]} are zero: expected a part of it that "
            "its tokens show; leave the shares out, and all tokens count alike."
        )
    return found


def _over_peak(maps: Sequence[Tensor]) -> list[Tensor]:
    r"""Maps (..., H, W) over their maximum in all grids; zero where that is zero."""
    top = torch.stack([m.amax(dim=(-2, -1), keepdim=True) for m in maps]).amax(0)
    return [m / torch.where(top > 0, top, torch.ones_like(top)) for m in maps]


def _states(tokens: Tensor, shares: Tensor, center: bool) -> Tensor:
    r"""Features (N, D) to compare, on a scale of their own; zero where what is left is rounding.

    The first token is taken away before the mean is: features that are the same throughout then
    leave exactly nothing.
    """
    scale = tokens.abs().amax()
    states = tokens / torch.where(scale > 0, scale, torch.ones_like(scale))
    apart = states - states[0]
    apart = apart - (apart * (shares / shares.sum())[:, None].to(apart)).sum(0)
    least = ROUNDING_UNITS * torch.finfo(states.dtype).eps
    longest = torch.linalg.vector_norm(states, dim=1).amax()
    same = torch.linalg.vector_norm(apart, dim=1).amax() <= least * longest
    chosen = apart if center else states
    length = torch.linalg.vector_norm(chosen, dim=1, keepdim=True)
    none = (length <= least * length.amax()) | same
    return torch.where(none, torch.zeros_like(chosen), chosen)


def relatives(features: Tensor, *, power: float = 6.0, center: bool = True) -> Tensor:
    r"""To how many of the others every token is related, as a share of them: the mean of K_ij.

    Near 0 a map stays as it came in; near 1 it spreads over the whole picture.

    Args:
        features (Tensor): (D, H, W).
        power, center: as in :func:`affinity_propagation`.

    Returns:
        Tensor: (H, W), from 0 to 1.

    Examples::

        >>> halves = torch.tensor([1.0, 1.0, -1.0, -1.0]).expand(1, 2, 4)
        >>> relatives(halves)[0]
        tensor([0.4286, 0.4286, 0.4286, 0.4286])
    """
    check_features(features, "relatives")
    tokens = to_working(features).flatten(1).mT
    count = len(tokens)
    states = _states(tokens, tokens.new_ones(count), center)
    squares = states.square().sum(1)
    rows = [
        _kernel(states, squares, start, _ROWS, power).sum(1) for start in range(0, count, _ROWS)
    ]
    return ((torch.cat(rows) - 1) / max(1, count - 1)).view(features.shape[1:])


def _kernel(states: Tensor, squares: Tensor, start: int, rows: int, power: float) -> Tensor:
    r"""K of some rows with all (rows, N), of states (N, D) and their squared lengths."""
    at = slice(start, start + rows)
    similar = _product(states[at], states.T).mul_(2)
    least = torch.finfo(states.dtype).tiny
    similar.div_((squares[at, None] + squares).clamp_(min=least)).clamp_(0, 1)
    similar.diagonal(start).fill_(1)
    return similar.pow_(power)


def _propagated(seeds: Tensor, states: Tensor, shares: Tensor, power: float) -> Tensor:
    r"""a (..., N) of seeds (..., N); the similarities of at most one block of rows are alive."""
    count, squares = len(states), states.square().sum(1)

    def kernel(start: int, rows: int) -> Tensor:
        return _kernel(states, squares, start, rows, power)

    size = max(1, _KERNEL_VALUES // count)
    whole = states.new_empty(count, count) if count <= size else None
    if whole is not None:
        for start in range(0, count, _ROWS):
            whole[start : start + _ROWS] = kernel(start, _ROWS)

    def summed(values: Tensor) -> Tensor:
        if whole is not None:
            return _product(whole, values)
        return torch.cat([_product(kernel(b, size), values) for b in range(0, count, size)])

    degree = summed(shares[:, None])[:, 0]
    # a token that shows nothing of the picture and resembles none that does
    root = torch.where(degree > 0, degree.rsqrt(), torch.zeros_like(degree))
    spread = summed((seeds.reshape(-1, count) * (shares * root)).T)
    return (spread.T * root).reshape(seeds.shape)


def _product(left: Tensor, right: Tensor) -> Tensor:
    r"""A matrix product in the type of its factors: with ``out`` autocast leaves it alone."""
    return torch.mm(left, right, out=left.new_empty(len(left), right.shape[1]))


@register_refinement("affinity")
@dataclass(frozen=True)
class Affinity(NamedRefinement):
    r""":func:`affinity_propagation` as a refinement; same settings and defaults.

    ``features`` come from the context, with ``shares`` and ``picture`` where it holds them. It
    works on all grids of a request at once where these are refined together, as
    :func:`captum_dcam.maps.refine_words` does. Not scikit-learn's clustering of a similar name.

    Examples::

        >>> from captum_dcam.refine import Affinity, RefineContext
        >>> spike = torch.zeros(2, 4)
        >>> spike[0, 0] = 1
        >>> halves = torch.tensor([1.0, 1.0, -1.0, -1.0]).expand(1, 2, 4)
        >>> Affinity()(spike, RefineContext(features=halves))
        tensor([[1., 1., 0., 0.],
                [1., 1., 0., 0.]])
    """

    needs: ClassVar[frozenset[str]] = frozenset(("features",))
    checks = _CHECKS

    power: float = 6.0
    square: float = 2.0
    center: bool = True

    def __call__(self, maps: Tensor, context: RefineContext | None = None) -> Tensor:
        r"""Spread maps (..., H, W) of one grid; ``context`` must hold features."""
        return self.over((maps,), (context,))[0]

    def over(
        self, maps: Sequence[Tensor], contexts: Sequence[RefineContext | None]
    ) -> tuple[Tensor, ...]:
        r"""Spread maps (..., H, W) over all grids, one context each."""
        for one in maps:
            check_maps(one, "Affinity")
        known = [context or RefineContext() for context in contexts]
        return affinity_propagation(
            maps,
            [required(context.features, "Affinity", "features") for context in known],
            [context.shares for context in known],
            [context.picture for context in known],
            **self._settings(),
        )
