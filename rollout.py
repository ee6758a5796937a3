"""Chapter 4. Rollouts: problems, a policy that answers them, and rewards that cannot be argued with.

Claim. To see entropy collapse one needs a task in which many different answers are right, a policy that
starts broad, and a verifier.  Seven billion parameters are not needed: a transformer of 0.13 M parameters
shows the collapse in a minute.

    the embedded world   "chain": reach a target in one to three arithmetic steps; 6,348 problems, most with
                         dozens of right answers
    tokenizer, model     a real `transformers` tokenizer and a real Llama, made in code: the 7 B path, smaller
    warm start           supervised learning on random right chains: a policy often wrong and very diverse
    masks                the first EOS belongs to the response and nothing after it does
    sampling             batched, KV-cached, from the exact softmax at a temperature: no top-p, no top-k
    scoring              log π, H, Σp², Σp² log p of every response token, through entropy_math's chunked head

Left out, compared with a production engine: stop strings, paged attention, and continuous batching beyond
dropping rows that ended.  Run `python rollout.py` to see problems, answers, and where the policy is unsure.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from entropy_math import TokenStats, head_token_stats

# ------------------------------------------------------------------------------------------------------------
# 1. Problems


@dataclass(frozen=True)
class Problem:
    """One prompt and what counts as right: the text that the policy sees, and the reference answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """Problems with a verifier.

    `verify(responses, problems)` says of each response, in order, whether it solves its problem, and never
    raises; `signature(response)` maps responses that are the same answer written differently to one string,
    so that distinct right answers can be counted.
    """

    name: str
    train: tuple[Problem, ...]
    test: tuple[Problem, ...]  # held out
    hard: tuple[Problem, ...]  # held out, fewest solutions
    verify: Callable[[Sequence[str], Sequence[Problem]], list[bool]]
    signature: Callable[[str], str]
    max_new_tokens: int


# ------------------------------------------------------------------------------------------------------------
# 2. The embedded world: chain
#
#   prompt     3 5 7 9 -> 41               four allowed numbers and a target
#   response   5 * 7 35 + 9 44 - 3 41      an allowed number, then one to three times:
#                                          operator, allowed number, result
#
# Numbers may be used again; every result must be right and lie in 0..99; the last one must be the target.  A
# response has 4, 7 or 10 tokens and an EOS.  The median problem has dozens of solutions, so diversity means
# something; a problem with three solutions is hard.  Each number 0..99 is one token: arithmetic is a table
# that the model can learn in seconds.

OPERATORS = ("+", "-", "*")
MAX_OPS = 3
NUMBERS, TARGETS = range(1, 10), range(10, 61)
PAD, EOS, ARROW = "<pad>", "<eos>", "->"
VOCABULARY = (PAD, EOS, ARROW, *OPERATORS, *map(str, range(100)))


def chain_verify(response: str, problem: Problem) -> bool:
    """True iff the response is a right chain for the problem.  Any string is fine; nothing is ever raised."""
    words, prompt = response.split(), problem.prompt.split()
    allowed, target = set(prompt[:4]), problem.answer
    if len(words) not in range(4, 3 * MAX_OPS + 2, 3) or words[0] not in allowed or words[-1] != target:
        return False
    value = int(words[0])
    for op, b, c in zip(words[1::3], words[2::3], words[3::3]):
        if op not in OPERATORS or b not in allowed:
            return False
        value = {"+": value + int(b), "-": value - int(b), "*": value * int(b)}[op]
        if not 0 <= value <= 99 or c != str(value):
            return False
    return True


@cache
def chain_solutions() -> tuple[tuple[Problem, ...], np.ndarray, np.ndarray]:
    """Every problem, every solution, by enumeration of all chains (under a second).

    Returns the P problems, sorted; solutions as (S, 11) token ids with EOS and padding, sorted by problem
    and, within a problem, by length; and the (P, 4) offsets: solutions of problem p with k operations are
    rows offset[p, k-1] : offset[p, k].
    """
    ids = {w: i for i, w in enumerate(VOCABULARY)}
    num, ops = ids["0"], [ids[o] for o in OPERATORS]
    subsets = np.array(
        [(a, b, c, d) for a in NUMBERS for b in NUMBERS for c in NUMBERS for d in NUMBERS if a < b < c < d]
    )
    which = np.repeat(np.arange(len(subsets)), 4)
    value = subsets.reshape(-1).astype(np.int64)
    text = (value + num)[:, None]  # (n, tokens so far)
    found = []
    for k in range(1, MAX_OPS + 1):
        n = len(which)
        which, value, text = (np.repeat(x, 12, axis=0) for x in (which, value, text))
        op, pick = np.tile(np.repeat(np.arange(3), 4), n), np.tile(np.arange(4), 3 * n)
        b = subsets[which, pick]
        value = np.select([op == 0, op == 1], [value + b, value - b], value * b)
        text = np.concatenate([text, np.stack([np.array(ops)[op], b + num, value + num], 1)], 1)
        ok = (value >= 0) & (value <= 99)
        which, value, text = which[ok], value[ok], text[ok]
        hit = (value >= TARGETS.start) & (value < TARGETS.stop)
        rows = np.full((hit.sum(), 3 * MAX_OPS + 2), ids[PAD], dtype=np.int64)
        rows[:, : text.shape[1]] = text[hit]
        rows[:, text.shape[1]] = ids[EOS]
        found.append((which[hit] * 100 + value[hit], np.full(hit.sum(), k), rows))
    key, length, rows = (np.concatenate(x) for x in zip(*found))
    order = np.lexsort((length, key))
    key, length, rows = key[order], length[order], rows[order]
    names = np.unique(key)
    problems = tuple(
        Problem(" ".join(map(str, subsets[x // 100])) + f" {ARROW} {x % 100}", str(x % 100)) for x in names
    )
    start = np.searchsorted(key * 4 + length, names[:, None] * 4 + np.arange(1, MAX_OPS + 2)[None])
    return problems, rows, start


def _held_out(problem: Problem) -> bool:
    """One problem in five, by a hash of its prompt: the split does not depend on any seed."""
    return hashlib.sha256(problem.prompt.encode()).digest()[0] < 51


@cache
def chain_task(size: int = 96) -> Task:
    """The embedded task.  `test` are `size` held-out problems in hash order, `hard` those with the fewest
    solutions."""
    problems, _, start = chain_solutions()
    count = dict(zip(problems, start[:, -1] - start[:, 0]))
    held = sorted(filter(_held_out, problems), key=lambda p: hashlib.sha256(p.prompt.encode()).digest())
    return Task(
        name="chain",
        train=tuple(p for p in problems if not _held_out(p)),
        test=tuple(held[:size]),
        hard=tuple(sorted(held, key=lambda p: (count[p], p.prompt))[:size]),
        verify=lambda responses, problems: list(map(chain_verify, responses, problems)),
        signature=lambda response: " ".join(response.split()),
        max_new_tokens=3 * MAX_OPS + 2,
    )


# ------------------------------------------------------------------------------------------------------------
# 3. Tokenizer and model


def tiny_tokenizer() -> Any:
    """A word-level `PreTrainedTokenizerFast` over the chain vocabulary; words are separated by blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS, padding_side="left")


@dataclass(frozen=True)
class TinyModel:
    """Shape of the embedded policy, a Llama.  head_dim is 32, the least that vLLM accepts.

    Not a Qwen2: `AutoTokenizer` gives every folder of that model type a byte-level Qwen2 tokenizer, whatever
    tokenizer was saved there, and a checkpoint must load as it is.
    """

    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 2

    def build(self, tokenizer: Any, seed: int) -> nn.Module:
        """A Llama with random weights drawn from `seed`; global random state is left as it was."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=len(tokenizer),
            num_key_value_heads=self.num_attention_heads,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            **asdict(self),
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(config)


# ------------------------------------------------------------------------------------------------------------
# 4. Masks


def response_mask(ids: Tensor, eos: int | Sequence[int]) -> Tensor:
    """(B, T) bool: True up to and including the first EOS, False after it.  (B, T) ids.

    The EOS itself is an action and is trained.  Built from the *position* of the first EOS, never from "is
    not pad", so that a model whose pad token is its EOS token loses nothing.  A row without EOS is True
    throughout.
    """
    stops = torch.tensor([eos] if isinstance(eos, int) else list(eos), device=ids.device)
    is_eos = torch.isin(ids, stops)
    return is_eos.cumsum(-1) - is_eos.long() == 0


# ------------------------------------------------------------------------------------------------------------
# 5. Sampling


@dataclass
class Rollout:
    """One generation phase: P prompts, n responses each, B = P n rows; row i answers prompt i // n."""

    prompt_ids: list[list[int]]  # P prompts, no padding
    ids: Tensor  # (B, T) response tokens, pad after the first EOS
    mask: Tensor  # (B, T) bool
    rollout_logp: Tensor  # (B, T) the engine's own log-probability of each token, 0 where masked
    group: Tensor  # (B,) prompt number
    truncated: Tensor  # (B,) bool: no EOS before the length limit
    entropy: Tensor | None = None  # (B, T) H of the distribution each token was drawn from, if asked for
    texts: list[str] = field(default_factory=list)  # B decoded responses
    correct: Tensor | None = None  # (B,) bool, what the verifier said

    def full_ids(self, pad: int) -> tuple[Tensor, Tensor]:
        """Prompt and response in one row, padded on the right only.

        Returns ids (B, L) and start (B,), the position whose hidden state predicts the first response token.
        With padding on the right a causal model needs no attention mask at all: no real token ever looks at a
        pad.
        """
        n = len(self.ids) // len(self.prompt_ids)
        length = torch.tensor([len(p) for p in self.prompt_ids])
        width = int(length.max()) + self.ids.shape[1]
        out = torch.full((len(self.prompt_ids), width), pad)
        for row, prompt in zip(out, self.prompt_ids):
            row[: len(prompt)] = torch.tensor(prompt)
        length = length.repeat_interleave(n)  # (B,)
        out = out.repeat_interleave(n, 0).to(self.ids.device)
        columns = length.to(out.device)[:, None] + torch.arange(self.ids.shape[1], device=out.device)
        out.scatter_(1, columns, torch.where(self.mask, self.ids, pad))
        return out, length.to(out.device) - 1


SampleHook = Callable[
    [Tensor, int, Tensor, "torch.Generator | None"], "tuple[Tensor, Tensor] | Tensor | None"
]


class Engine(Protocol):
    """What turns prompts into responses.  Two exist: `TorchEngine`, our own loop on the model that is
    trained, and `VllmEngine`, which has a copy of it."""

    tokenizer: Any
    device: torch.device  # of its generators and of what it returns

    def sample(
        self,
        prompt_ids: list[list[int]],
        n: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        hook: SampleHook | None = None,
        entropy: bool = False,
    ) -> Rollout:
        """n responses to each prompt.  All randomness comes from `generator`, which lives on `device`.

        `hook` and `entropy` as in the function `sample`.  An engine that cannot run a hook raises ValueError;
        one that does not see the whole distribution gives -log π of the drawn token where `entropy` asks for
        H: in expectation over the draw the two are equal.
        """

    def push(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """New weights, all of them, under their `transformers` names."""

    def sleep(self) -> None:
        """Make room for an update on the same device: the next call is `wake`, or `push` and `wake`."""

    def wake(self) -> None:
        """Ready to sample again."""

    def close(self) -> None:
        """Give everything back."""


def stop_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Every token that ends a response: the tokenizer's EOS and those of the model's generation config (chat
    models have several)."""
    config = getattr(model, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    more = [more] if isinstance(more, int) else list(more or [])
    found = dict.fromkeys([tokenizer.eos_token_id, *more])
    return [i for i in found if i is not None]


@dataclass
class TorchEngine:
    """`sample` on the model that is trained: nothing to push, nothing to put to sleep.  Works everywhere, and
    is the faster one for tiny models."""

    model: nn.Module
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def sample(
        self,
        prompt_ids: list[list[int]],
        n: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        hook: SampleHook | None = None,
        entropy: bool = False,
    ) -> Rollout:
        eos, pad = stop_tokens(self.model, self.tokenizer), self.tokenizer.pad_token_id
        how = (temperature, top_p, generator, hook, entropy)
        return sample(self.model, prompt_ids, n, max_new_tokens, eos, pad, *how)

    def push(self, named: Iterable[tuple[str, Tensor]]) -> None:
        pass  # the model itself was trained

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits with all but the smallest set of tokens that holds `top_p` of the probability at -inf.  (B, V).

    Evaluation only: the gradient of a policy that was sampled from a nucleus but scored without is biased.
    """
    ordered, index = logits.sort(-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all likelier tokens
    return logits.masked_fill((before >= top_p).scatter(-1, index, before >= top_p), -torch.inf)


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt_ids: list[list[int]],
    n: int,
    max_new_tokens: int,
    eos: int | Sequence[int],
    pad: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    hook: SampleHook | None = None,
    entropy: bool = False,
) -> Rollout:
    """n responses to each prompt, from softmax(z/τ) exactly (its nucleus where top_p < 1).  Every prompt is
    read once, its KV cache shared by n rows.

    `entropy` also keeps the exact full-vocabulary entropy at every token.  Our own loop beats `generate`
    because it stops paying for rows that ended: whenever a quarter of the living rows has ended, their cache
    is dropped.  `hook` may choose the tokens instead: it returns ids, and `rollout_logp` is the policy's
    log-probability, or (ids, log-probabilities of its own distribution) as CUTS does, or None to leave the
    token alone.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    tokens, attend = _left_pad(prompt_ids, pad, device)  # (P, L)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    past = DynamicCache(config=model.config)
    ragged = not bool(attend.all())
    position = (attend.cumsum(-1) - 1).clamp(min=0) if ragged else None
    hidden = decoder(
        tokens,
        attention_mask=attend if ragged else None,
        position_ids=position,
        past_key_values=past,
        use_cache=True,
    )
    hidden = hidden.last_hidden_state[:, -1].repeat_interleave(n, 0)  # (B, D)
    if n > 1:
        past.batch_repeat_interleave(n)
    attend, length = attend.repeat_interleave(n, 0), attend.sum(-1).repeat_interleave(n)
    batch = len(hidden)
    rows = torch.arange(batch, device=device) % n  # each row's number among its prompt's responses
    ids = torch.full((batch, max_new_tokens), pad, device=device)
    logp = torch.zeros(batch, max_new_tokens, device=device)
    nats = torch.zeros_like(logp) if entropy else None
    alive = torch.arange(batch, device=device)  # rows of the output that the cache still holds
    running = torch.ones(batch, dtype=torch.bool, device=device)  # (alive,) has not ended
    stops = torch.tensor([eos] if isinstance(eos, int) else list(eos), device=device)
    for t in range(max_new_tokens):
        logits = head(hidden).float() / temperature  # (alive, V)
        if top_p < 1:
            logits = nucleus(logits, top_p)
        logprob = logits.log_softmax(-1)
        if bool(logprob.isnan().any()):  # multinomial would die of it with less to say
            raise FloatingPointError("the policy's probabilities are NaN: its weights have diverged")
        drawn = hook(logits, t, rows[alive], generator) if hook else None
        if drawn is None:
            drawn = torch.multinomial(logprob.exp(), 1, generator=generator)[:, 0]
        chosen, behaviour = (
            drawn if isinstance(drawn, tuple) else (drawn, logprob.gather(-1, drawn[:, None])[:, 0])
        )
        ids[alive[running], t] = chosen[running]
        logp[alive[running], t] = behaviour[running]
        if nats is not None:
            nats[alive, t] = -torch.where(logprob > -torch.inf, logprob.exp() * logprob, 0).sum(-1)
        running = running & ~torch.isin(chosen, stops)
        left = int(running.sum())
        if left == 0 or t == max_new_tokens - 1:
            break
        if left <= 0.75 * len(running):
            index = running.nonzero()[:, 0]
            past.batch_select_indices(index)
            alive, chosen, attend, running = alive[index], chosen[index], attend[index], running[index]
        if ragged:
            attend = torch.cat([attend, attend.new_ones(len(attend), 1)], 1)
            position = (length[alive] + t)[:, None]
        step = decoder(
            chosen[:, None],
            attention_mask=attend if ragged else None,
            position_ids=position,
            past_key_values=past,
            use_cache=True,
        )
        hidden = step.last_hidden_state[:, -1]
    mask = response_mask(ids, eos) & (torch.arange(max_new_tokens, device=device) <= t)
    group = torch.arange(len(prompt_ids), device=device).repeat_interleave(n)
    truncated = ~torch.isin(torch.where(mask, ids, -1), stops).any(-1)
    cut = slice(0, t + 1)
    nats = None if nats is None else nats[:, cut]
    return Rollout(prompt_ids, ids[:, cut], mask[:, cut], logp[:, cut], group, truncated, nats)


def _left_pad(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(P, L) ids and attention mask, padded on the left, so that the last column is every prompt's last
    token."""
    if not prompts or not all(prompts):
        raise ValueError(
            "every prompt needs at least one token: an empty prompt gives the policy nothing to condition on"
        )
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    for row, p in zip(ids, prompts):
        row[width - len(p) :] = torch.tensor(p)
    lengths = torch.tensor([len(p) for p in prompts])
    return ids.to(device), (torch.arange(width) >= width - lengths[:, None]).long().to(device)


def answer(
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    n: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    hook: SampleHook | None = None,
    entropy: bool = False,
) -> Rollout:
    """Text in, text out: n responses to each problem, decoded and verified."""
    prompts = engine.tokenizer([p.prompt for p in problems], add_special_tokens=False)["input_ids"]
    out = engine.sample(prompts, n, task.max_new_tokens, temperature, top_p, generator, hook, entropy)
    out.texts = engine.tokenizer.batch_decode(out.ids, skip_special_tokens=True)
    right = task.verify(out.texts, [p for p in problems for _ in range(n)])
    out.correct = torch.tensor(right, device=out.ids.device)
    return out


# ------------------------------------------------------------------------------------------------------------
# 6. Scoring


def score(
    model: nn.Module,
    full_ids: Tensor,
    start: Tensor,
    ids: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    chunk: int | None = 2**22,
) -> TokenStats:
    """log π, H, Σp² and Σp² log p of every response token, each (B, T), 0 where masked.

    full_ids (B, L) and start (B,) as `Rollout.full_ids` makes them; ids, mask (B, T).  Only the hidden states
    of response tokens, packed, go through the output head, in chunks: no (B, T, V) tensor exists.
    """
    used = int((start + 1 + mask.sum(-1)).max())
    hidden = model.get_decoder()(full_ids[:, : used - 1], use_cache=False).last_hidden_state  # (B, L', D)
    row, col = mask.nonzero(as_tuple=True)  # (N,)
    head = model.get_output_embeddings()
    packed = hidden[row, start[row] + col]  # (N, D)
    stats = head_token_stats(packed, head.weight, ids[row, col], temperature, head.bias, chunk, entropy_grad)
    return stats.map(lambda x: x.new_zeros(mask.shape).index_put((row, col), x))


# ------------------------------------------------------------------------------------------------------------
# 7. Warm start


@dataclass(frozen=True)
class WarmStart:
    """How the embedded policy is prepared: supervised learning on right chains, drawn at random.

    It ends early on purpose.  What is wanted is not a good policy but a broad one: often wrong (pass@1 about
    .2), with almost every problem solved by some of 32 samples.
    """

    steps: int = 450
    batch: int = 256
    lr: float = 4e-3
    decay_steps: int = 900  # linear decay towards here, so training stops at half of the peak rate
    seed: int = 0

    def draw(self, generator: torch.Generator) -> Tensor:
        """(batch, 6 + 11) token ids: a training problem uniformly, a length uniformly among those it has, a
        solution."""
        problems, rows, start = chain_solutions()
        prompts, train = _train_prompts()
        pick = train[torch.randint(len(train), (self.batch,), generator=generator)]  # (batch,)
        offset = torch.from_numpy(start)[pick]  # (batch, 4)
        count = offset.diff(dim=1)  # (batch, 3)
        k = torch.multinomial((count > 0).float(), 1, generator=generator)
        u = torch.rand(self.batch, 1, generator=generator, dtype=torch.float64)
        index = offset.gather(1, k) + (u * count.gather(1, k)).long()
        return torch.cat([prompts[pick], torch.from_numpy(rows)[index[:, 0]]], 1)


@cache
def _train_prompts() -> tuple[Tensor, Tensor]:
    """(P, 6) token ids of all prompts, and the indices of the training problems."""
    problems, _, _ = chain_solutions()
    ids = {w: i for i, w in enumerate(VOCABULARY)}
    prompts = torch.tensor([[ids[w] for w in p.prompt.split()] for p in problems])
    return prompts, torch.tensor([i for i, p in enumerate(problems) if not _held_out(p)])


def supervised(
    model: nn.Module, how: WarmStart, progress: Callable[[Iterable[int]], Iterable[int]] = iter
) -> float:
    """Minimise the cross-entropy of right chains; returns the last batch's loss in nats per token."""
    generator = torch.Generator().manual_seed(how.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.lr, betas=(0.9, 0.95), weight_decay=0.0)
    width = _train_prompts()[0].shape[1]
    pad, eos = VOCABULARY.index(PAD), VOCABULARY.index(EOS)
    model.train()
    for step in progress(range(how.steps)):
        for group in optimizer.param_groups:
            group["lr"] = how.lr * min(1.0, (step + 1) / 20) * (1 - step / how.decay_steps)
        full = how.draw(generator)
        ids = full[:, width:]
        stats = score(model, full, torch.full((len(full),), width - 1), ids, response_mask(ids, eos))
        loss = -stats.logp.sum() / (ids != pad).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return float(loss.detach())


# What the warm weights depend on besides WarmStart, TinyModel and the library versions: this code.
_DETERMINES = (
    chain_solutions.__wrapped__,
    _held_out,
    tiny_tokenizer,
    TinyModel,
    WarmStart,
    supervised,
    score,
    response_mask,
)


def cache_folder() -> Path:
    """Where warm starts are kept: $ENTROPY_FLOW_CACHE, else $XDG_CACHE_HOME/entropy-flow, else
    ~/.cache/entropy-flow."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("ENTROPY_FLOW_CACHE") or Path(base) / "entropy-flow")


def warm_policy(
    how: WarmStart = WarmStart(),
    shape: TinyModel = TinyModel(),
    folder: Path | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[nn.Module, Any]:
    """The embedded policy after its warm start, float32 on the CPU, and its tokenizer.  Made once, then read
    from a cache.

    The cache key is a hash of the settings, the shape, the code that trains, the library versions and the
    number of threads (which changes rounding).  A cached file that cannot be read is made anew; a cache that
    cannot be written costs the next run half a minute and is reported, not fatal.
    """
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    tokenizer = tiny_tokenizer()
    model = shape.build(tokenizer, how.seed).eval()
    recipe = [asdict(how), asdict(shape), VOCABULARY, [inspect.getsource(x) for x in _DETERMINES]]
    recipe += [
        torch.__version__,
        transformers.__version__,
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
    ]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    path = (folder or cache_folder()) / f"warm-{key}.safetensors"
    try:
        missing = model.load_state_dict(load_file(path), strict=False).missing_keys
        if missing == ["lm_head.weight"]:  # the tied head is stored once
            return model, tokenizer
        raise ValueError(f"tensors are missing, {missing[0]} for one")
    except FileNotFoundError:
        pass  # the usual first run
    except Exception as error:  # a truncated file: safetensors has its own error class
        reason = str(error).splitlines()[0]
        print(f"warm start: {path} cannot be read ({reason}); making it anew", file=sys.stderr)
        model = shape.build(tokenizer, how.seed).eval()  # a part of the file may have been loaded already
    supervised(model, how, progress)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file({k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}, part)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        print(
            f"warm start: not cached in {path.parent} ({error}); set ENTROPY_FLOW_CACHE to a writable folder",
            file=sys.stderr,
        )
    return model, tokenizer


# ------------------------------------------------------------------------------------------------------------
# 8. Demonstration


def main() -> None:
    """Show three problems, what the warm policy answers, and how uncertain it is at each token."""
    from tqdm import tqdm

    task = chain_task()
    _, _, start = chain_solutions()
    count = start[:, -1] - start[:, 0]
    print(f"{len(count)} problems, {len(task.train)} for training; median solutions: {np.median(count):.0f}")
    model, tokenizer = warm_policy(progress=lambda it: tqdm(it, desc="warm start", unit="step"))
    generator = torch.Generator().manual_seed(0)
    engine = TorchEngine(model, tokenizer)
    out = answer(engine, task, task.test[:3], 6, generator=generator, entropy=True)
    print("\nresponses, and the entropy at each of their tokens, nats")
    for i, text in enumerate(out.texts):
        if i % 6 == 0:
            print(f"\n{task.test[i // 6].prompt}")
        nats = " ".join(f"{h:.1f}" for h in out.entropy[i][out.mask[i]].tolist())
        print(f"  {'right' if out.correct[i] else 'wrong'}  {text:<28} {nats}")
    print("\nMost entropy is where there is a choice: start, operand, operator, whether to stop.  A result")
    print("leaves none: what entropy it has says that the warm policy is not yet sure of its arithmetic.")


if __name__ == "__main__":
    main()
