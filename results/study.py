"""The study: every method of the repository on the embedded world, against the frontier of plain GRPO.

    python results/study.py --jobs 2        run what is missing, most important first; resumes after a kill
    python results/study.py --list          the runs, in order, and which are done; --only PATTERN picks some
    python results/study.py --report        tables and figures from what is done: study.txt, study_*.png
    python results/study.py --markdown      the README's tables of questions 1 and 3

Written before the first run, and not changed after it but where a line says so:

Questions.
  1. Which methods keep entropy, which keep pass@32, and which beat plain GRPO with a smaller learning rate?
  3. What is OPEFO's balance worth against its controls, and in runs five times as long?
  4. Does R = -a e^H + b hold here, and for which methods?
  5. What do updates per rollout, the number of training problems and the clip thresholds do?
  6. What do random rewards do to entropy?
  (Question 2, how well each theory predicts the change of entropy, is results/honesty.txt.)

Problems.  TEST: held-out problems number 97 to 480 in hash order, 384; the first 96 are those of all
earlier tables and are left out, since settings were chosen while looking at them.  384 because the standard
error of a pass@32 near .93 is then .013, as is that of a difference of two policies on the same problems.
HARD: of the held-out problems sorted by number of solutions, number 97 to 224, for the same reason; it
overlaps TEST.  Warm starts 10, 11, 12: never used before.  A pair is a warm start and a seed of sampling.

A run.  300 rollouts of 32 prompts x 16 responses at the default settings, ledger off, one thread.  Then 32
samples for each TEST and HARD problem at test temperatures .5, .6, .8, 1, 1.2.  Kept per problem: how many
are right, how many right ones are different.  On the way: 16 samples of the first 256 TEST problems every 25
steps (75 in long runs).  Methods whose clip or penalty needs a ratio (`on_policy = False`) run with 4 updates
per rollout, beside GRPO with 4.  "Scaled" settings: fractions and targets of the papers made to fit a batch
of 5,000 tokens and an entropy that falls from .64 to .24: token fractions 2 %, targets .45 nats.  No other
tuning.

Statistics of question 1.  All are differences within a pair, in the mean over problems.
  D1  test temperature 1: pass@32 of the method minus that of the line of plain GRPO through its learning
      rates (3e-5 to 6e-4, and the warm start as learning rate 0) at the method's own pass@1; piecewise linear
      in pass@1, constant beyond the last point (which favours GRPO).  Changed after the first ten runs: a
      point that another one beats in both pass@1 and pass@32, on average over pairs, is no frontier and is
      left out; 6e-4 turned out so, and would have bent the line down between two better rates.
  D2  the same for the number of distinct right answers among 32.
  D3  every policy may choose its test temperature: pass@32 at a pass@1 of .9 times that of default GRPO at
      temperature 1 in this pair, interpolated along each policy's curve over temperatures; minus the same of
      plain GRPO at that learning rate which is best for it on average over pairs.  A policy whose curve does
      not reach that pass@1 "does not reach".
Interval: 95 %, bootstrap over pairs and over problems (problems drawn once for all pairs), spread around the
mean widened by sqrt(n/(n-1)) for n pairs, since a bootstrap of few pairs is too narrow by that factor.
Decision, from 3 pairs on: "beats" if the interval lies above 0, "loses" if below, else none shown.  With
about 50 methods, one or two false calls of each kind are expected by chance; a star marks what also survives
Holm's correction over all methods of the table (t test over pairs, spread pooled over methods, 20 degrees of
freedom or more).
"Keeps entropy": at the end at least half of the warm start's.  "Keeps pass@32": not shown to be below the
warm start's (same interval, differences within pairs); both at step 300, test temperature 1.  (This sentence
was added when only the warm starts had been measured.)
The other questions.  3: D1 to D3 of the controls in the same way, and each control minus plain OPEFO in the
same pair; long runs: end values, and D1 against the line of the long GRPO runs; the two methods other than
OPEFO with the largest D1 after the first seed join them.  4: least squares on the
evaluations of one run (R = pass@1); a, b, R², and the RMSE of the first half's fit on the second half.
5 and 6: end values, mean and standard deviation over pairs.

What changed while it ran.  Five of the first 76 runs (`high_entropy_tokens`, `htpo`, `clip_cov`,
`rand_pos_clip`, `kl_cov`, all of warm start 10) were thrown away when a review of those methods changed ties,
draws of equal rows and off-policy defaults, and made again; the other 71 are of the commit before, whose
numbers differ in rounding only from the one that made the rest (`commit` in each record).  Since that one, a
draw takes other random numbers (one uniform number instead of one for every token).  The order of the runs
that were still to come was changed after 115: second seeds of OPEFO and of GRPO's learning rates went before
the controls, since machine time was about to end; and again after 190: second seeds of all methods went
before the settings scaled to this world's batches.

After 341 runs, and before the first of these: fourteen methods join the table, `cw_grpo` gets a row for the
form that its authors released, and the records of what has changed since, `htpo` (its drops belong to one
response now) and `stare` with adaptive=true (its controller moves before the loss), are thrown away and made
again, seven of them; `simko`, `rlrt` and `gcpo` joined later on the same day, before their own first run.
Holm's correction stays one family, all methods and settings of the table: it becomes stricter by their
number, and a star that is lost by that is lost and named in results/README.md.  A method with fewer than
three pairs decides nothing and, as before, takes part from two pairs on.
Two more controls join question 3, GRPO whose every step is made entropy-neutral, entropy_math (6.5):
`step=neutral`, and `step=.45`, which asks each step for a tenth of what the batch's entropy lacks to .45
nats.  If they lie on GRPO's line and OPEFO above it, it is the choice of tokens that helps and not entropy
as such; in the other columns each is compared with OPEFO in the same pair, like every control.  The gain of
.1 was not tried out.
The code has changed since: the same warm starts, bit for bit, but a seed draws other responses.  So a later
run is of the same pair as far as the warm start goes and has luck of its own, which the intervals over pairs
contain.  Its rows carry a dagger, and plain GRPO, run again under the name grpo:eps_low=.2, says whether they
can stand beside the others: its D1 to D3 should be 0.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import copy
import fcntl
import fnmatch
import itertools
import json
import math
import multiprocessing
import random
import signal
import statistics
import string
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import train
from entropy_math import adam_preconditioner, check_entropy_law, fit_entropy_law, neutral_step
from eval import (
    distances,
    distinct_correct,
    figure,
    line,
    means,
    on_frontier,
    over_pairs,
    pass_at_k,
    responses,
    style,
)
from grpo import Policy
from interventions import METHODS, OPEFO, Method
from rollout import Problem, Sampling, Task, TorchEngine, WarmStart, chain_task, warm_policy
from train import Run, Settings, parse_spec, seeded

HERE = Path(__file__).resolve().parent
RAW = HERE / "study.jsonl.gz"
EARLIER = ("192a793", "3a7e6d1")  # commits of the first 341 runs, of which 334 are left
WARM, SEEDS, STEPS, LONG = (10, 11, 12), (0, 1), 300, 1500
TEMPERATURES = (0.5, 0.6, 0.8, 1.0, 1.2)
SAMPLES = 32
DIGITS = string.digits + string.ascii_letters  # one character a count

# ------------------------------------------------------------------------------------------------------------
# 1. The runs


@dataclass(frozen=True)
class Item:
    """One run.  `extra` is what a spec cannot say: problems=32, reward=random, control=advantage_sign,
    step=neutral."""

    spec: str
    warm: int
    seed: int = 0
    steps: int = STEPS
    extra: str = ""

    @property
    def key(self) -> str:
        return f"{self.name} steps={self.steps} warm={self.warm} seed={self.seed}"

    @property
    def name(self) -> str:
        return f"{self.spec} [{self.extra}]" if self.extra else self.spec


RATES = ("grpo:lr=3e-5", "grpo:lr=5e-5", "grpo:lr=1e-4", "grpo:lr=2e-4", "grpo", "grpo:lr=6e-4")
FOUR = "updates_per_rollout=4"
OFF_RATES = (f"grpo:{FOUR},lr=3e-5", f"grpo:{FOUR},lr=1e-4", f"grpo:{FOUR}")
DEFAULTS = tuple(k if c().on_policy else f"{k}:{FOUR}" for k, c in METHODS.items() if k != "grpo")
SCALED = (
    "clip_cov:ratio=.02,lb=.5",
    "rand_pos_clip:ratio=.02",
    f"kl_cov:{FOUR},ratio=.02",
    "adaptive_entropy:target=.45",
    "par:target=.45",
    "entropic:target=.45,denominator=all",
    "stare:target=.45,adaptive=true",
    "papo:reference=target,target=.45",
    "entropy_bonus:alpha=.01",
    "lp_reg:fraction=.1",
)
LATER = ("cw_grpo:form=released", "grpo:eps_low=.2")  # the authors' own form; plain GRPO by another name
SET = "opefo:target_entropy=.45"
CONTROLS = (
    (SET, ""),
    ("opefo:shuffled_sign=true", ""),
    ("opefo:lam=.25", ""),
    ("opefo", "control=advantage_sign"),
    ("grpo", "step=neutral"),
    ("grpo", "step=.45"),
    ("opefo:sides=plus", ""),
    ("opefo:sides=minus", ""),
    ("opefo:form=paper", ""),
    (f"{SET},shuffled_sign=true", ""),
    (SET, "control=advantage_sign"),
    ("opefo:form=theorem", ""),
    ("opefo:target_entropy=.35", ""),
    ("opefo:target_entropy=.55", ""),
    ("opefo:lr=6e-4", ""),
    (f"{SET},lr=6e-4", ""),
    ("opefo:lr=1e-4", ""),
)
EIGHT = "grpo:updates_per_rollout=8"
FACTORS = (
    ("grpo:updates_per_rollout=2", ""),
    (EIGHT, ""),
    *(("grpo", f"problems={n}") for n in (32, 128, 512)),
    *((f"{EIGHT},{clip}", "") for clip in ("eps_high=.1", "eps_high=.5", "eps_low=.1", "eps_low=.5")),
    (f"{EIGHT},eps_low=.99,eps_high=99", ""),
)
RANDOM = (
    "grpo",
    EIGHT,
    f"{EIGHT},eps_low=.99,eps_high=99",
    f"{EIGHT},eps_high=99",
    f"{EIGHT},eps_low=.99",
    "opefo",
)
LONG_RUNS = ("grpo", "opefo", SET, "grpo:lr=1e-4", "grpo:lr=3e-5", "opefo:lr=1e-4")


CORE = (
    *RATES,
    *("opefo", SET, "steer", "nsr", "psr", "w_reinforce", "par", "qae", "ref_kl"),
    *(f"grpo:{FOUR}", f"clip_higher:{FOUR}"),
)


def items() -> list[Item]:
    """All runs, most important first; whoever stops early has answered the most."""
    core = [(s, "") for s in CORE]
    first = [(s, "") for s in (*RATES, *OFF_RATES, *DEFAULTS, *LATER)]
    rest = [*CONTROLS[:11], *((s, "reward=random") for s in RANDOM[:3]), *FACTORS[:5]]
    scaled = [(s, "") for s in SCALED]
    last = [*scaled, *CONTROLS[11:], *FACTORS[5:], *((s, "reward=random") for s in RANDOM[3:])]
    out = [Item("warm", w, 0, 0) for w in WARM]
    out += [Item(s, w, extra=e) for w in WARM for s, e in core]
    out += [Item(s, WARM[0], extra=e) for s, e in [*first, *rest]]
    out += [Item(s, w, extra=e) for w in WARM[1:] for s, e in first]
    out += [Item(s, w, 1) for w in WARM for s in (*RATES, "opefo", SET)]
    out += [Item(s, WARM[1], extra=e) for s, e in rest]
    out += [Item(s, WARM[0], steps=LONG) for s in LONG_RUNS[:4]]
    out += [Item(s, WARM[2], extra=e) for s, e in rest]
    out += [Item(s, w, 1, extra=e) for w in WARM for s, e in core]
    out += [Item(s, WARM[0], extra=e) for s, e in FACTORS[5:]]
    out += [Item(s, w, 1, extra=e) for w in WARM for s, e in [*first, *CONTROLS[:8]]]
    out += [Item(s, WARM[0], extra=e) for s, e in last]
    out += [Item(s, w, steps=LONG) for w in WARM[1:] for s in LONG_RUNS[:4]]
    out += [Item(s, w, extra=e) for w in WARM for s, e in last]
    out += [Item(s, w, 1, extra=e) for w in WARM for s, e in [*scaled, *CONTROLS[8:]]]
    out += [Item(s, w, steps=LONG) for w in WARM for s in LONG_RUNS[4:]]
    return list(dict.fromkeys(out))


# ------------------------------------------------------------------------------------------------------------
# 2. One run


class ByAdvantageSign(OPEFO):
    """Control: OPEFO's λ, but on the sign of the advantage: 1 - λ on successes, 1 + λ on failures."""

    def weight(self, tk: Any, adv: Tensor, metrics: dict[str, float]) -> Tensor:
        super().weight(tk, adv, metrics)
        return 1 - metrics["lam"] * adv.sign()


def with_extra(extra: str, task: Task, method: Method, seed: int) -> tuple[Task, Method]:
    """Task and method as `Item.extra` changes them, for training only: evaluation has all problems, true
    rewards."""
    name, _, value = extra.partition("=")
    if name == "problems":
        order = torch.randperm(len(task.train), generator=seeded(seed, 0, "problems")).tolist()
        task = replace(task, train=tuple(task.train[i] for i in order[: int(value)]))
    elif name == "reward":
        task = replace(task, verify=coin(seeded(seed, 0, "coin").initial_seed()))
    elif name == "control":
        method = ByAdvantageSign(**{f.name: getattr(method, f.name) for f in fields(method)})
    elif extra and name != "step":
        raise ValueError(f"extra={extra!r} is unknown: choose problems=, reward=random, control= or step=")
    return task, method


def coin(seed: int) -> Any:
    """A verifier that tosses a fair coin for every response, whatever it says."""
    toss = random.Random(seed)
    return lambda responses, problems: [toss.random() < 0.5 for _ in responses]


class NeutralLedger(train.Ledger):
    """A ledger that also corrects the step before it is booked, entropy_math (6.5)."""

    @classmethod
    def open(cls, run: Run, tokens: Any, shared: bool = False) -> train.Ledger:
        run.neutral = super().open(run, tokens, shared)
        return run.neutral

    def correct(self, level: str, gain: float = 0.1) -> None:
        """To no change of the batch's entropy, or to a tenth of what it lacks to the level."""
        params = train.trained(self.run.policy)
        scale = adam_preconditioner(self.run.optimizer)
        want = 0.0 if level == "neutral" else gain * (float(level) - self.before)
        with torch.no_grad():
            moved = [p - old for p, old in zip(params, self.params)]
            c = neutral_step(self.grads, moved, [scale[p] for p in params], want)
            for p, g in zip(params, self.grads):
                if g is not None:
                    p.add_(scale[p] * g, alpha=c)


def step_and_correct(level: str, step: Any, run: Run, numbers: dict[str, float]) -> bool:
    """`train.step_if_finite`, and the correction."""
    taken = step(run, numbers)
    if taken:
        run.neutral.correct(level)
    return taken


class InMemory(Run):
    """A run that writes nothing."""

    def log(self, row: dict[str, Any], due: bool) -> dict[str, Any]:
        self.rows.append(row)
        return row


@cache
def problems() -> tuple[Task, tuple[Problem, ...], tuple[Problem, ...]]:
    """The task, TEST and HARD."""
    return chain_task(), chain_task(480).test[96:], chain_task(224).hard[96:]


def measure(
    model: nn.Module, tokenizer: Any, which: tuple[Problem, ...], n: int, temperature: float, seed: int
) -> dict[str, Any]:
    """How many of n are right and different right, a character a problem; entropy (nats), length (tokens)."""
    task, generator = problems()[0], torch.Generator().manual_seed(seed)
    how = Sampling(n, task.max_new_tokens, temperature, entropy=True)
    right, distinct, nats, tokens = [], [], 0.0, 0
    for out, texts in responses(TorchEngine(model, tokenizer), task, which, how, generator):
        for j, row in enumerate(out.correct.view(-1, n).tolist()):
            right.append(sum(row))
            distinct.append(distinct_correct(task, texts[j * n : (j + 1) * n], row))
        nats += float(torch.where(out.mask, out.entropy, 0).sum(dtype=torch.float64))
        tokens += int(out.mask.sum())
    code = ["".join(DIGITS[c] for c in counts) for counts in (right, distinct)]
    length = tokens / len(which) / n
    return {"right": code[0], "distinct": code[1], "entropy": nats / tokens, "length": length}


def glimpse(model: nn.Module, tokenizer: Any, step: int, seed: int, n: int = 16) -> dict[str, float]:
    """pass@1, pass@16, distinct right and entropy on the first 256 TEST problems, on the way."""
    out = measure(model, tokenizer, problems()[1][:256], n, 1.0, seeded(seed, step, "study").initial_seed())
    right, distinct = ([DIGITS.index(c) for c in out[k]] for k in ("right", "distinct"))
    return {
        "step": step,
        "entropy": out["entropy"],
        "pass@1": sum(right) / n / len(right),
        "pass@16": sum(pass_at_k(n, c, n) for c in right) / len(right),
        "distinct": sum(distinct) / len(distinct),
    }


CURVES = ("entropy", "reward", "flow_up", "flow_down", "grad_norm", "lam", "clip_fraction", "weight_std")
CURVES += ("length", "dH_measured", "dH_predicted")


def thin(rows: list[dict[str, Any]], width: int) -> dict[str, list[float]]:
    """Means of every `width` steps of the metrics that the tables and figures need."""
    out = {}
    for key in CURVES:
        if key in rows[-1]:
            bins = [rows[i : i + width] for i in range(0, len(rows), width)]
            cut = [[r[key] for r in b if r.get(key) is not None] for b in bins]
            out[key] = [float(f"{sum(c) / len(c):.5g}") if c else None for c in cut]
    return out


def commit() -> str:
    """The commit of the code that runs."""
    call = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(call, capture_output=True, text=True).stdout.strip()


def work(item: Item) -> dict[str, Any]:
    """Train, evaluate, and return the record of one run."""
    begin, why = time.time(), ""
    warnings.simplefilter("ignore")  # a fraction below one token: what such a default does is the question
    model, tokenizer = warm_policy(WarmStart(seed=item.warm))
    task, test, hard = problems()
    rows, glimpses, width = [], [], max(item.steps // 60, 1)
    seed = 10 * item.warm + item.seed
    if item.steps:
        every = max(item.steps // (12 if item.steps <= STEPS else 20), 1)
        kind, _, level = item.extra.partition("=")
        book = "step" if kind == "step" else "off"
        base = Settings(
            seed=seed,
            steps=item.steps,
            eval_every=every,
            ledger=book,
            ledger_every=1,
            threads=1,
            device="cpu",
        )
        settings, method = parse_spec(item.spec, base)
        task, method = with_extra(item.extra, task, method, seed)
        reference = Policy(copy.deepcopy(model)).requires_grad_(False) if "ref_logp" in method.needs else None
        engine = TorchEngine(model, tokenizer)
        run = InMemory(
            settings, method, Path("."), task, Policy(model), tokenizer, engine, reference=reference
        )

        def evaluation(run: Run) -> dict[str, Any]:
            glimpses.append(glimpse(model, tokenizer, run.step, seed))
            return {"pass@1": glimpses[-1]["pass@1"]}

        changed: dict[str, Any] = {"evaluation": evaluation}  # on TEST, and not the training's own
        if kind == "step":
            changed["Ledger"] = NeutralLedger
            changed["step_if_finite"] = partial(step_and_correct, level, train.step_if_finite)
        try:
            with mock.patch.multiple(train, **changed):
                rows = list(train.train(run))[1:]
        except FloatingPointError as error:
            rows, why = run.rows[1:], str(error)
    final: dict[str, Any] = {}
    if not why:
        for t in TEMPERATURES:
            s = seeded(seed, item.steps, f"final {t}").initial_seed()
            final[str(t)] = {
                "test": measure(model, tokenizer, test, SAMPLES, t, s),
                "hard": measure(model, tokenizer, hard, SAMPLES, t, s),
            }
    return {
        **{f.name: getattr(item, f.name) for f in fields(item)},
        "key": item.key,
        "why": why,
        "skipped": sum(r.get("skipped", 0) for r in rows),
        "width": width,
        "curves": thin(rows, width) if rows else {},
        "glimpses": [{k: float(f"{v:.5g}") for k, v in g.items()} for g in glimpses],
        "final": final,
        "seconds": round(time.time() - begin, 1),
        "commit": commit(),
    }


# ------------------------------------------------------------------------------------------------------------
# 3. The file: one gzip member a run, so that appending is atomic enough and a torn end can be cut off


def members(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(end, text) of every complete gzip member."""
    at = 0
    while at < len(data):
        one = zlib.decompressobj(wbits=31)
        try:
            text = one.decompress(data[at:])
        except zlib.error:
            return
        if not one.eof:
            return
        at = len(data) - len(one.unused_data)
        yield at, text


def load(path: Path = RAW) -> dict[str, dict[str, Any]]:
    """Every finished run by its key."""
    data = path.read_bytes() if path.exists() else b""
    records = (json.loads(line) for _, text in members(data) for line in text.splitlines())
    return {r["key"]: r for r in records}


def append(record: dict[str, Any], path: Path = RAW) -> None:
    """Add one run; what a kill left half written is cut off first."""
    data = path.read_bytes() if path.exists() else b""
    end = max((at for at, _ in members(data)), default=0)
    packer = zlib.compressobj(9, wbits=31)
    member = packer.compress(json.dumps(record).encode() + b"\n") + packer.flush()
    with open(path, "r+b" if path.exists() else "wb") as file:  # not replaced: `run_all` holds a lock on it
        file.truncate(end)
        file.seek(end)
        file.write(member)
        file.flush()
        os.fsync(file.fileno())


SECONDS_PER_STEP, SECONDS_OTHER = 0.19, 17.0  # measured on one thread of a quiet machine


def cost(todo: list[Item]) -> float:
    return sum(i.steps * SECONDS_PER_STEP + SECONDS_OTHER for i in todo)


def begin_worker() -> None:
    torch.set_num_threads(1)


def run_all(todo: list[Item], jobs: int) -> None:
    """Run the items in order in `jobs` processes of one thread; every finished one is written at once."""
    lock = open(RAW, "ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"{RAW.name}: another call is running; wait for it or stop it")
    print(f"{len(todo)} runs, about {cost(todo) / jobs / 60:.0f} minutes with {jobs} processes", flush=True)
    start, spent = time.time(), 0.0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    with multiprocessing.get_context("spawn").Pool(jobs, begin_worker) as pool:
        for n, record in enumerate(pool.imap_unordered(work, todo), 1):
            append(record)
            spent += cost([Item(*(record[f.name] for f in fields(Item)))])
            pace = (time.time() - start) / spent
            left = (cost(todo) - spent) * pace / 60
            end = record["final"].get("1.0", {}).get("test", {"right": "0", "entropy": float("nan")})
            score = sum(map(DIGITS.index, end["right"])) / SAMPLES / len(end["right"])
            print(
                f"{time.strftime('%H:%M:%S')} {n}/{len(todo)} {record['seconds']:.0f} s, {left:.0f} min left"
                f"  H {end['entropy']:.3f} pass@1 {score:.3f}  {record['key']} {record['why']}",
                flush=True,
            )


# ------------------------------------------------------------------------------------------------------------
# 4. Statistics.  The frontier, D1 and its interval are eval.py's (6.8), (6.9): arrays whose last axis is the
# bootstrap over problems, with the true mean at index 0

MEASURES = ("pass@1", "pass@32", "distinct")
AT_ONE = TEMPERATURES.index(1.0)
Pair = tuple[int, int]


def counts(record: dict[str, Any], which: str) -> np.ndarray:
    """(5 temperatures, 3 measures, problems) of one run; with 32 samples pass@32 is whether any is right."""
    parts = [record["final"][str(t)][which] for t in TEMPERATURES]
    right, distinct = (
        np.array([[DIGITS.index(c) for c in p[k]] for p in parts]) for k in ("right", "distinct")
    )
    return np.stack([right / SAMPLES, right > 0, distinct], 1)


@dataclass
class Estimate:
    """A mean over pairs with its 95 % interval; per-pair values for the pooled spread."""

    values: np.ndarray  # (pairs,)
    low: float = math.nan
    high: float = math.nan
    note: str = ""
    holm: bool = False

    @property
    def mean(self) -> float:
        return float(self.values.mean()) if len(self.values) else math.nan

    @property
    def call(self) -> str:
        if self.note or len(self.values) < 3:
            return self.note or "too few pairs"
        star = "*" if self.holm else ""
        return "beats" + star if self.low > 0 else "loses" + star if self.high < 0 else "-"

    def text(self, digits: int = 3) -> str:
        if self.note:
            return self.note
        form = f"+.{digits}f"
        gap = f" [{self.low:{form}}, {self.high:{form}}]" if len(self.values) > 1 else ""
        return f"{self.mean:{form}}{gap}"


def estimate(d: np.ndarray) -> Estimate:
    """From differences (pairs, 1 + draws)."""
    return Estimate(d[:, 0], *over_pairs(d)[1:]) if len(d) else Estimate(np.array([]), note="no pair yet")


def holm(estimates: list[Estimate]) -> None:
    """Mark what survives Holm's correction over the list; t test with the spread pooled over methods."""
    usable = [e for e in estimates if not e.note and len(e.values) > 1]
    freedom = sum(len(e.values) - 1 for e in usable)
    if freedom < 20:  # below that the normal distribution is no stand-in for Student's
        return
    spread = math.sqrt(sum(float(((e.values - e.mean) ** 2).sum()) for e in usable) / freedom)
    z = [abs(e.mean) / max(spread, 1e-12) * math.sqrt(len(e.values)) for e in usable]
    p = [2 * (1 - statistics.NormalDist().cdf(v)) for v in z]
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[i] * (len(p) - rank) > 0.05:
            break
        usable[i].holm = True


class Study:
    """The finished runs, and the statistics of the docstring on them."""

    def __init__(self, records: dict[str, dict[str, Any]]):
        self.records = records
        self.runs: dict[tuple[str, int], dict[Pair, dict[str, Any]]] = {}
        for r in records.values():
            name = Item(*(r[f.name] for f in fields(Item))).name
            self.runs.setdefault((name, r["steps"]), {})[r["warm"], r["seed"]] = r
        self.cache: dict[tuple[str, str], np.ndarray] = {}

    def pairs(self, name: str, steps: int = STEPS) -> dict[Pair, dict[str, Any]]:
        """The runs that ended with a working policy; the warm starts are runs of 0 steps."""
        steps = 0 if name == "warm" else steps
        return {q: r for q, r in sorted(self.runs.get((name, steps), {}).items()) if r["final"]}

    def warm(self, q: Pair) -> dict[str, Any]:
        return self.runs["warm", 0][q[0], 0]

    def means(self, record: dict[str, Any], which: str = "test") -> np.ndarray:
        """(5 temperatures, 3 measures, 1 + draws)."""
        key = (record["key"], which)
        if key not in self.cache:
            self.cache[key] = means(counts(record, which))
        return self.cache[key]

    def sweep(self, steps: int = STEPS) -> dict[str, dict[Pair, np.ndarray]]:
        """Warm start and plain GRPO at every learning rate at test temperature 1: pair -> (3, draws)."""
        rates = RATES if steps == STEPS else [s for s in LONG_RUNS if s.startswith("grpo")]
        points = {s: {q: self.means(r)[AT_ONE] for q, r in self.pairs(s, steps).items()} for s in rates}
        return {"warm": {q: self.means(self.warm(q))[AT_ONE] for q in points["grpo"]}, **points}

    def distance(self, name: str, measure: int, steps: int = STEPS) -> Estimate:
        """D1 (measure 1) and D2 (measure 2)."""
        own = {q: self.means(r)[AT_ONE] for q, r in self.pairs(name, steps).items()}
        return estimate(distances(own, self.sweep(steps), measure))

    def at_level(self, record: dict[str, Any], level: np.ndarray) -> np.ndarray | None:
        """pass@32 at a given pass@1 along the policy's curve over temperatures; None if it does not reach."""
        m = self.means(record)
        return None if m[:, 0, 0].max() < level[0] else line(m[:, 0], m[:, 1], level)

    def level(self, q: Pair) -> np.ndarray:
        return 0.9 * self.means(self.pairs("grpo")[q])[AT_ONE, 0]

    @cached_property
    def best_rate(self) -> str:
        """The learning rate of plain GRPO that is best for D3, on average over the pairs."""
        score = {}
        for s in RATES:
            at = [self.at_level(self.pairs(s)[q], self.level(q)) for q in self.common if q in self.pairs(s)]
            if at and all(v is not None for v in at):
                score[s] = statistics.mean(float(v[0]) for v in at)
        return max(score, key=score.__getitem__, default="grpo")

    @cached_property
    def common(self) -> list[Pair]:
        """The pairs for which the whole line of plain GRPO is there."""
        return [q for q in self.pairs("grpo") if all(q in points for points in self.sweep().values())]

    def over_temperatures(self, name: str) -> Estimate:
        """D3."""
        out, lost = [], 0
        runs = {q: r for q, r in self.pairs(name).items() if q in self.common}
        for q, r in runs.items():
            own = self.at_level(r, self.level(q))
            if own is None:
                lost += 1
            else:
                out.append(own - self.at_level(self.pairs(self.best_rate)[q], self.level(q)))
        if lost:
            return Estimate(np.array([]), note=f"does not reach ({lost} of {len(runs)})")
        return estimate(np.array(out))

    def minus(self, name: str, other: Any, measure: int, steps: int = STEPS) -> Estimate:
        """Differences within pairs, test temperature 1; `other` gives a run for a pair, or None."""
        d = [
            self.means(r)[AT_ONE, measure] - self.means(o)[AT_ONE, measure]
            for q, r in self.pairs(name, steps).items()
            if (o := other(q)) is not None
        ]
        return estimate(np.array(d))

    def ends(self, name: str, steps: int = STEPS) -> dict[str, list[float]]:
        """Values at the end, test temperature 1, one per pair."""
        out: dict[str, list[float]] = {k: [] for k in ("entropy", *MEASURES, "hard pass@32", "kept")}
        for q, r in self.pairs(name, steps).items():
            test, hard = self.means(r)[AT_ONE, :, 0], self.means(r, "hard")[AT_ONE, :, 0]
            entropy, start = (x["final"]["1.0"]["test"]["entropy"] for x in (r, self.warm(q)))
            for key, v in zip(out, (entropy, *test, hard[1], entropy / start)):
                out[key].append(float(v))
        return out

    def curve(
        self, name: str, key: str, steps: int = STEPS, only: set[Pair] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Steps, and the mean over pairs of a training metric or of pass@1, pass@16, distinct."""
        runs = [r for q, r in self.pairs(name, steps).items() if only is None or q in only]
        if key in CURVES:
            rows = [r["curves"][key] for r in runs]
            return (np.arange(len(rows[0])) + 0.5) * runs[0]["width"], np.mean(rows, 0)
        rows = [[g[key] for g in r["glimpses"]] for r in runs]
        return np.array([g["step"] for g in runs[0]["glimpses"]]), np.mean(rows, 0)

    def curve_eval(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Entropy and pass@1 of the evaluations on the way, means over pairs."""
        rows = [r["glimpses"] for r in self.pairs(name).values()]
        h, r = (np.mean([[g[k] for g in row] for row in rows], 0) for k in ("entropy", "pass@1"))
        return h, r

    def dagger(self, name: str, steps: int = STEPS) -> str:
        """Where a run is of later code."""
        return " †" * any(r["commit"] not in EARLIER for r in self.pairs(name, steps).values())

    def label(self, name: str, steps: int = STEPS) -> str:
        return short(name) + self.dagger(name, steps)

    def broken(self) -> list[str]:
        return [f"{k}: {r['why']}" for k, r in self.records.items() if r["why"]]


# ------------------------------------------------------------------------------------------------------------
# 5. Tables


def short(name: str) -> str:
    return name.replace("updates_per_rollout=", "x").replace("target_entropy", "set")


def tabled(head: list[str], body: list[list[str]]) -> str:
    cells = pd.DataFrame([head, *body])
    padded = cells.apply(lambda column: column.str.ljust(column.str.len().max() + 2))
    return "\n".join(padded.agg("".join, axis=1)) if body else "no run yet"


def spread(values: list[float], form: str = ".3f") -> str:
    if not values:
        return "-"
    tail = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{tail}"


def ends_table(study: Study, names: list[str], steps: int = STEPS) -> str:
    head = ["", "n", "entropy", *MEASURES, "hard pass@32"]
    body = []
    for name in names:
        e = study.ends(name, steps)
        if e["entropy"]:
            cells = (spread(e[k]) for k in list(e)[:-1])
            body.append([study.label(name, steps), str(len(e["entropy"])), *cells])
    return tabled(head, body)


def rows_one(study: Study, names: list[str]) -> list[tuple[str, list[float], Estimate, list[Estimate]]]:
    """(name, share of entropy kept, pass@32 minus the start's, D1 to D3), the best D1 first."""
    rows = []
    for name in names:
        kept, keeps = study.ends(name)["kept"], study.minus(name, study.warm, 1)
        d = [study.distance(name, 1), study.distance(name, 2), study.over_temperatures(name)]
        rows.append((name, kept, keeps, d))
    for column in zip(*(d for *_, d in rows)):
        holm(list(column))
    rows.sort(key=lambda r: -r[3][0].mean if r[3][0].mean == r[3][0].mean else math.inf)
    return [r for r in rows if r[1]]


def table_one(study: Study, names: list[str]) -> str:
    """What every method keeps, and its distances from the frontier."""
    head = ["", "n", "H kept", "", "pass@32 - start", ""]
    for d in ("D1: pass@32", "D2: distinct", "D3: over temperatures"):
        head += [d, ""]
    body = []
    for name, kept, keeps, d in rows_one(study, names):
        word = "" if len(kept) < 3 else "lost" if keeps.high < 0 else "kept"
        line_ = [study.label(name), str(len(kept)), f"{statistics.mean(kept):.0%}"]
        line_ += ["keeps" if statistics.mean(kept) >= 0.5 else "", keeps.text(), word]
        for x, digits in zip(d, (3, 2, 3)):
            line_ += [x.text(digits), "" if x.note else x.call]
        body.append(line_)
    return tabled(head, body)


def markdown(study: Study, plain: tuple[str, ...], names: list[str]) -> str:
    """A table of the README: `plain` GRPO's ends, then the methods, the best D1 first; calls in bold."""

    def row(name: str, label: str, cells: list[str]) -> str:
        e = study.ends(name)
        ends = [f"{statistics.mean(e[k]):.{2 if k == 'distinct' else 3}f}" for k in ("entropy", *MEASURES)]
        return "| " + " | ".join([label, str(len(e["entropy"])), *ends, *cells]) + " |"

    def cell(x: Estimate, digits: int) -> str:
        text = x.text(digits)
        call = x.call.rstrip("*")
        star = "\\*" * (call != x.call)  # survives Holm's correction
        return f"**{call}**{star} {text}" if not x.note and call in ("beats", "loses") else text

    out = ["| | n | entropy | pass@1 | pass@32 | distinct | D1: pass@32 | D2: distinct | D3: temperatures |"]
    out += ["|" + "---|" * 9]
    out += [row(name, f"*{name}*" if name == "warm" else f"`{name}`", ["", "", ""]) for name in plain]
    for name, _, _, d in rows_one(study, names):
        cells = [cell(x, n) for x, n in zip(d, (3, 2, 3))]
        out.append(row(name, f"`{short(name)}`{study.dagger(name)}", cells))
    return "\n".join(out)


def table_controls(study: Study) -> str:
    """Every control minus plain OPEFO, within pairs."""
    head = ["minus opefo, same pair", "n", *MEASURES]
    body = []
    for name in CONTROL_NAMES:
        if name != "opefo" and study.pairs(name):
            d = [study.minus(name, study.pairs("opefo").get, m) for m in range(3)]
            cells = [x.text(digits) for x, digits in zip(d, (3, 3, 2))]
            body.append([short(name), str(len(d[0].values)), *cells])
    return tabled(head, body)


def table_long(study: Study) -> str:
    body = []
    for name in LONG_RUNS:
        if study.pairs(name, LONG):
            best = study.curve(name, "pass@1", LONG)
            peak = f"{best[1].max():.3f} at {best[0][best[1].argmax()]}"
            body.append([short(name), study.distance(name, 1, LONG).text(), peak])
    return (
        ends_table(study, list(LONG_RUNS), LONG)
        + "\n\n"
        + tabled(["", f"D1 against GRPO at {LONG} steps", "highest mean pass@1 on the way, at step"], body)
    )


def law_of(record: dict[str, Any]) -> tuple[float, float, float, float] | None:
    """a, b, R² and the RMSE of the first half's law on the second half; None where entropy does not move."""
    h, r = ([g[k] for g in record["glimpses"]] for k in ("entropy", "pass@1"))
    try:
        law, check = fit_entropy_law(h, r), check_entropy_law(h, r, 0.5)
    except ValueError:
        return None
    return law.a, law.b, law.r2, check.rmse


def table_law(study: Study, names: list[tuple[str, int]]) -> str:
    rows = []
    for name, steps in names:
        fits = [f for r in study.pairs(name, steps).values() if (f := law_of(r))]
        if fits:
            label = short(name) + (f", {steps} steps" if steps != STEPS else "")
            rows.append([label, str(len(fits)), *(spread([f[i] for f in fits]) for i in range(4))])
    rows.sort(key=lambda r: -float(r[4].split()[0]))
    return tabled(["", "n", "a", "b", "R²", "RMSE, 2nd half from 1st"], rows)


def table_factors(study: Study, names: list[str]) -> str:
    """End values, with what happened in training: mean reward of the last tenth, clipped share of tokens."""
    body = []
    for name in names:
        e, runs = study.ends(name), study.pairs(name).values()
        if e["entropy"]:
            reward = [statistics.mean(r["curves"]["reward"][-6:]) for r in runs if r["curves"]]
            clips = [c for r in runs if (c := r["curves"].get("clip_fraction"))]
            clipped = [statistics.mean(c) for c in clips]
            cells = [spread(e[k]) for k in ("entropy", *MEASURES)]
            cells = [study.label(name), str(len(runs)), *cells, spread(reward), spread(clipped, ".4f")]
            body.append(cells)
    return tabled(["", "n", "entropy", *MEASURES, "reward in training", "clipped share"], body)


def factor_names(study: Study) -> list[str]:
    """Question 5's runs, the baselines they are compared with in front."""
    return ["warm", "grpo", *named(FACTORS[:1]), f"grpo:{FOUR}", f"clip_higher:{FOUR}", *named(FACTORS[1:])]


def named(pairs: Any) -> list[str]:
    return [Item(s, 0, extra=e).name for s, e in pairs]


METHOD_NAMES = [*OFF_RATES, *DEFAULTS, *LATER, *SCALED, SET]
CONTROL_NAMES = ["opefo", *named(CONTROLS)]
RANDOM_NAMES = named((s, "reward=random") for s in RANDOM)


def report(study: Study) -> str:
    """results/study.txt."""
    n, of = len(study.records), len(items())
    laws = [(s, STEPS) for s in (*RATES, *METHOD_NAMES)] + [(s, LONG) for s in LONG_RUNS]
    calls = len([m for m in METHOD_NAMES if study.pairs(m)])
    parts = [
        f"{n} of {of} runs are done.  n: pairs of a warm start and a sampling seed.  a ± b: mean and",
        "standard deviation over pairs.  [a, b]: 95 % interval.  xN: N updates per rollout; set: OPEFO's",
        "target entropy; †: later code, whose seeds draw other responses.  The questions, problems and",
        "statistics are in the head of study.py.",
        *([f"Broken runs: {'; '.join(study.broken())}"] if study.broken() else ["No run broke off."]),
        "",
        "1. Which methods keep entropy and pass@32, and which beat the frontier of plain GRPO?",
        "",
        "Plain GRPO: the warm start and six learning rates, step 300, test temperature 1",
        ends_table(study, ["warm", *RATES]),
        "",
        f"Distance from the frontier; {len(study.common)} pairs have the whole line of GRPO.  For D3 plain",
        f"GRPO's best learning rate is that of {study.best_rate}.  {calls} methods and settings: at 5 %",
        f"{0.05 * calls:.1f} false calls a column are expected; * survives Holm's correction; - none shown.",
        f"On the line: {', '.join(on_frontier(study.sweep()) if study.common else ())}.",
        table_one(study, METHOD_NAMES),
        "",
        "End values",
        ends_table(study, METHOD_NAMES),
        "",
        "2. How well does each theory predict the entropy change?  See results/honesty.txt.",
        "",
        "3. What is OPEFO's balance worth against its controls, and in long runs?",
        "",
        table_one(study, CONTROL_NAMES),
        "",
        ends_table(study, CONTROL_NAMES),
        "",
        table_controls(study),
        "",
        f"Long runs: {LONG} steps",
        table_long(study),
        "",
        "4. Does R = -a e^H + b hold?  Fits over the evaluations of one run (R: pass@1); the best R² first",
        "",
        table_law(study, laws),
        "",
        "5. Updates per rollout, number of training problems, clip thresholds",
        "",
        table_factors(study, factor_names(study)),
        "",
        "6. Random rewards: a fair coin instead of the verifier; evaluation is true",
        "",
        table_factors(study, RANDOM_NAMES),
    ]
    return "\n".join(x.rstrip() for part in parts for x in part.split("\n")) + "\n"


def write_csv(study: Study) -> None:
    """End values of every run at every test temperature: the numbers behind tables and figures."""
    rows = []
    for (name, steps), runs in study.runs.items():
        for (w, s), r in runs.items():
            for which in ("test", "hard") if r["final"] else ():
                for t, m in zip(TEMPERATURES, study.means(r, which)[:, :, 0]):
                    more = {key: r["final"][str(t)][which][key] for key in ("entropy", "length")}
                    where = dict(run=name, warm=w, seed=s, steps=steps, temperature=str(t), set=which)
                    rows.append(where | dict(zip(MEASURES, m)) | more)
    pd.DataFrame(rows).to_csv(HERE / "study.csv.gz", index=False, float_format="%.5g")


# ------------------------------------------------------------------------------------------------------------
# 6. Figures; their numbers are in study.txt, study.csv.gz and, for curves, study.jsonl.gz


OFFSET = {"textcoords": "offset points"}


def save(fig: Any, name: str) -> None:
    fig.savefig(HERE / f"study_{name}.png", dpi=110)


def mean_point(study: Study, name: str) -> np.ndarray:
    """(5 temperatures, 3 measures), mean over the pairs that have the whole line.  A method with only some
    of them, three or more, is moved by what plain GRPO's mean over all differs from its mean over those."""

    def mean(of: str, pairs: list[Pair]) -> np.ndarray:
        runs = [study.warm(q) if of == "warm" else study.pairs(of)[q] for q in pairs]
        return np.mean([study.means(r)[..., 0] for r in runs], 0)

    here = [q for q in study.common if name == "warm" or q in study.pairs(name)]
    if len(here) < min(3, len(study.common)):
        return np.full((len(TEMPERATURES), len(MEASURES)), np.nan)
    return mean(name, here) + mean("grpo", study.common) - mean("grpo", here)


def draw_frontier(study: Study) -> None:
    """Left: temperature 1, all methods; right: curves over test temperatures."""
    fig, axes = figure(13, 5.6, 1, 2, sharey=True)
    left, right = axes[0]
    all_rates = ("warm", *RATES)
    points = np.array([mean_point(study, s)[AT_ONE] for s in all_rates])
    solid = points[[all_rates.index(s) for s in on_frontier(study.sweep())]]
    left.plot(solid[:, 0], solid[:, 1], "k-", lw=2, label="plain GRPO: start and learning rates")
    left.plot(points[:, 0], points[:, 1], "ko")
    for s, p in zip(("start", *(s.partition("lr=")[2] or "3e-4" for s in RATES)), points):
        left.annotate(s, p[:2], xytext=(-4, -14), fontsize=8, weight="bold", **OFFSET)
    look = {"beats": ("#009e73", "^"), "loses": ("#d55e00", "v")}
    labels = itertools.cycle([(4, 3), (4, -9), (-24, 8)])  # so that neighbours' names part
    for name in dict.fromkeys((*METHOD_NAMES, "opefo:form=paper")):
        p, distance = mean_point(study, name)[AT_ONE], study.distance(name, 1)
        color, marker = look.get(distance.call, ("0.6", "o"))
        left.plot(*p[:2], marker=marker, color=color, ms=6, ls="")
        far = distance.call == "loses" and distance.mean < -0.04  # nearer losers lie on top of each other
        if far or distance.call == "beats":
            left.annotate(short(name), p[:2], xytext=next(labels), fontsize=7, color=color, **OFFSET)
    for call, (color, marker) in {**look, "no difference shown": ("0.6", "o")}.items():
        left.plot([], [], marker=marker, color=color, ls="", label=call)
    left.set_ylim(points[:, 1].min() - 0.12, 1.0)  # what lies below is in the tables
    left.set(title=f"Test temperature 1, step {STEPS}, means over pairs", xlabel="pass@1", ylabel="pass@32")
    left.legend(fontsize=8, loc="center left")
    shown = [s for s in ("warm", *RATES, *best_three(study)) if not np.isnan(mean_point(study, s)).any()]
    for i, name in enumerate(shown):
        m = mean_point(study, name)
        if name in RATES or name == "warm":
            shade = str(0.75 - 0.12 * i)
            right.plot(m[:, 0], m[:, 1], ".-", color=shade, lw=1.2, label="GRPO" if i == 1 else None)
            right.annotate(name.partition("lr=")[2] or name, m[0, :2], fontsize=7, color=shade)
        else:
            right.plot(m[:, 0], m[:, 1], marker="o", ms=4, label=short(name), **style(i - 6))
    right.set(title="Test temperatures .5 (right end) to 1.2 (left end)", xlabel="pass@1")
    right.legend(fontsize=8, loc="lower left")
    save(fig, "frontier")


def best_three(study: Study) -> list[str]:
    """OPEFO, its set point, and the three other methods with the largest D3."""
    others = [s for s in METHOD_NAMES if s not in ("opefo", SET) and not np.isnan(mean_point(study, s)).any()]
    score = {s: e.mean for s in others if not (e := study.over_temperatures(s)).note}
    return ["opefo", SET, *sorted(score, key=score.__getitem__, reverse=True)[:3]]


def forest(ax: Any, names: list[str], estimates: list[Estimate], title: str, reach: float) -> None:
    """One line a method: the mean, its interval, and every pair as a tick; a number where it is far off."""
    colors = {"beats": "#009e73", "loses": "#d55e00"}
    ax.axvline(0, color="black", lw=1)
    for y, e in enumerate(estimates):
        if e.note or abs(e.mean) > reach:
            text = e.note or f"{e.mean:+.2f}, outside"
            ax.text(0, y, f" {text} ", fontsize=7, va="center", ha="left" if e.note else "right", color="0.3")
            continue
        color = colors.get(e.call.rstrip("*"), "0.35")
        ax.plot(e.values, [y] * len(e.values), "|", color=color, ms=6, alpha=0.5)
        ax.plot([e.low, e.high], [y, y], color=color, lw=2)
        ax.plot(e.mean, y, "o", color=color, ms=5)
    ax.set_yticks(range(len(names)), [short(n) for n in names], fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(-reach, reach)
    ax.set_title(title, fontsize=10)


def draw_distances(study: Study, names: list[str], file: str) -> None:
    names = [n for n in names if study.distance(n, 1).values.size]
    names.sort(key=lambda n: -study.distance(n, 1).mean)
    fig, axes = figure(14, 1.4 + 0.21 * max(len(names), 6), 1, 3, sharey=True)
    for ax, m in zip(axes[0], (1, 2, 0)):
        e = [study.distance(n, m) if m else study.over_temperatures(n) for n in names]
        title = {1: "D1: pass@32 above GRPO's line", 2: "D2: distinct right above GRPO's line"}
        title = title.get(m, "D3: pass@32 at matched pass@1, best temperatures")
        forest(ax, names, e, title, 2.5 if m == 2 else 0.15)
    save(fig, file)


def draw_entropy(study: Study) -> None:
    """Left: entropy along the runs; right: what share of the warm start's entropy every method keeps."""
    names = [n for n in dict.fromkeys(("grpo", *METHOD_NAMES)) if study.pairs(n)]
    kept = {n: study.ends(n)["kept"] for n in names}
    names.sort(key=lambda n: statistics.mean(kept[n]))
    fig, axes = figure(13, 1.4 + 0.2 * max(len(names), 20), 1, 2)
    left, right = axes[0]
    few = ("grpo", "grpo:lr=5e-5", "opefo", SET, "nsr", "psr", "steer", "ref_kl")
    for i, n in enumerate(n for n in few if study.pairs(n)):
        left.plot(*study.curve(n, "entropy"), label=short(n), **style(i))
    left.set(title="Entropy of the training batch, mean over pairs", xlabel="step", ylabel="nats per token")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8)
    for y, n in enumerate(names):
        right.barh(y, statistics.mean(kept[n]), color="black" if n == "grpo" else "0.7")
        right.plot(kept[n], [y] * len(kept[n]), "|", color="#d55e00", ms=6)
    right.axvline(0.5, color="black", lw=0.8, ls=":")
    right.set_yticks(range(len(names)), [short(n) for n in names], fontsize=7)
    right.set_ylim(-0.6, len(names) - 0.4)
    right.set(title="Entropy at the end / at the start (ticks: pairs)")
    save(fig, "entropy")


def draw_curves(study: Study, panels: dict[str, tuple[list[str], int]], file: str) -> None:
    """One row a panel: entropy, pass@1 and pass@16 along the runs, over the pairs that all of it have."""
    panels = {t: ([n for n in names if study.pairs(n, steps)], steps) for t, (names, steps) in panels.items()}
    panels = {t: v for t, v in panels.items() if v[0]}
    if not panels:
        return
    fig, axes = figure(14, 3.8 * len(panels), len(panels), 3)
    for row, (title, (names, steps)) in zip(axes, panels.items()):
        only = set.intersection(*(set(study.pairs(n, steps)) for n in names))
        for ax, key in zip(row, ("entropy", "pass@1", "pass@16")):
            for i, n in enumerate(names):
                ax.plot(*study.curve(n, key, steps, only), label=short(n), **style(i))
            ax.set(title=f"{title}: {key} (n={len(only)})", xlabel="step")
            ax.set_ylim(0, None if key == "entropy" else 1)
        row[1].legend(fontsize=7, loc="upper left")  # pass@1 stays in the lower half
    save(fig, file)


def draw_law(study: Study) -> None:
    """pass@1 against e^H: GRPO at its learning rates with the fitted law, and four interventions."""
    fig, axes = figure(13, 4.8, 1, 2, sharey=True)
    for ax, names, title in (
        (axes[0][0], list(RATES), "Plain GRPO"),
        (axes[0][1], ["grpo", "opefo", SET, "nsr", "steer", "psr"], "Interventions"),
    ):
        for i, n in enumerate(n for n in names if study.pairs(n)):
            h, r = study.curve_eval(n)
            ax.plot(np.exp(h), r, marker="o", ms=3, label=short(n), **style(i))
        ax.set(title=f"{title}: the law would be one straight line", xlabel="$e^H$, H in nats on TEST")
        ax.legend(fontsize=8)
    axes[0][0].set_ylabel("pass@1")
    save(fig, "law")


def write_report() -> None:
    study = Study(load())
    text = report(study)
    (HERE / "study.txt").write_text(text)
    print(text)
    write_csv(study)
    if study.common:  # one warm start has all learning rates of plain GRPO
        draw_frontier(study)
        draw_distances(study, METHOD_NAMES, "distances")
        draw_distances(study, CONTROL_NAMES, "controls")
    draw_entropy(study)
    draw_law(study)
    draw_curves(study, {f"{LONG} steps": (list(LONG_RUNS), LONG)}, "long")
    rates = ["grpo", *named(FACTORS[:1]), f"grpo:{FOUR}", EIGHT]
    draw_curves(
        study,
        {
            "updates per rollout": (rates, STEPS),
            "training problems": (["grpo", *named(FACTORS[2:5])], STEPS),
            "clip, 8 updates": ([EIGHT, *named(FACTORS[5:])], STEPS),
            "random rewards": (RANDOM_NAMES, STEPS),
        },
        "factors",
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--jobs", type=int, default=2, help="processes, one thread each (default: 2)")
    p.add_argument("--only", default="*", help="run or list the keys that match this shell pattern")
    p.add_argument("--list", action="store_true", help="show the runs and which are done")
    p.add_argument("--report", action="store_true", help="write tables and figures from what is done")
    p.add_argument("--markdown", action="store_true", help="print the README's tables from what is done")
    args = p.parse_args()
    done = load()
    chosen = [i for i in items() if fnmatch.fnmatch(i.key, args.only)]
    todo = [i for i in chosen if i.key not in done]
    if args.list:
        for i in chosen:
            print("done" if i.key in done else "    ", i.key)
        hours = cost(todo) / 3600
        print(f"{len(chosen) - len(todo)} of {len(chosen)} done; left: {hours:.1f} hours of one core")
    elif args.report:
        write_report()
    elif args.markdown:
        print(markdown(Study(done), ("warm", *RATES), METHOD_NAMES), end="\n\n")
        print(markdown(Study(done), (), CONTROL_NAMES))
    else:
        run_all(todo, args.jobs)


if __name__ == "__main__":
    main()
