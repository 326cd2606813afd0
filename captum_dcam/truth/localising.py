r"""How well a word's map localises: object word or function word, not true or false.

Read from the map before refinements: propagation makes the maps of function words compact too
(docs/TRUST.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from captum_dcam.maps import Reading, refine_words
from captum_dcam.metrics import MAP_FEATURES, Reliability, map_features
from captum_dcam.presets import Preset, preset
from captum_dcam.refine import Affinity, RefineContext

#: of a map before refinements: its shape, and how it stands up to affinity propagation
FEATURES = (*MAP_FEATURES, "agreement")
#: where nothing was fitted to the model
UNCALIBRATED = (
    "how far the map stays what it is when similar image tokens share; not calibrated for this "
    "model: "
    "captum-dcam calibrate --labels fits it"
)


@cache
def shipped() -> Reliability:
    """Fitted on the embedded model's maps by ``benchmarks/trust.py fit``."""
    return Reliability.from_json((files("captum_dcam.mini") / "reliability.json").read_text())


def fitted(
    family: str, layer: int, recommended: int, reading: Reading, chosen: Preset
) -> Reliability | None:
    """The fit for maps that are read like this: the preset's own, the embedded model's, or none."""
    if chosen.reliability is not None:
        return chosen.reliability
    usual = preset("default").reading(tagger=reading.tagger)
    ours = family == "mini" and layer == recommended and reading == usual
    return shipped() if ours else None


def features(
    signed: Sequence[Tensor],
    contexts: Sequence[RefineContext],
    spread: Sequence[Tensor] | None = None,
) -> Tensor:
    r"""Features of each of N words' maps, of the grid with the word's highest peak.

    ``agreement``: the mean, weighted by the map, of the map after affinity propagation over its
    maximum. 1: what the map highlights stays highest when tokens that are alike share; near 0: most
    of its mass is spread thinly over tokens that do not belong together.

    Args:
        signed (sequence of Tensor): maps before refinements, one (N, h, w) per grid.
        contexts (sequence of RefineContext): one per grid, with features of the image tokens.
        spread (sequence of Tensor, optional): the maps after :class:`Affinity`, where they are
            known. Default: computed

    Returns:
        Tensor: (N, 7) float64, in the order of :data:`FEATURES`.
    """
    seeds = [m.relu() for m in signed]
    if not len(seeds[0]):
        return torch.zeros(0, len(FEATURES), dtype=torch.float64)
    if spread is None:
        spread = refine_words(seeds, Affinity(), contexts)
    spread = [m.double().cpu() for m in spread]
    seeds = [m.double().cpu() for m in seeds]
    best = torch.stack([m.amax((-2, -1)) for m in seeds]).argmax(0)
    out = torch.zeros(len(best), len(FEATURES), dtype=torch.float64)
    for grid in best.unique().tolist():
        at = best == grid
        seed, own = seeds[grid][at], spread[grid][at]
        whole = seed.sum((-2, -1)) * own.amax((-2, -1))
        agreement = (seed * own).sum((-2, -1)) / whole.masked_fill(whole == 0, 1)
        out[at] = torch.cat((map_features(seed), agreement[:, None]), dim=1)
    return out


def localises(found: Tensor, fit: Reliability | None) -> Tensor:
    """How well maps of features (N, 7) localise, (N,) float32 in [0, 1]: a calibrated probability
    by a fit, the agreement without one; 0 of a constant map, whatever a fit would say."""
    scores = found[:, FEATURES.index("agreement")] if fit is None else fit.probability(found)
    return scores.masked_fill(found[:, FEATURES.index("peak")] == 0, 0).float()
