"""What several methods share: formulas, starts, refusals. Knows no single method."""
