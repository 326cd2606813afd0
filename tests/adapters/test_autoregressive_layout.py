"""Autoregressive families: which image token sees which pixels."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not

import made_ar

from captum_dcam.model import gradients as vjp
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.words import Target

every = pytest.mark.parametrize("kind", made_ar.KINDS)
VIDEO = (*made_ar.QWEN, "internvl")

#: (width, height): square, wide, tall, tiny, large
SIZES = (
    (40, 40), (96, 32), (30, 100), (9, 9), (5, 11), (333, 250), (64, 64), (97, 61), (41, 87),
    (512, 300),
)  # fmt: skip


def ramps(size):
    """A picture whose red grows from left to right and whose green grows downwards."""
    width, height = size
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    blue = np.full_like(x, 0.5)
    return Image.fromarray((np.stack((x, y, blue), -1) * 255).round().astype(np.uint8))


def colours(made, request):
    """(N, 3) mean colour in [0, 1] that every image token sees, from the pixel tensor."""
    processor = made.processor.image_processor
    pixels, owners = request.pixels[0], made.pixel_tokens(request)[0]
    if pixels.ndim == 2:  # patches: (channel, time, row, column) flattened
        pixels = pixels.unflatten(1, (3, -1)).transpose(0, 1)
        owners = owners.unflatten(1, (3, -1)).transpose(0, 1)
    else:
        pixels, owners = pixels.transpose(0, 1), owners.transpose(0, 1)
    count = sum(h * w for h, w in request.layout.shapes)
    out = []
    for channel, (mean, std) in enumerate(
        zip(processor.image_mean, processor.image_std, strict=True)
    ):
        values, at = pixels[channel].flatten() * std + mean, owners[channel].flatten()
        inside = at >= 0
        total = torch.zeros(count).index_add_(0, at[inside], values[inside])
        out.append(total / at[inside].bincount(minlength=count))
    return torch.stack(out, 1)


@every
@pytest.mark.parametrize("size", SIZES)
def test_tokens_see_the_pixels_of_their_boxes(kind, size):
    made = made_ar.shared_adapter(kind)
    request = made.prepare([[ramps(size)]], [made_ar.PROMPT])
    seen = iter(colours(made, request))
    for grid in request.layout.grids:
        assert grid.image_size == (size[1], size[0]) and grid.image == 0
        for r in range(grid.shape[0]):
            for c in range(grid.shape[1]):
                x0, y0, x1, y1 = grid.box(r, c)
                red, green, _ = next(seen).tolist()
                # resizing blurs: half a cell, and a pixel of the tiny picture
                assert abs(red * size[0] - (x0 + x1) / 2) <= 0.5 * (x1 - x0) + 1
                assert abs(green * size[1] - (y0 + y1) / 2) <= 0.5 * (y1 - y0) + 1
    assert next(seen, None) is None


@every
@pytest.mark.parametrize("size", SIZES)
def test_a_bright_patch_comes_back_where_it_is(kind, size):
    """The map of a token's brightness, brought to the picture, has its peak within one cell."""
    made = made_ar.shared_adapter(kind)
    width, height = size
    side = max(2, min(size) // 3)
    x0, y0 = width // 2 - side // 2 + width // 8, height // 2 - side // 2 - height // 8
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), (x0, y0, x0 + side, y0 + side))
    request = made.prepare([[picture]], [made_ar.PROMPT])
    values = colours(made, request).mean(1)
    shapes = request.layout.shapes
    for grid, part in zip(
        request.layout.grids, values.split([h * w for h, w in shapes]), strict=True
    ):
        full = grid.to_pixels(part.view(grid.shape), "nearest")
        if float(full.max()) < 0.2:  # a tile without the patch
            continue
        r, c = divmod(int(part.argmax()), grid.shape[1])
        bx0, by0, bx1, by1 = grid.box(r, c)
        cell_x, cell_y = bx1 - bx0, by1 - by0
        assert x0 - cell_x <= (bx0 + bx1) / 2 <= x0 + side + cell_x
        assert y0 - cell_y <= (by0 + by1) / 2 <= y0 + side + cell_y


def blind_to_others(model):
    """A tower whose patches see nothing of each other: its attention adds nothing."""
    ends = ("attn.proj.weight", "attn.proj.bias", "out_proj.weight", "out_proj.bias")
    ends += ("projection_layer.weight", "projection_layer.bias")
    found = 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ("visual" in name or "vision_tower" in name) and name.endswith(ends):
                p.zero_()
                found += 1
    assert found


@every
@pytest.mark.parametrize("size", ((40, 40), (96, 32), (30, 100)))
def test_a_tokens_embedding_depends_on_its_own_pixels_alone(kind, size):
    made = made_ar.adapter(kind)
    blind_to_others(made.model)
    request = made.prepare([[made_ar.picture(size=size)]], [made_ar.PROMPT])
    owners = made.pixel_tokens(request).to(torch.long)
    pixels = request.pixels.clone().requires_grad_()
    embeds = made.embed(pixels, *request.extras).embeds
    places = torch.cat([g.positions.flatten() for g in request.layout.grids])
    for token in torch.linspace(0, len(places) - 1, 7).long().tolist():
        (found,) = torch.autograd.grad(embeds[0, places[token]].sum(), pixels, retain_graph=True)
        assert bool(found.any())
        assert not bool(found[owners != token].any())
    others = torch.tensor([p for p in range(embeds.shape[1]) if p not in places.tolist()])
    assert not embeds[0, others].requires_grad or not bool(
        torch.autograd.grad(embeds[0, others].sum(), pixels)[0].any()
    )


def test_llavas_crop_leaves_the_sides_uncovered():
    grid = made_ar.adapter("llava").prepare([[ramps((96, 32))]], [""]).layout.grids[0]
    assert grid.box(0, 0)[0] == 32 and grid.box(7, 7)[2] == 64  # the middle third
    assert grid.box(0, 0)[1] == 0 and grid.box(7, 7)[3] == 32
    full = grid.to_pixels(torch.ones(8, 8))
    assert not full[:, :32].any() and not full[:, 64:].any() and bool(full[:, 32:64].all())


def test_llavas_padding_is_no_part_of_the_picture():
    made_ar.needs()
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    import captum_dcam

    padded = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    parts = made_ar.Parts(made_ar.sentencepiece(), padded)
    made = captum_dcam.wrap(made_ar.model("llava"), parts)
    grid = made.prepare([[ramps((64, 32))]], [""]).layout.grids[0]
    assert grid.box(2, 0) == (0, 0, 8, 8) and grid.box(5, 7) == (56, 24, 64, 32)
    assert grid.box(0, 0)[1] == grid.box(1, 7)[3] == 0  # above the picture: nothing


@pytest.mark.parametrize(("strategy", "skip"), (("default", 0), ("full", 1)))
def test_llavas_class_token_has_no_place(strategy, skip):
    import captum_dcam

    model = made_ar.model("llava")
    model.config.vision_feature_select_strategy = strategy
    made = captum_dcam.wrap(model, made_ar.parts("llava"))
    request = made.prepare([[made_ar.picture()]], [""])
    first = int((request.extras[0][0] == model.config.image_token_id).nonzero()[0])
    assert int(request.layout.grids[0].positions[0, 0]) == first + skip
    assert len(made.generate(request, max_new_tokens=2).tokens[0]) == 2


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    (((40, 40), 1, 1), ((96, 32), 1, 3), ((30, 100), 3, 1), ((500, 480), 2, 2)),
)
def test_internvls_tiles_and_thumbnail(size, rows, columns):
    layout = made_ar.shared_adapter("internvl").prepare([[ramps(size)]], [""]).layout
    tiles = rows * columns
    assert layout.shapes == ((4, 4),) * (tiles + (tiles > 1))
    for number, grid in enumerate(layout.grids[:tiles]):
        r, c = divmod(number, columns)
        x0, y0 = grid.box(0, 0)[:2]
        assert (x0, y0) == pytest.approx((c * size[0] / columns, r * size[1] / rows))
    if tiles > 1:
        assert layout.grids[-1].box(0, 0)[:2] == (0, 0)
        assert layout.grids[-1].box(3, 3)[2:] == size


# -- several pictures and videos -------------------------------------------------------------------


@every
def test_several_pictures_of_different_sizes(kind):
    made = made_ar.shared_adapter(kind)
    pictures = [ramps((40, 40)), made_ar.picture(3, (96, 32)), ramps((30, 60))]
    request = made.prepare([pictures], [made_ar.PROMPT])
    alone = [made.prepare([[p]], [made_ar.PROMPT]).layout.shapes for p in pictures]
    assert request.layout.shapes == tuple(s for one in alone for s in one)
    numbers = [n for n, one in enumerate(alone) for _ in one]
    assert [g.image for g in request.layout.grids] == numbers
    sizes = [(p.height, p.width) for p in pictures]
    assert [g.image_size for g in request.layout.grids] == [sizes[n] for n in numbers]
    every_ = torch.cat([g.positions.flatten() for g in request.layout.grids])
    assert len(every_.unique()) == len(every_) and bool((every_.diff() > 0).all())
    forward = DenoisingForward(made, 1)
    forward.generate(request, max_new_tokens=3)
    (row,) = vjp.target_gradients(forward, [Target("x", (1,), (9,))])
    assert [g.shape[1:] for g in row.gradients] == list(request.layout.shapes)
    assert all(bool(g.any()) for g in row.gradients)


@pytest.mark.parametrize("kind", VIDEO)
@pytest.mark.parametrize("frames", (1, 4, 5))
def test_a_video_has_a_grid_a_group_of_frames(kind, frames):
    made = made_ar.shared_adapter(kind)
    request = made.prepare([[made_ar.video(frames)]], [made_ar.PROMPT])
    step = 1 if kind == "internvl" else 2
    groups = -(-frames // step)
    assert len(request.layout.grids) == groups
    assert [g.image for g in request.layout.grids] == [step * i for i in range(groups)]
    assert len(request.images[0]) == frames
    forward = DenoisingForward(made, 1)
    forward.generate(request, max_new_tokens=3)
    (row,) = vjp.target_gradients(forward, [Target("x", (1,), (9,))])
    assert all(bool(g.any()) for g in row.gradients)
    again = made.prepare_again(request, request.images[0])
    assert torch.equal(again.pixels, request.pixels)
    assert all(torch.equal(a, b) for a, b in zip(again.extras, request.extras, strict=True))


@pytest.mark.parametrize("kind", VIDEO)
def test_groups_of_frames_hold_their_frames(kind):
    """Every frame has its own grey; a group of two shows both."""
    made = made_ar.shared_adapter(kind)
    greys = (0, 60, 120, 180, 240)
    frames = [Image.new("RGB", (24, 16), (g, g, g)) for g in greys]
    request = made.prepare([[frames]], [made_ar.PROMPT])
    found = colours(made, request).mean(1)
    parts = found.split([h * w for h, w in request.layout.shapes])
    step = 1 if kind == "internvl" else 2
    padded = [*greys, greys[-1]][: len(parts) * step]
    for number, part in enumerate(parts):
        mean = sum(padded[step * number : step * (number + 1)]) / step / 255
        assert part.tolist() == pytest.approx([mean] * len(part), abs=0.01)


@pytest.mark.parametrize("kind", VIDEO)
def test_a_picture_between_videos(kind):
    made = made_ar.shared_adapter(kind)
    grey = lambda g: Image.new("RGB", (24, 16), (g, g, g))  # noqa: E731
    given = [[grey(10), grey(10)], grey(120), [grey(250)] * 3]
    request = made.prepare([given], [made_ar.PROMPT])
    frames = [0, 1, 2, 3, 4, 5] if kind == "internvl" else [0, 2, 3, 5]
    assert [g.image for g in request.layout.grids] == frames
    found = colours(made, request).mean(1).split([h * w for h, w in request.layout.shapes])
    means = [float(f.mean()) * 255 for f in found]
    greys = (10, 10, 120, 250, 250, 250)
    assert means == pytest.approx([greys[f] for f in frames], abs=2)
    forward = DenoisingForward(made, 1)
    forward.generate(request, max_new_tokens=3)
    (row,) = vjp.target_gradients(forward, [Target("x", (1,), (9,))])
    assert all(bool(g.any()) for g in row.gradients)
    again = made.prepare_again(request, request.images[0])
    assert torch.equal(again.pixels, request.pixels)
