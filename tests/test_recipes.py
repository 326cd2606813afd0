"""The pages of docs/families: their Python runs, on doubles and tiny models in place of the
checkpoints; what loads these as the authors do is tested in tests/upstream."""

import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
import transformers
from doubles import (
    diffusion_vl,
    dream_vl,
    fast_dvlm,
    lavida,
    lavida_o_package,
    llada_v,
    mineru_diffusion,
    mmada,
    nemotron_diffusion_vlm,
    sdar_vl,
    vidlada,
)

sys.path.insert(0, str(Path(__file__).parent / "adapters"))  # importlib mode does not

import made_ar
import made_diffusion_gemma

from captum_dcam.model.families import built_in
from captum_dcam.model.hub import find

PAGES = Path(__file__).resolve().parents[1] / "docs/families"
FAMILIES = sorted(path.stem for path in PAGES.glob("*.md") if path.stem != "README")


#: of pages whose own settings take a tiny model a minute
SMALLER = {
    "diffusion_gemma": ("generator=generator", "generator=generator, gen_length=6, steps=4"),
    "mmada": (
        "max_new_tokens=128,\n    steps=64",
        "max_new_tokens=16,\n    steps=4, block_length=16",
    ),
}


class Loaded:
    """A class of the authors', or of transformers, that loads what is given."""

    def __init__(self, made):
        self.made = made

    def from_pretrained(self, _name, **_options):
        return self.made


def builder(monkeypatch, model, processor):
    """The authors' package ``llava``, whose builder gives a model and its processor."""
    for name in ("llava", "llava.model", "llava.model.builder"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = sys.modules["llava.model.builder"]
    module.load_pretrained_model = lambda *_, **__: (processor[0], model, processor[1], 4096)


def stand_in(monkeypatch, family):
    """What a page loads from the hub."""
    if family == "lavida_o":  # its repairs run, too
        lavida_o_package.installed(monkeypatch)
        return
    monkeypatch.setattr(find(family), "repaired", nullcontext)
    if family == "lavida":
        builder(monkeypatch, lavida.model("llada"), lavida.processor())
    elif family == "llada_v":
        parts = llada_v.processor()
        plain = llada_v.model(edits=True)
        builder(monkeypatch, plain, parts)
        sys.modules["llava.model.builder"].load_pretrained_model = lambda name, *_, **__: (
            parts[0],
            vidlada.model(seed=1) if "VidLaDA" in name else plain,
            parts[1],
            4096,
        )
        monkeypatch.setattr(find(family), "ids", llada_v.IDS)
    elif family == "mmada":
        package, model = ModuleType("models"), mmada.model(max_sequence_length=2048)
        package.MMadaModelLM, package.MAGVITv2 = Loaded(model), Loaded(mmada.vq())
        monkeypatch.setitem(sys.modules, "models", package)
        monkeypatch.setattr(find(family), "ids", mmada.IDS)
        monkeypatch.setattr(find(family), "marks", mmada.MARKS)
        given(monkeypatch, AutoTokenizer=mmada.tokenizer())
    elif family == "dream_vl":
        given(monkeypatch, AutoModel=dream_vl.model(), AutoProcessor=dream_vl.processor())
    elif family == "diffusion_vl":
        made, parts = diffusion_vl.model(), diffusion_vl.processor()
        given(monkeypatch, AutoModelForCausalLM=made, AutoProcessor=parts)
    elif family == "mineru_diffusion":
        made, parts = mineru_diffusion.model(scale=4.0), mineru_diffusion.processor()
        given(monkeypatch, AutoModel=made, AutoProcessor=parts)
    elif family == "nemotron_diffusion_vlm":
        made = nemotron_diffusion_vlm.model()
        given(monkeypatch, AutoModel=made, AutoTokenizer=nemotron_diffusion_vlm.tokenizer())
    elif family == "fast_dvlm":
        made, parts = fast_dvlm.model(), fast_dvlm.processor()
        given(monkeypatch, AutoModelForCausalLM=made, AutoProcessor=parts)
    elif family == "sdar_vl":
        made, parts = sdar_vl.model(), sdar_vl.processor()
        given(monkeypatch, AutoModelForImageTextToText=made, AutoProcessor=parts)
    else:
        made, kind = (made_ar, ("llava",)) if family == "autoregressive" else (None, ())
        made = made or made_diffusion_gemma
        given(
            monkeypatch,
            AutoModelForImageTextToText=made.model(*kind),
            AutoProcessor=made.parts(*kind),
        )


def given(monkeypatch, **classes):
    for name, made in classes.items():
        monkeypatch.setattr(transformers, name, Loaded(made))


def test_every_family_has_a_page():
    assert {*FAMILIES, "mini", "mini_ar"} == set(built_in())
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert all(f"({family}.md)" in index for family in FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_page_says_runs(family, monkeypatch, tmp_path):
    stand_in(monkeypatch, family)
    monkeypatch.chdir(tmp_path)
    tiny.picture(size=(84, 56)).save("photo.jpg")
    frames = [tiny.picture(n, (84, 56)) for n in range(3)]
    frames[0].save("clip.gif", save_all=True, append_images=frames[1:])
    text = (PAGES / f"{family}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    code = "\n".join(blocks)
    for name, value in re.findall(r"(\w+)=(\w+)", "".join(re.findall(r"export (.*)", text))):
        monkeypatch.setenv(name, value)
    if family in SMALLER:
        assert SMALLER[family][0] in code
        code = code.replace(*SMALLER[family])
    scope = {}
    exec(re.sub(r'"cuda(:0)?"', '"cpu"', code), scope)  # what is run is our own page
    found = scope["explanation"]
    assert scope["adapter"].family == family and found.words
    assert len({p.dtype for p in scope["adapter"].model.parameters()}) == 1
    assert all(bool(torch.isfinite(m).all()) for m in found.maps) and any(
        bool(m.any()) for m in found.maps
    )
