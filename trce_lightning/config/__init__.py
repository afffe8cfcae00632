"""The options: their schema, the checks before a run starts, and the parser of arguments."""
