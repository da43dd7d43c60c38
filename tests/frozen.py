"""The last import of the server of ranks.py, alone here because an import is all that it can be told: nothing imported
before is looked at by the garbage collector again, so that the ranks do not copy the pages of it.
"""

import gc

gc.collect()
gc.freeze()
