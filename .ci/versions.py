"""What is installed here, against what pyproject.toml admits and what the README says was tested.

    python .ci/versions.py      a line a package; exit code 1 where one lies outside its range

Needs the project to be installed (pip install -e .), for its metadata holds the ranges.
"""

import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

README = Path(__file__).resolve().parent.parent / "README.md"


def tested() -> list[dict[str, str]]:
    """The rows of the README's table of tested combinations: package -> version."""
    table = README.read_text().partition("## Tested versions")[2].partition("\n\n|")[2].partition("\n\n")[0]
    head, _, *body = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    return [{k: v for k, v in zip(head, row, strict=True) if v not in ("", "–")} for row in body]


def installed(name: str) -> str | None:
    """Its version; a community build of vLLM's CPU backend counts as vLLM."""
    if name == "Python":
        return ".".join(map(str, sys.version_info[:2]))
    for candidate in (name, f"{name}-cpu"):
        try:
            return version(candidate)
        except PackageNotFoundError:
            continue
    return None


def admitted() -> dict[str, SpecifierSet]:
    """package -> range, of all extras."""
    ranges = {"Python": SpecifierSet(">=3.10"), "verl": SpecifierSet(">=0.9,<0.10")}
    for line in requires("entropy-flow") or []:
        need = Requirement(line)
        if need.specifier and need.name not in ranges:  # the first one named is the widest
            ranges[need.name] = need.specifier
    return ranges


def main() -> int:
    rows, ranges, off = tested(), admitted(), 0
    names = list(dict.fromkeys([*(n for row in rows for n in row if n not in ("what ran", "date")), *ranges]))
    here = {name: found for name in names if (found := installed(name))}
    print(f"{'package':<14}{'installed':<14}{'admitted':<20}tested")
    for name, found in here.items():
        seen = list(dict.fromkeys(row[name] for row in rows if name in row))
        inside = name not in ranges or ranges[name].contains(Version(found).public, prereleases=True)
        off += not inside
        print(f"{name:<14}{found:<14}{ranges.get(name, '')!s:<20}{' '.join(seen) or '–'}", end="")
        print("" if inside else f"   OFF: pip install '{name}{ranges[name]}'")
    same = [r for r in rows if all(here[k].split("+")[0] == v for k, v in r.items() if k in here)]
    if off:
        print(f"{off} outside of what was tested: expect failures, or install what the last column says")
    elif same:
        print("this combination ran: " + "; ".join(r["what ran"] + ", " + r["date"] for r in same))
    else:
        print("all inside their ranges; this very combination was not run")
    return int(off > 0)


if __name__ == "__main__":
    sys.exit(main())
