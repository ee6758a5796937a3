"""Exercise 1. Four numbers that tell everything about a token.        pytest tests/exercises -k 1

A softmax policy gives token v the probability p_v = e^{z_v} / Σ_w e^{z_w}. For a token, chapter 1 needs
    log p_y        of the token y that was sampled
    H = -Σ_v p_v log p_v                     the entropy, in nats                      entropy_math (1.1)
    Σ_v p_v²   and   Σ_v p_v² log p_v        of the whole vocabulary                   entropy_math, section 4

1. e^{1000} is infinite in float64. But p does not change when a constant is taken from all logits:
       log p_v = (z_v - m) - log Σ_w e^{z_w - m},     m = max_w z_w
   Now no exponent is above 0, and the sum is at least 1. Log-probabilities come first, p = e^{log p} second.
2. A forbidden token has z = -inf, so p = 0 and log p = -inf. It adds nothing to a sum, since x log x -> 0 as
   x -> 0; a computer, asked for 0 · (-inf), says NaN. Decide what it shall multiply instead.
"""

import decimal
import math

import torch
from checking import Exercise, Mistake, ensure
from torch import Tensor

import entropy_math


def token_stats(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N, V) float64 logits, (N,) sampled ids -> log p of the sampled id, H, Σp², Σp² log p, each (N,)."""
    return ...  # replace the three dots


# ---- the checks; what follows gives the answer away --------------------------------------------------------


def reference(z: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    s = entropy_math.token_stats(z, ids)
    return s.logp, s.entropy, s.p2, s.p2logp


def four(logq: Tensor, p: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """The four sums, without a thought for what may be infinite."""
    return logq.gather(-1, ids[:, None])[:, 0], -(p * logq).sum(-1), (p * p).sum(-1), (p * p * logq).sum(-1)


def but(part: int, f):
    """The right four numbers but one, which is f(log p, p, sampled log p)."""

    def answer(z: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        right, logq = reference(z, ids), torch.log_softmax(z, -1).clamp(min=-1e4)
        return *right[:part], f(logq, logq.exp(), right[0]), *right[part + 1 :]

    return answer


noise = 2 * torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
masked = noise.masked_fill(torch.arange(9) > 6, -math.inf)
picks, large = torch.tensor([0, 3, 6, 1, 2, 5]), torch.tensor([[1e4, 0, -1e4], [-1e4, -1e4, -1e4]]).double()
MISTAKES = {
    "log of an infinite sum": Mistake(
        lambda z, i: four(
            z - z.exp().sum(-1, keepdim=True).log(), (z - z.exp().sum(-1, keepdim=True).log()).exp(), i
        ),
        "Σ e^z overflows. At logits of 1e4 the sum is infinite, at -1e4 it is 0, and its logarithm is "
        "infinite either way. Take the row's maximum from the logits first (step 1): log p stays the same.",
    ),
    "epsilon": Mistake(
        tuple(
            lambda z, i, e=e: four((torch.softmax(z, -1) + e).log(), torch.softmax(z, -1), i)
            for e in (1e-6, 1e-8, 1e-9, 1e-10, 1e-12)
        ),
        "log(p + ε) hides the underflow and does not mend it. Every log p below log ε, where the rare "
        "tokens are, comes out as log ε. log p = z - m - log Σ e^{z-m} needs no ε (step 1).",
    ),
    "overflow": Mistake(
        lambda z, i: four(
            (z.exp() / z.exp().sum(-1, keepdim=True)).log(), z.exp() / z.exp().sum(-1, keepdim=True), i
        ),
        "e^z overflows. At logits of 1e4 numerator and denominator are both infinite and their ratio is NaN "
        "(at -1e4 both are 0). Take the row's maximum from the logits first (step 1): p stays the same.",
    ),
    "log of softmax": Mistake(
        lambda z, i: four(torch.softmax(z, -1).log(), torch.softmax(z, -1), i),
        "you take the log of a probability that has underflowed to 0. log p = z - m - log Σ e^{z-m} is an "
        "ordinary number, -10000 say, long after p itself is 0: compute log p first and p = e^{log p} from "
        "it (step 1).",
    ),
    "masked": Mistake(
        lambda z, i: four(torch.log_softmax(z, -1), torch.log_softmax(z, -1).exp(), i),
        "0 · (-inf) is NaN. A forbidden token has p = 0 and log p = -inf; its p log p is 0 in the limit, so "
        "give the product a finite log p there, by clamping at -1e4 or by torch.where (step 2).",
    ),
    "dim": Mistake(
        lambda z, i: four(torch.log_softmax(z, 0).clamp(min=-1e4), torch.softmax(z, 0), i),
        "you normalise over the batch. A row is one distribution: the softmax and all sums run over the "
        "last dimension, the vocabulary.",
    ),
    "argmax": Mistake(
        but(0, lambda logq, p, y: logq.max(-1).values),
        "log p is that of the most likely token. Wanted is that of the token in `ids`, which was sampled "
        "and is what the policy gradient acts on: gather it.",
    ),
    "sign": Mistake(
        but(1, lambda logq, p, y: (p * logq).sum(-1)),
        "your entropy is negative. log p <= 0, so H = -Σ p log p needs its minus (1.1).",
    ),
    "bits": Mistake(
        but(1, lambda logq, p, y: -(p * logq).sum(-1) / math.log(2)),
        "your entropy is in bits (log to base 2). Here everything is in nats: the derivative of log p is "
        "1/p only for the natural logarithm, and all later formulas use that.",
    ),
    "sampled": Mistake(
        but(1, lambda logq, p, y: -y),
        "-log p of the sampled token is an estimate of the entropy, right on average over samples and often "
        "far off. H is the sum over the whole vocabulary (1.1).",
    ),
    "mean": Mistake(
        but(1, lambda logq, p, y: -(p * logq).mean(-1)),
        "you average over the vocabulary. The weights p of the mean are already in p log p: H is a sum "
        "(1.1).",
    ),
    "sampled square": Mistake(
        but(2, lambda logq, p, y: (2 * y).exp()),
        "this is the sampled token's own p². Wanted is Σ_v p_v² over the vocabulary, which the push on all "
        "the other logits brings in (exercise 2).",
    ),
    "squared log": Mistake(
        but(3, lambda logq, p, y: (p * logq**2).sum(-1)),
        "you have squared the wrong factor: Σ p (log p)² instead of Σ p² log p.",
    ),
    "minus": Mistake(
        but(3, lambda logq, p, y: -(p * p * logq).sum(-1)),
        "Σ p² log p carries no minus; only the entropy has one. It is never positive.",
    ),
}
CASES = {"random logits": (noise, picks), "logits of ±10000": (large, torch.tensor([1, 0]))}
CASES["forbidden tokens (-inf)"] = (masked, picks)
PARTS = ("log p", "H", "Σp²", "Σp² log p")
EXERCISE = Exercise(1, "token_stats", "entropy_math.py, (1.1)", reference, CASES, MISTAKES, PARTS)


def test_token_stats():
    EXERCISE.check(token_stats)


def test_against_fifty_digits():
    """The four sums in decimal arithmetic with 50 digits and an unlimited exponent: nothing to stabilise."""
    answer = EXERCISE.filled(token_stats)
    decimal.getcontext().prec = 50
    for case, (z, ids) in CASES.items():
        for row, i, mine in zip(z.tolist(), ids.tolist(), zip(*answer(z, ids))):
            total = sum(decimal.Decimal(x).exp() for x in row)
            p = [decimal.Decimal(x).exp() / total for x in row]
            some = [q for q in p if q > 0]
            h = -sum(q * q.ln() for q in some)
            exact = p[i].ln(), h, sum(q * q for q in p), sum(q * q * q.ln() for q in some)
            for name, a, b in zip(PARTS, map(float, mine), exact):
                close = math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
                ensure(close, f"{case}: {name} is {b:.9f}, yours {a:.9f}")
