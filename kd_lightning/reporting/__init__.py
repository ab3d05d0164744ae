"""A run on disk: its folder, its figures and its report."""
