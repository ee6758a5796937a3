"""Seconds a training step, what the ledger and every method add to it, and the first command from cold, on
this machine.

    python results/bench_step.py           a step, split into its parts, and every method's cost (two minutes)
    python results/bench_step.py --command      also `python train.py --method grpo opefo` from an empty cache

512 responses of at most 11 tokens to 32 prompts, one thread: the default settings. Parts are medians over 20
steps, three times over; methods are interleaved with plain GRPO on one fixed batch and compared by medians.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import interventions  # noqa: E402
from grpo import Progress, Tokens, batch_loss  # noqa: E402
from rollout import chain_task, warm_policy  # noqa: E402
from train import (  # noqa: E402
    Run,
    Settings,
    Update,
    draw_responses,
    make_run,
    parse_spec,
    set_threads,
    supply,
    train,
)


def clock(work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def new_run(spec: str, folder: Path) -> Run:
    settings, method = parse_spec(spec, Settings(eval_every=10**6))
    run = make_run(settings, method, folder, chain_task(), *warm_policy())
    run.rows = [{"step": 0}]  # no evaluation of the first policy
    return run


def update(run: Run, batch: Tokens) -> Update:
    """Loss, gradient and metrics of one update as `train` makes them, without the optimizer's step."""
    run.optimizer.zero_grad(set_to_none=True)
    made = Update(run, batch)
    loss, metrics = batch_loss(made.tokens, made.own, run.method)
    made.backward(loss)
    made.numbers(loss, metrics)
    return made


def parts(folder: Path) -> None:
    """A step of grpo and opefo, with and without a ledger entry."""
    print("medians of 20 steps, three times, milliseconds")
    for spec in ("grpo", "opefo", "opefo:ledger=off"):
        for _ in range(3):
            run = new_run(spec, folder)
            rows = [row for _, row in zip(range(24), train(run))]
            rollout, whole = ([row[key] for row in rows] for key in ("seconds_rollout", "seconds"))
            plain = [w for i, w in enumerate(whole) if i % 10][3:]
            booked = [w for i, w in enumerate(whole) if i % 10 == 0 and i]
            ms = [1e3 * statistics.median(x) for x in (rollout, plain, booked)]
            print(
                f"  {spec:<18} step {ms[1]:4.0f}   rollout {ms[0]:4.0f}   step with ledger entry {ms[2]:4.0f}"
            )


def methods(folder: Path, repeats: int = 15) -> None:
    """What each method adds to an update, as a share of plain GRPO's step."""
    run = new_run("grpo", folder)
    step = statistics.median(row["seconds"] for _, row in zip(range(11), train(run)))
    batch, _ = draw_responses(run)
    print(
        f"\nadded by each method to a step of {1e3 * step:.0f} ms (medians of {repeats} interleaved updates)"
    )
    for key in interventions.METHODS:
        other = new_run(key, folder)
        other.method.progress = Progress(3, 300, 0, 11)
        times: dict[str, list[float]] = {"grpo": [], key: []}
        extra, tokens = "", replace(batch, outcome=batch.ids[:, 0])  # of the answer: its first token will do
        supply(other, tokens)
        for name in {"ref_logp", "proxy_logp", "teacher_logp"} & set(other.method.needs):
            passes = statistics.median(clock(lambda r=other: supply(r, replace(batch))) for _ in range(5))
            extra += f" and {passes / step:+.1%} for the pass of {name}"
        for _ in range(repeats):
            for name, r in (("grpo", run), (key, other)):
                times[name].append(clock(lambda r=r, t=tokens: update(r, t)))
        added = statistics.median(times[key]) - statistics.median(times["grpo"])
        print(f"  {key:<22} {1e3 * added:+6.1f} ms  {added / step:+6.1%}{extra}")


def command() -> None:
    """The README's command with two methods, three times, each from an empty cache."""
    print("\npython train.py --method grpo opefo, empty cache: wall seconds, peak MB, seconds of opefo alone")
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "ENTROPY_FLOW_CACHE": folder}
            line = [
                sys.executable,
                "train.py",
                "--method",
                "grpo",
                "opefo",
                "--quiet",
                "--out",
                f"{folder}/run",
            ]
            begin = time.time()
            subprocess.run(line, cwd=HERE.parent, env=env, check=True, stdout=subprocess.DEVNULL)
            end = time.time()
            half = (Path(folder) / "run" / "opefo" / "config.json").stat().st_mtime
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            print(f"  {end - begin:6.1f} s   {peak:6.0f} MB   {end - half:6.1f} s")


def main() -> None:
    set_threads(0)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        parts(Path(folder))
        methods(Path(folder))
    if "--command" in sys.argv:
        command()


if __name__ == "__main__":
    main()
