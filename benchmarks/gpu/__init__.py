"""The parts of the operator's benchmark on GPUs: shapes, work, peers, verification, comparison, a training step."""
