"""Command lines that cannot be run: exit code 2, one line that names the value and what to do, and
nothing written. No model is loaded where the mistake can be seen before."""

import json
import shutil

import pytest
import tiny
from bad_input.program import lying, started

from captum_dcam.mini.loading import WEIGHTS

EVALUATE = ("-M", "oracle", "--data", "count=1", "--generation", "gen_length=2")
LONG, DEEP = "x" * 256, "[" * 100_000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what goes wrong in it."""
    folder = tmp_path_factory.mktemp("place")
    contents = {
        "empty": b"",
        "bytes": bytes(range(256)) * 4,
        "latin": "é{".encode("latin-1"),
        "list": b"[]",
        "text": b'"x"',
        "deep": DEEP.encode(),
        "twice": b'{"seed": 1, "seed": 2, "variants": ["oracle"]}',
        "foreign": b'{"format": "other"}',
    }
    for name, content in contents.items():
        for suffix in ("json", "png"):
            (folder / f"{name}.{suffix}").write_bytes(content)
    (folder / "folder.json").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "notes.txt").write_text("mine")
    (folder / "file").write_text("mine")
    tiny.picture().save(folder / "ok.png")
    return folder


@pytest.fixture
def refused(place, monkeypatch, capsys):
    """Run a command line that must be refused; its standard error."""
    monkeypatch.chdir(place)

    def call(arguments, says):
        before = lying(place)
        code, out, err = started(monkeypatch, capsys, *arguments)
        err = err.replace(" │ │ ", " ")  # the frame around wrong usage
        assert code == 2 and out == "" and "Traceback" not in err, err
        for text in (says,) if isinstance(says, str) else says:
            assert text in err, f"{text!r} is not in {err!r}"
        assert lying(place) == before
        return err

    return call


# -- places ----------------------------------------------------------------------------------------

IMAGES = {
    "nowhere.png": "nowhere.png: no such file",
    "notes": "notes is a folder: expected an image file",
    "file/inside.png": "file/inside.png",
    "empty.png": "empty.png",
    "bytes.png": "bytes.png",
    "latin.png": "latin.png",
    "deep.png": "deep.png",
    f"{LONG}.png": "xxx: no such file",
    "": "is a folder",
}


@pytest.mark.parametrize("command", ("explain", "compare"))
@pytest.mark.parametrize("image", IMAGES)
def test_images(refused, command, image):
    refused([command, image, "-o", "out"], IMAGES[image])


PRESETS = {
    "nowhere.json": ("no preset file nowhere.json", "calibrate -o nowhere.json"),
    "folder.json": "no preset file folder.json",
    "empty.json": ("empty.json is damaged or not JSON", "make it again"),
    "bytes.json": ("bytes.json is damaged or not JSON", "make it again"),
    "latin.json": "latin.json is damaged or not JSON",
    "list.json": ("list.json holds a list", "make it again"),
    "text.json": "text.json holds a str",
    "deep.json": "deep.json is damaged or not JSON",
    "twice.json": "the key 'seed' comes twice",
    "foreign.json": "foreign.json is no preset file",
    "defualt": ("unknown preset 'defualt'", "did you mean 'default'"),
    "": "unknown preset ''",
}


@pytest.mark.parametrize("command", ("explain", "calibrate"))
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(refused, command, preset):
    more = ["--labels", "-o", "new.json"] if command == "calibrate" else ["-o", "out"]
    refused([command, "--preset", preset, *more], PRESETS[preset])


PLANS = {
    "nowhere.json": "nowhere.json",
    "folder.json": "folder.json: Is a directory",
    "file/inside.json": "file/inside.json",
    "empty.json": ("empty.json is damaged or not JSON", "give a plan"),
    "bytes.json": "bytes.json is damaged or not JSON",
    "latin.json": "latin.json is damaged or not JSON",
    "list.json": ("list.json holds a list", "plan.json of a store"),
    "text.json": "text.json holds a str",
    "deep.json": "deep.json is damaged or not JSON",
    "twice.json": "the key 'seed' comes twice",
    "foreign.json": "a plan has no 'format'",
}


@pytest.mark.parametrize("plan", PLANS)
def test_plan_files(refused, plan):
    refused(["evaluate", "--plan", plan, "-o", "out"], PLANS[plan])


OUTPUTS = {
    "notes": ("it holds notes.txt", "choose another folder"),
    "file": "it is not a folder",
    "file/out": "is not a folder: choose another output folder",
    LONG: "File name too long",
    "/".join(["x" * 200] * 25): "File name too long",
}


@pytest.mark.parametrize("command", ("explain", "compare"))
@pytest.mark.parametrize("output", OUTPUTS)
def test_outputs(refused, command, output):
    refused([command, "ok.png", "-o", output], OUTPUTS[output])


STORES = {
    "file": "file",
    "file/out": "file",
    LONG: "File name too long",
    "/".join(["x" * 200] * 25): "File name too long",
}


@pytest.mark.parametrize("output", STORES)
def test_stores(refused, output):
    refused(["evaluate", *EVALUATE, "-o", output], STORES[output])


FITTED = {
    "new.txt": "expected a file that ends in .json",
    "folder.json": ("folder.json is a folder", "preset.json"),
    "foreign.json": ("foreign.json exists and is no preset file", "give another name"),
    "bytes.json": ("bytes.json is damaged or not JSON", "give another name"),
    "list.json": "list.json",
    f"{'x' * 250}.json": "File name too long",
    f"{'x' * 246}.json": "File name too long",  # under which it is written at first
}


@pytest.mark.parametrize("output", FITTED)
def test_preset_files_to_write(refused, output):
    refused(["calibrate", "--labels", "-o", output], FITTED[output])


TABLES = {
    "no names": (["-r", "notes"], "which tables?"),
    "no names, an output": (["-o", "tables"], "which tables?"),
    "nothing there": (["all", "-r", "notes"], ("notes holds no part", "captum-dcam evaluate")),
    "a table of nothing": (["comparison", "-r", "notes"], ("has no results", "--suite objects")),
    "a summary of nothing": (["summary", "-r", "notes"], "notes"),
    "nowhere": (["all", "-r", "nowhere"], "nowhere is not a folder"),
    "a file": (["summary", "-r", "file"], "file is not a folder"),
    "no table": (["comparson"], ("unknown table 'comparson'", "did you mean 'comparison'")),
    "an output that is a file": (["summary", "-r", "notes", "-o", "file"], "file is not a folder"),
    "a long output": (["summary", "-r", "notes", "-o", LONG], "File name too long"),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables(refused, case):
    arguments, says = TABLES[case]
    refused(["table", *arguments], says)


# -- settings --------------------------------------------------------------------------------------

SETTINGS = {
    "generation without a value": (["explain", "--generation", "steps"], "expected name=value"),
    "generation without a name": (["explain", "--generation", "=3"], "expected name=value"),
    "generation twice": (
        ["explain", "--generation", "steps=1", "--generation", "steps=2"],
        "steps is given twice",
    ),
    "generation and an option": (
        ["explain", "--steps", 4, "--generation", "steps=2"],
        "--steps is given too",
    ),
    "generation of the call": (
        ["explain", "--generation", "generator=3"],
        ("'generator', which is no setting", "leave it out"),
    ),
    "the call itself": (["compare", "--generation", "self=3"], "'self', which is no setting"),
    "a request": (["evaluate", *EVALUATE, "--generation", "request=1"], "'request'"),
    "a kept forward": (["calibrate", "--labels", "--generation", "keep=true"], "'keep'"),
    "load without a value": (["explain", "--load", "family"], "expected name=value"),
    "load of the call": (["explain", "--load", "source=x"], "'source', which is no setting"),
    "load of an option": (["explain", "--load", "dtype=float16"], "give it as --dtype"),
    "load's family": (["explain", "--load", "family=[]"], "family is []: expected a name"),
    "an unknown family": (["explain", "--load", "family=minni"], "did you mean 'mini'"),
    "a device map": (["explain", "--load", "device_map=true"], "device_map is True: expected"),
    "an empty device map": (["explain", "--load", "device_map={}"], "device_map is {}: expected"),
    "a device map of text": (["explain", "--load", "device_map=[1]"], "device_map is [1]"),
    "code, as Python says it": (
        ["explain", "--load", "trust_remote_code=True"],
        ("trust_remote_code is 'True', a str", "expected True or False"),
    ),
    "no code, as Python says it": (["explain", "--load", "trust_remote_code=False"], "a str"),
    "code by a number": (["explain", "--load", "trust_remote_code=1"], "trust_remote_code is 1"),
    "an unknown setting of loading": (["explain", "--load", "foo=1"], ("--load foo", "foo")),
    "a revision of what has none": (["explain", "--load", "revision=main"], "have none"),
    "data without a value": (["evaluate", *EVALUATE, "--data", "seed"], "expected name=value"),
    "data's name": (["evaluate", "-M", "oracle", "--data", "name=coco"], "give it as --dataset"),
    "data's root": (["evaluate", "-M", "oracle", "--data", "root=x"], "'root', which is no"),
    "an unknown setting of data": (
        ["evaluate", "-M", "oracle", "--data", "cuont=1"],
        ("has no setting 'cuont'", "count"),
    ),
    "a count that is no number": (["evaluate", "-M", "oracle", "--data", "count=x"], "count is"),
    "a count below 1": (["evaluate", "-M", "oracle", "--data", "count=-1"], "-1"),
    "a metric's setting": (
        ["evaluate", *EVALUATE, "--metrics", "pointing:tolerance=x"],
        ("tolerance is 'x', a str", "expected"),
    ),
    "a metric's truth": (
        ["evaluate", *EVALUATE, "--metrics", "faithfulness:curves=3"],
        ("curves is 3, a int", "expected bool"),
    ),
    "a metric's list": (
        ["evaluate", *EVALUATE, "--metrics", "faithfulness:fractions=3"],
        ("fractions is 3, a int", "a list of float"),
    ),
    "a metric's words": (
        ["evaluate", *EVALUATE, "--metrics", "randomization:kinds=[3]"],
        ("kinds is [3]", "a list of str"),
    ),
    "a method's setting": (["compare", "-M", "tam:filter=x"], ("tam:filter is 'x'", "number")),
    "a method's truth": (["compare", "-M", "tam:eci=maybe"], "expected true or false"),
    "a setting of nothing": (["compare", "-M", "filter=3"], "there is no name before"),
    "no method": (["compare", "-M", "tamm"], ("unknown method 'tamm'", "did you mean 'tam'")),
    "no seconds": (
        ["compare", "--budget-seconds", "nan"],
        ("budget's seconds is nan", "a finite number above 0"),
    ),
    "endless seconds": (["compare", "--budget-seconds", "inf"], "budget's seconds is inf"),
    "seconds below 0": (["compare", "--budget-seconds", "-1"], "budget's seconds is -1.0"),
    "no passes": (["compare", "--budget-passes", "0"], "budget's passes is 0: expected a whole"),
    "passes below 0": (["evaluate", *EVALUATE, "--budget-passes", "-3"], "-3"),
    "a shard": (["evaluate", *EVALUATE, "--shard", "2/2"], "expected i/n"),
    "a shard of text": (["evaluate", *EVALUATE, "--shard", "a/b"], "expected i/n"),
    "no shard": (["evaluate", *EVALUATE, "--shard", "0/0"], "expected i/n"),
    "a policy": (["evaluate", *EVALUATE, "--errors", "ignore"], "on_error is 'ignore'"),
    "a refinement": (["explain", "--refine", "blur"], "unknown refinement 'blur'"),
    "none with another": (["explain", "--refine", "none", "--refine", "cba"], "stands alone"),
    "all with another": (["explain", "-w", "all", "-w", "red"], "stands alone"),
    "a scene and an image": (["explain", "ok.png", "--scene", "3"], "leave out --scene"),
    "a score": (["explain", "--score", "last"], "unknown score 'last'"),
    "a product": (["explain", "--product", "poled"], "did you mean 'pooled'"),
    "a dtype": (["explain", "--dtype", "float8"], "unknown dtype 'float8'"),
    "a scale": (["compare", "--scale", "maps"], "did you mean 'map'"),
    "an order": (["compare", "--sort", "f33"], "did you mean 'f3'"),
    "a device": (["explain", "--device", "abacus"], "unknown device 'abacus'"),
    "a device without numbers": (
        ["explain", "--device", "meta"],
        ("device meta holds no numbers", "expected cpu, cuda, mps"),
    ),
    "the same to evaluate": (["evaluate", *EVALUATE, "--device", "meta"], "device meta holds no"),
    "the same to calibrate": (["calibrate", "--labels", "--device", "meta"], "device meta holds"),
    "a device that is not here": (["compare", "--device", "cuda:99"], "cuda:99 is not here"),
    "a seed of many digits": (["explain", "--seed", 10**30], "expected a whole number of 64 bits"),
    "a seed below 0": (["evaluate", *EVALUATE, "--seed", "-1"], "seed is -1"),
    "a seed beyond 64 bits": (["evaluate", *EVALUATE, "--seed", 2**63], "seed is"),
    "an unknown model": (["explain", "-m", "minni"], ("'minni'", "did you mean 'mini'")),
    "a model that is a file": (["explain", "-m", "file"], "unknown model 'file'"),
    "a model that is a folder": (["explain", "-m", "notes"], "unknown model 'notes'"),
    "an empty model": (["explain", "-m", ""], "unknown model ''"),
    "no cache": (["explain", "--cache", "half"], "cache is 'half'"),
    "a data set": (["evaluate", "-M", "oracle", "-d", "cocoo"], "did you mean 'coco'"),
    "a prompt that is no text": (["explain", "-p", "\udcff"], ("--prompt is", "text in UTF-8")),
    "a model that is no text": (["compare", "-m", "\udcff"], ("--model is", "text in UTF-8")),
    "words that are no text": (["explain", "-w", "\udcff"], ("--words is", "text in UTF-8")),
    "no root": (["evaluate", "-M", "oracle", "-d", "coco"], "needs root"),
    "a root of nothing": (["evaluate", "-M", "oracle", "-d", "folder", "--root", "notes"], "notes"),
    "a root that is a file": (["evaluate", "-M", "oracle", "-d", "coco", "--root", "file"], "file"),
    "a root of scenes": (["evaluate", "-M", "oracle", "--root", "notes"], "takes no root"),
    "words": (["evaluate", *EVALUATE, "-w", "verbs"], "unknown kind of word 'verbs'"),
    "a suite": (["evaluate", "-s", "paprs"], "did you mean 'papers'"),
    "two plans": (["evaluate", "-M", "tam", "-s", "papers"], "--suite and --methods is given"),
    "a start beyond the end": (["evaluate", *EVALUATE, "--start", 9], "the data set has 1"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(refused, case):
    arguments, says = SETTINGS[case]
    refused([*arguments, "-o", "new.json" if arguments[0] == "calibrate" else "out"], says)


#: options that take a number, and what they are given
NUMBERS = {
    "explain": ("--seed", "--layer", "--gen-length", "--steps", "--block-length", "--temperature"),
    "compare": ("--budget-passes", "--budget-seconds", "--internal-batch-size", "--scene"),
    "evaluate": ("--start", "--limit", "--threads", "--budget-passes"),
    "calibrate": ("--check-start", "--check-limit"),
}


@pytest.mark.parametrize("value", ("abc", "", "1.5.2", "½"))
@pytest.mark.parametrize("command, flag", [(c, f) for c, flags in NUMBERS.items() for f in flags])
def test_numbers_that_are_none(refused, command, flag, value):
    refused([command, flag, value], ("Invalid value", flag, f"given: {value!r}"))


# -- what the model's family refuses ---------------------------------------------------------------

DECODING = {
    "foo=1": ("unknown setting 'foo' of mini", "Known: gen_length"),
    "stpes=4": ("'stpes'", "did you mean 'steps'"),
    "steps=abc": ("steps is 'abc'", "a whole number of at least 1"),
    "steps=99999999999999999999": ("steps is 99999999999999999999", "at most 100000"),
    "gen_length=1e400": "gen_length is inf",
    "gen_length=true": "gen_length is True",
    "temperature=nan": "temperature is 'nan'",
    "temperature=99999999999999999999": "temperature is 99999999999999999999",
    "temperature=-1": "temperature is -1",
    "remasking=high": ("remasking is 'high'", "expected one of"),
}


@pytest.mark.parametrize("setting", DECODING)
def test_decoding(refused, packaged, setting):
    refused(["explain", "ok.png", "--generation", setting, "-o", "out"], DECODING[setting])


# -- damaged checkpoints ---------------------------------------------------------------------------

DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "a list": lambda path: path.write_text("[]"),
    "deep": lambda path: path.write_text(DEEP),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
FILES = ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", (*FILES, "tokenizer_config.json"))
def test_damaged_checkpoints(refused, packaged, tmp_path, name, damage):
    if name == "tokenizer_config.json" and damage in ("gone", "a folder"):
        pytest.skip("the model does without it")
    folder = tmp_path / "model"
    shutil.copytree(packaged, folder)
    DAMAGES[damage](folder / name)
    gone = name == "config.json" and damage in ("gone", "a folder")
    refused(["explain", "ok.png", "-m", folder, "-o", "out"], str(folder) if gone else name)


@pytest.mark.parametrize(
    "name, change",
    [
        ("config.json", {"hidden_size": 64}),
        ("config.json", {"hidden_size": None}),
        ("config.json", {"hidden_size": "wide"}),
        ("config.json", {"num_hidden_layers": 1}),
        ("config.json", {"model_type": "captum_dcam_mini", "image_size": -3}),
        ("tokenizer.json", {"model": None}),
        ("tokenizer.json", {"added_tokens": 3}),
    ],
)
def test_checkpoints_whose_files_do_not_fit(refused, packaged, tmp_path, name, change):
    folder = tmp_path / "model"
    shutil.copytree(packaged, folder)
    record = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(record | change))
    err = refused(["explain", "ok.png", "-m", folder, "-o", "out"], str(folder))
    assert name in err or "model.safetensors" in err or "do not fit" in err


def test_the_packaged_weights_lie_where_they_are_expected():
    assert {*FILES} <= {path.name for path in WEIGHTS.iterdir()}
