"""Run each command: turn a checked configuration into a folder of results."""
