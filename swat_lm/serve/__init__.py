"""Running a trained model: sampling and endless streams over a state of constant size."""
