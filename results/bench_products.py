"""What `grpo.fast_products` gains: float32 products by oneDNN instead of MKL, on the processor at hand.

    python results/bench_products.py                  products, and steps of the embedded world
    python results/bench_products.py --model SmolLM2-135M-Instruct.Q4_1.gguf --threads 2
                                                      a model's steps, as in results/bench_trl.py

It is measured on any processor, also where a command would not use it.  Steps alternate between the two
libraries in one run; every third has a ledger entry.  Medians; the first two steps are left out.
"""

from __future__ import annotations

import argparse
import sys
import time
import timeit
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench_trl import TINY, our_steps  # noqa: E402

from eval import set_threads  # noqa: E402
from grpo import fast_products, mkl_is_slow  # noqa: E402

SHAPES = ((2048, 2048, 2048), (64, 576, 1536), (64, 576, 49152), (1344, 576, 1536))  # rows, in, out


def products() -> pd.DataFrame:
    """GFLOP/s of x Wᵀ, as a layer multiplies, and of the two products of its backward pass."""
    rows = []
    for n, k, m in SHAPES:
        x, weight, grad = torch.randn(n, k), torch.randn(m, k), torch.randn(n, m)
        calls = {"x Wᵀ": lambda: x @ weight.t(), "g W": lambda: grad @ weight, "gᵀ x": lambda: grad.t() @ x}  # noqa: B023
        for name, call in calls.items():
            row = {"product": f"{name} of ({n}, {k}), ({m}, {k})"}
            for library, on in (("MKL", False), ("oneDNN", True)):
                with fast_products(on):
                    row[library] = 2e-9 * n * k * m / min(timeit.repeat(call, number=1, repeat=6)[1:])
            rows.append(row | {"ratio": row["oneDNN"] / row["MKL"]})
    return pd.DataFrame(rows)


def steps(name: str, count: int) -> pd.DataFrame:
    """Seconds of steps of plain GRPO, by library and by whether the ledger books them."""
    found, rows = [], our_steps(name, ledger_every=3)
    for i in range(count):
        with fast_products(bool(i % 2)):
            begin = time.perf_counter()
            row = next(rows)
        seconds = {"seconds": time.perf_counter() - begin, "sampling": row["seconds_rollout"]}
        found.append({"products by": "oneDNN" if i % 2 else "MKL", "booked": i % 3 == 0, **seconds})
    return pd.DataFrame(found[2:]).groupby(["booked", "products by"]).agg(["median", "min", "max", "count"])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=TINY, help="hub id, folder, GGUF file; without, the embedded policy")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--steps", type=int, default=0, help="0: 60 of the embedded world, 20 of a model")
    o = p.parse_args()
    set_threads(o.threads)
    processor = f"{torch.backends.cpu.get_cpu_capability()}, MKL slow: {mkl_is_slow()}"
    print(f"torch {torch.__version__}, {o.threads} threads, {processor}, {Path(o.model).name}, GFLOP/s\n")
    print(products().to_string(index=False, float_format="%.2f"), "\n")
    count = o.steps or (60 if o.model == TINY else 20)
    print(f"{count} steps\n{steps(o.model, count).to_string(float_format='%.3f')}")


if __name__ == "__main__":
    main()
