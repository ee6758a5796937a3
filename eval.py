"""Chapter 6. Evaluation: what a policy can do at the first try, and what it can still do at all.

Claim. pass@1 alone cannot see a collapse.  A policy that puts all its probability on one answer per problem
and one that spreads it over many may solve equally often at the first try; only the second finds new answers
when it is asked again, and only the second has anything left to reinforce.  And a table at equal steps cannot
tell a remedy from a smaller learning rate: what learns less also collapses less.  So remedies are compared
with plain GRPO at several learning rates, at equal pass@1.

    1  what a policy can do: unbiased pass@k, distinct right answers                             (6.1)
    2  how sure one can be: standard errors, the paired bootstrap                                (6.2) (6.3)
    3  diversity and calibration: distinct-n, calibration error, forking tokens                  (6.4) - (6.7)
    4  tables, files, and the picture of one training call
    5  comparing runs: methods over seeds, the frontier of plain GRPO, the law R = -a e^H + b    (6.8) (6.9)
    6  fresh samples of a run: over test temperatures, calibration, forks, the flow of each token
    7  six benchmarks, resumable, beside the papers' numbers
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

import contextlib
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
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

if __name__ == "__main__":  # Ctrl-C in the seconds that the imports below take
    said = b"stopped; nothing was written yet\n"
    signal.signal(signal.SIGINT, lambda *_: os.write(2, said) and os._exit(130))

import numpy as np
import pandas as pd
import torch
import tyro
from torch import nn

from entropy_math import TokenStats, check_entropy_law, entropy_change
from grpo import Tokens, group_advantages
from rollout import (
    PROMPT_TEMPLATE,
    Engine,
    Policy,
    Problem,
    Sampling,
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


Part = tuple[Sequence[Problem], Tokens, list[str]]  # some problems, and n responses to each, B rows


def responses(
    engine: Engine, task: Task, problems: Sequence[Problem], how: Sampling, generator: Any, rows: int = 1024
) -> Iterator[Part]:
    """how.n responses to every problem, at most about `rows` at a time."""
    step = max(1, rows // how.n)
    for i in range(0, len(problems), step):
        part = problems[i : i + step]
        yield part, *answer(engine, task, part, how, generator)


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
    how = Sampling(k, task.max_new_tokens, temperature, top_p, entropy=True)
    result: dict[str, Any] = {"k": k}
    for prefix, problems in (("", task.test), ("hard_", task.hard)):
        if not problems:
            continue
        parts = list(responses(engine, task, problems, how, generator, rows))
        result |= {prefix + name: value for name, value in _summary(task, parts, k).items()}
        if not prefix:
            result["samples"] = _samples(*parts[0], k)
    return result


def _summary(task: Task, parts: list[Part], k: int) -> dict[str, Any]:
    """Means over problems of the metrics of `evaluate`."""
    solved, distinct, nats, tokens, rows = [], [], 0.0, 0, 0
    for _, out, texts in parts:
        right = out.correct.view(-1, k).tolist()
        solved += [sum(r) for r in right]
        distinct += [distinct_correct(task, texts[i * k : (i + 1) * k], r) for i, r in enumerate(right)]
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


def _samples(
    problems: Sequence[Problem], out: Tokens, texts: list[str], k: int, each: int = 4
) -> list[dict[str, Any]]:
    """The first responses to the first two problems, for reading."""
    return [
        {
            "prompt": problems[i // k].prompt,
            "answer": problems[i // k].answer,
            "response": texts[i],
            "correct": bool(out.correct[i]),
            "truncated": bool(out.truncated[i]),
            "tokens": int(out.mask[i].sum()),
        }
        for p in range(min(2, len(problems)))
        for i in range(p * k, p * k + min(each, k))
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
    v = pd.Series(values, dtype=float)
    return float(v.mean(skipna=False)), float(v.sem(skipna=False))


def resample(n: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(1 + draws, n) bootstrap weights: row 0 is the data as they are, every other row n picks with
    replacement."""
    return np.vstack([np.full((1, n), 1 / n), rng.multinomial(n, np.full(n, 1 / n), draws) / n])


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
    low, high = np.percentile(resample(len(d), draws, np.random.default_rng(0))[1:] @ d, [2.5, 97.5])
    return float(d.mean()), float(low), float(high)


# ------------------------------------------------------------------------------------------------------------
# 3. Diversity and calibration
#
# A sample is what is kept of one response, a dictionary that fits in a line of JSON: problem, sample (their
# numbers), correct, truncated, logp (Σ log π of its tokens), ids, nats (the entropy at each token), text.

Sample = dict[str, Any]
Groups = list[list[Sample]]  # problems x samples


def to_samples(part: Part, k: int, first: int = 0) -> Groups:
    """The responses to some problems, of which the first has the number `first`."""
    _, out, texts = part
    logp = torch.where(out.mask, out.rollout_logp, 0).sum(-1, dtype=torch.float64).tolist()
    nats = out.entropy.double()
    rows = [
        {
            "problem": first + i // k,
            "sample": i % k,
            "correct": bool(out.correct[i]),
            "truncated": bool(out.truncated[i]),
            "logp": round(logp[i], 5),
            "ids": out.ids[i][m].tolist(),
            "nats": [round(x, 5) for x in nats[i][m].tolist()],
            "text": texts[i],
        }
        for i, m in enumerate(out.mask)
    ]
    return [rows[i : i + k] for i in range(0, len(rows), k)]


def distinct_n(texts: Sequence[Sequence[int]], n: int) -> float:
    """distinct-n = different n-grams / all n-grams of the responses to one problem   1510.03055 (6.4)

    1 if no n-gram occurs twice.  Falls with length and with the number of texts: compare at equal ones only.
    """
    grams = [tuple(t[i : i + n]) for t in texts for i in range(len(t) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


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
    samples = [s for g in groups for s in g]
    tokens = pd.DataFrame({x: [v for s in samples for v in s[x]] for x in ("ids", "nats")})
    fork = tokens["nats"] >= forking(tokens["nats"].to_numpy())
    top = tokens[fork].groupby("ids", sort=False)["nats"].agg(["size", "mean"])
    top = top.sort_values("size", ascending=False, kind="stable").head(count)
    seen = tokens["ids"].value_counts()
    return [
        {"token": name(i), "forks": int(n), "entropy": mean, "share_forks": float(n / seen[i])}
        for i, n, mean in top.itertuples()
    ]


def measure(
    groups: Groups, ks: Sequence[int], key: Callable[[str], str], vote: Callable[[str], str], length: int = 0
) -> dict[str, float]:
    """Everything that samples tell: means over problems, and beside each, as "NAME se", its error (6.2).

    groups: P problems with n samples each.  pass@1 (= avg@n) and pass@k for every k of `ks` that n allows;
    distinct_correct by `key`; entropy (nats, the mean over all tokens, its error linearised as of a ratio),
    length (tokens), truncated (share); distinct-1 to -3 of the first `length` tokens (0: the common length)
    of the responses that have as many; the two calibration errors (no standard error), the votes counted by
    `vote`.
    """
    n, out = min(map(len, groups)), {}
    right = [sum(s["correct"] for s in g) for g in groups]
    tokens = np.array([sum(len(s["ids"]) for s in g) for g in groups], dtype=float)
    nats = np.array([sum(map(sum, (s["nats"] for s in g))) for g in groups])
    H = float(nats.sum() / max(1.0, tokens.sum()))
    length = length or common_length(groups)
    texts = [[s["ids"][:length] for s in g if len(s["ids"]) >= length] for g in groups]
    texts = [t for t in texts if len(t) > 1]
    each = {f"pass@{k}": [pass_at_k(n, c, k) for c in right] for k in [1, *ks] if k <= n} | {
        "distinct_correct": [len({key(s["text"]) for s in g if s["correct"]}) for g in groups],
        "entropy": (nats - H * tokens) / max(1.0, tokens.mean()),
        "length": tokens / n,
        "truncated": [sum(s["truncated"] for s in g) / n for g in groups],
        **{f"distinct-{m}": [distinct_n(t, m) for t in texts] for m in (1, 2, 3)},
    }
    for name, values in each.items():
        out[name], out[f"{name} se"] = mean_se(values)
    out["entropy"] = H
    for name in ("vote", "likelihood"):
        pair = confidences(groups, vote).get(name)
        out[f"ece_{name}"] = calibration_error(*pair) if pair else math.nan
    return out | {"common_length": length}


# ------------------------------------------------------------------------------------------------------------
# 4. Tables, files, and the picture of one training call


def shown(rows: Sequence[dict[str, Any]], columns: dict[str, str] | Sequence[str]) -> str:
    """Rows as a table in plain text; `columns`: keys, and what to call them.

    In the cell of KEY stands also its standard error, "KEY se".  In that of "KEY diff", with a sign, its
    interval: "KEY low", "KEY high".  A name that ends in % is shown in percent.
    """
    names = columns if isinstance(columns, dict) else {key: key.replace("_", " ") for key in columns}

    def cell(row: dict[str, Any], key: str) -> str:
        x, base = row.get(key, ""), key.removesuffix(" diff")
        if not isinstance(x, float):
            return str(x)
        if math.isnan(x):
            return "–"
        scale, digits = (100, 1) if names[key].endswith("%") else (1, 1 if key == "length" else 3)
        se, low, high = (scale * row.get(f"{base} {end}", math.nan) for end in ("se", "low", "high"))
        if base != key:
            return f"{scale * x:+.{digits}f}" + ("" if math.isnan(low) else f" [{low:+.3f}, {high:+.3f}]")
        return f"{scale * x:.{digits}f}" + ("" if math.isnan(se) else f" ± {se:.{digits}f}")

    first, *rest = names
    frame = pd.DataFrame([[cell(r, key) for key in rest] for r in rows], columns=[names[x] for x in rest])
    frame.index, frame.columns.name = pd.Index([cell(r, first) for r in rows], dtype=object), names[first]
    return frame.to_string()


def write_csv(path: Path, rows: Any) -> None:
    """One column for every key of any row that holds a number or a word."""
    pd.DataFrame(rows).dropna(axis=1, how="all").to_csv(path, index=False, float_format="%.6g")


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add lines of JSON in one write and wait until they are on the disk; NaN and infinity become null.  A
    line that a kill cut short is cut off first, so that nothing is glued to it."""
    plain = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in rows
    ]
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in plain)
    with open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        if file.read() not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(text.encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file; a last line that a kill cut short is dropped.  Raises ValueError naming the
    line of any other damage."""
    rows, lines = [], path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
            if rows and not isinstance(rows[-1], dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is damaged ({str(error)[:80]}); remove it") from None
    return rows


def save(fig: Any, path: Path) -> None:
    """Written under another name and renamed: a picture is never half there."""
    part = path.with_name(f".{path.name}.{os.getpid()}.png")
    fig.savefig(part, dpi=110)
    part.replace(path)


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


def figure(width: float, height: float, rows: int, columns: int, **how: Any) -> tuple[Any, Any]:
    """A figure and its axes (rows, columns), each with a grid."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **how)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
    return fig, axes


def series(rows: list[dict[str, Any]], key: str) -> pd.Series:
    """step -> value, of the rows that have a finite number there."""
    values = pd.Series({r["step"]: r.get(key) for r in rows}, dtype=float)
    return values[np.isfinite(values)]


def smooth(values: pd.Series) -> pd.Series:
    """Exponential moving average for the eye; the files hold the raw numbers."""
    return values.ewm(alpha=0.2, adjust=False).mean()


def logged_k(runs: dict[str, list[dict[str, Any]]]) -> int | str:
    """The k of the pass@k in some logs."""
    return next((r["k"] for rows in runs.values() for r in rows if "k" in r), "k")


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """entropy.png: entropy, pass@1 and pass@k, the plane of both, and one panel of flows a method."""
    from matplotlib.figure import Figure

    columns, k = min(4, len(runs)), logged_k(runs)
    lines = math.ceil(len(runs) / columns)
    fig = Figure(figsize=(4.6 * max(3, columns), 4.2 + 2.9 * lines), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=[4.2, 2.9 * lines])
    entropy, progress, plane = top.subplots(1, 3)
    for i, (label, rows) in enumerate(runs.items()):
        look, values = style(i), series(rows, "entropy")
        entropy.plot(values, alpha=0.2, linewidth=0.8, color=look["color"])
        entropy.plot(smooth(values), label=label, **look)
        one, several = series(rows, "pass@1"), series(rows, "pass@k")
        progress.plot(one, marker="o", markersize=3.5, **look)
        progress.plot(several, marker="^", markersize=3.5, **look)
        plane.plot(*(both := pd.concat([one, several], axis=1).dropna().T.to_numpy()), marker="o", **look)
        plane.plot(*both[:, -1:], marker="s", markersize=8, color=look["color"])
    entropy.set(title="Entropy on the training batch", xlabel="step", ylabel="nats per token")
    entropy.set_ylim(bottom=0)
    entropy.legend(fontsize=8)
    title = f"Held-out: pass@1 (circles), pass@{k} (triangles)"
    progress.set(title=title, xlabel="step", ylabel="share of problems", ylim=(0, 1.02))
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
        sizes = [series(rows, key).abs().max() for rows in runs.values() for key in keys]
        return 1.1 * max((x for x in sizes if x > 0), default=1.0)

    top, change_top = largest("flow_up", "flow_down"), largest("dH_measured")
    for ax in axes.flat[len(runs) :]:
        ax.set_axis_off()
    for ax, (label, rows) in zip(axes.flat, runs.items()):
        both = pd.concat([series(rows, x) for x in ("flow_up", "flow_down")], axis=1).dropna()
        up, down = smooth(both[0]), smooth(both[1])
        ax.fill_between(both.index, 0, up, color="#bbbbbb", label="up")
        ax.fill_between(both.index, 0, -down, color="#666666", label="down")
        ax.plot(up - down, color="black", linewidth=1.2, label="net")
        ax.set(title=f"{label}: entropy flow", xlabel="step", ylim=(-top, top))
        ax.set_ylabel("flow, nats per unit learning rate")
        ax.legend(fontsize=7, loc="upper right", ncols=3)
        right = ax.twinx()
        right.plot(series(rows, "dH_measured"), ".", color="#d55e00", markersize=5)
        right.set_ylim(-change_top, change_top)
        right.set_ylabel("measured change, nats (dots)", color="#d55e00", fontsize=8)


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Start and end of what matters, one line a method."""
    k, body = logged_k(runs), []
    keys = {"eval_entropy": "entropy", "pass@1": "pass@1", "pass@k": f"pass@{k}",
            "hard_pass@k": f"hard pass@{k}", "distinct_correct": "distinct right"}  # fmt: skip
    for label, rows in runs.items():
        if marks := [r for r in rows if "pass@1" in r]:
            a, b, last = marks[0], marks[-1], rows[-1]["step"]
            row = {key: f"{a[key]:.3f} → {b[key]:.3f}" for key in keys if key in a}
            row["steps"] = last if b["step"] == last else f"{last} (evaluated at {b['step']})"
            body.append(row | {"method": label, "seconds": f"{sum(r.get('seconds', 0) for r in rows):.0f}"})
    return shown(body, {"method": "method", **keys, "steps": "steps", "seconds": "seconds"})


# ------------------------------------------------------------------------------------------------------------
# 5. Comparing runs

METRICS = ("eval_entropy", "pass@1", "pass@k", "hard_pass@1", "hard_pass@k", "distinct_correct")
BOOKKEEPING = {"method", "device", "threads", "micro_batch", "ledger", "ledger_every", "eval_every"}
MARK = "eval.json"  # in every folder that this file writes to


@dataclass(frozen=True)
class Record:
    """A run as its folder tells it."""

    folder: Path
    spec: str  # the method with its options, as on the command line
    settings: dict[str, Any]
    rows: list[dict[str, Any]]  # metrics.jsonl

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
        return [r for r in self.rows if "pass@1" in r]


def read_record(folder: Path) -> Record:
    """Raises ValueError where the folder holds no run with an evaluation."""
    try:
        config = json.loads((folder / "config.json").read_text())
        (spec,), settings = config["specs"], dict(config["settings"])
        rows = [r for r in read_jsonl(folder / "metrics.jsonl") if "step" in r]
    except FileNotFoundError as error:
        raise ValueError(f"no run (no {Path(error.filename).name})") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its config.json or metrics.jsonl is damaged ({error})") from None
    rows = [{k: v for k, v in r.items() if v is not None} for r in rows]  # null: not a finite number
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
        row |= {"against": other, "pairs": len(theirs)}
        for key in METRICS:
            row[key], row[f"{key} se"] = mean_se([e.get(key, math.nan) for e in last.values()])
            if theirs:
                pair = ([e[s].get(key, math.nan) for s in theirs] for e in (last, theirs))
                row |= zip((f"{key} diff", f"{key} low", f"{key} high"), paired(*pair))
        rows.append(row)
    return rows


def print_comparison(groups: dict[str, list[Record]], rows: list[dict[str, Any]]) -> None:
    """Two tables, and how far they can be trusted."""
    k = max(int(r.evaluations[-1].get("k", 0)) for g in groups.values() for r in g)
    names = {x: x.replace("_", " ").replace("@k", f"@{k}").replace("eval ", "") for x in METRICS}
    print("At the last evaluation: mean ± standard error over seeds (6.2)\n")
    print(shown(rows, {"method": "method", "seeds": "seeds", "step": "step", **names}))
    for r in (r for g in groups.values() for r in g):
        if (end := r.evaluations[-1]["step"]) < r.settings.get("steps", 0):
            print(f"  {r.folder} stopped at {end} of {r.settings['steps']} steps")
    rows = [r for r in rows if r["pairs"]]
    if not rows:
        print("\nNo differences: they need plain grpo among the runs, on the same seeds.")
        return
    print("\nDifference on the same seeds, and its 95 % bootstrap interval over seeds (6.3)\n")
    differences = {f"{x} diff": name for x, name in names.items()}
    print(shown(rows, {"method": "method", "against": "minus", "pairs": "pairs", **differences}))
    for n in sorted({r["pairs"] for r in rows}):
        if n == 1:
            print("1 pair: no interval, and no way to tell a method from luck.")
        elif n < 7:
            most = 1 - 2.0 ** (1 - n)
            print(f"{n} pairs: an interval holds the median difference with probability {most:.2f} at most.")


# -- the frontier --------------------------------------------------------------------------------------------
#
# A pair is a seed, with all that two runs of it share: warm start, prompts, problems.  What is kept of a
# policy in one pair: means over problems, in row 0 pass@1, in row 1 pass@k, in more rows what else is
# compared; column 0 is the mean itself, the others are bootstrap resamples of the problems, the same for all.

DRAWS = 1000
Means = dict[Any, np.ndarray]  # pair -> (measures, 1 + DRAWS)


@cache
def problem_weights(n: int) -> np.ndarray:
    return resample(n, DRAWS, np.random.default_rng(0)).T.copy()  # (n, 1 + DRAWS)


def means(each: np.ndarray) -> np.ndarray:
    """(..., measures, problems) -> (..., measures, 1 + DRAWS)."""
    return each @ problem_weights(each.shape[-1])


def line(px: np.ndarray, py: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Piecewise linear through n points px, py (n, D), at x (D,): one line for every column.

        L(x) = (1 - w) y_i + w y_{i+1},  w = (x - x_i) / (x_{i+1} - x_i),  x_i <= x <= x_{i+1}           (6.8)

    and the nearest end's y beyond both ends.  What lies between two learning rates is within reach without
    any new method: for each problem, toss a coin and give all k tries to one policy or to the other; pass@1
    and pass@k are then on the straight line between them.  Beyond the last point nothing is known of GRPO; a
    constant favours it, since pass@k falls there.
    """
    order = px.argsort(0)
    px, py = np.take_along_axis(px, order, 0), np.take_along_axis(py, order, 0)
    i = np.clip((px <= x).sum(0), min(1, len(px) - 1), len(px) - 1)
    d = np.arange(len(x))
    low, high = px[i - 1, d], px[i, d]
    w = np.clip((x - low) / np.where(high > low, high - low, 1), 0, 1)
    return py[i - 1, d] * (1 - w) + py[i, d] * w  # (6.8)


def on_frontier(sweep: dict[str, Means]) -> list[str]:
    """The policies that no other one beats in both pass@1 and pass@k, in the mean over the pairs that all
    have: a point that two better ones lie above would bend the line down."""
    pairs = sorted(set.intersection(*map(set, sweep.values())))
    mean = {x: np.mean([m[q][:2, 0] for q in pairs], 0) for x, m in sweep.items()} if pairs else {}
    return [x for x, m in mean.items() if not any((other > m).all() for other in mean.values())]


def distances(own: Means, sweep: dict[str, Means], measure: int = 1) -> np.ndarray:
    """(pairs, 1 + DRAWS): in each pair that has the whole sweep, the method's measure above the line."""
    names, pairs = on_frontier(sweep), [q for q in own if all(q in m for m in sweep.values())]
    points = {q: np.stack([sweep[x][q] for x in names]) for q in pairs}  # (n, measures, 1 + DRAWS)
    d = [own[q][measure] - line(p[:, 0], p[:, measure], own[q][0]) for q, p in points.items()]
    return np.array(d).reshape(-1, 1 + DRAWS)


def over_pairs(d: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval of (pairs, 1 + DRAWS) differences; NaN for what too few pairs cannot tell.

        D1 = mean over pairs of  pass@k - L(pass@1)                                                      (6.9)

    pass@1 and pass@k are the method's, L is plain GRPO's line through its learning rates and the warm start,
    which is GRPO at rate 0.  Bootstrap over pairs, and over problems by the columns; the spread around the
    mean is widened by sqrt(n / (n - 1)) for n pairs, since a bootstrap of few is too narrow by that factor.

    Why this line and not the upper hull of all points: a hull of noisy points lies too high, and leaves
    undefined what is beyond it.  results/study.py fixed this one before its first run; D1 there is D1 here.
    """
    n = len(d)
    mean = float(d[:, 0].mean()) if n else math.nan  # (6.9)
    if n < 2:
        return mean, math.nan, math.nan
    pick = np.random.default_rng(1).integers(n, size=(DRAWS, n))
    resampled = d[pick, np.arange(1, DRAWS + 1)[:, None]].mean(1)  # (DRAWS,)
    wide = math.sqrt(n / (n - 1)) * (np.quantile(resampled, [0.025, 0.975]) - resampled.mean())
    return mean, *(float(d[:, 0].mean() + w) for w in wide)


def outcome(row: dict[str, Any], prefix: str, k: int) -> np.ndarray:
    """Of one evaluation: (2, 1 + DRAWS) means of pass@1 and pass@k, from the right samples per problem."""
    n, right = row["k"], np.array(row[f"{prefix}right"])
    return means(np.array([[pass_at_k(n, c, j) for c in range(n + 1)] for j in (1, k)])[:, right])


Points = dict[tuple[str, float], Means]  # (label, step or test temperature) -> means


def training_points(groups: dict[str, list[Record]], prefix: str, k: int) -> Points:
    """Every method at every step that all of its seeds were evaluated at."""
    out: Points = {}
    for label, members in groups.items():
        rows = {r.seed: {e["step"]: e for e in r.evaluations if f"{prefix}right" in e} for r in members}
        for step in sorted(set.intersection(*map(set, rows.values()))):
            out[label, step] = {s: outcome(e[step], prefix, k) for s, e in rows.items()}
    return out


def sweep_of(groups: dict[str, list[Record]], label: str) -> dict[str, float]:
    """label -> learning rate of the plain GRPO groups that a method is measured against: of the same settings
    but for the learning rate and for those that the method's own spec names.  Empty for these groups."""
    plain = {x: g[0] for x, g in groups.items() if g[0].plain and set(g[0].own) <= {"lr"}}
    free = {"lr", *groups[label][0].own}

    def rest(record: Record) -> dict[str, Any]:
        return {k: v for k, v in record.shared.items() if k not in free}

    same = {x: float(r.settings["lr"]) for x, r in plain.items() if rest(r) == rest(groups[label][0])}
    return {} if label in plain else same


def line_points(points: Points, sweep: dict[str, float], along: str, at: float) -> dict[str, Means]:
    """What GRPO's line goes through.  along="step": the learning rates at that step, and the warm start;
    along="temperature": the final policies of all rates at all test temperatures."""
    grpo = {key: m for key, m in points.items() if key[0] in sweep}
    if along == "temperature":
        return {f"{x} at {t:g}": m for (x, t), m in grpo.items()}
    start = {q: m for (_, step), every in grpo.items() if step == 0 for q, m in every.items()}
    rates = {x: m for (x, step), m in grpo.items() if step == at}
    return ({"the warm start": start} if start else {}) | rates if rates else {}


def frontier(groups: dict[str, list[Record]], points: Points, along: str) -> list[dict[str, Any]]:
    """A row for every method at every step, or test temperature: where it lies, and D1 (6.9)."""
    rows = []
    for (label, at), own in points.items():
        sweep = line_points(points, sweep_of(groups, label), along, at)
        x, y = np.mean([m[:2, 0] for m in own.values()], 0)
        row = {"along": along, "method": label, "at": at, "pass@1": float(x), "pass@k": float(y)}
        if sweep:
            d, names = distances(own, sweep), on_frontier(sweep)
            ends = [np.mean([m[0, 0] for m in sweep[n].values()]) for n in names]
            row |= zip(("D1 diff", "D1 low", "D1 high"), over_pairs(d))
            row |= {"pairs": len(d), "line": "; ".join(names)}
            row["note"] = "" if not ends or min(ends) <= x <= max(ends) else "beyond the line's end"
        rows.append(row)
    return rows


def print_frontier(rows: list[dict[str, Any]], k: int, title: str) -> None:
    """The methods at the end of training, or at every test temperature, the best D1 first."""
    last = {r["method"]: r["at"] for r in rows}
    rows = [r for r in rows if "pairs" in r and (r["along"] == "temperature" or r["at"] == last[r["method"]])]
    if not rows:
        print(f"\n{title}: needs grpo at one learning rate or more, and another method.")
        return
    print(f"\n{title}: D1 = pass@{k} above plain GRPO's line (6.8) at equal pass@1 (6.9), 95 % interval\n")
    rows = sorted(rows, key=lambda r: -r["D1 diff"] if r["pairs"] else math.inf)
    columns = ("method", "at", "pass@1", "pass@k", "D1 diff", "pairs", "note")
    print(shown(rows, {x: x.removesuffix(" diff").replace("@k", f"@{k}") for x in columns}))
    for names in dict.fromkeys(r["line"] for r in rows):
        print(f"the line: {names or 'no seed is in common with all of plain GRPO'}")


MARKERS = "osv^D<>PX*"


def draw_frontier(
    panels: Sequence[tuple[str, str, int, Points]], groups: dict[str, list[Record]], path: Path
) -> None:
    """Panels of (title, along, k, points): every method's path in the plane; GRPO's learning rates in greys,
    darker for smaller ones, under it the line (6.8)."""
    sweeps = {frozenset(x) for label in groups if (x := sweep_of(groups, label))}
    rates = {x: groups[x][0].settings["lr"] for x in frozenset().union(*sweeps)}
    order = [*sorted(rates, key=rates.get), *(x for x in groups if x not in rates)]
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    fig, axes = figure(5.6 * columns + 2.4, 5.2 * lines, lines, columns)

    def mean(every: Means) -> np.ndarray:
        return np.mean([m[:2, 0] for m in every.values()], 0)

    for ax, (title, along, k, points) in zip(axes.flat, panels):
        for i, label in enumerate(order):
            if own := [mean(m) for (x, _), m in points.items() if x == label]:
                look = {"color": str(0.7 * i / len(rates)), "linestyle": "-"} if label in rates else None
                look = (look or style(i - len(rates) + 1)) | {"marker": MARKERS[i % len(MARKERS)]}
                ax.plot(*np.array(own).T, markersize=3, linewidth=1, alpha=0.85, **look)
                ax.plot(*own[-1], markersize=8, label=label, alpha=0.85, **look)
        for sweep in sweeps:
            every = line_points(points, sweep, along, max(at for x, at in points if x in sweep))
            found = sorted(tuple(mean(every[x])) for x in on_frontier(every))
            if found:
                ax.plot(*zip(*found), color="black", linewidth=6, alpha=0.15, zorder=0, label="GRPO's line")
        ax.set(title=title, xlabel="pass@1", ylabel=f"pass@{k}")
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save(fig, path)


# -- the law -------------------------------------------------------------------------------------------------

LAW = {"evaluation": ("eval_entropy", "pass@1"), "training batch": ("entropy", "reward")}


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
    """Table, law.png and law.csv.  R against H of the evaluations, as the paper has it, but with the entropy
    of the very policy that is scored; and of every training batch: more points and more noise."""
    fig, axes = figure(12, 5.2, 1, 2)
    rows, points = [], []
    for ax, (kind, keys) in zip(axes[0], LAW.items()):
        for i, record in enumerate(records):
            frame = pd.DataFrame(record.rows).reindex(columns=keys).dropna()
            H, R = (frame[key].tolist() for key in keys)
            row = law_row(str(record.folder), kind, H, R)
            points.append(pd.DataFrame({"run": row["run"], "points of": kind, "entropy": H, "score": R}))
            rows.append(row)
            n, color, size = row["fitted"], style(i)["color"], 14 if kind == "evaluation" else 3
            ax.scatter(H[n:], R[n:], s=size, facecolors="none", edgecolors=color, linewidths=0.7)
            name = f"{record.spec}, seed {record.settings.get('seed')}"
            ax.scatter(H[:n], R[:n], s=2 * size, color=color, label=name)
            if "a" in row:
                h = np.linspace(min(H), max(H), 100)
                ax.plot(h, row["b"] - row["a"] * np.exp(h), **style(i))
        ax.set(title=f"R = -a e^H + b, {kind}: fitted on the filled points", xlabel="entropy H, nats")
        ax.set_ylabel("pass@1" if kind == "evaluation" else "mean reward")
        scores = pd.concat(points).query("`points of` == @kind")["score"]
        if len(scores):
            ax.set_ylim(scores.min() - 0.05, scores.max() + 0.05)
    axes[0, 0].legend(fontsize=7)
    save(fig, out / "law.png")
    rows.sort(key=lambda r: [str(x.folder) for x in records].index(r["run"]))
    write_csv(out / "law.csv", rows)
    write_csv(out / "law-points.csv", pd.concat(points))
    keys = ("a", "b", "R2 of the fit", "R2 of the rest", "rmse", "largest error", "last error", "why")
    print(shown(rows, ("run", "points of", "fitted", "predicted", *keys)))
    print("R2 of the rest compares with its own mean: below 0, a constant predicts better than the law.")


# ------------------------------------------------------------------------------------------------------------
# 6. Fresh samples of a run


def own_attention(model: str | Path, device: torch.device) -> str:
    """What a run's checkpoint was trained with, where that runs on the device; sdpa of any other model."""
    try:
        kind = json.loads((Path(model).parent / "config.json").read_text())["settings"]["attention"]
    except (OSError, ValueError, KeyError, TypeError):
        return "sdpa"
    return "sdpa" if device.type == "cpu" and kind.startswith("flash") else kind


def load_policy(folder: Path, attention: str = "auto") -> tuple[nn.Module, Any]:
    """Model and tokenizer of a run's checkpoint, on the CPU, by default with the run's own attention.
    Raises ValueError where there is none or it cannot be read."""
    path, several = folder / "checkpoint", sorted(folder.glob("*/checkpoint"))
    if several and not path.exists():
        raise ValueError(f"{folder}: compares several methods; name one, e.g. {several[0].parent}")
    if not (path / "config.json").is_file():
        raise ValueError(f"{folder}: holds no checkpoint/; name the folder of a run, e.g. runs/opefo-s0")
    own = own_attention(path, torch.device("cpu"))
    return load_model(str(path), attention=own if attention == "auto" else attention)


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
    task, engine = embedded(record), TorchEngine(*load_policy(record.folder))
    how = Sampling(k, task.max_new_tokens, temperature, top_p, entropy=True)
    generator, out = torch.Generator().manual_seed(seed), {}
    for prefix, problems in (("", task.test), ("hard ", task.hard)):
        out[prefix] = []
        for part in responses(engine, task, problems, how, generator):
            out[prefix] += to_samples(part, k, len(out[prefix]))
    return out


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


def print_samples(sets: dict[str, dict[str, Groups]], ks: Sequence[int], out: Path) -> None:
    """Two tables, samples.csv (every number with its standard error) and problems.csv (right counts)."""
    key = chain_task().signature
    length = min(common_length(g) for groups in sets.values() for g in groups.values())
    rows, counts = [], []
    for label, groups in sets.items():
        for prefix, g in groups.items():
            where = {"run": label, "set": prefix.strip() or "test"}
            rows.append(where | measure(g, ks, key, key, length))
            right = [sum(s["correct"] for s in group) for group in g]
            counts += [where | {"problem": p, "right": c, "of": len(g[p])} for p, c in enumerate(right)]
    what = [f"pass@{k}" for k in [1, *ks]] + ["distinct_correct", "entropy", "length", "truncated"]
    more = ["distinct-1", "distinct-2", "distinct-3", "ece_vote", "ece_likelihood"]
    for names in (what, more):
        print(shown(rows, ("run", "set", *names)) + "\n")
    print(f"± standard error over problems (6.2); diversity (6.4) of the first {length} tokens")
    write_csv(out / "samples.csv", rows)
    write_csv(out / "problems.csv", counts)


def draw_calibration(sets: dict[str, Groups], vote: Callable[[str], str], path: Path) -> None:
    """Reliability: share right against confidence, one panel for each meaning of the word; CSV beside it."""
    fig, axes = figure(10, 4.8, 1, 2)
    titles = {"vote": "share of the most frequent answer", "likelihood": "exp of the tokens' mean log π"}
    rows = []
    for ax, (name, title) in zip(axes[0], titles.items()):
        ax.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=":")
        ax.set(title=f"confidence: {title}", xlabel="mean confidence", ylabel="share right")
        ax.set(xlim=(0, 1.02), ylim=(-0.02, 1.02))
        for i, (label, groups) in enumerate(sets.items()):
            if pair := confidences(groups, vote).get(name):
                bins = pd.DataFrame(calibration(*pair), columns=["mean", "right", "count"])
                text = f"{label}: ECE {calibration_error(*pair):.3f}"
                ax.plot(bins["mean"], bins["right"], marker="o", markersize=4, label=text, **style(i))
                rows.append(bins.assign(run=label, confidence=name))
                ax.legend(fontsize=8)
    save(fig, path)
    write_csv(path.with_suffix(".csv"), pd.concat(rows))


def draw_tokens(sets: dict[str, Groups], name: Callable[[int], str], path: Path, what: str) -> None:
    """Histogram of the entropy over tokens with the fork's threshold (6.7), and the most frequent tokens
    drawn from there on; CSV beside it."""
    fig, axes = figure(6 + 3.2 * len(sets), 4.8, 1, 1 + len(sets), width_ratios=[6] + [3.2] * len(sets))
    left, *right = axes[0]
    every = {x: np.array([h for g in groups for s in g for h in s["nats"]]) for x, groups in sets.items()}
    edges = np.linspace(0, max(v.max() for v in every.values()) or 1, 51)
    rows = []
    for i, (label, nats) in enumerate(every.items()):
        counts, cut = np.histogram(nats, edges)[0], forking(nats)
        left.stairs(counts / len(nats), edges, label=f"{label}: fork above {cut:.3f}", **style(i))
        left.axvline(cut, linewidth=0.8, **style(i))
        forks = fork_table(sets[label], name)
        rows.append(pd.DataFrame({"run": label, "from": edges[:-1], "to": edges[1:], "tokens": counts}))
        rows.append(pd.DataFrame(forks).assign(run=label))
        names = [tidy(f["token"]).strip() or repr(f["token"]) for f in forks]
        right[i].barh(range(len(forks)), [f["forks"] for f in forks], color=style(i)["color"])
        right[i].set_yticks(range(len(forks)), [x.replace("$", r"\$") for x in names], fontsize=8)
        right[i].invert_yaxis()
        right[i].set(title=f"{label}:\nmost frequent forks", xlabel="drawn there")
    left.set(title=f"{what} over tokens", xlabel="nats", ylabel="share of tokens", yscale="log")
    left.legend(fontsize=8)
    save(fig, path)
    write_csv(path.with_suffix(".csv"), pd.concat(rows))


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


# -- tokens in the colour of their entropy flow --------------------------------------------------------------


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
    for r in rows:  # a token without a name was once written as null
        r["tokens"] = ["<?>" if w is None else w for w in r["tokens"]]
    keys = ("prompt", "reward", "tokens", "network_flow")
    return [
        Coloured(*map(r.get, keys)) for r in rows
    ], f"network flow of step {rows[-1]['step']}, from {path}"


def own_task(record: Record, tokenizer: Any) -> Task:
    """What a run was trained on: the embedded task, or that of the files that it names."""
    s = record.settings
    if not record.task:
        return chain_task()
    names = ("data", "eval_data", "eval_problems", "prompt_template")
    limits = s["max_prompt_tokens"], s["max_new_tokens"]
    return task_of_data(tokenizer, *(s[name] for name in names), s["chat"] == "auto", *limits)[0]


@torch.no_grad()
def fresh_flows(
    record: Record, seed: int = 0, attention: str = "auto", prompts: int = 32, n: int = 16
) -> tuple[list[Coloured], str]:
    """The exact flow of a table, entropy_math (3.2), of the tokens of a fresh batch: what one step of GRPO on
    it, at the run's temperature, would do to entropy.  Of each of the first 8 problems with right and wrong
    answers, the response that moves entropy most."""
    model, tokenizer = load_policy(record.folder, attention)
    task, tau = own_task(record, tokenizer), record.settings.get("temperature", 1.0)
    problems, how = task.test[:prompts], Sampling(n, task.max_new_tokens, tau)
    out, _ = answer(TorchEngine(model, tokenizer), task, problems, how, torch.Generator().manual_seed(seed))
    stats = TokenStats(**Policy(model)(out, tau))
    adv = group_advantages(out.correct.double(), out.group)  # grpo (2.1)
    flow = (
        torch.where(out.mask, entropy_change(stats, adv[:, None]), 0) / out.mask.sum()
    )  # token mean, (B, T)
    best = flow.abs().sum(1).view(-1, n).max(1)
    found = []
    for p in [p for p in range(len(problems)) if best.values[p] > 0][:8]:
        i = p * n + int(best.indices[p])
        m = out.mask[i]
        words = token_names(tokenizer, out.ids[i][m].tolist())
        found.append(Coloured(problems[p].prompt, float(out.correct[i]), words, flow[i][m].tolist()))
    what = f"exact flow of a table, fresh batch of {len(problems)} x {n} from {record.folder}/checkpoint"
    return found, what


def tidy(token: str) -> str:
    """A token as it may be printed: byte-level marks as what they stand for, control characters visible."""
    token = token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "⏎").replace("\n", "⏎")
    return "".join(c if c.isprintable() else "·" for c in token)


def shade(flow: float, top: float) -> tuple[int, int, int]:
    """White at 0 to full red (raises entropy) or blue (lowers it) at ±top; by the square root, since a few
    tokens carry most of the flow."""
    fade = round(255 - 175 * math.sqrt(min(1.0, abs(flow) / top))) if top else 255
    return (255, fade, fade) if flow > 0 else (fade, fade, 255)


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
        blank = "" if any(w.startswith(("Ġ", "▁", " ")) for w in r.tokens) else " "
        body.append(f"<b>{html.escape(r.prompt)}</b> (reward {r.reward:g})<p>{blank.join(spans)}</p>")
    return PAGE.format(top=top, what=html.escape(what), body="\n".join(body))


def show(record: Record, seed: int, attention: str, out: Path) -> None:
    """flow.html, and a line a response of its strongest tokens: of flows.jsonl, else of fresh ones."""
    flows = record.folder / "flows.jsonl"
    rows, what = logged_flows(flows) if flows.is_file() else fresh_flows(record, seed, attention)
    top = max((abs(f) for r in rows for f in r.flow), default=0.0) or 1.0
    print(f"{what}\nThe strongest tokens, flow in percent of the largest: + raises entropy, - lowers it\n")
    for r in rows:
        strongest = sorted(zip(r.tokens, r.flow), key=lambda pair: -abs(pair[1]))[:6]
        words = "  ".join(f"{tidy(w)} {100 * f / top:+.0f}" for w, f in strongest)
        print(f"{tidy(r.prompt)[-60:]}   reward {r.reward:g}:   {words}")
    (out / "flow.html").write_text(page(rows, what), encoding="utf-8")
    print(f"\npage: {out / 'flow.html'}")


# ------------------------------------------------------------------------------------------------------------
# 7. The benchmarks

BENCHMARKS = {  # name -> samples a problem: many on the small sets, one on the large (OPEFO, STEER)
    "aime24": 32, "aime25": 32, "amc23": 32, "math500": 1, "minerva": 1, "olympiadbench": 1,
}  # fmt: skip

SOURCES = {  # what --against knows: where REPORTED has it from, and how the paper sampled
    "opefo": "2605.11491, Qwen2.5-Math-7B (transcribed by others, not checked in the paper). Sampling: "
    "temperature 1, top-p .7; avg@32 on AIME and AMC, avg@1 on the others; the checkpoint that is best on "
    "the mean of these very benchmarks; one run.",
    "steer": "2510.10150, Qwen2.5-Math-7B. Sampling: temperature 1, top-p .7; avg@32 on AIME and AMC, avg@1 "
    "on the others; the checkpoint that is best on AIME24; mean of 2 runs.",
    "clip_cov": "2505.22617, Qwen2.5 7B and 32B. Sampling: not recorded here, nor the benchmarks that it "
    "averages over.",
    "par": "2511.05993 table 2, Qwen2.5-Math-7B. Sampling: temperature 1, top-p 1; avg@64 on all; validated "
    "on AIME25; its own average, of the first five.",
}
REPORTED = pd.read_csv(io.StringIO("""\
paper;method;aime24;aime25;amc23;math500;minerva;olympiadbench;average
opefo;base;;;;;;;21.2
opefo;GRPO, 8 updates;;;;;;;45.5
opefo;GRPO, strict;;;;;;;50.1
opefo;entropy regularisation;;;;;;;47.8
opefo;clip-higher;;;;;;;49.8
opefo;Clip-Cov;;;;;;;50.7
opefo;KL-Cov;;;;;;;50.5
opefo;OPEFO;34.5;;82.2;;;;52.4
opefo;GRPO, 8 updates: pass@32;59.8;38.4;93.7;92.5;;;
opefo;GRPO, strict: pass@32;61.3;41.2;94.8;93.3;;;
opefo;OPEFO: pass@32;62.4;43.3;95.6;94.1;;;
steer;base;13.8;5.3;44.6;39.6;9.9;13.8;21.2
steer;GRPO;28.0;14.3;66.2;78.6;37.3;40.9;44.2
steer;OPO;32.2;13.4;71.5;82.2;38.2;41.0;46.4
steer;entropy advantage;27.5;13.5;70.2;79.6;36.8;42.8;45.1
steer;Clip-Cov;32.5;12.9;68.4;78.0;40.8;41.3;45.7
steer;KL-Cov;32.8;14.1;64.2;78.8;37.1;39.4;44.4
steer;STEER;36.2;16.1;72.1;82.2;41.7;43.0;48.6
clip_cov;7B: GRPO;;;;;;;38.6
clip_cov;7B: clip-higher;;;;;;;38.8
clip_cov;7B: Clip-Cov;;;;;;;40.4
clip_cov;7B: KL-Cov;;;;;;;40.6
clip_cov;32B: GRPO;;;;;;;45.8
clip_cov;32B: clip-higher;;;;;;;47.2
clip_cov;32B: Clip-Cov;;;;;;;50.3
clip_cov;32B: KL-Cov;;;;;;;52.2
par;base;10.0;3.8;30.04;43.76;14.41;;20.4
par;GRPO, 1 update;28.75;14.69;64.38;78.14;34.64;;44.12
par;PAR, entropy-guided;34.38;15.89;69.34;75.93;32.78;;45.66
par;adaptive entropy;33.96;18.65;68.52;73.98;31.66;;45.35
par;clip-higher;33.33;15.94;67.62;72.35;30.57;;43.96
"""), sep=";")  # fmt: skip


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
    def step(self) -> int:
        return max(1, self.settings["batch"] // self.settings["samples"])  # problems in a batch

    def begin(self) -> int:
        """Problems done.  ValueError where samples are stored that were drawn with other settings, or are
        damaged.  A batch that a kill cut short is dropped."""
        stored, n = self.path.with_suffix(".json"), self.settings["samples"]
        before = json.loads(stored.read_text()) if stored.exists() else self.settings
        for k in dict.fromkeys([*self.settings, *before]):
            if before.get(k) != self.settings.get(k):
                raise ValueError(
                    f"--out {self.folder}: {self.name} was begun there with {k} {before.get(k)!r}, not "
                    f"{self.settings.get(k)!r}; give that, or another --out"
                )
        if not self.path.exists():
            return 0
        append(self.path, [])  # cuts off half a line
        rows = read_jsonl(self.path)
        done = len(self.problems)
        if len(rows) < done * n:
            done = len(rows) // n // self.step * self.step
        for i, row in enumerate(rows[: done * n]):
            if (row.get("problem"), row.get("sample")) != divmod(i, n):
                raise ValueError(f"{self.path}: line {i + 1} is damaged (out of order); remove the file")
        lines = self.path.read_bytes().splitlines(keepends=True)
        os.truncate(self.path, sum(map(len, lines[: done * n])))
        return done

    def generate(self, engine: Engine, done: int) -> None:
        """Append batch after batch.  A batch's draws depend on the seed and its place only, so that a run
        that was killed ends with the samples of one that was not."""
        from tqdm import tqdm

        s, n = self.settings, self.settings["samples"]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".json").write_text(json.dumps(s, indent=2) + "\n")
        prompts = render(self.problems, engine.tokenizer, s["template"], s["chat"])
        task = math_task(self.name, (), tuple(prompts), s["max_new_tokens"])
        how = Sampling(n, s["max_new_tokens"], s["temperature"], s["top_p"], entropy=True)
        bar = tqdm(total=len(prompts) * n, initial=done * n, desc=self.name, unit="sample")
        for i in range(done, len(prompts), self.step):
            digest = hashlib.sha256(f"{s['seed']}/{self.name}/{i}".encode()).digest()
            generator = torch.Generator(engine.device).manual_seed(int.from_bytes(digest[:4], "little"))
            part = prompts[i : i + self.step]
            groups = to_samples((part, *answer(engine, task, part, how, generator)), n, i)
            append(self.path, [x for g in groups for x in g])
            bar.update(len(part) * n)
        bar.close()

    def samples(self) -> Groups:
        rows, n = read_jsonl(self.path), self.settings["samples"]
        return [rows[i : i + n] for i in range(0, len(rows), n)]


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


def open_engine(o: Options, s: dict[str, Any], everything: Sequence[Problem]) -> Engine:
    """The engine of a benchmark's settings `s`.  The longest prompt must fit into the model's context
    together with a response.  Raises ValueError naming the flag."""
    from transformers import AutoConfig, AutoTokenizer

    model, device, trust = s["model"], usable_device(o.machine.device), o.benchmarks.trust_remote_code
    try:
        if s["engine"] == "torch":
            policy, tokenizer = load_model(model, s["dtype"], trust, s.get("attention", "sdpa"), device)
        else:
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust).get_text_config()
        prompts = render(everything, tokenizer, s["template"], s["chat"])
        longest = longest_prompt(prompts, tokenizer, getattr(config, "vocab_size", None))
    except Exception as error:  # missing, gated, damaged: a dozen classes of three libraries
        reason = " ".join(str(error).split()).removeprefix(f"{model}: ")[:300]
        raise ValueError(f"--model {model}: {reason}") from None
    room = (getattr(config, "max_position_embeddings", None) or math.inf) - longest
    if s["max_new_tokens"] > room:
        raise ValueError(
            f"--max-new-tokens {s['max_new_tokens']}: the longest prompt has {longest} tokens, {model} sees "
            f"{longest + room} in all; {f'give {room} at most' if room > 0 else 'take another model'}"
        )
    if s["engine"] == "torch":
        return TorchEngine(policy, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return VllmEngine(
        model, tokenizer, device=device, dtype=getattr(torch, s["dtype"]), sleeps=False,
        max_model_len=longest + s["max_new_tokens"], gpu_memory=o.benchmarks.gpu_memory,
        trust_remote_code=trust,
    )  # fmt: skip


def make_bench(o: Options, model: str, name: str, problems: tuple[Problem, ...], folder: Path) -> Bench:
    """With everything that the samples depend on.  `model`: a folder, a hub id, or a training run."""
    b, device = o.benchmarks, usable_device(o.machine.device)
    inner = Path(model).expanduser() / "checkpoint"
    model = str(inner) if (inner / "config.json").is_file() else model
    text = json.dumps([[p.prompt, p.answer, *p.before] for p in problems])
    n = o.sampling.samples or (o.sampling.k or 32 if BENCHMARKS.get(name, 32) > 1 else 1)
    dtype = {"auto": "float32" if device.type == "cpu" else "bfloat16"}.get(b.dtype, b.dtype)
    settings = {
        "model": model, "weights": fingerprint(Path(model)), "engine": b.engine, "dtype": dtype,
        "temperature": o.sampling.temperature, "top_p": o.sampling.top_p, "seed": o.sampling.seed,
        "samples": n, "max_new_tokens": b.max_new_tokens, "template": b.template, "chat": not b.plain,
        "problems": len(problems), "sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
        "batch": b.batch or (512 if b.engine == "vllm" else 128),
    }  # fmt: skip
    kind = o.machine.attention
    kind = own_attention(model, device) if kind == "auto" else kind
    if b.engine == "torch" and kind != "sdpa":  # older folders, which name none, have sdpa's
        settings["attention"] = kind
    return Bench(name, problems, settings, folder)


def benchmark(o: Options) -> None:
    """Generate what is missing, then tables, pictures and CSV from the stored samples."""
    set_threads(o.machine.threads, embedded=False)
    found = sources(o.benchmarks.benchmark, o.benchmarks.data)
    problems = {name: whole_benchmark(name, source, o.benchmarks.limit) for name, source in found.items()}
    benches = {}
    out = own_folder(Path(o.machine.out or "runs/benchmarks"))
    what = "Surprisal -log π of the tokens drawn" if o.benchmarks.engine == "vllm" else "Entropy"
    rows, boxed = [], lambda text: (last_boxed(text) or "").strip()
    for model in o.benchmarks.model:
        folder = out / model.strip("/.").replace("/", "--")
        benches = [make_bench(o, model, name, p, folder) for name, p in problems.items()]
        todo = [(b, done) for b in benches if (done := b.begin()) < len(b.problems)]
        if todo:
            engine = open_engine(o, benches[0].settings, [p for b in benches for p in b.problems])
            for b, done in todo:
                b.generate(engine, done)
            engine.close()
        groups = {b.name: b.samples() for b in benches}
        for b in benches:
            n = b.settings["samples"]
            ks = [k for k in sorted({8, 16, 32, o.sampling.k or n}) if 1 < k <= n]
            row = {"model": model, "benchmark": b.name, "problems x samples": f"{len(b.problems)} x {n}"}
            rows.append(row | measure(groups[b.name], ks, str.strip, boxed))
        draw_calibration(groups, boxed, folder / "calibration.png")
        namer = token_namer(benches[0].settings["model"], o.benchmarks.trust_remote_code)
        draw_tokens(groups, namer, folder / "tokens.png", what)
    print_benchmarks(pd.DataFrame(rows), o, out)
    for key in o.benchmarks.against:
        frame = REPORTED[REPORTED["paper"] == key]
        columns = ["method", *(x for x in problems if x in BENCHMARKS), "average"]
        text = frame[columns].to_string(index=False, na_rep="–", float_format="%.1f")
        print(f"\nreported: {key}\n{text}\n{SOURCES[key]}")


def averages(frame: pd.DataFrame) -> dict[str, float]:
    """Means over benchmarks.  The standard error is √(Σ se²) / m of m benchmarks: their problems are
    independent samples.  A pass@k that one of them lacks has no average."""
    names = [x for x in frame if x.startswith("pass@") or x in ("length", "truncated", "entropy")]
    out = {x: float(frame[x].mean(skipna=False)) for x in names}
    errors = {
        x: math.sqrt(sum(frame[x] ** 2)) / len(frame) for x in names if x.startswith("pass@") and " se" in x
    }
    return out | errors


def print_benchmarks(frame: pd.DataFrame, o: Options, out: Path) -> None:
    """The papers' table, in percent, one block a model; where there are several models (checkpoints of
    several seeds), another of means and standard errors over them."""
    ks = sorted({int(x[5:]) for x in frame if re.fullmatch(r"pass@\d+", x)} - {1})
    shares = {"pass@1": "avg@n = pass@1, %", **{f"pass@{k}": f"pass@{k}, %" for k in ks}}
    tokens = {"length": "length", "truncated": "truncated, %", "entropy": "entropy"}
    blocks = []
    for model, block in frame.groupby("model", sort=False):
        mean = pd.DataFrame(
            [{"model": model, "benchmark": "average", "problems x samples": ""} | averages(block)]
        )
        blocks.append(pd.concat([block, mean]))
        columns = {"benchmark": "benchmark", "problems x samples": "problems x samples", **shares}
        rows = blocks[-1].drop(columns=["length se", "truncated se", "entropy se"]).to_dict("records")
        print(f"\n{model}\n{shown(rows, columns | tokens)}")
    if len(blocks) > 1:
        over = f"mean over {len(blocks)} models"
        values = pd.concat(blocks).groupby("benchmark", sort=False)[[*shares, *tokens]]
        both = values.mean().join(values.sem().add_suffix(" se")).reset_index().assign(model=over)
        blocks.append(both)
        columns = {"benchmark": "benchmark"} | shares | tokens
        print(f"\n{over}, standard errors over models\n{shown(both.to_dict('records'), columns)}")
    s, b = o.sampling, o.benchmarks
    print(
        f"\n± standard error over problems (6.2); pass@k unbiased (6.1). Sampled with {b.engine}, "
        f"temperature {s.temperature:g}, top-p {s.top_p:g}, at most {b.max_new_tokens} tokens, seed "
        f"{s.seed}; all settings: {out}/*/*.json"
    )
    exact = "exact, of the distribution that tokens were drawn from (after temperature and top-p)"
    surprisal = "the mean of -log π of the tokens drawn, whose expectation is the entropy"
    kind = surprisal if b.engine == "vllm" else exact
    print(f"Entropy in nats per token: {kind}. Samples with their grades: {out}/*/*.jsonl")
    write_csv(out / "benchmarks.csv", pd.concat(blocks))


# ------------------------------------------------------------------------------------------------------------
# 8. The command line and the demonstration


@dataclass(frozen=True)
class RunFlags:
    """What is said about finished runs, and which."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """folders that train.py made; a comparison counts as its members"""
    temperatures: tuple[float, ...] = ()
    """also sample at these test temperatures; name the runs first"""
    sample: bool = False
    """fresh samples of every run; without it of a single run only"""
    law: bool = False
    """fit R = -a e^H + b to the first 15 percent of each run, predict the rest"""
    show: bool = False
    """colour the tokens of a run by their entropy flow"""


@dataclass(frozen=True)
class SamplingFlags:
    """How responses are drawn.  Truncation hides a collapse: temperature 1 and top-p 1 unless you say so."""

    k: int = 0
    """the largest k of pass@k (0: 32)"""
    samples: int = 0
    """samples per problem (0: k; on the large benchmarks 1)"""
    temperature: float = 1.0
    """of the softmax"""
    top_p: float = 1.0
    """the papers use .7"""
    seed: int = 0
    """the same seed draws the same samples"""


@dataclass(frozen=True)
class BenchmarkFlags:
    """A model on benchmarks."""

    model: tuple[str, ...] = ()
    """folders or hub ids; several: a mean over them too"""
    benchmark: tuple[str, ...] = ()
    """of aime24, aime25, amc23, math500, minerva, olympiadbench, or of --data"""
    data: tuple[str, ...] = ()
    """NAME=SOURCE: a .jsonl, .json, .csv or .parquet file, or owner/dataset@config:split of the hub (without:
    $ENTROPY_FLOW_DATA/NAME.jsonl)"""
    against: tuple[Literal["opefo", "steer", "clip_cov", "par"], ...] = ()
    """print what these papers report"""
    limit: int = 0
    """only the first problems of each (0: all)"""
    engine: Literal["torch", "vllm"] = "torch"
    """our own loop, or vLLM"""
    max_new_tokens: int = 3072
    """as in STEER's training"""
    template: str = PROMPT_TEMPLATE
    """with {problem} in it"""
    plain: bool = False
    """no chat template, even where the tokenizer has one"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU"""
    batch: int = 0
    """responses at once, the most that a kill loses (0: 128; vllm: 512)"""
    gpu_memory: float = 0.9
    """share of the GPU for vLLM"""
    trust_remote_code: bool = False
    """run code that comes with the model"""


@dataclass(frozen=True)
class MachineFlags:
    """Where it runs, and where it writes."""

    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """of --show and of benchmarks with --engine torch (auto: that of a run's checkpoint, else sdpa)"""
    device: str = "auto"
    """cpu, cuda, ... (auto: a GPU if there is one)"""
    threads: int = 0
    """CPU threads (0: for embedded runs 1, else torch's choice)"""
    out: str = ""
    """folder to write to (without: runs/compare, a single run's eval/, runs/benchmarks)"""


@dataclass(frozen=True)
class Options:
    """Numbers that can be trusted, on finished runs and on benchmarks.

    examples:
      python eval.py                               the estimators, shown on made-up counts
      python eval.py runs/opefo-s0                 one run: its log, samples, diversity, calibration
      python eval.py runs/*                        methods over seeds, the frontier, from the logs
      python eval.py runs/* --temperatures .5 .6 .8 1 1.2     the frontier over test temperatures too
      python eval.py --law runs/grpo-*             does R = -a e^H + b predict the rest of a run?
      python eval.py --show runs/opefo-s0          responses in the colours of their entropy flow
      python eval.py --model FOLDER_OR_ID --benchmark aime24 aime25 amc23 math500 minerva \\
          olympiadbench --k 32 --engine vllm --data aime24=aime24.jsonl ... --against opefo steer

    The same command again goes on where a kill stopped it, and once all is sampled computes without a model.
    """

    finished: RunFlags = field(default_factory=RunFlags)
    sampling: SamplingFlags = field(default_factory=SamplingFlags)
    benchmarks: BenchmarkFlags = field(default_factory=BenchmarkFlags)
    machine: MachineFlags = field(default_factory=MachineFlags)


def flags_of(kind: type) -> list[str]:
    """The flags of a dataclass and of those nested in it."""
    out = []
    for name, hint in get_type_hints(kind).items():
        out += flags_of(hint) if is_dataclass(hint) else [f"--{name.replace('_', '-')}"]
    return out


def command_line(
    kind: type, prog: str, argv: Sequence[str] | None, absent: dict[str, str] | None = None
) -> Any:
    """A dataclass filled by tyro from the words of a command line: fields are flags, their docstrings the
    help, nested dataclasses its groups.  tyro's framed complaint becomes one line, with exit code 2 and the
    nearest flag; `absent` are flags that one may look for, and why there are none."""
    words, said = sys.argv[1:] if argv is None else list(argv), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            style = tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff
            return tyro.cli(kind, prog=prog, args=words, config=style)
    except SystemExit as end:
        if end.code:
            # The frame's rules, or what ASCII has in their place; the first line is the title.
            rule, lines = re.compile("[│╭╮╰╯─ -]*"), said.getvalue().splitlines()[1:]
            text = " ".join(";" if rule.fullmatch(line) else line.strip("│ ") for line in lines)
            text = re.split("For full helptext|Argument helptext", re.sub("[; ]*; *", "; ", text))[0]
            if unknown := re.search(r"Unrecognized options: ([^\s,;]+)", text):
                flag = unknown[1].split("=")[0]
                near = difflib.get_close_matches(flag, flags_of(kind), 1, 0)
                text = f"{flag}: " + ((absent or {}).get(flag) or f"unknown; did you mean {near[0]}?")
            print(f"{prog}: error: {text.strip('; ')}  (see --help)", file=sys.stderr)
        raise


def check(o: Options) -> None:
    """ValueError on a value that would end in a traceback or in a wrong number, naming flag and remedy."""
    s, b, f = o.sampling, o.benchmarks, o.finished
    for group in (s, b, o.machine):
        for x in fields(group):
            if type(value := getattr(group, x.name)) is int and value < 0:
                raise ValueError(f"--{x.name.replace('_', '-')} {value}: must not be negative")
    for t in (s.temperature, *f.temperatures):
        if not 1e-3 <= t <= 1e3:
            raise ValueError(f"--temperature {t:g}: must lie between 0.001 and 1000")
    if not 0 < s.top_p <= 1:
        raise ValueError(f"--top-p {s.top_p:g}: must lie above 0 and be at most 1")
    if s.samples and s.k > s.samples:
        raise ValueError(f"--k {s.k}: larger than --samples {s.samples}; draw at least k a problem")
    if bool(b.model) != bool(b.benchmark):
        given, missing = ("model", "benchmark") if b.model else ("benchmark", "model")
        raise ValueError(f"--{given} {getattr(b, given)[0]}: needs --{missing} too")
    if b.model and f.runs:
        raise ValueError(f"--model {b.model[0]}: benchmarks or runs, not both; leave one out")
    if "{problem}" not in b.template:
        raise ValueError(f"--template {b.template!r}: needs {{problem}}, where the question goes")
    if (f.law or f.show or f.sample or f.temperatures) and not f.runs:
        raise ValueError("no run named: give folders that train.py made, before --temperatures")


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


def runs(o: Options) -> None:
    """Everything about finished runs."""
    records, notes = find_records(o.finished.runs)
    set_threads(o.machine.threads, embedded=not any(r.settings.get("model") for r in records))
    for note in notes:
        print(note, file=sys.stderr)
    alone = len(records) == 1
    out = own_folder(Path(o.machine.out or (records[0].folder / "eval" if alone else "runs/compare")))
    if o.finished.show:
        if not alone:
            raise ValueError(f"--show: {len(records)} runs; name one, e.g. {records[0].folder}")
        return show(records[0], o.sampling.seed, o.machine.attention, out)
    if o.finished.law:
        law(records, out)
    else:
        tasks = {r.task: [x for x in records if x.task == r.task] for r in records}
        for i, (task, members) in enumerate(tasks.items(), 1):  # no frontier lies in two sets of problems
            place = out
            if len(tasks) > 1:
                place = own_folder(out / f"{i}-{Path(task).name or 'embedded'}")
                print(f"\n== {task or 'the embedded task'}: {len(members)} of {len(records)} runs\n")
            compare(o, grouped(members), place)
        if alone or o.finished.sample:
            sample_runs(o, records, out)
    print(f"\npictures and CSV: {out}")


def compare(o: Options, groups: dict[str, list[Record]], out: Path) -> None:
    """The tables and the frontier: along training from the logs, over temperatures from fresh samples."""
    records, s, temperatures = [r for g in groups.values() for r in g], o.sampling, o.finished.temperatures
    if len(records) == 1:
        print(f"The run's log: first and last evaluation\n\n{table({records[0].spec: records[0].rows})}\n")
    else:
        rows = comparison(groups)
        print_comparison(groups, rows)
        write_csv(out / "comparison.csv", rows)
    sampled, panels, found = {}, [], []
    if temperatures:
        n = s.samples or s.k or 32
        sampled = over_temperatures(groups, sorted(temperatures), n, s.top_p, s.seed, out)
    for along, title in (("step", "along training (large: end)"), ("temperature", "over test temperatures")):
        for prefix in ("", "hard_"):
            if along == "step":
                k = k_of(records, s.k)
                points = training_points(groups, prefix, k) if len(groups) > 1 else {}
            else:
                k = s.k or s.samples or 32
                points = {
                    key: {q: outcome(e, prefix, k) for q, e in every.items()}
                    for key, every in sampled.items()
                }
            if points:
                name = f"{prefix.rstrip('_') or 'held-out'} problems"
                rows = frontier(groups, points, along)
                end = "end of training" if along == "step" else "test temperatures"
                print_frontier(rows, k, f"{name}, {end}")
                found += [{"problems": name, "k": k, **r} for r in rows]
                panels.append((f"{name}, {title}", along, k, points))
    if panels:
        draw_frontier(panels, groups, out / "frontier.png")
        write_csv(out / "frontier.csv", found)


def k_of(records: Sequence[Record], wanted: int) -> int:
    """The k of pass@k that all logs can tell.  ValueError where they cannot tell what is wanted."""
    logged = min(int(e.get("k", 1)) for r in records for e in r.evaluations)
    if wanted > logged:
        raise ValueError(f"--k {wanted}: the logs tell pass@{logged}; leave --k out, or name a single run")
    return wanted or min(32, logged)


def sample_runs(o: Options, records: Sequence[Record], out: Path) -> None:
    """Fresh samples of every run: tables, calibration, forking tokens."""
    s, k = o.sampling, o.sampling.k or o.sampling.samples or 32
    n = s.samples or k
    how = f"temperature {s.temperature:g}, top-p {s.top_p:g}, no top-k, seed {s.seed}"
    print(f"Fresh samples: {n} per problem, {how}\n")
    sets = {str(r.folder): fresh(r, n, s.temperature, s.top_p, s.seed) for r in records}
    print_samples(sets, [x for x in sorted({8, 16, 32, k}) if 1 < x <= n], out)
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
    o = command_line(Options, "eval.py", argv)
    try:
        check(o)
        if o.benchmarks.model:
            benchmark(o)
        elif o.finished.runs:
            runs(o)
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
