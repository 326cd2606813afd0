"""Products recomputed by loops; maps in pixels against interpolation and painted boxes."""

import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_dcam.maps import PRODUCTS, cam
from captum_dcam.model.layout import Grid, Layout, uniform_grid
from captum_dcam.model.tap import gather, scatter

few = settings(max_examples=25)
SIZES = ((64, 64), (60, 80), (480, 640), (333, 517), (8, 8), (9, 100), (5, 7), (1, 50), (1000, 31))


def loops(features, gradients, product, center):
    """Every formula with plain loops over channels and positions."""
    d, h, w = features.shape
    a, g = features.copy(), gradients
    if center:
        for c in range(d):
            a[c] -= a[c].sum() / (h * w)
    out = np.zeros((h, w))
    for c in range(d):
        if product == "pooled":
            weight = g[c].sum() / (h * w)
        elif product == "plus_plus":
            total, weight = a[c].sum(), 0.0
            for i in range(h):
                for j in range(w):
                    below = 2 * g[c, i, j] ** 2 + g[c, i, j] ** 3 * total
                    alpha = g[c, i, j] ** 2 / below if below != 0 else 0.0
                    weight += alpha * max(g[c, i, j], 0.0)
        for i in range(h):
            for j in range(w):
                scale = g[c, i, j] if product == "positionwise" else weight
                out[i, j] += scale * a[c, i, j]
    return out


@pytest.mark.parametrize("center", (True, False))
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("seed", range(3))
def test_products_are_their_formulas(product, center, seed):
    rng = np.random.default_rng(seed)
    f, g = rng.normal(size=(2, 5, 4, 3)), rng.normal(size=(2, 5, 4, 3))
    g[:, 1] = 0
    g[:, 2, 0] = 0
    found = cam(torch.tensor(f), torch.tensor(g), product, center)
    expected = np.stack([loops(*x, product, center) for x in zip(f, g, strict=True)])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_products_compute_in_float32_or_wider(product, dtype):
    f, g = torch.full((200, 2, 2), 30.0, dtype=dtype), torch.full((200, 2, 2), 20.0, dtype=dtype)
    out = cam(f, g, product, False)  # 200 · 600 is more than a half can hold
    assert out.dtype == torch.float32 and torch.isfinite(out).all()
    assert torch.isfinite(cam(f * 0, g * 0, product, True)).all()


@few
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 60), st.integers(1, 60), st.integers())
def test_bilinear_is_interpolate(h, w, height, width, seed):
    maps = torch.rand(2, h, w, generator=torch.Generator().manual_seed(seed % 2**31)).double()
    found = uniform_grid(0, (h, w), (height, width)).to_pixels(maps)
    expected = F.interpolate(maps[None], (height, width), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@few
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 60), st.integers(1, 60), st.integers())
def test_nearest_paints_boxes(h, w, height, width, seed):
    maps = torch.rand(h, w, generator=torch.Generator().manual_seed(seed % 2**31)).double()
    grid = uniform_grid(0, (h, w), (height, width))
    painted = torch.zeros(height, width).double()
    for r in reversed(range(h)):
        for c in reversed(range(w)):
            x0, y0, x1, y1 = grid.box(r, c)
            ys = [y for y in range(height) if y0 <= y + 0.5 < y1]
            xs = [x for x in range(width) if x0 <= x + 0.5 < x1]
            for y in ys:
                for x in xs:
                    painted[y, x] = maps[r, c]
    assert torch.equal(grid.to_pixels(maps, "nearest"), painted)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ("bilinear", "nearest"))
def test_a_bright_cell_comes_back_where_it_was(size, mode):
    h, w = 8, 8
    grid = uniform_grid(0, (h, w), size)
    for row, column in ((0, 0), (7, 7), (3, 5), (6, 1)):
        maps = torch.zeros(h, w)
        maps[row, column] = 1
        pixels = grid.to_pixels(maps, mode)
        assert pixels.shape == size
        if not pixels.any():  # fewer pixels than cells: this cell has none
            assert min(size) < 16
            continue
        y, x = divmod(int(pixels.argmax()), size[1])
        assert abs((y + 0.5) / size[0] * h - (row + 0.5)) <= 1
        assert abs((x + 0.5) / size[1] * w - (column + 0.5)) <= 1


@pytest.mark.parametrize(
    "size",
    ((64, 64), (60, 80), (480, 640), (333, 517), (16, 16), (24, 100), (40, 17), (1000, 31)),
)
def test_a_bright_patch_of_the_picture_is_seen_in_its_cell(size):
    """Through the processor and the strided convolutions: within a cell, in pixels."""
    from PIL import Image

    adapter = tiny.adapter("none")
    dark = np.full((*size, 3), 90, dtype=np.uint8)
    for row, column in ((0, 0), (1, 6), (5, 2), (7, 7)):
        bright = dark.copy()
        ys, xs = (
            slice(math.floor(i * n / 8), math.ceil((i + 1) * n / 8))
            for i, n in zip((row, column), size, strict=True)
        )
        bright[ys, xs] = 255
        requests = [adapter.prepare([[Image.fromarray(x)]], [""]) for x in (dark, bright)]
        with torch.no_grad():
            a, b = (adapter.model.vision_tower.stem[:5](r.pixels[0]) for r in requests)
        grid = requests[0].layout.grids[0]
        assert grid.image_size == size
        pixels = grid.to_pixels((a - b).abs().sum(1)[0], "nearest")
        lit = (pixels >= pixels.max() * 0.999).nonzero().double().mean(0) + 0.5
        assert abs(lit[0] / size[0] * 8 - (row + 0.5)) <= 1.1
        assert abs(lit[1] / size[1] * 8 - (column + 0.5)) <= 1.1


def test_cropped_pixels_are_zero():
    edges = torch.tensor([[10.0, 20.0], [20.0, 30.0]], dtype=torch.float64)
    grid = Grid(torch.arange(4).view(2, 2), edges, edges, (40, 40))
    out = grid.to_pixels(torch.ones(2, 2))
    inside = torch.zeros(40, 40)
    inside[10:30, 10:30] = 1
    assert torch.equal(out, inside)
    assert torch.equal(grid.to_pixels(torch.ones(2, 2), "nearest"), inside)


def test_maps_run_across_gaps_between_tiles():
    """Pixels that neither of two neighbours sees are no reason for a stripe in the map."""
    edges = torch.tensor([[0.0, 10.0], [16.0, 26.0]], dtype=torch.float64)
    grid = Grid(torch.arange(4).view(2, 2), edges, edges, (30, 30))
    line = grid.to_pixels(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))[13]
    expected = ((torch.arange(30) + 0.5 - 5) / 16).clamp(0, 1)
    expected[26:] = 0  # cut off
    assert torch.allclose(line, expected)
    painted = grid.to_pixels(torch.ones(2, 2), "nearest")
    assert not painted[10:16].any() and not painted[:, 10:16].any() and painted.sum() == 400


@pytest.mark.parametrize("bad", (torch.zeros(8, 7), torch.zeros(8), torch.zeros(64)))
def test_maps_of_another_shape_are_refused(bad):
    with pytest.raises(ValueError, match="expected"):
        uniform_grid(0, (8, 8), (64, 64)).to_pixels(bad)
    with pytest.raises(ValueError, match="mode is 'cubic'"):
        uniform_grid(0, (8, 8), (64, 64)).to_pixels(torch.zeros(8, 8), "cubic")


@few
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), st.integers(1, 3)
)
def test_scatter_undoes_gather(h, w, grids, between, batch):
    parts, start = [], 2
    for i in range(grids):
        parts.append(uniform_grid(start, (h, w), (10, 10), i))
        start += h * w + between
    layout = Layout(tuple(parts), start + 3)
    hidden = torch.randn(batch, start + 9, 5)
    maps = gather(hidden, layout)
    assert [m.shape for m in maps] == [(batch, 5, h, w)] * grids
    for grid, m in zip(parts, maps, strict=True):
        for r in range(h):
            for c in range(w):
                assert torch.equal(m[:, :, r, c], hidden[:, grid.positions[r, c]])
    assert torch.equal(scatter(hidden, maps, layout), hidden)
    changed = scatter(hidden, tuple(m + 1 for m in maps), layout)
    touched = (changed != hidden).any(-1).any(0)
    assert int(touched.sum()) == grids * h * w
    assert layout.image_end == 2 + grids * h * w + (grids - 1) * between


# -- shares of the picture -------------------------------------------------------------------------


def test_one_grid_shares_its_image_evenly():
    (share,) = Layout((uniform_grid(0, (3, 5), (30, 45)),), 0).shares
    torch.testing.assert_close(share, torch.full((3, 5), 1 / 15, dtype=torch.float64))


def test_shares_are_counted_pixel_by_pixel():
    """Tiles that overlap, an overview, gaps, a crop, the same twice, and another image."""

    def grid(x, y, image=0):
        edges = [torch.tensor(e, dtype=torch.float64) for e in (x, y)]
        positions = torch.zeros(len(y), len(x), dtype=torch.int64)
        return Grid(positions, *edges, (20, 30), image)

    overview = grid([(0, 10), (10, 20), (20, 30)], [(0, 10), (10, 20)])
    left = grid([(0, 6), (6, 12), (12, 18)], [(2, 9), (9, 16)])
    right = grid([(14, 21), (22, 28)], [(2, 9), (9, 16)])
    grids = (overview, left, right, right, grid([(5, 25)], [(0, 20)], image=1))
    layout = Layout(grids, 0)
    for image in range(2):
        own = [i for i, g in enumerate(grids) if g.image == image]
        shown = torch.zeros(20, 30, dtype=torch.float64)
        tokens = []
        for i in own:
            for row in range(grids[i].shape[0]):
                for column in range(grids[i].shape[1]):
                    x0, y0, x1, y1 = map(int, grids[i].box(row, column))
                    shown[y0:y1, x0:x1] += 1
                    tokens.append((i, row, column, (slice(y0, y1), slice(x0, x1))))
        for i, row, column, box in tokens:
            assert float(layout.shares[i][row, column]) == pytest.approx(
                float((1 / shown[box]).sum()) / 600
            )
        total = sum(float(layout.shares[i].sum()) for i in own)
        assert total == pytest.approx(float((shown > 0).sum()) / 600)
