"""Pickles read without running any of them: a closed list of opcodes, and one of names.

Nothing that a pickle names is imported. In the place of a class or function stands a record that
keeps what it was given and does nothing, of a class made anew for every use, so that nothing that
a pickle does outlives it.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from asymcheck.errors import SourceError

MAX_NBYTES = 256 << 20
"""Of a pickle; as objects it may take some fifty times as much."""

_OPCODES = frozenset(
    {
        *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK"),
        *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4"),
        *("BINFLOAT", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
        *("EMPTY_SET", "ADDITEMS", "FROZENSET"),
        *("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
        *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
    }
)
_ALLOCATING = frozenset({"FRAME", "LONG_BINPUT"})
_PUTS = frozenset({"BINPUT", "LONG_BINPUT", "MEMOIZE"})
_GETS = frozenset({"BINGET", "LONG_BINGET"})
_TUPLES = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
_MARK = -1
_MAX_NESTING = 1000


class Record:
    """Stands for an object: holds what the pickle says of it.

    Attributes:
        kind: the name that it stands for, with its module.
        args: what it was made of.
        state: what it was given afterwards.
    """

    kind: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: object) -> Any:  # noqa: D102
        self = super().__new__(cls)
        self.args, self.state = args, {}
        return self

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Any:
        return self.state[name]


class Member(Record):
    """Stands for `getattr`, by which Python before 3.11.4 pickles members of enumerations."""

    def __new__(cls, *args: object) -> Any:  # noqa: D102
        owner = args[0] if args else None
        if not (isinstance(owner, type) and issubclass(owner, Record)):
            raise SourceError("the pickle refers to an attribute", found="builtins.getattr")
        return owner()


class Size(Record):
    """Stands for `torch.Size`: a tuple of integers, and so of no other tuples."""

    def __new__(cls, *args: Any) -> Any:  # noqa: D102
        numbers = tuple(args[0])
        if any(type(number) is not int for number in numbers):
            raise SourceError("a size is no tuple of integers", found=cls.kind)
        return numbers


Names = Mapping[str, Any]
"""{name with its module: what stands for it}; a kind of `Record` gets a class of its own.

What can be called and is no record must change nothing, and make no tuples.
"""


def read(
    data: bytes, names: Names, what: str, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """What a pickle holds, with inert stand-ins.

    Args:
        data: the pickle.
        names: the names that it may refer to.
        what: what is read, for errors.
        persistent: gives the object for a persistent id; without it there may be none.

    Raises:
        SourceError: it refers to another name, uses an opcode that plain data do not need, is
            malformed, or too large; none of it was run.
    """
    if len(data) > MAX_NBYTES:
        raise SourceError(f"the pickle of {what} is too large", found=f"{len(data)} bytes")
    try:
        _check_opcodes(data, what)
        return _Unpickler(data, names, what, persistent).load()
    except SourceError:
        raise
    except Exception as error:  # a malformed pickle can make it raise anything
        raise SourceError(f"{what} is malformed", found=glimpse(error)) from error


def glimpse(error: Exception) -> str:
    """An error in a few words, however large what it speaks of is."""
    return f"{type(error).__name__}{reprlib.repr(error.args)}"[:200]


def _check_opcodes(data: bytes, what: str) -> None:
    """Walk through a pickle without executing it."""
    nesting = _Nesting()
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            problem = "uses an opcode that plain data do not need; none of it was run"
        elif opcode.name in _ALLOCATING and int(argument or 0) > len(data):
            problem = "asks for more memory than it can fill"
        elif nesting.after(opcode, argument) > _MAX_NESTING:
            problem = "nests tuples too deep"
        else:
            continue
        raise SourceError(f"{what} {problem}", offset=position, found=opcode.name)


class _Nesting:
    """How deep the tuples on a pickle's stack are nested: to hash one takes as much C stack.

    Only these opcodes make tuples, provided that nothing that stands for a callable does.
    """

    def __init__(self) -> None:
        self._depths: list[int] = []
        self._memo: dict[int, int] = {}

    def after(self, opcode: pickletools.OpcodeInfo, argument: Any) -> int:
        """The depth of the topmost object, once the opcode is executed."""
        if opcode.name in _PUTS:
            self._memo[len(self._memo) if argument is None else argument] = self._depths[-1]
        elif opcode.name in _GETS:
            self._depths.append(self._memo[argument])
        elif opcode.name == "MARK":
            self._depths.append(_MARK)
        else:
            taken = self._take(opcode)
            depth = 1 + max(taken, default=0) if opcode.name in _TUPLES else 0
            self._depths += [depth] * len(opcode.stack_after)
        return self._depths[-1] if self._depths else 0

    def _take(self, opcode: pickletools.OpcodeInfo) -> list[int]:
        taken: list[int] = []
        before = len(opcode.stack_before)
        if pickletools.markobject in opcode.stack_before:
            while (depth := self._depths.pop()) != _MARK:
                taken.append(depth)
            before = opcode.stack_before.index(pickletools.markobject)
        return taken + [self._depths.pop() for _ in range(before)]


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, data: bytes, names: Names, what: str, persistent: Callable[[Any], Any] | None
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._names = names
        self._what = what
        self._persistent = persistent

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        if name not in self._names:
            raise SourceError(
                f"{self._what} refers to something that has no place in it; none of it was run",
                found=name[:200],
            )
        found = self._names[name]
        if isinstance(found, type) and issubclass(found, Record):
            return type(global_name, (found,), {"kind": name})
        return found

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise SourceError(
                f"{self._what} refers to something outside of it", found=str(pid)[:80]
            )
        return self._persistent(pid)
