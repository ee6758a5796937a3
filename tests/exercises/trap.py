"""A trap: where does an entropy bonus fail, where does balance?            python tests/exercises/trap.py

Two tokens: one of 16 routes, then one of 30 arms.  On every route arm 0 is right, so there are 16 right
answers; the routes begin equally likely, arm 0 at about 1 in 8.  Nothing has to be given up to be right: a
perfect policy has pass@1 of 1, 14.0 of the 16 routes among 32 draws on average, an entropy of log 16 = 2.8 at
the first token and 0 at the second.  Guess before you run it: which method gets closest?  How far may its
coefficient be off?
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from entropy_math import entropy, token_stats  # noqa: E402
from grpo import Tokens, batch_loss, plan_update  # noqa: E402
from interventions import build, parse  # noqa: E402

SPECS = ["grpo", "opefo", *(f"opefo:target_entropy={x}" for x in (1, 1.4, 1.8))]
SPECS += [f"entropy_bonus:alpha={x}" for x in (0.1, 0.3, 0.4, 0.5, 0.6, 0.7)]


def train(spec: str, seed: int, steps: int = 400, rate: float = 5.0) -> list[float]:
    """H of both tokens, pass@1, and how many right routes 32 draws find on average, all exact."""
    draw, (name, options) = torch.Generator().manual_seed(seed), parse(spec)
    z = torch.randn(
        17, 30, generator=draw, dtype=torch.float64
    )  # logits: row 0 of the routes, others of arms
    z[1:, 0] += 1.5
    z[0], z[0, 16:] = 0, -1e4
    z.requires_grad_()
    method, group, mask = build(name, **options), torch.zeros(64).long(), torch.ones(64, 2).bool()
    for _ in range(steps):
        p = z.detach().softmax(-1)
        route = p[:1].expand(64, -1).multinomial(1, generator=draw)
        ids = torch.cat([route, p[1 + route[:, 0]].multinomial(1, generator=draw)], 1)  # (64, 2)
        logits = torch.stack([z[0].expand(64, -1), z[1 + ids[:, 0]]], 1)
        right = (ids[:, 1] == 0).double()
        tokens = Tokens(ids, mask, reward=right, group=group, **vars(token_stats(logits, ids, 1.0, True)))
        plan = plan_update(tokens, method)
        (gradient,) = torch.autograd.grad(batch_loss(tokens, plan, method)[0], z)
        z.data -= rate * gradient
        method.after_step(plan)
    p, h = z.detach().softmax(-1), entropy(z.detach())
    found = p[0, :16] * p[1:17, 0]  # probability of each right answer
    return [float(x) for x in (h[0], p[0, :16] @ h[1:17], found.sum(), (1 - (1 - found) ** 32).sum())]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(
        "| method, mean of 3 seeds | H, token 1 | H, token 2 | pass@1 | right routes in 32 draws |\n|---|"
        + "---|" * 4
    )
    for spec, steps in [*((spec, 400) for spec in SPECS), ("entropy_bonus:alpha=0.5", 2000), ("opefo", 2000)]:
        seeds = torch.tensor([train(spec, seed, steps) for seed in range(3)])
        row = " | ".join(f"{x:.2f}" for x in seeds.mean(0).tolist())
        each = ", ".join(f"{x:.1f}" for x in seeds[:, 3].tolist())
        print(f"| `{spec}`{', 2,000 steps' * (steps > 400)} | {row} |   routes by seed: {each}", flush=True)
