"""Rows that are tokenized: what a run asks of them, and the teacher's own input."""
