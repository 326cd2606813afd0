"""Autoregressive families: prompts, conversations, tokens' text, and input that cannot work."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not

import made_ar

import captum_dcam
from captum_dcam.errors import UnknownNameError, WeightsError
from captum_dcam.model.words import words_of

every = pytest.mark.parametrize("kind", made_ar.KINDS)

#: the published format of one question about one picture, image tokens as one placeholder
FORMATS = {
    "qwen2_vl": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>@<|vision_end|>is it red ?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "qwen3_vl": (
        "<|im_start|>user\n<|vision_start|>@<|vision_end|>is it red ?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "llava": "USER: @\nis it red ? ASSISTANT:",
    "internvl": ("<|im_start|>user\n<img>@</img>\nis it red ?<|im_end|>\n<|im_start|>assistant\n"),
}
FORMATS["qwen2_5_vl"] = FORMATS["qwen2_vl"]

TALK = [
    {"role": "system", "content": "be short ."},
    {"role": "user", "content": "what is it ?"},
    {"role": "assistant", "content": "a circle"},
    {"role": "user", "content": "is it red ?"},
]
TALKS = {
    **dict.fromkeys(
        made_ar.QWEN,
        "<|im_start|>system\nbe short .<|im_end|>\n<|im_start|>user\n<|vision_start|>@"
        "<|vision_end|>what is it ?<|im_end|>\n<|im_start|>assistant\na circle<|im_end|>\n"
        "<|im_start|>user\nis it red ?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llava": "be short . USER: @\nwhat is it ? ASSISTANT: a circle USER: is it red ? ASSISTANT:",
    "internvl": (
        "<|im_start|>system\nbe short .<|im_end|>\n<|im_start|>user\n<img>@</img>\nwhat is it ?"
        "<|im_end|>\n<|im_start|>assistant\na circle<|im_end|>\n<|im_start|>user\nis it red ?"
        "<|im_end|>\n<|im_start|>assistant\n"
    ),
}


def read(made, request, example=0):
    """The request's text, every run of image tokens as ``@``."""
    tokenizer = made.processor.tokenizer
    ids = request.extras[0][example].tolist()
    image = made.model.config.image_token_id
    kept = [i for n, i in enumerate(ids) if i != image or n == 0 or ids[n - 1] != image]
    text = tokenizer.decode(kept, skip_special_tokens=False)
    token = tokenizer.convert_ids_to_tokens(image)
    return text.replace(token, "@").removeprefix("<s>").lstrip(" ")


@every
def test_the_published_format_where_there_is_no_template(kind):
    made = made_ar.shared_adapter(kind)
    request = made.prepare([[made_ar.picture()]], ["is it red ?"])
    assert read(made, request) == FORMATS[kind]
    if kind == "llava":
        assert request.extras[0][0, 0] == made.processor.tokenizer.bos_token_id


@every
def test_conversations(kind):
    made = made_ar.shared_adapter(kind)
    request = made.prepare([[made_ar.picture()]], [TALK])
    assert read(made, request) == TALKS[kind]
    assert request.prompts[0].startswith("system: be short .\nuser: what is it ?")
    placed = [
        *TALK[:3],
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is it red ?"}]},
    ]
    text = read(made, made.prepare([[made_ar.picture()]], [placed]))
    assert text.index("@") > text.index("a circle")
    again = made.prepare_again(request, request.images[0])
    assert torch.equal(again.extras[0], request.extras[0])
    assert torch.equal(again.pixels, request.pixels)


@every
def test_the_processors_own_template_is_used(kind):
    sign = {"llava": "<image>", "internvl": "<IMG_CONTEXT>"}.get(kind, "<|image_pad|>")
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}" + sign + "{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}[now]{% endif %}"
    )
    parts = replace(made_ar.parts(kind), chat_template=template)
    made = captum_dcam.wrap(made_ar.model(kind), parts)
    text = read(made, made.prepare([[made_ar.picture()]], ["is it red ?"]))
    assert text.replace("<img>", "").replace("</img>", "") == "[user]@is it red ?[now]"
    wrong = replace(parts, chat_template="{{ messages[0]['role'] }}")
    with pytest.raises(ValueError, match="does not belong to this family"):
        captum_dcam.wrap(made_ar.model(kind), wrong).prepare([[made_ar.picture()]], [""])


@every
def test_prompt_tokens_are_text_alone(kind):
    made = made_ar.shared_adapter(kind)
    request = made.prepare([[made_ar.picture()]] * 2, ["is it red ?", "a"])
    for example in range(2):
        positions, ids = made.prompt_tokens(request, example)
        assert torch.equal(request.extras[0][example, positions], ids)
        assert bool(request.extras[1][example, positions].all())
        text = "".join(made.token_texts(ids.tolist()))
        assert ("is it red ?", "a")[example] in text
        assert "<" not in text and "@" not in text
    grid = request.layout.grids[0].positions.flatten().tolist()
    assert not set(grid) & set(positions.tolist())


# -- text of tokens --------------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    "text", ("a red circle", "the blue square ?", "Ünder é 漢字 🙂", "a,b (c) d's\nred", "a")
)
def test_pieces_join_to_the_text(kind, text):
    made = made_ar.shared_adapter(kind)
    ids = made.encode(text)
    token_texts = made.token_texts(ids)
    assert len(token_texts) == len(ids) and "".join(token_texts).removeprefix(" ") == text
    blank = made.encode(f" {text}")
    assert "".join(made.token_texts(blank)) == f" {text}"
    assert made.token_texts(ids[1:]) == token_texts[1:] or "" in token_texts  # no context is needed


@every
def test_words_begin_with_a_blank(kind):
    made = made_ar.shared_adapter(kind)
    ids = made.encode(" a red circle")
    assert made.token_texts(ids) == [" a", " red", " circle"]
    found = words_of(made, made.encode(" a redxy café,\nthe 漢 (blue)"))
    assert [w.text for w in found] == ["a", "redxy", "café", "the", "漢", "blue"]


@every
def test_bytes_that_are_no_character(kind):
    made = made_ar.shared_adapter(kind)
    ids = made.encode("é")[-2:]  # two bytes
    word = made.encode(" red")
    assert made.token_texts(ids) == ["", "é"]
    assert made.token_texts([ids[0], *word]) == ["\N{REPLACEMENT CHARACTER}", " red"]
    assert made.token_texts([*word, ids[0]]) == [" red", "\N{REPLACEMENT CHARACTER}"]
    assert made.token_texts([]) == []


@every
def test_the_output_head_reads_the_last_block(kind):
    made = made_ar.adapter(kind, "none")
    request = made.prepare([[made_ar.picture()]], [made_ar.PROMPT])
    seen = []
    handle = made.blocks[-1].register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        expected = made.model(**made._inputs(request.pixels, request.extras)).logits
        handle.remove()
        assert torch.equal(made.unembed(seen[0]), expected)


# -- input that cannot work ------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    ("pictures", "prompts", "error", "message"),
    (
        ([], [], ValueError, "0 lists of images for 0 prompts"),
        ([[None]], ["a", "b"], ValueError, "1 lists of images for 2 prompts"),
        ([[]], ["a"], ValueError, "at least one"),
        ([["a.png"]], ["a"], FileNotFoundError, "a.png: no such file"),
        ([[[]]], ["a"], ValueError, "no frame"),
        (None, [3], TypeError, "expected a string, or a list of messages"),
        (None, [[]], ValueError, "ends with nothing"),
        (None, [[{"role": "assistant", "content": "a"}]], ValueError, "ends with assistant"),
        (None, [[{"role": "robot", "content": "a"}]], ValueError, "expected one of"),
        (None, [[{"role": "user", "content": 3}]], TypeError, "content is a int"),
        (None, [[{"role": "user", "content": [{"type": "sound"}]}]], ValueError, "expected type"),
        (
            None,
            [[{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]],
            ValueError,
            "expected as many",
        ),
    ),
)
def test_bad_pictures_and_prompts(kind, pictures, prompts, error, message):
    made = made_ar.shared_adapter(kind)
    given = [[made_ar.picture()]] if pictures is None else pictures
    with pytest.raises(error, match=message):
        made.prepare(given, prompts)


@every
def test_a_prompt_that_holds_the_placeholder(kind):
    made = made_ar.shared_adapter(kind)
    token = made.processor.tokenizer.convert_ids_to_tokens(made.model.config.image_token_id)
    with pytest.raises(ValueError, match="stands for an image"):
        made.prepare([[made_ar.picture()]], [f"what is {token} ?"])


@every
def test_a_span_that_the_context_would_truncate(kind):
    made = made_ar.adapter(kind)
    made.model.config.get_text_config().max_position_embeddings = 40
    with pytest.raises(ValueError, match="context is 40: the image span would be truncated"):
        made.prepare([[made_ar.picture(size=(64, 64))]], ["what is it ?"])


def test_video_to_a_family_without_it():
    with pytest.raises(ValueError, match="llava takes no video"):
        made_ar.adapter("llava").prepare([[made_ar.video()]], [""])


@pytest.mark.parametrize(
    ("kind", "other", "message"),
    (
        ("qwen2_vl", "internvl", "id of <|image_pad|>"),
        ("internvl", "qwen2_vl", "id of <IMG_CONTEXT>"),
        ("llava", "qwen2_vl", "id of <image>"),
    ),
)
def test_a_processor_of_another_model(kind, other, message):
    with pytest.raises(ValueError, match="do not fit") as caught:
        captum_dcam.wrap(made_ar.model(kind), made_ar.parts(other))
    assert message in str(caught.value)


@every
def test_an_image_processor_of_other_sizes(kind):
    parts = made_ar.parts(kind)
    if kind in made_ar.QWEN:
        parts.image_processor.patch_size = 14
    elif kind == "llava":
        parts.image_processor.crop_size = {"height": 28, "width": 28}
    else:
        parts.image_processor.size = {"height": 64, "width": 64}
    with pytest.raises(ValueError, match="processor and model do not fit: the image processor"):
        captum_dcam.wrap(made_ar.model(kind), parts)


def test_what_is_no_processor():
    with pytest.raises(TypeError, match="without tokenizer and image_processor"):
        captum_dcam.wrap(made_ar.model("llava"), object())


def test_a_model_without_its_head_is_not_owned():
    with pytest.raises(UnknownNameError, match="no family recognises a LlavaModel"):
        captum_dcam.wrap(made_ar.model("llava").model, made_ar.parts("llava"))


# -- loading ---------------------------------------------------------------------------------------


def saved(kind, folder, template=None):
    parts = made_ar.parts(kind)
    made_ar.model(kind).save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    parts.image_processor.save_pretrained(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@every
def test_a_saved_folder_loads(kind, tmp_path):
    made = captum_dcam.load(saved(kind, tmp_path), cache="none", dtype=torch.float32)
    assert made.family == "autoregressive" and made.cache == "none"
    request = made.prepare([[made_ar.picture()]], [made_ar.PROMPT])
    t = made.generate(request, max_new_tokens=3)
    same = made_ar.adapter(kind, "none")
    assert torch.equal(t.tokens, same.generate(request, max_new_tokens=3).tokens)


def test_a_saved_chat_template_is_found(tmp_path):
    template = "{% for m in messages %}[{{ m['role'] }}]<image>{% endfor %}"
    made = captum_dcam.load(saved("llava", tmp_path, template))
    assert read(made, made.prepare([[made_ar.picture()]], ["a"])) == "[user]@"


def test_damaged_and_foreign_folders(tmp_path):
    saved("llava", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged"):
        captum_dcam.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="cannot be loaded"):
        captum_dcam.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    with pytest.raises(WeightsError, match="holds a qwen2: expected one of qwen2_vl"):
        captum_dcam.load(tmp_path, family="autoregressive")
    with pytest.raises(WeightsError, match="name a checkpoint"):
        captum_dcam.load("autoregressive")
