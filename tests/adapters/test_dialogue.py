"""Which tokens of a prompt are what it says itself: numbers by hand, offsets of a tokenizer whose
tokens cross borders, and every family with its chat template."""

import functools
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from doubles import dream_vl, lavida_bound, llada_v, mmada, mmada_checks
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not

import made_ar
import made_diffusion_gemma as made_dg

import captum_dcam
from captum_dcam.adapters.common.dialogue import told_apart
from captum_dcam.adapters.common.loading import Parts
from captum_dcam.model.prompts import messages_of


def turns(*said):
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]


# -- numbers by hand -------------------------------------------------------------------------------


def marked(template, *said, system=None):
    """What a tokenizer of single letters is told, with the dialogue in capitals."""

    def ids_of(messages):
        texts = [(m["role"], "".join(p["text"] for p in m["content"])) for m in messages]
        return [ord(c) for c in template(texts)]

    messages = turns(*said)
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    ids, own = told_apart(messages_of(messages, ()), ids_of)
    return "".join(chr(i).upper() if o else chr(i) for i, o in zip(ids, own, strict=True))


def plain(texts):
    return "".join(f"[{role}:{text}]" for role, text in texts) + "[assistant:"


def trimmed(texts):
    return "".join(f"{role}: {text.strip()}\n" for role, text in texts)


def last_only(texts):
    return f"<{texts[-1][1]}>"


@pytest.mark.parametrize(
    ("found", "expected"),
    (
        (marked(plain, "what?"), "[user:WHAT?][assistant:"),
        (marked(plain, "user"), "[user:USER][assistant:"),
        (marked(plain, "assistant:user]["), "[user:ASSISTANT:USER][][assistant:"),
        (marked(plain, ""), "[user:][assistant:"),
        (marked(plain, " \n"), "[user: \n][assistant:"),
        (marked(plain, "a"), "[user:A][assistant:"),
        (marked(plain, "is"), "[user:IS][assistant:"),
        (marked(plain, "a is"), "[user:A IS][assistant:"),
        (marked(plain, " b c "), "[user: B C ][assistant:"),
        (marked(plain, "b", "b", "b"), "[user:B][assistant:B][user:B][assistant:"),
        (
            marked(plain, "user", "", "user", system="user"),
            "[system:user][user:USER][assistant:][user:USER][assistant:",
        ),
        (marked(trimmed, " user \n", "a\n", "s "), "user: USER\nassistant: A\nuser: S\n"),
        (marked(last_only, "x", "y", "z"), "<Z>"),
    ),
)
def test_the_letters_of_messages(found, expected):
    assert found == expected


def test_several_texts_of_one_message():
    """Images stand between them; the text between two is the template's on neither side."""
    content = [{"type": "text", "text": t} for t in ("b", "c")]
    messages = [{"role": "user", "content": [content[0], {"type": "image"}, content[1]]}]

    def ids_of(messages):
        return [ord(c) for p in messages[0]["content"] for c in p.get("text", "<img>\n")]

    ids, said = told_apart(messages, ids_of)
    assert "".join(map(chr, ids)) == "b<img>\nc"
    assert [k for k, own in enumerate(said) if own] == [0, 7]


# -- tokens across borders -------------------------------------------------------------------------

#: how Qwen's tokenizers cut: letters with one sign in front, signs with the line breaks behind
CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPOKEN = ("user", "ASSISTANT", " ", "\n", "a", "is", "what", ":", "?", "'s", "é", "漢", "🙂", "1")


@functools.cache
def byte_level():
    made = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(CUTS), "isolated")
    signs = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, signs])
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=signs.alphabet(), show_progress=False
    )
    made.train_from_iterator(["USER: what is\n\n a?\n ASSISTANT: 's user:\n"] * 3, trainer)
    return made


def written(messages):
    """A text, and from where to where its messages reach, without the blanks at their ends."""
    text, spans = "", []
    for m in messages:
        (part,) = m["content"]
        text += f"{m['role'].upper()}:"
        core = part["text"].strip()
        start = len(text) + part["text"].find(core)
        spans.append((start, start + len(core)))
        text += f"{part['text']}\n"
    return f"{text}ASSISTANT:", spans


def test_tokens_that_hold_a_letter_of_a_message():
    draw, tokenizer, across = random.Random(0), byte_level(), 0
    for _ in range(300):
        said = ["".join(draw.choices(SPOKEN, k=draw.randrange(6))) for _ in range(3)]
        messages = messages_of(turns(*said), ())
        ids, own = told_apart(messages, lambda m: tokenizer.encode(written(m)[0]).ids)
        text, spans = written(messages)
        read = tokenizer.encode(text)
        assert ids == read.ids
        for (first, last), mine in zip(read.offsets, own, strict=True):
            if text[first:last].strip():
                assert mine == any(first < b and last > a for a, b in spans if a < b), text
            across += any(first < a < last or first < b < last for a, b in spans if a < b)
    assert across > 100  # tokens that reach over a border


# -- families --------------------------------------------------------------------------------------


def said(made, request, example=0):
    """The dialogue's texts, run of neighbouring tokens by run."""
    at = request.dialogue[example].nonzero()[:, 0].tolist()
    assert request.dialogue.shape == (request.batch, request.layout.prefix_length)
    places, texts = (t.tolist() for t in made.prompt_tokens(request, example))
    ids, runs = dict(zip(places, texts, strict=True)), []
    for place in at:
        if not runs or place != runs[-1][-1] + 1:
            runs.append([])
        runs[-1].append(place)
    return ["".join(made.token_texts([ids[p] for p in run])).strip() for run in runs]


GEMMA = (
    "<bos>{% for m in messages %}<|turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% for c in m['content'] %}{{ '<|image|>' if c['type'] == 'image' else c['text'] | trim }}"
    "{% endfor %}<turn|>\n{% endfor %}{{ '<|turn>model\n' }}"
)
SIGNS = {"internvl": "<IMG_CONTEXT>", "llava": "<image>"}


def conversational(kind, template):
    if kind == "gemma":
        parts = Parts(made_dg.tokenizer(), made_dg.image_processor(), None, template and GEMMA)
        return captum_dcam.wrap(made_dg.model(), parts)
    if kind == "dream_vl":
        return captum_dcam.wrap(dream_vl.model(), dream_vl.processor())
    if not template:
        return made_ar.shared_adapter(kind)
    text = made_ar.chat_template(SIGNS.get(kind, made_ar.SIGN))
    if kind == "llava":  # its tokenizer has no markers of turns
        text = text.replace("<|im_start|>", "").replace("<|im_end|>", "</s>")
    return captum_dcam.wrap(made_ar.model(kind), replace(made_ar.parts(kind), chat_template=text))


@pytest.mark.parametrize("template", (True, False))
@pytest.mark.parametrize("kind", (*made_ar.KINDS, "gemma", "dream_vl"))
def test_families_that_read_conversations(kind, template):
    made, image = conversational(kind, template), made_ar.picture(size=(56, 56))
    speak = "user assistant" if kind != "gemma" else "user model"
    for prompt, expected in (
        ("what is red", ["what is red"]),
        (speak, [speak]),
        ("", []),
        (turns("what", "a red", "is"), ["what", "a red", "is"]),
        ([{"role": "system", "content": "is red"}, *turns("red")], ["red"]),
    ):
        assert said(made, made.prepare([[image]], [prompt])) == expected
    placed = [{"type": "text", "text": "what"}, {"type": "image"}, {"type": "text", "text": "is"}]
    placed += [{"type": "image"}, {"type": "text", "text": "red"}]
    request = made.prepare([[image, image]], [[{"role": "user", "content": placed}]])
    assert said(made, request) == ["what", "is", "red"]
    short = "what red is" if kind == "gemma" else "is"  # whose batches have prompts of one length
    batch = made.prepare([[image]] * 2, ["what is red", short])
    assert [said(made, batch, b) for b in (0, 1)] == [["what is red"], [short]]
    assert said(made, batch.single(1)) == [short]
    assert said(made, batch.rows([1, 0, 1], batch.pixels[[1, 0, 1]]), 2) == [short]


def test_places_of_a_question_in_qwens_template():
    """Behind it are an end of turn, a line break, a start of turn, nine letters, a line break; it
    is four letters, two words, a blank and a question mark."""
    made = conversational("qwen2_vl", True)
    request = made.prepare([[made_ar.picture()]], ["what is red ?"])
    end = request.layout.prefix_length - (3 + 9 + 1)
    assert request.dialogue[0].nonzero()[:, 0].tolist() == list(range(end - 8, end))
    assert len(made.prompt_tokens(request)[0]) == 57


def lavida():
    return lavida_bound.adapter("llada", system="what is a dog")


def llada():
    made = captum_dcam.wrap(llada_v.model(), llada_v.processor(), system="what is a dog")
    made.ids = llada_v.IDS
    return made


@pytest.mark.parametrize("make", (lavida, llada))
def test_families_that_pack_their_images(make):
    """The system prompt says what users say; a prompt may place its images. (Where the template
    writes the start token, the families' own code drops the first token behind every image.)"""
    made, image = make(), tiny.picture(0, (90, 70))
    for images, prompt, expected in (
        (1, "what is a dog", ["what is a dog"]),
        (1, "", []),
        (1, turns("what is", "a dog", "is"), ["what is", "a dog", "is"]),
        (1, "what <image>\nis", ["what", "is"]),
        (2, "<image>\nwhat is <image>\na dog", ["what is", "a dog"]),
        (2, "what", ["what"]),
    ):
        request = made.prepare([[image] * images], [prompt])
        assert said(made, request) == expected
        ids = made.embed(request.pixels, *request.extras).embeds.shape[1]
        assert request.dialogue.shape[1] == ids


def test_mmada_and_the_embedded_model():
    made = captum_dcam.wrap(
        mmada.model(), (mmada.tokenizer(), mmada.vq()), resolution=mmada_checks.SIDE
    )
    made.ids, made.marks = mmada.IDS, mmada.MARKS
    image = tiny.picture()
    for prompt, expected in (
        ("user assistant", ["user assistant"]),
        ("", []),
        (turns("what is", "a red", "user"), ["what is", "a red", "user"]),
    ):
        assert said(made, made.prepare([[image]], [prompt])) == expected
    mini = tiny.adapter("none")
    batch = mini.prepare([[image]] * 2, ["describe the image .", "image"])
    assert [said(mini, batch, b) for b in (0, 1)] == [["describe the image ."], ["image"]]
    told = [{"role": "system", "content": "describe the image"}, *turns("image", "red", "is")]
    assert said(mini, mini.prepare([[image]], [told])) == ["image red is"]
    assert not mini.prepare([[image]], [""]).dialogue.any()
    assert batch.dialogue.dtype == torch.bool
