"""Chapter 1's claims, in float64, against finite differences, autograd, enumeration or a second formula."""

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import entropy_math as em
from grpo import clip_factor, kl_penalty

F64 = torch.float64
PROXIES = ("s_star", "steer_theorem", "steer_released", "opefo", "cov")


def random_logits(seed, vocab, scale, rows=1, masked=0):
    g = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(rows, vocab, generator=g, dtype=F64)
    z[:, : min(masked, vocab - 2)] = -math.inf  # always leaves two tokens
    return z


def all_tokens(z):
    """Statistics of every token of one distribution: z (V,) -> fields (V,)."""
    return em.token_stats(z.expand(len(z), -1), torch.arange(len(z)))


def plain_entropy(z):
    """H in a second formula: logsumexp(z) - E[z], exact enough in float64 at moderate scale."""
    p = z.softmax(-1)
    return z.logsumexp(-1) - (p * z.masked_fill(p == 0, 0.0)).sum(-1)


logits = st.builds(
    lambda seed, vocab, scale: random_logits(seed, vocab, scale)[0],
    st.integers(0, 2**31),
    st.sampled_from([2, 3, 5, 17, 128, 2000]),
    st.floats(0.0, 50.0),
)
small_logits = st.builds(
    lambda seed, vocab, scale: random_logits(seed, vocab, scale)[0],
    st.integers(0, 2**31),
    st.integers(2, 12),
    st.floats(0.0, 8.0),
)
seeds = st.integers(0, 2**31)


def assert_derivative(f, claimed, h=1e-2, floor=2e-7):
    """Central differences of f at 0 with steps h and h/2: both near, with an error of second order in h."""
    coarse, fine = (abs(float(f(s) - f(-s)) / (2 * s) - float(claimed)) for s in (h, h / 2))
    assert coarse < 2e-3
    assert fine <= 0.3 * coarse + floor


# 1. entropy and its derivatives -----------------------------------------------------------------------------


@given(logits)
def test_eq_1_1_entropy_is_that_of_the_definition_and_u_is_centred(z):
    p = z.softmax(-1)
    assert torch.allclose(em.entropy(z), plain_entropy(z), atol=1e-11)
    assert abs(float((p * (p.clamp_min(1e-320).log() + em.entropy(z))).sum())) < 1e-11
    assert -1e-12 <= float(em.entropy(z)) <= math.log(len(z)) + 1e-12


def test_eq_1_1_entropy_of_a_masked_policy_counts_only_its_support():
    z = torch.tensor([-math.inf, 0.0, 0.0, -math.inf], dtype=F64, requires_grad=True)
    h = em.entropy(z)
    assert abs(h.item() - math.log(2)) < 1e-15
    (grad,) = torch.autograd.grad(h, z)
    assert torch.equal(grad, torch.zeros(4, dtype=F64))


@given(logits)
def test_eq_1_2_gradient_is_autograds(z):
    z = z.clone().requires_grad_()
    (grad,) = torch.autograd.grad(plain_entropy(z), z)
    assert torch.allclose(em.entropy_gradient(z.detach()), grad, atol=1e-10)


@given(logits, seeds)
def test_eq_1_3_first_order_change_matches_finite_differences(z, seed):
    dz = torch.nn.functional.normalize(
        torch.randn(len(z), generator=torch.Generator().manual_seed(seed), dtype=F64), dim=0
    )
    assert_derivative(lambda s: plain_entropy(z + s * dz), em.first_order_change(z, dz))


@given(logits, seeds)
def test_eq_1_3_is_minus_a_covariance_and_ignores_a_common_shift(z, seed):
    dz = torch.randn(len(z), generator=torch.Generator().manual_seed(seed), dtype=F64)
    p, logq = z.softmax(-1), z.log_softmax(-1)
    covariance = (p * (logq - (p * logq).sum()) * (dz - (p * dz).sum())).sum()
    assert torch.allclose(em.first_order_change(z, dz), -covariance, atol=1e-10)
    assert torch.allclose(em.first_order_change(z, dz + 3.7), -covariance, atol=1e-10)


@given(small_logits, seeds)
def test_eq_1_4_second_order_is_the_hessian_and_leaves_a_cubic_error(z, seed):
    d = torch.nn.functional.normalize(
        torch.randn(len(z), generator=torch.Generator().manual_seed(seed), dtype=F64), dim=0
    )
    hessian = torch.func.hessian(plain_entropy)(z)
    assert torch.allclose(em.second_order_change(z, d), 0.5 * d @ hessian @ d, atol=1e-11)

    def error(s):
        change = plain_entropy(z + s * d) - plain_entropy(z)
        return abs(float(change - em.first_order_change(z, s * d) - em.second_order_change(z, s * d)))

    assert error(1e-2) < 5e-6 and error(5e-3) < 0.15 * error(1e-2) + 1e-9


def test_eq_1_4_second_order_of_sampled_steps_costs_entropy_on_average_not_at_every_policy():
    losses = []
    for seed in range(200):
        z = random_logits(seed, 20, 0.5 + 3 * (seed % 10) / 10)[0]
        p = z.softmax(-1)
        steps = torch.eye(20, dtype=F64) - p  # e_y - p for every y
        losses.append(float((p * em.second_order_change(z.expand(20, -1), steps)).sum()) < 0)
    assert 0.7 < sum(losses) / len(losses) < 1.0
    means = {}
    for family in ("Gauss, V=50", "peaked, V=1000", "very peaked, V=1000"):
        z = next(iter(em.random_policies(family, torch.Generator().manual_seed(0))))[:200]
        p, mean = z.softmax(-1), torch.zeros(200, dtype=F64)
        for y in p.topk(40).indices.T:  # the rest has no weight
            step = (-p).scatter_add(1, y[:, None], torch.ones(200, 1, dtype=F64))
            mean += p.gather(1, y[:, None])[:, 0] * em.second_order_change(z, step)
        means[family] = float(mean.mean()), float((mean < 0).double().mean())
    assert all(mean < -0.01 for mean, _ in means.values()), means
    assert means["very peaked, V=1000"][1] < 0.5 < means["Gauss, V=50"][1], means


@given(logits, seeds)
def test_eq_1_5_theorem_1_expected_policy_gradient(z, seed):
    adv = torch.randn(len(z), generator=torch.Generator().manual_seed(seed), dtype=F64)
    x = z.clone().requires_grad_()
    (step,) = torch.autograd.grad((x.softmax(-1) * adv).sum(), x)  # the gradient of E_p[A] itself
    (grad_h,) = torch.autograd.grad(plain_entropy(x), x)
    claim = em.expected_change(z, adv)
    assert torch.allclose(claim, (step * grad_h).sum(), atol=1e-11)
    assert torch.allclose(em.expected_change(z, adv + 5.0), claim, atol=1e-10)
    every = all_tokens(z)
    assert torch.allclose((z.softmax(-1) * adv * em.exact_score(every)).sum(), claim, atol=1e-10)
    assert_derivative(lambda s: plain_entropy(z + s * step), claim)


@given(small_logits, seeds)
def test_eq_1_6_theorem_2_natural_gradient(z, seed):
    adv = torch.randn(len(z), generator=torch.Generator().manual_seed(seed), dtype=F64)
    p = z.softmax(-1)
    fisher = torch.diag(p) - torch.outer(p, p)
    gradient = p * (adv - (p * adv).sum())
    # A solves F x = gradient, and all solutions differ by a constant, which moves no probability.
    assert torch.allclose(fisher @ adv, gradient, atol=1e-12)
    natural = em.expected_change(z, adv, natural=True)
    logq = z.log_softmax(-1)
    assert torch.allclose(natural, -((p * logq * adv).sum() - (p * logq).sum() * (p * adv).sum()), atol=1e-10)
    assert torch.allclose(natural, em.expected_change(z, adv - 2.0, natural=True), atol=1e-10)
    assert_derivative(lambda s: plain_entropy(z + s * adv / adv.norm()), natural / adv.norm())


# 2. one sampled token ---------------------------------------------------------------------------------------


@given(logits, seeds, st.sampled_from([-2.0, -0.5, 1.0]))
def test_eq_2_1_and_2_2_one_policy_gradient_step_on_a_sampled_token(z, seed, adv):
    y = seed % len(z)
    x = z.clone().requires_grad_()
    (ascent,) = torch.autograd.grad(adv * x.log_softmax(-1)[y], x)
    one_hot = torch.nn.functional.one_hot(torch.tensor(y), len(z)).to(F64)
    assert torch.allclose(ascent, adv * (one_hot - z.softmax(-1)), atol=1e-12)  # (2.1)
    change = em.entropy_change(em.token_stats(z, torch.tensor(y)), adv)
    assert torch.allclose(change, em.first_order_change(z, ascent), atol=1e-11)
    assert_derivative(lambda s: plain_entropy(z + s * ascent), change, h=5e-3)  # (2.2)


@given(logits)
def test_eq_2_3_C_is_a_nonnegative_covariance(z):
    s = em.token_stats(z, torch.tensor(0))
    p, logq = z.softmax(-1), z.log_softmax(-1)
    covariance = (p * p * logq).sum() - (p * p).sum() * (p * logq).sum()
    C = s.p2logp + s.entropy * s.p2
    assert torch.allclose(C, covariance, atol=1e-12) and C > -1e-14


def test_eq_2_3_C_vanishes_only_for_a_policy_uniform_on_its_support():
    uniform = torch.tensor([0.3, 0.3, -math.inf, 0.3], dtype=F64)
    tilted = torch.tensor([0.3, 0.31, -math.inf, 0.3], dtype=F64)
    C = [
        float(s.p2logp + s.entropy * s.p2)
        for s in (em.token_stats(z, torch.tensor(0)) for z in (uniform, tilted))
    ]
    assert abs(C[0]) < 1e-16 and C[1] > 1e-6


@given(small_logits)
def test_eq_2_4_own_logit_and_the_push_on_the_others(z):
    p, u = z.softmax(-1), z.log_softmax(-1) + plain_entropy(z)
    everything = (p**2 * u).sum()
    own, others = p * (1 - p) * u, everything - p**2 * u
    assert torch.allclose(-em.exact_score(all_tokens(z)), own - others, atol=1e-12)


@given(logits)
def test_eq_2_5_the_expected_score_vanishes(z):
    assert abs(float((z.softmax(-1) * em.exact_score(all_tokens(z))).sum())) < 1e-12


@given(logits, st.sampled_from([-1.0, 1.0]))
def test_eq_2_6_quadrants(z, adv):
    s = all_tokens(z)
    p, u, C = s.logp.exp(), s.logp + s.entropy, s.p2logp + s.entropy * s.p2
    clear = (p * u - C).abs() > 1e-12
    change = em.entropy_change(s, adv)
    likely = p * u > C
    assert torch.equal((change < 0)[clear], (likely == (adv > 0))[clear])
    assert not likely[(u < 0) & clear].any()  # p < e^-H is enough to be unlikely


@given(small_logits, seeds)
def test_eq_2_7_samples_add_and_cancelling_advantages_cancel_C(z, seed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(z), (6,), generator=g)
    adv = torch.randn(6, generator=g, dtype=F64)
    adv = adv - adv.mean()
    s = em.token_stats(z.expand(6, -1), ids)
    total = em.entropy_change(s, adv).sum()
    assert torch.allclose(total, em.entropy_change(s, adv, "s_star").sum(), atol=1e-12)
    step = (adv.unsqueeze(1) * (torch.nn.functional.one_hot(ids, len(z)) - z.softmax(-1))).sum(0)
    assert_derivative(lambda h: plain_entropy(z + h * step / (1 + step.norm())), total / (1 + step.norm()))


@given(
    small_logits,
    seeds,
    st.sampled_from([-1.5, 1.0]),
    st.sampled_from([-0.5, -0.28, -0.1, 0.0, 0.1, 0.24, 0.3]),
)
def test_eq_2_8_off_policy_the_surrogate_slope_replaces_the_advantage(z, seed, adv, shift):
    y = torch.tensor(seed % len(z))
    x = z.clone().requires_grad_()
    stats = em.token_stats(x, y)
    old = stats.logp.detach() - shift
    ratio = (stats.logp - old).exp()
    surrogate = torch.minimum(ratio * adv, ratio.clamp(0.8, 1.28) * adv)
    (ascent,) = torch.autograd.grad(surrogate, x)
    slope = clip_factor(stats.logp, old, torch.tensor(adv, dtype=F64), 0.2, 0.28) * adv
    assert not slope.requires_grad
    predicted = em.entropy_change(stats, slope)
    assert torch.allclose(predicted, em.first_order_change(z, ascent), atol=1e-11)
    clipped = (adv > 0 and shift > math.log(1.28)) or (adv < 0 and shift < math.log(0.8))
    assert (float(slope) == 0) == clipped


@given(small_logits, seeds, st.floats(0.3, 3.0))
def test_eq_2_9_temperature_divides_by_its_square(z, seed, tau):
    y = torch.tensor(seed % len(z))
    x = z.clone().requires_grad_()
    stats = em.token_stats(x, y, temperature=tau)
    (ascent,) = torch.autograd.grad(stats.logp, x)
    (grad_h,) = torch.autograd.grad(plain_entropy(x / tau), x)
    assert torch.allclose(em.exact_score(stats) / tau**2, (ascent * grad_h).sum(), atol=1e-11)


def test_exact_score_in_float32_is_good_to_1e_7_of_a_nat():
    for scale in (0.1, 2.0, 10.0):
        z = random_logits(1, 1000, scale, rows=200)
        ids = torch.multinomial(z.softmax(-1), 1, generator=torch.Generator().manual_seed(0)).squeeze(1)
        error = em.exact_score(em.token_stats(z.float(), ids)) - em.exact_score(em.token_stats(z, ids))
        assert error.abs().max() < 1e-6 and error.square().mean().sqrt() < 2e-7
    z = random_logits(1, 151_936, 4.0, rows=8)
    ids = torch.multinomial(z.softmax(-1), 1, generator=torch.Generator().manual_seed(0)).squeeze(1)
    exact = em.exact_score(em.token_stats(z.float().double(), ids))
    plain, head = (em.head_token_stats(torch.eye(8), z.float().T, ids, chunk=c) for c in (None, 8 * 4096))
    assert (em.exact_score(plain) - exact).abs().max() < 1e-4
    assert (em.exact_score(head) - exact).abs().max() < 1e-6


def test_eq_2_2_a_token_of_probability_zero_has_score_C():
    s = em.token_stats(torch.tensor([0.0, 1.0, -math.inf], dtype=F64), torch.tensor(2))
    C = float(s.p2logp + s.entropy * s.p2)
    assert float(em.exact_score(s)) == pytest.approx(C)
    assert float(em.entropy_change(s, 1.0)) == pytest.approx(C)
    for form in ("s_star", "steer_theorem"):
        assert float(em.entropy_change(s, 1.0, form)) == 0, "p u -> 0"


# 3. the estimators ------------------------------------------------------------------------------------------


@given(logits)
def test_eq_3_2_mean_of_every_form_over_the_policy(z):
    s, p = all_tokens(z), z.softmax(-1)
    u = s.logp + s.entropy
    C, D = float(em.exact_score(s)[0] + p[0] * u[0]), float((p**3 * u).sum())
    expected = {
        "exact": 0,
        "s_star": C,
        "steer_theorem": C - D,
        "steer_released": -C,
        "opefo": D - 2 * C,
        "cov": 0,
    }
    assert set(expected) == set(em.FORMS) and D >= -1e-14
    for form, b in expected.items():
        assert abs(float((p * em.entropy_change(s, 1.0, form)).sum()) + b) < 1e-10, form


def test_eq_3_2_size_of_the_errors_at_a_confident_and_at_a_rare_token():
    p = torch.tensor([1e-3, 1 - 1e-3], dtype=F64)
    exact = {f: float(em.entropy_change(all_tokens(p.log()), 1.0, f)[1]) for f in em.FORMS}
    ratio = {f: exact[f] / exact["exact"] for f in em.FORMS}
    for form, claim in (
        ("steer_theorem", 0.5),
        ("steer_released", 0.5),
        ("opefo", 5e-4),
        ("s_star", 500),
        ("cov", 500),
    ):
        assert abs(ratio[form] / claim - 1) < 0.01, form
    q = torch.tensor([0.5, 0.3, 0.2 - 1e-9, 1e-9], dtype=F64)
    s = all_tokens(q.log())
    C = float(s.p2logp[0] + s.entropy[0] * s.p2[0])
    rare = {f: float(em.entropy_change(s, 1.0, f)[3]) for f in em.FORMS}
    assert abs(rare["exact"] / C - 1) < 1e-6
    assert rare["s_star"] < 1e-6 * C and rare["steer_theorem"] < 1e-6 * C
    assert all(rare[f] > 100 * C for f in ("steer_released", "opefo", "cov"))


@given(logits)
def test_eq_3_3_sign_rule_no_other_disagreement_exists(z):
    s = all_tokens(z)
    pu, C = s.logp.exp() * (s.logp + s.entropy), s.p2logp + s.entropy * s.p2
    exact = em.entropy_change(s, 1.0)
    for form in PROXIES:
        guess = em.entropy_change(s, 1.0, form)
        disagree = (guess * exact < 0) & (exact.abs() > 1e-13) & (pu.abs() > 1e-13)
        assert torch.equal(disagree, (pu > 1e-13) & (C - pu > 1e-13) & (guess != 0)), form
        assert (exact[disagree] > 0).all() and (guess[disagree] < 0).all()


def test_eq_3_4_bias_at_constant_advantage_has_the_claimed_sign():
    cases = em.estimator_cases("Gauss, V=50")
    bias = {form: float(cases[f"bias/{form}"]) for form in em.FORMS}
    assert abs(bias["exact"]) < 1e-9 and abs(bias["cov"]) < 1e-9
    assert bias["s_star"] < -0.3 and bias["steer_theorem"] < -0.3
    assert bias["steer_released"] > 0.3 and bias["opefo"] > bias["steer_released"]


def test_entropy_change_forms_by_hand_broadcast_and_detach():
    z = torch.tensor([[1.0, 0.0, -2.0]], dtype=F64, requires_grad=True)
    s = em.token_stats(z, torch.tensor([1]))
    p, h = z.detach().softmax(-1)[0, 1], plain_entropy(z.detach())[0]
    u = p.log() + h
    by_hand = {"s_star": p * u, "steer_theorem": p * (1 - p) * u, "steer_released": (1 - p) * u}
    by_hand |= {"opefo": (1 - p) ** 2 * u, "cov": u}
    for form, b in by_hand.items():
        change = em.entropy_change(s, torch.tensor([[2.0], [-3.0]]), form)
        assert change.shape == (2, 1) and not change.requires_grad
        assert torch.allclose(change, torch.stack([-2 * b, 3 * b]).unsqueeze(1), atol=1e-14), form
    with pytest.raises(ValueError, match="form='exakt'.*exact"):
        em.entropy_change(s, 1.0, "exakt")


# 4. the statistics ------------------------------------------------------------------------------------------


@given(logits, seeds, st.floats(0.2, 3.0))
def test_token_stats_match_their_definitions(z, seed, tau):
    y = seed % len(z)
    s = em.token_stats(z, torch.tensor(y), tau)
    p = (z / tau).softmax(-1)
    logq = (z / tau).log_softmax(-1)
    for got, want in zip(
        (s.logp, s.entropy, s.p2, s.p2logp),
        (logq[y], -(p * logq).sum(), (p * p).sum(), (p * p * logq).sum()),
        strict=True,
    ):
        assert got.dtype == F64 and torch.allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_stats_are_stable_at_1e4_and_accumulate_in_float32(dtype):
    # An offset common to all logits must change nothing; 8192 and its neighbours are exact in every dtype.
    small = torch.tensor([[0.0, -64.0, -64.0, -128.0]])
    z = (small + 8192.0).to(dtype).requires_grad_()
    s = em.token_stats(z, torch.tensor([0]))
    want = em.token_stats(small.double(), torch.tensor([0]))
    assert s.logp.dtype == s.entropy.dtype == s.p2.dtype == torch.float32
    assert torch.allclose(s.logp.double(), want.logp, atol=1e-6) and torch.allclose(s.p2.double(), want.p2)
    (s.logp + s.entropy).sum().backward()
    assert z.grad.isfinite().all()
    low = em.token_stats(torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([1]))
    assert (
        low.logp.item() == -2e4 and low.entropy.item() == 0 and low.p2.item() == 1 and low.p2logp.item() == 0
    )


def test_token_stats_with_masked_logits_equal_those_of_the_support():
    z = random_logits(3, 9, 2.0, rows=4, masked=5).requires_grad_()
    part = z.detach()[:, 5:].clone().requires_grad_()
    ids = torch.tensor([5, 6, 7, 8])
    s, want = em.token_stats(z, ids), em.token_stats(part, ids - 5)
    weights = torch.arange(1.0, 5.0, dtype=F64)
    for stats in (s, want):
        ((stats.logp + 2 * stats.entropy) * weights).sum().backward()
    for name in ("logp", "entropy", "p2", "p2logp"):
        assert torch.allclose(getattr(s, name), getattr(want, name), atol=1e-14)
    assert torch.allclose(z.grad[:, 5:], part.grad, atol=1e-14) and (z.grad[:, :5] == 0).all()


def test_token_stats_gradients_first_second_and_forward_mode():
    z = random_logits(5, 6, 1.5, rows=3).requires_grad_()
    ids = torch.tensor([0, 3, 5])

    def both(x):
        s = em.token_stats(x, ids)
        return s.logp, s.entropy

    assert torch.autograd.gradcheck(both, z) and torch.autograd.gradgradcheck(both, z)
    tangent = random_logits(6, 6, 1.0, rows=3)
    _, (d_logp, d_entropy) = torch.func.jvp(both, (z.detach(),), (tangent,))
    assert torch.allclose(d_entropy, em.first_order_change(z.detach(), tangent), atol=1e-12)
    score = torch.nn.functional.one_hot(ids, 6) - z.detach().softmax(-1)
    assert torch.allclose(d_logp, (score * tangent).sum(-1), atol=1e-12)


def test_token_stats_graphs_and_errors():
    z = random_logits(7, 5, 1.0, rows=6).view(2, 3, 5).requires_grad_()
    ids = torch.zeros(2, 3, dtype=torch.int32)
    s = em.token_stats(z, ids)
    assert s.logp.requires_grad and s.entropy.requires_grad and not s.p2.requires_grad
    assert not s.detach().logp.requires_grad
    assert not em.token_stats(z, ids, entropy_grad=False).entropy.requires_grad
    with pytest.raises(ValueError, match=r"ids has shape \(2,\)"):
        em.token_stats(z, ids[:, 0])
    with pytest.raises(ValueError, match="temperature=0"):
        em.token_stats(z, ids, temperature=0)
    with pytest.raises(ValueError, match=r"\[0, 5\].*vocabulary of 5"):
        em.token_stats(z, torch.tensor([[0, 0, 0], [0, 0, 5]]))


def head_case(seed=0, tokens=40, vocab=700, width=12, dtype=F64, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(tokens, width, generator=g, dtype=F64)).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g, dtype=F64).to(dtype).requires_grad_()
    bias = torch.randn(vocab, generator=g, dtype=F64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (tokens,), generator=g), bias


def values_and_gradients(hidden, weight, ids, bias, chunk, entropy_grad, temperature=1.0):
    s = em.head_token_stats(hidden, weight, ids, temperature, bias, chunk, entropy_grad)
    g = torch.randn(2, *ids.shape, generator=torch.Generator().manual_seed(9), dtype=F64).to(s.logp.dtype)
    loss = (g[0] * s.logp).sum() + ((g[1] * s.entropy).sum() if entropy_grad else 0)
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    return [s.logp, s.entropy, s.p2, s.p2logp, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@given(
    seeds,
    st.sampled_from([0.01, 1.0, 6.0]),
    st.sampled_from([0.6, 1.0]),
    st.sampled_from([1, 40 * 128, 40 * 300, 40 * 699]),
)
def test_eq_4_1_to_4_4_chunked_equals_plain_to_1e_12(entropy_grad, with_bias, seed, scale, tau, chunk):
    hidden, weight, ids, bias = head_case(seed, scale=scale)
    bias = bias if with_bias else None
    plain = values_and_gradients(hidden, weight, ids, bias, None, entropy_grad, tau)
    chunked = values_and_gradients(hidden, weight, ids, bias, chunk, entropy_grad, tau)
    for a, b in zip(plain, chunked, strict=True):
        assert (a - b).norm() <= 1e-12 * a.norm()


def test_eq_4_4_one_chunked_graph_serves_two_gradients():
    """That of log-probabilities is bit for bit the one of a graph without entropies; that of entropies alone
    is the plain form's."""
    hidden, weight, ids, bias = head_case()
    alone = em.head_token_stats(hidden, weight, ids, bias=bias, chunk=1)
    both = em.head_token_stats(hidden, weight, ids, bias=bias, chunk=1, entropy_grad=True)
    plain = em.head_token_stats(hidden, weight, ids, bias=bias, chunk=None, entropy_grad=True)
    of = lambda x: torch.autograd.grad(x.sum(), (hidden, weight, bias), retain_graph=True)  # noqa: E731
    for a, b in zip(of(both.entropy), of(plain.entropy), strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()
    for a, b in zip(of(both.logp), of(alone.logp), strict=True):
        assert torch.equal(a, b)


def test_eq_4_2_a_masking_bias_and_a_block_of_nothing_but_minus_infinity():
    hidden, weight, _, bias = head_case()
    bias = bias.detach().clone()
    bias[:300] = -math.inf  # the first two blocks are empty
    bias.requires_grad_()
    ids = torch.arange(300, 340)
    plain = values_and_gradients(hidden, weight, ids, bias, None, True)
    chunked = values_and_gradients(hidden, weight, ids, bias, 1, True)
    for a, b in zip(plain, chunked, strict=True):
        assert b.isfinite().all() and (a - b).norm() <= 1e-12 * a.norm()


def test_head_token_stats_keeps_leading_dimensions_frozen_inputs_and_no_entropy_graph():
    hidden, weight, ids, _ = head_case(tokens=12)
    wide = hidden.detach().view(3, 4, -1).requires_grad_()
    s = em.head_token_stats(wide, weight.detach(), ids.view(3, 4), chunk=1)
    assert s.logp.shape == (3, 4) and s.logp.requires_grad
    assert not s.entropy.requires_grad and not s.p2.requires_grad and not s.p2logp.requires_grad
    s.logp.sum().backward()
    (want,) = torch.autograd.grad(em.token_stats(hidden @ weight.detach().T, ids).logp.sum(), hidden)
    assert torch.allclose(wide.grad.view_as(want), want, atol=1e-12)
    plain = em.head_token_stats(hidden, weight, ids, chunk=None)
    assert plain.logp.requires_grad and not plain.entropy.requires_grad
    small = em.head_token_stats(hidden, weight, ids)  # fits in one chunk: the plain form, bit for bit
    assert torch.equal(small.logp, plain.logp)
    logp = em.head_token_stats(hidden, weight, ids, chunk=1).logp
    with pytest.raises(RuntimeError, match="chunk=None"):
        torch.autograd.grad(logp.sum(), hidden, create_graph=True)
    with pytest.raises(ValueError, match="vocabulary of 700"):
        em.head_token_stats(hidden, weight, ids + 700, chunk=1)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns, forward and backward."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes():
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_head_token_stats_never_holds_more_than_a_chunk_of_logits(entropy_grad):
    hidden, weight, ids, bias = head_case(tokens=64, vocab=5000, width=4)
    sizes = {}
    for chunk in (None, 64 * 128):
        with LargestTensor() as record:
            values_and_gradients(hidden, weight, ids, bias, chunk, entropy_grad)
        sizes[chunk] = record.largest
    assert sizes[None] == 64 * 5000  # the record sees what it should see
    assert sizes[64 * 128] <= 5000 * 4  # the weight's gradient is the largest thing left


@pytest.mark.parametrize("chunk", [None, 1])
def test_head_token_stats_in_bf16_keeps_the_gradient_of_confident_tokens(chunk):
    # p is about .999: 1 - p must survive although bf16 knows no number between .996 and 1.
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(600, 32, generator=g).to(torch.bfloat16).requires_grad_()
    ids = torch.randint(600, (50,), generator=g)
    hidden = (0.45 * weight.detach()[ids].float()).to(torch.bfloat16).requires_grad_()
    s = em.head_token_stats(hidden, weight, ids, chunk=chunk)
    assert s.logp.dtype == torch.float32 and s.logp.exp().median() > 0.98
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = torch.autograd.grad(em.token_stats(exact[0] @ exact[1].T, ids).logp.sum(), exact)
    for a, b in zip(torch.autograd.grad(s.logp.sum(), (hidden, weight)), want, strict=True):
        assert (a.double() - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_head_token_stats_in_float16_has_the_plain_forms_gradients_at_a_large_vocabulary(entropy_grad):
    hidden, weight, ids, _ = head_case(tokens=8, vocab=100_000, width=16, dtype=torch.float16, scale=1e-2)
    plain, chunked = (values_and_gradients(hidden, weight, ids, None, c, entropy_grad) for c in (None, 2**17))
    for a, b in zip(plain, chunked, strict=True):
        assert b.isfinite().all() and torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-3)


def test_head_token_stats_under_autocast_runs_in_bf16_and_returns_float32_gradients():
    hidden, weight, ids, _ = head_case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, chunked = (em.head_token_stats(hidden, weight, ids, chunk=c) for c in (None, 1))
    gradients = [torch.autograd.grad(s.logp.sum(), (hidden, weight)) for s in (plain, chunked)]
    assert torch.allclose(plain.logp, chunked.logp, atol=1e-5) and chunked.logp.dtype == torch.float32
    for a, b in zip(*gradients, strict=True):
        assert b.dtype == torch.float32 and (a - b).norm() < 0.02 * a.norm()


# 5. the ledger ----------------------------------------------------------------------------------------------


class TinyModel(torch.nn.Module):
    """Embedding, one causal attention layer, an MLP, an output head, shared by all positions."""

    def __init__(self, seed=0, width=12, vocab=11, fused=False):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = torch.nn.Embedding(vocab, width), torch.nn.Linear(width, vocab, bias=False)
        self.qkv, self.mlp = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.fused = fused

    def forward(self, ids):
        x = self.embed(ids)  # (B, T, D)
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            mix = torch.nn.functional.scaled_dot_product_attention(
                *(t.unsqueeze(1) for t in (q, k, v)), is_causal=True
            )
            x = x + mix.squeeze(1)
        else:
            scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            x = x + scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return 2 * self.head(x + torch.tanh(self.mlp(x)))


class LedgerCase:
    """A batch for TinyModel: statistics, network flow, mean entropy, a policy-gradient step."""

    def __init__(self, dtype=F64, fused=False, seed=0):
        self.model = TinyModel(seed, fused=fused).to(dtype)
        g = torch.Generator().manual_seed(seed + 1)
        self.inputs, self.ids = (torch.randint(11, (4, 6), generator=g) for _ in range(2))
        self.adv = torch.randn(4, 6, generator=g, dtype=F64).to(dtype)
        self.params = dict(self.model.named_parameters())

    def stats(self, params=None):
        return em.token_stats(
            torch.func.functional_call(self.model, params or self.params, (self.inputs,)), self.ids
        )

    def mean_entropy(self):
        return self.stats().entropy.mean()

    def entropy_grad(self):
        grads = torch.autograd.grad(self.mean_entropy(), list(self.params.values()), allow_unused=True)
        return dict(zip(self.params, grads, strict=True))

    def flow(self, P=None, **kw):
        return em.network_flow(
            lambda p: self.stats(p).logp, self.params, self.adv, self.entropy_grad(), P, **kw
        )

    def step(self, optimizer, keep=1.0):
        """One real step; returns the parameters' change by name."""
        old = {k: p.detach().clone() for k, p in self.params.items()}
        optimizer.zero_grad()
        (-(keep * self.adv * self.stats().logp).mean()).backward()
        optimizer.step()
        return {k: p.detach() - old[k] for k, p in self.params.items()}


def one_by_one(case, P=None):
    """Network flows from one backward pass per token."""
    grad_h, flows = case.entropy_grad(), torch.zeros(24, dtype=F64)
    logp = case.stats().logp.flatten()
    for t in range(24):
        score = torch.autograd.grad(logp[t], list(case.params.values()), retain_graph=True, allow_unused=True)
        for (name, param), s in zip(case.params.items(), score, strict=True):
            scale = 1.0 if P is None else P[param]
            flows[t] += case.adv.flatten()[t] * (s * scale * grad_h[name]).double().sum()
    return flows.view(4, 6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("dtype", "mode", "tolerance"),
    [
        (F64, "jvp", 1e-10),
        (F64, "difference", 1e-5),
        (torch.float32, "jvp", 1e-5),
        (torch.float32, "difference", 1e-3),
    ],
)
def test_eq_5_3_network_flow_equals_per_token_gradients(optimizer, dtype, mode, tolerance):
    case, P = LedgerCase(dtype), None
    if optimizer == "adamw":
        opt = torch.optim.AdamW(case.model.parameters(), lr=1e-3)
        for _ in range(3):
            case.step(opt)
        P = em.adam_preconditioner(opt)
    want = one_by_one(case, P)
    assert (case.flow(P, mode=mode).double() - want).norm() <= tolerance * want.norm()


def test_eq_5_4_difference_step_1e_4_in_float32_beats_larger_steps_and_one_in_a_thousand():
    errors = {}
    for rel_step in (1e-4, 1e-2):
        ratio = []
        for seed in range(5):
            case = LedgerCase(torch.float32, seed=seed)
            want = one_by_one(case)
            got = case.flow(mode="difference", rel_step=rel_step).double()
            ratio.append(float((got - want).norm() / want.norm()))
        errors[rel_step] = sorted(ratio)[2]
    assert errors[1e-4] <= 1e-3 < errors[1e-2]


@pytest.mark.parametrize("seed", range(3))
def test_eq_5_3_predicts_the_measured_change_with_half_of_the_tokens_off(seed):
    keep = (torch.rand(4, 6, generator=torch.Generator().manual_seed(seed)) < 0.5).double()
    case = LedgerCase(seed=seed)
    predicted = 1e-3 / 24 * float((keep * case.flow()).sum())
    before = case.mean_entropy()
    case.step(torch.optim.SGD(case.model.parameters(), lr=1e-3), keep)
    assert abs(case.mean_entropy().item() - before.item() - predicted) < 0.01 * abs(predicted)
    everything = 1e-3 / 24 * float(LedgerCase(seed=seed).flow().sum())
    assert abs(predicted - everything) > 0.03 * abs(predicted)  # the half is not the whole


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=1e-2),
        lambda p: torch.optim.AdamW(p, lr=1e-4, betas=(0.0, 0.95), weight_decay=0.0),
        lambda p: torch.optim.Adam(p, lr=1e-4, betas=(0.0, 0.9), amsgrad=True),
    ],
)
def test_eq_5_3_flows_sum_to_the_directional_derivative_of_a_step_without_momentum(make):
    case = LedgerCase()
    opt = make(case.model.parameters())
    for _ in range(3):  # so that Adam's v is not just the last gradient squared
        case.step(opt)
    grad_h, twin = case.entropy_grad(), LedgerCase()
    twin.model.load_state_dict(case.model.state_dict())
    deltas = case.step(opt)
    P = em.adam_preconditioner(opt)
    P_twin = {twin.params[name]: P[p] for name, p in case.params.items()}
    total = opt.param_groups[0]["lr"] / 24 * float(twin.flow(P_twin).sum())
    assert abs(total - em.entropy_directional_change(grad_h, deltas)) < 1e-6 * abs(total)


def test_eq_5_1_directional_change_predicts_a_step_with_momentum_and_decay_where_the_flows_do_not():
    case = LedgerCase()
    opt = torch.optim.AdamW(case.model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    ledger, flows, measured = [], [], []
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        case.adv = torch.randn(4, 6, generator=g, dtype=F64)
        grad_h, before = case.entropy_grad(), case.mean_entropy().item()
        twin = LedgerCase()
        twin.model.load_state_dict(case.model.state_dict())
        twin.adv = case.adv
        deltas = case.step(opt)
        P = em.adam_preconditioner(opt)
        flows.append(
            3e-4 / 24 * float(twin.flow({twin.params[k]: P[p] for k, p in case.params.items()}).sum())
        )
        ledger.append(em.entropy_directional_change(list(grad_h.values()), list(deltas.values())))
        measured.append(case.mean_entropy().item() - before)
    good, poor = em.agreement(ledger, measured), em.agreement(flows, measured)
    assert good.pearson > 0.99 and abs(good.slope - 1) < 0.05
    assert poor.pearson < 0.8


def test_directional_change_by_name_or_in_order_and_refuses_mismatches():
    ones = torch.ones(1000)
    assert em.entropy_directional_change({"a": ones, "b": None}, {"b": ones, "a": 2 * ones}) == 2000
    large = em.entropy_directional_change([1e4 * ones, ones], [1e4 * ones, 1e-9 * ones])  # lost in float32
    assert large - 1e11 == pytest.approx(1e-6, rel=0.1, abs=2e-5)
    for deltas in ([ones, ones], [ones[:3]], [ones[:1]]):
        with pytest.raises(ValueError):
            em.entropy_directional_change([ones], deltas)
    with pytest.raises(KeyError):
        em.entropy_directional_change({"a": ones}, {"c": ones})


def test_eq_5_2_preconditioner_is_the_one_of_the_step_taken_and_zero_where_v_is():
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    unused = torch.nn.Parameter(torch.zeros(2))
    opt = torch.optim.Adam([w, unused], lr=0.1, betas=(0.0, 0.9))
    with pytest.raises(ValueError, match="take the step first"):
        em.adam_preconditioner(opt)
    for gradient in ([1.0, 0.0, -2.0], [0.5, 0.0, 3.0]):
        before, w.grad = w.detach().clone(), torch.tensor(gradient, dtype=F64)
        opt.step()
        P = em.adam_preconditioner(opt)
        assert torch.allclose(w.detach() - before, -0.1 * P[w] * w.grad, atol=1e-14)
    assert P[w][1] == 0 and torch.equal(P[unused], torch.zeros(2))
    assert torch.equal(em.adam_preconditioner(torch.optim.SGD([w], lr=0.1))[w], torch.ones(3, dtype=F64))
    with pytest.raises(TypeError, match="Adagrad"):
        em.adam_preconditioner(torch.optim.Adagrad([w]))


def test_network_flow_falls_back_with_a_warning_where_a_kernel_has_no_forward_mode():
    case, plain = LedgerCase(fused=True), LedgerCase()
    with pytest.warns(UserWarning, match="central differences"):
        flow = case.flow()
    assert torch.allclose(flow, plain.flow(mode="jvp"), rtol=1e-4, atol=1e-8)
    with pytest.raises(NotImplementedError):
        case.flow(mode="jvp")
    with pytest.raises(ValueError, match="bogus"):
        em.network_flow(lambda p: None, case.params, 1.0, {"bogus": torch.ones(1)})
    zero = em.network_flow(lambda p: plain.stats(p).logp, plain.params, plain.adv, {}, mode="difference")
    assert torch.equal(zero, torch.zeros(4, 6, dtype=F64))


# 6. the set point -------------------------------------------------------------------------------------------

flows_up_down = st.tuples(st.floats(0, 1e3), st.floats(0, 1e3))


@given(flows_up_down)
def test_eq_6_1_balance_switches_the_net_flow_off(flows):
    P, Q = flows
    lam = em.set_point_lambda(P, Q)
    assert -1 <= lam <= 1 and abs((1 + lam) * P - (1 - lam) * Q) <= 1e-9 * (P + Q)
    assert lam == em.set_point_lambda(P, Q, entropy=0.3, target=0.5, gain=0.0)
    assert lam == em.set_point_lambda(P, Q, entropy=0.5, target=0.5, gain=2.0)
    assert em.set_point_lambda(Q, P) == pytest.approx(-lam)
    assert em.set_point_lambda(3 * P, 3 * Q) == pytest.approx(lam)


@given(flows_up_down, st.floats(0, 3), st.floats(0, 3), st.floats(0.05, 2), st.floats(0, 5))
def test_eq_6_2_restoring_flow_monotone_and_clamped(flows, h1, h2, target, gain):
    P, Q = flows
    low, high = sorted((h1, h2))
    lam_low, lam_high = (em.set_point_lambda(P, Q, h, target, gain) for h in (low, high))
    assert -1 <= lam_high <= lam_low <= 1
    net = (1 + lam_low) * P - (1 - lam_low) * Q
    if abs(lam_low) < 1 and P + Q > 0:
        assert net == pytest.approx(gain * (target - low) / target * (P + Q), abs=1e-6 * (P + Q))


def test_eq_6_2_edges():
    assert em.set_point_lambda(0.0, 0.0) == 0 and em.set_point_lambda(0, 0, 0.1, 0.5, 2.0) == 0
    assert (
        em.set_point_lambda(1.0, 0.0) == -1 and em.set_point_lambda(torch.tensor(0.0), torch.tensor(1.0)) == 1
    )
    for bad in ((-1.0, 1.0), (1.0, math.nan), (math.inf, 1.0)):
        with pytest.raises(ValueError, match="finite and not negative"):
            em.set_point_lambda(*bad)
    for entropy, target in ((None, 0.5), (0.5, None), (0.5, 0.0), (math.nan, 0.5)):
        with pytest.raises(ValueError, match="gain=2.0 needs"):
            em.set_point_lambda(1.0, 1.0, entropy, target, 2.0)
    with pytest.raises(ValueError, match="gain=-1"):
        em.set_point_lambda(1.0, 1.0, 0.5, 0.5, -1.0)


def train_table(gain, target, steps=150, rate=4.0):
    """Bandits whose flows are weighted by λ: entropy before each step. Large steps, so second order bites."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(48, 24, generator=g, dtype=F64)
    correct, state = torch.rand(48, 24, generator=g) < 0.3, torch.arange(48).repeat_interleave(8)
    history = []
    for _ in range(steps):
        ids = torch.multinomial(z.softmax(-1), 8, True, generator=g).view(-1)
        reward = correct[state, ids].double().view(48, 8)
        adv = (reward - reward.mean(1, keepdim=True)).view(-1)
        stats = em.token_stats(z[state], ids)
        history.append(float(em.entropy(z).mean()))
        flow = em.entropy_change(stats, adv)
        up, down = flow.clamp_min(0).sum(), (-flow).clamp_min(0).sum()
        weight = 1.0
        if gain is not None:
            weight = 1 + em.set_point_lambda(up, down, history[-1], target, gain) * flow.sign()
        slope = torch.nn.functional.one_hot(ids, 24) - z.softmax(-1)[state]
        z = z.index_add(0, state, rate / 8 * (weight * adv).unsqueeze(1) * slope)
    return history


def test_eq_6_3_and_6_4_balance_drifts_and_feedback_holds():
    start = train_table(None, None, steps=1)[0]
    target = 0.7 * start
    plain, balance, held = (train_table(gain, target) for gain in (None, 0.0, 2.0))
    assert plain[-1] < balance[-1] < 0.75 * start  # balance slows the loss and does not stop it
    assert balance[-1] < balance[75] - 0.1 < balance[35] - 0.2
    assert all(abs(h / target - 1) < 0.1 for h in held[len(held) // 2 :])
    offsets = [abs(sum(train_table(k, target)[-30:]) / 30 - target) for k in (1.0, 4.0)]
    assert offsets[1] < 0.6 * offsets[0]  # (6.4): the offset shrinks with the gain


def _states(seed, n=6, vocab=5):
    """Logits of a table, ∇ of its mean entropy, a step, a preconditioner."""
    g = torch.Generator().manual_seed(seed)
    z, step = torch.randn(2, n, vocab, generator=g, dtype=torch.float64)
    scale = torch.rand(n, vocab, generator=g, dtype=torch.float64) + 0.1
    return z, em.entropy_gradient(z) / n, step, scale


@given(seeds, st.sampled_from([0.0, 0.3, -2.0]))
def test_eq_6_5_holds_the_entropy_of_the_batch_to_second_order(seed, want):
    z, grad, step, scale = _states(seed)
    for eta in (1e-2, 1e-3, 1e-4):
        parts = [x.split(2) for x in (grad, eta * step, scale)]
        moved = eta * step + em.neutral_step(*parts, want=eta * want) * scale * grad
        change = float((em.entropy(z + moved) - em.entropy(z)).mean())
        assert abs(change - eta * want) <= 3 * float(moved.square().sum(-1).mean())  # curvature, (1.4)
        assert float((grad * moved).sum()) == pytest.approx(eta * want, abs=1e-15)


@given(seeds)
def test_eq_6_5_is_the_smallest_correction_in_the_optimizers_measure(seed):
    _, grad, step, scale = _states(seed)
    c = em.neutral_step([grad], [step], [scale])
    ours = c * scale * grad
    other = torch.randn(grad.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    other -= grad * (grad * other).sum() / grad.square().sum()  # moves entropy by nothing
    assert ((ours + other).square() / scale).sum() >= (ours.square() / scale).sum()


@given(seeds)
def test_eq_6_6_what_the_next_batch_sees(seed):
    """With <h, P n> = 0 the sentence is an identity, of which the docstring has the mean."""
    _, h, step, scale = _states(seed)
    n = torch.randn(h.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) / 9
    n -= h * (h * scale * n).sum() / (h * scale * h).sum()
    g = h + n
    moved = step + em.neutral_step([g], [step], [scale]) * scale * g
    rho = (h * scale * h).sum() / (g * scale * g).sum()
    want = (1 - rho) * (h * step).sum() - rho * (n * step).sum()
    assert torch.allclose((h * moved).sum(), want, atol=1e-12) and 0 < rho < 1


def test_eq_6_5_edges():
    grad, step, scale = torch.zeros(3), torch.ones(3), torch.ones(3)
    assert em.neutral_step([grad, None], [step, step], [scale, scale], want=1.0) == 0.0
    assert em.neutral_step([None, scale], [step, step], [scale, 2 * scale]) == -0.5
    with pytest.raises(ValueError):
        em.neutral_step([grad], [step, step], [scale])
    with pytest.raises(ValueError, match="shape"):
        em.neutral_step([torch.ones(3)], [torch.ones(1)], [torch.ones(3)])


# 7. the law, and agreement ----------------------------------------------------------------------------------


@given(st.floats(-2, 2), st.floats(-1, 1), seeds)
def test_eq_7_1_law_recovers_noiseless_data_in_any_order(a, b, seed):
    a = a if abs(a) > 1e-3 else 0.5
    h = torch.rand(20, generator=torch.Generator().manual_seed(seed), dtype=F64) * 2
    r = b - a * h.exp()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    for law in (em.fit_entropy_law(h, r), em.fit_entropy_law(h[order].tolist(), r[order].tolist())):
        got_a, got_b, r2 = law
        assert (
            got_a == pytest.approx(a, rel=1e-8)
            and got_b == pytest.approx(b, abs=1e-8)
            and r2 == pytest.approx(1)
        )
    assert law.ceiling == pytest.approx(b - a, abs=1e-8)
    assert law.predict(0.7) == pytest.approx(b - a * math.exp(0.7), abs=1e-8)
    assert torch.allclose(law.predict(h), r, atol=1e-8)


def test_eq_7_1_is_the_least_squares_solution_and_r2_its_explained_share():
    g = torch.Generator().manual_seed(0)
    h = torch.rand(60, generator=g, dtype=F64)
    r = 0.8 - 0.2 * h.exp() + 0.03 * torch.randn(60, generator=g, dtype=F64)
    design = torch.stack([-h.exp(), torch.ones(60, dtype=F64)], 1)
    a, b = torch.linalg.lstsq(design, r.unsqueeze(1)).solution.flatten().tolist()
    law = em.fit_entropy_law(h, r)
    assert law.a == pytest.approx(a) and law.b == pytest.approx(b)
    assert law.r2 == pytest.approx(float(torch.corrcoef(torch.stack([h.exp(), r]))[0, 1]) ** 2)


@pytest.mark.parametrize(
    ("entropy", "score", "message"),
    [
        ([0.1, 0.2], [0.3, 0.4], "at least 3"),
        ([0.1, 0.2, 0.3], [0.3, 0.4], "equally many"),
        ([0.1, math.nan, 0.3], [0.1, 0.2, 0.3], "NaN"),
        ([0.5, 0.50001, 0.49999], [0.1, 0.2, 0.3], "entropy stays"),
        ([0.1, 0.2, 0.3], [0.4, 0.4, 0.4], "constant"),
    ],
)
def test_eq_7_1_law_refuses_degenerate_input(entropy, score, message):
    with pytest.raises(ValueError, match=message):
        em.fit_entropy_law(entropy, score)


def test_law_check_fits_the_first_part_only():
    h = torch.linspace(1.2, 0.1, 40, dtype=F64)
    r = 0.9 - 0.2 * h.exp()
    check = em.check_entropy_law(h, r)
    assert check.fitted_points == 6 and check.rmse < 1e-12 and abs(check.final_error) < 1e-12
    broken = r.clone()
    broken[20:] += 0.1  # an intervention beats the law: the fit may not see it
    check = em.check_entropy_law(h, broken)
    assert check.law.a == pytest.approx(0.2) and check.final_error == pytest.approx(-0.1)
    assert check.rmse == pytest.approx(0.1 * math.sqrt(20 / 34))
    for fraction in (0.0, 1.0, 0.99):
        with pytest.raises(ValueError, match="nothing to test"):
            em.check_entropy_law(h, r, fraction)


def test_agreement_statistics():
    x, noise = torch.randn(2, 500, generator=torch.Generator().manual_seed(0), dtype=F64)
    y = 3 * x + noise
    a = em.agreement(x, y)
    line = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y).solution
    assert a.slope == pytest.approx(float(line[0]))
    assert a.pearson == pytest.approx(a.slope * float(x.std() / y.std()))
    assert a.sign == pytest.approx(float((x * y > 0).double().mean()))
    assert a.size == pytest.approx(float(x.norm() / y.norm()))
    assert em.agreement(x, x.exp()).spearman == pytest.approx(1.0)
    assert em.agreement([1, 1, 2, 3], [1, 2, 3, 4]).spearman == pytest.approx(0.9486832980505138), "ties"
    assert em.agreement([1, -1, 2], [1, 1, 0]).sign == 0.5, "what did not move has no sign"
    assert math.isnan(em.agreement([1.0, 1.0], [1.0, 2.0]).pearson)
    with pytest.raises(ValueError, match="3 predictions, 2 measurements"):
        em.agreement([1, 2, 3], [1, 2])


# The KL estimators by enumeration, and a whole autoregressive policy ----------------------------------------


@given(small_logits, seeds)
def test_kl_estimators_values_and_gradients_by_enumeration(z, seed):
    z = z.clamp(-6, 6)  # log-ratios stay within the estimators' clamp
    other = torch.randn(len(z), generator=torch.Generator().manual_seed(seed), dtype=F64)
    x = z.clone().requires_grad_()
    p, logq = z.softmax(-1), other.log_softmax(-1)
    kl = (x.softmax(-1) * (x.log_softmax(-1) - logq)).sum()  # KL(π||q)
    reverse = (logq.exp() * (logq - x.log_softmax(-1))).sum()  # KL(q||π)
    (grad_kl,) = torch.autograd.grad(kl, x, retain_graph=True)
    (grad_reverse,) = torch.autograd.grad(reverse, x, retain_graph=True)
    value, gradient = {}, {}
    for name in ("k1", "k2", "k3", "abs"):
        per_token = kl_penalty(
            x.log_softmax(-1), logq, name
        )  # (V,): every action once, weighted by p as a constant
        loss = (p * per_token).sum()
        value[name] = loss.item()
        (gradient[name],) = torch.autograd.grad(loss, x)
        if name != "k1":
            assert (per_token >= 0).all()
    assert value["k1"] == pytest.approx(float(kl), abs=1e-10) and value["k3"] == pytest.approx(
        float(kl), abs=1e-10
    )
    assert gradient["k1"].abs().max() < 1e-12
    assert torch.allclose(gradient["k2"], grad_kl, atol=1e-10)
    assert torch.allclose(gradient["k3"], grad_reverse, atol=1e-10)
    score = torch.eye(len(z), dtype=F64) - p  # row y: ∇log π(y)
    sign = (z.log_softmax(-1) - logq).sign()
    assert torch.allclose(gradient["abs"], (p * sign) @ score, atol=1e-12)
    for name in ("k1", "k2", "k3", "abs"):
        at_q = torch.zeros(3, dtype=F64, requires_grad=True)
        same = kl_penalty(at_q, at_q.detach(), name)
        assert (same == 0).all()
        if name != "k1":
            assert (torch.autograd.grad(same.sum(), at_q)[0] == 0).all()


class TinyLanguage:
    """All V^T sequences of a policy whose logits depend on the position and on the previous token."""

    def __init__(self, vocab, length, seed):
        g = torch.Generator().manual_seed(seed)
        self.vocab, self.length = vocab, length
        self.theta = torch.randn(length, vocab + 1, vocab, generator=g, dtype=F64).requires_grad_()
        self.reference = torch.randn(length, vocab + 1, vocab, generator=g, dtype=F64)
        self.sequences = torch.tensor(list(itertools.product(range(vocab), repeat=length)))  # (V^T, T)
        self.reward = torch.randn(len(self.sequences), generator=g, dtype=F64)

    def stats(self, theta):
        previous = torch.cat([torch.full((len(self.sequences), 1), self.vocab), self.sequences[:, :-1]], 1)
        return em.token_stats(theta[torch.arange(self.length), previous], self.sequences)  # fields (V^T, T)


@pytest.mark.parametrize(("vocab", "length"), [(2, 12), (4, 6), (16, 3)])
def test_enumerated_autoregressive_policy_reward_entropy_and_kl(vocab, length):
    world = TinyLanguage(vocab, length, seed=vocab)
    stats, theta = world.stats(world.theta), world.theta
    joint = stats.logp.sum(1)  # (V^T,) log π(sequence)
    p = joint.detach().exp()
    assert len(p) == vocab**length <= 4096 and float(p.sum()) == pytest.approx(1, abs=1e-12)

    # ∇E[R] = E[R Σ_t ∇log π_t], against differentiating the enumerated expectation itself
    (truth,) = torch.autograd.grad((joint.exp() * world.reward).sum(), theta, retain_graph=True)
    (estimate,) = torch.autograd.grad((p * world.reward * joint).sum(), theta, retain_graph=True)
    assert torch.allclose(estimate, truth, atol=1e-12)
    baseline = world.reward - (p * world.reward).sum()
    (estimate,) = torch.autograd.grad((p * baseline * joint).sum(), theta, retain_graph=True)
    assert torch.allclose(estimate, truth, atol=1e-12)

    # H(sequences) = E[Σ_t H_t]; its gradient has the later H that a token leads to as well
    sequence_entropy = -(joint.exp() * joint).sum()
    assert float(sequence_entropy) == pytest.approx(float((p * stats.entropy.sum(1)).sum()), abs=1e-10)
    (truth,) = torch.autograd.grad(sequence_entropy, theta, retain_graph=True)
    later = stats.entropy.detach().flip(1).cumsum(1).flip(1) - stats.entropy.detach()  # (V^T, T): Σ_{s>t} H_s
    own = (p.unsqueeze(1) * stats.entropy).sum()
    (estimate,) = torch.autograd.grad(
        own + (p.unsqueeze(1) * later * stats.logp).sum(), theta, retain_graph=True
    )
    assert torch.allclose(estimate, truth, atol=1e-11)
    (per_state,) = torch.autograd.grad(own, theta, retain_graph=True)
    assert (
        per_state - truth
    ).norm() > 1e-3 * truth.norm()  # which states are visited matters: what the chapter leaves out

    # KL(π||ref) of sequences is the expected sum of per-token k1, and the gradient of E[k2] at each state
    ref = world.stats(world.reference).logp
    kl = (joint.exp() * (joint - ref.sum(1))).sum()
    assert float(kl) == pytest.approx(
        float((p * kl_penalty(stats.logp, ref, "k1").sum(1)).sum().detach()), abs=1e-10
    )
    x = (joint - ref.sum(1)).detach()
    (truth,) = torch.autograd.grad(kl, theta, retain_graph=True)
    (estimate,) = torch.autograd.grad((p * x * joint).sum(), theta)  # sequence-level k2
    assert torch.allclose(estimate, truth, atol=1e-11)


# 8. the demonstration ---------------------------------------------------------------------------------------


def test_demonstration_true_change_is_the_exact_form_from_flat_to_very_peaked():
    for family in ("flat, V=50", "Gauss, V=1000", "very peaked, V=1000"):
        cases = em.estimator_cases(family)
        a = em.agreement(cases["exact"], cases["true"])
        assert a.pearson > 1 - 1e-6 and abs(a.size - 1) < 1e-3 and a.sign > 0.999
        assert all(em.agreement(cases[form], cases["true"]).pearson < 0.99 for form in PROXIES)


def test_honesty_table_on_a_tabular_policy():
    where = Path(em.__file__).parent / "results" / "honesty.py"
    spec = importlib.util.spec_from_file_location("honesty", where)
    honesty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(honesty)
    sgd, adam = honesty.tabular_honesty("sgd"), honesty.tabular_honesty("adamw")
    for level in ("token", "half", "step"):  # on a table under SGD the formula is the truth
        assert sgd[level]["exact"].pearson > 0.99 and abs(sgd[level]["exact"].slope - 1) < 0.05
        assert sgd[level]["exact"].pearson == pytest.approx(sgd[level]["network flow"].pearson, abs=1e-9)
    assert (
        adam["token"]["exact"].pearson < 0.7 < 0.98 < adam["token"]["network flow"].pearson
    )  # Adam bends the step
    assert adam["half"]["network flow"].pearson > 0.98
    assert adam["step"]["<grad H, step>"].pearson > adam["step"]["network flow"].pearson  # momentum
    assert adam["step"]["<grad H, step>"].pearson > 0.99


@pytest.mark.slow
def test_the_chapter_demonstrates_itself_in_half_a_minute(tmp_path):
    chapter = Path(em.__file__)
    done = subprocess.run(
        [sys.executable, str(chapter), "--out", str(tmp_path / "figure.png")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "peaked, V=151936" in done.stdout
    assert (tmp_path / "figure.png").stat().st_size > 50_000


def test_the_chapter_imports_torch_and_the_standard_library_only():
    heavy = ("matplotlib", "scipy", "pandas", "tyro", "transformers", "grpo")
    code = f"import sys, entropy_math; print([m for m in {heavy} if m in sys.modules])"
    where = Path(em.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=where)
    assert done.stdout.strip() == "[]"
