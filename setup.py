"""The one thing that pyproject.toml cannot say: find the packages, and map one of them.

The folder ``adapters/`` is installed as ``captum_dcam.adapters``, because a top-level package
``adapters`` would shadow AdapterHub's library of that name.
"""

from setuptools import find_packages, setup

ADAPTERS = "captum_dcam.adapters"

setup(
    packages=[
        *find_packages(include=["captum_dcam", "captum_dcam.*"]),
        ADAPTERS,
        *(f"{ADAPTERS}.{name}" for name in find_packages("adapters")),
    ],
    package_dir={ADAPTERS: "adapters"},
)
