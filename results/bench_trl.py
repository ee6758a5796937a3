"""One GRPO step on a CPU: `trl.GRPOTrainer`, what a user would pick instead, against `train.py`.

    python results/bench_trl.py            needs the extra `trl`; writes results/bench_trl.txt
    python results/bench_trl.py --models SmolLM2-135M-Instruct.Q4_1.gguf --steps 6 --threads 1
                                           a real model (hub id, folder, GGUF file); prints, writes no file

Both trainers take the same steps: 32 chain problems x 16 responses of at most 11 tokens at temperature 1 (a
real model: 8 problems of --data arithmetic x 8 responses of at most 20 tokens, float32), plain GRPO, strictly
on-policy, AdamW, gradient clipping, the same verifier, the same kind of model with the same start weights,
two threads. TRL runs as a user gets it (bfloat16 autocast and gradient checkpointing are its defaults)
against ours as a user gets it (float32) and against ours with --dtype bfloat16, and tuned (both off, float32
like ours). It never logs, saves or evaluates.
The two trainers alternate step by step, so that both see the same machine; medians over the steps after three
for warming up (one with a real model). "rollout" is sampling and verifying, "update" is the rest of the step:
loss, backward pass, clipping, AdamW.

The roofline is the time that the step's multiplications and additions would take at the speed of a large
matrix product, in the type and by the library that ours computes with, on the same threads: 2 N FLOPs per
token read in sampling and 6 N per token of the update, N the parameters (the tied embedding multiplies as the
head), prompts counted once a group.  What lies above it is overhead: at a tiny model nearly everything.
"""

import argparse
import copy
import functools
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from grpo import fast_products  # noqa: E402
from interventions import build  # noqa: E402
from rollout import (  # noqa: E402
    TinyModel,
    WarmStart,
    chain_task,
    load_model,
    task_of_data,
    tiny_tokenizer,
    warm_policy,
)
from train import Settings, make_run, set_threads, train  # noqa: E402

WARM_UP, WARM_UP_REAL = 3, 1  # steps that are not counted; a real model's take a minute
TINY, SMALL = "tiny", "small"


@functools.cache
def world(name):
    """Model, tokenizer, task, and the settings of a step."""
    if name in (TINY, SMALL):
        settings = Settings(prompts=32, group_size=16)
        if name == TINY:  # the embedded policy after its warm start
            return *warm_policy(WarmStart()), chain_task(), settings
        tokenizer = tiny_tokenizer()  # random weights: speed does not depend on them
        return TinyModel(384, 1024, 6, 6).build(tokenizer, 0).eval(), tokenizer, chain_task(), settings
    model, tokenizer = load_model(name)
    task, _ = task_of_data(tokenizer, "arithmetic", "", 24, "", True, 1024, 20)
    settings = Settings(prompts=8, group_size=8, lr=1e-6, model=name)  # the small rate keeps the lengths
    return model, tokenizer, task, settings


def trl_trainer(name, steps, callback, tuned):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer, task, settings = world(name)
    by_prompt = {p.prompt: p for p in task.train}

    def reward(prompts, completions, **_):
        return [float(x) for x in task.verify(completions, [by_prompt[p] for p in prompts])]

    config = GRPOConfig(
        output_dir="/tmp/bench_trl", max_steps=steps, num_generations=settings.group_size,
        per_device_train_batch_size=settings.prompts * settings.group_size, gradient_accumulation_steps=1,
        max_completion_length=task.max_new_tokens, learning_rate=settings.lr, temperature=1.0, use_cpu=True,
        lr_scheduler_type="constant", report_to="none", save_strategy="no", logging_steps=10**6,
        disable_tqdm=True, adam_beta2=0.95, seed=0,
        **({"bf16": False, "gradient_checkpointing": False} if tuned else {}),
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": p.prompt} for p in task.train])
    return GRPOTrainer(
        copy.deepcopy(model), reward, config, data, processing_class=tokenizer, callbacks=[callback]
    )


def our_steps(name, **changes):
    """The rows of plain GRPO's steps, one at a time, on a copy of the model, without any evaluation."""
    model, tokenizer, task, settings = world(name)
    settings = replace(settings, eval_every=10**6, **changes)
    run = make_run(settings, build("grpo"), Path(tempfile.mkdtemp()), task, copy.deepcopy(model), tokenizer)
    run.rows = [{"step": 0}]  # as if the first policy had been evaluated
    return train(run)


def measure(name, steps, tuned, dtype):
    """{who: {phase: [seconds]}} and the mean number of tokens that a step trains on."""
    from transformers import TrainerCallback

    settings, rows = world(name)[3], our_steps(name, ledger="off", dtype=dtype)
    times = {who: {"rollout": [], "update": [], "step": []} for who in ("trl", "ours")}
    tokens, alike = [], []

    class Alternate(TrainerCallback):
        begin = 0.0

        def on_step_begin(self, *_, **__):
            self.begin = time.perf_counter()

        def on_step_end(self, *_, **__):
            times["trl"]["step"].append(time.perf_counter() - self.begin)
            begin = time.perf_counter()
            with fast_products():  # as the command has it; TRL's steps are as TRL makes them
                row = next(rows)
            times["ours"]["step"].append(time.perf_counter() - begin)
            times["ours"]["rollout"].append(row["seconds_rollout"])
            tokens.append(row["tokens"])
            alike.append(row["no_contrast"])

    warm_up = WARM_UP_REAL if settings.model else WARM_UP
    trainer = trl_trainer(name, steps + warm_up, Alternate(), tuned)
    generate = trainer._generate_and_score_completions

    def timed(*args, **kwargs):
        begin = time.perf_counter()
        out = generate(*args, **kwargs)
        times["trl"]["rollout"].append(time.perf_counter() - begin)
        return out

    trainer._generate_and_score_completions = timed
    trainer.train()
    for t in times.values():
        t["update"] = [a - b for a, b in zip(t["step"], t["rollout"])]
    times = {who: {k: v[-steps:] for k, v in t.items()} for who, t in times.items()}
    return times, statistics.mean(tokens[-steps:]), statistics.mean(alike[-steps:])


def peak_flops(dtype):
    """Of a large matrix product on these threads."""
    a, best = torch.randn(2048, 2048, dtype=dtype), 0.0
    for _ in range(8):
        begin = time.perf_counter()
        a @ a
        best = max(best, 2 * 2048**3 / (time.perf_counter() - begin))
    return best


def roofline(name, tokens, peak):
    """Seconds of (rollout, update) if nothing but the products of the step took time."""
    model, tokenizer, task, settings = world(name)
    n = sum(p.numel() for p in model.parameters())  # the tied embedding is the head, which multiplies
    prompt = statistics.mean(len(tokenizer.encode(p.prompt)) for p in task.train)
    read = n * (settings.prompts * prompt + tokens)
    return 2 * read / peak, 6 * read / peak


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=(TINY, SMALL), help="tiny, small, or a real model")
    p.add_argument("--steps", type=int, nargs="+", default=(60, 15), help="steps at each model")
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    set_threads(args.threads)
    import transformers
    import trl

    mkl = peak_flops(torch.float32)
    with fast_products():
        peak = {dtype: peak_flops(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    speeds = ", ".join(f"{v / 1e9:.0f} GFLOP/s in {k}" for k, v in peak.items())
    speeds += f" ({mkl / 1e9:.0f} in float32 for TRL, without `grpo.fast_products`)"
    names, steps = (" ".join(map(str, x)) for x in ([Path(x).name for x in args.models], args.steps))
    call = f"python results/bench_trl.py --models {names} --steps {steps} --threads {args.threads}"
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    lines = [f"{libraries}, {args.threads} threads; {call}; a large matrix product: {speeds}"]
    ways = {
        "TRL as it comes": (False, "float32"),
        "TRL as it comes, ours in bfloat16 too": (False, "bfloat16"),
        "TRL tuned": (True, "float32"),
    }
    for (name, steps), way in itertools.product(zip(args.models, args.steps), ways):
        if world(name)[3].model and way != "TRL tuned":
            continue
        times, tokens, alike = measure(name, steps, *ways[way])
        parameters = sum(x.numel() for x in world(name)[0].parameters())
        bound = roofline(name, tokens, peak[ways[way][1]])
        body = []
        for phase, limit in zip(("rollout", "update", "step"), (*bound, sum(bound))):
            trl_s, our_s = (statistics.median(times[who][phase]) for who in ("trl", "ours"))
            ratios = sorted(a / b for a, b in zip(times["trl"][phase], times["ours"][phase]))
            middle = (
                f"{trl_s / our_s:.2f} ({ratios[len(ratios) // 4]:.2f} to {ratios[3 * len(ratios) // 4]:.2f})"
            )
            cells = (f"{x * 1e3:.1f}" for x in (trl_s, our_s, limit))
            body.append([phase, *cells, middle, f"{limit / our_s:.0%}"])
        lines.append(
            f"\n{Path(name).name}, {way}: {parameters:,} parameters, {tokens:.0f} response tokens a step, "
            f"{alike:.0%} of groups without contrast, {steps} steps each"
        )
        head = ["", "TRL ms", "ours ms", "roofline ms", "TRL / ours (middle half)", "roofline / ours"]
        lines.append(pd.DataFrame(body, columns=head).to_string(index=False))
        print("\n".join(lines[-2:]), flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if list(args.models) == [TINY, SMALL]:
        (Path(__file__).parent / "bench_trl.txt").write_text(text)


if __name__ == "__main__":
    main()
