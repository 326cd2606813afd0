"""The doctor: every planted fault is found by its line, and healthy models have no stop."""

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from doubles import dream_vl, lavida, lavida_bound, mmada
from torch import nn
from typer.testing import CliRunner

import captum_dcam
from captum_dcam.cli import parsing
from captum_dcam.cli.app import app
from captum_dcam.cli.doctor import STOPPED
from captum_dcam.doctor import Line, Report, checkup, doctor, gradients, maps, model, subject
from captum_dcam.doctor.checkup import CHECKS
from captum_dcam.doctor.subject import Subject, Unjudged
from captum_dcam.errors import InputTypeError, MissingPackageError, OccupiedError
from captum_dcam.mini.loading import MiniImageProcessor, MiniProcessor
from captum_dcam.testing.__main__ import cases_in
from captum_dcam.testing.residue import difference, snapshot

SETTINGS = dict(gen_length=4)
CASES = {}
for one in cases_in(Path(__file__).parents[1] / "adapters" / "cases"):
    CASES.setdefault(one.name.partition(",")[0], one)
for one in ("qwen2_vl", "qwen2_5_vl"):  # Qwen3-VL has all of theirs
    del CASES[one]


def looked(adapter, prompt="what is this ?", until="answer", **more):
    """The lines up to one: those behind it cost most, and tell nothing of an earlier fault."""
    names = [name for name, _ in CHECKS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkup, "CHECKS", CHECKS[: names.index(until) + 1])
        return doctor(adapter, tiny.picture(), prompt, **{**SETTINGS, **more})


def found(report, name, verdict, *texts):
    """The fault is in its line; and where it is a stop, no other line calls for it first."""
    line = report[name]
    assert line.verdict == verdict, (name, line)
    for text in texts:
        assert text in line.found, line.found
    assert line.step or verdict in ("ok", "not judged") or name in ("gradient", "block")
    stops = report.of("stop")
    assert verdict != "stop" or stops[0] == name, stops


# -- healthy models --------------------------------------------------------------------------------


@pytest.mark.usefixtures("weights_read_once")
def test_on_the_embedded_model_everything_is_ok():
    report = doctor(captum_dcam.load("mini"), gen_length=16)
    assert report.of("not judged") == ("batch size",)  # the CPU has no memory of its own
    assert set(report.of("ok")) == {name for name, _ in CHECKS} - {"batch size"}
    assert report.verdict == "ok" and "pink circle" in report.answer


@pytest.mark.parametrize("family", CASES)
def test_no_family_stops_on_a_healthy_model(family):
    case = CASES[family]
    report = doctor(lambda: case.make(torch.float32), case.picture(), case.prompt, **case.settings)
    assert not report.of("stop"), [report[name] for name in report.of("stop")]
    for name in ("answer", "clustering", "sign"):
        assert report[name].said.startswith("not judged: random weights"), report[name]
    for name in ("replay", "image span", "gradient", "feasible calls", "norms"):
        assert report[name].verdict == "ok", report[name]
    assert set(report.of("look")) <= {"chat template", "rotary"}  # doubles have their own


def test_nothing_is_left_behind():
    adapter = tiny.adapter("prefix", dtype=torch.bfloat16)  # part of the work is done in float32
    adapter.model.train()
    before = snapshot(adapter.model)
    assert not looked(adapter, until="cost").of("stop")
    assert not difference(before, snapshot(adapter.model)) and adapter.unverified


# -- ten planted faults ----------------------------------------------------------------------------


def test_a_template_that_is_not_the_authors():
    processor = dream_vl.processor()
    right = looked(captum_dcam.wrap(dream_vl.model(), processor))
    assert right["chat template"].verdict == "ok" and "<|im_start|>" in right["chat template"].found
    processor.chat_template = processor.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% for part in m.content %}{% if part.type == 'image'"
        " %}<|image_pad|>{% else %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}assistant:"
    )
    report = looked(captum_dcam.wrap(dream_vl.model(), processor))
    found(report, "chat template", "look", "not the authors'", "what is this", "<|im_start|>user")


def misplaced(adapter, change):
    """``prepare`` says that the image lies elsewhere."""
    own = adapter.prepare

    def prepare(images, prompts):
        request = own(images, prompts)
        grids = [
            dataclasses.replace(g, positions=change(g.positions)) for g in request.layout.grids
        ]
        layout = dataclasses.replace(request.layout, grids=tuple(grids))
        return dataclasses.replace(request, layout=layout)

    adapter.prepare = prepare
    return adapter


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda at: at + 2, "changes 62 of these, and 2 beside them"),
        (lambda at: at.T.contiguous(), "expected the token that the patch covers"),
    ],
)
def test_an_image_span_that_is_wrong(change, text):
    report = looked(misplaced(tiny.adapter("none"), change))
    found(report, "image span", "look", text)


def test_rotary_tables_that_are_shuffled():
    turned = dream_vl.model()
    turned.model.rotary_emb.inv_freq = turned.model.rotary_emb.inv_freq.flip(0)
    report = looked(captum_dcam.wrap(turned, dream_vl.processor(), verify=False), until="rotary")
    found(report, "rotary", "stop", "1 rotary table")
    with pytest.warns(UserWarning, match="1 rotary table"):
        mended = captum_dcam.wrap(turned, dream_vl.processor())
    report = looked(mended, until="rotary")
    found(report, "repairs", "look", "1 rotary table")
    assert report["rotary"].verdict != "stop"


@pytest.mark.parametrize("axis", (0, 1))
def test_cached_sines_of_positions_that_are_shuffled(axis):
    case = CASES["mmada"]
    adapter = case.make(torch.float32)
    case.bound(adapter)  # fills the table
    (table,) = {
        id(t): t
        for m in adapter.model.modules()
        for name, t in vars(m).items()
        if name.endswith("__cache")
    }.values()
    order = torch.randperm(table["sin"].shape[axis], generator=torch.Generator().manual_seed(0))
    for name in ("sin", "cos"):
        table[name] = table[name].index_select(axis, order)
    report = looked(adapter, case.prompt, "rotary", block_length=4, steps=4)
    assert report["replay"].verdict == "ok"  # generation and replay share the table
    found(report, "rotary", "stop", "no angles in order")


def test_a_cache_that_is_stale():
    adapter, last = tiny.adapter("none"), {}

    def remembered(_module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        before = last.get(hidden.shape, hidden)
        last[hidden.shape] = hidden
        return (before, *output[1:]) if isinstance(output, tuple) else before

    adapter.blocks[1].register_forward_hook(remembered)
    found(looked(adapter, until="replay"), "replay", "stop", "computed again")


def test_parameters_on_the_meta_device():
    adapter = tiny.adapter("prefix")
    norm = adapter.model.norm
    norm.weight = nn.Parameter(norm.weight.to("meta"))
    report = looked(adapter, until="replay")
    found(report, "weights", "stop", "norm.weight on the meta device")
    assert report["replay"].said == "not judged: there is no answer"
    for part in adapter.model.modules():  # as accelerate leaves what it fetches when it is needed
        part._hf_hook = SimpleNamespace(offload=True)
    line = model.weights(Subject(adapter, [], "", None, 0, {}))
    assert line.verdict == "look" and "1 tensors are offloaded" in line.found


def test_weights_that_are_no_numbers():
    adapter = tiny.adapter("prefix")
    with torch.no_grad():
        adapter.blocks[2].attention.k_proj.weight[3, 1] = torch.nan
    found(looked(adapter), "weights", "stop", "layers.2.attention.k_proj.weight", "NaN")


def test_a_generation_compiled_with_another_attention(monkeypatch):
    made = lavida.model()
    own, plain = made.generate, nn.functional.scaled_dot_product_attention

    def causal(q, k, v, **options):
        same = q.shape[-2] == k.shape[-2]
        return plain(q, k, v, **({**options, "is_causal": True} if same else options))

    def compiled(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(nn.functional, "scaled_dot_product_attention", causal)
            return own(*args, **options)

    made.generate = compiled
    adapter = captum_dcam.wrap(made, lavida.processor(), cache="none")
    report = looked(adapter, lavida_bound.PROMPT, until="replay")
    found(report, "replay", "stop", "computed again")


def test_a_processor_of_another_checkpoint():
    def sizes():
        processor = tiny.processor()
        other = MiniProcessor(MiniImageProcessor(128), processor.tokenizer, 16)
        return captum_dcam.wrap(tiny.model(), other)

    report = looked(sizes)
    found(report, "processor", "stop", "do not fit", "128 px")
    assert report.of("stop") == ("processor",) and report["answer"].found == "there is no model"
    found(looked(lambda: captum_dcam.wrap(lavida.model(), None)), "processor", "stop", "NoneType")
    found(looked(lambda: captum_dcam.wrap(mmada.model(), ())), "processor", "stop", "vq_model")


def test_the_last_block():
    report = looked(tiny.adapter("prefix"), layer=3)
    found(report, "block", "stop", "block 3 has no path", "deepest usable block of mini is 2")
    assert report.of("stop") == ("block",)  # the others are judged at the recommended one
    assert report["block"].values["recommended"] == 1 and report["answer"].values["answer"]


class Quantised(nn.Module):
    """A layer of integers whose kernel has no backward pass."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().to(torch.int8))
        self.full = linear

    @torch.no_grad()
    def forward(self, x):
        return self.full(x)


def test_layers_quantised_without_a_backward():
    adapter = tiny.adapter("prefix")
    attention = adapter.blocks[1].attention
    for name, part in list(attention.named_children()):
        if isinstance(part, nn.Linear):
            setattr(attention, name, Quantised(part))
    adapter.blocks[1].register_forward_hook(
        lambda _m, _args, out: (
            tuple(o.detach() if isinstance(o, torch.Tensor) else o for o in out)
            if isinstance(out, tuple)
            else out.detach()
        )
    )
    found(looked(adapter, until="gradient"), "gradient", "stop", "Quantised (int8)")


# -- what else is refused --------------------------------------------------------------------------


def test_what_loading_refuses_is_a_line(tmp_path):
    def without_package():
        raise MissingPackageError("lavida runs with transformers >=4.46, and 4.40 is installed")

    found(looked(without_package), "versions", "stop", "4.40")
    (tmp_path / "config.json").write_text("{")
    found(looked(lambda: captum_dcam.load(tmp_path)), "weights", "stop", "config.json")
    with pytest.raises(InputTypeError, match="model is a MiniForMaskedDiffusion: expected an ad"):
        doctor(tiny.model)


def test_pictures_and_prompts_that_cannot_be():
    report = looked(tiny.adapter("prefix"), "say <image>")
    assert report.of("stop") == ("chat template",) and "<image>" in report["chat template"].found
    assert report["image span"].found == "there is no request"


# -- half precision --------------------------------------------------------------------------------


def half(cache):
    adapter = tiny.adapter(cache, dtype=torch.bfloat16)
    return Subject(adapter, [tiny.picture()], "what is this ?", None, 0, SETTINGS)


def test_half_precision_is_compared_with_float32_where_that_fits(monkeypatch):
    one = half("none")
    precision, gradient = maps.precision(one), gradients.gradient(one)
    assert precision.said.startswith("not judged: random weights") and "bfloat16" in precision.found
    assert 0.5 < precision.values["correlation"] <= 1
    assert gradient.verdict == "ok" and "float32" in gradient.found and "random" in gradient.found
    monkeypatch.setattr(subject, "free_memory", lambda _device: 1024)
    with pytest.raises(Unjudged, match=r"float32 needs 0\.0 GiB more, and 0\.0 GiB are free"):
        maps.precision(one)
    gradient = gradients.gradient(one)
    assert gradient.verdict != "stop" and "too coarse for a random direction" in gradient.found


def test_weights_come_back_bit_for_bit():
    one = half("prefix")
    adapter = one.adapter
    before = {n: p.clone() for n, p in adapter.model.named_parameters()}
    with contextlib.suppress(KeyError), one.widened() as forward:
        assert adapter.dtype == torch.float32 and forward.request.pixels.dtype == torch.float32
        raise KeyError
    for name, parameter in adapter.model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, before[name])


def test_the_largest_batch_is_the_last_that_fits(monkeypatch):
    tried, most = [], [0]

    def together(_forward, targets):
        tried.append(len(targets))
        if len(targets) > most[0]:
            raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(maps, "_together", together)
    gpu = SimpleNamespace(device=torch.device("cuda"))
    whom = SimpleNamespace(adapter=gpu, token=None, forward=SimpleNamespace(again=lambda: None))
    for limit, expected in ((20, 16), (0, 0), (10**9, maps.MOST_WORDS)):
        tried.clear()
        most[0] = limit
        line = maps.batch(whom)
        assert line.values == {"internal_batch_size": expected}
        assert line.verdict == ("ok" if expected else "look")
        assert max(tried) <= maps.MOST_WORDS


# -- the report, and its page ----------------------------------------------------------------------


def test_the_page_tells_of_every_line():
    page = Path(__file__).parents[2] / "docs" / "FIRST_HOUR.md"
    rows = [line.split(" | ")[0] for line in page.read_text(encoding="utf-8").splitlines()]
    assert [row[2:] for row in rows if row.startswith("| ")][1:] == [name for name, _ in CHECKS]


def test_a_report_is_saved_and_replaces_nothing_else(tmp_path):
    lines = {"weights": Line("ok", "all finite"), "sign": Line("look", "half", "another", {"n": 1})}
    report = Report("mini", "what ?", "a ring", lines)
    assert report.verdict == "look" and report.of("look") == ("sign",)
    path = report.save(tmp_path / "doctor.json")
    kept = json.loads(path.read_text())
    assert kept == report.record() and kept["lines"]["sign"]["next"] == "another"
    report.save(path)
    path.write_text("{}")
    with pytest.raises(OccupiedError, match=r"doctor\.json is there and no earlier report"):
        report.save(path)
    with pytest.raises(ValueError, match="verdict is 'fine'"):
        Line("fine", "")


def test_the_command_prints_one_screen_and_writes_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(parsing, "load_chosen", lambda *_: tiny.adapter("prefix"))
    call = ["doctor", "--gen-length", "4", "-o", str(tmp_path / "doctor.json")]
    shown = CliRunner().invoke(app, call)
    assert shown.exit_code == 0, shown.output
    assert len(shown.stdout.splitlines()) <= 40
    for name, _ in CHECKS:
        assert name in shown.stdout
    last = CliRunner().invoke(app, [*call, "--layer", "3", "--json"])
    assert last.exit_code == STOPPED
    document = json.loads(last.stdout)
    assert document["lines"]["block"]["verdict"] == document["verdict"] == "stop"
    assert document == json.loads((tmp_path / "doctor.json").read_text())
    (tmp_path / "doctor.json").write_text("mine")
    assert CliRunner().invoke(app, call).exit_code == 2
    assert (tmp_path / "doctor.json").read_text() == "mine"
