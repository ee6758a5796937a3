"""How far each theory of entropy carries: the honesty table, tabular policy and embedded transformer, SGD and
AdamW.

    python results/honesty.py > results/honesty.txt            about five minutes on one thread

Predicted against measured change of the mean entropy of a batch (512 responses of plain GRPO, strictly
on-policy).

    level       which update is measured
    own state   one token's update alone, and only the entropy at that token's own state
    token       one token's update alone, mean entropy of the whole batch
    half        the updates of a random half of the tokens
    step        the step really taken, momentum and gradient clipping included

The first three are the batch's own share of the step: lr (1 - β₁) P times its gradient, without the
momentum's carry-over and without gradient clipping, P the optimizer's own preconditioner, in float64.  SGD
has no momentum, and a rate at which a step is still mostly first-order: it moves along the directions of high
curvature. Predictors: the tabular exact score and the published proxies (entropy_math, 3.2), the network flow
(5.3), and for real steps the directional derivative <grad H, step> (5.1).
"""

import copy
import statistics
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import interventions  # noqa: E402
from entropy_math import (  # noqa: E402
    FORMS,
    adam_preconditioner,
    agreement,
    entropy,
    entropy_change,
    first_order_change,
    print_honesty,
    random_policies,
    second_order_change,
    tabular_honesty,
)
from grpo import masked_mean  # noqa: E402
from rollout import WarmStart, chain_task, warm_policy  # noqa: E402
from train import Ledger, Run, Settings, accumulate_gradient, scored  # noqa: E402

STEPS, PROBES = 60, (5, 25, 45)  # real steps; those at which single tokens and halves are probed
TOKENS, HALVES = 60, 20  # of each probe
RATE = {"sgd": 0.01, "adamw": 3e-4}
SHARE = {"sgd": 1.0, "adamw": 1 - 0.9}  # of a batch's gradient that acts in its own step, 1 - β₁


def transformer_honesty(optimizer: str) -> dict:
    """level -> predictor -> Agreement for the embedded transformer in its first steps of GRPO."""
    model, tokenizer = warm_policy(WarmStart(seed=0))
    settings = Settings(method="grpo", lr=RATE[optimizer])
    run = Run(settings, interventions.build("grpo"), Path("."), chain_task(), model, tokenizer)
    if optimizer == "sgd":
        run.optimizer = torch.optim.SGD(model.parameters(), settings.lr)
    levels: dict[str, dict[str, list[float]]] = {k: {} for k in ("own state", "token", "half", "step")}
    generator = torch.Generator().manual_seed(0)
    norms = []
    for run.step in range(STEPS):
        batch = run.rollout()
        ledger = Ledger.open(model, batch, settings)
        before = copy.deepcopy(model)
        with torch.no_grad():
            tk = scored(model, batch, settings.temperature)
        run.optimizer.zero_grad(set_to_none=True)
        gradient = accumulate_gradient(model, batch, run.method, settings)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)))
        run.optimizer.step()
        network = ledger.network_flow(model, run.optimizer, gradient.force)
        flows = {form: entropy_change(tk.stats, gradient.force, form) for form in FORMS}
        flows["network flow"] = network
        rate = settings.lr * SHARE[optimizer]
        flows = {k: torch.where(tk.mask, v, 0) * rate for k, v in flows.items()}
        closed = ledger.close(model)
        row = {k: float(v.sum()) for k, v in flows.items()}
        row["<grad H, step>"] = closed["dH_predicted"]
        add(levels["step"], row | {"measured": closed["dH_measured"]})
        if run.step in PROBES:
            probe(before, run, batch, rate, gradient.force, flows, levels, generator)
    print(
        f"transformer, {optimizer}: lr {settings.lr:g}, median gradient norm {statistics.median(norms):.2f}"
    )
    return {
        level: {k: agreement(v, c["measured"]) for k, v in c.items() if k != "measured"}
        for level, c in levels.items()
    }


def probe(before, run: Run, batch, rate, force, flows, levels, generator) -> None:
    """Single tokens and random halves: steps rate · P Σ F_t ∇log π(y_t) from `before`, in float64."""
    names = dict(run.model.named_parameters())
    P = adam_preconditioner(run.optimizer)
    double = copy.deepcopy(before).double()
    start = {n: p.detach().clone() for n, p in double.named_parameters()}
    mask, rows = batch.tokens.mask, batch.tokens.mask.nonzero()
    with torch.no_grad():
        h0 = scored(double, batch, 1.0).entropy

    def step(on: torch.Tensor, part: slice) -> torch.Tensor:
        """(B, T) entropies after the update of the tokens in `on`; `part`: the rows that hold them."""
        logp = scored(double, batch.rows(part), 1.0).logp
        loss = torch.where(on[part], force[part].double() * logp, 0).sum()
        grads = torch.autograd.grad(loss, list(double.parameters()))
        with torch.no_grad():
            for (n, p), g in zip(double.named_parameters(), grads):
                p += rate * P[names[n]].double() * g
            after = scored(double, batch, 1.0).entropy
            for n, p in double.named_parameters():
                p.copy_(start[n])
        return after

    for i in torch.randperm(len(rows), generator=generator)[:TOKENS]:
        b, t = rows[i].tolist()
        on = torch.zeros_like(mask)
        on[b, t] = True
        after = step(on, slice(b, b + 1))
        row = {k: float(v[b, t]) for k, v in flows.items()}
        add(levels["token"], row | {"measured": float(masked_mean(after, mask) - masked_mean(h0, mask))})
        own = {k: v for k, v in row.items() if k != "network flow"}
        add(levels["own state"], own | {"measured": float(after[b, t] - h0[b, t])})
    for _ in range(HALVES):
        on = mask & (torch.rand(mask.shape, generator=generator) < 0.5)
        after = step(on, slice(None))
        row = {k: float(torch.where(on, v, 0).sum()) for k, v in flows.items()}
        add(levels["half"], row | {"measured": float(masked_mean(after, mask) - masked_mean(h0, mask))})


def second_order_facts() -> None:
    """On random softmaxes: the sign of the mean second-order term, and the first order at a logit step of
    size 1."""
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
        error = float((first - true).square().mean().sqrt() / true.square().mean().sqrt())
        r = agreement(first, true).pearson
        print(f"  {family:22s} {statistics.mean(negative):5.0%}   r {r:.3f}   error {error:.2f}")


def network_facts() -> None:
    """On the embedded transformer after 25 steps: how alike two batches' ∇H are, and the finite difference
    (5.4)."""
    model, tokenizer = warm_policy(WarmStart(seed=0))
    run = Run(Settings(), interventions.build("grpo"), Path("."), chain_task(), model, tokenizer)
    for _ in range(25):
        run.train_step()
    batches = [run.rollout(), run.rollout()]
    ledgers = [Ledger.open(model, b, run.settings) for b in batches]
    a, b = (torch.cat([g.flatten() for g in x.grads]).double() for x in ledgers)
    print(
        f"\ncosine of the entropy gradients of two fresh batches: {float(a @ b / (a.norm() * b.norm())):.2f}"
    )
    force = torch.ones_like(batches[0].tokens.mask, dtype=torch.float32)
    exact = ledgers[0].network_flow(model, run.optimizer, force)
    m = batches[0].tokens.mask
    for step in (1e-5, 1e-4, 1e-3, 1e-2):
        near = ledgers[0].network_flow(model, run.optimizer, force, mode="difference", rel_step=step)
        error = float((near - exact)[m].norm() / exact[m].norm())
        print(f"central difference, float32, relative step {step:g}: relative error of the flow {error:.1e}")


def add(columns: dict[str, list[float]], row: dict[str, float]) -> None:
    for name, value in row.items():
        columns.setdefault(name, []).append(value)


def main() -> None:
    torch.set_num_threads(1)
    table = {f"table, {name}": tabular_honesty(name) for name in ("sgd", "adamw")}
    table |= {f"transformer, {name}": transformer_honesty(name) for name in ("sgd", "adamw")}
    print_honesty(table)
    second_order_facts()
    network_facts()


if __name__ == "__main__":
    main()
