"""Measurements from the op to the server; see README.md here. Importing it settles how compute threads wait."""

from lora_kernels.threads import spin_briefly

spin_briefly()
