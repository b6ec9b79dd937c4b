"""The operations in Triton, for CUDA tensors. Importing this package needs no Triton; importing its kernels does."""
