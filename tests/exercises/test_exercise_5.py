"""Exercise 5. pass@k from n samples, without bias.                    pytest tests/exercises -k 5

A policy solves a problem with unknown probability q. pass@k asks how likely at least one of k tries is right:
1 - (1 - q)^k. We drew n >= k samples and c of them are right. What is the best estimate?

1. Put q = c/n into the formula? A power of an average is not the average of the power: with n = k = 2 the
   result is too low by q(1 - q)/2 on average. Show it by going through c = 0, 1, 2.
2. Instead ask for k of the n samples, drawn without replacement. Any k of them are k independent tries of the
   policy, so the share of the C(n, k) subsets that hold a right one is unbiased. Count the ones that do not:
   all k come from the n - c wrong ones.                                             eval (6.1), 2107.03374
3. For n = 1000 a float cannot hold the binomials. A product of ratios can; Python's integers can too.
"""

import itertools
import math

from checking import Exercise, Mistake, ensure

import eval as chapter6


def pass_at_k(n: int, c: int, k: int) -> float:
    """c of n samples are right, 1 <= k <= n: the unbiased estimate that one of k samples is right."""
    return ...  # replace the three dots


# ---- the checks; what follows gives the answer away --------------------------------------------------------


def log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def float_factorials(n: int, c: int, k: int) -> float:
    def binomial(a: int, b: int) -> float:
        return math.gamma(a + 1.0) / (math.gamma(b + 1.0) * math.gamma(a - b + 1.0))

    return 1 - binomial(n - c, k) / binomial(n, k) if n - c >= k else 1.0


MISTAKES = {
    "biased": Mistake(
        lambda n, c, k: 1 - (1 - c / n) ** k,
        "this is 1 - (1 - c/n)^k, the plug-in estimate, which is too low on average: it draws the k samples "
        "*with* replacement, so that one wrong sample can be drawn twice. With n = k and c >= 1 it should "
        "be exactly 1.",
    ),
    "pass@one": Mistake(
        lambda n, c, k: c / n,
        "c/n is pass@1. It does not depend on k, but more tries can only help.",
    ),
    "linear": Mistake(
        lambda n, c, k: min(1.0, k * c / n),
        "k · c/n counts a subset with two right samples twice. It is an upper bound, not the probability.",
    ),
    "all k right": Mistake(
        lambda n, c, k: math.comb(c, k) / math.comb(n, k),
        "C(c, k)/C(n, k) is the probability that *all* k samples are right. Wanted is at least one: the "
        "complement of none.",
    ),
    "none right": Mistake(
        lambda n, c, k: math.comb(n - c, k) / math.comb(n, k),
        "C(n-c, k)/C(n, k) is the probability that none of the k is right. pass@k is 1 minus that.",
    ),
    "some wrong": Mistake(
        lambda n, c, k: 1 - math.comb(c, k) / math.comb(n, k),
        "1 - C(c, k)/C(n, k) is the probability that at least one of the k is *wrong*. Count the subsets "
        "without a right one: all k come from the n - c wrong samples.",
    ),
    "exactly one": Mistake(
        lambda n, c, k: c * math.comb(n - c, k - 1) / math.comb(n, k),
        "this is the probability of *exactly* one right sample among k. At least one: the complement of "
        "none.",
    ),
    "any": Mistake(
        lambda n, c, k: float(c > 0),
        "1 as soon as any of the n is right is pass@n. With k < n one can draw k wrong ones.",
    ),
    "off by one": Mistake(
        (
            lambda n, c, k: 1 - math.prod(1 - k / i for i in range(n - c + 1, n)),
            lambda n, c, k: 1 - math.prod(1 - k / i for i in range(n - c, n)),
            lambda n, c, k: 1 - math.prod(1 - k / i for i in range(n - c, n + 1)),
            lambda n, c, k: 1 - math.prod((n - c - j) / (n - j) for j in range(k - 1)),
            lambda n, c, k: 1 - math.prod((n - c - j) / (n - j) for j in range(k + 1)),
        ),
        "the product has one factor too few or too many. Over i = n-c+1, ..., n it has c factors, over j = "
        "0, ..., k-1 it has k of them, (n-c-j)/(n-j); and `range` leaves out its end.",
    ),
    "too few wrong": Mistake(
        lambda n, c, k: -math.expm1(log_binomial(n - c, k) - log_binomial(n, k)),
        "with fewer than k wrong samples, n - c < k, no subset is all wrong: C(n-c, k) = 0 and pass@k = 1. "
        "Factorials and lgamma do not know that; it needs a case of its own.",
    ),
    "overflow": Mistake(
        float_factorials,
        "a factorial or binomial has become too large for a float. Multiply the ratios (1 - k/i) instead, "
        "each of them harmless, or stay with integers (math.comb) until the division.",
    ),
}
CASES = {f"{n} samples, {c} right, k = {k}": (n, c, k) for n, c, k in [
    (8, 2, 3), (8, 5, 2), (9, 3, 1), (5, 1, 5), (32, 1, 16), (6, 0, 4), (4, 4, 2), (8, 6, 4), (1000, 3, 500)
]}  # fmt: skip
EXERCISE = Exercise(5, "pass_at_k", "eval.py, (6.1)", chapter6.pass_at_k, CASES, MISTAKES)


def test_pass_at_k():
    EXERCISE.check(pass_at_k)


def test_against_all_subsets():
    """Go through every subset of k samples, and look."""
    answer = EXERCISE.filled(pass_at_k)
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            share = sum(map(any, subsets)) / len(subsets)
            mine = answer(n, c, k)
            text = f"n = {n}, c = {c}, k = {k}: {share:.6f} of all subsets hold a right one, yours {mine}"
            ensure(abs(mine - share) < 1e-12, text)
    two = 1 - 200 * 199 / (400 * 399)  # one minus both of two right ones among the other 200
    ensure(
        abs(answer(400, 2, 200) - two) < 1e-12, f"n = 400, c = 2, k = 200: {two}, yours {answer(400, 2, 200)}"
    )
