"""The claims of the README's first page, measured: which method keeps entropy and pass@k, over three seeds.

    python results/claims.py       run what is missing (about 90 s a run on one thread), then write the tables
    python results/claims.py --tables   only write the tables and the picture again, from claims.csv.gz

A seed changes the warm start, the order of the prompts and the sampling. Chosen before the runs: 300 steps,
the default settings, seeds 0, 1, 2; statistic: mean and standard deviation over seeds of the values at step
300. GRPO with smaller learning rates is the control, since whatever slows learning also slows the collapse.

Writes results/claims.txt (the tables), results/claims.csv.gz (every metric of every step) and
results/entropy.png (the picture of seed 0, methods of the README's first page).
"""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
ROOT, RUNS = HERE.parent, HERE.parent / "runs" / "claims"
sys.path.insert(0, str(ROOT))

from eval import draw  # noqa: E402
from train import label_of  # noqa: E402

SEEDS = (0, 1, 2)
SPECS = (
    "grpo",
    "opefo",
    "opefo:target_entropy=0.45",
    "opefo:form=paper",
    "steer",
    "grpo:lr=1e-4",
    "grpo:lr=5e-5",
)
FIRST_PAGE = ("grpo", "opefo", "steer")
COLUMNS = {  # of metrics.jsonl -> of the table
    "eval_entropy": "entropy",
    "pass@1": "pass@1",
    "pass@k": "pass@32",
    "hard_pass@k": "hard pass@32",
    "distinct_correct": "distinct right",
}


def run(seed: int) -> None:
    folder = RUNS / f"seed{seed}"
    command = [sys.executable, str(ROOT / "train.py"), "--quiet"]
    if (folder / "config.json").exists():
        command += ["--resume", str(folder)]
    else:
        command += ["--method", *SPECS, "--seed", str(seed), "--threads", "1", "--out", str(folder)]
    print("$", " ".join(["python", "train.py", *command[2:]]), flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


def collect() -> pd.DataFrame:
    """Every logged row of every run, with its method and seed."""
    frames = []
    for seed in SEEDS:
        for spec in SPECS:
            lines = (RUNS / f"seed{seed}" / label_of(spec) / "metrics.jsonl").read_text().splitlines()
            rows = [{"method": spec, "seed": seed} | json.loads(line) for line in lines]
            frames.append(pd.DataFrame(rows))
    return pd.concat(frames)


def tables(data: pd.DataFrame) -> str:
    """Where the runs end, mean ± standard deviation over seeds; then each run on its own."""
    evaluated = data[data["pass@1"].notna()]
    ends = evaluated.groupby(["method", "seed"], sort=False).tail(1)
    ends = ends.assign(method=ends.method + ", step " + ends.step.astype(str))
    start = evaluated[(evaluated.method == SPECS[0]) & (evaluated.step == 0)]
    start = start.assign(method="warm start, step 0")
    scores = pd.concat([start, ends]).groupby("method", sort=False)[list(COLUMNS)]
    mean, std = (part.map("{:.3f}".format) for part in (scores.mean(), scores.std()))
    table = (mean + " ± " + std).rename(columns=COLUMNS).rename_axis(None)
    runs = []
    for (spec, seed), run in data[data.step > 0].groupby(["method", "seed"], sort=False):
        h, r = run.entropy.tail(150), run.dH_predicted.corr(run.dH_measured)
        smooth = h.rolling(10).mean()
        runs.append((spec, seed, h.mean(), smooth.min(), smooth.max(), r))
    columns = ["method", "seed", "mean", "lowest", "highest", "ledger"]
    runs = pd.DataFrame(runs, columns=columns).sort_values(
        "method", key=lambda m: m.map(SPECS.index), kind="stable"
    )
    return (
        f"mean ± standard deviation over seeds {SEEDS}\n\n{table.to_string()}\n\n"
        "training-batch entropy of the last 150 steps: mean; lowest and highest running mean of 10 steps\n"
        "ledger: Pearson's r of predicted and measured change of entropy per logged step, over one run\n\n"
        f"{runs.to_string(index=False, float_format='{:.3f}'.format)}\n"
    )


def main() -> None:
    if "--tables" not in sys.argv:
        for seed in SEEDS:
            run(seed)
        collect().to_csv(HERE / "claims.csv.gz", index=False, float_format="%.6g")
    data = pd.read_csv(HERE / "claims.csv.gz", dtype={"k": "Int64"})  # empty between evaluations
    text = tables(data)
    print(text)
    (HERE / "claims.txt").write_text(text)
    first = data[data.seed == 0].groupby("method")
    pictured = {s: [row.dropna().to_dict() for _, row in first.get_group(s).iterrows()] for s in FIRST_PAGE}
    draw(pictured, HERE / "entropy.png")


if __name__ == "__main__":
    main()
