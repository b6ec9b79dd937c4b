"""Measurements from the op to the server; see README.md here. Importing it settles how compute threads wait,
and how many compiled products stay in memory."""

from lora_kernels.process import hold_to_quota, keep_few_primitives, spin_briefly

spin_briefly()
hold_to_quota()
keep_few_primitives()
