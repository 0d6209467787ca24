"""OpenDelta's delta types, a file each, named as `delta_type`: `INFIXES` are the names of its modules in keys,
`read(saved, options, part)` adds the deltas.
"""
