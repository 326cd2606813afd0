"""The autoregressive twin: what it shares with the embedded model, its mask, its training data."""

import json
import shutil
from collections import Counter
from math import comb

import pytest
import tiny
import torch

from benchmarks.mini.batches import PackedScenes, likeness, packed_mask
from benchmarks.mini.trainer import EARLY
from benchmarks.mini.twin import NextWords, causal, causal_packed_mask, mean
from captum_dcam import errors, load
from captum_dcam.data.scenes import make_scene
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
    assert figures["objects named"] >= 0.95 and figures["answers without inventions"] >= 0.95


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


def test_every_other_scene_is_the_most_confusing_of_several():
    plain, chosen = (PackedScenes(tiny.tokenizer(), 7, 4, 120, EARLY, draws=n) for n in (1, 3))
    for index in (1, 3):
        assert all(torch.equal(v, chosen[index][k]) for k, v in plain[index].items())
    for index in (0, 2):
        drawn = [make_scene(8, n) for n in range(index // 2 * 3, index // 2 * 3 + 3)]
        both = [
            (Counter(o.color for o in s.objects), Counter(o.shape for o in s.objects))
            for s in drawn
        ]
        pairs = [sum(comb(n, 2) for c in two for n in c.values()) for two in both]
        assert [likeness(s) for s in drawn] == pairs
        found = chosen[index]["pixels"].numpy()
        (at,) = (n for n, s in enumerate(drawn) if (s.pixels == found).all())
        assert pairs[at] == max(pairs)


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


def test_the_mean_of_weights_is_halfway(tmp_path):
    folders = [tmp_path / name for name in ("before", "after")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        tiny.model(kind=MiniForCausalLM).half().save_pretrained(folder)
        for file in PACKAGED[MiniForCausalLM].glob("*token*.json"):
            shutil.copy(file, folder)
        shutil.copy(PACKAGED[MiniForCausalLM] / "preprocessor_config.json", folder)
    one, other = (load_mini(f, kind=MiniForCausalLM)[0].state_dict() for f in folders)
    mean(*folders)
    found = load_mini(folders[1], kind=MiniForCausalLM)[0].state_dict()
    assert found.keys() == one.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, (one[name] + other[name]) / 2, atol=1e-4, rtol=1e-3)
