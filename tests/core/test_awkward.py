"""The shared awkward generations are as awkward as they say, and what the library would force."""

import awkward
import pytest
import torch

from captum_dcam.model.answers import force
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.words import nouns, repeated_function_words, words_of


def words(forward, example):
    return words_of(forward.adapter, forward.trajectory.tokens[example].tolist())


@pytest.mark.parametrize("family", awkward.FAMILIES)
@pytest.mark.parametrize("cache", awkward.CACHES)
def test_nothing_is_simple(family, cache):
    forward = awkward.bound(family, cache)
    request, trajectory = forward.request, forward.trajectory
    first, second = request.layout.shapes
    assert first[0] != second[0] and first[1] != second[1]
    if family != "causal":
        assert [g.image for g in request.layout.grids] == [0, 0]
    assert request.batch == awkward.BATCH[family]
    stops = torch.tensor(sorted(forward.adapter.stop_ids))
    for b in range(request.batch):
        found = words(forward, b)
        repeated = repeated_function_words(found)
        assert 1 < len(repeated) < len(found)
        assert any(len(w.positions) == 2 for w in found)
        assert any(w.text.endswith("s") for w in nouns(found))
        ended = torch.isin(trajectory.tokens[b], stops).nonzero()[:, 0]
        assert 0 < int(ended[0]) < found[-1].positions[0]
    if request.batch > 1:
        for value in (request.pixels, trajectory.tokens, trajectory.confidence):
            assert not torch.equal(value[0], value[1])
        assert len({int(e[1].sum()) for e in zip(*request.extras[:2], strict=True)}) == 2
    if family == "mini":
        assert not torch.equal(*trajectory.commit_step)
    if family != "causal":
        assert all(len(set(steps.diff().tolist())) > 1 for steps in trajectory.commit_step)


@pytest.mark.parametrize(("family", "cache", "example"), awkward.batches())
def test_every_token_is_read_as_in_a_forced_answer(family, cache, example):
    one = awkward.alone(family, cache, example)
    other = DenoisingForward(awkward.adapter(family, cache), awkward.LAYER)
    tokens, steps = one.trajectory.tokens, one.trajectory.commit_step[0]
    forced = force(other, tokens[0].tolist(), one.request)
    assert torch.equal(one.trajectory.states[0][steps], forced.states[0])
    torch.testing.assert_close(one.trajectory.confidence, forced.confidence)
    assert one.trajectory.lengths == forced.lengths
    assert one.trajectory.feasible == forced.feasible
