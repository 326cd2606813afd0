"""TAM's protocol: printed rows, loops over pixels, matching of words, properties."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.filters import threshold_otsu

from captum_dcam import metrics
from captum_dcam.errors import MissingPackageError
from captum_dcam.model import words as targets

#: where and method: Obj-IoU, Func-IoU, printed F1-IoU, all in per cent
#: TAM, Tables 1-3 (in TAM's Table 3 Grad-CAM and CAM are the same rows)
TAM = {
    "T1 ECI": (22.41, 69.03, 33.84),
    "T1 RGF": (24.82, 43.34, 31.57),
    "T2 adaptive median": (25.48, 68.2, 37.1),
    "T2 median": (26.01, 68.26, 37.67),
    "T2 Gaussian": (26.56, 67.78, 38.16),
    "T2 feature surgery": (18.5, 48.66, 26.81),
    "T2 ECI-mean": (27.84, 49.85, 35.72),
    "T2 ECI-attnWeights": (27.11, 54.61, 36.23),
    "COCO Grad-CAM": (21.23, 51.93, 30.14),
    "COCO Grad-CAM++": (19.52, 62.83, 29.78),
    "COCO Grad-Rollout": (1.27, 99.51, 2.51),
    "COCO Layer-CAM": (11.43, 84.88, 20.15),
    "COCO Attention": (8.2, 92.87, 15.07),
    "COCO Attention-Rollout": (5.74, 96.5, 10.83),
    "COCO CP-LRP": (9.9, 53.97, 16.73),
    "COCO Attn-LRP": (9.92, 52.41, 16.69),
    "COCO ArchiSurgery": (15.69, 63.82, 25.19),
    "COCO TAM": (27.37, 68.44, 39.1),
    "GranDf Grad-CAM": (17.85, 62.15, 27.74),
    "GranDf Grad-CAM++": (17.3, 73.42, 28.01),
    "GranDf Grad-Rollout": (1.4, 99.61, 2.77),
    "GranDf Layer-CAM": (13.11, 82.09, 22.62),
    "GranDf Attention": (9.6, 93.56, 17.42),
    "GranDf Attention-Rollout": (7.21, 96.65, 13.42),
    "GranDf CP-LRP": (12.61, 53.24, 20.39),
    "GranDf Attn-LRP": (12.15, 52.19, 19.72),
    "GranDf ArchiSurgery": (16.59, 62.28, 26.2),
    "GranDf TAM": (18.65, 88.97, 30.83),
    "OpenPSG Grad-CAM": (22.93, 48.57, 31.15),
    "OpenPSG Grad-CAM++": (22.21, 59.95, 32.41),
    "OpenPSG Grad-Rollout": (1.57, 99.58, 13.08),
    "OpenPSG Layer-CAM": (14.12, 85.29, 24.22),
    "OpenPSG Attention": (10.58, 94.28, 19.03),
    "OpenPSG Attention-Rollout": (7.94, 97.04, 14.68),
    "OpenPSG CP-LRP": (13.3, 53.36, 21.3),
    "OpenPSG Attn-LRP": (12.78, 52.26, 20.54),
    "OpenPSG ArchiSurgery": (19.83, 58.77, 29.65),
    "OpenPSG TAM": (26.26, 92.99, 40.95),
}
#: MSEA and ARC, Table 1: the last row of each data set (the others are TAM's, printed again), some
#: rows of Table 2, and Table 3's rows with their own two modules
MSEA_ARC = {
    "COCO ours": (29.35, 91.57, 44.45),
    "GranDf ours": (23.32, 91.85, 37.20),
    "OpenPSG ours": (29.20, 94.69, 44.64),
    "T2 OpenPSG CAM, Qwen2-VL-2B": (22.93, 48.50, 31.15),
    "T2 COCO ours, InternVL2.5-8B": (32.16, 73.20, 45.25),
    "T2 COCO ours, InternVL2.5-4B": (31.80, 82.73, 45.94),
    "T2 COCO ours, Qwen2-VL-7B": (29.86, 94.77, 45.41),
    "T3 ARC": (27.07, 91.43, 41.78),
    "T3 max": (24.32, 63.77, 35.21),
    "T3 mean": (25.81, 63.21, 36.65),
    "T3 max ARC": (27.77, 91.64, 42.63),
    "T3 ARC, LLaVA": (28.04, 85.15, 42.19),
    "T3 max, LLaVA": (27.49, 52.53, 36.09),
    "T3 mean, LLaVA": (27.59, 48.88, 35.27),
    "T3 max ARC, LLaVA": (30.12, 85.32, 44.52),
    "T3 mean ARC, LLaVA": (30.62, 87.32, 45.34),
}
ROWS = {**TAM, **MSEA_ARC}
#: rows whose F1-IoU no inputs that round to the printed ones can give: they make 3.09, 31.14 (TAM's
#: Table 6 prints it too, with 48.5 for Table 3's 48.57) and 44.69
INCONSISTENT = frozenset(
    ("OpenPSG Grad-Rollout", "T2 OpenPSG CAM, Qwen2-VL-2B", "T2 COCO ours, InternVL2.5-8B")
)


def percent(obj, func):
    return 100 * float(metrics.f1_iou(obj / 100, func / 100))


@pytest.mark.parametrize("name", ROWS)
def test_printed_rows(name):
    obj, func, printed = ROWS[name]
    corners = [percent(obj + a, func + b) for a, b in itertools.product((-0.005, 0.005), repeat=2)]
    explained = min(corners) - 0.00501 <= printed <= max(corners) + 0.00501
    assert explained == (name not in INCONSISTENT), (percent(obj, func), printed)


def iou(values, mask):
    threshold = threshold_otsu(values)
    both = either = 0
    for value, member in zip(values.flat, mask.flat, strict=True):
        both += bool(value > threshold and member)
        either += bool(value > threshold or member)
    return both / either


@pytest.mark.parametrize("seed", range(4))
def test_phrase_is_the_best_of_tokens_and_instances(seed):
    rng = np.random.default_rng(seed)
    maps, masks = rng.random((2, 3, 11, 9)) ** 3, rng.random((2, 4, 11, 9)) > 0.7
    got = metrics.phrase_iou(torch.from_numpy(maps), torch.from_numpy(masks))
    one = metrics.phrase_iou(torch.from_numpy(maps), torch.from_numpy(masks[:, 0]))
    for i in range(2):
        every = [[iou(m, mask) for mask in masks[i]] for m in maps[i]]
        assert float(got[i]) == pytest.approx(max(map(max, every)))
        assert float(one[i]) == pytest.approx(max(row[0] for row in every))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", ("image", "map"))
def test_function_words_against_loops(seed, scale):
    rng = np.random.default_rng(seed)
    nouns, others = rng.random((3, 8, 8)) ** 2 * 5, rng.random((4, 8, 8)) * 2
    got = metrics.function_iou(torch.from_numpy(others), torch.from_numpy(nouns), scale)
    if scale == "map":
        nouns, others = (
            np.stack([(m - m.min()) / (m.max() - m.min()) for m in maps])
            for maps in (nouns, others)
        )
    border = sum(threshold_otsu(m) for m in nouns) / 3
    for score, values in zip(got, others, strict=True):
        below = sum(1 for value in values.flat if value < border)
        assert float(score) == pytest.approx(below / 64, abs=1e-9)


def test_scale_of_one_word_counts_for_image_only():
    g = torch.Generator().manual_seed(0)
    nouns, word = torch.rand(2, 9, 9, generator=g), torch.rand(1, 9, 9, generator=g)
    for scale, changes in (("image", True), ("map", False)):
        plain = metrics.function_iou(word, nouns, scale)
        loud = metrics.function_iou(word * 1e3, nouns, scale)
        all_louder = metrics.function_iou(word * 1e3, nouns * 1e3, scale)
        assert (plain != loud).all() == changes
        torch.testing.assert_close(plain, all_louder)


def test_joint_min_max_puts_the_text_on_the_same_scale():
    maps = torch.tensor([[[0.0, 1.0]], [[1.0, 2.0]]])
    text = torch.tensor([[4.0, 0.5], [1.0, 1.0]])
    got = metrics.joint_min_max(maps, text)
    assert torch.allclose(got, torch.tensor([[[0.0, 0.25]], [[0.0, 1.0]]]))
    assert torch.equal(metrics.joint_min_max(torch.full((1, 2, 2), 3.0)), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"finite \(\.\.\., K\)"):
        metrics.joint_min_max(maps, text[:1])


@st.composite
def many_maps(draw, values=(0, 0.1, 0.5, 0.9, 1)):
    shape = draw(hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=6))
    dtype, largest = draw(
        st.sampled_from([(np.float16, 6e4), (np.float32, 3e38), (np.float64, 1.7e308)])
    )
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, largest]))
    levels = draw(hnp.arrays(np.float64, shape, elements=st.sampled_from(values)))
    return torch.from_numpy((levels * scale).astype(dtype))


@settings(max_examples=40)
@given(many_maps(), st.sampled_from(("image", "map")))
def test_finite_in_range_and_the_same_alone(maps, scale):
    got = metrics.function_iou(maps, maps, scale)
    assert got.shape == maps.shape[:1] and ((got >= 0) & (got <= 1)).all()
    alone = torch.cat([metrics.function_iou(m[None], maps, scale) for m in maps])
    assert torch.equal(got, alone)
    assert torch.equal(metrics.function_iou(maps, maps.flip(-1, -2), scale), got)
    unit = metrics.joint_min_max(maps)
    assert torch.isfinite(unit).all() and ((unit >= 0) & (unit <= 1)).all()
    best = metrics.phrase_iou(maps, torch.ones(maps.shape[1:], dtype=torch.bool))
    assert best.ndim == 0 and 0 <= best <= 1


def test_zero_maps_are_not_rewarded():
    zero = torch.zeros(2, 4, 4)
    assert metrics.function_iou(zero, zero).tolist() == [0, 0]
    assert metrics.function_iou(zero, torch.rand(2, 4, 4)).tolist() == [1, 1]


def test_means_and_f1_of_a_data_set():
    got = metrics.plausibility(torch.tensor([0.2, 0.4]), torch.tensor([0.9, 0.9, 0.3]))
    assert got.obj_iou == pytest.approx(0.3) and got.func_iou == pytest.approx(0.7)
    assert got.f1_iou == pytest.approx(2 * 0.3 * 0.7 / 1.0)
    assert float(metrics.f1_iou(0.0, 0.0)) == 0 == float(metrics.f1_iou(0.0, 1.0))
    assert float(metrics.f1_iou(1e-320, 1e-320)) == pytest.approx(1e-320, rel=1e-2)
    assert metrics.f1_iou(torch.tensor([[0.5], [1.0]]), torch.tensor([0.5, 1.0])).shape == (2, 2)
    with pytest.raises(ValueError, match="at least one"):
        metrics.plausibility(torch.zeros(0), torch.ones(1))
    with pytest.raises(ValueError, match="divide per cent"):
        metrics.f1_iou(30.0, 0.5)


def test_tags_are_those_of_the_supplement():
    assert targets.NOUN_TAGS == {"NN", "NNS", "NNP", "NNPS"}
    assert len(targets.FUNCTION_WORD_TAGS) == 12
    assert not targets.FUNCTION_WORD_TAGS & {"IN", "CD"}
    assert targets.FUNCTION_WORD_TAGS != targets.FUNCTION_TAGS


WORDS = "Two buses and a glass near traffic lights with people".split()
TAGS = "CD NNS CC DT NN IN NN NNS IN NNS".split()
NAMES = ("bus", "person", "bus", "traffic light", "light", "Glass", "cat")


def test_words_find_their_masks():
    got = targets.match_words_to_masks(WORDS, TAGS, NAMES)
    assert [(m.words, m.masks, m.name) for m in got.matches] == [
        ((1,), (0, 2), "bus"),
        ((4,), (5,), "glass"),
        ((6, 7), (3,), "traffic light"),
        ((9,), (1,), "person"),
    ]
    assert got.lemmatizer == "textblob"


def test_only_nouns_count_and_no_word_twice():
    assert targets.match_words_to_masks(["bus"], ["VB"], ["bus"]).matches == ()
    dogs = targets.match_words_to_masks(
        ["hot", "dog", "dog"], ["JJ", "NN", "NN"], ["dog", "hot dog"]
    )
    assert [m.name for m in dogs.matches] == ["hot dog", "dog"]
    assert targets.match_words_to_masks([], [], ["dog", " "]).matches == ()
    with pytest.raises(ValueError, match="2 words and 1 tags"):
        targets.match_words_to_masks(["a", "b"], ["DT"], [])


def test_wordnet_is_used_where_it_is_asked_for(monkeypatch):
    import nltk

    class Lemmas:
        def lemmatize(self, word):
            return {"oxen": "ox"}.get(word, word)

    monkeypatch.setattr(nltk.stem, "WordNetLemmatizer", Lemmas)
    got = targets.match_words_to_masks(["oxen"], ["NNS"], ["ox"], "wordnet")
    assert got.lemmatizer == "wordnet" and got.matches[0].masks == (0,)
    assert targets.match_words_to_masks(["cats"], ["NNS"], ["cat"]).lemmatizer == "textblob"


def test_wordnet_without_its_data_says_how_to_get_it(monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(MissingPackageError, match=r"nltk\.downloader wordnet"):
        targets.match_words_to_masks(["oxen"], ["NNS"], ["ox"], "wordnet")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: metrics.phrase_iou(torch.ones(4, 4), torch.ones(4, 4) > 0), r"maps\[None\]"),
        (lambda: metrics.phrase_iou(torch.ones(2, 4, 4), torch.ones(4) > 0), "for all K tokens"),
        (lambda: metrics.noun_threshold(torch.ones(0, 4, 4)), "leave its function words out"),
        (lambda: metrics.function_iou(torch.ones(1, 4, 5), torch.ones(1, 4, 4)), "of one image"),
        (lambda: metrics.function_iou(torch.ones(1, 4, 4), torch.ones(1, 4, 4), "x"), "scale is"),
    ],
)
def test_errors_teach(call, says):
    with pytest.raises(ValueError, match=says):
        call()
