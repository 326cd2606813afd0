r"""What a map's shape tells: how few pixels hold it, and whether it localises anything at all.

Gini index, entropy and Hoyer's measure are blind to a map's scale. A map that singles nothing out
(constant, all zero, or of one pixel) is at the dense end of each: Gini 0, entropy 1, Hoyer 0.

:class:`Reliability` is a calibrated probability: a logistic regression on six features of that
kind, fitted on words with and without an object in the image. It reads maps only: neither masks
nor the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.metrics._checks import checked_maps, result_dtype, unit_peak, working_dtype
from captum_dcam.metrics.otsu import levels_and_cut
from captum_dcam.packages import needed

#: the features, in the order of :func:`map_features`
MAP_FEATURES = ("entropy", "gini", "peak", "autocorrelation", "separability", "connected")
_FORMAT = "captum_dcam.reliability/1"


def gini_index(maps: Tensor) -> Tensor:
    r"""Gini index: 0 for a constant map, 1 - 1/N for one pixel out of N.

    .. math:: G = 1 - 2 \sum_{k=1}^N \frac{c_{(k)}}{\lVert c \rVert_1} \frac{N - k + 1/2}{N}

    with the values sorted from low to high. It is the only common measure with all six properties
    that its source asks for.

    Args:
        maps (Tensor): (..., H, W), floating point, finite, non-negative.

    Returns:
        Tensor: (...), in [0, 1).

    Source:
        Hurley and Rickard, Comparing measures of sparsity, 2009, Eq. 6.
    """
    values = unit_peak(checked_maps(maps, "gini_index")).flatten(-2)
    ranked, count = values.sort(-1).values, values.shape[-1]
    place = torch.arange(1, count + 1, device=values.device, dtype=values.dtype)
    weighted = (ranked * ((count - place + 0.5) / count)).sum(-1)
    total = ranked.sum(-1)
    index = 1 - 2 * weighted / total.masked_fill(total == 0, 1)
    return index.clamp(min=0).masked_fill(total == 0, 0).to(result_dtype(maps))


def normalized_entropy(maps: Tensor) -> Tensor:
    r"""Shannon entropy of the map as a distribution over N pixels, over that of the uniform one.

    .. math:: H = -\sum_i p_i \log p_i / \log N, \quad p = c / \lVert c \rVert_1

    1 for a constant map, 0 for a single pixel out of many.

    Args:
        maps (Tensor): (..., H, W), floating point, finite, non-negative.

    Returns:
        Tensor: (...), in [0, 1].

    Source:
        C. E. Shannon, 1948.
    """
    values = unit_peak(checked_maps(maps, "normalized_entropy")).flatten(-2)
    total, count = values.sum(-1, keepdim=True), values.shape[-1]
    share = values / total.masked_fill(total == 0, 1)
    entropy = torch.special.entr(share).sum(-1) / math.log(max(count, 2))
    dense = (total[..., 0] == 0) | (count == 1)
    return entropy.clamp(0, 1).masked_fill(dense, 1).to(result_dtype(maps))


def hoyer(maps: Tensor) -> Tensor:
    r"""Hoyer's sparseness: 0 for a constant map, 1 for a single pixel out of many.

    .. math:: (\sqrt N - \lVert c \rVert_1 / \lVert c \rVert_2) / (\sqrt N - 1)

    Args:
        maps (Tensor): (..., H, W), floating point, finite, non-negative.

    Returns:
        Tensor: (...), in [0, 1].

    Source:
        P. O. Hoyer, Non-negative matrix factorization with sparseness constraints, 2004.
    """
    values = unit_peak(checked_maps(maps, "hoyer")).flatten(-2)
    root = math.sqrt(values.shape[-1])
    length = values.square().sum(-1).sqrt()
    flat = (length == 0) | (values.shape[-1] == 1)
    ratio = values.sum(-1) / length.masked_fill(length == 0, 1)
    measure = (root - ratio) / max(root - 1, 1e-9)
    return measure.clamp(0, 1).masked_fill(flat, 0).to(result_dtype(maps))


def map_features(maps: Tensor) -> Tensor:
    r"""What tells a blob from clutter, for every map; all blind to its scale.

    ``entropy``: :func:`normalized_entropy`. ``gini``: :func:`gini_index`. ``peak``: log of maximum
    over mean, over log N, in [0, 1]. ``autocorrelation``: of horizontal and vertical neighbours
    (Moran's I), in [-1, 1]. ``separability``: between-class over total variance at Otsu's threshold
    (Otsu's η), in [0, 1]. ``connected``: share of the map's mass in the heaviest 8-connected part
    of the Otsu region, in [0, 1].

    A map that is constant, all zero or of one pixel has entropy 1 and all others 0.

    Args:
        maps (Tensor): (..., H, W), floating point, finite, non-negative.

    Returns:
        Tensor: (..., 6), in the order of :data:`MAP_FEATURES`.
    """
    values = unit_peak(checked_maps(maps, "map_features"))
    levels, cut = levels_and_cut(values)
    region, pixels = levels > cut[..., None, None], max(values.shape[-2:].numel(), 2)
    found = (
        normalized_entropy(values),
        gini_index(values),
        -values.mean((-2, -1)).clamp(min=1e-300).log() / math.log(pixels),
        _autocorrelation(levels),
        _separability(levels, region),
        _connected(values, region),
    )
    dense = torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=values.dtype, device=values.device)
    features = torch.stack([f.to(values) for f in found], dim=-1)
    flat = levels.amax((-2, -1)) == 0
    return torch.where(flat[..., None], dense, features).to(result_dtype(maps))


@dataclass(frozen=True)
class Reliability:
    r"""Logistic regression on :func:`map_features`.

    Args:
        weights (tuple of float): one per feature, for standardised features.
        bias (float): of the regression.
        mean, std (tuple of float): of the features it was fitted on.
        fitted_on (str): what the maps were, for the reader. Default: empty
        features (tuple of str): what the features are, those of :func:`map_features` first.
            Default: those alone
    """

    weights: tuple[float, ...]
    bias: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fitted_on: str = ""
    features: tuple[str, ...] = MAP_FEATURES

    def __post_init__(self) -> None:
        _check_features(self.features)
        for name in ("weights", "mean", "std"):
            row = getattr(self, name)
            if len(row) != len(self.features) or not all(math.isfinite(v) for v in row):
                raise InputError(
                    f"{name} is {row}: expected {len(self.features)} finite numbers, for "
                    f"{self.features}"
                )
        if not math.isfinite(self.bias) or min(self.std) <= 0:
            raise InputError(f"bias is {self.bias}, std {self.std}: expected finite, and std > 0")

    @classmethod
    def fit(
        cls,
        features: Tensor,
        labels: Tensor,
        l2: float = 1.0,
        fitted_on: str = "",
        names: Sequence[str] = MAP_FEATURES,
    ) -> Reliability:
        r"""Fit by penalised maximum likelihood: convex, so the result depends on the data alone.

        Minimises the summed log loss plus ``l2``/2 times the squared weights (not the bias).
        Probabilities are calibrated for data with the same share of both labels.

        Args:
            features (Tensor): (M, F), F = 6 from :func:`map_features` and those that were added.
            labels (Tensor): (M,) bool: True where the word has an object in the image.
            l2 (float, optional): strength of the penalty, above 0. Default: 1
            fitted_on (str, optional): what the maps were. Default: empty
            names (sequence of str, optional): of the F features. Default: of map_features' six

        Raises:
            ValueError: other shapes, or labels of one kind only.
        """
        _check_features(names)
        if features.ndim != 2 or features.shape[1] != len(names):
            raise InputError(
                f"features have shape {tuple(features.shape)}: expected (M, {len(names)}), "
                f"{tuple(names)}; map_features(maps) gives the first six"
            )
        linear = needed("sklearn.linear_model", "Reliability.fit")  # takes a second to import
        truth = _both_kinds(labels, len(features))
        if not 0 < l2 < math.inf:
            raise InputError(f"l2 is {l2}: expected a finite number above 0")
        rows = np.stack([_row(column) for column in features.T], axis=1)
        mean, std = rows.mean(0), rows.std(0)
        std = np.where(std > 1e-12, std, 1.0)
        # Newton's method ends within 1e-8 of the optimum; lbfgs stops earlier
        model = linear.LogisticRegression(
            C=1 / l2, solver="newton-cholesky", tol=1e-10, max_iter=1000
        )
        model.fit((rows - mean) / std, truth)
        return cls(
            tuple(model.coef_[0].tolist()),
            float(model.intercept_[0]),
            tuple(mean.tolist()),
            tuple(std.tolist()),
            fitted_on,
            tuple(names),
        )

    def probability(self, features: Tensor) -> Tensor:
        """Probability (...) that maps of such features (..., F) localise an object."""
        if features.shape[-1:] != (len(self.features),):
            raise InputError(
                f"features have shape {tuple(features.shape)}: expected (..., "
                f"{len(self.features)}), {self.features}"
            )
        wide = features.detach().to(working_dtype(features.device))
        rows = (wide - wide.new_tensor(self.mean)) / wide.new_tensor(self.std)
        return (rows @ wide.new_tensor(self.weights) + self.bias).sigmoid().to(features.dtype)

    def score(self, maps: Tensor) -> Tensor:
        """Probability (...) that maps (..., H, W) localise an object; near 0: trust no region."""
        return self.probability(map_features(maps))

    def record(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {"format": _FORMAT, **asdict(self)}

    def to_json(self) -> str:
        """All of it as JSON text, for ``path.write_text``."""
        return json.dumps(self.record(), indent=1, allow_nan=False)

    @classmethod
    def from_record(cls, record: Any) -> Reliability:
        """The inverse of :meth:`record`; ValueError when it is of another kind or version."""
        kind = record.get("format") if isinstance(record, dict) else type(record).__name__
        if kind != _FORMAT:
            raise InputError(
                f"format is {kind!r}: expected {_FORMAT!r}; fit it again with this version"
            )
        rows = {name: tuple(record[name]) for name in ("weights", "mean", "std", "features")}
        return cls(bias=record["bias"], fitted_on=record["fitted_on"], **rows)

    @classmethod
    def from_json(cls, text: str) -> Reliability:
        """The inverse of :meth:`to_json`; ValueError when it is of another kind or version."""
        return cls.from_record(json.loads(text))


def auroc(scores: Tensor, labels: Tensor) -> float:
    r"""Probability that a random True scores above a random False; ties count half.

    Args:
        scores (Tensor): (M,), finite.
        labels (Tensor): (M,) bool, of both kinds.
    """
    sklearn = needed("sklearn.metrics", "auroc")
    return float(sklearn.roc_auc_score(_both_kinds(labels, len(scores)), _row(scores)))


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> float:
    r"""Mean distance of predicted probability and observed share, over equally wide bins.

    Args:
        probabilities (Tensor): (M,), in [0, 1]; M at least 1.
        labels (Tensor): (M,) bool.
        bins (int, optional): at least 1; empty ones count nothing. Default: 10

    Source:
        Naeini et al., 2015; Guo et al., 2017, Eq. 3.
    """
    predicted, truth = _row(probabilities), labels.detach().cpu().numpy()
    if len(predicted) == 0 or truth.shape != predicted.shape or truth.dtype != bool or bins < 1:
        raise InputError(
            f"{len(predicted)} probabilities, labels {tuple(labels.shape)} {labels.dtype} and "
            f"{bins} bins: expected as many labels of torch.bool, at least one of each"
        )
    if predicted.min() < 0 or predicted.max() > 1:
        raise InputError(
            f"probabilities reach from {predicted.min()} to {predicted.max()}: expected 0 to 1"
        )
    index = np.minimum((predicted * bins).astype(int), bins - 1)
    gap = np.bincount(index, predicted - truth, minlength=bins)
    return float(np.abs(gap).sum() / len(predicted))


def _check_features(names: Sequence[str]) -> None:
    if tuple(names[: len(MAP_FEATURES)]) != MAP_FEATURES:
        raise InputError(
            f"features are {tuple(names)}: expected {MAP_FEATURES} first; fit it again with this "
            "version"
        )


def _autocorrelation(levels: Tensor) -> Tensor:
    away = levels - levels.mean((-2, -1), keepdim=True)
    across = (away[..., :, 1:] * away[..., :, :-1]).sum((-2, -1))
    down = (away[..., 1:, :] * away[..., :-1, :]).sum((-2, -1))
    h, w = levels.shape[-2:]
    pairs = h * (w - 1) + (h - 1) * w
    variance = away.square().mean((-2, -1))
    moran = (across + down) / max(pairs, 1) / variance.masked_fill(variance == 0, 1)
    return moran.clamp(-1, 1)


def _separability(levels: Tensor, region: Tensor) -> Tensor:
    count = levels.shape[-2:].numel()
    above = region.sum((-2, -1)).to(levels.dtype)
    total = levels.sum((-2, -1))
    inside = (levels * region).sum((-2, -1))
    shift = inside / above.clamp(min=1) - (total - inside) / (count - above).clamp(min=1)
    between = above * (count - above) / count**2 * shift.square()
    variance = levels.var((-2, -1), unbiased=False)
    return (between / variance.masked_fill(variance == 0, 1)).clamp(0, 1)


def _connected(values: Tensor, region: Tensor) -> Tensor:
    leading, size = values.shape[:-2], values.shape[-2:]
    mass = values.reshape(-1, *size).cpu().numpy()
    structure = np.zeros((3, 3, 3), dtype=int)
    structure[1] = 1  # neighbours within a map, never across maps
    labels, parts = ndimage.label(region.reshape(-1, *size).cpu().numpy(), structure)
    heavy = np.bincount(labels.ravel(), mass.ravel(), minlength=parts + 1)
    owner = np.zeros(parts + 1, dtype=int)
    owner[labels] = np.arange(len(mass))[:, None, None]
    best = np.zeros(len(mass))
    np.maximum.at(best, owner[1:], heavy[1:])
    total = mass.sum((1, 2))
    share = torch.from_numpy(best / np.where(total == 0, 1, total)).reshape(leading)
    return share.to(values.device, values.dtype).clamp(0, 1)


def _both_kinds(labels: Tensor, count: int) -> np.ndarray:
    if labels.dtype != torch.bool or labels.shape != (count,):
        raise InputError(
            f"labels are {labels.dtype} {tuple(labels.shape)}: expected torch.bool ({count},)"
        )
    if not bool(labels.any()) or bool(labels.all()):
        raise InputError(f"all {count} labels are the same: expected words of both kinds")
    return labels.cpu().numpy()


def _row(scores: Tensor | Sequence[float]) -> np.ndarray:
    row = torch.as_tensor(scores).detach().double().cpu().numpy()
    if row.ndim != 1 or not np.isfinite(row).all():
        raise InputError(
            f"scores have shape {row.shape}: expected one finite number per word, (M,)"
        )
    return row
