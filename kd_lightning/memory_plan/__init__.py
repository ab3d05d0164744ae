"""The memory of one training step, planned on fake tensors."""
