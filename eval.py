"""Score a pipeline: `python eval.py concept=violence model.path=FOLDER`; `--help` lists all options."""

from trce_lightning.commands import evaluate

if __name__ == "__main__":
    evaluate()
