"""What a run needs of the world outside: W&B's server and the Hugging Face hub, asked with a time limit."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import requests

from qlora_dist.cluster.doctor.wanted import Wanted
from qlora_dist.config.redact import redact
from qlora_dist.track.wandb import choose_mode, has_key

Facts = dict[str, Any]
CONNECT_S, READ_S = 5.0, 10.0
# The resolver may take longer over a name than any of a connection's own limits.
ANSWER_S = 20.0


def in_time(function: Callable[[], Facts], limit_s: float = ANSWER_S) -> Facts:
    """What `function` returns, or {"error": ...} where it raises or is not back within `limit_s` seconds."""
    answers: list[Facts] = []

    def call() -> None:
        try:
            answers.append(function())
        except Exception as error:  # whatever it is, it is the finding
            answers.append({"error": f"{type(error).__name__}: {plain(error)}"})

    begun = time.monotonic()
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(limit_s)
    answer = answers[0] if answers else {"error": f"no answer within {limit_s:.0f} s"}
    return {**answer, "seconds": time.monotonic() - begun}


def plain(error: Exception) -> str:
    """One short line of an exception, without secrets."""
    if isinstance(error, OSError) and error.strerror:
        # Its first argument is a number.
        return redact(error.strerror if error.filename is None else f"{error.strerror}: {error.filename}")[:160]
    cause: Any = error.args[0] if error.args else error
    while getattr(cause, "reason", None) is not None:
        cause = cause.reason
    # urllib3 begins with the connection object.
    text = " ".join(str(cause).split())
    return redact(text.rpartition(">: ")[2] or type(error).__name__)[:160]


def wandb_facts(wanted: str) -> Facts:
    """How a run here would use W&B, and whether its server takes the key.

    Args:
        wanted: `track.wandb`.
    """
    if wanted == "off":
        return {"wanted": wanted}
    base = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")
    facts = {
        "wanted": wanted, "mode": choose_mode(wanted), "key": has_key(), "host": urlsplit(base).hostname,
        "variable": os.environ.get("WANDB_MODE"),
    }  # fmt: skip
    return facts | in_time(lambda: _ask_wandb(base)) if facts["mode"] == "online" else facts


def _ask_wandb(base: str) -> Facts:
    key = os.environ.get("WANDB_API_KEY")
    # Without a key here, requests takes the one that `wandb login` left in netrc.
    answer = requests.post(
        f"{base}/graphql", json={"query": "query Viewer { viewer { username } }"},
        auth=("api", key) if key else None, timeout=(CONNECT_S, READ_S),
    )  # fmt: skip
    if answer.status_code in (401, 403):
        return {"answer": "refused"}
    if answer.status_code != 200:
        return {"error": f"it answers with status {answer.status_code}"}
    viewer = (answer.json().get("data") or {}).get("viewer")
    return {"answer": "accepted", "user": viewer.get("username")} if viewer else {"answer": "refused"}


def hub_facts(wanted: Wanted) -> Facts:
    """Whether the base model can be had from the hub, its size in bytes, and whether it is in the cache already."""
    if wanted.hub is None:
        return {}
    from huggingface_hub import constants, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(wanted.hub, "config.json", revision=wanted.revision), str)
    facts = {
        "model": wanted.hub, "host": urlsplit(constants.ENDPOINT).hostname, "cached": cached,
        "offline": constants.HF_HUB_OFFLINE,
    }  # fmt: skip
    return facts if constants.HF_HUB_OFFLINE else facts | in_time(lambda: _ask_hub(wanted))


def _ask_hub(wanted: Wanted) -> Facts:
    from huggingface_hub import HfApi, errors

    assert wanted.hub is not None
    try:
        found = HfApi().model_info(wanted.hub, revision=wanted.revision, files_metadata=True, timeout=READ_S)
        HfApi().auth_check(wanted.hub)
    except errors.GatedRepoError:
        return {"answer": "gated"}
    except errors.RevisionNotFoundError:
        return {"answer": "no such revision"}
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        return {"answer": "no such model"}
    weights = [file.size or 0 for file in found.siblings or () if file.rfilename.endswith(".safetensors")]
    return {"answer": "there", "bytes": sum(weights)}
