"""Check 4: what changes in one place of the image changes the tokens of that place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import ceil, floor
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from captum_dcam.errors import MethodError
from captum_dcam.model.adapter import Adapter, Request
from captum_dcam.model.layout import Grid
from captum_dcam.model.prompts import Video
from captum_dcam.testing.case import AdapterCase, expect, token_positions


class _Seen(Exception):
    """Ends a generation whose first block has been reached: the rest of it tells nothing here."""


GREY = (96, 96, 96)
#: colours of the patch; a random tower answers to some of them at edges only
FILLS = ((255, 255, 255), (0, 0, 0), (255, 0, 128))
#: how many half cells, and half a pixel, may lie between the centres of changes and patch; a
#: neighbour is 2 away
NEAR = 1.3
#: a patch: a rectangle (x0, y0, x1, y1) in pixels
Box = tuple[int, int, int, int]
#: of a request: (B, N, …), what its image tokens look like before the first block
Look = Callable[[Adapter, Request], Tensor]


def _patched(size: tuple[int, int], box: Box, fill: tuple[int, int, int]) -> Image.Image:
    """A grey image of ``size`` (width, height) with a patch."""
    image = Image.new("RGB", size, GREY)
    image.paste(fill, box)
    return image


def check_layout(case: AdapterCase) -> str:
    r"""For every size, a patch over the box of one token changes tokens whose centre of mass lies
    in that box. This holds in every grid that sees the patch, for the states before the first block
    and for the pixels that ``pixel_tokens`` gives to tokens. The map of changes, in pixels, has its
    peak within one cell of the patch. With several images or frames, the right one changes.

    Raises:
        ConformanceError: size, patch and tokens.
    """
    adapter, look = case.make(torch.float32), _look_of(case)
    for size in case.sizes:
        check_size(adapter, size, case.prompt, look)
    if adapter.several_images:
        _check_second(case, adapter, [Image.new("RGB", case.picture_size, GREY)] * 2, 1)
    if adapter.takes_video:
        frames = Video([Image.new("RGB", case.picture_size, GREY)] * 4)
        _check_second(case, adapter, [frames], 3)
    return f"{len(case.sizes)} sizes"


def _look_of(case: AdapterCase) -> Look:
    def entered(adapter: Adapter, request: Request) -> Tensor:
        settings = {**case.settings, **case.one_token}
        hidden = entering(adapter, request, settings, case.generator())
        return hidden[:, token_positions(request.layout).to(hidden.device)]

    return case.image_states or entered


def check_size(adapter: Adapter, size: tuple[int, int], prompt: str, look: Look) -> None:
    r"""What :func:`check_layout` checks, for one image size (width, height).

    Raises:
        ConformanceError: size, patch and tokens.
    """
    plain = Image.new("RGB", size, GREY)
    grids = adapter.prepare([[plain]], [prompt]).layout.grids
    for grid in grids:
        expect(
            grid.image_size == size[::-1],
            f"image {size} (width × height): a grid says (H, W) = {grid.image_size}",
        )
    patches = list(dict.fromkeys(p for grid in grids for p in _patches(grid)))
    expect(bool(patches), f"image {size}: no token's box lies in the image")
    images = [plain, *(_patched(size, box, fill) for box in patches for fill in FILLS)]
    states, pixels = _seen(adapter, [[image] for image in images], prompt, look)
    for patch, *changes in zip(patches, *_changes(states), *_changes(pixels), strict=True):
        for what, values in zip(("states", "pixels"), changes, strict=False):
            for grid, part in zip(grids, _split(values, grids), strict=True):
                _check_patch(f"image {size}, {what}", grid, patch, part)


def _patches(grid: Grid) -> list[Box]:
    """Patches over the middle token and two near corners, as far as these lie in the image."""
    height, width = grid.image_size
    h, w = grid.shape
    # off the border of large grids: there a tower that blurs can blur to one side only
    up, aside = int(h > 3), int(w > 3)
    found = []
    for row, column in ((h // 2, w // 2), (up, w - 1 - aside), (h - 1 - up, aside)):
        x0, y0, x1, y1 = grid.box(row, column)
        if 0 <= (x0 + x1) / 2 < width and 0 <= (y0 + y1) / 2 < height:  # no token of padding
            (left, right), (top, bottom) = _within(x0, x1, width), _within(y0, y1, height)
            found.append((left, top, right, bottom))
    return found


def _within(start: float, end: float, size: int) -> tuple[int, int]:
    """Whole pixels of an interval inside the image: at least the one in its middle."""
    first, last = max(0, round(start)), min(size, round(end))
    middle = floor((start + end) / 2)
    return (first, last) if last > first else (middle, middle + 1)


def _seen(
    adapter: Adapter, images: Sequence[Sequence[Any]], prompt: str, look: Look
) -> tuple[list[Tensor], list[Tensor]]:
    """For every example (N, D) states of image tokens, and (N,) sums of their pixels' changes
    against the first example (none where pixels have no tokens)."""
    size = len(images) if adapter.batches else 1
    states: list[Tensor] = []
    pixels: list[Tensor] = []
    owned: _Owned | None = None
    for start in range(0, len(images), size):
        part = images[start : start + size]
        request = adapter.prepare(part, [prompt] * len(part))
        owned = _Owned(adapter, request) if owned is None else owned
        with torch.no_grad():
            states += look(adapter, request).flatten(2).float().cpu()
        pixels += owned.changes(request)
    return states, pixels


def entering(
    adapter: Adapter,
    request: Request,
    settings: Mapping[str, Any],
    generator: torch.Generator | None,
) -> Tensor:
    """(B, L, D): what enters the first block when an answer is generated, which ends there."""
    found: list[Tensor] = []
    layout = request.layout

    def look(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        hidden = next(x for x in tensors if x.ndim == 3 and x.is_floating_point())
        if not found and hidden.shape[1] >= layout.image_end:
            found.append(hidden[: request.batch].clone())
            raise _Seen

    hook = adapter.blocks[0].register_forward_pre_hook(look, with_kwargs=True)
    with hook, suppress(_Seen):
        adapter.generate(request, generator=generator, **settings)
    expect(bool(found), "the first block never saw the whole image span while generating")
    return found[0]


class _Owned:
    """The pixels of every token, as the first of several images of one size has them."""

    def __init__(self, adapter: Adapter, request: Request) -> None:
        self.first = request.pixels[:1]
        self.count = sum(h * w for h, w in request.layout.shapes)
        try:
            owners = adapter.pixel_tokens(request).to(self.first.device)
        except MethodError:  # pixels have no tokens
            self.owners = None
            return
        owners = owners.expand_as(self.first).flatten()
        self.inside = (owners >= 0).nonzero()[:, 0]
        self.owners = owners[self.inside]
        self.number = self.owners.bincount(minlength=self.count).clamp_min(1)

    def changes(self, request: Request) -> list[Tensor]:
        """Mean change of the pixels of every token (N, 1), per example, against the first image."""
        if self.owners is None:
            return []
        zero = self.first.new_zeros(self.count)
        gaps = (request.pixels - self.first).abs().flatten(1)[:, self.inside]
        sums = [zero.index_add(0, self.owners, gap) for gap in gaps]
        return [(s / self.number)[:, None].cpu() for s in sums]


def _changes(seen: list[Tensor]) -> list[list[Tensor]]:
    """(N,) change of every patch against the first example, over all colours of the patch."""
    if not seen:
        return []
    each = torch.stack([(one - seen[0]).norm(dim=1) for one in seen[1:]])
    return [list(each.unflatten(0, (-1, len(FILLS))).sum(1))]


def _split(values: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    parts = values.split([g.positions.numel() for g in grids])
    return [p.view(g.shape) for p, g in zip(parts, grids, strict=True)]


def _check_patch(what: str, grid: Grid, patch: Box, values: Tensor) -> None:
    """Centre of the largest changes (h, w): in the token under the patch; their peak in pixels."""
    x0, y0, x1, y1 = patch
    middle = ((x0 + x1) / 2, (y0 + y1) / 2)
    edges = (grid.x_edges, grid.y_edges)
    covered = (
        ((e[:, 0] <= at) & (at < e[:, 1])).any() for e, at in zip(edges, middle, strict=True)
    )
    if not all(covered):  # no box of the grid holds the patch
        return
    place = f"{what}, patch {patch} px"
    expect(float(values.max()) > 0, f"{place}: no token of the grid that covers it changed")
    mass = values.double().square() * (values >= values.max() / 2)
    mass = mass / mass.sum()
    center = [float((mass.sum(i) * e.mean(1)).sum()) for i, e in enumerate(edges)]
    half = [
        max(float((e[0, 1] - e[0, 0]).abs()), size) / 2
        for e, size in zip(edges, (x1 - x0, y1 - y0), strict=True)
    ]
    row, column = divmod(int(values.argmax()), grid.shape[1])
    left, top, right, bottom = grid.box(row, column)
    expect(
        all(abs(center[i] - middle[i]) <= NEAR * half[i] + 0.5 for i in (0, 1)),
        f"{place}: the centre of what changed is ({center[0]:.1f}, {center[1]:.1f}), most at "
        f"token ({row}, {column}) with box {floor(left), floor(top), ceil(right), ceil(bottom)}: "
        "expected the token that the patch covers; compare the order of tokens, and tiles, crops "
        "and newlines",
    )
    full = grid.to_pixels(values)
    y, x = divmod(int(full.argmax()), full.shape[1])
    expect(
        x0 - 2 * half[0] - 1 <= x < x1 + 2 * half[0] + 1
        and y0 - 2 * half[1] - 1 <= y < y1 + 2 * half[1] + 1,
        f"{place}: the map in pixels has its peak at ({x}, {y}), further than one cell away",
    )


def _check_second(case: AdapterCase, adapter: Adapter, plain: Sequence[Any], number: int) -> None:
    """A patch in image or frame ``number`` alone changes grids of that image most."""
    width, height = case.picture_size
    grids = adapter.prepare([plain], [case.prompt]).layout.grids
    box = (width // 4, height // 4, width // 2, height // 2)
    shown = [_patched(case.picture_size, box, fill) for fill in FILLS]
    changed: list[list[Any]]
    if isinstance(plain[0], Video):
        changed = [[Video([*plain[0][:number], one])] for one in shown]
        wanted = max(g.image for g in grids)  # of the last group of frames
    else:
        changed, wanted = [[*plain[:number], one] for one in shown], number
        expect(
            {g.image for g in grids} == set(range(len(plain))),
            f"{len(plain)} images, but grids of images {sorted({g.image for g in grids})}",
        )
    states, pixels = _seen(adapter, [list(plain), *changed], case.prompt, _look_of(case))
    for values in (*_changes(states), *_changes(pixels)):
        peaks = [float(p.max()) for p in _split(values[0], grids)]
        best = grids[peaks.index(max(peaks))].image
        expect(
            best == wanted,
            f"a patch in image {number} changed tokens of image {best} most: expected {wanted}",
        )
