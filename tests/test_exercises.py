"""The exercises' own checks can be trusted: the repository's code passes them, each known mistake fails with
its own hint, and what is not filled in is skipped. Nothing here depends on what a student has filled in.
"""

import ast
import importlib
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "exercises"
sys.path.insert(0, str(FOLDER))  # where pytest itself finds `checking` when it collects that folder
EXERCISES = {n: importlib.import_module(f"test_exercise_{n}") for n in range(1, 7)}
MISTAKES = [(n, name) for n, module in EXERCISES.items() for name in module.EXERCISE.mistakes]


def checks_of(module: types.ModuleType) -> list:
    return [f for name, f in vars(module).items() if name.startswith("test_")]


def squeezed(text: object) -> str:
    """Without line breaks, which the message puts into the hint."""
    return " ".join(str(text).split())


@pytest.mark.parametrize("n", EXERCISES)
def test_the_repository_answers_its_own_exercises(n, monkeypatch):
    module = EXERCISES[n]
    monkeypatch.setattr(module, module.EXERCISE.name, module.EXERCISE.reference)
    for test in checks_of(module):
        test()


@pytest.mark.parametrize("n, name", MISTAKES, ids=[f"{n}-{name}" for n, name in MISTAKES])
def test_each_mistake_is_told_its_own_hint_and_fails_the_independent_fact(n, name, monkeypatch):
    module, exercise = EXERCISES[n], EXERCISES[n].EXERCISE
    (fact,) = [test for test in checks_of(module) if test.__name__ != f"test_{exercise.name}"]
    for answer in exercise.mistakes[name].variants:
        with pytest.raises(pytest.fail.Exception) as failure:
            exercise.check(answer)
        told = [k for k, m in exercise.mistakes.items() if squeezed(m.hint) in squeezed(failure.value)]
        assert told == [name]
        monkeypatch.setattr(module, exercise.name, answer)
        with pytest.raises((pytest.fail.Exception, ArithmeticError, ValueError, IndexError)):
            fact()


@pytest.mark.parametrize("n", EXERCISES)
def test_what_no_known_mistake_explains_is_still_wrong(n):
    exercise = EXERCISES[n].EXERCISE

    def boolean(x) -> bool:
        return getattr(x, "dtype", None) is not None and not x.is_floating_point()

    def odd(*args):
        out = exercise.reference(*args)
        parts = out if isinstance(out, tuple) else (out,)
        return tuple(~x if boolean(x) else 3.25 * x for x in parts)

    def nothing(*args):
        return None

    def broken(*args):
        raise KeyError("the student's own")

    with pytest.raises(pytest.fail.Exception, match="not right yet|times what it should be|turned around"):
        exercise.check(odd)
    with pytest.raises(TypeError, match="returned None"):
        exercise.check(nothing)
    with pytest.raises(KeyError, match="the student's own"):
        exercise.check(broken)


def with_body(n: int, body: str) -> str:
    """The source of exercise n with another body under its function's docstring."""
    source = (FOLDER / f"test_exercise_{n}.py").read_text()
    name = EXERCISES[n].EXERCISE.name
    function = next(x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef) and x.name == name)
    lines = source.splitlines(keepends=True)
    return "".join([*lines[: function.body[0].end_lineno], f"    {body}\n", *lines[function.end_lineno :]])


RUN = """
import json, sys, pytest
class Recorder:
    def __init__(self): self.seen = []
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.skipped:
            text = report.longrepr[2] if report.skipped else str(report.longrepr or "")
            self.seen.append((report.nodeid.rpartition("/")[2].partition("::")[0], report.outcome, text))
out = {}
for k in ["", "1", "3", "5"]:
    recorder = Recorder()
    code = pytest.main(["exercises", *(["-k", k] if k else []), "-p", "no:cacheprovider"], plugins=[recorder])
    out[k] = int(code), recorder.seen
json.dump(out, open(sys.argv[1], "w"))
"""


def run_copy(folder: Path, bodies: dict[int, str]) -> dict[str, tuple[int, list]]:
    """-k value ("" for none) -> exit code and (file, outcome, text) of what ran in a copy of the folder."""
    (folder / "exercises").mkdir()
    (folder / "pytest.ini").write_text(f"[pytest]\npythonpath = {HERE.parent}\n")
    (folder / "exercises" / "checking.py").write_text((FOLDER / "checking.py").read_text())
    for n in EXERCISES:
        (folder / "exercises" / f"test_exercise_{n}.py").write_text(with_body(n, bodies.get(n, "return ...")))
    done = subprocess.run(
        [sys.executable, "-c", RUN, "out.json"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "out.json").read_text())


def test_an_unfilled_exercise_is_skipped_and_a_filled_one_told_right_or_wrong(tmp_path):
    wrong = "P, Q = float(f[mask & (f > 0)].sum()), float(-f[mask & (f < 0)].sum()); return (Q - P) / (Q + P)"
    out = run_copy(tmp_path, {5: "return 1 - math.comb(n - c, k) / math.comb(n, k)", 3: wrong})
    assert all({file for file, _, _ in out[k][1]} == {f"test_exercise_{k}.py"} for k in "135")
    assert sorted(what for _, what, _ in out[""][1]) == ["failed"] * 2 + ["passed"] * 2 + ["skipped"] * 8
    code, seen = out["1"]
    want = f"fill in {EXERCISES[1].EXERCISE.name} in tests/exercises/test_exercise_1.py"
    assert code == 0 and len(seen) == 2 and all(what == "skipped" and want in text for _, what, text in seen)
    assert out["5"][0] == 0 and [what for _, what, _ in out["5"][1]] == ["passed"] * 2
    code, seen = out["3"]
    assert code == 1 and [what for _, what, _ in seen] == ["failed"] * 2
    assert "division by zero where nothing flows" in seen[0][2] and "nothing flows: it raised" in seen[0][2]


# ------------------------------------------------------------------------------------------------------------
# The worked examples and the trap


def test_every_number_worked_by_hand_is_the_chapters():
    import torch
    import worked

    from entropy_math import FORMS, entropy, entropy_change, exact_score, set_point_lambda, token_stats
    from eval import pass_at_k
    from grpo import Tokens, plan_update
    from interventions import build, covariance

    hand = {name: torch.tensor(x).double() for name, x in worked.numbers().items()}
    z, ids = hand["p"].log().expand(3, 3), torch.arange(3)
    s, adv = token_stats(z, ids), hand["A"]
    seen = {"log p": s.logp, "H": s.entropy[:1], "p2": s.p2[:1], "p2logp": s.p2logp[:1], "T": exact_score(s)}
    seen |= {form: -entropy_change(s, 1.0, form) for form in FORMS}
    step = 0.1 * (torch.eye(3) - hand["p"])  # (2.1)
    seen |= {"measured": entropy(z + step) - entropy(z), "0.1 T": 0.1 * exact_score(s)}
    tokens = Tokens(ids[None], torch.ones(1, 3).bool(), adv=adv[None], **vars(s.map(lambda x: x[None])))
    plan = plan_update(tokens, build("opefo"))
    seen |= {"f": entropy_change(s, adv), "lambda": torch.tensor([plan.metrics["lam"]]), "w": plan.weight[0]}
    seen["w f"] = seen["w"] * seen["f"]
    f, p, q = seen["f"], hand["P"], hand["Q"]
    assert f.clamp(min=0).sum() == pytest.approx(float(p)) and -f.clamp(max=0).sum() == pytest.approx(
        float(q)
    )
    assert set_point_lambda(float(p), float(q)) == pytest.approx(float(hand["lambda"]))
    assert float(seen["w f"].sum()) == pytest.approx(0, abs=1e-12)
    seen["c"] = covariance(tokens, adv[None])[0]
    dropped = plan_update(tokens, build("clip_cov", ratio=0.34, lb=0.5)).weight[0] == 0
    assert dropped.tolist() == [True, False, False]
    seen["pass@2"] = torch.tensor([pass_at_k(worked.N, worked.C, worked.K)])
    for name, x in seen.items():
        assert torch.allclose(hand[name], x.double(), rtol=1e-6, atol=1e-9), name
    u = hand["u"]
    assert torch.allclose(u, s.logp + s.entropy) and torch.allclose(hand["C"], (hand["p"] ** 2 * u).sum())
    assert set(hand) == set(seen) | {"p", "u", "C", "A", "P", "Q", "biased"}  # nothing is left unchecked
    assert hand["biased"] == 1 - 0.75**2
    assert f"```\n{worked.text()}\n```" in (FOLDER / "README.md").read_text()


@pytest.mark.slow
def test_the_trap_catches_both_sides():
    """Seed 0 of the table: a bonus of .3 keeps one route or two, .5 most of them, .7 costs half of pass@1;
    balance keeps routes and pays in pass@1."""
    import trap

    found = {spec: trap.train(spec, 0) for spec in ("grpo", "opefo", *trap.SPECS[-5:])}
    routes, right = ({spec: x[i] for spec, x in found.items()} for i in (3, 2))
    low, middle, high = (f"entropy_bonus:alpha={x}" for x in (0.3, 0.5, 0.7))
    assert routes["grpo"] < 1.1 and right["grpo"] > 0.99
    assert routes[low] < 2.5 and right[low] > 0.99
    assert routes[middle] > routes["opefo"] > 5 and right[middle] > right["opefo"] + 0.2
    assert right[high] < 0.5 and right["opefo"] < 0.5


# ------------------------------------------------------------------------------------------------------------
# The lecture's notebook

LECTURE = FOLDER / "lecture.ipynb"


def test_the_lecture_is_kept_as_it_ran():
    """All code cells in one go from the first, none with an error, and a prediction asked before a reveal."""
    cells = json.loads(LECTURE.read_text())["cells"]
    ran = [c for c in cells if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in ran] == list(range(1, len(ran) + 1))
    outputs = [o for c in ran for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3
    asked = ["**Predict" in "".join(c["source"]) for c in cells]
    assert sum(asked) >= 6 and not any(a and b["cell_type"] != "code" for a, b in zip(asked, cells[1:]))
    for cell in cells:  # what it shows and does not make is there
        for name in re.findall(r"\]\(([^)#]+)\)", "".join(cell["source"])):
            assert (FOLDER / name).exists(), name


@pytest.mark.slow
def test_the_lecture_runs_from_top_to_bottom():
    """Its own assertions are the check."""
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[notebook]'")
    pytest.importorskip("ipykernel")
    import nbformat

    where = {"metadata": {"path": str(FOLDER)}}
    book = nbformat.read(LECTURE, as_version=4)
    nbclient.NotebookClient(book, timeout=900, kernel_name="python3", resources=where).execute()
