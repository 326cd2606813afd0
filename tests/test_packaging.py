"""The wheel holds every module and all data files, and nothing at top level."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = {"captum_dcam": "captum_dcam", "adapters": "captum_dcam/adapters"}
DATA = (
    "py.typed",
    "evaluation/*.toml",
    "evaluation/tables/*.toml",
    "mini/weights/*",
    "viewer/*.html",
    "viewer/*.css",
    "viewer/*.js",
)


def test_wheel_is_complete(tmp_path: Path):
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    for folder in MODULES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    expected = {
        f"{installed}/{path.relative_to(source / folder).as_posix()}"
        for folder, installed in MODULES.items()
        for path in (source / folder).rglob("*.py")
    }
    package = source / "captum_dcam"
    for pattern in DATA:
        expected |= {path.relative_to(source).as_posix() for path in package.glob(pattern)}

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q"]
    options = ["--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)]
    done = subprocess.run([*pip, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected
