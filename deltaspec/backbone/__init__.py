"""What is known of a model, and how to run it without writing to it."""
