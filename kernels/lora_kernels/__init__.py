"""The operations that a multi-LoRA model needs beyond a plain one. Knows tensors and offsets; knows no models.

One folder per operation: `reference.py` in plain torch defines it, `batch.py` or `weight.py` holds its data,
`launcher.py` checks and chooses an implementation (C in `native/`, Triton beside it), and a test compares them.
"""
