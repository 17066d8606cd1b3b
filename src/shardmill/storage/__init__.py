"""Bytes and URLs: reading checkpoints, the store, and publishing. Nothing here computes on tensors."""
