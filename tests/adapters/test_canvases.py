"""The record of decoders that work on ids, against canvases written by hand."""

import pytest
import torch

from captum_dcam.adapters.common.recording import CanvasLog

MASK = 9


def logits(position_tokens):
    """(1, 3, 10) with 2.0 at the given token of a position."""
    out = torch.zeros(1, 3, 10)
    for position, token in position_tokens.items():
        out[0, position, token] = 2.0
    return out


def test_commits_are_the_last_masked_steps_and_masks_that_stay_have_no_confidence():
    log = CanvasLog(MASK)
    canvas = torch.tensor([[MASK, MASK, MASK]])
    log.see(canvas)
    log.read(logits({1: 4}))
    canvas[0, 1] = 4  # in place, as decoders do
    log.see(canvas)
    log.read(logits({0: MASK}))  # position 0 is filled with the mask itself: it stays open
    log.see(canvas)
    log.read(logits({0: 7}))
    canvas[0, 0] = 7
    log.finish(canvas)
    assert log.states.tolist() == [[[MASK] * 3], [[MASK, 4, MASK]], [[MASK, 4, MASK]]]
    assert log.tokens.tolist() == [[7, 4, MASK]]
    assert log.commit_step.tolist() == [[2, 0, 2]]
    sure = float(logits({1: 4})[0, 1].softmax(-1)[4])
    assert log.confidence[0].tolist() == pytest.approx([sure, sure, 0.0])


def test_examples_are_recorded_apart():
    log = CanvasLog(MASK)
    log.see(torch.full((2, 1), MASK))
    log.read(torch.zeros(2, 1, 10))
    log.see(torch.tensor([[3], [MASK]]))
    log.read(torch.zeros(2, 1, 10))
    log.finish(torch.tensor([[3], [5]]))
    assert log.commit_step.tolist() == [[0], [1]]
    assert log.confidence.flatten().tolist() == pytest.approx([0.1, 0.1])
