"""What the command line says of refusals and of its own bugs: one line, or a hint; how it exits."""

import errno
import inspect
import os
import sys

import pytest

from captum_dcam import errors
from captum_dcam.cli import app as program

pytestmark = pytest.mark.usefixtures("weights_read_once")
TREE = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.DcamError)
]
SHORT = ["--gen-length", "8", "-M", "diffusion_cam_base", "-w", "all"]


@pytest.fixture
def run(monkeypatch, capsys):
    """The program as a shell starts it: (exit code, stdout, stderr)."""

    def call(*arguments, **environment):
        monkeypatch.setattr(sys, "argv", ["captum-dcam", *map(str, arguments)])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            program.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


def test_threads_that_wait_give_their_core_away(run, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY")
    run("--version")
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    run("--version", OMP_WAIT_POLICY="active")  # whoever starts it decides
    assert os.environ["OMP_WAIT_POLICY"] == "active"


def raising(monkeypatch, error):
    """``captum-dcam explain`` whose work raises."""

    def work(_options):
        if error is None:
            return [].index(3)
        raise error

    monkeypatch.setattr("captum_dcam.cli.explain.run", work)


@pytest.mark.parametrize("kind", TREE, ids=lambda k: k.__name__)
def test_what_the_library_refuses_is_one_line(kind, run, monkeypatch):
    raising(monkeypatch, kind("the step is 9:\nexpected less"))
    assert run("explain") == (2, "", "Error: the step is 9: expected less\n")


@pytest.mark.parametrize(
    "error",
    [None, ValueError("no"), KeyError("k"), OSError("of nobody"), RuntimeError("no"), TypeError()],
    ids=lambda e: type(e).__name__,
)
def test_a_bug_is_shown_as_one(error, run, monkeypatch):
    raising(monkeypatch, error)
    code, out, err = run("explain")
    assert code == 1 and out == "" and "Error: 3 is not in list" not in err
    name = type(error or ValueError()).__name__
    for text in (name, "error of the program", "--debug", "CAPTUM_DCAM_DEBUG=1", "report"):
        assert text in " ".join(err.split()), text
    assert "Traceback" not in err
    if error is None:
        assert "3 is not in list" in err


@pytest.mark.parametrize("arguments", [["--debug", "explain"], ["explain", "--debug"], ["explain"]])
@pytest.mark.parametrize("error, code", [(None, 1), (errors.InputError("no such step"), 2)])
def test_debug_shows_the_whole_traceback(arguments, error, code, run, monkeypatch):
    raising(monkeypatch, error)
    more = {} if "--debug" in arguments else {"CAPTUM_DCAM_DEBUG": "1"}
    found, _, err = run(*arguments, **more)
    assert found == code and "Traceback" in err and "in work" in err
    assert run("models", "--json")[0] == 0


def test_debug_ends_with_its_run(run, monkeypatch):
    raising(monkeypatch, None)
    assert "Traceback" in run("--debug", "explain")[2]
    assert "Traceback" not in run("explain")[2]


@pytest.mark.parametrize(
    "cause, code",
    [
        (None, 2),
        (errors.PictureError("damaged"), 2),
        (OSError(errno.EIO, "Input/output error"), 2),
        (ValueError("3 is not in list"), 1),
        (RuntimeError("shapes"), 1),
    ],
)
def test_an_image_that_failed_by_a_bug_is_a_bug(cause, code, run, monkeypatch):
    error = errors.EvaluationError("image 'a' (index 0)")
    error.__cause__ = cause
    raising(monkeypatch, error)
    assert run("explain")[0] == code


def test_ctrl_c_is_no_bug(run, monkeypatch):
    raising(monkeypatch, KeyboardInterrupt())
    code, _, err = run("explain")
    assert code in (1, 130) and "program" not in err and "Traceback" not in err


# -- errors of the operating system where the user's files are -------------------------------------


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_names_the_folder(run, monkeypatch, tmp_path):
    monkeypatch.setattr("captum_dcam.files.save_file", full)
    code, _, err = run("compare", *SHORT, "-o", tmp_path / "out")
    assert code == 2 and err.startswith(f"Error: {tmp_path / 'out'}") and err.count("\n") == 1
    assert "No space left on device" in err and "/." not in err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_store_or_the_file(run, monkeypatch, tmp_path):
    monkeypatch.setattr("os.write", full)
    options = ["-M", "oracle", "--data", "count=1", "--generation", "gen_length=4"]
    code, _, err = run("evaluate", *options, "-o", tmp_path / "out")
    assert code == 2 and str(tmp_path / "out") in err and "No space left" in err
    assert err.count("\n") == 1


def test_a_plan_or_preset_that_may_not_be_read_is_one_line(run, monkeypatch, tmp_path):
    from pathlib import Path

    file = tmp_path / "locked.json"
    file.write_text("{}")
    real = Path.read_bytes

    def locked(path, *args, **kwargs):
        if path == file:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_bytes", locked)
    for arguments in (["evaluate", "--plan", file], ["explain", "--preset", file]):
        assert run(*arguments) == (2, "", f"Error: {file}: Permission denied\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "locked/p.png"],
        ["explain", "-o", "locked/out"],
        ["compare", *SHORT, "-o", "locked/out"],
        ["explain", "--preset", "locked/p.json"],
        ["evaluate", "-M", "tam", "-o", "locked/out"],
        ["evaluate", "-M", "oracle", "-d", "folder", "--root", "locked/data", "-p", "?"],
        ["table", "comparison", "-r", "locked/results"],
        ["calibrate", "-o", "locked/p.json"],
    ],
    ids=" ".join,
)
def test_a_folder_that_may_not_be_looked_into_is_one_line(arguments, run, monkeypatch, tmp_path):
    from pathlib import Path

    def locked(real):
        def stat(path, *args, **kwargs):
            if "locked/" in str(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *args, **kwargs)

        return stat

    monkeypatch.chdir(tmp_path)
    for name in ("exists", "is_file", "is_dir"):
        monkeypatch.setattr(Path, name, locked(getattr(Path, name)))
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and err.startswith("Error: ") and err.count("\n") == 1, err
    assert "locked" in err and "Permission denied" in err


def test_a_folder_under_a_file_is_one_line(run, tmp_path):
    from evaluation import made_results

    (tmp_path / "file").write_text("")
    made_results.results(tmp_path / "results", "objects")
    out = tmp_path / "file" / "tables"
    code, _, err = run("table", "comparison", "-r", tmp_path / "results", "-o", out)
    assert code == 2 and str(tmp_path / "file") in err and err.count("\n") == 1


def test_settings_that_others_code_refuses_are_one_line(run):
    code, _, err = run("explain", "--load", "device_map=nowhere")
    assert code == 2 and err.startswith("Error: --load device_map: ") and err.count("\n") == 1
    code, _, err = run("explain", "--seed", 10**30)
    assert code == 2 and err == f"Error: --seed is {10**30}: expected a whole number of 64 bits\n"


def test_weights_that_cannot_be_read_are_one_line(run, monkeypatch):
    def broken(*_args, **_options):
        raise OSError("there is no\nmodel.safetensors")  # as transformers has it

    monkeypatch.setattr("captum_dcam.model.hub.load", broken)
    code, _, err = run("compare", *SHORT, "-m", "folder")
    assert code == 2 and err == "Error: folder: there is no model.safetensors\n"


def test_numbers_that_json_does_not_have_are_one_line(run, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text('{"variants": ["oracle"], "generation": {"temperature": NaN}}')
    for options in (
        ["evaluate", "--plan", plan],
        ["evaluate", "-M", "oracle", "--metrics", "pointing:tolerance=NaN"],
        ["evaluate", "-M", "oracle", "--data", "count=NaN"],
    ):
        code, _, err = run(*options, "-o", tmp_path / "out")
        assert code == 2 and err.count("\n") == 1, err


def test_a_seed_that_no_generator_takes_is_one_line(run, tmp_path):
    for command in ("explain", "compare", "calibrate"):
        code, _, err = run(command, "--seed", 10**20, "-o", tmp_path / "out.json")
        assert (
            code == 2 and err == f"Error: --seed is {10**20}: expected a whole number of 64 bits\n"
        )


def test_a_full_device_is_no_bug(run, monkeypatch, tmp_path):
    import torch

    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr("captum_dcam.explaining.explain_generation", full)
    code, _, err = run("explain", "--gen-length", "4", "-o", tmp_path / "out")
    assert code == 2 and err == "Error: tried to allocate 20 GiB\n"
