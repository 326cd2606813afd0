"""Fixtures that several folders of tests share."""

import pytest
import tiny


@pytest.fixture(params=tiny.REGIMES)
def regime(request):
    return request.param


@pytest.fixture
def packaged():
    """The packaged weights' folder; skips where the weights are not built yet."""
    from captum_dcam.mini import loading

    if not (loading.WEIGHTS / "model.safetensors").is_file():
        pytest.skip(f"{loading.WEIGHTS} holds no model.safetensors")
    return loading.WEIGHTS
