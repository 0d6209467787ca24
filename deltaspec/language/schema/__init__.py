"""The JSON Schema."""
