"""What to do after a module of PyTorch is imported that ``import selfattn`` leaves alone, since it takes long."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Finder(importlib.abc.MetaPathFinder):
    """Has ``then`` run after the module's own code, once."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_then(module: ModuleType) -> None:
            run(module)
            self.then(module)

        spec.loader.exec_module = run_and_then
        return spec


def when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Calls ``then(module)`` now if the module is imported, or when it is. Several calls for one module are all made;
    a package that is imported a second time repeats its own."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, then))
