"""Quantized models of bitsandbytes and torchao: settings, layers and their plain weights, sizes for a plan."""
