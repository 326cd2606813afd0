"""Rotary tables and position ids: wrong ones are computed again, right ones keep their bits."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from doubles import dream_vl as double
from torch import nn
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from captum_dcam.adapters.common.compat import default_frequencies
from captum_dcam.errors import WeightsError
from captum_dcam.model.buffers import POSITIONS, ROTARY, counted, repair

#: what memory held that nobody had filled (environments, Dream-VL under transformers 5)
GARBAGE = torch.tensor([-6.7e8, 4.6e-41, 0.0, 3.1e12])


class Rotary(nn.Module):
    """As LLaMA's first class, and LLaDA-V's."""

    def __init__(self, dim=8, base=500.0):
        super().__init__()
        self.dim, self.base = dim, base
        table = torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)])
        self.register_buffer("inv_freq", table, persistent=False)


class RotaryDynamicNTK(Rotary):
    """Computes its table anew, with a larger base, when the sequence grows."""


class RotaryOfConfig(nn.Module):
    """As in transformers 4.45 to 4.57, Dream and Dream-VL."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=8, num_attention_heads=1, rope_theta=10.0)
        self.rope_init_fn = default_frequencies
        found, self.attention_scaling = default_frequencies(self.config)
        self.register_buffer("inv_freq", found, persistent=False)
        self.original_inv_freq = self.inv_freq


class VisionRotary(nn.Module):
    """Keeps nothing of what it was made with."""

    def __init__(self, dim=8, theta=10000.0):
        super().__init__()
        table = torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)])
        self.register_buffer("inv_freq", table, persistent=False)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.3, 0.1, 0.0]), persistent=False)
        self.register_buffer("position_ids", torch.arange(5)[None], persistent=False)


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_positions = 5
        self.register_buffer("position_ids", torch.arange(5)[None], persistent=False)


SCALED = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "short_factor": [1.0, 2.0, 3.0, 4.0],
        "long_factor": [4.0, 5.0, 6.0, 7.0],
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def llama(kind):
    made = {"rope_type": kind, "rope_theta": 100.0, **SCALED[kind]}
    shape = {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 64}
    return LlamaRotaryEmbedding(LlamaConfig(**shape, rope_parameters=made))


def gemma():
    """A table per kind of layer."""
    kinds = ["sliding_attention", "full_attention"]
    made = Gemma3TextConfig(hidden_size=16, head_dim=8, num_hidden_layers=2, layer_types=kinds)
    return Gemma3RotaryEmbedding(made)


PARTS = {
    "base and dim": Rotary,
    "config and function": RotaryOfConfig,
    "vision": VisionRotary,
    "gemma": gemma,
    **{f"llama {kind}": lambda kind=kind: llama(kind) for kind in SCALED},
}


def tables(part):
    """Every rotary table of a module, attributes too, and the scaling that goes with it."""
    held = {**dict(part.named_buffers()), **vars(part)}
    return {n: v for n, v in held.items() if n.endswith(("inv_freq", "attention_scaling"))}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("kind", PARTS)
def test_right_tables_keep_their_bits_in_every_type(kind, dtype):
    part = PARTS[kind]().to(dtype)
    before = copy.deepcopy(tables(part))
    assert repair(nn.Sequential(part, Tower(), Unknown())) == {}
    same(tables(part), before)


@pytest.mark.parametrize("kind", PARTS)
def test_uninitialised_tables_are_computed_again(kind):
    model = nn.Sequential(PARTS[kind](), nn.Linear(2, 2), PARTS[kind]())
    before = copy.deepcopy(tables(model[2]))
    for name, held in model[2].named_buffers():
        if name.endswith("inv_freq"):
            setattr(model[2], name, GARBAGE[: len(held)].clone())
    if kind == "config and function":
        model[2].original_inv_freq, model[2].attention_scaling = model[2].inv_freq, None
    assert repair(model) == {ROTARY: 1}
    for name, value in before.items():
        found = torch.as_tensor(tables(model[2])[name])
        assert torch.allclose(found, torch.as_tensor(value), rtol=1e-6), name
    assert repair(model) == {}
    assert not any("inv_freq" in name for name in model.state_dict())


@pytest.mark.parametrize(
    "values",
    ([0.0] * 4, [float("nan"), 1, 1, 1], [1, 0.5, -0.1, 0], [3.0, 1, 1, 1], [1e-6] * 4),
)
def test_what_no_table_can_hold_is_wrong_whatever_its_kind(values):
    for part in (llama("dynamic"), VisionRotary()):
        before = part.inv_freq.clone()
        part.inv_freq = torch.tensor(values)
        assert repair(part) == {ROTARY: 1}
        assert torch.allclose(part.inv_freq, before)


def test_another_base_than_the_modules_own_is_wrong():
    part = Rotary()
    part.inv_freq = Rotary(base=10000.0).inv_freq
    assert repair(nn.Sequential(part)) == {ROTARY: 1}
    assert part.inv_freq.tolist() == pytest.approx([500.0 ** (-i / 8) for i in (0, 2, 4, 6)])


def test_tables_that_have_grown_with_the_sequence_stay():
    """By the classes' own forwards; and by hand for a class of LLaMA's first kind."""
    grown = RotaryDynamicNTK()
    grown.inv_freq = Rotary(base=2000.0).inv_freq
    before = grown.inv_freq.clone()
    assert repair(grown) == {} and torch.equal(grown.inv_freq, before)
    for kind in ("dynamic", "longrope"):
        part = llama(kind)
        short = part.inv_freq.clone()
        part(torch.zeros(1, 200, 8), torch.arange(200)[None])
        long = part.inv_freq.clone()
        assert not torch.allclose(short, long)
        assert repair(part) == {} and torch.equal(part.inv_freq, long)
        part(torch.zeros(1, 8, 8), torch.arange(8)[None])
        assert torch.equal(part.inv_freq, short)  # the first table was kept too


def test_a_table_that_was_cast_keeps_its_type():
    part = Rotary().to(torch.bfloat16)
    part.inv_freq.zero_()
    assert repair(part) == {ROTARY: 1} and part.inv_freq.dtype == torch.bfloat16
    assert torch.equal(part.inv_freq, Rotary().inv_freq.bfloat16())


def test_position_ids_are_counted_again():
    model = nn.Sequential(Tower(), Tower(), Rotary())
    model[1].position_ids = torch.full((1, 5), 7)
    model[2].inv_freq.zero_()
    wrong = repair(model)
    assert wrong == {POSITIONS: 1, ROTARY: 1}
    assert model[1].position_ids.tolist() == [[0, 1, 2, 3, 4]]
    assert counted(wrong) == "1 table of position ids and 1 rotary table"
    assert counted({ROTARY: 6}) == "6 rotary tables"


@pytest.mark.parametrize("name", ("inv_freq", "position_ids"))
def test_what_cannot_be_computed_is_refused_by_its_name(name):
    model = nn.Sequential(nn.Linear(2, 2), Unknown())
    setattr(model[1], name, getattr(model[1], name) - 7)
    with pytest.raises(WeightsError, match=rf"buffer 1\.{name} is \[-[67]"):
        repair(model)


def test_offloaded_tables_are_left_alone():
    part = Rotary().to("meta")
    assert repair(nn.Sequential(part)) == {} and part.inv_freq.is_meta


def test_loading_repairs_without_a_word(monkeypatch):
    from captum_dcam.adapters.dream_vl import DreamVLAdapter

    def loaded(_source, **_options):
        made = double.model()
        made.model.rotary_emb.inv_freq = GARBAGE.repeat(2)
        return made, double.processor()

    monkeypatch.setattr(DreamVLAdapter, "loader", staticmethod(loaded))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = DreamVLAdapter.load("somewhere")
    right = double.model().model.rotary_emb.inv_freq
    assert torch.allclose(made.model.model.rotary_emb.inv_freq, right)
