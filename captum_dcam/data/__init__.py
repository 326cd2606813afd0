r"""Data sets with ground truth: synthetic scenes, and readers for real ones.

:func:`dataset` opens one by name; every sample has an image, texts and named masks.
"""

from captum_dcam.data.coco import CocoDataset, write_coco
from captum_dcam.data.common import (
    DATASETS,
    BaseDataset,
    DataProblem,
    Dataset,
    ObjectMask,
    Sample,
    dataset,
    dataset_names,
    register_dataset,
)
from captum_dcam.data.folder import FolderDataset, ImageFolder
from captum_dcam.data.grandf import GrandfDataset
from captum_dcam.data.openpsg import OpenPsgDataset
from captum_dcam.data.scenes import SceneDataset
from captum_dcam.data.tam import TamDataset
from captum_dcam.registry import import_modules

__all__ = [
    "DATASETS",
    "BaseDataset",
    "CocoDataset",
    "DataProblem",
    "Dataset",
    "FolderDataset",
    "GrandfDataset",
    "ImageFolder",
    "ObjectMask",
    "OpenPsgDataset",
    "Sample",
    "SceneDataset",
    "TamDataset",
    "dataset",
    "dataset_names",
    "register_dataset",
    "write_coco",
]

import_modules(__name__, __path__)
