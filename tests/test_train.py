"""Chapter 5: one update, the ledger, checkpoints and resuming, bad input, and every method end to end."""

import contextlib
import json
import math
import random
import resource
import shutil
import signal
import subprocess
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import PNG, TINY, complains, contents, process, rows_of, without_clock

import grpo
import rollout
import train
from grpo import Progress, Tokens
from interventions import METHODS, build
from rollout import TinyModel, chain_task, tiny_tokenizer
from train import (
    Ledger,
    Run,
    Settings,
    accumulate_gradient,
    make_batch,
    prompts_at,
    scored,
    seeded,
)

REPO = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------------------------
# Tools


def lucky(text, problem):
    return zlib.crc32(f"{problem.prompt}/{text}".encode()) % 3 == 0


def luck(texts, problems):
    """A verifier for policies with random weights: a third of all responses is right."""
    return list(map(lucky, texts, problems))


def small_world(double=True, seed=0):
    """Tokenizer, a task in which random weights get rewards, and a random-weight policy of one layer."""
    tokenizer = tiny_tokenizer()
    task = replace(chain_task(), verify=luck)
    shape = TinyModel(32, 32, 1, 1)
    model = shape.build(tokenizer, seed).eval()
    # `nn.Embedding` gives its padding row no gradient.  A random policy says <pad> now and then, so that its
    # gradient would not be the derivative.
    model.get_input_embeddings().padding_idx = None
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.mul_(6)
    return (model.double() if double else model), tokenizer, task


def short_answers(logits, position, rows, generator):
    """Sampling with a preference for EOS, so that responses have all lengths from 1 to 11."""
    logits = logits.clone()
    logits[:, 1] += 3
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def draw_batch(world, prompts=32, group=16):
    model, tokenizer, task = world
    drawn = rollout.answer(
        rollout.TorchEngine(model, tokenizer),
        task,
        task.train[:prompts],
        group,
        generator=torch.Generator().manual_seed(0),
        hook=short_answers,
    )
    return make_batch([drawn], tokenizer.pad_token_id)


def gradient(model):
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )


def make_run(world, method, folder=None, **settings):
    model, tokenizer, task = world
    s = replace(Settings(prompts=8, group_size=8, grad_clip=0.0, ledger="off"), **settings)
    return Run(s, method, Path(folder or "."), task, model, tokenizer)


# ------------------------------------------------------------------------------------------------------------
# One update


@pytest.fixture(scope="module")
def world():
    return small_world()


@pytest.fixture(scope="module")
def batch(world):
    """512 responses of 32 prompts, unequal in length."""
    out = draw_batch(world)
    assert len(out.start) == 512 and len(set(out.tokens.lengths.tolist())) >= 8
    assert 0.2 < float(out.tokens.reward.mean()) < 0.5
    return out


def supplied(world, batch, name, off_policy, **options):
    """Method and batch with what `Run` supplies: reference, proxy; off-policy also old log-probs."""
    method = build(name, **options)
    run = make_run(world, method)
    if run.reference is not None:
        with torch.no_grad():  # a reference that differs, else the penalty is nothing
            for p in run.reference.parameters():
                p.mul_(1.1)
    method.progress = Progress(step=3, total=10, seed=0, max_length=11)
    (part,) = run._parts(train.Batch(replace(batch.tokens), batch.full_ids, batch.start))
    if off_policy:
        g = torch.Generator().manual_seed(1)
        now = train.scored_in_slices(world[0], part, Settings()).logp
        part.tokens.old_logp = now + 0.2 * torch.randn(now.shape, generator=g, dtype=now.dtype)
    return method, part


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("off_policy", [False, True], ids=["strict", "off-policy"])
def test_the_gradient_does_not_depend_on_micro_batches(world, batch, name, off_policy):
    """512 responses at once against 8 x 64, through the model itself, in float64."""
    model, grads, totals, moved = world[0], [], [], 0.0
    for micro in (0, 64):
        method, part = supplied(world, batch, name, off_policy)
        model.zero_grad(set_to_none=True)
        done = accumulate_gradient(model, part, method, Settings(micro_batch=micro))
        grads.append(gradient(model))
        totals.append(done)
        moved = float(grads[0].norm())
    assert moved > 1e-6, "no gradient: the test says nothing"
    assert float((grads[0] - grads[1]).norm()) <= 1e-5 * moved
    assert torch.allclose(totals[0].flow, totals[1].flow, rtol=1e-4, atol=1e-9)
    for key, value in totals[0].metrics.items():
        assert totals[1].metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-7), key


def test_the_float32_gradient_does_not_depend_on_micro_batches_either(batch):
    world = small_world(double=False)
    grads = []
    for micro in (0, 64):
        method, part = supplied(world, batch, "opefo", False)
        world[0].zero_grad(set_to_none=True)
        accumulate_gradient(world[0], part, method, Settings(micro_batch=micro))
        grads.append(gradient(world[0]))
    assert float((grads[0] - grads[1]).norm()) <= 1e-5 * float(grads[0].norm())


def test_the_order_of_the_responses_does_not_matter(world, batch):
    model, grads = world[0], []
    order = torch.randperm(512, generator=torch.Generator().manual_seed(3))
    for index in (slice(None), order):
        model.zero_grad(set_to_none=True)
        accumulate_gradient(model, batch.rows(index), build("opefo"), Settings(micro_batch=0))
        grads.append(gradient(model))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-9)


def test_a_strict_step_has_ratio_one_and_the_gradient_of_reinforce(world, batch):
    """The loss value is -Σ coef A, which says nothing; its gradient is that of -Σ coef A log π."""
    model = world[0]
    method, part = supplied(world, batch, "grpo", False)
    assert part.tokens.old_logp is None, "on a strict step the old policy is the current forward pass"
    model.zero_grad(set_to_none=True)
    done = accumulate_gradient(model, part, method, Settings())
    got = gradient(model)
    tk = scored(model, part, 1.0)
    count = tk.mask.sum()
    reward = tk.reward.view(32, 16).double()
    adv = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)).view(-1, 1)
    model.zero_grad(set_to_none=True)
    (-(torch.where(tk.mask, tk.logp, 0) * adv).sum() / count).backward()
    torch.testing.assert_close(got, gradient(model), rtol=1e-5, atol=1e-7)
    value = float(-(adv * tk.mask).sum() / count)
    assert done.metrics["loss"] == pytest.approx(value, abs=1e-6) and abs(value) < 0.2
    assert done.metrics["clip_fraction"] == done.metrics["kl_old"] == 0


def test_several_updates_start_at_ratio_one_and_then_leave_it(monkeypatch, tmp_path):
    run = make_run(small_world(), build("grpo"), tmp_path, updates_per_rollout=4, lr=1e-3)
    seen = []
    real = train.batch_loss

    def spy(tk, plan, method):
        far = (grpo.log_ratio(tk.logp, tk.old_logp) * tk.mask).abs().max()
        loss, metrics = real(tk, plan, method)
        seen.append((float(far.detach()), tk.group.unique().tolist(), metrics["kl_old"]))
        return loss, metrics

    monkeypatch.setattr(train, "batch_loss", spy)
    row = run.train_step()
    assert len(seen) == 4 and seen[0][0] == 0 < 1e-3 < seen[1][0] < seen[3][0]
    groups = [g for _, gs, _ in seen for g in gs]
    assert sorted(groups) == list(range(8)), "every prompt is in exactly one update, whole"
    assert row["kl_old"] == pytest.approx(sum(kl for *_, kl in seen) / 4), "the first update counts, as 0"
    assert row["kl_old"] > 0 and math.isfinite(row["clip_fraction"])


@pytest.mark.parametrize("skip", [False, True], ids=["first", "after a skipped update"])
def test_before_a_rollouts_first_step_rounding_gives_a_kink_no_gradient(monkeypatch, tmp_path, skip):
    """float32, kl_cov's |log r|: the pass that scores the rollout is sliced unlike that of its update."""
    run = make_run(
        small_world(double=False),
        build("kl_cov", ratio=0.2),
        tmp_path,
        updates_per_rollout=2,
        tokens_per_micro_batch=100,
    )
    real, off = train.accumulate_gradient, []

    def spy(model, part, method, settings, ranks):
        unsliced = replace(part, tokens=replace(part.tokens, old_logp=None))
        real(model, unsliced, method, Settings())
        want = gradient(model)
        model.zero_grad(set_to_none=True)
        done = real(model, part, method, settings, ranks)
        off.append(float((gradient(model) - want).norm() / want.norm()))
        if skip and len(off) == 1:
            next(model.parameters()).grad.fill_(math.nan)
        return done

    monkeypatch.setattr(train, "accumulate_gradient", spy)
    assert run.train_step()["skipped"] == skip and off[skip] <= 1e-5


def test_the_rollout_is_drawn_before_the_step_and_numbers_are_logged(tmp_path):
    run = make_run(small_world(), build("opefo"), tmp_path, ledger="step", ledger_every=2)
    rows = [run.train_step() for _ in range(3)]
    must = {
        "step",
        "reward",
        "entropy",
        "flow_up",
        "flow_down",
        "lam",
        "grad_norm",
        "tokens",
        "seconds",
        "skipped",
    }
    assert must <= set(rows[0]) and [r["step"] for r in rows] == [1, 2, 3]
    assert ["dH_measured" in r for r in rows] == [True, False, True], "every second step, the first included"
    assert rows[0]["tokens"] == round(rows[0]["length"] * 64)
    for row in rows:
        assert row["flow_up"] >= 0 and row["flow_down"] >= 0 and 0 <= row["reward"] <= 1


# Batches


def test_a_batch_of_several_rollouts_scores_like_its_parts():
    """Rollouts of different widths and prompt lengths, put together: same statistics, groups kept apart."""
    model, tokenizer, task = world = small_world()
    engine, drawn = rollout.TorchEngine(model, tokenizer), []
    for i, (hook, limit) in enumerate([(None, 4), (short_answers, 11), (None, 11)]):
        t = replace(task, max_new_tokens=limit)
        g = torch.Generator().manual_seed(i)
        drawn.append(rollout.answer(engine, t, task.train[3 * i : 3 * i + 3], 2, generator=g, hook=hook))
    batch = make_batch(drawn, tokenizer.pad_token_id)
    assert batch.tokens.group.tolist() == [i // 2 for i in range(18)]
    whole = train.scored_in_slices(world[0], batch, Settings())
    for i, r in enumerate(drawn):
        part = train.scored_in_slices(model, make_batch([r], tokenizer.pad_token_id), Settings(micro_batch=5))
        rows, width = slice(6 * i, 6 * i + 6), r.ids.shape[1]
        assert torch.equal(whole.mask[rows, :width], r.mask) and not whole.mask[rows, width:].any()
        torch.testing.assert_close(whole.logp[rows, :width], part.logp, rtol=0, atol=1e-9)
        torch.testing.assert_close(whole.entropy[rows, :width], part.entropy, rtol=0, atol=1e-9)


def test_the_prompts_order_is_an_endless_sequence_of_whole_shuffles():
    problems = tuple(range(10))
    line = prompts_at(problems, 5, 0, 40)
    assert all(sorted(line[i : i + 10]) == list(problems) for i in range(0, 40, 10))
    assert line[:10] != line[10:20]
    assert prompts_at(problems, 5, 7, 6) == line[7:13] and prompts_at(problems, 6, 0, 40) != line


def test_seeded_generators_depend_on_their_arguments_only():
    draws = {
        (s, t, p): torch.randint(2**40, (1,), generator=seeded(s, t, p)).item()
        for s in (0, 1)
        for t in (0, 1, 10)
        for p in ("sample", "order")
    }
    assert len(set(draws.values())) == len(draws)
    torch.manual_seed(0)
    assert torch.randint(2**40, (1,), generator=seeded(1, 10, "order")).item() == draws[1, 10, "order"]


def test_dynamic_sampling_refills_and_gives_up_in_the_end(tmp_path):
    """Prompts that all or none solve are replaced; with a verifier that knows only wrong, ten rollouts are
    drawn, nothing is learned, and the run goes on."""
    model, tokenizer, task = small_world()
    odd = lambda t, p: [a and int(q.prompt[0]) % 2 == 0 for a, q in zip(luck(t, p), p)]  # noqa: E731
    hard = replace(task, verify=odd)
    run = make_run((model, tokenizer, hard), build("dapo"), tmp_path)
    got = run.rollout()
    rate = got.tokens.reward.view(8, 8).mean(1)
    assert ((rate > 0) & (rate < 1)).all() and run.position > 8 and run.position % 8 == 0
    never = replace(task, verify=lambda texts, p: [False] * len(texts))
    run = make_run((model, tokenizer, never), build("dapo"), tmp_path, ledger="step")
    before = gradient_free(model)
    row = run.train_step()
    assert run.position == 8 * train.MAX_DRAWS and run.step == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert row["tokens"] == 0 and row["skipped"] == 0
    assert row["reward"] == 0 and row["length"] >= 1, "of all responses drawn"
    assert row["draws"] == train.MAX_DRAWS and row["no_contrast"] == 1


def test_groups_without_contrast_are_counted(tmp_path):
    """A verifier that knows three of eight prompts, half of the time: the groups of five say nothing."""
    model, tokenizer, task = small_world()
    known = {p.prompt for p in prompts_at(task.train, 0, 0, 3)}
    even = lambda texts, problems: [p.prompt in known and i % 2 == 0 for i, p in enumerate(problems)]  # noqa: E731
    run = make_run((model, tokenizer, replace(task, verify=even)), build("grpo"), tmp_path)
    row = run.train_step()
    assert row["no_contrast"] == 5 / 8 and row["draws"] == 1 and row["reward"] == 3 / 16


def test_a_run_that_learns_nothing_says_so_once(cli, home, monkeypatch):
    monkeypatch.setattr(rollout, "chain_verify", lambda text, problem: False)
    code, _, err = cli("--method", "grpo", "--steps", 12, "--eval-every", 20, "--out", "a", *TINY)
    assert code == 0 and err.count("ten steps in a row") == 1 and "mean 0.00" in err and "--method" in err
    assert all(r["no_contrast"] == 1 for r in rows_of("a")[1:])


@pytest.mark.parametrize(
    "reward, cut, words", [(0.0, 0.97, "--max-new-tokens above 11"), (0.0, 0.1, "--prompt-template"),
                           (1.0, 0.0, "too easy")]
)  # fmt: skip
def test_the_likely_cause_follows_from_the_numbers(reward, cut, words):
    run = make_run(small_world(), build("grpo"), model="x")
    run.rows = [{"reward": reward, "truncated": cut}] * 10
    assert words in run._nothing_learned() and f"{cut:.0%}" in run._nothing_learned()


def gradient_free(model):
    return [p.detach().clone() for p in model.parameters()]


def test_sampling_knows_the_progress_of_its_own_step(tmp_path, monkeypatch):
    """A resumed run hands the sampling hook the same progress as one never stopped, from its first step."""
    seen = []

    def sample(self, logits, position, rows, generator):
        seen.append((self.progress.step, self.progress.total, self.progress.temperature))

    monkeypatch.setattr(METHODS["mixed_cuts"], "sample", sample)
    run = make_run(small_world(), build("mixed_cuts"), tmp_path, temperature=0.8, steps=7)
    for step in range(2):
        run.train_step()
        assert set(seen) == {(step, 7, 0.8)}
        seen.clear()


def test_the_reference_is_the_starting_policy_in_its_own_precision():
    world = small_world()
    run = make_run(world, build("ref_kl"))
    assert all(torch.equal(a, b) for a, b in zip(run.reference.parameters(), world[0].parameters()))
    assert not any(p.requires_grad for p in run.reference.parameters())
    assert make_run(world, build("grpo")).reference is None


def test_a_reset_moves_the_reference_and_clears_the_optimizer(tmp_path):
    run = make_run(small_world(), build("prorl", every=2), tmp_path)
    run.train_step()
    run.maybe_reset(None)
    assert run.optimizer.state and not torch.equal(run.reference.lm_head.weight, run.model.lm_head.weight)
    run.train_step()
    run.maybe_reset(None)
    assert not run.optimizer.state and torch.equal(run.reference.lm_head.weight, run.model.lm_head.weight)


# ------------------------------------------------------------------------------------------------------------
# The entropy ledger


def test_eq_5_1_and_5_2_agree_for_a_small_step(world, batch):
    """dH_predicted is the first-order term of dH_measured: halving the step quarters their difference."""
    model = small_world()[0]
    start = gradient_free(model)
    g = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in start]
    gaps = []
    for size in (2e-4, 1e-4):
        ledger = Ledger.open(model, batch, Settings(micro_batch=128))
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction):
                p.add_(size * d)
        got = ledger.close(model)
        assert got["dH_predicted"] == pytest.approx(got["dH_measured"], rel=0.05)
        assert abs(got["dH_measured"]) > 1e-6
        gaps.append(abs(got["dH_predicted"] - got["dH_measured"]))
        with torch.no_grad():
            for p, old in zip(model.parameters(), start):
                p.copy_(old)
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.25)


def test_the_ledger_of_no_step_is_exactly_zero(world, batch):
    for settings in (Settings(), Settings(micro_batch=64)):
        got = Ledger.open(world[0], batch, settings).close(world[0])
        assert got["dH_predicted"] == 0.0 and abs(got["dH_measured"]) < 1e-12


def test_the_ledger_does_not_touch_the_run(tmp_path):
    """The same steps with and without it give the same policy, bit for bit."""
    weights = []
    for ledger in ("off", "step", "full"):
        world = small_world(double=False)
        run = make_run(world, build("opefo"), tmp_path, ledger=ledger, ledger_every=1)
        for _ in range(2):
            run.train_step()
        weights.append(gradient_free(world[0]))
    for other in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], other))


def test_the_ledger_of_a_real_step_holds_momentum_too(tmp_path):
    """Second step of AdamW, float64: prediction and measurement agree to first order in the step taken."""
    run = make_run(small_world(), build("grpo"), tmp_path, ledger="step", ledger_every=1, lr=1e-6)
    for row in (run.train_step(), run.train_step()):
        assert row["dH_measured"] != 0
        assert row["dH_predicted"] == pytest.approx(row["dH_measured"], rel=0.02)


def test_eq_5_3_flows_are_force_times_score_and_balance_as_the_method_says(world, batch):
    """Up minus down is the change of mean entropy on a table, per unit step, by an independent formula; plain
    GRPO has no force where all responses agree."""
    model = world[0]
    method, part = supplied(world, batch, "grpo", False)
    model.zero_grad(set_to_none=True)
    done = accumulate_gradient(model, part, method, Settings())
    tk = train.scored_in_slices(model, part, Settings())
    reward = tk.reward.view(32, 16).double()
    adv = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)).view(-1, 1)
    p = tk.logp.exp()
    score = tk.p2logp + tk.entropy * tk.p2 - p * (tk.logp + tk.entropy)
    flow = torch.where(tk.mask, adv / tk.mask.sum() * score, 0)
    torch.testing.assert_close(done.flow, flow, rtol=1e-6, atol=1e-10)
    assert done.metrics["flow_up"] == pytest.approx(float(flow[flow > 0].sum()), rel=1e-6)
    assert done.metrics["flow_down"] == pytest.approx(float(-flow[flow < 0].sum()), rel=1e-6)


def test_opefo_exact_balances_the_flows_that_the_ledger_books(world, batch):
    model = world[0]
    nets = []
    for name in ("grpo", "opefo"):
        method, part = supplied(world, batch, name, False)
        model.zero_grad(set_to_none=True)
        m = accumulate_gradient(model, part, method, Settings()).metrics
        nets.append(abs(m["flow_up"] - m["flow_down"]))
    assert nets[1] < 1e-6 < 1e-4 * nets[0] or nets[1] < 1e-3 * nets[0]


# ------------------------------------------------------------------------------------------------------------
# A run, end to end


KEYS = {
    "step",
    "reward",
    "entropy",
    "flow_up",
    "flow_down",
    "grad_norm",
    "tokens",
    "seconds",
    "skipped",
    "length",
}
AT_EVALUATIONS = {"pass@1", "pass@k", "distinct_correct", "k", "hard_pass@k", "eval_entropy"}


RUN_FILES = {"config.json", "metrics.jsonl", "samples.jsonl", "checkpoint", "checkpoint-previous"}
RUN_FILES |= {"checkpoint-best", "entropy.png", "summary.txt"}


def check_folder(folder, steps):
    """All that the docstring of `Run` promises about a finished run's folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["steps"] == steps and config["specs"] == [config["settings"]["method"]]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(steps + 1))
    assert all(set(r) >= KEYS for r in rows[1:]) and all(
        set(r) >= AT_EVALUATIONS for r in (rows[0], rows[-1])
    )
    assert "dH_measured" in rows[1] and "dH_predicted" in rows[1]
    assert (folder / "entropy.png").read_bytes().startswith(PNG)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} >= {0, steps} and all(isinstance(s["response"], str) for s in samples)
    assert all(s["reward"] == s["correct"] for s in samples)
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    ids = torch.tensor([tokenizer("1 2 3 4 -> 10", add_special_tokens=False)["input_ids"]])
    assert model(ids).logits.shape == (1, 6, len(tokenizer))
    left = {p.name for p in folder.iterdir()} - RUN_FILES
    assert not left, f"left lying about: {left}"
    return rows


def test_the_first_command_writes_what_it_promises(home):
    """The command line as a user types it, in a process of its own; two methods from one warm start."""
    methods = ["grpo", "opefo:form=exact"]
    run = process("--method", *methods, "--steps", 3, "--eval-every", 2, "--out", "out", *TINY, cwd=home)
    out, err = run.communicate()
    assert run.returncode == 0, err
    assert err.strip() == "", "the quiet mode is quiet"
    assert (home / "out" / "entropy.png").read_bytes().startswith(PNG)
    a, b = (check_folder(home / "out" / name, 3) for name in ("grpo", "opefo-form=exact"))
    assert without_clock(a[0]) == without_clock(b[0])
    assert a[1]["reward"] == b[1]["reward"], "both start from the same policy with the same prompts and draws"
    assert "lam" in b[1]
    table = out.splitlines()
    assert any(line.startswith("grpo ") for line in table) and any(
        "opefo:form=exact" in line for line in table
    )
    assert "entropy.png" in out and "pass@2" in out


def test_a_run_repeats_itself_and_depends_on_its_seed(cli, home):
    for name, more in (("a", []), ("b", []), ("c", ["--temperature", ".9"])):
        code, _, err = cli("--method", "grpo", "--steps", 2, "--out", name, *more, *TINY)
        assert code == 0, err
    assert rows_of("a") == rows_of("b") != rows_of("c")
    assert rows_of("a", "samples.jsonl") == rows_of("b", "samples.jsonl")


def test_the_micro_batch_hardly_changes_a_run(cli):
    for name, micro in (("a", 0), ("b", 16)):
        assert cli("--method", "opefo", "--steps", 1, "--micro-batch", micro, "--out", name, *TINY)[0] == 0
    a, b = rows_of("a")[1], rows_of("b")[1]
    for key in ("reward", "entropy", "flow_up", "flow_down", "lam", "grad_norm", "dH_predicted"):
        assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key


def test_evaluating_more_often_does_not_change_the_run(cli):
    for name, every in (("a", 1), ("b", 3)):
        assert cli("--method", "grpo", "--steps", 3, "--eval-every", every, "--out", name, *TINY)[0] == 0
    for a, b in zip(rows_of("a")[1:], rows_of("b")[1:]):
        assert all(a[k] == b[k] for k in KEYS if not k.startswith("seconds"))


def test_a_method_that_does_nothing_on_policy_says_so(cli):
    _, _, err = cli("--method", "clip_higher", "--steps", 1, "--out", "a", *TINY)
    assert "clip_higher" in err and "--updates-per-rollout" in err and "warning" in err
    _, _, err = cli("--method", "clip_higher", "--steps", 1, "--updates-per-rollout", 2, "--out", "b", *TINY)
    assert err == ""


def test_the_checkpoint_is_the_policy_that_was_evaluated(cli, home, capsys):
    """Load it as a stranger would, and evaluate again with the seed of the last evaluation; and `eval.py`."""
    from transformers import AutoModelForCausalLM

    from eval import evaluate
    from eval import main as eval_main

    assert cli("--method", "grpo", "--steps", 2, "--out", "a", *TINY)[0] == 0
    model = AutoModelForCausalLM.from_pretrained(home / "a" / "checkpoint").eval()
    seed = seeded(0, 2, "evaluate").initial_seed()
    again = evaluate(rollout.TorchEngine(model, tiny_tokenizer()), chain_task(), 2, seed=seed)
    last = rows_of("a")[-1]
    assert all(again[k] == last[k] for k in AT_EVALUATIONS)
    assert eval_main(["a", "--k", "2", "--seed", str(seed)]) == 0
    lines = [x.split() for x in capsys.readouterr().out.splitlines()]
    mean, _, error = next(x[3:6] for x in lines if x[:2] == ["test", "at"])  # other draws, the same policy
    assert abs(float(mean) - last["pass@1"]) < 6 * float(error)


ALL = [f"{name}:updates_per_rollout=2" if not cls.on_policy else name for name, cls in METHODS.items()]


@pytest.mark.slow
def test_every_method_runs_end_to_end(home):
    """Each for a few steps through the command line, in one process."""
    command = ["--method", *ALL, "--steps", 3, "--eval-every", 2, "--out", "out", *TINY]
    run = process(*command, cwd=home)
    out, err = run.communicate()
    assert run.returncode == 0, err
    assert "Traceback" not in err
    for spec in ALL:
        rows = check_folder(home / "out" / train.label_of(spec), 3)
        assert all(r["skipped"] == 0 for r in rows[1:])
    assert (home / "out" / "entropy.png").read_bytes().startswith(PNG)
    assert len([line for line in out.splitlines() if "→" in line]) == len(ALL)


@pytest.mark.parametrize(
    "spec", ["steer", "clip_cov:ratio=.02,updates_per_rollout=2", "ref_kl", "lp_reg", "dapo"]
)
def test_methods_of_each_place_run_through_the_command_line(cli, home, spec):
    code, _, err = cli("--method", spec, "--steps", 2, "--micro-batch", 16, "--out", "a", *TINY)
    assert code == 0, err
    rows = check_folder(home / "a", 2)
    kl = [row["kl_ref"] for row in rows if "kl_ref" in row]
    assert abs(kl[0]) < 1e-6 < kl[1] if spec == "ref_kl" else not kl


# ------------------------------------------------------------------------------------------------------------
# Going on after an interruption

SIX = ["--steps", "6", "--eval-every", "2", "--ledger-every", "2"]
# State that lives across steps: a controller, a reference, the optimizer, the position in the data (dapo).
STATEFUL = ["par:schedule=entropy", "prorl:every=2", "dapo", "opefo:target_entropy=.9"]


class Killed(BaseException):
    """Nothing in the program catches it, so nothing is tidied up: the process is gone."""


def kill_at(patch, moment, count):
    """Make the run die the `count`-th time that it reaches a moment."""
    reached = []

    def now():
        reached.append(1)
        if len(reached) == count:
            raise Killed

    def before(owner, name, ours=lambda *_, **__: True):
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if ours(*args, **kwargs):
                now()
            return real(*args, **kwargs)

        patch.setattr(owner, name, wrapped)

    if moment == "before the optimizer's step":
        before(torch.optim.AdamW, "step")
    elif moment == "in the middle of an evaluation":
        before(train, "evaluate")
    elif moment == "with half of the weights written":
        before(train.dcp, "save")
    elif moment == "in the middle of state.pt":
        real = torch.save

        def half(state, path):
            real(state, path)
            if not isinstance(path, Path):  # a tensor of training/
                return
            if len(reached) == count - 1:
                Path(path).write_bytes(Path(path).read_bytes()[:1000])
            now()

        patch.setattr(torch, "save", half)
    elif moment == "between metrics and checkpoint":
        before(Run, "save")
    elif moment == "in the middle of a line":
        real_append = Run._append

        def cut(self, name, row):
            real_append(self, name, row)
            if name == "metrics.jsonl" and len(reached) == count - 1:
                path = self.folder / name
                path.write_bytes(path.read_bytes()[:-25])
            now()

        patch.setattr(Run, "_append", cut)
    elif moment == "before a rename":
        before(Path, "rename", lambda path, _: "checkpoint" in path.name)
    else:
        before(shutil, "rmtree")


MOMENTS = [
    ("before the optimizer's step", 4),
    ("in the middle of an evaluation", 3),
    ("with half of the weights written", 3),
    ("in the middle of state.pt", 2),
    ("between metrics and checkpoint", 3),
    ("in the middle of a line", 20),
    ("before a rename", 3),  # between the two renames of a checkpoint: only the previous one is there
    ("before a rename", 4),
    ("before a rename", 5),
    ("while the old checkpoint is removed", 4),
]
EARLY = [  # and the same at the start of a run
    ("before the optimizer's step", 1),
    ("in the middle of an evaluation", 1),
    ("with half of the weights written", 1),
    ("in the middle of state.pt", 1),
    ("between metrics and checkpoint", 1),
    ("in the middle of a line", 7),
    ("before a rename", 1),
    ("before a rename", 2),
    ("while the old checkpoint is removed", 1),
]


@pytest.fixture(scope="module")
def uninterrupted(warm_cache, tmp_path_factory):
    """Rows of runs that nobody stopped, by method."""
    folder, known = tmp_path_factory.mktemp("whole"), {}

    def rows(*specs):
        for spec in specs:
            if spec not in known:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("ENTROPY_FLOW_CACHE", str(warm_cache))
                    out = folder / train.label_of(spec)
                    assert train.main(["--method", spec, "--out", str(out), *SIX, *TINY]) == 0
                known[spec] = rows_of(out), rows_of(out, "samples.jsonl")
                learned = [r["grad_norm"] > 0 and 0.05 < r["reward"] < 0.95 for r in known[spec][0][1:]]
                assert all(learned), "a policy that stands still says nothing about resuming"
        return [known[s] for s in specs]

    return rows


@pytest.mark.parametrize(
    "moment, count", MOMENTS + [pytest.param(*early, marks=pytest.mark.slow) for early in EARLY]
)
def test_a_run_killed_at_any_moment_goes_on_with_the_same_numbers(cli, home, uninterrupted, moment, count):
    spec = "par:schedule=entropy"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, moment, count)
        cli("--method", spec, "--out", "a", *SIX, *TINY)
    code, _, err = cli("--resume", "a", "--quiet")
    assert code == 0, err
    ((metrics, samples),) = uninterrupted(spec)
    assert rows_of("a") == metrics and rows_of("a", "samples.jsonl") == samples
    check_folder(home / "a", 6)


@pytest.mark.parametrize("spec", STATEFUL)
def test_the_state_of_a_method_lives_through_a_kill(cli, home, uninterrupted, spec):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, "in the middle of an evaluation", 3)  # two steps after the last checkpoint
        cli("--method", spec, "--out", "a", *SIX, *TINY)
    assert cli("--resume", "a", "--quiet")[0] == 0
    ((metrics, _),) = uninterrupted(spec)
    assert rows_of("a") == metrics


def test_a_comparison_killed_in_its_second_method_goes_on(cli, home, uninterrupted):
    specs = ["par:schedule=entropy", "opefo:target_entropy=.9"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, "before the optimizer's step", 9)
        cli("--method", *specs, "--out", "a", *SIX, *TINY)
    before = (home / "a" / train.label_of(specs[0]) / "metrics.jsonl").read_text()
    code, out, err = cli("--resume", "a", "--quiet")
    assert code == 0, err
    for spec, (metrics, _) in zip(specs, uninterrupted(*specs)):
        assert rows_of(home / "a" / train.label_of(spec)) == metrics
    assert (home / "a" / train.label_of(specs[0]) / "metrics.jsonl").read_text() == before, (
        "the first was done"
    )
    assert all(spec in out for spec in specs) and (home / "a" / "entropy.png").exists()


def test_resuming_a_finished_run_changes_no_number(cli, home):
    assert cli("--method", "grpo", "--steps", 2, "--out", "a", *TINY)[0] == 0
    text = (home / "a" / "metrics.jsonl").read_text()
    assert cli("--resume", "a", "--quiet")[0] == 0
    assert (home / "a" / "metrics.jsonl").read_text() == text


def test_more_steps_on_resume_give_the_numbers_of_a_longer_run(cli, home):
    for name, steps in (("short", 2), ("long", 4)):
        assert cli("--method", "grpo", "--steps", steps, "--eval-every", 2, "--out", name, *TINY)[0] == 0
    assert cli("--resume", "short", "--steps", 4, "--quiet")[0] == 0
    assert rows_of("short") == rows_of("long")
    assert json.loads((home / "short" / "config.json").read_text())["settings"]["steps"] == 4


def test_resume_finds_the_newest_run_and_checkpoint_previous(cli, home):
    assert cli("--method", "grpo", "--steps", 4, "--eval-every", 2, *TINY)[0] == 0
    text = rows_of("runs/grpo-s0")
    shutil.rmtree("runs/grpo-s0/checkpoint")  # as the message about a damaged one advises
    assert cli("--resume", "--quiet")[0] == 0
    assert rows_of("runs/grpo-s0") == text
    shutil.rmtree("runs/grpo-s0/checkpoint")
    shutil.rmtree("runs/grpo-s0/checkpoint-previous")
    assert cli("--resume", "--quiet")[0] == 0
    assert rows_of("runs/grpo-s0") == text, "without any checkpoint it starts anew"


def wait_for(path, lines, run):
    end = time.monotonic() + 120
    while time.monotonic() < end and run.poll() is None:
        if path.exists() and path.read_text().count("\n") >= lines:
            return
        time.sleep(0.005)
    raise AssertionError(f"{path} did not get {lines} lines: {run.poll()} {run.communicate()}")


@pytest.mark.slow
def test_kill_9_of_the_process_itself(home, cli, uninterrupted):
    spec = "par:schedule=entropy"
    run = process("--method", spec, "--out", "a", *SIX, *TINY, cwd=home)
    wait_for(home / "a" / "metrics.jsonl", 4, run)
    run.kill()
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    code, _, err = cli("--resume", "a", "--quiet")
    assert code == 0, err
    assert rows_of("a") == uninterrupted(spec)[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_random_moments_until_it_is_done(home, uninterrupted, seed):
    """Several deaths in a row, at moments nobody chose, evaluations and checkpoints at every second step."""
    draw, specs, kills = random.Random(seed), ["par:schedule=entropy", "prorl:every=2"], 0
    command = ["--method", *specs, "--out", "a", *SIX, *TINY]
    for attempt in range(40):
        run = process(*command, cwd=home)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.communicate(timeout=draw.uniform(1, 4) * 1.15**attempt)
        if run.returncode is None:
            run.kill()
            run.communicate()
            kills += 1
        else:
            assert run.returncode == 0, (run.returncode, run.args)
            break
        if (home / "a" / "config.json").exists():
            command = ["--resume", "a", "--quiet"]
    assert run.returncode == 0 and kills >= 1
    for spec, (metrics, samples) in zip(specs, uninterrupted(*specs)):
        assert rows_of(home / "a" / train.label_of(spec)) == metrics
        assert rows_of(home / "a" / train.label_of(spec), "samples.jsonl") == samples


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(home, cli, uninterrupted, number):
    spec = "par:schedule=entropy"
    run = process("--method", spec, "--out", "a", *SIX, *TINY, cwd=home)
    wait_for(home / "a" / "metrics.jsonl", 4, run)
    run.send_signal(number)
    out, err = run.communicate()
    assert run.returncode == 130 and "Traceback" not in err
    assert "python train.py --resume a" in out + err
    assert (home / "a" / "entropy.png").exists()
    state = torch.load(home / "a" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == rows_of("a")[-1]["step"] < 6, "not one step is lost"
    code, _, err = cli("--resume", "a", "--quiet")
    assert code == 0, err
    assert rows_of("a") == uninterrupted(spec)[0][0]


def interrupted(*_, **__):
    """Ctrl-C, as the terminal sends it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # the tests run in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_in_a_checkpoint_leaves_the_last_one(cli, home, monkeypatch, uninterrupted):
    """torch wraps it in an exception of its own, which once was told as a full disk."""
    from torch.distributed.checkpoint import FileSystemWriter

    spec, real, saved = "par:schedule=entropy", FileSystemWriter.write_data, []

    def write(*args):
        saved.append(1)
        if len(saved) == 3:
            interrupted(), interrupted()
        return real(*args)

    monkeypatch.setattr(FileSystemWriter, "write_data", write)
    code, _, err = cli("--method", spec, "--out", "a", *SIX, *TINY)
    assert code == 130 and err.endswith("stopped at once; go on from the last checkpoint: --resume a\n"), err
    assert not (home / "a" / ".checkpoint.part").exists()
    assert torch.load(home / "a" / "checkpoint" / "state.pt", weights_only=True)["step"] == 2
    code, _, err = cli("--resume", "a", "--quiet")
    assert code == 0, err
    assert rows_of("a") == uninterrupted(spec)[0][0]


def test_a_second_ctrl_c_in_the_middle_of_a_write_is_no_full_disk(cli, home, monkeypatch):
    """torch's writer then ends with "unexpected pos", which is also what it says on a full disk."""
    from contextlib import contextmanager

    from torch.distributed.checkpoint.filesystem import FileSystem

    real, opened = FileSystem.create_stream, []

    class Stream:
        def __init__(self, stream):
            self.stream, self.writes = stream, 0

        def write(self, data):
            self.writes += 1
            if self.writes == 2:
                interrupted(), interrupted()
            return self.stream.write(data)

        def __getattr__(self, name):
            return getattr(self.stream, name)

    @contextmanager
    def create(*args):
        opened.append(str(args[1]))
        with real(*args) as stream:
            yield Stream(stream) if opened[-1].endswith(".distcp") and len(opened) > 3 else stream

    monkeypatch.setattr(FileSystem, "create_stream", create)
    code, _, err = cli("--method", "grpo", "--out", "a", *SIX, *TINY)
    assert code == 130 and err.endswith("stopped at once; go on from the last checkpoint: --resume a\n"), err


# ------------------------------------------------------------------------------------------------------------
# Bad input: one or two lines that name flag, value and remedy; exit code 2; nothing overwritten


@pytest.mark.slow
def test_a_disk_that_is_full_in_the_end_leaves_the_last_checkpoint(home, cli, uninterrupted):
    """The files of a checkpoint may not grow beyond 300 kB: the libraries report that as they like."""
    spec = "par:schedule=entropy"
    run = process("--method", spec, "--out", "a", *SIX, *TINY, cwd=home)
    wait_for(home / "a" / "metrics.jsonl", 3, run)
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (300_000, 300_000))
    out, err = run.communicate()
    complains((run.returncode, out, err), "--out a", "checkpoint", "--resume a")
    assert (home / "a" / "checkpoint" / "state.pt").exists()
    code, _, err = cli("--resume", "a", "--quiet")
    assert code == 0, err
    assert rows_of("a") == uninterrupted(spec)[0][0]


@pytest.fixture(scope="module")
def finished(warm_cache, tmp_path_factory):
    """A finished run to damage copies of."""
    folder = tmp_path_factory.mktemp("finished") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENTROPY_FLOW_CACHE", str(warm_cache))
        assert train.main(["--method", "prorl", "--steps", "2", "--out", str(folder), *TINY]) == 0
    return folder


FILES = [
    "config.json", "generation_config.json", "model.safetensors", "sha256.json", "state.pt", "tokenizer.json",
    "tokenizer_config.json", "training/.metadata", "training/__0_0.distcp",
]  # fmt: skip


def test_every_file_of_a_checkpoint_is_tested_below(finished):
    folder = finished / "checkpoint"
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == FILES


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "one bit", "garbage"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_nothing_is_overwritten(cli, home, finished, name, damage):
    shutil.copytree(finished, home / "a")
    path = home / "a" / "checkpoint" / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        flipped = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        damaged = {
            "truncated": data[: len(data) // 2],
            "empty": b"",
            "one bit": flipped,
            "garbage": b"\xff" * 64,
        }
        path.write_bytes(damaged[damage])
    before = contents(home)
    complains(
        cli("--resume", "a", "--quiet", "--steps", "3"), "--resume a", "checkpoint", "damaged", "remove"
    )
    assert contents(home) == before


@pytest.mark.parametrize("tail", [b'{"step": 3, "rew', b"\xff\xfe\x00", b"7\n", b"{}\n", b"\n"])
def test_a_damaged_last_line_of_metrics_is_dropped(cli, home, finished, tail):
    shutil.copytree(finished, home / "a")
    before = rows_of("a")
    with open(home / "a" / "metrics.jsonl", "ab") as file:
        file.write(tail)
    code, _, err = cli("--resume", "a", "--quiet")
    assert code == 0, err
    assert rows_of("a") == before


# ------------------------------------------------------------------------------------------------------------
# Numbers that are none


def poison(patch, bad):
    """Losses of the updates with these numbers (from 0) become NaN."""
    real, count = train.batch_loss, []

    def wrapped(tk, plan, method):
        loss, metrics = real(tk, plan, method)
        count.append(1)
        return (loss * math.nan if len(count) - 1 in bad else loss), metrics

    patch.setattr(train, "batch_loss", wrapped)


def test_a_non_finite_update_is_skipped_counted_and_reported(cli, home, monkeypatch):
    poison(monkeypatch, {1, 2})
    code, _, err = cli("--method", "opefo:target_entropy=.9", "--steps", 4, "--out", "a", *TINY)
    assert code == 0
    rows = rows_of("a")
    assert [r["skipped"] for r in rows[1:]] == [0, 1, 1, 0]
    assert rows[2]["loss"] is None and rows[2]["grad_norm"] is None, "null, since NaN is not JSON"
    assert rows[2]["dH_measured"] == 0 if "dH_measured" in rows[2] else True
    assert all(math.isfinite(rows[i]["entropy"]) for i in range(1, 5))
    assert "2 updates skipped" in err
    check_folder(home / "a", 4)


def test_a_skipped_update_leaves_weights_optimizer_and_controller(monkeypatch, tmp_path):
    run = make_run(small_world(), build("entropic"), tmp_path)
    row = run.train_step()
    assert run.method.error_sum == pytest.approx(row["entropy"] - 0.1), "the controller saw the good update"
    weights, state = gradient_free(run.model), json.dumps(run.method.state_dict(), default=str)
    moments = [v.clone() for s in run.optimizer.state.values() for v in s.values()]
    poison(monkeypatch, {0})
    assert run.train_step()["skipped"] == 1 and run.skipped_in_row == 1
    assert all(torch.equal(a, b) for a, b in zip(weights, run.model.parameters()))
    assert all(
        torch.equal(a, b)
        for a, b in zip(moments, (v for s in run.optimizer.state.values() for v in s.values()))
    )
    assert json.dumps(run.method.state_dict(), default=str) == state
    run.train_step()
    assert run.skipped_in_row == 0, "a good update ends the row"


def test_ten_non_finite_updates_in_a_row_stop_the_run_with_a_checkpoint(cli, home, monkeypatch):
    poison(monkeypatch, set(range(2, 100)))
    code, out, err = cli("--method", "grpo", "--steps", 30, "--eval-every", 40, "--out", "a", *TINY)
    assert code == 1 and "Traceback" not in err
    assert "ten" in err and "checkpoint" in err and "--lr" in err
    assert [r["step"] for r in rows_of("a")] == list(range(13)) and (home / "a" / "entropy.png").exists()
    state = torch.load(home / "a" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == 12 and state["skipped_in_row"] == 10


def test_an_infinite_coefficient_stops_the_run(cli):
    """beta x KL = inf x 0 = NaN from the first update on."""
    code, _, err = cli("--method", "ref_kl:beta=1e39", "--steps", 20, "--out", "a", *TINY)
    assert code == 1 and "Traceback" not in err and "ten" in err
    assert len(rows_of("a")) == 11


@pytest.mark.parametrize("lr", ["1e30", "9e35"])
def test_an_absurd_learning_rate_is_no_traceback(cli, home, lr):
    code, _, err = cli("--method", "grpo", "--lr", lr, "--grad-clip", 0, "--steps", 12, "--out", "a", *TINY)
    assert code in (0, 1) and "Traceback" not in err
    rows_of("a")
    if code == 1:
        assert "--lr" in err and "checkpoint" in err


def test_a_policy_that_turned_nan_ends_the_run_and_keeps_the_last_good_checkpoint(cli, home, monkeypatch):
    real, count = torch.optim.AdamW.step, []

    def step(self, *args, **kwargs):
        real(self, *args, **kwargs)
        count.append(1)
        if len(count) == 3:
            self.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    code, _, err = cli("--method", "grpo", "--steps", 9, "--eval-every", 2, "--out", "a", *TINY)
    assert code == 1 and "NaN" in err and "checkpoint" in err
    state = torch.load(home / "a" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == 2
    from safetensors.torch import load_file

    assert all(
        v.isfinite().all() for v in load_file(home / "a" / "checkpoint" / "model.safetensors").values()
    )


# ------------------------------------------------------------------------------------------------------------
# Help


def test_tokens_of_a_batch_are_what_the_design_says():
    """Every field that the loop fills has the promised shape."""
    world = small_world()
    tk = train.scored_in_slices(world[0], draw_batch(world, 4, 4), Settings(micro_batch=8))
    assert isinstance(tk, Tokens)
    shape = tk.ids.shape
    for name in ("mask", "rollout_logp", "logp", "entropy", "p2", "p2logp"):
        assert getattr(tk, name).shape == shape, name
    for name in ("reward", "group", "truncated", "correct"):
        assert getattr(tk, name).shape == shape[:1], name
    assert tk.mask.dtype == torch.bool and tk.old_logp is None and tk.ref_logp is None
