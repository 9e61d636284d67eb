"""The OpenAPI description is true: every path and method, and every status that malformed requests get."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from deployments.args import AuthArgs
from deployments.http import make_app
from deployments.keys import Keys
from deployments.openapi import describe
from deployments.service import ModelService
from tests.support.fuzz import ALLOWED, Client, Request, make_request
from tests.support.http_server import listen
from tests.support.local import serve_locally

COUNT = 3000
#: Statuses that no description of a path has: paths and methods that do not exist.
ROUTING = {404, 405}


@pytest.fixture(scope="module", params=["Tiny", "Mixed"])
def service(request: pytest.FixtureRequest) -> Iterator[ModelService]:
    args = {"model": f"tests.support.servables:{request.param}", "pt2": {"compile": {"enable": False}}}
    with serve_locally(args) as found:
        yield found


@pytest.fixture(scope="module")
def client(service: ModelService) -> Iterator[Client]:
    with listen(make_app(service)) as port:
        found = Client("127.0.0.1", port)
        yield found
        found.close()


def test_every_route_is_described(service: ModelService, client: Client) -> None:
    status, body = client.ask(Request("GET", "/openapi.json"))
    assert status == 200
    described = {(path, method) for path, methods in json.loads(body)["paths"].items() for method in methods}
    routes = [route for route in make_app(service).routes if isinstance(route, Route)]
    served = {(r.path, m.lower()) for r in routes for m in (r.methods or ()) if m != "HEAD"}
    # Neither of the two makes embeddings, so that path is not theirs, though it says so in OpenAI's words.
    assert served - described == {("/openapi.json", "get"), ("/v1/embeddings", "post")}
    assert described <= served


def test_the_description_says_below_which_root_and_who_needs_a_key() -> None:
    args = {
        "model": "tests.support.servables:Tiny",
        "pt2": {"compile": {"enable": False}},
        "auth": {"open_health": False},
    }
    with serve_locally(args) as service:
        described = describe(service, "/tiny")
        keys = Keys(AuthArgs(open_health=False), "0.0.0.0", {"PT2_API_KEYS": "0123456789abcdef"})
        with TestClient(make_app(service, keys)) as client:
            for path, methods in described["paths"].items():
                for method, operation in methods.items():
                    status = client.request(method, path.format(model="tiny", version="1")).status_code
                    assert (status, "401" in operation["responses"]) == (401, True), (method, path)
            assert client.get("/openapi.json").status_code == 401
    assert described["servers"] == [{"url": "/tiny"}]
    ping = described["paths"]["/ping"]["get"]["responses"]["500"]
    assert list(ping["content"]["application/json"]["schema"]["properties"]) == ["status"]


def find_operation(paths: dict[str, Any], request: Request) -> Any:
    for path, methods in paths.items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), request.path):
            return methods.get(request.method.lower())
    return None


def test_malformed_requests_get_statuses_that_are_described(service: ModelService, client: Client) -> None:
    paths = json.loads(client.ask(Request("GET", "/openapi.json"))[1])["paths"]
    inputs = json.loads(client.ask(Request("GET", f"/v2/models/{service.name}"))[1])["inputs"]
    seen = set()
    for number in range(COUNT):
        request = make_request(number, service.name, inputs)
        status, body = client.ask(request)
        assert status in ALLOWED, (number, status, body)
        operation = find_operation(paths, request)
        assert status in ROUTING or operation is None or str(status) in operation["responses"], (number, status, body)
        if status != 200 and body != b"Invalid HTTP request received.":  # the words of the server below us
            assert isinstance(json.loads(body), dict)
        seen.add(status)
    assert seen >= {400, 404, 405, 413, 415}
    assert service.admission.rows == service.admission.bytes == 0
    assert client.ask(Request("GET", "/v2/health/ready"))[0] == 200
