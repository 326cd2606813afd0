"""Affinity and the block: planted optima with masks, insertion without."""

from itertools import product

import pytest
import tiny
import torch
from calibration.made_maps import Pictures, clusters, f3

from captum_dcam.calibration import (
    PARAMETERS,
    Chain,
    collect_answers,
    fit_blocks,
    fit_stages,
    values_of,
    with_values,
)
from captum_dcam.errors import CalibrationError, InputError
from captum_dcam.faithfulness import FRACTIONS
from captum_dcam.methods.edited import pixel_fill
from captum_dcam.presets import preset
from captum_dcam.refine import Affinity, MinMax, paper_refinements

START = (Affinity(),)
BRIEF = {"gen_length": 3}


def test_values_of_affinity_and_what_a_fit_without_masks_takes():
    stages = tuple(preset("default").refinements())
    whole = values_of(stages)
    assert whole == {"affinity.power": 6.0, "affinity.square": 2.0, "affinity.center": True}
    few = values_of((MinMax(), *stages), labels=False)
    assert few == {"affinity.power": 6.0, "affinity.center": True}
    changed = with_values(stages, {**few, "affinity.center": False})
    assert changed == (Affinity(center=False),)
    with pytest.raises(CalibrationError, match=r"no affinity .*min_max, akd.*--labels"):
        values_of(tuple(paper_refinements()), labels=False)
    power, center = PARAMETERS["affinity.power"], PARAMETERS["affinity.center"]
    assert power.ends(16.0) and power.ends(12.0, labels=False) and not power.ends(12.0)
    assert not center.ends(True) and not center.ends(False)


def test_the_planted_setting_is_found():
    """Of every setting of the grid, by the refinement alone."""
    found = clusters(12)
    fitted = fit_stages(found, START, folds=2)
    names = list(values_of(START))
    grid = product(*(PARAMETERS[name].tried for name in names))
    every = {v: f3(found, with_values(START, dict(zip(names, v, strict=True)))) for v in grid}
    best = max(every, key=every.get)
    assert tuple(fitted.after.values()) == best != tuple(fitted.before.values())
    assert fitted.own.gain > 0.05 and fitted.held.low > 0
    assert fitted.passes == 0 and fitted.layer == 0


def test_the_block_whose_states_tell_objects_apart_wins():
    """In every part too: the cross-validated gain is that of a search over blocks."""
    blocks = [clusters(12, mixed=12, layer=2), clusters(12, layer=1), clusters(12, 12, layer=3)]
    found = fit_blocks(iter(blocks), START, folds=3)
    assert found.layer == 1 and list(found.blocks) == [2, 1, 3]
    alone = fit_stages(blocks[1], START, folds=3)
    assert found.after == alone.after and found.blocks[1] == max(found.blocks.values())
    assert found.own.before["f3"] == pytest.approx(f3(blocks[0], START), abs=1e-6)
    assert found.own.after["f3"] == pytest.approx(f3(blocks[1], found.fitted), abs=1e-6)
    assert found.held.after == alone.held.after
    first = fit_blocks([blocks[0], blocks[2]], START, folds=3)
    assert first.layer == 2, "the same maps elsewhere are no gain"


def test_blocks_of_other_words_are_refused():
    with pytest.raises(CalibrationError, match=r"block 1 has 28 words of other images than bl"):
        fit_blocks([clusters(12), clusters(14, layer=1)], START)
    with pytest.raises(CalibrationError, match="no block is given"):
        fit_blocks([], START)


@pytest.fixture(scope="module")
def answers():
    """The words of four images, without masks."""
    given = {"words": "all", "generation": BRIEF}
    adapter = tiny.adapter("prefix")
    return collect_answers(adapter, Pictures(4), range(4), preset("default"), **given)


def test_the_objective_is_insertion_by_hand(answers):
    """Petsiuk et al., RISE: reveal tokens in the map's order, read the word, sum trapezoids."""
    stages = tuple(preset("default").refinements())
    chain = Chain(answers)
    batch, refined = answers.batches[1], chain.refined(stages)[1]
    forward, target = batch.forward, batch.targets[0]
    values = torch.cat([m[0].flatten() for m in refined]).double()
    order = values.argsort(descending=True)
    assert len(values.unique()) == len(values), "no ties, whose order would be drawn"
    areas = []
    counts = [round(share * len(values)) for share in FRACTIONS]
    for count in counts:
        hidden = torch.ones(1, len(values), dtype=torch.bool)
        hidden[0, order[:count]] = False
        pixels = pixel_fill(forward, "mean")(hidden).to(forward.request.pixels)
        other = forward.again(request=forward.request.rows([0], pixels))
        steps = [forward.trajectory.step_of(0, p, "commit") for p in target.positions]
        with torch.no_grad():
            logits = other.replay(torch.zeros(len(steps), dtype=torch.long), torch.tensor(steps))
        rows = torch.arange(len(steps))
        chosen = logits[rows, list(target.positions)].double().log_softmax(-1)
        areas.append(float(chosen[rows, list(target.token_ids)].mean().exp()))
    expected = torch.trapezoid(
        torch.tensor(areas, dtype=torch.float64),
        torch.tensor(counts, dtype=torch.float64) / len(values),
    )
    at = len(answers.batches[0].targets)
    assert float(chain.scores(stages)[at, 0]) == pytest.approx(float(expected), abs=1e-6)
    assert float(chain.objective(stages)[at]) == float(chain.scores(stages)[at, 0])


def test_insertion_sees_order_alone_and_no_setting_costs_twice(answers):
    chain = Chain(answers)
    stages = (Affinity(square=2.0),)
    first, passes = chain.scores(stages), chain.passes
    assert passes > 0 and torch.equal(chain.scores(stages), first) and chain.passes == passes
    torch.testing.assert_close(chain.scores((Affinity(square=1.0),)), first, rtol=0, atol=1e-9)


def test_a_fit_without_masks(answers):
    """No setting of the grid has a higher insertion; its gain is cross-validated."""
    fitted = fit_stages(answers, tuple(preset("default").refinements()))
    names = list(fitted.before)
    chain = Chain(answers)
    for name in names:
        for value in PARAMETERS[name].few:
            stages = with_values(fitted.start, {**fitted.after, name: value})
            assert float(chain.objective(stages).mean()) < fitted.own.after["insertion"] + 1e-4
    assert fitted.after.keys() == {"affinity.power", "affinity.center"}
    assert fitted.own.gain >= 0 and fitted.images == fitted.held.images == 4
    assert fitted.evaluations <= 10


def test_words_without_masks_that_cannot_be_used(answers):
    adapter = tiny.adapter("prefix")
    with pytest.raises(InputError, match="words is 'verbs'"):
        collect_answers(adapter, Pictures(1), [0], preset("default"), words="verbs")

    class Silent(Pictures):
        def sample(self, image_id):
            sample = super().sample(image_id)
            sample.prompt = None
            return sample

    with pytest.raises(CalibrationError, match=r"image 0: the data set has no prompt .*--prompt"):
        collect_answers(adapter, Silent(1), [0], preset("default"))
    given = {"words": "all", "generation": BRIEF}
    one = collect_answers(adapter, Pictures(1), [0], preset("default"), **given)
    with pytest.raises(CalibrationError, match=r"1 images with a scored word .* at least 4 and 8"):
        fit_stages(one, (Affinity(),))
    with pytest.raises(CalibrationError, match="no affinity"):
        fit_stages(answers, tuple(paper_refinements()))
