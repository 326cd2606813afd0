"""Check 4: a picture that encodes its own coordinates comes out at the right tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from captum_dcam.errors import MethodError
from captum_dcam.model.adapter import Adapter, Request
from captum_dcam.model.layout import Grid
from captum_dcam.model.prompts import Video
from captum_dcam.testing.case import AdapterCase, expect

GREY = (96, 96, 96)
#: colours of the patch; a random tower answers to some of them at edges only
FILLS = ((255, 255, 255), (0, 0, 0), (255, 0, 128))
#: centres of changes and patch may be so many halves of a cell apart, and half a pixel; a
#: neighbour is 2 away
NEAR = 1.3


@dataclass(frozen=True)
class Patch:
    """A rectangle (x0, y0, x1, y1) in pixels on grey."""

    box: tuple[int, int, int, int]

    def on(self, size: tuple[int, int], fill: tuple[int, int, int]) -> Image.Image:
        """A grey picture of ``size`` (width, height) with the patch."""
        picture = Image.new("RGB", size, GREY)
        picture.paste(fill, self.box)
        return picture


def check_layout(case: AdapterCase) -> str:
    r"""For every size, a patch over the box of one token changes tokens whose centre of mass lies
    in that box, in every grid that sees it, among the states before the first block and among the
    pixels that ``pixel_tokens`` gives to tokens; the map of changes, brought to the picture, has
    its peak within one cell of the patch. With several pictures or frames, in the right one.

    Raises:
        ConformanceError: size, patch and tokens.
    """
    adapter = case.make(torch.float32)
    for size in case.sizes:
        _check_size(case, adapter, size)
    if adapter.several_images:
        _check_second(case, adapter, [Image.new("RGB", case.picture_size, GREY)] * 2, 1)
    if adapter.takes_video:
        frames = Video([Image.new("RGB", case.picture_size, GREY)] * 4)
        _check_second(case, adapter, [frames], 3)
    return f"{len(case.sizes)} sizes"


def _check_size(case: AdapterCase, adapter: Adapter, size: tuple[int, int]) -> None:
    plain = Image.new("RGB", size, GREY)
    grids = adapter.prepare([[plain]], [case.prompt]).layout.grids
    for grid in grids:
        expect(
            grid.image_size == (size[1], size[0]),
            f"picture {size} (width × height): a grid says (H, W) = {grid.image_size}",
        )
    patches = list(dict.fromkeys(p for grid in grids for p in _patches(grid)))
    expect(bool(patches), f"picture {size}: no token's box lies in the picture")
    pictures = [plain, *(p.on(size, fill) for p in patches for fill in FILLS)]
    states, pixels = _seen(case, adapter, [[p] for p in pictures])
    for patch, *changes in zip(patches, *_changes(states), *_changes(pixels), strict=True):
        for what, values in zip(("states", "pixels"), changes, strict=False):
            for grid, part in zip(grids, _split(values, grids), strict=True):
                _check_patch(f"picture {size}, {what}", grid, patch, part)


def _patches(grid: Grid) -> list[Patch]:
    """Patches over the middle token and two near corners, as far as these lie in the picture."""
    height, width = grid.image_size
    h, w = grid.shape
    # off the border of large grids: there a tower that blurs can blur to one side only
    up, aside = int(h > 3), int(w > 3)
    found = []
    for row, column in ((h // 2, w // 2), (up, w - 1 - aside), (h - 1 - up, aside)):
        x0, y0, x1, y1 = grid.box(row, column)
        middle = ((x0 + x1) / 2, (y0 + y1) / 2)
        if not (0 <= middle[0] < width and 0 <= middle[1] < height):
            continue  # a token of padding
        left, top = max(0, round(x0)), max(0, round(y0))
        right, bottom = min(width, round(x1)), min(height, round(y1))
        if right <= left:
            left, right = floor(middle[0]), floor(middle[0]) + 1
        if bottom <= top:
            top, bottom = floor(middle[1]), floor(middle[1]) + 1
        found.append(Patch((left, top, right, bottom)))
    return found


def _seen(
    case: AdapterCase, adapter: Adapter, images: Sequence[Sequence[Any]]
) -> tuple[list[Tensor], list[Tensor]]:
    """For every example (N, D) states of image tokens, and (N,) sums of their pixels' changes
    against the first example (none where pixels have no tokens)."""
    size = len(images) if adapter.batches else 1
    states: list[Tensor] = []
    pixels: list[Tensor] = []
    first: Request | None = None
    for start in range(0, len(images), size):
        part = images[start : start + size]
        request = adapter.prepare(part, [case.prompt] * len(part))
        first = request if first is None else first
        found = case.image_states or (lambda a, r: entering(case, a, r))
        with torch.no_grad():
            states += list(found(adapter, request).flatten(2).float().cpu())
        pixels += _owned(adapter, request, first)
    return states, pixels


def entering(case: AdapterCase, adapter: Adapter, request: Request) -> Tensor:
    """(B, N, D): image tokens as they enter the first block, when an answer of one token is
    generated."""
    found: list[Tensor] = []
    layout = request.layout

    def look(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        tensors = [x for x in given if isinstance(x, Tensor)]
        hidden = next(x for x in tensors if x.ndim == 3 and x.is_floating_point())
        if not found and hidden.shape[1] >= layout.image_end:
            found.append(hidden[: request.batch].clone())

    handle = adapter.blocks[0].register_forward_pre_hook(look, with_kwargs=True)
    try:
        settings = {**case.settings, **case.one_token}
        adapter.generate(request, generator=case.generator(), **settings)
    finally:
        handle.remove()
    expect(bool(found), "the first block never saw the whole image span while generating")
    positions = torch.cat([g.positions.flatten() for g in layout.grids])
    return found[0][:, positions.to(found[0].device)]


def _owned(adapter: Adapter, request: Request, first: Request) -> list[Tensor]:
    try:
        owners = adapter.pixel_tokens(request)
    except MethodError:
        return []
    gap = (request.pixels - first.pixels[:1]).abs()
    owners = owners.to(gap.device).expand_as(gap[:1]).flatten()
    inside = owners >= 0
    count = sum(h * w for h, w in request.layout.shapes)
    zero = gap.new_zeros(count)
    sums = [zero.index_add(0, owners[inside], g.flatten()[inside]) for g in gap]
    number = owners[inside].bincount(minlength=count).clamp_min(1)
    return [(s / number)[:, None].cpu() for s in sums]


def _changes(seen: list[Tensor]) -> list[list[Tensor]]:
    """(N,) change of every patch against the first example, over all colours of the patch."""
    if not seen:
        return []
    each = torch.stack([(one - seen[0]).norm(dim=1) for one in seen[1:]])
    return [list(each.unflatten(0, (-1, len(FILLS))).sum(1))]


def _split(values: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    parts = values.split([g.positions.numel() for g in grids])
    return [p.view(g.shape) for p, g in zip(parts, grids, strict=True)]


def _check_patch(what: str, grid: Grid, patch: Patch, values: Tensor) -> None:
    """Centre of the largest changes (h, w): in the token under the patch; their peak in pixels."""
    x0, y0, x1, y1 = patch.box
    middle = ((x0 + x1) / 2, (y0 + y1) / 2)
    if not _covers(grid, middle):
        return
    place = f"{what}, patch {patch.box} px"
    expect(float(values.max()) > 0, f"{place}: no token of the grid that covers it changed")
    mass = values.double().square() * (values >= values.max() / 2)
    mass = mass / mass.sum()
    center = (
        float((mass.sum(0) * grid.x_edges.mean(1)).sum()),
        float((mass.sum(1) * grid.y_edges.mean(1)).sum()),
    )
    half = [
        max(float((e[0, 1] - e[0, 0]).abs()), size) / 2
        for e, size in ((grid.x_edges, x1 - x0), (grid.y_edges, y1 - y0))
    ]
    row, column = divmod(int(values.argmax()), grid.shape[1])
    expect(
        all(abs(center[i] - middle[i]) <= NEAR * half[i] + 0.5 for i in (0, 1)),
        f"{place}: the centre of what changed is ({center[0]:.1f}, {center[1]:.1f}), most at "
        f"token ({row}, {column}) with box {_rounded(grid.box(row, column))}: expected the token "
        "that the patch covers; compare the order of tokens, and tiles, crops and newlines",
    )
    full = grid.to_pixels(values)
    y, x = divmod(int(full.argmax()), full.shape[1])
    expect(
        x0 - 2 * half[0] - 1 <= x < x1 + 2 * half[0] + 1
        and y0 - 2 * half[1] - 1 <= y < y1 + 2 * half[1] + 1,
        f"{place}: the map in pixels has its peak at ({x}, {y}), further than one cell away",
    )


def _covers(grid: Grid, point: tuple[float, float]) -> bool:
    """Whether a box of the grid holds the point."""
    edges = (grid.x_edges, grid.y_edges)
    return all(
        bool(((e[:, 0] <= at) & (at < e[:, 1])).any()) for e, at in zip(edges, point, strict=True)
    )


def _rounded(box: Sequence[float]) -> tuple[int, ...]:
    return (floor(box[0]), floor(box[1]), ceil(box[2]), ceil(box[3]))


def _check_second(case: AdapterCase, adapter: Adapter, plain: Sequence[Any], number: int) -> None:
    """A patch in picture or frame ``number`` alone changes grids of that picture most."""
    size = case.picture_size
    grids = adapter.prepare([plain], [case.prompt]).layout.grids
    last = max(g.image for g in grids)
    patch = Patch((size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    shown = [patch.on(size, fill) for fill in FILLS]
    changed: list[list[Any]]
    if isinstance(plain[0], Video):
        changed = [[Video([*plain[0][:number], one])] for one in shown]
        wanted = last  # of the last group of frames
    else:
        changed, wanted = [[*plain[:number], one] for one in shown], number
        expect(
            {g.image for g in grids} == set(range(len(plain))),
            f"{len(plain)} pictures, but grids of pictures {sorted({g.image for g in grids})}",
        )
    states, pixels = _seen(case, adapter, [list(plain), *changed])
    for values in (*_changes(states), *_changes(pixels)):
        sums = [float(p.max()) for p in _split(values[0], grids)]
        best = grids[sums.index(max(sums))].image
        expect(
            best == wanted,
            f"a patch in picture {number} changed tokens of picture {best} most: expected {wanted}",
        )
