"""What each command does, from a checked configuration to a folder of results."""
