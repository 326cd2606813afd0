"""What others wrote is shown and moves nothing: on a terminal, in Markdown, in a spreadsheet; and
what ends a run leaves nothing hidden and says so."""

import csv
import io
import json
import os
import signal
import sys
from dataclasses import replace

import pytest
import tiny
from bad_input.program import started

import captum_dcam
from captum_dcam.cli import app as program
from captum_dcam.cli import evaluate as evaluate_command
from captum_dcam.cli import explain as explain_command
from captum_dcam.cli import printing
from captum_dcam.evaluation import Live, Store
from captum_dcam.evaluation.table import Column, Figure, Table
from captum_dcam.results.manifests import new_folder
from captum_dcam.shown import harmless, in_markdown, no_formula

RED = "\x1b[31mred\x1b[0m"
ORDERS = {
    "colour": (RED, r"\x1b[31mred\x1b[0m"),
    "a title": ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
    "a clear screen": ("\x1b[2J\x1b[H", r"\x1b[2J\x1b[H"),
    "a return": ("safe\rowned", r"safe\x0downed"),
    "backspaces": ("ab\b\b", r"ab\x08\x08"),
    "a tab": ("a\tb", r"a\x09b"),
    "eight bits": ("\x9b31m", r"\x9b31m"),
    "delete": ("\x7f", r"\x7f"),
    "the other direction": ("\u202etxt.exe", r"\u202etxt.exe"),
    "an isolate": ("\u2066a\u2069", r"\u2066a\u2069"),
    "no text": ("\udcff", r"\udcff"),
}


@pytest.mark.parametrize("case", ORDERS)
def test_orders_are_written_out(case):
    given, shown = ORDERS[case]
    assert harmless(given) == shown
    assert harmless("ein Ölbild,\n中文 🎨") == "ein Ölbild,\n中文 🎨"


@pytest.fixture
def explained(monkeypatch, capsys, tmp_path):
    """The program, whose model is tiny and answers with a text."""

    def call(*arguments, answer=None):
        def written(options, _adapter, pictures, _say, _layer=None):
            forward = captum_dcam.DenoisingForward(tiny.adapter("prefix"), 1)
            request = forward.adapter.prepare([pictures], [options.prompt])
            forward.generate(request, gen_length=4)
            return forward

        monkeypatch.setattr("captum_dcam.cli.parsing.written", written)
        for name in ("write_folder", "write_comparison"):  # pictures show no text of others here
            monkeypatch.setattr(f"captum_dcam.viewer.{name}", lambda _found, folder, **_: folder)
        if answer is not None:
            texts = lambda _self, ids: [answer] * len(ids)  # noqa: E731
            monkeypatch.setattr("captum_dcam.adapters.mini.MiniAdapter.token_texts", texts)
        monkeypatch.chdir(tmp_path)
        return started(monkeypatch, capsys, *arguments)

    return call


@pytest.mark.parametrize("how", ((), ("--json",)))
@pytest.mark.parametrize("command", ("explain", "compare"))
def test_prompts_names_and_answers_reach_no_terminal(explained, tmp_path, command, how):
    tiny.picture().save(tmp_path / f"{RED}.png")
    methods = ("-M", "diffusion_cam_base") if command == "compare" else ()
    line = (command, f"{RED}.png", "-p", f"what {RED} ?", "-w", "all", "-o", f"out{RED}")
    code, out, err = explained(*line, *methods, *how, answer=f" {RED}")
    assert code == 0, err
    assert "\x1b" not in out + err and "[31mred" in out
    if how:
        found = json.loads(out)
        assert (
            RED in found["prompt"] and found["picture"] == f"{RED}.png" and RED in found["answer"]
        )


def test_errors_reach_no_terminal(explained):
    for line in (
        ("explain", f"{RED}.png"),
        ("explain", "--preset", f"{RED}.json"),
        ("explain", "--generation", RED),
        ("compare", RED),
        ("view", "a", RED),
        ("explain", f"--{RED}"),
        (RED,),
        ("table", RED),
    ):
        code, out, err = explained(*line)
        assert code == 2 and "\x1b[31m" not in out + err and "[31mred" in err, line


def test_a_bug_reaches_no_terminal(explained, monkeypatch):
    def broken(_options):
        raise KeyError(RED)

    monkeypatch.setattr("captum_dcam.cli.explain.run", broken)
    for line in (("explain",), ("--debug", "explain")):
        code, out, err = explained(*line)
        assert code == 1 and "\x1b[31mred" not in out + err and "[31mred" in err


def test_bars_reach_no_terminal(capsys):
    class Bar:
        def set_postfix_str(self, text):
            self.text = text

    live = Live(RED)
    live._bar = bar = Bar()
    live.say(RED)
    assert "\x1b" not in live.label + bar.text


def test_a_console_keeps_its_own_colours(capsys):
    console = printing.console_of(force_terminal=True, color_system="standard")
    console.print(printing.Text(RED, style="bold"))
    out = capsys.readouterr().out
    assert out.startswith("\x1b[1m") and r"\x1b[31mred\x1b[0m" in out and "\x1b[31m" not in out


# -- tables ----------------------------------------------------------------------------------------

FORMULAS = ("=1+1", "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://x")', "＝1")


@pytest.mark.parametrize("cell", FORMULAS)
def test_cells_are_no_formulas(cell):
    safe = "'" + cell.replace("\r", " ")
    assert no_formula(cell) == safe and no_formula(f" {cell}") == f" {safe[1:]}"
    made_ = Table("t", "T", (Column("a"), Column(cell)), ((cell, (cell, Figure(-1.5))),))
    heads, line = csv.reader(io.StringIO(made_.csv(), newline=""))
    assert heads == ["row", "a", safe] and line == [safe, safe, "-1.5"]


def test_numbers_are_no_texts():
    assert [no_formula(v) for v in (-1, -0.5, None, True, "")] == [-1, -0.5, None, True, ""]


def test_a_comparison_in_csv(tmp_path):
    found = captum_dcam.compare(
        tiny.adapter("prefix"), tiny.picture(), "", [0], ["diffusion_cam_base"], gen_length=2
    )
    target = replace(found.targets[0], text="=1+1")
    row = replace(found.rows[0], note="@x", label="-a")
    odd = replace(found, targets=(target,), rows=(row,))
    with (odd.save(tmp_path / "x") / "comparison.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert (line["word"], line["note"], line["label"]) == ("'=1+1", "'@x", "'-a")
    assert captum_dcam.Comparison.load(tmp_path / "x").words == ("=1+1",)


@pytest.mark.parametrize("cell", ("a|b", "|", "a\nb", "a\r\nb|c", r"a\|b"))
def test_cells_in_markdown(cell):
    table = Table("t", "T", (Column(cell),), ((cell, (cell,)),), first=cell)
    lines = [line for line in table.markdown().split("\n") if line.startswith("|")]
    assert len(lines) == 3
    for line in (lines[0], lines[2]):
        assert line.replace(r"\|", "").count("|") == 3
    assert "\n" not in in_markdown(cell)


# -- what ends a run -------------------------------------------------------------------------------


@pytest.fixture
def evaluated(monkeypatch, capsys, tmp_path):
    """``evaluate`` over three pictures; a signal comes after a number of images."""

    def call(number, after, *more):
        def load(*_arguments, **_options):
            return tiny.adapter("prefix")

        monkeypatch.setattr(evaluate_command, "load_model", load)
        count = iter(range(1, 99))
        shown = Live.image

        def image(self, failed):
            shown(self, failed)
            if next(count) == after:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Live, "image", image)
        line = ("evaluate", "-M", "oracle,random", "--data", "count=3", "--words", "object")
        generation = ("--generation", "gen_length=4", "-o", tmp_path / "out")
        return started(monkeypatch, capsys, *line, *generation, *more)

    return call


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
@pytest.mark.parametrize("how", ((), ("--json",)))
def test_a_run_that_a_signal_ended_says_so(evaluated, tmp_path, number, how):
    code, out, _ = evaluated(number, 1, *how)
    assert code == 128 + number and ("Stopped early" in out or '"left": 2' in out)
    assert len(Store.read(tmp_path / "out").missing()) == 2
    assert not list((tmp_path / "out").glob(".*.owner"))
    code, *_ = evaluated(number, 2)  # at the last image: nothing is left
    assert code == 0 and not Store.read(tmp_path / "out").missing()


def test_a_note_of_a_killed_process_is_gone_after_the_next_run(evaluated, tmp_path):
    assert evaluated(signal.SIGTERM, 99)[0] == 0
    owner = tmp_path / "out" / ".shard-00000-of-00001.owner"
    owner.write_text("process 1 on a machine")
    assert evaluated(signal.SIGTERM, 99)[0] == 0 and not owner.exists()


def test_a_store_of_a_typo_is_begun_anew(evaluated, tmp_path):
    assert evaluated(signal.SIGTERM, 1, "-p", "waht ?")[0] == 128 + signal.SIGTERM
    code, _, err = evaluated(signal.SIGTERM, 99, "-p", "what ?")
    assert code == 2 and "holds another evaluation" in err  # an image was measured
    for path in (tmp_path / "out").glob("*.jsonl"):
        path.write_bytes(b"")
    assert evaluated(signal.SIGTERM, 99, "-p", "what ?")[0] == 0
    assert Store.read(tmp_path / "out").header["plan"]["prompt"] == "what ?"


def ended_by(number, output):
    """A child process that gets a signal while ``explain`` writes its folder; how it ended."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]

    def run(options):
        with new_folder(options.output) as new:
            (new / "a").touch()
            os.kill(os.getpid(), number)
            signal.pause()

    code = 1
    try:
        signal.signal(number, signal.SIG_DFL)
        explain_command.run = run
        sys.argv = ["captum-dcam", "explain", "-o", str(output)]
        program.main()
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code)


@pytest.mark.skipif(os.name != "posix", reason="fork and POSIX signals")
@pytest.mark.parametrize("name", ("SIGTERM", "SIGHUP"))
def test_a_signal_leaves_nothing_hidden(tmp_path, name):
    number = getattr(signal, name)
    assert os.waitstatus_to_exitcode(ended_by(number, tmp_path / "out")) == 128 + number
    assert not os.listdir(tmp_path)


def test_an_exit_leaves_nothing_hidden(tmp_path):
    for error in (SystemExit(143), KeyboardInterrupt()):
        with pytest.raises(type(error)), new_folder(tmp_path / "out") as new:
            (new / "a").touch()
            raise error
        assert not os.listdir(tmp_path)
