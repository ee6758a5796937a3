"""Chapters 4 and 5 at scale: other people's models and problems, micro-batches by token budget, bfloat16 with
float32 masters, LoRA, several processes, checkpoints that outlive them.

Everything runs on models that the tests make: byte-level tokenizers, random weights, two gloo processes.
"""

import csv
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import test_train
import torch
from conftest import without_clock
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import draw_batch, gradient, short_answers, small_world, update

import eval
import grpo
import rollout
import train
from grpo import Policy, Tokens, _attention, concat_padded
from interventions import build
from rollout import Problem, Sampling, hold_out, load_model, read_problems, render, task_of_data
from train import Passes, Ranks, Settings

ROOT = Path(train.__file__).parent


def byte_tokenizer(**special):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def llama(tokenizer, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": None, "bos_token_id": None, "eos_token_id": 1}
    more = {"num_key_value_heads": 1, "max_position_embeddings": 256, "tie_word_embeddings": False}
    config = LlamaConfig(**{**shape, **tokens, **more, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("model"), byte_tokenizer()
    llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"problem": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(6) for b in range(6)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


# ------------------------------------------------------------------------------------------------------------
# Models


def test_a_folder_loads_as_transformers_saved_it(model_folder):
    model, tokenizer = load_model(str(model_folder))
    ids = torch.arange(3, 40)[None]
    assert torch.equal(model(ids).logits, llama(byte_tokenizer())(ids).logits) and not model.training
    assert tokenizer.decode(tokenizer("a b")["input_ids"]) == "a b"
    assert load_model(str(model_folder), "bfloat16")[0].dtype == torch.bfloat16


def test_a_tokenizer_without_pad_pads_with_its_eos(tmp_path):
    tokenizer = byte_tokenizer(pad_token=None)
    llama(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    got = load_model(str(tmp_path))[1]
    assert got.pad_token_id == got.eos_token_id == 1


def built(kind, **changes):
    """A tiny causal LM of a model type, with random weights far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "max_position_embeddings": 128, "vocab_size": 259}
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 1}
    config = AutoConfig.for_model(kind, **{**shape, **more, **tokens, **changes})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        try:
            model = AutoModelForCausalLM.from_config(config)
        except ValueError:  # no sdpa
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.mul_(6.0) if p.ndim > 1 else p.add_(0.3 * torch.randn_like(p))
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    def save(model):
        model.save_pretrained(tmp_path / "model")
        byte_tokenizer().save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
NESTED = {
    "text_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
                    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 259,
                    "attention_dropout": 0.5},
    "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
    "mm_tokens_per_image": 1, "image_token_index": 250, "boi_token_index": 251, "eoi_token_index": 252,
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, random",
    [
        ("gpt2", {"resid_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("opt", {"layerdrop": 0.5, "dropout": 0.5, "ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("mixtral", {"router_jitter_noise": 0.5, "num_local_experts": 4}),
        ("gemma3", NESTED),
    ],
)
def test_what_is_random_in_training_mode_is_switched_off(saved, kind, random):
    model, ids = load_model(saved(built(kind, **random)))[0].train(), torch.arange(3, 40)[None]
    want = model(ids).logits
    assert all(torch.equal(model(ids).logits, want) for _ in range(3))


LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_n_groups": 1}
EVERY_CACHE = [
    ("llama", {}),
    ("lfm2", {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 16}),
    ("falcon_h1", {**MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8}),
    ("bamba", {**MAMBA, "mamba_d_head": 16, "attn_layer_indices": [1]}),  # forgets the cache's length
    ("qwen3_5_text", {**LINEAR, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                      "linear_value_head_dim": 16, "head_dim": 16}),
    ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4,
                 "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    ("bloom", {"n_layer": 2, "n_head": 2}),
]  # fmt: skip


@pytest.mark.parametrize("kind, shape", EVERY_CACHE)
def test_every_kind_of_cache_samples_and_scores_the_unpadded_model(saved, capsys, kind, shape):
    """Recurrent layers, sliding windows and attention sinks; ragged prompts and equal ones; rows that end
    early; models that have no sdpa attention are loaded with eager, which is said."""
    model = load_model(saved(built(kind, **shape)))[0]
    assert ("eager" in capsys.readouterr().err) == (kind in ("gpt_oss", "bloom"))
    for prompts in ([[5, 4, 3, 9, 7]], [[5, 4, 3], [7], [*range(20, 31)], [9, 9]]):
        stops = list(range(0, 259, 4))
        generator = torch.Generator().manual_seed(0)
        model.generation_config.eos_token_id = stops
        out = rollout.TorchEngine(model, byte_tokenizer()).sample(prompts, Sampling(3, 10), generator)
        with torch.no_grad():
            scored = Policy(model)(out)["logp"]
        for i, (ids, mask) in enumerate(zip(out.ids, out.mask)):
            prompt, drawn = prompts[i // 3], ids[mask]
            with torch.no_grad():
                z = model(torch.tensor([prompt + drawn.tolist()]), use_cache=False).logits[0]
            want = z.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, drawn[:, None])[:, 0]
            torch.testing.assert_close(out.rollout_logp[i][mask], want, rtol=0, atol=1e-3)
            torch.testing.assert_close(scored[i][mask], want, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "kind, shape, words",
    [
        ("mamba", {"state_size": 8}, "padded on the left"),  # multiplies one state by a whole mask
        ("minimax", {"layer_types": ["linear_attention", "full_attention", "linear_attention"],
                     "num_local_experts": 2, "head_dim": 16}, "cannot be sampled"),  # a cache of its own
    ],
)  # fmt: skip
def test_a_model_whose_cache_does_not_serve_is_refused(saved, kind, shape, words):
    with pytest.raises(ValueError, match=words) as error:
        load_model(saved(built(kind, **shape)))
    assert "\n" not in str(error.value)


def test_special_tokens_that_the_model_does_not_know(saved):
    """Tokens were added without rows for them: a pad is replaced, without an EOS no response could end."""
    folder = saved(llama(byte_tokenizer()))
    byte_tokenizer(pad_token="<new>").save_pretrained(folder)
    assert load_model(folder)[1].pad_token_id == 1
    byte_tokenizer(eos_token="<new>").save_pretrained(folder)
    with pytest.raises(ValueError, match="EOS"):
        load_model(folder)


def no_config(folder):
    (folder / "config.json").unlink()


def only_pickles(folder):
    torch.save(llama(byte_tokenizer()).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def damaged(folder):
    (folder / "model.safetensors").write_bytes(b"x" * 100)


def no_eos(folder):
    byte_tokenizer(eos_token=None).save_pretrained(folder)


def soft_capped(folder):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 259}
    config = Gemma2Config(**shape, **more, final_logit_softcapping=0.05)
    Gemma2ForCausalLM(config).save_pretrained(folder)


def scaled(folder):
    from transformers import CohereConfig, CohereForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    CohereForCausalLM(CohereConfig(**shape, vocab_size=259, logit_scale=16.0)).save_pretrained(folder)


@pytest.mark.parametrize(
    "spoil, words",
    [(no_config, "config.json"), (only_pickles, "safetensors"), (damaged, "cannot be loaded"),
     (no_eos, "EOS"), (soft_capped, "capping"), (scaled, "scaling")],
)  # fmt: skip
def test_what_is_no_usable_model_is_refused_with_the_reason(model_folder, tmp_path, spoil, words):
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        load_model(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "/nowhere", "nothing"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ValueError, match="no such folder"):
        load_model(name)


# ------------------------------------------------------------------------------------------------------------
# Problems


@pytest.mark.parametrize(
    "row, problem, answer",
    [
        ({"problem": "p", "answer": "1"}, "p", "1"),
        ({"question": "p", "answer": "work #### 18"}, "p", "18"),
        ({"prompt": [{"role": "user", "content": "p"}],
          "reward_model": {"ground_truth": "34", "style": "rule"}}, "p", "34"),
        ({"problem": "p", "solution": r"so $x$ is \boxed{\frac{1}{2}}."}, "p", r"\frac{1}{2}"),
        ({"problem": "p", "final_answer": ["1", "2"]}, "p", "1, 2"),
        ({"problem": "p", "answer": 7, "solution": "ignored"}, "p", "7"),
        ({"problem": "p", "answer": None, "expected_answer": "x"}, "p", "x"),
    ],
)  # fmt: skip
def test_the_usual_field_names_are_understood(tmp_path, row, problem, answer):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n\n")
    problems, notes = read_problems(str(path))
    assert problems == [Problem(problem, answer)] and "1 problems" in notes[0]


def test_unusable_rows_are_counted_and_named_and_only_fatal_together(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = ["{", "[1]", '{"problem": "p"}', '{"answer": "1"}', '{"problem": " ", "answer": "1"}']
    path.write_text("\n".join([*bad, '{"problem": "p", "answer": "1"}']))
    problems, notes = read_problems(str(path))
    assert len(problems) == 1 and "5 unusable" in notes[1] and "2 reasons more" in notes[1]
    assert "line 1: not a JSON object; convert to JSONL (1 in all); line 2: " in notes[1]
    path.write_text("\n".join(bad))
    with pytest.raises(ValueError, match="no usable row.*line 1"):
        read_problems(str(path))
    with pytest.raises(ValueError, match="no such file"):
        read_problems(str(tmp_path / "b.jsonl"))


def test_a_line_ends_at_a_newline_only_and_what_is_no_answer_is_left_out(tmp_path):
    """U+2028 and U+0085 stand in scraped text; str.splitlines would cut the row in two."""
    path = tmp_path / "a.jsonl"
    rows = [
        {"problem": "p\u2028q\u0085r\x0bs", "answer": "1"},
        {"problem": "p", "answer": "So it goes. " * 80},
    ]
    lines = [json.dumps(r, ensure_ascii=False).encode() for r in rows]
    lines += [b'{"problem": "p", "answer": NaN}', b'{"problem": "\xff", "answer": "1"}']
    path.write_bytes(b"\n".join(lines))
    problems, notes = read_problems(str(path))
    assert problems == [Problem("p\u2028q\u0085r\x0bs", "1")]
    assert "line 2: 'answer' has over 500" in notes[1] and "line 3" in notes[1] and "line 4" in notes[1]


def turns(*said):
    return [{"role": role, "content": content} for role, content in said]


def lines_of(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_a_chat_of_one_turn_is_a_question_and_a_longer_one_is_not(tmp_path):
    rows = [{"prompt": turns(("user", "p")), "answer": "1"}, {"prompt": "q", "answer": "2"}]
    bad = [
        turns(("system", "s"), ("user", "p")), turns(("user", "a"), ("assistant", "b"), ("user", "c")),
        turns(("tool", "a")), turns(("user", [{"type": "image"}])), turns(("user", None)),
        ["a", "b"], {"a": 1},
    ]  # fmt: skip
    rows += [{"prompt": p, "answer": "3"} for p in bad]
    problems, notes = read_problems(lines_of(tmp_path / "a.jsonl", rows))
    assert problems == [Problem("p", "1"), Problem("q", "2")]
    assert "7 unusable rows left out: line 3: 'prompt' is neither text nor one turn of a user" in notes[1]


def test_what_is_not_one_answer_is_left_out(tmp_path):
    rows = [
        {"problem": "a", "answer": [["1", "2"], ["3"]]},
        {"problem": "b", "reward_model": {"ground_truth": {"x": 1}}},
        {"problem": "c", "solution": "First we add, then we are done."},
        {"problem": "d", "answer": "1"},
        {"problem": "d", "answer": "2"},
        {"problem": "d", "answer": "1"},
        {"problem": "e", "answer": "1,200"},
        {"problem": "e", "answer": "$1200$"},
        {"problem": "f", "answer": "x"},
        {"problem": "f", "answer": "x"},
        {"problem": "g", "answer": ["1", None]},
    ]
    problems, notes = read_problems(lines_of(tmp_path / "a.jsonl", rows))
    assert [p.prompt for p in problems] == ["e", "e", "f", "f"] and "7 unusable rows" in notes[1]
    assert "line 4: its question has another answer too (3 in all)" in notes[1]
    assert "line 1: 'answer' is nested" in notes[1]
    with pytest.raises(ValueError, match="a worked solution is not an answer"):
        read_problems(lines_of(tmp_path / "c.jsonl", rows[2:3]))


def test_an_array_after_a_byte_order_mark_is_read_and_one_in_a_jsonl_names_the_remedy(tmp_path):
    rows = json.dumps([{"problem": "1 + 1?", "answer": "2"}]).encode()
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + rows)
    assert read_problems(str(tmp_path / "a.json"))[0] == [Problem("1 + 1?", "2")]
    (tmp_path / "a.jsonl").write_bytes(rows)
    with pytest.raises(ValueError, match="one array has to be called .json"):
        read_problems(str(tmp_path / "a.jsonl"))


def test_the_fingerprint_sees_a_matrix_in_the_middle(tmp_path):
    """A merged adapter leaves the embedding, which comes first, and the last norm as they were."""
    from safetensors.torch import save_file

    found = set()
    for value in (0.0, 1.0):
        layer = torch.full((512, 256), value)
        weights = {"a": torch.zeros(512, 1024), "b": layer, "c": torch.zeros(512, 1024)}
        save_file(weights, tmp_path / "model.safetensors")
        found.add(eval.fingerprint(tmp_path))
    assert len(found) == 2


def test_json_csv_and_parquet_files_tell_the_same(tmp_path, monkeypatch):
    rows = [{"problem": 'p, "q"\nr', "answer": "018"}, {"problem": "1 + 1?", "answer": None}]
    rows += [{"problem": "2 + 2?", "answer": "4"}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    lines_of(tmp_path / "lines.json", rows)
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["problem", "answer"], *(r.values() for r in rows)])
    want = [Problem('p, "q"\nr', "018"), Problem("2 + 2?", "4")]
    for name, place in (("a.json", "row 2"), ("lines.json", "line 2"), ("a.csv", "row 2")):
        problems, notes = read_problems(str(tmp_path / name))
        assert problems == want and f"1 unusable rows left out: {place}" in notes[1], name
    (tmp_path / "b.csv").write_text("problem,answer\n2, 3 or 4?,9\n1?,1\n")
    problems, notes = read_problems(str(tmp_path / "b.csv"))
    assert problems == [Problem("1?", "1")] and "row 1: more cells than" in notes[1]
    (tmp_path / "c.csv").write_text("prompt,answer\n\"[{'role': 'user', 'content': 'p'}]\",9\n1?,1\n")
    problems, notes = read_problems(str(tmp_path / "c.csv"))
    assert problems == [Problem("1?", "1")] and "chat messages written as text" in notes[1]
    for name in ("x.json", "x.csv", "x.parquet"):
        (tmp_path / name).write_bytes(b"[\xff")
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            read_problems(str(tmp_path / name))
    (tmp_path / "a.parquet").write_bytes(b"")
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(ValueError, match="pip install pyarrow"):
            read_problems(str(tmp_path / "a.parquet"))
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows += [{"problem": "x", "answer": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    problems, notes = read_problems(str(tmp_path / "a.parquet"))
    assert problems == want and "row 2: no field named answer" in notes[1]
    chats = [{"prompt": turns(("user", "p")), "reward_model": {"ground_truth": "3"}}]
    parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "a.parquet")
    assert read_problems(str(tmp_path / "a.parquet"))[0] == [Problem("p", "3")]


@pytest.mark.parametrize(
    "name", ["train.csv", "data/train.parquet", "data/train.txt", "a/b/c", "./a", "data"]
)
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        read_problems(name)
    for hub in ("openai/gsm8k@main:test", "AI-MO/NuminaMath-1.5", "allenai/c4@en.noclean"):
        assert rollout.data_file(hub) is None


def test_what_is_evaluated_is_not_trained_on(tmp_path):
    tokenizer = byte_tokenizer()
    for name, numbers in (("train", range(10)), ("test", range(8, 14))):
        rows = [json.dumps({"problem": f"{i}?", "answer": str(i)}) for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    files = str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl")
    task, notes = task_of_data(tokenizer, *files, 96, "{problem}", False, 100, 8)
    assert sorted(p.answer for p in task.train) == list("01234567") and len(task.test) == 6
    assert any("2 training problems left out" in note for note in notes)


@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.integers(1, 20), st.randoms())
def test_the_split_depends_on_the_problems_only(names, count, rng):
    problems = [Problem(str(i), "1") for i in names]
    test_set = hold_out(problems, count)
    assert len(test_set) == len({p.prompt for p in test_set}) == min(count, len(set(names)))
    assert set(test_set) <= set(problems)
    rng.shuffle(problems)
    assert hold_out(problems, count) == test_set


def test_a_question_that_occurs_twice_is_never_in_both_splits(tmp_path):
    numbers = [*range(30), *range(20), *range(10)]
    data = lines_of(tmp_path / "a.jsonl", [{"problem": f"{i}?", "answer": str(i)} for i in numbers])
    task, _ = task_of_data(byte_tokenizer(), data, "", 12, "{problem}", False, 100, 8)
    held = {int(p.answer) for p in task.test}
    assert len(task.test) == len(held) == 12
    assert [int(p.answer) for p in task.train] == [i for i in numbers if i not in held]


def test_prompts_are_a_users_turn_or_plain_text_after_bos():
    problem, tokenizer = [Problem("1 {x} 2", "3")], byte_tokenizer()
    assert render(problem, tokenizer, "Q {problem} A", True) == [Problem("Q 1 {x} 2 A", "3")]
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<bot>"
    assert render(problem, tokenizer, "{problem}", True)[0].prompt == "<user>1 {x} 2<bot>"
    assert render(problem, tokenizer, "{problem}", False)[0].prompt == "1 {x} 2"
    tokenizer.chat_template = "{{ raise_exception('a system turn is needed') }}"
    with pytest.raises(ValueError, match="refuses a user's turn .a system turn is needed"):
        render(problem, tokenizer, "{problem}", True)


def test_a_prompt_is_as_long_as_what_is_sampled_from(tmp_path):
    """Its BOS stands in the text already; tokenizing it for its length must not add another."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(bos_token="<s>")
    begin = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer.backend_tokenizer.post_processor = begin
    data = lines_of(tmp_path / "a.jsonl", [{"problem": x, "answer": "1"} for x in ("abc", "abd", "abcd")])
    task, notes = task_of_data(tokenizer, data, "", 2, "{problem}", True, 4, 8)
    assert {p.prompt for p in (*task.train, *task.test)} == {"<s>abc", "<s>abd"}
    assert len(tokenizer("<s>abc")["input_ids"]) == 5 and any("--max-prompt-tokens 4" in n for n in notes)


def test_every_stop_token_ends_a_response():
    tokenizer = byte_tokenizer()
    model = llama(tokenizer)
    model.generation_config.eos_token_id = [1, 9]
    assert rollout.stop_tokens(model.generation_config, tokenizer) == [1, 9]
    engine = rollout.TorchEngine(model, tokenizer)
    script = torch.tensor([[5, 1], [9, 5]])
    hook = lambda z, t, rows, g: script[rows, min(t, 1)]  # noqa: E731
    out = engine.sample([[5, 6]], Sampling(2, 4, hook=hook))
    assert out.mask.sum(-1).tolist() == [2, 1] and not out.truncated.any()


def test_a_stop_text_ends_a_response_with_the_token_that_completes_it():
    """The same draws as without it, cut after the first prefix whose text holds it; no other row changes."""
    tokenizer = byte_tokenizer()
    model = llama(tokenizer, eos_token_id=None)
    model.generation_config.eos_token_id = None
    prompts, how = [[5, 6, 7], [9]], Sampling(40, 60)
    drawn = [rollout.TorchEngine(model, tokenizer, stop=stop) for stop in ("", tokenizer.decode([40]))]
    free, cut = (e.sample(prompts, how, torch.Generator().manual_seed(0)) for e in drawn)
    text, cuts = drawn[1].stop, 0
    for row, own in enumerate(free.mask.sum(1).tolist()):
        ids = free.ids[row, :own].tolist()
        end = next((t for t in range(1, own + 1) if text in tokenizer.decode(ids[:t])), None)
        cuts += end is not None
        assert cut.ids[row][cut.mask[row]].tolist() == ids[: end or own]
        assert torch.equal(cut.rollout_logp[row][cut.mask[row]], free.rollout_logp[row, : end or own])
        assert bool(cut.truncated[row]) == (end is None and bool(free.truncated[row]))
    assert cuts > 0
    engine = rollout.TorchEngine(model, tokenizer, stop=tokenizer.decode([40, 41]))
    script = torch.tensor([[5, 40, 41, 40, 41], [40, 5, 41, 40, 41], [40, 40, 7, 41, 8]])
    out = engine.sample([[5]], Sampling(3, 5, hook=lambda z, t, rows, g: script[rows, t]))
    assert out.mask.sum(1).tolist() == [3, 5, 5] and out.truncated.tolist() == [False, False, True]


def test_a_task_made_in_code_holds_out_values_and_knows_what_is_right():
    for name, largest in (("arithmetic", 20), ("pairs", 40)):
        own, n = rollout.made(f"{name}:{largest}")
        problems = own.problems(n)
        values = [tuple(sorted(re.findall(r"\d+", p.prompt))) + ("times" in p.prompt,) for p in problems]
        assert n == largest and len(set(values)) == len(problems) > 300, "a value stands in one problem only"
        assert len(hold_out(problems, 24)) == 24
    assert rollout.made("arithmetic")[1] == 20 and rollout.made("a.jsonl") is None
    right = rollout.MADE["arithmetic"].verify
    for text, ok in (("12", 1), ("5 + 7 = 12.", 1), ("12 is 5 + 7", 0), ("", 0), ("twelve", 0), ("1,012", 0)):
        assert right(text, Problem("What is 5 plus 7?", "12")) == ok, text
    pairs = rollout.MADE["pairs"]
    for text, ok in (("11 and 14", 1), ("Between 10 and 20 are 12, 13", 1), ("12", 0), ("12 12", 0),
                     ("12 21", 0), ("9 and 12", 0), ("12 13 99", 1), ("no", 0)):  # fmt: skip
        assert pairs.verify(text, Problem("", "10 20")) == ok, text
    assert pairs.signature("14 and 11") == pairs.signature("11, 14") != pairs.signature("11, 15")


@pytest.mark.parametrize("data", ["arithmetic", "pairs:30"])
def test_a_task_made_in_code_trains_is_evaluated_and_goes_on(
    model_folder, tmp_path, monkeypatch, capsys, data
):
    """With settings of its own, without math-verify."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grpo, "shared_grader", None)
    argv = [
        "--model",
        str(model_folder),
        "--data",
        data,
        "--stop",
        "a",
        "--prompts",
        "2",
        "--group-size",
        "2",
    ]
    argv += ["--eval-problems", "2", "--eval-samples", "2", "--threads", "1", "--quiet", "--out", "a"]
    assert train.main([*argv, "--method", "grpo", "--steps", "1"]) == 0, capsys.readouterr().err
    settings_of = json.loads(Path("a/config.json").read_text())["settings"]
    assert settings_of["lr"] == 1e-5 and settings_of["max_new_tokens"] == 20
    assert train.main(["--resume", "a", "--steps", "2", "--quiet"]) == 0
    assert eval.main(["a", "--k", "2", "--out", "b"]) == 0 and Path("b/samples.csv").exists()
    assert "pass@2" in capsys.readouterr().out
    assert eval.main(["a", "--k", "2", "--out", "b", "--dtype", "bfloat16", "--device", "cpu"]) == 0
    kinds = [json.loads(path.read_text())["dtype"] for path in Path("b").glob("*/test-*.json")]
    assert sorted(kinds) == ["bfloat16", "float32"]  # samples of both, apart
    assert eval.main(["a", "--device", "toaster"]) == 2 and "--device toaster" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# Micro-batches


@given(st.data())
@settings(max_examples=30)
def test_a_token_budget_covers_every_row_once_and_is_kept(data):
    world = test_a_token_budget_covers_every_row_once_and_is_kept.world
    batch, budget = world[1], data.draw(st.integers(1, 700))
    passes = Passes(test_train.run_of(None, settings=Settings(tokens_per_micro_batch=budget)), batch)
    slices = passes.rows
    rows = torch.arange(len(batch.start))
    assert sorted(torch.cat([rows[s] for s in slices]).tolist()) == rows.tolist()
    assert torch.equal(passes.join([rows[s] for s in slices]), rows)
    length = batch.start + 1 + batch.lengths
    for s in slices:
        assert len(rows[s]) == 1 or len(rows[s]) * int(length[s].max()) <= budget


test_a_token_budget_covers_every_row_once_and_is_kept.world = (w := small_world(), draw_batch(w, 8, 8))


@pytest.mark.parametrize("spec", ["grpo", "opefo", "clip_cov:ratio=.1", "dapo", "gspo", "steer"])
@pytest.mark.parametrize("budget", [40, 333])
def test_the_gradient_does_not_depend_on_the_token_budget(spec, budget):
    policy, batch = Policy((w := small_world())[0]), draw_batch(w, 8, 8)
    grads = []
    for tokens in (0, budget):
        name, options = train.interventions.parse(spec)
        got, _ = update(policy, batch, build(name, **options), Settings(tokens_per_micro_batch=tokens))
        grads.append((gradient(policy), got.force, got.flow))
    for a, b in zip(*grads):
        # float64, but the norm layers of transformers compute in float32
        assert float((a - b).norm()) <= 1e-7 * max(float(a.norm()), 1e-30)


# ------------------------------------------------------------------------------------------------------------
# Language models through the command line


@pytest.fixture
def lm(model_folder, data_file, tmp_path, monkeypatch):
    """Run the command line on the model and the sums; returns (exit code, rows, folder)."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, steps=2, out="a"):
        size = ["--prompts", "4", "--group-size", "4", "--eval-every", "2", "--eval-samples", "2"]
        more = ["--eval-problems", "4", "--max-new-tokens", "8", "--threads", "1", "--quiet", "--lr", "1e-3"]
        base = ["--model", str(model_folder), "--data", str(data_file), *size, *more]
        code = train.main([*base, "--steps", str(steps), "--out", out, *map(str, flags)])
        path = tmp_path / out / "metrics.jsonl"
        rows = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
        return code, rows, tmp_path / out

    return run


def weights_of(folder):
    return load_model(str(folder))[0].state_dict()


def test_a_language_model_trains_and_its_checkpoint_loads(lm, model_folder):
    pytest.importorskip("math_verify")
    code, rows, folder = lm("--method", "opefo", "--reward", "random", "--gradient-checkpointing")
    assert code == 0 and len(rows) == 3
    assert {"correct", "truncated", "seconds_rollout"} <= rows[1].keys() and rows[1]["tokens"] > 0
    before, after = weights_of(model_folder), weights_of(folder / "checkpoint")
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    samples = [json.loads(x) for x in (folder / "samples.jsonl").read_text().splitlines()]
    assert "Reason step by step" in samples[0]["prompt"] and not any(s["correct"] for s in samples)
    assert {s["reward"] for s in samples} == {0.0, 1.0}, "--reward random is not what was written"


def test_a_language_models_run_is_shown_without_a_logged_flow(lm, capsys):
    pytest.importorskip("math_verify")
    lm("--method", "grpo")
    assert eval.main(["--show", "a", "--out", "shown"]) == 0
    assert "Exact flow of a table" in capsys.readouterr().out and Path("shown/flow.html").exists()


def test_a_run_is_shown_at_its_temperature_with_its_attention_whatever_its_data_are_called(
    lm, data_file, tmp_path, monkeypatch, capsys
):
    """And a token that the tokenizer has no name for, an embedding being larger, is shown as its id."""
    pytest.importorskip("math_verify")
    (tmp_path / "chain.jsonl").write_text(data_file.read_text() + "{}\n")
    code, _, folder = lm("--method", "grpo", "--temperature", 0.7, "--data", "chain.jsonl",
                         "--attention", "eager", "--reward", "random", steps=1)  # fmt: skip
    err = capsys.readouterr().err
    assert code == 0 and "1 unusable rows left out: line 37: no field named" in err
    asked, real, scored = [], eval.answer, Policy.forward

    def answer(engine, task, problems, how, *rest):
        assert "What is" in task.test[0].prompt, "not the embedded task"
        out, texts = real(engine, task, problems, how, *rest)
        out.correct = torch.arange(len(out.ids)) % 2 == 0
        out.ids[:, 0] = torch.where(out.lengths > 1, 300, out.ids[:, 0])
        asked.append((how.temperature, engine.model.config._attn_implementation))
        return out, texts

    def score(policy, tk, *tau):  # none where the loader checks the model
        asked.extend(tau)
        known = {"full_ids": tk.full_ids.clamp(max=258), "ids": tk.ids.clamp(max=258)}
        return scored(policy, replace(tk, **known), *tau)

    monkeypatch.setattr(eval, "answer", answer)
    monkeypatch.setattr(Policy, "forward", score)
    assert eval.main(["--show", "a", "--out", "shown"]) == 0
    assert asked == [(0.7, "eager"), 0.7] and "&lt;300&gt;" in Path("shown/flow.html").read_text()
    assert eval.main(["--show", "a", "--out", "shown", "--attention", "sdpa"]) == 0
    assert asked[2] == (0.7, "sdpa")


def test_a_run_whose_model_has_no_sdpa_is_shown_too(lm, saved, capsys):
    """It was trained with eager in the place of sdpa, and so it is loaded."""
    pytest.importorskip("math_verify")
    assert lm("--model", saved(built("bloom")), "--method", "grpo")[0] == 0
    assert eval.main(["--show", "a"]) == 0, capsys.readouterr().err


def test_gradient_checkpointing_and_budget_change_no_number(lm):
    pytest.importorskip("math_verify")
    plain = lm("--method", "grpo", "--reward", "random", out="a")[1]
    other = lm("--method", "grpo", "--reward", "random", "--gradient-checkpointing",
               "--tokens-per-micro-batch", 300, out="b")[1]  # fmt: skip
    for a, b in zip(plain[1:], other[1:]):
        for key in ("entropy", "grad_norm", "reward", "loss"):
            assert a.get(key) == pytest.approx(b.get(key), rel=1e-4, abs=1e-6), key


def test_gradient_checkpointing_in_bfloat16_on_a_processor(lm):
    """The backward pass recomputes with the attention of the forward pass, else torch refuses."""
    pytest.importorskip("math_verify")
    how = ["--method", "grpo", "--reward", "random", "--gradient-checkpointing", "--dtype", "bfloat16"]
    assert lm(*how)[0] == 0


def test_lora_trains_adapters_only_and_saves_a_merged_model(lm, model_folder):
    pytest.importorskip("math_verify")
    pytest.importorskip("peft")
    code, rows, folder = lm("--method", "ref_kl", "--lora", 2, "--reward", "random", "--mismatch", "off")
    assert code == 0
    before, after = weights_of(model_folder), weights_of(folder / "checkpoint")
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all("_proj" in k for k in changed), "the head and the embeddings stay"
    delta = after[min(changed)] - before[min(changed)]
    assert torch.linalg.matrix_rank(delta, rtol=1e-3) <= 2
    assert train.main(["--resume", str(folder), "--steps", "3", "--quiet"]) == 0


LORA_KINDS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("gpt2", {}),  # Conv1D, transposed
    ("phi3", {}),  # fused projections
    ("mixtral", {"num_local_experts": 3}),  # stacked experts, and a router
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}),
]


def test_matrices_without_an_adapter_are_told():
    pytest.importorskip("peft")
    with pytest.warns(UserWarning, match="--lora 2: .* matrices stay as they are, e.g. model.layers.0"):
        train.with_adapters(built("gpt_oss"), 2, 0)


@pytest.mark.parametrize("kind, shape", LORA_KINDS)
def test_the_merged_weights_are_the_adapted_policy(tmp_path, kind, shape):
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    bare, ids = built(kind, **shape), torch.arange(3, 40)[None]
    names = {name: p.shape for name, p in bare.named_parameters()}
    state, start = torch.random.get_rng_state(), bare(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every matrix has an adapter
        model = train.with_adapters(bare, 2, 7)
    assert torch.equal(torch.random.get_rng_state(), state), "adapters are drawn from the run's seed only"
    again = dict(train.with_adapters(built(kind, **shape), 2, 7).named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in model.named_parameters())
    other = dict(train.with_adapters(built(kind, **shape), 2, 8).named_parameters())
    assert any(not torch.equal(p, other[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    weights = {name: w.contiguous() for name, w in train.full_weights(model)}
    assert {name: w.shape for name, w in weights.items()} == names
    model.get_base_model().save_pretrained(tmp_path, state_dict=weights)
    live, loaded = model(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits
    assert float((live - start).detach().abs().max()) > 0.1
    torch.testing.assert_close(loaded, live, rtol=0, atol=1e-4)


def test_adapters_on_experts_train_and_the_checkpoint_is_the_policy(lm, saved, monkeypatch):
    pytest.importorskip("math_verify")
    pytest.importorskip("peft")
    ids, live, write = torch.arange(3, 40)[None], [], train.Run._write

    def spy(self, *rest):
        live.append(self.policy.model(ids).logits.detach())
        write(self, *rest)

    monkeypatch.setattr(train.Run, "_write", spy)
    code, _, folder = lm("--model", saved(built("mixtral", num_local_experts=3)), "--method", "grpo",
                         "--lora", 2, "--reward", "random", "--gradient-checkpointing")  # fmt: skip
    assert code == 0 and not torch.equal(live[0], live[-1])
    loaded = load_model(str(folder / "checkpoint"))[0](ids).logits
    torch.testing.assert_close(loaded, live[-1], rtol=0, atol=1e-4)


def test_adapters_that_peft_refuses_are_named(lm, saved, capsys):
    pytest.importorskip("math_verify")
    pytest.importorskip("peft")
    folder = saved(built("falcon_h1", **{**MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8}))
    capsys.readouterr()  # a bar of the saving
    code = lm("--model", folder, "--method", "grpo", "--lora", 2)[0]
    err = capsys.readouterr().err.strip()
    assert code == 2 and "--lora 2" in err and "out_proj" in err and len(err.splitlines()) == 1


def test_rows_of_the_embeddings_beyond_the_vocabulary_may_be_sampled(lm, saved):
    """A third of the softmax has no word; all files are written, and such a token is there as its number."""
    pytest.importorskip("math_verify")
    folder = saved(llama(byte_tokenizer(), vocab_size=400))
    code, rows, out = lm("--model", folder, "--method", "grpo", "--reward", "random", "--ledger", "full",
                         "--ledger-every", 1)  # fmt: skip
    assert code == 0 and len(rows) == 3
    flows = [json.loads(x) for x in (out / "flows.jsonl").read_text().splitlines()]
    words = [w for row in flows for w in row["tokens"]]
    assert all(isinstance(w, str) for w in words) and any(re.fullmatch("<[0-9]{3}>", w) for w in words)
    assert (out / "samples.jsonl").stat().st_size


def test_a_run_says_nothing_and_uses_nothing_deprecated(lm, capsys, warm_cache, monkeypatch):
    """Neither Python's warnings, which are errors here, nor transformers' log, nor anything on stderr: the
    embedded world, a language model with and without adapters, recomputation, and going on."""
    pytest.importorskip("math_verify")
    pytest.importorskip("peft")
    monkeypatch.setenv("ENTROPY_FLOW_CACHE", str(warm_cache))
    logging.Logger.warning_once.cache_clear()  # of transformers: what an earlier test heard is said again
    said, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("error", category)
            tiny = ["--prompts", "4", "--group-size", "4", "--eval-problems", "4", "--eval-samples", "2"]
            tiny += ["--threads", "1", "--steps", "2", "--quiet", "--out", "embedded"]
            assert train.main(["--method", "grpo", *tiny]) == 0
            assert lm("--method", "ref_kl", "--gradient-checkpointing")[0] == 0
            assert lm("--method", "grpo", "--lora", 2, out="b")[0] == 0
            assert train.main(["--resume", "b", "--steps", "3", "--quiet"]) == 0
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert (said, capsys.readouterr().err) == ([], "")


def test_bfloat16_keeps_float32_masters(lm, model_folder):
    """A learning rate far below bfloat16's resolution of the weights still moves them, slowly."""
    pytest.importorskip("math_verify")
    code, rows, folder = lm(
        "--method", "grpo", "--dtype", "bfloat16", "--reward", "random", "--lr", "1e-6", steps=4
    )
    assert code == 0 and rows[-1]["skipped"] == 0
    import torch.distributed.checkpoint as dcp

    start = llama(byte_tokenizer()).state_dict()
    state = {"model": {f"model.{k}": torch.zeros_like(v) for k, v in start.items()}}
    dcp.load(state, checkpoint_id=folder / "checkpoint" / "training", no_dist=True)
    moved = [float((state["model"][f"model.{k}"] - start[k]).abs().max()) for k in start]
    assert 0 < max(moved) < 1e-5
    assert weights_of(folder / "checkpoint")["lm_head.weight"].dtype == torch.float32  # load_model's choice


@pytest.mark.parametrize("slower", [3.0, 0.3])
def test_a_processor_on_which_bfloat16_is_slow_is_told(lm, monkeypatch, capsys, slower):
    pytest.importorskip("math_verify")
    assert 0.01 < train.bfloat16_slowdown(64, 16) < 100
    monkeypatch.setattr(train, "bfloat16_slowdown", lambda *_: slower)
    assert lm("--method", "grpo", "--dtype", "bfloat16", steps=1)[0] == 0
    told = "bfloat16 takes 3.0 times as long as float32 on this processor: --dtype float32"
    assert (told in capsys.readouterr().err) == (slower > 1)


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 0.04)])
def test_one_rank_shares_prompts_and_chooses_its_attention(dtype, most, monkeypatch):
    """What one rank of FSDP2 saves changes no gradient: prompts read once, and on a CPU, only in bfloat16,
    plain products instead of the fused attention, whose backward pass is slow there."""
    world = small_world(double=False)
    batch = draw_batch(world, 8, 8)
    policy = Policy(world[0])
    update(policy, batch, build("opefo"))
    want, seen, hidden = gradient(policy), [], Policy._hidden_of_groups

    def spy(*args):
        out = hidden(*args)
        seen.append((out is not None, torch.backends.cuda.flash_sdp_enabled()))
        return out

    monkeypatch.setattr(Policy, "_hidden_of_groups", spy)
    policy = train.shard(Policy(small_world(double=False)[0]), dtype, torch.device("cpu"))
    try:
        update(policy, batch, build("opefo"))
        got = torch.cat([train.full_tensor(p.grad).flatten() for p in policy.parameters()])
    finally:
        train.Ranks.leave()
    assert seen and all(shared for shared, _ in seen)
    assert {fused for _, fused in seen} == {dtype == torch.float32}
    assert torch.backends.cuda.flash_sdp_enabled()
    gap = float((got - want).norm() / want.norm())
    assert gap <= most, gap
    with torch.no_grad(), _attention(torch.zeros(1, dtype=dtype), 17):
        assert torch.backends.cuda.flash_sdp_enabled(), "the forward pass alone is fast"


def test_the_best_checkpoint_is_marked_and_loads(lm):
    pytest.importorskip("math_verify")
    _, rows, folder = lm("--method", "grpo", "--reward", "wrong", steps=4)
    best = json.loads((folder / "checkpoint-best" / "best.json").read_text())
    scores = {r["step"]: r["pass@1"] for r in rows if "pass@1" in r}
    assert best["pass@1"] == max(scores.values()) == scores[best["step"]]
    assert best["step"] == min(s for s, v in scores.items() if v == best["pass@1"])
    load_model(str(folder / "checkpoint-best"))


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--data", "missing.jsonl"), ("--data missing.jsonl", "no such file")),
        (("--data", "data/missing.parquet"), ("--data data/missing.parquet", "no such file")),
        (("--eval-data", "data/missing.csv"), ("--eval-data data/missing.csv", "no such file")),
        (("--model", "nowhere"), ("--model nowhere", "no such folder")),
        (("--prompt-template", "no place"), ("--prompt-template", "{problem}")),
        (("--max-prompt-tokens", 3), ("--max-prompt-tokens 3", "32 training problems left out")),
        (("--eval-problems", 10**6), ("no training problem", "--eval-problems 1000000")),
        (("--max-new-tokens", 10**6), ("--max-new-tokens 1000000", "the longest prompt has")),
        (("--model", "none.gguf"), ("--model none.gguf", "no .gguf file")),
        (("--data", "arithmetic:3"), ("--data arithmetic:3", "between 5 and 10000")),
        (("--data", "pairs", "--eval-data", "x.jsonl"), ("--eval-data x.jsonl",)),
        (("--lora", 2, "--method", "prorl"), ("prorl", "--lora")),
        (("--dtype", "bfloat16", "--ledger", "full"), ("--ledger full", "--dtype float32")),
    ],
)
def test_bad_settings_of_language_models_are_named(lm, capsys, flags, words):
    code = lm("--method", "grpo", *flags)[0]
    err = capsys.readouterr().err.strip()
    assert code == 2 and all(w in err for w in words) and len(err.splitlines()) <= 2, err


def test_a_stop_that_no_token_can_complete_is_named(tmp_path, capsys, monkeypatch):
    """In a tokenizer of whole words transformers finds no texts."""
    tokenizer = rollout.tiny_tokenizer()
    rollout.TinyModel(num_hidden_layers=1).build(tokenizer, 0).save_pretrained(tmp_path / "words")
    tokenizer.save_pretrained(tmp_path / "words")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    argv = ["--method", "grpo", "--model", "words", "--data", "arithmetic", "--stop", "+", "--out", "a"]
    assert train.main([*argv, "--quiet"]) == 2 and not Path("a").exists()
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and "--stop +" in err[0] and "leave it out" in err[0], err


def test_a_tokenizer_larger_than_the_embedding_is_named(lm, model_folder, data_file, tmp_path, capsys):
    """A prompt's token would index past the embedding's last row; a padding token becomes EOS (below)."""
    word, tokenizer = "What", byte_tokenizer()
    shutil.copytree(model_folder, tmp_path / "grown")
    tokenizer.add_tokens([word])
    tokenizer.save_pretrained(tmp_path / "grown")
    assert lm("--method", "grpo", "--model", "grown")[0] == 2
    told = [capsys.readouterr().err]
    base = ["--model", "grown", "--benchmark", "sums", "--data", f"sums={data_file}", "--out", "out"]
    assert eval.main([*base, "--k", "1", "--max-new-tokens", "4"]) == 2
    told.append(capsys.readouterr().err)
    for err in told:
        assert all(w in err for w in ("--model grown", repr(word), "has the id 259", "259 rows")), err
        assert len(err.strip().splitlines()) <= 2, err


def test_without_math_verify_nothing_is_loaded(lm, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(grpo, "shared_grader", grpo.Grader)
    monkeypatch.setattr(rollout, "load_model", None)
    code, rows, folder = lm("--method", "grpo")
    err = capsys.readouterr().err
    assert code == 2 and not rows and not folder.exists()
    assert "math-verify: pip install" in err and len(err.splitlines()) == 1, err


def other_data(folder, data):
    data.write_text(data.read_text().replace('"answer": "7"', '"answer": "8"'))


def other_weights(folder, data):
    model = llama(byte_tokenizer())
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(folder)


def other_shape(folder, data):
    llama(byte_tokenizer(), num_hidden_layers=3).save_pretrained(folder)


def other_config(folder, data):
    llama(byte_tokenizer(), hidden_act="gelu").save_pretrained(folder)


@pytest.mark.parametrize(
    "change, words",
    [(other_data, "--data"), (other_weights, "--model"), (other_shape, "--model"), (other_config, "--model")],
)
def test_a_run_goes_on_with_its_own_model_and_data_only(
    lm, model_folder, data_file, tmp_path, capsys, change, words
):
    pytest.importorskip("math_verify")
    folder, data = tmp_path / "m", tmp_path / "d.jsonl"
    shutil.copytree(model_folder, folder)
    shutil.copy(data_file, data)
    assert lm("--method", "grpo", "--model", folder, "--data", data, steps=1)[0] == 0
    assert train.main(["--resume", "a", "--quiet"]) == 0, "nothing has changed"
    change(folder, data)
    before = (tmp_path / "a" / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert train.main(["--resume", "a", "--steps", "2", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert f"{words} {tmp_path}" in err and "has changed" in err and len(err.splitlines()) <= 2, err
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == before


# ------------------------------------------------------------------------------------------------------------
# Several processes


SAME_GRADIENT = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
torch.set_num_threads(1)
import train
from dataclasses import replace
from interventions import build, parse
from grpo import Policy
from test_train import draw_batch, small_world, update
from train import Ranks, Settings, full_tensor, shard

cpu, worst = torch.device("cpu"), 0.0
ranks = Ranks.join(cpu)
for spec in {specs!r}:
    for settings in (Settings(), Settings(tokens_per_micro_batch=200)):
        world = small_world(double=False)
        batch = draw_batch(world, 8, 8)
        if spec.startswith(("clip_cov", "gspo", "kl_cov")):
            batch.old_logp = batch.rollout_logp + 0.3 * torch.randn(
                batch.ids.shape, generator=torch.Generator().manual_seed(1))
        if spec.startswith("ref_kl"):
            batch.ref_logp = batch.rollout_logp - 0.1
        name, options = parse(spec)
        update(Policy(world[0]), batch, build(name, **options), settings)
        alone = [p.grad for p in world[0].parameters()]
        # an uneven split: the first rank has a quarter of the prompts, so that ranks differ in micro-batches
        cut = len(batch.start) // 4
        mine = batch.rows(slice(0, cut) if ranks.is_main else slice(cut, None))
        policy = shard(Policy(small_world(double=False)[0]), torch.float32, cpu)
        _, numbers = update(policy, mine, build(name, **options), settings, ranks)
        for p, want in zip(policy.parameters(), alone):
            gap = (full_tensor(p.grad) - want).norm() / want.norm()
            worst = max(worst, float(gap))
        assert abs(numbers["flow_up"]) > 0
print("worst", worst)
assert worst <= 1e-5, worst
Ranks.leave()
"""


def torchrun(*arguments, cwd, n=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_two_ranks_give_the_gradient_of_one(tmp_path):
    """Relative difference at most 1e-5 in float32, also where the ranks' numbers of micro-batches differ."""
    specs = ("grpo", "opefo", "clip_cov:ratio=.1", "dapo", "ref_kl:beta=.1", "steer", "gspo", "entropy_bonus")
    script = tmp_path / "same.py"
    script.write_text(SAME_GRADIENT.format(root=str(ROOT), tests=str(ROOT / "tests"), specs=specs))
    done = torchrun(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one_and_with_two(tmp_path, warm_cache, monkeypatch):
    """Checkpoints belong to no number of ranks: weights and AdamW's states are the same after loading."""
    monkeypatch.setenv("ENTROPY_FLOW_CACHE", str(warm_cache))
    tiny = ["--prompts", 4, "--group-size", 4, "--eval-every", 2, "--eval-samples", 2, "--eval-problems", 4]
    base = [ROOT / "train.py", "--method", "par:schedule=entropy", *tiny, "--threads", 1, "--quiet"]
    done = torchrun(*base, "--steps", 4, "--out", "a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(x) for x in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4] and done.stdout.count("picture:") == 1
    assert len(rows[0]["right"]) == 4 and rows[0]["pass@1"] == pytest.approx(sum(rows[0]["right"]) / 8)
    assert all(r["tokens"] > 16 for r in rows[1:]), "both ranks' tokens are counted"

    def states(folder):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        out = tmp_path / "whole.pt"
        dcp_to_torch_save(folder / "checkpoint" / "training", out)
        assert dcp
        return torch.load(out, weights_only=True)

    saved = states(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    kept = {}
    real = train.Run.load

    def load(self):
        real(self)
        kept.update(json.loads(json.dumps({"step": self.step, "used": self.prompts_used})))
        for part, named in self._tensors().items():
            for name, value in named.items():
                assert torch.equal(value, saved[part][name]), (part, name)

    monkeypatch.setattr(train.Run, "load", load)
    assert train.main(["--resume", "a", "--steps", "6", "--quiet"]) == 0
    assert kept == {"step": 4, "used": 16}
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 7
    done = torchrun(ROOT / "train.py", "--resume", "a", "--steps", 8, "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 9


@pytest.mark.slow
def test_bad_input_is_said_once_by_many_processes(tmp_path):
    done = torchrun(ROOT / "train.py", "--method", "grpo", "--prompts", 3, "--quiet", cwd=tmp_path)
    said = [x for x in done.stderr.splitlines() if x.startswith("train.py: error")]
    assert len(said) == 1 and "--prompts 3" in said[0] and done.returncode != 0


def evaluated(model, tokenizer, task, k):
    """`evaluate` with draws that depend on the problem only, whoever asks."""

    class Fixed(rollout.TorchEngine):
        def sample(self, prompts, how, generator=None):
            seeds = [torch.Generator().manual_seed(sum(x * 31**i for i, x in enumerate(p))) for p in prompts]
            how = replace(how, hook=short_answers)
            outs = [super(Fixed, self).sample([p], how, g) for p, g in zip(prompts, seeds)]
            group = torch.arange(len(prompts)).repeat_interleave(how.n)
            return replace(concat_padded(outs), group=group)

    return eval.evaluate(Fixed(model, tokenizer), task, k)


@pytest.mark.parametrize("problems", [1, 5, 6])
def test_ranks_evaluate_together_as_one_does_alone(problems, monkeypatch, tmp_path):
    """Also with fewer problems than ranks; entropy is a mean over tokens, of which some ranks have more."""
    model, tokenizer, task = small_world()
    monkeypatch.setattr(train, "evaluate", lambda e, task, k, *_, **__: evaluated(model, tokenizer, task, k))
    task = replace(task, test=task.test[:problems], hard=task.hard[:problems])

    class Some(train.Ranks):
        def all(self, value):
            shares.append(value)
            return shares

    runs = []
    for world in (1, 3):
        shares = []
        for rank in range(world):
            run = test_train.make_run((model, tokenizer, task), build("grpo"), tmp_path, eval_samples=4)
            run.ranks = Some(rank, world)
            got = train.evaluation(run)
        runs.append(got)
    one, three = runs
    assert one.keys() == three.keys() and len(one["right"]) == problems
    for key, value in one.items():
        assert three[key] == pytest.approx(value, abs=1e-9), key


def test_an_error_of_one_rank_ends_all_with_one_code_and_is_told_once():
    class Two(train.Ranks):
        other = 0

        def all(self, value):
            return [value, self.other][:: 1 if self.is_main else -1]

    def end(rank, mine, other):
        ranks = Two(rank, 2)
        object.__setattr__(ranks, "other", other)
        with ranks.together():
            if mine:
                raise mine

    end(0, None, 0)
    bad, full, bug = train.UserError("x"), OSError(28, "No space left on device"), RuntimeError("a bug")
    for mine, code in ((bad, 2), (full, 1), (bug, 1)):
        with pytest.raises(type(mine)):
            end(0, mine, code)  # both fail: the first one speaks
        for rank, own in ((0, None), (1, None), (1, mine)):
            with pytest.raises(SystemExit) as left:
                end(rank, own, code)
            assert left.value.code == code


FAILING_SAVE = """
import sys, tempfile, torch
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from unittest import mock
import train
from test_train import small_world
from interventions import build

cpu = torch.device("cpu")
ranks = train.Ranks.join(cpu)
folder = Path(ranks.all(tempfile.mkdtemp(dir="."))[0])
model, tokenizer, task = small_world(double=False)
run = train.make_run(train.Settings(), build("grpo"), folder, task, model, tokenizer, None, cpu, ranks)
run.save()
full = OSError(28, "No space left on device")
for owner, name, code in ((Path, "mkdir", 2), (run, "dtype", 1), (train.Run, "_write", 2),
                          (train.dcp.FileSystemWriter, "write_data", 2)):
    how = dict(side_effect=full) if code == 2 else dict(new="no dtype")
    with mock.patch.object(owner, name, **how) if ranks.is_main else mock.MagicMock():
        try:
            run.save()
        except (train.UserError, TypeError) as error:
            assert ranks.is_main and isinstance(error, train.UserError) == (code == 2), error
        except SystemExit as left:
            assert not ranks.is_main and left.code == code, (name, left.code)
        else:
            raise AssertionError(name)
    assert (folder / "checkpoint" / "state.pt").exists()
    ranks.all(None)
run.save()
train.Ranks.leave()
"""


@pytest.mark.slow
def test_a_save_that_fails_on_one_rank_ends_on_all(tmp_path):
    """In the folder, the gathering, the shared writing and the first rank's own writing: nobody waits."""
    script = tmp_path / "save.py"
    script.write_text(FAILING_SAVE.format(root=str(ROOT), tests=str(ROOT / "tests")))
    done = torchrun(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_rank_makes_as_many_passes():
    class Three(Ranks):
        def max(self, value):
            return 3

    tokens = Tokens(torch.zeros(2, 1), torch.ones(2, 1).bool())
    assert list(Passes(test_train.run_of(None, ranks=Three()), tokens)) == [
        (slice(0, 2), True), (slice(0, 1), False), (slice(0, 1), False)
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.slow
def test_kill_9_in_the_middle_of_writing_a_checkpoint(tmp_path, warm_cache):
    """The process dies between the first and the last file of its second checkpoint; the first one is whole,
    and the resumed run's numbers are those of a run that nobody killed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ENTROPY_FLOW_CACHE": str(warm_cache)}
    tiny = [
        "--prompts",
        "4",
        "--group-size",
        "4",
        "--eval-every",
        "2",
        "--eval-samples",
        "2",
        "--threads",
        "1",
    ]
    base = [sys.executable, str(ROOT / "train.py"), "--method", "opefo", *tiny, "--steps", "8", "--quiet"]
    assert subprocess.run([*base, "--out", "b"], cwd=tmp_path, env=env, capture_output=True).returncode == 0
    run = subprocess.Popen([*base, "--out", "a"], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    part, end = tmp_path / "a" / ".checkpoint.part", time.monotonic() + 120
    while not ((tmp_path / "a" / "checkpoint").exists() and (part / "training").exists()):
        assert run.poll() is None and time.monotonic() < end, run.communicate()
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert part.exists(), "it died while it wrote"
    command = [sys.executable, str(ROOT / "train.py"), "--resume", "a", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    a, b = (
        [without_clock(json.loads(x)) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in "ab"
    )
    assert a == b and not part.exists()


def test_the_last_two_checkpoints_are_kept_and_no_more(lm):
    pytest.importorskip("math_verify")
    _, _, folder = lm("--method", "grpo", "--reward", "random", steps=6)
    steps = [torch.load(folder / n / "state.pt", weights_only=True)["step"]
             for n in ("checkpoint", "checkpoint-previous")]  # fmt: skip
    assert steps == [6, 4]
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == [
        "checkpoint", "checkpoint-best", "checkpoint-previous"
    ]  # fmt: skip
