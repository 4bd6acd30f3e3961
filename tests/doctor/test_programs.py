"""The doctor on broken programs that others ran into, and on the same programs mended.

`pytest tests/doctor/test_programs.py -k table -s` prints what it finds in each.
"""

import functools

import programs
import pytest
import torch

from bnlib.doctor import RULES, diagnose

BY_NAME = {program.name: program for program in programs.PROGRAMS}
SEEN = [name for name, program in BY_NAME.items() if not program.blind]
BLIND = [name for name, program in BY_NAME.items() if program.blind]


pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def report(name, mended):
    torch.manual_seed(1)
    return diagnose(**BY_NAME[name].run(mended))


def right(name):
    """Return the findings of the right rules in the broken program."""
    return [f for f in report(name, mended=False).findings if f.slug in BY_NAME[name].rules]


def is_caught(name):
    """Tell whether a right rule names each layer that it must, and no healthy one."""
    program = BY_NAME[name]
    layers = {finding.layer for finding in right(name)}
    named = all(layers.intersection(either.split("|")) for either in program.at)
    return bool(layers) and named and not layers.intersection(program.not_at)


def false_alarms(name):
    """Return what the doctor says about the mended program, but notes of other rules."""
    findings = report(name, mended=True).findings
    rules = BY_NAME[name].rules
    return [f for f in findings if f.severity != "note" or f.slug in rules]


def described(findings):
    return [
        f"{f.severity} {f.slug} at {f.layer!r}: {f.value:.3g} ({f.threshold})" for f in findings
    ]


@pytest.mark.parametrize("name", SEEN)
def test_names_the_mistake_at_its_layer(name):
    assert is_caught(name), described(report(name, mended=False).findings)


@pytest.mark.parametrize("name", BY_NAME)
def test_is_silent_when_it_is_mended(name):
    assert described(false_alarms(name)) == []


@pytest.mark.parametrize("name", BLIND)
def test_does_not_see_what_it_is_said_not_to_see(name):
    findings = [f for f in report(name, mended=False).findings if f.severity != "note"]
    assert described(findings) == [], "it does: move the program, and rewrite chapter 16"


@pytest.mark.parametrize("slug", RULES)
def test_every_rule_has_a_program(slug):
    assert any(slug in program.rules for program in programs.PROGRAMS)


def test_the_programs_come_from_threads():
    threads = {program.thread for program in programs.PROGRAMS}
    assert len(programs.PROGRAMS) >= 25
    assert len(threads) >= 25


def table():
    """Return a line for each program: what was to be found, and what the doctor did."""
    lines = [f"{'program':36} {'thread':28} {'rule':26} broken   mended"]
    for name, program in BY_NAME.items():
        broken = "caught" if is_caught(name) else "blind" if program.blind else "MISSED"
        mended = "silent" if not false_alarms(name) else "FALSE ALARM"
        rule = " or ".join(program.rules) or "-"
        lines.append(f"{name:36} {program.thread:28} {rule:26} {broken:8} {mended}")
    caught, alarms = sum(map(is_caught, BY_NAME)), sum(map(bool, map(false_alarms, BY_NAME)))
    missed = len(BY_NAME) - caught
    lines.append(f"{caught} caught, {missed} missed ({len(BLIND)} foreseen), {alarms} false alarms")
    return "\n".join(lines)


def test_table():
    print(table())
    assert table().endswith(
        f"{len(SEEN)} caught, {len(BLIND)} missed ({len(BLIND)} foreseen), 0 false alarms"
    )
