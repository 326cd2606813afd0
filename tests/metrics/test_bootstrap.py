"""The bootstrap against a loop, its seed, its coverage, and its degenerate cases."""

import numpy as np
import pytest
import torch

from captum_dcam.metrics import (
    BootstrapInterval,
    bootstrap_ci,
    cluster_bootstrap,
    paired_bootstrap,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_loop_over_resamples(seed):
    scores = torch.rand(37, generator=seeded(seed), dtype=torch.float64)
    result = bootstrap_ci(scores, seeded(seed), n=200, level=0.9)
    drawn = torch.randint(37, (200, 37), generator=seeded(seed))
    means = [np.mean([float(scores[i]) for i in row]) for row in drawn]
    assert float(result.mean) == pytest.approx(float(scores.mean()))
    assert float(result.low) == pytest.approx(np.quantile(means, 0.05))
    assert float(result.high) == pytest.approx(np.quantile(means, 0.95))


def test_batch_equals_single_and_the_seed_decides():
    scores = torch.rand(4, 3, 50, generator=seeded())
    together = bootstrap_ci(scores, seeded(1))
    assert isinstance(together, BootstrapInterval) and together.low.shape == (4, 3)
    for index in np.ndindex(4, 3):
        alone = bootstrap_ci(scores[index], seeded(1))
        for batch, single in zip(together, alone, strict=True):
            torch.testing.assert_close(batch[index], single)
    assert torch.equal(together.low, bootstrap_ci(scores, seeded(1)).low)
    assert not torch.equal(together.low, bootstrap_ci(scores, seeded(2)).low)


def test_many_images_are_drawn_in_pieces():
    scores = torch.rand(30_000, generator=seeded(), dtype=torch.float64)
    result = bootstrap_ci(scores, seeded(1), n=100)
    error = float(scores.std()) / 30_000**0.5
    assert float(result.high - result.low) == pytest.approx(2 * 1.96 * error, rel=0.3)


def test_covers_the_true_mean_about_as_often_as_it_says():
    scores = torch.rand(1000, 40, generator=seeded())
    _, low, high = bootstrap_ci(scores, seeded(1), n=400, level=0.9)
    covered = float(((low <= 0.5) & (high >= 0.5)).float().mean())
    assert 0.84 <= covered <= 0.93


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_scores_and_single_images_have_no_width(dtype):
    for scores in (torch.full((2, 9), 0.1, dtype=dtype), torch.tensor([0.3], dtype=dtype)):
        mean, low, high = bootstrap_ci(scores, seeded())
        assert torch.equal(mean, low) and torch.equal(mean, high)
        assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_paired_sees_a_difference_that_two_intervals_hide():
    hard = torch.rand(60, generator=seeded())
    better = hard + 0.02 + 0.01 * torch.randn(60, generator=seeded(1))
    first, second = bootstrap_ci(better, seeded()), bootstrap_ci(hard, seeded())
    assert first.low < second.high
    difference = paired_bootstrap(better, hard, seeded())
    assert difference.low > 0
    assert float(difference.mean) == pytest.approx(float((better - hard).mean()))


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        (torch.ones(3, 0), {}, r"shape \(3, 0\)"),
        (torch.tensor(1.0), {}, r"shape \(\)"),
        (torch.tensor([1.0, float("nan")]), {}, "1 NaN or infinite"),
        (torch.ones(3, dtype=torch.int64), {}, "int64"),
        ([1.0, 2.0], {}, "list"),
        (torch.ones(3), {"n": 0}, "n is 0"),
        (torch.ones(3), {"level": 95}, "level 95"),
        (torch.ones(3), {"level": 1}, "level 1"),
        (torch.ones(3), {"level": 0}, "level 0"),
    ],
)
def test_errors_teach(values, options, says):
    with pytest.raises(ValueError, match=says):
        bootstrap_ci(values, seeded(), **options)
    with pytest.raises(ValueError, match=says):
        paired_bootstrap(values, values, seeded(), **options)


def test_pairs_must_match():
    with pytest.raises(ValueError, match="same images in the same order"):
        paired_bootstrap(torch.ones(3), torch.ones(4), seeded())


@pytest.mark.parametrize("seed", range(3))
def test_words_are_resampled_with_their_images(seed):
    images = torch.tensor([7, 7, 7, 2, 9, 9, 4])
    scores = torch.rand(2, 7, generator=seeded(seed), dtype=torch.float64)
    result = cluster_bootstrap(scores, images, seeded(seed), n=300, level=0.9)
    drawn = torch.randint(4, (300, 4), generator=seeded(seed))
    known = [2, 4, 7, 9]
    for row, low, high, mean in zip(scores, result.low, result.high, result.mean, strict=True):
        means = [
            np.mean([float(v) for i in one for v in row[images == known[int(i)]]]) for one in drawn
        ]
        assert float(mean) == pytest.approx(float(row.mean()))
        assert float(low) == pytest.approx(np.quantile(means, 0.05))
        assert float(high) == pytest.approx(np.quantile(means, 0.95))


def test_one_word_an_image_is_the_plain_bootstrap():
    scores = torch.rand(3, 40, generator=seeded())
    plain = bootstrap_ci(scores, seeded(1))
    for found, own in zip(
        cluster_bootstrap(scores, torch.arange(40), seeded(1)), plain, strict=True
    ):
        torch.testing.assert_close(found, own)


def test_words_that_repeat_an_image_make_no_narrower_interval():
    scores = torch.rand(40, generator=seeded())
    once = bootstrap_ci(scores, seeded(1))
    again = cluster_bootstrap(scores.repeat(5), torch.arange(40).repeat(5), seeded(1))
    torch.testing.assert_close(again.high - again.low, once.high - once.low)


@pytest.mark.parametrize("images", [torch.zeros(3), torch.zeros(2, dtype=torch.long)])
def test_every_word_has_an_image(images):
    with pytest.raises(ValueError, match="one image's number for each of the N words"):
        cluster_bootstrap(torch.ones(3), images, seeded())
