"""Answers questions before a run: what fits which device, how long it takes, what it costs, what to choose and why.

Arithmetic on shapes alone: `shapes -> memory | serving | timing -> hardware -> recommend`. Knows no tensors, and no
files but a base's config.json. Every answer carries its assumptions.
"""
