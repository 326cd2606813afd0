"""Methods of every kind on DiffusionGemma, and the command line on a saved model."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers.models.diffusion_gemma")
sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not

import made_diffusion_gemma as made_dg
import tiny
from typer.testing import CliRunner

from captum_dcam import compare_generation
from captum_dcam.cli.app import app
from captum_dcam.errors import MethodError
from captum_dcam.methods import AttributionTask, method
from captum_dcam.methods.attention import Attentions
from captum_dcam.methods.relevance import CPRules, Relevance, RelevanceRules
from captum_dcam.methods.text_relevance import text_relevance
from captum_dcam.model import gradients as vjp
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.hub import check_transformers, find
from captum_dcam.model.sequence import hidden_states, text_tokens
from captum_dcam.model.words import Target

C = made_dg.CANVAS
METHODS = (
    "diffusion_cam",
    "diffusion_cam_paper",
    method("llava_cam", samples=2),
    "logit_lens",
    "tam",
    "msea_arc",
    "attention",
    "attention_rollout",
    "grad_rollout",
    "cp_lrp",
    "attn_lrp",
    method("layer_integrated_gradients", steps=2),
    method("integrated_gradients", steps=2),
    method("occlusion", patch=4, stride=4),
)


def task_of(position, score="commit", **settings):
    forward = made_dg.bound(steps=3, **settings)
    token = int(forward.trajectory.tokens[0, position])
    return AttributionTask(forward, (Target("x", (position,), (token,)),), score)


@pytest.mark.parametrize("canvases", (1, 2))
def test_methods_run_and_leave_nothing_behind(canvases):
    forward = made_dg.bound(canvases=canvases, steps=2)
    before = tiny.hooks(forward.adapter.model)
    found = compare_generation(forward, [1, C * canvases - 2], list(METHODS), errors="raise")
    for row in found.rows:
        assert row.status == "done", (row.name, row.note)
        one, two = row.maps[0]
        assert one.shape == (8, 8) and bool(one.any()) and bool(two.any())
        assert not torch.equal(one, two), row.name
    assert tiny.hooks(forward.adapter.model) == before


def test_a_method_that_cannot_run_says_why():
    """Of the visible answer's canvases each has a decoder pass of its own: no single sequence."""
    forward = made_dg.shared(canvases=2)
    names = ["diffusion_cam", "logit_lens", "attention", "cp_lrp"]
    found = {
        r.name: r for r in compare_generation(forward, [1, C + 1], names, score="teacher").rows
    }
    assert found["diffusion_cam"].status == "done"
    for name in names[1:]:
        assert found[name].status == "failed"
        assert "canvases are read one after the other" in found[name].note
    one = made_dg.shared()
    for row in compare_generation(one, [1], names, score="teacher").rows:
        assert row.status == "done", row.note


@pytest.mark.parametrize("window", (48, 4096))
def test_attention_is_the_familys_own(window):
    """The decoder's rows at keys of the encoder's cache, also where that lost its first keys."""
    given = task_of(C + 2, canvases=2, text={"sliding_window": window})
    forward = given.forward
    model, request, t = forward.adapter.model, forward.request, forward.trajectory
    step, prefix = given.step(C + 2), request.layout.prefix_length
    state = t.state_at(torch.tensor([0]), torch.tensor([step]))
    eager = made_dg.model(sliding_window=window)
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    own = type(forward.adapter)(eager, made_dg.parts())
    seen = []
    handles = [
        layer.self_attn.register_forward_hook(lambda _m, _a, out: seen.append(out[1]))
        for layer in own.step_blocks
    ]
    with torch.no_grad():
        own.denoise(own.prefill(own.embed(request.pixels, *request.extras)), *state)
    for handle in handles:
        handle.remove()
    for block, weights in enumerate(seen):
        expected = torch.zeros(prefix + 2 * C)
        row = weights[0, :, 2].mean(0)
        expected[len(expected) - len(row) :] = row
        got = Attentions(given).row(C + 2, [block])
        assert tiny.relative(got, expected) < 1e-4
        assert tiny.relative(Attentions(given).matrix(C + 2, block)[prefix + C + 2], got) < 1e-6
        cut = 0 if block % 2 or window > prefix else prefix + C - (window - 1)
        assert not got[:cut].any() and bool((got[cut:] > 0).all())


def test_hidden_states_are_those_of_encoder_and_decoder():
    forward = made_dg.shared(canvases=3)
    adapter, prefix = forward.adapter, forward.request.layout.prefix_length
    seen = {"encoder": [], "decoder": []}
    handles = [
        blocks[2].register_forward_hook(lambda _m, _a, out, s=seen[name]: s.append(out.clone()))
        for name, blocks in (("encoder", adapter.blocks), ("decoder", adapter.step_blocks))
    ]
    with torch.no_grad():
        forward.replay(torch.tensor([0]), torch.tensor([7]))
    for handle in handles:
        handle.remove()
    states, logits = hidden_states(forward, 2, 7)
    assert [h.shape[1] for h in seen["encoder"]] == [prefix, C] and len(seen["decoder"]) == 1
    assert len(states) == prefix + 3 * C == prefix + len(logits)
    expected = torch.cat([h[0] for h in (*seen["encoder"], *seen["decoder"])])
    assert torch.equal(states[: prefix + 2 * C], expected)
    assert not states[prefix + 2 * C :].any()  # the third canvas is not there yet


def test_logit_lens_reads_the_last_layers():
    given = task_of(C + 1, canvases=2)
    forward = given.forward
    found = method("logit_lens").attribute(given)
    states, logits = hidden_states(forward, -1, given.step(C + 1))
    token = given.targets[0].token_ids[0]
    with torch.no_grad():
        read = forward.adapter.unembed(states)[:, token].detach()
    at = forward.request.layout.grids[0].positions
    assert tiny.relative(found.maps[0][0], read[at]) < 1e-5
    assert tiny.relative(found.text[0], read[text_tokens(forward).positions]) < 1e-5
    own = forward.request.layout.prefix_length + C + 1
    assert float(read[own]) == pytest.approx(float(logits[C + 1, token].detach()), rel=1e-4)


class Plain(RelevanceRules):
    """No rule at all: relevance is then gradient × activation."""

    softmax_is_constant = False
    gate_is_constant = False

    def call(self, func, args, kwargs):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self._note()
        return func(*args, **kwargs)


def test_relevance_reaches_the_picture_and_text():
    """Without rules it is gradient × activation, which the tap gives at image tokens as well."""
    given = task_of(C + 1, canvases=2)
    token = given.targets[0].token_ids[0]
    found = Relevance(given, 1, Plain).of(C + 1, token)
    forward, text = given.forward, text_relevance(given.forward, given.targets)
    assert len(found) == forward.request.layout.prefix_length + 2 * C
    seen = ~text.values[0].isnan()
    assert tiny.relative(found[text.tokens.positions[seen]], text.values[0, seen]) < 1e-4
    (row,) = vjp.target_gradients(forward, given.targets)
    at = forward.request.layout.grids[0].positions
    assert tiny.relative(found[at], (row.features[0] * row.gradients[0]).sum(0)) < 1e-4
    assert not torch.allclose(found, Relevance(given, 1, CPRules).of(C + 1, token))


def test_the_relevance_of_text_for_words_of_both_canvases_together():
    """A pass of the first canvas runs the rows of words of the second alone: each keeps its own."""
    forward = made_dg.bound(steps=3, canvases=2)
    tokens = forward.trajectory.tokens[0].tolist()
    words = [Target("x", (p,), (tokens[p],)) for p in (C + 1, 1, C - 1)]
    together = text_relevance(forward, words)
    for n, word in enumerate(words):
        alone = text_relevance(forward, [word])
        assert torch.allclose(together.values[n], alone.values[0], atol=1e-5, equal_nan=True)
        assert tiny.relative(together.maps[0][n], alone.maps[0][0]) < 1e-4
    assert not together.values[1, -C:].nan_to_num().any()  # what comes later is not there yet
    assert together.values[0, -2 * C : -C].nan_to_num().abs().min() > 0


def test_a_kernel_that_cannot_be_seen_is_named():
    given = task_of(1)
    given.forward.adapter.model.set_attn_implementation("eager")
    method("attention").check(given)  # written out: seen as well
    with pytest.raises(MethodError, match="canvases are read one after the other"):
        method("attention").check(task_of(1, canvases=2, score="teacher"))


# -- the command line ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    check_transformers(find("diffusion_gemma"))  # the program prints the error by which tests skip
    folder = tmp_path_factory.mktemp("diffusion_gemma")
    made_dg.save(made_dg.model(), folder / "model")
    made_dg.picture(0, (60, 40)).save(folder / "picture.png")
    return folder


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_explain_and_compare_run(saved, tmp_path):
    shared = [saved / "picture.png", "-p", "what is red ?", "--model", saved / "model"]
    shared += ["--gen-length", 2 * C, "--steps", 2, "--json"]
    run = call("explain", *shared, "-o", tmp_path / "explained", "--words", "all")
    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout)
    assert document["calls"] == 5 and document["feasible_calls"] == 1
    assert all(
        (tmp_path / "explained" / f).is_file() for w in document["words"] for f in w["files"]
    )
    names = "diffusion_cam,tam,attention,cp_lrp,saliency"
    run = call("compare", *shared, "-o", tmp_path / "compared", "-M", names, "--words", "all")
    assert run.exit_code == 0, run.output
    rows = json.loads(run.stdout)["methods"]
    assert {r["status"] for r in rows} == {"done"} and len(rows) == 5


def test_the_whole_canvas_can_be_explained_by_a_forward_alone():
    from captum.attr import LayerActivation

    forward = DenoisingForward(made_dg.shared().adapter, 0)
    request = forward.adapter.prepare([[made_dg.picture()]], [made_dg.PROMPT])
    forward.generate(request, gen_length=C, steps=3, seed=0)
    found = LayerActivation(forward, forward.tap).attribute(
        request.pixels, additional_forward_args=forward.arguments(score="final")
    )
    assert found.shape == (1, 32, 8, 8)
