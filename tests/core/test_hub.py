"""Loading by name, wrapping, families of other packages; everything offline."""

import json
import subprocess
import sys
import textwrap
import warnings
from importlib.metadata import EntryPoint
from inspect import get_annotations
from types import SimpleNamespace

import pytest
import tiny
import torch
from typer.testing import CliRunner

import captum_dcam
from captum_dcam.adapters.mini import MiniAdapter
from captum_dcam.cli.app import app
from captum_dcam.errors import (
    RemoteCodeError,
    UnknownNameError,
    WeightsError,
)
from captum_dcam.model import adapter as protocol
from captum_dcam.model import families as places
from captum_dcam.model import hub
from captum_dcam.model.adapter import Checkpoint, FamilyFacts
from captum_dcam.model.facts import FAMILIES, ModelFamily
from captum_dcam.model.families import ADAPTERS, list_models, said


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    tiny.model().save_pretrained(made)
    tiny.tokenizer().save_pretrained(made)
    tiny.processor().image_processor.save_pretrained(made)
    return made


@pytest.fixture
def registry():
    """What is registered in a test is gone behind it."""
    captum_dcam.families()
    before = ADAPTERS.names()
    yield ADAPTERS
    for name in set(ADAPTERS).difference(before):
        ADAPTERS.remove(name)


def described(tmp_path, **config):
    folder = tmp_path / "described"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Probe(MiniAdapter):
    """A family that only notes how it was loaded."""

    family = "probe"
    model_types = ("probe_type",)
    facts = None
    made = SimpleNamespace()

    @classmethod
    def load(cls, source=None, **options):
        cls.seen = source, options
        return cls.made

    @staticmethod
    def owns(model):
        return type(model).__name__ == "Probed"


def probe(**changes):
    return protocol.register(type("Made", (Probe,), changes))


# -- load ------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_by_its_config(folder):
    made = captum_dcam.load(folder, device="cpu", dtype=torch.float64, cache="none")
    assert made.family == "mini" and made.cache == "none" and made.dtype == torch.float64
    assert captum_dcam.load(str(folder), family="mini").family == "mini"


def test_a_device_map_reaches_the_loader(folder):
    pytest.importorskip("accelerate")
    made = captum_dcam.load(folder, device_map={"": "cpu"})
    assert {p.device.type for p in made.model.parameters()} == {"cpu"}
    with pytest.raises(ValueError, match="nowhere"):
        captum_dcam.load(folder, device_map="nowhere")


def test_a_model_that_accelerate_spread_stays_so(cache):
    """Its hooks replace ``forward`` of every module: they stay, and maps are the same."""
    accelerate = pytest.importorskip("accelerate")
    plain = tiny.adapter(cache)
    made = tiny.adapter(cache)
    accelerate.dispatch_model(made.model, {"": "cpu"}, force_hooks=True)
    before = {n: vars(m)["forward"] for n, m in made.model.named_modules() if "forward" in vars(m)}
    assert len(before) > 20
    maps = [
        captum_dcam.explain(a, tiny.picture(), tiny.PROMPT, preset="base", gen_length=4).maps[0]
        for a in (plain, made)
    ]
    assert torch.equal(*maps)
    after = {n: vars(m)["forward"] for n, m in made.model.named_modules() if "forward" in vars(m)}
    assert before == after


def test_only_what_is_given_reaches_the_family(registry, tmp_path):
    cls = probe()
    source = described(tmp_path, model_type="probe_type")
    assert captum_dcam.load(source) is cls.made and cls.seen == (str(source), {})
    captum_dcam.load("probe", revision="v2", trust_remote_code=True, dtype="bfloat16", extra=1)
    wanted = {"revision": "v2", "trust_remote_code": True, "dtype": "bfloat16", "extra": 1}
    assert cls.seen == (None, wanted)


def test_the_best_device_is_the_default(registry, tmp_path, monkeypatch):
    cls = probe()
    source = described(tmp_path, model_type="probe_type")
    assert hub.check_device(None) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert hub.check_device(None) == torch.device("cuda")
    captum_dcam.load(source)
    assert cls.seen == (str(source), {"device": torch.device("cuda")})
    captum_dcam.load(source, device="cpu")
    assert cls.seen == (str(source), {"device": "cpu"})
    pytest.importorskip("accelerate")
    captum_dcam.load(source, device_map="auto")
    assert cls.seen == (str(source), {"device_map": "auto"})


@pytest.fixture
def answering(monkeypatch):
    """A hub that answers whatever is asked."""
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: None)


@pytest.mark.usefixtures("answering")
def test_a_hub_name_is_asked_for_its_config(registry, tmp_path, monkeypatch):
    cls = probe()
    asked = []

    def cached(name, file, revision=None):
        asked.append((name, file, revision))
        return str(described(tmp_path, model_type="probe_type") / file)

    monkeypatch.setattr("transformers.utils.cached_file", cached)
    captum_dcam.load("org/checkpoint", revision="abc")
    assert asked == [("org/checkpoint", "config.json", "abc")]
    assert cls.seen == ("org/checkpoint", {"revision": "abc"})


@pytest.mark.usefixtures("answering")
def test_a_hub_that_gives_nothing(monkeypatch):
    def cached(*_args, **_options):
        raise OSError("org/nothing is not a valid model identifier")

    monkeypatch.setattr("transformers.utils.cached_file", cached)
    with pytest.raises(WeightsError, match=r"org/nothing is no folder here.*not a valid"):
        captum_dcam.load("org/nothing")


def test_a_mistyped_folder_is_asked_for_once(monkeypatch, tmp_path):
    asked = []

    def unreachable(address, timeout):
        asked.append(address)
        raise ConnectionError("no name service")

    def never(*_args, **_options):
        raise AssertionError("transformers asks six times")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("transformers.utils.cached_file", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "lavida-8b").mkdir(parents=True)
    beside = r"did you mean 'checkpoints/lavida-8b'\?.*cannot be reached \(no name service\)"
    with pytest.raises(WeightsError, match=f"checkpoints/lavid-8b is no folder here.*{beside}"):
        captum_dcam.load("checkpoints/lavid-8b")
    for local in ("./lavida", "~/lavida", "/lavida", "a/b/c"):  # no name that the hub could have
        with pytest.raises(UnknownNameError, match="give a folder"):
            captum_dcam.load(local)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("config", "wanted"),
    (
        ({"architectures": ["First"], "model_type": "shared"}, "one"),
        ({"architectures": ["Second"], "model_type": "shared"}, "two"),
        ({"architectures": ["Third"], "model_type": "shared"}, None),
        ({"model_type": "shared", "deep": True}, "two"),
        ({"model_type": "shared"}, "one"),
        ({"architectures": ["Third"], "model_type": "alone"}, "three"),
        ({}, None),
    ),
)
def test_whose_a_config_is(config, wanted):
    class One(MiniAdapter):
        family, model_types, architectures = "one", ("shared",), ("First",)

        @classmethod
        def claims(cls, config):
            return "deep" not in config

    class Two(MiniAdapter):
        family, model_types, architectures = "two", ("shared",), ("Second",)

        @classmethod
        def claims(cls, config):
            return "deep" in config or "architectures" in config

    class Three(MiniAdapter):
        family, model_types = "three", ("alone",)

    known = {c.family: c for c in (One, Two, Three)}
    assert hub.family_of("somewhere", config, known) == wanted


def test_several_families_that_claim_a_config():
    known = {"one": MiniAdapter, "two": MiniAdapter}
    with pytest.raises(UnknownNameError, match=r"family=…: one, two"):
        hub.family_of("somewhere", {"model_type": "captum_dcam_mini"}, known)


def test_checkpoints_of_no_family_and_of_another(tmp_path, registry):
    probe()
    bert = described(tmp_path, model_type="bert", architectures=["BertModel"])
    with pytest.raises(UnknownNameError, match=r"BertModel of type 'bert'; known families: .*mini"):
        captum_dcam.load(bert)
    code = described(tmp_path, model_type="own", auto_map={"AutoModel": "modeling.Own"})
    with pytest.raises(UnknownNameError, match=r"code comes with it \(it was not run\)"):
        captum_dcam.load(code)
    other = described(tmp_path, model_type="captum_dcam_mini", architectures=["Mini"])
    with pytest.raises(WeightsError, match="of family 'mini', not 'probe'"):
        captum_dcam.load(other, family="probe")
    (other / "config.json").write_text("[1]")
    with pytest.raises(WeightsError, match=r"config\.json holds a list: expected"):
        captum_dcam.load(other)
    (other / "config.json").unlink()
    with pytest.raises(UnknownNameError, match="unknown model"):
        captum_dcam.load(other)


def test_options_that_cannot_be(folder, monkeypatch):
    with pytest.raises(ValueError, match="exclude each other"):
        captum_dcam.load(folder, device="cpu", device_map="auto")
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        captum_dcam.load(folder, device="gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="torch sees 1 CUDA"):
        captum_dcam.load(folder, device="cuda:1")
    with pytest.raises(ValueError, match="revision='v2'"):
        captum_dcam.load(folder, revision="v2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(
        ImportError, match=r"'auto' needs the package accelerate.*captum-dcam\[large\]"
    ):
        captum_dcam.load(folder, device_map="auto")


def test_a_missing_package_gives_the_line_that_installs_it(registry, tmp_path, monkeypatch):
    facts = FamilyFacts(package="no_such_package_xyz", install="git clone somewhere")
    probe(facts=facts)
    with pytest.raises(ImportError, match=r"package 'no_such_package_xyz'.*git clone somewhere"):
        captum_dcam.load("probe")
    monkeypatch.setitem(sys.modules, "no_such_package_xyz", object())
    assert captum_dcam.load("probe") is Probe.made
    monkeypatch.setitem(sys.modules, "no_such_package_xyz", None)
    with pytest.raises(ImportError, match="authors' package"):
        captum_dcam.load("probe")


def test_remote_code_is_refused_unless_asked_for(registry):
    probe(facts=FamilyFacts(remote_code=True))
    with pytest.raises(RemoteCodeError, match="trust_remote_code=True"):
        captum_dcam.load("probe")
    assert captum_dcam.load("probe", trust_remote_code=True) is Probe.made


@pytest.mark.parametrize(
    ("version", "fits"), (("4.57.0", False), ("5.0.0", True), ("5.23.0.dev0", True), ("6.0", False))
)
def test_the_range_of_transformers(registry, monkeypatch, version, fits):
    probe(facts=FamilyFacts(transformers=">=5.0,<6"))
    monkeypatch.setattr("transformers.__version__", version)  # its module replaces itself lazily
    if fits:
        assert captum_dcam.load("probe") is Probe.made
        assert captum_dcam.wrap(tiny.model(), tiny.processor(), "probe").family == "probe"
        return
    with pytest.raises(ImportError, match=rf"transformers >=5.0,<6, and {version} is installed"):
        captum_dcam.load("probe")
    with pytest.raises(ImportError, match="in an environment of its own"):
        captum_dcam.wrap(tiny.model(), tiny.processor(), "probe")
    assert captum_dcam.wrap(tiny.model(), tiny.processor()).family == "mini"  # asks for its own


# -- wrap ------------------------------------------------------------------------------------------


class Probed(torch.nn.Linear):
    pass


def test_wrap_what_no_family_or_several_know(registry):
    with pytest.raises(TypeError, match="model is a str: expected a torch"):
        captum_dcam.wrap("mini", None)
    with pytest.raises(TypeError, match="model is a MiniProcessor"):
        captum_dcam.wrap(tiny.processor(), tiny.model())
    probe()
    protocol.register(type("Twin", (Probe,), {"family": "twin"}))
    with pytest.raises(UnknownNameError, match=r"several families recognise.*probe, twin"):
        captum_dcam.wrap(Probed(2, 2), None)


def test_a_processor_that_does_not_fit():
    with pytest.raises(TypeError, match="processor is a NoneType"):
        captum_dcam.wrap(tiny.model(), None)
    with pytest.raises(ValueError, match=r"do not fit: .*64 .*128"):
        captum_dcam.wrap(tiny.model(image_size=128), tiny.processor())


# -- families of other packages --------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch, registry):
    """Install entry points: name → source of the module it names."""
    points = []
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(places, "_installed", lambda _path: {one.name: one for one in points})
    monkeypatch.setattr(places, "_seen", {})

    def install(name, source):
        module = f"third_party_{name}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        points.append(EntryPoint(name, module, places.GROUP))
        monkeypatch.delitem(sys.modules, module, raising=False)
        return module

    return install


GOOD = """
    from captum_dcam.model.adapter import register
    from captum_dcam.adapters.mini import MiniAdapter

    @register
    class Good(MiniAdapter):
        family = "good"
        model_types = ("good_type",)

        @staticmethod
        def owns(model):
            return False
"""


def test_a_family_of_another_package_is_found(installed, tmp_path):
    module = installed("good", GOOD)
    assert module not in sys.modules
    captum_dcam.load("mini", family="mini")
    assert module not in sys.modules  # nobody asked for it
    assert hub.find("good").__name__ == "Good"
    assert "good" in captum_dcam.families()
    known = captum_dcam.families()
    assert hub.family_of("x", {"model_type": "good_type"}, known) == "good"


@pytest.mark.parametrize(
    "source", ("import no_such_module", "1 / 0", GOOD.replace('"good"', '"mini"', 1), "def (")
)
def test_a_broken_one_is_a_warning_that_names_it(installed, source):
    installed("bad", source)
    with pytest.warns(UserWarning, match=r"adapter 'bad' of .*third_party_bad.* is left out"):
        known = captum_dcam.families()
    assert "mini" in known and "bad" not in known
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captum_dcam.families()  # said once
    with pytest.raises(UnknownNameError, match=r"'bad' .* cannot be imported"):
        hub.find("bad")


def test_unknown_families_name_those_of_other_packages(installed):
    installed("goods", GOOD)
    with pytest.raises(UnknownNameError, match="did you mean 'goods'"):
        hub.find("good_")


def test_a_plugin_does_not_take_a_name_of_ours(installed):
    """Not even while ours is not imported yet."""
    installed("bad", GOOD.replace('"good"', '"lavida"', 1))
    with pytest.warns(UserWarning, match="'lavida' is one of captum_dcam's, so .* was not entered"):
        captum_dcam.families()
    assert hub.find("lavida").__module__ == "captum_dcam.adapters.lavida.adapter"


def test_one_plugin_may_bring_several_families(installed):
    """A family is loaded by its name, whatever the entry point is called."""
    installed("goods", GOOD)
    assert captum_dcam.load("good").family == "good"


def test_a_family_keeps_an_attribute_called_name(installed):
    named = "name = property(lambda self: 7)\n        family ="
    installed("good", GOOD.replace("family =", named, 1))
    assert isinstance(hub.find("good").name, property)


# -- families that cannot be imported --------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """A family of ours whose import raises."""

    def make(source):
        (tmp_path / "torn.py").write_text(source)
        package = sys.modules[places.GROUP]
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        monkeypatch.delitem(sys.modules, f"{places.GROUP}.torn", raising=False)

    return make


SOURCES = {"1 / 0": "ZeroDivisionError: ", "import no_such": "ModuleNotFoundError: No module"}


@pytest.mark.parametrize("source", SOURCES)
def test_one_that_cannot_be_imported_stops_no_other(broken, registry, source):
    broken(source)
    assert "torn" in places.built_in()
    assert captum_dcam.load("mini").family == "mini"
    assert captum_dcam.wrap(tiny.model(), tiny.processor()).family == "mini"
    assert "mini" in captum_dcam.families() and "torn" not in captum_dcam.families()


@pytest.mark.parametrize("source", SOURCES)
def test_why_it_cannot_be_imported_is_said_where_it_is_looked_for(
    broken, registry, tmp_path, source
):
    broken(source)
    kind = ImportError if "import" in source else UnknownNameError
    said = SOURCES[source]
    for ask in (hub.find, captum_dcam.load):
        with pytest.raises(kind, match=rf"adapter 'torn' .*cannot be imported: {said}"):
            ask("torn")
    with pytest.raises(UnknownNameError, match=rf"no family.*Not importable: torn \({said}"):
        captum_dcam.wrap(torch.nn.Linear(2, 2), None)
    with pytest.raises(UnknownNameError, match=rf"BertModel.*Not importable: torn \({said}"):
        captum_dcam.load(
            described(tmp_path, model_type="bert", architectures=["BertModel"]),
        )
    (record,) = [r for r in list_models() if r["family"] == "torn"]
    assert record["error"].startswith(said) and record["error"] in record["notes"][0]
    assert not record["installed"] and record["caches"] == []
    json.dumps(record)
    found = CliRunner().invoke(app, ["models"])
    assert found.exit_code == 0 and f"cannot be imported: {said}" in found.output


def test_a_family_is_imported_alone_and_only_when_asked_for():
    """In one new process, one line after the other."""
    lines = {
        "import captum_dcam.adapters, captum_dcam.model.hub": set(),
        "import captum_dcam; captum_dcam.load('mini')": {"mini"},
        "from captum_dcam.model.hub import find; find('lavida_o')": {"lavida_o"},
        "import captum_dcam.adapters.dream_vl": {"dream_vl"},
    }
    ask = f"print(*[m for m in sys.modules if m.startswith('{places.GROUP}.')])"
    code = "\n".join(["import sys", *(f"{line}\n{ask}" for line in lines)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wanted = set()
    for line, seen in zip(lines, done.stdout.splitlines(), strict=True):
        wanted |= lines[line]
        assert {name.split(".")[2] for name in seen.split()} - {"common"} == wanted, line


# -- what is known without a model -----------------------------------------------------------------


def test_depths_follow_the_rules_of_the_adapters():
    rule = Checkpoint("a", 32)
    assert (rule.deepest_block, rule.recommended_block) == (30, 10)
    own = Checkpoint("b", 4, deepest=0, recommended=None)
    assert (own.deepest_block, own.recommended_block) == (0, 0)
    mini = captum_dcam.load("mini")
    (said,) = MiniAdapter.facts.checkpoints
    assert said.blocks == len(mini.blocks)
    assert said.deepest_block == mini.deepest_block
    assert said.recommended_block == mini.recommended_block


def test_what_a_folder_declares_is_what_its_adapter_has(registry):
    """A class between the two would say otherwise than `captum-dcam models`."""
    list_models()
    assert set(FAMILIES) == set(places.built_in())
    for name, declared in FAMILIES.items():
        cls = registry[name]
        assert cls.__mro__[1] is declared
        for key in vars(ModelFamily).keys() & get_annotations(ModelFamily).keys():
            assert getattr(cls, key) is getattr(declared, key), (name, key)


def test_the_list_imports_no_torch():
    code = """
import sys
from captum_dcam.cli.app import app
app(["models", "mini", "mmada"], standalone_mode=False)
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mini MiniAdapter" in done.stdout and "Note: nothing ends an answer" in done.stdout
    seen = set(done.stdout.splitlines()[-1].split())
    assert "captum_dcam.adapters.dream_vl.facts" in seen
    assert not seen & {"torch", "numpy", "transformers", "captum", "matplotlib", "PIL"}


def test_every_family_can_be_listed(registry):
    probe()
    records = {r["family"]: r for r in list_models()}
    assert set(records) == set(captum_dcam.families())
    json.dumps(records)
    assert records["probe"]["checkpoints"] == [] and records["probe"]["blocks"] is None
    for name, record in records.items():
        if name == "probe":
            continue
        assert record["checkpoints"], f"{name} names no checkpoint"
        assert set(record["feasible"]) == set(record["caches"])
        for one in record["checkpoints"]:
            assert one["recommended_block"] <= one["deepest_usable_block"] < one["blocks"]
        assert record["package"] is None or record["install"]
        hub.SpecifierSet(record["transformers"])


def test_two_builds_of_torch_and_torchvision_are_named():
    """Transformers hides them behind the name of a class that it could not import."""
    try:
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from error
    except ModuleNotFoundError as error:
        shown = said(error)
    assert "'PreTrainedModel'" in shown and "uninstall torchvision" in shown
    assert said(ValueError("x")) == "ValueError: x"
