"""Choose the options of methods: `python -m trce_lightning.tune methods=[esd,uce] trials=8`."""

from trce_lightning.commands import tune

if __name__ == "__main__":
    tune()
