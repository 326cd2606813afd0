"""Training resumes to the bit, at the end of a stage and in the middle of one."""

import functools

import tiny
import torch

from benchmarks.mini import trainer
from benchmarks.mini.trainer import Stage, Trainer
from benchmarks.mini.training import run
from captum_dcam.mini.configuration import MiniConfig

STAGES = (
    Stage("one", 3, 2, 2, 1e-3, 5e-4, 0.5, 0.2),
    Stage("two", 1, 2, 2, 5e-4, 0.0, 0.0, 0.0),
)


def test_resumed_training_gives_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "WARMUP", 2)
    monkeypatch.setattr(trainer, "MiniConfig", functools.partial(MiniConfig, **tiny.SHAPE))
    parts = {after: tmp_path / f"after {after}" for after in (2, 3)}
    update = Trainer.update

    def kept(self, *args):
        """Leaves what a run that ended there would leave."""
        loss = update(self, *args)
        if self.step in parts:
            parts[self.step].mkdir()
            self.save(parts[self.step] / "checkpoint.pt")
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", kept)
        whole = run(tmp_path / "whole", 0, 0, STAGES)
    assert whole.step == 4
    for after, folder in parts.items():
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert checkpoint["step"] == after
        resumed = run(folder, 0, 0, STAGES)
        assert resumed.step == 4 and not list(folder.glob("*.tmp"))
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), (after, name)
    first = Trainer(0, torch.device("cpu")).model.state_dict()
    moved = [n for n, v in whole.model.state_dict().items() if not torch.equal(v, first[n])]
    assert len(moved) > 0.9 * len(first)
