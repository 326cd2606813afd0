"""One evaluation of everything at once, and every number that it stores once more by hand.

Two blocks, three scores, refined variants beside bare ones that share a run, a budget that ends
early; pictures whose answers repeat words, name several objects at once, by phrases, and one whose
mask is empty. Here every word is explained alone, at the variant's own block and score, and all
that follows is plain numpy. What is exchanged, dropped or taken from a neighbour shows in a number.
"""

import functools
import hashlib
import json

import numpy as np
import pytest
import tiny
import torch
from evaluation import by_hand, made
from scipy import stats

from captum_dcam import faithfulness
from captum_dcam.evaluation import Plan, Store, Variant, evaluate, rows
from captum_dcam.evaluation.frame import Frame
from captum_dcam.evaluation.tables import table
from captum_dcam.methods import AttributionTask, method
from captum_dcam.methods.edited import with_pixels
from captum_dcam.metrics import oracle_map
from captum_dcam.model.answers import force
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.words import Target
from captum_dcam.refine import DACG_BRANCHES, RefineContext, dacg_branch, refinement

SIZE, SEED = (60, 80), 5
#: object → top, left, bottom, right of its mask; the circles overlap, the heart has no pixel
BOXES = {
    "red circle": (5, 5, 35, 40),
    "blue circle": (20, 25, 50, 70),
    "star": (40, 5, 58, 30),
    "moon": (2, 50, 18, 75),
    "heart": (0, 0, 0, 0),
}
BOTH = ("red circle", "blue circle")
#: answers, and of each the words that are measured: position, kind, objects, words of the same name
ANSWERS = (
    (
        "a red circle , two circles and a star in the image . <eos>",
        (
            (0, "function", (), ()),
            (1, "modifier", ("red circle",), (1, 2)),
            (2, "object", ("red circle",), (1, 2)),
            (5, "object", BOTH, (5,)),
            (6, "function", (), ()),
            (7, "function", (), ()),
            (8, "object", ("star",), (8,)),
            (10, "function", (), ()),
            (11, "noun", (), ()),
        ),
    ),
    (
        "the star and the heart .",
        (
            (0, "function", (), ()),
            (1, "object", ("star",), (1,)),
            (2, "function", (), ()),
            (3, "function", (), ()),
            (4, "object", ("heart",), (4,)),
        ),
    ),
    (
        "a moon above a blue circle and the moon .",
        (
            (0, "function", (), ()),
            (1, "object", ("moon",), (1,)),
            (3, "function", (), ()),
            (4, "modifier", ("blue circle",), (4, 5)),
            (5, "object", ("blue circle",), (4, 5)),
            (6, "function", (), ()),
            (7, "function", (), ()),
            (8, "object", ("moon",), (8,)),
        ),
    ),
)
#: positions of the function words that an answer holds twice
REPEATED = ((0, 7), (0, 3), (0, 3))

CAM = {"refined": False, "score": "task"}
STAGES = ("min_max", "dacg", "sicd")
#: what the methods are, at which block and score they read, and what is done with their maps
VARIANTS = (
    Variant("bare", "diffusion_cam", CAM, 1),
    Variant("refined", "diffusion_cam", CAM, 1, refinements=STAGES),
    Variant("deeper", "diffusion_cam", CAM, 2, "final", ("min_max", "akd")),
    Variant("other", "diffusion_cam", CAM, 2, "teacher", STAGES),
    Variant("text", "tam", layer=2),
    Variant("cut", "layer_gradient_x_activation", layer=2, refinements=STAGES, passes=5),
    Variant("oracle"),
)
#: words whose maps the budget of "cut" pays for, a pass each
PAID = 5


class Thing:
    def __init__(self, name):
        self.name, kind = name, name.split()[-1]
        self.names = tuple(dict.fromkeys((name, kind)))

    def mask(self):
        found = np.zeros(SIZE, dtype=bool)
        top, left, bottom, right = BOXES[self.name]
        found[top:bottom, left:right] = True
        return found


class Pictures(made.Pictures):
    def __init__(self, images):
        self.ids = images

    def sample(self, image):
        sample = made.Sample(image)
        return type("Sample", (), {
            "prompt": sample.prompt, "image": lambda _: sample.image(), "extra": {},
            "captions": [ANSWERS[image][0]], "objects": [Thing(name) for name in BOXES],
        })()  # fmt: skip


def plan(variants, metrics, **changes):
    words = ("object", "modifier", "noun", "function")
    return Plan(variants, answer="caption", metrics=metrics, words=words, seed=SEED, **changes)


def evaluated(folder, given, images):
    """Records of these pictures, whose places in the data set are not their names."""
    evaluate(given, folder, adapter=made.adapter(), data=Pictures(images), shard=(0, 1))
    return list(Store.read(folder).records())


# -- maps, one by one ------------------------------------------------------------------------------


@functools.cache
def forward_of(image, layer):
    """The answer of a picture, bound and tapped at a block."""
    adapter = made.adapter()
    forward = DenoisingForward(adapter, layer)
    force(forward, ANSWERS[image][0], adapter.prepare([[tiny.picture(image)]], [tiny.PROMPT]))
    return forward


def target_at(image, position):
    tokens = tiny.tokenizer()(ANSWERS[image][0])["input_ids"]
    return Target(ANSWERS[image][0].split()[position], (position,), (tokens[position],))


def words_of(image):
    return [target_at(image, position) for position, *_ in ANSWERS[image][1]]


def attribution(variant, forward, targets):
    task = AttributionTask(forward, tuple(targets), variant.score)
    return method(variant.method, **variant.settings).attribute(task)


@functools.cache
def alone(image, name, position):
    """Signed map of one word by a variant, and the relevance of text."""
    variant = next(v for v in VARIANTS if v.name == name)
    found = attribution(variant, forward_of(image, variant.layer), [target_at(image, position)])
    return found.maps[0][0], None if found.text is None else found.text[0]


def complete(image, variant):
    """Which words of an answer have a map by a variant."""
    words = ANSWERS[image][1]
    if variant.name == "oracle":
        return [kind == "object" for _, kind, *_ in words]
    return [variant.passes is None or n < PAID for n in range(len(words))]


def context(image, variant):
    """What SICD subtracts: the mean of the repeated words that have a map, from 0 to 1."""
    positions = [p for p, *_ in ANSWERS[image][1]]
    known = [p for p, own in zip(positions, complete(image, variant), strict=True) if own]
    maps = [alone(image, variant.name, p)[0].relu() for p in REPEATED[image] if p in known]
    mean = torch.from_numpy(by_hand.stretched(torch.stack(maps).mean(0).numpy()))
    return RefineContext(len(ANSWERS[image][0].split()), SIZE, mean)


def refined(image, variant, maps):
    """Positive maps after a variant's refinements, and the branch of DACG that each took."""
    maps, branches = maps.relu(), None
    for record in variant.refinements:
        if record["name"] == "dacg":
            branches = [DACG_BRANCHES[b] for b in dacg_branch(maps).tolist()]
        maps = refinement(**record)(maps, context(image, variant))
    return maps, branches


def masks_of(names):
    return [Thing(name).mask() for name in names]


@functools.cache
def maps_of(image, name):
    """(signed, refined) map of every word, None where the variant has none; branches of DACG."""
    variant = next(v for v in VARIANTS if v.name == name)
    words = list(zip(ANSWERS[image][1], complete(image, variant), strict=True))
    if variant.name == "oracle":
        union = [np.any(masks_of(w[2]), axis=0) if own else None for w, own in words]
        raw = [None if u is None else oracle_map(torch.from_numpy(u), (8, 8)) for u in union]
    else:
        raw = [alone(image, name, w[0])[0] if own else None for w, own in words]
    shown, branches = refined(image, variant, torch.stack([r for r in raw if r is not None]))
    found, taken = iter(zip(shown, branches or [None] * len(shown), strict=True)), []
    pairs = []
    for one in raw:
        shown, branch = (None, None) if one is None else next(found)
        taken.append(branch)
        pairs.append(None if one is None else (one.double().numpy(), shown.double().numpy()))
    return pairs, taken if branches else None


# -- numbers of a map ------------------------------------------------------------------------------


def drawn_for(image):
    """Where metrics draw from."""
    text = json.dumps([SEED, image, "metrics"], separators=(",", ":"))
    seed = int(hashlib.sha256(text.encode()).hexdigest()[:14], 16)
    return torch.Generator().manual_seed(seed)


def scored(image, variant):
    """Words with a map and a mask that holds a pixel."""
    words = zip(ANSWERS[image][1], complete(image, variant), strict=True)
    return [
        n for n, ((_, kind, objects, _), own) in enumerate(words)
        if own and kind == "object" and objects != ("heart",)
    ]  # fmt: skip


@functools.cache
def expected(image, name):
    """Every column that is stored of a variant, and the values of the image."""
    variant = next(v for v in VARIANTS if v.name == name)
    pairs, branches = maps_of(image, name)
    words, count = ANSWERS[image][1], len(pairs)
    there = [n for n in range(count) if pairs[n] is not None]
    pixels = {n: by_hand.enlarged(pairs[n][1], SIZE) for n in there}
    columns = {}

    def note(n, **values):
        for key, value in values.items():
            columns.setdefault(key, [None] * count)[n] = value

    objects = scored(image, variant)
    for n in there:
        raw, shown = pairs[n]
        own = by_hand.sparseness(shown), by_hand.statistics(raw)
        note(n, **own[0], **own[1], features=by_hand.features(shown))
    for n in objects:
        masks = masks_of(words[n][2])
        note(n, **by_hand.localization(pixels[n], masks), **by_hand.pointing(pixels[n], masks, 3))
        same = [m for m in there if words[m][0] in words[n][3]]
        regions = [by_hand.otsu(pixels[m])[1] for m in same]
        note(n, phrase_iou=max(by_hand.iou(r, m) for r in regions for m in masks))
    image_values = plausibility(image, name, there, pixels, columns, note)
    generator = drawn_for(image)
    if len({words[n][2] for n in objects}) > 1:
        for n in objects:
            others = [m for m in objects if words[m][2] != words[n][2]]
            other = others[int(torch.randint(len(others), (), generator=generator))]
            found = by_hand.localization(pixels[other], masks_of(words[n][2]))
            note(n, placebo_obj_iou=found["obj_iou"], placebo_f3=found["f3"])
    if branches:
        columns["dacg_route"] = branches
    return columns, image_values


def plausibility(image, name, there, pixels, columns, note):
    """Thresholds of nouns, and the shares of function words below them, on every scale."""
    variant = next(v for v in VARIANTS if v.name == name)
    words, values = ANSWERS[image][1], {}
    scales = {"image": pixels, "map": {n: by_hand.stretched(p) for n, p in pixels.items()}}
    if variant.method == "tam":
        scales["joint"] = {}
        for n, own in pixels.items():
            text = alone(image, name, words[n][0])[1].double().relu().numpy()
            pool = np.concatenate([own.ravel(), text[~np.isnan(text)]])
            scales["joint"][n] = (own - pool.min()) / (pool.max() - pool.min())
    nouns = [n for n in there if words[n][1] in ("object", "noun")]
    for n in nouns:
        note(n, otsu=by_hand.otsu(pixels[n])[0])
    for scale, maps in scales.items():
        limit = np.mean([by_hand.otsu(maps[n])[0] for n in nouns])
        values[f"noun_threshold_{scale}"] = limit
        columns[f"func_iou_{scale}"] = [None] * len(words)
        for n in there:
            if words[n][1] == "function":
                note(n, **{f"func_iou_{scale}": (maps[n] < limit).mean()})
    return values


def assert_same(found, wanted, what):
    """Equal to rounding; None where there is nothing."""
    if isinstance(wanted, list):
        assert len(found) == len(wanted), what
        for n, pair in enumerate(zip(found, wanted, strict=True)):
            assert_same(*pair, (*what, n))
    elif wanted is None or isinstance(wanted, str):
        assert found == wanted, what
    else:
        assert found == pytest.approx(float(wanted), rel=2e-4, abs=2e-6), what


# -- the tests -------------------------------------------------------------------------------------

METRICS = (
    "localization",
    "plausibility",
    {"name": "pointing", "tolerance": 3},
    "sparseness",
    "features",
    "statistics",
    "placebo",
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """SICD takes most of a repeated word's map away: what is left shows other rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("plumbing")
    evaluated(where, plan(VARIANTS, METRICS), (0, 1, 2))
    return where


@pytest.fixture(scope="module")
def records(folder):
    return list(Store.read(folder).records())


def test_words_are_stored_with_their_objects_and_the_area_of_all_of_them(records):
    for image, record in enumerate(records):
        text, words = ANSWERS[image]
        assert record["answer"] == text.removesuffix(" <eos>")
        assert record["length"] == len(record["answer"].split())
        assert [(w["positions"], w["kind"], tuple(w["objects"])) for w in record["words"]] == [
            ([position], kind, objects) for position, kind, objects, _ in words
        ]
        trajectory = forward_of(image, 1).trajectory
        for found, (position, _, objects, same) in zip(record["words"], words, strict=True):
            target = target_at(image, position)
            assert (found["text"], found["tokens"]) == (target.text, list(target.token_ids))
            area = np.any(masks_of(objects), axis=0).mean() if objects else None
            assert found["area"] == (area if area is None else pytest.approx(area, rel=1e-6))
            assert found["commit"] == [position]
            confidence = float(trajectory.confidence[0, position])
            assert found["confidence"] == [pytest.approx(confidence, rel=1e-5)]
            phrase = [w["positions"][0] for w in record["words"] if w["phrase"] == found["phrase"]]
            assert tuple(phrase) == same or not same


@pytest.mark.parametrize("name", [v.name for v in VARIANTS])
def test_every_number_is_that_of_maps_made_one_by_one(records, name):
    variant = next(v for v in VARIANTS if v.name == name)
    for image, record in enumerate(records):
        found, whole = record["variants"][name], complete(image, variant)
        assert found.get("complete", [True] * len(whole)) == whole
        partial = variant.passes is not None and not all(whole)
        assert found["status"] == ("partial" if partial else "done")
        columns, values = expected(image, name)
        assert set(found["scores"]) == set(columns) and set(found["image"]) == set(values)
        for key, column in columns.items():
            assert_same(found["scores"][key], column, (name, image, key))
        for key, value in values.items():
            assert_same(found["image"][key], value, (name, image, key))


def test_rows_are_the_words_that_have_a_map(records):
    found = [(r["variant"], r["index"], r["positions"][0], r["f3"]) for r in rows(records)]
    wanted = [
        (v.name, image, word[0], expected(image, v.name)[0]["f3"][n])
        for image in range(3) for v in sorted(VARIANTS, key=lambda v: v.name)
        for n, (word, own) in enumerate(zip(ANSWERS[image][1], complete(image, v), strict=True))
        if own
    ]  # fmt: skip
    assert [row[:3] for row in found] == [row[:3] for row in wanted]
    assert_same([row[3] for row in found], [row[3] for row in wanted], ("f3",))


def of_words(name, metric):
    """(image, word) → score of every word that has one, by hand."""
    return {
        (image, n): value
        for image in range(3)
        for n, value in enumerate(expected(image, name)[0].get(metric, ()))
        if value is not None
    }


def resampled(words):
    """Mean and interval of scores, images drawn with all their words."""
    count = len({image for image, _ in words})
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(count, (1000, count), generator=generator).tolist()
    return by_hand.interval([(image, s) for (image, _), s in words.items()], draws)


@pytest.fixture(scope="module")
def means(folder):
    return table("summary", folder)


@pytest.mark.parametrize("metric", ["f3", "gini", "func_iou_image", "phrase_iou", "map_std"])
def test_intervals_of_a_table_draw_images_with_all_their_words(means, metric):
    for variant in VARIANTS:
        words = of_words(variant.name, metric)
        cell = means.cell(variant.name, metric)
        if not words:
            assert cell is None
            continue
        assert_same([cell.value, cell.low, cell.high], list(resampled(words)), (variant, metric))


def test_differences_are_of_the_words_that_both_have(folder):
    frame = Frame(folder)
    first, second = of_words("bare", "gini"), of_words("cut", "gini")
    both = {key: first[key] - second[key] for key in first if key in second}
    assert 0 < len(both) < len(first)
    found = frame.values("bare", "gini").minus(frame.values("cut", "gini"))
    assert [*zip(found.images.tolist(), found.words.tolist(), strict=True)] == sorted(both)
    assert_same([float(v) for v in found.mean()], list(resampled(both)), ("difference",))


# -- metrics that run the model again --------------------------------------------------------------

IMAGE, FRACTIONS = 2, (0, 0.25, 1)
PROBES = (
    {"name": "faithfulness", "fractions": FRACTIONS, "curves": True, "controls": 2},
    {"name": "faithfulness", "fractions": FRACTIONS, "where": "tap", "state": "final",
     "controls": 0, "label": "tap"},
    {"name": "infidelity", "samples": 3},
    {"name": "sensitivity", "samples": 1, "radius": 0.1},
    {"name": "randomization", "stages": (1, 3)},
    "answer_shuffle",
)  # fmt: skip
PROBED = ("bare", "refined", "deeper", "other", "cut")


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    variants = [v for v in VARIANTS if v.name in PROBED]
    return evaluated(tmp_path_factory.mktemp("probed"), plan(variants, PROBES), (IMAGE,))[0]


def explain_of(variant):
    def explain(forward, targets):
        raw = attribution(variant, forward, targets).maps
        return (refined(IMAGE, variant, raw[0])[0],) if variant.refinements else raw

    return explain


def probability(forward, pixels, target, state):
    task = AttributionTask(forward, (target,), state)
    with torch.no_grad():
        logits = forward(pixels, *task.arguments(target.positions[0]))
    odds = logits[0, target.positions[0]].double().softmax(-1)
    return float(odds[target.token_ids[0]])


@functools.cache
def without(layer, target, gone, where, state):
    """A word's probability without some image tokens; many curves have the same points."""
    forward, mask = forward_of(IMAGE, layer), torch.tensor(gone).view(8, 8)
    pixels = forward.request.pixels
    if where == "pixels":
        hidden = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
        edited = torch.where(hidden, pixels.mean((-2, -1), keepdim=True), pixels)
        return probability(forward, edited, target, state)

    def erase(features, grid):
        return torch.where(mask, features.mean((-2, -1), keepdim=True), features)

    with forward.edited(erase):
        return probability(forward, pixels, target, state)


def curve(layer, target, places, kind, where, state):
    """A word's probability as image tokens go, or come, in the order of their places."""
    gone = ((places < round(share * 64)) == (kind == "deletion") for share in FRACTIONS)
    return np.array([without(layer, target, tuple(g.tolist()), where, state) for g in gone])


def order_of(values, generator):
    """Place of every image token, the highest first; equal ones in an order that is drawn."""
    shuffle = torch.randperm(64, generator=generator).tolist()
    places = np.empty(64, dtype=int)
    places[sorted(shuffle, key=lambda n: -values[n])] = range(64)
    return places


def area(values):
    return np.trapezoid(values, FRACTIONS)


def curves_by_hand(variant, objects, where, state, controls):
    pairs, out = maps_of(IMAGE, variant.name)[0], {}
    for kind in ("deletion", "insertion"):
        generator = drawn_for(IMAGE)
        orders = [order_of(pairs[n][1].ravel(), generator) for n in objects]
        random = [order_of(np.zeros(64), generator) for _ in range(controls)]
        for n, places in zip(objects, orders, strict=True):
            target = words_of(IMAGE)[n]
            own = curve(variant.layer, target, places, kind, where, state)
            whole, empty = (own[0], own[-1]) if kind == "deletion" else (own[-1], own[0])
            normal = area((own - empty) / (whole - empty)) if whole > empty else None
            found = {"": area(own), "_normalized": normal, "_curve": own.tolist()}
            if controls:
                chance = [curve(variant.layer, target, r, kind, where, state) for r in random]
                sign = 1 if kind == "insertion" else -1
                found["_gain"] = sign * (area(own) - area(np.mean(chance, axis=0)))
            for key, value in found.items():
                out.setdefault(f"{kind}{key}", {})[n] = value
    return out


def correlation(first, second):
    return stats.spearmanr(first.ravel(), second.ravel()).statistic


def probes_by_hand(variant, objects):
    """Columns of the other probes, of the words that are scored."""
    forward, targets = forward_of(IMAGE, variant.layer), [words_of(IMAGE)[n] for n in objects]
    explain, pairs = explain_of(variant), maps_of(IMAGE, variant.name)[0]
    measured = [torch.from_numpy(pairs[n][bool(variant.refinements)]) for n in objects]
    given = torch.stack(measured)
    infidelity = faithfulness.infidelity(
        forward, targets, [given], samples=3, generator=drawn_for(IMAGE)
    )
    pixels, generator = forward.request.pixels.double(), drawn_for(IMAGE)
    noise = 2 * torch.rand(pixels.shape, generator=generator).double() - 1
    noisy = pixels + 0.1 * (pixels.max() - pixels.min()) * noise
    moved = explain(with_pixels(forward, noisy), targets)[0]
    change = (moved - given).flatten(1).norm(dim=1) / given.flatten(1).norm(dim=1)
    shuffled, generator = [], drawn_for(IMAGE)
    for own, target in zip(given, targets, strict=True):
        other = faithfulness.shuffled_answer(forward, target, generator)
        shuffled.append(correlation(own.numpy(), explain(other, [target])[0][0].numpy()))
    found = faithfulness.parameter_randomization(
        forward, targets, explain, drawn_for(IMAGE), stages=(1, 3)
    )
    return {
        "infidelity": infidelity.tolist(),
        "sensitivity": change.tolist(),
        "answer_shuffle": shuffled,
        "randomization_spearman": found.spearman.T.tolist(),
        "randomization_ssim": found.ssim.T.tolist(),
    }


@pytest.mark.parametrize("name", PROBED)
def test_probes_measure_the_variant_at_its_own_block_and_score(probed, name):
    variant = next(v for v in VARIANTS if v.name == name)
    objects, found = scored(IMAGE, variant), probed["variants"][name]["scores"]
    assert len(objects) > 1
    wanted = curves_by_hand(variant, objects, "pixels", "commit", 2)
    tap = curves_by_hand(variant, objects, "tap", "final", 0)
    wanted |= {f"tap_{k}": column for k, column in tap.items() if not k.endswith("_curve")}
    for key, values in probes_by_hand(variant, objects).items():
        wanted[key] = dict(zip(objects, values, strict=True))
    for key, values in wanted.items():
        column = [values.get(n) for n in range(len(ANSWERS[IMAGE][1]))]
        for n, pair in enumerate(zip(found[key], column, strict=True)):
            assert_close(*pair, (name, key, n))
    assert set(found) == set(wanted) | ({"dacg_route"} if "dacg" in str(variant) else set())
    assert probed["variants"][name]["image"] == {"randomization_stages": ["block 3", "block 1"]}


def assert_close(found, wanted, what):
    """As :func:`assert_same`, for what many passes and ranks of equal values add up to."""
    if isinstance(wanted, list):
        for pair in zip(found, wanted, strict=True):
            assert_close(*pair, what)
    elif wanted is None:
        assert found is None, what
    else:
        assert found == pytest.approx(float(wanted), rel=2e-3, abs=1e-5), what
