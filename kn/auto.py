"""`import kn` makes its models known to transformers' AutoConfig and AutoModel, before or after transformers is imported.

Importing transformers takes seconds, so `import kn` does not: where it is not there yet, an import hook waits for the
module of AutoConfig. Its modules import each other in circles, so even then kn.config is imported only when one of
kn's model types is asked for; a configuration brings its models (config.py).
"""

import sys
from importlib import import_module
from importlib.machinery import PathFinder

AWAITED = "transformers.models.auto.configuration_auto"
TYPES = ("kngpt2", "knllama")


class _Registered(dict):
    """What AutoConfig.register keeps, with kn's configurations added when they are first asked for."""

    def __contains__(self, key):
        if key in TYPES and not super().__contains__(key):
            import_module("kn.config")
        return super().__contains__(key)


def wait(module) -> None:
    """Let the module of AutoConfig know kn's model types."""
    known = module.CONFIG_MAPPING
    known._extra_content = _Registered(known._extra_content)  # private to the pinned transformers: tests/test_auto.py would see it go


class _Finder:
    """Finds AWAITED as Python does, and adds to it after its code has run."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != AWAITED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_wait(module):
                run(module)
                sys.meta_path.remove(_Finder)
                wait(module)

            spec.loader.exec_module = run_and_wait
        return spec


def register() -> None:
    """Make the model types known now where AutoConfig's module exists, otherwise as soon as it does."""
    if AWAITED in sys.modules:
        wait(sys.modules[AWAITED])
    elif _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
