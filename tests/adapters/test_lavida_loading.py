"""LaViDa: which checkpoints are loaded, what is refused, and the repairs that new versions need.

That a checkpoint loads through the authors' builder is tested on it, tests/upstream.
"""

import contextlib
import importlib
import json
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from doubles import lavida as double
from transformers import PreTrainedModel

from captum_dcam.adapters.common import compat as common
from captum_dcam.adapters.lavida import LavidaAdapter, compat, loading
from captum_dcam.errors import RemoteCodeError, WeightsError
from captum_dcam.model.versions import transformers_major


def folder(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.fixture
def lost():
    """Names of parameters that the checkpoint does not hold."""
    return []


@pytest.fixture
def built(monkeypatch, lost):
    """What the builder is called with; it gives the double."""
    seen = {}

    def load_pretrained_model(path, base, name, **options):
        seen.update(path=path, base=base, name=name, **options)
        cls = double.CLASSES[name.removeprefix("llava_")]
        model = PreTrainedModel.from_pretrained.__func__(cls, path)
        return *double.processor()[:1], model, double.processor()[1], 4096

    def from_pretrained(cls, path, output_loading_info):
        (variant,) = (v for v, c in double.CLASSES.items() if c is cls)
        return double.model(variant), {"missing_keys": lost}

    classes = {cls.__name__: cls for cls in double.CLASSES.values()}
    builder = SimpleNamespace(load_pretrained_model=load_pretrained_model, **classes)
    monkeypatch.setattr(compat, "package", lambda: builder)
    monkeypatch.setattr("captum_dcam.adapters.common.loading.empty_tower", contextlib.nullcontext)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    before = vars(PreTrainedModel)["from_pretrained"]
    yield seen
    assert vars(PreTrainedModel)["from_pretrained"] is before


LLADA = dict(model_type="llava_llada", architectures=["LlavaLladaForMaskedDiffusion"])
DREAM = dict(model_type="llava_dream", architectures=["LlavaDreamForMaskedDiffusion"])


def test_a_checkpoint_goes_through_the_authors_builder(tmp_path, built):
    source = folder(tmp_path, **LLADA)
    adapter = LavidaAdapter.load(source, dtype="float32", cache="none", single="list")
    assert adapter.family == "lavida" and adapter.variant == "llada" and adapter.cache == "none"
    assert adapter.dtype == torch.float32 and not adapter.model.training
    assert (built["path"], built["base"], built["name"]) == (source, None, "llava_llada")
    assert built["torch_dtype"] == "bfloat16"  # at others the builder stops in a debugger
    assert built["vision_kwargs"]["mm_vision_tower"] == "google/siglip-so400m-patch14-384"
    if not torch.cuda.is_available():
        assert built["device_map"] == "auto"  # else it moves the tower to CUDA
    LavidaAdapter.load(source, dtype=torch.float16, device_map="auto", vision_tower=None)
    assert built["torch_dtype"] == "float16" and built["vision_kwargs"] is None


def test_dreams_tokenizer_is_remote_code(tmp_path, built):
    source = folder(tmp_path, **DREAM)
    with pytest.raises(RemoteCodeError, match=r"tokenizer of its own code.*trust_remote_code=True"):
        LavidaAdapter.load(source)
    assert not built
    assert LavidaAdapter.load(source, trust_remote_code=True).variant == "dream"


@pytest.mark.parametrize(
    "config",
    (
        dict(model_type="llava_llada", architectures=["LlavaLLaDAModelLM"]),
        dict(LLADA, dual_tower=True),
        dict(model_type="llava_llada"),
    ),
)
def test_checkpoints_of_other_families(tmp_path, built, config):
    with pytest.raises(WeightsError, match="expected LlavaLladaForMaskedDiffusion or"):
        LavidaAdapter.load(folder(tmp_path, **config))
    assert not built


def test_a_checkpoint_with_holes(tmp_path, built, lost):
    lost.append("model.transformer.wte.weight")
    with pytest.raises(WeightsError, match="lacks 1 of the model's tensors"):
        LavidaAdapter.load(folder(tmp_path, **LLADA))


def test_no_checkpoint(tmp_path, built):
    with pytest.raises(WeightsError, match="no weights of its own: name a checkpoint"):
        LavidaAdapter.load(None)
    with pytest.raises(WeightsError, match=r"holds no architecture|cannot be loaded"):
        LavidaAdapter.load(str(tmp_path))


def test_a_missing_package_is_named_with_its_install_line(tmp_path, monkeypatch):
    for name in ("llava", "llava.model.language_model.llava_llada"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"git clone https://github.com/jacklishufan/LaViDa"):
        LavidaAdapter.load(folder(tmp_path, **LLADA))
    assert "deepspeed" not in sys.modules


def test_a_revision_is_fetched_first(tmp_path, built, monkeypatch):
    import huggingface_hub

    source = folder(tmp_path, **LLADA)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, revision: f"{source}/{revision}/.."
    )
    (tmp_path / "abc").mkdir()
    LavidaAdapter.load("owner/name", revision="abc")
    assert built["path"] == f"{source}/abc/.."


# -- repairs ---------------------------------------------------------------------------------------


def test_deepspeed_has_a_stand_in_while_it_is_imported():
    if importlib.util.find_spec("deepspeed") is not None:
        pytest.skip("deepspeed is installed")
    with common.deepspeed():
        import deepspeed

        out = deepspeed.checkpointing.checkpoint(torch.exp, torch.ones(2, requires_grad=True))
    assert torch.equal(out, torch.ones(2).exp()) and "deepspeed" not in sys.modules


def test_tie_weights_takes_todays_arguments():
    class Model:
        def tie_weights(self):
            self.tied = True

    common.without_arguments(Model)
    once = Model.tie_weights
    common.without_arguments(Model)
    assert Model.tie_weights is once
    model = Model()
    model.tie_weights(recompute_mapping=False)
    assert model.tied


def test_frequencies_of_plain_rotary_embeddings():
    config = SimpleNamespace(hidden_size=24, num_attention_heads=3, rope_theta=100.0)
    found, scaling = common.default_frequencies(config)
    assert scaling == 1 and found.tolist() == pytest.approx([100 ** (-i / 4) for i in range(4)])
    config = SimpleNamespace(head_dim=4, rope_parameters={"rope_theta": 9.0})
    assert common.default_frequencies(config)[0].tolist() == pytest.approx([1, 1 / 3])


@pytest.mark.skipif(transformers_major() < 5, reason="needs no repair")
def test_classes_under_transformers_5(monkeypatch):
    """On stand-ins; on the real ones in tests/upstream."""

    class Parent:
        def __init__(self, width):
            self.width = width

    class Child(Parent):
        def __init__(self):
            raise AssertionError("made by transformers 5")

    class Model:
        _tied_weights_keys = ("head",)

        def tie_weights(self):
            pass

    class Cache:
        def __init__(self):
            raise ValueError("no layers")

    class Generation:
        def __init__(self, **given):
            self.given = given
            self.validate(is_init=True)

        def validate(self):
            raise AssertionError

    language = types.ModuleType("stand_in_dream")
    language.ROPE_INIT_FUNCTIONS = {"linear": 1}
    language.DreamPrefixLMCache, language.DreamGenerationConfig = Cache, Generation
    siglip = types.ModuleType("llava.model.multimodal_encoder.siglip_encoder")
    siglip.SigLipVisionConfig = type("SigLipVisionConfig", (), {})
    for module in (language, siglip):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    base = type("DreamBaseModel", (), {"__module__": "stand_in_dream"})
    llada = SimpleNamespace(
        LlavaLladaConfig=Child,
        LLaDAConfig=Parent,
        LLaDAModelLM=Model,
        LlavaLladaForMaskedDiffusion=type("A", (Model,), {}),
    )
    dream = SimpleNamespace(
        LlavaDreamConfig=type("C", (Parent,), {}),
        DreamConfig=Parent,
        LlavaDreamForMaskedDiffusion=type("B", (Model,), {}),
        DreamBaseModel=base,
    )
    compat.repair_classes(llada, dream)
    assert Child(width=3).width == 3
    assert llada.LlavaLladaForMaskedDiffusion._tied_weights_keys == {}
    assert siglip.SigLipVisionConfig._set_token_in_kwargs({}) is None
    assert language.ROPE_INIT_FUNCTIONS["default"] is common.default_frequencies
    assert Cache().past_key_values == {}
    made = Generation.from_model_config(SimpleNamespace(mask_token_id=5))
    assert made.given["mask_token_id"] == 5 and made.given["top_k"] == 50


def test_the_builder_is_named_by_the_architecture(tmp_path):
    name = loading._builder_name
    for config, expected in ((LLADA, "llava_llada"), (DREAM, "llava_dream")):
        source = folder(tmp_path, **config)
        assert name(source, source, trust_remote_code=True) == expected
