"""Update rules by name, one small file each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from asymcheck.codecs.rules.adam import ADAM, AMSGRAD
from asymcheck.codecs.rules.base import Rule
from asymcheck.codecs.rules.captured import CAPTURED, captured
from asymcheck.codecs.rules.descent import DESCENT
from asymcheck.codecs.rules.lion import LION
from asymcheck.codecs.rules.sgd import SGD

__all__ = ["CAPTURED", "RULES", "Rule", "rule_for"]

RULES: Mapping[str, Rule] = {rule.id: rule for rule in (ADAM, AMSGRAD, SGD, DESCENT, LION)}
_CAPTURED_RULES = {id: captured(rule) for id, rule in RULES.items()}


def rule_for(id: str, roles: Iterable[str]) -> Rule:
    """The rule of that name; if the gradient is among the roles, the one that is given it."""
    return (_CAPTURED_RULES if CAPTURED in roles else RULES)[id]
