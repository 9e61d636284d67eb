from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger, ReplicaState, RequestMetadata
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentResponse, DeploymentResponseGenerator
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatusOverview, ServeStatus
from starlette import datastructures

from deployments import gateway
from deployments.asgi_call import Headers, call_app, call_app_in_parts
from deployments.body import read_body
from deployments.gateway import Gateway, GatewayArgs, build, parse_args
from optim.errors import ConfigError
from tests.support.http_server import listen

Reply = tuple[int, Headers, bytes]
RUNNING, STARTING, STOPPING = ReplicaState.RUNNING, ReplicaState.STARTING, ReplicaState.STOPPING


class Assigned:
    """A request that a replica has, as Ray Serve holds it: who waits for it no longer has not ended it."""

    def __init__(self, task: asyncio.Task[Reply]) -> None:
        self.task = task

    async def get_async(self) -> Reply:
        return await asyncio.shield(self.task)

    def cancel(self) -> None:
        self.task.cancel()


@dataclass
class Model:
    """A model's replica in this process; `answer.remote` gives what Ray Serve's handles give."""

    name: str
    asked: list[tuple[str, str, datastructures.Headers, bytes]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    delay_s: float = 0.0
    assigned: bool = True

    @property
    def deployment_id(self) -> Any:
        return SimpleNamespace(name=self.name, app_name=self.name)

    @property
    def answer(self) -> Model:
        return self

    def remote(self, method: str, path: str, headers: Headers, body: bytes) -> DeploymentResponse[Any]:
        self.asked.append((method, path, datastructures.Headers(raw=headers), body))
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        if self.assigned:
            future.set_result(Assigned(asyncio.create_task(self._work(path))))
        else:
            future.add_done_callback(lambda found: self.ended.append("unassigned" if found.cancelled() else "done"))
        return DeploymentResponse(future, RequestMetadata(request_id="1", internal_request_id="1"))

    async def _work(self, path: str) -> Reply:
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        self.ended.append("done")
        key = "data" if path.startswith("/v1") else "models"
        return 200, [], json.dumps({key: [self.name]}).encode()


class Cluster:
    """What Ray Serve says of its applications; each has one model, of the same name."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.applications: dict[str, ApplicationStatusOverview] = {}

    def put(
        self,
        name: str,
        status: str = "RUNNING",
        deployment: str = "HEALTHY",
        replicas: dict[ReplicaState, int] | None = None,
        *,
        built: bool = True,
    ) -> Model:
        found = DeploymentStatusOverview(
            DeploymentStatus(deployment),
            DeploymentStatusTrigger.UNSPECIFIED,
            {RUNNING: 1} if replicas is None else replicas,
            "",
        )
        deployments = {name: found} if built else {}
        self.applications[name] = ApplicationStatusOverview(ApplicationStatus(status), "", 0.0, deployments)
        return self.models.setdefault(name, Model(name))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    monkeypatch.setattr("ray.serve.status", lambda: ServeStatus(applications=found.applications))
    monkeypatch.setattr("ray.serve.get_deployment_handle", lambda model, application: found.models[model])
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: SimpleNamespace(app_name="gateway"))
    monkeypatch.setattr(gateway, "find_http_host", lambda: "127.0.0.1")
    monkeypatch.setattr(gateway, "share_serve_log", lambda: None)  # it would take the tests' log from them for good
    monkeypatch.delenv("PT2_API_KEYS", raising=False)
    return found


class Asker:
    """A gateway, to be asked in this process."""

    def __init__(self, args: dict[str, Any] | None = None) -> None:
        # Ray Serve's wrapper of the class has a constructor that only Ray Serve can await.
        self.gateway = Gateway.__mro__[1](parse_args(args))
        self.app = self.gateway.__serve_build_asgi_app__()

    async def ask(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        raw = [(key.encode(), value.encode()) for key, value in (headers or {}).items()]
        status, _, content = await call_app(self.app, "GET" if body is None else "POST", path, raw, body or b"")
        return status, json.loads(content)

    async def look(self) -> None:
        await self.gateway._directory._look_up()


def run(test: Callable[[Asker], Awaitable[None]], args: dict[str, Any] | None = None) -> None:
    async def main() -> None:
        await test(Asker(args))

    asyncio.run(main())


def test_what_may_be_written() -> None:
    assert parse_args(None) == parse_args({}) == GatewayArgs()
    parsed = parse_args({"applications": ["a"], "limits": {"body_bytes": 5}, "auth": {"required": False}})
    assert (parsed.applications, parsed.limits.body_bytes, parsed.auth.required) == (["a"], 5, False)
    assert parse_args({"limits": {"timeout_s": 2}}).limits.timeout_s == 2.0


@pytest.mark.parametrize(
    ("args", "key"),
    [
        ({"limits": {"body_s": 0.0}}, "args.limits.body_s"),
        ({"limits": {"body_s": float("nan")}}, "args.limits.body_s"),
        ({"limits": {"timeout_s": 0}}, "args.limits.timeout_s"),
        ({"limits": {"timeout_s": float("nan")}}, "args.limits.timeout_s"),
        ({"limits": {"bytes_in_flight": -5}}, "args.limits.bytes_in_flight"),
        ({"limits": {"rows": 3}}, "args.limits.rows"),
        ({"application": "a"}, "args.application"),
        ([], "args"),
    ],
)
def test_mistakes_are_named(args: Any, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(args)
    assert str(caught.value).startswith(f"{key}:")


@pytest.mark.parametrize(
    ("host", "environment", "in_task", "refused"),
    [
        ("0.0.0.0", "", True, True),
        ("0.0.0.0", "a-key-of-16-letters", True, False),
        ("127.0.0.1", "", True, False),
        ("0.0.0.0", "", False, False),  # whoever only looks at the configuration need not have the keys
    ],
)
def test_building_asks_for_keys_where_they_are_needed(
    monkeypatch: pytest.MonkeyPatch, host: str, environment: str, in_task: bool, refused: bool
) -> None:
    monkeypatch.setenv("PT2_API_KEYS", environment)
    monkeypatch.setattr(gateway, "find_http_host", lambda: host)
    monkeypatch.setattr(gateway, "is_the_task_of_ray_serve", lambda: in_task)
    monkeypatch.setattr(gateway, "stop_serve_run_soon", lambda: True)
    if refused:
        with pytest.raises(RayServeException, match=r"configuration error: args\.auth: .*; stopping `serve run`"):
            build({})
    else:
        build({})


@pytest.mark.parametrize(
    ("application", "deployment", "replicas"),
    [
        ("DEPLOYING", "UPDATING", {STARTING: 1}),
        ("UNHEALTHY", "UNHEALTHY", {STARTING: 1, STOPPING: 1}),
        ("RUNNING", "UNHEALTHY", {STARTING: 1}),
        ("RUNNING", "HEALTHY", {STARTING: 1}),  # it moves to another node
        ("RUNNING", "UPSCALING", {STARTING: 1}),  # its first replica, with requests waiting for it elsewhere
        ("DEPLOY_FAILED", "DEPLOY_FAILED", {}),
    ],
)
def test_a_model_without_a_replica_is_not_ready_and_not_unknown(
    cluster: Cluster, application: str, deployment: str, replicas: dict[ReplicaState, int]
) -> None:
    tiny, other = cluster.put("tiny", application, deployment, replicas), cluster.put("other")

    async def test(asker: Asker) -> None:
        status, body = await asker.ask("/v2/models/tiny")
        assert status == 503
        assert body["error"].startswith(f"model tiny is not ready: application tiny is {application}")
        status, body = await asker.ask("/v2/health/ready")
        assert (status, f"application tiny is {application}" in body["error"]) == (503, True)
        assert (await asker.ask("/v2/models/other"))[0] == 200
        assert (await asker.ask("/v2/models/nothing"))[0] == 404
        assert (await asker.ask("/models"))[1] == {"models": ["other"]}
        assert tiny.asked == []
        cluster.put("tiny")
        await asker.look()
        assert (await asker.ask("/v2/models/tiny"))[0] == (await asker.ask("/v2/health/ready"))[0] == 200
        assert len(other.asked) == 3

    run(test)


@pytest.mark.parametrize("state", [RUNNING, "UPDATING", "RECOVERING", "PENDING_MIGRATION"])
def test_a_replica_that_takes_over_settings_or_moves_goes_on_answering(cluster: Cluster, state: Any) -> None:
    cluster.put("tiny", "DEPLOYING", "UPDATING", {ReplicaState(state): 1})

    async def test(asker: Asker) -> None:
        assert (await asker.ask("/v2/models/tiny"))[0] == (await asker.ask("/v2/health/ready"))[0] == 200

    run(test)


def test_a_model_at_zero_replicas_is_woken_by_its_own_requests_only(cluster: Cluster) -> None:
    tiny = cluster.put("tiny", replicas={})

    async def test(asker: Asker) -> None:
        assert (await asker.ask("/v2/health/ready"))[0] == 200  # else nobody would send what wakes it
        assert (await asker.ask("/models"))[1] == {"models": []}
        assert tiny.asked == []
        for deployment, replicas in (("HEALTHY", {}), ("UPSCALING", {STARTING: 1}), ("DOWNSCALING", {STOPPING: 1})):
            cluster.put("tiny", "RUNNING", deployment, replicas)
            await asker.look()
            assert (await asker.ask("/predictions/tiny", b"[]"))[0] == 200
        assert len(tiny.asked) == 3

    run(test)


def test_a_version_that_is_being_built_takes_nothing_away(cluster: Cluster) -> None:
    cluster.put("tiny", "DEPLOYING", built=False)

    async def test(asker: Asker) -> None:
        assert (await asker.ask("/v2/models/tiny"))[0] == 503
        assert (await asker.ask("/v2/health/ready"))[0] == 503
        for status, built in (("RUNNING", True), ("DEPLOYING", False), ("DEPLOY_FAILED", False)):
            cluster.put("tiny", status, built=built)
            await asker.look()
            assert (await asker.ask("/v2/models/tiny"))[0] == (await asker.ask("/v2/health/ready"))[0] == 200
            assert (await asker.ask("/v2/models/renamed"))[0] == (503 if status == "DEPLOYING" else 404)
        cluster.put("tiny", "DELETING", built=False)
        await asker.look()
        assert (await asker.ask("/v2/models/tiny"))[0] == 404

    run(test)


def test_an_application_that_is_named_and_not_deployed_is_waited_for(cluster: Cluster) -> None:
    cluster.put("tiny")
    cluster.put("unnamed", "DEPLOY_FAILED", "DEPLOY_FAILED", {})

    async def test(asker: Asker) -> None:
        status, body = await asker.ask("/v2/health/ready")
        assert (status, body) == (503, {"error": "not ready: application later is not deployed"})
        assert (await asker.ask("/v2/models/tiny"))[0] == 200
        assert (await asker.ask("/v2/models/later"))[0] == 503
        cluster.put("later")
        await asker.look()
        assert (await asker.ask("/v2/health/ready"))[0] == (await asker.ask("/v2/models/later"))[0] == 200
        assert (await asker.ask("/v2/models/unnamed"))[0] == 404

    run(test, {"applications": ["tiny", "later", "gateway"]})


def test_the_model_is_told_what_is_left_of_the_time(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = cluster.put("tiny")

    async def read_slowly(*args: Any) -> Any:
        await asyncio.sleep(0.3)
        return await read_body(*args)

    monkeypatch.setattr(gateway, "read_body", read_slowly)

    async def test(asker: Asker) -> None:
        for path, body in (("/predictions/tiny", b"[]"), ("/v1/embeddings", b'{"model": "tiny"}')):
            assert (await asker.ask(path, body, {"x-request-timeout-seconds": "10"}))[0] == 200
            headers = tiny.asked.pop()[2]
            assert 8 < float(headers["x-pt2-timeout-seconds"]) <= 9.6
            status, reply = await asker.ask(path, body, {"x-request-timeout-seconds": "0.2"})
            assert (status, "the deadline has passed" in str(reply), tiny.asked) == (408, True, [])
        assert (await asker.ask("/predictions/tiny", b"[]", {"x-request-timeout-seconds": "soon"}))[0] == 400

    run(test)


@pytest.mark.parametrize(("limits", "seconds"), [({}, "0.5"), ({"timeout_s": 30}, "0.5"), ({"timeout_s": 0.5}, None)])
def test_a_model_that_does_not_answer_in_time_is_not_waited_for(
    cluster: Cluster, limits: dict[str, float], seconds: str | None
) -> None:
    tiny = cluster.put("tiny")
    tiny.delay_s = 60

    async def test(asker: Asker) -> None:
        headers = {} if seconds is None else {"x-request-timeout-seconds": seconds}
        for path, body in (
            ("/predictions/tiny", b"[]"),
            ("/v2/models/tiny/infer", b"{}"),
            ("/v1/embeddings", b'{"model": "tiny"}'),
            ("/models", None),
        ):
            status, reply = await asyncio.wait_for(asker.ask(path, body, headers), timeout=10)
            assert status == 408
            text = reply["error"]["message"] if "/v1" in path else reply["error" if "/v2" in path else "message"]
            assert text.startswith("no answer in time")
        await asyncio.sleep(0)
        assert tiny.ended == ["cancelled"] * 4
        # Our own limit is not the model's: it may have a shorter one.
        assert all(("x-pt2-timeout-seconds" in asked[2]) is (seconds is not None) for asked in tiny.asked)

    run(test, {"limits": limits})


@pytest.mark.parametrize(("assigned", "ended"), [(True, "cancelled"), (False, "unassigned")])
def test_a_caller_that_goes_away_takes_the_request_back_from_the_model(
    cluster: Cluster, assigned: bool, ended: str
) -> None:
    tiny = cluster.put("tiny")
    tiny.delay_s, tiny.assigned = 60, assigned

    async def test(asker: Asker) -> None:
        for path, body in (("/predictions/tiny", b"[]"), ("/models", None)):
            caller = asyncio.create_task(asker.ask(path, body))
            while not tiny.asked:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.01)
            assert tiny.ended == []
            caller.cancel()  # what Ray Serve does when the connection is closed
            with pytest.raises(asyncio.CancelledError):
                await caller
            await asyncio.sleep(0)
            assert tiny.ended == [ended]
            tiny.asked.clear()
            tiny.ended.clear()
        assert asker.gateway._admission.bytes == 0

    run(test)


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ("/predictions/tiny/1%252Finfer", "/predictions/tiny/1%2Finfer"),
        ("/v2/models/tiny/versions/%2531", "/v2/models/tiny/versions/%31"),
        ("/models/tiny/%C3%A9%20", "/models/tiny/é "),
    ],
)
def test_a_path_is_decoded_once_on_its_way(cluster: Cluster, raw: str, path: str) -> None:
    tiny, seen = cluster.put("tiny"), []

    async def model(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["path"], scope["raw_path"].decode()))
        await send({"type": "http.response.start", "status": 200})

    with listen(Asker().app) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", raw)
        assert connection.getresponse().status == 200
        connection.close()
    method, handed_on, _, body = tiny.asked[0]
    asyncio.run(call_app(model, method, handed_on, [], body))
    assert seen == [(path, raw)]


class Streamed:
    """A request whose reply comes in parts, as Ray Serve holds it."""

    def __init__(self, parts: AsyncIterator[Any]) -> None:
        self.parts = parts
        self.cancelled = 0

    async def __anext__(self) -> Any:
        return await anext(self.parts)

    def cancel(self) -> None:
        self.cancelled += 1


class Writer(Model):
    """A model whose reply to anything is a stream: `parts`, then `error`, or nothing more until it is cancelled."""

    parts: list[Any]
    error: Exception | None = None
    is_endless = False
    streamed: Streamed

    def options(self, *, stream: bool) -> Writer:
        assert stream
        return self

    @property
    def answer_in_parts(self) -> Any:
        return SimpleNamespace(remote=self.stream)

    def stream(self, *asked: Any) -> DeploymentResponseGenerator[Any]:
        async def make() -> AsyncGenerator[Any]:
            for part in self.parts:
                yield part
            if self.error is not None:
                raise self.error
            if self.is_endless:
                await asyncio.Event().wait()

        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.streamed = Streamed(make())
        future.set_result(self.streamed)
        return DeploymentResponseGenerator(future, RequestMetadata(request_id="1", internal_request_id="1"))


EVENTS = (200, [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-own", b"1")])
ASKED = b'{"model": "writer", "stream": true}'


@pytest.fixture
def writer(cluster: Cluster) -> Writer:
    cluster.put("writer")
    made = Writer("writer")
    cluster.models["writer"] = made
    return made


def ask_for_stream(asker: Asker, headers: Headers | None = None) -> Any:
    return aclosing(call_app_in_parts(asker.app, "POST", "/v1/completions", headers or [], ASKED))


def test_a_stream_is_handed_on_as_it_comes(writer: Writer) -> None:
    writer.parts, writer.is_endless = [EVENTS, b"data: 1\n\n", b"data: 2\n\n"], True

    async def test(asker: Asker) -> None:
        async with ask_for_stream(asker) as parts:
            assert await anext(parts) == EVENTS
            assert [await anext(parts), await anext(parts)] == writer.parts[1:]
            assert writer.streamed.cancelled == 0
        assert writer.streamed.cancelled == 1  # the caller has gone, in the middle
        assert asker.gateway._admission.bytes == 0

    run(test)


def test_a_stream_that_is_over_is_not_taken_back(writer: Writer) -> None:
    writer.parts = [EVENTS, b"data: [DONE]\n\n"]

    async def test(asker: Asker) -> None:
        async with ask_for_stream(asker) as parts:
            assert [part async for part in parts] == [*writer.parts, b""]
        assert writer.streamed.cancelled == 0

    run(test)


def test_a_refusal_of_a_stream_is_handed_on_as_it_is(writer: Writer) -> None:
    writer.parts = [(503, [(b"retry-after", b"3"), (b"content-type", b"application/json")]), b'{"error"', b": 1}"]

    async def test(asker: Asker) -> None:
        async with ask_for_stream(asker) as parts:
            assert [part async for part in parts] == [writer.parts[0], b'{"error": 1}']

    run(test)


def test_a_replica_that_is_lost_in_a_stream_is_told_by_an_event(writer: Writer) -> None:
    writer.parts, writer.error = [EVENTS, b"data: 1\n\n"], ActorDiedError()

    async def test(asker: Asker) -> None:
        async with ask_for_stream(asker) as parts:
            events = [part async for part in parts]
        assert events[:2] == writer.parts
        assert "was lost; try again" in json.loads(events[2].removeprefix(b"data: "))["error"]["message"]
        writer.parts = []  # and before there is one, by the status
        async with ask_for_stream(asker) as parts:
            assert (await anext(parts))[0] == 503

    run(test)


def test_a_deadline_ends_a_stream_here_too(writer: Writer) -> None:
    writer.parts, writer.is_endless = [EVENTS, b"data: 1\n\n"], True

    async def test(asker: Asker) -> None:
        soon = [(b"x-request-timeout-seconds", b"0.5")]
        async with ask_for_stream(asker, soon) as parts:
            events = [part async for part in parts]
        assert "no answer in time" in json.loads(events[2].removeprefix(b"data: "))["error"]["message"]
        assert writer.streamed.cancelled == 1
        writer.parts = []
        async with ask_for_stream(asker, soon) as parts:
            assert (await anext(parts))[0] == 408
        assert writer.streamed.cancelled == 1

    run(test)


def test_what_an_application_raises_comes_out_of_its_reply() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        asyncio.run(call_app(broken, "GET", "/", [], b""))
