"""One GRPO step on a CPU: `trl.GRPOTrainer`, what a user would pick instead, against `train.py`.

    python results/bench_trl.py            needs the extra `trl`; writes results/bench_trl.txt

Both trainers take the same steps: 32 chain problems x 16 responses of at most 11 tokens at temperature 1,
plain GRPO, strictly on-policy, AdamW, gradient clipping, the same verifier, the same kind of model with
the same start weights, two threads.  TRL runs as a user gets it (bfloat16 autocast and gradient checkpointing
are its defaults) against ours as a user gets it (float32) and against ours with --dtype bfloat16, and tuned
(both off, float32 like ours).  It never logs, saves or evaluates.
The two trainers alternate step by step, so that both see the same machine; medians over the steps after
three for warming up.  "rollout" is sampling and verifying, "update" is the rest of the step: loss, backward
pass, clipping, AdamW.

The roofline is the time that the step's multiplications and additions would take at the speed of a large
matrix product, in the type that ours computes with, on the same threads: 2 N FLOPs per token read in sampling
and 6 N per token of the update, N the parameters (the tied embedding multiplies as the head), prompts counted
once a group.  What lies above it is overhead: at a tiny model nearly everything.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from interventions import build  # noqa: E402
from rollout import TinyModel, WarmStart, chain_task, tiny_tokenizer, warm_policy  # noqa: E402
from train import Settings, make_run, set_threads, train  # noqa: E402

PROMPTS, GROUP, WARM_UP = 32, 16, 3
MODELS = {
    "tiny": TinyModel(),  # the embedded policy after its warm start
    "small": TinyModel(384, 1024, 6, 6),  # random weights: speed does not depend on them
}


def policy(name):
    if name == "tiny":
        return warm_policy(WarmStart())
    tokenizer = tiny_tokenizer()
    return MODELS[name].build(tokenizer, 0).eval(), tokenizer


def trl_trainer(name, task, steps, callback, tuned):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = policy(name)
    by_prompt = {p.prompt: p for p in task.train}

    def reward(prompts, completions, **_):
        return [float(x) for x in task.verify(completions, [by_prompt[p] for p in prompts])]

    config = GRPOConfig(
        output_dir="/tmp/bench_trl", max_steps=steps, per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP, gradient_accumulation_steps=1, max_completion_length=task.max_new_tokens,
        learning_rate=3e-4, lr_scheduler_type="constant", temperature=1.0, use_cpu=True, report_to="none",
        save_strategy="no", logging_steps=10**6, disable_tqdm=True, adam_beta2=0.95, seed=0,
        **({"bf16": False, "gradient_checkpointing": False} if tuned else {}),
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": p.prompt} for p in task.train])
    return GRPOTrainer(model, reward, config, data, processing_class=tokenizer, callbacks=[callback])


def measure(name, steps, tuned, dtype):
    """{who: {phase: [seconds]}} and the mean number of tokens that a step trains on."""
    from transformers import TrainerCallback

    task = chain_task()
    model, tokenizer = policy(name)
    settings = Settings(prompts=PROMPTS, group_size=GROUP, ledger="off", eval_every=10**6, dtype=dtype)
    ours = make_run(settings, build("grpo"), Path(tempfile.mkdtemp()), task, model, tokenizer)
    ours.rows = [{"step": 0}]  # no evaluation of the first policy
    rows = train(ours)
    times = {who: {"rollout": [], "update": [], "step": []} for who in ("trl", "ours")}
    tokens = []

    class Alternate(TrainerCallback):
        begin = 0.0

        def on_step_begin(self, *_, **__):
            self.begin = time.perf_counter()

        def on_step_end(self, *_, **__):
            times["trl"]["step"].append(time.perf_counter() - self.begin)
            begin = time.perf_counter()
            row = next(rows)
            times["ours"]["step"].append(time.perf_counter() - begin)
            times["ours"]["rollout"].append(row["seconds_rollout"])
            tokens.append(row["tokens"])

    trainer = trl_trainer(name, task, steps, Alternate(), tuned)
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
    return {who: {k: v[WARM_UP:] for k, v in t.items()} for who, t in times.items()}, statistics.mean(tokens)


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
    model, _ = policy(name)
    n = sum(p.numel() for p in model.parameters())  # the tied embedding is the head, which multiplies
    read = n * (PROMPTS * 6 + tokens)  # a prompt has 6 tokens
    return 2 * read / peak, 6 * read / peak


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, nargs=2, default=(60, 15), help="steps at the tiny and small model")
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    set_threads(args.threads)
    import transformers
    import trl

    peak = {dtype: peak_flops(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    speeds = ", ".join(f"{v / 1e9:.0f} GFLOP/s in {k}" for k, v in peak.items())
    lines = [f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}, "
             f"{args.threads} threads; python results/bench_trl.py --steps {args.steps[0]} {args.steps[1]} "
             f"--threads {args.threads}; a large matrix product: {speeds}"]  # fmt: skip
    ways = {
        "TRL as it comes": (False, "float32"),
        "TRL as it comes, ours in bfloat16 too": (False, "bfloat16"),
        "TRL tuned": (True, "float32"),
    }
    for (name, steps), way in itertools.product(zip(MODELS, args.steps), ways):
        times, tokens = measure(name, steps + WARM_UP, *ways[way])
        parameters = sum(x.numel() for x in policy(name)[0].parameters())
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
            f"\n{name}, {way}: {parameters:,} parameters, {tokens:.0f} "
            f"response tokens a step, {steps} steps each"
        )
        head = ["", "TRL ms", "ours ms", "roofline ms", "TRL / ours (middle half)", "roofline / ours"]
        lines.append(pd.DataFrame(body, columns=head).to_string(index=False))
        print("\n".join(lines[-2:]), flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    (Path(__file__).parent / "bench_trl.txt").write_text(text)


if __name__ == "__main__":
    main()
