"""What doubles of block diffusion on a causal context share: the loop that others' code and papers
describe. The call that stores a block predicts the next one's first token."""

import torch
from doubles import block


@torch.no_grad()
def decoded(run, prompt, new, length, mask_id, end, pick):
    """Ids (1, P + …) of prompt and answer, and the number of calls.

    ``run(ids, store)`` → logits; ``pick(logits, open, step)`` → ids, where to write them.
    """
    logits, calls = run(prompt, True), 1
    ids, first = prompt, logits[:, -1:].argmax(-1)
    for _ in range(new // length):
        own = torch.full((1, length), mask_id)
        own[:, :1] = first
        for step in range(length):
            open_ = own == mask_id
            if not open_.any():
                break
            best, chosen = pick(run(own, False), open_, step)
            calls += 1
            own = torch.where(chosen, best, own)
            said = own[0].tolist()
            if end in said and mask_id not in said[: said.index(end)]:
                break
        first, calls = run(own, True)[:, -1:].argmax(-1), calls + 1
        ids = torch.cat((ids, own), 1)
        if end in own[0].tolist():
            at = ids[0, prompt.shape[1] :].tolist().index(end)
            return ids[:, : prompt.shape[1] + at + 1], calls
    return ids, calls


def sure(logits):
    """The most probable ids, and their probabilities."""
    odds = logits.softmax(-1).max(-1)
    return odds.indices, odds.values


def positions(cache, count):
    """Those of ``count`` tokens behind a cache, which may hold nothing yet."""
    start = cache.get_seq_length() if cache is not None else 0
    return torch.arange(start, start + count)


def causal(count, behind):
    """(1, 1, n, m) bool: each of ``count`` tokens sees those behind it and itself."""
    whole = torch.ones(count, behind + count, dtype=torch.bool)
    return whole.tril(behind)[None, None]


class Decoder(block.Decoder):
    """Run over embeddings; what it sees is said by the family's own forward."""

    def run(self, x, mask, places, cache, store):
        """``places`` (…, n): one row, or M-RoPE's three."""
        even = torch.arange(0, self.width, 2, dtype=torch.float64)
        rows = places if places.ndim == 3 else places[None]
        pick = torch.arange(len(even)) % len(rows)
        angles = rows[pick].movedim(0, -1) * 1e4 ** (-even / self.width)
        angles = torch.cat((angles, angles), -1)[:, None]
        turns = angles.cos().to(x), angles.sin().to(x)
        for layer in self.layers:
            x = layer(x, mask, turns, cache, store)[0]
        return self.norm(x)
