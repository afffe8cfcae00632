"""Generating images: the one loop, samplers, LoRAs, and the folder that images are kept in."""
