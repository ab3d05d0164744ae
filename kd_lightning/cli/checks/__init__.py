"""Checks of the parsed arguments, before objects are built from them and before anything is written."""
