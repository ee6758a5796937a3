"""Chapter 4, grading: what counts as the same answer, on purpose; hostile completions; the six benchmarks."""

import contextlib
import json
import os
import random
import re
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("math_verify")

import grpo  # noqa: E402
from grpo import REWARDS, SPURIOUS, Grader, grade, last_boxed, overlong_penalty, plain_answer  # noqa: E402

ROOT = Path(grpo.__file__).parent


@pytest.fixture(scope="module")
def grader():
    g = Grader(workers=3)
    assert g.grade_all([r"\boxed{\sqrt{8}}"] * 3, [r"2\sqrt{2}"] * 3) == [True] * 3  # and all have started
    yield g
    g.close()


# ------------------------------------------------------------------------------------------------------------
# Which answer a completion gives


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} as claimed", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{7} it is", "7"),
        (r"\boxed 5", "5"),
        (r"\boxed{1} but \boxed{2", None),  # cut off while it changed its mind
        (r"3 and \boxed{", None),
        (r"\boxed{}", ""),
    ],
)
def test_the_last_box_is_the_answer(text, answer):
    assert last_boxed(text) == answer


UNBOXED = [
    ("The answer is 42.", "42", True), ("The answer is 42.", "24", False), ("no idea", "5", False),
    ("the answer is 1. No: the answer is 2. Done.", "2", True), ("", "5", False),
    ("the answer is 1. No: the answer is 2. Done.", "1", False), ("Answer: $x^2$, since", "x^2", True),
    ("It takes 3 of 17 apples", "17", True), ("It takes 3 of 17 apples", "3", False),
    ("It costs 1,234.50 dollars", "1234.5", True), ("The answer is −7", "-7", True),
    (r"we get \[x = \frac{1}{2}\]", "1/2", True), ("She has $18.", "18", True), ("#### 18", "18", True),
    ("The answer is $(1,2)$", "(1,2)", True), ("The answer is $(1,2)$", "1,2", False),
    (r"growth of 20\%. The answer is 50", "0.5", False), ("The answer is 50%", "0.5", True),
    ("The final answer is $5$ or $6$", "5,6", True), ("the answer is 1e-9", "2e-9", False),
    ("So the correct option is C.", "C", True), ("The correct option is (C).", "C", True),
    ("The correct option is B, not C.", "C", False), ("Hence the answer is (A) 12.", "A", True),
    ("A cat", "A", False), ("The number is odd, so the answer is odd.", "even", False),
    (r"The answer is \text{East}", "East", True), ("The answer is 3:30.", "3:30", True),
    ("The answer is 3:40.", "3:30", False), (r"3 and \boxed{", "3", False),
]  # fmt: skip


@pytest.mark.parametrize("text, answer, right", UNBOXED)
def test_without_a_box_the_last_claim_counts_then_the_last_formula(grader, text, answer, right):
    assert grader.grade_all([text], [answer]) == [right]


@given(st.text(max_size=200))
def test_any_text_can_be_looked_at(text):
    for f in (last_boxed, plain_answer, grpo.tidy, lambda t: grpo.literal(t, "5")):
        f(text)


# ------------------------------------------------------------------------------------------------------------
# What is the same

SAME = [
    ("5", "5"), ("5.", "5"), ("+5", "5"), ("(5)", "5"), ("{5}", "5"), ("5.0", "5"), ("05", "5"), ("$5$", "5"),
    ("(x,y)=(1,2)", "(1,2)"), ("(a, b, c) = (1, 2, 3)", "(1,2,3)"), ("10000", "10^4"),
    ("3.02e6", r"3 \times 10^6"),
    ("x=5", "5"), ("x = 5", "5"), ("5", "x=5"), (r"x \in [-2,7]", "[-2,7]"), ("y=2x+3", "2x+3"),
    ("1,234", "1234"), (r"1{,}234", "1234"), (r"10,\!080", "10080"), ("1,234,567", "1234567"),
    ("0.5", r"\frac{1}{2}"), ("1/2", r"\frac12"), (r"\dfrac{1}{2}", "1/2"), (r"-\frac{1}{2}", "-0.5"),
    (r"\frac{-1}{2}", r"-\frac{1}{2}"), ("0.3333", "1/3"), (r"\frac{2}{4}", r"\frac{1}{2}"),
    (r"50\%", "50"), (r"50\%", "0.5"), (r"8\%", r"$8 \%$"), ("0.08", r"8\%"),
    (r"90^\circ", "90"), (r"90^{\circ}", r"90^\circ"), ("90 degrees", "90"), ("90", r"90\text{ degrees}"),
    (r"15\mbox{ cm}^2", "15"), (r"15\text{ cm}^2", r"15\mbox{ cm}^2"), (r"\$5", "5"), ("5 dollars", "5"),
    (r"864 \text{ square inches}", "864"), (r"\text{(E)}", "E"), ("(A)", "A"), ("A.", r"\textbf{(A)}"),
    (r"\text{east}", "East"), ("Evelyn", r"\text{Evelyn}"), (r"\text{even}", "even"),
    (r"\sqrt{8}", r"2\sqrt{2}"), ("x^2-1", "(x-1)(x+1)"), (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"6\pi", r"\pi \cdot 6"), ("2k", "k*2"), (r"6-5i", "-5i+6"),
    ("5, 6", "6, 5"), ("{5,6}", "5,6"), (r"\{5,6\}", "6,5"), ("5 and 6", "5,6"), ("5 or 6", "6,5"),
    ("5;6", "5,6"),
    ("1,2", "1, 2"), (r"1,-2", "-2,1"), (r"\sqrt{8}, 1", r"1, 2\sqrt{2}"), (r"$11$,$13$", "11,13"),
    ("(1,2)", "(1, 2)"), (r"\left(3, \frac{\pi}{2}\right)", r"(3,\pi/2)"), ("(3,2),(2,3)", "(2,3), (3,2)"),
    ("[1,2)", r"\left[1,2\right)"), (r"(-\infty,-5)", r"(-\infty, -5)"),
    (r"(2,12) \cup (12,102)", r"(12,102)\cup(2,12)"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"3 \times 10^6", "3e6"), (r"3\cdot 10^{6}", "3000000"), ("4.5e33", r"4.5 \times 10^{33}"),
    ("1e-5", "0.00001"),
    ("8.71e8", r"8.7 \times 10^{8}"),
    ("2^{10^{10}}", "2^{10^{10}}"),  # the same string needs no algebra
]  # fmt: skip

DIFFERENT = [
    ("5", "6"), ("", "5"), ("-5", "5"), ("5.01", "5"), ("0.333", "1/3"), ("1=5", "5"), ("12", "1,2"),
    ("1.2", "1,2"), ("1,2", "1.2"), ("5, 6", "6"), ("9950", "10^4"), ("1005000", "10^6"),
    (r"x\ge 2", r"[2,\infty)"), ("1<x<2", "(1,2)"), ("(x,y)=(2,1)", "(1,2)"),
    ("6", "5, 6"), ("5", "5, 6"), ("5,6,7", "5,6"), ("5,5", "5"), ("5,6", "5,5"), ("1,234", "1.234"),
    (".5", "50"), ("(2,1)", "(1,2)"), ("(1,2]", "[1,2]"), ("[1,2]", "(1,2)"), ("(1,2)", "1,2"),
    (r"\sqrt{2}", "1.41"), ("x^2+1", "x^2-1"), ("B", "A"), ("(B)", "(A)"), ("west", "east"), ("odd", "even"),
    ("3e7", "3e6"), ("1001", "1000"), ("1000000001", "1000000000"), ("y=2x+4", "2x+3"), ("2", "2k"),
    (r"(2,12)", r"(2,12)\cup(12,102)"), (r"\frac{1}{0}", "1"), ("1e999999", "1"), ("infinity", "5"),
    ("9^{9^9}", r"9^{9^{9}}+1"),
]  # fmt: skip


# What our own reading of LaTeX once got wrong, or what math-verify alone gets wrong.
SAME += [
    (r"\frac{2}{2\cdot 7^{30}}", r"\frac{1}{7^{30}}"), (r"\left(\frac{1}{7^{30}},1\right)", "(7^{-30},1)"),
    (r"x \in (-\infty, 3)", r"(-\infty,3)"), (r"x \in [1,\infty)", r"[1,\infty)"), ("（1，2）", "(1,2)"),
    (r"\cos 60^\circ", "0.5"), (r"\cos 60^\circ", r"\frac{1}{2}"), (r"\tan(45^\circ)", "1"),
    (r"\textbf{(C)}\ 12", "C"), ("C: 5", "C"), ("x^2+y^2=1", "y^2+x^2=1"), ("2x+3y=6", "4x+6y=12"),
    ("x=1, x=2", "1,2"), ("5=x", "5"), (r"1 \pm 2", "3,-1"), ("1±2", "3,-1"), (r"-1,\pm 2", "-2,-1,2"),
    (r"3\text{ million}", "3000000"), (r"50\text{ percent}", "0.5"), ("3:1", "3:1"), ("x>3", "3<x"),
    (r"7\text{ p.m.}", r"7\text{ p.m.}"), ("100, 200", "200, 100"), ("100,200", "100200"), ("-7", "−7"),
    (r"\emptyset", r"\varnothing"), (r"0.\overline{3}", r"\frac13"), ("2 1/2", "2.5"), ("3i", r"3\mathrm{i}"),
    (r"2\frac{1}{2}", r"\frac52"), (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
     r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"), (r"\frac{x+1}{2}", "0.5x+0.5"),
]  # fmt: skip
DIFFERENT += [
    (r"\frac{1}{7^{30}}", r"\frac{2}{7^{30}}"), (r"\frac{-1}{7^{30}}", r"\frac{1}{7^{30}}"),
    (r"\frac{1}{7^{30}}", "0"), ("(1/7^{30},1)", "(2/7^{30},1)"), ("1e-9", "2e-9"), ("0", "1e-9"),
    ("3:30", "3.5"), ("1:30", "30:1"), ("1:2", "2:4"), ("2024-01-02", "2021"), ("1/2/2024", "1/4048"),
    ("1+1=2", "2+2=4"), ("1+1=2=5", "5"), ("2+2=5", "4"), ("x+1=2", "y+1=2"), ("x=1", "x=2"), ("y=2", "x=2"),
    ("BA", "AB"), ("A", "AB"), (r"\textbf{(B)}\ 12", "C"), ("C + 1", "C"), ("C=5", "C"), ("C, D", "C"),
    ("A or C", "A"), ("not C", "C"), ("x>3", "x<3"), ("x>3", r"x\ge3"), ("6m", "6"), ("6m", "6t"),
    ("3i", "3"), (r"3\mathrm{i}", "3"), (r"5\text{ million}", "5"), (r"3\text{ a.m.}", r"3\text{ p.m.}"),
    (r"3\text{ a.m.}", "3"), ("1,1,2", "1,2"), ("1,2,2", "1,1,2"), (r"\{1,2\}", "(1,2)"), ("50", "0.5"),
    (r"0.5\%", "50"), ("5000", r"50\%"), (".5", "5"), ("1000", "1.000"), ("1,000", "1"), ("56", "5,6"),
    (r"\infty", r"-\infty"), (r"\pi", "3.14"), (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"), ("10000.6", "10000"),
    ("2 3", "23"), ("2 3", "6"), ("7!", "7"), ("|5|", "-5"), ("99999", "100000"),
]  # fmt: skip


@pytest.mark.parametrize("mine, answer", SAME)
def test_the_same_answer_written_differently_is_right(grader, mine, answer):
    assert grader.grade_all([f"So it is $\\boxed{{{mine}}}$."], [answer]) == [True]


@pytest.mark.parametrize("mine, answer", DIFFERENT)
def test_another_answer_is_wrong(grader, mine, answer):
    assert grader.grade_all([f"So it is $\\boxed{{{mine}}}$."], [answer]) == [False]


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_integers_are_equal_when_they_are(a, b):
    """Decided by the shortest form alone, in this process."""
    assert (plain_answer(str(a)) == plain_answer(str(b))) is (a == b)
    assert plain_answer(f"{a:,}") == plain_answer(f" ${a}$ .") == plain_answer(f"{a}.0") == str(a)


def test_fractions_are_equal_when_they_are(grader):
    rng, mine, answers = random.Random(0), [], []
    for _ in range(50):
        a, b, c = rng.randint(-999, 999), rng.randint(1, 999), rng.randint(1, 50)
        mine += [rf"\boxed{{\frac{{{a * c}}}{{{b * c}}}}}", rf"\boxed{{\frac{{{a * c + 1}}}{{{b * c}}}}}"]
        answers += [f"{a}/{b}"] * 2
    assert grader.grade_all(mine, answers) == [True, False] * 50


# ------------------------------------------------------------------------------------------------------------
# Hostile completions

HOSTILE = {
    "exponent tower": r"\boxed{10^{10^{10^{10}}}}",
    "factorial": r"\boxed{10^9!}",
    "power of powers": r"\boxed{9^{9^9}}",
    "gigabyte number": r"\boxed{2^{10^{10}}}",
    "brackets": r"\boxed{" + "(" * 10_000 + ")" * 10_000 + "}",
    "braces": r"\boxed" + "{" * 10_000 + "}" * 10_000,
    "fractions": r"\boxed{" + r"\frac{1}{" * 40 + "1" + "}" * 40 + "}",
    "NUL": "\\boxed{\x00\x00}",
    "digits": "1" * 1_000_000,
    "boxed digits": r"\boxed{" + "7" * 1_000_000 + "}",
    "unclosed": r"\boxed{5",
    "many unclosed": r"\boxed{" * 20_000,
    "several": r"\boxed{4}" * 5_000,
    "macro bomb": r"\boxed{\def\a{\a\a}\a}",
    "sums": r"\boxed{\sum_{i=1}^{10^{12}} \sin(i)^{i}}",
    "nested roots": r"\boxed{" + r"\sqrt{" * 60 + "x" + "}" * 60 + "}",
    "commas": r"\boxed{" + "," * 400 + "}",
    "dollars": "$" * 100_000,
    "answer is": "answer is " * 50_000,
    "surrogate": "\\boxed{\ud800}",
    "blanks": " " * 500_000 + r"\boxed{ " + " " * 10_000 + "}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completions_are_wrong_within_two_seconds_and_leave_no_mark(grader, name):
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert grader.grade_all([HOSTILE[name]] * 3, ["5", r"\frac{\pi}{2}", "(1,2)"]) == [False] * 3
    assert time.monotonic() - begin < 2.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kB, of this process
    assert grader.grade_all([r"\boxed{\sqrt{8}}"], [r"2\sqrt{2}"]) == [True]


def test_a_check_may_not_take_more_memory_than_it_is_given():
    """Without memory a number of 25 MB cannot be checked (one of 12 finds room in Python 3.10's heap); one of
    more than a gigabyte gets none of it."""
    g, number = Grader(workers=1, seconds=10, memory=0), r"2^{2\cdot 10^{8}}"
    assert g._check(f"{number}+x", f"x+{number}", True) is False
    g.limits["memory"] = 2**28
    assert g._check(f"{number}+x", f"x+{number}", True) is True
    server, top = g.idle.queue[0].pid, [0]

    def watch():
        while top:
            for child in Path(f"/proc/{server}/task/{server}/children").read_text().split():
                with contextlib.suppress(OSError):
                    peak = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{child}/status").read_text())
                    top[0] = max(top[0], int(peak[1]) if peak else 0)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert g._check("2^{10^{10}}", "3^{10^{10}}", True) is False
    peak = top.pop()
    watcher.join()
    assert 0 < peak < 2**19, "kB: 256 MiB, and what the process had before"
    g.close()


def test_one_check_that_hangs_does_not_stall_the_others():
    g = Grader(workers=2, seconds=1.0)
    assert g.grade_all([r"\boxed{\sqrt{8}}"], [r"2\sqrt{2}"]) == [True]
    texts = [r"\boxed{9^{9^9}}"] + [rf"\boxed{{\sqrt{{{i}}}}}" for i in range(2, 22)]
    answers = ["x"] + [rf"\sqrt{{{4 * i}}}/2" for i in range(2, 22)]
    begin = time.monotonic()
    assert g.grade_all(texts, answers) == [False] + [True] * 20
    assert time.monotonic() - begin < 8
    g.close()


def test_a_server_that_was_killed_is_replaced():
    g = Grader(workers=1)
    assert g._check("x+1", "1+x", True) is True
    server = g.idle.queue[0]
    server.kill()
    server.wait()
    assert g._check("x+2", "2+x", True) in (True, False)  # whoever met the dead one counts as wrong
    assert g._check("x+3", "3+x", True) is True
    g.close()
    assert g.idle.empty()


def test_grades_are_remembered(grader):
    grader.grade_all([r"\boxed{y+1}"] * 9, ["1+y"] * 9)
    asked = grader.check.cache_info().misses
    assert grader.grade_all([r"so \boxed{y+1}"], ["1+y"]) == [True]
    assert grader.check.cache_info().misses == asked


def test_grading_works_from_a_thread_and_ends_with_its_process(tmp_path):
    """A main script that grades in a thread, and ends without having closed anything: no process stays."""
    got = []
    worker = threading.Thread(target=lambda: got.append(grade(r"\boxed{x+1}", "1+x")))
    worker.start()
    worker.join()
    assert got == [True]
    script = tmp_path / "main.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import grpo, os\n"
        "assert grpo.grade('x is \\\\boxed{x+1}', '1+x')\n"
        "print(*[s.pid for s in grpo.shared_grader().idle.queue])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for pid in done.stdout.split():
        for _ in range(50):
            if not Path(f"/proc/{pid}").exists():
                break
            time.sleep(0.1)
        assert not Path(f"/proc/{pid}").exists()


# ------------------------------------------------------------------------------------------------------------
# Rewards


def test_rewards_by_name():
    correct, lengths = torch.tensor([True, False, True, False]), torch.tensor([10, 10, 100, 90])
    g = torch.Generator().manual_seed(0)
    assert REWARDS["correct"](correct, lengths, 100, g).tolist() == [1, 0, 1, 0]
    assert REWARDS["wrong"](correct, lengths, 100, g).tolist() == [0, 1, 0, 1]
    assert REWARDS["length_penalty"](correct, lengths, 100, g).tolist() == [1, 0, 0, -0.5]
    many = REWARDS["random"](correct.repeat(10_000), lengths.repeat(10_000), 100, g)
    assert set(many.tolist()) == {0.0, 1.0} and abs(float(many.mean()) - 0.5) < 0.015  # six sigma
    assert abs(float(torch.corrcoef(torch.stack([many, correct.repeat(10_000).float()]))[0, 1])) < 0.03
    assert set(SPURIOUS) < set(REWARDS)


@given(st.integers(2, 20_000), st.integers(1, 5000), st.lists(st.integers(0, 30_000), min_size=1, max_size=5))
def test_the_overlong_penalty_is_the_papers(max_length, buffer, lengths):
    """2503.14476 eq. 13, its three cases."""
    got = overlong_penalty(torch.tensor(lengths), max_length, buffer).tolist()
    for length, penalty in zip(lengths, got):
        if length <= max_length - buffer:
            want = 0.0
        elif length <= max_length:
            want = ((max_length - buffer) - length) / buffer
        else:
            want = -1.0
        assert penalty == pytest.approx(want, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------
# The benchmarks

DATA = os.environ.get("ENTROPY_FLOW_DATA", "")
BENCHMARKS = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench")
needs_data = pytest.mark.skipif(not DATA, reason="ENTROPY_FLOW_DATA names no folder of benchmark files")


def answers_of(name):
    rows = [json.loads(line) for line in (Path(DATA) / f"{name}.jsonl").read_text().splitlines()]
    return [str(r["answer"]) for r in rows]


def bare(answer):
    """Without the dollars around the whole or around every element."""
    return re.sub(r"(?<!\\)\$", "", answer)


def ways(answer):
    """Usual ways to write the same answer."""
    a = bare(answer)
    yield a
    yield a.replace("\\frac", "\\dfrac")
    yield a.replace("\\left", "").replace("\\right", "")
    yield f" {a} "
    yield f"{a}."
    if re.fullmatch(r"-?\d+", a):
        yield f"{int(a):,}"
        yield f"{a}.0"
        yield f"{a}\\text{{ units}}"
        yield f"+{a}" if int(a) > 0 else a
    if found := re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", a):
        yield f"{found[1]}{found[2]}/{found[3]}"
        yield f"{found[1]}\\frac{{{2 * int(found[2])}}}{{{2 * int(found[3])}}}"
    if found := re.fullmatch(r"(-?\d+\.\d+)", a):
        yield f"{a}0"
    if re.fullmatch(r"-?\d+(,\s*-?\d+)+", a) and not re.fullmatch(r"-?\d{1,3}(,\d{3})+", a):
        yield ", ".join(reversed([x.strip() for x in a.split(",")]))
        yield "\\{" + a + "\\}"


TEXTS = (
    "Let $n = 3$; then 12 cases remain.\nThe final answer is $\\boxed{%s}$.",
    "\\[\\boxed{%s}\\]\nI hope it is right, as 7 is prime.",
)


@needs_data
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_row_is_graded_right_however_it_is_written(grader, name):
    """At least 99.5 % of rows, every way of writing counted: a row is right only if all of its ways are."""
    answers = answers_of(name)
    cases = [(i, t % way) for i, a in enumerate(answers) for way in dict.fromkeys(ways(a)) for t in TEXTS]
    got = grader.grade_all([text for _, text in cases], [answers[i] for i, _ in cases])
    wrong = sorted({answers[i] for (i, _), ok in zip(cases, got) if not ok})
    assert len(wrong) <= 0.005 * len(answers), wrong


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_another_problems_answer_is_graded_wrong(grader, name):
    answers, rng = answers_of(name), random.Random(0)
    others = [rng.choice([b for b in answers if plain_answer(b) != plain_answer(a)]) for a in answers]
    got = grader.grade_all([TEXTS[0] % bare(b) for b in others], answers)
    right = [(a, b) for a, b, ok in zip(answers, others, got) if ok]
    assert not right, right
