"""Compare the method's costs with a plain version of the authors' procedure: `python -m benchmarks`."""
