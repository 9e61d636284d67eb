"""What can be wrong with a request, in no protocol's words; picklable, so handle callers get the same errors."""

from __future__ import annotations

#: Characters of a message: many of them repeat what the caller sent, which may be megabytes.
_LONGEST = 1000


class RequestError(Exception):
    """A request that cannot be answered; `status` is its HTTP status. Long messages are cut."""

    status = 500

    def __init__(self, message: object = "", *more: object) -> None:
        text = str(message)
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST - 50]}... ({len(text) - _LONGEST + 50} more characters)"
        super().__init__(text, *more)


class BadRequest(RequestError):
    """The payload cannot be understood or does not fit the model."""

    status = 400


class ModelNotFound(RequestError):
    """No model of that name is served here."""

    status = 404


class VersionNotFound(RequestError):
    """The model is served in another version."""

    status = 404


class BodyTooLarge(RequestError):
    """The body is over `limits.body_bytes`."""

    status = 413


class BodyTooSlow(RequestError):
    """The body did not come within `limits.body_s`."""

    status = 408


class UnsupportedEncoding(RequestError):
    """The body is packed in a way that is not known here."""

    status = 415


class Unsupported(RequestError):
    """The protocol has it, this server has not."""

    status = 501


class Unauthorized(RequestError):
    """No key, or a wrong one."""

    status = 401


class Forbidden(RequestError):
    """A caller from somewhere that is not let in."""

    status = 403


class ModelFailed(RequestError):
    """The model raised on a valid request."""

    status = 500


class DeadlineExceeded(RequestError):
    """The request's deadline passed before its answer was there."""

    status = 408


class Overloaded(RequestError):
    """The queue is full; try again after `retry_after_s` seconds."""

    status = 503

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class NotReady(RequestError):
    """The replica is starting, stopping or has lost its device."""

    status = 503
