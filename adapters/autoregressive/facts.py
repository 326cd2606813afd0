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
            Checkpoint("Qwen/Qwen3.5-9B", blocks=32),
            Checkpoint("Qwen/Qwen3.5-27B", blocks=64),
            Checkpoint("llava-hf/llava-1.5-7b-hf", blocks=32),
            Checkpoint("llava-hf/llava-1.5-13b-hf", blocks=40),
            Checkpoint("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", blocks=24),
            Checkpoint("llava-hf/llava-onevision-qwen2-7b-ov-hf", blocks=28),
            Checkpoint("OpenGVLab/InternVL3-1B-hf", blocks=24),
            Checkpoint("OpenGVLab/InternVL3-8B-hf", blocks=28),
            Checkpoint("OpenGVLab/InternVL3-8B", blocks=28),
            # the last 18 blocks read the keys and values of earlier ones
            Checkpoint("google/gemma-4-E4B-it", blocks=42, deepest=22),
            Checkpoint("google/gemma-4-26B-A4B-it", blocks=30),
        ),
        transformers=">=5.23",
        turns=(
            CHATML_TURN,
            "USER: {} ASSISTANT:",
            "<|im_start|>user {}<|im_end|><|im_start|>assistant\n",
            "<|turn>user\n{}<turn|>\n<|turn>model\n",
            f"{CHATML_TURN}<think>\n\n</think>\n\n",
        ),
        # LLaVA; Qwen2, InternVL3; Qwen3; Qwen3.5; Gemma 4 has the first two
        rotary=(10_000.0, 1_000_000.0, 5_000_000.0, 10_000_000.0),
        notes=(
            "checkpoints whose generation_config samples (Qwen) decode greedily here unless "
            "do_sample or temperature asks for sampling; its repetition_penalty stays in force",
            "LLaVA-1.5 crops the centre: no token sees the sides of an image that is not square",
            "InternVL squashes the image to its canvas of tiles; the thumbnail has a grid of its "
            "own",
            "Qwen3-VL adds visual features behind its first blocks too: a tap there sees them "
            "incomplete",
            "LLaVA-OneVision cuts an image that is alone into tiles; of several images each is one "
            "view",
            "Qwen3.5 is asked to answer without thinking (enable_thinking=False); most of its "
            "blocks have linear attention, so methods that need attention weights are refused",
            "Gemma 4's small models end with blocks that read the keys and values of earlier ones: "
            "no tap behind the last but one of the others; it takes no video here",
            "in a batch Qwen3.5 and Gemma 4 need prompts of one length",
            "checkpoints of InternVL's own type (internvl_chat) are read into transformers' class "
            "where the language model is Qwen's or LLaMA's; their code does not run",
            "frames of a video are used as given; text and positions that tell the time assume 24 "
            "per second",
        ),
    )
