r"""The figures of Diffusion-CAM's tables, row by row as they are printed, and the form of all such.

Shares and scores are percent throughout (Diffusion-CAM prints fractions in its Tables 5 to 9, 11
and 12), contrast is a ratio, and a column ``X ±`` is the spread printed behind X. A line of
``Printed.rows`` is a row's label, then one group of numbers after every bar; ``-``: nothing is
printed. Labels are the papers', shortened where they hold a citation or a year.
"""

from __future__ import annotations

from typing import NamedTuple

#: short name → the paper
PAPERS = {
    "Diffusion-CAM": "Diffusion-CAM, ACL 2026",
    "TAM": "TAM, Li et al., ICCV 2025",
    "MSEA+ARC": "MSEA+ARC, Liang et al. 2025",
}


class Printed(NamedTuple):
    r"""A printed table.

    Args:
        paper (str): key of :data:`PAPERS`.
        number (int): the table's.
        groups (dict): part of the table, as the name's end (empty: the table has one part) → model
            and data.
        columns (tuple of str): of every group.
        rows (str): label and numbers, see above.
        gains (str): rows that print a gain over the row of the same label. They are looked up as
            ``<label> + Ours``, base and gain added. Default: none
    """

    paper: str
    number: int
    groups: dict[str, str]
    columns: tuple[str, ...]
    rows: str
    gains: str = ""


_LOCALIZATION = ("Obj-IoU", "Contrast", "Concentration", "F3")
_SPREAD = (
    *("Contrast", "Contrast ±", "Concentration", "Concentration ±"),
    *("Obj-IoU", "Obj-IoU ±", "F3", "F3 ±"),
)
_GATING = (
    *("Obj-IoU", "Obj-IoU ±", "Contrast", "Contrast ±", "Concentration", "Concentration ±"),
    *("F3", "F3 ±", "high_var", "high_mean", "low_mean", "default"),
)
_COCO_200 = {"": "LaViDa, 200 images of COCO"}


DIFFUSION_CAM = (
    Printed(
        "Diffusion-CAM",
        1,
        {"COCO": "LaViDa, COCO Caption", "GranDf": "LaViDa, GranDf"},
        _LOCALIZATION,
        """
        LLaVA-CAM     | 20.02 2.18 41.22 18.08 | 18.16 1.41 70.80 14.22
        Grad-CAM      | 19.93 2.04 41.91 17.43 | 17.82 1.48 75.42 14.67
        TAM           | 15.21 2.51 40.10 17.61 | 20.39 1.36 67.31 14.23
        Diffusion-CAM | 30.10 2.58 51.41 23.04 | 28.41 2.02 86.14 20.53
        """,
    ),
    Printed(
        "Diffusion-CAM",
        2,
        {"": "LaViDa, COCO Caption"},
        _LOCALIZATION,
        """
        Baseline      | 20.12 2.19 41.42 18.16
        + Denoising   | 25.85 2.28 44.01 20.16
        + Gating      | 21.22 2.20 47.94 18.88
        + Attenuation | 21.42 2.41 42.63 19.59
        + Debiasing   | 24.11 2.29 44.31 19.82
        Full          | 30.10 2.58 51.44 23.04
        """,
    ),
    Printed(
        "Diffusion-CAM",
        3,
        {"": "LaViDa, COCO Caption"},
        ("Obj-IoU", "Contrast", "F3"),
        """
        LLaVA-CAM: layer 10     | 20.02 2.18 18.07
        LLaVA-CAM: layer 20     | 13.01 1.44 11.51
        LLaVA-CAM: layer 25     | 16.09 1.19 10.56
        LLaVA-CAM: layer 29     | 17.16 1.00 10.04
        Diffusion-CAM: layer 10 | 30.10 2.58 23.04
        Diffusion-CAM: layer 20 | 29.62 1.58 15.44
        Diffusion-CAM: layer 25 | 22.37 1.22 12.23
        Diffusion-CAM: layer 29 | 19.08 1.03 10.86
        """,
    ),
    Printed(
        "Diffusion-CAM",
        4,
        {"": "LaViDa with cached prefix, 200 images, 6600 calls"},
        ("feat_len", "img_end", "Valid"),  # Valid: 1 for PASS, 0 for FAIL
        """
        t = 0    | 579 551 1
        t = S/4  | 64  551 0
        t = S/2  | 64  551 0
        t = 3S/4 | 64  551 0
        """,
    ),
    Printed(
        "Diffusion-CAM",
        5,
        {"": "LaViDa with cached prefix, 200 images"},
        ("Valid", "Images", *_SPREAD),
        """
        t = 0    | 200 200 2.549 0.126 50.69 1.741 30.7 2.4 23.4 1.8
        t = S/4  | 0   200 - - - - - - - -
        t = S/2  | 0   200 - - - - - - - -
        t = 3S/4 | 0   200 - - - - - - - -
        """,
    ),
    Printed(
        "Diffusion-CAM",
        6,
        _COCO_200,
        _GATING,
        """
        0.18 | 20.1 2.1 2.29 0.13 41.89 2.044 19.2 1.3 36.4 14.1 47.2 3.3
        0.20 | 20.8 1.7 2.38 0.08 42.77 2.041 19.4 1.2 27.8 16.6 50.8 4.8
        0.22 | 21.5 1.5 2.44 0.12 43.21 2.037 19.6 1.1 22.1 19.3 53.4 5.2
        0.24 | 20.6 1.9 2.39 0.12 42.69 2.039 19.3 1.5 18.6 21.0 54.9 5.6
        0.26 | 20.2 2.5 2.30 0.14 42.01 2.049 19.2 1.1 15.1 22.3 56.4 6.2
        """,
    ),
    Printed(
        "Diffusion-CAM",
        7,
        _COCO_200,
        _GATING,
        """
        0.28 | 19.9 2.4 2.30 0.15 41.75 2.121 19.2 3.7 14.7 37.2 45.2 2.9
        0.32 | 20.5 2.2 2.36 0.18 42.41 2.132 19.4 3.4 19.2 26.4 49.8 4.6
        0.35 | 21.5 1.5 2.44 0.12 43.21 2.037 19.6 1.1 22.1 19.3 53.4 5.2
        0.38 | 20.7 2.7 2.35 0.19 42.60 2.054 19.4 3.1 25.6 11.8 57.2 5.4
        0.42 | 20.1 2.5 2.32 0.19 42.01 2.173 19.3 3.9 29.3 3.1  61.7 5.9
        """,
    ),
    Printed(
        "Diffusion-CAM",
        8,
        _COCO_200,
        _GATING,
        """
        0.20 | 19.8 2.5 2.28 0.22 40.81 2.201 19.2 1.2 26.0 23.5 43.6 6.9
        0.23 | 20.4 2.3 2.31 0.19 42.07 2.147 19.4 1.3 23.4 20.7 49.9 6.0
        0.25 | 21.5 1.5 2.44 0.12 43.21 2.037 19.6 1.1 22.1 19.3 53.4 5.2
        0.28 | 20.9 2.1 2.39 0.17 42.61 2.094 19.5 1.5 19.2 16.8 60.2 3.8
        0.30 | 20.2 3.1 2.25 0.24 41.98 2.188 19.3 1.3 14.9 13.4 69.3 2.4
        """,
    ),
    Printed(
        "Diffusion-CAM",
        9,
        _COCO_200,
        _GATING,
        """
        Dynamic      | 21.5 1.5 2.44 0.12 43.21 2.037 19.6 1.1 22.1 19.3 53.4 5.2
        All α − 5    | 20.1 2.2 2.28 0.26 41.77 2.111 19.3 0.8 22.1 19.3 53.4 5.2
        All α + 5    | 20.3 1.7 2.32 0.28 41.62 2.102 19.3 1.3 22.1 19.3 53.4 5.2
        Fixed α = 85 | 19.7 1.9 2.23 0.23 41.05 1.966 19.2 0.9 22.1 19.3 53.4 5.2
        """,
    ),
    Printed(
        "Diffusion-CAM",
        10,
        {"": "LaViDa, 200 images, NVIDIA H20; modules on the CPU"},
        ("Time (ms)",),
        """
        Base attribution pass | 4880.8
        AKD                   | 12.7
        DACG                  | 6.9
        CBA                   | 5.6
        SICD                  | 10.2
        Total post-processing | 35.4
        """,
    ),
    Printed(
        "Diffusion-CAM",
        11,
        {"": "LaViDa, 200 images, NVIDIA H20"},
        ("Time (ms)", "Peak Mem (GB)", "F3"),
        """
        Diffusion-CAM (base) | 4880.8 83.21 18.8
        Base + AKD           | 4893.8 83.21 20.7
        Base + DACG          | 4887.0 83.21 18.7
        Base + CBA           | 4886.3 83.21 19.0
        Base + SICD          | 4891.1 83.21 19.5
        Diffusion-CAM (full) | 4914.4 83.21 22.5
        """,
    ),
    Printed(
        "Diffusion-CAM",
        12,
        {"": "LaViDa, 200 images of COCO, teacher-forced"},
        _SPREAD,
        """
        concise  | 2.3546 0.1133 43.56 1.968 23.42 1.53 19.42 0.71
        original | 2.1905 0.1219 41.31 2.029 20.86 1.66 18.46 0.85
        verbose  | 2.1266 0.1286 39.17 2.031 19.69 1.55 18.29 0.87
        repeated | 2.0985 0.1300 39.01 2.027 19.08 1.38 18.11 0.92
        """,
    ),
)
