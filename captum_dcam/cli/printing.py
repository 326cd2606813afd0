r"""What every command prints with: a console, tables for people, JSON for programs, progress."""

from __future__ import annotations

import json
import sys
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich import box
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from captum_dcam.shown import ORDERS, harmless

if TYPE_CHECKING:
    from captum_dcam.evaluation.table import Table as Measured

#: told before every part of the work
Say = Callable[[str], None]
Done = TypeVar("Done")


class _Harmless(RenderHook):
    """Everything that a console prints is harmless; its own colours stay."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Written(one) for one in renderables]


class _Written:
    def __init__(self, inner: ConsoleRenderable) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in console.render(self.inner, options):
            yield part if part.control else Segment(harmless(part.text), part.style)


def console_of(**how: Any) -> Console:
    """A console that shows nothing that a terminal would obey."""
    console = Console(highlight=False, **how)
    console.push_render_hook(_Harmless())
    return console


def print_plain(text: str) -> None:
    """A text on standard output."""
    typer.echo(harmless(text))


def say_on_stderr(text: str) -> None:
    """A line on standard error."""
    typer.echo(harmless(text), err=True)


def run_and_print(
    options: Any,
    run: Callable[[Any], Done],
    document: Callable[[Done], Any],
    show: Callable[[Done], None],
    **how: Any,
) -> Done:
    r"""Do a command's work, print what it gave, and return it.

    Args:
        options (Options): of the command; ``options.json`` asks for JSON, ``options.quiet`` for
            nothing.
        run (callable): the work. What a model's code prints while it runs goes to stderr.
        document (callable): its result as plain data, printed with ``--json``.
        show (callable): prints its result for people.
        **how: of :func:`json.dumps`.
    """
    with redirect_stdout(sys.stderr):
        done = run(options)
    if options.json:
        print_json(document(done), **how)
    elif not options.quiet:
        show(done)
    return done


@contextmanager
def progress(quiet: bool = False) -> Iterator[Say]:
    """A line on stderr that says what is being done; nothing where stderr is no terminal, or with
    ``quiet``."""
    with Console(stderr=True, quiet=quiet).status("Starting") as status:
        yield lambda text: status.update(Text(harmless(f"{text} …")))


def open_page(page: Path) -> None:
    """Show a page in the user's browser; where there is none, say so."""
    if not webbrowser.open(page.resolve().as_uri()):
        say_on_stderr(f"no browser could be opened: open {page} yourself")


def print_json(content: Any, **how: Any) -> None:
    """One JSON document on standard output; ``how`` as :func:`json.dumps` takes it."""
    text = json.dumps(content, indent=1, ensure_ascii=False, **how)
    typer.echo(ORDERS.sub(lambda found: f"\\u{ord(found[0]):04x}", text))  # all inside of texts


def output_console(width: int = 110) -> Console:
    """Standard output; ``width`` columns wide where it is no terminal."""
    console = console_of()
    return console if console.is_terminal else console_of(width=width)


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """One line per fact, its label bold and aligned."""
    for label, text in facts.items():
        console.print(Text.assemble((f"{label:8}", "bold"), text))


def table_of(*columns: str, right: Sequence[str] = (), whole: bool = False) -> Table:
    """An empty table in the style of all.

    Args:
        *columns (str): their heads.
        right (sequence of str, optional): the columns of numbers. Default: none
        whole (bool, optional): whether the first column is never wrapped. Default: False
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(
            name, justify="right" if name in right else "left", no_wrap=name in ("Word", "Or")
        )
    table.columns[0].no_wrap |= whole
    return table


def figure(value: float | None, digits: int) -> str:
    """A number, or a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}"


def score(metric: str, value: float | None) -> str:
    """A localisation score; the contrast, which is no fraction, with fewer digits."""
    return figure(value, 1 if metric == "contrast" else 3)


def show(made: Measured) -> None:
    """Print a table of results; columns without any number are left out."""
    shown = made.shown()
    console = output_console(200)
    console.print(Text(shown.title, style="bold"))
    heads = [shown.first, *(c.head for c in shown.columns)]
    drawn = table_of(*heads, right=heads[1:], whole=True)
    for row in shown.texts():
        drawn.add_row(*map(Text, row))
    console.print(drawn)
    for note in shown.notes:
        console.print(Text(note, style="dim"))
    console.print()
