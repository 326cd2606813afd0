"""From maps to the image's pixels: one call for families that crop, tile, or show the whole image.

What a patch of the image changes in the pixel tensor is shared among image tokens by
``pixel_tokens``, which knows nothing of boxes; brought to the image it must lie on the patch.
"""

import functools
import sys
from pathlib import Path

import pytest
import tiny
import torch
from captum.attr import LayerAttribution
from doubles import lavida as lavida_double
from PIL import Image

from captum_dcam import DiffusionCAM
from captum_dcam.adapters.lavida import LavidaAdapter
from captum_dcam.errors import InputError, InputTypeError, NotBoundError
from captum_dcam.model.forward import DenoisingForward

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))  # importlib mode does not

import made_ar


def adapter(family):
    if family == "mini":
        return tiny.adapter("none")
    if family == "lavida":
        return LavidaAdapter(
            lavida_double.model("llada"), lavida_double.processor(), "none", system=None
        )
    return made_ar.adapter(family)


def seen_change(made, box, size, images=1, where=0):
    """Layout, and for every grid how much its tokens' pixels change when a patch is coloured."""
    plain = [Image.new("RGB", size) for _ in range(images)]
    patched = [p.copy() for p in plain]
    patched[where].paste((255, 40, 40), box)
    before, after = (made.prepare([shown], ["what is red ?"]) for shown in (plain, patched))
    owners = made.pixel_tokens(after).expand(after.pixels.shape).flatten()
    change = (after.pixels - before.pixels).abs().flatten()
    count = sum(h * w for h, w in after.layout.shapes)
    total = torch.zeros(count).index_add_(0, owners[owners >= 0], change[owners >= 0])
    parts = total.split([h * w for h, w in after.layout.shapes])
    shapes = after.layout.shapes
    return after.layout, [p.view(1, 1, *s) for p, s in zip(parts, shapes, strict=True)]


@pytest.mark.parametrize(
    "family, size, box",
    [
        ("llava", (96, 32), (36, 4, 44, 12)),  # cropped
        ("llava", (32, 96), (20, 48, 28, 56)),
        ("internvl", (96, 32), (72, 8, 88, 20)),  # tiles
        ("internvl", (40, 80), (4, 60, 16, 72)),
        ("lavida", (160, 120), (112, 20, 136, 44)),  # a base view and a padded mosaic
        ("qwen2_vl", (64, 48), (40, 8, 56, 24)),
        ("mini", (80, 60), (8, 36, 24, 52)),
    ],
)
def test_a_coloured_patch_comes_back_at_its_place(family, size, box):
    layout, maps = seen_change(adapter(family), box, size)
    for mode in ("nearest", "bilinear"):
        pixels = layout.to_pixels(maps if len(maps) > 1 else maps[0], mode)
        assert pixels.shape == (1, 1, size[1], size[0])
        bright = pixels[0, 0] >= pixels.max() * 0.7
        y, x = bright.nonzero().double().mean(0) + 0.5
        cell = max(size) / 8
        assert abs(x - (box[0] + box[2]) / 2) < cell and abs(y - (box[1] + box[3]) / 2) < cell


def test_llavas_first_token_lies_where_its_crop_begins():
    """Of 96 × 32 px the model sees the middle 32 × 32: 8 tokens of 4 px from column 32 on."""
    layout, maps = seen_change(adapter("llava"), (32, 0, 36, 4), (96, 32))
    assert int(maps[0].argmax()) == 0
    first = torch.zeros_like(maps[0])
    first[..., 0, 0] = 1
    pixels = layout.to_pixels(first, "nearest")[0, 0]
    lit = pixels.nonzero()
    assert lit.amin(0).tolist() == [0, 32] and lit.amax(0).tolist() == [3, 35]
    assert not layout.to_pixels(torch.ones_like(first))[..., :32].any()


def test_maps_of_several_images_are_told_apart():
    layout, maps = seen_change(adapter("mini"), (8, 36, 24, 52), (80, 60), images=2, where=1)
    first, second = layout.to_pixels(maps)
    assert first.shape == second.shape == (1, 1, 60, 80) and not first.any() and second.any()


def test_overlapping_grids_add_up():
    layout, maps = seen_change(adapter("internvl"), (72, 8, 88, 20), (96, 32))
    assert len(layout.grids) == 4  # three tiles and a thumbnail
    parts = [g.to_pixels(m) for g, m in zip(layout.grids, maps, strict=True)]
    assert torch.allclose(layout.to_pixels(maps), sum(parts))
    half = [m.half() for m in maps]
    assert layout.to_pixels(half).dtype == torch.float16


@pytest.mark.parametrize(
    "change",
    [lambda m: m[0], lambda m: m[:3], lambda m: [x[..., :3] for x in m], lambda _m: []],
)
def test_maps_of_another_layout_are_refused(change):
    layout, maps = seen_change(adapter("internvl"), (72, 8, 88, 20), (96, 32))
    with pytest.raises(InputError, match=r"expected \(…, 4, 4\).*one for each grid"):
        layout.to_pixels(change(maps))
    with pytest.raises(InputError, match="no grid shows image 3: expected one of"):
        layout.over_image(maps, 3)


def test_maps_of_other_types():
    layout, maps = seen_change(adapter("llava"), (36, 4, 44, 12), (96, 32))
    seen = maps[0] > maps[0].max() / 2
    found = layout.to_pixels(seen)  # a mask is interpolated, not cut off to whole numbers
    assert found.dtype == torch.float32 and torch.equal(found, layout.to_pixels(seen.float()))
    assert layout.to_pixels(maps[0].double()).dtype == torch.float64
    with pytest.raises(InputTypeError, match=r"maps are .'ndarray'.: expected tensors"):
        layout.to_pixels([maps[0].numpy()])


# -- Captum's interpolate --------------------------------------------------------------------------


@functools.cache
def bound(family):
    made = adapter(family)
    forward = DenoisingForward(made, 1)
    image = tiny.picture() if family == "mini" else made_ar.picture(size=(96, 32))
    forward.generate(made.prepare([[image]], ["what is red ?"]), gen_length=2)
    return forward


def test_interpolate_of_the_class_is_captums_own():
    assert DiffusionCAM.interpolate is LayerAttribution.interpolate
    big = DiffusionCAM.interpolate(torch.ones(1, 1, 2, 2), (4, 6), "bilinear")
    assert big.shape == (1, 1, 4, 6)


@pytest.mark.parametrize("mode", ("nearest", "bilinear", "bicubic", "area"))
@pytest.mark.parametrize("size", ((60, 80), (16, 24), 32))
def test_interpolate_of_one_whole_grid_is_captums(mode, size):
    cam = DiffusionCAM(bound("mini"))
    maps = torch.rand(2, 1, 8, 8)
    expected = LayerAttribution.interpolate(maps, size, mode)
    assert torch.equal(cam.interpolate(maps, size, mode), expected)
    if mode == "bilinear" and size == (60, 80):
        assert torch.allclose(cam.to_pixels(maps), expected, atol=1e-6)


def test_interpolate_of_a_cropped_grid_knows_the_crop():
    cam = DiffusionCAM(bound("llava"))
    first = torch.zeros(1, 1, 8, 8)
    first[..., 0, 0] = 1
    found = cam.interpolate(first, (32, 96))  # nearest is Captum's default
    assert torch.equal(found, cam.to_pixels(first, "nearest"))
    assert found[0, 0].nonzero()[:, 1].unique().tolist() == [32, 33, 34, 35]
    half = cam.interpolate(first, (16, 48), "nearest")  # another size, the same place
    assert half[0, 0].nonzero()[:, 1].unique().tolist() == [16, 17]
    with pytest.raises(InputError, match=r"'bicubic'.*to_pixels\(maps\)"):
        cam.interpolate(first, (32, 96), "bicubic")
    with pytest.raises(InputError, match=r"expected \(…, 8, 8\)|shape"):
        cam.interpolate(first[..., :4], (32, 96))


def test_interpolate_of_several_grids_names_to_pixels():
    forward = bound("internvl")
    cam, target = DiffusionCAM(forward, preset="base"), tiny.pair(forward, 0)
    maps = cam.attribute(forward.request.pixels, target)
    for given in (maps, maps[0]):
        with pytest.raises(InputError, match=r"4 grids .*to_pixels\(maps\)"):
            cam.interpolate(given, (32, 96), "bilinear")
    assert cam.to_pixels(maps).shape == (1, 1, 32, 96)


def test_nothing_bound_says_so():
    cam = DiffusionCAM(DenoisingForward(tiny.adapter("none")))
    for call in (lambda m: cam.interpolate(m, (8, 8)), cam.to_pixels):
        with pytest.raises(NotBoundError, match=r"forward\.generate"):
            call(torch.ones(1, 1, 8, 8))
