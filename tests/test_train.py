"""Chapter 5: one update, the ledger, a run's numbers and files, and going on after it was stopped."""

import contextlib
import importlib.util
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import PNG, REPO, TINY, complains, contents, process, rows_of, without_clock
from torch.distributed.checkpoint.filesystem import FileSystem

import grpo
import rollout
import train
from grpo import Policy, Progress, Tokens, concat_padded
from interventions import METHODS, build
from rollout import Sampling, TinyModel, TorchEngine, answer, chain_task, tiny_tokenizer
from train import Ledger, Ranks, Run, Settings, Update, prompts_at, score_batch, seeded

ALONE = Ranks()


# ------------------------------------------------------------------------------------------------------------
# Tools


def lucky(text, problem):
    return zlib.crc32(f"{problem.prompt}/{text}".encode()) % 3 == 0


def luck(texts, problems):
    """A verifier for policies with random weights: a third of all responses is right."""
    return list(map(lucky, texts, problems))


def small_world(double=True, seed=0):
    """A random-weight policy of one layer, its tokenizer, and a task in which it gets rewards."""
    tokenizer = tiny_tokenizer()
    task = replace(chain_task(), verify=luck)
    model = TinyModel(32, 32, 1, 1).build(tokenizer, seed).eval()
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


def draw_batch(world, prompts=32, group=16, first=0, limit=11, hook=short_answers):
    """Rewarded responses."""
    model, tokenizer, task = world
    how = Sampling(group, limit, hook=hook)
    problems, generator = task.train[first : first + prompts], torch.Generator().manual_seed(first)
    tokens, _ = answer(TorchEngine(model, tokenizer), task, problems, how, generator)
    return replace(tokens, reward=tokens.correct.float())


def make_run(world, method, folder=None, **settings):
    model, tokenizer, task = world
    s = replace(Settings(prompts=8, group_size=8, grad_clip=0.0, ledger="off"), **settings)
    run = train.make_run(s, method, Path(folder or "."), task, model, tokenizer)
    run.rows = [{"step": 0}]  # as if the first policy had been evaluated
    return run


def run_of(policy, method=None, settings=None, ranks=ALONE):
    """What one update, a ledger and a pass read of a run."""
    return SimpleNamespace(policy=policy, method=method, settings=settings or Settings(), ranks=ranks)


def update(policy, batch, method, settings=None, ranks=ALONE):
    """The part of `train` that makes the gradient: (Update, its numbers)."""
    policy.zero_grad(set_to_none=True)
    made = Update(run_of(policy, method, settings, ranks), batch)
    loss, metrics = grpo.batch_loss(made.tokens, made.own, method)
    made.backward(loss)
    return made, made.numbers(loss, metrics)


def gradient(policy):
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
    return torch.cat([g.flatten() for g in parts])


def weights_of(policy):
    return [p.detach().clone() for p in policy.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------------------
# One update


@pytest.fixture(scope="module")
def world():
    return small_world()


@pytest.fixture(scope="module")
def policy(world):
    return Policy(world[0])


@pytest.fixture(scope="module")
def batch(world):
    """512 responses of 32 prompts, unequal in length."""
    out = draw_batch(world)
    assert len(out.start) == 512 and len(set(out.lengths.tolist())) >= 8
    assert 0.2 < float(out.reward.mean()) < 0.5
    return out


def supplied(world, batch, name, off_policy):
    """Method and batch with what `train` supplies: reference, proxy; off-policy also old log-probs."""
    method, tokens = build(name), replace(batch)
    run = make_run(world, method)
    if run.reference is not None:
        with torch.no_grad():  # a reference that differs, else the penalty is nothing
            for p in run.reference.parameters():
                p.mul_(1.1)
    train.supply(run, tokens)
    if "outcome" in method.needs:
        tokens.outcome = 1000 * tokens.group + tokens.ids[:, 0]
    method.progress = Progress(step=3, total=10, seed=0, max_length=11)
    if off_policy:
        g = torch.Generator().manual_seed(1)
        now = score_batch(run, tokens)["logp"]
        tokens.old_logp = now + 0.2 * torch.randn(now.shape, generator=g, dtype=now.dtype)
    return method, tokens


AS_MEANT = [(name, not cls.on_policy) for name, cls in METHODS.items()]
THE_OTHER = [pytest.param(name, not off, marks=pytest.mark.slow) for name, off in AS_MEANT]


@pytest.mark.parametrize("name, off_policy", AS_MEANT + THE_OTHER)
def test_the_gradient_does_not_depend_on_micro_batches(world, policy, batch, name, off_policy):
    """512 responses at once against 4 x 128, through the model itself, in float64."""
    grads, flows, totals = [], [], []
    for micro in (0, 128):
        method, tokens = supplied(world, batch, name, off_policy)
        made, numbers = update(policy, tokens, method, Settings(micro_batch=micro))
        grads.append(gradient(policy))
        flows.append(made.flow)
        totals.append(numbers)
    moved = float(grads[0].norm())
    assert moved > 1e-6, "no gradient: the test says nothing"
    assert float((grads[0] - grads[1]).norm()) <= 1e-5 * moved
    assert torch.allclose(flows[0], flows[1], rtol=1e-4, atol=1e-9)
    for key, value in totals[0].items():
        assert totals[1][key] == pytest.approx(value, rel=1e-4, abs=1e-7), key


@pytest.mark.parametrize("bounds", [{"micro_batch": 60}, {"tokens_per_micro_batch": 700}], ids=str)
def test_the_float32_gradient_does_not_depend_on_micro_batches_either(batch, bounds):
    policy, grads = Policy(small_world(double=False)[0]), []
    for how in ({}, bounds):
        made, _ = update(policy, batch, build("opefo"), Settings(**how))
        grads.append(gradient(policy))
    assert not made.whole and len(train.Passes(made.run, batch).rows) >= 8
    assert float((grads[0] - grads[1]).norm()) <= 1e-5 * float(grads[0].norm())


@pytest.mark.parametrize("spec", ["grpo", "opefo", "psr", "entropy_bonus", "ref_kl"])
def test_in_micro_batches_only_what_teaches_is_passed_again(world, batch, spec, monkeypatch):
    """One pass without gradient over all responses, one with it over those in which the loss has a slope; a
    penalty has one in all of them."""
    reward = torch.where(batch.group < 10, 1.0, batch.reward)  # ten of 32 groups have no contrast
    batch = replace(batch, reward=reward, correct=reward > 0)
    (method, tokens), policy, rows = supplied(world, batch, spec, False), Policy(world[0]), [0, 0]
    real = policy.forward

    def counted(part, *args, **kwargs):
        rows[torch.is_grad_enabled()] += len(part.ids)
        return real(part, *args, **kwargs)

    monkeypatch.setattr(policy, "forward", counted)
    update(policy, tokens, method, Settings(micro_batch=60))
    teach = {"grpo": 352, "opefo": 352, "psr": int(reward.sum())}.get(spec, 512)
    assert rows[0] == 512 and rows[1] - teach in (0, 1), "the first response is passed in any case"


def test_an_update_without_any_slope_still_moves_by_momentum(batch):
    policy = Policy(small_world()[0])
    update(policy, replace(batch, reward=torch.zeros(512)), build("grpo"), Settings(micro_batch=60))
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_the_order_of_the_responses_does_not_matter(policy, batch):
    grads = []
    for index in (slice(None), torch.randperm(512, generator=torch.Generator().manual_seed(3))):
        update(policy, batch.rows(index), build("opefo"))
        grads.append(gradient(policy))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-9)


def group_normalised(reward):
    """(512, 1) advantages of plain GRPO."""
    reward = reward.view(32, 16).double()
    return ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)).view(-1, 1)


def test_a_strict_step_has_ratio_one_and_the_gradient_of_reinforce(policy, batch):
    """The loss value is -Σ coef A, which says nothing; its gradient is that of -Σ coef A log π."""
    assert batch.old_logp is None, "on a strict step the old policy is the current forward pass"
    _, numbers = update(policy, batch, build("grpo"))
    got, adv, count = gradient(policy), group_normalised(batch.reward), batch.mask.sum()
    policy.zero_grad(set_to_none=True)
    (-(policy(batch)["logp"] * adv).sum() / count).backward()
    torch.testing.assert_close(got, gradient(policy), rtol=1e-5, atol=1e-7)
    value = float(-(adv * batch.mask).sum() / count)
    assert numbers["loss"] == pytest.approx(value, abs=1e-6) and abs(value) < 0.2
    assert numbers["clip_fraction"] == numbers["kl_old"] == 0


@pytest.mark.parametrize("kind", ["tis", "icepop"])
def test_eq_2_17_mismatch_weights_multiply_the_gradient_of_a_step(policy, batch, kind):
    """Against the engine's own probabilities, 0.3 nats off: the gradient of -Σ w A log π, and the share of an
    ideal sample that is left."""
    logp = score_batch(run_of(policy), batch)["logp"]
    off = 0.3 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(2), dtype=logp.dtype)
    tokens, ratio = replace(batch, rollout_logp=logp - off), off.exp()
    w = ratio.clamp(max=1.2) if kind == "tis" else torch.where((ratio >= 0.9) & (ratio <= 1.2), ratio, 0)
    how = Settings(mismatch=kind, mismatch_low=0.9, mismatch_high=1.2)
    for settings in (how, replace(how, micro_batch=128)):
        _, numbers = update(policy, tokens, build("grpo"), settings)
        got = gradient(policy)
        policy.zero_grad(set_to_none=True)
        adv = group_normalised(batch.reward)
        (-(policy(batch)["logp"] * adv * w).sum() / batch.mask.sum()).backward()
        torch.testing.assert_close(got, gradient(policy), rtol=1e-5, atol=1e-7)
        rho = ratio[batch.mask]
        assert numbers["mismatch_ess"] == pytest.approx(float(rho.mean() ** 2 / rho.square().mean()))


def test_several_updates_start_at_ratio_one_and_then_leave_it(monkeypatch, tmp_path):
    run = make_run(small_world(), build("grpo"), tmp_path, updates_per_rollout=4, lr=1e-3)
    seen, real = [], train.batch_loss

    def spy(tk, plan, method):
        far = (
            0
            if tk.old_logp is None
            else (grpo.log_ratio(tk.logp.detach(), tk.old_logp) * tk.mask).abs().max()
        )
        loss, metrics = real(tk, plan, method)
        seen.append((float(far), tk.group.unique().tolist(), metrics["kl_old"]))
        return loss, metrics

    monkeypatch.setattr(train, "batch_loss", spy)
    row = next(train.train(run))
    assert len(seen) == 4 and seen[0][0] == 0 < 1e-3 < seen[1][0] < seen[3][0]
    groups = [g for _, gs, _ in seen for g in gs]
    assert sorted(groups) == list(range(8)), "every prompt is in exactly one update, whole"
    assert row["kl_old"] == pytest.approx(sum(kl for *_, kl in seen) / 4), "the first update counts, as 0"
    assert row["kl_old"] > 0 and math.isfinite(row["clip_fraction"])


@pytest.mark.parametrize("kept, updates", [([5, 3], 3), ([5, 1], 1), ([5, 9], 4), ([5, 0], 0)])
def test_every_rank_has_a_part_of_every_update(kept, updates):
    """Dynamic sampling that gives up may leave one rank with fewer groups than there are updates."""
    group = torch.arange(5).repeat_interleave(2)
    tokens = Tokens(torch.zeros(10, 3), torch.ones(10, 3, dtype=torch.bool), group=group)
    both = SimpleNamespace(all=lambda own: [own, kept[1]])
    run = run_of(None, settings=Settings(updates_per_rollout=4), ranks=both)
    batches = train.update_batches(run, tokens)
    assert len(batches) == updates and all(len(b.ids) for b in batches)
    found = [g for b in batches for g in b.group.tolist()]
    assert found == (group.tolist() if updates else []), "all groups, each whole and in one update"


@pytest.mark.parametrize("skip", [False, True], ids=["first", "after a skipped update"])
def test_before_a_rollouts_first_step_rounding_gives_a_kink_no_gradient(monkeypatch, tmp_path, skip):
    """float32, kl_cov's |log r|: the pass that scores the rollout is sliced unlike that of its update."""
    method, off = build("kl_cov", ratio=0.2), []
    how = {"updates_per_rollout": 2, "tokens_per_micro_batch": 100}
    run = make_run(small_world(double=False), method, tmp_path, **how)

    class Spy(Update):
        def numbers(self, loss, metrics):
            policy = self.run.policy
            own = [p.grad.clone() for p in policy.parameters()]
            got = gradient(policy)
            update(policy, replace(self.batch, old_logp=None), method)
            off.append(float((got - gradient(policy)).norm() / got.norm()))
            for p, g in zip(policy.parameters(), own):
                p.grad = g * math.nan if skip and len(off) == 1 else g
            return super().numbers(loss, metrics)

    monkeypatch.setattr(train, "Update", Spy)
    assert next(train.train(run))["skipped"] == skip and off[skip] <= 1e-5


# Batches


def test_a_batch_of_several_rollouts_scores_like_its_parts(world, policy):
    """Rollouts of different widths and prompt lengths, put together: same statistics, groups kept apart."""
    draws = enumerate([(None, 4), (short_answers, 11), (None, 11)])
    parts = [draw_batch(world, 3, 2, first=3 * i, limit=limit, hook=hook) for i, (hook, limit) in draws]
    batch = concat_padded(parts, world[1].pad_token_id)
    whole = score_batch(run_of(policy), batch)
    for i, part in enumerate(parts):
        alone = score_batch(run_of(policy, settings=Settings(micro_batch=5)), part)
        rows, width = slice(6 * i, 6 * i + 6), part.ids.shape[1]
        assert torch.equal(batch.mask[rows, :width], part.mask) and not batch.mask[rows, width:].any()
        for key in ("logp", "entropy", "p2", "p2logp"):
            torch.testing.assert_close(whole[key][rows, :width], alone[key], rtol=0, atol=1e-9)


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
    run = make_run((model, tokenizer, replace(task, verify=odd)), build("dapo"), tmp_path)
    tokens, row = train.draw_responses(run)
    rate = tokens.reward.view(8, 8).mean(1)
    assert ((rate > 0) & (rate < 1)).all() and tokens.group.view(8, 8).eq(tokens.group[::8, None]).all()
    assert row["draws"] > 1 and run.prompts_used == 8 * row["draws"]
    assert row["kept_reward"] == float(rate.mean()) and row["kept_no_contrast"] == 0 < row["no_contrast"] < 1
    never = replace(task, verify=lambda texts, p: [False] * len(texts))
    run = make_run((model, tokenizer, never), build("dapo"), tmp_path, ledger="step")
    before = weights_of(model)
    row = next(train.train(run))
    assert run.prompts_used == 8 * train.MAX_DRAWS and run.step == 1 and equal(before, model.parameters())
    assert row["tokens"] == 0 and row["skipped"] == 0
    assert row["reward"] == 0 and row["length"] >= 1, "of all responses drawn"
    assert row["draws"] == train.MAX_DRAWS and row["no_contrast"] == 1
    run = make_run((model, tokenizer, never), build("dapo+ref_kl+rlrt"), tmp_path, updates_per_rollout=2)
    assert next(train.train(run))["tokens"] == 0, "nothing to score"


def test_an_outcome_is_a_number_for_problem_and_answer(world, tmp_path):
    """The same in every step, other blanks no other answer; filled only where a method needs it."""
    task, few = world[2], world[2].train[:2]
    texts = ["1 + 2 3", "1  + 2 3", "2 + 1 3", "1 + 2 3"]
    one, blank, other, elsewhere = rollout.outcomes(task, few, texts).tolist()
    assert one == blank and len({one, other, elsewhere}) == 3
    assert one == rollout.outcomes(task, few[:1], texts[:1]).item()
    for name, there in (("outcome_exploration", True), ("grpo", False)):
        run = make_run(small_world(), build(name), tmp_path / name, prompts=2, group_size=4)
        run.method.progress = Progress()
        tokens, _ = train.draw_responses(run)
        assert (tokens.outcome is not None) == there


def test_the_teacher_scores_right_responses_after_another_right_one(world, batch):
    """Against the model alone on [prompt][other][prompt][response], in which only the other one is looked
    for; -inf, for a weight of 1, in all other rows.  Seed and step decide on the draw."""
    model, few = world[0], batch.rows(slice(0, 64))  # four groups

    def teacher(step=3, tokens=few, seed=0, **how):
        run = make_run(world, build("rlrt"), seed=seed, **how)
        run.step = step
        train.supply(run, tokens := replace(tokens))
        return tokens.teacher_logp

    got, right, scored = teacher(), few.correct.tolist(), set()
    text = [few.full_ids[i, : few.start[i] + 1 + few.lengths[i]] for i in range(64)]
    with torch.no_grad():
        for i in range(64):
            n, fits = int(few.lengths[i]), []
            others = [j for j in range(64) if right[j] and j != i and few.group[j] == few.group[i]]
            for j in others if right[i] else []:
                logp = model(torch.cat([text[j], text[i]])[None]).logits[0, -n - 1 : -1].log_softmax(-1)
                fits.append(bool(torch.allclose(logp.gather(1, few.ids[i, :n, None])[:, 0], got[i, :n])))
            scored |= {i} if fits else set()
            assert any(fits) if fits else (got[i] == -math.inf).all()
    assert 10 < len(scored) < 40
    assert torch.equal(got, teacher()) and not torch.equal(got, teacher(4))
    assert not torch.equal(got, teacher(seed=1)) and torch.allclose(got, teacher(micro_batch=5))
    wrong = replace(few, correct=torch.zeros_like(few.correct))
    assert (teacher(tokens=wrong) == -math.inf).all()

    class OneOfTwo(Ranks):  # the other has right responses and makes two passes
        def max(self, value):
            return max(value, 2)

    run, passes = make_run(world, build("rlrt")), []
    run.ranks = OneOfTwo()
    run.policy.register_forward_hook(lambda *_: passes.append(1))
    assert (train.teacher_logp(run, wrong) == -math.inf).all() and len(passes) == 2


def test_the_teacher_respects_the_context_of_the_model(batch):
    world = small_world()
    run = make_run(world, build("rlrt"))
    longest = {}
    for room in (64, 20):
        world[0].config.max_position_embeddings = room
        train.supply(run, tokens := replace(batch))
        length = (tokens.start + 1 + tokens.lengths)[(tokens.teacher_logp > -math.inf).any(1)]
        longest[room] = int(length.max())
    shortest = int((batch.start + 1 + batch.lengths).min())
    assert longest[20] <= 20 - shortest < longest[64]


def test_groups_without_contrast_are_counted(tmp_path):
    """A verifier that knows three of eight prompts, half of the time: the groups of five say nothing."""
    model, tokenizer, task = small_world()
    known = {p.prompt for p in prompts_at(task.train, 0, 0, 3)}
    even = lambda texts, problems: [p.prompt in known and i % 2 == 0 for i, p in enumerate(problems)]  # noqa: E731
    run = make_run((model, tokenizer, replace(task, verify=even)), build("grpo"), tmp_path)
    _, row = train.draw_responses(run)
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
def test_the_likely_cause_follows_from_the_numbers(world, reward, cut, words):
    run = make_run(world, build("grpo"), model="x")
    run.rows = [{"reward": reward, "truncated": cut}] * 10
    assert words in run._nothing_learned() and f"{cut:.0%}" in run._nothing_learned()


def test_sampling_knows_the_progress_of_its_own_step(tmp_path, monkeypatch):
    """A resumed run hands the sampling hook the same progress as one never stopped, from its first step."""
    seen = []

    def sample(self, logits, position, rows, generator):
        seen.append((self.progress.step, self.progress.total, self.progress.temperature))

    monkeypatch.setattr(METHODS["mixed_cuts"], "sample", sample)
    run = make_run(small_world(), build("mixed_cuts"), tmp_path, temperature=0.8, steps=7)
    for step, _ in zip(range(2), train.train(run)):
        assert set(seen) == {(step, 7, 0.8)}
        seen.clear()


def test_prorl_moves_the_reference_and_clears_the_optimizer(tmp_path):
    """The reference is the starting policy in its own precision, frozen; then that of every second step."""
    world = small_world()
    run = make_run(world, build("prorl", every=2), tmp_path)
    start = weights_of(run.reference)
    assert equal(start, world[0].parameters()) and not any(
        p.requires_grad for p in run.reference.parameters()
    )
    rows = train.train(run)
    next(rows)
    assert run.optimizer.state and equal(start, run.reference.parameters())
    assert not equal(start, run.policy.parameters())
    next(rows)
    assert not run.optimizer.state and equal(run.reference.parameters(), run.policy.parameters())
    assert make_run(world, build("grpo")).reference is None


# ------------------------------------------------------------------------------------------------------------
# The entropy ledger


def test_eq_5_1_and_5_2_agree_for_a_small_step(batch):
    """dH_predicted is the first-order term of dH_measured: halving the step quarters their difference."""
    policy = Policy(small_world()[0])
    start = weights_of(policy)
    g = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in start]
    gaps = []
    for size in (2e-4, 1e-4):
        ledger = Ledger.open(run_of(policy, settings=Settings(micro_batch=128)), batch)
        with torch.no_grad():
            for p, d in zip(policy.parameters(), direction):
                p.add_(size * d)
        got = ledger.close()
        assert got["dH_predicted"] == pytest.approx(got["dH_measured"], rel=0.05)
        assert abs(got["dH_measured"]) > 1e-6
        gaps.append(abs(got["dH_predicted"] - got["dH_measured"]))
        with torch.no_grad():
            for p, old in zip(policy.parameters(), start):
                p.copy_(old)
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.25)


def test_the_ledger_of_no_step_is_exactly_zero(policy, batch):
    for settings in (Settings(), Settings(micro_batch=64)):
        got = Ledger.open(run_of(policy, settings=settings), batch).close()
        assert got["dH_predicted"] == 0.0 and abs(got["dH_measured"]) < 1e-12


def test_the_ledger_does_not_touch_the_run(tmp_path):
    """The same steps with and without it give the same policy, bit for bit."""
    weights = []
    for ledger in ("off", "step", "full"):
        run = make_run(small_world(double=False), build("opefo"), tmp_path, ledger=ledger, ledger_every=2)
        rows = [row for _, row in zip(range(3), train.train(run))]
        booked = [ledger != "off" and step % 2 == 0 for step in range(3)]
        assert ["dH_measured" in r for r in rows] == booked, "every second step, the first included"
        assert ["net_flow_up" in r for r in rows] == [b and ledger == "full" for b in booked]
        weights.append(weights_of(run.policy))
    assert equal(weights[0], weights[1]) and equal(weights[0], weights[2])


@pytest.mark.parametrize("spec", ["opefo", "entropy_bonus"])
@pytest.mark.parametrize("rows", [0, 128])
def test_the_ledger_that_shares_the_update_s_passes_is_the_one_with_its_own(policy, batch, spec, rows):
    """H̄ and ∇H̄ to rounding, float64; the update's gradient is what it is without a ledger, bit for bit
    where one pass serves all. The entropy bonus differentiates entropy itself."""
    settings, gradients = Settings(micro_batch=rows), []
    own = Ledger.open(run_of(policy, settings=settings), batch)
    for shared in (None, Ledger.open(run_of(policy, settings=settings), batch, shared=True)):
        policy.zero_grad(set_to_none=True)
        made = Update(run_of(policy, build(spec), settings), batch, shared)
        made.backward(grpo.batch_loss(made.tokens, made.own, build(spec))[0])
        gradients.append(gradient(policy))
    assert gradients[0].norm() > 1e-6
    # In micro-batches the ledger needs the responses that teach nothing too: others share a pass.
    torch.testing.assert_close(*gradients, rtol=1e-9 * bool(rows), atol=1e-14 * bool(rows))
    assert shared.before == pytest.approx(own.before, rel=1e-12)
    for a, b in zip(shared.grads, own.grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spec", ["grpo", "opefo", "entropy_bonus", "ref_kl"])
def test_groups_without_a_contrast_have_no_backward_pass_and_the_gradient_is_the_same(
    world, policy, batch, spec
):
    """Half of the groups all wrong: against one graph over all rows.  A penalty reaches them all the same."""
    method, tokens = supplied(world, batch, spec, off_policy=False)
    tokens.reward = torch.where(tokens.group % 2 == 0, 0.0, tokens.reward)
    alike = grpo.without_contrast(tokens.reward, tokens.group)
    by_hand = [len(set(tokens.reward[tokens.group == g].tolist())) == 1 for g in tokens.group.tolist()]
    assert alike.tolist() == by_hand and 0.5 <= float(alike.float().mean()) < 1
    seen = []
    norm = policy.model.get_decoder().norm
    count = lambda _, __, out: seen.append(0 if out[0] is None else len(out[0]))  # noqa: E731
    hook = norm.register_full_backward_hook(count)
    update(policy, tokens, method)
    hook.remove()
    got = gradient(policy)
    policy.zero_grad(set_to_none=True)
    full = replace(tokens, **policy(tokens, 1.0, method.entropy_grad))
    grpo.policy_loss(full, method)[0].backward()
    assert float((got - gradient(policy)).norm()) <= 1e-9 * float(got.norm()) and got.norm() > 1e-6
    rows = len(alike) if spec in ("entropy_bonus", "ref_kl") else int((~alike).sum())
    assert sum(seen) == rows + rows // 16  # responses, and their prompts, read once a group


def test_the_ledger_of_a_real_step_holds_momentum_too(tmp_path):
    """Second step of AdamW, float64: prediction and measurement agree to first order in the step taken."""
    run = make_run(small_world(), build("grpo"), tmp_path, ledger="step", ledger_every=1, lr=1e-6)
    for _, row in zip(range(2), train.train(run)):
        assert row["dH_measured"] != 0
        assert row["dH_predicted"] == pytest.approx(row["dH_measured"], rel=0.02)


def test_eq_5_3_flows_are_force_times_score_and_balance_as_the_method_says(policy, batch):
    """Up minus down is the change of mean entropy on a table, per unit step, by an independent formula; plain
    GRPO has no force where all responses agree."""
    made, numbers = update(policy, batch, build("grpo"))
    tk = replace(batch, **score_batch(run_of(policy), batch))
    score = tk.p2logp + tk.entropy * tk.p2 - tk.logp.exp() * (tk.logp + tk.entropy)
    flow = torch.where(tk.mask, group_normalised(tk.reward) / tk.mask.sum() * score, 0)
    torch.testing.assert_close(made.flow, flow, rtol=1e-6, atol=1e-10)
    assert numbers["flow_up"] == pytest.approx(float(flow[flow > 0].sum()), rel=1e-6)
    assert numbers["flow_down"] == pytest.approx(float(-flow[flow < 0].sum()), rel=1e-6)


def test_opefo_exact_balances_the_flows_that_the_ledger_books(policy, batch):
    nets = []
    for name in ("grpo", "opefo"):
        _, numbers = update(policy, batch, build(name))
        nets.append(abs(numbers["flow_up"] - numbers["flow_down"]))
    assert nets[1] < 1e-3 * nets[0]


def test_the_network_flow_sums_to_what_the_books_of_a_first_step_predict(tmp_path):
    """Σ_t of lr times the flow is <∇H̄, θ' - θ> where the step has no carry-over: Adam's first, whose 1 - β₁
    its bias correction takes back."""
    run = make_run(small_world(), build("grpo"), tmp_path, ledger="full", lr=1e-7)
    row = next(train.train(run))
    assert run.settings.lr * (row["net_flow_up"] - row["net_flow_down"]) == pytest.approx(
        row["dH_predicted"], rel=1e-3
    )
    booked = [json.loads(line) for line in (tmp_path / "flows.jsonl").read_text().splitlines()]
    assert len(booked) == 4 and all(len(b["tokens"]) == len(b["network_flow"]) for b in booked)


# ------------------------------------------------------------------------------------------------------------
# A run, end to end


KEYS = {"step", "reward", "entropy", "flow_up", "flow_down", "grad_norm", "tokens", "seconds", "skipped"}
KEYS |= {"length", "no_contrast", "loss"}
AT_EVALUATIONS = {"pass@1", "pass@k", "distinct_correct", "k", "hard_pass@k", "eval_entropy"}


def check_folder(folder, steps):
    """All that the docstring of `Run` promises about a finished run's folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["steps"] == steps and config["specs"] == [config["settings"]["method"]]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(steps + 1))
    assert all(set(r) >= KEYS for r in rows[1:]) and all(AT_EVALUATIONS <= set(rows[i]) for i in (0, -1))
    assert {"dH_measured", "dH_predicted"} <= set(rows[1])
    assert (folder / "entropy.png").read_bytes().startswith(PNG)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} >= {0, steps} and all(isinstance(s["response"], str) for s in samples)
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    ids = torch.tensor([tokenizer("1 2 3 4 -> 10", add_special_tokens=False)["input_ids"]])
    assert model(ids).logits.shape == (1, 6, len(tokenizer))
    hidden = [p.name for p in folder.iterdir() if p.name.startswith(".")]
    assert not hidden, f"left lying about: {hidden}"
    return rows


def test_the_first_command_writes_what_it_promises(home):
    """The command line as a user types it, in a process of its own; two methods from one warm start."""
    methods = ["grpo", "opefo:form=exact"]
    few = ["--steps", 2, "--eval-every", 2, "--eval-problems", 24]
    run = process("--method", *methods, *few, "--out", "out", *TINY, cwd=home)
    out, err = run.communicate()
    assert run.returncode == 0, err
    assert err.strip() == "", "the quiet mode is quiet"
    assert (home / "out" / "entropy.png").read_bytes().startswith(PNG)
    a, b = (check_folder(home / "out" / name, 2) for name in ("grpo", "opefo-form=exact"))
    assert without_clock(a[0]) == without_clock(b[0])
    assert a[1]["reward"] == b[1]["reward"], "both start from the same policy with the same prompts and draws"
    assert a[1]["tokens"] == round(a[1]["length"] * 64) and "lam" in b[1]
    assert all(any(line.startswith(f"{spec} ") for line in out.splitlines()) for spec in methods)
    assert "entropy.png" in out and "pass@2" in out


def test_a_run_repeats_itself_whenever_it_is_evaluated_and_depends_on_its_settings(cli, home):
    for name, more in (("a", []), ("b", []), ("c", ["--eval-every", 1]), ("d", ["--temperature", ".9"])):
        code, _, err = cli("--method", "grpo", "--steps", 2, "--out", name, *more, *TINY)
        assert code == 0, err
    assert rows_of("a") == rows_of("b") and rows_of("a", "samples.jsonl") == rows_of("b", "samples.jsonl")
    a, c, d = ([{k: r[k] for k in KEYS & set(r)} for r in rows_of(name)] for name in "acd")
    assert a == c != d


def test_a_method_that_does_nothing_on_policy_says_so(cli, monkeypatch):
    monkeypatch.setattr(train, "compare", lambda *_: 0)  # it is said before any work
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
    again = evaluate(TorchEngine(model, tiny_tokenizer()), chain_task(), 2, seed=seed)
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


@pytest.mark.parametrize("spec", ["clip_cov:ratio=.02,updates_per_rollout=2", "ref_kl", "lp_reg", "dapo"])
def test_methods_of_each_place_run_through_the_command_line(cli, home, spec):
    code, _, err = cli("--method", spec, "--steps", 2, "--micro-batch", 16, "--out", "a", *TINY)
    assert code == 0, err
    rows = check_folder(home / "a", 2)
    kl = [row["kl_ref"] for row in rows if "kl_ref" in row]
    assert abs(kl[0]) < 1e-6 < kl[1] if spec == "ref_kl" else not kl


# ------------------------------------------------------------------------------------------------------------
# Going on after an interruption

SIX = ["--steps", "6", "--eval-every", "2", "--ledger-every", "2", "--eval-problems", "24"]
PAR = "par:schedule=entropy"
# State that lives across steps: a reference, the position in the data (dapo), a controller.
STATEFUL = ["prorl:every=2", "dapo", "opefo:target_entropy=.9"]


class Killed(BaseException):
    """Nothing in the program catches it, so nothing is tidied up: the process is gone."""


def die(path=None, size=0):
    """The file that was being written is cut off there, and the process is gone."""
    if path:
        path.write_bytes(path.read_bytes()[:size])
    raise Killed


def at_moment(patch, moment, count, act=die):
    """The `count`-th time that the run reaches a moment: `act`, on a file of that moment where it has one."""
    reached = []

    def now(*file):
        reached.append(1)
        if len(reached) == count:
            act(*file)

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
            if isinstance(path, Path):  # else a tensor of training/
                now(path, 1000)

        patch.setattr(torch, "save", half)
    elif moment == "between metrics and checkpoint":
        before(Run, "save")
    elif moment == "in the middle of a line":
        real_append = Run.append

        def torn(self, name, rows):
            real_append(self, name, rows)
            if name == "metrics.jsonl":
                now(self.folder / name, -25)

        patch.setattr(Run, "append", torn)
    elif moment == "before a rename":
        before(Path, "rename", lambda path, _: "checkpoint" in path.name)
    else:
        before(shutil, "rmtree", lambda path, **_: path.name == "checkpoint-previous")


EVALUATION = ("in the middle of an evaluation", 3)  # two steps after the last checkpoint
MOMENTS = [
    ("before the optimizer's step", 4),
    EVALUATION,
    ("with half of the weights written", 3),
    ("in the middle of state.pt", 2),
    ("between metrics and checkpoint", 3),
    ("in the middle of a line", 5),
    ("before a rename", 3),  # between the two renames of a checkpoint: only the previous one is there
    ("while the old checkpoint is removed", 2),
]
EARLY = [  # and the same at the start of a run, and around other renames
    *((moment, 1) for moment in dict.fromkeys(moment for moment, _ in MOMENTS)),
    *(("before a rename", count) for count in (2, 4, 5)),
]


@pytest.fixture(scope="module")
def uninterrupted(warm_cache, tmp_path_factory):
    """Runs that nobody stopped, by method: (rows, samples), and the folder as a kill at each moment would
    have left it."""
    folder, known = tmp_path_factory.mktemp("whole"), {}
    left = lambda spec, *moment: folder / "left" / train.label_of(f"{spec} {moment}")  # noqa: E731

    def rows(spec, moments=(EVALUATION,)):
        if spec not in known:
            out = folder / train.label_of(spec)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("ENTROPY_FLOW_CACHE", str(warm_cache))
                patch.setattr(train, "draw", lambda runs, path: path.write_bytes(PNG))
                for moment in moments:
                    at_moment(patch, *moment, partial(keep, out, left(spec, *moment)))
                assert train.main(["--method", spec, "--out", str(out), *SIX, *TINY]) == 0
            known[spec] = rows_of(out), rows_of(out, "samples.jsonl")
            learned = [r["grad_norm"] > 0 and 0.05 < r["reward"] < 0.95 for r in known[spec][0][1:]]
            assert sum(learned) >= 5, "a policy that stands still says nothing about resuming"
        return known[spec]

    rows.left_by_a_kill = left
    rows(PAR, [*MOMENTS, *EARLY])
    return rows


def keep(folder, copy, path=None, size=0):
    """What a kill now would leave."""
    shutil.copytree(folder, copy)
    if path:
        path = copy / path.relative_to(folder)
        path.write_bytes(path.read_bytes()[:size])


@pytest.fixture()
def goes_on(home, cli, uninterrupted):
    """Resume `a`, and find the numbers of a run that nobody stopped."""

    def check(spec=PAR, folder="a"):
        code, _, err = cli("--resume", "a", "--quiet")
        assert code == 0, err
        assert (rows_of(folder), rows_of(folder, "samples.jsonl")) == uninterrupted(spec)

    return check


@pytest.mark.parametrize(
    "moment, count", MOMENTS + [pytest.param(*early, marks=pytest.mark.slow) for early in EARLY]
)
def test_a_run_killed_at_any_moment_goes_on_with_the_same_numbers(
    home, goes_on, uninterrupted, moment, count
):
    shutil.copytree(uninterrupted.left_by_a_kill(PAR, moment, count), home / "a")
    goes_on()
    check_folder(home / "a", 6)


@pytest.mark.parametrize("spec", STATEFUL)
def test_the_state_of_a_method_lives_through_a_kill(home, goes_on, uninterrupted, spec):
    uninterrupted(spec)
    shutil.copytree(uninterrupted.left_by_a_kill(spec, *EVALUATION), home / "a")
    goes_on(spec)


def test_a_comparison_killed_in_its_second_method_goes_on(cli, home, goes_on, uninterrupted):
    specs = [PAR, "opefo:target_entropy=.9"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at_moment(patch, "before the optimizer's step", 9)
        cli("--method", *specs, "--out", "a", *SIX, *TINY)
    first = home / "a" / train.label_of(specs[0]) / "metrics.jsonl"
    before = first.read_text()
    goes_on(specs[1], home / "a" / train.label_of(specs[1]))
    assert first.read_text() == before, "the first was done"
    assert rows_of(first.parent) == uninterrupted(PAR)[0] and (home / "a" / "entropy.png").exists()


def test_more_steps_on_resume_give_the_numbers_of_a_longer_run(cli, home, goes_on):
    """Resuming a finished run changes no number; with more steps it becomes the longer run."""
    steps = ["--steps", "2", *SIX[2:]]
    assert cli("--method", PAR, "--out", "a", *steps, *TINY)[0] == 0
    text = (home / "a" / "metrics.jsonl").read_text()
    assert cli("--resume", "a", "--quiet")[0] == 0 and (home / "a" / "metrics.jsonl").read_text() == text
    assert cli("--resume", "a", "--steps", 6, "--quiet")[0] == 0
    goes_on()
    check_folder(home / "a", 6)


def test_resume_finds_the_newest_run_and_checkpoint_previous(cli, home, finished):
    folder = home / "runs" / "prorl-s0"
    shutil.copytree(finished, folder)
    text = rows_of(folder)
    for lost in (["checkpoint"], ["checkpoint", "checkpoint-previous"]):  # without any it starts anew
        for name in lost:  # as the message about a damaged one advises
            shutil.rmtree(folder / name)
        assert cli("--resume", "--quiet")[0] == 0
        assert rows_of(folder) == text and (folder / "checkpoint").exists()


def wait_for(path, lines, run):
    end = time.monotonic() + 120
    while time.monotonic() < end and run.poll() is None:
        if path.exists() and path.read_text().count("\n") >= lines:
            return
        time.sleep(0.005)
    raise AssertionError(f"{path} did not get {lines} lines: {run.poll()} {run.communicate()}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_random_moments_until_it_is_done(home, uninterrupted, seed):
    """Several deaths in a row, at moments nobody chose, evaluations and checkpoints at every second step."""
    draw, specs, kills = random.Random(seed), [PAR, "prorl:every=2"], 0
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
    for spec in specs:
        folder = home / "a" / train.label_of(spec)
        assert (rows_of(folder), rows_of(folder, "samples.jsonl")) == uninterrupted(spec)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_reaches_a_process_of_its_own(home, goes_on, number):
    run = process("--method", PAR, "--out", "a", *SIX, *TINY, cwd=home)
    wait_for(home / "a" / "metrics.jsonl", 4, run)
    run.send_signal(number)
    out, err = run.communicate()
    stopped(home, (run.returncode, out, err))
    goes_on()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(cli, home, monkeypatch, goes_on, number):
    with monkeypatch.context() as patch:
        at_moment(patch, "before the optimizer's step", 4, lambda: signal.raise_signal(number))
        result = cli("--method", PAR, "--out", "a", *SIX, *TINY)
    stopped(home, result)
    assert rows_of("a")[-1]["step"] == 4, "the step in hand is finished"
    goes_on()


def stopped(home, result):
    code, out, err = result
    assert code == 130 and "Traceback" not in err
    assert "python train.py --resume a" in out + err
    assert (home / "a" / "entropy.png").exists()
    state = torch.load(home / "a" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == rows_of("a")[-1]["step"] < 6, "not one step is lost"


def full_disk():
    raise OSError(28, "No space left on device")


def two_ctrl_c():
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # the tests run in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)


def test_a_best_checkpoint_that_a_kill_prevented_is_made_up_for(cli, home, monkeypatch):
    """The process dies behind the checkpoint that was the best, and no later one is better."""

    def killed(_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Run, "_mark_best", killed)
        cli("--method", "grpo:lr=.1", "--out", "a", *SIX, *TINY)
    (home / "a" / ".best.part").mkdir()
    assert cli("--resume", "a", "--quiet")[0] == 0
    scores = {r["step"]: r["pass@1"] for r in rows_of("a") if "pass@1" in r}
    best = json.loads((home / "a" / "checkpoint-best" / "best.json").read_text())
    assert best == {"step": 0, "pass@1": scores[0]} and scores[0] == max(scores.values())


@pytest.mark.parametrize("trouble", [full_disk, two_ctrl_c])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(cli, home, monkeypatch, goes_on, trouble):
    """In the middle of a file: torch's writer ends with "unexpected pos", whatever it was."""
    real, opened = FileSystem.create_stream, []

    class Stream:
        def __init__(self, stream):
            self.stream, self.writes = stream, 0

        def write(self, data):
            self.writes += 1
            if self.writes == 2:
                trouble()
            return self.stream.write(data)

        def __getattr__(self, name):
            return getattr(self.stream, name)

    @contextlib.contextmanager
    def create(*args):
        opened.append(str(args[1]))
        with real(*args) as stream:
            third = opened[-1].endswith(".distcp") and len(opened) > 4
            yield Stream(stream) if third else stream

    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", create)
        result = cli("--method", PAR, "--out", "a", *SIX, *TINY)
    if trouble is full_disk:
        complains(result, "a: no checkpoint could be written", "make room", "--resume a")
    else:
        end = "stopped at once; go on from the last checkpoint: --resume a\n"
        assert result[0] == 130 and result[2].endswith(end), result
    assert not (home / "a" / ".checkpoint.part").exists()
    assert torch.load(home / "a" / "checkpoint" / "state.pt", weights_only=True)["step"] == 2
    goes_on()


@pytest.fixture(scope="module")
def finished(warm_cache, tmp_path_factory):
    """A finished run to damage copies of."""
    folder = tmp_path_factory.mktemp("finished") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENTROPY_FLOW_CACHE", str(warm_cache))
        patch.setattr(train, "draw", lambda runs, path: path.write_bytes(PNG))
        assert train.main(["--method", "prorl", "--steps", "2", "--out", str(folder), *TINY]) == 0
    return folder


@pytest.mark.parametrize("damage", ["half", "empty", "missing", "garbage"])
@pytest.mark.parametrize("name", ["state.pt", "training/.metadata", "training/__0_0.distcp"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_overwritten(cli, home, finished, name, damage):
    shutil.copytree(finished, home / "a")
    path = home / "a" / "checkpoint" / name
    data = path.read_bytes()
    path.write_bytes({"half": data[: len(data) // 2], "garbage": b"\xff" * 64}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    before = contents(home)
    result = cli("--resume", "a", "--quiet", "--steps", "3")
    complains(result, "--resume a", "checkpoint", "damaged", "remove a/checkpoint")
    assert contents(home) == before


@pytest.mark.parametrize("tail", [b'{"step": 3, "rew', b"\xff\xfe\x00", b"\n"])
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
    how = ["--steps", 4, "--ledger-every", 1, "--out", "a"]
    code, _, err = cli("--method", "opefo:target_entropy=.9", *how, *TINY)
    assert code == 0
    rows = rows_of("a")
    assert [r["skipped"] for r in rows[1:]] == [0, 1, 1, 0]
    assert rows[2]["loss"] is None and rows[2]["grad_norm"] is None, "null, since NaN is not JSON"
    assert rows[2]["dH_measured"] == rows[3]["dH_measured"] == 0 != rows[4]["dH_measured"]
    assert all(math.isfinite(rows[i]["entropy"]) for i in range(1, 5))
    assert "2 updates skipped" in err


def test_a_skipped_update_leaves_weights_optimizer_and_controller(monkeypatch, tmp_path):
    run = make_run(small_world(), build("entropic"), tmp_path)
    rows = train.train(run)
    row = next(rows)
    assert run.method.error_sum == pytest.approx(row["entropy"] - 0.1), "the controller saw the good update"

    def state():
        moments = [v.clone() for s in run.optimizer.state.values() for v in s.values()]
        return weights_of(run.policy) + moments, json.dumps(run.method.state_dict(), default=str)

    before = state()
    with monkeypatch.context() as patch:
        poison(patch, {0})
        assert next(rows)["skipped"] == 1 and run.skipped_in_row == 1
    after = state()
    assert equal(before[0], after[0]) and before[1] == after[1]
    next(rows)
    assert run.skipped_in_row == 0 and not equal(after[0], state()[0]), "a good update ends the row"


def test_ten_non_finite_updates_in_a_row_stop_the_run_with_a_checkpoint(cli, home, monkeypatch):
    poison(monkeypatch, set(range(2, 100)))
    code, _, err = cli("--method", "grpo", "--steps", 30, "--eval-every", 40, "--out", "a", *TINY)
    assert code == 1 and "Traceback" not in err
    assert "ten" in err and "checkpoint" in err and "--lr" in err
    assert [r["step"] for r in rows_of("a")] == list(range(13)) and (home / "a" / "entropy.png").exists()
    state = torch.load(home / "a" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == 12 and state["skipped_in_row"] == 10


@pytest.mark.parametrize("flags", [("--method", "ref_kl:beta=1e39"), ("--lr", "9e35", "--grad-clip", 0)])
def test_absurd_numbers_are_no_traceback(cli, flags):
    """An infinite coefficient, beta x KL = inf x 0 = NaN from the first update on; a step out of range."""
    code, _, err = cli("--method", "grpo", *flags, "--steps", 12, "--eval-every", 30, "--out", "a", *TINY)
    assert "Traceback" not in err and len(rows_of("a")) <= 13
    assert (code, "ten" in err, "--lr" in err) == (1, True, True) if "--method" in flags else code in (0, 1)


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
    assert torch.load(home / "a" / "checkpoint" / "state.pt", weights_only=True)["step"] == 2
    from safetensors.torch import load_file

    weights = load_file(home / "a" / "checkpoint" / "model.safetensors")
    assert all(v.isfinite().all() for v in weights.values())


# ------------------------------------------------------------------------------------------------------------
# The study's entropy-neutral step, entropy_math (6.5)


@pytest.mark.slow
def test_the_neutral_step_changes_the_batchs_entropy_by_what_it_is_asked_for(home):
    where = REPO / "results" / "study.py"
    spec = importlib.util.spec_from_file_location("study", where)
    sys.modules["study"] = study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)

    def rows(level):
        step = partial(study.step_and_correct, level, train.step_if_finite) if level else train.step_if_finite
        ledger = study.NeutralLedger if level else train.Ledger
        with mock.patch.multiple(train, Ledger=ledger, step_if_finite=step):
            out = ["--out", f"run{level}", "--steps", "5", "--eval-every", "5", "--ledger-every", "1"]
            assert train.main(["--method", "grpo:lr=1e-5", *TINY, *out]) == 0  # second order: small
        return rows_of(Path(f"run{level}"))[1:]

    plain, neutral, held = (rows(level) for level in ("", "neutral", ".45"))
    size = sum(abs(r["dH_measured"]) for r in plain) / len(plain)
    for r in neutral:
        assert abs(r["dH_predicted"]) < 1e-6 and abs(r["dH_measured"]) < 0.25 * size
    for r in held:
        want = 0.1 * (0.45 - r["entropy"])
        assert r["dH_predicted"] == pytest.approx(want, abs=1e-6)
        assert r["dH_measured"] == pytest.approx(want, rel=0.25, abs=0.25 * size)
