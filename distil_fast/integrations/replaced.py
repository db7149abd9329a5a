"""Attributes of a host's object, replaced by ours until they are put back; and the check that the host is as expected.

It knows no host. An attribute that the object had only from its class is deleted again by `undo`, so that nothing of
ours stays behind. Next: the file of a host, such as trl.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Final

_ABSENT: Final = object()


class HostChangedError(RuntimeError):
    """The host's code has not the shape that this integration was written for; nothing was replaced."""


class Replaced:
    """What `apply` returns: the replacements made, in a `with` block or until `undo()`.

    Args:
        target: the host's object (a trainer, a recipe, a loss), never a module.
        attributes: names and what they become. All are set, or none.

    Raises:
        HostChangedError: `target` has no attribute of such a name.
    """

    def __init__(self, target: object, /, **attributes: object) -> None:
        for name in attributes:
            if not hasattr(target, name):
                raise HostChangedError(
                    f"{type(target).__name__}: expected an attribute {name!r}, which this version does not have. "
                    "docs/integrations.md names the versions that were tested."
                )
        self._target = target
        self._before = {name: _own(target, name) for name in attributes}
        for name, value in attributes.items():
            setattr(target, name, value)

    def undo(self) -> None:
        """Put back what was there. A second call does nothing."""
        before, self._before = self._before, {}
        for name, value in before.items():
            if value is _ABSENT:
                delattr(self._target, name)
            else:
                setattr(self._target, name, value)

    def __enter__(self) -> Replaced:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _own(target: object, name: str) -> Any:
    """What the object itself holds, or _ABSENT where its class provides the attribute."""
    if name in getattr(target, "__dict__", {}):
        return vars(target)[name]
    modules = getattr(target, "_modules", {})  # of an nn.Module, which keeps its children there
    return modules.get(name, _ABSENT)


def expect_parameters(function: Callable[..., Any], expected: Iterable[str], host: str) -> None:
    """Refuse a host's function that lacks parameters by which it is called, before anything is replaced.

    Raises:
        HostChangedError: it names host, function and what is missing.
    """
    found = inspect.signature(function).parameters
    name = getattr(function, "__qualname__", repr(function))
    missing = [parameter for parameter in expected if parameter not in found]
    if missing:
        raise HostChangedError(
            f"{host}: expected {name} to take {', '.join(missing)}, and it takes ({', '.join(found)}). "
            "docs/integrations.md names the versions that were tested."
        )
