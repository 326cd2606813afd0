"""Captum's LLMAttribution against Captum called by hand, and against painted images."""

import numpy as np
import pytest
import tiny
import torch
from captum import attr
from PIL import Image

from captum_dcam.errors import MethodError, MissingPackageError
from captum_dcam.methods import AttributionTask, metered, method
from captum_dcam.methods.superpixels import segments
from captum_dcam.model.words import Target


def task_of(forward, *positions):
    ids = tuple(tiny.pair(forward, p)[1] for p in positions)
    return AttributionTask(forward, (Target("", positions, ids),))


def log_probability(forward, pixels, positions):
    total = 0.0
    for position in positions:
        token = tiny.pair(forward, position)
        with torch.no_grad():
            logits = forward(pixels, *forward.arguments(token))[0, position]
        total += float(logits.log_softmax(-1)[token[1]])
    return total


class Answer(torch.nn.Module):
    """A Hugging Face model of one prompt token whose logits are those of the word's places."""

    device = torch.device("cpu")

    def __init__(self, forward, positions):
        super().__init__()
        self.denoising, self.positions = [forward], positions

    def forward(self, input_ids, attention_mask, pixels):
        forward = self.denoising[0]
        rows = [
            forward(pixels, *forward.arguments(tiny.pair(forward, p)))[:, p] for p in self.positions
        ]
        return type("Output", (), {"logits": torch.stack([*rows, rows[-1]], 1)})()


@pytest.mark.parametrize("positions", [(2,), (1, 6)])
def test_equals_captum_called_by_hand(cache, positions):
    forward = tiny.bound(cache)
    (image,) = forward.request.images[0]
    regions = segments(image, 5, "")
    mean = np.asarray(image).reshape(-1, 3).mean(0).round().astype(int)
    by_hand = attr.LLMAttribution(
        attr.FeatureAblation(Answer(forward, positions)), tiny.tokenizer()
    ).attribute(
        attr.ImageMaskInput(
            image=image,
            mask=regions,
            baseline=tuple(mean.tolist()),
            processor_fn=lambda shown: {
                "input_ids": torch.zeros(1, 1, dtype=torch.long),
                "pixels": forward.adapter.prepare([[shown]], [tiny.PROMPT]).pixels,
            },
        ),
        torch.tensor([tiny.pair(forward, p)[1] for p in positions]),
        use_cached_outputs=False,
        forward_in_tokens=False,
    )
    made = method("llm_attribution", regions=5)
    task = task_of(forward, *positions)
    with metered(forward) as cost:
        found = made.values(task, task.targets[0], 0, regions)
    torch.testing.assert_close(found, by_hand.seq_attr.detach(), rtol=1e-4, atol=1e-5)
    assert cost.forwards == (1 + len(found)) * len(positions)

    # and Captum's is the fall of the log-probability on the painted image
    whole, falls = log_probability(forward, forward.request.pixels, positions), []
    for region in range(len(found)):
        painted = np.array(image)
        painted[(regions == region).numpy()] = mean
        shown = forward.adapter.prepare([[Image.fromarray(painted)]], [tiny.PROMPT])
        falls.append(whole - log_probability(forward, shown.pixels, positions))
    torch.testing.assert_close(found, torch.tensor(falls), rtol=1e-3, atol=1e-4)

    # every token has the mean over its box: 7.5 x 10 pixels
    maps = made.attribute(task).maps[0][0]
    boxes = found[regions].repeat_interleave(2, 0).unflatten(0, (8, 15)).unflatten(2, (8, 10))
    torch.testing.assert_close(maps, boxes.mean((1, 3)), rtol=1e-4, atol=1e-5)


def test_a_captum_without_it_is_refused_by_name(monkeypatch):
    monkeypatch.delattr(attr, "ImageMaskInput")
    task = task_of(tiny.bound("prefix"), 2)
    with pytest.raises(MissingPackageError, match=r"captum\.attr\.ImageMaskInput.*captum>=0\.9"):
        method("llm_attribution").check(task)


def test_another_layout_is_refused(monkeypatch):
    forward = tiny.bound("prefix")
    two = tiny.bound("prefix", images=2).request
    monkeypatch.setattr(forward.adapter, "prepare_again", lambda request, images: two)
    with pytest.raises(MethodError, match="lays out the same images as"):
        method("llm_attribution").check(task_of(forward, 2))
    with pytest.raises(ValueError, match="regions is 0"):
        method("llm_attribution", regions=0)
