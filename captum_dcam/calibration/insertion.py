r"""Words without masks, scored by what the model does: the area under their insertion curve.

The image is emptied and comes back patch by patch, those with the highest map first; a map is good
if the word becomes probable early. No mask is needed, and the curve is the evaluations' own (the
mean colour stands for what is missing). Pixels are edited, not tokens at the tapped block: both
take the same passes, edits of pixels are the same for every block, so that blocks can be compared,
and the blocks below the tap have not mixed the tokens yet.

The curve sees a map's order alone: what keeps the order, such as affinity's ``square``, it cannot
fit. Where words are probable as soon as the first patches are there, it tells no maps apart.

Every setting costs about eight forward passes per word, and no setting is measured twice. There are
at most as many as the parameters' few values together (ten), on every block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_dcam import checks
from captum_dcam.calibration.maps import Batch, Collection, base_maps, gathered
from captum_dcam.errors import InputError, TargetError
from captum_dcam.evaluation.trial import derived_seed
from captum_dcam.faithfulness import insertion
from captum_dcam.methods.meter import metered
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.images import as_image
from captum_dcam.model.progress import ProgressLike
from captum_dcam.model.tagging import DEFAULT_TAGGER
from captum_dcam.model.words import Target, resolve
from captum_dcam.presets import Preset

#: which words are explained: nouns by the tagger, or every word
WORDS = ("nouns", "all")


@dataclass(frozen=True, eq=False)
class Answered(Batch):
    r"""Words of one image's answer, scored by insertion.

    Args:
        forward (DenoisingForward): bound to the answer.
        targets (tuple of Target): N words.
    """

    columns = ("insertion",)
    objective = "insertion"
    labelled = False
    least = (4, 8)

    forward: DenoisingForward
    targets: tuple[Target, ...]

    def scores(self, maps: Sequence[Tensor], at: list[int]) -> tuple[Tensor, int]:
        """Area under the insertion curve of :func:`captum_dcam.faithfulness.insertion`, each word
        alone, so that equal values come in the same order whatever is scored with it."""
        with metered(self.forward) as cost:
            areas = [
                insertion(
                    self.forward, [self.targets[i]], [m[i : i + 1] for m in maps], controls=0
                ).auc
                for i in at
            ]
        return torch.stack(areas), cost.forwards

    @property
    def nbytes(self) -> int:
        """With the pixels."""
        return super().nbytes + int(self.forward.request.pixels.nbytes)


def collect_answers(
    adapter: Adapter,
    data: Any,
    ids: Iterable[Any],
    preset: Preset,
    *,
    words: str = "nouns",
    layer: int | None = None,
    prompt: str | None = None,
    generation: dict[str, Any] | None = None,
    seed: int = 0,
    progress: ProgressLike = None,
) -> Collection:
    r"""Base maps of the words of the model's own answers, for a fit without masks.

    Args:
        adapter, data, ids, preset, layer, prompt, generation, seed, progress: as
            :func:`~captum_dcam.calibration.collect`; the data's objects are not looked at.
        words (str, optional): one of :data:`WORDS`. Default: ``"nouns"``

    Returns:
        Collection: of :class:`Answered`, one per image that has such a word; each keeps its image
        and its answer.

    Raises:
        CalibrationError: as :func:`~captum_dcam.calibration.collect`.
        InputError: other words.
    """
    checks.choice("words", words, WORDS)
    listed = tuple(ids)

    def read(number: int, image_id: Any) -> Answered | None:
        sample = data.sample(image_id)
        asked = sample.prompt if prompt is None else prompt
        if asked is None:
            raise InputError("the data set has no prompt for it: give one (--prompt)")
        forward = DenoisingForward(adapter, layer)
        request = adapter.prepare([[as_image(sample.image(), upright=False)]], [asked])
        generator = torch.Generator().manual_seed(derived_seed(seed, image_id, "answer"))
        trajectory = forward.generate(
            request, keep=False, generator=generator, **(generation or {})
        )
        try:
            targets = resolve(adapter, trajectory.tokens[0].tolist(), words, DEFAULT_TAGGER)
        except TargetError:  # an answer without such a word says nothing about maps
            return None
        maps, contexts = base_maps(forward, targets, preset)
        numbers = torch.full((len(targets),), number)
        # a forward that remembers no states: those that count are in the contexts
        return Answered(maps, numbers, contexts, forward.again(), targets)

    what = "is a noun" if words == "nouns" else "can be explained"
    batches = tuple(gathered(read, listed, what, progress))
    return Collection(batches, listed, adapter.check_layer(layer))
