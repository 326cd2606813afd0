"""DiffusionGemma inside PEFT's model, and run by diffusers' pipeline; doubles of both, and both."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DynamicCache

pytest.importorskip("transformers.models.diffusion_gemma")
sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not

import made_diffusion_gemma as made_dg
import tiny

import captum_dcam
from captum_dcam.errors import InputError
from captum_dcam.explaining import explain_generation
from captum_dcam.model import gradients as vjp
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.words import Target

C = made_dg.CANVAS
#: with this threshold every canvas takes all its steps
ALL = 1e-9


def bound(model):
    """A forward with a generation of one canvas."""
    forward = DenoisingForward(captum_dcam.wrap(model, made_dg.parts()), 1)
    request = forward.adapter.prepare([[made_dg.picture()]], [made_dg.PROMPT])
    forward.generate(request, gen_length=C, steps=2, seed=0)
    return forward


def gradient(forward):
    token = int(forward.trajectory.tokens[0, 0])
    (row,) = vjp.target_gradients(forward, [Target("first", (0,), (token,))])
    return row.gradients[0]


# -- PEFT ------------------------------------------------------------------------------------------


class LoraLinear(nn.Module):
    """A layer as PEFT's is: the old one, and beside it a product of two narrow ones."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    def delta(self):
        return self.lora_B.weight @ self.lora_A.weight


class Peft(nn.Module):
    """A wrapped model as PEFT's is: LoRA layers in the base model, whose weights are frozen."""

    active_adapter, peft_config = "default", {"default": None}

    def __init__(self, model):
        super().__init__()
        self.model = model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for layer in (*encoder(model), *model.model.decoder.layers):
                layer.self_attn.q_proj = LoraLinear(layer.self_attn.q_proj)

    def get_base_model(self):
        return self.model


def encoder(model):
    return list(model.model.encoder.language_model.layers)


@pytest.fixture(scope="module")
def double():
    return bound(Peft(made_dg.model()))


def test_lora_layers_are_explained_as_they_are(double):
    """Unwrapped, with the adapters' layers active: what is read and its gradients are those of a
    model that has their products in its weights."""
    model = double.model
    assert double.adapter.blocks == encoder(model)
    merged = made_dg.model()
    pairs = zip(encoder(model), encoder(merged), strict=True)
    parts = [*pairs, *zip(model.model.decoder.layers, merged.model.decoder.layers, strict=True)]
    for one, _ in parts:  # the same values twice: encoder and decoder share their base weights
        assert isinstance(one.self_attn.q_proj, LoraLinear)
    for one, other in parts:
        weight = one.self_attn.q_proj.base_layer.weight + one.self_attn.q_proj.delta()
        other.self_attn.q_proj.weight = nn.Parameter(weight.detach())
    other = bound(merged)
    assert torch.equal(double.trajectory.tokens, other.trajectory.tokens)
    assert torch.equal(double.trajectory.states[0], other.trajectory.states[0])
    assert tiny.relative(gradient(double), gradient(other)) < 1e-4
    bare = bound(made_dg.model())
    assert not torch.equal(double.trajectory.confidence, bare.trajectory.confidence)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora" in n for n in trainable)


def test_peft_itself(tmp_path):
    """LoRA on what encoder and decoder share, and the folder that PEFT saves of it."""
    peft = pytest.importorskip("peft")
    made_dg.save(made_dg.model(), tmp_path / "base")
    settings = peft.LoraConfig(
        target_modules=["q_proj"],
        exclude_modules=".*vision_tower.*",
        r=2,
        init_lora_weights=False,
        base_model_name_or_path=str(tmp_path / "base"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(made_dg.model(), settings)
    forward = bound(wrapped)
    assert forward.model is wrapped.get_base_model()
    bare = bound(made_dg.model())
    assert not torch.equal(forward.trajectory.confidence, bare.trajectory.confidence)
    with wrapped.disable_adapter():
        assert torch.equal(bound(wrapped).trajectory.confidence, bare.trajectory.confidence)
    wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = captum_dcam.load(tmp_path / "adapter", device="cpu")
    loaded.model.set_experts_implementation("eager")
    again = DenoisingForward(loaded, 1)
    again.generate(forward.request, gen_length=C, steps=2, seed=0)
    assert torch.equal(again.trajectory.tokens, forward.trajectory.tokens)
    assert tiny.relative(gradient(again), gradient(forward)) < 1e-5


# -- diffusers' pipeline ---------------------------------------------------------------------------


class EntropyBoundScheduler:
    """What the pipeline asks of its scheduler."""

    num_inference_steps = 3


class Pipeline:
    """As diffusers runs the model: the encoder with a flat mask, a canvas that ends as drawn."""

    def __init__(self, model, request, inputs):
        self.model, self.scheduler = model, EntropyBoundScheduler()
        self.given, self.inputs = request.extras[0], inputs

    @torch.no_grad()
    def __call__(self, canvases, generator, callback_on_step_end=None, ids=None, confident=0.005):
        ids = self.given if ids is None else ids
        prompt, model, cache = ids.shape[1], self.model, DynamicCache(config=self.model.config)
        vocabulary = model.config.text_config.vocab_size
        steps = self.scheduler.num_inference_steps
        for number in range(canvases):
            read, end = cache.get_seq_length(), ids.shape[1]
            model.model.encoder(
                input_ids=ids[:, read:],
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                position_ids=torch.arange(read, end)[None],
                **({} if read else self.inputs),
            )
            canvas = torch.randint(0, vocabulary, (1, C), generator=generator)
            logits = before = None
            for step in range(steps):
                out = model(
                    decoder_input_ids=canvas,
                    past_key_values=cache,
                    self_conditioning_logits=logits,
                    decoder_position_ids=torch.arange(end, end + C)[None],
                ).logits
                logits = out / (0.4 + 0.4 * (steps - step) / steps)
                drawn = torch.multinomial(logits[0].softmax(-1), 1, generator=generator).T
                entropy = torch.distributions.Categorical(logits=logits).entropy()
                rank = entropy.sort(-1)
                sure = torch.zeros_like(canvas, dtype=torch.bool)
                sure.scatter_(1, rank.indices, rank.values.cumsum(-1) - rank.values <= 0.1)
                noise = torch.randint(0, vocabulary, (1, C), generator=generator)
                canvas = torch.where(sure, drawn, noise)
                if callback_on_step_end is not None:
                    given = {"canvas": canvas}
                    canvas = callback_on_step_end(self, number * steps + step, step, given).pop(
                        "canvas", canvas
                    )
                draft = logits.argmax(-1)
                if before is not None and torch.equal(draft, before) and entropy.mean() < confident:
                    canvas = draft
                    break
                before = draft
            ids = torch.cat((ids, canvas), 1)
        return ids[:, prompt:]


@pytest.fixture(scope="module")
def forward():
    return DenoisingForward(made_dg.adapter(), 1)


@pytest.fixture(scope="module")
def request_(forward):
    return forward.adapter.prepare([[made_dg.picture()]], [made_dg.PROMPT])


@pytest.fixture
def pipe(forward, request_):
    inputs = forward.adapter._inputs(request_.pixels, request_.extras)
    return Pipeline(forward.model, request_, inputs)


def own(forward, request, canvases, threshold):
    """The trajectory of transformers' ``generate`` from the seed that the pipelines get."""
    from captum_dcam.adapters.diffusion_gemma import decoding

    adapter = forward.adapter
    settings = dict(max_new_tokens=canvases * C, max_denoising_steps=3)
    settings["confidence_threshold"] = threshold
    inputs = adapter._inputs(request.pixels, request.extras)
    with torch.random.fork_rng(devices=[]), forward.held():
        torch.manual_seed(0)
        found = decoding.sampled(adapter.model, request.extras[0], inputs, settings)
    return adapter._trajectory(request, {}, found)


def same(found, wanted):
    """What the model was given, what it wrote and when; self-conditioning, whose temperature is
    counted in other types, and probabilities within rounding."""
    exact = ((found.tokens, wanted.tokens), (found.commit_step, wanted.commit_step))
    pairs = (*exact, *zip(found.states[:2], wanted.states[:2], strict=True))
    near = (found.states[2], wanted.states[2]), (found.confidence, wanted.confidence)
    return (
        all(torch.equal(one, other) for one, other in pairs)
        and all(tiny.relative(one, other) < 1e-4 for one, other in near)
        and found.lengths == wanted.lengths
    )


@pytest.mark.parametrize(("canvases", "threshold"), [(2, ALL), (1, 9.0)])
def test_the_step_callback_records_what_generate_does(forward, request_, pipe, canvases, threshold):
    with forward.adapter.recording(pipe, request_) as steps:
        answer = pipe(canvases, torch.Generator().manual_seed(0), steps, confident=threshold)
    trajectory = steps.trajectory
    assert torch.equal(answer, trajectory.tokens)
    assert same(trajectory, own(forward, request_, canvases, threshold))
    # left alone it runs image tokens causally, and ends with noise
    assert not torch.equal(answer, pipe(canvases, torch.Generator().manual_seed(0)))
    bound = DenoisingForward(forward.adapter, 1)
    bound.bind(request_, trajectory)
    assert explain_generation(bound, words=[Target("first", (0,), answer[0, :1].tolist())]).maps


def test_a_pipeline_that_cannot_be_recorded(forward, request_, pipe):
    adapter, draws = forward.adapter, torch.Generator().manual_seed(0)
    before = sum(len(m._forward_pre_hooks) for m in forward.model.modules())
    with pytest.raises(InputError, match="told no step"), adapter.recording(pipe, request_):
        pipe(1, draws)
    with pytest.raises(InputError, match="not the request's"):
        with adapter.recording(pipe, request_) as steps:
            pipe(1, draws, steps, ids=pipe.given[:, :-1])
    two = adapter.prepare([[made_dg.picture()]] * 2, [made_dg.PROMPT] * 2)
    with pytest.raises(InputError, match="2 examples"), adapter.recording(pipe, two):
        pass
    pipe.model = nn.Linear(1, 1)
    with pytest.raises(InputError, match="not the adapter's"), adapter.recording(pipe, request_):
        pass
    pipe.scheduler = torch.optim.lr_scheduler.StepLR
    with pytest.raises(InputError, match="a type: recorded is EntropyBoundScheduler"):
        with adapter.recording(pipe, request_):
            pass
    assert sum(len(m._forward_pre_hooks) for m in forward.model.modules()) == before


class Prepared:
    """A processor whose chat template has been read already."""

    def __init__(self, request, inputs):
        self.tokenizer, ids = made_dg.tokenizer(), request.extras
        self.read = {"input_ids": ids[0], "attention_mask": ids[1], **inputs}

    def apply_chat_template(self, _messages, **_options):
        return self.read

    def batch_decode(self, ids, **_options):
        return [str(one) for one in ids]


@pytest.mark.parametrize(("canvases", "threshold"), [(2, ALL), (1, 9.0)])
def test_diffusers_itself(forward, request_, pipe, canvases, threshold):
    diffusers = pytest.importorskip("diffusers", minversion="0.42")
    real = diffusers.DiffusionGemmaPipeline(
        forward.model, diffusers.EntropyBoundScheduler(), Prepared(request_, pipe.inputs)
    )
    real.set_progress_bar_config(disable=True)
    with forward.adapter.recording(real, request_) as steps:
        out = real(
            made_dg.PROMPT,
            gen_length=canvases * C,
            num_inference_steps=3,
            confidence_threshold=threshold,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=steps,
        )
    assert torch.equal(out.sequences, steps.trajectory.tokens)
    assert same(steps.trajectory, own(forward, request_, canvases, threshold))
