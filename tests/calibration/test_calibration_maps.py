"""Maps of a model that thresholds are fitted on."""

import pytest
import tiny
import torch
from calibration.made_maps import PAPER, SHORT, Pictures, gathered

from captum_dcam.calibration import Chain, compare, maps
from captum_dcam.errors import CalibrationError
from captum_dcam.evaluation import Plan, Store, Variant, evaluate
from captum_dcam.refine import DACG_BRANCHES


def test_scores_are_those_of_an_evaluation(adapter, tmp_path):
    own = {"generation": {**SHORT, "temperature": 0.3}, "seed": 3, "prompt": "what is there ?"}
    found = gathered(layer=2, **own)
    variant = Variant("all", "diffusion_cam", {"refined": False}, 2, refinements=PAPER)
    plan = Plan((variant,), words=("object",), metrics=("localization",), **own)
    evaluate(plan, tmp_path, adapter=adapter, data=Pictures(4))
    expected, routes, images, objects = [], [], [], set()
    for record in Store.read(tmp_path).records():
        images += [record["index"]] * len(record["words"])
        objects |= {len(word["objects"]) for word in record["words"]}
        scores = record["variants"]["all"]["scores"]
        expected += scores["f3"]
        routes += scores["dacg_route"]
    chain = Chain(found)
    assert len(expected) == len(found) >= 12 and max(expected) > 0.05
    assert found.images.tolist() == images and objects == {1, 2}
    assert chain.scores(PAPER)[:, 3].tolist() == pytest.approx(expected, abs=1e-5)
    assert chain.routing(PAPER) == {b: routes.count(b) / len(routes) for b in DACG_BRANCHES}
    assert any(float(b.contexts[0].repeated_maps.max()) > 0 for b in found.batches)


def test_words_of_pictures_of_several_sizes():
    class Sizes(Pictures):
        def sample(self, image_id):
            sample = super().sample(image_id)
            size = (80, 60) if image_id % 2 else (60, 80)
            sample.image = lambda: tiny.picture(image_id, size)
            for thing in sample.objects:
                thing.size = size[::-1]
            return sample

    found = gathered(data=Sizes)
    assert len(found.batches) == 2
    alone = [gathered(1, data=Sizes, first=i) for i in (0, 2, 1, 3)]
    rows = torch.cat([Chain(c).scores(PAPER) for c in alone])
    torch.testing.assert_close(Chain(found).scores(PAPER), rows, rtol=0, atol=1e-6)
    gain, routing = compare((found, PAPER), (found, PAPER))
    assert gain.gain == gain.low == gain.high == 0 and routing[0] == routing[1]


def test_images_that_cannot_be_used_are_named(monkeypatch):
    class Damaged(Pictures):
        def sample(self, image_id):
            if image_id == 2:
                raise OSError("image 2 is damaged")
            return super().sample(image_id)

    class Strange(Pictures):
        names = ("zebra",)

    with pytest.raises(CalibrationError, match="image 2: image 2 is damaged"):
        gathered(data=Damaged)
    with pytest.raises(CalibrationError, match="4 images and no word that names an object"):
        gathered(data=Strange)
    monkeypatch.setattr(maps, "MOST_BYTES", 1000)
    with pytest.raises(CalibrationError, match="smaller --limit"):
        gathered()
