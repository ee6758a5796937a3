"""Chapter 2. GRPO: from verified rewards to one gradient.

Claim. Everything that a GRPO trainer does to a policy is one number per token: the force with which the
update pushes log π(y_t).  This chapter derives that number, and `policy_loss` computes it for any method of
`interventions.py`.

    group_advantages   how good was a response, compared with its siblings on the same prompt    (2.1) - (2.4)
    surrogate          the clipped importance ratio, for data sampled by an older policy         (2.5) - (2.7)
    aggregate          how thousands of per-token losses become one scalar                      (2.8) - (2.12)
    kl_penalty         estimators of the distance to another policy, and their gradients       (2.13) - (2.16)
    mismatch_weight    the sampling engine is not quite the policy that is trained             (2.17) - (2.19)
    Method, Plan       the five places where a method can touch entropy, and the batch-wide bookkeeping

Two sentences explain most surprises of people who read GRPO logs.  When the policy takes exactly one
optimizer step per rollout (*strictly on-policy*), the ratio r is exactly 1, every clip is inert, and the loss
*value* is minus the mean advantage: 0 in a mean over responses, whatever the gradient, and in a mean over
tokens a number that tells how lengths and rewards go together.  And since rewards are centred within a
group, sampled tokens with A > 0 and A < 0 nearly cancel in sum: what is left decides where the entropy goes
(`entropy_math.py`).

Left out, compared with a production trainer: a value function, token-level rewards, and per-rank or
per-micro-batch statistics.  The last is on purpose.  Every mean, quantile and top-k of every method here is
taken over the whole update batch (the *scope rule* of this repository), by construction: `plan_update` sees
all tokens, detached, and produces one coefficient per token; `batch_loss` then is a plain sum, and a sum does
not care how it is sliced.

Papers: GRPO 2402.03300, PPO 1707.06347, Dr.GRPO 2503.20783, DAPO 2503.14476, dual clip 1912.09729, IcePop and
TIS as in the public trainers.  Run `python grpo.py` to see the chapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_right

from entropy_math import TokenStats, exact_score

# ------------------------------------------------------------------------------------------------------------
# 1. The thing that flows


@dataclass
class Tokens:
    """One batch of responses, B rows of at most T tokens.  Every chapter reads some fields and fills others.

    A field that nobody filled is None.  Values at masked positions may be anything, NaN included: every
    function of this repository selects with `torch.where(mask, x, 0)` and never multiplies garbage by zero.

    | field        | shape  | filled by | meaning                                                            |
    |--------------|--------|-----------|--------------------------------------------------------------------|
    | ids          | (B, T) | rollout   | response tokens                                                    |
    | mask         | (B, T) | rollout   | True on response tokens, the first EOS included, False after it    |
    | rollout_logp | (B, T) | rollout   | log-probability that the sampling engine itself reports            |
    | reward       | (B,)   | rollout   | the reward that is optimised                                       |
    | correct      | (B,)   | rollout   | was the answer right?  None: reward > 0 counts as right            |
    | group        | (B,)   | rollout   | integer id of the prompt                                           |
    | truncated    | (B,)   | rollout   | the length limit ended the response, not EOS                       |
    | full_ids     | (B, L) | rollout   | prompt and response in one row, padded on the right                |
    | start        | (B,)   | rollout   | where in that row the first response token is predicted            |
    | logp         | (B, T) | scoring   | log π(y_t), carries the gradient                                   |
    | entropy      | (B, T) | scoring   | H(π(.|s_t)) over the full vocabulary, nats                         |
    | p2, p2logp   | (B, T) | scoring   | Σ_v p_v² and Σ_v p_v² log p_v                                      |
    | old_logp     | (B, T) | scoring   | behaviour policy at the start of the update; None: on-policy       |
    | ref_logp     | (B, T) | scoring   | frozen reference policy, for methods that need one                 |
    | proxy_logp   | (B, T) | scoring   | log-probability under Lp-Reg's proxy policy, -inf where filtered   |
    | adv          | (B, T) | caller    | advantage; None: computed from reward and group by the method      |
    | mismatch     | (B, T) | train     | detached weight (2.17) - (2.19), multiplies the clipped surrogate  |
    | response     | (B, T) | grpo      | all response tokens, where a method narrowed `mask`; None: mask    |
    """

    ids: Tensor
    mask: Tensor
    rollout_logp: Tensor | None = None
    reward: Tensor | None = None
    correct: Tensor | None = None
    group: Tensor | None = None
    truncated: Tensor | None = None
    full_ids: Tensor | None = None
    start: Tensor | None = None
    logp: Tensor | None = None
    entropy: Tensor | None = None
    p2: Tensor | None = None
    p2logp: Tensor | None = None
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    proxy_logp: Tensor | None = None
    adv: Tensor | None = None
    mismatch: Tensor | None = None
    response: Tensor | None = None

    def _map(self, f: Callable[[Tensor], Tensor]) -> Tokens:
        values = {x.name: getattr(self, x.name) for x in fields(self)}
        return Tokens(**{k: None if v is None else f(v) for k, v in values.items()})

    def rows(self, index: Any) -> Tokens:
        """The responses selected by a slice, an index tensor or a boolean tensor over B."""
        return self._map(lambda v: v[index])

    def detach(self) -> Tokens:
        """The same numbers without their graph: what weights, selections and controllers may look at."""
        return self._map(lambda v: v.detach())

    def to(self, device: torch.device | str) -> Tokens:
        return self._map(lambda v: v.to(device))

    def clean(self) -> Tokens:
        """Zeros where the mask is False, without a gradient: `torch.where`, as NaN times 0 is NaN."""

        def keep(v: Tensor) -> Tensor:
            return torch.where(self.mask, v, 0) if v.shape == self.mask.shape and v.is_floating_point() else v

        return self._map(keep)

    @property
    def stats(self) -> TokenStats:
        """The four statistics of the sampled position as `entropy_math` wants them."""
        return TokenStats(self.logp, self.entropy, self.p2, self.p2logp)

    @property
    def solved(self) -> Tensor:
        """(B,) bool: verified as right; where no `correct` was given, a reward above zero."""
        return self.correct.bool() if self.correct is not None else self.reward > 0

    @property
    def every(self) -> Tensor:
        """(B, T) bool: all response tokens, also those that a method takes out of its loss."""
        return self.mask if self.response is None else self.response

    @property
    def lengths(self) -> Tensor:
        """(B,) number of response tokens, EOS included."""
        return self.mask.sum(-1)


def concat_padded(parts: list[Tokens], pad: int = 0) -> Tokens:
    """The rows of several batches in one, each field padded to its widest part: ids by `pad`, others by 0."""

    def joined(name: str) -> Tensor:
        values = [getattr(t, name) for t in parts]
        width = max(v.shape[-1] for v in values)
        fill = pad if name in ("ids", "full_ids") else 0
        wide = [v if v.dim() == 1 else pad_right(v, (0, width - v.shape[1]), value=fill) for v in values]
        return torch.cat(wide)

    return Tokens(**{x.name: joined(x.name) for x in fields(Tokens) if getattr(parts[0], x.name) is not None})


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is float32: 1/N is not a number for bf16."""
    return torch.promote_types(dtype, torch.float32)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the True positions of mask, in float64; 0 where there are none.  Scalar tensor."""
    total = torch.where(mask, x, 0).sum(dtype=torch.float64)
    return total / mask.sum().clamp(min=1)


# ------------------------------------------------------------------------------------------------------------
# 2. Advantages


def group_index(group: Tensor) -> tuple[Tensor, Tensor]:
    """Relabel arbitrary prompt ids to 0..n-1.  Returns (B,) labels and the (n,) group sizes."""
    _, index, size = torch.unique(group, return_inverse=True, return_counts=True)
    return index, size


def group_mean(x: Tensor, group: Tensor) -> Tensor:
    """Mean of x over each group, broadcast back to the (B,) rows."""
    index, size = group_index(group)
    total = torch.zeros(len(size), dtype=x.dtype, device=x.device).index_add_(0, index, x)
    return (total / size)[index]


def group_advantages(reward: Tensor, group: Tensor, normalize: str = "std", eps: float = 1e-6) -> Tensor:
    """How much better a response did than the others on its prompt.  (B,), (B,) -> (B,).

    With R_1..R_G the rewards of one group and m their mean:

        std     A_i = (R_i - m) / (s + eps),  s the standard deviation with G - 1       GRPO, 2402.03300 (2.1)
        none    A_i = R_i - m                                                        Dr.GRPO, 2503.20783 (2.2)
        loo     A_i = R_i - mean_{j≠i} R_j = (R_i - m) G / (G - 1)                      RLOO, 2402.14740 (2.3)
        batch   A_i = (R_i - m) / (S + eps),  S the standard deviation of all rewards of the batch       (2.4)

    In each, Σ_i A_i = 0 within a group, and R -> R + c changes nothing.  A group whose rewards are all equal,
    a group of one among them, gets exactly 0: there is nothing to compare with.  (Some trainers hand a group
    of one its raw reward, and rounding divided by eps makes noise of equal rewards: both are defects that a
    test here excludes.)

    Rewards in {0, 1} with success rate q show the shape of (2.1): A⁺ = sqrt((1-q)/q), A⁻ = -sqrt(q/(1-q)), up
    to sqrt((G-1)/G): the rare outcome is pushed hard, in either direction.
    """
    if normalize not in ("std", "none", "loo", "batch"):
        raise ValueError(f"normalize={normalize!r} is unknown: choose std, none, loo or batch")
    r = reward if reward.dtype == torch.float64 else reward.float()
    index, size = group_index(group)
    centred = r - group_mean(r, group)  # (B,)
    spread = torch.zeros(len(size), dtype=r.dtype, device=r.device)
    high = spread.scatter_reduce(0, index, r, "amax", include_self=False)
    low = spread.scatter_reduce(0, index, r, "amin", include_self=False)
    n = size[index].to(r.dtype)
    if normalize == "std":  # (2.1)
        var = torch.zeros_like(spread).index_add_(0, index, centred**2) / (size - 1).clamp(min=1)
        centred = centred / (var.sqrt()[index] + eps)
    elif normalize == "loo":  # (2.3)
        centred = centred * n / (n - 1).clamp(min=1)
    elif normalize == "batch":  # (2.4)
        centred = centred / ((r.std() if len(r) > 1 else r.new_zeros(())) + eps)
    return torch.where((high == low)[index], 0, centred)


# ------------------------------------------------------------------------------------------------------------
# 3. The surrogate


def log_ratio(logp: Tensor, old_logp: Tensor | None) -> Tensor:
    """log r = log π(y) - log π_old(y), clamped to ±20; beyond, not at ±20 itself, a token has no gradient,
    which `clip_factor` knows.  old_logp None means strictly on-policy: r is exactly 1.

    Before a rollout's first step old_logp must be the detached logp of the *same* forward pass.  A second one
    differs by rounding, and a penalty such as |log r| turns rounding into gradients of full size.
    """
    x = logp - (logp.detach() if old_logp is None else old_logp)
    return torch.where(x.abs() > 20, x.detach().clamp(-20, 20), x)


def clipped_surrogate(
    logp: Tensor,
    old_logp: Tensor | None,
    adv: Tensor,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped loss per token, to be minimised.  All (B, T) -> (B, T).

        r = π(y) / π_old(y)                                                                              (2.5)
        l = max( -r A, -clip(r, 1 - eps_low, 1 + eps_high) A )                          1707.06347 eq. 7 (2.6)
        dual clip, for A < 0:  l <- min(l, -c A)                                        1912.09729 eq. 5 (2.7)

    The gradient of -r A is -r A ∇log π: an importance-weighted policy gradient.  (2.6) removes it where
    (A > 0, r > 1 + eps_high) or (A < 0, r < 1 - eps_low): the token has moved far enough in the direction in
    which it is pushed.  (2.7) removes it also where A < 0 and r > c.  Exactly at a bound l has a kink, and
    the token keeps its gradient: so says `clip_factor`, whose word counts, and not what autograd makes of a
    clamp or a maximum there, which differs between versions of torch.  l is positively homogeneous of degree
    1 in A, so a weight w >= 0 on the loss is the same as a weight on the advantage.
    """
    r = log_ratio(logp, old_logp).exp()  # (2.5)
    loss = torch.maximum(-r * adv, -r.clamp(1 - eps_low, 1 + eps_high) * adv)  # (2.6)
    if dual_clip is not None:
        loss = torch.where(adv < 0, torch.minimum(loss, -dual_clip * adv), loss)  # (2.7)
    clipped = clip_factor(logp, old_logp, adv, eps_low, eps_high, dual_clip) == 0
    return torch.where(clipped, loss.detach(), -r * adv)  # the same value: where nothing clips, l is -r A


def clip_factor(
    logp: Tensor,
    old_logp: Tensor | None,
    adv: Tensor,
    eps_low: float,
    eps_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """I_clip · r: by how much the gradient of (2.6), (2.7) differs from that of -A log π.  Detached, (B, T).

    The entropy flow of an off-policy token is I_clip · r · A · T at the current policy, entropy_math (2.8).
    """
    r = log_ratio(logp, old_logp).exp().detach()
    clipped = ((adv > 0) & (r > 1 + eps_high)) | ((adv < 0) & (r < 1 - eps_low))
    if old_logp is not None:
        clipped = clipped | ((logp - old_logp).detach().abs() > 20)  # the clamp of `log_ratio`
    if dual_clip is not None:
        clipped = clipped | ((adv < 0) & (r > dual_clip))
    return torch.where(clipped, 0, r)


# ------------------------------------------------------------------------------------------------------------
# 4. Aggregation

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_sum_norm", "token_sum")


def aggregation_coefficients(
    mask: Tensor, how: str = "token_mean", norm: float | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight of every token in the batch's loss.  (B, T) bool -> (B, T) of `dtype`, 0 where masked.

    Each aggregation is a linear functional of the per-token losses l, so it *is* a coefficient per token:

        token_mean            1 / N,  N = tokens of the batch         every token counts the same (DAPO) (2.8)
        seq_mean_token_mean   1 / (S · len_i),  S = rows with tokens  every response counts alike (GRPO) (2.9)
        seq_mean_token_sum    1 / S                                                                     (2.10)
        seq_sum_norm          1 / (B · K),  K = `norm`, a constant      no length bias (Dr.GRPO)        (2.11)
        token_sum             1                                                                         (2.12)

    Computed once over the whole update batch; micro-batches and ranks take their slices.  That is all there
    is to "gradient accumulation done right": averaging per-micro-batch means over-weights short
    micro-batches. An all-masked batch has coefficients 0, hence loss 0.
    """
    m = mask.to(dtype)
    length = m.sum(-1, keepdim=True)  # (B, 1)
    rows = (length > 0).sum().clamp(min=1)
    if how == "token_mean":  # (2.8)
        return m / m.sum().clamp(min=1)
    if how == "seq_mean_token_mean":  # (2.9)
        return m / (rows * length.clamp(min=1))
    if how == "seq_mean_token_sum":  # (2.10)
        return m / rows
    if how == "seq_sum_norm":  # (2.11)
        if norm is None or norm <= 0:
            raise ValueError(
                f"aggregation seq_sum_norm divides by a constant length K: norm={norm}, give norm > 0"
            )
        return m / (mask.shape[0] * norm)
    if how == "token_sum":  # (2.12)
        return m
    raise ValueError(f"aggregation={how!r} is unknown: choose one of {', '.join(AGGREGATIONS)}")


def weighted_sum(loss: Tensor, coef: Tensor) -> Tensor:
    """Σ coef · loss over tokens with a nonzero coefficient; garbage elsewhere, NaN too, is not touched."""
    return (torch.where(coef != 0, loss, 0) * coef).sum()


def aggregate(loss: Tensor, mask: Tensor, how: str = "token_mean", norm: float | None = None) -> Tensor:
    """One scalar from (B, T) per-token losses, in one of the five ways of `aggregation_coefficients`."""
    return weighted_sum(loss, aggregation_coefficients(mask, how, norm, at_least_float32(loss.dtype)))


# ------------------------------------------------------------------------------------------------------------
# 5. Distance to another policy


def kl_penalty(logp: Tensor, ref_logp: Tensor, estimator: str = "k2") -> Tensor:
    """Per-token estimators of KL(π || q) from samples y ~ π, with x = log π(y) - log q(y).  (B, T) -> (B, T).

        k1    x                     E = KL(π||q)     gradient as a loss: 0 in expectation, only noise   (2.13)
        k2    x² / 2                E is biased      gradient as a loss: ∇KL(π||q), exactly             (2.14)
        k3    e⁻ˣ - 1 + x           E = KL(π||q)     gradient as a loss: ∇KL(q||π), the other direction (2.15)
        abs   |x|                   E is biased      gradient sign(x) ∇log π, 0 at x = 0                (2.16)

    "As a loss" means what trainers do: the sampled tokens are constants and ∇ passes through log π(y) only.
    Then E[∇k1] = E[∇log π] = 0, E[∇k2] = E[x ∇log π] = ∇KL(π||q), and E[∇k3] = E[(1 - q/π) ∇log π] = -Σ q
    ∇log π = ∇KL(q||π).  So the value that is unbiased (k3) and the gradient that is right (k2) are different
    estimators. The effect of a token on later states is ignored by all four.  k3 uses expm1, and continues
    along its tangent below x = -20, where e⁻ˣ would overflow: the pull stays as strong as it was there.
    """
    x = logp - ref_logp
    if estimator == "k1":
        return x  # (2.13)
    if estimator == "k2":
        return x**2 / 2  # (2.14)
    if estimator == "k3":
        far = x < -20  # selected, not clamped: one of the two terms has a slope, at x = -20 the first
        tangent = torch.where(far, math.exp(20) * (-x - 20), 0)
        return torch.expm1(-torch.where(far, -20, x)) + tangent + x  # (2.15)
    if estimator == "abs":
        return x * x.detach().sign()  # (2.16)
    raise ValueError(f"estimator={estimator!r} is unknown: choose k1, k2, k3 or abs")


def mismatch_weight(
    old_logp: Tensor, rollout_logp: Tensor, kind: str = "tis", low: float = 0.5, high: float = 2.0
) -> Tensor:
    """Correction for an engine that samples from slightly other probabilities than the trainer computes.

        ρ = π_old(y) / π_engine(y)                                                                      (2.17)
        tis      min(ρ, high)                       truncated importance sampling, per token            (2.18)
        icepop   ρ where low <= ρ <= high, else 0   IcePop; the public recipe has low .5, high 5        (2.19)

    Detached; multiplies the surrogate *after* clipping and leaves penalties alone.  ρ = 1: no change.
    """
    rho = (old_logp - rollout_logp).detach().clamp(-20, 20).exp()  # (2.17)
    if kind == "tis":
        return rho.clamp(max=high)  # (2.18)
    if kind == "icepop":
        return torch.where((rho >= low) & (rho <= high), rho, 0)  # (2.19)
    raise ValueError(f"mismatch kind={kind!r} is unknown: choose tis or icepop")


# ------------------------------------------------------------------------------------------------------------
# 6. A method: five places, five hooks


@dataclass
class Progress:
    """Where in the run an update happens.  The loop hands it to the method, so that schedules and random
    selections depend on nothing hidden and a resumed run repeats them."""

    step: int = 0
    total: int = 1
    seed: int = 0
    max_length: int | None = None  # longest response that sampling allows, tokens
    temperature: float = 1.0  # of the rollouts

    def generator(self) -> torch.Generator:
        """A generator that depends on (seed, step) only."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) % 2**63)


@dataclass
class Plan:
    """All that an update knows about its whole batch: detached, per token, ready to be sliced by rows."""

    adv: Tensor  # (B, T) advantage that enters the surrogate
    weight: Tensor  # (B, T) multiplies the surrogate
    coef: Tensor  # (B, T) aggregation over the tokens that the method selected; 0 elsewhere
    coef_all: Tensor  # (B, T) aggregation over all response tokens: for penalties that see every token
    entropy: float  # token-mean entropy of the whole batch, nats: what controllers see
    tokens: int  # response tokens of the whole batch, also after slicing
    marks: dict[str, Tensor] = field(default_factory=dict)  # a method's own per-token or per-row tensors
    metrics: dict[str, float] = field(default_factory=dict)  # whole-batch numbers worth logging

    def rows(self, index: Any) -> Plan:
        cut = {k: v[index] for k, v in self.marks.items()}
        parts = {k: getattr(self, k)[index] for k in ("adv", "weight", "coef", "coef_all")}
        return replace(self, **parts, marks=cut)


@dataclass
class Method:
    """Plain GRPO, and the skeleton of everything else: a method overrides the hook of its place.

    | place     | hook                       | acts on                                              |
    |-----------|----------------------------|------------------------------------------------------|
    | sampling  | `sample`                   | the distribution that rollouts are drawn from        |
    | selection | `select`                   | which responses enter the update                     |
    | weight    | `advantage`, `weight`      | how much each token's advantage counts               |
    | ratio     | `surrogate`                | the shape of the loss in r = π/π_old                 |
    | penalty   | `penalty`                  | a term added to the loss                             |

    `shape` (rewards), `keep` and `mark` (tokens), `factor` (the surrogate's force) and `reset_reference` are
    what those five need besides.  `select`, `shape`, `advantage`, `keep`, `weight` and `mark` are called once
    per update with the whole batch, detached; `factor` also per micro-batch, and `select`, where `refill` is
    set, also on each draw, before anything is scored: it then sees rewards and no statistics. `surrogate`
    and `penalty` are called once per micro-batch, with the graph, and with that micro-batch's rows of the
    plan. `after_step` moves controllers; nothing else changes the object, so that computing a loss twice
    gives it twice.
    """

    eps_low: float = 0.2
    """r is clipped from below at 1 - eps_low"""
    eps_high: float = 0.2
    """r is clipped from above at 1 + eps_high"""
    dual_clip: float | None = None
    """for A < 0 the loss is at most -c A, c > 1 (dual clip, PPO for games); none by default"""
    aggregation: str = "token_mean"
    """how token losses become one number: token_mean, seq_mean_token_mean, seq_mean_token_sum, seq_sum_norm,
    token_sum"""

    key: ClassVar[str] = "grpo"
    place: ClassVar[str] = "none"
    paper: ClassVar[str] = "2402.03300"
    idea: ClassVar[str] = "group-relative policy gradient with the clipped ratio: the baseline that collapses"
    needs: ClassVar[tuple[str, ...]] = ("logp",)  # fields of Tokens beyond ids, mask, reward, group
    on_policy: ClassVar[bool] = True  # False: its clip or penalty does nothing with one update per rollout
    extra_pass: ClassVar[str] = ""  # another pass over a model that the method costs: "reference", "proxy"
    refill: ClassVar[bool] = False  # True: the loop samples until `select` has kept enough whole groups
    normalize: ClassVar[str] = "std"  # group_advantages' normalisation
    # allowed values of a field: (lowest, highest), or the words to choose from
    limits: ClassVar[dict[str, tuple]] = {
        "eps_low": (0, math.inf),
        "eps_high": (0, math.inf),
        "dual_clip": (1 + 1e-9, math.inf),  # at c = 1 every token with A < 0 would stand on the edge
        "aggregation": AGGREGATIONS,
    }
    without: ClassVar[tuple[str, ...]] = ()  # inherited hyperparameters that this method has no use for
    state: ClassVar[dict[str, Any]] = {}  # numbers that live across steps: name -> start, or a field's name
    given: ClassVar[tuple[str, ...]] = ()  # hyperparameters that somebody set, be it to their default
    corrects: ClassVar[bool] = False  # its weight is the correction (2.17): Tokens.mismatch is refused

    def __post_init__(self) -> None:
        self.progress = Progress()
        for name, start in self.state.items():
            setattr(self, name, getattr(self, start) if isinstance(start, str) else start)
        for cls in reversed(type(self).__mro__):
            for name, allowed in cls.__dict__.get("limits", {}).items():
                self._check(name, getattr(self, name), allowed)

    def _check(self, name: str, value: Any, allowed: tuple) -> None:
        if value is None:
            return
        if isinstance(allowed[0], str):
            if value not in allowed:
                raise ValueError(
                    f"{self.key}: {name}={value!r} is unknown: choose one of {', '.join(allowed)}"
                )
        elif not allowed[0] <= value <= allowed[1]:  # NaN fails too
            raise ValueError(
                f"{self.key}: {name}={value} is out of range: give a value from {allowed[0]} to {allowed[1]}"
            )

    # -- hooks over the whole, detached batch ----------------------------------------------------------------

    def sample(
        self, logits: Tensor, position: int, rows: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor] | None:
        """Place 1.  Next-token ids (B,), and their log-probabilities under the distribution that they were
        drawn from, for temperature-scaled logits (B, V) at response position `position`; None leaves sampling
        alone.  `rows` (B,) is each row's number among its prompt's responses, 0 <= rows < group size."""
        return None

    def select(self, tk: Tokens) -> Tensor | None:
        """Place 2.  (B,) bool, the responses that enter the update; None: all."""
        return None

    def shape(self, tk: Tokens) -> Tensor:
        """(B,) the reward that advantages are computed from; `tk.solved` stays what it was."""
        return tk.reward

    def advantage(self, tk: Tokens) -> Tensor:
        """Place 3, first half.  (B, T): `tk.adv` where given, else (2.1) for every token of a response."""
        if tk.adv is not None:
            return tk.adv
        return group_advantages(tk.reward, tk.group, self.normalize)[:, None].expand(tk.mask.shape)

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor | None:
        """Place 3, second half.  (B, T) weights >= 0 on the surrogate, `tk.mask` as selected; None: all 1."""
        return None

    def keep(self, tk: Tokens, adv: Tensor) -> Tensor | None:
        """(B, T) bool: tokens that stay in the loss *and in its denominator*; None: all of `tk.mask`."""
        return None

    def mark(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        """Whole-batch selections that `surrogate` or `penalty` need, tensors of B rows."""
        return {}

    def factor(self, tk: Tokens, adv: Tensor, marks: dict[str, Tensor] | None = None) -> Tensor:
        """(B, T), detached: by how much the surrogate's gradient differs from that of -A log π.  Overridden
        together with `surrogate`, so that weights and the ledger know the real force.  `marks` None: `tk` is
        the whole batch."""
        return clip_factor(tk.logp, tk.old_logp, adv, self.eps_low, self.eps_high, self.dual_clip)

    # -- hooks over a micro-batch, with graph ----------------------------------------------------------------

    def surrogate(self, tk: Tokens, plan: Plan) -> Tensor:
        """Place 4.  (B, T) loss per token, before weights and aggregation."""
        return clipped_surrogate(tk.logp, tk.old_logp, plan.adv, self.eps_low, self.eps_high, self.dual_clip)

    def penalty(self, tk: Tokens, plan: Plan) -> Tensor | None:
        """Place 5.  A scalar added to the loss: this micro-batch's share of a sum over `plan.coef_all`, or
        over `plan.coef` where it is part of the loss of selected tokens."""
        return None

    # -- state and needs -------------------------------------------------------------------------------------

    @property
    def entropy_grad(self) -> bool:
        """Does the loss differentiate the entropy?  If not, no entropy graph is ever built."""
        return False

    @property
    def loss_norm(self) -> float | None:
        """K of seq_sum_norm, tokens: the longest response that sampling allows."""
        return self.progress.max_length

    def coefficients(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T): the aggregation over a mask of the whole batch."""
        return aggregation_coefficients(mask, self.aggregation, self.loss_norm, dtype)

    def reset_reference(self, step: int, score: float | None) -> bool:
        """Called after each step with the score of an evaluation made at this step, or None.  True: the loop
        copies the policy into the reference and clears the optimizer's state (ProRL)."""
        return False

    def after_step(self, plan: Plan) -> None:
        """Called once after each optimizer step with the plan of that step: controllers move here."""

    def state_dict(self) -> dict[str, Any]:
        """State that lives across steps, saved with every checkpoint."""
        return {name: getattr(self, name) for name in self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


# ------------------------------------------------------------------------------------------------------------
# 7. The objective


def plan_update(tokens: Tokens, method: Method) -> Plan:
    """Everything that depends on the whole update batch, computed before any backward pass.

    `tokens` holds the batch's detached statistics (a graph, if there is one, is dropped).  Order: selection,
    advantage, token mask, weight, marks.  Raises ValueError where the method needs a field that is None.
    """
    tk = tokens.detach().clean()
    missing = [name for name in method.needs if getattr(tk, name) is None]
    if missing:
        raise ValueError(
            f"method {method.key} needs Tokens.{missing[0]}, which is None: fill it before the update"
        )
    tk.response = tokens.mask
    if tk.reward is not None:
        tk.correct, tk.reward = tk.solved, method.shape(tk)
    rows = method.select(tk)
    if rows is not None:
        tk.mask = tk.mask & rows[:, None]
    adv = torch.where(tk.mask, method.advantage(tk), 0).to(tk.logp.dtype)  # (B, T)
    kept = method.keep(tk, adv)
    if kept is not None:
        tk.mask = tk.mask & kept
        adv = torch.where(tk.mask, adv, 0)
    entropy = float("nan") if tk.entropy is None else float(masked_mean(tk.entropy, tokens.mask))
    metrics: dict[str, float] = {"batch_entropy": entropy}  # of all responses, selected or not
    if tk.ref_logp is not None:  # the value estimate (2.15), whatever estimator a method descends
        metrics["kl_ref"] = float(masked_mean(kl_penalty(tk.logp, tk.ref_logp, "k3"), tokens.mask))
    weight = method.weight(tk, adv, metrics)
    marks = method.mark(tk, adv, metrics)
    weight = torch.ones_like(adv) if weight is None else torch.where(tk.mask, weight, 0).to(adv.dtype)
    _weight_metrics(weight, tk.mask, tokens.mask, metrics)
    dtype = at_least_float32(adv.dtype)
    return Plan(
        adv=adv,
        weight=weight,
        coef=method.coefficients(tk.mask, dtype),
        coef_all=method.coefficients(tokens.mask, dtype),
        entropy=entropy,
        tokens=int(tokens.mask.sum()),
        marks=marks,
        metrics=metrics,
    )


def _weight_metrics(weight: Tensor, mask: Tensor, every: Tensor, metrics: dict[str, float]) -> None:
    """Mean and spread of the weights in use, and the share of response tokens that the method touched."""
    w = weight[mask].double()
    if not len(w):
        w = w.new_zeros(1)
    metrics["weight_mean"], metrics["weight_std"] = float(w.mean()), float(w.std(correction=0))
    touched = (every & ~mask) | (mask & (weight != 1))
    metrics.setdefault("tokens_touched", float(masked_mean(touched.float(), every)))


def batch_loss(tokens: Tokens, plan: Plan, method: Method) -> tuple[Tensor, dict[str, float]]:
    """The loss of some rows of the batch, given those rows of the plan.  Summed over a partition of the rows
    it is the loss of the batch, and so are the metrics: each is a share of a token mean.  Raises ValueError
    where method and `tokens.mismatch` would correct the same mismatch twice."""
    if method.corrects and tokens.mismatch is not None:
        raise ValueError(
            f"{method.key}: correct=true and Tokens.mismatch (--mismatch) both weigh by π/π_engine: use one"
        )
    tokens = tokens.clean()
    loss = method.surrogate(tokens, plan) * plan.weight
    if tokens.mismatch is not None:
        loss = loss * tokens.mismatch
    total = weighted_sum(loss, plan.coef)
    extra = method.penalty(tokens, plan)
    if extra is not None:
        total = total + extra
    return total, _ratio_metrics(tokens, plan, method)


def _ratio_metrics(tokens: Tokens, plan: Plan, method: Method) -> dict[str, float]:
    """Shares of the token means of "the clip removed the gradient" and of k3; on-policy both are 0."""
    if tokens.old_logp is None:
        return {"clip_fraction": 0.0, "kl_old": 0.0}
    logp = tokens.logp.detach()
    share = tokens.mask.to(logp.dtype) / max(plan.tokens, 1)
    factor = method.factor(tokens, plan.adv, plan.marks)
    k3 = kl_penalty(tokens.old_logp, logp, "k3")  # samples are from π_old, so this estimates KL(π_old || π)
    return {
        "clip_fraction": float(weighted_sum((factor == 0).to(logp.dtype), share)),
        "kl_old": float(weighted_sum(k3, share)),
    }


def policy_loss(tokens: Tokens, method: Method) -> tuple[Tensor, dict[str, float]]:
    """The whole objective of a method on one update batch: a scalar with gradient through `tokens.logp` (and
    `tokens.entropy` where the method has an entropy term), and the numbers worth logging.

    Equals `plan_update` on all rows followed by `batch_loss` on any partition of them.
    """
    plan = plan_update(tokens, method)
    loss, metrics = batch_loss(tokens, plan, method)
    return loss, {**plan.metrics, **metrics}


def token_flow(tokens: Tokens, force: Tensor) -> Tensor:
    """What the update does to entropy, token by token, if the policy were a table.  (B, T), nats per unit
    learning rate on the scaled logits z/τ; for a step on z itself divide by τ², entropy_math (2.9).

    `force` = -∂loss/∂logp, the gradient that arrived at `tokens.logp` in the backward pass with its sign
    turned: ratio, clip, weights, penalties on logp and the aggregation are all inside.  A logit step η ·
    force · (e_y - p) changes the entropy of its own state by η · force · T, entropy_math (2.2).
    Zero where masked.
    """
    return torch.where(tokens.mask, force * exact_score(tokens.stats), 0).detach()


# ------------------------------------------------------------------------------------------------------------
# 8. Demonstration


def main() -> None:
    """Show on eight numbers what surprises in a training log."""
    torch.manual_seed(0)
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    reward = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])
    print("rewards of two groups   ", reward.tolist())
    for how in ("std", "none", "loo", "batch"):
        adv = group_advantages(reward, group, how)
        print(f"  advantages, {how:<11} ", " ".join(f"{a:+.2f}" for a in adv.tolist()))
    print("  the second group is solved by everybody, so it teaches nothing: exactly 0.\n")

    logits = torch.randn(8, 5, 6, requires_grad=True)  # (B, T, V)
    ids = torch.randint(6, (8, 5))
    mask = torch.arange(5) < torch.randint(2, 6, (8, 1))
    logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    tokens = Tokens(ids, mask, reward=reward, group=group, logp=logp)
    loss, _ = policy_loss(tokens, Method(aggregation="seq_mean_token_mean"))
    loss.backward()
    print(f"strictly on-policy: loss = {loss.item():+.1e}, yet |gradient| = {logits.grad.norm():.3f}")
    print(" the value is minus the mean advantage, 0 in a mean over responses; watch reward and entropy.\n")

    print("gradient of the clipped surrogate over the plain policy gradient (eps .2 / .28, dual clip 3)")
    ratios = torch.tensor([0.5, 0.79, 0.9, 1.0, 1.1, 1.29, 2.0, 3.5])
    print("  r     ", " ".join(f"{r:5.2f}" for r in ratios.tolist()))
    for a in (1.0, -1.0):
        factor = clip_factor(ratios.log(), torch.zeros(8), torch.full((8,), a), 0.2, 0.28, 3.0)
        print(f"  A {a:+.0f}  ", " ".join(f"{x:5.2f}" for x in factor.tolist()))
    print("  with A > 0 the clip stops the rise, with A < 0 the fall: at r = 1 it does nothing at all.")


if __name__ == "__main__":
    main()
