"""Upload a run's adapter, or an exported folder, to a repository of the hub.

Of the functions here, only `push` uses the network. The access token comes from HF_TOKEN or from
`hf auth login`. This program writes the token to no file and to no command line. From a run's
folder, only the files in PUBLISHED are uploaded. config.json, metrics.jsonl and the checkpoints are
not uploaded, because they contain paths of this machine or are useless to other people.
"""

import json
from pathlib import Path, PurePosixPath

from phogpt_raw.files import read_object
from phogpt_raw.messages import _
from phogpt_raw.refusal import Refusal

# The files that are uploaded from the folder of a run or of a checkpoint.
PUBLISHED = ("adapter_model.safetensors", "adapter_config.json", "README.md", "loss.png",
             "loss.svg")
EXPORTED = ("*.safetensors", "*.bin", "*.gguf")  # an exported folder has one of these files


def files_to_push(folder: Path) -> list[Path]:
    """The files that `push` uploads.

    For a run these are the files in PUBLISHED; for an exported folder, all files that are not
    hidden. Raises Refusal if the folder contains neither an adapter nor a model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise Refusal(f"{folder}: no such folder to upload")
    if (folder / "adapter_model.safetensors").is_file():
        return [folder / name for name in PUBLISHED if (folder / name).is_file()]
    run = any((folder / name).is_file() for name in ("metrics.jsonl", "adapter_config.json"))
    if run or not any(file for kind in EXPORTED for file in folder.glob(kind)):
        raise Refusal(f"{folder}: holds no adapter and no exported model; name the folder of a "
                      f"run that has ended, or one that python -m phogpt_raw.export has written")
    return [file for file in sorted(folder.iterdir())
            if file.is_file() and not file.name.startswith(".")]


def in_words(folder: Path, repo: str) -> str:
    """A line with the names and the size of the files, to be printed before the upload."""
    files = files_to_push(folder)
    return _("to {repo}: {names} ({mb:,.1f} MB)", repo=repo, mb=sum(file.stat().st_size
             for file in files) / 1e6, names=", ".join(file.name for file in files))


def check(repo: str) -> None:
    """Raise Refusal for a wrong name, no token or no network access, before anything is written."""
    from huggingface_hub import constants, errors, get_token
    from huggingface_hub.utils import validate_repo_id

    if repo.count("/") != 1 or not all(repo.split("/")):
        raise Refusal(f"--push {repo}: must be USER/NAME")
    try:
        validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise Refusal(f"--push {repo}: not a name the hub allows ({first_line(error)})") from None
    if constants.HF_HUB_OFFLINE:
        raise Refusal(f"--push {repo}: HF_HUB_OFFLINE is set; unset it to upload")
    if not get_token():
        raise Refusal(f"--push {repo}: no token; make one with write access on "
                      f"https://huggingface.co/settings/tokens and set HF_TOKEN, or use "
                      f"hf auth login")


def push(folder: Path, repo: str, *, private: bool = True) -> str:
    """Upload files_to_push(folder) in one commit to the model repository `repo`; return its URL.

    repo: USER/NAME on the hub. It is created if it does not exist. A new repository is private by
    default, because a publication cannot be undone. An existing repository keeps its visibility.
    Any error of the hub or of the network is raised as a Refusal of one line.
    """
    check(repo)
    files = files_to_push(folder)
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub import errors as hub

    api = HfApi()
    parts = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=content(file))
             for file in files]
    try:
        where = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(repo, parts, commit_message="Upload by phogpt-raw")
    except hub.HfHubHTTPError as error:
        raise Refusal(f"--push {repo}: {why(error)}") from None
    except (hub.HTTPError, OSError, RuntimeError) as error:  # hf_xet raises RuntimeError
        raise Refusal(f"--push {repo}: the hub does not answer ({type(error).__name__}); try "
                      f"again while online") from None
    except ValueError as error:  # the hub checks README.md before the upload
        raise Refusal(f"--push {repo}: the hub refuses the files "
                      f"({' '.join(str(error).split())})") from None
    return str(where)


def content(file: Path) -> str | bytes:
    """The path of the file, or for adapter_config.json its bytes.

    In these bytes, the path of a base's folder is shortened to the folder's name:
    /home/me/models/PhoGPT-4B becomes PhoGPT-4B.
    """
    if file.name != "adapter_config.json":
        return str(file)
    config = read_object(file, "nothing was uploaded")
    base = config.get("base_model_name_or_path") or ""
    local = base.startswith(("/", ".", "~")) or "\\" in base or base.count("/") > 1
    if base and (local or Path(base).is_dir()):
        config["base_model_name_or_path"] = PurePosixPath(base.replace("\\", "/")).name
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def why(error) -> str:
    """The reason for an error of the hub, in words."""
    status = error.response.status_code
    reasons = {
        401: "the token is not valid; set HF_TOKEN to one with write access",
        403: "the token may not write there; use a token of the owner, with write access",
        404: "no such repository or user, or the token may not see it",
    }
    said = " ".join((error.server_message or "").split())
    reason = reasons.get(status, f"the hub answers {status}")
    return f"{reason} (the hub: {said})" if said else reason


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
