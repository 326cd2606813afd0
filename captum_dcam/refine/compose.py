r"""Refinements one after another, and the paper's own sequence."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_dcam.errors import InputTypeError
from captum_dcam.refine.akd import AKD
from captum_dcam.refine.base import RefineContext, Refinement, needs_of, over_grids
from captum_dcam.refine.cba import CBA
from captum_dcam.refine.checks import check_maps
from captum_dcam.refine.dacg import DACG
from captum_dcam.refine.normalise import MinMax
from captum_dcam.refine.sicd import SICD


@dataclass(frozen=True, repr=False)
class Compose:
    r"""Apply refinements in order, each to what the one before returned.

    Itself a refinement, so sequences nest. Without stages it returns maps as they are. Half
    precision is rounded to after every stage, since each returns its input's dtype.

    Args:
        stages (Sequence[Refinement]): objects with ``__call__(maps, context)`` and
            ``describe()``.

    Raises:
        TypeError: a stage is not a refinement.
    """

    stages: Sequence[Refinement]

    def __post_init__(self) -> None:
        if isinstance(self.stages, Refinement):
            raise InputTypeError(
                f"Compose: `stages` is one {type(self.stages).__name__}, expected a sequence: put "
                "it in a list."
            )
        object.__setattr__(self, "stages", tuple(self.stages))
        for index, stage in enumerate(self.stages):
            if isinstance(stage, type) or not isinstance(stage, Refinement):
                raise InputTypeError(
                    f"Compose: stages[{index}] is {stage!r}, expected a refinement, an object "
                    "with __call__(maps, context) and describe(): build it first (DACG(), not "
                    'DACG), or look it up, refinement("dacg").'
                )

    def __call__(self, maps: Tensor, context: RefineContext | None = None) -> Tensor:
        r"""Refine maps (..., H, W) stage by stage; every stage sees the same context."""
        return self.over((maps,), (context,))[0]

    def over(
        self, maps: Sequence[Tensor], contexts: Sequence[RefineContext | None]
    ) -> tuple[Tensor, ...]:
        r"""Refine maps (..., H, W) of several grids, one context each; a stage that works on all
        grids together is given all of them."""
        for one in maps:
            check_maps(one, "Compose", non_negative=False)
        for stage in self.stages:
            maps = over_grids(stage, maps, contexts)
        return tuple(maps)

    @property
    def needs(self) -> frozenset[str]:
        r"""What any of its stages needs, at any depth."""
        return frozenset[str]().union(*map(needs_of, self.stages))

    def describe(self) -> dict[str, Any]:
        r"""``{"name": "compose", "stages": [the stages' records]}``."""
        return {"name": "compose", "stages": [stage.describe() for stage in self.stages]}

    def __iter__(self) -> Iterator[Refinement]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    def __repr__(self) -> str:
        return f"Compose({list(self.stages)!r})"


def paper_refinements() -> Compose:
    r"""Min-max, AKD, DACG, CBA, min-max, SICD: the four modules at their defaults.

    The context must hold ``steps`` and ``image_size``; ``repeated_maps``, if there are any,
    normalised like the map SICD sees: ``min_max(repeated_maps)``.

    Returns:
        Compose: a new object; its settings are the defaults of the modules.

    Source:
        The modules are numbered so in Diffusion-CAM's Section 3.2 and Figure 2 draws them so; the
        min-max before (Section 3.2.3 wants a normalised map) and the one between CBA and SICD
        are where its reference code has them.

    Examples::

        >>> from captum_dcam.refine import RefineContext
        >>> refine = paper_refinements()
        >>> maps = torch.rand(2, 24, 24, generator=torch.Generator().manual_seed(0))
        >>> refine(maps, RefineContext(steps=32, image_size=(480, 640))).shape
        torch.Size([2, 24, 24])
    """
    return Compose([MinMax(), AKD(), DACG(), CBA(), MinMax(), SICD()])
