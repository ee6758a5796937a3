"""Chapter 6. Evaluation: what a policy can do at the first try, and what it can still do at all.

Claim. pass@1 alone cannot see a collapse.  A policy that puts all its probability on one answer per problem
and one that spreads it over many may solve equally often at the first try; only the second finds new answers
when it is asked again, and has anything left to reinforce.  And a table at equal steps cannot tell a remedy
from a smaller learning rate: what learns less also collapses less.  So remedies are compared with plain GRPO
at several learning rates, at equal pass@1.

    python eval.py                                       the estimators, shown on made-up counts
    python eval.py runs/opefo-s0                         one run: its log, samples, diversity, calibration
    python eval.py runs/*                                methods over seeds, the frontier, from the logs
    python eval.py runs/* --temperatures .5 .6 .8 1      the frontier over test temperatures too
    python eval.py --law runs/grpo-*                     does R = -a e^H + b predict the rest of a run?
    python eval.py --show runs/opefo-s0                  responses in the colours of their entropy flow
    python eval.py --model FOLDER_OR_ID --benchmark aime24 math500 --k 32 --engine vllm --against steer

The same command again goes on where a kill stopped it.  Sampling is at temperature 1 without top-p or top-k
unless said otherwise, since truncation hides a collapse.
Left out against a production harness: few-shot prompts, code execution, judge models.
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
from dataclasses import dataclass, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

if __name__ == "__main__":  # Ctrl-C in the seconds that the imports below take
    said = b"stopped; nothing was written yet\n"
    signal.signal(signal.SIGINT, lambda *_: os.write(2, said) and os._exit(130))

import numpy as np
import pandas as pd
import torch
import tyro
from filelock import FileLock
from tqdm import tqdm

import rollout
from entropy_math import TokenStats, check_entropy_law, entropy_change
from grpo import Policy, Tokens, fast_products, grade, group_advantages, last_boxed
from rollout import Engine, Problem, Sampling, Task, TorchEngine, answer, chain_task

__all__ = ["evaluate", "grade", "main", "pass_at_k"]  # `grade` is chapter 2's, offered here beside pass_at_k

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
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))  # (6.1); a factor is 0 if n - c < k


def distinct_correct(task: Task, texts: Sequence[str], correct: Sequence[bool]) -> int:
    """Number of different right answers among the samples of one problem."""
    return len({task.signature(t) for t, ok in zip(texts, correct) if ok})


ROWS = 1024
Part = tuple[Tokens, list[str]]  # n responses to each of some problems, B rows, and their texts


def responses(
    engine: Engine, task: Task, problems: Sequence[Problem], how: Sampling, generator: Any
) -> Iterator[Part]:
    """how.n responses to every problem, at most about ROWS at a time."""
    step = max(1, ROWS // how.n)
    for i in range(0, len(problems), step):
        yield answer(engine, task, problems[i : i + step], how, generator)


@torch.no_grad()
def evaluate(
    engine: Engine, task: Task, k: int = 32, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
) -> dict[str, Any]:
    """k samples for each held-out problem, from a generator of its own: evaluating changes no run.

    Returns pass@1 and pass@k, distinct_correct (different right answers per problem), eval_entropy (token
    mean, nats), eval_length (tokens), right (how many samples of each problem are right: this gives pass@k
    for smaller k, and intervals over problems), the same for hard problems as hard_*, k, and a few samples.
    """
    generator = torch.Generator(engine.device).manual_seed(seed)
    how = Sampling(k, task.max_new_tokens, temperature, top_p, entropy=True)
    result: dict[str, Any] = {"k": k}
    for prefix, problems in (("", task.test), ("hard_", task.hard)):
        if problems:
            parts = list(responses(engine, task, problems, how, generator))
            result |= {prefix + name: value for name, value in _summary(task, parts, k).items()}
            if not prefix:
                result["samples"] = _samples(problems, *parts[0], k)
    return result


def _summary(task: Task, parts: list[Part], k: int) -> dict[str, Any]:
    """Means over problems of the metrics of `evaluate`."""
    solved, distinct, nats, tokens = [], [], 0.0, 0
    for out, texts in parts:
        right = out.correct.view(-1, k).tolist()
        solved += map(sum, right)
        distinct += [distinct_correct(task, texts[i * k : (i + 1) * k], r) for i, r in enumerate(right)]
        nats += float(torch.where(out.mask, out.entropy, 0).sum(dtype=torch.float64))
        tokens += int(out.mask.sum())
    n = len(solved)
    one, several = (sum(pass_at_k(k, c, j) for c in solved) / n for j in (1, k))
    means = {"pass@1": one, "pass@k": several, "distinct_correct": sum(distinct) / n}
    return means | {"eval_entropy": nats / tokens, "eval_length": tokens / (n * k), "right": solved}


def _samples(problems: Sequence[Problem], out: Tokens, texts: list[str], k: int) -> list[dict[str, Any]]:
    """The first four responses to each of the first two problems, for reading."""
    facts = {"correct": out.correct, "truncated": out.truncated, "tokens": out.mask.sum(1)}
    return [
        {"prompt": problem.prompt, "answer": problem.answer, "response": texts[i]}
        | {name: x[i].item() for name, x in facts.items()}
        for problem, first in zip(problems[:2], range(0, len(texts), k))
        for i in range(first, first + min(4, k))
    ]


# ------------------------------------------------------------------------------------------------------------
# 2. How sure one can be


def mean_se(values: Sequence[float]) -> tuple[float, float]:
    """Mean of n independent values and its standard error (NaN for n = 1).

    se = s / √n,  s² = Σ (v - mean)² / (n - 1)                                                           (6.2)

    Over problems it says how much the score depends on the choice of problems, the samples' noise included;
    over seeds, on warm start, prompt order and sampling.  Neither holds the other.
    """
    v = pd.Series(values, dtype=float)
    return float(v.mean(skipna=False)), float(v.sem(skipna=False))


@cache
def resample(n: int, draws: int, seed: int = 0) -> np.ndarray:
    """(n, 1 + draws) bootstrap weights: column 0 is the data, every other column n picks with replacement."""
    picks = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)
    return np.vstack([np.full((1, n), 1 / n), picks / n]).T.copy()


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
    low, high = np.percentile(d @ resample(len(d), draws)[:, 1:], [2.5, 97.5])
    return float(d.mean()), float(low), float(high)


# ------------------------------------------------------------------------------------------------------------
# 3. Diversity and calibration
#
# Samples are a frame with a row for each response: problem, sample (their numbers), correct, truncated,
# logp (Σ log π of its tokens), ids, nats (the entropy at each token), text.  In a file, a line of JSON.


def to_rows(out: Tokens, texts: list[str], k: int, first: int = 0) -> list[dict[str, Any]]:
    """k responses to each of some problems, of which the first has the number `first`."""
    logp, nats = torch.where(out.mask, out.rollout_logp, 0).sum(-1, dtype=torch.float64), out.entropy.double()
    rows = []
    for i, m in enumerate(out.mask):
        row = {"problem": first + i // k, "sample": i % k, "logp": round(logp[i].item(), 5), "text": texts[i]}
        row |= {name: bool(getattr(out, name)[i]) for name in ("correct", "truncated")}
        row |= {"ids": out.ids[i][m].tolist(), "nats": [round(x, 5) for x in nats[i][m].tolist()]}
        rows.append(row)
    return rows


def distinct_n(texts: Sequence[Sequence[int]], n: int) -> float:
    """distinct-n = different n-grams / all n-grams of the responses to one problem   1510.03055 (6.4)

    It falls with length and with the number of texts: compare at equal ones only."""
    grams = [tuple(t[i : i + n]) for t in texts for i in range(len(t) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def common_length(samples: pd.DataFrame, share: float = 0.9) -> int:
    """The largest length in tokens that `share` of all responses reach."""
    lengths = sorted(map(len, samples["ids"]), reverse=True)
    return lengths[math.ceil(share * len(lengths)) - 1]


def calibration(confidence: Sequence[float], right: Sequence[bool], bins: int = 10) -> list[tuple]:
    """(mean confidence, share right, count) of at most `bins` groups of about equal size, by confidence.
    Equal confidences stay in one group: the order of the data does not matter."""
    c, r = np.asarray(confidence, dtype=float), np.asarray(right, dtype=float)
    edges = np.unique(np.quantile(c, np.arange(1, bins) / bins))
    which = np.searchsorted(edges, c, side="left")
    return [(c[which == b].mean(), r[which == b].mean(), int((which == b).sum())) for b in np.unique(which)]


def calibration_error(confidence: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """ECE = Σ_b n_b / n |share right_b - mean confidence_b|, over the groups b of `calibration`     (6.6)"""
    return float(sum(n * abs(r - c) for c, r, n in calibration(confidence, right, bins)) / len(right))


def confidences(samples: pd.DataFrame, key: Callable[[str], str]) -> dict[str, tuple[list, list]]:
    """Two answers to "how sure was it", each against whether it was right.

    vote         of a problem: the share of its most frequent answer by `key` (the first drawn among equals),
                 right if that answer is; 0 and wrong without any answer.  None for single samples, which
                 always agree with themselves
    likelihood   of a response: exp of the mean of log π over its tokens; right if the response is
    """
    by, shares, voted = samples.assign(key=samples["text"].map(key)).groupby("problem"), [], []
    for _, group in by:
        votes = Counter(filter(None, group["key"])).most_common(1)
        most, count = votes[0] if votes else ("", 0)
        shares.append(count / len(group))
        voted.append(count > 0 and bool(group["correct"][group["key"] == most].iloc[0]))
    likely = np.exp(samples["logp"] / samples["ids"].map(len).clip(lower=1))
    found = {"vote": (shares, voted)} if by.size().max() > 1 else {}
    return found | {"likelihood": (likely.tolist(), samples["correct"].tolist())}


def forking(nats: np.ndarray, share: float = 0.2) -> float:
    """H₀, from which on a token is a fork: the ⌈share · N⌉-th largest of N entropies, 2506.01939     (6.7)"""
    return float(np.sort(nats)[::-1][math.ceil(share * len(nats)) - 1])


def measure(
    samples: pd.DataFrame, k: int, key: Callable[[str], str], vote: Callable[[str], str], length: int = 0
) -> dict[str, float]:
    """Everything that samples tell: means over problems, and beside each, as "NAME se", its error (6.2).

    pass@1 (= avg@n), pass@8, 16, 32 and k as far as n samples allow; distinct_correct by `key`; entropy
    (nats, token mean, its error linearised as of a ratio), length (tokens), truncated (share); distinct-1 to
    -3 of the first `length` tokens (0: the common length); both calibration errors, votes by `vote`.
    """
    length, sizes = length or common_length(samples), samples["ids"].map(len)
    answers = samples["text"].map(key).where(samples["correct"])
    frame = samples.assign(tokens=sizes, sum=samples["nats"].map(sum), answer=answers)
    by, starts = frame.groupby("problem"), samples["ids"].str[:length][sizes >= length]
    n, tokens, nats = int(by.size().min()), by["tokens"].sum(), by["sum"].sum()
    H = float(nats.sum() / max(1, tokens.sum()))
    texts = [list(t) for _, t in starts.groupby(samples["problem"]) if len(t) > 1]
    ks, right = sorted(j for j in {1, 8, 16, 32, k} if j <= n), by["correct"].sum()
    each = {f"pass@{j}": [pass_at_k(n, c, j) for c in right] for j in ks} | {
        "distinct_correct": by["answer"].nunique(),
        "entropy": (nats - H * tokens) / max(1, tokens.mean()),
        "length": tokens / n,
        "truncated": by["truncated"].mean(),
        **{f"distinct-{m}": [distinct_n(t, m) for t in texts] for m in (1, 2, 3)},
    }
    out = {x: v for name, values in each.items() for x, v in zip((name, f"{name} se"), mean_se(values))}
    out |= {f"ece_{name}": calibration_error(*pair) for name, pair in confidences(samples, vote).items()}
    return out | {"entropy": H, "common_length": length}


# ------------------------------------------------------------------------------------------------------------
# 4. Tables, files, and the picture of one training call


def shown(rows: Sequence[dict[str, Any]], columns: dict[str, str] | Sequence[str]) -> str:
    """Rows as a table in plain text; `columns`: keys, and what to call them; names in % are percentages.
    Beside KEY stands its error, "KEY se"; beside "KEY diff" its interval, "KEY low" and "KEY high"."""
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

    frame = pd.DataFrame([[cell(r, key) for key in names] for r in rows], columns=list(names.values()))
    frame.index, frame.columns.name = pd.Index(frame.iloc[:, 0], dtype=object), frame.columns[0]
    return frame.rename_axis(index=None).iloc[:, 1:].to_string()


def write_csv(path: Path, rows: Any) -> None:
    """One column for every key of any row that holds a number or a word."""
    pd.DataFrame(rows).dropna(axis=1, how="all").to_csv(path, index=False, float_format="%.6g")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file.  A last line cut short by a kill is dropped, any other damage an error."""
    rows, lines = [], path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            rows += [dict(json.loads(line))] if line.strip() else []
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is damaged ({str(error)[:80]}); remove it") from None
    return rows


# Colours differ in lightness and every curve has its own dash, so that the picture survives a grey printer.
STYLES = [
    ("#000000", "-"), ("#d55e00", "--"), ("#56b4e9", "-."), ("#009e73", ":"),
    ("#cc79a7", (0, (5, 1, 1, 1, 1, 1))),
    ("#7f6000", (0, (8, 2))), ("#0000a0", (0, (2, 1))), ("#e69f00", (0, (1, 2))),
]  # fmt: skip


def style(i: int) -> dict[str, Any]:
    """Colour and dash of the i-th curve."""
    return dict(zip(("color", "linestyle"), STYLES[i % len(STYLES)]))


def figure(width: float, height: float, rows: int, columns: int, labels: Sequence = (), **how: Any) -> tuple:
    """A figure and its axes (rows, columns), each with a grid; labels: (title, x, y) of the first axes."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **how)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
    for ax, (title, x, y) in zip(axes.flat, labels):
        ax.set(title=title, xlabel=x, ylabel=y)
    return fig, axes


def save(fig: Any, path: Path) -> None:
    """Written under another name and renamed: a picture is never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.png")
    fig.savefig(part, dpi=110)
    part.replace(path)


def series(rows: list[dict[str, Any]], key: str) -> pd.Series:
    """step -> value, of the rows that have a finite number there."""
    values = pd.Series({r["step"]: r.get(key) for r in rows}, dtype=float)
    return values[np.isfinite(values)]


def common_k(runs: dict[str, list[dict[str, Any]]]) -> Any:
    """The k of every evaluation; "k" where they differ."""
    found = {r["k"] for rows in runs.values() for r in rows if "k" in r}
    return found.pop() if len(found) == 1 else "k"


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """entropy.png: entropy, pass@1 and pass@k, the plane of both, and one panel of flows a method."""
    k, lines = common_k(runs), -(-len(runs) // 3)
    labels = [
        ("Entropy on the training batch", "step", "nats per token"),
        (f"Held-out: pass@1 (circles), pass@{k} (triangles)", "step", "share of problems"),
        ("First try against any try (square: end)", "pass@1", f"pass@{k}"),
    ]
    heights = [4.2] + [2.9] * lines
    fig, axes = figure(13.8, sum(heights), 1 + lines, 3, labels, height_ratios=heights)
    entropy, progress, plane = axes[0]
    for i, (label, rows) in enumerate(runs.items()):
        look, values = style(i), series(rows, "entropy")
        entropy.plot(values, alpha=0.2, linewidth=0.8, color=look["color"])
        entropy.plot(values.ewm(alpha=0.2, adjust=False).mean(), label=label, **look)  # smooth, for the eye
        one, several = series(rows, "pass@1"), series(rows, "pass@k")
        progress.plot(one, marker="o", markersize=3.5, **look)
        progress.plot(several, marker="^", markersize=3.5, **look)
        plane.plot(*(both := pd.concat([one, several], axis=1).dropna().T.to_numpy()), marker="o", **look)
        plane.plot(*both[:, -1:], marker="s", markersize=8, color=look["color"])
    entropy.set_ylim(bottom=0)
    entropy.legend(fontsize=8)
    progress.set_ylim(0, 1.02)
    _draw_flows(axes[1:], runs)
    save(fig, path)


def _draw_flows(axes: Any, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Per method: the tabular flow up and down as areas (left scale), the measured change as dots (right), on
    scales that all panels share."""

    def largest(*keys: str) -> float:
        sizes = [series(rows, key).abs().max() for rows in runs.values() for key in keys]
        return 1.1 * max((x for x in sizes if x > 0), default=1.0)

    top, change_top = largest("flow_up", "flow_down"), largest("dH_measured")
    for ax in axes.flat[len(runs) :]:
        ax.set_axis_off()
    for ax, (label, rows) in zip(axes.flat, runs.items()):
        flows = pd.concat([series(rows, x) for x in ("flow_up", "flow_down")], axis=1).dropna()
        up, down = flows.ewm(alpha=0.2, adjust=False).mean().T.to_numpy()
        ax.fill_between(flows.index, 0, up, color="#bbbbbb", label="up")
        ax.fill_between(flows.index, 0, -down, color="#666666", label="down")
        ax.plot(flows.index, up - down, color="black", linewidth=1.2, label="net")
        ax.set(title=f"{label}: entropy flow", xlabel="step", ylim=(-top, top))
        ax.set_ylabel("flow, nats per unit learning rate")
        ax.legend(fontsize=7, loc="upper right", ncols=3)
        right = ax.twinx()
        right.plot(series(rows, "dH_measured"), ".", color="#d55e00", markersize=5)
        right.set_ylim(-change_top, change_top)
        right.set_ylabel("measured change, nats (dots)", color="#d55e00", fontsize=8)


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Start and end of what matters, one line a method."""
    k, body = common_k(runs), []
    keys = {"eval_entropy": "entropy", "pass@1": "pass@1", "pass@k": f"pass@{k}",
            "hard_pass@k": f"hard pass@{k}", "distinct_correct": "distinct right"}  # fmt: skip
    for label, rows in runs.items():
        if marks := [r for r in rows if "pass@1" in r]:
            a, b, last = marks[0], marks[-1], rows[-1]["step"]
            row = {key: f"{a[key]:.3f} → {b[key]:.3f}" for key in keys if key in a}
            row["k"] = b.get("k")
            row["steps"] = last if b["step"] == last else f"{last} (evaluated at {b['step']})"
            body.append(row | {"method": label, "seconds": f"{sum(r.get('seconds', 0) for r in rows):.0f}"})
    each = {"k": "k"} if k == "k" else {}  # they differ: each method's own
    return shown(body, {"method": "method", **keys, **each, "steps": "steps", "seconds": "seconds"})


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
    own: set[str]  # the names of these options
    settings: dict[str, Any]
    shared: dict[str, Any]  # the settings that make a run what it is, apart from method and seed
    seed: str  # what pairs two runs: the value of every setting called seed
    task: str  # where its held-out problems come from, "" for the embedded task
    rows: list[dict[str, Any]]  # metrics.jsonl
    evaluations: list[dict[str, Any]]  # those of its rows that are one


Groups = dict[str, list[Record]]  # label -> runs that differ in the seed only


def read_record(folder: Path) -> Record:
    """Raises ValueError where the folder holds no run with an evaluation."""
    try:
        config = json.loads((folder / "config.json").read_text())
        (spec,), s = config["specs"], config["settings"]
        found = [r for r in read_jsonl(folder / "metrics.jsonl") if "step" in r]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"no run, or a damaged one: {error}") from None
    own = {x.partition("=")[0].replace("-", "_") for x in spec.partition(":")[2].split(",") if x}
    seed = {k: v for k, v in sorted(s.items()) if k.endswith("seed")}
    shared = {k: v for k, v in s.items() if k not in BOOKKEEPING | seed.keys()}
    rows = [{k: v for k, v in r.items() if v is not None} for r in found]  # null: not a finite number
    evaluations = [r for r in rows if "pass@1" in r]
    if not evaluations:
        raise ValueError("a run that was never evaluated")
    task = s.get("eval_data") or s.get("data") or ""
    return Record(folder, spec, own, s, shared, str(seed), task, rows, evaluations)


def find_records(names: Sequence[str]) -> tuple[list[Record], list[str]]:
    """All runs in the folders, a comparison's members among them, and why others are left out."""
    records, notes, folders = {}, [], []
    for name in map(Path, names):
        members = sorted(p.parent for p in name.glob("*/metrics.jsonl"))
        if not (name / MARK).is_file() and not name.is_file():  # ours; a file that the shell's * caught
            folders += [name] if (name / "metrics.jsonl").is_file() else members or [name]
    for folder in folders:
        try:
            r = read_record(folder)
            if records.setdefault((r.spec, r.seed, str(r.shared)), r) is not r:
                raise ValueError(f"{r.spec} with the same settings and seed is there already")
        except ValueError as error:
            notes.append(f"skipped {folder}: {error}")
    if not records:
        why = "; ".join(notes[:3]) or "nothing but files"
        raise ValueError(f"{' '.join(names[:3])}: no run is left ({why}); name folders that train.py made")
    return list(records.values()), notes


def grouped(records: Sequence[Record]) -> Groups:
    """The label is the spec, and the settings by which groups of the same spec differ."""
    groups: dict[tuple, list[Record]] = {}
    for r in records:
        groups.setdefault((r.spec, json.dumps(r.shared, sort_keys=True)), []).append(r)
    out = {}
    for (spec, _), members in groups.items():
        same = [g[0].shared for (other, _), g in groups.items() if other == spec]
        own = {k: v for k, v in members[0].shared.items() if any(s.get(k) != v for s in same)}
        out[spec + (f" [{', '.join(f'{k}={v}' for k, v in own.items())}]" if own else "")] = members
    return out


def rivals(groups: Groups, label: str) -> list[str]:
    """The plain GRPO groups that a method is measured against, the most alike first: all settings are the
    same, but for the learning rate and what either spec names.  Plain GRPO's rivals have a shorter spec."""

    def plain(r: Record) -> bool:  # no other option than settings of the training
        return r.spec.partition(":")[0] == "grpo" and r.own <= set(r.settings)

    one, found = groups[label][0], {}
    for x, (r, *_) in groups.items():
        differ = {k for k in {*one.shared, *r.shared} if one.shared.get(k) != r.shared.get(k)}
        shorter = len(r.own) < len(one.own) or not plain(one)
        if plain(r) and shorter and differ <= {"lr", *one.own, *r.own}:
            found[x] = len(differ), len(r.own)
    return sorted(found, key=found.__getitem__)


def sweep_of(groups: Groups, label: str) -> list[str]:
    """The rivals at all learning rates, which the frontier goes through, of what is not GRPO itself."""
    lines = [x for x in rivals(groups, label) if groups[x][0].own <= {"lr"}]
    return lines if not label.startswith("grpo") else []


def logged(groups: Groups) -> pd.DataFrame:
    """All evaluations, a row each."""
    runs = [(label, r) for label, members in groups.items() for r in members]
    return pd.DataFrame([{"method": x, "pair": r.seed} | e for x, r in runs for e in r.evaluations])


def at_smallest_k(log: pd.DataFrame) -> pd.DataFrame:
    """pass@k of all rows at the smallest k among them (6.1); what only k samples tell becomes NaN."""
    if "k" in log and (log["k"] > log["k"].min()).any():
        k, more = int(log["k"].min()), log["k"] > log["k"].min()
        for x in ("", "hard_"):
            kept = [f"{x}right", "k"] if f"{x}right" in log else []
            few = lambda row: np.mean([pass_at_k(int(row.iloc[1]), c, k) for c in row.iloc[0]])  # noqa: B023, E731
            log.loc[more, f"{x}pass@k"] = log.loc[more, kept].dropna().apply(few, axis=1) if kept else np.nan
        log.loc[more, "distinct_correct"] = np.nan
    return log


def comparison(groups: Groups) -> list[dict[str, Any]]:
    """One row a method: mean and standard error over seeds (6.2) at the last evaluation, and the difference
    to plain GRPO on the same seeds at the same step (6.3)."""
    by = at_smallest_k(logged(groups)).set_index(["pair", "step"]).groupby("method", sort=False)
    logs, rows = {label: log.reindex(columns=METRICS) for label, log in by}, []
    for label, log in logs.items():
        last, other = log.groupby("pair", sort=False).tail(1), next(iter(rivals(groups, label)), None)
        both = last.index.intersection(logs[other].index, sort=False) if other else []
        row = {"method": label, "seeds": len(last), "step": last.index.get_level_values("step").max()}
        row |= {"against": other, "pairs": len(both)}
        for x in METRICS:
            row[x], row[f"{x} se"] = mean_se(last[x])
            if len(both):
                gap = paired(last.loc[both, x], logs[other].loc[both, x])
                row |= zip((f"{x} diff", f"{x} low", f"{x} high"), gap)
        rows.append(row)
    return rows


def print_comparison(groups: Groups, rows: list[dict[str, Any]]) -> None:
    """Two tables, and how far they can be trusted."""
    records = [r for g in groups.values() for r in g]
    k = min((int(e["k"]) for r in records for e in r.evaluations if "k" in e), default=0)
    names = {x: x.replace("_", " ").replace("@k", f"@{k}").replace("eval ", "") for x in METRICS}
    print("At the last evaluation: mean ± standard error over seeds (6.2)\n")
    print(shown(rows, {"method": "method", "seeds": "seeds", "step": "step", **names}))
    for r in records:
        if (end := r.evaluations[-1]["step"]) < r.settings.get("steps", 0):
            print(f"  {r.folder} stopped at {end} of {r.settings['steps']} steps")
    rows = [r for r in rows if r["pairs"]]
    if not rows:
        print("\nNo differences: they need plain grpo among the runs, on the same seeds.")
        return
    n = max(r["pairs"] for r in rows)
    print("\nDifference on the same seeds, and its 95 % bootstrap interval over seeds (6.3)\n")
    differences = {f"{x} diff": name for x, name in names.items()}
    print(shown(rows, {"method": "method", "against": "minus", "pairs": "pairs", **differences}))
    trust = f"an interval holds the median with probability {1 - 2.0 ** (1 - n):.2f} at most"
    print(f"{n} pairs: {trust}" if n > 1 else "1 pair: no interval; it takes two seeds or more")


# -- the frontier --------------------------------------------------------------------------------------------
#
# A pair is a seed, with all that two runs of it share: warm start, prompts, problems.  A policy in one pair
# is an array of means over problems: row 0 pass@1, row 1 pass@k, then what else is compared; column 0 is the
# mean itself, the others are bootstrap resamples of the problems, the same for all.

DRAWS = 1000
Means = dict[Any, np.ndarray]  # pair -> (measures, 1 + DRAWS)


def means(each: np.ndarray) -> np.ndarray:
    """(..., measures, problems) -> (..., measures, 1 + DRAWS)."""
    return each @ resample(each.shape[-1], DRAWS)


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


def middle(every: Means) -> np.ndarray:
    """Means over pairs of pass@1 and pass@k."""
    return np.mean([m[:2, 0] for m in every.values()], 0)


def on_frontier(sweep: dict[str, Means]) -> list[str]:
    """The policies that no other beats in both pass@1 and pass@k, in the mean over common pairs: a point
    below two better ones would bend the line down."""
    pairs = sorted(set.intersection(*map(set, sweep.values())))
    mean = {x: middle({q: m[q] for q in pairs}) for x, m in sweep.items()} if pairs else {}
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
    Its points have luck of their own, so near its steep end 0 is not what a second plain GRPO gets: -.02 in
    results/README.md.
    """
    n = len(d)
    mean = float(d[:, 0].mean()) if n else math.nan  # (6.9)
    if n < 2:
        return mean, math.nan, math.nan
    pick = np.random.default_rng(1).integers(n, size=(DRAWS, n))
    resampled = d[pick, np.arange(1, DRAWS + 1)[:, None]].mean(1)  # (DRAWS,)
    wide = math.sqrt(n / (n - 1)) * (np.quantile(resampled, [0.025, 0.975]) - resampled.mean())
    return mean, *(float(mean + w) for w in wide)


def drawn(o: Options, groups: Groups, out: Path) -> pd.DataFrame:
    """Fresh samples of the final policies, counted like evaluations, each at a test temperature."""
    rows = []
    for label, members in groups.items():
        for r in members:
            for (name, t), x in samples_of(o, r, out)[1].items():
                right = x.groupby("problem")["correct"].sum().tolist()
                row = {"method": label, "pair": r.seed, "temperature": t, "k": o.count}
                rows.append(row | {"right" if name == "test" else "hard_right": right})
    return pd.DataFrame(rows)


def frontier(groups: Groups, found: pd.DataFrame, key: str, along: str, k: int) -> list[dict[str, Any]]:
    """A row for every method at every step, or test temperature, that all of its seeds have: where it lies,
    D1 (6.9), and the line: through GRPO's rates at that step and the warm start, or at all temperatures."""
    points: dict[tuple[str, float], Means] = {}
    share = cache(lambda n: np.array([[pass_at_k(n, c, j) for c in range(n + 1)] for j in (1, k)]))
    for (label, at), each in found.groupby(["method", along], sort=False):
        if len(each) == len(groups[label]):
            counts = zip(each["pair"], each["k"], each[key])
            points[label, at] = {pair: means(share(n)[:, right]) for pair, n, right in counts}
    rows = []
    for (label, at), own in points.items():
        row = {"along": along, "method": label, "at": at} | dict(zip(("pass@1", "pass@k"), middle(own)))
        rates = sweep_of(groups, label)
        grpo = {point: m for point, m in points.items() if point[0] in rates}
        sweep = {f"{x} at {t:g}": m for (x, t), m in grpo.items()}
        if along == "step":
            start = {q: m for (_, step), every in grpo.items() if step == 0 for q, m in every.items()}
            sweep = {x: m for (x, step), m in grpo.items() if step == at}
            sweep = {"the warm start": start} | sweep if start and sweep else sweep
        if sweep:
            d, row["line"] = distances(own, sweep), {x: middle(sweep[x]).tolist() for x in on_frontier(sweep)}
            row |= zip(("D1 diff", "D1 low", "D1 high"), over_pairs(d))
            ends = [x for x, _ in row["line"].values()] or [row["pass@1"]]
            row["note"] = "" if min(ends) <= row["pass@1"] <= max(ends) else "beyond the line's end"
            row["pairs"] = len(d)
        rows.append(row)
    return rows


def print_frontier(title: str, k: int, rows: list[dict[str, Any]]) -> None:
    """The methods at the end of training, or at every test temperature, the best D1 first."""
    last = {r["method"]: r["at"] for r in rows}
    rows = [r for r in rows if "line" in r and (r["along"] == "temperature" or r["at"] == last[r["method"]])]
    print(f"\n{title}: D1 = pass@{k} above plain GRPO's line (6.8) at equal pass@1 (6.9), 95 % interval\n")
    if not rows:
        return print("none: needs grpo at one learning rate or more, and another method")
    columns = ("method", "at", "pass@1", "pass@k", "D1 diff", "pairs", "note")
    rows = sorted(rows, key=lambda r: -r["D1 diff"] if r["pairs"] else math.inf)
    print(shown(rows, {x: x.removesuffix(" diff").replace("@k", f"@{k}") for x in columns}))
    for names in dict.fromkeys("; ".join(r["line"]) for r in rows):
        print(f"the line: {names or 'no seed in common'}")


def draw_frontier(panels: list[tuple[str, int, list]], rates: dict[str, float], path: Path) -> None:
    """Panels of (title, k, rows of `frontier`): every method's path in the plane, its end large; GRPO's
    learning `rates` in greys, darker for smaller ones, under them the line (6.8)."""
    labels = [(title, "pass@1", f"pass@{k}") for title, k, _ in panels]
    fig, axes = figure(5.6 * len(panels) + 2.4, 5.2, 1, len(panels), labels)
    for ax, (_, _, rows) in zip(axes.flat, panels):
        paths = dict(list(pd.DataFrame(rows).groupby("method", sort=False)))
        for i, label in enumerate(sorted(paths, key=lambda x: rates.get(x, math.inf))):
            own, look = paths[label][["pass@1", "pass@k"]].to_numpy(), style(i - len(rates) + 1)
            if label in rates:
                look = {"color": str(0.7 * i / len(rates)), "linestyle": "-"}
            look |= {"marker": "os^Dv"[i % 5], "alpha": 0.85}
            ax.plot(*own.T, markersize=3, linewidth=1, **look)
            ax.plot(*own[-1], markersize=8, label=label, **look)
        ends = [r["line"] for r in rows if r.get("line") and r["at"] == rows[-1]["at"]]
        for points in (sorted(x.values()) for x in ends):
            ax.plot(*zip(*points), color="#dddddd", linewidth=6, zorder=0)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save(fig, path)


# -- the law -------------------------------------------------------------------------------------------------


def law_row(H: Sequence[float], R: Sequence[float], share: float = 0.15) -> dict[str, Any]:
    """Fit R = -a e^H + b to the first 15 %, three points or more, and predict the rest (2505.22617)."""
    n = max(3, round(share * len(H)))
    row = {"fitted": n, "predicted": max(0, len(H) - n)}
    if len(H) < n + 2:
        return row | {"why": f"{len(H)} points; the fit needs {n}, and two to predict"}
    try:
        law, rmse, last, _ = check_entropy_law(H, R, share)
    except ValueError as error:
        return row | {"why": str(error)}
    rest = np.asarray(R[n:])
    error = law.predict(H[n:]).numpy() - rest
    spread = float(((rest - rest.mean()) ** 2).sum()) or math.nan
    row |= {"a": law.a, "b": law.b, "R2 of the fit": law.r2, "rmse": rmse, "last error": last}
    row |= {"R2 of the rest": 1 - float((error**2).sum()) / spread}
    return row | {"largest error": float(np.abs(error).max())}


def law(records: Sequence[Record], out: Path) -> None:
    """Table, law.png, law.csv: R against H of the evaluations, as in the paper, but with the entropy of the
    very policy that is scored; and of every training batch: more points and more noise."""
    kinds = {"evaluation": ("eval_entropy", "pass@1", 14), "training batch": ("entropy", "reward", 3)}
    title = "R = -a e^H + b, {}: fitted on the filled points"
    labels = [(title.format(kind), "entropy H, nats", y) for kind, (_, y, _) in kinds.items()]
    fig, axes = figure(12, 5.2, 1, 2, labels)
    rows = []
    for i, record in enumerate(records):
        name = f"{record.spec}, seed {record.settings.get('seed')}"
        for ax, (kind, (x, y, size)) in zip(axes[0], kinds.items()):
            H, R = pd.DataFrame(record.rows).reindex(columns=[x, y]).dropna().T.to_numpy(copy=True)
            rows.append(row := {"run": str(record.folder), "points of": kind} | law_row(H, R))
            n, color = row["fitted"], style(i)["color"]
            ax.scatter(H[n:], R[n:], s=size, facecolors="none", edgecolors=color, linewidths=0.7)
            ax.scatter(H[:n], R[:n], s=2 * size, color=color, label=name)
            limits = ax.get_ylim()
            if "a" in row:
                h = np.linspace(min(H), max(H), 100)
                ax.plot(h, row["b"] - row["a"] * np.exp(h), scaley=False, **style(i))
            ax.set_ylim(limits, auto=True)
    axes[0, 0].legend(fontsize=7)
    save(fig, out / "law.png")
    write_csv(out / "law.csv", rows)
    keys = ("a", "b", "R2 of the fit", "R2 of the rest", "rmse", "largest error", "last error", "why")
    print(shown(rows, ("run", "points of", "fitted", "predicted", *keys)))
    print("R2 of the rest compares with its own mean: below 0, a constant predicts better than the law.")


# ------------------------------------------------------------------------------------------------------------
# 6. Samples, drawn once and stored


def attention_of(model: str | Path, flag: str, device: torch.device) -> str:
    """The flag; for auto, what a run's checkpoint was trained with, if that runs here, and sdpa of others."""
    if flag != "auto":
        return flag
    try:
        kind = json.loads((Path(model).parent / "config.json").read_text())["settings"]["attention"]
    except (OSError, ValueError, KeyError, TypeError):
        return "sdpa"
    return "sdpa" if device.type == "cpu" and kind.startswith("flash") else kind


def sampled(
    folder: Path, name: str, problems: Sequence[Problem], settings: dict[str, Any], ask: Callable[[], tuple]
) -> pd.DataFrame:
    """settings["samples"] responses to each problem, from folder/NAME-DIGEST.jsonl, a line a sample.

    The digest is of the settings (beside it in .json) and the problems: samples of different settings never
    mix.  What is missing is drawn with `ask() -> (engine, task, prompts)`.  A batch's draws depend on the
    seed and its place only: a run that was killed ends with the same samples.
    """
    s, n = settings, settings["samples"]
    text = json.dumps([s, [[p.prompt, p.answer] for p in problems]])
    path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.jsonl"
    step = max(1, s["batch"] // n)  # problems in a batch
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):  # a second eval.py waits, and finds them drawn
        return _sampled(path, name, problems, s, step, ask)


def _sampled(
    path: Path, name: str, problems: Sequence[Problem], s: dict[str, Any], step: int, ask: Callable[[], tuple]
) -> pd.DataFrame:
    """`sampled`, where nobody else writes to the file."""
    folder, n = path.parent, s["samples"]
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    done = sum(x.endswith(b"\n") for x in lines) // n
    if done < len(problems):
        engine, task, prompts = ask()
        done -= done % step
        path.with_suffix(".json").write_text(json.dumps(s, indent=2) + "\n")
        how = Sampling(n, s["max_new_tokens"], s["temperature"], s["top_p"], entropy=True)
        with open(path, "ab") as file:
            file.truncate(sum(map(len, lines[: done * n])))
            for i in tqdm(range(done, len(prompts), step), desc=f"{folder.name} {name}", unit="batch"):
                digest = hashlib.sha256(f"{s['seed']}/{name}/{i}".encode()).digest()
                generator = torch.Generator(engine.device).manual_seed(int.from_bytes(digest[:4], "little"))
                rows = to_rows(*answer(engine, task, prompts[i : i + step], how, generator), n, i)
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.write(text.encode("utf-8", "replace"))
                file.flush()
                os.fsync(file.fileno())
    rows = read_jsonl(path)
    if any((row.get("problem"), row.get("sample")) != divmod(i, n) for i, row in enumerate(rows)):
        raise ValueError(f"{path}: damaged, samples are missing or out of order; remove the file")
    return pd.DataFrame(rows)


def asked(o: Options, model: str) -> dict[str, Any]:
    """All that samples depend on, but for the problems."""
    device = usable_device(o.device)
    dtype = "float32" if device.type == "cpu" else "bfloat16"
    return {
        "model": model, "weights": fingerprint(Path(model)), "engine": o.engine,
        "dtype": dtype if o.dtype == "auto" else o.dtype,
        "attention": attention_of(model, o.attention, device), "temperature": o.temperature,
        "top_p": o.top_p, "seed": o.seed, "samples": o.count,
        "max_new_tokens": o.max_new_tokens, "batch": o.batch or (512 if o.engine == "vllm" else 128),
        **({"stop": o.stop} if o.stop else {}),
    }  # fmt: skip


def slug(model: str | Path) -> str:
    """A model's folder below --out."""
    return str(model).strip("/.").replace("/", "--")


def reopen(record: Record, o: Options) -> tuple[Task, Engine]:
    """A run's task, and an engine with its checkpoint; an embedded one stays on the CPU."""
    path, s = record.folder / "checkpoint", record.settings
    if not (path / "config.json").is_file():
        raise ValueError(f"{record.folder}: holds no checkpoint/; name the folder of a run")
    device = usable_device(o.device if record.task else "cpu")
    how = asked(replace(o, device=str(device)), str(path))
    model, tokenizer = rollout.load_model(
        str(path), how["dtype"], o.trust_remote_code, how["attention"], device
    )
    if not record.task:
        return chain_task(s.get("eval_problems", 96)), TorchEngine(model, tokenizer)
    names = ("data", "eval_data", "eval_problems", "prompt_template")
    limits = s["max_prompt_tokens"], s["max_new_tokens"]
    task = rollout.task_of_data(tokenizer, *(s[name] for name in names), s["chat"] == "auto", *limits)[0]
    return task, TorchEngine(model, tokenizer, stop=s.get("stop", ""))


def samples_of(o: Options, record: Record, out: Path) -> tuple[Task, dict[tuple[str, float], pd.DataFrame]]:
    """A run's task, and samples of its final policy: ("test" or "hard", temperature) -> frame."""
    (task, engine), found = reopen(record, o), {}
    own = {"max_new_tokens": task.max_new_tokens, "stop": engine.stop}
    o = replace(o, device=str(engine.device), batch=1024, **own)
    for t in sorted(o.temperatures) or [o.temperature]:
        settings = asked(replace(o, temperature=t), str(record.folder / "checkpoint"))
        for name, problems in (("test", task.test), ("hard", task.hard)):
            ask = lambda: (engine, task, problems)  # noqa: B023, E731
            if problems:
                found[name, t] = sampled(out / slug(record.folder), name, problems, settings, ask)
    return task, found


def fingerprint(folder: Path) -> str:
    """Of weights: size, end, and 4 kB at 256 places of each safetensors file (a merged adapter changes
    neither the embedding nor the last norm); "" where none is."""
    digest, files = hashlib.sha256(), [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
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


def draw_samples(sets: dict[str, pd.DataFrame], vote: Callable, out: Path, what: str, name: Callable) -> None:
    """The share right against confidence, a panel for each meaning of the word; the entropy over tokens with
    the fork's threshold (6.7).  The tokens drawn most often at forks are printed, as `name` writes them."""
    titles = {"vote": "share of the most frequent answer", "likelihood": "exp of the tokens' mean log π"}
    labels = [(f"confidence: {x}", "mean confidence", "share right") for x in titles.values()]
    fig, axes = figure(15, 4.8, 1, 3, [*labels, (f"{what} over tokens", "nats", "share of tokens")])
    top = max(np.concatenate(x["nats"]).max() for x in sets.values())
    for i, (label, samples) in enumerate(sets.items()):
        for key, pair in confidences(samples, vote).items():
            c, r, _ = zip(*calibration(*pair))
            text = f"{label}: ECE {calibration_error(*pair):.3f}"
            axes[0, list(titles).index(key)].plot(c, r, marker="o", markersize=4, label=text, **style(i))
        ids, nats = (np.concatenate(samples[x]) for x in ("ids", "nats"))
        cut, (counts, edges) = forking(nats), np.histogram(nats, np.linspace(0, top or 1, 51))
        axes[0, 2].stairs(counts / len(nats), edges, label=f"{label}: fork above {cut:.3f}", **style(i))
        axes[0, 2].axvline(cut, linewidth=0.8, **style(i))
        forks = Counter(sorted(ids[nats >= cut].tolist())).most_common(12)
        words = " ".join(f"{printable(name(x)).strip()} ({count})" for x, count in forks)
        print(f"tokens drawn most often at forks, the top 20 % by entropy (6.7), {label}: {words}")
    for ax in axes[0, :2]:
        ax.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=":")
        ax.set(xlim=(0, 1.02), ylim=(-0.02, 1.02))
    axes[0, 2].set_yscale("log")
    for ax in axes[0]:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    save(fig, out / "samples.png")


def token_names(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The tokens as the vocabulary has them; <id> where an embedding has more rows than the vocabulary."""
    return [f"<{i}>" if w is None else w for i, w in zip(ids, tokenizer.convert_ids_to_tokens(ids))]


def token_namer(model: str, trust: bool = False) -> Callable[[int], str]:
    """id -> the token's text; the id itself where the tokenizer cannot be read."""
    from transformers import AutoTokenizer

    try:
        source, how = rollout.model_source(model)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust, **how)
    except Exception:  # names are a convenience: the numbers do not depend on them
        return str
    return lambda i: tokenizer.decode([i]) or token_names(tokenizer, [i])[0]


# -- tokens in the colour of their entropy flow --------------------------------------------------------------
#
# A response is a dictionary: prompt, reward, tokens, and the flow of each token, nats per unit learning rate
# (positive raises entropy).


@torch.no_grad()
def fresh_flows(record: Record, o: Options) -> tuple[list[dict[str, Any]], str]:
    """The exact flow of a table, entropy_math (3.2), of the tokens of a fresh batch: what one step of GRPO on
    it, at the run's temperature, would do to entropy.  Of each of the first 8 problems with right and wrong
    answers, the response that moves entropy most."""
    task, engine = reopen(record, o)
    path, tau = record.folder / "checkpoint", record.settings.get("temperature", 1.0)
    problems, how = task.test[:32], Sampling(16, task.max_new_tokens, tau)
    out, _ = answer(engine, task, problems, how, torch.Generator(engine.device).manual_seed(o.seed))
    stats = TokenStats(**Policy(engine.model)(out, tau))
    adv = group_advantages(out.correct.double(), out.group)  # grpo (2.1)
    change = torch.where(out.mask, entropy_change(stats, adv[:, None]), 0)
    flow = change / out.mask.sum()  # (B, T), token mean
    best = flow.abs().sum(1).view(-1, how.n).max(1)
    found = []
    for p in best.values.nonzero()[:8, 0].tolist():
        i = p * how.n + int(best.indices[p])
        words = token_names(engine.tokenizer, out.ids[i][out.mask[i]].tolist())
        one = {"prompt": problems[p].prompt, "reward": float(out.correct[i]), "tokens": words}
        found.append(one | {"flow": flow[i][out.mask[i]].tolist()})
    return found, f"Exact flow of a table, fresh batch of {len(problems)} x 16 from {path}"


def printable(token: str | None) -> str:
    """A token as it may be printed: spaces and line ends as themselves, · for control characters."""
    token = (token or "<?>").replace("Ġ", " ").replace("▁", " ").replace("Ċ", "⏎").replace("\n", "⏎")
    return "".join(c if c.isprintable() else "·" for c in token)


def shade(flow: float, top: float) -> tuple[int, int, int]:
    """White at 0 to full red (raises entropy) or blue (lowers it) at ±top, by the square root: a few tokens
    carry most of the flow."""
    fade = round(255 - 175 * math.sqrt(min(1.0, abs(flow) / top)))
    return (255, fade, fade) if flow > 0 else (fade, fade, 255)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Entropy flow</title>
<style>body{{font:16px/2 sans-serif;max-width:60em;margin:2em auto;background:#fff;color:#000}}
span{{padding:.2em;white-space:pre-wrap}}</style><h1>Entropy flow, token by token</h1>
<p><span style="background:rgb(255,80,80)">raises entropy</span>
<span style="background:rgb(80,80,255)">lowers it</span>; the colour goes with the square root of the flow,
full at {top:.3g} nats per unit learning rate. Point at a token for its number. {what}.</p>
{body}
</html>
"""


def without_frame(prompts: Sequence[str]) -> list[str]:
    """The prompts without the first and last lines that all of them share: a chat template's."""
    lines = [p.splitlines() or [""] for p in prompts]
    for end in (0, -1):
        while len(set(prompts)) > 1 and min(map(len, lines)) > 1 and len({x[end] for x in lines}) == 1:
            lines = [x[1:] if end == 0 else x[:-1] for x in lines]
    return ["\n".join(x) for x in lines]


def page(rows: Sequence[dict[str, Any]], top: float, what: str) -> str:
    """A self-contained HTML page, of full colour at ±top; everything that comes from a model is escaped."""
    body = []
    for r in rows:
        spans = [
            f'<span title="{f:+.3g}" style="background:rgb{shade(f, top)}">{html.escape(printable(w))}</span>'
            for w, f in zip(r["tokens"], r["flow"])
        ]
        blank = "" if any((w or "").startswith(("Ġ", "▁", " ")) for w in r["tokens"]) else " "
        body.append(f"<b>{html.escape(r['prompt'])}</b> (reward {r['reward']:g})<p>{blank.join(spans)}</p>")
    return PAGE.format(top=top, what=html.escape(what), body="\n".join(body))


def show(record: Record, o: Options, out: Path) -> None:
    """flow.html, and a line a response of its strongest tokens: of flows.jsonl, else of fresh ones."""
    path = record.folder / "flows.jsonl"  # what `train.py --ledger full` booked
    if path.is_file() and (rows := read_jsonl(path)):
        rows = [r | {"flow": r["network_flow"]} for r in rows if r["step"] == rows[-1]["step"]]
        what = f"Network flow of step {rows[-1]['step']}, from {path}"
    else:
        rows, what = fresh_flows(record, o)
    rows = [r | {"prompt": x} for r, x in zip(rows, without_frame([r["prompt"] for r in rows]))]
    top = max((abs(f) for r in rows for f in r["flow"]), default=0.0) or 1.0
    print(f"{what}\nThe strongest tokens, flow in percent of the largest: + raises entropy, - lowers it\n")
    for r in rows:
        strongest = sorted(zip(r["tokens"], r["flow"]), key=lambda pair: -abs(pair[1]))[:6]
        words = "  ".join(f"{printable(w)} {100 * f / top:+.0f}" for w, f in strongest)
        print(f"{printable(r['prompt'])[-60:]}   reward {r['reward']:g}:   {words}")
    (out / "flow.html").write_text(page(rows, top, what), encoding="utf-8")
    print(f"\npage: {out / 'flow.html'}")


# ------------------------------------------------------------------------------------------------------------
# 7. The benchmarks

# name -> samples a problem: many on the small sets, one on the large (OPEFO, STEER)
BENCHMARKS = {"aime24": 32, "aime25": 32, "amc23": 32, "math500": 1, "minerva": 1, "olympiadbench": 1}

SOURCES = {  # how the papers sampled, and which checkpoint they show
    "opefo": "2605.11491, transcribed by others; temperature 1, top-p .7; best checkpoint on these very sets",
    "steer": "2510.10150; temperature 1, top-p .7; avg@32 on AIME, AMC, else 1; best checkpoint on AIME24",
    "clip_cov": "2505.22617; sampling and benchmarks of the average are not recorded here",
    "par": "2511.05993 table 2; temperature 1, top-p 1; avg@64; validated on AIME25",
}
REPORTED = """\
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
clip_cov;GRPO, 7B;;;;;;;38.6
clip_cov;clip-higher, 7B;;;;;;;38.8
clip_cov;Clip-Cov, 7B;;;;;;;40.4
clip_cov;KL-Cov, 7B;;;;;;;40.6
clip_cov;GRPO, 32B;;;;;;;45.8
clip_cov;clip-higher, 32B;;;;;;;47.2
clip_cov;Clip-Cov, 32B;;;;;;;50.3
clip_cov;KL-Cov, 32B;;;;;;;52.2
par;base;10.0;3.8;30.04;43.76;14.41;;20.4
par;GRPO, 1 update;28.75;14.69;64.38;78.14;34.64;;44.12
par;PAR, entropy-guided;34.38;15.89;69.34;75.93;32.78;;45.66
par;adaptive entropy;33.96;18.65;68.52;73.98;31.66;;45.35
par;clip-higher;33.33;15.94;67.62;72.35;30.57;;43.96
"""


def load_benchmarks(names: Sequence[str], data: Sequence[str], limit: int) -> dict[str, tuple[Problem, ...]]:
    """name -> its problems (the first `limit`), from --data NAME=SOURCE, else $ENTROPY_FLOW_DATA/NAME.jsonl.
    A row that cannot be read is an error: a benchmark with holes is another benchmark."""
    given, out = dict(item.partition("=")[::2] for item in data), {}
    if stray := [x for x, source in given.items() if not source or x not in names]:
        raise ValueError(f"--data {stray[0]}: give NAME=FILE.jsonl, NAME among --benchmark {' '.join(names)}")
    for name in names:
        local = Path(os.environ.get("ENTROPY_FLOW_DATA") or "nowhere", f"{name}.jsonl")
        if not (source := given.get(name) or (str(local) if local.is_file() else "")):
            near = "" if name in BENCHMARKS else difflib.get_close_matches(name, BENCHMARKS, 1, 0)[0]
            raise ValueError(
                f"--benchmark {name}: no problems here{near and f'; did you mean {near}?'}; give --data "
                f"{name}=FILE.jsonl or owner/dataset@config:split, or a folder of files in ENTROPY_FLOW_DATA"
            )
        if rollout.made(source):
            raise ValueError(f"--data {name}={source}: made in code; evaluate a run on it: eval.py RUN")
        try:
            problems, notes = rollout.read_problems(source)
        except ValueError as error:
            raise ValueError(f"--data {name}={error}") from None
        if len(notes) > 1:
            raise ValueError(f"--data {name}={notes[1].replace(' left out', '')}; mend or remove them")
        out[name] = tuple(problems[: limit or None])
    return out


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


def open_engine(o: Options, model: str, everything: Sequence[Problem]) -> Engine:
    """An engine with a model; its context must hold the longest prompt and a response."""
    from transformers import AutoConfig, AutoTokenizer

    device, trust, s = usable_device(o.device), o.trust_remote_code, asked(o, model)
    try:
        source, how = rollout.model_source(model)
        if s["engine"] == "torch":
            policy, tokenizer = rollout.load_model(model, s["dtype"], trust, s["attention"], device)
        elif how:
            raise ValueError("--engine vllm reads folders; a run's checkpoint/ is one")
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust)
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust, **how).get_text_config()
        prompts = rollout.render(everything, tokenizer, o.template, not o.plain)
        longest = rollout.longest_prompt(prompts, tokenizer, config, s["max_new_tokens"])
    except Exception as error:  # missing, gated, damaged: a dozen classes of three libraries
        reason = " ".join(str(error).split()).removeprefix(f"{model}: ")[:300]
        raise ValueError(f"--model {model}: {reason}") from None
    if s["engine"] == "torch":
        return TorchEngine(policy, tokenizer, stop=o.stop)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return rollout.VllmEngine(
        model, tokenizer, device=device, dtype=getattr(torch, s["dtype"]), sleeps=False,
        max_model_len=longest + s["max_new_tokens"], gpu_memory=o.gpu_memory,
        trust_remote_code=trust, stop=o.stop,
    )  # fmt: skip


def benchmark(o: Options) -> None:
    """Sample what is missing, then tables, pictures and CSV from the stored samples."""
    rows, boxed = [], lambda text: (last_boxed(text) or "").strip()
    problems = load_benchmarks(o.benchmark, o.data, o.limit)
    set_threads(o.threads, embedded=False)
    out = own_folder(Path(o.out or "runs/benchmarks"))
    opened = cache(lambda model: open_engine(o, model, [p for found in problems.values() for p in found]))

    def ask(model: str, name: str) -> tuple[Engine, Task, list[Problem]]:
        engine = opened(model)
        prompts = rollout.render(problems[name], engine.tokenizer, o.template, not o.plain)
        return engine, rollout.math_task((), tuple(prompts), o.max_new_tokens), prompts

    for name in o.model:
        inner, samples = Path(name).expanduser() / "checkpoint", {}
        model = str(inner) if (inner / "config.json").is_file() else name  # a training run, or a model
        for x, found in problems.items():
            n = o.samples or (o.count if BENCHMARKS.get(x, 32) > 1 else 1)
            settings = asked(replace(o, samples=n), model) | {"template": o.template, "chat": not o.plain}
            samples[x] = sampled(out / slug(name), x, found, settings, partial(ask, model, x))
            row = {"model": name, "benchmark": x, "problems x samples": f"{len(found)} x {n}"}
            rows.append(row | measure(samples[x], o.k or n, str.strip, boxed))
        if opened.cache_info().currsize:
            opened(model).close()
            opened.cache_clear()
        what = "Surprisal -log π of the tokens drawn" if o.engine == "vllm" else "Entropy"
        draw_samples(samples, boxed, out / slug(name), what, token_namer(model, o.trust_remote_code))
    print_benchmarks(pd.DataFrame(rows), o, out)
    reported = pd.read_csv(io.StringIO(REPORTED), sep=";")
    for key in o.against:
        columns = ["method", *(x for x in problems if x in BENCHMARKS), "average"]
        rows = reported[reported["paper"] == key][columns]
        text = rows.to_string(index=False, na_rep="–", float_format="%.1f")
        print(f"\nreported: {key}, {SOURCES[key]}\n{text}")


def print_benchmarks(frame: pd.DataFrame, o: Options, out: Path) -> None:
    """The papers' table, in percent, one block a model; a pass@k that a benchmark lacks has no average."""
    shares = {x: f"{x}, %" for x in frame.filter(regex=r"^pass@\d+$")} | {"pass@1": "avg@n = pass@1, %"}
    keys = shares | {"length": "length", "truncated": "truncated, %", "entropy": "entropy"}
    columns = {x: x for x in ("benchmark", "problems x samples")} | keys
    for model, block in frame.groupby("model", sort=False):
        average = {"benchmark": "average"} | block[list(keys)].mean(skipna=False).to_dict()
        print(f"\n{model}\n{shown([*block.to_dict('records'), average], columns)}")
    kind = "exact, of the distribution that tokens were drawn from (after temperature and top-p)"
    if o.engine == "vllm":
        kind = "the mean of -log π of the tokens drawn, whose expectation is the entropy"
    print(
        f"\n± standard error over problems (6.2); pass@k unbiased (6.1). Sampled with {o.engine}, "
        f"temperature {o.temperature:g}, top-p {o.top_p:g}, {o.max_new_tokens} tokens at most, seed {o.seed}"
        f"; settings and graded samples: {out}/*/\nEntropy, nats per token: {kind}."
    )
    write_csv(out / "benchmarks.csv", frame)


# ------------------------------------------------------------------------------------------------------------
# 8. The command line and the demonstration


@dataclass(frozen=True)
class FinishedRuns:
    """Which finished runs, and what is asked of them."""

    runs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[RUN ...]")]] = ()
    """folders that train.py made, or folders of such"""
    temperatures: tuple[float, ...] = ()  # also sample runs at these test temperatures; name the runs first
    law: bool = False  # fit R = -a e^H + b to the first 15 percent of each run, predict the rest
    show: bool = False  # colour the tokens of a run by their entropy flow


@dataclass(frozen=True)
class Drawing:
    """How responses are drawn."""

    k: int = 0  # the largest k of pass@k (0: 32)
    samples: int = 0  # samples per problem (0: k; on the large benchmarks 1)
    temperature: float = 1.0  # of the softmax
    top_p: float = 1.0  # the papers use .7
    seed: int = 0  # the same seed draws the same samples


@dataclass(frozen=True)
class Benchmarks:
    """A model on benchmarks: aime24, aime25, amc23, math500, minerva, olympiadbench, or your own."""

    model: tuple[str, ...] = ()  # folders or hub ids
    benchmark: tuple[str, ...] = ()  # names
    data: tuple[str, ...] = ()  # NAME=FILE, NAME=owner/name@config:split; else $ENTROPY_FLOW_DATA/NAME.jsonl
    against: tuple[Literal["opefo", "steer", "clip_cov", "par"], ...] = ()  # print what these papers report
    limit: int = 0  # only the first problems of each benchmark (0: all)
    engine: Literal["torch", "vllm"] = "torch"  # our own loop, or vLLM
    max_new_tokens: int = 3072  # as in STEER's training
    stop: str = ""  # a text that ends a response, too
    template: str = rollout.PROMPT_TEMPLATE  # with {problem} in it
    plain: bool = False  # no chat template, even where the tokenizer has one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU, else float32
    batch: int = 0  # responses at once, the most that a kill loses (0: 128; vllm: 512)
    gpu_memory: float = 0.9  # share of the GPU for vLLM
    trust_remote_code: bool = False  # run code that comes with the model


@dataclass(frozen=True)
class Machine:
    """Where it runs, and where it writes."""

    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """auto: that of the run, else sdpa"""
    device: str = "auto"  # cpu, cuda, ... (auto: a GPU if there is one)
    threads: int = 0  # CPU threads (0: for embedded runs 1, else torch's choice)
    out: str = ""  # folder to write to (without: runs/compare, a single run's eval/, runs/benchmarks)


@dataclass(frozen=True)
class Command:  # the groups of --help, which begins with this file's docstring
    __doc__ = __doc__
    finished_runs: FinishedRuns = FinishedRuns()
    drawing: Drawing = Drawing()
    benchmarks: Benchmarks = Benchmarks()
    machine: Machine = Machine()


@dataclass(frozen=True)
class Options(FinishedRuns, Drawing, Benchmarks, Machine):
    """All flags in one."""

    @property
    def count(self) -> int:
        return self.samples or self.k or 32


def flags_of(kind: type) -> list[str]:
    """The flags of a dataclass and of those nested in it."""
    hints = get_type_hints(kind).items()
    found = (flags_of(x) if is_dataclass(x) else [f"--{name.replace('_', '-')}"] for name, x in hints)
    return [flag for flags in found for flag in flags]


def command_line(kind: type, prog: str, argv: Sequence[str] | None) -> Any:
    """A dataclass filled by tyro: fields are flags, their docstrings the help, nested dataclasses its groups.
    tyro's framed complaint becomes one line, with exit code 2 and the nearest flag."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            style = tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff
            return tyro.cli(kind, prog=prog, args=argv, config=style)
    except SystemExit as end:
        if end.code:
            lines = [line.strip("│╰╯ ") for line in said.getvalue().splitlines()[1:]]  # without its title
            text = re.sub(" *[─-]{3,} *", "; ", " ".join(lines)).strip("; ")
            text = re.split("[ ;]+(For full|Argument) helptext", text)[0]
            if unknown := re.match(r"Unrecognized options: ([^\s,;=]+)", text):
                word, known = unknown[1], flags_of(kind)
                near = [f"--method {word}"] if word[0] != "-" and "--method" in known else []
                near = near or difflib.get_close_matches(word, known, 1)
                text = f"{word}: unknown" + "".join(f"; did you mean {flag}?" for flag in near)
            print(f"{prog}: error: {text}  (see --help)", file=sys.stderr)
        raise


def check(o: Options) -> None:
    """ValueError on a value that would end in a traceback or in a wrong number, naming flag and remedy."""
    for name, x in vars(o).items():
        if type(x) is int and x < (name == "max_new_tokens"):
            raise ValueError(f"--{name.replace('_', '-')} {x}: too small; leave it out for the default")
    for t in (o.temperature, *o.temperatures):
        if not 1e-3 <= t <= 1e3:
            raise ValueError(f"--temperature {t:g}: must lie between 0.001 and 1000")
    more, one = o.law or o.show or o.temperatures, bool(o.model) != bool(o.benchmark)
    wrong = {
        f"--top-p {o.top_p:g}: must lie above 0 and be at most 1": not 0 < o.top_p <= 1,
        f"--k {o.k}: larger than --samples {o.samples}; draw at least k a problem": 0 < o.samples < o.k,
        "--model and --benchmark: give both, and no runs beside them": one or (o.model and o.runs),
        "--engine vllm: is for --model; of a run, give its checkpoint/": o.runs and o.engine == "vllm",
        f"--template {o.template!r}: needs {{problem}}": "{problem}" not in o.template,
        "no run named: give folders that train.py made, before --temperatures": more and not o.runs,
    }
    for message, found in wrong.items():
        if found:
            raise ValueError(message)


def own_folder(path: Path) -> Path:
    """Made if it is not there.  ValueError where it holds anything that this file did not write."""
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / MARK).is_file()):
        raise ValueError(f"--out {path}: holds what eval.py did not write; choose another folder")
    path.mkdir(parents=True, exist_ok=True)
    (path / MARK).write_text(json.dumps({"command": sys.argv}) + "\n")
    return path


def runs(o: Options) -> None:
    """Everything about finished runs."""
    records, notes = find_records(o.runs)
    print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)
    set_threads(o.threads, embedded=not any(r.settings.get("model") for r in records))
    alone = len(records) == 1
    out = own_folder(Path(o.out or (records[0].folder / "eval" if alone else "runs/compare")))
    if o.show and not alone:
        raise ValueError(f"--show: {len(records)} runs; name one, e.g. {records[0].folder}")
    if o.show:
        return show(records[0], o, out)
    tasks = {r.task: [x for x in records if x.task == r.task] for r in records}
    if o.law:
        law(records, out)
    elif alone:
        sample_run(o, records[0], out)
    elif len(tasks) == 1:
        compare(o, grouped(records), out)
    else:  # no frontier lies in two sets of problems
        for i, (task, members) in enumerate(tasks.items(), 1):
            place = own_folder(out / f"{i}-{Path(task).name or 'embedded'}")
            print(f"\n== {task or 'the embedded task'}: {len(members)} of {len(records)} runs\n")
            compare(o, grouped(members), place)
    print(f"\npictures and CSV: {out}")


def compare(o: Options, groups: Groups, out: Path) -> None:
    """The tables and the frontier: along training from the logs, over temperatures from fresh samples."""
    rows, logs = comparison(groups), logged(groups)
    if not o.temperatures and o.k > (most := logs["k"].min()):
        raise ValueError(f"--k {o.k}: the logs tell pass@{most}; leave --k out, or name a single run")
    print_comparison(groups, rows)
    write_csv(out / "comparison.csv", rows)
    if len(groups) == 1:
        if o.temperatures:
            print("\n--temperatures: nothing is sampled; it takes two methods, or a run named alone")
        return
    found = {("step", "along training"): logs}
    if o.temperatures:
        found["temperature", "over test temperatures"] = drawn(o, groups, out)
    panels = []
    for right, title in (("right", "held-out problems"), ("hard_right", "hard problems")):
        for (along, where), rows in found.items():
            if right in rows:
                rows = rows.dropna(subset=right)
                k = min(o.k or math.inf, int(rows["k"].min()))
                panels.append((f"{title}, {where}", k, frontier(groups, rows, right, along, k)))
                print_frontier(*panels[-1])
    if panels:
        rates = {x: float(groups[x][0].settings["lr"]) for label in groups for x in sweep_of(groups, label)}
        draw_frontier(panels, rates, out / "frontier.png")
        rows = [{"problems": title, "k": k} | r for title, k, rows in panels for r in rows]
        write_csv(out / "frontier.csv", rows)


def sample_run(o: Options, record: Record, out: Path) -> None:
    """A run's log, and fresh samples at its test temperatures: tables, calibration, forking tokens."""
    print(f"The run's log: first and last evaluation\n\n{table({record.spec: record.rows})}\n")
    task, found = samples_of(o, record, out)
    n, at = o.count, " ".join(dict.fromkeys(f"{t:g}" for _, t in found))
    print(f"Fresh samples: {n} per problem, temperature {at}, top-p {o.top_p:g}, no top-k, seed {o.seed}\n")
    sets, key = {f"{name} at {t:g}": x for (name, t), x in found.items()}, task.signature
    length = min(map(common_length, sets.values()))
    rows = [{"set": x} | measure(samples, o.k or n, key, key, length) for x, samples in sets.items()]
    shares = pd.DataFrame(rows).filter(regex=r"^pass@\d+$")
    print(shown(rows, ("set", *shares, "distinct_correct", "entropy", "length", "truncated")) + "\n")
    print(shown(rows, ("set", "distinct-1", "distinct-2", "distinct-3", "ece_vote", "ece_likelihood")) + "\n")
    print(f"± standard error over problems (6.2); diversity (6.4) of the first {length} tokens\n")
    write_csv(out / "samples.csv", rows)
    test = {x: samples for x, samples in sets.items() if x.startswith("test")}
    draw_samples(test, key, out, "Entropy", token_namer(str(record.folder / "checkpoint")))


def demonstrate(_: Options) -> None:
    """What the estimators do, on made-up counts."""
    print("pass@8 of a problem solved with probability .1 a try, from n samples: mean over their right count")
    q, k = 0.1, 8
    truth = 1 - (1 - q) ** k
    for n in (8, 16, 32, 128):
        weight = [math.comb(n, c) * q**c * (1 - q) ** (n - c) for c in range(n + 1)]
        unbiased = sum(w * pass_at_k(n, c, k) for c, w in enumerate(weight))
        plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weight))
        print(f"  n = {n:3}: (6.1) {unbiased:.3f}, 1 - (1 - c/n)^k {plug_in:.3f}, truth {truth:.3f}")
    print("\nTwo policies with the same pass@1, 100 problems, 32 samples each")
    for name, counts in (("sure", [32] * 40 + [0] * 60), ("broad", [13] * 98 + [3] * 2)):
        one, several = (sum(pass_at_k(32, c, k) for c in counts) / 100 for k in (1, 32))
        print(f"  {name:6} pass@1 {one:.3f}   pass@32 {several:.3f}")
    print("\nOn your own runs: python eval.py runs/*        all flags: python eval.py --help")


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad input, 130 stopped by the user."""
    groups = vars(command_line(Command, "eval.py", argv)).values()
    o = Options(**{name: value for group in groups for name, value in vars(group).items()})
    work = benchmark if o.model else runs if o.runs else demonstrate
    try:
        check(o)
        with fast_products():
            work(o)
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
