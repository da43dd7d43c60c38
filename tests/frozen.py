"""Freezes the garbage collector's objects; the server of ranks.py imports this module last.

The collector then never visits the modules imported before, so the forked ranks do not copy their memory pages. The
code is in a module because a forkserver can only import.
"""

import gc

gc.collect()
gc.freeze()
