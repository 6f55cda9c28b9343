"""Running a trained model: many requests at once, sampling, endless streams over a state of constant size."""
