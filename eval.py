"""Chapter 6. Evaluation: what a policy can do at the first try, and what it can still do at all.

Claim. pass@1 alone cannot see a collapse.  A policy that puts all its probability on one answer per problem
and one that spreads it over many may solve equally often at the first try; only the second finds new answers
when it is asked again, and only the second has anything left to reinforce.

    pass_at_k        the unbiased estimator                                                              (6.1)
    distinct right   how many different right answers a policy gives to one problem
    evaluate         both, and the entropy, on problems that training never saw

Run `python eval.py runs/opefo-s0` to evaluate a finished run's policy again.

Sampling is at temperature 1 without top-p or top-k unless said otherwise, since truncation hides a collapse.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rollout import Engine, Problem, Rollout, Task, TorchEngine, answer, chain_task

# ------------------------------------------------------------------------------------------------------------
# 1. What a policy can do


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold at least one of the c right ones.

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1}^{n} (1 - k / i)       2107.03374 eq. 1 (6.1)

    Unbiased for any k <= n; 1 - (1 - c/n)^k is not.  pass@1 = c / n.
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k={k} needs 1 <= k <= n={n}: draw at least k samples a problem")
    if not 0 <= c <= n:
        raise ValueError(f"c={c} right of n={n} samples: c must lie in 0..n")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))  # (6.1)


def distinct_correct(task: Task, texts: Sequence[str], correct: Sequence[bool]) -> int:
    """Number of different right answers among the samples of one problem."""
    return len({task.signature(t) for t, ok in zip(texts, correct) if ok})


@torch.no_grad()
def evaluate(
    engine: Engine,
    task: Task,
    k: int = 32,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    rows: int = 1024,
) -> dict[str, Any]:
    """k samples for each held-out problem.  The generator is this call's own, so that evaluating changes no
    run.

    Returns pass@1 and pass@k, distinct_correct (right answers that differ, per problem), eval_entropy (token
    mean, nats), eval_length (tokens), the same for the hard problems as hard_*, the k, and a few samples.
    """
    generator = torch.Generator(engine.device).manual_seed(seed)
    result: dict[str, Any] = {"k": k}
    for prefix, problems in (("", task.test), ("hard_", task.hard)):
        parts = []
        step = max(1, rows // k)
        for i in range(0, len(problems), step):
            part = problems[i : i + step]
            parts.append((part, answer(engine, task, part, k, temperature, top_p, generator, entropy=True)))
        result |= {prefix + name: value for name, value in _summary(task, parts, k).items()}
        if not prefix:
            result["samples"] = _samples(*parts[0], k)
    return result


def _summary(task: Task, parts: list[tuple[Sequence[Problem], Rollout]], k: int) -> dict[str, float]:
    """Means over problems of the metrics of `evaluate`."""
    solved, distinct, nats, tokens, rows = [], [], 0.0, 0, 0
    for _, out in parts:
        right = out.correct.view(-1, k).tolist()
        solved += [sum(r) for r in right]
        distinct += [distinct_correct(task, out.texts[i * k : (i + 1) * k], r) for i, r in enumerate(right)]
        nats += float(torch.where(out.mask, out.entropy, 0).sum(dtype=torch.float64))
        tokens, rows = tokens + int(out.mask.sum()), rows + len(out.ids)
    n = len(solved)
    return {
        "pass@1": sum(pass_at_k(k, c, 1) for c in solved) / n,
        "pass@k": sum(pass_at_k(k, c, k) for c in solved) / n,
        "distinct_correct": sum(distinct) / n,
        "eval_entropy": nats / tokens,
        "eval_length": tokens / rows,
    }


def _samples(problems: Sequence[Problem], out: Rollout, k: int, each: int = 4) -> list[dict[str, Any]]:
    """The first responses to the first two problems, for reading."""
    picks = [i * k + j for i in range(min(2, len(problems))) for j in range(min(each, k))]
    return [
        {
            "prompt": problems[i // k].prompt,
            "answer": problems[i // k].answer,
            "response": out.texts[i],
            "correct": bool(out.correct[i]),
            "truncated": bool(out.truncated[i]),
        }
        for i in picks
    ]


# ------------------------------------------------------------------------------------------------------------
# 2. The picture and the table of runs

# Colours differ in lightness and every curve has its own dash, so that the picture survives a grey printer.
STYLES = [
    ("#000000", "-"), ("#d55e00", "--"), ("#56b4e9", "-."), ("#009e73", ":"),
    ("#cc79a7", (0, (5, 1, 1, 1, 1, 1))),
    ("#7f6000", (0, (8, 2))), ("#0000a0", (0, (2, 1))), ("#e69f00", (0, (1, 2))),
]  # fmt: skip


def style(i: int) -> dict[str, Any]:
    color, dash = STYLES[i % len(STYLES)]
    return {"color": color, "linestyle": dash}


def series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have the key, and a finite number there."""
    pairs = [(r["step"], r[key]) for r in rows if r.get(key) is not None and math.isfinite(r[key])]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def smooth(values: list[float], keep: float = 0.8) -> list[float]:
    """Exponential moving average for the eye; the files hold the raw numbers."""
    out: list[float] = []
    for v in values:
        out.append(v if not out else keep * out[-1] + (1 - keep) * v)
    return out


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """entropy.png: entropy, pass@1 and pass@k, the plane of both, and one panel of flows a method."""
    from matplotlib.figure import Figure

    columns = min(4, len(runs))
    lines = math.ceil(len(runs) / columns)
    fig = Figure(figsize=(4.6 * max(3, columns), 4.2 + 2.9 * lines), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=[4.2, 2.9 * lines])
    entropy, progress, plane = top.subplots(1, 3)
    for i, (label, rows) in enumerate(runs.items()):
        look = style(i)
        steps, values = series(rows, "entropy")
        entropy.plot(steps, values, alpha=0.2, linewidth=0.8, color=look["color"])
        entropy.plot(steps, smooth(values), label=label, **look)
        for key, marker in (("pass@1", "o"), ("pass@k", "^")):
            progress.plot(*series(rows, key), marker=marker, markersize=3.5, **look)
        x, y = series(rows, "pass@1")[1], series(rows, "pass@k")[1]
        plane.plot(x, y, marker="o", markersize=3, **look)
        plane.plot(x[-1:], y[-1:], marker="s", markersize=8, color=look["color"])
    k = next((r["k"] for rows in runs.values() for r in rows if "k" in r), "k")
    entropy.set(title="Entropy on the training batch", xlabel="step", ylabel="nats per token")
    entropy.set_ylim(bottom=0)
    entropy.legend(fontsize=8)
    progress.set(
        title=f"Held-out: pass@1 (circles), pass@{k} (triangles)", xlabel="step", ylabel="share of problems"
    )
    progress.set_ylim(0, 1.02)
    plane.set(title="First try against any try (square: end)", xlabel="pass@1", ylabel=f"pass@{k}")
    for ax in (entropy, progress, plane):
        ax.grid(alpha=0.25)
    _draw_flows(bottom.subplots(lines, columns, squeeze=False), runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.png")
    fig.savefig(part, dpi=110)
    part.replace(path)


def _draw_flows(axes: Any, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Per method: the tabular flow up and down as areas (left scale), the measured change as dots (right
    scale). All panels share both scales, so that methods can be compared by eye."""

    def largest(*keys: str) -> float:
        sizes = [
            abs(v) for rows in runs.values() for k in keys for v in series(rows, k)[1] if math.isfinite(v)
        ]
        return 1.1 * max(sizes, default=1.0) or 1.0

    top, change_top = largest("flow_up", "flow_down"), largest("dH_measured")
    flat = list(axes.flatten())
    for ax in flat[len(runs) :]:
        ax.set_axis_off()
    for ax, (label, rows) in zip(flat, runs.items()):
        both = [r for r in rows if series([r], "flow_up")[0] and series([r], "flow_down")[0]]
        steps, up = series(both, "flow_up")
        up, down = smooth(up), smooth(series(both, "flow_down")[1])
        ax.fill_between(steps, 0, up, color="#bbbbbb", label="up")
        ax.fill_between(steps, 0, [-v for v in down], color="#666666", label="down")
        ax.plot(steps, [a - b for a, b in zip(up, down)], color="black", linewidth=1.2, label="net")
        ax.set(
            title=f"{label}: entropy flow",
            xlabel="step",
            ylabel="flow, nats per unit learning rate",
            ylim=(-top, top),
        )
        ax.legend(fontsize=7, loc="upper right", ncols=3)
        right = ax.twinx()
        right.plot(*series(rows, "dH_measured"), ".", color="#d55e00", markersize=5)
        right.set_ylim(-change_top, change_top)
        right.set_ylabel("measured change, nats (dots)", color="#d55e00", fontsize=8)


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Start and end of what matters, one line a method."""
    k = next((r["k"] for rows in runs.values() for r in rows if "k" in r), "k")
    head = [
        "method",
        "entropy",
        "pass@1",
        f"pass@{k}",
        f"hard pass@{k}",
        "distinct right",
        "steps",
        "seconds",
    ]
    body = []
    for label, rows in runs.items():
        marks = [r for r in rows if "pass@1" in r]
        if not marks:
            continue
        a, b = marks[0], marks[-1]
        keys = ("eval_entropy", "pass@1", "pass@k", "hard_pass@k", "distinct_correct")
        cells = [f"{a[key]:.3f} → {b[key]:.3f}" for key in keys]
        last = rows[-1]["step"]
        steps = str(last) if b["step"] == last else f"{last} (evaluated at {b['step']})"
        body.append([label, *cells, steps, f"{sum(r.get('seconds', 0) for r in rows):.0f}"])
    return aligned(head, body)


def aligned(head: list[str], body: list[list[str]]) -> str:
    """A table in plain text, columns padded to their widest cell."""
    widths = [max(len(r[i]) for r in [head, *body]) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in [head, *body])


# ------------------------------------------------------------------------------------------------------------
# 3. The command line


def load_policy(folder: Path) -> tuple[nn.Module, Any]:
    """Model and tokenizer of a run's checkpoint; ValueError where there is none or it cannot be read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = folder / "checkpoint"
    several = sorted(folder.glob("*/checkpoint"))
    if several and not path.exists():
        raise ValueError(f"{folder}: compares several methods; name one, e.g. {several[0].parent}")
    if not (path / "config.json").is_file():
        raise ValueError(f"{folder}: holds no checkpoint/; name the folder of a run, e.g. runs/opefo-s0")
    try:
        return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    except Exception as error:  # damage shows as any of a dozen classes of three libraries
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0][:160]})") from None


def main(argv: list[str] | None = None) -> int:
    """Evaluate finished runs again: other problems are not needed, other samples and temperatures are."""
    import argparse

    p = argparse.ArgumentParser(
        prog="eval.py",
        description="Sample answers to the held-out problems from the policies of finished runs.",
    )
    p.add_argument("runs", nargs="+", help="folders of runs, e.g. runs/opefo-s0")
    p.add_argument("--k", type=int, default=32, help="samples per problem (default: 32)")
    p.add_argument("--temperature", type=float, default=1.0, help="of sampling (default: 1.0)")
    p.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    args = p.parse_args(argv)
    for name in ("k", "temperature"):
        if not getattr(args, name) > 0:
            p.error(f"--{name} {getattr(args, name)}: must be positive")
    rows = []
    try:
        policies = [(run, *load_policy(Path(run))) for run in args.runs]
    except ValueError as error:
        p.error(str(error))
    for run, model, tokenizer in policies:
        engine = TorchEngine(model, tokenizer)
        result = evaluate(engine, chain_task(), args.k, args.temperature, seed=args.seed)
        keys = ("eval_entropy", "pass@1", "pass@k", "hard_pass@1", "hard_pass@k", "distinct_correct")
        rows.append([run, *(f"{result[key]:.3f}" for key in keys)])
    k = args.k
    print(f"{k} samples per problem, temperature {args.temperature:g}, no top-p, no top-k, seed {args.seed}")
    print(
        aligned(
            ["run", "entropy", "pass@1", f"pass@{k}", "hard pass@1", f"hard pass@{k}", "distinct right"], rows
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
