"""Worked by hand: a policy of three tokens, every number of five formulas.  python tests/exercises/worked.py

Plain arithmetic, nothing imported from the chapters; tests/test_exercises.py checks each number against them.
"""

from math import comb, exp, log

P = (0.6, 0.3, 0.1)  # the policy
A = (1.0, -1.0, 1.0)  # of a batch in which each token was sampled once
N, C, K = 4, 1, 2  # samples, right ones, tries


def numbers() -> dict[str, list[float]]:
    """Each quantity by its name, one number for each token, or one in all."""
    logp = [log(p) for p in P]
    h = -sum(p * x for p, x in zip(P, logp))
    p2, p2logp = sum(p * p for p in P), sum(p * p * x for p, x in zip(P, logp))
    u, cov = [x + h for x in logp], p2logp + h * p2
    t = [cov - p * x for p, x in zip(P, u)]
    out = {"p": list(P), "log p": logp, "u": u, "H": [h], "p2": [p2], "p2logp": [p2logp], "C": [cov], "T": t}
    steps = []
    for y in range(3):  # z_v + .1 (1[v=y] - p_v), and the entropy of what comes out
        q = [exp(x + 0.1 * ((v == y) - P[v])) for v, x in enumerate(logp)]
        q = [x / sum(q) for x in q]
        steps.append(-sum(x * log(x) for x in q) - h)
    out |= {"0.1 T": [0.1 * x for x in t], "measured": steps}
    out |= {"exact": [-x for x in t], "s_star": [p * x for p, x in zip(P, u)]}
    out["steer_theorem"] = [p * (1 - p) * x for p, x in zip(P, u)]
    out["steer_released"] = [(1 - p) * x for p, x in zip(P, u)]
    out |= {"opefo": [(1 - p) ** 2 * x for p, x in zip(P, u)], "cov": u}
    f = [a * x for a, x in zip(A, t)]
    up, down = sum(x for x in f if x > 0), -sum(x for x in f if x < 0)
    lam = (down - up) / (down + up)
    w = [1 + lam if x > 0 else 1 - lam for x in f]
    out |= {"A": list(A), "f": f, "P": [up], "Q": [down], "lambda": [lam], "w": w}
    out["w f"] = [x * y for x, y in zip(w, f)]
    mean_a, mean_l = sum(A) / 3, sum(logp) / 3
    out["c"] = [(a - mean_a) * (x - mean_l) for a, x in zip(A, logp)]
    out["pass@2"] = [1 - comb(N - C, K) / comb(N, K)]
    out["biased"] = [1 - (1 - C / N) ** K]
    return out


def text() -> str:
    """The block of README.md."""
    n = numbers()
    row = lambda name, digits=4: "  ".join(f"{x:>8.{digits}f}" for x in n[name])  # noqa: E731
    one = lambda name, digits=4: f"{n[name][0]:.{digits}f}"  # noqa: E731
    lines = [
        f"p                       {row('p', 1)}     three tokens, H = {one('H')}",
        f"log p                   {row('log p')}",
        f"u = log p + H           {row('u')}     E[u] = 0",
        "",
        "(2.2)  of entropy_math",
        f"p2 = Σp² = {one('p2')}, p2logp = Σp² log p = {one('p2logp')}, C = p2logp + H p2 = {one('C')}",
        f"T = C - p u             {row('T')}     E[T] = 0; a likely token lowers H, others raise it",
        f"η A T, η = .1, A = 1    {row('0.1 T')}     predicted change of H",
        f"step taken, H again     {row('measured')}     measured: the rest is of second order, (1.4)",
        "",
        "(3.2)  of entropy_math: -dH/η at A = 1 as the papers have it",
        *(
            f"{form:<24}{row(form)}"
            for form in ("exact", "s_star", "steer_theorem", "steer_released", "opefo")
        ),
        f"cov                     {row('cov')}     from s_star to cov all have the sign of u",
        "",
        "(3.14) of interventions, OPEFO: one batch, each token sampled once, with these advantages",
        f"A                       {row('A', 0)}",
        f"f = A T                 {row('f')}",
        f"P = {one('P')}, Q = {one('Q')}, λ = (Q - P)/(Q + P) = {one('lambda')}",
        f"w = 1 ± λ               {row('w')}",
        f"w f                     {row('w f')}     they add up to 0",
        "",
        "(3.7)  of interventions, Clip-Cov on the same batch: c = (A - 1/3)(log p - mean log p)",
        f"c                       {row('c')}     with lb = .5 (default 1) the first is dropped",
        "",
        f"(6.1)  of eval: {N} samples, {C} right: pass@{K} = 1 - C(3,2)/C(4,2) = {one('pass@2')};"
        f" 1 - (1 - 1/4)² = {one('biased')} is biased",
    ]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    print(text())
