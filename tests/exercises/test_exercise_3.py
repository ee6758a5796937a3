"""Exercise 3. OPEFO's lambda: when do the flows cancel?               pytest tests/exercises -k 3

Every response token has a flow f = A T, the entropy change of exercise 2. Some raise H, some lower it:
    P = Σ_{f > 0} f          Q = Σ_{f < 0} |f|
GRPO changes H by P - Q, and mostly P < Q: collapse. OPEFO (2605.11491, eq. 8-9) weights the tokens by
    w = 1 + λ where f > 0,     w = 1 - λ where f < 0                              interventions (3.14)
    F(λ) = Σ w f = (1 + λ) P - (1 - λ) Q                                          entropy_math (6.1)
1. Solve F(λ) = 0.
2. If one side is empty, what does the solution say, and does it still make sense? If both are?
3. A batch is padded to a rectangle. What stands at a padded position may be anything, NaN included.
"""

import math

import torch
from checking import Exercise, Mistake, ensure
from torch import Tensor

from entropy_math import entropy_change, set_point_lambda, token_stats
from grpo import Tokens, plan_update
from interventions import OPEFO


def opefo_lambda(f: Tensor, mask: Tensor) -> float:
    """(B, T) flows, (B, T) bool, False on padding -> λ in [-1, 1]; 0 where nothing flows."""
    return ...  # replace the three dots


# ---- the checks; what follows gives the answer away --------------------------------------------------------


def sides(f: Tensor, mask: Tensor) -> tuple[float, float]:
    return float(f[mask & (f > 0)].sum()), float(-f[mask & (f < 0)].sum())


def reference(f: Tensor, mask: Tensor) -> float:
    return set_point_lambda(*sides(f, mask))  # (6.2) without a target, as `interventions.OPEFO` calls it


def of_sides(formula):
    """A mistake that goes wrong only after P and Q are right."""
    return lambda f, mask: formula(*sides(f, mask))


def own_means(f: Tensor, mask: Tensor) -> float:
    return set_point_lambda(
        *(float(x.mean()) if len(x) else 0.0 for x in (f[mask & (f > 0)], -f[mask & (f < 0)]))
    )


def times_mask(f: Tensor, mask: Tensor) -> float:
    P, Q = float((f * mask).clamp(min=0).sum()), float(-(f * mask).clamp(max=0).sum())
    return (Q - P) / (Q + P) if P + Q else 0.0


def counts(f: Tensor, mask: Tensor) -> float:
    return set_point_lambda(float((mask & (f > 0)).sum()), float((mask & (f < 0)).sum()))


MISTAKES = {
    "sign": Mistake(
        of_sides(lambda P, Q: (P - Q) / (P + Q) if P + Q else 0.0),
        "the sign is turned around. Usually Q > P, the falling side is the stronger one; then λ must be "
        "positive, so that 1 + λ amplifies what raises H. Yours amplifies the collapse.",
    ),
    "signed Q": Mistake(
        (
            of_sides(lambda P, Q: (-Q - P) / (-Q + P) if P != Q else 0.0),
            of_sides(lambda P, Q: (-Q - P) / (-Q + P) if P != Q else math.nan),
        ),
        "your Q is negative. Q = Σ |f| over the falling tokens is a size; with its sign left on, numerator "
        "and denominator change places and λ leaves [-1, 1].",
    ),
    "net": Mistake(
        of_sides(lambda P, Q: Q - P),
        "Q - P is what has to be made up for, but λ is a share of all flow: divide by Q + P, the slope of "
        "F(λ). Only then λ stays in [-1, 1] and does not change when all advantages are doubled.",
    ),
    "ratio": Mistake(
        of_sides(lambda P, Q: Q / P - 1 if P else 0.0),
        "Q/P - 1 amplifies the rising side until it equals Q, leaving the falling side alone. OPEFO moves "
        "both, by the same λ in opposite directions: F(λ) = (1 + λ) P - (1 - λ) Q.",
    ),
    "zero division": Mistake(
        of_sides(lambda P, Q: (Q - P) / (Q + P)),
        "division by zero where nothing flows, as in a batch whose groups are all right or all wrong (every "
        "A = 0). Any λ balances nothing; the choice is 0, plain GRPO.",
    ),
    "not a number": Mistake(
        of_sides(lambda P, Q: (Q - P) / (Q + P) if P + Q else math.nan),
        "0/0 is NaN where nothing flows, as in a batch whose groups are all right or all wrong (every A = "
        "0). A NaN weight destroys the policy in one step. Any λ balances nothing; the choice is 0, plain "
        "GRPO.",
    ),
    "epsilon": Mistake(
        tuple(of_sides(lambda P, Q, e=e: (Q - P) / (Q + P + e)) for e in (1e-6, 1e-8, 1e-9, 1e-10, 1e-12)),
        "an ε in the denominator. Late in training flows are tiny and ε then switches the balance off "
        "unseen. λ must not depend on the scale of f: treat Q + P = 0 as its own case instead.",
    ),
    "empty side": Mistake(
        of_sides(lambda P, Q: (Q - P) / (Q + P) if P and Q else 0.0),
        "λ = 0 where one side is empty, which is plain GRPO at the moment of fastest collapse. The formula "
        "holds there: with P = 0 it gives λ = 1, weight 0 for all that lowers H. Only P + Q = 0 needs a "
        "case of its own.",
    ),
    "never negative": Mistake(
        of_sides(lambda P, Q: max(0.0, (Q - P) / (Q + P)) if P + Q else 0.0),
        "you never let λ fall below 0. Where P > Q the entropy would grow, and the same balance holds it "
        "back: λ is in [-1, 1], not [0, 1].",
    ),
    "padding": Mistake(
        lambda f, mask: reference(f, torch.ones_like(mask)),
        "you sum over padding. Its values are left over from the computation and belong to no token: select "
        "with the mask.",
    ),
    "NaN times zero": Mistake(
        times_mask,
        "you multiply by the mask. NaN · 0 is NaN, so one undefined padded value spoils the sum. Select "
        "instead: torch.where(mask, f, 0) or f[mask].",
    ),
    "own means": Mistake(
        own_means,
        "you average each side over its own tokens. Flows add up, and many small ones do balance few large "
        "ones: P and Q are sums (or both divided by the *same* number).",
    ),
    "counts": Mistake(
        counts,
        "you count tokens. One of them can move H as much as a hundred others: P and Q sum the sizes of the "
        "flows.",
    ),
}

flows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.4
real = torch.arange(6) < torch.tensor([[6], [3], [4], [2]])
CASES = {
    "more falling flow": (flows, real),
    "more rising flow": (-flows, real),
    "tiny flows": (1e-12 * flows, real),
    "NaN in the padding": (flows.masked_fill(~real, math.nan), real),
    "nothing raises H": (-flows.abs(), real),
    "nothing flows": (0 * flows, real),
}
SEE = "entropy_math.py, (6.1); interventions.py, (3.14)"
EXERCISE = Exercise(3, "opefo_lambda", SEE, reference, CASES, MISTAKES)


def test_opefo_lambda():
    EXERCISE.check(opefo_lambda)


def test_on_the_batch_of_a_policy():
    """Real responses, padded: the weights that a training step uses leave no net flow, and have your λ."""
    answer, draw = EXERCISE.filled(opefo_lambda), torch.Generator().manual_seed(4)
    z = 2 * torch.randn(*real.shape, 9, generator=draw, dtype=torch.float64)
    sampled = torch.randint(9, real.shape, generator=draw)
    signs = torch.tensor([[1.0], [-1], [1], [-1]], dtype=torch.float64)
    # a usual batch; the likeliest tokens all rewarded, so that nothing raises H; tiny advantages; none
    batches = (sampled, signs), (z.argmax(-1), signs.abs()), (sampled, 1e-12 * signs), (sampled, 0 * signs)
    for ids, adv in batches:
        s = token_stats(z, ids)
        plan = plan_update(Tokens(ids, real, adv=adv.expand(real.shape), **vars(s)), OPEFO())
        padding = torch.tensor([math.nan, 7.0]).double().repeat(3)
        f = torch.where(real, entropy_change(s, adv), padding)
        lam = float(answer(f, real))
        left = float(((1 + lam * f.sign()) * f)[real].sum())
        share = abs(left) / max(float(f[real].abs().sum()), 1e-99)
        ensure(share < 1e-9, f"after weighting a share {share:.3g} of all flow is left over, not 0")
        theirs = plan.metrics["lam"]
        ensure(abs(lam - theirs) < 1e-9, f"the trainer's λ is {theirs:.6f}, yours {lam:.6f}")
