#!/usr/bin/env python
"""Turns a corpus into token files: `python data_prep/tokenize.py --help`.

This file has the same name as a module of the standard library. Python puts a script's own folder (for `-c` and for
spawned workers: the current one) first on sys.path, so inspect, linecache and torch would import this file instead of
the standard `tokenize`. Therefore this folder is removed from sys.path before any other import. If the file is still
imported as `tokenize`, it loads the standard module in its place.
"""

import os
import sys

_FOLDER = os.path.dirname(os.path.realpath(__file__))
_ROOT = os.path.dirname(_FOLDER)


def _mend_path() -> None:
    """Replaces this folder on sys.path by the repository's root, ahead of other code with the same names."""
    sys.path[:] = [_ROOT, *(entry for entry in sys.path if os.path.realpath(entry) not in (_FOLDER, _ROOT))]
    os.environ["PYTHONSAFEPATH"] = "1"  # workers also start without the current folder on the path


def _step_aside() -> None:
    """Puts the standard library's `tokenize` into sys.modules in place of this module."""
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
    from data_prep import fork_server, terminal

    terminal.begin()  # before the slow imports
    fork_server.start_early()
    from data_prep.app import main

    main()
