"""Errors as clients get them: in the shape of OpenAI's API, with the field that is wrong."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fewstep.serve.database import TableDown


class ApiError(HTTPException):
    """A request that is refused."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`param` is the field of the request that is wrong, and `code` what programs can compare."""
        super().__init__(status, message, headers)
        self.param, self.code = param, code


async def told(_: Request, error: Exception) -> Response:
    """The answer to a request that failed."""
    if isinstance(error, TableDown):
        message = (
            "the table of jobs cannot be reached; try again in a moment, with the same Idempotency-Key if you send one"
        )
        error = ApiError(503, message, code="not_ready", headers={"Retry-After": "10"})
    elif not isinstance(error, HTTPException):  # the server's log has it
        error = ApiError(500, "the server failed; its log says why", code="internal_error")
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    more = {name: getattr(error, name, None) for name in ("param", "code")}
    return JSONResponse({"error": {"message": error.detail, "type": kind, **more}}, error.status_code, error.headers)
