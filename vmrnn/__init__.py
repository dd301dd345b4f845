"""VMRNN: what the two networks share. Imports nothing from the top level of the repository."""
