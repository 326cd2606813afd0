"""The tiny model, and a preset file."""

import pytest
import tiny
from calibration.made_maps import FITTED

from captum_dcam.presets import preset, write_preset


@pytest.fixture(scope="session")
def adapter():
    return tiny.adapter("prefix")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "deep" / "mine.json"
    write_preset(path, "default", preset("default"), FITTED, {"seed": 3, "images": [1, "b"]})
    return path
