"""What `deltaspec.plan` stands on: sites, proof that they are reached, budgets, expectations, and the plan as data."""
