"""What a run needs of its machine: files, locks, signals, processes, the network."""
