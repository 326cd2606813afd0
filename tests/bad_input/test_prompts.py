"""Prompts that a tokenizer would read as something else, and images too long for a family's grid.

Every special token of every family is tried in a prompt; so are the signs by which other families
place images. Nothing reaches the model, and a prompt like them without the token goes through.
"""

from pathlib import Path

import pytest
import torch
from PIL import Image

from captum_dcam.adapters.common.text import check_prompt, special_ids, special_texts
from captum_dcam.errors import InputError
from captum_dcam.testing.__main__ import cases_in

CASES = {}
for case in cases_in(Path(__file__).parents[1] / "adapters" / "cases"):
    CASES.setdefault(case.name.split(",")[0], case)
#: families in which a string places its images by <image>
PLACED = ("lavida-llada", "lavida-dream", "lavida_o", "llada_v")
SIGNS = ("<image>", "<video>")


@pytest.fixture(scope="module", params=CASES)
def made(request):
    case = CASES[request.param]
    adapter, runs = case.make(torch.float32), []
    adapter.model.register_forward_hook(lambda *_: runs.append(1))
    yield request.param, case, adapter
    assert not runs, "the model ran before the input was refused"


def tokenizer_of(adapter):
    for owner, name in ((adapter, "_tokenizer"), (adapter, "tokenizer")):
        if hasattr(owner, name):
            return getattr(owner, name)
    return adapter.processor.tokenizer


def conversation(*texts):
    parts = [{"type": "image"}, *({"type": "text", "text": t} for t in texts)]
    return [{"role": "user", "content": parts}]


def prompts(token, family):
    """The token in a string and in a conversation: alone, inside a word, in two parts, between
    which ``mini`` and its twin put a blank."""
    half = len(token) // 2
    found = (
        token,
        f"what is {token} here ?",
        f"a{token}b",
        conversation(f"what is {token} ?"),
        conversation("what is " + token[:half], token[half:]),
    )
    return found[:-1] if family in ("mini", "mini_ar") else found


def test_a_special_token_in_a_prompt_is_refused(made):
    name, case, adapter = made
    tokenizer = tokenizer_of(adapter)
    tokens = special_texts(tokenizer, adapter.mask_id)
    assert len(tokens) >= len(special_ids(tokenizer)) > 0
    for token in tokens:
        for prompt in prompts(token, name):
            if name in PLACED and token == "<image>":
                continue
            with pytest.raises(InputError, match=r"the prompt holds <.*leave it out"):
                adapter.prepare([[case.picture()]], [prompt])


@pytest.mark.parametrize("sign", SIGNS)
def test_a_sign_of_other_families_is_refused_or_places_the_image(made, sign):
    name, case, adapter = made
    for prompt in prompts(sign, name):
        if name in PLACED and sign == "<image>" and isinstance(prompt, str):
            assert adapter.prepare([[case.picture()]], [prompt]).batch == 1
            continue
        with pytest.raises(InputError, match=r"holds <\w+>.*(leave it out|place images by parts)"):
            adapter.prepare([[case.picture()]], [prompt])


def test_more_signs_than_images_are_refused(made):
    name, case, adapter = made
    words = "places 2 images by <image>, but 1 were" if name in PLACED else "stands for an image"
    with pytest.raises(InputError, match=words):
        adapter.prepare([[case.picture()]], ["<image> and <image>"])


@pytest.mark.parametrize(
    "prompt", ("a < b > c", "<b>what</b> is red ?", "< image >", "< | im_start | >", "image video")
)
def test_text_that_only_looks_like_a_sign_goes_through(made, prompt):
    _, case, adapter = made
    assert adapter.prepare([[case.picture()]], [prompt]).prompts == (prompt,)


def test_the_assistants_and_the_systems_texts_are_read_too(made):
    name, case, adapter = made
    token = special_texts(tokenizer_of(adapter), adapter.mask_id)[0]
    for role in ("assistant", "system"):
        turns = [{"role": role, "content": f"x {token}"}, {"role": "user", "content": "what ?"}]
        if name in PLACED and token == "<image>":
            continue
        with pytest.raises(InputError, match="holds <"):
            adapter.prepare([[case.picture()]], [turns])


def test_a_conversation_places_its_images(made):
    _, case, adapter = made
    assert adapter.prepare([[case.picture()]], [conversation(case.prompt)]).batch == 1


def test_parts_side_by_side_are_one_text():
    check_prompt([{"role": "user", "content": [{"type": "image"}]}], ["<x>"])
    with pytest.raises(InputError, match=r"<x>.*special token and not as text"):
        check_prompt(conversation("a<", "x>"), ["<x>"])
    apart = [{"type": "text", "text": "a<"}, {"type": "image"}, {"type": "text", "text": "x>"}]
    check_prompt([{"role": "user", "content": apart}], ["<x>"])


# -- shapes of images ------------------------------------------------------------------------------

LONG = ((2000, 40), (40, 2000), (5000, 10), (10, 5000), (400, 1), (1, 400), (99, 1), (1, 99))
SMALL = ((1, 1), (1, 2), (3, 1), (3, 3), (1, 3), (4, 3))


@pytest.mark.parametrize("size", LONG + SMALL, ids=lambda s: f"{s[0]}x{s[1]}")
def test_an_image_of_any_shape_has_tokens_or_is_refused_by_its_size(made, size):
    _, case, adapter = made
    try:
        request = adapter.prepare([[Image.new("RGB", size)]], [case.prompt])
    except InputError as error:
        text = str(error).replace(" × ", "×")
        assert size in LONG and f"{size[0]}×{size[1]}" in text
        assert "crop" in text or "cut" in text or "resize" in text
        return
    assert all(h > 0 and w > 0 for h, w in request.layout.shapes)
    maps = [torch.ones(shape) for shape in request.layout.shapes]
    assert request.layout.to_pixels(maps).shape == size[::-1]
    assert request.layout.grids[0].image_size == size[::-1]


@pytest.mark.parametrize("family", ("lavida-llada", "lavida_o"))
def test_a_mosaic_thinner_than_a_token_says_how_long_an_image_may_be(family):
    case = CASES[family]
    adapter = case.make(torch.float32)
    with pytest.raises(InputError, match=r"400×1 px, more than \d+ times wider .* crop it or cut"):
        adapter.prepare([[Image.new("RGB", (400, 1))]], [case.prompt])
