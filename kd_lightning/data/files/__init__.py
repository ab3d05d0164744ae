"""Rows of tables and of plain text files."""
