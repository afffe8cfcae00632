"""The options: their schema, what is refused before a run starts, and how arguments are read."""
