"""AdapterHub's directories: `adapter_config.json` and `pytorch_adapter.bin` (or safetensors), with heads and setups.

`architectures/` has a file for each architecture of configurations: adding one edits nothing else.
"""
