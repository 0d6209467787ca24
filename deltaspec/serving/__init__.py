"""A delta for each row of a batch: assignment, regions in which every row has tensors of its own, and their trial."""
