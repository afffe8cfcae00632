"""The generation of images: the one loop, guidance, samplers, LoRAs, and the folders of images."""
