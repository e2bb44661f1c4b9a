"""Every fault that the README speaks of, and every one of the list below, has its tests.

A test that shows a fault begins with its number, as `test_f05_...`, or with several.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

FAULTS = (*range(1, 14), 15, *range(33, 39), *range(44, 53))
"""Of checkpoints, numbers and the environment; other numbers are of faults in weights and data."""


def names_of_tests() -> set[str]:
    """The test functions and methods of all modules, found without importing them."""
    return {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def numbers_of(name: str) -> set[int]:
    """`test_f05_f06_x` -> {5, 6}."""
    head = re.match(r"test((?:_f\d\d)*)_", name)
    return {int(number) for number in re.findall(r"\d\d", head[1])} if head else set()


def reliability() -> list[list[str]]:
    """The cells of the rows of the README's table of faults, as fault, what happens, tests."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Reliability\n")[2]
    lines = section.partition("\n## ")[0].splitlines()
    rows = [line.strip("|").split(" | ") for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_every_fault_has_a_test():
    shown = {number for name in names_of_tests() for number in numbers_of(name)}
    assert not set(FAULTS) - shown, "faults that no test is named after"


def test_every_fault_that_is_told_names_tests_that_there_are():
    rows, there = reliability(), names_of_tests()
    assert len(rows) > 10 and {len(row) for row in rows} == {3}
    named = {fault: re.findall(r"`(test_\w+)`", tests) for fault, _, tests in rows}
    assert not [fault for fault, tests in named.items() if not tests]
    missing = [test for tests in named.values() for test in tests if test not in there]
    assert not missing


def test_the_numbers_of_a_name():
    assert numbers_of("test_f05_f06_damage") == {5, 6}
    assert numbers_of("test_flags") == numbers_of("test_a_f05_x") == set()
