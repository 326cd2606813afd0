"""Real photographs end to end: reader, run-length masks, answer, maps, metrics, store, shards."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation import made

from captum_dcam.data import dataset
from captum_dcam.evaluation import Plan, Store, Variant, evaluate
from captum_dcam.metrics import localization, oracle_map

PHOTOGRAPHS = Path(__file__).parents[3] / "shared/data/coco_cc_by"
pytestmark = pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs are not here")


class Renamed:
    """The photographs, their two largest categories called by words that the tiny model knows."""

    def __init__(self, data):
        self.data, self.ids = data, data.ids[:6]

    def describe(self):
        return self.data.describe()

    def sample(self, image_id):
        sample = self.data.sample(image_id)
        known = sorted(sample.objects, key=lambda o: -int(o.mask().sum()))
        called = zip(known, ("circle", "star"), strict=False)
        objects = tuple(replace(o, names=(*o.names, name)) for o, name in called)
        return replace(sample, objects=objects, captions=["a circle and a star ."])


@pytest.fixture(scope="module")
def photographs():
    return Renamed(dataset("coco", PHOTOGRAPHS, split="val2017"))


@pytest.mark.slow
def test_photographs_end_to_end(tmp_path, photographs):
    plan = Plan(
        (Variant("cam", "diffusion_cam", {"refined": False}), "oracle", "random"),
        dataset={"name": "coco", "split": "val2017"},
        prompt="describe the image .",
        answer="caption",
        words=("object", "function"),
        metrics=("localization", "plausibility"),
        generation={"gen_length": 4},
    )
    for shard in ((0, 2), (1, 2)):
        summary = evaluate(plan, tmp_path, adapter=made.adapter(), data=photographs, shard=shard)
    assert summary.merged is not None and summary.failed == 0
    records = list(Store.read(tmp_path).records())
    assert [r["id"] for r in records] == list(photographs.ids) and len(records) == 6
    means = {name: [] for name in ("cam", "oracle", "random")}
    for record in records:
        masks = photographs.data.sample(record["id"]).masks()
        for n, word in enumerate(record["words"]):
            if word["kind"] != "object":
                continue
            mask = torch.from_numpy(masks[word["objects"][0]])
            height, width = mask.shape
            assert word["area"] == pytest.approx(float(mask.float().mean()), rel=1e-5)
            pixels = torch.nn.functional.interpolate(
                oracle_map(mask, (8, 8))[None, None], (height, width), mode="bilinear"
            )[0, 0]
            expected = float(localization(pixels, mask).f3)
            found = {v: own["scores"]["f3"][n] for v, own in record["variants"].items()}
            assert found["oracle"] == pytest.approx(expected, abs=1e-3)
            for name, own in means.items():
                own.append(found[name])
    assert len(means["cam"]) > 6 and sum(means["oracle"]) > 2 * sum(means["random"])
