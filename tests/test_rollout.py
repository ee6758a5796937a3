"""Chapter 4: masks, sampling, scoring, the chain world and its warm start."""

import inspect
import itertools
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rollout
from rollout import (
    EOS,
    OPERATORS,
    PAD,
    VOCABULARY,
    Problem,
    Rollout,
    TinyModel,
    TorchEngine,
    WarmStart,
    answer,
    chain_solutions,
    chain_task,
    chain_verify,
    nucleus,
    response_mask,
    sample,
    score,
    tiny_tokenizer,
    warm_policy,
)

EOS_ID, PAD_ID = VOCABULARY.index(EOS), VOCABULARY.index(PAD)


def sharpen(model, factor=8.0):
    """Larger random weights: at the usual initialisation every distribution is nearly uniform, and a position
    or mask mistake would hardly show."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.mul_(factor)
    return model.eval()


def small_model(vocabulary, seed=0, factor=8.0):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return sharpen(Qwen2ForCausalLM(config), factor)


@pytest.fixture(scope="module")
def model():
    return small_model(12)


PROMPTS = [[5, 4, 3], [7], [2, 3, 4, 5, 6, 7, 8], [9, 9]]  # ragged, and none of the lengths repeats


@torch.no_grad()
def plain_logp(model, prompt, response, temperature=1.0):
    """(T, V) log-probabilities of every next token from one row without padding, cache, mask or packing."""
    logits = model(torch.tensor([prompt + response])).logits[0].double() / temperature
    return logits.log_softmax(-1)[len(prompt) - 1 : len(prompt) + len(response) - 1]


# ------------------------------------------------------------------------------------------------------------
# Masks


def reference_mask(row, stops):
    """Token by token, as one would do it by hand."""
    out, open_ = [], True
    for token in row:
        out.append(open_)
        open_ = open_ and token not in stops
    return out


@given(
    st.integers(1, 9).flatmap(
        lambda t: st.lists(st.lists(st.integers(0, 4), min_size=t, max_size=t), min_size=1, max_size=6)
    ),
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
)
def test_mask_includes_the_first_eos_and_nothing_after_it(rows, stops):
    got = response_mask(torch.tensor(rows), stops)
    assert got.dtype == torch.bool
    assert got.tolist() == [reference_mask(r, stops) for r in rows]


@pytest.mark.parametrize(
    "row, eos, expected",
    [
        ([1, 5, 5, 1], 1, [True, False, False, False]),  # EOS first
        ([5, 5, 5], 1, [True, True, True]),  # no EOS
        ([5, 1, 0, 0], 1, [True, True, False, False]),
        ([5, 1, 1, 1], 1, [True, True, False, False]),  # pad == eos: the one real EOS stays
        ([5, 2, 1, 5], (1, 2), [True, True, False, False]),  # several EOS ids: whichever comes first
        ([5, 5, 1], [1], [True, True, True]),  # EOS last
    ],
)
def test_mask_edge_cases(row, eos, expected):
    assert response_mask(torch.tensor([row]), eos).tolist() == [expected]


@pytest.mark.parametrize("pad, eos", [(0, 1), (1, 1), (0, (1, 2)), (1, (1, 2))])
def test_sample_masks_end_at_the_first_eos_and_pads_follow(model, pad, eos):
    out = sample(model, PROMPTS, 40, 6, eos, pad, generator=torch.Generator().manual_seed(1))
    stops = {eos} if isinstance(eos, int) else set(eos)
    ended = 0
    for ids, mask, truncated, logp in zip(
        out.ids.tolist(), out.mask.tolist(), out.truncated.tolist(), out.rollout_logp.tolist()
    ):
        n = sum(mask)
        assert mask == [True] * n + [False] * (len(mask) - n) and n >= 1
        assert not stops & set(ids[: n - 1]), "something after the first EOS is in the mask"
        assert truncated == (ids[n - 1] not in stops)
        assert not truncated or n == 6, "a response without EOS must be as long as the limit"
        assert ids[n:] == [pad] * (len(ids) - n)
        assert logp[n:] == [0.0] * (len(ids) - n) and all(x < 0 for x in logp[:n])
        ended += not truncated
    assert 0 < ended < len(out.ids), "the test needs responses of both kinds"


def forced(lengths, eos=1, other=5):
    """A hook: row r of its prompt writes lengths[r] tokens, the last one EOS (0: never an EOS)."""

    def hook(logits, t, rows, generator):
        end = torch.tensor(lengths)[rows] == t + 1
        return torch.where(end, eos, other + (rows + t) % 3)

    return hook


@pytest.mark.parametrize("pad", [0, 1])
def test_eos_as_first_token_and_no_eos_side_by_side(model, pad):
    out = sample(model, [[5, 4], [7]], 3, 5, 1, pad, hook=forced([1, 0, 3]))
    assert out.mask.sum(-1).tolist() == [1, 5, 3] * 2
    assert out.truncated.tolist() == [False, True, False] * 2
    assert out.group.tolist() == [0, 0, 0, 1, 1, 1]
    full, start = out.full_ids(pad)  # what is trained is what was drawn, EOS included, and no more
    assert start.tolist() == [1, 1, 1, 0, 0, 0]
    assert full[0].tolist() == [5, 4, 1] + [pad] * 4
    assert full[3].tolist() == [7, 1] + [pad] * 5


def test_all_rows_ending_at_once_gives_a_batch_one_token_wide(model):
    out = sample(model, PROMPTS, 2, 6, 1, 0, hook=forced([1, 1]))
    assert out.ids.tolist() == [[1]] * 8 and out.mask.all() and not out.truncated.any()


def test_empty_prompts_are_refused_by_name(model):
    for prompts in ([], [[5], []]):
        with pytest.raises(ValueError, match="prompt"):
            sample(model, prompts, 2, 3, 1, 0)


# ------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_rollout_logp_and_entropy_are_those_of_the_unpadded_model(model, temperature):
    generator = torch.Generator().manual_seed(0)
    out = sample(model, PROMPTS, 6, 7, 1, 0, temperature, generator=generator, entropy=True)
    assert 0 < int((~out.truncated).sum()) < len(out.ids)
    for i, (ids, mask) in enumerate(zip(out.ids, out.mask)):
        logp = plain_logp(model, PROMPTS[i // 6], ids[mask].tolist(), temperature)
        want = logp.gather(-1, ids[mask][:, None])[:, 0]
        torch.testing.assert_close(out.rollout_logp[i][mask].double(), want, rtol=0, atol=2e-4)
        entropy = -(logp.exp() * logp).sum(-1)
        torch.testing.assert_close(out.entropy[i][mask].double(), entropy, rtol=0, atol=2e-4)


def test_greedy_responses_do_not_depend_on_the_other_prompts(model):
    def greedy(logits, t, rows, generator):
        return logits.argmax(-1)

    together = sample(model, PROMPTS, 2, 8, 1, 0, hook=greedy)
    for i, prompt in enumerate(PROMPTS):
        alone = sample(model, [prompt], 2, 8, 1, 0, hook=greedy)
        width = alone.ids.shape[1]
        assert torch.equal(together.ids[2 * i : 2 * i + 2, :width], alone.ids)
        assert not together.mask[2 * i : 2 * i + 2, width:].any()
        torch.testing.assert_close(
            together.rollout_logp[2 * i : 2 * i + 2, :width], alone.rollout_logp, rtol=0, atol=1e-4
        )
    backwards = sample(model, PROMPTS[::-1], 2, 8, 1, 0, hook=greedy)  # row order
    assert torch.equal(backwards.ids.view(4, 2, -1).flip(0).reshape(8, -1), together.ids)


def test_dropping_finished_rows_early_changes_nothing(model, monkeypatch):
    """Rows end one by one, so the cache shrinks several times; every log-prob must still be that of an
    unpadded, cache-free pass over the same tokens."""
    from transformers import DynamicCache

    drops = []
    real = DynamicCache.reorder_cache

    def spy(self, index):
        drops.append(len(index))
        return real(self, index)

    monkeypatch.setattr(DynamicCache, "reorder_cache", spy)
    lengths = [4, 1, 9, 2, 0, 6, 3, 2]
    out = sample(model, PROMPTS, 8, 9, 1, 0, hook=forced(lengths), entropy=True)
    assert len(drops) >= 4 and drops[0] == 32, "the test did not reach the code that drops rows"
    assert out.mask.sum(-1).tolist() == [n or 9 for n in lengths] * 4
    for i, (ids, mask) in enumerate(zip(out.ids, out.mask)):
        logp = plain_logp(model, PROMPTS[i // 8], ids[mask].tolist())
        want = logp.gather(-1, ids[mask][:, None])[:, 0]
        torch.testing.assert_close(out.rollout_logp[i][mask].double(), want, rtol=0, atol=2e-4)
        torch.testing.assert_close(
            out.entropy[i][mask].double(), -(logp.exp() * logp).sum(-1), rtol=0, atol=2e-4
        )


def chi_square_p(count, probability):
    """Upper tail of the chi-square statistic; cells expected below 5 are pooled."""
    n = sum(count)
    big = [(c, n * p) for c, p in zip(count, probability) if n * p >= 5]
    rest = (n - sum(c for c, _ in big), n - sum(e for _, e in big))
    cells = [*big, rest] if rest[1] > 1 else big
    x = sum((c - e) ** 2 / e for c, e in cells)
    return float(
        torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2.0), torch.tensor(x / 2, dtype=torch.float))
    )


def enumerate_sequences(model, prompt, length, eos, temperature):
    """{response: exact probability} of every response of at most `length` tokens, vocabulary of 5."""
    found = {}
    for tokens in itertools.product(range(5), repeat=length):
        ends = [i for i, token in enumerate(tokens) if token == eos]
        found[tokens[: ends[0] + 1] if ends else tokens] = 0.0
    for tokens in found:
        logp = plain_logp(model, prompt, list(tokens), temperature)
        found[tokens] = math.exp(sum(logp[i, v] for i, v in enumerate(tokens)))
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_the_exact_softmax_by_enumeration(temperature):
    """First tokens and whole responses against all responses of a 5-token vocabulary, ragged prompts, one
    generator."""
    model, prompts, n = small_model(5, seed=2, factor=6.0), [[2, 3, 4], [4], [3, 3, 2, 2, 4]], 6000
    out = sample(model, prompts, n, 3, 1, 0, temperature, generator=torch.Generator().manual_seed(11))
    for i, prompt in enumerate(prompts):
        exact = enumerate_sequences(model, prompt, 3, 1, temperature)
        assert abs(sum(exact.values()) - 1) < 1e-6
        assert max(exact.values()) < 0.6, "too peaked to test anything"
        rows = slice(i * n, (i + 1) * n)
        drawn = [tuple(r[m].tolist()) for r, m in zip(out.ids[rows], out.mask[rows])]
        assert set(drawn) <= set(exact)
        p = chi_square_p([drawn.count(s) for s in exact], list(exact.values()))
        assert p > 1e-4, f"prompt {prompt}: responses are not drawn from the policy (p = {p:.1e})"
        first = plain_logp(model, prompt, [0], temperature)[0].exp().tolist()
        p = chi_square_p(torch.bincount(out.ids[rows, 0], minlength=5).tolist(), first)
        assert p > 1e-4, f"prompt {prompt}: first tokens are not drawn from the policy (p = {p:.1e})"


def test_chi_square_rejects_a_slightly_wrong_temperature():
    """The test above can fail: 6,000 draws at temperature .9 do not pass for draws at temperature 1."""
    model, prompt, n = small_model(5, seed=2, factor=6.0), [2, 3, 4], 6000
    out = sample(model, [prompt], n, 3, 1, 0, 0.9, generator=torch.Generator().manual_seed(11))
    exact = enumerate_sequences(model, prompt, 3, 1, 1.0)
    drawn = [tuple(r[m].tolist()) for r, m in zip(out.ids, out.mask)]
    assert chi_square_p([drawn.count(s) for s in exact], list(exact.values())) < 1e-4


@pytest.mark.parametrize("seed", range(5))
def test_top_p_biases_the_policy_gradient_and_no_weight_brings_the_tail_back(seed):
    """Expectations of the policy gradient over y ~ nucleus, exactly, for a softmax of eight tokens."""
    g = torch.Generator().manual_seed(seed)
    z, reward = torch.randn(8, generator=g).double(), torch.rand(8, generator=g).double()
    p, q = z.softmax(-1), nucleus(z[None], 0.7)[0].softmax(-1)
    score_of = torch.eye(8) - p  # row y: ∇_z log p_y
    true = torch.func.jacrev(lambda z: z.softmax(-1) @ reward)(z)

    def expected(sampled, weight):
        return (sampled * weight * (reward - sampled @ reward)) @ score_of

    ones, back = torch.ones(8).double(), torch.where(q > 0, p / q, 0)
    assert torch.allclose(expected(p, ones), true, atol=1e-12)  # without top-p there is no bias
    assert (expected(q, ones) - true).norm() > 0.2 * true.norm()
    assert (expected(q, back) - true).norm() > 0.1 * true.norm()
    kept = q > 0
    assert (q @ score_of)[kept].min() > 0 > (q @ score_of)[~kept].max()  # kept tokens rise unrewarded


def test_sampling_uses_only_its_generator(model):
    def draw(seed):
        return sample(model, PROMPTS, 4, 6, 1, 0, generator=torch.Generator().manual_seed(seed)).ids

    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    a = draw(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(draw(5), a) and not torch.equal(draw(6), a)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_what_is_drawn_does_not_depend_on_how_many_rows_are_sampled_at_once(model, monkeypatch, top_p):
    """Rows end at different times and parts cut through groups; the memory of 5, 1 and all rows."""
    seen, real = [], rollout._sample

    def spy(*args):
        seen.append(len(args[2]))
        real(*args)

    monkeypatch.setattr(rollout, "_sample", spy)
    row = rollout._row_bytes(model, 7 + 9)

    def drawn(memory):
        seed = torch.Generator().manual_seed(3)
        return sample(model, PROMPTS, 3, 9, 1, 0, 1.0, top_p, seed, entropy=True, memory=memory)

    whole = drawn(2**33)
    assert seen == [12] and len(set(whole.mask.sum(-1).tolist())) > 2
    for memory, parts in ((6 * row - 1, [5, 5, 2]), (0, [1] * 12)):
        seen.clear()
        got = drawn(memory)
        assert seen == parts
        for key in ("ids", "mask", "truncated", "group"):
            assert torch.equal(getattr(got, key), getattr(whole, key)), key
        for key in ("rollout_logp", "entropy"):
            torch.testing.assert_close(getattr(got, key), getattr(whole, key), rtol=0, atol=1e-4)
    seen.clear()
    sample(model, PROMPTS, 3, 9, 1, 0, hook=lambda *_: None, memory=0)
    assert seen == [12], "a hook draws for itself, so its rows stay together"


def test_a_hook_that_returns_none_leaves_sampling_alone(model):
    seen = []

    def hook(logits, t, rows, generator):
        seen.append((t, rows.tolist()))

    a, b = (
        sample(model, PROMPTS, 3, 6, 1, 0, generator=torch.Generator().manual_seed(2), hook=h)
        for h in (None, hook)
    )
    assert torch.equal(a.ids, b.ids) and torch.equal(a.rollout_logp, b.rollout_logp)
    assert seen[0] == (0, [0, 1, 2] * 4)


def test_a_hook_may_report_the_log_probs_of_its_own_distribution(model):
    def hook(logits, t, rows, generator):
        return 2 + rows % 3, -1.0 - t - rows.float()

    out = sample(model, PROMPTS, 3, 4, 1, 0, hook=hook)
    assert out.ids.tolist() == [[2] * 4, [3] * 4, [4] * 4] * 4
    assert out.rollout_logp.tolist() == [[-1.0 - t - r for t in range(4)] for r in range(3)] * 4


@pytest.mark.parametrize("when", ["at the first token", "later"])
def test_diverged_weights_are_named_not_sampled(when):
    model = small_model(5)
    if when == "later":  # only a position that is reached after the prompt is poisoned
        inner = model.get_decoder()
        real, calls = inner.forward, []

        def forward(*args, **kwargs):
            out = real(*args, **kwargs)
            calls.append(1)
            if len(calls) > 1:
                out.last_hidden_state.fill_(math.nan)
            return out

        inner.forward = forward
    else:
        model.get_output_embeddings().weight.data[2, 3] = math.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        sample(model, [[2, 3]], 4, 4, 1, 0, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------
# Scoring


def test_score_matches_the_unpadded_model_in_float64(model):
    """log π, H, Σp², Σp² log p of every response token against plain logits, one row at a time."""
    out = sample(model, PROMPTS, 5, 7, 1, 0, generator=torch.Generator().manual_seed(4))
    double = small_model(12).double()
    got = score(double, *out.full_ids(0), out.ids, out.mask, 0.8)
    for i, (ids, mask) in enumerate(zip(out.ids, out.mask)):
        logp = plain_logp(double, PROMPTS[i // 5], ids[mask].tolist(), 0.8)
        p = logp.exp()
        want = (
            logp.gather(-1, ids[mask][:, None])[:, 0],
            -(p * logp).sum(-1),
            (p * p).sum(-1),
            (p * p * logp).sum(-1),
        )
        for a, b in zip((got.logp, got.entropy, got.p2, got.p2logp), want):
            torch.testing.assert_close(a[i][mask].double(), b, rtol=0, atol=1e-9)
            assert not a[i][~mask].any()


def test_score_of_a_sample_is_its_rollout_logp(model):
    out = sample(model, PROMPTS, 16, 8, 1, 0, 1.3, generator=torch.Generator().manual_seed(6))
    got = score(model, *out.full_ids(0), out.ids, out.mask, 1.3)
    torch.testing.assert_close(got.logp, out.rollout_logp, rtol=0, atol=1e-4)


@given(st.integers(0, 2**20), st.integers(0, 5), st.sampled_from([0, 1]))
@settings(max_examples=15)
def test_score_ignores_padding_content_padding_width_and_row_order(seed, extra, pad):
    model, g = small_model(12).double(), torch.Generator().manual_seed(seed)
    prompts = [torch.randint(2, 12, (n,), generator=g).tolist() for n in (1, 4, 2)]
    out = sample(model, prompts, 3, 6, 1, pad, generator=g)
    full, start = out.full_ids(pad)
    base = score(model, full, start, out.ids, out.mask)
    position = torch.arange(full.shape[1])
    beyond = position[None] > (start + out.mask.sum(-1))[:, None]
    garbage = torch.where(beyond, torch.randint(0, 12, full.shape, generator=g), full)
    garbage = torch.cat([garbage, torch.randint(0, 12, (len(full), extra), generator=g)], 1)
    ids = torch.where(out.mask, out.ids, torch.randint(0, 12, out.ids.shape, generator=g))
    ids = torch.cat([ids, torch.randint(0, 12, (len(ids), extra), generator=g)], 1)
    mask = torch.nn.functional.pad(out.mask, (0, extra))
    order = torch.randperm(len(full), generator=g)
    again = score(model, garbage[order], start[order], ids[order], mask[order])
    for name in ("logp", "entropy", "p2", "p2logp"):
        a, b = getattr(base, name)[order], getattr(again, name)
        torch.testing.assert_close(b[:, : a.shape[1]], a, rtol=0, atol=1e-10)
        assert not b[:, a.shape[1] :].any()


def test_full_ids_put_the_prompt_first_and_pads_last():
    """Whatever an engine leaves behind the mask (9 here) is replaced by pads."""
    ids = torch.tensor([[7, 8, 1], [5, 1, 9], [3, 3, 3], [1, 9, 9]])
    mask, zeros = response_mask(ids, 1), torch.zeros(4, 3)
    r = Rollout([[5], [6, 6]], ids, mask, zeros, torch.tensor([0, 0, 1, 1]), torch.zeros(4).bool())
    full, start = r.full_ids(0)
    assert full.tolist() == [[5, 7, 8, 1, 0], [5, 5, 1, 0, 0], [6, 6, 3, 3, 3], [6, 6, 1, 0, 0]]
    assert start.tolist() == [0, 0, 1, 1]


def test_entropy_carries_a_gradient_only_when_asked(model):
    out = sample(model, PROMPTS, 2, 4, 1, 0, generator=torch.Generator().manual_seed(0))
    for wanted in (False, True):
        got = score(model, *out.full_ids(0), out.ids, out.mask, entropy_grad=wanted)
        assert got.logp.requires_grad and got.entropy.requires_grad == wanted


# ------------------------------------------------------------------------------------------------------------
# The chain world


def right_by_hand(response, problem):
    """A second, independent verifier: read left to right with a stack of the running value."""
    numbers, arrow, target = problem.prompt.partition(" -> ")
    assert arrow
    words = response.split()
    if len(words) < 4 or len(words) > 10 or len(words) % 3 != 1:
        return False
    if words[0] not in numbers.split():
        return False
    value = int(words[0])
    for i in range(1, len(words), 3):
        op, b, c = words[i : i + 3]
        if b not in numbers.split() or op not in ("+", "-", "*"):
            return False
        value = eval(f"{value}{op}{int(b)}")
        if value < 0 or value > 99 or f"{value}" != c:
            return False
    return value == int(target) and words[-1] == target


PROBLEM = Problem("3 5 7 9 -> 41", "41")
words_like_an_answer = st.lists(
    st.sampled_from(["3", "5", "7", "9", "2", "35", "44", "41", "+", "-", "*", "->", "/", "07", "-1", "100"]),
    max_size=13,
).map(" ".join)


@given(st.one_of(st.text(), words_like_an_answer, st.text("0123456789+-* \n\t٣３²", max_size=30)))
@settings(max_examples=400)
def test_verifier_never_throws_and_agrees_with_a_second_one_on_any_text(text):
    got = chain_verify(text, PROBLEM)
    assert isinstance(got, bool)
    assert got == right_by_hand(text, PROBLEM)
    chain_task().signature(text)


@given(st.data())
@settings(max_examples=300)
def test_a_damaged_solution_is_judged_as_the_second_verifier_judges_it(data):
    problems, rows, start = chain_solutions()
    p = data.draw(st.integers(0, len(problems) - 1))
    row = rows[data.draw(st.integers(int(start[p, 0]), int(start[p, -1]) - 1))]
    words = [VOCABULARY[i] for i in row if i not in (PAD_ID, EOS_ID)]
    assert chain_verify(" ".join(words), problems[p]) and right_by_hand(" ".join(words), problems[p])
    at = data.draw(st.integers(0, len(words) - 1))
    damaged = list(words)
    damaged[at] = data.draw(st.sampled_from([*VOCABULARY[2:], "", "1e1", "+3"]))
    text = " ".join(damaged)
    assert chain_verify(text, problems[p]) == right_by_hand(text, problems[p])
    assert not chain_verify(" ".join(words[:-1]), problems[p])
    assert not chain_verify(" ".join(words + ["3"]), problems[p])


@pytest.mark.parametrize(
    "response, right",
    [
        ("5 * 7 35 + 9 44 - 3 41", True),
        ("  5 * 7\n35 + 9 44 - 3 41 ", True),
        ("5 * 7 35 + 9 44 - 3 42", False),  # a wrong result
        ("5 * 7 36 + 5 41", False),  # a wrong step with the right target
        ("41", False),
        ("", False),
        ("2 * 9 18 + 9 27", False),  # not an allowed number, and not the target
        ("9 - 9 0 + 5 5 * 9 45", False),  # right arithmetic, wrong target
        ("5 * 9 45 + 3 48 - 7 41", True),
        ("3 - 5 -2 + 9 7", False),  # leaves 0..99
        ("5 * 7 35 + 3 38 + 3 41 + 0 41", False),  # four operations
        ("05 * 7 35 + 9 44 - 3 41", False),
        ("5 * 7 35 + 9 44 - 3 041", False),
    ],
)
def test_verifier_examples(response, right):
    assert chain_verify(response, PROBLEM) is right


def search(numbers, target):
    """All solutions of one problem by depth-first search: no arrays, no sharing with the enumeration."""
    found = set()

    def go(value, text, left):
        if text.count(" ") and value == target:
            found.add(text)
        if left:
            for op in OPERATORS:
                for b in numbers:
                    c = {"+": value + b, "-": value - b, "*": value * b}[op]
                    if 0 <= c <= 99:
                        go(c, f"{text} {op} {b} {c}", left - 1)

    for a in numbers:
        go(a, str(a), 3)
    return found


def test_enumeration_equals_an_independent_search():
    problems, rows, start = chain_solutions()
    few = int(np.argmin(start[:, -1] - start[:, 0]))
    for p in (0, few, 1234, 3000, len(problems) - 1):
        numbers = [int(w) for w in problems[p].prompt.split()[:4]]
        listed = [
            " ".join(VOCABULARY[i] for i in r if i not in (PAD_ID, EOS_ID))
            for r in rows[start[p, 0] : start[p, -1]]
        ]
        assert len(listed) == len(set(listed))
        assert set(listed) == search(numbers, int(problems[p].answer)), problems[p].prompt
        for k in (1, 2, 3):  # the offsets split them by number of operations
            part = rows[start[p, k - 1] : start[p, k]]
            assert ((part != PAD_ID).sum(1) == 3 * k + 2).all()


def test_every_problem_and_every_solution_is_counted_by_an_independent_search():
    """All 126 subsets: the number of solutions of every target, walked one chain at a time."""
    problems, rows, start = chain_solutions()
    count = {}
    for numbers in itertools.combinations(range(1, 10), 4):
        level = list(numbers)
        for _ in range(3):
            level = [c for v in level for b in numbers for c in (v + b, v - b, v * b) if 0 <= c <= 99]
            for c in level:
                if 10 <= c <= 60:
                    name = " ".join(map(str, numbers)) + f" -> {c}"
                    count[name] = count.get(name, 0) + 1
    assert count == {p.prompt: int(b - a) for p, a, b in zip(problems, start[:, 0], start[:, -1])}
    assert start[0, 0] == 0 and start[-1, -1] == len(rows) and (start[1:, 0] == start[:-1, -1]).all()
    assert all(p.answer == p.prompt.split()[-1] for p in problems)


def test_a_sample_of_all_enumerated_solutions_verifies():
    problems, rows, start = chain_solutions()
    owner = np.repeat(np.arange(len(problems)), start[:, -1] - start[:, 0])
    for i in np.random.default_rng(0).integers(0, len(rows), 4000):
        text = " ".join(VOCABULARY[t] for t in rows[i] if t not in (PAD_ID, EOS_ID))
        assert chain_verify(text, problems[owner[i]]), (text, problems[owner[i]])


def test_nothing_leaks_from_the_held_out_problems():
    task = chain_task()
    train = {p.prompt for p in task.train}
    everything = {p.prompt for p in chain_solutions()[0]}
    held = everything - train
    assert train < everything and len(train) == len(task.train) and 0.17 < len(held) / len(everything) < 0.23
    for split in (task.test, task.hard):
        names = {p.prompt for p in split}
        assert len(names) == 96 and names <= held
    solutions = {p: s for p, s in zip(chain_solutions()[0], np.diff(chain_solutions()[2][:, [0, -1]])[:, 0])}
    worst = max(solutions[p] for p in task.hard)
    rest = [solutions[p] for p in solutions if p.prompt in held and p not in task.hard]
    assert worst <= min(rest), "HARD must hold the held-out problems with the fewest solutions"


def test_tokenizer_round_trip_and_reload(tmp_path):
    tokenizer = tiny_tokenizer()
    problems, rows, _ = chain_solutions()
    assert len(tokenizer) == len(VOCABULARY) and (tokenizer.pad_token_id, tokenizer.eos_token_id) == (
        PAD_ID,
        EOS_ID,
    )
    texts = [" ".join(VOCABULARY[t] for t in r if t not in (PAD_ID, EOS_ID)) for r in rows[::5000]]
    texts += [p.prompt for p in problems[::500]]
    for t in texts:
        ids = tokenizer(t, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(t.split())  # a number is one token
        assert tokenizer.decode(ids) == t
    for row in rows[::5000]:
        assert tokenizer(tokenizer.decode(row, skip_special_tokens=True), add_special_tokens=False)[
            "input_ids"
        ] == [t for t in row if t not in (PAD_ID, EOS_ID)]
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert (again.pad_token_id, again.eos_token_id) == (PAD_ID, EOS_ID)


def test_the_embedded_model_is_small_and_loads_in_vllm():
    model = TinyModel().build(tiny_tokenizer(), 0)
    assert sum(p.numel() for p in model.parameters()) <= 500_000
    assert model.config.hidden_size // model.config.num_attention_heads >= 32
    state = torch.random.get_rng_state()
    again = TinyModel().build(tiny_tokenizer(), 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_warm_start_draws_only_right_chains_of_training_problems():
    task, tokenizer = chain_task(), tiny_tokenizer()
    train = {p.prompt: p for p in task.train}
    rows = torch.cat([WarmStart().draw(torch.Generator().manual_seed(s)) for s in range(8)])
    kinds, prompts = set(), set()
    for row in rows:
        prompt, response = tokenizer.decode(row[:6]), row[6:]
        assert prompt in train
        length = int(response_mask(response[None], EOS_ID).sum())
        assert response[length - 1] == EOS_ID and (response[length:] == PAD_ID).all()
        assert task.verify([tokenizer.decode(response[: length - 1])], [train[prompt]]) == [True]
        kinds.add(length)
        prompts.add(prompt)
    assert kinds == {5, 8, 11} and len(prompts) > 1000
    again = WarmStart().draw(torch.Generator().manual_seed(3))
    assert torch.equal(again, rows[3 * 256 : 4 * 256])


def test_answer_grades_the_text_that_the_policy_wrote():
    """Scripted tokens through model, tokenizer and verifier: right, right but without EOS, wrong."""
    tokenizer, task = tiny_tokenizer(), chain_task()
    model = TinyModel().build(tokenizer, 0).eval()
    right = tokenizer("5 * 7 35 + 9 44 - 3 41", add_special_tokens=False)["input_ids"]
    script = [right + [EOS_ID], right + [right[0]], right[:7] + [EOS_ID], [EOS_ID]]

    def hook(logits, t, rows, generator):
        return torch.tensor([(script[r] + [PAD_ID] * 11)[t] for r in rows.tolist()])

    out = answer(TorchEngine(model, tokenizer), task, [PROBLEM], 4, hook=hook)
    assert out.correct.tolist() == [True, False, False, False]
    assert out.truncated.tolist() == [False, True, False, False]
    assert out.mask.sum(-1).tolist() == [11, 11, 8, 1]
    assert out.texts[0] == "5 * 7 35 + 9 44 - 3 41" and out.texts[3] == ""


# ------------------------------------------------------------------------------------------------------------
# The cache of warm starts


@pytest.fixture()
def training(monkeypatch):
    """Training replaced by something quick that is recorded: it adds 1 to every norm weight."""
    calls = []

    def quick(model, how, progress=iter):
        calls.append(how)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "norm" in name:
                    p.add_(1)
        return 0.0

    monkeypatch.setattr(rollout, "supervised", quick)
    return calls


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_a_second_call_reads_the_cache(training, tmp_path, capsys):
    a, _ = warm_policy(folder=tmp_path / "deep" / "cache")
    b, _ = warm_policy(folder=tmp_path / "deep" / "cache")
    assert len(training) == 1 and same(a, b)
    assert [p.suffix for p in (tmp_path / "deep" / "cache").iterdir()] == [".safetensors"]
    assert capsys.readouterr().err == ""
    assert not a.training and not b.training


def test_the_cache_key_holds_everything_that_determines_the_weights(training, tmp_path):
    for how, shape in (
        (WarmStart(), TinyModel()),
        (WarmStart(seed=1), TinyModel()),
        (WarmStart(lr=1e-3), TinyModel()),
        (WarmStart(), TinyModel(intermediate_size=64)),
    ):
        warm_policy(how, shape, tmp_path)
    assert len(training) == 4 == len(list(tmp_path.iterdir()))


def test_the_warm_start_has_one_thread_whoever_asks(monkeypatch, tmp_path):
    """Their number changes rounding, and would change where a run starts."""
    threads, seen = torch.get_num_threads(), []
    monkeypatch.setattr(rollout, "supervised", lambda *_: seen.append(torch.get_num_threads()))
    try:
        for n in (2, 3):
            torch.set_num_threads(n)
            warm_policy(folder=tmp_path)
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(threads)
    assert seen == [1], "and the second call read what the first had made"


@pytest.mark.parametrize(
    "old, new, same",
    [
        ("    model.eval()\n", "    model.eval()  # a comment\n", True),
        ("Minimise the cross-entropy", "Minimize the cross-entropy", True),
        ("model.parameters(), 1.0)", "model.parameters(), 2.0)", False),
        ("digest()[0] < 51", "digest()[0] < 52", False),
        ("MAX_OPS = 3", "MAX_OPS = 4", False),
        ("PAD, EOS, ARROW =", "EOS, PAD, ARROW =", False),
        ("LONGEST_ANSWER = 500", "LONGEST_ANSWER = 501", True),  # trains nothing
        ("if temperature == 1 else", "if temperature == 2 else", False),  # token_stats
        ("logq.clamp(min=-1e4)", "logq.clamp(min=-1e3)", False),  # what that calls
    ],
)
def test_the_cache_key_is_of_all_code_that_trains_and_of_no_comment(monkeypatch, old, new, same):
    real, seen = inspect.getsource, []

    def changed(thing):
        seen.append(old in real(thing))
        return real(thing).replace(old, new)

    before = rollout._code(rollout._DETERMINES)
    monkeypatch.setattr(inspect, "getsource", changed)
    assert (rollout._code(rollout._DETERMINES) == before) == same and any(seen)


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "garbage", "no tensors", "a tensor missing", "wrong shape"]
)
def test_a_damaged_cache_file_is_made_anew(training, tmp_path, capsys, damage):
    from safetensors.torch import load_file, save_file

    good, _ = warm_policy(folder=tmp_path)
    (path,) = tmp_path.iterdir()
    weights = load_file(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "garbage":
        path.write_bytes(b"\xff" * 4096)
    elif damage == "no tensors":
        save_file({}, path)
    elif damage == "a tensor missing":
        save_file(dict(list(weights.items())[1:]), path)
    else:
        save_file({k: v[:1].clone() for k, v in weights.items()}, path)
    again, _ = warm_policy(folder=tmp_path)
    assert len(training) == 2 and same(good, again)
    err = capsys.readouterr().err
    assert str(path) in err and "anew" in err
    warm_policy(folder=tmp_path)
    assert len(training) == 2, "the file made anew is read"


def test_an_unwritable_cache_is_reported_and_not_fatal(training, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    model, _ = warm_policy(folder=tmp_path / "file" / "cache")
    assert len(training) == 1 and not model.training
    err = capsys.readouterr().err
    assert "not cached" in err and "ENTROPY_FLOW_CACHE" in err and len(err.splitlines()) <= 2


def test_a_full_disk_while_caching_is_reported_and_not_fatal(training, tmp_path, capsys, monkeypatch):
    """safetensors reports I/O errors with a class of its own, which is not an OSError."""
    import safetensors
    import safetensors.torch

    def full(*_, **__):
        raise safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    warm_policy(folder=tmp_path)
    assert "not cached" in capsys.readouterr().err


def test_the_cache_folder_obeys_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ENTROPY_FLOW_CACHE", str(tmp_path / "a"))
    assert rollout.cache_folder() == tmp_path / "a"
    monkeypatch.delenv("ENTROPY_FLOW_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert rollout.cache_folder() == tmp_path / "entropy-flow"


def test_supervised_learning_lowers_the_loss_and_leaves_global_randomness_alone():
    tokenizer = tiny_tokenizer()
    state = torch.random.get_rng_state()
    losses = [
        rollout.supervised(TinyModel().build(tokenizer, 0), replace(WarmStart(batch=32), steps=n))
        for n in (1, 25)
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert losses[0] > 4.3 and losses[1] < losses[0] - 1  # ln 106 = 4.66


@pytest.mark.slow
def test_the_warm_policy_is_broad(tmp_path):
    """The acceptance numbers: often wrong, almost everything solved by some of 32 samples."""
    from eval import evaluate

    for seed in (0, 1):
        model, tokenizer = warm_policy(WarmStart(seed=seed), folder=tmp_path)
        got = evaluate(TorchEngine(model, tokenizer), chain_task(), 32)
        assert 0.15 <= got["pass@1"] <= 0.35, got["pass@1"]
        assert got["pass@k"] >= 0.85, got["pass@k"]
    shutil.rmtree(tmp_path)


@given(st.integers(2, 60), st.floats(0, 200), st.integers(0, 2**31))
def test_a_draw_is_exact_over_a_grid_of_uniform_numbers(vocabulary, spread, seed):
    """Uniform numbers in the middle of 4,096 equal cells: every token gets its share of them, to one cell."""
    g = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(vocabulary, generator=g)
    logits[torch.rand(vocabulary, generator=g) < 0.3] = -torch.inf
    logits[int(torch.randint(vocabulary, (), generator=g))] = 0.0
    logprob = logits.log_softmax(-1)
    grid = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    count = torch.bincount(rollout.draw(logprob.expand(4096, -1), grid), minlength=vocabulary)
    assert float((count - 4096 * logprob.double().exp()).abs().max()) <= 1.01
    assert int(count[logprob == -torch.inf].sum()) == 0


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_uniform_numbers_draw_possible_tokens(uniform):
    """Also a token of probability 1e-20, and none of probability 0 before or behind."""
    p = torch.tensor([0, 0, 1e-20, 0.3, 0.7, 0, 0])
    drawn = rollout.draw(p.log()[None], torch.tensor([uniform], dtype=torch.float64))
    assert int(drawn) == (2 if uniform == 0 else 4)


# ------------------------------------------------------------------------------------------------------------
# Prompts shared by their responses


@pytest.mark.parametrize("prompts", [PROMPTS, [[3, 5, 7], [9, 10, 11]]])
def test_scoring_with_shared_prompts_is_scoring_without(prompts):
    """Statistics and gradients, ragged prompts and equal ones, rows in any order; and it does share."""
    tokenizer = tiny_tokenizer()
    model = sharpen(TinyModel(32, 64, 2, 1).build(tokenizer, 0)).double()
    out = sample(model, prompts, 5, 6, 1, 0, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(len(out.ids), generator=torch.Generator().manual_seed(1))
    full, start = (x[order] for x in out.full_ids(0))
    ids, mask = out.ids[order], out.mask[order]
    assert rollout._hidden_of_groups(model, full, start, 6) is not None
    assert rollout._hidden_of_groups(model, full[:1], start[:1], 6) is None, "one response: nothing to share"
    results = []
    for chunk in (2**22, None):  # None never shares
        model.zero_grad()
        stats = score(model, full, start, ids, mask, 0.9, True, chunk)
        (stats.logp.square().sum() + stats.entropy.sum()).backward()
        grad = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((stats.logp, stats.entropy, stats.p2, grad))
    for a, b in zip(*results):
        assert float((a - b).detach().norm()) <= 1e-6 * float(b.detach().norm())  # norms are float32 inside
