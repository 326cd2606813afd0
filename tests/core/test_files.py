"""The one writer: all or nothing, and what the system refuses is an error that names the place."""

import errno
import json
import os

import pytest
import torch

from captum_dcam import errors
from captum_dcam.files import (
    check_folder,
    new_entries,
    new_folder,
    write_json,
    write_tensors,
    write_text,
    writing,
)


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


def test_a_folder_is_free_or_holds_an_earlier_result_alone(tmp_path):
    check_folder(tmp_path / "new" / "out")
    check_folder(tmp_path)
    (tmp_path / "word-1-a.png").touch()
    for beside in (None, r"word-\d+-.*\.png"):
        with pytest.raises(errors.OccupiedError, match=r"not an earlier .*it holds word-1"):
            check_folder(tmp_path, beside=beside)
    (tmp_path / "explanation").mkdir()
    (tmp_path / "explanation" / "manifest.json").touch()
    check_folder(tmp_path, beside=r"word-\d+-.*\.png")
    with pytest.raises(errors.OccupiedError, match="it is not a folder"):
        check_folder(tmp_path / "word-1-a.png")
    with pytest.raises(errors.NoFolderError, match="is not a folder"):
        check_folder(tmp_path / "word-1-a.png" / "out")
