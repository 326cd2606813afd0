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
    Span,
    dataset,
    dataset_names,
    register_dataset,
)
from captum_dcam.data.degraded import DegradedScenes
from captum_dcam.data.flickr30k import Flickr30kDataset
from captum_dcam.data.folder import FolderDataset, ImageFolder
from captum_dcam.data.grandf import GrandfDataset
from captum_dcam.data.halloc import HallocDataset
from captum_dcam.data.openpsg import OpenPsgDataset
from captum_dcam.data.refcoco import RefcocoDataset
from captum_dcam.data.repope import RepopeDataset
from captum_dcam.data.scenes import SceneDataset
from captum_dcam.data.spans import SpanSample, SpansDataset, write_spans
from captum_dcam.data.tam import TamDataset
from captum_dcam.registry import import_modules

__all__ = [
    "DATASETS",
    "BaseDataset",
    "CocoDataset",
    "DataProblem",
    "Dataset",
    "DegradedScenes",
    "Flickr30kDataset",
    "FolderDataset",
    "GrandfDataset",
    "HallocDataset",
    "ImageFolder",
    "ObjectMask",
    "OpenPsgDataset",
    "RefcocoDataset",
    "RepopeDataset",
    "Sample",
    "SceneDataset",
    "Span",
    "SpanSample",
    "SpansDataset",
    "TamDataset",
    "dataset",
    "dataset_names",
    "register_dataset",
    "write_coco",
    "write_spans",
]

import_modules(__name__, __path__)
