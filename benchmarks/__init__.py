"""What the method costs, next to a plain implementation of the authors' procedure: `python -m benchmarks`."""
