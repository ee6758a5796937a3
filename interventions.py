"""Chapter 3. Forty-eight published methods that move entropy, each a small class on plain GRPO.

Claim. Each of them multiplies the force of some tokens by a number, drops some responses, or adds one term to
the loss. Written on the hooks of `grpo.Method`, a diff between two methods is the lesson.

An entry gives the formula (3.n) as the code computes it, where it was read, what differs between paper and
code, and the edges. The tests carry the number n. Read in the [paper], in the authors' [code], [second-hand]
in agreeing notes, or a [reconstruction]: ours, with the published properties.

N is the number of response tokens of the update batch, and the denominator unless an entry says otherwise.
Every statistic obeys grpo's scope rule and is of the policy before the step, detached. `f` is a token's
predicted entropy change (entropy_math) under the advantage that really acts on it, I_clip r A.

Left out: what trainers do around a method (critics, several turns, curricula); methods that change the
model or decoding; HEAL (2604.17928), whose bonus compares the entropies of a response with those of a second,
general task in the same batch, where --data names one task; GTPO, ERC and Archer, whose ideas stand in
neighbours (qae, the clips, htpo); AER and SPS, whose equations are not public or contradict each other.

    python interventions.py       what every method does to one batch: a table, and runs/interventions.png
"""

from __future__ import annotations

import copy
import difflib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Generator, Tensor

from entropy_math import entropy_change, set_point_lambda, token_stats

# isort: off
from grpo import (
    Above, Aggregation, AtLeastOne, Count, Drawn, DualClip, Method, Plan, Policy, Positive, Progress, Share,
    Tokens, batch_loss, clip_factor, clipped_surrogate, group_advantages, group_index, group_mean, group_std,
    kl_penalty, log_ratio, masked_mean, mismatch_weight, overlong_penalty, plan_update, policy_loss,
    weighted_sum,
)  # fmt: skip

ENTROPY = ("logp", "entropy")
FLOW = (*ENTROPY, "p2", "p2logp")  # what the exact entropy change needs
GROUPED = ("logp", "reward", "group")  # what a comparison with siblings needs

# ------------------------------------------------------------------------------------------------------------
# 1. What the methods share


def top(score: Tensor, mask: Tensor, k: int, keys: Tensor | None = None) -> Tensor:
    """(B, T) bool: the k positions of mask (or all) with the largest score. Ties go to the larger key
    (`token_keys`), without keys to the lower index."""
    where = mask.flatten().nonzero()[:, 0]
    if keys is not None:  # both sorts are stable
        where = where[keys.flatten()[where].argsort(descending=True, stable=True)]
    order = score.flatten()[where].sort(descending=True, stable=True).indices[:k]
    out = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
    out[where[order]] = True
    return out.view(mask.shape)


def token_keys(tk: Tokens, progress: Progress, stream: int = 0) -> Tensor:
    """(B, T) float64 in [0, 1): one random number per token, 0 where masked. Dealt in the order of the rows'
    ids: neither the batch's order nor padding changes a key (rows with the same ids exchange theirs)."""
    rank = torch.unique(torch.where(tk.mask, tk.ids, -1), dim=0, return_inverse=True)[1]  # (B,)
    order = rank.argsort(stable=True)
    mask = tk.mask[order]
    draws = torch.rand(stream + 1, int(mask.sum()), dtype=torch.float64, generator=progress.generator())
    keys = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    keys[mask] = draws[stream].to(mask.device)
    return torch.empty_like(keys).index_copy_(0, order, keys)


def centred(x: Tensor, mask: Tensor) -> Tensor:
    """x minus its token mean, float64; exactly 0 where masked, and everywhere if all values are equal."""
    low = torch.where(mask, x, math.inf).min()
    high = torch.where(mask, x, -math.inf).max()
    return torch.where(mask & (low < high), x.double() - masked_mean(x, mask), 0)


def covariance(tk: Tokens, adv: Tensor) -> Tensor:
    """(A - mean A)(log p - mean log p) per token (3.7): (B, T) float64, whose mean is the covariance."""
    return centred(adv, tk.mask) * centred(tk.logp, tk.mask)


def fraction_count(method: Method, fraction: float, mask: Tensor, whole: Callable = math.floor) -> int:
    """How many tokens of mask a fraction selects, at least one (0 for fraction 0). Where the floor of one
    decides, that is said once: papers' fractions are made for millions of tokens."""
    n = int(mask.sum())
    if fraction <= 0 or n == 0:
        return 0
    if fraction * n < 1:
        _tell(method, f"fraction {fraction:g} of {n} tokens is less than one: 1 is selected, {1 / n:.2%}")
    return max(whole(fraction * n), 1)


def _tell(method: Method, text: str) -> None:
    """Warn once per method object."""
    if not method.__dict__.setdefault("_told", False):
        method.__dict__["_told"] = True
        warnings.warn(f"{method.key}: {text}", stacklevel=2)


def acting(method: Method, tk: Tokens, adv: Tensor) -> Tensor:
    """(B, T): the advantage that really acts, I_clip · r · A times the mismatch weight."""
    force = adv * method.factor(tk, adv)
    return force if tk.mismatch is None else force * tk.mismatch


def flow(tk: Tokens, force: Tensor, form: str) -> Tensor:
    """(B, T): predicted entropy change per token, entropy_math's `entropy_change`; 0 where masked."""
    return torch.where(tk.mask, entropy_change(tk.stats, force, form), 0)


# ------------------------------------------------------------------------------------------------------------
# 2. Sampling and selection: what is drawn, and which responses enter the update


class Behaviour(Method):
    """A method that draws from another distribution than the policy's, and may weigh that away by the ratio
    of the two, grpo (2.17) and (2.18). It then refuses Tokens.mismatch, which would do so again."""

    correct: bool = False
    """weight tokens by min(policy / behaviour, 2)"""

    metric, largest = "behaviour_ratio", math.inf  # of the ratio

    @property
    def needs(self) -> tuple[str, ...]:
        return ("logp", "rollout_logp") if self.correct else ("logp",)

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor | None:
        if tk.rollout_logp is None:
            return None
        ratio = mismatch_weight(tk.logp_before, tk.rollout_logp, "tis", high=self.largest)
        metrics[self.metric] = float(masked_mean(ratio, tk.mask))
        return ratio.clamp(max=2) if self.correct else None


class MixedCUTS(Behaviour, key="mixed_cuts", place="sampling", paper="2604.18493"):
    """Half of each group samples uniformly among the likely tokens, the rest as usual. [second-hand]. p is at
    temperature 1, whatever the rollout's. The loss is GRPO's, though a token's true ratio is p_y |S|: the
    paper accepts the bias, `correct` weighs it away.

        S = {v in TopK(p) : p_v > delta};  y ~ uniform(S);  the first `warm` tokens as usual            (3.26)
    """

    k: Count = 5
    """TopK: how many tokens can be drawn; 9 hurt in the paper"""
    delta: Share = 0.03
    """only tokens more probable than this"""
    warm: Annotated[int, (0, math.inf)] = 5
    """tokens of each response that are sampled as usual first"""
    share: Share = 0.5
    """share of each group that explores; 0 is plain GRPO"""
    empty: Literal["topk", "argmax"] = "topk"
    """when no token exceeds delta: topk (uniform on the K), argmax (so one of the notes)"""

    def exploring(self, rows: Tensor) -> Tensor:
        """(B,) bool: which of a prompt's responses explore: `share` of them, evenly spread."""
        return ((rows + 1) * self.share).floor() > (rows * self.share).floor()

    def behaviour(self, logits: Tensor, rows: Tensor) -> Tensor:
        """(B, V) probabilities that a token behind the first `warm` is drawn from; `rows` as in `sample`."""
        p, plain = logits.softmax(-1), (logits * self.progress.temperature).softmax(-1)  # at temperature 1
        value, index = plain.topk(min(self.k, p.shape[-1]))  # (B, K)
        inside = value > self.delta
        inside[:, : 1 if self.empty == "argmax" else self.k] |= ~inside.any(-1, keepdim=True)
        uniform = inside.to(p.dtype) / inside.sum(-1, keepdim=True)
        cuts = torch.zeros_like(p).scatter(-1, index, uniform)  # (3.26)
        return torch.where(self.exploring(rows)[:, None], cuts, p)

    def sample(self, logits: Tensor, position: int, rows: Tensor, chance: Generator | None) -> Drawn | None:
        if position < self.warm or self.share == 0:
            return None
        q = self.behaviour(logits, rows)
        ids = torch.multinomial(q, 1, generator=chance)
        return ids[:, 0], q.gather(-1, ids)[:, 0].log()


class ReFT(Method, key="reft", place="sampling", paper="2605.28295"):
    """Start each group's responses with different first tokens. [paper]: its authors' slides; that openers
    are distinct is inferred from their "guaranteed coverage". Rank 20 can have π of 1e-5: off-policy, and no
    clip sees it, as old log-probs are the policy's own. It explores in training; outputs end concentrated.

        S = `openers` ranks drawn from the `pool` likeliest tokens, one S a step;  behaviour 1/pool
        row j of a group starts with the token of rank S[⌊j openers / G⌋], the rest is sampled as usual (3.46)
    """

    openers: Count = 4
    """different first tokens in a group; must divide the group size"""
    pool: Count = 20
    """openers are drawn from this many of the likeliest tokens"""
    first: Literal["train", "mask"] = "train"
    """train: the first token stays in the loss (paper); mask (ours): it does not, since it was not chosen"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.openers > self.pool:
            raise ValueError(f"reft: openers={self.openers}, pool={self.pool}: give a pool as large")

    def sample(self, logits: Tensor, position: int, rows: Tensor, chance: Generator | None) -> Drawn | None:
        if position:
            return None
        size, pool = int(rows.max()) + 1, min(self.pool, logits.shape[-1])
        if size % self.openers or self.openers > pool:
            text = f"reft: openers={self.openers} must divide the group size {size}"
            raise ValueError(f"{text} and be at most the {pool} tokens of its pool")
        ranks = torch.randperm(pool, generator=chance, device=logits.device)[: self.openers]
        rank = ranks[rows * self.openers // size]  # (3.46)
        ids = logits.topk(pool, -1).indices.gather(-1, rank[:, None])[:, 0]
        return ids, logits.new_full(ids.shape, -math.log(pool))

    def complaint(self, settings: Any) -> str:
        if settings.group_size % self.openers == 0:
            return ""
        return f"--group-size {settings.group_size}: must be a multiple of the {self.openers} openers of reft"

    def keep(self, tk: Tokens, adv: Tensor) -> Tensor | None:
        return None if self.first == "train" else torch.arange(tk.mask.shape[1], device=tk.mask.device) > 0


class VocabDropout(Behaviour, key="vocab_dropout", place="sampling", paper="2604.03472"):
    """Sample from a random part of the vocabulary, a new one each step. [reconstruction]: the paper masks the
    proposer of a self-play pair, in sampling and in the loss; here one policy, whose loss is of the whole
    softmax. If the only right token is dropped the reward is noise: small vocabularies need a share near 1.

        a token is kept with probability `share`, one that ends a response always, the arg max if none is
        y ~ π restricted to the kept ones, whose mass is Z;   correct: w = π/behaviour = Z <= 1         (3.47)
    """

    share: Share = 0.85
    """probability that a token is kept; the paper has .75 and .85; 1 is plain GRPO"""

    metric, largest = "kept_mass", 1.0

    def kept(self, size: int, device: torch.device) -> Tensor:
        """(V,) bool: the vocabulary of this step, the same for all rows and positions."""
        kept = torch.rand(size, generator=self.progress.generator()) < self.share
        kept[[i for i in self.progress.stops if i < size]] = True
        return kept.to(device)

    def sample(self, logits: Tensor, position: int, rows: Tensor, chance: Generator | None) -> Drawn | None:
        if self.share == 1:
            return None
        kept = self.kept(logits.shape[-1], logits.device)
        if not kept.any():
            kept = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).bool()
        logq = torch.where(kept, logits, -math.inf).log_softmax(-1)
        ids = torch.multinomial(logq.exp(), 1, generator=chance)
        return ids[:, 0], logq.gather(-1, ids)[:, 0]


class DAPO(Method, key="dapo", place="selection", paper="2503.14476"):
    """Drop prompts without a contrast, raise the upper clip, punish over-long responses. [paper] §3; [code].
    Accuracy decides: a length penalty rescues no group. No usable group: loss 0. verl's shaping has no floor
    at -1 and no `overlong_filter`. At shorter limits than the paper's set both lengths.

        keep a prompt iff 0 < #correct < G                    dynamic sampling; the loop refills groups  (3.6)
        R <- R + clip((overlong_max - overlong_cache - len)/overlong_cache, -1, 0)           overlong shaping
        r in [1 - eps_low, 1 + eps_high], eps_high = .28                                     clip-higher
    """

    eps_high: Positive = 0.28
    dynamic_sampling: bool = True
    """drop prompts that all or none of the responses solve"""
    overlong: bool = True
    """penalise responses that come near the length limit"""
    overlong_max: Count = 20480
    """length limit of the shaping, tokens"""
    overlong_cache: Count = 4096
    """the penalty starts so many tokens before the limit"""
    overlong_filter: bool = False
    """drop truncated responses from the loss"""

    refill = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlong and self.overlong_cache > self.overlong_max:
            who = f"overlong_cache={self.overlong_cache} is above overlong_max={self.overlong_max}"
            raise ValueError(f"dapo: {who}: give a smaller overlong_cache, or overlong=false")

    @property
    def needs(self) -> tuple[str, ...]:
        return (*GROUPED, "truncated") if self.overlong_filter else GROUPED

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


class Entrocraft(Method, key="entrocraft", place="selection", paper="2604.26326"):
    """Outside an entropy band, keep only the responses that push entropy back into it. [paper] Alg. 1: (.6,
    .7) -> (.1, .2); [code]. H low: only A <= 0 teaches, which on balance raises it. In the band: GRPO.

        s = I[H > hi] - I[H < lo];   keep response i iff s A_i >= 0;   mean over what is kept           (3.17)
        lo goes from `start` to `end` along the run, hi = lo + width
        released: keep all;  A = max(R, 0) (RAFT++) for H > hi,  min(R, 0) (NSR) for H < lo,  R = ±1
    """

    start: float = 0.6
    """lower edge of the entropy band at the start, nats"""
    end: float = 0.1
    """lower edge at the end of the run, nats"""
    width: Positive = 0.1
    """width of the band, nats"""
    schedule: Literal["linear", "cosine", "fixed"] = "linear"
    """how the band falls: linear, cosine, fixed (stays at start)"""
    variant: Literal["paper", "released"] = "paper"
    """paper (drop responses), released (other advantages)"""

    @property
    def needs(self) -> tuple[str, ...]:
        return (*ENTROPY, "reward") if self.variant == "released" else ENTROPY

    def overrides(self, hook: str) -> bool:
        return super().overrides(hook) and (hook != "advantage" or self.variant == "released")

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


# ------------------------------------------------------------------------------------------------------------
# 3. Weight: how much each token's advantage counts.  First the baselines, then the weights


class WReinforce(Method, key="w_reinforce", place="weight", paper="2506.01347", needs=("logp", "reward")):
    """Advantage +lam for right and -1 for wrong responses, no baseline. [paper]; [code] RLVR-Decomposed by
    TianHongZXY. PAR with a fixed lambda, but no baseline or division; lam = 1 is REINFORCE on rewards ±1.

        A = lam if the response is correct, -1 if not                                                   (3.11)
    """

    lam: Positive = 0.1
    """advantage of a correct response"""

    def advantage(self, tk: Tokens) -> Tensor:
        return torch.where(tk.solved[:, None], self.lam, -torch.ones_like(tk.logp))


class PSR(Method, key="psr", place="selection", paper="2506.01347", needs=("logp", "reward")):
    """Learn from right responses only: sharpens most per step. [paper]; [code]. A = 1 on correct responses;
    the others leave the batch and its mean (3.11). The paper's negative control."""

    sign = 1

    def select(self, tk: Tokens) -> Tensor:
        return tk.solved == (self.sign > 0)

    def advantage(self, tk: Tokens) -> Tensor:
        return torch.full_like(tk.logp, self.sign)


class NSR(PSR, key="nsr", sign=-1):
    """Learn from wrong responses only: keeps entropy, learns slowly. [paper]; [code]. A = -1 on incorrect
    responses; the others leave (3.11). Parallel to w_reinforce with lam = 0, but larger."""


class DrGRPO(Method, key="dr_grpo", place="weight", paper="2503.20783"):
    """No division by the group's standard deviation, none by the response's length. [paper]; [code]
    understand-r1-zero `train_zero_math.py`. Dividing by the first favours very easy and very hard prompts, by
    the second long wrong answers. verl without `loss_scale_factor` divides by the padded length.

        A = R - mean of the group,    L = Σ l / (B · norm)                                              (3.21)
    """

    aggregation: Aggregation = "seq_sum_norm"
    norm: Above | None = None
    """constant length, tokens; none: the longest that sampling allows, outside a loop 3000 (the paper's)"""

    def advantage(self, tk: Tokens) -> Tensor:
        if tk.adv is not None:
            return tk.adv
        return group_advantages(tk.reward, tk.group, "none")[:, None].expand(tk.mask.shape)

    @property
    def loss_norm(self) -> float | None:
        return self.norm or self.progress.max_length or 3000.0


class Darling(DrGRPO, key="darling", paper="2509.02534"):
    """Multiply the reward by how different a response is from its group. [code] darling `partition`,
    `process_uid_group`. Their classes come from a trained classifier, ours are equal answers: partition says
    nothing among the right ones if all answer alike. n-grams are of token ids, theirs of words.

        n-gram      d = |4-grams found in no other response of the group| / max(length - 3, 1)          (3.36)
        partition   d = max((G - c)/(G - 1), .1),  c responses of the group have the same answer
        A = R d - mean of the group
    """

    diversity: Literal["ngram", "partition"] = "ngram"
    """ngram: share of new 4-grams; partition: share of other answers"""
    aggregation: Aggregation = "token_mean"

    without = ("norm",)
    refuses_negative = "multiplies rewards"  # which would punish diverse errors

    @property
    def needs(self) -> tuple[str, ...]:
        return (*GROUPED, "outcome") if self.diversity == "partition" else GROUPED

    def shape(self, tk: Tokens) -> Tensor:
        d = self.ngram(tk) if self.diversity == "ngram" else self.partition(tk)
        return self.not_negative(tk.reward) * d.to(tk.reward)

    def ngram(self, tk: Tokens, n: int = 4) -> Tensor:
        """(B,) float64."""
        rows = [ids[keep].tolist() for ids, keep in zip(tk.ids.cpu(), tk.mask.cpu())]
        rows = [zip(*(ids[k:] for k in range(n))) for ids in rows]
        grams = [{(g, gram) for gram in row} for row, g in zip(rows, tk.group.tolist())]
        count = Counter(gram for own in grams for gram in own)  # rows of the group that have it
        new = tk.mask.new_tensor([sum(count[x] == 1 for x in own) for own in grams], dtype=torch.float64)
        return (new / (tk.lengths - n + 1).clamp(min=1)).clamp(max=1)

    @staticmethod
    def partition(tk: Tokens) -> Tensor:
        """(B,) float64; 1 where the group has one response."""
        index, size = group_index(tk.group)
        size = size[index].double()
        return torch.where(size > 1, ((size - alike(tk)) / (size - 1).clamp(min=1)).clamp(min=0.1), 1)


def alike(tk: Tokens) -> Tensor:
    """(B,) float64: how many responses of its group have a response's answer, itself included."""
    pair = torch.stack([tk.group, tk.outcome], 1)
    _, index, count = torch.unique(pair, dim=0, return_inverse=True, return_counts=True)
    return count[index].double()


class OutcomeExploration(Method, key="outcome_exploration", place="weight", paper="2509.06941"):
    """A bonus for answers that are rare in the group, or have been so far. [second-hand] a summary with the
    equations; b0 = .5 is its example, the coefficient is not public: .2 is ours. The means of batch and
    ucb_con are not 0: where all are right with one answer, all go down, and entropy rises by unlearning.

        A <- A + c b;    batch  b = -(m - 1)/G,  m responses of the group have the same answer          (3.35)
        ucb_con  b = min(1, N^-1/2) - b0,  N how often this answer to this prompt was seen before this update
        ucb_mean b = min(1, N^-1/2) - its mean in the group
    """

    form: Literal["batch", "ucb_con", "ucb_mean"] = "batch"
    """against answers of the same group (batch), or of all steps so far, centred by b0 or by the group"""
    c: Positive = 0.2
    """coefficient of the bonus; 0 is plain GRPO"""
    b0: float = 0.5
    """what ucb_con subtracts: answers seen more than b0^-2 times lose"""

    needs = (*GROUPED, "outcome")
    state = {"counts": {}}  # answer -> times seen

    def bonus(self, tk: Tokens) -> Tensor:
        """(B,) float64."""
        index, size = group_index(tk.group)
        if self.form == "batch":
            return -(alike(tk) - 1) / size[index]
        seen = torch.tensor([self.counts.get(x, 0) for x in tk.outcome.tolist()], dtype=torch.float64)
        b = seen.to(tk.mask.device).clamp(min=1).rsqrt()
        return b - (group_mean(b, tk.group) if self.form == "ucb_mean" else self.b0)

    def advantage(self, tk: Tokens) -> Tensor:
        adv = super().advantage(tk)
        return adv + self.c * self.bonus(tk)[:, None].to(adv.dtype)

    def mark(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        return {} if self.form == "batch" else {"outcome": tk.outcome}

    def after_step(self, plan: Plan) -> None:
        for x in plan.marks.get("outcome", torch.zeros(0)).tolist():
            self.counts[x] = self.counts.get(x, 0) + 1


def cosines(rows: list[list[int]]) -> Tensor:
    """(c, c) float64: cosine similarities of the counts of n-grams, n = 1..4; exactly 1 for equal counts."""
    grams = [[x for n in range(1, 5) for x in zip(*(ids[k:] for k in range(n)))] or [()] for ids in rows]
    column = {gram: j for j, gram in enumerate(dict.fromkeys(gram for own in grams for gram in own))}
    count = torch.stack([
        torch.bincount(torch.tensor([column[gram] for gram in own]), minlength=len(column)) for own in grams
    ]).double()  # fmt: skip
    K = count @ count.T  # whole numbers, so without rounding
    return K / (K.diagonal() * K.diagonal()[:, None]).sqrt()


def shapley(M: Tensor, generator: Generator) -> Tensor:
    """(c,) Shapley values of F(S) = log det(I + M_SS), M (c, c) float64 and positive semi-definite; the same
    for rows that are alike. Up to c = 10 from all 2^c subsets. Above, from at least 64 random orders, with
    all their rotations: each row is as often first as last, and noise does not drown small differences."""
    c, i, eye, own = len(M), torch.arange(len(M)), torch.eye(len(M)).to(M), M.diagonal()
    if c <= 10:
        inside = torch.arange(2**c)[:, None] >> i & 1  # (2^c, c)
        F = torch.logdet(eye + M * inside[:, :, None] * inside[:, None])
        share = torch.tensor([1 / (c * math.comb(c - 1, k)) for k in range(c)], dtype=M.dtype)  # k others
        phi = F @ (share[inside.sum(1, keepdim=True) - inside] * (2 * inside - 1))
    else:
        order = torch.rand(-(-64 // c), c, dtype=M.dtype, generator=generator).argsort(1)
        order = order[:, (i + i[:, None]) % c].flatten(0, 1)  # (64 or more, c)
        L = torch.linalg.cholesky((eye + M)[order[:, :, None], order[:, None]])
        gain = 2 * L.diagonal(dim1=1, dim2=2).log()  # of each row after those before it
        phi = torch.zeros_like(gain).scatter(1, order, gain).mean(0)
    alike = ((M == own) & (M == own[:, None])).to(M)
    return (alike @ phi / alike.sum(1)).round(decimals=12)


class GCPO(Method, key="gcpo", place="weight", paper="2605.11461", needs=GROUPED):
    """Reconstruction: pay a right response for what it adds to the variety of its group. [paper], abstract
    only: the volume of embeddings weighted by reward, shared by average marginal contribution; the formula is
    a [reconstruction]. They embed the meaning; our n-grams of ids pay other words for the same solution too.
    Where all are right, the std of (2.1) makes small differences loud. One right, or a small g: plain GRPO.

        F(S) = log det(I + g diag(R) K diag(R)) over the rows S,    K cosines of counts, n = 1..4       (3.39)
        phi_i = mean over all orders of F(i and those before i) - F(those before i);    A from phi by (2.1)
    """

    g: Above = 1.0
    """scale of the similarity; the larger, the less a second response of the same kind earns"""

    refuses_negative = "squares rewards"  # which would pay for errors

    def shape(self, tk: Tokens) -> Tensor:
        """(B,) float64: the rounding of float32, over a std of almost 0, would teach."""
        text = [ids[keep].tolist() for ids, keep in zip(tk.ids.cpu(), tk.mask.cpu())]
        group, reward = tk.group.cpu(), self.not_negative(tk.reward).cpu().double()
        phi = torch.zeros_like(reward)
        for name in group[reward > 0].unique():
            rows = ((group == name) & (reward > 0)).nonzero()[:, 0].tolist()
            rows.sort(key=lambda i: (text[i], reward[i].item()))  # the batch's order changes nothing
            R = reward[rows]
            M = self.g * R[:, None] * cosines([text[i] for i in rows]) * R
            phi[rows] = shapley(M, self.progress.generator())  # a new one: nor does the groups' order
        return phi.to(tk.reward.device)


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


class QAE(Method, key="qae", place="weight", paper="2509.22611", needs=GROUPED):
    """Quantile baseline: on hard prompts only successes teach, on easy ones only failures. [paper] §3-5; K =
    .4 with clip-higher, .6 when entropy collapses. Its README interpolates. A does not sum to 0.

        A = (R - Q_K)/(std + 1e-6),   Q_K = inf{x : F(x) >= K} within the group                         (3.23)
        binary rewards: the baseline Q_K is 0 for success rates <= 1 - K, otherwise 1
    """

    K: Share = 0.4
    """level of the quantile; larger never lowers the baseline"""
    interpolation: Literal["lower", "linear"] = "lower"
    """quantile rule: lower (paper), linear (README)"""

    def advantage(self, tk: Tokens) -> Tensor:
        r = tk.reward if tk.reward.dtype == torch.float64 else tk.reward.float()
        gap = r - group_quantile(r, tk.group, self.K, self.interpolation)
        return (gap / (group_std(r, tk.group) + 1e-6))[:, None].expand(tk.mask.shape)  # (3.23)


class AsymGRPO(Method, key="asym_grpo", place="weight", paper="2604.04894", needs=GROUPED):
    """Successes and failures by different powers of the odds of success. [second-hand, two agreeing notes];
    the exponents stand in one of them. p is the share of right responses in the group.

        A = ((1 - p)/p)^b_plus if right,  -(p/(1 - p))^b_minus if wrong;  0 where p is 0 or 1           (3.31)
        (.5, .5) GRPO without G - 1;   (1, 0) MaxRL;   (0, 0) REINFORCE on ±1
        Σ A = 0 in a group iff b_plus + b_minus = 1 or p = 1/2: the defaults push up for small p, else down
    """

    b_plus: Positive = 0.9
    """power of the odds for right responses: larger favours rare successes"""
    b_minus: Positive = 0.4
    """power for wrong responses: larger punishes rare failures"""

    def advantage(self, tk: Tokens) -> Tensor:
        p = group_mean(tk.solved.to(tk.logp.dtype), tk.group)
        odds = ((1 - p) / p.clamp(min=1e-9)).clamp(min=1e-9)
        a = torch.where(tk.solved, odds**self.b_plus, -(odds**-self.b_minus))
        return torch.where((p > 0) & (p < 1), a, 0)[:, None].expand(tk.mask.shape)


class MaxRL(Method, key="maxrl", place="weight", paper="2602.02710", needs=GROUPED):
    """Divide by the group's mean reward: the gradient of the logarithm of the pass rate, as a series. [code]
    tajwarfahim/maxrl. The mean of ∇log π over the right responses, minus that over all (a control variate):

        A = (R - m)/(m + 1e-6),  m the mean of the group, R >= 0;   binary: (1 - p)/p or -1             (3.31)
        E[(1/G) Σ A ∇log π] = ∇P Σ_{k<G} (1 - P)^(k-1) = ∇ Σ_{k<G} -(1 - P)^k/k,  P the true pass rate

    that is ∇log P cut off, the pass@k up to G - 1 weighted 1/k. Without the control variate one term more:
    where nobody is right A is 0 and takes the last one away. A right group of one has A = 1e6 there, 0 here.
    """

    refuses_negative = "divides by the mean reward"

    def advantage(self, tk: Tokens) -> Tensor:
        r = self.not_negative(tk.reward if tk.reward.dtype == torch.float64 else tk.reward.float())
        mean = group_mean(r, tk.group)
        return ((r - mean) / (mean + 1e-6))[:, None].expand(tk.mask.shape)


def miss(wrong: Tensor, size: Tensor, k: int) -> Tensor:
    """C(wrong, k)/C(size, k): no right one among k of `size` responses; float64; k at most size."""
    out = torch.ones_like(size, dtype=torch.float64)
    for i in range(k):
        out = torch.where(i < size, out * (wrong - i).clamp(min=0) / (size - i).clamp(min=1), out)
    return out


class PassK(Method, key="passk", place="weight", paper="2508.10751", needs=GROUPED):
    """Advantages of pass@k instead of pass@1. [code] RUCAIBox/Passk_Training; pkpo (2505.15201) [second-hand,
    five agreeing re-implementations]; best (2503.19595) [code] verl `grpo_passk`. c right of G, k <= G.

        passk  m = 1 - C(G-c,k)/C(G,k),  s = √(m (1-m)),  q = C(G-c-1,k-1)/C(G-1,k-1)                   (3.32)
               A = (1 - m)/(s + 1e-6) if right,  (1 - m - q)/(s + 1e-6) if wrong;  0 where m is 0 or 1
        pkpo   A_i = (k/G) · mean over the subsets T of k - 1 others of max(R_i - max_T R, 0);
               k = 1: R_i - mean of the group
        best   A = (largest - second largest R)/(std + 1e-6) for the best response, 0 for all others

    passk with k = 1 is GRPO without G - 1. No signal once G - c < k: an effective filter of easy prompts.
    """

    k: Count = 4
    """k of pass@k; a smaller group takes its size"""
    objective: Literal["passk", "pkpo", "best"] = "passk"
    """passk (Σ A = 0), pkpo (any R, unbiased for E[max of k]), best (only the best response)"""

    def advantage(self, tk: Tokens) -> Tensor:
        a, r = torch.zeros_like(tk.reward, dtype=torch.float64), tk.reward.double()
        if self.objective == "passk":
            a = self.passk(tk)
        else:
            for g in tk.group.unique():
                own = tk.group == g
                a[own] = self.pkpo(r[own]) if self.objective == "pkpo" else self.best(r[own])
        return a.to(tk.logp.dtype)[:, None].expand(tk.mask.shape)

    def passk(self, tk: Tokens) -> Tensor:
        """(B,); the other two are of the rewards of one group."""
        index, sizes = group_index(tk.group)
        size, right = sizes[index], tk.solved
        wrong = (group_mean((~right).double(), tk.group) * size).round()
        fail = miss(wrong, size, self.k)  # 1 - m
        q = miss(wrong - 1, size - 1, self.k - 1)
        a = torch.where(right, fail, fail - q) / ((fail * (1 - fail)).clamp(min=0).sqrt() + 1e-6)
        return torch.where((fail > 0) & (wrong < size), a, 0)

    def pkpo(self, r: Tensor) -> Tensor:
        if self.k == 1:
            return r - group_mean(r, torch.zeros_like(r))
        a, n, k = torch.zeros_like(r), len(r), min(self.k, len(r))
        for i in range(n if k > 1 else 0):
            others = torch.cat([r[:i], r[i + 1 :]]).sort().values  # the m-th is the largest of T:
            chance = [math.comb(m, k - 2) / math.comb(n - 1, k - 1) for m in range(n - 1)]
            a[i] = k / n * ((r[i] - others).clamp(min=0) * r.new_tensor(chance)).sum()
        return a

    def best(self, r: Tensor) -> Tensor:
        a = torch.zeros_like(r)
        if len(r) > 1:
            (first, second), order = r.topk(2)
            a[order[0]] = (first - second) / (group_std(r, torch.zeros_like(r))[0] + 1e-6)
        return a


def mean_logp(tk: Tokens, normalize: bool) -> Tensor:
    """(B,): the response's log-probability under the policy that sampled it, per token or in all."""
    logp = torch.where(tk.mask, tk.logp_before, 0).double().sum(-1)
    return logp / tk.lengths.clamp(min=1) if normalize else logp


class Unlikely(Method, key="unlikely", place="weight", paper="2506.02355", needs=GROUPED):
    """A likely right response earns less than an unlikely one. [code] rewarding-unlikely-release. Groups of
    one reward are left alone: after shaping they would have a variance, and dividing by it hides b.

        R' = R (1 - b rank/G),  rank: how many of the group have a smaller mean log π (ties count half) (3.33)
    """

    b: Share = 0.25
    """the likeliest response loses about this share of its reward"""
    normalize: bool = True
    """rank by the mean log π of a token (code); false: of the response (the paper's words)"""

    def shape(self, tk: Tokens) -> Tensor:
        index, sizes = group_index(tk.group)
        logp, same = mean_logp(tk, self.normalize), index[:, None] == index
        below, tied = (same & (logp < logp[:, None])).sum(1), (same & (logp == logp[:, None])).sum(1) - 1
        rank = below + 0.5 * tied
        mixed = (same & (tk.reward != tk.reward[:, None])).any(1)
        shaped = tk.reward * (1 - self.b * rank / sizes[index]).to(tk.reward.dtype)  # (3.33)
        return torch.where(mixed, shaped, tk.reward)


class UCPO(Method, key="ucpo", place="weight", paper="2605.00365", needs=GROUPED):
    """Move weight among a group's right responses from the likely to the unlikely. [code] AnamikaLochab/UCPO
    `iq`. The wrong ones and the sum over the right ones stay as they are. Per token, q is nearly uniform.

        q = softmax of mean log π over the c right responses of the group, floored at 1e-6
        w = (1 - tau) + tau c t,  t = (1/q)/Σ 1/q;   1 for wrong responses and where c < 2              (3.34)
    """

    tau: Share = 0.2
    """share of the right responses' weight that is dealt anew"""
    normalize: bool = True
    """log π: mean of a token (code); false: sum of the response (its comment)"""

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        index, sizes = group_index(tk.group)
        right, logp, n = tk.solved & tk.mask.any(-1), mean_logp(tk, self.normalize), len(sizes)
        floor = torch.where(right, logp, -math.inf)
        high = floor.new_full((n,), -math.inf).scatter_reduce(0, index, floor, "amax")[index]
        e = torch.where(right, (logp - high.nan_to_num(neginf=0.0)).exp(), 0)
        total = lambda x: x.new_zeros(n).index_add_(0, index, x)[index]  # noqa: E731
        inverse = torch.where(right, 1 / (e / total(e).clamp(min=1e-300)).clamp(min=1e-6), 0)
        c = total(right.double())
        t = inverse / total(inverse).clamp(min=1e-300)
        w = torch.where(right & (c > 1), 1 - self.tau + self.tau * c * t, 1.0)
        return w[:, None].expand(tk.mask.shape)


class MCPO(Method, key="mcpo", place="weight", paper="2604.16972", needs=GROUPED):
    """Equal weight for all easy prompts, and an anchor for the mastered ones. [second-hand, two agreeing
    readings]. The anchor is π_old: with one update per rollout only the scale acts. Consolidates rather than
    explores. Dynamic sampling would remove what it anchors.

        A = (R - p)/(s sc),  s = √(p (1-p)),  sc = 1 if p <= 1/2 else 2 s;   0 where p is 0 or 1        (3.37)
        d = log π - log π_old,  k(d) = e^d - d - 1;   phi = 0 for |d| <= delta, k(d) - k(±delta) beyond
        L += beta · mean over responses of mastered groups (p = 1) of mean_t phi(d)
    """

    delta: Positive = 0.01
    """half width of the dead zone of the anchor, nats"""
    beta: Positive = 1.0
    """coefficient of the anchor"""
    eps_high: Positive = 0.28
    aggregation: Aggregation = "seq_mean_token_mean"

    def advantage(self, tk: Tokens) -> Tensor:
        p = group_mean(tk.solved.to(tk.logp.dtype), tk.group)
        s = (p * (1 - p)).sqrt()
        a = (tk.solved.to(p.dtype) - p) / (s * torch.where(p > 0.5, 2 * s, 1)).clamp(min=1e-12)
        return torch.where((p > 0) & (p < 1), a, 0)[:, None].expand(tk.mask.shape)

    def mark(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        mastered = (group_mean(tk.solved.double(), tk.group) == 1) & tk.mask.any(-1)
        each = mastered.double() / (tk.lengths.clamp(min=1) * mastered.sum().clamp(min=1))
        metrics["mastered"] = float(mastered.double().mean()) if len(mastered) else 0.0
        return {"anchor": torch.where(tk.mask, each[:, None].to(adv.dtype), 0)}

    def penalty(self, tk: Tokens, plan: Plan) -> Tensor | None:
        if tk.old_logp is None or self.beta == 0:
            return None
        d = log_ratio(tk.logp, tk.old_logp)
        edge = d.detach().clamp(-self.delta, self.delta)
        k = lambda x: x.exp() - x - 1  # noqa: E731
        phi = torch.where(d.detach().abs() > self.delta, k(d) - k(edge), 0)
        return self.beta * weighted_sum(phi, plan.marks["anchor"])


class PAR(Method, key="par", place="weight", paper="2511.05993", needs=ENTROPY):
    """Multiply positive advantages by a lambda in [0, 1] that follows the entropy. [second-hand] eq. 3-5. The
    paper recommends `entropy` with these defaults. λ = 1 is GRPO, λ = 0 learns from failures only: rewarding
    likely tokens is what lowers H most, entropy_math (2.6).

        w = λ where A > 0, 1 elsewhere                                                                  (3.10)
        entropy   λ <- clip(λ - delta, 0, 1) if H < target else clip(λ + delta, 0, 1), from lam
        stage     λ = 0 in the first half of the run, then linearly 0 -> 1
        epoch     λ = (e - 1)/(E - 1) in epoch e = 1..E;  1 if E = 1
        constant  λ = lam
    """

    schedule: Literal["entropy", "stage", "epoch", "constant"] = "entropy"
    """what moves lambda: entropy, stage, epoch, constant"""
    lam: Share = 0.0
    """lambda of `constant`, and where `entropy` starts"""
    delta: Share = 0.05
    """by how much `entropy` moves lambda at each step"""
    target: Positive = 0.2
    """entropy, nats, below which `entropy` lowers lambda"""
    epochs: Count = 10
    """E of `epoch`: the run is cut into so many equal epochs"""

    state = {"current": "lam"}

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


class RandPosClip(Method, key="rand_pos_clip", place="weight", paper="2511.05993"):
    """Drop a random few of the tokens with positive advantage: the control for Clip-Cov. [second-hand] §7.3.
    It performs like Clip-Cov, so the covariance may not be the point. Its fraction is unknown: Clip-Cov's.

        w = 0 on n = max(⌊ratio · N⌋, 1) tokens with A > 0 drawn uniformly, 1 elsewhere                 (3.10)
    """

    ratio: Share = 2e-4
    """share of the batch's tokens that is dropped; small batches need more, about .02"""

    def eligible(self, tk: Tokens, adv: Tensor) -> Tensor:
        """(B, T) bool: the tokens that are drawn from."""
        return tk.mask & (adv > 0)

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        left = 1 - self.progress.step / max(self.progress.total, 1) if getattr(self, "anneal", False) else 1.0
        n, eligible = fraction_count(self, self.ratio * left, tk.mask), self.eligible(tk, adv)
        picked = top(token_keys(tk, self.progress), eligible, n)
        metrics.update(eligible=int(eligible.sum()), selected=int(picked.sum()))
        return torch.where(picked, 0.0, 1.0)


class ClipCov(RandPosClip, key="clip_cov", paper="2505.22617"):
    """Drop a random few of the tokens whose covariance of advantage and log-prob is high. [paper] eq. 10-12,
    one token of 5,000; [code] verl: means and draws per micro-batch and rank, a floor of one token *each*;
    its scripts set eps_low = eps_high = 1. High c: confident positives, rare negatives; both lower H.

        c = (A - mean A)(log p - mean log p);  all A equal: nothing happens                              (3.7)
        E = {lb < c < ub, not already removed by the PPO clip};  n = max(⌊ratio · N⌋, 1)
        w = 0 on min(n, |E|) tokens of E drawn uniformly, 1 elsewhere
    """

    lb: float = 1.0
    """only tokens with a covariance above lb can be dropped"""
    ub: float = 5.0
    """only tokens with a covariance below ub can be dropped"""
    anneal: bool = False
    """let ratio fall to 0 over the run (2604.09676: annealed, the final policy is unbiased)"""

    def eligible(self, tk: Tokens, adv: Tensor) -> Tensor:
        cov = covariance(tk, adv)
        return tk.mask & (cov > self.lb) & (cov < self.ub) & (self.factor(tk, adv) != 0)


class HighEntropyTokens(Method, key="high_entropy_tokens", place="weight", paper="2506.01939", needs=ENTROPY):
    """Train only on the 20 % of tokens with the highest entropy. [paper] eq. 6; [code], which selects per
    micro-batch. TRL and ms-swift keep H >= a quantile and divide by N: a smaller loss. Penalties see every
    token. Ties are common: a prompt's responses begin in one state.

        S = the k = max(1, ⌈rho · N⌉) tokens of largest H, ties drawn at random;  L = Σ_S l / |S|      (3.9)
    """

    rho: Annotated[float, (1e-9, 1)] = 0.2
    """share of tokens that is kept; 1 is plain GRPO"""

    def keep(self, tk: Tokens, adv: Tensor) -> Tensor:
        k = fraction_count(self, self.rho, tk.mask, math.ceil)
        return top(tk.entropy, tk.mask, k, token_keys(tk, self.progress))


class EntropyAdvantage(Method, key="entropy_advantage", place="weight", paper="2506.14758", needs=ENTROPY):
    """Add a bonus for the token's entropy to its advantage, capped at half of it. [paper] §3-4. It rewards
    reasoning at forks, not entropy, which ends below the baseline's. kappa >= 1 keeps the sign of A.

        A' = A + min(alpha · H, |A| / kappa),   as a weight  w = A'/A                                   (3.12)
    """

    alpha: Positive = 0.4
    """advantage per nat of entropy; 0 is plain GRPO"""
    kappa: AtLeastOne = 2.0
    """the bonus is at most |A| / kappa"""

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        bonus = torch.minimum(self.alpha * tk.entropy, adv.abs() / self.kappa)
        return torch.where(adv == 0, 1, 1 + bonus / torch.where(adv == 0, 1, adv))


class STEER(Method, key="steer", place="weight", paper="2510.10150"):
    """The more a token would move entropy, the smaller its weight. [second-hand] eq. 6-9; [code] STEER:
    max(max M, .02) over micro-batches of 8 responses, H of the old policy, the linear map by default. One
    outlier as the maximum leaves most weights within 1 % of 1: watch weight_std.

        Ω = -I_clip r A p (1 - p)(log p + H)                          theorem (3.13);    exact: Ω = A T
        M = |(A/π_old) p (1 - p)(log p + H)|  = |Ω| / p on-policy, without I_clip               released
        exp      w = exp(-a |Ω| / max |Ω|),  a = -ln(lambda_min);  1 where max |Ω| = 0
        linear   w = w_max - (M - min M)/(max M - min M) (w_max - lambda_min);  all equal: the midpoint
    """

    form: Literal["theorem", "released", "exact"] = "theorem"
    """the entropy score: theorem (paper), released (the code's), exact (the true first-order change)"""
    map: Literal["exp", "linear"] = "exp"
    """score to weight: exp (at most 1), linear (lambda_min to w_max)"""
    lambda_min: Annotated[float, (1e-6, 1)] | None = None
    """the smallest weight; none: .7 (paper) for form=theorem and exact with map=exp, else .8 (released)"""
    w_max: AtLeastOne = 1.2
    """the largest weight of the linear map"""

    @property
    def needs(self) -> tuple[str, ...]:
        return FLOW if self.form == "exact" else ENTROPY

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        released = self.form == "released"  # A/π_old · p (1-p) u = r A (1-p) u, without the clip
        force = adv * log_ratio(tk.logp, tk.old_logp).exp() if released else acting(self, tk, adv)
        omega = flow(tk, force, "exact" if self.form == "exact" else "steer_" + self.form).abs()  # (B, T)
        lowest = self.lambda_min or (0.8 if released or self.map == "linear" else 0.7)
        high = float(omega.max()) if omega.numel() else 0.0
        if self.map == "exp":
            scale = max(high, 0.02) if released else high
            return torch.exp(math.log(lowest) * omega / scale) if scale > 0 else torch.ones_like(omega)
        low = float(torch.where(tk.mask, omega, math.inf).min())
        if not low < high:
            return torch.full_like(omega, (self.w_max + lowest) / 2)
        return self.w_max - (omega - low) / (high - low) * (self.w_max - lowest)


class OPEFO(Method, key="opefo", place="weight", paper="2605.11491"):
    """Weight entropy-raising and entropy-lowering tokens so that their flows cancel, or hold a target.
    [second-hand] eq. 6-9, read per token (inferred; no code is released).

        f = A T,  T = C - p (log p + H)              exact: the true first-order change, our default    (3.14)
        f = -A (1 - p)² (log p + H)                  paper: the integrand of its Eq. 6 at the sampled token
        f = -A p (1 - p)(log p + H)                  theorem: STEER's form
        P = Σ_{f>0} f,   Q = Σ_{f<0} |f|
        λ = (Q - P)/(Q + P)  (+ gain (target - H)/target + integral Σ past errors),  clamped to [-1, 1]
        w = 1 + λ where f > 0,  1 - λ where f < 0,  1 where f = 0      =>     Σ w f = 0 without a target

    The paper's f keeps only the diagonal of ∂p/∂z, dp = p (1 - p) dz with dz = A (1 - p), and drops its p:
    rare tokens dominate, and on the embedded task entropy rises until the reward is gone. Balance alone
    drifts; a target holds, entropy_math (6.2). One empty side gives λ = ±1, which switches the other off.
    """

    form: Literal["exact", "paper", "theorem"] = "exact"
    """a token's entropy change: exact, paper (over-corrects), theorem"""
    sides: Literal["both", "plus", "minus"] = "both"
    """control, which tokens get a weight: both, plus (entropy-raising only), minus (entropy-lowering only)"""
    target_entropy: Above | None = None
    """set point of the token-mean entropy, nats; none: pure balance, the paper's rule"""
    gain: Positive = 2.0
    """strength of the pull to target_entropy; 0: pure balance"""
    integral: Positive = 0.0
    """weight of the sum of past relative errors, which removes the offset; needs target_entropy and gain"""
    lam: Annotated[float, (-1, 1)] | None = None
    """control: a static lambda instead of the computed one; 0 is plain GRPO; none: computed"""
    shuffled_sign: bool = False
    """control: the same weights, dealt to random tokens"""

    state = {"error_sum": 0.0}
    last = True  # in a composition it balances what the others leave

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.integral and (self.target_entropy is None or self.gain == 0):
            who = f"integral={self.integral}, target_entropy={self.target_entropy}, gain={self.gain}"
            raise ValueError(f"opefo: {who}: give a target_entropy and a gain above 0, or integral=0")

    @property
    def needs(self) -> tuple[str, ...]:
        return FLOW if self.form == "exact" else ENTROPY

    def _lambda(self, f: Tensor, entropy: float) -> float:
        if self.lam is not None:
            return self.lam
        rising, falling = f.clamp(min=0).sum(dtype=torch.float64), -f.clamp(max=0).sum(dtype=torch.float64)
        gain = 0.0 if self.target_entropy is None else self.gain
        past = self.target_entropy * self.integral * self.error_sum / gain if self.integral else 0.0
        return set_point_lambda(rising, falling, entropy - past, self.target_entropy, gain)

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        name = {"exact": "exact", "paper": "opefo", "theorem": "steer_theorem"}[self.form]
        f = flow(tk, acting(self, tk, adv), name)  # (3.14)
        if self.aggregation not in ("token_mean", "token_sum"):
            f = f * self.coefficients(tk.mask, f.dtype)  # each token's share: the flow of the real loss
        metrics["lam"] = lam = self._lambda(f, metrics["entropy"])
        w = 1 + lam * f.sign()  # (B, T)
        if self.sides != "both":
            w = torch.where(f > 0 if self.sides == "plus" else f < 0, w, 1)
        if self.shuffled_sign:  # the values of w on the mask, dealt out anew
            values, keys = w[tk.mask], (token_keys(tk, self.progress, i)[tk.mask] for i in (0, 1))
            source, target = (key.argsort(stable=True) for key in keys)
            w[tk.mask] = values.index_copy(0, target, values[source])
        return w

    def after_step(self, plan: Plan) -> None:
        if self.target_entropy is not None:
            error, lam = (self.target_entropy - plan.entropy) / self.target_entropy, plan.metrics["lam"]
            if abs(lam) < 1 or error * lam < 0:  # where λ is clamped the sum does not wind up further
                self.error_sum += error


class PAPO(Method, key="papo", place="weight", paper="2605.11775", needs=FLOW):
    """Reconstruction: favour entropy-raising tokens while entropy falls, and the reverse. Published
    [second-hand] are the product A T, both branches kept, and the entropy e of the run as the signal; the
    weights are a [reconstruction]. The first update has phi = 0.

        P_t = A T  (the first-order change; A, not I_clip r A);   phi = clip((e_ref - e)/e_ref, -1, 1)  (3.15)
        w = 1 + lam phi where P_t > 0,  1 - lam phi where P_t < 0,  1 where P_t = 0
    """

    lam: Annotated[float, (0, 0.999)] = 0.3
    """largest change of a weight, below 1"""
    reference: Literal["ema", "target"] = "ema"
    """what entropy is compared with: ema (its own, .9), target"""
    target: Above = 0.5
    """the reference of reference=target, nats"""

    state = {"e_ref": None}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.e_ref = self.target if self.reference == "target" else None

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        e = metrics["entropy"]
        phi = 0.0 if self.e_ref is None else min(max((self.e_ref - e) / max(self.e_ref, 1e-9), -1.0), 1.0)
        metrics["phi"] = phi
        return 1 + self.lam * phi * flow(tk, adv, "exact").sign()  # (3.15)

    def after_step(self, plan: Plan) -> None:
        if self.reference == "ema":
            self.e_ref = plan.entropy if self.e_ref is None else 0.9 * self.e_ref + 0.1 * plan.entropy


class CWGRPO(Method, key="cw_grpo", place="weight", paper="2605.11538", needs=("logp", "group")):
    """A Gaussian weight around zero covariance of advantage and log-prob, mean weight 1. [second-hand, two
    agreeing notes]; [code] WangCheng0116/CW-GRPO, whose README names no paper. In words the paper's one group
    is its batch, so the scope is ambiguous; the code has one group a micro-batch, padding in the normaliser,
    and does not detach w: the loss is -A w(log p), and its gradient runs through w, means and σ as well.

        c = (log p - mean log p)(A - mean A);   w = exp(-c²/(2 σ²)),  σ = std of c;   w <- w N / Σ w    (3.16)
        released: per group; mean log p of the response, mean A of responses; N = rows · longest response
        w = 1 where σ² is below 1e-6 of the mean of c²: rounding, two tokens have equal c
    """

    form: Literal["paper", "released"] = "paper"
    """paper: detached weights of mean 1; released: as in the code, with scope=group and the gradient of w"""
    scope: Literal["batch", "group"] = "batch"
    """over what means and σ are taken: batch, group"""

    def kernel(self, logp: Tensor, adv: Tensor, mask: Tensor, group: Tensor) -> Tensor:
        """(B, T) float64, differentiable in `logp`."""
        part = group if self.scope == "group" or self.form == "released" else torch.zeros_like(group)
        w = torch.ones_like(adv, dtype=torch.float64)
        for g in part.unique():
            rows = part == g
            inside = mask & rows[:, None]
            if self.form == "paper":
                c, n = centred(logp, inside) * centred(adv, inside), inside.sum()
            else:
                x = torch.where(inside, logp, 0).double()
                each = x.sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp(min=1)
                own = torch.where(inside, adv, 0).double().sum(-1) / inside.sum(-1).clamp(min=1)
                heard = inside.any(-1)
                mean = own[heard].mean() if bool(heard.any()) else own.sum()
                c = torch.where(inside, (x - each) * (adv.double() - mean), 0)
                n = heard.sum() * inside.sum(-1).max()
            variance = masked_mean(centred(c, inside) ** 2, inside)
            if variance > 1e-6 * masked_mean(c**2, inside):
                above = c**2 - c[inside].square().min()  # the largest k is 1: their sum cannot underflow
                k = torch.where(inside, torch.exp(-above / (2 * variance)), 0)
                w = torch.where(inside, k * n / k.sum(), w)
        return w

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        return self.kernel(tk.logp, adv, tk.mask, tk.group)

    def mark(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        if self.form == "paper":
            return {}
        with torch.enable_grad():  # of the whole batch at once: a micro-batch would not know σ
            logp = tk.logp.detach().double().requires_grad_()
            w = self.kernel(logp, adv, tk.mask, tk.group)
            bounds = (self.eps_low, self.eps_high, self.dual_clip)
            loss = torch.where(tk.mask, clipped_surrogate(tk.logp, tk.old_logp, adv, *bounds).double(), 0)
            total = weighted_sum(loss * w, self.coefficients(tk.mask, loss.dtype))
            through = torch.autograd.grad(total, logp)[0] if total.requires_grad else torch.zeros_like(logp)
        return {"through": through.to(adv.dtype)}

    def penalty(self, tk: Tokens, plan: Plan) -> Tensor | None:
        """The gradient through w: a sum whose value is 0."""
        if "through" not in plan.marks:
            return None
        through = torch.where(tk.mask, plan.marks["through"], 0)
        return (through * (tk.logp - tk.logp.detach())).sum()


class STARE(Method, key="stare", place="weight", paper="2606.19236", needs=ENTROPY):
    """Below an entropy target, amplify the most surprising tokens with positive advantage. [code]
    hp-luo/STARE, which selects per micro-batch.

        gate = I[e < target]                                                                            (3.18)
        L+ = the ⌈fraction · |T+|⌉ tokens of largest surprisal -log p among T+ = {A > 0};  L- same for A < 0
        w = W on L+,  M on L- (variant C2 only),  1 elsewhere;  all 1 if the gate is closed
        adaptive: W <- clip(W + rate s, 1, 1.5),  M <- clip(M - rate s, .5, 1),  s = sgn(target - e),
        before the loss of the same step
    """

    fraction: Share = 0.1
    """share of the tokens of each sign that is selected"""
    up: AtLeastOne = 1.1
    """W, weight of surprising tokens with A > 0; 14B and 32B models: 1.05"""
    down: Share = 0.9
    """M, weight of surprising tokens with A < 0, variant C2; 14B and 32B models: .95"""
    target: float = 0.3
    """the gate is open while entropy is below it, nats"""
    variant: Literal["O1", "C2"] = "O1"
    """O1 (only A > 0), C2 (both signs)"""
    adaptive: bool = False
    """let W and M follow the entropy"""
    rate: Positive = 0.01
    """step of the adaptive W and M"""

    state = {"W": "up", "M": "down"}

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor | None:
        gate, (W, M) = metrics["entropy"] < self.target, self.moved(metrics["entropy"])
        metrics.update(gate=float(gate), W=W, M=M)
        if not gate:
            return None
        w, keys = torch.ones_like(adv), token_keys(tk, self.progress)
        sides = [(adv > 0, W), (adv < 0, M)]
        for side, value in sides if self.variant == "C2" else sides[:1]:
            k = fraction_count(self, self.fraction, side & tk.mask, math.ceil)
            w = torch.where(top(-tk.logp, side & tk.mask, k, keys), value, w)
        return w

    def moved(self, entropy: float) -> tuple[float, float]:
        """W and M of a step, from those of the step before."""
        if not self.adaptive:
            return self.W, self.M
        move = self.rate * ((entropy < self.target) - (entropy > self.target))
        return min(max(self.W + move, 1.0), 1.5), min(max(self.M - move, 0.5), 1.0)

    def after_step(self, plan: Plan) -> None:
        self.W, self.M = self.moved(plan.entropy)


class EntroPIC(Method, key="entropic", place="weight", paper="2511.15248", needs=ENTROPY):
    """PI controller: weigh successes and failures among confident tokens to hold an entropy. [code]
    yk7333/EntroPIC `core_algos.py`, `dp_actor.py`; it has alpha and S per micro-batch and divides by
    N_confident: where few tokens are confident this turns their sign. A mismatch weight on the extra term is
    ours. With the denominator `all` A > 0 weighs 1 + alpha and A < 0 1 - alpha: too little entropy damps
    confident successes, amplifies confident failures.

        e = H - target;   alpha = clip(kp e + ki S, -1, 1),  S the sum of all earlier e                 (3.19)
        L = agg(clipped surrogate) + alpha · mean over {p > threshold} of (-r |A|), unclipped
    """

    kp: Positive = 1.0
    """proportional gain per nat"""
    ki: Positive = 0.01
    """integral gain per nat and step"""
    threshold: Share = 0.95
    """a token is confident above this probability"""
    target: Above = 0.1
    """entropy to hold, nats"""
    denominator: Literal["own", "all"] = "own"
    """the extra term is divided by: own (number of confident tokens, as released), all (N)"""

    state = {"error_sum": 0.0}

    def mark(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        error = metrics["entropy"] - self.target
        alpha = min(max(self.kp * error + self.ki * self.error_sum, -1.0), 1.0)
        confident = tk.mask & (tk.logp.exp() > self.threshold)
        coef = self.coefficients(confident if self.denominator == "own" else tk.mask, adv.dtype)
        touched = confident & (adv != 0) & (alpha != 0)
        metrics.update(alpha=alpha, selected=int(confident.sum()))
        metrics["tokens_touched"] = float(masked_mean(touched.float(), tk.mask))
        return {"extra": torch.where(confident, alpha * coef, 0)}

    def penalty(self, tk: Tokens, plan: Plan) -> Tensor:
        loss = -log_ratio(tk.logp, tk.old_logp).exp() * plan.adv.abs()
        return weighted_sum(loss if tk.mismatch is None else loss * tk.mismatch, plan.marks["extra"])

    def after_step(self, plan: Plan) -> None:
        self.error_sum += plan.entropy - self.target


class REPO(Method, key="repo", place="weight", paper="2603.11682", needs=ENTROPY):
    """Weight rare tokens up where they are rewarded and down where punished, as entropy asks for it. [code,
    third-party] SkyRL `repo_r`; direct: [second-hand, four agreeing notes]. No author code is public.

        rescale  w = max(0, 1 - zeta sgn(A) log p),  log p >= -20                                       (3.30)
        direct   A' = A - beta (log p + H);  E_{y~p}[-(log p + H) ∇log p] = ∇H: the entropy bonus as a
                 score function, without the graph of the entropy and with H as control variate
        zeta, once a step: up while H < target, down while H > target: doubled away from zero, from z_min
        to z_max, halved towards it, and through it at ±z_min

    Rescaling is not centred: with zeta > 0 right answers only gain and wrong ones only lose weight.
    """

    form: Literal["rescale", "direct"] = "rescale"
    """rescale (REPO-R, with zeta), direct (the general form, with beta)"""
    zeta: Annotated[float, (-1, 1)] = 0.001
    """strength of the rescaling at the start"""
    adaptive: bool = True
    """let zeta follow the entropy"""
    target: Above | None = None
    """entropy to hold, nats; none: that of the first step"""
    z_min: Above = 1e-4
    """smallest |zeta| once it moves"""
    z_max: Above = 0.05
    """largest |zeta|"""
    beta: Positive = 0.001
    """coefficient of form=direct"""

    state = {"now": "zeta", "goal": "target"}

    def advantage(self, tk: Tokens) -> Tensor:
        adv = super().advantage(tk)
        return adv - self.beta * (tk.logp + tk.entropy) if self.form == "direct" else adv

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor | None:
        if self.form == "direct":
            return None
        metrics["zeta"] = self.now
        return (1 - self.now * adv.sign() * tk.logp.clamp(min=-20)).clamp(min=0)

    def after_step(self, plan: Plan) -> None:
        if self.form == "direct" or not self.adaptive or math.isnan(plan.entropy):
            return
        self.goal = plan.entropy if self.goal is None else self.goal
        side = (plan.entropy < self.goal) - (plan.entropy > self.goal)  # the sign that zeta should have
        z = side * self.now  # > 0: zeta already points there
        if side and z >= 0:
            self.now = side * min(max(2 * z, self.z_min), self.z_max)
        elif side:
            self.now = side * (z / 2 if -z / 2 >= self.z_min else self.z_min)


class AR(Method, key="ar", place="weight", paper="2505.12929", needs=("logp",)):
    """Rare tokens count less, whatever their sign. [code] zhyang2226/AR-Lopti; alpha .3 together with Lopti,
    two separate steps for rare and likely tokens, which is a loop and not a hook. A token's gradient is
    proportional to 1 - π, so rare ones dominate. The opposite of REPO on successes.

        w = alpha π_old(y) + 1 - alpha                                                                  (3.40)
    """

    alpha: Share = 0.2
    """weight that a token of probability 0 loses"""

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        return 1 - self.alpha + self.alpha * tk.logp_before.exp()


def asked_again(tokens: Tokens, chance: Generator, room: float = math.inf) -> tuple[Tensor, Tokens]:
    """Right responses behind a longer prompt: the prompt, another right response to it, the prompt again, all
    in token ids. The other one is drawn from the group, among those with which the row has at most `room`
    tokens. (N,) the rows for which there is one, and these N responses."""
    device, width = tokens.ids.device, tokens.full_ids.shape[1]
    end = (tokens.start + 1 + tokens.lengths).cpu()  # of prompt and response, in each row
    right, group = tokens.solved.cpu(), tokens.group.cpu()
    pair = right & right[:, None] & (group == group[:, None]) & (end + end[:, None] <= room)
    pair &= ~torch.eye(len(end), dtype=torch.bool)
    rows = pair.any(1).nonzero()[:, 0]
    other = torch.multinomial(pair[rows].float(), 1, generator=chance)[:, 0].to(device)
    rows, end = rows.to(device), end.to(device)
    column, seam = torch.arange(2 * width, device=device), end[other][:, None]
    row = torch.where(column < seam, other[:, None], rows[:, None])
    place = torch.where(column < seam, column, column - seam).clamp(max=width - 1)
    own = tokens.rows(rows)
    return rows, replace(own, full_ids=tokens.full_ids[row, place], start=own.start + end[other])


class RLRT(Method, key="rlrt", place="weight", paper="2605.10781", needs=("teacher_logp", *GROUPED)):
    """Weigh tokens of right responses by how much less likely another right one, read first, makes them.
    [second-hand], two notes with equations; the teacher's prompt is not public and a [reconstruction]
    (`asked_again`): the prompt, another right response of the group with its EOS, the prompt again.

        D = log π_old(y) - log π_old(y | prompt, other right response, prompt)
        w = 1 + lam (clip(e^(D sgn A), 1 - e, 1 + e) - 1) if R = 1, else 1                              (3.41)

    R = 1 implies A >= 0: the sign is decoration. Without the gate R = 1 the authors see a collapse after some
    40 steps. The other response shows the answer, so D also measures what anyone would know who has read it.
    The mean of w is not 1, and the clip is lopsided: at e = 1 it cuts above only. w = 1 where there is no
    other right response, or the row would exceed the model's context. Costs a pass over the longer rows.
    The embedded model was never asked twice and is a poor teacher: most of its D stand on the upper clip.
    """

    lam: Share = 0.5
    """share of the weight in the advantage; 0 is plain GRPO"""
    e: Positive = 1.0
    """half width of the clip around 1; the paper has .5 for instruct models, .2 for thinking models"""

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        taught = tk.solved[:, None] & (tk.teacher_logp > -math.inf)
        d = torch.where(taught, tk.logp_before - tk.teacher_logp, 0)
        w = (d * adv.sign()).exp().clamp(1 - self.e, 1 + self.e)
        return 1 + self.lam * (w - 1)


class AEM(Method, key="aem", place="weight", paper="2605.00425", needs=ENTROPY):
    """Reconstruction: responses of low mean entropy count more, whatever their sign. Theory [second-hand],
    formula [reconstruction] in the style of EMPG (2509.09265); the paper's scaling is not known. Explores
    while failures dominate: pushing confident failures harder raises H. All h equal: g = 1.

        h_i = mean H of response i, min-max scaled over the batch;  g_i = exp(-k h_i)/mean exp(-k h)  (3.25)
    """

    k: Positive = 1.0
    """strength; 0 is plain GRPO"""

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        some = tk.mask.any(-1)
        h = torch.where(tk.mask, tk.entropy, 0).sum(-1).double() / tk.lengths.clamp(min=1)  # (B,)
        low = torch.where(some, h, math.inf).min()
        span = torch.where(some, h, -math.inf).max() - low
        g = torch.exp(-self.k * (h - low) / span) if span > 0 else torch.ones_like(h)
        return (g / masked_mean(g, some))[:, None].expand(adv.shape)


# ------------------------------------------------------------------------------------------------------------
# 4. Ratio: the shape of the surrogate in r = π/π_old.  Most do nothing strictly on-policy (grpo)


class FromFactor(Method):
    """A method whose surrogate is given by its gradient, `factor` · A: -factor · A · (π / sg π), (B, T)."""

    def surrogate(self, tk: Tokens, plan: Plan) -> Tensor:
        once = (tk.logp - tk.logp.detach()).exp()  # value 1
        return -self.factor(tk, plan.adv, plan.marks) * plan.adv * once


class ClipHigher(Method, key="clip_higher", place="ratio", paper="2503.14476", on_policy=False):
    """A higher upper clip lets rare successful tokens rise further. [paper] §3.1. It bounds p_new/p_old by
    1 + eps_high (3.6): at .2 a token at .01 may add .002, one at .9 may add .1. Lower clips raise entropy,
    upper ones lower it, at random rewards too (2509.26114)."""

    eps_high: Positive = 0.28


class CISPO(Method, key="cispo", place="ratio", paper="2506.13585", on_policy=False, without=("dual_clip",)):
    """Clipped importance weight times log-prob: no token loses its gradient. [paper] eq. 4-5, without a lower
    bound and without the value of eps_high; TRL's example caps r at 5, our default (TRL's epsilon_high *is*
    the cap, verl's is cap - 1). Inside the range the gradient is PPO's.

        l = -sg(clip(r, 1 - eps_low, 1 + eps_high)) A log π                                             (3.20)
    """

    eps_low: Positive = 1.0
    """r is clipped from below at 1 - eps_low; 1: not at all"""
    eps_high: Positive = 4.0
    """r is clipped from above at 1 + eps_high"""

    def factor(self, tk: Tokens, adv: Tensor, marks: dict[str, Tensor] | None = None) -> Tensor:
        return log_ratio(tk.logp, tk.old_logp).exp().detach().clamp(1 - self.eps_low, 1 + self.eps_high)

    def surrogate(self, tk: Tokens, plan: Plan) -> Tensor:
        return -self.factor(tk, plan.adv) * plan.adv * tk.logp  # (3.20)


class GSPO(Method, key="gspo", place="ratio", paper="2507.18071", on_policy=False, without=("dual_clip",)):
    """Clip the response's mean ratio instead of each token's. [paper]; [code] verl core `gspo`. On-policy
    only the aggregation differs from GRPO. s_i is of the whole response, whatever another method keeps of it.

        s_i = exp(mean_t log r_it),   l_i = max(-s_i A, -clip(s_i, 1 - eps_low, 1 + eps_high) A)        (3.22)
        per token, same gradient under seq_mean: log s_it = log π - sg(log π) + sg(log s_i), at most 10
    """

    eps_low: Positive = 3e-4
    """s is clipped from below at 1 - eps_low"""
    eps_high: Positive = 4e-4
    """s is clipped from above at 1 + eps_high"""
    aggregation: Aggregation = "seq_mean_token_mean"

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


class SAPO(FromFactor, key="sapo", place="ratio", paper="2511.20347", on_policy=False):
    """A sigmoid instead of the clip: far ratios fade out, none is cut off. [code] verl, TRL, SkyRL agree.
    On-policy only the aggregation differs from GRPO.

        l = -(4/t) σ(t (r - 1)) A,  t = t_plus if A > 0 else t_minus                                    (3.43)
        force  4 s (1 - s) r A,  s = σ(t (r - 1)): A at r = 1, 1.41 A at 1.5, 1.26 A at 3, then falling
    """

    t_plus: Above = 1.0
    """steepness for A > 0"""
    t_minus: Above = 1.05
    """steepness for A < 0"""
    aggregation: Aggregation = "seq_mean_token_mean"

    without = ("dual_clip", "eps_low", "eps_high")

    def factor(self, tk: Tokens, adv: Tensor, marks: dict[str, Tensor] | None = None) -> Tensor:
        r = log_ratio(tk.logp, tk.old_logp).exp().detach()
        s = (torch.where(adv > 0, self.t_plus, self.t_minus) * (r - 1)).sigmoid()
        return 4 * s * (1 - s) * r


class BAPO(FromFactor, key="bapo", place="ratio", paper="2510.18927", on_policy=False):
    """Widen the clip until successes carry enough of the loss. [code] WooooDyy/BAPO, per micro-batch.
    A higher lower bound drops punished tokens that are rare by now, a higher upper one admits rare successes.
    The paper compares with the whole loss, the code with the failures: 1 here is .5 there.

        eff = min(r, hi) A where A >= 0, max(r, lo) A where A < 0;   ratio = Σ eff+ / Σ |eff-|          (3.44)
        while ratio < target: lo += .05 up to lo_max; then hi += .05 up to hi_max;  r clipped to [lo, hi]
    """

    target: Positive = 1.0
    """wanted ratio of what successes and failures contribute; 0: the bounds stay where they start"""
    lo: Share = 0.6
    """lower bound at the start"""
    lo_max: Share = 0.8
    """highest lower bound"""
    hi: AtLeastOne = 1.2
    """upper bound at the start"""
    hi_max: AtLeastOne = 2.0
    """highest upper bound"""
    dual_clip: DualClip | None = 3.0

    without = ("eps_low", "eps_high")

    def bounds(self, tk: Tokens, adv: Tensor) -> tuple[float, float]:
        """(lo, hi) after the search over the whole batch."""
        r = torch.where(tk.mask, log_ratio(tk.logp, tk.old_logp).exp().detach(), 1).double()
        a, lo, hi = torch.where(tk.mask, adv, 0).double(), self.lo, self.hi

        def short() -> bool:
            up, down = (r.clamp(max=hi) * a.clamp(min=0)).sum(), (r.clamp(min=lo) * -a.clamp(max=0)).sum()
            return bool(down > 0) and bool(up < self.target * down)

        while lo < self.lo_max - 1e-9 and short():
            lo = min(lo + 0.05, self.lo_max)
        while hi < self.hi_max - 1e-9 and short():
            hi = min(hi + 0.05, self.hi_max)
        return lo, hi

    def mark(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        metrics["clip_low"], metrics["clip_high"] = self.bounds(tk, adv)
        return {"bounds": adv.new_tensor([[metrics["clip_low"], metrics["clip_high"]]]).expand(len(adv), 2)}

    def factor(self, tk: Tokens, adv: Tensor, marks: dict[str, Tensor] | None = None) -> Tensor:
        lo, hi = (marks or self.mark(tk, adv, {}))["bounds"][:, None].unbind(-1)  # (B, 1) each
        r = log_ratio(tk.logp, tk.old_logp).exp().detach()
        clipped = ((adv > 0) & (r > hi)) | ((adv < 0) & (r < lo))
        return dual_clip_factor(torch.where(clipped, 0, r), adv, self.dual_clip)


class SimKO(Method, key="simko", place="ratio", paper="2510.14807"):
    """Share the push on a right token with the most likely ones, and punish a wrong favourite more. [code]
    CLR-Lab/SimKO, `compute_policy_loss`; active on-policy, and the only method that pushes tokens that nobody
    drew. Only where a response is unsure: H above its tau-quantile in the response.

        right, unsure:  log r gets the slope of (1 - alpha) log π(y) + (alpha/K) Σ_k log π_k            (3.49)
        wrong, unsure, y the most likely token:  A <- lam A

    The value of r stays, so the clip does, and a clipped token loses the push of the K as well. Exact flow of
    a shared token: A [(1 - alpha) T_y + (alpha/K) Σ_k T_k]; the ledger's tabular flow sees the first term. At
    alpha = .01 a token that is not y gets at most 1/300 of the push. Costs all logits at once.
    """

    k: Count = 3
    """how many of the most likely tokens share"""
    alpha: Share = 0.01
    """their share of the push; 0 with lam=1 is plain GRPO"""
    tau: Share = 0.8
    """quantile of the entropies of a response above which its tokens count as unsure"""
    lam: AtLeastOne = 1.1
    """factor on the advantage of a wrong most likely token"""

    needs = ("entropy", "topk_logp", *GROUPED)

    @property
    def topk(self) -> int:
        return self.k

    def unsure(self, tk: Tokens) -> Tensor:
        """(B, T) bool."""
        edge = torch.where(tk.every, tk.entropy, math.nan).nanquantile(self.tau, dim=1, keepdim=True)
        return tk.mask & (tk.entropy > edge)

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        favourite = tk.logp >= tk.topk_logp[..., 0] - 1e-4  # the same number but for rounding
        punished = self.unsure(tk) & (adv < 0) & favourite
        return torch.where(punished, self.lam, 1.0)

    def mark(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        shared = self.unsure(tk) & tk.solved[:, None]
        metrics["shared"] = float(masked_mean(shared.float(), tk.mask))
        return {"shared": shared}

    def factor(self, tk: Tokens, adv: Tensor, marks: dict[str, Tensor] | None = None) -> Tensor:
        shared = (marks or self.mark(tk, adv, {}))["shared"]
        return torch.where(shared, 1 - self.alpha, 1.0) * super().factor(tk, adv)

    def surrogate(self, tk: Tokens, plan: Plan) -> Tensor:
        own, others = (x - x.detach() for x in (tk.logp, tk.topk_logp.mean(-1)))  # 0, with a slope
        mixed = torch.where(plan.marks["shared"], tk.logp + self.alpha * (others - own), tk.logp)
        return super().surrogate(replace(tk, logp=mixed), plan)


class CEGPPO(FromFactor, key="ce_gppo", place="ratio", paper="2509.20712", on_policy=False):
    """Tokens that PPO clips keep a bounded share of their gradient. [code] Kwai-Klear/CE-GPPO. (b1, b2): 7B
    (.75, 1), 1.5B (.5, 1), config (.25, 1); both 0: PPO's gradient; b2 = 1: continuous at 1 + eps_high.

        A < 0, r < 1 - eps_low:   l = -b1 (1 - eps_low) (r/sg r) A      rare failures: lowers H         (3.27)
        A > 0, r > 1 + eps_high:  l = -b2 (1 + eps_high) (r/sg r) A     rare successes: raises H
        else:                     l = -r A;    then dual clip
    """

    b1: Positive = 0.75
    """gradient kept below 1 - eps_low, for A < 0"""
    b2: Positive = 1.0
    """gradient kept above 1 + eps_high, for A > 0"""
    dual_clip: DualClip | None = 10.0

    def factor(self, tk: Tokens, adv: Tensor, marks: dict[str, Tensor] | None = None) -> Tensor:
        r = log_ratio(tk.logp, tk.old_logp).exp().detach()
        f = torch.where((adv < 0) & (r < 1 - self.eps_low), self.b1 * (1 - self.eps_low), r)
        f = torch.where((adv > 0) & (r > 1 + self.eps_high), self.b2 * (1 + self.eps_high), f)
        return dual_clip_factor(f, adv, self.dual_clip)


def dual_clip_factor(f: Tensor, adv: Tensor, c: float | None) -> Tensor:
    """The dual clip min(l, -c A) for A < 0 on a surrogate l = -f A: no gradient where f > c."""
    return f if c is None else torch.where((adv < 0) & (f > c), 0, f)


class HTPO(FromFactor, key="htpo", place="ratio", paper="2605.08283", needs=("entropy", *GROUPED)):
    """Other clip rules by difficulty of the prompt, correctness and entropy of the token. [code] xcyao00/HTPO
    `core_algos.py`. Prompt hard iff group accuracy < hard; token high iff H >= the max(⌊high · len⌋, 1)-th
    largest of its own response; id = exp(log π - sg log π).                                           (3.24)

        hard, correct, low     PPO; drop H below the max(⌊low_drop · n⌋, 1)-th smallest, n of these tokens
        hard, correct, high    -r A;  r > 1 + eps_high: +(1 + eps_high) A id;  r < 1 - eps_low: -(1/r) A id
        wrong, high            -r A;  r < 1 - eps_low: +(1 - eps_low) A id, which pushes the token back up
        easy, correct, high    PPO; drop H at or above the max(⌊high_drop · n⌋, 1)-th largest
        all others             PPO;    then dual clip everywhere

    The code's second row has a plus at r < 1 - eps_low, which lowers a successful token: a slip, it seems
    (`released_sign`). Its 1/r grows up to e^20. Both drops are of one response: at least one high token of
    each easy, right one; of a hard, right one no low token unless it has 2/low_drop of them, since `<` is
    strict. On-policy only the drops act.
    """

    hard: Share = 0.6
    """a prompt is hard if fewer of its responses are right"""
    high: Share = 0.2
    """share of a response's tokens that counts as high-entropy"""
    low_drop: Share = 0.006
    """share dropped among hard, correct, low-entropy tokens"""
    high_drop: Share = 0.02
    """share dropped among easy, correct, high-entropy tokens"""
    released_sign: bool = False
    """reproduce the code's sign in the second rule"""
    eps_high: Positive = 0.28
    dual_clip: DualClip | None = 10.0

    def mark(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        high = tk.mask & (tk.entropy >= self.nth(tk.entropy, tk.mask, self.high))
        hard = group_mean(tk.solved.double(), tk.group) < self.hard
        return {"high": high, "hard": hard, "correct": tk.solved}

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        m = self.mark(tk, adv, metrics)
        low = (m["hard"] & m["correct"])[:, None] & tk.mask & ~m["high"]
        high = (~m["hard"] & m["correct"])[:, None] & m["high"]
        low = low & (tk.entropy < -self.nth(-tk.entropy, low, self.low_drop)) & (self.low_drop > 0)
        high = high & (tk.entropy >= self.nth(tk.entropy, high, self.high_drop)) & (self.high_drop > 0)
        metrics["selected"] = int((low | high).sum())
        return torch.where(low | high, 0.0, 1.0)

    @staticmethod
    def nth(score: Tensor, inside: Tensor, share: float) -> Tensor:
        """(B, 1): in each response the max(⌊share · n⌋, 1)-th largest score of the n tokens inside."""
        k = (share * inside.sum(-1).double()).long().clamp(min=1)
        falling = torch.where(inside, score, -math.inf).sort(-1, descending=True).values
        return falling.gather(-1, k[:, None] - 1)

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


class EntropyBonus(Method, key="entropy_bonus", place="penalty", paper="verl, TRL", needs=ENTROPY):
    """Add alpha times the entropy to the objective: blunt, and hard to tune. [code] verl `entropy_coeff`, TRL
    `entropy_coef`.

        L = L_pg - alpha · mean H,     ∂(-alpha H)/∂z_v = alpha p_v (log p_v + H)                        (3.2)

    z: scaled logits. Pushes every state towards uniform, however certain it should be. On a 7B model
    (2505.22617) alpha 1e-3 did little, 5e-3 stabilised without gain, 1e-2 exploded. Costs one more backward
    pass through the vocabulary.
    """

    alpha: Positive = 0.001
    """coefficient of the mean entropy, per nat; negative values are refused"""

    @property
    def entropy_grad(self) -> bool:
        return self.alpha != 0

    def penalty(self, tk: Tokens, plan: Plan) -> Tensor | None:
        return -self.alpha * weighted_sum(tk.entropy, plan.coef_all) if self.alpha else None


class AdaptiveEntropy(Method, key="adaptive_entropy", place="penalty", paper="2505.22312", needs=ENTROPY):
    """Entropy bonus whose coefficient grows below a target. [paper] eq. 3.1-3.2 (Skywork-OR1); [code]; TRL.

        alpha = c I[e <= target];   c <- c + delta if e < target,  c - delta if e > target;  from 0   (3.3)

    c is clipped to [c_min, c_max]. `released` gates with the previous step's entropy (open at the start),
    strictly, and counts equality as above; its scripts have delta .0001, c in [0, .005] and a sampled e.
    """

    target: float = 0.2
    """entropy below which the bonus acts, nats"""
    delta: Positive = 0.005
    """step of the coefficient"""
    c_min: float = 0.0
    """smallest coefficient"""
    c_max: float = 1.0
    """largest coefficient (not in the paper; TRL has 1)"""
    variant: Literal["paper", "released"] = "paper"
    """paper (gate on this step's entropy), released (on the last one's)"""

    state = {"c": 0.0, "enabled": True}

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
        metrics["alpha"] = self.alpha(metrics["entropy"])
        return {}

    def penalty(self, tk: Tokens, plan: Plan) -> Tensor | None:
        alpha = self.alpha(plan.entropy)
        return -alpha * weighted_sum(tk.entropy, plan.coef_all) if alpha else None

    def after_step(self, plan: Plan) -> None:
        s = (plan.entropy < self.target) - (plan.entropy > self.target)
        if self.variant == "released":
            self.enabled = s > 0
            s = s or -1
        self.c = min(max(self.c + s * self.delta, self.c_min), self.c_max)


class RefKL(Method, key="ref_kl", place="penalty", paper="2402.03300", needs=("logp", "ref_logp")):
    """Add beta times the KL to the starting policy. [paper] §4.2.

        L = L_pg + beta · mean kl(log π, log π_ref)                                                      (3.4)

    Our default k2 has the gradient of KL(π||π_ref), the paper's k3 that of the reverse KL, grpo (2.13) to
    (2.16). k1 does not know the reference: its gradient E[∇log π(y)] is 0 for y ~ π; for y ~ π_old, in later
    updates, it leads away from the policy that sampled. abs: while π is π_ref, its sign is rounding. beta:
    .04 GRPO, .001 DeepSeek-R1 and verl, .05 open-instruct, 0 DAPO, TRL. 2505.22617: H stays, accuracy falls.
    """

    beta: Positive = 0.04
    """coefficient of the KL term"""
    estimator: Literal["k1", "k2", "k3", "abs"] = "k2"
    """k2 (right gradient), k3 (papers), k1 (no pull), abs"""

    def penalty(self, tk: Tokens, plan: Plan) -> Tensor | None:
        if not self.beta:
            return None
        return self.beta * weighted_sum(kl_penalty(tk.logp, tk.ref_logp, self.estimator), plan.coef_all)


class ProRL(RefKL, key="prorl", paper="2505.24864"):
    """KL to a reference that is moved to the policy, optimizer cleared, when progress stalls. [paper] eq. 4,
    §2.3-3.2; [code] NeMo-RL, OpenRLHF recipes (v2).

        L = L_pg + beta KL(π||π_ref);   at a reset  π_ref <- π,  optimizer state <- 0                    (3.5)

    The paper resets when the validation score stagnates, without beta or estimator (v2: 1e-4, k2), and adds
    clip-higher at .4 and dynamic sampling: `prorl+dapo:eps_high=.4`. TRL keeps the optimizer.
    """

    beta: Positive = 0.001
    """coefficient of the KL term (not given in the paper)"""
    every: Annotated[int, (0, math.inf)] = 0
    """reset every so many steps; 0: by patience"""
    patience: Count = 3
    """reset after so many evaluations without a new best score"""

    state = {"best": -math.inf, "waited": 0}

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

    def pick(self, tk: Tokens, picked: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        """What `mark` returns for the picked tokens, (B, T) bool."""
        metrics["selected"] = int(picked.sum())
        metrics["tokens_touched"] = metrics["selected"] / max(int(tk.mask.sum()), 1)
        return {"picked": picked}

    def penalty(self, tk: Tokens, plan: Plan) -> Tensor:
        d = torch.where(plan.marks["picked"], self.distance(tk, plan.marks["picked"]), 0)
        return self.beta * weighted_sum(d, plan.coef)


class KLCov(OnPicked, key="kl_cov", place="penalty", paper="2505.22617", on_policy=False):
    """KL penalty to the old policy on the few tokens of highest covariance, no clip. [paper] eq. 13-14;
    [code] PRIME, verl.

        l = -r A (no clip);  l += beta · d(π, π_old) on the max(1, ⌊ratio · N⌋) tokens of top c (3.7)    (3.8)

    d: abs |log r| (released, default), k2, k3 = r - 1 - log r (estimates KL(π_old||π), as in the paper).
    **Strictly on-policy log r is 0 and so is every d's gradient: nothing happens**, if old_logp is None
    (`log_ratio`). All A or all log p equal: none picked. Paper: ratio 2e-3 (7B), 2e-4 (32B), beta 1; PRIME .2
    percent; verl 2e-4, beta .1.
    """

    ratio: Share = 2e-3
    """share of tokens with the penalty; small batches need more, about .02"""
    beta: Positive = 1.0
    """coefficient of the penalty; 0 is the unclipped policy gradient"""
    estimator: Literal["abs", "k2", "k3"] = "abs"
    """distance to the old policy: abs, k2, k3"""

    without = ("eps_low", "eps_high", "dual_clip")

    def mark(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        cov = covariance(tk, adv)
        k = fraction_count(self, self.ratio, tk.mask) if cov.any() else 0
        return self.pick(tk, top(cov, tk.mask, k, token_keys(tk, self.progress)), metrics)

    def factor(self, tk: Tokens, adv: Tensor, marks: dict[str, Tensor] | None = None) -> Tensor:
        return clip_factor(tk.logp, tk.old_logp, adv, 1, math.inf)  # no clip

    def distance(self, tk: Tokens, picked: Tensor) -> Tensor:
        return kl_penalty(tk.logp_before, tk.logp, self.estimator)  # y ~ π_old: k3 estimates KL(π_old||π)


def proxy_log_prob(logits: Tensor, ids: Tensor, threshold: float = 0.02) -> Tensor:
    """log q(y) of Lp-Reg's proxy: π without tokens below threshold · max π, renormalised; they have -inf.

    logits (..., V), already divided by the temperature, ids (...) -> (...), detached.
    """
    z = logits.detach()
    logp = (z if z.dtype == torch.float64 else z.float()).log_softmax(-1)
    kept = logp >= logp.amax(-1, keepdim=True) + (math.log(threshold) if threshold > 0 else -math.inf)
    q = torch.where(kept, logp, -math.inf)
    return q.gather(-1, ids[..., None])[..., 0] - q.logsumexp(-1)


class LpReg(OnPicked, key="lp_reg", place="penalty", paper="2510.03222", needs=("logp", "proxy_logp")):
    """Pull rare, punished, yet plausible tokens towards a policy without the noise tail. [code]
    CarlanLark/Lp-Reg-dev.

        q = π_old without tokens below threshold · max, renormalised (proxy_log_prob)                   (3.28)
        among A < 0 tokens the k = ⌊fraction · n⌋ of lowest log p, none if k <= 1; of these, if log p < log q:
        l = -r A + beta · k3(log p - log q),  unclipped;   all others: clipped with eps (1, 9)

    Filtered tokens (log q = -inf) are noise and left alone. On-policy the others are pushed up by 1/S - 1 in
    log p, S the kept mass; theirs clamps k3 to 10: no gradient beyond q/p = 14. Costs a pass for q.
    """

    fraction: Share = 0.01
    """share of the A < 0 tokens that is protected; 0 is the clipped surrogate"""
    beta: Positive = 1.0
    """coefficient of the forward KL to the proxy"""
    threshold: Share = 0.02
    """the proxy drops tokens below this share of the largest probability"""
    eps_low: Positive = 1.0
    eps_high: Positive = 9.0

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

SHARED = ("eps_low", "eps_high", "dual_clip", "aggregation")
EXCLUSIVE = (  # one of the first with one of the second: no hook is overridden twice, and yet it has no sense
    ({"entropy_bonus"}, {"adaptive_entropy"}, "both put a coefficient on the same entropy term"),
    ({"ref_kl"}, {"prorl"}, "prorl contains the KL term of ref_kl"),
    ({"psr", "nsr"}, {"clip_cov", "kl_cov", "cw_grpo"}, "one advantage is left, whose covariance is 0"),
    ({"nsr"}, {"par", "rand_pos_clip", "rlrt"}, "nsr leaves no positive advantage to weigh"),
)


def _shared_value(name: str, members: list[Method], surrogate: Method) -> Any:
    """A clip bound or the aggregation: of the members that were given one, or whose default is not GRPO's."""
    default = getattr(Method, name)
    own = {m.key: getattr(m, name) for m in members if name not in m.without}
    set_by = {m.key: own[m.key] for m in members if name in m.given or own.get(m.key, default) != default}
    text = ", ".join(f"{k} has {v}" for k, v in set_by.items())
    if len(set(set_by.values())) > 1:
        raise ValueError(f"conflicting {name}: {text}; set {name} explicitly")
    value = next(iter(set_by.values()), default)
    if value != default and name in surrogate.without:
        raise ValueError(f"{surrogate.key} does not use {name}, but {text}: leave it out, or give {default}")
    return value


class Composite(Method):
    """Several methods as one: all must select a response, weights multiply, penalties add; at most one member
    replaces sampling, advantage or surrogate. A weight hook sees the advantage times the weights before it; a
    member with `last` (opefo) balances the flow of the real surrogate, without the penalties on top."""

    def __init__(self, members: list[Method]) -> None:
        keys = [m.key for m in members]
        self.key, self.place = "+".join(keys), "+".join(dict.fromkeys(m.place for m in members))
        if len(set(keys)) < len(keys):
            raise ValueError(f"{self.key}: a method appears twice; name each once")
        for some, others, reason in EXCLUSIVE:
            if (one := some & set(keys)) and (other := others & set(keys)):
                raise ValueError(f"{one.pop()} and {other.pop()} cannot be combined: {reason}")
        weighing = [m for m in members if m.overrides("weight") and getattr(m, "correct", True)]
        weighing += [m for m in members if m.overrides("surrogate")]
        if len(weighing) > 1 and any(m.key == "cw_grpo" and m.form == "released" for m in weighing):
            raise ValueError(f"{self.key}: cw_grpo:form=released knows no other weight: give form=paper")
        self.members = sorted(members, key=lambda m: getattr(m, "last", False))
        for hook in ("sample", "advantage", "surrogate"):
            owners = [m for m in self.members if m.overrides(hook)]
            if len(owners) > 1:
                names = " and ".join(m.key for m in owners)
                raise ValueError(f"{names} cannot be combined: each replaces the {hook}, and only one can")
            owner = owners[0] if owners else self.members[0]  # the first has plain GRPO's
            setattr(self, hook, getattr(owner, hook))
        self.factor = owner.factor  # of the surrogate
        values = {name: _shared_value(name, self.members, owner) for name in SHARED}
        super().__init__(**values)
        for m in self.members:
            m.__dict__.update({k: v for k, v in values.items() if k not in m.without})
            m.advantage, m.coefficients = self.advantage, self.coefficients
            m.factor = self.factor  # what opefo and steer weigh is the force of the common surrogate
        self.needs = tuple(dict.fromkeys(n for m in members for n in m.needs))
        self.on_policy, self.refill = any(m.on_policy for m in members), any(m.refill for m in members)
        self.topk = max(m.topk for m in members)

    @property
    def progress(self) -> Progress:
        return self.members[0].progress

    @progress.setter
    def progress(self, value: Progress) -> None:
        for m in self.members:
            m.progress = value

    def overrides(self, hook: str) -> bool:
        return any(m.overrides(hook) for m in self.members)

    def select(self, tk: Tokens) -> Tensor | None:
        drawing = tk.logp is None  # not scored yet
        return self._all(m.select(tk) for m in self.members if m.refill or not drawing)

    def keep(self, tk: Tokens, adv: Tensor) -> Tensor | None:
        return self._all(m.keep(tk, adv) for m in self.members)

    @staticmethod
    def _all(votes: Iterable[Tensor | None]) -> Tensor | None:
        kept = [vote for vote in votes if vote is not None]
        return torch.stack(kept).all(0) if kept else None

    def shape(self, tk: Tokens) -> Tensor:
        for m in self.members:
            tk = replace(tk, reward=m.shape(tk))
        return tk.reward

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        total = torch.ones_like(adv)
        for m, own in self._metrics(metrics):
            w = m.weight(tk, adv * total, own)
            total = total if w is None else total * w.to(adv.dtype)
        return total

    def mark(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        marks = {}  # of different names: two methods that mark the same could not share a surrogate
        for m, own in self._metrics(metrics):
            marks |= m.mark(tk, adv, own)
        metrics.pop("tokens_touched", None)  # of one member only
        return marks

    def _metrics(self, metrics: dict[str, float]) -> Iterator[tuple[Method, dict[str, float]]]:
        """Each member with a dict for its metrics; where two use a name, the second's is "par.lam"."""
        for m in self.members:
            yield m, (own := dict(metrics))
            for name, value in own.items():
                if metrics.setdefault(name, value) != value:
                    metrics[f"{m.key}.{name}"] = value

    def penalty(self, tk: Tokens, plan: Plan) -> Tensor | None:
        parts = [m.penalty(tk, plan) for m in self.members]
        return sum((p for p in parts if p is not None), start=torch.zeros_like(plan.adv[:0]).sum())

    @property
    def entropy_grad(self) -> bool:
        return any(m.entropy_grad for m in self.members)

    @property
    def loss_norm(self) -> float | None:
        own = (m.loss_norm for m in self.members if m.overrides("loss_norm"))
        return next(own, self.progress.max_length)

    def reset_reference(self, step: int, score: float | None) -> bool:
        return any([m.reset_reference(step, score) for m in self.members])  # a list: each sees every score

    def after_step(self, plan: Plan) -> None:
        for m in self.members:
            own = {k.removeprefix(m.key + "."): v for k, v in plan.metrics.items()}  # its own come last
            m.after_step(replace(plan, metrics=own))

    def state_dict(self) -> dict[str, Any]:
        return {m.key: m.state_dict() for m in self.members}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for m in self.members:
            m.load_state_dict(state[m.key])


# ------------------------------------------------------------------------------------------------------------
# 7. Names: building a method from the words of a command line

METHODS: dict[str, type[Method]] = {c.key: c for c in (
    Method, EntropyBonus, AdaptiveEntropy, RefKL, ProRL, DAPO, ClipHigher, ClipCov, KLCov, HighEntropyTokens,
    PAR, RandPosClip, WReinforce, PSR, NSR, EntropyAdvantage, STEER, OPEFO, PAPO, CWGRPO, Entrocraft, STARE,
    EntroPIC, CISPO, DrGRPO, GSPO, QAE, HTPO, AEM, MixedCUTS, CEGPPO, LpReg, REPO, AsymGRPO, MaxRL, PassK,
    Unlikely, UCPO, MCPO, AR, SAPO, BAPO, ReFT, VocabDropout, Darling, OutcomeExploration, SimKO, RLRT, GCPO,
)}  # fmt: skip


def convert(key: str, name: str, value: Any, kind: Any) -> Any:
    """A value, often a word, in the type of its field: bool, int, float, str, Literal, Annotated with a
    range; None for "none" where that is allowed."""
    word, optional = str(value).strip().lower(), type(None) in get_args(kind)
    if optional and word == "none":
        return None
    kind = get_args(kind)[0] if optional else kind
    kind, (low, high) = get_args(kind) if get_origin(kind) is Annotated else (kind, (-math.inf, math.inf))
    found, fits = value, False
    if get_origin(kind) is Literal:
        wanted, fits = "one of " + ", ".join(get_args(kind)), value in get_args(kind)
    elif kind is str:
        wanted, fits = "a word", isinstance(value, str)
    elif kind is bool:
        wanted, found = "true or false", word in ("true", "1", "yes", "on")
        fits = found or word in ("false", "0", "no", "off")
    else:
        wanted = f"{'a whole' if kind is int else 'a'} number from {low} to {high}"
        with suppress(TypeError, ValueError, OverflowError):
            found = kind(value)
            exact = isinstance(value, str) or (found == value and not isinstance(value, bool))
            fits = exact and low <= found <= high
    if not fits:
        raise ValueError(f"{key}: {name}={value!r} does not fit: give {wanted}{' or none' * optional}")
    return found


def _types(cls: type[Method]) -> dict[str, Any]:
    """The hyperparameters that a method uses, with their types."""
    kinds = get_type_hints(cls, include_extras=True)
    return {f.name: kinds[f.name] for f in fields(cls) if f.name not in cls.without}


@cache
def hyperparameters(cls: type[Method]) -> list[tuple[str, Any, Any, str]]:
    """(name, type, default, help) of a method's hyperparameters; help is the docstring under the field."""
    import docstring_parser

    helps: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        found = docstring_parser.parse_from_object(base).params
        helps |= {p.arg_name: p.description for p in found if p.description}
    return [(name, kind, getattr(cls, name), helps.get(name, "")) for name, kind in _types(cls).items()]


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """ "opefo+par:form=exact,eps_high=.28" -> ("opefo+par", {"form": "exact", "eps_high": ".28"})."""
    name, _, rest = spec.partition(":")
    options: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        if not (key and value) or key in options:
            raise ValueError(f"method {spec!r}: {item!r}: write name=value,name=value, each name once")
        options[key] = value
    return name.strip(), options


def build(name: str, **hyperparameter: Any) -> Method:
    """A method from a spec, as `parse` reads it, and hyperparameters, in their type or as strings.

    In a composition a hyperparameter goes to the member that has it; a shared one (clip range, aggregation)
    to all; "clip_cov.ratio" names the member. ValueError on what does not exist, fit or make sense.
    """
    name, options = parse(name)
    types, given = {}, {}
    for key in name.split("+"):
        if key not in METHODS:
            (near,) = difflib.get_close_matches(key, METHODS, 1, 0)
            raise ValueError(f"method {key!r} is unknown: did you mean {near}? ({', '.join(METHODS)})")
        types[key], given[key] = _types(METHODS[key]), {}
    for full, value in (options | hyperparameter).items():
        prefix, _, n = full.rpartition(".")
        having = [key for key in types if n in types[key] and prefix in ("", key)]
        if not having:
            words = dict.fromkeys(x for kinds in types.values() for x in kinds)
            (near,) = difflib.get_close_matches(n, words, 1, 0)
            raise ValueError(f"{name} has no option {full!r}: did you mean {near}? ({', '.join(words)})")
        if len(having) > 1 and n not in SHARED:
            raise ValueError(f"{name}: {n} belongs to {' and '.join(having)}: write {having[0]}.{n}={value}")
        for key in having:
            given[key][n] = convert(key, n, value, types[key][n])
    members = [METHODS[key](**given[key]) for key in name.split("+")]
    for m in members:
        m.given = tuple(given[m.key])
    return members[0] if len(members) == 1 else Composite(members)


# ------------------------------------------------------------------------------------------------------------
# 8. Inside other trainers: verl and TRL

VERL = tuple("grpo clip_higher clip_cov kl_cov rand_pos_clip cispo gspo ce_gppo ar sapo bapo".split())
VERL_CLIP = {"eps_low": ("low", 0.2), "eps_high": ("high", 0.2), "dual_clip": ("c", 3.0)}  # clip_ratio_...


def register_with_verl(*specs: str, prefix: str = "") -> list[str]:
    """Register methods as verl policy losses (`actor.policy_loss.loss_mode`); returns their names.

    specs: as on the command line, compositions too; default the keys of `VERL`. A loss is named prefix
    + key, and replaces verl's of that name (gspo, cispo, clip_cov, kl_cov). Every worker has to register: put
    the call into a module and name it in VERL_USE_EXTERNAL_MODULES. `loss_agg_mode` sets the aggregation, the
    spec all else; another clip range in verl's config is refused. For verl 0.9, imported by this call only.

    verl hands over advantages, old and new log-probabilities; a method that needs more (opefo, steer) raises
    ValueError. Denominators are of the whole mini-batch. **But verl calls once per micro-batch and rank:
    clip_cov, kl_cov and rand_pos_clip select among those tokens only**, as verl's own do. Its old log p are
    of another forward pass: strictly on-policy kl_cov's penalty is rounding noise. verl's `vanilla` is
    `grpo:dual_clip=3`; our clip_cov draws differently, and rollout_is_weights do not scale kl_cov's penalty.
    """
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

    methods = [build(spec) for spec in specs or VERL]
    for method in methods:
        check_verl(method)  # all, before the first is registered
    for method in methods:
        register_policy_loss(prefix + method.key)(partial(verl_loss, method, agg_loss))
    return [prefix + method.key for method in methods]


def check_verl(method: Method) -> None:
    """Raise ValueError, with the reason, where verl's policy-loss interface cannot feed a method."""
    for m in getattr(method, "members", [method]):
        more = [need for need in m.needs if need != "logp"] + ["entropy"] * m.entropy_grad
        hooks = [h for h in ("sample", "select", "shape", "keep") if m.overrides(h)]
        for bad, text in (
            (hooks, f"a verl policy loss has no place for its {' and '.join(hooks)}"),
            (m.overrides("advantage"), "verl makes the advantages (algorithm.adv_estimator)"),
            (more, f"it needs {', '.join(dict.fromkeys(more))}, which a verl policy loss does not get"),
            (m.overrides("after_step"), "a verl policy loss has no place for its after_step"),
            (getattr(m, "anneal", False), "a verl policy loss does not know the step, so anneal=false"),
            (m.aggregation != type(m).aggregation, "actor.loss_agg_mode decides on the aggregation"),
        ):
            if bad:
                raise ValueError(f"method {m.key} inside verl: {text}")


def verl_loss(
    method: Method, agg_loss: Callable[..., Tensor], old_log_prob: Tensor, log_prob: Tensor,
    advantages: Tensor, response_mask: Tensor, loss_agg_mode: str = "token-mean", config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """A method's loss on one micro-batch, as verl's registry wants it: tensors (B, T) -> scalar, metrics."""
    for ours, (name, default) in VERL_CLIP.items():
        value = config.get(f"clip_ratio_{name}", default)
        if value not in (default, None, getattr(method, ours)):
            text = f"actor.clip_ratio_{name}={value} is overruled"
            raise ValueError(f"{text}: write {method.key}:{ours}={value}")
    ids = old_log_prob.float().contiguous().view(torch.int32)  # order the rows of a draw: verl keeps its ids
    tokens = Tokens(ids, response_mask.bool(), logp=log_prob, old_logp=old_log_prob, adv=advantages)
    tokens.mismatch = rollout_is_weights
    plan = plan_update(tokens, method)
    one = torch.ones_like(log_prob, dtype=plan.coef.dtype, requires_grad=True)
    total = agg_loss(one, response_mask, loss_agg_mode, **config.global_batch_info)
    (coef,) = torch.autograd.grad(total, one)  # an aggregation is linear: its gradient is its coefficients
    loss, metrics = batch_loss(tokens, replace(plan, coef=coef, coef_all=coef), method)
    metrics = {**plan.metrics, **metrics}
    return loss, {f"actor/{k}": v for k, v in metrics.items() if math.isfinite(v)}


OVERRULED = (  # settings of TRL's own objective
    *("loss_type", "epsilon", "epsilon_high", "delta", "scale_rewards", "multi_objective_aggregation"),
    *("importance_sampling_level", "off_policy_mask_threshold", "use_bias_correction_kl"),
    *("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy"),
)


def check_trl(trainer: Any, method: Method) -> None:
    """Raise ValueError, with the remedy, where a method or a GRPOConfig cannot do inside TRL what it says."""
    a = trainer.args
    n, m, rows = a.gradient_accumulation_steps, a.steps_per_generation, a.per_device_train_batch_size
    torn = m > n and n * rows % a.num_generations
    set_too = [f.name for f in fields(a) if f.name in OVERRULED and getattr(a, f.name) != f.default]
    for bad, text in (
        (method.overrides("sample"), "TRL samples, not the method"),
        (method.overrides("reset_reference"), "TRL keeps reference and optimizer; use ref_kl"),
        ("proxy_logp" in method.needs, "the logits of the policy that sampled are not kept"),
        ("topk_logp" in method.needs, "it has log-probabilities of the tokens drawn and of no others"),
        ("teacher_logp" in method.needs, "it scores no second prompt"),
        ("outcome" in method.needs, "it does not say which responses have the same answer"),
        ("ref_logp" in method.needs and not a.beta, "give GRPOConfig(beta=1.0), for a reference"),
        (set_too, f"the method makes the objective; leave GRPOConfig.{', '.join(set_too)} at the default"),
        (m % n, f"steps_per_generation={m} must be a multiple of gradient_accumulation_steps={n}"),
        (torn, f"{n * rows} responses per update tear groups of {a.num_generations}"),
        (trainer.aux_loss_enabled or trainer._is_vlm, "router losses and images are not supported"),
    ):
        if bad:
            raise ValueError(f"method {method.key} inside TRL: {text}")
    if method.refill:
        warnings.warn(f"{method.key}: TRL draws no further prompts, so updates shrink", stacklevel=3)


class InsideTRL:
    """`trl.GRPOTrainer` with one more argument, `method`: a spec as on the command line, or a Method.

        trainer = trl_trainer()("Qwen/Qwen3-0.6B", reward, GRPOConfig(...), data, method="opefo")

    The objective is ours, all else TRL's. What differs from plain TRL:

    - A forward pass more: an update is scored first, without graph, on all ranks: every statistic's scope.
    - Rows stay in prompt order; TRL shuffles them, which tears groups apart where it makes several updates.
    - A GRPOConfig setting that the method overrules is refused. `beta` only makes TRL keep a reference model.
    - A response is right if the sum of its rewards is positive. One that no reward function scored teaches
      nothing and is in nobody's baseline.
    - Schedules and draws count optimizer steps. Evaluation reports TRL's own loss.

    `dapo` drops groups but cannot draw others. For TRL 1.16, whose private methods it overrides.
    """

    def __init__(self, *args: Any, method: str | Method = "grpo", **kwargs: Any) -> None:
        self.method = build(method) if isinstance(method, str) else method
        super().__init__(*args, **kwargs)
        check_trl(self, self.method)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self.scores = super()._calculate_rewards(*args, **kwargs)  # (rows of all ranks, reward functions)
        return self.scores

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        out = super()._generate_and_score_completions(inputs)
        first = self.accelerator.process_index * len(inputs)
        row = torch.arange(first, first + len(inputs), device=self.scores.device)
        scores = self.scores[row]  # NaN where a function said nothing
        out["reward"] = (scores * self.reward_weights.to(scores.device)).nansum(-1)
        out["group"] = torch.where(scores.isnan().all(-1), -1 - row, row // self.num_generations)
        return out

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        from trl.trainer.utils import split_tensor_dict

        n, m = self.args.gradient_accumulation_steps, self.args.steps_per_generation
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is None or self._step % (m * self.num_iterations) == 0:
            generation = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_tensor_dict(generation, m)
        i = self._step % m
        if i % n == 0:
            self._plan_update(self._buffered_inputs[i : i + n])
        return self._buffered_inputs[i]

    def _text(self, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor, int]:
        both = [torch.cat([rows[f"prompt_{x}"], rows[f"completion_{x}"]], 1) for x in ("ids", "mask")]
        return *both, rows["completion_ids"].shape[1]

    def _plan_update(self, window: list[dict[str, Tensor]]) -> None:
        """Tokens and plan of an update from all its rows, on all ranks, rank by rank."""
        parts = []
        for rows in window:
            ids, attention, T = self._text(rows)
            with torch.no_grad(), self.accelerator.autocast():
                out = self.model(input_ids=ids, attention_mask=attention, logits_to_keep=T + 1)
            parts.append(vars(token_stats(out.logits[:, :-1], ids[:, -T:], self.temperature, False)))
        rows = {k: torch.cat([r[k] for r in window]) for k, v in window[0].items() if v.ndim}
        mask = (rows["completion_mask"] * rows.get("tool_mask", 1)).bool() & (rows["group"] >= 0)[:, None]
        ended = torch.isin(rows["completion_ids"], torch.tensor(self.eos_token_ids, device=mask.device))
        sampled = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        ratio = rows.get("importance_sampling_ratio")  # vLLM's mismatch weight, (B, T) or (B, 1)
        stats = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        tokens = Tokens(rows["completion_ids"], mask, reward=rows["reward"], group=rows["group"], **stats)
        tokens.truncated = ~(ended & mask).any(-1)
        tokens.old_logp = None if sampled else rows["old_per_token_logps"]  # as in `train`
        tokens.ref_logp = rows.get("ref_per_token_logps")
        tokens.mismatch = None if ratio is None else ratio.expand(mask.shape)
        gather, pad = self.accelerator.gather, self.accelerator.pad_across_processes
        self.tokens = tokens._map(lambda v: gather(pad(v, dim=1).to(v.dtype)))  # pad makes bool an integer
        step, total, seed = self.state.global_step, self.state.max_steps, self.args.seed
        self.method.progress = Progress(step, total, seed, self.max_completion_length, self.temperature)
        self.plan = plan_update(self.tokens, self.method)

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        fresh = self._get_per_token_logps_and_entropies(model, *self._text(inputs), compute_entropy=True)
        (B, T), n = fresh[0].shape, self.args.gradient_accumulation_steps
        first = B * (self.accelerator.process_index * n + self._step % n)
        s = slice(first, first + B)
        width = self.plan.adv.shape[1] - T  # another rank may have longer responses
        logp, entropy = (torch.nn.functional.pad(x, (0, width)) for x in fresh[:2])
        tokens = replace(self.tokens.rows(s), logp=logp, entropy=entropy)
        loss, _ = batch_loss(tokens, self.plan.rows(s), self.method)
        return loss * self.accelerator.num_processes  # ranks' gradients are averaged, ours add up

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self._step % self.args.gradient_accumulation_steps == 0:  # the update's last micro-batch
            self.method.after_step(self.plan)
            for name, value in self.plan.metrics.items():
                self._metrics["train"][name].append(value)
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            torch.save(self.method.state_dict(), folder / "method.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.method.load_state_dict(torch.load(Path(checkpoint) / "method.pt", weights_only=True))


@cache
def trl_trainer() -> type:
    """The class of `InsideTRL`; trl is imported by this call only."""
    from trl import GRPOTrainer

    return type("EntropyFlowTrainer", (InsideTRL, GRPOTrainer), {"__doc__": InsideTRL.__doc__})


# ------------------------------------------------------------------------------------------------------------
# 9. Demonstration


def effect(method: Method, tokens: Tokens, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a method does to a batch with these logits (B, T, V), each (B, T): the force -∂loss/∂logp of all
    its hooks; the entropy change ⟨∇_z H, -∇_z loss⟩, nats per unit learning rate on the logits; and whether
    the token is treated unlike plain GRPO."""
    z = logits.detach().requires_grad_()
    tk = replace(tokens, **vars(token_stats(z, tokens.ids)), topk_logp=z.log_softmax(-1).topk(3).values)

    def slopes(x: Tensor) -> tuple[Tensor, ...]:
        to = (tk.logp, tk.entropy, z)
        return torch.autograd.grad(x, to, retain_graph=True, allow_unused=True, materialize_grads=True)

    force, pull, step = slopes(-policy_loss(tk, method)[0])
    plain, *_ = slopes(-policy_loss(tk, Method())[0])
    change = (step * slopes(tk.entropy.sum())[-1]).sum(-1)
    return force, change, ((force - plain).abs() > 1e-6 * plain.abs()) | (pull != 0)


def demonstration_options(entropy: float) -> dict[str, str]:
    """Options for the methods that some thousand tokens of this entropy would not switch on by default."""
    above = f"target={1.5 * entropy:.2g}"
    options = {"clip_cov": "ratio=.02,lb=.5", "kl_cov": "ratio=.02", "rand_pos_clip": "ratio=.02"}
    options |= {"lp_reg": "fraction=.1", "stare": above, "entropic": above}
    options |= {"papo": "reference=target," + above, "adaptive_entropy": f"{above},c_min=.005"}
    return options | {"par": f"target={0.8 * entropy:.2g}", "entrocraft": f"start={1.2 * entropy:.2g}"}


def show_batch(tokens: Tokens, logits: Tensor, path: str | None = None) -> None:
    """Print, and draw in `path`, what the methods do to a batch; off-policy those that act on the ratio."""
    import pandas

    mask, on_policy = tokens.mask, tokens.old_logp is None
    entropy = float(masked_mean(tokens.entropy, mask))
    adv = torch.where(mask, Method().advantage(tokens), 0)
    base, flow_of_grpo, _ = effect(Method(), tokens, logits)
    rows, weights, options = [], {}, demonstration_options(entropy)
    for key in METHODS:
        m = build(f"{key}:{options.get(key, '')}")
        m.progress = Progress(max_length=mask.shape[1])
        if not on_policy and m.on_policy and m.place not in ("none", "ratio"):
            continue
        force, change, touched = effect(m, tokens, logits)
        weights[key] = torch.where(base == 0, 1, force / base).clamp(0, 2), touched
        up, down = (float(force[s].abs().sum() / base[s].abs().sum()) for s in (adv > 0, adv < 0))
        share, dh = masked_mean(touched.double(), mask), change.sum() / flow_of_grpo.abs().sum()
        inert = "its clip or penalty acts with several updates per rollout" * (on_policy and not m.on_policy)
        inert = "acts when responses are drawn" if m.place == "sampling" else inert
        numbers = (f"{share:.1%}", f"{up:.2f}", f"{down:.2f}", f"{dh:+.3f}")
        rows.append((key, m.place, *numbers, inert or options.get(key, "")))
    print(f"{int(mask.sum())} tokens, entropy {entropy:.3f} nats")
    print("touched: tokens treated unlike GRPO;  A > 0, A < 0: sum of |force| there, GRPO = 1")
    print("dH: predicted change of entropy, as a share of all flow (up and down) that GRPO causes\n")
    names = ["method", "place", "touched", "A > 0", "A < 0", "dH", "options"]
    print(pandas.DataFrame(rows, columns=names).to_string(index=False, justify="left"))
    if path:
        draw(tokens, adv, weights, path)
        print(f"\nfigure: {path}")


def draw(tokens: Tokens, adv: Tensor, weights: dict[str, tuple[Tensor, Tensor]], path: str) -> None:
    """Tokens on the plane (log p, A), a panel per method: dark by weight, large where it touches them."""
    from matplotlib.figure import Figure

    adv = adv + 0.3 * torch.rand(adv.shape, generator=Generator().manual_seed(0)).to(adv)  # jitter
    lines = -(-len(weights) // 4)
    fig = Figure(figsize=(15, 1.8 * lines), layout="constrained")
    axes = fig.subplots(lines, 4, sharex=True)
    for axis in axes.flat[len(weights) :]:
        axis.axis("off")
    for axis, (key, (weight, touched)) in zip(axes.flat, weights.items()):
        axis.set(title=key, ylabel="A")
        for s, size in ((tokens.mask & ~touched, 2), (tokens.mask & touched, 7)):
            look = {"cmap": "YlGnBu", "vmin": -0.3, "vmax": 2, "rasterized": True}
            dots = axis.scatter(tokens.logp[s], adv[s], size, weight[s], **look)
    fig.supxlabel("log p of the sampled token, nats; large: touched")
    fig.colorbar(dots, ax=axes, label="weight relative to GRPO", aspect=90)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)


def embedded_batches() -> list[tuple[Tokens, Tensor]]:
    """Two batches of chapter 4's embedded world: on-policy after 20 steps of GRPO, and the same responses
    four updates later, when the ratio has left 1. Each with its logits (B, T, V)."""
    from rollout import Sampling, TorchEngine, WarmStart, answer, chain_task, outcomes, warm_policy

    (model, tokenizer), task = warm_policy(WarmStart()), chain_task()
    generator = Generator().manual_seed(0)
    policy, reference = Policy(model), Policy(copy.deepcopy(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0)

    def rollout() -> Tokens:
        problems = [task.train[i] for i in torch.randperm(len(task.train), generator=generator)[:32]]
        engine, how = TorchEngine(model, tokenizer), Sampling(16, task.max_new_tokens)
        tokens, texts = answer(engine, task, problems, how, generator)
        return replace(tokens, reward=tokens.correct.float(), outcome=outcomes(task, problems, texts))

    def update(tokens: Tokens) -> None:
        loss, _ = policy_loss(replace(tokens, **policy(tokens)), Method())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    @torch.no_grad()
    def scored(tokens: Tokens) -> tuple[Tokens, Tensor]:
        logits = policy(tokens, of_logits=lambda z, ids: z)["of_logits"]
        now, (rows, asked) = token_stats(logits, tokens.ids), asked_again(tokens, Generator().manual_seed(0))
        teacher = torch.full_like(now.logp, -math.inf).index_copy(0, rows, policy(asked)["logp"])
        more = {"proxy_logp": proxy_log_prob(logits, tokens.ids), "teacher_logp": teacher}
        return replace(tokens, **vars(now), ref_logp=reference(tokens)["logp"], **more), logits

    for _ in range(20):
        update(rollout())
    now = scored(batch := rollout())
    batch.old_logp = now[0].logp
    for _ in range(4):
        update(batch)
    return [now, scored(batch)]


def main(out: str = "runs/interventions.png") -> None:
    """What every method does to a strictly on-policy batch of the embedded world, as a table and a figure
    (`out`); then the methods that act on the ratio on a later one."""
    torch.set_num_threads(1)  # of so small products two are slower, and 20 times where something else runs
    now, later = embedded_batches()
    show_batch(*now, out)
    print("\nThe same responses four updates later, for the methods that act on the ratio:\n")
    show_batch(*later)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
