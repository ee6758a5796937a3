"""The README cannot drift from the code: its table of methods is generated, its commands parse.

`python tests/test_readme.py` prints the table as it should be.
"""

import re
import shlex
from pathlib import Path

import interventions
import train

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def needs(cls) -> str:
    """What a method reads beyond log π, rewards and groups, in the README's words."""
    names = [n for n in cls.needs if n not in ("logp", "reward", "group")]
    words = {
        "entropy": "H",
        "p2": "Σp²",
        "p2logp": "Σp² log p",
        "ref_logp": "reference",
        "proxy_logp": "proxy",
    }
    return ", ".join(words.get(n, n) for n in names) or "–"


def table() -> str:
    lines = ["| method | place | paper | idea | needs | acts on-policy? |", "|---|---|---|---|---|---|"]
    for key, cls in interventions.METHODS.items():
        acts = "yes" if cls.on_policy else "no"
        paper = ", ".join(
            re.sub(r"(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", x) for x in [cls.paper]
        )
        lines.append(f"| `{key}` | {cls.place} | {paper} | {cls.idea} | {needs(cls)} | {acts} |")
    return "\n".join(lines)


def test_the_table_of_methods_is_the_one_the_code_gives():
    assert table() in README.read_text(), (
        "run `python tests/test_readme.py` and paste its table into README.md"
    )


def test_every_train_command_of_the_readme_parses():
    commands = re.findall(
        r"^\s*(?:pip install .* && )?python train\.py ([^#\n`]*)", README.read_text(), re.MULTILINE
    )
    assert len(commands) >= 5
    for command in (c for c in commands if c.strip() != "--help"):
        args = train.parser().parse_args(shlex.split(command))
        settings = train.Settings(**train.given_settings(args))
        for spec in getattr(args, "method", []):
            if not spec.endswith(":help"):
                train.parse_spec(spec, settings)


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", README.read_text()):
        assert (ROOT / name).exists(), f"README.md links to {name}, which does not exist"


if __name__ == "__main__":
    print(table())
