"""Chapter 2. GRPO: from verified rewards to one gradient.

Claim. Everything that a GRPO trainer does to a policy is one number per token: the force with which the
update pushes log π(y_t). This chapter derives that number; `policy_loss` computes it for any method of
`interventions.py`. It leaves out a value function and token-level rewards.

    Tokens, Policy     what flows through all chapters, and what a policy says of its tokens
    group_advantages   how good was a response, compared with its siblings on the same prompt    (2.1) - (2.4)
    surrogate          the clipped importance ratio, for data sampled by an older policy         (2.5) - (2.7)
    aggregate          how thousands of per-token losses become one scalar                      (2.8) - (2.12)
    kl_penalty         estimators of the distance to another policy, and their gradients       (2.13) - (2.16)
    mismatch_weight    the sampling engine is not quite the policy that is trained             (2.17) - (2.19)
    Method, Plan       the five places where a method can touch entropy, and the batch-wide bookkeeping
    Grader             is this answer that answer, in 1.5 s a comparison at most, whatever the answer is

*Strictly on-policy* means one optimizer step per rollout: the ratio r is exactly 1 and every clip is inert.
The loss *value* is then minus the mean advantage, 0 in a mean over responses (over tokens only if all are
equally long), whatever the gradient. Tokens with A > 0 and A < 0 nearly cancel in sum; what is left decides
where entropy goes (`entropy_math.py`).

*Scope rule*: every mean, quantile and top-k of every method is taken over the whole update batch, never over
a micro-batch or a rank. `plan_update` sees all tokens, detached, and makes one coefficient per token;
`batch_loss` is then a plain sum, which does not care how it is sliced.

    python grpo.py     what surprises in a training log: a loss of zero, and what the clip does at which ratio
"""

from __future__ import annotations

import atexit
import copy
import importlib.util
import inspect
import json
import math
import os
import queue
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad as pad_right
from typing_extensions import dataclass_transform  # of typing from Python 3.11 on

from entropy_math import TokenStats, exact_score, head_token_stats, token_stats

# ------------------------------------------------------------------------------------------------------------
# 1. The thing that flows, and what a policy says of it


@dataclass
class Tokens:
    """One batch of responses, B rows of at most T tokens; a field that nobody filled is None. At masked
    positions values may be anything, NaN included: every function selects with `torch.where(mask, x, 0)`."""

    # filled by the rollout
    ids: Tensor  # (B, T) response tokens
    mask: Tensor  # (B, T) True on response tokens, the first EOS included, False after it
    rollout_logp: Tensor | None = None  # (B, T) log-probability that the sampling engine itself reports
    reward: Tensor | None = None  # (B,) the reward that is optimised
    correct: Tensor | None = None  # (B,) was the answer right?  None: reward > 0 counts as right
    group: Tensor | None = None  # (B,) integer id of the prompt
    truncated: Tensor | None = None  # (B,) the length limit ended the response, not EOS
    outcome: Tensor | None = None  # (B,) integer id of problem and answer, for methods that need one
    full_ids: Tensor | None = None  # (B, L) prompt and response in one row, padded on the right
    start: Tensor | None = None  # (B,) where in that row the first response token is predicted
    # filled by scoring
    logp: Tensor | None = None  # (B, T) log π(y_t), carries the gradient
    entropy: Tensor | None = None  # (B, T) H(π(.|s_t)) over the full vocabulary, nats
    p2: Tensor | None = None  # (B, T) Σ_v p_v²
    p2logp: Tensor | None = None  # (B, T) Σ_v p_v² log p_v
    topk_logp: Tensor | None = None  # (B, T, K) of the K most likely tokens, falling, with the gradient
    old_logp: Tensor | None = None  # (B, T) behaviour policy at the start of the update; None: on-policy
    ref_logp: Tensor | None = None  # (B, T) frozen reference policy, for methods that need one
    proxy_logp: Tensor | None = None  # (B, T) under Lp-Reg's proxy policy, -inf where filtered
    teacher_logp: Tensor | None = None  # (B, T) after RLRT's longer prompt, -inf in rows that have none
    # filled by the loop and by `plan_update`
    adv: Tensor | None = None  # (B, T) advantage; None: the method computes it from reward and group
    mismatch: Tensor | None = None  # (B, T) detached weight (2.17) - (2.19), multiplies the surrogate
    response: Tensor | None = None  # (B, T) all response tokens, where a method narrowed `mask`; None: mask

    def _map(self, f: Callable[[Tensor], Tensor]) -> Tokens:
        values = {x.name: getattr(self, x.name) for x in fields(self)}
        return Tokens(**{k: None if v is None else f(v) for k, v in values.items()})

    def rows(self, index: Any) -> Tokens:
        """The responses selected by a slice, an index tensor or a boolean tensor over B."""
        return self._map(lambda v: v[index])

    def detach(self) -> Tokens:
        return self._map(lambda v: v.detach())

    def to(self, device: torch.device | str) -> Tokens:
        return self._map(lambda v: v.to(device))

    def clean(self) -> Tokens:
        """Zeros, without a gradient, where the mask is False."""

        def zeroed(v: Tensor) -> Tensor:
            if v.shape[:2] != self.mask.shape or not v.is_floating_point():
                return v
            return torch.where(self.mask if v.dim() == 2 else self.mask.unsqueeze(-1), v, 0)

        return self._map(zeroed)

    @property
    def stats(self) -> TokenStats:
        """The four statistics, as `entropy_math` wants them."""
        return TokenStats(self.logp, self.entropy, self.p2, self.p2logp)

    @property
    def logp_before(self) -> Tensor:
        """(B, T), detached: log π(y_t) where the update begins; `old_logp`, on-policy `logp` itself."""
        return self.logp.detach() if self.old_logp is None else self.old_logp

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
        width, fill = max(v.shape[-1] for v in values), pad if name in ("ids", "full_ids") else 0
        wide = [v if v.dim() == 1 else pad_right(v, (0, width - v.shape[1]), value=fill) for v in values]
        return torch.cat(wide)

    return Tokens(**{x.name: joined(x.name) for x in fields(Tokens) if getattr(parts[0], x.name) is not None})


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the True positions of mask, a float64 scalar; 0 where there are none."""
    return torch.where(mask, x, 0).sum(dtype=torch.float64) / mask.sum().clamp(min=1)


class Policy(nn.Module):
    """A causal LM as a function from responses to the four statistics of each token. A module, so that
    whatever wraps modules (FSDP2, `torch.func.functional_call`) wraps scoring."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.sharded = False  # True: weights split over processes, which must all make as many passes

    def forward(
        self,
        tokens: Tokens,
        temperature: float = 1.0,
        entropy_grad: bool = False,
        chunk: int | None = 0,
        of_logits: Callable[[Tensor, Tensor], Tensor] | None = None,
        topk: int = 0,
    ) -> dict[str, Tensor]:
        """logp, entropy, p2 and p2logp of every response token, each (B, T), 0 where masked; so
        `replace(tokens, **policy(tokens))` is scored. Only the hidden states of response tokens, packed, go
        through the output head, in chunks: no (B, T, V) tensor exists. Two things need all logits at once:
        `of_logits`, of (N, V) logits / temperature and (N,) ids, instead; `topk` for topk_logp besides.
        """
        row, col = tokens.mask.nonzero(as_tuple=True)  # (N,)
        head, length = self.model.get_output_embeddings(), int(tokens.lengths.max())
        # In training mode layers may be recomputed, by the backward pass, outside of the context.
        with nullcontext() if self.training else _attention(head.weight, tokens.full_ids.shape[1]):
            shared = None if chunk is None else self._hidden_of_groups(tokens.full_ids, tokens.start, length)
            if shared is None:
                read = tokens.full_ids[:, : int((tokens.start + tokens.lengths).max())]
                hidden = self.model.get_decoder()(read, use_cache=False).last_hidden_state
                packed = hidden[row, tokens.start[row] + col]  # (N, D) of (B, L', D)
            else:
                packed = shared[row, col]
        ids = tokens.ids[row, col]
        if of_logits is not None or topk:
            logits = head(packed)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        if of_logits is not None:
            found = {"of_logits": of_logits(logits, ids)}
        elif topk:
            best = logits.topk(min(topk, logits.shape[-1])).values - logits.logsumexp(-1, keepdim=True)
            found = {**vars(token_stats(logits, ids, entropy_grad=entropy_grad)), "topk_logp": best}
        else:
            stats = head_token_stats(packed, head.weight, ids, temperature, head.bias, chunk, entropy_grad)
            found = vars(stats)
        shape = tokens.mask.shape
        return {k: x.new_zeros((*shape, *x.shape[1:])).index_put((row, col), x) for k, x in found.items()}

    def _hidden_of_groups(self, full_ids: Tensor, start: Tensor, length: int) -> Tensor | None:
        """(B, length, D): the hidden states that predict the response tokens. Every prompt is read once for
        all of its responses; the gradient flows back through the shared keys and values.

        None where that saves less than a quarter of all tokens (it costs the fused kernels their causal
        shortcut) or cannot be: no plain cache (sliding windows, recomputation), weights split over processes.
        """
        from transformers import DynamicCache

        layers = DynamicCache(config=self.model.config).layers
        plain = all(type(layer).__name__ == "DynamicLayer" for layer in layers)
        modules = self.modules() if self.training else ()
        recomputes = any(getattr(m, "gradient_checkpointing", False) for m in modules)
        if not plain or recomputes or self.sharded or length < 2:
            return None
        width = int(start.max()) + 1
        column = torch.arange(width, device=start.device)
        prompt = torch.where(column <= start[:, None], full_ids[:, :width], -1)
        prompt, owner = torch.unique(prompt, dim=0, return_inverse=True)  # (P, L), (B,)
        if 4 * (len(owner) - len(prompt)) * width < len(owner) * (width + length - 1):
            return None
        position = column - (width - (prompt >= 0).sum(-1, keepdim=True))  # padded on the left
        ids = torch.where(position >= 0, prompt.gather(1, position.clamp(min=0)), 0)
        last, past, cached, attend = read_prompts(self.model, ids, position)  # (P, D)
        past.batch_select_indices(owner)
        column = start[:, None] + torch.arange(1, length, device=start.device)  # (B, length - 1)
        ids, place = full_ids.gather(1, column.clamp(max=full_ids.shape[1] - 1)), {}
        if not attend.all():
            attend = torch.cat([attend[owner], torch.ones_like(ids)], 1)
            place = {"attention_mask": attend, "position_ids": column}
        rest = self.model.get_decoder()(ids, **place, **cached).last_hidden_state
        return torch.cat([last[owner][:, None], rest], 1)


def read_prompts(model: nn.Module, ids: Tensor, position: Tensor) -> tuple[Tensor, Any, dict, Tensor]:
    """One pass over P prompts, (P, L), padded on the left, where their `position` is negative: (P, D) hidden
    states of the last tokens, the cache, the arguments that hand it to the next pass (it is `cache`, before
    transformers 5.24 and in code that comes with a model `past_key_values`, in Mamba `cache_params`), and the
    attention mask, which later passes continue."""
    from transformers import DynamicCache

    decoder, past, attend = model.get_decoder(), DynamicCache(config=model.config), (position >= 0).long()
    known = inspect.signature(type(decoder).forward).parameters  # an instance may have a wrapper
    name = next((name for name in ("cache", "cache_params") if name in known), "past_key_values")
    place = {"attention_mask": attend, "position_ids": position.clamp(min=0)}
    cached = {name: past, "use_cache": True}
    hidden = decoder(ids, **cached, **({} if attend.all() else place)).last_hidden_state
    return hidden[:, -1], past, cached, attend


def _attention(weight: Tensor, length: int) -> Any:
    """Plain products where they are faster than torch's fused attention: on a CPU its backward pass takes
    four times as long in bfloat16 at 17 tokens, twice at 64, less from about 150 on (torch 2.13). `weight` is
    one that the pass computes with, not its float32 master."""
    short = torch.is_grad_enabled() and weight.device.type == "cpu" and length <= 128
    return sdpa_kernel(SDPBackend.MATH) if short and weight.dtype == torch.bfloat16 else nullcontext()


def mkl_is_slow() -> bool:
    """Of the two libraries that torch has for float32 products, it takes MKL, which seems to use AVX-512 on
    Intel's processors only: on an AMD EPYC (Zen 5) oneDNN is twice as fast, forward and backward, by which
    other AMDs with AVX-512 are judged (results/bench_products.txt)."""
    file, cpu, mkl = Path("/proc/cpuinfo"), torch.backends.cpu, torch.backends.mkl
    amd = file.is_file() and "AuthenticAMD" in file.read_text()
    return amd and cpu.get_cpu_capability() == "AVX512" and mkl.is_available()


@contextmanager
def fast_products(on: bool | None = None) -> Iterator[None]:
    """Inside, torch multiplies float32 matrices of a CPU by oneDNN where MKL is slow, or where `on` says so:
    the kernels below autograd change, so gradients, forward mode and models of any library follow. Decided
    by the processor and never by a stopwatch, since a resumed run must round like its first part."""
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # x Wᵀ + bias, of `torch.compile`
    aten = torch.ops.aten

    def fits(a: Tensor, b: Tensor) -> bool:
        if not (a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0]):
            return False  # torch has its own errors for that
        large = a.shape[0] * a.shape[1] * b.shape[1] >= 2**20  # the detour through Python takes 10 µs
        dense = all(x.is_contiguous() or x.t().is_contiguous() for x in (a, b))
        return large and dense and a.dtype == b.dtype == torch.float32

    def mm(a: Tensor, b: Tensor) -> Tensor:
        if fits(a, b):
            return linear(a, b.t(), None, "none", [], "")
        return aten.mm.out(a, b, out=a.new_empty(0))

    def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        bias = c.dtype == a.dtype and c.shape == b.shape[1:] and c.is_contiguous()  # read as dense memory
        if bias and beta == alpha == 1 and fits(a, b):
            return linear(a, b.t(), c, "none", [], "")
        return aten.addmm.out(c, a, b, beta=beta, alpha=alpha, out=a.new_empty(0))

    with ExitStack() as stack:
        if linear and (mkl_is_slow() if on is None else on):
            library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it says that kernels are replaced
                library.impl("mm", mm, "CPU", allow_override=True)
                library.impl("addmm", addmm, "CPU", allow_override=True)
        yield


# ------------------------------------------------------------------------------------------------------------
# 2. Rewards and advantages


def group_index(group: Tensor) -> tuple[Tensor, Tensor]:
    """Relabel arbitrary prompt ids to 0..n-1.  Returns (B,) labels and the (n,) group sizes."""
    return torch.unique(group, return_inverse=True, return_counts=True)[1:]


def group_mean(x: Tensor, group: Tensor) -> Tensor:
    """Mean of x over each group, broadcast back to the (B,) rows."""
    index, size = group_index(group)
    total = torch.zeros(len(size), dtype=x.dtype, device=x.device).index_add_(0, index, x)
    return (total / size)[index]


def group_std(x: Tensor, group: Tensor) -> Tensor:
    """Standard deviation of x over each group, with G - 1, on the (B,) rows; 0 for a group of one."""
    index, size = group_index(group)
    n = size[index].to(x.dtype)
    return (group_mean((x - group_mean(x, group)) ** 2, group) * n / (n - 1).clamp(min=1)).sqrt()


def without_contrast(reward: Tensor, group: Tensor) -> Tensor:
    """(B,) bool: all rewards of the row's group are equal, so its responses teach nothing."""
    index, size = group_index(group)
    zero = reward.new_zeros(len(size))
    high, low = (zero.scatter_reduce(0, index, reward, x, include_self=False) for x in ("amax", "amin"))
    return (high == low)[index]


def group_advantages(reward: Tensor, group: Tensor, normalize: str = "std", eps: float = 1e-6) -> Tensor:
    """How much better a response did than the others on its prompt.  (B,), (B,) -> (B,).

    With R_1..R_G the rewards of one group and m their mean:

        std     A_i = (R_i - m) / (s + eps),  s the standard deviation with G - 1       GRPO, 2402.03300 (2.1)
        none    A_i = R_i - m                                                        Dr.GRPO, 2503.20783 (2.2)
        loo     A_i = R_i - mean_{j≠i} R_j = (R_i - m) G / (G - 1)                      RLOO, 2402.14740 (2.3)
        batch   A_i = (R_i - m) / (S + eps),  S the standard deviation of all rewards of the batch       (2.4)

    In each, Σ_i A_i = 0 within a group, and a constant added to R changes nothing. Equal rewards give exactly
    0, not rounding divided by eps. Rewards in {0, 1} with success rate q show the shape of (2.1):
    A⁺ = sqrt((1-q)/q), A⁻ = -sqrt(q/(1-q)), up to sqrt((G-1)/G): the rare outcome is pushed hard.
    """
    r = reward if reward.dtype == torch.float64 else reward.float()
    index, size = group_index(group)
    adv = r - group_mean(r, group)  # (2.2)
    if normalize == "std":
        adv = adv / (group_std(r, group) + eps)  # (2.1)
    elif normalize == "loo":
        n = size[index].to(r.dtype)
        adv = adv * n / (n - 1).clamp(min=1)  # (2.3)
    elif normalize == "batch":
        adv = adv / (group_std(r, torch.zeros_like(group)) + eps)  # (2.4)
    elif normalize != "none":
        raise ValueError(f"normalize={normalize!r} is unknown: choose std, none, loo or batch")
    return torch.where(without_contrast(r, group), 0, adv)


def overlong_penalty(length: Tensor, longest: int, cache: int) -> Tensor:
    """(B,) DAPO's soft punishment, 2503.14476 eq. 13: 0 up to longest - cache tokens, then linearly to -1."""
    return ((longest - cache - length) / cache).clamp(-1, 0)


def length_penalty(correct: Tensor, length: Tensor, longest: int, generator: Any) -> Tensor:
    """Right, plus `overlong_penalty` over the last fifth of the room; `dapo` adds its own: use one."""
    return correct.float() + overlong_penalty(length, longest, max(1, longest // 5))


def random_reward(correct: Tensor, length: Tensor, longest: int, generator: Generator) -> Tensor:
    """1 with probability one half, whatever the answer: a method without any signal (2506.10947)."""
    return (torch.rand(len(correct), generator=generator) < 0.5).float().to(correct.device)


REWARDS: dict[str, Callable[[Tensor, Tensor, int, Any], Tensor]] = {
    "correct": lambda correct, *_: correct.float(),
    "length_penalty": length_penalty,
    "random": random_reward,
    "wrong": lambda correct, *_: 1.0 - correct.float(),  # learn from the opposite (2506.10947)
}
SPURIOUS = ("random", "wrong")  # a method must then not see `correct` either


# ------------------------------------------------------------------------------------------------------------
# 3. The surrogate


def log_ratio(logp: Tensor, old_logp: Tensor | None) -> Tensor:
    """log r = log π(y) - log π_old(y), clamped to ±20, beyond which a token has no gradient. old_logp None,
    strictly on-policy: x - sg(x), 0 bit by bit. Log-probabilities of a second forward pass would differ by
    rounding, which a penalty such as |log r| turns into gradients of full size."""
    x = logp - (logp.detach() if old_logp is None else old_logp)
    return torch.where(x.abs() > 20, x.detach().clamp(-20, 20), x)


def clipped_surrogate(
    logp: Tensor, old_logp: Tensor | None, adv: Tensor,
    eps_low: float = 0.2, eps_high: float = 0.2, dual_clip: float | None = None,
) -> Tensor:  # fmt: skip
    """PPO's clipped loss per token, to be minimised.  All (B, T) -> (B, T).

        r = π(y) / π_old(y)                                                                              (2.5)
        l = max( -r A, -clip(r, 1 - eps_low, 1 + eps_high) A )                          1707.06347 eq. 7 (2.6)
        dual clip, for A < 0:  l <- min(l, -c A)                                        1912.09729 eq. 5 (2.7)

    Several updates per rollout learn from samples of an older policy: r corrects for that, and the clip stops
    what has moved far. The gradient of -r A is -r A ∇log π: importance-weighted. (2.6) removes it where
    (A > 0, r > 1 + eps_high) or (A < 0, r < 1 - eps_low), (2.7) also where A < 0 and r > c. Exactly at a
    bound, where versions of torch differ in the slope of a clamp, the token keeps its gradient
    (`clip_factor`). l is homogeneous in A: a weight w >= 0 on the loss is a weight on the advantage.
    """
    r = log_ratio(logp, old_logp).exp()  # (2.5)
    loss = torch.maximum(-r * adv, -r.clamp(1 - eps_low, 1 + eps_high) * adv)  # (2.6)
    if dual_clip is not None:
        loss = torch.where(adv < 0, torch.minimum(loss, -dual_clip * adv), loss)  # (2.7)
    clipped = clip_factor(logp, old_logp, adv, eps_low, eps_high, dual_clip) == 0
    return torch.where(clipped, loss.detach(), -r * adv)  # the same value: where nothing clips, l is -r A


def clip_factor(
    logp: Tensor, old_logp: Tensor | None, adv: Tensor,
    eps_low: float, eps_high: float, dual_clip: float | None = None,
) -> Tensor:  # fmt: skip
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

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_sum_norm", "token_sum"]
AGGREGATIONS = get_args(Aggregation)


def aggregation_coefficients(
    mask: Tensor, how: str = "token_mean", norm: float | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight of every token in the batch's loss: an aggregation is linear in the per-token losses. (B, T)
    bool -> (B, T), 0 where masked, at least float32: 1/N is not a number for bf16.

        token_mean            1 / N,  N = tokens of the batch      every token alike; our default (DAPO) (2.8)
        seq_mean_token_mean   1 / (S · len_i),  S = rows with tokens  every response counts alike (GRPO) (2.9)
        seq_mean_token_sum    1 / S                                                                     (2.10)
        seq_sum_norm          1 / (B · K),  K = `norm`, a constant      no length bias (Dr.GRPO)        (2.11)
        token_sum             1                                                                         (2.12)

    Averaging the means of micro-batches instead over-weights the short ones. An all-masked batch has loss 0.
    """
    m = mask.to(torch.promote_types(dtype, torch.float32))
    length = m.sum(-1, keepdim=True)  # (B, 1)
    rows = (length > 0).sum().clamp(min=1)
    if how not in AGGREGATIONS:
        raise ValueError(f"aggregation={how!r} is unknown: choose one of {', '.join(AGGREGATIONS)}")
    if how == "seq_sum_norm" and (norm is None or norm <= 0):
        raise ValueError(f"aggregation seq_sum_norm divides by a constant length: norm={norm}, give norm > 0")
    return {
        "token_mean": lambda: m / m.sum().clamp(min=1),  # (2.8)
        "seq_mean_token_mean": lambda: m / (rows * length.clamp(min=1)),  # (2.9)
        "seq_mean_token_sum": lambda: m / rows,  # (2.10)
        "seq_sum_norm": lambda: m / (mask.shape[0] * norm),  # (2.11)
        "token_sum": lambda: m,  # (2.12)
    }[how]()


def weighted_sum(loss: Tensor, coef: Tensor) -> Tensor:
    """Σ coef · loss over tokens with a nonzero coefficient, whatever the others hold."""
    return (torch.where(coef != 0, loss, 0) * coef).sum()


def aggregate(loss: Tensor, mask: Tensor, how: str = "token_mean", norm: float | None = None) -> Tensor:
    """One scalar from (B, T) per-token losses."""
    return weighted_sum(loss, aggregation_coefficients(mask, how, norm, loss.dtype))


# ------------------------------------------------------------------------------------------------------------
# 5. Distance to another policy


def kl_penalty(logp: Tensor, ref_logp: Tensor, estimator: str = "k2") -> Tensor:
    """Per-token estimators of KL(π || q) from samples y ~ π, with x = log π(y) - log q(y).  (B, T) -> (B, T).

        k1    x                     E = KL(π||q)     gradient as a loss: 0 in expectation, only noise   (2.13)
        k2    x² / 2                E is biased      gradient as a loss: ∇KL(π||q), exactly             (2.14)
        k3    e⁻ˣ - 1 + x           E = KL(π||q)     gradient as a loss: ∇KL(q||π), the other direction (2.15)
        abs   |x|                   E is biased      gradient sign(x) ∇log π, 0 at x = 0                (2.16)

    "As a loss" ∇ passes through log π(y) only: E[∇k1] = E[∇log π] = 0, E[∇k2] = E[x ∇log π], and
    E[∇k3] = E[(1 - q/π) ∇log π] = -Σ q ∇log π. So the unbiased value (k3) and the right gradient (k2) are
    different estimators. All four ignore the effect of a token on later states. Below x = -20, where e⁻ˣ
    would overflow, k3 continues along its tangent.
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
    """Correction for an engine whose probabilities are not quite the trainer's.

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
# 6. A method: five places and their hooks

# Hyperparameters with a range, ends included
Positive = Annotated[float, (0, math.inf)]  # 0 is allowed
Above = Annotated[float, (1e-9, math.inf)]
Share = Annotated[float, (0, 1)]
AtLeastOne = Annotated[float, (1, math.inf)]
DualClip = Annotated[float, (1 + 1e-9, math.inf)]  # at c = 1 every token with A < 0 would stand on the edge
Count = Annotated[int, (1, math.inf)]

Drawn = tuple[Tensor, Tensor]  # (B,) token ids, and their log-probabilities where they were drawn from


@dataclass
class Progress:
    """Where in the run an update happens: all that schedules and random selections depend on."""

    step: int = 0
    total: int = 1
    seed: int = 0
    max_length: int | None = None  # longest response that sampling allows, tokens
    temperature: float = 1.0  # of the rollouts
    stops: tuple[int, ...] = ()  # tokens that end a response

    def generator(self) -> Generator:
        """A generator that depends on (seed, step) only."""
        return Generator().manual_seed((self.seed * 1_000_003 + self.step) % 2**63)


@dataclass
class Plan:
    """All that an update knows about its whole batch, detached, to be sliced by rows."""

    adv: Tensor  # (B, T) advantage that enters the surrogate
    weight: Tensor  # (B, T) multiplies the surrogate
    coef: Tensor  # (B, T) aggregation over the tokens that the method selected; 0 elsewhere
    coef_all: Tensor  # (B, T) aggregation over all response tokens: for penalties that see every token
    entropy: float  # token-mean entropy of the whole batch, nats: what controllers see
    tokens: int  # response tokens of the whole batch, also after slicing
    marks: dict[str, Tensor] = field(default_factory=dict)  # a method's own per-token or per-row tensors
    metrics: dict[str, float] = field(default_factory=dict)  # whole-batch numbers worth logging

    def rows(self, index: Any) -> Plan:
        parts = {k: getattr(self, k)[index] for k in ("adv", "weight", "coef", "coef_all")}
        return replace(self, **parts, marks={k: v[index] for k, v in self.marks.items()})


@dataclass_transform()
@dataclass
class Method:
    """Group-relative policy gradient with the clipped ratio: the baseline that collapses. Plain GRPO, and the
    skeleton of everything else: a method overrides the hook of its place (1 sampling, 2 selection, 3 weight,
    4 ratio, 5 penalty), and what that hook needs besides.

    `surrogate`, `penalty` and `factor` are called per micro-batch, the first two with the graph; the others
    once per update with the whole batch, detached; `select`, where `refill` is set, also on each draw, before
    anything is scored. Only `after_step` changes the object: a loss can be computed twice.

    `class PAR(Method, key="par", place="weight", ...)` sets class variables and makes a dataclass; the
    docstring's first sentence is the method's `idea`, a field's docstring its help, its type its range.
    """

    eps_low: Positive = 0.2
    """r is clipped from below at 1 - eps_low"""
    eps_high: Positive = 0.2
    """r is clipped from above at 1 + eps_high"""
    dual_clip: DualClip | None = None
    """for A < 0 the loss is at most -c A, c > 1 (dual clip, PPO for games)"""
    aggregation: Aggregation = "token_mean"
    """how losses add up: token_mean, seq_mean_token_mean, seq_mean_token_sum, seq_sum_norm, token_sum"""

    key: ClassVar[str] = "grpo"
    place: ClassVar[str] = "none"
    paper: ClassVar[str] = "2402.03300"
    idea: ClassVar[str] = "group-relative policy gradient with the clipped ratio: the baseline that collapses"
    needs: ClassVar[tuple[str, ...]] = ("logp",)  # fields of Tokens beyond ids, mask, reward, group
    on_policy: ClassVar[bool] = True  # False: its clip or penalty does nothing strictly on-policy
    entropy_grad: ClassVar[bool] = False  # True: the loss differentiates the entropy, which needs its graph
    topk: ClassVar[int] = 0  # K of Tokens.topk_logp, for methods that need it
    refill: ClassVar[bool] = False  # True: the loop samples until `select` has kept enough whole groups
    without: ClassVar[tuple[str, ...]] = ()  # inherited hyperparameters that this method has no use for
    refuses_negative: ClassVar[str] = ""  # what the method does with rewards, so that R < 0 is an error
    state: ClassVar[dict[str, Any]] = {}  # numbers that live across steps: name -> start, or a field's name
    given: ClassVar[tuple[str, ...]] = ()  # hyperparameters that somebody set, be it to their default

    def __init_subclass__(cls, **constants: Any) -> None:
        idea = " ".join((cls.__doc__ or "").split()).partition(". ")[0].removesuffix(".")
        cls.idea = idea if idea[1:2].isupper() else idea[:1].lower() + idea[1:]
        for name, value in constants.items():
            setattr(cls, name, value)
        dataclass(cls)

    def __post_init__(self) -> None:
        self.progress = Progress()
        for name, start in self.state.items():
            setattr(self, name, getattr(self, start) if isinstance(start, str) else copy.copy(start))

    def sample(self, logits: Tensor, position: int, rows: Tensor, chance: Generator | None) -> Drawn | None:
        """Place 1. The next tokens, for temperature-scaled logits (B, V); None leaves sampling alone. `rows`
        (B,): each row's number among its prompt's responses."""

    def select(self, tk: Tokens) -> Tensor | None:
        """Place 2. (B,) bool: the responses that enter the update; None: all."""

    def shape(self, tk: Tokens) -> Tensor:
        """(B,) the reward that advantages are computed from; `tk.solved` stays what it was."""
        return tk.reward

    def advantage(self, tk: Tokens) -> Tensor:
        """Place 3. (B, T): `tk.adv` where given, else (2.1) for every token of a response."""
        if tk.adv is not None:
            return tk.adv
        return group_advantages(tk.reward, tk.group)[:, None].expand(tk.mask.shape)

    def weight(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> Tensor | None:
        """Place 3. (B, T) weights >= 0 on the surrogate, `tk.mask` as selected; None: all 1."""

    def keep(self, tk: Tokens, adv: Tensor) -> Tensor | None:
        """(B, T) bool: tokens that stay in the loss *and in its denominator*; None: all of `tk.mask`."""

    def mark(self, tk: Tokens, adv: Tensor, metrics: dict[str, float]) -> dict[str, Tensor]:
        """Whole-batch selections that `surrogate` or `penalty` need, tensors of B rows."""
        return {}

    def surrogate(self, tk: Tokens, plan: Plan) -> Tensor:
        """Place 4. (B, T) loss per token, before weights and aggregation; `plan` has the same rows as tk."""
        return clipped_surrogate(tk.logp, tk.old_logp, plan.adv, self.eps_low, self.eps_high, self.dual_clip)

    def factor(self, tk: Tokens, adv: Tensor, marks: dict[str, Tensor] | None = None) -> Tensor:
        """(B, T), detached: by how much the surrogate's gradient differs from that of -A log π, for weights
        that need the real force. `marks` None: `tk` is the whole batch."""
        return clip_factor(tk.logp, tk.old_logp, adv, self.eps_low, self.eps_high, self.dual_clip)

    def penalty(self, tk: Tokens, plan: Plan) -> Tensor | None:
        """Place 5. A scalar to add: this micro-batch's share of a sum over `plan.coef_all` or `plan.coef`."""

    def complaint(self, settings: Any) -> str:
        """What in a run's settings (`train.Settings`) the method cannot work with, flag and remedy; or ''."""
        does = self.refuses_negative if settings.reward == "length_penalty" else ""
        return f"--reward length_penalty: {self.key} {does}, and some would be below 0" if does else ""

    def not_negative(self, reward: Tensor) -> Tensor:
        """The reward itself; ValueError where it is below 0."""
        if bool((reward < 0).any()):
            text = f"{self.key}: a reward of {float(reward.min()):g} is below 0"
            raise ValueError(f"{text}, and the method {self.refuses_negative}: give R >= 0")
        return reward

    def reset_reference(self, step: int, score: float | None) -> bool:
        """Called after each step, with the score of its evaluation or None. True: the loop copies the policy
        into the reference and clears the optimizer's state (ProRL)."""
        return False

    def after_step(self, plan: Plan) -> None:
        """Called after each optimizer step with its plan: controllers move here."""

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def overrides(self, hook: str) -> bool:
        """Has the method this hook of its own, or is it plain GRPO's?"""
        return getattr(type(self), hook) is not getattr(Method, hook)

    @property
    def loss_norm(self) -> float | None:
        """K of seq_sum_norm, tokens: the longest response that sampling allows."""
        return self.progress.max_length

    def coefficients(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T): the aggregation over a mask of the whole batch."""
        return aggregation_coefficients(mask, self.aggregation, self.loss_norm, dtype)


# ------------------------------------------------------------------------------------------------------------
# 7. The objective


def plan_update(tokens: Tokens, method: Method) -> Plan:
    """Everything that depends on the whole update batch (the scope rule), in the order selection, advantage,
    token mask, weight, marks. Raises ValueError where the method needs a field that is None."""
    tk, mask = tokens.detach().clean(), tokens.mask
    for name in method.needs:
        if getattr(tk, name) is None:
            raise ValueError(f"method {method.key} needs Tokens.{name}, which is None")
    tk.response = mask
    if tk.reward is not None:
        tk.correct, tk.reward = tk.solved, method.shape(tk)
    rows = method.select(tk)
    if rows is not None:
        tk.mask = mask & rows[:, None]
    adv = torch.where(tk.mask, method.advantage(tk), 0).to(tk.logp.dtype)  # (B, T)
    kept = method.keep(tk, adv)
    if kept is not None:
        tk.mask = tk.mask & kept
        adv = torch.where(tk.mask, adv, 0)
    entropy = float("nan") if tk.entropy is None else float(masked_mean(tk.entropy, mask))
    metrics: dict[str, float] = {"entropy": entropy}  # of all responses, selected or not
    if tk.ref_logp is not None:  # the value estimate (2.15), whatever estimator a method descends
        metrics["kl_ref"] = float(masked_mean(kl_penalty(tk.logp, tk.ref_logp, "k3"), mask))
    weight = method.weight(tk, adv, metrics)
    marks = method.mark(tk, adv, metrics)
    weight = torch.ones_like(adv) if weight is None else torch.where(tk.mask, weight, 0).to(adv.dtype)
    mean = masked_mean(weight, tk.mask)
    metrics["weight_mean"] = float(mean)
    metrics["weight_std"] = float(masked_mean((weight.double() - mean) ** 2, tk.mask).sqrt())
    touched = (mask & ~tk.mask) | (tk.mask & (weight != 1))  # share of the response tokens:
    metrics.setdefault("tokens_touched", float(masked_mean(touched.float(), mask)))
    coef, coef_all = (method.coefficients(m, adv.dtype) for m in (tk.mask, mask))
    return Plan(adv, weight, coef, coef_all, entropy, int(mask.sum()), marks, metrics)


def batch_loss(tokens: Tokens, plan: Plan, method: Method) -> tuple[Tensor, dict[str, float]]:
    """The loss of some rows of the batch, given those rows of the plan, and metrics: summed over a partition
    of the rows, those of the batch. ValueError where the method corrects `tokens.mismatch` again."""
    if "rollout_logp" in method.needs and tokens.mismatch is not None:
        text = f"{method.key}: correct=true and Tokens.mismatch (--mismatch)"
        raise ValueError(f"{text} both weigh by π/π_engine: use one")
    tokens = tokens.clean()
    loss = method.surrogate(tokens, plan) * plan.weight
    total = weighted_sum(loss if tokens.mismatch is None else loss * tokens.mismatch, plan.coef)
    extra = method.penalty(tokens, plan)
    metrics = {"clip_fraction": 0.0, "kl_old": 0.0}  # the clip removed the gradient; k3 of KL(π_old || π)
    if tokens.old_logp is not None:
        logp = tokens.logp.detach()
        clipped = method.factor(tokens, plan.adv, plan.marks) == 0
        share = tokens.mask.sum().double() / max(plan.tokens, 1)
        metrics["clip_fraction"] = float(share * masked_mean(clipped.float(), tokens.mask))
        kl = kl_penalty(tokens.old_logp, logp, "k3")  # y ~ π_old
        metrics["kl_old"] = float(share * masked_mean(kl, tokens.mask))
    return total if extra is None else total + extra, metrics


def policy_loss(tokens: Tokens, method: Method) -> tuple[Tensor, dict[str, float]]:
    """The whole objective of a method on one update batch, and the numbers worth logging."""
    plan = plan_update(tokens, method)
    loss, metrics = batch_loss(tokens, plan, method)
    return loss, {**plan.metrics, **metrics}


def token_flow(tokens: Tokens, force: Tensor) -> Tensor:
    """(B, T): what the update does to entropy if the policy were a table. A logit step η · force · (e_y - p),
    force = -∂loss/∂logp, changes the entropy of its own state by η · force · T, entropy_math (2.2). In nats
    per unit η on the scaled logits z/τ; for a step on z divide by τ² (2.9)."""
    return torch.where(tokens.mask, force * exact_score(tokens.stats), 0).detach()


# ------------------------------------------------------------------------------------------------------------
# 8. Verified rewards: is this answer that answer?
#
# **math-verify** (sympy) is the judge.  What is ours stands around it:
#
#   before   The last complete \boxed{} counts, whatever stood in others; a last box that never closes is no
#            answer.  Without a box math-verify looks behind "answer is" and for the last formula or number.
#            Equal strings and integers are decided at once.
#   around   A process of its own, whose fork for each check is killed after 1.5 s: `10^{10^{10}}` or ten
#            thousand brackets stop nothing but themselves.  A signal would not do: big powers run in C.
#   after    The decisions in which math-verify is too generous or too literal, a line and a reason each, in
#            `tidy`, `literal`, `equal` and `near`.  A wrong yes is worse than a wrong no: policies learn it.
#
# A list without brackets or in braces is a set: order does not matter, the number of elements does.  In round
# or square brackets order matters.  `1,234` is one number, `100, 200` are two.  No inequality is an interval.

LONGEST_ANSWER = 500  # characters; the longest reference of the six benchmarks has 204
LONGEST_WRITTEN = 2000  # of an answer, or of the end of a completion without a box, that are parsed


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{} (or \\fbox{}, or `\\boxed 5`); None if there is none that closes."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].split("boxed" if text.startswith("\\boxed", start) else "fbox", 1)[1].lstrip()
    if not rest.startswith("{"):
        found = re.match(r"[-+]?[\w.]+", rest)
        return found[0] if found else None
    depth = 0
    for token in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \{ and \} are letters, but \\ ends before a }
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return rest[1 : token.start()]
    return None


def plain_answer(text: str) -> str:
    """An answer without dollars, blanks and full stops around it; an integer in its shortest form."""
    s = " ".join(text.replace("$", "").split()).rstrip(" .")
    found = re.fullmatch(r"([-+]?)0*(\d{1,3}(?:(?:,|\{,\}|,\\!)\d{3})+|\d+)(?:\.0*)?", s)
    return found[1].strip("+") + re.sub(r"\D", "", found[2]) if found else s


# The text of the next five functions is what the judge's process runs: it imports nothing of ours.


def tidy(s: str) -> str:
    """An answer in the LaTeX that math-verify reads as it is meant."""
    s = s.replace("{,}", ",").replace("\\varnothing", "\\emptyset").replace("~", " ")
    s = re.sub(r"(?<!\\)(?:\$|\*\*|`)|\\\$|(?<!\\)\\(?:left|right|displaystyle|[,!;: >])(?![a-z])", " ", s)
    s = " ".join(s.split()).rstrip(" .,")
    s = re.sub(r"(?<=\d)(?: ,| ?, )(?=\d{3}(?!\d))", ", ", s)  # 100, 200 are two numbers
    for word, power in (("thousand", 3), ("million", 6), ("billion", 9)):  # else a unit, which is dropped
        s = re.sub(rf"(?<=\d)\s*(?:\\text\{{ ?{word} ?\}}|{word})", rf"\\cdot 10^{{{power}}}", s)
    s = re.sub(r"(?<=\d)[eE]([-+]?\d{1,3})$", r" \\cdot 10^{\1}", s)
    s = re.sub(r"\\text\{ ?percent ?\}", r"\\%", s)
    s = re.sub(r"(?<=\d)\\(?:text|mathrm)\{([eidx])\}", r"\1", s)  # 3\mathrm{i} is three times i
    s = re.sub(r"(?<=[\d}])([a-hj-zA-Z])$", r"(\1)", s)  # 6m is six times m, 6 m are metres
    s = re.sub(r"(?<=\d)(?: (?!pi|sin|cos|tan|log|sqrt|and|or|percent)[a-z]{3,})+$", "", s)  # 5 dollars
    s = re.sub(r"(\.\d*)\\overline\{(\d+)\}", lambda found: found[1] + 20 * found[2], s)
    s = re.sub(r"(?<![\d/.])(\d+) (\d+)/(\d+)$", r"\1\\frac{\2}{\3}", s)  # 2 1/2
    degrees = r"\s*\^\s*\{?\s*\\circ\s*\}?"
    s = re.sub(rf"(\\(?:sin|cos|tan|cot|sec|csc)\s*[({{]?\s*)(\d+){degrees}", r"\1\\frac{\2\\pi}{180}", s)
    s = re.sub(rf"{degrees}( ?[CF]$)?|\s*degrees?$", "", s)  # elsewhere they are a unit
    return re.sub(r"^[a-zA-Z]\w* ?\\in(?![a-z])", "", s).strip()


def literal(candidate: str, reference: str) -> bool | None:
    """Answers that are no mathematics, compared as text; None where they are mathematics.

    A choice is right, too, with what it stands for behind: \\textbf{(C)}\\ 12 is C.  Of a word algebra would
    make a product, of a clock time a ratio, of a date a sum."""
    bare = r"\\(?:text(?:bf|it|rm)?|mbox|math(?:rm|bf|it|sf))\s*\{([^{}]*)\}"
    a, b = (re.sub(bare, r" \1 ", s.replace("\\pm", "±")) for s in (candidate, reference))
    a, b = (" ".join(re.sub(r"[().\\]", " ", s).split()) for s in (a, b))
    if re.fullmatch("[A-Z]", b):
        return bool(re.match(rf"{b}(?:[ :]|$)(?! ?(?:[-+*/^=<>]|and\b|or\b))", a))
    clock = r"\d ?: ?\d|\d([-/])\d+\1\d|\d ?[ap] ?m\b"
    if re.fullmatch(r"[A-Z]{2,}|[A-Za-z' -]{3,}", b) or re.search(clock, a) or re.search(clock, b):
        return a.casefold().replace(" ", "") == b.casefold().replace(" ", "")
    return None


def same(candidate: str, reference: str, boxed: bool) -> bool:
    """Whether an answer, or the end of a completion without a box, gives the reference answer."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse

    signs = zip("−–∞∪π°×·≤≥±√", "- - \\infty \\cup \\pi ^\\circ \\times \\cdot \\le \\ge \\pm \\sqrt".split())
    wide = {c: c - 0xFEE0 for c in range(0xFF01, 0xFF5F)} | {0: None}  # full-width brackets, commas, digits
    table = wide | {ord(a): b + " " * (b > "Z") for a, b in signs}
    text, gold = candidate.translate(table), tidy(reference.translate(table))
    configs = [LatexExtractionConfig(), ExprExtractionConfig()]
    if boxed:
        if (told := literal(tidy(text), gold)) is not None:
            return told
        text, configs = f"${tidy(text)}$", configs[:1]
    elif literal(gold, gold) is not None:  # only behind "answer", "option" or "choice"
        wanted, text = (re.sub(r"\\[a-z]+|[(){}*\\]", " ", s).strip() for s in (gold, text))
        text = re.sub(r"(?i)\b(?:option|choice)\b", "answer", text)
        words = tuple("ABCDEFGHIJ") if re.fullmatch("[A-Z]", wanted) else (wanted,)
        strings = StringExtractionConfig(words, try_extract_without_anchor=False, lowercase=False)
        return parse(text, [strings], extraction_mode="first_match", parsing_timeout=None)[:1] == [wanted]
    found = parse(text, configs, extraction_mode="first_match", parsing_timeout=None)
    right = parse(f"${gold}$", configs[:1], parsing_timeout=None)
    measured = re.search(r"(?:\\times|\\cdot|\*)\s*10\^", gold)  # quantities of minerva, to two digits
    return bool(found and right) and equal(found[0], right[0], 1e-2 if measured else 1e-4)


def equal(x: Any, y: Any, slack: float) -> bool:
    """Whether two things that math-verify parsed are the same: sets, tuples and intervals element by element,
    numbers by `near`, all else by `verify`."""
    from latex2sympy2_extended.logic import And
    from math_verify import verify
    from sympy import Basic, Eq, FiniteSet, Interval, Tuple
    from sympy.core.relational import Relational

    def parts(z: Any) -> list[Any]:  # with repetitions, which sympy's sets drop
        return list(getattr(z, "_unsorted_args", z.args))

    def sides(z: Any) -> list[Any]:  # of a = b = c
        chain = parts(z) if isinstance(z, And) else [z]
        return [side for e in chain for side in (e.args if isinstance(e, Eq) else [e])]

    if isinstance(x, Eq | And) and not x.free_symbols:  # 1 + 1 = 5 is not 5, nor 1 + 1 = 2 what 2 + 2 = 4 is
        return all(equal(a, b, slack) for a in sides(x) for b in sides(y))
    if not all(isinstance(z, Relational | And) for z in (x, y)):  # x = 5 says 5, as does 5 = x
        x, y = ((z.lhs if z.lhs.is_number else z.rhs) if isinstance(z, Eq) else z for z in (x, y))
    x, y = (parts(z)[0] if isinstance(z, FiniteSet) and len(parts(z)) == 1 else z for z in (x, y))
    x, y = (Tuple(z.start, z.end) if isinstance(z, Interval) and z.is_open else z for z in (x, y))
    kind = next((k for k in (FiniteSet, Interval, Tuple) if isinstance(x, k) or isinstance(y, k)), None)
    if kind and not (isinstance(x, kind) and isinstance(y, kind)):
        return False  # (1, 2) is neither 1, 2 nor [1, 2]
    if kind is Interval and (x.left_open, x.right_open) != (y.left_open, y.right_open):
        return False
    if kind:
        ours, rest = ([z.start, z.end] if kind is Interval else parts(z) for z in (x, y))
        for a in ours:
            tried = rest if kind is FiniteSet else rest[:1]
            hit = next((i for i, b in enumerate(tried) if equal(a, b, slack)), None)
            if hit is None:
                return False
            del rest[hit]
        return not rest
    if isinstance(x, Basic) and isinstance(y, Basic) and x.is_number and y.is_number:
        return near(x, y, slack)
    return verify(y, x, timeout_seconds=None)


def near(x: Any, y: Any, slack: float) -> bool:
    """Whether two sympy numbers are one: relative, as six decimals make all small numbers equal.

    `slack` counts where one is a decimal (but less than one half from an integer); exact numbers are equal or
    not.  50\\% is 50 and is one half, as problems ask for both."""
    from sympy import Float, Rational, UnevaluatedExpr

    hundredth = UnevaluatedExpr(Rational(1, 100))  # what math-verify makes of a percent sign
    percent = x.has(hundredth) - y.has(hundredth)
    x, y = x.doit(), y.doit()
    if x == y:
        return True
    slack = slack * (1 + 1e-9) if x.has(Float) or y.has(Float) else 1e-20
    for scaled in {x, x * 100**percent}:
        gap, size = abs((scaled - y).evalf(30)), abs(y.evalf(30))
        if gap <= slack * size and not (slack < 1e-2 and y.is_Integer and gap >= 0.5):
            return True
    return False


def serve() -> None:
    """The judge's process.  Reads one JSON line {candidate, reference, boxed, seconds, memory} at a time and
    answers 1 or 0, or once "! why" where it cannot work at all.

    A fork does each check and may be killed: what it did to memory, time or sympy's caches dies with it.
    Where the system sets no limit on memory, the time limit remains."""
    warm = ("\\frac{1}{2}", "0.5"), ("x^2-1", "(x-1)(x+1)"), ("\\{1,\\sqrt{2}\\}", "\\{\\sqrt{2},1\\}")
    try:
        import resource
        import select

        fork = os.fork  # missing on Windows: said now, not at the first check
        if not all([same(a, b, True) for a, b in warm]):  # grammar and caches are warm before the first fork
            raise RuntimeError(f"equal expressions were found different among {warm}")
        same("no answer", "5", False)
    except Exception as error:
        print("!", type(error).__name__, " ".join(str(error).split()), flush=True)
        return
    for line in sys.stdin:
        job = json.loads(line)
        seconds, memory = job.pop("seconds"), job.pop("memory")
        out, end = os.pipe()
        child = fork()
        if child == 0:
            try:
                for limit, most in ((resource.RLIMIT_CPU, int(seconds) + 2), (resource.RLIMIT_CORE, 0)):
                    resource.setrlimit(limit, (most, most))  # ends it even if who would kill it is gone
                with suppress(OSError, ValueError), open("/proc/self/statm") as file:
                    most = int(file.read().split()[0]) * resource.getpagesize() + memory
                    resource.setrlimit(resource.RLIMIT_AS, (most, most))
                sys.setrecursionlimit(3000)
                os.write(end, b"1" if same(**job) else b"0")
            finally:
                os._exit(0)  # whatever it was: no answer is a no
        os.close(end)
        ready, _, _ = select.select([out], [], [], seconds)
        answer = os.read(out, 1) if ready else b""
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(out)
        print("1" if answer == b"1" else "0", flush=True)


JUDGE = "\n".join([
    "from __future__ import annotations", "import json, os, re, signal, sys",
    "from contextlib import suppress",
    *map(inspect.getsource, (tidy, literal, same, equal, near, serve)), "serve()",
])  # fmt: skip


class Grader:
    """Grades completions in `workers` processes; any thread may call it.

    Every check has `seconds` of wall time and `memory` bytes beyond what the process has mapped, then it is
    killed and counts as wrong. The processes start with the object and import math-verify in the background;
    Ctrl-C does not reach them, and they end with this process, however that ends. Raises ImportError where
    math-verify is missing, and at the first check where it is broken: else all would be wrong in silence.
    """

    def __init__(self, workers: int | None = None, seconds: float = 1.5, memory: int = 2**30) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("grading mathematics needs math-verify: pip install 'entropy-flow[llm]'")
        self.limits = {"seconds": seconds, "memory": memory}
        self.check = lru_cache(maxsize=100_000)(self._check)  # many of a group give the same answer
        self.idle: queue.Queue[subprocess.Popen[str]] = queue.Queue()
        self.threads = ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1))
        for _ in range(self.threads._max_workers):
            self.idle.put(self._start())
        atexit.register(self.close)

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([sys.executable, "-c", JUDGE], text=True, start_new_session=True, **pipes)

    def grade_all(self, completions: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Whether each completion gives its answer, in order."""
        boxed = ["\\boxed" in text or "\\fbox" in text for text in completions]
        end = slice(-LONGEST_WRITTEN, None)
        given = [(last_boxed(t) or "") if box else t[end] for t, box in zip(completions, boxed)]
        return list(self.threads.map(self.check, given, answers, boxed))

    def _check(self, candidate: str, reference: str, boxed: bool) -> bool:
        if boxed:
            a, b = plain_answer(candidate), plain_answer(reference)
            if a == b or not a or len(a) > LONGEST_WRITTEN or all(re.fullmatch(r"-?\d+", s) for s in (a, b)):
                return a == b
        job = {"candidate": candidate, "reference": reference, "boxed": boxed, **self.limits}
        server = self.idle.get()
        try:
            with suppress(OSError):
                server.stdin.write(json.dumps(job) + "\n")
                server.stdin.flush()
            said = server.stdout.readline()
            if not said or said.startswith("!"):  # the server itself is gone: someone killed it, or see below
                server.kill()
                server.wait()
                with suppress(OSError):
                    server.stdin.close()  # with what it did not read
                server = self._start()
        finally:
            self.idle.put(server)
        if said.startswith("!"):
            raise ImportError(
                f"grading mathematics: math-verify does not work here: {said[1:].strip()}\n"
                "  install it again: pip install --force-reinstall 'entropy-flow[llm]'"
            )
        return said.strip() == "1"

    def close(self) -> None:
        """End the processes."""
        atexit.unregister(self.close)
        self.threads.shutdown(wait=True)
        while not self.idle.empty():
            server = self.idle.get()
            server.kill()
            server.communicate()


@cache
def shared_grader() -> Grader:
    """The one that `grade` and `math_task` use, started at first use."""
    return Grader()


def grade(completion: str, answer: str) -> bool:
    """Whether a completion ends in the reference answer. Any strings; nothing raised; at most two seconds."""
    return shared_grader().grade_all([completion], [answer])[0]


# ------------------------------------------------------------------------------------------------------------
# 9. Demonstration


def main() -> None:
    """Two things that surprise in a training log."""
    torch.manual_seed(0)
    reward, logp = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1]), torch.randn(8, 5, requires_grad=True)
    ids, mask, group = torch.zeros(8, 5), torch.ones(8, 5, dtype=torch.bool), torch.tensor([0] * 4 + [1] * 4)
    print("rewards of two groups ", reward.tolist(), "\nadvantages            ", end=" ")
    print(*(f"{a:+.2f}" for a in group_advantages(reward, group).tolist()))
    print("the second group is solved by everybody, so it teaches nothing: exactly 0.\n")

    loss, _ = policy_loss(Tokens(ids, mask, reward=reward, group=group, logp=logp), Method())
    loss.backward()
    print(f"strictly on-policy: loss = {loss.item():+.1e}, yet |gradient| = {logp.grad.norm():.3f}")
    print("the value is minus the mean advantage; watch reward and entropy.\n")

    print("gradient of the clipped surrogate over the plain policy gradient (eps .2 / .28, dual clip 3)")
    ratios = torch.tensor([0.5, 0.79, 0.9, 1.0, 1.1, 1.29, 2.0, 3.5])
    print("  r   ", *(f"{r:5.2f}" for r in ratios.tolist()))
    for a in (1.0, -1.0):
        factor = clip_factor(ratios.log(), torch.zeros(8), torch.full((8,), a), 0.2, 0.28, 3.0)
        print(f"  A {a:+.0f}", *(f"{x:5.2f}" for x in factor.tolist()))
    print("with A > 0 the clip stops the rise, with A < 0 the fall: at r = 1 it does nothing at all.")


if __name__ == "__main__":
    main()
