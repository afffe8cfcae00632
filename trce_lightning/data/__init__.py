"""The data of stage 2: planned trajectories, their cache, and the LightningDataModule that serves them."""
