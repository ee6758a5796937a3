"""Chapter 6. Evaluation: what a policy can do at the first try, and what it can still do at all.

Claim. pass@1 alone cannot see a collapse.  A policy that puts all its probability on one answer per problem
and one that spreads it over many may solve equally often at the first try; only the second finds new answers
when it is asked again, and only the second has anything left to reinforce.  And a table at equal steps cannot
tell a remedy from a smaller learning rate: what learns less also collapses less.  So remedies are compared
with plain GRPO at several learning rates, at equal pass@1.

    1  what a policy can do: unbiased pass@k, distinct right answers                             (6.1)
    2  how sure one can be: standard errors, the paired bootstrap                                (6.2) (6.3)
    3  diversity and calibration: distinct-n, self-BLEU, calibration error, forking tokens       (6.4) - (6.7)
    4  the picture and the table of one training call
    5  comparing runs: methods over seeds, the line to beat, the law R = -a e^H + b              (6.8) (6.9)
    6  six benchmarks, resumable, beside the papers' numbers
    7  a response in the colours of its entropy flow
    8  the command line and the demonstration

    python eval.py                                          the estimators, shown on made-up counts
    python eval.py runs/opefo-s0                            a finished run: its log, and fresh samples
    python eval.py runs/*                                   all runs: methods over seeds, the frontier
    python eval.py runs/* --temperatures .5 .6 .8 1 1.2     the same over test temperatures
    python eval.py --law runs/grpo-*      python eval.py --show runs/opefo-s0
    python eval.py --model FOLDER_OR_ID --benchmark aime24 math500 --k 32 --engine vllm

Sampling is at temperature 1 without top-p or top-k unless said otherwise, since truncation hides a collapse.
Left out against a production harness: few-shot prompts, stop strings, code execution, judge models.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import hashlib
import html
import io
import json
import math
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C in the seconds that the imports below take
    said = b"stopped; nothing was written yet\n"
    signal.signal(signal.SIGINT, lambda *_: os.write(2, said) and os._exit(130))

import numpy as np
import torch
import tyro
from torch import nn

from entropy_math import check_entropy_law, entropy_change
from rollout import (
    PROMPT_TEMPLATE,
    Engine,
    Problem,
    Rollout,
    Task,
    TorchEngine,
    VllmEngine,
    answer,
    chain_task,
    grade,
    last_boxed,
    load_model,
    longest_prompt,
    math_task,
    read_problems,
    render,
    score,
    shared_grader,
    task_of_data,
)

__all__ = ["evaluate", "grade", "main", "pass_at_k"]  # `grade` is chapter 4's, offered here beside pass_at_k

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


Part = tuple[Sequence[Problem], Rollout]  # some problems, and k responses to each


def _answers(
    engine: Engine, task: Task, problems: Sequence[Problem], k: int, rows: int, *how: Any
) -> Iterator[Part]:
    """k responses to every problem, at most about `rows` at a time."""
    step = max(1, rows // k)
    for i in range(0, len(problems), step):
        part = problems[i : i + step]
        yield part, answer(engine, task, part, k, *how, entropy=True)


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
    mean, nats), eval_length (tokens), right (the number of right samples of each problem, from which pass@k
    for every smaller k, and intervals over problems, can be had later), the same for the hard problems as
    hard_* where the task has such, the k, and a few samples.
    """
    generator = torch.Generator(engine.device).manual_seed(seed)
    result: dict[str, Any] = {"k": k}
    for prefix, problems in (("", task.test), ("hard_", task.hard)):
        if not problems:
            continue
        parts = list(_answers(engine, task, problems, k, rows, temperature, top_p, generator))
        result |= {prefix + name: value for name, value in _summary(task, parts, k).items()}
        if not prefix:
            result["samples"] = _samples(*parts[0], k)
    return result


def _summary(task: Task, parts: list[Part], k: int) -> dict[str, Any]:
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
        "right": solved,
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
            "tokens": int(out.mask[i].sum()),
        }
        for i in picks
    ]


# ------------------------------------------------------------------------------------------------------------
# 2. How sure one can be


def mean_se(values: Sequence[float]) -> tuple[float, float]:
    """Mean of n independent values and its standard error; the error is NaN for n = 1.

    se = s / √n,  s² = Σ (v - mean)² / (n - 1)                                                           (6.2)

    Over problems it says how much the score depends on which problems were asked, the samples' noise
    included; over seeds how much it depends on warm start, prompt order and sampling.  Neither holds the
    other.
    """
    v = np.asarray(values, dtype=float)
    return float(v.mean()), float(v.std(ddof=1) / math.sqrt(len(v))) if len(v) > 1 else math.nan


def resample(n: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(1 + draws, n) bootstrap weights: row 0 is the data as they are, every other row n picks with
    replacement."""
    return np.vstack([np.full((1, n), 1 / n), rng.multinomial(n, np.full(n, 1 / n), draws) / n])


def interval(values: np.ndarray) -> tuple[float, float]:
    """2.5 % and 97.5 % percentiles of the resamples that exist, NaN where none does."""
    v = values[np.isfinite(values)]
    return tuple(map(float, np.percentile(v, [2.5, 97.5]))) if len(v) else (math.nan, math.nan)


def paired(a: Sequence[float], b: Sequence[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Mean of a - b over the same seeds, and its 95 % percentile bootstrap interval (NaN for one seed).

        d_s = a_s - b_s,  low, high = 2.5 % and 97.5 % percentile of the mean over n picks of d          (6.3)

    Pairing removes what the two runs of a seed share (warm start, prompts); it is not a larger sample.  No
    mean of picks lies outside [min d, max d], which for n independent d holds their median with probability
    1 - 2^(1-n): .75 for n = 3, .94 for 5, .98 for 7.  So with three seeds "95 %" is at best 75 %, and an
    interval that leaves out 0 says only that the seeds agreed in sign.
    """
    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if len(d) < 2:
        return float(d.mean()), math.nan, math.nan
    return float(d.mean()), *interval(resample(len(d), draws, np.random.default_rng(0))[1:] @ d)


# ------------------------------------------------------------------------------------------------------------
# 3. Diversity and calibration
#
# A sample is what is kept of one response, a dictionary that fits in a line of JSON: problem, sample (their
# numbers), correct, truncated, logp (Σ log π of its tokens), ids, nats (the entropy at each token), text.

Sample = dict[str, Any]
Groups = list[list[Sample]]  # problems x samples


def to_samples(part: Part, k: int, first: int = 0) -> Groups:
    """The responses to some problems, of which the first has the number `first`."""
    problems, out = part
    logp = torch.where(out.mask, out.rollout_logp, 0).sum(-1, dtype=torch.float64).tolist()
    right, cut, length = out.correct.tolist(), out.truncated.tolist(), out.mask.sum(-1).tolist()
    ids, nats = out.ids.tolist(), out.entropy.double().tolist()
    return [
        [
            {
                "problem": first + p,
                "sample": j,
                "correct": right[i],
                "truncated": cut[i],
                "logp": round(logp[i], 5),
                "ids": ids[i][: length[i]],
                "nats": [round(x, 5) for x in nats[i][: length[i]]],
                "text": out.texts[i],
            }
            for j in range(k)
            for i in [p * k + j]
        ]
        for p in range(len(problems))
    ]


def ngrams(ids: Sequence[int], n: int) -> Counter:
    """How often each run of n tokens occurs."""
    return Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))


def distinct_n(texts: Sequence[Sequence[int]], n: int) -> float:
    """distinct-n = different n-grams / all n-grams of the responses to one problem   1510.03055 (6.4)

    1 if no n-gram occurs twice.  Falls with length and with the number of texts: compare at equal ones only.
    """
    counts = sum((ngrams(t, n) for t in texts), Counter())
    return len(counts) / counts.total() if counts else math.nan


def self_bleu(texts: Sequence[Sequence[int]], order: int = 4) -> float:
    """Mean BLEU of every response against the others of its problem, which must all have the same length.

        BLEU_i = exp (1/N) Σ_{n=1}^{N} log ( Σ_g min(c_i(g), max_{j≠i} c_j(g)) / Σ_g c_i(g) )            (6.5)

    c_i(g) is how often the n-gram g occurs in response i (1802.01886).  At equal length BLEU's brevity
    penalty is 1.  No smoothing: a response that shares no n-gram of some order with any other scores 0.
    Orders longer than the responses are left out.  1: every response has a twin, as after a collapse.  NaN
    for fewer than two texts.
    """
    if len(texts) < 2:
        return math.nan
    orders = range(1, min(order, len(texts[0])) + 1)
    logs = np.zeros(len(texts))
    for n in orders:
        counts = [ngrams(t, n) for t in texts]
        two: dict[tuple, tuple[int, int]] = {}  # the two largest c_j(g), so that i can be left out
        for c in counts:
            for g, x in c.items():
                a, b = two.get(g, (0, 0))
                two[g] = (max(a, x), max(min(a, x), b))
        for i, c in enumerate(counts):
            shared = sum(min(x, two[g][x == two[g][0]]) for g, x in c.items())
            logs[i] += math.log(shared / c.total()) if shared else -math.inf
    return float(np.exp(logs / len(orders)).mean())  # (6.5)


def common_length(groups: Groups, share: float = 0.9) -> int:
    """The largest length in tokens that `share` of all responses reach."""
    lengths = sorted((len(s["ids"]) for g in groups for s in g), reverse=True)
    return lengths[math.ceil(share * len(lengths)) - 1]


def calibration(confidence: Sequence[float], right: Sequence[bool], bins: int = 10) -> list[tuple]:
    """(mean confidence, share right, count) of at most `bins` groups of about equal size, by confidence.

    Equal confidences stay in one group, so that no order of the data matters.
    """
    c, r = np.asarray(confidence, dtype=float), np.asarray(right, dtype=float)
    edges = np.unique(np.quantile(c, np.arange(1, bins) / bins))
    which = np.searchsorted(edges, c, side="left")
    return [(c[which == b].mean(), r[which == b].mean(), int((which == b).sum())) for b in np.unique(which)]


def calibration_error(confidence: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """ECE = Σ_b n_b / n |share right_b - mean confidence_b|, over the groups b of `calibration`     (6.6)"""
    groups = calibration(confidence, right, bins)
    return float(sum(n * abs(r - c) for c, r, n in groups) / sum(n for *_, n in groups))


def confidences(groups: Groups, key: Callable[[str], str]) -> dict[str, tuple[list[float], list[bool]]]:
    """Two answers to "how sure was it", each against whether it was right.

    vote         of a problem: the share of its most frequent answer (by `key`; the first drawn among equals)
                 among its samples, right if that answer is; 0 and wrong where none holds an answer ("").
                 Left out for single samples, which always agree with themselves
    likelihood   of a response: exp of the mean of log π over its tokens; right if the response is
    """
    shares, voted = [], []
    for group in groups:
        keys = [key(s["text"]) for s in group]
        most, count = Counter(x for x in keys if x).most_common(1)[0] if any(keys) else ("", 0)
        shares.append(count / len(group))
        voted.append(count > 0 and group[keys.index(most)]["correct"])
    every = [s for g in groups for s in g]
    likely = [math.exp(s["logp"] / max(1, len(s["ids"]))) for s in every]
    found = {"vote": (shares, voted)} if max(map(len, groups)) > 1 else {}
    return found | {"likelihood": (likely, [s["correct"] for s in every])}


def forking(nats: np.ndarray, share: float = 0.2) -> float:
    """H₀, from which on a token is a fork: the ⌈share · N⌉-th largest of N entropies, 2506.01939     (6.7)"""
    return float(np.sort(nats)[::-1][max(1, math.ceil(share * len(nats))) - 1])


def fork_table(groups: Groups, name: Callable[[int], str], count: int = 12) -> list[dict[str, Any]]:
    """The most frequent tokens drawn at forks: how often, their mean entropy there, and the share of the
    token's occurrences that are forks."""
    ids = np.array([i for g in groups for s in g for i in s["ids"]])
    nats = np.array([h for g in groups for s in g for h in s["nats"]])
    fork = nats >= forking(nats)
    rows = []
    for i, n in Counter(ids[fork].tolist()).most_common(count):
        own = ids == i
        mean = float(nats[fork & own].mean())
        rows.append({"token": name(i), "forks": n, "entropy": mean, "share_forks": float(n / own.sum())})
    return rows


def measure(
    groups: Groups, ks: Sequence[int], key: Callable[[str], str], vote: Callable[[str], str], length: int = 0
) -> dict[str, tuple[float, float]]:
    """name -> (mean over problems, its standard error (6.2)) of everything that samples tell.

    groups: P problems with n samples each.  pass@1 (= avg@n) and pass@k for every k of `ks` that n allows;
    distinct_correct by `key`; entropy (nats, the mean over all tokens, its error linearised as of a ratio),
    length (tokens), truncated (share); distinct-1 to -3 and self-BLEU of the first `length` tokens (0: the
    common length) of the responses that have as many; the two calibration errors (no standard error), the
    votes counted by `vote`.
    """
    n = min(map(len, groups))
    right = [sum(s["correct"] for s in g) for g in groups]
    out = {f"pass@{k}": mean_se([pass_at_k(n, c, k) for c in right]) for k in [1, *ks] if k <= n}
    out["distinct_correct"] = mean_se([len({key(s["text"]) for s in g if s["correct"]}) for g in groups])
    tokens = np.array([sum(len(s["ids"]) for s in g) for g in groups], dtype=float)
    nats = np.array([sum(map(sum, (s["nats"] for s in g))) for g in groups])
    H = float(nats.sum() / max(1.0, tokens.sum()))
    out["entropy"] = H, mean_se((nats - H * tokens) / max(1.0, tokens.mean()))[1]
    out["length"] = mean_se(tokens / n)
    out["truncated"] = mean_se([sum(s["truncated"] for s in g) / n for g in groups])
    length = length or common_length(groups)
    texts = [[s["ids"][:length] for s in g if len(s["ids"]) >= length] for g in groups]
    texts = [t for t in texts if len(t) > 1]
    for name, f in [(f"distinct-{m}", lambda t, m=m: distinct_n(t, m)) for m in (1, 2, 3)] + [
        ("self_bleu", self_bleu)
    ]:
        out[name] = mean_se([f(t) for t in texts]) if texts else (math.nan, math.nan)
    out["ece_vote"] = math.nan, math.nan
    for name, pair in confidences(groups, vote).items():
        out[f"ece_{name}"] = calibration_error(*pair), math.nan
    return out | {"common_length": (length, math.nan)}


# ------------------------------------------------------------------------------------------------------------
# 4. The picture and the table of one training call

# Colours differ in lightness and every curve has its own dash, so that the picture survives a grey printer.
STYLES = [
    ("#000000", "-"), ("#d55e00", "--"), ("#56b4e9", "-."), ("#009e73", ":"),
    ("#cc79a7", (0, (5, 1, 1, 1, 1, 1))),
    ("#7f6000", (0, (8, 2))), ("#0000a0", (0, (2, 1))), ("#e69f00", (0, (1, 2))),
]  # fmt: skip


def style(i: int) -> dict[str, Any]:
    """Colour and dash of the i-th curve."""
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
    save(fig, path)


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
        cells = [f"{a[key]:.3f} → {b[key]:.3f}" if key in a else "" for key in keys]
        last = rows[-1]["step"]
        steps = str(last) if b["step"] == last else f"{last} (evaluated at {b['step']})"
        body.append([label, *cells, steps, f"{sum(r.get('seconds', 0) for r in rows):.0f}"])
    return aligned(head, body)


def aligned(head: list[str], body: list[list[str]]) -> str:
    """A table in plain text, columns padded to their widest cell."""
    widths = [max(len(r[i]) for r in [head, *body]) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in [head, *body])


# ------------------------------------------------------------------------------------------------------------
# 5. Comparing runs

METRICS = ("eval_entropy", "pass@1", "pass@k", "hard_pass@1", "hard_pass@k", "distinct_correct")
BOOKKEEPING = {"method", "device", "threads", "micro_batch", "ledger", "ledger_every", "eval_every"}


@dataclass(frozen=True)
class Record:
    """A run as its folder tells it."""

    folder: Path
    spec: str  # the method with its options, as on the command line
    settings: dict[str, Any]
    rows: tuple[dict[str, Any], ...]  # metrics.jsonl

    @property
    def task(self) -> str:
        """Where its held-out problems come from, "" for the embedded task."""
        return self.settings.get("eval_data") or self.settings.get("data") or ""

    @property
    def seed(self) -> tuple:
        """What pairs two runs: the value of every setting called seed."""
        return tuple((k, v) for k, v in sorted(self.settings.items()) if k.endswith("seed"))

    @property
    def own(self) -> dict[str, str]:
        """The options that ride behind the method's name."""
        pairs = (x.partition("=") for x in self.spec.partition(":")[2].split(",") if x)
        return {key.replace("-", "_"): value for key, _, value in pairs}

    @property
    def shared(self) -> dict[str, Any]:
        """The settings that make a run what it is, apart from method and seed."""
        return {k: v for k, v in self.settings.items() if k not in BOOKKEEPING and not k.endswith("seed")}

    @property
    def plain(self) -> bool:
        """GRPO with no other option than settings of the training."""
        return self.spec.partition(":")[0] == "grpo" and set(self.own) <= set(self.settings)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [r for r in self.rows if r.get("pass@1") is not None]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file; a last line that a kill cut short is dropped.  Raises ValueError naming the
    line of any other damage."""
    rows, lines = [], path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
            if row is not None and not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is damaged ({str(error)[:80]})") from None
        if row is not None:
            rows.append(row)
    return rows


def read_record(folder: Path) -> Record:
    """Raises ValueError where the folder holds no run with an evaluation."""
    try:
        config = json.loads((folder / "config.json").read_text())
        (spec,), settings = config["specs"], dict(config["settings"])
        rows = tuple(r for r in read_jsonl(folder / "metrics.jsonl") if "step" in r)
    except FileNotFoundError as error:
        raise ValueError(f"no run (no {Path(error.filename).name})") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its config.json or metrics.jsonl is damaged ({error})") from None
    record = Record(folder, str(spec), settings, rows)
    if not record.evaluations:
        raise ValueError("a run that was never evaluated")
    return record


def find_records(names: Sequence[str]) -> tuple[list[Record], list[str]]:
    """All runs in the folders, a comparison's members among them, and why others were left out.

    Raises ValueError if not one run is left.
    """
    records, notes, seen = [], [], set()
    for name in map(Path, names):
        members = sorted(p.parent for p in name.glob("*/metrics.jsonl"))
        if (name / MARK).is_file() or name.is_file():
            continue  # our own pictures, and a stray file that the shell's * caught
        for folder in [name] if (name / "metrics.jsonl").is_file() or not members else members:
            try:
                record = read_record(folder)
                if (twin := (record.spec, record.seed, str(record.shared))) in seen:
                    raise ValueError(f"{record.spec} with the same settings and seed is there already")
                seen.add(twin)
                records.append(record)
            except ValueError as error:
                notes.append(f"skipped {folder}: {error}")
    if not records:
        why = "; ".join(notes[:3]) or "nothing but files"
        raise ValueError(f"{' '.join(names[:3])}: no run is left ({why}); name folders that train.py made")
    return records, notes


def grouped(records: Sequence[Record]) -> dict[str, list[Record]]:
    """label -> runs that differ in the seed only.  The label is the spec, and the settings by which groups of
    the same spec differ."""
    groups: dict[tuple, list[Record]] = {}
    for r in records:
        groups.setdefault((r.spec, json.dumps(r.shared, sort_keys=True)), []).append(r)
    out = {}
    for (spec, _), members in groups.items():
        same = [g[0].shared for (other, _), g in groups.items() if other == spec]
        own = {k: v for k, v in members[0].shared.items() if any(s.get(k) != v for s in same)}
        out[spec + (f" [{', '.join(f'{k}={v}' for k, v in own.items())}]" if own else "")] = members
    return out


def baseline(members: Sequence[Record], groups: dict[str, list[Record]]) -> str | None:
    """The label of plain GRPO with which a group is compared: of the same settings if there is one, else the
    same but for the settings that the group's spec names (its learning rate, say)."""
    one = members[0]
    every = {x: g[0] for x, g in groups.items() if g[0].plain and g[0].spec != one.spec}
    for left_out in (set(), set(one.own)):
        for label, g in every.items():
            keys = {k for k in {*one.shared, *g.shared} if k not in left_out}
            if set(g.own) <= keys and all(one.shared.get(k) == g.shared.get(k) for k in keys):
                return label
    return None


def value(row: dict[str, Any], key: str) -> float:
    """A number of a row of a log; NaN where there is none."""
    x = row.get(key)
    return float(x) if isinstance(x, int | float) else math.nan


def comparison(groups: dict[str, list[Record]]) -> list[dict[str, Any]]:
    """One row a method: mean and standard error over seeds (6.2) at the last evaluation, and the difference
    to plain GRPO on the same seeds at the same step (6.3)."""
    rows = []
    for label, members in groups.items():
        last = {r.seed: r.evaluations[-1] for r in members}
        row = {"method": label, "seeds": len(members), "step": max(e["step"] for e in last.values())}
        other = baseline(members, groups)
        theirs = {r.seed: {e["step"]: e for e in r.evaluations} for r in groups.get(other, ())}
        theirs = {s: theirs[s][e["step"]] for s, e in last.items() if e["step"] in theirs.get(s, ())}
        common = list(theirs)
        row |= {"against": other, "pairs": len(common)}
        for key in METRICS:
            row[key], row[f"{key} se"] = mean_se([value(e, key) for e in last.values()])
            if common:
                pair = ([value(e[s], key) for s in common] for e in (last, theirs))
                row |= zip((f"{key} diff", f"{key} low", f"{key} high"), paired(*pair))
        rows.append(row)
    return rows


def number(x: float, digits: int = 3, sign: str = "") -> str:
    """A cell of a table; a dash where there is no number."""
    return f"{x:{sign}.{digits}f}" if x is not None and math.isfinite(x) else "–"


def plus_minus(mean: float, se: float, digits: int = 3) -> str:
    """The cell "mean ± standard error", without the error where there is none."""
    return number(mean, digits) + (f" ± {se:.{digits}f}" if math.isfinite(se) else "")


def with_interval(row: dict[str, Any], key: str) -> str:
    """The cell "difference [low, high]" of a key."""
    text = number(row.get(f"{key} diff", math.nan), sign="+")
    low, high = row.get(f"{key} low", math.nan), row.get(f"{key} high", math.nan)
    return text + (f" [{low:+.3f}, {high:+.3f}]" if math.isfinite(low) else "")


def print_comparison(groups: dict[str, list[Record]], rows: list[dict[str, Any]]) -> None:
    """Two tables, and how far they can be trusted."""
    k = max(int(r.evaluations[-1].get("k", 0)) for g in groups.values() for r in g)
    names = [x.replace("_", " ").replace("@k", f"@{k}").replace("eval ", "") for x in METRICS]
    head = ["method", "seeds", "step", *names]
    ends = [[plus_minus(r[x], r[f"{x} se"]) for x in METRICS] for r in rows]
    print("At the last evaluation: mean ± standard error over seeds (6.2)\n")
    print(aligned(head, [[r["method"], str(r["seeds"]), str(r["step"]), *e] for r, e in zip(rows, ends)]))
    for g in groups.values():
        for r in g:
            if r.evaluations[-1]["step"] < r.settings.get("steps", 0):
                print(f"  {r.folder} stopped at {r.evaluations[-1]['step']} of {r.settings['steps']} steps")
    body = [
        [r["method"], r["against"], str(r["pairs"]), *(with_interval(r, x) for x in METRICS)]
        for r in rows
        if r["pairs"]
    ]
    if not body:
        print("\nNo differences: they need plain grpo among the runs, on the same seeds.")
        return
    print("\nDifference on the same seeds, and its 95 % bootstrap interval over seeds (6.3)\n")
    print(aligned(["method", "minus", "pairs", *names], body))
    for n in sorted({r["pairs"] for r in rows} - {0}):
        if n == 1:
            print("1 pair: no interval, and no way to tell a method from luck.")
        elif n < 7:
            most = 1 - 2.0 ** (1 - n)
            print(f"{n} pairs: an interval holds the median difference with probability {most:.2f} at most.")


# -- the frontier --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """pass@1 and pass@k of one method at one step or test temperature, for every seed and problem."""

    label: str
    at: float
    x: dict[tuple, np.ndarray]  # seed -> (P,) pass@1 of each problem; (1,) the mean where only that is known
    y: dict[tuple, np.ndarray]  # pass@k

    @property
    def mean(self) -> tuple[float, float]:
        return tuple(float(np.mean([v.mean() for v in d.values()])) for d in (self.x, self.y))


def point(label: str, at: float, rows: dict[tuple, dict[str, Any]], prefix: str, k: int) -> Point | None:
    """From one evaluation a seed; None where no row has the numbers.  `k` counts where the samples were
    counted problem by problem, else it is the k of the log."""
    rows = {s: r for s, r in rows.items() if math.isfinite(value(r, f"{prefix}pass@1"))}
    if not rows:
        return None
    if all(f"{prefix}right" in r and r["k"] >= k for r in rows.values()):
        table = {n: [pass_at_k(n, c, k) for c in range(n + 1)] for n in {r["k"] for r in rows.values()}}
        counts = {s: np.array(r[f"{prefix}right"]) for s, r in rows.items()}
        x = {s: c / rows[s]["k"] for s, c in counts.items()}
        return Point(label, at, x, {s: np.array(table[rows[s]["k"]])[c] for s, c in counts.items()})
    x, y = ({s: np.array([value(r, prefix + m)]) for s, r in rows.items()} for m in ("pass@1", "pass@k"))
    return Point(label, at, x, y)


def line_to_beat(x: np.ndarray, px: np.ndarray, py: np.ndarray) -> np.ndarray:
    """Upper envelope of the chords between n points: (D,) from x (D,), px and py (D, n).  NaN outside.

        L(x) = max over i, j with x_i <= x <= x_j of  w y_i + (1 - w) y_j,  w = (x_j - x) / (x_j - x_i)  (6.8)

    Every chord is within reach without any new method: for each problem, toss a coin with P(heads) = w and
    give all k tries to policy i on heads, to j on tails; pass@1 and pass@k are then exactly on the chord.
    The maximum over noisy points lies too high on average, which favours the line and not the challenger.
    """
    i, j = np.triu_indices(px.shape[1])
    i, j = np.concatenate([i, j]), np.concatenate([j, i])
    left, right, at = px[:, i], px[:, j], x[:, None]  # (D, pairs)
    width = right - left
    w = np.where(width > 0, (right - at) / np.where(width > 0, width, 1), 1.0)
    chord = np.where((left <= at) & (at <= right), w * py[:, i] + (1 - w) * py[:, j], -np.inf)  # (6.8)
    best = chord.max(1)
    return np.where(best > -np.inf, best, np.nan)


def above_line(points: Sequence[Point], sweep: Sequence[Point], draws: int = 2000) -> dict[str, Any]:
    """How far a method's points lie above the line through GRPO's, at equal pass@1.

        d = mean over the method's points q inside the line's range of  y_q - L(x_q)                     (6.9)

    The interval is a bootstrap over seeds, the same for method and line, and over problems where their counts
    are known; the line is drawn anew in every resample.  `inside` counts the points that have a line above or
    below them; there is no extrapolation, and d is NaN where no point has.
    """
    seeds = sorted(set.intersection(*(set(p.x) for p in [*points, *sweep])))
    out = dict.fromkeys(("diff", "low", "high"), math.nan) | {"inside": 0, "seeds": len(seeds), "share": 0.0}
    if not seeds:
        return out
    sizes = {len(v[s]) for p in [*points, *sweep] for v in (p.x, p.y) for s in seeds}
    by_problem, rng = len(sizes) == 1, np.random.default_rng(0)
    S = resample(len(seeds), draws, rng)  # (1 + D, seeds)
    W = resample(max(sizes), draws, rng) if by_problem else np.ones((1 + draws, 1))  # (1 + D, P)

    def means(d: dict[tuple, np.ndarray]) -> np.ndarray:
        rows = np.stack([d[s] if by_problem else d[s].mean(keepdims=True) for s in seeds])  # (seeds, P)
        return np.einsum("ds,sp,dp->d", S, rows, W, optimize=True)

    px, py = (np.stack([means(v) for v in vs], 1) for vs in ([p.x for p in sweep], [p.y for p in sweep]))
    d = np.stack([means(p.y) - line_to_beat(means(p.x), px, py) for p in points], 1)  # (1 + D, points)
    inside = np.isfinite(d[0])
    out |= {"x_low": float(px[0].min()), "x_high": float(px[0].max()), "inside": int(inside.sum())}
    if inside.any():
        d = d[:, inside].mean(1)  # (6.9); NaN in a resample that moved a point outside
        low, high = interval(d[1:])
        out |= {"diff": float(d[0]), "low": low, "high": high, "share": float(np.isfinite(d[1:]).mean())}
    return out


def training_points(groups: dict[str, list[Record]], prefix: str, k: int) -> list[Point]:
    """One point for every method and every step that all of its seeds were evaluated at."""
    out = []
    for label, members in groups.items():
        rows = {r.seed: {e["step"]: e for e in r.evaluations} for r in members}
        for step in sorted(set.intersection(*(set(e) for e in rows.values()))):
            out.append(point(label, step, {s: e[step] for s, e in rows.items()}, prefix, k))
    return [p for p in out if p]


def sweep_of(groups: dict[str, list[Record]], label: str) -> dict[str, float]:
    """label -> learning rate of the plain GRPO groups that a method is measured against: of the same settings
    but for the learning rate and for those that the method's own spec names.  Empty for these groups."""
    plain = {x: g[0] for x, g in groups.items() if g[0].plain and set(g[0].own) <= {"lr"}}
    free = {"lr", *groups[label][0].own}

    def rest(record: Record) -> dict[str, Any]:
        return {k: v for k, v in record.shared.items() if k not in free}

    same = {x: float(r.settings["lr"]) for x, r in plain.items() if rest(r) == rest(groups[label][0])}
    return {} if label in plain else same


def frontier(groups: dict[str, list[Record]], points: list[Point], along: str) -> list[dict[str, Any]]:
    """Differences at matched pass@1 to the line through GRPO's learning-rate sweep, a row a point.

    along="step": the line of a step goes through what the sweep has reached at that same step, and through
    the warm start, which is GRPO at learning rate 0.  along="temperature": through the sweep's final policies
    at all temperatures.  A row with at=None is the method as a whole: its last step, or the mean over its
    temperatures.
    """
    rows = []
    for label in groups:
        own, sweep = [p for p in points if p.label == label], sweep_of(groups, label)
        for p in own:
            x, y = p.mean
            rows.append({"along": along, "method": label, "at": p.at, "pass@1": x, "pass@k": y})
            if line := line_points(points, sweep, along, p.at):
                rows[-1] |= above_line([p], line, 500)
        if own and (line := line_points(points, sweep, along, own[-1].at)):
            whole = own[-1:] if along == "step" else own
            rows.append({"along": along, "method": label, "at": None, "points": len(whole)})
            rows[-1] |= above_line(whole, line)
    return rows


def line_points(points: list[Point], sweep: dict[str, float], along: str, at: float) -> list[Point]:
    """GRPO's points that make the line."""
    grpo = [p for p in points if p.label in sweep]
    return grpo if along == "temperature" else [p for p in grpo if p.at in (0, at)]


def draw_frontier(
    panels: Sequence[tuple[str, str, int, list[Point]]], groups: dict[str, list[Record]], path: Path
) -> None:
    """Panels of (title, along, k, points): every method's path in the plane; GRPO's sweep in greys, darker
    for smaller learning rates, under it the line to beat."""
    from matplotlib.figure import Figure

    sweeps = {frozenset(x) for label in groups if (x := sweep_of(groups, label))}
    rates = {x: groups[x][0].settings["lr"] for x in frozenset().union(*sweeps)}
    order = [*sorted(rates, key=rates.get), *(x for x in groups if x not in rates)]
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    fig = Figure(figsize=(5.6 * columns + 2.4, 5.2 * lines), layout="constrained")
    axes = fig.subplots(lines, columns, squeeze=False).flatten()
    for ax, (title, along, k, points) in zip(axes, panels):
        for i, label in enumerate(order):
            if own := [p.mean for p in points if p.label == label]:
                shade = {"color": str(0.7 * i / len(rates)), "linestyle": "-"} if label in rates else None
                look = shade or style(i - len(rates) + 1)
                look |= {"marker": MARKERS[i % len(MARKERS)], "alpha": 0.85}
                ax.plot(*zip(*own), markersize=3, linewidth=1, **look)
                ax.plot(*own[-1], markersize=8, label=label, **look)
        for sweep in sweeps:
            line = line_points(points, sweep, along, max(p.at for p in points))
            px, py = (np.array([[p.mean[i] for p in line]]) for i in (0, 1))
            grid = np.linspace(px.min(), px.max(), 200)
            L = line_to_beat(grid, px.repeat(200, 0), py.repeat(200, 0))
            ax.plot(grid, L, color="black", linewidth=6, alpha=0.15, label="GRPO's line to beat", zorder=0)
        ax.set(title=title, xlabel="pass@1", ylabel=f"pass@{k}")
        ax.grid(alpha=0.25)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save(fig, path)


MARKERS = "osv^D<>PX*"


def save(fig: Any, path: Path) -> None:
    """Written under another name and renamed: a picture is never half there."""
    part = path.with_name(f".{path.name}.{os.getpid()}.png")
    fig.savefig(part, dpi=110)
    part.replace(path)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One column for every key of any row."""
    keys = list(dict.fromkeys(k for r in rows for k in r))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)


def print_frontier(rows: list[dict[str, Any]], k: int, title: str) -> None:
    """The whole methods against the line."""
    body = []
    for r in rows:
        if r["at"] is None:
            d = {f"d {key}": r[key] for key in ("diff", "low", "high")}
            where = f"{r['inside']} of {r['points']}"
            if not r["seeds"]:
                where = "no seed in common with GRPO's sweep"
            elif not r["inside"]:
                where = f"none: GRPO's line covers pass@1 {r['x_low']:.3f} to {r['x_high']:.3f} only"
            elif r["share"] < 0.95:
                where += f"; {r['share']:.0%} of the resamples are"
            body.append([r["method"], with_interval(d, "d"), where, str(r["seeds"])])
    if not body:
        print(f"\n{title}: needs grpo at one learning rate or more, and another method.")
        return
    print(f"\n{title}: pass@{k} above GRPO's line (6.8) at equal pass@1 (6.9), 95 % interval\n")
    print(aligned(["method", f"pass@{k} - line", "points inside", "seeds"], body))


# -- the law -------------------------------------------------------------------------------------------------


def law_series(record: Record) -> dict[str, tuple[list[float], list[float]]]:
    """(entropy, score) in the order of training: of the evaluations, as the paper has it, but with the
    entropy of the very policy that is scored; and of every training batch, more points and more noise."""
    out = {}
    for kind, h, r in (("evaluation", "eval_entropy", "pass@1"), ("training batch", "entropy", "reward")):
        pairs = [(value(x, h), value(x, r)) for x in record.rows]
        pairs = [p for p in pairs if all(map(math.isfinite, p))]
        out[kind] = tuple(map(list, zip(*pairs))) if pairs else ([], [])
    return out


def law_row(label: str, kind: str, H: Sequence[float], R: Sequence[float], share: float = 0.15) -> dict:
    """Fit R = -a e^H + b to the first 15 %, three points or more, and predict the rest (2505.22617)."""
    n = max(3, round(share * len(H)))
    row = {"run": label, "points of": kind, "fitted": n, "predicted": max(0, len(H) - n)}
    try:
        if len(H) < n + 2:
            raise ValueError(f"{len(H)} points; the fit needs {n}, and two to predict")
        law, rmse, last, n = check_entropy_law(H, R, share)
    except ValueError as error:
        return row | {"why": str(error)}
    rest = np.asarray(R[n:])
    error = law.predict(H[n:]).numpy() - rest
    spread = float(((rest - rest.mean()) ** 2).sum())
    row |= {"a": law.a, "b": law.b, "R2 of the fit": law.r2, "rmse": rmse}
    row |= {"R2 of the rest": 1 - float((error**2).sum()) / spread if spread else math.nan}
    return row | {"largest error": float(np.abs(error).max()), "last error": last}


def law(records: Sequence[Record], out: Path) -> None:
    """Table, law.png and law.csv."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(12, 5.2), layout="constrained")
    axes = dict(zip(("evaluation", "training batch"), fig.subplots(1, 2)))
    rows, points = [], []
    for i, record in enumerate(records):
        name = f"{record.spec}, seed {record.settings.get('seed')}"
        for kind, (H, R) in law_series(record).items():
            row = law_row(str(record.folder), kind, H, R)
            rows.append(row)
            of = {"run": str(record.folder), "points of": kind}
            points += [of | {"entropy": h, "score": r} for h, r in zip(H, R)]
            n, ax, color = row["fitted"], axes[kind], style(i)["color"]
            size = 14 if kind == "evaluation" else 3
            ax.scatter(H[n:], R[n:], s=size, facecolors="none", edgecolors=color, linewidths=0.7)
            ax.scatter(H[:n], R[:n], s=2 * size, color=color, label=name)
            if "a" in row:
                h = np.linspace(min(H), max(H), 100)
                ax.plot(h, row["b"] - row["a"] * np.exp(h), **style(i))
    for kind, ax in axes.items():
        ax.set(title=f"R = -a e^H + b, {kind}: fitted on the filled points", xlabel="entropy H, nats")
        ax.set_ylabel("pass@1" if kind == "evaluation" else "mean reward")
        scores = [p["score"] for p in points if p["points of"] == kind]
        if scores:
            ax.set_ylim(min(scores) - 0.05, max(scores) + 0.05)
        ax.grid(alpha=0.25)
    axes["evaluation"].legend(fontsize=7)
    save(fig, out / "law.png")
    write_csv(out / "law.csv", rows)
    write_csv(out / "law-points.csv", points)
    keys = ("a", "b", "R2 of the fit", "R2 of the rest", "rmse", "largest error", "last error")
    body = [
        [r["run"], r["points of"], f"{r['fitted']}/{r['predicted']}"]
        + ([number(r[k]) for k in keys] if "a" in r else [r["why"]] + [""] * (len(keys) - 1))
        for r in rows
    ]
    print(aligned(["run", "points of", "fitted/rest", *keys], body))
    print("R2 of the rest compares with its own mean: below 0, a constant predicts better than the law.")


# -- fresh samples from a run's checkpoint -------------------------------------------------------------------


def own_attention(model: str | Path, device: torch.device) -> str:
    """What a run's checkpoint was trained with, where that runs on the device; sdpa of any other model."""
    try:
        kind = json.loads((Path(model).parent / "config.json").read_text())["settings"]["attention"]
    except (OSError, ValueError, KeyError, TypeError):
        return "sdpa"
    return "sdpa" if device.type == "cpu" and kind.startswith("flash") else kind


def load_policy(folder: Path, attention: str = "") -> tuple[nn.Module, Any]:
    """Model and tokenizer of a run's checkpoint, by default with the run's own attention; ValueError where
    there is none or it cannot be read."""
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
        kind = attention or own_attention(path, torch.device("cpu"))
        how = {} if kind == "sdpa" else {"attn_implementation": kind}  # sdpa, else eager
        return AutoModelForCausalLM.from_pretrained(path, **how).eval(), AutoTokenizer.from_pretrained(path)
    except Exception as error:  # damage shows as any of a dozen classes of three libraries
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0][:160]})") from None


def embedded(record: Record) -> Task:
    """The task of a run.  Raises ValueError where it is not the embedded one."""
    if record.task:
        raise ValueError(
            f"{record.folder}: was trained on {record.settings['data']}, not on the embedded task; sample "
            f"from it with --model {record.folder / 'checkpoint'} --benchmark NAME --data NAME=FILE.jsonl"
        )
    return chain_task()


@torch.no_grad()
def fresh(record: Record, k: int, temperature: float, top_p: float, seed: int) -> dict[str, Groups]:
    """k samples of every held-out problem, "", and of the hard ones, "hard ".  As `evaluate` draws them."""
    task, (model, tokenizer) = embedded(record), load_policy(record.folder)
    engine, generator = TorchEngine(model, tokenizer), torch.Generator().manual_seed(seed)
    out = {}
    for prefix, problems in (("", task.test), ("hard ", task.hard)):
        parts = _answers(engine, task, problems, k, 1024, temperature, top_p, generator)
        out[prefix] = []
        for part in parts:
            out[prefix] += to_samples(part, k, len(out[prefix]))
    return out


def print_samples(sets: dict[str, dict[str, Groups]], ks: Sequence[int], length: int, out: Path) -> None:
    """Two tables, samples.csv (every number with its standard error) and problems.csv (right counts)."""
    key = chain_task().signature
    length = length or min(common_length(g) for groups in sets.values() for g in groups.values())
    rows, counts = [], []
    for label, groups in sets.items():
        for prefix, g in groups.items():
            rows.append((label, prefix, measure(g, ks, key, key, length)))
            for p, group in enumerate(g):
                n = sum(s["correct"] for s in group)
                row = {"run": label, "set": prefix.strip() or "test", "problem": p}
                counts.append(row | {"right": n, "of": len(group)})
    shown = [f"pass@{k}" for k in [1, *ks]] + ["distinct_correct", "entropy", "length", "truncated"]
    more = ["distinct-1", "distinct-2", "distinct-3", "self_bleu", "ece_vote", "ece_likelihood"]
    for names in (shown, more):
        body = [[x, p.strip() or "test", *(plus_minus(*m[name]) for name in names)] for x, p, m in rows]
        print(aligned(["run", "problems", *(x.replace("_", " ") for x in names)], body) + "\n")
    print(f"± standard error over problems (6.2); diversity (6.4) (6.5) of the first {length} tokens")
    flat = [{"run": label, "set": prefix.strip() or "test"} | with_errors(m) for label, prefix, m in rows]
    write_csv(out / "samples.csv", flat)
    write_csv(out / "problems.csv", counts)


def with_errors(m: dict[str, tuple[float, float]]) -> dict[str, float]:
    """A column for each metric, and one for its standard error where there is such."""
    both = {name: v for x, pair in m.items() for name, v in zip((x, f"{x} se"), pair)}
    return {name: v for name, v in both.items() if name in m or not math.isnan(v)}


def draw_calibration(sets: dict[str, Groups], vote: Callable[[str], str], path: Path) -> None:
    """Reliability: share right against confidence, one panel for each meaning of the word; CSV beside it."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(10, 4.8), layout="constrained")
    axes, rows = dict(zip(("vote", "likelihood"), fig.subplots(1, 2))), []
    for i, (label, groups) in enumerate(sets.items()):
        for name, pair in confidences(groups, vote).items():
            bins = calibration(*pair)
            c, r, n = zip(*bins)
            text = f"{label}: ECE {calibration_error(*pair):.3f}"
            axes[name].plot(c, r, marker="o", markersize=4, label=text, **style(i))
            rows += [
                {"run": label, "confidence": name, "mean": x, "right": y, "count": m} for x, y, m in bins
            ]
    titles = {"vote": "share of the most frequent answer", "likelihood": "exp of the tokens' mean log π"}
    for name, ax in axes.items():
        ax.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=":")
        ax.set(title=f"confidence: {titles[name]}", xlabel="mean confidence", ylabel="share right")
        ax.set(xlim=(0, 1.02), ylim=(-0.02, 1.02))
        ax.grid(alpha=0.25)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    save(fig, path)
    write_csv(path.with_suffix(".csv"), rows)


def draw_tokens(sets: dict[str, Groups], name: Callable[[int], str], path: Path, what: str) -> None:
    """Histogram of the entropy over tokens with the fork's threshold (6.7), and the most frequent tokens
    drawn from there on; CSV beside it."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(6 + 3.2 * len(sets), 4.8), layout="constrained")
    left, *right = fig.subplots(1, 1 + len(sets), width_ratios=[6] + [3.2] * len(sets))
    every = {x: np.array([h for g in groups for s in g for h in s["nats"]]) for x, groups in sets.items()}
    edges = np.linspace(0, max(v.max() for v in every.values()) or 1, 51)
    rows = []
    for i, (label, nats) in enumerate(every.items()):
        counts, cut = np.histogram(nats, edges)[0], forking(nats)
        left.stairs(counts / len(nats), edges, label=f"{label}: fork above {cut:.3f}", **style(i))
        left.axvline(cut, linewidth=0.8, **style(i))
        bins = zip(edges, edges[1:], counts)
        rows += [{"run": label, "from": a, "to": b, "tokens": int(c)} for a, b, c in bins]
        forks = fork_table(sets[label], name)
        rows += [{"run": label, **f} for f in forks]
        names = [tidy(f["token"]).strip() or repr(f["token"]) for f in forks]
        right[i].barh(range(len(forks)), [f["forks"] for f in forks], color=style(i)["color"])
        right[i].set_yticks(range(len(forks)), [x.replace("$", r"\$") for x in names], fontsize=8)
        right[i].invert_yaxis()
        right[i].set(title=f"{label}:\nmost frequent forks", xlabel="drawn there")
    left.set(title=f"{what} over tokens", xlabel="nats", ylabel="share of tokens", yscale="log")
    left.legend(fontsize=8)
    left.grid(alpha=0.25)
    save(fig, path)
    write_csv(path.with_suffix(".csv"), rows)


def over_temperatures(
    groups: dict[str, list[Record]], temperatures: Sequence[float], k: int, top_p: float, seed: int, out: Path
) -> dict[tuple[str, float], dict[tuple, dict[str, Any]]]:
    """(label, temperature) -> seed -> evaluation of the final checkpoint.

    temperatures.jsonl keeps what was sampled, under the checksum of the weights: a second call, or one after
    a kill, draws only what is new.
    """
    from tqdm import tqdm

    store = out / "temperatures.jsonl"
    known = {json.dumps(r["key"]): r for r in (read_jsonl(store) if store.exists() else [])}
    result: dict[tuple[str, float], dict[tuple, dict[str, Any]]] = {}
    jobs = [(label, r, t) for label, g in groups.items() for r in g for t in temperatures]
    policy = cache(lambda folder: TorchEngine(*load_policy(folder)))
    for label, record, t in tqdm(jobs, desc="test temperatures", unit="policy"):
        key = [fingerprint(record.folder / "checkpoint"), t, k, top_p, seed]
        if json.dumps(key) not in known:
            task = embedded(record)
            row = {"key": key, "run": str(record.folder), "temperature": t, "seed": seed, "top_p": top_p}
            row |= evaluate(policy(record.folder), task, k, t, top_p, seed)
            row.pop("samples")
            append(store, [row])
            known[json.dumps(key)] = row
        result.setdefault((label, t), {})[record.seed] = known[json.dumps(key)]
    return result


def fingerprint(folder: Path) -> str:
    """Of a model's weights: size, end, and 4 kB at 256 places of each safetensors file, for a merged adapter
    changes neither the embedding nor the last norm; "" where none is."""
    digest, files = hashlib.sha256(), sorted(folder.glob("*.safetensors"))
    for path in files:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            for start in range(0, size, max(1, size // 256)):
                file.seek(start)
                digest.update(file.read(2**12))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
        digest.update(f"{path.name} {size}".encode())
    return digest.hexdigest()[:16] if files else ""


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add lines in one write and wait until they are on the disk.  A line that a kill cut short is cut off
    first, so that nothing is glued to it."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
    with open(path, "ab") as file:
        file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------------------
# 6. The benchmarks

BENCHMARKS = {  # name -> samples a problem: many on the small sets, one on the large (OPEFO, STEER)
    "aime24": 32, "aime25": 32, "amc23": 32, "math500": 1, "minerva": 1, "olympiadbench": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Reported:
    """What a paper reports, in percent: method -> the six benchmarks and their average; None: not given."""

    paper: str
    sampling: str
    rows: dict[str, tuple[float | None, ...]]


def _average(x: float) -> tuple[float | None, ...]:
    return (None,) * 6 + (x,)


REPORTED = {
    "opefo": Reported(
        "2605.11491, Qwen2.5-Math-7B (transcribed by others, not checked in the paper)",
        "temperature 1, top-p .7; avg@32 on AIME and AMC, avg@1 on the others; the checkpoint that is best "
        "on the mean of these very benchmarks; one run",
        {
            "base": _average(21.2), "GRPO, 8 updates": _average(45.5), "GRPO, strict": _average(50.1),
            "entropy regularisation": _average(47.8), "clip-higher": _average(49.8),
            "Clip-Cov": _average(50.7), "KL-Cov": _average(50.5),
            "OPEFO": (34.5, None, 82.2, None, None, None, 52.4),
            "GRPO, 8 updates: pass@32": (59.8, 38.4, 93.7, 92.5, None, None, None),
            "GRPO, strict: pass@32": (61.3, 41.2, 94.8, 93.3, None, None, None),
            "OPEFO: pass@32": (62.4, 43.3, 95.6, 94.1, None, None, None),
        },
    ),
    "steer": Reported(
        "2510.10150, Qwen2.5-Math-7B",
        "temperature 1, top-p .7; avg@32 on AIME and AMC, avg@1 on the others; the checkpoint that is best "
        "on AIME24; mean of 2 runs",
        {
            "base": (13.8, 5.3, 44.6, 39.6, 9.9, 13.8, 21.2),
            "GRPO": (28.0, 14.3, 66.2, 78.6, 37.3, 40.9, 44.2),
            "OPO": (32.2, 13.4, 71.5, 82.2, 38.2, 41.0, 46.4),
            "entropy advantage": (27.5, 13.5, 70.2, 79.6, 36.8, 42.8, 45.1),
            "Clip-Cov": (32.5, 12.9, 68.4, 78.0, 40.8, 41.3, 45.7),
            "KL-Cov": (32.8, 14.1, 64.2, 78.8, 37.1, 39.4, 44.4),
            "STEER": (36.2, 16.1, 72.1, 82.2, 41.7, 43.0, 48.6),
        },
    ),
    "clip_cov": Reported(
        "2505.22617, Qwen2.5 7B and 32B",
        "not recorded here, nor the benchmarks that it averages over",
        {
            "7B: GRPO": _average(38.6), "7B: clip-higher": _average(38.8), "7B: Clip-Cov": _average(40.4),
            "7B: KL-Cov": _average(40.6), "32B: GRPO": _average(45.8), "32B: clip-higher": _average(47.2),
            "32B: Clip-Cov": _average(50.3), "32B: KL-Cov": _average(52.2),
        },
    ),
    "par": Reported(
        "2511.05993 table 2, Qwen2.5-Math-7B",
        "temperature 1, top-p 1; avg@64 on all; validated on AIME25; its own average, of the first five",
        {
            "base": (10.0, 3.8, 30.04, 43.76, 14.41, None, 20.4),
            "GRPO, 1 update": (28.75, 14.69, 64.38, 78.14, 34.64, None, 44.12),
            "PAR, entropy-guided": (34.38, 15.89, 69.34, 75.93, 32.78, None, 45.66),
            "adaptive entropy": (33.96, 18.65, 68.52, 73.98, 31.66, None, 45.35),
            "clip-higher": (33.33, 15.94, 67.62, 72.35, 30.57, None, 43.96),
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """One model on one benchmark: NAME.json holds what was asked for, NAME.jsonl a line for every sample."""

    name: str
    problems: tuple[Problem, ...]  # the raw questions
    settings: dict[str, Any]
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    @property
    def stored(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def step(self) -> int:
        return max(1, self.settings["batch"] // self.settings["samples"])  # problems in a batch

    def begin(self) -> int:
        """Problems done.  ValueError where samples are stored that were drawn with other settings, or are
        damaged.  A batch that a kill cut short is dropped."""
        if self.stored.exists():
            before = json.loads(self.stored.read_text())
            for k in dict.fromkeys([*self.settings, *before]):
                if before.get(k) != self.settings.get(k):
                    raise ValueError(
                        f"--out {self.folder}: {self.name} was begun there with {k} {before.get(k)!r}, not "
                        f"{self.settings.get(k)!r}; give that, or another --out"
                    )
        data = self.path.read_bytes() if self.path.exists() else b""
        n, lines = self.settings["samples"], data.splitlines(keepends=True)
        whole = len(lines) - bool(lines and not lines[-1].endswith(b"\n"))
        done = len(self.problems) if whole >= len(self.problems) * n else whole // n // self.step * self.step
        for i, line in enumerate(lines[: done * n]):
            try:
                row = json.loads(line)
                if (row["problem"], row["sample"]) != divmod(i, n):
                    raise ValueError("out of order")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}: line {i + 1} is damaged ({error}); remove the file") from None
        if data:
            os.truncate(self.path, sum(map(len, lines[: done * n])))
        return done

    def generate(self, engine: Engine, done: int) -> None:
        """Append batch after batch.  A batch's draws depend on the seed and its place only, so that a run
        that was killed ends with the samples of one that was not."""
        from tqdm import tqdm

        s = self.settings
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stored.write_text(json.dumps(s, indent=2) + "\n")
        prompts = render(self.problems, engine.tokenizer, s["template"], s["chat"])
        task, n = math_task(self.name, (), tuple(prompts), s["max_new_tokens"]), s["samples"]
        bar = tqdm(total=len(prompts) * n, initial=done * n, desc=self.name, unit="sample")
        for i in range(done, len(prompts), self.step):
            digest = hashlib.sha256(f"{s['seed']}/{self.name}/{i}".encode()).digest()
            generator = torch.Generator(engine.device).manual_seed(int.from_bytes(digest[:4], "little"))
            part = prompts[i : i + self.step]
            how = (s["temperature"], s["top_p"], generator)
            groups = to_samples((part, answer(engine, task, part, n, *how, entropy=True)), n, i)
            append(self.path, [x for g in groups for x in g])
            bar.update(len(part) * n)
        bar.close()

    def samples(self) -> Groups:
        rows, n = read_jsonl(self.path), self.settings["samples"]
        return [rows[i : i + n] for i in range(0, len(rows), n)]

    def regrade(self) -> int:
        """Grade the stored texts again; how many grades changed."""
        rows = read_jsonl(self.path)
        told = [self.problems[r["problem"]].answer for r in rows]
        right = shared_grader().grade_all([r["text"] for r in rows], told)
        changed = sum(a != r["correct"] for a, r in zip(right, rows))
        part = self.path.with_suffix(".part")
        part.unlink(missing_ok=True)
        append(part, [r | {"correct": a} for a, r in zip(right, rows)])
        part.replace(self.path)
        return changed


def sources(names: Sequence[str], data: Sequence[str]) -> dict[str, str]:
    """benchmark -> where its problems come from: --data NAME=SOURCE, else $ENTROPY_FLOW_DATA/NAME.jsonl.
    Raises ValueError on an unknown name, with the nearest, and where there is no source."""
    given = {}
    for item in data:
        name, eq, source = item.partition("=")
        if not (name and eq and source):
            raise ValueError(f"--data {item}: give NAME=FILE.jsonl, or NAME=owner/dataset@config:split")
        given[name] = source
    for name in names:
        if name not in BENCHMARKS and name not in given:
            near = difflib.get_close_matches(name, [*BENCHMARKS, *given], 1, 0)
            raise ValueError(
                f"--benchmark {name}: unknown; did you mean {near[0]}?  Your own: --data {name}=FILE.jsonl"
            )
        local = Path(os.environ.get("ENTROPY_FLOW_DATA", "")) / f"{name}.jsonl"
        if name not in given and os.environ.get("ENTROPY_FLOW_DATA") and local.is_file():
            given[name] = str(local)
        if name not in given:
            raise ValueError(
                f"--benchmark {name}: its problems are not here; give --data {name}=FILE.jsonl, or "
                f"{name}=owner/dataset@config:split of the hub, or a folder of files in ENTROPY_FLOW_DATA"
            )
    if stray := set(given) - set(names):
        raise ValueError(f"--data {min(stray)}=...: is not among --benchmark {' '.join(names)}; add it there")
    return {name: given[name] for name in names}


def whole_benchmark(name: str, source: str, limit: int) -> tuple[Problem, ...]:
    """All its problems, or the first `limit`.  A row that cannot be read is an error: a benchmark with holes
    is another benchmark."""
    try:
        problems, notes = read_problems(source)
    except ValueError as error:
        raise ValueError(f"--data {name}={error}") from None
    if len(notes) > 1:
        raise ValueError(f"--data {name}={notes[1].replace(' left out', '')}; mend or remove them")
    return tuple(problems[:limit] if limit else problems)


def model_folder(name: str) -> str:
    """A model's folder or hub id; of a training run, its checkpoint."""
    inner = Path(name).expanduser() / "checkpoint"
    return str(inner) if (inner / "config.json").is_file() else name


def open_engine(args: argparse.Namespace, model: str, rendered: Callable[[Any], list[Problem]]) -> Engine:
    """The engine that the flags ask for; `rendered(tokenizer)` gives the prompts, whose longest must fit into
    the model's context together with a response.  Raises ValueError naming the flag."""
    from transformers import AutoConfig, AutoTokenizer

    device, trust = usable_device(args.device), args.trust_remote_code
    try:
        if args.engine == "torch":
            attention = args.attention or own_attention(model, device)
            policy, tokenizer = load_model(model, args.dtype, trust, attention, device)
        else:
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust).get_text_config()
        longest = longest_prompt(rendered(tokenizer), tokenizer, getattr(config, "vocab_size", None))
    except Exception as error:  # missing, gated, damaged: a dozen classes of three libraries
        reason = " ".join(str(error).split()).removeprefix(f"{model}: ")[:300]
        raise ValueError(f"--model {model}: {reason}") from None
    room = (getattr(config, "max_position_embeddings", None) or math.inf) - longest
    if args.max_new_tokens > room:
        raise ValueError(
            f"--max-new-tokens {args.max_new_tokens}: the longest prompt has {longest} tokens, {model} sees "
            f"{longest + room} in all; {f'give {room} at most' if room > 0 else 'take another model'}"
        )
    if args.engine == "torch":
        return TorchEngine(policy, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return VllmEngine(
        model, tokenizer, device=device, dtype=getattr(torch, args.dtype), sleep_level=0,
        max_model_len=longest + args.max_new_tokens, gpu_memory=args.gpu_memory,
        trust_remote_code=trust,
    )  # fmt: skip


def set_threads(n: int, embedded: bool = True) -> None:
    """Threads for tensor work; 0: one for the embedded model, torch's own choice for others."""
    if n or embedded:
        torch.set_num_threads(n or 1)


def usable_device(name: str) -> torch.device:
    """The device of that name. Raises ValueError where nothing can be put on it."""
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: not usable here ({reason}); try --device cpu") from None
    return device


def benchmark(args: argparse.Namespace) -> None:
    """Generate what is missing, then tables, pictures and CSV from the stored samples."""
    problems = {
        name: whole_benchmark(name, source, args.limit)
        for name, source in sources(args.benchmark, args.data or []).items()
    }
    args.dtype = args.dtype or ("float32" if usable_device(args.device).type == "cpu" else "bfloat16")
    out = own_folder(Path(args.out or "runs/benchmarks"))
    results: dict[str, dict[str, dict]] = {}
    for model in args.model:
        path, label = model_folder(model), model.strip("/.").replace("/", "--")
        benches = [make_bench(args, path, name, p, out / label) for name, p in problems.items()]
        done = [b.begin() for b in benches]
        if any(d < len(b.problems) for d, b in zip(done, benches)):
            everything = [p for b in benches for p in b.problems]
            rendered = lambda t: render(everything, t, args.template, not args.plain)  # noqa: B023, E731
            engine = open_engine(args, path, rendered)
            for d, b in zip(done, benches):
                if d < len(b.problems):
                    b.generate(engine, d)
            engine.close()
        groups = {}
        for b in benches:
            if args.regrade:
                print(f"{model} {b.name}: {b.regrade()} grades changed")
            groups[b.name] = b.samples()
            n = b.settings["samples"]
            ks = [k for k in sorted({8, 16, 32, args.k or n}) if 1 < k <= n]
            boxed = lambda text: (last_boxed(text) or "").strip()  # noqa: E731
            results.setdefault(model, {})[b.name] = measure(groups[b.name], ks, str.strip, boxed) | {
                "problems": (len(b.problems), math.nan), "samples": (n, math.nan)
            }  # fmt: skip
        what = "Surprisal -log π of the tokens drawn" if args.engine == "vllm" else "Entropy"
        draw_calibration(groups, boxed, out / label / "calibration.png")
        draw_tokens(groups, token_namer(path, args.trust_remote_code), out / label / "tokens.png", what)
    print_benchmarks(results, args, out)
    for key in args.against or []:
        print_reported(key, list(problems))


def make_bench(
    args: argparse.Namespace, model: str, name: str, problems: tuple[Problem, ...], folder: Path
) -> Bench:
    """With everything that the samples depend on."""
    text = json.dumps([[p.prompt, p.answer, *p.before] for p in problems])
    attention = args.attention or own_attention(model, usable_device(args.device))
    n = args.samples or (args.k or 32 if BENCHMARKS.get(name, 32) > 1 else 1)
    settings = {
        "model": model, "weights": fingerprint(Path(model)), "engine": args.engine,
        "dtype": args.dtype, "temperature": args.temperature, "top_p": args.top_p,
        "seed": args.seed, "samples": n, "max_new_tokens": args.max_new_tokens, "template": args.template,
        "chat": not args.plain,
        "problems": len(problems), "sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
        "batch": args.batch or (512 if args.engine == "vllm" else 128),
    }  # fmt: skip
    if args.engine == "torch" and attention != "sdpa":  # older folders, which name none, have sdpa's
        settings["attention"] = attention
    return Bench(name, problems, settings, folder)


def token_names(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The tokens as the vocabulary has them; <id> for one without a name, since an embedding may have more
    rows than the vocabulary."""
    return [f"<{i}>" if w is None else w for i, w in zip(ids, tokenizer.convert_ids_to_tokens(ids))]


@cache
def token_namer(model: str, trust: bool = False) -> Callable[[int], str]:
    """id -> the token's text; the id itself where the tokenizer cannot be read."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
    except Exception:  # names are a convenience: the numbers do not depend on them
        return str
    return lambda i: tokenizer.decode([i]) or token_names(tokenizer, [i])[0]


TOKENS = ("length", "truncated", "entropy")


def print_benchmarks(results: dict[str, dict[str, dict]], args: argparse.Namespace, out: Path) -> None:
    """The papers' table, in percent, one block a model; where there are several models (checkpoints of
    several seeds), another of means and standard errors over them."""
    every = {x for r in results.values() for m in r.values() for x in m}
    ks = sorted({int(x[5:]) for x in every if x.startswith("pass@")} - {1})
    shown = ["pass@1", *(f"pass@{k}" for k in ks)]
    head = ["benchmark", "problems x samples", "avg@n = pass@1", *shown[1:], "length", "truncated", "entropy"]
    nan, flat = (math.nan, math.nan), []
    for model, benches in results.items():
        body, all_of = [], list(benches.values())
        mean = {x: average([m[x] for m in all_of]) for x in shown if all(x in m for m in all_of)}
        mean |= {x: (sum(m[x][0] for m in all_of) / len(all_of), math.nan) for x in TOKENS}
        benches["average"] = mean | {"problems": nan, "samples": nan}
        for name, m in benches.items():
            cells = [plus_minus(*(100 * v for v in m.get(x, nan)), 1) for x in shown]
            size = f"{m['problems'][0]} x {m['samples'][0]}" if name != "average" else ""
            cells += [number(m["length"][0], 0), number(100 * m["truncated"][0], 1), number(m["entropy"][0])]
            body.append([name, size, *cells])
            flat.append({"model": model, "benchmark": name, **with_errors(m)})
        print(f"\n{model}\n" + aligned(head, body))
    if len(results) > 1:
        body, over = [], f"mean over {len(results)} models"
        for name in next(iter(results.values())):
            of = {x: [r[name].get(x, nan)[0] for r in results.values()] for x in (*shown, *TOKENS)}
            both = {x: mean_se(v) for x, v in of.items()}
            cells = [plus_minus(*(100 * v for v in both[x]), 1) for x in shown]
            cells += [plus_minus(*both["length"], 0), plus_minus(*(100 * v for v in both["truncated"]), 1)]
            body.append([name, *cells, plus_minus(*both["entropy"], 3)])
            flat.append({"model": over, "benchmark": name, **with_errors(both)})
        print(f"\n{over}, standard errors over models\n" + aligned([head[0], *head[2:]], body))
    print(
        f"\nPercent ± standard error over problems (6.2); pass@k unbiased (6.1). Sampled with {args.engine}, "
        f"temperature {args.temperature:g}, top-p {args.top_p:g}, at most {args.max_new_tokens} tokens, "
        f"seed {args.seed}; all settings: {out}/*/*.json"
    )
    kind = (
        "the mean of -log π of the tokens drawn, whose expectation is the entropy"
        if args.engine == "vllm"
        else "exact, of the distribution that tokens were drawn from (after temperature and top-p)"
    )
    print(f"Entropy in nats per token: {kind}. Samples with their grades: {out}/*/*.jsonl")
    write_csv(out / "benchmarks.csv", flat)


def average(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean of m benchmarks and its standard error, √(Σ se²) / m: their problems are independent samples."""
    means, errors = zip(*pairs)
    return sum(means) / len(means), math.sqrt(sum(e * e for e in errors)) / len(means)


def print_reported(key: str, names: Sequence[str]) -> None:
    """A paper's own numbers on the benchmarks named, in percent, and how it sampled."""
    r = REPORTED[key]
    columns = [list(BENCHMARKS).index(x) for x in names if x in BENCHMARKS]
    head = [f"reported: {key}", *(list(BENCHMARKS)[i] for i in columns), "average"]
    cells = [[m, *("–" if v[i] is None else f"{v[i]:.1f}" for i in [*columns, 6])] for m, v in r.rows.items()]
    print(f"\n{aligned(head, cells)}\n{r.paper}. Sampling: {r.sampling}.")


# ------------------------------------------------------------------------------------------------------------
# 7. Tokens in the colour of their entropy flow


@dataclass(frozen=True)
class Coloured:
    """A response: what it answers, whether it is right, and the flow of each token, nats per unit learning
    rate (positive raises entropy)."""

    prompt: str
    reward: float
    tokens: Sequence[str]
    flow: Sequence[float]


def logged_flows(path: Path) -> tuple[list[Coloured], str]:
    """The last entry of flows.jsonl: the network flow that `train.py --ledger full` booked."""
    rows = read_jsonl(path)
    rows = [r for r in rows if r["step"] == rows[-1]["step"]]
    what = f"network flow of step {rows[-1]['step']}, from {path}"
    for r in rows:  # a token without a name was once written as null
        r["tokens"] = ["<?>" if w is None else w for w in r["tokens"]]
    keys = ("prompt", "reward", "tokens", "network_flow")
    return [Coloured(*(r[k] for k in keys)) for r in rows], what


def own_task(record: Record, tokenizer: Any) -> Task:
    """What a language model was trained on, from the files that its run names."""
    s = record.settings
    names = ("data", "eval_data", "eval_problems", "prompt_template")
    chat, limits = s["chat"] == "auto", (s["max_prompt_tokens"], s["max_new_tokens"])
    return task_of_data(tokenizer, *(s[name] for name in names), chat, *limits)[0]


@torch.no_grad()
def fresh_flows(
    record: Record, seed: int = 0, attention: str = "", prompts: int = 32, n: int = 16
) -> tuple[list[Coloured], str]:
    """The exact flow of a table, entropy_math (3.2), of the tokens of a fresh batch: what one step of GRPO on
    it, at the run's temperature, would do to entropy.  Of each of the first 8 problems with right and wrong
    answers, the response that moves entropy most."""
    model, tokenizer = load_policy(record.folder, attention)
    task = own_task(record, tokenizer) if record.task else chain_task()
    prompts, generator = min(prompts, len(task.test)), torch.Generator().manual_seed(seed)
    tau, engine = record.settings.get("temperature", 1.0), TorchEngine(model, tokenizer)
    out = answer(engine, task, task.test[:prompts], n, tau, generator=generator)
    stats = score(model, *out.full_ids(tokenizer.pad_token_id), out.ids, out.mask, tau)
    reward = out.correct.double().view(-1, n)
    adv = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)  # grpo (2.1)
    flow = torch.where(out.mask, entropy_change(stats, adv.view(-1, 1)), 0)  # (B, T)
    flow = flow / out.mask.sum()  # token mean
    best = flow.abs().sum(1).view(-1, n).max(1)
    rows = [p * n + int(best.indices[p]) for p in range(prompts) if best.values[p] > 0][:8]
    found = []
    for i in rows:
        m = out.mask[i]
        words = token_names(tokenizer, out.ids[i][m].tolist())
        prompt = task.test[i // n].prompt
        found.append(Coloured(prompt, float(out.correct[i]), words, flow[i][m].tolist()))
    return found, f"exact flow of a table, fresh batch of {prompts} x {n} from {record.folder}/checkpoint"


def tidy(token: str) -> str:
    """A token as it may be printed: byte-level marks as what they stand for, control characters visible."""
    token = token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "⏎").replace("\n", "⏎")
    return "".join(c if c.isprintable() else "·" for c in token)


def shade(flow: float, top: float) -> tuple[int, int, int]:
    """White at 0 to full red (raises entropy) or blue (lowers it) at ±top; by the square root, since a few
    tokens carry most of the flow."""
    fade = round(255 - 175 * math.sqrt(min(1.0, abs(flow) / top))) if top else 255
    return (255, fade, fade) if flow > 0 else (fade, fade, 255)


def glue(words: Sequence[str]) -> str:
    """Between tokens: nothing where they bring their own blanks."""
    return "" if any(w.startswith(("Ġ", "▁", " ")) for w in words) else " "


def terminal(rows: Sequence[Coloured], colour: bool) -> str:
    """With ANSI colours, or with each token's flow in percent of the largest."""
    top = max((abs(f) for r in rows for f in r.flow), default=0.0)
    lines = []
    for r in rows:
        cells = []
        for word, f in zip(r.tokens, r.flow):
            red, green, blue = shade(f, top)
            plain = f"{tidy(word)}({100 * f / top if top else 0:+.0f})"
            cells.append(f"\x1b[30;48;2;{red};{green};{blue}m{tidy(word)}\x1b[0m" if colour else plain)
        lines += [f"{tidy(r.prompt)}   reward {r.reward:g}", "  " + glue(r.tokens).join(cells), ""]
    return "\n".join(lines)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Entropy flow</title>
<style>body{{font:16px/2 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;background:#fff;color:#000}}
span{{padding:.15em .2em;border-radius:.2em;white-space:pre-wrap}}p{{margin:.2em 0 1.2em}}</style>
<h1>Entropy flow, token by token</h1>
<p><span style="background:rgb(255,80,80)">raises entropy</span>
<span style="background:rgb(80,80,255)">lowers it</span>; the colour goes with the square root of the flow,
full at {top:.3g} nats per unit learning rate. Point at a token for its number. {what}.</p>
{body}
</html>
"""


def page(rows: Sequence[Coloured], what: str) -> str:
    """A self-contained HTML page; everything that comes from a model is escaped."""
    top = max((abs(f) for r in rows for f in r.flow), default=0.0)
    body = []
    for r in rows:
        spans = [
            f'<span title="{f:+.3g}" style="background:rgb{shade(f, top)}">{html.escape(tidy(w))}</span>'
            for w, f in zip(r.tokens, r.flow)
        ]
        text = glue(r.tokens).join(spans)
        body.append(f"<b>{html.escape(r.prompt)}</b> (reward {r.reward:g})<p>{text}</p>")
    return PAGE.format(top=top, what=html.escape(what), body="\n".join(body))


def show(record: Record, seed: int, attention: str, out: Path) -> None:
    """Coloured responses on the terminal and in flow.html: of flows.jsonl, else fresh ones."""
    flows = record.folder / "flows.jsonl"
    rows, what = logged_flows(flows) if flows.is_file() else fresh_flows(record, seed, attention)
    print(f"{what}; red raises entropy, blue lowers it\n")
    print(terminal(rows, sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    (out / "flow.html").write_text(page(rows, what), encoding="utf-8")
    print(f"page: {out / 'flow.html'}")


# ------------------------------------------------------------------------------------------------------------
# 8. The command line and the demonstration

MARK = "eval.json"  # in every folder that this file writes to


def command_line(
    kind: type, prog: str, argv: Sequence[str] | None, absent: dict[str, str] | None = None
) -> Any:
    """A dataclass filled by tyro from the words of a command line: fields are flags, their docstrings the
    help, nested dataclasses its groups.  tyro's framed complaint becomes one line, with exit code 2; `absent`
    are flags that one may look for, and why there are none."""
    words = sys.argv[1:] if argv is None else list(argv)
    for word in words:
        if why := (absent or {}).get(word.split("=")[0]):
            print(f"{prog}: error: {word}: {why}", file=sys.stderr)
            raise SystemExit(2)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            style = tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff
            return tyro.cli(kind, prog=prog, args=words, config=style)
    except SystemExit as end:
        if end.code:
            rule = re.compile(
                "[│╭╮╰╯─ -]*"
            )  # the frame's, or what ASCII has instead; the first line is its title
            lines = said.getvalue().splitlines()[1:]
            text = " ".join(";" if rule.fullmatch(line) else line.strip("│ ") for line in lines)
            text = re.split("For full helptext|Argument helptext", re.sub("[; ]*; *", "; ", text))[0]
            print(f"{prog}: error: {text.strip('; ')}  (see --help)", file=sys.stderr)
        raise


class Parser(argparse.ArgumentParser):
    """Complains in one line that names the flag and the nearest, instead of a page of usage."""

    absent: dict[str, str] = {}  # flags that one may look for, and why there are none

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, 1, 0)
            self.error(f"{unknown[0]}: {self.absent.get(name) or f'unknown; did you mean {near[0]}?'}")
        return found

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}  (--help shows all flags)\n")


def own_folder(path: Path) -> Path:
    """Made if it is not there.  ValueError where it holds anything that this file did not write."""
    if path.is_dir() and any(path.iterdir()) and not (path / MARK).is_file():
        raise ValueError(f"--out {path}: holds files that eval.py did not write; choose another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / MARK).write_text(json.dumps({"command": sys.argv}, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"--out {path}: {error.strerror}; choose another folder") from None
    return path


SWITCH = {"action": "store_true"}
FLAGS: dict[str, list[tuple[str, Any, str]]] = {
    "finished runs": [
        ("runs", {"nargs": "*"}, "folders that train.py made; a comparison counts as its members"),
        ("--temperatures", {"nargs": "+", "type": float, "metavar": "T"},
         "also sample at these; name the runs first"),
        ("--sample", SWITCH, "fresh samples of every run; without it of a single run only"),
        ("--law", SWITCH, "fit R = -a e^H + b to the first 15 %% of each run"),
        ("--show", SWITCH, "colour the tokens of a run by their entropy flow"),
    ],
    "sampling": [
        ("--k", int, "the largest k of pass@k (default: 32)"),
        ("--samples", int, "samples per problem (default: k; on the large benchmarks 1)"),
        ("--temperature", {"type": float, "default": 1.0}, "default: 1"),
        ("--top-p", {"type": float, "default": 1.0}, "default: 1, no truncation; the papers use .7"),
        ("--seed", {"type": int, "default": 0}, "default: 0"),
        ("--length", {"type": int, "default": 0},
         "tokens that diversity looks at (default: what 90 %% of responses have)"),
    ],
    "benchmarks": [
        ("--model", {"nargs": "+", "metavar": "FOLDER_OR_ID"}, "several: a mean over them too"),
        ("--benchmark", {"nargs": "+", "metavar": "NAME"}, f"of {', '.join(BENCHMARKS)}, or of --data"),
        ("--data", {"nargs": "+", "metavar": "NAME=SOURCE"},
         ".jsonl, .json, .csv or .parquet file, or owner/dataset@config:split of the hub (default: "
         "$ENTROPY_FLOW_DATA/NAME.jsonl)"),
        ("--against", {"nargs": "+", "choices": list(REPORTED)}, "print what these papers report"),
        ("--limit", {"type": int, "default": 0}, "only the first LIMIT problems of each"),
        ("--regrade", SWITCH, "grade the stored samples again"),
        ("--engine", {"choices": ["torch", "vllm"], "default": "torch"}, "default: torch"),
        ("--max-new-tokens", {"type": int, "default": 3072}, "default: 3072, as in STEER's training"),
        ("--template", {"default": PROMPT_TEMPLATE}, "with {problem} in it (default: %(default)r)"),
        ("--plain", SWITCH, "no chat template, even where the tokenizer has one"),
        ("--dtype", {"choices": ["float32", "bfloat16", "float16"]},
         "default: float32 on a CPU, bfloat16 on a GPU"),
        ("--batch", {"type": int, "default": 0},
         "responses at once, the most that a kill loses (default: 128; vllm: 512)"),
        ("--gpu-memory", {"type": float, "default": 0.9}, "share for vLLM (default: .9)"),
        ("--trust-remote-code", SWITCH, "run code that comes with the model"),
    ],
    "machine and files": [
        ("--attention", {"choices": ["sdpa", "flash_attention_2", "eager"], "default": ""},
         "of --show and of benchmarks with --engine torch (default: that of a run's checkpoint, else sdpa)"),
        ("--device", {"default": "auto"}, "cpu, cuda, ... (default: a GPU if there is one)"),
        ("--threads", {"type": int, "default": 0}, "CPU threads (default: embedded runs 1, else torch's)"),
        ("--out", {"metavar": "FOLDER"}, "default: runs/compare, a single run's eval/, runs/benchmarks"),
    ],
}  # fmt: skip


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="eval.py",
        usage="eval.py [runs ...] [flags]",
        description="Numbers that can be trusted, on finished runs and on benchmarks.",
        epilog="examples:\n"
        "  python eval.py                               the estimators, shown on made-up counts\n"
        "  python eval.py runs/opefo-s0                 one run: its log, samples, diversity, calibration\n"
        "  python eval.py runs/*                        methods over seeds, the frontier, from the logs\n"
        "  python eval.py runs/* --temperatures .5 .6 .8 1 1.2     the frontier over test temperatures too\n"
        "  python eval.py --law runs/grpo-*             does R = -a e^H + b predict the rest of a run?\n"
        "  python eval.py --show runs/opefo-s0          responses in the colours of their entropy flow\n"
        "  python eval.py --model FOLDER_OR_ID --benchmark aime24 aime25 amc23 math500 minerva \\\n"
        "      olympiadbench --k 32 --engine vllm --data aime24=aime24.jsonl ... --against opefo steer\n\n"
        "The same command again goes on where a kill stopped it, and once all is sampled computes without a "
        "model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for title, flags in FLAGS.items():
        group = p.add_argument_group(title)
        for name, how, text in flags:
            how = {"type": how} if isinstance(how, type) else how
            group.add_argument(name, **how, help=text)
    return p


def check(args: argparse.Namespace) -> None:
    """ValueError on the first impossible value or combination, naming flag, value and remedy."""
    for name in ("k", "samples", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for name in ("limit", "batch", "threads", "seed", "length"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name)}: must not be negative")
    for t in [args.temperature, *(args.temperatures or [])]:
        if not 1e-3 <= t <= 1e3:
            raise ValueError(f"--temperature {t:g}: must lie between 0.001 and 1000")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p {args.top_p:g}: must lie above 0 and be at most 1")
    if args.k and args.samples and args.k > args.samples:
        raise ValueError(f"--k {args.k}: larger than --samples {args.samples}; draw at least k a problem")
    if bool(args.model) != bool(args.benchmark):
        given, missing = ("model", "benchmark") if args.model else ("benchmark", "model")
        raise ValueError(f"--{given} {' '.join(getattr(args, given))}: needs --{missing} too")
    if "{problem}" not in args.template:
        raise ValueError(f"--template {args.template!r}: needs {{problem}}, where the question goes")
    if args.model and (args.runs or args.law or args.show or args.sample or args.temperatures):
        raise ValueError(f"--model {args.model[0]}: benchmarks or runs, not both; leave one out")
    default = parser().get_default
    for flag in () if args.model else (name for name, *_ in FLAGS["benchmarks"]):
        name = flag[2:].replace("-", "_")
        if getattr(args, name) != default(name):
            raise ValueError(f"{flag}: for benchmarks only; name --model and --benchmark, or leave it out")
    if args.attention and not (args.show or (args.model and args.engine == "torch")):
        raise ValueError(f"--attention {args.attention}: of --show and of --engine torch only; leave it out")
    if (args.law or args.show or args.sample or args.temperatures) and not args.runs:
        raise ValueError("no run named: give folders that train.py made, before --temperatures")


def runs(args: argparse.Namespace) -> None:
    """Everything about finished runs."""
    records, notes = find_records(args.runs)
    set_threads(args.threads, embedded=not any(r.settings.get("model") for r in records))
    for note in notes:
        print(note, file=sys.stderr)
    alone = len(records) == 1
    out = own_folder(Path(args.out or (records[0].folder / "eval" if alone else "runs/compare")))
    if args.show:
        if not alone:
            raise ValueError(f"--show: {len(records)} runs; name one, e.g. {records[0].folder}")
        return show(records[0], args.seed, args.attention, out)
    if args.law:
        law(records, out)
    else:
        tasks = {r.task: [x for x in records if x.task == r.task] for r in records}
        for i, (task, members) in enumerate(tasks.items(), 1):  # no frontier lies in two sets of problems
            place = out
            if len(tasks) > 1:
                place = own_folder(out / f"{i}-{Path(task).name or 'embedded'}")
                print(f"\n== {task or 'the embedded task'}: {len(members)} of {len(records)} runs\n")
            compare(args, grouped(members), place)
        if alone or args.sample:
            sample_runs(args, records, args.k or 32, out)
    print(f"\npictures and CSV: {out}")


def compare(args: argparse.Namespace, groups: dict[str, list[Record]], out: Path) -> None:
    """The tables and the frontier: along training from the logs, over temperatures from fresh samples."""
    records = [r for g in groups.values() for r in g]
    if len(records) == 1:
        log = table({records[0].spec: list(records[0].rows)})
        print(f"The run's log: first and last evaluation\n\n{log}\n")
    else:
        rows = comparison(groups)
        print_comparison(groups, rows)
        write_csv(out / "comparison.csv", rows)
    sampled, panels, found = {}, [], []
    if args.temperatures:
        n = args.samples or args.k or 32
        sampled = over_temperatures(groups, sorted(args.temperatures), n, args.top_p, args.seed, out)
    low, high = min(args.temperatures or [1]), max(args.temperatures or [1])
    titles = {
        "step": "along training (large: end)",
        "temperature": f"test temperatures {low:g} to {high:g} (large)",
    }
    for along, title in titles.items():
        for prefix in ("", "hard_"):
            if along == "step":
                k = logged_k(records, args.k)
                points = training_points(groups, prefix, k) if len(groups) > 1 else []
            else:
                k = args.k or args.samples or 32
                points = [point(label, t, e, prefix, k) for (label, t), e in sampled.items()]
            if points:
                name = f"{prefix.rstrip('_') or 'held-out'} problems"
                rows = frontier(groups, points, along)
                print_frontier(
                    rows, k, f"{name}, {'end of training' if along == 'step' else 'test temperatures'}"
                )
                found += [{"problems": name, "k": k, **r} for r in rows]
                panels.append((f"{name}, {title}", along, k, points))
    if panels:
        draw_frontier(panels, groups, out / "frontier.png")
        write_csv(out / "frontier.csv", found)


def logged_k(records: Sequence[Record], asked: int | None) -> int:
    """The k of pass@k that all logs can tell: what was asked for where right samples were counted problem by
    problem, else the k that was logged.  ValueError where they cannot tell what was asked for."""
    rows = [e for r in records for e in r.evaluations]
    logged = min(int(e.get("k", 1)) for e in rows)
    if asked and asked != logged and (asked > logged or not all("right" in e for e in rows)):
        raise ValueError(f"--k {asked}: the logs tell pass@{logged}; leave --k out, or name a single run")
    return asked or min(32, logged)


def sample_runs(args: argparse.Namespace, records: Sequence[Record], k: int, out: Path) -> None:
    """Fresh samples of every run: tables, calibration, forking tokens."""
    n = args.samples or k
    print(
        f"Fresh samples: {n} per problem, temperature {args.temperature:g}, top-p {args.top_p:g}, no top-k, "
        f"seed {args.seed}\n"
    )
    sets = {str(r.folder): fresh(r, n, args.temperature, args.top_p, args.seed) for r in records}
    print_samples(sets, [x for x in sorted({8, 16, 32, k}) if 1 < x <= n], args.length, out)
    test = {Path(x).name if len(sets) == 1 else x: groups[""] for x, groups in sets.items()}
    name = token_namer(str(records[0].folder / "checkpoint"))
    draw_calibration(test, chain_task().signature, out / "calibration.png")
    draw_tokens(test, name, out / "tokens.png", "Entropy")
    for label, groups in test.items():
        words = " ".join(f"{f['token'].strip()} ({f['forks']})" for f in fork_table(groups, name))
        print(f"{label}: tokens drawn most often at forks, the top 20 % by entropy (6.7): {words}")


def demonstrate() -> None:
    """What the estimators do, on made-up counts."""
    print("pass@8 of a problem solved with probability .1 a try, from n samples: mean over their right count")
    q, k = 0.1, 8
    for n in (8, 16, 32, 128):
        weight = [math.comb(n, c) * q**c * (1 - q) ** (n - c) for c in range(n + 1)]
        unbiased = sum(w * pass_at_k(n, c, k) for c, w in enumerate(weight))
        plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weight))
        truth = 1 - (1 - q) ** k
        print(f"  n = {n:3}: (6.1) {unbiased:.3f}, 1 - (1 - c/n)^k {plug_in:.3f}, truth {truth:.3f}")
    print("\nTwo policies with the same pass@1, 100 problems, 32 samples each")
    for name, counts in (("sure", [32] * 40 + [0] * 60), ("broad", [13] * 98 + [3] * 2)):
        both = [sum(pass_at_k(32, c, k) for c in counts) / 100 for k in (1, 32)]
        print(f"  {name:6} pass@1 {both[0]:.3f}   pass@32 {both[1]:.3f}")
    print("\nHow often a paired 95 % interval (6.3) holds the truth, normal differences, 400 repetitions")
    rng = np.random.default_rng(0)
    for n in (3, 5, 10, 20):
        found = [paired(rng.normal(size=n), [0] * n, 1000) for _ in range(400)]
        hits = [low <= 0 <= high for _, low, high in found]
        print(f"  {n:2} seeds: {np.mean(hits):.2f}")
    print("\nOn your own runs: python eval.py runs/*        all flags: python eval.py --help")


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad input, 130 stopped by the user."""
    args = parser().parse_args(argv)
    try:
        check(args)
        if args.model:
            set_threads(args.threads, embedded=False)
            benchmark(args)
        elif args.runs:
            runs(args)
        else:
            demonstrate()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
