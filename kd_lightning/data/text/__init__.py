"""Details of text: what a chat template expects of its turns, and how its text becomes token ids."""
