"""The judge that a step's settings name: an endpoint or a checkpoint, with its answers kept on disk."""

from pathlib import Path
from typing import Any

from modelwright.core.ask.kept import Kept
from modelwright.core.errors import UserError
from modelwright.core.step import StepContext


def open_judge(job: StepContext, url: str | None, model: str | None, endpoint: dict[str, Any], cache: str | None, batch: int) -> Kept:
    """The judge that a step's settings name: an endpoint, else the checkpoint under way; its answers kept in `cache`, else in
    the step's folder. Raises UserError when neither is given, and for what the endpoint's settings lack."""
    file = Path(cache) if cache else job.folder / "answers.jsonl"
    if url:
        from modelwright.core.ask.endpoint import open_endpoint

        return Kept(open_endpoint(url, model, endpoint), file)
    if job.source is None:
        raise UserError("no judge was given", how="give a checkpoint with --base, or --url and --model of an endpoint")
    from modelwright.core.ask.local import Local

    return Kept(Local(job.source, batch=batch, seed=job.seed), file)
