"""What is known to differ, with the reason. Each is tested: one that no longer differs fails `make interop`."""

from collections.abc import Callable

from cases import Case

KNOWN: list[tuple[Callable[[str, Case, str], bool], str]] = []
