"""A bundle as a data set on the Hugging Face hub, or on another server that speaks its language (`HF_ENDPOINT`)."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from harness.errors import UserError
from harness.results import Run
from reports import bundle

PREFIX = "hf:"


def push(run: Run, name: str) -> str:
    """Publish to the data set `org/name`, which is made where it is missing; its address.

    Raises UserError, with the remedy, where the hub cannot be reached or does not let us in.
    """
    from huggingface_hub import HfApi, errors

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{PREFIX}{name} names no data set: give {PREFIX}org/name")
    no_answer: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    "what the HTTP library of this version of the hub's client raises"
    api = HfApi()
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = bundle.publish(run, Path(folder) / "bundle")
            api.create_repo(name, repo_type="dataset", exist_ok=True)
            held = set(api.list_repo_files(name, repo_type="dataset"))
            if held - {".gitattributes"} and bundle.SUMS not in held:
                raise UserError(f"{PREFIX}{name} holds something else, which would be removed: give another name")
            api.upload_folder(
                repo_id=name,
                repo_type="dataset",
                folder_path=made,
                commit_message=f"Run {run.manifest.run}",
                delete_patterns="*",
            )
    except errors.HFValidationError as error:
        raise UserError(f"{PREFIX}{name} names no data set: {' '.join(str(error).split())}") from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError("the hub wants to know who you are: run `hf auth login`, or set HF_TOKEN") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        advice = "is your token allowed to write there?" if status in (401, 403) else "try again later"
        raise UserError(f"the hub answered {status} for {name}: {advice}") from error
    except (no_answer, ConnectionError) as error:
        raise UserError(f"cannot reach {api.endpoint} ({type(error).__name__}): publish into a directory") from error
    return f"{api.endpoint}/datasets/{name}"
