"""The tiny model, and a preset file."""

from dataclasses import replace

import pytest
import tiny
from calibration.made_maps import FITTED

from captum_dcam.calibration import fit
from captum_dcam.presets import preset, write_preset


@pytest.fixture(scope="session")
def adapter():
    return tiny.adapter("prefix")


@pytest.fixture
def narrow(monkeypatch):
    """A search that tries few parameters: what it finds is not what is asked."""
    few = {}
    for name, one in fit.PARAMETERS.items():
        wanted = name.startswith(("cba.gamma", "dacg.high_std", "sicd.gate_std"))
        few[name] = replace(
            one,
            tried=one.tried if wanted else (),
            few=one.few[:1],
            statistic=one.statistic if wanted else "",
        )
    monkeypatch.setattr(fit, "PARAMETERS", few)
    monkeypatch.setattr(fit, "SHARES", fit.SHARES[1::3])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "deep" / "mine.json"
    write_preset(path, "default", preset("default"), FITTED, {"seed": 3, "images": [1, "b"]})
    return path
