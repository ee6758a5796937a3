"""The exercises' own checks can be trusted: the repository's code passes them, each known mistake fails with
its own hint, and what is not filled in is skipped. Nothing here depends on what a student has filled in.
"""

import ast
import importlib
import json
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
