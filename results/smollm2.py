"""The study on a real language model: SmolLM2-135M-Instruct, full weights, float32, on a laptop's CPU.

    python results/smollm2.py MODEL --jobs 2   run what is missing, most important first; resumes after a kill
    python results/smollm2.py --list           the runs and their commands, in order, and what is done
    python results/smollm2.py --report         smollm2.txt and smollm2.png from what is done

MODEL is a hub id, a folder or SmolLM2-135M-Instruct.Q4_1.gguf; the runs recorded here are of the GGUF file,
whose weights were quantized to four bits.  A run takes about 20 minutes on one thread of its own.  Every
row of every run's metrics.jsonl is in smollm2.jsonl.gz, with the method, the seed and the commit.

Written before the first run of the study, and not changed after it but where a line says so:

Questions.
  1. Does entropy collapse?  Does pass@k fall with it?
  2. Is OPEFO better than a slower GRPO at equal pass@1?  Are the other methods?
  3. Does the set point hold?
  4. Does the ledger predict the measured change of entropy, and how well do the tabular and the network
     flow know which tokens did it?

Runs. `train.py --data arithmetic` (sums and products of numbers up to 20, in words) as it comes with
--model: 40 steps of 8 prompts x 8 responses of at most 20 tokens at temperature 1, AdamW. 64 problems are
held out, by value; evaluations before the first step and after every 10 have 8 samples for each: with a
fixed number of samples the mean of pass@8 is most certain with 8 for a problem. The ledger books every
third step. A pair is a seed: the order of the problems and the uniform numbers of sampling. Seeds 1, 2, 3:
never used before; seed 0 was looked at (up to two steps of four methods) to choose the settings below.
Three seeds for GRPO at its default rate and at half of it, OPEFO and OPEFO with a set point; one for the
rest. Then the same on `--data pairs`, if time allows.
Settings: the published defaults of steer, clip_cov and entropy_bonus were made for batches a thousand times
as large.  Chosen so that the first step of seed 0 is clearly another one than GRPO's, whose dH is -.048
nats:
  steer:lambda_min=.05        -.024       (the default .7 leaves every weight between .7 and 1)
  clip_cov:ratio=.05,lb=.5    +.006       (the default is a fifth of a token; this drops 55 of 1,108)
  entropy_bonus:alpha=.02     not looked at; .1 gave +.148, as much as three steps of GRPO take away
  opefo:target_entropy=.5     a quarter of the first policy's 2.0 nats

Statistics.  Entropy is that of the training batch, a mean over its tokens, in nats.
  1. Collapse: mean entropy of the last 10 steps below a tenth of that of the first step, in the mean over
     seeds. pass@8 falls: pass@8 at step 40 minus that at step 10 and at step 20, each with its interval.
  2. D1 of results/README.md, eval.py (6.8) and (6.9): pass@8 minus that of the line through the first
     policy and GRPO's learning rates, at the method's own pass@1, at the same step; here the mean over the
     evaluations at steps 20, 30 and 40, since one of 64 problems is noisy.  D2, the same with the line
     through all of GRPO's evaluations at all rates, which also allows GRPO to be stopped early.  A rate
     joins the line where it has the pair's seed.  Changed before any run had ended, when the tables were
     tried on made-up numbers: D1 leaves out points that another one beats in both pass@1 and pass@8, and
     where both rise that is every slower rate, so D1 asks who gets ahead in as many steps.  D2 leaves out
     none: it alone compares at equal pass@1, and decides question 2.
  3. The set point holds if the mean entropy of steps 21 to 40 is within 10 % of .5 in every seed; beside it
     the share of these steps within 10 %.
  4. Pearson's r of predicted and measured change over a run's booked steps whose batch had more than .1
     nats; the goal is .95.  For the runs with --ledger full (GRPO and OPEFO, seed 1): r over tokens of
     tabular and network flow, mean over steps, and r over steps of each one's net flow with the measured
     change.
Intervals: 95 %, bootstrap over pairs and problems as in eval.py (6.9).  "beats" above 0, "loses" below,
with three pairs; one pair decides nothing.
The first ten steps of OPEFO and the first of GRPO at 5e-6, seed 1, are of commit 84d68bd; the gradients of
the one that made the rest differ from its by rounding (groups without contrast have no backward pass since).
Added before the first run on pairs: those runs may be made on a GPU, in float32 as well; no table compares
runs of the two tasks, and all runs on one task are of one kind of device.
Added when all runs on pairs were done: table 5, how many of a problem's 8 right answers are different ones,
since pass@8 turned out to reach 1 with every method.  It answers no question that was asked before.
Stopping: the list below is worked off in its order; what is not done when machine time ends is said to be
missing.
"""

import argparse
import gzip
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT, RAW, RUNS = HERE.parent, HERE / "smollm2.jsonl.gz", HERE.parent / "runs" / "smollm2"
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from eval import (  # noqa: E402
    DRAWS,
    Means,
    distances,
    figure,
    line,
    means,
    middle,
    over_pairs,
    pass_at_k,
    save,
    series,
    shown,
    style,
)
from train import label_of  # noqa: E402

STEPS, EVERY, PROBLEMS, K, TARGET = 40, 10, 64, 8, 0.5
SLOWER, SET = "grpo:lr=5e-6", f"opefo:target_entropy={TARGET}"
MAIN = ("grpo", "opefo", SLOWER, SET)  # three seeds
REST = (
    "grpo:lr=2.5e-6",
    "opefo:shuffled_sign=true",
    "steer:lambda_min=.05",
    "clip_cov:ratio=.05,lb=.5",
    "entropy_bonus:alpha=.02",
)

# ------------------------------------------------------------------------------------------------------------
# 1. The runs


@dataclass(frozen=True)
class Item:
    """One run."""

    data: str
    seed: int
    spec: str

    @property
    def key(self) -> str:
        return f"{self.data} seed {self.seed} {self.spec}"

    @property
    def folder(self) -> Path:
        return RUNS / self.data / f"seed{self.seed}" / label_of(self.spec)

    def command(self, model: str, device: str = "cpu") -> list[str]:
        full = self.seed == 1 and self.spec in ("grpo", "opefo")
        return [
            *("train.py", "--method", self.spec, "--model", model, "--data", self.data),
            *("--seed", str(self.seed), "--steps", str(STEPS), "--eval-every", str(EVERY)),
            *("--eval-problems", str(PROBLEMS), "--eval-samples", str(K)),
            *("--ledger", "full" if full else "step", "--ledger-every", "3"),
            *("--threads", "1", "--device", device, *(["--dtype", "float32"] if device != "cpu" else [])),
            *("--quiet", "--out", str(self.folder.relative_to(ROOT))),
        ]


def items() -> list[Item]:
    """All runs, most important first."""
    out = [Item("arithmetic", seed, spec) for seed in (1, 2, 3) for spec in MAIN]
    out += [Item("arithmetic", 1, spec) for spec in REST]
    out += [Item("pairs", seed, spec) for seed in (1, 2, 3) for spec in MAIN]
    return out + [Item("pairs", 1, spec) for spec in REST]


def load() -> dict[str, dict[str, Any]]:
    """Every finished run by its key: item, commit, rows of metrics.jsonl."""
    lines = gzip.open(RAW, "rt").read().splitlines() if RAW.exists() else []
    return {r["key"]: r for r in map(json.loads, lines)}


def shorter(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def book(item: Item, device: str) -> None:
    """Add a finished run to smollm2.jsonl.gz, all of it or nothing, and drop its checkpoints."""
    rows = [json.loads(line) for line in (item.folder / "metrics.jsonl").read_text().splitlines()]
    if rows[-1]["step"] != STEPS:
        raise ValueError(f"{item.folder} ended at step {rows[-1]['step']} of {STEPS}")
    rows = [{k: shorter(v) for k, v in row.items()} for row in rows]
    flows = item.folder / "flows.jsonl"  # of --ledger full
    flows = [json.loads(line) for line in flows.read_text().splitlines()] if flows.exists() else []
    call = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(call, capture_output=True, text=True).stdout.strip()
    commit = commit or os.environ.get("COMMIT", "unknown")  # a copy without the repository's history
    record = {"key": item.key, **vars(item), "commit": commit, "device": device, "rows": rows, "flows": flows}
    text = "".join(json.dumps(r) + "\n" for r in [*load().values(), record])
    part = RAW.with_suffix(".part")
    part.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    os.replace(part, RAW)
    for checkpoint in item.folder.glob("checkpoint*"):
        shutil.rmtree(checkpoint)


def work(model: str, jobs: int, data: str, device: str) -> None:
    """Run what is missing, `jobs` at a time.  Ctrl-C reaches the runs, which finish a step and save; after
    one that did not end as it should no other is started."""
    done, lock, stop = load(), Lock(), Event()
    left = [x for x in items() if x.key not in done and data in ("", x.data)]

    def one(item: Item) -> None:
        if stop.is_set():
            return
        command = item.command(model, device)
        if (item.folder / "config.json").exists():
            command = ["train.py", "--quiet", "--resume", str(item.folder.relative_to(ROOT))]
        print("$ python", shlex.join(command), flush=True)
        item.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(item.folder.with_name(item.folder.name + ".log"), "a") as log:
            end = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log)
        if end.returncode:
            stop.set()
            print(f"{item.key}: ended with {end.returncode}; see {log.name}", flush=True)
            return
        with lock:
            book(item, device)
            print(f"{item.key}: done, {len(load())} of {len(items())}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(one, left))
        except KeyboardInterrupt:
            stop.set()


# ------------------------------------------------------------------------------------------------------------
# 2. The tables

Runs = dict[str, dict[int, list[dict[str, Any]]]]  # method -> seed -> rows of metrics.jsonl
Table = tuple[str, list[dict[str, Any]], dict[str, str]]  # title; rows and columns of eval.shown


def scores(runs: Runs) -> dict[tuple[str, int], Means]:
    """(method, step) -> seed -> pass@1 and pass@8, with bootstrap resamples of the problems."""
    share = np.array([[pass_at_k(K, c, k) for c in range(K + 1)] for k in (1, K)])
    out: dict[tuple[str, int], Means] = {}
    for spec, seeds in runs.items():
        for seed, rows in seeds.items():
            for row in rows:
                if "right" in row:
                    out.setdefault((spec, row["step"]), {})[seed] = means(share[:, row["right"]])
    return out


def interval(name: str, d: np.ndarray) -> dict[str, float]:
    """Cells "name diff", "name low", "name high"."""
    return {f"{name} {end}": x for end, x in zip(("diff", "low", "high"), over_pairs(d))}


def trajectories(runs: Runs) -> Table:
    """Question 1: entropy, and pass@1 / pass@8 at every evaluation."""
    found, rows = scores(runs), []
    for spec, seeds in runs.items():
        curves = [series(r, "entropy") for r in seeds.values()]
        first, last = (
            np.mean([cut(c) for c in curves]) for cut in (lambda c: c.iloc[0], lambda c: c[-10:].mean())
        )
        row: dict[str, Any] = {"method": spec, "n": len(seeds), "first": float(first), "last": float(last)}
        for step in range(0, STEPS + 1, EVERY):
            one, several = middle(found[spec, step])
            row[str(step)] = f"{one:.2f} / {several:.2f}"
        for step in (10, 20):
            end, then = found[spec, STEPS], found[spec, step]
            row |= interval(f"since {step}", np.array([end[q][1] - then[q][1] for q in end]))
        rows.append(row)
    columns = {"method": "", "n": "n", "first": "H, step 1", "last": "H, last 10"}
    columns |= {str(x): f"step {x}" for x in range(0, STEPS + 1, EVERY)}
    columns |= {f"since {x} diff": f"pass@{K}, {STEPS} minus {x}" for x in (10, 20)}
    return (
        f"1. Entropy of the training batch, nats; pass@1 / pass@{K} of {PROBLEMS} held-out problems",
        rows,
        columns,
    )


def above_line(runs: Runs, spec: str, early: bool) -> np.ndarray:
    """(pairs, 1 + DRAWS): D1, with `early` D2; of the seeds that have GRPO at two rates."""
    found, steps = scores(runs), range(20, STEPS + 1, EVERY)
    rates = [x for x in runs if x.startswith("grpo") and x != spec]
    out = []
    for seed in runs[spec]:
        has, at = [x for x in rates if seed in runs[x]], []
        if len(has) < 2:
            continue
        for step in steps:
            own, first = found[spec, step][seed], found[spec, 0][seed]
            if early:
                every = [first, *(found[x, t][seed] for x in has for t in range(EVERY, STEPS + 1, EVERY))]
                points = np.stack(every)  # (n, 2, 1 + DRAWS)
                at.append(own[1] - line(points[:, 0], points[:, 1], own[0]))
            else:
                sweep = {x: {seed: found[x, step][seed]} for x in has}
                at.append(distances({seed: own}, {"first": {seed: first}, **sweep})[0])
        out.append(np.mean(at, 0))
    return np.array(out).reshape(-1, 1 + DRAWS)


def against_the_line(runs: Runs) -> Table:
    """Question 2."""
    rows = []
    for spec, seeds in runs.items():
        if spec.startswith("grpo"):
            continue
        row: dict[str, Any] = {"method": spec, "n": len(seeds)}
        for name, early in (("same step", False), ("any step", True)):
            row |= interval(name, above_line(runs, spec, early))
            low, high = row[f"{name} low"], row[f"{name} high"]
            call = "beats" if low > 0 else "loses" if high < 0 else ""
            row[f"{name} call"] = call if len(seeds) >= 3 else ""
        rows.append(row)
    columns = {"method": "", "n": "n", "same step diff": "D1", "same step call": " "}
    columns |= {"any step diff": "D2, GRPO stopped early too", "any step call": "  "}
    return f"2. pass@{K} above GRPO's line at equal pass@1, mean over steps 20, 30, 40", rows, columns


def diversity(runs: Runs) -> Table:
    """Different right answers among the K, where a problem has many; mean over problems and seeds."""
    rows, steps = [], range(0, STEPS + 1, EVERY)
    for spec, seeds in runs.items():
        found = np.array([[x["distinct_correct"] for x in r if "right" in x] for r in seeds.values()])
        row = {"method": spec, "n": len(seeds), **dict(zip(map(str, steps), map(float, found.mean(0))))}
        rows.append(row | {"ends": ", ".join(f"{x:.2f}" for _, x in sorted(zip(seeds, found[:, -1])))})
    columns = {"method": "", "n": "n", **{str(x): f"step {x}" for x in steps}, "ends": "step 40, by seed"}
    return f"5. Different right answers among {K}", rows, columns


def set_point(runs: Runs) -> Table:
    """Question 3."""
    rows = []
    for seed, run in runs.get(SET, {}).items():
        h = series(run, "entropy").loc[STEPS // 2 + 1 :]
        near = float(((h - TARGET).abs() <= 0.1 * TARGET).mean())
        rows.append(
            {
                "seed": seed,
                "mean": float(h.mean()),
                "low": float(h.min()),
                "high": float(h.max()),
                "near": near,
            }
        )
    columns = {
        "seed": "seed",
        "mean": "mean H",
        "low": "lowest",
        "high": "highest",
        "near": "share within 10 %",
    }
    return f"3. Set point {TARGET}: entropy of steps {STEPS // 2 + 1} to {STEPS}", rows, columns


def ledger(runs: Runs) -> Table:
    """Question 4."""
    rows = []
    for spec, seeds in runs.items():
        for seed, run in seeds.items():
            booked = pd.DataFrame([r for r in run if "dH_measured" in r])
            alive, measured = booked[booked["entropy"] > 0.1], "dH_measured"
            row = {"method": spec, "seed": seed, "n": len(alive)}
            row["r"] = alive["dH_predicted"].corr(alive[measured])
            row["slope"] = (
                np.polyfit(alive["dH_predicted"], alive[measured], 1)[0] if len(alive) > 1 else math.nan
            )
            row["table"] = (alive["flow_up"] - alive["flow_down"]).corr(alive[measured])
            if "flow_r" in alive:
                row["network"] = (alive["net_flow_up"] - alive["net_flow_down"]).corr(alive[measured])
                row["tokens"] = alive["flow_r"].mean()
            rows.append({k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()})
    columns = {
        "method": "",
        "seed": "seed",
        "n": "steps booked, H > .1",
        "r": "r of the prediction",
        "slope": "slope",
    }
    columns |= {"table": "r of the net tabular flow", "network": "r of the net network flow"}
    return (
        "4. The ledger against the measured change",
        rows,
        columns | {"tokens": "tabular with network flow, r over tokens"},
    )


# ------------------------------------------------------------------------------------------------------------
# 3. The figure


def draw(runs: Runs, path: Path, many: bool) -> None:
    """Entropy, pass@1 and pass@8 of the methods with most seeds; their plane, or where problems have many
    right answers how many are found; the ledger of all runs."""
    labels = [
        ("Entropy on the training batch", "step", "nats per token"),
        (f"Held-out: pass@1 (circles), pass@{K} (triangles)", "step", "share of problems"),
        (f"Different right answers among {K}", "step", "answers a problem")
        if many
        else ("First try against any try (square: end)", "pass@1", f"pass@{K}"),
        ("The ledger: change of entropy in one step", "predicted, nats", "measured, nats"),
    ]
    fig, axes = figure(12, 8.4, 2, 2, labels)
    (entropy, progress), (third, both) = axes
    scored = scores(runs)
    for i, spec in enumerate(x for x in MAIN if x in runs):
        look, seeds = style(i), runs[spec]
        curves = pd.concat([series(r, "entropy") for r in seeds.values()], axis=1)
        entropy.plot(curves, alpha=0.25, linewidth=0.8, color=look["color"])
        entropy.plot(curves.mean(axis=1), label=f"{spec} ({len(seeds)})", **look)
        steps = range(0, STEPS + 1, EVERY)
        points = np.array([middle(scored[spec, step]) for step in steps])
        progress.plot(steps, points[:, 0], marker="o", markersize=4, **look)
        progress.plot(steps, points[:, 1], marker="^", markersize=4, **look)
        if many:
            found = [[x["distinct_correct"] for x in r if "right" in x] for r in seeds.values()]
            third.plot(steps, np.transpose(found), alpha=0.25, linewidth=0.8, color=look["color"])
            third.plot(steps, np.mean(found, 0), marker="o", markersize=4, **look)
        else:
            third.plot(*points.T, marker="o", markersize=4, **look)
            third.plot(*points[-1:].T, marker="s", markersize=8, color=look["color"])
        booked = pd.concat([pd.DataFrame(r) for r in seeds.values()])
        both.plot(booked["dH_predicted"], booked["dH_measured"], ".", color=look["color"])
    low, high = both.get_xlim()
    both.plot([low, high], [low, high], color="#999999", linewidth=0.8, zorder=0)
    entropy.set_ylim(bottom=0)
    progress.set_ylim(0, 1.02)
    entropy.legend(fontsize=8, title="method (seeds)")
    save(fig, path)


def report() -> None:
    done, text = load(), []
    for data in dict.fromkeys(x.data for x in items()):
        runs: Runs = {}
        for x in sorted(items(), key=lambda x: [*MAIN, *REST].index(x.spec)):
            if x.data == data and x.key in done:
                runs.setdefault(x.spec, {})[x.seed] = done[x.key]["rows"]
        missing = [x.key for x in items() if x.data == data and x.key not in done]
        text.append(
            f"--data {data}: {sum(map(len, runs.values()))} runs; missing: {', '.join(missing) or 'none'}"
        )
        if runs:
            tables = [trajectories, against_the_line, set_point, ledger, *[diversity] * (data == "pairs")]
            for title, rows, columns in (f(runs) for f in tables):
                text.append(f"{title}\n\n{shown(rows, columns)}" if rows else f"{title}: no run")
            draw(runs, HERE / ("smollm2_pairs.png" if data == "pairs" else "smollm2.png"), data == "pairs")
    text.append("commits: " + ", ".join(sorted({r["commit"] for r in done.values()})))
    (HERE / "smollm2.txt").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread and 6 GB each")
    parser.add_argument("--data", default="", choices=("arithmetic", "pairs"), help="only runs on this task")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    parser.add_argument("--report", action="store_true", help="make the tables and the figure, and stop")
    given = parser.parse_args()
    if given.list:
        done = load()
        for x in items():
            if given.data in ("", x.data):
                command = shlex.join(x.command(given.model, given.device))
                print("done   " if x.key in done else "missing", "python", command)
    elif given.report:
        report()
    else:
        work(given.model, given.jobs, given.data, given.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
