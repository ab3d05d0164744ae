"""Rows without padding: their layout, and the check that a model keeps them apart."""
