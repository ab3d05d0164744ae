"""Causal language models: loading, LM heads, adapters, generation."""
