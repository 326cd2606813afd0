r"""Loading of an SDAR-VL checkpoint, whose code comes with it."""

from __future__ import annotations

from typing import Any

from captum_dcam.adapters.common.remote import remote_model
from captum_dcam.adapters.sdar_vl.facts import CHECKPOINT


def loaded(source: str | None, **options: Any) -> tuple[Any, Any]:
    r"""Model and processor of a checkpoint.

    Args:
        source (str): folder or hub name.
        **options: those of :func:`~captum_dcam.adapters.common.remote.remote_model`.

    Raises:
        RemoteCodeError: remote code is not allowed.
        WeightsError: files are missing, damaged, or without code.
    """
    return remote_model("sdar_vl", source, CHECKPOINT, **options)
