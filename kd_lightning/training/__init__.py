"""The training step: student with its loss, accumulation, evaluation."""
