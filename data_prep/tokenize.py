#!/usr/bin/env python
"""Turn a corpus into token files: `python data_prep/tokenize.py --help`.

This file has the name of a module of the standard library. Python puts a script's own folder (or, for `-c`
and for spawned workers, the current one) first on sys.path, so inspect, linecache and with them torch would
import this file in place of the true `tokenize`. Hence, before any other import, this folder is taken off
sys.path; and if the file is imported as `tokenize` all the same, it loads the true module and leaves its
place to it.
"""

import os
import sys

_FOLDER = os.path.dirname(os.path.realpath(__file__))
_ROOT = os.path.dirname(_FOLDER)


def _mend_path() -> None:
    """Replace this folder on sys.path by the repository's root, before other code with the same names."""
    sys.path[:] = [_ROOT, *(entry for entry in sys.path if os.path.realpath(entry) not in (_FOLDER, _ROOT))]
    os.environ["PYTHONSAFEPATH"] = "1"  # a worker starts without the current folder on its path, too


def _step_aside() -> None:
    """Put the standard library's `tokenize` into sys.modules in place of this module."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    elsewhere = [entry for entry in sys.path if os.path.realpath(entry) != _FOLDER]
    spec = PathFinder.find_spec("tokenize", elsewhere)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("No module named 'tokenize' in the standard library", name="tokenize")
    module = sys.modules["tokenize"] = module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "tokenize":
    _step_aside()
elif __name__ in ("__main__", "__mp_main__"):
    _mend_path()

if __name__ == "__main__":
    from data_prep import terminal

    terminal.begin()  # before the imports that take seconds
    from data_prep.app import main

    main()
