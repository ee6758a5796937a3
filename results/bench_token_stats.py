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

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from entropy_math import head_token_stats  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    line = next(
        row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field + ":")
    )
    return int(line.split()[1]) * 1024


def one_step(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, chunk: int | None) -> float:
    """Forward and backward; returns the loss so that nothing can be skipped."""
    hidden.grad = weight.grad = None
    loss = head_token_stats(hidden, weight, ids, chunk=chunk).logp.mean()
    loss.backward()
    return loss.item()


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Runs in the child process: seconds, extra bytes, loss and gradient norm of one form in one dtype."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    hidden = torch.randn(args.tokens, args.hidden, device=device).to(dtype).requires_grad_()
    weight = (
        (torch.randn(args.vocab, args.hidden, device=device) / args.hidden**0.5).to(dtype).requires_grad_()
    )
    ids = torch.randint(0, args.vocab, (args.tokens,), device=device)
    chunk = {"plain": None, "chunked": args.chunk}[args.form]
    small = [t.detach().clone().requires_grad_() for t in (hidden[:64], weight[:512])]
    one_step(*small, ids[:64] % 512, None)  # load the libraries before the clock starts
    cuda = device.type == "cuda"
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
    return {
        "seconds": seconds,
        "extra": peak - before,
        "loss": loss,
        "grad": float(weight.grad.float().norm()),
    }


def child(args: argparse.Namespace, dtype: str, form: str, device: str) -> dict[str, float]:
    flags = ["--measure", "--dtype", dtype, "--form", form, "--device", device]
    for name in ("tokens", "vocab", "hidden", "threads", "chunk"):
        flags += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run([sys.executable, __file__, *flags], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace, dtype: str, device: str) -> str:
    runs = {form: [] for form in ("plain", "chunked")}
    for _ in range(args.repeats):
        for form in runs:
            runs[form].append(child(args, dtype, form, device))
    seconds = {form: min(r["seconds"] for r in rs) for form, rs in runs.items()}
    extra = {form: max(r["extra"] for r in rs) / 2**20 for form, rs in runs.items()}
    plain, chunked = runs["plain"][0], runs["chunked"][0]
    return (
        f"{device:4s} {dtype:8s}  time {seconds['plain']:8.3f} s plain {seconds['chunked']:8.3f} s chunked, "
        f"ratio {seconds['chunked'] / seconds['plain']:.2f}   extra memory {extra['plain']:8.0f} MiB plain "
        f"{extra['chunked']:7.0f} MiB chunked, 1/{extra['plain'] / extra['chunked']:.1f}   "
        f"loss {plain['loss']:.5f} / {chunked['loss']:.5f}, |dW| {plain['grad']:.4g} / {chunked['grad']:.4g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("tokens", 4096),
        ("vocab", 151_936),
        ("hidden", 896),
        ("threads", 1),
        ("repeats", 2),
        ("chunk", 2**22),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    for name in ("dtype", "form", "device"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    size = f"{args.tokens} tokens x {args.vocab} x {args.hidden}, chunk {args.chunk} logits"
    setting = f"{args.threads} CPU thread(s), best of {args.repeats}, torch {torch.__version__}"
    lines = [f"{size}; {setting}, {platform.machine()}"]
    print(lines[0], flush=True)
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for dtype in args.dtypes:
            lines.append(compare(args, dtype, device))
            print(lines[-1], flush=True)
    if args.out:
        with args.out.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
