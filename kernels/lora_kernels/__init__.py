"""The operations that a multi-LoRA model needs beyond a plain one. Knows tensors and offsets; knows no models.

Each operation is a reference in plain torch, one or more implementations, a launcher that validates and chooses, and a
test that compares them.
"""
