"""Chapter 5. Training: the loop, the entropy ledger, and the picture at the end.

    python train.py --method opefo              the first command: a warm start, 300 steps, a picture
    python train.py --method grpo opefo steer   several methods from one warm start, drawn together
    python train.py --method grpo grpo:lr=1e-4 opefo:form=exact clip_cov:ratio=.02 --seed 1
    python train.py --resume runs/opefo-s0      go on after Ctrl-C or a crash, with the same numbers

Claim. One GRPO step is: draw n responses to each of P prompts, verify them, push the tokens of the better
ones up and of the worse ones down.  Repeated, it makes the policy better and more certain, and it is the
second that ends the progress.

The entropy ledger books that certainty like money.  At each logged step, with H̄(θ) the mean entropy of the
update batch's states (token mean, temperature as in sampling) and θ, θ' the parameters before and after the
step:

    dH_measured  = H̄(θ') - H̄(θ)              on the same states, float32 logits, float64 sums          (5.1)
    dH_predicted = <∇H̄(θ), θ' - θ>   the first-order effect of the step really taken, momentum included (5.2)
    flow_up      = Σ_t max(f_t, 0),  flow_down = Σ_t max(-f_t, 0),  f_t = F_t T_t                        (5.3)

F_t = -∂loss/∂log π(y_t) is the force on token t (weights, clip and aggregation inside) and T_t its exact
score on a table (entropy_math).  (5.1) and (5.2) are in nats; (5.3) in nats per unit of learning rate on a
tabular policy: the units of (5.1) and (5.3) differ, their signs and their balance can be compared.

Everything random comes from a generator seeded by a hash of (seed, step, purpose), so a resumed run repeats
the numbers of one never stopped, and methods that start from the same seed see the same prompts in the same
order.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import interventions
from entropy_math import adam_preconditioner, entropy_directional_change, network_flow, token_stats
from eval import draw, evaluate, table
from grpo import Method, Plan, Progress, Tokens, batch_loss, masked_mean, plan_update, token_flow
from rollout import Problem, Rollout, Task, TorchEngine, WarmStart, answer, chain_task, score, warm_policy


class UserError(Exception):
    """A mistake that the user can mend: printed in one or two lines, exit code 2, no traceback."""


# ------------------------------------------------------------------------------------------------------------
# 1. Settings


@dataclass(frozen=True)
class Settings:
    """All settings of one run.  The docstring under a field is its line in --help."""

    method: str = "grpo"
    """the method with its options, e.g. opefo:form=exact"""
    steps: int = 300
    """rollouts, each followed by its updates"""
    seed: int = 0
    """of the warm start, the prompts' order and the sampling"""
    lr: float = 3e-4
    """AdamW's learning rate, constant; a smaller one also slows the collapse, so compare with grpo:lr=..."""
    prompts: int = 32
    """prompts per rollout"""
    group_size: int = 16
    """responses per prompt: their mean reward is the baseline of their advantages"""
    updates_per_rollout: int = 1
    """optimizer steps per rollout: 1 is strictly on-policy; more need the clip, and clip-like methods need
    more"""
    micro_batch: int = 0
    """responses per forward pass, to bound memory; the gradient does not depend on it; 0: all at once"""
    temperature: float = 1.0
    """of sampling, and of all probabilities in the loss: what is drawn is what is trained"""
    eval_every: int = 30
    """steps between evaluations and checkpoints; both also happen at the end"""
    eval_samples: int = 32
    """samples per held-out problem, the k of pass@k"""
    ledger: str = "step"
    """the entropy ledger: off, step (measured against predicted change), or full (also each token's network
    flow)"""
    ledger_every: int = 10
    """steps between ledger entries; each costs about one more training pass"""
    grad_clip: float = 1.0
    """largest gradient norm; 0: no clipping"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"""
    threads: int = 0
    """CPU threads; 0: two at most, since a tiny model gains nothing from more; 1 is immune to a busy
    machine"""
    without: ClassVar[tuple[str, ...]] = ()  # fields that interventions.hyperparameters leaves out

    def check(self) -> None:
        """Raise UserError on the first impossible value or combination, naming flag, value and remedy."""
        for name in ("steps", "prompts", "eval_every", "eval_samples", "ledger_every", "updates_per_rollout"):
            if getattr(self, name) < 1:
                raise UserError(f"{flag(name)} {getattr(self, name)}: must be at least 1")
        for name in ("micro_batch", "threads", "grad_clip", "seed"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{flag(name)} {getattr(self, name)}: must not be negative")
        if not 0 < self.lr < 1e36:  # beyond, AdamW's step overflows float32
            raise UserError(f"--lr {self.lr}: must be a positive number, e.g. 3e-4")
        if not 1e-3 <= self.temperature <= 1e3:  # beyond, float32 logits overflow
            raise UserError(f"--temperature {self.temperature}: must lie between 0.001 and 1000")
        for name, most in (("seed", 2**63 - 1), ("threads", 1024)):
            if getattr(self, name) > most:
                raise UserError(f"{flag(name)} {getattr(self, name)}: must be at most {most}")
        if self.group_size < 2:
            raise UserError(
                f"--group-size {self.group_size}: advantages compare responses to one prompt; use at least 2"
            )
        if self.prompts % self.updates_per_rollout:
            raise UserError(
                f"--updates-per-rollout {self.updates_per_rollout}: must divide --prompts {self.prompts}, "
                "since a prompt's responses stay together in one update"
            )
        rows = self.prompts * self.group_size // self.updates_per_rollout
        if self.micro_batch and rows % self.micro_batch:
            raise UserError(
                f"--micro-batch {self.micro_batch}: must divide the {rows} responses of one update "
                "(prompts x group size / updates per rollout)"
            )
        if self.ledger not in ("off", "step", "full"):
            raise UserError(f"--ledger {self.ledger}: choose off, step or full")
        if self.ledger == "full" and self.updates_per_rollout > 1:
            raise UserError("--ledger full: books the tokens of one update; use --updates-per-rollout 1")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def convert(name: str, text: str) -> Any:
    """The value of a setting from its text.  Raises UserError naming flag, value and type."""
    kind = {"int": int, "float": float, "str": str}[Settings.__annotations__[name]]
    try:
        return kind(text)
    except ValueError:
        kinds = {int: "a whole number", float: "a number"}
        raise UserError(f"{flag(name)} {text}: must be {kinds[kind]}") from None


# Settings that may ride behind a method's name.  The others belong to the whole comparison.
PER_METHOD = tuple(f.name for f in fields(Settings) if f.name not in ("method", "seed", "device", "threads"))


def parse_spec(spec: str, base: Settings) -> tuple[Settings, Method]:
    """`name:key=value,key=value` -> settings and method.  A key is a hyperparameter of the method or a
    setting."""
    try:
        name, options = interventions.parse(spec)
        options = {key.replace("-", "_"): value for key, value in options.items()}
        own = {k: convert(k, v) for k, v in options.items() if k in PER_METHOD}
        method = interventions.build(name, **{k: v for k, v in options.items() if k not in PER_METHOD})
    except ValueError as error:
        raise UserError(f"--method {spec}: {error}") from None
    settings = replace(base, method=spec, **own)
    try:
        settings.check()
    except UserError as error:
        raise UserError(f"--method {spec}: {error}" if own else str(error)) from None
    return settings, method


def label_of(spec: str) -> str:
    """A file name for a spec: grpo:lr=1e-4 -> grpo-lr=1e-4."""
    return "".join(c if c.isalnum() or c in "._=+-" else "-" for c in spec)


def seeded(seed: int, step: int, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on its arguments only."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))


def prompts_at(problems: tuple[Problem, ...], seed: int, position: int, count: int) -> list[Problem]:
    """`count` problems from `position` on, in an endless sequence of seeded shuffles of all problems."""
    out = []
    while len(out) < count:
        epoch, offset = divmod(position + len(out), len(problems))
        order = torch.randperm(len(problems), generator=seeded(seed, epoch, "order")).tolist()
        out += [problems[i] for i in order[offset : offset + count - len(out)]]
    return out


# ------------------------------------------------------------------------------------------------------------
# 2. One update


@dataclass
class Batch:
    """Responses ready for scoring: the tokens of grpo, and the padded text that the model reads."""

    tokens: Tokens
    full_ids: Tensor  # (B, L) prompt and response, padded on the right
    start: Tensor  # (B,) position that predicts the first response token

    def rows(self, index: Any) -> Batch:
        return Batch(self.tokens.rows(index), self.full_ids[index], self.start[index])

    def slices(self, micro: int) -> list[slice]:
        micro = micro or len(self.start)
        return [slice(i, i + micro) for i in range(0, len(self.start), micro)]


def make_batch(rollouts: list[Rollout], pad: int) -> Batch:
    """One batch from several rollouts (more than one where a method samples until it has enough usable
    prompts)."""
    width = max(r.ids.shape[1] for r in rollouts)
    text = [r.full_ids(pad) for r in rollouts]
    length = max(ids.shape[1] for ids, _ in text)

    def wide(xs: list[Tensor], size: int, fill: float) -> Tensor:
        return torch.cat([nn.functional.pad(x, (0, size - x.shape[1]), value=fill) for x in xs])

    groups, seen = [], 0
    for r in rollouts:
        groups.append(r.group + seen)
        seen += len(r.prompt_ids)
    correct = torch.cat([r.correct for r in rollouts])
    tokens = Tokens(
        ids=wide([r.ids for r in rollouts], width, pad),
        mask=wide([r.mask for r in rollouts], width, False),
        rollout_logp=wide([r.rollout_logp for r in rollouts], width, 0.0),
        reward=correct.float(),
        correct=correct,
        group=torch.cat(groups),
        truncated=torch.cat([r.truncated for r in rollouts]),
    )
    return Batch(tokens, wide([ids for ids, _ in text], length, pad), torch.cat([start for _, start in text]))


def scored(model: nn.Module, batch: Batch, temperature: float, entropy_grad: bool = False) -> Tokens:
    """The batch's tokens with log π, H, Σp² and Σp² log p of the current policy."""
    tk = batch.tokens
    stats = score(model, batch.full_ids, batch.start, tk.ids, tk.mask, temperature, entropy_grad)
    return replace(tk, logp=stats.logp, entropy=stats.entropy, p2=stats.p2, p2logp=stats.p2logp)


@torch.no_grad()
def scored_in_slices(model: nn.Module, batch: Batch, temperature: float, micro: int) -> Tokens:
    """The same without gradient, `micro` rows at a time."""
    parts = [scored(model, batch.rows(s), temperature) for s in batch.slices(micro)]
    names = ("logp", "entropy", "p2", "p2logp")
    return replace(batch.tokens, **{k: torch.cat([getattr(p, k) for p in parts]) for k in names})


@torch.no_grad()
def response_logits(model: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """(B, T, V) logits / temperature at the response positions: for the one method that needs the logits
    themselves (Lp-Reg's proxy) and for pictures.  Fine at a small vocabulary; at a large one use small
    micro-batches."""
    hidden = model.get_decoder()(batch.full_ids, use_cache=False).last_hidden_state  # (B, L, D)
    columns = batch.start[:, None] + torch.arange(batch.tokens.ids.shape[1], device=hidden.device)  # (B, T)
    columns = columns.clamp(max=hidden.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[-1])
    return model.get_output_embeddings()(hidden.gather(1, columns)).float() / temperature


@dataclass
class Gradient:
    """What `accumulate_gradient` found out on its way, besides the gradient in the parameters."""

    plan: Plan
    metrics: dict[str, float]
    force: Tensor  # (B, T) F_t = -∂loss/∂log π(y_t)
    flow: Tensor  # (B, T) F_t T_t, the tabular flow (5.3)


def accumulate_gradient(model: nn.Module, batch: Batch, method: Method, settings: Settings) -> Gradient:
    """Add the gradient of the method's loss on the whole batch to the parameters.

    All at once, the plan is made from the very forward pass that is differentiated. In micro-batches it is
    made from a pass without gradient over the whole batch first, so that every statistic is of the whole
    batch: one more forward pass buys that the gradient does not depend on how the batch was sliced.
    """
    slices = batch.slices(settings.micro_batch)
    plan = None
    if len(slices) > 1:
        stats = scored_in_slices(model, batch, settings.temperature, settings.micro_batch)
        plan = plan_update(stats, method)
    totals: dict[str, float] = {"loss": 0.0}
    forces, flows = [], []
    for s in slices:
        tk = scored(model, batch.rows(s), settings.temperature, method.entropy_grad)
        if plan is None:
            plan = plan_update(tk, method)
        tk.logp.retain_grad()
        loss, metrics = batch_loss(tk, plan.rows(s), method)
        loss.backward()
        forces.append(torch.zeros_like(tk.logp) if tk.logp.grad is None else -tk.logp.grad)
        flows.append(token_flow(tk, forces[-1]))  # (5.3)
        for key, value in {**metrics, "loss": float(loss.detach())}.items():
            totals[key] = totals.get(key, 0.0) + value
    force, flow = torch.cat(forces).detach(), torch.cat(flows)
    totals |= {"flow_up": float(flow.clamp(min=0).sum()), "flow_down": float(-flow.clamp(max=0).sum())}
    return Gradient(plan, totals, force, flow)


# ------------------------------------------------------------------------------------------------------------
# 3. The entropy ledger


class LogProbs(nn.Module):
    """The model as a function from parameters to the responses' log-probabilities, for `torch.func`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, temperature: float) -> Tensor:
        tk = batch.tokens
        full = (batch.full_ids, batch.start, tk.ids, tk.mask)
        return score(self.model, *full, temperature, chunk=None).logp  # unchunked: forward mode goes through


@dataclass
class Ledger:
    """Opened before a step and closed after it: measured and predicted change of the mean entropy on the same
    states, and on demand every token's network flow."""

    batch: Batch
    settings: Settings
    before: float  # H̄(θ), nats
    grads: list[Tensor]  # ∇H̄(θ)
    params: list[Tensor]  # θ

    @classmethod
    def open(cls, model: nn.Module, batch: Batch, settings: Settings) -> Ledger:
        params = [p for p in model.parameters() if p.requires_grad]
        count, total = batch.tokens.mask.sum().clamp(min=1), 0.0
        grads = [torch.zeros_like(p) for p in params]
        for s in batch.slices(settings.micro_batch):
            tk = scored(model, batch.rows(s), settings.temperature, entropy_grad=True)
            part = torch.where(tk.mask, tk.entropy, 0).sum() / count
            for total_grad, g in zip(grads, torch.autograd.grad(part, params, materialize_grads=True)):
                total_grad += g
            total += float(torch.where(tk.mask, tk.entropy, 0).detach().sum(dtype=torch.float64) / count)
        return cls(batch, settings, total, grads, [p.detach().clone() for p in params])

    def close(self, model: nn.Module) -> dict[str, float]:
        """(5.1) and (5.2), nats."""
        moved = [p.detach() - old for p, old in zip(self._trained(model), self.params)]
        after = scored_in_slices(model, self.batch, self.settings.temperature, self.settings.micro_batch)
        return {
            "dH_measured": float(masked_mean(after.entropy, after.mask)) - self.before,  # (5.1)
            "dH_predicted": entropy_directional_change(self.grads, moved),  # (5.2), entropy_math (5.1)
        }

    def network_flow(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, force: Tensor, **how: Any
    ) -> Tensor:
        """(B, T): F_t <∇log π(y_t), P ∇H̄> at θ, P the optimizer's preconditioner in this step.

        What token t did to the batch's entropy through the shared parameters, per unit of learning rate and
        apart from momentum and gradient clipping: the exact counterpart, in a network, of the tabular (5.3).
        `force` is F_t of the step, (B, T).
        """
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        scale = adam_preconditioner(optimizer)
        scale = {old: scale[p] for p, old in zip(self._trained(model), self.params)}
        call, out = LogProbs(model), []
        for s in self.batch.slices(self.settings.micro_batch):
            rows = self.batch.rows(s)

            def logp(at: dict[str, Tensor], rows: Batch = rows) -> Tensor:
                named = {f"model.{name}": value for name, value in at.items()}
                return torch.func.functional_call(call, named, (rows, self.settings.temperature))

            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
                params, grads = dict(zip(names, self.params)), dict(zip(names, self.grads))
                out.append(network_flow(logp, params, force[s], grads, scale, **how))
        return torch.cat(out)

    @staticmethod
    def _trained(model: nn.Module) -> list[Tensor]:
        return [p for p in model.parameters() if p.requires_grad]


def flow_summary(tabular: Tensor, network: Tensor, mask: Tensor) -> dict[str, float]:
    """Network flow up and down, and how well the tabular score of a token knows it (Pearson's r over
    tokens)."""
    a, b = tabular[mask].double(), network[mask].double()
    r = torch.corrcoef(torch.stack([a, b]))[0, 1] if len(a) > 1 else torch.tensor(math.nan)
    up, down = float(b.clamp(min=0).sum()), float(-b.clamp(max=0).sum())
    return {"net_flow_up": up, "net_flow_down": down, "flow_r": float(r) if r.isfinite() else None}


# ------------------------------------------------------------------------------------------------------------
# 4. A run


def read_rows(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The JSON lines of a file up to a step; a last line that a crash cut short is dropped."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            late = last_step is not None and row["step"] > last_step
        except (ValueError, TypeError, KeyError):
            break
        if late:
            break
        rows.append(row)
    return rows


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


CHECKSUMS = "sha256.json"  # of every other file of a checkpoint: flipped bits in weights raise no error


def checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_sums(folder: Path) -> None:
    """Raises ValueError or OSError at the first file that is not as it was written."""
    for name, digest in json.loads((folder / CHECKSUMS).read_text()).items():
        if checksum(folder / name) != digest:
            raise ValueError(f"{name} is not as it was written")


MAX_DRAWS = 10  # rollouts that dynamic sampling may draw for one update; the recipe's max_num_gen_batches


class Run:
    """One method, one seed, one folder.

    folder/config.json       the settings in force and the method's hyperparameters
    folder/metrics.jsonl     one JSON object a step; step 0 is the evaluation of the warm policy
    folder/samples.jsonl     some responses of every evaluation
    folder/flows.jsonl       with --ledger full: the responses that moved entropy most, token by token
    folder/checkpoint/       `transformers` loads it; with state.pt: optimizer, method, step, position
    folder/checkpoint-previous/    the one before, in case of a crash between two renames
    """

    def __init__(
        self, settings: Settings, method: Method, folder: Path, task: Task, model: nn.Module, tokenizer: Any
    ):
        self.settings, self.method, self.folder, self.task = settings, method, folder, task
        self.model, self.tokenizer = model, tokenizer
        self.engine = TorchEngine(model, tokenizer)
        self.device = self.engine.device
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.reference: nn.Module | None = None
        if "ref_logp" in method.needs:
            self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        self.step = 0  # rollouts done
        self.position = 0  # prompts used
        self.skipped_in_row = 0
        self.rows: list[dict[str, Any]] = []
        self.why = ""  # the run broke off

    # -- one step --------------------------------------------------------------------------------------------

    def rollout(self) -> Batch:
        """Responses to the next prompts; a method with `refill` (dynamic sampling) draws until it has enough
        of use."""
        s = self.settings
        generator = seeded(s.seed, self.step, "sample", self.device)
        hook = None if type(self.method).sample is Method.sample else self.method.sample
        drawn: list[Rollout] = []
        for attempt in range(MAX_DRAWS):
            problems = prompts_at(self.task.train, s.seed, self.position, s.prompts)
            self.position += len(problems)
            how = {"generator": generator, "hook": hook}
            drawn.append(answer(self.engine, self.task, problems, s.group_size, s.temperature, **how))
            batch = make_batch(drawn, self.tokenizer.pad_token_id)
            if not self.method.refill:
                return batch
            keep = self.method.select(batch.tokens)
            groups = batch.tokens.group[keep].unique()[: s.prompts]
            if len(groups) == s.prompts or attempt == MAX_DRAWS - 1:
                return batch.rows(torch.isin(batch.tokens.group, groups))
        raise AssertionError("unreachable: the last attempt returns")

    def train_step(self) -> dict[str, Any]:
        """One rollout and its updates.  Returns the row for metrics.jsonl."""
        s, begin = self.settings, time.perf_counter()
        limit = self.task.max_new_tokens
        self.method.progress = Progress(self.step, s.steps, s.seed, limit, s.temperature)
        batch = self.rollout()
        row: dict[str, Any] = {"step": self.step + 1}
        tk = batch.tokens
        row["reward"] = float(tk.reward.mean()) if len(tk.reward) else float("nan")
        ledger = None
        if s.ledger != "off" and self.step % s.ledger_every == 0 and len(tk.reward):
            ledger = Ledger.open(self.model, batch, s)
        row |= self._updates(batch, ledger)
        if ledger:
            row |= ledger.close(self.model)
        row |= {
            "tokens": int(tk.mask.sum()),
            "length": float(tk.lengths.float().mean()) if len(tk.reward) else 0.0,
            "seconds": time.perf_counter() - begin,
        }
        self.step += 1
        return row

    def _updates(self, batch: Batch, ledger: Ledger | None) -> dict[str, Any]:
        """`updates_per_rollout` optimizer steps on one rollout; a non-finite one is skipped."""
        s, method = self.settings, self.method
        out: dict[str, Any] = {"skipped": 0}
        history: dict[str, list[float]] = {}
        for part in self._parts(batch):
            self.optimizer.zero_grad(set_to_none=True)
            gradient = accumulate_gradient(self.model, part, method, s)
            norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip or math.inf))
            if math.isfinite(norm) and math.isfinite(gradient.metrics["loss"]):
                self.optimizer.step()
                method.after_step(gradient.plan)
                self.skipped_in_row = 0
                if ledger and s.ledger == "full":
                    out |= self._book(ledger, gradient)
            else:
                out["skipped"] += 1
                self.skipped_in_row += 1
            numbers = {**gradient.plan.metrics, **gradient.metrics, "grad_norm": norm}
            for key, value in {**numbers, "entropy": gradient.plan.entropy}.items():
                history.setdefault(key, []).append(value)
        for key, values in history.items():
            adds_up = key in ("flow_up", "flow_down")  # successive updates move entropy one after another
            out[key] = sum(values) if adds_up else sum(values) / len(values)
        if history:
            out["entropy"] = history["entropy"][0]  # of the policy that sampled
        return out

    def _book(self, ledger: Ledger, gradient: Gradient, responses: int = 4) -> dict[str, float]:
        """The network flow of the step just taken; flows.jsonl gets the responses that moved entropy most."""
        tk = ledger.batch.tokens
        network = ledger.network_flow(self.model, self.optimizer, gradient.force)
        for i in (
            torch.where(tk.mask, network.abs(), 0).sum(-1).topk(min(responses, len(network))).indices.tolist()
        ):
            m = tk.mask[i]
            words = self.tokenizer.convert_ids_to_tokens(tk.ids[i][m].tolist())
            prompt = ledger.batch.full_ids[i, : int(ledger.batch.start[i]) + 1]
            row = {
                "step": self.step + 1,
                "prompt": self.tokenizer.decode(prompt),
                "reward": float(tk.reward[i]),
            }
            row |= {
                "tokens": words,
                "network_flow": network[i][m].tolist(),
                "flow": gradient.flow[i][m].tolist(),
            }
            self._append("flows.jsonl", row)
        return flow_summary(gradient.flow, network, tk.mask)

    def _parts(self, batch: Batch) -> list[Batch]:
        """The update batches of one rollout, whole groups each, with what the method needs beyond the current
        policy."""
        s, tk = self.settings, batch.tokens
        if not len(tk.reward):
            return []
        if s.updates_per_rollout > 1:
            tk.old_logp = scored_in_slices(self.model, batch, s.temperature, s.micro_batch).logp
        if self.reference is not None:
            tk.ref_logp = scored_in_slices(self.reference, batch, s.temperature, s.micro_batch).logp
        if "proxy_logp" in self.method.needs:
            tk.proxy_logp = self._proxy(batch)
        groups = tk.group.unique().tensor_split(s.updates_per_rollout)
        if len(groups) == 1:
            return [batch]
        return [batch.rows(torch.isin(tk.group, g)) for g in groups if len(g)]

    def _proxy(self, batch: Batch) -> Tensor:
        """log q of Lp-Reg's filtered proxy, (B, T)."""
        s, members = self.settings, getattr(self.method, "members", [self.method])
        threshold = next(m.threshold for m in members if "proxy_logp" in m.needs)
        parts = [batch.rows(rows) for rows in batch.slices(s.micro_batch)]
        logits = (response_logits(self.model, part, s.temperature) for part in parts)
        q = [interventions.proxy_log_prob(z, part.tokens.ids, threshold) for z, part in zip(logits, parts)]
        return torch.cat(q)

    def maybe_reset(self, score: float | None) -> None:
        """ProRL's reset, where the method asks for it: the policy becomes the reference, the optimizer
        forgets."""
        if self.method.reset_reference(self.step, score):
            if self.reference is not None:
                self.reference.load_state_dict(self.model.state_dict())
            self.optimizer.state.clear()

    # -- the loop --------------------------------------------------------------------------------------------

    def run(self, stop: Callable[[], bool], show: Callable[[dict[str, Any]], None]) -> str:
        """Until the last step or until `stop()`; "done", "stopped" or "broken".

        Broken is a run with ten non-finite updates in a row, or whose policy gives NaN, from which no update
        comes back; then the checkpoint stays that of the last evaluation.
        """
        try:
            return self._loop(stop, show)
        except FloatingPointError as error:
            self.why = str(error)
            return "broken"

    def _loop(self, stop: Callable[[], bool], show: Callable[[dict[str, Any]], None]) -> str:
        if self.step == 0 and not self.rows:
            self._record({"step": 0}, True)
            show(self.rows[-1])
        while self.step < self.settings.steps:
            if stop():
                self.save()
                return "stopped"
            row = self.train_step()
            due = self.step % self.settings.eval_every == 0 or self.step == self.settings.steps
            self._record(row, due)
            show(self.rows[-1])
            if self.skipped_in_row >= 10:
                self.save()
                self.why = "ten updates in a row had a non-finite loss or gradient, and none was taken"
                return "broken"
        return "done"

    def _record(self, row: dict[str, Any], due: bool) -> None:
        s = self.settings
        if due:
            seed = seeded(s.seed, self.step, "evaluate").initial_seed()
            result = evaluate(self.engine, self.task, s.eval_samples, s.temperature, seed=seed)
            for sample in result.pop("samples"):
                self._append("samples.jsonl", {"step": self.step, **sample})
            row |= result
        if self.step:
            self.maybe_reset(row.get("pass@1"))
        self.rows.append(row)
        self._append("metrics.jsonl", row)
        if due:
            self.save()

    def _append(self, name: str, row: dict[str, Any]) -> None:
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(plain) + "\n")

    # -- files -----------------------------------------------------------------------------------------------

    def create(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        config = {
            "specs": [self.settings.method],
            "settings": asdict(self.settings),
            "method": {m.key: asdict(m) for m in getattr(self.method, "members", [self.method])},
            "task": self.task.name,
        }
        write_atomically(self.folder / "config.json", json.dumps(config, indent=2) + "\n")

    def save(self) -> None:
        """Write a checkpoint beside the last one, then rename: at no moment is there none.

        Raises UserError if it cannot be written; the last one is then still there.
        """
        part = self.folder / ".checkpoint.part"
        try:
            self._write(part)
        except (OSError, RuntimeError, SafetensorError) as error:  # three names for a full disk
            shutil.rmtree(part, ignore_errors=True)
            reason = str(error).splitlines()[0][:160]
            raise UserError(
                f"--out {self.folder}: no checkpoint could be written at step {self.step} ({reason});\n"
                f"make room, then go on with --resume {self.folder}"
            ) from None
        final, previous = self.folder / "checkpoint", self.folder / "checkpoint-previous"
        if final.exists():
            shutil.rmtree(previous, ignore_errors=True)
            final.rename(previous)
        part.rename(final)

    def _write(self, part: Path) -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        self.model.save_pretrained(part)
        self.tokenizer.save_pretrained(part)
        state = {
            "step": self.step,
            "position": self.position,
            "skipped_in_row": self.skipped_in_row,
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "reference": None if self.reference is None else self.reference.state_dict(),
        }
        torch.save(state, part / "state.pt")
        sums = {f.name: checksum(f) for f in sorted(part.iterdir())}
        (part / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n")

    def load(self) -> None:
        """Continue from the last checkpoint; without any, from the beginning.  Raises UserError on an
        unreadable one."""
        path = self.folder / "checkpoint"
        if not path.exists():
            path = self.folder / "checkpoint-previous"  # the process died between two renames
        if path.exists():
            try:
                check_sums(path)
                weights = type(self.model).from_pretrained(path).state_dict()
                state = torch.load(path / "state.pt", map_location=self.device, weights_only=True)
                self.model.load_state_dict(weights)
                self.optimizer.load_state_dict(state["optimizer"])
                self.method.load_state_dict(state["method"])
                if self.reference is not None:
                    self.reference.load_state_dict(state["reference"])
                self.step, self.position = state["step"], state["position"]
                self.skipped_in_row = state["skipped_in_row"]
            except Exception as error:  # damage shows as any of a dozen classes of three libraries
                reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
                raise UserError(
                    f"--resume {self.folder}: {path.name} is damaged ({reason});\n"
                    f"remove {path} to go on from checkpoint-previous if there is one, else from the start"
                ) from None
        for name in ("metrics.jsonl", "samples.jsonl", "flows.jsonl"):
            if not (self.folder / name).exists():
                continue
            rows = read_rows(self.folder / name, self.step) if path.exists() else []
            write_atomically(self.folder / name, "".join(json.dumps(r) + "\n" for r in rows))
            if name == "metrics.jsonl":
                self.rows = rows


# ------------------------------------------------------------------------------------------------------------
# 5. The command line

GROUPS = {
    "training": (
        "steps",
        "seed",
        "lr",
        "prompts",
        "group_size",
        "updates_per_rollout",
        "micro_batch",
        "grad_clip",
    ),
    "sampling and evaluation": ("temperature", "eval_every", "eval_samples"),
    "the entropy ledger": ("ledger", "ledger_every"),
    "machine": ("device", "threads"),
}


class Parser(argparse.ArgumentParser):
    """Complains in one line that names the flag and the nearest, instead of a page of usage."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, 1, 0)
            self.error(f"{unknown[0]}: unknown; did you mean {near[0]}?")
        return found

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}  (--help shows all flags)\n")


def parser() -> argparse.ArgumentParser:
    """The command line.  Flags that were not given are absent, so that --resume can tell them from
    defaults."""
    helps = {name: text for name, _, _, text in interventions.hyperparameters(Settings)}
    defaults = {f.name: f.default for f in fields(Settings)}
    ideas = "\n".join(f"  {name:<20} {cls.idea}" for name, cls in interventions.METHODS.items())
    p = Parser(
        prog="train.py",
        description="Train a language model with verifiable rewards and watch its entropy. Without --model\n"
        "it trains a small transformer on an embedded arithmetic task: nothing is downloaded, two minutes\n"
        "on two cores.",
        epilog="examples:\n"
        "  python train.py --method opefo\n"
        "  python train.py --method grpo opefo steer --out runs/three\n"
        "  python train.py --method grpo grpo:lr=1e-4 opefo:form=paper clip_cov:ratio=.02\n"
        "  python train.py --method steer:help            the options of one method\n"
        "  python train.py --resume runs/three            go on after Ctrl-C or a crash\n\n"
        f"methods (options ride behind the name, NAME:key=value,key=value; training settings too):\n{ideas}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    p.add_argument(
        "--method",
        nargs="+",
        metavar="SPEC",
        help="one or more methods, run one after another (default: opefo)",
    )
    for title, names in GROUPS.items():
        group = p.add_argument_group(title)
        for name in names:
            value = str(defaults[name]).replace("%", "%%")
            group.add_argument(
                flag(name),
                metavar=name.upper(),
                help=f"{helps[name]} (default: {value})".replace("; 0:", "; 0 means"),
            )
    group = p.add_argument_group("models and data")
    group.add_argument(
        "--model", help="hub id or folder of a causal LM (default: the embedded transformer, built in code)"
    )
    group.add_argument("--data", help="JSONL of problems and answers (default: the embedded arithmetic task)")
    group.add_argument("--engine", help="what samples the rollouts: torch or vllm (default: torch)")
    group = p.add_argument_group("files")
    group.add_argument("--out", help="folder of the run (default: a new one under runs/)")
    group.add_argument(
        "--resume", nargs="?", const="", metavar="FOLDER",
        help="go on with a run from its last checkpoint (default folder: --out, else the newest run)",
    )  # fmt: skip
    group.add_argument("--quiet", action="store_true", help="no progress bar, only the summary")
    return p


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line names, converted."""
    return {
        f.name: convert(f.name, getattr(args, f.name))
        for f in fields(Settings)
        if f.name != "method" and hasattr(args, f.name)
    }


def check_not_yet(args: argparse.Namespace) -> None:
    """--model, --data and --engine are flags of real language models; say what they can do today."""
    if hasattr(args, "data") and not Path(args.data).is_file():
        raise UserError(f"--data {args.data}: no such file; give a JSONL file of problems and answers")
    if getattr(args, "engine", "torch") not in ("torch", "vllm"):
        raise UserError(f"--engine {args.engine}: choose torch or vllm")
    for name, what in (("model", "loading a language model"), ("data", "training on your own problems")):
        if hasattr(args, name):
            raise UserError(
                f"--{name} {getattr(args, name)}: {what} is not in version 0.1 yet;\n"
                "leave it out to train the embedded model"
            )
    if getattr(args, "engine", "torch") == "vllm":
        raise UserError(
            "--engine vllm: not in version 0.1 yet; leave it out, the torch engine samples the embedded model"
        )


RUN_FILES = (
    "config.json",
    "metrics.jsonl",
    "samples.jsonl",
    "flows.jsonl",
    "checkpoint",
    "checkpoint-previous",
    "entropy.png",
    "summary.txt",
)


def run_file(folder: Path, specs: list[str]) -> Path | None:
    """A file of an earlier run that a new one would overwrite, in the folder or in those of its methods."""
    places = [folder, *(folder / label_of(x) for x in specs if len(specs) > 1)]
    return next((p / name for p in places for name in RUN_FILES if (p / name).exists()), None)


def new_folder(args: argparse.Namespace, specs: list[str], seed: int) -> Path:
    """--out, which must not hold a run; without it a fresh name under runs/."""
    if hasattr(args, "out"):
        folder = Path(args.out)
        if folder.is_file():
            raise UserError(f"--out {folder}: is a file; give a folder")
        taken = run_file(folder, specs)
        if taken:
            raise UserError(
                f"--out {folder}: {taken} is there already, and nothing is overwritten;\n"
                f"choose another folder, or go on with a run: --resume {taken.parent}"
            )
        return folder
    name = "-vs-".join(label_of(x) for x in specs)[:80] + f"-s{seed}"
    folder, n = Path("runs") / name, 2
    while run_file(folder, specs):
        folder, n = Path("runs") / f"{name}-{n}", n + 1
    return folder


def old_folder(args: argparse.Namespace) -> Path:
    """The folder to resume: --resume FOLDER, --out FOLDER, or the newest under runs/."""
    named = args.resume or getattr(args, "out", "")
    if getattr(args, "out", named) != named:
        raise UserError(f"--out {args.out}: the run to go on with is {named}; leave --out out")
    if named:
        if not (Path(named) / "config.json").is_file():
            raise UserError(f"--resume {named}: holds no run (no config.json); start one with --out {named}")
        return Path(named)
    runs = sorted(Path("runs").glob("*/config.json"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError("--resume: there is no run under runs/; name its folder")
    return runs[-1].parent


def resumed_plan(args: argparse.Namespace, folder: Path) -> tuple[list[str], Settings]:
    """Specs and settings of an earlier call.  A flag that contradicts them is refused; only --steps may be
    raised."""
    try:
        stored = json.loads((folder / "config.json").read_text())
        specs, base = list(map(str, stored["specs"])), Settings(**stored["settings"])
        if not specs:
            raise ValueError("no method")
        for f in fields(Settings):
            if type(getattr(base, f.name)) is not type(f.default):
                raise ValueError(f"{f.name} is {getattr(base, f.name)!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume {folder}: config.json is damaged ({error}); start a new run") from None
    if hasattr(args, "method") and args.method != specs:
        raise UserError(
            f"--method {' '.join(args.method)}: {folder} was started with {' '.join(specs)};\n"
            "leave --method out"
        )
    for name, value in given_settings(args).items():
        was = getattr(base, name)
        if name == "steps" and value > was:
            base = replace(base, steps=value)
        elif value != was:
            raise UserError(
                f"{flag(name)} {value}: {folder} was started with {was}; leave it out, or start a new run"
            )
    return specs, base


def set_threads(n: int) -> None:
    """Threads for tensor work.  More than two do not pay on the embedded model."""
    torch.set_num_threads(n or min(2, os.cpu_count() or 1))


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not usable here ({reason}); try --device cpu") from None
    return device


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM finishes the step in hand and writes a checkpoint; a second Ctrl-C stops at once."""
    asked: list[int] = []

    def handler(number: int, _: Any) -> None:
        asked.append(number)
        if len(asked) == 1:
            print("\nstopping after this step, with a checkpoint (again: at once, without)", file=sys.stderr)
            signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for n, h in old.items():
            signal.signal(n, h)


# The progress line: reward, entropy, flow up and down, λ, measured (predicted) change, evaluations.
BAR = {
    "reward": "r {:.2f}",
    "entropy": "H {:.3f}",
    "flow_up": "↑{:.3f}",
    "flow_down": "↓{:.3f}",
    "lam": "λ {:+.2f}",
    "dH_measured": "dH {:+.4f}",
    "dH_predicted": "(pred {:+.4f})",
    "pass@1": "pass@1 {:.2f}",
    "pass@k": "pass@k {:.2f}",
}


class Bar:
    """One progress line for a run: the ledger and the last evaluation."""

    def __init__(self, label: str, run: Run, quiet: bool):
        from tqdm import tqdm

        self.numbers: dict[str, str] = {}
        steps, shape = run.settings.steps, "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
        self.bar = tqdm(total=steps, initial=run.step, desc=label, disable=quiet, bar_format=shape)

    def show(self, row: dict[str, Any]) -> None:
        self.numbers |= {key: form.format(row[key]) for key, form in BAR.items() if row.get(key) is not None}
        self.bar.set_postfix_str(
            " ".join(self.numbers[key] for key in BAR if key in self.numbers), refresh=False
        )
        self.bar.update(row["step"] - self.bar.n)


def train(args: argparse.Namespace) -> int:
    """Everything that a command line asks for.  Returns the exit code."""
    check_not_yet(args)
    resume = hasattr(args, "resume")
    if resume:
        folder = old_folder(args)
        specs, base = resumed_plan(args, folder)
    else:
        specs, base = getattr(args, "method", ["opefo"]), Settings(**given_settings(args))
        base.check()
        folder = new_folder(args, specs, base.seed)
    if len(set(specs)) < len(specs):
        raise UserError(f"--method {' '.join(specs)}: the same run twice; change an option or leave one out")
    plans = [(spec, *parse_spec(spec, base)) for spec in specs]
    for spec, settings, method in plans:
        members = getattr(method, "members", [method])
        inert = [m.key for m in members if not m.on_policy and settings.updates_per_rollout == 1]
        if inert:
            warnings.warn(
                f"{spec}: with one update per rollout the ratio is exactly 1, and the clip or penalty of "
                f"{' and '.join(inert)} does nothing; add e.g. --updates-per-rollout 4",
                stacklevel=2,
            )
    set_threads(base.threads)
    device = pick_device(base.device)
    check_room(folder)
    if len(specs) > 1:
        folder.mkdir(parents=True, exist_ok=True)
        config = {"specs": specs, "settings": asdict(base)}
        write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return compare(plans, folder, device, resume, getattr(args, "quiet", False))


def check_room(folder: Path) -> None:
    """Fail before the work, not after it."""
    parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    if not parent.is_dir():
        raise UserError(f"--out {folder}: {parent} is not a folder; choose another")
    if not os.access(parent, os.W_OK):
        raise UserError(f"--out {folder}: {parent} is not writable; choose another folder")
    free = shutil.disk_usage(parent).free
    if free < 50 * 2**20:
        raise UserError(
            f"--out {folder}: {free / 2**20:.0f} MB free, 50 MB needed; make room or choose another disk"
        )


def compare(
    plans: list[tuple[str, Settings, Method]], folder: Path, device: torch.device, resume: bool, quiet: bool
) -> int:
    """Run the methods one after another from the same warm start; table and picture at the end, or as far as
    it came."""
    from tqdm import tqdm
    from transformers.utils import logging

    logging.disable_progress_bar()  # of saving and loading a checkpoint
    task, done, state = chain_task(), {}, "done"
    with stop_on_signal() as stop:
        for spec, settings, method in plans:
            how = WarmStart(seed=settings.seed)
            model, tokenizer = warm_policy(
                how, progress=lambda it: tqdm(it, desc="warm start", unit="step", disable=quiet)
            )
            place = folder if len(plans) == 1 else folder / label_of(spec)
            run = Run(settings, method, place, task, model.to(device), tokenizer)
            if resume:
                run.load()
            run.create()
            bar = Bar(spec, run, quiet)
            state = run.run(stop, bar.show)
            bar.bar.close()
            done[spec] = run.rows
            draw({spec: run.rows}, place / "entropy.png")
            skipped = sum(row.get("skipped", 0) for row in run.rows)
            if skipped:
                print(f"{spec}: {skipped} updates skipped: non-finite loss or gradient", file=sys.stderr)
            if state != "done":
                break
    if len(done) > 1:
        draw(done, folder / "entropy.png")
    text = table(done)
    write_atomically(folder / "summary.txt", text + "\n")
    print(f"\n{text}\n\npicture: {folder / 'entropy.png'}    numbers: {folder}/**/metrics.jsonl")
    if state == "stopped":
        print(
            f"stopped at step {run.step} of {run.settings.steps}; "
            f"go on with: python train.py --resume {folder}"
        )
        return 130
    if state == "broken":
        print(
            f"train.py: error: {spec}: {run.why} (after step {run.step});\n"
            f"the last checkpoint is in {place / 'checkpoint'}; try a smaller --lr",
            file=sys.stderr,
        )
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point.  Exit codes: 0 done, 1 diverged, 2 bad input, 130 stopped by the user."""
    args = parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            for spec in getattr(args, "method", []):
                if spec.endswith(":help"):
                    print(method_help(spec[: -len(":help")]))
                    return 0
            return train(args)
        except UserError as error:
            print(f"train.py: error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            where = getattr(args, "out", "") or getattr(args, "resume", "") or "runs"
            print(
                f"train.py: error: --out {where}: {error}; choose a writable folder with room",
                file=sys.stderr,
            )
            return 2
        except KeyboardInterrupt:
            print("stopped at once; --resume goes on from the last checkpoint", file=sys.stderr)
            return 130


def method_help(name: str) -> str:
    """The options of one method, or of each member of a composition, for `--method NAME:help`."""
    try:
        interventions.build(name)  # an unknown name or a senseless composition ends here
    except ValueError as error:
        raise UserError(f"--method {name}: {error}") from None
    lines = []
    for key in name.split("+"):
        cls = interventions.METHODS[key]
        lines += [f"{key}: {cls.idea}  ({cls.paper})", ""]
        for option, _, default, text in interventions.hyperparameters(cls):
            lines += textwrap.wrap(
                f"  {f'{option}={default}':<26} {' '.join(text.split())}", 110, subsequent_indent=" " * 29
            )
        lines.append("")
    return "\n".join(lines[:-1])


# ------------------------------------------------------------------------------------------------------------
# 6. Inside another trainer: TRL

OVERRULED = (  # settings of TRL's own objective
    *("loss_type", "epsilon", "epsilon_high", "delta", "scale_rewards", "multi_objective_aggregation"),
    *("importance_sampling_level", "off_policy_mask_threshold", "use_bias_correction_kl"),
    *("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy"),
)


def check_trl(trainer: Any, method: Method) -> None:
    """Raise ValueError, with the remedy, where a method or a GRPOConfig cannot do inside TRL what it says."""
    a, members = trainer.args, getattr(method, "members", [method])
    n, m, rows = a.gradient_accumulation_steps, a.steps_per_generation, a.per_device_train_batch_size
    torn = m > n and n * rows % a.num_generations
    hooks = ("sample", "reset_reference")
    own = {h for h in hooks for x in members if getattr(type(x), h) is not getattr(Method, h)}
    set_too = [f.name for f in fields(a) if f.name in OVERRULED and getattr(a, f.name) != f.default]
    for bad, text in (
        ("sample" in own, "TRL samples, not the method"),
        ("reset_reference" in own, "TRL keeps the reference and the optimizer; use ref_kl"),
        ("proxy_logp" in method.needs, "the logits of the policy that sampled are not kept"),
        ("ref_logp" in method.needs and not a.beta, "give GRPOConfig(beta=1.0), for a reference"),
        (set_too, f"the method makes the objective; leave GRPOConfig.{', '.join(set_too)} at the default"),
        (m % n, f"steps_per_generation={m} must be a multiple of gradient_accumulation_steps={n}"),
        (torn, f"{n * rows} responses per update tear groups of {a.num_generations}"),
        (trainer.aux_loss_enabled or trainer._is_vlm, "router losses and images are not supported"),
    ):
        if bad:
            raise ValueError(f"method {method.key} inside TRL: {text}")
    if method.refill:
        warnings.warn(f"{method.key}: TRL draws no further prompts, so updates shrink", stacklevel=3)


@cache
def trl_trainer() -> type:
    """`trl.GRPOTrainer` with one more argument, `method`: a spec as on the command line, or a Method.

        trainer = trl_trainer()("Qwen/Qwen3-0.6B", reward, GRPOConfig(...), data, method="opefo")

    TRL keeps sampling (transformers or vLLM), rewards, optimizer, ranks and checkpoints; the objective is
    that of `accumulate_gradient`.  What differs from plain TRL:

    - Before the first of an update's `gradient_accumulation_steps` micro-batches, one pass without graph
      scores all of them, on all ranks: the scope of every statistic.  It costs a forward pass, during which
      the logits of one micro-batch exist at once.
    - TRL shuffles the responses of one generation, which tears groups apart where it makes several updates.
      Here rows stay in prompt order.
    - Advantages are the method's (2.1), and so are clip range, aggregation and penalties: a GRPOConfig
      setting that would be overruled is refused.  `beta` only makes TRL keep a reference model, for methods
      that need one.
    - A response is right if its reward, summed over the reward functions, is positive.  One that no function
      scored teaches nothing and is in nobody's baseline.
    - Schedules and draws count optimizer steps.  Evaluation reports TRL's own loss.

    `dapo` drops groups but cannot draw others.  Refused: `mixed_cuts`, `lp_reg`, `prorl`, images, router
    losses. Made for TRL 1.16 (extra `trl`), whose private methods it overrides; imported by this call only.
    """
    from trl import GRPOTrainer
    from trl.trainer.utils import split_tensor_dict

    class EntropyFlowTrainer(GRPOTrainer):
        def __init__(self, *args: Any, method: str | Method = "grpo", **kwargs: Any) -> None:
            if isinstance(method, str):
                name, options = interventions.parse(method)
                method = interventions.build(name, **options)
            super().__init__(*args, **kwargs)
            check_trl(self, method)
            self.method = method

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
            self.scores = super()._calculate_rewards(*args, **kwargs)  # (rows of all ranks, reward functions)
            return self.scores

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            out = super()._generate_and_score_completions(inputs)
            row = torch.arange(len(inputs), device=self.scores.device)
            row += self.accelerator.process_index * len(inputs)
            scores = self.scores[row]  # (B, reward functions), NaN where a function said nothing
            out["reward"] = (scores * self.reward_weights.to(scores.device)).nansum(-1)
            out["group"] = torch.where(scores.isnan().all(-1), -1 - row, row // self.num_generations)
            return out

        def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
            n, m = self.args.gradient_accumulation_steps, self.args.steps_per_generation
            if not self.model.training:
                return super()._prepare_inputs(generation_batch)
            if self._buffered_inputs is None or self._step % (m * self.num_iterations) == 0:
                whole = self._generate_and_score_completions(generation_batch)
                self._buffered_inputs = split_tensor_dict(whole, m)
            i = self._step % m
            if i % n == 0:
                self._plan_update(self._buffered_inputs[i : i + n])
            return self._buffered_inputs[i]

        def _text(self, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor, int]:
            both = [torch.cat([rows[f"prompt_{x}"], rows[f"completion_{x}"]], 1) for x in ("ids", "mask")]
            return *both, rows["completion_ids"].shape[1]

        def _plan_update(self, window: list[dict[str, Tensor]]) -> None:
            """Tokens and plan of an update from all its rows, on all ranks, rank by rank."""
            parts = []
            for rows in window:
                ids, attention, T = self._text(rows)
                with torch.no_grad(), self.accelerator.autocast():
                    out = self.model(input_ids=ids, attention_mask=attention, logits_to_keep=T + 1)
                parts.append(vars(token_stats(out.logits[:, :-1], ids[:, -T:], self.temperature, False)))
            rows = {k: torch.cat([r[k] for r in window]) for k, v in window[0].items() if v.ndim}
            mask = (rows["completion_mask"] * rows.get("tool_mask", 1)).bool() & (rows["group"] >= 0)[:, None]
            ended = torch.isin(rows["completion_ids"], torch.tensor(self.eos_token_ids, device=mask.device))
            strict = self.num_iterations == 1 and len(window) == self.args.steps_per_generation
            ratio = rows.get("importance_sampling_ratio")  # vLLM's mismatch weight, (B, T) or (B, 1)
            stats = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
            tokens = Tokens(rows["completion_ids"], mask, reward=rows["reward"], group=rows["group"], **stats)
            tokens.truncated = ~(ended & mask).any(-1)
            tokens.old_logp = None if strict else rows["old_per_token_logps"]
            tokens.ref_logp = rows.get("ref_per_token_logps")
            tokens.mismatch = None if ratio is None else ratio.expand(mask.shape)
            join, pad = self.accelerator.gather, self.accelerator.pad_across_processes
            self.tokens = tokens._map(lambda v: join(pad(v, dim=1).to(v.dtype)))  # pad makes bool an integer
            step, total, seed = self.state.global_step, self.state.max_steps, self.args.seed
            self.method.progress = Progress(step, total, seed, self.max_completion_length, self.temperature)
            self.plan = plan_update(self.tokens, self.method)

        def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
            if not self.model.training:
                return super()._compute_loss(model, inputs)
            fresh = self._get_per_token_logps_and_entropies(model, *self._text(inputs), compute_entropy=True)
            (B, T), n = fresh[0].shape, self.args.gradient_accumulation_steps
            first = B * (self.accelerator.process_index * n + self._step % n)
            s = slice(first, first + B)
            width = self.plan.adv.shape[1] - T  # another rank may have longer responses
            logp, entropy = (nn.functional.pad(x, (0, width)) for x in fresh[:2])
            tokens = replace(self.tokens.rows(s), logp=logp, entropy=entropy)
            loss, _ = batch_loss(tokens, self.plan.rows(s), self.method)
            return loss * self.accelerator.num_processes  # ranks' gradients are averaged, ours add up

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            if self._step % self.args.gradient_accumulation_steps == 0:  # the update's last micro-batch
                self.method.after_step(self.plan)
                for name, value in {**self.plan.metrics, "entropy": self.plan.entropy}.items():
                    self._metrics["train"][name].append(value)
            return loss

        def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
                torch.save(self.method.state_dict(), folder / "method.pt")

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                self.method.load_state_dict(torch.load(Path(checkpoint) / "method.pt", weights_only=True))

    return EntropyFlowTrainer


if __name__ == "__main__":
    sys.exit(main())
