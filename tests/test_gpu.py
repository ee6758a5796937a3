"""What has to hold on a GPU: `pytest -m gpu`.  With ENTROPY_FLOW_DEVICE=cpu the same tests run on a
processor, which tests the tests; without a GPU and without that they are skipped."""

import os
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, rows_of
from safetensors.torch import load_file
from scipy import stats
from test_models import byte_tokenizer, llama

from entropy_math import head_token_stats, token_stats
from grpo import Policy
from rollout import Sampling, TinyModel, TorchEngine, tiny_tokenizer
from train import shard

DEVICE = os.environ.get("ENTROPY_FLOW_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="no GPU here; ENTROPY_FLOW_DEVICE=cpu runs these tests on the processor",
    ),
]
PROMPTS = [[3, 5, 7, 9, 104, 41], [8], [9, 10, 11]]  # ragged
ON = ["--device", DEVICE]


def tiny(dtype=torch.float32, scale=6):
    """Sharp enough that a wrong weight, position or temperature shows."""
    model = TinyModel().build(tiny_tokenizer(), 0).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.mul_(scale)
    return model.to(DEVICE, dtype)


def sampled(model, n=64, temperature=0.9):
    generator = torch.Generator(DEVICE).manual_seed(0)
    how = Sampling(n, 24, temperature, entropy=True)
    return TorchEngine(model, tiny_tokenizer()).sample(PROMPTS, how, generator)


# ------------------------------------------------------------------------------------------------------------
# The head


def solved(dtype, device, compute, chunk):
    """The four statistics, and the gradients to hidden states and weight of a loss on log p and H, of one
    problem whose numbers `dtype` can hold, computed in `compute`; chunk None: by the plain form."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(300, 64, generator=g), torch.randn(5000, 64, generator=g) / 4
    ids, (a, b) = torch.randint(5000, (300,), generator=g).to(device), torch.randn(2, 300, generator=g)
    hidden, weight = (x.to(dtype).to(device, compute).requires_grad_() for x in (hidden, weight))
    if chunk is None:
        out = token_stats(hidden @ weight.T, ids, 1.0, True)
    else:
        out = head_token_stats(hidden, weight, ids, chunk=chunk, entropy_grad=True)
    (out.logp * a.to(out.logp) + out.entropy * b.to(out.logp)).sum().backward()
    return [x.detach().double().cpu() for x in (*vars(out).values(), hidden.grad, weight.grad)]


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_eq_4_1_to_4_4_the_chunked_head_is_as_exact_as_the_plain_one(dtype, bound):
    exact = solved(dtype, "cpu", torch.float64, None)
    chunked, plain = (solved(dtype, DEVICE, dtype, chunk) for chunk in (2**14, None))
    for ours, theirs, right in zip(chunked, plain, exact):
        error, usual = ((x - right).norm() / right.norm() for x in (ours, theirs))
        assert error <= max(bound / 10, 1.5 * usual) and error <= bound


@pytest.mark.skipif(DEVICE != "cuda", reason="the allocator that counts is CUDA's")
def test_the_chunked_head_takes_an_eighth_of_the_memory():
    peak = {}
    for chunk in (None, 2**22):
        hidden = torch.randn(2048, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(100_000, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        ids = torch.zeros(2048, dtype=torch.long, device=DEVICE)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        head_token_stats(hidden, weight, ids, chunk=chunk).logp.mean().backward()
        peak[chunk] = torch.cuda.max_memory_allocated() - before
    assert peak[2**22] < peak[None] / 8


# ------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.5)])
def test_what_is_sampled_is_what_is_scored(dtype, bound):
    model = tiny(dtype)
    out = sampled(model)
    with torch.no_grad():
        scored = Policy(model)(out, 0.9)
    for said, found in ((out.rollout_logp, scored["logp"]), (out.entropy, scored["entropy"])):
        gap = (said - found)[out.mask].abs()
        assert float(gap.max()) <= bound and float(gap.mean()) <= bound / 5


def test_the_first_token_is_drawn_from_the_policy():
    """One chi-square test a prompt against exact probabilities; a temperature of 1.1 for .9 is found."""
    model, n = tiny(scale=14), 4000
    out = sampled(model, n)
    for hot in (0.9, 1.1):
        smallest = 1.0
        for i, prompt in enumerate(PROMPTS):
            with torch.no_grad():
                logits = model(torch.tensor([prompt], device=DEVICE)).logits[0, -1].double() / hot
            p, seen = (
                logits.softmax(-1).cpu(),
                torch.bincount(out.ids[i * n : (i + 1) * n, 0].cpu(), minlength=106),
            )
            big = p * n >= 10
            cells = [torch.cat([x[big], x[~big].sum()[None]]).numpy() for x in (seen.double(), n * p)]
            smallest = min(smallest, stats.chisquare(*cells).pvalue)
        assert smallest > 1e-4 if hot == 0.9 else smallest < 1e-8


# ------------------------------------------------------------------------------------------------------------
# Training


def gradient_of(policy, batch):
    policy.zero_grad()
    batch_logp = policy(batch, 0.9)["logp"]
    weight = torch.linspace(-1, 1, len(batch_logp), device=DEVICE)[:, None]
    (batch_logp * weight).sum().backward()
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in policy.parameters()]
    return torch.cat([g.double().cpu().flatten() for g in grads])


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_fsdp2_on_one_device_gives_the_gradient(dtype, bound):
    """Float32 masters, one layer at a time computed with in `dtype`; a step of 1e-6 arrives in them."""
    model = tiny(scale=3)
    batch = sampled(model)
    whole = Policy(deepcopy(model))
    try:
        split = shard(Policy(model), dtype, torch.device(DEVICE))
        one, other = gradient_of(whole, batch), gradient_of(split, batch)
        assert float((one - other).norm() / one.norm()) <= bound
        assert all(p.dtype == torch.float32 for p in split.parameters())
        before = [p.full_tensor().detach().clone() for p in split.parameters()]
        torch.optim.AdamW(split.parameters(), lr=1e-6, weight_decay=0.0).step()
        moved = [
            float((p.full_tensor().detach() - old).abs().max()) for p, old in zip(split.parameters(), before)
        ]
        assert max(moved) == pytest.approx(1e-6, rel=0.1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_run_that_is_resumed_repeats_the_numbers(cli, home):
    """Bit for bit."""
    for out, steps in (("a", 6), ("b", 3)):
        assert cli("--method", "opefo", *TINY, *ON, "--eval-every", 3, "--steps", steps, "--out", out)[0] == 0
    assert cli("--resume", "b", "--quiet", "--steps", 6)[0] == 0
    assert rows_of("a") == rows_of("b")


def test_the_ledger_predicts_the_change_of_entropy(cli, home):
    how = ["--ledger-every", 1, "--steps", 20, "--lr", "1e-4", "--eval-every", 20, "--out", "a"]
    assert cli("--method", "grpo", *TINY, *ON, *how)[0] == 0
    rows = rows_of("a")[1:]
    fit = stats.linregress([r["dH_predicted"] for r in rows], [r["dH_measured"] for r in rows])
    assert fit.rvalue > 0.95 and 0.8 < fit.slope < 1.2


def test_a_language_model_trains_in_bfloat16(cli, home):
    """Masters are float32, the policy that samples is a bfloat16 copy, and its checkpoint loads."""
    tokenizer = byte_tokenizer()
    llama(tokenizer, max_position_embeddings=512).save_pretrained("m")
    tokenizer.save_pretrained("m")
    what = [
        "--model",
        "m",
        "--data",
        "arithmetic",
        "--reward",
        "random",
        "--lr",
        "1e-3",
        "--dtype",
        "bfloat16",
    ]
    much = ["--prompts", 4, "--group-size", 4, "--eval-problems", 4, "--eval-samples", 2, "--steps", 3]
    try:
        code, out, err = cli(
            "--method", "opefo", *what, *much, "--quiet", "--ledger-every", 1, "--out", "a", *ON
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert code == 0, err
    rows = rows_of("a")[1:]
    assert all(row["grad_norm"] > 0 and row["skipped"] == 0 and "dH_measured" in row for row in rows)
    saved = load_file("a/checkpoint/model.safetensors").values()
    assert all(x.dtype == torch.bfloat16 for x in saved)
