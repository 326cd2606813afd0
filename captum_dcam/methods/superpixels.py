r"""Regions that follow an image's edges: zero-parameter SLIC, in pixels and in image tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_dcam.model.adapter import Request
from captum_dcam.model.images import to_rgb
from captum_dcam.model.layout import Grid
from captum_dcam.packages import needed


def segments(image: Image.Image, count: int, purpose: str) -> Tensor:
    r"""About ``count`` connected regions of similar colour.

    Args:
        image (PIL.Image.Image): any mode.
        count (int): how many are asked for; SLIC gives a few fewer or more.
        purpose (str): what needs scikit-image, for the message where it is missing.

    Returns:
        Tensor: (H, W) int64, numbers from 0 without gaps.

    Raises:
        MissingPackageError: scikit-image is not installed.

    Source:
        Achanta et al., SLIC superpixels, TPAMI 2012; its zero-parameter version SLICO, as EAGLE has
        it from OpenCV. Here scikit-image's, whose edges are not OpenCV's to the pixel.
    """
    slic = needed("skimage.segmentation", purpose).slic
    found = slic(np.asarray(to_rgb(image)), n_segments=count, slic_zero=True, start_label=0)
    return torch.from_numpy(np.unique(found, return_inverse=True)[1].reshape(found.shape)).long()


def regions_of(request: Request, count: int, purpose: str) -> Tensor:
    r"""Region (N,) int64 of every image token: :func:`token_regions` of :func:`segments` of every
    image of one example, about ``count`` regions each."""
    images = [segments(image, count, purpose) for image in request.images[0]]
    return token_regions(request, images)


def token_regions(request: Request, regions: Sequence[Tensor]) -> Tensor:
    r"""The region that covers most of every image token's box.

    Args:
        request (Request): one example.
        regions (sequence of Tensor): (H, W) from :func:`segments`, one per image.

    Returns:
        Tensor: (N,) int64 over all grids, regions of all images numbered without gaps; those that
        own no token are left out. -1 for a token that shows nothing of its image (padding). A
        region is the same in all grids that show it: tiles, an overview.
    """
    found, start = [], 0
    for image, own in enumerate(regions):
        count = int(own.max()) + 1
        for place, grid in enumerate(request.layout.grids):
            if grid.image == image:
                best = _largest(grid.resized((own.shape[0], own.shape[1])), own, count)
                found.append((place, torch.where(best >= 0, best + start, -1).flatten()))
        start += count
    every = torch.cat([tokens for _, tokens in sorted(found, key=lambda pair: pair[0])])
    inside = every >= 0
    return every.masked_scatter(inside, every[inside].unique(return_inverse=True)[1])


def _largest(grid: Grid, regions: Tensor, count: int) -> Tensor:
    """The region (h, w) with most pixels in every token's box; -1 where there is none."""
    rows, columns = map(overlaps, (grid.y_edges, grid.x_edges), regions.shape)
    shares = torch.stack([rows @ (regions == n).double() @ columns.T for n in range(count)])
    return torch.where(shares.sum(0) > 0, shares.argmax(0), -1)


def overlaps(edges: Tensor, size: int) -> Tensor:
    """How much of every pixel of an axis, (n, size) float64, lies between each of n pairs of
    edges."""
    at = torch.arange(size, dtype=torch.float64)
    low, high = edges[:, :1], edges[:, 1:]
    return (torch.minimum(high, at + 1) - torch.maximum(low, at)).clamp_min(0)
