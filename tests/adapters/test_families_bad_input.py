"""Bad input is refused the same way by every family, before the model runs."""

import json
from pathlib import Path

import pytest
import torch

import captum_dcam
from captum_dcam.errors import WeightsError
from captum_dcam.model.prompts import Video
from captum_dcam.testing.__main__ import cases_in

CASES = {}
for case in cases_in(Path(__file__).parent / "cases"):
    CASES.setdefault(case.name.split(",")[0], case)
QWEN = {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}
GEMMA = {"model_type": "diffusion_gemma", "architectures": ["DiffusionGemmaForBlockDiffusion"]}


@pytest.fixture(scope="module", params=CASES)
def made(request):
    case = CASES[request.param]
    adapter = case.make(torch.float32)
    runs = []
    adapter.model.register_forward_hook(lambda *_: runs.append(1))
    for block in adapter.blocks:
        block.register_forward_hook(lambda *_: runs.append(1))
    return case, adapter, runs


def refused(made, images, prompts, match, error=(ValueError, TypeError)):
    _, adapter, runs = made
    with pytest.raises(error, match=match) as caught:
        adapter.prepare(images, prompts)
    assert not runs, "the model ran before the input was refused"
    return str(caught.value)


def test_several_examples_where_only_one_is_possible(made):
    case, adapter, _ = made
    pictures = [[case.picture()], [case.picture(1)]]
    if adapter.batches:
        assert adapter.prepare(pictures, [case.prompt] * 2).batch == 2
    else:
        text = refused(made, pictures, [case.prompt] * 2, "one")
        assert adapter.family in text and "2" in text


def test_a_video_where_none_is_taken(made):
    case, adapter, _ = made
    video = Video([case.picture(i) for i in range(4)])
    if not adapter.takes_video:
        refused(made, [[video]], [case.prompt], "takes (no video|none)")


@pytest.mark.parametrize("images", ([], [[]]))
def test_no_picture(made, images):
    refused(made, images, [made[0].prompt], "picture|image")


def test_more_prompts_than_examples(made):
    refused(made, [[made[0].picture()]], [made[0].prompt] * 3, "3")


def test_what_is_no_picture(made):
    refused(made, [["photo.jpg"]], [made[0].prompt], "photo.jpg: no such file", OSError)
    refused(made, [[7]], [made[0].prompt], "image 0 is a int: expected a path")
    refused(made, [made[0].picture()], [made[0].prompt], r"Image: .*prepare\(\[\[image\]\]")


def test_what_is_no_prompt(made):
    refused(made, [[made[0].picture()]], [7], "int|prompt|string")


def test_a_processor_that_does_not_fit(made):
    _, adapter, _ = made
    with pytest.raises((TypeError, ValueError), match=r"processor|tokenizer"):
        type(adapter)(adapter.model, object())


def test_a_checkpoint_of_another_family(made, tmp_path):
    _, adapter, _ = made
    other = GEMMA if adapter.family == "autoregressive" else QWEN
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(WeightsError, match=rf"of family '\w+', not '{adapter.family}'"):
        captum_dcam.load(tmp_path, family=adapter.family)


def test_every_family_is_here():
    from captum_dcam.model.hub import families

    here = {case.make(torch.float32).family for case in CASES.values()}
    assert here == set(families())
