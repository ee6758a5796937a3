"""The README cannot drift from the code: its table of methods is generated, its commands parse.

`python tests/test_readme.py` prints the table as it should be.
"""

import re
import runpy
import shlex
from pathlib import Path

import pytest

import eval
import interventions
import train

ROOT = Path(__file__).resolve().parent.parent
README, STUDY = ROOT / "README.md", ROOT / "results" / "README.md"
TEXTS = (README, STUDY, ROOT / "tests" / "exercises" / "README.md")


def outcome(key: str) -> str:
    """What the study's first table in results/README.md says of a method: its entropy in the end, and D1."""
    first = STUDY.read_text().partition("What the papers report")[0]
    rows = re.findall(r"^\| `([^`]+)`( †)? \|(.*)\|$", first, re.MULTILINE)
    found = {name: [cell.strip() for cell in row.split("|")] for name, _, row in rows}
    later = {name for name, dagger, _ in rows if dagger}
    name = key if key in found else f"{key}:x4"
    if name not in found:
        return "not run"
    _, entropy, *_, d1, _, _ = found[name]
    d1 = re.sub(r" \[.*\]", "", d1) or "the line itself"
    return f"{'' if name == key else '×4: '}{entropy}, {d1}{' †' * (name in later)}"


def table() -> str:
    lines = ["| method | place | idea | paper | here: entropy, D1 |", "|---|---|---|---|---|"]
    for key, cls in interventions.METHODS.items():
        paper = re.sub(r"(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", cls.paper)
        lines.append(f"| `{key}` | {cls.place} | {cls.idea} | {paper} | {outcome(key)} |")
    return "\n".join(lines)


def test_the_table_of_methods_is_the_one_the_code_gives():
    assert table() in README.read_text(), (
        "run `python tests/test_readme.py` and paste its table into README.md"
    )


def everything() -> str:
    return "\n".join(text.read_text() for text in TEXTS)


def commands(program: str) -> list[str]:
    found = re.findall(rf"{re.escape(program)} ?([^#\n`|]*)", everything())
    return [c.strip() for c in found if c.strip()]


def test_every_train_command_of_the_readme_parses():
    found = [c for c in commands("python train.py") if c != "--help"]
    assert len(found) >= 10
    for command in found:
        given = eval.command_line(train.Command, "train.py", shlex.split(command))
        for spec in given.method:
            if not spec.endswith(":help"):
                train.parse_spec(spec, train.Settings(**given.values()))


def test_every_eval_command_of_the_readme_parses():
    found = commands("python eval.py")
    assert len(found) >= 8
    for command in found:
        eval.command_line(eval.Command, "eval.py", shlex.split(command))


def test_every_pytest_command_of_the_readme_selects_a_test():
    found = re.findall(r"pytest (tests/test_\w+\.py) -k (\w+|\"[^\"]+\")", everything())
    assert len(found) >= 8
    for file, words in found:
        names = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE)
        for word in words.strip('"').split(" or "):
            assert any(word in name for name in names), f"README.md: pytest {file} -k {words} selects nothing"


@pytest.mark.parametrize("text", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_linked_to_exist(text):
    names = re.findall(r"\]\(((?!http)[^)#]+)\)", text.read_text())
    assert names
    for name in names:
        assert (text.parent / name).exists(), f"{text} links to {name}, which does not exist"


def test_what_is_installed_is_held_against_the_table(monkeypatch, capsys):
    versions = runpy.run_path(str(ROOT / ".ci" / "versions.py"))
    here = {"Python": "3.11", "torch": "2.13.0+cpu", "vllm": "0.32.0"}
    monkeypatch.setitem(versions["main"].__globals__, "installed", here.get)
    monkeypatch.setitem(
        versions["main"].__globals__,
        "requires",
        lambda _: ["torch<2.15,>=2.11", 'vllm<0.33; extra == "vllm"'],
    )
    assert versions["main"]() == 0 and "CI: the vLLM engine on a CPU, " in capsys.readouterr().out
    here["vllm"] = "0.33.0"
    assert versions["main"]() == 1
    assert "0.33.0" in (out := capsys.readouterr().out) and "OFF: pip install 'vllm<0.33'" in out


def test_one_version():
    number = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"\nversion: {number}\n" in (ROOT / "CITATION.cff").read_text()


if __name__ == "__main__":
    print(table())
