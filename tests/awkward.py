"""Bound generations in which nothing is as simple as it mostly is.

Two examples differ in all that a batch allows: pictures, lengths of their questions, answers, and
the order in which these are written. Every picture has two grids of different shapes. Answers have
function words twice, plurals, a word of two tokens, and ends with text behind them. So whoever
takes example 0, grid 0, the first token, the row beside or the batch's longest prompt for what is
meant gets other numbers than the example alone.

========== ======================== ======== ======= ===========================================
family     model                    examples caches  grids
========== ======================== ======== ======= ===========================================
mini       the tiny one             2        both    (5, 6) and (3, 8) of one picture, gaps between
lavida     Dream: p from p - 1      1        both    base view and mosaic of one picture
causal     Qwen2-VL: p from p - 1   2        both    of two pictures of different sizes
========== ======================== ======== ======= ===========================================

Everything is shared between tests: read, and change nothing.
"""

import functools
import sys
from dataclasses import replace
from pathlib import Path

import tiny
import torch
from doubles import lavida as lavida_double

from captum_dcam.adapters.autoregressive import AutoregressiveAdapter
from captum_dcam.adapters.common.visuals import pixel_cells
from captum_dcam.adapters.lavida import LavidaAdapter
from captum_dcam.adapters.mini import MiniAdapter
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.layout import Grid, Layout, uniform_grid
from captum_dcam.model.trajectory import Trajectory

sys.path.insert(0, str(Path(__file__).parent / "adapters"))  # importlib mode does not

import made_ar

FAMILIES = ("mini", "lavida", "causal")
CACHES = tiny.CACHES
#: how many examples a family's batch has
BATCH = {"mini": 2, "lavida": 1, "causal": 2}
#: families that predict position p from p - 1
SHIFTED = ("lavida", "causal")
LAYER = 1
SIZE = (80, 60)

#: tokens of the answers; "s" ends the word before it
ANSWERS = {
    "mini": (
        "a red circle and a star s <eos> two hearts in the".split(),
        "of the moon s of <eos> <pad> the five rings . <eos>".split(),
        "two red circle s and a star <eos> no heart . <eos>".split(),  # no word stands twice
    ),
    "lavida": ("a red dog s on a mat <|eos|> on the cats <|eos|>".split(),),
    "causal": (
        " a/ red/ circle/s/ is/ a/<|im_end|>/ blue/ square/s".split("/"),
        " the/ image/ is/ red/s/ the/<|im_end|>/<|endoftext|>/ a/ what".split("/"),
    ),
}
PROMPTS = {
    "mini": ("what is this ?", "describe the image in detail .", "list the objects ."),
    "lavida": ("what is this ?",),
    "causal": ("what is red ?", "the image is what circle ?"),
}
#: the step at which example b's token t is written: (factor · t + shift) modulo their number; a
#: causal model has no choice
ORDERS = {"mini": ((5, 1), (7, 3), (11, 2)), "lavida": ((5, 2),), "causal": ((1, 0), (1, 0))}


# -- adapters whose answers are dictated -----------------------------------------------------------


class Dictated:
    """Writes, to a known prompt, the answer that is dictated, as it would be forced: every token in
    a state of its own in which the others are seen. Other prompts get the first answer."""

    #: family's name in the tables above
    kind: str
    #: the family keeps no outputs of its calls, see :class:`Trajectory`
    own_calls = False

    def answer(self, prompt):
        """Ids of the answer, and the step at which each is written."""
        known = PROMPTS[self.kind]
        number = known.index(prompt) if prompt in known else 0
        ids = [self.id_of(text) for text in ANSWERS[self.kind][number]]
        factor, shift = ORDERS[self.kind][number]
        return ids, [(factor * t + shift) % len(ids) for t in range(len(ids))]

    def generate(self, request, *, generator=None, **_settings):
        ids, orders = zip(*map(self.answer, request.prompts), strict=True)
        tokens, commits = torch.tensor(ids), torch.tensor(orders)
        examples, own = torch.arange(len(tokens)), commits.argsort(1).T  # (S, B): token of a step
        states = tuple(s[own, examples] for s in self.forced_states(tokens))
        memory, confidence = self.prefill(self.embed(request.pixels, *request.extras)), []
        with torch.no_grad():
            for step, at in enumerate(own):
                logits = self.denoise(memory, *(s[step] for s in states))
                odds = logits[examples, at].double().softmax(-1)
                confidence.append(odds[examples, tokens[examples, at]])
        length, count = request.layout.prefix_length, tokens.shape[1]
        cached = self.cache == "prefix"
        lengths = (length, *[count] * count) if cached else (length + count,) * count
        return Trajectory(
            tokens=tokens,
            states=states,
            final_state=self.visible_state(tokens),
            commit_step=commits,
            confidence=torch.stack(confidence, 1).gather(1, commits).float(),
            cache=self.cache,
            image_end=request.layout.image_end,
            settings={},
            own_calls=self.own_calls,
            lengths=lengths if self.own_calls else (),
        )


class Mini(Dictated, MiniAdapter):
    """The tiny model; of its 8 x 8 tokens 5 x 6 and, below, 3 x 8 count, so that there are gaps in
    the sequence and a corner of the picture that no token shows. "six" reads as the ending "s"."""

    kind = "mini"

    def id_of(self, text):
        return self.processor.tokenizer.convert_tokens_to_ids("six" if text == "s" else text)

    def token_texts(self, ids):
        return ["s" if t == " six" else t for t in super().token_texts(ids)]

    def prepare(self, images, prompts):
        made = super().prepare(images, prompts)
        size, side = made.layout.grids[0].image_size, tiny.SIDE
        whole = uniform_grid(0, (side, side), size)
        parts = ((slice(0, 5), slice(0, 6)), (slice(5, 8), slice(0, 8)))
        grids = tuple(
            Grid(
                whole.positions[rows, columns] + image * side * side,
                whole.x_edges[columns],
                whole.y_edges[rows],
                made.layout.grids[image].image_size,
                image,
            )
            for image in range(len(images[0]))
            for rows, columns in parts
        )
        return replace(made, layout=Layout(grids, made.layout.prefix_length))

    def pixel_tokens(self, request):
        side, count = tiny.SIDE, len(request.images[0])
        own = torch.full((count * side * side,), -1)
        at = torch.cat([g.positions.flatten() for g in request.layout.grids])
        own[at] = torch.arange(len(at))
        pixels = self.model.config.image_size // side
        return own[pixel_cells(count, side, pixels)].expand(1, -1, 3, -1, -1)


class LavidaTokenizer(lavida_double.Tokenizer):
    """With an ending, and a plural of one token."""

    extra = {80: "s", 81: " cats"}  # noqa: RUF012

    def decode(self, ids, **options):
        parts = (self.extra.get(int(i)) or lavida_double.Tokenizer.decode(self, [i]) for i in ids)
        return "".join(parts)


class Lavida(Dictated, LavidaAdapter):
    kind = "lavida"

    @property
    def own_calls(self):
        return self.cache == "prefix"

    def id_of(self, text):
        own = {word.strip(): i for i, word in LavidaTokenizer.extra.items()}
        return own[text] if text in own else self.encode(text)[0]


class Causal(Dictated, AutoregressiveAdapter):
    kind = "causal"
    own_calls = True

    def id_of(self, text):
        (number,) = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return number


@functools.cache
def _parts(family, dtype):
    """Model and processor."""
    if family == "mini":
        return tiny.model(dtype=dtype), tiny.processor()
    if family == "lavida":
        processor = lavida_double.processor()
        return lavida_double.model("dream", dtype=dtype), (LavidaTokenizer(), *processor[1:])
    return made_ar.model("qwen2_vl", dtype=dtype), made_ar.parts("qwen2_vl")


def adapter(family="mini", cache="prefix", dtype=torch.float32):
    """A new adapter of the shared model."""
    if family == "lavida":
        return Lavida(*_parts(family, dtype), cache, system=None)
    return {"mini": Mini, "causal": Causal}[family](*_parts(family, dtype), cache)


# -- what is shown ---------------------------------------------------------------------------------


def pictures(family="mini", example=0):
    """Pictures of an example."""
    if family == "mini":
        return [tiny.picture(10 + example, SIZE)]
    if family == "lavida":
        return [tiny.picture(20 + example, (160, 120))]
    return [made_ar.picture(30 + example, (40, 24)), made_ar.picture(40 + example, (24, 32))]


def _bound(family, cache, layer, dtype, examples, keep):
    forward = DenoisingForward(adapter(family, cache, dtype), layer)
    shown = [pictures(family, b) for b in examples]
    request = forward.adapter.prepare(shown, [PROMPTS[family][b] for b in examples])
    forward.generate(request, keep=keep)
    return forward


@functools.cache
def bound(
    family="mini", cache="prefix", layer=LAYER, dtype=torch.float32, keep=True, examples=None
):
    """A forward with the bound batch, or one of other examples (the tiny model has a third)."""
    chosen = range(BATCH[family]) if examples is None else examples
    return _bound(family, cache, layer, dtype, chosen, keep)


@functools.cache
def alone(family="mini", cache="prefix", example=0, layer=LAYER, dtype=torch.float32, keep=True):
    """A forward with one example that was prepared and generated without the others."""
    return _bound(family, cache, layer, dtype, [example], keep)


def batches():
    """(family, cache, example) of every example above."""
    return [(f, c, b) for f in FAMILIES for c in CACHES for b in range(BATCH[f])]


def question(forward):
    """Numbers, among the text tokens of a prompt, of its question's: found where the ids stand that
    the question has alone. It has a template before and behind it, but for the tiny model."""
    ids = forward.adapter.prompt_tokens(forward.request)[1].tolist()
    own = forward.adapter.encode(forward.request.prompts[0])
    (start,) = (k for k in range(len(ids)) if ids[k : k + len(own)] == own)
    return list(range(start, start + len(own)))
