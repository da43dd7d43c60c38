"""Uploads an exported folder to the Hugging Face hub. Not part of export.py, which needs torch."""

from pathlib import Path

from data_prep.errors import headline

from .folder import HFModel


def push(folder: Path, repo: str, private: bool) -> str:
    """Uploads all files of the folder to the model repository OWNER/NAME, which is created if it does not exist.

    private: of a new repository. Returns its address. Raises ValueError if the folder is not a model, the hub knows no
    token of this machine, or the hub refuses.
    """
    owner, slash, name = repo.partition("/")
    if not (owner and slash and name) or "/" in name:
        raise ValueError(f"repo={repo} must be OWNER/NAME, such as repo=me/my-model")
    HFModel(folder)
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HTTPError  # of the HTTP client that it uses; its own errors are of this class

    token = get_token()
    if token is None:
        raise ValueError(
            f"repo={repo} needs a token that may write to it: run `hf auth login`, or set HF_TOKEN"
            " (made on the hub, under Settings, Access Tokens)"
        )
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model trained with Rowshard")
    except (HTTPError, RuntimeError) as error:  # RuntimeError: of one file
        raise ValueError(f"repo={repo} could not be written: {headline(error.__cause__ or error)}") from error
    return str(url)
