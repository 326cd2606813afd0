"""Models of every family that accelerate has spread over CPU and disk, or that lie on several
devices, are explained by the same maps."""

from pathlib import Path

import pytest
import tiny
import torch
from devices import KIND, devices, place
from doubles import lavida, llada_v, llada_v_caches
from packaging.version import Version
from torch import nn

import captum_dcam
from captum_dcam.adapters.common import loading
from captum_dcam.adapters.llada_v import LladaVAdapter
from captum_dcam.errors import MethodError, WeightsError
from captum_dcam.testing.__main__ import cases_in

CASES = cases_in(Path(__file__).parent / "cases")
FAMILIES = list({case.name.partition(",")[0]: case for case in reversed(CASES)}.values())
every = pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)


#: one of each kind: how layers are called, and what they hand on
KINDS = ("dream_vl", "lavida-llada", "llada_v", "llava", "mini")
faked = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13.dev"), reason="tests/devices.py wants torch 2.13"
)


def explained(case, adapter, **options):
    picture, draws = case.picture(0), case.generator()
    return captum_dcam.explain(
        adapter, picture, case.prompt, generator=draws, **case.settings, **options
    )


def spread(model, folder, blocks=(), **options):
    """Filled up to half of its bytes, the rest goes to the disk, as ``device_map="auto"`` does."""
    accelerate = pytest.importorskip("accelerate")
    half = sum(p.numel() * p.element_size() for p in model.parameters()) // 2
    if "diffusion_gemma" in type(model).__module__:  # accelerate's own search fails on its ties
        places = {"model.encoder": "disk", "model.decoder": "cpu", "lm_head": "cpu"}
    else:
        places = accelerate.infer_auto_device_map(
            model,
            {"cpu": half, "disk": 10**9},
            no_split_module_classes=list({type(block).__name__ for block in blocks}),
        )
    assert "disk" in places.values()
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True, **options
    )


@every
def test_over_the_cpu_and_the_disk(case, tmp_path):
    adapter = case.make(torch.float32)
    plain = explained(case, adapter)
    spread(adapter.model, tmp_path, [*adapter.blocks, *adapter.step_blocks])
    assert any(p.is_meta for p in adapter.model.parameters())
    found = explained(case, adapter)
    assert found.words == plain.words
    assert all(map(torch.equal, found.maps, plain.maps))


def over_two(model, last):
    """Blocks ``last`` on device 1, all else on device 0."""
    later = {id(part) for block in last for part in block.modules()}

    def walk(part):
        if not any(id(inner) in later for inner in part.modules()):
            place(part, f"{KIND}:0")
            return
        place(part, f"{KIND}:0", alone=True)
        for child in part.children():
            if id(child) not in later:
                walk(child)

    walk(model)
    for block in last:
        place(block, f"{KIND}:1")


@faked
@pytest.mark.parametrize(
    "case", [c for c in FAMILIES if c.name.startswith(KINDS)], ids=lambda case: case.name
)
def test_over_several_devices(case):
    """As far as one machine can show it: see tests/devices.py for what is faked, and what not."""
    adapter, few = case.make(torch.float32), {"preset": "base"}
    plain = explained(case, adapter, **few)
    half = len(adapter.blocks) // 2
    with devices():
        over_two(adapter.model, [*adapter.blocks[half:], *adapter.step_blocks[half:]])
        found = explained(case, adapter, **few)
        assert {str(p.device) for p in adapter.model.parameters()} == {f"{KIND}:0", f"{KIND}:1"}
    assert found.words == plain.words
    # another attention kernel: see tests/devices.py
    assert all(map(lambda a, b: torch.allclose(a, b, atol=1e-3), found.maps, plain.maps))


@faked
def test_tensors_of_two_devices_refuse_to_meet():
    with devices():
        one, other = (torch.ones(3).to(f"{KIND}:{n}") for n in range(2))
        for both in (
            lambda: one + other,
            lambda: one + torch.ones(3),
            lambda: torch.cat((one, other)),
            lambda: one[torch.tensor([0]).to(other.device)],
        ):
            with pytest.raises(RuntimeError, match="tensors on"):
                both()
        assert (one + other.to(one.device))[torch.tensor([1])].cpu().tolist() == [2]
        assert (one * torch.tensor(3.0)).sum().item() == 9


# -- what cannot be spread, and what was left out by it ----------------------------------------


def test_fast_dllm_needs_its_cache_back(monkeypatch, tmp_path):
    monkeypatch.setattr(LladaVAdapter, "ids", llada_v.IDS)
    settings = dict(gen_length=8, steps=4, block_length=4)

    def found(model):
        llada_v_caches.register_fast_dllm_hook(model)
        adapter = captum_dcam.wrap(model, llada_v.processor())
        return captum_dcam.explain(adapter, tiny.picture(), "a", preset="base", **settings)

    plain, blocks = found(llada_v.model()), llada_v.model().model.layers
    kept = spread(llada_v.model(), tmp_path, blocks, skip_keys="fast_dllm_cache")
    assert all(map(torch.equal, found(kept).maps, plain.maps))
    with pytest.raises(MethodError, match=r"cache stays empty.*skip_keys='fast_dllm_cache'"):
        found(spread(llada_v.model(), tmp_path, blocks))


def test_an_offloaded_newline_is_refused():
    accelerate = pytest.importorskip("accelerate")
    model = lavida.model()
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(WeightsError, match=r"model\.image_newline is offloaded.*device of its own"):
        captum_dcam.wrap(model, lavida.processor())


class Tower(nn.Module):
    """Of LLaVA's kind."""

    vision_tower_name = "own"

    def __init__(self, inner):
        super().__init__()
        self.vision_tower = inner

    @property
    def device(self):
        return next(self.vision_tower.parameters()).device

    def forward(self, images):
        return self.vision_tower(images.to(self.device))


def test_what_a_checkpoint_lacks_of_an_offloaded_tower_is_filled(monkeypatch, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    whole = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    nn.init.constant_(whole[1].bias, 3.0)
    source = type("Source", (), {"from_pretrained": staticmethod(lambda name: whole)})
    monkeypatch.setattr(loading, "siglip", lambda: type("M", (), {"SigLipVisionModel": source}))
    images = torch.randn(1, 2, generator=torch.Generator().manual_seed(0))
    for where in ("cpu", "disk"):
        short = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        short[0].load_state_dict(whole[0].state_dict())
        tower = Tower(short)
        places = {"vision_tower.0": "cpu", "vision_tower.1": where}
        accelerate.dispatch_model(tower, places, "cpu", offload_dir=tmp_path, force_hooks=True)
        missing = ["model.vision_tower.vision_tower.1.bias", "model.other.weight"]
        assert loading.fill_tower(tower, missing) == ["model.other.weight"]
        assert torch.equal(tower.vision_tower(images), whole(images))


def test_a_tower_on_the_disk_takes_images_where_it_computes(tmp_path):
    from captum_dcam.adapters.common.compat import reachable

    accelerate = pytest.importorskip("accelerate")
    images, tower = torch.ones(1, 2), Tower(nn.Linear(2, 2))
    expected, own = tower(images), vars(Tower)["device"]
    reachable(tower)
    assert vars(Tower)["device"] is own
    accelerate.disk_offload(tower, tmp_path, execution_device="cpu")
    try:
        reachable(tower)
        assert tower.device == torch.device("cpu") and torch.equal(tower(images), expected)
    finally:
        Tower.device = own
