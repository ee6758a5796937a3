"""The methods inside other trainers: TRL's GRPOTrainer and verl's policy losses, against our loop and theirs.

Skipped where `trl` or `verl` is not installed.  The oracle of the TRL part is `train.Update` on the
very responses that TRL sampled; parameters are float64, and what is left of the difference is TRL's float32
head.
"""

import copy
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import interventions
from grpo import Policy, Progress, Tokens, batch_loss, concat_padded, policy_loss
from interventions import METHODS, build, trl_trainer
from rollout import TinyModel, tiny_tokenizer
from train import Run, Settings, Update, score_batch

PROMPTS = ["3 5 7 9 -> 41", "2 3 -> 5", "4 4 9 -> 1", "8 -> 8"]  # of different lengths: TRL pads on the left
TINY = TinyModel(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1)


def relative(a, b):
    """|a - b| / |b| of two lists of gradients."""
    a, b = (torch.cat([g.detach().flatten().double() for g in x]) for x in (a, b))
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


# ------------------------------------------------------------------------------------------------------------
# TRL


def odd_words(completions, **_):
    """A reward that splits most groups: is the number of different words odd?"""
    return [float(len(set(c.split())) % 2) for c in completions]


def small_model(folder):
    """A policy far from uniform, from a folder, since TRL loads its reference model from there."""
    from transformers import AutoModelForCausalLM

    if not (folder / "model").exists():
        model = TINY.build(tiny_tokenizer(), seed=0).double()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3)
        ends = [tiny_tokenizer().eos_token_id, *range(10, 100, 6)]  # many words end a response
        model.generation_config.eos_token_id = ends
        model.save_pretrained(folder / "model")
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)


def trl_config(folder, rows=4, accumulation=2, updates=1, epochs=1, steps=2, **settings):
    trl = pytest.importorskip("trl")
    return trl.GRPOConfig(
        str(folder / "out"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation * updates,
        num_iterations=epochs,
        num_generations=4,
        max_completion_length=10,
        max_steps=steps,
        **{"save_strategy": "no", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", **settings},
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True},
        **{"report_to": "none", "logging_steps": 1},
    )


def trainer_on(folder, method, args, reward=odd_words, optimizer=None, model=None):
    datasets = pytest.importorskip("datasets")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dapo")
        return trl_trainer()(
            model or small_model(folder),
            reward,
            args,
            datasets.Dataset.from_dict({"prompt": PROMPTS * 4}),
            processing_class=tiny_tokenizer(),
            method=method,
            optimizers=(optimizer, None),
        )


class Recorder(torch.optim.SGD):
    """Plain SGD that keeps, for every step, the parameters before it and the gradient it was given."""

    def __init__(self, model, lr=0.02):
        super().__init__(model.parameters(), lr=lr)
        self.model, self.log = model, []

    def step(self, closure=None):
        before = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.log.append((before, [p.grad.clone() for p in self.model.parameters()]))
        return super().step(closure)


def batch_of(window, eos):
    """TRL's micro-batches of one update as our Tokens, prompts moved to the left edge."""
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "reward", "group")
    r = {k: torch.cat([w[k] for w in window]) for k in names}
    mask, ids, real = r["completion_mask"].bool(), r["completion_ids"], r["prompt_mask"].bool()
    full = torch.zeros(len(ids), real.shape[1] + ids.shape[1], dtype=torch.long)
    for row, prompt, m, answer in zip(full, r["prompt_ids"], real, ids):
        line = torch.cat([prompt[m], answer])
        row[: len(line)] = line
    ended = torch.isin(ids, torch.tensor(eos)) & mask
    text = {"full_ids": full, "start": real.sum(-1) - 1}
    return Tokens(ids, mask, reward=r["reward"], group=r["group"], truncated=~ended.any(-1), **text)


def run_of(model, method=None):
    """What an update and its scores read of a run."""
    method = method or build("grpo")
    return Run(Settings(), method, Path("."), None, Policy(model), None, None)


def gradient_of_our_loop(model, batch, method):
    model.zero_grad()
    update = Update(run_of(model, method), batch)
    update.backward(batch_loss(update.tokens, update.own, method)[0])
    return [p.grad.clone() for p in model.parameters()]


def logp_of(model, batch):
    return score_batch(run_of(model), batch)["logp"]


def recorded(folder, spec, **config):
    """Train inside TRL; of every update TRL's gradient, ours, and plain GRPO's on the same responses."""
    model = small_model(folder)
    optimizer, seen, at_one = Recorder(model), [], []
    args = trl_config(folder, beta=1.0 if "ref_kl" in spec else 0.0, **config)
    trainer = trainer_on(folder, spec, args, optimizer=optimizer, model=model)
    plan = trainer._plan_update

    def spy(window):
        seen.append((batch_of(window, trainer.eos_token_ids), copy.deepcopy(trainer.method)))
        plan(window)
        at_one.append(trainer.tokens.old_logp is None)

    trainer._plan_update = spy
    trainer.train()
    ours = small_model(folder)
    reuse = config.get("updates", 1) * config.get("epochs", 1)  # updates per generation
    assert at_one == [u % reuse == 0 for u in range(args.max_steps)]  # r is 1 by construction
    assert len(seen) == len(optimizer.log) == args.max_steps
    for u, ((batch, method), (state, gradient)) in enumerate(zip(seen, optimizer.log)):
        assert (batch.group.unique(return_counts=True)[1] == 4).all()  # no group is torn apart
        if reuse > 1:
            ours.load_state_dict(optimizer.log[u // reuse * reuse][0])  # the policy that sampled
            batch.old_logp = logp_of(ours, batch)
        if "ref_logp" in method.needs:
            ours.load_state_dict(optimizer.log[0][0])
            batch.ref_logp = logp_of(ours, batch)
        ours.load_state_dict(state)
        method.progress = Progress(u, args.max_steps, args.seed, args.max_completion_length)
        yield gradient, *(gradient_of_our_loop(ours, batch, m) for m in (method, build("grpo")))


LAYOUTS = {  # of the 8 responses to two prompts
    "at once": {"rows": 8, "accumulation": 1},
    "in four": {"rows": 2, "accumulation": 4},
    "two updates": {"rows": 2, "accumulation": 4, "updates": 2, "steps": 4},  # of 16
    "used twice": {"rows": 4, "accumulation": 2, "epochs": 2, "steps": 4},
}
STRICT = (  # act with one update per rollout; hyperparameters such that a batch of 60 tokens feels them
    *("opefo", "opefo:target_entropy=2.0,integral=.5", "steer", "papo:reference=target,target=2.0", "par"),
    *("high_entropy_tokens", "entropy_advantage", "entropy_bonus:alpha=.1", "adaptive_entropy:target=9"),
    *("clip_cov:ratio=.2,lb=-9", "rand_pos_clip:ratio=.2", "w_reinforce", "psr", "nsr", "dr_grpo", "cw_grpo"),
    *("cw_grpo:form=released", "darling", "gcpo", "repo:zeta=.3", "asym_grpo", "maxrl", "passk:k=2", "ar"),
    *("unlikely:b=.9", "ucpo:tau=.9,normalize=false", "mcpo"),
    *("stare:target=6.0", "entrocraft:start=9", "entropic:target=6.0,threshold=.01", "aem", "par+opefo"),
    *("htpo:high_drop=.3,low_drop=.3", "dapo:overlong_max=9,overlong_cache=6,dynamic_sampling=false"),
    *("qae", "gspo"),
)
LATER = (  # act when the policy has moved since the rollout
    *("clip_higher:eps_high=.01,eps_low=.01", "cispo:eps_high=.01", "kl_cov:ratio=.2", "ref_kl:beta=.5"),
    *("ce_gppo:eps_low=.01,eps_high=.01", "opefo+clip_higher", "htpo", "gspo", "clip_cov:ratio=.2,lb=-9"),
    *("sapo", "bapo"),
)
REFUSED = {  # by TRL: what it is told
    "mixed_cuts": "TRL samples",
    "reft": "TRL samples",
    "vocab_dropout": "TRL samples",
    "prorl": "use ref_kl",
    "lp_reg": "the logits of the policy that sampled",
    "outcome_exploration": "which responses have the same answer",
    "simko": "of the tokens drawn and of no others",
    "rlrt": "scores no second prompt",
}
CASES = [(spec, "in four") for spec in ("grpo", *STRICT)]
CASES += [(spec, layout) for spec in LATER for layout in ("two updates", "used twice")]
CASES += [(spec, "at once") for spec in ("grpo", "opefo", "entropy_bonus:alpha=.1")]


def test_trl_gradients_are_tested_for_every_method_that_it_takes():
    tested = {key for spec in (*STRICT, *LATER) for key in spec.partition(":")[0].split("+")}
    assert tested | {"grpo"} | set(REFUSED) == set(METHODS) and not tested & set(REFUSED)


@pytest.mark.parametrize("spec, layout", CASES)
def test_trl_update_has_the_gradient_of_our_loop(spec, layout, tmp_path):
    different = []
    for inside, ours, grpo in recorded(tmp_path, spec, **LAYOUTS[layout]):
        assert relative(inside, ours) <= 1e-5
        different.append(relative(ours, grpo))
    assert spec == "grpo" or max(different) > 1e-3  # the method did something


def test_trl_trains_saves_and_resumes_a_method_with_its_state(tmp_path):
    spec, settings = (
        "opefo:target_entropy=2.0,gain=.1,integral=.05",
        {"save_strategy": "steps", "save_steps": 1},
    )
    args = trl_config(tmp_path, steps=2, learning_rate=1e-3, **settings)
    trainer = trainer_on(tmp_path, spec, args)  # TRL's own AdamW
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    rows = [row for row in trainer.state.log_history if "lam" in row]
    assert len(rows) == 2 and all(0 < row["entropy"] < 4.7 for row in rows)
    assert relative(list(trainer.model.parameters()), start) > 1e-4
    first = (2.0 - rows[0]["entropy"]) / 2.0
    assert trainer.method.error_sum == pytest.approx(first + (2.0 - rows[1]["entropy"]) / 2.0)
    resumed = trainer_on(tmp_path, spec, args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert resumed.method.error_sum == trainer.method.error_sum  # first was in the checkpoint
    assert relative(list(resumed.model.parameters()), list(trainer.model.parameters())) < 1e-6
    assert torch.isfinite(torch.tensor(resumed.evaluate(trainer.train_dataset.select(range(2)))["eval_loss"]))


def test_trl_response_without_a_score_has_no_gradient_and_no_part_in_the_baseline(tmp_path):
    def reward(completions, **_):
        return [None if i % 4 == 0 else r for i, r in enumerate(odd_words(completions))]

    trainer = trainer_on(tmp_path, "grpo", trl_config(tmp_path, steps=1), reward)
    trainer.train()
    silent = torch.arange(8) % 4 == 0
    assert not trainer.plan.coef[silent].any() and (trainer.plan.coef[~silent] > 0).any(-1).all()
    adv = trainer.plan.adv[~silent, 0].view(2, 3)
    torch.testing.assert_close(adv.sum(-1), torch.zeros(2, dtype=adv.dtype), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "spec, settings, reason",
    [
        *((key, {"beta": 1.0} if key == "prorl" else {}, reason) for key, reason in REFUSED.items()),
        ("opefo+ref_kl", {}, "for a reference"),
        ("opefo", {"epsilon": 0.1}, "GRPOConfig.epsilon"),
        ("opefo", {"loss_type": "dr_grpo", "entropy_coef": 0.1}, "loss_type, entropy_coef"),
        ("opefo", {"steps_per_generation": 1}, "must be a multiple of gradient_accumulation_steps=2"),
        ("opefo", {"per_device_train_batch_size": 1, "steps_per_generation": 4}, "tear groups"),
        ("opefoo", {}, "did you mean opefo"),
    ],
)
def test_trl_refuses_what_it_cannot_do_and_says_why(spec, settings, reason, tmp_path):
    args = trl_config(tmp_path)
    args = replace(args, generation_batch_size=None, **{"steps_per_generation": None, **settings})
    with pytest.raises(ValueError, match=reason):
        trainer_on(tmp_path, spec, args)


def _one_rank(rank, folder, port):
    """One of two ranks with 4 of 8 responses each; rank 0 compares with our loop on all 8."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    model = small_model(folder)
    optimizer = Recorder(model)
    args = trl_config(folder, rows=2, accumulation=2, steps=1, ddp_backend="gloo")
    trainer = trainer_on(folder, "opefo", args, optimizer=optimizer, model=model)
    plan, seen = trainer._plan_update, []

    def spy(window):
        seen.extend(window)
        plan(window)

    trainer._plan_update = spy
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    windows = [None, None]
    torch.distributed.all_gather_object(windows, seen)
    if rank == 0:
        torch.save((windows, trainer.eos_token_ids, optimizer.log), folder / "seen.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_trl_gradient_on_two_ranks_is_that_of_the_whole_batch(tmp_path):
    pytest.importorskip("trl")
    small_model(tmp_path)
    torch.multiprocessing.spawn(_one_rank, (tmp_path, 29000 + os.getpid() % 1000), nprocs=2)
    windows, eos, log = torch.load(tmp_path / "seen.pt", weights_only=False)
    batch = concat_padded([batch_of(window, eos) for window in windows], 0)
    assert relative(log[0][1], gradient_of_our_loop(small_model(tmp_path), batch, build("opefo"))) <= 1e-5


def test_neither_trl_nor_verl_is_imported_unless_used():
    code = "import sys, train; assert not {'trl', 'verl', 'accelerate', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------------------
# verl

AGGREGATIONS = ("seq-mean-token-mean", "seq-mean-token-sum", "token-mean", "token-sum")


@pytest.fixture
def verl(monkeypatch):
    """verl's core_algos with a registry that forgets what a test adds."""
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    monkeypatch.setattr(core, "POLICY_LOSS_REGISTRY", dict(core.POLICY_LOSS_REGISTRY))
    return core


def actor(**settings):
    from verl.workers.config import ActorConfig, PolicyLossConfig

    cov = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "kl_cov_ratio": 0.1, "ppo_kl_coef": 0.7}
    more = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1, **settings}
    return ActorConfig(policy_loss=PolicyLossConfig(**cov), **more)


def random_update(seed, rows=6, length=7):
    """What verl hands a policy loss, float64: responses of 1 to `length` tokens, a policy that has moved."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, length, generator=g, dtype=torch.float64) * 4
    logp = (old + 0.3 * torch.randn(rows, length, generator=g, dtype=torch.float64)).clamp(max=0)
    adv = torch.randn(rows, 1, generator=g, dtype=torch.float64).expand(rows, length) * 1.5
    mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=g)).double()
    weight = 0.5 + torch.rand(rows, length, generator=g, dtype=torch.float64)
    return {
        "old_log_prob": old,
        "log_prob": logp.requires_grad_(),
        "advantages": adv * mask,
        "response_mask": mask,
        "rollout_is_weights": weight if seed % 2 else None,
    }


def rows_of(update, rows):
    cut = {k: None if v is None else v[rows] for k, v in update.items()}
    return {**cut, "log_prob": cut["log_prob"].detach().requires_grad_()}


def gradient(loss, update, **kwargs):
    value, metrics = loss(**update, **kwargs)
    return value.detach(), torch.autograd.grad(value, update["log_prob"])[0], metrics


SAME = [  # ours, verl's, the clip range in verl's config
    ("grpo:dual_clip=3", "vanilla", {}),
    ("grpo:dual_clip=1.2,eps_low=.1,eps_high=.4", "vanilla", {"low": 0.1, "high": 0.4, "c": 1.2}),
    ("clip_higher:dual_clip=3", "vanilla", {"high": 0.28}),
    ("gspo:eps_low=.02,eps_high=.03", "gspo", {"low": 0.02, "high": 0.03}),
    ("cispo:eps_low=.1,eps_high=.3", "cispo", {"low": 0.1, "high": 0.3}),
    ("kl_cov:ratio=.1,beta=.7", "kl_cov", {}),
    ("clip_cov:ratio=1,lb=.1,ub=5", "clip_cov", {}),  # ratio 1: everybody eligible is dropped, no lottery
]


@pytest.mark.parametrize("spec, theirs, clip", SAME)
@given(seed=st.integers(0, 10**6), mode=st.sampled_from(AGGREGATIONS), whole=st.booleans())
def test_verl_loss_is_verls_own(spec, theirs, clip, seed, mode, whole):
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    before = dict(core.POLICY_LOSS_REGISTRY)
    try:
        (name,) = interventions.register_with_verl(spec, prefix="ours/")
        ours = core.get_policy_loss_fn(name)
    finally:
        core.POLICY_LOSS_REGISTRY.clear()
        core.POLICY_LOSS_REGISTRY.update(before)
    config = actor(**{f"clip_ratio_{k}": v for k, v in clip.items()})
    if whole:  # as in a micro-batch of a larger mini-batch on two ranks
        config.global_batch_info.update(dp_size=2, batch_num_tokens=100, global_batch_size=20)
    update = random_update(seed)
    if theirs == "kl_cov":  # whose penalty verl weighs too; our mismatch weights leave penalties alone
        update["rollout_is_weights"] = None
    kwargs = {"loss_agg_mode": mode, "config": config}
    value, grad, metrics = gradient(ours, update, **kwargs)
    verl_value, verl_grad, _ = gradient(core.get_policy_loss_fn(theirs), update, **kwargs)
    torch.testing.assert_close(value, verl_value, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grad, verl_grad, rtol=1e-6, atol=1e-9)
    assert all(isinstance(v, (int, float)) for v in metrics.values())


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("spec", [*interventions.VERL, "clip_higher+rand_pos_clip:ratio=.3"])
def test_verl_loss_on_a_whole_mini_batch_is_our_policy_loss(spec, mode, verl):
    (name,) = interventions.register_with_verl(spec)
    method = build(spec)
    for seed in range(5):
        update = random_update(seed)
        value, grad, _ = gradient(verl.get_policy_loss_fn(name), update, loss_agg_mode=mode, config=actor())
        old, mask = update["old_log_prob"], update["response_mask"].bool()
        ids = old.float().view(torch.int32)
        tokens = Tokens(ids, mask, logp=update["log_prob"], old_logp=old, adv=update["advantages"])
        tokens.mismatch = update["rollout_is_weights"]
        for m in getattr(method, "members", [method]):
            m.aggregation = mode.replace("-", "_")
        method.aggregation = mode.replace("-", "_")
        loss, _ = policy_loss(tokens, method)
        torch.testing.assert_close(value, loss.detach(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(grad, torch.autograd.grad(loss, tokens.logp)[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("spec, same", [("grpo", True), ("gspo", True), ("kl_cov:ratio=.1", False)])
def test_verl_micro_batches_change_selections_and_nothing_else(spec, same, verl):
    """What the docstring of register_with_verl owns up to: denominators are global, selections are not."""
    (name,) = interventions.register_with_verl(spec)
    config, update = actor(), random_update(3, rows=8)
    whole = gradient(verl.get_policy_loss_fn(name), update, config=config)[1]
    tokens = int(update["response_mask"].sum())
    config.global_batch_info.update(dp_size=1, batch_num_tokens=tokens, global_batch_size=8)
    parts = [rows_of(update, slice(i, i + 2)) for i in range(0, 8, 2)]
    split = torch.cat([gradient(verl.get_policy_loss_fn(name), p, config=config)[1] for p in parts])
    assert torch.allclose(whole, split, rtol=1e-6, atol=1e-9) == same


def test_verl_takes_or_refuses_every_method_with_a_reason(verl):
    taken = []
    for key in METHODS:
        try:
            taken += interventions.register_with_verl(key, prefix="ours/")
        except ValueError as error:
            assert f"method {key} inside verl: " in str(error)
    assert taken == [f"ours/{k}" for k in METHODS if k in interventions.VERL]
    assert interventions.register_with_verl() == list(interventions.VERL)


@pytest.mark.parametrize(
    "spec, reason",
    [
        ("opefo", "needs entropy, p2, p2logp"),
        ("ref_kl", "needs ref_logp"),
        ("rlrt", "needs teacher_logp"),
        ("entropy_bonus", "needs entropy"),
        ("w_reinforce", "verl makes the advantages"),
        ("dr_grpo", "verl makes the advantages"),
        ("psr", "no place for its select"),
        ("clip_cov:anneal=true", "does not know the step"),
        ("grpo:aggregation=token_sum", "actor.loss_agg_mode decides"),
        ("clip_higher+steer", "method steer inside verl"),
    ],
)
def test_verl_says_why_a_method_cannot_be_fed(spec, reason, verl):
    with pytest.raises(ValueError, match=reason):
        interventions.register_with_verl(spec)


def test_verl_config_that_would_be_overruled_is_refused(verl):
    (name,) = interventions.register_with_verl("grpo:eps_high=.3")
    loss, update = verl.get_policy_loss_fn(name), random_update(0)
    loss(**update, config=actor(clip_ratio_high=0.3))
    with pytest.raises(ValueError, match="actor.clip_ratio_low=0.1 is overruled: write grpo:eps_low=0.1"):
        loss(**update, config=actor(clip_ratio_low=0.1))


@pytest.mark.slow
def test_verl_workers_register_by_the_environment_variable(verl, tmp_path):
    """The docstring's recipe: `import verl` alone, as in a worker, makes our losses known."""
    (tmp_path / "my_losses.py").write_text(
        "import interventions\ninterventions.register_with_verl('ce_gppo')\n"
    )
    code = "import verl; from verl.trainer.ppo.core_algos import get_policy_loss_fn as f; print(f('ce_gppo'))"
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    env = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "my_losses", "PYTHONPATH": path}
    out = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    assert "verl_loss" in out.stdout
