"""What is wrong with a document, in its author's words."""
