"""What is released: the source distribution, the wheel that it builds, its page, its programs.

CI installs the wheel beside the packages that the tests run with. Where the wheel has an
environment of its own, as in ``python3 start.py test --matrix newest``, the tests run there with
``CAPTUM_DCAM_INSTALLED=1`` and take that one.
"""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path
from shutil import copytree

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = "CAPTUM_DCAM_INSTALLED"
MODULES = {"captum_dcam": "captum_dcam", "adapters": "captum_dcam/adapters"}
DATA = (
    "py.typed",
    "evaluation/*.toml",
    "evaluation/tables/*.toml",
    "mini/weights/*",
    "mini/weights_ar/*",
    "mini/calibrator.json",
    "mini/reliability.json",
    "viewer/*.html",
    "viewer/*.css",
    "viewer/*.js",
)
#: what is made in a checkout, beside what begins with a dot
MADE = {"__pycache__", "build", "dist", "explanation", "runs", "captum_dcam.egg-info"}


def ran(*command: str | Path, folder: Path, **environment: str) -> str:
    """Standard output of a program that must succeed."""
    done = subprocess.run(
        [*map(str, command)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def built(kind: str, source: Path, out: Path) -> Path:
    """What setuptools makes of the project in a folder: a ``wheel`` or an ``sdist``."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    return out / ran(sys.executable, "-c", code, folder=source).splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The repository's files, without what is made in a checkout."""

    def ignored(folder: str, names: list[str]) -> list[str]:
        linked = [n for n in names if Path(folder, n).is_symlink()]
        return linked + [n for n in names if n in MADE or n.startswith(".")]

    return copytree(ROOT, tmp_path_factory.mktemp("made") / "source", ignore=ignored)


@pytest.fixture(scope="module")
def unpacked(source):
    """The source distribution's files: those of the repository."""
    before, out = files(source), source.parent / "sdist"
    made = built("sdist", source, out)
    with tarfile.open(made) as archive:
        archive.extractall(out, filter="data")
    folder = out / made.name.removesuffix(".tar.gz")
    found = {name for name in files(folder) if ".egg-info/" not in name}
    assert found - {"PKG-INFO", "setup.cfg"} == before
    return folder


@pytest.fixture(scope="module")
def wheel(unpacked):
    """The wheel, built from the source distribution."""
    out = unpacked.parents[1] / "wheels"
    return built("wheel", unpacked, out)


def test_tests_run_from_the_source_distribution(unpacked):
    some = ("tests/test_house.py::test_imports_go_down", "tests/metrics/test_pointing.py")
    assert " passed" in ran(sys.executable, "-m", "pytest", "-q", *some, folder=unpacked)


def test_wheel_is_complete(source, wheel):
    expected = {
        f"{installed}/{path.relative_to(source / folder).as_posix()}"
        for folder, installed in MODULES.items()
        for path in (source / folder).rglob("*.py")
    } - {"captum_dcam/adapters.py"}  # stands in the repository for the folder
    package = source / "captum_dcam"
    for pattern in DATA:
        expected |= {path.relative_to(source).as_posix() for path in package.glob(pattern)}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


# -- the page --------------------------------------------------------------------------------------

LINK = r"\]\(\s*<?([^)>\s]+)|(?:src|href)=[\"']([^\"']+)|^\s*\[[^\]]+\]:\s*(\S+)"


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(name).decode())


def test_every_link_of_the_page_is_absolute_and_leads_to_a_file(source, metadata):
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    found = ["".join(m) for m in re.findall(LINK, metadata.get_payload(), re.MULTILINE)]
    assert sum(link.endswith((".png", ".gif")) for link in found) >= 2
    tag = f"v{metadata['Version']}/"
    for link in found:
        assert link.startswith(("#", "https://")), link
        if link.startswith(urls["Repository"]):
            kind, _, path = link.removeprefix(urls["Repository"] + "/").partition("/")
            assert kind == ("raw" if path.endswith((".png", ".gif")) else "blob"), link
            assert (source / path.removeprefix(tag)).is_file() and path.startswith(tag), link


def test_the_metadata_say_what_the_library_runs_on(metadata):
    from captum_dcam import __version__

    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "BSD-3-Clause"
    kinds = metadata.get_all("Classifier")
    minors = [int(k.rpartition(".")[2]) for k in kinds if ":: Python :: 3." in k]
    assert metadata["Requires-Python"] == f">=3.{minors[0]}"
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert "Operating System :: OS Independent" in kinds


# -- the programs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def programs(request, tmp_path_factory):
    """The folder of programs of an environment in which the wheel is installed."""
    if os.environ.get(INSTALLED):
        return Path(sys.executable).parent
    folder = tmp_path_factory.mktemp("environment")
    ran(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    (packages,) = folder.rglob("site-packages")
    others = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (packages / "others.pth").write_text("\n".join(others))
    made = folder / ("Scripts" if os.name == "nt" else "bin")
    options = ["-q", "--ignore-installed", "--no-deps", request.getfixturevalue("wheel")]
    ran(made / "python", "-m", "pip", "install", *options, folder=folder)
    return made


WORK = """
import os, sys
for where, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    os.chdir(where)  # imports look there first
    for name in [n for n in sys.modules if n.partition(".")[0] == "captum_dcam"]:
        del sys.modules[name]
    from captum_dcam.cli.app import app
    from captum_dcam.packages import EXTRAS
    sys.modules.update(dict.fromkeys([*EXTRAS, "skimage"]))  # none can be imported
    for command, *more in (["explain"], ["compare", "-w", "all", "-M", "diffusion_cam,attention"]):
        options = ["--gen-length", "4", "-o", f"{folder}/{command}", *more]
        app([command, *options], standalone_mode=False)
    print("used", sys.modules["captum_dcam"].__file__)
"""
#: whether the work is done in the repository; Python takes the folder there, which has to run as it
#: is
PLACES = (False, True)


@pytest.fixture(scope="module")
def worked(programs, source, tmp_path_factory):
    """By place: the folder of what was written, and the file of the library that did it. One
    process does both, because imports of other packages take longest."""
    made = {inside: tmp_path_factory.mktemp("work") for inside in PLACES}
    where = [
        path for inside in PLACES for path in (source if inside else made[inside], made[inside])
    ]
    said = ran(programs / "python", "-c", WORK, *where, folder=source.parent)
    assert "failed" not in said
    used = re.findall("^used (.*)$", said, re.MULTILINE)
    return dict(zip(PLACES, zip(made.values(), used, strict=True), strict=True))


@pytest.mark.parametrize("inside", PLACES, ids=("elsewhere", "in the repository"))
def test_the_wheel_explains_and_compares(programs, source, worked, inside):
    """Without any package of an extra."""
    folder, used = worked[inside]
    shown = ran(programs / "captum-dcam", "models", "mini", folder=source if inside else folder)
    assert "MiniAdapter" in shown
    assert Path(used).is_relative_to(source) == inside
    assert list((folder / "explain").glob("*.png"))
    assert (folder / "compare" / "panel.png").is_file()
