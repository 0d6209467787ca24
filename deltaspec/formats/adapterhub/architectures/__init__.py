"""AdapterHub's architectures, a file each: `read(adapter, options, part)` adds the deltas."""
