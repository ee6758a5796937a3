"""Exercise 2. By how much does one gradient step change the entropy?   pytest tests/exercises -k 2

Wanted is the heart of chapter 1: the first-order change of H, per unit of learning rate η, when token y with
advantage A is trained. Four lines, three of them given. With u_v = log p_v + H:

    gradient of the entropy     ∂H/∂z_v = -p_v u_v                                     entropy_math (1.2)
    any small logit step        dH = -Σ_v p_v u_v dz_v                                              (1.3)
    a policy-gradient step      dz_v = η A (1[v = y] - p_v)                                         (2.1)

1. Put (2.1) into (1.3). The 1[v = y] keeps one term of the sum; the -p_v keeps all of them: a step on y
   pushes every other logit too.
2. Write the second sum, Σ_v p_v² u_v, with H, Σp² and Σp² log p. They are what exercise 1 has computed.
3. Test with a policy that is uniform: nothing can change to first order, for H is at its maximum.
"""

import torch
from checking import Exercise, Mistake, ensure
from torch import Tensor

from entropy_math import TokenStats, entropy, entropy_change, exact_score, token_stats


def exact_change(logp: Tensor, entropy: Tensor, p2: Tensor, p2logp: Tensor, adv: Tensor) -> Tensor:
    """dH/η of a step on each sampled token: log p_y, H, Σp², Σp² log p and A, each (N,) -> (N,), nats."""
    return ...  # replace the three dots


# ---- the checks; what follows gives the answer away --------------------------------------------------------


def reference(logp: Tensor, h: Tensor, p2: Tensor, p2logp: Tensor, adv: Tensor) -> Tensor:
    return entropy_change(TokenStats(logp, h, p2, p2logp), adv)


def form(name: str):
    """The estimator of a paper, (3.2)."""
    return lambda logp, h, p2, p2logp, adv: entropy_change(TokenStats(logp, h, p2, p2logp), adv, name)


def case(seed: int, scale: float) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(8, 11, generator=draw, dtype=torch.float64)
    s = token_stats(z, torch.randint(11, (8,), generator=draw))
    return s.logp, s.entropy, s.p2, s.p2logp, torch.randn(8, generator=draw, dtype=torch.float64)


MISTAKES = {
    "sign": Mistake(
        lambda *x: -reference(*x),
        "the sign is turned around. Rewarding (A > 0) a token that is likely already (u > 0) must lower H: "
        "the minus of (1.3) stays in front of the e_y part, and meets the minus of -p_v in the other.",
    ),
    "own logit only": Mistake(
        form("s_star"),
        "you have only moved the sampled token's own logit. The gradient e_y - p pushes all logits (2.1); "
        "its second part adds A Σ p² u. Without it the entropy seems to fall on average over y ~ p even at "
        "constant A, where nothing can happen (2.5).",
    ),
    "own logit, wrong sign": Mistake(
        lambda *x: -form("s_star")(*x),
        "two things. The sign of the sampled token's term is turned around: the minus of (1.3) stays, for "
        "rewarding a likely token lowers H. And e_y - p pushes all the other logits too (2.1), which is a "
        "second term.",
    ),
    "push only": Mistake(
        lambda logp, h, p2, p2logp, adv: adv * (p2logp + h * p2),
        "you have the push on all logits, A Σ p² u, and have lost the term of the sampled token, -A p_y u_y.",
    ),
    "entropy in u": Mistake(
        lambda logp, h, p2, p2logp, adv: adv * (p2logp + h * p2 - logp.exp() * logp),
        "u_y = log p_y + H, and the H is missing in the sampled token's term. Without it every token looks "
        "rare, for log p < 0, and rewarding anything seems to raise the entropy.",
    ),
    "entropy in C": Mistake(
        lambda logp, h, p2, p2logp, adv: adv * (p2logp - logp.exp() * (logp + h)),
        "Σ p² u = Σ p² log p + H Σ p², and the second half is missing. Check: for a uniform policy the "
        "whole must be 0.",
    ),
    "no entropy": Mistake(
        lambda logp, h, p2, p2logp, adv: adv * (p2logp - logp.exp() * logp),
        "you have log p where u = log p + H belongs, in both terms. The H comes from the normalisation: "
        "raising one p lowers all others (1.2).",
    ),
    "C minus": Mistake(
        lambda logp, h, p2, p2logp, adv: adv * (-p2logp - h * p2 - logp.exp() * (logp + h)),
        "the second term has the wrong sign. Minus of (1.3) times minus of -p_v is plus: dH/η = A (Σ p² u - "
        "p_y u_y).",
    ),
    "advantage": Mistake(
        lambda logp, h, p2, p2logp, adv: exact_score(TokenStats(logp, h, p2, p2logp)),
        "the advantage is missing. This is T, the change at A = 1; a step with A = -1 does the opposite "
        "(2.2).",
    ),
    "covariance": Mistake(
        form("cov"),
        "you have lost the factor p_y: -A u is the covariance score of 2505.22617. It has mostly the right "
        "sign, but a token of probability 1e-6 cannot change H as much as it says.",
    ),
    "diagonal": Mistake(
        form("steer_theorem"),
        "this is -A p (1-p) u, the own logit's part of (2.4). The push on the other tokens, -Σ_{k≠y} p_k² "
        "u_k, is dropped (2510.10150 drops it on purpose; entropy_math's section 3 says what that costs).",
    ),
    "paper": Mistake(
        form("opefo"),
        "this is -A (1-p)² u, the integrand of 2605.11491's Eq. 6. It has one factor p too few for a "
        "*sampled* token, which arrives with frequency p already (3.4), and no push on the others.",
    ),
}
CASES = {"broad policies": case(0, 1.0), "peaked policies": case(1, 3.0), "uniform policies": case(2, 0.0)}
EXERCISE = Exercise(2, "exact_change", "entropy_math.py, (1.2) to (2.5)", reference, CASES, MISTAKES)


def test_exact_change():
    EXERCISE.check(exact_change)


def test_against_finite_differences():
    """Take the step (2.1), forwards and backwards, and measure the entropy before and after."""
    answer, eta = EXERCISE.filled(exact_change), 1e-4
    z = 2 * torch.randn(11, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for y in range(11):
        for adv in (1.0, -0.5):
            dz = adv * (torch.eye(11, dtype=torch.float64)[y] - z.softmax(-1))
            measured = (entropy(z + eta * dz) - entropy(z - eta * dz)) / (2 * eta)
            s = token_stats(z, torch.tensor(y))
            mine = float(answer(s.logp, s.entropy, s.p2, s.p2logp, torch.tensor(adv).double()))
            text = f"token {y}, A = {adv}: measured {measured:.7f}, yours {mine:.7f}"
            ensure(abs(mine - measured) < 1e-7, text)
