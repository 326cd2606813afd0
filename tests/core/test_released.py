"""Nothing keeps a forward and its activations alive: no reference cycle, so no wait for Python to
look for one. On a real model these are gigabytes of GPU memory."""

import gc
import weakref

import pytest
import tiny
import torch
from faithfulness import cases
from torch.utils._pytree import tree_leaves

import captum_dcam
from captum_dcam import explain_generation, faithfulness, sign_check
from captum_dcam.comparing import compare_generation
from captum_dcam.errors import MissingPackageError, TargetError
from captum_dcam.methods import Budget, method
from captum_dcam.methods.text_relevance import text_relevance


def compared(*methods):
    def run(forward):
        return compare_generation(forward, [0], methods, budget=Budget(40))

    return run


def broken(forward):
    """A model that fails inside a method: its error is caught, and told in the comparison."""

    def fails(*_):
        raise ValueError("no")

    forward.adapter.denoise = fails
    return compare_generation(forward, [0], ["diffusion_cam", "kernel_shap"])


USES = {
    "all words": explain_generation,
    "nouns": lambda f: explain_generation(f, "nouns"),
    "the paper's preset": lambda f: explain_generation(f, preset="paper"),
    "a tagger without data": lambda f: explain_generation(f, "nouns", tagger="nltk"),
    "a word that is not there": lambda f: explain_generation(f, "zebra"),
    "DiffusionCAM": lambda f: captum_dcam.DiffusionCAM(f).attribute(
        f.request.pixels, tiny.pair(f, 1)
    ),
    "sign check": lambda f: sign_check(f, cases.words(f), cases.maps(f), torch.Generator()),
    "relevance of text": lambda f: text_relevance(f, cases.words(f)),
    "TAM's relevance of text": lambda f: text_relevance(f, cases.words(f), by="activation"),
    "methods of several kinds": compared("attn_lrp", "msea_arc", "tam", "occlusion"),
    "Captum's objects that refer to themselves": compared(
        "layer_integrated_gradients",
        "kernel_shap",
        method("llm_attribution", regions=2),
        method("noise_tunnel", base="layer_integrated_gradients", samples=2),
    ),
    "methods that fail": broken,
    "infidelity": lambda f: faithfulness.infidelity(f, cases.words(f), cases.maps(f), samples=2),
    "sensitivity": lambda f: faithfulness.sensitivity_max(
        f, cases.words(f), cases.explain, samples=1
    ),
    "deletion": lambda f: faithfulness.deletion(f, cases.words(f), cases.maps(f)),
    "random weights": lambda f: faithfulness.parameter_randomization(
        f, cases.words(f), cases.explain, stages=1, generator=torch.Generator()
    ),
}


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What is imported late has cycles of its own, once."""
    forward = tiny.bound("prefix", anew=True)
    explain_generation(forward, preset="paper")


@pytest.mark.parametrize("use", USES)
def test_nothing_is_left_without_the_garbage_collector(use):
    gc.collect()
    gc.disable()
    try:
        forward = tiny.bound("prefix", anew=True)
        kept = tree_leaves(forward.trajectory.kept["calls"])
        hidden = next(one for one in kept if isinstance(one, torch.Tensor))
        left = {
            "forward": weakref.ref(forward),
            "tap": weakref.ref(forward.tap),
            "pixels": weakref.ref(forward.request.pixels),
            "activations": weakref.ref(hidden),
            "model": weakref.ref(forward.model),
        }
        del kept, hidden
        try:
            result = USES[use](forward)
        except (TargetError, MissingPackageError):
            result = None
        del forward, result
        assert [name for name, one in left.items() if one() is not None] == []
    finally:
        gc.enable()
