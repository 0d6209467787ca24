"""AdapterHub's architectures, a file each: `KINDS` are the names of its modules in keys, `read(saved, options, part)`
adds the deltas.
"""
