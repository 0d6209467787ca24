"""PEFT's adapter directories: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

`types/` has a file for each PEFT type that can be read: adding one edits nothing else.
"""
