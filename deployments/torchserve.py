"""TorchServe's inference API: how its clients send payloads, and the replies and errors they read."""

from __future__ import annotations

import binascii
import math
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from deployments.errors import (
    BadRequest,
    BodyTooLarge,
    BodyTooSlow,
    DeadlineExceeded,
    ModelFailed,
    ModelNotFound,
    NotReady,
    Overloaded,
    RequestError,
    Unauthorized,
    UnsupportedEncoding,
    VersionNotFound,
)
from deployments.messages import read_json
from deployments.served import Served

#: TorchServe's exception names, by our errors; 405 and unknown paths come from routing.
_TYPES: dict[type[RequestError], str] = {
    BadRequest: "BadRequestException",
    ModelNotFound: "ModelNotFoundException",
    VersionNotFound: "ModelVersionNotFoundException",
    BodyTooLarge: "RequestEntityTooLargeException",
    DeadlineExceeded: "RequestTimeoutException",
    Overloaded: "ServiceUnavailableException",
    NotReady: "ServiceUnavailableException",
    ModelFailed: "InternalServerException",
    BodyTooSlow: "RequestTimeoutException",
    UnsupportedEncoding: "UnsupportedMediaTypeException",
    Unauthorized: "InvalidKeyException",
}
#: Fields that a form may have: each costs a copy.
_MOST_FIELDS = 16
#: Characters of a form's Content-Type; reading one takes quadratic time.
_LONGEST_TYPE = 1000
_PLAIN_NAME = re.compile(rb"[\w.-]+")
_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_TYPES_BY_STATUS = {404: "ResourceNotFoundException", 405: "MethodNotAllowedException", 400: "BadRequestException"}


def error_body(error: RequestError, status: int) -> dict[str, Any]:
    """Return the error as TorchServe writes it: code, type, message."""
    kind = _TYPES.get(type(error)) or _TYPES_BY_STATUS.get(status, "InternalServerException")
    return {"code": status, "type": kind, "message": str(error)}


def may_hold_json(content_type: str) -> bool:
    """Say whether a body of this type may have to be read as JSON."""
    return _kind(content_type) in ("application/json", "multipart/form-data")


def decode_payload(content_type: str, body: bytes) -> Any:
    """Return what the servable gets: JSON decoded, text as str, the field `data` or `body` of a form, else bytes.

    A part of a multipart form is what its own Content-Type says; a field without one, and without a file name, is text
    where it is UTF-8.
    """
    kind = _kind(content_type)
    if kind == "multipart/form-data":
        return _decode_parts(content_type, body)
    if kind == "application/x-www-form-urlencoded":
        return _decode_fields(body)
    return _decode(kind, body)


def _kind(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _decode(kind: str, body: bytes) -> Any:
    if kind == "application/json":
        return read_json(body, with_nan=True)  # Python's clients write it, TorchServe read it
    if kind.startswith("text/"):
        try:
            return body.decode()
        except UnicodeDecodeError as error:
            raise BadRequest(f"the text is not UTF-8: {error}") from error
    return body


def _decode_fields(body: bytes) -> str | bytes:
    """Return the field `data` or `body` of an urlencoded form, as text where it is UTF-8; of anything else the body.

    `curl -d` says of whatever it sends that it is such a form: a text, JSON, a photo. So a form is only what has
    a plain name and `=` in every field, and no `%` but those of escapes.
    """
    fields = [field.partition(b"=") for field in body.split(b"&", _MOST_FIELDS)]
    if len(fields) > _MOST_FIELDS or not all(sign and _PLAIN_NAME.fullmatch(name) for name, sign, _ in fields):
        return body
    values = {name: value for name, _, value in fields}
    found = values.get(b"data", values.get(b"body"))
    if found is None or _BROKEN_ESCAPE.search(found):
        return body
    # Quoted-printable has `=` where this has `%`. For 16 MB of escapes urllib takes 2.5 s, and this way 0.5.
    return _text_or_bytes(binascii.a2b_qp(found.replace(b"+", b" ").replace(b"=", b"=3D").replace(b"%", b"=")))


def _text_or_bytes(content: bytes) -> str | bytes:
    try:
        return content.decode()
    except UnicodeDecodeError:  # a photo, say: as TorchServe's handlers got it
        return content


def _decode_parts(content_type: str, body: bytes) -> Any:
    """Return the part `data` or `body` of a multipart form."""
    if len(content_type) > _LONGEST_TYPE:
        raise BadRequest(f"the form cannot be read: its Content-Type has {len(content_type)} characters")
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise BadRequest("the form cannot be read: its Content-Type has no boundary")
    try:
        parts = _split(boundary, body)
    except FormParserError as error:
        raise BadRequest(f"the form cannot be read: {error}") from error
    part = parts.get("data", parts.get("body"))
    if part is None:
        raise BadRequest(f"the form needs a field data or body; it has {', '.join(parts) or 'none'}")
    kind, content = part
    return _text_or_bytes(content) if kind is None else _decode(kind, content)


def _split(boundary: bytes, body: bytes) -> dict[str, tuple[str | None, bytes]]:
    """Return each part's own Content-Type and its bytes as they were sent, by the name of its field.

    The type is None of what has neither that nor a file name.

    Starlette's parser makes text of parts without a file name, and keeps no Content-Type of theirs.
    """
    parts: list[tuple[str, tuple[str | None, bytes]]] = []
    headers: dict[bytes, bytes] = {}
    name, value, content = bytearray(), bytearray(), bytearray()

    def begin_part() -> None:
        headers.clear()
        content.clear()

    def end_header() -> None:
        headers[bytes(name).lower()] = bytes(value)
        name.clear()
        value.clear()

    def end_part() -> None:
        options = parse_options_header(headers.get(b"content-disposition"))[1]
        field = options.get(b"name")
        if field is None:
            raise BadRequest("the form cannot be read: a part of it has no name")
        if len(parts) == _MOST_FIELDS:
            raise BadRequest(f"the form has more than {_MOST_FIELDS} parts")
        is_field = b"content-type" not in headers and b"filename" not in options
        kind = None if is_field else _kind(headers.get(b"content-type", b"").decode("latin-1"))
        parts.append((field.decode(errors="replace"), (kind, bytes(content))))

    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": begin_part,
            "on_header_field": lambda data, start, end: name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: value.extend(data[start:end]),
            "on_header_end": end_header,
            "on_part_data": lambda data, start, end: content.extend(memoryview(data)[start:end]),
            "on_part_end": end_part,
        },
    )
    parser.write(body)
    parser.finalize()
    return dict(parts)


def model_list(service: Served) -> dict[str, Any]:
    """Return the reply to GET /models."""
    return {"models": [{"modelName": service.name, "modelUrl": service.args.model}]}


def model_description(service: Served) -> list[dict[str, Any]]:
    """Return the reply to GET /models/{model}: TorchServe's keys, and the answering replica's compile report.

    Times in it are whole numbers, as TorchServe's clients read them. The one worker is the replica that answers: it
    knows of no others.
    """
    batching = service.args.batching
    report = service.report()
    return [
        {
            "modelName": service.name,
            "modelVersion": service.version,
            "modelUrl": service.args.model,
            "runtime": "python",
            "batchSize": max(batching.batch_sizes),
            "maxBatchDelay": _round_up(batching.wait_ms),
            "jobQueueSize": batching.max_queue,
            "responseTimeout": _round_up(service.limits.timeout_s),
            "loadedAtStartup": True,
            "workers": [_describe_worker(service, str(report["device"].get("device", "")))],
            "compileReport": report,
        }
    ]


def _round_up(time: float | None) -> int | None:
    return None if time is None or math.isinf(time) else math.ceil(time)


def _describe_worker(service: Served, device: str) -> dict[str, Any]:
    started = datetime.fromtimestamp(service.started, UTC)
    return {
        "id": str(os.getpid()),
        "startTime": started.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "status": "READY" if service.failure() is None else "UNLOADED",
        "gpu": device.startswith("cuda"),
        "pid": os.getpid(),
        "memoryUsage": _resident_bytes(),
    }


def _resident_bytes() -> int:
    """Return the memory that this process has, in bytes; 0 where the system does not say (it is not Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
