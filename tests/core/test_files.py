"""The one writer: all or nothing, and what the system refuses is an error that names the place."""

import errno
import json
import os
import signal

import pytest
import torch

from captum_dcam import errors, files
from captum_dcam.files import (
    check_names,
    exchanged,
    new_entries,
    write_json,
    write_tensors,
    write_text,
    writing,
)
from captum_dcam.results.manifests import check_folder, hashes, new_folder, write_manifest


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("raised", "ours"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errors.FileError),
        (PermissionError(errno.EACCES, "Permission denied"), errors.ForbiddenError),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), errors.NoFolderError),
        (FileExistsError(errno.EEXIST, "File exists"), errors.OccupiedError),
        (FileNotFoundError(errno.ENOENT, "No such file"), errors.MissingFileError),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_the_system_refuses_is_one_error_that_is_both(tmp_path, raised, ours):
    with pytest.raises(ours, match=raised.strerror) as caught, writing(tmp_path / "a"):
        raise raised
    assert str(caught.value).startswith(f"{tmp_path / 'a'} cannot be written: ")
    assert isinstance(caught.value, type(raised)) and isinstance(caught.value, errors.DcamError)
    assert type(caught.value) is ours and caught.value.__cause__ is raised


def test_what_is_no_matter_of_files_passes(tmp_path):
    for error in (
        ZeroDivisionError(),
        BrokenPipeError(),
        errors.MissingFileError("picture.png is missing"),
    ):
        with pytest.raises(type(error)) as caught, writing(tmp_path, tmp_path / "work"):
            raise error
        assert caught.value is error


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"b": "é", "a": [1]})
    assert path.read_bytes() == '{\n "b": "é",\n "a": [\n  1\n ]\n}\n'.encode()
    write_json(path, {"b": 1, "a": 2}, sort_keys=True)
    assert list(json.loads(path.read_text())) == ["a", "b"]
    before = path.read_bytes()
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(errors.FileError, match=r"a\.json cannot be written: .*No space left"):
        write_text(path, "other")
    assert path.read_bytes() == before and os.listdir(path.parent) == ["a.json"]


def test_a_folder_error_names_the_folder_and_not_the_place_it_was_made_in(tmp_path, monkeypatch):
    with pytest.raises(errors.FileError) as caught, new_folder(tmp_path / "out"):
        full()
    assert str(caught.value).startswith(f"{tmp_path / 'out'} cannot be written")
    with pytest.raises(errors.FileError) as caught, new_folder(tmp_path / "out") as new:
        with new_folder(new / "inner") as inner:
            monkeypatch.setattr(os, "write", full)
            write_text(inner / "a.txt", "a")
    assert str(caught.value).startswith(f"{tmp_path / 'out' / 'inner' / 'a.txt'} cannot be written")
    assert not os.listdir(tmp_path)


def test_tensors_that_cannot_be_written_are_a_file_error(tmp_path):
    with pytest.raises(errors.FileError, match="nowhere"):
        write_tensors(tmp_path / "nowhere" / "a.safetensors", {"a": torch.ones(1)})


def test_entries_come_all_or_none(tmp_path):
    targets = [tmp_path / "r" / "pictures", tmp_path / "r" / "tables" / "a.json"]
    with new_entries(targets) as (pictures, table):
        pictures.mkdir()
        write_text(table, "1")
    assert targets[0].is_dir() and targets[1].read_text() == "1"
    more = [tmp_path / "r" / "others", tmp_path / "r" / "tables" / "b.json"]
    with pytest.raises(errors.MissingFileError) as caught, new_entries(more) as (pictures, _):
        pictures.mkdir()
    assert str(caught.value).startswith(f"{tmp_path / 'r'} cannot be written")
    assert not any(path.exists() for path in more)
    assert sorted(os.listdir(tmp_path / "r")) == ["pictures", "tables"]


def result(folder, **more):
    """A folder with a file ``a`` and its manifest."""
    folder.mkdir()
    (folder / "a").write_text("1")
    write_manifest(folder, more)
    return folder


def test_a_folder_is_free_or_holds_an_earlier_result_alone(tmp_path):
    check_folder(tmp_path / "new" / "out")
    check_folder(tmp_path)
    (tmp_path / "word-1-a.png").touch()
    for beside in (False, True):
        with pytest.raises(errors.OccupiedError, match=r"not an earlier .*it holds word-1"):
            check_folder(tmp_path, beside=beside)
    inner = result(tmp_path / "explanation", beside=hashes([tmp_path / "word-1-a.png"]))
    check_folder(inner)
    check_folder(tmp_path, beside=True)
    with pytest.raises(errors.OccupiedError, match="it is not a folder"):
        check_folder(tmp_path / "word-1-a.png")
    with pytest.raises(errors.NoFolderError, match="is not a folder"):
        check_folder(tmp_path / "word-1-a.png" / "out")


def linked(file, folder):
    elsewhere = folder.parent / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


MINE = {
    "a note in the result": (lambda f: (f / "explanation/notes.txt").touch(), "notes.txt"),
    "a note beside it": (lambda f: (f / "notes.txt").touch(), "notes.txt"),
    "a folder": (lambda f: (f / "explanation/more").mkdir(), "more"),
    "a hidden file": (lambda f: (f / ".git").mkdir(), ".git"),
    "an edited file": (lambda f: (f / "explanation/a").write_text("2"), "a was changed"),
    "an edited picture": (lambda f: (f / "sheet.png").write_text("2"), "sheet.png was changed"),
    "an edited manifest": (
        lambda f: (f / "explanation/manifest.json").write_text(
            (f / "explanation/manifest.json").read_text().replace("hm", "oh")
        ),
        "manifest.json is not what was written",
    ),
    "a file of another run": (lambda f: (f / "word-9-b.png").touch(), "word-9-b.png"),
    "a link to a file": (lambda f: linked(f / "explanation/a", f), "a was changed"),
    "a link to a picture": (lambda f: linked(f / "sheet.png", f), "sheet.png was changed"),
    "a link to the result": (lambda f: linked(f / "explanation", f), "a link"),
    "a folder for a file": (
        lambda f: ((f / "explanation/a").unlink(), (f / "explanation/a").mkdir()),
        "a was changed",
    ),
}


@pytest.mark.parametrize("case", MINE)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_is_the_users_is_not_replaced(tmp_path, case, when):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "sheet.png").write_text("1")
    result(folder / "explanation", beside=hashes([folder / "sheet.png"]), prompt="hm")
    change, says = MINE[case]

    def content():
        found = (p for p in tmp_path.rglob("*") if ".new-" not in str(p))
        return sorted((str(p), p.is_symlink()) for p in found)

    if when == "before":
        change(folder)
        before = content()
    with pytest.raises(errors.OccupiedError, match=says):
        with new_folder(folder, beside=True) as new:
            (new / "sheet.png").write_text("new")
            change(folder)
            before = content()
    assert content() == before and not list(tmp_path.glob(".new-*"))


def test_a_file_of_ours_that_the_user_removed_is_no_obstacle(tmp_path):
    folder = result(tmp_path / "out")
    (folder / "a").unlink()
    with new_folder(folder) as new:
        (new / "b").touch()
    assert os.listdir(folder) == ["b"]


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("at", range(6))
def test_the_old_or_the_new_wherever_it_is_interrupted(tmp_path, monkeypatch, swaps, at):
    """Ctrl-C before each change of a name."""
    folder, count = result(tmp_path / "out"), 0

    def interrupted(function):
        def work(*arguments):
            nonlocal count
            count += 1
            if count == at:
                raise KeyboardInterrupt
            done = function(*arguments)
            if count + 1 == at:
                count += 1
                raise KeyboardInterrupt
            return done

        return work

    if not swaps:
        monkeypatch.setattr(files, "exchanged", lambda *_: False)
    monkeypatch.setattr(files, "exchanged", interrupted(files.exchanged))
    monkeypatch.setattr(type(folder), "rename", interrupted(type(folder).rename))
    ended = False
    try:
        with new_folder(folder) as new:
            (new / "b").touch()
    except KeyboardInterrupt:
        ended = True
    names = sorted(os.listdir(folder))
    assert names == ["b"] or (ended and names == ["a", "manifest.json"])
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(os.name != "posix", reason="fork and SIGKILL")
def test_a_killed_swap_leaves_the_old_or_the_new(tmp_path):
    """Killed before and after the system's one step."""
    if not exchanged(result(tmp_path / "one"), result(tmp_path / "two")):
        pytest.skip("this file system does not swap names")
    for when in ("before", "after"):
        folder = result(tmp_path / when)
        child = os.fork()
        if not child:
            real = files.exchanged

            def swap(*paths, when=when, real=real):
                if when == "after":
                    real(*paths)
                os.kill(os.getpid(), signal.SIGKILL)

            try:
                files.exchanged = swap
                with new_folder(folder) as new:
                    (new / "b").touch()
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert sorted(os.listdir(folder)) == (["a", "manifest.json"] if when == "before" else ["b"])


def test_a_linked_folder_stays_a_link(tmp_path):
    result(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link") as new:
        (new / "b").touch()
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "real") == ["b"]


def test_a_text_that_no_file_can_hold_names_the_file(tmp_path):
    with pytest.raises(errors.FileError, match=r"a\.json cannot be written: .*UTF-8"):
        write_json(tmp_path / "a.json", {"prompt": "\udcff"})
    assert not os.listdir(tmp_path)


def test_tensors_have_the_mode_of_their_neighbours(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
        write_text(tmp_path / "b.txt", "b")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("name", ["x" * 256, "ü" * 128, "/".join(["x" * 200] * 30), "a/" * 3000])
def test_names_that_are_too_long_are_refused_before_any_work(tmp_path, name):
    with pytest.raises(errors.FileError, match="File name too long"):
        check_folder(tmp_path / name)
    with pytest.raises(errors.FileError, match="File name too long"):
        check_names(tmp_path / name / "preset.json", 0)
    with pytest.raises(errors.FileError, match="too long"):
        check_names(tmp_path / ("x" * 252), 0)
    with pytest.raises(errors.FileError, match="null"):
        check_folder(tmp_path / "a\0b")
    assert not os.listdir(tmp_path)
