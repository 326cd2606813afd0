"""Plans with a field of a wrong type, name or range: refused by name before any work; and nothing
in a file lets a checkpoint's code run."""

import json

import pytest
import tiny
from bad_input.program import lying, started
from evaluation import made

import captum_dcam
from captum_dcam.errors import DcamError, InputTypeError, RemoteCodeError, SettingError
from captum_dcam.evaluation import METRICS, Plan, Store, Variant, evaluate

NAN, INF = float("nan"), float("inf")
#: fields of a plan, and values that none of them takes
WRONG = {
    "variants": (None, 3, "tam", {}, {"name": "tam"}, [], [3], [None], [[]], [{}], [{"name": 3}]),
    "dataset": (None, 3, True, [], ["scenes"], {}, {"name": 3}, {"name": None}, {"count": 2}, ""),
    "model": (None, 3, [], {}, ["mini"], "", True),
    "regime": (3, True, [], {}, "half", "", NAN),
    "dtype": (None, 3, [], {}, "float8", ""),
    "prompt": (3, [], {}, ["what ?"], True, "\udcff"),
    "answer": (None, 3, [], {}, "said", {"name": 3}, {"name": "caption", "wording": []}),
    "metrics": (None, 3, "pointing", {}, [3], [[]], [{}], [{"name": 3}], ["f33"]),
    "words": (None, 3, "object", {}, [], [3], [None], [[]], [{}], ["verbs"]),
    "seed": (None, -1, 1.5, True, "0", [], {}, NAN, INF, 2**63),
    "start": (None, -1, 1.5, True, "0", [], NAN, 2**63),
    "limit": (0, -1, 1.5, True, "1", [], NAN, 2**63),
    "threads": (None, -1, 1.5, True, "1", [], NAN),
    "generation": (None, 3, "steps=4", [], [["steps", 4]], {"generator": 1}, {"self": 1}),
    "load": (None, 3, "mini", [], {"source": "x"}, {"dtype": "float16"}, {"device": "cpu"}),
}
CASES = [(field, value) for field, values in WRONG.items() for value in values]


@pytest.mark.parametrize("field, value", CASES, ids=str)
def test_fields(field, value):
    with pytest.raises(DcamError) as caught:
        Plan.from_record({"variants": ["oracle"], field: value}).json()
    said = str(caught.value)
    name = "cache" if field == "regime" else field
    names = (name, name.rstrip("s"), "method" if field == "variants" else name, "kind of word")
    assert any(one in said for one in (*names, field)) and len(said) < 2000, said
    if value not in (None, "", [], {}) and not isinstance(value, list | dict):
        assert str(value) in said or repr(value) in said, said


VARIANT = {
    "name": (None, 3, [], {}, ""),
    "method": (3, [3], {"a": 1}, ["tam"], "tamm"),
    "settings": (None, 3, [], "steps", {"name": "x"}, {"refined": "no"}, {"product": 3}),
    "layer": (1.5, True, "2", [], NAN, 2**63),
    "score": (None, -1, True, 1.5, "3", [], {}, "last"),
    "refinements": (3, True, [3], [None], [{}], [{"name": 3}], [{"name": []}], ["blur"]),
    "passes": (0, -1, 1.5, True, "3", [], NAN),
    "foo": (1,),
}


@pytest.mark.parametrize("field, value", [(f, v) for f, vs in VARIANT.items() for v in vs], ids=str)
def test_variants(field, value):
    with pytest.raises(DcamError):
        Plan.from_record({"variants": [{"name": "v", "method": "diffusion_cam", field: value}]})


#: what no setting of any metric is
NONE = ({"a": {"b": 1}}, [[]], [{}], "no such thing", NAN)


@pytest.mark.parametrize("name", METRICS)
def test_metrics(name):
    for setting in METRICS.settings(name):
        for value in NONE:
            if (setting, value) == ("label", "no such thing"):
                continue  # a text is what it takes
            with pytest.raises(DcamError):
                plan = Plan.from_record(
                    {"variants": ["oracle"], "metrics": [{"name": name, setting: value}]}
                )
                plan.json()


def test_stages_of_a_compose_are_a_list():
    for stages in (None, 3, "cba", {"name": "cba"}):
        with pytest.raises(InputTypeError, match="stages of a compose"):
            Variant("tam", refinements={"name": "compose", "stages": stages})


def test_a_setting_of_another_type_says_what_is_expected():
    with pytest.raises(SettingError, match=r"center is 'no', a str: expected bool or None"):
        Variant("diffusion_cam", settings={"center": "no"})


# -- code of a checkpoint --------------------------------------------------------------------------

CODE = {
    "load": {"load": {"trust_remote_code": True}},
    "load, said no": {"load": {"trust_remote_code": False}},
    "deep in load": {"load": {"model_kwargs": [{"trust_remote_code": True}]}},
    "generation": {"generation": {"trust_remote_code": True}},
    "a decoder": {"generation": {"custom_generate": "somebody/decoder"}},
    "data": {"dataset": {"name": "scenes", "trust_remote_code": True}},
}


@pytest.mark.parametrize("case", CODE)
def test_a_plan_lets_no_code_run(case, tmp_path, monkeypatch, capsys):
    record = {"variants": ["oracle"], **CODE[case]}
    says = "a plan cannot let a checkpoint's code run"
    with pytest.raises(RemoteCodeError, match=says):
        Plan.from_record(record)
    with pytest.raises(RemoteCodeError, match=says):
        Plan(**record)
    for name, content in (("plan", record), ("header", {"plan": record})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        before = lying(tmp_path)
        line = ("evaluate", "--plan", tmp_path / f"{name}.json", "-o", tmp_path / "out")
        code, _, err = started(monkeypatch, capsys, *line)
        assert code == 2 and says in err and "--load trust_remote_code=true" in err
        assert lying(tmp_path) == before


def test_the_call_that_runs_a_plan_may_let_code_run(monkeypatch, tmp_path):
    asked = []

    def load(_model, **options):
        asked.append(options["trust_remote_code"])
        return tiny.adapter("prefix")

    monkeypatch.setattr("captum_dcam.model.hub.load", load)
    for trusted in (False, True):
        folder = tmp_path / str(trusted)
        evaluate(made.plan(), folder, data=made.Pictures(1), trust_remote_code=trusted)
    assert asked == [False, True]
    assert Store.read(tmp_path / "True").header["plan"] == made.plan().record()


@pytest.mark.parametrize("given", ("True", "false", 1, None, [True]))
def test_trust_is_true_or_false(given):
    with pytest.raises(InputTypeError, match="expected True or False"):
        captum_dcam.load("mini", trust_remote_code=given)


def test_a_store_of_before_whose_plan_let_code_run_goes_on(tmp_path):
    own = {"adapter": tiny.adapter("prefix"), "data": made.Pictures(2)}
    evaluate(made.plan(), tmp_path, stop=iter((False, True)).__next__, **own)
    header = json.loads((tmp_path / "plan.json").read_text())
    header["plan"]["load"] = {"trust_remote_code": True}
    del header["digest"]
    (tmp_path / "plan.json").write_text(json.dumps({**header, "version": 1}))
    store = Store.read(tmp_path)
    for path in tmp_path.glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [{k: v for k, v in line.items() if k not in ("sum", "plan")} for line in lines]
        path.write_bytes(b"".join(map(store.written, lines)))
    done = evaluate(made.plan(), tmp_path, **own)
    assert (done.measured, done.left) == (1, 0)
