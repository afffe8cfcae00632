"""Erase a concept: `python train.py concept=violence`; `--help` lists every option."""

from trce_lightning.commands import train

if __name__ == "__main__":
    train()
