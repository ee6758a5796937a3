"""Chapter 3. Every published way to hold entropy up, each a small class that overrides one hook.

Claim. The published interventions look unlike each other, but each multiplies the force of some tokens by a
number, drops some responses, or adds one term to the loss. Written on the five hooks of `grpo.Method`, a diff
between two methods is the lesson.

How to read an entry: what it does and why, its formula (3.n) as the code computes it, where the formula was
read, what differs between paper and released code, and what holds at the edges. n is the method's number in a
catalogue of all of them, not the order of reading; the tests carry it. Sources carry a tag:

    [paper]            read in the paper               [code]            read in the authors' code
    [second-hand]      read in agreeing notes          [reconstruction]  ours, with the published properties

Common to all: N is the number of response tokens of the update batch and every statistic is over that whole
batch, of the current policy before the step, detached; the denominator stays N unless an entry says
otherwise; `f` is a token's predicted entropy change (entropy_math) with the advantage that really acts on it,
I_clip r A (STEER's released form and PAPO say what they take instead).

Left out: what the authors' trainers do around a method (statistics per micro-batch and rank, where an entry
says so; critics; several turns; curricula of problems), and methods that change the model or the decoding of
finished policies. The last sections combine methods (6), build them from the words of a command line (7) and
hand them to verl (8).

    python interventions.py       what every method does to one batch: a table, and runs/interventions.png
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import inspect
import math
import os
import types
import typing
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from entropy_math import entropy_change, set_point_lambda
from grpo import (
    Method,
    Plan,
    Progress,
    Tokens,
    batch_loss,
    clip_factor,
    clipped_surrogate,
    group_index,
    group_mean,
    kl_penalty,
    log_ratio,
    masked_mean,
    mismatch_weight,
    plan_update,
    policy_loss,
    token_flow,
    weighted_sum,
)

# limits of hyperparameters, ends included: POSITIVE and SHARE allow 0
POSITIVE, COUNT, ABOVE, SHARE = (0, math.inf), (1, math.inf), (1e-9, math.inf), (0, 1)
FLOW = ("logp", "entropy", "p2", "p2logp")  # what the exact entropy change needs

# ------------------------------------------------------------------------------------------------------------
# 1. What the methods share


def top(score: Tensor, mask: Tensor, k: int, keys: Tensor | None = None) -> Tensor:
    """(B, T) bool: the k positions of mask with the largest score, all of mask where k is larger. Ties go to
    the larger key (`token_keys`), without keys to the lower index."""
    where = mask.flatten().nonzero()[:, 0]
    if keys is not None:  # both sorts are stable
        where = where[keys.flatten()[where].argsort(descending=True, stable=True)]
    order = score.flatten()[where].sort(descending=True, stable=True).indices[:k]
    out = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
    out[where[order]] = True
    return out.view(mask.shape)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64 (wrapping): a bijection whose output bits look random."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def token_keys(tk: Tokens, progress: Progress, stream: int = 0) -> Tensor:
    """(B, T) float64 in [0, 1): one random key per token, a hash of the run's seed and step, `stream`, the
    row's ids, how many earlier rows have the same ids, and the position.

    A counter-based generator instead of a sequential one: the key of a token depends on neither the order of
    the rows, the width of the padding nor the rank that holds the row, and there is no state to save. Only
    rows with the same ids exchange their keys when their order changes: the same response to one prompt,
    where that makes no difference, or to several, where the draw is another one of the same distribution.
    """
    t = torch.arange(tk.mask.shape[1], device=tk.mask.device)
    ids = torch.where(tk.mask, tk.ids, 0).long()
    row = torch.where(tk.mask, _mix(ids * 0x1000003 + t), 0).sum(-1, keepdim=True)  # (B, 1)
    row = row + 0x2545F4914F6CDD1D * (row == row.T).tril(-1).sum(-1, keepdim=True)  # its number among equals
    seed = progress.generator().initial_seed() % 2**50 * 1024 + stream
    bits = _mix(_mix(row + _mix(torch.tensor(seed, device=t.device))) + t)  # (B, T)
    return ((bits >> 11) & ((1 << 53) - 1)).double() / 2.0**53


def centred(x: Tensor, mask: Tensor) -> Tensor:
    """x minus its token mean, float64; exactly 0 where masked, and everywhere if all values are equal."""
    low = torch.where(mask, x, math.inf).min()
    high = torch.where(mask, x, -math.inf).max()
    return torch.where(mask & (low < high), x.double() - masked_mean(x, mask), 0)


def covariance(tk: Tokens, adv: Tensor) -> Tensor:
    """(A - mean A)(log p - mean log p) per token (3.7): (B, T) float64, whose mean is the covariance."""
    return centred(adv, tk.mask) * centred(tk.logp, tk.mask)


def fraction_count(method: Method, fraction: float, n: int, exact: float | None = None) -> int:
    """How many of n tokens a fraction selects, at least one (0 for fraction 0). Papers' fractions are made
    for millions of tokens; where the floor of one decides, that is said once, with the number."""
    if fraction <= 0 or n == 0:
        return 0
    count = max(int(fraction * n if exact is None else exact), 1)
    if fraction * n < 1:
        _tell(method, f"fraction {fraction:g} of {n} tokens is less than one: 1 is selected, {1 / n:.2%}")
    return count


def _tell(method: Method, text: str) -> None:
    """Warn once per method object."""
    if not method.__dict__.setdefault("_told", False):
        method.__dict__["_told"] = True
        warnings.warn(f"{method.key}: {text}", stacklevel=2)


def acting(method: Method, tk: Tokens, adv: Tensor) -> Tensor:
    """(B, T): the advantage that really acts, I_clip · r · A times the mismatch weight; 0 where masked."""
    force = adv * method.factor(tk, adv)
    if tk.mismatch is not None:
        force = force * tk.mismatch
    return torch.where(tk.mask, force, 0)


def flow(tk: Tokens, force: Tensor, form: str) -> Tensor:
    """(B, T): predicted entropy change per token, entropy_math's `entropy_change`; 0 where masked."""
    return torch.where(tk.mask, entropy_change(tk.stats, force, form), 0)


# ------------------------------------------------------------------------------------------------------------
# 2. Sampling and selection: what is drawn, and which responses enter the update


@dataclass
class MixedCUTS(Method):
    """Half of a group explores: uniform among the likely tokens. [second-hand] 2604.18493.

        S = {v in TopK(p) : p_v > delta};  y ~ uniform(S);  the first `warm` tokens as usual            (3.26)

    Sampling only: the loss is GRPO's, on the merged group, whose variance is the mean of the halves' plus a
    quarter of the squared difference of their means. p is at temperature 1, whatever the rollout's
    temperature (the loop sets progress.temperature). Empty S: uniform on TopK, or its arg max, as one note
    has it. The true ratio of such a token is p_y |S|; the paper accepts that bias, `correct` weights it away
    up to 2, from rollout_logp = log `behaviour`, and so refuses a second such weight, Tokens.mismatch.
    """

    k: int = 5
    """TopK: how many tokens can be drawn; 9 hurt in the paper"""
    delta: float = 0.03
    """only tokens more probable than this"""
    warm: int = 5
    """tokens of each response that are sampled as usual first"""
    share: float = 0.5
    """share of each group that explores; 0 is plain GRPO"""
    empty: str = "topk"
    """when no token exceeds delta: topk (uniform on the K), argmax"""
    correct: bool = False
    """weight tokens by min(policy / behaviour, 2)"""

    key, place, paper = "mixed_cuts", "sampling", "2604.18493"
    idea = "half of each group samples uniformly among the likely tokens, the rest as usual"
    limits = {"k": COUNT, "delta": SHARE, "warm": POSITIVE, "share": SHARE, "empty": ("topk", "argmax")}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correct:
            self.needs, self.corrects = ("logp", "rollout_logp"), True

    def exploring(self, rows: Tensor) -> Tensor:
        """(B,) bool: which of a prompt's responses explore: `share` of them, evenly spread."""
        return ((rows + 1) * self.share).floor() > (rows * self.share).floor()

    def behaviour(self, logits: Tensor, position: int, rows: Tensor) -> Tensor:
        """(B, V) probabilities that the next token is drawn from; `rows` as in `sample`."""
        p = logits.softmax(-1)
        if position < self.warm:
            return p
        plain = (logits * self.progress.temperature).softmax(-1)  # at temperature 1
        value, index = plain.topk(min(self.k, p.shape[-1]))  # (B, K)
        inside = value > self.delta
        fallback = torch.ones_like(inside)
        if self.empty == "argmax":
            fallback[:, 1:] = False
        inside = torch.where(inside.any(-1, keepdim=True), inside, fallback).to(p.dtype)
        cuts = torch.zeros_like(p).scatter(-1, index, inside / inside.sum(-1, keepdim=True))  # (3.26)
        return torch.where(self.exploring(rows)[:, None], cuts, p)

    def sample(
        self, logits: Tensor, position: int, rows: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor] | None:
        if position < self.warm or self.share == 0:
            return None
        q = self.behaviour(logits, position, rows)
        ids = torch.multinomial(q, 1, generator=generator)
        return ids[:, 0], q.gather(-1, ids)[:, 0].log()

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor | None:
        if tk.rollout_logp is None:
            return None
        policy = tk.logp if tk.old_logp is None else tk.old_logp
        ratio = (policy - tk.rollout_logp).clamp(-20, 20).exp()
        metrics["behaviour_ratio"] = float(masked_mean(ratio, tk.mask))
        return mismatch_weight(policy, tk.rollout_logp, "tis") if self.correct else None


def overlong_penalty(length: Tensor, longest: int, cache: int) -> Tensor:
    """0 up to longest - cache, then linearly to -1 at longest, -1 beyond. (B,) -> (B,). `--reward
    length_penalty` (chapter 4) adds the same without the rest of DAPO."""
    return ((longest - cache - length) / cache).clamp(-1, 0)


@dataclass
class DAPO(Method):
    """Clip-higher, dynamic sampling, overlong shaping. [paper] 2503.14476 §3; [code] verl-recipe `dapo/`.

        keep a prompt iff 0 < #correct < G                    dynamic sampling; the loop refills groups  (3.6)
        R <- R + clip((overlong_max - overlong_cache - len)/overlong_cache, -1, 0)           overlong shaping
        r in [1 - eps_low, 1 + eps_high], eps_high = .28                                     clip-higher

    Groups are filtered by accuracy, not by reward, so a length penalty does not rescue one. verl's shaping
    has no floor at -1 (the same up to overlong_max). `overlong_filter` (in the paper's ablation, not in the
    recipe) drops truncated responses. The length numbers are the paper's: at shorter limits set them. No
    usable group: the loss is 0.
    """

    eps_high: float = 0.28
    """r is clipped from above at 1 + eps_high"""
    dynamic_sampling: bool = True
    """drop prompts that all or none of the responses solve"""
    overlong: bool = True
    """penalise responses that come near the length limit"""
    overlong_max: int = 20480
    """length limit of the shaping, tokens"""
    overlong_cache: int = 4096
    """the penalty starts so many tokens before the limit"""
    overlong_filter: bool = False
    """drop truncated responses from the loss"""

    key, place, paper = "dapo", "selection", "2503.14476"
    idea = "drop prompts without a contrast, raise the upper clip, punish over-long responses"
    needs = ("logp", "reward", "group")
    refill = True
    limits = {"overlong_max": COUNT, "overlong_cache": COUNT}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlong and self.overlong_cache > self.overlong_max:
            raise ValueError(
                f"dapo: overlong_cache={self.overlong_cache} is above overlong_max={self.overlong_max} and "
                "punishes even an empty response: give a smaller overlong_cache, or overlong=false"
            )
        if self.overlong_filter:
            self.needs = (*self.needs, "truncated")

    def select(self, tk: Tokens) -> Tensor | None:
        keep = torch.ones(tk.mask.shape[0], dtype=torch.bool, device=tk.mask.device)
        if self.dynamic_sampling:
            rate = group_mean(tk.solved.float(), tk.group)
            keep = (rate > 0) & (rate < 1)
        return keep & ~tk.truncated.bool() if self.overlong_filter else keep

    def shape(self, tk: Tokens) -> Tensor:
        if not self.overlong:
            return tk.reward
        return tk.reward + overlong_penalty(tk.lengths, self.overlong_max, self.overlong_cache)


@dataclass
class Entrocraft(Method):
    """Keep the responses that move entropy towards a falling band. [paper] 2604.26326 Alg. 1; [code].

        s = I[H > hi] - I[H < lo];   keep response i iff s A_i >= 0;   mean over what is kept           (3.17)
        lo goes from `start` to `end` along the run, hi = lo + width

    H low: only A <= 0 teaches, which raises it; H high: only A >= 0. In the band, edges included, GRPO.
    `released`: the code does not filter but swaps the estimator, H > hi: A = max(R, 0) (RAFT++), H < lo: A =
    min(R, 0) (NSR), and its rows stay in the denominator. Rewards in {0, 1} would switch its second branch
    off, so R here is +1 for a correct and -1 for an incorrect response. Paper: (.6, .7) -> (.1, .2), linear.
    """

    start: float = 0.6
    """lower edge of the entropy band at the start, nats"""
    end: float = 0.1
    """lower edge at the end of the run, nats"""
    width: float = 0.1
    """width of the band, nats"""
    schedule: str = "linear"
    """how the band falls: linear, cosine, fixed (stays at start)"""
    variant: str = "paper"
    """paper (drop responses), released (other advantages)"""

    key, place, paper = "entrocraft", "selection", "2604.26326"
    idea = "outside an entropy band, keep only the responses that push entropy back into it"
    needs = ("logp", "entropy")
    limits = {"width": POSITIVE, "schedule": ("linear", "cosine", "fixed"), "variant": ("paper", "released")}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant == "released":
            self.needs = ("logp", "entropy", "reward")

    def band(self) -> tuple[float, float]:
        """(lo, hi), nats, at this step."""
        x = self.progress.step / max(self.progress.total, 1)
        x = {"linear": x, "cosine": (1 - math.cos(math.pi * x)) / 2, "fixed": 0.0}[self.schedule]
        low = self.start + (self.end - self.start) * x
        return low, low + self.width

    def side(self, tk: Tokens) -> int:
        """s of (3.17), from the entropy of all responses: +1 too much, -1 too little, 0 in the band."""
        h, (low, high) = float(masked_mean(tk.entropy, tk.every)), self.band()
        return int(h > high) - int(h < low)

    def select(self, tk: Tokens) -> Tensor | None:
        s = self.side(tk)
        if self.variant == "released" or s == 0:
            return None
        return s * torch.where(tk.mask, self.advantage(tk), 0).sum(-1) >= 0

    def advantage(self, tk: Tokens) -> Tensor:
        s = self.side(tk) if self.variant == "released" else 0
        if s == 0:
            return super().advantage(tk)
        sign = 2 * tk.solved.to(tk.logp.dtype) - 1
        return (sign * s).clamp(min=0)[:, None].expand(tk.mask.shape) * s

    @property
    def own_advantage(self) -> bool:
        return self.variant == "released"


# ------------------------------------------------------------------------------------------------------------
# 3. Weight: how much each token's advantage counts.  First the baselines, then the weights


@dataclass
class WReinforce(Method):
    """REINFORCE on +lam and -1. [paper] 2506.01347; [code] TianHongZXY/RLVR-Decomposed.

        A = lam if the response is correct, -1 if not; no baseline, no division                         (3.11)

    Failures teach in full, successes a little: PAR with a fixed lambda and without a baseline. lam = 1 is
    REINFORCE on rewards ±1. Uses `correct`, so the reward's convention ({0, 1} or ±1) does not matter.
    """

    lam: float = 0.1
    """advantage of a correct response"""

    key, place, paper = "w_reinforce", "weight", "2506.01347"
    idea = "advantage +lam for right and -1 for wrong responses, no baseline"
    needs = ("logp", "reward")
    limits = {"lam": POSITIVE}

    def advantage(self, tk: Tokens) -> Tensor:
        minus = -torch.ones_like(tk.logp)
        return torch.where(tk.solved[:, None], self.lam, minus)


@dataclass
class PSR(Method):
    """Positive-sample reinforcement: A = 1 on correct responses, the others leave the batch (3.11). [code].

    The mean runs over the kept rows. Per step it sharpens the policy most: the paper's negative control.
    """

    key, place, paper = "psr", "selection", "2506.01347"
    idea = "learn from right responses only: sharpens most per step"
    needs = ("logp", "reward")
    sign = 1

    def select(self, tk: Tokens) -> Tensor:
        return tk.solved == (self.sign > 0)

    def advantage(self, tk: Tokens) -> Tensor:
        return torch.full_like(tk.logp, self.sign)


@dataclass
class NSR(PSR):
    """Negative-sample reinforcement: A = -1 on incorrect responses, the others leave (3.11). [code].

    Parallel to w_reinforce with lam = 0, but larger: the mean runs over the kept rows.
    """

    key, sign = "nsr", -1
    idea = "learn from wrong responses only: keeps entropy, learns slowly"


@dataclass
class DrGRPO(Method):
    """GRPO without its two divisions. [paper] 2503.20783; [code] understand-r1-zero `train_zero_math.py`.

        A = R - mean of the group,    L = Σ l / (B · norm)                                              (3.21)

    Dividing by the group's deviation favours very easy and very hard prompts, dividing by a response's length
    favours long wrong answers. norm is a constant, so a token's gradient depends neither on its response's
    length nor on the padding. verl without `loss_scale_factor` divides by the padded length, which does.
    """

    aggregation: str = "seq_sum_norm"
    """how token losses become one number"""
    norm: float | None = None
    """constant length, tokens; none: the longest that sampling allows, outside a loop 3000 (the paper's)"""

    key, place, paper = "dr_grpo", "weight", "2503.20783"
    idea = "no division by the group's standard deviation, none by the response's length"
    normalize = "none"
    limits = {"norm": ABOVE}

    @property
    def loss_norm(self) -> float | None:
        return self.norm or self.progress.max_length or 3000.0


def group_quantile(reward: Tensor, group: Tensor, K: float, interpolation: str = "lower") -> Tensor:
    """(B,): the K-quantile of each row's group, inf{x : F(x) >= K}, or interpolated linearly."""
    index, size = group_index(group)
    order = reward.argsort(stable=True)
    order = order[index[order].argsort(stable=True)]  # by group, then by reward
    start, value = size.cumsum(0) - size, reward[order]
    if interpolation == "lower":
        rank = ((K * size.double() - 1e-9).ceil().long() - 1).clamp(min=0)  # float32 has K n > .6 · 50
        return value[start + rank][index]
    x = K * (size.double() - 1)
    low, high = value[start + x.floor().long()], value[start + x.ceil().long()]
    return (low + (high - low) * (x - x.floor()).to(low.dtype))[index]


@dataclass
class QAE(Method):
    """A quantile as the baseline instead of the mean. [paper] 2509.22611 §3-5.

        A = (R - Q_K)/(std + 1e-6),   Q_K = inf{x : F(x) >= K} within the group                         (3.23)

    Binary rewards: success rate <= 1 - K gives baseline 0, only successes teach; otherwise baseline 1, only
    failures. Paper: K = .4 with clip-higher, .6 when entropy collapses. Its README interpolates the quantile
    (`linear`), which gives a fractional baseline near the switch. A does not sum to 0. Equal rewards: A = 0.
    """

    K: float = 0.4
    """level of the quantile; larger never lowers the baseline"""
    interpolation: str = "lower"
    """quantile rule: lower (paper), linear (README)"""

    key, place, paper = "qae", "weight", "2509.22611"
    idea = "quantile baseline: on hard prompts only successes teach, on easy ones only failures"
    needs = ("logp", "reward", "group")
    limits = {"K": SHARE, "interpolation": ("lower", "linear")}

    def advantage(self, tk: Tokens) -> Tensor:
        r = tk.reward if tk.reward.dtype == torch.float64 else tk.reward.float()
        index, size = group_index(tk.group)
        n = size[index].to(r.dtype)
        var = group_mean((r - group_mean(r, tk.group)) ** 2, tk.group) * n / (n - 1).clamp(min=1)
        gap = r - group_quantile(r, tk.group, self.K, self.interpolation)  # (3.23)
        return (gap / (var.sqrt() + 1e-6))[:, None].expand(tk.mask.shape)


@dataclass
class PAR(Method):
    """Positive-advantage reweighting: hold the rewarded tokens back. [second-hand] 2511.05993 eq. 3-5.

        w = λ where A > 0, 1 elsewhere                                                                  (3.10)
        entropy   λ <- clip(λ - delta, 0, 1) if H < target else clip(λ + delta, 0, 1), from lam
        stage     λ = 0 in the first half of the run, then linearly 0 -> 1
        epoch     λ = (e - 1)/(E - 1) in epoch e = 1..E;  1 if E = 1
        constant  λ = lam

    λ = 1 is GRPO, λ = 0 learns from failures only. The paper recommends `entropy`, with target .2, delta .05,
    λ_0 = 0. The weight on the loss equals a weight on the advantage: the surrogate is homogeneous in A.
    """

    schedule: str = "entropy"
    """what moves lambda: entropy, stage, epoch, constant"""
    lam: float = 0.0
    """lambda of `constant`, and where `entropy` starts"""
    delta: float = 0.05
    """by how much `entropy` moves lambda at each step"""
    target: float = 0.2
    """entropy, nats, below which `entropy` lowers lambda"""
    epochs: int = 10
    """E of `epoch`: the run is cut into so many equal epochs"""

    key, place, paper = "par", "weight", "2511.05993"
    state = {"current": "lam"}
    idea = "multiply positive advantages by a lambda in [0, 1] that follows the entropy"
    needs = ("logp", "entropy")
    limits = {
        "schedule": ("entropy", "stage", "epoch", "constant"), "lam": SHARE, "delta": SHARE,
        "target": POSITIVE, "epochs": COUNT,
    }  # fmt: skip

    def now(self) -> float:
        """λ of the coming update."""
        x = self.progress.step / max(self.progress.total, 1)
        if self.schedule == "stage":
            return min(max(2 * x - 1, 0.0), 1.0)
        if self.schedule == "epoch":
            last, total = self.epochs - 1, max(self.progress.total, 1)  # in integers: .58 · 50 is below 29
            return min(self.progress.step * self.epochs // total, last) / last if last else 1.0
        return self.current if self.schedule == "entropy" else self.lam

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        metrics["lam"] = self.now()
        return torch.where(adv > 0, self.now(), torch.ones_like(adv))

    def after_step(self, plan: Plan) -> None:
        if self.schedule == "entropy":
            move = -self.delta if plan.entropy < self.target else self.delta
            self.current = min(max(round(self.current + move, 12), 0.0), 1.0)


@dataclass
class RandPosClip(Method):
    """The control for Clip-Cov: drop random tokens with A > 0. [second-hand] 2511.05993 §7.3.

        w = 0 on n = max(⌊ratio · N⌋, 1) tokens with A > 0 drawn uniformly, 1 elsewhere                 (3.10)

    It performs like Clip-Cov, so the covariance may not be the point. Its fraction is unknown: Clip-Cov's.
    """

    ratio: float = 2e-4
    """share of the batch's tokens that is dropped (the paper does not say)"""

    key, place, paper = "rand_pos_clip", "weight", "2511.05993"
    idea = "drop a random few of the tokens with positive advantage: the control for Clip-Cov"
    limits = {"ratio": SHARE}

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        return self.drop(tk, tk.mask & (adv > 0), self.ratio, metrics)

    def drop(self, tk: Tokens, eligible: Tensor, ratio: float, metrics: dict[str, float]) -> Tensor:
        """(B, T): 0 on a share `ratio` of all tokens, drawn among the eligible ones, 1 elsewhere."""
        n = fraction_count(self, ratio, int(tk.mask.sum()))
        picked = top(token_keys(tk, self.progress), eligible, n)
        metrics.update(eligible=int(eligible.sum()), selected=int(picked.sum()))
        return torch.where(picked, 0.0, 1.0)


@dataclass
class ClipCov(RandPosClip):
    """Drop a few tokens of high covariance of A and log p. [paper] 2505.22617 eq. 10-12; [code] verl.

        c = (A - mean A)(log p - mean log p)                                                             (3.7)
        E = {lb < c < ub, not already removed by the PPO clip};  n = max(⌊ratio · N⌋, 1)
        w = 0 on min(n, |E|) tokens of E drawn uniformly, 1 elsewhere

    High c means confident positives and rare negatives: both lower H, so dropping some of them slows the
    collapse. The draw is random, not a top-k, and lb and ub are absolute numbers. Released code takes means
    and draws per micro-batch and rank with a floor of one token *each*; its scripts set eps_low = eps_high =
    1. Paper: ratio 2e-4, which needs a batch of 5,000 tokens to mean anything. All A equal: nothing happens.
    """

    ratio: float = 2e-4
    """share of the batch's tokens that is dropped; small batches need more, about .02"""
    lb: float = 1.0
    """only tokens with a covariance above lb can be dropped"""
    ub: float = 5.0
    """only tokens with a covariance below ub can be dropped"""
    anneal: bool = False
    """let ratio fall to 0 over the run (2604.09676: annealed, the final policy is unbiased)"""

    key, paper = "clip_cov", "2505.22617"
    idea = "drop a random few of the tokens whose covariance of advantage and log-prob is high"

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        cov = covariance(tk, adv)
        eligible = tk.mask & (cov > self.lb) & (cov < self.ub) & (self.factor(tk, adv) != 0)
        left = 1 - self.progress.step / max(self.progress.total, 1) if self.anneal else 1.0
        return self.drop(tk, eligible, self.ratio * left, metrics)


@dataclass
class HighEntropyTokens(Method):
    """80/20: only the tokens where the policy hesitates. [paper] 2506.01939 eq. 6; [code].

        S = the k = max(1, ⌈rho · N⌉) tokens of largest H, ties drawn at random;  L = Σ_S l / |S|      (3.9)

    The denominator is the kept count; penalties still see every token. Ties are common: all responses to a
    prompt begin in one state. Released code selects per micro-batch, ties to the lower index. TRL and
    ms-swift keep H >= an interpolated quantile and divide by N: a smaller loss. Only the ranks of H matter.
    """

    rho: float = 0.2
    """share of tokens that is kept; 1 is plain GRPO"""

    key, place, paper = "high_entropy_tokens", "weight", "2506.01939"
    idea = "train only on the 20 % of tokens with the highest entropy"
    needs = ("logp", "entropy")
    limits = {"rho": (1e-9, 1)}

    def keep(self, tk: Tokens, adv: Tensor) -> Tensor:
        n = int(tk.mask.sum())
        k = fraction_count(self, self.rho, n, math.ceil(self.rho * n))
        return top(tk.entropy, tk.mask, k, token_keys(tk, self.progress))


@dataclass
class EntropyAdvantage(Method):
    """Credit uncertain tokens. [paper] 2506.14758 §3-4.

        A' = A + min(alpha · H, |A| / kappa),   as a weight  w = A'/A                                   (3.12)

    Always added: amplifies A > 0, weakens A < 0 by at most |A|/kappa; kappa >= 1 keeps the sign. It rewards
    reasoning at forks and does not aim at more entropy (the reported end entropy is below the baseline's).
    Paper: alpha .4 for GRPO.
    """

    alpha: float = 0.4
    """advantage per nat of entropy; 0 is plain GRPO"""
    kappa: float = 2.0
    """the bonus is at most |A| / kappa"""

    key, place, paper = "entropy_advantage", "weight", "2506.14758"
    idea = "add a bonus for the token's entropy to its advantage, capped at half of it"
    needs = ("logp", "entropy")
    limits = {"alpha": POSITIVE, "kappa": COUNT}

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        bonus = torch.minimum(self.alpha * tk.entropy, adv.abs() / self.kappa)
        return torch.where(adv == 0, 1, 1 + bonus / torch.where(adv == 0, 1, adv))


@dataclass
class STEER(Method):
    """Shrink the tokens that move entropy most, either way. [second-hand] 2510.10150 eq. 6-9; [code] STEER.

        Ω = -I_clip r A p (1 - p)(log p + H)                                                    theorem (3.13)
        M = |(A/π_old) p (1 - p)(log p + H)|  = |Ω| / p on-policy, without I_clip               released
        exp      w = exp(-a |Ω| / max |Ω|),  a = -ln(lambda_min)
        linear   w = w_max - (M - min M)/(max M - min M) (w_max - lambda_min);  all equal: the midpoint

    Released code divides by max(max M, .02), has lambda_min = .8 (paper .7; the default follows), takes min
    and max over micro-batches of 8 responses and H from the old policy. `exact` puts the true first-order
    change A T in the place of Ω. With one outlier as the maximum, most weights lie within 1 % of 1: watch
    weight_std. Where max |Ω| = 0, w = 1.
    """

    form: str = "theorem"
    """the entropy score: theorem (paper), released (the code's), exact (the true first-order change)"""
    map: str = "exp"
    """score to weight: exp (at most 1), linear (lambda_min to w_max)"""
    lambda_min: float | None = None
    """the smallest weight; none: .7 (paper) for form=theorem and exact with map=exp, else .8 (released)"""
    w_max: float = 1.2
    """the largest weight of the linear map"""

    key, place, paper = "steer", "weight", "2510.10150"
    idea = "the more a token would move entropy, the smaller its weight"
    needs = ("logp", "entropy")
    limits = {
        "form": ("theorem", "released", "exact"), "map": ("exp", "linear"), "lambda_min": (1e-6, 1),
        "w_max": COUNT,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "exact":
            self.needs = FLOW

    @property
    def lowest(self) -> float:
        """The smallest weight."""
        released = self.form == "released" or self.map == "linear"
        return self.lambda_min if self.lambda_min is not None else 0.8 if released else 0.7

    def omega(self, tk: Tokens, adv: Tensor) -> Tensor:
        """|Ω|, (B, T)."""
        if self.form == "released":  # A/π_old · p (1-p) u = r A (1-p) u
            return flow(tk, adv * log_ratio(tk.logp, tk.old_logp).exp(), "steer_released").abs()
        name = {"theorem": "steer_theorem", "exact": "exact"}[self.form]
        return flow(tk, acting(self, tk, adv), name).abs()

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        omega = self.omega(tk, adv)  # (B, T)
        high = float(omega.max()) if omega.numel() else 0.0
        if self.map == "exp":
            scale = max(high, 0.02) if self.form == "released" else high
            return torch.exp(math.log(self.lowest) * omega / scale) if scale > 0 else torch.ones_like(omega)
        low = float(torch.where(tk.mask, omega, math.inf).min())
        if not low < high:
            return torch.full_like(omega, (self.w_max + self.lowest) / 2)
        return self.w_max - (omega - low) / (high - low) * (self.w_max - self.lowest)


@dataclass
class OPEFO(Method):
    """Balance what raises H in the batch against what lowers it. [second-hand] 2605.11491 eq. 6-9.

        f = A T,  T = C - p (log p + H)              exact: the true first-order change, our default    (3.14)
        f = -A (1 - p)² (log p + H)                  paper: the integrand of its Eq. 6 at the sampled token
        f = -A p (1 - p)(log p + H)                  theorem: STEER's form
        P = Σ_{f>0} f,   Q = Σ_{f<0} |f|
        λ = (Q - P)/(Q + P)  (+ gain (target - H)/target + integral Σ past errors),  clamped to [-1, 1]
        w = 1 + λ where f > 0,  1 - λ where f < 0,  1 where f = 0      =>     Σ w f = 0 without a target

    The paper's f keeps only the diagonal of the softmax Jacobian and one factor p too few: rare tokens
    dominate it, and on the embedded task it drives entropy up until the reward is gone (λ about .5); hence
    `exact` is the default. Balance alone has no memory of where entropy should be and drifts; a target gives
    it one, entropy_math (6.2). No code is released; the per-token reading of Eq. 6 is inferred.
    Controls: `sides` plus or minus weights only one side, `lam` fixes λ (0 is GRPO), `shuffled_sign` deals
    the same weights to random tokens. P + Q = 0 gives λ = 0; one empty side gives λ = ±1, which switches the
    other side off (metric lam shows it). While λ is clamped, Σ takes up no error that pushes further. λ is
    invariant to A -> sA, s > 0, and changes sign with A. Off-policy, f has the acting advantage I_clip r A.
    """

    form: str = "exact"
    """a token's entropy change: exact, paper (over-corrects), theorem"""
    sides: str = "both"
    """which tokens get a weight: both, plus (entropy-raising only), minus (entropy-lowering only)"""
    target_entropy: float | None = None
    """set point of the token-mean entropy, nats; none: pure balance, the paper's rule"""
    gain: float = 2.0
    """strength of the pull to target_entropy; 0: pure balance"""
    integral: float = 0.0
    """weight of the sum of past relative errors, which removes the offset; needs target_entropy and gain"""
    lam: float | None = None
    """a static lambda instead of the computed one; 0 is plain GRPO; none: computed"""
    shuffled_sign: bool = False
    """control: the same weights, dealt to random tokens"""

    key, place, paper = "opefo", "weight", "2605.11491"
    state = {"error_sum": 0.0}
    idea = "weight entropy-raising and entropy-lowering tokens so that their flows cancel, or hold a target"
    needs = FLOW
    last = True  # in a composition it balances what the others leave
    limits = {
        "form": ("exact", "paper", "theorem"), "sides": ("both", "plus", "minus"), "target_entropy": ABOVE,
        "gain": POSITIVE, "integral": POSITIVE, "lam": (-1, 1),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.integral and (self.target_entropy is None or self.gain == 0):
            raise ValueError(
                f"opefo: integral={self.integral} sums errors to target_entropy={self.target_entropy} at "
                f"gain={self.gain}: give a target_entropy and a gain above 0"
            )
        if self.form != "exact":
            self.needs = ("logp", "entropy")

    def flow(self, tk: Tokens, adv: Tensor) -> Tensor:
        """f of (3.14), (B, T), times each token's share in the aggregation: the flow of the real loss."""
        name = {"exact": "exact", "paper": "opefo", "theorem": "steer_theorem"}[self.form]
        f = flow(tk, acting(self, tk, adv), name)
        if self.aggregation in ("token_mean", "token_sum"):
            return f
        return f * self.coefficients(tk.mask, f.dtype)

    def _lambda(self, f: Tensor, entropy: float) -> float:
        if self.lam is not None:
            return self.lam
        rising, falling = f.clamp(min=0).sum(dtype=torch.float64), -f.clamp(max=0).sum(dtype=torch.float64)
        if self.target_entropy is None or self.gain == 0:
            return set_point_lambda(rising, falling)
        past = self.integral * self.error_sum / self.gain  # adds integral · Σ errors to λ
        entropy -= self.target_entropy * past
        return set_point_lambda(rising, falling, entropy, self.target_entropy, self.gain)

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        f = self.flow(tk, adv)
        lam = self._lambda(f, metrics["batch_entropy"])
        w = 1 + lam * f.sign()  # (B, T)
        if self.sides != "both":
            w = torch.where(f > 0 if self.sides == "plus" else f < 0, w, 1)
        if self.shuffled_sign:
            w = shuffle(w, tk, self.progress)
        metrics["lam"] = lam
        return w

    def after_step(self, plan: Plan) -> None:
        if self.target_entropy is not None:
            error, lam = (self.target_entropy - plan.entropy) / self.target_entropy, plan.metrics["lam"]
            if abs(lam) < 1 or error * lam < 0:  # where λ is clamped the sum does not wind up further
                self.error_sum += error


def shuffle(w: Tensor, tk: Tokens, progress: Progress) -> Tensor:
    """The values of w on the tokens of the mask, dealt out anew at random; the same multiset."""
    where = tk.mask.flatten().nonzero()[:, 0]
    source, target = (token_keys(tk, progress, i).flatten()[where].argsort(stable=True) for i in (1, 2))
    out = w.flatten().clone()
    out[where[target]] = w.flatten()[where[source]]
    return out.view(w.shape)


@dataclass
class PAPO(Method):
    """Weigh entropy polarities by the phase. Polarity [second-hand], weights a [reconstruction]: 2605.11775.

        P_t = A T  (the first-order change; A, not I_clip r A);   phi = clip((e_ref - e)/e_ref, -1, 1)  (3.15)
        w = 1 + lam phi where P_t > 0,  1 - lam phi where P_t < 0,  1 where P_t = 0

    phi > 0 says that entropy e has fallen below its reference: raising tokens count more, lowering ones less.
    What is published: the product A T, both branches kept, the empirical entropy trajectory as the signal;
    the rest is ours. The first update has phi = 0. w > 0, so no sign flips.
    """

    lam: float = 0.3
    """largest change of a weight, below 1"""
    reference: str = "ema"
    """what entropy is compared with: ema (.9), first (the first batch), target"""
    target: float = 0.5
    """the reference of reference=target, nats"""
    scaled: bool = False
    """scale lam by |P_t| / max |P_t|"""
    renormalise: bool = False
    """keep the sum of w |A| equal to that of |A|"""

    key, place, paper = "papo", "weight", "2605.11775"
    state = {"e_ref": None}
    idea = "reconstruction: favour entropy-raising tokens while entropy falls, and the reverse"
    needs = FLOW
    limits = {"lam": (0, 0.999), "reference": ("ema", "first", "target"), "target": ABOVE}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.e_ref = self.target if self.reference == "target" else None

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        e = metrics["batch_entropy"]
        phi = 0.0 if self.e_ref is None else min(max((self.e_ref - e) / max(self.e_ref, 1e-9), -1.0), 1.0)
        polarity = flow(tk, adv, "exact")
        lam = self.lam * polarity.abs() / polarity.abs().max().clamp(min=1e-30) if self.scaled else self.lam
        w = 1 + lam * phi * polarity.sign()  # (3.15)
        if self.renormalise:
            total = (w * adv.abs()).sum()
            w = w * adv.abs().sum() / total if total > 0 else w
        metrics["phi"] = phi
        return w

    def after_step(self, plan: Plan) -> None:
        if self.e_ref is None:
            self.e_ref = plan.entropy
        elif self.reference == "ema":
            self.e_ref = 0.9 * self.e_ref + 0.1 * plan.entropy


@dataclass
class CWGRPO(Method):
    """A Gaussian kernel on the covariance. [second-hand, two agreeing notes] 2605.11538 (no code).

        c = (log p - mean log p)(A - mean A);   w = exp(-c²/(2 σ²)),  σ = std of c;   w <- w N / Σ w    (3.16)

    Centred at covariance 0, symmetric: tokens far from it on either side count less. The paper's one group is
    its batch, so the scope of the means is ambiguous; σ is the population deviation (not stated). σ² below
    1e-6 of the mean of c² counts as 0 (two tokens have equal c, up to rounding); σ = 0 or N = 1: w = 1.
    """

    scope: str = "batch"
    """over what means and σ are taken: batch, group"""

    key, place, paper = "cw_grpo", "weight", "2605.11538"
    idea = "Gaussian weight around zero covariance of advantage and log-prob, mean weight 1"
    needs = ("logp", "group")
    limits = {"scope": ("batch", "group")}

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        part = torch.zeros_like(tk.group) if self.scope == "batch" else group_index(tk.group)[0]
        w = torch.ones_like(adv, dtype=torch.float64)
        for g in part.unique():
            inside = tk.mask & (part == g)[:, None]
            c = centred(tk.logp, inside) * centred(adv, inside)
            variance = masked_mean(centred(c, inside) ** 2, inside)
            if variance > 1e-6 * masked_mean(c**2, inside):
                above = c**2 - c[inside].square().min()  # the largest k is 1: their sum cannot underflow
                k = torch.where(inside, torch.exp(-above / (2 * variance)), 0)
                w = torch.where(inside, k * inside.sum() / k.sum(), w)
        return w


@dataclass
class STARE(Method):
    """Amplify surprising successes while entropy is low. [code] hp-luo/STARE; 2606.19236.

        gate = I[e < target]                                                                            (3.18)
        L+ = the ⌈fraction · |T+|⌉ tokens of largest surprisal -log p among T+ = {A > 0};  L- same for A < 0
        w = W on L+,  M on L- (variant C2 only),  1 elsewhere;  all 1 if the gate is closed
        adaptive: W <- clip(W + rate s, 1, 1.5),  M <- clip(M - rate s, .5, 1),  s = sgn(target - e), after

    Released code selects per micro-batch. 14B and 32B models: 1.05 and .95. Default: O1, not adaptive.
    """

    fraction: float = 0.1
    """share of the tokens of each sign that is selected"""
    up: float = 1.1
    """W, weight of surprising tokens with A > 0"""
    down: float = 0.9
    """M, weight of surprising tokens with A < 0, variant C2"""
    target: float = 0.3
    """the gate is open while entropy is below it, nats"""
    variant: str = "O1"
    """O1 (only A > 0), C2 (both signs)"""
    adaptive: bool = False
    """let W and M follow the entropy"""
    rate: float = 0.01
    """step of the adaptive W and M"""

    key, place, paper = "stare", "weight", "2606.19236"
    state = {"W": "up", "M": "down"}
    idea = "below an entropy target, amplify the most surprising tokens with positive advantage"
    needs = ("logp", "entropy")
    limits = {"fraction": SHARE, "up": COUNT, "down": SHARE, "variant": ("O1", "C2"), "rate": POSITIVE}

    def _surprising(self, tk: Tokens, side: Tensor) -> Tensor:
        n = int(side.sum())
        k = fraction_count(self, self.fraction, n, math.ceil(self.fraction * n))
        return top(-tk.logp, side, k, token_keys(tk, self.progress))

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor | None:
        gate = metrics["batch_entropy"] < self.target
        metrics.update(gate=float(gate), W=self.W, M=self.M)
        if not gate:
            return None
        w = torch.where(self._surprising(tk, tk.mask & (adv > 0)), self.W, torch.ones_like(adv))
        if self.variant == "O1":
            return w
        return torch.where(self._surprising(tk, tk.mask & (adv < 0)), self.M, w)

    def after_step(self, plan: Plan) -> None:
        if self.adaptive:
            s = (plan.entropy < self.target) - (plan.entropy > self.target)
            self.W = min(max(self.W + self.rate * s, 1.0), 1.5)
            self.M = min(max(self.M - self.rate * s, 0.5), 1.0)


@dataclass
class EntroPIC(Method):
    """A PI controller on confident tokens. [code] yk7333/EntroPIC `core_algos.py`, `dp_actor.py`; 2511.15248.

        e = H - target;   alpha = clip(kp e + ki S, -1, 1),  S the sum of all earlier e                 (3.19)
        L = agg(clipped surrogate) + alpha · mean over {p > threshold} of (-r |A|)

    Among confident tokens that weighs A > 0 by 1 + alpha and A < 0 by 1 - alpha: too little entropy, alpha <
    0, damps confident successes and amplifies confident failures. The extra term is unclipped. Released code
    has alpha and S per micro-batch and divides by the confident tokens' own number (`own`); with `all` (by N)
    the weights are exactly 1 ± alpha, which lies in [0, 2]; with `own` alpha counts N / N_confident times,
    and where few tokens are confident it turns their sign. No confident token: no term. The config default
    target -1 means off; .1 in the script.
    """

    kp: float = 1.0
    """proportional gain per nat"""
    ki: float = 0.01
    """integral gain per nat and step"""
    threshold: float = 0.95
    """a token is confident above this probability"""
    target: float = 0.1
    """entropy to hold, nats"""
    denominator: str = "own"
    """the extra term is divided by: own (number of confident tokens, as released), all (N)"""

    key, place, paper = "entropic", "weight", "2511.15248"
    state = {"error_sum": 0.0}
    idea = "PI controller: weigh successes and failures among confident tokens to hold an entropy"
    needs = ("logp", "entropy")
    limits = {
        "kp": POSITIVE, "ki": POSITIVE, "threshold": SHARE, "target": ABOVE, "denominator": ("own", "all"),
    }  # fmt: skip

    def mark(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        error = metrics["batch_entropy"] - self.target
        alpha = min(max(self.kp * error + self.ki * self.error_sum, -1.0), 1.0)
        confident = tk.mask & (tk.logp.exp() > self.threshold)
        scope = confident if self.denominator == "own" else tk.mask
        coef = self.coefficients(scope, adv.dtype)
        metrics.update(alpha=alpha, selected=int(confident.sum()))
        touched = confident & (adv != 0) & (alpha != 0)
        metrics["tokens_touched"] = float(masked_mean(touched.float(), tk.mask))
        return {"extra": torch.where(confident, alpha * coef, 0)}

    def penalty(self, tk: Tokens, plan: Plan) -> Tensor:
        loss = -log_ratio(tk.logp, tk.old_logp).exp() * plan.adv.abs()
        return weighted_sum(loss if tk.mismatch is None else loss * tk.mismatch, plan.marks["extra"])

    def after_step(self, plan: Plan) -> None:
        self.error_sum += plan.entropy - self.target


@dataclass
class AEM(Method):
    """Scale a response's A by how certain it is. Theory [second-hand], formula [reconstruction]: 2605.00425.

        h_i = mean H of response i, min-max scaled over the batch;  g_i = exp(-k h_i)/mean exp(-k h)  (3.25)

    In the style of EMPG (2509.09265); the paper's scaling is not known. Confident failures are pushed harder,
    which raises H; confident successes too, which lowers it: exploring early, when failures dominate,
    exploiting late. All h equal: g = 1.
    """

    k: float = 1.0
    """strength; 0 is plain GRPO"""

    key, place, paper = "aem", "weight", "2605.00425"
    idea = "reconstruction: responses of low mean entropy count more, whatever their sign"
    needs = ("logp", "entropy")
    limits = {"k": POSITIVE}

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        some = tk.mask.any(-1)
        h = torch.where(tk.mask, tk.entropy, 0).sum(-1).double() / tk.lengths.clamp(min=1)  # (B,)
        low = torch.where(some, h, math.inf).min()
        span = torch.where(some, h, -math.inf).max() - low
        g = torch.exp(-self.k * (h - low) / span) if span > 0 else torch.ones_like(h)
        return (g / masked_mean(g, some))[:, None].expand(adv.shape)


# ------------------------------------------------------------------------------------------------------------
# 4. Ratio: the shape of the surrogate in r = π/π_old.  With one update per rollout r = 1 and most do nothing


class FromFactor(Method):
    """A method whose surrogate is given by its gradient, `factor` · A: -factor · A · (π / sg π), (B, T)."""

    def surrogate(self, tk: Tokens, plan: Plan) -> Tensor:
        once = (tk.logp - tk.logp.detach()).exp()  # value 1
        return -self.factor(tk, plan.adv, plan.marks) * plan.adv * once


@dataclass
class ClipHigher(Method):
    """More room upwards: eps_high .28. [paper] 2503.14476 §3.1.

        r in [1 - eps_low, 1 + eps_high]                                                                 (3.6)

    The upper clip stops rare tokens from rising: 1 + eps bounds p_new/p_old, so a token at .01 may add .002
    and one at .9 may add .1. Lower clips raise entropy, upper ones lower it, at random rewards too
    (2509.26114).
    """

    eps_high: float = 0.28
    """r is clipped from above at 1 + eps_high"""

    key, place, paper = "clip_higher", "ratio", "2503.14476"
    idea = "a higher upper clip lets rare successful tokens rise further"
    on_policy = False


@dataclass
class CISPO(Method):
    """Clip the importance weight, not the gradient. [paper] 2506.13585 eq. 4-5.

        l = -sg(clip(r, 1 - eps_low, 1 + eps_high)) A log π                                             (3.20)

    Every token keeps a gradient, of weight min(r, cap). The paper has no lower bound in practice (eps_low = 1
    here) and does not disclose eps_high; TRL's example caps r at 5, which is our default 1 + 4 (TRL's
    epsilon_high *is* the cap, verl's is cap - 1). Inside the range the gradient is PPO's, the value not.
    """

    eps_low: float = 1.0
    """r is clipped from below at 1 - eps_low; 1: not at all"""
    eps_high: float = 4.0
    """r is clipped from above at 1 + eps_high (the paper's value is not public)"""

    key, place, paper = "cispo", "ratio", "2506.13585"
    idea = "clipped importance weight times log-prob: no token loses its gradient"
    on_policy = False
    without = ("dual_clip",)

    def factor(self, tk: Tokens, adv: Tensor, marks: dict[str, Tensor] | None = None) -> Tensor:
        return log_ratio(tk.logp, tk.old_logp).exp().detach().clamp(1 - self.eps_low, 1 + self.eps_high)

    def surrogate(self, tk: Tokens, plan: Plan) -> Tensor:
        return -self.factor(tk, plan.adv) * plan.adv * tk.logp  # (3.20)


@dataclass
class GSPO(Method):
    """One ratio per response. [paper] 2507.18071; [code] verl core `gspo`.

        s_i = exp(mean_t log r_it),   l_i = max(-s_i A, -clip(s_i, 1 - eps_low, 1 + eps_high) A)        (3.22)

    Written per token, log s_it = log π - sg(log π) + sg(log s_i) (at most 10), it has the same gradient, -s_i
    A/(B len_i) per token, under the sequence aggregation, and all tokens of a response are clipped together.
    s_i is of the whole response, also where a method of the composition keeps only some of its tokens. With
    one update per rollout only that aggregation differs from GRPO.
    """

    eps_low: float = 3e-4
    """s is clipped from below at 1 - eps_low"""
    eps_high: float = 4e-4
    """s is clipped from above at 1 + eps_high"""
    aggregation: str = "seq_mean_token_mean"
    """how token losses become one number"""

    key, place, paper = "gspo", "ratio", "2507.18071"
    idea = "clip the response's mean ratio instead of each token's"
    on_policy = False
    without = ("dual_clip",)

    def _log_s(self, tk: Tokens) -> Tensor:
        """(B, 1), detached."""
        x = torch.where(tk.every, log_ratio(tk.logp, tk.old_logp), 0).detach()
        return (x.sum(-1, keepdim=True) / tk.every.sum(-1, keepdim=True).clamp(min=1)).clamp(max=10)

    def factor(self, tk: Tokens, adv: Tensor, marks: dict[str, Tensor] | None = None) -> Tensor:
        s = self._log_s(tk).expand(adv.shape)
        return clip_factor(s, torch.zeros_like(s), adv, self.eps_low, self.eps_high)

    def surrogate(self, tk: Tokens, plan: Plan) -> Tensor:
        s = tk.logp - tk.logp.detach() + self._log_s(tk)  # (B, T), log s_it
        return clipped_surrogate(s, torch.zeros_like(s), plan.adv, self.eps_low, self.eps_high)


@dataclass
class CEGPPO(FromFactor):
    """Give clipped tokens a bounded gradient back. [code] Kwai-Klear/CE-GPPO; 2509.20712.

        A < 0, r < 1 - eps_low:   l = -b1 (1 - eps_low) (r/sg r) A      rare failures: lowers H         (3.27)
        A > 0, r > 1 + eps_high:  l = -b2 (1 + eps_high) (r/sg r) A     rare successes: raises H
        else:                     l = -r A;    then dual clip

    b1 = b2 = 0 has PPO's gradient (the values differ); b2 = 1 makes the gradient continuous at 1 + eps_high.
    (b1, b2) = (.75, 1) for 7B, (.5, 1) for 1.5B, the config has (.25, 1).
    """

    b1: float = 0.75
    """gradient kept below 1 - eps_low, for A < 0"""
    b2: float = 1.0
    """gradient kept above 1 + eps_high, for A > 0"""
    dual_clip: float | None = 10.0
    """for A < 0 the loss is at most -c A"""

    key, place, paper = "ce_gppo", "ratio", "2509.20712"
    idea = "tokens that PPO clips keep a bounded share of their gradient"
    on_policy = False
    limits = {"b1": POSITIVE, "b2": POSITIVE}

    def factor(self, tk: Tokens, adv: Tensor, marks: dict[str, Tensor] | None = None) -> Tensor:
        r = log_ratio(tk.logp, tk.old_logp).exp().detach()
        f = torch.where((adv < 0) & (r < 1 - self.eps_low), self.b1 * (1 - self.eps_low), r)
        f = torch.where((adv > 0) & (r > 1 + self.eps_high), self.b2 * (1 + self.eps_high), f)
        return dual_clip_factor(f, adv, self.dual_clip)


def dual_clip_factor(f: Tensor, adv: Tensor, c: float | None) -> Tensor:
    """The dual clip min(l, -c A) for A < 0 on a surrogate l = -f A: no gradient where f > c."""
    return f if c is None else torch.where((adv < 0) & (f > c), 0, f)


@dataclass
class HTPO(FromFactor):
    """Eight rules for eight kinds of tokens. [code] xcyao00/HTPO `core_algos.py`; 2605.08283.

    Prompt hard iff group accuracy < hard; token high iff H >= the max(⌊high · len⌋, 1)-th largest of its own
    response; id = exp(log π - sg log π).                                                              (3.24)

        hard, correct, low     PPO; drop H below the max(⌊low_drop · n⌋, 1)-th smallest of these n tokens
        hard, correct, high    -r A;  r > 1 + eps_high: +(1 + eps_high) A id;  r < 1 - eps_low: -(1/r) A id
        wrong, high            -r A;  r < 1 - eps_low: +(1 - eps_low) A id, which pushes the token back up
        easy, correct, high    PPO; drop the max(⌊high_drop · n⌋, 1) tokens with the largest H
        all others             PPO;    then dual clip everywhere

    1/r, as in the code, grows up to e^20, where `log_ratio` clamps: neither clip bounds it, for A > 0. In the
    code the second row's r < 1 - eps_low branch has a plus sign, which lowers a successful token further and
    looks like a slip: `released_sign` restores it. Its `low` drop is strict, so it removes one token fewer
    than the `high` one. On-policy only the drops act. Here a PPO-clipped token has loss 0, not a constant.
    """

    hard: float = 0.6
    """a prompt is hard if fewer of its responses are right"""
    high: float = 0.2
    """share of a response's tokens that counts as high-entropy"""
    low_drop: float = 0.006
    """share dropped among hard, correct, low-entropy tokens"""
    high_drop: float = 0.02
    """share dropped among easy, correct, high-entropy tokens"""
    released_sign: bool = False
    """reproduce the code's sign in the second rule"""
    eps_high: float = 0.28
    """r is clipped from above at 1 + eps_high"""
    dual_clip: float | None = 10.0
    """for A < 0 the loss is at most -c A"""

    key, place, paper = "htpo", "ratio", "2605.08283"
    idea = "other clip rules by difficulty of the prompt, correctness and entropy of the token"
    needs = ("logp", "entropy", "reward", "group")
    limits = {n: SHARE for n in ("hard", "high", "low_drop", "high_drop")}

    def mark(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        sorted_h = torch.where(tk.mask, tk.entropy, -math.inf).sort(-1, descending=True).values
        k = (self.high * tk.lengths).long().clamp(min=1)
        high = tk.mask & (tk.entropy >= sorted_h.gather(-1, k[:, None] - 1))
        hard = group_mean(tk.solved.double(), tk.group) < self.hard
        return {"high": high, "hard": hard, "correct": tk.solved}

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        m = self.mark(tk, adv, metrics)
        low = (m["hard"] & m["correct"])[:, None] & tk.mask & ~m["high"]
        high = (~m["hard"] & m["correct"])[:, None] & m["high"]
        drop = torch.zeros_like(tk.mask)
        if self.low_drop > 0 and low.any():
            k = max(int(self.low_drop * int(low.sum())), 1)
            drop = low & (tk.entropy < tk.entropy[low].sort().values[k - 1])
        if self.high_drop > 0:
            k = max(int(self.high_drop * int(high.sum())), 1)
            drop = drop | top(tk.entropy, high, k, token_keys(tk, self.progress))
        metrics["selected"] = int(drop.sum())
        return torch.where(drop, 0.0, 1.0)

    def factor(self, tk: Tokens, adv: Tensor, marks: dict[str, Tensor] | None = None) -> Tensor:
        m = marks or self.mark(tk, adv, {})
        r = log_ratio(tk.logp, tk.old_logp).exp().detach()
        above, below = r > 1 + self.eps_high, r < 1 - self.eps_low
        f = clip_factor(tk.logp, tk.old_logp, adv, self.eps_low, self.eps_high)
        wrong = ~m["correct"][:, None] & m["high"]
        f = torch.where(wrong, torch.where(below, -(1 - self.eps_low), r), f)
        second = (m["hard"] & m["correct"])[:, None] & m["high"]
        rule = torch.where(below, (-1 if self.released_sign else 1) / r, r)
        rule = torch.where(above, -(1 + self.eps_high), rule)
        return dual_clip_factor(torch.where(second, rule, f), adv, self.dual_clip)


# ------------------------------------------------------------------------------------------------------------
# 5. Penalty: a term added to the loss


@dataclass
class EntropyBonus(Method):
    """Reward entropy itself. [code] verl `entropy_coeff`, TRL `entropy_coef`.

        L = L_pg - alpha · mean H,     ∂(-alpha H)/∂z_v = alpha p_v (log p_v + H)                        (3.2)

    z are the scaled logits; divide by the temperature for those before it. Pushes every state towards
    uniform, however certain it should be. On a 7B model (2505.22617) alpha 1e-4 and 1e-3 did little, 5e-3
    stabilised without gain, 1e-2 exploded. Early verl and its forks have .001, later ones 0. It needs the
    entropy with its graph (one more backward pass through the vocabulary); alpha = 0 builds no such graph.
    """

    alpha: float = 0.001
    """coefficient of the mean entropy, per nat; negative values are refused"""

    key, place, paper = "entropy_bonus", "penalty", "verl, TRL"
    idea = "add alpha times the entropy to the objective: blunt, and hard to tune"
    needs = ("logp", "entropy")
    limits = {"alpha": POSITIVE}

    @property
    def entropy_grad(self) -> bool:
        return self.alpha != 0

    def penalty(self, tk: Tokens, plan: Plan) -> Tensor | None:
        return -self.alpha * weighted_sum(tk.entropy, plan.coef_all) if self.alpha else None


@dataclass
class AdaptiveEntropy(Method):
    """An entropy bonus that switches itself. [paper] 2505.22312 eq. 3.1-3.2 (Skywork-OR1); [code]; TRL.

        alpha = c I[e <= target];   c <- c + delta if e < target,  c - delta if e > target;  from 0   (3.3)

    c is clipped to [c_min, c_max]. `released` gates with the previous step's entropy (open at the start),
    strictly, and counts equality as above; its scripts have delta .0001 and c in [0, .005]. Its e is the
    sampled -mean log p, ours exact.
    """

    target: float = 0.2
    """entropy below which the bonus acts, nats"""
    delta: float = 0.005
    """step of the coefficient"""
    c_min: float = 0.0
    """smallest coefficient"""
    c_max: float = 1.0
    """largest coefficient (not in the paper; TRL has 1)"""
    variant: str = "paper"
    """paper (gate on this step's entropy), released (on the last one's)"""

    key, place, paper = "adaptive_entropy", "penalty", "2505.22312"
    state = {"c": 0.0, "enabled": True}
    idea = "entropy bonus whose coefficient grows while entropy is below a target"
    needs = ("logp", "entropy")
    limits = {"delta": POSITIVE, "variant": ("paper", "released")}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.c_min > self.c_max:
            raise ValueError(f"adaptive_entropy: c_min={self.c_min} is above c_max={self.c_max}: swap them")
        self.c = min(max(0.0, self.c_min), self.c_max)

    def alpha(self, entropy: float) -> float:
        """The coefficient that acts at this step, given the batch's entropy."""
        gate = self.enabled if self.variant == "released" else entropy <= self.target
        return self.c if gate else 0.0

    @property
    def entropy_grad(self) -> bool:
        return self.c != 0 and (self.enabled or self.variant == "paper")

    def mark(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        metrics["alpha"] = self.alpha(metrics["batch_entropy"])
        return {}

    def penalty(self, tk: Tokens, plan: Plan) -> Tensor | None:
        alpha = self.alpha(plan.entropy)
        return -alpha * weighted_sum(tk.entropy, plan.coef_all) if alpha else None

    def after_step(self, plan: Plan) -> None:
        s = (plan.entropy < self.target) - (plan.entropy > self.target)
        if self.variant == "released":
            self.enabled = plan.entropy < self.target
            s = 1 if self.enabled else -1
        self.c = min(max(self.c + s * self.delta, self.c_min), self.c_max)


@dataclass
class RefKL(Method):
    """Stay near a frozen reference. [paper] 2402.03300 §4.2.

        L = L_pg + beta · mean kl(log π, log π_ref)                                                      (3.4)

    Our default k2 has the gradient of KL(π||π_ref); the paper's k3 has that of the reverse KL, grpo (2.13) to
    (2.16). k1 does not know the reference: its gradient is E[∇log π(y)], which is 0 for y ~ π. In the later
    updates of a rollout y ~ π_old, and it is -∇KL(π_old||π): the step drives the policy on, away from the one
    that sampled, whichever way the reference lies; in a first rollout, π_old = π_ref, away from the
    reference. abs: while π is π_ref, x is rounding, and so is its sign. Metric kl_ref is the mean k3.
    beta: .04 GRPO, .001 DeepSeek-R1 and verl, .05 open-instruct, 0 DAPO and TRL. 2505.22617 saw entropy stay
    and accuracy fall.
    """

    beta: float = 0.04
    """coefficient of the KL term"""
    estimator: str = "k2"
    """k2 (right gradient), k3 (papers), k1 (no pull), abs"""

    key, place, paper = "ref_kl", "penalty", "2402.03300"
    idea = "add beta times the KL to the starting policy"
    needs = ("logp", "ref_logp")
    extra_pass = "reference"
    limits = {"beta": POSITIVE, "estimator": ("k1", "k2", "k3", "abs")}

    def penalty(self, tk: Tokens, plan: Plan) -> Tensor | None:
        if not self.beta:
            return None
        return self.beta * weighted_sum(kl_penalty(tk.logp, tk.ref_logp, self.estimator), plan.coef_all)


@dataclass
class ProRL(RefKL):
    """Reference KL with resets. [paper] 2505.24864 eq. 4, §2.3-3.2; [code] NeMo-RL, OpenRLHF recipes (v2).

        L = L_pg + beta KL(π||π_ref);   at a reset  π_ref <- π,  optimizer state <- 0                    (3.5)

    When: every `every` steps, or after `patience` evaluations in a row without a better score. The paper
    resets when the validation score stagnates and gives neither number, beta nor estimator (verl's: .001, k3;
    v2: 1e-4, k2). It also has clip-higher at .4 and dynamic sampling: `prorl+dapo:eps_high=.4`. TRL's and
    open-instruct's resets keep the optimizer.
    """

    beta: float = 0.001
    """coefficient of the KL term (not given in the paper)"""
    every: int = 0
    """reset every so many steps; 0: by patience"""
    patience: int = 3
    """reset after so many evaluations without a new best score"""

    key, paper = "prorl", "2505.24864"
    state = {"best": -math.inf, "waited": 0}
    idea = "KL to a reference that is moved to the policy, optimizer cleared, when progress stalls"
    limits = {"every": POSITIVE, "patience": COUNT}

    def reset_reference(self, step: int, score: float | None) -> bool:
        if self.every:
            return step > 0 and step % self.every == 0
        if score is None:
            return False
        self.best, self.waited = (score, 0) if score > self.best else (self.best, self.waited + 1)
        if self.waited < self.patience:
            return False
        self.best, self.waited = -math.inf, 0  # the next evaluation starts anew
        return True


class OnPicked(FromFactor):
    """A loss with a penalty, times beta, on some tokens: it is part of their l, with the same denominator."""

    beta: float

    def pick(self, tk: Tokens, picked: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        """What `mark` returns for the picked tokens, (B, T) bool."""
        metrics["selected"] = int(picked.sum())
        metrics["tokens_touched"] = metrics["selected"] / max(int(tk.mask.sum()), 1)
        return {"picked": picked}

    def penalty(self, tk: Tokens, plan: Plan) -> Tensor:
        d = torch.where(plan.marks["picked"], self.distance(tk, plan.marks["picked"]), 0)
        return self.beta * weighted_sum(d, plan.coef)


@dataclass
class KLCov(OnPicked):
    """Hold back the tokens with the highest covariance. [paper] 2505.22617 eq. 13-14; [code] PRIME, verl.

        l = -r A (no clip);  l += beta · d(π, π_old) on the max(1, ⌊ratio · N⌋) tokens of top c (3.7)    (3.8)

    d: abs |log r| (released, default), k2, k3 = r - 1 - log r (estimates KL(π_old||π), as in the paper).
    **With one update per rollout log r is 0 and so is every d's gradient: nothing happens.** If old_logp came
    from a second forward pass, abs would turn its rounding noise into gradients ±beta/N of random sign; so
    before a rollout's first step leave old_logp None, as the loop does. The penalty is part of a token's l:
    it has the surrogate's denominator. All A or all log p equal: nobody is picked. Paper: ratio 2e-3 (7B),
    2e-4 (32B), beta 1. PRIME's 0.2 is in percent; verl's config has ratio 2e-4 and beta 0.1.
    """

    ratio: float = 2e-3
    """share of tokens with the penalty; small batches need more, about .02"""
    beta: float = 1.0
    """coefficient of the penalty; 0 is the unclipped policy gradient"""
    estimator: str = "abs"
    """distance to the old policy: abs, k2, k3"""

    key, place, paper = "kl_cov", "penalty", "2505.22617"
    idea = "KL penalty to the old policy on the few tokens of highest covariance, no clip"
    on_policy = False
    without = ("eps_low", "eps_high", "dual_clip")
    limits = {"ratio": SHARE, "beta": POSITIVE, "estimator": ("abs", "k2", "k3")}

    def mark(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        cov = covariance(tk, adv)
        k = fraction_count(self, self.ratio, int(tk.mask.sum())) if cov.any() else 0
        return self.pick(tk, top(cov, tk.mask, k, token_keys(tk, self.progress)), metrics)

    def factor(self, tk: Tokens, adv: Tensor, marks: dict[str, Tensor] | None = None) -> Tensor:
        return clip_factor(tk.logp, tk.old_logp, adv, 1, math.inf)  # no clip

    def distance(self, tk: Tokens, picked: Tensor) -> Tensor:
        old = tk.logp.detach() if tk.old_logp is None else tk.old_logp
        return kl_penalty(old, tk.logp, self.estimator)  # y ~ π_old: k3 estimates KL(π_old||π)


def proxy_log_prob(logits: Tensor, ids: Tensor, threshold: float = 0.02) -> Tensor:
    """log q(y) of Lp-Reg's proxy: π without tokens below threshold · max π, renormalised; they have -inf.

    logits (..., V), already divided by the temperature, ids (...) -> (...), detached.
    """
    z = logits.detach()
    logp = (z if z.dtype == torch.float64 else z.float()).log_softmax(-1)
    kept = logp >= logp.amax(-1, keepdim=True) + (math.log(threshold) if threshold > 0 else -math.inf)
    q = torch.where(kept, logp, -math.inf)
    return q.gather(-1, ids[..., None])[..., 0] - q.logsumexp(-1)


@dataclass
class LpReg(OnPicked):
    """Protect rare but not absurd tokens. [code] CarlanLark/Lp-Reg-dev; 2510.03222.

        q = π_old without tokens below threshold · max, renormalised (proxy_log_prob)                   (3.28)
        among A < 0 tokens the k = ⌊fraction · n⌋ of lowest log p, none if k <= 1; of these, if log p < log q:
        l = -r A + beta · k3(log p - log q),  unclipped;   all others: clipped with eps (1, 9)

    Filtered tokens (log q = -inf) are noise and left alone. On-policy every selected survivor has q > p and a
    push of 1/S - 1 on its log-probability, S the kept mass: upwards. Needs log q of the old policy, one more
    reduction over the vocabulary. The penalty is part of a token's l: it has the surrogate's denominator.
    """

    fraction: float = 0.01
    """share of the A < 0 tokens that is protected; 0 is the clipped surrogate"""
    beta: float = 1.0
    """coefficient of the forward KL to the proxy"""
    threshold: float = 0.02
    """the proxy drops tokens below this share of the largest probability"""
    eps_low: float = 1.0
    """r is clipped from below at 1 - eps_low"""
    eps_high: float = 9.0
    """r is clipped from above at 1 + eps_high"""

    key, place, paper = "lp_reg", "penalty", "2510.03222"
    idea = "pull rare, punished, yet plausible tokens towards a policy without the noise tail"
    needs = ("logp", "proxy_logp")
    extra_pass = "proxy"
    limits = {"fraction": SHARE, "beta": POSITIVE, "threshold": SHARE}

    def mark(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        negative = tk.mask & (adv < 0)
        n = int(negative.sum())
        k = int(self.fraction * n)
        if self.fraction > 0 and k <= 1:
            _tell(self, f"fraction {self.fraction:g} of {n} tokens with A < 0 is at most one: 0 are selected")
        picked = top(-tk.logp, negative, k if k > 1 else 0, token_keys(tk, self.progress))
        return self.pick(tk, picked & (tk.logp < tk.proxy_logp), metrics)

    def factor(self, tk: Tokens, adv: Tensor, marks: dict[str, Tensor] | None = None) -> Tensor:
        picked = (marks or self.mark(tk, adv, {}))["picked"]
        free = clip_factor(tk.logp, tk.old_logp, adv, 1, math.inf)
        return torch.where(picked, free, super().factor(tk, adv))

    def distance(self, tk: Tokens, picked: Tensor) -> Tensor:
        return kl_penalty(tk.logp, torch.where(picked, tk.proxy_logp, tk.logp.detach()), "k3")


# ------------------------------------------------------------------------------------------------------------
# 6. Composition: opefo+clip_higher


EXCLUSIVE = (  # pairs that do not override the same hook and still make no sense together
    ({"entropy_bonus", "adaptive_entropy"}, "both put a coefficient on the same entropy term"),
    ({"ref_kl", "prorl"}, "prorl contains the KL term of ref_kl"),
    ({"nsr", "par"}, "nsr leaves no positive advantage for par to weigh"),
    ({"nsr", "rand_pos_clip"}, "nsr leaves no positive advantage for rand_pos_clip to drop"),
    *(
        ({one, cov}, f"{one} leaves one advantage, whose covariance with anything is 0, to {cov}")
        for one in ("psr", "nsr")
        for cov in ("clip_cov", "kl_cov", "cw_grpo")
    ),
)
SHARED = ("eps_low", "eps_high", "dual_clip", "aggregation")


def _overrides(method: Method, hook: str) -> bool:
    if hook == "advantage":
        own = getattr(method, "own_advantage", type(method).advantage is not Method.advantage)
        return own or method.normalize != Method.normalize
    return getattr(type(method), hook) is not getattr(Method, hook)


def _owner(members: list[Method], hook: str) -> Method:
    """The member whose hook counts; the first, which then has plain GRPO's, if none overrides it."""
    owners = [m for m in members if _overrides(m, hook)]
    if len(owners) > 1:
        names = " and ".join(m.key for m in owners)
        raise ValueError(f"{names} cannot be combined: each replaces the {hook}, and only one can")
    return owners[0] if owners else members[0]


def _shared_values(members: list[Method], surrogate: Method) -> dict[str, Any]:
    """Clip range and aggregation: of the members for which they were set, or whose default is not GRPO's."""
    values = {}
    for name in SHARED:
        default = getattr(Method, name)
        users = [m for m in members if name not in m.without]
        set_by = {m.key: getattr(m, name) for m in users if name in m.given or getattr(m, name) != default}
        if len(set(set_by.values())) > 1:
            text = ", ".join(f"{k} has {v}" for k, v in set_by.items())
            who = "+".join(m.key for m in members)
            raise ValueError(f"{who}: conflicting {name}: {text}; set {name} explicitly")
        values[name] = next(iter(set_by.values()), default)
        if values[name] != default and name in surrogate.without:
            who = f"{next(iter(set_by))} sets {name}, which the surrogate of {surrogate.key} does not use"
            raise ValueError(f"{who}: leave it out, or give {name}={default}")
    return values


class Composite(Method):
    """Several methods as one. Responses must be selected by all, weights multiply, penalties add, controllers
    move each on its own; sampling, advantage and surrogate belong to at most one member. A weight hook sees
    the advantage times the weights of the members before it, and a member with `last` (opefo) comes last: it
    balances the flow of the real surrogate. What penalties add on top, those of ref_kl, kl_cov, lp_reg,
    entropic and the entropy terms, is not in its balance."""

    def __init__(self, members: list[Method]) -> None:
        keys = [m.key for m in members]
        if len(set(keys)) < len(keys):
            raise ValueError(f"{'+'.join(keys)}: a method appears twice; name each once")
        for pair, reason in EXCLUSIVE:
            if pair <= set(keys):
                raise ValueError(f"{' and '.join(sorted(pair))} cannot be combined: {reason}")
        self.members = sorted(members, key=lambda m: getattr(m, "last", False))
        self.key, self.place = "+".join(keys), "+".join(dict.fromkeys(m.place for m in members))
        self.owner = {hook: _owner(self.members, hook) for hook in ("sample", "advantage", "surrogate")}
        values = _shared_values(self.members, self.owner["surrogate"])
        super().__init__(**values)
        for m in self.members:
            m.__dict__.update({k: v for k, v in values.items() if k not in m.without})
            if m is not self.owner["advantage"]:
                m.advantage = self.advantage
            m.coefficients = self.coefficients
            if m is not self.owner["surrogate"]:
                m.factor = self.factor  # what opefo and steer weigh is the force of the common surrogate
        self.needs = tuple(dict.fromkeys(n for m in members for n in m.needs))
        self.on_policy = any(m.on_policy for m in members)
        self.refill, self.corrects = any(m.refill for m in members), any(m.corrects for m in members)
        self.extra_pass = ", ".join(m.extra_pass for m in members if m.extra_pass)

    @property
    def progress(self) -> Progress:
        return self.members[0].progress

    @progress.setter
    def progress(self, value: Progress) -> None:
        for m in self.members:
            m.progress = value

    def sample(
        self, logits: Tensor, position: int, rows: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor] | None:
        return self.owner["sample"].sample(logits, position, rows, generator)

    def select(self, tk: Tokens) -> Tensor | None:
        asked = [m for m in self.members if m.refill or tk.logp is not None]  # not scored: it is being drawn
        kept = [rows for m in asked if (rows := m.select(tk)) is not None]
        return torch.stack(kept).all(0) if kept else None

    def shape(self, tk: Tokens) -> Tensor:
        for m in self.members:
            tk = replace(tk, reward=m.shape(tk))
        return tk.reward

    def advantage(self, tk: Tokens) -> Tensor:
        return self.owner["advantage"].advantage(tk)

    def keep(self, tk: Tokens, adv: Tensor) -> Tensor | None:
        kept = [tokens for m in self.members if (tokens := m.keep(tk, adv)) is not None]
        return torch.stack(kept).all(0) if kept else None

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        total = torch.ones_like(adv)
        for m in self.members:
            w = m.weight(tk, adv * total, own := dict(metrics))
            self._merge(metrics, own, m)
            total = total if w is None else total * w.to(adv.dtype)
        return total

    def mark(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        marks = {}
        for m in self.members:
            own = dict(metrics)
            marks |= {f"{m.key}.{k}": v for k, v in m.mark(tk, adv, own).items()}
            self._merge(metrics, own, m)
        metrics.pop("tokens_touched", None)  # of one member only
        return marks

    @staticmethod
    def _merge(metrics: dict[str, float], own: dict[str, float], m: Method) -> None:
        for name, value in own.items():
            if name not in metrics:
                metrics[name] = value
            elif metrics[name] != value:
                metrics[f"{m.key}.{name}"] = value

    @staticmethod
    def _own(marks: dict[str, Any], m: Method) -> dict[str, Any]:
        return {k.removeprefix(m.key + "."): v for k, v in marks.items() if k.startswith(m.key + ".")}

    def factor(self, tk: Tokens, adv: Tensor, marks: dict[str, Tensor] | None = None) -> Tensor:
        m = self.owner["surrogate"]
        return m.factor(tk, adv, None if marks is None else self._own(marks, m))

    def surrogate(self, tk: Tokens, plan: Plan) -> Tensor:
        m = self.owner["surrogate"]
        return m.surrogate(tk, replace(plan, marks=self._own(plan.marks, m)))

    def penalty(self, tk: Tokens, plan: Plan) -> Tensor | None:
        parts = [m.penalty(tk, replace(plan, marks=self._own(plan.marks, m))) for m in self.members]
        return sum((p for p in parts if p is not None), start=torch.zeros_like(plan.adv[:0]).sum())

    @property
    def entropy_grad(self) -> bool:
        return any(m.entropy_grad for m in self.members)

    @property
    def loss_norm(self) -> float | None:
        own = (m.loss_norm for m in self.members if _overrides(m, "loss_norm"))
        return next(own, self.progress.max_length)

    def reset_reference(self, step: int, score: float | None) -> bool:
        return any([m.reset_reference(step, score) for m in self.members])  # a list: each sees every score

    def after_step(self, plan: Plan) -> None:
        for m in self.members:
            own = {**plan.metrics, **self._own(plan.metrics, m)}
            m.after_step(replace(plan, marks=self._own(plan.marks, m), metrics=own))

    def state_dict(self) -> dict[str, Any]:
        return {m.key: m.state_dict() for m in self.members}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for m in self.members:
            m.load_state_dict(state[m.key])


def compose(methods: list[Method]) -> Method:
    """Several methods as one (`Composite`). Raises ValueError, with the reason, where that makes no sense."""
    return methods[0] if len(methods) == 1 else Composite(methods)


# ------------------------------------------------------------------------------------------------------------
# 7. Names: building a method from the words of a command line


# fmt: off
METHODS: dict[str, type[Method]] = {c.key: c for c in (
    Method, EntropyBonus, AdaptiveEntropy, RefKL, ProRL, DAPO, ClipHigher, ClipCov, KLCov, HighEntropyTokens,
    PAR, RandPosClip, WReinforce, PSR, NSR, EntropyAdvantage, STEER, OPEFO, PAPO, CWGRPO, Entrocraft, STARE,
    EntroPIC, CISPO, DrGRPO, GSPO, QAE, HTPO, AEM, MixedCUTS, CEGPPO, LpReg,
)}
# fmt: on


@cache
def hyperparameters(cls: type[Method]) -> list[tuple[str, Any, Any, str]]:
    """(name, type, default, help) of a method's hyperparameters; help is the docstring under the field."""
    helps: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(inspect.getsource(base)).body[0].body
        for item, text in pairwise(body):
            if isinstance(item, ast.AnnAssign) and isinstance(text, ast.Expr):
                helps[item.target.id] = ast.literal_eval(text.value)
    kinds = typing.get_type_hints(cls)
    used = [f for f in fields(cls) if f.name not in cls.without]
    return [(f.name, kinds[f.name], f.default, helps.get(f.name, "")) for f in used]


def _nearest(word: str, words: Iterable[str]) -> str:
    return next(iter(difflib.get_close_matches(word, list(words), 1, 0)), "")


def convert(key: str, name: str, value: Any, kind: Any) -> Any:
    """A value, often a word, in the type of its field; None for "none" where the field allows it."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    optional, kind = type(None) in kinds, next(k for k in kinds if k is not type(None))
    word = str(value).strip().lower()
    if word == "none" and optional:
        return None
    if kind is str and isinstance(value, str):
        return value
    if kind is bool and word in ("true", "1", "yes", "on", "false", "0", "no", "off"):
        return word in ("true", "1", "yes", "on")
    if kind in (int, float) and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # reported below
            number = kind(value)
            if not math.isnan(number) and (isinstance(value, str) or number == value):
                return number
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}[kind]
    raise ValueError(f"{key}: {name}={value!r} does not fit: give {wanted}{' or none' if optional else ''}")


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """ "opefo+par:form=exact,eps_high=.28" -> ("opefo+par", {"form": "exact", "eps_high": ".28"})."""
    name, _, rest = spec.partition(":")
    options: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value):
            raise ValueError(f"method {spec!r}: {item!r} is not an option: write name=value,name=value")
        if key in options:
            raise ValueError(f"method {spec!r}: {key} is given twice: give it once")
        options[key] = value
    return name.strip(), options


def lookup(name: str) -> type[Method]:
    """The class of one method's key. Raises ValueError with the nearest key."""
    if name not in METHODS:
        near = _nearest(name, METHODS)
        raise ValueError(f"method {name!r} is unknown: did you mean {near}? ({', '.join(METHODS)})")
    return METHODS[name]


def build(name: str, **hyperparameter: Any) -> Method:
    """A method from its key, or several joined by "+", and hyperparameters, in their type or as strings.

    In a composition a hyperparameter goes to the member that has it; a shared one (clip range, aggregation)
    to all; "clip_cov.ratio" names the member. Raises ValueError on an unknown method or hyperparameter
    (naming the nearest), a value of the wrong type or range, and a composition without sense.
    """
    members = name.split("+")
    known = {m: {n: kind for n, kind, _, _ in hyperparameters(lookup(m))} for m in members}
    given: dict[str, dict[str, Any]] = {member: {} for member in members}
    for full, value in hyperparameter.items():
        prefix, _, n = full.rpartition(".")
        having = [m for m in members if n in known[m] and prefix in ("", m)]
        if not having:
            words = dict.fromkeys(x for m in members for x in known[m])
            text = f"did you mean {_nearest(n, words)}? ({', '.join(words)})"
            raise ValueError(f"{name} has no hyperparameter {full!r}: {text}")
        if len(having) > 1 and n not in SHARED:
            raise ValueError(f"{name}: {n} belongs to {' and '.join(having)}: write {having[0]}.{n}={value}")
        for m in having:
            given[m][n] = convert(m, n, value, known[m][n])
    made = [METHODS[m](**given[m]) for m in members]
    for method in made:
        method.given = tuple(given[method.key])
    return compose(made)


# ------------------------------------------------------------------------------------------------------------
# 8. Inside another trainer: verl

VERL = ("grpo", "clip_higher", "clip_cov", "kl_cov", "rand_pos_clip", "cispo", "gspo", "ce_gppo")
VERL_CLIP = {  # our name: verl's, and its default
    "eps_low": ("clip_ratio_low", 0.2),
    "eps_high": ("clip_ratio_high", 0.2),
    "dual_clip": ("clip_ratio_c", 3.0),
}


def register_with_verl(*specs: str, prefix: str = "") -> list[str]:
    """Register methods as verl policy losses (`actor.policy_loss.loss_mode`); returns their names.

    specs: as on the command line, "clip_cov:ratio=.002", compositions too; none: the eight keys of `VERL`. A
    loss is named prefix + key; where verl has the name (gspo, cispo, clip_cov, kl_cov) ours replaces its.
    Every worker has to register: put the call into a module and name it in VERL_USE_EXTERNAL_MODULES.

    verl hands a policy loss advantages and old and new log-probabilities, and nothing else. A method that
    needs more (entropy, Σp², rewards, a reference, the step) raises ValueError: opefo and steer among them.
    Denominators are verl's, of the whole mini-batch, so a method that treats every token alone has the
    gradient of `grpo.policy_loss`. **But verl calls once per micro-batch and rank: clip_cov, kl_cov and
    rand_pos_clip then select among those tokens only**, as verl's own do; the scope rule of this repository
    holds where one micro-batch on one rank is the mini-batch. And verl's old log-probabilities are of another
    forward pass: with one update per rollout kl_cov's penalty is rounding noise.

    Against verl's own: `vanilla` is `grpo:dual_clip=3`; clip_cov draws by a hash of the tokens' log-probs
    instead of the global generator; kl_cov's penalty is not multiplied by rollout_is_weights; gspo and cispo
    agree. Hyperparameters come from the spec, only the aggregation from `loss_agg_mode`; another clip range
    in verl's config is refused. Made for verl 0.9 (extra `verl`), imported by this call only.
    """
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

    methods = []
    for name, options in map(parse, specs or VERL):
        methods.append(build(name, **options))
        check_verl(methods[-1])
    for method in methods:
        register_policy_loss(prefix + method.key)(partial(verl_loss, method, agg_loss))
    return [prefix + method.key for method in methods]


def check_verl(method: Method) -> None:
    """Raise ValueError, with the reason, where verl's policy-loss interface cannot feed a method."""
    for m in getattr(method, "members", [method]):
        more = [need for need in m.needs if need != "logp"] + ["entropy"] * m.entropy_grad
        hooks = [h for h in ("sample", "select", "shape", "keep") if _overrides(m, h)]
        for bad, text in (
            (hooks, f"a verl policy loss has no place for its {' and '.join(hooks)}"),
            (_overrides(m, "advantage"), "verl makes the advantages (algorithm.adv_estimator)"),
            (more, f"it needs {', '.join(dict.fromkeys(more))}, which a verl policy loss does not get"),
            (_overrides(m, "after_step"), "a verl policy loss has no place for its after_step"),
            (getattr(m, "anneal", False), "a verl policy loss does not know the step, so anneal=false"),
            (m.aggregation != type(m).aggregation, "actor.loss_agg_mode decides on the aggregation"),
        ):
            if bad:
                raise ValueError(f"method {m.key} inside verl: {text}")


def verl_loss(
    method: Method,
    agg_loss: Callable[..., Tensor],
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """A method's loss on one micro-batch, as verl's registry wants it: tensors (B, T) -> scalar, metrics."""
    for ours, (name, default) in VERL_CLIP.items():
        if (value := config.get(name, default)) not in (default, None, getattr(method, ours)):
            raise ValueError(f"actor.{name}={value} is overruled: write {method.key}:{ours}={value}")
    ids = old_log_prob.float().contiguous().view(torch.int32)  # draws hash ids, which verl keeps to itself
    tokens = Tokens(ids, response_mask.bool(), logp=log_prob, old_logp=old_log_prob, adv=advantages)
    tokens.mismatch = rollout_is_weights
    plan = plan_update(tokens, method)
    one = torch.ones_like(log_prob, dtype=plan.coef.dtype, requires_grad=True)
    total = agg_loss(one, response_mask, loss_agg_mode, **config.global_batch_info)
    (coef,) = torch.autograd.grad(total, one)  # an aggregation is linear: its gradient is its coefficients
    loss, metrics = batch_loss(tokens, replace(plan, coef=coef, coef_all=coef), method)
    metrics = {**plan.metrics, **metrics}
    return loss, {f"actor/{k}": v for k, v in metrics.items() if math.isfinite(v)}


# ------------------------------------------------------------------------------------------------------------
# 9. Demonstration


@dataclass
class Effect:
    """What one method does to one batch, per token (B, T)."""

    method: Method
    force: Tensor  # -∂loss/∂logp
    change: Tensor  # predicted entropy change, nats per unit learning rate
    touched: Tensor  # bool: treated unlike plain GRPO


def effect(method: Method, tokens: Tokens, entropy_slope: Tensor | None = None) -> Effect:
    """One backward pass to the leaves log p and H: the force of all hooks, and what it does to entropy.

    entropy_slope (B, T): |∇_z H|² = Σ_v p_v² (log p_v + H)², by which a gradient on H moves H.
    """
    logp, h = (x.detach().clone().requires_grad_() for x in (tokens.logp, tokens.entropy))

    def slopes(m: Method) -> tuple[Tensor, Tensor]:
        loss, _ = policy_loss(replace(tokens, logp=logp, entropy=h), m)
        return torch.autograd.grad(loss, (logp, h), allow_unused=True, materialize_grads=True)

    force, pull = (-g for g in slopes(method))
    change = token_flow(tokens, force)
    if entropy_slope is not None:
        change = change + torch.where(tokens.mask, pull * entropy_slope, 0)
    plain = -slopes(Method())[0]
    return Effect(method, force, change, ((force - plain).abs() > 1e-6 * plain.abs()) | (pull != 0))


def demonstration_methods(entropy: float, length: int) -> list[tuple[Method, str]]:
    """Every method, and in words how it departs from its defaults: token fractions for a batch of some
    thousand tokens, and targets with which a batch of this entropy, nats, switches the method on."""
    above = f"target={1.5 * entropy:.2g}"
    options = {
        **{"clip_cov": "ratio=.02,lb=.5", "kl_cov": "ratio=.02", "rand_pos_clip": "ratio=.02"},
        **{"lp_reg": "fraction=.1", "adaptive_entropy": above, "stare": above, "entropic": above},
        **{"par": f"target={0.8 * entropy:.2g}", "entrocraft": f"start={1.2 * entropy:.2g}"},
        **{"papo": "reference=target," + above},
    }
    methods = []
    for key in METHODS:
        name, given = parse(f"{key}:{options.get(key, '')}")
        methods.append((build(name, **given), options.get(key, "")))
        methods[-1][0].progress = Progress(max_length=length)
        if key == "adaptive_entropy":
            methods[-1][0].c = 0.005  # as after one step below its target
    return methods


def show_batch(
    tokens: Tokens,
    methods: Iterable[tuple[Method, str]] | None = None,
    entropy_slope: Tensor | None = None,
    network_score: Tensor | None = None,
    path: str | None = "runs/interventions.png",
) -> list[Effect]:
    """Print what every method does to one batch, and draw it.

    tokens: logp, entropy, p2, p2logp, reward, group; ref_logp, proxy_logp, old_logp for the methods that need
    them. entropy_slope: as in `effect`. network_score (B, T): entropy change per unit force in the network
    (entropy_math.network_flow with advantage 1) adds the column dH net; it leaves entropy terms out.
    """
    mask, on_policy = tokens.mask, tokens.old_logp is None
    entropy = float(masked_mean(tokens.entropy, mask))
    adv = torch.where(mask, Method().advantage(tokens), 0)
    base = effect(Method(), tokens, entropy_slope)
    scores = [] if network_score is None else [torch.where(mask, network_score, 0)]

    def columns(e: Effect) -> list[float]:
        out = [e.force[side].abs().sum() / base.force[side].abs().sum() for side in (adv > 0, adv < 0)]
        out.append(e.change.sum() / base.change.abs().sum())
        return [*map(float, out + [(e.force * s).sum() / (base.force * s).abs().sum() for s in scores])]

    print(
        f"{int(mask.sum())} tokens of {len(adv)} responses, {'on' if on_policy else 'off'}-policy, ", end=""
    )
    print(f"entropy {entropy:.3f} nats")
    print("touched: tokens treated unlike GRPO;  A > 0, A < 0: sum of |force| there, GRPO = 1")
    print("dH: predicted change of entropy, as a share of all flow (up and down) that GRPO causes")
    if scores:
        print("dH net: the same from the network flow, which knows the shared parameters and the optimizer")
    print(f"\n{'method':<20}{'place':<11}{'touched':>8}{'A > 0':>8}{'A < 0':>8}{'dH':>9}", end="")
    print(f"{'dH net':>9}  options" if scores else "  options")
    effects = []
    for method, note in methods or demonstration_methods(entropy, mask.shape[1]):
        row = f"{method.key:<20}{method.place:<11}"
        if missing := [n for n in method.needs if getattr(tokens, n) is None]:
            print(f"{row} needs {missing[0]}")
            continue
        effects.append(effect(method, tokens, entropy_slope))
        plus, minus, *change = columns(effects[-1])
        share = float(masked_mean(effects[-1].touched.double(), mask))
        if on_policy and not method.on_policy:
            note = "its clip or penalty acts with several updates per rollout only"
        print(
            f"{row}{share:>8.1%}{plus:>8.2f}{minus:>8.2f}" + "".join(f"{x:>+9.3f}" for x in change), "", note
        )
    if path:
        draw(tokens, adv, base, effects, path)
        print(f"\nfigure: {path}")
    return effects


def draw(tokens: Tokens, adv: Tensor, base: Effect, effects: list[Effect], path: str) -> None:
    """Per method its tokens on the plane (log p, A), darker where they count more, and its flows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    m, rows = tokens.mask, (len(effects) + 1) // 2
    jitter = torch.rand(adv.shape, generator=torch.Generator().manual_seed(0)).to(adv) - 0.5
    x, y = tokens.logp.detach()[m], (adv + 0.3 * jitter)[m]
    scale = float(base.change.abs().sum())
    flows = [
        [float(x.sum()) / scale for x in (e.change.clamp(min=0), e.change.clamp(max=0))] for e in effects
    ]
    reach = 1.05 * max(max(up, -down) for up, down in flows)
    size = {"figsize": (15, 0.95 * rows + 1), "width_ratios": (3, 2, 3, 2), "layout": "constrained"}
    fig, axes = plt.subplots(rows, 4, sharex="col", squeeze=False, **size)
    cells = [*axes[:, :2], *axes[:, 2:]]  # down the left column, then the right one
    for (plane, bars), e, (up, down) in zip(cells, effects, flows, strict=False):
        weight = torch.where(base.force == 0, 1, e.force / base.force)[m].clamp(0, 2)
        order = e.touched[m].long().argsort(stable=True)  # touched tokens on top, and larger
        look = {"cmap": "YlGnBu", "vmin": -0.3, "vmax": 2, "linewidths": 0, "rasterized": True}
        dots = plane.scatter(x[order], y[order], 2 + 5 * e.touched[m][order].float(), weight[order], **look)
        plane.set_ylabel(e.method.key + "\nA", rotation=0, ha="right", va="center", fontsize=9)
        bars.barh([1, 0], [up, down], color=["0.7", "0.3"], height=0.7)
        bars.plot([up + down] * 2, [-0.5, 1.5], color="black", lw=2)
        bars.axvline(0, color="black", lw=0.5)
        bars.set(xlim=(-reach, reach))
        bars.set_yticks([1, 0], ["up", "down"], fontsize=7)
    for axis in [axis for cell in cells[len(effects) :] for axis in cell]:
        axis.axis("off")
    for plane, bars in (axes[-1, :2], axes[-1, 2:]):
        plane.set_xlabel("log p of the sampled token, nats")
        bars.set_xlabel("entropy flow over GRPO's; line: net")
    label = "weight relative to GRPO: 0 pale, 1 medium, 2 or more dark"
    look = {"location": "top", "aspect": 60, "fraction": 0.3, "ticks": [0, 0.5, 1, 1.5, 2]}
    fig.colorbar(dots, ax=axes[0, :], label=label, **look)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def embedded_batches(steps: int = 20, network: bool = False) -> list[tuple[Tokens, Tensor, Tensor | None]]:
    """Two real batches of the embedded world: strictly on-policy after some steps of GRPO, and the same
    responses four updates later, when the ratio has left 1. Each with |∇_z H|² (B, T), and with `network` the
    change of entropy per unit force on each token in the network, its preconditioner included."""
    # Only here does this chapter look ahead to the loop: a demonstration needs something to demonstrate on.
    from pathlib import Path

    from rollout import WarmStart, chain_task, warm_policy
    from train import Ledger, Run, Settings, response_logits, scored_in_slices

    model, tokenizer = warm_policy(WarmStart())
    settings, method = Settings(method="grpo", ledger="off"), build("ref_kl", beta=0)
    run = Run(settings, method, Path("."), chain_task(), model, tokenizer)
    for _ in range(steps):
        run.train_step()
    batch, out = run.rollout(), []
    reference = scored_in_slices(run.reference, batch, run.settings).logp
    for later in (False, True):
        old = scored_in_slices(model, batch, run.settings)
        logits, before = response_logits(model, batch, 1.0), Ledger.open(model, batch, run.settings)
        if later:
            for _ in range(4):
                run._updates(batch, None)
            logits, before = response_logits(model, batch, 1.0), Ledger.open(model, batch, run.settings)
        now = scored_in_slices(model, batch, run.settings)
        logp = logits.log_softmax(-1)
        slope = (logp.exp() * (logp + now.entropy[..., None])).square().sum(-1)
        proxy = proxy_log_prob(logits, now.ids)
        score = before.network_flow(model, run.optimizer, torch.ones_like(slope)) if network else None
        tokens = replace(now, ref_logp=reference, proxy_logp=proxy, old_logp=old.logp if later else None)
        out.append((tokens, slope, score))
    return out


def main() -> None:
    """All methods on one strictly on-policy batch; then those that act on the ratio on a later one."""
    import argparse

    p = argparse.ArgumentParser(description="What each method does to one real batch of the embedded world.")
    p.add_argument("--ledger", choices=("step", "full"), default="step", help="full: also the network flow")
    p.add_argument("--out", default="runs/interventions.png", help="where the figure goes")
    args = p.parse_args()
    (now, slope, score), (later, later_slope, later_score) = embedded_batches(network=args.ledger == "full")
    show_batch(now, None, slope, score, args.out)
    print("\nThe same responses four updates later, for the methods that act on the ratio:\n")
    methods = demonstration_methods(float(masked_mean(later.entropy, later.mask)), later.mask.shape[1])
    methods = [m for m in methods if not m[0].on_policy or m[0].place in ("none", "ratio")]
    show_batch(later, methods, later_slope, later_score, None)


if __name__ == "__main__":
    main()
