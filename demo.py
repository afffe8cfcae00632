"""Draw before and after: `python demo.py concept=violence model.path=FOLDER`; `--help` lists all options."""

from trce_lightning.cli import demonstrate

if __name__ == "__main__":
    demonstrate()
