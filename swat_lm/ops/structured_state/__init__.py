"""S4's state space as functions: a structured system, its taps, its steps, and what a chunk does to a state."""
