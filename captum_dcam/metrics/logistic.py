r"""A probability from a few features: logistic regression, fitted once and applied with torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.metrics._checks import working_dtype
from captum_dcam.packages import needed

L = TypeVar("L", bound="Logistic")


@dataclass(frozen=True)
class Logistic:
    r"""Logistic regression on F features; what they are, a class of it says.

    Args:
        weights (tuple of float): one per feature, for standardised features.
        bias (float): of the regression.
        mean, std (tuple of float): of the features it was fitted on.
        fitted_on (str): what that was, for the reader. Default: empty
        features (tuple of str): names of the features. Default: none
    """

    weights: tuple[float, ...]
    bias: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fitted_on: str = ""
    features: tuple[str, ...] = ()

    #: of its JSON
    format: ClassVar[str]
    #: what gives the features, for messages
    made_by: ClassVar[str]

    def __post_init__(self) -> None:
        self.check_features(self.features)
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
    def check_features(cls, names: Sequence[str]) -> None:
        """InputError for features that it cannot have."""

    @classmethod
    def fit(
        cls: type[L],
        features: Tensor,
        labels: Tensor,
        l2: float = 1.0,
        fitted_on: str = "",
        names: Sequence[str] = (),
        **more: Any,
    ) -> L:
        r"""Fit by penalised maximum likelihood: convex, so the result depends on the data alone.

        Minimises the summed log loss plus ``l2``/2 times the squared weights (not the bias).
        Probabilities are calibrated for data with the same share of both labels.

        Args:
            features (Tensor): (M, F), finite.
            labels (Tensor): (M,) bool, of both kinds.
            l2 (float, optional): strength of the penalty, above 0. Default: 1
            fitted_on (str, optional): what the words were. Default: empty
            names (sequence of str, optional): of the F features. Default: the class's own
            **more: what else the class holds.

        Raises:
            ValueError: other shapes, or labels of one kind only.
        """
        names = names or cls.features
        cls.check_features(names)
        if features.ndim != 2 or features.shape[1] != len(names):
            raise InputError(
                f"features have shape {tuple(features.shape)}: expected (M, {len(names)}), "
                f"{tuple(names)}, as {cls.made_by} gives them"
            )
        linear = needed("sklearn.linear_model", f"{cls.__name__}.fit")  # takes a second to import
        truth = both_kinds(labels, len(features))
        if not 0 < l2 < math.inf:
            raise InputError(f"l2 is {l2}: expected a finite number above 0")
        rows = np.stack([numbers_of(column) for column in features.T], axis=1)
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
            **more,
        )

    def probability(self, features: Tensor) -> Tensor:
        """Probability (...) of what it was fitted to tell, of features (..., F)."""
        if features.shape[-1:] != (len(self.features),):
            raise InputError(
                f"features have shape {tuple(features.shape)}: expected (..., "
                f"{len(self.features)}), {self.features}"
            )
        wide = features.detach().to(working_dtype(features.device))
        rows = (wide - wide.new_tensor(self.mean)) / wide.new_tensor(self.std)
        return (rows @ wide.new_tensor(self.weights) + self.bias).sigmoid().to(features.dtype)

    def record(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {"format": self.format, **asdict(self)}

    def to_json(self) -> str:
        """All of it as JSON text, for ``path.write_text``."""
        return json.dumps(self.record(), indent=1, allow_nan=False)

    @classmethod
    def from_record(cls: type[L], record: Any) -> L:
        """The inverse of :meth:`record`; ValueError when it is of another kind or version."""
        kind = record.get("format") if isinstance(record, dict) else type(record).__name__
        if kind != cls.format:
            raise InputError(
                f"format is {kind!r}: expected {cls.format!r}; fit it again with this version"
            )
        given: dict[str, Any] = {f.name: record[f.name] for f in fields(cls)}
        given |= {n: tuple(v) for n, v in given.items() if isinstance(v, list)}
        return cls(**given)

    @classmethod
    def from_json(cls: type[L], text: str) -> L:
        """The inverse of :meth:`to_json`; ValueError when it is of another kind or version."""
        return cls.from_record(json.loads(text))


def both_kinds(labels: Tensor, count: int) -> np.ndarray:
    """Labels (count,) as an array; InputError unless they are bool and of both kinds."""
    if labels.dtype != torch.bool or labels.shape != (count,):
        raise InputError(
            f"labels are {labels.dtype} {tuple(labels.shape)}: expected torch.bool ({count},)"
        )
    if not bool(labels.any()) or bool(labels.all()):
        raise InputError(f"all {count} labels are the same: expected words of both kinds")
    return labels.cpu().numpy()


def numbers_of(scores: Tensor | Sequence[float]) -> np.ndarray:
    """Scores (M,) as an array of float64; InputError unless they are finite."""
    row = torch.as_tensor(scores).detach().double().cpu().numpy()
    if row.ndim != 1 or not np.isfinite(row).all():
        raise InputError(
            f"scores have shape {row.shape}: expected one finite number per word, (M,)"
        )
    return row
