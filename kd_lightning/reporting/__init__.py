"""A run on disk: its folder, its figures, its report."""
