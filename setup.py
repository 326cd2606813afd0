"""What pyproject.toml cannot say: where the packages are, the version, and the package's page.

The folder ``adapters/`` is installed as ``captum_dcam.adapters``, because a top-level package
``adapters`` would shadow AdapterHub's library of that name. README's links are relative, as the
repository wants them; on the page of a package they lead to the repository at the version's tag.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ADAPTERS = "captum_dcam.adapters"


def stated(name: str, path: str) -> str:
    """The text of an assignment ``name = "…"`` at the start of a line of a file."""
    found = re.search(rf'^{name} = "(.+)"$', (ROOT / path).read_text(encoding="utf-8"), re.M)
    if found is None:
        raise SystemExit(f'{path} has no line {name} = "…"')
    return found[1]


VERSION = stated("__version__", "captum_dcam/__init__.py")
REPOSITORY = stated("Repository", "pyproject.toml")


def absolute(link: re.Match[str]) -> str:
    """A link to a file as the repository shows it; to an image as it is."""
    kind = "raw" if link["image"] else "blob"
    return f"{link['text']}({REPOSITORY}/{kind}/v{VERSION}/{link['path']})"


def page() -> str:
    """README with absolute links."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = r"(?P<text>(?P<image>!)?\[[^\]]*\])\((?!#|\w+:)(?P<path>[^)\s]+)\)"
    return re.sub(relative, absolute, text)


class Modules(build_py):
    """Without the file that stands in the repository for the package :data:`ADAPTERS`."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [one for one in found if f"{one[0]}.{one[1]}" != ADAPTERS]


setup(
    version=VERSION,
    long_description=page(),
    long_description_content_type="text/markdown",
    packages=[
        *find_packages(include=["captum_dcam", "captum_dcam.*"]),
        ADAPTERS,
        *(f"{ADAPTERS}.{name}" for name in find_packages("adapters")),
    ],
    package_dir={ADAPTERS: "adapters"},
    cmdclass={"build_py": Modules},
)
