"""The claims of the README's first page, measured: which method keeps entropy and pass@k, over three seeds.

    python results/claims.py       run what is missing (about 90 s a run on one thread), then write the tables
    python results/claims.py --tables   only write the tables from what has been run

A seed changes the warm start, the order of the prompts and the sampling. Chosen before the runs: 300 steps,
the default settings, seeds 0, 1, 2; statistic: mean and standard deviation over seeds of the values at step
300. GRPO with smaller learning rates is the control, since whatever slows learning also slows the collapse.

Writes results/claims.txt (the tables), results/claims.csv.gz (every metric of every step) and
results/entropy.png (the picture of seed 0, methods of the README's first page).
"""

import csv
import gzip
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT, RUNS = HERE.parent, HERE.parent / "runs" / "claims"
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
COLUMNS = {
    "entropy": "eval_entropy",
    "pass@1": "pass@1",
    "pass@32": "pass@k",
    "hard pass@32": "hard_pass@k",
    "distinct right": "distinct_correct",
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


def rows_of(seed: int, spec: str) -> list[dict]:
    sys.path.insert(0, str(ROOT))
    from train import label_of

    path = RUNS / f"seed{seed}" / label_of(spec) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def tables(data: dict[tuple[str, int], list[dict]]) -> str:
    lines = [
        f"{'mean ± standard deviation over seeds ' + str(SEEDS):<50}" + "".join(f"{c:<17}" for c in COLUMNS)
    ]
    for spec in SPECS:
        ends = [[r for r in data[spec, s] if "pass@1" in r] for s in SEEDS]
        if spec == SPECS[0]:
            cells = [spread([e[0][key] for e in ends]) for key in COLUMNS.values()]
            lines.append(f"{'warm start, step 0':<50}" + "".join(f"{c:<17}" for c in cells))
        cells = [spread([e[-1][key] for e in ends]) for key in COLUMNS.values()]
        lines.append(
            f"{spec + ', step ' + str(ends[0][-1]['step']):<50}" + "".join(f"{c:<17}" for c in cells)
        )
    lines += [
        "",
        "training-batch entropy of the last 150 steps: mean; lowest and highest running mean of 10 steps",
    ]
    for spec in SPECS:
        for s in SEEDS:
            h = [r["entropy"] for r in data[spec, s] if r["step"] > 0][-150:]
            smooth = [statistics.mean(h[i : i + 10]) for i in range(len(h) - 9)]
            low, high = min(smooth), max(smooth)
            lines.append(f"  {spec:<28} seed {s}   {statistics.mean(h):.3f}   {low:.3f} .. {high:.3f}")
    lines += [
        "",
        "ledger: Pearson's r of predicted and measured change of entropy per logged step, over one run",
    ]
    for spec in SPECS:
        cells = []
        for s in SEEDS:
            pairs = [
                (r["dH_predicted"], r["dH_measured"])
                for r in data[spec, s]
                if r.get("dH_measured") is not None
            ]
            cells.append(f"{statistics.correlation(*zip(*pairs)):.3f}")
        lines.append(f"  {spec:<28} " + "   ".join(cells))
    return "\n".join(lines) + "\n"


def write_csv(data: dict[tuple[str, int], list[dict]]) -> None:
    keys = list(dict.fromkeys(k for rows in data.values() for r in rows for k in r))
    with gzip.open(HERE / "claims.csv.gz", "wt", newline="") as file:
        writer = csv.DictWriter(file, ["method", "seed", *keys])
        writer.writeheader()
        for (spec, seed), rows in data.items():
            for r in rows:
                short = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()}
                writer.writerow({"method": spec, "seed": seed, **short})


def main() -> None:
    if "--tables" not in sys.argv:
        for seed in SEEDS:
            run(seed)
    data = {(spec, seed): rows_of(seed, spec) for seed in SEEDS for spec in SPECS}
    text = tables(data)
    print(text)
    (HERE / "claims.txt").write_text(text)
    write_csv(data)
    from eval import draw

    draw({spec: data[spec, 0] for spec in FIRST_PAGE}, HERE / "entropy.png")


if __name__ == "__main__":
    main()
