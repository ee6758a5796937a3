"""Chapter 2: advantages (2.1)-(2.4), surrogate (2.5)-(2.7), aggregation (2.8)-(2.12), KL (2.13)-(2.16),
mismatch (2.17)-(2.19), and the objective that puts them together.  Oracles: plain Python over lists, finite
differences, and enumeration of small distributions."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import grpo
from entropy_math import token_stats
from grpo import AGGREGATIONS, Method, Progress, Tokens, aggregate, group_advantages, policy_loss

F64 = torch.float64
rewards = st.lists(st.sampled_from([0.0, 1.0, 0.5, -1.0, 3.0]), min_size=1, max_size=24)
seeds = st.integers(0, 2**31)
ratios = st.floats(0.05, 20)
signed = st.floats(-5, 5)


def by_group(values, group):
    return {g: [v for v, h in zip(values, group, strict=True) if h == g] for g in group}


def groups_of(n, seed):
    return torch.randint(0, 1 + n // 3, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# ----------------------------------------------------------------------------------------------------------
# Advantages


@given(rewards, seeds)
def test_eq_2_1_to_2_4_advantages_match_the_definitions(reward, seed):
    group = groups_of(len(reward), seed)
    r, g = torch.tensor(reward, dtype=F64), torch.tensor(group)
    members = by_group(reward, group)
    spread = statistics.stdev(reward) if len(reward) > 1 else 0.0
    want = {"std": [], "none": [], "loo": [], "batch": []}
    for x, h in zip(reward, group, strict=True):
        rs = members[h]
        m, n = statistics.fmean(rs), len(rs)
        equal = len(set(rs)) == 1
        s = statistics.stdev(rs) if n > 1 else 0.0
        want["none"].append(0.0 if equal else x - m)  # (2.2)
        want["std"].append(0.0 if equal else (x - m) / (s + 1e-6))  # (2.1)
        want["loo"].append(0.0 if n == 1 else x - (sum(rs) - x) / (n - 1))  # (2.3)
        want["batch"].append(0.0 if equal else (x - m) / (spread + 1e-6))  # (2.4)
    for how, values in want.items():
        got = group_advantages(r, g, how)
        assert torch.allclose(got, torch.tensor(values, dtype=F64), atol=1e-9), how


@given(
    rewards, seeds, st.floats(-100, 100), st.floats(0.5, 50), st.sampled_from(["std", "none", "loo", "batch"])
)
def test_eq_2_1_sum_zero_shift_scale_and_relabelling(reward, seed, shift, scale, how):
    r, g = torch.tensor(reward, dtype=F64), torch.tensor(groups_of(len(reward), seed))
    adv = group_advantages(r, g, how)
    for h in g.unique():
        assert abs(adv[g == h].sum()) < 1e-8
    assert torch.allclose(group_advantages(r + shift, g, how), adv, atol=1e-8)
    assert torch.allclose(group_advantages(r, 1000 - 7 * g, how), adv)
    if how == "std":
        assert torch.allclose(
            group_advantages(scale * r, g, how, eps=1e-14), group_advantages(r, g, how, eps=1e-14)
        )


@given(st.floats(-1e6, 1e6), st.integers(1, 9), st.sampled_from(["std", "none", "loo", "batch"]))
def test_pitfall_17_equal_rewards_and_groups_of_one_give_exactly_zero(value, n, how):
    reward = torch.full((n + 1,), value)  # float32: the mean of equal values may differ from them by rounding
    group = torch.tensor([0] * n + [1])
    assert (group_advantages(reward, group, how) == 0).all()


@given(st.integers(1, 15), st.integers(1, 15))
def test_eq_2_1_binary_rewards_push_the_rare_outcome_hard(right, wrong):
    n = right + wrong
    adv = group_advantages(torch.tensor([1.0] * right + [0.0] * wrong, dtype=F64), torch.zeros(n), eps=0)
    q, correction = right / n, math.sqrt((n - 1) / n)
    assert adv[0].item() == pytest.approx(correction * math.sqrt((1 - q) / q))
    assert adv[-1].item() == pytest.approx(-correction * math.sqrt(q / (1 - q)))


def test_unknown_words_are_refused_with_the_choices():
    mask, one = torch.ones(1, 1, dtype=torch.bool), torch.ones(1)
    with pytest.raises(ValueError, match="std, none, loo or batch"):
        group_advantages(one, one, "mean")
    with pytest.raises(ValueError, match="token_mean"):
        aggregate(one[None], mask, "mean")
    with pytest.raises(ValueError, match="norm > 0"):
        aggregate(one[None], mask, "seq_sum_norm")
    with pytest.raises(ValueError, match="k1, k2, k3 or abs"):
        grpo.kl_penalty(one, one, "k4")
    with pytest.raises(ValueError, match="tis or icepop"):
        grpo.mismatch_weight(one, one, "none")


# ----------------------------------------------------------------------------------------------------------
# Surrogate


def loss_and_slope(r, a, **clip):
    """Loss of one token at ratio r and advantage a, and its derivative by log π."""
    logp = torch.tensor([[math.log(r) - 3]], dtype=F64, requires_grad=True)
    loss = grpo.clipped_surrogate(
        logp, torch.tensor([[-3.0]], dtype=F64), torch.tensor([[a]], dtype=F64), **clip
    )
    return loss.item(), torch.autograd.grad(loss.sum(), logp)[0].item()


@given(ratios, signed, st.floats(0, 0.9), st.floats(0, 3), st.one_of(st.none(), st.floats(1, 10)))
def test_eq_2_5_to_2_7_surrogate_is_the_definition(r, a, low, high, c):
    value, slope = loss_and_slope(r, a, eps_low=low, eps_high=high, dual_clip=c)
    want = max(-r * a, -min(max(r, 1 - low), 1 + high) * a)
    if c is not None and a < 0:
        want = min(want, -c * a)
    assert value == pytest.approx(want, rel=1e-9, abs=1e-12)
    gone = (a > 0 and r > 1 + high) or (a < 0 and r < 1 - low) or (c is not None and a < 0 and r > c)
    near = min(abs(r - 1 - high), abs(r - 1 + low), abs(r - (c or 1e9))) < 1e-9
    assume(not near)
    assert slope == pytest.approx(0 if gone else -r * a, rel=1e-9, abs=1e-12)


@given(ratios, signed, st.floats(0, 0.9), st.floats(0, 3), st.one_of(st.none(), st.floats(1, 10)))
def test_eq_2_6_clip_factor_is_the_gradient(r, a, low, high, c):
    assume(min(abs(r - 1 - high), abs(r - 1 + low), abs(r - (c or 1e9))) > 1e-9)
    _, slope = loss_and_slope(r, a, eps_low=low, eps_high=high, dual_clip=c)
    logp, old = torch.tensor(r, dtype=F64).log(), torch.zeros((), dtype=F64)
    factor = grpo.clip_factor(logp, old, torch.tensor(a, dtype=F64), low, high, c)
    assert -slope == pytest.approx(factor.item() * a, rel=1e-9, abs=1e-12)


@given(st.one_of(st.just(0.0), st.floats(0, 5)), st.sampled_from([torch.float32, F64]))
def test_eq_2_6_and_2_7_exactly_at_a_bound_a_token_keeps_its_gradient_and_beyond_it_has_none(x, dtype):
    """r is the bound bit by bit, for r - 1 and 1 + (r - 1) are exact; x = 0 is a strict step with eps = 0."""
    for log_r, a, passed, clip in (
        (x, 1.0, 0.0, lambda b: (0.5, b - 1, None)),  # the clip from above
        (x, -1.0, 0.0, lambda b: (0.5, 0.5, b)),  # the dual clip
        (-x / 8, -1.0, 9.0, lambda b: (1 - b, 0.5, None)),  # the clip from below
    ):
        logp, adv, old = torch.tensor([[log_r], [a], [0.0]], dtype=dtype)
        logp.requires_grad_()
        r = logp.detach().exp()
        inside = torch.nextafter(r, 0 * r + passed)  # a bound that r is just beyond
        for bound, want in ((r, r), (inside, 0 * r)):
            loss = grpo.clipped_surrogate(logp, old, adv, *clip(bound.item()))
            assert torch.equal(loss, -bound * adv), "the value is continuous"
            assert torch.equal(grpo.clip_factor(logp, old, adv, *clip(bound.item())), want)
            assert torch.equal(torch.autograd.grad(loss.sum(), logp)[0], -want * adv)


@given(ratios, signed, st.floats(0, 5))
def test_eq_2_6_is_homogeneous_in_the_advantage(r, a, w):
    value, slope = loss_and_slope(r, a, dual_clip=3.0)
    scaled, scaled_slope = loss_and_slope(r, w * a, dual_clip=3.0)
    assert scaled == pytest.approx(w * value, abs=1e-9) and scaled_slope == pytest.approx(w * slope, abs=1e-9)


def test_eq_2_5_strict_steps_have_ratio_exactly_one_and_ratios_never_overflow():
    logp = torch.tensor([[-700.0, -0.5]], requires_grad=True)
    assert (grpo.log_ratio(logp, None) == 0).all()
    far = grpo.log_ratio(torch.tensor([0.0, -900.0]), torch.tensor([-900.0, 0.0]))
    assert far.tolist() == [20, -20]
    loss = grpo.clipped_surrogate(logp, None, torch.ones(1, 2), eps_low=0.0, eps_high=0.0)
    assert torch.equal(torch.autograd.grad(loss.sum(), logp)[0], -torch.ones(1, 2)), "at r = 1 no clip acts"


@pytest.mark.parametrize("x", [-25.0, -20.0, -19.0, 19.0, 20.0, 25.0])
@pytest.mark.parametrize("a", [1.0, -1.0])
def test_eq_2_6_clip_factor_is_the_gradient_also_where_log_r_is_clamped(x, a):
    logp, old, adv = (
        torch.full((1,), x - 30, dtype=F64),
        torch.full((1,), -30.0, dtype=F64),
        torch.tensor([a]),
    )
    logp.requires_grad_()
    slope = torch.autograd.grad(grpo.clipped_surrogate(logp, old, adv, 1.0, 1e9).sum(), logp)[0]
    factor = grpo.clip_factor(logp, old, adv, 1.0, 1e9)
    assert torch.equal(factor * adv, -slope) and (factor == 0) == (abs(x) > 20)
    slope = torch.autograd.grad(grpo.log_ratio(logp, old).sum(), logp)[0]
    assert slope.item() == (abs(x) <= 20)


# ----------------------------------------------------------------------------------------------------------
# Aggregation


def ragged(seed, B=6, T=5, low=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.randint(low, T + 1, (B, 1), generator=g)
    return torch.randn(B, T, generator=g, dtype=F64), mask


@given(seeds)
def test_eq_2_8_to_2_12_aggregations_match_loops_over_rows(seed):
    loss, mask = ragged(seed)
    rows = [loss[i, : int(mask[i].sum())].tolist() for i in range(6)]
    kept = [r for r in rows if r]
    n = sum(map(len, rows))
    want = {
        "token_mean": sum(map(sum, rows)) / max(n, 1),  # (2.8)
        "seq_mean_token_mean": sum(sum(r) / len(r) for r in kept) / max(len(kept), 1),  # (2.9)
        "seq_mean_token_sum": sum(map(sum, kept)) / max(len(kept), 1),  # (2.10)
        "seq_sum_norm": sum(map(sum, rows)) / (6 * 11),  # (2.11)
        "token_sum": sum(map(sum, rows)),  # (2.12)
    }
    assert set(want) == set(AGGREGATIONS)
    for how, value in want.items():
        assert aggregate(loss, mask, how, norm=11).item() == pytest.approx(value, abs=1e-12), how


@given(seeds, st.sampled_from(AGGREGATIONS), st.integers(1, 5))
def test_pitfall_5_coefficients_of_the_whole_batch_do_not_care_about_slices(seed, how, cut):
    loss, mask = ragged(seed)
    coef = grpo.aggregation_coefficients(mask, how, 11, F64)
    whole = aggregate(loss, mask, how, 11)
    parts = sum(grpo.weighted_sum(loss[s], coef[s]) for s in (slice(0, cut), slice(cut, 6)))
    assert torch.allclose(parts, whole)


def test_pitfall_5_averaging_micro_batch_means_over_weights_short_ones():
    loss = torch.tensor([[1.0, 0, 0, 0], [0.0, 0, 0, 0]])
    mask = torch.tensor([[True, False, False, False], [True] * 4])
    averaged = (aggregate(loss[:1], mask[:1]) + aggregate(loss[1:], mask[1:])) / 2
    assert averaged.item() == 0.5 and aggregate(loss, mask).item() == pytest.approx(0.2)


@given(seeds, st.sampled_from(AGGREGATIONS), st.integers(1, 4))
def test_padding_content_and_width_are_irrelevant(seed, how, extra):
    loss, mask = ragged(seed)
    garbage = torch.where(mask, loss, math.nan).requires_grad_()
    total = aggregate(garbage, mask, how, 11)
    assert total.item() == pytest.approx(aggregate(loss, mask, how, 11).item(), abs=1e-12)
    wide = torch.nn.functional.pad(garbage, (0, extra), value=math.inf)
    assert aggregate(wide, torch.nn.functional.pad(mask, (0, extra)), how, 11).item() == pytest.approx(
        total.item()
    )
    if mask.any():
        assert torch.autograd.grad(total, garbage)[0].isfinite().all()


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_an_all_masked_batch_has_loss_zero(how):
    assert aggregate(torch.full((3, 2), math.nan), torch.zeros(3, 2, dtype=torch.bool), how, 5).item() == 0


def test_eq_2_11_a_token_of_dr_grpo_has_the_same_weight_in_any_response():
    _, mask = ragged(3, low=1)
    coef = grpo.aggregation_coefficients(mask, "seq_sum_norm", 7)
    assert len(coef[mask].unique()) == 1
    by_length = grpo.aggregation_coefficients(mask, "seq_mean_token_mean")
    assert len(by_length[mask].unique()) == len(mask.sum(-1).unique()) > 1


# ----------------------------------------------------------------------------------------------------------
# KL estimators.  The enumeration over a vocabulary is test_entropy_math's; here by sampling-free identities.


@given(signed, signed, st.sampled_from(["k1", "k2", "k3", "abs"]))
def test_eq_2_13_to_2_16_value_and_slope_per_token(x, base, estimator):
    logp = torch.tensor(base + x, dtype=F64, requires_grad=True)
    value = grpo.kl_penalty(logp, torch.tensor(base, dtype=F64), estimator)
    y = (logp - base).item()
    want = {"k1": y, "k2": y * y / 2, "k3": math.exp(-y) - 1 + y, "abs": abs(y)}[estimator]
    slope = {"k1": 1, "k2": y, "k3": 1 - math.exp(-y), "abs": float(y > 0) - float(y < 0)}[estimator]
    assert value.item() == pytest.approx(want, abs=1e-9)
    assert torch.autograd.grad(value, logp)[0].item() == pytest.approx(slope, abs=1e-9)
    if estimator != "k1":
        assert value.item() >= 0


@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_eq_2_14_k2_descends_the_forward_kl_and_k3_the_reverse(p, q):
    """Two outcomes with one parameter z, p = sigmoid(z): the two derivatives by z in closed form."""
    z = torch.tensor(math.log(p / (1 - p)), dtype=F64, requires_grad=True)
    logp = torch.nn.functional.logsigmoid(torch.stack([z, -z]))
    logq = torch.tensor([q, 1 - q], dtype=F64).log()
    weight = logp.exp().detach()

    def slope(estimator):
        loss = (weight * grpo.kl_penalty(logp, logq, estimator)).sum()
        return loss.item(), torch.autograd.grad(loss, z, retain_graph=True)[0].item()

    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    logit = math.log(q / (1 - q))
    assert slope("k1")[0] == pytest.approx(kl, abs=1e-12) and slope("k3")[0] == pytest.approx(kl, abs=1e-12)
    assert slope("k1")[1] == pytest.approx(0, abs=1e-12)
    assert slope("k2")[1] == pytest.approx(p * (1 - p) * (z.item() - logit), abs=1e-12)  # ∇KL(π||q)
    assert slope("k3")[1] == pytest.approx(p - q, abs=1e-12)  # ∇KL(q||π)


def test_pitfall_21_k3_neither_cancels_near_zero_nor_overflows():
    tiny = torch.tensor([1e-4])  # float32: exp(-x) - 1 + x would lose all digits of 5e-9
    assert grpo.kl_penalty(tiny, torch.zeros(1), "k3").item() == pytest.approx(5e-9, rel=0.02)
    assert grpo.kl_penalty(torch.tensor([-1e4]), torch.zeros(1), "k3").isfinite().all()


@pytest.mark.parametrize("x", [-300.0, -24.0, -20.0, 24.0, 300.0])
def test_eq_2_13_to_2_16_the_pull_does_not_end_far_from_the_reference(x):
    want = {"k1": 1.0, "k2": x, "k3": 1 - math.exp(min(-x, 20)), "abs": math.copysign(1, x)}
    for estimator, slope in want.items():
        logp, ref = (torch.tensor([z], dtype=F64, requires_grad=True) for z in (x, 0.0))
        value = grpo.kl_penalty(logp, ref, estimator)
        slopes = [g.item() for g in torch.autograd.grad(value.sum(), (logp, ref))]
        assert slopes == pytest.approx([slope, -slope]), estimator
        with torch.no_grad():  # value and gradient agree, also on the tangent
            h = grpo.kl_penalty(logp + 1e-3, torch.zeros(1), estimator) - value
        assert h.item() == pytest.approx(1e-3 * slope, rel=1e-2)


# ----------------------------------------------------------------------------------------------------------
# Mismatch between engine and trainer


@given(st.lists(st.floats(0.01, 50), min_size=1, max_size=9), st.floats(0.1, 0.9), st.floats(1.1, 6))
def test_eq_2_17_to_2_19_mismatch_weights(rho, low, high):
    old = torch.tensor(rho, dtype=F64).log().requires_grad_()
    engine = torch.zeros_like(old)
    tis = grpo.mismatch_weight(old, engine, "tis", low, high)
    ice = grpo.mismatch_weight(old, engine, "icepop", low, high)
    assert not tis.requires_grad and not ice.requires_grad
    assert tis.tolist() == pytest.approx([min(x, high) for x in rho])
    inside = [low <= x <= high for x in rho]
    assume(all(abs(x - low) > 1e-9 and abs(x - high) > 1e-9 for x in rho))
    assert ice.tolist() == pytest.approx([x if ok else 0 for x, ok in zip(rho, inside, strict=True)])
    same = old.detach()
    for kind in ("tis", "icepop"):
        assert (grpo.mismatch_weight(same, same, kind) == 1).all()


# ----------------------------------------------------------------------------------------------------------
# The objective


def batch(seed, off=False, B=8, T=5, V=6):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=g, dtype=F64).requires_grad_()
    ids = torch.randint(V, (B, T), generator=g)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    s = token_stats(logits, ids)
    old = s.logp.detach() + 0.3 * torch.randn(B, T, generator=g, dtype=F64) if off else None
    reward = torch.randint(0, 2, (B,), generator=g).to(F64)
    tokens = Tokens(ids, mask, reward=reward, group=torch.arange(B) // 4, old_logp=old)
    return logits, replace(tokens, logp=s.logp, entropy=s.entropy, p2=s.p2, p2logp=s.p2logp)


@given(seeds, st.sampled_from(AGGREGATIONS), st.booleans(), st.booleans())
def test_policy_loss_is_surrogate_times_mismatch_aggregated(seed, how, off, corrected):
    logits, tk = batch(seed, off)
    if corrected:
        tk.mismatch = torch.rand(8, 5, generator=torch.Generator().manual_seed(seed), dtype=F64)
    method = Method(aggregation=how, dual_clip=3.0)
    method.progress = Progress(max_length=9)
    adv = group_advantages(tk.reward, tk.group)[:, None].expand(8, 5)
    loss = grpo.clipped_surrogate(tk.logp, tk.old_logp, adv, dual_clip=3.0)
    want = aggregate(loss if tk.mismatch is None else loss * tk.mismatch, tk.mask, how, 9)
    got, metrics = policy_loss(tk, method)
    assert torch.allclose(got, want)
    a, b = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (got, want))
    assert torch.allclose(a, b, atol=1e-14)
    if off:
        n, r = tk.mask.sum(), (tk.logp - tk.old_logp).exp()
        clipped = ((adv > 0) & (r > 1.2)) | ((adv < 0) & ((r < 0.8) | (r > 3)))
        assert metrics["clip_fraction"] == pytest.approx(((clipped & tk.mask).sum() / n).item())
        k3 = r - 1 - r.log()
        assert metrics["kl_old"] == pytest.approx((torch.where(tk.mask, k3, 0).sum() / n).item())


def test_pitfall_19_on_policy_the_loss_is_minus_the_mean_advantage_whatever_the_gradient():
    logits, tk = batch(1)
    tk.mask = torch.ones_like(tk.mask)  # equal lengths: the advantages cancel
    loss, _ = policy_loss(tk, Method())
    assert abs(loss.item()) < 1e-12 and torch.autograd.grad(loss, logits)[0].norm() > 0.05


@given(seeds)
def test_a_given_advantage_replaces_the_computed_one(seed):
    logits, tk = batch(seed)
    adv = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed), dtype=F64)
    loss, _ = policy_loss(replace(tk, adv=adv, reward=None, group=None), Method())
    assert loss.item() == pytest.approx(aggregate(-adv, tk.mask).item(), abs=1e-12)
    grad = torch.autograd.grad(loss, logits)[0]
    push = torch.nn.functional.one_hot(tk.ids, 6) - logits.detach().softmax(-1)
    want = -torch.where(tk.mask, adv, 0)[..., None] * push / tk.mask.sum()
    assert torch.allclose(grad, want), "A (e_y - p) / N on every token's logits"


@given(seeds, st.booleans())
def test_token_flow_is_the_entropy_change_of_a_small_step(seed, off):
    logits, tk = batch(seed, off)
    loss, _ = policy_loss(tk, Method())
    step, force = (-g for g in torch.autograd.grad(loss, (logits, tk.logp)))
    flow = grpo.token_flow(tk, force)

    def entropy(z):
        p = z.log_softmax(-1)
        return -(p.exp() * p).sum(-1)

    with torch.no_grad():
        h = 1e-3
        measured = (entropy(logits + h * step) - entropy(logits - h * step)) / (2 * h)
    assert torch.allclose(flow, measured, atol=1e-8) and (flow[~tk.mask] == 0).all()


def test_token_flow_at_a_temperature_is_per_unit_of_the_scaled_logits():
    logits, tk = batch(3)
    tau, z = 0.7, (0.7 * logits).detach().requires_grad_()  # z / τ are the logits of `batch`
    s = token_stats(z, tk.ids, tau)
    tk = replace(tk, logp=s.logp)
    step, force = (-g for g in torch.autograd.grad(policy_loss(tk, Method())[0], (z, s.logp)))

    def entropy(z):
        p = (z / tau).log_softmax(-1)
        return -(p.exp() * p).sum(-1)

    with torch.no_grad():
        measured = (entropy(z + 1e-3 * step) - entropy(z - 1e-3 * step)) / 2e-3
    assert torch.allclose(grpo.token_flow(tk, force) / tau**2, measured, atol=1e-8)


def test_tokens_rows_detach_and_clean():
    _, tk = batch(4)
    part = tk.rows(torch.tensor([3, 1]))
    assert torch.equal(part.reward, tk.reward[[3, 1]]) and part.old_logp is None and part.logp.shape == (2, 5)
    assert tk.logp.requires_grad and not tk.detach().logp.requires_grad
    dirty = replace(tk, logp=torch.where(tk.mask, tk.logp, math.nan))
    assert dirty.clean().logp.isfinite().all() and torch.equal(dirty.clean().logp[tk.mask], tk.logp[tk.mask])
    assert torch.equal(tk.solved, tk.reward > 0) and torch.equal(tk.lengths, tk.mask.sum(-1))


def test_progress_generators_depend_on_seed_and_step_only():
    draw = [
        torch.rand(3, generator=Progress(step=s, seed=z).generator())
        for s, z in ((1, 2), (1, 2), (2, 2), (1, 3))
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2]) and not torch.equal(draw[0], draw[3])


def test_demonstration_runs(capsys):
    grpo.main()
    assert "strictly on-policy" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------
# Products by another library


FAST = "mkldnn::_linear_pointwise"


def kernels(call):
    """The names of the operations that `call()` runs."""
    with torch.autograd.profiler.profile() as seen:
        call()
    return {event.name for event in seen.function_events}


@given(st.tuples(*[st.integers(0, 300)] * 3), st.sampled_from(["plain", "backward", "strided"]), seeds)
def test_fast_products_are_the_plain_ones(shape, kind, seed):
    n, k, m = shape
    torch.manual_seed(seed)
    a, b = torch.randn(n, k), torch.randn(k, m)
    if kind == "backward":
        a, b = torch.randn(k, n).t(), torch.randn(m, k).t()
    if kind == "strided":
        a, b = torch.randn(n, 2 * k)[:, ::2], torch.randn(2 * k, m)[::2]
    with grpo.fast_products(True):
        got = a @ b
    torch.testing.assert_close(got.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5 * (k + 1) ** 0.5)


RAMP = torch.linspace(-3, 3, 320)
BIASES = {  # what `torch.addmm` takes in the place of a layer's bias, and whether oneDNN may have it
    "a layer's": (RAMP[:160], True),
    "every second of more": (RAMP[::2], False),
    "one number, expanded": (RAMP[:1].expand(160), False),
    "a number": (RAMP[0], False),
    "a matrix": (RAMP[:96, None] * RAMP[:160], False),
}


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("factors", [{}, {"beta": 0.5}, {"alpha": 2.0}, {"beta": 0, "alpha": -1.0}])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_fast_products_with_a_bias_are_the_plain_ones(kind, factors, dtype):
    torch.manual_seed(0)
    c, fits = BIASES[kind]
    a, b, c = torch.randn(96, 128).to(dtype), torch.randn(128, 160).to(dtype), c.to(dtype)
    want = torch.addmm(c.double(), a.double(), b.double(), **factors)
    with grpo.fast_products(True):
        got = torch.addmm(c, a, b, **factors)
        used = FAST in kernels(lambda: torch.addmm(c, a, b, **factors))
    assert used is (fits and dtype == torch.float32 and not factors)
    tolerance = 2e-1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(got.double(), want, rtol=tolerance / 10, atol=tolerance)


def test_fast_products_leave_torch_its_errors():
    square, wide, line = torch.ones(128, 128), torch.ones(129, 128), torch.ones(128)
    cube = torch.ones(64, 128, 128)
    wrong = [
        lambda: torch.mm(square, wide), lambda: torch.mm(cube, square), lambda: torch.mm(line, square),
        lambda: torch.addmm(line, square, wide), lambda: torch.addmm(line, cube, square),
        lambda: torch.addmm(torch.ones(127), square, square),
        lambda: torch.addmm(line.double(), square, square), lambda: torch.mm(square, square.double()),
    ]  # fmt: skip

    def said():
        errors = []
        for call in wrong:
            with pytest.raises(RuntimeError) as error:
                call()
            errors.append(str(error.value))
        return errors

    plain = said()
    with grpo.fast_products(True):
        assert said() == plain


def test_fast_products_serve_gradients_and_forward_mode_and_end_with_the_block():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(128, 256), torch.randn(8, 16, 128)

    def numbers():
        grads = torch.autograd.grad(layer(x).tanh().sum(), list(layer.parameters()))
        moved = torch.func.jvp(lambda x: layer(x).tanh(), (x,), (torch.ones_like(x),))[1]
        return [layer(x).detach(), *grads, moved.detach()]

    plain = numbers()
    with grpo.fast_products(True):
        assert FAST in kernels(lambda: layer(x)) and FAST in kernels(lambda: layer.weight @ layer.weight.T)
        for got, want in zip(numbers(), plain, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert (torch.full((128, 128), torch.nan) @ torch.ones(128, 128)).isnan().all()
        assert FAST not in kernels(lambda: torch.ones(4, 4) @ torch.ones(4, 4))  # too small for the detour
        assert FAST not in kernels(lambda: torch.ones(128, 128, dtype=F64) @ torch.ones(128, 128, dtype=F64))
        assert FAST not in kernels(lambda: torch.ones(128, 256)[:, ::2] @ torch.ones(128, 128))
    assert FAST not in kernels(numbers)
    with grpo.fast_products(False):
        assert FAST not in kernels(numbers)
    assert all(torch.equal(a, b) for a, b in zip(numbers(), plain, strict=True))


@pytest.mark.parametrize("slow", [True, False])
def test_the_commands_take_the_fast_products_where_mkl_is_slow(slow, monkeypatch, tmp_path):
    import eval
    import train

    seen = []

    def work(*_):
        seen.append(FAST in kernels(lambda: torch.ones(128, 128) @ torch.ones(128, 128)))
        return 0

    monkeypatch.setattr(grpo, "mkl_is_slow", lambda: slow)
    monkeypatch.setattr(eval, "demonstrate", work)
    monkeypatch.setattr(train, "compare", work)
    assert eval.main([]) == train.main(["--method", "grpo", "--out", str(tmp_path / "run")]) == 0
    assert seen == [slow, slow]


@pytest.mark.parametrize(
    "vendor, isa, slow",
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_mkl_is_slow_on_amd_with_avx_512_only(vendor, isa, slow, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"vendor_id : {vendor}\n")
    monkeypatch.setattr(grpo, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: isa)
    assert grpo.mkl_is_slow() is (slow and torch.backends.mkl.is_available())
