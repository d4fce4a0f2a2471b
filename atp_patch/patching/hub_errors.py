"""What went wrong between this program and the Hub, told apart, each in one line with its mend."""

from __future__ import annotations

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from atp_patch.contract.arguments import shown
from atp_patch.contract.errors import first_line

# What the Hub's client raises: errors of its HTTP library, of files and sockets, of metadata, and
# of uploads.
HUB_ERRORS: tuple[type[Exception], ...] = (
    *HfHubHTTPError.__bases__,
    EntryNotFoundError,
    HFValidationError,
    ValueError,
    RuntimeError,
)
_LOGIN = "log in with `hf auth login` or give token="
_NOT_STORED = (PermissionError, FileNotFoundError, NotADirectoryError, FileExistsError)


def explained(
    error: BaseException, repository: str, revision: str | None = None, *, writing: bool = False
) -> str:
    """Say in one line what the Hub's client ran into, and what mends it.

    Args:
        error: what the client raised.
        repository: the name of the repository.
        revision: the branch, tag or commit that was asked for; None: the default branch.
        writing: whether the repository was written to.
    """
    name = shown(repository)
    cause = error.__cause__
    if isinstance(error, LocalEntryNotFoundError):
        if cause is not None and not isinstance(cause, OfflineModeIsEnabled):
            return explained(cause, repository, revision, writing=writing)
        return (
            f"{name} is not whole in the cache, and nothing may be downloaded: leave out "
            "local_files_only=True and HF_HUB_OFFLINE once, or give the cache_dir= that has it."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return f"{name}: HF_HUB_OFFLINE forbids the use of the network; unset it."
    if isinstance(error, HFValidationError):
        return f"{name} is no name of a repository; give one like USER/REPOSITORY."
    if isinstance(error, LocalTokenNotFoundError):
        return f"{name} needs a token, and none is stored; {_LOGIN}."
    if isinstance(error, GatedRepoError):
        return (
            f"{name} is gated: ask for access at {constants.ENDPOINT}/{repository}, then {_LOGIN}."
        )
    if isinstance(error, RevisionNotFoundError):
        made = "make the branch first, or " if writing else ""
        return (
            f"{name} has no revision {shown(revision or constants.DEFAULT_REVISION)}; {made}give a "
            "branch, a tag or a whole commit that it has."
        )
    if isinstance(error, HfHubHTTPError):
        return _refused(error, name, writing)
    if isinstance(error, (HfHubHTTPError.__bases__[0], ConnectionError)):
        return (
            f"{name}: the Hub at {constants.ENDPOINT} cannot be reached ({first_line(error)}); "
            "check the network and HF_ENDPOINT, and try again"
            + ("." if writing else ", or load what was downloaded before.")
        )
    if isinstance(error, _NOT_STORED) or getattr(error, "errno", None) is not None:
        return (
            f"{name}: files cannot be stored ({first_line(error)}); make room, or give another "
            "folder (HF_HOME, cache_dir=)."
        )
    if cause is not None and isinstance(cause, HUB_ERRORS):  # an upload's thread says who failed
        return explained(cause, repository, revision, writing=writing)
    return f"{name}: the transfer broke off ({first_line(error)}); try again."


def _refused(error: HfHubHTTPError, name: str, writing: bool) -> str:
    """Return what a status of an HTTP answer means."""
    status = error.response.status_code
    unknown = isinstance(error, RepositoryNotFoundError)
    if unknown and status == 401:
        return (
            f"without a token the Hub knows no repository {name}: check the name; if it is "
            f"private, {_LOGIN}."
        )
    if unknown:
        return (
            f"there is no repository {name} that this token may see: check the name, and whether "
            "the token is of an account that may read it."
        )
    if status == 401 and "Invalid credentials" in _said(error):
        return (
            f"{name}: the Hub does not know this token; make one at "
            f"{constants.ENDPOINT}/settings/tokens, and {_LOGIN}."
        )
    if status == 401:
        return f"{name} needs a token; {_LOGIN}."
    if status == 403:
        right = "write to" if writing else "read"
        return (
            f"this token may not {right} {name} ({_said(error)}); give the token= of an account "
            f"with the right to {right} it."
        )
    if status == 429:
        return f"{name}: the Hub has had too many requests from here; try again in some minutes."
    if status >= 500:
        return f"{name}: the Hub has an error of its own ({status}); try again later."
    return f"{name}: the Hub refuses the request ({status}: {_said(error)})."


def _said(error: HfHubHTTPError) -> str:
    """Return what the server said, or the first line of the error."""
    said = error.response.headers.get("X-Error-Message") or error.server_message
    return first_line(error) if not isinstance(said, str) else said
