"""The program as a shell starts it, in this process; and everything that lies in a folder."""

import sys

import pytest

from captum_dcam.cli import app as program


def started(monkeypatch, capsys, *arguments):
    """(exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["captum-dcam", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        program.main()
    out, err = capsys.readouterr()
    return ended.value.code, out, " ".join(err.split())


def lying(folder):
    """Every file and folder with its content: nothing may be left behind, or be gone."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
