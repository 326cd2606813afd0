"""A byte or a digit of something saved changes: it is refused, or loads to the same numbers.

500 changes by a fixed seed; ``python benchmarks/damages.py`` makes ten thousand.
"""

from pathlib import Path

import pytest
import tiny
from evaluation import made

import captum_dcam
from captum_dcam.evaluation import evaluate
from captum_dcam.presets import PRESETS, write_preset

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def damages():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield pytest.importorskip("damages")


@pytest.fixture(scope="module")
def saved(damages, tmp_path_factory):
    """One of each kind, small."""
    folder = tmp_path_factory.mktemp("saved")
    adapter, image = tiny.adapter("prefix"), tiny.picture()
    own = {"gen_length": 4}
    captum_dcam.explain(adapter, image, tiny.PROMPT, [0, 3], **own).save(folder / "explanation")
    methods = ["diffusion_cam_base", "attention"]
    found = captum_dcam.compare(adapter, image, tiny.PROMPT, [0, 3], methods, **own)
    found.save(folder / "comparison")
    chosen = PRESETS["default"]
    file = folder / "preset.json"
    write_preset(file, "default", chosen, chosen.refinements().stages, {"seed": 0})
    plan, stop = made.plan(), iter((False, False, True)).__next__
    evaluate(plan, folder / "store", adapter=adapter, data=made.Pictures(2))
    evaluate(plan, folder / "stopped", adapter=adapter, data=made.Pictures(3), stop=stop)
    places = {name: folder / name for name in damages.LOADERS} | {"preset": file}
    return [damages.Saved(n, places[n], load) for n, load in damages.LOADERS.items()]


def test_no_damage_changes_a_number_unseen(damages, saved):
    found = damages.damages(saved, 500, seed=14)
    assert [one for one in found if one.outcome == damages.UNSEEN] == []
    assert {one.saved for one in found} == damages.LOADERS.keys()
    assert {one.kind for one in found} == set(damages.KINDS)
    assert sum(one.outcome == damages.REFUSED for one in found) > 450
    assert damages.table(found).count("\n") == 1 + 2 * len(saved)


def test_what_is_not_seen_is_reported(damages, saved):
    """A loader that looks at nothing."""
    blind = [damages.Saved("blind", one.place, lambda _: 0) for one in saved[:1]]
    assert {one.outcome for one in damages.damages(blind, 20, seed=0)} == {damages.HARMLESS}
    sharp = [
        damages.Saved("sharp", one.place, lambda p: sorted(f.read_bytes() for f in p.iterdir()))
        for one in saved[:1]
    ]
    assert {one.outcome for one in damages.damages(sharp, 20, seed=0)} == {damages.UNSEEN}
