r"""How good is a map? Pure, batched functions on tensors: no model, no file, no global state.

- Otsu's binarisation: :func:`otsu_threshold`, :func:`binarize_otsu`
- localisation against masks (Eq. 14-17): :func:`obj_iou`, :func:`foreground_background_contrast`,
  :func:`concentration`, :func:`f3_score`, and all four at once: :func:`localization`
- floors and a ceiling to compare with: :func:`random_map`, :func:`center_blob_map`,
  :func:`oracle_map`
- how sure is a mean: :func:`bootstrap_ci`, :func:`paired_bootstrap`

Maps are non-negative, finite floats (..., H, W); masks are booleans at the maps' resolution.
"""

from captum_dcam.metrics.bootstrap import BootstrapInterval, bootstrap_ci, paired_bootstrap
from captum_dcam.metrics.localization_scores import (
    CONTRAST_CAP,
    LocalizationScores,
    concentration,
    f3_score,
    foreground_background_contrast,
    localization,
    obj_iou,
)
from captum_dcam.metrics.otsu import OTSU_BINS, binarize_otsu, otsu_threshold
from captum_dcam.metrics.reference_maps import center_blob_map, oracle_map, random_map

__all__ = [
    "CONTRAST_CAP",
    "OTSU_BINS",
    "BootstrapInterval",
    "LocalizationScores",
    "binarize_otsu",
    "bootstrap_ci",
    "center_blob_map",
    "concentration",
    "f3_score",
    "foreground_background_contrast",
    "localization",
    "obj_iou",
    "oracle_map",
    "otsu_threshold",
    "paired_bootstrap",
    "random_map",
]
