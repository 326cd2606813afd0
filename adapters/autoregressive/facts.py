"""What is known of the autoregressive models without importing torch."""

from __future__ import annotations

from typing import ClassVar

from captum_dcam.model.facts import CHATML_TURN, Checkpoint, FamilyFacts, ModelFamily, declare

CHECKPOINT = "Qwen/Qwen2.5-VL-3B-Instruct"


@declare
class AutoregressiveFamily(ModelFamily):
    """What ``AutoregressiveAdapter`` declares."""

    family: ClassVar[str] = "autoregressive"
    takes_video: ClassVar[bool] = True
    facts: ClassVar[FamilyFacts | None] = FamilyFacts(
        checkpoints=(
            Checkpoint("Qwen/Qwen2-VL-2B-Instruct", blocks=28),
            Checkpoint("Qwen/Qwen2-VL-7B-Instruct", blocks=28),
            Checkpoint(CHECKPOINT, blocks=36),
            Checkpoint("Qwen/Qwen2.5-VL-7B-Instruct", blocks=28),
            Checkpoint("Qwen/Qwen3-VL-4B-Instruct", blocks=36),
            Checkpoint("Qwen/Qwen3-VL-8B-Instruct", blocks=36),
            Checkpoint("llava-hf/llava-1.5-7b-hf", blocks=32),
            Checkpoint("llava-hf/llava-1.5-13b-hf", blocks=40),
            Checkpoint("OpenGVLab/InternVL3-1B-hf", blocks=24),
            Checkpoint("OpenGVLab/InternVL3-8B-hf", blocks=28),
        ),
        transformers=">=5.23",
        turns=(CHATML_TURN, "USER: {} ASSISTANT:"),
        rotary=(10_000.0, 1_000_000.0, 5_000_000.0),  # LLaVA; Qwen2, InternVL3; Qwen3
        notes=(
            "checkpoints whose generation_config samples (Qwen) decode greedily here unless "
            "do_sample or temperature asks for sampling; its repetition_penalty stays in force",
            "LLaVA-1.5 crops the centre: no token sees the sides of an image that is not square",
            "InternVL squashes the image to its canvas of tiles; the thumbnail has a grid of its "
            "own",
            "Qwen3-VL adds visual features behind its first blocks too: a tap there sees them "
            "incomplete",
            "frames of a video are used as given; text and positions that tell the time assume 24 "
            "per second",
        ),
    )
