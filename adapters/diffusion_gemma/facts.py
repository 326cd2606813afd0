"""What is known of DiffusionGemma without importing torch."""

from __future__ import annotations

from typing import ClassVar

from captum_dcam.model.facts import Checkpoint, FamilyFacts, ModelFamily, declare

CHECKPOINT = "google/diffusiongemma-26B-A4B-it"


@declare
class DiffusionGemmaFamily(ModelFamily):
    """What ``DiffusionGemmaAdapter`` declares."""

    family: ClassVar[str] = "diffusion_gemma"
    caches: ClassVar[tuple[str, ...]] = ("prefix",)
    facts: ClassVar[FamilyFacts | None] = FamilyFacts(
        checkpoints=(Checkpoint(CHECKPOINT, blocks=30),),
        transformers=">=5.23",
        turns=("<|turn>user\n{}<turn|>\n<|turn>model\n",),
        notes=(
            "there is no greedy mode: every generation needs a generator or a seed",
            "max_new_tokens is rounded up to whole canvases (256 tokens)",
            "generate ignores settings that it does not know (use_cache, do_sample, top_k, …) "
            "without a word; the adapter refuses them",
            "a forward with a two-dimensional mask, or none, lets image tokens see earlier ones "
            "only; generate and the adapter give the family's own masks",
            "diffusers' pipeline gives the encoder a flat mask and ends a canvas with what its "
            "last step drew; recorded by its step callback it does as generate",
            "routing to experts flips between types: replay in the type of the generation",
        ),
    )
