"""What can be measured of a trained model: benchmarks, loss against length, recall, reach, what attention does."""
