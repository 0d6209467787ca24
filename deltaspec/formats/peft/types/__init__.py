"""The PEFT types that can be read, a file each, named as `peft_type` in lower case: `read(adapter)` adds the deltas."""
