"""Formats: adapters that other libraries wrote, read as specs with tensors; and deltas written as others read them.

Knows what `storage` reads and writes, not the compiled model.

Each package in here is a format: PEFT, AdapterHub, OpenDelta. Adding one edits nothing else.
"""
