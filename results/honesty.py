"""How far each theory of entropy carries: the honesty table, for a table of softmaxes and for the embedded
transformer, under SGD and AdamW.

    python results/honesty.py > results/honesty.txt            about five minutes on one thread

Predicted against measured change of the mean entropy of a batch (512 responses of plain GRPO, strictly
on-policy).

    level       which update is measured
    own state   one token's update alone, and only the entropy at that token's own state
    token       one token's update alone, mean entropy of the whole batch
    half        the updates of a random half of the tokens
    step        the step really taken, momentum and gradient clipping included

The first three are the batch's own share of the step: lr (1 - β₁) P times its gradient, without the
momentum's carry-over and without gradient clipping, P the optimizer's own preconditioner, in float64. SGD has
no momentum, and a rate at which a step is still mostly first-order: it moves along the directions of high
curvature. Predictors: the exact tabular score and the published proxies (entropy_math, 3.2), the network flow
(5.3), and for real steps the directional derivative <grad H, step> (5.1).
"""

import copy
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])

from bench_step import new_run, update  # noqa: E402

from entropy_math import (  # noqa: E402
    FORMS,
    Agreement,
    adam_preconditioner,
    agreement,
    entropy,
    entropy_change,
    entropy_directional_change,
    first_order_change,
    network_flow,
    neutral_step,
    random_policies,
    second_order_change,
    token_stats,
)
from grpo import Policy, Tokens, masked_mean  # noqa: E402
from train import Ledger, Run, Settings, draw_responses, train  # noqa: E402

STEPS, PROBES = 60, (5, 25, 45)  # real steps; those at which single tokens and halves are probed
TOKENS, HALVES = 60, 20  # of each probe
RATE = {"sgd": 0.01, "adamw": 3e-4}
SHARE = {"sgd": 1.0, "adamw": 1 - 0.9}  # of a batch's gradient that acts in its own step, 1 - β₁
Cases = dict[str, list[dict[str, Any]]]
"""level -> predictor or "measured" -> number or (n,), once for every row of cases"""

# ------------------------------------------------------------------------------------------------------------
# 1. The table
# ------------------------------------------------------------------------------------------------------------


def against_measured(cases: Cases) -> dict[str, dict[str, Agreement]]:
    """level -> predictor -> agreement with what was measured."""
    found = {}
    for level, rows in cases.items():
        columns = {name: np.concatenate([np.atleast_1d(row[name]) for row in rows]) for name in rows[0]}
        measured = columns.pop("measured")
        found[level] = {name: agreement(predicted, measured) for name, predicted in columns.items()}
    return found


def print_honesty(tables: dict[str, dict[str, dict[str, Agreement]]]) -> None:
    """setting -> level -> predictor -> agreement: a block per setting, a row per predictor."""
    print("Predicted against measured change of the mean entropy: correlation / slope / sign agreement.")
    print("Only the network flow and <grad H, step> know P; under Adam the other slopes have another unit.")
    for setting, levels in tables.items():
        cells = {
            level: {name: f"{a.pearson:.3f} / {a.slope:.3g} / {a.sign:.0%}" for name, a in found.items()}
            for level, found in levels.items()
        }
        print(f"\n{setting}\n{pd.DataFrame(cells).to_string(na_rep='-')}")


def tabular_honesty(optimizer: str, steps: int = 80, seed: int = 0) -> dict[str, dict[str, Agreement]]:
    """Agreement at the levels token, half and step while a table of softmaxes trains.

    64 states, V = 32, 0/1 rewards; a step draws a group of 8 at each state, normalised as in GRPO.
    `optimizer`: "sgd" or "adamw" (betas .9 and .95).
    """
    generator = torch.Generator().manual_seed(seed)
    table = (1.5 * torch.randn(64, 32, generator=generator, dtype=torch.float64)).requires_grad_()
    correct = torch.rand(64, 32, generator=generator) < 0.25
    state = torch.arange(64).repeat_interleave(8)  # (512,)
    rate = {"sgd": 20.0, "adamw": 0.02}[optimizer]
    # Advantages cancel, so an unsampled action's gradient is rounding, which Adam with a tiny ε amplifies.
    adam = {"betas": (0.9, 0.95), "weight_decay": 0.0, "eps": 1e-4}
    opt = torch.optim.SGD([table], rate) if optimizer == "sgd" else torch.optim.AdamW([table], rate, **adam)
    cases: Cases = {"token": [], "half": [], "step": []}
    for step in range(steps):
        ids = torch.multinomial(table.detach().softmax(-1), 8, True, generator=generator).view(-1)  # (512,)
        reward = correct[state, ids].double().view(64, 8)
        adv = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)).view(-1)
        grad_h = torch.autograd.grad(entropy(table).mean(), table)[0]
        stats, old = token_stats(table[state], ids), table.detach().clone()
        opt.zero_grad()
        (-(adv * stats.logp).mean()).backward()
        opt.step()
        new, scale, P = table.detach(), rate / len(ids), adam_preconditioner(opt)
        flows = {form: entropy_change(stats, adv, form) / 64 for form in FORMS}  # 64 states
        logp_fn = lambda q: token_stats(q["z"][state], ids).logp  # noqa: E731, B023
        flows["network flow"] = network_flow(logp_fn, {"z": old}, adv, {"z": grad_h}, {old: P[table]})
        row = {name: scale * flow.sum() for name, flow in flows.items()}
        row["<grad H, step>"] = entropy_directional_change([grad_h], [new - old])
        cases["step"].append(row | {"measured": (entropy(new) - entropy(old)).mean()})
        if step % 16 == 0:
            slope = nn.functional.one_hot(ids, 32) - old.softmax(-1)[state]  # ∇log π of its row
            moves = scale * P[table][state] * adv.unsqueeze(1) * slope  # (512, 32), (5.2) token by token
            row = {name: scale * flow for name, flow in flows.items()}
            change = (entropy(old[state] + moves) - entropy(old[state])) / 64
            cases["token"].append(row | {"measured": change})
            keep = (torch.rand(20, 512, generator=generator) < 0.5).double()
            row = {name: scale * keep @ flow for name, flow in flows.items()}
            halves = [torch.zeros_like(old).index_add(0, state, k.unsqueeze(1) * moves) + old for k in keep]
            change = torch.stack([(entropy(z) - entropy(old)).mean() for z in halves])
            cases["half"].append(row | {"measured": change})
    return against_measured(cases)


# ------------------------------------------------------------------------------------------------------------
# 2. The embedded transformer. bench_step.py knows how train.py runs a step
# ------------------------------------------------------------------------------------------------------------


def begin(optimizer: str, lr: float = Settings.lr, folder: str = ".") -> Run:
    """Plain GRPO on the embedded task."""
    run = new_run(f"grpo:lr={lr}", Path(folder))
    if optimizer == "sgd":
        run.optimizer = torch.optim.SGD(run.policy.parameters(), lr)
    return run


def transformer_honesty(optimizer: str) -> dict[str, dict[str, Agreement]]:
    """Agreement at all four levels in the first steps of GRPO."""
    run = begin(optimizer, RATE[optimizer])
    cases: Cases = {"own state": [], "token": [], "half": [], "step": []}
    generator = torch.Generator().manual_seed(0)
    norms = []
    for run.step in range(STEPS):
        batch, _ = draw_responses(run)
        ledger = Ledger.open(run, batch)
        before = copy.deepcopy(run.policy)
        with torch.no_grad():
            tk = replace(batch, **run.policy(batch))
        force = update(run, batch).force
        norms.append(float(nn.utils.clip_grad_norm_(run.policy.parameters(), run.settings.grad_clip)))
        run.optimizer.step()
        flows = {form: entropy_change(tk.stats, force, form) for form in FORMS}
        flows["network flow"] = ledger.network_flow(force)
        rate = RATE[optimizer] * SHARE[optimizer]
        flows = {k: torch.where(tk.mask, v, 0) * rate for k, v in flows.items()}
        closed = ledger.close()
        row = {k: float(v.sum()) for k, v in flows.items()} | {"<grad H, step>": closed["dH_predicted"]}
        cases["step"].append(row | {"measured": closed["dH_measured"]})
        if run.step in PROBES:
            probe(before, run, batch, tk.mask, rate * force.double(), flows, cases, generator)
    print(f"transformer, {optimizer}: lr {RATE[optimizer]:g}, median gradient norm {np.median(norms):.2f}")
    return against_measured(cases)


def probe(
    before: Policy, run: Run, batch: Tokens, mask: Tensor, force: Tensor, flows, cases: Cases, generator
):
    """Single tokens and random halves: steps P Σ F_t ∇log π(y_t) from `before`, in float64."""
    P = adam_preconditioner(run.optimizer)
    scale = [P[p].double() for p in run.policy.parameters()]
    double = copy.deepcopy(before).double()
    params = list(double.parameters())
    start = [p.detach().clone() for p in params]
    with torch.no_grad():
        h0 = double(batch)["entropy"]

    def change(on: Tensor, rows: slice) -> Tensor:
        """(B, T) change of H by the update of the tokens in `on`, which lie in `rows`."""
        logp = double(batch.rows(rows))["logp"]
        grads = torch.autograd.grad(torch.where(on[rows], force[rows] * logp, 0).sum(), params)
        with torch.no_grad():
            for p, s, g in zip(params, scale, grads):
                p += s * g
            after = double(batch)["entropy"]
            for p, old in zip(params, start):
                p.copy_(old)
        return after - h0

    where = mask.nonzero()
    for b, t in where[torch.randperm(len(where), generator=generator)[:TOKENS]].tolist():
        on = torch.zeros_like(mask)
        on[b, t] = True
        moved = change(on, slice(b, b + 1))
        row = {k: float(v[b, t]) for k, v in flows.items()}
        cases["token"].append(row | {"measured": float(masked_mean(moved, mask))})
        own = {k: v for k, v in row.items() if k != "network flow"}
        cases["own state"].append(own | {"measured": float(moved[b, t])})
    for _ in range(HALVES):
        on = mask & (torch.rand(mask.shape, generator=generator) < 0.5)
        row = {k: float(torch.where(on, v, 0).sum()) for k, v in flows.items()}
        cases["half"].append(row | {"measured": float(masked_mean(change(on, slice(None)), mask))})


# ------------------------------------------------------------------------------------------------------------
# 3. Facts that entropy_math.py states
# ------------------------------------------------------------------------------------------------------------


def second_order_facts() -> None:
    """On random softmaxes: the sign of the mean second-order term; the first order at a logit step of 1."""
    print("\nrandom softmaxes, d = A (e_y - p), A = +-1: share with a negative mean second-order term (1.4);")
    print("first order against the true change at a step of size 1: correlation, RMS error over RMS truth")
    generator = torch.Generator().manual_seed(0)
    for family in ("flat, V=50", "Gauss, V=50", "Gauss, V=1000", "peaked, V=1000", "very peaked, V=1000"):
        first, true, negative = [], [], []
        for z in random_policies(family, generator):
            p = z.softmax(-1)
            y = torch.multinomial(p, 1, generator=generator)
            adv = torch.randint(2, (len(z), 1), generator=generator).double() * 2 - 1
            d = adv * (-p).scatter_add(1, y, torch.ones_like(y, dtype=p.dtype))
            first.append(first_order_change(z, d))
            true.append(entropy(z + d) - entropy(z))
            for row, q in zip(z[:40], p[:40]):
                moves = torch.eye(len(q), dtype=q.dtype) - q  # (V, V): every token's direction
                negative.append(float((q * second_order_change(row.expand(len(q), -1), moves)).sum() < 0))
        first, true = torch.cat(first), torch.cat(true)
        error, r = float((first - true).norm() / true.norm()), agreement(first, true).pearson
        print(f"  {family:22s} {statistics.mean(negative):5.0%}   r {r:.3f}   error {error:.2f}")


def network_facts() -> None:
    """After 25 steps of the transformer: how alike two batches' ∇H are; the finite difference (5.4)."""
    with tempfile.TemporaryDirectory() as folder:
        run = begin("adamw", folder=folder)
        for _ in zip(range(25), train(run)):
            pass
    batches = [draw_responses(run)[0] for _ in range(2)]
    ledgers = [Ledger.open(run, b) for b in batches]
    a, b = (torch.cat([g.flatten() for g in x.grads]).double() for x in ledgers)
    cosine = float(nn.functional.cosine_similarity(a, b, dim=0))
    print(f"\ncosine of the entropy gradients of two fresh batches: {cosine:.2f}")
    mask = batches[0].mask
    exact = ledgers[0].network_flow(mask.float())[mask]
    for step in (1e-5, 1e-4, 1e-3, 1e-2):
        how = {"mode": "difference", "rel_step": step}
        near = ledgers[0].network_flow(mask.float(), **how)[mask]
        error = float((near - exact).norm() / exact.norm())
        print(f"central difference, float32, relative step {step:g}: relative error of the flow {error:.1e}")
    neutral_facts(run)


def neutral_facts(run: Run, steps: int = 16) -> None:
    """What a step of GRPO, and the entropy-neutral one, do to the entropy of a fresh batch, (6.6)."""
    rows = []
    for _ in range(steps):
        batch, fresh = (draw_responses(run)[0] for _ in range(2))
        ledger, other = Ledger.open(run, batch), Ledger.open(run, fresh)
        update(run, batch)
        nn.utils.clip_grad_norm_(run.policy.parameters(), run.settings.grad_clip)
        run.optimizer.step()
        run.step += 1
        P = adam_preconditioner(run.optimizer)
        moved = [(p - old).detach() for p, old in zip(run.policy.parameters(), ledger.params)]
        bent = [P[p] * g for p, g in zip(run.policy.parameters(), ledger.grads)]
        back = [P[p] * g for p, g in zip(run.policy.parameters(), other.grads)]
        dot = entropy_directional_change
        own, seen, size = dot(ledger.grads, moved), dot(other.grads, moved), dot(ledger.grads, bent)
        both = dot(other.grads, bent)
        c = neutral_step(ledger.grads, moved, [P[p] for p in run.policy.parameters()])
        cosine = both / (size * dot(other.grads, back)) ** 0.5
        rows.append((1e3 * own, 1e3 * seen, 1e3 * (seen + c * both), cosine))
    own, seen, left, cosine = np.mean(rows, 0)
    print(f"cosine under Adam's P of the entropy gradients of two fresh batches: {cosine:.2f}")
    print(f"first-order change of entropy in a step of GRPO, thousandths of a nat, mean of {steps} after 25:")
    print(f"  of its own batch {own:+.2f}, of a fresh one {seen:+.2f}; neutral, of a fresh one {left:+.2f}")


def main() -> None:
    torch.set_num_threads(1)
    tables = {f"table, {name}": tabular_honesty(name) for name in RATE}
    tables |= {f"transformer, {name}": transformer_honesty(name) for name in RATE}
    print_honesty(tables)
    second_order_facts()
    network_facts()


if __name__ == "__main__":
    main()
