"""Time and peak memory of `head_token_stats`, chunked against plain, forward and backward.

    python results/bench_token_stats.py                      # the full size: 4,096 tokens x 151,936 x 896
    python results/bench_token_stats.py --tokens 512 --vocab 20000 --hidden 128      # a smoke test

Loss: the mean of logp over all tokens, no entropy graph, gradients to hidden states and head weight.
Every measurement runs in a process of its own; forms alternate, so that a busy neighbour slows both, and the
best time of `--repeats` counts. Extra memory is the peak resident size (VmHWM, reset before the call; on a
GPU the allocator's peak) minus the size with inputs in place; gradients are part of it in both. Targets:
at most 1/8 of the plain form's extra memory and 1.15 times its time. Linux only, for /proc.
"""

from __future__ import annotations

import multiprocessing
import platform
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from entropy_math import head_token_stats  # noqa: E402


@dataclass
class Bench:
    tokens: int = 4096
    vocab: int = 151_936
    hidden: int = 896
    threads: int = 1
    repeats: int = 2
    chunk: int = 2**22
    """logits in memory at once"""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    out: Path | None = None
    """also append the lines to this file"""


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    return int(re.search(rf"^{field}:\s*(\d+)", Path("/proc/self/status").read_text(), re.M)[1]) * 1024


def one_step(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, chunk: int | None) -> float:
    """Forward and backward; returns the loss so that nothing can be skipped."""
    hidden.grad = weight.grad = None
    loss = head_token_stats(hidden, weight, ids, chunk=chunk).logp.mean()
    loss.backward()
    return loss.item()


def measure(b: Bench, device: str, name: str, form: str) -> dict[str, float]:
    """Runs in the child process: seconds, extra MiB, loss and gradient norm of one form in one dtype."""
    torch.set_num_threads(b.threads)
    torch.manual_seed(0)
    dtype, chunk, cuda = getattr(torch, name), {"plain": None, "chunked": b.chunk}[form], device == "cuda"
    hidden = torch.randn(b.tokens, b.hidden, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(b.vocab, b.hidden, device=device) / b.hidden**0.5).to(dtype).requires_grad_()
    ids = torch.randint(0, b.vocab, (b.tokens,), device=device)
    small = [t.detach().clone().requires_grad_() for t in (hidden[:64], weight[:512])]
    one_step(*small, ids[:64] % 512, None)  # load the libraries before the clock starts
    if cuda:
        one_step(hidden, weight, ids, chunk)
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present size
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    start = time.perf_counter()
    loss = one_step(hidden, weight, ids, chunk)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    norm = float(weight.grad.float().norm())
    return {"seconds": seconds, "extra": (peak - before) / 2**20, "loss": loss, "norm": norm}


def compare(b: Bench, device: str, dtype: str) -> str:
    """One line: the best time and the most memory of both forms, and whether they agree."""
    runs = {"plain": [], "chunked": []}
    for _ in range(b.repeats):
        for form, found in runs.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                found.append(alone.submit(measure, b, device, dtype, form).result())
    p, c = (
        rs[0] | {"seconds": min(r["seconds"] for r in rs), "extra": max(r["extra"] for r in rs)}
        for rs in runs.values()
    )
    return (
        f"{device:4s} {dtype:8s}  time {p['seconds']:8.3f} s plain {c['seconds']:8.3f} s chunked, "
        f"ratio {c['seconds'] / p['seconds']:.2f}   extra memory {p['extra']:8.0f} MiB plain "
        f"{c['extra']:7.0f} MiB chunked, 1/{p['extra'] / c['extra']:.1f}   "
        f"loss {p['loss']:.5f} / {c['loss']:.5f}, |dW| {p['norm']:.4g} / {c['norm']:.4g}"
    )


def main() -> None:
    b = tyro.cli(Bench, description=__doc__)
    size = f"{b.tokens} tokens x {b.vocab} x {b.hidden}, chunk {b.chunk} logits"
    setting = f"{b.threads} CPU thread(s), best of {b.repeats}, torch {torch.__version__}"
    lines = [f"{size}; {setting}, {platform.machine()}"]
    print(lines[0], flush=True)
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for dtype in b.dtypes:
            lines.append(compare(b, device, dtype))
            print(lines[-1], flush=True)
    if b.out:
        with b.out.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
