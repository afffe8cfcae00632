"""Files of data sets on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from trce_lightning.runtime.network import check_hub

__all__ = ["dataset_file"]


def dataset_file(hub_id: str, filename: str, revision: str | None = None) -> Path:
    """A file of the data set ``hub_id``, from the local cache where it is.

    ``FileNotFoundError`` saying why it can't be had: no such data set or file, no network, no permission.
    ``InputError`` where the environment names a proxy or an address of the Hub that is none.
    """
    # Slow to import, and needed for no file of one's own.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
    )

    check_hub()
    try:
        return Path(hf_hub_download(hub_id, filename, repo_type="dataset", revision=revision))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{filename} of {hub_id} can't be had from the Hub ({type(error).__name__})"
        ) from error


HUB_FILE = r"hub:(?P<hub_id>[^/@]+/[^/@]+)/(?P<file>[^@]+)(?:@(?P<revision>.+))?"
