"""Affinity against loops, scikit-learn's cosines, tiles, frames, and features that tell nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from refine import loops
from refine.shared import few, random_maps
from scipy import stats
from sklearn.metrics.pairwise import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captum_dcam import refine as R
from captum_dcam.metrics import localization
from captum_dcam.model.layout import Layout, uniform_grid
from captum_dcam.refine import affinity


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    "settings", [{}, {"power": 3.0, "square": 1.5, "center": False}, {"power": 24.0, "square": 1.0}]
)
def test_the_formula_over_tiles_and_frames(settings):
    """Two grids of one picture with shares of their own, and a third of another picture."""
    shapes, pictures = ((3, 4), (2, 3), (3, 3)), (0, 0, 1)
    maps = [torch.from_numpy(random_maps(i, 2, *s)) for i, s in enumerate(shapes)]
    states = [normal(i, 5, *s) + 1 for i, s in enumerate(shapes)]
    shares = [normal(9 + i, *s).abs() for i, s in enumerate(shapes)]
    found = R.affinity_propagation(maps, states, shares, pictures, **settings)
    known = {"power": 6.0, "square": 2.0, "center": True, **settings}
    for word in range(2):
        spread = []
        for own in ((0, 1), (2,)):
            rows = (
                torch.cat([m[word].flatten() for m in (maps[i] for i in own)]).numpy(),
                torch.cat([states[i].flatten(1).T for i in own]).numpy(),
                torch.cat([shares[i].flatten() for i in own]).numpy(),
            )
            spread.append(loops.affinity(*rows, known["power"], known["square"], known["center"]))
        expected = (np.concatenate(spread) / max(s.max() for s in spread)) ** known["square"]
        result = np.concatenate([f[word].flatten().numpy() for f in found])
        np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-12)


def test_the_kernel_is_scikit_learns_cosine_times_how_far_lengths_agree():
    maps, states = torch.from_numpy(random_maps(3, 4, 6, 7)), normal(4, 16, 6, 7)
    tokens = states.flatten(1).T.numpy()
    apart = tokens - tokens.mean(0)
    length = np.linalg.norm(apart, axis=1)
    agree = 1 / np.cosh(np.log(length[:, None] / length))
    kernel = (cosine_similarity(apart) * agree).clip(0) ** 6
    root = kernel.sum(1) ** -0.5
    spread = maps.flatten(1).numpy() @ (root[:, None] * kernel * root)
    expected = (spread / spread.max(1, keepdims=True)) ** 2
    (found,) = R.affinity_propagation([maps], [states])
    np.testing.assert_allclose(found.flatten(1), expected, rtol=1e-9)


# -- several grids ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("power", "center"), [(6.0, True), (2.0, False)])
def test_relatives_are_the_mean_of_the_kernel(monkeypatch, power, center):
    monkeypatch.setattr(affinity, "_ROWS", 5)  # rows in several blocks
    states = normal(3, 6, 3, 4) + 1
    tokens = states.flatten(1).mT.numpy()
    own = tokens - tokens.mean(0) if center else tokens
    lengths = (own**2).sum(1)
    kernel = np.clip(2 * own @ own.T / (lengths[:, None] + lengths), 0, 1) ** power
    np.fill_diagonal(kernel, 0)
    found = affinity.relatives(states, power=power, center=center)
    assert found.shape == (3, 4)
    assert found.flatten().numpy() == pytest.approx(kernel.sum(1) / 11)


def refined(layout, maps, states, stage=None):
    contexts = [
        R.RefineContext(features=f, shares=share, picture=grid.image)
        for f, share, grid in zip(states, layout.shares, layout.grids, strict=True)
    ]
    return R.Compose([stage or R.Affinity()]).over(maps, contexts)


def test_a_grid_that_is_given_twice_changes_nothing():
    grid, small = uniform_grid(0, (4, 6), (40, 60)), uniform_grid(24, (2, 2), (40, 60))
    maps = [torch.from_numpy(random_maps(i, 2, *g.shape)) for i, g in enumerate((grid, small))]
    states = [normal(i, 8, *g.shape) for i, g in enumerate((grid, small))]
    again = replace(grid, positions=grid.positions + 28)
    once = refined(Layout((grid,), 0), maps[:1], states[:1])
    twice = refined(Layout((grid, again), 0), [maps[0]] * 2, [states[0]] * 2)
    for found in twice:
        torch.testing.assert_close(found, once[0])
    mixed = refined(Layout((grid, small), 0), maps, states)
    assert not torch.allclose(mixed[0], once[0])  # another grid of the picture does change it
    both = Layout((grid, again, small, replace(small, positions=small.positions + 28)), 0)
    for found, expected in zip(
        refined(both, [maps[0], maps[0], maps[1], maps[1]], [states[0]] * 2 + [states[1]] * 2),
        (mixed[0], mixed[0], mixed[1], mixed[1]),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_tiles_over_an_overview_are_the_one_grid():
    """Where objects have states of their own and the overview shows what the tiles show."""
    whole = uniform_grid(0, (4, 8), (40, 80))
    x = whole.x_edges
    left = replace(whole, positions=whole.positions[:, :4], x_edges=x[:4])
    right = replace(whole, positions=whole.positions[:, 4:], x_edges=x[4:])
    overview = uniform_grid(32, (2, 4), (40, 80))
    kinds = torch.zeros(4, 8, dtype=torch.int64)
    kinds[:2, 2:6], kinds[2:, 6:] = 1, 2
    states = normal(0, 3, 16)[kinds].movedim(-1, 0)
    maps = torch.from_numpy(random_maps(1, 2, 4, 8))
    coarse = maps.unflatten(-1, (4, 2)).unflatten(-3, (2, 2)).mean((-1, -3))
    (expected,) = refined(Layout((whole,), 0), [maps], [states])
    found = refined(
        Layout((left, right, overview), 0),
        [maps[..., :4], maps[..., 4:], coarse],
        [states[..., :4], states[..., 4:], states[:, ::2, ::2]],
    )
    torch.testing.assert_close(torch.cat(found[:2], dim=-1), expected)
    torch.testing.assert_close(found[2], expected[:, ::2, ::2])
    alone = [R.Affinity()(maps[..., a:b], R.RefineContext(features=states[..., a:b]))
             for a, b in ((0, 4), (4, 8))]  # fmt: skip
    assert not torch.allclose(torch.cat(alone, dim=-1), expected, atol=1e-3)


@pytest.mark.parametrize("scale", (1e-300, 1e-40, 1e300))
def test_shares_are_on_any_scale(scale):
    maps, states = torch.from_numpy(random_maps(2, 2, 4, 5)).float(), normal(2, 6, 4, 5)
    share = normal(3, 4, 5).abs()
    expected = R.affinity_propagation([maps], [states], [share])
    torch.testing.assert_close(R.affinity_propagation([maps], [states], [share * scale]), expected)
    assert not torch.allclose(R.affinity_propagation([maps], [states])[0], expected[0], atol=1e-4)


def test_a_frame_without_the_object_stays_dark_and_helps_no_other():
    maps = [torch.from_numpy(random_maps(i, 3, 4, 5)) for i in range(2)]
    maps[1] = maps[1] * 1e-3
    states = [normal(i, 6, 4, 5) for i in range(2)]
    both = R.affinity_propagation(maps, states, pictures=[3, 7])
    (first,) = R.affinity_propagation(maps[:1], states[:1])
    torch.testing.assert_close(both[0], first)
    assert float(both[1].amax()) < 1e-4
    (second,) = R.affinity_propagation(maps[1:], states[1:])
    own = both[1] / both[1].amax((-2, -1), keepdim=True)
    torch.testing.assert_close(own, second)  # dark, and otherwise its own


def test_stages_see_all_grids_only_where_they_ask_for_them():
    maps = [torch.from_numpy(random_maps(i, 2, 4, 5)) for i in range(2)]
    contexts = [R.RefineContext(features=normal(i, 6, 4, 5)) for i in range(2)]
    stages = R.Compose([R.MinMax(), R.Compose([R.Affinity(), R.Median()])])
    expected = R.Affinity().over([R.min_max(m) for m in maps], contexts)
    for found, one in zip(stages.over(maps, contexts), expected, strict=True):
        assert torch.equal(found, R.median_filter(one))
    assert stages.needs == {"features"}
    one = R.Compose([R.MinMax(), R.Affinity()])(maps[0], contexts[0])
    assert torch.equal(one, R.Affinity()(R.min_max(maps[0]), contexts[0]))


# -- batches, types, memory ------------------------------------------------------------------------


def test_rows_with_features_of_their_own_are_each_alone():
    maps, states = torch.from_numpy(random_maps(5, 3, 2, 4, 5)), normal(5, 3, 7, 4, 5)
    found = R.Affinity()(maps, R.RefineContext(features=states))
    for row in range(3):
        alone = R.Affinity()(maps[row], R.RefineContext(features=states[row]))
        assert torch.equal(found[row], alone)
    none = R.RefineContext(features=states[:0])
    assert R.Affinity()(maps[:0], none).shape == (0, 2, 4, 5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("of_states", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
def test_types_mix_and_half_precision_is_worked_on_in_fp32(dtype, of_states):
    maps = torch.from_numpy(random_maps(6, 2, 5, 6)).to(dtype)
    states = normal(6, 32, 5, 6).to(of_states)
    (found,) = R.affinity_propagation([maps], [states])
    (exact,) = R.affinity_propagation([maps.double()], [states.double()])
    assert found.dtype == dtype
    torch.testing.assert_close(found, exact.to(dtype))


def test_autocast_leaves_it_alone():
    maps, states = torch.from_numpy(random_maps(6, 2, 5, 6)).float(), normal(6, 32, 5, 6)
    expected = R.affinity_propagation([maps], [states])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = R.affinity_propagation([maps], [states])
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("scale", (1e-300, 1e-30, 1e30, 1e300))
@pytest.mark.parametrize("center", (True, False))
def test_features_are_on_any_scale(scale, center):
    maps = torch.from_numpy(random_maps(7, 2, 5, 6)).float()
    states = normal(7, 16, 5, 6)
    expected = R.affinity_propagation([maps], [states], center=center)
    found = R.affinity_propagation([maps], [states * scale], center=center)
    torch.testing.assert_close(found, expected)


def test_equal_tokens_are_alike_whatever_the_power():
    """Their similarity may be a little above 1, or below."""
    states = normal(0, 48, 1, 40, dtype=torch.float32).repeat(1, 3, 1)
    maps = torch.from_numpy(random_maps(7, 3, 40)).float()
    (found,) = R.affinity_propagation([maps], [states], power=1e10)
    assert found.isfinite().all() and float(found.max()) == 1


class Storages(TorchDispatchMode):
    """Sizes of the tensors that operations make, one per storage."""

    def __init__(self, least):
        super().__init__()
        self.least, self.seen = least, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and one.numel() >= self.least:
                self.seen[one.untyped_storage()._cdata] = one  # kept alive: no address comes twice
        return out


def test_one_kernel_is_all_that_is_ever_made():
    """2,400 tokens: one tensor of that number squared, whatever is done with it."""
    maps = torch.rand(3, 48, 50, generator=torch.Generator().manual_seed(0))
    states = normal(0, 16, 48, 50, dtype=torch.float32)
    with Storages(2400**2) as made:
        R.affinity_propagation([maps], [states])
    assert [tuple(t.shape) for t in made.seen.values()] == [(2400, 2400)]


@pytest.mark.parametrize("values", (1, 100, 24 * 7, 24 * 23))
def test_many_tokens_go_in_blocks_of_rows(monkeypatch, values):
    maps, states = torch.from_numpy(random_maps(8, 3, 4, 6)), normal(8, 5, 4, 6)
    expected = R.affinity_propagation([maps], [states])
    monkeypatch.setattr(affinity, "_KERNEL_VALUES", values)
    with Storages(24 * 24) as made:
        found = R.affinity_propagation([maps], [states])
    assert not made.seen
    torch.testing.assert_close(found[0], expected[0])


# -- features that tell nothing --------------------------------------------------------------------


@pytest.mark.parametrize("center", (True, False))
@pytest.mark.parametrize("value", (0.0, 1.0, 0.1, -3e4, 1e30, 1e-30))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64))
def test_features_that_are_the_same_throughout_keep_the_maps_order(center, value, dtype):
    maps = torch.from_numpy(random_maps(9, 3, 5, 7)).float()
    direction = normal(0, 12, 1, 1).to(dtype) * value
    (found,) = R.affinity_propagation([maps], [direction.expand(12, 5, 7)], center=center)
    torch.testing.assert_close(found, (maps / maps.amax((-2, -1), keepdim=True)) ** 2)


@pytest.mark.parametrize("channels", (64, 512))
@pytest.mark.parametrize("seed", range(4))
def test_features_at_random_do_not_harm(seed, channels):
    maps = torch.from_numpy(random_maps(20 + seed, 6, 24, 24)).float()
    mask = maps > 0.5 * maps.amax((-2, -1), keepdim=True)
    states = normal(seed, channels, 24, 24, dtype=torch.float32)
    (found,) = R.affinity_propagation([maps], [states], square=1.0)
    for bare, spread in zip(maps, found, strict=True):
        on = bare > 0  # zeros have no order
        assert stats.spearmanr(bare[on], spread[on]).statistic > 0.999
    bare = localization(maps / maps.amax((-2, -1), keepdim=True), mask).f3
    assert (localization(found, mask).f3 >= bare - 0.01).all()
    (default,) = R.affinity_propagation([maps], [states])
    assert (localization(default, mask).f3 >= bare - 0.01).all()


def test_a_token_without_a_direction_resembles_only_itself():
    states = torch.tensor([[[1.0, 1.0, 0.0, -1.0, -1.0]]])
    maps = torch.tensor([[0.0, 0.5, 0.5, 0.0, 0.0]])
    (found,) = R.affinity_propagation([maps], [states], square=1.0)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5, 1.0, 0.0, 0.0]]))


def test_a_token_that_shows_nothing_neither_gives_nor_breaks():
    states, maps = normal(1, 4, 1, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    states[:, 0, 3] = 0
    share = torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    (found,) = R.affinity_propagation([maps], [states], [share], center=False)
    (expected,) = R.affinity_propagation([maps[:, :3]], [states[..., :3]], center=False)
    torch.testing.assert_close(found[:, :3], expected)
    assert float(found[0, 3]) == 0


numbers = st.one_of(
    st.sampled_from((0.0, 1.0, -1.0, 1e30, -1e30, 1e-30, 3e38)), st.floats(-1, 1, width=32)
)


@few
@given(
    st.data(),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.sampled_from((1e-3, 0.5, 8.0, 1e6)),
    st.booleans(),
)
def test_any_features_give_finite_maps_from_zero_to_one(data, shape, power, center):
    states = torch.from_numpy(data.draw(hnp.arrays(np.float32, shape, elements=numbers)))
    seeds = hnp.arrays(np.float32, (2, *shape[1:]), elements=numbers.map(abs))
    maps = torch.from_numpy(data.draw(seeds))
    (found,) = R.affinity_propagation([maps], [states], power=power, center=center)
    assert found.isfinite().all() and (found >= 0).all() and (found <= 1).all()
    assert torch.equal(found.flatten(1).any(1), maps.flatten(1).any(1))  # zero maps alone are zero
    assert found.shape == maps.shape


# -- refusals --------------------------------------------------------------------------------------

MAP, STATES = torch.ones(2, 3, 4), torch.ones(5, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: R.Affinity(power=0), ValueError, r"`power` is 0, .*above 0"),
        (lambda: R.Affinity(square=-1.0), ValueError, r"`square` is -1\.0"),
        (lambda: R.Affinity(power="8"), TypeError, r"`power` is '8' \(str\), expected a number"),
        (lambda: R.Affinity(center=1), TypeError, r"`center` is 1: expected True or False"),
        (lambda: R.RefineContext(features=torch.ones(3, 4)), ValueError, r"\(3, 4\), expected \(D"),
        (lambda: R.RefineContext(features=[1.0]), TypeError, r"`features` is a list"),
        (lambda: R.RefineContext(features=STATES / 0), ValueError, r"`features`.*NaN or infinite"),
        (lambda: R.RefineContext(shares=-MAP), ValueError, r"`shares`.*negative"),
        (lambda: R.RefineContext(picture=-1), ValueError, r"`picture` is -1: expected a whole"),
        (
            lambda: R.Affinity()(MAP),
            ValueError,
            r"Affinity needs `features` .*contexts_of\(forward",
        ),
        (
            lambda: R.Affinity()(MAP, R.RefineContext(steps=3)),
            ValueError,
            r"holds none: give it one, .*RefineContext\(features=states\)",
        ),
        (lambda: R.affinity_propagation([], []), ValueError, r"0 maps, 0 features.*and a grid"),
        (lambda: R.affinity_propagation([MAP], []), ValueError, r"1 maps, 0 features"),
        (lambda: R.affinity_propagation([MAP], [STATES], [None] * 2), ValueError, r"2 shares"),
        (
            lambda: R.affinity_propagation([MAP], [STATES[..., :3]]),
            ValueError,
            r"`features` \(5, 3, 3\) do not fit `maps` \(2, 3, 4\): expected \(D, H, W\)",
        ),
        (
            lambda: R.affinity_propagation([MAP], [STATES.expand(3, 5, 3, 4)]),
            ValueError,
            r"\(3, 5, 3, 4\) do not fit `maps` \(2, 3, 4\)",
        ),
        (
            lambda: R.affinity_propagation([MAP[0]], [STATES[None]]),
            ValueError,
            r"\(1, 5, 3, 4\) do not fit `maps` \(3, 4\)",
        ),
        (
            lambda: R.affinity_propagation([MAP, MAP], [STATES, STATES[:4]]),
            ValueError,
            r"differ between grids in more than H and W",
        ),
        (
            lambda: R.affinity_propagation([MAP, MAP[:1]], [STATES, STATES]),
            ValueError,
            r"differ between grids in more than H and W",
        ),
        (
            lambda: R.affinity_propagation([MAP, MAP], [STATES] * 2, [MAP[0], None]),
            ValueError,
            r"`shares` of a grid \(3, 4\) are None: expected \(H, W\) for every grid, or for none",
        ),
        (
            lambda: R.affinity_propagation([MAP], [STATES], [MAP]),
            ValueError,
            r"`shares` of a grid \(3, 4\) are \(2, 3, 4\)",
        ),
        (
            lambda: R.affinity_propagation([MAP], [STATES], [0 * MAP[0]]),
            ValueError,
            r"all `shares` of picture 0 are zero: expected",
        ),
        (
            lambda: R.affinity_propagation([MAP] * 2, [STATES] * 2, [MAP[0], 0 * MAP[0]], [1, 4]),
            ValueError,
            r"all `shares` of picture 4 are zero: expected",
        ),
        (
            lambda: R.affinity_propagation([MAP], [STATES], pictures=[0, 1]),
            ValueError,
            r"1 maps, .* 2 pictures",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
