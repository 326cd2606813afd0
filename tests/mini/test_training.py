"""Training resumes to the bit, at the end of a stage and in the middle of one."""

import functools

import pytest
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


class Interrupted(Exception):
    pass


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_resumed_training_gives_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "WARMUP", 2)
    monkeypatch.setattr(trainer, "MiniConfig", functools.partial(MiniConfig, **tiny.SHAPE))
    whole = run(tmp_path / "whole", 0, 0, STAGES)
    assert whole.step == 4
    update = Trainer.update

    def stopped(folder, after):
        """A run that ended there."""
        checkpoint = folder / "checkpoint.pt"

        def stop(self, *args):
            loss = update(self, *args)
            if self.step == after:
                self.save(checkpoint)
                raise Interrupted
            return loss

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(Trainer, "update", stop)
            run(folder, 0, 0, STAGES)
        assert torch.load(checkpoint, weights_only=True)["step"] == after

    for after in (2, 3):
        parts = tmp_path / f"after {after}"
        stopped(parts, after)
        resumed = run(parts, 0, 0, STAGES)
        assert resumed.step == 4 and not list(parts.glob("*.tmp"))
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), (after, name)
    first = Trainer(0, torch.device("cpu")).model.state_dict()
    moved = [n for n, v in whole.model.state_dict().items() if not torch.equal(v, first[n])]
    assert len(moved) > 0.9 * len(first)
