"""The files of data sets on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from trce_lightning.runtime.network import check_hub

__all__ = ["dataset_file"]


def dataset_file(hub_id: str, filename: str, revision: str | None = None) -> Path:
    """Return the local path of a file of the data set ``hub_id``. If it isn't cached, download it.

    Raises:
        FileNotFoundError: there is no such data set or file, no network or no permission. The message says
            which.
        InputError: the environment names an unusable proxy or address of the Hub.
    """
    # The import is slow, and users' own files don't need it.
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
