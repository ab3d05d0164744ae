"""Log-probabilities of prompts from servers."""
