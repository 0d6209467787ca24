"""Libraries: directories of saved deltas whose names a model knows, and whose tensors it loads when they are needed.

Knows the active set and what `storage` reads, not the compiled model.

`c.library(dir)` reads manifests alone. What `attach`, `only` and the like name is then loaded: planned once for all
saved deltas that are alike, checked like `c.load` checks, and put into a row of its kind's stack. Those that were not
used for longest, and are not attached, are dropped again when there are more than `limit`.
"""
