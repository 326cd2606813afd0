"""What is known of Dream-VL without importing torch."""

from __future__ import annotations

from typing import ClassVar

from captum_dcam.model.facts import CHATML_TURN, Checkpoint, FamilyFacts, ModelFamily, declare

CHECKPOINT = "Dream-org/Dream-VL-7B"


@declare
class DreamVLFamily(ModelFamily):
    """What ``DreamVLAdapter`` declares."""

    family: ClassVar[str] = "dream_vl"
    caches: ClassVar[tuple[str, ...]] = ("none",)
    takes_video: ClassVar[bool] = True
    facts: ClassVar[FamilyFacts | None] = FamilyFacts(
        checkpoints=(Checkpoint(CHECKPOINT, blocks=28), Checkpoint("rp-yu/Dimple-7B", blocks=28)),
        transformers=">=4.46",
        remote_code=True,
        turns=(CHATML_TURN,),
        rotary=(1_000_000.0,),
        # vl/README.md
        decodings={
            "demo": {
                "max_new_tokens": 128,
                "steps": 128,
                "temperature": 0.1,
                "top_p": 1,
                "alg": "maskgit_plus",
                "alg_temp": 0,
            },
            # Dimple's page, but for its prompt cache
            "dimple": {
                "max_new_tokens": 64,
                "steps": 64,
                "temperature": 0.2,
                "top_p": 0.95,
                "alg": "origin",
                "alg_p_threshold": 0.95,
                "use_original_confidence": True,
                "decoding_pipeline": "dim",
            },
        },
        notes=(
            "its code comes with the checkpoint: load needs trust_remote_code=True",
            "upstream decodes with temperature 1.0, top_k 50, 512 steps and alg origin unless told "
            "otherwise; here greedy maskgit_plus with a step per token",
            "the prompt cache fails upstream: use_cache=True is refused",
            "the first steps can fill no token: a step fills int(m (1 - s/t)) of m masks",
            "examples of a batch are decoded one by one: upstream ranks them together",
            "Dimple is this language model with Qwen2-VL's tower and format, and its own settings "
            '(decoding="dimple"); its prompt cache is not replayed: use_cache=True is refused',
        ),
    )
