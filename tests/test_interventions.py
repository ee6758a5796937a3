"""Chapter 3: what the docstrings of interventions.py promise of each method.  U1 - U8 hold for every method;
then each method's own claims.

The oracles are independent of the code under test: hand-written formulas on plain lists, finite differences,
autograd of another expression, or enumeration.
"""

import itertools
import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import interventions as iv
from entropy_math import entropy_change, token_stats
from grpo import (
    Method,
    Plan,
    Progress,
    Tokens,
    batch_loss,
    group_advantages,
    masked_mean,
    plan_update,
    policy_loss,
)
from interventions import METHODS, build

F64 = torch.float64
seeds = st.integers(0, 2**31)
pytestmark = pytest.mark.filterwarnings("ignore:.*fraction")

# Settings under which each method really acts on a batch of a hundred tokens, entropy about 1.5 nats.
ACTIVE = {
    "entropy_bonus": {"alpha": 0.1},
    "dapo": {"overlong_max": 6, "overlong_cache": 4, "overlong_filter": True},
    "clip_cov": {"ratio": 0.1, "lb": 0.05},
    "kl_cov": {"ratio": 0.1},
    "rand_pos_clip": {"ratio": 0.1},
    "par": {"lam": 0.3, "schedule": "constant"},
    "steer": {"form": "exact"},
    "opefo": {"target_entropy": 1.4},
    "entrocraft": {"start": 0.0},
    "stare": {"target": 9.0, "variant": "C2"},
    "entropic": {"threshold": 0.5, "denominator": "own"},
    "htpo": {"high_drop": 0.3, "low_drop": 0.2},
    "lp_reg": {"fraction": 0.3},
    "mixed_cuts": {"correct": True},
    "qae": {"interpolation": "linear"},
    "repo": {"zeta": 0.3},
    "unlikely": {"b": 0.9},
    "ucpo": {"tau": 0.9, "normalize": False},
    "passk": {"k": 2},
    "vocab_dropout": {"correct": True},
    "darling": {"diversity": "partition"},
    "cw_grpo": {"form": "released"},
    "simko": {"alpha": 0.5, "tau": 0.3, "lam": 2},
    "rlrt": {"e": 0.5},
}
RANDOM = ("clip_cov", "rand_pos_clip")


def active(key, **more):
    method = build(key, **{**ACTIVE.get(key, {}), **more})
    method.progress = Progress(step=3, total=10, seed=5, max_length=8)
    if key == "adaptive_entropy":
        method.c, method.target = 0.05, 9.0
    if key == "papo":
        method.e_ref = 2.5
    return method


def make(seed, B=24, T=6, V=7, G=4, off=False, dtype=F64, low=1):
    """Leaf logits (B, T, V) and a function that builds the batch's Tokens from logits."""
    g = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(B, T, V, generator=g, dtype=F64)
    ids = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=g).view(B, T)
    mask = torch.arange(T) < torch.randint(low, T + 1, (B, 1), generator=g)
    noise = 0.4 * torch.randn(B, T, V, 3, generator=g, dtype=F64)
    logp = [(logits + noise[..., i]).log_softmax(-1).gather(-1, ids[..., None])[..., 0] for i in range(3)]
    reward = torch.randint(0, 2, (B,), generator=g).to(F64)
    fixed = Tokens(
        ids,
        mask,
        reward=reward,
        correct=reward > 0,
        group=torch.arange(B) // G,
        truncated=torch.rand(B, generator=g) < 0.2,
        outcome=torch.arange(B) // G * 8 + torch.randint(3, (B,), generator=g),
        old_logp=logp[0] if off else None,
        ref_logp=logp[1],
        rollout_logp=logp[2],
        proxy_logp=iv.proxy_log_prob(logits, ids),
        teacher_logp=logp[1].where(torch.arange(B)[:, None] % 5 > 0, -math.inf),
    )
    fixed = fixed._map(lambda v: v.to(dtype) if v.is_floating_point() else v)
    logits = logits.to(dtype).requires_grad_()

    def tokens(z=logits):
        s = token_stats(z, ids)
        scored = replace(fixed, logp=s.logp, entropy=s.entropy, p2=s.p2, p2logp=s.p2logp)
        return replace(scored, topk_logp=z.log_softmax(-1).topk(min(3, V)).values)

    return logits, tokens


def gradient(logits, tokens, method, slices=(slice(None),)):
    """Gradient of the objective on the logits, in one piece or accumulated over slices of rows."""
    plan, total = plan_update(tokens, method), torch.zeros_like(logits)
    for rows in slices:
        loss, _ = batch_loss(tokens.rows(rows), plan.rows(rows), method)
        if loss.requires_grad:
            total += torch.autograd.grad(loss, logits, retain_graph=True)[0]
    return total


def close(a, b, tol=1e-10):
    return torch.linalg.vector_norm(a - b) <= tol * (torch.linalg.vector_norm(b) + 1e-12)


every_method = pytest.mark.parametrize("key", list(METHODS))
both_policies = pytest.mark.parametrize("off", [False, True], ids=["on-policy", "off-policy"])

# ----------------------------------------------------------------------------------------------------------
# U1 - U8


@pytest.mark.parametrize("key", [*METHODS, "dapo+opefo+kl_cov+entropic", "steer+htpo+ref_kl+clip_cov"])
@both_policies
def test_u1_one_batch_of_512_equals_8_of_64(key, off):
    logits, tokens = make(1, B=512, off=off, dtype=torch.float32)
    method = active(key, **({"eps_high": 0.2} if "dapo+" in key else {}))  # kl_cov has no clip to raise
    whole = gradient(logits, tokens(), method)
    parts = gradient(logits, tokens(), method, [slice(i, i + 64) for i in range(0, 512, 64)])
    assert whole.abs().sum() > 0
    assert close(parts, whole, 1e-5)


@every_method
def test_u1_metrics_of_the_parts_add_up(key):
    _, tokens = make(2, B=32, off=True)
    method = active(key)
    plan = plan_update(tokens(), method)
    _, whole = batch_loss(tokens(), plan, method)
    parts = [batch_loss(tokens().rows(s), plan.rows(s), method)[1] for s in (slice(0, 5), slice(5, 32))]
    assert whole.keys() >= {"clip_fraction", "kl_old"}
    for name, value in whole.items():
        assert value == pytest.approx(sum(p[name] for p in parts), abs=1e-12)


def test_u1_can_fail_statistics_per_micro_batch_change_the_gradient():
    """The public implementations' way: this is the error that U1 excludes."""
    logits, tokens = make(1, B=64)
    for key in ("opefo", "steer", "clip_cov", "kl_cov", "high_entropy_tokens", "cw_grpo", "stare"):
        method = active(key)
        halves = sum(0.5 * gradient(logits, tokens().rows(s), method) for s in (slice(0, 32), slice(32, 64)))
        assert not close(halves, gradient(logits, tokens(), method), 1e-4), key


@every_method
def test_the_force_of_every_surrogate_is_its_factor_also_exactly_at_the_bounds(key):
    """eps = 0 and log r = 0, the clip of (2.6), or ±20, that of `log_ratio`: at such a kink the slope is what
    `factor` says, not what a version of torch makes of it."""
    _, tokens = make(3, T=1, off=True)
    tk, method = tokens().detach(), active(key)
    method.eps_low = method.eps_high = 0.0
    tk.old_logp = torch.full_like(tk.logp, -24.0)
    tk.logp = (
        tk.old_logp + torch.tensor([0.0, 20.0, -20.0, 0.1], dtype=F64).repeat(6)[:, None]
    ).requires_grad_()
    plan = plan_update(tk, method)
    (slope,) = torch.autograd.grad(method.surrogate(tk, plan).sum(), tk.logp)
    assert torch.equal(-slope, method.factor(tk, plan.adv, plan.marks) * plan.adv) and slope[::4].any()


@every_method
@both_policies
def test_u2_row_order_and_group_names_do_not_matter(key, off):
    logits, tokens = make(3, off=off, low=3)  # no response twice: `token_keys` says why
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    tk = tokens()
    permuted = replace(tk.rows(order), group=torch.tensor([7, 100, -3, 12, 55, 2])[tk.group[order]])
    assert close(gradient(logits, permuted, active(key)), gradient(logits, tk, active(key)))


@every_method
@both_policies
def test_u3_padding_content_and_width_do_not_matter(key, off):
    logits, tokens = make(4, off=off)
    tk = tokens()
    want = gradient(logits, tk, active(key))

    def pad(v):  # three more columns, and garbage at every masked position
        if v.dim() < 2:
            return v
        bad = {torch.bool: False, torch.int64: 3}.get(v.dtype, math.nan)
        mask = tk.mask if v.dim() == 2 else tk.mask[..., None]
        v = v if v.dtype == torch.bool else torch.where(mask, v, bad)
        return torch.cat([v, torch.full((24, 3, *v.shape[2:]), bad, dtype=v.dtype)], 1)

    got = gradient(logits, tk._map(pad), active(key))
    assert got.isfinite().all()
    assert close(got, want)
    assert (got[~tk.mask] == 0).all()


NEUTRAL = {  # hyperparameters that make the method plain GRPO, and whether that holds off-policy too
    "grpo": ({}, True),
    "entropy_bonus": ({"alpha": 0}, True),
    "adaptive_entropy": ({}, True),  # its coefficient starts at 0
    "ref_kl": ({"beta": 0}, True),
    "prorl": ({"beta": 0}, True),
    "dapo": ({"eps_high": 0.2, "dynamic_sampling": False, "overlong": False}, True),
    "clip_higher": ({"eps_high": 0.2}, True),
    "clip_cov": ({"ratio": 0}, True),
    "high_entropy_tokens": ({"rho": 1}, True),
    "par": ({"schedule": "constant", "lam": 1}, True),
    "rand_pos_clip": ({"ratio": 0}, True),
    "entropy_advantage": ({"alpha": 0}, True),
    "steer": ({"lambda_min": 1}, True),
    "opefo": ({"lam": 0}, True),
    "papo": ({"lam": 0}, True),
    "entrocraft": ({"start": 0, "end": 0, "width": 9}, True),
    "stare": ({"target": 0}, True),
    "entropic": ({"kp": 0, "ki": 0}, True),
    "htpo": ({"low_drop": 0, "high_drop": 0}, False),
    "aem": ({"k": 0}, True),
    "mixed_cuts": ({"share": 0}, True),
    "ce_gppo": ({"b1": 0, "b2": 0, "dual_clip": None}, True),
    "lp_reg": ({"fraction": 0, "eps_low": 0.2, "eps_high": 0.2}, True),
    "repo": ({"zeta": 0}, True),
    "ar": ({"alpha": 0}, True),
    "unlikely": ({"b": 0}, True),
    "ucpo": ({"tau": 0}, True),
    "bapo": ({"target": 0, "lo": 0.8, "hi": 1.2, "dual_clip": None}, True),
    "sapo": ({"aggregation": "token_mean"}, False),
    "reft": ({}, True),  # the loss is the same, what is sampled is not
    "vocab_dropout": ({"share": 1}, True),
    "outcome_exploration": ({"c": 0}, True),
    "simko": ({"alpha": 0, "lam": 1}, True),
    "rlrt": ({"lam": 0}, True),
}


@pytest.mark.parametrize("key", list(NEUTRAL))
@both_policies
def test_u4_neutral_hyperparameters_give_grpo(key, off):
    options, off_too = NEUTRAL[key]
    logits, tokens = make(5, off=off)
    same = close(gradient(logits, tokens(), build(key, **options)), gradient(logits, tokens(), Method()))
    assert same == (off_too or not off)


@every_method
@both_policies
def test_u5_weights_and_selections_carry_no_gradient(key, off):
    _, tokens = make(6, off=off)
    names = ("logp", "entropy", "p2", "p2logp", "ref_logp", "proxy_logp", "teacher_logp", "rollout_logp")
    names += ("topk_logp",)
    leaves = {n: getattr(tokens(), n).detach().requires_grad_() for n in names}
    method = active(key)
    plan = plan_update(replace(tokens(), **leaves), method)
    for tensor in (plan.adv, plan.weight, plan.coef, plan.coef_all, *plan.marks.values()):
        assert not tensor.requires_grad
    loss, _ = batch_loss(replace(tokens(), **leaves), plan, method)
    grads = dict(zip(names, torch.autograd.grad(loss, leaves.values(), allow_unused=True), strict=True))
    allowed = {"logp"} | ({"entropy"} if method.entropy_grad else set())
    allowed |= {"ref_logp", "proxy_logp"} & set(method.needs)  # constants of a penalty, not of a weight
    allowed |= {"topk_logp"} & set(method.needs)  # simko pushes these tokens
    for name in set(names) - allowed:
        assert grads[name] is None or (grads[name] == 0).all(), name


def _degenerate(kind):
    logits, tokens = make(7, B={"one row": 1}.get(kind, 8))
    tk, rows = tokens(), torch.arange(8)[:, None]
    if kind in ("all right", "all wrong"):
        right = torch.full((8,), kind == "all right")
        tk = replace(tk, reward=right.to(F64), correct=right)
    elif kind in ("one token", "an empty row", "nothing"):
        kept = {
            "one token": (rows == 2) & (torch.arange(6) == 0),
            "an empty row": rows != 3,
            "nothing": rows < 0,
        }
        tk = replace(tk, mask=tk.mask & kept[kind])
    elif kind == "equal log-probs":  # sigma of the covariance is 0
        tk = replace(tk, logp=tk.logp * 0 - 1.0, entropy=tk.entropy * 0 + 1.0)
    return logits, tk


KINDS = ("all right", "all wrong", "one row", "one token", "an empty row", "nothing", "equal log-probs")


@every_method
@pytest.mark.parametrize("kind", KINDS)
def test_u6_degenerate_batches_are_finite(key, kind):
    logits, tk = _degenerate(kind)
    method = active(key)
    loss, metrics = policy_loss(tk, method)
    grad = gradient(logits, tk, method)
    assert math.isfinite(loss.item()) and grad.isfinite().all()
    assert all(math.isfinite(v) for v in metrics.values())
    assert kind != "nothing" or (loss.item() == 0 and (grad == 0).all())
    # teach by more than contrast
    other = ("w_reinforce", "psr", "nsr", "darling", "outcome_exploration", "gcpo")
    if kind in KINDS[:3] and key not in other and method.place != "penalty":
        assert (grad == 0).all(), "no contrast, no gradient"
    method.after_step(plan_update(tk, method))


@every_method
def test_u7_seed_and_step_determine_the_gradient_and_computing_it_changes_nothing(key):
    logits, tokens = make(8, B=64)
    method = active(key)
    first, again = (gradient(logits, tokens(), method) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(first, gradient(logits, tokens(), active(key)))
    later = active(key)
    later.progress.step = 4
    if key in RANDOM:
        assert not close(gradient(logits, tokens(), later), first, 1e-3)


@pytest.mark.parametrize(
    "key", ["adaptive_entropy", "par", "papo", "stare", "entropic", "opefo", "prorl", "opefo+par"]
)
def test_u8_controller_state_survives_save_and_restore(key):
    integral = {"target_entropy": 1.0, "integral": 0.1}
    options = {"opefo": integral, "opefo+par": integral, "par": {"target": 1.2}}
    options |= {"stare": {"adaptive": True, "target": 9.0}, "adaptive_entropy": {"target": 9.0}}
    options = options.get(key, {})

    def run(method, batches):
        trace = []
        for seed in batches:
            logits, tokens = make(seed)
            trace.append(gradient(logits, tokens(), method))
            method.after_step(plan_update(tokens(), method))
            method.reset_reference(seed, 0.5 if seed % 2 else None)
        return trace

    method = build(key, **options)
    whole = run(method, range(1, 7))
    first = build(key, **options)
    run(first, range(1, 4))
    second = build(key, **options)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert all(torch.equal(a, b) for a, b in zip(run(second, range(4, 7)), whole[3:], strict=True))
    assert second.state_dict() == method.state_dict()
    assert build(key, **options).state_dict() != method.state_dict(), "the state moved"


@pytest.mark.parametrize("key", [key for key, cls in METHODS.items() if not cls.on_policy])
@both_policies
def test_inert_methods_say_so(key, off):
    """on_policy = False means: with r = 1, and only then, every force is GRPO's, up to the aggregation."""
    logits, tokens = make(10, off=off)
    method = build(key, aggregation="token_mean")
    assert close(gradient(logits, tokens(), method), gradient(logits, tokens(), Method())) != off


# ----------------------------------------------------------------------------------------------------------
# Selection of tokens: counts, ties, keys, warnings


@given(seeds, st.integers(0, 40))
def test_top_selects_k_largest_with_ties_to_the_lower_index(seed, k):
    g = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 4, (5, 6), generator=g).double()
    mask = torch.rand(5, 6, generator=g) < 0.7
    want = sorted((i for i in range(30) if mask.view(-1)[i]), key=lambda i: (-score.view(-1)[i].item(), i))[
        :k
    ]
    assert iv.top(score, mask, k).flatten().nonzero()[:, 0].tolist() == sorted(want)


def test_token_keys_are_uniform_and_differ_between_steps_streams_and_equal_rows():
    ids = torch.randint(0, 2, (4000, 10), generator=torch.Generator().manual_seed(0))  # many rows are equal
    tk = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    drawn = [iv.token_keys(tk, Progress(step=step), i).flatten() for step, i in ((0, 0), (1, 0), (0, 1))]
    for keys in drawn:
        assert 0 <= keys.min() and keys.max() < 1 and len(keys.unique()) == 40_000
        counts = torch.histc(keys, 20, 0, 1)
        assert ((counts - 2000) ** 2 / 2000).sum() < 45, "chi², 19 degrees of freedom, p about .0007"
    apart = torch.corrcoef(torch.stack([*drawn, drawn[0].roll(1)])) - torch.eye(4)
    assert apart.abs().max() < 0.02


def test_each_of_equal_responses_is_drawn_as_often():
    ids = torch.arange(6).expand(16, 6) // 3  # one response, sixteen times
    tk = Tokens(ids, torch.ones(16, 6, dtype=torch.bool), logp=-torch.ones(16, 6, dtype=F64))
    hits, method = torch.zeros(16), build("rand_pos_clip", ratio=0.05)
    positive = torch.where(torch.arange(16) % 2 == 0, 1.0, -1.0)[:, None].expand(16, 6).to(F64)
    for step in range(600):
        method.progress = Progress(step=step, total=600)
        hits += (plan_update(replace(tk, adv=positive), method).weight == 0).sum(-1)
    assert (hits[1::2] == 0).all()
    expected = 600 * 4 / 8
    assert ((hits[::2] - expected) ** 2 / expected).sum() < 24, "chi², 7 degrees of freedom, p about .001"


@pytest.mark.parametrize("key", ["high_entropy_tokens", "stare", "kl_cov", "lp_reg", "htpo"])
def test_u2_ties_do_not_depend_on_the_order_of_rows(key):
    """The first tokens of all responses to a prompt have one state, so their statistics are exactly equal."""
    logits, tokens = make(31, B=32, low=4)
    tk = tokens()

    def tied(x):
        return torch.where(torch.arange(6) < 3, torch.full_like(x, -9.0 if x is tk.logp else 3.0), x)

    tk = replace(tk, logp=tk.logp - tk.logp.detach() + tied(tk.logp).detach(), entropy=tied(tk.entropy))
    tk = replace(tk, proxy_logp=tk.logp.detach() + 0.1)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    method = active(key, **({"rho": 0.2} if key == "high_entropy_tokens" else {}))
    here, there = plan_update(tk, method), plan_update(tk.rows(order), method)
    for name in ("weight", "coef"):
        assert torch.equal(getattr(here, name)[order], getattr(there, name)), name
    assert all(torch.equal(here.marks[k][order], there.marks[k]) for k in here.marks)


@pytest.mark.parametrize("key", ["clip_cov", "kl_cov", "rand_pos_clip", "lp_reg"])
def test_fractions_that_select_nobody_are_reported_once_with_the_number(key):
    _, tokens = make(11)
    method = build(key)
    with pytest.warns(UserWarning, match=rf"{key}: fraction .* (1 is|0 are) selected"):
        plan_update(tokens(), method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_update(tokens(), method)


# ----------------------------------------------------------------------------------------------------------
# grpo, 3.2 - 3.5


def test_eq_3_2_entropy_bonus_matches_finite_differences_and_raises_entropy():
    logits, tokens = make(13, B=4, T=3)
    tk = replace(tokens(), adv=torch.zeros(4, 3, dtype=F64))
    grad = gradient(logits, tk, build("entropy_bonus", alpha=0.1))
    weight = tk.mask / tk.mask.sum()

    def mean_entropy(z):
        logp = z.log_softmax(-1)
        return (-(logp.exp() * logp).sum(-1) * weight).sum()

    with torch.no_grad():
        for index in [(0, 0, 0), (1, 0, 3), (3, 0, 6)]:
            step = torch.zeros_like(logits)
            step[index] = 1e-5
            slope = (mean_entropy(logits + step) - mean_entropy(logits - step)) / 2e-5
            assert grad[index].item() == pytest.approx(-0.1 * slope.item(), abs=1e-9)
        assert mean_entropy(logits - 0.1 * grad) > mean_entropy(logits)


def test_pitfall_11_a_zero_coefficient_builds_no_entropy_graph():
    assert not build("entropy_bonus", alpha=0).entropy_grad and build("entropy_bonus").entropy_grad
    adaptive = build("adaptive_entropy")
    assert not adaptive.entropy_grad
    adaptive.after_step(_plan(entropy=0.1))
    assert adaptive.entropy_grad
    assert not any(build(k).entropy_grad for k in METHODS if k not in ("entropy_bonus", "adaptive_entropy"))


def _plan(entropy):
    one = torch.ones(1, 1)
    return Plan(one, one, one, one, entropy, 1)


@given(
    st.lists(st.one_of(st.floats(0, 1), st.just(0.4)), min_size=1, max_size=40),
    st.sampled_from(["paper", "released"]),
)
def test_eq_3_3_adaptive_coefficient_stays_in_range_moves_by_delta_and_is_gated(trace, variant):
    m = build("adaptive_entropy", target=0.4, delta=0.01, c_max=0.03, variant=variant)
    last = math.nan
    for e in trace:
        alpha, c = m.alpha(e), m.c
        gating = e if variant == "paper" else last
        if gating > 0.4:
            assert alpha == 0
        else:
            assert alpha == c or (variant == "released" and gating == 0.4)
        m.after_step(_plan(e))
        last = e
        assert 0 <= m.c <= 0.03 and abs(m.c - c) <= 0.01 + 1e-15
        if e < 0.4:
            assert m.c >= c
        elif e > 0.4 or variant == "released":
            assert m.c <= c
        else:
            assert m.c == c


@given(seeds, st.sampled_from(["k1", "k2", "k3", "abs"]))
def test_eq_3_4_reference_kl_is_zero_at_the_reference_and_untouched_by_mismatch(seed, estimator):
    logits, tokens = make(seed)
    tk = tokens()
    method, zero = build("ref_kl", estimator=estimator), torch.zeros_like(tk.logp).detach()
    here = replace(tk, ref_logp=tk.logp.detach(), adv=zero)
    assert policy_loss(here, method)[0].item() == 0
    if estimator != "k1":  # k1's gradient is noise around 0, also here
        assert (gradient(logits, here, method) == 0).all()
    away = replace(tk, adv=zero)
    assert close(gradient(logits, replace(away, mismatch=zero + 2), method), gradient(logits, away, method))


@given(seeds)
def test_eq_3_4_k1_drives_away_from_the_policy_that_sampled_whichever_way_the_reference_lies(seed):
    """Every action of a softmax policy once, weighted by π_old: E_old[∇log π] = p_old - p."""

    def kl(p, q):
        return (p.exp() * (p - q)).sum()

    z_old, z = torch.randn(2, 2, generator=torch.Generator().manual_seed(seed), dtype=F64)  # two actions
    assume((z.softmax(-1) - z_old.softmax(-1)).abs().max() > 1e-3)
    z.requires_grad_()
    old, now = z_old.log_softmax(-1), z.log_softmax(-1)
    for side, z_ref in ((1, z_old), (-1, 2 * z.detach() - z_old)):  # behind the policy, and ahead of it
        ref = z_ref.log_softmax(-1)
        loss = (old.exp() * iv.kl_penalty(now, ref, "k1")).sum()
        slope, away, apart = (
            torch.autograd.grad(x, z, retain_graph=True)[0] for x in (loss, kl(old, now), kl(now, ref))
        )
        assert torch.allclose(slope, old.exp() - now.exp()) and torch.allclose(slope, -away)
        assert side * (-slope @ apart) > 0, "away from a reference behind, towards one ahead"


@pytest.mark.parametrize("key", ["ref_kl", "high_entropy_tokens", "dapo+prorl"])
def test_kl_ref_is_the_mean_k3_over_all_tokens_of_the_batch_wherever_there_is_a_reference(key):
    _, tokens = make(13)
    tk = tokens()
    tk.ref_logp = torch.where(tk.mask, tk.ref_logp, math.nan)
    x = (tk.logp - tk.ref_logp)[tk.mask].detach()
    got = plan_update(tk, active(key)).metrics["kl_ref"]
    assert got == pytest.approx(float((torch.exp(-x) - 1 + x).mean())) and got > 0
    assert "kl_ref" not in plan_update(replace(tk, ref_logp=None), Method()).metrics


def test_eq_3_4_penalties_see_every_token_also_under_80_20():
    logits, tokens = make(14)
    tk = replace(tokens(), adv=torch.zeros(24, 6, dtype=F64))
    combined = build("high_entropy_tokens+ref_kl")
    assert close(gradient(logits, tk, combined), gradient(logits, tk, build("ref_kl")))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 4))
def test_eq_3_5_prorl_resets_after_patience_evaluations_without_a_new_best(scores, patience):
    m = build("prorl", patience=patience)
    best, waited = -1.0, 0
    for step, score in enumerate(scores):
        assert not m.reset_reference(step, None)
        best, waited = (score, 0) if score > best else (best, waited + 1)
        reset = waited >= patience
        assert m.reset_reference(step, score) == reset
        if reset:
            best, waited = -1.0, 0


def test_eq_3_5_prorl_resets_every_k_steps_and_the_kl_is_zero_after():
    m = build("prorl", every=5)
    assert [s for s in range(16) if m.reset_reference(s, None)] == [5, 10, 15]
    logits, tokens = make(15)
    tk = tokens()
    after = replace(tk, ref_logp=tk.logp.detach(), adv=torch.zeros_like(tk.logp).detach())
    loss, _ = policy_loss(after, m)
    assert loss.item() == 0 and (gradient(logits, after, m) == 0).all()


# ----------------------------------------------------------------------------------------------------------
# 3.6 - 3.9


@given(seeds, st.integers(1, 6))
def test_eq_3_6_dynamic_sampling_keeps_whole_groups_with_a_contrast(seed, G):
    _, tokens = make(seed, B=4 * G, G=G)
    tk = tokens()
    kept = build("dapo").select(tk)
    for g in range(4):
        right = tk.correct[tk.group == g].sum().item()
        assert (kept[tk.group == g] == (0 < right < G)).all()


@given(st.integers(1, 300), st.integers(1, 100), st.lists(st.integers(0, 500), min_size=2, max_size=9))
def test_eq_3_6_overlong_shaping_is_continuous_non_increasing_and_bounded(longest, cache, lengths):
    lengths = torch.tensor(sorted(lengths)).double()
    shaping = iv.overlong_penalty(lengths, longest, cache)
    assert (shaping <= 0).all() and (shaping >= -1).all()
    assert (shaping.diff() <= 0).all() and (shaping.diff().abs() <= lengths.diff() / cache + 1e-12).all()
    assert (shaping[lengths <= longest - cache] == 0).all() and (shaping[lengths >= longest] == -1).all()


def test_eq_3_6_accuracy_not_reward_decides_and_no_usable_group_gives_zero():
    logits, tokens = make(16)
    tk = replace(tokens(), correct=torch.ones(24, dtype=torch.bool))
    method = build("dapo", overlong_max=6, overlong_cache=4)
    assert not method.select(tk).any(), "length penalties do not rescue a solved group"
    assert (gradient(logits, tk, method) == 0).all()
    assert build("dapo").refill
    without = replace(tk, correct=None, reward=tk.reward.clone())  # then reward > 0 before the shaping counts
    long = build("dapo", overlong_max=1, overlong_cache=1)  # takes 1 from every reward
    assert int((plan_update(without, long).coef > 0).any(-1).sum()) == int(long.select(without).sum()) > 0


def _cov(tk, adv):
    """The covariance term per token, by hand."""
    a, x = adv[tk.mask], tk.logp.detach()[tk.mask]
    out = torch.zeros_like(adv)
    out[tk.mask] = (a - a.mean()) * (x - x.mean())
    return out


@given(seeds, st.floats(0.01, 0.5), st.floats(0.0, 0.5), st.floats(0.5, 3), st.booleans())
def test_eq_3_7_clip_cov_drops_n_tokens_strictly_inside_the_bounds(seed, ratio, lb, ub, off):
    _, tokens = make(seed, off=off)
    tk = tokens()
    method = build("clip_cov", ratio=ratio, lb=lb, ub=ub)
    plan = plan_update(tk, method)
    cov, n = _cov(tk, plan.adv), int(tk.mask.sum())
    r = torch.ones_like(cov) if not off else (tk.logp - tk.old_logp).exp().detach()
    clipped = ((plan.adv > 0) & (r > 1.2)) | ((plan.adv < 0) & (r < 0.8))
    eligible = tk.mask & (cov > lb) & (cov < ub) & ~clipped
    dropped = tk.mask & (plan.weight == 0)
    assert (dropped & ~eligible).sum() == 0
    assert dropped.sum() == min(max(int(ratio * n), 1), int(eligible.sum()))
    assert (plan.weight[tk.mask & ~dropped] == 1).all()
    assert plan.coef[tk.mask].allclose(torch.tensor(1 / n, dtype=F64), atol=1e-8), "the denominator stays N"
    sample = torch.cov(torch.stack([plan.adv[tk.mask], tk.logp.detach()[tk.mask]]), correction=0)[0, 1]
    assert masked_mean(iv.covariance(tk.detach(), plan.adv), tk.mask).item() == pytest.approx(
        sample.item(), abs=1e-10
    )


def test_eq_3_7_the_bounds_are_strict():
    """Two tokens, A = ±1, log p = log p̄ ± 1: every covariance is exactly 1."""
    mask, ids = torch.ones(2, 1, dtype=torch.bool), torch.tensor([[0], [1]])
    adv = torch.tensor([[1.0], [-1.0]], dtype=F64)
    tk = Tokens(ids, mask, logp=torch.tensor([[-1.0], [-3.0]], dtype=F64), adv=adv)
    assert iv.covariance(tk, adv).flatten().tolist() == [1.0, 1.0]
    for lb, ub, touched in ((1.0, 5.0, 0), (0.0, 1.0, 0), (0.999, 1.001, 2)):
        plan = plan_update(tk, build("clip_cov", ratio=1, lb=lb, ub=ub))
        assert plan.metrics["selected"] == touched


def test_eq_3_7_annealing_ends_at_nobody_and_the_choice_is_uniform():
    _, tokens = make(17, B=64)
    method = build("clip_cov", ratio=0.5, lb=0, anneal=True)
    counts = []
    for step in (0, 50, 100):
        method.progress = Progress(step=step, total=100)
        counts.append(plan_update(tokens(), method).metrics["selected"])
    assert counts[0] > counts[1] > counts[2] == 0
    hits, method = 0, build("clip_cov", ratio=0.05, lb=0)
    for step in range(400):
        method.progress = Progress(step=step, total=400)
        plan = plan_update(tokens(), method)
        hits = hits + (plan.weight == 0)[tokens().mask].double()
    eligible = (hits > 0) | ((_cov(tokens(), plan.adv) > 0) & (_cov(tokens(), plan.adv) < 5))[tokens().mask]
    share = hits[eligible] / 400
    p = share.mean().item()
    assert share.std().item() < 1.3 * math.sqrt(p * (1 - p) / 400), (
        "each eligible token is as likely as any other"
    )


@given(seeds, st.floats(0.01, 0.5), st.sampled_from(["abs", "k2", "k3"]))
def test_eq_3_8_kl_cov_penalises_exactly_k_tokens_and_is_inert_on_policy(seed, ratio, estimator):
    logits, tokens = make(seed, off=True)
    tk, method = tokens(), build("kl_cov", ratio=ratio, estimator=estimator)
    plan = plan_update(tk, method)
    k = max(1, int(ratio * int(tk.mask.sum())))
    picked = plan.marks["picked"]
    assert picked.sum() == k
    cov = _cov(tk, plan.adv)
    assert cov[picked].min() >= cov[tk.mask & ~picked].max() - 1e-12
    off = gradient(logits, tk, method)
    x = tk.logp - tk.old_logp
    d = {"abs": x.abs(), "k2": x**2 / 2, "k3": x.exp() - 1 - x}[estimator]
    n = tk.mask.sum()
    loss = (torch.where(tk.mask, -x.exp() * plan.adv, 0).sum() + torch.where(picked, d, 0).sum()) / n
    want = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert close(off, want)
    strict = replace(tk, old_logp=None)
    assert close(gradient(logits, strict, method), gradient(logits, strict, build("kl_cov", beta=0)))
    assert close(gradient(logits, strict, method), gradient(logits, strict, Method()))


def test_eq_3_8_kl_cov_without_a_contrast_penalises_nobody():
    logits, tokens = make(32, off=True)
    tk = replace(tokens(), reward=torch.ones(24, dtype=F64))
    assert plan_update(tk, build("kl_cov", ratio=0.1)).metrics["selected"] == 0
    assert (gradient(logits, tk, build("kl_cov", ratio=0.1)) == 0).all()


@pytest.mark.parametrize("key, options", [("kl_cov", {"ratio": 0.1}), ("lp_reg", {"fraction": 0.3})])
def test_eq_3_8_and_3_28_the_penalty_has_the_denominator_of_its_surrogate(key, options):
    """With a selection: the gradient is that of the method alone on the selected tokens."""
    logits, tokens = make(33, off=True, B=40)
    tk, rho = tokens(), 0.5
    both = build(f"{key}+high_entropy_tokens", rho=rho, **options)
    adv = plan_update(tk, Method()).adv
    kept = plan_update(tk, build("high_entropy_tokens", rho=rho)).coef > 0
    assert plan_update(tk, both).metrics["selected"] > 0
    alone = gradient(logits, replace(tk, mask=kept, adv=adv), build(key, **options))
    assert close(gradient(logits, tk, both), alone)


def test_pitfall_7_a_second_forward_pass_gives_abs_a_gradient_of_full_size_and_random_sign():
    logits, tokens = make(18, B=64)
    tk = tokens()
    noise = 1e-7 * torch.randn(tk.logp.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    noisy = replace(tk, old_logp=tk.logp.detach() + noise)
    pure = gradient(logits, tk, Method(eps_low=9, eps_high=9))
    size = {}
    for estimator in ("abs", "k2", "k3"):
        method = build("kl_cov", ratio=0.2, estimator=estimator)
        size[estimator] = torch.linalg.vector_norm(gradient(logits, noisy, method) - pure).item()
    selected = plan_update(noisy, method).marks["picked"]
    n = int(tk.mask.sum())
    assert size["abs"] > 0.3 * math.sqrt(int(selected.sum())) / n, "±beta/N on every selected token"
    assert size["k2"] < 1e-6 and size["k3"] < 1e-6
    signs = torch.sign((noisy.logp.detach() - noisy.old_logp)[selected])
    assert 0.3 < (signs > 0).double().mean() < 0.7


def test_eq_3_8_beta_zero_is_the_unclipped_gradient_not_clipped_grpo():
    logits, tokens = make(19, off=True)
    unclipped = Method(eps_low=1e9, eps_high=1e9)
    assert close(
        gradient(logits, tokens(), build("kl_cov", beta=0)), gradient(logits, tokens(), unclipped), 1e-6
    )
    assert not close(
        gradient(logits, tokens(), build("kl_cov", beta=0)), gradient(logits, tokens(), Method()), 1e-3
    )


@given(seeds, st.floats(0.01, 1))
def test_eq_3_9_80_20_keeps_k_tokens_of_highest_entropy_and_divides_by_k(seed, rho):
    logits, tokens = make(seed)
    tk, method = tokens(), build("high_entropy_tokens", rho=rho)
    plan = plan_update(tk, method)
    kept, n = plan.coef > 0, int(tk.mask.sum())
    assert kept.sum() == max(1, math.ceil(rho * n))
    if (~kept & tk.mask).any():
        assert tk.entropy[kept].min() >= tk.entropy[~kept & tk.mask].max()
    loss = -(plan_update(tk, Method()).adv * tk.logp)[kept].sum() / kept.sum()
    want = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert close(gradient(logits, tk, method), want, 1e-6)
    monotone = replace(tk, entropy=(2 * tk.entropy).exp() + 1)
    assert torch.equal(plan_update(monotone, method).coef, plan.coef)


# ----------------------------------------------------------------------------------------------------------
# 3.10 - 3.12


@given(seeds, st.floats(0, 1))
def test_eq_3_10_par_weighs_positive_tokens_by_lambda(seed, lam):
    logits, tokens = make(seed, off=True)
    tk, method = tokens(), build("par", schedule="constant", lam=lam)
    plan = plan_update(tk, method)
    assert (plan.weight[tk.mask & (plan.adv > 0)] == lam).all() and (
        plan.weight[tk.mask & (plan.adv <= 0)] == 1
    ).all()
    scaled = replace(tk, adv=torch.where(plan.adv > 0, lam * plan.adv, plan.adv))  # homogeneity
    assert close(gradient(logits, tk, method), gradient(logits, scaled, Method()))
    if lam == 0:
        assert (gradient(logits, tk, method)[plan.adv > 0] == 0).all()


@given(st.lists(st.floats(0, 1), max_size=60), st.floats(0.01, 0.3), st.floats(0.05, 0.9))
def test_eq_3_10_entropy_schedule_follows_the_entropy_trace_on_its_grid(trace, delta, target):
    m, lam = build("par", delta=delta, target=target), 0.0
    for h in trace:
        m.after_step(_plan(h))
        lam = min(max(lam - delta if h < target else lam + delta, 0), 1)
        assert m.now() == pytest.approx(lam, abs=1e-9) and 0 <= m.now() <= 1
    at_target = build("par", delta=delta, target=target)
    at_target.after_step(_plan(target))
    assert at_target.now() > 0, "H = target takes the else branch"


def test_eq_3_10_stage_and_epoch_schedules():
    def lam(m, step):
        m.progress = Progress(step=step, total=100)
        return m.now()

    stage, epoch = build("par", schedule="stage"), build("par", schedule="epoch", epochs=5)
    assert [lam(stage, s) for s in (0, 25, 50, 75, 100)] == [0, 0, 0, 0.5, 1]
    assert [lam(epoch, s) for s in (0, 19, 20, 40, 60, 80, 100)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert lam(build("par", schedule="epoch", epochs=1), 0) == 1
    fifty = build("par", schedule="epoch", epochs=50)
    assert [lam(fifty, s) for s in range(100)] == [(s // 2) / 49 for s in range(100)]


@given(seeds, st.floats(0, 1))
def test_eq_3_10_rand_pos_clip_drops_only_positive_tokens(seed, ratio):
    _, tokens = make(seed)
    tk = tokens()
    plan = plan_update(tk, build("rand_pos_clip", ratio=ratio))
    dropped, positive, n = tk.mask & (plan.weight == 0), tk.mask & (plan.adv > 0), int(tk.mask.sum())
    assert (dropped & ~positive).sum() == 0
    assert dropped.sum() == min(int(positive.sum()), max(int(ratio * n), 1) if ratio > 0 else 0)


@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_eq_3_11_w_reinforce_is_affine_in_lambda_and_needs_no_reward_convention(seed, a, b):
    logits, tokens = make(seed)
    tk = tokens()
    grads = [gradient(logits, tk, build("w_reinforce", lam=x)) for x in (a, b, (a + b) / 2)]
    assert close(grads[2], (grads[0] + grads[1]) / 2)
    sign = torch.where(tk.correct, 1.0, -1.0).to(F64)[:, None].expand(24, 6)
    assert close(
        gradient(logits, tk, build("w_reinforce", lam=1)), gradient(logits, replace(tk, adv=sign), Method())
    )
    recoded = replace(tk, reward=2 * tk.reward - 1)
    assert close(gradient(logits, recoded, build("w_reinforce", lam=a)), grads[0])


@given(seeds)
def test_eq_3_11_psr_and_nsr_see_one_sign_only_and_divide_by_what_they_keep(seed):
    logits, tokens = make(seed)
    tk = tokens()
    assume(0 < tk.correct.sum() < 24)
    for key, rows, sign in (("psr", tk.correct, 1), ("nsr", ~tk.correct, -1)):
        kept = tk.mask & rows[:, None]
        want = torch.autograd.grad(-sign * tk.logp[kept].sum() / kept.sum(), logits, retain_graph=True)[0]
        assert close(gradient(logits, tk, build(key)), want, 1e-6)
    zero = gradient(logits, tk, build("w_reinforce", lam=0))
    nsr = gradient(logits, tk, build("nsr"))
    ratio = tk.mask.sum() / (tk.mask & ~tk.correct[:, None]).sum()
    assert close(nsr, ratio * zero, 1e-6) and ratio > 1


@given(seeds, st.floats(0, 3), st.floats(1.01, 10))
def test_eq_3_12_entropy_advantage_keeps_signs_and_is_capped(seed, alpha, kappa):
    _, tokens = make(seed)
    tk = tokens()
    method = build("entropy_advantage", alpha=alpha, kappa=kappa)
    plan = plan_update(tk, method)
    a, new = plan.adv[tk.mask], (plan.adv * plan.weight)[tk.mask]
    want = a + torch.minimum(alpha * tk.entropy[tk.mask].detach(), a.abs() / kappa) * (a != 0)
    assert torch.allclose(new, want, atol=1e-12)
    assert (new.sign() == a.sign()).all() and (new >= a - 1e-12).all()
    assert ((new - a).abs() <= a.abs() / kappa + 1e-12).all() and (new[a == 0] == 0).all()
    more = plan_update(replace(tk, entropy=tk.entropy + 0.1), method)
    assert ((more.adv * more.weight)[tk.mask] >= new - 1e-12).all()


# ----------------------------------------------------------------------------------------------------------
# 3.13 - 3.16: weights from covariance and entropy flow


@given(seeds, st.sampled_from(["theorem", "exact"]), st.floats(0.05, 1), st.floats(-3, 3), st.booleans())
def test_eq_3_13_steer_exp_map(seed, form, low, s, off):
    _, tokens = make(seed, off=off)
    tk = tokens()
    assume(abs(s) > 0.1)
    method = build("steer", form=form, lambda_min=low)
    plan = plan_update(tk, method)
    p, u = tk.logp.exp(), tk.logp + tk.entropy
    r = (tk.logp - tk.old_logp).exp() if off else torch.ones_like(p)
    clip = ((plan.adv > 0) & (r > 1.2)) | ((plan.adv < 0) & (r < 0.8))
    score = p * (1 - p) * u if form == "theorem" else p * u - tk.p2logp - tk.entropy * tk.p2
    omega = torch.where(clip, 0, r * plan.adv * score).abs()[tk.mask].detach()
    w = plan.weight[tk.mask]
    assume(omega.max() > 1e-9)
    assert torch.allclose(w, low ** (omega / omega.max()), atol=1e-9)
    assert w.min().item() == pytest.approx(low) and w[omega.argmax()].item() == pytest.approx(low)
    assert (w <= 1).all() and (w[omega == 0] == 1).all()
    if not off:
        again = plan_update(replace(tk, adv=s * plan.adv), method).weight[tk.mask]
        assert torch.allclose(again, w, atol=1e-9), "A -> sA, any s"


@given(seeds)
def test_eq_3_13_steer_linear_and_released(seed):
    _, tokens = make(seed, off=True)
    tk = tokens()
    plan = plan_update(tk, build("steer", form="released", lambda_min=0.8))
    p = tk.logp.exp()
    m = ((plan.adv / tk.old_logp.exp()) * p * (1 - p) * (tk.logp + tk.entropy)).abs()[tk.mask].detach()
    want = torch.exp(math.log(0.8) * m / max(m.max().item(), 0.02)).clamp(0.8, 1)
    assert torch.allclose(plan.weight[tk.mask], want, atol=1e-9)
    small = replace(tk, adv=1e-3 * plan.adv)
    w = plan_update(small, build("steer", form="released", lambda_min=0.8)).weight[tk.mask]
    assert torch.allclose(
        w, torch.exp(math.log(0.8) * 1e-3 * m / max(1e-3 * m.max().item(), 0.02)), atol=1e-9
    )
    w = plan_update(tk, build("steer", map="linear", lambda_min=0.8)).weight[tk.mask]
    assert w.min() >= 0.8 - 1e-12 and w.max() <= 1.2 + 1e-12
    if plan.adv.abs().sum() > 0:
        assert w.min().item() == pytest.approx(0.8) and w.max().item() == pytest.approx(1.2)
    flat = plan_update(
        replace(tk, adv=torch.zeros_like(p).detach()), build("steer", map="linear", lambda_min=0.8)
    )
    assert torch.allclose(flat.weight[tk.mask], torch.tensor(1.0, dtype=F64)), "all equal: the midpoint"
    for options, low in (
        ({}, 0.7),
        ({"form": "exact"}, 0.7),
        ({"map": "linear"}, 0.8),
        ({"form": "released"}, 0.8),
    ):
        w = plan_update(replace(tk, adv=100 * plan.adv), build("steer", **options)).weight[tk.mask]
        assert plan.adv.abs().sum() == 0 or w.min().item() == pytest.approx(low), (
            "the sources' smallest weights"
        )


FORMS = {"exact": "exact", "paper": "opefo", "theorem": "steer_theorem"}


def _flow(tk, adv, form):
    return torch.where(tk.mask, entropy_change(tk.stats, adv, FORMS[form]), 0)


@given(seeds, st.sampled_from(list(FORMS)), st.floats(0.1, 9))
def test_eq_3_14_opefo_balances_the_flow(seed, form, s):
    _, tokens = make(seed)
    tk, method = tokens(), build("opefo", form=form)
    plan = plan_update(tk, method)
    f, lam = _flow(tk, plan.adv, form), plan.metrics["lam"]
    P, Q = f.clamp(min=0).sum().item(), -f.clamp(max=0).sum().item()
    assume(min(P, Q) > 1e-6)
    assert lam == pytest.approx((Q - P) / (Q + P)) and abs(lam) <= 1
    w = plan.weight[tk.mask]
    assert w.min() >= 0 and w.max() <= 2
    assert abs((plan.weight * f).sum().item()) <= 1e-12 * (P + Q), "sum w f = 0"
    assert torch.allclose(plan.weight[f > 0], torch.tensor(2 * Q / (P + Q), dtype=F64))
    assert torch.allclose(plan.weight[f < 0], torch.tensor(2 * P / (P + Q), dtype=F64))
    scaled = plan_update(replace(tk, adv=s * plan.adv), method).metrics["lam"]
    mirrored = plan_update(replace(tk, adv=-plan.adv), method).metrics["lam"]
    assert scaled == pytest.approx(lam) and mirrored == pytest.approx(-lam)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_sum_norm"])
@both_policies
@pytest.mark.parametrize("corrected", [False, True])
def test_eq_3_14_opefo_stops_the_first_order_entropy_change_of_the_real_step(aggregation, off, corrected):
    """Not through the formula of f: through the gradient on the logits and the gradient of the entropy."""
    logits, tokens = make(20, off=off)
    mismatch = torch.rand(24, 6, generator=torch.Generator().manual_seed(1), dtype=F64)

    def dH(method):
        tk = replace(tokens(), mismatch=mismatch) if corrected else tokens()
        step = -gradient(logits, tk, method)
        z = logits.detach().requires_grad_()
        p = z.log_softmax(-1)
        slope = torch.autograd.grad(-(p.exp() * p).sum(), z)[0]
        return (step * slope).sum().item()

    options = {"aggregation": aggregation}
    plain, balanced = Method(**options), build("opefo", **options)
    for m in (plain, balanced):
        m.progress = Progress(max_length=6)
    assert abs(dH(balanced)) < 1e-6 * abs(dH(plain))


@given(seeds, st.floats(0.2, 4), st.floats(0, 4))
def test_eq_3_14_set_point(seed, target, gain):
    _, tokens = make(seed)
    tk = tokens()
    lam = [plan_update(tk, build("opefo")).metrics["lam"]]
    for t, g in (
        (target, gain),
        (target * 1.1, gain),
        (float(masked_mean(tk.entropy, tk.mask).detach()), gain),
        (target, 0.0),
    ):
        lam.append(plan_update(tk, build("opefo", target_entropy=t, gain=g)).metrics["lam"])
    h = float(masked_mean(tk.entropy.detach(), tk.mask))
    assume(plan_update(tk, Method()).adv.abs().sum() > 0)
    assert lam[1] == pytest.approx(min(1, max(-1, lam[0] + gain * (target - h) / target)))
    assert lam[2] >= lam[1] - 1e-12, "a higher target raises lambda"
    assert lam[3] == pytest.approx(lam[0]) and lam[4] == pytest.approx(lam[0])


def test_eq_3_14_integral_term_adds_the_sum_of_past_errors():
    _, tokens = make(21)
    method = build("opefo", target_entropy=1.3, gain=0.1, integral=0.05)
    before = plan_update(tokens(), method)
    for _ in range(3):
        method.after_step(before)
    error = (1.3 - before.entropy) / 1.3
    assert plan_update(tokens(), method).metrics["lam"] == pytest.approx(
        before.metrics["lam"] + 0.05 * 3 * error
    )


def test_eq_3_14_the_integral_does_not_wind_up_while_lambda_is_clamped():
    _, tokens = make(21)
    method = build("opefo", target_entropy=9.0, gain=3.0, integral=0.1)  # H is about 1.5: λ = 1
    for _ in range(50):
        method.after_step(plan_update(tokens(), method))
    assert plan_update(tokens(), method).metrics["lam"] == 1 and method.error_sum == 0
    method.error_sum = 50.0
    method.target_entropy = 1.3  # the entropy is now above its target: the sum falls although λ is still 1
    plan = plan_update(tokens(), method)
    method.after_step(plan)
    assert plan.metrics["lam"] == 1 and method.error_sum < 50
    both = build("par+opefo", target_entropy=9.0, gain=3.0, integral=0.1, **{"par.lam": 0.3})
    both.after_step(plan_update(tokens(), both))
    assert both.members[1].error_sum == 0, "opefo's own lambda, not par's"


@given(seeds)
def test_eq_3_14_controls(seed):
    logits, tokens = make(seed)
    tk = tokens()
    both = plan_update(tk, build("opefo"))
    f, lam = _flow(tk, both.adv, "exact"), both.metrics["lam"]
    for sides, on, off in (("plus", f > 0, f < 0), ("minus", f < 0, f > 0)):
        one = plan_update(tk, build("opefo", sides=sides))
        assert one.metrics["lam"] == lam
        assert torch.equal(one.weight[on], both.weight[on]) and (one.weight[off] == 1).all()
    static = plan_update(tk, build("opefo", lam=0.001))
    assert (static.weight[f > 0] == 1.001).all() and (static.weight[f < 0] == 0.999).all()
    shuffled = plan_update(tk, build("opefo", shuffled_sign=True))
    assert torch.equal(shuffled.weight[tk.mask].sort().values, both.weight[tk.mask].sort().values)
    if abs(lam) > 0.01:
        assert not torch.equal(shuffled.weight, both.weight)
    assert close(gradient(logits, tk, build("opefo", lam="0")), gradient(logits, tk, Method()))


def test_eq_3_14_one_empty_side_switches_the_other_off():
    """One token that lowers entropy (a likely one, rewarded): lambda = 1, weight 0.  No flow at all: lambda =
    0."""
    z = torch.tensor([[[3.0, 0.0, 0.0]]], dtype=F64)
    s = token_stats(z, torch.tensor([[0]]))
    tk = Tokens(torch.tensor([[0]]), torch.ones(1, 1, dtype=torch.bool), logp=s.logp, entropy=s.entropy)
    tk = replace(tk, p2=s.p2, p2logp=s.p2logp)
    for adv, lam, w in ((1.0, 1.0, 0.0), (-1.0, -1.0, 0.0), (0.0, 0.0, 1.0)):
        plan = plan_update(replace(tk, adv=torch.tensor([[adv]], dtype=F64)), build("opefo"))
        assert plan.metrics["lam"] == lam and plan.weight.item() == w


@given(seeds, st.floats(0.01, 0.99), st.floats(0.1, 5))
def test_eq_3_15_papo_swaps_its_branches_with_the_sign_and_follows_the_phase(seed, lam, e_ref):
    _, tokens = make(seed)
    tk, method = tokens(), build("papo", lam=lam)
    start = plan_update(tk, method)
    assert (start.weight[tk.mask] == 1).all(), "the first update has no reference yet"
    method.e_ref = e_ref
    plan = plan_update(tk, method)
    phi = min(1, max(-1, (e_ref - plan.entropy) / e_ref))
    f = _flow(tk, plan.adv, "exact")
    assert torch.allclose(plan.weight[tk.mask], (1 + lam * phi * f.sign())[tk.mask])
    assert (plan.weight[tk.mask] > 0).all()
    if phi >= 0:
        assert (plan.weight[f > 0] >= 1).all(), "entropy below its reference never damps an expanding token"
    mirrored = plan_update(replace(tk, adv=-plan.adv), method)
    assert torch.allclose((mirrored.weight + plan.weight)[tk.mask], torch.tensor(2.0, dtype=F64))


@given(seeds, st.floats(-3, 3), st.floats(-2, 2), st.sampled_from(["batch", "group"]))
def test_eq_3_16_cw_grpo_kernel(seed, a, b, scope):
    _, tokens = make(seed)
    assume(abs(a) > 0.1)
    tk, method = tokens(), build("cw_grpo", scope=scope)
    plan = plan_update(tk, method)
    parts = [tk.mask] if scope == "batch" else [tk.mask & (tk.group == g)[:, None] for g in range(6)]
    for inside in parts:
        w, adv, x = plan.weight[inside], plan.adv[inside], tk.logp.detach()[inside]
        assert w.sum().item() == pytest.approx(int(inside.sum())) and (w > 0).all()
        c = (x - x.mean()) * (adv - adv.mean())
        if c.var(correction=0) > 1.1e-6 * c.square().mean() > 0:
            k = torch.exp(-(c**2) / (2 * c.var(correction=0)))
            assert torch.allclose(w, k * len(k) / k.sum())
            order = c.abs().argsort()
            assert (w[order].diff() <= 1e-12).all(), "larger |c| never weighs more"
        elif c.var(correction=0) <= 0.9e-6 * c.square().mean():
            assert (w == 1).all()
    moved = replace(tk, adv=torch.where(tk.mask, a * plan.adv + b, 0), logp=tk.logp + 0.7)
    assert torch.allclose(plan_update(moved, method).weight, plan.weight, atol=1e-7)


@given(seeds, st.floats(1e-9, 3e-2), st.sampled_from([torch.float32, F64]))
def test_eq_3_16_cw_grpo_is_finite_where_all_covariances_are_nearly_equal(seed, noise, dtype):
    """Two tokens have equal c exactly, up to rounding; two responses of nearly constant log p almost."""
    g = torch.Generator().manual_seed(seed)
    for B, T, scope in ((2, 1, "batch"), (2, 4, "batch"), (4, 1, "group")):
        logp = (
            -0.1
            - 3 * torch.rand(B, 1, generator=g, dtype=F64)
            + noise * torch.rand(B, T, generator=g, dtype=F64)
        )
        adv = torch.tensor([1.0, -1.0], dtype=dtype).repeat(B // 2)[:, None].expand(B, T)
        ids, mask = torch.zeros(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.bool)
        tk = Tokens(ids, mask, logp=logp.to(dtype), adv=adv, group=torch.arange(B) // 2)
        w = plan_update(tk, build("cw_grpo", scope=scope)).weight
        assert w.isfinite().all() and (w >= 0).all() and w.sum().item() == pytest.approx(B * T, rel=1e-5)
        if T == 1:
            assert (w == 1).all()


# ----------------------------------------------------------------------------------------------------------
# 3.17 - 3.19, 3.25: selection and controllers


@pytest.mark.parametrize("s", [-1, 0, 1])
@given(seed=seeds)
def test_eq_3_17_entrocraft_truth_table(s, seed):
    _, tokens = make(seed)
    tk = tokens().detach()
    h = float(masked_mean(tk.entropy, tk.mask))
    lo = {-1: h + 0.1, 0: h - 0.05, 1: h - 0.3}[s]
    method = build("entrocraft", start=lo, schedule="fixed", width=0.1)
    assert method.side(tk) == s
    kept = method.select(tk)
    sign = torch.where(tk.mask, plan_update(tk, Method()).adv, 0).sum(-1).sign()
    if s == 0:
        assert kept is None
    else:
        assert torch.equal(kept, s * sign >= 0)
    released = build("entrocraft", start=lo, schedule="fixed", variant="released")
    adv = plan_update(tk, released).adv
    raw = torch.where(tk.correct, 1.0, -1.0).to(F64)
    if s != 0:
        want = raw.clamp(min=0) if s > 0 else raw.clamp(max=0)
        assert torch.equal(adv, torch.where(tk.mask, want[:, None], 0))
        assert int((plan_update(tk, released).coef > 0).sum()) == int(tk.mask.sum()), (
            "its rows stay in the mean"
        )


def test_eq_3_17_edges_are_in_the_band_and_the_band_falls():
    tk = Tokens(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool))
    tk = replace(tk, logp=torch.zeros(1, 1, dtype=F64), entropy=torch.full((1, 1), 0.5, dtype=F64))
    for start, width in ((0.5, 0.1), (0.25, 0.25)):  # H on the lower, on the upper edge
        assert build("entrocraft", start=start, width=width, schedule="fixed").side(tk) == 0
    for schedule, middle in (("linear", 0.35), ("cosine", 0.35), ("fixed", 0.6)):
        m = build("entrocraft", schedule=schedule)
        lows = []
        for step in (0, 50, 100):
            m.progress = Progress(step=step, total=100)
            lows.append(m.band()[0])
        assert lows[0] == 0.6 and lows[1] == pytest.approx(middle)
        assert lows[2] == pytest.approx(0.6 if schedule == "fixed" else 0.1)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_eq_3_17_the_band_is_compared_with_the_entropy_of_all_responses_also_in_a_composition(variant):
    _, tokens = make(34)
    tk = tokens().detach()
    reward = torch.tensor([1.0, 0, 1, 0] * 3 + [1.0] * 12, dtype=F64)  # dapo drops the second half
    entropy = tk.entropy + torch.where(torch.arange(24) < 12, 0, 3)[:, None]
    tk = replace(tk, reward=reward, correct=reward > 0, entropy=entropy)
    every, some = (
        float(masked_mean(tk.entropy, m)) for m in (tk.mask, tk.mask & (torch.arange(24) < 12)[:, None])
    )
    band = {"start": (every + some) / 2, "schedule": "fixed", "width": 9.0, "variant": variant}
    assert some < band["start"] < every
    plan = plan_update(tk, build("entrocraft+dapo", overlong=False, **band))
    assert torch.equal(plan.adv, plan_update(tk, build("dapo", overlong=False)).adv), "in the band: GRPO"


def test_while_responses_are_drawn_only_dynamic_sampling_selects():
    """The loop asks before anything is scored; entrocraft would need entropies."""
    tk = make(34)[1]().detach()
    drawn = replace(tk, logp=None, entropy=None, p2=None, p2logp=None)
    both = build("entrocraft+dapo", start=9.0, schedule="fixed")
    assert torch.equal(both.select(drawn), build("dapo").select(drawn))
    assert not torch.equal(both.select(tk), both.select(drawn)), "entrocraft selects nothing here"


@given(seeds, st.floats(0.01, 1), st.sampled_from(["O1", "C2"]), st.booleans())
def test_eq_3_18_stare(seed, fraction, variant, is_open):
    _, tokens = make(seed)
    tk = tokens()
    method = build("stare", fraction=fraction, variant=variant, target=9.0 if is_open else 0.01)
    plan = plan_update(tk, method)
    w = plan.weight
    if not is_open:
        assert (w[tk.mask] == 1).all()
        return
    for side, value in ((plan.adv > 0, 1.1), (plan.adv < 0, 0.9 if variant == "C2" else 1.0)):
        t = tk.mask & side
        n = int(t.sum())
        if n == 0 or value == 1.0:
            assert (w[t] == 1).all()
            continue
        chosen = t & (w == value)
        assert chosen.sum() == max(1, math.ceil(fraction * n)) and (w[t & ~chosen] == 1).all()
        if (t & ~chosen).any():
            assert tk.logp[chosen].max() <= tk.logp[t & ~chosen].min(), "the most surprising ones"


@given(seeds, st.booleans())
def test_eq_3_18_adaptive_weights_move_before_the_loss_of_the_same_step(seed, low):
    """As released.  Planning again changes nothing: only `after_step` moves the state."""
    _, tokens = make(seed)
    tk, method = tokens(), build("stare", adaptive=True, variant="C2", rate=0.02, target=9.0 if low else 0.01)
    for _ in range(2):
        plan = plan_update(tk, method)
        assert (plan.metrics["W"], plan.metrics["M"]) == pytest.approx((1.12, 0.88) if low else (1.08, 0.92))
        if low:
            assert {round(float(w), 4) for w in plan.weight[tk.mask]} <= {0.88, 1.0, 1.12}
    method.after_step(plan)
    assert (method.W, method.M) == (plan.metrics["W"], plan.metrics["M"])


@given(st.lists(st.floats(0, 1), max_size=100))
def test_eq_3_18_adaptive_weights_stay_in_range(trace):
    m = build("stare", adaptive=True, rate=0.02)
    for e in trace:
        W, M = m.W, m.M
        m.after_step(_plan(e))
        assert 1 <= m.W <= 1.5 and 0.5 <= m.M <= 1 and m.W >= 1 >= m.M
        assert (m.W - W) * (0.3 - e) >= 0 and (m.M - M) * (0.3 - e) <= 0
    fixed = build("stare")
    fixed.after_step(_plan(0.1))
    assert (fixed.W, fixed.M) == (1.1, 0.9)


@given(seeds, st.floats(-3, 3), st.floats(0, 1), st.floats(0.1, 0.9))
def test_eq_3_19_entropic_weighs_confident_tokens_by_one_plus_minus_alpha(seed, past, ki, threshold):
    logits, tokens = make(seed)
    tk = tokens()
    method = build("entropic", target=1.5, ki=ki, threshold=threshold, denominator="all")
    method.error_sum = past
    plan = plan_update(tk, method)
    alpha = min(1, max(-1, (plan.entropy - 1.5) + ki * past))
    assert plan.metrics["alpha"] == pytest.approx(alpha) and -1 <= alpha <= 1
    hp = tk.mask & (tk.logp.exp() > threshold)
    w = 1 + torch.where(hp, alpha * plan.adv.sign(), 0)
    assert w.min() >= 0 and w.max() <= 2
    weighted = replace(tk, adv=(w * plan.adv).detach())
    assert close(gradient(logits, tk, method), gradient(logits, weighted, Method()), 1e-6)
    own = gradient(logits, tk, build("entropic", target=1.5, kp=1, ki=0, threshold=threshold))
    every = gradient(
        logits, tk, build("entropic", target=1.5, kp=1, ki=0, threshold=threshold, denominator="all")
    )
    base = gradient(logits, tk, Method())
    halved = gradient(logits, replace(tk, mismatch=torch.full_like(tk.logp, 0.5).detach()), method)
    assert close(2 * halved, gradient(logits, tk, method)), (
        "the mismatch weight multiplies the extra term too"
    )
    if hp.any():
        assert close((own - base) * int(hp.sum()), (every - base) * int(tk.mask.sum()), 1e-5)
    else:
        assert close(own, base)
    method.after_step(plan)
    assert method.error_sum == pytest.approx(past + plan.entropy - 1.5)


@given(seeds, st.floats(0, 4))
def test_eq_3_25_aem_scales_whole_responses_with_mean_one(seed, k):
    _, tokens = make(seed)
    tk = tokens()
    plan = plan_update(tk, build("aem", k=k))
    g = plan.weight[:, 0]  # every row has at least one token
    assert torch.equal(plan.weight, torch.where(tk.mask, g[:, None], 0)) and (g > 0).all()
    assert g.mean().item() == pytest.approx(1)
    h = torch.where(tk.mask, tk.entropy, 0).sum(-1) / tk.mask.sum(-1)
    assert (g[h.argsort()].diff() <= 1e-12).all(), "a larger mean entropy never weighs more"
    assert g.max().item() / g.min().item() == pytest.approx(math.exp(k))


# ----------------------------------------------------------------------------------------------------------
# 3.20 - 3.24, 3.27: ratio and baselines


def _force(tk, method, adv):
    """-∂loss/∂logp · N per token: what the surrogate does to one token of advantage A."""
    logp = tk.logp.detach().requires_grad_()
    loss, _ = policy_loss(replace(tk, logp=logp, adv=adv), method)
    return -torch.autograd.grad(loss, logp)[0] * tk.mask.sum()


def _sweep(adv):
    """One token per ratio r, all with advantage `adv`."""
    r = torch.tensor([0.05, 0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0, 6.0, 11.0], dtype=F64)[:, None]
    ids = torch.zeros(10, 1, dtype=torch.long)
    tk = Tokens(
        ids,
        torch.ones(10, 1, dtype=torch.bool),
        logp=r.log() - 5,
        old_logp=torch.full((10, 1), -5.0, dtype=F64),
    )
    return r[:, 0], tk, torch.full((10, 1), adv, dtype=F64)


@pytest.mark.parametrize("a", [2.0, -2.0])
def test_eq_3_20_cispo_never_drops_a_token(a):
    r, tk, adv = _sweep(a)
    force = _force(tk, build("cispo"), adv)[:, 0]
    assert torch.allclose(force, a * r.clamp(max=5)), "min(r, cap)"
    near = (r > 0.8) & (r < 1.2)
    assert torch.allclose(force[near], _force(tk, Method(), adv)[near, 0])
    verl = _force(tk, build("cispo", eps_low=0.2, eps_high=0.28), adv)[:, 0]
    assert torch.allclose(verl, a * r.clamp(0.8, 1.28))


@given(seeds, st.integers(0, 8))
def test_eq_3_21_dr_grpo_token_gradient_ignores_length_and_padding(seed, extra):
    logits, tokens = make(seed)
    tk = tokens()
    method = build("dr_grpo", norm=50)
    adv = tk.reward - torch.stack([tk.reward[tk.group == g].mean() for g in tk.group])
    force = _force(tk, method, None) / tk.mask.sum()
    assert torch.allclose(force[tk.mask], (adv[:, None].expand(24, 6) / (24 * 50))[tk.mask], atol=1e-9)
    wider = tk._map(lambda v: v if v.dim() < 2 else torch.nn.functional.pad(v, (0, extra)))
    assert close(gradient(logits, wider, method), gradient(logits, tk, method))
    assert build("dr_grpo").loss_norm == 3000
    method.norm, method.progress = None, Progress(max_length=6)
    assert method.loss_norm == 6


@given(seeds, st.floats(1e-4, 0.3))
def test_eq_3_22_gspo_token_form_equals_its_sequence_form(seed, eps):
    logits, tokens = make(seed, off=True)
    tk, method = tokens(), build("gspo", eps_low=eps, eps_high=eps)
    adv = plan_update(tk, method).adv[:, 0]
    length = tk.mask.sum(-1)
    s = (torch.where(tk.mask, tk.logp - tk.old_logp, 0).sum(-1) / length).exp()
    loss = torch.maximum(-s * adv, -s.clamp(1 - eps, 1 + eps) * adv).mean()
    want = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert close(gradient(logits, tk, method), want, 1e-6)
    dropped = torch.where(tk.mask, _force(tk, method, None) == 0, True) & (adv != 0)[:, None]
    assert (dropped.all(-1) == (dropped & tk.mask).any(-1))[adv != 0].all(), "clipped together"


def test_eq_3_22_gspo_of_one_token_responses_is_token_ppo():
    logits, tokens = make(22, T=1, off=True)
    gspo = build("gspo", eps_low=0.2, eps_high=0.2)
    assert close(gradient(logits, tokens(), gspo), gradient(logits, tokens(), Method()), 1e-6)


@given(seeds, st.floats(0.01, 1), st.floats(0.01, 1), st.integers(1, 9))
def test_eq_3_23_qae_binary_rule_and_monotone_baseline(seed, K1, K2, G):
    _, tokens = make(seed, B=4 * G, G=G)
    tk = tokens()
    base1, base2 = (iv.group_quantile(tk.reward, tk.group, K) for K in (min(K1, K2), max(K1, K2)))
    assert (base1 <= base2).all()
    adv = plan_update(tk, build("qae", K=K1)).adv[:, 0]
    for g in range(4):
        rows = tk.group == g
        wrong = int((tk.reward[rows] == 0).sum())
        baseline = 0.0 if wrong / G >= K1 - 1e-12 and wrong > 0 else 1.0  # F(0) >= K: success rate <= 1 - K
        assert (iv.group_quantile(tk.reward, tk.group, K1)[rows] == baseline).all()
        signs = set(adv[rows & (adv != 0)].sign().tolist())
        assert len(signs) <= 1
        if wrong in (0, G):
            assert (adv[rows] == 0).all()
        elif G > 1:
            want = (tk.reward[rows] - baseline) / (tk.reward[rows].std() + 1e-6)
            assert torch.allclose(adv[rows], want)


def test_eq_3_23_the_quantile_is_exact_in_large_groups():
    from fractions import Fraction

    for K in range(1, 20):
        for G in (*range(1, 50), 50, 85, 90, 95, 100, 105, 128):
            rank = int(
                iv.group_quantile(torch.arange(G, dtype=F64), torch.zeros(G, dtype=torch.long), K / 20)[0]
            )
            assert rank == math.ceil(Fraction(K, 20) * G) - 1, (K, G)


def test_eq_3_23_linear_interpolation_matches_torch_quantile():
    reward = torch.tensor([0.0, 1, 1, 3, 2, 5, 4, 4], dtype=F64)
    group = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])
    for K in (0.1, 0.4, 0.5, 0.9, 1.0):
        want = torch.stack([torch.quantile(reward[:4], K)] * 4 + [torch.quantile(reward[4:], K)] * 4)
        assert torch.allclose(iv.group_quantile(reward, group, K, "linear"), want)
        got = iv.group_quantile(reward, group, K)
        for rows in (slice(0, 4), slice(4, 8)):
            r = reward[rows]
            assert (got[rows] == min(x for x in r.tolist() if (r <= x).double().mean() >= K)).all()


@given(seeds)
def test_eq_3_24_htpo_drops_and_equals_ppo_elsewhere_on_policy(seed):
    _, tokens = make(seed, B=40, G=4)
    tk, method = tokens(), build("htpo", low_drop=0.3, high_drop=0.2)
    plan = plan_update(tk, method)
    hard = torch.stack([tk.correct[tk.group == g].double().mean() for g in tk.group]) < 0.6
    high = torch.zeros_like(tk.mask)
    for i in range(40):
        n = int(tk.mask[i].sum())
        h = tk.entropy[i, :n].detach()
        high[i, :n] = h >= h.sort(descending=True).values[max(int(0.2 * n), 1) - 1]
    low_set = tk.mask & ~high & (hard & tk.correct)[:, None]
    high_set = high & (~hard & tk.correct)[:, None]
    dropped = tk.mask & (plan.weight == 0)
    assert (dropped & ~(low_set | high_set)).sum() == 0
    for i in range(40):  # both counts are of one response
        low, top = (tk.entropy[i, s[i]].detach().sort().values for s in (low_set, high_set))
        fewest = low[max(int(0.3 * len(low)), 1) - 1] if len(low) else -1
        assert (dropped & low_set)[i].sum() == (low < fewest).sum()
        least = top[-max(int(0.2 * len(top)), 1)] if len(top) else 99
        assert (dropped & high_set)[i].sum() == (top >= least).sum() >= min(len(top), 1)
    alone = plan_update(tk.rows(tk.group == tk.group[0]), method).weight
    assert torch.equal(alone, plan.weight[tk.group == tk.group[0]]), "whatever other responses there are"
    ppo = _force(tk, Method(dual_clip=10), None)
    assert torch.allclose(_force(tk, method, None)[~dropped], ppo[~dropped])


@pytest.mark.parametrize("slip", [False, True])
def test_eq_3_24_htpo_rules_by_group_of_token(slip):
    """Force over A for each of the rules, at r = .5, 1 and 2; c of the dual clip is 10."""
    r = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    ones = torch.ones(3, 1, dtype=torch.bool)
    method = build("htpo", released_sign=slip)
    tk = Tokens(
        torch.zeros(3, 1, dtype=torch.long),
        ones,
        logp=r.log()[:, None],
        old_logp=torch.zeros(3, 1, dtype=F64),
    )

    def factor(hard, correct, high, a):
        marks = {"hard": ones[:, 0] & hard, "correct": ones[:, 0] & correct, "high": ones & high}
        return method.factor(tk, torch.full((3, 1), a, dtype=F64), marks)[:, 0].tolist()

    ppo_up, ppo_down = [0.5, 1.0, 0.0], [0.0, 1.0, 2.0]
    assert (
        factor(True, True, False, 1.0)
        == factor(False, True, False, 1.0)
        == factor(False, True, True, 1.0)
        == ppo_up
    )
    assert factor(True, False, False, -1.0) == factor(False, False, False, -1.0) == ppo_down
    assert factor(True, False, True, -1.0) == factor(False, False, True, -1.0) == [-0.8, 1.0, 2.0]
    assert factor(True, True, True, 1.0) == pytest.approx([-2.0 if slip else 2.0, 1.0, -1.28])


def _simko(seed, **options):
    """Leaf logits, their batch, gradients of simko and of plain GRPO, and H above its quantile by numpy."""
    logits, tokens = make(seed, B=16, T=8, V=6, low=1)
    options = {"alpha": 0.4, "tau": 0.5, "lam": 1, "k": 3} | options
    tk = replace(tokens(), topk_logp=logits.log_softmax(-1).topk(min(options["k"], 6)).values)
    unsure = torch.zeros_like(tk.mask)
    for i, m in enumerate(tk.mask):
        nats = tk.entropy[i, m].detach().numpy()
        unsure[i, m] = torch.tensor(nats > np.quantile(nats, options["tau"]))
    return logits, tk, gradient(logits, tk, build("simko", **options)), gradient(logits, tk, Method()), unsure


@given(seeds, st.floats(0, 1), st.integers(1, 9), st.floats(0, 1))
def test_eq_3_49_simko_gives_a_share_of_the_push_to_the_most_likely_tokens(seed, alpha, k, tau):
    logits, tk, got, plain, unsure = _simko(seed, alpha=alpha, k=k, tau=tau)
    p, shared = logits.softmax(-1).detach(), unsure & tk.correct[:, None]
    assert torch.equal(got[~shared], plain[~shared]) and got.sum(-1).abs().max() < 1e-15
    one = torch.nn.functional.one_hot(tk.ids, 6)
    best = torch.zeros_like(p).scatter(-1, p.topk(min(k, 6)).indices, 1 / min(k, 6))
    plan = plan_update(tk, Method())
    push = (1 - alpha) * one + alpha * best - p  # (2.1), of the mixture
    want = -(plan.coef * plan.adv).unsqueeze(-1) * push
    assert torch.allclose(got[shared], want[shared], atol=1e-12)


def test_eq_3_49_simko_value_and_edges():
    _, tk, _, _, unsure = _simko(3)
    assert policy_loss(tk, build("simko", alpha=0.4, tau=0.5, lam=1))[0] == policy_loss(tk, Method())[0]
    assert not unsure[tk.lengths == 1].any() and (tk.lengths == 1).any() and unsure.any()
    all_in = _simko(3, alpha=1, k=6, tau=0)  # towards the uniform policy, whatever was drawn
    logits, tk, got, _, unsure = all_in
    shared, plan = unsure & tk.correct[:, None], plan_update(tk, Method())
    want = -(plan.coef * plan.adv).unsqueeze(-1) * (1 / 6 - logits.softmax(-1).detach())
    assert torch.allclose(got[shared], want[shared], atol=1e-12) and shared.any()


def test_eq_3_49_simko_punishes_a_wrong_favourite_where_unsure():
    logits, tk, got, plain, unsure = _simko(5, alpha=0, lam=2)
    adv = plan_update(tk, Method()).adv
    punished = unsure & (adv < 0) & (tk.ids == logits.argmax(-1))
    assert torch.allclose(got[punished], 2 * plain[punished], atol=1e-15) and punished.any()
    assert torch.equal(got[~punished], plain[~punished])


@pytest.mark.parametrize("a", [1.0, -1.0])
def test_eq_3_27_ce_gppo_gradient_outside_the_range_is_constant(a):
    r, tk, adv = _sweep(a)
    force = _force(tk, build("ce_gppo", b1=0.5, b2=1), adv)[:, 0] / a
    inside = r if a > 0 else torch.where(r > 10, 0, r)
    outside = (r > 1.2) if a > 0 else (r < 0.8)
    assert torch.allclose(force[~outside], inside[~outside])
    assert torch.allclose(force[outside], torch.tensor(1.2 if a > 0 else 0.4, dtype=F64))
    zero = _force(tk, build("ce_gppo", b1=0, b2=0), adv)
    assert torch.allclose(zero, _force(tk, Method(dual_clip=10), adv))


# ----------------------------------------------------------------------------------------------------------
# 3.30 - 3.44: the second volume


def _group(rewards, **fields):
    """Tokens of one-token responses, one group."""
    r = torch.as_tensor(rewards, dtype=F64)
    n = len(r)
    base = {"logp": torch.full((n, 1), -1.0, dtype=F64), "reward": r, "correct": r > 0}
    base |= {"group": torch.zeros(n, dtype=torch.long)}
    return Tokens(torch.arange(n)[:, None], torch.ones(n, 1, dtype=torch.bool), **{**base, **fields})


def _advantage(key, rewards, **options):
    return build(key, **options).advantage(_group(rewards))[:, 0].tolist()


@given(seeds, st.floats(-0.9, 0.9))
def test_eq_3_30_repo_rescales_by_log_probability_and_keeps_signs(seed, zeta):
    _, tokens = make(seed)
    tk = tokens().detach()
    plan = plan_update(tk, build("repo", zeta=zeta))
    for a, logp, w, m in zip(*(x.flatten().tolist() for x in (plan.adv, tk.logp, plan.weight, tk.mask))):
        if m:
            assert w == pytest.approx(max(0.0, 1 - zeta * ((a > 0) - (a < 0)) * logp))
            assert a == 0 or zeta < 0 or (w >= 1 if a > 0 else w <= 1)
    sure = replace(tk, logp=torch.zeros_like(tk.logp))
    assert (plan_update(sure, build("repo", zeta=zeta)).weight[tk.mask] == 1).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.sampled_from([0.0, 0.001, -0.02, 0.05]))
def test_eq_3_30_the_controller_of_repo_is_the_released_one(trace, zeta):
    m = build("repo", zeta=zeta, target=0.3)
    for e in trace:
        m.after_step(_plan(e))
        if e > 0.3:  # word for word as in the catalogue
            if zeta >= 0:
                zeta = zeta / 2 if zeta / 2 >= 1e-4 else -1e-4
            else:
                zeta = max(-0.05, 2 * zeta)
        elif e < 0.3:
            if zeta > 0:
                zeta = min(0.05, 2 * zeta)
            elif zeta == 0:
                zeta = 1e-4
            else:
                zeta = zeta / 2 if -zeta / 2 >= 1e-4 else 1e-4
        assert m.now == pytest.approx(zeta, rel=1e-12) and abs(m.now) <= 0.05
    first = build("repo")
    first.after_step(_plan(0.7))
    assert (first.goal, first.now) == (0.7, 0.001), "the first step's entropy is the target"


@given(seeds)
def test_eq_3_30_the_direct_form_is_the_entropy_bonus_as_a_score_function(seed):
    """Its expected gradient over y ~ p, by enumeration, is beta ∇H."""
    z = 2 * torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=F64)
    z.requires_grad_()
    logp = z.log_softmax(-1)
    h = -(logp.exp() * logp).sum()
    tk = _group([0.0] * 9, logp=logp.detach()[:, None], entropy=h.detach().expand(9, 1))
    a = build("repo", form="direct", beta=0.3).advantage(tk)[:, 0]  # one reward for all: A = 0
    (got,) = torch.autograd.grad((logp.exp().detach() * a * logp).sum(), z, retain_graph=True)
    (want,) = torch.autograd.grad(0.3 * h, z)
    assert torch.allclose(got, want, atol=1e-14)


@given(st.integers(2, 12), st.data(), st.floats(0, 2), st.floats(0, 2))
def test_eq_3_31_asym_grpo_is_a_family_that_holds_grpo_and_maxrl(n, data, plus, minus):
    c = data.draw(st.integers(1, n - 1))
    rewards, p = [1.0] * c + [0.0] * (n - c), c / n
    got = _advantage("asym_grpo", rewards, b_plus=plus, b_minus=minus)
    assert got[:c] == pytest.approx([((1 - p) / p) ** plus] * c)
    assert got[c:] == pytest.approx([-((p / (1 - p)) ** minus)] * (n - c))
    assert (abs(sum(got)) < 1e-9 * n) == (abs(plus + minus - 1) < 1e-9 or 2 * c == n)
    grpo = group_advantages(torch.tensor(rewards, dtype=F64), torch.zeros(n)) * math.sqrt(n / (n - 1))
    assert _advantage("asym_grpo", rewards, b_plus=0.5, b_minus=0.5) == pytest.approx(grpo.tolist(), rel=1e-4)
    maxrl = _advantage("asym_grpo", rewards, b_plus=1, b_minus=0)
    assert maxrl == pytest.approx(_advantage("maxrl", rewards), rel=1e-4)
    assert _advantage("maxrl", [7 * r for r in rewards]) == pytest.approx(maxrl, rel=1e-4)
    assert _advantage("asym_grpo", [1.0] * n) == _advantage("maxrl", [0.0] * n) == [0] * n
    assert _advantage("maxrl", [1.0]) == [0]


def test_eq_3_31_maxrl_refuses_what_it_cannot_divide_by():
    with pytest.raises(ValueError, match="reward of -1"):
        _advantage("maxrl", [1.0, -1.0])


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.8])
def test_eq_3_31_maxrl_descends_a_series_of_pass_at_k(rate):
    """All outcomes of six tries that are right with probability P = σ(θ), ∇P = P (1 - P)."""
    n, expected = 6, 0.0
    for right in itertools.product([1.0, 0.0], repeat=n):
        chance = math.prod(rate if r else 1 - rate for r in right)
        score = [r - rate for r in right]  # ∇_θ log π
        expected += chance * sum(a * g for a, g in zip(_advantage("maxrl", list(right)), score)) / n
    series = sum((1 - rate) ** (k - 1) for k in range(1, n))
    assert expected == pytest.approx(rate * (1 - rate) * series, rel=1e-4)


@given(st.integers(2, 8), st.data())
def test_eq_3_32_passk_is_the_average_over_all_subsets(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    rewards = [1.0] * c + [0.0] * (n - c)
    got = _advantage("passk", rewards, k=k)
    best = [max(rewards[j] for j in T) for T in itertools.combinations(range(n), k)]
    mean = sum(best) / len(best)
    if mean in (0, 1):
        assert got == [0] * n
        return
    std = math.sqrt(mean * (1 - mean))
    for i in range(n):
        mine = [max(rewards[j] for j in T) for T in itertools.combinations(range(n), k) if i in T]
        assert got[i] == pytest.approx((sum(mine) / len(mine) - mean) / std, rel=1e-4, abs=1e-9)
    assert sum(got) == pytest.approx(0, abs=1e-5)
    if k == 1:
        assert got == pytest.approx(_advantage("asym_grpo", rewards, b_plus=0.5, b_minus=0.5), rel=1e-4)


@given(st.lists(st.sampled_from([0.0, 0.2, 0.5, 1.0, -1.0]), min_size=2, max_size=7), st.data())
def test_eq_3_32_pkpo_is_the_mean_over_subsets_of_the_others(rewards, data):
    n = len(rewards)
    k = data.draw(st.integers(2, n))
    got = _advantage("passk", rewards, k=k, objective="pkpo")
    for i in range(n):
        others = [rewards[j] for j in range(n) if j != i]
        gains = [max(rewards[i] - max(T), 0) for T in itertools.combinations(others, k - 1)]
        assert got[i] == pytest.approx(k / n * sum(gains) / len(gains), abs=1e-12)
    mean = sum(rewards) / n
    assert _advantage("passk", rewards, k=1, objective="pkpo") == pytest.approx([r - mean for r in rewards])
    first, second, *_ = sorted(rewards, reverse=True)
    best = _advantage("passk", rewards, objective="best")
    assert sorted(best)[:-1] == [0] * (n - 1) and (max(best) > 0) == (first > second)
    if first > second:
        std = torch.tensor(rewards, dtype=F64).std()
        assert best[rewards.index(first)] == pytest.approx(float((first - second) / (std + 1e-6)))


def test_eq_3_32_pkpo_is_unbiased_for_the_best_of_k():
    """Enumeration of four draws from a softmax of three answers."""
    z = torch.tensor([0.3, -0.5, 0.9], dtype=F64, requires_grad=True)
    value, n, k = torch.tensor([0.0, 1.0, 0.4], dtype=F64), 4, 2
    p, score = z.softmax(-1).detach(), torch.eye(3, dtype=F64) - z.softmax(-1).detach()
    got = torch.zeros(3, dtype=F64)
    for y in itertools.product(range(3), repeat=n):
        a = torch.tensor(_advantage("passk", value[list(y)].tolist(), k=k, objective="pkpo"), dtype=F64)
        got += p[list(y)].prod() * (a[:, None] * score[list(y)]).sum(0)
    q = z.softmax(-1)
    target = sum(q[i] * q[j] * torch.maximum(value[i], value[j]) for i in range(3) for j in range(3))
    assert torch.allclose(got, torch.autograd.grad(target, z)[0], atol=1e-12)


@given(seeds, st.floats(0, 1), st.booleans())
def test_eq_3_33_unlikely_right_responses_keep_more_of_their_reward(seed, b, normalize):
    _, tokens = make(seed, low=2)
    tk = tokens().detach()
    got = build("unlikely", b=b, normalize=normalize).shape(tk)
    total = torch.where(tk.mask, tk.logp, 0).sum(-1)
    mean = total / tk.mask.sum(-1) if normalize else total
    for i in range(24):
        group = [j for j in range(24) if tk.group[j] == tk.group[i]]
        rank = sum(float(mean[j] < mean[i]) for j in group)
        mixed = len({float(tk.reward[j]) for j in group}) > 1
        want = float(tk.reward[i]) * (1 - b * rank / len(group) if mixed else 1)
        assert float(got[i]) == pytest.approx(want)
    assert (got[~tk.correct] == 0).all() and (got[tk.correct] > 0).all()


def test_eq_3_33_equal_log_probabilities_share_a_rank():
    tk = _group([1.0, 1.0, 1.0, 0.0], logp=torch.tensor([[-1.0], [-1.0], [-2.0], [-3.0]], dtype=F64))
    assert build("unlikely", b=0.8).shape(tk).tolist() == pytest.approx([0.5, 0.5, 0.8, 0.0])


@given(seeds, st.floats(0, 1), st.booleans())
def test_eq_3_34_ucpo_moves_weight_among_the_right_and_keeps_its_sum(seed, tau, normalize):
    _, tokens = make(seed, G=6)
    tk = tokens().detach()
    w = plan_update(tk, build("ucpo", tau=tau, normalize=normalize)).weight[:, 0]
    total = torch.where(tk.mask, tk.logp, 0).sum(-1)
    score = total / tk.mask.sum(-1) if normalize else total
    for g in range(4):
        right = [i for i in range(24) if tk.group[i] == g and tk.correct[i]]
        wrong = [i for i in range(24) if tk.group[i] == g and not tk.correct[i]]
        assert all(w[i] == 1 for i in wrong)
        if len(right) < 2:
            assert all(w[i] == 1 for i in right)
            continue
        e = [math.exp(score[i]) for i in right]
        inverse = [1 / max(x / sum(e), 1e-6) for x in e]
        for i, x in zip(right, inverse):
            assert float(w[i]) == pytest.approx(1 - tau + tau * len(right) * x / sum(inverse))
        assert sum(float(w[i]) for i in right) == pytest.approx(len(right))


@given(st.integers(2, 12), st.data())
def test_eq_3_37_mcpo_weighs_easy_prompts_alike(n, data):
    c = data.draw(st.integers(0, n))
    got, p = _advantage("mcpo", [1.0] * c + [0.0] * (n - c)), c / n
    if c in (0, n):
        assert got == [0] * n
        return
    assert sum(got) == pytest.approx(0, abs=1e-9)
    assert p * got[0] == pytest.approx(0.5 if p > 0.5 else math.sqrt(p * (1 - p)))
    if p > 0.5:
        assert got[-1] == pytest.approx(-1 / (2 * (1 - p)))


@given(seeds, st.floats(0, 0.5))
def test_eq_3_37_mcpo_anchors_mastered_prompts_outside_of_a_dead_zone(seed, delta):
    _, tokens = make(seed, off=True)
    right = torch.arange(24) < 12  # three groups mastered, three failed
    tk = replace(tokens().detach(), reward=right.to(F64), correct=right)
    tk.logp.requires_grad_()
    method = build("mcpo", delta=delta, beta=0.7)
    plan = plan_update(tk, method)
    loss = method.penalty(tk, plan)
    (slope,) = torch.autograd.grad(loss, tk.logp)
    d, want = (tk.logp - tk.old_logp).detach(), torch.zeros_like(tk.logp)
    value = 0.0
    for i in range(12):
        for t in range(int(tk.mask[i].sum())):
            x, share = float(d[i, t]), 0.7 / 12 / int(tk.mask[i].sum())
            if abs(x) > delta:
                edge = math.copysign(delta, x)
                value += share * (math.exp(x) - x - math.exp(edge) + edge)
                want[i, t] = share * (math.exp(x) - 1)
    assert float(loss) == pytest.approx(value, abs=1e-12) and torch.allclose(slope, want, atol=1e-12)


@given(seeds, st.floats(0, 1))
def test_eq_3_40_ar_damps_rare_tokens_of_both_signs(seed, alpha):
    _, tokens = make(seed)
    tk = tokens().detach()
    plan = plan_update(tk, build("ar", alpha=alpha))
    assert torch.allclose(plan.weight[tk.mask], (alpha * tk.logp.exp() + 1 - alpha)[tk.mask])
    assert (plan.weight[tk.mask] >= 1 - alpha - 1e-12).all() and (plan.weight[tk.mask] <= 1).all()


@given(seeds, st.floats(0.2, 5), st.floats(0.2, 5))
def test_eq_3_43_sapo_has_the_gradient_of_its_published_loss(seed, up, down):
    _, tokens = make(seed, off=True)
    tk = tokens().detach()
    tk.logp.requires_grad_()
    method = build("sapo", t_plus=up, t_minus=down)
    plan = plan_update(tk, method)
    r, t = (tk.logp - tk.old_logp).exp(), torch.where(plan.adv > 0, up, down)
    published = -(4 / t) * torch.sigmoid(t * (r - 1)) * plan.adv
    (want,) = torch.autograd.grad(torch.where(tk.mask, published, 0).sum(), tk.logp)
    (got,) = torch.autograd.grad(torch.where(tk.mask, method.surrogate(tk, plan), 0).sum(), tk.logp)
    assert torch.allclose(got, want, atol=1e-12)
    assert (build("sapo").factor(_sweep(1.0)[1], torch.ones(10, 1, dtype=F64)) > 0).all(), "none is cut off"


@given(seeds, st.floats(0, 4))
def test_eq_3_44_bapo_widens_the_clip_until_successes_weigh_enough(seed, target):
    _, tokens = make(seed, off=True)
    tk, method = tokens().detach(), build("bapo", target=target)
    plan = plan_update(tk, method)
    low, high = plan.metrics["clip_low"], plan.metrics["clip_high"]
    r, a = ((tk.logp - tk.old_logp).exp()[tk.mask], plan.adv[tk.mask])

    def short(lo, hi):
        effect = torch.where(a >= 0, r.clamp(max=hi) * a, r.clamp(min=lo) * a)
        up, down = effect[effect > 0].sum(), effect[effect < 0].abs().sum()
        return bool(down > 0 and up < target * down)

    lo, hi = 0.6, 1.2
    for _ in range(4):
        lo = lo + 0.05 if short(lo, hi) else lo
    for _ in range(16):
        hi = hi + 0.05 if short(lo, hi) else hi
    assert (low, high) == pytest.approx((lo, hi)) and 0.6 <= low <= 0.8 + 1e-9 and 1.2 <= high <= 2 + 1e-9
    f = method.factor(tk, plan.adv, plan.marks)[tk.mask]
    gone = ((a > 0) & (r > high)) | ((a < 0) & ((r < low) | (r > 3)))
    assert torch.equal(f == 0, gone) and torch.allclose(f[~gone], r[~gone])


# ----------------------------------------------------------------------------------------------------------
# 3.16 as released; 3.35, 3.36, 3.46, 3.47


@given(seeds)
def test_eq_3_16_released_weights_and_the_gradient_that_runs_through_them(seed):
    """Against one plain function of all log p, written per group, and its gradient; in slices too."""
    _, tokens = make(seed, B=12)
    tk, method = tokens().detach(), build("cw_grpo", form="released", aggregation="seq_mean_token_mean")
    adv = plan_update(tk, Method()).adv
    logp = tk.logp.clone().requires_grad_()

    def objective(x):
        total, weights = 0.0, {}
        for g in range(3):
            rows = range(4 * g, 4 * g + 4)
            c = {}
            mean_a = sum(adv[i, 0] for i in rows) / 4
            for i in rows:
                own = x[i][tk.mask[i]]
                for t, v in enumerate(own):
                    c[i, t] = (v - own.mean()) * (adv[i, 0] - mean_a)
            values = torch.stack(list(c.values()))
            variance = values.var(correction=0)
            n = 4 * max(int(tk.mask[i].sum()) for i in rows)
            plain = not variance > 1e-6 * values.detach().square().mean()
            k = {at: torch.ones(()) if plain else torch.exp(-(v**2) / (2 * variance)) for at, v in c.items()}
            norm = 1.0 if plain else n / sum(k.values())
            weights |= {at: v * norm for at, v in k.items()}
        for (i, t), w in weights.items():  # on-policy: the surrogate's value is -A, its gradient -A ∇log p
            force = -adv[i, t] * (1 + x[i, t] - x[i, t].detach())
            total = total + w * force / (12 * int(tk.mask[i].sum()))
        return total, weights

    total, weights = objective(logp)
    (want,) = torch.autograd.grad(total, logp)
    scored = replace(tk, logp=logp)
    plan = plan_update(scored, method)
    for (i, t), w in weights.items():
        assert plan.weight[i, t].item() == pytest.approx(float(w), rel=1e-9)
    got = torch.zeros_like(want)
    for rows in (slice(0, 5), slice(5, 12)):
        loss, _ = batch_loss(scored.rows(rows), plan.rows(rows), method)
        got += torch.autograd.grad(loss, logp, retain_graph=True)[0]
    assert torch.allclose(got[tk.mask], want[tk.mask], atol=1e-10)
    (whole,) = torch.autograd.grad(batch_loss(scored, plan, method)[0], logp)
    loose = build("cw_grpo", form="released", aggregation="seq_mean_token_mean")
    detached = replace(plan, marks={})
    (other,) = torch.autograd.grad(batch_loss(scored, detached, loose)[0], logp, allow_unused=True)
    assert torch.allclose(whole, got) and (seed > 5 or not torch.allclose(whole, other))


@given(seeds, st.integers(1, 9))
def test_eq_3_35_outcome_bonus(seed, size):
    g = torch.Generator().manual_seed(seed)
    outcome, group = torch.randint(4, (2 * size,), generator=g), torch.arange(2 * size) // size
    tk = Tokens(torch.zeros(2 * size, 1).long(), torch.ones(2 * size, 1).bool(), group=group)
    tk.outcome = outcome + 10 * group  # an answer belongs to its prompt
    rows = list(zip(group.tolist(), outcome.tolist()))
    batch = build("outcome_exploration")
    want = [-sum(x == y for x in rows) / size + 1 / size for y in rows]
    assert torch.allclose(batch.bonus(tk), torch.tensor(want, dtype=F64))
    tk.outcome = torch.arange(2 * size)
    assert (batch.bonus(tk) == 0).all(), "all answers differ"
    tk.outcome = group
    assert torch.allclose(batch.bonus(tk), torch.tensor(-(size - 1) / size, dtype=F64))


def test_eq_3_35_counts_of_earlier_steps():
    _, tokens = make(3)
    tk = tokens()
    for form in ("ucb_con", "ucb_mean"):
        m, first = build("outcome_exploration", form=form), build("outcome_exploration", form=form)
        for step in range(4):
            times = [step * sum(y == x for y in tk.outcome.tolist()) for x in tk.outcome.tolist()]
            b = torch.tensor([min(1, max(n, 1) ** -0.5) for n in times], dtype=F64)
            want = b - 0.5 if form == "ucb_con" else b - b.view(-1, 4).mean(1).repeat_interleave(4)
            assert torch.allclose(m.bonus(tk), want)
            plan = plan_update(tk, m)
            assert torch.equal(m.bonus(tk), build_with(form, m.counts).bonus(tk))  # a loss changes nothing
            m.after_step(plan)
        assert sum(m.counts.values()) == 4 * 24 and not first.counts  # its own, of four steps
        again = build("outcome_exploration", form=form)
        again.load_state_dict(m.state_dict())
        assert torch.equal(again.bonus(tk), m.bonus(tk))
    plain = group_advantages(tk.reward, tk.group)[:, None]
    assert torch.allclose(
        plan_update(tk, m).adv[tk.mask], (plain + 0.2 * m.bonus(tk)[:, None]).expand(24, 6)[tk.mask]
    )


def build_with(form, counts):
    m = build("outcome_exploration", form=form)
    m.counts = dict(counts)
    return m


@given(seeds)
def test_eq_3_36_darling(seed):
    g = torch.Generator().manual_seed(seed)
    B, T, G = 8, 9, 4
    ids, group = torch.randint(2, (B, T), generator=g), torch.arange(B) // G
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    reward = torch.randint(2, (B,), generator=g).double()
    tk = Tokens(ids, mask, reward=reward, group=group, logp=torch.randn(B, T, generator=g, dtype=F64))
    tk.outcome = torch.randint(3, (B,), generator=g)
    text = [row[keep].tolist() for row, keep in zip(ids, mask)]
    grams = [{tuple(x[i : i + 4]) for i in range(len(x) - 3)} for x in text]
    for i, own in enumerate(grams):
        others = set().union(*(grams[j] for j in range(B) if j != i and group[j] == group[i]))
        want = len(own - others) / max(len(text[i]) - 3, 1)
        assert build("darling").ngram(tk)[i].item() == pytest.approx(want)
        c = sum(bool(tk.outcome[j] == tk.outcome[i]) for j in range(B) if group[j] == group[i])
        assert build("darling").partition(tk)[i].item() == pytest.approx(max((G - c) / (G - 1), 0.1))
    for name in ("ngram", "partition"):
        method = build("darling", diversity=name)
        shaped = method.shape(tk)
        assert ((shaped >= 0) & (shaped <= reward)).all() and (shaped[reward == 0] == 0).all()
        want = shaped - shaped.view(-1, G).mean(1).repeat_interleave(G)
        assert torch.allclose(plan_update(tk, method).adv[mask], want[:, None].expand(B, T)[mask])
    tk.outcome = torch.arange(B)  # all answers differ: the advantage of Dr.GRPO
    plans = [
        plan_update(tk, build(x, **y)).adv
        for x, y in (("darling", {"diversity": "partition"}), ("dr_grpo", {}))
    ]
    assert torch.allclose(*plans)
    with pytest.raises(ValueError, match="below 0"):
        plan_update(replace(tk, reward=reward - 1), build("darling"))


def volume(M, rows):
    """log det(I + M) over some rows, by eigenvalues."""
    rows = list(rows)
    return torch.linalg.eigvalsh(M[rows][:, rows]).log1p().sum().item() if rows else 0.0


def similar(seed, c, spread=1.0):
    """(c, c) cosines times rewards of some random vectors, alike if spread is small."""
    g = torch.Generator().manual_seed(seed)
    e = 1 + spread * torch.randn(c, 5, generator=g, dtype=F64)
    e = e / e.norm(dim=1, keepdim=True) * torch.rand(c, 1, generator=g, dtype=F64)
    return e @ e.T


def orders_of(seed):
    return torch.Generator().manual_seed(seed)


@given(seeds, st.integers(1, 4))
def test_eq_3_39_shapley_values_are_the_mean_over_all_orders(seed, c):
    M, want, every = similar(seed, c), [0.0] * c, list(itertools.permutations(range(c)))
    for order in every:
        for k, i in enumerate(order):
            want[i] += (volume(M, order[: k + 1]) - volume(M, order[:k])) / len(every)
    assert iv.shapley(M, orders_of(0)).tolist() == pytest.approx(want, abs=1e-10)


@given(seeds, st.integers(1, 24), st.floats(0.01, 3))
def test_eq_3_39_shapley_values_add_up_share_and_repeat(seed, c, spread):
    M = similar(seed, c, spread)
    rows = torch.arange(c)
    rows[-1] = 0  # a copy of the first
    M = M[rows][:, rows]
    phi = iv.shapley(M, orders_of(seed))
    assert phi.sum().item() == pytest.approx(volume(M, range(c)), abs=1e-10)
    assert phi[0] == phi[-1] and (phi > 0).all()
    assert torch.equal(phi, iv.shapley(M, orders_of(seed)))
    other = iv.shapley(M, orders_of(seed + 1))
    assert torch.equal(phi, other) == (c <= 10)


@pytest.mark.parametrize("spread", [2.0, 0.3, 0.05])
def test_eq_3_39_sampled_orders_are_near_all_also_for_rows_that_are_almost_the_same(spread):
    """The division by the std makes noise as loud as it is beside the differences between the rows."""
    M, c = similar(1, 11, spread), 11
    M = M / (M.diagonal() * M.diagonal()[:, None]).sqrt()
    F = {s: volume(M, s) for k in range(c + 1) for s in itertools.combinations(range(c), k)}
    exact = torch.zeros(c, dtype=F64)
    for s, value in F.items():
        for i in range(c):
            rest = len(s) - (i in s)
            exact[i] += (1 if i in s else -1) * value / (c * math.comb(c - 1, rest))
    error = torch.stack([iv.shapley(M, orders_of(i)) - exact for i in range(20)])
    assert error.std() < 0.4 * exact.std() and error.mean(0).std() < 0.15 * exact.std()


@given(seeds, st.integers(1, 12))
def test_eq_3_39_cosines_of_n_grams(seed, T):
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, (T,), generator=g)[: int(n)].tolist() for n in torch.randint(0, T + 1, (5,))]
    K = iv.cosines([*rows, rows[0]])
    text = ["".join(map(str, row)) or "e" for row in rows]
    grams = {x[i : i + n] for x in text for n in range(1, 5) for i in range(len(x) - n + 1)}
    e = [[sum(x.startswith(y, i) for i in range(len(x))) for y in sorted(grams)] for x in text]
    for i, j in itertools.product(range(5), repeat=2):
        want = sum(a * b for a, b in zip(e[i], e[j])) / (math.hypot(*e[i]) * math.hypot(*e[j]))
        assert K[i, j].item() == pytest.approx(want)
    assert K[0, 5] == 1 and torch.equal(K[0], K[5])


@given(seeds, st.sampled_from([4, 16]), st.floats(0.1, 10))
def test_eq_3_39_gcpo(seed, G, scale):
    g = torch.Generator().manual_seed(seed)
    B, T = 2 * G, 6
    ids, group = torch.randint(2, (B, T), generator=g), torch.arange(B) // G
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    reward = (torch.rand(B, generator=g) < 0.8).double()
    tk = Tokens(ids, mask, reward=reward, group=group, logp=torch.randn(B, T, generator=g, dtype=F64))
    method = build("gcpo", g=scale)
    method.progress = Progress(step=2, seed=seed)
    phi = method.shape(tk)
    assert (phi[reward == 0] == 0).all() and (phi[reward > 0] > 0).all()
    for own in (group == 0, group == 1):
        K = iv.cosines([row[keep].tolist() for row, keep in zip(ids[own], mask[own])])
        M = scale * reward[own, None] * K * reward[own]
        assert phi[own].sum().item() == pytest.approx(volume(M, range(G)), abs=1e-9)
        same = (K == 1) & (M > 0)  # right ones with the same text share equally
        assert (torch.where(same, phi[own] - phi[own][:, None], 0) == 0).all()
    order = torch.randperm(B, generator=g)
    there = replace(tk.rows(order), group=5 - group[order])
    assert torch.equal(method.shape(there), phi[order])
    want = group_advantages(phi, group)[:, None].expand(B, T)
    assert torch.equal(plan_update(tk, method).adv[mask], want[mask])


def right_ones(*texts, wrong=0):
    ids = torch.tensor([*texts, *texts[:1] * wrong])
    reward = (torch.arange(len(ids)) < len(texts)).double()
    logp = -torch.ones(ids.shape, dtype=F64)
    return Tokens(ids, ids >= 0, reward=reward, group=torch.zeros(len(ids), dtype=torch.long), logp=logp)


@pytest.mark.parametrize("m", [2, 5, 12])
def test_eq_3_39_copies_earn_less_than_responses_with_nothing_in_common(m):
    method = build("gcpo", g=2.0)
    copies = method.shape(right_ones(*[[1, 1, 1]] * m))
    apart = method.shape(right_ones(*[[i] * 3 for i in range(m)]))
    assert copies.sum().item() == pytest.approx(math.log1p(2 * m)) and copies.sum() < apart.sum()
    assert apart.tolist() == pytest.approx([math.log1p(2)] * m)
    for tk in (right_ones(*[[1, 1, 1]] * m), right_ones(*[[i] * 3 for i in range(m)])):
        assert (plan_update(tk, method).adv == 0).all(), "all are worth the same"
    adv = plan_update(right_ones(*[[1, 1, 1]] * m, [2, 2, 2], wrong=3), method).adv[:, 0]
    assert adv[m] > adv[0] > adv[-1] and (adv[:m] == adv[0]).all()


def test_eq_3_39_one_right_response_or_a_small_g_is_grpo_and_errors_are_not_paid():
    one, many = right_ones([1, 2, 3], wrong=3), right_ones(*([i, 1, 2] for i in range(5)), wrong=3)
    for tk, method in ((one, build("gcpo")), (many, build("gcpo", g=1e-3))):
        want = plan_update(tk, Method()).adv
        assert torch.allclose(plan_update(tk, method).adv, want, atol=5e-3)  # eps of (2.1)
        assert method.shape(tk).dtype == method.shape(replace(tk, reward=tk.reward.float())).dtype == F64
    assert (plan_update(replace(one, reward=one.reward * 0), build("gcpo")).adv == 0).all()
    with pytest.raises(ValueError, match="below 0"):
        plan_update(replace(one, reward=one.reward - 1), build("gcpo"))


@given(seeds, st.sampled_from([(1, 4), (2, 4), (4, 4), (4, 8)]), st.integers(4, 9))
def test_eq_3_46_openers(seed, shape, pool):
    openers, size = shape
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 12, generator=g).repeat_interleave(size, 0)
    m = build("reft", openers=openers, pool=pool)
    rows = torch.arange(size).repeat(3)
    ids, logp = m.sample(logits, 0, rows, g)
    assert m.sample(logits, 1, rows, g) is None and torch.allclose(logp.exp(), torch.tensor(1 / pool))
    order = logits.argsort(-1, descending=True)
    rank = (order == ids[:, None]).int().argmax(-1).view(3, size)
    assert (rank[0] == rank).all() and (rank < pool).all()  # the same ranks for all prompts
    count = torch.bincount(rank[0], minlength=pool)
    assert (count > 0).sum() == openers and set(count[count > 0].tolist()) == {size // openers}


def test_eq_3_46_every_rank_is_as_likely_and_what_cannot_be_is_refused():
    m, g = build("reft", pool=5, openers=2), torch.Generator().manual_seed(0)
    logits, rows = torch.arange(7.0).flip(0).expand(4, 7), torch.arange(4)
    seen = torch.bincount(torch.cat([m.sample(logits, 0, rows, g)[0] for _ in range(2000)]), minlength=7)
    assert (seen[:5] / 8000 - 0.2).abs().max() < 0.02 and not seen[5:].any()
    with pytest.raises(ValueError, match="must divide the group size 5"):
        m.sample(logits[:1].expand(5, 7), 0, torch.arange(5), g)
    with pytest.raises(ValueError, match="at most the 3 tokens"):
        build("reft").sample(logits[:, :3], 0, rows, g)
    with pytest.raises(ValueError, match="a pool as large"):
        build("reft", openers=9, pool=8)
    _, tokens = make(2, low=2)
    tk = tokens()
    plan = plan_update(tk, build("reft", first="mask"))
    assert (plan.adv[:, 0] == 0).all() and plan.coef.sum() == pytest.approx(1)


@given(seeds, st.floats(0.05, 0.95))
def test_eq_3_47_a_dropped_token_is_never_drawn_and_the_weight_is_the_kept_mass(seed, share):
    m, g = build("vocab_dropout", share=share, correct=True), torch.Generator().manual_seed(seed)
    m.progress = Progress(step=seed % 7, seed=seed, stops=(0, 99))
    logits = torch.randn(64, 9, generator=g, dtype=F64)
    kept = m.kept(9, logits.device)
    assert kept[0] and torch.equal(kept, m.kept(9, logits.device))
    m.progress = replace(m.progress, step=seed % 7 + 1)
    assert share > 0.1 or torch.equal(m.kept(9, logits.device)[:1], kept[:1])
    m.progress = replace(m.progress, step=seed % 7)
    ids, said = m.sample(logits, 3, torch.arange(64), g)
    assert kept[ids].all()
    logp = logits.log_softmax(-1)
    mass = (logp.exp() * kept).sum(-1)
    own = logp.gather(-1, ids[:, None])[:, 0]
    assert torch.allclose(said, own - mass.log())
    tk = Tokens(ids[:, None], torch.ones(64, 1).bool(), reward=torch.rand(64), group=torch.arange(64) // 4)
    tk.logp, tk.rollout_logp = own[:, None], said[:, None]
    assert torch.allclose(m.weight(tk, own[:, None], {})[:, 0], mass)
    # E over behaviour of Z f(y) = E over π, where f is 0 on what was dropped
    f = torch.randn(64, 9, generator=g, dtype=F64)
    behaviour = logp.exp() * kept / mass[:, None]
    assert torch.allclose((behaviour * mass[:, None] * f).sum(-1), (logp.exp() * kept * f).sum(-1))
    m.progress = Progress(stops=())
    m.share = 1e-9
    assert torch.equal(m.sample(logits, 3, torch.arange(64), g)[0], logits.argmax(-1)), "none is kept"


# ----------------------------------------------------------------------------------------------------------
# 3.26, 3.28


@given(seeds, st.integers(1, 9), st.floats(0, 0.5), st.sampled_from(["topk", "argmax"]), st.floats(0.5, 2))
def test_eq_3_26_cuts_support_and_uniformity(seed, k, delta, empty, temperature):
    g = torch.Generator().manual_seed(seed)
    plain = 2 * torch.randn(6, 8, generator=g, dtype=F64)
    m = build("mixed_cuts", k=k, delta=delta, empty=empty)
    m.progress.temperature = temperature
    p = m.behaviour(plain / temperature, torch.arange(6))
    exploring = m.exploring(torch.arange(6))
    assert exploring.sum() == 3
    assert torch.allclose(p[~exploring], (plain / temperature).softmax(-1)[~exploring])
    for row in exploring.nonzero()[:, 0].tolist():
        probs = plain[row].softmax(-1)  # at temperature 1
        ranked = sorted(range(8), key=lambda v: -probs[v].item())[:k]
        inside = [v for v in ranked if probs[v] > delta] or (ranked if empty == "topk" else ranked[:1])
        want = torch.zeros(8, dtype=F64)
        want[inside] = 1 / len(inside)
        assert torch.allclose(p[row], want)


def test_eq_3_26_cuts_samples_what_it_says_and_leaves_the_rest_alone():
    m = build("mixed_cuts", delta=0.1)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    assert m.sample(logits, 4, torch.arange(4000), generator) is None, "warm-up"
    assert build("mixed_cuts", share=0).sample(logits, 9, torch.arange(4000), generator) is None
    ids, logp = m.sample(logits, 5, torch.arange(4000) % 2, generator)
    assert torch.allclose(logp[1::2].exp(), torch.tensor(1 / 3)), "uniform on S: what `correct` divides by"
    assert torch.allclose(logp[::2], logits[0].log_softmax(-1)[ids[::2]]), "the policy's own elsewhere"
    cuts = torch.bincount(ids[1::2], minlength=4) / 2000
    assert cuts[3] == 0 and (cuts[:3] - 1 / 3).abs().max() < 0.04
    usual = torch.bincount(ids[::2], minlength=4) / 2000
    assert (usual - logits[0].exp()).abs().max() < 0.04
    one, _ = m.sample(torch.tensor([[9.0, 0, 0, 0]]).expand(20, 4), 5, torch.ones(20), generator)
    assert (one == 0).all(), "one token in S: no choice"


def test_eq_3_26_correction_is_truncated_importance_sampling():
    _, tokens = make(23)
    tk = tokens()
    plan = plan_update(tk, build("mixed_cuts", correct=True))
    want = (tk.logp - tk.rollout_logp).exp().clamp(max=2).detach()
    assert torch.allclose(plan.weight[tk.mask], want[tk.mask])
    assert "behaviour_ratio" in plan.metrics
    with pytest.raises(ValueError, match="rollout_logp"):
        plan_update(replace(tk, rollout_logp=None), build("mixed_cuts", correct=True))
    twice = replace(tk, mismatch=want)
    policy_loss(twice, build("mixed_cuts"))
    for name in ("mixed_cuts", "opefo+mixed_cuts"):
        with pytest.raises(ValueError, match=r"mixed_cuts: correct=true and Tokens.mismatch"):
            policy_loss(twice, build(name, correct=True))


@given(seeds, st.floats(0.0, 1))
def test_eq_3_28_proxy_is_the_filtered_renormalised_policy(seed, threshold):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(5, 9, generator=g, dtype=F64)
    p = logits.softmax(-1)
    kept = torch.where(p >= threshold * p.amax(-1, keepdim=True) * (1 - 1e-12), p, 0)
    want = (kept / kept.sum(-1, keepdim=True)).log()
    got = torch.stack([iv.proxy_log_prob(logits, torch.full((5,), v), threshold) for v in range(9)], -1)
    assert torch.allclose(got.exp(), want.exp(), atol=1e-10)
    assert (got == -math.inf).equal(kept == 0)


@given(seeds, st.floats(0.05, 1))
def test_eq_3_28_lp_reg_pushes_surviving_rare_negative_tokens_up(seed, fraction):
    logits, tokens = make(seed, B=40)
    tk = tokens()
    tk = replace(tk, proxy_logp=iv.proxy_log_prob(logits, tk.ids, 0.05))
    method = build("lp_reg", fraction=fraction)
    plan = plan_update(tk, method)
    negative = tk.mask & (plan.adv < 0)
    k = int(fraction * int(negative.sum()))
    picked = plan.marks["picked"]
    if k <= 1:
        assert not picked.any()
        return
    rare = tk.logp.detach() <= tk.logp.detach()[negative].sort().values[k - 1]
    filtered = tk.proxy_logp == -math.inf
    assert torch.equal(picked, negative & rare & (tk.logp.detach() < tk.proxy_logp))
    assert not (picked & filtered).any()
    assert torch.equal(picked, negative & rare & ~filtered) or (tk.proxy_logp == tk.logp).any()
    push = _force(tk, method, None) - _force(tk, build("lp_reg", beta=0, fraction=fraction), None)
    S = (tk.logp.detach() - tk.proxy_logp).exp()  # kept mass: q = p / S
    assert torch.allclose(push[picked], (1 / S - 1)[picked], atol=1e-6) and (push[picked] >= 0).all()
    assert (push[~picked].abs() < 1e-12).all()


def test_eq_3_28_one_token_is_too_few():
    _, tokens = make(30, B=40)
    tk = tokens()
    n = int((tk.mask & (plan_update(tk, Method()).adv < 0)).sum())
    every = replace(tk, proxy_logp=tk.logp.detach() + 0.1)
    assert plan_update(every, build("lp_reg", fraction=1.5 / n)).metrics["selected"] == 0
    assert plan_update(every, build("lp_reg", fraction=2.5 / n)).metrics["selected"] == 2


def _taught(seed, off=False):
    """A batch whose every response of a right group has a teacher; where that counts; the student."""
    _, tokens = make(seed, off=off)
    tk = replace(tokens(), teacher_logp=tokens().ref_logp)
    return tk, tk.mask & tk.correct[:, None], (tk.old_logp if off else tk.logp).detach()


@given(seeds, st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_eq_3_41_rlrt_factor_is_within_lam_e_of_one_and_wrong_responses_keep_theirs(seed, lam, e, off):
    tk, right, _ = _taught(seed, off)
    plan = plan_update(tk, build("rlrt", lam=lam, e=e))
    assert (plan.weight[tk.mask & ~right] == 1).all()
    assert ((plan.weight[right] - 1).abs() <= lam * e + 1e-12).all() and (plan.weight >= 0).all()


@given(seeds, st.booleans())
def test_eq_3_41_rlrt_mirrors_in_the_log_and_ignores_an_equal_or_absent_teacher(seed, off):
    tk, right, student = _taught(seed, off)
    mirrored = replace(tk, teacher_logp=2 * student - tk.teacher_logp)  # D -> -D
    here, there = (plan_update(x, build("rlrt", lam=1, e=1e9)) for x in (tk, mirrored))
    assert torch.allclose((here.weight * there.weight)[right], torch.ones((), dtype=F64))
    contrast = right & (here.adv != 0)
    want = (student - tk.teacher_logp).exp()  # A > 0 wherever R = 1: the sign is decoration
    assert (here.adv[right] >= 0).all() and torch.allclose(here.weight[contrast], want[contrast])
    for teacher in (student, torch.full_like(student, -math.inf)):
        plan = plan_update(replace(tk, teacher_logp=teacher), build("rlrt", e=0.7))
        assert (plan.weight[tk.mask] == 1).all() and plan.metrics["tokens_touched"] == 0


def test_eq_3_41_rlrt_by_hand():
    """Half of the way to e^D in [1 - .6, 1 + .6]: student .4, teacher .5, .1, .9; a wrong response; and one
    with a negative advantage, where the factor is turned over."""
    teacher = torch.tensor([[0.5, 0.1, 0.9]], dtype=F64).log().expand(3, 3)
    tk = Tokens(torch.zeros(3, 3, dtype=torch.long), torch.ones(3, 3, dtype=torch.bool))
    tk = replace(tk, logp=torch.full((3, 3), 0.4, dtype=F64).log(), teacher_logp=teacher)
    tk = replace(tk, reward=torch.tensor([1.0, 0, 1], dtype=F64), group=torch.zeros(3, dtype=torch.long))
    tk.adv = torch.tensor([[1.0], [-1], [-1]], dtype=F64).expand(3, 3)
    weight = plan_update(tk, build("rlrt", lam=0.5, e=0.6)).weight
    want = [[0.9, 1.3, 0.5 + 0.5 * 4 / 9], [1, 1, 1], [0.5 + 0.5 * 5 / 4, 0.7, 1.3]]
    assert torch.allclose(weight, torch.tensor(want, dtype=F64))


def test_eq_3_41_the_other_right_response_is_drawn_evenly_among_those_that_fit():
    """Prompts of one and two tokens; 0, 1, 2, 3 and 5, 6 are right, 3 is long, 7 is right and alone."""
    start = torch.tensor([0, 0, 0, 0, 0, 1, 1, 0])
    length = torch.tensor([1, 2, 1, 6, 1, 1, 2, 1])
    full = 10 * torch.arange(8)[:, None] + torch.arange(8)
    ids = full.gather(1, (start[:, None] + 1 + torch.arange(6)).clamp(max=7))
    tk = Tokens(ids, torch.arange(6) < length[:, None], full_ids=full, start=start)
    tk.group, tk.correct = torch.tensor([4, 4, 4, 4, 4, 7, 7, 8]), torch.arange(8) != 4
    tk.reward = tk.correct.float()
    chance, drawn = torch.Generator().manual_seed(0), {}
    for _ in range(600):
        rows, asked = iv.asked_again(tk, chance, room=9)  # 3 has 7 tokens, only with 0 and 2 that makes 9
        assert rows.tolist() == [0, 1, 2, 3, 5, 6] and torch.equal(asked.ids, tk.ids[rows])
        for i, text, first in zip(rows.tolist(), asked.full_ids.tolist(), asked.start.tolist(), strict=True):
            j = text[0] // 10
            read, own = (full[k, : start[k] + 1 + length[k]].tolist() for k in (j, i))
            assert text[: first + 1 + length[i]] == read + own and first == len(read) + start[i]
            drawn[i, j] = drawn.get((i, j), 0) + 1
    pairs = {0: (1, 2, 3), 1: (0, 2), 2: (0, 1, 3), 3: (0, 2), 5: (6,), 6: (5,)}
    assert set(drawn) == {(i, j) for i, others in pairs.items() for j in others}
    assert all(abs(n - 600 / len(pairs[i])) < 60 for (i, _), n in drawn.items())  # 5 standard deviations
    assert len(iv.asked_again(tk.rows(slice(4, 5)), chance)[0]) == 0


# ----------------------------------------------------------------------------------------------------------
# Names, hyperparameters, composition


def test_words_become_values():
    m = build("clip_cov", ratio=".02", dual_clip="none", anneal="true")
    assert (m.ratio, m.dual_clip, m.anneal) == (0.02, None, True)
    assert build("opefo", sides="plus").sides == "plus" and build("mixed_cuts", k="7").k == 7
    assert build("dr_grpo", norm="100").norm == 100.0 and build("opefo", lam="0").lam == 0.0


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("opefoo", {}, ["opefoo", "opefo?"]),
        ("", {}, ["''"]),
        ("clip_cov", {"raito": 1}, ["raito", "ratio?"]),
        ("clip_cov", {"ratio": "many"}, ["clip_cov", "ratio", "'many'", "number"]),
        ("clip_cov", {"ratio": "nan"}, ["ratio", "nan"]),
        ("clip_cov", {"ratio": 2}, ["ratio=2", "from 0 to 1"]),
        ("clip_cov", {"anneal": "perhaps"}, ["anneal", "true or false"]),
        ("opefo", {"gain": True}, ["gain=True", "number"]),
        ("grpo", {"aggregation": "mean"}, ["aggregation='mean'", "token_mean"]),
        ("mixed_cuts", {"k": "2.5"}, ["k='2.5'", "whole number"]),
        ("par", {"lam": "none"}, ["lam='none'", "number"]),
        ("kl_cov", {"eps_low": 0.1}, ["kl_cov", "eps_low"]),
        ("adaptive_entropy", {"c_min": 1, "c_max": 0}, ["c_min=1", "c_max=0"]),
        ("opefo", {"integral": 0.5}, ["integral=0.5", "target_entropy=None", "give a target_entropy"]),
        ("opefo", {"integral": 0.5, "target_entropy": 1, "gain": 0}, ["integral=0.5", "gain=0"]),
        ("entropic", {"target": -1}, ["target=-1"]),
        ("dapo", {"overlong_max": 10}, ["overlong_cache=4096", "overlong_max=10", "overlong=false"]),
        ("grpo", {"dual_clip": 1}, ["dual_clip=1"]),
    ],
)
def test_bad_values_are_named_with_a_remedy(name, options, words):
    with pytest.raises(ValueError) as error:
        build(name, **options)
    assert all(w in str(error.value) for w in words), str(error.value)
    assert "\n" not in str(error.value)


def test_parse_reads_a_command_line_word():
    assert iv.parse("opefo+clip_higher:form=exact,eps_high=.28") == (
        "opefo+clip_higher",
        {"form": "exact", "eps_high": ".28"},
    )
    assert iv.parse("grpo") == ("grpo", {})
    for bad in ("opefo:form", "opefo:=3", "opefo:a=1,a=2"):
        with pytest.raises(ValueError):
            iv.parse(bad)


def test_composition_multiplies_weights_and_balances_the_real_flow():
    _, tokens = make(24, off=True)
    tk = tokens()
    for name, options in (
        ("opefo+clip_higher", {}),
        ("opefo+par", {"par.lam": 0.5, "schedule": "constant"}),
        ("cispo+opefo", {}),
        ("opefo+gspo", {"eps_low": 0.1, "eps_high": 0.1}),
        ("opefo+kl_cov", {"beta": 0}),
        ("opefo+high_entropy_tokens", {"rho": 0.5}),
    ):
        method = build(name, **options)
        force = _force(tk, method, None)
        flow = torch.where(tk.mask, force * -entropy_change(tk.stats, -1.0, "exact"), 0)
        assert abs(flow.sum()) < 1e-6 * flow.abs().sum(), name
    steered = build("steer+par", schedule="constant", lam=0.5)
    weight = plan_update(tk, steered).weight
    half = torch.where(plan_update(tk, Method()).adv > 0, 0.5, 1.0)
    assert torch.allclose(weight, plan_update(tk, build("steer")).weight * torch.where(tk.mask, half, 0))


def test_composition_selects_by_all_adds_penalties_and_shares_the_clip():
    logits, tokens = make(25, off=True)
    tk = tokens()
    both = build("dapo+psr")
    assert torch.equal(both.select(tk), build("dapo").select(tk) & tk.correct) and both.refill
    assert both.eps_high == 0.28 and all(m.eps_high == 0.28 for m in both.members)
    assert build("dapo+psr", eps_high=0.5).members[1].eps_high == 0.5
    zero = replace(tk, adv=torch.zeros_like(tk.logp).detach())
    parts = [gradient(logits, zero, build(n)) for n in ("entropy_bonus", "ref_kl", "entropy_bonus+ref_kl")]
    assert close(parts[2], parts[0] + parts[1])
    metrics = plan_update(tk, build("opefo+par", **{"par.lam": 0.3})).metrics
    assert {metrics["lam"], metrics["opefo.lam"]} > {0.3} and metrics["lam"] == 0.3
    combined = build("ref_kl+opefo")
    assert (
        set(combined.needs) == {"logp", "ref_logp", "entropy", "p2", "p2logp"}
        and combined.entropy_grad is False
    )
    assert build("clip_higher+cw_grpo").on_policy
    assert build("dapo+entropy_bonus").entropy_grad
    assert combined.overrides("penalty") and not combined.overrides("sample")  # vLLM may sample for it
    assert build("mixed_cuts+opefo").overrides("sample")


@pytest.mark.parametrize("name", ["dr_grpo+clip_cov", "clip_cov+dr_grpo"])
def test_composition_takes_the_constant_length_of_the_member_that_has_one(name):
    method = build(name, norm=100)
    method.progress = Progress(max_length=64)
    assert method.loss_norm == 100
    plain = build("opefo+clip_cov", aggregation="seq_sum_norm")
    plain.progress = Progress(max_length=64)
    assert plain.loss_norm == 64


def test_composition_gives_its_denominator_to_the_members():
    """dr_grpo's 100 also divides entropic's term; opefo outside a loop has no length of its own."""
    logits, tokens = make(35)
    tk = tokens()
    both = build("entropic+dr_grpo", norm=100, target=1.5, ki=0, threshold=0.5, denominator="all")
    both.progress = Progress(max_length=8)
    plan = plan_update(tk, both)
    confident = tk.mask & (tk.logp.exp() > 0.5)
    w = 1 + torch.where(confident, plan.metrics["alpha"] * plan.adv.sign(), 0)
    want = gradient(logits, replace(tk, adv=(w * plan.adv).detach()), build("dr_grpo", norm=100))
    assert close(gradient(logits, tk, both), want, 1e-6)
    assert abs(plan_update(tk, build("opefo+dr_grpo", norm=100)).metrics["lam"]) < 1


def test_eq_3_22_gspo_ratio_is_of_the_whole_response_also_where_tokens_are_dropped():
    logits, tokens = make(36, off=True, low=3)
    tk = tokens()
    options = {"eps_low": 9.0, "eps_high": 9.0, "rho": 0.5}
    kept = plan_update(tk, build("high_entropy_tokens", rho=0.5)).coef > 0
    s = (torch.where(tk.mask, tk.logp - tk.old_logp, 0).sum(-1) / tk.mask.sum(-1)).exp()
    method = build("high_entropy_tokens+gspo", **options)
    narrowed = replace(tk.detach(), mask=kept, response=tk.mask)
    assert torch.allclose(method.factor(narrowed, torch.ones_like(tk.logp)), s[:, None].expand(24, 6))
    force = _force(tk, build("opefo+high_entropy_tokens+gspo", **options), None)
    flow = torch.where(tk.mask, force * entropy_change(tk.stats, 1.0, "exact"), 0)
    assert flow.abs().sum() > 0 and abs(flow.sum()) < 1e-6 * flow.abs().sum(), (
        "what opefo balanced is what acts"
    )


def test_a_value_that_was_given_counts_also_where_it_is_the_default():
    for name in ("grpo+clip_higher", "clip_higher+opefo"):
        with pytest.raises(ValueError, match="conflicting eps_high"):
            build(name, **{name.replace("clip_higher", "").strip("+") + ".eps_high": "0.2"})
        assert build(name, eps_high="0.2").eps_high == 0.2 and build(name).eps_high == 0.28


@pytest.mark.parametrize(
    "key, options", [("psr", {}), ("nsr", {}), ("w_reinforce", {}), ("entrocraft", {"variant": "released"})]
)
def test_eq_3_11_and_3_17_methods_of_raw_rewards_name_the_field_that_is_missing(key, options):
    _, tokens = make(37)
    tk = replace(tokens(), reward=None, correct=None, adv=torch.ones(24, 6, dtype=F64))
    with pytest.raises(ValueError, match=rf"{key} needs Tokens.reward"):
        plan_update(tk, build(key, **options))


@every_method
def test_composition_with_grpo_changes_nothing(key):
    if key != "grpo":
        logits, tokens = make(26, off=True)
        pair = build(f"grpo+{key}", **ACTIVE.get(key, {}))
        assert close(
            gradient(logits, tokens(), pair), gradient(logits, tokens(), build(key, **ACTIVE.get(key, {})))
        )


@pytest.mark.parametrize(
    "name, reason",
    [
        ("kl_cov+clip_higher", "does not use"),
        ("psr+nsr", "advantage"),
        ("dr_grpo+qae", "advantage"),
        ("gspo+cispo", "surrogate"),
        ("ref_kl+prorl", "contains"),
        ("entropy_bonus+adaptive_entropy", "same entropy term"),
        ("nsr+par", "no positive"),
        ("rlrt+nsr", "no positive"),
        ("psr+clip_cov", "covariance"),
        ("opefo+opefo", "twice"),
        ("cispo+clip_higher", "eps_high"),
        ("par+cw_grpo:form=released", "form=paper"),
    ],
)
def test_senseless_compositions_are_refused_with_the_reason(name, reason):
    with pytest.raises(ValueError, match=reason):
        build(name)
    assert build("par+cw_grpo") and build("mixed_cuts+cw_grpo:form=released")


def test_ambiguous_hyperparameters_are_refused_and_can_be_addressed():
    with pytest.raises(ValueError, match="opefo.lam|par.lam"):
        build("opefo+par", lam=0.5)
    method = build("opefo+par", **{"par.lam": "0.5"})
    assert {m.key: m.lam for m in method.members} == {"opefo": None, "par": 0.5}


@every_method
@both_policies
def test_the_fields_that_a_method_names_are_all_that_it_reads(key, off):
    logits, tokens = make(38, off=off)
    tk = tokens()
    for method in (active(key), build(key)):
        named = {*method.needs, "ids", "mask", "reward", "correct", "group", "logp", "old_logp"}
        bare = Tokens(**{k: v if k in named else None for k, v in vars(tk).items()})
        assert close(gradient(logits, bare, method), gradient(logits, tk, method))


# ----------------------------------------------------------------------------------------------------------
# The demonstration


def test_demonstration_measures_the_real_entropy_change(tmp_path, capsys):
    """Predicted change of every method against the measured one: a small step on the logits of the very
    loss."""
    logits, tokens = make(28, B=32)
    tk = tokens()
    for key in METHODS:
        method = active(key)
        predicted = iv.effect(method, tk.detach(), logits)[1].sum().item()
        step = -1e-4 * gradient(logits, tokens(), method)

        def total(z):
            q = z.log_softmax(-1)
            return -(q.exp() * q).sum(-1)[tk.mask].sum().item()

        with torch.no_grad():
            measured = (total(logits + step) - total(logits - step)) / 2e-4
        assert predicted == pytest.approx(measured, rel=1e-4, abs=1e-8), key
    iv.show_batch(tk.detach(), logits, str(tmp_path / "figure.png"))
    text = capsys.readouterr().out
    assert all(key in text for key in METHODS)
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_building_a_method_needs_torch_alone():
    """In verl's own environment this repository is installed without its dependencies."""
    extra = "{'tyro', 'docstring_parser', 'pandas', 'matplotlib', 'transformers'}"
    code = (
        "import sys; b = set(sys.modules); import torch; t = set(sys.modules) - b; import interventions as i;"
    )
    code += f"i.build('opefo+dapo', lam='0'); assert not {extra} & (set(sys.modules) - t)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(iv.__file__).parent, check=True)
