"""The study on a real language model: SmolLM2-135M-Instruct, full weights, float32, on a laptop's CPU.

    python results/smollm2.py MODEL --jobs 2    run what is missing, most important first; goes on after a kill
    python results/smollm2.py --list            the runs and their commands, in order, and what is done
    python results/smollm2.py --report          smollm2.txt and smollm2.png from what is done

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

Runs.  `train.py --data arithmetic` (sums and products of numbers up to 20, in words) as it comes with
--model: 40 steps of 8 prompts x 8 responses of at most 20 tokens at temperature 1, AdamW.  64 problems are
held out, by value; evaluations before the first step and after every 10 have 8 samples for each: with a
fixed number of samples the mean of pass@8 is most certain with 8 for a problem.  The ledger books every
third step.  A pair is a seed: the order of the problems and the uniform numbers of sampling.  Seeds 1, 2,
3: never used before; seed 0 was looked at (up to two steps of four methods) to choose the settings below.  Three
seeds for GRPO at its default rate and at half of it, OPEFO and OPEFO with a set point; one for the rest.
Then the same on `--data pairs`, if time allows.
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
     evaluations at steps 20, 30 and 40, since one of 64 problems is noisy.  The same once more against the
     line through all of GRPO's evaluations, which also allows GRPO to be stopped early.  A rate joins the
     line where it has the pair's seed.
  3. The set point holds if the mean entropy of steps 21 to 40 is within 10 % of .5 in every seed; beside it
     the share of these steps within 10 %.
  4. Pearson's r of predicted and measured change over a run's booked steps whose batch had more than .1
     nats; the goal is .95.  For the runs with --ledger full (GRPO and OPEFO, seed 1): r over tokens of
     tabular and network flow, mean over steps, and r over steps of each one's net flow with the measured
     change.
Intervals: 95 %, bootstrap over pairs and problems as in eval.py (6.9).  "beats" above 0, "loses" below,
with three pairs; one pair decides nothing.
Stopping: the list below is worked off in its order; what is not done when machine time ends is said to be
missing.
"""

import argparse
import gzip
import json
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

    def command(self, model: str) -> list[str]:
        full = self.seed == 1 and self.spec in ("grpo", "opefo")
        return [
            *("train.py", "--method", self.spec, "--model", model, "--data", self.data),
            *("--seed", str(self.seed), "--steps", str(STEPS), "--eval-every", str(EVERY)),
            *("--eval-problems", str(PROBLEMS), "--eval-samples", str(K)),
            *("--ledger", "full" if full else "step", "--ledger-every", "3"),
            *("--threads", "1", "--device", "cpu", "--quiet", "--out", str(self.folder.relative_to(ROOT))),
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


def book(item: Item) -> None:
    """Add a finished run to smollm2.jsonl.gz, all of it or nothing, and drop its checkpoints."""
    rows = [json.loads(line) for line in (item.folder / "metrics.jsonl").read_text().splitlines()]
    if rows[-1]["step"] != STEPS:
        raise ValueError(f"{item.folder} ended at step {rows[-1]['step']} of {STEPS}")
    rows = [{k: shorter(v) for k, v in row.items()} for row in rows]
    call = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(call, capture_output=True, text=True).stdout.strip()
    record = {"key": item.key, **vars(item), "commit": commit, "rows": rows}
    text = "".join(json.dumps(r) + "\n" for r in [*load().values(), record])
    part = RAW.with_suffix(".part")
    part.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    os.replace(part, RAW)
    for checkpoint in item.folder.glob("checkpoint*"):
        shutil.rmtree(checkpoint)


def work(model: str, jobs: int) -> None:
    """Run what is missing, `jobs` at a time.  Ctrl-C reaches the runs, which finish a step and save; after
    one that did not end as it should no other is started."""
    done, lock, stop = load(), Lock(), Event()
    left = [x for x in items() if x.key not in done]

    def one(item: Item) -> None:
        if stop.is_set():
            return
        command = item.command(model)
        if (item.folder / "config.json").exists():
            command = ["train.py", "--quiet", "--resume", str(item.folder.relative_to(ROOT))]
        print("$ python", shlex.join(command), flush=True)
        item.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(item.folder.with_suffix(".log"), "a") as log:
            end = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log)
        if end.returncode:
            stop.set()
            print(f"{item.key}: ended with {end.returncode}; see {log.name}", flush=True)
            return
        with lock:
            book(item)
            print(f"{item.key}: done, {len(load())} of {len(items())}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(one, left))
        except KeyboardInterrupt:
            stop.set()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread and 6 GB each")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    parser.add_argument("--report", action="store_true", help="make the tables and the figure, and stop")
    given = parser.parse_args()
    if given.list:
        done = load()
        for x in items():
            print("done   " if x.key in done else "missing", "python", shlex.join(x.command(given.model)))
    elif given.report:
        report()
    else:
        work(given.model, given.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
