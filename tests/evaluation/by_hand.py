"""Metrics of one map in plain numpy, written from their equations, for maps made one by one."""

import numpy as np
from scipy import ndimage

BINS = 256


def stretched(values):
    """From 0 to 1; a constant map is 0."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else values * 0


def enlarged(values, size):
    """Bilinear between the centres of even cells, flat outside the outermost ones."""
    weights = []
    for cells, pixels in zip(values.shape, size, strict=True):
        at = (np.arange(pixels) + 0.5) * cells / pixels - 0.5
        weights.append(np.stack([np.interp(at, range(cells), one) for one in np.eye(cells)]))
    return weights[0].T @ values @ weights[1]


def otsu(values):
    """Threshold in units of the map, and the region above it."""
    low, high = values.min(), values.max()
    if high == low:
        return low, values > high
    level = (values - low) / (high - low)
    counts = np.bincount(np.minimum((level * BINS).astype(int), BINS - 1).ravel(), minlength=BINS)
    sums, bins = np.cumsum(counts * np.arange(BINS)), np.cumsum(counts)
    below, above = bins[:-1], bins[-1] - bins[:-1]
    distance = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
    between = below * above * distance**2
    # rounding may tell apart splits that an empty stretch of the histogram makes equal
    cut = (np.flatnonzero(between >= between.max() * (1 - 1e-12))[0] + 0.5) / BINS
    return low + cut * (high - low), level > cut


def iou(region, mask):
    return (region & mask).sum() / (region | mask).sum()


def localization(values, masks):
    """Of a map in pixels and the masks of all objects that its word names."""
    _, region = otsu(values)
    scaled, union = values / values.max(), np.any(masks, axis=0)
    found = {
        "obj_iou": max(iou(region, mask) for mask in masks),
        "contrast": scaled[union].mean() / (scaled[~union].mean() + 1e-8),
        "concentration": scaled[union].sum() / (scaled.sum() + 1e-8),
    }
    parts = found["obj_iou"], min(found["contrast"] / 20, 1), found["concentration"]
    return found | {"f3": 3 / sum(1 / part for part in parts) if all(parts) else 0.0}


def pointing(values, masks, tolerance):
    union = np.any(masks, axis=0)
    boxes = np.zeros_like(union)
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    peaks = np.argwhere(values == values.max())
    hits = [np.hypot(*(np.argwhere(union) - one).T).min() <= tolerance for one in peaks]
    return {"pointing": np.mean(hits), "energy_pointing": values[boxes].sum() / values.sum()}


def sparseness(values):
    if not values.any():
        return {"gini": 0.0, "entropy": 1.0, "hoyer": 0.0}
    flat = np.sort(values.ravel())
    count, shares = len(flat), flat / flat.sum()
    some = shares[shares > 0]
    place = np.arange(1, count + 1)
    length = np.sqrt((flat**2).sum())
    return {
        "gini": 1 - 2 * (shares * (count - place + 0.5) / count).sum(),
        "entropy": -(some * np.log(some)).sum() / np.log(count),
        "hoyer": (np.sqrt(count) - flat.sum() / length) / (np.sqrt(count) - 1),
    }


def features(values):
    if values.min() == values.max():
        return [1.0, 0, 0, 0, 0, 0]
    level, (_, region) = stretched(values), otsu(values)
    away = level - level.mean()
    neighbours = np.concatenate(
        [(away[:, 1:] * away[:, :-1]).ravel(), (away[1:] * away[:-1]).ravel()]
    )
    share = region.mean()
    between = share * (1 - share) * (level[region].mean() - level[~region].mean()) ** 2
    labels, parts = ndimage.label(region, np.ones((3, 3)))
    heaviest = max(values[labels == n].sum() for n in range(1, parts + 1))
    measured = sparseness(values)
    return [
        measured["entropy"],
        measured["gini"],
        np.log(values.max() / values.mean()) / np.log(values.size),
        neighbours.mean() / level.var(),
        between / level.var(),
        heaviest / values.sum(),
    ]


def statistics(raw):
    level = stretched(np.maximum(raw, 0))
    away = level - level.mean()
    return {
        "peak": raw.max(),
        "map_mean": level.mean(),
        "map_std": level.std(),
        "map_skewness": (away**3).mean() / level.std() ** 3 if level.any() else 0.0,
    }


def interval(words, draws):
    """Mean over words, and its 2.5 and 97.5 percentiles over draws of images with all their words.

    Args:
        words: (image, score) of every word.
        draws: (n, images) numbers of images, counted among those that have a word.
    """
    scores = [[s for i, s in words if i == image] for image in sorted({i for i, _ in words})]
    pools = ([s for n in draw for s in scores[n]] for draw in draws)
    means = [sum(pool) / len(pool) for pool in pools]
    return np.mean([s for _, s in words]), *np.quantile(means, (0.025, 0.975))
