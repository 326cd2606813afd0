"""A missing gradient has one diagnosis, whoever asks; numbers that are not finite are named."""

import pytest
import tiny
import torch
from torch import nn

from captum_dcam import compare, explain
from captum_dcam.attribution import DiffusionCAM
from captum_dcam.errors import InfeasibleStepError, InputError, InputTypeError, NotFiniteError
from captum_dcam.explaining import explain_generation
from captum_dcam.methods import METHODS, method
from captum_dcam.model.forward import DenoisingForward

PROMPT = "what is red ?"
SETTINGS = {"gen_length": 4, "block_length": 4, "steps": 2}
#: of grad_rollout the attention above the layer without a graph is left
GRADIENTS = [
    name
    for name in METHODS
    if {"gradients"} == set(METHODS[name].facts.needs) - {"pixel tokens"} and name != "grad_rollout"
]


def with_few_samples(name):
    fields = METHODS[name].__dataclass_fields__
    return method(name, **{key: 2 for key in ("steps", "samples") if key in fields})


def target(forward, position=1):
    return position, int(forward.trajectory.tokens[0, position])


def attributed(forward):
    return DiffusionCAM(forward).attribute(forward.request.pixels, target(forward))


def detached(value):
    if isinstance(value, tuple):
        return tuple(map(detached, value))
    return None if value is None else value.detach()


def without_graph(block):
    return block.register_forward_hook(lambda _module, _args, output: detached(output))


def errors_of_all(forward):
    """What every way of asking raises: attribute, explain, and each method that needs gradients."""
    for ask in (attributed, lambda f: explain_generation(f, [1])):
        with pytest.raises(InfeasibleStepError) as caught:
            ask(forward)
        yield str(caught.value)
    found = compare(
        forward.adapter, tiny.picture(), PROMPT, [1], GRADIENTS, layer=forward.layer, **SETTINGS
    )
    assert [row.status for row in found.rows] == ["failed"] * len(GRADIENTS)
    yield from (row.note for row in found.rows)


def test_a_layer_without_a_graph(cache):
    forward = tiny.bound(cache, layer=0)
    without_graph(forward.adapter.blocks[1])
    for message in errors_of_all(forward):
        assert "no gradient path to the image states of block 0" in message
        assert "without a backward pass" in message and "deepest usable one is" in message


def test_quantised_layers_are_named(cache):
    class Quantised(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.register_buffer("weight", linear.weight.detach().to(torch.int8))
            self.full = linear

        @torch.no_grad()
        def forward(self, x):
            return self.full(x)

    forward = tiny.bound(cache, layer=0)
    without_graph(forward.adapter.blocks[1])
    block = forward.adapter.blocks[1]
    name, linear = next((n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear))
    parent = block.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], Quantised(linear))
    for message in errors_of_all(forward):
        assert "Quantised (int8)" in message and "bitsandbytes" in message


def test_inference_mode_around_everything_gives_the_same_maps(cache):
    adapter, chosen = tiny.adapter(cache), list(map(with_few_samples, GRADIENTS))
    wanted = explain(adapter, tiny.picture(), PROMPT, layer=1, **SETTINGS)
    with torch.inference_mode():
        found = explain(adapter, tiny.picture(), PROMPT, layer=1, **SETTINGS)
        rows = compare(
            adapter, tiny.picture(), PROMPT, [1], chosen, layer=1, errors="raise", **SETTINGS
        ).rows
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    assert torch.equal(found.maps[0], wanted.maps[0])
    plain = compare(adapter, tiny.picture(), PROMPT, [1], chosen, layer=1, **SETTINGS).rows
    for row, same in zip(rows, plain, strict=True):
        assert torch.equal(row.maps[0], same.maps[0]), row.name


def test_attribute_inside_inference_mode_and_on_pixels_from_there(cache):
    forward = tiny.bound(cache, layer=1)
    wanted = attributed(forward)
    with torch.inference_mode():
        pixels = forward.request.pixels.clone()
        assert pixels.is_inference()
        inside = DiffusionCAM(forward).attribute(pixels, target(forward))
    outside = DiffusionCAM(forward).attribute(pixels, target(forward))
    assert torch.equal(inside, wanted) and torch.equal(outside, wanted)


def test_no_grad_outside_stays_and_changes_nothing(cache):
    forward = tiny.bound(cache, layer=1)
    wanted = attributed(forward)
    with torch.no_grad():
        assert torch.equal(attributed(forward), wanted)
        forward.replay(torch.tensor([0]), torch.tensor([0]))
        assert not torch.is_grad_enabled()


def test_weights_made_in_inference_mode_are_named(cache):
    with torch.inference_mode():
        adapter = tiny.adapter(cache)
    with pytest.raises(InfeasibleStepError, match=r"inside torch.inference_mode.*load it outside"):
        explain(adapter, tiny.picture(), PROMPT, layer=1, **SETTINGS)


# -- what is not finite ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("where", ("below the tap", "above it"))
def test_a_generation_that_is_not_finite(cache, where, value):
    adapter = tiny.adapter(cache)
    block = adapter.blocks[0 if where == "below the tap" else 2]
    with torch.no_grad():
        block.down_proj.weight.fill_(value)  # some versions' attention swallows NaN
    with pytest.raises(NotFiniteError, match=r"logits of the generation .* float32: .*dtype="):
        explain(adapter, tiny.picture(), PROMPT, layer=1, **SETTINGS)


@pytest.mark.parametrize("preset", ("default", "base", "paper"))
def test_features_that_overflow_after_the_generation(cache, preset):
    forward = tiny.bound(cache, layer=1)
    with torch.no_grad():
        forward.adapter.blocks[0].down_proj.weight.fill_(float("nan"))
    for ask in (attributed, lambda f: explain_generation(f, [1], preset=preset)):
        with pytest.raises(NotFiniteError, match="features of the tapped block are NaN"):
            ask(forward)


def test_logits_that_overflow_after_the_generation(cache):
    forward = tiny.bound(cache, layer=1)
    with torch.no_grad():
        forward.adapter.blocks[2].down_proj.weight.fill_(float("nan"))
    for ask in (attributed, lambda f: explain_generation(f, [1])):
        with pytest.raises(NotFiniteError, match="the logits are NaN or infinite"):
            ask(forward)


def test_gradients_that_overflow_name_the_type(cache):
    """A float16 gradient beyond 65504, where features and logits are finite."""
    forward = tiny.bound(cache, layer=1, dtype=torch.float16)

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("inf")

    def hook(_module, _args, output):
        if isinstance(output, tuple):
            return (Steep.apply(output[0]), *output[1:])
        return Steep.apply(output)

    forward.adapter.blocks[2].register_forward_hook(hook)
    for ask in (attributed, lambda f: explain_generation(f, [1])):
        with pytest.raises(NotFiniteError, match=r"gradients .* float16: float16 overflows"):
            ask(forward)


def test_tokens_ruled_out_by_minus_infinity_are_no_fault(cache):
    forward = tiny.bound(cache, layer=1)
    denoise = forward.adapter.denoise

    def ruled_out(*args):
        logits = denoise(*args).clone()
        logits[..., 0] = -float("inf")
        return logits

    forward.adapter.denoise = ruled_out
    assert bool(attributed(forward).isfinite().all())


# -- the constructor -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", (3, "layers.3", [0], lambda f: f.adapter.blocks[1], lambda f: f, lambda f: nn.Identity)
)
def test_a_layer_that_is_not_the_tap_is_refused_where_it_is_given(cache, layer):
    forward = tiny.bound(cache, layer=1)
    given = layer(forward) if callable(layer) else layer
    with pytest.raises(InputTypeError, match=r"expected forward_func.tap.*layer=number"):
        DiffusionCAM(forward, layer=given)
    other = DenoisingForward(forward.adapter, 1)
    with pytest.raises(InputTypeError):
        DiffusionCAM(forward, layer=other.tap)
    assert torch.equal(
        DiffusionCAM(forward, forward.tap).attribute(forward.request.pixels, target(forward)),
        attributed(forward),
    )


@pytest.mark.parametrize("ids", ([], [1], [0, 1], ["cuda"], "01", 0, True))
def test_device_ids_of_another_device_are_refused(cache, ids):
    forward = tiny.bound(cache, layer=1)
    with pytest.raises(InputError, match=r"device_ids is .*the model is on cpu"):
        DiffusionCAM(forward, device_ids=ids)


def test_device_ids_of_the_models_own_device_are_taken(cache):
    forward = tiny.bound(cache, layer=1)
    maps = DiffusionCAM(forward, device_ids=[0]).attribute(forward.request.pixels, target(forward))
    assert torch.equal(maps, attributed(forward))
