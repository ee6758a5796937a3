"""Chapter 1. How one gradient step changes the entropy of a softmax policy.

Claim: entropy collapse is arithmetic. A policy-gradient step on one sampled token changes the entropy by a
known amount (2.2). To first order it lowers entropy exactly when the token is likely enough and rewarded, or
unlikely and punished, and learning mostly rewards what the policy already does. Every formula with which a
paper predicts this change stands here beside the exact one, with what it drops and how far off it is.

    python entropy_math.py       measures that in half a minute; results/honesty.py measures it in training

    1  a softmax's entropy, its gradient, curvature  5  the ledger: a network's own entropy change
    2  one step on one sampled token                 6  the set point: why balance drifts, what feedback adds
    3  the estimators of the papers                  7  the law R = -a e^H + b
    4  the four statistics in one pass, in chunks    8  the demonstration: how far each theory carries

    z (V,)  logits            p = softmax(z)           u = log p + H   so that E_p[u] = 0
    H = -Σ p log p, in nats   y  sampled token         A  advantage    η  learning rate ("per unit η": dH/η)
    p2 = Σ p²                 p2logp = Σ p² log p      C = p2logp + H p2 = Cov_p(p, log p)
    e_y     one-hot vector    "on a table": each state has logits of its own, no parameters are shared

Left out: where advantages come from (chapter 2), and which states are visited: a state's own distribution is
followed, not the drift of the trajectories.
Sources, by arXiv id: 2505.22617 (covariance, law), 2510.10150 (STEER), 2605.11491 (OPEFO), 2602.03392 (S*),
2605.11775 (the two parts of 2.4). "Measured" means measured by us, in results/honesty.txt.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------
# 1. A softmax's entropy, its gradient and curvature


def entropy(logits: Tensor) -> Tensor:
    """H = -Σ p log p of p = softmax(logits), in nats (1.1): (..., V) -> (...). -inf logits add nothing."""
    logq = _finite(torch.log_softmax(logits, dim=-1))  # (..., V)
    return -(logq.exp() * logq).sum(-1)


def entropy_gradient(logits: Tensor) -> Tensor:
    """∂H/∂z_a = -p_a u_a: (..., V) -> (..., V), nats per unit of logit.

    ∂p_v/∂z_a = p_v (1[v=a] - p_a), and Σ_v p_v ∂log p_v/∂z_a = 0, since probabilities keep their sum. Hence
        ∂H/∂z_a = -Σ_v (∂p_v/∂z_a) log p_v = -p_a (log p_a + H) = -p_a u_a                               (1.2)
    """
    logq = _finite(torch.log_softmax(logits, dim=-1))  # (..., V)
    return -logq.exp() * (logq + entropy(logits).unsqueeze(-1))


def first_order_change(logits: Tensor, dz: Tensor) -> Tensor:
    """First-order dH of any logit step dz: (..., V), (..., V) -> (...), nats. Lemma 1 of 2505.22617.

    Sum (1.2) over the step; E_p[u] = 0 makes it a covariance:
        dH = -Σ_a p_a u_a dz_a = -Cov_{a~p}(log p_a, dz_a)                                               (1.3)
    Raising logits that are high already sharpens the policy. That is the whole mechanism of collapse.
    """
    return (entropy_gradient(logits) * dz).sum(-1)


def second_order_change(logits: Tensor, dz: Tensor) -> Tensor:
    """½ dzᵀ ∇²H dz, what (1.3) leaves out: (..., V), (..., V) -> (...), nats.

    Differentiate (1.3) along d = dz, with dp_v = p_v (d_v - E[d]) and du_v = d_v - E[d] - E[u d]:
        dᵀ (∇²H) d = -E[(1 + u) d²] + 2 E[u d] E[d] + E[d]²             (expectations under p)           (1.4)
    For d = η A (e_y - p), averaged over y ~ p and over the policies of a family, it is negative in all five
    families of section 8 with V <= 1000 (-.06 (ηA)² for Gaussian logits, -.02 for very peaked ones): steps
    whose first order cancels cost entropy on average. Policies differ: it is negative for all flat ones, 85 %
    of the Gaussian ones with V = 1000, 60 % of the peaked and 38 % of the very peaked. It matters for large
    steps: at a logit step of size 1 the first order alone correlates .82 to .97 with the truth, with a
    relative RMS error of .33 to .73 (all measured).
    """
    logq = _finite(torch.log_softmax(logits, dim=-1))
    p, u = logq.exp(), logq + entropy(logits).unsqueeze(-1)  # (..., V) each
    mean, skew = (p * dz).sum(-1), (p * u * dz).sum(-1)  # E[d], E[u d]
    return 0.5 * (-(p * (1 + u) * dz**2).sum(-1) + 2 * skew * mean + mean**2)  # (1.4)


def expected_change(logits: Tensor, adv: Tensor, natural: bool = False) -> Tensor:
    """dH per unit η of the *expected* step, action a having advantage adv[a]: (..., V), (..., V) -> (...).

        policy gradient   dz = η p (A - E_p[A]):   dH/η = -Cov(log p, p (A - E_p[A])) = Σ_y p_y A_y T_y  (1.5)
        natural gradient  dz = η A, without p:     dH/η = -Cov(log p, A), the same for A + const         (1.6)
    The first is (2.1) below, a step on each token y, averaged over y ~ p: Σ_y p_y A_y (e_y - p). These are
    Theorems 1 and 2 of 2505.22617. The first presupposes E_p[A] = 0; the baseline is subtracted
    here, so any A will do. Both say: entropy falls when the likely actions are the good ones.
    """
    p = torch.softmax(logits, dim=-1)
    centred = adv - (p * adv).sum(-1, keepdim=True)  # (..., V)
    return first_order_change(logits, centred if natural else p * centred)


def _finite(logq: Tensor) -> Tensor:
    """-inf becomes -1e4, where exp is 0 in any precision: p log p is 0 and not NaN, and so are gradients."""
    return logq.clamp(min=-1e4)


# ------------------------------------------------------------------------------------------------------------
# 2. One step on one sampled token


def exact_score(stats: TokenStats) -> Tensor:
    """T, a sampled token's exact first-order dH per unit η and unit advantage: (...), nats, detached.

    Gradient descent on the loss -A log p_y moves the logits by
        dz = η A (e_y - p)                                                                               (2.1)
    In (1.3) the e_y part gives -p_y u_y and the -p part gives +Σ p² u = p2logp + H p2 = C, hence
        dH = η A T_y + O(η²),         T_y = C - p_y u_y                                                  (2.2)
        C  = Cov_{v~p}(p_v, log p_v) >= 0,   zero only for a policy that is uniform on its support       (2.3)
             since log p rises with p: C = ½ E_{v,w~p}[(p_v - p_w)(log p_v - log p_w)]
       -T_y = p_y (1 - p_y) u_y - Σ_{k≠y} p_k² u_k     own logit, and the push on all the others         (2.4)
    Consequences:
        E_{y~p}[T_y] = 0: at constant advantage nothing happens on average; only its variation counts    (2.5)
        T_y < 0 iff p_y u_y > C. Quadrants: rewarding a likely or punishing an unlikely token lowers H, the
        other two raise it. p_y < e^-H is unlikely; so is 0 < p_y u_y < C, a little above that           (2.6)
        samples at one state add up; if their advantages cancel, as in a GRPO group's first token, so
        does C: Σ_i A_i T_i = -Σ_i A_i p_i u_i                                                           (2.7)
        off-policy the clipped surrogate's slope I_clip r A replaces A, r = π/π_old: `grpo.clip_factor`  (2.8)
        p = softmax(z/τ), step on z: dH = η A T/τ², 1/τ from the gradient and 1/τ from its effect        (2.9)
    A token of probability 0 has T = C. In float32 T's absolute error is about 5e-7 at V = 1000 and in the
    chunked head, up to 2e-4 (log p: 1e-4) where the plain form sums 151,936 terms at once and the policy is
    peaked. |T| of .01 to 1 matters.
    """
    s = stats.detach()
    logp = _finite(s.logp)
    return s.p2logp + s.entropy * s.p2 - logp.exp() * (logp + s.entropy)  # (2.2)


# ------------------------------------------------------------------------------------------------------------
# 3. The estimators of the papers

FORMS: dict[str, Callable[[TokenStats], Tensor]] = {  # form -> b of (3.2)
    "exact": lambda s: -exact_score(s),
    "s_star": lambda s: s.logp.exp() * (s.logp + s.entropy),
    "steer_theorem": lambda s: s.logp.exp() * -torch.expm1(s.logp) * (s.logp + s.entropy),
    "steer_released": lambda s: -torch.expm1(s.logp) * (s.logp + s.entropy),
    "opefo": lambda s: torch.expm1(s.logp) ** 2 * (s.logp + s.entropy),
    "cov": lambda s: s.logp + s.entropy,
}


def entropy_change(stats: TokenStats, adv: Tensor | float, form: str = "exact") -> Tensor:
    """Predicted dH per unit learning rate of a step on each token: (...), nats, detached; `adv` broadcasts.

        dH/η = -A b                                                                                      (3.2)
      form            b            drops                          confident (p->1)  rare (p->0)     E_p[b]
      exact           p u - C      nothing                        right             right (-> -C)   0
      s_star          p u          the push -ηAp on all logits    far too large     vanishes        C
      steer_theorem   p (1-p) u    the others' part of (2.4)      right within 2    vanishes        C - D
      steer_released  (1-p) u      the same, and one factor p     right within 2    unbounded       -C
      opefo           (1-p)² u     the same, ∂p/∂z off-diagonal   vanishes          unbounded       D - 2C
      cov             u            all but the sign               far too large     unbounded       0
    D = Σ p³ u >= 0. Over the exact b, "far too large" is 1/(κ(1-p)), "vanishes" is p|u|/C (rare) or
    (1-p)/(κp) (opefo, confident), "unbounded" |u|/C. κ = exact/(p (1-p) u) is 1 (rest spread) to 2 (V = 2).

    Sign rule: from s_star to cov, b has the sign of u. They err only where 0 < p u < C, a little above p =
    e^-H, and in one direction: for A > 0 there H really rises, and they say that it falls.              (3.3)
    Bias at constant A > 0, where the truth is 0 by (2.5), is -E_p[b]: s_star sees H fall, steer_released and
    opefo see it rise. Their papers' sums run over the vocabulary without weight p, as if every action were
    updated once; a *sampled* token already arrives with frequency p, so its score must keep a p.        (3.4)

    Sources: s_star 2602.03392; steer_theorem 2510.10150 App. G, steer_released its code (on-policy); opefo
    2605.11491 Eq. 6 at the sampled token; cov 2505.22617, per token. Off-policy, with I_clip r A of (2.8) for
    A, steer_theorem is STEER's product of four factors: clip, advantage, probability, entropy. Raises
    ValueError on an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown; choose one of {', '.join(FORMS)}")
    s = stats.detach()
    s.logp = _finite(s.logp)
    return -adv * FORMS[form](s)  # (3.2)


# ------------------------------------------------------------------------------------------------------------
# 4. The four statistics in one pass, in chunks


@dataclass
class TokenStats:
    """Four statistics of a token's distribution, each of the shape of the token ids. Natural logarithms."""

    logp: Tensor
    """log π(y), with gradient"""
    entropy: Tensor
    """H(π) over the whole vocabulary, with gradient only if asked for"""
    p2: Tensor
    """Σ π², without gradient"""
    p2logp: Tensor
    """Σ π² log π, without gradient"""

    def map(self, f: Callable[[Tensor], Tensor]) -> TokenStats:
        """Apply f to all four fields; what is None stays so."""
        return TokenStats(*(None if v is None else f(v) for v in vars(self).values()))

    def detach(self) -> TokenStats:
        """The same numbers without a graph."""
        return self.map(Tensor.detach)


def token_stats(
    logits: Tensor, ids: Tensor, temperature: float = 1.0, entropy_grad: bool = True
) -> TokenStats:
    """The statistics of softmax(logits/temperature) at `ids`: (..., V), (...) -> fields of shape (...).

    float64 stays float64; anything smaller is computed in float32, because bf16 would round entropy changes
    away. Logits may be as large as 1e4, or -inf (masked); a row of -inf alone gives NaN. `torch.func.jvp` and
    second derivatives work. The entropy has a graph by default, since all logits are in memory anyway. Raises
    ValueError on a wrong shape, an id outside the vocabulary, or a temperature that is not positive.
    """
    ids = _checked(ids, logits.shape[:-1], logits.shape[-1], temperature)
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logq = torch.log_softmax(x if temperature == 1 else x / temperature, dim=-1)  # (..., V)
    logp = logq.gather(-1, ids.unsqueeze(-1)).squeeze(-1)  # (...)
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_grad):
        finite = _finite(logq if entropy_grad else logq.detach())
        p = finite.exp()
        ent = -(p * finite).sum(-1)  # (1.1)
    p_squared, finite = p.detach().square(), finite.detach()
    return TokenStats(logp, ent, p_squared.sum(-1), (p_squared * finite).sum(-1))


def head_token_stats(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    chunk: int | None = 0,
    entropy_grad: bool = False,
) -> TokenStats:
    """`token_stats(hidden @ weight.T + bias, ids)`, never with more than `chunk` logits, forward or backward.

    hidden (..., D), weight (V, D), ids (...), bias (V,) -> fields of shape (...), and the plain form's
    gradients to hidden, weight and bias. `chunk` counts logits of 4 bytes; a block has at least 128 columns.
    0 means 2²² on a CPU and 2²⁶ on a GPU, which small products leave idle.
    At V = 151,936 a batch's logits are the largest tensor of a training step. So walk over the vocabulary in
    blocks of columns x, and keep for each token
        m = max x,  s₀ = Σ e^(x-m),  s₁ = Σ e^(x-m) (x-m),  q₀ = Σ e^2(x-m),  q₁ = Σ e^2(x-m) (x-m)      (4.1)
    When a block raises the maximum by d, all earlier x-m fall by d:
        s₁ <- e^-d (s₁ - d s₀),   s₀ <- e^-d s₀,   q₁ <- e^-2d (q₁ - d q₀),   q₀ <- e^-2d q₀             (4.2)
    At the end, with L = log s₀ (within each sum the terms have one sign, so nothing cancels):
        logp = x_y - m - L,   H = L - s₁/s₀,   p2 = q₀/s₀²,   p2logp = (q₁ - L q₀)/s₀²                   (4.3)
    The backward pass computes each block again: with upstream gradients g of logp and h of H, by (1.2),
        ∂/∂x_v = g (1[v=y] - p_v) - h p_v (log p_v + H)                                                  (4.4)
    That is a fourth product with the head beside the usual three, but no gigabytes of logits have to be
    moved: at 4,096 tokens and D = 896 on a CPU about .7 of the plain form's time in float32, .4 in bf16, with
    less than 1/20 of its extra memory (results/bench_token_stats.txt). A GPU moves gigabytes fast: there 1.2
    times the plain form's time in bf16, 1.35 in float32, with 1/13 of its memory; in blocks of 2²² logits 5
    and 1.7 times (an H200, results/gpu_day.txt). The plain form is used if all fits in one chunk, for float16
    (the blocks of (4.4) leave its range, which ends at 65,504), and for chunk=None. Choose that under
    `torch.func.jvp` and for second derivatives, which raise RuntimeError in the chunked form.
    entropy_grad=True costs another pass over every block. Under autocast the products run in its dtype.
    Raises ValueError as `token_stats` does.
    """
    ids = _checked(ids, hidden.shape[:-1], weight.shape[0], temperature)
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else torch.promote_types(hidden.dtype, weight.dtype)
    chunk = (2**22 if device == "cpu" else 2**26) if chunk == 0 else chunk
    if chunk is None or ids.numel() * weight.shape[0] <= chunk or dtype == torch.float16:
        return token_stats(torch.nn.functional.linear(hidden, weight, bias), ids, temperature, entropy_grad)
    flat = hidden.reshape(-1, hidden.shape[-1]).to(dtype)  # (N, D)
    with torch.autocast(device, enabled=False):
        options = (temperature, chunk, entropy_grad)
        four = _HeadStats.apply(flat, weight.to(dtype), bias, ids.reshape(-1), *options)
    return TokenStats(*four).map(lambda t: t.reshape(ids.shape))


class _HeadStats(torch.autograd.Function):
    """(4.1) to (4.4) over blocks of the vocabulary, on flat arguments: (N, D), (V, D), (V,), (N,)."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, temperature, chunk, entropy_grad):
        acc = torch.promote_types(hidden.dtype, torch.float32)
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.chunk = temperature, chunk
        top = hidden.new_full(ids.shape, torch.finfo(acc).min, dtype=acc)  # m; finite, so that 0 * d stays 0
        s0, s1, q0, q1, x_y = (torch.zeros_like(top) for _ in range(5))
        for low, high, here, column in _blocks(ids, weight.shape[0], chunk):
            x = _block_logits(hidden, weight, bias, temperature, low, high)  # (N, v)
            x_y = torch.where(here, x.gather(1, column).squeeze(1), x_y)
            new = torch.maximum(top, x.amax(1))
            fall, top = new - top, new  # d of (4.2)
            shrink = torch.exp(-fall)
            e = x.sub_(top.unsqueeze(1)).exp()
            xe = (x if bias is None else x.clamp_(min=-1e4)).mul_(e)  # e^(x-m) (x-m); `_finite`, in place
            s1 = shrink * (s1 - fall * s0) + xe.sum(1)  # (4.2) and (4.1)
            q1 = shrink**2 * (q1 - fall * q0) + xe.mul_(e).sum(1)
            s0 = shrink * s0 + e.sum(1)
            q0 = shrink**2 * q0 + e.square_().sum(1)
        log_s = s0.log()
        logp, ent = (x_y - top) - log_s, log_s - s1 / s0  # (4.3)
        p2, p2logp = q0 / s0**2, (q1 - log_s * q0) / s0**2
        ctx.save_for_backward(hidden, weight, bias, ids, top, s0, s1 / s0)
        ctx.mark_non_differentiable(p2, p2logp, *(() if entropy_grad else (ent,)))
        return logp, ent, p2, p2logp

    @staticmethod
    def backward(ctx, g, h, _p2, _p2logp):
        if torch.is_grad_enabled():  # create_graph=True, which would silently lose the terms through p
            raise RuntimeError("the chunked head has no second derivative; pass chunk=None")
        if g is None and h is None:
            return (None,) * 7
        hidden, weight, bias, ids, top, s0, mean_x = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        d_hidden = hidden.new_zeros(hidden.shape, dtype=s0.dtype) if want_hidden else None
        d_weight = torch.empty_like(weight) if want_weight else None
        d_bias = torch.empty_like(bias) if want_bias else None
        g = torch.zeros_like(s0) if g is None else g  # None: nothing of the loss depends on it
        # Without h a row of (4.4) is `row` times e^(x-m) - s₀ 1[v=y]; the factor can act outside the blocks.
        row = -g / (s0 * ctx.temperature) if h is None else torch.ones_like(s0)
        right = (hidden * row.unsqueeze(1)).to(hidden.dtype) if h is None else hidden
        for low, high, here, column in _blocks(ids, weight.shape[0], ctx.chunk):
            x = _block_logits(hidden, weight, bias, ctx.temperature, low, high).sub_(top.unsqueeze(1))
            if h is not None:  # log p_v + H = (x-m) - s₁/s₀
                surprise = x.clamp(min=-1e4).sub_(mean_x.unsqueeze(1))
                factor = surprise.mul_(h.unsqueeze(1)).add_(g.unsqueeze(1))
                x = x.exp_().mul_(factor).mul_(-1 / (s0 * ctx.temperature).unsqueeze(1))
                hit = g / ctx.temperature
            else:  # the 1[v=y] joins p before rounding to bf16, or a confident token's 1 - p would drown
                x, hit = x.exp_(), -s0
            x.scatter_add_(1, column, torch.where(here, hit, 0.0).unsqueeze(1))
            if want_bias:
                d_bias[low:high] = (row @ x).to(bias.dtype)
            x = x.to(hidden.dtype)
            if want_hidden:
                d_hidden.add_(x @ weight[low:high])  # (N, D)
            if want_weight:
                torch.mm(x.T, right, out=d_weight[low:high])  # (v, D), written once: nothing to accumulate
        d_hidden = d_hidden.mul_(row.unsqueeze(1)).to(hidden.dtype) if want_hidden else None
        return d_hidden, d_weight, d_bias, None, None, None, None


def _block_logits(hidden, weight, bias, temperature: float, low: int, high: int) -> Tensor:
    """(N, high - low) logits of one vocabulary block over the temperature, in the accumulation dtype."""
    x = (hidden @ weight[low:high].T).to(torch.promote_types(hidden.dtype, torch.float32))
    if bias is not None:
        x.add_(bias[low:high])
    return x if temperature == 1 else x.div_(temperature)


def _blocks(ids: Tensor, vocab: int, chunk: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Per block: its columns low to high; which tokens lie in it, (N,); each token's column in it, (N, 1),
    some valid one for a token that lies elsewhere."""
    width = max(128, chunk // max(1, len(ids)))  # narrower products with the head would be slow
    for low in range(0, vocab, width):
        high = min(low + width, vocab)
        yield low, high, (ids >= low) & (ids < high), (ids - low).clamp(0, high - low - 1).unsqueeze(1)


def _checked(ids: Tensor, shape: torch.Size, vocab: int, temperature: float) -> Tensor:
    """`ids` as int64, after the checks that both forms promise."""
    if ids.shape != shape:
        raise ValueError(f"ids has shape {tuple(ids.shape)}; expected {tuple(shape)}, one per distribution")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive; greedy decoding is an argmax")
    # An accelerator would have to wait for this check; there a bad id fails in gather or gives a wrong logp.
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        span = f"[{int(ids.min())}, {int(ids.max())}]"
        raise ValueError(f"ids lie in {span}, outside the vocabulary of {vocab}; fill padding with 0")
    return ids.long()


# ------------------------------------------------------------------------------------------------------------
# 5. The ledger: a network's own entropy change


def entropy_directional_change(grads: Mapping | Iterable, deltas: Mapping | Iterable) -> float:
    """The ledger's prediction <∇H, Δθ> of tensors, in nats, accumulated in float64.

    In a network all tokens share parameters θ and the optimizer bends the step, so (2.2) is only a score:
    measured on a small transformer, it correlates .4 to .75 with the change of H at the token's own state and
    .4 to .65 with the token's effect on the batch's mean H (two runs each of SGD and AdamW). The exact
    first-order statement, for the mean entropy H(θ) of fixed states and the step Δθ really taken, with
    momentum and decay, is
        dH_predicted = <∇H(θ), Δθ>                                                                       (5.1)
    Pass both by name or both in the same order; None (no dependence) counts as 0. Raises ValueError if
    lengths or shapes differ, KeyError if a delta is missing.
    """
    if isinstance(grads, Mapping):
        grads, deltas = grads.values(), [deltas[name] for name in grads]
    total = 0.0
    for g, d in zip(grads, deltas, strict=True):
        if g is not None and d is not None:
            if g.shape != d.shape:
                raise ValueError(f"a gradient of shape {tuple(g.shape)} meets a delta of {tuple(d.shape)}")
            parts = zip(g.detach().flatten().split(2**20), d.detach().flatten().split(2**20))
            total += sum(float((a * b).sum(dtype=torch.float64)) for a, b in parts)  # in cache, not in memory
    return total


def adam_preconditioner(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """P of (5.2), per unit learning rate: parameter -> tensor of its shape, for all parameters it optimizes.

    Adam, AdamW: 1/(√v̂ + ε) from the state, so ask *after* the step in question; 0 where v is 0 (no gradient
    has come yet, and 1/ε would blow up rounding) and for parameters without state. SGD: 1. The factor of
    gradient clipping and the learning rates of parameter groups are left to the caller.
    Raises TypeError for another optimizer, ValueError if Adam has not stepped yet.
    """
    if not isinstance(optimizer, torch.optim.SGD | torch.optim.Adam | torch.optim.AdamW):
        raise TypeError(f"{type(optimizer).__name__} has no known preconditioner; use SGD, Adam or AdamW")
    adam, found = not isinstance(optimizer, torch.optim.SGD), {}
    if adam and not any("exp_avg_sq" in state for state in optimizer.state.values()):
        raise ValueError("the optimizer has no second moments yet; take the step first, then ask")
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            found[p] = torch.zeros_like(p) if adam else torch.ones_like(p)
            if "exp_avg_sq" in state:
                v = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
                v_hat = v / (1 - group["betas"][1] ** float(state["step"]))
                found[p] = torch.where(v > 0, 1 / (v_hat.sqrt() + group["eps"]), torch.zeros_like(v))
    return found


def network_flow(
    logp_fn: Callable[[dict[str, Tensor]], Tensor],
    params: Mapping[str, Tensor],
    adv: Tensor | float,
    entropy_grad: Mapping[str, Tensor | None],
    preconditioner: Mapping[Tensor, Tensor] | None = None,
    mode: Literal["auto", "jvp", "difference"] = "auto",
    rel_step: float = 1e-4,
) -> Tensor:
    """f_t, what each token does to a network's entropy: the shape of `logp_fn(params)`, nats per unit η.

    A diagonal optimizer without momentum takes, on the loss -(1/N) Σ_t A_t log π(a_t), the step
        Δθ = η P (1/N) Σ_t A_t ∇log π(a_t),         P = 1 for SGD, 1/(√v̂ + ε) for Adam                  (5.2)
    Inserted in (5.1), every token owns one summand:
        f_t = A_t <∇log π(a_t), P ∇H>,         dH_predicted = (η/N) Σ_t f_t                              (5.3)
    All N inner products are derivatives of log-probs along one direction d = P ∇H: one backward pass for ∇H
    and one Jacobian-vector product, not N backward passes. Where a fused kernel has no forward mode,
        <∇logp_t, d> ≈ [logp_t(θ + hd) - logp_t(θ - hd)] / 2h,         h = 1e-4 |θ|/|d|                  (5.4)
    with a relative error of 5e-4 in float32 (at 1e-3 |θ|/|d| already 4e-2; measured); in bf16 it is noise.
    With momentum (5.1) stays exact and the sum of (5.3) does not: at β₁ = .9 a tenth of a batch's flow acts
    in its own step (measured r: .2 to .4). It is a diagnostic, exact only on the batch's own states.

    `logp_fn` maps parameters to per-token log-probs, e.g. by `torch.func.functional_call`, unchunked and
    without dropout; `params` = `dict(model.named_parameters())`; `entropy_grad` = ∇H by name (None: no
    dependence); `preconditioner` as from `adam_preconditioner` (None: P = 1). mode "difference" is (5.4),
    outside autocast, half-precision parameters widened; "auto" falls back to it with a warning. The caller
    masks padding. Raises ValueError on a name that `params` lacks.
    """
    if unknown := entropy_grad.keys() - params.keys():
        raise ValueError(f"entropy_grad names parameters that params lacks: {sorted(unknown)[:5]}")
    point, direction = {}, {}
    for name, param in params.items():
        grad, point[name] = entropy_grad.get(name), param.detach()
        scale = 1.0 if preconditioner is None else preconditioner.get(param, 0.0)
        step = torch.zeros_like(point[name]) if grad is None else grad.detach() * scale  # P ∇H
        direction[name] = step.to(param.dtype)
    with torch.no_grad():
        if mode != "difference":
            try:
                return adv * torch.func.jvp(logp_fn, (point,), (direction,))[1]  # (5.3)
            except NotImplementedError as error:  # a kernel without forward mode
                if mode == "jvp":
                    raise
                warnings.warn(f"no forward mode, using central differences: {str(error)[:90]}", stacklevel=2)
        return adv * _central_difference(logp_fn, point, direction, rel_step)


def _central_difference(f: Callable, point: dict, direction: dict, rel_step: float) -> Tensor:
    """Derivative of f, a function of named tensors, along `direction` by (5.4)."""
    point = {k: v if v.dtype == torch.float64 else v.float() for k, v in point.items()}
    size, length = (math.hypot(*(float(t.double().norm()) for t in d.values())) for d in (point, direction))
    h = rel_step * (size or 1.0) / (length or 1.0)
    ahead, behind = (f({k: v + s * h * direction[k].to(v.dtype) for k, v in point.items()}) for s in (1, -1))
    return (ahead - behind) / (2 * h)


# ------------------------------------------------------------------------------------------------------------
# 6. The set point: why balance drifts, what feedback adds


def set_point_lambda(
    P: float, Q: float, entropy: float | None = None, target: float | None = None, gain: float = 0.0
) -> float:
    """λ in [-1, 1] from the update batch's summed rising flow P >= 0 and falling flow Q >= 0.

    Weighting the tokens that raise H by 1 + λ and those that lower it by 1 - λ makes the net flow
        F(λ) = (1 + λ) P - (1 - λ) Q = (P - Q) + λ (P + Q)                                               (6.1)
    which λ = (Q - P)/(Q + P) switches off (2605.11491, eq. 8-9): to first order, by this score, for this
    batch, in this step. Each of these leaks:
      - momentum applies mostly older gradients, balanced against older ∇H;
      - H is of all states, the balance of one batch's: the ∇H of two batches have a cosine of .57 (measured);
      - the second order (1.4) is negative on average, a loss of order η² at every step;
      - in a network the score (2.2) is not the flow (5.3).
    Together they are a bias e per step: H_{n+1} = H_n + e drifts without end (results/claims.txt: at less
    than half the pace of plain GRPO). A restoring force needs a measurement. So let the net flow be not 0 but
        g = k (H* - H)/H* (P + Q):         λ = (Q - P + g)/(Q + P), clamped to [-1, 1]                   (6.2)
    If one unit of flow really moves H by c > 0 per step then, as long as λ is not clamped,
        H_{n+1} - H* = (1 - ρ)(H_n - H*) + e,         ρ = c k (P + Q)/H*                                 (6.3)
    This contracts for 0 < ρ < 2 (momentum delays the force by 1/(1 - β₁) steps: keep ρ well below 1 - β₁)
    towards
        H - H* = e/ρ                                                                                     (6.4)
    a constant offset in place of a drift, smaller for a larger gain, and from both sides: too much entropy is
    pulled down. The authority ends at λ = ±1, a net flow of 2P or -2Q: an empty side cannot be amplified.

    `entropy` = H and `target` = H* in nats, `gain` = k (about 2 works; 0 is the balance). P + Q = 0 gives 0.
    Raises ValueError on a negative or non-finite P, Q or gain, and on a gain without an entropy and a
    positive target.
    """
    P, Q = float(P), float(Q)
    if not all(0 <= value < math.inf for value in (P, Q, gain)):
        raise ValueError(f"P={P}, Q={Q}, gain={gain}: each must be finite and not negative")
    push = 0.0
    if gain > 0:
        if entropy is None or target is None or not 0 < target < math.inf or not math.isfinite(entropy):
            raise ValueError(f"gain={gain} needs an entropy and a target above 0, not {entropy} and {target}")
        push = gain * (target - float(entropy)) / target  # g/(P + Q)
    return 0.0 if P + Q == 0 else min(1.0, max(-1.0, (Q - P) / (Q + P) + push))  # (6.2)


def neutral_step(
    entropy_grad: Iterable[Tensor | None],
    deltas: Iterable[Tensor],
    preconditioner: Iterable[Tensor],
    want: float = 0.0,
) -> float:
    """c of the entropy-neutral step: what an optimizer's step Δ lacks to change a batch's entropy by `want`.

    Balance asks *which tokens* pay for entropy; a control should hold entropy and ask nothing. Of all changes
    x with <g, Δ + x> = want, g = ∇H at θ, the one that is smallest in the optimizer's own measure <x, x/P> is
    a multiple of P g (Cauchy-Schwarz), and by (5.1) the multiple is
        θ' = θ + Δ + c P g,         c = (want - <g, Δ>)/<g, P g>                                         (6.5)
    It holds the entropy of this batch's states exactly, momentum included, up to second order. It cannot hold
    that of the next batch's. Let h be the gradient of the entropy of all states and g = h + n, n the batch's
    own share, with <h, P n> = 0. At want = 0 entropy still changes by
        <h, θ' - θ> = <h, Δ> - ρ <g, Δ> = (1 - ρ) <h, Δ> - ρ <n, Δ>,       ρ = <h, P h>/<g, P g>         (6.6)
    ρ is the mean cosine (under P) of two batches' gradients: .49 as measured, so half of the drift stays. A
    step of GRPO takes 3.2 thousandths of a nat from a fresh batch, the neutral step 1.5 (honesty.txt): over
    300 steps entropy halves all the same. What holds a level is `want` = gain (H* - H).

    All three in one order, preconditioner as from `adam_preconditioner`; None in `entropy_grad` (no
    dependence) counts as 0. A gradient of 0 gives 0. Raises ValueError if lengths or shapes differ.
    """
    both = [(g, p, d) for g, p, d in zip(entropy_grad, preconditioner, deltas, strict=True) if g is not None]
    grads = [g for g, _, _ in both]
    size = entropy_directional_change(grads, [p * g for g, p, _ in both])
    return (want - entropy_directional_change(grads, [d for _, _, d in both])) / size if size > 0 else 0.0


# ------------------------------------------------------------------------------------------------------------
# 7. The law R = -a e^H + b

Numbers = Sequence[float] | Tensor


class EntropyLaw(NamedTuple):
    """R = -a e^H + b: reward bought with entropy. R² is the share of variance that the fit explains."""

    a: float
    b: float
    r2: float

    def predict(self, entropy: float | Numbers) -> Tensor:
        """R at the given entropy in nats, in float64."""
        return self.b - self.a * torch.as_tensor(entropy, dtype=torch.float64).exp()

    @property
    def ceiling(self) -> float:
        """b - a, the reward when all entropy is spent."""
        return self.b - self.a


def fit_entropy_law(entropy: Numbers, score: Numbers) -> EntropyLaw:
    """Least squares with regressor x = e^H (2505.22617, eq. 5-6); unpacks as a, b, r2.

        slope = Cov(x, R)/Var(x),         a = -slope,         b = mean R + a mean x                      (7.1)
    `entropy` (n,) mean token entropy in nats and `score` (n,) validation accuracy at the same steps, in any
    order. It describes runs *without* intervention: fit the baseline, plot interventions against it. a >= 0
    is expected, not enforced. Raises ValueError on fewer than 3 points, unequal lengths, NaN or inf, and
    where any line fits: a standard deviation of e^H below 1e-4 of its mean, or of R below 1e-9.
    """
    h, r = (torch.as_tensor(v, dtype=torch.float64).flatten() for v in (entropy, score))
    if h.numel() != r.numel() or h.numel() < 3:
        raise ValueError(f"{h.numel()} entropies, {r.numel()} scores; the fit needs equally many, at least 3")
    if not (h.isfinite().all() and r.isfinite().all()):
        raise ValueError("entropy or score holds NaN or inf; drop the steps without an evaluation first")
    x = h.exp()
    if x.std() <= 1e-4 * x.mean():
        raise ValueError(f"entropy stays at {float(h.mean()):.4g} nats; a slope needs it to move")
    if r.std() <= 1e-9:
        raise ValueError(f"score is constant at {float(r.mean()):.4g}; there is nothing to explain")
    (var_x, cov), (_, var_r) = torch.cov(torch.stack([x, r])).tolist()
    slope = cov / var_x  # (7.1)
    return EntropyLaw(-slope, float(r.mean() - slope * x.mean()), cov**2 / (var_x * var_r))


class LawCheck(NamedTuple):
    """A law fitted to the first points of a run, its RMSE on the others, and its last predicted - true."""

    law: EntropyLaw
    rmse: float
    final_error: float
    fitted_points: int


def check_entropy_law(entropy: Numbers, score: Numbers, fraction: float = 0.15) -> LawCheck:
    """Fit the first `fraction` of a run, 3 points or more, and predict the rest; points in training's order.

    2505.22617 does so with 15 % and reports a mean RMSE of .9 % (math) and 1.2 % (code) accuracy. Raises
    ValueError as `fit_entropy_law`, for a fraction outside of (0, 1), and if nothing is left to predict.
    """
    h, r = (torch.as_tensor(v, dtype=torch.float64).flatten() for v in (entropy, score))
    n = max(3, round(fraction * h.numel()))
    if not 0 < fraction < 1 or n >= h.numel() or h.numel() != r.numel():
        raise ValueError(f"fraction={fraction} of {h.numel()} entropies, {r.numel()} scores: nothing to test")
    law = fit_entropy_law(h[:n], r[:n])
    error = law.predict(h[n:]) - r[n:]
    return LawCheck(law, float(error.square().mean().sqrt()), float(error[-1]), n)


# ------------------------------------------------------------------------------------------------------------
# 8. The demonstration: how far each theory carries


class Agreement(NamedTuple):
    """How a prediction compares with a measurement, over many cases."""

    pearson: float
    spearman: float
    slope: float  # least squares of measured on predicted: 1 is right, below 1 the prediction is too large
    sign: float  # share of cases with the right sign, of those that moved
    size: float  # root mean square of the prediction over that of the measurement


def agreement(predicted: Numbers, measured: Numbers) -> Agreement:
    """Compare (n,) with (n,) in float64; no variation gives NaN. Raises ValueError if n < 2 or unequal."""
    from scipy.stats import rankdata

    x, y = (torch.as_tensor(v, dtype=torch.float64).flatten() for v in (predicted, measured))
    if x.numel() != y.numel() or x.numel() < 2:
        raise ValueError(f"{x.numel()} predictions, {y.numel()} measurements; need equally many, at least 2")
    ranks = torch.as_tensor(rankdata(torch.stack([x, y]).numpy(), axis=1))  # ties share theirs
    dx, dy = x - x.mean(), y - y.mean()
    values = (
        torch.corrcoef(torch.stack([x, y]))[0, 1],
        torch.corrcoef(ranks)[0, 1],
        dx @ dy / (dx @ dx),
        (x.sign() == y.sign())[y != 0].double().mean(),
        x.norm() / y.norm(),
    )
    return Agreement(*map(float, values))


# name: vocabulary, standard deviation of Gaussian logits, height of up to 8 peaks on top, number of policies
FAMILIES = {
    "flat, V=50": (50, 0.5, 0.0, 2000),
    "Gauss, V=50": (50, 2.0, 0.0, 2000),
    "Gauss, V=1000": (1000, 4.0, 0.0, 2000),
    "peaked, V=1000": (1000, 2.0, 14.0, 2000),
    "very peaked, V=1000": (1000, 2.0, 24.0, 2000),
    "flat, V=151936": (151_936, 1.0, 0.0, 128),
    "peaked, V=151936": (151_936, 2.0, 22.0, 256),
}


def random_policies(family: str, generator: torch.Generator, block: int = 2**23) -> Iterable[Tensor]:
    """Logits (n, V) of the family's policies in float64, in blocks small enough for memory."""
    vocab, scale, height, count = FAMILIES[family]
    for part in torch.arange(count).split(max(1, block // vocab)):
        n = len(part)
        z = scale * torch.randn(n, vocab, generator=generator, dtype=torch.float64)
        where = torch.randint(vocab, (n, 8), generator=generator)
        yield z.scatter_add(1, where, height * torch.rand(n, 8, generator=generator, dtype=torch.float64))


def estimator_cases(family: str, seed: int = 0, eta: float = 1e-3) -> dict[str, Tensor]:
    """One sampled token per policy, A = ±1: each form's prediction, "true" (the change per unit η, by central
    differences along 2.1) and "H", all (n,). "bias/<form>" is E_p[f]/E_p|T| at A = 1, for 64 policies."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Tensor]] = []
    for z in random_policies(family, generator):
        p = z.softmax(-1)
        y = torch.multinomial(p, 1, generator=generator)  # (n, 1)
        adv = torch.randint(2, (len(z),), generator=generator).double() * 2 - 1
        stats = token_stats(z, y.squeeze(1))
        dz = eta * adv.unsqueeze(1) * (-p).scatter_add(1, y, torch.ones_like(y, dtype=p.dtype))  # (2.1)
        row = {"true": (entropy(z + dz) - entropy(z - dz)) / (2 * eta), "H": stats.entropy}
        row |= {form: entropy_change(stats, adv, form) for form in FORMS}
        if not rows:
            every, q = stats.map(lambda t: t[:64].unsqueeze(1)), p[:64]
            every.logp = q.log()  # (64, V): all tokens of these policies
            size = (q * exact_score(every).abs()).sum()
            row |= {f"bias/{form}": (q * entropy_change(every, 1.0, form)).sum() / size for form in FORMS}
        rows.append(row)
    return {name: torch.cat([row[name].reshape(-1) for row in rows if name in row]) for name in rows[0]}


def print_estimators(cases: dict[str, dict[str, Tensor]]) -> None:
    """The table of (3.2): one block per family, one row per form."""
    import pandas as pd

    print("Predicted against true dH of one step of one sampled token, A = +-1. slope: truth on prediction;")
    print("size: RMS of prediction / of truth; bias: mean prediction at A = 1 / mean |truth|, should be 0.")
    for family, columns in cases.items():
        print(f"\n{family}: mean H {float(columns['H'].mean()):.2f} nats, {len(columns['H'])} tokens")
        table = pd.DataFrame({form: agreement(columns[form], columns["true"])._asdict() for form in FORMS}).T
        table["bias"] = [float(columns[f"bias/{form}"]) for form in FORMS]
        print(table.to_string(float_format="{:.3f}".format))


def draw_estimators(cases: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Predicted against true change, a panel per form; families differ in marker and grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 8.5), layout="constrained")
    ticks = [-1, -0.01, 0, 0.01, 1]
    for axis, form in zip(axes.flat, FORMS, strict=True):
        for k, (family, columns) in enumerate(cases.items()):
            look = {"marker": "osv^DPX"[k], "ls": "", "ms": 4, "mfc": "none", "mec": str(k / 10), "mew": 0.7}
            axis.plot(columns["true"][:150], columns[form][:150], label=family, **look)
        axis.plot([-10, 10], [-10, 10], "k-", lw=0.8)
        axis.set_xscale("symlog", linthresh=1e-3)
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.set(title=form, xlim=(-2, 2), ylim=(-30, 30), xticks=ticks, yticks=[-10, *ticks, 10])
        axis.set(xlabel="true dH per unit step (nats)", ylabel="predicted (nats)")
    axes[0, 0].legend(fontsize=7, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(out: Path = Path("runs/entropy_math.png"), seed: int = 0) -> None:
    """How well each paper's formula predicts a step's entropy change: prints a table and draws a figure.

    Args:
        out: where the figure goes
        seed: of the random policies and of the tokens drawn from them
    """
    cases = {family: estimator_cases(family, seed) for family in FAMILIES}
    print_estimators(cases)
    draw_estimators(cases, out)
    print(f"\nFigure: {out}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
