"""Two tokenizers: what their tokens stand for, and where both have read the same bytes."""
