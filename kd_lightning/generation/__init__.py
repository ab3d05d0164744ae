"""Responses generated offline, by a model in this process or by a server, into a file."""
