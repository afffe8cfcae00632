"""Compare all methods: `python -m trce_lightning.leaderboard`; `--help` lists all options."""

from trce_lightning.commands import leaderboard

if __name__ == "__main__":
    leaderboard()
