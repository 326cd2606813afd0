"""Bad input: one clear error each, nothing hooked, nothing half written."""

import dataclasses
import io
import os

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import captum_dcam
from captum_dcam import DenoisingForward, DiffusionCAM, refine
from captum_dcam.errors import (
    InfeasibleStepError,
    LayerError,
    PictureError,
    TargetError,
    UnknownNameError,
)
from captum_dcam.model.words import Target


@pytest.fixture
def adapter(cache):
    made = tiny.adapter(cache)
    yield made
    assert not tiny.hooks(made.model)


@pytest.fixture
def forward(cache):
    made = tiny.bound(cache)
    yield made
    assert not tiny.hooks(made) and made.tap.edit is None


def explain(adapter, image=None, prompt=tiny.PROMPT, words=None, **options):
    image = tiny.picture() if image is None else image
    return captum_dcam.explain(adapter, image, prompt, words, **{"gen_length": 4, **options})


# -- steps and layers ---------------------------------------------------------------------------


def test_infeasible_step_names_both_lengths():
    adapter = tiny.adapter("prefix")
    with pytest.raises(
        InfeasibleStepError, match=r"ends at 64 .* has 4 tokens.*\(step 2\).*here 0"
    ):
        explain(adapter, step=2)
    assert not tiny.hooks(adapter.model)


@pytest.mark.parametrize("step", (-1, 4 + 1, 99))
def test_step_that_does_not_exist(adapter, step):
    with pytest.raises(InfeasibleStepError, match=rf"step {step} is not in this generation"):
        explain(adapter, step=step)


@pytest.mark.parametrize("layer", (3, -1))
def test_last_block_names_the_deepest_usable_one(adapter, layer):
    with pytest.raises(LayerError, match=r"block 3 .* usable block of mini is 2"):
        explain(adapter, layer=layer)


@pytest.mark.parametrize("layer", (4, 99, -5))
def test_layer_that_is_not_in_the_model(adapter, layer):
    with pytest.raises(LayerError, match=f"layer {layer} is not in the model: mini has 4 blocks"):
        explain(adapter, layer=layer)


@pytest.mark.parametrize("layer", ("layers.2", 1.0, True))
def test_layer_of_a_wrong_type(adapter, layer):
    with pytest.raises(TypeError, match="expected a block's number"):
        explain(adapter, layer=layer)


# -- words and targets --------------------------------------------------------------------------


def test_word_that_is_not_in_the_answer_lists_its_words(adapter):
    words = explain(adapter).words
    with pytest.raises(TargetError, match=rf"'zebra' is not in .* Its words: {' '.join(words)}$"):
        explain(adapter, words="zebra")
    with pytest.raises(TargetError, match="Its words"):
        explain(adapter, words=[words[0], "zebra"])
    with pytest.raises(TargetError, match="Its words"):
        explain(adapter, words="")


def test_empty_answer(forward):
    t = forward.trajectory
    empty = dataclasses.replace(t, tokens=torch.full_like(t.tokens, 2), kept={})
    forward.bind(forward.request, empty)
    with pytest.raises(TargetError, match="the answer is empty"):
        captum_dcam.explain_generation(forward)
    with pytest.raises(TargetError, match="not in the answer: the answer is empty"):
        captum_dcam.explain_generation(forward, "circle")


def test_empty_prompt_works(adapter):
    assert explain(adapter, prompt="").prompt == ""


@pytest.mark.parametrize("words", (4, -1, 99, (4, 9), (0, 9999), (0, -1), (True, False)))
def test_index_out_of_range(adapter, words):
    with pytest.raises(
        TargetError, match=r"out of range|not \(position|is a bool: expected a word"
    ):
        explain(adapter, words=words)


@pytest.mark.parametrize("words", ([1.5], [None], [(1, 2, 3)], [b"red"], [True]))
def test_word_of_a_wrong_type(adapter, words):
    with pytest.raises(TargetError, match="expected"):
        explain(adapter, words=words)


@pytest.mark.parametrize(
    "target",
    (
        None,
        5,
        "red",
        (1,),
        (1, 2, 3),
        (1.0, 2),
        (True, 2),
        [(1, 2), (3, 4)],
        ((1, 2),),
        [5],
        torch.tensor([1, 2]),
        (99, 2),
        (-1, 2),
        (1, 9999),
        (1, -1),
        Target("", (), ()),
        Target("", (1, 2), (3,)),
        Target("", (1, 99), (3, 4)),
    ),
    ids=repr,
)
def test_wrong_targets_of_attribute(forward, target):
    with pytest.raises(TargetError):
        DiffusionCAM(forward).attribute(forward.request.pixels, target)


def test_the_first_and_the_last_are_no_wrong_targets(forward):
    pixels, last = forward.request.pixels, forward.trajectory.tokens.shape[1] - 1
    for target in ((0, 0), (last, forward.adapter.vocabulary - 1)):
        assert DiffusionCAM(forward).attribute(pixels, target).shape[0] == 1


def test_example_that_is_not_in_the_batch(forward):
    for example in (-1, 1):
        with pytest.raises(TargetError, match="batch of 1"):
            captum_dcam.explain_generation(forward, example=example)


def test_settings_that_contradict_each_other(forward):
    cam, pixels, target = DiffusionCAM(forward), forward.request.pixels, (1, 5)
    args = forward.arguments(target)
    with pytest.raises(ValueError, match="hold a state already"):
        cam.attribute(pixels, target, args, score="final")
    with pytest.raises(ValueError, match="hold a state already"):
        cam.attribute(pixels, target, args, step=0)
    with pytest.raises(ValueError, match="non-negative"):
        cam.attribute(pixels, target, relu_attributions=False, refinements=[refine.MinMax()])
    with pytest.raises(ValueError, match="several tokens"):
        cam.attribute(pixels, Target("", (1, 2), (3, 4)), args)
    with pytest.raises(ValueError, match="expected one of"):
        cam.attribute(pixels, target, score="last")
    with pytest.raises(UnknownNameError, match="did you mean 'pooled'"):
        cam.attribute(pixels, target, product="poled")
    with pytest.raises(UnknownNameError, match="did you mean 'paper'"):
        DiffusionCAM(forward, preset="papers")
    with pytest.raises(ValueError, match="expected 3"):
        cam.attribute(pixels, target, args[:-1])
    with pytest.raises(TypeError, match="expected a DenoisingForward"):
        DiffusionCAM(forward.model)


def test_nothing_bound(adapter):
    forward = DenoisingForward(adapter)
    with pytest.raises(RuntimeError, match=r"forward\.generate"):
        captum_dcam.explain_generation(forward)
    with pytest.raises(RuntimeError, match=r"forward\.generate"):
        DiffusionCAM(forward).attribute(torch.zeros(1, 1, 3, 64, 64), (0, 5))
    with pytest.raises(RuntimeError, match=r"forward\.generate"):
        forward(torch.zeros(1, 1, 3, 64, 64))


# -- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ("L", "RGBA", "LA", "P", "1", "CMYK", "I;16"))
def test_pictures_of_other_modes_work(adapter, mode):
    image = tiny.picture().convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image, dtype=np.uint16) * 257)
    found = explain(adapter, image)
    assert found.maps[0].any() and found.pixel_maps().shape[1:] == (60, 80)


def test_grey_is_grey_and_transparent_is_white():
    adapter = tiny.adapter("none")
    grey = adapter.prepare([[tiny.picture(mode="L")]], [""]).pixels
    assert torch.equal(grey[0, 0, 0], grey[0, 0, 2])
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    assert torch.equal(adapter.prepare([[clear]], [""]).pixels, torch.ones(1, 1, 3, 64, 64))


@pytest.mark.parametrize("size", ((1, 5000), (5000, 1), (0, 10), (10, 0)))
def test_pictures_without_anything_to_see(adapter, size):
    with pytest.raises(ValueError, match=r"no pixels to explain|aspect ratio"):
        explain(adapter, Image.new("RGB", size))


@pytest.mark.parametrize("size", ((1, 1), (2, 3), (1, 100)))
def test_small_pictures_work(adapter, size):
    assert explain(adapter, Image.new("RGB", size)).pixel_maps().shape[1:] == size[::-1]


@pytest.mark.parametrize("image", (7, [7], [None], {"image": 1}))
def test_not_a_picture(adapter, image):
    with pytest.raises(TypeError, match=r"expected a path, bytes of a file, a PIL image"):
        explain(adapter, image)


def test_no_picture_and_unequal_counts(adapter):
    for images, prompts in (([], ""), ([[]], [""]), ([[tiny.picture()], []], ["", ""])):
        with pytest.raises(ValueError, match="every example of a batch needs one prompt"):
            adapter.prepare(images, prompts)
    with pytest.raises(ValueError, match="every example of a batch needs one prompt"):
        adapter.prepare([[tiny.picture()]], ["", ""])


@pytest.mark.parametrize("kind", ("PNG", "JPEG"))
def test_truncated_file(adapter, kind):
    file = io.BytesIO()
    tiny.picture().save(file, kind)
    half = Image.open(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]))
    with pytest.raises(PictureError, match="image is damaged or truncated"):
        explain(adapter, half)


def test_batch_of_unequal_layouts(adapter):
    with pytest.raises(ValueError, match="different sizes in one batch"):
        adapter.prepare([[tiny.picture()], [tiny.picture(size=(70, 60))]], ["", ""])


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_pixels_that_are_not_finite(forward, value):
    bad = forward.request.pixels.clone()
    bad[0, 0, 1, 2, 3] = value
    with pytest.raises(ValueError, match="hold 1 values that are NaN or infinite"):
        DiffusionCAM(forward).attribute(bad, (1, 5))
    with pytest.raises(ValueError, match="hold 1 values that are NaN or infinite"):
        forward.generate(dataclasses.replace(forward.request, pixels=bad))
    with pytest.raises(TypeError, match=r"torch\.int64: expected a floating-point"):
        DiffusionCAM(forward).attribute(bad.nan_to_num().long(), (1, 5))


# -- maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ("AKD", "DACG", "CBA", "SICD", "Affinity", "MinMax", "RankGaussian")
)
def test_refinements_refuse_bad_maps(name):
    stage = getattr(refine, name)()
    states = torch.eye(8).expand(4, 8, 8)
    context = refine.RefineContext(steps=4, image_size=(60, 80), features=states)
    bad = [torch.ones(8), torch.full((8, 8), torch.nan), torch.full((8, 8), torch.inf)]
    for maps in bad if name in ("MinMax", "RankGaussian") else [*bad, -torch.ones(8, 8)]:
        with pytest.raises(ValueError, match="expected"):
            stage(maps, context)


# -- files --------------------------------------------------------------------------------------


def test_unwritable_output(adapter, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        explain(adapter).save(tmp_path / "file" / "sub" / "out")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "x"


def test_unknown_model():
    with pytest.raises(UnknownNameError, match="unknown model 'minni'; did you mean 'mini'"):
        captum_dcam.load("minni")
    with pytest.raises(UnknownNameError, match="Known: "):
        captum_dcam.load("mini", family="llava")
    with pytest.raises(UnknownNameError, match="no family recognises a Linear"):
        captum_dcam.wrap(torch.nn.Linear(2, 2), None)
    with pytest.raises(ValueError, match="cache is 'half'"):
        captum_dcam.wrap(tiny.model(), tiny.processor(), cache="half")
