"""How the simulated engine's loops are compiled: once on a machine, then found in the cache beside the source.

`compiled` functions stay functions; `inlined` ones become part of the compiled code that calls them, where a call
would cost as much as what they do.
"""

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from numba import njit

Function = TypeVar("Function", bound=Callable[..., object])

# Numba looks only at a function's own file to tell whether its cached code is current. It holds the code of functions
# from other files too, so here every compiled function depends on all files that have any.
_FOLDER = Path(__file__).parent
_FILES = sorted([*_FOLDER.glob("*.py"), *(_FOLDER.parent / "virtual").glob("*.py")])
_STAMP = blake2b(b"".join(path.read_bytes() for path in _FILES)).hexdigest()


def compiled(function: Function) -> Function:
    """Compile `function`."""
    return _compile(function, forceinline=False)


def inlined(function: Function) -> Function:
    """Compile `function` into those that call it."""
    return _compile(function, forceinline=True)


def _compile(function: Function, *, forceinline: bool) -> Function:
    dispatcher: Any = njit(cache=True, forceinline=forceinline, error_model="numpy")(function)
    dispatcher._cache._cache_file._source_stamp = _STAMP  # noqa: SLF001 - numba has no public way
    called_alike: Function = dispatcher
    return called_alike
