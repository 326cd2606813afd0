r"""What every denoising step says of the words of an answer: a map of each, and its probability."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from captum_dcam.model.words import Target


@dataclass(frozen=True)
class StepMaps:
    r"""Maps of N words at S steps.

    Where a step does not compute all tokens of a word (they lie in another canvas; of a causal
    model, before their turn), its map and peak are 0 and its probability is NaN.

    Args:
        targets (tuple of Target): what was explained, in order.
        maps (tuple of Tensor): one (S, N, h, w) float32 per grid, refined as maps of words are.
            Scaled over a word's steps together: the maximum of a step's map is its peak over the
            word's highest peak, 0 to 1, so that one sees when the evidence appears. (Refinements
            stretch every map to its own maximum; then a step at which the image says nothing of the
            word yet would look like the one that decides.)
        peaks (tuple of Tensor): one (S, N) per grid: the maximum of each map before refinements.
        probabilities (Tensor): (S, N) float32, of the word's least sure token, as the step's logits
            have it.
    """

    targets: tuple[Target, ...]
    maps: tuple[Tensor, ...]
    peaks: tuple[Tensor, ...]
    probabilities: Tensor

    @property
    def words(self) -> tuple[str, ...]:
        """Text of every target."""
        return tuple(t.text for t in self.targets)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names that files have for them."""
        out = {"steps.probabilities": self.probabilities}
        for i, (maps, peaks) in enumerate(zip(self.maps, self.peaks, strict=True)):
            out[f"steps.maps.{i}"], out[f"steps.peaks.{i}"] = maps, peaks
        return out


def read_steps(
    tensors: dict[str, Tensor], targets: tuple[Target, ...], grids: int
) -> StepMaps | None:
    """The step maps of a saved explanation; None where it has none."""
    if "steps.probabilities" not in tensors:
        return None
    return StepMaps(
        targets,
        tuple(tensors[f"steps.maps.{i}"] for i in range(grids)),
        tuple(tensors[f"steps.peaks.{i}"] for i in range(grids)),
        tensors["steps.probabilities"],
    )
