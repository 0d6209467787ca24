"""The JSON Schema of specs: generated from the models, and the quick way to say that a document fits it."""
