"""Chapter 6: the pass@k estimator, the evaluation of a policy, the picture and the table."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eval as chapter
from eval import STYLES, distinct_correct, draw, evaluate, pass_at_k, series, smooth, table
from rollout import Problem, Rollout, Task, TinyModel, TorchEngine, chain_task, tiny_tokenizer

PNG = b"\x89PNG\r\n\x1a\n"

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))


# ------------------------------------------------------------------------------------------------------------
# pass@k


@pytest.mark.parametrize("n", range(1, 9))
def test_eq_6_1_pass_at_k_equals_the_share_of_all_subsets(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        right = [i < c for i in range(n)]
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@given(counts)
def test_eq_6_1_equals_exact_binomials_for_any_size(nck):
    n, c, k = nck
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-12)
    assert 0.0 <= pass_at_k(n, c, k) <= 1.0


@given(counts)
def test_pass_at_k_is_monotone_in_k_and_in_c_and_pass_at_1_is_the_mean(nck):
    n, c, k = nck
    assert pass_at_k(n, c, 1) == pytest.approx(c / n, abs=1e-12)
    if k < n:
        assert pass_at_k(n, c, k + 1) >= pass_at_k(n, c, k) - 1e-12
    if c < n:
        assert pass_at_k(n, c + 1, k) >= pass_at_k(n, c, k) - 1e-12
    assert pass_at_k(n, 0, k) == 0.0 and pass_at_k(n, n, k) == 1.0
    assert pass_at_k(n, c, n) == float(c > 0)


def test_pass_at_k_is_unbiased_and_the_plug_in_is_not():
    """Mean over c ~ Binomial(n, q), by enumeration, against 1 - (1 - q)^k."""
    n, k, q = 8, 4, 0.2
    weight = [math.comb(n, c) * q**c * (1 - q) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - q) ** k
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(weight)) == pytest.approx(truth, abs=1e-12)
    assert sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weight)) < truth - 0.02


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1), (4, 2, -1)])
def test_pass_at_k_refuses_impossible_counts_by_name(n, c, k):
    with pytest.raises(ValueError, match=r"[ck]=-?\d"):
        pass_at_k(n, c, k)


# ------------------------------------------------------------------------------------------------------------
# The evaluation of a policy


def test_distinct_correct_counts_right_answers_once_however_they_are_spaced():
    task = chain_task()
    texts = ["3 + 5 8", "3  + 5\n8", "5 + 3 8", "9 + 9 18", "5 + 3 8"]
    assert distinct_correct(task, texts, [True, True, True, False, True]) == 2
    assert distinct_correct(task, texts, [False] * 5) == 0
    assert distinct_correct(task, [], []) == 0


def scripted(monkeypatch, correct, lengths):
    """`answer` replaced by known results: correct[problem][sample]; NaN wherever the mask is False."""
    asked = []

    def fake(engine, task, problems, n, temperature, top_p, generator, entropy=False):
        assert entropy and isinstance(generator, torch.Generator)
        asked.append((len(problems), n, temperature))
        which = [int(p.prompt) for p in problems]
        right = torch.tensor([correct[w][j] for w in which for j in range(n)])
        length = torch.tensor([lengths[w][j] for w in which for j in range(n)])
        mask = torch.arange(9)[None] < length[:, None]
        nats = torch.where(
            mask, torch.tensor([float(w) for w in which]).repeat_interleave(n)[:, None], math.nan
        )
        zeros = torch.zeros(len(right), 9)
        texts = [f"{w} answer {j // 2}" for w in which for j in range(n)]
        return Rollout(
            [[1]] * len(problems), zeros.long(), mask, zeros, zeros[:, 0], ~right, nats, texts, right
        )

    monkeypatch.setattr(chapter, "answer", fake)
    problems = tuple(Problem(str(i), "a") for i in range(3))
    verify = lambda texts, problems: [True] * len(texts)  # noqa: E731
    return Task("scripted", problems, problems[:2], problems[2:], verify, lambda t: t, 9), asked


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_evaluate_is_right_on_known_results_however_it_is_batched(monkeypatch, rows):
    correct = [[True, False, False, True], [False] * 4, [True, True, True, True]]
    lengths = [[2, 9, 4, 1], [9, 9, 9, 9], [3, 3, 3, 3]]
    task, asked = scripted(monkeypatch, correct, lengths)
    got = evaluate(TorchEngine(torch.nn.Linear(1, 1), None), task, 4, 0.5, 1.0, 0, rows)
    assert got["pass@1"] == pytest.approx((2 / 4 + 0) / 2) and got["pass@k"] == pytest.approx(0.5)
    assert got["distinct_correct"] == pytest.approx((2 + 0) / 2)  # samples 0, 3 differ; 0, 1 would not
    assert got["eval_entropy"] == pytest.approx(
        36 / 52
    )  # token mean, not row mean: 16 tokens of 0, 36 of 1 nat
    assert got["eval_length"] == pytest.approx(52 / 8)
    assert (got["hard_pass@1"], got["hard_pass@k"], got["hard_distinct_correct"]) == (1.0, 1.0, 2.0)
    assert got["k"] == 4 and all(t == 0.5 and n == 4 for _, n, t in asked)
    assert sum(n for n, _, _ in asked) == 3
    assert [s["correct"] for s in got["samples"][:4]] == correct[0]
    assert set(got["samples"][0]) == {"prompt", "answer", "response", "correct", "truncated"}


def test_evaluate_repeats_with_its_seed_and_changes_nothing_else():
    tokenizer = tiny_tokenizer()
    model = TinyModel().build(tokenizer, 0).eval()
    engine = TorchEngine(model, tokenizer)
    before = torch.random.get_rng_state()
    a, b, c = (evaluate(engine, chain_task(8), 3, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert a == b and a["samples"] != c["samples"]
    assert a["eval_entropy"] == pytest.approx(math.log(106), abs=0.2)  # random weights: nearly uniform
    assert all(p.grad is None for p in model.parameters())


def test_evaluate_draws_from_held_out_problems_only():
    """No prompt of an evaluation is a training prompt."""
    seen = []
    tokenizer, task = tiny_tokenizer(), chain_task(16)
    real = task.verify
    object.__setattr__(task, "verify", lambda texts, p: seen.extend(p) or real(texts, p))
    try:
        evaluate(TorchEngine(TinyModel().build(tokenizer, 0).eval(), tokenizer), task, 2)
    finally:
        object.__setattr__(task, "verify", real)
    assert len(seen) == 2 * 16 * 2 and not set(seen) & set(task.train)


# ------------------------------------------------------------------------------------------------------------
# The picture and the table


def rows(n=6, shift=0.0, **extra):
    out = []
    for step in range(n):
        row = {"step": step, "seconds": 1.5}
        if step:
            row |= {"entropy": 0.6 - 0.05 * step + shift, "flow_up": 1e-3, "flow_down": 2e-3, "reward": 0.2}
        if step % 2 == 1:
            row |= {"dH_measured": -1e-3}
        if step in (0, n - 1):
            row |= {"pass@1": 0.2 + 0.1 * step, "pass@k": 0.9, "k": 8, "eval_entropy": 0.6 - 0.05 * step}
            row |= {"hard_pass@k": 0.5, "distinct_correct": 3.25}
        out.append(row | extra)
    return out


def test_series_and_smooth():
    data = [{"step": 1, "x": 1.0}, {"step": 2}, {"step": 3, "x": None}, {"step": 4, "x": 0.0}]
    assert series(data, "x") == ([1, 4], [1.0, 0.0])
    assert smooth([]) == [] and smooth([2.0, 2.0]) == [2.0, 2.0]
    assert smooth([0.0, 1.0], keep=0.75) == [0.0, 0.25]


@pytest.mark.parametrize("count", [1, 3, 5, len(STYLES) + 2])
def test_the_picture_is_a_png_for_any_number_of_methods(tmp_path, count):
    path = tmp_path / "made" / "entropy.png"
    draw({f"method {i}": rows(shift=i / 50) for i in range(count)}, path)
    data = path.read_bytes()
    assert data.startswith(PNG) and len(data) > 20_000
    assert [p.name for p in path.parent.iterdir()] == ["entropy.png"]


@pytest.mark.parametrize(
    "data",
    [
        [],
        [{"step": 0}],
        rows(1),
        [r | {"flow_up": math.nan, "dH_measured": math.inf} for r in rows()],
        [r | {"flow_up": None, "entropy": None} for r in rows()],
        [{k: v for k, v in r.items() if "flow" not in k and "dH" not in k} for r in rows()],
        [r | ({"flow_up": None, "flow_down": 1.0} if r["step"] == 3 else {}) for r in rows()],
    ],
)
def test_the_picture_survives_runs_that_stopped_early_or_diverged(tmp_path, data):
    draw({"short": data, "whole": rows()}, tmp_path / "entropy.png")
    assert (tmp_path / "entropy.png").read_bytes().startswith(PNG)


def test_styles_differ_in_colour_and_dash():
    assert len({c for c, _ in STYLES}) == len(STYLES) == len({str(d) for _, d in STYLES})


def test_the_table_shows_first_and_last_evaluation():
    text = table(
        {"grpo": rows(), "opefo:form=paper": rows(4), "not yet evaluated": [{"step": 0}], "nothing": []}
    )
    head, first, second = text.splitlines()
    assert "pass@8" in head and "hard pass@8" in head
    assert first.startswith("grpo ") and second.startswith("opefo:form=paper")
    assert "0.600 → 0.350" in first and "0.200 → 0.700" in first and "3.250 → 3.250" in first
    assert first.split()[-2:] == ["5", "9"] and "0.200 → 0.500" in second
    assert table({})  # a header at least
