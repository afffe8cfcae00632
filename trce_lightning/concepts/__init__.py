"""Concepts: their terms, the rule by which a text names one, and terms drafted by a language model."""

from trce_lightning.concepts.concept import Concept, PromptPair, load_concept, prompt_pairs

__all__ = ["Concept", "PromptPair", "load_concept", "prompt_pairs"]
