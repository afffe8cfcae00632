"""Attacks: ways to make an erased model show the concept again. One file is one attack."""
