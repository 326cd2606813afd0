r"""Every refinement again as plain numpy loops over one map: the equations, read slowly.

Written from the papers' equations and independent of ``captum_dcam.refine``: no window is
unfolded and no batch is formed. Tests compare with it and the benchmarks time it.
Inputs are two-dimensional fp64 arrays.
"""

import math

import numpy as np


def padded(image, pad):
    """Reflect each axis that is longer than ``pad``, replicate each that is not."""
    for axis in (0, 1):
        widths = [(0, 0), (0, 0)]
        widths[axis] = (pad, pad)
        image = np.pad(image, widths, mode="reflect" if image.shape[axis] > pad else "edge")
    return image


def over_windows(image, kernel_size, function):
    pad = kernel_size // 2
    source = padded(image, pad)
    result = np.zeros_like(image)
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            result[i, j] = function(source[i : i + kernel_size, j : j + kernel_size])
    return result


def rank_gaussian_value(window):
    """TAM Eq. 7 with normalised weights."""
    values = np.sort(window.ravel())
    if values[0] == values[-1]:
        return values[0]
    spread = values.std() / values.mean()
    centre = len(values) // 2
    weights = np.exp(-((np.arange(len(values)) - centre) ** 2) / (2 * spread**2))
    return float((values * weights).sum() / weights.sum())


def rank_gaussian(image, kernel_size=3):
    """Diffusion-CAM Eq. 6."""
    return over_windows(image, kernel_size, rank_gaussian_value)


def median(image, kernel_size=3):
    return over_windows(image, kernel_size, np.median)


def gaussian(image, kernel_size=3, sigma=1.0):
    r = kernel_size // 2
    kernel = np.array(
        [
            [math.exp(-(dy**2 + dx**2) / (2 * sigma**2)) for dx in range(-r, r + 1)]
            for dy in range(-r, r + 1)
        ]
    )
    kernel /= kernel.sum()
    return over_windows(image, kernel_size, lambda window: float((window * kernel).sum()))


def min_max(image):
    low, high = image.min(), image.max()
    if high - low <= 16 * np.finfo(image.dtype).eps * np.abs(image).max():
        return np.zeros_like(image)
    return (image - low) / (high - low)


def kernel_size(image, steps, height, k_base=3, k_min=3, k_max=11):
    """Diffusion-CAM Eq. 5: the odd integer nearest to the product, the larger of two."""
    step = min(steps / 16, 2)
    std = min(5 * image.std(), 2)
    size = min(height / 512, 1.5)
    product = k_base * step * std * size
    candidates = range(1, 2 * math.ceil(product) + 4, 2)
    nearest = min(candidates, key=lambda odd: (abs(odd - product), -odd))
    return min(max(nearest, k_min), k_max)


def akd(image, steps, height, **settings):
    return rank_gaussian(image, kernel_size(image, steps, height, **settings))


def dacg_branch(image):
    """Diffusion-CAM Eq. 7, Appendix C.1."""
    if image.std() > 0.22:
        return "high_var", 90
    if image.mean() > 0.35:
        return "high_mean", 75
    if image.mean() < 0.25:
        return "low_mean", 80
    return "default", 85


def dacg(image, nonzero_only=True):
    """Diffusion-CAM Eq. 8."""
    values = image[image > 0] if nonzero_only else image.ravel()
    if len(values) == 0:
        return image.copy()
    tau = np.percentile(values, dacg_branch(image)[1])
    blurred = gaussian(image, 3, 0.3)
    result = image.copy()
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            if image[i, j] <= tau:
                result[i, j] = blurred[i, j]
    return result


def cba(image, gamma=0.5):
    """Diffusion-CAM Eq. 9 to 11."""
    positive = image[image > 0]
    if len(positive) == 0:
        return image.copy()
    tau = (
        0.15 * np.median(positive)
        + 0.15 * np.quantile(image, 0.60)
        + 0.2 * positive.mean()
        + 0.015 * image.max()
    )
    result = image.copy()
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            if image[i, j] < tau:
                result[i, j] = image[i, j] * max(gamma, image[i, j] / tau)
    return result


def interference(image, repeated=None, omega_rep=0.05, omega_out=0.02, form="mask"):
    """Diffusion-CAM Eq. 12."""
    bound = image.mean() + 2 * image.std()
    result = np.zeros_like(image)
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            if image[i, j] > bound:
                result[i, j] += omega_out * (1 if form == "mask" else image[i, j] - bound)
            if repeated is not None:
                result[i, j] += omega_rep * repeated[i, j]
    return result


def sicd(image, repeated=None, lambda_max=0.5, gate=True, revert_below=None, **settings):
    """Diffusion-CAM Eq. 13."""
    mean, std = image.mean(), image.std()
    skewness = ((image - mean) ** 3).mean() / std**3 if std > 0 else 0
    if gate and not (std > 0.22 or skewness > 1):
        return image.copy()
    disturbance = interference(image, repeated, **settings)
    energy = (disturbance**2).sum()
    if energy == 0:
        return image.copy()
    share = min(max((image * disturbance).sum() / energy, 0), lambda_max)
    clean = np.maximum(image - share * disturbance, 0)
    if revert_below is not None and np.ptp(clean) < revert_below * np.ptp(image):
        return image.copy()
    return clean


def affinity(seeds, states, shares, power, square, center):
    """One picture's tokens: seeds (N,), states (N, D), shares (N,), by the formula, before the
    maximum is divided by."""
    count = len(seeds)
    mean = sum(m * f for m, f in zip(shares, states, strict=True)) / sum(shares)
    c = [f - mean if center else f for f in states]
    kernel = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            dice = 2 * np.dot(c[i], c[j]) / (np.dot(c[i], c[i]) + np.dot(c[j], c[j]))
            kernel[i, j] = max(0, dice) ** power
    degree = [sum(shares[j] * kernel[i, j] for j in range(count)) for i in range(count)]
    return np.array(
        [
            sum(
                shares[j] * kernel[i, j] * seeds[j] / np.sqrt(degree[i] * degree[j])
                for j in range(count)
            )
            for i in range(count)
        ]
    )


def paper(image, steps, height, repeated=None):
    """The paper preset: min-max, AKD, DACG, CBA, min-max, SICD."""
    image = cba(dacg(akd(min_max(image), steps, height)))
    return sicd(min_max(image), repeated)
