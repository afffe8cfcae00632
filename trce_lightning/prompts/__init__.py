"""Prompts: records, files, published sets, the sets of a concept, prompts to keep, and variants."""
