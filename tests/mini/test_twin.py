"""The autoregressive twin: what it shares with the embedded model, its mask, its training data."""

import json

import pytest
import tiny
import torch

from benchmarks.mini.batches import packed_mask
from benchmarks.mini.trainer import EARLY
from benchmarks.mini.twin import NextWords, causal, causal_packed_mask
from captum_dcam import errors, load
from captum_dcam.mini.causal import MiniForCausalLM
from captum_dcam.mini.loading import PACKAGED, load_mini
from captum_dcam.mini.modeling import MiniForMaskedDiffusion


def test_the_packaged_twin_has_the_same_eyes_and_another_mind():
    mini, _ = load_mini()
    twin, processor = load_mini(kind=MiniForCausalLM)
    ours, theirs = mini.state_dict(), twin.state_dict()
    assert ours.keys() == theirs.keys() and processor.grid == mini.config.grid
    for name, value in ours.items():
        eyes = name.startswith(("vision_tower.", "projector."))
        assert torch.equal(value, theirs[name]) is eyes, name
    sizes = [(folder / "model.safetensors").stat().st_size for folder in PACKAGED.values()]
    assert sum(sizes) <= 18e6


def test_the_card_says_what_it_can():
    rates = json.loads((PACKAGED[MiniForCausalLM] / "accuracy.json").read_text())["rates"]
    (figures,) = rates.values()
    assert figures["objects named"] >= 0.95 and figures["answers without inventions"] >= 0.9


def test_a_position_is_not_moved_by_what_stands_behind_it():
    twin, words = tiny.model(kind=MiniForCausalLM), torch.randint(5, 71, (2, 9))
    with torch.no_grad():
        whole = twin(input_ids=words).logits
        for end in range(1, 9):
            torch.testing.assert_close(twin(input_ids=words[:, :end]).logits, whole[:, :end])
        shown = MiniForMaskedDiffusion.forward(twin, input_ids=words).logits
    assert not torch.allclose(shown[:, :-1], whole[:, :-1])


def test_each_loader_refuses_the_other_ones_weights():
    with pytest.raises(errors.WeightsError, match=r"'captum_dcam_mini_ar': expected"):
        load_mini(PACKAGED[MiniForCausalLM])
    with pytest.raises(errors.WeightsError, match=r"'captum_dcam_mini': expected"):
        load_mini(PACKAGED[MiniForMaskedDiffusion], kind=MiniForCausalLM)
    assert load(PACKAGED[MiniForCausalLM]).family == "mini_ar"
    assert load(PACKAGED[MiniForMaskedDiffusion]).family == "mini"


def test_packed_pairs_predict_the_next_word_of_their_answers():
    data = NextWords(tiny.tokenizer(), 7, 3, 120, EARLY, 2)
    end = data.maker.eos
    for item in (data[i] for i in range(3)):
        ids, targets, pair, response = (item[k] for k in ("ids", "targets", "pair", "response"))
        for number in range(int(pair.max()) + 1):
            own = (pair == number).nonzero()[:, 0]
            answer = own[response[own]]
            assert int(ids[answer[-1]]) == end and int((ids[answer] == end).sum()) == 1
            read = own[targets[own] != -100]  # from the end of the prompt to the last word
            assert read.tolist() == [int(answer[0]) - 1, *answer[:-1].tolist()]
            assert torch.equal(targets[read], ids[answer])
        assert bool((targets[pair < 0] == -100).all())


def test_a_packed_pair_sees_the_image_and_what_stands_before_in_it():
    pair = torch.tensor([[0, 0, 0, 1, 1, -1]])
    mask = causal_packed_mask(pair, 2)[0, 0]
    for query in range(6):
        for key in range(6):
            same = pair[0, query] == pair[0, key]
            assert bool(mask[query, 2 + key]) is bool(same and key <= query)
    assert bool(mask[:, :2].all())
    both = packed_mask(pair, torch.ones_like(pair, dtype=torch.bool), 2)[0, 0]
    assert bool((both | ~mask).all())  # nothing is seen that the embedded model would not see


def test_trained_weights_move_into_the_class_that_masks():
    model = tiny.model()
    twin = causal(model)
    assert twin.config.model_type == "captum_dcam_mini_ar"
    assert twin.config.hidden_size == model.config.hidden_size
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in twin.state_dict().items())
