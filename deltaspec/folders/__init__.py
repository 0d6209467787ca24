"""Models as folders of safetensors, one shard in memory at a time: deltas merged into one, and extracted from two.

Uses plans and saved sets; no compiled model is made.
"""

from deltaspec.folders.merge import merge_folder as merge_folder

__all__ = ["merge_folder"]
