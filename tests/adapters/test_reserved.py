"""No family's setting of a generation has the name of an argument that stands beside it."""

import inspect
from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules

import pytest

import captum_dcam
from captum_dcam.adapters.autoregressive import decoding as autoregressive
from captum_dcam.adapters.common.settings import Setting, Settings
from captum_dcam.adapters.lavida_o.decoding import Fast
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.families import ADAPTERS, GROUP, built_in

RESERVED = {"answer", "foil", "every_step", "backward", "decoding", "progress"}
#: of everything that is drawn; DiffusionGemma's generation takes one in place of a generator
SHARED = {"seed", "generator"}


def named(function):
    """Names of the arguments that a function takes by name."""
    every = inspect.signature(function).parameters.values()
    return {p.name for p in every if p.kind is p.KEYWORD_ONLY}


def modules(family):
    """All modules of a family, and those that it shares."""
    for package in (import_module(f"{GROUP}.{family}"), import_module(f"{GROUP}.common")):
        yield package
        for found in iter_modules(package.__path__):
            yield import_module(f"{package.__name__}.{found.name}")


def settings_of(family):
    """Every name that a family's generation takes: of its tables, in both spellings, of the
    signature of its ``generate``, of its named decodings, and what it passes on."""
    cls = ADAPTERS[family]
    out = named(cls.generate) - {"request", "given"}
    for one in (cls.facts.decodings if cls.facts else {}).values():
        out |= one.keys()
    for module in modules(family):
        for value in vars(module).values():
            known = value.known if isinstance(value, Settings) else value
            if isinstance(known, dict) and any(isinstance(s, Setting) for s in known.values()):
                out |= {n for name, s in known.items() for n in (name, s.also) if n}
    if family == "autoregressive":
        out |= autoregressive._known() | autoregressive.REFUSED.keys()
    if family == "lavida_o":
        out |= {"use_fast_dlm", *(f.name for f in fields(Fast))}
    return out


@pytest.mark.parametrize("family", built_in())
def test_arguments_and_settings_have_different_names(family):
    asked = named(captum_dcam.explain) | named(captum_dcam.compare)
    asked |= named(captum_dcam.DenoisingForward.generate)
    assert asked >= RESERVED
    import_module(f"{GROUP}.{family}.adapter")
    assert issubclass(ADAPTERS[family], Adapter)
    names = settings_of(family)
    assert {"gen_length", "steps"} & names and not (asked - SHARED) & names
