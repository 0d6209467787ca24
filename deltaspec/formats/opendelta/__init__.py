"""OpenDelta's directories: `config.json` with a `delta_type`, and `pytorch_model.bin`.

`types/` has a file for each delta type: adding one edits nothing else.
"""
