"""Models and checkpoints over several ranks."""
