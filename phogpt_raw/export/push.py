"""A run's adapter, or an exported folder, uploaded to a repository of the hub.

Only `push` uses the network. The token is that of HF_TOKEN or of `hf auth login`; it is in no file
and on no command line. Of a run's folder only the files in PUBLISHED are uploaded. Its config.json,
metrics.jsonl and checkpoints are not: they contain paths of this machine, or are of no use to
others.
"""

import json
from pathlib import Path, PurePosixPath

from phogpt_raw.files import read_object
from phogpt_raw.messages import _
from phogpt_raw.refusal import Refusal

# of the folder of a run or of a checkpoint
PUBLISHED = ("adapter_model.safetensors", "adapter_config.json", "README.md", "loss.png",
             "loss.svg")
EXPORTED = ("*.safetensors", "*.bin", "*.gguf")  # one of these makes a folder an exported one


def files_to_push(folder: Path) -> list[Path]:
    """What `push` uploads: PUBLISHED of a run, of an exported folder every file that is not hidden.

    Raises Refusal where the folder holds neither an adapter nor a model.
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
    """What `push` would upload, as a line to show before it does."""
    files = files_to_push(folder)
    return _("to {repo}: {names} ({mb:,.1f} MB)", repo=repo, mb=sum(file.stat().st_size
             for file in files) / 1e6, names=", ".join(file.name for file in files))


def check(repo: str) -> None:
    """Raise Refusal for what can be known before anything is written: the name, the token."""
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
    """Upload files_to_push(folder) in one commit to the hub's model repository `repo`
    (USER/NAME), which is created if it does not exist; returns its address.

    A new repository is private unless asked otherwise: what was published cannot be taken back. An
    existing repository keeps its visibility. Raises Refusal, in one line, for any error of the hub
    or of the network.
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
    except (hub.HTTPError, OSError, RuntimeError) as error:  # RuntimeError: hf_xet's
        raise Refusal(f"--push {repo}: the hub does not answer ({type(error).__name__}); try "
                      f"again while online") from None
    except ValueError as error:  # README.md, which the hub checks first
        raise Refusal(f"--push {repo}: the hub refuses the files "
                      f"({' '.join(str(error).split())})") from None
    return str(where)


def content(file: Path) -> str | bytes:
    """The file's path, or adapter_config.json's bytes without the path of a base in a folder:
    /home/me/models/PhoGPT-4B becomes PhoGPT-4B."""
    if file.name != "adapter_config.json":
        return str(file)
    config = read_object(file, "nothing was uploaded")
    base = config.get("base_model_name_or_path") or ""
    local = base.startswith(("/", ".", "~")) or "\\" in base or base.count("/") > 1
    if base and (local or Path(base).is_dir()):
        config["base_model_name_or_path"] = PurePosixPath(base.replace("\\", "/")).name
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def why(error) -> str:
    """The reason for a refusal of the hub, in words."""
    status = error.response.status_code
    reasons = {
        401: "the token is not valid; set HF_TOKEN to one with write access",
        403: "the token may not write there; use one with write access, of an account that owns it",
        404: "no such repository or user, or the token may not see it",
    }
    said = " ".join((error.server_message or "").split())
    reason = reasons.get(status, f"the hub answers {status}")
    return f"{reason} (the hub: {said})" if said else reason


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
