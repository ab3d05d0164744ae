"""A smaller model cut from a larger one: which layers and neurons matter, and the cut, which checks itself."""
