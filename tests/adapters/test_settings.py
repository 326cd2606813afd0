"""Settings of a generation: one way to say them, and the same words for the same mistake."""

import pytest
import tiny
import torch
from doubles import dream_vl as dream_double
from doubles import lavida as lavida_double
from doubles import llada_v as llada_v_double

import captum_dcam
from captum_dcam.adapters.common import settings
from captum_dcam.adapters.common.llada import Llada
from captum_dcam.adapters.common.settings import (
    Setting,
    Settings,
    in_blocks,
    need_generator,
    read_guided,
)
from captum_dcam.adapters.dream_vl.decoding import checked as dream_vl
from captum_dcam.adapters.lavida import LavidaAdapter
from captum_dcam.adapters.lavida.decoding import checked as dream
from captum_dcam.adapters.lavida_o.facts import LavidaOFamily
from captum_dcam.adapters.llada_v import LladaVAdapter
from captum_dcam.adapters.llada_v.decoding import checked as llada_v
from captum_dcam.adapters.mmada.decoding import SETTINGS as MMADA
from captum_dcam.adapters.mmada.facts import MmadaFamily
from captum_dcam.errors import InputError, InputTypeError, SettingError, UnknownNameError
from captum_dcam.model.forward import DenoisingForward

TOY = Settings(
    "Toy",
    {
        "gen_length": Setting(8, settings.length, also="max_new_tokens"),
        "top_p": Setting(0.9, settings.share, none=True),
        "top_k": Setting(None, settings.count),
    },
    refused={"beams": "it has one"},
)


def test_defaults_other_names_and_none():
    assert TOY.read({}) == {"gen_length": 8, "top_p": 0.9, "top_k": None}
    assert TOY.read({"max_new_tokens": 3, "top_p": None})["gen_length"] == 3
    given = {"max_new_tokens": 3}
    TOY.read(given)
    assert given == {"max_new_tokens": 3}, "what was given is the caller's"
    open_ = Settings("Toy", {"steps": Setting(2)}, others=True)
    assert open_.read({"eos": 5}) == {"steps": 2, "eos": 5}


@pytest.mark.parametrize(
    ("given", "message"),
    (
        ({"beams": 2}, "unknown setting 'beams' of Toy: it has one. Known: gen_length, top_p"),
        ({"lenght": 2}, "unknown .* of Toy; did you mean 'gen_length'. Known: .*; max_new_tokens"),
        ({"gen_length": 4, "max_new_tokens": 4}, "max_new_tokens and gen_length mean the same"),
        ({"gen_length": None}, "gen_length is None: expected a whole"),
        ({"gen_length": True}, "gen_length is True: expected a whole"),
        ({"max_new_tokens": 0}, "gen_length is 0: .*at least one token"),
        ({"top_k": 1.5}, "top_k is 1.5: expected a whole number of at least 1"),
        ({"top_p": 0.0}, r"top_p is 0.0: expected a share in \(0, 1\]"),
    ),
)
def test_mistakes(given, message):
    with pytest.raises((InputError, InputTypeError, SettingError), match=message) as caught:
        TOY.read(given)
    assert isinstance(caught.value, SettingError) == ("unknown" in message)


@pytest.mark.parametrize("value", (-1.0, float("inf"), float("nan")))
def test_numbers(value):
    settings.number("temperature", 0)
    settings.inside("eps", 0.5)
    with pytest.raises(InputError, match="expected a finite number, 0 or more"):
        settings.number("temperature", value)
    with pytest.raises(InputError, match="between 0 and 1"):
        settings.inside("eps", value)


@pytest.mark.parametrize(
    ("total", "block", "steps", "blocks", "message"),
    (
        (8, None, None, 1, None),
        (8, 4, 6, 2, None),
        (8, 3, None, None, "tokens 8 is not a multiple of block_length 3"),
        (8, 4, 1, None, r"multiple of the 2 blocks \(tokens 8 / block_length 4\)"),
        (8, 4, 5, None, "multiple of the 2 blocks"),
    ),
)
def test_blocks(total, block, steps, blocks, message):
    made = {"tokens": total, "block_length": block, "steps": steps}
    if message is None:
        assert in_blocks(made, "tokens") == blocks and made["block_length"] == total // blocks
        return
    with pytest.raises(InputError, match=message):
        in_blocks(made, "tokens")


def test_what_draws_needs_a_generator():
    need_generator(False, None)
    need_generator(True, torch.Generator())
    with pytest.raises(InputError, match="sampling needs a generator"):
        need_generator(True, None)


FAMILIES = {
    "dream_vl": lambda given: dream_vl(given, None),
    "lavida": lambda given: dream(given, True, None),
    "llada_v": lambda given: llada_v(given, None, False, False),
    "mmada": lambda given: read_guided(MMADA, given, None, "max_new_tokens"),
}


@pytest.mark.parametrize("given", ({"lenght": 3}, {"temperature": 1.0}, {"temperature": -1.0}))
def test_families_say_the_same_of_the_same_mistake(given):
    said = set()
    for check in FAMILIES.values():
        with pytest.raises(InputError if "temperature" in given else SettingError) as caught:
            check(given)
        said.add(str(caught.value).split(" of ")[0])
    assert len(said) == 1


# -- decodings that have a name --------------------------------------------------------------------


def adapter(kind):
    """A double's, of a family that names decodings."""
    if kind in ("llada", "dream"):
        return LavidaAdapter(lavida_double.model(kind), lavida_double.processor())
    if kind == "llada_v":
        return LladaVAdapter(llada_v_double.model(), llada_v_double.processor())
    return captum_dcam.wrap(dream_double.model(), dream_double.processor())


READERS = {
    "llada": lambda given: Llada.checked(None, given, True, torch.Generator()),
    "dream": lambda given: dream(given, True, torch.Generator()),
    "llada_v": lambda given: llada_v(given, torch.Generator(), False, True),
    "dream_vl": lambda given: dream_vl(given, torch.Generator(), "decoding_pipeline" in given),
}


@pytest.mark.parametrize("kind", READERS)
def test_named_decodings_are_settings_of_their_family(kind):
    made, read = adapter(kind), READERS[kind]
    assert made.facts.decodings
    for name, values in made.facts.decodings.items():
        found = read(made.decoding(name, {}))
        for setting, value in values.items():
            assert found[setting] == value, (name, setting)


def test_mmadas_and_lavida_os_demos():
    assert read_guided(MMADA, MmadaFamily.facts.decodings["demo"], None, "max_new_tokens")
    assert Llada.checked(None, LavidaOFamily.facts.decodings["demo"], True, None)


def test_single_settings_override_a_named_decoding():
    made = adapter("llada")
    forward = DenoisingForward(made, 1)
    request = made.prepare([[tiny.picture()]], ["what is this ?"])
    one = forward.generate(request, decoding="paper", max_new_tokens=16)
    assert one.steps == 8 and one.tokens.shape == (1, 16)
    assert one.settings["shift"] == 0.33 and one.settings["schedule"] == "shift"
    assert "gen_length" not in one.settings
    other = forward.generate(
        request, decoding="paper", gen_length=16, steps=4, schedule=None, shift=None
    )
    assert other.steps == 4 and "step_ratio" not in other.settings
    with pytest.raises(UnknownNameError, match="'dmo' of lavida: it has demo, paper"):
        forward.generate(request, decoding="dmo")
    with pytest.raises(UnknownNameError, match="none of its decodings has a name"):
        tiny.bound("none").generate(request, decoding="demo")


def test_dreams_evaluation_chooses_by_margin():
    made = adapter("dream")
    assert made.decoding("paper", {})["alg"] == "topk_margin"
    assert made.decoding("paper", {"alg": "entropy"})["alg"] == "entropy"
    assert "alg" not in made.decoding("demo", {})
