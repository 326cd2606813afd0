r"""Put the tables of stored results into docs/PAPERS.md, each between its marks.

    captum-dcam evaluate --suite papers --data count=2400 --start 2300 --limit 20 -o runs/papers
    python benchmarks/results.py --results runs/papers

A line ``<!-- table: NAME -->`` begins a table, ``<!-- end -->`` ends it; what stands between is
replaced, everything else is left as it is written.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from captum_dcam.evaluation.tables import Results, table

DOCUMENT = Path(__file__).parents[1] / "docs" / "PAPERS.md"
BLOCK = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def main(
    results: Annotated[Path, typer.Option(help="Folder of captum-dcam evaluate.")] = Path(
        "runs/papers"
    ),
    document: Annotated[Path, typer.Option()] = DOCUMENT,
) -> None:
    """Rewrite the tables of a document."""
    read = Results(results)

    def made(match: re.Match[str]) -> str:
        body = table(match[1], read).markdown()
        return f"<!-- table: {match[1]} -->\n{body}<!-- end -->"

    text, count = BLOCK.subn(made, document.read_text(encoding="utf-8"))
    document.write_text(text, encoding="utf-8")
    print(f"{count} tables in {document}")


if __name__ == "__main__":
    typer.run(main)
