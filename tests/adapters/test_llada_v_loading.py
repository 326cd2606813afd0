"""Repairs that LLaDA-V's code needs under new transformers, and loading without its package."""

import sys
import types

import pytest
import transformers

from captum_dcam.adapters.common import compat
from captum_dcam.adapters.llada_v import LladaVAdapter
from captum_dcam.adapters.llada_v.loading import plain_rope
from captum_dcam.errors import WeightsError


@pytest.mark.parametrize(
    ("scaling", "expected"),
    (
        (None, None),
        ({"rope_type": "default", "rope_theta": 9.0}, None),
        ({"type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}),
    ),
)
def test_scaling_that_transformers_filled_in_is_taken_out(scaling, expected):
    config = types.SimpleNamespace(rope_scaling=scaling, rope_theta=5.0)
    plain_rope(config)
    assert config.rope_scaling == expected
    assert config.rope_theta == (9.0 if scaling and "rope_theta" in scaling else 5.0)


def test_names_that_have_moved_are_found_again():
    compat.moved_names()
    from transformers.modeling_utils import find_pruneable_heads_and_indices, prune_linear_layer

    assert prune_linear_layer is transformers.pytorch_utils.prune_linear_layer
    if not hasattr(transformers.pytorch_utils, "find_pruneable_heads_and_indices"):
        with pytest.raises(ImportError, match="gone since transformers 5"):
            find_pruneable_heads_and_indices()


def test_loading_without_a_name_or_the_package(monkeypatch, tmp_path):
    with pytest.raises(WeightsError, match="as GSAI-ML/LLaDA-V"):
        LladaVAdapter.load()
    for name in [n for n in sys.modules if n.partition(".")[0] == "llava"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "LLaDA-V" not in p])
    with pytest.raises(ImportError, match=r"git clone .*ML-GSAI/LLaDA-V"):
        LladaVAdapter.load(str(tmp_path))


def test_another_projects_package_is_in_front(monkeypatch, tmp_path):
    for name in ("llava", "llava.model", "llava.model.language_model"):
        made = types.ModuleType(name)
        made.__path__ = []
        monkeypatch.setitem(sys.modules, name, made)
    other = types.ModuleType("llava.model.language_model.llava_llada")
    other.__file__ = "/elsewhere/llava_llada.py"
    monkeypatch.setitem(sys.modules, other.__name__, other)
    with pytest.raises(ImportError, match=r"/elsewhere/llava_llada.py has no LlavaLLaDAModelLM"):
        LladaVAdapter.load(str(tmp_path))
