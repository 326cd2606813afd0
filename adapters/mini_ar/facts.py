"""What is known of the autoregressive twin without importing torch."""

from __future__ import annotations

from typing import ClassVar

from captum_dcam.model.facts import Checkpoint, FamilyFacts, ModelFamily, declare


@declare
class MiniTwinFamily(ModelFamily):
    """What ``MiniTwinAdapter`` declares."""

    family: ClassVar[str] = "mini_ar"
    facts: ClassVar[FamilyFacts] = FamilyFacts(
        checkpoints=(Checkpoint("mini_ar", blocks=6),),
        turns=("{} <answer>",),
        rotary=(10_000.0,),
        notes=(
            "the eyes are the embedded model's own, frozen; only the transformer was trained on, "
            "to write one word after another",
        ),
    )
