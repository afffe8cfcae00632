"""The costs of the method beside a plain implementation of the authors' procedure: `python -m benchmarks`."""
