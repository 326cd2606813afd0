r"""The figures of TAM's tables and of those of MSEA and ARC, row by row as they are printed."""

from __future__ import annotations

from captum_dcam.evaluation.published_figures import Printed

_PLAUSIBILITY = ("Obj-IoU", "Func-IoU", "F1-IoU")


def _three(model: str) -> dict[str, str]:
    """The three data sets of TAM's and MSEA+ARC's tables."""
    return {
        "COCO": f"{model}, COCO Caption minival",
        "GranDf": f"{model}, GranDf",
        "OpenPSG": f"{model}, OpenPSG validation set",
    }


#: rows that TAM's Table 3 and the first table of MSEA+ARC print alike
_RIVALS = """
    Grad-CAM          | 21.23 51.93 30.14 | 17.85 62.15 27.74 | 22.93 48.57 31.15
    Grad-CAM++        | 19.52 62.83 29.78 | 17.30 73.42 28.01 | 22.21 59.95 32.41
    Grad-Rollout      | 1.27  99.51 2.51  | 1.40  99.61 2.77  | 1.57  99.58 13.08
    Layer-CAM         | 11.43 84.88 20.15 | 13.11 82.09 22.62 | 14.12 85.29 24.22
    Attention         | 8.20  92.87 15.07 | 9.60  93.56 17.42 | 10.58 94.28 19.03
    Attention-Rollout | 5.74  96.50 10.83 | 7.21  96.65 13.42 | 7.94  97.04 14.68
    CP-LRP            | 9.90  53.97 16.73 | 12.61 53.24 20.39 | 13.30 53.36 21.30
    Attn-LRP          | 9.92  52.41 16.69 | 12.15 52.19 19.72 | 12.78 52.26 20.54
    CAM               | 21.23 51.93 30.14 | 17.85 62.15 27.74 | 22.93 48.57 31.15
    ArchiSurgery      | 15.69 63.82 25.19 | 16.59 62.28 26.20 | 19.83 58.77 29.65
    TAM               | 27.37 68.44 39.10 | 18.65 88.97 30.83 | 26.26 92.99 40.95
"""

TAM = (
    Printed(
        "TAM",
        1,
        {"": "Qwen2-VL-2B, COCO Caption minival"},
        _PLAUSIBILITY,
        """
        neither   | 21.23 51.93 30.14
        ECI       | 22.41 69.03 33.84
        RGF       | 24.82 43.34 31.57
        ECI + RGF | 27.37 68.44 39.10
        """,
    ),
    Printed(
        "TAM",
        2,
        {"": "Qwen2-VL-2B, COCO Caption minival"},
        _PLAUSIBILITY,
        """
        Baseline        | 21.23 51.93 30.14
        Adaptive Median | 25.48 68.20 37.10
        Median Filter   | 26.01 68.26 37.67
        Gaussian Filter | 26.56 67.78 38.16
        Feature surgery | 18.50 48.66 26.81
        ECI-mean        | 27.84 49.85 35.72
        ECI-attnWeights | 27.11 54.61 36.23
        Ours            | 27.37 68.44 39.10
        """,
    ),
    Printed(
        "TAM",
        3,
        _three("Qwen2-VL-2B"),
        _PLAUSIBILITY,
        _RIVALS,
        """
        ArchiSurgery | +4.13 +10.68 +6.12 | +1.41 +26.48 +3.74 | +1.59 +31.92 +5.00
        Grad-CAM++   | +2.83 +3.91  +3.70 | +1.26 +5.39  +2.04 | +2.75 +9.44  +4.30
        Layer-CAM    | +5.04 -7.95  +6.98 | +2.79 +0.52  +4.05 | +6.62 -2.49  +8.95
        CAM          | +6.14 +16.52 +8.96 | +0.79 +26.82 +3.09 | +3.33 +44.42 +9.80
        """,
    ),
    Printed(  # points that TAM gains over CAM
        "TAM",
        4,
        _three("seven models"),
        _PLAUSIBILITY,
        """
        LLaVA1_5-7B       | 4.47 18.27 7.97  | 0.65 11.67 2.47 | 3.47 9.51  5.16
        LLaVA1_5-13B      | 4.30 7.31  5.45  | 0.76 7.03  2.11 | 4.22 11.51 6.37
        InternVL2_5-2B    | 5.44 19.48 8.57  | 2.20 48.29 8.47 | 3.24 40.45 8.65
        InternVL2_5-4B    | 3.53 22.17 7.14  | 1.62 45.19 7.56 | 2.20 55.05 10.85
        InternVL2_5-8B    | 5.38 2.13  6.93  | 3.53 28.53 7.02 | 3.27 26.54 6.44
        Qwen2-VL-2B       | 6.14 16.52 8.96  | 0.79 26.82 3.09 | 3.33 44.49 9.80
        Qwen2-VL-7B       | 5.62 29.40 11.01 | 1.29 22.54 3.40 | 3.53 46.94 11.15
        Mean Improvements | 4.98 16.47 8.01  | 1.55 27.15 4.88 | 3.32 33.50 8.35
        """,
    ),
)

MSEA_ARC = (
    Printed(
        "MSEA+ARC",
        1,
        _three("Qwen2-VL-2B"),
        _PLAUSIBILITY,
        _RIVALS + "Ours | 29.35 91.57 44.45 | 23.32 91.85 37.20 | 29.20 94.69 44.64",
    ),
    Printed(  # CAM and TAM are TAM's Table 6
        "MSEA+ARC",
        2,
        _three("seven models"),
        _PLAUSIBILITY,
        """
        LLaVA1.5-7B: CAM     | 23.17 43.16 30.16 | 20.07 47.48 28.21 | 25.11 51.55 33.77
        LLaVA1.5-7B: TAM     | 27.65 61.43 38.13 | 20.71 59.15 30.68 | 28.57 61.06 38.93
        LLaVA1.5-7B: Ours    | 30.62 87.32 45.34 | 24.79 85.18 38.40 | 32.03 86.80 46.79
        LLaVA1.5-13B: CAM    | 24.82 51.18 33.43 | 21.34 43.99 28.74 | 26.65 48.45 34.39
        LLaVA1.5-13B: TAM    | 29.12 58.50 38.88 | 22.10 51.02 30.84 | 30.88 59.96 40.76
        LLaVA1.5-13B: Ours   | 31.76 97.18 47.87 | 26.08 95.58 40.98 | 32.57 97.32 48.80
        InternVL2.5-2B: CAM  | 15.94 45.62 23.63 | 18.28 37.64 24.61 | 19.76 46.42 27.72
        InternVL2.5-2B: TAM  | 21.38 65.10 32.19 | 20.48 85.93 33.08 | 23.00 86.86 36.36
        InternVL2.5-2B: Ours | 30.61 76.48 43.72 | 24.54 88.93 38.47 | 31.50 91.03 46.81
        InternVL2.5-4B: CAM  | 18.23 40.95 25.23 | 20.91 44.52 28.46 | 21.28 34.70 26.38
        InternVL2.5-4B: TAM  | 21.76 63.12 32.36 | 22.53 89.71 36.02 | 23.49 89.75 37.23
        InternVL2.5-4B: Ours | 31.80 82.73 45.94 | 27.73 94.34 42.86 | 33.52 94.09 49.43
        InternVL2.5-8B: CAM  | 14.59 64.41 23.80 | 18.04 57.42 27.45 | 18.46 62.21 28.47
        InternVL2.5-8B: TAM  | 19.98 66.53 30.73 | 21.56 85.95 34.47 | 21.73 88.74 34.91
        InternVL2.5-8B: Ours | 32.16 73.20 45.25 | 27.00 86.72 41.18 | 33.97 91.11 49.49
        Qwen2-VL-2B: CAM     | 21.23 51.93 30.14 | 17.85 62.15 27.74 | 22.93 48.50 31.15
        Qwen2-VL-2B: TAM     | 27.37 68.44 39.10 | 18.65 88.97 30.83 | 26.26 92.99 40.95
        Qwen2-VL-2B: Ours    | 29.35 91.57 44.45 | 23.32 91.85 37.20 | 29.20 94.69 44.64
        Qwen2-VL-7B: CAM     | 22.51 42.44 29.42 | 18.60 68.03 29.21 | 23.41 42.94 30.30
        Qwen2-VL-7B: TAM     | 28.13 71.85 40.43 | 19.88 90.57 32.61 | 26.94 89.88 41.45
        Qwen2-VL-7B: Ours    | 29.86 94.77 45.41 | 23.53 90.59 37.35 | 29.01 94.33 44.37
        """,
    ),
    Printed(  # Max, Mean: how MSEA aggregates; ARC, TAM, Mean mitigation: what is subtracted
        "MSEA+ARC",
        3,
        {
            "Qwen2-VL-2B": "Qwen2-VL-2B, COCO Caption minival",
            "LLaVA1.5-7B": "LLaVA1.5-7B, COCO Caption minival",
        },
        _PLAUSIBILITY,
        """
        neither         | 24.82 43.34 31.57 | 25.41 39.74 31.00
        Mean mitigation | 27.84 49.85 35.72 | 27.65 61.43 38.13
        TAM             | 27.37 68.44 39.10 | 27.81 66.22 39.17
        ARC             | 27.07 91.43 41.78 | 28.04 85.15 42.19
        Max             | 24.32 63.77 35.21 | 27.49 52.53 36.09
        Mean            | 25.81 63.21 36.65 | 27.59 48.88 35.27
        Max + ARC       | 27.77 91.64 42.63 | 30.12 85.32 44.52
        Mean + ARC      | 29.35 91.57 44.45 | 30.62 87.32 45.34
        """,
    ),
)
