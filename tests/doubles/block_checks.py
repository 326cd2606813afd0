"""What tests of block-diffusion families check on doubles and on upstream's code alike."""

from contextlib import contextmanager

import torch

from captum_dcam.testing import AdapterCase, Reference

#: an answer is replayed in one run, and generated block by block
NEAR = 1e-5


@contextmanager
def steps_seen(adapter):
    """The steps of a family's own generation: of each, where its block held the mask, its logits,
    and where the block ends; written apart from the adapter's recording."""
    words = adapter.decoder.embed_tokens
    masked, logits, at = [], [], []
    calls = []

    def called(_module, _args, kwargs):
        embeds = kwargs.get("inputs_embeds")
        embeds = words(kwargs["input_ids"]) if embeds is None else embeds
        calls.append(kwargs["store_kv"])
        if not kwargs["store_kv"]:
            mask = words(torch.tensor([adapter.mask_id], device=embeds.device))
            masked.append((embeds == mask).all(-1))
            at.append(int(kwargs["position_ids"].max()) + 1)

    def headed(_module, _args, out):
        if calls and not calls[-1] and len(logits) < len(masked):
            logits.append(out.detach().clone())

    with (
        adapter.decoder.register_forward_pre_hook(called, with_kwargs=True),
        adapter.head.register_forward_hook(headed),
    ):
        yield masked, logits, at


def reference(generate):
    """``AdapterCase.reference`` of a family whose own generation is ``generate(adapter, request,
    settings)`` → its ids (1, …): canvases from where masks stood, NaN where no block ran. Or ids
    and a map of commit steps from 1 on, where it may write over tokens, and so no canvas is sure.
    """

    def made(adapter, request, settings):
        prompt = request.layout.prefix_length
        with steps_seen(adapter) as (masked, logits, at):
            tokens = generate(adapter, request, dict(settings))
        tokens, commits = tokens if isinstance(tokens, tuple) else (tokens, None)
        end = min(at[-1] - prompt, tokens.shape[1])  # the answer is cut to the length asked for
        tokens = tokens[:, :end]
        canvases, rows = [], []
        for open_, own, stop in zip(masked, logits, at, strict=True):
            first, last = max(0, stop - open_.shape[1] - prompt), stop - prompt
            hidden = torch.ones(1, max(end, last), dtype=torch.bool)
            hidden[:, :first] = False
            hidden[:, first:last] = open_[:, first - last :]
            hidden[:, last:] = True
            canvases.append(torch.where(hidden[:, :end], adapter.mask_id, tokens))
            full = torch.full((1, max(end, last), own.shape[-1]), torch.nan, dtype=own.dtype)
            full[:, first:last] = own[:, first - last :]
            rows.append(full[:, :end])
        if commits is None:
            return Reference(tokens, rows, torch.stack(canvases))
        return Reference(tokens, rows, commit_step=commits[:, :end] - 1)

    return made


def entering(adapter, request):
    """(B, N, D): image tokens as the first block gets them."""
    embeds = adapter.embed(request.pixels, *request.extras).embeds
    return embeds[:, torch.cat([g.positions.flatten() for g in request.layout.grids])]


def diffusion_vl(make, source, **changes):
    """DiffusionVL's cases: a fixed number of tokens per step, and all that are sure."""

    def generate(adapter, request, settings):
        given = adapter.inputs(request.pixels, request.extras)
        return adapter.model.generate(**given, **{"steps": adapter.block_length, **settings})

    def case(name, **settings):
        return AdapterCase(
            f"diffusion_vl, {name}",
            make,
            reference(generate),
            settings=dict(gen_length=9, **settings),
            one_token=dict(gen_length=1),
            shortest=2,  # the prompt's tail has two tokens, and a block four
            prompt="what is this red circle",
            tolerance=NEAR,
            feasible=(0,),
            image_states=entering,
            source=source,
            **changes,
        )

    sure = dict(remasking_strategy="low_confidence_dynamic", confidence_threshold=0.05)
    return [case("static"), case("dynamic", **sure)]


def mineru_diffusion(make, source, **changes):
    """MinerU-Diffusion's cases: a token a step, and fewer steps than tokens, with tokens written
    over, where ``step_map`` tells when."""

    def generate(adapter, request, settings):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(drawn(SEED))
            own = adapter.options(adapter.checked(settings, torch.Generator()))
            # nothing ends the answer early, so that all of it is returned
            whole = {**own, "stopping_criteria": None, "gen_length": settings["gen_length"]}
            given = adapter.inputs(request.pixels, request.extras)
            return adapter.model.generate(**given, **whole)[:2]

    def case(name, **settings):
        return AdapterCase(
            f"mineru_diffusion, {name}",
            make,
            reference(generate),
            settings=dict(gen_length=8, **settings),
            one_token=dict(gen_length=4),
            shortest=4,
            seed=SEED,
            prompt="what is this red circle",
            tolerance=NEAR,
            feasible=(0,),
            image_states=entering,
            source=source,
            **changes,
        )

    return [case("a token a step"), case("dynamic", denoising_steps=2, dynamic_threshold=0.3)]


#: of sampled decoding
SEED = 0


def drawn(seed):
    """What an adapter seeds torch with, from a generator of that seed."""
    return int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(seed)))


def sdar_vl(make, script, source, **changes):
    """SDAR-VL's cases; ``script(model, inputs=…, mask_id=…, …)`` is the authors' loop, or ours."""

    def generate(adapter, request, settings):
        given = adapter.inputs(request.pixels, request.extras)
        steps = {"denoising_steps": adapter.block_length, "block_length": adapter.block_length}
        ids = script(adapter.model, inputs=given, mask_id=adapter.mask_id, **{**steps, **settings})
        return ids[:, request.layout.prefix_length :]

    def case(name, **settings):
        return AdapterCase(
            f"sdar_vl, {name}",
            make,
            reference(generate),
            settings=dict(gen_length=9, **settings),
            one_token=dict(gen_length=1),
            shortest=3,  # the prompt's tail has one token, and a block four
            prompt="what is this red circle",
            tolerance=NEAR,
            feasible=(0,),
            image_states=entering,
            source=source,
            **changes,
        )

    return [
        case("dynamic", confidence_threshold=0.3),
        case("sequential", remasking_strategy="sequential", denoising_steps=3),
    ]


# -- on a causal context --------------------------------------------------------------------------


@contextmanager
def calls_seen(adapter):
    """Ids and logits of every call of a family's own generation."""
    ids, logits = [], []

    def embedded(_module, args):
        ids.append(args[0].clone())

    def headed(_module, _args, out):
        logits.append(out.detach().clone())

    with (
        adapter.decoder.embed_tokens.register_forward_pre_hook(embedded),
        adapter.head.register_forward_hook(headed),
    ):
        yield ids, logits


def causal(generate, shift):
    """``AdapterCase.reference`` where blocks are denoised behind a causal context: the call without
    masks is what stores a block, and its last row is the next one's first token."""

    def made(adapter, request, settings):
        with calls_seen(adapter) as (ids, logits):
            tokens = generate(adapter, request, dict(settings))
        size, vocabulary = ids[1].shape[1], logits[0].shape[-1]
        total = -(-tokens.shape[1] // size) * size
        assert total == tokens.shape[1]  # nothing ended the answer
        canvases, rows, done, first = [], [], 0, logits[0][:, -1]

        def step(own, at, scores):
            canvas = torch.full((1, total), adapter.mask_id)
            canvas[:, :done] = tokens[:, :done]
            canvas[:, done : done + size] = own
            canvases.append(canvas)
            full = torch.full((1, total, vocabulary), torch.nan, dtype=scores.dtype)
            full[:, at] = scores
            rows.append(full)

        for own, scores in zip(ids[1:], logits[1:], strict=True):
            if first is not None:
                step(adapter.mask_id, [done], first[:, None])
                first = None
            if (own == adapter.mask_id).any():
                at = list(range(done + 1, done + size))
                step(own, at, scores[:, :-1] if shift else scores[:, 1:])
            else:
                done, first = done + size, scores[:, -1]
        return Reference(tokens, rows, torch.stack(canvases))

    return made


def _causal_case(name, make, generate, shift, **settings):
    return AdapterCase(
        name,
        make,
        causal(generate, shift),
        settings=dict(gen_length=8, **settings),
        one_token=dict(gen_length=1),
        shortest=4,
        prompt="what is this red circle",
        tolerance=NEAR,
        feasible=(0,),
        image_states=entering,
    )


def nemotron_diffusion_vlm(make):
    """Nemotron's cases: a fixed number of tokens per step, and all that are sure."""

    def generate(adapter, request, settings):
        own = adapter.inputs(request.pixels, request.extras)
        ids, length = own.pop("input_ids"), adapter.block_length
        settings["max_new_tokens"] = -(-settings.pop("gen_length") // length) * length
        settings.setdefault("steps", settings["max_new_tokens"])
        found = adapter.model.generate(ids, **own, block_length=length, **settings)
        return found[0][:, ids.shape[1] :]

    name = "nemotron_diffusion_vlm"
    return [
        _causal_case(f"{name}, by number", make, generate, False),
        _causal_case(f"{name}, threshold", make, generate, False, threshold=0.3),
    ]


def fast_dvlm(make):
    """Fast-dVLM's case."""

    def generate(adapter, request, settings):
        own, length = adapter.inputs(request.pixels, request.extras), adapter.block_length
        total = -(-settings.pop("gen_length") // length) * length
        tokens = adapter.processor.tokenizer
        given = dict(block_size=length, max_tokens=total, mask_id=adapter.mask_id)
        ids = adapter.model.generate(**own, tokenizer=tokens, **given, **settings)
        return ids[:, request.layout.prefix_length :]

    return [_causal_case("fast_dvlm, threshold", make, generate, True, threshold=0.3)]
