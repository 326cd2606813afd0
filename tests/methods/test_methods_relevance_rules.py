"""Every rule of CP-LRP and AttnLRP by itself."""

import functools

import pytest
import tiny
import torch
import torch.nn.functional as F

from captum_dcam.methods.attention import inside_blocks
from captum_dcam.methods.relevance import ACTIVATIONS, AttnRules, CPRules

DOUBLE = torch.float64
both = pytest.mark.parametrize("rules", (CPRules, AttnRules))


def rand(*shape, seed=0, dtype=DOUBLE):
    made_ = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return made_.to(dtype)


def under(rules, work, *leaves):
    """Result of ``work`` under the rules, and relevance of its leaves for random weights."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    with inside_blocks([], rules()):
        out = work(*leaves)
    share = rand(*out.shape, seed=9).to(out)
    grads = torch.autograd.grad((out * share).sum(), leaves, materialize_grads=True)
    return out, share, [x.detach() * g for x, g in zip(leaves, grads, strict=True)]


@both
@pytest.mark.parametrize("name", ("silu", "gelu", "mish", "tanh", "relu"))
@pytest.mark.parametrize("dtype", (DOUBLE, torch.float32, torch.bfloat16))
def test_activations_by_the_identity_rule(rules, name, dtype):
    func = getattr(F, name) if name != "tanh" else torch.tanh
    x = rand(50, dtype=dtype)
    out, share, (relevance,) = under(rules, func, x)
    assert torch.equal(out, func(x))
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    assert tiny.relative(relevance, out.detach() * share) < tolerance


def test_slopes_at_zero_are_the_limits():
    for name, slope in ACTIVATIONS.items():
        func = getattr(torch, name, None) or getattr(F, name.rstrip("_"))
        x = torch.zeros(1, dtype=DOUBLE, requires_grad=True)
        with inside_blocks([], AttnRules()):
            out = func(x * 1)
        (gradient,) = torch.autograd.grad(out, x)
        assert float(out.detach()) == 0 and float(gradient) == slope
        if "relu" not in name:
            near = torch.tensor([1e-6], dtype=DOUBLE)
            assert abs(float(func(near.clone()) / near) - slope) < 1e-5


@both
def test_a_swish_written_out_is_the_identity_rule(rules):
    out, share, (relevance,) = under(rules, lambda x: x * torch.sigmoid(1.7 * x), rand(20))
    assert torch.allclose(relevance, out.detach() * share)


@both
@pytest.mark.parametrize("dtype", (DOUBLE, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("affine", (False, True))
def test_root_mean_square_norm_by_the_identity_rule(rules, dtype, affine):
    x, weight = rand(4, 6, dtype=dtype), rand(6, seed=1, dtype=dtype) if affine else None
    norm = functools.partial(F.rms_norm, normalized_shape=(6,), weight=weight, eps=1e-3)
    out, share, (relevance,) = under(rules, lambda x: F.rms_norm(x, (6,), weight, 1e-3), x)
    assert torch.equal(out, norm(x))
    expected = out.detach() * share
    assert tiny.relative(relevance, expected) < (0.03 if dtype == torch.bfloat16 else 1e-5)


@both
def test_norms_written_out_and_fused_are_one(rules):
    weight, bias = rand(6, seed=1), rand(6, seed=2)

    def root(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    def divided(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def layer(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5) ** 0.5 * weight + bias

    x = rand(4, 6)
    _, _, (expected,) = under(rules, root, x)
    for other in (divided, lambda x: F.rms_norm(x, (6,), weight, 1e-6)):
        assert torch.allclose(under(rules, other, x)[2][0], expected)
    _, _, (expected,) = under(rules, layer, x)
    for other in (
        lambda x: F.layer_norm(x, (6,), weight, bias),
        lambda x: F.layer_norm(x, (6,), weight, bias, eps=1e-5),
        lambda x: F.layer_norm(x, (6,), weight, bias, 1e-5),
    ):
        assert torch.allclose(under(rules, other, x)[2][0], expected)


PRODUCTS = {
    "mul": (lambda a, b: a * b, (3, 4), (3, 4)),
    "torch.mul": (torch.mul, (3, 4), (3, 4)),
    "in place": (lambda a, b: (a * 1).mul_(b), (3, 4), (3, 4)),
    "broadcast": (lambda a, b: a * b, (3, 4), (1, 4)),
    "matmul": (lambda a, b: a @ b, (2, 3, 4), (2, 4, 5)),
    "bmm": (torch.bmm, (2, 3, 4), (2, 4, 5)),
    "einsum": (lambda a, b: torch.einsum("ij,jk->ik", a, b), (3, 4), (4, 5)),
}


@both
@pytest.mark.parametrize("work, a, b", PRODUCTS.values(), ids=PRODUCTS)
def test_products_of_variables_by_the_uniform_rule(rules, work, a, b):
    out, share, relevance = under(rules, work, rand(*a), rand(*b, seed=1))
    total = (out.detach() * share).sum()
    for part in relevance:
        assert torch.allclose(part.sum(), total / 2)
    # constants take nothing
    constant = rand(*b, seed=1)
    _, _, (alone,) = under(rules, lambda a: work(a, constant), rand(*a))
    assert torch.allclose(alone.sum(), total) and torch.allclose(alone, 2 * relevance[0])


def test_matmul_rule_entry_by_entry():
    """Prop. 3.3: R(A_ji) = ½ Σ_p A_ji V_ip R_jp / O_jp."""
    a, v = rand(3, 4), rand(4, 2, seed=1)
    out, share, (of_a, of_v) = under(AttnRules, torch.matmul, a, v)
    out, relevance = out.detach(), out.detach() * share
    for j in range(3):
        for i in range(4):
            terms = [a[j, i] * v[i, p] * relevance[j, p] / (2 * out[j, p]) for p in range(2)]
            assert torch.isclose(of_a[j, i], sum(terms))
    for i in range(4):
        for p in range(2):
            terms = [a[j, i] * v[i, p] * relevance[j, p] / (2 * out[j, p]) for j in range(3)]
            assert torch.isclose(of_v[i, p], sum(terms))


def test_gates():
    gate, up = rand(5), rand(5, seed=1)
    out, share, (of_gate, of_up) = under(AttnRules, lambda g, u: F.silu(g) * u, gate, up)
    half = out.detach() * share / 2
    assert torch.allclose(of_gate, half) and torch.allclose(of_up, half)
    for work in (lambda g, u: F.silu(g) * u, lambda g, u: u * F.silu(g)):
        _, _, (of_gate, of_up) = under(CPRules, work, gate, up)
        assert not of_gate.any() and torch.allclose(of_up, 2 * half)


def test_softmax_rules():
    """Prop. 3.1: R_i = x_i (R_i − s_i Σ_j R_j); CP-LRP: a constant."""
    x = rand(2, 3, 4, 5)
    for work in (lambda x: x.softmax(-1), lambda x: F.softmax(x, dim=-1)):
        s, share, (got,) = under(AttnRules, work, x)
        s = s.detach()
        above = s * share
        assert torch.allclose(got, x * (above - s * above.sum(-1, keepdim=True)))
        kept = rand(2, 3, 4, 5, seed=3)
        _, _, (got, other) = under(CPRules, lambda x, y, f=work: f(x) + y, x, kept)
        assert not got.any() and torch.allclose(other, kept * share)


@both
@pytest.mark.parametrize("scale", (None, 0.4))
@pytest.mark.parametrize("masked", (False, True))
def test_fused_attention_is_attention_written_out(rules, scale, masked):
    q, k, v = rand(1, 2, 3, 4), rand(1, 2, 5, 4, seed=1), rand(1, 2, 5, 6, seed=2)
    mask = rand(1, 1, 3, 5, seed=4) > -0.8 if masked else None

    def fused(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    def written(q, k, v):
        scores = q @ k.mT * (0.5 if scale is None else scale)
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v

    out, share, found = under(rules, fused, q, k, v)
    assert torch.equal(out, fused(q, k, v))
    for got, expected in zip(found, under(rules, written, q, k, v)[2], strict=True):
        assert torch.allclose(got, expected)
    total, of_values = (out.detach() * share).sum(), found[2].sum()
    assert torch.allclose(of_values, total if rules is CPRules else total / 2)
