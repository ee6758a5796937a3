"""Chapter 6: the estimators and their errors, diversity and calibration, comparing runs, the benchmarks, the
coloured tokens, and the command line."""

import csv
import io
import itertools
import json
import math
import os
import shutil
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eval as chapter
import rollout
from eval import (
    DRAWS,
    REPORTED,
    STYLES,
    calibration,
    calibration_error,
    common_length,
    comparison,
    confidences,
    distances,
    distinct_correct,
    distinct_n,
    draw,
    evaluate,
    find_records,
    forking,
    grouped,
    law_row,
    line,
    main,
    mean_se,
    means,
    measure,
    on_frontier,
    over_pairs,
    page,
    paired,
    pass_at_k,
    read_jsonl,
    read_record,
    resample,
    responses,
    rivals,
    shade,
    sweep_of,
    table,
    to_rows,
    without_frame,
)
from grpo import Tokens
from rollout import Problem, Sampling, Task, TinyModel, TorchEngine, chain_task, tiny_tokenizer

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

    def fake(engine, task, problems, how, generator):
        assert how.entropy and how.max_new_tokens == 9 and isinstance(generator, torch.Generator)
        n = how.n
        asked.append((len(problems), n, how.temperature))
        which = [int(p.prompt) for p in problems]
        right = torch.tensor([correct[w][j] for w in which for j in range(n)])
        length = torch.tensor([lengths[w][j] for w in which for j in range(n)])
        mask = torch.arange(9)[None] < length[:, None]
        nats = torch.where(
            mask, torch.tensor([float(w) for w in which]).repeat_interleave(n)[:, None], math.nan
        )
        zeros = torch.zeros(len(right), 9)
        texts = [f"{w} answer {j // 2}" for w in which for j in range(n)]
        out = Tokens(zeros.long(), mask, zeros, correct=right, truncated=~right, entropy=nats)
        return out, texts

    monkeypatch.setattr(chapter, "answer", fake)
    problems = tuple(Problem(str(i), "a") for i in range(3))
    verify = lambda texts, problems: [True] * len(texts)  # noqa: E731
    return Task(problems, problems[:2], problems[2:], verify, lambda t: t, 9), asked


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_evaluate_is_right_on_known_results_however_it_is_batched(monkeypatch, rows):
    monkeypatch.setattr(chapter, "ROWS", rows)
    correct = [[True, False, False, True], [False] * 4, [True, True, True, True]]
    lengths = [[2, 9, 4, 1], [9, 9, 9, 9], [3, 3, 3, 3]]
    task, asked = scripted(monkeypatch, correct, lengths)
    got = evaluate(TorchEngine(torch.nn.Linear(1, 1), None), task, 4, 0.5)
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
    assert [s["tokens"] for s in got["samples"][:4]] == lengths[0]
    assert set(got["samples"][0]) == {"prompt", "answer", "response", "correct", "truncated", "tokens"}


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


@pytest.mark.parametrize("count", [1, len(STYLES) + 2])
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


# ------------------------------------------------------------------------------------------------------------
# How sure one can be

floats = st.floats(-10, 10).map(lambda x: round(x, 3))


@given(st.lists(floats, min_size=2, max_size=9))
def test_eq_6_2_standard_error(values):
    mean, se = mean_se(values)
    assert mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert se == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-9)


def test_eq_6_2_one_value_has_no_error():
    assert mean_se([3.0])[0] == 3.0 and math.isnan(mean_se([3.0])[1])


def test_eq_6_2_covers_the_samples_noise():
    """The error over problems is right for the mean of pass@1 with problems and samples drawn anew."""
    rng, P, n = np.random.default_rng(0), 40, 4
    draws = [mean_se(rng.binomial(n, rng.beta(1, 2, P)) / n) for _ in range(2000)]
    true = np.std([m for m, _ in draws])
    assert math.sqrt(np.mean([se**2 for _, se in draws])) == pytest.approx(true, rel=0.05)


def test_eq_6_3_resamples_are_the_bootstrap_of_all_picks():
    """Three values: the 27 equally likely picks, by enumeration, have the resamples' distribution."""
    d = np.array([-1.0, 0.5, 4.0])
    weights = resample(3, 20_000, seed=1)
    assert np.allclose(weights[:, 0], 1 / 3) and np.allclose(weights.sum(0), 1)
    means = Counter(np.round(d @ weights[:, 1:], 6).tolist())
    exact = Counter(round(sum(p) / 3, 6) for p in itertools.product(d, repeat=3))
    assert set(means) == set(exact)
    for value, count in exact.items():
        assert means[value] / 20_000 == pytest.approx(count / 27, abs=0.012)


@given(st.lists(st.tuples(floats, floats), min_size=2, max_size=6), floats)
def test_eq_6_3_stays_within_the_differences_and_knows_pairs(pairs, shift):
    a, b = zip(*pairs)
    mean, low, high = paired(a, b, 200)
    d = [x - y for x, y in pairs]
    assert mean == pytest.approx(statistics.fmean(d), abs=1e-9)
    assert min(d) - 1e-9 <= low <= mean + 1e-9 and mean - 1e-9 <= high <= max(d) + 1e-9
    moved = paired([x + shift for x in a], [x + shift for x in b], 200)
    assert moved == pytest.approx((mean, low, high), abs=1e-9)


def test_eq_6_3_one_seed_has_no_interval():
    mean, low, high = paired([2.0], [0.5])
    assert mean == 1.5 and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize("n", [2, 3, 5, 7])
def test_eq_6_3_range_of_n_holds_the_median_as_often_as_claimed(n):
    """Each difference is above its median with probability 1/2: all sign patterns, by enumeration."""
    holds = [len(set(signs)) == 2 for signs in itertools.product((-1, 1), repeat=n)]
    assert sum(holds) / len(holds) == 1 - 2.0 ** (1 - n)


# ------------------------------------------------------------------------------------------------------------
# Diversity and calibration


def test_eq_6_4_distinct_n_by_hand():
    texts = [[1, 2, 3], [1, 2, 4]]
    assert distinct_n(texts, 1) == pytest.approx(4 / 6)
    assert distinct_n(texts, 2) == pytest.approx(3 / 4)  # (1 2) twice, (2 3), (2 4)
    assert distinct_n(texts, 3) == 1.0
    assert distinct_n([[7, 7, 7, 7]], 2) == pytest.approx(1 / 3)
    assert math.isnan(distinct_n(texts, 4))


def test_eq_6_6_calibration_error_by_hand():
    # two groups: confidence .25 with 1 of 4 right (error 0), confidence .75 with 0 of 4 right (error .75)
    confidence, right = [0.25] * 4 + [0.75] * 4, [True, False, False, False] + [False] * 4
    assert calibration(confidence, right, 2) == [(0.25, 0.25, 4), (0.75, 0.0, 4)]
    assert calibration_error(confidence, right, 2) == pytest.approx(0.375)
    assert calibration_error([1.0, 0.0], [True, False]) == 0.0
    assert calibration_error([1.0, 0.0], [False, True]) == 1.0


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.4, 0.5, 0.9]), st.booleans()), min_size=1, max_size=40))
def test_eq_6_6_does_not_depend_on_the_order_of_the_data(pairs):
    error = calibration_error(*zip(*pairs))
    assert error == pytest.approx(calibration_error(*zip(*sorted(pairs))))
    groups = calibration(*zip(*pairs))
    assert sum(n for *_, n in groups) == len(pairs) and len(groups) <= 10
    overall = statistics.fmean(r for _, r in pairs) - statistics.fmean(c for c, _ in pairs)
    assert abs(overall) - 1e-9 <= error <= 1.0


@given(st.lists(st.floats(0, 5), min_size=1, max_size=60))
def test_eq_6_7_forks_are_the_top_fifth(nats):
    values, cut = np.array(nats), forking(np.array(nats))
    assert (values > cut).sum() < math.ceil(0.2 * len(nats)) <= (values >= cut).sum()


def sample(problem, j, ids, correct=False, text=None, nats=None, logp=-1.0, truncated=False):
    text = " ".join(map(str, ids)) if text is None else text
    nats = [0.5] * len(ids) if nats is None else nats
    row = {"problem": problem, "sample": j, "correct": correct, "truncated": truncated, "logp": logp}
    return row | {"ids": ids, "nats": nats, "text": text}


def test_measure_by_hand():
    samples = pd.DataFrame([
        sample(0, 0, [1, 2], True, nats=[1.0, 0.0]), sample(0, 1, [1, 2], True), sample(0, 2, [1, 3], True),
        sample(1, 0, [1, 2, 3, 4]), sample(1, 1, [5, 6], truncated=True), sample(1, 2, [5, 6], True),
    ])  # fmt: skip
    got = measure(samples, 2, str, str) | measure(samples, 3, str, str)
    assert got["pass@1"] == pytest.approx((1 + 1 / 3) / 2) and "pass@8" not in got
    assert got["pass@2"] == pytest.approx((1 + 2 / 3) / 2)
    assert (got["pass@3"], got["pass@3 se"]) == (1.0, 0.0)
    assert (got["distinct_correct"], got["distinct_correct se"]) == pytest.approx((1.5, 0.5))
    assert (got["length"], got["length se"]) == pytest.approx((14 / 6, 1 / 3))
    assert got["truncated"] == pytest.approx(1 / 6)
    assert got["entropy"] == pytest.approx((1.0 + 0.0 + 12 * 0.5) / 14)  # token mean
    assert got["common_length"] == common_length(samples) == 2
    assert got["distinct-1"] == pytest.approx((3 / 6 + 4 / 6) / 2)  # of the first two tokens


def test_confidence_is_the_share_of_the_most_frequent_answer_and_the_mean_likelihood():
    samples = [sample(0, j, [1, 2], t == "a", t, logp=-2.0) for j, t in enumerate("aab")]
    samples += [sample(1, j, [1], t == "a", t, logp=-1.0) for j, t in enumerate("bcb")]
    got = confidences(pd.DataFrame(samples), str)
    assert got["vote"] == ([2 / 3, 2 / 3], [True, False])
    assert got["likelihood"][0] == pytest.approx([math.exp(-1)] * 6)
    assert "vote" not in confidences(pd.DataFrame(samples[::3]), str)  # one sample agrees with itself
    silent = [sample(j // 3, j, [1], text=t) for j, t in enumerate(["", "", "a", "", ""])]
    assert confidences(pd.DataFrame(silent), str)["vote"] == ([1 / 3, 0.0], [False, False])
    assert got["likelihood"][1] == [True, True, False, False, False, False]


# ------------------------------------------------------------------------------------------------------------
# Runs on disk: random weights, invented logs


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer()
    TinyModel(num_hidden_layers=1).build(tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SETTINGS = {"method": "grpo", "steps": 20, "seed": 0, "lr": 3e-4, "threads": 1, "eval_samples": 8}


def make_run(folder, spec="grpo", seed=0, right=(4, 2, 0), hard=(1, 0, 0), checkpoint=None, **settings):
    """A run with evaluations at steps 0, 10, 20; at the last one `right` of 8 samples of each problem."""
    folder.mkdir(parents=True)
    settings = SETTINGS | settings | {"method": spec, "seed": seed}
    (folder / "config.json").write_text(json.dumps({"specs": [spec], "settings": settings, "task": "chain"}))
    rows = []
    for step in range(0, settings["steps"] + 1):
        row = {"step": step, "entropy": 0.7 - 0.01 * step, "reward": 0.5 - 0.1 * math.exp(0.7 - 0.01 * step)}
        if step % 10 == 0:
            row |= {"k": 8, "eval_entropy": 0.7 - 0.01 * step, "distinct_correct": 2.0 + seed}
            for prefix, counts in (("", right), ("hard_", hard)):
                counts = [min(c, 2 + step // 3) for c in counts]
                row[f"{prefix}right"] = counts
                row[f"{prefix}pass@1"] = statistics.fmean(c / 8 for c in counts)
                row[f"{prefix}pass@k"] = statistics.fmean(float(c > 0) for c in counts)
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if checkpoint:
        shutil.copytree(checkpoint, folder / "checkpoint")
    return folder


@pytest.fixture()
def cli(tmp_path, monkeypatch, capsys):
    """The command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(*argv):
        capsys.readouterr()
        try:
            code = main([str(a) for a in argv])
        except SystemExit as leave:  # argparse
            code = leave.code
        return code, *capsys.readouterr()

    return call


def complains(result, *words):
    """Exit code 2; one or two lines on stderr that hold the words; nothing on stdout."""
    code, out, err = result
    err = "\n".join(line for line in err.splitlines() if not line.startswith("skipped"))
    assert code == 2 and out == "", (code, out, err)
    assert 1 <= len(err.splitlines()) <= 2, err
    for word in words:
        assert str(word) in err, f"{word!r} is not in {err!r}"


def test_evaluate_and_stored_samples_tell_the_same(tmp_path, checkpoint):
    record = read_record(make_run(tmp_path / "run", checkpoint=checkpoint))
    task, engine = chapter.reopen(record, chapter.Options())
    told = evaluate(engine, task, 4, 0.9, 0.95, seed=3)
    how = Sampling(4, task.max_new_tokens, 0.9, 0.95, entropy=True)
    parts = responses(engine, task, task.test, how, torch.Generator().manual_seed(3))
    samples = pd.DataFrame([row for part in parts for row in to_rows(*part, 4)])
    got = measure(samples, 4, task.signature, task.signature)
    assert samples.groupby("problem")["correct"].sum().tolist() == told["right"]
    pairs = {"pass@1": "pass@1", "pass@k": "pass@4", "distinct_correct": "distinct_correct"}
    for old, new in (pairs | {"eval_entropy": "entropy", "eval_length": "length"}).items():
        assert got[new] == pytest.approx(told[old], abs=1e-4)


def test_evaluate_counts_right_samples_problem_by_problem(monkeypatch):
    task, _ = scripted(monkeypatch, [[True, False], [True, True], [False, False]], [[1, 1]] * 3)
    got = evaluate(TorchEngine(torch.nn.Linear(1, 1), None), task, 2)
    assert (got["right"], got["hard_right"]) == ([1, 2], [0])
    alone = evaluate(TorchEngine(torch.nn.Linear(1, 1), None), Task(**vars(task) | {"hard": ()}), 2)
    assert not any("hard" in key for key in alone) and alone["right"] == [1, 2]


# ------------------------------------------------------------------------------------------------------------
# Comparing runs


def test_runs_are_found_in_comparisons_and_others_are_named_and_skipped(tmp_path):
    make_run(tmp_path / "both" / "grpo")
    make_run(tmp_path / "both" / "opefo", "opefo")
    make_run(tmp_path / "alone", "steer", seed=1)
    make_run(tmp_path / "twin", "steer", seed=1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "eval.json").write_text("{}")
    records, notes = find_records(sorted(map(str, tmp_path.iterdir())))
    assert [r.spec for r in records] == ["steer", "grpo", "opefo"]
    assert len(notes) == 3 and all(any(x in n for n in notes) for x in ("notes", "torn", "twin"))
    with pytest.raises(ValueError, match="no run is left.*notes"):
        find_records([str(tmp_path / "notes")])


def test_a_log_cut_short_by_a_kill_is_read_and_other_damage_is_named(tmp_path):
    folder = make_run(tmp_path / "a")
    path = folder / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 21, "ent')
    assert len(read_record(folder).rows) == 21
    assert read_jsonl(path)[-1] == json.loads(whole.splitlines()[-1])
    path.write_text("{broken\n" + whole)
    with pytest.raises(ValueError, match="line 1"):
        read_record(folder)


def test_groups_are_methods_and_their_settings_not_seeds(tmp_path):
    for i, (spec, seed, lr) in enumerate(
        [
            ("grpo", 0, 3e-4),
            ("grpo", 1, 3e-4),
            ("grpo", 0, 1e-4),
            ("grpo:lr=1e-3", 0, 1e-3),
            ("opefo", 0, 3e-4),
        ]
    ):
        make_run(tmp_path / str(i), spec, seed, lr=lr, threads=i)
    groups = grouped(find_records([str(tmp_path / str(i)) for i in range(5)])[0])
    sizes = {label: len(g) for label, g in groups.items()}
    assert sizes == {"grpo [lr=0.0003]": 2, "grpo [lr=0.0001]": 1, "grpo:lr=1e-3": 1, "opefo": 1}
    assert sweep_of(groups, "opefo") == ["grpo [lr=0.0003]", "grpo [lr=0.0001]", "grpo:lr=1e-3"]
    assert rivals(groups, "opefo")[0] == "grpo [lr=0.0003]", "first the one of the same learning rate"
    assert sweep_of(groups, "grpo:lr=1e-3") == [] and rivals(groups, "grpo [lr=0.0003]") == []


def test_eq_6_3_comparison_pairs_seeds_and_is_right_by_hand(tmp_path):
    for seed, (ours, theirs) in enumerate([((4, 4), (2, 2)), ((8, 4), (4, 0)), ((8, 8), (8, 8))]):
        make_run(tmp_path / f"a{seed}", "opefo", seed, ours)
        make_run(tmp_path / f"b{seed}", "grpo", seed, theirs)
    make_run(tmp_path / "c", "grpo:lr=1e-4", 2, (2, 2), lr=1e-4)
    make_run(tmp_path / "d", "steer", 7, (2, 2))
    make_run(tmp_path / "e", "opefo", 9, (2, 2), steps=30)
    rows = comparison(grouped(find_records([str(p) for p in tmp_path.iterdir()])[0]))
    by = {r["method"]: r for r in rows}
    one = by["opefo [steps=20]"]
    assert (one["seeds"], one["pairs"], one["against"]) == (3, 3, "grpo")
    assert one["pass@1"] == pytest.approx((0.5 + 0.75 + 1) / 3)
    assert one["pass@1 diff"] == pytest.approx((0.25 + 0.5 + 0) / 3)
    assert (one["pass@1 low"], one["pass@1 high"]) == pytest.approx((0.0, 0.5))
    assert by["grpo:lr=1e-4"]["pass@1 diff"] == pytest.approx(0.25 - 1.0)  # seed 2 with seed 2
    assert by["steer"]["pairs"] == 0 and "pass@1 diff" not in by["steer"]
    assert by["opefo [steps=30]"]["against"] is None  # three times 10 steps are another question
    assert by["grpo"]["against"] is None


@given(st.dictionaries(st.integers(0, 99), st.floats(0, 1), min_size=1, max_size=7), st.floats(-10, 110))
def test_eq_6_8_line_is_piecewise_linear_and_constant_beyond_its_ends(points, x):
    """In every column of its own, whatever the order of the points."""
    px, py = np.array(list(points.items()), dtype=float).T[:, :, None]
    px, py = np.hstack([px, px[::-1]]), np.hstack([py, 1 - py[::-1]])
    want = [np.interp(x, a[np.argsort(a)], b[np.argsort(a)]) for a, b in zip(px.T, py.T)]
    assert line(px, py, np.array([x, x])) == pytest.approx(want, abs=1e-9)


def test_eq_6_8_what_lies_between_two_policies_is_within_reach():
    """The coin of the docstring, by enumeration: pass@1 and pass@k of the mixture lie on the line."""
    q, w, k = ((0.9, 0.0, 0.0), (0.2, 0.3, 0.1)), 0.25, 4  # two policies, three problems
    share = [w, 1 - w]
    single = [np.mean(p) for p in q]
    several = [np.mean([1 - (1 - x) ** k for x in p]) for p in q]
    mixed = np.mean([sum(s * (1 - (1 - p[i]) ** k) for s, p in zip(share, q)) for i in range(3)])
    x = np.dot(share, single)
    assert line(*np.array([single, several])[:, :, None], np.array([x]))[0] == pytest.approx(mixed)


def policy(x, y):
    """pair -> means, from pass@1 and pass@k of each pair and problem."""
    return {s: means(np.array(both, dtype=float)) for s, both in enumerate(zip(x, y))}


def test_eq_6_9_distance_by_hand():
    a = policy([[0.0, 0.2], [0.2, 0.4]], [[0.6, 0.8], [0.6, 0.8]])  # means (.1, .7) and (.3, .7)
    b = policy([[0.5, 0.7], [0.5, 0.7]], [[0.9, 0.9], [0.9, 0.9]])  # (.6, .9) in both pairs
    bad = policy([[0.3, 0.3], [0.3, 0.3]], [[0.1, 0.1], [0.1, 0.1]])  # b is better in both
    q = policy([[0.3, 0.5], [0.3, 0.5]], [[0.95, 0.95], [0.95, 0.95]])  # .4
    assert on_frontier({"a": a, "bad": bad, "b": b}) == ["b"]  # a as well: both are below b
    c = policy([[0.1, 0.1], [0.3, 0.3]], [[1.0, 1.0], [1.0, 1.0]])
    d = distances(q, {"c": c, "bad": bad, "b": b})
    assert d.shape == (2, 1 + DRAWS) and on_frontier({"c": c, "b": b, "bad": bad}) == ["c", "b"]
    assert d[:, 0] == pytest.approx(
        [0.95 - (1 - 0.1 * 3 / 5), 0.95 - (1 - 0.1 * 1 / 3)]
    )  # .3 of .5, .1 of .3
    mean, low, high = over_pairs(d)
    assert mean == pytest.approx(d[:, 0].mean()) and low < mean < high
    beyond = distances(policy([[0.9, 0.9]], [[0.8, 0.8]]), {"c": c, "b": b})
    assert beyond[0, 0] == pytest.approx(0.8 - 0.9), "constant beyond the last point"
    assert over_pairs(beyond)[0] == pytest.approx(-0.1) and math.isnan(over_pairs(beyond)[1])
    assert len(distances({9: q[0]}, {"c": c, "b": b})) == 0 and math.isnan(over_pairs(np.empty((0, 1001)))[0])


def test_eq_6_9_a_method_that_is_grpo_is_on_its_line():
    """Paired resampling: the same samples as the line's own give exactly 0 in every resample."""
    rng = np.random.default_rng(0)
    x = [rng.random(20) for _ in range(3)]
    twin, low = policy(x, [1 - v for v in x]), policy([v * 0.5 for v in x], [1 - v * 0.5 for v in x])
    d = distances(twin, {"grpo": twin, "low": low})
    assert np.abs(d).max() < 1e-12 and over_pairs(d) == pytest.approx((0, 0, 0), abs=1e-12)


def test_eq_6_9_interval_covers_the_truth_as_often_as_its_bootstrap_can():
    """40 problems, 8 seeds, a method 0.05 above the line between two known points."""
    rng, hits = np.random.default_rng(0), []
    for _ in range(60):
        base = rng.beta(2, 2, 40)

        def noisy(x, base=base):
            return [np.clip(base * x, 0, 1) + rng.normal(0, 0.1, 40) for _ in range(8)]

        a, b = (
            policy(noisy(0.4), [1 - v for v in noisy(0.2)]),
            policy(noisy(0.8), [1 - v for v in noisy(0.4)]),
        )
        q = policy(noisy(0.6), [1.05 - v for v in noisy(0.3)])
        _, low, high = over_pairs(distances(q, {"a": a, "b": b}))
        hits.append(low <= 0.05 <= high)
    assert 0.85 <= np.mean(hits) <= 1.0


def test_law_recovers_a_and_b_and_predicts_the_rest():
    H = np.linspace(1.0, 0.2, 40)
    row = law_row(H, 0.9 - 0.2 * np.exp(H))
    assert (row["a"], row["b"], row["fitted"], row["predicted"]) == pytest.approx((0.2, 0.9, 6, 34))
    assert row["R2 of the rest"] == pytest.approx(1) and row["largest error"] < 1e-9
    bent = np.where(np.arange(40) < 6, 0.9 - 0.2 * np.exp(H), 0.5)  # then the score stops moving
    bent[-1] = 0.6
    broken = law_row(H, bent)
    assert broken["R2 of the rest"] < 0 and broken["last error"] == pytest.approx(
        0.9 - 0.2 * math.exp(0.2) - 0.6
    )
    assert broken["largest error"] == pytest.approx(np.abs(0.9 - 0.2 * np.exp(H) - bent)[6:].max())
    assert "2 points" in law_row([1.0, 0.9], [0.1, 0.2])["why"]
    assert "constant" in law_row(H, [0.5] * 40)["why"]


# ------------------------------------------------------------------------------------------------------------
# The command line on runs


def test_one_run_gives_its_log_and_fresh_samples(cli, tmp_path, checkpoint):
    run = make_run(tmp_path / "runs" / "opefo-s0", "opefo", checkpoint=checkpoint)
    code, out, err = cli(run, "--k", 4, "--temperature", 0.8, "--top-p", 0.9, "--seed", 5)
    assert code == 0, err
    for word in (
        "4 per problem",
        "temperature 0.8",
        "top-p 0.9",
        "seed 5",
        "pass@4",
        "distinct-3",
        "ece vote",
    ):
        assert word in out
    assert "tokens drawn most often at forks" in out and "0.167 → 0.250" in out
    made = {p.name for p in (run / "eval").iterdir()}
    assert len(made) == 4 and made > {"eval.json", "samples.csv", "samples.png"}
    assert (run / "eval" / "samples.png").read_bytes().startswith(PNG)
    assert cli(run, "--k", 4, "--temperature", 0.8, "--top-p", 0.9, "--seed", 5)[1] == out  # repeats


def test_many_runs_give_the_comparison_and_the_frontier_from_the_logs_alone(cli, tmp_path):
    for seed in (0, 1, 2):
        make_run(tmp_path / f"g{seed}", "grpo", seed, (6, 4, 0))
        make_run(tmp_path / f"l{seed}", "grpo:lr=1e-4", seed, (3, 3, 1 + seed % 2), lr=1e-4)
        make_run(tmp_path / f"o{seed}", "opefo", seed, (5, 3, 1))
    make_run(tmp_path / "s0", "steer", 0, (5, 3, 2), eval_samples=8)
    code, out, err = cli(*sorted(tmp_path.iterdir()))
    assert code == 0, err
    assert "± " in out and "3 pairs: an interval" in out and "probability 0.75 at most" in out and "D1" in out
    folder = tmp_path / "runs" / "compare"
    assert {p.name for p in folder.iterdir()} == {
        "eval.json",
        "comparison.csv",
        "frontier.png",
        "frontier.csv",
    }
    assert (folder / "frontier.png").read_bytes().startswith(PNG)
    told = list(csv.DictReader(open(folder / "frontier.csv")))
    last = [r for r in told if r["method"] == "opefo" and "held-out" in r["problems"] and r["at"] == "20"]
    assert float(last[0]["pass@k"]) == 1.0 and last[0]["k"] == "8" and last[0]["pairs"] == "3"
    several = cli(*sorted(tmp_path.iterdir()), "--k", 4)
    assert several[0] == 0 and "pass@4 above" in several[1]  # from the counts in the logs
    assert cli(*sorted(tmp_path.iterdir()))[0] == 0  # its own folder is recognised and may be written again


def test_runs_of_two_tasks_are_compared_apart(cli, tmp_path):
    """One has hard problems, the other has none, and their numbers of problems differ."""
    for i, (data, right) in enumerate([("", (4, 2, 0)), ("data/chain.jsonl", (4, 2))]):
        for spec in ("grpo", "grpo:lr=1e-4", "opefo"):
            lr = {"lr": 1e-4} if "lr" in spec else {}
            make_run(tmp_path / f"{i}{spec[:6]}", spec, right=right, data=data, **lr)
            if data:
                path = tmp_path / f"{i}{spec[:6]}" / "metrics.jsonl"
                rows = [json.loads(x) for x in path.read_text().splitlines()]
                rows = [{k: v for k, v in r.items() if "hard" not in k} for r in rows]
                path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, out, err = cli(*sorted(tmp_path.iterdir()), "--out", "cmp")
    assert code == 0, err
    assert "== the embedded task: 3 of 6 runs" in out and "== data/chain.jsonl: 3 of 6 runs" in out
    assert "[data=" not in out
    tables = (tmp_path / "cmp").glob("*/frontier.csv")
    told = {p.parent.name: list(csv.DictReader(open(p))) for p in tables}
    assert {x: {r["problems"] for r in rows} for x, rows in told.items()} == {
        "1-embedded": {"held-out problems, along training", "hard problems, along training"},
        "2-chain.jsonl": {"held-out problems, along training"},
    }  # fmt: skip


def test_test_temperatures_are_sampled_once_and_reused_after_a_kill(cli, tmp_path, checkpoint, monkeypatch):
    make_run(tmp_path / "a", "grpo", 0, checkpoint=checkpoint)
    make_run(tmp_path / "b", "opefo", 0, checkpoint=checkpoint)
    asked, real = [], chapter.answer
    spy = lambda *a: (asked.append(a[3].temperature), real(*a))[1]  # noqa: E731
    monkeypatch.setattr(chapter, "answer", spy)
    runs = ("a", "b", "--k", 2, "--out", "cmp", "--temperatures")
    code, out, err = cli(*runs, 0.5, 1)
    assert code == 0 and asked == [0.5, 0.5, 1.0, 1.0] * 2, err  # two sets of problems
    assert "test temperatures" in out and "D1" in out
    store = next((tmp_path / "cmp" / "a").glob("test*.jsonl"))
    store.write_bytes(store.read_bytes()[:-20])  # killed while writing
    asked.clear()
    assert cli(*runs, 0.5, 1)[:2] == (0, out) and len(asked) == 1
    assert cli(*runs, 0.5, 1, 1.2)[0] == 0 and asked[1:] == [1.2] * 4
    assert "1 pair: no interval" in out
    make_run(tmp_path / "c", "grpo", 1)
    code, out, err = cli("a", "c", "--out", "same", "--temperatures", 0.5)  # one method has no frontier
    assert code == 0 and "nothing is sampled" in out and len(asked) == 5, err


def test_runs_of_different_k_are_compared_at_the_smaller(cli, tmp_path):
    """(6.1) gives pass@4 of eight samples, of which the number of different answers says nothing of four."""
    make_run(tmp_path / "a", "grpo")
    path = make_run(tmp_path / "b", "opefo") / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if "k" in row:
            row |= {"k": 4, "right": [min(c, 4) for c in row["right"]], "pass@k": 0.25}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (grpo, opefo) = comparison(grouped(find_records([str(tmp_path)])[0]))
    assert grpo["pass@k"] == pytest.approx(np.mean([pass_at_k(8, c, 4) for c in (4, 2, 0)]))
    assert opefo["pass@k"] == 0.25 and math.isnan(grpo["distinct_correct"]) and opefo["distinct_correct"] == 2
    assert opefo["pass@k diff"] == pytest.approx(0.25 - grpo["pass@k"])
    code, out, _ = cli(str(tmp_path))
    assert code == 0 and "pass@4" in out and "pass@8" not in out


def test_two_at_once_draw_no_sample_twice(tmp_path, checkpoint):
    """The second waits for the first, then finds its samples."""
    task, engine, drawn = chain_task(2), TorchEngine(*rollout.load_model(str(checkpoint))), []

    def ask():
        drawn.append(1)
        time.sleep(0.3)
        return engine, task, task.test

    how = {"samples": 4, "batch": 4, "max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    with ThreadPoolExecutor(2) as pool:
        work = [pool.submit(chapter.sampled, tmp_path / "x", "test", task.test, how, ask) for _ in range(2)]
        one, other = (x.result() for x in work)
    assert len(drawn) == 1 and one.equals(other) and len(one) == 8


def test_an_embedded_run_is_sampled_on_its_own_problems(tmp_path, checkpoint):
    run = make_run(tmp_path / "a", checkpoint=checkpoint, eval_problems=5)
    assert chapter.reopen(read_record(run), chapter.Options())[0].test == chain_task(5).test


def test_law_on_the_command_line(cli, tmp_path):
    make_run(tmp_path / "a", steps=60)
    code, out, err = cli("--law", "a", "--out", "law")
    assert code == 0 and "training batch" in out, err
    assert {p.name for p in (tmp_path / "law").iterdir()} == {
        "eval.json",
        "law.png",
        "law.csv",
    }
    row = (tmp_path / "law" / "law.csv").read_text().splitlines()[2].split(",")
    assert row[1] == "training batch" and float(row[4]) == pytest.approx(0.1, abs=1e-5)  # a of make_run


@pytest.mark.parametrize(
    "argv, words",
    [
        (["nowhere"], ["nowhere", "no run"]),
        (["a", "--k", "-1"], ["--k -1", "too small"]),
        (["a", "--k", "9", "--samples", "8"], ["--k 9", "--samples 8"]),
        (["a", "--temperature", "0"], ["--temperature 0", "between"]),
        (["a", "--top-p", "1.5"], ["--top-p 1.5"]),
        (["a", "--seed", "-1"], ["--seed -1"]),
        (["a", "--tempratures", ".5"], ["--tempratures", "did you mean --temperatures?"]),
        (["a", "--k", "many"], ["--k", "many"]),
        (["a", "--out", "."], ["--out .", "another folder"]),
        (["a", "--out", "a/config.json"], ["--out", "another folder"]),
        (["a", "b", "--k", "64"], ["--k 64", "pass@8"]),
        (["a", "b", "--show"], ["--show", "2 runs"]),
        (["--law"], ["no run named"]),
        (["a"], ["no checkpoint/"]),
        (["c"], ["no checkpoint/"]),
        (["--model", "m", "--benchmark", "x", "--data", "x=pairs"], ["--data x=pairs", "evaluate a run"]),
        (["a", "--show", "--attention", "fast"], ["--attention", "fast", "eager"]),
        (["--benchmark", "aime24"], ["--benchmark", "--model"]),
        (["--model", "m"], ["--model", "--benchmark"]),
        (["a", "--model", "m", "--benchmark", "aime24"], ["--model", "no runs"]),
        (["--model", "m", "--benchmark", "aime24", "--template", "Q:"], ["--template 'Q:'", "{problem}"]),
        (["--model", "m", "--benchmark", "aime24x"], ["aime24x", "did you mean aime24?"]),
        (["--model", "m", "--benchmark", "aime24"], ["aime24", "--data aime24=FILE.jsonl"]),
        (["--model", "m", "--benchmark", "x", "--data", "x"], ["--data x", "NAME=FILE"]),
        (["--model", "m", "--benchmark", "x", "--data", "x=y", "z=w"], ["--data z", "--benchmark"]),
        (["--model", "m", "--benchmark", "x", "--data", "x=no.jsonl"], ["no.jsonl", "no such file"]),
        (["--model", "m", "--benchmark", "x", "--data", "x=empty.jsonl"], ["empty.jsonl", "no usable row"]),
        (["--model", "m", "--benchmark", "x", "--data", "x=bad.jsonl"], ["bad.jsonl", "line 2", "line 3"]),
        (["--model", "a", "--benchmark", "x", "--data", "x=good.jsonl"], ["--model a"]),
        (["--model", "no/such/id", "--benchmark", "x", "--data", "x=good.jsonl"], ["--model no/such/id"]),
        (["--model", "m", "--benchmark", "aime24", "--against", "opfo"], ["opfo", "steer"]),
        (["a", "--engine", "vllm"], ["--engine vllm", "checkpoint/"]),
        (["a", "--device", "toaster"], []),
    ],
)
def test_bad_input_ends_in_one_or_two_lines(cli, tmp_path, monkeypatch, argv, words):
    monkeypatch.delenv("ENTROPY_FLOW_DATA", raising=False)
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", seed=1)
    make_run(tmp_path / "c", seed=2, model="m", data="chain")  # its name does not make it the embedded task
    good = '{"problem": "a", "answer": "1"}\n'
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text(good + '{"problem": "b"}\n{nope\n')
    result = cli(*argv)
    if argv in (["a"], ["c"]):  # the log could be shown before
        result = result[0], "", result[2]
    if words:
        complains(result, *words)
    else:
        assert result[0] == 2


def test_help_teaches_and_no_arguments_demonstrate(cli):
    code, out, _ = cli("--help")
    assert code == 0 and "runs/opefo-s0 " in out and "--temperatures" in out
    code, out, _ = cli()
    assert code == 0 and "truth 0.570" in out
    assert out.count("(6.1) 0.570") == 4  # unbiased at every n


# ------------------------------------------------------------------------------------------------------------
# Tokens in colour

ROWS = [{"prompt": "1 <b>", "reward": 1.0, "tokens": ["<i>&", "\x1b[2J", "x"], "flow": [0.5, -1.0, 0.0]}]


def test_red_raises_blue_lowers():
    (r, g, b), (r2, g2, b2), none = (shade(f, 1.0) for f in (1.0, -1.0, 0.0))
    assert r > g == b and b2 > r2 == g2 and none == (255, 255, 255)
    assert shade(0.25, 1.0)[1] > shade(0.5, 1.0)[1] > shade(1.0, 1.0)[1]  # paler where less


def test_page_escapes_what_models_write():
    text = page(ROWS, 1.0, "what & why")
    assert (
        "<i>" not in text and "&lt;i&gt;&amp;" in text and "1 &lt;b&gt;" in text and "what &amp; why" in text
    )
    assert "\x1b" not in text and "http" not in text  # self-contained
    assert 'title="-1"' in text


@pytest.mark.parametrize(
    "prompts, left",
    [
        (["sys\nuser\n1 + 1?\nassistant\n", "sys\nuser\n2 + 1?\nassistant\n"], ["1 + 1?", "2 + 1?"]),
        (["2 5 -> 7:", "2 6 -> 8:"], ["2 5 -> 7:", "2 6 -> 8:"]),
        (["a\nb", "a\nb"], ["a\nb", "a\nb"]),
        (["a", "a\nb", ""], ["a", "a\nb", ""]),
        ([], []),
    ],
)
def test_a_page_leaves_out_the_lines_that_all_prompts_share(prompts, left):
    assert without_frame(prompts) == left


def test_show_from_the_log_and_from_the_checkpoint(cli, tmp_path, checkpoint, monkeypatch):
    run = make_run(tmp_path / "a", checkpoint=checkpoint)
    flow = {"step": 3, "prompt": "1 2 3 4 -> 10", "reward": 1.0, "tokens": ["1", "+"], "flow": [0.1, 0.2]}
    rows = [flow | {"network_flow": [9.0, 9.0], "step": 2}, flow | {"network_flow": [0.5, -1.0]}]
    (run / "flows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, out, err = cli("--show", run)
    assert code == 0 and "step 3" in out and "+ -100  1 +50" in out and "\x1b" not in out, err
    assert (run / "eval" / "flow.html").read_text().count("<span title") == 2
    with open(run / "flows.jsonl", "a") as file:  # as it was written once, of a token without a name
        file.write(json.dumps(rows[1] | {"step": 4, "tokens": [None, "+"]}) + "\n")
    code, out, err = cli("--show", run)
    assert code == 0 and "+ -100  <?> +50" in out, err
    (run / "flows.jsonl").unlink()
    solved = lambda texts, problems: [i % 2 == 0 for i in range(len(texts))]  # noqa: E731
    monkeypatch.setattr(chapter, "chain_task", lambda n: Task(**vars(chain_task(n)) | {"verify": solved}))
    code, out, err = cli("--show", run)
    assert code == 0 and "fresh batch" in out and out.count("   reward ") == 8, err


# ------------------------------------------------------------------------------------------------------------
# Benchmarks

DATA = Path(os.environ.get("ENTROPY_FLOW_DATA", "nowhere"))
SIX = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench")


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    """A tiny model that reads and writes printable characters."""
    import string

    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<eos>", *sorted(string.printable)]
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, [], unk_token="<pad>"))
    core.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "padding_side": "left"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    folder = tmp_path_factory.mktemp("reader")
    model = TinyModel(num_hidden_layers=1).build(tokenizer, 0)
    model.config.max_position_embeddings = 8192
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture()
def quick_grader(monkeypatch):
    """Right is what has an even number of characters: grading itself is tested in chapter 2."""

    class Even:
        def grade_all(self, texts, answers):
            return [len(t) % 2 == 0 for t in texts]

    monkeypatch.setattr(rollout, "shared_grader", Even)


@pytest.fixture()
def bench(cli, tmp_path, reader, quick_grader):
    rows = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(5)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = ["--model", reader, "--benchmark", "sums", "--data", "sums=sums.jsonl", "--k", 2]
    base += ["--max-new-tokens", 6, "--batch", 4, "--out", "out"]
    return lambda *more: cli(*base, *more)


def stored(tmp_path):
    (path,) = (tmp_path / "out").glob("*/sums-*.jsonl")
    return path


def test_benchmark_stores_every_sample_and_computes_again_without_the_model(bench, tmp_path, monkeypatch):
    code, out, err = bench()
    assert code == 0, err
    assert "temperature 1, top-p 1" in out and "5 x 2" in out and "pass@2" in out and "±" in out
    rows = [json.loads(line) for line in stored(tmp_path).read_text().splitlines()]
    assert [(r["problem"], r["sample"]) for r in rows] == [divmod(i, 2) for i in range(10)]
    assert all(r["correct"] == (len(r["text"]) % 2 == 0) for r in rows)
    assert all(len(r["ids"]) == len(r["nats"]) <= 6 for r in rows)
    settings = json.loads(stored(tmp_path).with_suffix(".json").read_text())
    assert (settings["temperature"], settings["top_p"], settings["samples"]) == (1.0, 1.0, 2)
    monkeypatch.setattr(chapter, "open_engine", None)  # a call would raise
    assert bench()[:2] == (0, out)
    solved = [sum(r["correct"] for r in rows[i : i + 2]) for i in range(0, 10, 2)]
    mean, se = mean_se([100 * c / 2 for c in solved])
    assert f"{mean:.1f} ± {se:.1f}" in out


@pytest.mark.parametrize("cut", [1, 0.5, -1])
def test_a_killed_benchmark_goes_on_to_the_same_samples(bench, tmp_path, cut):
    bench()
    path = stored(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * cut) if cut == 0.5 else cut])
    assert bench()[0] == 0 and path.read_bytes() == whole


def test_a_kill_loses_at_most_one_batch(bench, tmp_path, monkeypatch):
    real, calls = rollout.TorchEngine.sample, []

    def dies(self, prompts, *args, **kwargs):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, prompts, *args, **kwargs)

    monkeypatch.setattr(rollout, "_check_policy", lambda *_: None)  # which samples too
    monkeypatch.setattr(rollout.TorchEngine, "sample", dies)
    assert bench()[0] == 130 and len(stored(tmp_path).read_text().splitlines()) == 8
    assert bench()[0] == 0 and calls == [2, 2, 1, 1]  # only the last batch again


def test_other_settings_are_other_samples(bench, tmp_path):
    """Beside the first, which stay as they are."""
    bench()
    first, before = stored(tmp_path), stored(tmp_path).read_bytes()
    for count, change in enumerate((["--temperature", 0.7, "--seed", 1], ["--limit", 3], ["--batch", 8]), 2):
        assert bench(*change)[0] == 0
        assert len(list(first.parent.glob("sums-*.jsonl"))) == count and first.read_bytes() == before


def test_damaged_samples_are_named(bench, tmp_path):
    bench()
    path = stored(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "{broken\n", *lines[2:]]))
    complains(bench(), "line 2", "remove")
    path.write_text("".join([lines[1], lines[0], *lines[2:]]))
    complains(bench(), "out of order", "remove the file")


def test_attention_is_the_flags_else_the_runs_own(bench, reader, tmp_path, monkeypatch):
    shutil.copytree(reader, tmp_path / "run" / "checkpoint")
    used, real = [], rollout.load_model
    spy = lambda *a: (used.append(a[3]), real(*a))[1]  # noqa: E731
    monkeypatch.setattr(rollout, "load_model", spy)
    own = tmp_path / "run" / "config.json"
    own.write_text(json.dumps({"settings": {"attention": "eager"}}))
    assert bench("--model", "run", "--out", "a")[0] == 0
    assert bench("--model", "run", "--out", "b", "--attention", "sdpa")[0] == 0 and used == ["eager", "sdpa"]
    own.write_text(json.dumps({"settings": {"attention": "flash_attention_2"}}))
    kinds = [chapter.attention_of("run/checkpoint", "auto", torch.device(x)) for x in ("cpu", "cuda")]
    assert kinds == ["sdpa", "flash_attention_2"], "flash attention does not run on a CPU"


def test_a_prompt_that_does_not_fit_is_refused_before_sampling(bench):
    complains(bench("--max-new-tokens", 9000, "--out", "new"), "--max-new-tokens 9000", "at most")


def test_the_average_is_over_the_benchmarks_of_each_model(bench, tmp_path, reader):
    shutil.copytree(reader, tmp_path / "other")
    both = ["--benchmark", "sums", "more", "--data", "sums=sums.jsonl", "more=sums.jsonl"]
    code, out, err = bench("--model", reader, "other", "--samples", 16, *both)
    assert code == 0, err
    told = pd.read_csv("out/benchmarks.csv").groupby("model")["pass@1"].mean() * 100
    shown = [line.split()[1] for line in out.splitlines() if line.startswith("average")]
    assert shown == [f"{x:.1f}" for x in told] and len(shown) == 2


def test_reported_numbers_agree_with_their_own_averages():
    """A typing error would show: STEER's averages are of all six, PAR's of the first five."""
    reported = pd.read_csv(io.StringIO(REPORTED), sep=";").set_index(["paper", "method"])
    for key, count in (("steer", 6), ("par", 5)):
        rows = reported.loc[key]
        six = rows.drop(columns="average")
        assert (six.count(axis=1) == count).all() and len(rows) in (5, 7)
        assert np.abs(six.mean(axis=1) - rows["average"]).max() < 0.12


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ENTROPY_FLOW_DATA, the folder of the six files")
def test_the_whole_six_benchmark_path_with_a_tiny_model(cli, reader):
    argv = ["--model", reader, "--benchmark", *SIX, "--limit", 3, "--k", 2, "--max-new-tokens", 8]
    code, out, err = cli(*argv, "--against", "opefo", "steer", "clip_cov", "--out", "out")
    assert code == 0, err
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(SIX)}
    assert set(rows) == set(SIX)
    assert all("3 x 2" in rows[x] for x in SIX[:3]) and all("3 x 1" in rows[x] for x in SIX[3:])
    assert "reported: steer" in out and "top-p .7" in out and "48.6" in out
