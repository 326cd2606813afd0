"""Every family in every mode passes the same seven checks."""

from pathlib import Path

import pytest
import torch

from captum_dcam.testing import CHECKS
from captum_dcam.testing.__main__ import cases_in

CASES = cases_in(Path(__file__).parent / "cases")


#: models of another's family, with their own format
VARIANTS = ("Dimple", "Lumina-DiMOO", "VidLaDA")


def model_of(case):
    """What a case's model is called: its modes lay images out alike, but for low resolution."""
    family, *mode = case.name.split(", ")
    own = [one for one in mode if one in VARIANTS]
    return case.name if "low resolution" in mode else ", ".join((family, *own))


FIRST = {}
for one in CASES:
    FIRST.setdefault(model_of(one), one)
LATER = [one for one in CASES if FIRST[model_of(one)] is not one]
#: checks of models whose other checks the table's command makes (docs/ADAPTERS.md): what is shared
#: with the models above is checked there
FEW = {
    "qwen3_5, prefix": ("replay", "gradient", "layout", "head"),
    "qwen3_5, full": ("replay",),
    "llava_onevision, prefix": ("replay", "layout", "inputs"),
    "llava_onevision, full": (),
    "gemma4, prefix": ("replay", "gradient"),
    "gemma4, full": ("replay",),
    "gemma4_e, prefix": ("replay", "gradient", "head"),
    "gemma4_e, full": ("replay",),
    "internvl_chat, prefix": ("replay",),  # by then it is InternVL's
    "internvl_chat, full": (),
}


@pytest.mark.parametrize(
    ("case", "check"),
    [
        pytest.param(case, check, id=f"{case.name}-{check}")
        for case in CASES
        for check in CHECKS
        if check in FEW.get(case.name, CHECKS) and (check != "layout" or case not in LATER)
    ],
)
def test_conformance(case, check):
    CHECKS[check](case)


@pytest.mark.parametrize("case", [c for c in LATER if c.name not in FEW], ids=lambda c: c.name)
def test_another_mode_has_the_layout_that_was_checked(case):
    """The same pixels and tokens in the same places; that the blocks get them is what check 1
    shows, in every mode."""
    one, other = FIRST[model_of(case)].make(torch.float32), case.make(torch.float32)
    for size in case.sizes:
        images = [[case.picture().resize(size)]]
        wanted, found = (a.prepare(images, [case.prompt]) for a in (one, other))
        assert same(found, wanted)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if hasattr(one, "__dataclass_fields__"):
        return type(one) is type(other) and same(vars(one), vars(other))
    return one == other
