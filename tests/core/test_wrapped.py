"""Models inside PEFT, DataParallel and torch.compile, and hooked by accelerate, are explained."""

import copy

import pytest
import tiny
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import captum_dcam
from captum_dcam.errors import InfeasibleStepError, InputError, WeightsError
from captum_dcam.model.wrappers import compiled, unwrapped


def wrapped(model, **options):
    return captum_dcam.wrap(model, tiny.processor(), **options)


def explained(model, **options):
    settings = dict(gen_length=6, block_length=3) | options
    return captum_dcam.explain(wrapped(model), tiny.picture(), tiny.PROMPT, **settings)


def same(one, other, tolerance=0.0):
    assert one.words == other.words
    return all(tiny.relative(a, b) <= tolerance for a, b in zip(one.maps, other.maps, strict=True))


@pytest.fixture
def backend():
    """Of torch.compile, which counts what it is given."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    count.graphs = graphs
    yield count
    torch._dynamo.reset()


# -- taken off -------------------------------------------------------------------------------------


def distributed(model):
    outer = nn.Module.__new__(DistributedDataParallel)  # its constructor wants a process group
    nn.Module.__init__(outer)
    outer.module = model
    return outer


@pytest.mark.parametrize("around", [nn.DataParallel, torch.compile, distributed])
def test_what_is_around_a_model_is_taken_off(around):
    model = tiny.model()
    assert unwrapped(around(nn.DataParallel(around(model)))) is model
    assert wrapped(around(model)).model is model


def test_a_model_that_nothing_is_around_stays():
    model = tiny.model()
    assert unwrapped(model) is model and not compiled(model)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch before 2.6 cannot")
def test_compiled_layers_run_as_they_are_written(backend):
    """Hooks that are put on a compiled layer later are not in its graph."""
    model, picture = tiny.model(), tiny.picture()
    plain = explained(tiny.model())
    for block in model.layers:
        block.compile(backend=backend)
    assert compiled(model)
    adapter = wrapped(model)
    request = adapter.prepare([[picture]], [tiny.PROMPT])
    with torch.no_grad():
        adapter.prefill(adapter.embed(request.pixels, *request.extras))
    before = len(backend.graphs)
    assert before  # the user's own calls are compiled, before and after
    assert same(explained(model), plain)
    assert len(backend.graphs) == before
    assert model.layers[0]._compiled_call_impl is not None


def test_a_compiled_model_needs_a_torch_that_can_leave_it_out(backend, monkeypatch):
    monkeypatch.delattr(torch.compiler, "set_stance", raising=False)
    model = tiny.model()
    model.layers[0].compile(backend=backend)
    with pytest.raises(InputError, match=r"from 2\.6 it can\): load it without \.compile"):
        wrapped(model)
    assert wrapped(torch.compile(tiny.model())).family == "mini"


# -- PEFT ------------------------------------------------------------------------------------------


def lora(model):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, settings)


def test_lora_stays_active_and_trainable():
    model = lora(tiny.model()).train()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    found = explained(nn.DataParallel(model))
    assert trainable and {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    assert model.training and all(p.grad is None for p in model.parameters())
    merged = copy.deepcopy(model).eval().merge_and_unload()
    assert same(found, explained(merged), 1e-4)
    with model.disable_adapter():
        without = explained(model)
    assert same(without, explained(tiny.model()))
    assert without.words != found.words or not same(without, found, 1e-2)


def test_learned_prompts_are_refused():
    class Configuration:
        is_prompt_learning, peft_type = True, "PROMPT_TUNING"

    class Prompted(nn.Module):
        active_adapter, peft_config = "default", {"default": Configuration}
        get_base_model = None

    told = r"'default' is of type PROMPT_TUNING.*give wrap model\.get_base_model\(\)"
    with pytest.raises(InputError, match=told):
        wrapped(Prompted())


# -- quantised weights -----------------------------------------------------------------------------


def language(model):
    """Names of the linear layers of the language model's blocks."""
    layers = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {n for n in layers if n.startswith("layers.")}


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_without_a_backward_are_named():
    quantise = getattr(torch.ao.quantization, "quantize_dynamic", None)
    if quantise is None or "none" in torch.backends.quantized.engine:
        pytest.skip("this torch has no quantised layers of its own")
    model = quantise(tiny.model(), language(tiny.model()))
    with pytest.raises(
        InfeasibleStepError, match=r"Linear \(packed\) hold quantised weights.*lens"
    ):
        explained(model)
    settings = dict(methods=["logit_lens", "attention"], gen_length=4)
    found = captum_dcam.compare(wrapped(model), tiny.picture(), tiny.PROMPT, **settings)
    assert all(row.maps is not None and bool(row.maps[0].any()) for row in found.rows)


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_with_a_backward_are_explained():
    """By torchao: weights alone have one, with quantised inputs there is none."""
    torchao = pytest.importorskip("torchao.quantization")
    plain = explained(tiny.model())
    model = tiny.model()
    names = language(model)
    torchao.quantize_(
        model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda _module, name: name in names
    )
    found = explained(model)
    assert found.words == plain.words and not same(found, plain) and same(found, plain, 0.5)
    model = tiny.model()
    torchao.quantize_(
        model,
        torchao.Int8DynamicActivationInt8WeightConfig(),
        filter_fn=lambda _module, name: name in names,
    )
    with pytest.raises(InfeasibleStepError, match=r"Linear \(.*Tensor\) hold quantised weights"):
        explained(model)


# -- accelerate, and weights that are elsewhere ----------------------------------------------------


def test_weights_that_are_split_are_refused():
    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(InputError, match=r"FullyShardedDataParallel, which splits.*load that with"):
        wrapped(FullyShardedDataParallel())


def test_mixed_precision_around_a_model_is_refused():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    try:
        model = accelerator.prepare_model(tiny.model())
        with pytest.raises(InputError, match=r"accelerator\.unwrap_model\(model, keep_fp32_wr"):
            wrapped(model)
        freed = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        assert same(explained(freed), explained(tiny.model()))
    finally:
        accelerator.free_memory()
        type(accelerator.state)._reset_state(reset_partial_state=True)


def test_weights_on_meta_are_refused():
    with pytest.raises(WeightsError, match=r"MiniForMaskedDiffusion are on the device meta.*fill"):
        wrapped(tiny.model().to("meta"))


def test_the_device_of_an_offloaded_model_is_where_it_computes():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.hooks import ModelHook, add_hook_to_module

    plain, model = explained(tiny.model()), tiny.model()
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    assert wrapped(model).device == torch.device("cpu")
    for part in model.modules():  # a second hook: accelerate makes a sequence of both
        if hasattr(part, "_hf_hook"):
            add_hook_to_module(part, ModelHook(), append=True)
    assert wrapped(model).device == torch.device("cpu")
    assert same(explained(model), plain)
