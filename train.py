"""Chapter 5. Training: the loop, the entropy ledger, and the picture at the end.

    python train.py --method opefo              the first command: a warm start, 300 steps, a picture
    python train.py --method grpo opefo steer   several methods from one warm start, drawn together
    python train.py --method grpo grpo:lr=1e-4 opefo:form=paper clip_cov:ratio=.02 --seed 1
    python train.py --method steer:help         the options of one method
    python train.py --resume runs/opefo-s0      go on after Ctrl-C or a crash, with the same numbers

Claim. One GRPO step draws n responses to each of P prompts, verifies them, and pushes the tokens of the good
ones up and of the bad ones down.  Repeated, it makes the policy better and more certain; the second ends the
progress.

The entropy ledger books that certainty like money.  With H̄(θ) the mean entropy over the tokens of the update
batch, at the sampling temperature, and θ, θ' the parameters before and after the step:

    dH_measured  = H̄(θ') - H̄(θ)              on the same states, float32 logits, float64 sums          (5.1)
    dH_predicted = <∇H̄(θ), θ' - θ>   the first-order effect of the step really taken, momentum included (5.2)
    flow_up      = Σ_t max(f_t, 0),  flow_down = Σ_t max(-f_t, 0),  f_t = F_t T_t                        (5.3)

(5.2) is entropy_math (5.1); (5.3) is the flow as if the policy were a table, not the network's of
entropy_math (5.3).  F_t = -∂loss/∂log π(y_t) is the force on token t (weights, clip and aggregation inside),
T_t its exact score on a table, entropy_math (2.2).  (5.1) and (5.2) are in nats, (5.3) in nats per unit of
learning rate on a tabular policy: signs and balance can be compared, sizes cannot.

Every random draw comes from a generator seeded by a hash of (seed, step, purpose): a resumed run repeats the
numbers of one never stopped, and methods with one seed see the same prompts in the same order.

    1  the loop                         4  a run and its files    7  what a run needs: task, policy, engine
    2  a step's parts, in order of use  5  several processes      8  the command line: from words to runs
    3  the entropy ledger               6  settings: flags

Left out, compared with a production trainer: a critic, learning-rate schedules, weight decay, sampling ahead
of the update, packed rows, and tensor, pipeline or context parallelism in training.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import timeit
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

if __name__ == "__main__":  # Ctrl-C in the seconds that the imports below take
    said = b"stopped; nothing was written yet\n"
    signal.signal(signal.SIGINT, lambda *_: os.write(2, said) and os._exit(130))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import grpo
import interventions
import rollout
from entropy_math import adam_preconditioner, entropy_directional_change, network_flow
from eval import command_line, draw, evaluate, fingerprint, read_jsonl, set_threads, table, token_names
from grpo import Method, Policy, Progress, Tokens, batch_loss, concat_padded, plan_update, token_flow
from rollout import Engine, Problem, Sampling, Task, TorchEngine, answer


class UserError(Exception):
    """A mistake that the user can mend: printed in one or two lines, exit code 2, no traceback."""


@contextlib.contextmanager
def user_error(before: str = "", after: str = "", kinds: tuple = (ValueError,)) -> Iterator[None]:
    """An error as a UserError: where it was, what it says, what to do about it."""
    try:
        yield
    except kinds as error:
        text = " ".join(str(error).split()) or type(error).__name__
        text = text[:400] if after else text  # else our remedy may stand at its end
        raise UserError(f"{before} {text}{after}".strip()) from None


# ------------------------------------------------------------------------------------------------------------
# 1. The loop


def train(run: Run) -> Iterator[dict[str, Any]]:
    """Evaluate the first policy, then step until the last one; yields each row of metrics.jsonl, already on
    disk.  Whoever iterates may stop after any row and call `run.save()`.  Raises FloatingPointError where the
    policy gives NaN, and after ten updates in a row that were not finite."""
    s, method = run.settings, run.method
    push_weights(run)
    if run.step == 0 and not run.rows:
        yield run.log({"step": 0, **evaluation(run)}, due=True)
    while run.step < s.steps:
        begin = time.perf_counter()
        how = (run.task.max_new_tokens, s.temperature, tuple(run.engine.stops))
        method.progress = Progress(run.step, s.steps, s.seed, *how)
        # 1. Prompts -> responses -> rewards.  A method with `refill` (dynamic sampling) draws again.
        tokens, row = draw_responses(run)
        row["seconds_rollout"] = time.perf_counter() - begin
        run.engine.sleep()
        # 2. Open the ledger: H̄(θ) and ∇H̄(θ) on the states of these responses, (5.1) and (5.2).
        booked = s.ledger != "off" and run.step % s.ledger_every == 0 and row["tokens"] > 0
        ledger = Ledger.open(run, tokens, one_graph(run)) if booked else None
        # 3. What the method needs beyond the policy: π_old of the ratio, grpo (2.5); a reference; a proxy.
        supply(run, tokens)
        # 4. Updates: statistics of the whole batch -> plan -> loss -> gradient, by micro-batches -> a step.
        history, skipped = [], 0
        for i, batch in enumerate(update_batches(run, tokens)):
            if skipped == i:  # still the policy that sampled: r is 1, not another pass's rounding
                batch.old_logp = None
            run.optimizer.zero_grad(set_to_none=True)
            update = Update(run, batch, ledger)  # scored and planned
            loss, metrics = batch_loss(update.tokens, update.own, method)  # grpo section 7
            update.backward(loss)  # leaves force F_t and flow f_t, (5.3)
            history.append(update.numbers(loss, metrics))
            if step_if_finite(run, history[-1]):
                method.after_step(update.plan)
                row |= book_tokens(run, ledger, update) if ledger and s.ledger == "full" else {}
            else:
                skipped += 1
        row |= {"skipped": skipped, **over_updates(history)}
        # 5. Close the ledger, hand the weights over, evaluate and save if it is time.
        row |= ledger.close() if ledger else {}
        row["seconds_push"] = push_weights(run)
        row["seconds"] = time.perf_counter() - begin
        run.step += 1
        due = run.step % s.eval_every == 0 or run.step == s.steps
        row |= evaluation(run) if due else {}
        maybe_reset_reference(run, row.get("pass@1"))
        yield run.log(row, due)
        if run.skipped_in_row >= 10:
            run.save()
            raise FloatingPointError("ten updates in a row had a non-finite loss or gradient")


# ------------------------------------------------------------------------------------------------------------
# 2. A step's parts, in the order of use

MAX_DRAWS = 10  # rollouts that dynamic sampling may draw for one update; the recipe's max_num_gen_batches


def seeded(seed: int, step: int, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on its arguments only."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))


def prompts_at(problems: tuple[Problem, ...], seed: int, used: int, count: int) -> list[Problem]:
    """`count` problems after the first `used`, in an endless sequence of seeded shuffles of all problems."""
    out = []
    while len(out) < count:
        epoch, offset = divmod(used + len(out), len(problems))
        order = torch.randperm(len(problems), generator=seeded(seed, epoch, "order")).tolist()
        out += [problems[i] for i in order[offset : offset + count - len(out)]]
    return out


def draw_responses(run: Run) -> tuple[Tokens, dict[str, Any]]:
    """Rewarded responses to this rank's share of the next prompts, and the first numbers of a row."""
    s, r, method, limit = run.settings, run.ranks, run.method, run.task.max_new_tokens
    purpose = "" if r.world == 1 else f"/{r.rank}"
    generator = seeded(s.seed, run.step, f"sample{purpose}", run.engine.device)
    hook = method.sample if method.overrides("sample") else None
    share, how = s.prompts // r.world, Sampling(s.group_size, limit, s.temperature, hook=hook)
    parts, right = [], []
    for attempt in range(MAX_DRAWS):
        problems = prompts_at(run.task.train, s.seed, run.prompts_used, s.prompts)
        run.prompts_used += len(problems)
        asked = problems[r.rank * share :][:share]
        out, texts = answer(run.engine, run.task, asked, how, generator)
        if "outcome" in method.needs:
            out.outcome = rollout.outcomes(run.task, asked, texts).to(out.ids.device)
        chance = seeded(s.seed, run.step, f"reward/{attempt}{purpose}")
        out.reward = grpo.REWARDS[s.reward](out.correct, out.lengths, limit, chance)
        out.group = out.group + (r.rank * MAX_DRAWS + attempt) * share
        right.append(out.correct)
        if s.reward in grpo.SPURIOUS:
            out.correct = out.reward > 0  # a method must not know better than the reward
        parts.append(out)
        tokens = concat_padded(parts, run.tokenizer.pad_token_id)
        if not method.refill:
            break
        groups = tokens.group[method.select(tokens)].unique()[:share]
        found = r.all(len(groups))
        if min(found) == share:
            break
    row = {"step": run.step + 1, **averages(run, tokens), "draws": len(parts)}
    if s.reward != "correct":
        row["correct"] = r.sum(int(torch.cat(right).sum())) / r.sum(len(tokens.reward))
    if method.refill:
        if not len(groups) and any(found):  # take part in the step with rows that `select` masks out
            groups = tokens.group[:1]
        tokens = tokens.rows(torch.isin(tokens.group, groups))
        row |= {f"kept_{name}": x for name, x in averages(run, tokens).items()}
    return tokens, row | {"tokens": int(r.sum(int(tokens.mask.sum())))}


def averages(run: Run, tokens: Tokens) -> dict[str, float]:
    """Over the responses of all ranks; `no_contrast`: the share of those whose group teaches nothing."""
    n = max(run.ranks.sum(len(tokens.reward)), 1)
    each = {"reward": tokens.reward, "length": tokens.mask, "truncated": tokens.truncated}
    each["no_contrast"] = grpo.without_contrast(tokens.reward, tokens.group)
    return {name: run.ranks.sum(float(x.sum(dtype=torch.float64))) / n for name, x in each.items()}


class Passes:
    """The rows of each forward pass of a batch: slices of `micro_batch` rows, or indices of responses of like
    length, padded together within `tokens_per_micro_batch` tokens."""

    def __init__(self, run: Run, tokens: Tokens) -> None:
        s, self.ranks, rows = run.settings, run.ranks, len(tokens.ids)
        self.rows: list[Any] = []
        if s.tokens_per_micro_batch and not s.micro_batch:
            length = (tokens.start + 1 + tokens.lengths).cpu()
            order = length.argsort(descending=True, stable=True)  # what does not fit in memory fails at once
            while len(order):
                size = max(1, s.tokens_per_micro_batch // int(length[order[0]]))  # a longer one goes alone
                self.rows.append(order[:size].to(tokens.ids.device))
                order = order[size:]
        if len(self.rows) <= 1:
            size = s.micro_batch or max(rows, 1)
            self.rows = [slice(i, min(i + size, rows)) for i in range(0, rows, size)]

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        """This rank's passes, then its first row again, marked False, until all ranks have had as many, for
        they gather sharded weights together."""
        for i in range(self.ranks.max(len(self.rows))):
            yield (self.rows[i], True) if i < len(self.rows) else (slice(0, 1), False)

    def join(self, parts: list[Tensor]) -> Tensor:
        """What the passes gave, in the order of the batch."""
        if len(parts) == 1:
            return parts[0]
        out = parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]))
        for rows, part in zip(self.rows, parts):
            out[rows] = part
        return out


@torch.no_grad()
def score_batch(run: Run, tokens: Tokens, policy: Policy | None = None, **what: Any) -> dict[str, Tensor]:
    """What `Policy.forward` returns, without gradient; of the run's policy if no other is given."""
    passes, policy = Passes(run, tokens), policy or run.policy
    found = [policy(tokens.rows(rows), run.settings.temperature, **what) for rows, _ in passes]
    parts = found[: len(passes.rows)]  # this rank's own
    return {key: passes.join([p[key] for p in parts]) for key in parts[0]} if parts else {}


def supply(run: Run, tokens: Tokens) -> None:
    """Fill in, (B, T) each, π_old of the ratio, grpo (2.5); the reference, with LoRA the model without its
    adapters; Lp-Reg's filtered proxy, interventions (3.28); RLRT's teacher, (3.41)."""
    if not len(tokens.ids):  # then no rank has any
        return
    if run.settings.updates_per_rollout > 1:
        tokens.old_logp = score_batch(run, tokens)["logp"]
    if "ref_logp" in run.method.needs:
        with run.policy.model.disable_adapter() if run.settings.lora else contextlib.nullcontext():
            tokens.ref_logp = score_batch(run, tokens, run.reference)["logp"]
    if "proxy_logp" in run.method.needs:
        threshold = next(m.threshold for m in members(run.method) if "proxy_logp" in m.needs)
        filtered = partial(interventions.proxy_log_prob, threshold=threshold)
        tokens.proxy_logp = score_batch(run, tokens, of_logits=filtered)["of_logits"]
    if "teacher_logp" in run.method.needs:
        tokens.teacher_logp = teacher_logp(run, tokens)


def teacher_logp(run: Run, tokens: Tokens) -> Tensor:
    """(B, T): log π(y_t) of the right responses behind the prompt of `interventions.asked_again`, of the very
    weights that sampled; -inf in all other rows."""
    room = getattr(run.policy.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    chance = seeded(run.settings.seed, run.step, f"teacher/{run.ranks.rank}")
    rows, asked = interventions.asked_again(tokens, chance, room)
    out = torch.full(tokens.mask.shape, -math.inf, device=tokens.ids.device)
    if run.ranks.max(len(rows)):  # ranks score together; one without such rows scores its first, for nothing
        found = score_batch(run, asked if len(rows) else tokens.rows(slice(0, 1)))["logp"]
        out = out.to(found.dtype).index_copy(0, rows, found[: len(rows)])
    return out


def members(method: Method) -> list[Method]:
    """The methods of a composition, or the one."""
    return getattr(method, "members", [method])


def update_batches(run: Run, tokens: Tokens) -> list[Tokens]:
    """The update batches of one rollout, whole groups each, of which every rank has some; none where no rank
    has a response."""
    groups = tokens.group.unique()
    n = min(run.settings.updates_per_rollout, *run.ranks.all(len(groups)))
    return [tokens.rows(torch.isin(tokens.group, g)) for g in groups.tensor_split(n)] if n else []


class Update:
    """One update: its tokens, scored, its plan, and what the backward pass leaves: force and flow (B, T).

    All at once, the scores carry the network's graph.  In micro-batches they are leaves: a pass without
    gradient over the batch of all ranks gives them, the loss of the whole batch has its slopes in them, and a
    second pass takes these into the weights, slice by slice.  So the gradient does not depend on slicing, and
    a response without a slope, such as one of a group without a contrast, has no second pass.
    """

    def __init__(self, run: Run, batch: Tokens, ledger: Ledger | None = None) -> None:
        self.run, self.batch, method = run, batch, run.method
        self.ledger = ledger if ledger and ledger.shared else None
        self.whole = run.ranks.world == 1 and len(Passes(run, batch).rows) == 1
        if self.whole:
            found = self._score()
        else:
            found = score_batch(run, batch, topk=method.topk)
            for key in {"logp", "topk_logp", "entropy" * method.entropy_grad} & found.keys():
                found[key].requires_grad_()
        self.tokens = replace(batch, **found)
        stats, first = run.ranks.gather(replace(self.tokens, full_ids=None, start=None))
        self.plan = plan_update(stats, method)  # of all ranks
        self.plan.metrics |= mismatch(stats, run.settings)[1]
        self.own = self.plan.rows(slice(first, first + len(batch.ids)))  # this rank's rows of it
        self.tokens.mismatch = mismatch(self.tokens, run.settings)[0]
        self.tokens.logp.retain_grad()

    def _policy(self, tokens: Tokens) -> dict[str, Tensor]:
        """`Policy.forward` with its graph, the entropy's too where method or ledger differentiate it."""
        s, method, policy = self.run.settings, self.run.method, self.run.policy
        policy.train(s.gradient_checkpointing)  # transformers recomputes in train mode only; dropout is 0
        return policy(tokens, s.temperature, method.entropy_grad or self.ledger is not None, topk=method.topk)

    def _book(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Into a ledger that shares the graph, before the loss's backward pass."""
        if self.ledger:
            self.ledger.add(found["entropy"], retain_graph=True)
            if not self.run.method.entropy_grad:
                found["entropy"] = found["entropy"].detach()
        return found

    def _score(self) -> dict[str, Tensor]:
        """The whole batch with its graph.  Groups without a contrast, if they are many, get a graph of their
        own: their advantages are 0, so without a penalty they need no backward pass."""
        part = self.batch
        alike = grpo.without_contrast(part.reward, part.group)
        split = weights_are_split(self.run) or self.run.method.overrides("penalty")
        if split or not 0.25 <= float(alike.float().mean()) < 1:
            return self._book(self._policy(part))
        kinds = [alike.logical_not().nonzero()[:, 0], alike.nonzero()[:, 0]]
        teach, rest = (self._policy(part.rows(rows)) for rows in kinds)
        back = torch.cat(kinds).argsort()
        return self._book({k: torch.cat([x, UnlessZero.apply(rest[k])])[back] for k, x in teach.items()})

    def backward(self, loss: Tensor) -> None:
        """The gradient of the loss in the weights, where scores are leaves by way of them."""
        run, scored = self.run, self.tokens
        (loss * run.ranks.world).backward()  # FSDP averages over ranks; the shares of a loss add up
        if not self.whole:
            slopes = {k: x.grad for k, x in vars(scored).items() if x is not None and x.grad is not None}
            moves = torch.stack([x.flatten(1).any(1) for x in slopes.values()]).any(0)
            moves[0] = True  # a gradient of 0 lets momentum go on, None does not
            rows = (moves | (self.ledger is not None)).nonzero()[:, 0]
            for part, own in Passes(run, self.batch.rows(rows)):
                at = rows[part] if own else part
                found = self._book(self._policy(self.batch.rows(at)))
                torch.autograd.backward([found[k] for k in slopes], [x[at] * own for x in slopes.values()])
        run.policy.eval()
        slope = scored.logp.grad
        self.force = torch.zeros_like(scored.logp) if slope is None else -slope / run.ranks.world  # F_t
        self.flow = token_flow(scored, self.force)  # (5.3)

    def numbers(self, loss: Tensor, metrics: dict[str, float]) -> dict[str, float]:
        """All numbers of the update, of all ranks together."""
        up, down = up_and_down(self.flow)
        own = {"loss": float(loss.detach()), **metrics, "flow_up": up, "flow_down": down}
        return self.plan.metrics | {key: self.run.ranks.sum(value) for key, value in own.items()}


class UnlessZero(torch.autograd.Function):
    """The identity.  A gradient that is 0 everywhere ends here: what lies before has no backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return grad if grad is not None and bool(grad.any()) else None


def up_and_down(flow: Tensor) -> tuple[float, float]:
    """The sum of what raises entropy, and of what lowers it, both positive."""
    return float(flow.clamp(min=0).sum()), float(-flow.clamp(max=0).sum())


def mismatch(tk: Tokens, s: Settings) -> tuple[Tensor | None, dict[str, float]]:
    """Weights (B, T) against the engine's own probabilities, grpo (2.18) or (2.19), and with ρ = π_old /
    π_engine, grpo (2.17): mean and largest |log ρ|; the share of an ideal sample that is left, ESS =
    (Σρ)² / (n Σρ²); k3 of KL(π_engine || π_old)."""
    if s.mismatch in ("off", "auto"):
        return None, {}
    old = tk.logp_before
    weight = grpo.mismatch_weight(old, tk.rollout_logp, s.mismatch, s.mismatch_low, s.mismatch_high)
    weight = torch.where(tk.mask, weight, 0)
    if not bool(tk.mask.any()):
        return weight, {}
    log_rho = (old - tk.rollout_logp)[tk.mask].double().clamp(-20, 20)
    rho = log_rho.exp()
    return weight, {
        "mismatch_mean": float(log_rho.abs().mean()),
        "mismatch_max": float(log_rho.abs().max()),
        "mismatch_ess": float(rho.sum() ** 2 / (len(rho) * rho.square().sum())),
        "mismatch_k3": float((rho - 1 - log_rho).mean()),
    }


def step_if_finite(run: Run, numbers: dict[str, float]) -> bool:
    """Clip the gradient and take the optimizer's step, unless loss or gradient are not finite."""
    norm = nn.utils.clip_grad_norm_(trained(run.policy), run.settings.grad_clip or math.inf)
    numbers["grad_norm"] = float(full_tensor(norm))
    if not (math.isfinite(numbers["grad_norm"]) and math.isfinite(numbers["loss"])):
        run.skipped_in_row += 1
        return False
    run.optimizer.step()
    run.skipped_in_row = 0
    return True


def trained(policy: Policy) -> list[Tensor]:
    """The parameters that training moves: with LoRA the adapters only."""
    return [p for p in policy.parameters() if p.requires_grad]


def over_updates(history: list[dict[str, float]]) -> dict[str, float]:
    """One row for all updates of a rollout: sums of flows, means of the rest, the entropy that sampled."""
    out: dict[str, float] = {}
    for key in dict.fromkeys(key for numbers in history for key in numbers):
        values = [numbers[key] for numbers in history if key in numbers]
        out[key] = sum(values) / (1 if key in ("flow_up", "flow_down") else len(values))
    return out | {"entropy": history[0]["entropy"]} if history else out


def push_weights(run: Run) -> float:
    """Hand the weights to an engine that has its own copy, and prove that they arrived; seconds it took."""
    begin = time.perf_counter()
    if run.engine.copies:
        run.engine.push(full_weights(run.policy.model))
        run.engine.wake()
        prompt = run.tokenizer(run.task.train[0].prompt, add_special_tokens=False)["input_ids"]
        with user_error(f"--engine {run.settings.engine}:", kinds=(RuntimeError,)):
            rollout.check_push(run.engine, run.policy, prompt, run.dtype)
    return time.perf_counter() - begin


def maybe_reset_reference(run: Run, score: float | None) -> None:
    """ProRL's reset: the policy becomes the reference, the optimizer forgets."""
    if run.method.reset_reference(run.step, score):
        if run.reference is not None:
            run.reference.load_state_dict(run.policy.state_dict())
        run.optimizer.state.clear()


def evaluation(run: Run) -> dict[str, Any]:
    """Held-out problems, each rank its share; some responses go to samples.jsonl."""
    s, r = run.settings, run.ranks
    seed = seeded(s.seed, run.step, "evaluate").initial_seed() + r.rank
    test, hard = (x[r.rank :: r.world] for x in (run.task.test, run.task.hard))
    # A rank without a problem answers the first, with weight 0: `evaluate` needs one.
    task = replace(run.task, test=test or run.task.test[:1], hard=hard or run.task.hard[:1])
    result = evaluate(run.engine, task, s.eval_samples, s.temperature, seed=seed)
    samples = result.pop("samples")
    correct, length = (torch.tensor([x[key] for x in samples]) for key in ("correct", "tokens"))
    chance = seeded(s.seed, run.step, "samples")
    rewards = grpo.REWARDS[s.reward](correct, length, run.task.max_new_tokens, chance).tolist()
    run.append("samples.jsonl", [{"step": run.step, **x, "reward": y} for x, y in zip(samples, rewards)])
    return combined(r.all((len(test), len(hard), result)))


def combined(parts: list[tuple[int, int, dict[str, Any]]]) -> dict[str, Any]:
    """One evaluation from all ranks' (number of problems, of hard ones, result), where rank r had problems r,
    r + world, ...  Entropy is a mean over tokens, the rest over problems."""
    out, world = dict(parts[0][2]), len(parts)
    for key, value in out.items():
        hard = key.startswith("hard_")
        if isinstance(value, list):  # one value a problem
            out[key] = [parts[i % world][2][key][i // world] for i in range(sum(p[hard] for p in parts))]
        elif isinstance(value, float):
            length = "hard_" * hard + "eval_length"
            weight = [p[hard] * (p[2][length] if "entropy" in key else 1) for p in parts]
            out[key] = sum(w * p[2][key] for w, p in zip(weight, parts)) / sum(weight)
    return out


# ------------------------------------------------------------------------------------------------------------
# 3. The entropy ledger


def one_graph(run: Run) -> bool:
    """May the gradients of loss and entropy share a forward pass?  Not where a later update moves the policy
    between them, nor where a graph serves once: over split weights and with recomputation."""
    s = run.settings
    return s.updates_per_rollout == 1 and not (s.gradient_checkpointing or weights_are_split(run))


def weights_are_split(run: Run) -> bool:
    """Over ranks, or by FSDP2 on one, whose backward passes have to be the same everywhere."""
    return any(isinstance(p, DTensor) for p in run.policy.parameters())


@dataclass
class Ledger:
    """Opened before a step and closed after it, on the same states of `tokens`."""

    run: Run
    tokens: Tokens
    shared: bool = False  # the update's own forward passes serve both gradients

    def __post_init__(self) -> None:
        self.params = [p.detach().clone() for p in trained(self.run.policy)]  # θ
        self.grads: list[Tensor | None] = [None] * len(self.params)  # ∇H̄(θ)
        self.before, self.count = 0.0, max(self.run.ranks.sum(int(self.tokens.mask.sum())), 1)  # H̄(θ), nats

    @classmethod
    def open(cls, run: Run, tokens: Tokens, shared: bool = False) -> Ledger:
        """H̄ and ∇H̄ from passes of its own; with `shared`, `Update.micro_batches` finds them in the update."""
        ledger, s = cls(run, tokens, shared), run.settings
        run.policy.train(s.gradient_checkpointing)
        for rows, own in () if shared else Passes(run, tokens):
            nats = run.policy(tokens.rows(rows), s.temperature, entropy_grad=True)["entropy"]
            ledger.add(nats * own)
        run.policy.eval()
        return ledger

    def add(self, nats: Tensor, **how: Any) -> None:
        """Some responses' entropies (B, T), into H̄ and ∇H̄; the gradients of the loss stay as they are."""
        params = trained(self.run.policy)
        others = [p.grad for p in params]
        for p, grad in zip(params, self.grads):
            p.grad = grad
        (nats.sum() * (self.run.ranks.world / self.count)).backward(**how)  # FSDP averages over ranks
        self.grads = [p.grad for p in params]
        for p, grad in zip(params, others):
            p.grad = grad
        self.before += float(nats.detach().sum(dtype=torch.float64)) / self.count

    def close(self) -> dict[str, float]:
        """(5.1) and (5.2), nats."""
        ranks, both = self.run.ranks, zip(trained(self.run.policy), self.params)
        moved = (to_local(p.detach()) - to_local(old) for p, old in both)  # one at a time in memory
        nats = score_batch(self.run, self.tokens)["entropy"]  # 0 where masked
        now = ranks.sum(float(nats.sum(dtype=torch.float64))) / self.count
        predicted = entropy_directional_change(map(to_local, self.grads), moved)  # entropy_math (5.1)
        return {"dH_measured": now - ranks.sum(self.before), "dH_predicted": ranks.sum(predicted)}

    def network_flow(self, force: Tensor, **how: Any) -> Tensor:
        """(B, T): F_t <∇log π(y_t), P ∇H̄> at θ, P the optimizer's preconditioner: what token t did to the
        batch's entropy through the shared parameters, per unit of learning rate and apart from momentum and
        clipping.  In a network the exact counterpart of (5.3)."""
        policy, passes, out = self.run.policy, Passes(self.run, self.tokens), []
        names = [name for name, p in policy.named_parameters() if p.requires_grad]
        scale = adam_preconditioner(self.run.optimizer)
        scale = {old: scale[p] for p, old in zip(trained(policy), self.params)}
        params, grads = dict(zip(names, self.params)), dict(zip(names, self.grads))
        for rows in passes.rows:
            text = (self.tokens.rows(rows), self.run.settings.temperature)

            def logp(at: dict[str, Tensor], text: tuple = text) -> Tensor:  # unchunked: for forward mode
                return torch.func.functional_call(policy, at, text, {"chunk": None})["logp"]

            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
                out.append(network_flow(logp, params, force[rows], grads, scale, **how))
        return passes.join(out)


def book_tokens(run: Run, ledger: Ledger, update: Update) -> dict[str, float]:
    """The network flow of the step just taken, and Pearson's r of it with the tabular one over tokens;
    flows.jsonl gets the four responses that moved entropy most."""
    tk, rows = ledger.tokens, []
    network = ledger.network_flow(update.force)
    moved = torch.where(tk.mask, network.abs(), 0).sum(-1)
    for i in moved.topk(min(4, len(moved))).indices.tolist():
        m, prompt = tk.mask[i], tk.full_ids[i, : int(tk.start[i]) + 1]
        row = {"step": run.step + 1, "prompt": run.tokenizer.decode(prompt), "reward": float(tk.reward[i])}
        row["tokens"] = token_names(run.tokenizer, tk.ids[i][m].tolist())
        rows.append(row | {"network_flow": network[i][m].tolist(), "flow": update.flow[i][m].tolist()})
    run.append("flows.jsonl", rows)
    both = torch.stack([update.flow[tk.mask], network[tk.mask]]).double()
    up, down = up_and_down(both[1])
    return {"net_flow_up": up, "net_flow_down": down, "flow_r": float(torch.corrcoef(both)[0, 1])}


# ------------------------------------------------------------------------------------------------------------
# 4. A run and its files

STATE = ("step", "prompts_used", "skipped_in_row", "best")  # of a run, in state.pt


@dataclass
class Run:
    """One method, one seed, one folder:

    config.json            settings in force, the method's hyperparameters, digests of model and data
    metrics.jsonl          one JSON object a step; step 0 is the evaluation of the first policy
    samples.jsonl          some responses of every evaluation
    flows.jsonl            with --ledger full: the responses that moved entropy most, token by token
    checkpoint/            `transformers` and vLLM load it; state.pt (method, step, prompts used), training/
                           (torch.distributed.checkpoint: weights, AdamW) are what it takes to go on
    checkpoint-previous/   the one before, in case of a crash between two renames
    checkpoint-best/       the policy of the evaluation with the highest pass@1
    entropy.png, summary.txt    picture and table, made when the run ends
    """

    settings: Settings
    method: Method
    folder: Path
    task: Task
    policy: Policy
    tokenizer: Any
    engine: Engine
    dtype: torch.dtype = torch.float32  # of the weights that a checkpoint holds for others to load
    reference: Policy | None = None
    ranks: Ranks = field(default_factory=lambda: Ranks())
    step: int = 0  # rollouts done
    prompts_used: int = 0
    skipped_in_row: int = 0  # updates
    best: float = -1.0  # highest pass@1 so far
    rows: list[dict[str, Any]] = field(default_factory=list)
    warned: bool = False  # that nothing is learned

    def __post_init__(self) -> None:
        params, lr = trained(self.policy), self.settings.lr  # fused: far faster on a CPU
        self.optimizer = torch.optim.AdamW(params, lr, (0.9, 0.95), weight_decay=0.0, fused=True)

    def create(self) -> None:
        """Write config.json."""
        if self.ranks.is_main:
            more = {"method": {m.key: asdict(m) for m in members(self.method)}, "origin": self.origin()}
            write_config(self.folder, [self.settings.method], self.settings, **more)

    def origin(self) -> dict[str, str]:
        """What --model and --data stand for: files may change behind their names."""
        sha = lambda x: hashlib.sha256(json.dumps(x).encode()).hexdigest()[:16]  # noqa: E731
        here, problems = Path(self.settings.model).expanduser(), (*self.task.train, *self.task.test)
        model = getattr(self.policy.model.config, "_commit_hash", None) or ""  # of the hub
        if self.settings.model and here.exists():  # a folder, or a GGUF file
            config = here / "config.json"
            model = sha([config.read_text() if config.exists() else "", fingerprint(here)])
        return {"model": model, "data": sha([[p.prompt, p.answer] for p in problems])}

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add lines to a JSONL file; a number that is not finite becomes null."""
        if self.ranks.is_main:
            finite = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v  # noqa: E731
            plain = [{k: finite(v) for k, v in row.items()} for row in rows]
            with open(self.folder / name, "a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in plain))

    def log(self, row: dict[str, Any], due: bool) -> dict[str, Any]:
        """A row of metrics.jsonl; where an evaluation was due, a checkpoint with it."""
        self.rows.append(row)
        self.append("metrics.jsonl", [row])
        if not self.warned and self.step >= 10 and all(r.get("no_contrast") == 1 for r in self.rows[-10:]):
            self.warned = True
            if self.ranks.is_main:
                warnings.warn(self._nothing_learned(), stacklevel=2)
        if due:
            better, self.best = row["pass@1"] > self.best, max(self.best, row["pass@1"])
            self.save()
            if better and self.ranks.is_main:
                self._mark_best()
        return row

    def _nothing_learned(self) -> str:
        """What steps without contrast come from, by their numbers, and what to do about it."""
        reward, cut = (sum(r[key] for r in self.rows[-10:]) / 10 for key in ("reward", "truncated"))
        why = "answers in another form (see samples.jsonl): --prompt-template; or too hard: other --data"
        if not self.settings.model:
            why = "the policy has collapsed or broken: another --method or a smaller --lr"
        elif reward > 0.5:
            why = "the problems are too easy: other --data"
        elif cut > 0.5:
            why = f"responses are cut off: a --max-new-tokens above {self.task.max_new_tokens}"
        told = f"all responses to a prompt had the same reward (mean {reward:.2f}, {cut:.0%} truncated)"
        return f"ten steps in a row taught nothing: {told}. Likely {why}"

    def save(self) -> None:
        """Write a checkpoint beside the last one, then rename: at no moment is there none."""
        part, is_main, weights = self.folder / ".checkpoint.part", self.ranks.is_main, {}
        hint = f"\nmake room, then go on from the last checkpoint: --resume {self.folder}"
        try:
            with self.ranks.together():
                for left in (part, self.folder / ".best.part") if is_main else ():  # by a kill
                    shutil.rmtree(left, ignore_errors=True)
                gathered = full_weights(self.policy.model)
                try:
                    for name, weight in gathered:  # all ranks gather, the first one keeps
                        if is_main:
                            weights[name] = weight.to("cpu", self.dtype).contiguous()
                finally:
                    deque(gathered, 0)  # to the end, also out of memory: the others must not wait
            before = f"{self.folder}: no checkpoint could be written:"
            with self.ranks.together(), user_error(before, hint, (Exception,)):
                self._training(dcp.save, part)
                if is_main:
                    self._write(part, weights)
        finally:
            if is_main:
                shutil.rmtree(part, ignore_errors=True)  # renamed, if all went well

    def _write(self, part: Path, weights: dict[str, Tensor]) -> None:
        """What the first rank alone writes; then the checkpoint takes the last one's place."""
        model = self.policy.model
        bare = model.get_base_model() if self.settings.lora else model
        bare.save_pretrained(part, state_dict=weights)
        self.tokenizer.save_pretrained(part)
        state = {name: getattr(self, name) for name in STATE} | {"method": self.method.state_dict()}
        torch.save(state, part / "state.pt")
        for path in filter(Path.is_file, part.rglob("*")):  # on the disk before the rename is
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        final, previous = self.folder / "checkpoint", self.folder / "checkpoint-previous"
        if final.exists():
            shutil.rmtree(previous, ignore_errors=True)
            final.rename(previous)
        part.rename(final)

    def _mark_best(self) -> None:
        """checkpoint-best/: the model of the evaluation with the highest pass@1."""
        part, best = self.folder / ".best.part", self.folder / "checkpoint-best"
        left_out = shutil.ignore_patterns("training", "state.pt")
        shutil.rmtree(part, ignore_errors=True)  # of a kill
        shutil.copytree(self.folder / "checkpoint", part, ignore=left_out)
        (part / "best.json").write_text(json.dumps({"step": self.step, "pass@1": self.best}) + "\n")
        shutil.rmtree(best, ignore_errors=True)
        part.rename(best)

    def _training(self, act: Callable[..., Any], folder: Path) -> None:
        """dcp.save or dcp.load of training/.  Raises what failed, a Ctrl-C before all else."""
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # torch's half-written files
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* in a single process")  # no wonder
                act(self._tensors(), checkpoint_id=folder / "training")
        except CheckpointException as error:  # not an Exception; holds those of all ranks
            causes = [e for e, _ in error.failures.values()]
            causes += [e.__context__ for e in causes if e.__context__]  # of a stream that a Ctrl-C cut short
            for e in causes:
                traceback.clear_frames(e.__traceback__)  # the files end here, under the hook
            raise min(causes, key=lambda e: isinstance(e, Exception)) from None
        finally:
            sys.unraisablehook = hook

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """Trained weights, AdamW's states and the reference by parameter name, on any number of ranks.  What
        no step has made yet is made here, zero: torch's own `get_optimizer_state_dict` makes it by a step,
        which Adam's bias correction then counts."""
        named = {n: p for n, p in self.policy.named_parameters() if p.requires_grad}
        for p in named.values():
            if not self.optimizer.state[p]:
                zero = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.optimizer.state[p] = {"step": torch.tensor(0.0, device=p.device), **zero}
        out = {"model": {n: p.detach() for n, p in named.items()}}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            out[key] = {n: self.optimizer.state[p][key].detach() for n, p in named.items()}
        if self.reference is not None:
            out["reference"] = {n: p.detach() for n, p in self.reference.named_parameters()}
        return out

    def load(self) -> None:
        """Continue from the last checkpoint, on any number of ranks; without any, from the beginning.  Raises
        UserError on an unreadable one, and on another model or other data than the run began with."""
        has = lambda name: (self.folder / name).exists()  # noqa: E731
        began: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError, KeyError):  # not begun, or damaged: written anew
            began = json.loads((self.folder / "config.json").read_text())["origin"]
        for name, now in self.origin().items():
            if (began.get(name) or now) != now:  # "": it did not know
                text = f"--{name} {getattr(self.settings, name)} has changed since the run began"
                raise UserError(f"--resume {self.folder}: {text};\nput it back, or start a new run")
        # Without a checkpoint/ the process died between two renames.
        path = self.folder / ("checkpoint" if has("checkpoint") else "checkpoint-previous")
        before = f"--resume {self.folder}: {path.name} is damaged:"
        hint = f"\nremove {path} to go on from checkpoint-previous if there is one, else from the start"
        if path.exists():
            with self.ranks.together(), user_error(before, hint, (Exception,)):
                state = torch.load(path / "state.pt", weights_only=True)
                self._training(dcp.load, path)
                self.method.load_state_dict(state["method"])
                vars(self).update({name: state[name] for name in STATE})
        for name in filter(has, ("metrics.jsonl", "samples.jsonl", "flows.jsonl")):
            with user_error(f"--resume {self.folder}:", kinds=(ValueError, KeyError)):
                rows = [r for r in read_jsonl(self.folder / name) if path.exists() and r["step"] <= self.step]
            if self.ranks.is_main:
                write_atomically(self.folder / name, "".join(json.dumps(r) + "\n" for r in rows))
            self.rows = rows if name == "metrics.jsonl" else self.rows
        last, marked = self.rows[-1] if self.rows else {}, self.folder / "checkpoint-best" / "best.json"
        if self.ranks.is_main and has("checkpoint") and last.get("pass@1") == self.best:
            if not marked.exists() or json.loads(marked.read_text())["pass@1"] < self.best:
                self._mark_best()  # the process died before it could


def write_atomically(path: Path, text: str) -> None:
    """Under another name first: the file is never half there."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def write_config(folder: Path, specs: Sequence[str], settings: Settings, **more: Any) -> None:
    """config.json of a run, or of a comparison of several."""
    config = {"specs": specs, "settings": asdict(settings), **more}
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------
# 5. Several processes
#
# `torchrun --nproc-per-node N train.py ...` runs N of these programs.  Each samples and scores its share of
# the prompts; FSDP2 shards weights, gradients and AdamW's states.  What a method must know about the batch is
# gathered from all ranks first, so that N ranks take the step that one would have taken.


@dataclass(frozen=True)
class Ranks:
    """This process among all.  Alone, every method is the identity."""

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """Meet the others that torchrun started, if it did."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @staticmethod
    def leave() -> None:
        """Before the process ends, while gloo's threads drop what they hold of autograd's: one that asks for
        the interpreter's lock after its end aborts the process."""
        if dist.is_initialized():
            dist.destroy_process_group()
            time.sleep(0.1)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all(self, value: Any) -> list[Any]:
        """Everybody's value, in the order of ranks."""
        out: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(out, value)
        return out

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """An error of one rank in the block ends all, with one exit code and one message.  Nobody may wait
        in it for another behind a line at which one may fail alone."""
        error: Exception | None = None
        try:
            yield
        except Exception as e:
            error = e
        codes = self.all(2 if isinstance(error, UserError) else int(error is not None))
        if any(codes):
            speaker = next(i for i, code in enumerate(codes) if code)
            raise error if error and speaker == self.rank else SystemExit(codes[speaker])

    def sum(self, value: float) -> float:
        return value if self.world == 1 else math.fsum(self.all(value))

    def max(self, value: int) -> int:
        return max(self.all(value))

    def gather(self, tokens: Tokens) -> tuple[Tokens, int]:
        """The rows of all ranks, and where this rank's begin."""
        if self.world == 1:
            return tokens, 0
        parts = [t.to(tokens.ids.device) for t in self.all(tokens.detach().to("cpu"))]
        return concat_padded(parts), sum(len(t.ids) for t in parts[: self.rank])


def shard(policy: Policy, dtype: torch.dtype, device: torch.device, offload: bool = False) -> Policy:
    """FSDP2 in place, layer by layer: float32 weights, gradients and AdamW states split over all ranks, one
    layer at a time computed with in `dtype`, also with one rank.  `offload` keeps the shards in CPU memory.
    The gradient that arrives is the *mean* over ranks."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    split = partial(
        fully_shard,
        mesh=dist.init_device_mesh(device.type, (dist.get_world_size(),)),
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
        reshard_after_forward=True,  # the root too: after a pass without backward, parameters are shards
    )
    for module in list(policy.modules()):
        if type(module).__name__ in (policy.model._no_split_modules or ()):
            split(module)
    split(policy)
    policy.sharded = dist.get_world_size() > 1
    return policy


def full_tensor(x: Tensor) -> Tensor:
    """A weight of all ranks together."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def to_local(x: Tensor) -> Tensor:
    """This rank's share of a weight."""
    return x.to_local() if isinstance(x, DTensor) else x


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name in `transformers`, weight) of the whole model, LoRA merged in, read by all ranks to the end."""
    layers = adapters(model)
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            weight, layer = full_tensor(p.detach()), layers.get(plain_name(name))
            yield plain_name(name), weight if layer is None else merged(weight, layer)


def plain_name(name: str) -> str:
    """What a parameter under LoRA is called without it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The LoRA layers by the weight that each adapts.  Experts are parameters without a module."""
    return {
        f"{plain_name(n)}.{getattr(m, 'parameter_name', 'weight')}": m
        for n, m in model.named_modules()
        if hasattr(m, "lora_A") and hasattr(m, "base_layer")
    }


def merged(weight: Tensor, layer: nn.Module) -> Tensor:
    """A weight with its LoRA adapter, from all ranks' shards, added by the layer's own rule, which knows of
    transposed weights and stacked experts."""
    alone, parts = copy.copy(layer), {}
    for key in ("lora_A", "lora_B"):
        part = full_tensor(getattr(layer, key)["default"].weight.detach()).float()
        parts[key] = {"default": SimpleNamespace(weight=part)}
    alone._modules = {**layer._modules, **parts}
    return (weight.float() + alone.get_delta_weight("default")).to(weight.dtype)


# ------------------------------------------------------------------------------------------------------------
# 6. Settings
#
# A field's type, default and docstring make its flag and its line in --help; the four groups are those of
# --help.  `Settings` is all of them in one, as config.json has it.


@dataclass(frozen=True)
class Training:
    """What is learned, from how many samples, and how many of them at once."""

    steps: int = 300  # rollouts, each followed by its updates
    lr: float = 3e-4
    """AdamW's constant learning rate (with --model: 1e-6); a smaller one also slows the collapse"""
    prompts: int = 32  # prompts per rollout
    group_size: int = 16  # responses per prompt; their mean reward is the baseline of their advantages
    updates_per_rollout: int = 1  # optimizer steps per rollout; 1 is strictly on-policy, where no clip acts
    grad_clip: float = 1.0  # largest gradient norm; 0 means no clipping
    temperature: float = 1.0  # of sampling and of every probability in the loss: what is drawn is trained
    reward: Literal["correct", "length_penalty", "random", "wrong"] = "correct"
    """length_penalty adds DAPO's overlong penalty; random and wrong are spurious, for study"""
    mismatch: Literal["auto", "tis", "icepop", "off"] = "auto"
    """weights against an engine whose probabilities differ from ours; auto: tis with vLLM, else off"""
    mismatch_low: float = 0.5  # icepop drops tokens whose probability ratio is smaller
    mismatch_high: float = 2.0  # tis cuts larger probability ratios to this; icepop drops their tokens
    micro_batch: int = 0  # responses per forward pass, to bound memory; same gradient; 0 means no limit
    tokens_per_micro_batch: int = 0  # in tokens with padding (with --model: 16384); unless --micro-batch
    gradient_checkpointing: bool = False  # recompute layers in the backward pass: slower, far less memory


@dataclass(frozen=True)
class Measuring:
    """Evaluations, and the ledger of what each step did to the entropy."""

    eval_every: int = 30  # steps between evaluations, each with a checkpoint; the last step has both
    eval_samples: int = 32  # samples per held-out problem, the k of pass@k (with --model: 8)
    ledger: Literal["off", "step", "full"] = "step"
    """step: measured against predicted change; full: also the network flow of each token"""
    ledger_every: int = 10  # steps between ledger entries; each costs a backward and a forward pass more


@dataclass(frozen=True)
class LanguageModel:
    """A model and problems of your own.  Without --model, a small transformer learns an embedded task."""

    model: str = ""
    """hub id or folder of a causal language model (safetensors), or a .gguf file; needs --data"""
    data: str = ""
    """problems and answers: a .jsonl, .json, .csv or .parquet file, or owner/name@config:split of the hub;
    or a task made in code: arithmetic, pairs, or arithmetic:30 for numbers up to 30"""
    eval_data: str = ""  # the same for evaluation; without it, --eval-problems of the data are held out
    eval_problems: int = 96  # number of held-out problems
    prompt_template: str = ""
    """text around a problem, which replaces {problem}; by default that of a file asks for \\boxed{}"""
    chat: Literal["auto", "off"] = "auto"
    """auto: the prompt is a user's turn if the tokenizer has a chat template; off: it is plain text"""
    max_prompt_tokens: int = 1024  # problems with longer prompts are left out and counted
    max_new_tokens: int = 1024  # longest response; the embedded task has its own limit
    stop: str = ""  # a text that ends a response, for models that do not end by themselves
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """numbers to compute in; the weights stay float32; auto: bfloat16 for a --model on a GPU"""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"  # kernel of the attention layers
    lora: int = 0  # rank of LoRA adapters on all linear layers but the head, and on experts; 0: all weights
    trust_remote_code: bool = False  # run code that comes with the model


@dataclass(frozen=True)
class Machine:
    """Where it runs, what draws the responses, and the seed."""

    engine: Literal["torch", "vllm"] = "torch"  # what samples; torch is the loop of rollout.py
    vllm_memory: float = 0.4  # share of the GPU's memory that vLLM may take while it is awake
    seed: int = 0  # seed of the warm start, the order of the prompts and the sampling
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one
    threads: int = 0  # CPU threads; 0: one for the embedded model, with --model what torch takes


@dataclass(frozen=True)
class Settings(Training, Measuring, LanguageModel, Machine):
    """All settings of one run, and its method with its options, e.g. opefo:form=exact."""

    method: str = "grpo"


# What a language model wants otherwise than the embedded one, where the command line does not say.
MODEL_DEFAULTS = {"lr": 1e-6, "tokens_per_micro_batch": 16384, "eval_samples": 8}
# ... and a task made in code: what a model of 135 M learns on a laptop in half an hour.
MADE_DEFAULTS = {
    **{"lr": 1e-5, "steps": 40, "prompts": 8, "group_size": 8, "max_new_tokens": 20},
    **{"eval_every": 10, "eval_samples": 16, "eval_problems": 24, "ledger_every": 5},
}

RANGES = {  # smallest and largest value; other integers are at least 1
    "group_size": (2, math.inf),  # advantages compare the responses to one prompt
    "lr": (1e-12, 1e36),  # beyond, AdamW's step overflows float32
    "temperature": (1e-3, 1e3),  # beyond, float32 logits overflow
    "mismatch_low": (0, 1),  # the ratio is near 1
    "mismatch_high": (1, math.inf),
    "vllm_memory": (0.01, 1),
    "seed": (0, 2**63 - 1),
    "threads": (0, 1024),
    **dict.fromkeys(("micro_batch", "tokens_per_micro_batch", "grad_clip", "lora"), (0, math.inf)),
}


def flag(name: str) -> str:
    """The flag of a setting: eval_every -> --eval-every."""
    return "--" + name.replace("_", "-")


def parse_spec(spec: str, base: Settings) -> tuple[Settings, Method]:
    """`name:key=value,key=value` -> settings and method.  A key is a hyperparameter of the method, or one of
    Training and Measuring; other settings belong to the whole comparison.  Raises ValueError."""
    name, options = interventions.parse(spec)
    options = {key.replace("-", "_"): value for key, value in options.items()}
    kinds = get_type_hints(Training) | get_type_hints(Measuring)
    own = {k: interventions.convert(name, k, options.pop(k), kinds[k]) for k in kinds if k in options}
    settings, method = replace(base, method=spec, **own), interventions.build(name, **options)
    if settings.mismatch == "auto":
        settings = replace(settings, mismatch="tis" if settings.engine == "vllm" else "off")
    return settings, method


def complaints(s: Settings, method: Method, device: torch.device, ranks: Ranks) -> Iterator[str]:
    """Impossible values, then what does not go together; what comes after the first may rest on it."""
    for name, kind in get_type_hints(Settings).items():
        value = getattr(s, name)
        low, high = RANGES.get(name, (1, math.inf) if kind is int else (value, value))
        if not low <= value <= high:
            bounds = f"be at least {low}" if high == math.inf else f"lie between {low} and {high}"
            yield f"{flag(name)} {value}: must {bounds}"
        if get_origin(kind) is Literal and value not in get_args(kind):  # of a config.json: --resume
            yield f"{flag(name)} {value}: choose {', '.join(get_args(kind))}"
    n, world = s.updates_per_rollout, ranks.world
    if s.prompts % (n * world):  # the responses to a prompt stay together
        yield f"--prompts {s.prompts}: must be a multiple of --updates-per-rollout {n} x {world} processes"
    if bool(s.model) != bool(s.data) or (not s.model and (s.lora or s.stop)):
        names = [name for name in ("model", "data", "lora", "stop") if getattr(s, name)]
        given = " ".join(f"{flag(name)} {getattr(s, name)}" for name in names)
        yield f"{given}: give both --model and --data; the embedded task has a few words only"
    if s.lora and method.overrides("reset_reference"):
        yield f"--lora {s.lora}: {method.key} moves the reference, which with --lora is the model as it was"
    if method.overrides("sample") and (s.engine == "vllm" or s.mismatch != "off"):
        # vLLM does not allow it, --mismatch would undo it
        yield f"--engine {s.engine}: {method.key} chooses tokens itself; use --engine torch --mismatch off"
    yield from filter(None, (m.complaint(s) for m in members(method)))
    if s.ledger == "full" and (n > 1 or s.gradient_checkpointing or sharded(s, device, ranks)):
        text = "one process, --dtype float32, no --gradient-checkpointing; else --ledger step"
        yield f"--ledger full: needs --updates-per-rollout 1, {text}"


def make_job(spec: str, base: Settings, device: torch.device, ranks: Ranks) -> tuple[Settings, Method]:
    """One method of a command line.  Raises UserError, and warns of a method that does nothing."""
    settings, method = parse_spec(spec, base)
    if text := next(complaints(settings, method, device, ranks), ""):
        raise UserError(f"--method {spec}: {text}" if ":" in spec else text)
    if inert := [m.key for m in members(method) if not m.on_policy and settings.updates_per_rollout == 1]:
        text = "with one update per rollout the ratio is exactly 1, and the clip or penalty of"
        remedy = "does nothing; add e.g. --updates-per-rollout 4"
        warnings.warn(f"{spec}: {text} {' and '.join(inert)} {remedy}", stacklevel=2)
    return settings, method


# ------------------------------------------------------------------------------------------------------------
# 7. What a run needs


def load_task_and_policy(
    s: Settings, device: torch.device, ranks: Ranks, quiet: bool
) -> tuple[Task, nn.Module, Any]:
    """Task, first policy in float32 (on the CPU where it will be sharded), tokenizer.  Raises ValueError."""
    if not s.model:
        bar = partial(tqdm, desc="warm start", unit="step", disable=quiet or not ranks.is_main)
        for turn in range(2):  # the first rank trains and fills the cache, the others read it
            if ranks.is_main == (turn == 0):
                model, tokenizer = rollout.warm_policy(rollout.WarmStart(seed=s.seed), progress=bar)
            ranks.all(None)
        return rollout.chain_task(s.eval_problems), model.to(device), tokenizer
    if not rollout.made(s.data):
        grpo.shared_grader()  # without its package nothing is loaded
    bare = s.lora and ranks.world == 1  # frozen weights need no float32 master
    dtype = str(compute_dtype(s, device)).removeprefix("torch.") if bare else "float32"
    place = "cpu" if sharded(s, device, ranks) else device
    with user_error("--model"):
        model, tokenizer = rollout.load_model(s.model, dtype, s.trust_remote_code, s.attention, place)
    how = (s.prompt_template, s.chat == "auto", s.max_prompt_tokens, s.max_new_tokens)
    task, notes = rollout.task_of_data(tokenizer, s.data, s.eval_data, s.eval_problems, *how)
    with user_error(f"--model {s.model}:"):
        config = model.config.get_text_config()
        rollout.longest_prompt((*task.train, *task.test), tokenizer, config, s.max_new_tokens)
        if s.stop:  # ValueError where it cannot be
            _ = TorchEngine(model, tokenizer, stop=s.stop).completes_stop
    shown = [note for note in notes if not quiet or "left out" in note]
    shown += [] if quiet else ["the first prompt:", task.train[0].prompt, ""]
    if compute_dtype(s, device) == torch.bfloat16 and device.type == "cpu" and ranks.is_main:
        slower = bfloat16_slowdown(config.hidden_size, s.prompts * s.group_size)
        text = f"bfloat16 takes {slower:.1f} times as long as float32 on this processor: --dtype float32"
        shown += [f"{text}, the default on a CPU"] if slower > 1.2 else []
    if shown and ranks.is_main:
        print("\n".join(shown), file=sys.stderr)
    if s.lora:
        model = with_adapters(model, s.lora, s.seed)
    if s.gradient_checkpointing:
        recompute = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.24
        (recompute or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return task, model, tokenizer


def compute_dtype(s: Settings, device: torch.device) -> torch.dtype:
    """Of forward and backward passes, and of the weights that a checkpoint holds for others to load."""
    auto = "bfloat16" if s.model and device.type == "cuda" else "float32"
    return getattr(torch, auto if s.dtype == "auto" else s.dtype)


def bfloat16_slowdown(hidden: int, rows: int) -> float:
    """Time of a layer's product in bfloat16 over that in float32, for the states of `rows` responses that are
    being sampled: about .2 to .5 on a processor with AMX, 3 on one without instructions for bfloat16."""

    def seconds(dtype: torch.dtype) -> float:
        state, weight = (torch.ones(n, hidden, dtype=dtype) for n in (rows, 4 * hidden))
        return min(timeit.repeat(lambda: state @ weight.T, number=5, repeat=5))

    return seconds(torch.bfloat16) / seconds(torch.float32)


def sharded(s: Settings, device: torch.device, ranks: Ranks) -> bool:
    """FSDP2 splits weights over ranks, and with one rank keeps float32 masters of a bfloat16 model.  LoRA on
    one rank needs neither: what is trained is float32 already."""
    return ranks.world > 1 or (compute_dtype(s, device) == torch.bfloat16 and not s.lora)


def with_adapters(model: nn.Module, rank: int, seed: int) -> nn.Module:
    """LoRA (2106.09685) on every linear layer but the head, and on experts, where peft knows them, scaled by
    alpha / rank = 2, float32, drawn from `seed`.  Warns of matrices that got none."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    place = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(place), warnings.catch_warnings(), user_error(f"--lora {rank}:"):
        warnings.simplefilter("ignore")  # peft tells how it fills in our config, and asks in deprecated words
        torch.manual_seed(seeded(seed, 0, "adapters").initial_seed())
        adapted = get_peft_model(model, config).eval()  # refuses Mamba's layers, which read past the adapter
    ends = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    known = {id(w) for w in (*ends, model.get_output_embeddings().weight)}
    weights = {plain_name(n): p for n, p in adapted.named_parameters() if ".lora_" not in n and p.ndim > 1}
    bare = [n for n, p in weights.items() if n not in adapters(adapted) and id(p) not in known]
    if bare:
        warnings.warn(f"--lora {rank}: {len(bare)} matrices stay as they are, e.g. {bare[0]}", stacklevel=2)
    return adapted


def vllm_engine(
    s: Settings, task: Task, model: nn.Module, tokenizer: Any, device: torch.device, ranks: Ranks
) -> Engine:
    """vLLM on the model that the run starts from; for it, one that is in no folder is written to one."""
    longest = rollout.longest_prompt((*task.train, *task.test), tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        folder = ranks.all(folder)[0]  # of the first rank, which alone writes models
        write = not s.model or s.model.endswith(".gguf")
        if write and ranks.is_main:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        ranks.all(None)
        engine = rollout.VllmEngine(
            folder if write else s.model,
            tokenizer,
            device=device,
            dtype=compute_dtype(s, device),
            max_model_len=longest + max(16, task.max_new_tokens),
            gpu_memory=s.vllm_memory,
            seed=s.seed,
            trust_remote_code=s.trust_remote_code,
            stop=s.stop,
        )
        ranks.all(None)  # all have read the folder
        return engine


def make_run(
    settings: Settings,
    method: Method,
    folder: Path,
    task: Task,
    model: nn.Module,
    tokenizer: Any,
    engine: Engine | None = None,
    device: torch.device | str = "cpu",
    ranks: Ranks | None = None,
) -> Run:
    """A run whose policy, reference and sampling engine are where the settings want them."""
    s, device, ranks = settings, torch.device(device), ranks or Ranks()
    dtype, split = compute_dtype(s, device), sharded(s, device, ranks)
    policy, reference = Policy(model), None
    if "ref_logp" in method.needs and not s.lora:
        reference = Policy(copy.deepcopy(model)).eval().requires_grad_(False)
    if split and engine is None:  # sampling reads all weights at every token: each rank keeps a whole copy
        twin = copy.deepcopy(model)
        twin = (twin.merge_and_unload() if s.lora else twin).to(device, dtype).eval()
        engine = TorchEngine(twin, tokenizer, copies=True, stop=s.stop)
    if split:
        policy = shard(policy, dtype, device)
        reference = reference and shard(reference, dtype, device, offload=device.type == "cuda")
    engine = engine or TorchEngine(model, tokenizer, stop=s.stop)
    return Run(s, method, folder, task, policy, tokenizer, engine, dtype, reference, ranks)


# ------------------------------------------------------------------------------------------------------------
# 8. The command line
#
# `main` turns errors into exit codes, `execute` words into jobs, `compare` does them, `follow` shows one.


@dataclass(frozen=True)
class Command:  # its docstring, with the list of methods, follows
    method: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SPEC [SPEC ...]")] = ("opefo",)
    """one or more methods, run one after another from the same warm start"""
    out: str = ""  # folder of the run; without it, a new one under runs/
    resume: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[FOLDER]")] = None
    """go on with a run from its last checkpoint; without FOLDER, that of --out or the newest"""
    quiet: bool = False  # no progress line, only the summary
    training: Training = Training()
    measuring: Measuring = Measuring()
    language_model: LanguageModel = LanguageModel()
    machine: Machine = Machine()

    def values(self) -> dict[str, Any]:
        """Settings by name, given or not, and the methods as one word."""
        groups = [group for group in vars(self).values() if is_dataclass(group)]
        return {k: v for group in groups for k, v in vars(group).items()} | {"method": " ".join(self.method)}


Command.__doc__ = """Train a language model with verifiable rewards and watch its entropy.

Without --model it trains a small transformer on an embedded arithmetic task: nothing is downloaded, and it
takes two minutes on one core.

examples:
""" + __doc__.split("\n\n")[1] + """

methods (options ride behind the name, NAME:key=value,key=value; so may training and measuring options):
""" + "\n".join(f"  {name:<20} {cls.idea}" for name, cls in interventions.METHODS.items())  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 diverged or no memory, 2 bad input, 130 stopped, 141 by a pipe's end."""
    code, words = 141, sys.argv[1:] if argv is None else argv
    with warnings.catch_warnings():  # above the progress line
        warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)
        try:
            command = command_line(Command, "train.py", words)
            if os.environ.get("RANK", "0") != "0":  # what one process of many says, the first one says too
                sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            flags = {word.split("=")[0].replace("_", "-") for word in words}
            code = execute(command, {f.name for f in fields(Settings) if flag(f.name) in flags})
            Ranks.leave()
            sys.stdout.flush()
            return code
        except (UserError, ImportError) as error:
            print(f"train.py: error: {error}", file=sys.stderr)
        except (MemoryError, RuntimeError) as error:
            text = str(error).partition("\n")[0][:200]
            if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", text):
                raise
            remedy = "a smaller --tokens-per-micro-batch or --micro-batch, or --gradient-checkpointing"
            print(f"train.py: error: out of memory; try {remedy}\n{text}", file=sys.stderr)
            return 1
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return code
        except OSError as error:
            out = command.out or " ".join(command.resume or ()) or "runs"
            remedy = "" if isinstance(error, ConnectionError) else "; make room, or choose a writable folder"
            print(f"train.py: error: --out {out}: {error}{remedy}", file=sys.stderr)
        except KeyboardInterrupt:
            print("stopped; nothing was written yet", file=sys.stderr)
            return 130
    return 2


def execute(command: Command, given: set[str]) -> int:
    """Everything that a command line asks for.  Returns the exit code."""
    with user_error():
        if wanted := [spec.removesuffix(":help") for spec in command.method if spec.endswith(":help")]:
            print("\n\n".join(map(method_help, wanted)))
            return 0
        folder, specs, base = what_to_run(command, given)
        if not specs or len(set(specs)) < len(specs):
            raise UserError(f"{' '.join(['--method', *specs])}: give at least one method, and none twice")
        device = pick_device(base.device)
        ranks = Ranks.join(device)
        jobs = [make_job(spec, base, device, ranks) for spec in specs]
    set_threads(base.threads, embedded=not base.model)
    folder = folder or ranks.all(new_folder(command.out, specs, base.seed))[0]
    with grpo.fast_products(), locked(list(dict.fromkeys((folder, *places(folder, specs)))), ranks):
        try:
            if len(specs) > 1 and ranks.is_main:
                write_config(folder, specs, base)
            return compare(command, jobs, folder, device, ranks)
        except KeyboardInterrupt:
            if not (folder / "config.json").is_file():
                raise
            if ranks.is_main:
                print(f"stopped at once; go on from the last checkpoint: --resume {folder}", file=sys.stderr)
            return 130


def method_help(name: str) -> str:
    """The options of one method, or of each member of a composition, for `--method NAME:help`."""
    interventions.build(name)  # raises ValueError on an unknown name or a senseless composition
    lines = []
    for key in name.split("+"):
        cls = interventions.METHODS[key]
        lines += ["", f"{key}: {cls.idea}  ({cls.paper})", ""]
        for option, _, default, text in interventions.hyperparameters(cls):
            line = f"  {f'{option}={default}':<26} {' '.join(text.split())}"
            lines += textwrap.wrap(line, 110, subsequent_indent=" " * 29)
    return "\n".join(lines[1:])


def what_to_run(command: Command, given: set[str]) -> tuple[Path | None, Sequence[str], Settings]:
    """Methods and settings; with --resume (FOLDER, that of --out, or the newest under runs/) also the folder,
    and a UserError where a flag contradicts the earlier call, but for more --steps."""
    now = command.values()
    if command.resume is None:
        for name in filter(now.get, ("data", "eval_data")):
            with user_error(flag(name)):
                rollout.data_file(now[name])
        usual = MODEL_DEFAULTS if now["model"] else {}
        base = Settings(**(usual | MADE_DEFAULTS if now["model"] and rollout.made(now["data"]) else usual))
        return None, command.method, replace(base, **{name: now[name] for name in given - {"method"}})
    named = " ".join(command.resume or ()) or command.out
    if command.out not in ("", named):
        raise UserError(f"--out {command.out}: the run to go on with is {named}; leave --out out")
    runs = [Path(named)] if named else sorted(Path("runs").glob("*"), key=lambda p: p.stat().st_mtime)
    runs = [folder for folder in runs if (folder / "config.json").is_file()]
    if not runs:
        raise UserError(f"--resume {named or 'runs/*'}: no run there (no config.json); start one with --out")
    folder = runs[-1]
    with user_error(f"--resume {folder}: config.json is damaged:", "; start a new run", (Exception,)):
        config = json.loads((folder / "config.json").read_text())
        specs, base = list(map(str, config["specs"])), Settings(**config["settings"])
    began = {**vars(base), "method": " ".join(specs)}
    if "steps" in given:
        began["steps"] = max(base.steps, now["steps"])
    for name in sorted(given):
        if now[name] != began[name]:
            text = f"{flag(name)} {now[name]}: {folder} was started with {began[name]}"
            raise UserError(f"{text};\nleave it out, or start a new run")
    return folder, specs, replace(base, steps=began["steps"])


def label_of(spec: str) -> str:
    """A file name for a spec: grpo:lr=1e-4 -> grpo-lr=1e-4."""
    return "".join(c if c.isalnum() or c in "._=+-" else "-" for c in spec)


def places(folder: Path, specs: Sequence[str]) -> list[Path]:
    """The folder of each method's run: a comparison has one for each."""
    return [folder / label_of(x) for x in specs] if len(specs) > 1 else [folder]


def new_folder(out: str, specs: Sequence[str], seed: int) -> Path:
    """--out, which must be new or empty; without it a fresh name under runs/."""
    name = "runs/" + "-vs-".join(map(label_of, specs))[:80] + f"-s{seed}"
    for folder in map(Path, [out] if out else (name + f"-{n}" * (n > 1) for n in count(1))):
        other = next((x for x in folder.rglob("*") if x.is_file() and x.name != ".lock"), None)
        if not other:
            return folder
    files = [p / x for p in (folder, *places(folder, specs)) for x in ("config.json", "metrics.jsonl")]
    if there := next((file.parent for file in files if file.exists()), None):
        text = f"{there} holds a run already; take another, or go on: --resume {there}"
    else:
        text = f"{other} is there, and a run writes and removes files of its own; take an empty folder"
    raise UserError(f"--out {out}: {text}")


def pick_device(name: str) -> torch.device:
    """The device of --device; under torchrun each process has a GPU of its own.  Raises ValueError."""
    from eval import usable_device

    if "LOCAL_RANK" in os.environ and name in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.device("cuda", torch.cuda.current_device())
    return usable_device(name)


@contextlib.contextmanager
def locked(folders: list[Path], ranks: Ranks) -> Iterator[None]:
    """Nobody else works in the folders meanwhile: the first rank holds the system's lock on a file in each,
    which ends with the process, however that ends.  Folders in which nothing was written are removed."""
    own = folders if ranks.is_main else []
    try:
        with contextlib.ExitStack() as held:
            with ranks.together():
                for folder in own:
                    folder.mkdir(parents=True, exist_ok=True)
                    try:
                        held.enter_context(FileLock(folder / ".lock", timeout=0))
                    except Timeout:
                        text = "another run is at work there; wait for it, or choose another --out"
                        raise UserError(f"{folder}: {text}") from None
                    held.callback((folder / ".lock").unlink, missing_ok=True)
            yield
    finally:
        for folder in reversed(own):
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty


def compare(command: Command, jobs: list[Any], folder: Path, device: torch.device, ranks: Ranks) -> int:
    """The methods one after another from one warm start; table and picture, also of a part if it stops."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of saving and loading a checkpoint
    quiet, done, engine, worst = command.quiet or not ranks.is_main, {}, None, 0
    with contextlib.ExitStack() as at_the_end:
        for (settings, method), place in zip(jobs, places(folder, [s.method for s, _ in jobs])):
            with user_error():
                task, model, tokenizer = load_task_and_policy(settings, device, ranks, quiet)
                if not ranks.is_main:
                    sys.stderr = sys.__stderr__  # from here on a process may fail alone, and says so itself
                if settings.engine == "vllm" and engine is None:
                    engine = vllm_engine(settings, task, model, tokenizer, device, ranks)
                    at_the_end.callback(engine.close)
            run = make_run(settings, method, place, task, model, tokenizer, engine, device, ranks)
            if command.resume is not None:
                run.load()
            run.create()
            code = follow(run, quiet)  # 1: it diverged, and the next may not
            worst = max(worst, code)
            done[settings.method] = run.rows
            if ranks.is_main:
                draw({settings.method: run.rows}, place / "entropy.png")
                if skipped := sum(row.get("skipped", 0) for row in run.rows):
                    text = f"{settings.method}: {skipped} updates skipped: non-finite loss or gradient"
                    print(text, file=sys.stderr)
            if code == 130:
                break
    if ranks.is_main:
        if len(jobs) > 1:
            draw(done, folder / "entropy.png")
        text = table(done)
        (folder / "summary.txt").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}\n\npicture: {folder / 'entropy.png'}    numbers: {folder}/**/metrics.jsonl")
        if code == 130:
            at = f"stopped at step {run.step} of {run.settings.steps}"
            print(f"{at}; go on with: python train.py --resume {folder}")
    return worst


# The progress line.  alike: groups whose rewards are all the same; draws: rollouts, where a method refills.
BAR = {
    **{"reward": "r {:.2f}", "no_contrast": "alike {:.0%}", "draws": "draws {}", "entropy": "H {:.3f}"},
    **{"flow_up": "↑{:.3f}", "flow_down": "↓{:.3f}", "lam": "λ {:+.2f}", "dH_measured": "dH {:+.4f}"},
    **{"dH_predicted": "(pred {:+.4f})", "pass@1": "pass@1 {:.2f}", "pass@k": "pass@k {:.2f}"},
}


def follow(run: Run, quiet: bool) -> int:
    """Train to the end, or to the end of the step in which the user stops it.  Returns the exit code."""
    spec, steps = run.settings.method, run.settings.steps
    shape = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
    bar = tqdm(total=steps, initial=run.step, desc=spec, disable=quiet, bar_format=shape)
    keys, shown = [key for key in BAR if key != "draws" or run.method.refill], {}
    try:
        with bar, stop_on_signal() as stop:
            for row in train(run):
                shown |= {key: BAR[key].format(row[key]) for key in keys if row.get(key) is not None}
                bar.set_postfix_str(" ".join(shown[key] for key in keys if key in shown), refresh=False)
                bar.update(row["step"] - bar.n)
                stopped = run.ranks.max(stop())  # a signal may reach one rank before the others
                if stopped and run.step < steps:
                    run.save()
                    return 130
    except FloatingPointError as error:
        if run.ranks.is_main:
            remedy = f"the last checkpoint is in {run.folder / 'checkpoint'}; try a smaller --lr"
            print(f"train.py: error: {spec}: {error} (step {run.step});\n{remedy}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM finishes the step in hand and writes a checkpoint; a second Ctrl-C stops at once."""
    asked: list[int] = []

    def handler(number: int, _: Any) -> None:
        if not asked:
            print("\nstopping after this step, with a checkpoint (again: at once, without)", file=sys.stderr)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        asked.append(number)

    old = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for n, h in old.items():
            signal.signal(n, h)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
