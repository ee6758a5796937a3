"""How hard the tasks made in code are for a model before any training: pass@1 and pass@16 by range.

    python results/made_tasks.py SmolLM2-135M-Instruct.Q4_1.gguf > results/made_tasks.txt

A task is of use for a study of entropy where pass@1 lies between .05 and .3 and pass@16 above .4: most groups
then hold right and wrong answers.  48 held-out problems, 16 samples each, 20 tokens at most, temperature 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import eval
import rollout

TASKS = ("arithmetic:10", "arithmetic:20", "arithmetic:30", "pairs:15", "pairs:20", "pairs:30")


def main(name: str) -> None:
    torch.set_num_threads(1)
    model, tokenizer = rollout.load_model(name)
    engine = rollout.TorchEngine(model, tokenizer)
    print(f"{'task':14} problems  pass@1  pass@16  distinct right  entropy, nats  length")
    for data in TASKS:
        task, _ = rollout.task_of_data(tokenizer, data, "", 48, "", True, 1024, 20)
        r = eval.evaluate(engine, task, 16)
        numbers = f"{r['pass@1']:7.3f} {r['pass@k']:8.2f} {r['distinct_correct']:15.1f}"
        count = len(task.train) + len(task.test)
        print(f"{data:14} {count:8} {numbers} {r['eval_entropy']:14.2f} {r['eval_length']:7.1f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
