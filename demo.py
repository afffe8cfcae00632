"""Draw before and after: `python demo.py concept=violence model.path=FOLDER`; `--help` lists all options."""

from trce_lightning.commands import demonstrate

if __name__ == "__main__":
    demonstrate()
