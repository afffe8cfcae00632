"""Erasers: methods that take a concept out of a model. One file is one method."""
