r"""Captum's own way to explain a multimodal language model: ``LLMAttribution`` of image segments.

Captum masks the image itself, before the model's processor sees it. What it takes for a Hugging
Face model is a stand-in that reads the answer's tokens in the states of their own steps.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import captum
import numpy as np
import torch
from captum import attr
from PIL import Image
from torch import Tensor

from captum_dcam.errors import MethodError, MissingPackageError
from captum_dcam.methods.base import (
    AttributionTask,
    PerWord,
    WordMaps,
    check_counts,
    entered,
)
from captum_dcam.methods.captum_common import attributed
from captum_dcam.methods.superpixels import overlaps, segments
from captum_dcam.model.images import to_rgb
from captum_dcam.model.tap import wide
from captum_dcam.model.words import Target

#: the classes of Captum 0.9 that this takes
NEEDED = ("ImageMaskInput", "LLMAttribution")


class StandIn:
    r"""As much of a Hugging Face model as ``LLMAttribution`` calls.

    Given one prompt token and a word's tokens, it returns logits whose row i is what the model
    gives at the word's i-th place, in the state of that token's step.

    Args:
        task (AttributionTask): whose answer is held fixed.
        target (Target): the word.
    """

    def __init__(self, task: AttributionTask, target: Target) -> None:
        self.task, self.target, self.device = task, target, task.pixels.device

    def inputs(self, pixels: Tensor) -> dict[str, Tensor]:
        """What a processor returns."""
        prompt = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        return {"input_ids": prompt, "pixels": pixels}

    def forward(self, pixels: Tensor, **_ids: Any) -> SimpleNamespace:
        """Logits (1, tokens, V) of the word's places."""
        task, rows = self.task, []
        for position in self.target.positions:
            logits = task.forward(pixels.to(task.pixels.dtype), *task.arguments(position))
            rows.append(wide(logits[:, position]))
        return SimpleNamespace(logits=torch.stack(rows, 1))


class Numbers:
    """As much of a tokenizer as its labels need: a token reads as its number."""

    def decode(self, ids: Tensor) -> str:
        return " ".join(map(str, ids.tolist()))

    def __call__(self, text: str, **_options: Any) -> dict[str, list[Any]]:
        found = [*re.finditer(r"\d+", text)]
        return {
            "input_ids": [int(m.group()) for m in found],
            "offset_mapping": [m.span() for m in found],
        }


@entered(
    "llm_attribution",
    "LLMAttribution (ImageMaskInput)",
    "Captum, pixels",
    "Captum 0.9; Miglani et al., NLP-OSS 2023",
    "65 (64 regions)",
    "rescaling",
    "scikit-image",
    expensive=True,
)
class LlmAttribution(PerWord):
    r"""Captum's ``LLMAttribution`` around ``FeatureAblation``, over segments of the image.

    The fall of the word's log-probability when a superpixel is painted with the image's mean colour
    (of 8 bits) and the processor is called again; a word's value is the sum of its tokens'. Every
    image token has the mean over its box. Of several images, one after the other is segmented while
    the others stay whole. Captum runs one masked image per pass.

    Args:
        regions (int): superpixels per image, about as many. Default: 64
    """

    regions: int = 64

    def __post_init__(self) -> None:
        check_counts(self, "regions")

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        if missing := [name for name in NEEDED if not hasattr(attr, name)]:
            raise MissingPackageError(
                f"method {self.name!r} needs captum.attr.{missing[0]}, which captum "
                f"{captum.__version__} does not have: pip install 'captum>=0.9'"
            )
        self._processed(task, [to_rgb(image) for image in task.forward.request.images[0]])

    def reader(self, task: AttributionTask) -> list[Tensor]:
        """Segments (H, W) of every image."""
        self.check(task)
        images = task.forward.request.images[0]
        return [segments(image, self.regions, f"method {self.name!r}") for image in images]

    def word(self, task: AttributionTask, reader: list[Tensor], target: Target) -> WordMaps:
        maps = [torch.zeros(shape) for shape in task.shapes]
        for index, regions in enumerate(reader):
            heights = self.values(task, target, index, regions)[regions].double()
            for place, grid in enumerate(task.forward.request.layout.grids):
                if grid.image == index:
                    fitted = grid.resized((regions.shape[0], regions.shape[1]))
                    rows, columns = map(overlaps, (fitted.y_edges, fitted.x_edges), regions.shape)
                    area = (rows.sum(1)[:, None] * columns.sum(1)).clamp_min(1e-9)
                    maps[place] = (rows @ heights @ columns.T / area).float()
        return tuple(maps), None

    def values(self, task: AttributionTask, target: Target, index: int, regions: Tensor) -> Tensor:
        """Captum's attribution (n,) to the regions of one image."""
        images = [to_rgb(image) for image in task.forward.request.images[0]]
        own, model = images[index], StandIn(task, target)
        mean = np.asarray(own).reshape(-1, 3).mean(0).round().astype(int)

        def processor(image: Image.Image) -> dict[str, Tensor]:
            shown = [image if i == index else other for i, other in enumerate(images)]
            return model.inputs(self._processed(task, shown))

        given = attr.ImageMaskInput(
            image=own, mask=regions, baseline=tuple(mean.tolist()), processor_fn=processor
        )
        wrapped = attr.LLMAttribution(attr.FeatureAblation(model), Numbers())
        ids = torch.tensor(target.token_ids, device=model.device)
        with torch.no_grad():
            found = attributed(
                wrapped, given, target=ids, use_cached_outputs=False, forward_in_tokens=False
            )
        values: Tensor = found.seq_attr.detach().cpu()
        return values

    def _processed(self, task: AttributionTask, images: list[Image.Image]) -> Tensor:
        """The pixel tensor (1, …) of other images; MethodError where the layout is another."""
        request = task.forward.request
        again = task.forward.adapter.prepare_again(request, images)
        if again.pixels.shape != request.pixels.shape or again.layout.shapes != task.shapes:
            raise MethodError(
                f"{task.forward.adapter.family} lays out the same images as "
                f"{tuple(again.pixels.shape)} when they are prepared again, not as "
                f"{tuple(request.pixels.shape)}: method {self.name!r} cannot mask them; choose one "
                "that masks pixels, such as 'feature_ablation'"
            )
        return again.pixels
