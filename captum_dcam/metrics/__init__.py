r"""How good is a map? Pure, batched functions on tensors: no model, no file, no global state.

- Otsu's binarisation: :func:`otsu_threshold`, :func:`binarize_otsu`
- localisation against masks (Eq. 14-17): :func:`obj_iou`, :func:`foreground_background_contrast`,
  :func:`concentration`, :func:`f3_score`, and all four at once: :func:`localization`
- pointing: :func:`pointing_game`, :func:`energy_pointing_game`, :func:`bounding_boxes`
- plausibility of objects and function words (TAM Eq. 8-10): :func:`phrase_iou`,
  :func:`function_iou`, :func:`f1_iou`, :func:`plausibility`, :func:`noun_threshold`,
  :func:`joint_min_max`
- sparseness: :func:`gini_index`, :func:`normalized_entropy`, :func:`hoyer`
- does a map localise anything: :func:`map_features`, :class:`Reliability`
- does a score tell true words from invented ones: :func:`ranking`, :func:`auroc`,
  :func:`expected_calibration_error`, :class:`Calibrator`
- floors and a ceiling to compare with: :func:`random_map`, :func:`center_blob_map`,
  :func:`oracle_map`
- how far two maps agree: :func:`agreement`, :func:`rank_correlation`, :func:`top_overlap`,
  :func:`peak_distance`
- how sure is a mean: :func:`bootstrap_ci`, :func:`cluster_bootstrap` (words of images),
  :func:`paired_bootstrap`

Maps are non-negative, finite floats (..., H, W); masks are booleans at the maps' resolution.
"""

from captum_dcam.metrics.agreement import (
    Agreement,
    agreement,
    peak_distance,
    rank_correlation,
    top_overlap,
)
from captum_dcam.metrics.bootstrap import (
    BootstrapInterval,
    bootstrap_ci,
    cluster_bootstrap,
    paired_bootstrap,
)
from captum_dcam.metrics.calibrator import SCORE_FEATURES, Calibrator
from captum_dcam.metrics.localization_scores import (
    CONTRAST_CAP,
    LocalizationScores,
    bounding_boxes,
    concentration,
    energy_pointing_game,
    f3_score,
    foreground_background_contrast,
    localization,
    obj_iou,
    pointing_game,
)
from captum_dcam.metrics.otsu import OTSU_BINS, binarize_otsu, otsu_threshold
from captum_dcam.metrics.plausibility import (
    PlausibilityScores,
    f1_iou,
    function_iou,
    joint_min_max,
    noun_threshold,
    phrase_iou,
    plausibility,
)
from captum_dcam.metrics.ranking import Ranking, auroc, expected_calibration_error, ranking
from captum_dcam.metrics.reference_maps import center_blob_map, oracle_map, random_map
from captum_dcam.metrics.reliability import (
    MAP_FEATURES,
    Reliability,
    gini_index,
    hoyer,
    map_features,
    normalized_entropy,
)

__all__ = [
    "CONTRAST_CAP",
    "MAP_FEATURES",
    "OTSU_BINS",
    "SCORE_FEATURES",
    "Agreement",
    "BootstrapInterval",
    "Calibrator",
    "LocalizationScores",
    "PlausibilityScores",
    "Ranking",
    "Reliability",
    "agreement",
    "auroc",
    "binarize_otsu",
    "bootstrap_ci",
    "bounding_boxes",
    "center_blob_map",
    "cluster_bootstrap",
    "concentration",
    "energy_pointing_game",
    "expected_calibration_error",
    "f1_iou",
    "f3_score",
    "foreground_background_contrast",
    "function_iou",
    "gini_index",
    "hoyer",
    "joint_min_max",
    "localization",
    "map_features",
    "normalized_entropy",
    "noun_threshold",
    "obj_iou",
    "oracle_map",
    "otsu_threshold",
    "paired_bootstrap",
    "peak_distance",
    "phrase_iou",
    "plausibility",
    "pointing_game",
    "random_map",
    "rank_correlation",
    "ranking",
    "top_overlap",
]
