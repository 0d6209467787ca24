"""What `deltaspec.select` stands on: atoms as predicates, patterns of names, and ways out where nothing matches."""
