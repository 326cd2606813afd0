"""Two commands for a machine that has only Python and git, and four for who changes the library.

python3 start.py explain    explain an image with the embedded model
python3 start.py test       run every check of the library: lint, format, types, tests, a smoke
                            test of the newest transformers; --matrix NAME: the tests in another
                            environment, of tests/environments (several GB each)
python3 start.py referees   run the tests whose judge is other people's code (several GB)
python3 start.py docs       build the documentation site into build/site
python3 start.py notebooks  run the tutorials and keep what they show; --check: what would change
python3 start.py attacks    run every case of bad input, 50 rounds of threads, 10,000 damages to
                            saved things; `test` runs a part of them (ten minutes)

Each makes a virtual environment of its own beside this file (.venv-explain, .venv-test), installs
the library there with the versions of constraints.txt, and uses it again the next time.
Arguments unknown here go on to `captum-dcam explain`, to pytest, to benchmarks/notebooks.py or to
benchmarks/referees.py; after `--` all of them do.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import Request, url2pathname, urlopen

if sys.version_info < (3, 10):  # noqa: UP036 - whoever has an older one is told so
    sys.exit(
        "captum-dcam needs Python 3.10 or newer; {} is {}.{}.{}.\n"
        "Run this file with a newer one, for example: python3.11 start.py explain".format(
            sys.executable, *sys.version_info[:3]
        )
    )

ROOT = Path(__file__).resolve().parent
REQUIREMENTS = {  # of each environment, as pip takes them
    "explain": ["-c", "constraints.txt", "-e", "."],
    "test": ["-c", "constraints.txt", "-e", ".[test,dev]"],
    "referees": ["-r", "tests/referees.txt", "-e", ".[test]"],
    "docs": ["-c", "constraints.txt", "-e", ".[docs,eval]"],
}
#: installed without what they require: what lxt's rules import is torch alone
ALONE = {"test": ["lxt==2.1"]}
CHECKS = {  # the only list of the checks: the Makefile and CI come here
    "lint": ["ruff", "check", "."],
    "format": ["ruff", "format", "--check", "."],
    "type": ["mypy"],
    "pytest": ["pytest", "-q", "-n", "2", "--dist", "worksteal"],
}
COMMANDS = ["explain", "test", "docs", "notebooks", "referees", "attacks", "install"]
#: the last check, which is no module that Python runs
NEWEST = "newest"


def say(line: str) -> None:
    print(f"==> {line}", flush=True)


def require_venv() -> None:
    """Stop with advice where this Python cannot make virtual environments."""
    missing = [name for name in ("venv", "ensurepip") if find_spec(name) is None]
    if missing:
        sys.exit(
            f"This Python cannot make virtual environments: it lacks {' and '.join(missing)}.\n"
            "On Debian or Ubuntu: sudo apt install python3-venv\n"
            "Elsewhere: install Python from your system's packages or from python.org."
        )


def offered(pip: list[str], requirement: str) -> dict[str, tuple[str, str]]:
    """What pip would install for a requirement: name → (version, address). Nothing is installed;
    empty where pip finds none, or is older than 22.2 and cannot tell."""
    command = [*pip, "--dry-run", "--ignore-installed", "--quiet", "--report", "-", requirement]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        items = json.loads(done.stdout)["install"]
    except ValueError:  # it has failed
        return {}
    return {
        item["metadata"]["name"]: (item["metadata"]["version"], item["download_info"]["url"])
        for item in items
    }


UNTOLD = (OSError, HTTPException, TypeError, ValueError)  # no answer, none with a size, no address


def size(address: str) -> int:
    """Bytes of a file that pip would take; one of UNTOLD where its server does not tell."""
    if address.startswith("file:"):
        return os.path.getsize(url2pathname(urlparse(address).path))
    with urlopen(Request(address, method="HEAD"), timeout=10) as answer:
        return int(answer.headers["Content-Length"])


def torch_for(pip: list[str]) -> list[str]:
    """The torch to ask pip for, after saying what there is to download: a build for the CPU alone
    where pip finds one and there is no NVIDIA GPU; else what pip takes by itself."""
    found, asked = offered(pip, "torch"), []
    gpu = shutil.which("nvidia-smi") is not None
    if not found:
        say("There are several hundred MB to download, several GB with torch for CUDA")
        return []
    version = found["torch"][0]
    if not gpu and not version.endswith("+cpu"):
        small = f"torch=={version.partition('+')[0]}+cpu"
        if fitting := offered(pip, small):
            found, asked = fitting, [small]
    try:
        total = f"{sum(size(address) for _, address in found.values()) / 1e6:.0f} MB"
    except UNTOLD:
        total = "of unknown size"
    say(
        f"There are {len(found)} packages to download for torch {found['torch'][0]}, {total}, and "
        "100 to 200 MB for everything else"
    )
    if not gpu and any(name.startswith("nvidia") for name in found):
        say(
            "This torch is for CUDA, and there is no NVIDIA GPU: a build for the CPU is much "
            "smaller, but pip finds none here. Tell pip of an index that has one, as PyTorch's "
            "page on installing says, with PIP_EXTRA_INDEX_URL, and start again with --fresh"
        )
    return asked


def fingerprint(requirements: list[str]) -> str:
    """Changes whenever an environment has to be made anew."""
    digest = hashlib.sha256(f"{ROOT} {sys.version} {requirements}".encode())
    for name in ("pyproject.toml", "setup.py", requirements[1]):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def environment(name: str, fresh: bool) -> Path:
    """The folder of programs of the environment `name`, which is made first where need be."""
    folder = ROOT / f".venv-{name}"
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    stamp = folder / "complete"
    requirements, alone = REQUIREMENTS[name], ALONE.get(name, [])
    wanted = fingerprint([*requirements, *alone])
    if not fresh and stamp.is_file() and stamp.read_text() == wanted:
        say(f"Using the environment in {folder.name}")
        return programs
    began = time.monotonic()
    if folder.exists():
        say(f"Removing the old {folder.name}")
        shutil.rmtree(folder)
    say(f"Making a virtual environment in {folder.name}")
    run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(programs / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
    # the referees' torchvision has to be of the same build as torch: pip takes both as they come
    torch = [] if name == "referees" else torch_for([*pip, *requirements[:2]])
    several = " (several GB)" if name == "referees" else ""
    say(f"Installing captum-dcam and what it needs{several}; a few minutes")
    run([*pip, *requirements, *torch], check=True)
    if alone:
        run([*pip, "--no-deps", *alone], check=True)
    stamp.write_text(wanted)
    say(f"Installed in {time.monotonic() - began:.0f} s")
    return programs


def run(command: list[str], folder: Path = ROOT, check: bool = False, **variables: str) -> int:
    """Run a command in `folder`, with more environment variables; with `check`, its failure ends
    this program too."""
    own = {**os.environ, **variables}
    code = subprocess.run(command, cwd=folder, check=False, env=own).returncode
    if check and code:
        print(f"{' '.join(command)}: failed with exit code {code}", file=sys.stderr)
        sys.exit(code)
    return code


def explain(programs: Path, arguments: list[str]) -> int:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--output", type=Path, default=Path("explanation"))
    options, others = own.parse_known_args(arguments)
    output = options.output.resolve()
    began = time.time() - 2  # some file systems count in steps of two seconds
    command = [str(programs / "captum-dcam"), "explain", "--output", str(output), *others]
    say(f"Running {' '.join(command)}")
    code = run(command, Path.cwd())
    for file in [output] if output.is_file() else sorted(output.glob("*")):
        if file.suffix in (".png", ".html") and file.stat().st_mtime >= began:
            say(f"Look at {file}")
    return code


def quiet_threads() -> None:
    # Two workers: more threads in each would only get in one another's way. Threads that wait give
    # their core away: spinning ones, beside another busy process, make all of it many times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def newest(programs: Path) -> int:
    """A smoke test beside the newest transformers, and what it requires, that pip finds."""
    python = str(programs / "python")
    with tempfile.TemporaryDirectory() as folder:
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        code = run([*pip, "--target", folder, "transformers"])
        if code:
            return code
        version = "import transformers as t; print('transformers', t.__version__)"
        run([python, "-c", version], PYTHONPATH=folder)
        out = str(Path(folder) / "explanation")
        explained = [python, "-m", "captum_dcam", "explain", "--output", out]
        return run(explained, PYTHONPATH=folder)


def test(programs: Path, arguments: list[str], only: list[str] | None) -> int:
    quiet_threads()
    failed = {}
    for name in only or [*CHECKS, NEWEST]:
        if name == NEWEST:
            say(f"{name}: captum-dcam explain, beside the newest transformers")
            if code := newest(programs):
                failed[name] = code
            continue
        module, *options = CHECKS[name]
        command = [module, *options, *(arguments if name == "pytest" else [])]
        say(f"{name}: {' '.join(command)}")
        code = run([str(programs / "python"), "-m", *command])
        if code:
            failed[name] = code
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return next(iter(failed.values()), 0)


def docs(programs: Path, arguments: list[str]) -> int:
    """The site, from nothing; a warning is an error."""
    site = ROOT / "build" / "site"
    shutil.rmtree(site, ignore_errors=True)
    sphinx = [str(programs / "python"), "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q"]
    code = run([*sphinx, "-d", str(ROOT / "build" / "doctrees"), *arguments, "docs", str(site)])
    if not code:
        say(f"Look at {site / 'index.html'}")
    return code


def attacks(programs: Path, arguments: list[str]) -> int:
    quiet_threads()
    os.environ["CAPTUM_DCAM_EVERY_CASE"] = "1"
    module, *options = CHECKS["pytest"]
    cases = ["tests/bad_input", "tests/test_bad_input.py", "tests/core/test_threads.py"]
    code = run([str(programs / "python"), "-m", module, *options, *cases, *arguments])
    return code or run([str(programs / "python"), "benchmarks/damages.py", "--count", "10000"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--fresh", action="store_true", help="make the environment anew")
    parser.add_argument(
        "--only", action="append", choices=[*CHECKS, NEWEST], help="test: run just this check"
    )
    parser.add_argument(
        "--matrix", metavar="NAME", help="test: in an environment of tests/environments, or all"
    )
    own = sys.argv[1:]
    passed: list[str] = []
    if "--" in own:
        cut = own.index("--")
        own, passed = own[:cut], own[cut + 1 :]
    options, unknown = parser.parse_known_args(own)
    arguments = unknown + passed
    require_venv()
    if options.command == "explain":
        return explain(environment("explain", options.fresh), arguments)
    if options.command == "docs":
        return docs(environment("docs", options.fresh), arguments)
    if options.command == "referees":
        quiet_threads()
        python = environment("referees", options.fresh) / "python"
        return run([str(python), "benchmarks/referees.py", *arguments])
    if options.matrix:
        return run([sys.executable, "benchmarks/matrix.py", options.matrix, *arguments])
    programs = environment("test", options.fresh)
    if options.command == "attacks":
        return attacks(programs, arguments)
    if options.command == "notebooks":
        quiet_threads()
        return run([str(programs / "python"), "benchmarks/notebooks.py", *arguments])
    return 0 if options.command == "install" else test(programs, arguments, options.only)


if __name__ == "__main__":
    sys.exit(main())
