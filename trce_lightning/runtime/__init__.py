"""The services of the machine that a run uses: files, locks, signals, processes and the network."""
