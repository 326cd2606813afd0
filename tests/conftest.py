"""Fixtures that several folders of tests share."""

import os

# Processes of pytest-xdist share the cores: with as many threads each as there are cores they wait
# for one another. Before torch is imported, and for the programs that tests start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

import pytest
import tiny


@pytest.fixture(params=tiny.CACHES)
def cache(request):
    return request.param


@pytest.fixture
def packaged():
    """The packaged weights' folder; skips where the weights are not built yet."""
    from captum_dcam.mini import loading

    if not (loading.WEIGHTS / "model.safetensors").is_file():
        pytest.skip(f"{loading.WEIGHTS} holds no model.safetensors")
    return loading.WEIGHTS
