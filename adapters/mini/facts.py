"""What is known of the embedded model without importing torch."""

from __future__ import annotations

from typing import ClassVar

from captum_dcam.model.facts import Checkpoint, FamilyFacts, ModelFamily, declare


@declare
class MiniFamily(ModelFamily):
    """What ``MiniAdapter`` declares."""

    family: ClassVar[str] = "mini"
    facts: ClassVar[FamilyFacts] = FamilyFacts(
        checkpoints=(Checkpoint("mini", blocks=6),),
        turns=("{} <answer>",),
        rotary=(10_000.0,),
        notes=("trained on single questions: the turns of a conversation are joined to one",),
    )
