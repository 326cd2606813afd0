"""A tiny stand-in for VidLaDA: LLaDA-V's double with videos, and a decoder of its own.

Of our own writing, after the family's behaviour: every frame of a video is halved by bilinear
interpolation and has a newline behind every row; the head runs on the current block alone; and
where a stop leaves fewer masks than a step may fill, tokens that stand are written anew.
"""

import math

import torch
from copying import copied
from doubles import llada_v as base
from torch.nn import functional

MASK, BOS, EOS, HEADER, HEADER_END, TURN_END = base.IDS


class LlavaLLaDAVideoModelLM(base.LlavaLLaDAModelLM):
    def pack_video(self, frames):
        """(F * h * (h + 1), D) of frames (F, 3, S, S)."""
        side, newline = self.model.vision_tower.num_patches_per_side, self.model.image_newline
        features = self.model.mm_projector(self.model.vision_tower(frames))
        planes = features.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        half = [math.ceil(side / 2)] * 2
        planes = functional.interpolate(planes, size=half, mode=self.config.mm_spatial_pool_mode)
        rows = planes.permute(0, 2, 3, 1).flatten(0, 1)
        ends = newline.expand(len(rows), 1, -1)
        return torch.cat((rows, ends), 1).flatten(0, 1)

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past, labels, images, modalities=None,
        image_sizes=None,
    ):  # fmt: skip
        kinds = modalities or ["image"]
        packed = iter(
            [
                self.pack_video(views)
                if number < len(kinds) and kinds[number] == "video"
                else self.pack(views, image_sizes[number])
                for number, views in enumerate(images)
            ]
        )
        out = []
        for ids in input_ids:
            parts, begin = [], 0
            for at in [*(ids == base.IMAGE).nonzero()[:, 0].tolist(), len(ids)]:
                parts.append(self.model.embed_tokens(ids[begin:at]))
                parts += [next(packed)] if at < len(ids) else []
                begin = at + 1
            out.append(torch.cat(parts)[: self.config.tokenizer_model_max_length])
        self.model.input_image_idx = torch.stack(out)[..., 0]  # left behind, as the family does
        return None, None, None, past, torch.stack(out), None

    @torch.no_grad()
    def generate_with_embeds(
        self, inputs_embeds, steps=128, gen_length=128, block_length=128, temperature=0.0,
        cfg_scale=0.0, remasking="low_confidence", mask_id=MASK, tokenizer=None,
        stopping_criteria=None, generation_suffix=None, **ignored,
    ):  # fmt: skip
        words, front = self.model.embed_tokens, inputs_embeds.shape[1]
        suffix = generation_suffix
        tail = tokenizer.encode(suffix, add_special_tokens=False) if suffix else []
        mask = words(torch.tensor([mask_id], device=inputs_embeds.device))
        total = front + gen_length + len(tail)
        x = mask.repeat(1, total, 1)
        x[:, :front] = inputs_embeds
        ids = torch.full((1, total), mask_id, device=x.device)
        if tail:
            ids[0, -len(tail) :] = torch.tensor(tail)
            x[0, -len(tail) :] = words(ids[0, -len(tail) :])
        per_block = steps // (gen_length // block_length)
        wanted = [tokenizer.encode(s, add_special_tokens=False) for s in stopping_criteria or ()]
        stop = None
        for begin in range(front, front + gen_length, block_length):
            end = begin + block_length
            if stop is not None and stop <= begin:
                break
            count = int(masked(x[:, begin:end], mask).sum())
            for step in range(per_block):
                open_ = masked(x[:, begin:end], mask)
                if stop is not None and not masked(x[:, front:stop], mask).any():
                    break
                if not open_.any():
                    break
                logits = self.block_logits(x, mask, front, begin, end, cfg_scale)
                for one in (EOS, BOS, HEADER, HEADER_END):
                    logits[:, :, one] = logits[:, :, one].masked_fill(open_, -math.inf)
                noisy = logits
                if temperature > 0:
                    noise = torch.rand_like(logits, dtype=torch.float64)
                    noisy = logits.double().exp() / (-noise.log()) ** temperature
                chosen = noisy.argmax(-1)
                sure = logits.double().softmax(-1).gather(-1, chosen[..., None])[..., 0]
                if remasking == "random":
                    sure = torch.rand(chosen.shape, device=x.device)
                if stop is not None and stop < end:
                    sure[:, max(0, stop - begin) :] = -math.inf
                new = words(chosen)
                sure = sure.masked_fill(~open_, -math.inf)
                take = sure[0].topk(count // per_block + (step < count % per_block)).indices
                x[0, begin + take] = new[0, take]  # also what stands, where too little is open
                ids[0, begin + take] = chosen[0, take]
                stop = base.first_stop(ids[0, front : front + gen_length], wanted, front, stop)
        last = front + gen_length if stop is None else stop
        return torch.cat((ids[:, front:last], ids[:, total - len(tail) :]), 1)

    def block_logits(self, x, mask, front, begin, end, scale):
        if scale == 0:
            return self.lm_head(self.model(inputs_embeds=x)[0][:, begin:end]).float()
        blind = x.clone()
        blind[:, :front] = mask
        hidden = self.model(inputs_embeds=torch.cat((x, blind)))[0]
        seen, unseen = self.lm_head(hidden[:, begin:end]).float().chunk(2)
        return unseen + (scale + 1) * (seen - unseen)


def masked(x, mask):
    return ((x - mask).abs() < 1e-5).all(-1)


def config(**changes):
    video = dict(
        model_type="llava_llada_video",
        mm_spatial_pool_stride=2,
        mm_spatial_pool_mode="bilinear",
        mm_newline_position="grid",
    )
    return base.config(**{**video, **changes})


@copied
def model(seed=0, dtype=torch.float32, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = LlavaLLaDAVideoModelLM(config(**changes))
        with torch.no_grad():
            for layer in made.model.layers:
                for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                    part.weight.mul_(3)
            made.lm_head.weight.mul_(4)
    return made.to(dtype).eval()
