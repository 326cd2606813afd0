r"""Training of the embedded model: ``torchrun --nproc-per-node 2 -m benchmarks.mini.training``.

Run it from the root of the repository: with plain ``python -m`` on one GPU, or with one
single-threaded process per core on CPUs, which share the machine better than one process of many
threads. The result depends on the number of processes only by rounding.

Stages (see :data:`STAGES`): coarse (12×12 image tokens, pooled from the 24×24 stem), then fine
(24×24). Three of four steps pack many pairs behind one image; the fourth trains one pair per image
with the two deployed caches (none: full bidirectional attention; the prefix, bidirectional and
cached). Auxiliary losses ask the tower for the label of every patch, and the projected image
tokens, through the tied embedding, for their shape and colour words; both are annealed to zero
before the last stage begins.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import torch.distributed as dist
import typer
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from benchmarks.mini.batches import Masking, PackedScenes
from benchmarks.mini.trainer import Stage, Trainer
from captum_dcam.mini.loading import MiniImageProcessor
from captum_dcam.mini.modeling import MiniForMaskedDiffusion

TRAIN_SEED = 1_000_003  # the stream of training scenes; no other split uses it
BLOCKS = Masking(0.15, 0.55, (4, 8))  # nearer to how the model is decoded
DECODED = Masking(0.15, 0.7, (4,))

STAGES = (
    Stage("coarse", 2000, 2, 16, 2.0e-3, 1.619e-3, 1.0, 0.619),
    Stage("coarse, questions", 1000, 2, 16, 1.619e-3, 1.4e-3, 0.6, 0.5, 3.0),
    Stage("coarse, blocks", 500, 2, 16, 1.4e-3, 0.9e-3, 0.5, 0.4, 2.0, BLOCKS),
    Stage("fine", 300, 1, 16, 0.9e-3, 0.5e-3, 0.4, 0.0, 2.0, BLOCKS),
    Stage("fine, bare", 200, 1, 16, 0.5e-3, 0.25e-3, 0.0, 0.0, 2.0, BLOCKS),
    Stage("fine, descriptions", 450, 1, 16, 0.4e-3, 0.0, 0.0, 0.0, 0.7, DECODED, 4),
)
TEXT_BUDGET = 200


T = TypeVar("T", bound=Trainer)


def run(
    out: Path,
    seed: int,
    workers: int,
    stages: tuple[Stage, ...] = STAGES,
    kind: type[T] = Trainer,  # type: ignore[assignment]  # a default of a TypeVar
    scenes: type[PackedScenes] = PackedScenes,
    stream: int = TRAIN_SEED,
) -> T:
    """Train through all stages, resuming from ``out/checkpoint.pt`` when it is there."""
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    trainer = kind(seed, device)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
    first, scene = 0, 0
    for stage in stages:
        begin = max(trainer.step - first, 0)
        if begin < stage.steps:
            count = stage.steps * stage.batch
            data = scenes(
                trainer.tokenizer,
                stream + seed,
                scene + count,
                TEXT_BUDGET,
                stage.masking,
                stage.descriptions,
                stage.draws,
            )
            first_row = scene + begin * stage.batch + trainer.rank
            rows = Subset(data, range(first_row, scene + count, trainer.world))
            loader = DataLoader(rows, stage.batch // trainer.world, num_workers=workers)
            train_stage(trainer, stage, loader, begin, checkpoint, out / "log.csv")
        first, scene = first + stage.steps, scene + stage.steps * stage.batch
    return trainer


def train_stage(
    trainer: Trainer, stage: Stage, loader: DataLoader, begin: int, checkpoint: Path, log: Path
) -> None:
    """The steps of one stage, with a progress bar, a log line every 50 and a checkpoint every 200.

    The log's losses are those of the first process.
    """
    losses: list[float] = []
    tick = time.perf_counter()
    bar = tqdm(
        loader,
        desc=stage.name,
        initial=begin,
        total=stage.steps,
        mininterval=10,
        disable=trainer.rank > 0,
    )
    for offset, batch in enumerate(bar, start=begin):
        losses.append(trainer.update(batch, stage, offset / stage.steps))
        if trainer.step % 50 == 0 and trainer.rank == 0:
            mean = sum(losses) / len(losses)
            seconds = (time.perf_counter() - tick) / len(losses)
            bar.set_postfix(loss=f"{mean:.4f}")
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{stage.name},{trainer.step},{mean:.5f},{seconds:.3f}\n")
            losses, tick = [], time.perf_counter()
        if trainer.step % 200 == 0:
            trainer.save(checkpoint)
    trainer.save(checkpoint)


def main(
    out: Annotated[Path, typer.Option(help="Folder of checkpoint, log and weights.")],
    seed: Annotated[int, typer.Option(help="Seed of weights and scenes.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that draw scenes; 0: none.")] = 0,
) -> None:
    """Train the embedded model and write its weights to OUT/weights (safetensors, float16)."""
    trainer = run(out, seed, workers)
    if trainer.rank == 0:
        write(trainer, trainer.model, STAGES, seed, out)


def write(
    trainer: Trainer,
    model: MiniForMaskedDiffusion,
    stages: tuple[Stage, ...],
    seed: int,
    out: Path,
) -> None:
    """A trained model with its processor, in OUT/weights."""
    model.config.training_settings = {"seed": seed, "stages": [asdict(s) for s in stages]}
    model.half().save_pretrained(out / "weights")
    trainer.tokenizer.save_pretrained(out / "weights")
    MiniImageProcessor(model.config.image_size).save_pretrained(out / "weights")


if __name__ == "__main__":
    typer.run(main)
