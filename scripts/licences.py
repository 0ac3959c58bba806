"""docs/licences.md: what is installed with the service, and under which licence, as each package says itself.

python scripts/licences.py          prints it, for the packages that `scoreboard` and its extra `embedded` need
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution

EXTRAS = ("embedded",)


def needed(name: str, extras: tuple[str, ...] = ()) -> set[str]:
    """The packages that `name` needs, and those that they need; what does not apply here is left out."""
    found: set[str] = set()
    waiting = [(name, extras)]
    seen = set(waiting)
    while waiting:
        package, wanted = waiting.pop()
        for requirement in distribution(package).requires or ():
            parts = re.match(r"([\w.-]+)(?:\[([\w,.-]+)\])?", requirement)
            assert parts
            marker = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", requirement)
            if marker and marker[1] not in wanted:
                continue
            more = (_normal(parts[1]), tuple((parts[2] or "").split(",")))
            try:
                distribution(more[0])
            except PackageNotFoundError:  # for another system or Python
                continue
            found.add(more[0])
            if more not in seen:
                seen.add(more)
                waiting.append(more)
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(package: Distribution) -> str:
    """Its licence expression, or what its classifiers or its licence field say."""
    metadata = package.metadata
    expression = metadata.get("License-Expression")
    classifiers = [line.rsplit(" :: ", 1)[1] for line in metadata.get_all("Classifier") or () if "License" in line]
    said = (metadata.get("License") or "").strip().partition("\n")[0]
    return expression or ", ".join(classifiers) or said or "not said"


def main() -> None:
    """Print the list."""
    rows = ["| package | version | licence |", "|---|---|---|"]
    for name in sorted(needed("scoreboard", EXTRAS)):
        package = distribution(name)
        rows.append(f"| {package.metadata['Name']} | {package.version} | {licence(package)} |")
    sys.stdout.write("# Licences\n\nMade by `make audit`. What runs in production, with what it needs itself, and the ")
    sys.stdout.write("embedded services of `scoreboard dev`.\n\n" + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
