"""Update rules by name, one small file each."""

from __future__ import annotations

from collections.abc import Mapping

from asymcheck.codecs.rules.adam import ADAM, AMSGRAD
from asymcheck.codecs.rules.base import Rule
from asymcheck.codecs.rules.lion import LION
from asymcheck.codecs.rules.sgd import SGD

__all__ = ["RULES", "Rule"]

RULES: Mapping[str, Rule] = {rule.id: rule for rule in (ADAM, AMSGRAD, SGD, LION)}
