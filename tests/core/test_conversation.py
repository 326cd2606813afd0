"""Conversations and videos: one form inside, errors that teach at the boundary."""

from dataclasses import dataclass

import pytest
import tiny
from PIL import Image

import captum_dcam
from captum_dcam.model.prompts import Video, messages_of, summary


@dataclass
class Shown:
    video: bool = False


PICTURE, VIDEO = Shown(), Shown(True)
TALK = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "what is this ?"},
    {"role": "assistant", "content": [{"type": "text", "text": "a circle"}]},
    {"role": "user", "content": [{"type": "text", "text": "what"}, {"type": "text", "text": "?"}]},
]


def text(value):
    return {"type": "text", "text": value}


def test_a_string_is_one_message_behind_its_pictures():
    (message,) = messages_of("what ?", [PICTURE, VIDEO])
    assert message["role"] == "user"
    assert message["content"] == [{"type": "image"}, {"type": "video"}, text("what ?")]
    assert messages_of("", [PICTURE])[0]["content"] == [{"type": "image"}, text("")]


def test_pictures_stand_in_front_of_the_first_user_message_or_where_they_are_placed():
    made = messages_of(TALK, [PICTURE])
    assert [m["role"] for m in made] == ["system", "user", "assistant", "user"]
    assert [[p["type"] for p in m["content"]] for m in made] == [
        ["text"],
        ["image", "text"],
        ["text"],
        ["text", "text"],
    ]
    placed = [{"role": "user", "content": [text("a"), {"type": "image"}, text("b")]}]
    assert messages_of(placed, [PICTURE])[0]["content"] == placed[0]["content"]


def test_what_was_given_is_not_changed():
    given = [{"role": "user", "content": [text("a")]}]
    messages_of(given, [PICTURE])[0]["content"][1]["text"] = "changed"
    assert given == [{"role": "user", "content": [text("a")]}]


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    (
        (5, TypeError, "the prompt is a int: expected a string"),
        (["what ?"], TypeError, "the prompt is a list"),
        ([], ValueError, "ends with nothing"),
        (TALK[:3], ValueError, "ends with assistant"),
        ([{"role": "human", "content": ""}], ValueError, "role 'human'"),
        ([{"content": ""}], ValueError, "role None"),
        ([{"role": "user", "content": None}], TypeError, "content is a NoneType"),
        ([{"role": "user", "content": ["a"]}], ValueError, "part 'a'"),
        ([{"role": "user", "content": [{"type": "audio"}]}], ValueError, "expected type text"),
        ([{"role": "user", "content": [{"type": "text"}]}], ValueError, "has no text"),
        (
            [{"role": "assistant", "content": [{"type": "image"}]}, TALK[1]],
            ValueError,
            "images belong to user messages",
        ),
        (
            [{"role": "user", "content": [{"type": "image"}] * 2}],
            ValueError,
            r"places \['image', 'image'\], but \['image'\] were given",
        ),
        (
            [{"role": "user", "content": [{"type": "video"}]}],
            ValueError,
            r"places \['video'\]",
        ),
    ),
)
def test_prompts_that_cannot_be(prompt, error, message):
    with pytest.raises(error, match=message):
        messages_of(prompt, [PICTURE])


def test_summary():
    assert summary("what ?") == "what ?"
    lines = "system: be short\nuser: what is this ?\nassistant: a circle\nuser: what?"
    assert summary(TALK) == lines


def test_video():
    frames = [tiny.picture(seed) for seed in range(3)]
    video = Video(iter(frames))
    assert isinstance(video, tuple) and list(video) == frames
    with pytest.raises(TypeError, match="frame 1 is a int"):
        Video([frames[0], 7])
    with pytest.raises(ValueError, match="a video has no frame"):
        Video([])
    with pytest.raises(ValueError, match=r"of sizes \[\(5, 5\), \(80, 60\)\]"):
        Video([frames[0], Image.new("RGB", (5, 5))])


def test_the_embedded_model_reads_all_turns_and_takes_no_video(cache):
    made = tiny.adapter(cache)
    picture = tiny.picture()
    talk = captum_dcam.explain(made, picture, TALK, [0], gen_length=4)
    joined = "be short what is this ? a circle what ?"
    plain = captum_dcam.explain(made, picture, joined, [0], gen_length=4)
    assert (talk.maps[0] == plain.maps[0]).all() and talk.prompt == summary(TALK)
    video = Video([picture] * 2)
    for call in (captum_dcam.explain, captum_dcam.compare):
        with pytest.raises(ValueError, match="example 0 has a video: mini takes none"):
            call(made, video, "")
    with pytest.raises(ValueError, match=r"2 lists of images for 1 prompts"):
        made.prepare([[picture]] * 2, [""])


def test_what_a_family_does_not_take_is_refused():
    class Narrow(type(tiny.adapter("none"))):
        batches = several_images = False

    made = Narrow(tiny.model(), tiny.processor())
    one = tiny.picture()
    with pytest.raises(ValueError, match="a batch of 2 examples: mini runs one at a time"):
        made.prepare([[one], [one]], ["", ""])
    with pytest.raises(ValueError, match="example 0 has 2 images: mini takes one"):
        made.prepare([[one, one]], [""])
