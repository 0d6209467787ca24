"""Formats: adapters that other libraries wrote, read as specs with tensors; and deltas written as others read them.

Each package in here is a format: PEFT, AdapterHub, OpenDelta. Adding one edits nothing else.
"""
