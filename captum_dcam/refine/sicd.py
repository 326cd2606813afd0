r"""Single-Instance Causal Debiasing: subtract what repeated words and outliers contribute."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.refine._maps import mean_std, peak, skewness, to_working
from captum_dcam.refine.base import NamedRefinement, RefineContext, register_refinement
from captum_dcam.refine.checks import Check, check_maps, check_number, check_settings

OutlierForm = Literal["mask", "excess"]


def _check_form(value: str, caller: str, name: str) -> None:
    if value not in get_args(OutlierForm):
        raise InputError(
            f"{caller}: `{name}` is {value!r}, expected 'mask' (the paper's) or 'excess': see the "
            "docstring for what each subtracts."
        )


def _check_revert(value: float | None, caller: str, name: str) -> None:
    if value is not None:
        check_number(value, caller, name, high=1.0)


_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("omega_rep", "omega_out", "lambda_max", "outlier_sigmas"), check_number),
    **dict.fromkeys(("gate_std", "gate_skewness"), check_number),
    "outlier_form": _check_form,
    "revert_below": _check_revert,
}


def sicd_gate(maps: Tensor, *, gate_std: float = 0.22, gate_skewness: float = 1.0) -> Tensor:
    r"""Which maps :func:`single_instance_causal_debiasing` touches when its gate is on.

    A map triggers when its population standard deviation exceeds ``gate_std`` or its population
    skewness exceeds ``gate_skewness`` (a long tail of high values). Needs maps normalised to
    [0, 1] (:func:`min_max`) for the first; the second does not change with scale.

    Args:
        maps (Tensor): non-negative maps (..., H, W).
        gate_std (float, optional): bound on the standard deviation. Default: 0.22
        gate_skewness (float, optional): bound on the skewness. Default: 1.0

    Returns:
        Tensor: bool of shape (...). A constant map never triggers at the default bounds.

    Raises:
        TypeError, ValueError: maps or bounds out of their range.

    Source:
        Diffusion-CAM Section 3.2.4, "high variance/skewness", without numbers; the reference code
        computes both and then always triggers. 0.22 is the paper's own bound of high variance
        (delta_sigma of Eq. 7); skewness above 1 is the usual meaning of "highly skewed". Both are
        this library's choice.
    """
    check_maps(maps, "sicd_gate")
    check_settings("sicd_gate", _CHECKS, gate_std=gate_std, gate_skewness=gate_skewness)
    return _triggered(to_working(maps), gate_std, gate_skewness)[..., 0, 0]


def single_instance_causal_debiasing(
    maps: Tensor,
    repeated_maps: Tensor | None = None,
    *,
    omega_rep: float = 0.05,
    omega_out: float = 0.02,
    lambda_max: float = 0.5,
    outlier_form: OutlierForm = "mask",
    outlier_sigmas: float = 2.0,
    gate: bool = True,
    gate_std: float = 0.22,
    gate_skewness: float = 1.0,
    revert_below: float | None = None,
) -> Tensor:
    r"""Subtract the least-squares share of an interference map, and cut at zero.

    .. math:: I = \omega_{rep} M_{rep} + \omega_{out} M_{out}, \quad
              \lambda^* = \mathrm{clamp}(\langle M, I \rangle / \langle I, I \rangle,
              0, \lambda_{max}), \quad M' = \mathrm{ReLU}(M - \lambda^* I)

    The closed form is the exact minimum of Eq. 13, a parabola in lambda. Where I is zero the map
    comes back as it is. Needs maps normalised to [0, 1] (:func:`min_max`), and ``repeated_maps``
    on the same scale: the mask of outliers, the weights and the gate are absolute numbers.

    lambda* is seldom a choice. With M_out alone it is lambda_max if the mean of the outliers is
    at least lambda_max * omega_out (mask), or if lambda_max * omega_out <= 1 (excess): in
    practice always, at the defaults on a normalised map. Only ``repeated_maps`` can lower it.

    Args:
        maps (Tensor): non-negative maps (..., H, W).
        repeated_maps (Tensor, optional): M_rep, the attribution map of the repeated function
            words themselves, non-negative, broadcastable to ``maps``. A (1, 1) tensor holding
            the share of repeated token ids gives the reference code's uniform M_rep. None: no
            word is repeated, and the term is zero. Default: None
        omega_rep (float, optional): weight of M_rep. Default: 0.05
        omega_out (float, optional): weight of M_out. Default: 0.02
        lambda_max (float, optional): the largest share subtracted. Default: 0.5
        outlier_form (str, optional): M_out where M > b = mean + ``outlier_sigmas`` * std:
            ``"mask"`` is 1 there, ``"excess"`` is M - b there, and both are 0 elsewhere. The
            excess follows the map's scale and keeps the order of its pixels; it wants an
            omega_out near 1. Default: ``"mask"``
        outlier_sigmas (float, optional): where outliers begin. Default: 2.0
        gate (bool, optional): touch only the maps that :func:`sicd_gate` names; False touches
            all, as the reference code does. Default: True
        gate_std (float, optional): the gate's bound on the standard deviation. Default: 0.22
        gate_skewness (float, optional): the gate's bound on the skewness. Default: 1.0
        revert_below (float, optional): give a map back unchanged if its range (max - min) would
            fall below this fraction of what it was; None never does. Default: None

    Returns:
        Tensor: same shape and dtype, with 0 <= M' <= M everywhere.

    Raises:
        TypeError, ValueError: maps, repeated maps or settings out of their range.

    Source:
        Diffusion-CAM Eq. 12, 13 and Section 3.2.4 (ReLU, gate, mean + 2 std); M_out is the
        "abnormally high activation mask" of its Figure 3. omega_rep, omega_out and lambda_max,
        which the paper leaves open: its reference code, which also reverts at 0.9
        (``revert_below=0.9``) and whose M_rep is one number for the whole map, not a map.
    """
    caller = "single_instance_causal_debiasing"
    check_maps(maps, caller)
    check_settings(
        caller, _CHECKS, omega_rep=omega_rep, omega_out=omega_out, lambda_max=lambda_max,
        outlier_form=outlier_form, outlier_sigmas=outlier_sigmas, gate_std=gate_std,
        gate_skewness=gate_skewness, revert_below=revert_below,
    )  # fmt: skip
    values = to_working(maps)
    interference = omega_out * _outliers(values, outlier_form, outlier_sigmas)
    if repeated_maps is not None:
        _check_repeated(repeated_maps, maps, caller)
        interference = interference + omega_rep * repeated_maps.detach().to(values.dtype)
    interference = interference.clamp(max=torch.finfo(values.dtype).max)
    strength = _least_squares_share(values, interference, lambda_max)
    cleaned = (values - strength * interference).relu()
    keep = torch.zeros_like(strength, dtype=torch.bool)
    if gate:
        keep = ~_triggered(values, gate_std, gate_skewness)
    if revert_below is not None:
        keep = keep | (_span(cleaned) < revert_below * _span(values))
    return torch.where(keep, values, cleaned).to(maps.dtype)


def _outliers(values: Tensor, form: OutlierForm, sigmas: float) -> Tensor:
    mean, std = mean_std(values)
    bound = mean + sigmas * std
    excess = (values - bound).clamp(min=0)
    return excess if form == "excess" else (values > bound).to(values.dtype)


def _least_squares_share(values: Tensor, interference: Tensor, lambda_max: float) -> Tensor:
    r"""<M, I> / <I, I> clipped to [0, lambda_max], as (..., 1, 1); 0 where I is zero."""
    m, i = peak(values), peak(interference)
    unit = interference / i
    energy = unit.square().sum(dim=(-2, -1), keepdim=True)
    overlap = (values / m * unit).sum(dim=(-2, -1), keepdim=True)
    # Capped because 0 * inf is NaN: a huge map over a tiny interference may have no overlap.
    ratio = (m / i).clamp(max=torch.finfo(values.dtype).max)
    share = overlap / torch.where(energy > 0, energy, torch.ones_like(energy)) * ratio
    return share.clamp(0, lambda_max)


def _triggered(values: Tensor, gate_std: float, gate_skewness: float) -> Tensor:
    _, std = mean_std(values)
    return (std > gate_std) | (skewness(values) > gate_skewness)


def _span(values: Tensor) -> Tensor:
    low = values.amin(dim=(-2, -1), keepdim=True)
    return values.amax(dim=(-2, -1), keepdim=True) - low


def _check_repeated(repeated_maps: Tensor, maps: Tensor, caller: str) -> None:
    if isinstance(repeated_maps, Tensor) and repeated_maps.device != maps.device:
        raise InputError(
            f"{caller}: `repeated_maps` is on {repeated_maps.device} and `maps` on {maps.device}, "
            "expected one device: move it, repeated_maps.to(maps.device)."
        )
    check_maps(repeated_maps, caller, name="repeated_maps")
    own, wanted = tuple(repeated_maps.shape), tuple(maps.shape)
    fits = len(own) <= len(wanted) and all(
        a in (1, b) for a, b in zip(reversed(own), reversed(wanted), strict=False)
    )
    if not fits:
        raise InputError(
            f"{caller}: `repeated_maps` has shape {own}, which does not broadcast to the maps' "
            f"{wanted}: give one map for all, one per map, or a (1, 1) tensor for a uniform one."
        )


@register_refinement("sicd")
@dataclass(frozen=True)
class SICD(NamedRefinement):
    r""":func:`single_instance_causal_debiasing` as a refinement; same settings and defaults.

    ``repeated_maps`` comes from the context; without it only outliers are subtracted.
    """

    needs: ClassVar[frozenset[str]] = frozenset(("repeated_maps",))
    checks = _CHECKS

    omega_rep: float = 0.05
    omega_out: float = 0.02
    lambda_max: float = 0.5
    outlier_form: OutlierForm = "mask"
    outlier_sigmas: float = 2.0
    gate: bool = True
    gate_std: float = 0.22
    gate_skewness: float = 1.0
    revert_below: float | None = None

    def __call__(self, maps: Tensor, context: RefineContext | None = None) -> Tensor:
        r"""Debias maps (..., H, W) in [0, 1]."""
        repeated = None if context is None else context.repeated_maps
        return single_instance_causal_debiasing(maps, repeated, **self._settings())
