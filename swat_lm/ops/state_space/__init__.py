"""The state space layer of Mamba-2 as a function: a linear recurrence with one decay per head and token."""

from swat_lm.ops.state_space.contract import state_space_scan, state_space_step
from swat_lm.ops.state_space.summary import state_space_summary

__all__ = ["state_space_scan", "state_space_step", "state_space_summary"]
