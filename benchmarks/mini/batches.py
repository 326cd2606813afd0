r"""The tokenizer, and training batches: scenes with question–answer pairs, masked at random.

One image's tokens are computed once and shared by all of its pairs: the pairs are packed behind
them into one sequence in which no pair sees another. Every batch is a function of
``(seed, step)``, so that a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Punctuation, Sequence, WhitespaceSplit
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from captum_dcam.data.scenes import COLORS, PATCH, PROMPTS, SHAPES, Scene, make_scene, vocabulary

SPECIAL = ("<pad>", "<mask>", "<eos>", "<image>", "<answer>", "<unk>")
#: how often a kind of question is drawn, relative to the others of its scene
KIND_WEIGHTS = {"exist": 3.0, "color": 2.5, "shape": 1.0, "count": 1.0, "relation": 1.0}
ANSWER_CANVAS = 8
DESCRIPTION_CANVASES = (16, 24, 32)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level fast tokenizer; special tokens first, then the words in alphabetical order."""
    words = [*SPECIAL, *vocabulary()]
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = Lowercase()
    core.pre_tokenizer = Sequence([WhitespaceSplit(), Punctuation()])
    core.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        mask_token="<mask>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "answer_token": "<answer>"},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt (ending in ``<answer>``) and of a canvas (answer, then ``<eos>``)."""

    prompt: list[int]
    canvas: list[int]


class PairMaker:
    """Turns scenes into question–answer pairs of token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.eos = tokenizer.eos_token_id
        self.answer = tokenizer.convert_tokens_to_ids("<answer>")

    def pair(self, prompt: str, answer: str, canvas: int) -> Pair:
        ids = self.tokenizer(answer)["input_ids"]
        question = self.tokenizer(prompt)["input_ids"] + [self.answer]
        return Pair(question, ids + [self.eos] * (canvas - len(ids)))

    def description(self, scene: Scene, wording: str, rng: np.random.Generator) -> Pair:
        text = scene.captions[wording]
        fitting = [c for c in DESCRIPTION_CANVASES if c > len(text.split())]
        prompt = str(rng.choice(PROMPTS[wording]))
        return self.pair(prompt, text, int(rng.choice(fitting)))

    def question(self, scene: Scene, rng: np.random.Generator) -> Pair:
        bank = scene.questions
        weights = np.array([KIND_WEIGHTS[kind] for kind, _, _ in bank])
        _, question, answer = bank[rng.choice(len(bank), p=weights / weights.sum())]
        return self.pair(question, answer, ANSWER_CANVAS)

    def pairs(
        self, scene: Scene, rng: np.random.Generator, budget: int, descriptions: int
    ) -> list[Pair]:
        """``original`` descriptions but for one of any wording, then questions up to ``budget``."""
        out = [self.description(scene, "original", rng) for _ in range(descriptions - 1)]
        out.append(self.description(scene, str(rng.choice(tuple(PROMPTS))), rng))
        used = sum(len(p.prompt) + len(p.canvas) for p in out)
        while True:
            pair = self.question(scene, rng)
            used += len(pair.prompt) + len(pair.canvas)
            if used > budget:
                return out
            out.append(pair)


@dataclass(frozen=True)
class Masking:
    r"""How canvases are masked.

    Args:
        low (float): ratios come from U(low, 1).
        block_share (float): share of descriptions in a semi-autoregressive state.
        blocks (tuple of int): block lengths to draw from.
    """

    low: float
    block_share: float
    blocks: tuple[int, ...]


def mask_positions(length: int, rng: np.random.Generator, masking: Masking) -> np.ndarray:
    """Which canvas positions are masked: a random ratio, sometimes block by block.

    15 % of canvases are fully masked (the first step of decoding). In a semi-autoregressive state,
    earlier blocks are revealed and later ones masked.
    """
    if rng.random() < 0.15:
        return np.ones(length, dtype=bool)
    hidden = rng.random(length) < rng.uniform(masking.low, 1)
    if length > ANSWER_CANVAS and rng.random() < masking.block_share:
        block = int(rng.choice(masking.blocks))
        start = block * int(rng.integers(0, length // block))
        hidden[:start] = False
        hidden[start + block :] = True
    if not hidden.any():
        hidden[rng.integers(length)] = True
    return hidden


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Shape and colour class of every patch, (24, 24) int64; 0 is background."""
    n = scene.pixels.shape[0] // PATCH
    shapes = np.zeros((n, n), dtype=np.int64)
    colors = np.zeros((n, n), dtype=np.int64)
    for item in scene.objects:
        inside = item.mask.reshape(n, PATCH, n, PATCH).mean((1, 3)) >= 0.3
        shapes[inside] = 1 + SHAPES.index(item.shape)
        colors[inside] = 1 + list(COLORS).index(item.color)
    return shapes, colors


def likeness(scene: Scene) -> int:
    """How often two objects of a scene have one colour or one shape: what answers mix up."""
    pairs = itertools.combinations(scene.objects, 2)
    return sum((a.color == b.color) + (a.shape == b.shape) for a, b in pairs)


class PackedScenes(Dataset):
    """Item ``i``: scene i of the stream with packed pairs; text padded to ``budget`` tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        length: int,
        budget: int,
        masking: Masking,
        descriptions: int = 2,
        draws: int = 1,
    ) -> None:
        self.maker = PairMaker(tokenizer)
        self.descriptions, self.draws = descriptions, draws
        self.mask_id = tokenizer.mask_token_id
        self.seed, self.length, self.budget, self.masking = seed, length, budget, masking

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene = self._scene(index)
        rng = np.random.default_rng([self.seed, index, 2])
        shapes, colors = patch_labels(scene)
        item = self._pack(self.maker.pairs(scene, rng, self.budget, self.descriptions), rng)
        item.update(pixels=scene.pixels, shapes=shapes, colors=colors)
        return {name: torch.as_tensor(value) for name, value in item.items()}

    def _scene(self, index: int) -> Scene:
        """Scene ``index``; with ``draws``, every other one is the most confusing of so many."""
        if self.draws == 1 or index % 2:
            return make_scene(self.seed, index)
        numbers = range(index // 2 * self.draws, (index // 2 + 1) * self.draws)
        return max((make_scene(self.seed + 1, n) for n in numbers), key=likeness)

    def _pack(self, pairs: list[Pair], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """ids, targets (-100: no loss), pair (-1: padding), response flag and position offset."""
        columns: dict[str, list] = {k: [] for k in ("ids", "targets", "pair", "response", "offset")}
        for number, pair in enumerate(pairs):
            p, c = np.array(pair.prompt), np.array(pair.canvas)
            hidden = mask_positions(len(c), rng, self.masking)
            columns["ids"] += [p, np.where(hidden, self.mask_id, c)]
            columns["targets"] += [np.full(len(p), -100), np.where(hidden, c, -100)]
            columns["pair"].append(np.full(len(p) + len(c), number))
            columns["response"] += [np.zeros(len(p), bool), np.ones(len(c), bool)]
            columns["offset"].append(np.arange(len(p) + len(c)))
        return packed(columns, self.budget)


def packed(columns: dict[str, list], budget: int) -> dict[str, np.ndarray]:
    """The parts of every column in one row each, filled up to ``budget`` tokens."""
    fill = {"ids": 0, "targets": -100, "pair": -1, "response": False, "offset": 0}
    out = {}
    for name, parts in columns.items():
        joined = np.concatenate(parts)
        pad = np.full(budget - len(joined), fill[name], dtype=joined.dtype)
        out[name] = np.concatenate([joined, pad])
    return out


def packed_mask(pair: Tensor, response: Tensor, image_tokens: int) -> Tensor:
    """Attention of packed text (B, 1, T, N + T): the image, its own prompt, responses their own."""
    same = (pair[:, :, None] == pair[:, None, :]) & (response[:, :, None] | ~response[:, None, :])
    image = torch.ones(*pair.shape, image_tokens, dtype=torch.bool, device=pair.device)
    return torch.cat((image, same), dim=2)[:, None]
