"""The losses in other training loops: a module for DDP, FSDP2, Fabric, Accelerate, and a mixin for HF's Trainer."""
